import itertools

import pytest
import torch

from diffusion.order import DataOrder, noise_generator, seed_dropout, seed_of


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 3), (10, 10), (5, 12), (7, 1)])
def test_batches_show_every_example_once_an_epoch_without_a_gap(num_examples, batch_size):
    order = DataOrder(num_examples, batch_size, seed=0)
    drawn = [order.batch(update) for update in range(4 * num_examples)]
    assert all(batch.shape == (batch_size,) for batch in drawn)
    stream = torch.cat(drawn)
    epochs = stream[: len(stream) // num_examples * num_examples].reshape(-1, num_examples)
    assert len(epochs) >= 4
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(num_examples).expand_as(epochs))
    assert num_examples < 7 or not torch.equal(epochs[0], epochs[1])


def test_a_batch_is_a_function_of_seed_and_update_alone():
    one, other, third = (DataOrder(50, 8, seed) for seed in (1, 1, 2))
    forward = [one.batch(update) for update in range(40)]
    backward = [other.batch(update) for update in reversed(range(40))][::-1]
    assert all(map(torch.equal, forward, backward))
    assert not all(torch.equal(batch, third.batch(update)) for update, batch in enumerate(forward))


def test_the_workers_shares_of_a_batch_are_the_batch():
    order = DataOrder(50, 8, seed=1)
    shares = [order.batches(5, part) for part in (slice(0, 3), slice(3, 8))]
    for update in range(5, 20):
        assert torch.equal(torch.cat([next(share) for share in shares]), order.batch(update))


def test_streams_of_randomness_differ_wherever_a_counter_does():
    seeds = [
        seed_of(seed, stream, update)
        for seed, stream, update in itertools.product(range(4), range(3), range(50))
    ]
    assert len(set(seeds)) == len(seeds)
    draws = [
        torch.randn(4, generator=noise_generator(1, update, torch.device("cpu"))) for update in (3, 4, 3)
    ]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_each_worker_drops_other_values():
    draws = []
    for rank in (0, 1, 0):
        seed_dropout(1, 7, rank)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
