"""What a sweep or a training leaves behind, read from its folder: trials, metrics, models, samplers."""

import base64
import io
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffusion.config import Config
from diffusion.errors import InputError
from diffusion.files import os_reason, parse_json, path_kind, read_json, user_path
from diffusion.json_values import fits
from diffusion.metrics import DISTANCE, FLOOR, TEST_ELBO_WINDOW, TEST_SAMPLE_PREFIX
from export.sampler import Sampler
from workflows.status import Status
from workflows.storage.run_record import Command, RunRecord, read_record
from workflows.storage.storage import Storage

if TYPE_CHECKING:
    import pandas as pd

    from diffusion.training.checkpoints import TrainedModel

_SHOWN_METRICS = {
    TEST_ELBO_WINDOW: "ELBO window on the test split, nats/dim",
    TEST_SAMPLE_PREFIX + DISTANCE: "sample distance on the test split",
    TEST_SAMPLE_PREFIX + DISTANCE + FLOOR: "the same for training examples",
}


class RunFailed(RuntimeError):
    """A sweep or a training ended without a model; the message is one line.

    Attributes:
        path: folder or bucket of the run, with what it left behind.
    """

    def __init__(self, reason: str, path: str) -> None:
        super().__init__(reason)
        self.path = path


@dataclass(frozen=True, eq=False, repr=False)
class _RunResult:
    """What sweeps and trainings have in common.

    Attributes:
        name: name of the run.
        path: absolute path of the run's folder, or its URI if it is a bucket.
        status: "finished"; "stopped" by Ctrl-C, SIGTERM or an earlier session's end; "failed"; or "running".
    """

    name: str
    path: Path | str
    status: Status

    _command: ClassVar[Command]
    _model: ClassVar[str]

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before it was done; `resume=True` continues it."""
        return self.status == "stopped"

    @cached_property
    def model_dir(self) -> Path:
        """Local folder of the exported model: sampler.onnx, config.json, pictures and more.

        The folder of a model in a bucket is a temporary copy, which is removed with this object.

        Raises:
            InputError: the run has no model, because it was stopped or failed.
        """
        if isinstance(self.path, Path):
            folder = self.path / self._model
        else:
            folder = Path(self._download.name)
            storage = Storage(self.path).child(self._model)
            for name in storage.files():
                (folder / name).write_bytes(storage.read_bytes(name) or b"")
        if not (folder / "sampler.onnx").is_file():
            raise InputError(
                f"{self.path} has no {self._model}/ (status {self.status}); continue the run with "
                f"name={self.name!r}, resume=True"
            )
        return folder

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Metrics of the exported model: `test/...` from the test split, and others by name.

        Raises:
            InputError: the run has no model.
        """
        return dict(self._description["provenance"].get("metrics", {}))

    @cached_property
    def config(self) -> Config:
        """Config of the exported model.

        Raises:
            InputError: the run has no model.
        """
        return Config.from_dict(self._description["config"])

    @cached_property
    def sampler(self) -> Sampler:
        """Sampler of the exported model, which needs no PyTorch.

        Raises:
            InputError: the run has no model.
        """
        return Sampler(self.model_dir / "sampler.onnx")

    @cached_property
    def model(self) -> "TrainedModel":
        """The exported model as a PyTorch network, on the CPU.

        Raises:
            InputError: the run has no model.
        """
        from diffusion.training.checkpoints import TrainedModel

        return TrainedModel.load(self.model_dir)

    @cached_property
    def _description(self) -> dict[str, dict[str, Any]]:
        tree = read_json(self.model_dir / "config.json", "a run with an undamaged model")
        for name in ("provenance", "config"):
            if not isinstance(tree.get(name), dict):
                raise InputError(f"{self.model_dir}/config.json is damaged ({name}): resume the run")
        return tree

    @cached_property
    def _download(self) -> "tempfile.TemporaryDirectory[str]":
        return tempfile.TemporaryDirectory(prefix="ray-ddpm-")

    @property
    def _has_model(self) -> bool:
        try:
            return self.model_dir.is_dir()
        except InputError:
            return False

    def _facts(self) -> dict[str, str]:
        """What the repr shows, by name."""
        facts = {"path": str(self.path), "status": self.status}
        if self._has_model:
            shown = {name: self.metrics[name] for name in _SHOWN_METRICS if name in self.metrics}
            facts |= {name: f"{value:.4g}" for name, value in shown.items()}
        return facts

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value}" for name, value in self._facts().items())
        return f"<{type(self).__name__} {self.name}: {facts}>"

    def _repr_html_(self) -> str:
        """A table of the most important numbers and the picture of samples, for notebooks."""
        rows = "".join(
            f"<tr><td>{escape(_SHOWN_METRICS.get(name, name))}</td><td>{escape(value)}</td></tr>"
            for name, value in self._facts().items()
        )
        picture = ""
        if self._has_model:
            content = base64.b64encode((self.model_dir / "samples.png").read_bytes()).decode()
            picture = f'<img alt="samples" src="data:image/png;base64,{content}">'
        title = f"{type(self).__name__} {escape(self.name)}"
        return f"<div><b>{title}</b><table>{rows}</table>{picture}</div>"

    @classmethod
    def _open(cls, path: str | os.PathLike[str]) -> tuple[RunRecord, Path | str, Storage]:
        """Record and location of a run of this command."""
        text = os.fspath(path)
        location: Path | str = text if "://" in text else user_path(text)
        missing = InputError(
            f"{path}: there is no run of {cls._command}.py; give its folder, such as runs/NAME"
        )
        if isinstance(location, Path) and path_kind(location) != "folder":
            raise missing
        storage = Storage(str(location))
        record = read_record(storage)
        if record is None or record.command != cls._command:
            raise missing
        return record, location, storage


@dataclass(frozen=True)
class Champion:
    """The best trial of a sweep.

    Attributes:
        trial_id: ID of the trial, as in `SweepResult.trials`.
        path: folder of the exported model.
        config: config that it was trained with.
    """

    trial_id: str
    path: Path
    config: Config


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult(_RunResult):
    """The result of a sweep: `run_sweep` returns it, `SweepResult.load` reads it again.

    `metrics`, `config`, `sampler`, `model` and `model_dir` are those of the champion.

    Attributes:
        name: name of the sweep.
        path: absolute path of its folder, or its URI if it is in a bucket.
        status: "finished", "stopped", "failed", or "running".
        trials: one row a trial, as in trials.csv: `trial_id`, `status`, `seconds`, `updates`, `objective`,
            the parameters and the metrics.
    """

    trials: "pd.DataFrame"

    _command = "tune"
    _model = "champion"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read the folder or the bucket of a sweep.

        Raises:
            InputError: it is not a sweep's folder.
        """
        import pandas as pd

        record, location, storage = cls._open(path)
        table = _read(storage, "trials.csv")
        try:
            trials = pd.DataFrame() if table is None else pd.read_csv(io.StringIO(table))
        except ValueError as error:  # of pandas' parser
            raise InputError(
                f"{path}/trials.csv is damaged ({error}): resume the sweep, which writes it again"
            ) from error
        return cls(record.name, location, record.status, trials)

    @cached_property
    def champion(self) -> Champion:
        """The best trial.

        Raises:
            InputError: no trial produced a model.
        """
        trial_id = str(self._description["provenance"].get("trial_id", ""))
        return Champion(trial_id, self.model_dir, self.config)

    def _facts(self) -> dict[str, str]:
        counts: Mapping[str, int] = dict(self.trials["status"].value_counts()) if len(self.trials) else {}
        states = ", ".join(f"{count} {status}" for status, count in counts.items())
        facts = {"trials": f"{len(self.trials)} ({states})" if states else "0"}
        if self._has_model:
            facts["champion"] = self.champion.trial_id
        return super()._facts() | facts


@dataclass(frozen=True, eq=False, repr=False)
class TrainingResult(_RunResult):
    """The result of a training: `run_training` returns it, `TrainingResult.load` reads it again.

    Attributes:
        name: name of the run.
        path: absolute path of its folder, or its URI if it is a bucket.
        status: "finished", "stopped", "failed", or "running".
        history: one row an evaluation: `update` and the metrics, from the newest checkpoint.
    """

    history: "pd.DataFrame"

    _command = "train"
    _model = "model"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read the folder or the bucket of a training.

        Raises:
            InputError: there is no training.
        """
        import pandas as pd

        record, location, storage = cls._open(path)
        checkpoints = storage.child("checkpoints")
        newest = max((name for name in checkpoints.names() if name.isdecimal()), default=None)
        text = _read(checkpoints, f"{newest}/history.json") if newest else None
        entries = parse_json(text or "[]", list, f"{path}: history.json", "resume the training")
        if not fits(entries, list[dict[str, Any]]):
            raise InputError(f"{path}: the history of its newest checkpoint is damaged: resume the training")
        history = [{"update": entry.get("update"), **dict(entry.get("metrics", {}))} for entry in entries]
        return cls(record.name, location, record.status, pd.DataFrame(history))

    def _facts(self) -> dict[str, str]:
        updates = str(self.history["update"].iloc[-1]) if len(self.history) else "0"
        return super()._facts() | {"updates": updates}


def _read(storage: Storage, name: str) -> str | None:
    """Read a text of a run; None if there is none.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return storage.read_text(name)
    except OSError as error:
        raise InputError(f"{storage}/{name} cannot be read ({os_reason(error)}): resume the run") from error
