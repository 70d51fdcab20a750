"""Configuration of Sphinx, which makes the site: `make docs`.

Pages are the Markdown files of this folder. The reference is made while the site is built: of names from
their docstrings, of commands from their own help.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Literal

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parents[1]
NOTEBOOK = "examples/mse_ranks_schedules_wrongly.ipynb"
sys.path.insert(0, str(ROOT))

from docs.command_reference import write_command_reference  # noqa: E402

project = "ray-ddpm"
html_title = "ray-ddpm"
project_copyright = "the authors of ray-ddpm, Apache-2.0"
exclude_patterns = ["_build", "package.md"]  # the latter is what a package index shows
extensions = [
    "myst_nb",  # Markdown pages, and the notebook of examples/
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings in Google's style
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_theme_options = {"source_directory": "docs/"}
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = True
nb_execution_mode = "off"  # `make notebook` executes it; here its outputs are shown
highlight_language = "none"
html_math_renderer = "mathml"
math_eqref_format = "({number})"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
napoleon_use_rtype = False


_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
_CODE = re.compile(r"`+[^`]+`+")


def markdown_to_rst(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Make reStructuredText of a docstring, a plain text in which names and formulas stand in backticks.

    What is indented after an empty line is code or a formula, and is shown as it is.
    """
    chunks: list[tuple[bool, list[str]]] = [(False, [])]
    in_section = False
    for number, line in enumerate(lines):
        starts_paragraph = number == 0 or not lines[number - 1].strip()
        literal = chunks[-1][0]
        if line.strip() and not line.startswith("    "):
            literal = False
            in_section = bool(_SECTION.match(line))
        elif line.strip() and starts_paragraph and not in_section:
            literal = True
        if literal != chunks[-1][0]:
            chunks.append((literal, []))
        if in_section and line.startswith(" " * 12) and not starts_paragraph:
            chunks[-1][1][-1] += f" {line.strip()}"  # of an item of the inner list
            continue
        chunks[-1][1].append(line)
        if in_section and line.startswith("    ") and line.endswith(":"):
            chunks[-1][1].append("")  # a list of its own follows
    lines.clear()
    for literal, chunk in chunks:
        lines += ["::", "", *chunk, ""] if literal else _escaped("\n".join(chunk)).split("\n")


def _escaped(text: str) -> str:
    """Text with backticks doubled, and with other characters escaped that are markup in reStructuredText."""
    result, position = "", 0
    for code in [*_CODE.finditer(text), None]:
        plain = text[position : code.start() if code else len(text)]
        plain = re.sub(
            r"(?<![\w*])(?<!^    )(\*+)(?=\S)|\|", lambda found: "\\" + found[0], plain, flags=re.M
        )
        result += re.sub(r"(?<=\w)_(?!\w)", r"\\_", plain)
        if code:
            result += "``" + " ".join(code[0].strip("`").split()) + "``"
            position = code.end()
    return result


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula of a line as MathML, which browsers show without a script."""
    translator.body.append(_mathml(node, display="inline"))
    raise nodes.SkipNode


def display_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write an equation as MathML, with its number."""
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    if node["number"]:
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})')
        translator.add_permalink_ref(node, "Link to this equation")
        translator.body.append("</span>")
    translator.body.append(_mathml(node, display="block") + "</div>")
    raise nodes.SkipNode


def _mathml(node: nodes.math | nodes.math_block, *, display: Literal["inline", "block"]) -> str:
    mathml = convert(node.astext().strip(), display=display)
    if unknown := re.findall(r"\\\w+", re.sub(r"<[^>]+>", "", mathml)):
        message = f"LaTeX that cannot be converted: {', '.join(unknown)}"
        logging.getLogger(__name__).warning(message, location=node)
    return mathml


def setup(app: Sphinx) -> None:
    """Register the steps that Sphinx calls."""
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    write_command_reference(Path(app.srcdir) / "reference" / "commands")
    shutil.copyfile(ROOT / NOTEBOOK, Path(app.srcdir) / "notebook.ipynb")
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)  # before napoleon
