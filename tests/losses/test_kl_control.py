"""Fixed and adaptive KL control."""

import math

import pytest

from lightning_align.losses.kl_control import AdaptiveKL, FixedKL


def test_ppo_10_adaptive_moves_towards_the_target_and_is_clipped() -> None:
    controller = AdaptiveKL(0.2, target=6.0, horizon=1000)
    controller.update(6.0, 100)
    assert controller.value == 0.2
    controller.update(1e9, 100)
    assert math.isclose(controller.value, 0.2 * 1.02)
    controller.update(0.0, 100)
    assert math.isclose(controller.value, 0.2 * 1.02 * 0.98)


def test_ppo_10_adaptive_converges_on_a_system_that_answers_to_it() -> None:
    """KL = 1.2/β, as for a policy that keeps to its optimum: the KL must settle within 20 % of the target."""
    controller = AdaptiveKL(1.0, target=6.0, horizon=2000)
    for _ in range(400):
        controller.update(1.2 / controller.value, 128)
    assert abs(1.2 / controller.value / 6.0 - 1) < 0.2


def test_state_survives_and_a_fixed_coefficient_stays_the_configurations() -> None:
    controller = AdaptiveKL(0.2, target=6.0, horizon=1000)
    controller.update(9.0, 256)
    restored = AdaptiveKL(0.2, target=6.0, horizon=1000)
    restored.load_state_dict(controller.state_dict())
    for each in (controller, restored):
        each.update(2.0, 256)
    assert restored.value == controller.value
    fixed = FixedKL(0.05)
    fixed.update(100.0, 512)
    assert fixed.value == 0.05
    fixed.load_state_dict(FixedKL(0.3).state_dict())
    assert fixed.value == 0.05


def test_bad_settings_and_bad_kl_are_errors() -> None:
    with pytest.raises(ValueError, match="kl_coef is -1"):
        FixedKL(-1)
    with pytest.raises(ValueError, match="target is 0"):
        AdaptiveKL(0.1, target=0, horizon=10)
    with pytest.raises(ValueError, match="nan"):
        AdaptiveKL(0.1).update(math.nan, 10)
    assert AdaptiveKL(0.1).value == 0.1
