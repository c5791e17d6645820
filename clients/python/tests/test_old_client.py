from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rig import REALMS, SEEDS, Gate, source, wrong_token

UNPROVEN = '403 {"detail":"Incorrect authentication credentials."}'
DENIED = '403 {"detail":"You do not have permission to perform this action."}'


@pytest.mark.parametrize(
    ("caller", "caller_seed", "right", "answer"),
    [
        ("verifier", "verifier", True, '200 {"status":"OK"}'),
        ("verifier", "verifier", False, DENIED),
        ("verifier", "alice", True, UNPROVEN),
        # Of no realm that may verify.
        ("alice", "alice", True, DENIED),
    ],
)
def test_clients_of_ungleich_otp_need_no_change(
    gate: Gate, caller: str, caller_seed: str, right: bool, answer: str
) -> None:
    token = source("alice").token() if right else wrong_token("alice")
    who = [caller, REALMS[caller], SEEDS[caller_seed]]
    program = Path(__file__).with_name("old_client.py")
    done = subprocess.run(
        [sys.executable, str(program), f"{gate.api}/ungleichotp/verify/", *who, "alice", "shop", token],
        env={},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == answer, done.stderr
