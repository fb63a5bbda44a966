"""The picture of a reward model's calibration."""

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_align.lab import reliability
from lightning_align.lab.reliability import draw_reliability, headline
from lightning_align.losses.reward_metrics import reliability_bins


def differences(sure: float, count: int = 600) -> Tensor:
    """Differences whose sign is right with probability σ(|Δ|), then said ``sure`` times as large."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * torch.randn(count, dtype=torch.float64, generator=generator).abs()
    right = torch.rand(count, dtype=torch.float64, generator=generator) < torch.sigmoid(size)
    return sure * torch.where(right, size, -size)


@pytest.mark.parametrize(("sure", "said"), [(1.0, "As sure as"), (4.0, "More sure"), (0.2, "Less sure")])
def test_the_title_says_whether_the_model_is_too_sure(sure: float, said: str) -> None:
    assert headline(reliability_bins(differences(sure))).startswith(said)


@pytest.mark.parametrize("count", [1, 2, 7, 600])
def test_the_picture_is_the_same_every_time_and_stays_in_its_frame(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    draw = reliability.png
    monkeypatch.setattr(reliability, "png", lambda figure: figures.append(figure) or draw(figure))  # type: ignore[func-returns-value]
    bins = reliability_bins(differences(1.0, count))
    assert draw_reliability(bins, "reward") == draw_reliability(bins, "reward")
    figure = figures[0]
    FigureCanvasAgg(figure).draw()
    (ax,) = figure.axes
    low, high = ax.get_ylim()
    assert low < min(point.accuracy for point in bins)
    assert high >= 1
    assert ax.get_xlim()[1] > max(point.delta for point in bins)
    title = figure._suptitle  # type: ignore[attr-defined]
    assert title.get_window_extent().x1 < figure.bbox.x1


def test_equal_scores_everywhere_can_be_drawn() -> None:
    assert draw_reliability(reliability_bins(torch.zeros(40)), "reward").startswith(b"\x89PNG")
