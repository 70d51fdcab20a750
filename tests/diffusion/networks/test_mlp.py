import itertools

import pytest
import torch

from diffusion.networks.build import build_network
from diffusion.networks.embeddings import sinusoidal_embedding
from diffusion.networks.mlp import JointMLP, ResidualBlock


def network(shape, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_blocks": 2, "time_embedding_size": 8, "data_embedding_size": 6}
    return randomised(JointMLP(shape, **(sizes | options)))


def randomised(module):
    """The module with random parameters: its last layer starts at zero, which would hide all others."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return module.eval()


@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (1, 8, 8), (3, 4, 6)])
def test_output_has_the_shape_of_the_input(shape):
    for batch in (1, 7):
        assert network(shape)(torch.randn(batch, *shape), torch.arange(batch)).shape == (batch, *shape)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
def test_a_new_network_predicts_zero(shape):
    fresh = JointMLP(shape, hidden_size=16, num_blocks=2, time_embedding_size=8, data_embedding_size=6)
    assert not fresh(torch.randn(4, *shape), torch.arange(4)).any()


def test_a_residual_block_is_x_plus_gelu_linear_layernorm():
    block = randomised(ResidualBlock(5, dropout=0.5))
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    normal = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normal = normal * block.norm.weight + block.norm.bias
    linear = normal @ block.linear.weight.T + block.linear.bias
    gelu = linear * 0.5 * (1.0 + torch.erf(linear / 2.0**0.5))
    torch.testing.assert_close(block(x), x + gelu)


def expected_output(net, x, columns, t):
    hidden = net.inward(torch.cat([sinusoidal_embedding(t * net.timestep_scale, 8), *columns], dim=1))
    for block in net.blocks:
        hidden = block(hidden)
    return net.outward(hidden).reshape(x.shape)


def test_images_are_concatenated_with_the_embedded_timestep_unchanged():
    net = network((1, 3, 3), timestep_scale=2.5)
    x, t = torch.randn(4, 1, 3, 3), torch.tensor([0, 3, 50, 99])
    torch.testing.assert_close(net(x, t), expected_output(net, x, [x.flatten(1)], t))


@pytest.mark.parametrize("raw", [True, False])
def test_points_are_embedded_with_or_without_the_raw_coordinates(raw):
    net = network((2,), raw_coordinates=raw, data_embedding_scale=7.0)
    x, t = torch.randn(4, 2), torch.tensor([0, 3, 50, 99])
    columns = [sinusoidal_embedding(7.0 * x[:, 0], 6), sinusoidal_embedding(7.0 * x[:, 1], 6)]
    torch.testing.assert_close(net(x, t), expected_output(net, x, columns + [x] * raw, t))


def test_the_first_layer_can_have_an_activation_and_the_last_a_normalised_input():
    """Both are off unless asked for, as in the models of versions that did not have them."""
    x, t = torch.randn(4, 1, 3, 3), torch.tensor([0, 3, 50, 99])
    for activation, norm in itertools.product((False, True), repeat=2):
        net = network((1, 3, 3), input_activation=activation, output_norm=norm)
        hidden = net.inward(torch.cat([sinusoidal_embedding(t, 8), x.flatten(1)], dim=1))
        hidden = net.blocks(torch.nn.functional.gelu(hidden) if activation else hidden)
        if norm:
            deviation = (hidden.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            hidden = (hidden - hidden.mean(1, keepdim=True)) / deviation * net.norm.weight + net.norm.bias
        torch.testing.assert_close(net(x, t), net.outward(hidden).reshape(x.shape))
        assert (activation or norm) == (not torch.equal(net(x, t), network((1, 3, 3))(x, t)))


def test_the_output_is_bounded_without_raw_coordinates_and_unbounded_with_them():
    """With a bounded output unclipped sampling can diverge, which is why raw coordinates are the default."""
    x = torch.tensor([[10.0, -10.0], [1e5, -1e5]])
    t = torch.tensor([3, 3])
    bounded, unbounded = (network((2,), raw_coordinates=raw)(x, t).abs().amax(dim=1) for raw in (False, True))
    assert bounded[1] < 20.0 * bounded[0] + 20.0
    assert unbounded[1] > 1000.0 * unbounded[0]


def test_examples_do_not_affect_each_other():
    net = network((2,))
    x, t = torch.randn(6, 2), torch.arange(6)
    torch.testing.assert_close(net(x, t)[2:3], net(x[2:3], t[2:3]))


def test_the_output_depends_on_the_timestep():
    net = network((2,))
    x = torch.randn(1, 2).expand(2, 2)
    one, other = net(x, torch.tensor([1, 5]))
    assert (one - other).abs().max() > 1e-3


def test_dropout_is_active_only_in_training():
    net = network((2,), dropout=0.5)
    x, t = torch.randn(8, 2), torch.arange(8)
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


def network_for(small_config, num_train_timesteps, rescale):
    config = small_config(
        schedule={"num_train_timesteps": num_train_timesteps}, network={"rescale_timesteps": rescale}
    )
    return randomised(build_network(config, (2,)))


def test_rescaled_timesteps_make_the_embedding_independent_of_T(small_config):
    """Timestep t of T is embedded as t * 1000 / T: 7 of 100 as 70 of 1000, and 3 of 10 as 300 of 1000."""
    x = torch.randn(2, 2)
    reference = network_for(small_config, 1000, True)(x, torch.tensor([70, 300]))
    for num_train_timesteps, t in ((100, [7, 30]), (500, [35, 150])):
        output = network_for(small_config, num_train_timesteps, True)(x, torch.tensor(t))
        torch.testing.assert_close(output, reference)
    torch.testing.assert_close(network_for(small_config, 10, True)(x[1:], torch.tensor([3])), reference[1:])


def test_without_rescaling_the_timestep_itself_is_embedded(small_config):
    x, t = torch.randn(2, 2), torch.tensor([3, 9])
    torch.testing.assert_close(
        network_for(small_config, 10, False)(x, t), network_for(small_config, 1000, False)(x, t)
    )


def test_the_network_has_the_sizes_of_its_config(small_config):
    sizes = {"hidden_size": 24, "num_blocks": 3, "time_embedding_size": 10, "data_embedding_size": 6}
    switches = {"input_activation": True, "output_norm": True}
    config = small_config(network=sizes | switches | {"dropout": 0.25})
    points, image = build_network(config, (2,)), build_network(config, (1, 4, 4))
    assert points.inward.in_features == 10 + 2 * (6 + 1)
    assert image.inward.in_features == 10 + 16
    assert len(points.blocks) == 3
    assert {block.dropout for block in points.blocks} == {0.25}
    assert (points.outward.in_features, points.outward.out_features) == (24, 2)
    assert isinstance(points.activation, torch.nn.GELU) and isinstance(points.norm, torch.nn.LayerNorm)


def test_every_parameter_receives_a_gradient(small_config):
    net = network((2,)).train()
    net(torch.randn(16, 2), torch.arange(16)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0.0, name
