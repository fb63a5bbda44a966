"""Whether a held-out reward model is independent of the one that training maximised (METHODS section 14, OPT-6)."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_align.data.sources import PLAYGROUND
from lightning_align.errors import UserError
from lightning_align.lab.measured import read_measured
from lightning_align.lab.runs import Curve
from lightning_align.run.directory import CONFIG_FILE, is_run

HELDOUT = "heldout"
TRAINED_METRIC = f"eval/rewards/{HELDOUT}/mean"  # of a part of model.reward that has this name


def trained_beside(curve: Curve) -> bool:
    """Whether training measured a held-out reward: a part of ``model.reward`` called ``heldout``, with weight 0."""
    part = _reward(curve).get(HELDOUT)
    return isinstance(part, dict) and part.get("weight", 1.0) == 0


def overlap(run: Path, curve: Curve) -> str | None:
    """One line where a held-out reward of a run has learnt from the comparisons that its proxy has learnt from.

    Only runs of this project say what they were trained on; of other rewards nothing is known, and nothing is said.

    Args:
        run: Directory of the run.
        curve: The same, read.
    """
    measured = read_measured(run) if run.is_dir() else []
    if measured:
        settings = measured[-1]["settings"]
        proxy, heldout = settings.get("proxy"), settings.get(HELDOUT)
    else:
        proxy = _reward(curve)
        heldout = proxy.get(HELDOUT) if trained_beside(curve) else None
    if isinstance(proxy, dict):
        proxy = {name: part for name, part in proxy.items() if name != HELDOUT}
    for judge in _runs(heldout):
        for trained in _runs(proxy):
            if judge.resolve() == trained.resolve():
                return f"the held-out reward {judge} is what training maximised: it shows nothing new"
            if _share(_data(judge), _data(trained)):
                return (
                    f"the held-out reward {judge} and the proxy {trained} share comparisons, and so errors: train them "
                    "with data.leave_out 1/2 and 2/2"
                )
    return None


def judged_by_gold(run: Path, curve: Curve) -> bool:
    """Whether the win rates of a run rest on the true score: a choice by them has seen it."""
    measured = read_measured(run) if run.is_dir() else []
    rated = any(math.isfinite(point.win_rate) for point in curve.points)
    return rated and bool(measured) and measured[-1]["settings"].get("judge") == "gold"


def _reward(curve: Curve) -> Mapping[str, Any]:
    reward = (curve.config.get("model") or {}).get("init_args", {}).get("reward")
    return reward if isinstance(reward, dict) else {} if reward is None else {"reward": reward}


def _runs(spec: Any) -> Iterator[Path]:
    """Run directories that a specification of a reward names."""
    if isinstance(spec, str):
        path = Path(spec)
        yield from (place for place in (path, path.parent) if is_run(place))
    elif isinstance(spec, Mapping):
        for part in spec.values():
            yield from _runs(part)
    elif isinstance(spec, list):
        for part in spec:
            yield from _runs(part)


def _data(run: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{run / CONFIG_FILE} is damaged ({error}): restore it") from error
    return (content.get("data") or {}).get("init_args", {}) if isinstance(content, dict) else {}


def _records(data: Mapping[str, Any]) -> tuple[str, Any]:
    """What a training set is drawn from. Options of the playground other than the seed do not make other records."""
    path = str(data.get("path"))
    if path == PLAYGROUND:
        return path, (data.get("playground") or {}).get("seed", 0)
    return str(Path(path).expanduser().resolve()), None


def _share(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two training sets overlap: of the same records, and not one half each."""
    if not one.get("path") or _records(one) != _records(other):
        return False
    return {one.get("leave_out"), other.get("leave_out")} != {"1/2", "2/2"}
