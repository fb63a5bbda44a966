"""Fused token log-probs, entropy, KL, policy losses and advantages: Triton kernels and their CPU twins.

Every operation has three implementations: ``triton``, ``native`` (fast on a CPU, works on any device) and ``reference``
(plain float64-capable torch). :func:`available_impls` says which would run. Importing this package imports no Triton.
"""

# Modules never have the name of a public function: importing such a module would put it in the function's place.
from align_kernels._dispatch import OPERATIONS, available_impls, why_not
from align_kernels._plan import logits_memory
from align_kernels._types import PolicyLoss, Reference, TokenStats
from align_kernels.api import linear_token_logprobs, token_stats
from align_kernels.policy_api import linear_policy_loss
from align_kernels.pref_logps import preference_logps
from align_kernels.scan_ops import Shaped, VTrace, gae, shaped_advantages
from align_kernels.shards import merge_vocab_stats

__all__ = [
    "OPERATIONS",
    "PolicyLoss",
    "Reference",
    "Shaped",
    "TokenStats",
    "VTrace",
    "available_impls",
    "gae",
    "linear_policy_loss",
    "linear_token_logprobs",
    "logits_memory",
    "merge_vocab_stats",
    "preference_logps",
    "shaped_advantages",
    "token_stats",
    "why_not",
]
