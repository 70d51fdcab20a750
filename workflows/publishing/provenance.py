"""Provenance: the command line, code, packages, hardware and data that a model comes from."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion.data.dataset import Dataset
from workflows.installation import git_state, hardware, package_versions
from workflows.redaction import redact_argument


def provenance(run_id: str, dataset: Dataset) -> dict[str, Any]:
    """Origin of a run's models: MLflow's run ID, the data's fingerprint, and `session_provenance`."""
    return {
        "run_id": run_id,
        "data_fingerprint": dataset.spec.fingerprint,
        **session_provenance(),
    }


def session_provenance() -> dict[str, Any]:
    """Origin of what this process computes, as plain values without secrets.

    Returns:
        `git_revision` of the code, and `git_clean`: whether no tracked file differs from it (None for both if
        the code is not in a git repository); `command`, `packages` and `hardware`.
    """
    revision, clean = git_state(Path(__file__))
    return {
        "git_revision": revision,
        "git_clean": clean,
        "command": command_line(sys.argv),
        "packages": package_versions(),
        "hardware": hardware(),
    }


def command_line(arguments: Sequence[str]) -> str:
    """A command line as it can be pasted into a shell, with keys and passwords in URIs replaced by ***."""
    return shlex.join([redact_argument(argument) for argument in arguments])
