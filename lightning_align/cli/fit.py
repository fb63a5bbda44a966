"""``fit``, ``validate`` and ``test``: one stage through LightningCLI, in a run directory."""

import argparse
import importlib
import logging
import os
import pkgutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_align.methods
from lightning_align.callbacks.export import ExportModel
from lightning_align.callbacks.nan_guard import NanGuard
from lightning_align.callbacks.progress import RunProgress
from lightning_align.cli.parsing import explain, translate_options
from lightning_align.cli.plan import Plan, PlanOnly
from lightning_align.data.datamodules import BaseDataModule
from lightning_align.errors import UserError
from lightning_align.methods.base import AlignModule
from lightning_align.methods.online import OnlineModule
from lightning_align.run.checkpoints import RunCheckpoints, check_checkpoint
from lightning_align.run.directory import CONFIG_FILE, RunDirectory, find_parents
from lightning_align.run.logging import FileLogger, WandbMirror, WandbMode, wandb_mode
from lightning_align.run.resume import RandomState, use_boundary_loop
from lightning_align.run.signals import StopRequest

COMMAND_FLAGS = ("resume", "overwrite", "dry_run", "ckpt_path")  # they say what to do now, not what the run is
NAME_VARIABLE = "LIGHTNING_ALIGN_RUN_NAME"  # the processes of one run agree on a name made up by the first

TRAINER_DEFAULTS: dict[str, Any] = {
    "accelerator": "cuda" if torch.cuda.is_available() else "cpu",  # statistics are float64, which MPS lacks
    "devices": 1,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "log_every_n_steps": 10,
}


class AlignCLI(LightningCLI):
    """LightningCLI with this project's options; it parses and builds, and :func:`execute` runs."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of the run."""
        parser.add_argument("--run.name", type=str | None, default=None, help="Name of the run; made up if not given.")
        parser.add_argument("--run.root", type=str, default="runs", help="Folder that holds the runs.")
        parser.add_argument(
            "--run.wandb",
            type=WandbMode | None,
            default=None,
            help="Weights & Biases: offline (default, whether logged in or not), online or disabled.",
        )
        parser.add_argument(
            "--run.checkpoint_every",
            type=int,
            default=50,
            help="Write last.ckpt every so many optimiser steps (offline methods) or iterations (online methods).",
        )
        parser.add_argument("--resume", action="store_true", help="Continue the run of this name, bit for bit.")
        parser.add_argument("--overwrite", action="store_true", help="Delete the run of this name and start again.")
        parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Print sizes and memory, then stop.")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="A checkpoint file, or last (as --resume)."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; any problem is one line."""
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            options = [name for action in parser._actions for name in action.option_strings]
            raise UserError(explain(error, BASES, options)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Later, when the run directory is known."""
        return None  # type: ignore[return-value]

    def config_text(self) -> str:
        """``config.yaml``: everything that determines the run, without its name."""
        config = self.config.clone()
        for key in ("config", "run.name", *COMMAND_FLAGS):
            config.pop(key, None)
        return self.parser.dump(config, skip_unset=False)

    def build_trainer(self, callbacks: list[Any], **overrides: Any) -> Trainer:
        """The trainer with ``callbacks`` beside the user's own."""
        config = {**self._get(self.config_init, "trainer"), **overrides}
        own = config.pop("callbacks", None) or []
        return Trainer(callbacks=[*(own if isinstance(own, list) else [own]), *callbacks], **config)


BASES: dict[str, type] = {"model": AlignModule, "data": BaseDataModule}


def main(argv: list[str]) -> int:
    """``fit``: train one stage."""
    return execute("fit", argv)


def validate(argv: list[str]) -> int:
    """``validate``: the module's evaluation on the validation split."""
    return execute("validate", argv)


def test(argv: list[str]) -> int:
    """``test``: the module's evaluation on the test split."""
    return execute("test", argv)


def execute(command: Literal["fit", "validate", "test"], argv: list[str]) -> int:
    """Parse, build and run ``command``; returns the exit code."""
    quiet()
    import_methods()
    with StopRequest() as stop:
        cli = build(command, with_saved_config(argv))
        if command == "fit":
            return fit(cli, stop)
        return evaluate(cli, command)


def quiet() -> None:
    """Lightning's own remarks would drown what this program has to say."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*module.s. in eval mode.*",
        ".*is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, so that it need not warn when we start git


def import_methods() -> None:
    """Import every method, so that short class names resolve."""
    for module in pkgutil.iter_modules(lightning_align.methods.__path__):
        importlib.import_module(f"lightning_align.methods.{module.name}")


def with_saved_config(argv: list[str]) -> list[str]:
    """``--resume --run.name NAME`` alone takes the configuration from the run itself."""
    resuming = "--resume" in argv or "--ckpt_path=last" in argv
    if not resuming or any(word.split("=")[0] in ("--config", "-c") for word in argv):
        return argv
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--run.name", dest="name")
    known.add_argument("--run.root", dest="root", default="runs")
    options, _ = known.parse_known_args(argv)
    config = Path(options.root) / (options.name or "") / CONFIG_FILE
    return ["--config", str(config), *argv] if options.name and config.is_file() else argv


def build(command: str, argv: list[str]) -> AlignCLI:
    """Parse the command line and create module and datamodule."""
    words, notices = translate_options(argv, BASES)
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    return AlignCLI(
        AlignModule,
        BaseDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults=TRAINER_DEFAULTS,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": f"lightning-align {command}"},
        run=False,
        args=words,
    )


def fit(cli: AlignCLI, stop: StopRequest) -> int:
    """Train, unless this is a dry run."""
    config = cli.config
    resume = config.resume or config.ckpt_path == "last"
    run = RunDirectory(Path(config.run.root), run_name(cli), resume=resume, overwrite=config.overwrite)
    if rank_zero_only.rank == 0 and not config.dry_run:  # type: ignore[attr-defined]
        run.check()
    checkpoint = starting_point(run, config.ckpt_path, resume)
    trainer = fit_trainer(cli, run, stop)
    try:
        run_trainer("fit", trainer, cli, checkpoint)
    except PlanOnly:
        return 0
    print(f"finished: {run.path} (model in {run.model})", file=sys.stderr)
    return 0


def run_name(cli: AlignCLI) -> str:
    """The run's name; without one, method and time, the same in every process of the run."""
    if cli.config.run.name is not None:
        return cli.config.run.name
    method = type(cli.model).__name__.removesuffix("Module").lower()
    return os.environ.setdefault(NAME_VARIABLE, f"{method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")


def starting_point(run: RunDirectory, path: str | None, resume: bool) -> Path | None:
    """The checkpoint to start from, checked; None for a fresh start, also of a run that was killed before its first."""
    if resume:
        checkpoint = run.last_checkpoint if run.last_checkpoint.exists() else None
    else:
        checkpoint = Path(path) if path is not None else None
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    return checkpoint


def fit_trainer(cli: AlignCLI, run: RunDirectory, stop: StopRequest) -> Trainer:
    """The trainer of a run: our loggers, callbacks and loop."""
    config, module = cli.config, cli.model
    if config.trainer.logger:
        raise UserError(
            "trainer.logger is not used here: metrics.csv is always written, --run.wandb adds Weights & Biases"
        )
    online = isinstance(module, OnlineModule)
    if online and config.trainer.accumulate_grad_batches != 1:
        raise UserError("trainer.accumulate_grad_batches is for offline methods: set model.micro_batch_size instead")
    if online and config.trainer.max_steps != -1:
        raise UserError("trainer.max_steps is for offline methods: set model.iterations instead")
    files = FileLogger(run.path)
    checkpoints = RunCheckpoints(
        run,
        files,
        config=cli.config_text(),
        facts={"seed": config.seed_everything, "parents": find_parents(config.as_dict())},
        every=config.run.checkpoint_every,
        label=module.checkpoint_label,
        stop=stop,
    )
    callbacks = [
        Plan(dry_run=config.dry_run),
        NanGuard(run.path),
        RandomState(),
        checkpoints,
        ExportModel(run, module.export),
    ]
    if config.trainer.enable_progress_bar is not False:
        callbacks.append(RunProgress("iteration", module.iterations) if online else RunProgress("step"))
    mirror = WandbMirror(run.path, wandb_mode(config.run.wandb), config.as_dict())
    overrides: dict[str, Any] = {"logger": [files, mirror], "default_root_dir": str(run.path)}
    if online:  # one training step is one iteration, and the module evaluates itself after it
        overrides |= {"limit_val_batches": 0, "max_epochs": -1}
    elif config.trainer.max_epochs is None and config.trainer.max_steps == -1:
        overrides["max_epochs"] = 1  # Lightning's own default is a thousand
    trainer = cli.build_trainer(callbacks, **overrides)
    use_boundary_loop(trainer)
    return trainer


def evaluate(cli: AlignCLI, command: str) -> int:
    """Run the module's evaluation and print what it measured."""
    checkpoint = Path(cli.config.ckpt_path) if cli.config.ckpt_path is not None else None
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    trainer = cli.build_trainer([], logger=False, enable_progress_bar=False, enable_checkpointing=False)
    run_trainer(command, trainer, cli, checkpoint)
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"{name:<32} {float(value):.6g}")
    return 0


def run_trainer(command: str, trainer: Trainer, cli: AlignCLI, checkpoint: Path | None) -> None:
    """Call the Trainer; what a user can mend becomes a :class:`UserError`."""
    path = None if checkpoint is None else str(checkpoint)
    try:
        getattr(trainer, command)(cli.model, datamodule=cli.datamodule, ckpt_path=path, weights_only=True)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if checkpoint is not None and "loading state_dict" in str(error):
            first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), "")
            raise UserError(f"{checkpoint} is a checkpoint of another model: {first[:200]}") from error
        raise
