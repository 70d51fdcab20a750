"""Where a model comes from."""

import subprocess
from pathlib import Path
from typing import Any

from diffusion.data import Dataset


def provenance(run_id: str, dataset: Dataset) -> dict[str, Any]:
    """What every model of a run keeps: MLflow's run id, the code's revision, the data's fingerprint."""
    return {
        "run_id": run_id,
        "git_revision": _git_revision(),
        "data_fingerprint": dataset.spec.fingerprint,
    }


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
