"""SFT-5: noise on embeddings is bounded by the length of the document, seen in training only, and gone afterwards."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_align.models.neftune import document_lengths, embedding_noise

Make = Callable[..., PreTrainedModel]
ALPHA, WIDTH = 5.0, 32
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, -1], [-1, -1, 0, 0, 0, 0]])  # packed, and padded on the left
LENGTHS = torch.tensor([[3, 3, 3, 2, 2, 0], [0, 0, 4, 4, 4, 4]])
IDS = torch.arange(3, 15).view(2, 6)


def noise(model: PreTrainedModel, repeats: int = 200) -> Tensor:
    """What is added, ``[repeats, B, T, H]``."""
    embedding = model.get_input_embeddings()
    clean = embedding(IDS)
    with embedding_noise(model, ALPHA, DOCUMENTS), torch.no_grad():
        return torch.stack([embedding(IDS) - clean for _ in range(repeats)])


def test_lengths_of_documents() -> None:
    assert torch.equal(document_lengths(DOCUMENTS), LENGTHS)


def test_sft_5_noise_is_uniform_within_its_bound(make: Make) -> None:
    torch.manual_seed(0)
    drawn = noise(make("llama").train())
    for length in (2, 3, 4):
        values, bound = drawn[:, length == LENGTHS], ALPHA / math.sqrt(length * WIDTH)
        assert 0.99 * bound < float(values.abs().max()) <= bound + 1e-6
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(float(values.mean())) < 0.02 * bound
    assert not drawn[:, LENGTHS == 0].any()


def test_sft_5_evaluation_has_none_and_the_embedding_is_restored(make: Make) -> None:
    model = make("gpt2")
    assert not noise(model.eval(), 2).any()
    embedding = model.train().get_input_embeddings()
    assert noise(model, 2).any()
    clean = embedding(IDS)
    assert torch.equal(clean, embedding(IDS))
    assert not embedding._forward_hooks


def test_another_batch_than_the_one_meant_is_left_alone(make: Make) -> None:
    """A model is tried on tokens of our own, on the way."""
    model = make("llama").train()
    embedding = model.get_input_embeddings()
    with embedding_noise(model, ALPHA, DOCUMENTS):
        assert torch.equal(embedding(IDS[:, :4]), embedding(IDS[:, :4]))


def test_sft_5_the_loss_of_a_training_step_has_noise(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(model: Any) -> set[float]:
        with embedding_noise(model, ALPHA, torch.zeros_like(IDS)), torch.no_grad():
            return {float(model(input_ids=IDS, labels=IDS).loss) for _ in range(3)}

    assert len(losses(make("llama").train())) == 3
    assert len(losses(make("llama").eval())) == 1
