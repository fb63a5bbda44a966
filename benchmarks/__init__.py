"""Benchmarks, one command each: ``python -m benchmarks.NAME`` from the repository's root."""
