"""A judge's ratings as a reward: what they come to, what is asked once, what is refused."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_align.errors import UserError
from lightning_align.feedback.judges import Judge
from lightning_align.feedback.models import LocalModel
from lightning_align.feedback.wording import BUILT_IN
from lightning_align.playground import texts, world
from lightning_align.rewards.build import build_reward
from lightning_align.rewards.judge import JudgeReward
from lightning_align.rewards.spec import learned_sources

Ask = Callable[..., Tensor]
COMPLETIONS = [" one , two .", " three .", " one two three four .", " ten ."]
PROMPTS = ["name one .", "name two .", "name three , please .", "name ten ."]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "<pad>", ".", ":", "name", "rating", *world.NUMBERS[1:11]]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def network(vocab_size: int = 18) -> LlamaForCausalLM:
    config = LlamaConfig(
        **{"vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 3},
    )
    torch.manual_seed(2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small language model on the disk."""
    path = tmp_path_factory.mktemp("judge") / "model"
    network().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def test_ratings_are_those_of_the_models_own_logits(folder: str) -> None:
    reward = build_reward({"rater": {"source": folder, "judge": "playground"}})
    scores = reward.score(PROMPTS, COMPLETIONS, finished=[True] * 4, records=[{}] * 4)
    ours, model = tokenizer(), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    numbers = ours.convert_tokens_to_ids(list(world.NUMBERS[1:11]))
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores.total.tolist(), strict=True):
        question = texts.rating_prompt(prompt, completion)
        ids = torch.tensor([ours(question).input_ids])
        with torch.no_grad():
            weights = model(ids).logits[0, -1][numbers].softmax(0)
        expected = sum(float(w) * (2 * (k - 1) / 9 - 1) for k, w in enumerate(weights, 1))
        assert score == pytest.approx(expected, abs=1e-5)
        assert -1 <= score <= 1
    assert len(set(scores.total.tolist())) == 4
    assert scores.parts["rater"].tolist() == scores.total.tolist()


def test_the_same_is_rated_once(folder: str, ask: Ask) -> None:
    scorer = JudgeReward.load(folder, "playground")
    first = ask(scorer, [*COMPLETIONS, COMPLETIONS[0]], [*PROMPTS, PROMPTS[0]])
    assert scorer.num_asked == 4
    assert first[0] == first[4]
    again = ask(scorer, COMPLETIONS, PROMPTS)
    assert scorer.num_asked == 4
    assert torch.equal(first[:4], again)
    ask(scorer, COMPLETIONS[:1], PROMPTS[1:2])  # another prompt
    assert scorer.num_asked == 5


def test_a_judge_that_seldom_rates_is_told_of_once(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    for words, warnings in ((18, 0), (30, 1)):  # ten of them are ratings
        flat = network(words)
        with torch.no_grad():
            flat.lm_head.weight.zero_()
        scorer = JudgeReward(Judge(LocalModel("flat", flat, tokenizer()), BUILT_IN["playground"]))
        with caplog.at_level(logging.WARNING):
            assert ask(scorer, COMPLETIONS, PROMPTS).abs().max() < 1e-6  # AIF-3
            ask(scorer, COMPLETIONS, PROMPTS[::-1])
        assert len(caplog.records) == warnings
    assert "gives a rating with probability 0.33 only" in caplog.text


# ------------------------------------------------------------------ endpoints
@pytest.fixture
def endpoint() -> Iterator[Any]:
    """A server whose rating is the number of words of the answer, and that has no rating for ``ten``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = body["messages"][0]["content"].split("Response - ")[1].split("\n\n")[0]
            text = "none" if "ten" in answer else str(len(answer.split()))
            self.send_response(200)
            self.end_headers()
            choice = {"message": {"content": text}, "finish_reason": "stop"}
            self.wfile.write(json.dumps({"choices": [choice]}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1#rater"
    server.shutdown()


def test_an_endpoint_rates(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    reward = build_reward({"rater": {"source": endpoint, "judge": "default"}})
    with caplog.at_level(logging.WARNING):
        scores = reward.score(PROMPTS, COMPLETIONS, finished=[True] * 4, records=[{}] * 4).total
    words = torch.tensor([4.0, 2.0, 5.0])
    torch.testing.assert_close(scores[:3], 2 * (words - 1) / 9 - 1)
    assert scores[3].isnan()
    assert any("gave 1 completions no rating" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"source": "http://host/v1#m"}, "has an endpoint as its source: give judge"),
        ("http://host/v1#m", "has an endpoint as its source: give judge"),
        ({"source": "x", "judge": 3}, "has judge 3: give a wording"),
        ({"source": ["x", "y"], "judge": "default"}, "has judge, but a list of sources"),
        ({"source": "x", "judgee": "default"}, "has an unknown key 'judgee'; did you mean 'judge'"),
        ({"source": "a.b", "judge": "default"}, "is a function, which needs no wording: leave judge out"),
        ({"source": "http://host/v1", "judge": "default"}, "write http://host:port/v1#model-name"),
        ({"source": "http://host/v1#m", "judge": "defualt"}, "did you mean 'default'"),
    ],
)
def test_mistakes(part: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_reward({"rater": part})
    assert message in str(caught.value)


def test_a_judge_is_no_reward_model(folder: str, tmp_path: Path) -> None:
    assert learned_sources({"rater": {"source": folder, "judge": "playground"}, "rm": str(tmp_path)}) == [str(tmp_path)]
