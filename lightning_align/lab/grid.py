"""The runs of a pipeline with axes, each with its labels."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_align.errors import UserError
from lightning_align.run.directory import is_run

STATE_FILE = "pipeline.json"
SEED = "seed"  # the axis whose labels are repetitions of one method


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        stage: Its stage in the pipeline file.
        axes: Label of each axis that the stage depends on.
        run: Its folder.
        seconds: That it took.
    """

    stage: str
    axes: Mapping[str, str]
    run: Path
    seconds: float

    @property
    def method(self) -> str:
        """Stage and labels but the seed's: what repetitions have in common."""
        labels = ",".join(f"{axis}={label}" for axis, label in self.axes.items() if axis != SEED)
        return f"{self.stage} {labels}" if labels else self.stage


def load_grid(folder: Path) -> list[Cell]:
    """The finished runs of a pipeline's folder, those without axes too, in the order in which they were begun.

    Raises:
        UserError: The folder is not a pipeline's, or nothing in it has finished.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {STATE_FILE}: give the folder of a pipeline")
    try:
        states = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): run the pipeline again") from error
    cells = [
        Cell(state.get("stage", name), state.get("axes", {}), folder / name, float(state.get("seconds", "nan")))
        for name, state in states.items()
        if state.get("finished") and is_run(folder / name)
    ]
    if not cells:
        raise UserError(f"{folder}: no stage has finished yet")
    return cells


def expand(places: Sequence[Path], wanted: Callable[[Path], bool]) -> list[Path]:
    """Runs and files as they are, and for a pipeline's folder those of its finished runs that are ``wanted``."""
    found: list[Path] = []
    for place in places:
        if (place / STATE_FILE).is_file():
            found += [cell.run for cell in load_grid(place) if wanted(cell.run)]
        else:
            found.append(place)
    return found


def cell_of(run: Path) -> Cell | None:
    """The cell that a run is, if it is a finished one of a pipeline with axes."""
    place = run.resolve()
    folder = place.parent.parent  # of pipeline/stage/labels
    if not (folder / STATE_FILE).is_file():
        return None
    return next((cell for cell in load_grid(folder) if cell.axes and cell.run.resolve() == place), None)
