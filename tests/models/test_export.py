"""Exports are whole or not there."""

import copy
import re
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from lightning_align.errors import UserError
from lightning_align.models.export import save_model
from lightning_align.models.heads import RewardModel
from lightning_align.models.tokenizer_training import train_tokenizer

Make = Callable[..., PreTrainedModel]
TOKENIZER = train_tokenizer([" ".join(f"w{index}" for index in range(30))], vocab_size=41, algorithm="words")


def test_an_export_loads_with_equal_logits(any_model: PreTrainedModel, tmp_path: Path) -> None:
    save_model(any_model, TOKENIZER, tmp_path / "deep" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "model", attn_implementation="eager")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, any_model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "deep" / "model")
    assert tokenizer.chat_template == TOKENIZER.chat_template
    names = {path.name for path in (tmp_path / "deep" / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_generation_settings(make: Make, tmp_path: Path) -> None:
    model = make("llama")
    model.generation_config = GenerationConfig(temperature=0.6, eos_token_id=[1, 5])
    save_model(model, TOKENIZER, tmp_path / "model")
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert saved.eos_token_id == [1, 5]
    assert saved.pad_token_id == TOKENIZER.pad_token_id
    assert saved.temperature == 0.6


@pytest.mark.parametrize("pad_token_id", [None, 1])
def test_rm_1_plain_transformers_scores_as_we_do_where_eos_is_padding(
    make: Make, tmp_path: Path, pad_token_id: int | None
) -> None:
    """One text as it is, and several in the way of docs/reward.md, whatever the configuration said before."""
    padded_by_eos = copy.deepcopy(TOKENIZER)
    padded_by_eos.pad_token = padded_by_eos.eos_token
    network = make("gpt2", AutoModelForSequenceClassification, num_labels=1, pad_token_id=pad_token_id)
    with pytest.warns(UserWarning, match="tokenizer pads with EOS.*docs/reward.md") as said:
        save_model(network, padded_by_eos, tmp_path / "model")
    assert len(said) == 1
    texts = [f"{text}{padded_by_eos.eos_token}" for text in ("w1 w2 w3", "w4", "w5 w6 w7 w8 w9")]
    rows = padded_by_eos(texts, padding=True, return_tensors="pt")
    assert (rows["input_ids"][:, 1:] == padded_by_eos.eos_token_id).any(1).all()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        ours = RewardModel(network)(rows["input_ids"], rows["attention_mask"])
        alone = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
        torch.testing.assert_close(torch.stack(alone), ours)
        with pytest.raises(ValueError, match="batch sizes > 1"):
            model(**rows)
        page = (Path(__file__).parents[2] / "docs" / "reward.md").read_text()
        (way,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "pad_token" in block)
        names = {"tokenizer": tokenizer, "model": model, "texts": texts}
        exec(way, names)
    torch.testing.assert_close(names["scores"], ours)


def test_a_pad_token_of_its_own_is_written_without_a_word(make: Make, tmp_path: Path) -> None:
    network = make("gpt2", AutoModelForSequenceClassification, num_labels=1, pad_token_id=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(network, TOKENIZER, tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.pad_token_id == TOKENIZER.pad_token_id


def test_an_export_replaces_an_earlier_one_whole(make: Make, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale.txt").write_text("")
    save_model(make("llama"), TOKENIZER, tmp_path / "model")
    assert not (tmp_path / "model" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_to_a_full_disk_is_one_line_and_leaves_the_earlier_one(make: Make, tmp_path: Path) -> None:
    """Files may not grow beyond 5,000 bytes, as if the disk were full."""
    save_model(make("llama"), TOKENIZER, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write the model to .*model: .*File too large"):
            save_model(make("llama", hidden_size=64), TOKENIZER, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
