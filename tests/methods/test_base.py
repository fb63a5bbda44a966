"""What all methods share: the optimiser's groups, the schedule, the gradient norm, and parameters fit to train."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_align.errors import UserError
from lightning_align.methods.base import check_trainable, decay_groups
from lightning_align.methods.sft import SFTModule


@pytest.fixture
def network() -> LlamaForCausalLM:
    config = LlamaConfig(
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "attention_bias": True},
    )
    return LlamaForCausalLM(config)


def test_weight_decay_reaches_matrices_of_linear_layers_only(network: LlamaForCausalLM) -> None:
    groups = decay_groups(network, 1e-3, 0.1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert decayed | plain == set(names.values())
    assert all(name.endswith("weight") and ("proj" in name or "lm_head" in name) for name in decayed)
    assert {name for name in plain if "norm" in name or "embed" in name or name.endswith("bias")} == plain


def test_tied_embeddings_are_not_decayed() -> None:
    config = LlamaConfig(vocab_size=40, hidden_size=16, num_attention_heads=2, tie_word_embeddings=True)
    network = LlamaForCausalLM(config)
    decayed = {id(parameter) for parameter in decay_groups(network, 1e-3, 0.1)[0]["params"]}
    assert id(network.get_output_embeddings().weight) not in decayed


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 0.5), (100.0, 5.0), (0.0, 5.0)])
def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_returned(limit: float, expected: float) -> None:
    module = SFTModule.__new__(SFTModule)
    nn.Module.__init__(module)
    module.max_grad_norm = limit
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(module.clip_gradients_([parameter])) == pytest.approx(5.0)
    assert float(parameter.grad.norm()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, 0.8682, 0.55, 0.2318]),  # 0.1 + 0.9 · ½(1 + cos π k/4)
    ],
)
def test_learning_rate_warms_up_then_follows_its_shape(schedule: Any, expected: list[float]) -> None:
    module = SFTModule.__new__(SFTModule)
    nn.Module.__init__(module)
    module.model = nn.Linear(2, 2)
    module.learning_rate, module.weight_decay = 1.0, 0.0
    module.optimizer_name, module.betas, module.adam_epsilon = "adamw", (0.9, 0.999), 1e-8
    module.lr_scheduler_type, module.warmup_ratio, module.min_lr_ratio = schedule, 2 / 6, 0.1
    module.total_steps = lambda: 6  # type: ignore[method-assign]
    built = module.configure_optimizers()
    scheduler = built["lr_scheduler"]["scheduler"]
    rates = []
    for _ in expected:
        rates.append(scheduler.get_last_lr()[0])
        built["optimizer"].step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-4)


def test_parameters_too_narrow_to_train_are_refused_or_warned_of(network: LlamaForCausalLM) -> None:
    check_trainable(network)
    with pytest.warns(UserWarning, match="rounded away"):
        check_trainable(network.bfloat16())
    with pytest.raises(UserError, match="float16"):
        check_trainable(network.half())
