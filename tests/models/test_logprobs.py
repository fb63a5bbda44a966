"""Token statistics of whole models: alignment, padding, packing, heads."""

import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from align_kernels import _plan, few_logits
from lightning_align.models import logprobs
from lightning_align.models.logprobs import head_is_expressible, next_token_logps, token_stats

Pad = Callable[..., tuple[Tensor, Tensor, Tensor]]
Make = Callable[..., PreTrainedModel]


def alone(model: PreTrainedModel, row: list[int], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a sequence's tokens but the first two, in float64 from the model's own logits."""
    logits = model(input_ids=torch.tensor([row])).logits[0, 1:-1].double() / temperature
    log_probs = logits.log_softmax(-1)
    labels = torch.tensor(row[2:])
    return log_probs.gather(1, labels[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_conv_1_equals_a_float64_gather_of_log_softmax(
    any_model: PreTrainedModel, sequences: list[list[int]], pad: Pad, temperature: float
) -> None:
    ids, real, completion = pad(sequences, "right", 0)
    with torch.no_grad():
        stats = token_stats(any_model, ids, real, mask=completion, temperature=temperature, entropy=True)
        expected = [alone(any_model, row, temperature) for row in sequences]
    assert stats.entropy is not None
    assert stats.logp.dtype == torch.float32
    torch.testing.assert_close(stats.logp[completion].double(), torch.cat([e[0] for e in expected]), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        stats.entropy[completion].double(), torch.cat([e[1] for e in expected]), rtol=0, atol=1e-5
    )
    assert not stats.logp[~completion].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_conv_2_padding_side_and_amount_do_not_matter(
    any_model: PreTrainedModel, sequences: list[list[int]], pad: Pad, side: str, extra: int
) -> None:
    results = []
    for arguments in ((sequences, "right", 0), (sequences, side, extra)):
        ids, real, completion = pad(*arguments)
        with torch.no_grad():
            results.append(token_stats(any_model, ids, real, mask=completion).logp[completion])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)


def test_conv_3_what_follows_the_mask_does_not_matter(llama: PreTrainedModel, pad: Pad) -> None:
    ids, real, mask = pad([[3, 4, 5, 6, 7, 8]], "right", 0)
    mask[0, 4:] = False
    changed = ids.clone()
    changed[0, 4:] = 9
    first, second = (token_stats(llama, tokens, real, mask=mask).logp for tokens in (ids, changed))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    changed[0, 3] = 9
    assert not torch.allclose(first, token_stats(llama, changed, real, mask=mask).logp)


def test_conv_4_pad_id_may_be_the_eos_id(any_model: PreTrainedModel, sequences: list[list[int]], pad: Pad) -> None:
    gradients, values = [], []
    for pad_id in (0, 2):
        ids, real, completion = pad(sequences, "right", 3, pad_id)
        stats = token_stats(any_model, ids, real, mask=completion)
        any_model.zero_grad()
        stats.logp.sum().backward()
        values.append(stats.logp)
        gradients.append([p.grad.clone() for p in any_model.parameters() if p.grad is not None])
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-5)
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_conv_9_nothing_masked_gives_zero_loss_and_zero_gradients(llama: PreTrainedModel) -> None:
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    stats = token_stats(
        llama, ids, torch.ones_like(ids), mask=torch.zeros_like(ids), entropy=True, correct=True, ref_model=llama
    )
    assert stats.entropy is not None
    (stats.logp.sum() - stats.entropy.sum()).backward()
    assert not stats.logp.any()
    for parameter in llama.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_pre_1_packed_documents_equal_documents_alone(any_model: PreTrainedModel, sequences: list[list[int]]) -> None:
    ids = torch.tensor([[*chain.from_iterable(sequences), 0, 0]])
    documents = torch.tensor([[i for i, row in enumerate(sequences) for _ in row] + [-1, -1]])
    positions = torch.tensor([[t for row in sequences for t in range(len(row))] + [0, 0]])
    real = documents >= 0
    mask = torch.tensor([[t >= 2 for row in sequences for t in range(len(row))] + [False, False]])
    packed = token_stats(any_model, ids, real, mask=mask, position_ids=positions, document_ids=documents)
    any_model.zero_grad()
    packed.logp.sum().backward()
    gradients = [p.grad.clone() for p in any_model.parameters() if p.grad is not None]
    expected = torch.cat([alone(any_model, row)[0] for row in sequences])
    torch.testing.assert_close(packed.logp[mask].double(), expected, rtol=0, atol=1e-5)
    any_model.zero_grad()
    expected.sum().backward()
    for ours, naive in zip(gradients, (p.grad for p in any_model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)
    leaking = token_stats(any_model, ids, real, mask=mask)
    assert (leaking.logp[mask] - expected).abs().max() > 1e-2


def test_a_first_token_of_a_document_has_no_log_prob(llama: PreTrainedModel) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    documents = torch.tensor([[0, 0, 1, 1]])
    logp = token_stats(llama, ids, documents >= 0, mask=torch.ones_like(ids), document_ids=documents).logp
    assert logp.ne(0).tolist() == [[False, True, False, True]]


def test_gradients_equal_naive_autograd_in_float64(
    any_model: PreTrainedModel, sequences: list[list[int]], pad: Pad
) -> None:
    model = any_model.double()
    # eager attention in float64 makes nan of padding that sees nothing but padding, which a window can do
    window = model.config.to_dict().get("sliding_window")
    for rows in [[row] for row in sequences] if window else [sequences]:
        ids, real, completion = pad(rows, "right", 0)
        stats = token_stats(model, ids, real, mask=completion, temperature=0.8, entropy=True)
        assert stats.entropy is not None
        assert stats.logp.dtype == torch.float64
        (stats.logp.sum() + 0.5 * stats.entropy.sum()).backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    expected = [alone(model, row, 0.8) for row in sequences]
    sum(logp.sum() + 0.5 * entropy.sum() for logp, entropy in expected).backward()  # type: ignore[union-attr]
    naive = [p.grad for p in model.parameters() if p.grad is not None]
    for first, second in zip(ours, naive, strict=True):
        # rotary angles are float32 in transformers, and the last bit of their cosines depends on the place in a vector
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_eval_6_kl_to_itself_is_zero_and_to_another_is_exact(make: Make, sequences: list[list[int]], pad: Pad) -> None:
    policy, other = make("llama"), make("gemma2")
    ids, real, completion = pad(sequences, "left", 2)
    stats = token_stats(policy, ids, real, mask=completion, ref_model=policy)
    assert stats.kl is not None
    assert not stats.kl.any()
    stats = token_stats(policy, ids, real, mask=completion, ref_model=other, temperature=0.7)
    assert stats.kl is not None
    kls = []
    with torch.no_grad():
        for row in sequences:
            p, q = ((m(input_ids=torch.tensor([row])).logits[0, 1:-1] / 0.7).log_softmax(-1) for m in (policy, other))
            kls.append((p.exp() * (p - q)).sum(1))
    torch.testing.assert_close(stats.kl[completion], torch.cat(kls), rtol=1e-4, atol=1e-5)
    stats.kl.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for p in other.parameters())


def test_correct_counts_argmax_hits(llama: PreTrainedModel, sequences: list[list[int]], pad: Pad) -> None:
    ids, real, completion = pad(sequences, "right", 0)
    with torch.no_grad():
        predicted = llama(input_ids=ids, attention_mask=real).logits.argmax(-1)
        ids[:, 1:] = torch.where(torch.arange(ids.shape[1] - 1) % 2 == 0, predicted[:, :-1], ids[:, 1:])
        hits = torch.zeros_like(real)
        hits[:, 1:] = llama(input_ids=ids, attention_mask=real).logits.argmax(-1)[:, :-1] == ids[:, 1:]
        correct = token_stats(llama, ids, real, mask=completion, correct=True).correct
    assert correct is not None
    assert correct.tolist() == (hits & completion).tolist()


# ---------------------------------------------------------------------- heads
def test_dpo_7_mean_logits_equal_those_of_all_logits(
    any_model: PreTrainedModel, sequences: list[list[int]], pad: Pad
) -> None:
    """Of every head but one with a soft-cap, whose mean no row of means gives."""
    ids, real, completion = pad(sequences, "right", 0)
    found = token_stats(any_model, ids, real, mask=completion, temperature=0.7, mean_logit=True).mean_logit
    if getattr(any_model.config, "final_logit_softcapping", None) is not None:
        assert found is None
        return
    with torch.no_grad():
        expected = [any_model(input_ids=torch.tensor([row])).logits[0, 1:-1].mean(1) for row in sequences]
    assert found is not None
    assert not found.requires_grad
    torch.testing.assert_close(found[completion], torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert token_stats(any_model, ids, real, mask=completion).mean_logit is None


@pytest.mark.parametrize("plain", [False, True])
def test_mean_log_probs_and_their_gradients_are_those_of_all_log_probs(
    any_model: PreTrainedModel, sequences: list[list[int]], pad: Pad, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(logprobs, "head_is_expressible", lambda model: False)
    ids, real, completion = pad(sequences, "left", 2)
    stats = token_stats(any_model, ids, real, mask=completion, temperature=0.7, mean_logp=True)
    assert stats.mean_logp is not None
    logits = [any_model(input_ids=torch.tensor([row])).logits[0, 1:-1].float() for row in sequences]
    expected = torch.cat([(row / 0.7).log_softmax(-1).mean(1) for row in logits])
    torch.testing.assert_close(stats.mean_logp[completion], expected, rtol=1e-5, atol=1e-5)
    assert not stats.mean_logp[~completion].any()
    place = torch.linspace(-1, 1, len(expected))  # another weight for each token
    parameters = [parameter for parameter in any_model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((stats.mean_logp[completion] * place).sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad((expected * place).sum(), parameters, allow_unused=True)
    for gradient, right in zip(found, wanted, strict=True):
        if right is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)


def test_every_head_is_expressible(any_model: PreTrainedModel) -> None:
    assert head_is_expressible(any_model)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        output = any_model(input_ids=ids, output_hidden_states=False)
        hidden = any_model.get_decoder()(input_ids=ids).last_hidden_state
        torch.testing.assert_close(logprobs._head(any_model).logits(hidden), output.logits, rtol=1e-5, atol=1e-5)


def bent(model: PreTrainedModel) -> PreTrainedModel:
    """The model with an output layer that no weight, scale and soft-cap describe."""

    class Bent(nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states).abs()

    layer = Bent(32, model.config.vocab_size, bias=False)
    layer.weight = model.get_output_embeddings().weight
    model.set_output_embeddings(layer)
    return model


def test_an_unknown_head_takes_the_plain_path_with_one_warning(
    make: Make, sequences: list[list[int]], pad: Pad
) -> None:
    model = bent(make("llama"))
    ids, real, completion = pad(sequences, "left", 1)
    with pytest.warns(UserWarning, match="plain path"):
        stats = token_stats(model, ids, real, mask=completion, entropy=True, mean_logit=True, ref_model=make("llama"))
    assert stats.kl is not None
    assert stats.mean_logit is not None
    with torch.no_grad():
        means = [model(input_ids=torch.tensor([row])).logits[0, 1:-1].mean(1) for row in sequences]
    torch.testing.assert_close(stats.mean_logit[completion], torch.cat(means), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        stats.logp[completion].double(), torch.cat([alone(model, row)[0] for row in sequences]), rtol=0, atol=1e-5
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = token_stats(make("llama"), ids, real, mask=completion, ref_model=model)
    assert again.kl is not None
    assert (again.kl[completion] > 0).all()


def test_a_scale_that_the_configuration_does_not_name_is_found_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGIT_SCALES", ())
    with pytest.warns(UserWarning, match="plain path"):
        assert not head_is_expressible(make("granite"))


def test_the_head_check_does_not_round_with_the_training(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGIT_SCALES", ())
    model = make("granite", logits_scaling=1.01)  # less than bfloat16 would forgive
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="plain path"):
        assert not head_is_expressible(model)


def test_the_head_check_leaves_modes_and_random_numbers_alone(make: Make) -> None:
    model = make("gpt2", resid_pdrop=0.3).train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert head_is_expressible(model)
    assert torch.equal(torch.rand(4), expected)
    assert model.training


# ---------------------------------------------------------------------- memory and use
class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_logits_of_a_batch_never_exist(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 3001
    model = make("llama", vocab_size=vocabulary)
    ids = torch.randint(0, vocabulary, (6, 40), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids, dtype=torch.bool)
    head_is_expressible(model)
    monkeypatch.setattr(few_logits, "FEW_LOGITS", 0)
    monkeypatch.setattr(_plan, "_memory_to_keep", lambda device: 0)
    monkeypatch.setattr(_plan, "LEAST_CHUNK_ROWS", 16)
    monkeypatch.setitem(_plan.CHUNK_BYTES, "cpu", 16 * vocabulary * 4)
    with Largest() as largest:
        token_stats(model, ids, real, mask=real, entropy=True).logp.sum().backward()
    assert largest.elements < ids.numel() * vocabulary / 4
    # and with logits kept, only those of wanted tokens are
    monkeypatch.undo()
    mask = real.clone()
    mask[:, :20] = False
    with Largest() as largest:
        token_stats(model, ids, real, mask=mask, entropy=True).logp.sum().backward()
    assert largest.elements == int(mask.sum()) * vocabulary


def test_no_gradient_keeps_nothing(llama: PreTrainedModel, sequences: list[list[int]], pad: Pad) -> None:
    ids, real, completion = pad(sequences, "right", 0)
    with torch.no_grad():
        without = token_stats(llama, ids, real, mask=completion).logp
    with_gradient = token_stats(llama, ids, real, mask=completion).logp
    assert not without.requires_grad
    assert torch.equal(without, with_gradient)  # the ratio of a first update must be exactly 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_and_autocast(make: Make, sequences: list[list[int]], pad: Pad, attention: str) -> None:
    model = make("llama")
    model.set_attn_implementation(attention)
    ids, real, completion = pad([list(chain.from_iterable(sequences))], "right", 0)
    documents = torch.tensor([[i for i, row in enumerate(sequences) for _ in row]])
    arguments = {"mask": completion, "document_ids": documents}
    exact = token_stats(model, ids, real, **arguments).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = token_stats(model, ids, real, **arguments).logp
    narrow = token_stats(model.bfloat16(), ids, real, **arguments).logp
    for logp in (cast, narrow):
        assert logp.dtype == torch.float32
        torch.testing.assert_close(logp, exact, rtol=2e-2, atol=0.15)
    cast.sum().backward()


def test_a_wrong_temperature_is_refused(llama: PreTrainedModel) -> None:
    ids = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match="temperature is 0"):
        token_stats(llama, ids, torch.ones_like(ids), mask=torch.ones_like(ids), temperature=0.0)


def test_distributions_after_tokens_are_the_models_own(
    any_model: PreTrainedModel, sequences: list[list[int]], pad: Pad
) -> None:
    for side in ("left", "right"):
        ids, real, completion = pad(sequences, side, 2)
        found = next_token_logps(any_model, ids, real, after=completion)
        assert found.dtype == torch.float32
        with torch.no_grad():
            own = [any_model(input_ids=torch.tensor([row])).logits[0, 2:].double().log_softmax(-1) for row in sequences]
        torch.testing.assert_close(found.double(), torch.cat(own), rtol=0, atol=1e-5)
