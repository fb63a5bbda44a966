"""What the kernels change in ``fit``: ``python -m benchmarks.kernels_in_fit``.

The command line trains the same models twice, each in a process of its own: with the kernels, and with
``ALIGN_KERNELS=reference``, which is plain PyTorch on the logits of all tokens.

* Memory: SFT and PPO steps of a small Llama with the vocabulary of Llama 3, 128,256 tokens. Peak resident memory.
* Curves: SFT and PPO from one small model with 8,192 tokens on the playground. The largest difference of what they log,
  relative to the metric's own size; for PPO up to the first iteration in which another token is sampled (rounding moves
  the probabilities, and sooner or later one past the random number), whose number is reported.

Results go to the terminal and to ``benchmarks/results/<device>/kernels_in_fit.json``.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import machine, result_folder
from lightning_align.models.export import save_model
from lightning_align.models.tokenizer_training import train_tokenizer
from lightning_align.playground import records

LARGE, SMALL, WORDS = 128_256, 8_192, 512
ON, OFF = "kernels", "plain PyTorch"
# beginnings of the names of metrics that no two runs share: times, and what is itself a measure of rounding
OWN = ("time/", "eps", "perf/", "epoch", "sampling/")
SAMPLED = ("completions/mean_length", "lab/proxy")  # the playground scores words: equal for equal samples
METHODS: dict[str, Mapping[str, Any]] = {
    "SFT": {
        "model.class_path": "SFTModule",
        "data.class_path": "SFTDataModule",
        "data.init_args.batch_size": 16,
    },
    "PPO": {
        "model.class_path": "PPOModule",
        "model.init_args.reward": "playground",
        "model.init_args.max_new_tokens": 24,
        "model.init_args.micro_batch_size": 16,
        "model.init_args.eval_every": 0,
        "data.class_path": "PromptDataModule",
        "data.init_args.batch_size": 16,
    },
}


def build(folder: Path, vocabulary: int) -> Path:
    """A random Llama whose output layer has ``vocabulary`` tokens, of which the playground uses a few hundred."""
    texts = [record["text"] for record in records("text", size=2000)]
    tokenizer = train_tokenizer(texts, vocab_size=WORDS, algorithm="words")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = folder / f"model{vocabulary}"
    save_model(LlamaForCausalLM(config), tokenizer, path)
    return path


def fit(folder: Path, method: str, kernels: str, model: Path, steps: int) -> tuple[Path, float, float]:
    """Train with the command line; the run directory, peak resident memory in MiB and seconds."""
    name = f"{method}-{model.name}-{'on' if kernels == ON else 'off'}"
    length = {"model.init_args.iterations": steps} if method == "PPO" else {"trainer.max_steps": steps}
    settings = {
        **METHODS[method],
        **length,
        "model.init_args.model": model,
        "model.init_args.learning_rate": 1e-4,
        "data.init_args.path": "playground",
        "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": 1,
        "run.root": folder,
        "run.name": name,
        "run.wandb": "disabled",
        "seed_everything": 0,
    }
    words = [f"--{key}={value}" for key, value in settings.items()]
    environment = os.environ | {"ALIGN_KERNELS": "auto" if kernels == ON else "reference"}
    started = time.perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_align", "fit", *words], env=environment, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit((folder / f"{name}.log").read_text())
    return folder / name, usage.ru_maxrss / 1024, time.perf_counter() - started


def curves(run: Path) -> list[dict[str, float]]:
    """Rows of a run's metrics that another run of the same configuration must have too."""
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [
            {name: float(value) for name, value in row.items() if value and not name.startswith(OWN)}
            for row in csv.DictReader(file)
        ]


def same_samples(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> int:
    """How many rows come before the first whose samples differ; all where nothing is sampled."""
    for index, (row, twin) in enumerate(zip(one, other, strict=True)):
        if any(row.get(name) != twin.get(name) for name in SAMPLED):
            return index
    return len(one)


def largest_difference(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By metric, the largest difference in a row, relative to the metric's largest value."""
    size: dict[str, float] = {}
    difference: dict[str, float] = {}
    for row, twin in zip(one, other, strict=True):
        for name, value in row.items():
            size[name] = max(size.get(name, 0.0), abs(value))
            difference[name] = max(difference.get(name, 0.0), abs(value - twin[name]))
    return {name: value / size[name] if size[name] else value for name, value in difference.items()}


def main() -> None:
    """Print the tables and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_in_fit", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="steps or iterations whose memory is measured")
    parser.add_argument("--curve_steps", type=int, default=20)
    options = parser.parse_args()
    table = Table("method", "vocabulary", "", "peak memory MiB", "seconds", title="kernels in fit")
    memory: list[dict[str, Any]] = []
    differences: dict[str, dict[str, float]] = {}
    same: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large, small = build(folder, LARGE), build(folder, SMALL)
        for method in METHODS:
            for kernels in (OFF, ON):
                _, peak, seconds = fit(folder, method, kernels, large, options.steps)
                memory.append({"method": method, "variant": kernels, "peak_mib": peak, "seconds": seconds})
                table.add_row(method, f"{LARGE:,}", kernels, f"{peak:,.0f}", f"{seconds:.1f}")
            off, on = (curves(fit(folder, method, how, small, options.curve_steps)[0]) for how in (OFF, ON))
            same[method] = same_samples(off, on)
            differences[method] = largest_difference(off[: same[method]], on[: same[method]])
    Console().print(table)
    for method, by_metric in differences.items():
        worst = max(by_metric, key=lambda metric: by_metric[metric])
        print(
            f"{method}: the first {same[method]} of {options.curve_steps} steps with and without kernels have the same "
            f"samples and differ by at most {by_metric[worst]:.1e} of a metric's size ({worst})"
        )
    result = {
        "settings": vars(options),
        "machine": machine(),
        "memory": memory,
        "same_samples": same,
        "differences": differences,
    }
    path = result_folder() / "kernels_in_fit.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
