import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from diffusion.training.timestep_sampling import LossSecondMoment, stratified_timesteps, uniform_timesteps


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def counts_of(timesteps, num_train_timesteps):
    assert timesteps.dtype == torch.int64
    assert timesteps.min() >= 0 and timesteps.max() < num_train_timesteps
    return np.bincount(timesteps.numpy(), minlength=num_train_timesteps)


@pytest.mark.parametrize("draw", [uniform_timesteps, stratified_timesteps])
def test_every_timestep_is_equally_likely(draw):
    source = generator()
    counts = sum(counts_of(draw(7, 5, source), 7) for _ in range(4000))
    assert chisquare(counts).pvalue > 1e-4 or draw is stratified_timesteps
    assert np.abs(counts / counts.mean() - 1.0).max() < 4.5 * math.sqrt(7 / counts.sum())


def test_each_index_of_a_stratified_batch_is_uniform():
    """Otherwise the first examples of a batch would be seen at small t only."""
    source = generator()
    drawn = torch.stack([stratified_timesteps(4, 3, source) for _ in range(6000)]).numpy()
    for index in range(3):
        assert chisquare(np.bincount(drawn[:, index], minlength=4)).pvalue > 1e-4


@given(st.integers(1, 2000), st.integers(1, 300))
@settings(max_examples=100)
def test_a_stratified_batch_has_one_draw_in_each_of_its_equal_parts(num_train_timesteps, count):
    timesteps = np.sort(
        stratified_timesteps(num_train_timesteps, count, generator(num_train_timesteps)).numpy()
    )
    edges = np.arange(count + 1) * num_train_timesteps / count
    assert (timesteps >= np.floor(edges[:-1])).all()
    assert (timesteps <= np.ceil(edges[1:]) - 1).all()
    per_timestep = np.bincount(timesteps, minlength=num_train_timesteps)
    assert per_timestep.max() <= math.ceil(count / num_train_timesteps) + 1


def test_the_mean_of_a_stratified_batch_varies_less():
    """The variance is T^2 / 12 / n for independent draws of t, and T^2 / 12 / n^3 for stratified ones."""
    variances = []
    for draw in (uniform_timesteps, stratified_timesteps):
        source = generator()
        variances.append(np.var([draw(10_000, 10, source).double().mean() for _ in range(2000)]))
    assert variances[0] == pytest.approx(1e8 / 12 / 10, rel=0.2)
    assert variances[1] == pytest.approx(1e8 / 12 / 1000, rel=0.2)


def filled(losses, repeats=10):
    history = LossSecondMoment(len(losses))
    for _ in range(repeats):
        history.observe(torch.arange(len(losses)), torch.tensor(losses))
    return history


def test_until_every_timestep_has_ten_losses_t_is_uniform_and_weights_are_one():
    history = filled([1.0, 2.0, 3.0], repeats=9)
    history.observe(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    np.testing.assert_array_equal(history.probabilities, np.full(3, 1 / 3))
    timesteps, weights = history.draw(3000, generator())
    assert chisquare(counts_of(timesteps, 3)).pvalue > 1e-4
    np.testing.assert_allclose(weights, 1.0, rtol=1e-12)
    history.observe(torch.tensor([2]), torch.tensor([3.0]))
    assert history.probabilities[2] > 0.4


def test_with_ten_losses_t_is_proportional_to_their_root_mean_square():
    """Improved DDPM, Eq. 18, with a thousandth of the draws uniform."""
    history = filled([1.0, 2.0, 5.0])
    expected = 0.999 * np.array([1.0, 2.0, 5.0]) / 8.0 + 0.001 / 3.0
    np.testing.assert_allclose(history.probabilities, expected, rtol=1e-12)
    timesteps, weights = history.draw(20_000, generator())
    assert chisquare(counts_of(timesteps, 3), 20_000 * expected).pvalue > 1e-4
    np.testing.assert_allclose(weights, (1.0 / (3.0 * expected))[timesteps], rtol=1e-12)


def test_weighted_losses_have_the_mean_of_uniform_t_and_almost_no_variance():
    """If the loss is a function of t, only the uniform thousandth of the draws adds variance."""
    losses = np.geomspace(0.01, 10.0, 50)
    timesteps, weights = filled(losses).draw(20_000, generator())
    weighted = torch.from_numpy(losses)[timesteps] * weights
    assert weighted.mean() == pytest.approx(losses.mean(), rel=1e-2)
    assert weighted.std() < 0.1 * losses.std()


def test_only_the_last_ten_losses_count_whatever_the_batches():
    rng = np.random.default_rng(0)
    history, last_ten = LossSecondMoment(4), {t: [] for t in range(4)}
    for count in rng.integers(1, 60, size=30):
        timesteps, losses = rng.integers(0, 4, size=count), rng.random(count)
        history.observe(torch.from_numpy(timesteps), torch.from_numpy(losses))
        for t, loss in zip(timesteps, losses, strict=True):
            last_ten[t] = [*last_ten[t], loss][-10:]
    root = np.array([np.sqrt(np.mean(np.square(last_ten[t]))) for t in range(4)])
    np.testing.assert_allclose(history.probabilities, 0.999 * root / root.sum() + 0.00025, rtol=1e-12)


def test_a_restored_history_draws_the_same():
    history = filled([1.0, 2.0, 5.0], repeats=13)
    other = LossSecondMoment(3)
    other.restore(history.state())
    state = history.state()
    for each in (history, other):
        each.observe(torch.tensor([1, 1, 2]), torch.tensor([9.0, 8.0, 7.0]))
    drawn = [each.draw(100, generator(3)) for each in (history, other)]
    assert all(torch.equal(*pair) for pair in zip(*drawn, strict=True))
    assert not torch.equal(state["losses"], history.state()["losses"]), (
        "a returned state does not change later"
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0])
def test_unusable_losses_leave_t_uniform(loss):
    history = filled([1.0, loss, 2.0] if loss else [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(history.probabilities, np.full(3, 1 / 3))
    timesteps, weights = history.draw(50, generator())
    counts_of(timesteps, 3)
    assert torch.isfinite(weights).all()
