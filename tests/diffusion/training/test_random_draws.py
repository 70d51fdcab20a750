import pytest
import torch

from diffusion.training.random_draws import RandomDraws
from diffusion.training.timestep_sampling import uniform_timesteps


def draws(batch_size=4, shape=(2,), *, rank=0, ahead=True, seed=1):
    def draw_timesteps(count, generator):
        return uniform_timesteps(100, count, generator), None

    return RandomDraws(seed, rank, batch_size, shape, draw_timesteps, ahead=ahead, device=torch.device("cpu"))


def tensors(of_update):
    return [of_update.timesteps, of_update.noise, of_update.flips, of_update.labels]


@pytest.mark.parametrize("shape", [(2,), (3, 40, 40), (1, 300, 300)])
def test_draws_depend_on_seed_and_update_only(shape):
    in_order, resumed = draws(shape=shape), draws(shape=shape)
    expected = {update: in_order.of(update) for update in range(70)}
    for update in (69, 3, 64, 63, 3):
        for one, other in zip(tensors(resumed.of(update)), tensors(expected[update]), strict=True):
            assert torch.equal(one, other)
        assert resumed.of(update).dropout_seed == expected[update].dropout_seed
    assert len({each.dropout_seed for each in expected.values()}) == 70
    assert not torch.equal(expected[0].noise, draws(shape=shape, seed=2).of(0).noise)
    assert not torch.equal(expected[0].noise, expected[1].noise)


def test_workers_share_all_draws_but_dropout():
    one, other = draws(rank=0).of(5), draws(rank=1).of(5)
    assert all(torch.equal(*pair) for pair in zip(tensors(one), tensors(other), strict=True))
    assert one.dropout_seed != other.dropout_seed


def test_timesteps_that_depend_on_losses_are_drawn_one_update_at_a_time():
    drawn = []

    def draw_timesteps(count, generator):
        drawn.append(count)
        return uniform_timesteps(100, count, generator), None

    one_by_one = RandomDraws(1, 0, 4, (2,), draw_timesteps, ahead=False, device=torch.device("cpu"))
    for update in range(3):
        one_by_one.of(update)
        assert drawn == [4] * (update + 1)
