"""Constitutional AI: what is learnt of chains, what is logged, and what is said where nothing is revised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_align.data.encode import encode_pair
from lightning_align.feedback.revise import demonstrations
from lightning_align.playground import gold, records


@pytest.fixture
def options(world: Any) -> dict[str, Any]:
    """Three iterations on eight prompts, half of them unsafe."""
    return {
        **{"model": "ConstitutionalModule", "model.model": "@sft", "model.constitution": "playground"},
        **{"model.gold": "playground", "model.learning_rate": 3e-3, "model.iterations": 3, "model.revisions": 2},
        **{"model.max_new_tokens": 16, "model.max_critique_tokens": 8, "model.eval_every": 0},
        **{"data": "PromptDataModule", "data.path": world.write("red.jsonl", records("prompt", size=16, unsafe=0.5))},
        **{"data.val_path": "@prompt_val.jsonl", "data.batch_size": 8},
    }


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The chains that are made in this process, a list an iteration."""
    from lightning_align.feedback.revise import Reviser

    seen: list[Any] = []
    make = Reviser.chains

    def watched(self: Any, *arguments: Any) -> Any:
        seen.append(make(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(Reviser, "chains", watched)
    return seen


def first_batch(module: Any) -> Any:
    return next(iter(module.trainer.datamodule.train_dataloader()))


@pytest.mark.parametrize(("keep", "on_bad"), [("all", "keep_previous"), ("last", "drop")])
def test_what_is_learnt_is_the_revisions_and_the_plain_answers_of_helpful_prompts(
    world: Any, options: dict[str, Any], chains: list[Any], keep: Any, on_bad: Any
) -> None:
    module = world.ready({**options, "model.keep": keep, "model.on_bad": on_bad})
    batch = first_batch(module)
    experience, metrics = module.collect(batch)
    (made,) = chains
    assert [len(chain.steps) for chain in made] == [2 * record["is_safety"] for record in batch["records"]]
    expected = [
        (row, one.completion)
        for row, chain in enumerate(made)
        for one in demonstrations(chain, module.constitution, keep=keep, on_bad=on_bad)
    ]
    rollout = experience.rollout
    assert list(zip(rollout.prompt_index.tolist(), rollout.completions, strict=True)) == expected
    assert metrics["cai/learnt"] == len(expected) == len(rollout) > 0
    for row, (prompt, text) in enumerate(expected):
        encoded = encode_pair(module.tokenizer, batch["records"][prompt]["prompt"], text)
        assert rollout.input_ids[row][rollout.attention_mask[row]].tolist() == encoded.input_ids
        assert (
            rollout.input_ids[row][rollout.completion_mask[row]].tolist() == encoded.input_ids[encoded.prompt_length :]
        )
        assert rollout.records[row] == batch["records"][prompt]
    assert metrics["completions/mean_length"] == pytest.approx(float(rollout.completion_lengths.float().mean()))


def test_metrics_are_those_of_the_chains(world: Any, options: dict[str, Any], chains: list[Any]) -> None:
    module = world.ready(options)
    _, metrics = module.collect(first_batch(module))
    made = [chain for chain in chains[0] if chain.steps]
    steps = [step for chain in made for step in chain.steps]
    assert metrics["cai/critiques"] == metrics["cai/revisions"] == len(steps)
    assert metrics["cai/bad_revisions"] == sum(step.fault is not None for step in steps)
    assert metrics["cai/revision_changed"] == sum(step.changed for step in steps) / len(steps)
    for n in range(3):
        safety = [gold(chain.prompt, chain.completions()[n].text).safety for chain in made]
        assert metrics[f"cai/harmlessness_by_revision/{n}"] == pytest.approx(sum(safety) / len(safety))


def test_the_loss_is_that_of_supervised_fine_tuning(world: Any, options: dict[str, Any]) -> None:
    module = world.ready({**options, "trainer.precision": "64-true", "model.temperature": 0.7})
    experience, _ = module.collect(first_batch(module))
    loss, _ = module.minibatch_loss(experience, experience.completion_mask.sum())
    logps = []
    for row in range(len(experience)):
        ids = experience.input_ids[row][experience.attention_mask[row]]
        start = int(experience.rollout.prompt_lengths[row])
        logp = module.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
        logps.append(logp[start - 1 :])
    torch.testing.assert_close(loss, -torch.cat(logps).mean(), rtol=1e-6, atol=1e-6)


def test_who_revises_stays_as_it_was(world: Any, options: dict[str, Any], chains: list[Any]) -> None:
    """Chains of one prompt file are the same whether the policy learns or not; those of another reviser differ."""
    run = world.fit({**options, "model.eval_every": 3})
    learnt = list(chains)
    chains.clear()
    world.fit({**options, "model.learning_rate": 0.0})
    assert chains == learnt
    chains.clear()
    world.fit({**options, "model.reviser": "@sft", "model.model": "@pretrain"})
    assert chains == learnt
    chains.clear()
    world.fit({**options, "model.reviser": "@pretrain"})
    assert chains != learnt
    assert not any("objective/kl" in row for row in run.rows)  # what is learnt is no sample of the policy
    assert run.row(0, "eval/lab/kl")["eval/lab/kl"] == 0
    assert run.row(3, "eval/lab/kl")["eval/lab/kl"] > 0


def test_iterations_that_see_a_prompt_again_make_another_chain(
    world: Any, options: dict[str, Any], chains: list[Any]
) -> None:
    world.fit({**options, "data.path": "@prompt_val.jsonl", "data.batch_size": 5, "model.helpful": "revise"})
    by_prompt = [{chain.prompt: chain for chain in made} for made in chains]
    assert len(by_prompt) == 3
    assert by_prompt[0].keys() == by_prompt[1].keys() == by_prompt[2].keys()
    assert all(by_prompt[0][prompt] != by_prompt[1][prompt] for prompt in by_prompt[0])
    assert all(len(chain.steps) == 2 for chain in chains[0])


def test_an_adapter_learns_while_the_start_revises(world: Any, options: dict[str, Any], chains: list[Any]) -> None:
    world.fit({**options, "model.lora_r": 4})
    with_adapter = list(chains)
    chains.clear()
    world.fit(options)
    assert chains == with_adapter


def test_prompts_to_revise_and_to_answer_need_not_both_be_there(world: Any, options: dict[str, Any]) -> None:
    path = world.write("safe.jsonl", records("prompt", size=16, unsafe=0.0))
    run = world.fit({**options, "data.path": path, "model.iterations": 1})
    assert run.rows[0]["cai/revisions"] == 0
    assert "cai/revision_changed" not in run.rows[0]
    assert run.rows[0]["cai/learnt"] > 0


def write_parrot(source: Path, folder: Path, *, ends: bool) -> None:
    """A model that says one word whatever it is asked, and ends or goes on for ever."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.tie_word_embeddings = False
    said, end = tokenizer.convert_tokens_to_ids("cat"), tokenizer.eos_token_id
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embeddings = torch.zeros_like(model.get_input_embeddings().weight)
        embeddings[:, 0], embeddings[said, 0], embeddings[said, 1] = 1.0, 0.0, 1.0
        head = torch.zeros_like(embeddings)
        head[said, 0] = head[end if ends else said, 1] = 1000.0
    model.get_input_embeddings().weight = torch.nn.Parameter(embeddings)
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (True, "none of 16 revisions differs from the text that it revises: the model does not revise; give another"),
        (
            False,
            "nothing is left to learn of the chains of 3 iterations in a row: answers and revisions are",
        ),
    ],
)
def test_cai_4_a_model_that_always_says_the_same_stops_the_run(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str], ends: bool, said: str
) -> None:
    write_parrot(world.root / "sft" / "model", world.root / f"parrot{ends}", ends=ends)
    prompts = world.write(f"parrot{ends}.jsonl", records("prompt", size=16, unsafe=float(ends)))
    run = world.fit({**options, "model.reviser": f"@parrot{ends}", "data.path": prompts}, code=2)
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (run.path / "model").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"revisions": 0}, "model.revisions is 0: give at least 1"),
        ({"revision_temperature": 0.0}, "model.revision_temperature is 0.0: give a number above 0, or null"),
        ({"max_critique_tokens": 0}, "model.max_critique_tokens is 0: give at least 1"),
        ({"constitution": "none"}, "constitution none: there is no such file"),
        ({"gold": None}, "model.gold is null and so is model.reward: give what measures the policy"),
        ({"stop_at_kl": 1.0}, "unknown option model.stop_at_kl of ConstitutionalModule"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    world.fit({**options, **{f"model.{name}": value for name, value in changes.items()}}, code=2)
    assert said in capsys.readouterr().err
