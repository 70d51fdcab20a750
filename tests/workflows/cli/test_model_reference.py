"""What --config, --init-from and --start-from may refer to."""

import json

import pytest

from diffusion.config import Config
from diffusion.errors import InputError
from workflows.cli.model_reference import read_saved_config

CONFIG = Config().with_values({"training.num_updates": 7, "data.name": "heart"})
TREE = {"config": CONFIG.to_dict(), "data": {"kind": "points", "shape": [2]}, "provenance": {}}


@pytest.fixture
def run_folder(tmp_path):
    for folder in ("trials/a", "champion"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(TREE))
    return tmp_path


@pytest.mark.parametrize("where", ["champion/config.json", "champion", "trials/a", ""])
def test_a_config_is_named_by_its_file_its_folder_or_its_run(run_folder, where):
    saved = read_saved_config("--config", str(run_folder / where))
    assert saved.config == CONFIG and (saved.kind, saved.shape) == ("points", (2,))


def test_a_bare_config_says_nothing_about_the_shape_of_its_data(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(CONFIG.to_dict()))
    saved = read_saved_config("--config", str(tmp_path / "mine.json"))
    assert saved.config == CONFIG and saved.shape is None
    saved.check_data("--config", "image", (1, 8, 8))


def test_data_of_another_kind_or_shape_are_refused(run_folder):
    saved = read_saved_config("--config", str(run_folder))
    saved.check_data("--config x", "points", (2,))
    for kind, shape, words in (("points", (3,), "points of 3"), ("image", (1, 8, 8), "images of 1 x 8 x 8")):
        with pytest.raises(InputError, match=f"--config x is for points of 2 columns.*{words}"):
            saved.check_data("--config x", kind, shape)


@pytest.mark.parametrize(
    "content", ["", "{}x", "[]", '{"config": {"network": {"nope": 1}}}', '{"config": 3}']
)
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="--config .*cannot be read as a config") as caught:
        read_saved_config("--config", str(tmp_path))
    assert "\n" not in str(caught.value)
