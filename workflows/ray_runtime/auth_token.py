"""Ray's token, which lets whoever has it run code in a session: only its owner may read the file."""

import os
import secrets
import stat
from pathlib import Path

from diffusion.errors import InputError
from diffusion.files import os_reason, part_name
from workflows.environment import ray_token_file

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_token_private(*, create: bool) -> str | None:
    """Make sure, before Ray starts, that no other user of this machine can read the token.

    Ray itself would write a new token for everyone to read.

    Args:
        create: whether to create a token if there is none, as for a new session.

    Returns:
        A line for the user if others could read the token until now, else None.

    Raises:
        InputError: the file cannot be created, or belongs to another user.
    """
    path = ray_token_file()
    if path is None:
        return None
    try:
        if create and not path.exists():
            _create(path)
        if not path.exists() or not path.stat().st_mode & _OTHERS:
            return None
        path.chmod(0o600)
    except OSError as error:
        raise InputError(
            f"Ray's token {path} cannot be made private ({os_reason(error)}): fix its permissions, or set "
            "RAY_AUTH_TOKEN_PATH to a file of your own"
        ) from error
    return (
        f"{path} gave access to this user's Ray sessions and could be read by others; now only you can. If "
        "others use this machine, remove it once no session is running: a new one is made"
    )


def _create(path: Path) -> None:
    """Write a new token, which appears complete and private, unless another process is faster."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(part_name(path.name))
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))  # as Ray makes it
        try:
            os.link(part, path)
        except FileExistsError:
            pass
    finally:
        part.unlink(missing_ok=True)
