"""What cannot fit into memory is refused before it is allocated."""

import pytest

from diffusion import memory_limit
from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.memory_limit import check_memory, machine_memory
from diffusion.networks.build import build_network, check_training_memory


def test_this_machine_has_a_plausible_amount_of_memory():
    assert 2**28 < machine_memory() < 2**50


def test_more_than_there_is_is_refused_with_both_numbers():
    check_memory(1e9, "a table", "give less", available=10**9)
    with pytest.raises(InputError, match=r"^a table needs 2 GB of memory, and there are 1 GB: give less$"):
        check_memory(2e9, "a table", "give less", available=10**9)


def test_nothing_is_refused_where_the_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: None)
    check_memory(1e30, "a table", "give less")


@pytest.mark.parametrize(
    ("values", "shape", "flag"),
    [
        ({"network.hidden_size": 65536, "network.num_blocks": 1000}, (2,), "--network.hidden-size 65536"),
        ({"network.kind": "unet", "network.base_channels": 4096, "network.num_res_blocks": 50}, (3, 64, 64),
         "--network.base-channels 4096"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_fit_is_refused_before_it_is_built(values, shape, flag):
    with pytest.raises(InputError, match=flag) as caught:
        build_network(Config().with_values(values), shape)
    assert "of memory" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("training.batch_size", 10**9), ("metrics.num_samples", 10_000_000)]
)
def test_numbers_of_examples_that_cannot_fit_are_refused(name, value):
    config = Config().with_values({name: value})
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} {value}: "):
        check_training_memory(config, (3, 256, 256))


def test_training_needs_more_memory_than_the_weights_alone(monkeypatch):
    config = Config().with_values({"network.hidden_size": 512})
    weights = sum(weight.numel() for weight in build_network(config, (2,)).parameters())
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: 10 * weights)
    build_network(config, (2,))
    with pytest.raises(InputError, match="with its gradients"):
        check_training_memory(config, (2,))
