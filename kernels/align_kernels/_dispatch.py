"""Which implementation of an operation runs: the ``impl`` argument, else ``ALIGN_KERNELS``, else by device.

``ALIGN_KERNELS`` holds one of ``auto``, ``triton``, ``native`` and ``reference``, and exceptions by operation:
``ALIGN_KERNELS=auto,gae=native``. It is read when the package is imported. An explicit wish that cannot be met is an
error; only ``auto`` substitutes ``native`` for a Triton that does not work, with one warning.
"""

import functools
import os
import warnings

import torch

from align_kernels import _checks

OPERATIONS = (
    "token_stats",
    "linear_token_logprobs",
    "linear_policy_loss",
    "preference_logps",
    "gae",
    "shaped_advantages",
)
IMPLEMENTATIONS = ("triton", "native", "reference")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENVIRONMENT = os.environ.get("ALIGN_KERNELS", "auto")


def choose(op: str, device: torch.device, dtype: torch.dtype, impl: str | None) -> str:
    """The implementation of ``op`` for tensors on ``device``: ``triton``, ``native`` or ``reference``.

    Args:
        op: One of :data:`OPERATIONS`.
        device: Where the tensors are.
        dtype: Of the logits, hidden states or rewards.
        impl: The caller's wish, or None.

    Raises:
        ValueError: The wish is no implementation.
        RuntimeError: The wish, of the caller or the environment, cannot run here.
    """
    source = "impl"
    if impl is None:
        impl, source = _from_environment(op), "ALIGN_KERNELS"
    else:
        _checks.one_of("impl", impl, ("auto", *IMPLEMENTATIONS))
    if impl != "auto":
        problem = why_not(op, impl, device, dtype)
        if problem is not None:
            raise RuntimeError(f"{source} asks for {impl!r} in {op}, which cannot run here: {problem}")
        return impl
    if device.type != "cuda" or dtype == torch.float64:
        return "native"
    problem = _triton_problem(device.type, device.index)
    if problem is None:
        return "triton"
    _warn_once(f"align_kernels runs the native implementations on {device}: {problem}")
    return "native"


# What torch.compiler.assume_constant_result sets: called at trace time, never traced. The decorator itself would import
# the compiler, and Triton with it.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def available_impls(op: str, device: torch.device | str) -> list[str]:
    """Implementations of ``op`` that can run on ``device``; the first is the one that would run, unless told otherwise.

    :func:`why_not` says why another is missing.
    """
    _checks.one_of("op", op, OPERATIONS)
    device = torch.device(device)
    usable = [impl for impl in IMPLEMENTATIONS if why_not(op, impl, device) is None]
    first = choose(op, device, torch.float32, None)
    return [first, *(impl for impl in usable if impl != first)]


def why_not(op: str, impl: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why ``impl`` of ``op`` cannot run for ``dtype`` tensors on ``device``, or None where it can."""
    _checks.one_of("op", op, OPERATIONS)
    _checks.one_of("impl", impl, IMPLEMENTATIONS)
    device = torch.device(device)
    if impl != "triton":
        return None
    if dtype not in TRITON_DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
    return _triton_problem(device.type, device.index)


def interpreting() -> bool:
    """Whether Triton interprets kernels, on CPU tensors, in this process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _from_environment(op: str) -> str:
    wishes = _parse(ENVIRONMENT)
    return wishes.get(op, wishes[""])


@functools.cache
def _parse(text: str) -> dict[str, str]:
    """Implementation by operation; the key "" is the rest."""
    wishes = {"": "auto"}
    for part in filter(None, (part.strip() for part in text.split(","))):
        op, _, impl = part.rpartition("=")
        if (op and op not in OPERATIONS) or impl not in ("auto", *IMPLEMENTATIONS):
            raise RuntimeError(
                f"ALIGN_KERNELS={text!r}: {part!r} is not understood; write auto, triton, native or reference, and "
                f"exceptions as OPERATION=IMPLEMENTATION with one of {', '.join(OPERATIONS)}"
            )
        wishes[op] = impl
    return wishes


@functools.cache
def _triton_problem(device_type: str, index: int | None) -> str | None:
    """Why Triton kernels cannot run on a device; found out once by running one."""
    if device_type != "cuda" and not (device_type == "cpu" and interpreting()):
        return f"there are no Triton kernels for {device_type} tensors"
    try:
        from align_kernels import _probe

        _probe.run(torch.device(device_type) if index is None else torch.device(device_type, index))
    except Exception as error:  # whatever a driver, compiler or missing package may raise is a reason
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
