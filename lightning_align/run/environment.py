"""What a run ran on: versions, hardware, the commit of the code."""

import platform
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import lightning_align

_VERSIONED = ("torch", "lightning", "transformers", "tokenizers", "datasets", "jsonargparse", "numpy", "wandb")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it stands on."""
    found = {"python": platform.python_version(), "lightning_align": lightning_align.__version__}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What the run had at its disposal."""
    import torch

    return {
        "machine": platform.machine(),
        "cpu_cores": len(psutil.Process().cpu_affinity()) if platform.system() == "Linux" else psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def peak_memory() -> dict[str, int]:
    """The most that this process has used so far, in bytes, and of each GPU the most that tensors took."""
    import torch

    peaks = {"process_bytes": _peak_of_process()}
    if torch.cuda.is_available():
        peaks["gpu_bytes"] = max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    return peaks


def _peak_of_process() -> int:
    # getrusage counts the parent's memory too, up to the exec: it is the second choice
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def git_commit() -> str | None:
    """Commit of the checkout this package lies in, with ``+changes`` when it is dirty; None outside a checkout."""
    folder = Path(lightning_align.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # an installed package inside somebody else's repository is not described by that repository's commit
    if commit is None or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
