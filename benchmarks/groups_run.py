"""Model, prompts and runs of both sides of ``benchmarks.groups``, and the check that they do the same."""

import argparse
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.rollout_cases import end_with_probability
from benchmarks.sides import OURS, THEIRS, Run, run_fit, run_trl
from benchmarks.training_cases import llama_config, single_tokens, source_pairs, tokenizer_of
from lightning_align.models.export import save_model

PROMPTS, GROUP, NEW_TOKENS = 4, 8, 64  # prompts an iteration, completions of each, tokens of each
ROWS = PROMPTS * GROUP
NEVER = 1e-9  # probability that a token ends a completion
REWARD = "share_of_vowels"
TOLERANCE = 0.01  # relative, of a mean over the first iteration's samples, which are others on the two sides
DEVIATIONS = 5  # standard errors that the mean rewards of two samples may be apart
Case = tuple[str, int]  # method, tokens of a prompt


@dataclass(frozen=True)
class GroupMethod:
    """A method on both sides: what beside the common options says the same.

    Args:
        settings: Of our module.
        options: Of TRL's configuration, whose name begins with that of the method.
    """

    settings: Mapping[str, Any]
    options: Mapping[str, Any]


METHODS = {
    "GRPO": GroupMethod({"preset": "grpo", "beta": 0.04}, {"loss_type": "grpo", "beta": 0.04}),
    "RLOO": GroupMethod({"preset": "rloo", "beta": 0.05}, {"beta": 0.05}),
}


@dataclass(frozen=True)
class GroupWorld:
    """Folder with the model ``policy`` and prompts of each length."""

    folder: Path
    parameters: int

    @property
    def policy(self) -> Path:
        """The model."""
        return self.folder / "policy"

    def prompts(self, tokens: int) -> Path:
        """JSON Lines."""
        return self.folder / f"prompts-{tokens}.jsonl"


def build_world(
    folder: Path, *, lengths: list[int], size: int, vocabulary: int, hidden: int, layers: int
) -> GroupWorld:
    """A random Llama that never ends a completion, and prompts of random words of one token each."""
    pairs, _ = source_pairs(size)
    tokenizer = tokenizer_of(pairs, vocabulary)
    # with smaller weights every token would be as likely as any other
    config = llama_config(tokenizer, hidden=hidden, layers=layers, initializer_range=0.1)
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    words, draw = list(single_tokens(tokenizer)), random.Random(1)
    for tokens in lengths:
        texts = ["".join(draw.choices(words, k=tokens)) for _ in range(16 * PROMPTS)]
        found = {len(tokenizer(text)["input_ids"]) for text in texts}
        assert found == {tokens}, "words that are one token alone must be so in a row"
        path = GroupWorld(folder, 0).prompts(tokens)
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    assert tokenizer.eos_token_id is not None
    end_with_probability(policy, tokenizer.eos_token_id, NEVER, [tokenizer(text)["input_ids"] for text in texts])
    save_model(policy, tokenizer, folder / "policy")
    return GroupWorld(folder, policy.num_parameters())


# ---------------------------------------------------------------------- runs
def run_ours(world: GroupWorld, case: Case, options: argparse.Namespace, folder: Path) -> Run:
    """``fit`` with a configuration file."""
    name, tokens = case
    model = {
        **{"model": str(world.policy), "reward": f"benchmarks.groups_reward.{REWARD}", "iterations": options.steps},
        **{"samples_per_prompt": GROUP, "max_new_tokens": NEW_TOKENS, "eval_every": 0, **METHODS[name].settings},
    }
    data = {"path": str(world.prompts(tokens)), "batch_size": PROMPTS}
    return run_fit(
        {"class_path": "GRPOModule", "init_args": model},
        {"class_path": "PromptDataModule", "init_args": data},
        {},
        folder,
        options.threads,
    )


def run_theirs(world: GroupWorld, case: Case, options: argparse.Namespace, folder: Path) -> Run:
    """A script with TRL's trainer."""
    name, tokens = case
    settings = {
        **{"trainer": f"{name}Trainer", "config": f"{name}Config", "model": str(world.policy)},
        **{"data": str(world.prompts(tokens)), "functions": {"reward_funcs": f"benchmarks.groups_reward:{REWARD}"}},
    }
    batches = {
        **{"per_device_train_batch_size": ROWS, "num_generations": GROUP, "max_completion_length": NEW_TOKENS},
        **{"shuffle_dataset": False, **METHODS[name].options},
    }
    return run_trl(settings, batches, folder, options)


SIDES = {OURS: run_ours, THEIRS: run_theirs}


def check_same(case: Case, ours: Run, theirs: Run) -> None:
    """Stop the benchmark where the two sides do something else.

    Samples are others on the two sides, so of the first iteration means are compared: the entropy of a token says that
    model, prompts and temperature are the same, the reward that texts are read alike. Completions are as long as
    allowed in every iteration, and TRL's count of tokens says that its prompts and samples are as many as they are to.
    """
    first, their_first = ours.logged[0], theirs.logged[0]
    error = math.hypot(first["reward_std"], their_first["reward_std"]) / math.sqrt(ROWS)
    rules = (("entropy", TOLERANCE * their_first["entropy"]), ("reward", DEVIATIONS * error))
    for metric, allowed in rules:
        our, their = first[metric], their_first[metric]
        if not abs(our - their) <= allowed:
            _refuse(case, f"{metric} of the first iteration is {our:.6g} here and {their:.6g} in TRL")
    for name, run in ((OURS, ours), (THEIRS, theirs)):
        for row in run.logged:
            if row["completions/mean_length"] != NEW_TOKENS:
                _refuse(case, f"completions of {name} have {row['completions/mean_length']:g} tokens, not {NEW_TOKENS}")
    wanted = len(theirs.logged) * ROWS * (case[1] + NEW_TOKENS)
    if len(ours.logged) != len(theirs.logged) or theirs.logged[-1]["num_tokens"] != wanted:
        _refuse(
            case,
            f"{len(ours.logged)} iterations here; in TRL {len(theirs.logged)} of "
            f"{theirs.logged[-1]['num_tokens']:,.0f} tokens instead of {wanted:,}",
        )


def _refuse(case: Case, why: str) -> None:
    raise SystemExit(f"{case[0]}, prompt of {case[1]}: {why}: the two do something else, and nothing is reported")
