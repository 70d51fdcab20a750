"""Pages are read block by block, and what commands print is written into them."""

import pytest

from docs.blocks import commands, read_blocks, replace_text
from docs.run_blocks import run_page, shorten

PAGE = """# A page

```bash
echo one   # a comment
echo two; echo three
```

What it prints:

<!-- printed: last 2 lines -->
```text
old
```

<!-- not run: it would fail -->
```bash
exit 5
```

<!-- printed by: echo shown -->
```text
```

```python
print(1 + 1)
```

<!-- printed -->
```text
```
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_blocks_have_the_comment_before_them(page):
    blocks = read_blocks(page)
    assert [block.kind for block in blocks] == ["", "printed", "not run", "printed by", "", "printed"]
    assert [block.note for block in blocks][1:4] == ["last 2 lines", "it would fail", "echo shown"]
    assert [block.line for block in blocks][:2] == [3, 11]
    assert [block.is_shell for block in blocks] == [True, False, True, False, False, False]


def test_commands_are_split_as_a_shell_does():
    assert commands("a 'b c' \\\n    --d   # e\n\n# f\ng") == [["a", "b c", "--d"], ["g"]]


def test_only_the_content_of_a_block_is_replaced(page):
    replace_text(read_blocks(page)[1], "new\n\n")
    assert page.read_text() == PAGE.replace("old\n", "new\n")


def test_a_page_gets_what_its_commands_print(page, tmp_path, monkeypatch):
    monkeypatch.setattr("docs.run_blocks.ROOT", tmp_path)
    assert run_page(page, tmp_path) == 0
    texts = [block.text for block in read_blocks(page)]
    assert texts[1] == "two\nthree\n" and texts[3] == "shown\n" and texts[5] == "2\n"
    assert run_page(page, tmp_path) == 0 and [block.text for block in read_blocks(page)] == texts


def test_a_command_that_fails_is_counted_and_the_others_are_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("docs.run_blocks.ROOT", tmp_path)
    page.write_text(PAGE.replace("<!-- not run: it would fail -->\n", ""))
    assert run_page(page, tmp_path) == 1
    assert "page.md:16: exit status 5" in capsys.readouterr().err
    assert read_blocks(page)[-1].text == "2\n"


def test_a_note_that_asks_for_something_else_is_an_error():
    assert shorten("a\nb\nc\n", "last 1 lines") == "c\n" and shorten("\na\n\n", "") == "a\n"
    with pytest.raises(ValueError, match="last N lines"):
        shorten("a", "first 3 lines")
