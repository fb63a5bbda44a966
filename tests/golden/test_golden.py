"""The library against the golden vectors: float64 to 1e-10, padded by 3 columns, and in float32 to 1e-5."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align_kernels import gae
from lightning_align.losses.advantages import shaped_rewards
from lightning_align.losses.best_of_n import best_of_n, best_of_n_kl
from lightning_align.losses.group import ADVANTAGES, PRESETS, group_policy_loss, overlong_penalty
from lightning_align.losses.hindsight import Candidates, contrastive_loss
from lightning_align.losses.judge import both_orders, expected_rating, soft_label
from lightning_align.losses.kl import KL_ESTIMATORS, kl_estimate, sequence_kl
from lightning_align.losses.kl_control import AdaptiveKL
from lightning_align.losses.masked import REDUCTIONS, masked_mean, masked_whiten
from lightning_align.losses.policy import ppo_policy_loss
from lightning_align.losses.preference import LOSSES, Pairs, accepted_options, kto, kto_z0
from lightning_align.losses.ranking import plackett_luce_loss
from lightning_align.losses.reward_metrics import accuracy, expected_calibration_error
from lightning_align.losses.reward_model import preference_loss
from lightning_align.losses.tie_models import davidson, rao_kupper
from lightning_align.losses.value import value_loss
from lightning_align.rewards.combination import Whitening, combine_members, gate

FOLDER = Path(__file__).parent
CASES: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text())["cases"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
GARBAGE = 7.7e4  # what stands in padding: large enough that a leak cannot hide


def golden(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return CASES[case]["inputs"], CASES[case]["outputs"]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[(0, 0), (3, 0), (0, 3), (1, 2)], ids=["plain", "pad_left_3", "pad_right_3", "pad_both"])
def padding(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


class Layout:
    """Turns a case's rows into tensors of one dtype with garbage columns around them, and back."""

    def __init__(self, dtype: torch.dtype, padding: tuple[int, int]) -> None:
        self.dtype, self.padding = dtype, padding

    def values(self, rows: list[Any]) -> Tensor:
        return torch.nn.functional.pad(torch.tensor(rows, dtype=self.dtype), self.padding, value=GARBAGE)

    def mask(self, rows: list[Any]) -> Tensor:
        return torch.nn.functional.pad(torch.tensor(rows), self.padding, value=0).bool()

    def check(self, actual: Tensor, expected: list[Any]) -> None:
        left, right = self.padding
        inner = actual[:, left : actual.shape[1] - right]
        assert_golden(inner, expected, self.dtype)
        assert not actual[:, :left].any()
        assert not actual[:, actual.shape[1] - right :].any()


@pytest.fixture
def layout(dtype: torch.dtype, padding: tuple[int, int]) -> Layout:
    return Layout(dtype, padding)


def assert_golden(actual: Tensor, expected: Any, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def ratio(metric: tuple[Tensor, Tensor]) -> Tensor:
    return metric[0].double() / metric[1].double()


# ------------------------------------------------------------------ the file itself
def test_gold_1_every_case_is_used() -> None:
    sources = [path.read_text() for path in FOLDER.parent.rglob("test_*.py")]
    used = {
        name
        for name in CASES
        if any(re.search(rf"""(?i:golden|cases?)\w*\W+["']{name}["']""", text) for text in sources)
    }
    assert used == set(CASES), f"no test reads these cases: {sorted(set(CASES) - used)}"


def test_gold_2_the_file_is_what_the_script_writes(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "golden.py", tmp_path)
    done = subprocess.run([sys.executable, "golden.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same(json.loads((tmp_path / "golden.json").read_text()), json.loads((FOLDER / "golden.json").read_text()))


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-300)
    else:
        assert a == b


# ------------------------------------------------------------------ section 1
def test_gold_3_kl_estimators(dtype: torch.dtype) -> None:
    inputs, outputs = golden("kl")
    labels = torch.tensor(inputs["labels"])[:, None]
    logp, ref_logp = (
        torch.tensor(inputs[key], dtype=torch.float64).log_softmax(-1).gather(1, labels)[:, 0].to(dtype)
        for key in ("logits", "ref_logits")
    )
    for name in KL_ESTIMATORS:
        assert_golden(kl_estimate(logp, ref_logp, name), outputs[name], dtype)


@pytest.mark.parametrize("how", list(REDUCTIONS))
def test_gold_3_reductions(layout: Layout, how: str) -> None:
    inputs, outputs = golden("reductions")
    loss, mask = layout.values(inputs["loss"]), layout.mask(inputs["mask"])
    options = {"length": inputs["length"]} if how == "constant" else {}
    assert_golden(REDUCTIONS[how](loss, mask, **options), outputs[how], layout.dtype)


def test_gold_3_masked_whiten(layout: Layout) -> None:
    inputs, outputs = golden("masked_whiten")
    values, mask = layout.values(inputs["values"]), layout.mask(inputs["mask"])
    layout.check(masked_whiten(values, mask), outputs["default"])
    layout.check(masked_whiten(values, mask, shift_mean=False), outputs["no_shift"])
    layout.check(masked_whiten(values, mask, unbiased=True), outputs["unbiased"])


# ------------------------------------------------------------------ section 6
def test_gold_3_gae(layout: Layout) -> None:
    inputs, outputs = golden("gae")
    rewards, values = layout.values(inputs["rewards"]), layout.values(inputs["values"])
    second = {"gamma": inputs["gamma2"], "lam": inputs["lam2"]}
    variants = {
        "": ("mask", {"gamma": inputs["gamma"], "lam": inputs["lam"]}),
        "bootstrap_": ("mask", second | {"bootstrap": torch.tensor(inputs["bootstrap"], dtype=layout.dtype)}),
        "interior_": ("interior_mask", second),
        "dones_": ("mask", second | {"dones": layout.mask(inputs["dones"])}),
    }
    for prefix, (mask, options) in variants.items():
        advantages, returns = gae(rewards, values, mask=layout.mask(inputs[mask]).bool(), **options)
        layout.check(advantages, outputs[prefix + "advantages"])
        layout.check(returns, outputs[prefix + "returns"])


def test_gold_3_gae_packed(dtype: torch.dtype) -> None:
    inputs, outputs = golden("gae_packed")
    rewards, values = (torch.tensor(inputs[key], dtype=dtype) for key in ("rewards", "values"))
    advantages, returns = gae(
        rewards, values, cu_seqlens=torch.tensor(inputs["cu_seqlens"]), gamma=inputs["gamma"], lam=inputs["lam"]
    )
    assert_golden(advantages, outputs["advantages"], dtype)
    assert_golden(returns, outputs["returns"], dtype)


def test_gold_3_shaped_reward(layout: Layout) -> None:
    inputs, outputs = golden("shaped_reward")
    mask = layout.mask(inputs["mask"])
    kl = kl_estimate(layout.values(inputs["logp"]), layout.values(inputs["ref_logp"]))
    scores = torch.tensor(inputs["scores"], dtype=layout.dtype)
    layout.check(shaped_rewards(kl, mask, scores, kl_coef=inputs["beta"]), outputs["rewards"])
    assert_golden(sequence_kl(kl, mask), outputs["kl_sum"], layout.dtype)


def test_gold_3_ppo_loss(layout: Layout) -> None:
    inputs, outputs = golden("ppo_loss")
    tensors = [layout.values(inputs[key]) for key in ("logp", "old_logp", "advantages")]
    mask, clip = layout.mask(inputs["mask"]), inputs["clip"]
    loss, metrics = ppo_policy_loss(*tensors, mask, cliprange=clip)
    assert_golden(loss, outputs["loss"], layout.dtype)
    assert_golden(ratio(metrics["policy/clipfrac_avg"]).to(layout.dtype), outputs["clipfrac"], layout.dtype)
    assert_golden(ratio(metrics["policy/approxkl_avg"]).to(layout.dtype), outputs["approx_kl"], layout.dtype)
    assert_golden(ratio(metrics["loss/policy_avg"]).to(layout.dtype), outputs["loss"], layout.dtype)
    dual, _ = ppo_policy_loss(*tensors, mask, cliprange=clip, dual_clip=inputs["dual_clip"])
    assert_golden(dual, outputs["loss_dual"], layout.dtype)
    higher, _ = ppo_policy_loss(*tensors, mask, cliprange=clip, cliprange_high=inputs["clip_high"])
    assert_golden(higher, outputs["loss_clip_higher"], layout.dtype)


def test_gold_3_value_loss(layout: Layout) -> None:
    inputs, outputs = golden("value_loss")
    values, old_values = layout.values(inputs["values"]), layout.values(inputs["old_values"])
    returns, mask = layout.values(inputs["returns"]), layout.mask(inputs["mask"])
    loss, metrics = value_loss(values, old_values, returns, mask, cliprange_value=inputs["clip"])
    assert_golden(loss, outputs["loss"], layout.dtype)
    assert_golden(ratio(metrics["val/clipfrac_avg"]).to(layout.dtype), outputs["clipfrac"], layout.dtype)


def test_gold_3_ppo_10_kl_controller() -> None:
    inputs, outputs = golden("kl_controller")
    controller = AdaptiveKL(inputs["init"], target=inputs["target"], horizon=inputs["horizon"])
    for kl, expected in zip(inputs["kl"], outputs["beta"], strict=True):
        controller.update(kl, inputs["n_steps"])
        assert math.isclose(controller.value, expected, rel_tol=1e-12)


# ------------------------------------------------------------------ section 4
def test_gold_3_bt(dtype: torch.dtype) -> None:
    inputs, outputs = golden("bt")
    chosen, rejected = inputs["chosen"], inputs["rejected"]
    count = len(chosen)
    # responses of a batch stand interleaved, with rows in between that belong to no pair
    scores = torch.full((3 * count,), GARBAGE, dtype=dtype)
    first, second = torch.arange(count) * 3, torch.arange(count) * 3 + 1
    scores[first] = torch.tensor(chosen, dtype=dtype)
    scores[second] = torch.tensor(rejected, dtype=dtype)

    def column(key: str) -> Tensor:
        return torch.tensor(inputs[key], dtype=dtype)

    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "small": {"margin": column("margin_small")},
        "large": {"margin": column("margin_large")},
        "smoothed": {"label_smoothing": inputs["label_smoothing"]},
        "centred": {"center_coef": inputs["center"]},
        "soft": {"label": column("soft")},
        "weighted": {"weight": column("weight")},
    }
    for name, options in variants.items():
        total, metrics = preference_loss(scores, first, second, **options)
        assert_golden(total / metrics["loss"][1], outputs[name], dtype)
        assert_golden(ratio(metrics["loss"]).to(dtype), outputs[name], dtype)


def test_gold_3_kwise(dtype: torch.dtype) -> None:
    inputs, outputs = golden("kwise")
    scores, first, second, weight = [], [], [], []
    for group, ranks in zip(inputs["scores"], inputs["ranks"], strict=True):
        pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
        first += [len(scores) + i for i, _ in pairs]
        second += [len(scores) + j for _, j in pairs]
        weight += [1 / len(pairs)] * len(pairs)
        scores += group
    total, metrics = preference_loss(
        torch.tensor(scores, dtype=dtype),
        torch.tensor(first),
        torch.tensor(second),
        weight=torch.tensor(weight, dtype=dtype),
    )
    assert_golden(metrics["loss"][1], float(len(inputs["scores"])), dtype)
    assert_golden(total / len(inputs["scores"]), outputs["loss"], dtype)


def test_gold_3_rm_6_plackett_luce(dtype: torch.dtype) -> None:
    inputs, outputs = golden("plackett_luce")
    best_first = inputs["scores"]
    order = [2, 0, 3, 1]  # the responses stand in the batch as they come
    rows = torch.tensor([[*range(len(order)), -1, -1]])
    ranks = torch.tensor([[rank + 1 for rank in order] + [0, 0]])
    scores = torch.tensor([*(best_first[rank] for rank in order), GARBAGE, GARBAGE, GARBAGE], dtype=dtype)
    loss, metrics = plackett_luce_loss(scores, rows, ranks)
    assert_golden(loss, outputs["loss"], dtype)
    assert_golden(ratio(metrics["loss"]).to(dtype), outputs["loss"], dtype)


def test_gold_3_rm_7_ties(dtype: torch.dtype) -> None:
    inputs, outputs = golden("ties")
    delta = torch.tensor([inputs["r_i"], GARBAGE], dtype=dtype) - torch.tensor([inputs["r_j"], 0.0], dtype=dtype)
    eta, kappa = torch.tensor(inputs["eta"], dtype=dtype), torch.tensor(inputs["nu"], dtype=dtype).log()
    assert_golden(rao_kupper(delta, eta)[:, 0].exp(), outputs["rao_kupper"], dtype)
    assert_golden(davidson(delta, kappa)[:, 0].exp(), outputs["davidson"], dtype)


def test_gold_3_ece() -> None:
    inputs, outputs = golden("ece")
    delta = torch.tensor(inputs["deltas"], dtype=torch.float64)
    assert math.isclose(expected_calibration_error(delta), outputs["ece"], rel_tol=1e-10)
    assert math.isclose(accuracy(delta), outputs["accuracy"], rel_tol=1e-10)
    assert math.isclose(expected_calibration_error(delta.float()), outputs["ece"], rel_tol=1e-5)


# ------------------------------------------------------------------ section 5
def test_gold_3_comp_1_llama2_gate(dtype: torch.dtype) -> None:
    inputs, outputs = golden("llama2_gate")
    helpfulness, safety = (torch.tensor([*inputs[key], math.nan], dtype=dtype) for key in ("help_raw", "safe_raw"))
    is_safety = torch.tensor([*inputs["is_safety"], 0]).bool()
    logits = gate(helpfulness, safety, is_safety, threshold=inputs["threshold"])
    assert_golden(logits[:-1].sigmoid(), outputs["combined"], dtype)
    white = Whitening("batch")(logits, torch.clone)
    assert_golden(white[:-1], outputs["whitened"], dtype)
    assert white[-1].isnan()


def test_gold_3_comp_3_uwo(dtype: torch.dtype) -> None:
    inputs, outputs = golden("uwo")
    members = torch.tensor(inputs["members"], dtype=dtype).T  # given by sequence
    padded = torch.cat([members, members.new_full((1, members.shape[1]), math.nan)])
    for how in ("mean", "min", "uwo"):
        assert_golden(combine_members(padded, how, uwo_coef=inputs["lambda"]), outputs[how], dtype)


def test_gold_3_whitened_advantages_feed_the_loss_unchanged_by_padding(layout: Layout) -> None:
    """The chain of an iteration on the golden tensors: padding by 3 changes none of its numbers."""
    shaping, _ = golden("shaped_reward")
    estimates, _ = golden("gae")
    mask = layout.mask(shaping["mask"])
    kl = kl_estimate(layout.values(shaping["logp"]), layout.values(shaping["ref_logp"]))
    rewards = shaped_rewards(kl, mask, torch.tensor(shaping["scores"], dtype=layout.dtype), kl_coef=shaping["beta"])
    advantages, returns = gae(rewards, layout.values(estimates["values"]), mask=mask.bool())
    white = masked_whiten(advantages, mask)
    plain = Layout(torch.float64, (0, 0))
    kl = kl_estimate(plain.values(shaping["logp"]), plain.values(shaping["ref_logp"]))
    rewards = shaped_rewards(
        kl, plain.mask(shaping["mask"]), torch.tensor(shaping["scores"], dtype=torch.float64), kl_coef=shaping["beta"]
    )
    expected, targets = gae(rewards, plain.values(estimates["values"]), mask=plain.mask(shaping["mask"]).bool())
    layout.check(returns, targets.tolist())
    layout.check(white, masked_whiten(expected, plain.mask(shaping["mask"])).tolist())
    torch.testing.assert_close(
        masked_mean(white, mask).double(), torch.zeros((), dtype=torch.float64), atol=1e-6, rtol=0
    )


# ------------------------------------------------------------------ section 8
# golden names of losses that are settings of others
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "cdpo": ("sigmoid", {"label_smoothing": 0.1}),
    "robust": ("robust", {"label_smoothing": 0.1}),
    "ipo_sum": ("ipo", {"ipo_average": False}),
}
DPO_KINDS = sorted(set(golden("dpo")[1]) - {"nll_chosen_token_mean"})


def golden_pairs(dtype: torch.dtype) -> Pairs:
    """The case's pairs, between pairs of anything."""
    inputs, _ = golden("dpo")

    def column(name: str) -> Tensor:
        return torch.tensor([GARBAGE, *inputs[name], GARBAGE], dtype=dtype)

    return Pairs(
        column("chosen").requires_grad_(),
        column("rejected").requires_grad_(),
        column("len_c"),
        column("len_r"),
        column("ref_c"),
        column("ref_r"),
        torch.full((5,), GARBAGE, dtype=dtype),
        torch.tensor(
            [0.0, *(a - b for a, b in zip(inputs["s_c"], inputs["s_r"], strict=True)), 0.0], dtype=torch.float64
        ).to(dtype),
    )


@pytest.mark.parametrize("kind", DPO_KINDS)
def test_gold_3_dpo_2(dtype: torch.dtype, kind: str) -> None:
    inputs, outputs = golden("dpo")
    name, options = SETTINGS.get(kind, (kind, {}))
    beta = inputs["orpo_lambda"] if kind == "orpo" else inputs["beta"].get(kind, inputs["beta"]["default"])
    given = {**inputs, **options, "beta": beta, "label_smoothing": options.get("label_smoothing", 0.0)}
    loss, pairs = LOSSES[name], golden_pairs(dtype)
    values = loss(pairs, **{option: given[option] for option in accepted_options(loss) if option in given})[1:-1]
    assert_golden(values, outputs[kind]["per_pair"], dtype)
    assert_golden(values.mean(), outputs[kind]["loss"], dtype)
    if dtype == torch.float64:  # the finite differences are those of single pairs
        values.sum().backward()
        for side in ("chosen", "rejected"):
            found = torch.tensor(outputs[kind][f"grad_{side}_fd"], dtype=dtype)
            gradient = getattr(pairs, f"{side}_logp").grad[1:-1]
            torch.testing.assert_close(gradient, found, rtol=2e-6, atol=2e-6)


def test_gold_3_kto(dtype: torch.dtype) -> None:
    inputs, outputs = golden("kto")
    ratio, mismatched = (torch.tensor(inputs[name], dtype=dtype) for name in ("logratio", "kl_logratio"))
    label, count = torch.tensor(inputs["label"]), torch.tensor(len(inputs["kl_logratio"]))
    weights = {"desirable_weight": inputs["w_desirable"], "undesirable_weight": inputs["w_undesirable"]}
    for sign, z0_name, loss_name in ((1, "z0", "loss"), (-1, "z0_negated", "loss_negated")):
        z0 = kto_z0(sign * mismatched.sum(), count)
        assert_golden(z0, outputs[z0_name], dtype)
        values = kto(ratio, label, z0, beta=inputs["beta"], **weights)
        assert_golden(values.mean(), outputs[loss_name], dtype)
        if sign == 1:
            assert_golden(values, outputs["per_sample"], dtype)


# ------------------------------------------------------------------ section 7
def test_gold_3_rs_1_bon() -> None:
    inputs, outputs = golden("bon")
    proxy, gold = (torch.tensor([[*inputs[key], math.nan]], dtype=torch.float64) for key in ("proxy", "gold"))
    for place, n in enumerate(inputs["n"]):
        assert_golden(best_of_n(proxy, gold, n)[0], outputs["gold"][place], torch.float64)
        assert_golden(best_of_n(proxy, proxy, n)[0], outputs["proxy"][place], torch.float64)
        assert math.isclose(best_of_n_kl(n), outputs["kl"][place], rel_tol=1e-10)
        rounded = best_of_n(proxy.float(), gold.float(), n)
        torch.testing.assert_close(rounded, best_of_n(proxy, gold, n), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ section 9
@pytest.mark.parametrize("kind", sorted(golden("group_advantages")[1]))
def test_gold_3_group_advantages(dtype: torch.dtype, kind: str) -> None:
    inputs, outputs = golden("group_advantages")
    rewards = torch.tensor(inputs["rewards"])
    group = torch.arange(len(rewards))[:, None].expand(rewards.shape)
    # the rows of a batch stand as they come, one of them without score
    scores = torch.cat(
        [torch.tensor(inputs["rewards"], dtype=dtype).T.flatten(), torch.tensor([math.nan], dtype=dtype)]
    )
    advantages, _ = ADVANTAGES[kind](scores, torch.cat([group.T.flatten(), torch.tensor([1])]))
    assert_golden(advantages[:-1].view(rewards.T.shape).T, outputs[kind], dtype)
    assert advantages[-1] == 0


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_gold_3_grp_3_group_losses(layout: Layout, name: str) -> None:
    """By the table of presets, whose numbers are those of the case."""
    inputs, outputs = golden("group_losses")
    assert PRESETS.keys() == outputs.keys()
    preset = PRESETS[name]
    loss, metrics = group_policy_loss(
        *(layout.values(inputs[key]) for key in ("logp", "old_logp")),
        torch.tensor(inputs["advantages"], dtype=layout.dtype),
        layout.mask(inputs["mask"]),
        ratio=preset.ratio,
        loss=preset.loss,
        reduction=preset.reduction,
        epsilon=preset.epsilon,
        epsilon_high=preset.epsilon_high,
        beta=preset.beta if preset.kl == "loss" else 0.0,
        ref_logp=layout.values(inputs["ref_logp"]),
        max_completion_length=inputs["max_completion_length"],
    )
    assert_golden(loss, outputs[name], layout.dtype)
    assert_golden(ratio(metrics["loss"]).to(layout.dtype), outputs[name], layout.dtype)


def test_gold_3_overlong(dtype: torch.dtype) -> None:
    inputs, outputs = golden("overlong")
    for lengths in (torch.tensor(inputs["lengths"]), torch.tensor(inputs["lengths"], dtype=dtype)):
        penalty = overlong_penalty(lengths, inputs["l_max"], inputs["l_cache"])
        assert_golden(penalty, outputs["penalty"], dtype if lengths.is_floating_point() else torch.float32)


# ------------------------------------------------------------------ sections 11 to 13
def test_gold_3_hir(dtype: torch.dtype) -> None:
    inputs, outputs = golden("hir")
    logp = torch.nn.functional.pad(torch.tensor(inputs["ell"], dtype=dtype), (0, 2), value=GARBAGE)
    instruction = torch.tensor([0, 1, 2, 3, -1, 0]).expand(logp.shape)  # no candidate, and one that repeats the first
    logp[:, -1] = logp[:, 0]
    loss, metrics = contrastive_loss(Candidates(logp, instruction, torch.arange(3)))
    assert_golden(loss / 3, outputs["contrast"], dtype)
    assert_golden(ratio(metrics["hir/contrast_accuracy"]).to(dtype), outputs["accuracy"], dtype)


def test_gold_3_ai_label(dtype: torch.dtype) -> None:
    inputs, outputs = golden("ai_label")
    logp_a, logp_b, first, swapped = (
        torch.tensor(inputs[key], dtype=dtype) for key in ("logp_a", "logp_b", "p_order1", "p_order2")
    )
    assert_golden(soft_label(logp_a, logp_b), outputs["soft"], dtype)
    assert_golden(soft_label(logp_a, logp_b, bounds=(0.4, 0.6)), outputs["clamped"], dtype)
    assert_golden(both_orders(first, swapped)[0], outputs["debiased"], dtype)


def test_gold_3_drlaif(dtype: torch.dtype) -> None:
    inputs, outputs = golden("drlaif")
    rating = expected_rating(torch.tensor([inputs["logp"]], dtype=dtype))
    assert_golden(rating.score[0], outputs["score"], dtype)
    assert_golden(rating.reward[0], outputs["reward"], dtype)
