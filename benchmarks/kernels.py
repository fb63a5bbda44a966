"""Time and memory of the fused operations against their floors and against others: ``python -m benchmarks.kernels``.

    python -m benchmarks.kernels                      # playground and CPU shapes on a CPU, Llama's head on a GPU
    python -m benchmarks.kernels --ops K5,K6 --quick  # some operations, few runs

Every variant is first compared with the float64 reference on a slice; one outside its tolerance is listed as wrong and
gets no time. Floors, the bandwidth of a copy and the rate of a head's three products, come from the same run, and
variants take turns, so that they meet the same load. Writes JSON with all samples, a table and a figure.
"""

import argparse
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    out.add_argument("--ops", default="K1,K2,K3,K4,K5,K6", help="operations (default: all)")
    out.add_argument("--shapes", help="small, cpu, llama, qwen or sweep; default small,cpu or, on a GPU, llama")
    out.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default fp32 or, on a GPU, bf16")
    out.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    out.add_argument("--runs", type=int, default=20, help="timed runs of each variant (default: 20)")
    out.add_argument("--quick", action="store_true", help="5 runs, and nothing is compiled")
    out.add_argument("--out", help="folder (default: benchmarks/results)")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the command line ``argv``: 1 if a variant of this project is wrong, 2 for a wrong call."""
    if __spec__ is None:  # as a script this file would be a module named kernels, first on the path
        print("this is a module: run `python -m benchmarks.kernels` from the project's folder", file=sys.stderr)
        return 2
    options = parser().parse_args(argv)
    from benchmarks.kernel_run import run

    return run(options)


if __name__ == "__main__":
    raise SystemExit(main())
