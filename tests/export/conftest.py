"""Fixtures: two small models with random weights, their ONNX files, and ways to alter such a file."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import export
from benchmarks.javascript_runs import JAVASCRIPT, missing_packages
from diffusion.config import Config, NetworkConfig, SamplerConfig, ScheduleConfig
from diffusion.data.dataset import DataSpec
from diffusion.networks.build import build_network
from diffusion.process.samplers import sampler_table, with_learned_variance
from diffusion.process.schedules import linear_betas
from diffusion.training.checkpoints import TrainedModel
from export import exporter
from export.contract import ConditionSpec, SamplerSpec
from export.sampler import Sampler
from export.to_onnx import denoiser_graph, export_onnx

torch.set_num_threads(1)
# Programs in JavaScript find the packages that `make javascript` installs, unless others are named.
os.environ.setdefault("NODE_PATH", str(JAVASCRIPT / "node_modules"))


def make_model(data, sampler, seed=0, num_train_timesteps=20):
    """An untrained denoiser whose output, unlike that of a newly built network, is not zero."""
    config = Config(
        schedule=ScheduleConfig(num_train_timesteps=num_train_timesteps, beta_start=0.01, beta_end=0.3),
        network=NetworkConfig(
            hidden_size=32, num_blocks=2, time_embedding_size=16, data_embedding_size=8, dropout=0.1
        ),
        sampler=sampler,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(config, data.shape, len(data.classes or ()))
        # Guidance would multiply rounding errors by hundreds if an untrained network's output were larger.
        torch.nn.init.normal_(network.outward.weight, std=0.02 if data.classes else 0.1)
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
    """Deployed with clipped DDPM over half of the timesteps."""
    return make_model(IMAGES, SamplerConfig(name="ddpm", num_steps=10, variance="beta"))


@pytest.fixture(scope="session")
def point_model():
    """Deployed with DDIM, with some fresh noise and without clipping."""
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
def conditional_file(point_model, tmp_path_factory):
    """Points with three classes, deployed with guidance."""
    data = replace(point_model.data, classes=("cat", "dog", "eel"))
    sampler = SamplerConfig(name="dpmpp_2m", num_steps=6, guidance_scale=2.5)
    path = tmp_path_factory.mktemp("conditional") / "conditional.onnx"
    path.write_bytes(export_onnx(make_model(data, sampler))[0])
    return path


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
    """The same ONNX graph with other metadata."""
    proto = onnx.load_from_string(content)
    onnx.helper.set_model_props(proto, metadata)
    return proto.SerializeToString()


@pytest.fixture(scope="session", name="metadata_of")
def _metadata_of():
    return metadata_of


@pytest.fixture(scope="session", name="with_metadata")
def _with_metadata():
    return with_metadata


@pytest.fixture(scope="session")
def endless(image_onnx):
    """A hostile file: a call of its network never ends."""
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Identity", ["go"], ["still"]),
            onnx.helper.make_node("Mul", ["value", "one"], ["next"]),
        ],
        "body",
        [
            onnx.helper.make_tensor_value_info("count", onnx.TensorProto.INT64, []),
            onnx.helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("value", onnx.TensorProto.FLOAT, None),
        ],
        [
            onnx.helper.make_tensor_value_info("still", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("next", onnx.TensorProto.FLOAT, None),
        ],
    )
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["t"], ["t_float"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Loop", ["", "true", "x"], ["model_output"], body=body),
        ],
        "endless",
        [
            onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8]),
            onnx.helper.make_tensor_value_info("t", onnx.TensorProto.INT64, ["batch"]),
        ],
        [onnx.helper.make_tensor_value_info("model_output", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [
            onnx.helper.make_tensor("true", onnx.TensorProto.BOOL, [], [True]),
            onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0]),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return with_metadata(model.SerializeToString(), metadata_of(image_onnx))


def shift_output(proto, amount):
    """Add `amount` to every output: an error of known size."""
    proto = _rename_output(proto, "raw")
    proto.graph.initializer.append(onnx.helper.make_tensor("shift", onnx.TensorProto.FLOAT, [], [amount]))
    proto.graph.node.append(onnx.helper.make_node("Add", ["raw", "shift"], ["model_output"]))
    return proto


def repeat_first_output(proto):
    """Give every example the first one's output, which is right at batch size 1 only."""
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
    """Make the network receive t = 0 whatever t is."""
    proto = _copy(proto)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name == "t":
                node.input[index] = "zero_t"
    zero = onnx.helper.make_tensor("zero", onnx.TensorProto.INT64, [], [0])
    proto.graph.initializer.append(zero)
    proto.graph.node.insert(0, onnx.helper.make_node("Mul", ["t", "zero"], ["zero_t"]))
    return proto


def shift_output_at(proto, timestep, amount):
    """Add `amount` to the outputs at one timestep only."""
    proto = _rename_output(proto, "raw")
    rank = len(proto.graph.output[0].type.tensor_type.shape.dim)
    proto.graph.initializer.extend(
        [
            onnx.helper.make_tensor("timestep", onnx.TensorProto.INT64, [], [timestep]),
            onnx.helper.make_tensor("amount", onnx.TensorProto.FLOAT, [], [amount]),
            onnx.helper.make_tensor("column", onnx.TensorProto.INT64, [rank], [-1] + [1] * (rank - 1)),
        ]
    )
    proto.graph.node.extend(
        [
            onnx.helper.make_node("Equal", ["t", "timestep"], ["is_wrong"]),
            onnx.helper.make_node("Cast", ["is_wrong"], ["wrong"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Reshape", ["wrong", "column"], ["wrong_column"]),
            onnx.helper.make_node("Mul", ["wrong_column", "amount"], ["error"]),
            onnx.helper.make_node("Add", ["raw", "error"], ["model_output"]),
        ]
    )
    return proto


@pytest.fixture(scope="session")
def node_packages():
    """Skips where Node.js or the packages of javascript/ are missing; in CI they must be there."""
    missing = missing_packages()
    if missing is not None:
        assert not os.environ.get("CI"), f"needs {missing}"
        pytest.skip(f"needs {missing}")


@pytest.fixture
def give_graph(monkeypatch):
    """Function that makes the exporter return a graph for any model, which takes a second otherwise."""

    def replace(proto):
        monkeypatch.setattr(exporter, "denoiser_graph", lambda network, spec: _copy(proto))

    return replace


def _rename_output(proto, name):
    proto = _copy(proto)
    for node in proto.graph.node:
        for index, output in enumerate(node.output):
            if output == "model_output":
                node.output[index] = name
    return proto


def _copy(proto):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


@pytest.fixture(scope="session", name="broken")
def _broken():
    """Functions that break a graph, each ModelProto -> ModelProto."""
    return {
        "shifted": shift_output,
        "shifted at one timestep": shift_output_at,
        "forgets the timestep": forget_timestep,
        "repeats the first output": repeat_first_output,
    }


@pytest.fixture(scope="session")
def repository():
    return Path(export.__file__).resolve().parent.parent


# Models of format version 2. No training writes them yet, so their networks are defined here.


class SmallNetwork(torch.nn.Module):
    """Two layers that see x, a noise level and further inputs, all flat."""

    def __init__(self, shape, num_other_inputs=0, num_classes=0, num_outputs=1):
        super().__init__()
        size = int(np.prod(shape))
        self.inward = torch.nn.Linear(size + 1 + num_other_inputs, 24)
        self.classes = torch.nn.Embedding(num_classes + 1, 24)
        self.outward = torch.nn.ModuleList(torch.nn.Linear(24, size) for _ in range(num_outputs))

    def outputs(self, x, level, y=None, *others):
        flat = torch.cat([x.flatten(1), level[:, None], *(other.flatten(1) for other in others)], dim=1)
        hidden = self.inward(flat)
        if y is not None:
            hidden = hidden + self.classes(y)
        hidden = torch.nn.functional.silu(hidden)
        return [layer(hidden).reshape(x.shape) for layer in self.outward]


class OrderThree(SmallNetwork):
    def forward(self, x, t):
        return self.outputs(x, t.float() / 20.0)[0]


class Preconditioned(SmallNetwork):
    """Predicts x_0 from x_0 + sigma noise as EDM does, arXiv:2206.00364, Eq. 7, with sigma_data = 1."""

    def forward(self, x, sigma):
        factor = (1.0 / (1.0 + sigma**2)).reshape(-1, *[1] * (x.dim() - 1))
        scale = sigma.reshape(factor.shape)
        noisy = x / factor.sqrt()
        return factor * noisy + scale * factor.sqrt() * self.outputs(x, 0.25 * sigma.log())[0]


class LogSnr(SmallNetwork):
    def forward(self, x, log_snr):
        return self.outputs(x, 0.1 * log_snr)[0]


class Conditioned(SmallNetwork):
    def forward(self, x, t, y, condition_low_resolution, condition_known):
        return self.outputs(x, t.float() / 20.0, y, condition_low_resolution, condition_known)[0]


class LearnedVariance(SmallNetwork):
    def forward(self, x, t, y):
        out, variance = self.outputs(x, t.float() / 20.0, y)
        return out, variance.tanh()


def version_2_model(kind):
    """(network, spec) of one kind of model that needs format version 2."""
    shape, options = (1, 4, 4), {}
    sampler = {
        "name": "ddim", "num_steps": 8, "eta": 0.5, "variance": "beta_tilde", "spacing": "trailing",
        "clip": [-2.0, 2.0], "guidance_scale": 1.0,
    }  # fmt: skip
    data = {"kind": "image", "shape": list(shape), "mean": [[[5.0]]], "std": [[[4.0]]], "range": [0.0, 16.0]}
    data |= {"columns": None}
    prediction_type = "epsilon"
    if kind in ("conditions", "variance"):
        data["classes"], sampler["guidance_scale"] = ["cat", "dog", "eel"], 2.0
    if kind == "variance":
        sampler |= {"name": "ddpm", "eta": 0.0, "variance": "learned"}
    if kind == "sigma":
        prediction_type = "sample"
    spec = SamplerSpec(data, {"kind": "linear"}, prediction_type, sampler, {}, None)
    spec.schedule["betas"] = linear_betas(20, 0.01, 0.3).tolist()

    def build(**choices):
        return sampler_table(
            spec.noise_schedule, sampler["name"], 8, prediction_type=prediction_type,
            eta=sampler["eta"], clip=(-2.0, 2.0), **choices,
        )  # fmt: skip

    table = build()
    if kind == "order 3":
        extra = np.array([0.0, 0.0, 0.3, -0.2, 0.25, 0.1, -0.3, 0.0])
        table = replace(
            table,
            coefficients=np.column_stack([extra, table.coefficients]),
            columns=("e2", *table.columns),
        )
        network = OrderThree(shape)
    elif kind == "sigma":
        options["noise_level"] = "sigma"
        network = Preconditioned(shape)
    elif kind == "log_snr":  # a step with two rows, and rows between the training timesteps
        options["noise_level"], sampler["num_steps"] = "log_snr", 4
        network = LogSnr(shape)
    elif kind == "conditions":
        options["conditions"] = (
            ConditionSpec("low_resolution", (1, 2, 2), [[[5.0]]], [[[4.0]]]),
            ConditionSpec("known", (3,), [1.0, 2.0, 3.0], 2.0),
        )
        network = Conditioned(shape, 7, 3)
    else:
        table = with_learned_variance(table, build(variance="beta"))
        network = LearnedVariance(shape, 0, 3, 2)
    spec = replace(spec, **options)
    if spec.noise_level is not None:
        levels = spec.noise_levels(table.timesteps) * (1.01 if kind == "log_snr" else 1.0)
        table = replace(table, timesteps=np.zeros(0, dtype=np.int64), noise_levels=levels)
    return network.eval().requires_grad_(False), replace(spec, table=table)


@pytest.fixture(scope="session", params=["order 3", "sigma", "log_snr", "conditions", "variance"])
def version_2(request):
    """(network, spec, bytes of the file) of a model that needs format version 2."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, spec = version_2_model(request.param)
    proto = denoiser_graph(network, spec)
    onnx.helper.set_model_props(proto, spec.to_metadata())
    return network, spec, proto.SerializeToString()
