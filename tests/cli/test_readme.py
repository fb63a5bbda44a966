"""README.md and docs/*.md: every command runs, every option and file they name exists."""

import gzip
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_align.cli.build import BASES, AlignCLI, import_methods
from lightning_align.cli.label import check_label
from lightning_align.cli.main import COMMANDS
from lightning_align.cli.parsing import leaves, option_names
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import Plan, Verdict
from lightning_align.lab.claims_file import read_claims
from lightning_align.models.architecture import read_architecture
from lightning_align.playground import records as made

REPOSITORY = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
TOGETHER = "python -m lightning_align "
HUB_ID = "Qwen/Qwen3-0.6B"  # stands for any model of the hub
FUNCTION = "def exact_match(completions):\n    return [float(len(text)) for text in completions]\n"
CURVE = "step,objective/kl,objective/scores,judge\n0,0,0,0\n10,1,1,1\n20,2,2,1.5\n30,4,3,1.2\n"


def commands(page: str) -> list[str]:
    """Commands of the fenced bash blocks, continued lines joined, without comments."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def project(scratch: Any, make_model: Any, make_tokenizer: Any, chatml: str) -> Iterator[Any]:
    """The files that the pages speak of."""
    records = {name: (scratch.root / f"{name}.jsonl").read_text() for name in ("text", "sft", "preference", "prompt")}
    for name, kind in (("my_text", "text"), ("demos", "sft"), ("my_records", "sft"), ("prompts", "prompt")):
        scratch.write(f"{name}.jsonl", records[kind])
    both = [row for aspect in ("helpfulness", "safety") for row in made("preference", size=60, aspect=aspect)]
    scratch.write("both.jsonl", both)
    scratch.write("thumbs.jsonl", made("unpaired", size=16))
    sums = [{"question": f"What is {n} + 1 ?", "answer": f"#### {n + 1}"} for n in range(12)]
    content = "".join(json.dumps(row) + "\n" for row in sums).encode()
    (scratch.root / "gsm8k_train.jsonl.gz").write_bytes(gzip.compress(content))
    scratch.write("log.csv", CURVE)
    scratch.write("my_package/rewards.py", FUNCTION)
    make_model(scratch.root / "path" / "to" / "hf_model", tokenizer=make_tokenizer(template=chatml))
    for name in ("small", "methods", "scaling"):
        sweep(scratch.root / "runs", name)
    judged(scratch.root / "labels.sqlite")
    fields = {"prompt": "Name a colour.", "answer1": "Blue.", "answer2": "Dog."}
    left = {"from_name": "pw", "to_name": "pw", "type": "pairwise", "value": {"selected": "left"}}
    scratch.write("project.json", [{"id": 1, "data": fields, "annotations": [{"completed_by": 1, "result": [left]}]}])
    response = {"user_id": "b2c3", "status": "submitted", "values": {"better": {"value": "answer1"}}}
    scratch.write("records.json", [{"id": "1", "fields": fields, "responses": [response]}])
    loaded, path = set(sys.modules), list(sys.path)
    yield scratch
    for left in (scratch.root / "runs").glob("*/measured.*"):  # by lab frontier --recompute, beside runs that stay
        left.unlink()
    sys.path[:] = path
    for name in set(sys.modules) - loaded:
        if name.startswith("my_package"):
            del sys.modules[name]


def judged(path: Path) -> None:
    """A store in which two people have ranked answers of the playground."""
    store = Store(path, Plan(overlap=1.0))
    for row in made("ranked", size=40):
        store.add(row["prompt"], row["completions"], "playground")
    for name in ("ann", "bob"):
        while (task := store.next_task(name)) is not None:
            item, aspect = task
            ranks = tuple(range(1, len(item.answers) + 1))
            store.judge(f"{name} {item.id}", item, name, aspect, Verdict(ranks), seconds=3.0)
    store.close()


def sweep(runs: Path, name: str) -> None:
    """A finished pipeline over two seeds, as far as the lab looks."""
    states = {}
    for seed in range(2):
        cell = f"ppo/seed={seed}"
        shutil.copytree(runs / "ppo", runs / name / cell)
        states[cell] = {"stage": "ppo", "axes": {"seed": str(seed)}, "finished": True, "seconds": 1.0}
    (runs / name / "pipeline.json").write_text(json.dumps(states))


def shortened(desk: Any, words: list[str], number: int) -> list[str]:
    """The same command in a second or two: few records, few steps, a name where it would make one up."""
    words = ["path/to/hf_model" if word == HUB_ID else word for word in words]
    if words[0] == "pipeline":
        return [*words, "--dry-run"]
    if words[0] == "evaluate" or words[:2] in (["label", "ai"], ["label", "revise"]) or "--recompute" in words:
        return [*words, "--limit=8"]
    if words[0] != "fit":
        return words
    if "--config" in words:
        more = desk.fit_words(Path(words[words.index("--config") + 1]).stem)[3:]
        words += [word for word in more if not (word.startswith("--data.val_path") and "--data.path" in words)]
    return words if "--run.name" in words else [*words, f"--run.name=page{number}"]


@pytest.mark.filterwarnings("ignore:.*no pad token")
@pytest.mark.parametrize("page", PAGES)
def test_commands(project: Any, page: str) -> None:
    if not any("--out pairs.jsonl" in command for command in commands(page)):
        project.write("pairs.jsonl", (project.root / "preference.jsonl").read_text())
    for number, command in enumerate(commands(page)):
        if command.startswith(TOGETHER):
            words = shlex.split(command.removeprefix(TOGETHER))
            if words[:2] == ["label", "human"]:  # it would wait for people
                check_label(words[1:])
                continue
            answer = project.run(*shortened(project, words, number))
            assert answer.code == 0, f"{page}: {command}\n{answer.err}"
        elif command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", (REPOSITORY / "Makefile").read_text(), re.M), command
        else:  # our own programs beside the package
            module = re.fullmatch(r"python -m ([\w.]+)( .*)?", command)
            assert module is not None, f"{page}: no test knows how to try `{command}`"
            assert (REPOSITORY / f"{module.group(1).replace('.', '/')}.py").is_file(), command


@pytest.mark.parametrize("page", PAGES)
def test_options_that_are_named_exist(page: str) -> None:
    import_methods()
    classes = {section: leaves(base).values() for section, base in BASES.items()}
    known = {section: {name for cls in found for name in option_names(cls)} for section, found in classes.items()}
    from lightning.pytorch import Trainer

    known["trainer"] = set(option_names(Trainer))
    known["run"] = {"name", "root", "wandb", "checkpoint_every", "keep_every"}
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    named = re.findall(r"`(?:--)?(model|data|trainer|run)\.(\w+)", text)
    files = {("run", "json"), ("model", "safetensors")}
    unknown = {f"{section}.{name}" for section, name in named if name not in known[section]}
    assert unknown <= {".".join(file) for file in files}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = REPOSITORY / page
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    drawn = (REPOSITORY / "docs" / "figures").exists()
    missing = [
        link
        for link in links
        if "://" not in link and not (path.parent / link).exists() and (drawn or "figures/" not in link)
    ]
    assert not missing


def test_the_table_of_commands_is_complete() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| command \| does \|\n(.*?)\n\n", text, re.M | re.S)
    named = {name.split()[0] for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert named - {"|"} >= set(COMMANDS)


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs").glob("*/*.yaml")), ids=lambda file: file.stem)
def test_configurations_resolve(desk: Any, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "architecture" in content:
        read_architecture(str(file))
    elif "claims" in content:
        assert read_claims(file)
    elif "stages" in content:
        desk.done("pipeline", "--config", f"configs/{file.parent.name}/{file.name}", "--dry-run")
    else:
        with pytest.raises(SystemExit) as stopped:
            desk.run("fit", "--config", f"configs/{file.parent.name}/{file.name}", "--print_config")
        assert stopped.value.code == 0


def test_the_class_of_the_command_line_is_lightnings() -> None:
    assert AlignCLI.__mro__[1].__name__ == "LightningCLI"  # docs/running.md: options of the Trainer are Lightning's
