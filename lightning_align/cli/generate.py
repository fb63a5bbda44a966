"""``generate``: completions of a prompt, of a file of prompts, or a conversation in the terminal."""

import random
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError

if TYPE_CHECKING:
    from lightning_align.cli.generate_best import BestOf

BATCH = 64  # prompts of a file that are sampled together


def main(argv: list[str]) -> int:
    """Sample from a model; printed, or written to a file with ``--out``."""
    options = _parser().parse_args(argv)
    if options.prompt is not None and options.file is not None:
        raise UserError("--prompt and --file exclude each other")
    if options.temperature == 0:
        raise UserError("--temperature is 0: give one above 0, or --greedy for the likeliest token")
    if options.rollout_batch_size < 1:
        raise UserError(f"--rollout_batch_size is {options.rollout_batch_size}: give at least 1")
    _check_best_of(options)
    if options.file is not None and not options.file.is_file():
        raise UserError(f"file {options.file} does not exist (--file)")
    if options.out is not None:
        from lightning_align.data.writers import check_target

        if options.prompt is None and options.file is None:
            raise UserError("--out needs --prompt or --file: a conversation is not written")
        check_target(options.out, overwrite=options.overwrite)
    sampler = Sampler(options)
    if options.prompt is None and options.file is None:
        converse(sampler)
    else:
        write(sampler, options)
    return 0


def _check_best_of(options: Namespace) -> None:
    """Raise :class:`UserError` for options that do not go with a choice, or without one."""
    if options.best_of is None:
        if options.reward is not None:
            raise UserError("--reward chooses among completions: give --best-of too, how many are drawn of each prompt")
        return
    if options.best_of < 2:
        raise UserError(f"--best-of is {options.best_of}: give at least 2, there is nothing to choose from fewer")
    if options.reward is None:
        raise UserError("--best-of needs --reward, what scores: a run, path, hub id, function or playground")
    if options.num_samples != 1:
        raise UserError("--best-of gives one completion of each prompt: leave --num_samples out")
    if options.greedy:
        raise UserError("--greedy makes all completions of a prompt equal: leave it or --best-of out")


def _parser() -> OptionParser:
    parser = OptionParser("generate", "Sample from a run, a local path or a hub id; without a prompt, a conversation.")
    parser.add_argument("model", help="run directory, local path or hub id")
    parser.add_argument("--prompt", help="one prompt")
    parser.add_argument("--file", type=Path, help="prompts: any file of prompt records, or one prompt a line (.txt)")
    parser.add_argument("--out", type=Path, help="write records here instead of printing (.jsonl, .csv, .parquet)")
    parser.add_argument("--overwrite", action="store_true", help="replace the --out file if there is one")
    parser.add_argument(
        "--chat", action="store_true", help="treat the prompt as a user's message and apply the chat template"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--min_p", type=float, default=0.0)
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--best-of", type=int, metavar="N", help="draw N samples of each prompt, keep the best")
    parser.add_argument(
        "--reward",
        help="what --best-of chooses by: a run, path, hub id, function, playground, YAML of a composition",
    )
    parser.add_argument("--greedy", action="store_true", help="the likeliest token instead of a drawn one")
    parser.add_argument("--stop_strings", nargs="*", default=[], help="texts that end a completion")
    parser.add_argument("--engine", choices=("auto", "static", "generate"), default="auto")
    parser.add_argument("--rollout_batch_size", type=int, default=128, help="most completions decoded at a time")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, help="for the same completions again (default: a new one each time)")
    return parser


class Sampler:
    """A loaded model and how to draw from it."""

    def __init__(self, options: Namespace) -> None:
        import torch

        from lightning_align.models.loading import load_causal_lm, load_tokenizer
        from lightning_align.rollout.engine import build_engine
        from lightning_align.rollout.types import SamplingParams

        self.params = SamplingParams(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            num_samples=options.best_of or options.num_samples,
            greedy=options.greedy,
            stop_strings=tuple(options.stop_strings),
        )
        self.tokenizer = load_tokenizer(options.model)
        model = load_causal_lm(options.model, tokenizer=self.tokenizer, dtype=options.dtype).eval()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)
        self.engine = build_engine(options.engine, model, self.tokenizer, max_batch=options.rollout_batch_size)
        self.best_of: BestOf | None = None
        if options.best_of is not None:
            from lightning_align.cli import generate_best

            self.best_of = generate_best.BestOf(options.best_of, options.reward, device)
        self.next_seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**31)

    def complete(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One row per completion: ``prompt``, ``completion``, ``finish_reason``, and of the best of several its scores.

        Args:
            records: With ``prompt``, and further columns that a reward may read.
        """
        from lightning_align.data.encode import encode_prompt

        ids = [encode_prompt(self.tokenizer, record["prompt"]) for record in records]
        unknown = self.tokenizer.unk_token_id
        if unknown not in (None, self.tokenizer.eos_token_id) and any(unknown in row for row in ids):
            strange = sum(unknown in row for row in ids)
            warnings.warn(f"{strange} of {len(ids)} prompts have words that the tokenizer does not know", stacklevel=2)
        count = len(records) * self.params.num_samples
        seeds = range(self.next_seed, self.next_seed + count)
        self.next_seed += count
        rollout = self.engine.generate(ids, self.params, seeds=seeds, records=records)
        drawn = zip(rollout.records, rollout.completions, rollout.finish_reason, strict=True)
        rows = [
            {"prompt": record["prompt"], "completion": text, "finish_reason": reason} for record, text, reason in drawn
        ]
        if self.best_of is None:
            return rows
        return [rows[index] | scores for index, scores in self.best_of.choose(rollout).items()]


def write(sampler: Sampler, options: Namespace) -> None:
    """Complete the prompt or the file's prompts."""
    from lightning_align.data.writers import write_records

    records = list(_records(options))
    rows = []
    for start in range(0, len(records), BATCH):
        for row in sampler.complete(records[start : start + BATCH]):
            if options.out is not None:
                rows.append(row)
                continue
            print(
                row["completion"] if options.prompt is not None else f"{_last(row['prompt'])}\n  → {row['completion']}"
            )
            if "score" in row:
                print(f"  score {row['score']:.4g}, mean of {row['n']} {row['mean_score']:.4g}")
    if sampler.best_of is not None:
        sampler.best_of.report()
    if options.out is not None:
        write_records(rows, options.out, overwrite=options.overwrite)
        print(f"wrote {len(rows):,} completions to {options.out}")


def _records(options: Namespace) -> Iterator[dict[str, Any]]:
    if options.prompt is not None:
        found: list[dict[str, Any]] = [{"prompt": options.prompt}]
    elif options.file.suffix == ".txt":
        lines = options.file.read_text(encoding="utf-8").splitlines()
        found = [{"prompt": line} for line in lines if line.strip()]
    else:
        from lightning_align.data.readers import load_records

        found = load_records(str(options.file), "prompt")[0]
    for record in found:
        prompt = record["prompt"]
        chat = options.chat and isinstance(prompt, str)
        yield {**record, "prompt": [{"role": "user", "content": prompt}]} if chat else record


def _last(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def converse(sampler: Sampler) -> None:
    """A conversation: with a chat template the model sees all of it, without one each line is a prompt of its own."""
    chat = sampler.tokenizer.chat_template is not None
    print(
        "an empty line or Ctrl-D ends the conversation"
        + ("" if chat else " (no chat template: each line stands alone)")
    )
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            break
        if not text.strip():
            break
        messages.append({"role": "user", "content": text})
        rows = sampler.complete([{"prompt": list(messages) if chat else text}])
        for row in rows:
            print(row["completion"])
        messages.append({"role": "assistant", "content": rows[0]["completion"]})
        sys.stdout.flush()
