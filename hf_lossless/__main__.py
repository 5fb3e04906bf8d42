"""`python -m hf_lossless`, which torchrun needs."""

from hf_lossless.cli.main import main

main()
