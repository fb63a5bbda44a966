"""The model, the prompts, and the samplers that ``benchmarks.rollout`` compares, with the check that they agree."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_align.models.logprobs import token_stats
from lightning_align.rollout import SamplingParams, StaticCacheEngine

VOCABULARY = 8192
PAD, BOS, EOS = 0, 1, 2
SAMPLES = 4
FORWARD_ROWS = 32  # rows of one forward pass for log-probs: more need gigabytes of logits
ROUNDING = 1e-4  # logits this close may change places when products are summed in another order
Prompts = list[list[int]]


def build_policy(ending_probability: float) -> LlamaForCausalLM:
    """A random Llama of 6.8 M parameters that ends a completion at each token with about this probability."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,  # with less, the tied head would have greedy completions repeat one token
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    end_with_probability(model, EOS, ending_probability, random_prompts([64] * 16, seed=5))
    return model


def end_with_probability(model: LlamaForCausalLM, eos: int, probability: float, prompts: Prompts) -> None:
    """Make a random Llama end a completion at each token with about this probability.

    All hidden states share a first coordinate, which no layer reads or writes and in which alone the end-of-sequence
    embedding lies.

    Args:
        model: Of tied embeddings.
        eos: Its end-of-sequence token.
        probability: Above 0; measured on the prompts.
        prompts: Of one length.
    """
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():
        embedding[:, 0] += 2.0
        embedding[eos, 1:] = 0.0
        for layer in model.model.layers:
            layer.input_layernorm.weight[0] = layer.post_attention_layernorm.weight[0] = 0.0
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        states = model.model(torch.tensor(prompts)).last_hidden_state
        logits = model.lm_head(states)
        wanted = math.log(probability / (1 - probability)) + logits.logsumexp(-1)
        embedding[eos, 0] += ((wanted - logits[..., eos]) / states[..., 0]).mean()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """As many words as the model has tokens."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{index}" for index in range(4, VOCABULARY))]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def random_prompts(lengths: Sequence[int], *, seed: int) -> Prompts:
    """Prompts of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def unequal_prompts(count: int) -> Prompts:
    """Prompts of 4 to 48 tokens, in no order."""
    generator = torch.Generator().manual_seed(7)
    return random_prompts(torch.randint(4, 49, (count,), generator=generator).tolist(), seed=8)


class Reference:
    """transformers as its documentation has it: ``generate`` on prompts padded on the left, its default cache, SDPA.

    top_k is 0, since its default of 50 would cost time and sample from another distribution than the policy's.
    """

    def __init__(self, model: LlamaForCausalLM, new_tokens: int) -> None:
        self.model = model
        self.settings = {"max_new_tokens": new_tokens, "pad_token_id": PAD, "eos_token_id": EOS, "top_k": 0}

    @torch.no_grad()
    def generate(self, prompts: Prompts, samples: int = 1, **settings: Any) -> tuple[Tensor, Tensor, Any]:
        """Prompt ids and their mask, padded on the left, each [B, P], and what ``generate`` returns."""
        ids, mask = pad_left(prompts)
        config = GenerationConfig(
            **self.settings, num_return_sequences=samples, return_dict_in_generate=True, **settings
        )
        output = self.model.generate(ids, attention_mask=mask, generation_config=config)
        return ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0), output

    def greedy(self, prompts: Prompts) -> Tensor:
        """Completions [B, T], padded after their end."""
        ids, _, output = self.generate(prompts, do_sample=False)
        return output.sequences[:, ids.shape[1] :]

    def sample(self, prompts: Prompts, seed: int, samples: int = 1) -> Tensor:
        """Completions [B, T] without log-probs."""
        torch.manual_seed(seed)
        ids, _, output = self.generate(prompts, samples, do_sample=True)
        return output.sequences[:, ids.shape[1] :]

    @torch.no_grad()
    def sample_with_logits(self, prompts: Prompts, seed: int, samples: int = 1) -> tuple[Tensor, Tensor]:
        """Completions and their log-probs, each [B, T], from the logits that ``output_logits=True`` keeps.

        Gathered a step at a time: ``compute_transition_scores`` gives the same numbers, but stacks all logits first.
        """
        torch.manual_seed(seed)
        ids, _, output = self.generate(prompts, samples, do_sample=True, output_logits=True)
        completions = output.sequences[:, ids.shape[1] :]
        steps = zip(output.logits, completions.t(), strict=True)
        logp = [logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1) for logits, tokens in steps]
        return completions, torch.stack(logp, 1)

    @torch.no_grad()
    def sample_with_forward(self, prompts: Prompts, seed: int, samples: int = 1) -> tuple[Tensor, Tensor]:
        """Completions and their log-probs, each [B, T], from a forward pass over what was sampled.

        It computes logits of completion tokens only (``logits_to_keep``), in micro-batches.
        """
        torch.manual_seed(seed)
        ids, mask, output = self.generate(prompts, samples, do_sample=True)
        completions = output.sequences[:, ids.shape[1] :]
        attention = torch.cat([mask, real_tokens(completions)], 1)
        positions = (attention.long().cumsum(1) - 1).clamp(min=0)
        logp = []
        for rows in torch.arange(len(ids)).split(FORWARD_ROWS):
            logits = self.model(
                output.sequences[rows],
                attention_mask=attention[rows],
                position_ids=positions[rows],
                logits_to_keep=completions.shape[1] + 1,
                use_cache=False,
            ).logits[:, :-1]
            logp.append(logits.gather(2, completions[rows, :, None])[..., 0] - logits.logsumexp(-1))
        return completions, torch.cat(logp)


def pad_left(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, P]."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    mask = [torch.ones(len(prompt), dtype=torch.bool) for prompt in prompts]
    return (
        pad_sequence(ids, batch_first=True, padding_value=PAD, padding_side="left"),
        pad_sequence(mask, batch_first=True, padding_side="left"),
    )


def real_tokens(completions: Tensor) -> Tensor:
    """True up to the first end-of-sequence token and on it, [B, T]."""
    ends = (completions == EOS).long()
    return ends.cumsum(1) - ends == 0


@torch.no_grad()
def check_agreement(model: LlamaForCausalLM, engine: StaticCacheEngine, prompts: Prompts, new_tokens: int) -> str:
    """Compare greedy tokens with ``generate`` and log-probs with a float64 forward; says how well, or raises."""
    theirs = Reference(model, new_tokens).greedy(prompts)
    asked = SamplingParams(max_new_tokens=new_tokens, greedy=True)
    ours = engine.generate(prompts, asked, seeds=range(len(prompts))).completion_ids()
    expected = [ids[real].tolist() for ids, real in zip(theirs, real_tokens(theirs), strict=True)]
    ties = 0
    for prompt, mine, reference in zip(prompts, ours, expected, strict=True):
        if mine != reference:
            gap = _first_gap(model, prompt, mine, reference)
            if gap > ROUNDING:
                raise SystemExit(f"greedy tokens differ although their logits are {gap:.2g} apart: not timed")
            ties += 1

    rollout = engine.generate(prompts, SamplingParams(max_new_tokens=new_tokens), seeds=range(len(prompts)))
    double = build_policy(0.5).double()
    double.load_state_dict(model.state_dict())
    exact = token_stats(double, rollout.input_ids, rollout.attention_mask, mask=rollout.completion_mask).logp
    error = float((rollout.engine_logp - exact).abs().max())
    if not error < ROUNDING:
        raise SystemExit(f"log-probs differ by {error:.2g} from a float64 forward: not timed")
    equal = f"{len(prompts) - ties} of {len(prompts)} greedy completions identical"
    return f"{equal}{f', {ties} part at a tie of logits' if ties else ''}; log-probs within {error:.1g}"


def _first_gap(model: LlamaForCausalLM, prompt: list[int], first: list[int], second: list[int]) -> float:
    """Distance of the model's logits of two tokens where two completions part."""
    step = next(index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    logits = model(torch.tensor([prompt + first[:step]])).logits[0, -1]
    return float((logits[first[step]] - logits[second[step]]).abs())
