"""Where a cluster keeps what must outlive its machines: RAY_DDPM_STORAGE, a bucket or a shared mount.

Imports neither torch, ray nor mlflow.
"""

import os
from pathlib import Path

STORAGE_VARIABLE = "RAY_DDPM_STORAGE"


def default_output_dir(*, buckets: bool) -> str:
    """The default of --output-dir: `runs`, or what all machines of a cluster see.

    Args:
        buckets: whether a bucket will do; if not, a folder of the head stands in for it.
    """
    storage = os.environ.get(STORAGE_VARIABLE)
    if not storage:
        return "runs"
    return storage if buckets or "://" not in storage else str(Path.home() / "runs")


def shared_location(directory: Path) -> str:
    """Where all machines see what belongs to a local folder: there, or in the cluster's bucket."""
    storage = os.environ.get(STORAGE_VARIABLE, "")
    return f"{storage.rstrip('/')}/{directory.name}" if "://" in storage else str(directory)
