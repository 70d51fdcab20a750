import itertools

import pytest
import torch

from diffusion.seeding import ShuffledBatchSampler, dropout_seeds, noise_generator, seed_dropout, seed_of


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 3), (10, 10), (5, 12), (7, 1)])
def test_batches_contain_every_example_once_per_epoch_without_a_gap(num_examples, batch_size):
    sampler = ShuffledBatchSampler(num_examples, batch_size, seed=0)
    batches = [sampler.batch(update) for update in range(4 * num_examples)]
    assert all(batch.shape == (batch_size,) for batch in batches)
    stream = torch.cat(batches)
    epochs = stream[: len(stream) // num_examples * num_examples].reshape(-1, num_examples)
    assert len(epochs) >= 4
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(num_examples).expand_as(epochs))
    assert num_examples < 7 or not torch.equal(epochs[0], epochs[1])


def test_a_batch_depends_only_on_seed_and_update():
    first, same_seed, other_seed = (ShuffledBatchSampler(50, 8, seed) for seed in (1, 1, 2))
    forward = [first.batch(update) for update in range(40)]
    backward = [same_seed.batch(update) for update in reversed(range(40))][::-1]
    assert all(map(torch.equal, forward, backward))
    assert not all(torch.equal(batch, other_seed.batch(update)) for update, batch in enumerate(forward))


def test_the_parts_of_all_workers_make_up_the_batch():
    sampler = ShuffledBatchSampler(50, 8, seed=1)
    workers = [sampler.batches(5, part) for part in (slice(0, 3), slice(3, 8))]
    for update in range(5, 20):
        assert torch.equal(torch.cat([next(worker) for worker in workers]), sampler.batch(update))


def test_seeds_differ_if_any_counter_differs():
    seeds = [
        seed_of(seed, stream, update)
        for seed, stream, update in itertools.product(range(4), range(3), range(50))
    ]
    assert len(set(seeds)) == len(seeds)
    draws = [
        torch.randn(4, generator=noise_generator(1, update, torch.device("cpu"))) for update in (3, 4, 3)
    ]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_dropout_differs_between_workers():
    draws = []
    for rank in (0, 1, 0):
        seed_dropout(dropout_seeds(1, 7, rank, 2)[1], torch.device("cpu"))
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
