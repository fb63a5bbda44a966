"""Next-token cross-entropy from log-probs: the loss of pre-training and supervised fine-tuning."""

from torch import Tensor

from lightning_align.losses.masked import Metrics, masked_sum


def token_cross_entropy(logp: Tensor, loss_weights: Tensor) -> tuple[Tensor, Metrics]:
    """Σ_t −w_t log p(y_t): a *sum*; the caller divides once, by Σ w over the global batch.

    Args:
        logp: Token-aligned log-probs, any shape; whatever stands where the weight is 0 does not matter.
        loss_weights: Same shape: 0 where nothing is learnt, else the weight of the token's record.

    Returns:
        The summed loss, and ``loss`` and ``empty_batches`` (1 if no token carries loss) as metrics.
    """
    mask = loss_weights > 0
    loss = -masked_sum(loss_weights * logp.where(mask, 0.0), mask)
    empty = (~mask.any()).to(loss.dtype)
    return loss, {
        "loss": (loss.detach(), masked_sum(loss_weights, mask)),
        "empty_batches": (empty, empty.new_ones(())),
    }
