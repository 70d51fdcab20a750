"""manifest.json: what a folder holds, so that damage is found before it is used."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.errors import InputError
from diffusion.files import replacing, sync

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_OWN_KEYS = ("format_version", "files", "sha256")


class Damaged(InputError):
    """A folder does not hold what its manifest says; the message names the file and what is wrong."""


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write manifest.json over every other file of a flat folder, and have the disk hold all of them.

    Args:
        directory: the folder, complete but for its manifest.
        facts: plain values to stand in the manifest too, such as the update and the objective.
    """
    files = {}
    for path in sorted(directory.iterdir()):
        if path.name == MANIFEST:
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.name] = {"sha256": digest, "bytes": file.tell()}
        sync(path)
    _write(directory, facts, files)


def add_facts(directory: Path, facts: Mapping[str, Any]) -> None:
    """Put further facts into a manifest, or other values for those it has, without reading the files.

    Raises:
        Damaged: the manifest is missing or damaged.
    """
    tree = _read(directory)
    _write(directory, facts_of(tree) | dict(facts), tree["files"])


def read_manifest(directory: Path) -> dict[str, Any]:
    """The facts of a folder all of whose files are as they were written.

    Raises:
        Damaged: a file, or the manifest itself, is missing, cut short, altered or cannot be read.
    """
    tree = _read(directory)
    for name, expected in tree["files"].items():
        try:
            with (directory / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
        except FileNotFoundError:
            raise _damaged(directory / name, "it is missing") from None
        except OSError as error:
            raise _damaged(directory / name, f"it cannot be read: {error.strerror}") from error
        if size != expected["bytes"]:
            raise _damaged(directory / name, f"{size} bytes instead of {expected['bytes']}")
        if digest != expected["sha256"]:
            raise _damaged(directory / name, "its sha256 is not the one it was written with")
    return facts_of(tree)


def parse_manifest(content: bytes, where: str | Path) -> dict[str, Any]:
    """The whole of a manifest from its bytes, exactly as they were written.

    Args:
        content: of manifest.json.
        where: what to call it when it is damaged.

    Raises:
        Damaged: a byte of it is missing or altered, or it is of another format.
    """
    try:
        tree = json.loads(content)
        if tree["format_version"] != FORMAT_VERSION:
            raise _damaged(where, f"format {tree['format_version']}, this version reads {FORMAT_VERSION}")
        body = {key: value for key, value in tree.items() if key != "sha256"}
        # Compared as bytes, so that no altered byte is read over, be it a blank.
        if content != _sealed(body):
            raise _damaged(where, "its sha256 is not the one it was written with")
        if any(name in (".", "..") or "/" in name or "\\" in name for name in tree["files"]):
            raise _damaged(where, "it names a file outside of its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise _damaged(where, f"{len(content)} bytes that are no manifest") from error
    return tree


def facts_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What the writer of a parsed manifest put into it."""
    return {key: value for key, value in tree.items() if key not in _OWN_KEYS}


def _read(directory: Path) -> dict[str, Any]:
    try:
        content = (directory / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise _damaged(directory / MANIFEST, "it is missing") from None
    except OSError as error:
        raise _damaged(directory / MANIFEST, f"it cannot be read: {error.strerror}") from error
    return parse_manifest(content, directory / MANIFEST)


def _write(directory: Path, facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    if clash := set(facts) & set(_OWN_KEYS):
        raise ValueError(f"{sorted(clash)} are the manifest's own")
    content = _sealed({"format_version": FORMAT_VERSION, **facts, "files": files})
    with replacing(directory / MANIFEST) as part:
        part.write_bytes(content)


def _sealed(body: Mapping[str, Any]) -> bytes:
    """A manifest's bytes, its own sha256 last: facts must not be altered unseen either."""
    digest = hashlib.sha256(json.dumps(body, indent=2).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=2) + "\n").encode()


def _damaged(where: str | Path, reason: str) -> Damaged:
    return Damaged(f"{where} is damaged ({reason}): use another checkpoint or another copy of this one")
