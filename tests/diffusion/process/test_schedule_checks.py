import math

import numpy as np
import pytest
import torch

from diffusion.process.schedule_checks import infeasible_reason, schedule_metrics, schedule_warnings
from diffusion.process.schedules import (
    NoiseSchedule,
    constant_betas,
    cosine_betas,
    linear_betas,
    zero_terminal_snr,
)

DDPM = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))
WINDOW = (-8.0, 5.0)


def test_schedule_metrics_describe_the_first_and_last_timestep():
    schedule = NoiseSchedule(linear_betas(100, 1e-3, 0.05))
    metrics = schedule_metrics(schedule, num_values=3)
    last = float(np.prod(1.0 - schedule.betas))
    assert metrics["schedule/alphas_cumprod_T"] == pytest.approx(last, rel=1e-12)
    assert metrics["schedule/log_snr_min"] == pytest.approx(math.log(last / (1.0 - last)), rel=1e-9)
    assert metrics["schedule/log_snr_max"] == pytest.approx(math.log(0.999 / 0.001), rel=1e-9)
    assert metrics["schedule/prior_kl_total"] == pytest.approx(3.0 * metrics["schedule/prior_kl"], rel=1e-12)


def test_prior_kl_is_the_kl_to_the_prior_averaged_over_data_of_unit_second_moment():
    schedule = NoiseSchedule(linear_betas(100, 1e-3, 0.05))
    a = torch.tensor(schedule.alphas_cumprod[-1])
    x_0 = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_0 = x_0 / x_0.square().mean().sqrt()
    normals = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(
        normals(a.sqrt() * x_0, (1.0 - a).sqrt()), normals(0.0, 1.0)
    ).mean()
    assert schedule_metrics(schedule, 1)["schedule/prior_kl"] == pytest.approx(kl.item(), rel=1e-9)


def test_metrics_are_finite_if_no_signal_is_left():
    metrics = schedule_metrics(NoiseSchedule([0.1, 1.0]), num_values=2)
    assert metrics["schedule/alphas_cumprod_T"] == metrics["schedule/prior_kl"] == 0.0
    assert metrics["schedule/log_snr_min"] == pytest.approx(math.log(9.0))


def test_good_schedules_have_no_warnings():
    for schedule in (DDPM, NoiseSchedule(cosine_betas(1000)), NoiseSchedule(cosine_betas(50))):
        assert schedule_warnings(schedule, WINDOW, 64) == []
        assert infeasible_reason(schedule) is None


def only_warning(betas, window=WINDOW, **options):
    lines = schedule_warnings(NoiseSchedule(betas), window, 64, **options)
    assert len(lines) == 1
    assert "\n" not in lines[0]
    return lines[0]


def test_signal_left_in_x_T_is_reported_with_amplitude_and_mismatch():
    line = only_warning(linear_betas(100, 1e-4, 0.025))
    last = np.prod(1.0 - linear_betas(100, 1e-4, 0.025))
    for number in (last**0.5, last, -0.5 * math.log1p(-last), -32.0 * math.log1p(-last)):
        assert f"{number:.2g}" in line
    assert infeasible_reason(NoiseSchedule(linear_betas(100, 1e-4, 0.025))) is None, (
        "it can still be the best"
    )


def test_data_with_one_strong_direction_need_a_noisier_end():
    """Its variance is 0.05 exp(-low): a twentieth of the noise's at the low end, all of it at low + 3."""
    assert schedule_warnings(DDPM, (-12.0, 5.0), 64) == []
    line = only_warning(DDPM.betas, (-14.0, 5.0))
    last = DDPM.alphas_cumprod[-1]
    assert f"keeps {last**0.5:.2g} of the data's amplitude" in line
    assert f"its variance is {1.0 - last + last * 0.05 * math.exp(14.0):.2g}" in line


def test_a_first_step_that_hides_detail_is_reported_with_its_cost():
    line = only_warning(linear_betas(100, 0.05, 0.2))
    start = math.log(0.95 / 0.05)
    for number in (f"{0.05**0.5:.2g}", f"{start:.2f}", "5.00", f"{(5.0 - start) / 2.0:.2g}"):
        assert number in line
    # There is no warning for data that have no such detail.
    assert schedule_warnings(NoiseSchedule(linear_betas(100, 0.05, 0.2)), (-8.0, 2.9), 64) == []


def test_timesteps_outside_the_window_are_counted():
    betas = linear_betas(1000, 1e-4, 0.06)
    outside = np.mean(np.abs(NoiseSchedule(betas).log_snr + 1.5) > 6.5)
    assert outside > 0.5
    assert f"{outside:.0%} of the timesteps" in only_warning(betas)


def test_a_step_too_long_to_be_gaussian_is_reported_with_its_timesteps():
    """The log-SNRs are 6, 4, 1 and -6.5, so the step from t = 2 to 1 has length 3, and the next 7.5."""
    alphas_cumprod = 1.0 / (1.0 + np.exp([-6.0, -4.0, -1.0, 6.5]))
    betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    line = only_warning(betas)
    assert "from t = 3 to 2" in line
    assert f"{math.exp(7.5):.0f}-fold" in line
    short = schedule_warnings(NoiseSchedule(betas[:2]), (-8.0, 4.5), 64)
    assert not any("-fold" in line for line in short)


def test_amplification_of_the_error_of_unclipped_x0_is_reported_with_the_factor():
    betas = cosine_betas(1000)
    gain = np.prod(1.0 - betas) ** -0.5
    assert gain > 1e4
    assert f"times {gain:.2g}" in only_warning(betas, clipped=False)
    for options in ({"clipped": True}, {"clipped": False, "prediction_type": "v_prediction"}):
        assert schedule_warnings(NoiseSchedule(betas), WINDOW, 64, **options) == []


def test_warnings_work_for_a_last_timestep_without_signal():
    schedule = NoiseSchedule(zero_terminal_snr(linear_betas(1000, 1e-4, 0.02)))
    assert schedule_warnings(schedule, WINDOW, 64, prediction_type="v_prediction", clipped=False) == []
    assert isinstance(schedule_warnings(NoiseSchedule([0.1, 1.0]), WINDOW, 2), list)


@pytest.mark.parametrize(
    ("betas", "prediction_type", "reason"),
    [
        (linear_betas(1000, 0.5, 0.9), "epsilon", "alphas_cumprod_T"),
        (linear_betas(1000, 0.5, 0.9), "v_prediction", "alphas_cumprod_T"),
        (zero_terminal_snr(linear_betas(20, 0.1, 0.5)), "epsilon", "v_prediction"),
        (zero_terminal_snr(linear_betas(20, 0.1, 0.5)), "v_prediction", None),
        (zero_terminal_snr(linear_betas(20, 0.1, 0.5)), "sample", None),
        ([0.5, 1.0, 1.0], "sample", "alphas_cumprod_T"),
        (np.full(5, 1e-20), "epsilon", "1e-20"),
        ([0.1, 1e-20, 0.1], "epsilon", "not finite"),
        (constant_betas(10, 1e-9), "epsilon", None),
    ],
)
def test_infeasible_schedules_have_a_reason(betas, prediction_type, reason):
    actual = infeasible_reason(NoiseSchedule(betas), prediction_type)
    assert (actual is None) if reason is None else reason in actual
