"""What `benchmarks.kernels` measures: operations at shapes, each with its variants, its reference and its floor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import align_kernels as K
from benchmarks import kernel_baselines as base
from benchmarks.kernel_baselines import Variant, compiled, other, single
from benchmarks.kernel_measure import Bench

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

# Rows, hidden size and vocabulary of a language model's head; sequences and tokens of a rollout.
HEADS = {
    "small": [(1536, 64, 512)],
    "cpu": [(2048, 256, 32768)],
    "llama": [(8192, 4096, 128256)],
    "qwen": [(8192, 3584, 151936)],
    "sweep": [(2048, 256, vocabulary) for vocabulary in (1024, 4096, 16384, 65536, 262144)],
}
ROLLOUTS = {
    "small": [(64, 24), (64, 256)],
    "cpu": [(256, 1024), (1024, 4096)],
    "llama": [(1024, 4096)],
    "qwen": [(1024, 4096)],
    "sweep": [(256, length) for length in (16, 128, 1024, 8192, 32768)],
}
GAMMA, LAM, KL_COEF = 0.99, 0.95, 0.05
# Bounds on outputs, relative to 1 + the largest, and on gradients in the Frobenius norm (KERNELS.md section 7).
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-8, 1e-2), torch.float16: (2**-10, 3e-3)}


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Args:
        op: ``K1`` … ``K6``.
        name: The function.
        shape: Sizes, for the table.
        rows: Rows (or sequences) of the inputs.
        slice_rows: Rows on which the variants are first compared with the reference.
        make: Inputs of so many rows.
        leaves: Inputs with a gradient.
        variants: By name; a string says why one is absent.
        reference: The same in float64.
        floor: Seconds of forward, and of both passes, below which no implementation can go.
        tolerance: Bounds on outputs and gradients.
    """

    op: str
    name: str
    shape: str
    rows: int
    slice_rows: int
    make: Callable[[int], Inputs]
    leaves: tuple[str, ...]
    variants: dict[str, Variant | str]
    reference: Variant
    floor: Callable[[Bench], tuple[float, float]]
    tolerance: tuple[float, float]


def cases(ops: Sequence[str], shapes: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The cases of some operations at some sets of shapes."""
    heads = [sizes for name in shapes for sizes in HEADS[name]]
    rollouts = [sizes for name in shapes for sizes in ROLLOUTS[name]]
    makers: dict[str, list[Case]] = {}
    for op in ops:
        maker = MAKERS[op]
        makers[op] = [maker(sizes, device, dtype) for sizes in (rollouts if op in ("K5", "K6") else heads)]
    return [case for op in ops for case in makers[op]]


# ------------------------------------------------------------------ from logits, from hidden states
def token_stats(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Case:
    """K1: log-prob and entropy."""
    rows, _, vocabulary = sizes

    def make(count: int) -> Inputs:
        draw = Draw(device)
        return {"logits": draw.normal(count, vocabulary).to(dtype), "labels": draw.below(vocabulary, count)}

    def ours(logits: Tensor, labels: Tensor, impl: str) -> Outputs:
        stats = K.token_stats(logits, labels, entropy=True, impl=impl)
        assert stats.entropy is not None
        return stats.logp, stats.entropy

    traffic = rows * vocabulary * dtype.itemsize
    return Case(
        "K1",
        "token_stats: logp, entropy",
        f"[{rows}, {vocabulary}]",
        rows,
        64,
        make,
        ("logits",),
        {"eager": base.token_stats, "torch.compile": compiled(base.token_stats), **own("token_stats", ours, device)},
        partial(ours, impl="reference"),
        lambda bench: (traffic / bench.bandwidth, 3 * traffic / bench.bandwidth),
        TOLERANCES[dtype],
    )


def head_inputs(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Callable[[int], Inputs]:
    """Hidden states, weight and labels for so many rows."""
    _, hidden, vocabulary = sizes

    def make(count: int) -> Inputs:
        draw = Draw(device)
        return {
            "hidden": draw.normal(count, hidden).to(dtype),
            "weight": (draw.normal(vocabulary, hidden) / hidden**0.5).to(dtype),
            "labels": draw.below(vocabulary, count),
        }

    return make


def head_case(
    op: str,
    name: str,
    sizes: Sequence[int],
    dtype: torch.dtype,
    make: Callable[[int], Inputs],
    variants: dict[str, Variant | str],
    reference: Variant,
) -> Case:
    """A case whose floor is the three products of a head."""
    rows, hidden, vocabulary = sizes
    shape = f"[{rows}, {hidden}, {vocabulary}]"
    floor = partial(Bench.gemms, rows=rows, hidden=hidden, vocabulary=vocabulary, dtype=dtype)
    return Case(op, name, shape, rows, 64, make, ("hidden", "weight"), variants, reference, floor, TOLERANCES[dtype])


def linear_token_logprobs(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Case:
    """K2: log-prob from hidden states, with logits kept and recomputed."""

    def ours(impl: str, save: str = "logits", **inputs: Any) -> Outputs:
        return (K.linear_token_logprobs(**inputs, save=save, impl=impl).logp,)

    variants = {
        "eager": single(base.linear_logp),
        "torch.compile": compiled(single(base.linear_logp)),
        "F.linear_cross_entropy": single(base.torch_linear_cross_entropy),
        "Liger": other("liger_kernel", base.liger_logp),
        "CCE": other("cut_cross_entropy", base.cce_logp),
        **own("linear_token_logprobs", ours, device, ", logits kept"),
        **own("linear_token_logprobs", partial(ours, save="recompute"), device, ", recomputed"),
    }
    make, reference = head_inputs(sizes, device, dtype), partial(ours, impl="reference")
    return head_case("K2", "linear_token_logprobs", sizes, dtype, make, variants, reference)


def linear_policy_loss(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Case:
    """K3: PPO's loss from hidden states."""
    plain = head_inputs(sizes, device, dtype)

    def make(count: int) -> Inputs:
        inputs, draw = plain(count), Draw(device, seed=1)
        logp = base.linear_logp(**inputs)
        return inputs | {"old_logp": logp + draw.normal(count) / 10, "advantages": draw.normal(count)}

    def ours(impl: str, **inputs: Any) -> Outputs:
        mask = torch.ones_like(inputs["labels"], dtype=torch.bool)
        return (K.linear_policy_loss(**inputs, mask=mask, impl=impl).loss,)

    naive = single(base.policy_loss)
    variants = {"eager": naive, "torch.compile": compiled(naive), **own("linear_policy_loss", ours, device)}
    return head_case("K3", "linear_policy_loss", sizes, dtype, make, variants, partial(ours, impl="reference"))


def preference_logps(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Case:
    """K4: log-probs summed over sequences of 32 tokens."""
    plain = head_inputs(sizes, device, dtype)

    def make(count: int) -> Inputs:
        return plain(count) | {"seq_ids": torch.arange(count, device=device) // 32}

    def ours(impl: str, **inputs: Any) -> Outputs:
        return (K.preference_logps(**inputs, num_seqs=len(inputs["labels"]) // 32, impl=impl)[0],)

    def naive(**inputs: Any) -> Outputs:
        return (base.preference_logps(**inputs, num_seqs=len(inputs["labels"]) // 32),)

    variants = {"eager": naive, "torch.compile": compiled(naive), **own("preference_logps", ours, device)}
    return head_case("K4", "preference_logps", sizes, dtype, make, variants, partial(ours, impl="reference"))


# ------------------------------------------------------------------ scans
def gae(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Case:
    """K5: advantages of padded rollouts of different lengths; float32 whatever the model's dtype."""
    rows, length = sizes

    def ours(impl: str, **inputs: Any) -> Outputs:
        return K.gae(**inputs, gamma=GAMMA, lam=LAM, impl=impl)

    loop, doubling, triangular = (
        partial(function, gamma=GAMMA, lam=LAM) for function in (base.gae_loop, base.gae_doubling, base.gae_triangular)
    )

    variants = {
        "loop over time": loop,
        "eager: doubling": doubling,
        "eager: triangular": triangular,
        "torch.compile: doubling": compiled(doubling),
        **own("gae", ours, device),
    }
    return Case(
        "K5",
        "gae",
        f"[{rows}, {length}]",
        rows,
        min(rows, 4),
        rollout_inputs(length, device, ("rewards", "values")),
        (),
        variants,
        partial(ours, impl="reference"),
        lambda bench: (17 * rows * length / bench.bandwidth,) * 2,  # two float32 and a byte in, two float32 out
        TOLERANCES[torch.float32],
    )


def shaped_advantages(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Case:
    """K6: KL reward, score, advantages, whitening; float32 whatever the model's dtype."""
    rows, length = sizes
    tokens = rollout_inputs(length, device, ("logp", "ref_logp", "values"))

    def ours(impl: str, **inputs: Any) -> Outputs:
        return K.shaped_advantages(**inputs, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM, impl=impl)[:2]

    naive = partial(base.shaped, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM)
    return Case(
        "K6",
        "shaped_advantages",
        f"[{rows}, {length}]",
        rows,
        min(rows, 4),
        lambda count: tokens(count) | {"scores": Draw(device, seed=1).normal(count)},
        (),
        {"eager: one by one": naive, "torch.compile": compiled(naive), **own("shaped_advantages", ours, device)},
        partial(ours, impl="reference"),
        lambda bench: (34 * rows * length / bench.bandwidth,) * 2,  # 13 bytes a token in, 12 out, 9 to whiten
        TOLERANCES[torch.float32],
    )


def rollout_inputs(length: int, device: torch.device, names: Sequence[str]) -> Callable[[int], Inputs]:
    """Per-token numbers and a mask of completions that end anywhere in the second half."""

    def make(count: int) -> Inputs:
        draw = Draw(device)
        numbers = {name: draw.normal(count, length) for name in names}
        lengths = length - draw.below(length // 2 + 1, count)
        return numbers | {"mask": torch.arange(length, device=device) < lengths[:, None]}

    return make


MAKERS: dict[str, Callable[[Sequence[int], torch.device, torch.dtype], Case]] = {
    "K1": token_stats,
    "K2": linear_token_logprobs,
    "K3": linear_policy_loss,
    "K4": preference_logps,
    "K5": gae,
    "K6": shaped_advantages,
}


# ------------------------------------------------------------------ pieces
class Draw:
    """The same random numbers in every run."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def below(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), device=self.device, generator=self.generator)


def own(op: str, call: Variant, device: torch.device, suffix: str = "") -> dict[str, Variant | str]:
    """This project's implementations that can run on the device, but for the reference."""
    found: dict[str, Variant | str] = {}
    for impl in ("triton", "native"):
        problem = K.why_not(op, impl, device)
        found[f"ours: {impl}{suffix}"] = partial(call, impl=impl) if problem is None else problem
    return found
