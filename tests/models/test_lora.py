"""Adapters against the same network without them, with them merged, and as peft reads them."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_align.errors import UserError
from lightning_align.models import logprobs
from lightning_align.models.export import save_adapter, save_model
from lightning_align.models.heads import RewardModel
from lightning_align.models.loading import count_adapter, empty_network, load_causal_lm, load_tokenizer
from lightning_align.models.logprobs import head_is_expressible, token_stats
from lightning_align.models.lora import (
    LoraOptions,
    WithoutAdapter,
    adapters_off,
    add_lora,
    fingerprint_of_base,
    lora_layers,
    merge_,
    merged,
    share_frozen,
)
from lightning_align.models.tokenizer_training import train_tokenizer
from lightning_align.rollout.engine import check_logits
from lightning_align.rollout.memory import sampler_memory
from lightning_align.rollout.static import StaticCacheEngine

Make = Callable[..., PreTrainedModel]
TOKENIZER = train_tokenizer([" ".join(f"w{index}" for index in range(40))], vocab_size=41, algorithm="words")
OPTIONS = LoraOptions(r=4, alpha=8, dropout=0.0, target_modules="all-linear")
IDS = torch.arange(3, 15).view(2, 6)


def trained(network: PreTrainedModel, options: LoraOptions = OPTIONS) -> PreTrainedModel:
    """With adapters that no longer start at zero."""
    add_lora(network, options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


@torch.no_grad()
def logits(network: nn.Module, ids: Tensor = IDS) -> Tensor:
    return network(input_ids=ids, use_cache=False).logits


def test_a_network_starts_as_it_was_and_only_adapters_learn(any_model: PreTrainedModel) -> None:
    before, parameters = logits(any_model), {name: p.clone() for name, p in any_model.named_parameters()}
    add_lora(any_model, OPTIONS)
    assert torch.equal(logits(any_model), before)
    learning = {name for name, p in any_model.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    kept = {name.replace(".base_layer.", "."): p for name, p in any_model.named_parameters() if name not in learning}
    assert kept.keys() == parameters.keys()
    assert all(torch.equal(kept[name], values) for name, values in parameters.items())
    output = any_model.get_output_embeddings()
    linear = [m for m in any_model.base_model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not output]
    assert 2 * len(lora_layers(any_model)) == len(learning)
    assert len(lora_layers(any_model)) * 3 == len(linear)  # the layer, A and B


def test_gradients_are_those_of_the_weights_projected_on_the_adapter(make: Make) -> None:
    """dL/dB = (α/r) · dL/dW · Aᵀ at the start, where B is 0."""
    full = make("llama").double()
    full(input_ids=IDS).logits.square().mean().backward()
    expected = {name: p.grad for name, p in full.named_parameters()}
    network = add_lora(copy.deepcopy(full), OPTIONS).double()
    network(input_ids=IDS).logits.square().mean().backward()
    for name, layer in lora_layers(network).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(b.grad, 2.0 * expected[f"{name}.weight"] @ a.T, rtol=1e-10, atol=1e-12)
        assert not a.grad.any()
        assert layer.base_layer.weight.grad is None


def test_with_adapters_off_the_network_is_the_old_one(any_model: PreTrainedModel) -> None:
    before = logits(any_model)
    trained(any_model)
    assert not torch.allclose(logits(any_model), before, atol=1e-2)
    with adapters_off(any_model):
        assert torch.equal(logits(any_model), before)
    assert all(layer.lora_A["default"].weight.requires_grad for layer in lora_layers(any_model).values())


def test_a_reference_within_the_network_leaves_its_gradients_alone(make: Make) -> None:
    network = trained(make("llama"))
    mask = torch.ones_like(IDS, dtype=torch.bool)

    def gradients(*, with_reference: bool) -> list[Tensor]:
        network.zero_grad()
        loss = token_stats(network, IDS, mask, mask=mask).logp.sum()
        if with_reference:
            with torch.no_grad():
                token_stats(WithoutAdapter(network), IDS, mask, mask=mask)
        loss.backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    for one, other in zip(gradients(with_reference=False), gradients(with_reference=True), strict=True):
        assert torch.equal(one, other)


def test_log_probs_and_kl_of_the_base_are_those_of_a_copy(make: Make) -> None:
    base = make("llama")
    network = trained(copy.deepcopy(base))
    mask = torch.ones_like(IDS, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(
            token_stats(WithoutAdapter(network), IDS, mask, mask=mask).logp,
            token_stats(base, IDS, mask, mask=mask).logp,
        )
        ours = token_stats(network, IDS, mask, mask=mask, ref_model=WithoutAdapter(network)).kl
        theirs = token_stats(network, IDS, mask, mask=mask, ref_model=base).kl
    assert torch.equal(ours, theirs)
    assert ours.max() > 1e-2


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_log_probs_take_the_fast_path(make: Make, monkeypatch: pytest.MonkeyPatch, targets: str | list[str]) -> None:
    """Also with an adapter on the output layer, whose gradients go through the weight that it makes."""
    network = trained(make("llama"), LoraOptions(r=4, alpha=8, dropout=0.0, target_modules=targets)).double()
    mask = torch.ones_like(IDS, dtype=torch.bool)
    results = []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(logprobs, "head_is_expressible", lambda _: False)
        network.zero_grad()
        stats = token_stats(network, IDS, mask, mask=mask, entropy=True, ref_model=WithoutAdapter(network))
        (stats.logp.sum() + stats.entropy.sum() + stats.kl.sum()).backward()
        results.append([*stats[:3], *(p.grad for p in network.parameters() if p.requires_grad)])
        assert not fast or head_is_expressible(network)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_dropout_on_the_output_layer_takes_the_plain_path(make: Make) -> None:
    options = LoraOptions(r=4, alpha=8, dropout=0.1, target_modules=["lm_head"])
    with pytest.warns(UserWarning, match="plain path"):
        assert not head_is_expressible(add_lora(make("llama"), options))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_the_sampler_reads_merged_weights_and_leaves_the_model_alone(make: Make, name: str) -> None:
    network = trained(make(name))
    before = {key: values.clone() for key, values in network.state_dict().items()}
    engine = StaticCacheEngine(network, TOKENIZER)
    check_logits(engine)
    assert all(torch.equal(values, before[key]) for key, values in network.state_dict().items())
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with pytest.raises(UserError, match="does not reproduce"):
        check_logits(engine)
    engine.refresh()
    check_logits(engine)


def test_the_samplers_copies_are_counted(make: Make, tmp_path: Path) -> None:
    """Of every adapted layer, not only of those that are joined."""
    save_model(make("llama"), TOKENIZER, tmp_path)
    device = torch.device("cuda")  # where nothing is packed
    sizes = {"rows": 0, "slots": 0, "dtype_bytes": 1}
    plain, network = empty_network(str(tmp_path)), add_lora(empty_network(str(tmp_path)), OPTIONS)
    assert all(parameter.is_meta for parameter in network.parameters())
    elements = sum(p.numel() for name, p in plain.named_parameters() if "_proj" in name and name.endswith("weight"))
    assert sampler_memory("static", network, device, **sizes) == elements
    assert 0 < sampler_memory("static", plain, device, **sizes) < elements


def test_parameters_that_learn_and_that_do_not(make: Make, tmp_path: Path) -> None:
    save_model(make("llama"), TOKENIZER, tmp_path)
    learn, rest = count_adapter(str(tmp_path), OPTIONS, dtype="bfloat16")
    layers = [m for name, m in make("llama").named_modules() if name.endswith("_proj")]
    assert learn.number == sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    assert learn.size == 4 * learn.number  # float32 beside a bfloat16 base
    assert rest.number == make("llama").num_parameters()
    assert rest.size == 2 * rest.number
    scored, _ = count_adapter(str(tmp_path), OPTIONS, auto_class=AutoModelForSequenceClassification)
    assert scored.number == learn.number + 32


def test_an_export_is_the_merged_model(any_model: PreTrainedModel, tmp_path: Path) -> None:
    tied = any_model.config.get_text_config().tie_word_embeddings
    state = {name: values.clone() for name, values in trained(any_model).state_dict().items()}
    save_model(any_model, TOKENIZER, tmp_path / "model")
    assert all(torch.equal(values, state[name]) for name, values in any_model.state_dict().items())
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    torch.testing.assert_close(logits(stored), logits(any_model), rtol=1e-4, atol=1e-4)
    assert stored.config.get_text_config().tie_word_embeddings == tied
    merge_(any_model)
    assert torch.equal(logits(stored), logits(any_model))
    assert all(parameter.requires_grad for parameter in any_model.parameters())
    assert not lora_layers(any_model)


def test_a_network_without_adapters_is_its_own_merger(make: Make) -> None:
    network = make("llama")
    assert merged(network) is network


def test_adapters_of_a_narrow_base_are_wide(make: Make) -> None:
    network = add_lora(make("llama").bfloat16(), OPTIONS)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    assert logits(network).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("llama", ["q_porj"], "names q_porj, but LlamaForCausalLM .* did you mean 'q_proj'"),
        ("llama", ["embed_tokens"], "names embed_tokens"),
        ("llama_tied", ["q_proj", "lm_head"], "shares its weight with the input embedding"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(make: Make, name: str, targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(make(name), LoraOptions(r=4, alpha=8, dropout=0.0, target_modules=targets))


def test_named_layers_are_the_only_ones(make: Make) -> None:
    network = add_lora(make("llama"), LoraOptions(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj"]))
    assert {name.rpartition(".")[2] for name in lora_layers(network)} == {"q_proj", "v_proj"}
    trunk = make("llama").get_decoder()
    options = LoraOptions(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "lm_head"])
    assert len(lora_layers(add_lora(trunk, options, partly=True))) == 2


def test_activations_may_be_recomputed(make: Make) -> None:
    gradients = []
    for recompute in (False, True):
        network = trained(make("llama")).train()
        if recompute:
            network.activation_checkpointing_enable()
        network(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------ files
@pytest.fixture
def adapter(make: Make, tmp_path: Path) -> tuple[Path, Path, PreTrainedModel]:
    """Folders of a base and of an adapter, and the network they make."""
    save_model(make("llama"), TOKENIZER, tmp_path / "base")
    network = trained(load_causal_lm(str(tmp_path / "base")))
    save_adapter(network, TOKENIZER, tmp_path / "adapter", str(tmp_path / "base"))
    return tmp_path / "base", tmp_path / "adapter", network


def test_an_adapter_in_a_folder_is_read_by_us_and_by_peft(adapter: tuple[Path, Path, PreTrainedModel]) -> None:
    base, folder, network = adapter
    ours = load_causal_lm(str(folder), tokenizer=load_tokenizer(str(folder)))
    torch.testing.assert_close(logits(ours), logits(network), rtol=1e-4, atol=1e-4)
    assert not lora_layers(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of keys that it misses
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(logits(theirs), logits(network), rtol=1e-5, atol=1e-5)
    assert (folder / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    automatic = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(automatic), logits(network), rtol=1e-5, atol=1e-5)


def test_an_adapter_that_peft_wrote_is_read(make: Make, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_model(make("gpt2"), TOKENIZER, tmp_path / "base")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    network = get_peft_model(network, LoraConfig(target_modules=["c_attn"], use_rslora=True, fan_in_fan_out=True))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * parameter.requires_grad)
    network.save_pretrained(tmp_path / "adapter")
    ours = load_causal_lm(str(tmp_path / "adapter"), tokenizer=load_tokenizer(str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(ours), logits(network.eval()), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_other_weights_is_refused(adapter: tuple[Path, Path, PreTrainedModel], make: Make) -> None:
    base, folder, network = adapter
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.02)
    save_model(network, TOKENIZER, base)
    with pytest.raises(UserError, match="belongs to other weights than"):
        load_causal_lm(str(folder))


def test_a_fingerprint_heeds_weights_and_no_adapter_or_dtype(make: Make) -> None:
    network = add_lora(make("llama"), OPTIONS)
    prints = [fingerprint_of_base(network), fingerprint_of_base(trained(make("llama")))]
    prints += [
        fingerprint_of_base(add_lora(make("llama").to(dtype), OPTIONS)) for dtype in (torch.double, torch.bfloat16)
    ]
    assert len(set(prints)) == 1
    wide = nn.Linear(64, 64).requires_grad_(False)  # of which only a sample is read
    assert fingerprint_of_base(wide) == fingerprint_of_base(copy.deepcopy(wide).bfloat16())
    with torch.no_grad():
        network.model.norm.weight[-1] += 0.1
    assert fingerprint_of_base(network) != prints[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{"), "does not say which model"),
        (lambda f: edit_config(f, base_model_name_or_path=None), "does not say which model"),
        (lambda f: edit_config(f, base_model_name_or_path="/nowhere/base"), "needs the model it was trained on"),
        (lambda f: edit_config(f, base_model_name_or_path=str(f)), "an adapter itself"),
        (lambda f: edit_config(f, peft_type="VERA"), "of kind VERA"),
        (lambda f: edit_config(f, use_dora=True), "more than LoRA"),
        (lambda f: edit_config(f, r=5), "is not in it"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"0" * 99), "adapter_model.safetensors is damaged"),
        (lambda f: drop_one(f), "is not whole"),
    ],
)
def test_damaged_adapters_end_in_one_line(
    adapter: tuple[Path, Path, PreTrainedModel], damage: Callable[[Path], None], message: str
) -> None:
    _, folder, _ = adapter
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_causal_lm(str(folder))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_one(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    values = load_file(path)
    del values[min(values)]
    save_file(values, path)


def test_a_reward_model_keeps_its_head_beside_the_adapter(make: Make, tmp_path: Path) -> None:
    save_model(make("llama"), TOKENIZER, tmp_path / "base")
    reward = RewardModel.from_backbone(str(tmp_path / "base"))
    trained(reward.network)
    reward.head.requires_grad_(True)
    reward.set_normalisation(torch.tensor([1.0, 2.0, 4.0]))
    save_adapter(reward.network, TOKENIZER, tmp_path / "adapter", str(tmp_path / "base"))
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        expected = reward.normalised_scores(IDS, mask)
        for merge in (True, False):
            stored = RewardModel.from_pretrained(str(tmp_path / "adapter"), merge=merge)
            torch.testing.assert_close(stored.normalised_scores(IDS, mask), expected, rtol=1e-4, atol=1e-5)
            assert bool(lora_layers(stored.network)) is not merge
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
        theirs.config.pad_token_id = None
        scores = theirs(IDS[:1]).logits[0, 0] - reward.reward_mean
    torch.testing.assert_close(scores, expected[0], rtol=1e-4, atol=1e-5)


def test_adapters_of_one_base_hold_it_once(make: Make, tmp_path: Path) -> None:
    save_model(make("llama"), TOKENIZER, tmp_path)
    policy = trained(load_causal_lm(str(tmp_path)))
    reward = RewardModel.from_backbone(str(tmp_path))
    trained(reward.network, LoraOptions(r=2, alpha=2, dropout=0.0, target_modules=["q_proj"]))
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        reward.network.model.norm.weight[0] += 1.0
        before = logits(policy), reward(IDS, mask)
        frozen = sum(not p.requires_grad for p in reward.network.base_model.parameters())
        assert share_frozen(policy, reward.network) == frozen - 1
        assert torch.equal(logits(policy), before[0])
        assert torch.equal(reward(IDS, mask), before[1])
    own = {id(p) for p in policy.parameters()}
    assert sum(id(p) in own for p in reward.network.parameters()) == frozen - 1
    reward.network.double()
    assert policy.model.embed_tokens.weight.dtype == torch.float64  # they move and convert together


def test_weights_that_learn_are_not_shared(make: Make) -> None:
    assert share_frozen(make("llama"), make("llama").requires_grad_(False)) == 0
