import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion.evaluation.variational_bound import variational_bound
from diffusion.process.forward import q_sample, to_epsilon, to_v, to_x_0
from diffusion.process.schedules import NoiseSchedule, cosine_betas, linear_betas, zero_terminal_snr
from diffusion.training.loss import DenoisingLoss, epsilon_error_factors, loss_weights, training_target

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
WEIGHTINGS = ("simple", "vlb", "min_snr")


@pytest.fixture(name="schedule")
def _schedule():
    return NoiseSchedule(linear_betas(12, 0.01, 0.4))


class Linear(nn.Module):
    """output = weight x_t, the same at every timestep."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x, t):
        return self.weight * x


def gaussian_batch(variance=2.25, count=100_000, timestep=5):
    generator = torch.Generator().manual_seed(2)
    x_0, noise = torch.randn(2, count, 2, generator=generator, dtype=torch.float64)
    return variance**0.5 * x_0, torch.full((count,), timestep), noise


def mixed_batch(count=24, num_train_timesteps=12):
    generator = torch.Generator().manual_seed(7)
    x_0, noise = torch.randn(2, count, 3, 2, generator=generator, dtype=torch.float64)
    return x_0, torch.arange(count) % num_train_timesteps, noise


def test_the_default_loss_is_l_simple_divided_by_the_number_of_dimensions(schedule):
    """The loss of a network that returns zeros is the mean square of the noise, 1 in expectation."""
    x_0, timesteps, noise = gaussian_batch()
    result = DenoisingLoss(schedule)(Linear(0.0), x_0, timesteps, noise)
    assert result.loss.shape == result.mse.shape == ()
    assert result.loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-12)
    assert result.loss.item() == pytest.approx(1.0, abs=4.5 * (2.0 / noise.numel()) ** 0.5)
    assert result.mse.item() == result.loss.item()
    torch.testing.assert_close(result.per_example, noise.square().mean(dim=1))


def test_gradient_of_a_linear_denoiser_is_its_closed_form(schedule):
    """For N(0, v) data and epsilon_hat = w x_t: E loss = w^2 (a v + s^2) - 2 w s + 1, with s^2 = 1 - a,
    so its gradient is 2 (w (a v + s^2) - s); on the batch itself it is 2 mean(x_t (w x_t - epsilon))."""
    weight, variance = 0.8, 2.25
    x_0, timesteps, noise = gaussian_batch(variance)
    network = Linear(weight)
    DenoisingLoss(schedule)(network, x_0, timesteps, noise).loss.backward()
    gradient = network.weight.grad.item()

    a = schedule.alphas_cumprod[5]
    x_t = a**0.5 * x_0 + (1.0 - a) ** 0.5 * noise
    terms = 2.0 * x_t * (weight * x_t - noise)
    assert gradient == pytest.approx(terms.mean().item(), rel=1e-10)
    population = 2.0 * (weight * (a * variance + 1.0 - a) - (1.0 - a) ** 0.5)
    assert abs(gradient - population) < 4.5 * terms.std().item() / terms.numel() ** 0.5


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
def test_one_training_step_of_a_linear_denoiser_is_the_one_computed_by_hand(schedule, optimizer_name):
    """SGD moves by -rate * gradient, AdamW's first step by -rate * gradient / (|gradient| + eps)."""
    weight, rate = 0.8, 0.01
    x_0, timesteps, noise = gaussian_batch(count=1000)
    network = Linear(weight)
    optimizer = getattr(torch.optim, optimizer_name)(network.parameters(), lr=rate, weight_decay=0.0)
    DenoisingLoss(schedule)(network, x_0, timesteps, noise).loss.backward()
    optimizer.step()
    a = schedule.alphas_cumprod[5]
    x_t = a**0.5 * x_0 + (1.0 - a) ** 0.5 * noise
    gradient = 2.0 * (x_t * (weight * x_t - noise)).mean().item()
    update = gradient if optimizer_name == "SGD" else gradient / (abs(gradient) + 1e-8)
    assert network.weight.item() == pytest.approx(weight - rate * update, rel=1e-10)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradient_descent_finds_the_conditional_mean_of_the_target(schedule, prediction_type, weighting):
    """E[target | x_t] = Cov(target, x_t) / Var(x_t) x_t; at a single t the weighting does not change it."""
    variance, a = 2.25, schedule.alphas_cumprod[5]
    x_0, timesteps, noise = gaussian_batch(variance)
    network = Linear(0.0)
    loss_function = DenoisingLoss(schedule, prediction_type=prediction_type, weighting=weighting)
    weight = loss_weights(schedule, prediction_type, weighting)[5]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2 / weight)
    for _ in range(30):
        optimizer.zero_grad()
        loss_function(network, x_0, timesteps, noise).loss.backward()
        optimizer.step()
    signal, sigma = a**0.5, (1.0 - a) ** 0.5
    covariance = {
        "epsilon": sigma,
        "sample": signal * variance,
        "v_prediction": signal * sigma * (1.0 - variance),
    }[prediction_type]
    assert network.weight.item() == pytest.approx(covariance / (a * variance + 1.0 - a), abs=0.01)


@pytest.mark.parametrize(("loss", "minimum"), [("l2", 1.0), ("l1", 0.0), ("huber", 0.5)])
def test_l1_and_huber_do_not_find_the_mean(schedule, loss, minimum):
    """Targets 0, 0 and 3 have mean 1 and median 0; huber's gradients w, w and -1 add up to 0 at w = 1/2."""
    noise = torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.float64)
    output = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    loss_function = DenoisingLoss(schedule, loss=loss)
    optimizer = torch.optim.SGD([output], lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        network = lambda x, t: output.expand_as(x)  # noqa: E731
        loss_function(network, torch.zeros(3, 1).double(), torch.tensor([5] * 3), noise).loss.backward()
        optimizer.step()
    assert output.item() == pytest.approx(minimum, abs=0.02)


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_losses_match_their_formulas(schedule, loss):
    x_0, timesteps, noise = mixed_batch()
    output = 3.0 * q_sample(schedule, x_0, timesteps, noise)
    error = (output - noise).abs()
    huber = torch.where(error < 1.0, 0.5 * error**2, error - 0.5)
    expected = {"l2": error**2, "l1": error, "huber": huber}[loss].flatten(1).mean(dim=1)
    result = DenoisingLoss(schedule, loss=loss)(Linear(3.0), x_0, timesteps, noise)
    torch.testing.assert_close(result.per_example, expected, rtol=1e-10, atol=0.0)
    assert result.loss.item() == pytest.approx(expected.mean().item(), rel=1e-10)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_conversions_recover_x_0_and_epsilon_from_the_target(schedule, prediction_type):
    x_0, timesteps, noise = mixed_batch()
    x_t = q_sample(schedule, x_0, timesteps, noise)
    target = training_target(schedule, prediction_type, x_0, timesteps, noise)
    torch.testing.assert_close(to_x_0(schedule, prediction_type, target, x_t, timesteps), x_0)
    torch.testing.assert_close(to_epsilon(schedule, prediction_type, target, x_t, timesteps), noise)
    v = training_target(schedule, "v_prediction", x_0, timesteps, noise)
    torch.testing.assert_close(to_v(schedule, prediction_type, target, x_t, timesteps), v)


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_mse_is_that_of_epsilon_for_every_prediction_type_and_loss(
    schedule, prediction_type, weighting, loss
):
    x_0, timesteps, noise = mixed_batch()
    loss_function = DenoisingLoss(schedule, prediction_type=prediction_type, weighting=weighting, loss=loss)
    result = loss_function(Linear(0.3), x_0, timesteps, noise)
    x_t = q_sample(schedule, x_0, timesteps, noise)
    epsilon = to_epsilon(schedule, prediction_type, 0.3 * x_t, x_t, timesteps)
    assert result.mse.item() == pytest.approx((epsilon - noise).square().mean().item(), rel=1e-9)


def test_importance_weights_loss_and_mse_but_not_the_losses_per_example(schedule):
    x_0, timesteps, noise = mixed_batch()
    loss_function = DenoisingLoss(schedule, prediction_type="sample", weighting="min_snr")
    plain = loss_function(Linear(0.3), x_0, timesteps, noise)
    importance = torch.linspace(0.2, 3.0, len(x_0))
    weighted = loss_function(Linear(0.3), x_0, timesteps, noise, importance=importance)
    torch.testing.assert_close(weighted.per_example, plain.per_example)
    expected = (plain.per_example * importance).mean()
    assert weighted.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    factors = torch.from_numpy(epsilon_error_factors(schedule, "sample"))[timesteps]
    x_t = q_sample(schedule, x_0, timesteps, noise)
    squared = (0.3 * x_t - x_0).square().flatten(1).mean(dim=1) * factors * importance
    assert weighted.mse.item() == pytest.approx(squared.mean().item(), rel=1e-6)


def test_labels_reach_the_network(schedule):
    x_0, timesteps, noise = mixed_batch()
    labels, seen = torch.arange(len(x_0)), []
    DenoisingLoss(schedule)(lambda x, t, y: seen.append(y) or x, x_0, timesteps, noise, None, None, labels)
    assert torch.equal(seen[0], labels)


def test_the_loss_of_half_precision_outputs_is_float32(schedule):
    x_0, timesteps, noise = (each.float() if each.is_floating_point() else each for each in mixed_batch())
    result = DenoisingLoss(schedule)(lambda x, t: x.to(torch.bfloat16), x_0, timesteps, noise)
    assert result.loss.dtype == torch.float32


@pytest.mark.parametrize("num_train_timesteps", [2, 12, 200])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_the_paper(num_train_timesteps, gamma):
    """min(SNR, gamma) for x_0; divided by the SNR for epsilon, and by SNR + 1 for v."""
    schedule = NoiseSchedule(cosine_betas(num_train_timesteps))
    snr = schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
    for prediction_type, divisor in (("epsilon", snr), ("sample", 1.0), ("v_prediction", snr + 1.0)):
        weights = loss_weights(schedule, prediction_type, "min_snr", gamma)
        np.testing.assert_allclose(weights, np.minimum(snr, gamma) / divisor, rtol=1e-9)


def test_vlb_weights_are_those_of_ddpms_equation_12(schedule):
    """beta^2 / (2 sigma^2 alpha (1 - abar)) with sigma^2 = beta-tilde; times T, since t is uniform."""
    beta, alpha, a = schedule.betas, schedule.alphas, schedule.alphas_cumprod
    expected = (beta**2 / (2.0 * np.maximum(schedule.posterior_variance, 1e-300) * alpha * (1.0 - a)))[1:]
    weights = loss_weights(schedule, "epsilon", "vlb")
    np.testing.assert_allclose(weights[1:], 12 * expected, rtol=1e-9)
    assert weights[0] == pytest.approx(12 * 0.5 / alpha[0], rel=1e-9)  # the decoder's variance is beta_0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_vlb_loss_is_the_bound(gaussian_denoiser, prediction_type):
    """Its mean over uniform t is L_0 + ... + L_{T-1} without the constant of the Gaussian decoder."""
    schedule = NoiseSchedule(linear_betas(30, 0.01, 0.3))
    network = gaussian_denoiser(schedule, variance=3.0, prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(4)
    x_0 = torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    bound = variational_bound(network, schedule, x_0, prediction_type=prediction_type)
    constant = 0.5 * np.log(2.0 * np.pi * schedule.betas[0])
    rows = x_0.repeat(30, 1)
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    loss_function = DenoisingLoss(schedule, prediction_type=prediction_type, weighting="vlb")
    result = loss_function(network, rows, torch.arange(30).repeat_interleave(2000), noise)
    standard_error = result.per_example.reshape(30, 2000).mean(0).std() / 2000**0.5
    expected = bound.terms[:-1].sum() - constant
    assert abs(result.loss.item() - expected) < 4.5 * float(standard_error) + 4.5 * bound.standard_error
    assert float(standard_error) < 0.02 * expected


@given(
    st.integers(2, 300),
    st.sampled_from(PREDICTION_TYPES),
    st.sampled_from(WEIGHTINGS),
    st.floats(1e-4, 0.3),
    st.booleans(),
)
@settings(max_examples=150)
def test_weights_are_finite_and_equivalent_for_every_prediction_type(
    num_train_timesteps, prediction_type, weighting, beta_start, zero_terminal
):
    betas = linear_betas(num_train_timesteps, beta_start, 0.5)
    if zero_terminal and prediction_type != "epsilon":
        betas = zero_terminal_snr(betas)
    schedule = NoiseSchedule(betas)
    weights = loss_weights(schedule, prediction_type, weighting)
    assert weights.shape == (num_train_timesteps,)
    assert np.isfinite(weights).all()
    assert (weights >= 0.0).all()
    if weighting != "simple":
        # An error of 1 in x_0 has the same weight for every prediction type.
        a = schedule.alphas_cumprod
        output_error = {"epsilon": a / (1.0 - a), "sample": 1.0, "v_prediction": 1.0 / (1.0 - a)}
        expected = loss_weights(schedule, "sample", weighting)
        np.testing.assert_allclose(weights * output_error[prediction_type], expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("epsilon", "snr"), "'snr'"),
        (("epsilon", "min_snr", 0.0), "min_snr_gamma 0.0"),
        (("epsilon", "min_snr", float("nan")), "min_snr_gamma nan"),
    ],
)
def test_invalid_arguments_are_refused_with_their_value(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        loss_weights(schedule, *arguments)


def test_epsilon_prediction_is_refused_if_alphas_cumprod_reaches_0():
    with pytest.raises(ValueError, match="alphas_cumprod reaches 0.*v_prediction"):
        DenoisingLoss(NoiseSchedule([0.1, 1.0]))
    x_0, timesteps, noise = mixed_batch(num_train_timesteps=2)
    for prediction_type in ("sample", "v_prediction"):
        loss_function = DenoisingLoss(
            NoiseSchedule([0.1, 1.0]), prediction_type=prediction_type, weighting="vlb"
        )
        assert torch.isfinite(loss_function(Linear(0.5), x_0, timesteps, noise).loss)
