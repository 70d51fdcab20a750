"""Whatever happens while checkpoints are written, the newest good one and the best can be loaded."""

import errno
import math
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import files as files_module
from diffusion import manifest as manifest_module
from diffusion.checkpoints import TrainedModel, TrainingState, read_checkpoint, write_checkpoint
from diffusion.config import Config, NetworkConfig
from diffusion.data import DataSpec
from diffusion.errors import InputError
from diffusion.manifest import MANIFEST, Damaged, read_manifest, write_manifest
from diffusion.networks import build_network
from workflows import folder as folder_module
from workflows.bucket import Bucket
from workflows.checkpoint_store import CheckpointNotWritten, CheckpointStore
from workflows.storage import Storage

ROOT = Path(__file__).parents[2]


@pytest.fixture(name="storage", params=["local", "s3"])
def _storage(request, tmp_path):
    if request.param == "local":
        return Storage(str(tmp_path / "checkpoints"))
    return Storage(f"s3://{request.getfixturevalue('s3')}/checkpoints")


@pytest.fixture(name="local")
def _local(tmp_path):
    return Storage(str(tmp_path / "checkpoints"))


def writer(text, size=0):
    def write(folder):
        (folder / "a.txt").write_text(str(text))
        (folder / "b.bin").write_bytes(bytes(size))

    return write


def never(line):
    raise AssertionError(line)


def newest(store, tmp_path, say=never):
    """The number and the text of what is loaded, None if nothing is."""
    found = store.load_newest(tmp_path / "loaded", say)
    return found and (int(found.name), (found / "a.txt").read_text())


def test_nothing_was_saved(storage, tmp_path):
    store = CheckpointStore(storage, keep=2)
    assert store.updates() == [] and store.best() is None and newest(store, tmp_path) is None


def test_the_newest_is_loaded_whole(storage, tmp_path):
    store = CheckpointStore(storage, keep=2)
    for update in (5, 10, 1_000_000_000, 20):
        store.save(writer(f"text {update}"), update, None)
    found = store.load_newest(tmp_path / "loaded", never)
    assert found == tmp_path / "loaded" / "1000000000"
    assert read_manifest(found) == {"update": 1_000_000_000, "objective": None}
    assert (found / "a.txt").read_text() == "text 1000000000"


def test_names_sort_like_numbers(local):
    CheckpointStore(local, keep=1).save(writer("x"), 42, None)
    assert local.names() == ["000000042"]


def test_the_newest_stay_and_the_best(storage):
    store = CheckpointStore(storage, keep=2)
    objectives = {1: 0.9, 2: 0.3, 3: 0.5, 4: None, 5: math.nan, 6: 0.4, 7: -math.inf}
    left = []
    for update, objective in objectives.items():
        store.save(writer(update), update, objective)
        left.append(store.updates())
    assert left == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]
    assert store.best() == "000000002"


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.none() | st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=12),
)
def test_whatever_the_objectives_the_best_and_the_newest_stay(tmp_path_factory, keep, objectives):
    storage = Storage(str(tmp_path_factory.mktemp("checkpoints")))
    store = CheckpointStore(storage, keep)
    for update, objective in enumerate(objectives):
        store.save(lambda _: None, update, objective)
    known = {n: o for n, o in enumerate(objectives) if o is not None and math.isfinite(o)}
    best = min(known, key=lambda update: (known[update], update)) if known else None
    everything = list(range(len(objectives)))
    assert store.updates() == sorted({*everything[-keep:], *([] if best is None else [best])})
    assert store.best() == (None if best is None else f"{best:09d}")


def test_the_best_can_be_loaded_by_its_name(storage, tmp_path):
    store = CheckpointStore(storage, keep=1)
    for update, objective in ((1, 0.5), (2, 0.75), (3, 0.625)):
        store.save(writer(update), update, objective)
    found = store.load(store.best(), tmp_path / "best")
    assert (found / "a.txt").read_text() == "1" and read_manifest(found)["objective"] == 0.5
    with pytest.raises(FileNotFoundError):
        store.load("000000002", tmp_path / "best")


def test_what_the_writer_says_of_itself_stays_in_the_manifest(storage, tmp_path):
    def write(folder):
        writer("x")(folder)
        write_manifest(folder, {"update": 3, "objective": None, "data_fingerprint": "abc"})

    store = CheckpointStore(storage, keep=1)
    store.save(write, 3, 0.5)
    facts = read_manifest(store.load_newest(tmp_path / "loaded", never))
    assert facts == {"update": 3, "objective": 0.5, "data_fingerprint": "abc"}


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(local, keep):
    with pytest.raises(InputError, match=f"{keep} checkpoints"):
        CheckpointStore(local, keep)


def test_a_pickled_store_goes_on(storage, tmp_path):
    store = CheckpointStore(storage, keep=1)
    store.save(writer("here"), 1, 0.5)
    again = pickle.loads(pickle.dumps(store))
    assert newest(again, tmp_path) == (1, "here")
    again.save(writer("there"), 2, 0.75)
    assert store.updates() == [1, 2] and store.best() == "000000001"


def test_an_update_saved_again_takes_the_place_of_the_first(storage, tmp_path):
    store = CheckpointStore(storage, keep=1)
    store.save(writer("before its evaluation"), 5, None)
    store.save(writer("after it"), 5, 0.5)
    assert newest(store, tmp_path) == (5, "after it")
    assert store.best() == "000000005" and store.updates() == [5]


# ---- damage


def damage(storage, name, file, how):
    """Change one stored file of a checkpoint."""
    if storage.is_local:
        path = storage.path / name / file
    else:
        # The folder of the files of a bucket is named after the manifest's digest.
        (inner,) = [each for each in storage.child(name).names() if each != MANIFEST]
        path = file if file == MANIFEST else f"{inner}/{file}"
    if how == "delete":
        path.unlink() if storage.is_local else storage.child(name).delete(path)
        return
    content = bytearray(path.read_bytes() if storage.is_local else storage.child(name).read_bytes(path))
    if how == "truncate":
        del content[-1:]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content) if storage.is_local else storage.child(name)._place.write(path, bytes(content))


@pytest.mark.parametrize("file", ["a.txt", "b.bin", MANIFEST])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(storage, tmp_path, file, how):
    store = CheckpointStore(storage, keep=3)
    for update in (1, 2, 3):
        store.save(writer(update, size=50), update, 1.0 / update)
    damage(storage, "000000003", file, how)
    said = []
    assert newest(store, tmp_path, said.append) == (2, "2")
    (line,) = said
    assert f"{storage}/000000003" in line and file in line and "\n" not in line
    assert str(tmp_path / "loaded") not in line, "the copy is of no use to the reader"
    assert storage.exists("000000003"), "it stays where it is"
    assert not (tmp_path / "loaded" / "000000003").exists()
    assert store.best() == "000000002", "a damaged one is no longer the best"
    with pytest.raises(Damaged):
        store.load("000000003", tmp_path / "loaded")


def test_all_damaged_are_named_newest_first(local, tmp_path):
    store = CheckpointStore(local, keep=3)
    for update in (1, 2, 3):
        store.save(writer(update), update, None)
        damage(local, f"{update:09d}", "a.txt", "flip")
    said = []
    assert newest(store, tmp_path, said.append) is None
    assert [name in line for name, line in zip(("03", "02", "01"), said, strict=True)] == [True] * 3


def test_a_training_that_went_back_keeps_what_it_writes_anew(storage, tmp_path):
    store = CheckpointStore(storage, keep=2)
    for update in (10, 20, 30):
        store.save(writer(update), update, None)
    damage(storage, "000000030", "a.txt", "flip")
    said = []
    assert newest(store, tmp_path, said.append) == (20, "20")
    store.save(writer("again"), 25, None)  # the damaged one is newer and yet makes it no room to lose
    assert newest(CheckpointStore(storage, 2), tmp_path, said.append) == (25, "again")
    assert store.updates() == [20, 25, 30]
    store.save(writer("mended"), 30, None)
    assert newest(CheckpointStore(storage, 2), tmp_path) == (30, "mended")
    assert store.updates() == [25, 30]


def test_a_damaged_one_takes_no_good_ones_place(local, tmp_path):
    store = CheckpointStore(local, keep=2)
    for update in (10, 20):
        store.save(writer(update), update, None)
    damage(local, "000000020", "a.txt", "flip")
    newest(store, tmp_path, lambda line: None)
    store.save(writer(30), 30, None)
    assert store.updates() == [10, 30], "of the two newest, 20 would be of no use"


# ---- full disks and servers that are away


def model_and_state():
    config = Config(
        network=NetworkConfig(hidden_size=32, num_blocks=1, time_embedding_size=8, data_embedding_size=4)
    )
    spec = DataSpec(
        name="gaussian",
        kind="points",
        shape=(2,),
        mean=[0.0] * 2,
        std=[1.0] * 2,
        range=None,
        columns=("x", "y"),
        clip=(-6.0, 6.0),
        log_snr_window=(-8.0, 5.0),
        fingerprint="0" * 64,
    )
    network = build_network(config, (2,))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    network(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = TrainingState(
        update=0,
        network=dict(network.state_dict()),
        optimizer=optimizer.state_dict(),
        scaler=None,
        ema_updates=0,
        random={"order": torch.get_rng_state()},
        history=[],
        loss_sum=0.0,
        losses=0,
    )
    return TrainedModel(config, spec, network.eval()), state


def assert_not_written(store, write, update, *words):
    with pytest.raises(CheckpointNotWritten) as caught:
        store.save(write, update, None)
    message = str(caught.value)
    assert "\n" not in message and f"update {update}" in message
    assert all(word in message for word in words), message


@pytest.fixture(name="disk")
def _disk(tmp_path):
    """A disk of its own, of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk takes root; a file size limit stands in for it elsewhere")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_named_and_loses_nothing(disk, tmp_path):
    """A real checkpoint meets the end of the disk at many different bytes."""
    store = CheckpointStore(Storage(str(disk / "checkpoints")), keep=1)
    model, state = model_and_state()

    def write(folder):
        write_checkpoint(folder, model, state, {})

    store.save(write, 1, 0.5)
    files = sorted((disk / "checkpoints").rglob("*"))
    size = sum(path.stat().st_size for path in (disk / "checkpoints" / "000000001").iterdir())
    page = os.sysconf("SC_PAGESIZE")
    assert 10 * page < size < 100_000
    reached = set()
    for room in range(0, size, page):
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free - room))
        try:

            def spy(folder):
                try:
                    write(folder)
                finally:
                    reached.add(len(list(folder.iterdir())))

            assert_not_written(store, spy, 2, str(disk), "No space left on device", "free")
        finally:
            (disk / "filler").unlink()
        assert sorted((disk / "checkpoints").rglob("*")) == files, "no half-written folder"
    assert {0, 1, 2, 3} <= reached, "it was full at different files"
    read_checkpoint(store.load_newest(tmp_path / "loaded", never))
    store.save(write, 2, 0.25)
    assert store.updates() == [2]


@contextmanager
def largest_file(num_bytes):
    """As a full disk, where none can be mounted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_size_limit_is_named_and_loses_nothing(local, tmp_path):
    store = CheckpointStore(local, keep=1)
    model, state = model_and_state()
    store.save(lambda folder: write_checkpoint(folder, model, state, {}), 1, None)
    files = sorted(local.path.rglob("*"))
    for limit in (0, 1000, 9000, 20_000):
        with largest_file(limit):
            assert_not_written(
                store,
                lambda folder: write_checkpoint(folder, model, state, {}),
                2,
                str(local),
                "File too large",
            )
        assert sorted(local.path.rglob("*")) == files
    read_checkpoint(store.load_newest(tmp_path / "loaded", never))


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_disk_that_fails_at_the_last_moment_loses_nothing(local, tmp_path, monkeypatch, call):
    store = CheckpointStore(local, keep=1)
    store.save(writer("good"), 1, None)

    def fail(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, call, fail)
        assert_not_written(store, writer("bad"), 2, "quota exceeded")
    assert newest(store, tmp_path) == (1, "good")
    assert [path.name for path in local.path.iterdir()] == ["000000001"]


def test_a_writer_that_fails_otherwise_leaves_nothing(storage, tmp_path):
    store = CheckpointStore(storage, keep=1)
    store.save(writer("good"), 1, None)

    def write(folder):
        writer("bad")(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.save(write, 2, None)
    assert newest(store, tmp_path) == (1, "good") and storage.names() == ["000000001"]


def test_a_checkpoint_that_stands_is_no_failure_because_others_cannot_be_pruned(local, monkeypatch):
    store = CheckpointStore(local, keep=1)
    store.save(writer(1), 1, None)

    def fail(*_):
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", fail)
        store.save(writer(2), 2, None)
    assert store.updates() == [1, 2]
    store.save(writer(3), 3, None)
    assert store.updates() == [3]


@pytest.mark.parametrize("after", range(4))
def test_a_server_that_goes_away_while_a_checkpoint_is_uploaded_loses_nothing(
    s3, tmp_path, monkeypatch, after
):
    storage = Storage(f"s3://{s3}/checkpoints")
    store = CheckpointStore(storage, keep=1)
    store.save(writer("good"), 1, 0.5)
    real, calls = Bucket._key, []

    def fail(self, name):
        if name.startswith("000000002"):
            calls.append(name)
            if len(calls) > after:
                raise OSError("AWS Error NETWORK_CONNECTION: gone")
        return real(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "_key", fail)
        assert_not_written(store, writer("bad"), 2, f"s3://{s3}/checkpoints", "NETWORK_CONNECTION")
    assert store.updates() == [1]
    said = []
    assert newest(store, tmp_path, said.append) == (1, "good")
    assert all("000000002" in line for line in said)
    store.save(writer("now"), 2, 0.25)
    assert newest(CheckpointStore(storage, 1), tmp_path) == (2, "now")


def test_a_server_that_is_away_when_a_checkpoint_is_to_be_loaded_is_an_error(s3, tmp_path, monkeypatch):
    store = CheckpointStore(Storage(f"s3://{s3}/checkpoints"), keep=1)
    store.save(writer("good"), 1, None)

    def fail(*_):
        raise OSError("AWS Error NETWORK_CONNECTION: gone")

    for call in ("names", "fetch_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, call, fail)
            # An older one in its place, or a new start, would throw work away.
            with pytest.raises(InputError, match=f"s3://{s3}/checkpoints.*NETWORK_CONNECTION"):
                newest(store, tmp_path)


def test_the_disk_holds_every_file_before_the_checkpoint_has_its_name(local, monkeypatch):
    done, real_sync, real_rename = [], files_module.sync, os.rename

    def sync(path):
        done.append(path.name)
        real_sync(path)

    def rename(source, target):
        done.append(f"renamed to {target.name}")
        real_rename(source, target)

    for module in (files_module, manifest_module, folder_module):
        monkeypatch.setattr(module, "sync", sync)
    monkeypatch.setattr(folder_module.os, "rename", rename)
    CheckpointStore(local, keep=1).save(writer("x"), 1, None)
    before, after = done[: done.index("renamed to 000000001")], done[done.index("renamed to 000000001") :]
    assert {"a.txt", "b.bin"} <= set(before) and any(name.endswith(f"-{MANIFEST}") for name in before)
    assert before[-1].endswith("-000000001"), "the folder's own names"
    assert "checkpoints" in after


# ---- other processes

PROGRAM = """
import os, sys
from workflows.checkpoint_store import CheckpointStore
from workflows.storage import Storage

store, step = CheckpointStore(Storage(sys.argv[1]), keep=int(sys.argv[2])), int(sys.argv[3])
update = max(store.updates(), default=1)
print("ready", flush=True)
while True:
    update += step
    def write(folder):
        for name in ("a.txt", "b.bin", "c.bin"):
            (folder / name).write_bytes(os.urandom(50_000))
    store.save(write, update, 1.0 / update)
    print(update, flush=True)
"""


@pytest.mark.parametrize(("keep", "step"), [(1, 1), (3, 1), (1, 0)])
def test_a_writer_killed_at_any_moment_leaves_its_newest_checkpoint_whole(local, tmp_path, keep, step):
    """With step 0 it replaces its only checkpoint again and again."""
    store, rng, done = CheckpointStore(local, keep), random.Random(keep + step), 0
    store.save(lambda folder: (folder / "a.txt").write_text("x"), 1, None)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(local), str(keep), str(step)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.0, 0.15))
        finally:
            process.kill()
        told = process.communicate()[0].split()
        done = max([done, *map(int, told)])
        found = store.load_newest(tmp_path / "loaded", never)
        assert int(found.name) >= done, "what was reported as saved is there"
    assert done > (3 if step else 0), "it was killed while it was writing"
    # What the killed ones left is removed once it is old.
    old = time.time() - 3600
    for path in local.path.rglob("*"):
        os.utime(path, (old, old))
    store.save(writer("last"), done + 100, None)
    assert not [path for path in local.path.iterdir() if path.name.startswith(".")]
    assert len(store.updates()) <= keep + 1


def test_two_processes_that_save_the_same_updates_corrupt_nothing(storage, tmp_path):
    """The old one lingers, a few updates behind, with other bytes under the same names."""
    rounds = 25 if storage.is_local else 6

    def run(offset):
        store = CheckpointStore(storage, keep=2)
        for update in range(1, rounds):
            store.save(writer(f"{offset} {update}" * 100, size=10_000), max(1, update - offset), None)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (0, 1)))
    store = CheckpointStore(storage, keep=2)
    assert newest(store, tmp_path)[0] == rounds - 1
    for update in store.updates():
        store.load(f"{update:09d}", tmp_path / "loaded")
    assert len(storage.names()) <= 4 and storage.names() == [f"{update:09d}" for update in store.updates()]


def test_a_checkpoint_replaced_while_it_is_read_is_read_again(local, tmp_path, monkeypatch):
    store = CheckpointStore(local, keep=1)
    store.save(writer("first"), 1, None)
    real = os.link

    def slow(source, target):
        real(source, target)
        monkeypatch.setattr(folder_module.os, "link", real)
        store.save(writer("second"), 1, None)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, "link", slow)
        assert newest(store, tmp_path) == (1, "second")


def test_a_checkpoint_pruned_while_it_is_read_is_passed_over_in_silence(local, tmp_path, monkeypatch):
    store = CheckpointStore(local, keep=1)
    store.save(writer("first"), 1, None)
    real = Storage.fetch_folder

    def pruned(self, name, into):
        self.delete(name)
        real(self, name, into)

    monkeypatch.setattr(Storage, "fetch_folder", pruned)
    assert newest(store, tmp_path) is None
