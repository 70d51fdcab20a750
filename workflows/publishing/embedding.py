"""Pictures inside an HTML page: as data URIs, so that the page stays a single file."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageSequence

_LARGEST_AS_IT_IS = 120_000  # bytes of a PNG that is embedded without another compression
_MAX_SIDE = 960
_MAX_ANIMATION_BYTES = 700_000
# (side in pixels, frames, quality) of an animation: the first that is small enough is taken.
_ANIMATION_SIZES = ((360, 40, 60), (300, 24, 45), (220, 16, 30))


def embedded_picture(path: Path) -> str | None:
    """A data URI of a picture file, compressed if it is large; None if there is no such picture."""

    def convert(picture: Image.Image) -> str:
        is_small = picture.format == "PNG" and path.stat().st_size <= _LARGEST_AS_IT_IS
        return data_uri(path.read_bytes(), "image/png") if is_small else encoded(picture)

    return _converted(path, convert)


def thumbnail(path: Path, side: int, part: float = 1.0) -> str | None:
    """A data URI of a small copy of a picture file; None if there is no such picture.

    Args:
        path: path of the file.
        side: its longer side in pixels.
        part: fraction of the width and of the height that is shown, from the upper left corner.
    """

    def convert(picture: Image.Image) -> str:
        corner = (0, 0, max(1, round(part * picture.width)), max(1, round(part * picture.height)))
        return encoded(picture.crop(corner), side, quality=60)

    return _converted(path, convert)


def embedded_animation(path: Path) -> str | None:
    """A data URI of a smaller copy of an animated GIF, below 1 MB; None if there is no such picture."""

    def convert(animation: Image.Image) -> str:
        content = b""
        for side, count, quality in _ANIMATION_SIZES:
            content = _animated_webp(animation, side, count, quality)
            if len(content) <= _MAX_ANIMATION_BYTES:
                break
        return data_uri(content, "image/webp")

    return _converted(path, convert)


def encoded(picture: Image.Image, side: int = _MAX_SIDE, quality: int = 85) -> str:
    """A data URI of a picture as WebP.

    Args:
        picture: the picture.
        side: the longer side in pixels that it is reduced to if it is larger.
        quality: of the compression, 1 to 100.
    """
    buffer = io.BytesIO()
    _reduced(picture, side).save(buffer, "WEBP", quality=quality, method=4)
    return data_uri(buffer.getvalue(), "image/webp")


def data_uri(content: bytes, media_type: str) -> str:
    """A data URI of a file's content."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _converted(path: Path, convert: Callable[[Image.Image], str]) -> str | None:
    """What a function makes of a picture file; None if the file is missing or was cut short by a crash."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return convert(picture)
    except OSError:
        return None


def _reduced(picture: Image.Image, side: int) -> Image.Image:
    copy = picture.convert("RGBA" if picture.mode in ("RGBA", "LA", "PA") else "RGB")
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return copy


def _animated_webp(animation: Image.Image, side: int, count: int, quality: int) -> bytes:
    total = getattr(animation, "n_frames", 1)
    step = max(1, -(-total // count))
    kept, durations = [], []
    for index, frame in enumerate(ImageSequence.Iterator(animation)):
        time = frame.info.get("duration", 60)
        # Frames are counted from the end, so that the last one, the samples, is always among them.
        if (total - 1 - index) % step == 0:
            kept.append(_reduced(frame, side))
            durations.append(0)
        if durations:
            durations[-1] += time
    buffer = io.BytesIO()
    kept[0].save(
        buffer, "WEBP", save_all=True, append_images=kept[1:], duration=durations, loop=0, quality=quality
    )
    return buffer.getvalue()
