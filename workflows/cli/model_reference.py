"""Models that --config, --init-from and --start-from refer to: files, folders, or entries of a registry.

Imports neither torch nor ray, and mlflow only for the registry.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.config import Config, NetworkConfig
from diffusion.errors import InputError
from diffusion.files import path_kind, read_json, user_path
from export.registered import REGISTRY

_CONFIG = "config.json"
MODEL_FOLDERS = ("", "model", "champion")  # in which a model or a run keeps the model


@dataclass(frozen=True)
class SavedConfig:
    """The config of a model, and what is known of the data that it was trained on.

    Attributes:
        config: the config.
        kind: kind of the data, "image" or "points"; None if the file does not say.
        shape: shape of an example; None if the file does not say.
    """

    config: Config
    kind: str | None = None
    shape: tuple[int, ...] | None = None

    def check_data(self, flag: str, kind: str, shape: tuple[int, ...]) -> None:
        """Check that data have the kind and the shape that the config was made for.

        Args:
            flag: the flag with its value, for the message.
            kind: kind of the data.
            shape: shape of their examples.

        Raises:
            InputError: they have not.
        """
        if self.shape is not None and (kind, shape) != (self.kind, self.shape):
            raise InputError(
                f"{flag} is for {describe_examples(str(self.kind), self.shape)}, and the data are "
                f"{describe_examples(kind, shape)}: give data of the same shape, or leave --config out"
            )


def local_model(where: str, tracking_uri: str | None) -> str:
    """The value of a flag that refers to a model, with a path in place of models:/NAME@ALIAS.

    Args:
        where: value of the flag.
        tracking_uri: value of --tracking-uri.

    Raises:
        InputError: the registry cannot be used, or has no such model.
    """
    if not where.startswith(REGISTRY):
        return where
    from workflows.terminal import waiting

    with waiting(f"downloading {where}"):
        from workflows.tracking.registered_files import download_model

        return str(download_model(where, tracking_uri))


def read_saved_config(flag: str, where: str) -> SavedConfig:
    """Read the config of a trial, of a champion or of another model.

    Args:
        flag: the flag that refers to it, for messages.
        where: path of a config.json, of a folder with one or of a run.

    Raises:
        InputError: there is no such file, or it holds no config.
    """
    given = user_path(where)
    files = [given / folder / _CONFIG for folder in MODEL_FOLDERS]
    file = next((each for each in files if path_kind(each) == "file"), given)
    try:
        tree = read_json(file, "a config.json")
        config = Config.from_dict(tree.get("config", tree))
        data: Mapping[str, Any] = tree["data"] if "config" in tree else {}
        shape = tuple(data["shape"]) if "shape" in data else None
        return SavedConfig(config, data.get("kind"), shape)
    except (InputError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{flag} {where}: cannot be read as a config ({error}); give a trial's config.json, the folder "
            f"of a model or of a run, or {REGISTRY}NAME@ALIAS"
        ) from error


def model_folder(path: str) -> Path:
    """Find the folder of the model that `--init-from` refers to.

    Args:
        path: folder of a model, of a checkpoint or of a run. A run gives its final model or champion, or
            else its newest checkpoint.

    Raises:
        InputError: there is no model.
    """
    if not path.strip():
        raise InputError("--init-from is empty: give the folder of a run or a model, or leave the flag out")
    root = user_path(path)
    checkpoints: list[Path] = []
    if path_kind(root) == "folder":
        with suppress(OSError):  # of a folder that cannot be listed
            checkpoints = sorted(root.glob("checkpoints/[0-9]*"), reverse=True)
    for folder in (*(root / name for name in MODEL_FOLDERS), *checkpoints):
        if all(path_kind(folder / name) == "file" for name in (_CONFIG, "model.safetensors")):
            return folder
    raise InputError(
        f"--init-from {path}: no model there; give a run's folder, its model/, one of its checkpoints/, or "
        f"{REGISTRY}NAME@ALIAS"
    )


def read_network(init_from: str) -> NetworkConfig:
    """Read the config of the network of the model that `--init-from` refers to.

    Args:
        init_from: path, as for `model_folder`.

    Raises:
        InputError: there is no such model, or its config.json describes no network.
    """
    file = model_folder(init_from) / _CONFIG
    tree = read_json(file, "the folder of a model for --init-from")
    try:
        return Config.from_dict({"network": tree["config"]["network"]}).network
    except (KeyError, TypeError, InputError) as error:
        raise InputError(
            f"--init-from {init_from}: {file} describes no network ({error}); give another model"
        ) from error


@dataclass(frozen=True)
class StartingPoint:
    """What a new training starts from, with its files on this machine.

    Attributes:
        config_file: path that --config refers to, or None.
        init_from: path that --init-from refers to, or None.
        saved: the config, or None.
        network: config of the network of the model of `init_from`, or None.
    """

    config_file: str | None = None
    init_from: str | None = None
    saved: SavedConfig | None = None
    network: NetworkConfig | None = None


def find_start(
    config: str | None, init_from: str | None, tracking_uri: str | None, *, is_new: bool = True
) -> StartingPoint:
    """Download what is in the registry, and read what a new training starts from.

    Args:
        config: value of --config, or None.
        init_from: value of --init-from, or None.
        tracking_uri: value of --tracking-uri.
        is_new: whether the training is new. One that is resumed keeps its config, and starts from the model
            only if it has no checkpoint yet.

    Raises:
        InputError: one of them cannot be read.
    """
    config_file, model = (
        where and local_model(where, tracking_uri) for where in (config if is_new else None, init_from)
    )
    saved = read_saved_config("--config", config_file) if config_file else None
    network = read_network(model) if is_new and model is not None else None
    return StartingPoint(config_file, model, saved, network)


def describe_examples(kind: str, shape: tuple[int, ...]) -> str:
    """Kind and shape of examples in words, for messages."""
    size = " x ".join(map(str, shape))
    return f"images of {size} (channels, height, width)" if kind == "image" else f"points of {size} columns"
