"""Tokens of RFC 6238, made from a seed that nothing here shows."""

from __future__ import annotations

import base64
import hmac
import os
import re
import time
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple, NoReturn, Optional, TypedDict, Union

from .errors import SeedError

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ALGORITHMS = ("SHA1", "SHA256", "SHA512")
_MAX_SEED_CHARS = 256
_MAX_SEED_FILE = 4096
_MAX_LABEL_CHARS = 128


class HeaderNames(NamedTuple):
    """What the three headers are called; gates may be set otherwise (`[headers]`)."""

    name: str = "X-Auth-Name"
    realm: str = "X-Auth-Realm"
    token: str = "X-Auth-Token"  # noqa: S105 (a name)


class TokenSettings(TypedDict, total=False):
    """What `TokenSource` takes beside name, realm and seed."""

    digits: int
    period: int
    algorithm: str
    clock: Callable[[], float]
    header_names: HeaderNames


class _Seed:
    """The text of a seed, and where it is from. Does not print."""

    __slots__ = ("_place", "_text")

    def __init__(self, text: str, place: str) -> None:
        self._text = text
        self._place = place

    def keyed(self, algorithm: str) -> hmac.HMAC:
        key = self._decode()
        if isinstance(key, str):
            raise SeedError(f"{self._place} {key}")
        return hmac.new(key, digestmod=algorithm.lower())

    def _decode(self) -> Union[bytes, str]:
        """The bytes, read as the gate reads them; or what is wrong."""
        if len(self._text) > _MAX_SEED_CHARS:
            return f"has more than {_MAX_SEED_CHARS} characters"
        text = self._text.strip().rstrip("=").replace(" ", "").replace("-", "")
        if not text:
            return "is empty"
        # `upper` alone would make letters of ASCII from others, such as the dotless i.
        if not re.fullmatch("[A-Za-z2-7]+", text) or len(text) % 8 in (1, 3, 6):
            return "is not base32"
        # Spare bits of the last character are ignored.
        return base64.b32decode(text.upper() + "=" * (-len(text) % 8))

    def __repr__(self) -> str:
        return "[seed]"


class TokenSource:
    """Who we are, and fresh tokens that prove it.

    `seed` is base32 in any case, with or without padding, with blanks and hyphens between groups. `digits`,
    `period` (seconds) and `algorithm` must be those of the entry. `clock` gives Unix time.

    Only keyed HMAC state is kept of the seed; it does not print, and it cannot be pickled. May be shared by
    threads.
    """

    __slots__ = ("_clock", "_keyed", "algorithm", "digits", "header_names", "name", "period", "realm")

    def __init__(
        self,
        name: str,
        realm: str,
        seed: Union[str, _Seed],
        *,
        digits: int = 6,
        period: int = 30,
        algorithm: str = "SHA1",
        clock: Callable[[], float] = time.time,
        header_names: HeaderNames = HeaderNames(),  # noqa: B008 (immutable)
    ) -> None:
        # Reports of errors may show the variables of every frame.
        seed = _Seed(seed, "the seed") if isinstance(seed, str) else seed
        self.name = _label("name", name)
        self.realm = _label("realm", realm)
        if digits not in range(6, 9):
            raise ValueError("digits must be 6, 7 or 8")
        if period not in range(5, 3601):
            raise ValueError("period must be 5 to 3600 seconds")
        if algorithm.upper() not in _ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(_ALGORITHMS)}")
        self.digits = digits
        self.period = period
        self.algorithm = algorithm.upper()
        self.header_names = header_names
        self._clock = clock
        self._keyed = seed.keyed(self.algorithm)

    @classmethod
    def from_file(
        cls, name: str, realm: str, path: Union[str, os.PathLike[str]], **settings: Unpack[TokenSettings]
    ) -> TokenSource:
        """As the constructor, with the seed from a file.

        Raises `SeedError` if the file cannot be read or holds no seed.
        """
        return cls(name, realm, _read(path), **settings)

    @classmethod
    def from_env(
        cls,
        name: Optional[str] = None,
        realm: Optional[str] = None,
        *,
        environ: Optional[Mapping[str, str]] = None,
        **settings: Unpack[TokenSettings],
    ) -> TokenSource:
        """As the constructor, with what is missing from the environment (or from `environ`).

        The variables are those of `otpgate client`: `OTPGATE_AUTH_NAME`, `OTPGATE_AUTH_REALM`, and
        `OTPGATE_AUTH_SEED` or `OTPGATE_AUTH_SEED_FILE`; without these two `OTPGATE_SEED`, as `otpgate token`
        takes it, or `OTPGATE_SEED_FILE`. A seed and a file at once is an error; empty variables are none.
        """
        variables = os.environ if environ is None else environ
        name = name or _variable(variables, "OTPGATE_AUTH_NAME")
        realm = realm or _variable(variables, "OTPGATE_AUTH_REALM")
        where = _seed_variable(variables)
        if where.endswith("_FILE"):
            return cls.from_file(name, realm, variables[where], **settings)
        return cls(name, realm, _Seed(variables[where], f"the seed in {where}"), **settings)

    def token(self, at: Optional[float] = None) -> str:
        """The token of now, or of the Unix time `at`."""
        now = self._clock() if at is None else at
        state = self._keyed.copy()
        state.update((max(0, int(now)) // self.period).to_bytes(8, "big"))
        digest = state.digest()
        # RFC 4226, section 5.3
        offset = digest[-1] & 15
        number = int.from_bytes(digest[offset : offset + 4], "big") & 0x7FFF_FFFF
        return str(number % 10**self.digits).zfill(self.digits)

    def now(self) -> float:
        """The Unix time of the source's clock."""
        return self._clock()

    def headers(self) -> dict[str, str]:
        """The three headers that prove who sends a request, with the token of now.

        Names and realms beyond ASCII have to be sent as UTF-8, which not every HTTP library does by itself;
        `RequestsAuth` and `HttpxAuth` do.
        """
        return dict(zip(self.header_names, (self.name, self.realm, self.token())))

    def __repr__(self) -> str:
        # Also of a source that could not be made, in reports of errors.
        who = [getattr(self, name, None) for name in ("name", "realm")]
        return f"TokenSource({who[0]!r}, {who[1]!r}, [seed])"

    def __copy__(self) -> TokenSource:
        return self

    def __deepcopy__(self, memo: object) -> TokenSource:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a TokenSource holds a seed and cannot be pickled; make one in each process")


def _read(path: Union[str, os.PathLike[str]]) -> _Seed:
    try:
        with Path(path).open("rb") as file:
            return _Seed(file.read(_MAX_SEED_FILE).decode("ascii", "replace"), f"the seed in `{os.fspath(path)}`")
    except OSError as error:
        raise SeedError(f"cannot read the seed from `{os.fspath(path)}`: {error.strerror}") from None


def _variable(variables: Mapping[str, str], name: str) -> str:
    value = variables.get(name)
    if not value:
        raise ValueError(f"missing {name}")
    return value


def _seed_variable(variables: Mapping[str, str]) -> str:
    """Which variable says what the seed is."""
    for pair in (("OTPGATE_AUTH_SEED", "OTPGATE_AUTH_SEED_FILE"), ("OTPGATE_SEED", "OTPGATE_SEED_FILE")):
        found = [name for name in pair if variables.get(name)]
        if len(found) > 1:
            raise SeedError(f"both {' and '.join(pair)} are set")
        if found:
            return found[0]
    raise SeedError("no seed: set OTPGATE_AUTH_SEED_FILE or OTPGATE_AUTH_SEED")


def _label(what: str, text: str) -> str:
    """A name or realm. The gate refuses some more characters; what could break a header ends here."""
    text = text.strip()
    if not text:
        raise ValueError(f"the {what} is empty")
    if len(text) > _MAX_LABEL_CHARS:
        raise ValueError(f"the {what} has more than {_MAX_LABEL_CHARS} characters")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise ValueError(f"the {what} contains a control character")
    return text
