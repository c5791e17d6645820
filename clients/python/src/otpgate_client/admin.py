"""Manages entries."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Optional,
    TypedDict,
    Union,
)
from urllib.parse import quote, urlencode

from ._api import MAX_ANSWER, MAX_LIST, decode, refusal, with_credentials
from ._client import SyncClient
from .errors import BadAnswerError
from .tokens import TokenSource

if TYPE_CHECKING:
    import requests
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Entry:
    """An entry as the server shows it. Printing one does not print its seed; `asdict` and pickle hold it.

    ungleich-otp shows names, realms and seeds alone.
    """

    name: str
    realm: str
    id: Optional[int] = None
    seed: Optional[str] = field(default=None, repr=False)
    """Base32; `None` if the server hides it."""
    algorithm: Optional[str] = None
    digits: Optional[int] = None
    period: Optional[int] = None
    """Seconds of a time step."""
    enabled: Optional[bool] = None
    created_at: Optional[datetime] = None
    updated_at: Optional[datetime] = None
    expires_at: Optional[datetime] = None
    previous_seed_until: Optional[datetime] = None
    """How long the seed before the last rotation is accepted."""
    comment: Optional[str] = None
    error: Optional[str] = None
    """Why the server cannot open this entry."""


class EntryFields(TypedDict, total=False):
    """Settings of an entry; `None` takes the realm's setting, or none. What is not given stays."""

    algorithm: Optional[Literal["SHA1", "SHA256", "SHA512"]]
    digits: Optional[int]
    period: Optional[int]
    enabled: bool
    expires_at: Optional[datetime]
    comment: str


class EntryChanges(EntryFields, total=False):
    """What of an entry can be changed."""

    name: str
    realm: str


class AdminClient(SyncClient):
    """Manages entries as the member of the managing realm (`ungleich-admin`) that `token_source` proves.

    The arguments are those of `VerifyClient`. All methods raise `CredentialsError`, `NotPermittedError`,
    `InvalidError`, `ConflictError`, `ThrottledError`, `UnavailableError`, `UnreachableError` or
    `BadAnswerError`; those that name an entry, also `NotFoundError`.
    """

    def __init__(
        self,
        base_url: str,
        token_source: TokenSource,
        *,
        timeout: float = 30.0,
        ssl_context: Optional[ssl.SSLContext] = None,
        session: Optional[requests.Session] = None,
    ) -> None:
        super().__init__(base_url, token_source, timeout=timeout, ssl_context=ssl_context, session=session)

    def create(self, name: str, realm: str, **settings: Unpack[EntryFields]) -> Entry:
        """Makes an entry; the server makes its seed."""
        fields = {**_fields(settings, EntryFields), "name": name, "realm": realm}
        return _entry(self._call("POST", "ungleichotp/?full=1", fields))

    def list(
        self, *, name: Optional[str] = None, realm: Optional[str] = None, page_size: int = 1000
    ) -> Iterator[Entry]:
        """The entries in order of creation, of this name and realm where given.

        They are fetched while they are taken, `page_size` in one call, so that their number costs no memory.
        """
        after = 0
        while True:
            query = {"full": 1, "limit": page_size, "after": after, "name": name, "realm": realm}
            given = {key: value for key, value in query.items() if value is not None}
            page = self._call("GET", f"ungleichotp/?{urlencode(given, quote_via=quote)}", {}, MAX_LIST)
            if not isinstance(page, list):
                raise BadAnswerError("it is no list of entries")
            entries = [_entry(one) for one in page]
            for entry in entries:
                # ungleich-otp knows no filters.
                if name in (None, entry.name) and realm in (None, entry.realm):
                    yield entry
            last = entries[-1].id if entries else None
            # ungleich-otp knows no pages either: it sends all, without numbers.
            if len(entries) != page_size or last is None:
                return
            if last <= after:
                raise BadAnswerError("its entries are in no order")
            after = last

    def show(self, id: int) -> Entry:
        """The entry with that number."""
        return _entry(self._call("GET", f"ungleichotp/{id:d}/?full=1", {}))

    def update(self, id: int, **changes: Unpack[EntryChanges]) -> Entry:
        """Changes the given fields of an entry."""
        return _entry(self._call("PATCH", f"ungleichotp/{id:d}/?full=1", _fields(changes, EntryChanges)))

    def rotate(
        self,
        id: int,
        *,
        overlap: Union[timedelta, int, None] = None,
        keep: Optional[Literal["current", "previous"]] = None,
    ) -> Entry:
        """Gives an entry a new seed.

        The seed before is accepted for `overlap` more, a number of seconds; unless given, as the server is set.
        Where an earlier rotation still overlaps, `keep` says which of its seeds callers use.
        """
        fields: dict[str, object] = {}
        if overlap is not None:
            fields["overlap"] = int(overlap.total_seconds()) if isinstance(overlap, timedelta) else overlap
        if keep is not None:
            fields["keep"] = keep
        return _entry(self._call("POST", f"ungleichotp/{id:d}/rotate/?full=1", fields))

    def delete(self, id: int) -> None:
        """Deletes an entry."""
        self._call("DELETE", f"ungleichotp/{id:d}/", {})

    def _call(self, method: str, path: str, fields: Mapping[str, object], limit: int = MAX_ANSWER) -> Any:
        answer = self._transport.send(method, path, with_credentials(self._source, fields), limit)
        if answer.status == 204:
            return None
        if answer.status in (200, 201):
            return decode(answer)
        raise refusal(answer)


def _fields(given: Mapping[str, Any], known: type[Any]) -> dict[str, object]:
    unknown = given.keys() - known.__annotations__.keys() - EntryFields.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown fields: {', '.join(sorted(unknown))}")
    return {name: _sent(value) for name, value in given.items()}


def _sent(value: object) -> object:
    if not isinstance(value, datetime):
        return value
    if value.tzinfo is None:
        raise ValueError("a time needs a time zone")
    return value.isoformat(timespec="seconds")


def _entry(shown: object) -> Entry:
    """An entry of an answer. What is wrong is told without its values: they may be seeds."""
    if not isinstance(shown, dict):
        raise BadAnswerError("it is no entry")
    kinds: dict[str, type[Any]] = {"id": int, "digits": int, "period": int, "enabled": bool}
    values: dict[str, Any] = {}
    for name in Entry.__dataclass_fields__:
        value = shown.get(name)
        if name.endswith(("_at", "_until")):
            value = _time(value)
        elif value is not None and type(value) is not kinds.get(name, str):
            raise BadAnswerError(f"an entry's `{name}` is of another type")
        values[name] = value
    if values["name"] is None or values["realm"] is None:
        raise BadAnswerError("an entry has no name or realm")
    return Entry(**values)


def _time(value: object) -> Optional[datetime]:
    if value is None:
        return None
    if isinstance(value, str):
        # Python before 3.11 knows no Z.
        try:
            return datetime.fromisoformat(re.sub("Z$", "+00:00", value))
        except ValueError:
            pass
    raise BadAnswerError("a time is not in the form of RFC 3339")
