"""Export of a U-Net of odd size with attention and colour; test_conditional_export.py has an even one."""

import math
from contextlib import contextmanager

import numpy as np
import onnxruntime
import pytest
import torch

from diffusion.config import Config, DataConfig
from diffusion.data.dataset import DataSpec
from diffusion.networks.build import build_network
from diffusion.training.checkpoints import TrainedModel
from export.sampler import Sampler
from export.session import open_session
from export.to_onnx import export_onnx


@contextmanager
def sizes_of_calls():
    """Sizes of the batches that sessions of ONNX Runtime run meanwhile."""
    sizes, run = [], onnxruntime.InferenceSession.run

    def counted(session, names, inputs, options):
        sizes.append(len(inputs["x"]))
        return run(session, names, inputs, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime.InferenceSession, "run", counted)
        yield sizes


def test_a_u_net_is_exported_and_passes_parity(tmp_path):
    channels, *_ = shape = (3, 9, 13)
    config = Config(data=DataConfig(name="digits")).with_values(
        {
            "network.kind": "unet",
            "network.base_channels": 8,
            "network.channel_multipliers": (1, 2),
            "network.attention_resolutions": (7,),
            "schedule.num_train_timesteps": 20,
        }
    )
    torch.manual_seed(0)
    network = build_network(config, shape)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    spec = DataSpec(
        name="test",
        kind="image",
        shape=shape,
        mean=[[[127.0]]] * channels,
        std=[[[60.0]]] * channels,
        range=(0.0, 255.0),
        columns=None,
        clip=(-2.2, 2.2),
        log_snr_window=(-8.0, 5.0),
        fingerprint="0" * 64,
    )
    model = TrainedModel(config, spec, network.eval().requires_grad_(False))
    content, cases = export_onnx(model)
    assert all(case.passed for case in cases)
    samples = Sampler(content, provider="cpu").sample(3, seed=1)
    assert samples.shape == (3, *shape) and samples.std() > 0
    assert samples.min() >= 0.0 and samples.max() <= 255.0
    opened, _ = open_session(content, "cpu")
    assert opened.get_session_options().intra_op_num_threads == 0, "all cores, however small the file"
    sizes = []
    Sampler(content, provider="cpu", threads=1).sample(
        400, num_steps=1, on_preview=lambda x0: sizes.append(len(x0))
    )
    assert sizes[0] == 2**14 // math.prod(shape) and sum(sizes) == 400, "activations stay in the cache"
    for count, part in ((2, 1), (3, 3), (8, 4)):
        expected = Sampler(content, provider="cpu", threads=1).sample(count, num_steps=2)
        with sizes_of_calls() as called:
            actual = Sampler(content, provider="cpu", threads=2).sample(count, num_steps=2)
        np.testing.assert_array_equal(actual, expected)
        assert set(called) == {part}, "batches are divided where that keeps both threads busy"

    model.save(tmp_path / "model")
    loaded = TrainedModel.load(tmp_path / "model")
    assert loaded.config == config, "tuples survive JSON"
