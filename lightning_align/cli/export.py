"""``export``: a checkpoint of a run in Hugging Face format."""

from pathlib import Path
from typing import Literal

from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError
from lightning_align.run.directory import CHECKPOINTS, CONFIG_FILE, LAST, is_run


def main(argv: list[str]) -> int:
    """Write ``--out`` from a checkpoint; the run's configuration says which module it belongs to."""
    parser = OptionParser("export", "Write a checkpoint of a run in Hugging Face format.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint file, or a run directory for its last checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (must not exist)")
    parser.add_argument(
        "--lora",
        choices=["merged", "adapter"],
        help="of a run with adapters: the model with them merged, or the adapter alone (default: as the run's own)",
    )
    options = parser.parse_args(argv)
    checkpoint = options.checkpoint / CHECKPOINTS / LAST if is_run(options.checkpoint) else options.checkpoint
    run = checkpoint.parent.parent
    if not is_run(run):
        raise UserError(f"{options.checkpoint} is neither a run directory nor a checkpoint in one")
    if options.out.exists():
        raise UserError(f"{options.out} exists: give another --out")
    export_checkpoint(run, checkpoint, options.out, options.lora)
    print(f"wrote {options.out}")
    return 0


def export_checkpoint(run: Path, checkpoint: Path, out: Path, lora: Literal["merged", "adapter"] | None = None) -> None:
    """Start the run's module from the checkpoint exactly as resuming does, and export instead of training."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    from lightning_align.cli.build import build, import_methods
    from lightning_align.cli.fit import quiet, run_trainer
    from lightning_align.cli.plan import PlanOnly
    from lightning_align.run.checkpoints import check_checkpoint

    class ExportInstead(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            """The weights have just been restored."""
            cli.model.export(out)
            raise PlanOnly

    check_checkpoint(checkpoint, to_train=False)
    quiet()
    import_methods()
    cli = build("export", ["--config", str(run / CONFIG_FILE)])
    if lora is not None:
        cli.model.choose_export(lora)
    # one process wherever it runs, whatever the run was made with
    here = {"accelerator": "auto", "devices": 1, "strategy": "auto", "num_nodes": 1}
    trainer = cli.build_trainer(
        [ExportInstead()], logger=False, enable_progress_bar=False, enable_checkpointing=False, **here
    )
    try:
        run_trainer("fit", trainer, cli, checkpoint)
    except PlanOnly:
        return
