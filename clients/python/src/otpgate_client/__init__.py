"""Clients of otpgate: fresh one-time tokens on every request, verification, management of entries.

`TokenSource` makes tokens. `RequestsAuth` and `HttpxAuth` put them on requests; `VerifyClient` and
`AsyncVerifyClient` check those of others; `AdminClient` manages entries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .admin import AdminClient, Entry, EntryChanges, EntryFields
from .errors import (
    BadAnswerError,
    ConflictError,
    CredentialsError,
    InvalidError,
    NotFoundError,
    NotPermittedError,
    OtpgateError,
    RefusedError,
    SeedError,
    ThrottledError,
    UnavailableError,
    UnreachableError,
)
from .tokens import HeaderNames, TokenSettings, TokenSource
from .verify import VerifyClient

if TYPE_CHECKING:
    from .httpx_auth import HttpxAuth
    from .requests_auth import RequestsAuth
    from .verify_async import AsyncVerifyClient

__all__ = [
    "AdminClient",
    "AsyncVerifyClient",
    "BadAnswerError",
    "ConflictError",
    "CredentialsError",
    "Entry",
    "EntryChanges",
    "EntryFields",
    "HeaderNames",
    "HttpxAuth",
    "InvalidError",
    "NotFoundError",
    "NotPermittedError",
    "OtpgateError",
    "RefusedError",
    "RequestsAuth",
    "SeedError",
    "ThrottledError",
    "TokenSettings",
    "TokenSource",
    "UnavailableError",
    "UnreachableError",
    "VerifyClient",
]

__version__ = "0.1.0"


_LAZY = {
    "RequestsAuth": ("requests_auth", "requests"),
    "HttpxAuth": ("httpx_auth", "httpx"),
    "AsyncVerifyClient": ("verify_async", "httpx"),
}


def __getattr__(name: str) -> Any:
    """Imports what needs requests or httpx only when it is used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, package = _LAZY[name]
    try:
        return getattr(importlib.import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        text = f"{name} needs {package}: pip install 'otpgate-client[{package}]'"
        raise ImportError(text) from None
