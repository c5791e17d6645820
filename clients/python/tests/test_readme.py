from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from otpgate_client import AdminClient
from rig import SEEDS, Gate, Upstream, source

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory, gate: Gate) -> Path:
    """A folder with the files that otpgate's README leaves."""
    folder = tmp_path_factory.mktemp("pasted")
    (folder / "admin.seed").write_text(SEEDS["admin"] + "\n")
    with AdminClient(gate.api, source("admin")) as admin:
        for name, realm in (("alice", "ops"), ("shop", "ungleich-auth")):
            entry = admin.create(name, realm)
            assert entry.seed is not None
            (folder / f"{name}.seed").write_text(entry.seed + "\n")
    return folder


def paste(snippet: str, folder: Path, gate: Gate) -> str:
    for address, real in (("http://127.0.0.1:8080", gate.proxy), ("http://127.0.0.1:8081", gate.api)):
        snippet = snippet.replace(address, real)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_there_are_three_snippets() -> None:
    assert len(SNIPPETS) == 3


def test_a_call(pasted: Path, gate: Gate, upstream: Upstream) -> None:
    assert paste(SNIPPETS[0], pasted, gate) == "200\n"
    assert upstream.seen[0][1] == "/orders"
    assert upstream.values("X-Auth-Name") == ["alice"]


def test_a_verification(pasted: Path, gate: Gate) -> None:
    assert paste(SNIPPETS[1], pasted, gate) == "it is alice\n"


def test_management(pasted: Path, gate: Gate) -> None:
    printed = paste(SNIPPETS[2], pasted, gate)
    assert re.search(r"^\d+ printer office$", printed, re.MULTILINE), printed
    assert "3rd floor" in printed
    assert not re.search("[A-Z2-7]{32}", printed), printed


def test_the_licence_is_the_repositorys() -> None:
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "../../LICENSE").read_bytes()


def test_nothing_is_needed_but_python() -> None:
    # -S: no packages that are installed. The others are asked for when they are used.
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "src")!r})
import otpgate_client
assert otpgate_client.TokenSource("a", "b", "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ").token(59) == "287082"
for name in ("RequestsAuth", "HttpxAuth", "AsyncVerifyClient"):
    try:
        getattr(otpgate_client, name)
        raise SystemExit(name)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-B", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "RequestsAuth needs requests: pip install 'otpgate-client[requests]'",
        "HttpxAuth needs httpx: pip install 'otpgate-client[httpx]'",
        "AsyncVerifyClient needs httpx: pip install 'otpgate-client[httpx]'",
    ]
