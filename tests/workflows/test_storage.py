"""A folder, a mount and a bucket behave the same, and say at once when they cannot be used."""

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
from diffusion.manifest import MANIFEST, Damaged, read_manifest, write_manifest
from workflows import folder as folder_module
from workflows import storage as storage_module
from workflows.bucket import Bucket, redact
from workflows.storage import Storage


@pytest.fixture(name="storage", params=["local", "s3"])
def _storage(request, tmp_path):
    if request.param == "local":
        return Storage(str(tmp_path / "runs" / "one"))
    return Storage(f"s3://{request.getfixturevalue('s3')}/runs/one")


@pytest.fixture(name="folder")
def _folder(tmp_path):
    return make_folder(tmp_path / "made", b"first")


def make_folder(path, content):
    path.mkdir()
    (path / "a.bin").write_bytes(content)
    (path / "empty").touch()
    write_manifest(path, {"content": content.decode()[:10]})
    return path


def content(storage, name, tmp_path):
    """Every file of a folder, once it was found to be whole."""
    into = tmp_path / "fetched"
    shutil.rmtree(into, ignore_errors=True)
    storage.fetch_folder(name, into)
    read_manifest(into)
    return {path.name: path.read_bytes() for path in into.iterdir()}


def test_texts_come_back_and_are_replaced(storage):
    assert storage.read_text("run.json") is None and not storage.exists("run.json")
    for text in ("grün\n", "", "x" * 100_000):
        storage.write_text("run.json", text)
        assert storage.read_text("run.json") == text
    assert storage.exists("run.json") and storage.names() == ["run.json"]


def test_a_new_storage_holds_nothing(storage):
    assert storage.names() == []
    assert storage.child("not/there").names() == []
    assert not storage.exists("not")


def test_children_are_folders_in_it(storage):
    storage.child("a").child("b").write_text("c.txt", "deep")
    assert storage.read_text("a/b/c.txt") == "deep"
    assert storage.child("a/b").names() == ["c.txt"]
    assert storage.names() == ["a"] and storage.exists("a") and storage.exists("a/b/c.txt")
    assert str(storage.child("a/b")) == f"{storage}/a/b"
    assert storage.is_local == storage.child("a").is_local


def test_a_folder_comes_back_file_by_file(storage, folder, tmp_path):
    storage.put_folder(folder, "model")
    assert content(storage, "model", tmp_path) == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert storage.names() == ["model"] and storage.exists("model")
    assert (folder / "a.bin").exists(), "the given one stays"


def test_a_folder_without_a_manifest_gets_one(storage, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "card.md").write_text("a model")
    storage.put_folder(tmp_path / "plain", "model")
    assert content(storage, "model", tmp_path)["card.md"] == b"a model"


def test_a_folder_takes_the_place_of_another(storage, folder, tmp_path):
    storage.put_folder(folder, "model")
    (folder / "a.bin").unlink()
    (folder / "b.bin").write_bytes(b"second")
    write_manifest(folder, {})
    storage.put_folder(folder, "model")
    assert set(content(storage, "model", tmp_path)) == {"b.bin", "empty", MANIFEST}
    assert storage.names() == ["model"]


def test_what_was_made_in_scratch_is_put_and_the_scratch_is_gone(storage, tmp_path):
    with storage.scratch("model") as made:
        (made / "a.bin").write_bytes(b"made")
        write_manifest(made, {})
        assert storage.names() == [], "nobody sees it yet"
        storage.put_folder(made, "model")
    assert content(storage, "model", tmp_path)["a.bin"] == b"made"
    assert not made.exists()
    with pytest.raises(ZeroDivisionError), storage.scratch("other") as made:
        raise ZeroDivisionError
    assert not made.exists() and storage.names() == ["model"]


def test_what_is_deleted_is_gone(storage, folder, tmp_path):
    storage.put_folder(folder, "model")
    storage.write_text("run.json", "{}")
    for name in ("model", "run.json", "never there"):
        storage.delete(name)
        storage.delete(name)
    assert storage.names() == []
    with pytest.raises(FileNotFoundError):
        storage.fetch_folder("model", tmp_path / "fetched")


def test_a_pickled_storage_is_the_same_place(storage, folder, tmp_path, monkeypatch):
    storage.put_folder(folder, "model")
    monkeypatch.chdir("/")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)  # a worker may not have it
    again = pickle.loads(pickle.dumps(storage.child("sub")))
    again.write_text("a", "from afar")
    assert storage.read_text("sub/a") == "from afar"


@pytest.mark.parametrize("name", ["", ".", "..", "a/../b", "/etc", "a//b", "a/", "./a"])
def test_names_lead_nowhere_else(storage, name):
    for call in (storage.child, storage.read_text, storage.exists, storage.delete):
        with pytest.raises(ValueError, match="no name"):
            call(name)


# ---- local


def test_a_local_path_becomes_absolute_and_is_made(tmp_path, monkeypatch):
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


def test_a_put_folder_is_a_plain_folder(tmp_path, folder):
    storage = Storage(str(tmp_path / "runs"))
    storage.put_folder(folder, "model")
    assert read_manifest(storage.path / "model") == read_manifest(folder)
    assert [path.name for path in storage.path.iterdir()] == ["model"]


def test_a_fetched_folder_outlives_the_one_it_came_from(tmp_path, folder):
    storage = Storage(str(tmp_path / "runs"))
    storage.put_folder(folder, "model")
    storage.fetch_folder("model", tmp_path / "mine")
    kept = read_manifest(tmp_path / "mine")
    storage.delete("model")
    assert not storage.exists("model") and read_manifest(tmp_path / "mine") == kept


def test_a_file_system_without_second_names_copies(tmp_path, folder, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(folder_module.os, "link", refuse)
    storage = Storage(str(tmp_path / "runs"))
    storage.put_folder(folder, "model")
    assert content(storage, "model", tmp_path)["a.bin"] == b"first"


def test_a_file_system_that_cannot_exchange_names_still_replaces(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(folder_module, "_exchange", lambda *_: False)
    storage = Storage(str(tmp_path / "runs"))
    for text in (b"first", b"second", b"third"):
        storage.put_folder(make_folder(tmp_path / text.decode(), text), "model")
        assert content(storage, "model", tmp_path)["a.bin"] == text
    assert [path.name for path in storage.path.iterdir()] == ["model"]


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names at once")


@linux
def test_a_folder_is_replaced_without_a_moment_in_which_it_is_not_there(tmp_path, folder, monkeypatch):
    storage = Storage(str(tmp_path / "runs"))
    storage.put_folder(folder, "model")
    monkeypatch.delattr(folder_module.Folder, "delete")
    monkeypatch.delattr(folder_module.os, "rename")
    storage.put_folder(make_folder(tmp_path / "other", b"second"), "model")
    assert content(storage, "model", tmp_path)["a.bin"] == b"second"
    assert [path.name for path in storage.path.iterdir()] == ["model"]


def test_a_folder_that_is_being_deleted_is_not_there_any_more(tmp_path, folder, monkeypatch):
    storage = Storage(str(tmp_path / "runs"))
    storage.put_folder(folder, "model")
    monkeypatch.setattr(folder_module.shutil, "rmtree", lambda *_, **__: None)  # killed before it
    storage.delete("model")
    assert storage.names() == [] and not storage.exists("model")


def test_the_disk_holds_a_copied_folder_before_it_has_its_name(tmp_path, folder, monkeypatch):
    storage, done = Storage(str(tmp_path / "runs")), []
    real = os.rename
    monkeypatch.setattr(folder_module, "sync", lambda path: done.append(path.name))
    monkeypatch.setattr(folder_module.os, "rename", lambda *each: (done.append("renamed"), real(*each)))
    storage.put_folder(folder, "model")
    start, end = done[: done.index("renamed")], done[done.index("renamed") :]
    assert set(start[:-1]) == {"a.bin", "empty", MANIFEST} and start[-1].endswith("-model")
    assert end[:2] == ["renamed", "runs"]


@linux
def test_this_machine_can_exchange_names_at_once(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert folder_module._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        folder_module._exchange(tmp_path / "a", tmp_path / "c")


def test_old_leftovers_go_and_young_ones_stay(tmp_path):
    storage = Storage(str(tmp_path))
    old = time.time() - 3600
    for name, age in {
        ".part-0123abcd-000000001": old,
        ".part-0123abcd-000000002": time.time(),
        ".part-0123abcd-other": old,
        "000000003": old,
        ".hidden": old,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.bin").write_bytes(b"half")
        for path in (tmp_path / name / "a.bin", tmp_path / name):
            os.utime(path, (age, age))
    (tmp_path / ".part-0123abcd-000000004").mkdir()
    (tmp_path / ".part-0123abcd-000000004" / "a.bin").touch()
    os.utime(tmp_path / ".part-0123abcd-000000004", (old, old))  # an old folder that is still written to
    storage.remove_leftovers(r"\d+")
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
def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path, location):
    (tmp_path / "file").touch()
    location = location.format(file=tmp_path / "file")
    assert_refused(location, location, "give a folder")


@pytest.mark.parametrize("location", ["", "  "])
def test_no_name_is_refused(location):
    assert_refused(location, "empty", "s3://")


def test_a_mount_that_does_not_answer_is_refused_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "_SECONDS_TO_ANSWER", 0.2)
    monkeypatch.setattr(folder_module.Folder, "try_out", lambda _: time.sleep(2.0))
    assert_refused(str(tmp_path), str(tmp_path), "no answer", within=1.5)


# ---- buckets


def objects(bucket):
    """All keys of a bucket, and the file system to change them with."""
    files = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1")
    found = files.get_file_info(fs.FileSelector(bucket, recursive=True))
    return files, sorted(info.path for info in found if info.is_file)


def test_trying_a_bucket_leaves_nothing_in_it(s3):
    Storage(f"s3://{s3}/runs")
    assert objects(s3)[1] == []


def test_options_in_the_uri_reach_the_server_too(s3, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    host = endpoint.removeprefix("http://")
    options = f"endpoint_override={host}&scheme=http&region=eu-west-1"
    storage = Storage(f"s3://KEY:S%2FCRET@{s3}/runs?{options}").child("one")
    storage.write_text("a", "b")
    assert str(storage) == f"s3://***@{s3}/runs/one?{options}"
    (given,) = storage._place._files.__reduce__()[1]
    assert (given["access_key"], given["secret_key"], given["region"]) == ("KEY", "S/CRET", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    assert Storage(f"s3://{s3}/runs").read_text("one/a") == "b"


def test_a_bucket_has_no_path(s3):
    storage = Storage(f"s3://{s3}/runs")
    assert not storage.is_local
    with pytest.raises(ValueError, match="no local folder"):
        _ = storage.path


def test_the_manifest_of_an_uploaded_folder_is_the_last_of_it(s3, folder, monkeypatch):
    storage = Storage(f"s3://{s3}/runs")

    def fail(self, name, content):
        raise OSError("the machine is switched off")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", fail)
        with pytest.raises(OSError, match="switched off"):
            storage.put_folder(folder, "model")
    assert len(objects(s3)[1]) == 3, "all else was there"
    with pytest.raises(FileNotFoundError):
        storage.fetch_folder("model", folder.parent / "fetched")


def test_the_manifest_of_a_deleted_folder_is_the_first_to_go(s3, folder, monkeypatch):
    storage = Storage(f"s3://{s3}/runs")
    storage.put_folder(folder, "model")
    bucket = storage._place
    real, gone = bucket._files, []

    class Recording:
        def __getattr__(self, name):
            if name.startswith("delete"):
                gone.append(name)
                if len(gone) == 2:
                    raise OSError("the machine is switched off")
            return getattr(real, name)

    monkeypatch.setattr(bucket, "_opened", (Recording(), bucket._opened[1]))
    with pytest.raises(OSError, match="switched off"):
        storage.delete("model")
    assert len(objects(s3)[1]) == 3 and not Storage(f"s3://{s3}/runs").exists(f"model/{MANIFEST}")


def test_two_writers_of_one_name_never_mix_their_files(s3, tmp_path, monkeypatch):
    """The second writes all of its folder between the files and the manifest of the first."""
    first, second = Storage(f"s3://{s3}/runs"), Storage(f"s3://{s3}/runs")
    folders = [make_folder(tmp_path / text.decode(), text) for text in (b"first", b"second")]
    real = Bucket.write

    def interrupted(self, name, content):
        monkeypatch.setattr(Bucket, "write", real)
        second.put_folder(folders[1], "model")
        assert_is(second, b"second")
        real(self, name, content)

    def assert_is(storage, text):
        assert content(storage, "model", tmp_path)["a.bin"] == text

    monkeypatch.setattr(Bucket, "write", interrupted)
    first.put_folder(folders[0], "model")
    assert_is(first, b"first")


def test_a_damaged_or_missing_object_is_found(s3, folder, tmp_path):
    storage = Storage(f"s3://{s3}/runs")
    for change in ("flip", "cut", "delete"):
        storage.put_folder(folder, "model")
        files, keys = objects(s3)
        (key,) = [each for each in keys if each.endswith("/a.bin")]
        if change == "delete":
            files.delete_file(key)
        else:
            with files.open_output_stream(key) as stream:
                stream.write(b"girst" if change == "flip" else b"firs")
        with pytest.raises(Damaged, match="a.bin"):
            content(storage, "model", tmp_path)
        storage.put_folder(folder, "model")
        assert content(storage, "model", tmp_path)["a.bin"] == b"first", "put again, it is mended"


def test_a_damaged_manifest_in_a_bucket_is_named_by_its_address(s3, folder, tmp_path):
    storage = Storage(f"s3://{s3}/runs")
    storage.put_folder(folder, "model")
    storage.write_text(f"model/{MANIFEST}", "{}")
    with pytest.raises(Damaged, match=f"s3://{s3}/runs/model/manifest.json"):
        storage.fetch_folder("model", tmp_path / "fetched")


def test_old_uploads_without_a_manifest_go_and_young_ones_stay(s3, folder, monkeypatch):
    storage = Storage(f"s3://{s3}/runs")
    for name in ("000000001", "000000002", "other"):
        storage.put_folder(folder, name)
    for name in ("000000002", "other"):
        files, _ = objects(s3)
        files.delete_file(f"{s3}/runs/{name}/{MANIFEST}")
    storage.remove_leftovers(r"\d+")
    assert storage.names() == ["000000001", "000000002", "other"]
    monkeypatch.setattr(storage_module, "_SECONDS_TO_LEFTOVER", -10.0)
    storage.remove_leftovers(r"\d+")
    assert storage.names() == ["000000001", "other"]


def test_a_bucket_that_is_not_there_is_refused(s3):
    assert_refused("s3://no-such-bucket/runs", "s3://no-such-bucket/runs", "NO_SUCH_BUCKET", "check its name")


def test_a_server_that_is_not_there_is_refused_without_the_key(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    message = assert_refused(f"s3://SOMEONE:S3CR3T@{s3}/runs", "AWS_ENDPOINT_URL", "connect")
    assert "S3CR3T" not in message and "SOMEONE" not in message


def test_a_server_that_never_answers_is_refused_in_time(s3, monkeypatch):
    monkeypatch.setattr(storage_module, "_SECONDS_TO_ANSWER", 1.0)
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
def test_a_uri_that_means_nothing_is_refused_without_its_key(location, word):
    assert "S3CR3T" not in assert_refused(location, word, within=1.0)


def test_redacting_leaves_what_is_no_secret():
    assert redact("s3://bucket/a@b?region=x") == "s3://bucket/a@b?region=x"
    assert redact("no s3://k:s@b/x nor gs://k:t@c?token=u!") == "no s3://***@b/x nor gs://***@c?token=***"


def test_a_local_storage_loads_no_pyarrow(tmp_path):
    program = "import sys; from workflows.storage import Storage; Storage(sys.argv[1])"
    program += "; print('pyarrow' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.stdout.strip() == "False"
