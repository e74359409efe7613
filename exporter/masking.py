"""Takes credentials out of URLs before they are shown: in the log, the status page, printed settings and commits."""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^\s/?#\"'<>]*@")
"""The user and password of a URL, up to the last @ before its path."""

_QUERY = re.compile(
    r"(?<=[?&])([\w.-]{0,64}(?:password|secret|token|signature|credential|api_?key)[\w.-]{0,64}|sig)=[^\s&#\"'<>]+",
    re.IGNORECASE,
)
"""A parameter of a URL that is a secret by its name, as in signed URLs of S3, Azure and Google."""


def masked(text: str) -> str:
    """Give `text` with `***` for credentials inside its URLs."""
    return _QUERY.sub(r"\1=***", _USER.sub("***@", text))
