"""Chains sampler.onnx files: each draws larger images for those that the one before has drawn.

    from export import Cascade, Sampler

    cascade = Cascade([Sampler("low.onnx"), Sampler("second.onnx")])
    digits = cascade.sample(64, seed=0)  # float32 [64, 1, 28, 28] in data units

From the command line: `python -m export.sampler low.onnx --then second.onnx`. Needs only numpy.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion.config import MAX_LOW_RESOLUTION_NOISE
from diffusion.errors import InputError
from diffusion.json_values import short_repr
from export.conditions import LOW_RESOLUTION, LOW_RESOLUTION_NOISE
from export.contract import SamplerSpec
from export.labels import Labels
from export.noise import condition_noise, stage_seed
from export.values import real_number, whole_number


class Stage(Protocol):
    """What a cascade needs of an `export.Sampler`."""

    spec: SamplerSpec

    @property
    def sample(self) -> Callable[..., NDArray[np.float32]]:
        """`export.Sampler.sample`."""


class Cascade:
    """Draws samples with several models: the first draws small images, each further one larger ones for them.

    Sample i of a seed is the same for any number of samples and any batch size, up to rounding. Each model
    has noise of its own. Noise is added to the images that a model receives, as in its training.

    Args:
        samplers: the models, at least two, in order. Each after the first is a super-resolution model.

    Attributes:
        samplers: as given.
        spec: metadata of the last model, whose samples are those of the cascade.

    Raises:
        InputError: they are no samplers, there are fewer than two, one after the first receives no
            low-resolution image, or the images of two that follow each other have other shapes, ranges or
            classes.

    Source: Cascaded diffusion, arXiv:2106.15282.
    """

    def __init__(self, samplers: Sequence[Stage]) -> None:
        if odd := [each for each in samplers if not hasattr(each, "spec")]:
            raise InputError(
                f"a cascade of {short_repr(odd[0])}: give samplers, such as Sampler(FILE), not files"
            )
        if len(samplers) < 2:
            raise InputError(f"a cascade of {len(samplers)}: give at least two models")
        for number, (first, second) in enumerate(zip(samplers, samplers[1:], strict=False), start=2):
            _check_fit(first.spec, second.spec, f"model {number} of the cascade")
        self.samplers = tuple(samplers)
        self.spec = samplers[-1].spec

    @property
    def classes(self) -> list[str]:
        """Class names, indexed by label; empty if no model has classes."""
        return next((each.spec.classes for each in self.samplers if each.spec.classes), [])

    def sample(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        first_index: int = 0,
        labels: Labels | None = None,
        guidance_scale: float | None = None,
        low_resolution_noise: float | None = None,
        conditions: Mapping[str, ArrayLike] | None = None,
        time_limit: float | None = None,
        **options: Any,
    ) -> NDArray[np.float32]:
        """Draw samples.

        Args:
            num_samples: number of samples, at least 1.
            seed: seed of the noise; only seed mod 2^32 is used.
            first_index: index of the first sample of the seed.
            labels, guidance_scale: as for `export.Sampler.sample`, for all models that have classes.
            low_resolution_noise: standard deviation of the noise that is added to the images between two
                models, in units of the data's, 0 to 10; None: each file's own. More hides more of the
                errors of the model before.
            conditions: conditions of the first model, if it has any.
            time_limit: time that the call may take, in seconds.
            options: other arguments of `export.Sampler.sample`, such as `num_steps`, for every model.

        Returns:
            float32 [num_samples, *shape] in data units, of the last model.

        Raises:
            InputError: as for `export.Sampler.sample`, and if labels or guidance are given but no model has
                classes.
        """
        number = whole_number("seed", seed)
        level = None
        if low_resolution_noise is not None:
            level = real_number("low_resolution_noise", low_resolution_noise)
            if not 0.0 <= level <= MAX_LOW_RESOLUTION_NOISE:
                raise InputError(
                    f"low_resolution_noise {level:g}: give 0 to {MAX_LOW_RESOLUTION_NOISE:g}, such as 0.1"
                )
        if not self.classes:
            for name, value in (("labels", labels), ("guidance_scale", guidance_scale)):
                if value is not None:
                    raise InputError(f"{name} {value!r}: no model has classes; leave it out")
        images: NDArray[np.float32] | None = None
        started = time.monotonic()
        for stage, sampler in enumerate(self.samplers):
            own_seed = stage_seed(number, stage)
            if images is not None:
                conditions = _noised(images, sampler.spec, level, own_seed, first_index)
            if time_limit is not None and stage:
                options["time_limit"] = max(time_limit - (time.monotonic() - started), 1e-9)
            of_classes = {"labels": labels, "guidance_scale": guidance_scale} if sampler.spec.classes else {}
            images = sampler.sample(
                num_samples,
                seed=own_seed,
                first_index=first_index,
                conditions=conditions,
                **of_classes,
                **{"time_limit": time_limit, **options},
            )
        assert images is not None, "there are at least two models"
        return images


def cascade_files(folder: Path) -> list[Path]:
    """The files of a cascade in a folder, in order: 1.onnx, 2.onnx and so on."""
    return sorted(folder.glob("[0-9]*.onnx"), key=lambda path: (len(path.name), path.name))


def _check_fit(first: SamplerSpec, second: SamplerSpec, name: str) -> None:
    conditions = {condition.name: condition for condition in second.conditions}
    image = conditions.get(LOW_RESOLUTION)
    if image is None:
        raise InputError(
            f"{name} receives no low-resolution image: give one that train.py --super-resolution has trained"
        )
    if other := set(conditions) - {LOW_RESOLUTION, LOW_RESOLUTION_NOISE}:
        raise InputError(f"{name} also needs the condition {min(other)}, which no model before it draws")
    for what, drawn, received in (
        ("shape", list(first.shape), list(image.shape)),
        ("range", first.data["range"], second.data["range"]),
    ):
        if drawn != received:
            raise InputError(
                f"{name} receives images of {what} {received}, but those of the model before it have {what} "
                f"{drawn}: give models of the same data whose sizes meet, such as --image-size 7 and "
                "--super-resolution 7:28"
            )
    if first.classes and second.classes and first.classes != second.classes:
        raise InputError(f"{name} has other classes than the model before it: give models of the same data")


def _noised(
    images: NDArray[np.float32], spec: SamplerSpec, level: float | None, seed: int, first_index: int
) -> dict[str, ArrayLike]:
    """Conditions of a super-resolution model for images in data units, with noise as in its training."""
    conditions = {condition.name: condition for condition in spec.conditions}
    if level is None:
        level = (
            float(spec.sampler.get(LOW_RESOLUTION_NOISE, 0.0)) if LOW_RESOLUTION_NOISE in conditions else 0.0
        )
    found: dict[str, ArrayLike] = {LOW_RESOLUTION_NOISE: level} if LOW_RESOLUTION_NOISE in conditions else {}
    values = images.astype(np.float64)
    if level:
        indices = first_index + np.arange(len(images))
        noise = condition_noise(seed, indices, images.shape[1:])
        values += level * noise * np.array(conditions[LOW_RESOLUTION].std)
    return {**found, LOW_RESOLUTION: values}
