"""What clients that wait for their answers share."""

from __future__ import annotations

import ssl
from types import TracebackType
from typing import TYPE_CHECKING, Optional, TypeVar

from ._api import parse_base
from ._transport import connect
from .tokens import TokenSource

if TYPE_CHECKING:
    import requests

_Client = TypeVar("_Client", bound="SyncClient")


class SyncClient:
    """Calls one server as one caller, and gives its connections up at the end of a `with` block."""

    def __init__(
        self,
        base_url: str,
        token_source: TokenSource,
        *,
        timeout: float,
        ssl_context: Optional[ssl.SSLContext],
        session: Optional[requests.Session],
    ) -> None:
        self._base = parse_base(base_url)
        self._source = token_source
        self._transport = connect(self._base, timeout, ssl_context, session)

    def close(self) -> None:
        """Gives up connections that are kept for the next call."""
        self._transport.close()

    def __enter__(self: _Client) -> _Client:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = self._base.unix_socket or self._base.url
        return f"{type(self).__name__}({where!r}, {self._source!r})"
