"""Doing a study (`shortllama.study`): its rows, the work, what it amounts to; and the shipped studies."""
