import json

import numpy as np
import pytest
import torch

from diffusion.checkpoints import TrainedModel
from diffusion.errors import InputError
from diffusion.generation import generate
from diffusion.networks import build_network
from diffusion.presets import preset


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


def test_a_loaded_model_is_ready_to_run(folder):
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


def test_saving_again_replaces_the_model_and_leaves_no_parts(model, folder):
    with torch.no_grad():
        model.network.outward.bias.fill_(3.0)
    model.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert TrainedModel.load(folder).network.outward.bias.tolist() == [3.0, 3.0]


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
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
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
def test_a_config_file_without_one_of_its_parts_is_refused(folder, name):
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
def test_a_config_that_does_not_fit_its_weights_or_its_rules_is_refused(folder, section, name, value):
    edit(folder, lambda tree: tree["config"][section].update({name: value}))
    assert_refused(folder)


def test_another_format_is_refused_with_both_numbers(folder):
    edit(folder, lambda tree: tree.update(format_version=99))
    message = assert_refused(folder)
    assert "99" in message
    assert "format 1" in message


def test_the_config_file_is_plain_json_for_people(model, folder):
    tree = json.loads((folder / "config.json").read_text())
    assert tree["config"]["schedule"]["num_train_timesteps"] == 17
    assert tree["data"]["name"] == "gaussian"
    assert tree["provenance"] == model.provenance
