from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, Callable
from urllib.parse import quote

import httpx
import pytest

from otpgate_client import HttpxAuth, TokenSource
from rig import SEEDS, Gate, Upstream, source

Send = Callable[..., httpx.Response]


def blocking(method: str, url: str, *, auth: httpx.Auth, follow: bool = True, **how: Any) -> httpx.Response:
    with httpx.Client(trust_env=False, auth=auth, follow_redirects=follow) as client:
        return client.request(method, url, **how)


def asynchronous(method: str, url: str, *, auth: httpx.Auth, follow: bool = True, **how: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, auth=auth, follow_redirects=follow) as client:
            return await client.request(method, url, **how)

    return asyncio.run(send())


@pytest.fixture(params=[blocking, asynchronous])
def send(request: pytest.FixtureRequest) -> Send:
    chosen: Send = request.param
    return chosen


def test_every_request_is_proven(gate: Gate, upstream: Upstream, send: Send) -> None:
    for who in ("alice", "jürg"):
        extra = {"x-auth-token": "000000", "X-AUTH-NAME": "mallory"}
        auth = HttpxAuth(source(who))
        answer = send("POST", f"{gate.proxy}/orders", auth=auth, content=b"body", headers=extra)
        assert answer.status_code == 200, answer.text
        assert upstream.seen[-1][3] == b"body"
        assert upstream.values("X-Auth-Name")[-1] == who.encode().decode("latin-1")
        assert upstream.values("X-Auth-Token")[-1] is None
    wrong = HttpxAuth(TokenSource("alice", "shop", SEEDS["admin"]))
    assert send("GET", gate.proxy, auth=wrong).status_code == 401
    assert len(upstream.seen) == 2


def test_requests_have_the_token_of_their_moment(upstream: Upstream) -> None:
    times = iter([59.0, 1111111109.0])
    auth = HttpxAuth(TokenSource("a", "b", "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ", clock=lambda: next(times)))
    with httpx.Client(trust_env=False, auth=auth) as client:
        request = client.build_request("GET", upstream.base)
        client.send(request)
        client.send(request)
    assert upstream.values("X-Auth-Token") == ["287082", "081804"]
    assert all(len(headers) == len(dict(headers)) for _, _, headers, _ in upstream.seen)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_within_the_gate_are_proven(gate: Gate, upstream: Upstream, send: Send, status: int) -> None:
    again = quote(f"/b?status={status}&to=/c", safe="")
    url = f"{gate.proxy}/a?status={status}&to={again}"
    answer = send("POST", url, auth=HttpxAuth(source("alice")), content=b"body")
    assert answer.status_code == 200
    assert upstream.values("X-Auth-Name") == ["alice"] * 3
    if status in (307, 308):
        assert [body for *_, body in upstream.seen] == [b"body"] * 3


def test_redirects_without_end_have_one(gate: Gate, upstream: Upstream, send: Send) -> None:
    with pytest.raises(httpx.TooManyRedirects):
        send("GET", f"{gate.proxy}/a?status=302&to=/loop", auth=HttpxAuth(source("alice")))
    assert len(upstream.seen) < 50


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("form", ["http://{0}/x", "//{0}/x", "http://alice:b@{0}/x", "HTTP://{0}"])
def test_other_servers_get_nothing(
    upstream: Upstream, stranger: Upstream, send: Send, status: int, form: str
) -> None:
    # Not even if it asks for them as a gate does.
    asking = "?status=401&challenge=" + quote('OTP realm="x"', safe="")
    to = quote(form.format(stranger.address) + asking, safe="")
    auth = HttpxAuth(source("alice", clock=lambda: time.time() - 300), retry_on_drift=True)
    send("GET", f"{upstream.base}/a?status={status}&to={to}", auth=auth)
    assert upstream.values("X-Auth-Name") == ["alice"]
    assert len(stranger.seen) == 1
    for header in source("alice").header_names:
        assert stranger.values(header) == [None]


def test_nor_do_they_get_any_on_the_way_back(gate: Gate, stranger: Upstream, send: Send) -> None:
    back = quote(f"{gate.proxy}/secret", safe="")
    away = quote(f"{stranger.base}/x?status=302&to={back}", safe="")
    answer = send("GET", f"{gate.proxy}/a?status=302&to={away}", auth=HttpxAuth(source("alice")))
    assert answer.status_code == 401
    assert str(answer.url).endswith("/secret")
    assert stranger.values("X-Auth-Token") == [None]


def test_redirects_that_are_followed_by_hand_are_bare_too(upstream: Upstream, stranger: Upstream) -> None:
    url = f"{upstream.base}/a?status=302&to={quote(stranger.base, safe='')}"
    answer = blocking("GET", url, auth=HttpxAuth(source("alice")), follow=False)
    assert answer.next_request is not None
    with httpx.Client(trust_env=False) as client:
        client.send(answer.next_request)
    assert stranger.values("X-Auth-Token") == [None]


def test_a_drifting_clock_costs_one_more_request(gate: Gate, upstream: Upstream, send: Send) -> None:
    late = source("alice", clock=lambda: time.time() - 300)
    assert send("GET", gate.proxy, auth=HttpxAuth(late)).status_code == 401
    assert upstream.seen == []
    auth = HttpxAuth(late, retry_on_drift=True)
    assert send("POST", f"{gate.proxy}/a", auth=auth, content=b"body").status_code == 200
    assert [body for *_, body in upstream.seen] == [b"body"]


def test_a_stream_is_not_sent_again(gate: Gate, upstream: Upstream) -> None:
    def body() -> Iterator[bytes]:
        yield b"body"

    late = source("alice", clock=lambda: time.time() - 300)
    auth = HttpxAuth(late, retry_on_drift=True)
    assert blocking("POST", gate.proxy, auth=auth, content=body()).status_code == 401
    assert upstream.seen == []


def test_nothing_is_repeated_that_cannot_be_cured(upstream: Upstream, send: Send) -> None:
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
        (late, url + challenge, 2),
    ):
        upstream.seen.clear()
        send("GET", target, auth=HttpxAuth(settings, retry_on_drift=True))
        assert len(upstream.seen) == requested, target


def test_printed_requests_show_no_token(upstream: Upstream) -> None:
    moment = TokenSource("alice", "shop", SEEDS["alice"], clock=lambda: 59)
    answer = blocking("GET", upstream.base, auth=HttpxAuth(moment))
    assert upstream.values("X-Auth-Token") == [moment.token()]
    assert moment.token() not in repr(answer.request.headers)
    assert "x-auth-token" not in answer.request.headers
