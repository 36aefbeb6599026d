"""The small Llama that ships with the package, and the script that trained it."""
