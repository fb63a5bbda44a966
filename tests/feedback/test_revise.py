"""Chains of critique and revision: what is asked, what counts as a fault, and what is learnt."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from scipy import stats

from lightning_align.data.templates import Prompt
from lightning_align.errors import UserError
from lightning_align.feedback.constitution import DEFAULT, PLAYGROUND, Constitution, Principle
from lightning_align.feedback.journal import key_of
from lightning_align.feedback.models import Reply
from lightning_align.feedback.revise import Chain, Demonstration, Reviser, Step, demonstrations, repeats, tally
from lightning_align.rollout.types import SamplingParams

LOUD = Constitution("loud", (Principle("quiet", "Is it loud?", "Say it quietly."),))
PARAMS = {name: SamplingParams(max_new_tokens=8) for name in ("answer", "revision", "critique")}


class Scripted:
    """A language model that says what a function of question and seed says; it keeps what it was asked."""

    def __init__(self, says: Callable[[Prompt, int], str], *, unfinished: Sequence[str] = ()) -> None:
        self.name = "scripted"
        self.says = says
        self.unfinished = unfinished
        self.asked: list[tuple[Prompt, SamplingParams, int]] = []

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams, *, seeds: Sequence[int]) -> list[Reply]:
        """One reply a prompt."""
        self.asked += [(prompt, params, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        texts = [self.says(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [Reply(text, text.strip() not in self.unfinished) for text in texts]

    def option_logps(self, prompts: Sequence[Prompt], options: Sequence[str]) -> Any:
        """Nobody asks."""
        raise NotImplementedError


def reviser(model: Any, critic: Any = None, constitution: Constitution = LOUD, **options: Any) -> Reviser:
    return Reviser(model, critic or model, constitution, **{**PARAMS, "revisions": 2, **options})


def last(question: Prompt) -> str:
    return question if isinstance(question, str) else question[-1]["content"]


def shouter(question: Prompt, seed: int) -> str:
    """Answers, criticises, and revises to something else each time."""
    text = last(question)
    if text.endswith("Critique:") or text == "Is it loud?":
        return " It is very loud."
    if text.endswith("Revision:") or text == "Say it quietly.":
        return f"  quiet {seed % 1000} "
    return " LOUD"


def test_a_chain_asks_for_an_answer_then_critiques_and_revisions_of_the_latest_text() -> None:
    model, critic = Scripted(shouter), Scripted(shouter)
    (chain,) = reviser(model, critic).chains(["Hello"], ["k"], [True])
    assert [question for question, _, _ in model.asked] == ["Hello"]
    first, second = (step.revision for step in chain.steps)
    assert first != second
    head = "Hello\nLOUD\n\nCritique request: Is it loud?\nCritique:"
    later = f"Hello\n{first.strip()}\n\nCritique request: Is it loud?\nCritique:"
    tail = " It is very loud.\n\nRevision request: Say it quietly.\nRevision:"
    assert [question for question, _, _ in critic.asked] == [head, head + tail, later, later + tail]
    assert [reply.text for reply in chain.completions()] == [" LOUD", first, second]
    assert first.startswith(" quiet")  # after the prompt as the answer is: one space
    assert not first.endswith(" ")
    assert critic.asked[0][1].stop_strings == critic.asked[1][1].stop_strings == ("\n\n",)
    assert chain == Chain.from_row("Hello", chain.as_row())


def test_conversations_are_asked_as_conversations() -> None:
    critic = Scripted(shouter)
    (chain,) = reviser(Scripted(lambda *_: " LOUD"), critic, revisions=1).chains(
        [[{"role": "user", "content": "Hello"}]], ["k"], [True]
    )
    assert [turn["content"] for turn in critic.asked[1][0]] == [
        *("Hello", "LOUD", "Is it loud?", "It is very loud.", "Say it quietly."),
    ]
    assert chain.steps[0].revision.startswith("quiet")  # a message begins with no space


def test_without_critiques_none_is_asked_for() -> None:
    critic = Scripted(shouter)
    (chain,) = reviser(Scripted(shouter), critic, critiques=False).chains(["Hello"], ["k"], [True])
    assert all(question.endswith("Revision:") and "ritique" not in question for question, _, _ in critic.asked)
    assert [step.critique for step in chain.steps] == [None, None]
    assert tally([chain])["critiques"] == 0


def test_a_chain_is_a_function_of_its_prompt_and_key() -> None:
    prompts, keys = [f"Hello {n % 5}" for n in range(12)], [key_of(0, n) for n in range(12)]
    revised = [n % 4 != 0 for n in range(12)]
    options = {"constitution": DEFAULT, "revisions": 3}
    together = reviser(Scripted(varied), **options).chains(prompts, keys, revised)
    order = [7, 2, 0, 11, 5, 9, 1, 3, 4, 10, 8, 6]
    alone = {n: reviser(Scripted(varied), **options).chains([prompts[n]], [keys[n]], [revised[n]])[0] for n in order}
    assert together == [alone[n] for n in range(12)]
    assert [bool(chain.steps) for chain in together] == revised
    assert len({chain.first for chain in together}) == 12
    model = Scripted(varied)
    reviser(model, **options).chains(prompts, keys, revised)
    seeds = [seed for _, _, seed in model.asked]
    assert len(set(seeds)) == len(seeds) == 12 + 9 * 3 * 2
    assert max(seeds) < 1 << 48


def varied(question: Prompt, seed: int) -> str:
    return f"{last(question)[:5]} {seed}"


def test_cai_1_principles_of_chains_are_uniform_at_every_step() -> None:
    keys = [key_of(0, n) for n in range(2000)]
    chains = reviser(Scripted(varied), constitution=DEFAULT).chains(["Hello"] * 2000, keys, [True] * 2000)
    for step in (0, 1):
        counts = Counter(chain.steps[step].principle for chain in chains)
        assert len(counts) == 5
        assert stats.chisquare(list(counts.values())).pvalue > 0.001
    pairs = Counter(tuple(step.principle for step in chain.steps) for chain in chains)
    assert stats.chisquare(list(pairs.values())).pvalue > 0.001
    again = reviser(Scripted(varied), constitution=DEFAULT).chains(["Hello"] * 2000, keys, [True] * 2000)
    assert again == chains


@pytest.mark.parametrize(
    ("said", "fault", "changed"),
    [
        ("", "empty", True),
        (" \n", "empty", True),
        ("cut", "unfinished", True),
        ("It was loud. IS IT  loud? yes", "repeats", True),
        ("well , say it quietly. so", "repeats", True),
        ("I see: it is very loud. Sorry.", "repeats", True),
        ("Loud", "unchanged", False),
        ("whisper", None, True),
        ("Is it louder?", None, True),
    ],
)
def test_faults(said: str, fault: str | None, changed: bool) -> None:
    def says(question: Prompt, seed: int) -> str:
        return said if last(question).endswith("Revision:") else shouter(question, seed)

    model = Scripted(says, unfinished=["cut"])
    (chain,) = reviser(model, revisions=2).chains(["Hello"], ["k"], [True])
    assert (chain.steps[0].fault, chain.steps[0].changed) == (fault, changed)
    (_, after, _) = chain.completions()
    assert after.text.strip() == ("LOUD" if fault else said.strip())
    asked = [question for question, _, _ in model.asked if last(question).endswith("Critique:")]
    assert f"\n{after.text.strip()}\n\nCritique request" in asked[1]  # the next step goes on from what is good
    counts = tally([chain])
    assert counts["revisions"] == counts["critiques"] == 2
    if fault:
        assert counts[fault] == 2


def test_short_critiques_are_no_quotations() -> None:
    assert not repeats("yes it is", (), "yes it")
    assert repeats("oh , YES it  is so", (), "Yes it is")
    assert not repeats("oh yes it isnt", (), "yes it is")


def chain_of(*steps: tuple[str, str | None], first: str = "LOUD", finished: bool = True) -> Chain:
    names = iter("abcdef")
    made = tuple(Step(next(names), "it is very loud", text, fault, fault != "unchanged") for text, fault in steps)  # type: ignore[arg-type]
    return Chain("Hello", first, finished, made)


MIXED = (("soft", None), ("", "empty"), ("softer", None), ("softer", "unchanged"))


@pytest.mark.parametrize(
    ("keep", "on_bad", "expected"),
    [
        ("all", "keep_previous", [(1, "soft"), (2, "soft"), (3, "softer"), (4, "softer")]),
        ("all", "drop", [(1, "soft"), (3, "softer")]),
        ("last", "keep_previous", [(4, "softer")]),
        ("last", "drop", [(3, "softer")]),
    ],
)
def test_what_is_learnt_of_a_chain(keep: Any, on_bad: Any, expected: list[tuple[int, str]]) -> None:
    found = demonstrations(chain_of(*MIXED), LOUD, keep=keep, on_bad=on_bad)
    assert [(one.revision, one.completion) for one in found] == expected
    assert all(one.principles == tuple("abcd"[: one.revision]) for one in found)
    assert all(one.prompt == "Hello" for one in found)


def test_a_chain_without_steps_teaches_its_answer() -> None:
    assert demonstrations(chain_of(), LOUD, keep="all", on_bad="drop") == [Demonstration("Hello", "LOUD", 0, ())]
    assert demonstrations(chain_of(finished=False), LOUD, keep="all", on_bad="drop") == []


@pytest.mark.parametrize("on_bad", ["keep_previous", "drop"])
@pytest.mark.parametrize(
    ("first", "finished"), [(" ", True), ("cut", False), ("so: is it loud?", True), ("hm, it is very loud", True)]
)
def test_cai_3_a_text_that_must_not_be_learnt_is_not(on_bad: Any, first: str, finished: bool) -> None:
    chain = chain_of(("", "empty"), ("soft", None), first=first, finished=finished)
    found = demonstrations(chain, LOUD, keep="all", on_bad=on_bad)
    assert [(one.revision, one.completion) for one in found] == [(2, "soft")]


def test_cai_4_a_model_that_always_says_the_same_changes_nothing() -> None:
    chains = reviser(Scripted(lambda *_: "same"), revisions=3).chains(["a", "b"], ["1", "2"], [True, True])
    counts = tally(chains)
    assert counts["changed"] == 0
    assert counts["unchanged"] == counts["revisions"] == 6


def test_playground_critiques_end_with_their_sentence() -> None:
    model = Scripted(shouter)
    reviser(model, constitution=PLAYGROUND, revisions=1).chains(["list two animals . answer :"], ["k"], [True])
    assert [params.stop_strings for _, params, _ in model.asked] == [(), (".",), ()]


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_chain_without_a_reply_teaches_nothing(silent: int) -> None:
    class Silent(Scripted):
        def sample(self, prompts: Sequence[Prompt], params: SamplingParams, *, seeds: Sequence[int]) -> list[Reply]:
            replies = super().sample(prompts, params, seeds=seeds)
            return [Reply("", False, failed=True)] * len(prompts) if len(self.asked) == silent + 1 else replies

    (chain,) = reviser(Silent(shouter)).chains(["Hello"], ["k"], [True])
    assert chain.failed
    assert demonstrations(chain, LOUD, keep="all", on_bad="keep_previous") == []
    assert tally([chain])["revisions"] == 0


def test_no_revisions_is_refused() -> None:
    with pytest.raises(UserError, match="revisions is 0: give at least 1"):
        reviser(Scripted(shouter), revisions=0)
