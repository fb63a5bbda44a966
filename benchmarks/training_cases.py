"""Model, records and methods of ``benchmarks.training``: both sides read the same files."""

import gzip
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from lightning_align.models.export import save_model
from lightning_align.models.tokenizer_training import train_tokenizer

HH = Path(__file__).parents[2] / "shared" / "data" / "hh_harmless.jsonl.gz"
TURN = "\n\nAssistant:"
SIDES = ("chosen", "rejected")
UNEQUAL, EQUAL = "unequal", "equal"
LONGEST = 512  # tokens of a sequence; longer records are left out: the two sides would cut them differently
ROOM = 2048  # what both sides allow, so that neither cuts, KTO's mismatched pairs included
PROMPT_TOKENS, ANSWER_TOKENS = 32, 96  # of equal lengths
Record = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method on both sides.

    Args:
        module: Our class.
        data: Our class for its data.
        trl: Beginning of the names of TRL's trainer and configuration.
        model: ``policy`` or ``reward``.
        settings: Of our module.
        options: Of TRL's configuration.
        same: Metrics of the first step that must be the same: of losses with a reference the loss alone says nothing,
            as it is that of equal models.
    """

    module: str
    data: str
    trl: str
    model: str = "policy"
    settings: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None
    same: tuple[str, ...] = ("loss",)


LOGPS = ("loss", "logps/chosen", "logps/rejected")
METHODS = {
    "SFT": Method("SFTModule", "SFTDataModule", "SFT"),
    "reward": Method("RewardModule", "PreferenceDataModule", "Reward", "reward", same=("loss", "mean_reward")),
    "DPO": Method("DPOModule", "PreferenceDataModule", "DPO", same=LOGPS),
    "KTO": Method("DPOModule", "PreferenceDataModule", "KTO", settings={"loss_type": "kto", "beta": 0.1}, same=LOGPS),
}


# ---------------------------------------------------------------------- records
def real_pairs(limit: int) -> list[Record]:
    """Conversations of hh-rlhf up to the last answer, and the two answers."""
    pairs = []
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            cut = record["chosen"].rfind(TURN) + len(TURN)
            prompt, rejected = record["chosen"][:cut], record["rejected"]
            pair = {"prompt": prompt, "chosen": record["chosen"][cut:], "rejected": rejected[cut:]}
            if rejected.startswith(prompt) and all(pair[side].strip() for side in SIDES):
                pairs.append(pair)
    return pairs[:limit]


def made_up_pairs(limit: int) -> list[Record]:
    """Text without meaning whose lengths are spread as those of conversations are, most short and some very long."""
    draw = random.Random(0)
    words = ["".join(draw.choice("aeiou") + draw.choice("lmnrst") for _ in range(1 + n % 3)) for n in range(1500)]

    def text(median: float) -> str:
        # at most 150 words, of one token or two
        count = min(150, 1 + round(draw.lognormvariate(math.log(median), 0.9)))
        return "".join(" " + words[min(len(words) - 1, int(draw.paretovariate(0.5)))] for _ in range(count))

    return [{"prompt": "Human:" + text(60), "chosen": text(40), "rejected": text(40)} for _ in range(limit)]


def source_pairs(limit: int) -> tuple[list[Record], str]:
    """Pairs of hh-rlhf where it is, else of generated text; and which of the two."""
    if HH.exists():
        return real_pairs(limit), HH.name
    return made_up_pairs(limit), "generated text"


def equal_pairs(tokenizer: PreTrainedTokenizerFast, limit: int) -> list[Record]:
    """Random words: a prompt of 32 tokens and two answers of 96, the one that ends them included."""
    words = list(single_tokens(tokenizer))
    draw = random.Random(1)

    def text(count: int) -> str:
        return "".join(draw.choices(words, k=count))

    answer = ANSWER_TOKENS - 1
    return [{"prompt": text(PROMPT_TOKENS), "chosen": text(answer), "rejected": text(answer)} for _ in range(limit)]


def single_tokens(tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Words with the space before them that are one token each."""
    for token, index in sorted(tokenizer.get_vocab().items()):
        text = str(tokenizer.decode([index]))
        word = token.startswith("Ġ") and text[1:].isascii() and text[1:].isalpha()
        if word and tokenizer(text)["input_ids"] == [index]:
            yield text


def comparable(pairs: Sequence[Record], tokenizer: PreTrainedTokenizerFast) -> list[Record]:
    """Those that both sides make the same tokens of: short enough, none across the end of the prompt."""
    found = []
    for pair in pairs:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        sides = [(prompt + tokenizer(pair[name])["input_ids"], pair["prompt"] + pair[name]) for name in SIDES]
        if all(len(ids) < LONGEST and ids == tokenizer(text)["input_ids"] for ids, text in sides):
            found.append(pair)
    return found


def records_of(method: str, pairs: Sequence[Record]) -> list[Record]:
    """What a method reads, made of pairs; of the answers that KTO reads, every second is a good one."""
    if method == "SFT":
        return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    if method == "KTO":
        return [
            {"prompt": pair["prompt"], "completion": pair[SIDES[index % 2]], "label": index % 2 == 0}
            for index, pair in enumerate(pairs)
        ]
    return list(pairs)


# ---------------------------------------------------------------------- files
@dataclass(frozen=True)
class World:
    """Folder with the models ``policy`` and ``reward``, and records by method and lengths."""

    folder: Path
    source: str
    pairs: Mapping[str, Sequence[Record]]
    tokens: Mapping[str, list[int]]  # of every sequence, by lengths
    parameters: int

    def model(self, name: str) -> Path:
        """``policy`` or ``reward``."""
        return self.folder / name

    def data(self, method: str, lengths: str) -> Path:
        """JSON Lines, written when first asked for."""
        path = self.folder / f"{method}-{lengths}.jsonl"
        if not path.exists():
            rows = records_of(method, self.pairs[lengths])
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path


def tokenizer_of(pairs: Sequence[Record], vocabulary: int) -> PreTrainedTokenizerFast:
    """BPE trained on prompts and answers."""
    texts = (pair["prompt"] + pair[side] for pair in pairs for side in SIDES)
    return train_tokenizer(texts, vocab_size=vocabulary, algorithm="bpe")


def llama_config(tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, **options: Any) -> LlamaConfig:
    """A small Llama with tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=ROOM,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )


def build_world(folder: Path, *, size: int, vocabulary: int, hidden: int, layers: int) -> World:
    """A random Llama, a tokenizer trained on the records, and ``size`` pairs of each kind (fewer if hh has fewer)."""
    pairs, kind = source_pairs(size)
    tokenizer = tokenizer_of(pairs, vocabulary)
    config = llama_config(tokenizer, hidden=hidden, layers=layers)
    config.num_labels = 1
    torch.manual_seed(0)
    for name, auto_class in (("policy", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        network = auto_class.from_config(config)
        save_model(network, tokenizer, folder / name)
    chosen = {UNEQUAL: comparable(pairs, tokenizer), EQUAL: equal_pairs(tokenizer, len(pairs))}
    tokens = {
        lengths: [len(tokenizer(pair["prompt"] + pair[side])["input_ids"]) + 1 for pair in found for side in SIDES]
        for lengths, found in chosen.items()
    }
    assert set(tokens[EQUAL]) == {PROMPT_TOKENS + ANSWER_TOKENS}, "words that are one token alone must be so in a row"
    source = f"{len(chosen[UNEQUAL]):,} of {len(pairs):,} pairs of {kind}"
    return World(folder, source, chosen, tokens, network.num_parameters())
