"""Starts the real program and what it protects."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional
from urllib.parse import parse_qs, urlsplit

from otpgate_client import TokenSource

PATIENCE = 20.0
SEEDS = {
    "admin": "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP",
    "verifier": "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ",
    "alice": "MFRGGZDFMZTWQ2LKMFRGGZDFMZTWQ2LK",
    "jürg": "NBSWY3DPO5XXE3DENBSWY3DPO5XXE3DE",
}
REALMS = {"admin": "ungleich-admin", "verifier": "ungleich-auth", "alice": "shop", "jürg": "büro"}


def source(who: str, **settings: Any) -> TokenSource:
    return TokenSource(who, REALMS[who], SEEDS[who], **settings)


def wrong_token(who: str) -> str:
    now = time.time()
    good = {source(who).token(now + 30 * n) for n in range(-4, 5)}
    return next(token for token in (f"{n:06}" for n in range(918273, 10**6)) if token not in good)


def program() -> str:
    path = os.environ.get("OTPGATE_BIN")
    assert path, "OTPGATE_BIN must name the otpgate program"
    return path


def run(*args: str) -> str:
    done = subprocess.run(
        [program(), *args], env={}, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Gate:
    """A running gate, on free ports; `settings` may say otherwise of the API."""

    def __init__(self, folder: Path, settings: str = "", **environment: str) -> None:
        config = folder / "otpgate.toml"
        config.write_text(settings)
        listen = {f"OTPGATE_{name}__LISTEN": "127.0.0.1:0" for name in ("PROXY", "API", "OPS")}
        if "listen" in settings:
            # The environment would count.
            del listen["OTPGATE_API__LISTEN"]
        self.child = subprocess.Popen(
            [program(), "serve", "--log-format", "json", "--config", str(config)],
            env={**listen, "OTPGATE_STORE__URL": f"sqlite:{folder}/otpgate.db", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        serving: queue.Queue[Optional[dict[str, str]]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(serving,))
        self._reader.start()
        line = serving.get(timeout=PATIENCE)
        assert line is not None, self.log
        self.proxy, self.api, self.ops = (f"http://{line[key].split(', ')[0]}" for key in ("proxy", "api", "ops"))
        self.api_socket = line["api"].split(", ")[-1]

    def _read(self, serving: queue.Queue[Optional[dict[str, str]]]) -> None:
        assert self.child.stderr is not None
        for text in self.child.stderr:
            self.log.append(text)
            if '"message":"serving"' in text:
                serving.put(json.loads(text))
        serving.put(None)

    def ready(self) -> Gate:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"{self.ops}/readyz", timeout=PATIENCE):
                    return self
            except urllib.error.URLError:
                assert time.monotonic() < deadline, self.log
                time.sleep(0.005)

    def stop(self) -> None:
        self.child.kill()
        self.child.wait()
        self._reader.join()
        assert self.child.stderr is not None
        self.child.stderr.close()


class Upstream:
    """Tells what it was sent; redirects, refuses and fails where the path says so."""

    def __init__(self) -> None:
        self.forget()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # One write an answer: no waiting for acknowledgements.
            wbufsize = -1

            def setup(self) -> None:
                outer.accepted += 1
                outer._connections.append(self.request)
                super().setup()

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.seen.append((self.command, self.path, self.headers.items(), body))
                path = urlsplit(self.path)
                asked = {key: values[0] for key, values in parse_qs(path.query).items()}
                status = int(asked.get("status", 200))
                if path.path == "/flaky" and outer.failures > 0:
                    outer.failures -= 1
                    status = 503
                headers = {}
                if "to" in asked:
                    headers["Location"] = asked["to"]
                if "challenge" in asked:
                    headers["WWW-Authenticate"] = asked["challenge"]
                if path.path == "/loop":
                    status, headers = 302, {"Location": "/loop"}
                content = json.dumps([self.command, self.path]).encode()
                if outer.script:
                    status, headers, content = outer.script.pop(0)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer  # noqa: N815

            def date_time_string(self, timestamp: Optional[float] = None) -> str:
                return super().date_time_string(timestamp or outer.time)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_port}"
        self.base = f"http://{self.address}"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def forget(self) -> None:
        """As new."""
        self.seen: list[tuple[str, str, list[tuple[str, str]], bytes]] = []
        self.failures = 0
        self.accepted = 0
        # The Unix time that answers tell, instead of now.
        self.time: Optional[float] = None
        self._connections: list[socket.socket] = []
        # Statuses, headers and bodies of the next answers.
        self.script: list[tuple[int, dict[str, str], bytes]] = []

    def hang_up(self) -> None:
        """Closes all connections, as callers can see at once: it is all on one machine."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def values(self, header: str) -> list[Optional[str]]:
        """What it was sent under that name, request by request."""
        return [dict(map(_lower, headers)).get(header.lower()) for _, _, headers, _ in self.seen]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


def _lower(header: tuple[str, str]) -> tuple[str, str]:
    return header[0].lower(), header[1]


def put_entries(folder: Path) -> None:
    """Makes a store of the entries above, as ungleich-otp dumps them."""
    dump = [
        {
            "model": "otpauth.otpseed",
            "pk": number,
            "fields": {"name": who, "realm": REALMS[who], "seed": seed},
        }
        for number, (who, seed) in enumerate(SEEDS.items(), 1)
    ]
    (folder / "dump.json").write_text(json.dumps(dump))
    run("store", "import", "--json", "--store", f"sqlite:{folder}/otpgate.db", str(folder / "dump.json"))
