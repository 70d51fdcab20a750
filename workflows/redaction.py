"""Hides the secrets in URIs, which can stand in settings, command lines and error messages."""

import re

S3_OPTIONS = ("endpoint_override", "region", "scheme")  # options of S3 URIs; none of them is secret

# Up to the last @ of the word, since a password that is not quoted as it should be can contain any of /?#@.
_CREDENTIALS = re.compile(r"//([^/\s@]*:\S*|[^/\s@]+)@")
_OPTION = re.compile(rf"([?&](?!(?:{'|'.join(S3_OPTIONS)})=)[^=&\s]+)=[^&\s]*")


def redact(text: str) -> str:
    """Replace the secrets in the URIs of a text by ***.

    These are everything before the @ of the host (user:password, key:secret, or a token alone) and the values
    of all options after ? except `S3_OPTIONS`.
    """
    return _OPTION.sub(r"\1=***", _CREDENTIALS.sub("//***@", text))
