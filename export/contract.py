"""The contract of sampler.onnx: names of the graph's inputs and outputs, and its metadata in each version.

The metadata are text entries in the file itself, with everything that sampling needs. docs/onnx-format.md
specifies them for readers in other languages; a change here is a change there.
"""

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.files import parse_json
from diffusion.json_values import check_types, fits
from diffusion.normalisation import (
    check_description,
    check_normalisation,
    denormalise,
    is_interval,
    normalise,
)
from diffusion.process.given import DataUnits
from diffusion.process.posterior import Variance
from diffusion.process.prediction_types import PredictionType
from diffusion.process.samplers import COEFFICIENTS, EXTRA_COEFFICIENTS, SamplerTable
from diffusion.process.schedules import NoiseSchedule, Spacing

OPSET = 20
Precision = Literal["fp32", "fp16"]  # in which the weights are stored

# Names in the graph. A noise level has its own name as an input, see `NoiseLevel`.
X, TIMESTEP, LABEL, CONDITION_PREFIX = "x", "t", "y", "condition_"
OUTPUT, VARIANCE_OUTPUT = "model_output", "variance"
BATCH = "batch"  # the symbolic first dimension of every input and output

NoiseLevel = Literal["sigma", "log_snr"]

# Keys of the metadata.
_PREFIX = "ray_ddpm."
VERSION_KEY, SPEC_KEY, COLUMNS_KEY = (_PREFIX + name for name in ("format_version", "spec", "columns"))
TABLE_KEY, ALPHAS_CUMPROD_KEY = _PREFIX + "table", _PREFIX + "alphas_cumprod"
WHOLE_LOOP_KEY = _PREFIX + "whole_loop"  # of another kind of file, instead of a version: docs/whole-loop.md
TIMESTEPS_KEY, NOISE_LEVELS_KEY = _PREFIX + "timesteps", _PREFIX + "noise_levels"

FAST = "fast"  # member of "sampler", and name by which that choice is asked for
VERSION_1_SPACINGS = ("leading", "trailing", "linspace", "logsnr")
LEARNED_VARIANCE = "learned"  # value of the sampler's "variance" if the graph has `VARIANCE_OUTPUT`

_PARTS = ("data", "schedule", "prediction_type", "sampler", "provenance")
_VERSION_2_PARTS = ("noise_level", "conditions")  # optional
_CONDITION_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
_MAX_TIMESTEPS = 100_000  # of the schedule, and rows of a table
# Errors that untrusted metadata may cause; ValueError covers JSON, base64 and Unicode.
_METADATA_ERRORS = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True)
class ConditionSpec:
    """A further input of the network, besides x, the noise level and the label.

    Attributes:
        name: name of the condition; the graph's input is called `condition_NAME`.
        shape: shape of the condition of one sample.
        mean, std: mean and standard deviation, nested lists that broadcast against the shape. The network
            receives (value - mean) / std.
    """

    name: str
    shape: tuple[int, ...]
    mean: Any
    std: Any

    @property
    def input_name(self) -> str:
        """Name of the graph's input."""
        return CONDITION_PREFIX + self.name

    def normalise(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Convert values [batch, *shape] in the condition's units to the network's input."""
        return normalise(values, self.mean, self.std).astype(np.float32)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ConditionSpec":
        """Read one entry of the metadata."""
        return cls(**{**content, "shape": tuple(content["shape"])})


@dataclass(frozen=True)
class SamplerSpec:
    """Everything about a model that sampling needs besides the network.

    Attributes:
        data: description of the data: "kind", "shape", "mean", "std", "range", "columns" and "classes".
            For an unconditional model, "classes" is None or missing.
        schedule: the noise schedule: "kind", its parameters and "betas".
        prediction_type: meaning of the network's output.
        sampler: the default sampler: "name", "num_steps", "eta", "variance", "spacing", "clip" and
            "guidance_scale"; if measured, also `FAST`: "name" and "num_steps" of one with few network
            evaluations.
        provenance: origin of the model: "run_id", "git_revision", "data_fingerprint", "metrics", and
            "samplers" if they were measured.
        table: the coefficients of the default sampler.
        noise_level: the noise level that the network receives instead of a timestep, or None.
        conditions: further inputs of the network.
    """

    data: dict[str, Any]
    schedule: dict[str, Any]
    prediction_type: PredictionType
    sampler: dict[str, Any]
    provenance: dict[str, Any]
    table: SamplerTable
    noise_level: NoiseLevel | None = None
    conditions: tuple[ConditionSpec, ...] = ()

    @property
    def format_version(self) -> str:
        """Version of the file: "1" unless the model needs something that only version 2 has."""
        needs_version_2 = (
            self.noise_level is not None
            or self.conditions
            or self.table.columns != COEFFICIENTS
            or self.table.num_rows != self.sampler["num_steps"]
            or self.sampler["spacing"] not in VERSION_1_SPACINGS
        )
        return "2" if needs_version_2 else "1"

    @property
    def learned_variance(self) -> bool:
        """Whether the graph has the output `VARIANCE_OUTPUT`."""
        return self.sampler["variance"] == LEARNED_VARIANCE

    @property
    def level_input(self) -> str:
        """Name of the input that says how noisy x is."""
        return self.noise_level or TIMESTEP

    @property
    def graph_inputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape, without the batch dimension, of each input of the graph, in order."""
        return {
            X: ("float32", self.shape),
            self.level_input: ("int64" if self.noise_level is None else "float32", ()),
            **({LABEL: ("int64", ())} if self.classes else {}),
            **{condition.input_name: ("float32", condition.shape) for condition in self.conditions},
        }

    @property
    def graph_outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape, without the batch dimension, of each output of the graph, in order."""
        names = [OUTPUT] + ([VARIANCE_OUTPUT] if self.learned_variance else [])
        return {name: ("float32", self.shape) for name in names}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.data["shape"])

    @property
    def size(self) -> int:
        """Number of values in one sample."""
        return math.prod(self.shape)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule that the network was trained on."""
        return NoiseSchedule(self.schedule["betas"])

    @property
    def classes(self) -> list[str]:
        """Class names, indexed by label; empty if the model is unconditional."""
        return self.data.get("classes") or []

    @property
    def units(self) -> DataUnits:
        """Units of the data."""
        return DataUnits(self.shape, self.data["mean"], self.data["std"], self.data["range"])

    def denormalise(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Convert normalised samples [batch, *shape] to data units; images are clipped to their range."""
        return denormalise(x, self.data["mean"], self.data["std"], self.data["range"])

    def noise_levels(self, timesteps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Noise levels of training timesteps, for a network that receives `noise_level`."""
        schedule = self.noise_schedule
        if self.noise_level == "log_snr":
            return schedule.log_snr[timesteps]
        alphas_cumprod = schedule.alphas_cumprod[timesteps]
        with np.errstate(divide="ignore"):  # infinite where alphas_cumprod is 0
            return np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)

    def to_metadata(self) -> dict[str, str]:
        """Convert to entries for the metadata_props of an ONNX model."""
        version, table = self.format_version, self.table
        spec = {name: getattr(self, name) for name in _PARTS}
        if self.noise_level is not None:
            spec["noise_level"] = self.noise_level
        if self.conditions:
            spec["conditions"] = [asdict(condition) for condition in self.conditions]
        if table.noise_levels is None:
            levels = {TIMESTEPS_KEY: _encode(table.timesteps, "<i8")}
        else:
            levels = {NOISE_LEVELS_KEY: _encode(table.noise_levels, "<f8")}
        return {
            VERSION_KEY: version,
            SPEC_KEY: json.dumps(spec, allow_nan=False),
            **levels,
            TABLE_KEY: _encode(table.coefficients, "<f8"),
            ALPHAS_CUMPROD_KEY: _encode(table.alphas_cumprod, "<f8"),
            **({COLUMNS_KEY: json.dumps(table.columns)} if version != "1" else {}),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "SamplerSpec":
        """Read and check the entries that `to_metadata` writes.

        Raises:
            InputError: entries are missing, malformed or inconsistent, or have an unsupported format
                version.
        """
        version = metadata.get(VERSION_KEY)
        if version is None and WHOLE_LOOP_KEY in metadata:
            raise InputError(
                "the file is a whole loop, which ONNX Runtime runs in one call (docs/whole-loop.md): "
                "give the sampler.onnx that it was made of"
            )
        if version is None:
            raise InputError("the file has no ray_ddpm metadata: give one that export.to_onnx wrote")
        if version not in _READERS:
            known = " and ".join(repr(name) for name in _READERS)
            raise InputError(
                f"the file has ray_ddpm format {version[:20]!r}, but this version of ray-ddpm reads {known}: "
                "export the model again, or install a newer ray-ddpm"
            )
        try:
            result = _READERS[version](metadata)
            result._check()
        except _METADATA_ERRORS as error:
            first_line = (str(error).splitlines() or [""])[0][:100]
            raise InputError(
                f"the file's ray_ddpm metadata is damaged ({type(error).__name__}: {first_line}): "
                "export the model again"
            ) from error
        return result

    def _check(self) -> None:
        num_train_timesteps = self.noise_schedule.num_train_timesteps
        _require(
            num_train_timesteps <= _MAX_TIMESTEPS,
            f"the schedule has {num_train_timesteps} timesteps, more than {_MAX_TIMESTEPS}",
        )
        self._check_table(num_train_timesteps)
        _require(self.prediction_type in get_args(PredictionType), f"prediction_type {self.prediction_type}")
        check_description(self.data)
        self._check_sampler(num_train_timesteps)

    def _check_table(self, num_train_timesteps: int) -> None:
        table = self.table
        _require(table.num_rows > 0, "the table has no rows")
        if table.noise_levels is None:
            in_range = table.timesteps.min() >= 0 and table.timesteps.max() < num_train_timesteps
            _require(in_range, f"the table's timesteps are not all in 0..{num_train_timesteps - 1}")
        else:
            # The network receives them as float32.
            finite = np.abs(table.noise_levels) <= np.finfo(np.float32).max
            _require(finite.all(), "the table's noise levels are not finite")
            positive = self.noise_level != "sigma" or (table.noise_levels > 0.0).all()
            _require(positive, "the table's sigmas are not positive")
        factors = [name for name in table.columns if name not in ("lo", "hi")]
        _require(np.isfinite([table.column(name) for name in factors]).all(), "the table is not finite")
        _require((table.column("lo") <= table.column("hi")).all(), "the table has an empty clip interval")
        _require(np.isfinite(table.alphas_cumprod).all(), "alphas_cumprod is not finite")

    def _check_sampler(self, num_train_timesteps: int) -> None:
        sampler = self.sampler
        variances = get_args(Variance) + ((LEARNED_VARIANCE,) if "g" in self.table.columns else ())
        # Any name, even of a package that is not installed here: its table is all that it needs.
        for each in (sampler, sampler.get(FAST, sampler)):
            check_types(each, {"name": str, "num_steps": int}, "sampler ")
            name, num_steps = each["name"], each["num_steps"]
            _require(name.replace("-", "_").isidentifier(), f"sampler name {name}")
            _require(
                1 <= num_steps <= num_train_timesteps,
                f"num_steps {num_steps} is not in 1..{num_train_timesteps}",
            )
        check_types(sampler, {"eta": float, "guidance_scale": float}, "sampler ")
        for name, choices in (("variance", variances), ("spacing", get_args(Spacing))):
            _require(sampler[name] in choices, f"sampler {name} {sampler[name]}")
        clip = sampler["clip"]
        _require(0.0 <= sampler["eta"] <= 1.0, f"eta {sampler['eta']}")
        _require(clip is None or is_interval(clip), f"clip {clip}")
        scale = sampler["guidance_scale"]
        _require(0.0 <= scale <= 100.0, f"guidance_scale {scale}")


def _read_version_1(metadata: Mapping[str, str]) -> SamplerSpec:
    spec = _read_parts(metadata, _PARTS)
    timesteps = _decode(metadata[TIMESTEPS_KEY], "<i8").astype(np.int64)
    table = _read_table(metadata, spec["sampler"]["num_steps"], COEFFICIENTS, timesteps)
    _require(
        spec["sampler"]["spacing"] in VERSION_1_SPACINGS, f"sampler spacing {spec['sampler']['spacing']}"
    )
    num_train_timesteps = len(spec["schedule"]["betas"])
    _require(
        len(timesteps) <= num_train_timesteps,
        f"the table has {len(timesteps)} steps, more than the schedule's {num_train_timesteps}",
    )
    return SamplerSpec(table=table, **spec)


def _read_version_2(metadata: Mapping[str, str]) -> SamplerSpec:
    spec = _read_parts(metadata, (*_PARTS, *_VERSION_2_PARTS), optional=_VERSION_2_PARTS)
    columns = parse_json(metadata[COLUMNS_KEY], list, "the list of columns", "export the model again")
    known = (*COEFFICIENTS, *EXTRA_COEFFICIENTS)
    _require(
        fits(columns, list[str])
        and len(columns) == len(set(columns))
        and set(COEFFICIENTS) <= set(columns) <= set(known),
        f"columns {columns} are not {' '.join(COEFFICIENTS)} and possibly {' '.join(EXTRA_COEFFICIENTS)}",
    )
    if "noise_level" in spec:
        _require(spec["noise_level"] in get_args(NoiseLevel), f"noise_level {spec['noise_level']}")
        levels = _decode(metadata[NOISE_LEVELS_KEY], "<f8")
        table = _read_table(
            metadata, spec["sampler"]["num_steps"], tuple(columns), np.zeros(0, dtype=np.int64), levels
        )
    else:
        timesteps = _decode(metadata[TIMESTEPS_KEY], "<i8").astype(np.int64)
        table = _read_table(metadata, spec["sampler"]["num_steps"], tuple(columns), timesteps)
    sampler = spec["sampler"]
    _require(
        sampler["num_steps"] <= table.num_rows <= _MAX_TIMESTEPS,
        f"the table has {table.num_rows} rows for {sampler['num_steps']} steps",
    )
    has_g = "g" in columns
    _require(
        has_g == (sampler["variance"] == LEARNED_VARIANCE),
        f"the variance is {sampler['variance']}, but the table has {'the' if has_g else 'no'} column g",
    )
    noiseless = table.column("s") == 0.0
    _require((table.column("g")[noiseless] == 0.0).all(), "g is not 0 in a row where s is 0")
    conditions = spec.pop("conditions", [])
    _require(isinstance(conditions, list), "conditions is not a list")
    result = SamplerSpec(
        table=table, conditions=tuple(ConditionSpec.from_json(each) for each in conditions), **spec
    )
    names = [condition.name for condition in result.conditions]
    _require(len(names) == len(set(names)), "two conditions have the same name")
    for condition in result.conditions:
        _require(_CONDITION_NAME.fullmatch(condition.name), f"condition name {condition.name[:64]!r}")
        check_normalisation(condition.shape, condition.mean, condition.std)
    return result


# Every version that has been written, with its reader; `SamplerSpec.from_metadata` checks what both have.
_READERS: dict[str, Callable[[Mapping[str, str]], SamplerSpec]] = {
    "1": _read_version_1,
    "2": _read_version_2,
}


def _read_parts(
    metadata: Mapping[str, str], names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Read the JSON object of the metadata, which must have these parts and no others."""
    spec = parse_json(metadata[SPEC_KEY], dict, "the spec", "export the model again", allow_nan=False)
    for name in names:
        _require(name in spec or name in optional, f"the spec has no {name}")
    unknown = [name for name in spec if name not in names]
    _require(not unknown, f"the spec has an unknown part {', '.join(unknown)}")
    objects = ("data", "schedule", "sampler", "provenance")
    check_types(spec, dict.fromkeys(objects, dict[str, Any]), "the spec's ")
    check_types(spec["schedule"], {"kind": str, "betas": list[float]}, "schedule ")
    return spec


def _read_table(
    metadata: Mapping[str, str],
    num_steps: int,
    columns: tuple[str, ...],
    timesteps: NDArray[np.int64],
    noise_levels: NDArray[np.float64] | None = None,
) -> SamplerTable:
    num_rows = len(timesteps) if noise_levels is None else len(noise_levels)
    return SamplerTable(
        timesteps,
        _decode(metadata[TABLE_KEY], "<f8").reshape(num_rows, len(columns)),
        _decode(metadata[ALPHAS_CUMPROD_KEY], "<f8").reshape(num_rows + 1),
        _rows_per_step(num_rows, num_steps),
        columns,
        noise_levels,
    )


def _rows_per_step(num_rows: int, num_steps: int) -> int:
    """Rows of each step except the last, which has one."""
    return max(1, (num_rows - 1) // (num_steps - 1)) if num_steps > 1 else 1


def _require(condition: Any, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _encode(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode()


def _decode(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
