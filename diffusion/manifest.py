"""manifest.json: size and sha256 of every file in a folder, to detect damage before the files are used."""

import errno
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion.errors import InputError
from diffusion.files import replacing, sync
from diffusion.json_values import fits

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_OWN_KEYS = ("format_version", "files", "sha256")
# Errors that say nothing about a file, which may be whole.
_NOT_OF_THE_FILE = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class DamagedError(InputError):
    """A folder does not match its manifest; the message names the file and what is wrong with it."""


def write_manifest(directory: Path, facts: Mapping[str, Any], names: Sequence[str] | None = None) -> None:
    """Write manifest.json for files of a folder, and sync them to disk.

    Args:
        directory: the folder, complete except for its manifest.
        facts: JSON values to store in the manifest as well, such as the update and the objective.
        names: names of the files; by default all, of a folder without subfolders.
    """
    files = {}
    for name in sorted(path.name for path in directory.iterdir()) if names is None else names:
        if name == MANIFEST:
            continue
        path = directory / name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"sha256": digest, "bytes": file.tell()}
        sync(path)
    _write(directory, facts, files)


def add_facts(directory: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to a manifest, or change those it has, without reading the other files.

    Raises:
        DamagedError: the manifest is missing or damaged.
    """
    tree = _read(directory)
    _write(directory, facts_of(tree) | dict(facts), tree["files"])


def read_manifest(directory: Path) -> dict[str, Any]:
    """Verify every file of a folder against its manifest and return the facts stored there.

    Raises:
        DamagedError: a file, or the manifest itself, is missing, cut short, altered or cannot be read.
        OSError: a file cannot be opened for a reason that says nothing about it, such as its permissions or
            too many open files.
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
            raise _unreadable(directory / name, error) from error
        if size != expected.get("bytes"):
            raise _damaged(directory / name, f"{size} bytes instead of {expected.get('bytes')}")
        if digest != expected.get("sha256"):
            raise _damaged(directory / name, "its sha256 has changed since it was written")
    return facts_of(tree)


def parse_manifest(content: bytes, where: str | Path) -> dict[str, Any]:
    """Parse and verify the content of a manifest.json.

    Args:
        content: the bytes of the file.
        where: path or address of the file, for the error message.

    Returns:
        The whole manifest: "format_version", "files", "sha256" and the facts.

    Raises:
        DamagedError: a byte is missing or altered, or the format version is another one.
    """
    try:
        tree = json.loads(content)
        if tree["format_version"] != FORMAT_VERSION:
            raise _damaged(where, f"format {tree['format_version']}, this version reads {FORMAT_VERSION}")
        body = {key: value for key, value in tree.items() if key != "sha256"}
        # Comparing bytes, not values, also detects altered white space.
        if content != _serialised(body):
            raise _damaged(where, "its sha256 has changed since it was written")
        if not fits(tree["files"], dict[str, dict[str, int | str]]):
            raise _damaged(where, "its list of files is none")
        if any(name in (".", "..") or "/" in name or "\\" in name for name in tree["files"]):
            raise _damaged(where, "it names a file outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise _damaged(where, f"its {len(content)} bytes are not a manifest") from error
    return tree


def facts_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a parsed manifest: everything except its own keys."""
    return {key: value for key, value in tree.items() if key not in _OWN_KEYS}


def _read(directory: Path) -> dict[str, Any]:
    try:
        content = (directory / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise _damaged(directory / MANIFEST, "it is missing") from None
    except OSError as error:
        raise _unreadable(directory / MANIFEST, error) from error
    return parse_manifest(content, directory / MANIFEST)


def _write(directory: Path, facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    if clash := set(facts) & set(_OWN_KEYS):
        raise ValueError(f"{sorted(clash)} are reserved for the manifest itself")
    content = _serialised({"format_version": FORMAT_VERSION, **facts, "files": files})
    with replacing(directory / MANIFEST) as part:
        part.write_bytes(content)


def _serialised(body: Mapping[str, Any]) -> bytes:
    """Serialise a manifest and append its own sha256, so that altered facts are detected too."""
    digest = hashlib.sha256(json.dumps(body, indent=2).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=2) + "\n").encode()


def _unreadable(path: Path, error: OSError) -> Exception:
    """What to raise if a file cannot be read."""
    if error.errno in _NOT_OF_THE_FILE:
        return error
    return _damaged(path, f"it cannot be read: {error.strerror}")


def _damaged(where: str | Path, reason: str) -> DamagedError:
    return DamagedError(f"{where} is damaged ({reason}): use another checkpoint or another copy of this one")
