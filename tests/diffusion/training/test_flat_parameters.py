import torch
from torch import nn

from diffusion.training import flat_parameters
from diffusion.training.flat_parameters import FlatParameters


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Linear(4, 5, dtype=torch.float64), nn.Linear(5, 2), nn.Linear(2, 2)]
    layers[3].requires_grad_(False)
    return nn.Sequential(*layers)


def test_the_parameters_are_views_of_few_tensors(monkeypatch):
    monkeypatch.setattr(flat_parameters, "_MAX_VALUES", 10)
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flat = FlatParameters(net)
    # Two weights of more than ten values, and the rest of each dtype.
    assert sorted(len(tensor.reshape(-1)) for tensor in flat.tensors) == [5, 12, 16, 20]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for tensor in flat.tensors:
        tensor += 1.0
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name] + (0.0 if name.startswith("3") else 1.0))


def test_split_is_the_reverse_of_join():
    net = network()
    flat = FlatParameters(net)
    values = [torch.randn_like(weight) for weight in net.parameters() if weight.requires_grad]
    assert all(torch.equal(*pair) for pair in zip(values, flat.split(flat.join(values)), strict=True))


def test_gradients_are_taken_away_and_missing_ones_are_zero():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    flat = FlatParameters(net)
    net[0](torch.ones(1, 2)).sum().backward()
    expected = torch.cat([net[0].weight.grad.flatten(), net[0].bias.grad, torch.zeros(6)])
    assert torch.equal(flat.take_gradients()[0], expected)
    assert all(weight.grad is None for weight in net.parameters())


def test_the_optimizers_state_is_that_of_an_optimizer_of_the_parameters():
    """Also in the other direction, and for a parameter that has had no gradient."""
    nets = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    flat = FlatParameters(nets[0])
    ours = torch.optim.AdamW(flat.tensors, lr=0.1)
    theirs = torch.optim.AdamW(nets[1].parameters(), lr=0.1)
    assert flat.split_state(ours.state_dict())["state"] == {}
    for net in nets:
        net[0](torch.ones(1, 2)).square().sum().backward()
    flat.tensors[0].grad = flat.take_gradients()[0]
    ours.step()
    theirs.step()
    split, expected = flat.split_state(ours.state_dict()), theirs.state_dict()
    assert split["param_groups"][0]["params"] == expected["param_groups"][0]["params"]
    for number, state in expected["state"].items():
        assert all(torch.equal(value, split["state"][number][name]) for name, value in state.items())
    joined, before = flat.join_state(expected), ours.state_dict()
    assert joined["param_groups"][0]["params"] == before["param_groups"][0]["params"]
    for name, value in before["state"][0].items():
        assert torch.equal(joined["state"][0][name], value)
