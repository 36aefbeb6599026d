"""Depth and width pruning of Llama-like models. Importing this package loads neither torch nor transformers."""
