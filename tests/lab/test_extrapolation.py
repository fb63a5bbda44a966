"""Whether a law predicts: exact where it holds, and no better than a constant where nothing can be known."""

import math

import numpy as np
import pytest

from lightning_align.lab.extrapolation import FORMS, foresee
from lightning_align.lab.joint import Series
from lightning_align.lab.overopt import FormFit

D = np.linspace(0.5, 6.0, 24)


def series(reward: np.ndarray, d: np.ndarray = D, *, free: bool = False) -> Series:
    return Series(d, reward, np.ones(len(d)), free)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("free", [False, True])
def test_a_law_that_holds_is_foreseen_and_the_baselines_are_not(form: str, free: bool) -> None:
    reward = FormFit(form, 0.8, 0.2)(D) + (3.0 if free else 0.0)  # type: ignore[arg-type]
    found = foresee([series(reward, free=free)], 0.5)
    assert found is not None
    assert (found.near, found.far, found.left_out) == (12, 12, 0)
    assert found.predicted[form] == pytest.approx(0, abs=1e-9)  # type: ignore[index]
    assert found.beats_baselines(form)  # type: ignore[arg-type]
    other = next(name for name in FORMS if name != form)
    assert found.predicted[other] > 0.01
    assert found.hindsight[other] < found.predicted[other]


def test_what_the_near_points_cannot_know_is_an_error_of_its_size() -> None:
    d = np.arange(1.0, 10.0)
    reward = FormFit("bon", 0.8, 0.09)(d)
    reward[6:] += 0.5
    found = foresee([series(reward[::-1], d[::-1])], 1 / 3)  # the order of the points says nothing
    assert found is not None
    assert found.predicted["bon"] == pytest.approx(0.5)
    assert found.hindsight["bon"] < 0.5


def test_baselines() -> None:
    level = foresee([series(np.full(24, 2.0))], 0.5)
    assert level is not None
    assert level.constant == pytest.approx(0)
    assert level.linear == pytest.approx(0, abs=1e-12)
    line = foresee([series(0.5 * D)], 0.5)
    assert line is not None
    assert line.linear == pytest.approx(0, abs=1e-12)
    assert line.constant > 0.9
    assert not line.beats_baselines("rl")


def test_runs_share_a_law_and_keep_their_starts() -> None:
    law = FormFit("rl", 0.7, 0.3)
    runs = [series(law(D) + start, free=True) for start in (0.0, 5.0, -2.0)]
    found = foresee(runs, 0.5)
    assert found is not None
    assert found.predicted["rl"] == pytest.approx(0, abs=1e-9)
    far = series(law(D + 10) + 1, D + 10, free=True)  # begins where the others end: its start is unknown
    with_far = foresee([*runs, far], 0.5)
    assert with_far is not None
    assert with_far.left_out == 24


def test_errors_at_the_far_points_are_weighted() -> None:
    """Near points lie on 0, so that every prediction is 0 and the errors are the far rewards 1 and 3."""
    d = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    run = Series(d, np.array([0.0, 0.0, 0.0, 0.0, 1.0, 3.0]), np.array([1.0, 1.0, 1.0, 1.0, 7.0, 2.0]))
    found = foresee([run], 1 / 3)
    assert found is not None
    expected = math.sqrt((7 * 1**2 + 2 * 3**2) / (7 + 2))
    for error in (found.constant, found.linear, *found.predicted.values()):
        assert error == pytest.approx(expected)


@pytest.mark.parametrize("far", [1e6, 1e10, 1e60])
def test_a_distance_far_beyond_the_others_foresees_nothing(far: float) -> None:
    d = np.array([*D, far])
    assert foresee([series(0.1 * d, d)], 0.5) is None


def test_too_few_points_are_not_judged() -> None:
    assert foresee([series(D[:5], D[:5])], 0.5) is None
    assert foresee([series(np.ones(24), np.ones(24))], 0.5) is None
