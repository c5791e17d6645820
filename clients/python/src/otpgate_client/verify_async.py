"""Asks a server about somebody's token, without blocking."""

from __future__ import annotations

import ssl
from types import TracebackType
from typing import Optional, Union

import httpx

from ._api import (
    MAX_ANSWER,
    REQUEST_HEADERS,
    VERIFY_PATH,
    Answer,
    parse_base,
    verified,
    verify_fields,
    with_credentials,
)
from .errors import BadAnswerError, UnreachableError
from .tokens import TokenSource


class AsyncVerifyClient:
    """As `VerifyClient`, for asyncio and trio.

    `client` sends through an `httpx.AsyncClient` of yours, with its TLS settings and proxies; close that
    yourself.
    """

    def __init__(
        self,
        base_url: str,
        token_source: TokenSource,
        *,
        timeout: float = 5.0,
        ssl_context: Optional[ssl.SSLContext] = None,
        client: Optional[httpx.AsyncClient] = None,
    ) -> None:
        self._base = parse_base(base_url)
        self._source = token_source
        self._timeout = timeout
        self._owned = client is None
        if client is None:
            verify: Union[ssl.SSLContext, bool] = True if ssl_context is None else ssl_context
            if self._base.scheme == "http":
                # Plain connections need no certificates of the system.
                verify = False
            transport = httpx.AsyncHTTPTransport(verify=verify, uds=self._base.unix_socket)
            client = httpx.AsyncClient(transport=transport, trust_env=False)
        elif ssl_context is not None or self._base.unix_socket is not None:
            raise ValueError("a client has its own TLS settings and sockets: leave it out")
        self._client = client

    async def verify(self, name: str, realm: str, token: str, *, source: Optional[str] = None) -> bool:
        """As `VerifyClient.verify`."""
        body = with_credentials(self._source, verify_fields(name, realm, token, source))
        return verified(await self._send("POST", VERIFY_PATH, body))

    async def _send(self, method: str, path: str, body: bytes) -> Answer:
        request = self._client.stream(
            method,
            self._base.url + path,
            content=body,
            headers=REQUEST_HEADERS,
            timeout=self._timeout,
            # A token goes to the server that was named, nowhere else.
            follow_redirects=False,
            # None: neither that of the client nor of ~/.netrc.
            auth=None,
        )
        try:
            async with request as response:
                content = b""
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > MAX_ANSWER:
                        raise BadAnswerError("it is too large")
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Answer(response.status_code, headers, content)
        except httpx.HTTPError as error:
            raise UnreachableError(f"{type(error).__name__}: {error}") from None

    async def aclose(self) -> None:
        """Closes connections that are kept for the next call, unless the client is yours."""
        if self._owned:
            await self._client.aclose()

    async def __aenter__(self) -> AsyncVerifyClient:
        return self

    async def __aexit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncVerifyClient({self._base.unix_socket or self._base.url!r}, {self._source!r})"
