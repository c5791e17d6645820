from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Callable

import pytest
import requests

from otpgate_client import (
    AdminClient,
    BadAnswerError,
    ConflictError,
    CredentialsError,
    Entry,
    InvalidError,
    NotFoundError,
    NotPermittedError,
    TokenSource,
    VerifyClient,
)
from rig import SEEDS, Gate, Upstream, put_entries, source

Connect = Callable[..., AdminClient]


@pytest.fixture(params=["standard", "session", "unix"])
def admin(gate: Gate, request: pytest.FixtureRequest) -> Iterator[AdminClient]:
    url = gate.api_socket if request.param == "unix" else gate.api
    with requests.Session() as session:
        session.trust_env = False
        used = session if request.param == "session" else None
        with AdminClient(url, source("admin"), session=used) as client:
            yield client


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes clients that are closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda url, who="admin": stack.enter_context(
            AdminClient(url, who if isinstance(who, TokenSource) else source(who))
        )


def test_an_entry_from_its_beginning_to_its_end(gate: Gate, admin: AdminClient) -> None:
    ends = datetime(2099, 12, 31, 23, 59, 59, tzinfo=timezone.utc)
    made = admin.create(
        "printer", "büro", digits=8, algorithm="SHA256", period=60, expires_at=ends, comment="3rd floor"
    )
    assert made.id is not None
    assert made.seed is not None
    assert (made.name, made.realm, made.digits, made.algorithm, made.period) == (
        "printer",
        "büro",
        8,
        "SHA256",
        60,
    )
    assert (made.enabled, made.expires_at, made.comment, made.error) == (True, ends, "3rd floor", None)
    assert made.created_at is not None
    assert made.created_at.tzinfo is not None
    assert admin.show(made.id) == made
    assert list(admin.list(name="printer", realm="büro")) == [made]

    with VerifyClient(gate.api, source("verifier")) as verifier:

        def is_accepted(entry: Entry) -> bool:
            assert entry.seed is not None
            token = TokenSource("a", "b", entry.seed, digits=8, period=60, algorithm="SHA256").token()
            return verifier.verify("printer", "büro", token)

        assert is_accepted(made)
        rotated = admin.rotate(made.id, overlap=timedelta(minutes=1))
        assert rotated.seed != made.seed
        assert rotated.previous_seed_until is not None
        assert is_accepted(made)
        assert is_accepted(rotated)
        with pytest.raises(ConflictError, match="keep"):
            admin.rotate(made.id, overlap=60)
        last = admin.rotate(made.id, overlap=0)
        assert [is_accepted(entry) for entry in (made, rotated, last)] == [False, False, True]
        assert admin.update(made.id, enabled=False).enabled is False
        assert not is_accepted(last)
        changed = admin.update(made.id, enabled=True, name="scanner", expires_at=None, digits=None)
        assert (changed.name, changed.expires_at, changed.digits, changed.seed) == ("scanner", None, 6, last.seed)

    admin.delete(made.id)
    for call in (admin.show, admin.delete, admin.rotate, admin.update):
        with pytest.raises(NotFoundError):
            call(made.id)


def test_rotations_may_keep_either_seed(admin: AdminClient) -> None:
    made = admin.create("kept", "lab")
    assert made.id is not None
    admin.rotate(made.id, overlap=60)
    admin.rotate(made.id, overlap=60, keep="previous")
    admin.delete(made.id)


def test_refusals_have_types(gate: Gate, admin: AdminClient, connect: Connect) -> None:
    with pytest.raises(InvalidError, match="name"):
        admin.create("", "lab")
    with pytest.raises(InvalidError, match="unique set"):
        admin.create("alice", "shop")
    with pytest.raises(NotPermittedError):
        connect(gate.api, "verifier").create("a", "b")
    with pytest.raises(CredentialsError):
        next(connect(gate.api, TokenSource("admin", "ungleich-admin", SEEDS["alice"])).list())
    with pytest.raises(TypeError, match="unknown fields: seed"):
        admin.create("a", "b", seed="JBSWY3DPEHPK3PXP")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unknown fields: seed"):
        admin.update(1, seed="JBSWY3DPEHPK3PXP")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="time zone"):
        admin.create("a", "b", expires_at=datetime(2099, 1, 1))
    with pytest.raises(ValueError, match="format code"):
        admin.delete("1/../2")  # type: ignore[arg-type]


def test_lists_are_whole_in_pages_of_any_size(gate: Gate, connect: Connect) -> None:
    admin = connect(gate.api)
    made = [admin.create(f"n{n}", "many & more") for n in range(7)]
    for page_size in (1, 2, 3, 7, 8, 1000):
        everything = list(admin.list(page_size=page_size))
        assert [entry.name for entry in everything[:4]] == list(SEEDS), page_size
        assert everything[-7:] == made
        assert list(admin.list(realm="many & more", page_size=page_size)) == made
    assert list(admin.list(name="n3")) == [made[3]]
    assert list(admin.list(realm="none")) == []
    # An entry that goes away on the way harms nothing.
    under_way = admin.list(realm="many & more", page_size=2)
    assert [next(under_way), next(under_way)] == made[:2]
    assert made[1].id is not None
    admin.delete(made[1].id)
    assert list(under_way) == made[2:]
    for entry in (made[0], *made[2:]):
        assert entry.id is not None
        admin.delete(entry.id)


def test_a_list_of_ungleich_otp_is_taken(upstream: Upstream, connect: Connect) -> None:
    # No numbers, no pages, no filters, no more fields.
    shown = [{"name": f"n{n}", "realm": "a" if n % 2 else "b", "seed": "JBSWY3DPEHPK3PXP"} for n in range(5)]
    admin = connect(upstream.base)
    for page_size in (5, 2, 100):
        upstream.script = [(200, {}, json.dumps(shown).encode())]
        found = list(admin.list(realm="b", page_size=page_size))
        assert [entry.name for entry in found] == ["n0", "n2", "n4"]
        assert upstream.script == []
    assert len(upstream.seen) == 3


@pytest.mark.parametrize(
    "shown",
    [
        {},
        [1],
        [{"name": "a"}],
        [{"name": "a", "realm": "b", "seed": 5}],
        [{"name": "a", "realm": "b", "id": True}],
        [{"name": "a", "realm": "b", "created_at": "JBSWY3DPEHPK3PXP"}],
        # For ever and ever.
        [{"name": "a", "realm": "b", "id": 1}, {"name": "a", "realm": "b", "id": 0}],
    ],
)
def test_what_is_no_list_of_entries_is_none(upstream: Upstream, connect: Connect, shown: object) -> None:
    upstream.script = [(200, {}, json.dumps(shown).encode())] * 3
    with pytest.raises(BadAnswerError) as caught:
        list(connect(upstream.base).list(page_size=2))
    assert "JBSWY3DPEHPK3PXP" not in str(caught.value)
    assert caught.value.__context__ is None
    assert len(upstream.seen) == 1


def test_seeds_that_are_hidden_are_none(tmp_path: Path, connect: Connect) -> None:
    put_entries(tmp_path)
    gate = Gate(tmp_path, "[api]\nreveal_seeds = false\n").ready()
    try:
        admin = connect(gate.api)
        assert {entry.seed for entry in admin.list()} == {None}
        assert admin.create("a", "b").seed is not None
    finally:
        gate.stop()


def test_printed_entries_show_no_seed(gate: Gate, connect: Connect) -> None:
    entry = connect(gate.api).show(3)
    assert entry.seed == SEEDS["alice"]
    for text in (repr(entry), str(entry), f"{entry}", repr([entry])):
        assert "alice" in text
        assert SEEDS["alice"] not in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.seed = None  # type: ignore[misc]
