"""Fused token log-probs, entropy, KL, policy losses and advantages: Triton kernels and their CPU twins.

Every operation has three implementations: ``triton``, ``native`` (fast on a CPU, works on any device) and ``reference``
(plain float64-capable torch). :func:`available_impls` says which would run. Importing this package imports no Triton.
"""

from align_kernels._dispatch import available_impls, why_not

__all__ = [
    "available_impls",
    "why_not",
]
