"""What is written: a page that asks for nothing and escapes what was sampled, and JSON that is strict."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_align.lab.analysis import Analysis, analyse
from lightning_align.lab.findings import conclude
from lightning_align.lab.overopt_page import LONGEST_TEXT, clip, render, sample_columns
from lightning_align.lab.runs import Curve, load_curve
from lightning_align.lab.summary import summarise, to_json


def page_of(analysis: Analysis) -> str:
    return render(analysis, conclude(analysis))


# ------------------------------------------------------------------ the page
class Page(HTMLParser):
    """Tags, attributes and ids of a page; closing tags must match."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_escapes_samples(analysis: Analysis) -> None:
    text = page_of(analysis)
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "src"
        assert "http:" not in value, (tag, name, value)
        if name == "href":
            assert value.startswith("#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in text
    assert "a &amp; b" in text
    assert "default-src 'none'" in text


def test_page_without_samples_mentions_no_address_at_all(make_curve: Callable[..., Curve]) -> None:
    text = page_of(analyse(make_curve(lambda d: 0.3 * d)))
    assert "http" not in text.replace("http-equiv", "")
    assert "//" not in re.sub(r"/\*.*?\*/", "", text)


def test_ids_are_unique_and_references_hit_them(analysis: Analysis) -> None:
    text = page_of(analysis)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(ids)


def test_page_shows_the_samples_of_start_choice_and_end(analysis: Analysis) -> None:
    columns = sample_columns(analysis)
    assert [title for title, _, _ in columns] == ["Start", "Checkpoint to keep", "Over-optimised"]
    assert columns[1][1] == analysis.choice.point
    text = page_of(analysis)
    assert text.count('class="card chosen"') == 2  # one for each of the two prompts
    assert str(analysis.choice.checkpoint) in text


def test_a_sample_from_another_step_says_so(make_run: Callable[..., Path], peaked: dict[str, list[float]]) -> None:
    curve = load_curve(make_run(**peaked))
    chosen = analyse(curve).choice.point.step
    curve.samples = [row for row in curve.samples if row["step"] != chosen]
    titles = [title for title, _, _ in sample_columns(analyse(curve))]
    assert titles[1] == "Sampled nearest to: checkpoint to keep"


def test_every_dot_is_a_row_of_the_table(analysis: Analysis) -> None:
    table = page_of(analysis).split("<tbody>")[1].split("</tbody>")[0]
    assert table.count("<tr") == len(analysis.curve.points)
    assert re.search(r'<tr class="chosen"><td>\d+</td>.*?keep', table)


def test_conversations_and_long_texts(make_run: Callable[..., Path], peaked: dict[str, list[float]]) -> None:
    prompt = [{"role": "user", "content": "tell <me>"}]
    run = make_run(**peaked, prompts=[prompt, "p"], completions=["word " * 500 + "end", ""])
    text = page_of(analyse(load_curve(run)))
    assert "user: tell &lt;me&gt;" in text
    assert "word […] " in text
    assert "word end</div>" in text
    assert "(empty)" in text
    assert len(clip("x" * 5000)) < LONGEST_TEXT + 10
    assert clip("short") == "short"


# ------------------------------------------------------------------ the numbers
def strict(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(text, parse_constant=refuse)
    assert isinstance(content, dict)
    return content


def test_json_holds_the_fit_its_intervals_and_the_choice(analysis: Analysis, peak_kl: float) -> None:
    content = strict(to_json(summarise(analysis, conclude(analysis), Path("runs/ppo"))))
    assert content["n"] == 17
    assert content["n_fitted"] == 16
    assert content["seeds"] == [3]
    assert content["kl_peak"] == pytest.approx(content["d_peak"] ** 2)
    assert content["R_peak"] == pytest.approx(content["beta"] * content["d_peak"])
    for name in ("alpha", "beta", "d_peak", "kl_peak", "R_peak"):
        low, high = content["intervals"][name]
        assert low < content[name] < high
    assert content["intervals"]["kl_peak"][0] <= peak_kl <= content["intervals"]["kl_peak"][1]
    assert content["chosen"]["iteration"] == analysis.choice.point.step
    assert content["chosen"]["checkpoint"] == str(analysis.choice.checkpoint)
    assert content["chosen"]["policy"] == "gold"
    assert "understate" in content["interval_method"]
    assert set(content["forms"]) == {"rl", "bon"}
    assert content["proxy"]["slope"] == pytest.approx(0.8)
    assert [point["step"] for point in content["points"]] == list(range(0, 85, 5))


def test_json_of_unknown_and_infinite_numbers_is_null(make_curve: Callable[..., Curve]) -> None:
    curve = make_curve(lambda d: 0.1 * d, noise=0.3)
    curve.points[4] = replace(curve.points[4], gold=math.nan, kl=-0.5)
    curve.left_out = 2
    analysis = analyse(curve)
    content = strict(to_json(summarise(analysis, conclude(analysis), Path("x"))))
    assert content["kl_peak"] is None
    assert "kl_peak" not in content["intervals"]
    assert content["points"][4]["gold"] is None
    assert content["excluded"] == {"incomplete": 2, "without_gold": 1, "negative_kl": 0, "d_below_0.1": 1}


def test_what_is_no_number_is_null_in_tuples_too() -> None:
    assert json.loads(to_json({"a": (math.nan, 1.0), "b": [{"c": (math.inf,)}]})) == {
        "a": [None, 1.0],
        "b": [{"c": [None]}],
    }
