"""`python -m serve` is `halftone`."""

from serve.cli import main

main()
