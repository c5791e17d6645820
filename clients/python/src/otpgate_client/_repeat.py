"""What of a repeated request may carry credentials, and which token: shared by all HTTP libraries."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from typing import Optional
from urllib.parse import urlsplit

from .tokens import TokenSource

MAX_DRIFT_SECONDS = 600
"""A server that says it is further away gets no token: it could collect those of times to come."""

_PORTS = {"http": 80, "https": 443}


def is_same_server(old: str, new: str) -> bool:
    """Whether `new` leads to the server of `old`; from the standard port of HTTP also to that of HTTPS."""
    before, after = _origin(old), _origin(new)
    if before is None or after is None:
        return False
    upgraded = before[0] == "http" and before[2] == 80 and after == ("https", before[1], 443)
    return before == after or upgraded


def _origin(url: str) -> Optional[tuple[str, str, int]]:
    # Characters about which parsers of URLs differ.
    if re.search(r"[\\\s\x00-\x1f\x7f]", url):
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    default = _PORTS.get(parts.scheme)
    if default is None or not parts.hostname or "@" in parts.netloc:
        return None
    return parts.scheme, parts.hostname, default if port is None else port


def token_of_server(source: TokenSource, challenge: Optional[str], date: Optional[str]) -> Optional[str]:
    """The token of the time that a refusing gate has, if that is another time step than ours."""
    if challenge is None or not challenge.startswith("OTP ") or date is None:
        return None
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return None
    ours = source.now()
    if abs(theirs - ours) > MAX_DRIFT_SECONDS or int(theirs) // source.period == int(ours) // source.period:
        return None
    return source.token(theirs)
