"""A recorder in the place of the stages' processes."""

import json
from pathlib import Path

import pytest

from lightning_align.cli.stage_jobs import Children

STAGE = """
model: {class_path: PPOModule, init_args: {model: m, reward: playground}}
data: {class_path: PromptDataModule, init_args: {path: data.txt}}
trainer: {max_steps: 3}
"""


class Recorder:
    """Stands in for the stages' processes: writes what a stage would leave, and remembers the command lines."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.outcome: dict[str, int] = {}
        self.runs = 0
        self.records = "{}"

    def __call__(self, command: list[str]) -> int:
        words = command[3:]
        self.commands.append(words)
        if words[0] == "label":
            (out,) = (Path(word.removeprefix("--out=")) for word in words if word.startswith("--out="))
            code = self.outcome.get("label", 0)
            if code == 0:
                assert out.exists() <= ("--overwrite" in words)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(self.records)
            return code
        if words[0] != "fit":
            (Path("runs/demo") / f"{words[1]}.json").write_text("{}")
            return self.outcome.get(words[0], 0)
        folder = Path(words[words.index("--run.root") + 1]) / words[words.index("--run.name") + 1]
        folder.mkdir(parents=True, exist_ok=True)
        code = self.outcome.get(folder.name, 0)
        self.runs += 1
        status = {"status": "finished" if code == 0 else "interrupted", "created": "t", "updated": str(self.runs)}
        (folder / "run.json").write_text(json.dumps(status))
        return code

    def stages(self) -> list[str]:
        others = {"lab": "picture", "label": "label"}
        names = [others.get(words[0]) or words[words.index("--run.name") + 1] for words in self.commands]
        self.commands.clear()
        return names


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage.yaml").write_text(STAGE)
    (tmp_path / "data.txt").write_text("hello")
    recorder = Recorder()
    monkeypatch.setattr(Children, "run", lambda self, command, **options: recorder(command))
    return recorder
