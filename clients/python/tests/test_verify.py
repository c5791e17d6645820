from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Protocol

import httpx
import pytest
import requests

from otpgate_client import (
    AsyncVerifyClient,
    BadAnswerError,
    CredentialsError,
    InvalidError,
    OtpgateError,
    RefusedError,
    ThrottledError,
    TokenSource,
    UnavailableError,
    UnreachableError,
    VerifyClient,
)
from rig import SEEDS, Gate, Upstream, put_entries, source, wrong_token


class Verify(Protocol):
    def __call__(self, url: str, caller: TokenSource, name: str, realm: str, token: str, **how: Any) -> bool: ...


def standard(
    url: str,
    caller: TokenSource,
    name: str,
    realm: str,
    token: str,
    *,
    address: Optional[str] = None,
    **how: Any,
) -> bool:
    with VerifyClient(url, caller, **how) as client:
        return client.verify(name, realm, token, source=address)


def by_session(
    url: str,
    caller: TokenSource,
    name: str,
    realm: str,
    token: str,
    *,
    address: Optional[str] = None,
    ssl_context: Optional[ssl.SSLContext] = None,
    **how: Any,
) -> bool:
    with requests.Session() as session:
        session.trust_env = False
        with VerifyClient(url, caller, session=session, **how) as client:
            return client.verify(name, realm, token, source=address)


def asynchronous(
    url: str,
    caller: TokenSource,
    name: str,
    realm: str,
    token: str,
    *,
    address: Optional[str] = None,
    **how: Any,
) -> bool:
    async def verify() -> bool:
        async with AsyncVerifyClient(url, caller, **how) as client:
            return await client.verify(name, realm, token, source=address)

    return asyncio.run(verify())


@pytest.fixture(params=[standard, by_session, asynchronous])
def verify(request: pytest.FixtureRequest) -> Verify:
    chosen: Verify = request.param
    return chosen


@pytest.fixture(params=[standard, asynchronous])
def own_verify(request: pytest.FixtureRequest) -> Verify:
    """Those that make their own connections."""
    chosen: Verify = request.param
    return chosen


def test_right_tokens_are_right_and_others_wrong(gate: Gate, verify: Verify) -> None:
    caller = source("verifier")
    for url in (gate.api, f"{gate.api}/", f"{gate.api}/verify", f"{gate.api}/ungleichotp/verify/"):
        assert verify(url, caller, "alice", "shop", source("alice").token()) is True
    assert verify(gate.api, caller, "jürg", "büro", source("jürg").token()) is True
    for name, realm, token in (
        ("alice", "shop", wrong_token("alice")),
        ("alice", "lab", source("alice").token()),
        ("nobody", "shop", "123456"),
        # Of impossible form.
        ("alice", "shop", ""),
        ("alice", "shop", "0" * 129),
        ("", "shop", "123456"),
        ("a\ud800", "shop", "123456"),
        ("a\0", "shop", "123456"),
    ):
        assert verify(gate.api, caller, name, realm, token) is False, (name, realm, token)


def test_our_own_credentials_are_told_apart(gate: Gate, verify: Verify) -> None:
    token = source("alice").token()
    for caller in (
        TokenSource("verifier", "ungleich-auth", SEEDS["alice"]),
        TokenSource("nobody", "ungleich-auth", SEEDS["alice"]),
        source("verifier", clock=lambda: time.time() - 300),
    ):
        with pytest.raises(CredentialsError, match="Incorrect authentication credentials") as caught:
            verify(gate.api, caller, "alice", "shop", token)
        assert caught.value.status == 403
        assert caught.value.request_id is not None
        assert len(caught.value.request_id) == 32
    # What the server cannot tell apart, nobody can.
    assert verify(gate.api, source("alice"), "alice", "shop", token) is False


def test_the_address_of_the_caller_is_told(own_gate: Gate, verify: Verify) -> None:
    caller, wrong = source("verifier"), wrong_token("alice")
    with pytest.raises(InvalidError, match="source: Enter a valid"):
        verify(own_gate.api, caller, "alice", "shop", wrong, address="here")
    with pytest.raises(ThrottledError) as caught:  # noqa: PT012 (which one it is, is the server's)
        for _ in range(20):
            assert verify(own_gate.api, caller, "alice", "shop", wrong, address="192.0.2.1") is False
    assert caught.value.status == 429
    assert caught.value.retry_after is not None
    assert 1 <= caught.value.retry_after <= 600
    # Only whoever guesses has to wait.
    right = source("alice").token()
    assert verify(own_gate.api, caller, "alice", "shop", right, address="192.0.2.2") is True


def test_a_gate_without_its_store_is_unavailable(tmp_path: Path, verify: Verify) -> None:
    # Nothing listens on that port.
    environment = {"OTPGATE_STORE__URL": "redis://127.0.0.1:1", "OTPGATE_STORE__SEALING": "off"}
    gate = Gate(tmp_path, "", **environment)
    try:
        with pytest.raises(UnavailableError, match="not available right now") as caught:
            verify(gate.api, source("verifier"), "alice", "shop", "123456")
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
    finally:
        gate.stop()


def test_what_cannot_be_reached_is_no_answer(tmp_path: Path, verify: Verify) -> None:
    with pytest.raises(UnreachableError):
        verify("http://127.0.0.1:1", source("verifier"), "alice", "shop", "123456")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UnreachableError):
            verify(url, source("verifier"), "alice", "shop", "123456", timeout=0.05)


@pytest.mark.parametrize(
    ("status", "headers", "body", "error"),
    [
        (200, {}, b'{"status":"NO"}', BadAnswerError),
        (200, {}, b"[]", BadAnswerError),
        (200, {}, b"<html>", BadAnswerError),
        (200, {}, b'{"status":"OK"}' + b" " * (1 << 20), BadAnswerError),
        (201, {}, b'{"status":"OK"}', BadAnswerError),
        (302, {"Location": "/"}, b"", BadAnswerError),
        (400, {}, b'{"detail":"JSON parse error"}', InvalidError),
        (400, {}, b"{}", InvalidError),
        (400, {}, b'{"auth_name":["?"]}', InvalidError),
        (401, {}, b"", CredentialsError),
        # Not the words of this API, as of a proxy on the way.
        (403, {}, b"<html>", RefusedError),
        (403, {}, b'{"detail":"Requests of foreign pages are refused."}', RefusedError),
        (403, {}, b'["You do not have permission to perform this action."]', RefusedError),
        (429, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, b"", ThrottledError),
        (500, {}, b'{"detail":"\\u001b[2J"}', RefusedError),
        (502, {}, b"", RefusedError),
    ],
)
def test_other_answers_are_never_a_yes(
    upstream: Upstream,
    verify: Verify,
    status: int,
    headers: dict[str, str],
    body: bytes,
    error: type[OtpgateError],
) -> None:
    upstream.script = [(status, headers, body)]
    with pytest.raises(OtpgateError) as caught:
        verify(upstream.base, source("verifier"), "alice", "shop", "123456")
    assert type(caught.value) is error
    assert "\x1b" not in str(caught.value)
    # Redirects are not followed.
    assert len(upstream.seen) == 1


def test_answers_that_break_off_are_none(own_verify: Verify) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"status":"OK"}')

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UnreachableError):
            own_verify(url, source("verifier"), "alice", "shop", "123456")
        thread.join()


def test_what_is_sent_is_what_ungleich_otp_reads(upstream: Upstream, verify: Verify) -> None:
    upstream.script = [(200, {}, b'{"status":"OK"}')]
    moment = source("verifier", clock=lambda: 1_800_000_000)
    assert verify(upstream.base, moment, "jürg", "büro", "123456") is True
    method, path, headers, body = upstream.seen[0]
    assert (method, path) == ("POST", "/ungleichotp/verify/")
    assert {name.lower(): value for name, value in headers}["content-type"] == "application/json"
    assert json.loads(body) == {
        "auth_name": "verifier",
        "auth_realm": "ungleich-auth",
        "auth_token": moment.token(),
        "name": "jürg",
        "realm": "büro",
        "token": "123456",
    }


def test_unix_sockets(gate: Gate, own_verify: Verify) -> None:
    who = (source("verifier"), "alice", "shop")
    assert own_verify(gate.api_socket, *who, source("alice").token()) is True
    assert own_verify(gate.api_socket, *who, wrong_token("alice")) is False
    with pytest.raises(UnreachableError):
        own_verify(gate.api_socket + "x", *who, "123456")
    with pytest.raises(ValueError, match="Unix sockets"):
        VerifyClient(gate.api_socket, source("verifier"), session=requests.Session())


@pytest.fixture(scope="module")
def tls_gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gate, ssl.SSLContext]]:
    folder = tmp_path_factory.mktemp("tls")
    put_entries(folder)
    subject = ["-subj", "/CN=gate", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
    ]
    files = ["-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"]
    subprocess.run([*made, *subject, *files], check=True, capture_output=True)
    settings = f'[api]\ntls_cert_file = "{folder}/cert.pem"\ntls_key_file = "{folder}/key.pem"\n'
    gate = Gate(folder, settings)
    try:
        yield gate.ready(), ssl.create_default_context(cafile=f"{folder}/cert.pem")
    finally:
        gate.stop()


def test_certificates_are_checked(tls_gate: tuple[Gate, ssl.SSLContext], own_verify: Verify) -> None:
    gate, trusted = tls_gate
    url = gate.api.replace("http:", "https:")
    who = ("alice", "shop", source("alice").token())
    assert own_verify(url, source("verifier"), *who, ssl_context=trusted) is True
    with pytest.raises(UnreachableError, match=r"(?i)certificate"):
        own_verify(url, source("verifier"), *who)
    with pytest.raises(UnreachableError, match=r"(?i)certificate|hostname"):
        own_verify(url.replace("127.0.0.1", "localhost"), source("verifier"), *who, ssl_context=trusted)


def test_connections_are_used_again_while_they_are_good(upstream: Upstream) -> None:
    with VerifyClient(upstream.base, source("verifier")) as client:
        for _ in range(3):
            upstream.script = [(200, {}, b'{"status":"OK"}')]
            assert client.verify("alice", "shop", "123456") is True
        assert upstream.accepted == 1
        # The server closes after this one; the next call must not stumble over it.
        upstream.script = [(200, {"Connection": "close"}, b'{"status":"OK"}')]
        assert client.verify("alice", "shop", "123456") is True
        upstream.hang_up()
        upstream.script = [(200, {}, b'{"status":"OK"}')]
        assert client.verify("alice", "shop", "123456") is True
        assert upstream.accepted == 2
        # It closes without a word.
        upstream.hang_up()
        upstream.script = [(200, {}, b'{"status":"OK"}')]
        assert client.verify("alice", "shop", "123456") is True
        assert upstream.accepted == 3


def test_threads_may_share_a_client(gate: Gate) -> None:
    wrong: list[object] = []
    with VerifyClient(gate.api, source("verifier")) as client:

        def call(right: bool) -> None:
            for _ in range(20):
                token = source("alice").token() if right else wrong_token("alice")
                if client.verify("alice", "shop", token) is not right:
                    wrong.append(token)

        threads = [threading.Thread(target=call, args=(n % 2 == 0,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_clients_of_ours_are_used_without_their_credentials(gate: Gate, upstream: Upstream) -> None:
    async def verify(url: str) -> bool:
        async with httpx.AsyncClient(auth=("a", "b"), follow_redirects=True, trust_env=False) as ours:
            client = AsyncVerifyClient(url, source("verifier"), client=ours)
            right = await client.verify("alice", "shop", source("alice").token())
            await client.aclose()
            assert not ours.is_closed
            return right

    assert asyncio.run(verify(gate.api)) is True
    upstream.script = [(302, {"Location": "/"}, b"")]
    with pytest.raises(BadAnswerError):
        asyncio.run(verify(upstream.base))
    assert upstream.values("Authorization") == [None]


def test_urls_must_be_those_of_servers() -> None:
    for bad in (
        "",
        "otp.example",
        "ftp://otp.example",
        "http://",
        "http://a?b=c",
        "http://a#b",
        "http://a:b@c",
        "http://a:x",
    ):
        with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
            VerifyClient(bad, source("verifier"))
    with pytest.raises(TypeError):
        VerifyClient("http://a", source("verifier")).verify("a", "b", 123456)  # type: ignore[arg-type]


def test_nothing_prints_the_seed(gate: Gate) -> None:
    client = VerifyClient(gate.api, source("verifier"))
    assert repr(client) == f"VerifyClient('{gate.api}/', TokenSource('verifier', 'ungleich-auth', [seed]))"
