"""What ``generate --best-of`` keeps: of each prompt's completions the one that a reward likes best."""

import sys
from typing import Any

import torch

from lightning_align.cli.evaluate_options import read_spec
from lightning_align.errors import UserError
from lightning_align.lab.evaluation.sampling import score_columns
from lightning_align.losses.best_of_n import best_of_n_kl
from lightning_align.rewards.build import build_reward
from lightning_align.rollout.types import Rollout


class BestOf:
    """Chooses, and counts what it chose from.

    Args:
        n: Completions of a prompt, at least 2.
        source: What scores, in the forms of ``model.reward``, or a YAML file of one.
        device: Where.
    """

    def __init__(self, n: int, source: str, device: torch.device) -> None:
        self.n = n
        self.source = source
        self.reward = build_reward(read_spec(source))
        self.reward.to(device)
        self.best: list[float] = []
        self.means: list[float] = []
        self.unscored = 0  # prompts

    def choose(self, rollout: Rollout) -> dict[int, dict[str, Any]]:
        """Rows of ``rollout`` that are the best of their prompt, the first of equal ones.

        Each with its ``score``, the ``mean_score`` of the prompt's completions, and ``n``, how many of them have one. A
        prompt without any score has no row.
        """
        scores = score_columns("reward", self.reward, rollout)["reward"].reshape(-1, self.n)
        chosen = {}
        for prompt, values in enumerate(scores):
            known = values[~values.isnan()]
            if not len(known):
                self.unscored += 1
                continue
            place = int(values.nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax())
            best, mean = float(values[place]), float(known.mean())
            chosen[prompt * self.n + place] = {"score": best, "mean_score": mean, "n": len(known)}
            self.best.append(best)
            self.means.append(mean)
        return chosen

    def report(self) -> None:
        """Say what was gained; raises :class:`UserError` where no prompt has a completion with a score."""
        prompts = len(self.best)
        if not prompts:
            raise UserError(
                f"reward {self.source} gave none of {self.unscored * self.n:,} completions a score: there is no best "
                "one; check that it returns numbers for these prompts, and that they have the columns that it reads"
            )
        lines = [
            f"best of {self.n} by {self.source}: mean score {sum(self.best) / prompts:.4g}, of all completions "
            f"{sum(self.means) / prompts:.4g} ({prompts:,} prompts); at most {best_of_n_kl(self.n):.3f} nats from the "
            "distribution that is sampled"
        ]
        if self.unscored:
            lines.append(f"{self.unscored:,} prompts left out: the reward gave none of their completions a score")
        print("\n".join(lines), file=sys.stderr)
