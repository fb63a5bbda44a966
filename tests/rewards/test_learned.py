"""Learned rewards: text in, normalised scores out, whatever the batch, the tokenizer or the length."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from lightning_align.data.encode import encode_pair
from lightning_align.errors import UserError
from lightning_align.models.export import save_model
from lightning_align.models.heads import RewardModel
from lightning_align.models.tokenizer_training import train_tokenizer
from lightning_align.playground import records
from lightning_align.rewards.base import Prompt
from lightning_align.rewards.build import build_reward
from lightning_align.rewards.learned import LearnedReward

CONTEXT = 48


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, *, head: bool = True) -> str:
    """A random Llama of two layers, with a score head that is normalised by 0.7 and 2 unless it is a language model."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder / "backbone")
        if not head:
            return str(folder / "backbone")
        model = RewardModel.from_backbone(str(folder / "backbone"))
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.set_normalisation(torch.tensor([-1.3, 2.7]))
    save_model(model.network, tokenizer, folder / "reward")
    return str(folder / "reward")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [record["text"] for record in records("text", size=300)]


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    made = records("sft", size=12)
    return [record["prompt"] for record in made], [record["completion"] for record in made]


@pytest.fixture(scope="module", params=["words", "words with bos", "bpe"])
def source(request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model with each kind of tokenizer."""
    algorithm = request.param.split()[0]
    tokenizer = train_tokenizer(texts, vocab_size=500, algorithm=algorithm, bos="bos" in request.param)
    return save(tmp_path_factory.mktemp("reward"), tokenizer)


def scores(
    reward: LearnedReward, prompts: Sequence[Prompt], completions: Sequence[str], finished: bool = True
) -> Tensor:
    count = len(prompts)
    return reward.score(prompts, completions, finished=[finished] * count, records=[{}] * count)


@torch.no_grad()
def reference(reward: LearnedReward, ids: list[int]) -> float:
    """One sequence alone, without padding, by the network itself: raw score minus the mean of the reference set."""
    states = reward.model.network.base_model(input_ids=torch.tensor([ids])).last_hidden_state
    return float(reward.model.head.weight[0] @ states[0, -1]) - 0.7


@pytest.mark.parametrize("finished", [True, False])
def test_scores_are_those_of_each_text_alone(source: str, pairs: tuple[list[str], list[str]], finished: bool) -> None:
    reward = LearnedReward(source)
    assert (reward.model.reward_mean, reward.model.reward_std) == (pytest.approx(0.7), pytest.approx(2.0))
    found = scores(reward, *pairs, finished=finished)
    expected = []
    for prompt, completion in zip(*pairs, strict=True):
        ids = encode_pair(reward.tokenizer, prompt, completion, finished=finished).input_ids
        assert (ids[-1] == reward.tokenizer.eos_token_id) == finished
        expected.append(reference(reward, ids))
    assert found.dtype == torch.float32
    assert found.std() > 1e-2
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)


def test_rm_1_batch_order_and_size_do_not_matter(source: str, pairs: tuple[list[str], list[str]]) -> None:
    prompts, completions = pairs
    whole = scores(LearnedReward(source), prompts, completions)
    order = [7, 3, 11, 0, 5]
    some = scores(
        LearnedReward(source, max_batch_tokens=60), [prompts[i] for i in order], [completions[i] for i in order]
    )
    torch.testing.assert_close(some, whole[order], rtol=0, atol=1e-5)
    tiny = scores(LearnedReward(source, max_batch_tokens=1), prompts, completions)
    torch.testing.assert_close(tiny, whole, rtol=0, atol=1e-5)


def test_finished_and_unfinished_stand_side_by_side(source: str, pairs: tuple[list[str], list[str]]) -> None:
    reward, (prompts, completions) = LearnedReward(source), pairs
    finished = [row % 3 != 0 for row in range(len(prompts))]
    mixed = reward.score(prompts, completions, finished=finished, records=[{}] * len(prompts))
    both = {ended: scores(reward, prompts, completions, finished=ended) for ended in (True, False)}
    expected = torch.stack([both[ended][row] for row, ended in enumerate(finished)])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def test_conversations_take_the_models_own_template(source: str) -> None:
    reward = LearnedReward(source)
    conversation = [{"role": "user", "content": "translate fen ."}]
    ids = encode_pair(reward.tokenizer, conversation, "red .").input_ids
    assert reward.tokenizer.convert_tokens_to_ids("<|assistant|>") in ids
    found = scores(reward, [conversation, "translate fen . answer :"], ["red .", " red ."])
    assert found[0].item() == pytest.approx(reference(reward, ids), abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-4


def test_too_long_texts_lose_their_start_and_are_counted(source: str, caplog: pytest.LogCaptureFixture) -> None:
    reward = LearnedReward(source)
    long_prompt = "how many words are here : " + "cat dog horse bird " * 30 + "? answer :"
    prompts, completions = [long_prompt, "translate fen . answer :", long_prompt], [" two .", " red .", " six ."]
    with caplog.at_level(logging.WARNING):
        found = scores(reward, prompts, completions)
        scores(reward, prompts, completions)
    assert reward.num_truncated == 4
    assert len(caplog.messages) == 1
    assert f"reads {CONTEXT}: the start is cut off" in caplog.messages[0]
    for row in (0, 2):
        ids = encode_pair(reward.tokenizer, prompts[row], completions[row]).input_ids
        start = [reward.tokenizer.bos_token_id] if reward.tokenizer.bos_token_id is not None else []
        kept = start + ids[len(start) - CONTEXT :]
        assert len(kept) == CONTEXT
        assert found[row].item() == pytest.approx(reference(reward, kept), abs=1e-5)
    assert found[0] != found[2]  # what distinguishes them, the completion, was kept


def test_nothing_can_train_it(source: str, pairs: tuple[list[str], list[str]]) -> None:
    reward = LearnedReward(source)
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
    assert not reward.model.training
    assert not scores(reward, *pairs).requires_grad


def test_a_narrow_model_computes_as_it_is_stored_and_scores_in_float32(
    texts: list[str], pairs: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    wide = LearnedReward(save(tmp_path, train_tokenizer(texts, vocab_size=500, algorithm="words")))
    stored = RewardModel.from_pretrained(wide.source, dtype="bfloat16")
    save_model(stored.network, wide.tokenizer, tmp_path / "narrow")
    narrow = LearnedReward(str(tmp_path / "narrow"))
    types = {name: parameter.dtype for name, parameter in narrow.model.network.named_parameters()}
    assert types.pop("score.weight") == torch.float32
    assert set(types.values()) == {torch.bfloat16}
    found, expected = scores(narrow, *pairs), scores(wide, *pairs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert not torch.equal(found, expected)


def test_two_models_with_tokenizers_of_their_own_add_up(texts: list[str], tmp_path: Path) -> None:
    words = save(tmp_path / "words", train_tokenizer(texts, vocab_size=500, algorithm="words"))
    pieces = save(tmp_path / "pieces", train_tokenizer(texts, vocab_size=400, algorithm="bpe"))
    reward = build_reward({"words": words, "pieces": {"source": pieces, "weight": 0.5}})
    made = reward.score(["translate fen . answer :"], [" red ."], finished=[True], records=[{}])
    assert math.isfinite(made.total.item())
    assert made.total.item() == pytest.approx(made.parts["words"].item() + 0.5 * made.parts["pieces"].item())
    assert made.parts["words"] != made.parts["pieces"]


def test_scores_on_other_scales_than_the_models_own(texts: list[str], tmp_path: Path) -> None:
    source = save(tmp_path, train_tokenizer(texts, vocab_size=500, algorithm="words"))
    arguments = ["translate fen . answer :"], [" red ."]
    own = float(scores(LearnedReward(source), *arguments))
    raw = float(scores(LearnedReward(source, normalisation="none"), *arguments))
    assert raw == pytest.approx(own + 0.7)
    assert float(scores(LearnedReward(source, normalisation="full"), *arguments)) == pytest.approx(own / 2.0)


def test_min_of_two_models_is_taken_on_their_own_scales(texts: list[str], tmp_path: Path) -> None:
    parts = {
        name: save(tmp_path / name, train_tokenizer(texts, vocab_size=500 + extra, algorithm="words"))
        for extra, name in enumerate(("a", "b"))
    }
    spec = {"combine": "min", "parts": parts, "standardise": True}
    made = build_reward(spec).score(["translate fen . answer :"], [" red ."], finished=[True], records=[{}])
    alone = [
        float(scores(LearnedReward(source), ["translate fen . answer :"], [" red ."])) for source in parts.values()
    ]
    assert float(made.total) == pytest.approx(min(alone) / 2.0)


def test_a_gate_reads_raw_scores_of_its_models_alone(texts: list[str], tmp_path: Path) -> None:
    source = save(tmp_path, train_tokenizer(texts, vocab_size=500, algorithm="words"))
    parts = {"helpfulness": source, "safety": f"{source}/", "other": f"{source}/."}  # the same model by other names
    arguments = ["translate fen . answer :"], [" red ."]
    made = build_reward({"combine": "gate", "parts": parts}).score(*arguments, finished=[True], records=[{}])
    raw = float(scores(LearnedReward(source, normalisation="none"), *arguments))
    assert [float(made.parts[name]) for name in parts] == pytest.approx([raw, raw, raw - 0.7])


def test_an_ensemble_of_models_says_what_they_disagree_on(texts: list[str], tmp_path: Path) -> None:
    sources = [
        save(tmp_path / name, train_tokenizer(texts, vocab_size=size, algorithm="words"))
        for name, size in (("a", 500), ("b", 400))
    ]
    spec = {"rm": {"source": sources, "combine": "uwo", "uwo_coef": 0.5}}
    made = build_reward(spec).score(["translate fen . answer :"], [" red ."], finished=[True], records=[{}])
    alone = torch.stack([scores(LearnedReward(source), ["translate fen . answer :"], [" red ."]) for source in sources])
    torch.testing.assert_close(made.total, alone.mean(0) - 0.5 * alone.var(0, unbiased=False))
    torch.testing.assert_close(made.spreads["rm"], alone.std(0, unbiased=False))


def test_a_language_model_is_no_reward(texts: list[str], tmp_path: Path) -> None:
    policy = save(tmp_path, train_tokenizer(texts, vocab_size=500, algorithm="words"), head=False)
    with pytest.raises(UserError, match="has no score head: it is a language model, not a reward model"):
        LearnedReward(policy)
    with pytest.raises(UserError) as caught:
        LearnedReward(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
