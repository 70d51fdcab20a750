"""The search space of a sweep, as given by the --search flags.

The docstring under a field is the help text of its flag. Imports neither torch, ray nor mlflow.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.process.prediction_types import PredictionType
from workflows.cli.model_reference import local_model, read_saved_config

# Ranges, searched on a logarithmic scale. All other parameters are lists of choices.
_RANGES = {"beta_start", "beta_end", "learning_rate"}

_DOTTED_NAMES = {
    "num_train_timesteps": "schedule.num_train_timesteps",
    "beta_start": "schedule.beta_start",
    "beta_end": "schedule.beta_end",
    "schedule_kind": "schedule.kind",
    "time_embedding_size": "network.time_embedding_size",
    "data_embedding_size": "network.data_embedding_size",
    "hidden_size": "network.hidden_size",
    "num_blocks": "network.num_blocks",
    "base_channels": "network.base_channels",
    "num_res_blocks": "network.num_res_blocks",
    "prediction_type": "network.prediction_type",
    "learning_rate": "training.learning_rate",
}
# Parameters that only one kind of network has.
_NETWORK_KIND = {"hidden_size": "mlp", "num_blocks": "mlp", "base_channels": "unet", "num_res_blocks": "unet"}

Values = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """The search space: one value fixes a parameter, several are choices or the two ends of a range.

    Parameters without values are not searched and keep the value of their own flag.
    """

    num_train_timesteps: tuple[int, ...] = (50, 100, 200, 500, 1000)
    """Choices of T, the number of noising steps."""
    beta_start: tuple[float, ...] = (1e-5, 1e-3)
    """Range of the first beta, searched on a logarithmic scale."""
    beta_end: tuple[float, ...] = (5e-3, 0.3)
    """Range of the last beta, searched on a logarithmic scale."""
    schedule_kind: tuple[str, ...] = ()
    """Choices of the kind of noise schedule."""
    time_embedding_size: tuple[int, ...] = (16, 32, 64, 128)
    """Choices of the size of the timestep embedding."""
    data_embedding_size: tuple[int, ...] = (16, 32, 64)
    """Points only: choices of the size of each coordinate's embedding."""
    hidden_size: tuple[int, ...] = ()
    """MLP only: choices of the width of its blocks; by default 64 and 128 for points."""
    num_blocks: tuple[int, ...] = ()
    """MLP only: choices of the number of blocks; by default 3 and 6 for points."""
    base_channels: tuple[int, ...] = ()
    """U-Net only: choices of the channels of the first level."""
    num_res_blocks: tuple[int, ...] = ()
    """U-Net only: choices of the number of residual blocks per level."""
    prediction_type: tuple[PredictionType, ...] = ()
    """Choices of what the network predicts."""
    learning_rate: tuple[float, ...] = (3e-4, 3e-3)
    """Range of the peak learning rate, searched on a logarithmic scale."""
    algorithm: Literal["tpe", "random"] = "tpe"
    """Search algorithm: tpe (Optuna's tree-structured Parzen estimator) or random."""

    def __post_init__(self) -> None:
        for name in _DOTTED_NAMES:
            values = getattr(self, name)
            flag, given = _flag(name), " ".join(map(str, values))
            if not values and name in _SEARCHED_BY_DEFAULT:
                raise InputError(f"{flag}: give one value to fix it, or more to search")
            if name in _RANGES and (len(values) > 2 or values[0] > values[-1]):
                raise InputError(f"{flag} {given}: give one value, or the lower and the upper end of a range")
            for value in values:
                # Each beta is checked on its own (equal betas are valid); their order is checked below.
                betas = ("beta_start", "beta_end") if name.startswith("beta") else ()
                equal_betas = {_DOTTED_NAMES[beta]: value for beta in betas}
                try:
                    Config().with_values({_DOTTED_NAMES[name]: value, **equal_betas})
                except InputError as error:
                    raise InputError(f"{flag} {str(error).split(' ', 1)[1]}") from error
        if self.beta_start[-1] > self.beta_end[0]:
            raise InputError(
                f"--search.beta-start reaches {self.beta_start[-1]:g}, above the smallest --search.beta-end "
                f"{self.beta_end[0]:g}: noise must grow, so keep beta_start's values at or below beta_end's"
            )

    def fixed_and_searched(
        self, config: Config, kind: str
    ) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
        """Return the fixed values and the searched ones, both by dotted name.

        Args:
            config: config of the sweep; parameters that it does not use are in neither result.
            kind: kind of the data, "image" or "points".

        Raises:
            InputError: values are given for a network of the other kind.
        """
        unused = set()
        if kind != "points" or config.network.kind != "mlp":
            unused.add("data_embedding_size")
        kinds = self.schedule_kind or (config.schedule.kind,)
        if not any(config.with_values({"schedule.kind": each}).schedule.uses_betas for each in kinds):
            unused |= {"beta_start", "beta_end"}
        fixed, searched = {}, {}
        for name, dotted in _DOTTED_NAMES.items():
            values = getattr(self, name)
            if name in unused or not values:
                continue
            if _NETWORK_KIND.get(name, config.network.kind) != config.network.kind:
                raise InputError(
                    f"{_flag(name)}: --network.kind {config.network.kind} has no {name}; leave it out"
                )
            if len(set(values)) == 1:
                fixed[dotted] = values[0]
            else:
                searched[dotted] = values
        return fixed, searched


_SEARCHED_BY_DEFAULT = {
    field.name for field in fields(SearchSpace) if field.name in _DOTTED_NAMES and field.default
}


def is_range(dotted: str) -> bool:
    """Whether the values of this parameter are the ends of a range, rather than choices."""
    return dotted.rsplit(".", 1)[-1] in _RANGES


def contains(searched: Values, values: Mapping[str, Any]) -> bool:
    """Whether a search space contains a point.

    Args:
        searched: choices, or ends of a range, by dotted name.
        values: A value by dotted name, for at least every searched parameter.
    """
    return _first_outside(searched, values) is None


def start_values(path: str, searched: Values, tracking_uri: str | None = None) -> dict[str, Any]:
    """Read the values of the searched parameters from a config.json, such as that of a trial.

    Args:
        path: path of the file, of the folder that holds it, or models:/NAME@ALIAS.
        searched: choices, or ends of a range, by dotted name.
        tracking_uri: value of --tracking-uri, for the registry.

    Raises:
        InputError: the file cannot be read, or a value lies outside the search space.
    """
    flat = read_saved_config("--start-from", local_model(path, tracking_uri)).config.flat()
    values = {name: flat[name] for name in searched}
    if (name := _first_outside(searched, values)) is not None:
        short = next(short for short, dotted in _DOTTED_NAMES.items() if dotted == name)
        raise InputError(
            f"--start-from {path}: {name} {values[name]} is outside the search space "
            f"({format_values(searched[name])}); widen {_flag(short)}"
        )
    return values


def format_values(values: Iterable[Any]) -> str:
    """Format choices, or the ends of a range, as on the command line."""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def search_flag_for(flag: str) -> str | None:
    """Return the --search flag that replaces an ordinary flag in sweeps, or None if there is none."""
    dotted = flag.removeprefix("--").replace("-", "_")
    name = next((name for name in _SEARCHED_BY_DEFAULT if _DOTTED_NAMES[name] == dotted), None)
    return _flag(name) if name else None


def _first_outside(searched: Values, values: Mapping[str, Any]) -> str | None:
    """Return the first name whose value is outside the search space, or None."""
    for name, allowed in searched.items():
        value = values[name]
        inside = allowed[0] <= value <= allowed[-1] if is_range(name) else value in allowed
        if not inside:
            return name
    return None


def _flag(name: str) -> str:
    return f"--search.{name.replace('_', '-')}"
