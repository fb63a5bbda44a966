"""``fit``, ``validate`` and ``test``: what they print, write and repeat."""

import csv
import json
import re
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

PARENTS = {"pretrain": set(), "sft": {"runs/pretrain"}, "reward": {"runs/sft"}, "ppo": {"runs/sft", "runs/reward"}}
FILES = {".lock", "checkpoints", "config.yaml", "metrics.csv", "model", "run.json"}


# ------------------------------------------------------------------------------------------------------- help
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help"], ["Train one stage", "--model.help CLASS", "--run.name NAME", "--resume", "--trainer.max_steps"]),
        (["--model.help", "PPOModule"], ["--model.kl_coef", "Weight of the KL penalty", "--model.temperature"]),
        (["--model.help=SFTModule"], ["--model.learning_rate", "2e-5 for billions"]),
        (["--data.help", "SFTDataModule"], ["--data.on_overflow", "--data.columns", "--data.loss_on"]),
    ],
)
def test_help(desk: Any, words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_align.cli.main import run

    with pytest.raises(SystemExit) as stopped:
        run(["fit", *words])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(part in text for part in said)


def test_print_config_resolves_everything_and_runs_nothing(desk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = desk.files()
    with pytest.raises(SystemExit) as stopped:
        desk.run(*desk.fit_words("ppo"), "--model.kl_coef=0.3", "--print_config")
    assert stopped.value.code == 0
    assert desk.files() == before


def test_the_class_may_stand_anywhere_and_trl_names_are_understood(scratch: Any) -> None:
    words = ["--model.response_length=5", "--model.reward=runs/reward", "--data.path=prompt.jsonl"]
    words += ["--per_device_train_batch_size=4", "--model.model=runs/sft"]
    classes = ["--data=PromptDataModule", "--model", "PPOModule"]
    answer = scratch.done("fit", *words, *classes, "--run.name=new", "--dry-run")
    assert "note: model.response_length is called model.max_new_tokens here\n" in answer.err
    assert "note: per_device_train_batch_size is called data.batch_size here\n" in answer.err
    assert re.search(r"iteration +4 prompts, 4 completions of at most 5 tokens", answer.out)


# ---------------------------------------------------------------------------------------------------- a run
@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "ppo"])
def test_a_run_leaves_what_is_documented_and_says_little(scratch: Any, name: str) -> None:
    words = [word for word in scratch.fit_words(name) if "progress_bar" not in word]
    answer = scratch.done(*words, "--run.name=new")
    run = scratch.root / "runs" / "new"
    online = name == "ppo"
    further = {"ppo": {"samples.jsonl"}, "reward": {"reliability.png"}}.get(name, set())
    assert {path.name for path in run.iterdir()} == FILES | further
    assert scratch.status("new")["status"] == "finished"
    assert {parent["run"] for parent in scratch.status("new")["parents"]} == PARENTS[name]
    report = scratch.status("new")["data"]  # what was printed of the data is kept
    assert f"playground: {report['read']} records read, {report['kept']} of kind {report['kind']} kept" in answer.out
    lines = answer.err.splitlines()
    expected = [r"value model: from the reward model runs/reward"] if online else []
    expected += [r"(step|iteration) (\d)/\2  .*loss .*", r"finished: runs/new \(model in runs/new/model\)"]
    assert len(lines) == len(expected), answer.err  # no warnings, no bars, nothing twice
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), answer.err
    plan = ["data", "parameters", "memory", *(["iterations"] if online else ["global batch", "optimiser steps"])]
    assert all(re.search(rf"^{part} ", answer.out, re.M) for part in plan), answer.out
    auto_class = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    model, tokenizer = (cls.from_pretrained(run / "model") for cls in (auto_class, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer)


def test_a_fit_without_validation_and_with_recomputed_activations_warns_of_nothing(
    scratch: Any, recwarn: pytest.WarningsRecorder
) -> None:
    words = [*scratch.fit_words_on("sft.jsonl", "sft"), "--data.val_fraction=0", "--model.gradient_checkpointing=true"]
    answer = scratch.done(*words, "--trainer.val_check_interval=2", "--run.name=new")
    assert answer.err == "finished: runs/new (model in runs/new/model)\n"
    assert [str(warning.message) for warning in recwarn] == []
    assert "no records are held out" in answer.out


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "ppo"])
def test_config_yaml_repeats_the_run(scratch: Any, name: str) -> None:
    scratch.done("fit", "--config", f"runs/{name}/config.yaml", "--run.name=again")
    assert scratch.metrics("again") == scratch.metrics(name)
    first, second = ((scratch.root / "runs" / run / "config.yaml").read_text() for run in (name, "again"))
    assert first == second
    assert yaml.safe_load(first)["model"]["class_path"].startswith("lightning_align.methods.")


def test_dry_run_says_the_plan_and_leaves_nothing(desk: Any) -> None:
    for name in ("pretrain", "sft", "reward", "ppo"):
        before = desk.files()
        answer = desk.done(*desk.fit_words(name), "--run.name=new", "--dry-run")
        assert desk.files() == before
        assert re.search(r"^parameters +.*0\.0\d M", answer.out, re.M)
        assert bool(re.search(r"^ +parameters .*, sampler \d+ MiB, ", answer.out, re.M)) is (name == "ppo")
        assert answer.err == ""
    assert desk.done(*desk.fit_words("sft"), "--run.name=sft", "--dry_run").code == 0  # of a run that exists, too


def test_pre_1_the_plan_does_not_promise_packing_that_the_model_cannot_do(
    scratch: Any, make_model: Any, make_tokenizer: Any
) -> None:
    folder = scratch.root / "windowed"
    make_model(folder, tokenizer=make_tokenizer(template=None))
    words = [*scratch.fit_words("sft"), "--model.model=windowed", "--data.packing=bfd", "--dry-run"]
    assert re.search(r"packing: bfd, \d+ rows", scratch.done(*words).out)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": ["chunked_attention"] * 2}))
    assert re.search(r"packing: undone, as this model cannot .* each gets a row", scratch.done(*words).out)


def test_options_of_the_playground_left_in_a_configuration_are_reported(scratch: Any) -> None:
    answer = scratch.done(*scratch.fit_words("sft"), "--data.path=sft.jsonl", "--run.name=new", "--dry-run")
    assert "data.playground: not used, as data.path is sft.jsonl" in answer.out


def test_a_run_without_a_name_gets_one_and_overwrite_starts_again(scratch: Any) -> None:
    scratch.done(*scratch.fit_words("sft"), "--run.name=null")  # the playground's configurations have names
    (run,) = (path for path in (scratch.root / "runs").iterdir() if path.name.startswith("sft-"))
    assert re.fullmatch(r"sft-\d{8}-\d{6}-\d+", run.name)
    created = scratch.status(run.name)["created"]
    scratch.done(*scratch.fit_words("sft"), f"--run.name={run.name}", "--overwrite")
    assert scratch.status(run.name)["created"] > created


def test_a_finished_run_can_be_prolonged(scratch: Any) -> None:
    scratch.fit("sft", "longer")
    answer = scratch.done("fit", "--resume", "--run.name=longer", "--trainer.max_steps=5")
    assert "finished: runs/longer" in answer.err
    steps = [row["step"] for row in scratch.metrics("longer") if row["loss"]]
    assert steps == ["1", "2", "3", "4", "5"]
    assert scratch.status("longer")["resumed"] == 1
    with pytest.warns(UserWarning, match="nothing was trained: runs/longer is at step 5, where trainer.max_epochs or"):
        scratch.done("fit", "--resume", "--run.name=longer")


def test_a_checkpoint_of_another_run_can_be_the_start(scratch: Any) -> None:
    checkpoint = "runs/sft/checkpoints/last.ckpt"
    scratch.done(*scratch.fit_words("sft"), "--run.name=on", f"--ckpt_path={checkpoint}", "--trainer.max_steps=4")
    assert [row["step"] for row in scratch.metrics("on") if row["loss"]] == ["4"]


# ------------------------------------------------------------------------------------------------- evaluation
MEASURES = {"pretrain": "loss", "sft": "loss", "reward": "accuracy", "ppo": "lab/proxy"}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_of_a_start_and_of_a_checkpoint(desk: Any, command: str, name: str) -> None:
    config = ["--config", f"runs/{name}/config.yaml"]
    before = desk.files()
    start = desk.done(command, *config)
    assert "as it is; --ckpt_path evaluates a checkpoint of a run\n" in start.err
    trained = desk.done(command, *config, f"--ckpt_path=runs/{name}/checkpoints/last.ckpt")
    assert trained.out == desk.done(command, "--resume", f"--run.name={name}").out
    assert trained.out == desk.done(command, "--ckpt_path", "last", "--run.name", name).out
    assert desk.files() == before
    values = [dict(line.split() for line in answer.out.splitlines()) for answer in (start, trained)]
    assert float(values[0][f"eval/{MEASURES[name]}"]) != float(values[1][f"eval/{MEASURES[name]}"])
    if command == "validate":  # what the run itself logged last
        with (desk.root / "runs" / name / "metrics.csv").open(newline="") as file:
            (*_, last) = (row for row in csv.DictReader(file) if row[f"eval/{MEASURES[name]}"])
        assert float(values[1][f"eval/{MEASURES[name]}"]) == pytest.approx(
            float(last[f"eval/{MEASURES[name]}"]), rel=1e-4
        )


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_of_bad_input(desk: Any, command: str) -> None:
    config = [command, "--config", "runs/sft/config.yaml"]
    assert desk.refused(*config, "--ckpt_path=none") == "there is no checkpoint none"
    assert desk.refused(*config, "--ckpt_path=last", "--run.name=none") == (
        "there is no checkpoint runs/none/checkpoints/last.ckpt (check --run.name and --run.root)"
    )
    line = desk.refused(*config, "--ckpt_path=runs/ppo/checkpoints/last.ckpt")
    assert line == "the checkpoint is of PPOModule, not of SFTModule: give one of the same method"
    nothing = ["--data.path=sft.jsonl", "--data.val_path=null", "--data.val_fraction=0"]
    assert desk.refused(*config, *nothing) == (
        "sft.jsonl: no records are held out: set data.val_path, or data.val_fraction above 0"
    )
