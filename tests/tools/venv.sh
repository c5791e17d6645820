#!/bin/sh
# Makes the virtual environment of the tests' Python tools in target/venv, once for each version of
# requirements.txt, and prints the path of its interpreter.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=$root/target/venv
wanted=$root/tests/tools/requirements.txt
mkdir -p "$root/target"
# Tests run in parallel: one installs, the others wait.
exec 9>"$root/target/venv.lock"
flock 9
if ! cmp -s "$wanted" "$venv/installed.txt"; then
    rm -rf "$venv"
    python3 -m venv "$venv" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$wanted" >&2
    cp "$wanted" "$venv/installed.txt"
fi
echo "$venv/bin/python"
