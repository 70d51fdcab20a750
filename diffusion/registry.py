"""Named implementations, such as samplers, that can be added here or by an installed package.

`Registry` maps names to implementations, each imported when it is first used, so this module is as light as
its names. Below it stands every kind of implementation that can be added, with the project's own;
docs/extending.md tells how.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from diffusion.errors import InputError
from diffusion.metrics import SAMPLE_DISTANCE, VAL_ELBO_WINDOW, VAL_MSE

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Implementations of one kind by name, each imported when it is first used.

    Listing names imports nothing, so command lines can offer them without loading torch. Another package
    adds an implementation by an entry point in the registry's group:

        [project.entry-points."ray_ddpm.samplers"]
        midpoint = "my_package.samplers:MIDPOINT"

    Args:
        kind: what the implementations are, such as "sampler"; used in error messages.
        group: group of the entry points, such as "ray_ddpm.samplers".
        own: the project's own implementations, as name -> "module:attribute".
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, str]) -> None:
        self.kind, self.group = kind, group
        self._own = dict(own)
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        """The implementation of a name.

        Raises:
            KeyError: no implementation has that name.
            InputError: the implementation of another package cannot be imported.
        """
        if name in self._loaded:
            return self._loaded[name]
        if name in self._own:
            module, attribute = self._own[name].split(":")
            self._loaded[name] = getattr(import_module(module), attribute)
        else:
            self._loaded[name] = self._load(self._external()[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in sorted(self._external()) if name not in self._own)

    def __len__(self) -> int:
        return len(set(self))

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._loaded or name in self._external()

    def check(self, name: str, flag: str) -> None:
        """Check that a name is registered.

        Args:
            name: name to check.
            flag: dotted name of the parameter, such as "sampler.name".

        Raises:
            InputError: no implementation has that name.
        """
        if name not in self:
            raise InputError(f"--{flag.replace('_', '-')} {name}: give one of {', '.join(self)}")

    def _external(self) -> dict[str, EntryPoint]:
        return {each.name: each for each in entry_points(group=self.group)}

    def _load(self, entry_point: EntryPoint) -> T:
        try:
            return entry_point.load()
        except Exception as error:  # importing another package can raise anything
            raise InputError(
                f"{self.kind} {entry_point.name}: {entry_point.value} cannot be imported "
                f"({type(error).__name__}: {error}); fix or uninstall that package"
            ) from error


# `diffusion.process.schedules.BetaSchedule`: betas from the fields of `ScheduleConfig`.
SCHEDULES: Registry[Any] = Registry(
    "schedule",
    "ray_ddpm.schedules",
    {
        "linear": "diffusion.process.schedules:LINEAR",
        "scaled_linear": "diffusion.process.schedules:SCALED_LINEAR",
        "quadratic": "diffusion.process.schedules:QUADRATIC",
        "cosine": "diffusion.process.schedules:COSINE",
        "sigmoid": "diffusion.process.schedules:SIGMOID",
        "constant": "diffusion.process.schedules:CONSTANT",
    },
)

# `diffusion.process.sampling_methods.SamplingMethod`: the coefficients of a sampler's steps.
SAMPLERS: Registry[Any] = Registry(
    "sampler",
    "ray_ddpm.samplers",
    {
        "ddpm": "diffusion.process.sampling_methods:DDPM",
        "ddim": "diffusion.process.sampling_methods:DDIM",
        "dpmpp_2m": "diffusion.process.sampling_methods:DPMPP_2M",
        "dpmpp_3m": "diffusion.process.sampling_methods:DPMPP_3M",
        "dpmpp_2m_sde": "diffusion.process.sampling_methods:DPMPP_2M_SDE",
        "heun": "diffusion.process.sampling_methods:HEUN",
        "heun_churn": "diffusion.process.sampling_methods:HEUN_CHURN",
    },
)

# A function (config, shape, num_classes) -> network, as `diffusion.networks.build.build_network`.
NETWORKS: Registry[Any] = Registry(
    "network",
    "ray_ddpm.networks",
    {"mlp": "diffusion.networks.mlp:build", "unet": "diffusion.networks.unet:build"},
)

# `diffusion.metrics.Objective`: what a sweep ranks its trials by.
OBJECTIVES: Registry[Any] = Registry(
    "objective",
    "ray_ddpm.objectives",
    {
        VAL_ELBO_WINDOW: "diffusion.metrics:BY_ELBO_WINDOW",
        VAL_MSE: "diffusion.metrics:BY_MSE",
        SAMPLE_DISTANCE: "diffusion.metrics:BY_SAMPLE_DISTANCE",
    },
)

# `diffusion.evaluation.distances.SampleMetric`: a comparison of samples with a reference.
SAMPLE_METRICS: Registry[Any] = Registry(
    "metric",
    "ray_ddpm.metrics",
    {
        "kernel": "diffusion.evaluation.distances:KERNEL",
        "auc": "diffusion.evaluation.two_sample_auc:AUC",
        "neighbour_kl": "diffusion.evaluation.neighbours:NEIGHBOUR_KL",
        "precision_recall": "diffusion.evaluation.neighbours:PRECISION_RECALL",
        "columns": "diffusion.evaluation.statistics:COLUMNS",
        "energy": "diffusion.evaluation.distances:ENERGY",
        "sliced_wasserstein": "diffusion.evaluation.distances:SLICED_WASSERSTEIN",
        "frechet": "diffusion.evaluation.distances:FRECHET",
        "kid": "diffusion.evaluation.distances:KID",
        "feature_auc": "diffusion.evaluation.two_sample_auc:FEATURE_AUC",
        "pixel_auc": "diffusion.evaluation.two_sample_auc:PIXEL_AUC",
        "image_statistics": "diffusion.evaluation.statistics:IMAGE_STATISTICS",
    },
)
# Subclasses of `diffusion.data.sources.DataSource`. Named data sets come by name, files by their suffix, and
# folders by "/".
DATA_SOURCES: Registry[Any] = Registry(
    "data source",
    "ray_ddpm.data_sources",
    {
        "digits": "diffusion.data.named:Digits",
        "heart": "diffusion.data.named:Heart",
        "mnist": "diffusion.data.named:Mnist",
        "fashion-mnist": "diffusion.data.named:FashionMnist",
        "cifar10": "diffusion.data.named:Cifar10",
        "/": "diffusion.data.image_folder:ImageFolder",
        ".csv": "diffusion.data.tables:TableFile",
        ".parquet": "diffusion.data.tables:TableFile",
        ".npy": "diffusion.data.tables:TableFile",
    },
)
