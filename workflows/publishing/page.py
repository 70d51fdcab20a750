"""Pages in HTML that need nothing but a browser: pictures and plots are embedded."""

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from diffusion.files import replacing

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; vertical-align: top; margin: .3rem 0 } .wide { overflow-x: auto }
.pictures img { max-height: 26rem } p.note { color: #666 }
figure { display: inline-block; margin: .5rem 1rem .5rem 0 } figcaption { font-size: 13px }
"""


def write_page(path: Path, title: str, body: Iterable[str]) -> Path:
    """Write a page, whose body is pieces of HTML, and return its path."""
    with replacing(path) as part:
        part.write_text(
            f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title>"
            f"<style>{_STYLE}</style>{''.join(body)}\n",
            encoding="utf-8",
            errors="backslashreplace",
        )
    return path


def embedded_plot(figure: Figure, title: str) -> str:
    """An <img> element with a plot in it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return embedded(buffer.getvalue(), title)


def embedded(png: bytes, title: str) -> str:
    """An <img> element with the picture's bytes in it."""
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
