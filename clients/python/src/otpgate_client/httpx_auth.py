"""Fresh credentials on every request of `httpx`."""

from __future__ import annotations

from collections.abc import Generator

import httpx

from ._repeat import is_same_server, token_of_server
from .tokens import TokenSource


class HttpxAuth(httpx.Auth):
    """`httpx.Client(auth=HttpxAuth(source))`, `httpx.AsyncClient(auth=...)`, or with a single request.

    Every request carries the token of the moment; redirects to other servers carry nothing. Redirects within
    the server are followed without credentials first, and once more with fresh ones if the gate wants them
    (401). Give it to clients that talk to one gate only: whatever server a client is told to ask gets
    credentials.

    The credentials are not among `request.headers`, only in `request.headers.raw`, which goes to the wire.

    With `retry_on_drift`, a request that a gate refused with 401 is sent once more with the token of the gate's
    `Date`, if that is at most ten minutes away and the body is in memory.
    """

    def __init__(self, source: TokenSource, *, retry_on_drift: bool = False) -> None:
        self.source = source
        self.retry_on_drift = retry_on_drift

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Called by `httpx`."""
        home = str(request.url)
        while True:
            response = yield self._proven(request)
            if not _was_redirected_home(response, home):
                break
            request = response.request
        if self.retry_on_drift and response.status_code == 401 and response.request is request:
            answer = response.headers
            token = token_of_server(self.source, answer.get("WWW-Authenticate"), answer.get("Date"))
            if token is not None and _can_be_sent_again(request):
                yield self._proven(request, token)

    def _proven(self, request: httpx.Request, token: str = "") -> httpx.Request:
        credentials = self.source.headers()
        if token:
            credentials[self.source.header_names.token] = token
        request.headers = _OneHop(request.headers, credentials)
        return request


class _OneHop(httpx.Headers):
    """Headers with credentials that are sent, but never copied: `httpx` makes redirected requests of copies."""

    def __init__(self, headers: httpx.Headers, credentials: dict[str, str]) -> None:
        self._credentials = [(name.encode(), value.encode()) for name, value in credentials.items()]
        super().__init__(headers)
        for name in credentials:
            self.pop(name, None)

    @property
    def raw(self) -> list[tuple[bytes, bytes]]:
        return [*super().raw, *self._credentials]


def _was_redirected_home(response: httpx.Response, home: str) -> bool:
    """Whether a gate refuses a request that followed redirects within one server, thus without credentials."""
    return (
        response.status_code == 401
        and not isinstance(response.request.headers, _OneHop)
        and all(is_same_server(home, str(hop.url)) for hop in (*response.history, response))
        and _can_be_sent_again(response.request)
    )


def _can_be_sent_again(request: httpx.Request) -> bool:
    return isinstance(request.stream, httpx.ByteStream)


def _check_httpx() -> None:
    """Better no credentials at all than some that another version of httpx copies into redirects."""
    secret = _OneHop(httpx.Headers(), {"x-secret": "1"})
    if httpx.Headers(secret).raw or secret.copy().raw or secret.multi_items() or dict(secret):
        raise ImportError(f"otpgate_client cannot keep credentials from redirects of httpx {httpx.__version__}")


_check_httpx()
