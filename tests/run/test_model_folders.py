"""The record of the model folders that a run reads."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lightning_align.errors import UserError
from lightning_align.run import model_folders
from lightning_align.run.directory import RunDirectory
from lightning_align.run.model_folders import check_models, find_models, hash_files


def model(folder: Path, *, base: Path | None = None) -> Path:
    """What counts of a model folder, or of one with an adapter of ``base``."""
    folder.mkdir(parents=True)
    if base is None:
        (folder / "config.json").write_text("{}")
    else:
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "README.md").write_text("a model")
    return folder


def config(**options: object) -> dict[str, object]:
    """A parsed command line with these options of ``model``."""
    return {"model": {"class_path": "PPOModule", "init_args": options}, "data": {"init_args": {"path": "playground"}}}


def test_every_folder_that_an_option_names_is_recorded_with_what_its_model_is_read_from(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "sft")
    run.open("x: 1\n", seed=3, parents=[])
    exported = model(run.path / "model")
    base, gold = model(tmp_path / "base"), model(tmp_path / "gold")
    adapter = model(tmp_path / "adapter", base=base)
    (tmp_path / "texts").mkdir()  # a folder, but of no model
    reward = {"parts": {"helpful": {"source": [str(adapter), "hub/name"]}, "long": "rewards.py:words"}}
    found = find_models(config(model=str(run.path), reward=reward, gold=str(gold), ptx_path=str(tmp_path / "texts")))
    assert [(one["option"], one["folder"]) for one in found] == [
        ("model.model", str(exported)),
        ("model.reward.parts.helpful.source[0]", str(adapter)),
        ("model.reward.parts.helpful.source[0]", str(base)),
        ("model.gold", str(gold)),
    ]
    assert set(found[0]["files"]) == {"config.json", "model.safetensors"}
    run.close()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_changed_new_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    options = config(gold=str(model(tmp_path / "gold")))
    run = RunDirectory(tmp_path, "ppo")
    run.open("x: 1\n", seed=3, parents=[], models=find_models(options))
    run.close()
    (tmp_path / "gold" / "README.md").write_text("another text")
    check_models(run.path, find_models(options))
    (tmp_path / "gold" / name).write_text("{ }")
    message = rf"^model\.gold reads .*gold, which has changed since .*ppo began \({name}\): restore it"
    with pytest.raises(UserError, match=message):
        check_models(run.path, find_models(options))
    (tmp_path / "gold" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has changed since .*config\.json"):
        check_models(run.path, find_models(options))


def test_a_reward_function_that_was_edited_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def words(completions):\n    return [1.0]\n")
    options = {"model": {"init_args": {"reward": {"long": {"source": f"{file}:words"}}, "gold": "playground"}}}
    run = RunDirectory(tmp_path, "ppo")
    run.open("x: 1\n", seed=3, parents=[], models=find_models(options))
    run.close()
    check_models(run.path, find_models(options))
    file.write_text("def words(completions):\n    return [2.0]\n")
    with pytest.raises(UserError, match=r"^model\.reward\.long\.source reads .*rewards\.py, which has changed since"):
        check_models(run.path, find_models(options))


def test_a_large_file_is_sampled_and_other_weights_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folders, "WHOLE_BYTES", 2**20)
    weights = np.random.default_rng(0).normal(size=(4, 2**21)).astype(np.float32)
    path = tmp_path / "model.safetensors"
    save_file({"a": weights[0], "b": weights[1], "c": weights[2], "d": weights[3]}, path)
    first = hash_files(tmp_path)
    assert hash_files(tmp_path) == first
    size = path.stat().st_size
    for part in range(4):  # another of its tensors each time
        content = bytearray(path.read_bytes())
        start = size - (4 - part) * weights[0].nbytes
        content[start : start + weights[0].nbytes] = (weights[part] + 1e-3).tobytes()
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / path.name).write_bytes(content)
        assert hash_files(tmp_path / "other") != first
    save_file({"a": weights[0], "b": weights[1], "c": weights[2], "e": weights[3]}, path)
    assert path.stat().st_size == size
    assert hash_files(tmp_path) != first  # other names
