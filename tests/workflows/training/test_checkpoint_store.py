"""Whatever happens while checkpoints are written, the newest undamaged one and the best can be loaded."""

import errno
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import files as files_module
from diffusion import manifest as manifest_module
from diffusion.config import Config, NetworkConfig
from diffusion.data.dataset import DataSpec
from diffusion.errors import InputError
from diffusion.manifest import MANIFEST, DamagedError, read_manifest, write_manifest
from diffusion.networks.build import build_network
from diffusion.training.checkpoints import TrainedModel, TrainingState, read_checkpoint, write_checkpoint
from workflows.storage import local as local_module
from workflows.storage.bucket import Bucket
from workflows.storage.storage import Storage
from workflows.training.checkpoint_store import CheckpointStore, CheckpointWriteError

ROOT = Path(__file__).parents[3]


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


def newest(store, tmp_path, notify=never):
    """Update and text of the newest checkpoint that can be loaded, None if there is none."""
    folder = store.load_newest(tmp_path / "loaded", notify)
    return folder and (int(folder.name), (folder / "a.txt").read_text())


def test_an_empty_store_has_no_checkpoint(storage, tmp_path):
    store = CheckpointStore(storage, keep=2)
    assert store.updates() == [] and store.best() is None and newest(store, tmp_path) is None


def test_the_newest_is_loaded_with_all_its_files(storage, tmp_path):
    store = CheckpointStore(storage, keep=2)
    for update in (5, 10, 1_000_000_000, 20):
        store.save(writer(f"text {update}"), update, None)
    folder = store.load_newest(tmp_path / "loaded", never)
    assert folder == tmp_path / "loaded" / "1000000000"
    assert read_manifest(folder) == {"update": 1_000_000_000, "objective": None}
    assert (folder / "a.txt").read_text() == "text 1000000000"


def test_names_sort_like_numbers(local):
    CheckpointStore(local, keep=1).save(writer("x"), 42, None)
    assert local.names() == ["000000042"]


def test_the_newest_and_the_best_are_kept(storage):
    store = CheckpointStore(storage, keep=2)
    objectives = {1: 0.9, 2: 0.3, 3: 0.5, 4: None, 5: math.nan, 6: 0.4, 7: -math.inf}
    kept = []
    for update, objective in objectives.items():
        store.save(writer(update), update, objective)
        kept.append(store.updates())
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]
    assert store.best() == "000000002"


@settings(max_examples=25)
@given(
    st.integers(1, 4),
    st.lists(st.none() | st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=12),
)
def test_the_best_and_the_newest_are_kept_for_any_objectives(tmp_path_factory, keep, objectives):
    storage = Storage(str(tmp_path_factory.mktemp("checkpoints")))
    store = CheckpointStore(storage, keep)
    for update, objective in enumerate(objectives):
        store.save(lambda _: None, update, objective)
    finite = {
        update: objective
        for update, objective in enumerate(objectives)
        if objective is not None and math.isfinite(objective)
    }
    best = min(finite, key=lambda update: (finite[update], update)) if finite else None
    updates = list(range(len(objectives)))
    assert store.updates() == sorted({*updates[-keep:], *([] if best is None else [best])})
    assert store.best() == (None if best is None else f"{best:09d}")


def test_the_best_can_be_loaded_by_its_name(storage, tmp_path):
    store = CheckpointStore(storage, keep=1)
    for update, objective in ((1, 0.5), (2, 0.75), (3, 0.625)):
        store.save(writer(update), update, objective)
    folder = store.load(store.best(), tmp_path / "best")
    assert (folder / "a.txt").read_text() == "1" and read_manifest(folder)["objective"] == 0.5
    with pytest.raises(FileNotFoundError):
        store.load("000000002", tmp_path / "best")


def test_facts_that_the_writer_stores_stay_in_the_manifest(storage, tmp_path):
    def write(folder):
        writer("x")(folder)
        write_manifest(folder, {"update": 3, "objective": None, "data_fingerprint": "abc"})

    store = CheckpointStore(storage, keep=1)
    store.save(write, 3, 0.5)
    facts = read_manifest(store.load_newest(tmp_path / "loaded", never))
    assert facts == {"update": 3, "objective": 0.5, "data_fingerprint": "abc"}


@pytest.mark.parametrize("keep", [0, -1])
def test_a_store_that_keeps_no_checkpoints_is_refused(local, keep):
    with pytest.raises(InputError, match=f"{keep} checkpoints"):
        CheckpointStore(local, keep)


def test_a_pickled_store_works(storage, tmp_path):
    store = CheckpointStore(storage, keep=1)
    store.save(writer("here"), 1, 0.5)
    copy = pickle.loads(pickle.dumps(store))
    assert newest(copy, tmp_path) == (1, "here")
    copy.save(writer("there"), 2, 0.75)
    assert store.updates() == [1, 2] and store.best() == "000000001"


def test_an_update_saved_again_replaces_the_first(storage, tmp_path):
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
        # In a bucket the files are in a subfolder that is named after the manifest's digest.
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
    path.write_bytes(content) if storage.is_local else storage.child(name).write_bytes(path, bytes(content))


@pytest.mark.parametrize("file", ["a.txt", "b.bin", MANIFEST])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(storage, tmp_path, file, how):
    store = CheckpointStore(storage, keep=3)
    for update in (1, 2, 3):
        store.save(writer(update, size=50), update, 1.0 / update)
    damage(storage, "000000003", file, how)
    lines = []
    assert newest(store, tmp_path, lines.append) == (2, "2")
    (line,) = lines
    assert f"{storage}/000000003" in line and file in line and "\n" not in line
    assert str(tmp_path / "loaded") not in line, "the deleted copy is not named"
    assert storage.exists("000000003"), "it is not deleted"
    assert not (tmp_path / "loaded" / "000000003").exists()
    assert store.best() == "000000002", "a damaged one is no longer the best"
    with pytest.raises(DamagedError):
        store.load("000000003", tmp_path / "loaded")


def test_all_damaged_checkpoints_are_reported_newest_first(local, tmp_path):
    store = CheckpointStore(local, keep=3)
    for update in (1, 2, 3):
        store.save(writer(update), update, None)
        damage(local, f"{update:09d}", "a.txt", "flip")
    lines = []
    assert newest(store, tmp_path, lines.append) is None
    assert [name in line for name, line in zip(("03", "02", "01"), lines, strict=True)] == [True] * 3


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_opened_now_is_not_taken_for_a_damaged_one(
    local, tmp_path, monkeypatch, number
):
    """An older one, or none, would be resumed from, and the newest be replaced."""
    store = CheckpointStore(local, keep=3)
    for update in (1, 2):
        store.save(writer(update), update, None)
    real_open = Path.open

    def fail(path, *arguments, **options):
        if path.name == "a.txt" and path.is_relative_to(tmp_path / "loaded"):
            raise OSError(number, os.strerror(number))
        return real_open(path, *arguments, **options)

    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(InputError, match=os.strerror(number)) as error:
            newest(store, tmp_path, lines.append)
    assert not isinstance(error.value, DamagedError) and lines == []
    assert newest(store, tmp_path, lines.append) == (2, "2") and lines == []


def test_a_training_that_skipped_a_damaged_checkpoint_keeps_its_new_ones(storage, tmp_path):
    store = CheckpointStore(storage, keep=2)
    for update in (10, 20, 30):
        store.save(writer(update), update, None)
    damage(storage, "000000030", "a.txt", "flip")
    lines = []
    assert newest(store, tmp_path, lines.append) == (20, "20")
    store.save(writer("again"), 25, None)  # kept, although the damaged one is newer
    assert newest(CheckpointStore(storage, 2), tmp_path, lines.append) == (25, "again")
    assert store.updates() == [20, 25, 30]
    store.save(writer("replaced"), 30, None)
    assert newest(CheckpointStore(storage, 2), tmp_path) == (30, "replaced")
    assert store.updates() == [25, 30]


def test_a_damaged_checkpoint_does_not_count_among_the_newest(local, tmp_path):
    store = CheckpointStore(local, keep=2)
    for update in (10, 20):
        store.save(writer(update), update, None)
    damage(local, "000000020", "a.txt", "flip")
    newest(store, tmp_path, lambda line: None)
    store.save(writer(30), 30, None)
    assert store.updates() == [10, 30], "20 is damaged, so 10 and 30 are the two newest"


# ---- full disks and unreachable servers


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
    with pytest.raises(CheckpointWriteError) as caught:
        store.save(write, update, None)
    message = str(caught.value)
    assert "\n" not in message and f"update {update}" in message
    assert all(word in message for word in words), message


@pytest.fixture(name="disk")
def _disk(tmp_path):
    """A file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system; another test limits the file size instead")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_reported_and_loses_nothing(disk, tmp_path):
    """The disk is full after a varying part of a real checkpoint."""
    store = CheckpointStore(Storage(str(disk / "checkpoints")), keep=1)
    model, state = model_and_state()

    def write(folder):
        write_checkpoint(folder, model, state, {})

    store.save(write, 1, 0.5)
    files = sorted((disk / "checkpoints").rglob("*"))
    size = sum(path.stat().st_size for path in (disk / "checkpoints" / "000000001").iterdir())
    page = os.sysconf("SC_PAGESIZE")
    assert 10 * page < size < 100_000
    files_written = set()
    for room in range(0, size, page):
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free - room))
        try:

            def write_and_count(folder):
                try:
                    write(folder)
                finally:
                    files_written.add(len(list(folder.iterdir())))

            assert_not_written(store, write_and_count, 2, str(disk), "No space left on device", "free")
        finally:
            (disk / "filler").unlink()
        assert sorted((disk / "checkpoints").rglob("*")) == files, "no incomplete folder is left"
    assert {0, 1, 2, 3} <= files_written, "the disk was full at different files"
    read_checkpoint(store.load_newest(tmp_path / "loaded", never))
    store.save(write, 2, 0.25)
    assert store.updates() == [2]


def test_a_file_size_limit_is_reported_and_loses_nothing(local, tmp_path, max_file_size):
    store = CheckpointStore(local, keep=1)
    model, state = model_and_state()
    store.save(lambda folder: write_checkpoint(folder, model, state, {}), 1, None)
    files = sorted(local.path.rglob("*"))
    for limit in (0, 1000, 9000, 20_000):
        with max_file_size(limit):
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
def test_a_disk_that_fails_in_the_last_step_loses_nothing(local, tmp_path, monkeypatch, call):
    store = CheckpointStore(local, keep=1)
    store.save(writer("good"), 1, None)

    def fail(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(local_module.os, call, fail)
        assert_not_written(store, writer("bad"), 2, "quota exceeded")
    assert newest(store, tmp_path) == (1, "good")
    assert [path.name for path in local.path.iterdir()] == ["000000001"]


def test_a_writer_with_another_error_leaves_nothing(storage, tmp_path):
    store = CheckpointStore(storage, keep=1)
    store.save(writer("good"), 1, None)

    def write(folder):
        writer("bad")(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.save(write, 2, None)
    assert newest(store, tmp_path) == (1, "good") and storage.names() == ["000000001"]


def test_saving_succeeds_if_only_pruning_fails(local, monkeypatch):
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
def test_a_server_that_fails_during_an_upload_loses_nothing(s3, tmp_path, monkeypatch, after):
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
    lines = []
    assert newest(store, tmp_path, lines.append) == (1, "good")
    assert all("000000002" in line for line in lines)
    store.save(writer("now"), 2, 0.25)
    assert newest(CheckpointStore(storage, 1), tmp_path) == (2, "now")


def test_a_server_that_fails_during_loading_is_an_error(s3, tmp_path, monkeypatch):
    store = CheckpointStore(Storage(f"s3://{s3}/checkpoints"), keep=1)
    store.save(writer("good"), 1, None)

    def fail(*_):
        raise OSError("AWS Error NETWORK_CONNECTION: gone")

    for call in ("names", "download_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, call, fail)
            # To use an older checkpoint, or to start from scratch, would lose work.
            with pytest.raises(InputError, match=f"s3://{s3}/checkpoints.*NETWORK_CONNECTION"):
                newest(store, tmp_path)


def test_every_file_is_synced_to_disk_before_the_checkpoint_gets_its_name(local, monkeypatch):
    calls, real_sync, real_rename = [], files_module.sync, os.rename

    def sync(path):
        calls.append(path.name)
        real_sync(path)

    def rename(source, target):
        calls.append(f"renamed to {target.name}")
        real_rename(source, target)

    for module in (files_module, manifest_module, local_module):
        monkeypatch.setattr(module, "sync", sync)
    monkeypatch.setattr(local_module.os, "rename", rename)
    CheckpointStore(local, keep=1).save(writer("x"), 1, None)
    renamed = calls.index("renamed to 000000001")
    before, after = calls[:renamed], calls[renamed:]
    assert {"a.txt", "b.bin"} <= set(before) and any(name.endswith(f"-{MANIFEST}") for name in before)
    assert before[-1].endswith("-000000001"), "the directory that lists the files"
    assert "checkpoints" in after


# ---- other processes

PROGRAM = """
import os, sys
from workflows.training.checkpoint_store import CheckpointStore
from workflows.storage.storage import Storage

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
def test_a_writer_killed_at_any_moment_leaves_a_complete_newest_checkpoint(local, tmp_path, keep, step):
    """With step 0 it replaces its only checkpoint over and over."""
    store, rng, last_saved = CheckpointStore(local, keep), random.Random(keep + step), 0
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
        printed = process.communicate()[0].split()
        last_saved = max([last_saved, *map(int, printed)])
        folder = store.load_newest(tmp_path / "loaded", never)
        assert int(folder.name) >= last_saved, "a checkpoint that was reported as saved is there"
    assert last_saved > (3 if step else 0), "it was killed while it was writing"
    # Incomplete files of killed writers are removed once they are old.
    old = time.time() - 3600
    for path in local.path.rglob("*"):
        os.utime(path, (old, old))
    store.save(writer("last"), last_saved + 100, None)
    assert not [path for path in local.path.iterdir() if path.name.startswith(".")]
    assert len(store.updates()) <= keep + 1


def test_two_processes_that_save_the_same_updates_corrupt_nothing(storage, tmp_path):
    """As when an old process lingers, a few updates behind, and writes other bytes under the same names."""
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
        monkeypatch.setattr(local_module.os, "link", real)
        store.save(writer("second"), 1, None)

    with monkeypatch.context() as patch:
        patch.setattr(local_module.os, "link", slow)
        assert newest(store, tmp_path) == (1, "second")


def test_a_checkpoint_pruned_while_it_is_read_is_skipped_without_a_message(local, tmp_path, monkeypatch):
    store = CheckpointStore(local, keep=1)
    store.save(writer("first"), 1, None)
    real = Storage.download_folder

    def pruned(self, name, into):
        self.delete(name)
        real(self, name, into)

    monkeypatch.setattr(Storage, "download_folder", pruned)
    assert newest(store, tmp_path) is None
