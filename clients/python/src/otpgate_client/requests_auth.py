"""Fresh credentials on every request of `requests`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union
from urllib.parse import urljoin

from requests import PreparedRequest, Response
from requests.auth import AuthBase
from requests.sessions import SessionRedirectMixin
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from ._repeat import is_same_server, token_of_server
from .tokens import TokenSource

if TYPE_CHECKING:
    _Headers = CaseInsensitiveDict[Union[str, bytes]]
else:
    # In older versions it takes no parameters.
    _Headers = CaseInsensitiveDict


class RequestsAuth(AuthBase):
    """`requests.get(url, auth=RequestsAuth(source))`, or `session.auth = RequestsAuth(source)`.

    Every request, redirects to the same server and what `urllib3` repeats by itself included, carries the
    token of the moment it is sent. Redirects to other servers carry nothing. Give it to sessions that talk to
    one gate only: whatever server a session is told to ask gets credentials.

    With `retry_on_drift`, a request that a gate refused with 401 is sent once more with the token of the gate's
    `Date`, if that is at most ten minutes away and the body is in memory.
    """

    def __init__(self, source: TokenSource, *, retry_on_drift: bool = False) -> None:
        self.source = source
        self.retry_on_drift = retry_on_drift

    def __call__(self, r: PreparedRequest) -> PreparedRequest:
        """Called by `requests`."""
        # The types of requests, and those that others publish for it, disagree about both.
        request: Any = r
        request.headers = _FreshHeaders(r.headers, self.source)
        request.register_hook("response", self._answered)
        return r

    def _answered(self, response: Response, **how: Any) -> Response:
        request = response.request
        if response.status_code == 401 and self.retry_on_drift:
            response = self._retried(response, how)
        # What follows a redirect is made from a copy of this request, after this.
        if response.is_redirect and not _leads_home(response):
            for name in self.source.header_names:
                request.headers.pop(name, None)
        return response

    def _retried(self, response: Response, how: dict[str, Any]) -> Response:
        request = response.request
        names = self.source.header_names
        if names.token not in request.headers or not isinstance(request.body, (bytes, str, type(None))):
            return response
        answer = response.headers
        token = token_of_server(self.source, answer.get("WWW-Authenticate"), answer.get("Date"))
        if token is None:
            return response
        again = request.copy()
        again.headers = CaseInsensitiveDict({**request.headers, names.token: token})
        # The connection is free again when the answer is read.
        _ = response.content
        response.close()
        answered: Response = response.connection.send(again, **how)
        answered.history.append(response)
        answered.request = again
        return answered


class _FreshHeaders(_Headers):
    """Headers whose token is that of the moment they are read: also when urllib3 sends them again."""

    def __init__(self, headers: Mapping[str, Any], source: TokenSource) -> None:
        self._source = source
        super().__init__(headers)
        for name, value in source.headers().items():
            self[name] = _wire(value)

    def __getitem__(self, name: str) -> Union[str, bytes]:
        value = super().__getitem__(name)
        is_token = name.lower() == self._source.header_names.token.lower()
        return self._source.token() if is_token else value

    def copy(self) -> _FreshHeaders:
        """Copies of the request are as fresh; what was removed stays so."""
        copied = _FreshHeaders({}, self._source)
        copied.clear()
        copied.update(self)
        return copied


def _wire(value: str) -> Union[str, bytes]:
    # http.client would send text as Latin-1.
    return value if value.isascii() else value.encode()


def _leads_home(response: Response) -> bool:
    """Whether both parsers of URLs that are at work in `requests` see the same server."""
    target = SessionRedirectMixin().get_redirect_target(response)
    if target is None:
        return False
    target = urljoin(response.url, target)
    try:
        seen = parse_url(target)
    except LocationParseError:
        return False
    again = f"{seen.scheme}://{seen.netloc}"
    return is_same_server(response.url, target) and is_same_server(response.url, again)
