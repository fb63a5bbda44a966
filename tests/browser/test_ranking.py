"""People rank answers in a real browser: with mouse, keyboard and finger, through reloads and a killed server."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_align.cli.main import run as command
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import Judgement

ATTACK = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
PROMPTS = 10


class Server:
    """``label human`` as a process of its own; it can be killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.store = folder / "labels.sqlite"
        self.options = list(options)
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start, or start again on the same port; the links are in ``links`` by annotator."""
        words = ["label", "human", f"--store={self.store}", f"--port={self.port}", "--no_browser", *self.options]
        line = [sys.executable, "-m", "lightning_align", *words]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.links: dict[str, str] = {}
        for line_out in self.process.stdout:
            found = re.match(r"  (\S+)\s+(http://\S+:(\d+)/\S+)", line_out)
            if found:
                self.links[found[1]], self.port = found[2], int(found[3])
            if line_out.startswith("Ctrl-C"):
                return
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def judgements(self) -> list[Judgement]:
        return Store(self.store).judgements()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server for answers whose texts say how good they are."""
    servers: list[Server] = []

    def start(*options: str, answers: int = 4, prompts: int = PROMPTS) -> Server:
        path = tmp_path / "responses.jsonl"
        rows = [
            {
                "prompt": f"prompt {n}{ATTACK}",
                "completions": [f"quality {q}{' dog' * q}{ATTACK}" for q in range(answers)],
            }
            for n in range(prompts)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        server = Server(tmp_path, f"--responses={path}", *options)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page in a browser profile of its own; a script error fails the test, a dropped connection does not."""
    contexts, troubles = [], []

    def open_page(link: str, *, width: int = 1280, scheme: str = "light", touch: bool = False) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 850}, color_scheme=scheme, has_touch=touch, is_mobile=touch
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: None if "ERR_" in said.text else troubles.append(said.text))
        page.goto(link)
        page.wait_for_selector(".card, #notice:not([hidden]), #end:not([hidden])")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def qualities(page: Any) -> list[int]:
    """How good the answers are, in the order shown."""
    texts = page.locator(".card .body").all_text_contents()
    return [int(re.match(r"\s*quality (\d)", text)[1]) for text in texts]  # type: ignore[index]


def best_first(page: Any) -> list[int]:
    """Places of the answers as they are shown, from the best to the worst."""
    found = qualities(page)
    return sorted(range(len(found)), key=lambda place: -found[place])


def save(page: Any, how: Callable[[], None]) -> None:
    """Save, and wait until what comes next is shown."""
    with page.expect_response(lambda response: "/api/" in response.url):
        how()
    page.wait_for_selector("body[aria-busy=false]")


def by_keys(page: Any) -> None:
    for place in best_first(page):
        page.keyboard.press(f"Digit{place + 1}")
    save(page, lambda: page.keyboard.press("Enter"))


def by_mouse(page: Any) -> None:
    """The best is dragged, the second clicked, the others dragged: the last behind, the third between."""
    best, second, third, last = best_first(page)
    drag(page, page.locator(".card .letter").nth(best), ".gap")
    page.locator(".card .letter").nth(second).click()
    drag(page, page.locator(".card .letter").nth(last), ".gap >> nth=2")
    drag(page, page.locator("#unranked .letter"), ".gap >> nth=2")
    assert page.locator("#tiers .letter").all_text_contents() == ["ABCD"[p] for p in (best, second, third, last)]
    save(page, page.locator("#submit").click)


def drag(page: Any, what: Any, target: str) -> None:
    what.scroll_into_view_if_needed()
    what.hover()
    page.mouse.down()
    box = page.locator(target).first.bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 5)  # gaps grow once something is dragged
    box = page.locator(target).first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.up()


def by_touch(page: Any) -> None:
    """Taps, and one letter dragged with a finger from the end to its place."""
    best, *others = best_first(page)
    for place in others:
        page.locator(".card .letter").nth(place).tap()
    finger(page, page.locator("#unranked .letter"), ".gap >> nth=0")
    assert page.locator("#tiers .letter").all_text_contents() == ["ABCD"[place] for place in (best, *others)]
    save(page, page.locator("#submit").tap)


def finger(page: Any, what: Any, target: str) -> None:
    session = page.context.new_cdp_session(page)

    def touch(kind: str, box: dict[str, float] | None) -> None:
        points = [] if box is None else [{"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", what.bounding_box())
    touch("touchMove", page.locator(target).bounding_box())
    touch("touchMove", page.locator(target).bounding_box())
    touch("touchEnd", None)


HANDS = {"keys": (by_keys, {}), "mouse": (by_mouse, {}), "touch": (by_touch, {"width": 390, "touch": True})}


@pytest.mark.parametrize("hand", HANDS)
def test_ten_prompts_are_ranked_through_a_reload_and_a_killed_server(hand: str, serve: Any, visit: Any) -> None:
    rank, look = HANDS[hand]
    server = serve("--annotators=ann")
    page = visit(server.links["ann"], **look)
    for number in range(PROMPTS):
        if number == 3:  # what was begun is there again after a reload
            page.locator(".card .letter").first.click()
            page.locator(".card .flag").nth(1).click()
            page.reload()
            page.wait_for_selector("#tiers .letter")
            assert page.locator("#tiers .letter").all_text_contents() == ["A"]
            assert page.locator(".card .flag").nth(1).get_attribute("aria-pressed") == "true"
            page.locator(".card .flag").nth(1).click()
            page.locator("#clear").click()
        if number == 6:  # what is sent while there is no server is saved when there is one again
            server.kill()
            for place in best_first(page):
                page.locator(".card .letter").nth(place).click()
            page.locator("#submit").click()
            page.wait_for_selector("#notice:not([hidden])")
            assert "Not saved yet" in page.locator("#notice").text_content()
            save(page, server.start)
            assert page.locator("#notice").is_hidden()
            continue
        rank(page)
    page.wait_for_selector("#end:not([hidden])")
    assert "You judged 10 prompts" in page.locator("#thanks").text_content()
    assert page.title() == "Rank answers"
    judgements = server.judgements()
    assert len(judgements) == PROMPTS
    for judgement in judgements:
        good = [int(re.match(r"quality (\d)", str(answer))[1]) for answer in judgement.item.answers]  # type: ignore[index]
        assert judgement.verdict.ranks == tuple(4 - quality for quality in good)
        assert judgement.verdict.unsafe == ()
        assert 0 < judgement.seconds < 60


def test_two_people_at_once_overlap_where_they_should(serve: Any, visit: Any) -> None:
    server = serve("--annotators", "ann", "bob", "--overlap=0.4")
    pages = [visit(server.links[name]) for name in ("ann", "bob")]
    for _ in range(7):
        for page in pages:
            by_keys(page)
    assert all(page.locator("#end").is_visible() for page in pages)
    times: dict[int, set[str]] = {}
    for judgement in server.judgements():
        times.setdefault(judgement.item.id, set()).add(judgement.annotator)
    assert sorted(map(len, times.values())) == [1] * 6 + [2] * 4


def test_pairs_are_judged_with_strength_ties_flags_skips_and_undo(serve: Any, visit: Any) -> None:
    server = serve("--annotators=ann", "--aspects", "helpfulness", "safety", answers=2, prompts=3)
    page = visit(server.links["ann"])
    assert "helpful" in page.locator("#question").text_content()
    assert page.locator("#submit").is_disabled()
    page.keyboard.press("2")
    assert page.locator("#submit").is_disabled()  # how much better?
    page.keyboard.press("l")
    save(page, lambda: page.keyboard.press("Enter"))
    assert "safer" in page.locator("#question").text_content()
    page.keyboard.press("Shift+Digit1")
    page.keyboard.press("=")
    save(page, lambda: page.keyboard.press("Enter"))
    page.keyboard.press("x")
    save(page, lambda: page.keyboard.press("2"))
    page.keyboard.press("x")
    page.locator("#other").fill("too long")
    save(page, lambda: page.keyboard.press("Enter"))
    page.wait_for_selector("#end:not([hidden])")
    first, second, third, fourth = server.judgements()
    assert (first.aspect, first.verdict.ranks[first.shown[1]], first.verdict.strength) == ("helpfulness", 1, "slightly")
    assert (second.aspect, second.verdict.ranks, second.verdict.unsafe) == ("safety", (1, 1), (second.shown[0],))
    assert third.verdict.skipped.startswith("I cannot tell")  # type: ignore[union-attr]
    assert fourth.verdict.skipped == "too long"
    save(page, page.locator("#undo").click)
    for _ in range(2):
        save(page, lambda: page.keyboard.press("u"))
    assert page.locator(".card.unsafe").count() == 1
    assert page.locator("#tie").get_attribute("aria-pressed") == "true"
    assert len(server.judgements()) == 1
    page.reload()  # what was undone is still there as it was said
    page.wait_for_selector(".card.unsafe")
    assert page.locator("#tie").get_attribute("aria-pressed") == "true"


def test_letters_are_moved_and_tied_with_the_keyboard_alone(serve: Any, visit: Any) -> None:
    server = serve("--annotators=ann", prompts=1)
    page = visit(server.links["ann"])
    for key in ("Digit3", "Digit1", "=", "Digit2", "Digit4"):
        page.keyboard.press(key)
    tiers = page.locator("#tiers .tier")
    assert tiers.all_text_contents() == ["C", "AB", "D"]
    page.locator("#tiers .letter", has_text="D").focus()
    page.keyboard.press("ArrowLeft")
    assert tiers.all_text_contents() == ["C", "ABD"]
    page.keyboard.press("ArrowLeft")
    assert tiers.all_text_contents() == ["C", "D", "AB"]
    page.keyboard.press("Backspace")
    assert tiers.all_text_contents() == ["C", "D", "A"]
    page.keyboard.press("Digit2")
    page.keyboard.press("Enter")
    page.wait_for_selector("#end:not([hidden])")
    (judgement,) = server.judgements()
    assert [judgement.verdict.ranks[number] for number in judgement.shown] == [3, 4, 1, 2]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (320, "light")])
def test_nothing_sticks_out_and_texts_do_nothing(width: int, scheme: str, serve: Any, visit: Any) -> None:
    server = serve("--annotators=ann", answers=9, prompts=1)
    page = visit(server.links["ann"], width=width, scheme=scheme)
    for state in range(3):
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), state
        page.keyboard.press("g" if state == 0 else "1")
    assert page.title() == "Rank answers"
    assert "<script>" in page.locator(".card .body").first.text_content()
    assert page.locator(".card script, .card img").count() == 0
    page.keyboard.press("m")
    assert ATTACK in page.locator(".card .body").first.text_content()


def test_enter_saves_after_a_dialog_was_closed(serve: Any, visit: Any) -> None:
    server = serve("--annotators=ann", prompts=2)
    page = visit(server.links["ann"])
    page.locator("#skip").click()
    save(page, lambda: page.keyboard.press("Digit1"))
    page.locator("#help").click()
    page.keyboard.press("Escape")
    by_keys(page)
    skipped, ranked = server.judgements()
    assert skipped.verdict.skipped
    assert sorted(ranked.verdict.ranks) == [1, 2, 3, 4]


def test_conversations_are_shown_from_their_beginning(visit: Any, tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "مرحبا"}]
    texts = ["| a | b |\n|:--|--:|\n| 1 | 2 |\n" + "many words " * 1000, "مرحبا", "```python\nx = 1\n```"]
    row = {"prompt": prompt, "completions": [[{"role": "assistant", "content": text}] for text in texts]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    server = Server(tmp_path, f"--responses={tmp_path / 'chat.jsonl'}", "--annotators=ann")
    try:
        page = visit(server.links["ann"], width=390)
        assert page.locator("#prompt .role").all_text_contents() == ["system", "user"]
        assert page.locator(".card .role").count() == 0
        for card in page.locator(".card").all():
            top, body = (card.locator(part).bounding_box() for part in (".top", ".text"))
            assert top["y"] + top["height"] <= body["y"] <= top["y"] + top["height"] + 20
            assert body["width"] > 250
        direction = "element => getComputedStyle(element).direction"
        assert page.locator("#prompt .text").nth(1).evaluate(direction) == "rtl"
        assert page.locator("td.right").first.evaluate("element => getComputedStyle(element).textAlign") == "right"
    finally:
        server.kill()


def test_a_wrong_link_is_told(serve: Any, visit: Any, browser: Any) -> None:
    server = serve("--annotators=ann")
    context = browser.new_context()  # the refusal is an error in its console
    page = context.new_page()
    page.goto(server.links["ann"] + "x")
    page.wait_for_selector("#notice:not([hidden])")
    assert "open the one that the terminal shows" in page.locator("#notice").text_content()
    assert page.locator(".card").count() == 0
    context.close()


def test_two_tabs_of_one_person_do_not_judge_twice(serve: Any, visit: Any, browser: Any) -> None:
    server = serve("--annotators=ann", prompts=2)
    first = visit(server.links["ann"])
    context = browser.new_context()
    second = context.new_page()
    second.goto(server.links["ann"])
    second.wait_for_selector(".card")
    by_keys(first)
    for place in best_first(second):
        second.keyboard.press(f"Digit{place + 1}")
    second.keyboard.press("Enter")
    second.wait_for_selector("#notice:not([hidden])")
    assert "judged this before" in second.locator("#notice").text_content()
    by_keys(second)
    context.close()
    assert len(server.judgements()) == 2


def test_what_was_ranked_in_the_browser_trains_a_reward_model(serve: Any, visit: Any, tmp_path: Path) -> None:
    server = serve("--annotators=ann")
    page = visit(server.links["ann"])
    for _ in range(PROMPTS):
        by_keys(page)
    out, start, reward = (tmp_path / name for name in ("ranked.jsonl", "start", "reward"))
    assert command(["label", "export", str(server.store), "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == PROMPTS
    shared = ["--trainer.enable_progress_bar=false", "--run.wandb=disabled", "--data.cache_dir=null"]
    words = ["fit", "--config=configs/playground/pretrain.yaml", "--data.playground.size=50", "--trainer.max_steps=1"]
    assert command([*words, *shared, f"--run.root={tmp_path}", "--run.name=start"]) == 0
    words = ["fit", "--config=configs/playground/reward.yaml", f"--model.model={start}", f"--data.path={out}"]
    options = ["--data.batch_size=4", "--trainer.max_epochs=2", f"--run.root={tmp_path}", "--run.name=reward"]
    assert command([*words, *shared, *options]) == 0
    assert (reward / "model" / "model.safetensors").exists()
