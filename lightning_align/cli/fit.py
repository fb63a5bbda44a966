"""``fit``, ``validate`` and ``test``: one stage through LightningCLI, in a run directory."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_align.callbacks.export import ExportModel
from lightning_align.callbacks.figure import EvaluationFigure
from lightning_align.callbacks.nan_guard import NanGuard
from lightning_align.callbacks.progress import RunProgress
from lightning_align.callbacks.stop import StopOverOptimisation
from lightning_align.cli.build import AlignCLI, build, import_methods, with_saved_config
from lightning_align.cli.plan import Plan, PlanOnly
from lightning_align.errors import UserError, check_options, nearest
from lightning_align.methods.online import OnlineModule
from lightning_align.methods.reward import RewardModule
from lightning_align.run.checkpoints import RunCheckpoints, check_checkpoint
from lightning_align.run.directory import CONFIG_FILE, RunDirectory, check_parents, find_parents, read_status
from lightning_align.run.logging import FileLogger, WandbMirror, wandb_mode
from lightning_align.run.model_folders import check_models, find_models
from lightning_align.run.resume import RandomState, use_boundary_loop
from lightning_align.run.signals import StopRequest

STRATEGIES = ("auto", "ddp", "single_device")
NAME_VARIABLE = "LIGHTNING_ALIGN_RUN_NAME"  # the processes of one run agree on a name made up by the first


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
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*module.s. in eval mode.*",
        ".*is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*callbacks used to create the checkpoint.*",
        ".*max_epochs. was not set.*",
        ".*Total length of `list` across ranks is zero.*",  # nothing is held out, which the report on the data says
    ):
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, so that it need not warn when we start git


def fit(cli: AlignCLI, stop: StopRequest) -> int:
    """Train, unless this is a dry run."""
    config = cli.config
    run, resume = run_directory(cli)
    if rank_zero_only.rank == 0 and not config.dry_run:  # type: ignore[attr-defined]
        run.check()
        if resume or run.overwrite:
            run.hold()
    try:
        train(cli, stop, run, resume)
    except PlanOnly:
        return 0
    finally:
        run.close()
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(f"finished: {run.path} (model in {run.model})", file=sys.stderr)
    return 0


def train(cli: AlignCLI, stop: StopRequest, run: RunDirectory, resume: bool) -> None:
    """Train in ``run``, which no other process is in."""
    config = cli.config
    if resume:
        check_unchanged(cli, run.path / CONFIG_FILE)
    parents, models = find_parents(config.as_dict()), find_models(config.as_dict())
    if resume:
        check_parents(run.path, parents)
        check_models(run.path, models)
    checkpoint = starting_point(run, config.ckpt_path, resume)
    facts = {"seed": config.seed_everything, "parents": parents, "models": models}
    trainer = fit_trainer(cli, run, stop, facts)
    run_trainer("fit", trainer, cli, checkpoint)
    (saved,) = (callback for callback in trainer.callbacks if isinstance(callback, RunCheckpoints))  # type: ignore[attr-defined]
    if saved.step == saved.resumed_from:
        limit = "model.iterations" if isinstance(cli.model, OnlineModule) else "trainer.max_epochs or max_steps"
        stops = [each for each in trainer.callbacks if isinstance(each, StopOverOptimisation) and each.stops()]  # type: ignore[attr-defined]
        end = f"where StopOverOptimisation ended it: {stops[0].why()}" if stops else f"where {limit} ends it"
        warnings.warn(f"nothing was trained: {run.path} is at step {saved.step}, {end}", stacklevel=1)


def run_directory(cli: AlignCLI) -> tuple[RunDirectory, bool]:
    """The run's directory, and whether what lies there is to be taken up."""
    config = cli.config
    resume = config.resume or config.ckpt_path == "last"
    if resume and config.run.name is None:
        raise UserError("--resume and --ckpt_path last need --run.name, the run to take up")
    run = RunDirectory(Path(config.run.root), run_name(cli), resume=resume, overwrite=config.overwrite)
    return run, resume


def run_name(cli: AlignCLI) -> str:
    """The run's name; without one, method and time, the same in every process of the run."""
    if cli.config.run.name is not None:
        return cli.config.run.name
    method = type(cli.model).__name__.removesuffix("Module").lower()
    return os.environ.setdefault(NAME_VARIABLE, f"{method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")


def starting_point(run: RunDirectory, path: str | None, resume: bool, *, to_train: bool = True) -> Path | None:
    """The checkpoint to start from, checked; None for a fresh start, also of a run that was killed before its first."""
    if resume:
        if path not in (None, "last"):
            raise UserError(f"--resume continues from {run.last_checkpoint}, --ckpt_path is {path}: give one of them")
        checkpoint = run.last_checkpoint if run.last_checkpoint.exists() else None
    else:
        checkpoint = Path(path) if path is not None else None
        if path is not None and not Path(path).is_file():
            raise UserError(f"there is no checkpoint {path}{nearest(path, ['last'])}")
    if checkpoint is not None:
        check_checkpoint(checkpoint, to_train=to_train)
    return checkpoint


def check_unchanged(cli: AlignCLI, saved: Path) -> None:
    """Raise :class:`UserError` if a resumed run would go on with other models, data or settings than it began with.

    How long it goes on and where it runs may change.
    """
    if not saved.is_file():
        return
    before, now = (
        {name: value for section in ("model", "data", "seed_everything") for name, value in _flat(config, section)}
        for config in (yaml.safe_load(saved.read_text(encoding="utf-8")), yaml.safe_load(cli.config_text()))
    )
    for name in sorted(before.keys() & now.keys() - {"model.iterations"}):
        if before[name] != now[name]:
            raise UserError(
                f"{name} is {now[name]}, but the run began with {before[name]} ({saved}): leave the option out to "
                "resume, or give another --run.name"
            )


def _flat(config: Mapping[str, Any], section: str) -> Iterator[tuple[str, Any]]:
    """The options of a section by their dotted names."""
    value = config.get(section)
    if not isinstance(value, dict):
        yield section, value
        return
    yield f"{section}", value.get("class_path")
    for name, option in value.get("init_args", {}).items():
        yield f"{section}.{name}", option


def fit_trainer(cli: AlignCLI, run: RunDirectory, stop: StopRequest, facts: Mapping[str, Any]) -> Trainer:
    """The trainer of a run: our loggers, callbacks and loop. ``facts`` are what ``run.json`` begins with."""
    config, module = cli.config, cli.model
    online = isinstance(module, OnlineModule)
    check_trainer_options(config.trainer, online=online)
    if online:
        steps, prompts = module.num_mini_batches, cli.datamodule.batch_size
        check_options("model", ("num_mini_batches", steps, steps <= prompts, f"at most {prompts}, one a prompt"))
    files = FileLogger(run.path)
    checkpoints = RunCheckpoints(
        run,
        files,
        config=cli.config_text(),
        facts=facts,
        every=config.run.checkpoint_every,
        keep_every=config.run.keep_every,
        label=module.checkpoint_label,
        stop=stop,
    )
    callbacks = [
        Plan(
            dry_run=config.dry_run,
            record=run.update,
            data_hash=read_status(run.path).get("data_hash") if run.resume else None,
        ),
        NanGuard(run.path),
        RandomState(),
        checkpoints,
        ExportModel(run, module.export),
    ]
    if config.trainer.enable_progress_bar is not False:
        callbacks.append(RunProgress("iteration", module.iterations) if online else RunProgress("step"))
    if isinstance(module, RewardModule):
        callbacks.append(EvaluationFigure(run.path / "reliability.png", lambda: reliability(module, run)))
    mirror = WandbMirror(run.path, wandb_mode(config.run.wandb), config.as_dict())
    overrides: dict[str, Any] = {"logger": [files, mirror], "default_root_dir": str(run.path)}
    if online:  # one training step is one iteration, and the module evaluates itself after it
        overrides |= {"limit_val_batches": 0, "max_epochs": -1}
    elif config.trainer.max_epochs is None and config.trainer.max_steps == -1:
        overrides["max_epochs"] = 1  # Lightning's own default is a thousand
    trainer = cli.build_trainer(callbacks, **overrides)
    use_boundary_loop(trainer)
    return trainer


def reliability(module: RewardModule, run: RunDirectory) -> bytes | None:
    """The calibration of a reward model in its last evaluation; None if it had no comparisons."""
    if not module.reliability:
        return None
    from lightning_align.lab.reliability import draw_reliability  # drawing takes a second to import

    return draw_reliability(module.reliability, run.path.name)


def check_trainer_options(options: Any, *, online: bool) -> None:
    """Raise :class:`UserError` for what the Trainer would take but cannot mean here."""
    if options.logger:
        raise UserError(
            "trainer.logger is not used here: metrics.csv is always written, --run.wandb adds Weights & Biases"
        )
    if online and options.accumulate_grad_batches != 1:
        raise UserError("trainer.accumulate_grad_batches is for offline methods: set model.micro_batch_size instead")
    if online and options.max_steps != -1:
        raise UserError("trainer.max_steps is for offline methods: set model.iterations instead")
    for name in ("accumulate_grad_batches", "log_every_n_steps", "check_val_every_n_epoch"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"trainer.{name} is {options[name]}: give at least 1")
    if options.val_check_interval == 0:
        raise UserError("trainer.val_check_interval is 0: give batches, or a share of the epoch above 0")
    for name in ("max_steps", "max_epochs"):
        if options[name] == 0:
            raise UserError(f"trainer.{name} is 0: nothing would be trained, give at least 1")
    check_precision(str(options.precision), online=online)
    if not (isinstance(options.strategy, str) and options.strategy.startswith(STRATEGIES)):
        raise UserError(f"trainer.strategy is {options.strategy}: auto and ddp are supported so far")


def check_precision(precision: str, *, online: bool) -> None:
    """Raise :class:`UserError` for a precision under which training would silently go wrong."""
    if precision.endswith("-true") and precision not in ("32-true", "64-true"):
        raise UserError(
            f"trainer.precision is {precision}, which would round heads and batch weights too: give bf16-mixed, or "
            "model.dtype bfloat16 where float32 weights do not fit"
        )
    if online and precision in ("16", "16-mixed"):
        raise UserError("trainer.precision 16-mixed scales gradients, which online methods limit: give bf16-mixed")


def evaluate(cli: AlignCLI, command: str) -> int:
    """Run the module's evaluation and print what it measured."""
    config = cli.config
    run, resume = run_directory(cli)
    checkpoint = starting_point(run, config.ckpt_path, resume, to_train=False)
    if resume and checkpoint is None:
        raise UserError(f"there is no checkpoint {run.last_checkpoint} (check --run.name and --run.root)")
    if checkpoint is None:
        print(f"evaluating {cli.model.source} as it is; --ckpt_path evaluates a checkpoint of a run", file=sys.stderr)
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
