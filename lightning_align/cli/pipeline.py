"""``pipeline``: stages in order, each in its own process; finished ones whose inputs are unchanged are skipped."""

import sys
import time
from pathlib import Path

from lightning_align.cli.label import check_label
from lightning_align.cli.options import OptionParser
from lightning_align.cli.pipeline_file import read_pipeline
from lightning_align.cli.stage_inputs import decide
from lightning_align.cli.stage_jobs import DESCRIPTIONS, FLAGS, Run
from lightning_align.cli.stages import Pipeline, Stage
from lightning_align.errors import UserError, nearest
from lightning_align.run.lock import take_lock


def main(argv: list[str]) -> int:
    """Run the stages of a pipeline file; returns the exit code of the first that fails."""
    options = _parser().parse_args(argv)
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}: give 1 or more")
    pipeline = read_pipeline(options)
    names = list(dict.fromkeys(name for stage in pipeline.stages for name in (stage.base, stage.name)))
    for chosen in (options.start, options.only):
        if chosen is not None and chosen not in names:
            raise UserError(f"there is no stage '{chosen}'{nearest(chosen, names)} (stages: {', '.join(names)})")
    own = [{stage.base, stage.name} for stage in pipeline.stages]
    first = next(i for i, known in enumerate(own) if options.start in (None, *known))
    wanted = [
        stage
        for stage, known in zip(pipeline.stages[first:], own[first:], strict=True)
        if options.only in (None, *known)
    ]
    check_stages(pipeline, wanted)
    forced = options.start is not None or options.only is not None
    if options.dry_run:
        show(pipeline, wanted, forced)
        return 0
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(pipeline.folder)
    if lock is None:
        raise UserError(f"another process is running the pipeline in {pipeline.folder}: wait, or give --run.name")
    with lock:
        run = Run(pipeline, wanted, options.jobs, forced)
        code = run.go()
    if code == 0:
        verb = f"done in {time.monotonic() - run.started:.0f} s" if run.ran else "is done already, nothing has changed"
        print(f"pipeline {pipeline.folder.name} {verb}: {pipeline.folder}", file=sys.stderr)
    return code


def show(pipeline: Pipeline, wanted: list[Stage], forced: bool) -> None:
    """What would run, and by which commands."""
    for number, stage in enumerate(pipeline.stages, start=1):
        if stage in wanted:
            action = decide(pipeline, stage, forced=forced)
            print(
                f"[{number}/{len(pipeline.stages)}] {stage.name}: {DESCRIPTIONS[action]} ({stage.folder})",
                file=sys.stderr,
                flush=True,
            )
            print("  " + " ".join(stage.command(FLAGS.get(action))[1:]))


def check_stages(pipeline: Pipeline, wanted: list[Stage]) -> None:
    """Raise :class:`UserError` for what would only be found when a stage begins, before the first one does."""
    checked = [stage for stage in wanted if stage.lab is None]
    for stage in checked:
        for parent in pipeline.stages:
            if parent.name in stage.parents and parent not in wanted and not parent.there:
                raise UserError(
                    f"stage '{stage.name}' needs stage '{parent.name}', which has not run ({parent.folder}): run that "
                    "first"
                )
    from lightning_align.cli.build import check_words, import_methods  # takes seconds

    import_methods()
    for stage in checked:
        try:
            if stage.label is not None:
                check_label(stage.label_words())
            else:
                check_words("fit", stage.fit_words())
        except UserError as error:
            raise UserError(f"stage '{stage.name}': {error}") from error


def _parser() -> OptionParser:
    parser = OptionParser(
        "pipeline", "Run several stages in order; finished stages whose inputs are unchanged are skipped."
    )
    parser.add_argument("--config", required=True, type=Path, help="pipeline file (YAML)")
    parser.add_argument("--run.name", dest="name", help="name of the pipeline's folder (default: from the file)")
    parser.add_argument("--run.root", dest="root", help="folder that holds all runs (default: runs)")
    parser.add_argument("--seed_everything", type=int, help="seed of every stage")
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="STAGE.OPTION=VALUE", help="or axes.NAME=[…]"
    )
    parser.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and all after it, done or not")
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone, done or not")
    parser.add_argument("--jobs", type=int, default=1, help="how many stages may run at a time (default: 1)")
    parser.add_argument("--dry-run", "--dry_run", dest="dry_run", action="store_true", help="say what would run")
    return parser
