"""Time, peak memory and the floors they are compared with, on a CPU or a GPU."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

MIB = 2**20
SHORT = 2e-3  # seconds: what takes less is run several times between two looks at the clock


@dataclass
class Samples:
    """Seconds of each run of forward, and of both passes, and the peaks of memory above what was there before.

    ``cpu`` are the processor's seconds of both passes, which what else the machine does disturbs less; empty on a GPU.
    """

    forward: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    forward_bytes: int = 0
    total_bytes: int = 0


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
    def time(self, run: Callable[[], object], repeats: int = 1) -> float:
        """Seconds of one run: by events on a GPU, whose second-level cache is emptied before, else by the clock."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start) / repeats
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
        samples, repeats = {}, {}
        for name, work in variants.items():
            work.both()
            repeats[name] = 1 + min(200, int(SHORT / self.time(work.both)))
            samples[name] = Samples(forward_bytes=self.peak(work.forward), total_bytes=self.peak(work.both))
        for _ in range(self.runs):
            for name, work in variants.items():
                cpu = time.process_time()
                samples[name].total.append(self.time(work.both, repeats[name]))
                if not self.cuda:
                    samples[name].cpu.append((time.process_time() - cpu) / repeats[name])
                if work.leaves:
                    samples[name].forward.append(self.time(work.forward, repeats[name]))
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
        level = highest = 0
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
            level += event["args"]["Bytes"]
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

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs."""
        return self.call(**self.inputs)

    def both(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The outputs and the gradients of the leaves."""
        outputs = self.forward()
        if not self.leaves:
            return outputs, ()
        return outputs, torch.autograd.grad(outputs, [self.inputs[name] for name in self.leaves], self.upstream)
