"""K1 in Triton: statistics of rows of logits in one pass, and their gradient in another.

Running state of a row: maxima m, m′ of policy x and reference y; s = Σe^(x−m), t = Σe^(x−m)(x−m),
u = Σe^(x−m)((x−m) − (y−m′)), s′ = Σe^(y−m′). When m grows by −δ and m′ by −δ′: u ← e^δ(u + s(δ − δ′)),
t ← e^δ(t + sδ), s ← e^δ s, s′ ← e^δ′ s′. At the end logp = (x_label − m) − log s, H = log s − t/s,
KL = u/s − log s + log s′: nothing subtracts two large numbers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from align_kernels._config import LARGEST, LARGEST_WITH_ALL, launch, warps_for
from align_kernels._labels import IGNORED, locate, only
from align_kernels.native import RowGrads, RowStats, Wanted

SIZES = ["V", "x_stride", "y_stride", "out_stride"]


# ------------------------------------------------------------------ arithmetic of a block
@triton.jit
def transformed(x_ptr, cols, ok, scale, cap, CAPPED: tl.constexpr):
    """z = cap·tanh(x/cap)·scale in float32, without a cap x·scale, and the slope 1 − tanh²; 0 where not ``ok``."""
    x = tl.load(x_ptr + cols, mask=ok, other=0.0).to(tl.float32)
    slope = 1.0
    if CAPPED:
        # tanh by an exponential that cannot overflow
        e = tl.exp(-2.0 * tl.abs(x / cap))
        tanh = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        slope = 1.0 - tanh * tanh
        x = cap * tanh
    return x * scale, slope


@triton.jit
def grown(m, block_max):
    """The new maximum to subtract, what the old one lacks (δ), and e^δ; nothing has been summed where m is −inf."""
    NEG: tl.constexpr = float("-inf")
    m_new = tl.maximum(m, block_max)
    base = tl.where(m_new == NEG, 0.0, m_new)
    delta = tl.where(m == NEG, 0.0, m - base)
    return m_new, base, delta, tl.where(m == NEG, 0.0, tl.exp(delta))


@triton.jit
def one_minus_exp(w):
    """1 − e^w for w ≤ 0, by its series near 0: e^w itself would be lost to rounding there."""
    series = -w * (1.0 + w * (0.5 + w * (1 / 6 + w * (1 / 24 + w * (1 / 120 + w * (1 / 720 + w * (1 / 5040)))))))
    return tl.where(w > -0.3, series, 1.0 - tl.exp(w))


# ------------------------------------------------------------------ kernels
@triton.jit(do_not_specialize=SIZES[:3])
def token_stats_fwd(
    x_ptr,
    y_ptr,
    labels_ptr,
    mask_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    kl_ptr,
    ref_lse_ptr,
    argmax_ptr,
    V,
    x_stride: tl.int64,
    y_stride: tl.int64,
    inv_temperature,
    cap,
    y_inv_temperature,
    y_cap,
    CAPPED: tl.constexpr,
    Y_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    NEG: tl.constexpr = float("-inf")
    row = tl.program_id(0).to(tl.int64)
    scale = tl.full((), inv_temperature, tl.float32)
    cap32 = tl.full((), cap, tl.float32)
    y_scale = tl.full((), y_inv_temperature, tl.float32)
    y_cap32 = tl.full((), y_cap, tl.float32)
    x_row = x_ptr + row * x_stride
    width = V
    if mask_ptr is not None:
        width = tl.where(tl.load(mask_ptr + row) != 0, V, 0)  # a masked row is not read, but its results are written
    m = tl.full((), NEG, tl.float32)
    s = tl.full((), 0.0, tl.float32)
    t = tl.full((), 0.0, tl.float32)
    u = tl.full((), 0.0, tl.float32)
    m_y = tl.full((), NEG, tl.float32)
    s_y = tl.full((), 0.0, tl.float32)
    best = tl.full((), 0, tl.int64)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        ok = cols < V
        x, _ = transformed(x_row, cols, ok, scale, cap32, CAPPED)
        x = tl.where(ok, x, NEG)  # after the transform, which would revive the padding
        block_max = tl.max(x, 0)
        if argmax_ptr is not None:
            best = tl.where(block_max > m, (start + tl.argmax(x, 0)).to(tl.int64), best)
        m, base, delta, shrink = grown(m, block_max)
        d = x - base
        e = tl.exp(d)
        if y_ptr is not None:
            y, _ = transformed(y_ptr + row * y_stride, cols, ok, y_scale, y_cap32, Y_CAPPED)
            y = tl.where(ok, y, NEG)
            m_y, y_base, y_delta, y_shrink = grown(m_y, tl.max(y, 0))
            d_y = y - y_base
            u = tl.where(shrink == 0.0, 0.0, shrink * (u + s * (delta - y_delta)))
            u += tl.sum(tl.where(e > 0.0, e * (d - d_y), 0.0), 0)
            s_y = y_shrink * s_y + tl.sum(tl.exp(d_y), 0)
        if entropy_ptr is not None:
            # e = 0 is dropped before the product: 0·(−inf)
            t = shrink * (t + s * delta) + tl.sum(tl.where(e > 0.0, e * d, 0.0), 0)
        s = shrink * s + tl.sum(e, 0)
    label = tl.load(labels_ptr + row)
    picked, _ = transformed(x_row, label.to(tl.int64), label < width, scale, cap32, CAPPED)
    log_s = tl.log(s)
    tl.store(logp_ptr + row, tl.where(width > 0, (picked - m) - log_s, 0.0))
    tl.store(lse_ptr + row, tl.where(width > 0, m + log_s, 0.0))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(width > 0, log_s - t / s, 0.0))
    if y_ptr is not None:
        log_s_y = tl.log(s_y)
        tl.store(kl_ptr + row, tl.where(width > 0, u / s - log_s + log_s_y, 0.0))
        tl.store(ref_lse_ptr + row, tl.where(width > 0, m_y + log_s_y, 0.0))
    if argmax_ptr is not None:
        tl.store(argmax_ptr + row, tl.where(width > 0, best, 0))


@triton.jit(do_not_specialize=SIZES)
def token_stats_bwd(
    out_ptr,
    x_ptr,
    y_ptr,
    labels_ptr,
    mask_ptr,
    owned_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    kl_ptr,
    ref_lse_ptr,
    grad_logp_ptr,
    grad_lse_ptr,
    grad_entropy_ptr,
    grad_kl_ptr,
    V,
    x_stride: tl.int64,
    y_stride: tl.int64,
    out_stride: tl.int64,
    inv_temperature,
    cap,
    y_inv_temperature,
    y_cap,
    CAPPED: tl.constexpr,
    Y_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.full((), inv_temperature, tl.float32)
    cap32 = tl.full((), cap, tl.float32)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = cols < V
    width = V
    if mask_ptr is not None:
        width = tl.where(tl.load(mask_ptr + row) != 0, V, 0)
    x, slope = transformed(x_ptr + row * x_stride, cols, cols < width, scale, cap32, CAPPED)
    log_p = x - tl.load(lse_ptr + row)
    p = tl.exp(log_p)
    grad_logp = tl.load(grad_logp_ptr + row).to(tl.float32)
    factor = tl.zeros_like(p)
    if grad_lse_ptr is not None:
        factor += tl.load(grad_lse_ptr + row).to(tl.float32)
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + row).to(tl.float32)
        factor -= grad_entropy * (log_p + tl.load(entropy_ptr + row))
    if grad_kl_ptr is not None:
        y_scale = tl.full((), y_inv_temperature, tl.float32)
        y_cap32 = tl.full((), y_cap, tl.float32)
        y, _ = transformed(y_ptr + row * y_stride, cols, cols < width, y_scale, y_cap32, Y_CAPPED)
        log_q = y - tl.load(ref_lse_ptr + row)
        factor += tl.load(grad_kl_ptr + row).to(tl.float32) * (log_p - log_q - tl.load(kl_ptr + row))
    rest = tl.where(p == 0.0, 0.0, p * factor)
    # 1 − p of the label from its log-prob: by subtraction it would be lost to rounding as p nears 1
    complement = one_minus_exp(tl.load(logp_ptr + row))
    is_label = cols == tl.load(labels_ptr + row)
    if owned_ptr is not None:
        is_label = is_label & (tl.load(owned_ptr + row) != 0)
    grad = rest + grad_logp * tl.where(is_label, complement, -p)
    grad = tl.where(width > 0, grad * slope * scale, 0.0)
    tl.store(out_ptr + row * out_stride + cols, grad.to(out_ptr.dtype.element_ty), mask=ok)


# ------------------------------------------------------------------ launches
class TritonRows:
    """The two passes over a chunk of logits, each a launch; see :class:`align_kernels.native.NativeRows`."""

    by_probabilities = False
    in_place = True

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        ref_x: Tensor | None = None,
        *,
        overwrite: bool = False,
        probabilities: bool = False,
        mask: Tensor | None = None,
    ) -> RowStats:
        """Statistics of logits ``[n, V]`` and labels ``[n]`` in ``[0, V)``, 0 in masked rows; ``x`` is only read."""
        rows, wanted = len(x), self.wanted

        def column(needed: bool = True, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty(rows, dtype=dtype, device=x.device) if needed else None

        logp, lse, entropy = column(), column(), column(wanted.entropy)
        kl, ref_lse, argmax = column(wanted.kl), column(wanted.kl), column(wanted.argmax, torch.int64)
        if rows:
            block, warps = launch(x, self.wanted.kl and self.wanted.softcap is not None)
            with torch.cuda.device_of(x):
                token_stats_fwd[(rows,)](
                    x,
                    ref_x,
                    labels,
                    _flags(mask),
                    logp,
                    lse,
                    entropy,
                    kl,
                    ref_lse,
                    argmax,
                    x.shape[1],
                    x.stride(0),
                    0 if ref_x is None else ref_x.stride(0),
                    *self._constants(),
                    **self._options(block, warps),
                )
        assert logp is not None
        assert lse is not None
        return RowStats(logp, lse, entropy, kl, ref_lse, argmax)

    def mark(self, x: Tensor, labels: Tensor, logp: Tensor) -> None:
        """Not for this implementation: its gradient is made from logits."""
        raise NotImplementedError

    def backward(
        self,
        out: Tensor,
        x: Tensor,
        labels: Tensor,
        stats: RowStats,
        grads: RowGrads,
        ref_x: Tensor | None = None,
        *,
        owned: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Writes the gradient with respect to the logits into ``out``, which may be ``x``; zeros in masked rows."""
        if not x.numel():
            return
        block, warps = launch(x, self.wanted.kl and self.wanted.softcap is not None)
        upstream = [None if g is None else g.contiguous() for g in (grads.logp, grads.lse, grads.entropy, grads.kl)]
        with torch.cuda.device_of(x):
            token_stats_bwd[(len(x), triton.cdiv(x.shape[1], block))](
                out,
                x,
                ref_x if grads.kl is not None else None,
                labels,
                _flags(mask),
                _flags(owned),
                stats.logp,
                stats.lse,
                stats.entropy if grads.entropy is not None else None,
                stats.kl if grads.kl is not None else None,
                stats.ref_lse if grads.kl is not None else None,
                *upstream,
                x.shape[1],
                x.stride(0),
                0 if ref_x is None else ref_x.stride(0),
                out.stride(0),
                *self._constants(),
                **self._options(block, warps),
            )

    def _constants(self) -> tuple[float, float, float, float]:
        wanted = self.wanted
        return 1 / wanted.temperature, wanted.softcap or 1.0, 1 / wanted.ref_temperature, wanted.ref_softcap or 1.0

    def _options(self, block: int, warps: int) -> dict[str, Any]:
        return {
            "CAPPED": self.wanted.softcap is not None,
            "Y_CAPPED": self.wanted.ref_softcap is not None,
            "BLOCK": block,
            "num_warps": warps,
            "enable_fp_fusion": True,
        }


def forward(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None, mask: Tensor | None, wanted: Wanted, check: bool
) -> tuple[Tensor, RowStats]:
    """Log-probs of the labels ``[N]``, 0 where outside or masked, and the statistics of the rows, 0 where masked."""
    index, inside = _columns(labels, mask, logits.shape[1], check)
    stats = TritonRows(wanted).forward(logits, index, ref_logits, mask=mask)
    return only(stats.logp, inside), stats


def backward(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    stats: RowStats,
    grads: RowGrads,
    wanted: Wanted,
) -> None:
    """Writes the gradient with respect to ``logits`` into ``out``, which may be ``logits``; zeros in masked rows."""
    index, inside = _columns(labels, mask, logits.shape[1], False)
    grads = grads._replace(logp=only(grads.logp, inside))
    TritonRows(wanted).backward(out, logits, index, stats, grads, ref_logits, mask=mask)


def _columns(labels: Tensor, mask: Tensor | None, width: int, check: bool) -> tuple[Tensor, Tensor | None]:
    # what stands at a masked token does not matter
    return locate(labels if mask is None else torch.where(mask, labels, IGNORED), width, check=check)


def _flags(values: Tensor | None) -> Tensor | None:
    """Booleans as uint8, the one type the kernels are compiled for."""
    return None if values is None else values.contiguous().view(torch.uint8)


# ------------------------------------------------------------------ what tools/aot_check.py compiles
COLUMNS = {f"{name}_ptr": "*fp32" for name in ("logp", "lse", "entropy", "kl", "ref_lse")}
UPSTREAM = {f"grad_{name}_ptr": "*fp32" for name in ("logp", "lse", "entropy", "kl")}
FLAGS = {"labels_ptr": "*i64", "mask_ptr": "*u8", "owned_ptr": "*u8", "argmax_ptr": "*i64"}
RATES = ["inv_temperature", "cap", "y_inv_temperature", "y_cap"]
NO_REFERENCE = "y_ptr kl_ptr ref_lse_ptr grad_kl_ptr"
NO_ENTROPY = "entropy_ptr grad_entropy_ptr"
VARIANTS = (
    ("logp", f"{NO_REFERENCE} {NO_ENTROPY} mask_ptr owned_ptr argmax_ptr grad_lse_ptr", False),
    ("entropy", f"{NO_REFERENCE} mask_ptr owned_ptr argmax_ptr grad_lse_ptr", False),
    ("entropy,kl", "mask_ptr owned_ptr argmax_ptr grad_lse_ptr", False),
    ("everything,softcap", "", True),
)


def _aot_spec(fn: Any, dtype: str, variant: str, absent: str, capped: bool, block: int) -> dict[str, Any]:
    types = dict.fromkeys(("out_ptr", "x_ptr", "y_ptr"), f"*{dtype}") | COLUMNS | UPSTREAM | FLAGS
    types |= dict.fromkeys(SIZES, "i64") | {"V": "i32"} | dict.fromkeys(RATES, "fp32")
    names = fn.arg_names
    constexprs: dict[str, Any] = {"CAPPED": capped, "Y_CAPPED": capped, "BLOCK": block}
    constexprs |= {name: None for name in absent.split() if name in names}
    return {
        "name": f"{fn.__name__}[{variant},{dtype},BLOCK={block}]",
        "fn": fn,
        "signature": {name: kind for name, kind in types.items() if name in names},
        "constexprs": constexprs,
        # a row starts anywhere: only the columns of rows are aligned
        "divisible": [name for name in (*COLUMNS, *UPSTREAM) if name in names and name not in constexprs],
        "num_warps": (warps := warps_for(block)),
        "limits": {"regs": 128 if warps == 4 else 96, "spill": 0, "shared": 49152},
    }


AOT_SPECS = [
    _aot_spec(fn, dtype, variant, absent, capped, min(block, LARGEST_WITH_ALL if capped else LARGEST))
    for fn in (token_stats_fwd, token_stats_bwd)
    for variant, absent, capped in VARIANTS
    for dtype, block in (("bf16", LARGEST), ("fp32", LARGEST), ("fp16", 1024))
]
