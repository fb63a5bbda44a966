"""What is drawn and written: the picture's size and colours, a page that asks for nothing, JSON that is strict."""

import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_align.lab.analysis import Analysis, analyse
from lightning_align.lab.figures import COLOURS, NARROW, PNG_DPI, WIDE, draw, png, svg
from lightning_align.lab.findings import conclude
from lightning_align.lab.report import LONGEST_TEXT, clip, render, sample_columns
from lightning_align.lab.runs import Curve, Point, load_curve
from lightning_align.lab.summary import summarise, to_json

ATTACK = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)>"


@pytest.fixture
def analysis(make_run: Callable[..., Path], peaked: dict[str, list[float]]) -> Analysis:
    return analyse(load_curve(make_run(**peaked, prompts=[ATTACK, "plain"], completions=["a & b", ATTACK])))


def points(kl: Sequence[float], **scores: Sequence[float]) -> list[Point]:
    return [Point(i, kl=k, **{name: values[i] for name, values in scores.items()}) for i, k in enumerate(kl)]


def page_of(analysis: Analysis) -> str:
    return render(analysis, conclude(analysis))


# ------------------------------------------------------------------ the picture
def size(image: bytes) -> tuple[int, int]:
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", image[16:24])
    return width, height


def test_png_is_700_pixels_wide_at_double_density(analysis: Analysis) -> None:
    image = png(draw(analysis, conclude(analysis)))
    assert size(image) == (round(WIDE.width * PNG_DPI), round(WIDE.height * PNG_DPI)) == (1400, 1040)
    assert image == png(draw(analysis, conclude(analysis))), "the same run gives the same file"


def test_a_single_panel_is_lower(make_curve: Callable[..., Curve]) -> None:
    curve = make_curve(lambda d: 0 * d)
    curve.points = [replace(point, gold=math.nan) for point in curve.points]
    analysis = analyse(curve)
    figure = draw(analysis, conclude(analysis))
    assert len(figure.axes) == 1
    assert size(png(figure))[1] < 800


def boxes(figure: Figure) -> list[tuple[str, Any]]:
    """Every text of the figure with its extent in pixels."""
    figure.canvas.draw()
    texts = [*figure.texts, *(t for ax in figure.axes for t in (*ax.texts, ax._left_title, ax.xaxis.label))]
    if figure._suptitle is not None:
        texts.append(figure._suptitle)
    return [(t.get_text(), t.get_window_extent()) for t in dict.fromkeys(texts) if t.get_text() and t.get_visible()]


SHAPES: dict[str, Callable[[Any], Any]] = {
    "early peak": lambda d: 4 * d * (1 - d / 0.8),
    "middle": lambda d: d * (0.8 - 0.25 * d),
    "late peak": lambda d: d * (0.8 - 0.13 * d),
    "rising": lambda d: 0.3 * d,
    "falling": lambda d: -0.3 * d,
    "flat": lambda d: 0 * d,
}


@pytest.mark.parametrize("layout", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("d_max", [0.1, 3.5, 10.0])
def test_no_text_leaves_the_picture_or_covers_another(
    make_curve: Callable[..., Curve], layout: Any, shape: str, d_max: float
) -> None:
    scaled = SHAPES[shape]
    curve = make_curve(lambda d: scaled(3.5 * d / d_max), d_max=d_max, noise=0.03)
    analysis = analyse(curve, form="bon")
    figure = draw(analysis, conclude(analysis), layout, with_title=layout is WIDE)
    png(figure)  # gives it a canvas
    extents = boxes(figure)
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in extents:
        assert box.x0 >= 0, text
        assert box.x1 <= width, text
        assert box.y0 >= 0, text
        assert box.y1 <= height, text
    for i, (text, box) in enumerate(extents):
        for other, second in extents[i + 1 :]:
            assert not box.overlaps(second), (text, other)


@pytest.mark.parametrize("layout", [WIDE, NARROW], ids=["wide", "narrow"])
def test_tick_labels_do_not_touch(make_curve: Callable[..., Curve], layout: Any) -> None:
    for d_max in (0.05, 0.3, 1.0, 3.5, 10.0, 40.0):
        analysis = analyse(make_curve(lambda d: d, d_max=d_max))
        figure = draw(analysis, conclude(analysis), layout, with_title=False)
        png(figure)
        labels = [label.get_window_extent() for label in figure.axes[-1].get_xticklabels() if label.get_text()]
        labels.sort(key=lambda box: box.x0)
        assert len(labels) >= 3
        assert all(left.x1 < right.x0 for left, right in pairwise(labels)), d_max


def marks(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_peak_and_choice_are_marked(analysis: Analysis) -> None:
    proxy, gold = draw(analysis, conclude(analysis)).axes
    assert any(text.startswith(f"keep: step {analysis.choice.point.step}, KL") for text in marks(proxy))
    assert any(text.startswith("fitted peak, KL") for text in marks(gold))
    assert "over-optimised" in marks(proxy)


def test_what_is_not_claimed_is_not_drawn(make_curve: Callable[..., Curve]) -> None:
    for shape in (SHAPES["rising"], lambda d: 0.4 * d.clip(max=2) - 2 * (d - 2.2).clip(min=0) ** 2):
        analysis = analyse(make_curve(shape, noise=0.02))
        drawn = [text for ax in draw(analysis, conclude(analysis)).axes for text in marks(ax)]
        assert not any("peak" in text or "over" in text for text in drawn)


@pytest.mark.parametrize(
    "few",
    [
        points([0.0], proxy=[1.0]),
        points([0.0, 0.0, 0.0], proxy=[1.0, 1.0, 1.0], gold=[2.0, 2.0, 2.0]),
        points([-0.1, -0.2], proxy=[1.0, 2.0], gold=[1.0, 2.0]),
        points([1.0, 4.0], gold=[1.0, 2.0]),
    ],
    ids=["one", "never moved", "negative", "gold only"],
)
def test_little_data_is_drawn_all_the_same(few: list[Point]) -> None:
    analysis = analyse(Curve("few", few))
    assert size(png(draw(analysis, conclude(analysis))))[0] == 1400
    assert "<svg" in page_of(analysis)
    json.loads(to_json(summarise(analysis, conclude(analysis), Path("few"))))


def test_svg_leaves_its_colours_to_the_page(analysis: Analysis) -> None:
    text = svg(draw(analysis, conclude(analysis), with_title=False), "wide", "a label")
    assert not re.search(r"#[0-9a-fA-F]{6}\b", text)
    assert not re.search(r"(fill|stroke): (?!none|var)", text.replace("fill-", "").replace("stroke-", ""))
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(COLOURS)
    assert {"gold", "proxy", "ink"} <= set(re.findall(r"var\(--(\w+)\)", text))


def test_gold_and_proxy_stand_out_from_the_ground_in_both_modes() -> None:
    """WCAG contrast of at least 3 for marks and 4.5 for text."""
    css = (Path(draw.__code__.co_filename).parent / "report.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in css.split("@media", 1))

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for mode in (light, dark, COLOURS):
        assert contrast(mode["gold"], mode["paper"]) >= 3
        assert contrast(mode["proxy"], mode["paper"]) >= 3
        assert contrast(mode["muted"], mode["paper"]) >= 4.5
        assert contrast(mode["ink"], mode["paper"]) >= 7
    assert set(COLOURS) <= set(light)
    assert set(COLOURS) <= set(dark)


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
