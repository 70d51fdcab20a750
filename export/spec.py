"""The metadata of sampler.onnx: everything needed to sample, as text in the file itself."""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.normalisation import denormalise
from diffusion.sampling import COEFFICIENTS, PredictionType, SamplerName, SamplerTable, Variance
from diffusion.schedules import NoiseSchedule, Spacing

FORMAT_VERSION = "1"
_PREFIX = "ray_ddpm."
_MOST_VALUES = 2**28  # of one sample
_MOST_STEPS = 100_000
# What reading text that somebody else wrote can raise; ValueError covers JSON, base64 and Unicode.
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError, MemoryError)


@dataclass(frozen=True)
class SamplerSpec:
    """What the metadata say.

    Attributes:
        data: "kind", "shape", "mean", "std", "range", "columns" and "classes" of the data; classes are
            None, or not there, where the model is unconditional.
        schedule: "kind", its parameters and "betas".
        prediction_type: what the network's output means.
        sampler: "name", "num_steps", "eta", "variance", "spacing", "clip", "guidance_scale".
        provenance: "run_id", "git_revision", "data_fingerprint", "metrics".
        table: the default sampler.
    """

    data: dict[str, Any]
    schedule: dict[str, Any]
    prediction_type: PredictionType
    sampler: dict[str, Any]
    provenance: dict[str, Any]
    table: SamplerTable

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.data["shape"])

    @property
    def size(self) -> int:
        """Values of one sample."""
        return math.prod(self.shape)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule that the network was trained on."""
        return NoiseSchedule(self.schedule["betas"])

    @property
    def classes(self) -> list[str]:
        """Names by label number; none where the model is unconditional."""
        return self.data.get("classes") or []

    def denormalise(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Normalised [batch, *shape] to data units, images clipped to their range."""
        return denormalise(x, self.data["mean"], self.data["std"], self.data["range"])

    def to_metadata(self) -> dict[str, str]:
        """The entries of metadata_props."""
        parts = ("data", "schedule", "prediction_type", "sampler", "provenance")
        return {
            _PREFIX + "format_version": FORMAT_VERSION,
            _PREFIX + "spec": json.dumps({name: getattr(self, name) for name in parts}, allow_nan=False),
            _PREFIX + "timesteps": _encode(self.table.timesteps, "<i8"),
            _PREFIX + "table": _encode(self.table.coefficients, "<f8"),
            _PREFIX + "alphas_cumprod": _encode(self.table.alphas_cumprod, "<f8"),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "SamplerSpec":
        """Read what `to_metadata` wrote.

        Raises:
            InputError: entries are missing, malformed, contradict each other, or are of a format
                that this version does not read.
        """
        version = metadata.get(_PREFIX + "format_version")
        if version is None:
            raise InputError("this ONNX file holds no ray_ddpm metadata: give one that export.to_onnx wrote")
        if version != FORMAT_VERSION:
            raise InputError(
                f"the file has ray_ddpm format {version[:20]!r}: this version reads {FORMAT_VERSION!r}, "
                "so export the model again"
            )
        try:
            spec = json.loads(metadata[_PREFIX + "spec"])
            timesteps = _decode(metadata[_PREFIX + "timesteps"], "<i8")
            table = SamplerTable(
                timesteps.astype(np.int64),
                _decode(metadata[_PREFIX + "table"], "<f8").reshape(len(timesteps), len(COEFFICIENTS)),
                _decode(metadata[_PREFIX + "alphas_cumprod"], "<f8").reshape(len(timesteps) + 1),
            )
            result = cls(table=table, **spec)
            result._check()
        except _DAMAGE as error:
            first_line = (str(error).splitlines() or [""])[0][:100]
            raise InputError(
                f"the file's ray_ddpm metadata are damaged ({type(error).__name__}: {first_line}): "
                "export the model again"
            ) from error
        return result

    def _check(self) -> None:
        total = self.noise_schedule.num_train_timesteps
        timesteps, rows = self.table.timesteps, self.table.coefficients
        inside = len(timesteps) > 0 and timesteps.min() >= 0 and timesteps.max() < total
        _need(inside, f"the table's timesteps do not lie in 0..{total - 1}")
        _need(total <= _MOST_STEPS, f"{total} timesteps are more than {_MOST_STEPS}")
        _need(len(timesteps) <= total, f"the table has {len(timesteps)} steps, the schedule {total}")
        _need(np.isfinite(rows[:, :7]).all(), "the table is not finite")
        _need((rows[:, 7] <= rows[:, 8]).all(), "the table's clip intervals are none")
        _need(np.isfinite(self.table.alphas_cumprod).all(), "alphas_cumprod is not finite")
        _need(self.prediction_type in get_args(PredictionType), f"prediction_type {self.prediction_type}")
        self._check_data()
        self._check_sampler(total)

    def _check_data(self) -> None:
        data = self.data
        mean, std = (np.array(data[name], dtype=np.float64) for name in ("mean", "std"))
        _need(data["kind"] in ("image", "points"), f"data kind {data['kind']}")
        _need(all(isinstance(size, int) and size > 0 for size in self.shape), f"shape {self.shape}")
        _need(0 < self.size <= _MOST_VALUES, f"shape {self.shape} is too large")
        fits = np.broadcast_shapes(mean.shape, std.shape, self.shape) == self.shape
        _need(fits, "mean and std do not fit the shape")
        _need(np.isfinite(mean).all() and np.isfinite(std).all(), "mean or std is not finite")
        _need((std > 0).all(), "std is not positive")
        names = self.classes
        _need(isinstance(names, list) and all(isinstance(name, str) for name in names), "classes")
        _need(data["range"] is None or _is_interval(data["range"]), f"range {data['range']}")

    def _check_sampler(self, total: int) -> None:
        sampler = self.sampler
        for name, choices in (("name", SamplerName), ("variance", Variance), ("spacing", Spacing)):
            _need(sampler[name] in get_args(choices), f"sampler {name} {sampler[name]}")
        steps, clip = sampler["num_steps"], sampler["clip"]
        _need(isinstance(steps, int) and 1 <= steps <= total, f"num_steps {steps} is not in 1..{total}")
        _need(0.0 <= sampler["eta"] <= 1.0, f"eta {sampler['eta']}")
        _need(clip is None or _is_interval(clip), f"clip {clip}")
        scale = sampler["guidance_scale"]
        _need(0.0 <= scale <= 100.0, f"guidance_scale {scale}")


def _need(holds: Any, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _is_interval(pair: Any) -> bool:
    low, high = pair
    return bool(np.isfinite(low) and np.isfinite(high) and low < high)


def _encode(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode()


def _decode(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
