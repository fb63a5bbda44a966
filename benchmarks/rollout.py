"""Sampling against transformers' ``generate``: ``python -m benchmarks.rollout``.

Two workloads with one random Llama of 6.8 M parameters and 8,192 tokens, in float32 on a fixed number of CPU threads:

* fixed length: 32 prompt tokens, 64 new ones, nothing ends early. It measures a decoding step.
* what PPO does: prompts of 4 to 48 tokens, 4 samples of each, completions that end at EOS after a geometric number of
  tokens (most within 40, at most 96), with the log-prob of every sampled token.

Nothing is timed before greedy tokens are found identical and log-probs equal to a float64 forward. Variants take turns.
Tables go to the terminal, ``rollout.csv``, ``rollout.json`` and ``rollout.png`` to ``benchmarks/results/<device>/``.
"""

import argparse
import json
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast, logging

from benchmarks.common import Timing, interleave, machine, result_folder, speedup, write_csv
from benchmarks.rollout_cases import (
    SAMPLES,
    Prompts,
    Reference,
    build_policy,
    build_tokenizer,
    check_agreement,
    random_prompts,
    real_tokens,
    unequal_prompts,
)
from benchmarks.rollout_figure import draw
from lightning_align.rollout import Rollout, SamplingParams, StaticCacheEngine
from lightning_align.rollout.decoder import DecoderPlan
from lightning_align.rollout.projection import Projection

BATCHES, PROMPT_TOKENS, NEW_TOKENS = (4, 8, 32, 128), 32, 64
PROMPTS, LONGEST, ENDING = 64, 96, 1 / 32
ROWS = 128  # most rows of one batch in the second workload, for both sides
GREEDY, OUR_GREEDY = "generate, greedy", "ours, greedy"
SAMPLED, WITH_LOGP = "generate, sampling", "generate, sampling + log-probs"
OURS, LINEAR = "ours, sampling + log-probs", "our linear layers alone"
FORWARD, KEPT = "generate + forward pass", "generate that keeps its logits"
FULL, NO_REFILL, NOT_SHARED = "ours", "ours, no waiting prompts enter", "ours, prompt prefilled per sample"
Result = dict[str, Timing]


def fixed_length(batch: int, tokenizer: PreTrainedTokenizerFast, rounds: int) -> Result:
    """Completions of one length; work is counted in new tokens."""
    model = build_policy(1e-9)
    reference, engine = Reference(model, NEW_TOKENS), StaticCacheEngine(model, tokenizer)
    prompts = random_prompts([PROMPT_TOKENS] * batch, seed=batch)
    print(f"batch {batch}:", check_agreement(model, engine, prompts, NEW_TOKENS), flush=True)
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS)
    greedy = SamplingParams(max_new_tokens=NEW_TOKENS, greedy=True)
    products = _linear_products(engine._decoder.plan, model.config, batch)
    return interleave(
        {
            GREEDY: lambda _: _tokens(reference.greedy(prompts)),
            OUR_GREEDY: lambda _: _sampled(engine.generate(prompts, greedy, seeds=range(batch))),
            SAMPLED: lambda seed: _tokens(reference.sample(prompts, seed)),
            WITH_LOGP: lambda seed: _tokens(reference.sample_with_logits(prompts, seed)[0]),
            OURS: lambda seed: _sampled(engine.generate(prompts, sampling, seeds=_seeds(seed, batch))),
            LINEAR: lambda _: batch * _multiply(products, NEW_TOKENS),
        },
        rounds,
    )


def ppo_rollout(num_prompts: int, tokenizer: PreTrainedTokenizerFast, rounds: int) -> tuple[Result, list[int]]:
    """Unequal prompts and completions; work is counted in completion tokens. Also gives the lengths of completions."""
    model = build_policy(ENDING)
    reference, engine = Reference(model, LONGEST), StaticCacheEngine(model, tokenizer, ROWS)
    prompts, count = unequal_prompts(num_prompts), num_prompts * SAMPLES
    print("unequal lengths:", check_agreement(model, engine, prompts, LONGEST), flush=True)
    shared = SamplingParams(max_new_tokens=LONGEST, num_samples=SAMPLES)
    single = SamplingParams(max_new_tokens=LONGEST)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    calls = [prompts[first : first + ROWS // SAMPLES] for first in range(0, num_prompts, ROWS // SAMPLES)]
    lengths = engine.generate(prompts, shared, seeds=_seeds(0, count)).completion_lengths.tolist()

    def in_calls(sample: Callable[[Prompts, int], int]) -> Callable[[int], int]:
        return lambda seed: sum(sample(call, 1000 * seed + number) for number, call in enumerate(calls))

    def ours(given: Prompts, params: SamplingParams) -> Callable[[int], int]:
        return lambda seed: _sampled(engine.generate(given, params, seeds=_seeds(seed, count)))

    timings = interleave(
        {
            FORWARD: in_calls(lambda call, seed: _tokens(reference.sample_with_forward(call, seed, SAMPLES)[0])),
            KEPT: in_calls(lambda call, seed: _tokens(reference.sample_with_logits(call, seed, SAMPLES)[0])),
            FULL: ours(prompts, shared),
            NO_REFILL: in_calls(
                lambda call, seed: _sampled(engine.generate(call, shared, seeds=_seeds(seed, len(call) * SAMPLES)))
            ),
            NOT_SHARED: ours(repeated, single),
        },
        rounds,
    )
    return timings, lengths


def _seeds(number: int, count: int) -> range:
    return range(number * count, (number + 1) * count)


def _tokens(completions: Tensor) -> int:
    return int(real_tokens(completions).sum())


def _sampled(rollout: Rollout) -> int:
    return int(rollout.completion_mask.sum())


def _linear_products(plan: DecoderPlan, config: LlamaConfig, rows: int) -> list[tuple[Projection, Tensor]]:
    """The projections of one decoding step in their order, each with an input."""
    products = []
    for layer in plan.layers:
        products += [(projection, config.hidden_size) for projection in (layer.qkv, layer.out, layer.up)]
        products.append((layer.down, config.intermediate_size))
    products.append((plan.head, config.hidden_size))
    return [(projection, torch.randn(rows, width)) for projection, width in products]


@torch.no_grad()
def _multiply(products: list[tuple[Projection, Tensor]], steps: int) -> int:
    for _ in range(steps):
        for projection, x in products:
            projection(x)
    return steps


# ---------------------------------------------------------------------- report
def fixed_table(results: dict[int, Result]) -> Table:
    """Tokens a second and how many times as fast ours is."""
    lengths = f"{PROMPT_TOKENS} prompt + {NEW_TOKENS} new tokens"
    table = Table(title=f"Fixed length, {lengths}: tokens / s (half of the 10–90 % range), × by wall (CPU) time")
    for heading in ("batch", *next(iter(results.values()))):
        table.add_column(heading, justify="right")
    for heading in ("greedy ×", "sampling × without log-probs", "sampling × with log-probs", "linear layers' share"):
        table.add_column(heading, justify="right", style="bold")
    for batch, timings in results.items():
        ratios = [_ratio(timings[ours], timings[theirs]) for ours, theirs in _PAIRS]
        share = timings[OURS].rate / timings[LINEAR].rate
        table.add_row(str(batch), *map(_rate, timings.values()), *ratios, f"{share:.0%}")
    return table


_PAIRS = ((OUR_GREEDY, GREEDY), (OURS, SAMPLED), (OURS, WITH_LOGP))


def ppo_table(timings: Result, lengths: list[int], num_prompts: int) -> Table:
    """Tokens a second and how many times as fast as ``generate`` with its forward pass."""
    quantiles = torch.tensor(lengths).float().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    table = Table(
        "variant", "tokens / s", "wall s", "CPU s", "× wall (CPU)",
        title=f"PPO's rollout: {num_prompts} prompts × {SAMPLES} samples with log-probs, completions of "
        + "/".join(f"{length:.0f}" for length in quantiles) + " tokens (10/50/90 %)",
    )  # fmt: skip
    for name, timing in timings.items():
        numbers = timing.summary()
        seconds = (f"{numbers['wall_seconds']:.2f}", f"{numbers['cpu_seconds']:.2f}")
        table.add_row(name, _rate(timing), *seconds, _ratio(timing, timings[FORWARD]))
    return table


def _rate(timing: Timing) -> str:
    low, high = timing.spread
    return f"{timing.rate:,.0f} ± {(high - low) / 2 / timing.rate:.0%}"


def _ratio(ours: Timing, theirs: Timing) -> str:
    return f"{speedup(ours, theirs):.2f} ({speedup(ours, theirs, 'cpu'):.2f})"


def write_results(fixed: dict[int, Result], ppo: Result, lengths: list[int], options: argparse.Namespace) -> None:
    """CSV, JSON and the picture."""
    about = machine()
    folder = result_folder()
    cells = [("fixed", batch, name, timing) for batch, timings in fixed.items() for name, timing in timings.items()]
    cells += [("ppo", ROWS, name, timing) for name, timing in ppo.items()]
    shown = {name: about[name] for name in ("processor", "cpu_cores", "torch_threads", "git_commit")}
    shown |= {name: about["versions"][name] for name in ("torch", "transformers", "lightning_align")}
    rows = [
        {"workload": workload, "batch": batch, "variant": name} | timing.summary() | shown
        for workload, batch, name, timing in cells
    ]
    write_csv(folder / "rollout.csv", rows)
    raw = [
        {"workload": workload, "batch": batch, "variant": name} | vars(timing)
        for workload, batch, name, timing in cells
    ]
    result = {"settings": vars(options), "machine": about, "completion_lengths": lengths, "runs": raw}
    (folder / "rollout.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(fixed, ppo, folder / "rollout.png")
    print(f"wrote rollout.csv, rollout.json and rollout.png to {folder}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds, two batch sizes, half of the prompts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    rounds, batches, num_prompts = (2, (4, 32), 32) if options.quick else (options.rounds, BATCHES, PROMPTS)
    tokenizer = build_tokenizer()
    console = Console(width=160)
    fixed = {batch: fixed_length(batch, tokenizer, rounds) for batch in batches}
    console.print(fixed_table(fixed))
    ppo, lengths = ppo_rollout(num_prompts, tokenizer, rounds)
    console.print(ppo_table(ppo, lengths, num_prompts))
    write_results(fixed, ppo, lengths, options)


if __name__ == "__main__":
    main()
