"""Scan operations in C for CPU tensors: one pass over the data from the right, where tensor operations need dozens.

``scan.c`` is compiled by the system's C compiler at first use (a third of a second), kept in the user's cache folder
and called through ctypes. Without a compiler, or with ``ALIGN_KERNELS_CPU_COMPILE=0``, ``scan_tensors`` does the same
from tensor operations; :func:`problem` says so.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from align_kernels.scan_checks import result_dtype

SOURCE = Path(__file__).with_name("scan.c")
FLAGS = ("-O3", "-shared", "-fPIC")
REALS = {torch.float32: "float", torch.float64: "double"}
MODES = {"skip": 0, "stop": 1, "dense": 2}
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2}
TOKENS_PER_THREAD = 2**16  # below that a thread costs more than it saves

_POINTER, _INT, _REAL, _ENUM = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int32
_ROWS = (_POINTER, _INT)  # a tensor and its row stride
ARGUMENTS = {
    "gae": (*_ROWS * 5, _POINTER, _POINTER, _INT, *[_REAL] * 4, _ENUM, _POINTER, _POINTER, _INT, _INT),
    "shaped": (*_ROWS * 4, *[_POINTER] * 3, _INT, *[_REAL] * 4, _ENUM, *[_POINTER] * 5, _INT, _INT),
    "whiten": (*[_POINTER] * 3, _INT, _ENUM, _ENUM, _POINTER, _INT, _INT),
}


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    log_rho: Tensor | None,
    *,
    gamma: float,
    lam: float,
    mask_mode: str,
    rho_bar: float,
    c_bar: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns; arguments as in :func:`align_kernels.gae`."""
    call = _Call(rewards, cu_seqlens, rewards, values)
    advantages, returns = call.empty(), call.empty()
    inputs = (
        *call.rows(rewards),
        *call.rows(values),
        *call.flags(mask),
        *call.flags(dones),
        *call.rows(log_rho),
        call.flat(bootstrap),
    )
    scalars = (gamma, lam, rho_bar, c_bar, MODES[mask_mode])
    call.run("gae", *inputs, *call.bounds, *scalars, advantages.data_ptr(), returns.data_ptr())
    return advantages, returns


def shaped(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    kl_coef: float,
    kl_estimator: str,
    score_clip: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards, Σ KL ``[S]`` and moments ``[S, 3]``: shaped_advantages before its whitening."""
    call = _Call(logp, cu_seqlens, logp, ref_logp, values)
    out = (call.empty(), call.empty(), call.empty(), call.empty(len(scores)), call.empty(len(scores), 3))
    inputs = (
        *call.rows(logp),
        *call.rows(ref_logp),
        *call.rows(values),
        *call.flags(mask),
        call.flat(scores),
        call.flat(bootstrap),
    )
    scalars = (kl_coef, score_clip, gamma, lam, ESTIMATORS[kl_estimator])
    call.run("shaped", *inputs, *call.bounds, *scalars, *(x.data_ptr() for x in out))
    return out


def whiten_(values: Tensor, mask: Tensor, partials: Tensor, *, whiten: bool, shift_mean: bool) -> Tensor:
    """Whitens contiguous ``values`` in place by moments ``[S, 3]``, if asked to; returns (mean, biased variance)."""
    call = _Call(values.view(1, -1), None, values)
    flags, _ = call.flags(mask.reshape(1, -1))
    stats = call.empty(2)
    moments = (partials.data_ptr(), len(partials), int(whiten), int(shift_mean), stats.data_ptr())
    call.run("whiten", values.data_ptr(), flags, *moments, count=values.numel())
    return stats


@functools.cache
def problem() -> str | None:
    """Why the compiled functions cannot be used, or None if they can. Found out once, by compiling them."""
    if os.environ.get("ALIGN_KERNELS_CPU_COMPILE", "1") == "0":
        return "ALIGN_KERNELS_CPU_COMPILE=0 turns compiled code off"
    try:
        for dtype in REALS:
            library(dtype)
    except OSError as error:
        return str(error)
    return None


# ------------------------------------------------------------------ calling
class _Call:
    """Tensors as C sees them. Converted copies live as long as the call does."""

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None, *operands: Tensor) -> None:
        self.tokens, self.dtype = tokens, result_dtype(*operands)
        self.alive: list[Tensor] = []
        self.num_sequences = len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1
        bounds = None if cu_seqlens is None else self._hold(cu_seqlens.long())
        self.bounds = (bounds, tokens.shape[-1])

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape or self.tokens.shape, dtype=self.dtype)

    def rows(self, x: Tensor | None) -> tuple[int | None, int]:
        """Pointer and row stride of per-token numbers."""
        return (None, 0) if x is None else self._rows(x.to(self.dtype))

    def flags(self, x: Tensor | None) -> tuple[int | None, int]:
        """Pointer and row stride of a boolean or uint8 tensor."""
        return (None, 0) if x is None else self._rows(x.view(torch.uint8))

    def flat(self, x: Tensor | None) -> int | None:
        """Pointer to one number per sequence."""
        return None if x is None else self._hold(x.to(self.dtype))

    def run(self, name: str, *arguments: object, count: int | None = None) -> None:
        """Calls a function on all sequences, or on ``count`` tokens, spread over torch's number of threads."""
        function = getattr(library(self.dtype), name)
        count = self.num_sequences if count is None else count
        threads = max(1, min(torch.get_num_threads(), count, self.tokens.numel() // TOKENS_PER_THREAD))
        bounds = [count * i // threads for i in range(threads + 1)]
        if threads == 1:
            function(*arguments, 0, count)
            return
        with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter during a call
            list(pool.map(lambda i: function(*arguments, bounds[i], bounds[i + 1]), range(threads)))

    def _rows(self, x: Tensor) -> tuple[int, int]:
        return self._hold(x), x.stride(0) if x.dim() == 2 else 0

    def _hold(self, x: Tensor) -> int:
        self.alive.append(x)
        return x.data_ptr()


# ------------------------------------------------------------------ compiling
@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled functions for float32 or float64 data.

    Raises:
        OSError: There is no compiler, it failed, or what it made cannot be loaded.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler: install gcc or clang, or name one in CC")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS, platform.platform())).encode()).hexdigest()
    name = f"scan-{REALS[dtype]}-{key[:16]}.so"
    folder = cache_folder()
    with contextlib.nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory() as place:
        loaded = _loaded(Path(place), name, compiler, REALS[dtype])
    for function, types in ARGUMENTS.items():
        if not hasattr(loaded, function):
            raise OSError(f"what {compiler} made of {SOURCE.name} has no function {function}: name a C compiler in CC")
        getattr(loaded, function).argtypes = types
        getattr(loaded, function).restype = None
    return loaded


def cache_folder() -> Path | None:
    """The user's folder for compiled code, ``align_kernels`` in ``XDG_CACHE_HOME`` or ``~/.cache``; None without."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "align_kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that cannot be written to, or none at all
        return None
    return folder if os.access(folder, os.W_OK) else None


def _loaded(folder: Path, name: str, compiler: str, real: str) -> ctypes.CDLL:
    """The library ``name`` in ``folder``, compiled if it is not there or is damaged; processes may race for it."""
    target = folder / name
    if target.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(target))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / name
        command = [*compiler.split(), *FLAGS, f"-DREAL={real}", str(SOURCE), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{compiler} cannot compile {SOURCE.name}: {' '.join(done.stderr.split())[:500]}")
        made.replace(target)
    return ctypes.CDLL(str(target))
