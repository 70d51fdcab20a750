import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows import redaction
from workflows.redaction import redact, redact_argument, remember


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:s3cr3t@host:5000", "http://***@host:5000"),
        ("--tracking-uri=https://me:s3cr3t@host/path", "--tracking-uri=https://***@host/path"),
        ("http://:s3cr3t@host", "http://***@host"),
        ("https://s3cr3t@host", "https://***@host"),
        ("postgresql://me:s3/cr?3t@host/mlflow", "postgresql://***@host/mlflow"),
        ("postgresql://me:s3@cr3t@host/mlflow", "postgresql://***@host/mlflow"),
        ("mysql://me:s3#cr3t@host/mlflow", "mysql://***@host/mlflow"),
        ("s3://KEY:s3/cr3t@bucket/runs", "s3://***@bucket/runs"),
        ("s3://bucket/runs?region=eu&secret_key=s3cr3t", "s3://bucket/runs?region=eu&secret_key=***"),
        ("https://host/runs?token=s3cr3t", "https://host/runs?token=***"),
        ("https://me:s3cr3t@host/x?token=s3cr3t", "https://***@host/x?token=***"),
        ("https://host/x?password=s3&cr3t", "https://host/x?password=***"),
        ("https://host/x?password=s3&cr3t&region=eu", "https://host/x?password=***&region=eu"),
        ("no s3://k:s3cr3t@b/x nor gs://k:t@c?token=s3cr3t!", "no s3://***@b/x nor gs://***@c?token=***"),
    ],
)
def test_secrets_are_hidden(text, shown):
    assert redact(text) == shown
    # A pattern that ends too early would leave a piece of the secret.
    assert "cr3t" not in redact(text) and "3t@" not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/a@b/mlflow.db",
        "s3://bucket/a@b?region=x&scheme=http&endpoint_override=localhost:9000",
        "http://127.0.0.1:5000",
        "http://127.0.0.1:5000 and me@example.org",
        "/data/a@b.csv",
        "x=1",
    ],
)
def test_everything_else_stays_as_it_is(text):
    assert redact(text) == text


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(redaction, "_secrets", set())


@pytest.mark.parametrize("flag", ["", "--tracking-uri="])
@pytest.mark.parametrize(
    "password", ["s3 cr3t", "s3\tcr3t", 's3"cr3t', "s3'cr3t", "s3/cr3t@x", "s3#cr3t?&=:", "s3\ncr3t"]
)
def test_the_password_of_an_argument_may_contain_any_character(flag, password):
    argument = f"{flag}postgresql://me:{password}@host/mlflow"
    assert redact_argument(argument) == f"{flag}postgresql://***@host/mlflow"


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(min_size=6, max_size=20))
def test_no_password_stays_in_an_argument_nor_a_remembered_one_in_a_message(password):
    uri = f"postgresql://me:{password}@host/mlflow"
    remember(uri)
    shown = redact_argument(f"--tracking-uri={uri}")
    assert (
        shown == "--tracking-uri=postgresql://***@host/mlflow"
        or password in "--tracking-uri=postgresql://***@host"
    )
    message = redact(f"the password '{password}' of {uri} was refused")
    assert password not in message or password in "the password '***' of //***@ was refused"


def test_a_remembered_password_is_hidden_in_both_of_its_forms():
    remember("mysql://me:p%40ss%20w0rd@host/db")
    assert redact("refused: p@ss w0rd (p%40ss%20w0rd)") == "refused: *** (***)"


def test_a_password_that_begins_with_another_one_is_hidden_whole():
    for password in ("s3cr3t", "s3cr3t-of-mine", "3cr3"):
        remember(f"mysql://me:{password}@host/db")
    assert redact("refused: s3cr3t-of-mine, s3cr3t") == "refused: ***, ***"


@pytest.mark.parametrize(
    "uri", ["sqlite:////home/a@b/mlflow.db", "http://127.0.0.1:5000", "/data/a@b.csv", "s3://b/x"]
)
def test_an_argument_without_a_password_stays(uri):
    remember(uri)
    assert redact_argument(f"--x={uri}") == f"--x={uri}" and redact(uri) == uri
