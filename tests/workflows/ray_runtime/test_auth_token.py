"""Ray's token can be read by its owner only, before Ray starts."""

import stat
import threading

import pytest

from diffusion.errors import InputError
from workflows.ray_runtime.auth_token import make_token_private


@pytest.fixture(name="token")
def _token(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".ray" / "auth_token"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_token_is_private_from_the_start(token):
    assert make_token_private(create=True) is None
    assert mode(token) == 0o600 and mode(token.parent) == 0o700
    assert len(bytes.fromhex(token.read_text())) == 32
    first = token.read_text()
    assert make_token_private(create=True) is None and token.read_text() == first
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_processes_that_start_together_use_one_token(token):
    threads = [threading.Thread(target=make_token_private, kwargs={"create": True}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"] and mode(token) == 0o600


@pytest.mark.parametrize("old", [0o644, 0o640, 0o666])
def test_a_token_that_others_can_read_is_made_private_and_said(token, old):
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(old)
    assert "could be read by others" in make_token_private(create=False)
    assert mode(token) == 0o600 and token.read_text() == "secret"


def test_no_token_is_made_to_join_a_cluster_or_without_need(token, monkeypatch):
    assert make_token_private(create=False) is None and not token.exists()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert make_token_private(create=True) is None and not token.exists()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert make_token_private(create=True) is None and not token.exists()
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token.parent.parent / "mine"))
    assert make_token_private(create=True) is None and mode(token.parent.parent / "mine") == 0o600


def test_a_place_that_cannot_be_written_is_refused_in_one_line(token):
    token.parent.write_text("a file")
    with pytest.raises(InputError, match="auth_token cannot be made private"):
        make_token_private(create=True)
