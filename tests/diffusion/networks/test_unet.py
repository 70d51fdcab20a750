"""The U-Net: image sizes, dependence on timestep and pixels, initialisation and checks of the config."""

import pytest
import torch

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.networks.build import build_network
from diffusion.networks.unet import UNet, UNetBlock, max_levels


def unet(shape=(1, 8, 8), **changes) -> UNet:
    options = {
        "base_channels": 8,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "time_embedding_size": 8,
    }
    torch.manual_seed(0)
    return UNet(shape, **{**options, **changes})


def activated(network: UNet) -> UNet:
    """The network in evaluation mode, with random weights in the layers that start at zero."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (4, 28, 28), (2, 15, 8), (1, 17, 31)])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_output_has_the_shape_of_the_input_for_any_image_size(shape, levels):
    levels = min(levels, max_levels(*shape[1:]))
    network = unet(shape, channel_multipliers=(1, 2, 2)[:levels])
    x = torch.randn(2, *shape)
    assert network(x, torch.tensor([0, 3])).shape == x.shape


def test_a_new_network_predicts_zero():
    assert not unet()(torch.randn(2, 1, 8, 8), torch.tensor([1, 5])).any()


def test_the_output_depends_on_image_and_timestep():
    network = activated(unet())
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        base = network(x, torch.tensor([3]))
        assert not torch.allclose(base, network(x, torch.tensor([4])))
        assert not torch.allclose(base, network(x + 0.1, torch.tensor([3])))


def test_every_block_depends_on_the_timestep():
    network = activated(unet())
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    with torch.no_grad():
        base = network(x, t)
        for name, module in network.named_modules():
            if name.endswith(".time"):
                module.weight.mul_(3.0)
                changed = network(x, t)
                module.weight.div_(3.0)
                assert not torch.allclose(base, changed), name


def test_only_blocks_with_attention_connect_distant_pixels():
    """The gradient of one corner of a block's output reaches the opposite corner only through attention."""
    for has_attention in (True, False):
        torch.manual_seed(0)
        block = UNetBlock(8, 8, 4, dropout=0.0, has_attention=has_attention).eval()
        # The averages of the norms connect all pixels as well.
        block.norm1, block.norm2 = torch.nn.Identity(), torch.nn.Identity()
        if has_attention:
            block.attention.norm = torch.nn.Identity()
            torch.nn.init.normal_(block.attention.outward.weight)
        x = torch.randn(1, 8, 12, 12, requires_grad=True)
        block(x, torch.randn(1, 4))[0, :, 0, 0].sum().backward()
        assert bool(x.grad[0, :, 11, 11].any()) is has_attention


def test_examples_of_a_batch_do_not_affect_each_other():
    network = activated(unet((1, 9, 11)))
    x, t = torch.randn(3, 1, 9, 11), torch.tensor([0, 5, 9])
    with torch.no_grad():
        together = network(x, t)
        alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_does_not_change_the_gradients():
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    gradients = []
    for checkpointing in (False, True):
        network = activated(unet(gradient_checkpointing=checkpointing)).train()
        network(x, t).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    ("values", "shape", "words"),
    [
        ({"network.channel_multipliers": (1, 2, 2, 2)}, (1, 8, 8), ["4 levels", "8x8", "1 to 2"]),
        ({}, (2,), ["only images", "mlp"]),
        ({}, (1, 7, 7), ["(1, 7, 7)", "8x8"]),
        ({}, (5, 16, 16), ["1 to 4 channels"]),
    ],
)
def test_a_u_net_that_does_not_fit_the_images_is_rejected(values, shape, words):
    config = Config().with_values({"network.kind": "unet", **values})
    with pytest.raises(InputError) as caught:
        build_network(config, shape)
    assert all(word in str(caught.value) for word in words)
