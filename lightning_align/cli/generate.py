"""``generate``: completions of a prompt, of a file of prompts, or a conversation in the terminal."""

import random
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError

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
            num_samples=options.num_samples,
            greedy=options.greedy,
            stop_strings=tuple(options.stop_strings),
        )
        self.tokenizer = load_tokenizer(options.model)
        model = load_causal_lm(options.model, tokenizer=self.tokenizer, dtype=options.dtype).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.engine = build_engine(options.engine, model, self.tokenizer, max_batch=options.rollout_batch_size)
        self.next_seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**31)

    def complete(self, prompts: list[Any]) -> list[dict[str, Any]]:
        """One row per completion: ``prompt``, ``completion``, ``finish_reason``."""
        from lightning_align.data.encode import encode_prompt

        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        unknown = self.tokenizer.unk_token_id
        if unknown not in (None, self.tokenizer.eos_token_id) and any(unknown in row for row in ids):
            strange = sum(unknown in row for row in ids)
            warnings.warn(f"{strange} of {len(ids)} prompts have words that the tokenizer does not know", stacklevel=2)
        count = len(prompts) * self.params.num_samples
        seeds = range(self.next_seed, self.next_seed + count)
        self.next_seed += count
        records = [{"prompt": prompt} for prompt in prompts]
        rollout = self.engine.generate(ids, self.params, seeds=seeds, records=records)
        rows = zip(rollout.records, rollout.completions, rollout.finish_reason, strict=True)
        return [
            {"prompt": record["prompt"], "completion": text, "finish_reason": reason} for record, text, reason in rows
        ]


def write(sampler: Sampler, options: Namespace) -> None:
    """Complete the prompt or the file's prompts."""
    from lightning_align.data.writers import write_records

    prompts = list(_prompts(options))
    rows = []
    for start in range(0, len(prompts), BATCH):
        for row in sampler.complete(prompts[start : start + BATCH]):
            if options.out is not None:
                rows.append(row)
            elif options.prompt is not None:
                print(row["completion"])
            else:
                print(f"{_last(row['prompt'])}\n  → {row['completion']}")
    if options.out is not None:
        write_records(rows, options.out, overwrite=options.overwrite)
        print(f"wrote {len(rows):,} completions to {options.out}")


def _prompts(options: Namespace) -> Iterator[Any]:
    if options.prompt is not None:
        found: list[Any] = [options.prompt]
    elif options.file.suffix == ".txt":
        found = [line for line in options.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        from lightning_align.data.readers import load_records

        found = [record["prompt"] for record in load_records(str(options.file), "prompt")[0]]
    for prompt in found:
        yield [{"role": "user", "content": prompt}] if options.chat and isinstance(prompt, str) else prompt


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
        rows = sampler.complete([list(messages) if chat else text])
        for row in rows:
            print(row["completion"])
        messages.append({"role": "assistant", "content": rows[0]["completion"]})
        sys.stdout.flush()
