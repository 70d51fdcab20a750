"""Data-parallel training in several processes, over gloo."""

import os
import socket
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.sharing import ALONE
from diffusion.networks.build import build_network
from diffusion.process import generate
from diffusion.training.distributed import DistributedContext, Interrupted
from diffusion.training.loop import Request, Training, TrainingDiverged, TrainingStopped
from tests.diffusion.conftest import make_gaussian_dataset, make_small_config

CPU = torch.device("cpu")


def test_shards_cover_all_items_and_differ_by_one_at_most():
    for count in range(1, 30):
        for world_size in range(1, count + 1):
            shards = [
                list(range(count))[DistributedContext(rank, world_size, CPU).shard(count)]
                for rank in range(world_size)
            ]
            assert sum(shards, []) == list(range(count))
            sizes = {len(shard) for shard in shards}
            assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_one_worker_needs_no_group():
    distributed = DistributedContext.from_process_group(CPU)
    assert distributed.is_main and distributed.shard(7) == slice(0, 7)
    assert distributed.all_reduce_sum(1.5) == 1.5 and distributed.all_reduce_max(3) == 3
    assert distributed.all_gather(torch.tensor([3.0, 4.0]), 2).tolist() == [3.0, 4.0]


def _worker(rank, world_size, port, jobs, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=300))
    while (work := jobs.get()) is not None:
        results.put((rank, work(rank)))
    os._exit(0)  # gloo's threads may abort a process that exits normally


@pytest.fixture(scope="module")
def run_workers():
    """Function from `work` to the results of `work(rank)` in two processes of one group, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Its server imports this module once for both; the tests' own process has threads, so it is not forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    jobs, results = [context.Queue(), context.Queue()], context.Queue()
    processes = [
        context.Process(target=_worker, args=(rank, 2, port, queue, results), daemon=True)
        for rank, queue in enumerate(jobs)
    ]
    for process in processes:
        process.start()

    def run(work):
        for queue in jobs:
            queue.put(work)
        by_rank = dict(results.get(timeout=600) for _ in processes)
        return [by_rank[0], by_rank[1]]

    yield run
    for queue in jobs:
        queue.put(None)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


def _gather(rank):
    distributed = DistributedContext.from_process_group(CPU)
    wholes = [torch.arange(1, 8), torch.arange(7) / 3.0, torch.arange(7).double() / 3.0, torch.ones(1)]
    gathered = [distributed.all_gather(whole[distributed.shard(len(whole))], len(whole)) for whole in wholes]
    with_nan = distributed.all_gather(torch.tensor([1.0, float("nan")][rank : rank + 1]), 2)
    equal = [torch.equal(each, whole) for each, whole in zip(gathered, wholes, strict=True)]
    same_types = [each.dtype for each in gathered] == [each.dtype for each in wholes]
    return equal, same_types, with_nan.isnan().tolist()


def test_gathered_shards_are_the_whole_in_order_on_every_worker(run_workers):
    """Also if one worker's shard is empty; NaN keeps its position."""
    assert run_workers(_gather) == [([True] * 4, True, [False, True])] * 2


def _map(rank):
    distributed = DistributedContext.from_process_group(CPU)

    def interrupt_on_the_second(item):
        if rank == 1:
            raise Interrupted
        return item

    interrupted = []
    for count in (1, 5):
        try:
            distributed.map(interrupt_on_the_second, range(count))
        except Interrupted:
            interrupted.append(count)
    squares = [distributed.map(lambda item: (rank, item**2), range(count)) for count in (0, 1, 5)]
    return interrupted, squares, distributed.broadcast({"rank": rank})


def test_items_are_shared_out_in_order_and_an_interrupt_is_that_of_all(run_workers):
    first, second = run_workers(_map)
    assert first == second
    interrupted, squares, broadcast = first
    assert [[square for _, square in each] for each in squares] == [[], [0], [0, 1, 4, 9, 16]]
    assert {rank for rank, _ in squares[-1]} == {0, 1}, "both have computed some"
    assert interrupted == [1, 5] and broadcast == {"rank": 0}


def _measure(rank, workers=None):
    """Everything that an evaluation measures of some network, whose batches have ten examples."""
    config = make_small_config(metrics={"num_samples": 45})
    dataset = make_gaussian_dataset(num_train=64, num_val=32)
    torch.manual_seed(0)
    network = build_network(config, dataset.spec.shape).eval().requires_grad_(False)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    evaluator = Evaluator(config, dataset, workers=workers or DistributedContext.from_process_group(CPU))
    whole, generate.MAX_VALUES_PER_CPU_BATCH = generate.MAX_VALUES_PER_CPU_BATCH, 20
    try:
        losses, elbo = evaluator.held_out_losses(network)
        samples = evaluator.samples(network, num_samples=45, seed=0)
        bound = evaluator.discrete_bound(network)
        metrics = evaluator.sample_metrics(network, dataset.val[:], num_samples=45, seed=0)
    finally:
        generate.MAX_VALUES_PER_CPU_BATCH = whole
    return losses, elbo.per_example.tolist(), samples.tolist(), bound, metrics


def _measure_alone(rank):
    return _measure(rank, ALONE)


def test_an_evaluation_does_not_depend_on_the_number_of_workers_that_share_it(run_workers):
    """Bit for bit. Only rank 0 compares the samples with the data."""
    alone, _ = run_workers(_measure_alone)
    first, second = run_workers(_measure)
    assert first[:-1] == second[:-1] == alone[:-1]
    assert second[-1] == {} and list(first[-1]) == list(alone[-1])
    np.testing.assert_array_equal(list(first[-1].values()), list(alone[-1].values()))  # some are NaN


def _config(**training):
    # 15 examples cannot be divided equally, neither between two workers nor into two accumulation steps.
    values = {"num_updates": 24, "batch_size": 15, "accumulation_steps": 2, "learning_rate": 1e-2}
    return make_small_config(training=values | training)


def _train(rank, **values):
    reports = []
    training = Training(_config(**values), make_gaussian_dataset(num_train=64, num_val=32), reports.append)
    training.run()
    live = {name: value.tolist() for name, value in training.train_step.network.state_dict().items()}
    return live, [(result.updates, result.metrics["train/mse"]) for result in reports]


def test_two_workers_have_equal_weights_and_learn_what_one_learns(run_workers):
    (weights, reports), (other_weights, other_reports) = run_workers(_train)
    assert weights == other_weights
    assert other_reports == [], "only rank 0 reports"
    alone, reports_alone = _train(0)
    for name, value in alone.items():
        torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(value), atol=1e-4, rtol=1e-3)
    assert [update for update, _ in reports] == [update for update, _ in reports_alone]
    for (_, mse), (_, mse_alone) in zip(reports, reports_alone, strict=True):
        assert mse == pytest.approx(mse_alone, rel=1e-4)


def _train_by_importance(rank):
    # 24 updates of 15 examples fill the loss history of ten timesteps.
    return _train(rank, timestep_sampling="importance", weighting="min_snr", loss="huber")


def test_two_workers_share_the_losses_for_importance_sampling(run_workers):
    (weights, reports), (other_weights, _) = run_workers(_train_by_importance)
    assert weights == other_weights
    alone, reports_alone = _train_by_importance(0)
    uniform, _ = _train(0, weighting="min_snr", loss="huber")
    for name, value in alone.items():
        torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(value), atol=1e-4, rtol=1e-3)
    assert alone["outward.weight"] != uniform["outward.weight"]
    for (_, mse), (_, mse_alone) in zip(reports, reports_alone, strict=True):
        assert mse == pytest.approx(mse_alone, rel=1e-4)


def _stop_on_rank_1(rank):
    saved = []
    training = Training(
        _config(num_updates=200, num_evaluations=1),
        make_gaussian_dataset(num_train=64, num_val=32),
        lambda result: None,
        save=lambda model, state: saved.append(state.update),
        request=lambda: Request.STOP if rank == 1 and training.updates >= 55 else Request.CONTINUE,
    )
    try:
        training.run()
    except TrainingStopped:
        return training.updates, saved
    return None


def test_all_workers_stop_at_the_same_update_on_the_request_of_one(run_workers):
    assert run_workers(_stop_on_rank_1) == [(60, [60]), (60, [])]


def _diverge(rank):
    config = _config(weight_decay=1e12, warmup_updates=0, max_gradient_norm=1e30, learning_rate=1.0)
    try:
        Training(config, make_gaussian_dataset(num_train=64, num_val=32), lambda result: None).run()
    except TrainingDiverged as error:
        return str(error)
    return None


def test_all_workers_raise_when_the_training_diverges(run_workers):
    first, second = run_workers(_diverge)
    assert first == second and "no longer a finite number" in first
