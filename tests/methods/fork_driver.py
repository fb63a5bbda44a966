"""Runs command lines in forked children: everything is imported once, and ``kill -9`` and two processes stay real.

One JSON object a line on standard input, one on standard output. A request has ``argv`` (of the command line) and
``log`` (a file for the children's output), and optionally:

- ``processes``: as many ranks;
- ``breaks``: names of :data:`BREAKS`;
- ``log_tokenising``: even small data are kept in the cache, and the log says which process tokenises;
- ``stop_at``: SIGTERM to itself when that step is over;
- ``die_at``: SIGKILL instead of that call of ``os.replace``, which is how every file is put into its place;
- ``kill_after``: seconds until SIGKILL;
- ``signals``: numbers, sent one after another from when the file ``when`` exists.

The answer has ``code`` (exit code, or minus the signal that ended the first rank) and ``seconds``.
"""

import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed  # imported here, so that no child has to
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_align.cli import fit, main
from lightning_align.cli.parsing import subclasses
from lightning_align.data import cache
from lightning_align.data.datamodules import BaseDataModule
from lightning_align.data.loader import TrainLoader
from lightning_align.methods.base import AlignModule
from lightning_align.methods.online import OnlineModule
from lightning_align.run.checkpoints import RunCheckpoints
from lightning_align.run.resume import RandomState

fit.import_methods()
LIMIT = 300.0  # seconds until a child is taken for hung


# ------------------------------------------------------------------------------ wrong variants that a test must notice
def mean_of_means() -> None:
    """Every micro-batch is averaged by itself, whatever its number of tokens or its weight."""
    training_step = AlignModule.training_step

    def wrong_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        own = self.loss(batch)[1]["loss"][1] * self.trainer.world_size * self.trainer.accumulate_grad_batches
        return training_step(self, {**batch, "window_weight": own}, batch_idx)

    def wrong_loss(right: Callable[..., Any]) -> Callable[..., Any]:
        def loss(self: Any, experience: Any, normaliser: Tensor) -> Any:
            rows = self.trainer.datamodule.batch_size * self.trainer.world_size * self.sampling.num_samples
            return right(self, experience, experience.completion_mask.sum() / len(experience) * rows)

        return loss

    AlignModule.training_step = wrong_step
    for method in subclasses(OnlineModule).values():
        if "minibatch_loss" in vars(method):
            method.minibatch_loss = wrong_loss(method.minibatch_loss)


def no_world_size() -> None:
    """The mean over ranks that DDP takes is not undone."""
    training_step, backward = AlignModule.training_step, L.LightningModule.manual_backward

    def wrong_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = training_step(self, batch, batch_idx)
        return None if loss is None else loss / self.trainer.world_size

    def wrong_backward(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        backward(self, loss / self.trainer.world_size, *args, **kwargs)

    AlignModule.training_step = wrong_step
    L.LightningModule.manual_backward = wrong_backward


def equal_seeds() -> None:
    """Every rank samples with the seeds of the first."""
    draw = OnlineModule.draw

    def wrong(self: Any, batch: Any, params: Any, seeds: Any) -> Any:
        shift = self.trainer.global_rank * len(seeds)
        return draw(self, batch, params, [seed - shift for seed in seeds])

    OnlineModule.draw = wrong


def own_statistics() -> None:
    """Nothing is summed over ranks: each counts, whitens and logs for itself."""
    AlignModule.all_reduce = lambda self, value, reduce_op="sum": value.detach().clone()
    AlignModule.gather = lambda self, items: items


def forgotten_position() -> None:
    """A resumed run starts its epoch again."""
    TrainLoader.load_state_dict = lambda self, state: None


def forgotten_optimiser() -> None:
    """A resumed run starts with fresh moments."""
    Strategy.load_optimizer_state_dict = lambda self, checkpoint: None


def forgotten_random() -> None:
    """A resumed run draws other random numbers."""
    RandomState.on_loop_start = lambda self, trainer, module: torch.rand(1)


def forgotten_counters() -> None:
    """A resumed run forgets what the module itself counts and adapts."""
    for method in subclasses(AlignModule).values():
        method.on_load_checkpoint = lambda self, checkpoint: None


BREAKS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        *(mean_of_means, no_world_size, equal_seeds, own_statistics),
        *(forgotten_position, forgotten_optimiser, forgotten_random, forgotten_counters),
    )
}


def log_tokenising() -> None:
    """Keep even small data in the cache, and say which process tokenises."""
    cache.SMALLEST = 0

    def watched(tabulate: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            print(f"process {rank_zero_only.rank} tokenises", flush=True)
            return tabulate(*arguments)

        return wrapper

    for datamodule in subclasses(BaseDataModule).values():
        datamodule.tabulate = watched(datamodule.tabulate)


def stop_at(step: int) -> None:
    """A SIGTERM that arrives exactly when ``step`` is over."""
    on_boundary = RunCheckpoints.on_boundary

    def stopping(self: Any, trainer: Any, module: Any, done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        on_boundary(self, trainer, module, done)

    RunCheckpoints.on_boundary = stopping


def die_at(call: int) -> None:
    """Be killed instead of a call of ``os.replace``, counted from 1."""
    replace, calls = os.replace, itertools.count(1)

    def dying(*arguments: Any) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)

    os.replace = dying


# ------------------------------------------------------------------------------------------------------------ children
def child(request: Mapping[str, Any], rank: int, environment: Mapping[str, str]) -> None:
    """The command line in this process, which ends with its exit code."""
    code = 1
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment)
        rank_zero_only.rank = rank  # set when Lightning is imported, which was before there were ranks
        for name in request.get("breaks", ()):
            BREAKS[name]()
        if "log_tokenising" in request:
            log_tokenising()
        if "stop_at" in request:
            stop_at(request["stop_at"])
        if "die_at" in request:
            die_at(request["die_at"])
        code = main.run(request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(request: Mapping[str, Any]) -> list[int]:
    """Process ids of the ranks."""
    processes = request.get("processes", 1)
    environment: dict[str, str] = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    started = []
    for rank in range(processes):
        number = os.fork()
        if number == 0:
            child(request, rank, environment | ({"LOCAL_RANK": str(rank)} if processes > 1 else {}))
        started.append(number)
    return started


def serve(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run one request to its end."""
    started = time.monotonic()
    running = start(request)
    codes: dict[int, int] = {}
    signals = list(request.get("signals", ()))
    limit = request.get("kill_after", LIMIT)
    while len(codes) < len(running):
        left = [number for number in running if number not in codes]
        if time.monotonic() - started >= limit:
            for number in left:
                if "kill_after" not in request:
                    os.kill(number, signal.SIGUSR1)  # where it hangs, for the log
                    time.sleep(0.5)
                os.kill(number, signal.SIGKILL)
        elif signals and running[0] in left and Path(request["when"]).exists():
            os.kill(running[0], signals.pop(0))
            time.sleep(0.2)  # Python handles the first before the second comes
        for number in left:
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                codes[number] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return {"code": codes[running[0]], "seconds": time.monotonic() - started}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
