"""Reward and value models: where they read, what they store, how they come back."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lightning_align.errors import UserError
from lightning_align.models.export import save_model
from lightning_align.models.heads import RewardModel, ValueModel
from lightning_align.models.loading import load_causal_lm
from lightning_align.models.tokenizer_training import train_tokenizer

Pad = Callable[..., tuple[Tensor, Tensor, Tensor]]
Make = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([" ".join(f"w{index}" for index in range(30))], vocab_size=41, algorithm="words")


@pytest.fixture
def policy(make: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> str:
    """A saved language model."""
    save_model(make("llama"), tokenizer, tmp_path / "policy")
    return str(tmp_path / "policy")


@pytest.fixture
def reward(policy: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> str:
    """A saved reward model on its trunk, with a normalisation."""
    torch.manual_seed(2)
    model = RewardModel.from_backbone(policy, tokenizer=tokenizer)
    model.set_normalisation(torch.tensor([1.0, 2.0, 6.0]))
    save_model(model.network, tokenizer, tmp_path / "reward")
    return str(tmp_path / "reward")


# ---------------------------------------------------------------------- rewards
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 5])
def test_rm_1_scores_do_not_depend_on_padding_or_batch(
    any_classifier: PreTrainedModel, sequences: list[list[int]], pad: Pad, side: str, extra: int
) -> None:
    model = RewardModel(any_classifier)
    ids, real, _ = pad(sequences, side, extra)
    with torch.no_grad():
        together = model(ids, real)
        alone = torch.cat([model(*pad([row], "right", 0)[:2]) for row in sequences])
    assert together.shape == (5,)
    assert together.dtype == torch.float32
    assert together.std() > 1e-2
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_rm_1_a_pad_id_inside_the_text_is_a_token(make: Make, pad: Pad) -> None:
    model = RewardModel(make("llama", AutoModelForSequenceClassification, num_labels=1))
    with torch.no_grad():
        ids, real, _ = pad([[3, 4, 5, 0], [3, 4, 5, 6]], "right", 2)
        scores = model(ids, real)
        cut = model(*pad([[3, 4, 5]], "right", 0)[:2])
    assert scores[0] != scores[1]
    assert not torch.isclose(scores[0], cut[0])


def test_rows_of_padding_only_stay_finite(make: Make) -> None:
    model = RewardModel(make("llama", AutoModelForSequenceClassification, num_labels=1))
    scores = model(torch.tensor([[3, 4, 5], [0, 0, 0]]), torch.tensor([[1, 1, 1], [0, 0, 0]]))
    (scores * torch.tensor([1.0, 0.0])).sum().backward()
    assert scores.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_rm_2_normalisation_shifts_and_scales(reward: str) -> None:
    model = RewardModel.from_pretrained(reward)
    assert (model.reward_mean, model.reward_std) == (3.0, pytest.approx((14 / 3) ** 0.5))
    ids = torch.tensor([[9, 10, 11], [12, 13, 14]])
    raw = model(ids, torch.ones_like(ids))
    torch.testing.assert_close(model.normalised_scores(ids, torch.ones_like(ids)), raw - 3.0)
    full = model.normalised_scores(ids, torch.ones_like(ids), "full")
    torch.testing.assert_close(full, (raw - 3.0) / model.reward_std)
    assert torch.equal(model.normalised_scores(ids, torch.ones_like(ids), "none"), raw)


def test_rm_8_normalised_scores_average_zero_and_survive_saving(
    policy: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, sequences: list[list[int]], pad: Pad
) -> None:
    model = RewardModel.from_backbone(policy, tokenizer=tokenizer)
    ids, real, _ = pad([[3 + token % 30 for token in row] for row in sequences], "right", 0)
    with torch.no_grad():
        raw = model(ids, real)
        model.set_normalisation(raw)
        assert abs(float(model.normalised_scores(ids, real).mean())) < 1e-4
        save_model(model.network, tokenizer, tmp_path / "saved")
        again = RewardModel.from_pretrained(str(tmp_path / "saved"))
        assert torch.equal(again.normalised_scores(ids, real), model.normalised_scores(ids, real))
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert plain.config.num_labels == 1
        shift = plain(input_ids=ids, attention_mask=real).logits[:, 0] - again.normalised_scores(ids, real)
    torch.testing.assert_close(shift, torch.full((5,), float(raw.mean())), rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalisation", ["none", "mean", "full", "target"])
def test_rm_8_a_saved_model_remembers_how_its_scores_are_normalised(
    policy: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, normalisation: Any
) -> None:
    model = RewardModel.from_backbone(policy, tokenizer=tokenizer)
    model.set_target(50.0, 10.0)
    model.set_normalisation(torch.tensor([1.0, 2.0, 6.0]), normalisation)
    save_model(model.network, tokenizer, tmp_path / "saved")
    again = RewardModel.from_pretrained(str(tmp_path / "saved"))
    ids = torch.tensor([[9, 10, 11], [12, 13, 14]])
    raw = model(ids, torch.ones_like(ids))
    wanted = {"none": raw, "mean": raw - 3, "full": (raw - 3) / model.reward_std, "target": 10 * raw + 50}
    torch.testing.assert_close(again.normalised_scores(ids, torch.ones_like(ids)), wanted[normalisation])
    values = ValueModel.from_reward(str(tmp_path / "saved"))  # begins where the scores are
    torch.testing.assert_close(values.last_value(ids, torch.ones_like(ids)), wanted[normalisation])


def test_constant_reference_scores_do_not_divide_by_zero(reward: str) -> None:
    model = RewardModel.from_pretrained(reward)
    model.set_normalisation(torch.full((4,), 2.5))
    assert (model.reward_mean, model.reward_std) == (2.5, 1.0)


def test_a_fresh_head_has_the_stated_deviation_and_follows_the_seed(
    make: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save_model(make("llama", hidden_size=512), tokenizer, tmp_path / "wide")
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(RewardModel.from_backbone(str(tmp_path / "wide")).head.weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(heads[0].std()) == pytest.approx(513**-0.5, rel=0.15)


def test_the_head_is_float32_on_a_narrow_trunk(policy: str, tmp_path: Path) -> None:
    model = RewardModel.from_backbone(policy, dtype="bfloat16")
    assert model.head.weight.dtype == torch.float32
    assert next(model.network.base_model.parameters()).dtype == torch.bfloat16
    ids = torch.tensor([[9, 10, 11]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids, torch.ones_like(ids)).dtype == torch.float32
    model.network.save_pretrained(tmp_path / "narrow")
    again = RewardModel.from_pretrained(str(tmp_path / "narrow"), dtype="bfloat16")
    assert again(ids, torch.ones_like(ids)).dtype == torch.float32


def test_a_language_model_is_no_reward_model_and_the_reverse(policy: str, reward: str) -> None:
    with pytest.raises(UserError, match="has no score head"):
        RewardModel.from_pretrained(policy)
    with pytest.raises(UserError, match="is a reward model"):
        load_causal_lm(reward)
    with pytest.raises(UserError, match="is a reward model"):
        ValueModel.from_policy(reward)
    with pytest.raises(UserError, match="has no score head"):
        ValueModel.from_reward(policy)


def test_an_architecture_without_classifier_is_refused(
    make: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save_model(make("granite"), tokenizer, tmp_path / "granite")
    with pytest.raises(UserError, match="GraniteConfig"):
        RewardModel.from_backbone(str(tmp_path / "granite"))


def test_a_trunk_with_missing_weights_is_refused(reward: str) -> None:
    config = json.loads((Path(reward) / "config.json").read_text())
    (Path(reward) / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    for load in (RewardModel.from_backbone, RewardModel.from_pretrained):
        with pytest.raises(UserError, match=r"layers\.2"):
            load(reward)


# ---------------------------------------------------------------------- values
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 5])
def test_conv_2_values_do_not_depend_on_padding(
    any_model: PreTrainedModel, sequences: list[list[int]], pad: Pad, side: str, extra: int
) -> None:
    model = ValueModel(any_model.get_decoder(), torch.nn.Linear(32, 1, bias=False), shift=0.5)
    ids, real, _ = pad(sequences, side, extra)
    with torch.no_grad():
        values = model(ids, real)
        last = model.last_value(ids, real)
        assert not values[~real].any()
        for row, mine, final in zip(sequences, range(5), last, strict=True):
            alone = torch.tensor([row])
            states = any_model.get_decoder()(input_ids=alone).last_hidden_state[0]
            expected = model.head(states)[:, 0] - 0.5
            ours = values[mine][real[mine]]
            assert ours[0] == 0
            torch.testing.assert_close(ours[1:], expected[:-1], rtol=0, atol=1e-5)
            torch.testing.assert_close(final, expected[-1], rtol=0, atol=1e-5)


def test_a_value_model_from_the_reward_model_agrees_with_its_scores(reward: str) -> None:
    scorer, values = RewardModel.from_pretrained(reward), ValueModel.from_reward(reward)
    ids = torch.tensor([[9, 10, 11, 12]])
    real = torch.ones_like(ids)
    torch.testing.assert_close(values.last_value(ids, real), scorer.normalised_scores(ids, real))
    for end in range(1, 4):
        score = scorer.normalised_scores(ids[:, :end], real[:, :end])
        torch.testing.assert_close(values(ids, real)[:, end], score)
    full = ValueModel.from_reward(reward, normalisation="full")
    torch.testing.assert_close(full.last_value(ids, real), scorer.normalised_scores(ids, real, "full"))
    assert not ValueModel.from_reward(reward, keep_head=False)(ids, real).any()


def test_a_value_model_from_the_policy_starts_at_zero_and_learns(policy: str) -> None:
    model = ValueModel.from_policy(policy)
    ids = torch.tensor([[9, 10, 11, 12]])
    values = model(ids, torch.ones_like(ids))
    assert values.shape == (1, 4)
    assert not values.any()
    (values - 1).square().sum().backward()
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.any()


def test_a_value_models_state_is_complete(reward: str, policy: str) -> None:
    model, other = ValueModel.from_reward(reward), ValueModel.from_policy(policy)
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([[9, 10, 11, 12]])
    assert torch.equal(other(ids, torch.ones_like(ids)), model(ids, torch.ones_like(ids)))


def test_packed_values_equal_values_alone(reward: str, sequences: list[list[int]]) -> None:
    model = ValueModel.from_reward(reward)
    ids = torch.tensor([list(chain.from_iterable(sequences))])
    documents = torch.tensor([[i for i, row in enumerate(sequences) for _ in row]])
    with torch.no_grad():
        packed = model(ids, torch.ones_like(ids), document_ids=documents)
        alone = [model(torch.tensor([row]), torch.ones(1, len(row))) for row in sequences]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-5)
