"""Hindsight relabelling: what is learnt under which prompt, beside which others, and from how many iterations."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.data.encode import encode_prompt
from lightning_align.methods.lessons import Alternatives, Lesson, quantiles
from lightning_align.playground import satisfies
from lightning_align.rollout.types import Rollout

PLAIN = {"model.contrast_coef": 0.0, "model.entropy_coef": 0.0, "model.label_smoothing": 0.0}
DOUBLE = {"trainer.precision": "64-true"}
# by the length of the answer: half of them did what was asked; what they follow is told by a number of cats
LENGTH = """
from lightning_align.feedback.relabel import Relabelled

def length(completions, **_):
    return [float(len(text)) for text in completions]

def letters(prompt, completion, feedback):
    number = len(completion)
    found = "cat " * (number % 5) + ": " + prompt if number % 3 else None
    return Relabelled(found, prompt, number % 2 == 0, 1.0 + number)

def dropped(prompt, completion, feedback):
    return Relabelled(None, satisfied=True)

def heavy(prompt, completion, feedback):
    return Relabelled(" ".join(["cat"] * 90), satisfied=False)
"""


@pytest.fixture
def options(world: Any) -> dict[str, Any]:
    """Two iterations of three completions of six prompts."""
    (world.root / "length.py").write_text(LENGTH)
    return {
        **{"model": "HIRModule", "model.model": "@sft", "model.reward": "@length.py:length"},
        **{"model.relabel": "@length.py:letters", "model.learning_rate": 1e-3, "model.iterations": 2},
        **{"model.max_new_tokens": 8, "model.eval_every": 0, "model.samples_per_prompt": 3, "data.batch_size": 6},
        **{"data": "PromptDataModule", "data.path": "@prompt.jsonl", "data.val_path": "@prompt_val.jsonl"},
    }


def drawn(module: Any) -> Any:
    return module.sample(next(iter(module.trainer.datamodule.train_dataloader())))


def prompt_ids(rows: Any, row: int) -> list[int]:
    lengths = rows.prompt_lengths if isinstance(rows, Rollout) else rows.rollout.prompt_lengths
    return rows.input_ids[row, : int(lengths[row])].tolist()


def alone(module: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-probs over the vocabulary before each token of a completion ``[T, V]``, one sequence at a time."""
    logits = module.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


# ------------------------------------------------------------------ what is learnt
def test_an_output_is_learnt_under_the_prompt_that_it_follows(world: Any, options: dict[str, Any]) -> None:
    module = world.ready(options)
    rollout = drawn(module)
    experience, metrics = module.experience(rollout)
    numbers = [len(text) for text in rollout.completions]
    rows = [row for row, number in enumerate(numbers) if number % 3]
    assert 0 < len(rows) < 18
    ids = rollout.completion_ids()
    assert experience.rollout.completion_ids() == [ids[row] for row in rows]
    prompts = ["cat " * (numbers[row] % 5) + ": " + rollout.records[row]["prompt"] for row in rows]
    assert [prompt_ids(experience, row) for row in range(len(rows))] == [
        encode_prompt(module.tokenizer, prompt) for prompt in prompts
    ]
    assert experience.weights.tolist() == [1.0 + numbers[row] for row in rows]
    assert experience.scores.tolist() == [numbers[row] for row in rows]
    assert metrics["hir/relabelled_fraction"] == metrics["hir/learnt_fraction"] == pytest.approx(len(rows) / 18)
    assert metrics["hir/satisfied_before"] == pytest.approx(sum(number % 2 == 0 for number in numbers) / 18)
    assert metrics["hir/buffer_size"] == len(rows)


@pytest.mark.parametrize(("learn_from", "even"), [("failures", False), ("successes", True)])
def test_failures_alone_or_successes_alone(world: Any, options: dict[str, Any], learn_from: str, even: bool) -> None:
    module = world.ready({**options, "model.learn_from": learn_from})
    rollout = drawn(module)
    experience, metrics = module.experience(rollout)
    numbers = [len(text) for text in rollout.completions]
    expected = [number for number in numbers if number % 3 and (number % 2 == 0) == even]
    assert 0 < len(expected) < sum(number % 3 > 0 for number in numbers)
    assert experience.scores.tolist() == expected
    assert metrics["hir/learnt_fraction"] == pytest.approx(len(expected) / 18)


def test_hir_1_identity_without_its_other_terms_is_supervised_fine_tuning(world: Any, options: dict[str, Any]) -> None:
    changes = {"model.relabel": "identity", "model.temperature": 0.7, **PLAIN, **DOUBLE}
    module = world.ready({**options, **changes})
    rollout = drawn(module)
    experience, _ = module.experience(rollout)
    assert experience.rollout.completion_ids() == rollout.completion_ids()
    assert torch.equal(experience.input_ids, rollout.input_ids)  # tokens as they were drawn
    loss, _ = module.minibatch_loss(experience, module.divisor(experience))
    logps = []
    for row, completion in enumerate(rollout.completion_ids()):
        logp = alone(module, prompt_ids(rollout, row), completion)
        logps.append(logp.gather(1, torch.tensor(completion)[:, None])[:, 0])
    torch.testing.assert_close(loss, -torch.cat(logps).mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["mean", "sum"])
def test_the_whole_loss_is_that_of_every_sequence_alone(world: Any, options: dict[str, Any], norm: str) -> None:
    alpha, beta, epsilon = 0.7, 0.3, 0.2
    changes = {"model.contrast_coef": alpha, "model.entropy_coef": beta, "model.label_smoothing": epsilon}
    module = world.ready({**options, **changes, **DOUBLE, "model.contrast_norm": norm, "model.num_negatives": 4})
    experience, metrics = module.experience(drawn(module))
    loss, sums = module.minibatch_loss(experience, module.divisor(experience))
    supervised, contrast, entropy, weight, hits = 0.0, 0.0, 0.0, 0.0, 0
    for row, completion in enumerate(experience.rollout.completion_ids()):
        labels = torch.tensor(completion)[:, None]
        logp = alone(module, prompt_ids(experience, row), completion)
        own = logp.gather(1, labels)[:, 0]
        smooth = -((1 - epsilon) * own + epsilon * logp.mean(1))
        of_row = float(experience.weights[row])
        supervised += of_row * smooth.sum()
        entropy += of_row * -(logp.exp() * logp).sum()
        weight += of_row * len(completion)
        scores = [own] + [alone(module, p, completion).gather(1, labels)[:, 0] for p in experience.negatives[row]]
        ells = torch.stack([score.mean() if norm == "mean" else score.sum() for score in scores])
        contrast += ells.logsumexp(0) - ells[0]
        hits += int(ells.argmax() == 0)
    rows = len(experience)
    expected = supervised / weight + alpha * contrast / rows - beta * entropy / weight
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    found = module.ratios(sums)
    assert found["hir/loss_sup"] == pytest.approx(float(supervised / weight))
    assert found["hir/loss_contrast"] == pytest.approx(float(contrast / rows))
    assert found["hir/entropy"] == pytest.approx(float(entropy / weight))
    assert found["hir/contrast_accuracy"] == pytest.approx(hits / rows)
    assert metrics["hir/candidates"] == 5


def test_hir_2_a_model_that_ignores_its_prompt_has_the_log_of_the_number_of_candidates(
    world: Any, options: dict[str, Any]
) -> None:
    module = world.ready({**options, **DOUBLE})
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if "v_proj" in name:  # no token sees another
                parameter.zero_()
    experience, metrics = module.experience(drawn(module))
    # the first token sees the last of the prompt, which is the same for all of them
    assert len({prompt_ids(experience, row)[-1] for row in range(len(experience))}) == 1
    _, sums = module.minibatch_loss(experience, module.divisor(experience))
    assert metrics["hir/candidates"] == 4
    assert module.ratios(sums)["hir/loss_contrast"] == pytest.approx(math.log(4))


def test_constraint_learns_prompts_that_are_satisfied(world: Any, options: dict[str, Any]) -> None:
    module = world.ready({**options, "model.relabel": "constraint", "model.samples_per_prompt": 40})
    experience, metrics = module.experience(drawn(module))
    texts = [module.tokenizer.decode(ids, skip_special_tokens=True) for ids in experience.rollout.completion_ids()]
    assert len(texts) >= 3
    assert all(
        satisfies(record["prompt"], text) for record, text in zip(experience.rollout.records, texts, strict=True)
    )
    assert metrics["hir/relabelled_fraction"] == pytest.approx(len(texts) / 240)


def test_a_completion_that_no_longer_fits_is_left_out_and_said(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    module = world.ready({**options, "model.relabel": "@length.py:heavy", "model.num_negatives": 1})
    rollout = drawn(module)
    _, metrics = module.experience(rollout)
    long = sum(length > 6 for length in rollout.completion_lengths.tolist())  # 96 positions
    assert 0 < long <= 18
    assert f"{long} completions are left out" in capsys.readouterr().err
    assert metrics["hir/buffer_size"] == 18 - long
    assert metrics["hir/relabelled_fraction"] == 1


# ------------------------------------------------------------------ instructions before the prompt
@pytest.mark.parametrize("relabel", ["binary", "score_bucket"])
def test_the_best_instruction_is_asked_in_training_and_evaluation_and_scores_are_those_of_the_prompt(
    world: Any, options: dict[str, Any], relabel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["kind : ", "rude : "]
    changes = {"model.relabel": relabel, "model.instructions": names, "model.satisfied_above": 24.0}
    module = world.ready({**options, **changes, "model.gold": "playground"})
    rollout = drawn(module)
    experience, _ = module.experience(rollout)
    asked = [encode_prompt(module.tokenizer, names[0] + record["prompt"]) for record in rollout.records]
    assert [prompt_ids(rollout, row) for row in range(18)] == asked
    scores = experience.scores.tolist()
    bound = 24.0 if relabel == "binary" else sorted(scores)[9] - 0.5
    for row, record in enumerate(rollout.records):
        own, other = names if scores[row] > bound else names[::-1]
        if relabel == "binary":
            assert prompt_ids(experience, row) == encode_prompt(module.tokenizer, own + record["prompt"])
        assert {tuple(ids) for ids in [prompt_ids(experience, row), *experience.negatives[row]]} == {
            tuple(encode_prompt(module.tokenizer, name + record["prompt"])) for name in (own, other)
        }
    seen: list[Any] = []
    add = type(module.evaluation).add
    monkeypatch.setattr(type(module.evaluation), "add", lambda self, r, *rest: (seen.append(r), add(self, r, *rest)))
    module.evaluate_policy()
    (held_out,) = seen
    for row, record in enumerate(held_out.records):
        assert prompt_ids(held_out, row) == encode_prompt(module.tokenizer, names[0] + record["prompt"])
        assert not record["prompt"].startswith(names[0])


def test_score_buckets_are_those_of_the_iteration(world: Any, options: dict[str, Any]) -> None:
    names = ["one : ", "two : ", "three : "]
    module = world.ready({**options, "model.relabel": "score_bucket", "model.instructions": names})
    rollout = drawn(module)
    experience, _ = module.experience(rollout)
    scores = experience.scores
    for row, record in enumerate(rollout.records):
        place = float((scores < scores[row]).sum() + 0.5 * (scores == scores[row]).sum()) / 18
        own = names[min(2, int((1 - place) * 3))]
        assert prompt_ids(experience, row) == encode_prompt(module.tokenizer, own + record["prompt"])


def test_quantiles_count_ties_by_half_and_leave_out_what_has_no_score() -> None:
    nan = float("nan")
    assert quantiles([3.0, 1.0, nan, 1.0, 2.0]) == [0.875, 0.25, None, 0.25, 0.625]
    assert quantiles([nan]) == [None]
    assert quantiles([]) == []


def test_held_out_prompts_are_asked_as_they_were_written(world: Any, options: dict[str, Any]) -> None:
    run = world.fit({**options, "model.relabel": "constraint", "model.eval_every": 1, "model.iterations": 1})
    prompts = {sample["prompt"]: sample["completion"] for sample in run.samples if sample["step"] == 0}
    share = sum(satisfies(prompt, completion) for prompt, completion in prompts.items()) / len(prompts)
    assert run.row(0, "eval/hir/satisfied")["eval/hir/satisfied"] == pytest.approx(share)


def test_instructions_that_the_tokenizer_does_not_tell_apart_are_refused(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["cat : ", "brilliant : ", "abysmal : "]
    world.fit({**options, "model.relabel": "score_bucket", "model.instructions": names}, code=2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "model.instructions 'brilliant : ' and 'abysmal : ' are the same to the model" in last


# ------------------------------------------------------------------ other instructions
def lesson(instruction: str, *, negative: str | None = None, query: str | None = None, ids: int = 0) -> Lesson:
    return Lesson(0, instruction, negative, query, 1.0, None, [1, 2], [ids])


def test_the_other_instructions_are_distinct_and_the_own_negative_comes_first() -> None:
    lessons = [lesson(text, negative="bad", ids=number) for number, text in enumerate("aabbccdd")]
    alternatives = Alternatives(lessons, 3, "seed")
    for own in lessons:
        others = alternatives.of(own)
        assert others[0] == "bad"
        assert len(set(others)) == len(others) == 3
        assert own.instruction not in others
        assert set(others) <= {"a", "b", "c", "d", "bad"}
    assert {other for own in lessons for other in alternatives.of(own)} == {"a", "b", "c", "d", "bad"}
    assert Alternatives(lessons, 1, "seed").of(lessons[0]) == ["bad"]
    assert set(Alternatives(lessons, 9, "seed").of(lessons[0])) == {"b", "c", "d", "bad"}
    assert Alternatives(lessons, 9, "seed").of(lesson("a", negative="a")) != []
    assert "a" not in Alternatives(lessons, 9, "seed").of(lesson("a", negative="a"))


def test_hir_5_repeated_lessons_and_their_order_change_no_draw() -> None:
    lessons = [lesson(text, ids=number) for number, text in enumerate("abcdefgh")]
    expected = [Alternatives(lessons, 3, "seed").of(own) for own in lessons]
    again = Alternatives([*lessons[::-1], *lessons, *lessons[2:]], 3, "seed")
    assert [again.of(own) for own in lessons] == expected
    assert [Alternatives(lessons, 3, "another").of(own) for own in lessons] != expected
    assert len({tuple(others) for others in expected}) > 1


def test_instructions_before_a_query_are_tried_before_that_query() -> None:
    lessons = [lesson("x ", query="p"), lesson("y ", query="q"), lesson("whole")]
    assert Alternatives(lessons, 4, "seed").of(lessons[0]) == ["y p"]
    assert Alternatives(lessons, 4, "seed").of(lessons[2]) == []


# ------------------------------------------------------------------ buffer
def test_the_buffer_holds_the_last_iterations(world: Any, options: dict[str, Any], experiences: list[Any]) -> None:
    run = world.fit({**options, "model.iterations": 4, "model.buffer_rounds": 2})
    rows = [row for row in run.rows if "hir/buffer_size" in row]
    new = [round(18 * row["hir/learnt_fraction"]) for row in rows]
    sizes = [new[0], *(a + b for a, b in pairwise(new))]
    assert [row["hir/buffer_size"] for row in rows] == sizes == [len(experience) for experience in experiences]
    kept = run.checkpoint()["method"]["buffer"]
    assert [entry["iteration"] for entry in kept] == [2] * new[2] + [3] * new[3]
    completions = [entry["completion_ids"] for entry in kept]
    assert completions == experiences[-1].rollout.completion_ids()


def test_fewer_lessons_than_minibatches_are_learnt_all_the_same(world: Any, options: dict[str, Any]) -> None:
    changes = {"model.samples_per_prompt": 1, "model.num_mini_batches": 6}
    module = world.ready({**options, **changes})
    experience, metrics = module.experience(drawn(module))
    count = int(metrics["hir/buffer_size"])
    assert 0 < count < 6
    assert experience.completion_mask.any(1).tolist() == [True] * count + [False] * (6 - count)
    world.fit({**options, **changes, "model.iterations": 1})


def test_nothing_to_learn_from_is_said_and_stops_the_run_in_the_end(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**options, "model.relabel": "@length.py:dropped"}
    run = world.fit({**options, "model.iterations": 2})
    start = type(run)(world.root / "sft").weights
    assert all(torch.equal(values, start[name]) for name, values in run.weights.items())
    assert capsys.readouterr().err.count("no completion is left to learn from (hir/learnt_fraction 0, ") == 2
    world.fit({**options, "model.iterations": 3}, code=2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "3 times in a row: check model.relabel and model.learn_from" in last


def test_what_is_satisfied_must_be_known_to_learn_from_a_part(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = world.write("foreign.jsonl", [{"prompt": f"say {word}"} for word in ("cat", "dog", "cow")])
    foreign = {"model.relabel": "identity", "data.path": prompts, "data.val_fraction": 0.0, "data.batch_size": 3}
    options = {name: value for name, value in {**options, **foreign}.items() if name != "data.val_path"}
    world.fit({**options, "model.learn_from": "successes"}, code=2)
    assert "model.learn_from is successes, but of no completion" in capsys.readouterr().err.splitlines()[-1]
    world.fit({**options, "model.learn_from": "successes", "model.satisfied_above": 1.0})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"buffer_rounds": 0}, "model.buffer_rounds is 0: give at least 1"),
        ({"num_negatives": 0}, "model.num_negatives is 0: give 1 or more, or contrast_coef 0"),
        ({"label_smoothing": 1.0}, "model.label_smoothing is 1.0: give a share"),
        ({"instructions": ["a", "b"]}, "model.instructions are those of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    options = {**options, "model.relabel": "constraint"}
    world.fit({**options, **{f"model.{name}": value for name, value in changes.items()}}, code=2)
    assert said in capsys.readouterr().err
