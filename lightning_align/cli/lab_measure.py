"""``lab frontier --recompute`` and ``--best-of``: checkpoints and starts of runs, measured on held-out prompts."""

import csv
import io
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lightning_align.cli.export import export_checkpoint
from lightning_align.cli.lab_files import write_all
from lightning_align.cli.lab_measure_plan import Job, Shared, plan
from lightning_align.errors import UserError
from lightning_align.lab.evaluation.sampling import Policy
from lightning_align.lab.evaluation.subjects import place_of
from lightning_align.lab.measured import (
    REMEDY,
    append_row,
    check_alike,
    drop_damaged,
    fingerprint,
    read_measured,
    remove,
)
from lightning_align.lab.measured import write_table as write_measured_table
from lightning_align.lab.runs import MEASURED_FILE, read_episodes
from lightning_align.run.checkpoints import check_checkpoint
from lightning_align.run.directory import CHECKPOINTS
from lightning_align.run.files import writing
from lightning_align.run.lock import take_lock

OVERWRITE = "give --overwrite to measure again"
MEASURING_LOCK = ".measuring"  # of its own: a run that is still training may be measured
BEST_OF_COMMON = ("data", "split", "prompts", "prompts_hash", "max_new_tokens", "stop_strings", "dtype", "gold")


def measure(options: Namespace) -> list[Path]:
    """Measure what the command line asks for; returns the tables of best-of-n that it wrote."""
    if options.recompute:
        recompute(options.run, options)
    return [] if options.best_of is None else best_of_tables(options.run, options)


def recompute(runs: Sequence[Path], options: Namespace) -> None:
    """Measure what is not measured yet of every run; each row is on disk before the next begins."""
    shared = Shared(options)
    jobs = plan(runs, shared)
    check_alike({str(job.run): job.recorded for job in jobs}, planned=True)
    with ExitStack() as locks:
        for number, run in enumerate(runs):
            if run.resolve() in [other.resolve() for other in runs[:number]]:
                raise UserError(f"{run} is given twice: a run is one seed, give it once")
            with writing(run / MEASURING_LOCK, REMEDY):
                lock = take_lock(run, MEASURING_LOCK)
            if lock is None:
                raise UserError(f"another process is measuring {run}: wait for it, then the same command goes on")
            locks.enter_context(lock)
        for job in jobs:
            if not options.overwrite:
                _check_earlier(job)
            _check_checkpoints(job, again=options.overwrite)
        if options.overwrite:
            for job in jobs:  # of all runs first: killed from here on, the command goes on without --overwrite
                remove(job.run)
        for number, job in enumerate(jobs, start=1):
            drop_damaged(job.run)
            _measure(job, shared, f"[{number}/{len(jobs)}] {job.run}")


def _check_earlier(job: Job) -> None:
    """Rows of other settings are not mixed with new ones, and not thrown away unasked."""
    for row in read_measured(job.run):
        if row["fingerprint"] != fingerprint(job.recorded):
            before = {"scorers": job.recorded["scorers"], **row["settings"]}  # earlier versions recorded no scorers
            changed = [name for name, value in job.recorded.items() if before.get(name) != value]
            if changed == ["scorers"]:
                now, then = job.recorded["scorers"], before["scorers"]
                places = ", ".join(place for place in {**then, **now} if now.get(place) != then.get(place))
                raise UserError(f"{places} has changed since {job.run / MEASURED_FILE} was measured: {OVERWRITE}")
            if changed:
                raise UserError(f"{job.run / MEASURED_FILE} was measured with other {', '.join(changed)}: {OVERWRITE}")


def _check_checkpoints(job: Job, *, again: bool) -> None:
    """Refuse a checkpoint that is not whole before anything is measured; say which of the expected are not there."""
    missing = job.targets if again else _missing(job)
    for target in missing.values():
        if target is not None and target.parent.name == CHECKPOINTS:
            check_checkpoint(target, to_train=False, remedy="remove the file to go on without it")
    gone = job.expected - (job.targets.keys() if again else job.targets.keys() | _measured_steps(job.run))
    if gone:
        steps = ", ".join(map(str, sorted(gone)))
        told = f"{len(gone)} of {len(job.expected)} checkpoints of run.keep_every are not there"
        print(f"{job.run}: {told} (steps {steps})", file=sys.stderr)


def _measured_steps(run: Path) -> set[int]:
    return {row["step"] for row in read_measured(run)}


def _missing(job: Job) -> dict[int, Path | None]:
    done = _measured_steps(job.run)
    return {step: target for step, target in job.targets.items() if step not in done}


def _measure(job: Job, shared: Shared, name: str) -> None:
    missing = _missing(job)
    if missing:
        meter = job.meter(shared)
        with tempfile.TemporaryDirectory() as folder:
            loader = Loader(job, Path(folder))
            for count, (step, target) in enumerate(missing.items(), start=1):
                begun = time.monotonic()
                row = meter.measure(loader.load(target))
                which = job.start if target is None else str(target.relative_to(job.run))
                head = {"step": step, "checkpoint": which, "fingerprint": fingerprint(job.recorded)}
                append_row(job.run, {**head, "settings": job.recorded, **row})
                seconds = time.monotonic() - begun
                left = f", about {seconds * (len(missing) - count):.0f} s left" if count < len(missing) else ""
                told = ", ".join(_told(row["metrics"], key) for key in ("kl", "proxy", "gold") if key in row["metrics"])
                print(f"{name} step {step} ({count} of {len(missing)}): {told}; {seconds:.1f} s{left}", file=sys.stderr)
    write_measured_table(job.run, read_measured(job.run), read_episodes(job.run))


def _told(metrics: Mapping[str, Any], key: str) -> str:
    return f"{'KL' if key == 'kl' else key} {metrics[key]['value']:.3f}"


class Loader:
    """Loads the policies of one run: the first checkpoint by way of an export, the weights of others into its place."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.folder = folder
        self.exported: Policy | None = None

    def load(self, target: Path | None) -> Policy:
        """The policy of a checkpoint, of a model's folder, or (None) of what the run started from."""
        if target is None:
            return Policy(self.job.subject.start or self.job.start, self.job.settings)
        if target.parent.name != CHECKPOINTS:
            return Policy(str(target), self.job.settings)
        if self.exported is None or not self._take_weights(self.exported, target):
            out = self.folder / target.stem
            export_checkpoint(self.job.run, target, out)
            self.exported = Policy(str(out), self.job.settings)
        return self.exported

    def _take_weights(self, policy: Policy, checkpoint: Path) -> bool:
        """Whether the checkpoint holds all weights of the network, which then has them; adapters are merged instead."""
        state = torch.load(checkpoint, weights_only=True, mmap=True, map_location="cpu")["state_dict"]
        own = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        if own.keys() != policy.model.state_dict().keys():
            return False
        policy.model.load_state_dict(own)
        return True


# ---------------------------------------------------------------------------------------------------------- best of n
def best_of_tables(runs: Sequence[Path], options: Namespace) -> list[Path]:
    """``best_of.csv`` of each start and reward that runs have, with n as its step and the bound on the KL as its KL."""
    plain = Namespace(**vars(options) | {"num_samples": options.best_of, "heldout": [], "judge": None})
    shared, seen = Shared(plain), set()
    written: list[Path] = []
    jobs = plan(runs, shared)
    able = [job for job in jobs if {"proxy", "gold"} <= set(job.specs)]  # DPO, for one, has no reward of its own
    if not able:
        raise UserError(f"--best-of chooses by a reward and tells gold: {jobs[0].run} has not both (--reward, --gold)")
    for job in able:
        key = (place_of(job.start), json.dumps(job.specs, sort_keys=True))
        if key in seen:
            continue
        seen.add(key)
        _check_best_of(job, runs)
        begun = time.monotonic()
        rows = job.meter(shared).best_of()
        number = f"_{len(written) + 1}" if written else ""
        path = options.out / f"best_of{number}.csv"
        write_all({path: best_of_table(rows).encode()})
        written.append(path)
        seconds = time.monotonic() - begun
        print(f"best of {options.best_of} of {job.start} by {job.specs['proxy']}: {seconds:.1f} s", file=sys.stderr)
    return written


def _check_best_of(job: Job, runs: Sequence[Path]) -> None:
    """Its prompts and gold are those of what was measured; how many samples and who wins do not matter to it."""
    own = {name: job.recorded[name] for name in BEST_OF_COMMON}
    for run in runs:
        measured = read_measured(run)
        if measured:
            settings = measured[-1]["settings"]
            check_alike({str(run): settings, f"--best-of {job.settings.params.num_samples}": {**settings, **own}})


def best_of_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of ``best_of.csv``."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    names = ("proxy", "gold")
    writer.writerow(["step", "kl", *(cell for name in names for cell in (name, f"{name}_se"))])
    for row in rows:
        cells = [row[name][part] for name in names for part in ("value", "se")]
        writer.writerow([row["n"], row["kl_bound"], *("" if cell != cell else cell for cell in cells)])
    return out.getvalue()
