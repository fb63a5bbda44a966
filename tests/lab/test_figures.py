"""What is drawn: the size and the colours of the picture, and that nothing in it covers or leaves it."""

import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_align.lab.analysis import Analysis, analyse
from lightning_align.lab.figures import COLOURS, NARROW, PNG_DPI, WIDE, draw, png, svg
from lightning_align.lab.findings import conclude
from lightning_align.lab.overopt_page import render
from lightning_align.lab.runs import Curve, Point
from lightning_align.lab.summary import summarise, to_json


def points(kl: Sequence[float], **scores: Sequence[float]) -> list[Point]:
    return [Point(i, kl=k, **{name: values[i] for name, values in scores.items()}) for i, k in enumerate(kl)]


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
    FigureCanvasAgg(figure).draw()
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
@pytest.mark.parametrize("d_max", [0.2, 7.0])
def test_no_text_leaves_the_picture_or_covers_another(
    make_curve: Callable[..., Curve], layout: Any, shape: str, d_max: float
) -> None:
    scaled = SHAPES[shape]
    curve = make_curve(lambda d: scaled(3.5 * d / d_max), d_max=d_max, noise=0.03)
    curve.name = "quickstart/ppo with a name that somebody thought should say all there is to say about the run"
    analysis = analyse(curve, form="bon")
    figure = draw(analysis, conclude(analysis), layout, with_title=layout is WIDE)
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
        FigureCanvasAgg(figure).draw()
        labels = [label.get_window_extent() for label in figure.axes[-1].get_xticklabels() if label.get_text()]
        labels.sort(key=lambda box: box.x0)
        assert len(labels) >= 3
        assert all(left.x1 + 4 < right.x0 for left, right in pairwise(labels)), d_max


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
    assert "<svg" in render(analysis, conclude(analysis))
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
