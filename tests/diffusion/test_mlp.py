import pytest
import torch

from diffusion.embeddings import sinusoidal_embedding
from diffusion.mlp import JointMLP, ResidualBlock
from diffusion.networks import build_network


def network(shape, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_blocks": 2, "time_embedding_size": 8, "data_embedding_size": 6}
    return randomised(JointMLP(shape, **(sizes | options)))


def randomised(module):
    """The last layer starts at zero, which would hide everything before it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return module.eval()


@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (1, 8, 8), (3, 4, 6)])
def test_output_has_the_inputs_shape(shape):
    for batch in (1, 7):
        assert network(shape)(torch.randn(batch, *shape), torch.arange(batch)).shape == (batch, *shape)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
def test_a_fresh_network_predicts_no_noise(shape):
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


def by_hand(net, x, columns, t):
    hidden = net.inward(torch.cat([sinusoidal_embedding(t * net.timestep_scale, 8), *columns], dim=1))
    for block in net.blocks:
        hidden = block(hidden)
    return net.outward(hidden).reshape(x.shape)


def test_images_go_in_as_they_are_beside_the_embedded_timestep():
    net = network((1, 3, 3), timestep_scale=2.5)
    x, t = torch.randn(4, 1, 3, 3), torch.tensor([0, 3, 50, 99])
    torch.testing.assert_close(net(x, t), by_hand(net, x, [x.flatten(1)], t))


@pytest.mark.parametrize("raw", [True, False])
def test_points_go_in_as_embedded_coordinates_with_or_without_the_raw_ones(raw):
    net = network((2,), raw_coordinates=raw, data_embedding_scale=7.0)
    x, t = torch.randn(4, 2), torch.tensor([0, 3, 50, 99])
    columns = [sinusoidal_embedding(7.0 * x[:, 0], 6), sinusoidal_embedding(7.0 * x[:, 1], 6)]
    torch.testing.assert_close(net(x, t), by_hand(net, x, columns + [x] * raw, t))


def test_without_raw_coordinates_the_output_is_bounded_and_with_them_it_is_not():
    """Trap 3 of design.md: a bounded output lets unclipped sampling diverge."""
    x = torch.tensor([[10.0, -10.0], [1e5, -1e5]])
    t = torch.tensor([3, 3])
    bounded, unbounded = (network((2,), raw_coordinates=raw)(x, t).abs().amax(dim=1) for raw in (False, True))
    assert bounded[1] < 20.0 * bounded[0] + 20.0
    assert unbounded[1] > 1000.0 * unbounded[0]


def test_examples_do_not_see_each_other():
    net = network((2,))
    x, t = torch.randn(6, 2), torch.arange(6)
    torch.testing.assert_close(net(x, t)[2:3], net(x[2:3], t[2:3]))


def test_the_timestep_matters():
    net = network((2,))
    x = torch.randn(1, 2).expand(2, 2)
    one, other = net(x, torch.tensor([1, 5]))
    assert (one - other).abs().max() > 1e-3


def test_dropout_acts_in_training_alone():
    net = network((2,), dropout=0.5)
    x, t = torch.randn(8, 2), torch.arange(8)
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


def built(small_config, total, rescale):
    config = small_config(schedule={"num_train_timesteps": total}, network={"rescale_timesteps": rescale})
    return randomised(build_network(config, (2,)))


def test_rescaled_timesteps_make_T_invisible_to_the_embedding(small_config):
    """Step t of T is shown as t * 1000 / T: the 7th of 100 is the 70th of 1000, the 3rd of 10 the 300th."""
    x = torch.randn(2, 2)
    reference = built(small_config, 1000, True)(x, torch.tensor([70, 300]))
    for total, t in ((100, [7, 30]), (10, None), (500, [35, 150])):
        if t is not None:
            torch.testing.assert_close(built(small_config, total, True)(x, torch.tensor(t)), reference)
    torch.testing.assert_close(built(small_config, 10, True)(x[1:], torch.tensor([3])), reference[1:])


def test_without_rescaling_the_timestep_itself_is_embedded(small_config):
    x, t = torch.randn(2, 2), torch.tensor([3, 9])
    torch.testing.assert_close(built(small_config, 10, False)(x, t), built(small_config, 1000, False)(x, t))


def test_the_network_has_the_sizes_of_its_config(small_config):
    sizes = {"hidden_size": 24, "num_blocks": 3, "time_embedding_size": 10, "data_embedding_size": 6}
    config = small_config(network=sizes | {"dropout": 0.25})
    points, image = build_network(config, (2,)), build_network(config, (1, 4, 4))
    assert points.inward.in_features == 10 + 2 * (6 + 1)
    assert image.inward.in_features == 10 + 16
    assert len(points.blocks) == 3
    assert {block.dropout for block in points.blocks} == {0.25}
    assert (points.outward.in_features, points.outward.out_features) == (24, 2)


def test_every_parameter_learns(small_config):
    net = network((2,)).train()
    net(torch.randn(16, 2), torch.arange(16)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0.0, name
