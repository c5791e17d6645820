"""Asks a server about somebody's token."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Optional

from ._api import MAX_ANSWER, VERIFY_PATH, verified, verify_fields, with_credentials
from ._client import SyncClient
from .tokens import TokenSource

if TYPE_CHECKING:
    import requests


class VerifyClient(SyncClient):
    """Verifies tokens as the member of the verifying realm (`ungleich-auth`) that `token_source` proves.

    `base_url` is `http://...`, `https://...` or `unix:/PATH` of otpgate's API or of an ungleich-otp server.
    `timeout` is how many seconds connecting may take, and each silence of the server. `ssl_context` replaces
    the system's certificates; `session` sends through a session of `requests` instead of the standard
    library. May be shared by threads.
    """

    def __init__(
        self,
        base_url: str,
        token_source: TokenSource,
        *,
        timeout: float = 5.0,
        ssl_context: Optional[ssl.SSLContext] = None,
        session: Optional[requests.Session] = None,
    ) -> None:
        super().__init__(base_url, token_source, timeout=timeout, ssl_context=ssl_context, session=session)

    def verify(self, name: str, realm: str, token: str, *, source: Optional[str] = None) -> bool:
        """Whether `token` proves `name` in `realm` right now.

        `source` is the IP address of whoever gave the token. Say it if it is known: wrong tokens then count
        against that address. Otherwise they count against this service, which then has to wait.

        `False` also where a name, realm or token is of impossible form, and, since the server gives the same
        answer, where our own realm is not the verifying one.

        Raises `CredentialsError` if our own credentials are not accepted, `ThrottledError`,
        `UnavailableError`, `UnreachableError`, `BadAnswerError`, or another `RefusedError`. None of them
        means that the token is right.
        """
        body = with_credentials(self._source, verify_fields(name, realm, token, source))
        return verified(self._transport.send("POST", VERIFY_PATH, body, MAX_ANSWER))
