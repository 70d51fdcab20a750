"""Results that are read from folders whose files are damaged; no run takes place here."""

import pytest

from diffusion.errors import InputError
from diffusion.presets import preset
from workflows.results import SweepResult, TrainingResult
from workflows.storage.run_record import RunRecord
from workflows.storage.storage import Storage


@pytest.mark.parametrize(
    ("command", "result", "file"),
    [("tune", SweepResult, "trials.csv"), ("train", TrainingResult, "checkpoints/10/history.json")],
)
def test_a_folder_in_place_of_a_file_is_named(tmp_path, command, result, file):
    RunRecord("one", "e", "0" * 32, preset("heart"), "f", command=command).write(
        Storage(str(tmp_path)), "finished"
    )
    (tmp_path / file).mkdir(parents=True)
    with pytest.raises(InputError, match=f"{file} cannot be read .*: resume the run"):
        result.load(tmp_path)
