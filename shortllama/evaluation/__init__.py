"""What a model is worth: perplexity, the protocol beside every number. Importing this loads no torch."""
