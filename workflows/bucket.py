"""Folders in a bucket: s3://, gs:// and what else pyarrow opens."""

import hashlib
import os
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

_S3_OPTIONS = ("endpoint_override", "region", "scheme")
_CHUNK_BYTES = 8 * 2**20


class Bucket:
    """A prefix in a bucket.

    Its methods mean what those of `workflows.storage.Storage` say. A folder in it is one object,
    NAME/manifest.json, put last, and a subfolder that is named after that manifest's digest and holds
    the files. So two processes that write the same name at the same time never mix their files: whose
    manifest comes last has the name.

    Args:
        uri: such as s3://bucket/prefix; options after a question mark.
        endpoint: of a server that is not Amazon's; from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL if None.
        patient: False for one quick attempt instead of several.

    Raises:
        InputError: the URI is none.
    """

    def __init__(self, uri: str, endpoint: str | None = None, patient: bool = True) -> None:
        if uri.startswith("s3:"):
            _check_s3(uri)
            endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        self._uri = uri
        self._endpoint = endpoint
        self._patient = patient

    def __str__(self) -> str:
        return redact(self._uri)

    def __getstate__(self) -> dict[str, Any]:
        # Not the open file system: a worker opens its own, with its own credentials.
        return {"_uri": self._uri, "_endpoint": self._endpoint, "_patient": self._patient}

    def child(self, name: str) -> "Bucket":
        """The prefix `name` under this one."""
        base, mark, options = self._uri.partition("?")
        return Bucket(f"{base.rstrip('/')}/{name}{mark}{options}", self._endpoint, self._patient)

    def for_ray(self) -> tuple[str, fs.FileSystem]:
        """The path in the bucket's file system, and that."""
        return self._key(""), self._files

    def write(self, name: str, content: bytes) -> None:
        """Put one object; it appears whole or not at all."""
        with self._errors(), self._files.open_output_stream(self._key(name)) as stream:
            stream.write(content)

    def read(self, name: str) -> bytes | None:
        """The content of one object, None if it is not there."""
        try:
            with self._errors(), self._files.open_input_stream(self._key(name)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """Whether there is such an object, or an object in a folder of that name."""
        with self._errors():
            return self._files.get_file_info(self._key(name)).type != fs.FileType.NotFound

    def names(self) -> list[str]:
        """Names of the objects and of the folders here, in order."""
        with self._errors():
            found = self._files.get_file_info(fs.FileSelector(self._key(""), allow_not_found=True))
        return sorted(info.base_name for info in found if not info.base_name.startswith("."))

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty local folder."""
        with TemporaryDirectory(prefix=f"ray-ddpm-{name}-") as made:
            yield Path(made)

    def put_folder(self, local: Path, name: str) -> None:
        """Upload a flat folder that has a manifest; it is there once its manifest is."""
        manifest = (local / MANIFEST).read_bytes()
        inner = _inner(name, manifest)
        for path in sorted(local.iterdir()):
            with path.open("rb") as source, self._errors():
                with self._files.open_output_stream(self._key(f"{inner}/{path.name}")) as target:
                    shutil.copyfileobj(source, target, _CHUNK_BYTES)
        self.write(f"{name}/{MANIFEST}", manifest)

    def fetch_folder(self, name: str, into: Path) -> None:
        """Download what `put_folder` uploaded; a missing file is left to the manifest's check.

        Raises:
            FileNotFoundError: there is no such folder.
            Damaged: its manifest is damaged.
        """
        manifest = self.read(f"{name}/{MANIFEST}")
        if manifest is None:
            raise FileNotFoundError(f"{self.child(name)} is not there")
        tree = parse_manifest(manifest, str(self.child(name).child(MANIFEST)))
        for file in tree["files"]:
            try:
                with self._errors():
                    source = self._files.open_input_stream(self._key(f"{_inner(name, manifest)}/{file}"))
            except FileNotFoundError:
                continue
            with (into / file).open("wb") as target, self._errors(), source:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
        (into / MANIFEST).write_bytes(manifest)

    def delete(self, name: str) -> None:
        """Delete an object or a folder; the folder is gone with its manifest, before its files."""
        with self._errors():
            for key in (self._key(f"{name}/{MANIFEST}"), self._key(name)):
                with suppress(FileNotFoundError):
                    kind = self._files.get_file_info(key).type
                    if kind == fs.FileType.File:
                        self._files.delete_file(key)
                    elif kind == fs.FileType.Directory:
                        self._files.delete_dir(key)

    def remove_leftovers(self, matching: re.Pattern[str], before: float) -> None:
        """Delete folders without a manifest, last written to before that time, whose names match."""
        for name in self.names():
            if not matching.fullmatch(name) or self.exists(f"{name}/{MANIFEST}"):
                continue
            with self._errors():
                selector = fs.FileSelector(self._key(name), recursive=True, allow_not_found=True)
                found = self._files.get_file_info(selector)
            if all(info.mtime_ns is None or info.mtime_ns / 1e9 < before for info in found):
                self.delete(name)

    def try_out(self) -> None:
        """Put and delete an object, in one attempt that takes a few seconds at most.

        Raises:
            OSError: one of these fails.
        """
        name, once = part_name("probe"), Bucket(self._uri, self._endpoint, patient=False)
        once.write(name, b"probe")
        with once._errors():
            once._files.delete_file(once._key(name))

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        with self._errors():
            if self._uri.startswith("s3:"):
                return self._open_s3()
            if re.match("gc?s:", self._uri):
                mark = "&" if "?" in self._uri else "?"
                seconds = 30 if self._patient else 5
                return fs.FileSystem.from_uri(f"{self._uri}{mark}retry_limit_seconds={seconds}")
            return fs.FileSystem.from_uri(self._uri)

    def _open_s3(self) -> tuple[fs.FileSystem, str]:
        parts = urlsplit(self._uri)
        options = dict(parse_qsl(parts.query))
        user, _, bucket = parts.netloc.rpartition("@")
        access_key, _, secret_key = user.partition(":")
        endpoint = options.get("endpoint_override") or self._endpoint or ""
        scheme, _, host = endpoint.rpartition("://")
        region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region is None:
            # Of a server that is not Amazon's any name will do; asking Amazon for it would take long.
            region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
        files = fs.S3FileSystem(
            access_key=unquote(access_key) or None,
            secret_key=unquote(secret_key) or None,
            region=region,
            scheme=options.get("scheme") or scheme or "https",
            endpoint_override=host or None,
            connect_timeout=5 if self._patient else 3,
            request_timeout=10 if self._patient else 4,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=4 if self._patient else 1),
            allow_delayed_open=True,  # a small object in one request instead of four
        )
        return files, f"{bucket}{parts.path}"

    @property
    def _files(self) -> fs.FileSystem:
        return self._opened[0]

    def _key(self, name: str) -> str:
        prefix = self._opened[1].rstrip("/")
        return f"{prefix}/{name}" if name else prefix

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Every failure of pyarrow as an OSError of one short line without secrets."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())
            # What was done to which key, and the request's number, only hide the rest.
            reason = re.sub(r"^When .*?: (?=AWS Error)|\s*\(Request ID: [^)]*\)", "", reason)
            raise OSError(textwrap.shorten(redact(reason), 240)) from None


def redact(text: str) -> str:
    """The same text with neither keys nor passwords in its URIs."""
    text = re.sub(r"//[^/\s@]*:[^\s?#]*@", "//***@", text)
    return re.sub(rf"([?&](?!(?:{'|'.join(_S3_OPTIONS)})=)[^=&\s]+)=[^&\s]*", r"\1=***", text)


def _check_s3(uri: str) -> None:
    """Refuse what would lead to a strange answer much later.

    Raises:
        InputError: no bucket, an option that is none, or a key with a bare slash.
    """
    parts = urlsplit(uri)
    shown = redact(uri)
    if ":" in parts.netloc and "@" in parts.path:
        raise InputError(f"{shown} has a / in its secret key: write %2F for it, or set AWS_SECRET_ACCESS_KEY")
    if not parts.netloc.rpartition("@")[2]:
        raise InputError(f"{shown} names no bucket: give s3://bucket/prefix")
    if unknown := set(dict(parse_qsl(parts.query, keep_blank_values=True))) - set(_S3_OPTIONS):
        allowed = ", ".join(_S3_OPTIONS)
        raise InputError(f"{shown} has the option {min(unknown)}: allowed are {allowed}; leave it out")


def _inner(name: str, manifest: bytes) -> str:
    """The subfolder that holds the files which a manifest is of."""
    return f"{name}/{hashlib.sha256(manifest).hexdigest()[:16]}"
