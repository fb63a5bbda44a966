"""A file of claims: what each says, between which runs and by what it is measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_align.errors import UserError
from lightning_align.feedback.fields import fault, mapping, read_file
from lightning_align.lab.claims_measures import Measure, read_measure

Expect = Literal["more", "less", "equal"]
CLAIM_FIELDS = ("name", "hypothesis", "source", "measure", "a", "b", "expect", "margin", "scaling")
SCALING = ("S1", "S2", "S3", "S4", "S5")


@dataclass(frozen=True)
class Arm:
    """Runs of one stage, those with some labels: ``ppo``, or ``{stage: ppo, size: small}``."""

    stage: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.stage, *(f"{axis}={label}" for axis, label in self.labels.items())])


@dataclass(frozen=True)
class Claim:
    """A claim and its test.

    Attributes:
        name: Short, of its own.
        hypothesis: A sentence that can be wrong.
        source: Who claims it.
        measure: What is measured of a run.
        a: The runs that it speaks of.
        b: What they are compared with; None compares with 0.
        expect: Whether a is ``more`` than b, ``less``, or ``equal``.
        margin: How far apart ``equal`` may be.
        scaling: Of the claims that ``lab scaling`` judges, which one; measure and arms are then its.
    """

    name: str
    hypothesis: str
    source: str
    measure: Measure
    a: Arm
    b: Arm | None = None
    expect: Expect = "more"
    margin: float = 0.0
    scaling: str | None = None


def read_claims(path: Path) -> list[Claim]:
    """The claims of a YAML file, a list under ``claims``.

    Raises:
        UserError: There is no such file, or a field is unknown, missing or not what it should be.
    """
    source = str(path)
    content = read_file("claims", source)
    if content is None:
        raise UserError(f"claims {source} is empty: give a list under claims: (docs/claims.md)")
    rows = mapping(source, "", content, ("claims",)).get("claims")
    if not isinstance(rows, list) or not rows:
        raise fault(source, "claims", "is empty: give a list of claims")
    claims = [_read(source, f"claims[{index}]", row) for index, row in enumerate(rows)]
    names = [claim.name for claim in claims]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise fault(source, f"claims[{index}].name", f"is '{name}' again: give each claim a name of its own")
    return claims


def _read(source: str, place: str, row: Any) -> Claim:
    given = mapping(source, place, row, CLAIM_FIELDS)
    needed = ("name", "hypothesis", "source")
    for name in needed + (() if "scaling" in given else ("measure", "a")):
        if name not in given:
            raise fault(source, f"{place}.{name}", "is missing")
    for name in needed:
        if not isinstance(given[name], str) or not given[name].strip():
            raise fault(source, f"{place}.{name}", f"is {given[name]!r}: give a text")
    texts = {name: given[name] for name in needed}
    if "scaling" in given:
        if given["scaling"] not in SCALING or {"measure", "a", "b", "expect", "margin"} & set(given):
            raise fault(
                source, f"{place}.scaling", f"is one of {', '.join(SCALING)}, and brings measure and arms along"
            )
        empty = Measure("metric", name=f"lab scaling {given['scaling']}")
        arm = Arm(f"lab scaling {given['scaling']}")
        return Claim(**texts, measure=empty, a=arm, scaling=given["scaling"])
    expect = given.get("expect", "more")
    if expect not in get_args(Expect):
        raise fault(source, f"{place}.expect", f"is {expect!r}: give one of {', '.join(get_args(Expect))}")
    margin = given.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin) or margin < 0:
        raise fault(source, f"{place}.margin", f"is {margin!r}: give a number of 0 or more")
    if (expect == "equal") != (margin > 0):
        raise fault(source, f"{place}.margin", "belongs to expect: equal, which needs one above 0")
    return Claim(
        **texts,
        measure=read_measure(source, f"{place}.measure", given["measure"]),
        a=_arm(source, f"{place}.a", given["a"]),
        b=_arm(source, f"{place}.b", given["b"]) if "b" in given else None,
        expect=expect,
        margin=float(margin),
    )


def _arm(source: str, place: str, value: Any) -> Arm:
    if isinstance(value, str) and value:
        return Arm(value)
    if not isinstance(value, dict) or not isinstance(value.get("stage"), str):
        raise fault(source, place, f"is {value!r}: give a stage, or {{stage: NAME, AXIS: LABEL}}")
    return Arm(value["stage"], {str(axis): str(label) for axis, label in value.items() if axis != "stage"})
