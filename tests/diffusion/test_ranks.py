"""Real processes that train together over gloo."""

import os
import socket
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing

from diffusion.ranks import Ranks
from diffusion.training import Diverged, Request, Stopped, Training
from tests.diffusion.conftest import make_gaussian_dataset, make_small_config

CPU = torch.device("cpu")


def test_shares_leave_nothing_out_and_differ_by_one_at_most():
    for count in range(1, 30):
        for world_size in range(1, count + 1):
            shares = [
                list(range(count))[Ranks(rank, world_size, CPU).share(count)] for rank in range(world_size)
            ]
            assert sum(shares, []) == list(range(count))
            sizes = {len(share) for share in shares}
            assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_one_worker_needs_no_group():
    ranks = Ranks.of(CPU)
    assert ranks.leads and ranks.share(7) == slice(0, 7)
    assert ranks.total(1.5) == 1.5 and ranks.highest(3) == 3
    assert ranks.gathered(torch.tensor([3.0, 4.0]), 2).tolist() == [3.0, 4.0]


def _join(rank, world_size, port, work, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    results.put((rank, work(rank)))
    distributed.barrier()  # one that leaves while the other still talks to it aborts
    os._exit(0)  # gloo's threads may abort a process that takes its leave in order


def together(work, world_size=2):
    """What `work(rank)` returns in each of so many processes, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_join, args=(rank, world_size, port, work, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * world_size
    found = dict(results.get() for _ in processes)
    return [found[rank] for rank in range(world_size)]


def _gather(rank):
    ranks = Ranks.of(CPU)
    wholes = [torch.arange(1, 8), torch.arange(7) / 3.0, torch.arange(7).double() / 3.0, torch.ones(1)]
    found = [ranks.gathered(whole[ranks.share(len(whole))], len(whole)) for whole in wholes]
    lost = ranks.gathered(torch.tensor([1.0, float("nan")][rank : rank + 1]), 2)
    same = [torch.equal(each, whole) for each, whole in zip(found, wholes, strict=True)]
    return same, [each.dtype for each in found] == [each.dtype for each in wholes], lost.isnan().tolist()


def test_shares_that_are_gathered_are_the_whole_in_order_on_every_worker():
    """Also where one worker's share is empty; what is not a number stays in its place."""
    assert together(_gather) == [([True] * 4, True, [False, True])] * 2


def _config(**training):
    # 15 examples do not divide by two, and two steps do not divide a share of 7 or 8.
    values = {"num_updates": 24, "batch_size": 15, "accumulation_steps": 2, "learning_rate": 1e-2}
    return make_small_config(training=values | training)


def _train(rank, **values):
    reports = []
    training = Training(_config(**values), make_gaussian_dataset(num_train=64, num_val=32), reports.append)
    training.run()
    live = {name: value.tolist() for name, value in training._learner.network.state_dict().items()}
    return live, [(progress.updates, progress.metrics["train/mse"]) for progress in reports]


def test_two_workers_hold_the_same_weights_and_learn_what_one_learns():
    (weights, reports), (other_weights, other_reports) = together(_train)
    assert weights == other_weights
    assert other_reports == [], "the leading worker alone reports"
    alone, reports_alone = _train(0)
    for name, value in alone.items():
        torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(value), atol=1e-4, rtol=1e-3)
    assert [update for update, _ in reports] == [update for update, _ in reports_alone]
    for (_, mse), (_, mse_alone) in zip(reports, reports_alone, strict=True):
        assert mse == pytest.approx(mse_alone, rel=1e-4)


def _train_by_importance(rank):
    # 24 updates of 15 examples fill the history of ten timesteps.
    return _train(rank, timestep_sampling="importance", weighting="min_snr", loss="huber")


def test_two_workers_share_the_losses_that_importance_is_made_of():
    (weights, reports), (other_weights, _) = together(_train_by_importance)
    assert weights == other_weights
    alone, reports_alone = _train_by_importance(0)
    uniform, _ = _train(0, weighting="min_snr", loss="huber")
    for name, value in alone.items():
        torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(value), atol=1e-4, rtol=1e-3)
    assert alone["outward.weight"] != uniform["outward.weight"]
    for (_, mse), (_, mse_alone) in zip(reports, reports_alone, strict=True):
        assert mse == pytest.approx(mse_alone, rel=1e-4)


def _stop_on_the_second(rank):
    saved = []
    training = Training(
        _config(num_updates=200, num_evaluations=1),
        make_gaussian_dataset(num_train=64, num_val=32),
        lambda progress: None,
        save=lambda model, state: saved.append(state.update),
        request=lambda: Request.STOP if rank == 1 and training.updates >= 55 else Request.GO_ON,
    )
    try:
        training.run()
    except Stopped:
        return training.updates, saved
    return None


def test_all_stop_at_the_same_update_when_one_is_asked_to():
    assert together(_stop_on_the_second) == [(60, [60]), (60, [])]


def _diverge(rank):
    config = _config(weight_decay=1e12, warmup_updates=0, max_gradient_norm=1e30, learning_rate=1.0)
    try:
        Training(config, make_gaussian_dataset(num_train=64, num_val=32), lambda progress: None).run()
    except Diverged as error:
        return str(error)
    return None


def test_all_give_up_when_the_training_diverges():
    first, second = together(_diverge)
    assert first == second and "no longer a finite number" in first
