"""From what stands in a configuration to a reward."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from lightning_align.errors import UserError
from lightning_align.plugins import load_function
from lightning_align.rewards.base import GATED, Part, Reward, Scorer
from lightning_align.rewards.ensemble import EnsembleReward
from lightning_align.rewards.function import FunctionReward
from lightning_align.rewards.playground import Aspect, PlaygroundReward
from lightning_align.rewards.spec import PartSpec, RewardSpec, kind_of, learned_sources, parse_reward, read_reward

if TYPE_CHECKING:
    from lightning_align.models.heads import Normalisation

__all__ = ["PartSpec", "build_reward", "learned_sources", "parse_reward"]


def build_reward(spec: str | Mapping[str, Any], *, default_name: str = "reward") -> Reward:
    """Load every part of :func:`~lightning_align.rewards.spec.read_reward`.

    Raises:
        UserError: A part cannot be loaded: no such path, no score head, not importable, not callable.
    """
    read = read_reward(spec, default_name=default_name)
    parts = [Part(part.name, part.source, part.weight, _scorer(part, _scale(read, part))) for part in read.parts]
    return Reward(parts, read.combination)


def _scale(reward: RewardSpec, part: PartSpec) -> "Normalisation | None":
    """How a learned part is normalised: a gate needs log-odds as they are; None is the model's own way."""
    if reward.combination.how == "gate" and part.name in GATED:
        return "none"
    return "full" if reward.standardise else None


def _scorer(part: PartSpec, scale: "Normalisation | None") -> Scorer:
    if part.members:
        members = [_single(source, scale) for source in part.members]
        return EnsembleReward(members, part.how, uwo_coef=part.uwo_coef)
    if part.judge is not None:
        from lightning_align.rewards.judge import JudgeReward

        return JudgeReward.load(part.source, part.judge)
    return _single(part.source, scale)


def _single(source: str, scale: "Normalisation | None") -> Scorer:
    kind = kind_of(source)
    if kind == "playground":
        aspect = source.partition(":")[2] or "gold"
        for known in get_args(Aspect):
            if aspect == known:
                return PlaygroundReward(known)
        raise UserError(f"reward {source} is unknown: the playground has {', '.join(get_args(Aspect))}")
    if kind == "function":
        return FunctionReward(load_function(source), source)
    # only here: loading transformers takes seconds that functions and the playground do not need
    from lightning_align.rewards.learned import LearnedReward

    return LearnedReward(source, normalisation=scale)
