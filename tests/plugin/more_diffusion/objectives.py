"""An objective of a sweep."""

from diffusion.metrics import Objective

MEAN_SHIFT = Objective(
    metric="sample/mean_shift",
    needs_samples=True,
    warning="warning: mean_shift sees the mean of the samples only",
)
