"""A folder streamed by Ray Data is bit for bit the same as in memory."""

import itertools
import os
import pickle
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray import tune

from diffusion.config import DataConfig
from diffusion.data import dataset as data
from diffusion.data import splits
from diffusion.data.sources import open_source
from diffusion.errors import InputError
from workflows.cli.parsing import parse_train_options
from workflows.data import image_stream
from workflows.data import streamed_dataset as streaming
from workflows.data.load import load_or_stream
from workflows.data.streamed_dataset import StreamedSplit

TINY = 1e-6  # memory limit in GB that every folder here exceeds
COUNT = 300


pytestmark = pytest.mark.usefixtures("ray_here")


def load_dataset(config, notify=print):
    return streaming.stream_folder(open_source(config), notify)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several executions of several blocks each, even for a small folder."""
    monkeypatch.setattr(streaming, "CHUNK_EXAMPLES", 100)
    monkeypatch.setattr(image_stream, "MAX_TASK_IMAGES", 16)


def write_image(path, number, mode="L"):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (14, 12, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    """Images in three classes: the first half grey, the others of several modes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        mode = ("L", "RGB", "RGBA", "LA")[number % 4] if number > COUNT // 2 else "L"
        write_image(root / f"class {number % 3}" / f"{number:03}.png", number, mode)
    return root


@pytest.fixture(scope="module", name="config")
def _config(folder):
    return DataConfig(name=str(folder), conditional=True, memory_limit_gb=TINY)


@pytest.fixture(scope="module", name="in_memory")
def _in_memory(config):
    return data.load_dataset(config)


@pytest.fixture(scope="module", name="streamed")
def _streamed(config):
    dataset = load_dataset(config, notify=lambda line: None)
    assert isinstance(dataset.train, StreamedSplit)
    return dataset


def epochs(count, batch, seed=0):
    """Endless index tensors over consecutive shuffled epochs; a batch may span two epochs."""
    generator = np.random.default_rng(seed)
    queue = np.empty(0, dtype=np.int64)
    while True:
        while len(queue) < batch:
            queue = np.concatenate([queue, generator.permutation(count)])
        yield torch.from_numpy(queue[:batch].copy())
        queue = queue[batch:]


def test_the_data_spec_is_the_same(streamed, in_memory):
    """The spec has the shape, moments, clip interval, log-SNR window, classes and fingerprint."""
    assert streamed.spec == in_memory.spec
    assert streamed.spec.classes == ("class 0", "class 1", "class 2") and streamed.spec.shape == (3, 12, 12)


def test_the_splits_are_the_same(streamed, in_memory):
    for name in ("val", "test"):
        one, other = getattr(streamed, name), getattr(in_memory, name)
        assert torch.equal(one.values, other.values) and torch.equal(one[:], other[:])
        assert torch.equal(one.labels, other.labels)
    assert len(streamed.train) == len(in_memory.train)
    assert torch.equal(streamed.train.labels, in_memory.train.labels)


def test_folders_of_splits_and_equal_images_are_treated_the_same(tmp_path):
    for number in range(90):
        path = tmp_path / ("train", "val", "test")[number % 3] / f"{number:02}.png"
        write_image(path, number if number % 8 else 0)
    said: list[list[str]] = [[], []]
    config = DataConfig(name=str(tmp_path), memory_limit_gb=TINY)
    streamed = load_dataset(config, said[0].append)
    in_memory = data.load_source(open_source(config), said[1].append)
    assert streamed.spec == in_memory.spec and said[0][-1] == said[1][-1]
    assert torch.equal(streamed.test.values, in_memory.test.values) and len(streamed.test) == 26
    assert torch.equal(streamed.train[:], in_memory.train[:])


def test_the_limits_of_large_data_are_the_same(config, monkeypatch):
    """Large data limit the number of held-out examples and of those that the window is fitted to."""
    monkeypatch.setattr(splits, "MAX_HELD_OUT", 20)
    monkeypatch.setattr(data, "MAX_WINDOW_EXAMPLES", 50)
    streamed, in_memory = load_dataset(config, lambda line: None), data.load_dataset(config)
    assert streamed.spec == in_memory.spec
    assert (len(streamed.train), len(streamed.val), len(streamed.test)) == (COUNT - 40, 20, 20)
    assert len(streamed.train.first) == 50
    assert torch.equal(streamed.train[:60], in_memory.train[:60]), "the last ten are read from disk"


def test_batches_are_the_same_over_epochs_and_executions(streamed, in_memory):
    """25 batches of 28 from 210 examples: seven executions, and epochs that end within a batch."""
    count = len(in_memory.train)
    pairs = zip(
        streamed.train.batches(epochs(count, 28)), in_memory.train.batches(epochs(count, 28)), strict=True
    )
    for one, other in itertools.islice(pairs, 25):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_batches_of_any_size_and_repeated_examples_are_the_same(streamed, in_memory):
    sizes = [1, 150, 3, 0, 64, 7, 230, 1]
    generator = torch.Generator().manual_seed(0)
    order = [torch.randint(len(in_memory.train), (size,), generator=generator) for size in sizes]
    batches = list(streamed.train.batches(iter(order)))
    assert [len(batch) for batch in batches] == sizes
    for index, batch in zip(order, batches, strict=True):
        assert torch.equal(batch, in_memory.train[index])


def test_a_slow_image_does_not_change_the_order(tmp_path, monkeypatch):
    """Of two concurrent tasks, the second is done long before the first."""
    monkeypatch.setattr(image_stream, "num_cluster_cpus", lambda: 4)
    slow = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500), dtype=np.uint8))
    slow.save(tmp_path / "00.png")
    for number in range(1, 60):
        write_image(tmp_path / f"{number:02}.png", number)
    config = DataConfig(name=str(tmp_path), image_size=12, memory_limit_gb=TINY)
    train = load_dataset(config, lambda line: None).train
    slow_index = [path.endswith(b"/00.png") for path in train.paths].index(True)
    others = torch.arange(32) % len(train)
    index = torch.cat([torch.full((16,), slow_index), others, torch.full((16,), slow_index), others])
    (batch,) = train.batches(iter([index]))
    assert torch.equal(batch, data.load_dataset(config).train[index])


def test_an_order_resumed_in_the_middle_continues_identically(streamed):
    """Exact resume relies on this: no execution depends on the batches before it."""
    count = len(streamed.train)
    expected = list(itertools.islice(streamed.train.batches(epochs(count, 40)), 12))
    rest = itertools.islice(streamed.train.batches(itertools.islice(epochs(count, 40), 7, None)), 5)
    for one, other in zip(expected[7:], rest, strict=True):
        assert torch.equal(one, other)


def test_no_indices_give_no_batches(streamed):
    assert list(streamed.train.batches(iter([]))) == []


def test_slices_from_the_front_are_the_same_in_memory_or_read_from_disk(streamed, in_memory):
    short = replace(
        streamed.train, first=replace(streamed.train.first, values=streamed.train.first.values[:20])
    )
    for stop in (0, 5, 20, 75, None):
        assert torch.equal(short[:stop], in_memory.train[:stop])
        assert torch.equal(streamed.train[:stop], in_memory.train[:stop])
    for other in (slice(1, 5), slice(0, 10, 2)):
        with pytest.raises(ValueError, match="from the front only"):
            streamed.train[other]


def test_data_that_fit_are_loaded_into_memory_without_ray():
    source = open_source(DataConfig(name="heart", memory_limit_gb=TINY))
    dataset = load_or_stream(source, start_ray=pytest.fail)
    assert isinstance(dataset.train, data.Split)
    assert dataset.spec == data.load_dataset(source.config).spec


def test_the_user_is_notified_that_a_folder_is_streamed_and_why(config):
    lines = []
    load_dataset(config, lines.append)
    assert f"{COUNT} images of 12 x 12" in lines[0] and "--memory-limit-gb" in lines[0]


def test_grey_folders_are_streamed_grey_and_images_in_the_root_have_no_classes(tmp_path):
    for number in range(60):
        write_image(tmp_path / f"{number:02}.png", number)
    config = DataConfig(name=str(tmp_path), image_size=8, memory_limit_gb=TINY)
    streamed, in_memory = load_dataset(config, lambda line: None), data.load_dataset(config)
    assert streamed.spec == in_memory.spec and streamed.spec.shape == (1, 8, 8)
    assert streamed.spec.classes is None and streamed.train.labels is None
    order = [torch.arange(42).flip(0)]
    (batch,) = streamed.train.batches(iter(order))
    assert torch.equal(batch, in_memory.train[order[0]])


@pytest.fixture(name="bad_images")
def _bad_images(tmp_path):
    for number in range(60):
        write_image(tmp_path / f"class {number % 2}" / f"{number:02}.png", number, "RGB")
    for name in ("class 1/05b.png", "class 0/02b.png"):
        (tmp_path / name).write_bytes(b"not an image")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "z.png").write_bytes(b"")
    return DataConfig(name=str(tmp_path), memory_limit_gb=TINY)


def test_the_first_of_the_bad_images_is_named_as_in_memory(bad_images):
    with pytest.raises(InputError) as in_memory:
        data.load_dataset(bad_images)
    with pytest.raises(InputError) as streamed:
        load_dataset(bad_images, lambda line: None)
    message = str(streamed.value)
    assert message == f"{in_memory.value} (2 more cannot be read either)"
    assert "alone/z.png" in message and "\n" not in message


def test_bad_images_can_be_left_out_as_in_memory(bad_images):
    config = replace(bad_images, skip_bad_images=True)
    streamed, in_memory = load_dataset(config, lambda line: None), data.load_dataset(config)
    assert streamed.spec == in_memory.spec
    assert torch.equal(streamed.train[:], in_memory.train[:])


def test_too_few_images_are_reported(tmp_path):
    config = DataConfig(name=str(tmp_path), memory_limit_gb=1e-9, skip_bad_images=True)
    for number in range(9):
        write_image(tmp_path / f"{number}.png", number)
    with pytest.raises(InputError, match="9 examples: too few"):
        load_dataset(config, lambda line: None)


@pytest.mark.parametrize("change", ["gone", "broken", "another"])
def test_a_file_that_changes_during_training_is_named(tmp_path, change):
    for number in range(60):
        write_image(tmp_path / f"{number:02}.png", number)
    train = load_dataset(DataConfig(name=str(tmp_path), memory_limit_gb=TINY), lambda line: None).train
    victim = tmp_path / train.paths[30].decode().rsplit("/", 1)[1]
    if change == "gone":
        victim.unlink()
    elif change == "broken":
        victim.write_bytes(victim.read_bytes()[:50])
    else:
        write_image(victim, 1000)
    batches = train.batches(torch.arange(start, start + 5) for start in (0, 5, 10, 30, 35))
    assert len(next(batches)) == 5
    with pytest.raises(InputError) as caught:
        list(batches)
    assert str(victim) in str(caught.value) and "put the file back" in str(caught.value)
    assert "\n" not in str(caught.value)


def decoding_threads():
    names = ("decoding", "StreamingExecutor", "iter_threaded")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def test_a_generator_that_is_closed_leaves_nothing_running(streamed):
    batches = streamed.train.batches(epochs(len(streamed.train), 8))
    for _ in range(20):
        next(batches)
    assert decoding_threads()
    batches.close()
    for thread in decoding_threads():
        thread.join(timeout=120.0)
    assert not decoding_threads()


def test_decoding_ahead_is_bounded(streamed):
    """At most the current and the next chunk of an endless order are requested."""
    requested = []

    def order():
        for index in epochs(len(streamed.train), 10):
            requested.append(len(index))
            yield index

    batches = streamed.train.batches(order())
    next(batches)
    assert sum(requested) == 100
    for _ in range(6):
        next(batches)
    assert sum(requested) == 200
    batches.close()


def test_streamed_data_can_be_pickled(streamed, in_memory):
    unpickled = pickle.loads(pickle.dumps(streamed))
    assert unpickled.spec == streamed.spec and len(unpickled.train) == len(streamed.train)
    index = torch.tensor([3, 1, 4, 1, 5])
    (batch,) = unpickled.train.batches(iter([index]))
    assert torch.equal(batch, in_memory.train[index])


def test_batches_are_on_the_requested_device(streamed):
    moved = streamed.to("meta").train
    (batch,) = moved.batches(iter([torch.tensor([1, 2])]))
    assert moved.device.type == batch.device.type == moved.labels.device.type == "meta"
    assert streamed.train.device.type == "cpu"


def streaming_trial(values, dataset, folder):
    """Function of a trial that holds a CPU core, and streams while the other trial holds another."""
    (folder / str(values["seed"])).touch()
    while len(list(folder.iterdir())) < ray.cluster_resources()["CPU"]:
        time.sleep(0.05)
    order = epochs(len(dataset.train), 30, seed=values["seed"])
    batches = itertools.islice(dataset.train.batches(order), 12)
    tune.report({"total": float(sum(batch.double().sum() for batch in batches))})


@pytest.mark.slow
def test_trials_that_hold_all_cpus_still_get_batches(streamed, in_memory, tmp_path):
    """Decoding reserves no CPU: otherwise it would wait for the trials that wait for it."""
    (tmp_path / "started").mkdir()
    parameters = {"dataset": streamed, "folder": tmp_path / "started"}
    trainable = tune.with_resources(tune.with_parameters(streaming_trial, **parameters), {"cpu": 1})
    tuner = tune.Tuner(
        trainable,
        param_space={"seed": tune.grid_search(list(range(int(ray.cluster_resources()["CPU"]))))},
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    for result in tuner.fit():
        order = epochs(len(in_memory.train), 30, seed=result.config["seed"])
        batches = itertools.islice(in_memory.train.batches(order), 12)
        assert result.metrics["total"] == float(sum(batch.double().sum() for batch in batches))


def test_streaming_prints_nothing(streamed, capfd):
    """Ray Data shows neither progress bars nor messages about executions."""
    list(itertools.islice(streamed.train.batches(epochs(len(streamed.train), 50)), 6))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("streams", [False, True])
def test_a_folder_is_listed_once_from_the_command_line_to_the_dataset(tmp_path, monkeypatch, streams):
    for number in range(60):
        write_image(tmp_path / f"{number % 2}" / f"{number}.png", number)
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    limit = ["--memory-limit-gb", str(TINY)] if streams else []
    command_line = parse_train_options(["--data", str(tmp_path), "--metrics.features", "random", *limit])
    assert str(tmp_path) not in listed, "parsing reads no data"
    source, options = command_line.open_data()
    dataset = load_or_stream(source, start_ray=lambda: None)
    assert options.config().network.kind == "unet"
    assert isinstance(dataset.train, StreamedSplit) == streams
    own = [path for path in listed if path.startswith(str(tmp_path))]
    assert sorted(own) == [str(tmp_path), str(tmp_path / "0"), str(tmp_path / "1")]
