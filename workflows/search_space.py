"""What a sweep searches, as it stands on the command line."""

from dataclasses import dataclass, fields
from typing import Any

from diffusion.config import Config
from diffusion.errors import InputError

# Searched on a logarithmic scale between two ends; the others are lists of choices.
_RANGES = {"beta_start", "beta_end", "learning_rate"}

DOTTED = {
    "num_train_timesteps": "schedule.num_train_timesteps",
    "beta_start": "schedule.beta_start",
    "beta_end": "schedule.beta_end",
    "time_embedding_size": "network.time_embedding_size",
    "data_embedding_size": "network.data_embedding_size",
    "learning_rate": "training.learning_rate",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """One value fixes a parameter; more are the choices, or the two ends of a range."""

    num_train_timesteps: tuple[int, ...] = (50, 100, 200, 500, 1000)
    """T: choices."""
    beta_start: tuple[float, ...] = (1e-5, 1e-3)
    """First beta: a range, searched on a logarithmic scale."""
    beta_end: tuple[float, ...] = (5e-3, 0.3)
    """Last beta: a range, searched on a logarithmic scale."""
    time_embedding_size: tuple[int, ...] = (16, 32, 64, 128)
    """Size of the timestep's embedding: choices."""
    data_embedding_size: tuple[int, ...] = (16, 32, 64)
    """Size of each coordinate's embedding (points only): choices."""
    learning_rate: tuple[float, ...] = (3e-4, 3e-3)
    """Peak learning rate: a range, searched on a logarithmic scale."""

    def __post_init__(self) -> None:
        for field in fields(self):
            name, values = field.name, getattr(self, field.name)
            flag, given = _flag(name), " ".join(map(str, values))
            if not values:
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
        """
        unused = set()
        if kind != "points" or config.network.kind != "mlp":
            unused.add("data_embedding_size")
        if not config.schedule.uses_betas:
            unused |= {"beta_start", "beta_end"}
        fixed, searched = {}, {}
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name in unused:
                continue
            if len(set(values)) == 1:
                fixed[DOTTED[field.name]] = values[0]
            else:
                searched[DOTTED[field.name]] = values
        return fixed, searched


def is_range(dotted: str) -> bool:
    """Whether two values of this parameter are the ends of a range."""
    return dotted.rsplit(".", 1)[-1] in _RANGES


def flag_of_searched(flag: str) -> str | None:
    """The --search flag of a parameter that a sweep searches, given its ordinary flag, or None."""
    dotted = flag.removeprefix("--").replace("-", "_")
    name = next((name for name, path in DOTTED.items() if path == dotted), None)
    return _flag(name) if name else None


def _flag(name: str) -> str:
    return f"--search.{name.replace('_', '-')}"
