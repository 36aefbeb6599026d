"""`python -m bench` is the console script `shortllama`."""

from bench.cli import main

main()
