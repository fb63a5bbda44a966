"""A kernel of one line, compiled and run once per device to see whether Triton works there."""

import torch
import triton
import triton.language as tl


@triton.jit
def _increment(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def run(device: torch.device) -> None:
    """Compiles and launches the kernel on ``device``; raises whatever goes wrong."""
    x = torch.zeros(1, dtype=torch.int32, device=device)
    _increment[(1,)](x, enable_fp_fusion=False)
    if int(x) != 1:
        raise RuntimeError(f"a kernel that adds 1 to 0 returned {int(x)}")
