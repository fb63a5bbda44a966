"""What only shows at full size: the playground's own configurations, trained once a session, each figure printed.

``pytest -m slow -s tests/methods/test_slow.py`` shows the figures.
"""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_align.cli.main import run
from lightning_align.playground import annotator_agreement, records
from lightning_align.rollout.static import StaticCacheEngine
from lightning_align.rollout.types import SamplingParams

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[2] / "configs" / "playground"
ALWAYS = {"run.wandb": "disabled", "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False}


class Playground:
    """The stages of the quickstart, and variants of them, each trained when it is first asked for."""

    def __init__(self, root: Path, run_type: Any) -> None:
        self.root = root
        self.run_type = run_type

    def fit(self, config: str, name: str, **options: Any) -> Any:
        """One stage; ``options`` are dotted with two underscores."""
        path = self.root / name
        if not path.exists():
            changes = {**ALWAYS, **{key.replace("__", "."): value for key, value in options.items()}}
            words = [f"--{key}={value}" for key, value in changes.items()]
            place = [f"--run.root={self.root}", f"--run.name={name}"]
            assert run(["fit", "--config", str(CONFIGS / f"{config}.yaml"), *place, *words]) == 0
        return self.run_type(path)

    def pretrain(self) -> Any:
        return self.fit("pretrain", "pretrain", model__model=CONFIGS / "model.yaml")

    def sft(self) -> Any:
        self.pretrain()
        return self.fit("sft", "sft", model__model=self.root / "pretrain")

    def reward(self, size: int = 3700) -> Any:
        self.sft()
        options = {"model__model": self.root / "sft", "data__playground__size": size}
        return self.fit("reward", f"reward{size}", **options)

    def ppo(self, name: str = "ppo", **options: Any) -> Any:
        self.reward()
        models = {"model__model": self.root / "sft", "model__reward": self.root / "reward3700"}
        return self.fit("ppo", name, **models, **options)


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory, run_type: Any) -> Playground:
    torch.set_num_threads(1)
    return Playground(tmp_path_factory.mktemp("playground"), run_type)


def column(run: Any, name: str) -> list[float]:
    """A metric in the order of steps."""
    return [row[name] for row in run.rows if name in row]


def bigram_entropy(tokenizer: Any, texts: list[str]) -> float:
    """Conditional entropy of a token given the one before, of a model that counted these very texts; nats."""
    pairs: Counter[tuple[int, int]] = Counter()
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        pairs.update(pairwise(ids))
    firsts: Counter[int] = Counter()
    for (first, _), count in pairs.items():
        firsts[first] += count
    return -sum(n * math.log(n / firsts[first]) for (first, _), n in pairs.items()) / pairs.total()


def test_pre_4_validation_loss_is_below_the_bigram_entropy(playground: Playground) -> None:
    loss = column(playground.pretrain(), "eval/loss")[-1]
    tokenizer = AutoTokenizer.from_pretrained(playground.root / "pretrain" / "model")
    entropy = bigram_entropy(tokenizer, [record["text"] for record in records("text")])
    print(f"PRE-4 validation loss {loss:.3f} nats a token, bigram entropy {entropy:.3f}")
    assert loss < entropy


def test_sft_4_greedy_completions_end(playground: Playground) -> None:
    folder = playground.sft().path / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokenizer(record["prompt"])["input_ids"] for record in records("prompt", split="val")]
    engine = StaticCacheEngine(model, tokenizer, 128)
    params = SamplingParams(max_new_tokens=64, greedy=True)
    rollout = engine.generate(prompts, params, seeds=range(len(prompts)))
    share = rollout.finish_reason.count("eos") / len(prompts)
    print(f"SFT-4 {share:.1%} of {len(prompts)} greedy completions end with EOS")
    assert share >= 0.99


def test_rm_9_accuracy_approaches_what_the_annotator_allows(playground: Playground) -> None:
    limit = annotator_agreement(split="val")
    accuracies = {size: column(playground.reward(size), "eval/accuracy")[-1] for size in (370, 1200, 3700)}
    error = math.sqrt(limit.ceiling * (1 - limit.ceiling) / limit.num_pairs)
    print(
        f"RM-9 accuracy by pairs {accuracies}; one who knows the gold score {limit.ceiling:.3f}, the annotator asked "
        f"twice {limit.self_agreement:.3f}, standard error {error:.3f}"
    )
    assert all(accuracy <= limit.ceiling + 2 * error for accuracy in accuracies.values())
    assert accuracies[3700] > accuracies[370]
    assert accuracies[3700] > (0.5 + limit.ceiling) / 2


def test_ppo_9_a_strong_penalty_holds_the_policy(playground: Playground) -> None:
    # advantages are whitened: with nothing to gain they are noise of full size, and at the playground's own rate, five
    # times this one, the policy diffuses to a third of a nat before the penalty turns it round
    options = {"model__kl_coef": 10.0, "model__iterations": 40, "model__learning_rate": 3e-5}
    kl = column(playground.ppo("ppo_beta10", **options), "eval/lab/kl")
    print(f"PPO-9 largest |KL| with β = 10: {max(map(abs, kl)):.4f} nats")
    assert max(map(abs, kl)) < 0.1


def test_ppo_9_without_penalty_the_proxy_rises_further(playground: Playground) -> None:
    free = column(playground.ppo("ppo_beta0", model__kl_coef=0.0, model__iterations=40), "eval/lab/proxy")
    held = column(playground.ppo("ppo_beta005", model__kl_coef=0.05, model__iterations=40), "eval/lab/proxy")
    print(f"PPO-9 proxy {free[0]:.3f} → {free[-1]:.3f} with β = 0, → {held[-1]:.3f} with β = 0.05")
    assert free[-1] > held[-1] > held[0]


def test_ppo_10_adaptive_control_reaches_its_target(playground: Playground) -> None:
    options = {"model__kl_control": "adaptive", "model__kl_target": 3.0, "model__kl_horizon": 320}
    run = playground.ppo("ppo_adaptive", model__kl_coef=0.05, model__iterations=120, **options)
    last = column(run, "objective/kl")[-30:]
    mean = sum(last) / len(last)
    coefficient = column(run, "objective/kl_coef")[-1]
    print(f"PPO-10 mean KL of the last 30 iterations {mean:.2f} nats, target 3; β ends at {coefficient:.3f}")
    assert abs(mean / 3.0 - 1) < 0.2


def test_ppo_12_penalty_for_missing_eos_shortens(playground: Playground) -> None:
    options = {"model__max_new_tokens": 12, "model__missing_eos_penalty": 3.0, "model__iterations": 40}
    shares = column(playground.ppo("ppo_eos", **options), "eval/completions/clipped_ratio")
    print(f"PPO-12 truncated share {shares[0]:.3f} → {shares[-1]:.3f}")
    assert shares[0] > 0.05
    assert shares[-1] < shares[0]


def test_ppo_13_values_explain_returns(playground: Playground) -> None:
    explained = column(playground.ppo(), "val/explained_variance")[49:]
    mean = sum(explained) / len(explained)
    print(f"PPO-13 explained variance after 50 iterations {mean:.3f}")
    assert mean > 0.3


def test_comp_6_helpfulness_alone_costs_safety_that_the_gate_keeps(playground: Playground) -> None:
    playground.sft()
    policy = {"model__model": playground.root / "sft"}
    models = {}
    for aspect in ("helpfulness", "safety"):
        playground.fit("reward", aspect, data__aspect=aspect, data__margin="small", **policy)
        models[aspect] = str(playground.root / aspect)
    options = {**policy, "model__kl_coef": 0.01, "model__score_scaling": "whiten", "model__iterations": 40}
    alone = playground.fit("ppo", "ppo_helpfulness", model__reward=models["helpfulness"], **options)
    spec = json.dumps({"combine": "gate", "parts": models})
    gated = playground.fit("ppo", "ppo_gate", model__reward=spec, **{**options, "model__score_scaling": "none"})
    safety = {name: column(run, "eval/lab/gold_safety")[-1] for name, run in (("alone", alone), ("gated", gated))}
    errors = [column(run, "eval/lab/gold_safety_se")[-1] for run in (alone, gated)]
    difference, error = safety["gated"] - safety["alone"], math.hypot(*errors)
    helpfulness = {n: column(run, "eval/lab/gold_helpfulness")[-1] for n, run in (("alone", alone), ("gated", gated))}
    print(
        f"COMP-6 true safety {safety}: {difference:+.3f} by the gate, 95 % interval {difference - 1.96 * error:+.3f} "
        f"to {difference + 1.96 * error:+.3f} over prompts, one seed; true helpfulness {helpfulness}"
    )
    assert difference > 1.96 * error


def test_dpo_12_preference_optimisation_wins_against_its_start(playground: Playground) -> None:
    playground.sft()
    playground.fit("dpo", "dpo", model__model=playground.root / "sft")
    out = playground.root / "dpo.json"
    models = [f"--model={playground.root / 'dpo'}", f"--against={playground.root / 'sft'}"]
    assert (
        run(["evaluate", *models, "--data=playground", "--num_samples=4", "--max_new_tokens=24", f"--out={out}"]) == 0
    )
    policy = json.loads(out.read_text())["policies"][0]
    wins, kl = policy["against"]["win_rate"], policy["metrics"]["kl"]
    print(f"DPO-12 win rate {wins['value']:.3f}, 95 % interval {wins['ci']}, at KL {kl['value']:.2f} (budget 1)")
    assert wins["ci"][0] > 0.5
    assert kl["value"] < 1.0
