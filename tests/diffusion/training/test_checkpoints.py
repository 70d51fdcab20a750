import copy
import dataclasses
import errno
import json
import os

import numpy as np
import pytest
import torch

from diffusion.errors import InputError
from diffusion.manifest import DamagedError, write_manifest
from diffusion.networks.build import build_network
from diffusion.presets import preset
from diffusion.process.generate import generate
from diffusion.training.checkpoints import TrainedModel, TrainingState, read_checkpoint, write_checkpoint


@pytest.fixture(name="model")
def _model(small_config, gaussian_dataset):
    config = small_config(
        schedule={"num_train_timesteps": 17}, sampler={"name": "ddim", "eta": 0.5, "num_steps": 6}
    )
    torch.manual_seed(0)
    network = build_network(config, (2,))
    torch.nn.init.normal_(network.outward.weight)
    provenance = {"run_id": "abc", "metrics": {"val/mse": 0.25}}
    return TrainedModel(config, gaussian_dataset().spec, network.eval(), provenance)


@pytest.fixture(name="folder")
def _folder(model, tmp_path):
    folder = tmp_path / "runs" / "champion"
    model.save(folder)
    return folder


def test_a_loaded_model_is_the_saved_one(model, folder):
    loaded = TrainedModel.load(folder)
    assert loaded.config == model.config
    assert loaded.data == model.data
    assert loaded.provenance == model.provenance
    x, t = torch.randn(5, 2), torch.arange(5)
    assert torch.equal(loaded.network(x, t), model.network(x, t))


def test_a_loaded_model_generates_the_same_samples(model, folder):
    loaded = TrainedModel.load(folder)
    np.testing.assert_array_equal(loaded.table.coefficients, model.table.coefficients)
    one, other = (generate(each.network, each.table, (2,), 8, seed=3) for each in (model, loaded))
    assert torch.equal(one, other)


def test_a_loaded_model_is_in_evaluation_mode_without_gradients(folder):
    network = TrainedModel.load(folder).network
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_schedule_and_table_follow_from_the_config(model):
    assert model.schedule.num_train_timesteps == 17
    assert len(model.table.timesteps) == 6
    assert model.table.coefficients[0, 7:].tolist() == list(model.data.clip)


def test_an_image_model_with_dropout_survives_the_round_trip(gaussian_dataset, tmp_path):
    config = preset("digits").with_values({"network.hidden_size": 16})
    network = build_network(config, (1, 8, 8)).eval()
    torch.nn.init.normal_(network.outward.weight)
    spec = type(gaussian_dataset().spec).from_dict(
        gaussian_dataset().spec.to_dict()
        | {
            "kind": "image",
            "shape": (1, 8, 8),
            "mean": [[[5.0]]],
            "std": [[[6.0]]],
            "range": (0.0, 16.0),
            "columns": None,
        }
    )
    TrainedModel(config, spec, network).save(tmp_path)
    loaded = TrainedModel.load(tmp_path)
    assert loaded.data == spec
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 10, 100])
    assert torch.equal(loaded.network(x, t), network(x, t))


def test_saving_again_replaces_the_model_and_leaves_no_temporary_files(model, folder):
    with torch.no_grad():
        model.network.outward.bias.fill_(3.0)
    model.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert TrainedModel.load(folder).network.outward.bias.tolist() == [3.0, 3.0]


def test_all_files_of_a_model_have_the_mode_of_new_files(model, tmp_path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        earlier = os.umask(mask)
        try:
            model.save(tmp_path / str(mode))
        finally:
            os.umask(earlier)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / str(mode)).iterdir()}
        assert modes == dict.fromkeys(("config.json", "model.safetensors"), mode)


def assert_refused(folder):
    with pytest.raises(InputError) as caught:
        TrainedModel.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_a_missing_folder_is_refused_by_name(tmp_path):
    assert_refused(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused_by_name(folder, name):
    (folder / name).unlink()
    assert name in assert_refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(folder, name, fraction):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(fraction * len(content))])
    assert_refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00garbage" * 50, b"hello", b"[]", b"null", b"{}", b"3"])
def test_a_file_of_garbage_is_refused(folder, name, content):
    (folder / name).write_bytes(content)
    assert_refused(folder)


def edit(folder, change):
    tree = json.loads((folder / "config.json").read_text())
    change(tree)
    (folder / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("name", ["format_version", "config", "data", "provenance"])
def test_a_config_file_with_a_missing_part_is_refused(folder, name):
    edit(folder, lambda tree: tree.pop(name))
    assert_refused(folder)


@pytest.mark.parametrize("name", ["config", "data"])
@pytest.mark.parametrize("value", [None, 3, [], "text", {"unknown": 1}])
def test_a_config_file_with_a_part_of_another_shape_is_refused(folder, name, value):
    edit(folder, lambda tree: tree.update({name: value}))
    assert_refused(folder)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("schedule", "beta_end", 1.5),
        ("schedule", "unknown", 1),
        ("network", "hidden_size", 17),
        ("network", "num_blocks", 2),
    ],
)
def test_a_config_that_is_invalid_or_does_not_fit_the_weights_is_refused(folder, section, name, value):
    edit(folder, lambda tree: tree["config"][section].update({name: value}))
    assert_refused(folder)


def test_another_format_is_refused_with_both_numbers(folder):
    edit(folder, lambda tree: tree.update(format_version=99))
    message = assert_refused(folder)
    assert "99" in message
    assert "format 1" in message


def test_the_config_file_is_readable_json(model, folder):
    tree = json.loads((folder / "config.json").read_text())
    assert tree["config"]["schedule"]["num_train_timesteps"] == 17
    assert tree["data"]["name"] == "gaussian"
    assert tree["provenance"] == model.provenance


class Trained:
    """A small training with AdamW and a gradient scaler, with everything that a checkpoint contains."""

    def __init__(self, model):
        self.model = model
        self.network = copy.deepcopy(model.network).train().requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-2, fused=True)
        self.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=64.0)
        self.generator = torch.Generator().manual_seed(5)
        self.update = 0

    def step(self):
        x = torch.randn(8, 2, generator=self.generator)
        t = torch.randint(17, (8,), generator=self.generator)
        self.optimizer.zero_grad()
        self.scaler.scale((self.network(x, t) - x).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for mean, now in zip(self.model.network.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(now, 0.1)
        self.update += 1

    def state(self):
        return TrainingState(
            update=self.update,
            network=dict(self.network.state_dict()),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            ema_updates=self.update,
            random={
                "order": {"epoch": 3, "position": (7, 64)},
                "ranks": [{"rank": rank, "state": self.generator.get_state()} for rank in range(2)],
            },
            history=[{"update": 2, "metrics": {"val/mse": 0.1 + 0.2, "bad": float("inf"), "name": "ä"}}],
            loss_sum=0.1 * 3,
            losses=4,
        )

    def restore(self, state):
        self.network.load_state_dict(state.network)
        self.optimizer.load_state_dict(state.optimizer)
        self.scaler.load_state_dict(state.scaler)
        self.generator.set_state(state.random["ranks"][0]["state"])
        self.update = state.update


def assert_same(one, other):
    """Check that nested values have the same types and are equal bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), [other[name] for name in one]
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for each, its in zip(one, other, strict=True):
            assert_same(each, its)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture(name="trained")
def _trained(model):
    trained = Trained(model)
    for _ in range(3):
        trained.step()
    return trained


FACTS = {"update": 3, "objective": 0.5, "data_fingerprint": "abc"}
FILES = [
    "config.json",
    "history.json",
    "manifest.json",
    "model.safetensors",
    "network.safetensors",
    "state.pt",
]


@pytest.fixture(name="checkpoint")
def _checkpoint(trained, tmp_path):
    folder = tmp_path / "checkpoints" / "000000003"
    write_checkpoint(folder, trained.model, trained.state(), FACTS)
    return folder


def test_a_checkpoint_contains_the_state_bit_for_bit(trained, checkpoint):
    model, state, facts = read_checkpoint(checkpoint)
    assert facts == FACTS
    assert len(state.optimizer["state"]) > 0, "AdamW has moments"
    for each in dataclasses.fields(TrainingState):
        assert_same(getattr(state, each.name), getattr(trained.state(), each.name))
    assert_same(dict(model.network.state_dict()), dict(trained.model.network.state_dict()))
    assert not torch.equal(model.network.outward.bias, state.network["outward.bias"])
    assert sorted(path.name for path in checkpoint.iterdir()) == FILES


def test_a_state_without_a_scaler_comes_back_without_one(trained, tmp_path):
    state = dataclasses.replace(trained.state(), scaler=None)
    write_checkpoint(tmp_path, trained.model, state, {})
    assert read_checkpoint(tmp_path)[1].scaler is None


def test_a_training_resumed_from_a_checkpoint_equals_an_uninterrupted_one(trained, checkpoint):
    model, state, _ = read_checkpoint(checkpoint)
    resumed = Trained(model)
    resumed.restore(state)
    for _ in range(4):
        trained.step()
        resumed.step()
    for one, other in ((trained, resumed), (trained.model, resumed.model)):
        assert_same(dict(one.network.state_dict()), dict(other.network.state_dict()))
    assert_same(trained.state().optimizer, resumed.state().optimizer)


def test_a_checkpoint_is_a_model_to_sample_from(trained, checkpoint):
    loaded = TrainedModel.load(checkpoint)
    assert_same(dict(loaded.network.state_dict()), dict(trained.model.network.state_dict()))


def assert_damaged(folder, name):
    with pytest.raises(DamagedError) as caught:
        read_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message and name in message and "\n" not in message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_of_a_checkpoint_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    assert_damaged(checkpoint, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.999])
def test_a_truncated_file_of_a_checkpoint_is_named(checkpoint, name, fraction):
    os.truncate(checkpoint / name, int(fraction * (checkpoint / name).stat().st_size))
    assert_damaged(checkpoint, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75, 0.9999])
def test_a_flipped_bit_in_a_file_of_a_checkpoint_is_named(checkpoint, name, fraction):
    content = bytearray((checkpoint / name).read_bytes())
    content[int(fraction * len(content))] ^= 4
    (checkpoint / name).write_bytes(content)
    assert_damaged(checkpoint, name)


@pytest.mark.parametrize("name", ["network.safetensors", "state.pt", "history.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"something else", b"\x80\x02."])
def test_a_folder_with_right_digests_but_wrong_content_is_refused(checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    write_manifest(checkpoint, FACTS)
    assert_damaged(checkpoint, name)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_checkpoint_is_run(checkpoint, tmp_path):
    torch.save(Evil(tmp_path / "ran"), checkpoint / "state.pt")
    write_manifest(checkpoint, FACTS)
    assert_damaged(checkpoint, "state.pt")
    assert not (tmp_path / "ran").exists()


def test_a_state_that_could_not_be_read_back_is_not_written(trained, tmp_path):
    state = dataclasses.replace(trained.state(), random={"seed": np.float64(3.0)})
    with pytest.raises(TypeError, match="numpy"):
        write_checkpoint(tmp_path, trained.model, state, {})
    assert not (tmp_path / "state.pt").exists() and not (tmp_path / "manifest.json").exists()


def test_a_disk_that_fills_at_any_point_raises_the_systems_error(trained, tmp_path, max_file_size):
    written = set()
    write_checkpoint(tmp_path / "whole", trained.model, trained.state(), FACTS)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").iterdir()}
    for name, size in sizes.items():
        for limit in (size // 2, size - 1):
            folder = tmp_path / f"{name}-{limit}"
            with pytest.raises(OSError) as caught, max_file_size(limit):
                write_checkpoint(folder, trained.model, trained.state(), FACTS)
            assert caught.value.errno == errno.EFBIG
            written |= {path.name for path in folder.iterdir()}
            # There are no partial files, and without its manifest the folder is no checkpoint.
            assert all((folder / each).stat().st_size == sizes[each] for each in os.listdir(folder))
            assert_damaged(folder, "manifest.json")
    assert {"model.safetensors", "network.safetensors"} <= written, "it also fails after the first file"


def test_samples_around_known_values_and_from_given_ones(model):
    """In data units, as `export.Sampler` takes them; the noise is PyTorch's."""
    known = np.array([[1.5, np.nan], [np.nan, -0.25], [np.nan, np.nan]])
    samples = model.sample(3, known=known, resampling=2)
    finite = np.isfinite(known)
    np.testing.assert_array_equal(samples[finite], known[finite])
    assert np.isfinite(samples).all()
    free = model.sample(3, known=[np.nan, 0.5], seed=1)
    assert (free[:, 1] == 0.5).all() and len(np.unique(free[:, 0])) > 1
    start = [0.5, 1.0]
    near, far = (model.sample(20, start_from=start, strength=each) for each in (0.05, 1.0))
    assert np.abs(near - start).mean() < 0.5 * np.abs(far - start).mean()
    for wrong in ({"mask": [True, False]}, {"known": [1.0]}, {"start_from": start, "strength": 0.0}):
        with pytest.raises(InputError):
            model.sample(3, **wrong)
