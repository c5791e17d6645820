from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rig import Gate, Upstream, put_entries


@pytest.fixture(scope="session")
def _upstream() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.stop()


@pytest.fixture
def upstream(_upstream: Upstream) -> Upstream:
    _upstream.forget()
    return _upstream


@pytest.fixture
def stranger() -> Iterator[Upstream]:
    """A server that must get no credentials."""
    server = Upstream()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def gate(tmp_path_factory: pytest.TempPathFactory, _upstream: Upstream) -> Iterator[Gate]:
    """In front of `upstream`; wrong tokens make nobody wait."""
    folder = tmp_path_factory.mktemp("gate")
    put_entries(folder)
    settings = f"""
[proxy]
upstream = "{_upstream.address}"
[api]
listen = ["127.0.0.1:0", "unix:{folder}/api.sock"]
[throttle]
enabled = false
"""
    running = Gate(folder, settings)
    try:
        yield running.ready()
    finally:
        running.stop()


@pytest.fixture
def own_gate(tmp_path: Path) -> Iterator[Gate]:
    """With settings as they are by default, and entries of its own."""
    put_entries(tmp_path)
    running = Gate(tmp_path)
    try:
        yield running.ready()
    finally:
        running.stop()
