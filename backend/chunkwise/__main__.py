"""``python -m chunkwise``."""

from chunkwise.cli import main

main()
