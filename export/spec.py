"""The metadata of sampler.onnx: everything needed to sample, as text in the file itself."""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.normalisation import denormalise
from diffusion.sampling import COEFFICIENTS, PredictionType, SamplerTable
from diffusion.schedules import NoiseSchedule

FORMAT_VERSION = "1"
_PREFIX = "ray_ddpm."


@dataclass(frozen=True)
class SamplerSpec:
    """What the metadata say.

    Attributes:
        data: "kind", "shape", "mean", "std", "range" and "columns" of the data.
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
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule that the network was trained on."""
        return NoiseSchedule(self.schedule["betas"])

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
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise InputError(
                f"the file's ray_ddpm metadata are damaged ({type(error).__name__}: {str(error)[:100]}): "
                "export the model again"
            ) from error
        return result

    def _check(self) -> None:
        total = self.noise_schedule.num_train_timesteps
        timesteps = self.table.timesteps
        if len(timesteps) == 0 or timesteps.min() < 0 or timesteps.max() >= total:
            raise ValueError(f"the table's timesteps do not lie in 0..{total - 1}")
        if not np.isfinite(self.table.coefficients[:, :7]).all():
            raise ValueError("the table is not finite")
        if self.data["kind"] not in ("image", "points"):
            raise ValueError(f"unknown kind of data {self.data['kind']!r}")
        if self.denormalise(np.zeros((1, *self.shape))).shape != (1, *self.shape):
            raise ValueError("mean and std do not fit the shape")


def _encode(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode()


def _decode(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
