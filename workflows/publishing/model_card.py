"""The model card: what a model is, where it comes from, its training data, metrics and limits."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.data.dataset import DataSpec
from diffusion.evaluation.copying import copying_verdict
from diffusion.evaluation.sampler_choice import SamplerChoice
from diffusion.metrics import COPIED, COPIED_DETECTABLE, FLOOR, KERNEL, TEST_SAMPLE_PREFIX
from diffusion.process.schedule_checks import prior_mismatch
from diffusion.training.checkpoints import TrainedModel
from workflows.publishing.deployed_sampler import sampler_table
from workflows.publishing.markdown import code, code_block, plain

MODEL_CARD = "model_card.md"


def write_model_card(model: TrainedModel, directory: Path) -> None:
    """Write model_card.md into an existing folder."""
    (directory / MODEL_CARD).write_text(model_card(model), encoding="utf-8")


def copying_summary(metrics: Mapping[str, float], prefix: str = TEST_SAMPLE_PREFIX) -> str:
    """One or two sentences on whether the model copies training examples.

    Args:
        metrics: metrics of its samples by name.
        prefix: prefix of their names.
    """
    name = prefix + COPIED
    if name not in metrics:
        return "Whether it copies training examples was not measured."
    copied, floor = (100.0 * metrics[each] for each in (name, name + FLOOR))
    detectable = 100.0 * metrics.get(prefix + COPIED_DETECTABLE, 1.0)
    begin, end = {
        "copies": ("It copies training examples", ""),
        "no sign": ("No sign of copying", f" {detectable:.3g}% of copies would have been found."),
        "too little data": (
            "Too little data to say whether it copies training examples",
            f" Only {detectable:.3g}% of copies or more would have been found.",
        ),
    }[copying_verdict(metrics, prefix)]
    return (
        f"{begin}: {copied:.1f}% of its samples are less than a third as far from the nearest training "
        f"example as from the next; of held-out examples, {floor:.1f}% are.{end}"
    )


def model_card(model: TrainedModel) -> str:
    """The model card in Markdown: what the model is, its training data, its metrics and parameters."""
    config, data = model.config, model.data
    metrics: Mapping[str, float] = model.provenance.get("metrics", {})
    trial_id = model.provenance.get("trial_id")
    origin = f"trial {code(trial_id)} of a ray-ddpm sweep" if trial_id else "a ray-ddpm training"
    if (update := model.provenance.get("update")) is not None:
        planned = config.training.num_updates
        origin += f": its weights after update {update} of {planned}, the evaluation with the best objective"
    metric_rows = "\n".join(f"| {code(name)} | {value:.6g} |" for name, value in sorted(metrics.items()))
    param_rows = "\n".join(f"| {code(name)} | {plain(value)} |" for name, value in config.flat().items())
    compared_by = "coordinates" if data.kind == "points" else f"{config.metrics.features} features"
    # The distance of models of earlier versions is another metric.
    distance = (
        f"`sample_distance` is a kernel distance of {compared_by} (0: equal distributions), `sample_auc` how "
        "well a classifier tells samples from the data (0.5: not at all, 1: always); lower is better."
        if TEST_SAMPLE_PREFIX + KERNEL in metrics
        else "`sample_distance` is the main distance of the version that measured it; lower is better."
    )
    schedule = config.schedule.build()
    kept = math.sqrt(float(schedule.alphas_cumprod[-1]))
    mismatch = prior_mismatch(schedule, data.log_snr_window, math.prod(data.shape))
    schedule_section = (
        f"{code(config.schedule.kind)}, {schedule.num_train_timesteps} timesteps; x_T keeps {kept:.2g} of "
        "the data's amplitude.\n" + ("" if mismatch is None else f"\n**Warning:** {mismatch}.\n")
    )
    return f"""# A diffusion model of {plain(data.name)}

A denoising diffusion model of {data.kind} of shape {list(data.shape)}, from
{origin}.

{_use_section(data, config.data.low_resolution, registered=bool(trial_id))}## Data
{code(data.name)}, fingerprint {code(data.fingerprint)}.
Values are normalised with mean {data.mean} and standard deviation {data.std}.

## Noise schedule
{schedule_section}
## Metrics
`val/...` on the validation split (in a sweep, with fresh seeds), `test/...` computed once on the test split.
{distance}
A floor is the value for as many training examples in place of samples.

| metric | value |
|---|---|
{metric_rows}

{_decision_section(model.provenance)}{_sampler_section(model.provenance)}## Limitations
It reproduces the distribution of the training data, including its errors and gaps.
{copying_summary(metrics)}

## Provenance
{_provenance_section(model.provenance)}

## Parameters
| name | value |
|---|---|
{param_rows}
"""


def _use_section(data: DataSpec, low_resolution: int | None, *, registered: bool) -> str:
    """How to draw samples: from the file and, if a sweep registered the model, from MLflow."""
    result = f"float32 [64, {', '.join(map(str, data.shape))}], in data units"
    if low_resolution is not None:
        return f"""## Use
It draws images for those of a model of the same data reduced to {low_resolution}x{low_resolution} pixels:

```
python -m export.sampler FIRST.onnx --then sampler.onnx --num-samples 64 --output samples.png
```

```python
from export import Cascade, Sampler

samples = Cascade([Sampler("FIRST.onnx"), Sampler("sampler.onnx")]).sample(64, seed=0)  # {result}
```

The samples of its pictures and metrics were drawn for reduced images of held-out data, not for those of
another model.

"""
    section = f"""## Use
`sampler.onnx` draws samples without PyTorch:

```
python -m export.sampler sampler.onnx --num-samples 64 --output samples.png
```

```python
from export import Sampler

samples = Sampler("sampler.onnx").sample(64, seed=0)  # {result}
```

"""
    if not registered:
        return section
    return f"""{section}A sweep's champion is also registered in MLflow, where its NAME is `ray-ddpm-` and the
name of the experiment:

```python
import mlflow
import pandas as pd

mlflow.set_tracking_uri("sqlite:///mlflow.db")  # or the address of the server
model = mlflow.pyfunc.load_model("models:/NAME@champion")
samples = model.predict(pd.DataFrame({{"num_samples": [64]}}))  # {result}; `seed` is optional
```

"""


def _decision_section(provenance: Mapping[str, Any]) -> str:
    """Why the model was chosen among those of a sweep; empty if it was not."""
    if not provenance.get("decision"):
        return ""
    reasons = "\n".join(f"- {plain(reason)}." for reason in provenance["decision"])
    trial = code(provenance.get("trial_id", ""))
    return f"## Why this model\nWhy trial {trial} of the sweep:\n\n{reasons}\n\n"


def _sampler_section(provenance: Mapping[str, Any]) -> str:
    """How well the model samples with every sampler; empty if it was not measured."""
    choice = SamplerChoice.of(provenance)
    if choice is None:
        return ""
    lines = "\n".join(f"- {line}." for line in choice.sentences())
    return (
        f"## Sampler\n{lines}\n\nMeasured on the training and validation examples, with "
        f"{choice.num_samples} samples each:\n\n{sampler_table(choice)}\n\n"
    )


def _provenance_section(provenance: Mapping[str, Any]) -> str:
    """How, with which code and on which machine the model was made, as far as it was recorded."""
    if "command" not in provenance:
        return "Not recorded: the model comes from an earlier version of ray-ddpm."
    packages, hardware = provenance["packages"], provenance["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    revision = provenance["git_revision"]
    origin = f"git revision {code(revision)}" if revision else "not in a git repository"
    if provenance["git_clean"] is False:
        origin += ", with uncommitted changes"
    machine = f"{hardware['cpu']}, {hardware['cores']} cores"
    if hardware["memory_gb"]:
        machine += f", {hardware['memory_gb']:g} GB of memory"
    gpus = ", ".join(hardware["gpus"]) or "no NVIDIA GPU"
    return f"""{code_block(provenance["command"])}

- code: {origin}
- packages: {plain(versions)}
- machine: {plain(machine)}; {plain(gpus)}"""
