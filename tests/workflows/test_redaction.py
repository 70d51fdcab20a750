import pytest

from workflows.redaction import redact


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
