"""What a model finds of options is what its own logits say, whatever is asked beside them; samples are their seeds'."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_align.data.encode import encode_pair, encode_prompt
from lightning_align.data.templates import Prompt
from lightning_align.errors import UserError
from lightning_align.feedback.models import LocalModel
from lightning_align.rollout.types import SamplingParams

Make = Callable[..., LocalModel]
QUESTIONS = [
    "Response 1 - a\nResponse 2 - b\nPreferred Response=",
    "Rating=",
    "the answer is",
    "Response 1 - a very long answer, which goes on for a while\nResponse 2 - b\nPreferred Response=",
    "the answer",  # the third begins with it
]
NUMBERS = [str(number) for number in range(1, 11)]
WORDS = [" first", " second", " neither of them"]


def conversation(text: str) -> Prompt:
    return [{"role": "user", "content": text}]


def reference(asked: LocalModel, prompt: Prompt, options: Sequence[str]) -> Tensor:
    """A loop over tokens in float64: each option after the prompt, less what goes on to be a longer option."""
    network = asked.model.double()
    rows = []
    for option in options:
        pair = encode_pair(asked.tokenizer, prompt, option, finished=False)
        assert pair.input_ids[: pair.prompt_length] == encode_prompt(asked.tokenizer, prompt)
        logp = 0.0
        for place in range(pair.prompt_length, len(pair.input_ids)):
            logits = network(torch.tensor([pair.input_ids[:place]])).logits[0, -1]
            logp += float(logits.log_softmax(0)[pair.input_ids[place]])
        rows.append((pair.input_ids[pair.prompt_length :], logp))
    network.float()
    total = []
    for ids, logp in rows:
        inside = [(tokens, other) for tokens, other in rows if len(tokens) > len(ids) and tokens[: len(ids)] == ids]
        longer = sum(  # what begins with 100 is in what begins with 10
            torch.tensor(other).exp()
            for tokens, other in inside
            if not any(len(tokens) > len(one) and tokens[: len(one)] == one for one, _ in inside)
        )
        total.append(torch.log(torch.tensor(logp, dtype=torch.float64).exp() - longer))
    return torch.stack(total).float()


@pytest.mark.parametrize(
    "options", [NUMBERS, WORDS, ["1", "2"], ["1", "10", "100"]], ids=["numbers", "words", "digits", "hundred"]
)
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_options_have_the_log_probs_of_a_loop_over_tokens(local_model: Make, chat: bool, options: list[str]) -> None:
    asked = local_model(chat=chat)
    assert asked.chat == chat
    prompts = [conversation(text) if chat else text for text in QUESTIONS]
    found = asked.option_logps(prompts, options)
    assert found.dtype == torch.float32
    expected = torch.stack([reference(asked, prompt, options) for prompt in prompts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_options_of_several_tokens_and_beginnings_of_others_are_tested(local_model: Make) -> None:
    tokenizer = local_model().tokenizer
    lengths = [len(encode_pair(tokenizer, "Rating=", option, finished=False).input_ids) for option in ("1", "10")]
    assert lengths[1] == lengths[0] + 1
    assert len(encode_pair(tokenizer, "is", WORDS[2], finished=False).input_ids) > 3


def test_one_counts_only_where_the_reply_does_not_go_on_to_be_ten(local_model: Make) -> None:
    asked = local_model()
    alone, both = asked.option_logps(["Rating="], ["1"]), asked.option_logps(["Rating="], ["1", "10"])
    assert both[0, 0] < alone[0, 0]
    torch.testing.assert_close(both.exp().sum(), alone.exp().sum())  # what begins with 1 is one of the two
    assert asked.option_logps(["Rating="], NUMBERS).exp().sum() < 1
    three = asked.option_logps(["Rating="], ["1", "10", "100"])
    torch.testing.assert_close(three.exp().sum(), alone.exp().sum())
    torch.testing.assert_close(three[0, 0], both[0, 0])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_and_order_change_nothing(local_model: Make, batch_size: int) -> None:
    whole = local_model().option_logps(QUESTIONS, NUMBERS)
    small = local_model(batch_size=batch_size)
    torch.testing.assert_close(small.option_logps(QUESTIONS, NUMBERS), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        small.option_logps(QUESTIONS[::-1], NUMBERS[::-1]).flip(0, 1), whole, rtol=1e-5, atol=1e-5
    )
    one = torch.cat([small.option_logps([question], NUMBERS) for question in QUESTIONS])
    torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-5)


def test_a_beginning_that_all_options_share_is_read_once(local_model: Make) -> None:
    asked, rows = local_model(), []
    handle = asked.model.get_decoder().register_forward_pre_hook(
        lambda _, __, options: rows.append(len(options["input_ids"])), with_kwargs=True
    )
    asked.option_logps(QUESTIONS[:2], NUMBERS[:9])
    handle.remove()
    assert rows[-1] == 2


def test_nothing_asked_is_nothing_answered(local_model: Make) -> None:
    assert local_model().option_logps([], NUMBERS).shape == (0, 10)


def test_questions_and_options_without_tokens_and_too_long_ones_are_refused(local_model: Make) -> None:
    asked = local_model()
    with pytest.raises(UserError, match="an option among '1', '' has no tokens"):
        asked.option_logps(["Rating="], ["1", ""])
    with pytest.raises(UserError, match="a question that has no tokens"):
        asked.option_logps([""], ["1"])
    with pytest.raises(
        UserError,
        match=r"model tiny has 1024 positions, but a question to it takes \d{4} tokens and the reply up to 1:",
    ):
        asked.option_logps(["one more token" * 400 + "."], ["1", "2"])
    with pytest.raises(UserError, match="the reply up to 1020"):
        asked.sample(["Rating= 1 2 3"], SamplingParams(max_new_tokens=1020), seeds=[0])


def test_samples_belong_to_their_seeds(local_model: Make) -> None:
    asked = local_model()
    params = SamplingParams(max_new_tokens=12, num_samples=2)
    replies = asked.sample(QUESTIONS[:2], params, seeds=[1, 2, 3, 1])
    assert len(replies) == 4
    assert replies[0] != replies[1]
    assert asked.sample(QUESTIONS[:1], params, seeds=[2, 1]) == [replies[1], replies[0]]
    assert not any(reply.failed for reply in replies)


def test_a_reply_says_whether_it_ended(local_model: Make) -> None:
    asked = local_model(chat=True)
    prompt = conversation("the answer is")
    cut = asked.sample([prompt], SamplingParams(max_new_tokens=3, greedy=True), seeds=[0])[0]
    assert not cut.finished
    stop = cut.text[:2]
    assert asked.sample([prompt], SamplingParams(max_new_tokens=30, stop_strings=(stop,)), seeds=[0]) is not None
    ended = asked.sample([prompt], SamplingParams(max_new_tokens=3, greedy=True, stop_strings=(stop,)), seeds=[0])[0]
    assert ended.finished


def test_the_key_is_that_of_the_weights(local_model: Make) -> None:
    assert local_model().key() == local_model(batch_size=3).key()
    assert local_model().key() != local_model(seed=6).key()
    assert local_model().key() != local_model(chat=True).key()
