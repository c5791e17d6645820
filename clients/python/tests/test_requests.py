from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from otpgate_client import HeaderNames, RequestsAuth, TokenSource
from rig import SEEDS, Gate, Upstream, put_entries, source, wrong_token


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.trust_env = False
        yield made


class Steps:
    """A clock that is in another time step every time it is read."""

    def __init__(self) -> None:
        self.at = 1_800_000_000.0

    def __call__(self) -> float:
        self.at += 30
        return self.at


def test_every_request_is_proven(gate: Gate, upstream: Upstream, session: requests.Session) -> None:
    for who in ("alice", "jürg"):
        auth = RequestsAuth(source(who))
        # What is there by another way must not be sent beside it.
        extra = {"x-auth-token": "000000", "X-AUTH-NAME": "mallory"}
        answer = session.post(f"{gate.proxy}/orders", data=b"body", headers=extra, auth=auth)
        assert answer.status_code == 200, answer.text
        assert upstream.seen[-1][3] == b"body"
        assert upstream.values("X-Auth-Name")[-1] == who.encode().decode("latin-1")
        assert upstream.values("X-Auth-Token")[-1] is None
    wrong = RequestsAuth(TokenSource("alice", "shop", SEEDS["admin"]))
    assert session.get(f"{gate.proxy}/orders", auth=wrong).status_code == 401
    assert len(upstream.seen) == 2


def test_headers_may_be_called_otherwise(tmp_path: Path, upstream: Upstream, session: requests.Session) -> None:
    put_entries(tmp_path)
    settings = f'[proxy]\nupstream = "{upstream.address}"\n[headers]\ntoken = "X-Otp"\n'
    gate = Gate(tmp_path, settings).ready()
    try:
        session.auth = RequestsAuth(source("alice", header_names=HeaderNames(token="X-Otp")))
        assert session.get(gate.proxy).status_code == 200
        session.auth = RequestsAuth(source("alice"))
        assert session.get(gate.proxy).status_code == 401
    finally:
        gate.stop()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_within_the_gate_are_proven(
    gate: Gate, upstream: Upstream, session: requests.Session, status: int
) -> None:
    session.auth = RequestsAuth(source("alice"))
    answer = session.post(f"{gate.proxy}/a?status={status}&to=/b", data=b"body")
    assert (answer.status_code, len(answer.history)) == (200, 1)
    assert upstream.values("X-Auth-Name") == ["alice", "alice"]


def test_redirected_requests_have_the_token_of_their_moment(upstream: Upstream, session: requests.Session) -> None:
    steps = Steps()
    auth = RequestsAuth(source("alice", clock=steps))
    session.get(f"{upstream.base}/a?status=302&to=/b%3Fstatus%3D302%26to%3D/c", auth=auth)
    tokens = upstream.values("X-Auth-Token")
    assert len(tokens) == len(set(tokens)) == 3
    assert tokens[-1] == source("alice").token(steps.at)


def test_what_urllib3_repeats_has_the_token_of_its_moment(upstream: Upstream, session: requests.Session) -> None:
    session.mount("http://", HTTPAdapter(max_retries=Retry(3, status_forcelist=[503], backoff_factor=0)))
    upstream.failures = 2
    assert session.get(f"{upstream.base}/flaky", auth=RequestsAuth(source("alice", clock=Steps()))).ok
    tokens = upstream.values("X-Auth-Token")
    assert len(tokens) == len(set(tokens)) == 3


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("form", ["http://{0}/x", "//{0}/x", "http://alice@{0}/x", "HTTP://{0}", "/\\{0}/x"])
def test_other_servers_get_nothing(
    upstream: Upstream, stranger: Upstream, session: requests.Session, status: int, form: str
) -> None:
    to = form.format(stranger.address)
    session.auth = RequestsAuth(source("alice"))
    session.get(f"{upstream.base}/a?status={status}&to={quote(to, safe='')}")
    assert upstream.values("X-Auth-Name")[0] == "alice"
    if form != "/\\{0}/x":
        assert len(stranger.seen) == 1
    for header in source("alice").header_names:
        assert set(stranger.values(header)) <= {None}


def test_nor_do_they_get_any_on_the_way_back(
    upstream: Upstream, stranger: Upstream, session: requests.Session
) -> None:
    back = quote(f"{upstream.base}/secret", safe="")
    away = quote(f"{stranger.base}/x?status=302&to={back}", safe="")
    session.get(f"{upstream.base}/a?status=302&to={away}", auth=RequestsAuth(source("alice")))
    assert [request[1].split("?")[0] for request in upstream.seen] == ["/a", "/secret"]
    assert upstream.values("X-Auth-Name") == ["alice", None]
    assert stranger.values("X-Auth-Token") == [None]


def test_redirects_that_are_followed_by_hand_are_bare_too(
    upstream: Upstream, stranger: Upstream, session: requests.Session
) -> None:
    url = f"{upstream.base}/a?status=302&to={quote(stranger.base, safe='')}"
    answer = session.get(url, auth=RequestsAuth(source("alice")), allow_redirects=False)
    assert answer.next is not None
    session.send(answer.next)
    assert stranger.values("X-Auth-Token") == [None]


def test_a_drifting_clock_costs_one_more_request(
    gate: Gate, upstream: Upstream, session: requests.Session
) -> None:
    late = source("alice", clock=lambda: time.time() - 300)
    assert session.get(gate.proxy, auth=RequestsAuth(late)).status_code == 401
    assert upstream.seen == []
    auth = RequestsAuth(late, retry_on_drift=True)
    answer = session.post(f"{gate.proxy}/a?status=307&to=/b", data="body", auth=auth)
    assert answer.status_code == 200
    assert [body for *_, body in upstream.seen] == [b"body", b"body"]
    # A stream cannot be sent again.
    assert session.post(gate.proxy, data=io.BytesIO(b"body"), auth=auth).status_code == 401
    assert len(upstream.seen) == 2


def test_nothing_is_repeated_that_cannot_be_cured(upstream: Upstream, session: requests.Session) -> None:
    challenge = quote('OTP realm="x"', safe="")
    url = f"{upstream.base}/a?status=401&challenge="
    upstream.time = 1_800_000_000
    right, late, far = (
        source("alice", clock=lambda at=at: at) for at in (1_800_000_029, 1_799_999_400, 1_799_999_399)
    )
    for settings, target, requested in (
        (right, url + challenge, 1),
        (far, url + challenge, 1),
        (late, url + "Basic", 1),
        (late, f"{upstream.base}/a?status=403&challenge={challenge}", 1),
        # Once, and no more.
        (late, url + challenge, 2),
    ):
        upstream.seen.clear()
        session.get(target, auth=RequestsAuth(settings, retry_on_drift=True))
        assert len(upstream.seen) == requested, target


def test_a_repeated_request_leads_no_other_server_to_credentials(
    upstream: Upstream, stranger: Upstream, session: requests.Session
) -> None:
    # The first answer is 401 of a gate, the second a redirect to elsewhere.
    upstream.script = [
        (401, {"WWW-Authenticate": 'OTP realm="x"'}, b""),
        (302, {"Location": stranger.base}, b""),
    ]
    late = source("alice", clock=lambda: time.time() - 300)
    session.get(upstream.base, auth=RequestsAuth(late, retry_on_drift=True))
    assert len(upstream.seen) == 2
    assert stranger.values("X-Auth-Token") == [None]


def test_a_wrong_token_is_wrong() -> None:
    # The tests rely on it.
    assert wrong_token("alice") not in {source("alice").token(time.time() + 30 * n) for n in (-1, 0, 1)}
