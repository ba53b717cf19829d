"""`python -m flextron_trainer` is the `flextron` command."""

from .cli import main

main()
