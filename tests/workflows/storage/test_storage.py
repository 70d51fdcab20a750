"""Local folders and buckets behave the same, and report early that they cannot be used."""

import errno
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

from diffusion.errors import InputError
from diffusion.manifest import MANIFEST, DamagedError, read_manifest, write_manifest
from workflows.storage import local as local_module
from workflows.storage import storage as storage_module
from workflows.storage.bucket import Bucket
from workflows.storage.storage import Storage, retry


@pytest.fixture(name="storage", params=["local", "s3"])
def _storage(request, tmp_path):
    if request.param == "local":
        return Storage(str(tmp_path / "runs" / "one"))
    return Storage(f"s3://{request.getfixturevalue('s3')}/runs/one")


@pytest.fixture(name="folder")
def _folder(tmp_path):
    return make_folder(tmp_path / "original", b"first")


def make_folder(path, content):
    path.mkdir()
    (path / "a.bin").write_bytes(content)
    (path / "empty").touch()
    write_manifest(path, {"content": content.decode()[:10]})
    return path


def content(storage, name, tmp_path):
    """Download a folder, check it against its manifest, and return the content of every file by name."""
    into = tmp_path / "downloaded"
    shutil.rmtree(into, ignore_errors=True)
    storage.download_folder(name, into)
    read_manifest(into)
    return {path.name: path.read_bytes() for path in into.iterdir()}


def test_written_text_is_read_back_and_replaced(storage):
    assert storage.read_text("run.json") is None and not storage.exists("run.json")
    for text in ("grün\n", "", "x" * 100_000):
        storage.write_text("run.json", text)
        assert storage.read_text("run.json") == text
    assert storage.exists("run.json") and storage.names() == ["run.json"]


def test_a_new_storage_is_empty(storage):
    assert storage.names() == []
    assert storage.child("not/there").names() == []
    assert not storage.exists("not")


def test_a_child_is_a_subfolder(storage):
    storage.child("a").child("b").write_text("c.txt", "deep")
    assert storage.read_text("a/b/c.txt") == "deep"
    assert storage.child("a/b").names() == ["c.txt"]
    assert storage.names() == ["a"] and storage.exists("a") and storage.exists("a/b/c.txt")
    assert str(storage.child("a/b")) == f"{storage}/a/b"
    assert storage.is_local == storage.child("a").is_local


def test_an_uploaded_folder_is_downloaded_with_the_same_files(storage, folder, tmp_path):
    storage.upload_folder(folder, "model")
    assert content(storage, "model", tmp_path) == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert storage.names() == ["model"] and storage.exists("model")
    assert (folder / "a.bin").exists(), "the original remains"


def test_a_folder_without_a_manifest_gets_one(storage, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "card.md").write_text("a model")
    storage.upload_folder(tmp_path / "plain", "model")
    assert content(storage, "model", tmp_path)["card.md"] == b"a model"


def test_a_folder_replaces_another(storage, folder, tmp_path):
    storage.upload_folder(folder, "model")
    (folder / "a.bin").unlink()
    (folder / "b.bin").write_bytes(b"second")
    write_manifest(folder, {})
    storage.upload_folder(folder, "model")
    assert set(content(storage, "model", tmp_path)) == {"b.bin", "empty", MANIFEST}
    assert storage.names() == ["model"]


def test_a_staging_folder_is_uploaded_and_removed(storage, tmp_path):
    with storage.staging_folder("model") as staging:
        (staging / "a.bin").write_bytes(b"staged")
        write_manifest(staging, {})
        assert storage.names() == [], "not visible yet"
        storage.upload_folder(staging, "model")
    assert content(storage, "model", tmp_path)["a.bin"] == b"staged"
    assert not staging.exists()
    with pytest.raises(ZeroDivisionError), storage.staging_folder("other") as staging:
        raise ZeroDivisionError
    assert not staging.exists() and storage.names() == ["model"]


def test_deleted_files_and_folders_are_gone(storage, folder, tmp_path):
    storage.upload_folder(folder, "model")
    storage.write_text("run.json", "{}")
    for name in ("model", "run.json", "missing"):
        storage.delete(name)
        storage.delete(name)
    assert storage.names() == []
    with pytest.raises(FileNotFoundError):
        storage.download_folder("model", tmp_path / "downloaded")


def test_an_unpickled_storage_has_the_same_location(storage, folder, tmp_path, monkeypatch):
    storage.upload_folder(folder, "model")
    monkeypatch.chdir("/")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)  # a worker may not have it
    unpickled = pickle.loads(pickle.dumps(storage.child("sub")))
    unpickled.write_text("a", "text")
    assert storage.read_text("sub/a") == "text"


@pytest.mark.parametrize("name", ["", ".", "..", "a/../b", "/etc", "a//b", "a/", "./a"])
def test_names_cannot_lead_out_of_the_folder(storage, name):
    for call in (storage.child, storage.read_text, storage.exists, storage.delete):
        with pytest.raises(ValueError, match="not a valid name"):
            call(name)


# ---- local


def test_a_local_path_becomes_absolute_and_is_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for location, path in {
        "runs/x": tmp_path / "runs" / "x",
        "~/runs": tmp_path / "home" / "runs",
        f"file://{tmp_path}/with%20blank": tmp_path / "with blank",
        f"{tmp_path}/a:b": tmp_path / "a:b",
    }.items():
        storage = Storage(location)
        assert storage.is_local and storage.path == path and path.is_dir() and list(path.iterdir()) == []


def test_an_uploaded_folder_is_a_plain_local_folder(tmp_path, folder):
    storage = Storage(str(tmp_path / "runs"))
    storage.upload_folder(folder, "model")
    assert read_manifest(storage.path / "model") == read_manifest(folder)
    assert [path.name for path in storage.path.iterdir()] == ["model"]


def test_a_downloaded_folder_outlives_its_source(tmp_path, folder):
    storage = Storage(str(tmp_path / "runs"))
    storage.upload_folder(folder, "model")
    storage.download_folder("model", tmp_path / "copy")
    manifest = read_manifest(tmp_path / "copy")
    storage.delete("model")
    assert not storage.exists("model") and read_manifest(tmp_path / "copy") == manifest


def test_files_are_copied_if_the_file_system_has_no_hard_links(tmp_path, folder, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(local_module.os, "link", refuse)
    storage = Storage(str(tmp_path / "runs"))
    storage.upload_folder(folder, "model")
    assert content(storage, "model", tmp_path)["a.bin"] == b"first"


def test_a_folder_is_replaced_even_if_the_file_system_cannot_swap_names(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(local_module, "swap_folders", lambda *_: False)
    storage = Storage(str(tmp_path / "runs"))
    for text in (b"first", b"second", b"third"):
        storage.upload_folder(make_folder(tmp_path / text.decode(), text), "model")
        assert content(storage, "model", tmp_path)["a.bin"] == text
    assert [path.name for path in storage.path.iterdir()] == ["model"]


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps two names atomically")


@linux
def test_a_folder_is_replaced_atomically(tmp_path, folder, monkeypatch):
    storage = Storage(str(tmp_path / "runs"))
    storage.upload_folder(folder, "model")
    monkeypatch.delattr(local_module.LocalFolder, "delete")
    monkeypatch.delattr(local_module.os, "rename")
    storage.upload_folder(make_folder(tmp_path / "other", b"second"), "model")
    assert content(storage, "model", tmp_path)["a.bin"] == b"second"
    assert [path.name for path in storage.path.iterdir()] == ["model"]


def test_a_half_deleted_folder_is_not_visible(tmp_path, folder, monkeypatch):
    storage = Storage(str(tmp_path / "runs"))
    storage.upload_folder(folder, "model")
    monkeypatch.setattr(local_module.shutil, "rmtree", lambda *_, **__: None)  # as if killed before it
    storage.delete("model")
    assert storage.names() == [] and not storage.exists("model")


def test_a_copied_folder_is_synced_to_disk_before_it_is_renamed(tmp_path, folder, monkeypatch):
    storage, calls = Storage(str(tmp_path / "runs")), []
    real_rename = os.rename
    monkeypatch.setattr(local_module, "sync", lambda path: calls.append(path.name))
    monkeypatch.setattr(
        local_module.os, "rename", lambda *paths: (calls.append("renamed"), real_rename(*paths))
    )
    storage.upload_folder(folder, "model")
    start, end = calls[: calls.index("renamed")], calls[calls.index("renamed") :]
    assert set(start[:-1]) == {"a.bin", "empty", MANIFEST} and start[-1].endswith("-model")
    assert end[:2] == ["renamed", "runs"]


@linux
def test_folders_are_swapped(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert local_module.swap_folders(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        local_module.swap_folders(tmp_path / "a", tmp_path / "c")


def test_only_old_incomplete_folders_are_removed(tmp_path):
    storage = Storage(str(tmp_path))
    old = time.time() - 3600
    for name, modified in {
        ".part-0123abcd-000000001": old,
        ".part-0123abcd-000000002": time.time(),
        ".part-0123abcd-other": old,
        "000000003": old,
        ".hidden": old,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.bin").write_bytes(b"half")
        for path in (tmp_path / name / "a.bin", tmp_path / name):
            os.utime(path, (modified, modified))
    (tmp_path / ".part-0123abcd-000000004").mkdir()
    (tmp_path / ".part-0123abcd-000000004" / "a.bin").touch()
    os.utime(tmp_path / ".part-0123abcd-000000004", (old, old))  # an old folder with a new file
    storage.remove_incomplete(r"\d+")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".hidden",
        ".part-0123abcd-000000002",
        ".part-0123abcd-000000004",
        ".part-0123abcd-other",
        "000000003",
    ]


def assert_refused(location, *words, within=11.0):
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        Storage(location)
    message = str(caught.value)
    assert time.monotonic() - start < within
    assert "\n" not in message and all(word in message for word in words), message
    return message


@pytest.mark.parametrize("location", ["/dev/null/runs", "/proc/runs", "{file}/runs", "{file}"])
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path, location):
    (tmp_path / "file").touch()
    location = location.format(file=tmp_path / "file")
    assert_refused(location, location, "give a folder")


@pytest.mark.parametrize("location", ["", "  "])
def test_an_empty_location_is_refused(location):
    assert_refused(location, "empty", "s3://")


def test_a_mount_that_does_not_answer_is_refused_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "CHECK_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(local_module.LocalFolder, "check_writable", lambda _: time.sleep(2.0))
    assert_refused(str(tmp_path), str(tmp_path), "no answer", within=1.5)


# ---- buckets


def objects(bucket):
    """File system of a bucket's server, and the sorted paths of all objects in the bucket."""
    files = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1")
    infos = files.get_file_info(fs.FileSelector(bucket, recursive=True))
    return files, sorted(info.path for info in infos if info.is_file)


def test_checking_a_bucket_leaves_nothing_in_it(s3):
    Storage(f"s3://{s3}/runs")
    assert objects(s3)[1] == []


def test_options_in_the_uri_are_used(s3, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    host = endpoint.removeprefix("http://")
    options = f"endpoint_override={host}&scheme=http&region=eu-west-1"
    storage = Storage(f"s3://KEY:S%2FCRET@{s3}/runs?{options}").child("one")
    storage.write_text("a", "b")
    assert str(storage) == f"s3://***@{s3}/runs/one?{options}"
    _, filesystem = storage.for_ray()
    (given,) = filesystem.__reduce__()[1]
    assert (given["access_key"], given["secret_key"], given["region"]) == ("KEY", "S/CRET", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    assert Storage(f"s3://{s3}/runs").read_text("one/a") == "b"


def test_a_bucket_has_no_path(s3):
    storage = Storage(f"s3://{s3}/runs")
    assert not storage.is_local
    with pytest.raises(ValueError, match="not a local folder"):
        _ = storage.path


def test_the_manifest_of_a_folder_is_uploaded_last(s3, folder, monkeypatch):
    storage = Storage(f"s3://{s3}/runs")

    def fail(self, name, content):
        raise OSError("the machine is switched off")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write_bytes", fail)
        with pytest.raises(OSError, match="switched off"):
            storage.upload_folder(folder, "model")
    assert len(objects(s3)[1]) == 3, "all other files are uploaded"
    with pytest.raises(FileNotFoundError):
        storage.download_folder("model", folder.parent / "downloaded")


def test_the_manifest_of_a_folder_is_deleted_first(s3, folder, monkeypatch):
    storage = Storage(f"s3://{s3}/runs")
    storage.upload_folder(folder, "model")
    real, deletions = fs.S3FileSystem, []

    class FailsAtTheSecondDeletion:
        def __init__(self, **options):
            self.filesystem = real(**options)

        def __getattr__(self, name):
            if name.startswith("delete"):
                deletions.append(name)
                if len(deletions) == 2:
                    raise OSError("the machine is switched off")
            return getattr(self.filesystem, name)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "S3FileSystem", FailsAtTheSecondDeletion)
        with pytest.raises(OSError, match="switched off"):
            Bucket(f"s3://{s3}/runs").delete("model")
    assert len(objects(s3)[1]) == 3 and not Storage(f"s3://{s3}/runs").exists(f"model/{MANIFEST}")


def test_two_writers_of_one_name_never_mix_their_files(s3, tmp_path, monkeypatch):
    """The second writes its whole folder after the files of the first and before its manifest."""
    first, second = Storage(f"s3://{s3}/runs"), Storage(f"s3://{s3}/runs")
    folders = [make_folder(tmp_path / text.decode(), text) for text in (b"first", b"second")]
    real = Bucket.write_bytes

    def interrupted(self, name, content):
        monkeypatch.setattr(Bucket, "write_bytes", real)
        second.upload_folder(folders[1], "model")
        assert_holds(second, b"second")
        real(self, name, content)

    def assert_holds(storage, text):
        assert content(storage, "model", tmp_path)["a.bin"] == text

    monkeypatch.setattr(Bucket, "write_bytes", interrupted)
    first.upload_folder(folders[0], "model")
    assert_holds(first, b"first")


def test_a_damaged_or_missing_object_is_detected(s3, folder, tmp_path):
    storage = Storage(f"s3://{s3}/runs")
    for change in ("flip", "cut", "delete"):
        storage.upload_folder(folder, "model")
        files, keys = objects(s3)
        (key,) = [path for path in keys if path.endswith("/a.bin")]
        if change == "delete":
            files.delete_file(key)
        else:
            with files.open_output_stream(key) as stream:
                stream.write(b"girst" if change == "flip" else b"firs")
        with pytest.raises(DamagedError, match="a.bin"):
            content(storage, "model", tmp_path)
        storage.upload_folder(folder, "model")
        assert content(storage, "model", tmp_path)["a.bin"] == b"first", "uploading again repairs it"


def test_a_damaged_manifest_in_a_bucket_is_named_by_its_uri(s3, folder, tmp_path):
    storage = Storage(f"s3://{s3}/runs")
    storage.upload_folder(folder, "model")
    storage.write_text(f"model/{MANIFEST}", "{}")
    with pytest.raises(DamagedError, match=f"s3://{s3}/runs/model/manifest.json"):
        storage.download_folder("model", tmp_path / "downloaded")


def test_only_old_uploads_without_a_manifest_are_removed(s3, folder, monkeypatch):
    storage = Storage(f"s3://{s3}/runs")
    for name in ("000000001", "000000002", "other"):
        storage.upload_folder(folder, name)
    for name in ("000000002", "other"):
        files, _ = objects(s3)
        files.delete_file(f"{s3}/runs/{name}/{MANIFEST}")
    storage.remove_incomplete(r"\d+")
    assert storage.names() == ["000000001", "000000002", "other"]
    monkeypatch.setattr(storage_module, "INCOMPLETE_AFTER_SECONDS", -10.0)
    storage.remove_incomplete(r"\d+")
    assert storage.names() == ["000000001", "other"]


def test_a_missing_bucket_is_refused(s3):
    assert_refused("s3://no-such-bucket/runs", "s3://no-such-bucket/runs", "NO_SUCH_BUCKET", "check its name")


def test_a_missing_server_is_refused_without_showing_the_key(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    message = assert_refused(f"s3://SOMEONE:S3CR3T@{s3}/runs", "AWS_ENDPOINT_URL", "connect")
    assert "S3CR3T" not in message and "SOMEONE" not in message


def test_a_server_that_never_answers_is_refused_in_time(s3, monkeypatch):
    monkeypatch.setattr(storage_module, "CHECK_TIMEOUT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert_refused(f"s3://{s3}/runs", f"s3://{s3}/runs", "no answer", within=2.5)


@pytest.mark.parametrize(
    ("location", "word"),
    [
        ("s3://", "bucket"),
        ("s3:/bucket/runs", "bucket"),
        ("s3://bucket/runs?secret=S3CR3T", "secret"),
        ("s3://KEY:S3CR3T/S3CR3T@bucket/runs", "%2F"),
        ("nothing://KEY:S3CR3T@bucket/runs", "s3://"),
    ],
)
def test_an_invalid_uri_is_refused_without_showing_its_key(location, word):
    assert "S3CR3T" not in assert_refused(location, word, within=1.0)


def test_a_local_storage_does_not_import_pyarrow(tmp_path):
    program = "import sys; from workflows.storage.storage import Storage; Storage(sys.argv[1])"
    program += "; print('pyarrow' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert result.stdout.strip() == "False"


def test_a_local_file_that_is_too_large_to_be_read_at_once_is_not_read(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**30 + 1)  # without blocks on the disk
    started = time.monotonic()
    with pytest.raises(OSError) as caught:
        local_module.LocalFolder(tmp_path).read_bytes("huge")
    assert caught.value.errno == errno.EFBIG and time.monotonic() < started + 1.0


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, as a list of one; nobody sleeps."""
    now = [0.0]
    monkeypatch.setattr(storage_module.time, "monotonic", lambda: now[0])

    def sleep(seconds):
        now[0] += seconds + 0.001

    monkeypatch.setattr(storage_module.time, "sleep", sleep)
    return now


def failing(*errors):
    """An action that raises these errors, and then returns the number of its calls."""
    calls = []

    def action():
        calls.append(None)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return len(calls)

    return action, calls


def test_a_storage_that_is_silent_for_minutes_is_asked_again(clock):
    action, _ = failing(*[OSError("AWS Error NETWORK_CONNECTION"), OSError(errno.ESTALE, "stale")] * 10)
    assert retry(action, 600.0) == 21 and 60.0 <= clock[0] <= 600.0


def test_a_storage_that_stays_silent_is_given_up_in_the_end(clock):
    action, calls = failing(*[OSError(errno.EIO, "silent")] * 1000)
    with pytest.raises(OSError, match="silent"):
        retry(action, 600.0)
    assert 600.0 <= clock[0] <= 610.0 and len(calls) < 100


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EACCES, "not yours"),
        ConnectionError("of Ray"),
        ValueError(),
    ],
)
def test_what_waiting_cannot_mend_is_raised_at_once(clock, error):
    action, calls = failing(error)
    with pytest.raises(type(error)):
        retry(action, 600.0)
    assert len(calls) == 1 and clock[0] == 0.0
