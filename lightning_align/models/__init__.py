"""Hugging Face models in and out, score and value heads, and the one place where log-probs are computed.

Axes: ``B`` sequences, ``T`` token positions, ``N`` selected rows of hidden states, ``H`` width, ``V`` vocabulary.
Per-token results are token-aligned: entry ``t`` belongs to token ``t``; the shift by one happens here and nowhere else.
"""
