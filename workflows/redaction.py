"""Hides the secrets in URIs, which can stand in settings, command lines and error messages."""

import re
from urllib.parse import unquote

S3_OPTIONS = ("endpoint_override", "region", "scheme")  # options of S3 URIs; none of them is secret

# Up to the last @ of the word, since a password that is not quoted as it should be can contain any of /?#@.
_CREDENTIALS = re.compile(r"//([^/\s@]*:\S*|[^/\s@]+)@")
# A value that is not quoted as it should be can contain &: what follows it is no option without a =.
_OPTION = re.compile(rf"([?&](?!(?:{'|'.join(S3_OPTIONS)})=)[^=&\s]+)=[^&\s]*(?:&[^=&\s]*(?![^&\s]))*")
# The same in a text that is one URI and nothing else, in which a password may contain spaces too.
_ONLY_CREDENTIALS = re.compile(r"(^|=)([A-Za-z][\w.+-]*)://([^/@]*:.*|[^/@]+)@", re.DOTALL)
_MIN_SECRET = 4  # characters; replacing a shorter one everywhere would garble messages

_secrets: set[str] = set()


def redact(text: str) -> str:
    """Replace the secrets in the URIs of a text by ***.

    These are everything before the @ of the host (user:password, key:secret, or a token alone), the values
    of all options after ? except `S3_OPTIONS`, and the passwords of the URIs that `remember` was given,
    wherever they stand and whatever they contain.
    """
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _OPTION.sub(r"\1=***", _CREDENTIALS.sub("//***@", text))


def redact_argument(text: str) -> str:
    """Replace the secrets of a single URI, or of an argument such as --flag=URI.

    Unlike those in a longer text, its password may contain spaces.
    """
    return redact(_ONLY_CREDENTIALS.sub(r"\1\2://***@", text))


def remember(uri: str) -> None:
    """Remember the password of a URI that is in use, as it is written and decoded, for `redact`.

    Messages of libraries can quote it in other places than that URI.
    """
    found = re.match(r"[A-Za-z][\w.+-]*://([^/@:]*):(.*)@", uri, re.DOTALL)
    for secret in (found[2], unquote(found[2])) if found else ():
        if len(secret) >= _MIN_SECRET:
            _secrets.add(secret)
