"""What `aot_check.py --self-test` compiles: a healthy kernel, one that spills and one without types."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "V", "stride"])
def online_softmax_logp(logits_ptr, labels_ptr, logp_ptr, ent_ptr, N, V, stride, inv_temp, BLOCK: tl.constexpr):
    """log p(label) and entropy of each row, one pass over the vocabulary, nothing materialised."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * stride
    label = tl.load(labels_ptr + row)
    offs = tl.arange(0, BLOCK)
    NEG: tl.constexpr = float("-inf")
    m = tl.full((), NEG, tl.float32)  # running maximum
    s = tl.full((), 0.0, tl.float32)  # sum exp(x - m)
    t = tl.full((), 0.0, tl.float32)  # sum exp(x - m) * (x - m)
    for start in range(0, V, BLOCK):
        cols = start + offs
        ok = cols < V
        x = tl.load(base + cols, mask=ok, other=0.0).to(tl.float32) * inv_temp
        x = tl.where(ok, x, NEG)  # after the scaling: a transform must not revive the padding
        m_new = tl.maximum(m, tl.max(x, 0))
        ref = tl.where(m_new == NEG, 0.0, m_new)
        delta = tl.where(m == NEG, 0.0, m - ref)
        scale = tl.where(m == NEG, 0.0, tl.exp(delta))
        d = x - ref
        e = tl.exp(d)
        t = scale * (t + s * delta) + tl.sum(tl.where(e > 0.0, e * d, 0.0), 0)
        s = scale * s + tl.sum(e, 0)
        m = m_new
    inside = (label >= 0) & (label < V)
    picked = tl.load(base + tl.where(inside, label, 0)).to(tl.float32) * inv_temp
    logp = (picked - m) - tl.log(s)
    tl.store(logp_ptr + row, tl.where(inside, logp, 0.0))
    tl.store(ent_ptr + row, tl.log(s) - t / s)


@triton.jit
def hungry(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """One warp holding 256 values per thread across a reduction: spills, so must be refused."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x / tl.sum(x, 0))


SIG = {
    "logits_ptr": "*bf16",
    "labels_ptr": "*i64",
    "logp_ptr": "*fp32",
    "ent_ptr": "*fp32",
    "N": "i64",
    "V": "i32",
    "stride": "i64",
    "inv_temp": "fp32",
}
AOT_SPECS = [
    {
        "name": f"online_softmax_logp[bf16,BLOCK={b},w={w}]",
        "fn": online_softmax_logp,
        "signature": SIG,
        "constexprs": {"BLOCK": b},
        "divisible": ("logits_ptr", "labels_ptr", "logp_ptr", "ent_ptr"),
        "num_warps": w,
        "num_stages": 2,
        "limits": {"regs": 128, "spill": 0, "shared": 49152},
    }
    for b, w in ((1024, 4), (4096, 8))
]
EXPECT_OVER = [
    {
        "name": "hungry",
        "fn": hungry,
        "signature": {"x_ptr": "*fp32", "y_ptr": "*fp32"},
        "constexprs": {"BLOCK": 8192},
        "divisible": ("x_ptr", "y_ptr"),
        "num_warps": 1,
        "num_stages": 1,
        "limits": {"regs": 64, "spill": 0},
        "targets": ("sm_90",),
    }
]
EXPECT_FAIL = [
    {
        "name": "missing type",
        "fn": online_softmax_logp,
        "signature": {"logits_ptr": "*bf16"},
        "constexprs": {"BLOCK": 1024},
        "targets": ("sm_90",),
    }
]
