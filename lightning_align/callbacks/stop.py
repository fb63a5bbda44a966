"""Stop an online run when its reward is being exploited, by what its evaluations measured."""

import json
import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_align.errors import UserError, check_options
from lightning_align.run.resume import BoundaryCallback

KL, PROXY = "eval/lab/kl", "eval/lab/proxy"
HELDOUT = "heldout"  # name of the part of model.reward, of weight 0, that the policy of that name looks at
SCORES = {"gold": "eval/lab/gold", HELDOUT: f"eval/rewards/{HELDOUT}/mean"}


class StopOverOptimisation(BoundaryCallback):
    """Ends training at the checkpoint of an evaluation; the run counts as finished.

    Evaluations with a KL or a score that is not a number are passed over.

    Args:
        policy: ``budget``: the KL exceeds ``kl``; ``peak``: it exceeds that of the peak in ``fit``; ``gold`` or
            ``heldout``: that score has fallen, and the proxy risen, ``patience`` evaluations in a row.
        kl: In nats per answer, for ``budget``.
        fit: ``overopt.json`` of an earlier run, for ``peak``.
        patience: Evaluations in a row.
    """

    def __init__(
        self,
        policy: Literal["budget", "peak", "gold", "heldout"],
        kl: float | None = None,
        fit: str | None = None,
        patience: int = 3,
    ) -> None:
        check_options(
            "StopOverOptimisation",
            ("kl", kl, policy != "budget" or (kl is not None and kl > 0), "a KL above 0 for policy budget"),
            ("kl", kl, policy == "budget" or kl is None, f"none for policy {policy}, only budget has one"),
            ("fit", fit, policy != "peak" or fit is not None, "an overopt.json for policy peak"),
            ("fit", fit, policy == "peak" or fit is None, f"none for policy {policy}, only peak has one"),
            ("patience", patience, patience >= 1, "at least 1"),
        )
        self.policy = policy
        self.limit = kl if fit is None else peak_kl(Path(fit))
        self.patience = patience
        self.falls = 0  # evaluations in a row that fell while the proxy rose
        self.last: dict[str, float] = {}
        self._seen: dict[str, Tensor] = {}  # the tensors of the last evaluation: a new one brings others

    @property
    def names(self) -> tuple[str, ...]:
        """Metrics that the policy needs."""
        return (KL,) if self.limit is not None else (KL, PROXY, SCORES[self.policy])

    @property
    def state_key(self) -> str:
        """Two of them with different policies may stand side by side."""
        return self._generate_state_key(policy=self.policy)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"falls": self.falls, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.falls, self.last = state_dict["falls"], state_dict["last"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what will not be measured; a run that had been stopped ends again when it is resumed."""
        if not isinstance(getattr(pl_module, "eval_every", None), int):
            raise UserError("StopOverOptimisation is for online methods: others measure no KL while they train")
        self._check_measured(pl_module)
        if self.stops():
            trainer.should_stop = True

    def on_loop_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The evaluation before the first iteration, if there are any."""
        if not module.eval_every:  # the module has set it to 0 where no prompts are held out
            raise UserError(
                "StopOverOptimisation looks at evaluations, and this run has none: set model.eval_every, and hold "
                "prompts out (data.val_path or data.val_fraction)"
            )
        self._look(trainer)

    def on_boundary(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """After an evaluation, decide; its checkpoint is written after this at the same boundary."""
        if not self._look(trainer):
            return
        stops = self.stops()
        if trainer.world_size > 1:  # all processes must stop at the same step
            stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
        if stops:
            if trainer.is_global_zero:
                print(f"stopped after iteration {step}: {self.why()}")
            trainer.should_stop = True

    def _check_measured(self, module: Any) -> None:
        """The score is measured, and not what training maximises: that cannot say when it goes wrong."""
        if self.policy == "gold" and module.frozen.gold is None:
            raise UserError("StopOverOptimisation with policy gold needs a true score: set model.gold")
        if self.policy != HELDOUT:
            return
        weights = {part.name: part.weight for part in module.frozen.reward.parts}
        if HELDOUT not in weights:
            raise UserError(
                f"StopOverOptimisation with policy {HELDOUT} needs a part of model.reward of that name, with weight 0"
            )
        if weights[HELDOUT]:
            raise UserError(f"model.reward.{HELDOUT}.weight is {weights[HELDOUT]:g}: a held-out reward needs weight 0")

    def _look(self, trainer: Trainer) -> bool:
        """Take up an evaluation that is new."""
        metrics = trainer.callback_metrics
        if KL not in metrics or metrics[KL] is self._seen.get(KL):
            return False
        tensors = {name: metrics[name] for name in self.names if name in metrics}
        # a score that nothing got is not logged anew, and the one before must not count twice
        fresh = {name: float(value) for name, value in tensors.items() if value is not self._seen.get(name)}
        self._seen = tensors
        now = {name: value for name, value in fresh.items() if math.isfinite(value)}
        if len(now) < len(self.names):
            return True
        if self.limit is None and self.last:
            score = SCORES[self.policy]
            fell = now[score] < self.last[score] and now[PROXY] > self.last[PROXY]
            self.falls = self.falls + 1 if fell else 0
        self.last = now
        return True

    def stops(self) -> bool:
        """Whether what was measured says so."""
        if self.limit is not None:
            return self.last.get(KL, 0.0) > self.limit
        return self.falls >= self.patience

    def why(self) -> str:
        """In words."""
        if self.limit is not None:
            return f"KL {self.last[KL]:.3g} is above {self.limit:.3g} (policy {self.policy})"
        return f"{self.policy} has fallen and the proxy risen in {self.falls} evaluations in a row"


def peak_kl(path: Path) -> float:
    """KL of the peak in an ``overopt.json``; :class:`UserError` if there is none."""
    try:
        peak = json.loads(path.read_text(encoding="utf-8"))["kl_peak"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"fit {path} is not an overopt.json ({error}): lab overopt RUN writes one") from error
    if peak is None:
        raise UserError(f"fit {path} has no peak: give that of another run, or policy budget with a KL")
    return float(peak)
