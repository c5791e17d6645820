from __future__ import annotations

import copy
import pickle
import traceback
from pathlib import Path
from typing import Callable

import pytest

from otpgate_client import HeaderNames, SeedError, TokenSource
from rig import run

SEED = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"
# RFC 6238, appendix B: the seeds are the ASCII digits, repeated to the length of each hash.
SEEDS = {
    "SHA1": SEED,
    "SHA256": "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQGEZA",
    "SHA512": "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ" * 3 + "GEZDGNA",
}
VECTORS = [
    (59, "94287082", "46119246", "90693936"),
    (1111111109, "07081804", "68084774", "25091201"),
    (1111111111, "14050471", "67062674", "99943326"),
    (1234567890, "89005924", "91819424", "93441116"),
    (2000000000, "69279037", "90698825", "38618901"),
    (20000000000, "65353130", "77737706", "47863826"),
]


@pytest.mark.parametrize("vector", VECTORS)
def test_tokens_are_those_of_rfc_6238(vector: tuple[int, str, str, str]) -> None:
    at, *tokens = vector
    for (algorithm, seed), token in zip(SEEDS.items(), tokens):
        source = TokenSource("a", "b", seed, digits=8, algorithm=algorithm, clock=lambda: at)
        assert source.token() == token
        assert TokenSource("a", "b", seed, algorithm=algorithm).token(at) == token[2:]


@pytest.mark.parametrize(
    ("algorithm", "digits", "period"), [("SHA1", 6, 30), ("SHA256", 7, 60), ("SHA512", 8, 3600), ("SHA1", 8, 5)]
)
def test_tokens_are_those_of_the_program(tmp_path: Path, algorithm: str, digits: int, period: int) -> None:
    # Spare bits, small letters, hyphens: all are read alike.
    for text in (SEED, "JBSWY3DPEHPK3PXP", "ab", "GEZDGNBVGY3TQOJQGEZDGNBVGZ", " gezd-GNBV gy3t QOJQ====\n"):
        file = tmp_path / "a.seed"
        file.write_text(text)
        given = f"--algorithm {algorithm} --digits {digits} --period {period} --at 1800000017".split()
        theirs = run("token", "--seed-file", str(file), *given).strip()
        source = TokenSource.from_file("a", "b", file, algorithm=algorithm, digits=digits, period=period)
        assert source.token(1800000017) == theirs, text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("==", "is empty"),
        (" - ", "is empty"),
        ("A", "is not base32"),
        ("JBSWY3DPEHPK3PX1", "is not base32"),
        ("JBSWY3D\tPEHPK3PX", "is not base32"),
        ("JB=SWY3DPEHPK3PX", "is not base32"),
        # Python makes an I and an S of these.
        ("JBSWY3DPEHPK3PX\u0131", "is not base32"),
        ("JBSWY3DPEHPK3PX\u017f", "is not base32"),
        ("A" * 257, "has more than 256 characters"),
    ],
)
def test_what_is_no_seed_is_told_without_showing_it(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(SeedError, match=f"^the seed {why}$"):
        TokenSource("a", "b", text)
    file = tmp_path / "a.seed"
    file.write_text(text)
    with pytest.raises(SeedError, match=f"a.seed` {why}$" if text.isascii() else "is not base32"):
        TokenSource.from_file("a", "b", file)


def test_the_seed_shows_nowhere() -> None:
    source = TokenSource("alice", "shop", SEED)
    values = [repr(getattr(source, name)) for name in TokenSource.__slots__]
    for text in (repr(source), str(source), f"{source}", *values, repr(source.headers())):
        assert SEED not in text
        assert "12345678901234567890" not in text
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(source, protocol)
    assert copy.copy(source) is source
    assert copy.deepcopy({"a": source})["a"] is source


def test_reports_of_errors_do_not_show_the_seed() -> None:
    bad = SEED + "!"
    environ = {"OTPGATE_AUTH_SEED": bad}
    attempts: list[Callable[[], TokenSource]] = [
        lambda: TokenSource("a", "b", bad),
        lambda: TokenSource.from_env("a", "b", environ=environ),
        lambda: TokenSource("a", "b", SEED, digits=9),
        lambda: TokenSource("", "b", SEED),
        lambda: TokenSource.from_env("a", "b", environ={"OTPGATE_SEED": SEED}, algorithm="MD5"),
    ]
    for make in attempts:
        with pytest.raises(ValueError, match="e") as caught:
            make()
        # As tools do that report the variables of every frame; the first ones are this test's.
        seen = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        ours = [frame for frame in seen.stack if "otpgate_client" in frame.filename]
        assert ours
        for frame in ours:
            # The environment is the caller's.
            variables = {k: v for k, v in (frame.locals or {}).items() if k not in ("environ", "variables")}
            assert SEED not in str(variables), frame
            assert "12345678901234567890" not in str(variables), frame
        assert SEED not in "".join(traceback.format_exception_only(type(caught.value), caught.value))
        assert caught.value.__context__ is None


def test_headers_are_the_three_that_a_gate_reads() -> None:
    source = TokenSource(" alice ", "shop", SEED, clock=lambda: 59)
    assert source.headers() == {"X-Auth-Name": "alice", "X-Auth-Realm": "shop", "X-Auth-Token": "287082"}
    other = TokenSource("a", "b", SEED, clock=lambda: 59, header_names=HeaderNames(token="X-Otp"))
    assert other.headers() == {"X-Auth-Name": "a", "X-Auth-Realm": "b", "X-Otp": "287082"}


def test_settings_are_checked() -> None:
    for bad in ({"digits": 5}, {"digits": 9}, {"period": 4}, {"period": 3601}, {"algorithm": "MD5"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TokenSource("a", "b", SEED, **bad)
    for name in ("", " ", "a" * 129, "a\nb", "a\0b", "a\ud800"):
        with pytest.raises(ValueError, match="the name"):
            TokenSource(name, "b", SEED)
        with pytest.raises(ValueError, match="the realm"):
            TokenSource("a", name, SEED)


def test_the_environment_is_that_of_the_program(tmp_path: Path) -> None:
    file = tmp_path / "a.seed"
    file.write_text(f"{SEED}\n")
    who = {"OTPGATE_AUTH_NAME": "alice", "OTPGATE_AUTH_REALM": "shop"}
    for given in (
        {"OTPGATE_AUTH_SEED": SEED},
        {"OTPGATE_AUTH_SEED_FILE": str(file), "OTPGATE_AUTH_SEED": ""},
        {"OTPGATE_SEED": SEED},
        {"OTPGATE_SEED_FILE": str(file)},
        {"OTPGATE_AUTH_SEED": SEED, "OTPGATE_SEED": "MFRGGZDFMZTWQ2LK"},
    ):
        source = TokenSource.from_env(environ={**who, **given}, digits=8)
        assert (source.name, source.realm, source.token(59)) == ("alice", "shop", "94287082"), given
    assert TokenSource.from_env("bob", "lab", environ={"OTPGATE_SEED": SEED}).name == "bob"
    for given, why in (
        ({}, "missing OTPGATE_AUTH_NAME"),
        (who, "no seed"),
        ({**who, "OTPGATE_AUTH_SEED": SEED, "OTPGATE_AUTH_SEED_FILE": "x"}, "both OTPGATE_AUTH_SEED and"),
        ({**who, "OTPGATE_SEED": SEED, "OTPGATE_SEED_FILE": "x"}, "both OTPGATE_SEED and"),
        ({**who, "OTPGATE_SEED": "!"}, "the seed in OTPGATE_SEED is not base32"),
        ({**who, "OTPGATE_SEED_FILE": str(tmp_path / "none")}, "none`: No such file"),
    ):
        with pytest.raises(ValueError, match=why):
            TokenSource.from_env(environ=given)
