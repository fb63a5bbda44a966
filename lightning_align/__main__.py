"""``python -m lightning_align``."""

from lightning_align.cli.main import entry

if __name__ == "__main__":
    entry()
