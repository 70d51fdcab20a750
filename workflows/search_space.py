"""What a sweep searches, as it stands on the command line."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.model_config import ScheduleKind
from diffusion.sampling import PredictionType

# Searched on a logarithmic scale between two ends; the others are lists of choices.
_RANGES = {"beta_start", "beta_end", "learning_rate"}

DOTTED = {
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
# Which of them only one kind of network has.
_OF_NETWORK = {"hidden_size": "mlp", "num_blocks": "mlp", "base_channels": "unet", "num_res_blocks": "unet"}

Values = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """One value fixes a parameter; more are the choices, or the two ends of a range.

    What has none by default is not searched: the config's own value is used.
    """

    num_train_timesteps: tuple[int, ...] = (50, 100, 200, 500, 1000)
    """T: choices."""
    beta_start: tuple[float, ...] = (1e-5, 1e-3)
    """First beta: a range, searched on a logarithmic scale."""
    beta_end: tuple[float, ...] = (5e-3, 0.3)
    """Last beta: a range, searched on a logarithmic scale."""
    schedule_kind: tuple[ScheduleKind, ...] = ()
    """Kinds of schedule: choices."""
    time_embedding_size: tuple[int, ...] = (16, 32, 64, 128)
    """Size of the timestep's embedding: choices."""
    data_embedding_size: tuple[int, ...] = (16, 32, 64)
    """Size of each coordinate's embedding (points only): choices."""
    hidden_size: tuple[int, ...] = ()
    """Width of the MLP: choices."""
    num_blocks: tuple[int, ...] = ()
    """Depth of the MLP: choices."""
    base_channels: tuple[int, ...] = ()
    """Width of the U-Net: choices."""
    num_res_blocks: tuple[int, ...] = ()
    """Depth of the U-Net, blocks a level: choices."""
    prediction_type: tuple[PredictionType, ...] = ()
    """What the network's output means: choices."""
    learning_rate: tuple[float, ...] = (3e-4, 3e-3)
    """Peak learning rate: a range, searched on a logarithmic scale."""
    algorithm: Literal["tpe", "random"] = "tpe"
    """Optuna's tree-structured Parzen estimator, or values drawn at random."""

    def __post_init__(self) -> None:
        for name in DOTTED:
            values = getattr(self, name)
            flag, given = _flag(name), " ".join(map(str, values))
            if not values and name in _SEARCHED_BY_DEFAULT:
                raise InputError(f"{flag}: give one value to fix it, or more to search")
            if name in _RANGES and (len(values) > 2 or values[0] > values[-1]):
                raise InputError(f"{flag} {given}: give one value, or the lower and the upper end of a range")
            for value in values:
                # Alone: how the two betas stand to each other is judged below.
                both = {DOTTED[beta]: value for beta in ("beta_start", "beta_end") if name.startswith("beta")}
                try:
                    Config().with_values({DOTTED[name]: value, **both})
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
        """Split into what is fixed and what is searched, both under dotted names.

        Args:
            config: the sweep's config; parameters that it does not use are neither.
            kind: of the data, "image" or "points".

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
        for name, dotted in DOTTED.items():
            values = getattr(self, name)
            if name in unused or not values:
                continue
            if _OF_NETWORK.get(name, config.network.kind) != config.network.kind:
                raise InputError(
                    f"{_flag(name)}: --network.kind {config.network.kind} has no {name}; leave it out"
                )
            if len(set(values)) == 1:
                fixed[dotted] = values[0]
            else:
                searched[dotted] = values
        return fixed, searched


_SEARCHED_BY_DEFAULT = {field.name for field in fields(SearchSpace) if field.name in DOTTED and field.default}


def is_range(dotted: str) -> bool:
    """Whether two values of this parameter are the ends of a range."""
    return dotted.rsplit(".", 1)[-1] in _RANGES


def holds(searched: Values, values: Mapping[str, Any]) -> bool:
    """Whether the space holds a point: `values` by dotted name, of everything searched."""
    return _outside(searched, values) is None


def start_values(path: str, searched: Values) -> dict[str, Any]:
    """The searched parameters' values in a config.json, such as a trial's.

    Args:
        path: of the file, or of the folder that holds it.
        searched: dotted names with their choices or ends.

    Raises:
        InputError: there is no such file, or a value lies outside the space.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        tree = json.loads(file.read_text())
        flat = Config.from_dict(tree.get("config", tree)).flat()
    except (OSError, ValueError, AttributeError, InputError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--start-from {path}: not a config that can be read ({reason}); give a trial's config.json"
        ) from error
    values = {name: flat[name] for name in searched}
    if (name := _outside(searched, values)) is not None:
        short = next(short for short, dotted in DOTTED.items() if dotted == name)
        raise InputError(
            f"--start-from {path}: {name} {values[name]} lies outside what is searched "
            f"({shown(searched[name])}); widen {_flag(short)}"
        )
    return values


def shown(values: Iterable[Any]) -> str:
    """Choices, or the ends of a range, as they would be typed."""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def flag_of_searched(flag: str) -> str | None:
    """The --search flag of a parameter that every sweep searches, given its ordinary flag, or None."""
    dotted = flag.removeprefix("--").replace("-", "_")
    name = next((name for name in _SEARCHED_BY_DEFAULT if DOTTED[name] == dotted), None)
    return _flag(name) if name else None


def _outside(searched: Values, values: Mapping[str, Any]) -> str | None:
    """The first name whose value the space does not hold."""
    for name, allowed in searched.items():
        value = values[name]
        inside = allowed[0] <= value <= allowed[-1] if is_range(name) else value in allowed
        if not inside:
            return name
    return None


def _flag(name: str) -> str:
    return f"--search.{name.replace('_', '-')}"
