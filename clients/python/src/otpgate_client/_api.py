"""Requests and answers of the API, without sockets: what is sent, and what an answer means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional
from urllib.parse import urlsplit

from .errors import (
    BadAnswerError,
    ConflictError,
    CredentialsError,
    InvalidError,
    NotFoundError,
    NotPermittedError,
    OtpgateError,
    RefusedError,
    ThrottledError,
    UnavailableError,
)
from .tokens import TokenSource

MAX_ANSWER = 1 << 20
"""Largest answer in bytes, lists aside."""
MAX_LIST = 64 << 20
"""Largest part of a list in bytes; ungleich-otp sends its list as a whole."""

VERIFY_PATH = "ungleichotp/verify/"
"""The path of `/verify` that ungleich-otp has too."""

REQUEST_HEADERS = {
    "Accept": "application/json",
    # A compressed answer may be larger than it looks.
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
    "User-Agent": "otpgate-client-python/0.1.0",
}

_UNPROVEN = "Incorrect authentication credentials."
_NOT_PERMITTED = "You do not have permission to perform this action."
_MAX_DETAIL_CHARS = 500


@dataclass(frozen=True)
class Base:
    """Where a server is."""

    scheme: str
    host: str
    port: Optional[int]
    path: str
    """Begins and ends with a slash."""
    unix_socket: Optional[str] = None

    @property
    def url(self) -> str:
        """As the beginning of requests' URLs."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


def parse_base(url: str) -> Base:
    """Reads a base URL as `otpgate client` does: with the paths of ungleichotpclient too, or `unix:PATH`."""
    text = url.strip()
    if text.startswith("unix:/"):
        return Base("http", "localhost", None, "/", text[len("unix:") :])
    text = text.rstrip("/")
    for end in ("/verify", "/ungleichotp"):
        text = text[: -len(end)] if text.endswith(end) else text
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"`{url}` is no server's URL: http://, https:// or unix:/PATH")
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError("a server's URL has no query and no password")
    return Base(parts.scheme, parts.hostname, parts.port, f"{parts.path}/")


@dataclass(frozen=True)
class Answer:
    """What a server said. `headers` have names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def __repr__(self) -> str:
        # The body may hold seeds.
        return f"Answer({self.status})"


def with_credentials(source: TokenSource, fields: Mapping[str, object]) -> bytes:
    """A request's body: the triple beside the fields, on every method, as ungleich-otp wants it."""
    triple = {"auth_name": source.name, "auth_realm": source.realm, "auth_token": source.token()}
    return json.dumps({**fields, **triple}).encode()


def verify_fields(name: str, realm: str, token: str, source: Optional[str]) -> dict[str, object]:
    """The fields of a verification."""
    for text in (name, realm, token):
        if not isinstance(text, str):
            raise TypeError("name, realm and token must be texts")
    fields: dict[str, object] = {"name": name, "realm": realm, "token": token}
    return fields if source is None else {**fields, "source": source}


def verified(answer: Answer) -> bool:
    """Whether the server says that a token is right."""
    if answer.status == 200:
        if decode(answer) == {"status": "OK"}:
            return True
        raise BadAnswerError("the status is not `OK`")
    if answer.status == 403 and _fields_of(answer).get("detail") == _NOT_PERMITTED:
        return False
    if answer.status == 400:
        wrong = _fields_of(answer).keys()
        if wrong and wrong <= {"name", "realm", "token"}:
            # Nobody can have such a name, or be proven by such a token.
            return False
    raise refusal(answer)


def decode(answer: Answer) -> Any:
    """The JSON of an answer."""
    try:
        return json.loads(answer.body)
    except ValueError:
        # Their message and traceback would hold the answer.
        pass
    raise BadAnswerError("it is not the expected JSON")


def refusal(answer: Answer) -> OtpgateError:
    """What an answer without success means."""
    status, detail = answer.status, _detail_of(answer)
    number = answer.headers.get("x-request-id")
    request_id = None if number is None else _printable(number)
    if 200 <= status < 400:
        return BadAnswerError(f"the status is {status}")
    if status == 429:
        return ThrottledError(status, detail, request_id, _retry_after(answer))
    if status == 503:
        return UnavailableError(status, detail, request_id, _retry_after(answer))
    kinds: dict[int, type[RefusedError]] = {
        400: InvalidError,
        401: CredentialsError,
        404: NotFoundError,
        409: ConflictError,
    }
    kind = kinds.get(status, RefusedError)
    if status == 403:
        kind = {_UNPROVEN: CredentialsError, _NOT_PERMITTED: NotPermittedError}.get(detail, RefusedError)
    return kind(status, detail, request_id)


def _fields_of(answer: Answer) -> dict[str, Any]:
    try:
        body = json.loads(answer.body)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _detail_of(answer: Answer) -> str:
    words = []
    for field, value in _fields_of(answer).items():
        if isinstance(value, list):
            words.append(f"{field}: {' '.join(map(str, value))}")
        else:
            words.append(str(value) if field == "detail" else f"{field}: {value}")
    return _printable("; ".join(words) or "(no explanation)")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_MAX_DETAIL_CHARS])


def _retry_after(answer: Answer) -> Optional[float]:
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdecimal() else None
