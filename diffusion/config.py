"""The one config tree: every choice of a run, validated when it is made.

The same tree is the command line, Ray's config, MLflow's parameters, the checkpoint's JSON and a
part of the ONNX metadata. This module imports neither torch nor ray nor mlflow.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from diffusion.checks import check_whole
from diffusion.errors import InputError
from diffusion.model_config import NetworkConfig, SamplerConfig, ScheduleConfig
from diffusion.run_config import LARGEST_SEED, DataConfig, DataName, MetricsConfig, TrainingConfig
from diffusion.sampling import PredictionType

__all__ = [
    "LARGEST_SEED",
    "Config",
    "DataConfig",
    "DataName",
    "MetricsConfig",
    "NetworkConfig",
    "SamplerConfig",
    "ScheduleConfig",
    "TrainingConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that one training run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    seed: int = 0
    """Seed of the weights' start, the order of the data and the training noise."""

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, 0, LARGEST_SEED)
        if self.schedule.zero_terminal_snr and self.prediction_type == "epsilon":
            raise InputError(
                "--schedule.zero-terminal-snr leaves a last step of pure noise, which says nothing about the "
                "data: add --network.prediction-type v_prediction"
            )

    @property
    def prediction_type(self) -> PredictionType:
        """What the network's output means."""
        return self.network.prediction_type

    def why_it_cannot_run(self) -> str | None:
        """A reason to prune this training before it costs anything, or None."""
        return self.schedule.why_it_cannot_run(self.prediction_type)

    def to_dict(self) -> dict[str, Any]:
        """A tree of plain values, for JSON."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """The same under dotted names, such as `schedule.beta_start`."""
        return _flatten(self.to_dict())

    def for_examples(self, num_examples: int) -> "Config":
        """A copy whose `training.num_epochs`, if given, have become updates over so many examples."""
        training = self.training
        if training.num_epochs is None:
            return self
        updates = max(1, math.ceil(training.num_epochs * num_examples / training.batch_size))
        return self.with_values({"training.num_updates": updates, "training.num_epochs": None})

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Config":
        """Read a tree that `to_dict` wrote.

        Raises:
            InputError: an unknown name, or a value that its dataclass refuses.
        """
        try:
            # JSON knows lists alone.
            sections = {
                name: _SECTIONS[name](
                    **{key: tuple(leaf) if isinstance(leaf, list) else leaf for key, leaf in value.items()}
                )
                if name in _SECTIONS
                else value
                for name, value in tree.items()
            }
            return cls(**sections)
        except (TypeError, AttributeError) as error:
            raise InputError(
                f"the config has a name or shape that this version does not know: {error}"
            ) from error

    def with_values(self, values: dict[str, Any]) -> "Config":
        """A copy with values set by dotted names.

        Raises:
            InputError: an unknown name, or a value that is not allowed.
        """
        tree = self.to_dict()
        for dotted, value in values.items():
            section, _, name = dotted.rpartition(".")
            branch = tree.get(section) if section else tree
            if not isinstance(branch, dict) or name not in branch:
                raise InputError(f"{dotted}: no parameter has that name; there are {', '.join(self.flat())}")
            branch[name] = value
        return Config.from_dict(tree)


_SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "schedule": ScheduleConfig,
    "network": NetworkConfig,
    "training": TrainingConfig,
    "sampler": SamplerConfig,
    "metrics": MetricsConfig,
}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
