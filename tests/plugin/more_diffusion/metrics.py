"""A metric of samples."""

import torch
from torch import Tensor

from diffusion.evaluation.distances import SampleMetric


def mean_shift(samples: Tensor, held_out: Tensor) -> dict[str, float]:
    """Distance between the means of samples and held-out data, and its standard error."""
    x, y = samples.flatten(1).double(), held_out.flatten(1).double()
    variance = x.var(dim=0).sum() / len(x) + y.var(dim=0).sum() / len(y)
    shift = torch.linalg.vector_norm(x.mean(dim=0) - y.mean(dim=0))
    return {"mean_shift": float(shift), "mean_shift_se": float(variance.sqrt())}


MEAN_SHIFT = SampleMetric(mean_shift, data_kinds=("points", "image"))
