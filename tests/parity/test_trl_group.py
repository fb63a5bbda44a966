"""GRP-9: losses of groups are TRL's in value, gradient and metrics, and so are advantages, but for what is named here.

* CISPO: TRL's ``epsilon_high`` is the cap itself, here it is what exceeds 1 (as in the paper): converted.
* Completions whose mask is empty count in TRL's mean over sequences; here they leave both sums.
* A group with one scored completion has no standard deviation in TRL; here it is 0, and counts as such.
* TRL scores in float32, so advantages are compared to 1e-5.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lightning_align.losses.group import ADVANTAGES, PRESETS, group_policy_loss, reduction_count

trl = pytest.importorskip("trl", reason="make test-parity installs TRL")

LENGTH = 9  # max_completion_length
Batch = dict[str, Tensor]
# our settings, and TRL's where they are not the same
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"preset": "grpo"}, {"loss_type": "grpo", "beta": 0.04}),
    "grpo_without_kl": ({"preset": "grpo", "beta": 0.0}, {"loss_type": "grpo"}),
    "grpo_two_sided": ({"preset": "grpo", "delta": 1.5}, {"loss_type": "grpo", "beta": 0.04, "delta": 1.5}),
    "dr_grpo": ({"preset": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "dapo": ({"preset": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo_with_kl": ({"preset": "dapo", "beta": 0.3}, {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.3}),
    "cispo": ({"preset": "cispo"}, {"loss_type": "cispo", "epsilon_high": 1.28}),
    "gspo": ({"preset": "gspo"}, {"loss_type": "grpo", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "level": "sequence"}),
    "gspo_wide": (
        {"preset": "gspo", "epsilon": 0.1, "epsilon_high": 0.2, "reduction": "token", "beta": 0.1},
        {"loss_type": "dapo", "epsilon_low": 0.1, "epsilon_high": 0.2, "level": "sequence", "beta": 0.1},
    ),
}


def draw_batch(dtype: torch.dtype, seed: int = 0, rows: int = 6, length: int = 7) -> Batch:
    """Log-probs of three policies away from each other, advantages, and weights of an engine's mismatch."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    old = -normal(rows, length).abs() * 2
    tensors = {
        "logp": old + 0.3 * normal(rows, length),
        "old_logp": old,
        "ref_logp": old + 0.5 * normal(rows, length),
        "importance_weights": normal(rows, length).exp().clamp(max=2),
        "advantages": normal(rows),
    }
    mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=generator)
    return {**{name: values.to(dtype) for name, values in tensors.items()}, "mask": mask}


def trainer_of(batch: Batch, *, accumulate: int = 1, weighted: bool = False, **options: Any) -> SimpleNamespace:
    """What TRL's losses ask of their trainer: settings, one process, and the log-probs of its model."""
    one_process = SimpleNamespace(
        num_processes=1, reduce=lambda values, reduction: values, gather=lambda values: values
    )
    return SimpleNamespace(
        loss_type=options.get("loss_type"),
        importance_sampling_level=options.get("level", "token"),
        epsilon_low=options.get("epsilon_low", 0.2),
        epsilon_high=options.get("epsilon_high", 0.2),
        beta=options.get("beta", 0.0),
        args=SimpleNamespace(delta=options.get("delta"), use_bias_correction_kl=False, steps_per_generation=accumulate),
        max_completion_length=LENGTH,
        use_vllm=weighted,
        vllm_importance_sampling_correction=weighted,
        current_gradient_accumulation_steps=accumulate,
        model=SimpleNamespace(training=True),
        accelerator=one_process,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["logp"], torch.zeros_like(batch["logp"]), None),
        **{"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None},
        **{"_entropy_bonus_enabled": False, "aux_loss_enabled": False},
    )


def their_loss(trainer_class: Any, batch: Batch, tokens: Tensor, **options: Any) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss and the metrics that it logs; ``tokens`` of all micro-batches."""
    here, mask = trainer_of(batch, **options), batch["mask"].to(batch["logp"].dtype)
    inputs = {
        **{name: torch.zeros(len(mask), 1, dtype=torch.long) for name in ("prompt_ids", "prompt_mask")},
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logp"],
        "old_logps": (batch["old_logp"] * mask).sum(1),
        "ref_per_token_logps": batch["ref_logp"],
        "importance_sampling_ratio": batch["importance_weights"],
        "num_items_in_batch": tokens,
    }
    loss = trainer_class._compute_loss(here, None, inputs)
    return loss, {name: values[-1] for name, values in here._metrics["train"].items() if name != "entropy"}


def our_loss(
    batch: Batch, preset: str, *, weighted: bool = False, normaliser: Tensor | None = None, **changes: Any
) -> tuple[Tensor, dict[str, float]]:
    """The loss by a preset, with changes, and its metrics."""
    settings = PRESETS[preset]
    options = {name: getattr(settings, name) for name in ("ratio", "loss", "reduction", "epsilon", "epsilon_high")}
    options |= {"beta": settings.beta if settings.kl == "loss" else 0.0} | changes
    loss, metrics = group_policy_loss(
        *(batch[name] for name in ("logp", "old_logp", "advantages", "mask")),
        ref_logp=batch["ref_logp"] if options["beta"] else None,
        importance_weights=batch["importance_weights"] if weighted else None,
        max_completion_length=LENGTH,
        normaliser=normaliser,
        **options,
    )
    return loss, {name: float(a / b) for name, (a, b) in metrics.items()}


def with_gradient(batch: Batch) -> Batch:
    """The same, with a leaf to differentiate."""
    return {**batch, "logp": batch["logp"].clone().requires_grad_()}


def chosen(metrics: Mapping[str, float], names: Mapping[str, float]) -> dict[str, float]:
    """Some of them."""
    return {name: metrics[name] for name in names}


# ---------------------------------------------------------------------- losses
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("name", PAIRS)
def test_grp_9_same_loss_gradient_and_metrics(
    dtype: torch.dtype, agree: Callable[..., None], name: str, weighted: bool
) -> None:
    settings, options = PAIRS[name]
    seen: set[str] = set()
    for seed in range(5):
        here, there = (with_gradient(draw_batch(dtype, seed)) for _ in range(2))
        ours, found = our_loss(here, weighted=weighted, **settings)
        theirs, expected = their_loss(trl.GRPOTrainer, there, here["mask"].sum(), weighted=weighted, **options)
        agree(f"{name}, loss", ours.detach(), theirs.detach(), dtype)
        gradients = [torch.autograd.grad(loss, batch["logp"])[0] for loss, batch in ((ours, here), (theirs, there))]
        agree(f"{name}, gradient", *gradients, dtype)
        # shares are counted in float32 on both sides
        agree(f"{name}, metrics", chosen(found, expected), expected, torch.float32)
        seen |= {metric for metric, value in expected.items() if value > 0}
    assert any("clip_ratio" in metric for metric in seen), "something was clipped"


@pytest.mark.parametrize("name", PAIRS)
def test_grp_9_two_micro_batches(dtype: torch.dtype, agree: Callable[..., None], name: str) -> None:
    settings, options = PAIRS[name]
    batch = draw_batch(dtype, 1)
    changed = {"reduction": settings["reduction"]} if "reduction" in settings else {}
    reduction = changed.get("reduction", PRESETS[settings["preset"]].reduction)
    count = reduction_count(batch["mask"], reduction)
    for rows in (slice(0, 3), slice(3, 6)):
        here, there = (with_gradient({key: values[rows] for key, values in batch.items()}) for _ in range(2))
        ours, _ = our_loss(here, normaliser=count, **settings)
        theirs, _ = their_loss(trl.GRPOTrainer, there, batch["mask"].sum(), accumulate=2, **options)
        agree(f"{name}, loss of a micro-batch", ours.detach(), theirs.detach(), dtype)
        gradients = [torch.autograd.grad(loss, part["logp"])[0] for loss, part in ((ours, here), (theirs, there))]
        agree(f"{name}, its gradient", *gradients, dtype)


def test_grp_9_rloo(dtype: torch.dtype, agree: Callable[..., None]) -> None:
    for seed in range(5):
        here, there = (with_gradient(draw_batch(dtype, seed)) for _ in range(2))
        ours, found = our_loss(here, "rloo")
        theirs, expected = their_loss(trl.RLOOTrainer, there, here["mask"].sum())
        agree("loss", ours.detach(), theirs.detach(), dtype)
        gradients = [torch.autograd.grad(loss, batch["logp"])[0] for loss, batch in ((ours, here), (theirs, there))]
        agree("gradient", *gradients, dtype)
        agree("metrics", chosen(found, expected), expected, torch.float32)
        assert found["clip_ratio/region_mean"] > 0


def test_cispo_caps_at_one_plus_epsilon_high(dtype: torch.dtype) -> None:
    """Without the conversion there is a difference."""
    batch = draw_batch(dtype)
    theirs, _ = their_loss(trl.GRPOTrainer, batch, batch["mask"].sum(), loss_type="cispo", epsilon_high=0.28)
    assert abs(theirs - our_loss(batch, "cispo")[0]) > 1e-3


def test_completions_without_tokens_leave_the_mean(dtype: torch.dtype, agree: Callable[..., None]) -> None:
    batch = draw_batch(dtype)
    batch["mask"][2] = False
    for name, trainer in (("grpo", trl.GRPOTrainer), ("rloo", trl.RLOOTrainer)):
        if name == "rloo":  # whose loss of no tokens is −A there
            batch["advantages"][2] = 0
        options = PAIRS["grpo"][1] if name == "grpo" else {}
        theirs, _ = their_loss(trainer, batch, batch["mask"].sum(), **options)
        agree(name, our_loss(batch, name)[0], theirs * 6 / 5, dtype)


# ---------------------------------------------------------------------- advantages
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.25, None, -0.5, 0.4, 0.5, 0.5, 0.5, 0.5]  # three prompts, four completions of each
ALONE = [1.0, None, None, None, *REWARDS[4:]]


@pytest.fixture
def their_advantages(
    world: Path, tokenizer: PreTrainedTokenizerFast, make_theirs: Callable[..., Any]
) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """``their_advantages(trainer_class, config_class, rewards, **options)``: of one step, and what it logs."""

    def run(
        trainer_class: Any, config_class: Any, rewards: list[Any], **options: Any
    ) -> tuple[Tensor, dict[str, float]]:
        trainer = make_theirs(
            (partial(trainer_class, reward_funcs=lambda **_: rewards), config_class),
            AutoModelForCausalLM.from_pretrained(world / "policy"),
            tokenizer,
            [{"prompt": prompt} for prompt in ("list three animals", "count to nine", "sort dog cat")],
            **{"per_device_train_batch_size": 12, "num_generations": 4, "max_completion_length": 3, "max_steps": 1},
            **{"shuffle_dataset": False, "beta": 0.0},
            **options,
        )
        trainer.train()
        # before they are shuffled
        return torch.tensor(trainer._logs["advantages"]), trainer.state.log_history[0]

    return run


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("grpo", {"scale_rewards": "group"}),
        ("dr_grpo", {"scale_rewards": "none"}),
        ("batch_std", {"scale_rewards": "batch"}),
        ("rloo", {}),
    ],
)
@pytest.mark.parametrize("rewards", [REWARDS, ALONE], ids=["some", "alone"])
def test_grp_9_same_advantages(
    their_advantages: Callable[..., Any],
    agree: Callable[..., None],
    kind: str,
    options: dict[str, Any],
    rewards: list[Any],
) -> None:
    classes = (trl.RLOOTrainer, trl.RLOOConfig) if kind == "rloo" else (trl.GRPOTrainer, trl.GRPOConfig)
    expected, logged = their_advantages(*classes, rewards, **options)
    scores = torch.tensor([math.nan if reward is None else reward for reward in rewards])
    found, std = ADVANTAGES[kind](scores, torch.arange(3).repeat_interleave(4))
    agree(kind, found, expected, torch.float32)
    zero = float((std == 0).float().mean())
    if kind == "batch_std":  # theirs is of the batch's deviation
        assert logged["frac_reward_zero_std"] == 0
    else:
        undefined = 1 / 3 if rewards is ALONE else 0.0
        agree("frac_reward_zero_std", zero - undefined, logged["frac_reward_zero_std"], torch.float32)
