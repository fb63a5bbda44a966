"""``evaluate``: policies on prompts and reward models on comparisons, of tiny real runs; one line for every mistake."""

import csv
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_align.cli.evaluate_options import read_settings
from lightning_align.lab.evaluation.subjects import Subject
from lightning_align.models.loading import load_causal_lm, load_tokenizer
from lightning_align.playground import records

FEW = ["--limit=6", "--max_new_tokens=6", "--num_samples=2"]
DATA = ["--data", "playground"]


def evaluated(desk: Any, *words: str, out: str = "evaluation.json") -> dict[str, Any]:
    desk.done("evaluate", *words, "--out", out, "--overwrite")
    return json.loads((desk.root / out).read_text())


def rows(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in content["policies"]}


# ------------------------------------------------------------------ policies
def test_several_policies_on_the_same_prompts(scratch: Any) -> None:
    content = evaluated(scratch, "--model", "runs/ppo", "runs/dpo", "runs/sft/model", *DATA, *FEW)
    assert content["scores"] == {"gold": "playground", "proxy": "runs/reward"}
    found = rows(content)
    assert list(found) == ["runs/ppo", "runs/dpo", "runs/sft/model"]
    for row in found.values():
        for name in ("gold", "gold_helpfulness", "proxy", "kl", "kl_k1", "kl_k3", "length", "truncated", "entropy"):
            metric = row["metrics"][name]
            assert set(metric) == {"value", "ci", "n", "se"}
            assert metric["n"] == 6
            assert metric["ci"][0] <= metric["value"] <= metric["ci"][1]
        assert row["metrics"]["perplexity"]["value"] > 1
        assert 0 <= row["metrics"]["self_bleu"]["value"] <= 1
    assert found["runs/dpo"]["reference"] == found["runs/ppo"]["reference"]
    assert any("its own reference" in note for note in content["notes"])  # that of runs/sft is what it started from


def test_eval_8_repeating_gives_the_same_json(scratch: Any) -> None:
    words = ["--model", "runs/ppo", "--against", "runs/sft", *DATA, *FEW]
    first, again = (evaluated(scratch, *words, out=f"{name}.json") for name in ("first", "again"))
    assert first == again
    alone = evaluated(scratch, "--model", "runs/dpo", "runs/ppo", *DATA, *FEW)
    assert rows(alone)["runs/ppo"]["metrics"] == rows(first)["runs/ppo"]["metrics"]
    other = evaluated(scratch, *words, "--seed=1")
    assert rows(other)["runs/ppo"]["metrics"]["gold"] != rows(first)["runs/ppo"]["metrics"]["gold"]


def test_eval_6_kl_to_itself_is_zero_and_exact_agrees_with_k1(scratch: Any) -> None:
    same = evaluated(scratch, "--model", "runs/sft", "--reference", "runs/sft", *DATA, *FEW)
    metrics = rows(same)["runs/sft"]["metrics"]
    assert [metrics[name]["value"] for name in ("kl", "kl_k1", "kl_k3")] == [0.0, 0.0, 0.0]
    tokenizer = load_tokenizer(str(scratch.root / "runs/sft"))
    far = load_causal_lm(str(scratch.root / "runs/sft"), tokenizer=tokenizer)
    for parameter in far.parameters():
        parameter.data *= 1.5
    for part in (far, tokenizer):
        part.save_pretrained(scratch.root / "far")
    words = ["--reference=far", "--limit=100", "--max_new_tokens=6", "--num_samples=4", "--seed=2"]
    metrics = rows(evaluated(scratch, "--model", "runs/sft", *DATA, *words))["runs/sft"]["metrics"]
    assert metrics["kl"]["value"] > 0
    for name in ("kl_k1", "kl_k3"):
        se = (metrics["kl"]["se"] ** 2 + metrics[name]["se"] ** 2) ** 0.5
        assert abs(metrics[name]["value"] - metrics["kl"]["value"]) < 4 * se
        assert abs(-metrics[name]["value"] - metrics["kl"]["value"]) > 4 * se  # which tells the sign


def test_win_rates(scratch: Any) -> None:
    words = ["--against", "runs/sft", "--reward", "runs/reward", *DATA, *FEW]
    content = evaluated(scratch, "--model", "runs/ppo", "runs/dpo", *words)
    assert content["judge"] == "gold"
    assert [row["model"] for row in content["policies"]] == ["runs/ppo", "runs/dpo", "runs/sft"]
    against = content["policies"][0]["against"]
    assert 0 <= against["win_rate"]["value"] <= 1
    assert against["position_consistency"]["value"] == 1
    assert 0 < against["win_rate"]["p"] <= 1
    gold = [row["metrics"]["gold"]["value"] for row in content["policies"]]
    assert against["gold_difference"]["value"] == pytest.approx(gold[0] - gold[2])
    assert content["policies"][2]["metrics"]["kl"]["value"] == 0  # to what the others started from, which it is
    same = evaluated(scratch, "--model", "runs/ppo", "--against", "runs/sft/model", *words[2:])
    assert rows(same)["runs/sft/model"]["metrics"] == content["policies"][2]["metrics"]
    tied = evaluated(scratch, "--model", "runs/ppo", *words, "--judge=reward", "--tie_eps=1e9")
    assert tied["judge"] == "proxy"
    assert tied["policies"][0]["against"]["win_rate"]["value"] == 0.5
    assert tied["policies"][0]["against"]["ties"]["value"] == 1
    assert tied["policies"][0]["against"]["length_controlled_win_rate"]["value"] == pytest.approx(0.5)


def test_the_best_of_n_by_the_proxy(scratch: Any) -> None:
    words = ["--model", "runs/sft", "--reward", "runs/reward", *DATA, "--limit=6", "--max_new_tokens=6"]
    answer = scratch.done("evaluate", *words, "--num_samples=5", "--out=best.json")
    (row,) = json.loads((scratch.root / "best.json").read_text())["policies"]
    assert [best["n"] for best in row["best_of"]] == [1, 2, 4]
    for name in ("proxy", "gold"):
        assert row["best_of"][0][name]["value"] == pytest.approx(row["metrics"][name]["value"])
    proxies = [best["proxy"]["value"] for best in row["best_of"]]
    assert proxies == sorted(proxies)
    assert proxies[0] < proxies[-1]
    assert row["best_of"][0]["kl_bound"] == 0
    assert "best of" in answer.out
    assert f"{row['best_of'][2]['kl_bound']:.3f}" in answer.out
    one = evaluated(scratch, *words, "--num_samples=1")
    assert one["policies"][0]["best_of"] == []


def test_a_comparison_of_different_starts_takes_the_other_sides_own(scratch: Any) -> None:
    content = evaluated(scratch, "--model", "runs/sft", "runs/ppo", "--against", "runs/dpo", *DATA, *FEW)
    first, second, last = (row["reference"] for row in content["policies"])
    assert last == second != first


def test_completions_may_be_as_long_as_the_longest_that_a_run_allowed_itself() -> None:
    runs = [Subject(name, name, {"max_new_tokens": tokens}, False) for name, tokens in (("a", 6), ("b", 9), ("c", 7))]
    given = {"temperature": 1.0, "top_p": 1.0, "num_samples": 1, "stop_strings": [], "seed": 0}
    options = Namespace(max_new_tokens=None, engine="auto", batch_size=1, dtype="float32", **given)
    assert read_settings(options, runs).params.max_new_tokens == 9


def test_the_other_side_has_samples_of_its_own(scratch: Any) -> None:
    content = evaluated(scratch, "--model", "runs/sft", "--against", "runs/sft", "--reward=runs/reward", *DATA, *FEW)
    first, second = (row["metrics"] for row in content["policies"])
    assert first["proxy"]["value"] != second["proxy"]["value"]


def test_a_checkpoint_is_what_it_was_exported_as(scratch: Any) -> None:
    (checkpoint,) = (scratch.root / "runs/ppo/checkpoints").glob("step=00002*.ckpt")
    name = str(checkpoint.relative_to(scratch.root))
    content = evaluated(scratch, "--model", name, "runs/ppo", *DATA, *FEW)
    first, last = (row["metrics"] for row in content["policies"])  # the run ended with that step
    assert first == last
    assert content["policies"][0]["reference"] == content["policies"][1]["reference"]


def test_files_with_completions_subsets_and_a_composed_reward(scratch: Any) -> None:
    demos = [json.loads(line) for line in (scratch.root / "sft.jsonl").read_text().splitlines()]
    scratch.write("half.jsonl", [{**row, "half": index % 2} for index, row in enumerate(demos)])
    scratch.write("both.yaml", "gold: {source: playground, weight: 0.5}\nlearned: runs/reward\n")
    words = ["--data", "half.jsonl", "--by", "half", "--reward", "both.yaml", "--max_new_tokens=6", "--num_samples=1"]
    content = evaluated(scratch, "--model", "runs/sft", *words)
    row = rows(content)["runs/sft"]
    assert content["scores"] == {"proxy": {"gold": {"source": "playground", "weight": 0.5}, "learned": "runs/reward"}}
    assert {"proxy", "proxy_gold", "proxy_learned"} <= set(row["metrics"])
    assert [part["proxy"]["n"] for part in row["by"]["half"].values()] == [8, 8]
    assert row["metrics"]["heldout_loss"]["value"] == pytest.approx(plain_loss(scratch.root / "runs/sft", demos))
    assert "unique_fraction" not in row["metrics"]  # one sample a prompt says nothing of it


def plain_loss(run: Path, records: list[dict[str, str]]) -> float:
    """Nats per token of the completions, in float64, one record at a time."""
    tokenizer = load_tokenizer(str(run))
    model = load_causal_lm(str(run), tokenizer=tokenizer).double()
    total, count = 0.0, 0
    for record in records:
        prompt = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        ids = tokenizer(record["prompt"] + record["completion"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, count = total - float(logp.sum()), count + len(logp)
    return total / count


def test_what_cannot_be_measured_is_said(scratch: Any) -> None:
    answer = scratch.done("evaluate", "--model", "runs/pretrain", "--data", "prompt.jsonl", *FEW)
    assert "no KL: no run says what it started from; give --reference" in answer.out
    assert "nothing scores" in answer.out
    answer = scratch.done("evaluate", "--model", "runs/sft", *DATA, *FEW, "--top_p=0.9")
    assert "no KL: it is measured at temperature 1 without top_p" in answer.out
    assert "perplexity" in answer.out


# ------------------------------------------------------------------ reward models
def test_reward_models_give_the_numbers_of_their_own_evaluation(scratch: Any) -> None:
    words = ["--model", "runs/reward", "--data", "preference.jsonl", "--by", "strength"]
    content = evaluated(scratch, *words)
    assert content == evaluated(scratch, *words)
    (row,) = content["models"]
    with (scratch.root / "runs/reward/metrics.csv").open(newline="") as file:
        last = [line for line in csv.DictReader(file) if line["eval/accuracy"]][-1]
    for name in ("accuracy", "ece", "brier"):
        assert row["metrics"][name]["value"] == pytest.approx(float(last[f"eval/{name}"]), abs=1e-5)
    for strength, part in row["by"]["strength"].items():
        assert part["accuracy"]["value"] == pytest.approx(float(last[f"eval/accuracy/{strength}"]))
    assert sum(part["accuracy"]["pairs"] for part in row["by"]["strength"].values()) == content["data"]["pairs"]
    assert 0 < row["metrics"]["ece"]["p_calibrated"] <= 1


def test_probabilities_are_those_of_raw_scores(scratch: Any) -> None:
    path = scratch.fit("reward", "full", "--model.normalize=full")
    content = evaluated(scratch, "--model", "runs/full", "--data", "preference.jsonl")
    last = [row for row in scratch.metrics("full") if row["eval/brier"]][-1]
    for name in ("brier", "ece"):
        assert content["models"][0]["metrics"][name]["value"] == pytest.approx(float(last[f"eval/{name}"]), abs=1e-5)
    config = json.loads((path / "model" / "config.json").read_text())
    assert abs(config["reward_std"] - 1) > 0.02  # and would be others on another scale


def test_pairs_of_a_ranking_are_one_prompt(scratch: Any) -> None:
    scratch.write("ranked.jsonl", records("ranked", split="val", size=6, k=4, ties=0.0))
    content = evaluated(scratch, "--model", "runs/reward", "--data", "ranked.jsonl")
    assert (content["data"]["pairs"], content["data"]["prompts"]) == (6 * 6, 6)
    assert content["models"][0]["metrics"]["accuracy"]["n"] == 6


def test_a_reward_model_that_is_an_adapter(scratch: Any) -> None:
    scratch.fit("reward", "slim", "--model.model=runs/sft", "--model.lora_r=2", "--model.lora_export=adapter")
    content = evaluated(scratch, "--model", "runs/slim", "runs/reward", "--data", "preference.jsonl")
    assert [row["model"] for row in content["models"]] == ["runs/slim", "runs/reward"]


def test_a_limit_counts_records_not_the_pairs_of_a_ranking(scratch: Any) -> None:
    scratch.write("ranked.jsonl", records("ranked", size=5, k=3, ties=0.0))
    content = evaluated(scratch, "--model", "runs/reward", "--data", "ranked.jsonl", "--limit=3")
    assert (content["data"]["prompts"], content["data"]["pairs"]) == (3, 9)


def test_a_damaged_reward_model_is_said_in_one_line(scratch: Any) -> None:
    shutil.copytree(scratch.root / "runs/reward/model", scratch.root / "damaged")
    weights = load_file(scratch.root / "damaged/model.safetensors")
    save_file(
        {**weights, "score.weight": weights["score.weight"] * torch.nan}, scratch.root / "damaged/model.safetensors"
    )
    line = scratch.refused("evaluate", "--model", "damaged", "--data", "preference.jsonl")
    assert "damaged gives nan to the chosen answer of preference.jsonl line 1 (" in line


def test_ties_and_bad_records_are_counted(scratch: Any) -> None:
    pairs = [json.loads(line) for line in (scratch.root / "preference.jsonl").read_text().splitlines()]
    decided = [pair for pair in pairs if not pair.get("tie")]
    extra = [{**decided[0], "tie": True}, {"prompt": "x", "chosen": "y"}]
    scratch.write("mixed.jsonl", [{**pair, "source": "us"} for pair in decided] + extra)
    words = ["--model", "runs/reward", "--data", "mixed.jsonl", "--by", "source"]
    assert "mixed.jsonl line" in scratch.refused("evaluate", *words)
    content = evaluated(scratch, *words, "--on_bad_record=skip")
    assert content["data"]["pairs"] == len(decided)
    assert content["data"]["skipped"]["a tie"] == 1
    assert sum(content["data"]["skipped"].values()) == 2
    assert list(content["models"][0]["by"]["source"]) == ["us"]


# ------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", "runs/sft"], "the following arguments are required: --data"),
        (["--model", "runs/nothing", *DATA], "runs/nothing: there is no such"),
        (["--model", "tiny.yaml", *DATA], "is an architecture, not a trained model"),
        (["--model", "runs/sft", "runs/sft", *DATA], "names runs/sft twice"),
        (["--model", "runs/sft", "runs/reward", *DATA], "evaluate them apart"),
        (["--model", "runs/reward", "--gold", "playground", *DATA], "--gold is for policies"),
        *(
            (["--model", "runs/reward", f"--{name}={value}", *DATA], f"--{name} is for policies, but runs/reward is")
            for name, value in {
                **{"temperature": 0.5, "num_samples": 2, "dtype": "bfloat16", "batch_size": 2, "engine": "static"},
                **{"tie_eps": 0.1, "top_p": 0.9, "distinct_words": 9, "stop_strings": "x"},
            }.items()
        ),
        (["--model", "runs/sft", "--data", "nothing.jsonl"], "nothing.jsonl: there is no such file"),
        (["--model", "runs/reward", "--data", "prompt.jsonl"], "prompt.jsonl line 1"),
        (["--model", "runs/sft", "--by", "famly", *DATA], "did you mean 'family'?"),
        (["--model", "runs/sft", "--against", "runs/dpo", "--data", "prompt.jsonl"], "--against needs a judge"),
        (["--model", "runs/sft", "--judge", "gold", *DATA], "give --against too"),
        (["--model", "runs/sft", "--against", "runs/dpo", "--judge", "reward", *DATA], "needs --reward"),
        (["--model", "runs/sft", "--reward", "nothing.yaml", *DATA], "nothing.yaml cannot be read as a reward"),
        (["--model", "runs/sft", "--reward", "runs/dpo", *DATA], "runs/dpo has no score head"),
        (["--model", "runs/sft", "--max_new_tokens=90", *DATA], "playground record"),
        (["--model", "runs/sft", "--limit=0", *DATA], "--limit is 0: give 1 or more"),
        (["--model", "runs/sft", "--columns", "prompt", *DATA], "--columns takes OURS=THEIRS"),
        (["--model", "runs/sft", "--out", "runs", *DATA], "runs is a folder"),
        (["--model", "runs/sft", "--out", "sft.jsonl", *DATA], "sft.jsonl exists"),
        (["--model", "runs/sft", "--out", "sft.jsonl/x.json", *DATA], "cannot write sft.jsonl/x.json: "),
        (["--model", "runs/sft", "--refrence", "x", *DATA], "did you mean '--reference'?"),
    ],
)
def test_mistakes(desk: Any, words: list[str], line: str) -> None:
    assert line in desk.refused("evaluate", *words)


def test_the_kl_needs_one_vocabulary(scratch: Any, make_model: Any, make_tokenizer: Any) -> None:
    make_model(scratch.root / "other", tokenizer=make_tokenizer(template=None))
    line = scratch.refused("evaluate", "--model", "runs/sft", "--reference", "other", *DATA, *FEW)
    assert line == "other has another vocabulary than runs/sft: there is no KL between them"
