"""Both engines: greedy tokens and log-probs against transformers, independence of the batch, refilling, new weights."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lightning_align.errors import UserError
from lightning_align.rollout import (
    Engine,
    GenerateEngine,
    Rollout,
    SamplingParams,
    StaticCacheEngine,
    build_engine,
)

ENGINES = {"static": StaticCacheEngine, "generate": GenerateEngine}
MakeEngine = Callable[..., Engine]


@pytest.fixture(params=sorted(ENGINES))
def make(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> MakeEngine:
    """Builds each engine in turn over a model."""
    return lambda model, max_batch=128: ENGINES[request.param](model, tokenizer, max_batch)


def sampling(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 12} | changes))


def often_ending(**changes: Any) -> SamplingParams:
    """One token in five ends a completion, so lengths differ much."""
    return sampling(max_new_tokens=30, stop_strings=("w1",), **changes)


def alone(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What transformers' greedy search continues a single prompt with."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=2, pad_token_id=0)
    return model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()


@torch.no_grad()
def exact_logp(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probs of the completions by one float64 forward a row, without padding or cache."""
    double = copy.deepcopy(model).double().eval()
    logp = torch.zeros(rollout.input_ids.shape, dtype=torch.float64)
    for row, (ids, real) in enumerate(zip(rollout.input_ids, rollout.attention_mask, strict=True)):
        sequence = ids[real]
        logits = double(sequence[None]).logits[0, :-1].double() / temperature
        logp[row, 1 : len(sequence)] = logits.log_softmax(-1).gather(1, sequence[1:, None])[:, 0]
    return logp * rollout.completion_mask


def assert_same(first: Rollout, second: Rollout) -> None:
    assert first.completion_ids() == second.completion_ids()
    assert first.finish_reason == second.finish_reason
    assert first.completions == second.completions
    for a, b in zip(first.engine_logp, second.engine_logp, strict=True):
        torch.testing.assert_close(a[a != 0], b[b != 0], atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------------- against transformers
def test_greedy_tokens_equal_generate_for_every_architecture(
    any_model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]]
) -> None:
    rollout = make(any_model, max_batch=3).generate(
        prompts, sampling(greedy=True, max_new_tokens=18), seeds=[0] * len(prompts)
    )
    assert rollout.completion_ids() == [alone(any_model, prompt, 18) for prompt in prompts]


def test_conv_1_logp_equals_a_float64_forward_for_every_architecture(
    any_model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]]
) -> None:
    engine = make(any_model, max_batch=5)
    for temperature in (1.0, 0.7):
        rollout = engine.generate(prompts, sampling(temperature=temperature, max_new_tokens=25), seeds=range(7))
        difference = rollout.engine_logp - exact_logp(any_model, rollout, temperature)
        assert float(difference.abs().max()) < 2e-5


def test_logp_of_truncated_and_greedy_samples_are_those_of_the_whole_distribution(
    model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]]
) -> None:
    for changes in ({"top_k": 3, "top_p": 0.8}, {"min_p": 0.2, "temperature": 1.5}, {"greedy": True}):
        asked = sampling(**changes)
        rollout = make(model).generate(prompts, asked, seeds=range(7))
        difference = rollout.engine_logp - exact_logp(model, rollout, asked.temperature)
        assert float(difference.abs().max()) < 2e-5


def test_both_engines_draw_the_same_completions(
    any_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    asked = often_ending(num_samples=3, top_p=0.95)
    ours, theirs = (
        engine(any_model, tokenizer, max_batch=4).generate(prompts, asked, seeds=range(21))
        for engine in ENGINES.values()
    )
    assert_same(ours, theirs)


# ---------------------------------------------------------------------- independence of the batch
@pytest.mark.parametrize("max_batch", [1, 2, 3, 8, 13])
def test_completions_depend_on_prompt_and_seed_not_on_the_batch(
    model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]], max_batch: int
) -> None:
    asked, seeds = often_ending(num_samples=3), [7 * row for row in range(21)]
    expected = make(model).generate(prompts, asked, seeds=seeds)
    assert len(set(expected.completion_lengths.tolist())) > 8
    assert_same(make(model, max_batch).generate(prompts, asked, seeds=seeds), expected)

    order = [4, 0, 6, 2]
    some = make(model, max_batch).generate(
        [prompts[index] for index in order],
        asked,
        seeds=[seeds[3 * index + sample] for index in order for sample in range(3)],
    )
    assert_same(some, expected.select([3 * index + sample for index in order for sample in range(3)]))


def test_a_prompt_shared_by_samples_is_the_same_as_the_prompt_repeated(
    any_model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]]
) -> None:
    shared = make(any_model, 10).generate(prompts, often_ending(num_samples=4), seeds=range(28))
    repeated = make(any_model, 10).generate(
        [prompt for prompt in prompts for _ in range(4)], often_ending(), seeds=range(28)
    )
    assert_same(shared, repeated)
    assert shared.prompt_index.tolist() == [index for index in range(7) for _ in range(4)]


def test_equal_seeds_give_equal_samples_and_different_ones_different(
    model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]]
) -> None:
    ids = make(model).generate(prompts[:1], sampling(num_samples=4), seeds=[5, 6, 5, 7]).completion_ids()
    assert ids[0] == ids[2]
    assert len({tuple(row) for row in ids}) == 3


def test_rows_come_back_in_the_order_of_the_prompts_with_their_records(
    model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]]
) -> None:
    records = [{"prompt": index} for index in range(7)]
    rollout = make(model, 4).generate(prompts, often_ending(num_samples=2), seeds=range(14), records=records)
    for row, prompt in enumerate(prompt for prompt in prompts for _ in range(2)):
        assert rollout.input_ids[row, : len(prompt)].tolist() == prompt
        assert rollout.records[row] is records[row // 2]


def test_finished_rows_leave_and_waiting_prompts_enter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every token but the first of each completion costs one row of one step; few rows are idle while prompts wait."""
    engine, sizes = StaticCacheEngine(model, tokenizer, max_batch=8), []
    step = engine._decoder.step
    monkeypatch.setattr(engine._decoder, "step", lambda tokens, *rest: sizes.append(len(tokens)) or step(tokens, *rest))
    lengths = engine.generate(prompts * 8, often_ending(), seeds=range(56)).completion_lengths
    assert sum(sizes) == int((lengths - 1).sum())
    assert max(sizes) <= 8
    waiting = sizes[: len(sizes) - 1 - sizes[::-1].index(8)]  # until the batch was full for the last time
    assert sum(waiting) / len(waiting) > 7


# ---------------------------------------------------------------------- endings (the ledger's tests have the details)
def test_eos_and_stop_strings_end_completions(
    model: PreTrainedModel, make: MakeEngine, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    asked = sampling(max_new_tokens=40, stop_strings=("w9", "w7 w", "w33"))
    rollout = make(model, 16).generate(prompts, sampling(**vars(asked) | {"num_samples": 15}), seeds=range(105))
    assert set(rollout.finish_reason) == {"eos", "stop", "length"}
    for ids, reason in zip(rollout.completion_ids(), rollout.finish_reason, strict=True):
        ends = [
            token == 2 or any(text in tokenizer.decode(ids[: index + 1]) for text in asked.stop_strings)
            for index, token in enumerate(ids)
        ]
        assert not any(ends[:-1])
        assert ends[-1] == (reason != "length")
        assert (ids[-1] == 2) == (reason == "eos")
        assert reason != "length" or len(ids) == 40


def test_one_new_token_needs_no_decoding_step(
    model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]]
) -> None:
    rollout = make(model, 3).generate(prompts, sampling(max_new_tokens=1, num_samples=2), seeds=range(14))
    assert rollout.completion_lengths.tolist() == [1] * 14
    longer = make(model, 3).generate(prompts, sampling(num_samples=2), seeds=range(14))
    assert rollout.completion_ids() == [ids[:1] for ids in longer.completion_ids()]


def test_a_prompt_may_leave_room_for_exactly_the_new_tokens(model: PreTrainedModel, make: MakeEngine) -> None:
    asked = sampling(max_new_tokens=4, greedy=True)
    prompt = [4 + index % 40 for index in range(60)]
    assert make(model).generate([prompt], asked, seeds=[0]).completion_ids() == [alone(model, prompt, 4)]
    with pytest.raises(UserError, match="prompt 0 has 61 tokens"):
        make(model).generate([[*prompt, 4]], asked, seeds=[0])


# ---------------------------------------------------------------------- distribution
def test_samples_follow_the_models_distribution(tokenizer: PreTrainedTokenizerFast, make: MakeEngine) -> None:
    """All completions of two tokens over a vocabulary of five, counted against their probabilities."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(20)
    prompt, draws = [1, 3], 4000
    rollout = make(model, 500).generate(
        [prompt], sampling(max_new_tokens=2, num_samples=draws, temperature=0.8), seeds=range(draws)
    )
    outcomes = [(2,)] + [pair for pair in itertools.product(range(5), repeat=2) if pair[0] != 2]
    probability = []
    for outcome in outcomes:
        sequence = torch.tensor([[*prompt, *outcome]])
        logp = (model(sequence).logits[0].double() / 0.8).log_softmax(-1)
        probability.append(sum(logp[1 + step, token].item() for step, token in enumerate(outcome)))
    expected = draws * torch.tensor(probability).exp()
    counts = Counter(map(tuple, rollout.completion_ids()))
    assert set(counts) <= set(outcomes)
    assert abs(float(expected.sum()) - draws) < 1e-2
    likely = [index for index in range(len(outcomes)) if expected[index] > 5]
    observed = [counts[outcomes[index]] for index in likely] + [
        sum(counts[outcome] for index, outcome in enumerate(outcomes) if index not in likely)
    ]
    wanted = expected[likely].tolist()
    assert len(likely) > 8
    assert stats.chisquare(observed, [*wanted, draws - sum(wanted)]).pvalue > 1e-3


# ---------------------------------------------------------------------- weights
def update_in_place(model: PreTrainedModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()


def load_other_weights(model: PreTrainedModel) -> None:
    model.load_state_dict({name: 1.3 * value for name, value in model.state_dict().items()})


def replace_a_parameter(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].self_attn.v_proj
    layer.weight = nn.Parameter(layer.weight.detach().flip(0))


@pytest.mark.parametrize("change", [update_in_place, load_other_weights, replace_a_parameter])
@pytest.mark.parametrize("explicit", [False, True])
def test_new_weights_are_taken_up(
    model: PreTrainedModel,
    make: MakeEngine,
    prompts: list[list[int]],
    change: Callable[[PreTrainedModel], None],
    explicit: bool,
) -> None:
    engine, asked = make(model), sampling(greedy=True)
    before = engine.generate(prompts, asked, seeds=[0] * 7)
    change(model)
    if explicit:
        engine.refresh()
    after = engine.generate(prompts, asked, seeds=[0] * 7)
    assert_same(after, make(model).generate(prompts, asked, seeds=[0] * 7))
    assert float((after.engine_logp - exact_logp(model, after)).abs().max()) < 2e-5
    assert after.completion_ids() != before.completion_ids()


def test_diverged_weights_are_an_error(model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]]) -> None:
    engine = make(model, 3)
    model.model.norm.weight.data[3] = torch.nan
    for greedy in (False, True):
        with pytest.raises(UserError, match="its weights have diverged"):
            engine.generate(prompts, sampling(greedy=greedy), seeds=range(7))
    model.model.norm.weight.data[3] = 1.0
    engine.generate(prompts, sampling(), seeds=range(7))


# ---------------------------------------------------------------------- surroundings
def test_sampling_leaves_the_model_and_the_random_state_as_they_were(
    tokenizer: PreTrainedTokenizerFast, make: MakeEngine, prompts: list[list[int]]
) -> None:
    """A model with dropout and generation defaults of its own, in training: neither has a part in sampling."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=53, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5, eos_token_id=2, pad_token_id=0
    )
    model = GPT2LMHeadModel(config).train()
    model.transformer.h[0].eval()  # a mode of its own
    model.generation_config.update(repetition_penalty=9.0, temperature=0.1, do_sample=True, max_length=3)
    settings, modes = model.generation_config.to_dict(), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    rollout = make(model).generate(prompts, sampling(), seeds=range(7))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert float((rollout.engine_logp - exact_logp(model, rollout)).abs().max()) < 2e-5
    assert not rollout.engine_logp.requires_grad


def test_rollouts_can_be_trained_on(model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]]) -> None:
    rollout = make(model).generate(prompts, sampling(), seeds=range(7))
    logits = model(rollout.input_ids, attention_mask=rollout.attention_mask).logits
    (logits.logsumexp(-1) * rollout.completion_mask + rollout.engine_logp).sum().backward()
    assert model.lm_head.weight.grad is not None


def test_half_precision_samples_with_the_log_probs_of_its_own_forward(
    any_model: PreTrainedModel, make: MakeEngine, prompts: list[list[int]]
) -> None:
    half = any_model.to(torch.bfloat16)
    rollout = make(half, 4).generate(prompts, sampling(), seeds=range(7))
    with torch.no_grad():
        logits = half(rollout.input_ids, attention_mask=rollout.attention_mask).logits.float().log_softmax(-1)
    logp = torch.zeros_like(rollout.engine_logp)
    logp[:, 1:] = logits[:, :-1].gather(2, rollout.input_ids[:, 1:, None])[..., 0]
    difference = ((rollout.engine_logp - logp) * rollout.completion_mask).abs()
    assert float(difference.sum() / rollout.completion_mask.sum()) < 0.1


@pytest.mark.parametrize("max_batch", [0, -3])
def test_a_batch_has_at_least_one_row(model: PreTrainedModel, make: MakeEngine, max_batch: int) -> None:
    with pytest.raises(UserError, match=f"max_batch is {max_batch}: must be at least 1"):
        make(model, max_batch)


# ---------------------------------------------------------------------- choice of the engine
def test_auto_is_ours_where_it_reproduces_the_model(
    any_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recwarn: pytest.WarningsRecorder
) -> None:
    for name in ("auto", "static"):
        assert isinstance(build_engine(name, any_model, tokenizer), StaticCacheEngine)
    assert isinstance(build_engine("generate", any_model, tokenizer, max_batch=5), GenerateEngine)
    assert not recwarn.list


def test_the_choice_does_not_round_with_the_training(
    any_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recwarn: pytest.WarningsRecorder
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(build_engine("auto", any_model, tokenizer), StaticCacheEngine)
    assert not recwarn.list


def unknown_architecture() -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=53, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def changed_forward() -> PreTrainedModel:
    """A Llama that is no Llama any more, in a way that no class name tells."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=53, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64,
        )
    )  # fmt: skip
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: 1.1 * output)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [(unknown_architecture, "does not know GPTNeoX"), (changed_forward, "does not reproduce the logits")],
)
def test_auto_falls_back_with_a_warning_and_static_refuses(
    build: Callable[[], PreTrainedModel], message: str, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[int]]
) -> None:
    model = build().eval()
    with pytest.raises(UserError, match=f"{message}.*use engine generate"):
        build_engine("static", model, tokenizer)
    with pytest.warns(UserWarning, match=f"sampling with transformers' generate: .*{message}"):
        engine = build_engine("auto", model, tokenizer, max_batch=3)
    assert isinstance(engine, GenerateEngine)
    rollout = engine.generate(prompts, sampling(), seeds=range(7))
    assert float((rollout.engine_logp - exact_logp(model, rollout)).abs().max()) < 2e-5


def test_an_engine_that_does_not_exist_is_named(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="engine 'fast' does not exist: use auto, static or generate"):
        build_engine("fast", model, tokenizer)  # type: ignore[arg-type]
