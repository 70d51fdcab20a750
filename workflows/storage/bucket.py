"""Storage backend for buckets: s3://, gs:// and whatever else pyarrow can open."""

import hashlib
import re
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow
from pyarrow import fs

from diffusion.errors import InputError
from diffusion.files import part_name
from diffusion.manifest import MANIFEST, parse_manifest
from workflows.environment import s3_endpoint, s3_region
from workflows.redaction import S3_OPTIONS, redact, redact_argument, remember

_CHUNK_BYTES = 8 * 2**20


class Bucket:
    """A prefix in a bucket; implements `workflows.storage.storage.Backend`.

    A folder is stored as the object NAME/manifest.json and a subfolder with the folder's files, which is
    named after the manifest's digest. The manifest is written last. So two processes that write the same
    name at the same time never mix their files: the last manifest written decides which folder it is.

    Args:
        uri: URI such as s3://bucket/prefix; options follow a question mark.
        endpoint: address of a server that is not Amazon's; None takes it from AWS_ENDPOINT_URL_S3 or
            AWS_ENDPOINT_URL.
        retry: whether to retry failed requests; False makes one attempt with short timeouts.

    Raises:
        InputError: the URI is invalid.
    """

    def __init__(self, uri: str, endpoint: str | None = None, retry: bool = True) -> None:
        remember(uri)
        if uri.startswith("s3:"):
            _check_s3_uri(uri)
            endpoint = endpoint or s3_endpoint()
        self._uri = uri
        self._endpoint = endpoint
        self._retry = retry

    def __str__(self) -> str:
        return redact_argument(self._uri)

    def __getstate__(self) -> dict[str, Any]:
        # Without the connection: a worker opens its own, with its own credentials.
        return {"_uri": self._uri, "_endpoint": self._endpoint, "_retry": self._retry}

    def check_writable(self) -> None:
        """Write and delete an object, without retries, so that it takes a few seconds at most.

        Raises:
            OSError: one of these steps fails.
        """
        name, bucket = part_name("probe"), Bucket(self._uri, self._endpoint, retry=False)
        bucket.write_bytes(name, b"probe")
        with bucket._short_errors():
            bucket._filesystem.delete_file(bucket._key(name))

    def for_ray(self) -> tuple[str, fs.FileSystem]:
        """Path in the bucket's file system, and that file system."""
        return self._key(""), self._filesystem

    def child(self, name: str) -> "Bucket":
        """The prefix `name` under this one."""
        base, separator, options = self._uri.partition("?")
        return Bucket(f"{base.rstrip('/')}/{name}{separator}{options}", self._endpoint, self._retry)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one object, which the server does atomically."""
        with self._short_errors(), self._filesystem.open_output_stream(self._key(name)) as stream:
            stream.write(content)

    def read_bytes(self, name: str) -> bytes | None:
        """Content of one object, or None if it does not exist."""
        try:
            with self._short_errors(), self._filesystem.open_input_stream(self._key(name)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """Whether there is an object with this name, or one in a folder with this name."""
        with self._short_errors():
            return self._filesystem.get_file_info(self._key(name)).type != fs.FileType.NotFound

    def names(self) -> list[str]:
        """Sorted names of the objects and folders directly under the prefix."""
        with self._short_errors():
            infos = self._filesystem.get_file_info(fs.FileSelector(self._key(""), allow_not_found=True))
        return sorted(info.base_name for info in infos if not info.base_name.startswith("."))

    def files(self) -> list[str]:
        """Sorted names of all objects under the prefix, relative to it."""
        with self._short_errors():
            selector = fs.FileSelector(self._key(""), recursive=True, allow_not_found=True)
            infos = self._filesystem.get_file_info(selector)
        start = len(self._key("")) + 1
        return sorted(info.path[start:] for info in infos if info.type == fs.FileType.File)

    def delete(self, name: str) -> None:
        """Delete an object or a folder; a folder's manifest is deleted first, then its files."""
        with self._short_errors():
            for key in (self._key(f"{name}/{MANIFEST}"), self._key(name)):
                with suppress(FileNotFoundError):
                    kind = self._filesystem.get_file_info(key).type
                    if kind == fs.FileType.File:
                        self._filesystem.delete_file(key)
                    elif kind == fs.FileType.Directory:
                        self._filesystem.delete_dir(key)

    @contextmanager
    def staging_folder(self, name: str) -> Iterator[Path]:
        """Temporary local folder."""
        with TemporaryDirectory(prefix=f"ray-ddpm-{name}-") as folder:
            yield Path(folder)

    def upload_folder(self, local: Path, name: str) -> None:
        """Upload a flat folder, which exists in the bucket once its manifest is written."""
        manifest = (local / MANIFEST).read_bytes()
        files_folder = _files_folder(name, manifest)
        for path in sorted(local.iterdir()):
            with path.open("rb") as source, self._short_errors():
                with self._filesystem.open_output_stream(self._key(f"{files_folder}/{path.name}")) as target:
                    shutil.copyfileobj(source, target, _CHUNK_BYTES)
        self.write_bytes(f"{name}/{MANIFEST}", manifest)

    def download_folder(self, name: str, into: Path) -> None:
        """Download a folder; missing files are skipped, since the check of the manifest finds them.

        Raises:
            FileNotFoundError: there is no such folder.
            DamagedError: its manifest is damaged.
        """
        manifest = self.read_bytes(f"{name}/{MANIFEST}")
        if manifest is None:
            raise FileNotFoundError(f"{self.child(name)} does not exist")
        tree = parse_manifest(manifest, str(self.child(name).child(MANIFEST)))
        for file in tree["files"]:
            key = self._key(f"{_files_folder(name, manifest)}/{file}")
            try:
                with self._short_errors():
                    source = self._filesystem.open_input_stream(key)
            except FileNotFoundError:
                continue
            with (into / file).open("wb") as target, self._short_errors(), source:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
        (into / MANIFEST).write_bytes(manifest)

    def remove_incomplete(self, pattern: re.Pattern[str], before: float) -> None:
        """Delete folders without a manifest, with matching names, that were last changed before a time."""
        for name in self.names():
            if not pattern.fullmatch(name) or self.exists(f"{name}/{MANIFEST}"):
                continue
            with self._short_errors():
                selector = fs.FileSelector(self._key(name), recursive=True, allow_not_found=True)
                infos = self._filesystem.get_file_info(selector)
            if all(info.mtime_ns is None or info.mtime_ns / 1e9 < before for info in infos):
                self.delete(name)

    @cached_property
    def _connection(self) -> tuple[fs.FileSystem, str]:
        """File system of the bucket, and the path of the prefix in it."""
        with self._short_errors():
            if self._uri.startswith("s3:"):
                return self._connect_s3()
            if re.match("gc?s:", self._uri):
                separator = "&" if "?" in self._uri else "?"
                seconds = 30 if self._retry else 5
                return fs.FileSystem.from_uri(f"{self._uri}{separator}retry_limit_seconds={seconds}")
            return fs.FileSystem.from_uri(self._uri)

    def _connect_s3(self) -> tuple[fs.FileSystem, str]:
        parts = urlsplit(self._uri)
        options = dict(parse_qsl(parts.query))
        user, _, bucket = parts.netloc.rpartition("@")
        access_key, _, secret_key = user.partition(":")
        endpoint = options.get("endpoint_override") or self._endpoint or ""
        scheme, _, host = endpoint.rpartition("://")
        region = options.get("region") or s3_region()
        if region is None:
            # Other servers than Amazon's accept any region, and looking it up at Amazon would be slow.
            region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
        filesystem = fs.S3FileSystem(
            access_key=unquote(access_key) or None,
            secret_key=unquote(secret_key) or None,
            region=region,
            scheme=options.get("scheme") or scheme or "https",
            endpoint_override=host or None,
            connect_timeout=5 if self._retry else 3,
            request_timeout=10 if self._retry else 4,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=4 if self._retry else 1),
            allow_delayed_open=True,  # a small object takes one request instead of four
        )
        return filesystem, f"{bucket}{parts.path}"

    @property
    def _filesystem(self) -> fs.FileSystem:
        return self._connection[0]

    def _key(self, name: str) -> str:
        prefix = self._connection[1].rstrip("/")
        return f"{prefix}/{name}" if name else prefix

    @contextmanager
    def _short_errors(self) -> Iterator[None]:
        """Turn every error of pyarrow into an OSError with one short line without secrets."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())
            # Drop the operation, the key and the request ID, which hide the actual reason.
            reason = re.sub(r"^When .*?: (?=AWS Error)|\s*\(Request ID: [^)]*\)", "", reason)
            raise OSError(textwrap.shorten(redact(reason), 240)) from None


def _check_s3_uri(uri: str) -> None:
    """Reject mistakes that would otherwise cause a confusing error much later.

    Raises:
        InputError: the bucket is missing, an option is unknown, or the secret key contains a bare slash.
    """
    parts = urlsplit(uri)
    shown = redact_argument(uri)
    if ":" in parts.netloc and "@" in parts.path:
        raise InputError(f"{shown} has a / in its secret key: write %2F for it, or set AWS_SECRET_ACCESS_KEY")
    if not parts.netloc.rpartition("@")[2]:
        raise InputError(f"{shown} names no bucket: give s3://bucket/prefix")
    if unknown := set(dict(parse_qsl(parts.query, keep_blank_values=True))) - set(S3_OPTIONS):
        allowed = ", ".join(S3_OPTIONS)
        raise InputError(f"{shown} has the unknown option {min(unknown)}: use only {allowed}, or remove it")


def _files_folder(name: str, manifest: bytes) -> str:
    """Name of the subfolder with the files that a manifest lists."""
    return f"{name}/{hashlib.sha256(manifest).hexdigest()[:16]}"
