"""Models and tokenizers in from everywhere, and every way in which a source can be bad."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lightning_align.errors import UserError
from lightning_align.models import sources
from lightning_align.models.export import save_model
from lightning_align.models.loading import count_parameters, load_causal_lm, load_tokenizer, tokenizer_plan
from lightning_align.models.logprobs import token_stats
from lightning_align.models.tokenizer_training import train_tokenizer

Make = Callable[..., PreTrainedModel]
ARCHITECTURE = {
    "architecture": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "tokenizer": {"train": {"vocab_size": 41, "algorithm": "words"}},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([" ".join(f"w{index}" for index in range(30))], vocab_size=41, algorithm="words")


@pytest.fixture
def folder(make: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A saved model of 41 embeddings with its tokenizer of 37 tokens."""
    save_model(make("llama"), tokenizer, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write an architecture file with some keys changed; None removes a key."""

    def written(**changes: object) -> str:
        content = {key: value for key, value in (ARCHITECTURE | changes).items() if value is not None}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "tiny.yaml")

    return written


def change(folder: Path, name: str, **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


# ---------------------------------------------------------------------- what works
def test_a_saved_model_comes_back_equal(folder: Path, make: Make, tokenizer: PreTrainedTokenizerBase) -> None:
    original = make("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_causal_lm(str(folder), tokenizer=load_tokenizer(str(folder)))
    for (name, first), (_, second) in zip(original.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(first, second), name
    assert load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_dtypes(folder: Path, dtype: str) -> None:
    model = load_causal_lm(str(folder), dtype=dtype)
    assert model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))


def test_an_unknown_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="dtype is int8: give one of float32"):
        load_causal_lm(str(folder), dtype="int8")


def test_a_run_directory_stands_for_its_model(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "sft"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has no exported model yet"):
        load_causal_lm(str(run))
    os.rename(folder, run / "model")
    assert load_causal_lm(str(run)).config.hidden_size == 32
    assert sources.resolve_source(str(run)) == sources.ModelSource("run", str(run / "model"))


def test_dropout_is_off_unless_asked_for(make: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save_model(make("gpt2", resid_pdrop=0.3), tokenizer, tmp_path / "gpt2")
    for wanted in (0.0, 0.2):
        model = load_causal_lm(str(tmp_path / "gpt2"), dropout=wanted)
        rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {wanted}


def test_conv_4_eos_as_pad_still_learns_its_embedding(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    change(folder, "config.json", pad_token_id=tokenizer.eos_token_id)
    model = load_causal_lm(str(folder))
    ids = torch.tensor([[9, tokenizer.eos_token_id, 10, 11]])
    token_stats(model, ids, torch.ones_like(ids), mask=torch.ones_like(ids)).logp.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient[tokenizer.eos_token_id].any()


# ---------------------------------------------------------------------- architectures
def test_an_architecture_is_initialised_from_the_seed(
    write: Callable[..., str], tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write(hidden_size=64, num_hidden_layers=4, num_key_value_heads=4)
    assert tokenizer_plan(file) == {"vocab_size": 41, "algorithm": "words"}
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(load_causal_lm(file, tokenizer=tokenizer))
    state = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(state[0], state[1])
    assert not torch.equal(state[0], state[2])
    model = models[0]
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    deviations = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.ndim == 2}
    for name, deviation in deviations.items():
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert deviation == pytest.approx(0.02 / 8**0.5 if residual else 0.02, rel=0.15), name
    assert model.get_input_embeddings().weight[tokenizer.pad_token_id].any()


def test_parameters_are_counted_without_loading(write: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    words = train_tokenizer(["a b c"], vocab_size=41, algorithm="words")
    for source, tokenizer in ((write(), words), (str(folder), None)):
        model = load_causal_lm(source, tokenizer=tokenizer)
        count = sum(p.numel() for p in model.parameters())
        assert count_parameters(source, tokenizer) == (count, 4 * count)
        assert count_parameters(source, tokenizer, dtype="bfloat16") == (count, 2 * count)
        assert count_parameters(source, tokenizer, dtype="auto") == (count, 4 * count)
        narrow = str(tmp_path / f"narrow{count}")
        model.to(torch.bfloat16).save_pretrained(narrow)
        assert count_parameters(narrow, dtype="auto") == (count, 2 * count)


def test_an_architecture_may_name_a_tokenizer(write: Callable[..., str], folder: Path) -> None:
    for path in (str(folder), folder.name):  # a relative path starts at the file
        file = write(tokenizer={"path": path})
        assert tokenizer_plan(file) is None
        assert len(load_tokenizer(file)) == 37
        assert load_causal_lm(file).config.vocab_size == 37


def test_other_architectures_can_be_initialised(write: Callable[..., str], tokenizer: PreTrainedTokenizerBase) -> None:
    small = dict.fromkeys(ARCHITECTURE, None) | {"tokenizer": ARCHITECTURE["tokenizer"]}
    file = write(**small | {"architecture": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4})
    assert load_causal_lm(file, tokenizer=tokenizer).config.model_type == "gpt2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "lama"}, "unknown architecture lama: did you mean llama"),
        ({"hiden_size": 3}, "llama has no field hiden_size: did you mean hidden_size"),
        ({"hidden_size": 30}, "not a multiple of the number of attention heads"),
        ({"hidden_size": "many"}, "expected int"),
        ({"vocab_size": 100}, "vocab_size comes from the tokenizer"),
        ({"tokenizer": None}, "needs the keys"),
        ({"tokenizer": {"train": {"vocab_size": 9}}}, "needs vocab_size and algorithm"),
        ({"tokenizer": {"train": {"vocab_size": 90, "algorithm": "letters"}}}, "algorithm words or bpe"),
        ({"tokenizer": {"path": "a", "train": {}}}, "either `train"),
    ],
)
def test_bad_architectures(
    write: Callable[..., str], tokenizer: PreTrainedTokenizerBase, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_causal_lm(write(**changes), tokenizer=tokenizer)


def test_a_tokenizer_that_is_still_to_be_trained_cannot_be_loaded(write: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="its tokenizer is trained on data"):
        load_tokenizer(write())


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"bad\.yaml is not a YAML file"):
        load_causal_lm(str(tmp_path / "bad.yaml"))
    with pytest.raises(UserError, match="there is no such architecture file"):
        load_causal_lm(str(tmp_path / "none.yaml"))


# ---------------------------------------------------------------------- bad folders
def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_causal_lm(str(folder))


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_causal_lm(str(folder))


def test_weights_of_another_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 41})
    )
    with pytest.raises(UserError, match="does not hold the weights of a GPT2LMHeadModel"):
        load_causal_lm(str(folder))


def test_missing_layers_and_left_over_layers(folder: Path) -> None:
    change(folder, "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match="does not hold the weights of a LlamaForCausalLM: 13 are missing"):
        load_causal_lm(str(folder))
    change(folder, "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="are left out"):
        load_causal_lm(str(folder))


def test_weights_of_another_size(folder: Path) -> None:
    change(folder, "config.json", intermediate_size=64)
    with pytest.raises(UserError, match=r"do not fit its config\.json: .* is \[.*48.*\], not \[.*64"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{bad", "not a valid JSON"),
        ('{"model_type": "nonsense"}', "nonsense"),
        ('{"model_type": "t5"}', "T5Config"),
        ('{"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}, "hidden_size": "wide"}', "expected int"),
    ],
)
def test_bad_configurations(folder: Path, config: str, message: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        load_causal_lm(str(folder))


def test_code_from_a_checkpoint_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}})
    )
    with pytest.raises(UserError):
        load_causal_lm(str(folder))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no config\.json"):
        load_causal_lm(str(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_causal_lm(str(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match="there is no such folder"):
        load_causal_lm(str(tmp_path / "absent" / "model"))


def test_a_hub_id_that_cannot_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_reachable", lambda endpoint: False)
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(UserError, match="no such local folder, and the model hub cannot be reached"):
            load("runs/typing-error")


def test_the_hub_is_not_reachable_where_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    assert not sources._reachable("http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"http": "proxy"})
    assert sources._reachable("http://127.0.0.1:9")


# ---------------------------------------------------------------------- tokenizers
def test_no_tokenizer_in_a_folder(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="there is no tokenizer"):
        load_tokenizer(str(folder))


def test_a_damaged_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_eos(folder: Path) -> None:
    change(folder, "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_pad_uses_eos_and_says_so(folder: Path) -> None:
    change(folder, "tokenizer_config.json", pad_token=None)
    with pytest.warns(UserWarning, match="has no pad token; EOS is used"):
        tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    large = train_tokenizer([" ".join(f"w{index}" for index in range(50))], vocab_size=90, algorithm="words")
    with pytest.raises(UserError, match="has 57 tokens but the model only 41"):
        load_causal_lm(str(folder), tokenizer=large)


def test_plain_transformers_loads_the_same_folder(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[9, 10, 11]])
    assert torch.equal(model(ids).logits, load_causal_lm(str(folder)).eval()(ids).logits)
