"""Gives every generated request a valid triple, and something that is there to work on."""
import itertools
import os
import time
import uuid

import pyotp
import schemathesis

# Entries that the test puts there for requests to find, change and delete.
POOL_START, POOL_SIZE = 1000, 500
SEEDS = {name: os.environ[name.upper() + "_SEED"] for name in ("admin", "verifier")}
REALMS = {"admin": "ungleich-admin", "verifier": "ungleich-auth"}
AUTH_FIELDS = ("auth_name", "auth_realm", "auth_token")
counter = itertools.count()


def token(name):
    return pyotp.TOTP(SEEDS[name]).at(int(time.time()))


def is_label(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) or isinstance(value, str) and value.strip()


def is_verify(case):
    return case.operation.path.rstrip("/").endswith("/verify")


@schemathesis.auth(refresh_interval=None)
class Triple:
    def get(self, case, context):
        caller = "verifier" if is_verify(case) else "admin"
        return {"X-Auth-Name": caller, "X-Auth-Realm": REALMS[caller], "X-Auth-Token": token(caller)}

    def set(self, case, data, context):
        case.headers = {**(case.headers or {}), **data}


@schemathesis.hook
def before_call(context, case, **kwargs):
    number = next(counter)
    parameters = case.path_parameters or {}
    if str(parameters.get("id", "")).lstrip("+").isdecimal():
        # Never the callers' own entries.
        parameters["id"] = POOL_START + int(parameters["id"]) % POOL_SIZE
    body = case.body
    if not isinstance(body, dict):
        return
    # A generated triple in the body would count instead of the headers.
    for field in AUTH_FIELDS:
        body.pop(field, None)
    if is_verify(case):
        # Half of what is to be verified is right.
        if number % 2 and all(isinstance(body.get(f), str) for f in ("name", "realm", "token")):
            body.update(name="verifier", realm="ungleich-auth", token=token("verifier"))
    elif ("realm" in body or case.method == "PATCH") and is_label(body.get("realm", "r")):
        # No two entries may have one name in one realm, which a schema cannot say.
        body["realm"] = uuid.uuid4().hex
