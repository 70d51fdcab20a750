"""The commands and printed outputs of the documentation: fenced blocks of its Markdown files.

A comment on the line before a block says what it is, where its language does not:

    <!-- not run: REASON -->         commands that `docs/run_blocks.py` does not run
    <!-- printed -->                 what the commands of the block before print
    <!-- printed: last 12 lines -->  the end of it
    <!-- printed by: COMMAND -->     what a command that is not shown prints
    <!-- checked: COMMAND -->        the same, of a command that takes no second: the tests compare it
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

_FENCE = re.compile(r"^ *```(\S*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_NOTE = re.compile(r"<!-- (not run|printed by|printed|checked)(?:: (.*?))? -->\n+\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        path: file of the page.
        line: number of the line of its opening fence.
        language: its language; empty if none is given.
        text: its content.
        kind: "not run", "printed", "printed by", "checked", or empty if no comment stands before it.
        note: what the comment says after the colon.
        span: start and end of the content in the page's text.
    """

    path: Path
    line: int
    language: str
    text: str
    kind: str
    note: str
    span: tuple[int, int]

    @property
    def is_shell(self) -> bool:
        """Whether it has commands, rather than a program or output."""
        return self.language in ("", "bash") and not self.kind.startswith(("printed", "checked"))


def pages() -> list[Path]:
    """The pages, first those whose runs others use; without those that are generated."""
    folder = ROOT / "docs"
    how_to = folder / "how-to"
    first = [folder / "tutorial.md", how_to / "train.md", ROOT / "README.md", *sorted(how_to.glob("*.md"))]
    others = [ROOT / "CONTRIBUTING.md", *sorted(folder.glob("*.md")), *sorted(folder.glob("*/*.md"))]
    return list(dict.fromkeys(path for path in [*first, *others] if path.exists()))


def read_blocks(path: Path) -> list[Block]:
    """The fenced blocks of a Markdown file, in order."""
    text, found = path.read_text(), []
    for match in _FENCE.finditer(text):
        note = _NOTE.search(text, 0, match.start())
        line = text.count("\n", 0, match.start()) + 1
        kind, words = (note[1], note[2] or "") if note else ("", "")
        found.append(Block(path, line, match[1], match[2], kind, words, match.span(2)))
    return found


def replace_text(block: Block, text: str) -> None:
    """Write another content of a block into its page; blocks that stand after it have to be read again."""
    page = block.path.read_text()
    start, end = block.span
    block.path.write_text(page[:start] + text.rstrip("\n") + "\n" + page[end:])


def commands(text: str) -> list[list[str]]:
    """The commands of a block, each as a list of words, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]
