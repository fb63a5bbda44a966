"""Group advantages, and the policy losses that use them."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_align.losses.advantages import scored_mask
from lightning_align.losses.group import (
    ADVANTAGES,
    PRESETS,
    RATIOS,
    Preset,
    batch_std,
    dr_grpo,
    group_policy_loss,
    grpo,
    overlong_penalty,
    reduction_count,
    reinforce,
    rloo,
    truncated_importance_weights,
)
from lightning_align.losses.masked import REDUCTIONS, Metrics, moments

NAN = math.nan
LENGTH = 9  # L of the constant reduction
EXTREMES = {"clip_ratio/low_min", "clip_ratio/high_max"}  # these do depend on the split
COUNTED_PER_BATCH = {"empty_batches"} | EXTREMES


def draw_rewards(seed: int) -> tuple[Tensor, Tensor]:
    """Rewards of seven groups of one to five rows in any order, some unscored; float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, 2, 3, 4, 5, 5, 2]
    group = torch.cat([torch.full((size,), 7 * number + 3) for number, size in enumerate(sizes)])
    group = group[torch.randperm(len(group), generator=generator)]
    rewards = torch.randn(len(group), dtype=torch.float64, generator=generator) * 3
    return rewards.where(torch.rand(len(group), generator=generator) > 0.15, NAN), group


def draw_batch(seed: int = 0, rows: int = 5, length: int = 7) -> dict[str, Tensor]:
    """Log-probs of three policies, advantages and importance weights; NaN outside the mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    old = -normal(rows, length).abs() * 2
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    tensors = {
        "logp": old + 0.3 * normal(rows, length),
        "old_logp": old,
        "ref_logp": old + 0.5 * normal(rows, length),
        "importance_weights": normal(rows, length).exp().clamp(max=2),
    }
    return {
        **{name: values.where(mask, NAN) for name, values in tensors.items()},
        "advantages": normal(rows),
        "mask": mask,
    }


def options_of(preset: Preset) -> dict[str, Any]:
    """Arguments of the loss."""
    return {
        **{name: getattr(preset, name) for name in ("ratio", "loss", "reduction", "epsilon", "epsilon_high")},
        "beta": preset.beta if preset.kl == "loss" else 0.0,
        "max_completion_length": LENGTH,
    }


# every preset, and what no preset uses
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: options_of(preset) for name, preset in PRESETS.items()},
    "gspo_token": options_of(PRESETS["gspo"]) | {"ratio": "sequence_token", "reduction": "token"},
    "delta": options_of(PRESETS["dapo"]) | {"delta": 1.3, "beta": 0.1},
    "rloo_kl": options_of(PRESETS["rloo"]) | {"delta": 1.5, "beta": 0.3, "reduction": "constant"},
    "cispo_gspo": options_of(PRESETS["cispo"]) | {"ratio": "sequence", "beta": 0.2, "reduction": "sum_sequence"},
}


def loss_of(batch: dict[str, Tensor], *, weighted: bool = True, **options: Any) -> tuple[Tensor, Metrics]:
    weights = batch["importance_weights"] if weighted else None
    tensors = {name: batch[name] for name in ("logp", "old_logp", "advantages", "mask", "ref_logp")}
    return group_policy_loss(**tensors, importance_weights=weights, **options)


def gradient_of(batch: dict[str, Tensor], **options: Any) -> Tensor:
    logp = batch["logp"].clone().requires_grad_()
    return torch.autograd.grad(loss_of({**batch, "logp": logp}, **options)[0], logp)[0]


def token_gradient(advantage: float, ratio: float, **options: Any) -> float:
    """d loss / d logp of a completion of one token."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1)
    loss, _ = group_policy_loss(logp, 0 * one, torch.tensor([advantage], dtype=torch.float64), one, **options)
    return float(torch.autograd.grad(loss, logp)[0])


# ------------------------------------------------------------------ advantages
def loop(rewards: list[float], group: list[int], kind: str) -> tuple[list[float], list[float]]:
    """Advantages and deviations by their definitions."""

    def deviation(values: list[float]) -> float:
        centre = sum(values) / len(values) if values else 0.0
        return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0

    scored = [r for r in rewards if not math.isnan(r)]
    advantages, deviations = [], []
    for i, own in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if group[j] == group[i] and j != i and not math.isnan(r)]
        everyone = others if math.isnan(own) else [own, *others]
        deviations.append(deviation(everyone))
        if math.isnan(own) or (not others and kind != "reinforce"):
            advantages.append(0.0)
            continue
        mean = sum(everyone) / len(everyone)
        advantages.append(
            {
                "reinforce": lambda r=own: r - (sum(scored) - r) / (len(scored) - 1),
                "rloo": lambda r=own, rest=others: r - sum(rest) / len(rest),
                "grpo": lambda r=own, m=mean, s=deviations[-1]: (r - m) / (s + 1e-4),
                "dr_grpo": lambda r=own, m=mean: r - m,
                "batch_std": lambda r=own, m=mean: (r - m) / (deviation(scored) + 1e-4),
            }[kind]()
        )
    return advantages, deviations


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("seed", range(4))
def test_advantages_equal_loops(kind: str, seed: int) -> None:
    rewards, group = draw_rewards(seed)
    expected = loop(rewards.tolist(), group.tolist(), kind)
    for found, wanted in zip(ADVANTAGES[kind](rewards, group), expected, strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    for found, wanted in zip(ADVANTAGES[kind](rewards.float(), group), expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 10_000), shift=st.sampled_from([0.0, -7.5, 1e4]), scale=st.sampled_from([0.5, 8.0]))
@settings(deadline=None, max_examples=40)
def test_grp_1_sums_ratios_and_invariances(seed: int, shift: float, scale: float) -> None:
    rewards, group = draw_rewards(seed)
    same = (group[:, None] == group[None]).double()
    count = same @ (~rewards.isnan()).double()
    for advantage in (rloo, grpo, dr_grpo, batch_std):
        values, std = advantage(rewards, group)
        assert (same @ values).abs().max() < 1e-9
        assert not values[rewards.isnan() | (count < 2)].any()
        shifted, shifted_std = advantage(rewards + shift, group)
        torch.testing.assert_close(shifted, values, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(shifted_std, std, rtol=1e-6, atol=1e-7)
    plain = dr_grpo(rewards, group)[0]
    torch.testing.assert_close(rloo(rewards, group)[0], plain * count / (count - 1).clamp(min=1))
    values, std = grpo(rewards, group)
    torch.testing.assert_close(grpo(rewards * scale, group)[0], values * scale * (std + 1e-4) / (scale * std + 1e-4))


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_order_of_rows_and_numbers_of_groups_do_not_matter(kind: str) -> None:
    rewards, group = draw_rewards(9)
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(2))
    for here, there in zip(
        ADVANTAGES[kind](rewards, group), ADVANTAGES[kind](rewards[order], -group[order]), strict=True
    ):
        torch.testing.assert_close(here[order], there)


@pytest.mark.parametrize("kind", ["rloo", "grpo", "dr_grpo", "batch_std"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_and_lone_ones_have_exactly_no_advantage(kind: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, NAN, 5.0, NAN, 1.0, 3.0], dtype=dtype)
    group = torch.tensor([4, 4, 4, 4, 0, 0, 2, 2])
    advantages, std = ADVANTAGES[kind](rewards, group)
    assert advantages.dtype == dtype
    assert not advantages[:6].any()
    assert not std[:6].any()
    assert advantages[7] > 0 > advantages[6]
    assert std[6] == std[7] == torch.tensor(2.0, dtype=dtype).sqrt()


def test_statistics_of_the_batch_are_those_of_all_ranks() -> None:
    rewards, group = draw_rewards(5)
    halves = [group < group.median(), group >= group.median()]
    total = sum((moments(rewards[half], ~rewards[half].isnan()) for half in halves), torch.zeros(3).double())
    for advantage in (batch_std, reinforce):
        whole = advantage(rewards, group)[0]
        for half in halves:
            part = advantage(rewards[half], group[half], batch_moments=total)[0]
            torch.testing.assert_close(part, whole[half])
            assert (advantage(rewards[half], group[half])[0] - whole[half]).abs().max() > 1e-3


def test_reinforce_takes_a_baseline_or_the_mean_of_the_others() -> None:
    rewards, group = torch.tensor([1.0, 2.0, NAN, 6.0]), torch.tensor([0, 0, 1, 1])
    assert reinforce(rewards, group, baseline=0.5)[0].tolist() == [0.5, 1.5, 0.0, 5.5]
    assert reinforce(rewards, group)[0].tolist() == [-3.0, -1.5, 0.0, 4.5]
    assert reinforce(rewards[:1], group[:1])[0] == 0
    assert reinforce(rewards[:1], group[:1], baseline=0.5)[0] == 0.5


def test_advantages_carry_no_gradient() -> None:
    for advantage in ADVANTAGES.values():
        rewards, group = draw_rewards(0)
        assert not any(tensor.requires_grad for tensor in advantage(rewards.requires_grad_(), group))


# ------------------------------------------------------------------ losses against their definitions
def reference(batch: dict[str, Tensor], weighted: bool, options: dict[str, Any]) -> Tensor:
    """The same loss token by token, differentiable."""
    high = options["epsilon_high"] if options["epsilon_high"] is not None else options["epsilon"]
    low, rows = options["epsilon"], []
    for logp, old, ref, weights, advantage, mask in zip(
        *(batch[key] for key in ("logp", "old_logp", "ref_logp", "importance_weights", "advantages", "mask")),
        strict=True,
    ):
        at = [t for t in range(len(mask)) if mask[t]]
        d = [logp[t] - old[t] for t in at]
        losses = []
        for t in at:
            rho = {
                None: lambda d=d: torch.ones(()),
                "token": lambda t=t, d=d, at=at: d[at.index(t)].exp(),
                "sequence": lambda d=d: (sum(d) / len(d)).exp(),
                "sequence_sum": lambda d=d: sum(d).exp(),
                "sequence_token": lambda t=t, d=d, x=logp: (
                    (sum(d) / len(d)).exp().detach() * (x[t] - x[t].detach()).exp()
                ),
            }[options["ratio"]]()
            if options["loss"] == "clip":
                used = rho
                if options.get("delta") and advantage < 0 and rho > options["delta"]:
                    used = torch.tensor(options["delta"], dtype=torch.float64)
                bounded = torch.tensor(min(max(float(rho.detach()), 1 - low), 1 + high), dtype=torch.float64)
                value = -used * advantage if used * advantage <= bounded * advantage else -bounded * advantage
            elif options["loss"] == "cispo":
                value = -min(float(rho.detach()), 1 + high) * advantage * logp[t]
            else:
                value = -advantage * logp[t]
            value = value * weights[t] if weighted else value
            losses.append(value + options["beta"] * ((ref[t] - logp[t]).exp() - 1 - (ref[t] - logp[t])))
        rows.append(losses)
    sums = [sum(losses) for losses in rows]
    how = options["reduction"]
    if how == "token":
        return sum(sums) / sum(map(len, rows))
    if how == "sequence":
        return sum(s / len(losses) for s, losses in zip(sums, rows, strict=True)) / len(rows)
    return sum(sums) / (len(rows) * (LENGTH if how == "constant" else 1))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_equal_loops(name: str, weighted: bool) -> None:
    for seed in range(3):
        batch = draw_batch(seed)
        batch["logp"].requires_grad_()
        loss, metrics = loss_of(batch, weighted=weighted, **VARIANTS[name])
        expected = reference(batch, weighted, VARIANTS[name])
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(value, batch["logp"])[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(metrics["loss"][0] / metrics["loss"][1], expected.detach())


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"cispo", "cispo_gspo", "gspo_token"}))
def test_gradcheck(name: str) -> None:
    """Where the loss is the integral of its gradient."""
    batch = draw_batch(8)
    logp = batch["logp"].nan_to_num(0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of({**batch, "logp": x}, **VARIANTS[name])[0], (logp,))


def test_grp_2_on_policy_first_step() -> None:
    """All ratios are 1, and the methods have one gradient for completions of equal length."""
    batch = draw_batch(1)
    batch["mask"] = torch.ones_like(batch["mask"])
    batch["logp"] = batch["old_logp"] = draw_batch(1, rows=5)["old_logp"].nan_to_num(-1.0)
    expected = -batch["advantages"][:, None].expand(5, 7) / 35
    for name in ("grpo", "cispo", "gspo", "dapo"):
        options = VARIANTS[name] | {"beta": 0.0}
        torch.testing.assert_close(gradient_of(batch, weighted=False, **options), expected)
        metrics = loss_of(batch, weighted=False, **options)[1]
        assert metrics["val/ratio"][0] == metrics["val/ratio"][1]
        assert metrics["policy/approxkl_avg"][0] == 0
        assert all(value == 0 for key, (value, _) in metrics.items() if "clip_ratio" in key)


def test_grp_2_rloo_is_reinforce_with_a_leave_one_out_baseline() -> None:
    batch = draw_batch(2)
    batch["logp"] = batch["old_logp"]
    batch["advantages"], _ = rloo(batch["advantages"], torch.zeros(5, dtype=torch.long))
    first, second = (gradient_of(batch, weighted=False, **VARIANTS[name]) for name in ("rloo", "reinforce"))
    torch.testing.assert_close(first, second)


def test_grp_4_baselines_keep_the_mean_gradient_and_leave_one_out_lowers_its_variance() -> None:
    """Over all pairs of completions of a language of three tokens, two of which make a completion."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3)))
    logits = torch.cat([first[None], second]).requires_grad_()
    completions = list(itertools.product(range(3), repeat=2))
    table = logits.log_softmax(-1)
    logps = [torch.stack([table[0, a], table[1 + a, b]]) for a, b in completions]
    rewards = torch.randn(9, generator=generator, dtype=torch.float64) + 2

    def moments_of(advantages: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        mean, square = torch.zeros_like(logits), torch.zeros((), dtype=torch.float64)
        for i, j in itertools.product(range(9), repeat=2):
            logp = torch.stack([logps[i], logps[j]])
            loss, _ = group_policy_loss(
                logp, logp, advantages(rewards[[i, j]]), torch.ones(2, 2), **VARIANTS["reinforce"]
            )
            gradient = torch.autograd.grad(loss, logits, retain_graph=True)[0]
            probability = logp.sum().exp().detach()
            mean, square = mean + probability * gradient, square + probability * (gradient**2).sum()
        return mean, square - (mean**2).sum()

    plain, plain_variance = moments_of(lambda pair: pair)
    constant, _ = moments_of(lambda pair: reinforce(pair, torch.arange(2), baseline=1.7)[0])
    left_out, variance = moments_of(lambda pair: rloo(pair, torch.zeros(2, dtype=torch.long))[0])
    torch.testing.assert_close(constant, plain)
    torch.testing.assert_close(left_out, plain)
    assert plain.abs().max() > 0.1
    assert variance < 0.5 * plain_variance
    probabilities = torch.stack([logp.sum().exp() for logp in logps])
    exact = torch.autograd.grad(-(probabilities * rewards).sum(), logits)[0]
    torch.testing.assert_close(plain, exact)


# ------------------------------------------------------------------ invariances
@pytest.mark.parametrize("name", VARIANTS)
def test_grp_5_micro_batches_and_ranks_add_up(name: str) -> None:
    batch, options = draw_batch(3), VARIANTS[name]
    batch["mask"][3] = False
    count = reduction_count(batch["mask"], options["reduction"])
    whole, metrics = loss_of(batch, **options)
    gradient = gradient_of(batch, **options)
    parts = [slice(0, 1), slice(1, 4), slice(4, 5)]
    pieces = [{key: values[rows] for key, values in batch.items()} for rows in parts]
    losses = [loss_of(piece, normaliser=count, **options) for piece in pieces]
    torch.testing.assert_close(sum(loss for loss, _ in losses), whole)
    split = torch.cat([gradient_of(piece, normaliser=count, **options) for piece in pieces])
    torch.testing.assert_close(split, gradient)
    ranks = torch.cat([gradient_of(piece, normaliser=count / 3.0, **options) for piece in pieces]) / 3
    torch.testing.assert_close(ranks, gradient)
    for key in metrics.keys() - COUNTED_PER_BATCH:
        for side in (0, 1):
            torch.testing.assert_close(sum(part[key][side] for _, part in losses), metrics[key][side])
    if options["reduction"] in ("token", "sequence"):  # counter-example: each piece by its own count
        naive = torch.cat([gradient_of(piece, **options) for piece in pieces]) / 3
        assert (naive - gradient).abs().max() > 1e-4


@pytest.mark.parametrize("garbage", [0.0, NAN, math.inf, -1e9])
@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_no_loss_gradient_or_metric(name: str, garbage: float) -> None:
    batch, options = draw_batch(4), VARIANTS[name]
    wide = {"advantages": batch["advantages"], "mask": torch.nn.functional.pad(batch["mask"], (2, 3))}
    for key in batch.keys() - wide.keys():
        values = batch[key].where(batch["mask"], garbage)
        wide[key] = torch.nn.functional.pad(values, (2, 3), value=garbage)
    loss, metrics = loss_of(batch, **options)
    padded, padded_metrics = loss_of(wide, **options)
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(padded_metrics, metrics)
    gradient = gradient_of(wide, **options)
    torch.testing.assert_close(gradient[:, 2:-3], gradient_of(batch, **options))
    assert not gradient[~wide["mask"]].any()


def test_advantages_by_token_and_of_empty_completions_may_be_anything_outside_the_mask() -> None:
    batch = draw_batch(4)
    batch["mask"][2] = False
    for options in VARIANTS.values():
        expected, metrics = loss_of(batch, **options)
        by_row = {**batch, "advantages": batch["advantages"].index_fill(0, torch.tensor(2), NAN)}
        by_token = {**batch, "advantages": batch["advantages"][:, None].expand(5, 7).where(batch["mask"], NAN)}
        for same in (by_row, by_token):
            loss, same_metrics = loss_of(same, **options)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(same_metrics, metrics)
            torch.testing.assert_close(gradient_of(same, **options), gradient_of(batch, **options))


@pytest.mark.parametrize("name", VARIANTS)
def test_conv_9_a_batch_without_tokens_or_rows_has_loss_and_gradient_0(name: str) -> None:
    for rows in (3, 0):
        batch = draw_batch(0, rows=3)
        batch = {key: values[:rows] for key, values in (batch | {"mask": torch.zeros(3, 7)}).items()}
        loss, metrics = loss_of(batch, **VARIANTS[name])
        assert loss == 0
        assert not gradient_of(batch, **VARIANTS[name]).any()
        assert metrics["empty_batches"] == (1, 1)
        # `sum_sequence` and `constant` divide by completions, with or without tokens
        assert all(numerator == 0 for key, (numerator, _) in metrics.items() if key != "empty_batches")
        assert not any(metrics[key][1] for key in metrics.keys() - {"empty_batches", "loss"})


def test_completions_without_score() -> None:
    """They count, and their policy loss is 0; without their tokens in the mask, their KL term is 0 too."""
    batch, options = draw_batch(6), VARIANTS["grpo"]
    rewards = torch.tensor([1.0, NAN, 0.0, 1.0, 0.5], dtype=torch.float64)
    batch["advantages"], _ = grpo(rewards, torch.zeros(5, dtype=torch.long))
    assert not gradient_of(batch, **options | {"beta": 0.0})[1].any()
    count = reduction_count(batch["mask"], "sequence")
    assert gradient_of(batch, normaliser=count, **options)[1].any()
    only = {**batch, "mask": scored_mask(batch["mask"], rewards)}
    gradient = gradient_of(only, normaliser=count, **options)
    assert not gradient[1].any()
    others = [0, 2, 3, 4]
    torch.testing.assert_close(gradient[others], gradient_of(batch, normaliser=count, **options)[others])


# ------------------------------------------------------------------ what single tokens feel
def test_grp_6_length_changes_a_tokens_gradient_in_grpo_and_not_in_dr_grpo() -> None:
    def first(name: str, length: int) -> Tensor:
        mask = (torch.arange(7) < length).expand(2, 7)
        batch = {key: torch.full((2, 7), -1.0).double() for key in ("logp", "old_logp", "ref_logp")}
        batch |= {"mask": mask, "advantages": torch.tensor([1.0, -1.0]).double()}
        return gradient_of(batch, weighted=False, **VARIANTS[name] | {"beta": 0.0})[:, 0]

    torch.testing.assert_close(first("dr_grpo", 2), first("dr_grpo", 7), rtol=0, atol=0)
    torch.testing.assert_close(first("grpo", 2), first("grpo", 7) * 7 / 2)


def test_grp_7_clip_higher_and_where_the_clip_removes_the_gradient() -> None:
    assert token_gradient(1.0, 1.25, epsilon_high=0.28) == pytest.approx(-1.25)
    assert token_gradient(1.0, 1.25) == 0
    assert token_gradient(-1.0, 0.75, epsilon_high=0.28) == 0
    assert token_gradient(1.0, 0.75) == pytest.approx(-0.75)
    assert token_gradient(-1.0, 1.25) == pytest.approx(1.25)
    assert token_gradient(1.0, 0.75, epsilon=0.3, epsilon_high=0.1) == pytest.approx(-0.75)
    assert token_gradient(-1.0, 0.75, epsilon=0.3, epsilon_high=0.1) == pytest.approx(0.75)


def test_grp_7_cispo_keeps_every_gradient() -> None:
    for advantage, ratio in itertools.product((1.0, -0.3), (1e-3, 0.7, 1.0, 1.28, 1.5, 40.0)):
        gradient = token_gradient(advantage, ratio, loss="cispo", epsilon_high=0.28)
        assert gradient == pytest.approx(-advantage * min(ratio, 1.28))


def test_delta_bounds_what_a_bad_token_can_do() -> None:
    assert token_gradient(-1.0, 4.5) == pytest.approx(4.5)
    assert token_gradient(-1.0, 4.5, delta=4.0) == 0
    assert token_gradient(-1.0, 3.5, delta=4.0) == pytest.approx(3.5)
    for ratio in (0.5, 1.1, 1.5, 5.0):
        assert token_gradient(1.0, ratio, delta=4.0) == token_gradient(1.0, ratio)


def test_gspo_weighs_all_tokens_of_a_completion_alike() -> None:
    """s A/|y| ∇logp, and GSPO-token has the same value and gradient where its advantages are equal."""
    batch, wide = draw_batch(7), {"epsilon": 0.9, "epsilon_high": 9.0}
    options = VARIANTS["gspo"] | wide
    mask = batch["mask"]
    lengths = mask.sum(1)
    s = ((batch["logp"] - batch["old_logp"]).where(mask, 0.0).sum(1) / lengths).exp()
    expected = torch.where(mask, (-s * batch["advantages"] / lengths / 5)[:, None], 0.0)
    for ratio in ("sequence", "sequence_token"):
        torch.testing.assert_close(gradient_of(batch, weighted=False, **options | {"ratio": ratio}), expected)
    by_token = {**batch, "advantages": batch["advantages"][:, None] * torch.arange(7)}
    gradient = gradient_of(by_token, weighted=False, **options | {"ratio": "sequence_token"})
    torch.testing.assert_close(gradient, expected * torch.arange(7))


def test_gradient_flows_through_the_current_policy_only() -> None:
    for name, options in VARIANTS.items():
        batch = draw_batch(3)
        tensors = [batch[key].requires_grad_() for key in batch if key != "mask"]
        loss, metrics = loss_of(batch, **options)
        loss.backward()
        assert not any(value.requires_grad for sides in metrics.values() for value in sides)
        assert batch["logp"].grad is not None, name
        assert batch["logp"].grad.any()
        assert all(tensor.grad is None for tensor in tensors if tensor is not batch["logp"])


def test_far_log_ratios_stay_finite() -> None:
    logp = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    for ratio, advantage in itertools.product(RATIOS, (1.0, -1.0)):
        loss, metrics = group_policy_loss(logp, zero, torch.tensor([advantage]), one, ratio=ratio)
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()
        assert torch.isfinite(torch.stack([values[0] for values in metrics.values()])).all()


def test_half_precision_is_computed_in_float32() -> None:
    batch = draw_batch(0)
    half = {key: values.bfloat16() if values.is_floating_point() else values for key, values in batch.items()}
    loss, _ = loss_of(half, **VARIANTS["grpo"])
    exact = {key: values.double() if values.is_floating_point() else values for key, values in half.items()}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), loss_of(exact, **VARIANTS["grpo"])[0], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ metrics, counts, weights, penalties
def test_clip_ratios_by_hand() -> None:
    """Ratios 0.5, 1, 2 of a good completion, and 0.5, 2 of a bad one; the third is empty."""
    logp = torch.tensor([[0.5, 1.0, 2.0], [0.5, 2.0, 9.0], [0.1, 0.1, 0.1]]).double().log()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    batch = (logp, torch.zeros(3, 3), torch.tensor([1.0, -1.0, -1.0]), mask)
    _, metrics = group_policy_loss(*batch)
    shares = {name: float(a / b) for name, (a, b) in metrics.items()}
    assert shares["clip_ratio/low_mean"] == pytest.approx(1 / 5)
    assert shares["clip_ratio/high_mean"] == pytest.approx(1 / 5)
    assert shares["clip_ratio/region_mean"] == pytest.approx(2 / 5)
    assert shares["clip_ratio/low_min"] == 0
    assert shares["clip_ratio/high_max"] == pytest.approx(1 / 3)
    assert shares["val/ratio"] == pytest.approx(6 / 5)
    assert shares["policy/approxkl_avg"] == pytest.approx(0.5 * math.log(2) ** 2 * 4 / 5)
    assert "kl" not in metrics
    _, metrics = group_policy_loss(*batch[:2], -batch[2], mask)  # now the second is good, the first bad
    assert metrics["clip_ratio/low_min"] == (0, 1)
    assert metrics["clip_ratio/high_max"] == (0.5, 1)
    _, metrics = group_policy_loss(*batch[:2], torch.tensor([-1.0, -1.0, -1.0]), mask)
    assert float(metrics["clip_ratio/low_min"][0]) == pytest.approx(1 / 3)
    _, metrics = group_policy_loss(*batch, ratio="sequence", epsilon=1e-3)  # one ratio of a completion is 1, twice
    assert metrics["clip_ratio/region_mean"] == (0, 2)
    shifted = (logp - torch.tensor([0.1, 0.1, 0.0])[:, None] * torch.tensor([-1.0, 1.0, 1.0])[:, None], *batch[1:])
    _, metrics = group_policy_loss(*shifted, ratio="sequence", epsilon=1e-3)
    assert metrics["clip_ratio/region_mean"] == (2, 2)
    assert metrics["clip_ratio/low_mean"] == (1, 2)
    _, metrics = group_policy_loss(*batch, loss="cispo", epsilon_high=0.28)
    assert metrics["cispo_clip_ratio"] == (1, 5)


def test_kl_is_logged_wherever_there_is_a_reference() -> None:
    batch = draw_batch(5)
    expected = (batch["ref_logp"] - batch["logp"])[batch["mask"]]
    expected = (expected.exp() - 1 - expected).mean()
    for beta in (0.0, 0.04):
        numerator, denominator = loss_of(batch, **VARIANTS["grpo"] | {"beta": beta})[1]["kl"]
        torch.testing.assert_close(numerator / denominator, expected)


def test_normalisers_are_what_reductions_divide_by() -> None:
    mask = draw_batch(3)["mask"]
    mask[2] = False
    loss = torch.ones(mask.shape)
    for how, reduce in REDUCTIONS.items():
        options = {"length": LENGTH} if how == "constant" else {}
        given = reduce(loss, mask, normaliser=reduction_count(mask, how), **options)
        torch.testing.assert_close(given, reduce(loss, mask, **options), rtol=0, atol=0)


def test_importance_weights_are_truncated_and_1_outside_the_mask() -> None:
    logp = torch.tensor([[-1.0, -1.0, -1.0, NAN]], requires_grad=True)
    engine = torch.tensor([[-1.0, -1.5, -9.0, 0.0]])
    weights = truncated_importance_weights(logp, engine, torch.tensor([[1, 1, 1, 0]]))
    torch.testing.assert_close(weights, torch.tensor([[1.0, math.exp(0.5), 2.0, 1.0]]))
    assert not weights.requires_grad
    low = truncated_importance_weights(engine, logp.detach(), torch.tensor([[1, 1, 1, 0]]), cap=1.5)
    torch.testing.assert_close(low, torch.tensor([[1.0, math.exp(-0.5), math.exp(-8.0), 1.0]]))


@given(length=st.integers(1, 200), limit=st.integers(1, 200), share=st.floats(0.01, 1))
@settings(deadline=None)
def test_overlong_penalty(length: int, limit: int, share: float) -> None:
    buffer = max(1, int(limit * share))
    penalty = float(overlong_penalty(torch.tensor([length]), limit, buffer))
    if length <= limit - buffer:
        assert penalty == 0
    elif length > limit:
        assert penalty == -1
    else:
        assert penalty == pytest.approx((limit - buffer - length) / buffer)
    with pytest.raises(ValueError, match="buffer is 0"):
        overlong_penalty(torch.tensor([length]), limit, 0)
    with pytest.raises(ValueError, match="at most max_length"):
        overlong_penalty(torch.tensor([length]), limit, limit + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "words"}, "ratio is 'words'"),
        ({"ratio": None}, "ratio is None"),
        ({"loss": "reinforce"}, "ratio is 'token'"),
        ({"loss": "ppo"}, "loss is 'ppo'"),
        ({"reduction": "mean"}, "reduction is 'mean'"),
        ({"reduction": "constant"}, "needs max_completion_length"),
        ({"beta": 0.1}, "needs ref_logp"),
        ({"delta": 1.2}, r"delta is 1\.2"),
        ({"delta": 3.0, "loss": "cispo"}, "'clip' alone"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=message):
        group_policy_loss(one, one, one[0], one, **options)
