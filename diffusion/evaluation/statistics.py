"""Differences in single statistics: marginals and correlations of columns, spectra and colours of images."""

import torch
from torch import Tensor

from diffusion.devices import to_float64
from diffusion.evaluation.distances import Estimate, SampleMetric, by_name

_SMALLEST_POWER = 1e-3  # added to a spectrum's power, in squared levels of 256


def column_ks(x: Tensor, y: Tensor) -> tuple[Estimate, Estimate, int]:
    """Kolmogorov-Smirnov statistics of the columns: the largest, their mean, and the largest one's column.

    The statistic is the largest difference of two distribution functions, 0 to 1. Its standard error is that
    of the difference where it is largest.

    Args:
        x: [n, ...]; examples are flattened.
        y: [m, ...].
    """
    x, y = to_float64(x).flatten(1), to_float64(y).flatten(1)
    differences, signed_x, signed_y = [], [], []
    for column_x, column_y in zip(x.T, y.T, strict=True):
        both = torch.cat([column_x, column_y]).sort().values
        below_x, below_y = (
            torch.searchsorted(column.sort().values, both, right=True) / len(column)
            for column in (column_x, column_y)
        )
        difference = below_x - below_y
        at = difference.abs().argmax()
        sign = difference[at].sign()
        differences.append(difference[at].abs())
        signed_x.append(sign * (column_x <= both[at]))
        signed_y.append(sign * (column_y <= both[at]))
    all_differences, all_x, all_y = torch.stack(differences), torch.stack(signed_x), torch.stack(signed_y)
    worst = int(all_differences.argmax())
    return (
        Estimate(float(all_differences[worst]), _error_of_means(all_x[worst], all_y[worst])),
        Estimate(float(all_differences.mean()), _error_of_means(all_x.mean(0), all_y.mean(0))),
        worst,
    )


def correlation_difference(x: Tensor, y: Tensor) -> Estimate:
    """Largest absolute difference of two correlation matrices; 0 for a single column.

    The standard error is that of the entry where it is largest, by the delta method.

    Args:
        x: [n, ...] with n >= 2; examples are flattened. A constant column has correlation 0.
        y: [m, ...] likewise.
    """
    standardised = []
    for each in (x, y):
        rows = to_float64(each).flatten(1)
        std = rows.std(dim=0, correction=0)
        standardised.append((rows - rows.mean(dim=0)) / std.where(std > 0.0, torch.inf))
    one, other = (rows.T @ rows / len(rows) for rows in standardised)
    difference = (one - other).abs().fill_diagonal_(0.0)
    i, j = divmod(int(difference.argmax()), len(difference))
    influences = []
    for rows, correlation in zip(standardised, (one[i, j], other[i, j]), strict=True):
        u, v = rows[:, i], rows[:, j]
        influences.append(u * v - correlation * (u.square() + v.square()) / 2.0)
    return Estimate(float(difference[i, j]), _error_of_means(*influences))


def spectrum_distance(x: Tensor, y: Tensor) -> Estimate:
    """Root mean square difference of the mean log power of two sets of images by radius, in nats.

    The power spectrum of each image and channel is averaged over rings of equal spatial frequency, its
    logarithm over the images; the root mean square is over channels and rings, the constant part left out.
    Blur lowers the outer rings, grain raises them. The standard error is by the delete-one influence of each
    image, to first order.

    Args:
        x: [n, C, H, W] images, 0 to 255.
        y: [m, C, H, W] likewise.
    """
    spectra = [log_spectra(to_float64(each)) for each in (x, y)]
    difference = spectra[0].mean(dim=0) - spectra[1].mean(dim=0)
    distance = float(difference.square().mean().sqrt())
    if distance == 0.0:
        return Estimate(0.0, 0.0)
    weights = difference / (len(difference) * distance)
    return Estimate(distance, _error_of_means(*(each @ weights for each in spectra)))


def log_spectra(images: Tensor) -> Tensor:
    """Log power of each image by channel and ring: [n, C * rings]."""
    height, width = images.shape[2:]
    power = torch.fft.rfft2(images, norm="ortho").abs().square()
    vertical = torch.fft.fftfreq(height, device=images.device)[:, None]
    horizontal = torch.fft.rfftfreq(width, device=images.device)[None, :]
    num_rings = max(1, min(height, width) // 2)
    ring = ((vertical.square() + horizontal.square()).sqrt() * 2.0 * num_rings).round().long()
    ring = ring.clamp(max=num_rings).flatten()
    # Columns between the first and the last stand for their mirror images too.
    weight = torch.full((width // 2 + 1,), 2.0, dtype=images.dtype, device=images.device)
    weight[0] = 1.0
    if width % 2 == 0:
        weight[-1] = 1.0
    weights = weight.expand(height, -1).flatten()
    sums = torch.zeros(*images.shape[:2], num_rings + 1, dtype=images.dtype, device=images.device)
    sums.index_add_(2, ring, power.flatten(2) * weights)
    counts = torch.zeros(num_rings + 1, dtype=images.dtype, device=images.device)
    counts.index_add_(0, ring, weights)
    return (sums / counts + _SMALLEST_POWER).log()[:, :, 1:].flatten(1)


def colour_spread_ratio(x: Tensor, y: Tensor) -> Estimate:
    """Largest absolute log ratio, over channels, of the standard deviations of the images' mean colours.

    0 if each channel's mean over an image varies among the samples as much as in the reference; ln 2 if it
    varies twice or half as much in one channel.

    Args:
        x: [n, C, H, W] images with n >= 2.
        y: [m, C, H, W] likewise.
    """
    colours = [to_float64(each).mean(dim=(2, 3)) for each in (x, y)]
    centred = [colour - colour.mean(dim=0) for colour in colours]
    variances = [each.square().mean(dim=0).clamp(min=1e-12) for each in centred]
    ratios = (variances[0] / variances[1]).log() / 2.0
    channel = int(ratios.abs().argmax())
    influences = (
        each[:, channel].square() / variance[channel] / 2.0
        for each, variance in zip(centred, variances, strict=True)
    )
    return Estimate(float(ratios[channel].abs()), _error_of_means(*influences))


def _error_of_means(x: Tensor, y: Tensor) -> float:
    """Standard error of the difference of two independent means."""
    return float((to_float64(x).var() / len(x) + to_float64(y).var() / len(y)).sqrt())


def _columns(x: Tensor, y: Tensor) -> dict[str, float]:
    largest, mean, worst = column_ks(x, y)
    correlation = correlation_difference(x, y)
    estimates = {"column_ks": largest, "column_ks_mean": mean, "correlation": correlation}
    return by_name(estimates) | {"worst_column": float(worst)}


def _images(x: Tensor, y: Tensor) -> dict[str, float]:
    return by_name({"spectrum": spectrum_distance(x, y), "colour_spread": colour_spread_ratio(x, y)})


COLUMNS = SampleMetric(_columns, ("points",))
IMAGE_STATISTICS = SampleMetric(_images, ("image",), "pixels")
