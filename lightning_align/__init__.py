"""Align decoder-only language models with PyTorch Lightning, and see when to stop."""

__version__ = "0.1.0"
