# ruff: noqa: I001  (sorting would put every name on a line of its own)
"""Sweeps and training on Ray, tracked in MLflow: commands, and `run_sweep` and `run_training` for Python."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workflows.api import run_sweep as run_sweep, run_training as run_training
    from workflows.cli.search_space import SearchSpace as SearchSpace
    from workflows.results import (
        Champion as Champion,
        RunFailed as RunFailed,
        SweepResult as SweepResult,
        TrainingResult as TrainingResult,
    )
else:
    from diffusion.lazy import lazy_names

    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "workflows.api": "run_sweep run_training",
            "workflows.cli.search_space": "SearchSpace",
            "workflows.results": "Champion RunFailed SweepResult TrainingResult",
        },
    )
