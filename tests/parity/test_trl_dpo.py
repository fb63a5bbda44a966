"""DPO-7: preference optimisation has TRL's loss, gradients and metrics, but for the differences named here."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lightning_align.data.datamodules import PreferenceDataModule
from lightning_align.losses.preference import LOSSES, Pairs, log_odds_ratio
from lightning_align.methods.dpo import DPOModule

trl = pytest.importorskip("trl", reason="make test-parity installs TRL")
cpo = pytest.importorskip("trl.experimental.cpo", reason="make test-parity installs TRL")
orpo = pytest.importorskip("trl.experimental.orpo", reason="make test-parity installs TRL")

Records = Sequence[Mapping[str, Any]]
PAIRS = [
    {"prompt": "list three animals", "chosen": " cat , dog and bird", "rejected": " rain"},
    {"prompt": "count to nine", "chosen": " one two", "rejected": " nine nine nine nine nine nine"},
    {"prompt": "sort dog cat", "chosen": " cat dog", "rejected": " dog cat"},
    {"prompt": "say it twice : rain", "chosen": " rain rain", "rejected": " rain"},
]
THUMBS = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair, side in zip(PAIRS, ("chosen", "rejected", "rejected", "chosen"), strict=True)
]
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
LOGITS = ("logits/chosen", "logits/rejected")
METRICS = ("loss", "grad_norm", "entropy", *LOGITS, *REWARDS)


@pytest.fixture
def reference(world: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The tiny model as it is stored, which both sides compare with."""
    return AutoModelForCausalLM.from_pretrained(world / "policy").to(dtype)


@pytest.fixture
def network(reference: PreTrainedModel) -> PreTrainedModel:
    """Away from its reference, or every log-ratio would be 0."""
    moved = copy.deepcopy(reference)
    draw = torch.Generator().manual_seed(1)
    for parameter in moved.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter.dtype)
    return moved


@pytest.fixture
def train_both(
    tokenizer: PreTrainedTokenizerFast,
    network: PreTrainedModel,
    write: Callable[[Records], str],
    train_theirs: Callable[..., Any],
    train_ours: Callable[..., Any],
) -> Callable[..., tuple[Any, Any]]:
    """``train_both(classes, records, settings, options, batch_size, accumulate)``: one step of ours and of theirs."""

    def train(
        classes: tuple[Any, Any],
        records: Records,
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
        batch_size: int = 4,
        accumulate: int = 1,
    ) -> tuple[Any, Any]:
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate, "max_steps": 1}
        theirs = train_theirs(classes, network, tokenizer, records, **options, **sizes)
        data = PreferenceDataModule(
            path=write(records), batch_size=batch_size, val_fraction=0.0, shuffle=False, cache_dir=None
        )
        ours = train_ours(
            DPOModule,
            lambda module: module.model,
            network,
            settings,
            data,
            max_steps=1,
            accumulate_grad_batches=accumulate,
        )
        return ours, theirs

    return train


def with_reference(trainer: Any, config: Any, reference: PreTrainedModel) -> tuple[Any, Any]:
    """TRL's classes, comparing with this network."""
    return partial(trainer, ref_model=copy.deepcopy(reference)), config


# ---------------------------------------------------------------------- with a reference
# TRL's log-probs are float32 whatever the model, so that rewards of a large β are not comparable to 1e-6
SHARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"loss_type": "sigmoid"}, {"loss_type": ["sigmoid"]}),
    "hinge": ({"loss_type": "hinge", "beta": 0.1}, {"loss_type": ["hinge"]}),
    "ipo": ({"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "sigmoid_norm": ({"loss_type": "sigmoid_norm", "beta": 0.1}, {"loss_type": ["sigmoid_norm"]}),
    "mixed": (
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.7, 0.2], "rpo_alpha": 0.3},
        {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.7, 0.2, 0.3]},
    ),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2)], ids=["whole", "accumulated"])
def test_dpo_7_one_step_has_the_same_loss_gradients_and_metrics(
    dtype: torch.dtype,
    reference: PreTrainedModel,
    train_both: Callable[..., Any],
    agree: Callable[..., None],
    name: str,
    batch_size: int,
    accumulate: int,
) -> None:
    if name == "mixed" and accumulate > 1:
        pytest.skip("TRL takes the mean of the micro-batches' means over tokens, we the mean over the step's tokens")
    settings, options = SHARED[name]
    classes = with_reference(trl.DPOTrainer, trl.DPOConfig, reference)
    ours, theirs = train_both(classes, PAIRS, settings, options, batch_size, accumulate)
    agree(f"{name}, gradients", ours.gradients[0], theirs.gradients[0], dtype)
    found, expected = ours.rows[0], theirs.rows[0]
    metrics = [*METRICS, "rewards/accuracies"]
    if accumulate > 1:  # TRL averages the micro-batches' means over tokens
        metrics = [name for name in metrics if name not in ("entropy", *LOGITS)]
    else:
        metrics.append("mean_token_accuracy")
    agree(f"{name}, metrics", {n: found[n] for n in metrics}, {n: expected[n] for n in metrics}, dtype)
    assert found["num_tokens"] == expected["num_tokens"]
    assert expected.keys() <= found.keys(), "every name that TRL logs"


def test_smoothed_labels_are_conservative_dpo_here_and_ignored_there(
    dtype: torch.dtype, reference: PreTrainedModel, train_both: Callable[..., Any], agree: Callable[..., None]
) -> None:
    classes = with_reference(trl.DPOTrainer, trl.DPOConfig, reference)
    options = {"loss_type": ["sigmoid"], "label_smoothing": 0.1}
    plain, theirs = train_both(classes, PAIRS, {}, options)
    agree("their smoothed loss is not", plain.rows[0]["loss"], theirs.rows[0]["loss"], dtype)
    smoothed, _ = train_both(classes, PAIRS, {"label_smoothing": 0.1}, options)
    expected = plain.rows[0]["loss"] + 0.1 * plain.rows[0]["rewards/margins"]
    agree("smoothed loss", smoothed.rows[0]["loss"], expected, dtype)


# ---------------------------------------------------------------------- single answers
def test_dpo_7_kto_has_the_same_loss_gradients_and_metrics(
    dtype: torch.dtype, reference: PreTrainedModel, train_both: Callable[..., Any], agree: Callable[..., None]
) -> None:
    """In one batch: TRL estimates the KL on each micro-batch of each process, we on the optimiser step."""
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.9, "beta": 0.1}
    classes = with_reference(trl.KTOTrainer, trl.KTOConfig, reference)
    ours, theirs = train_both(classes, THUMBS, {"loss_type": "kto", **weights}, weights)
    found, expected = ours.rows[0], theirs.rows[0]
    agree("gradients", ours.gradients[0], theirs.gradients[0], dtype)
    metrics = (*METRICS, "kl")
    agree("metrics", {n: found[n] for n in metrics}, {n: expected[n] for n in metrics}, dtype)
    assert expected.keys() <= found.keys(), "every name that TRL logs"


# ---------------------------------------------------------------------- without a reference
@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_dpo_7_cpo_and_simpo_have_the_same_loss_gradients_and_metrics(
    dtype: torch.dtype, train_both: Callable[..., Any], agree: Callable[..., None], name: str
) -> None:
    settings = {"loss_type": name, "beta": 0.4, "label_smoothing": 0.1}
    options = {"loss_type": "sigmoid", "cpo_alpha": 0.7} if name == "cpo" else {"loss_type": "simpo", "cpo_alpha": 0.0}
    settings |= {"cpo_alpha": 0.7} if name == "cpo" else {"simpo_gamma": 0.3}
    options |= {"beta": 0.4, "label_smoothing": 0.1} | ({} if name == "cpo" else {"simpo_gamma": 0.3})
    ours, theirs = train_both((cpo.CPOTrainer, cpo.CPOConfig), PAIRS, settings, options)
    agree(f"{name}, gradients", ours.gradients[0], theirs.gradients[0], dtype)
    found, expected = ours.rows[0], theirs.rows[0]
    metrics = ["loss", "grad_norm", "rewards/accuracies", *REWARDS, *(["nll_loss"] if name == "cpo" else [])]
    agree(f"{name}, metrics", {n: found[n] for n in metrics}, {n: expected[n] for n in metrics}, dtype)
    assert expected.keys() - (set() if name == "cpo" else {"nll_loss"}) <= found.keys()


def test_dpo_7_orpo_differs_in_the_tokens_of_its_likelihood_only(
    train_both: Callable[..., Any], agree: Callable[..., None], dtype: torch.dtype
) -> None:
    """TRL's likelihood term is of prompt and answer, the paper's of the answer."""
    ours, theirs = train_both(
        (orpo.ORPOTrainer, orpo.ORPOConfig), PAIRS, {"loss_type": "orpo", "beta": 0.2}, {"beta": 0.2}
    )
    found, expected = ours.rows[0], theirs.rows[0]
    metrics = ("rewards/accuracies", *REWARDS, "log_odds_ratio", "log_odds_chosen")
    # they compute the odds in float32
    agree("metrics", {n: found[n] for n in metrics}, {n: expected[n] for n in metrics}, torch.float32)
    agree("odds term", found["loss"] - found["nll_loss"], expected["loss"] - expected["nll_loss"], torch.float32)
    assert expected.keys() <= found.keys(), "every name that TRL logs"


# ---------------------------------------------------------------------- their functions on random tensors
def test_dpo_7_odds_and_cpo_are_their_functions() -> None:
    draw = torch.Generator().manual_seed(0)
    chosen, rejected = (-5 * torch.rand(9, generator=draw) - 1e-3 for _ in range(2))
    one = torch.ones(9)
    pairs = Pairs(chosen, rejected, one, one)
    here = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    losses, *_, odds = orpo.ORPOTrainer.odds_ratio_loss(here, chosen, rejected)
    torch.testing.assert_close(LOSSES["orpo"](pairs, beta=0.3), -losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_odds_ratio(pairs).mean(), odds, rtol=1e-5, atol=1e-6)
    for name, kind, options in (("cpo", "sigmoid", {}), ("simpo", "simpo", {"simpo_gamma": 0.6})):
        here = SimpleNamespace(
            **{"alpha": 0.0, "beta": 0.3, "loss_type": kind, "simpo_gamma": 0.6, "label_smoothing": 0.1},
            accelerator=SimpleNamespace(device="cpu"),
        )
        losses, _, _ = cpo.CPOTrainer.cpo_loss(here, chosen, rejected)
        values = LOSSES[name](pairs, beta=0.3, label_smoothing=0.1, **options)
        torch.testing.assert_close(values, losses, rtol=1e-6, atol=1e-6)
