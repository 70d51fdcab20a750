"""Two small models with random weights, their ONNX files, and ways to alter such a file."""

from pathlib import Path

import onnx
import pytest
import torch

import export
from diffusion.checkpoints import TrainedModel
from diffusion.config import Config, NetworkConfig, SamplerConfig, ScheduleConfig
from diffusion.data import DataSpec
from diffusion.networks import build_network
from export.sampler import Sampler
from export.to_onnx import export_onnx

torch.set_num_threads(1)


def make_model(data, sampler, seed=0, num_train_timesteps=20):
    """A denoiser that has learnt nothing, but whose output is not zero as a fresh one's is."""
    config = Config(
        schedule=ScheduleConfig(num_train_timesteps=num_train_timesteps, beta_start=0.01, beta_end=0.3),
        network=NetworkConfig(
            hidden_size=32, num_blocks=2, time_embedding_size=16, data_embedding_size=8, dropout=0.1
        ),
        sampler=sampler,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(config, data.shape)
        torch.nn.init.normal_(network.outward.weight, std=0.1)
        torch.nn.init.normal_(network.outward.bias, std=0.1)
    provenance = {"run_id": "abc123", "git_revision": "0123456", "metrics": {"val/elbo_window": 1.25}}
    return TrainedModel(config, data, network.eval().requires_grad_(False), provenance)


IMAGES = DataSpec(
    name="digits",
    kind="image",
    shape=(1, 8, 8),
    mean=[[[5.0]]],
    std=[[[4.0]]],
    range=(0.0, 16.0),
    columns=None,
    clip=(-1.25, 2.75),
    log_snr_window=(-8.0, 5.0),
    fingerprint="f" * 64,
)
POINTS = DataSpec(
    name="heart",
    kind="points",
    shape=(2,),
    mean=[1.0, -2.0],
    std=[0.5, 3.0],
    range=None,
    columns=("height", "weight"),
    clip=(-2.5, 2.5),
    log_snr_window=(-8.0, 5.0),
    fingerprint="0" * 64,
)


@pytest.fixture(scope="session")
def image_model():
    """Deployed with DDPM over half of the timesteps, and clipped; no choice but `spacing` is a default."""
    return make_model(IMAGES, SamplerConfig(name="ddpm", num_steps=10, variance="beta"))


@pytest.fixture(scope="session")
def point_model():
    """Deployed with DDIM, some fresh noise and no clipping."""
    return make_model(POINTS, SamplerConfig(name="ddim", num_steps=8, eta=0.5, spacing="leading", clip=False))


@pytest.fixture(scope="session", name="make_model")
def _make_model():
    return make_model


@pytest.fixture(scope="session")
def image_export(image_model):
    """(bytes, parity cases) of the image model."""
    return export_onnx(image_model)


@pytest.fixture(scope="session")
def image_onnx(image_export):
    return image_export[0]


@pytest.fixture(scope="session")
def point_onnx(point_model):
    return export_onnx(point_model)[0]


@pytest.fixture(scope="session")
def image_sampler(image_onnx):
    return Sampler(image_onnx, provider="cpu")


@pytest.fixture(scope="session")
def point_sampler(point_onnx):
    return Sampler(point_onnx, provider="cpu")


@pytest.fixture(scope="session")
def image_file(image_onnx, tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "sampler.onnx"
    path.write_bytes(image_onnx)
    return path


@pytest.fixture(scope="session")
def point_file(point_onnx, tmp_path_factory):
    path = tmp_path_factory.mktemp("points") / "sampler.onnx"
    path.write_bytes(point_onnx)
    return path


def metadata_of(content):
    return {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}


def with_metadata(content, metadata):
    """The same graph with other metadata."""
    proto = onnx.load_from_string(content)
    onnx.helper.set_model_props(proto, metadata)
    return proto.SerializeToString()


@pytest.fixture(scope="session", name="metadata_of")
def _metadata_of():
    return metadata_of


@pytest.fixture(scope="session", name="with_metadata")
def _with_metadata():
    return with_metadata


def shift_output(proto, amount):
    """Every output larger by `amount`: an error whose size is known."""
    proto = _rename_output(proto, "raw")
    proto.graph.initializer.append(onnx.helper.make_tensor("shift", onnx.TensorProto.FLOAT, [], [amount]))
    proto.graph.node.append(onnx.helper.make_node("Add", ["raw", "shift"], ["model_output"]))
    return proto


def first_for_all(proto):
    """Every example gets the first one's output: right at batch 1 only."""
    zero = onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT, [], [0.0])
    index = onnx.helper.make_tensor("index", onnx.TensorProto.INT64, [1], [0])
    proto = _rename_output(proto, "raw")
    proto.graph.initializer.extend([zero, index])
    proto.graph.node.extend(
        [
            onnx.helper.make_node("Gather", ["raw", "index"], ["first"], axis=0),
            onnx.helper.make_node("Mul", ["raw", "zero"], ["zeros"]),
            onnx.helper.make_node("Add", ["first", "zeros"], ["model_output"]),
        ]
    )
    return proto


def forget_timestep(proto):
    """The network is told t = 0 whatever t is."""
    proto = _copy(proto)
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            if name == "t":
                node.input[place] = "no_time"
    zero = onnx.helper.make_tensor("no", onnx.TensorProto.INT64, [], [0])
    proto.graph.initializer.append(zero)
    proto.graph.node.insert(0, onnx.helper.make_node("Mul", ["t", "no"], ["no_time"]))
    return proto


def _rename_output(proto, name):
    proto = _copy(proto)
    for node in proto.graph.node:
        for place, output in enumerate(node.output):
            if output == "model_output":
                node.output[place] = name
    return proto


def _copy(proto):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


@pytest.fixture(scope="session", name="broken")
def _broken():
    """Ways to break a graph, each ModelProto -> ModelProto."""
    return {
        "shifted": shift_output,
        "forgets the timestep": forget_timestep,
        "gives all the first one's output": first_for_all,
    }


@pytest.fixture(scope="session")
def repository():
    return Path(export.__file__).resolve().parent.parent
