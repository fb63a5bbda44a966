"""What label commands leave beside their records, and show of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def show(metrics: Mapping[str, Any]) -> None:
    """One line a metric."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            low, high = value["ci"]
            print(f"{name:<36} {value['value']:.3f} [{low:.3f}, {high:.3f}]")
        else:
            print(f"{name:<36} {value:.3f}" if isinstance(value, float) else f"{name:<36} {value}")


def write_metrics(metrics: Mapping[str, Any], path: Path) -> None:
    """As JSON."""
    from lightning_align.run.files import replacing

    with replacing(path, "make room or mend this, and start again: nothing is made twice") as file:
        file.write((json.dumps(metrics, indent=1, ensure_ascii=False) + "\n").encode())


def beside(out: Path, ending: str) -> Path:
    """A file next to ``out`` under its name: ``sft.jsonl`` and ``chains.jsonl`` give ``sft.chains.jsonl``."""
    from lightning_align.data.files import COMPRESSIONS

    name = out.with_suffix("") if out.suffix.lower() in COMPRESSIONS else out
    return name.with_suffix(f".{ending}")
