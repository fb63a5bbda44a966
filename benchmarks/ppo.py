"""Where the time of a PPO iteration goes: ``python -m benchmarks.ppo``.

A Llama of 7 M parameters with 8,192 tokens answers prompts of one length with completions of one length (nothing ends
early), is scored by a reward model of the same size and trained for four inner epochs, through the same ``PPOModule``
and Trainer as ``fit``. Time is measured around the phases; the share of Python comes from one profiled iteration, as
what no tensor operation accounts for (an upper bound: the profiler's own work is in it).
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.common import machine, result_folder
from lightning_align.data.datamodules import PromptDataModule
from lightning_align.methods.ppo import PPOModule
from lightning_align.models.export import save_model
from lightning_align.models.tokenizer_training import train_tokenizer
from lightning_align.rollout.types import Experience, Rollout

VOCABULARY = 8192
PHASES = (
    "rollout",
    "scoring",
    "forward: old, reference, values",
    "forward: learning",
    "backward",
    "optimiser",
    "other",
)


class Clock:
    """Seconds by phase; a phase inside another is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what happens inside to ``name``."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now


class TimedPPO(PPOModule):
    """PPO with a clock around its phases, and a profiler in the last iteration."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clock = Clock()
        self.rows: list[dict[str, float]] = []
        self.python_share = float("nan")

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One timed iteration."""
        self.clock.seconds.clear()
        optimizer: Any = self.optimizers()
        step, optimizer.step = optimizer.step, self._timed("optimiser", optimizer.step)
        started, cpu = time.perf_counter(), time.process_time()
        last = self.iteration == self.iterations - 1
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if last else None
        with self.clock.phase("other"):
            if profile is None:
                super().training_step(batch, batch_idx)
            else:
                with profile:
                    super().training_step(batch, batch_idx)
        wall = time.perf_counter() - started
        optimizer.step = step
        if profile is None:
            self.rows.append({**self.clock.seconds, "total": wall, "cpu": time.process_time() - cpu})
        else:
            operations = sum(event.self_cpu_time_total for event in profile.key_averages()) / 1e6
            self.python_share = max(0.0, 1 - operations / wall)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.clock.phase(name):
                return function(*args, **kwargs)

        return timed

    def draw(self, *args: Any) -> Rollout:
        """Sampling."""
        with self.clock.phase("rollout"):
            return super().draw(*args)

    def scores(self, *args: Any) -> Any:
        """Reward model."""
        with self.clock.phase("scoring"):
            return super().scores(*args)

    def stats(self, *args: Any, **kwargs: Any) -> Any:
        """Log-probs of policy and reference."""
        with self.clock.phase(PHASES[2]):
            return super().stats(*args, **kwargs)

    def values(self, rollout: Rollout) -> Tensor:
        """Value model."""
        with self.clock.phase(PHASES[2]):
            return super().values(rollout)

    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> Any:
        """Forward pass with gradient."""
        with self.clock.phase("forward: learning"):
            return super().minibatch_loss(experience, normaliser)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward pass."""
        with self.clock.phase("backward"):
            super().manual_backward(loss, *args, **kwargs)


def build(folder: Path, options: argparse.Namespace) -> None:
    """Policy, reward model and prompts on disk."""
    words = [f"w{index}" for index in range(VOCABULARY - 16)]
    tokenizer = train_tokenizer([" ".join(words)], vocab_size=VOCABULARY, algorithm="words")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    nn.init.zeros_(policy.model.embed_tokens.weight[tokenizer.eos_token_id])
    save_model(policy, tokenizer, folder / "policy")
    save_model(LlamaForSequenceClassification(config), tokenizer, folder / "reward")
    generator = torch.Generator().manual_seed(1)
    with (folder / "prompts.jsonl").open("w") as file:
        for row in torch.randint(len(words), (4 * options.prompts, options.prompt_tokens), generator=generator):
            file.write(json.dumps({"prompt": " ".join(words[index] for index in row)}) + "\n")


def run(folder: Path, options: argparse.Namespace) -> TimedPPO:
    """Train; returns the module with its timings."""
    L.seed_everything(0, verbose=False)
    module = TimedPPO(
        model=str(folder / "policy"),
        reward=str(folder / "reward"),
        iterations=options.iterations + 2,  # the first warms up, the last is profiled
        max_new_tokens=options.new_tokens,
        num_mini_batches=4,
        eval_every=0,
    )
    data = PromptDataModule(path=str(folder / "prompts.jsonl"), batch_size=options.prompts, val_fraction=0.0)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    return module


def main() -> None:
    """Print the table and write it to ``benchmarks/results/<device>/ppo.json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        build(Path(name), options)
        module = run(Path(name), options)
    rows = module.rows[1:]
    total = median(row["total"] for row in rows)
    table = Table("phase", "median s", "share", title=f"PPO iteration: {total:.2f} s, {options.threads} thread(s)")
    shares = {}
    for phase in PHASES:
        seconds = median(row.get(phase, 0.0) for row in rows)
        shares[phase] = seconds / total
        table.add_row(phase, f"{seconds:.3f}", f"{seconds / total:.1%}")
    table.add_row("of all: Python at most", "", f"{module.python_share:.1%}", style="dim")
    Console().print(table)
    result = {
        "settings": vars(options),
        "machine": machine(),
        "seconds": total,
        "cpu_seconds": median(row["cpu"] for row in rows),
        "shares": shares,
        "python_share_at_most": module.python_share,
        "iterations": rows,
    }
    path = result_folder() / "ppo.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
