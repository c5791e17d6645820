"""Why a call has no result. Nothing here repeats a seed or a token."""

from __future__ import annotations

from typing import Optional


class OtpgateError(Exception):
    """Base of all errors of this package."""


class SeedError(OtpgateError, ValueError):
    """A text is no seed, or a seed cannot be read; the message does not show it."""


class UnreachableError(OtpgateError):
    """No connection, a time-out, or an answer that broke off. Whether a change was made is unknown."""


class BadAnswerError(OtpgateError):
    """Something answers, but not as this API does."""


class RefusedError(OtpgateError):
    """The server says no. Which no, the subclasses tell."""

    def __init__(self, status: int, detail: str, request_id: Optional[str] = None) -> None:
        self.status = status
        """The status of the answer."""
        self.detail = detail
        """The server's words, at most 500 characters, all printable."""
        self.request_id = request_id
        """The number under which the server's log tells more."""
        super().__init__(status, detail, request_id)

    def __str__(self) -> str:
        where = f" (request {self.request_id})" if self.request_id else ""
        return f"the server refuses with {self.status}: {self.detail}{where}"


class InvalidError(RefusedError):
    """400: a field is wrong, such as a name that is taken."""


class CredentialsError(RefusedError):
    """403 or 401: our own name, realm or token is not accepted. Look at seed and clock."""


class NotPermittedError(RefusedError):
    """403: we are who we say, but our realm may not do this."""


class NotFoundError(RefusedError):
    """404: there is no such entry."""


class ConflictError(RefusedError):
    """409: somebody else changes the entry, or an earlier rotation still overlaps."""


class _WaitError(RefusedError):
    def __init__(
        self,
        status: int,
        detail: str,
        request_id: Optional[str] = None,
        retry_after: Optional[float] = None,
    ) -> None:
        super().__init__(status, detail, request_id)
        self.retry_after = retry_after
        """Seconds to wait before another try, if the server says so."""


class ThrottledError(_WaitError):
    """429: too many wrong tokens, of ours or of the name to be verified."""


class UnavailableError(_WaitError):
    """503: the server cannot prove that its entries are current; it never guesses."""
