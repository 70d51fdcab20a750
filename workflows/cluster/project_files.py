"""The project's files that a cluster's YAML names, from a checkout or from an installed wheel."""

import shutil
from pathlib import Path

from diffusion.errors import InputError
from workflows.cluster.config_file import read_cluster_file
from workflows.cluster.kinds import CLUSTER_KINDS

_PROJECT = Path(__file__).parents[2]  # a checkout, or the site-packages that the wheel is in
# In a wheel, what a checkout has beside the packages; see force-include in pyproject.toml.
_SHIPPED = Path(__file__).with_name("shipped")


def write_project(folder: Path) -> None:
    """Write what `ray up ray_cluster.yaml` and `ray submit` need into a new folder.

    These are the local paths in the file's `file_mounts`: the packages, the YAML files of both kinds of
    cluster, and what installs the packages on the machines.

    Raises:
        InputError: the folder is not empty, or cannot be written.
    """
    mounts = read_cluster_file(_source(CLUSTER_KINDS["aws"].example))["file_mounts"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty: give the path of a new folder")
        for name in (str(local) for local in mounts.values()):
            if not name.startswith("~"):
                _copy(_source(name), folder / name)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): give another folder") from error


def _source(name: str) -> Path:
    """Path of a file or folder of the project."""
    shipped = _SHIPPED / name
    return shipped if shipped.exists() else _PROJECT / name


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        # Without `shipped`, which a wheel made from the new folder would otherwise contain twice.
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", _SHIPPED.name))
    else:
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)
