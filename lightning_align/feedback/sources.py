"""From a name on the command line or in a configuration to a judge."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning_align.errors import UserError
from lightning_align.feedback.judges import FunctionJudge, Judge, PairJudge
from lightning_align.feedback.models import LanguageModel, LocalModel
from lightning_align.feedback.wording_file import read_wording
from lightning_align.plugins import is_function, load_function

Kind = Literal["endpoint", "function", "model"]


def kind_of_judge(source: str) -> Kind:
    """How a source is read: an address, a function of the user's, or a run, a path or a hub id."""
    if source.startswith(("http://", "https://")):
        return "endpoint"
    return "function" if is_function(source) else "model"


def load_language_model(
    source: str, *, dtype: str = "auto", batch_size: int = 128, endpoint: dict[str, Any] | None = None
) -> LanguageModel:
    """A model that can be asked.

    Args:
        source: A run directory, a path, a hub id, or ``http(s)://host:port/v1#model-name``.
        dtype: Of the weights of a model in this process.
        batch_size: Most sequences that it reads at a time.
        endpoint: Options of :class:`~lightning_align.feedback.endpoint.EndpointModel`.
    """
    if kind_of_judge(source) == "endpoint":
        from lightning_align.feedback.endpoint import EndpointModel  # httpx, which others do not need

        return EndpointModel(source, **(endpoint or {}))
    return LocalModel.load(source, dtype=dtype, batch_size=batch_size)


def load_judge(
    source: str,
    wording: str = "default",
    *,
    principles_of: Sequence[str] | None = None,
    loading: dict[str, Any] | None = None,
    **options: Any,
) -> PairJudge:
    """A judge of pairs.

    Args:
        source: As for :func:`load_language_model`; or ``package.module.function`` or ``file.py:function``, see
            :class:`FunctionJudge`.
        wording: See :func:`~lightning_align.feedback.wording_file.read_wording`; functions have no use for it.
        principles_of: Principles instead of the wording's own.
        loading: Options of :func:`load_language_model`.
        options: Of :class:`Judge`.
    """
    if kind_of_judge(source) == "function":
        if options.get("rationale_tokens"):
            raise UserError(f"judge {source} is a function, which gives no chain of thought: leave it out")
        return FunctionJudge(load_function(source, "judge"), source, bounds=options.get("bounds"))
    read = read_wording(wording)
    if principles_of is not None:
        read = read.with_principles(principles_of)
    return Judge(load_language_model(source, **(loading or {})), read, **options)
