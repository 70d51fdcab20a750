"""What a notebook shows for a sampler: a line of text and a picture of some samples."""

import base64
import html
import io
from typing import Any, Protocol

from diffusion.errors import InputError
from diffusion.plots import IMAGE_CHANNELS, draw_samples
from export.contract import FAST, SamplerSpec

# Limits on what showing an object may cost.
_SECONDS = 3.0
_NETWORK_CALLS = 20
_NUM_SAMPLES = {"image": 16, "points": 500}


class _Sampler(Protocol):
    """What is needed of `export.sampler.Sampler`."""

    spec: SamplerSpec

    def sample(
        self,
        num_samples: int,
        *,
        sampler: str | None = None,
        num_steps: int | None = None,
        time_limit: float | None = None,
    ) -> Any: ...


def notebook_html(sampler: _Sampler) -> str:
    """HTML of a sampler: its `repr`, and samples of seed 0 if they can be drawn in a few seconds.

    They take at most 20 network calls: the file's sampler if it has as few rows, else its choice of a fast
    one, else dpmpp_2m.
    """
    text = f"<pre>{html.escape(repr(sampler))}</pre>"
    picture = _picture(sampler)
    if picture is None:
        return text
    how, png = picture
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'{text}<img src="{source}" alt="{html.escape(how)}" title="{html.escape(how)}">'


def _picture(sampler: _Sampler) -> tuple[str, bytes] | None:
    """A description and the bytes of a PNG; None if nothing can be shown, or not quickly enough."""
    spec = sampler.spec
    is_image = spec.data["kind"] == "image"
    # A condition has no default value.
    if spec.conditions or (is_image and spec.shape[0] not in IMAGE_CHANNELS):
        return None
    fast = spec.sampler.get(FAST)
    choice, num_steps, what = None, None, spec.sampler["name"]
    if spec.table.num_rows > _NETWORK_CALLS:
        if fast is not None and fast["num_steps"] <= _NETWORK_CALLS:
            choice, what = FAST, fast["name"]
        else:
            choice = what = "dpmpp_2m"
            num_steps = min(_NETWORK_CALLS, spec.noise_schedule.num_train_timesteps)
    try:
        samples = sampler.sample(
            _NUM_SAMPLES[spec.data["kind"]], sampler=choice, num_steps=num_steps, time_limit=_SECONDS
        )
    except InputError:  # too slow, or a model that this sampler does not fit
        return None
    how = f"{len(samples)} samples of seed 0, {what}"
    file = io.BytesIO()
    draw_samples(samples, spec.data["range"], num_classes=len(spec.classes)).save(file, format="PNG")
    return how, file.getvalue()
