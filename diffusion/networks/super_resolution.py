"""A network that receives a low-resolution image besides the noisy one: the second of a cascade."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SuperResolution(nn.Module):
    """A U-Net whose input is the noisy image and, enlarged to the same size, the low-resolution one.

    The low-resolution image may have noise of its own, whose standard deviation the network is told: what a
    model sees in training are images of the data, and in a cascade samples of another model, which are less
    exact. Noise hides the difference.

    Args:
        unet: U-Net with twice the channels of an image as input, and a context whose first value is the
            standard deviation of the noise.
        factor: size of an image divided by that of the low-resolution one.

    Source: conditioning augmentation of Cascaded diffusion, arXiv:2106.15282.
    """

    def __init__(self, unet: nn.Module, factor: int) -> None:
        super().__init__()
        self.unet, self.factor = unet, float(factor)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        low_resolution: Tensor,
        noise_level: Tensor,
        *,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """Compute the network's prediction.

        Args:
            x: float32 [batch, C, H, W].
            t: int64 [batch], 0-based timesteps.
            low_resolution: float32 [batch, C, H / factor, W / factor], normalised like x_0, with its noise.
            noise_level: float32 [batch], standard deviation of that noise.
            augmentation: see `diffusion.networks.unet.UNet.forward`.

        Returns:
            float32 [batch, C, H, W].
        """
        return self._predict(x, t, None, low_resolution, noise_level, augmentation)

    def _predict(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None,
        low_resolution: Tensor,
        noise_level: Tensor,
        augmentation: Tensor | None,
    ) -> Tensor:
        enlarged = F.interpolate(low_resolution, scale_factor=self.factor, mode="bilinear")
        context = noise_level[:, None]
        if augmentation is not None:
            context = torch.cat([context, augmentation], dim=1)
        return self.unet(torch.cat([x, enlarged], dim=1), t, y, context=context)


class ConditionalSuperResolution(SuperResolution):
    """`SuperResolution` of a conditional model, which receives labels before the low-resolution image."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        low_resolution: Tensor,
        noise_level: Tensor,
        *,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """Compute the network's prediction; y: int64 [batch], labels, and the rest as above."""
        return self._predict(x, t, y, low_resolution, noise_level, augmentation)


def super_resolution_network(unet: nn.Module, factor: int, num_classes: int) -> SuperResolution:
    """The network that receives labels if there are classes; arguments as for `SuperResolution`."""
    return (ConditionalSuperResolution if num_classes else SuperResolution)(unet, factor)
