"""Random geometric changes of training images, of which the network is told, so that samples have none."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_SCALE_STD, _STRETCH_STD, _SHIFT_STD = 0.2, 0.2, 0.125  # in powers of two, and of the image's side


def draw_augmentations(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """Draw the changes of images: float32 [count, AUGMENTATION_SIZE].

    They are described by flips left to right and upside down, the scale, the rotation (2 values), a stretch
    (2) and a shift (2). All are 0 for an image that is left as it is.

    Each of the six changes is made with the given probability, independently of the others; a flip then is
    one of both orientations, so that it is seen half as often.

    The description determines the change, so that the network can tell what is not in the data. A stretch
    along a line is described by twice the angle of the line, since it is the same in both directions of it.

    Args:
        count: number of images.
        probability: probability of each change.
        generator: source of the random numbers; the result is on its device.

    Source: EDM, arXiv:2206.00364, Appendix F.2, with the changes and their sizes there.
    """
    device = generator.device
    uniform = torch.rand(count, 10, generator=generator, device=device)
    normal = torch.randn(count, 4, generator=generator, device=device)
    made = (uniform[:, :6] < probability).to(normal.dtype)
    flips = made[:, :2] * (uniform[:, 6:8] < 0.5)
    scale = made[:, 2:3] * normal[:, :1] * _SCALE_STD
    angle = made[:, 3] * (2.0 * uniform[:, 8] - 1.0) * math.pi
    stretch = made[:, 4] * normal[:, 1] * _STRETCH_STD
    twice_line = 2.0 * math.pi * uniform[:, 9]
    shift = made[:, 5:6] * normal[:, 2:4] * _SHIFT_STD
    rotation = torch.stack([angle.cos() - 1.0, angle.sin()], dim=1)
    stretches = torch.stack([stretch * twice_line.cos(), stretch * twice_line.sin()], dim=1)
    return torch.cat([flips, scale, rotation, stretches, shift], dim=1)


def augment(images: Tensor, augmentations: Tensor, clip: tuple[float, float]) -> Tensor:
    """Change images as described; those with a description of zeros are returned as they are.

    Pixels are interpolated by cubic polynomials; beyond its edges an image goes on as its mirror image.

    Args:
        images: [batch, C, H, W], normalised.
        augmentations: [batch, AUGMENTATION_SIZE].
        clip: interval of the values of images, which cubic polynomials overshoot.

    Returns:
        [batch, C, H, W].
    """
    flips, scale, rotation, stretch, shift = augmentations.split([2, 1, 2, 2, 2], dim=1)
    # From a place in the changed image to one in the original: a matrix for each image.
    cos, sin = rotation[:, 0] + 1.0, rotation[:, 1]
    rotate = _matrices(cos, sin, -sin, cos)
    # exp of the symmetric matrix ln 2 [[p, q], [q, -p]], whose square is a multiple of the identity.
    p, q = (math.log(2.0) * stretch).unbind(dim=1)
    size = torch.hypot(p, q)
    ratio = torch.where(size > 0.0, torch.sinh(size) / size.clamp(min=1e-12), 1.0)
    cosh = torch.cosh(size)
    stretched = _matrices(cosh - ratio * p, -ratio * q, -ratio * q, cosh + ratio * p)
    flipped = torch.diag_embed(1.0 - 2.0 * flips)
    height, width = images.shape[-2:]
    # The grid goes from -1 to 1 along both sides, also of images that are not square.
    aspect = torch.tensor([[1.0, height / width], [width / height, 1.0]], device=images.device)
    matrix = torch.exp2(-scale)[..., None] * (flipped @ rotate @ stretched) * aspect
    offset = matrix @ (-2.0 * shift)[..., None]
    theta = torch.cat([matrix, offset], dim=2).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    changed = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    is_changed = (augmentations != 0.0).any(dim=1)[:, None, None, None]
    return torch.where(is_changed, changed.clip(*clip), images)


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Matrices [[a, b], [c, d]], [batch, 2, 2], of values [batch]."""
    return torch.stack([torch.stack([a, b], dim=1), torch.stack([c, d], dim=1)], dim=1)
