"""From the options of :class:`~lightning_align.methods.dpo.DPOModule` to what it minimises; mistakes are said early."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_align.errors import UserError, nearest
from lightning_align.losses.preference import LOSSES, NLL_OPTION, REFERENCE_FREE, accepted_options, bound, kto
from lightning_align.methods.dpo_objectives import PairObjective, Term, UnpairedObjective

KTO = "kto"
# Values of options that mean that nobody has set them: the same as in the constructor.
UNSET: dict[str, Any] = {
    **{"beta": None, "label_smoothing": 0.0, "ipo_average": True, "slic_delta": 1.0, "slic_lambda": 0.1},
    **{"odpo_alpha": 1.0, "dpop_lambda": 50.0, "r_dpo_alpha": 0.02, "simpo_gamma": 0.5, "cpo_alpha": 1.0},
    **{"desirable_weight": 1.0, "undesirable_weight": 1.0, "rpo_alpha": 0.0},
}


def build_objective(
    names: Sequence[str], weights: Sequence[float] | None, options: Mapping[str, Any]
) -> PairObjective | UnpairedObjective:
    """The objective of ``loss_type`` and ``loss_weights``.

    Args:
        names: The losses.
        weights: One each; None for 1.
        options: The keys of :data:`UNSET`.

    Raises:
        UserError: At a loss that does not exist or cannot be mixed, or an option that no loss uses.
    """
    _check_names(names, weights)
    _check_used(names, options)
    if names == [KTO]:
        return UnpairedObjective(**bound(kto, options))
    terms = []
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        nll = 0.0
        if name in NLL_OPTION:
            option = NLL_OPTION[name]
            nll = 1.0 if option is None else options[option]
        terms.append(Term(name, weight, bound(LOSSES[name], options), nll))
    return PairObjective(terms, rpo_alpha=options["rpo_alpha"])


def pair_objective(name: str, **options: Any) -> PairObjective:
    """A single loss of pairs, for methods that make pairs of their samples.

    Raises:
        UserError: If there is none of that name, or it brings a likelihood term along, which is of other data.
    """
    if name == KTO or name in NLL_OPTION:
        raise UserError(f"the loss {name} is not of pairs alone: give sigmoid, ipo, or another of docs/dpo.md")
    objective = build_objective([name], None, {**UNSET, **options})
    assert isinstance(objective, PairObjective)
    return objective


def check_reference(reference: str, names: Sequence[str], cache: str | None) -> str:
    """What log-probs are compared with: ``model``, ``cached`` or ``none``.

    Raises:
        UserError: If the losses need a reference and there is none, or the other way round.
    """
    needed = not set(names) <= REFERENCE_FREE
    found = ("model" if needed else "none") if reference == "auto" else reference
    if needed and found == "none":
        raise UserError(f"model.reference is none, but loss_type {_listed(names)} compares with one: leave it out")
    if not needed and found != "none":
        raise UserError(f"model.reference is {found}, but loss_type {_listed(names)} uses none: leave it out")
    if cache is not None and found != "cached":
        raise UserError(f"model.reference_cache is {cache}, but nothing is cached: set model.reference cached too")
    return found


def _check_names(names: Sequence[str], weights: Sequence[float] | None) -> None:
    known = [*LOSSES, KTO]
    if not names:
        raise UserError(f"model.loss_type is empty: give one or several of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UserError(f"unknown model.loss_type '{name}'{nearest(name, known)} (there are {', '.join(known)})")
    if len(set(names)) < len(names):
        raise UserError(f"model.loss_type names a loss twice ({_listed(names)}): give it once, with its weight")
    if KTO in names and len(names) > 1:
        raise UserError("model.loss_type mixes kto, which learns from single answers, with losses of pairs")
    if weights is not None and len(weights) != len(names):
        raise UserError(f"model.loss_weights has {len(weights)} numbers for {len(names)} losses: give one each")
    if weights is not None and names == [KTO]:
        raise UserError("model.loss_weights is for several losses: leave it out")


def _check_used(names: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` at an option that was set and that no loss uses."""
    used = set() if names == [KTO] else {"rpo_alpha"}
    for name in names:
        used |= set(accepted_options(kto if name == KTO else LOSSES[name]))
        used |= {option for option in (NLL_OPTION.get(name),) if option is not None}
    for name, value in options.items():
        if value != UNSET[name] and name not in used:
            raise UserError(f"model.{name} is {value}, but loss_type {_listed(names)} does not use it: leave it out")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"
