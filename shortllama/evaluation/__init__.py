"""What a model is worth: perplexity, with the protocol beside every number. Importing this loads neither torch nor data."""
