"""How strongly the policy is held to its reference: a fixed coefficient, or one that steers KL to a target."""

import math
from typing import Protocol

MAX_RELATIVE_ERROR = 0.2


class KLController(Protocol):
    """Holds β, the coefficient of the KL in the reward; part of the checkpoint."""

    value: float

    def update(self, kl: float, num_episodes: int) -> None:
        """Learn of the mean sequence KL (k1, nats) of the batch of ``num_episodes`` just trained on."""

    def state_dict(self) -> dict[str, float]:
        """What the next update depends on."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore :meth:`state_dict`."""


class FixedKL:
    """β never changes.

    Args:
        kl_coef: β ≥ 0.
    """

    def __init__(self, kl_coef: float) -> None:
        if not kl_coef >= 0:
            raise ValueError(f"kl_coef is {kl_coef}: it cannot be negative")
        self.value = float(kl_coef)

    def update(self, kl: float, num_episodes: int) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, float]:
        """β."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """A fixed β belongs to the configuration: what the checkpoint says is not applied."""


class AdaptiveKL:
    """β ← β (1 + e·n/horizon), e = clip(KL/target − 1, ±0.2), n episodes since the last update.

    Ziegler et al. 2019 (1909.08593), section 2.2.

    Args:
        kl_coef: Initial β > 0.
        target: KL to steer to, nats per sequence.
        horizon: Episodes over which an error of 1 would change β by a factor of e; at most ±0.2 is applied.
    """

    def __init__(self, kl_coef: float = 0.2, *, target: float = 6.0, horizon: int = 10_000) -> None:
        for name, value in (("kl_coef", kl_coef), ("target", target), ("horizon", horizon)):
            if not value > 0:
                raise ValueError(f"{name} is {value}: the adaptive controller needs a positive one")
        self.value = float(kl_coef)
        self.target = float(target)
        self.horizon = horizon

    def update(self, kl: float, num_episodes: int) -> None:
        """Move β; a KL that is not finite is an error, since it would stay in β for good."""
        if not math.isfinite(kl):
            raise ValueError(f"the KL is {kl}: it must be finite")
        error = min(max(kl / self.target - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.value *= 1.0 + error * num_episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        """β; target and horizon belong to the configuration."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from the saved β."""
        self.value = float(state["value"])
