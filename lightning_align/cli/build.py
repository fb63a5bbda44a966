"""From a command line to a parsed and built stage: the parser of ``fit``, ``validate`` and ``test``."""

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_align.methods
from lightning_align.cli.parsing import explain, leaves
from lightning_align.cli.translate import classes_first, translate_options
from lightning_align.data.datamodules import BaseDataModule
from lightning_align.errors import UserError
from lightning_align.methods.base import AlignModule
from lightning_align.methods.online import OnlineModule
from lightning_align.run.directory import CONFIG_FILE, RunDirectory
from lightning_align.run.logging import WandbMode

COMMAND_FLAGS = ("resume", "overwrite", "dry_run", "ckpt_path")  # they say what to do now, not what the run is
DESCRIPTIONS = {
    "fit": "Train one stage in a run directory.",
    "validate": "Evaluate a model or a checkpoint on the validation split.",
    "test": "Evaluate a model or a checkpoint on the test split.",
    "export": "Write a checkpoint in Hugging Face format.",
}
SEEDS = 2**32  # what NumPy takes

TRAINER_DEFAULTS: dict[str, Any] = {
    "accelerator": "cuda" if torch.cuda.is_available() else "cpu",  # statistics are float64, which MPS lacks
    "devices": 1,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "log_every_n_steps": 10,
}


class AlignCLI(LightningCLI):
    """LightningCLI with this project's options; it parses and builds, and ``fit`` runs."""

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
        parser.add_argument(
            "--run.keep_every",
            type=int,
            default=0,
            help="Keep weights for the lab every so many steps; online methods keep them at each evaluation anyway.",
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
        seed = self.config.seed_everything
        if not 0 <= seed < SEEDS:
            raise UserError(f"seed_everything is {seed}: give a whole number from 0 to {SEEDS - 1}")

    def instantiate_classes(self) -> None:
        """Create module and datamodule; what their constructors refuse lies buried in jsonargparse's own error."""
        try:
            super().instantiate_classes()
        except Exception as error:  # whatever it makes of them
            refusal = refusal_within(error)
            if refusal is None:
                raise
            raise UserError(str(refusal)) from error

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
        try:
            return Trainer(callbacks=[*(own if isinstance(own, list) else [own]), *callbacks], **config)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
            raise UserError(f"trainer: {error}") from error  # it checks the options that the user gave


class Words(AlignCLI):
    """The command line parsed and no more."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""


BASES: dict[str, type] = {"model": AlignModule, "data": BaseDataModule}


def refusal_within(error: BaseException | None) -> UserError | None:
    """The :class:`UserError` that an error was made of, if it was."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def import_methods() -> None:
    """Import every method, so that short class names resolve."""
    for module in pkgutil.iter_modules(lightning_align.methods.__path__):
        importlib.import_module(f"lightning_align.methods.{module.name}")


def with_saved_config(argv: list[str]) -> list[str]:
    """``--resume --run.name NAME`` alone takes the configuration from the run itself."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--run.name", dest="name")
    known.add_argument("--run.root", dest="root", default="runs")
    known.add_argument("--resume", action="store_true")
    known.add_argument("--ckpt_path")
    known.add_argument("--config", "-c")
    try:
        options, _ = known.parse_known_args(argv)
    except argparse.ArgumentError:  # an option without its value: the real parser will say so
        return argv
    resuming = options.resume or options.ckpt_path == "last"
    if not resuming or options.config is not None:
        return argv
    if options.name is None:
        raise UserError("--resume and --ckpt_path last need --run.name, the run to take up")
    run = RunDirectory(Path(options.root), options.name, resume=True)
    run.check()
    return ["--config", str(run.path / CONFIG_FILE), *argv]


def build(command: str, argv: list[str]) -> AlignCLI:
    """Parse the command line and create module and datamodule."""
    words, notices = translate_options(classes_first(argv, BASES), BASES)
    for notice in notices if rank_zero_only.rank == 0 else []:  # type: ignore[attr-defined]
        print(f"note: {notice}", file=sys.stderr)
    cli = _parsed(AlignCLI, command, words)
    check_pair(cli.model, cli.datamodule)
    return cli


def check_words(command: str, argv: list[str]) -> None:
    """Raise :class:`UserError` for options that :func:`build` would not understand; makes and reads nothing."""
    _parsed(Words, command, translate_options(classes_first(argv, BASES), BASES)[0])


def _parsed(cli: type[AlignCLI], command: str, words: list[str]) -> AlignCLI:
    return cli(
        AlignModule,
        BaseDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults=TRAINER_DEFAULTS,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={
            **{"exit_on_error": False, "allow_abbrev": False, "prog": f"lightning-align {command}"},
            "description": (
                f"{DESCRIPTIONS[command]} Options of a class: --model.help CLASS, --data.help CLASS, with one of "
                f"{', '.join([*leaves(AlignModule), *leaves(BaseDataModule)])}."
            ),
        },
        run=False,
        args=words,
    )


def check_pair(module: AlignModule, datamodule: BaseDataModule) -> None:
    """Raise :class:`UserError` unless both are of a class to choose, and the one can learn from the other."""
    for section, part in (("model", module), ("data", datamodule)):
        if type(part) in (AlignModule, OnlineModule, BaseDataModule):
            raise UserError(f"{section}.class_path is missing: give one of {', '.join(leaves(BASES[section]))}")
    if module.kinds and datamodule.kind not in module.kinds:
        fitting = [name for name, cls in leaves(BASES["data"]).items() if getattr(cls, "kind", None) in module.kinds]
        raise UserError(
            f"{type(module).__name__} learns from {' or '.join(module.kinds)} records, but --data is "
            f"{type(datamodule).__name__}: give {' or '.join(fitting)}"
        )
