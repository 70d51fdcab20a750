"""Pages in HTML that need nothing but a browser: style, script and pictures are in the file.

A template extends `page.html.jinja`, which has the head, the style and the script of every page: light and
dark colours, phones, paper, and tables that can be sorted.
"""

import base64
import functools
import gzip
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffusion.errors import printable
from diffusion.files import replacing

_FOLDER = Path(__file__).parent


def write_page(path: Path, template: Path, **values: Any) -> Path:
    """Write a page and return its path.

    Args:
        path: path of the page.
        template: file of the template; all values are escaped in it.
        **values: what the template names.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable_lines,
    )
    text = environment.get_template(template.name).render(**values)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


@functools.cache
def plotting_library() -> str:
    """Source of plotly.js, compressed by gzip, in base64: the browser unpacks it."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _printable_lines(value: Any) -> Any:
    """Plain text without control characters; what is marked as HTML stays as it is."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value
