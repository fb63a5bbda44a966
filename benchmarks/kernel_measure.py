"""Time, peak memory and the floors they are compared with, on a CPU or a GPU."""

import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

MIB = 2**20


@dataclass
class Samples:
    """Seconds of each run, apart for forward and backward, and the peak of memory above what was there before."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    forward_bytes: int = 0
    backward_bytes: int = 0

    @property
    def total(self) -> list[float]:
        """Seconds of forward and backward together, run by run."""
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)] if self.backward else self.forward

    @property
    def peak(self) -> int:
        """Bytes above the inputs."""
        return max(self.forward_bytes, self.backward_bytes)


def quantiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """10 %, 50 % and 90 % of some runs."""
    if len(seconds) < 2:
        return seconds[0], seconds[0], seconds[0]
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], statistics.median(seconds), tenths[8]


class Bench:
    """Measures on one device.

    Args:
        device: Where.
        runs: Timed runs of each variant.
    """

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device, self.runs = device, runs
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(256 * MIB, dtype=torch.uint8, device=device) if self.cuda else None
        self._gemms: dict[tuple[int, int, int, torch.dtype], tuple[float, float]] = {}
        self.bandwidth = self._bandwidth()

    # ------------------------------------------------------------------ floors
    def _bandwidth(self) -> float:
        """Bytes per second of a copy that reads and writes a GiB in all."""
        source = torch.empty(512 * MIB, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source).fill_(0)
        return 2 * source.numel() / min(self.time(lambda: target.copy_(source)) for _ in range(5))

    def gemms(self, rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> tuple[float, float]:
        """Seconds of the product that makes the logits, and of it together with the two that make the gradients."""
        key = (rows, hidden, vocabulary, dtype)
        if key not in self._gemms:
            states = torch.randn(rows, hidden, device=self.device).to(dtype)
            weight = torch.randn(vocabulary, hidden, device=self.device).to(dtype)
            logits = states @ weight.T
            products: list[Callable[[], Tensor]] = [
                lambda: torch.mm(states, weight.T, out=logits),
                lambda: logits @ weight,
                lambda: logits.T @ states,
            ]
            times = [min(self.time(product) for _ in range(4)) for product in products]
            self._gemms[key] = (times[0], sum(times))
        return self._gemms[key]

    # ------------------------------------------------------------------ time
    def time(self, run: Callable[[], object]) -> float:
        """Seconds of one run: by events on a GPU, whose second-level cache is emptied before, else by the clock."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        assert self._flush is not None
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3

    def interleaved(self, variants: dict[str, "Pass"]) -> dict[str, Samples]:
        """Every variant in turn, round by round, so that a change of clock or of load meets all of them."""
        samples = {name: Samples() for name in variants}
        for name, work in variants.items():
            work.forward()
            work.backward()
            samples[name].forward_bytes = self.peak(work.forward)
            samples[name].backward_bytes = self.peak(work.backward) if work.has_backward else 0
            work.release()
        for _ in range(self.runs):
            for name, work in variants.items():
                samples[name].forward.append(self.time(work.forward))
                if work.has_backward:
                    samples[name].backward.append(self.time(work.backward))
                work.release()
        return samples

    # ------------------------------------------------------------------ memory
    def peak(self, run: Callable[[], object]) -> int:
        """Bytes allocated at the most during a run, above those before."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
        level = highest = 0
        for _, change in changes:
            level += change
            highest = max(highest, level)
        return highest


class Pass:
    """Forward and backward of one variant on given inputs; gradients are of Σ outputs · ``upstream``.

    Args:
        call: Inputs to outputs.
        inputs: Arguments by name.
        leaves: Names of the inputs that get a gradient; none: there is no backward pass.
        upstream: One for each output.
    """

    def __init__(
        self,
        call: Callable[..., tuple[Tensor, ...]],
        inputs: dict[str, Tensor],
        leaves: Sequence[str],
        upstream: Sequence[Tensor],
    ) -> None:
        self.call, self.leaves, self.upstream = call, list(leaves), upstream
        self.inputs = {name: x.detach().requires_grad_(name in leaves) for name, x in inputs.items()}
        self.has_backward = bool(self.leaves)
        self.outputs: tuple[Tensor, ...] = ()
        self.gradients: tuple[Tensor, ...] = ()

    def forward(self) -> None:
        """Computes the outputs."""
        self.outputs = self.call(**self.inputs)

    def backward(self) -> None:
        """Computes the gradients of the leaves."""
        if self.has_backward:
            leaves = [self.inputs[name] for name in self.leaves]
            self.gradients = torch.autograd.grad(self.outputs, leaves, self.upstream)

    def release(self) -> None:
        """Lets go of outputs and gradients."""
        self.outputs, self.gradients = (), ()


# ------------------------------------------------------------------ where it ran
def machine(device: torch.device) -> dict[str, str]:
    """What a reader must know to compare figures."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "threads": str(torch.get_num_threads())}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    if commit:
        facts["commit"] = commit
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        query = "clocks.sm,clocks.mem,temperature.gpu,driver_version"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"]
        facts[query] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return facts
    facts["device"] = processor()
    return facts


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
