"""K4: log-probs of whole sequences, for the losses of preference pairs and reward models."""

import torch
from torch import Tensor

from align_kernels import _checks
from align_kernels._dispatch import choose
from align_kernels.api import counted_stats


def preference_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    seq_ids: Tensor,
    num_seqs: int,
    *,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    average: bool = False,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    save: str = "auto",
    check_labels: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """K4: sum or mean of the log-probs of each sequence's tokens, chosen and rejected in one pass.

    Differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: ``[…, H]``; see :func:`align_kernels.linear_token_logprobs`, as for what is not named here.
        weight: ``[V, H]``.
        labels: ``[…]``; −100 does not count.
        seq_ids: ``[…]`` int64 or int32, the sequence of each token that counts, from 0, not descending.
        num_seqs: How many sequences there are; one without tokens has sum and mean 0.
        mask: ``[…]`` bool or uint8, 1 counts.
        rows: int64 ``[M]``, the tokens that count, in ascending order.
        average: Whether to divide by the number of counted tokens.
        bias: ``[V]`` or None.
        temperature: Divides the logits.
        softcap: Bounds the logits, or None.
        save: What serves the backward pass.
        check_labels: On a GPU, raise for labels outside ``[0, V)`` other than −100.
        impl: ``auto``, ``triton``, ``native`` or ``reference``.

    Returns:
        The sums or means ``[num_seqs]``, float32 (float64 for float64), and the counted tokens ``[num_seqs]``, int64.

    Raises:
        ValueError, TypeError, RuntimeError: As :func:`align_kernels.linear_token_logprobs`; for sequence numbers that
            descend or reach ``num_seqs`` (on a CPU).
    """
    _checks.tokens(mask, labels, seq_ids=seq_ids)
    _checks.dtype("seq_ids", seq_ids, _checks.INTEGERS)
    _checks.device(labels=labels, seq_ids=seq_ids)
    chosen = choose("preference_logps", hidden.device, hidden.dtype, impl)
    (values, *_), rows = counted_stats(
        hidden,
        weight,
        labels,
        bias=bias,
        mask=mask,
        rows=rows,
        temperature=temperature,
        softcap=softcap,
        save=save,
        check_labels=check_labels,
        impl=chosen,
    )
    flat_labels, ids = labels.reshape(-1), seq_ids.reshape(-1).long()
    if rows is not None:
        flat_labels, ids = flat_labels.index_select(0, rows), ids.index_select(0, rows)
    check_sequences(ids, num_seqs)
    counted = (flat_labels >= 0) & (flat_labels < weight.shape[0])
    if chosen == "triton":
        from align_kernels import pref_logps_kernel

        sums, counts = pref_logps_kernel.segment_sums(values, counted, ids, num_seqs)
    else:
        sums, counts = segment_sums(values, counted, ids, num_seqs)
    return sums / counts.clamp(min=1) if average else sums, counts


def check_sequences(ids: Tensor, num_seqs: int) -> None:
    """Raises for sequence numbers on the CPU that descend or are outside ``[0, num_seqs)``."""
    if not ids.is_cpu or not len(ids) or torch.compiler.is_compiling():
        return
    if int(ids[0]) < 0 or int(ids[-1]) >= num_seqs or bool((ids.diff() < 0).any()):
        raise ValueError(f"seq_ids: the counted tokens' must ascend from 0 or more to less than {num_seqs}")


def segment_sums(values: Tensor, counted: Tensor, ids: Tensor, num_seqs: int) -> tuple[Tensor, Tensor]:
    """Sum and count of each sequence's tokens, added in float64."""
    sums = values.new_zeros(num_seqs, dtype=torch.float64).index_add(0, ids, values.double())
    counts = torch.zeros(num_seqs, dtype=torch.int64, device=ids.device).index_add_(0, ids, counted.long())
    return sums.to(values.dtype), counts
