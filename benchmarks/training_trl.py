"""TRL's side of benchmarks as its documentation has it: ``python -m benchmarks.training_trl FILE.json``.

It runs in whatever environment holds TRL and imports nothing of this project but the clock, and the reward of methods
that have one.
"""

import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import trl
from datasets import load_dataset
from transformers import TrainerCallback

from benchmarks.training_clock import Clock


class StepClock(TrainerCallback):
    """Notes every step, and what is logged."""

    def __init__(self, clock: Clock, logs: Path) -> None:
        self.clock = clock
        self.logs = logs

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """It is done, but for the logging."""
        self.clock.end()

    def on_log(self, *_: Any, **others: Any) -> None:
        """The rows of steps; the last row sums up the run."""
        logs: dict[str, float] = others["logs"]
        if "train_runtime" not in logs:
            with self.logs.open("a", encoding="utf-8") as file:
                file.write(json.dumps(logs) + "\n")


def main(path: str) -> None:
    """Train and save."""
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    clock = Clock(settings["clock"])
    config = getattr(trl, settings["config"])(output_dir=settings["output"], **settings["options"])
    trainer = getattr(trl, settings["trainer"])(
        model=settings["model"],
        args=config,
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        callbacks=[StepClock(clock, Path(settings["logs"]))],
        **{name: pkgutil.resolve_name(function) for name, function in settings.get("functions", {}).items()},
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1])
