"""Text of others in Markdown: names and command lines are shown as they are, and never become markup."""

import re

from diffusion.errors import printable


def code(text: object) -> str:
    """A text in `code`, on one line, which also is safe in a cell of a table.

    Its fence is longer than any run of backticks in it, so that it cannot end before the text does.
    """
    shown = printable(str(text)).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if longest or not shown.strip() else ""
    return f"{fence}{padding}{shown or ' '}{padding}{fence}"


def code_block(text: object) -> str:
    """A text in a block of code, which the text cannot end."""
    lines = "\n".join(map(printable, str(text).split("\n")))
    longest = max((len(run) for run in re.findall("`+", lines)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{lines}\n{fence}"


def plain(text: object) -> str:
    """A text on one line outside of code, in which nothing is read as markup, HTML or a link."""
    escaped = re.sub(r"([\\`*_\[\]<>&|~#$!@])", r"\\\1", printable(str(text)))
    return re.sub(r"(?<=:)(?=//)|(?<=www)(?=\.)", r"\\", escaped, flags=re.IGNORECASE)
