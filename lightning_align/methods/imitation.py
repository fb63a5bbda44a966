"""Methods that learn chosen completions as demonstrations, and what is said where none was chosen."""

import torch
from torch import Tensor

from lightning_align.losses.lm import token_cross_entropy
from lightning_align.losses.masked import Metrics
from lightning_align.methods.online import OnlineModule
from lightning_align.rollout.types import Experience


class ImitationModule(OnlineModule):
    """Supervised fine-tuning on completions that a method makes and chooses."""

    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Metrics]:
        """Token mean of −log p over the completions, as in supervised fine-tuning."""
        mask = experience.completion_mask
        # at temperature 1, whatever the samples were drawn at: it is the model itself that learns them
        stats = self.completion_stats(self.model, experience.rollout, entropy=True)
        assert stats.entropy is not None
        loss, sums = token_cross_entropy(stats.logp, mask.to(stats.logp.dtype))
        sums["entropy"] = (stats.entropy.detach().sum(), mask.sum())
        return loss / normaliser, sums

    def on_every_rank(self, chosen: int) -> int:
        """How many completions all ranks together have chosen."""
        return int(self.all_reduce(torch.tensor(chosen, device=self.device)))


def said_of_scores(scores: Tensor) -> str:
    """The distribution of scores ``[B]`` in a few words, for a message; NaN is none."""
    known = scores[~scores.isnan()].double()
    if not len(known):
        return "none has a score"
    quantiles = known.quantile(torch.tensor([0.0, 0.5, 0.9, 1.0], dtype=known.dtype, device=known.device))
    return "scores: least {:.3g}, median {:.3g}, 90 % below {:.3g}, best {:.3g}".format(*quantiles.tolist())
