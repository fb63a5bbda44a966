"""DPO-1 and DPO-6 of runs that are taken up again or only evaluated: the reference is what training started from."""

import shutil
from typing import Any

import pytest
import torch

from lightning_align.methods import dpo

DPO = {
    **{"model": "DPOModule", "model.model": "@sft", "model.learning_rate": 1e-2, "data": "PreferenceDataModule"},
    **{"data.path": "@preference.jsonl", "data.val_path": "@preference_val.jsonl", "data.batch_size": 8},
}
CACHED = {**DPO, "model.reference": "cached", "trainer.max_epochs": 2}
DOUBLE = {"trainer.precision": "64-true"}
KTO = {"model.loss_type": "kto", "data.path": "@unpaired.jsonl", "data.val_path": "@unpaired_val.jsonl"}


@pytest.mark.parametrize("options", [{}, {"model.lora_r": 2}, KTO])
def test_dpo_1_an_untrained_policy_is_its_reference_to_the_last_bit(world: Any, options: dict[str, Any]) -> None:
    """Which it would not be if one of them stayed in float32."""
    trained = world.fit({**DPO, **DOUBLE, **options, "trainer.max_steps": 1}).row(1, "loss")
    evaluated = world.validated({**DPO, **DOUBLE, **options})
    for side in ("chosen", "rejected"):
        assert abs(trained[f"rewards/{side}"]) < 1e-12
        assert abs(evaluated[f"eval/rewards/{side}"]) < 1e-12


@pytest.mark.parametrize("options", [{}, {"model.lora_r": 4}], ids=["whole", "lora"])
def test_dpo_6_a_resumed_run_knows_its_reference_with_and_without_its_cache(
    world: Any, options: dict[str, Any]
) -> None:
    options = {**DPO, **options, "model.reference": "cached", "trainer.max_epochs": 2}
    whole = world.fork(options)
    stopped = world.fork(options, stop_at=4, code=130)
    for cached in (True, False):
        name = f"{stopped.path.name}_{cached}"
        shutil.copytree(stopped.path, world.root / name)
        if not cached:
            (world.root / name / dpo.CACHE_FILE).unlink()
        resumed = world.fork(options, "--resume", name=name)
        assert resumed.rows == whole.rows
        assert all(torch.equal(values, whole.weights[key]) for key, values in resumed.weights.items())


def test_dpo_6_a_cache_of_another_reference_is_never_to_be_deleted(world: Any) -> None:
    """Which would let the run go on with that other reference."""
    cache = world.fit({**CACHED, "model.model": "@pretrain", "trainer.max_steps": 1}).path / dpo.CACHE_FILE
    stopped = world.fork(CACHED, stop_at=4, code=130)
    own = stopped.path / dpo.CACHE_FILE
    for content, advice in (
        (cache.read_bytes(), "another reference model than this run's: restore what they were computed from to resume"),
        (own.read_bytes()[:100], "is damaged or holds no reference log-probs: restore it to resume its run"),
    ):
        own.write_bytes(content)
        world.fork(CACHED, "--resume", name=stopped.path.name, code=2)
        error = world.log(stopped).splitlines()[-1]
        assert advice in error
        assert "to begin anew, give another --run.name or --overwrite, and another model.reference_cache" in error
        assert "delete" not in error
