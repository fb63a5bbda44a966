"""Models as users bring them: Hugging Face folders of several architectures through SFT, reward model and PPO."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = WIDTHS | {"num_key_value_heads": 2, "max_position_embeddings": 128}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
BFLOAT16, SHARDED, CHAT, PADLESS = "bfloat16", "sharded", "chat", "padless"
# model type, fields, what is particular about the folder
FOLDERS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("llama", GROUPED | {"tie_word_embeddings": False}, {BFLOAT16, SHARDED, CHAT}),
    "qwen2": ("qwen2", GROUPED | {"tie_word_embeddings": True}, {SHARDED}),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8, "tie_word_embeddings": False}, {CHAT, PADLESS}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, {PADLESS}),
    "gemma2": ("gemma2", GROUPED | {"head_dim": 8, "final_logit_softcapping": 3.0} | SLIDING, {BFLOAT16, CHAT}),
}
PLAIN = [{"prompt": f"list {n} animals . answer :", "completion": " cat , dog and bird ."} for n in range(8)]
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"list {n} animals ."}],
        "completion": [{"role": "assistant", "content": "cat"}],
    }
    for n in range(8)
]
REWARD = """
def short(prompts, completions, reference, finished):
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(right in text) - 0.1 * len(text) for right, text in zip(reference, texts)]
"""
QUICK = [
    *("--run.wandb=disabled", "--data.cache_dir=null", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
    *("--trainer.enable_progress_bar=false", "--data.val_fraction=0.2", "--model.learning_rate=1e-3"),
]


@pytest.fixture(scope="module")
def folder(
    desk: Any, make_model: Any, make_tokenizer: Any, chatml: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``folder(name)``: one of :data:`FOLDERS`, written once."""
    root = tmp_path_factory.mktemp("models")
    desk.write("plain.jsonl", PLAIN)
    desk.write("chats.jsonl", CHATS)
    desk.write("reward.py", REWARD)

    def write(name: str) -> Path:
        model_type, fields, traits = FOLDERS[name]
        if not (root / name).exists():
            make_model(
                root / name,
                model_type,
                tokenizer=make_tokenizer(
                    template=chatml if CHAT in traits else None, pad=None if PADLESS in traits else "<pad>"
                ),
                dtype=torch.bfloat16 if BFLOAT16 in traits else torch.float32,
                shards="30KB" if SHARDED in traits else None,
                **fields,
            )
            assert (len(list((root / name).glob("*.safetensors"))) > 1) == (SHARDED in traits)
        return root / name

    return write


def train(desk: Any, model: Path, name: str, words: list[str]) -> Path:
    """A short run; returns its exported model."""
    chat = CHAT in FOLDERS[model.name][2]
    data = ["--data.path=chats.jsonl" if chat else "--data.path=plain.jsonl"]
    desk.done("fit", *QUICK, f"--model.model={model}", *data, *words, f"--run.name={name}", "--overwrite")
    return desk.root / "runs" / name / "model"


def stored_dtypes(folder: Path) -> set[str]:
    """Dtypes of the weights as they lie on disk."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    return found


SFT = ["--model=SFTModule", "--data=SFTDataModule", "--data.batch_size=4", "--trainer.max_steps=2"]
PPO = [
    *("--model=PPOModule", "--data=PromptDataModule", "--data.batch_size=4", "--model.iterations=2"),
    *("--model.max_new_tokens=6", "--model.eval_every=2", "--model.num_ppo_epochs=2"),
]


@pytest.mark.filterwarnings("ignore:.*no pad token")
@pytest.mark.parametrize("name", FOLDERS)
def test_sft_then_generate_with_transformers(scratch: Any, folder: Callable[[str], Path], name: str) -> None:
    exported = train(scratch, folder(name), name, SFT)
    model, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert all(not keys for keys in report.values()), report
    before = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
    assert type(model) is type(before)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (before.get_output_embeddings().weight is before.get_input_embeddings().weight)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    assert stored_dtypes(exported) == {"F32"}

    tokenizer, old = (AutoTokenizer.from_pretrained(path) for path in (exported, folder(name)))
    assert tokenizer.get_vocab() == old.get_vocab()
    assert tokenizer.chat_template == old.chat_template
    if tokenizer.chat_template is None:
        inputs = tokenizer("list 1 animals . answer :", return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            CHATS[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert inputs["input_ids"].shape[1] < output.shape[1] <= inputs["input_ids"].shape[1] + 4


@pytest.mark.filterwarnings("ignore:training bfloat16 weights")
def test_bfloat16_stays_bfloat16_on_request(scratch: Any, folder: Callable[[str], Path]) -> None:
    exported = train(scratch, folder("llama"), "half", [*SFT, "--model.dtype=auto"])
    assert stored_dtypes(exported) == {"BF16"}
    assert AutoModelForCausalLM.from_pretrained(exported).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*no pad token")
@pytest.mark.parametrize("name", FOLDERS)
def test_ppo_with_a_reward_model_of_another_tokenizer(scratch: Any, folder: Callable[[str], Path], name: str) -> None:
    """``runs/reward`` is a Llama whose tokenizer knows the playground's words; it is fed text."""
    exported = train(scratch, folder(name), name, [*PPO, "--model.reward=runs/reward"])
    check_ppo(scratch, name, exported)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_ppo_with_a_python_function(scratch: Any, folder: Callable[[str], Path], name: str) -> None:
    """It gets whatever the records carry; a conversation's completion is a message."""
    rows = [{"prompt": row["prompt"], "reference": "cat"} for row in (CHATS if name == "llama" else PLAIN)]
    scratch.write("prompts.jsonl", rows)
    words = ["--model.reward=reward.py:short", "--model.gold=reward.py:short", "--data.path=prompts.jsonl"]
    exported = train(scratch, folder(name), name, [*PPO, *words])
    check_ppo(scratch, name, exported)
    assert all(row["lab/gold"] == row["lab/proxy"] for row in scratch.metrics(name) if row.get("lab/gold"))


def check_ppo(desk: Any, name: str, exported: Path) -> None:
    """Finite metrics, a sampler that agrees with the training forward, and a model that loads."""
    rows = [row for row in desk.metrics(name) if row["lab/proxy"]]
    assert len(rows) == 2
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert float(rows[0]["lab/kl"]) == pytest.approx(0, abs=1e-4)
    assert max(float(row["sampling/sampling_logp_difference/max"]) for row in rows) < 1e-3
    samples = [json.loads(line) for line in (desk.root / "runs" / name / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 2}
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape[1] > 3


@pytest.mark.filterwarnings("ignore:.*no pad token")
@pytest.mark.parametrize("name", FOLDERS)
def test_reward_model_loads_as_a_sequence_classifier(scratch: Any, folder: Callable[[str], Path], name: str) -> None:
    chat = CHAT in FOLDERS[name][2]
    rows = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": [{"role": "assistant", "content": "no"}]}
        if chat
        else {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no ."}
        for row in (CHATS if chat else PLAIN)
    ]
    scratch.write("rows.jsonl", rows)
    words = ["--model=RewardModule", "--data=PreferenceDataModule", "--data.batch_size=4", "--trainer.max_steps=2"]
    exported = train(scratch, folder(name), name, [*words, "--data.path=rows.jsonl"])
    model, report = AutoModelForSequenceClassification.from_pretrained(exported, output_loading_info=True)
    assert all(not keys for keys in report.values()), report
    assert model.config.num_labels == 1
    # or batches could not be scored; padding with EOS, they would be scored at a wrong token
    assert (model.config.pad_token_id is None) == (PADLESS in FOLDERS[name][2])
