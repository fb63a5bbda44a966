"""Aspects of the true score over KL: what is read, compared and drawn."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lightning_align.errors import UserError
from lightning_align.lab.aspects import STYLES, common_kl, draw_aspects, headline, load_policies, table
from lightning_align.lab.figures import png
from lightning_align.run.logging import FileLogger

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A run with a helpfulness and a safety that change linearly in d = √KL."""

    def make(
        name: str,
        helpfulness: float,
        safety: float,
        d: Sequence[float] = (0, 1, 2, 3),
        prefix: str = "eval/lab/",
        errors: Mapping[str, float] | None = None,
    ) -> Path:
        logger = FileLogger(tmp_path / name)
        for step, place in enumerate(d):
            row = {
                "kl": place**2,
                "proxy": place,
                "gold": place,
                "gold_helpfulness": 0.3 + helpfulness * place,
                "gold_safety": 0.9 + safety * place,
                **{f"gold_{aspect}_se": value for aspect, value in (errors or {}).items()},
            }
            logger.log_metrics({f"{prefix}{key}": value for key, value in row.items()}, step=step)
        return tmp_path / name

    return make


def test_policies_are_compared_at_the_largest_kl_that_all_reach(write: Write) -> None:
    runs = [
        write("gate", 0.1, 0.0, errors={"safety": 0.01, "helpfulness": 0.02}),
        write("help", 0.2, -0.2, d=(0, 1.5, 4)),
        write("safe", -0.1, 0.02),
    ]
    policies = load_policies(runs)
    assert [policy.name for policy in policies] == ["gate", "help", "safe"]
    assert common_kl(policies) == 9
    rows = table(policies)
    assert rows["gate"]["helpfulness"]["score"] == pytest.approx(0.6)
    assert rows["gate"]["safety"] == {
        "score": pytest.approx(0.9),
        "low": pytest.approx(0.9 - 0.0196),
        "high": pytest.approx(0.9 + 0.0196),
    }
    assert rows["help"]["safety"] == {"score": pytest.approx(0.3), "low": None, "high": None}  # between its points
    told = "At KL 9.0 help has the highest helpfulness (not clear of gate and safe) and safe the highest safety"
    assert headline(policies) == f"{told} (not clear of gate and help)"  # help and safe have no errors


def test_one_policy_and_one_that_leads_in_both(write: Write) -> None:
    one = load_policies([write("ppo", 0.1, -0.1)])
    assert headline(one) == "Up to KL 9.0, helpfulness rises from 0.30 to 0.60 and safety falls from 0.90 to 0.60"
    both = load_policies([write("a", 0.1, -0.1), write("b", 0.2, 0.0)])
    assert headline(both).startswith("At KL 9.0 b has the highest helpfulness (not clear of a)")


@pytest.mark.parametrize(("error", "near"), [(0.01, ""), (0.2, " (not clear of a)")])
def test_one_that_leads_in_both_is_called_clear_where_intervals_are_apart(
    write: Write, error: float, near: str
) -> None:
    errors = {"helpfulness": error, "safety": 0.01}
    both = load_policies([write("a", 0.1, -0.1, errors=errors), write("b", 0.2, 0.0, errors=errors)])
    assert headline(both) == f"At KL 9.0 b has the highest helpfulness{near} and the highest safety"


def test_training_iterations_are_read_where_nothing_was_evaluated(write: Write) -> None:
    (policy,) = load_policies([write("ppo", 0.1, -0.1, prefix="lab/")])
    assert [point.gold for point in policy.aspects["safety"]] == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert math.isnan(policy.at("safety", 4.0)[1])


def test_runs_of_one_name_are_told_apart(write: Write) -> None:
    runs = [write("seed0/ppo", 0.1, 0.0), write("seed1/ppo", 0.1, 0.0)]
    assert [policy.name for policy in load_policies(runs)] == ["seed0/ppo", "seed1/ppo"]


def test_the_picture_has_a_line_for_each_policy_and_nothing_leaves_it(write: Write) -> None:
    runs = [write(f"policy number {i}", 0.1 * i, -0.05 * i, errors={"safety": 0.02}) for i in range(len(STYLES))]
    figure = draw_aspects(load_policies(runs))
    for ax in figure.axes:
        lines = [line for line in ax.lines if len(line.get_xdata()) == 4]
        assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == len(STYLES)
    assert png(figure) == png(draw_aspects(load_policies(runs)))
    FigureCanvasAgg(figure).draw()
    title = figure._suptitle  # type: ignore[attr-defined]
    assert title.get_window_extent().x1 < figure.bbox.x1
    legend = figure.axes[-1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [f"policy number {i}" for i in range(len(STYLES))]


def test_a_run_without_aspects_is_named(write: Write, tmp_path: Path) -> None:
    logger = FileLogger(tmp_path / "plain")
    for step in range(3):
        logger.log_metrics({"eval/lab/kl": float(step), "eval/lab/proxy": 1.0}, step=step)
    with pytest.raises(
        UserError, match=r"plain has no eval/lab/gold_helpfulness: aspects are measured with model.gold"
    ):
        load_policies([write("ppo", 0.1, 0.0), tmp_path / "plain"])
    with pytest.raises(UserError, match="6 runs in one picture: give at most 5"):
        load_policies([tmp_path] * 6)
