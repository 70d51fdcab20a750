"""What an outbox keeps survives the process, and a full disk does not stop it."""

import pytest
from PIL import Image

from diffusion.errors import InputError
from workflows.tracking.entries import Metrics, Picture
from workflows.tracking.outbox import FILE, Outbox, read_entries


def entry(number):
    return Metrics(None, {"loss": 0.5}, number, 0)


def test_entries_and_what_is_done_are_read_again(tmp_path):
    folder = tmp_path / "tracking"
    assert read_entries(folder) == ([], 0) and not folder.exists()
    first = Outbox(folder)
    assert [first.append(entry(number)) for number in range(3)] == [0, 1, 2]
    first.mark_done(2)
    with (folder / FILE).open("a") as file:
        file.write('{"kind": "met')  # the session is killed here
    second = Outbox(folder)
    assert (second.num_entries, second.num_done) == (3, 2)
    second.append(entry(3))
    assert second.entries() == [entry(number) for number in range(4)]
    second.delete()
    assert not folder.exists() and second.num_entries == 0
    second.append(entry(4))
    assert not folder.exists(), "a run that is sent whole leaves nothing that could be sent again"


def test_pictures_of_two_sessions_have_different_names(tmp_path):
    first = Outbox(tmp_path)
    path = first.keep_picture(Image.new("L", (4, 4)))
    first.append(Picture(None, str(path), 0, 0))
    assert Outbox(tmp_path).keep_picture(Image.new("L", (4, 4))) != path and path.exists()


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(tmp_path, max_file_size):
    outbox = Outbox(tmp_path)
    outbox.append(entry(0))
    size = (tmp_path / FILE).stat().st_size
    with max_file_size(size + 10):
        for number in (1, 2):
            outbox.append(entry(number))
        assert not outbox.sync()
        assert (tmp_path / FILE).stat().st_size == size, "no line is cut in half"
    assert outbox.sync()
    assert read_entries(tmp_path)[0] == [entry(0), entry(1), entry(2)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"sent": 3}',
        "\xff",
        '{"kind": "metric"}',
        '{"kind": "picks"}',
        '{"kind": "picks", "picks": [1]}',
        '{"kind": "end", "status": "odd", "time": 3}',
    ],
)
def test_a_damaged_line_is_refused_in_one_line(tmp_path, line):
    (tmp_path / FILE).write_text(f'{{"kind": "file", "file": "a.txt"}}\n{line}\n', encoding="latin-1")
    with pytest.raises(InputError, match="line 2,") as caught:
        read_entries(tmp_path)
    assert "\n" not in str(caught.value)
