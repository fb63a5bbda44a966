"""A chart for every metric: nothing is left out, extremes survive thinning, and names cannot be markup."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_align.errors import UserError
from lightning_align.lab.charts import Series, chart, grouped, read_series, sections, short, thinned


def test_every_metric_of_a_run_has_a_chart(make_run: Callable[..., Path]) -> None:
    run = make_run(kl=[0.0, 1.0, 2.0], proxy=[0.5, 1.5, -2.5])
    series = {one.name: one for one in read_series(run)}
    assert set(series) == {"eval/lab/kl", "eval/lab/proxy", "loss/policy_avg"}
    assert series["eval/lab/proxy"].steps == (0, 5, 10)
    assert series["eval/lab/proxy"].values == (0.5, 1.5, -2.5)
    assert list(grouped(list(series.values()))) == ["eval/lab", "loss"]
    page = "".join(sections(run))
    assert page.count("<polyline") == 3
    assert "<strong>−2.5</strong>" in page


def test_cells_that_are_no_numbers_are_no_points(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,a,b\n0,1,nan\n1,inf,\n2,3,\n")
    (a,) = read_series(tmp_path)
    assert (a.name, a.steps, a.values) == ("a", (0, 2), (1, 3))
    (tmp_path / "metrics.csv").write_text("step,a\n0,\n")
    with pytest.raises(UserError, match="no metric that is a number"):
        read_series(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,a\n0,fast\n")
    with pytest.raises(UserError, match="'fast' in column 'a' is not a number"):
        read_series(tmp_path)
    with pytest.raises(UserError, match="has no metrics"):
        read_series(tmp_path / "none")


def test_thinning_keeps_ends_and_extremes() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    values[1234], values[8765] = 50, -50
    points = thinned(range(10_000), values.tolist())
    assert len(points) < 450
    assert points[0][0] == 0
    assert points[-1][0] == 9999
    assert {50, -50} <= {y for _, y in points}
    assert [x for x, _ in points] == sorted({x for x, _ in points})


def test_lines_stay_inside_their_chart_and_rise_with_the_metric() -> None:
    drawn = chart(Series("loss", (0, 10, 20), (1.0, 3.0, 2.0)))
    (line,) = re.findall(r'points="([^"]+)"', drawn)
    points = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert all(0 <= x <= 320 and 0 <= y <= 150 for x, y in points)
    assert points[0][1] > points[2][1] > points[1][1]  # down the page is down
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0])


@pytest.mark.parametrize("values", [(2.0,), (2.0, 2.0), (0.0, 0.0)])
def test_one_point_or_a_level_line_is_drawn(values: tuple[float, ...]) -> None:
    drawn = chart(Series("x", tuple(range(len(values))), values))
    assert "nan" not in drawn
    assert drawn.count(f'text-anchor="end">{short(values[0])}<') == 1


def test_names_are_text() -> None:
    drawn = chart(Series("<script>alert(1)</script>", (0,), (1.0,)))
    assert "<script>" not in drawn


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (0.00015, "1.5e−4"), (999.9, "1,000"), (-0.015625, "−0.0156"), (1e7, "1e7")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
