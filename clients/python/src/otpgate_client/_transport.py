"""One request to one server: by the standard library, or by a session of `requests`."""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Optional, Protocol

from ._api import REQUEST_HEADERS, Answer, Base
from .errors import BadAnswerError, UnreachableError

if TYPE_CHECKING:
    import requests

_MAX_IDLE = 4
"""Connections that are kept."""
_MAX_IDLE_SECONDS = 15.0


class Transport(Protocol):
    """How requests get to a server."""

    def send(self, method: str, path: str, body: bytes, limit: int) -> Answer:
        """Sends one request, once, to `path` below the base; the answer's body has at most `limit` bytes."""

    def close(self) -> None:
        """Gives up connections that are kept."""


class StandardTransport:
    """Connections of `http.client`, kept for the next request. May be shared by threads."""

    def __init__(self, base: Base, timeout: float, ssl_context: Optional[ssl.SSLContext]) -> None:
        self._base = base
        self._timeout = timeout
        self._tls = None
        if base.scheme == "https":
            self._tls = ssl.create_default_context() if ssl_context is None else ssl_context
        self._lock = threading.Lock()
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []

    def send(self, method: str, path: str, body: bytes, limit: int) -> Answer:
        connection = self._take()
        try:
            connection.request(method, self._base.path + path, body, REQUEST_HEADERS)
            response = connection.getresponse()
            content = response.read(limit + 1)
            if len(content) <= limit and response.length:
                # `read` with a limit does not tell by itself.
                raise http.client.IncompleteRead(content, response.length)
            headers = {name.lower(): value for name, value in response.getheaders()}
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise UnreachableError(f"{type(error).__name__}: {error}") from error
        except BaseException:
            connection.close()
            raise
        if len(content) > limit:
            connection.close()
            raise BadAnswerError("it is too large")
        self._give_back(connection)
        return Answer(response.status, headers, content)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    def _take(self) -> http.client.HTTPConnection:
        while True:
            with self._lock:
                if not self._idle:
                    break
                since, connection = self._idle.pop()
            if time.monotonic() - since < _MAX_IDLE_SECONDS and _is_open(connection):
                return connection
            connection.close()
        base = self._base
        if base.unix_socket is not None:
            return _UnixConnection(base.unix_socket, self._timeout)
        if self._tls is not None:
            return http.client.HTTPSConnection(base.host, base.port, timeout=self._timeout, context=self._tls)
        return http.client.HTTPConnection(base.host, base.port, timeout=self._timeout)

    def _give_back(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            # Without a socket, the server has closed it.
            if connection.sock is not None and len(self._idle) < _MAX_IDLE:
                self._idle.append((time.monotonic(), connection))
                return
        connection.close()


def _is_open(connection: http.client.HTTPConnection) -> bool:
    """Nothing is to be read between requests but the end."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return not poll.poll(0)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self.timeout)
            connection.connect(self._path)
        except BaseException:
            connection.close()
            raise
        self.sock = connection


class SessionTransport:
    """A session of `requests`, with its proxies, certificates and adapters."""

    def __init__(self, base: Base, timeout: float, session: requests.Session) -> None:
        if base.unix_socket is not None:
            raise ValueError("a session of `requests` reaches no Unix sockets: leave `session` out")
        self._base = base
        self._timeout = timeout
        self._session = session

    def send(self, method: str, path: str, body: bytes, limit: int) -> Answer:
        import requests

        try:
            with self._session.request(
                method,
                self._base.url + path,
                data=body,
                headers=REQUEST_HEADERS,
                timeout=self._timeout,
                # A token goes to the server that was named, nowhere else.
                allow_redirects=False,
                # None would mean that of the session, or of ~/.netrc.
                auth=lambda request: request,
                stream=True,
            ) as response:
                content = b""
                for part in response.iter_content(1 << 16):
                    content += part
                    if len(content) > limit:
                        raise BadAnswerError("it is too large")
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Answer(response.status_code, headers, content)
        except requests.RequestException as error:
            raise UnreachableError(f"{type(error).__name__}: {error}") from None

    def close(self) -> None:
        """The session is its owner's to close."""


def connect(
    base: Base,
    timeout: float,
    ssl_context: Optional[ssl.SSLContext],
    session: Optional[requests.Session],
) -> Transport:
    """The transport that these settings mean."""
    if session is None:
        return StandardTransport(base, timeout, ssl_context)
    if ssl_context is not None:
        raise ValueError("a session has its own TLS settings: leave `ssl_context` out")
    return SessionTransport(base, timeout, session)
