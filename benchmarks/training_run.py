"""One run of a side of ``benchmarks.training``, and the check that both train the same."""

import argparse
from pathlib import Path

from benchmarks.sides import OURS, THEIRS, Run, run_fit, run_trl
from benchmarks.training_cases import METHODS, ROOM, Method, World

TOLERANCE = 1e-3  # relative
BATCH = 8  # sequences or pairs a step
Case = tuple[str, str]  # method, lengths


def run_ours(world: World, case: Case, options: argparse.Namespace, folder: Path) -> Run:
    """``fit`` with a configuration file."""
    name, lengths = case
    method = METHODS[name]
    model = {"model": str(world.model(method.model)), **(method.settings or {})}
    data = {"path": str(world.data(name, lengths)), "batch_size": BATCH, "max_length": ROOM}
    return run_fit(
        {"class_path": method.module, "init_args": model},
        {"class_path": method.data, "init_args": data},
        {"max_steps": options.steps},
        folder,
        options.threads,
    )


def run_theirs(world: World, case: Case, options: argparse.Namespace, folder: Path) -> Run:
    """A script with TRL's trainer."""
    name, lengths = case
    method = METHODS[name]
    settings = {
        **{"trainer": f"{method.trl}Trainer", "config": f"{method.trl}Config"},
        **{"model": str(world.model(method.model)), "data": str(world.data(name, lengths))},
    }
    batches = {"per_device_train_batch_size": BATCH, "max_length": ROOM, "train_sampling_strategy": "sequential"}
    return run_trl(settings, batches, folder, options)


SIDES = {OURS: run_ours, THEIRS: run_theirs}


def check_same(case: Case, method: Method, ours: Run, theirs: Run) -> None:
    """Stop the benchmark where the two sides train something else."""
    for metric in method.same:
        our, their = (run.logged[0][metric] for run in (ours, theirs))
        if not abs(our - their) <= TOLERANCE * abs(their):
            raise SystemExit(
                f"{' '.join(case)}: {metric} of the first step is {our:.6g} here and {their:.6g} in TRL, more than "
                f"{TOLERANCE:g} apart: the two train something else, and nothing is reported"
            )
    our_tokens, their_tokens = ([row["num_tokens"] for row in run.logged] for run in (ours, theirs))
    if our_tokens != their_tokens:
        raise SystemExit(
            f"{' '.join(case)}: after {len(our_tokens)} steps {our_tokens[-1]:,.0f} tokens were seen here and "
            f"{their_tokens[-1]:,.0f} in TRL: the batches are others, and nothing is reported"
        )
