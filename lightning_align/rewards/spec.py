"""What a configuration says of a reward, read and checked before anything is loaded."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_align.errors import UserError, nearest
from lightning_align.plugins import is_function
from lightning_align.rewards.base import GATED, LENGTH_PENALTY
from lightning_align.rewards.combination import Combination, EnsembleHow, How, LengthPenalty, Whiten

Kind = Literal["playground", "function", "learned", "judge"]
PART_KEYS = ("source", "weight", "combine", "uwo_coef", "judge")
REWARD_KEYS = (
    *("combine", "parts", "standardise", "assume_comparable", "threshold", "whiten", "uwo_coef", LENGTH_PENALTY),
)


@dataclass(frozen=True)
class PartSpec:
    """One part of a reward before anything is loaded.

    Attributes:
        name: Under which it is logged.
        source: What scores; of an ensemble all of them, for messages.
        weight: 0 measures.
        members: Sources of an ensemble; none of another part.
        how: What an ensemble makes of its members.
        uwo_coef: λ of ``uwo``.
        judge: Wording by which a language model is asked for ratings; None of another part.
    """

    name: str
    source: str
    weight: float
    members: tuple[str, ...] = ()
    how: EnsembleHow = "mean"
    uwo_coef: float = 0.1
    judge: str | None = None

    @property
    def kind(self) -> Kind:
        """How the source is read; of an ensemble, its members'."""
        if self.judge is not None:
            return "judge"
        return kind_of(self.members[0] if self.members else self.source)


@dataclass(frozen=True)
class RewardSpec:
    """A whole reward before anything is loaded.

    Attributes:
        parts: At least one that counts.
        combination: What is done with them.
        standardise: Whether learned parts are divided by the deviation of their reference scores.
    """

    parts: tuple[PartSpec, ...]
    combination: Combination = field(default_factory=Combination)
    standardise: bool = False


def kind_of(source: str) -> Kind:
    """How a source is read: an existing path is a model, a dotted name without slash a function."""
    if source.partition(":")[0] == "playground":
        return "playground"
    return "function" if is_function(source) else "learned"


def parse_reward(spec: str | Mapping[str, Any], *, default_name: str = "reward") -> list[PartSpec]:
    """The parts of :func:`read_reward`."""
    return list(read_reward(spec, default_name=default_name).parts)


def learned_sources(spec: str | Mapping[str, Any]) -> list[str]:
    """Every reward model that a reward asks, members of ensembles included."""
    parts = [part for part in parse_reward(spec) if part.judge is None]
    sources = [source for part in parts for source in part.members or (part.source,)]
    return [source for source in sources if kind_of(source) == "learned"]


def check_files(spec: str | Mapping[str, Any]) -> None:
    """Raise :class:`UserError` if the file of a function is not there; nothing is run."""
    for part in parse_reward(spec):
        for source in part.members or (part.source,):
            location = source.rpartition(":")[0]
            if ".py:" in source and not Path(location).is_file():
                raise UserError(f"reward {source}: there is no file {location}")


def read_reward(spec: str | Mapping[str, Any], *, default_name: str = "reward") -> RewardSpec:
    """What a specification says; loads nothing, so it can be called before the data are read.

    Args:
        spec: One source; or a mapping of name to part; or a mapping with ``parts``, such a mapping, and any of
            ``combine``, ``standardise``, ``assume_comparable``, ``threshold``, ``whiten``, ``uwo_coef`` and
            ``length_penalty: {coef, max_length}``. A part is a source or ``{source, weight}``; weight is 1 if left
            out, 0 measures. A source is a run directory, a path, a hub id, ``package.module.function``,
            ``file.py:function``, ``playground`` (which also reports its aspects), ``playground:helpfulness`` or
            ``playground:safety``. With ``judge``, a wording, the source is a language model (or an endpoint,
            ``http://host:port/v1#model``) that is asked for ratings. A list of sources is an ensemble, with
            ``combine`` (``mean``, ``min``, ``uwo``) and ``uwo_coef``.
        default_name: Name of the part when ``spec`` is one source.

    Raises:
        UserError: The specification is not of that form.
    """
    if isinstance(spec, str):
        return RewardSpec(tuple(_with_aspects([PartSpec(default_name, spec, 1.0)], alone=True)))
    if not isinstance(spec, Mapping) or not spec:
        raise UserError(f"reward is {spec!r}: give a source, or a mapping of name to {{source, weight}}")
    if "parts" not in spec and "combine" not in spec:
        return RewardSpec(_parts(spec))
    _check_keys("reward", spec, REWARD_KEYS)
    if not isinstance(spec.get("parts"), Mapping) or not spec["parts"]:
        raise UserError("reward has no parts: give parts, a mapping of name to {source, weight}")
    parts = _parts(spec["parts"])
    standardise = _flag(spec, "standardise")
    combination = _combination(spec)
    _check_combination(combination, parts, standardise=standardise, comparable=_flag(spec, "assume_comparable"))
    return RewardSpec(parts, combination, standardise)


# ------------------------------------------------------------------------------------------------------------- parts
def _parts(spec: Mapping[Any, Any]) -> tuple[PartSpec, ...]:
    parts = _with_aspects([_part(name, value) for name, value in spec.items()], alone=False)
    names = [part.name for part in parts]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(
            f"reward part {repeated.pop()!r} is there twice: rename yours, the playground adds its own aspects"
        )
    if not any(part.weight for part in parts):
        raise UserError(f"reward parts {', '.join(names)} all have weight 0: at least one must count")
    return tuple(parts)


def _with_aspects(parts: list[PartSpec], *, alone: bool) -> list[PartSpec]:
    """The playground's gold score also reports its aspects, under their bare names where it stands alone."""
    return parts + [
        PartSpec(aspect if alone else f"{part.name}_{aspect}", f"playground:{aspect}", 0.0)
        for part in parts
        if part.source == "playground"
        for aspect in ("helpfulness", "safety")
    ]


def _part(name: Any, value: Any) -> PartSpec:
    if not isinstance(name, str) or not name:
        raise UserError(f"reward part {name!r} has no name: give a mapping of name to a source or {{source, weight}}")
    if isinstance(value, str | list):
        value = {"source": value}
    what = f"reward part {name!r}"
    if not isinstance(value, Mapping) or not isinstance(value.get("source"), str | list):
        raise UserError(f"{what} is {value!r}: give a source, or a mapping with source and weight")
    _check_keys(what, value, PART_KEYS)
    weight = _number(what, value, "weight", 1.0, lambda weight: abs(weight) < math.inf, "a finite number")
    if isinstance(value["source"], str):
        if useless := [key for key in ("combine", "uwo_coef") if key in value]:
            raise UserError(f"{what} has {useless[0]}, but one source: give a list of sources for an ensemble")
        return PartSpec(name, value["source"], weight, judge=_wording(what, value))
    if "judge" in value:
        raise UserError(f"{what} has judge, but a list of sources: give each judge a part of its own")
    return _ensemble(what, name, value, weight)


def _wording(what: str, value: Mapping[str, Any]) -> str | None:
    if "judge" not in value:
        if value["source"].startswith(("http://", "https://")):
            raise UserError(f"{what} has an endpoint as its source: give judge, the wording it is asked for ratings by")
        return None
    if not isinstance(value["judge"], str) or not value["judge"]:
        raise UserError(f"{what} has judge {value['judge']!r}: give a wording (default, playground, or a YAML file)")
    return str(value["judge"])


def _ensemble(what: str, name: str, value: Mapping[str, Any], weight: float) -> PartSpec:
    members = value["source"]
    if len(members) < 2 or not all(isinstance(member, str) and member for member in members):
        raise UserError(f"{what} has source {members!r}: an ensemble is a list of at least two sources")
    if len(set(members)) < len(members):
        raise UserError(f"{what} names {max(members, key=members.count)} twice: give different members")
    how = _choice(what, value, "combine", "mean", get_args(EnsembleHow))
    if "uwo_coef" in value and how != "uwo":
        raise UserError(f"{what} has uwo_coef, which combine {how} does not use: leave it out, or give combine uwo")
    return PartSpec(name, ", ".join(members), weight, tuple(members), how, _uwo_coef(what, value))


# ------------------------------------------------------------------------------------------------------- combination
def _combination(spec: Mapping[str, Any]) -> Combination:
    how: How = _choice("reward", spec, "combine", "sum", get_args(How))
    for key, owner in (("threshold", "gate"), ("whiten", "gate"), ("uwo_coef", "uwo")):
        if key in spec and how != owner:
            raise UserError(
                f"reward has {key}, which combine {how} does not use: leave it out, or give combine {owner}"
            )
    whiten: Whiten = _choice("reward", spec, "whiten", "batch", get_args(Whiten))
    threshold = _number("reward", spec, "threshold", 0.15, lambda p: 0 < p < 1, "a probability between 0 and 1")
    penalty = _length_penalty(spec[LENGTH_PENALTY]) if LENGTH_PENALTY in spec else None
    return Combination(how, _uwo_coef("reward", spec), threshold, whiten, penalty)


def _length_penalty(value: Any) -> LengthPenalty:
    what = "reward length_penalty"
    if not isinstance(value, Mapping) or set(value) != {"coef", "max_length"}:
        raise UserError(f"{what} is {value!r}: give {{coef, max_length}}, what each token beyond max_length costs")
    coef = _number(what, value, "coef", 0.0, lambda coef: 0 < coef < math.inf, "what each token costs, above 0")
    length = value["max_length"]
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise UserError(f"{what} has max_length {length!r}: give a number of tokens")
    return LengthPenalty(coef, length)


def _check_combination(
    combination: Combination, parts: Sequence[PartSpec], *, standardise: bool, comparable: bool
) -> None:
    """Raise :class:`UserError` for parts that the rule cannot take."""
    how, counted = combination.how, [part for part in parts if part.weight]
    if combination.length_penalty is not None and any(part.name == LENGTH_PENALTY for part in parts):
        raise UserError(f"reward part {LENGTH_PENALTY!r} has the name of the stage after it: rename the part")
    if how == "gate":
        for name in GATED:
            if name not in [part.name for part in counted]:
                raise UserError(f"reward combine gate chooses between {' and '.join(GATED)}, but no part {name} counts")
    unweighted = [part for part in counted if part.weight != 1 and (how != "gate" or part.name in GATED)]
    if how != "sum" and unweighted:
        raise UserError(
            f"reward part {unweighted[0].name!r} has weight {unweighted[0].weight:g}, which combine {how} has no use "
            "for: give 1, or 0 to measure it"
        )
    if how in ("min", "mean", "uwo") and len(counted) < 2:
        raise UserError(f"reward combine {how} needs at least two parts that count")
    if how == "min" and not (standardise or comparable):
        raise UserError(
            "reward combine min compares scores of different scales: give standardise true, or assume_comparable true "
            "if they are of one scale"
        )
    if standardise and (strange := [part.name for part in counted if part.kind != "learned"]):
        raise UserError(
            f"reward standardise needs reward models, which know the mean and deviation of their scores; part "
            f"{strange[0]!r} is none: leave standardise out, or give the part weight 0"
        )


# ------------------------------------------------------------------------------------------------------ single values
def _check_keys(what: str, value: Mapping[Any, Any], known: Sequence[str]) -> None:
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        raise UserError(
            f"{what} has an unknown key {unknown[0]!r}{nearest(unknown[0], known)} (it takes {', '.join(known)})"
        )


def _number(
    what: str, spec: Mapping[str, Any], key: str, default: float, good: Callable[[float], bool], wanted: str
) -> float:
    value = spec.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
        raise UserError(f"{what} has {key} {value!r}: give {wanted}")
    return float(value)


def _uwo_coef(what: str, spec: Mapping[str, Any]) -> float:
    return _number(
        what, spec, "uwo_coef", 0.1, lambda coef: 0 <= coef < math.inf, "a weight of the variance, 0 or more"
    )


def _choice(what: str, spec: Mapping[str, Any], key: str, default: Any, known: Sequence[str]) -> Any:
    value = spec.get(key, default)
    if value not in known:
        raise UserError(f"{what} has {key} {value!r}{nearest(str(value), known)} (there are {', '.join(known)})")
    return value


def _flag(spec: Mapping[str, Any], key: str) -> bool:
    value = spec.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"reward has {key} {value!r}: give true or false")
    return value
