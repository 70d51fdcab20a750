"""Sweeps that are refused before the first trial, without a trace on the disk."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--network.kind", "unet"), ("--network.kind unet", "mlp")),
        (("--output-dir", "/proc/nowhere"), ("--output-dir", "cannot be written to")),
        (("--tracking-uri", "http://127.0.0.1:9"), ("--tracking-uri", "another URI")),
    ],
)
def test_errors_found_after_parsing_are_one_line_and_leave_no_folder(
    in_process, database_uri, arguments, words
):
    here = in_process("tune")
    options = ["--data", "heart", "--tracking-uri", database_uri, *arguments, "--name", "never"]
    message = here.refused(options)
    assert all(word in message for word in words)
    assert not (here.folder / "runs").exists()
