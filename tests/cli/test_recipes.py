"""Every recipe for large models resolves, is planned as it stands on a tiny one, and names its sources."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from lightning_align.cli.main import run
from lightning_align.playground import records

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml"))
DATA = {"prompts": "prompt", "pairs": "preference", "demos": "sft"}
ROOM = 8192  # positions: more than any recipe asks for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_model: Any, make_tokenizer: Any, chatml: str) -> Path:
    """The models and records that recipes speak of."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "configs").symlink_to(REPOSITORY / "configs")
    small = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "max_position_embeddings": ROOM},
    }
    tokenizer = make_tokenizer(template=chatml)
    make_model(root / "runs" / "sft", tokenizer=tokenizer, **small)
    scorer = {"auto_class": AutoModelForSequenceClassification, "num_labels": 1}
    make_model(root / "runs" / "reward", tokenizer=tokenizer, **small, **scorer)
    for name, kind in DATA.items():
        rows = records(kind, split="val", size=40)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves_and_is_planned(
    folder: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    words = ["fit", "--config", f"configs/recipes/{recipe.name}", "--run.name=new", "--trainer.accelerator=cpu"]
    if not content["model"]["init_args"]["model"].startswith("runs/"):  # a model of the hub
        words.append("--model.model=runs/sft")
    with pytest.raises(SystemExit) as stopped:
        run([*words, "--print_config"])
    assert stopped.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for section in ("model", "data"):
        given = content[section]["init_args"]
        assert {name: resolved[section]["init_args"][name] for name in given if name != "model"} == {
            name: value for name, value in given.items() if name != "model"
        }
    assert run([*words, "--dry-run"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert re.search(r"parameters", said)
    assert re.search(r"memory", said)
    assert not (folder / "runs" / "new").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_where_its_numbers_come_from(recipe: Path) -> None:
    comments = re.findall(r"#(.*)", recipe.read_text(encoding="utf-8"))
    assert any(re.search(r"\b\d{4}\.\d{5}\b|docs/\w+\.md", line) for line in comments)
