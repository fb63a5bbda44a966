"""From what stands in a configuration to a reward."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_align.errors import UserError
from lightning_align.rewards.base import Part, Reward, Scorer
from lightning_align.rewards.function import FunctionReward, load_function
from lightning_align.rewards.playground import Aspect, PlaygroundReward

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class PartSpec:
    """One part of a reward before anything is loaded."""

    name: str
    source: str
    weight: float

    @property
    def kind(self) -> Literal["playground", "function", "learned"]:
        """How the source is read: an existing path is a model, a dotted name without slash a function."""
        if self.source.partition(":")[0] == "playground":
            return "playground"
        if ".py:" in self.source:
            return "function"
        if not Path(self.source).exists() and _DOTTED.fullmatch(self.source):
            return "function"
        return "learned"


def parse_reward(spec: str | Mapping[str, Any], *, default_name: str = "reward") -> list[PartSpec]:
    """The parts that a specification names; loads nothing, so it can be called before the data are read.

    Args:
        spec: One source, or a mapping of name to a source or ``{source, weight}``; weight is 1 if left out, 0 measures.
            A source is a run directory, a path, a hub id, ``package.module.function``, ``file.py:function``,
            ``playground`` (which also reports its aspects), ``playground:helpfulness`` or ``playground:safety``.
        default_name: Name of the part when ``spec`` is one source.

    Raises:
        UserError: The specification is not of that form.
    """
    if isinstance(spec, str):
        parts = [PartSpec(default_name, spec, 1.0)]
        aspects = {"helpfulness": "helpfulness", "safety": "safety"}
    elif isinstance(spec, Mapping) and spec:
        parts = [_part(name, value) for name, value in spec.items()]
        aspects = {}
    else:
        raise UserError(f"reward is {spec!r}: give a source, or a mapping of name to {{source, weight}}")
    for part in list(parts):
        if part.source == "playground":
            parts += [
                PartSpec(aspects.get(aspect, f"{part.name}_{aspect}"), f"playground:{aspect}", 0.0)
                for aspect in ("helpfulness", "safety")
            ]
    names = [part.name for part in parts]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(
            f"reward part {repeated.pop()!r} is there twice: rename yours, the playground adds its own aspects"
        )
    if not any(part.weight for part in parts):
        raise UserError(f"reward parts {', '.join(names)} all have weight 0: at least one must count")
    return parts


def _part(name: Any, value: Any) -> PartSpec:
    if not isinstance(name, str) or not name:
        raise UserError(f"reward part {name!r} has no name: give a mapping of name to a source or {{source, weight}}")
    if isinstance(value, str):
        return PartSpec(name, value, 1.0)
    if not isinstance(value, Mapping) or not isinstance(value.get("source"), str):
        raise UserError(f"reward part {name!r} is {value!r}: give a source, or a mapping with source and weight")
    unknown = set(value) - {"source", "weight"}
    if unknown:
        raise UserError(f"reward part {name!r} has an unknown key {sorted(unknown)[0]!r}: it takes source and weight")
    weight = value.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
        raise UserError(f"reward part {name!r} has weight {weight!r}: give a finite number")
    return PartSpec(name, value["source"], float(weight))


def build_reward(spec: str | Mapping[str, Any], *, default_name: str = "reward") -> Reward:
    """Load every part of :func:`parse_reward`.

    Raises:
        UserError: A part cannot be loaded: no such path, no score head, not importable, not callable.
    """
    return Reward([Part(p.name, p.source, p.weight, _scorer(p)) for p in parse_reward(spec, default_name=default_name)])


def _scorer(part: PartSpec) -> Scorer:
    if part.kind == "playground":
        aspect = part.source.partition(":")[2] or "gold"
        for known in get_args(Aspect):
            if aspect == known:
                return PlaygroundReward(known)
        raise UserError(f"reward {part.source} is unknown: the playground has {', '.join(get_args(Aspect))}")
    if part.kind == "function":
        return FunctionReward(load_function(part.source), part.source)
    # only here: loading transformers takes seconds that functions and the playground do not need
    from lightning_align.rewards.learned import LearnedReward

    return LearnedReward(part.source)
