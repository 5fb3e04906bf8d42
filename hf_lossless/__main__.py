"""Runs the command line by `python -m hf_lossless`, as torchrun needs it."""

from hf_lossless.cli.main import main

main()
