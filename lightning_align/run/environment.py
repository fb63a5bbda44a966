"""What a run ran on: versions, hardware, the commit of the code."""

import platform
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
