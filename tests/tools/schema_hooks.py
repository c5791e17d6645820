"""Gives every generated request a valid triple, and keeps the gate's own entries from harm."""
import os
import time

import pyotp
import schemathesis

# Tokens of entries 1 to 3 prove the callers of this very run.
FIRST_FREE_ID = 4
SECRETS = {"admin": os.environ["ADMIN_SEED"], "auth": os.environ["AUTH_SEED"]}


def triple(case):
    caller = "auth" if case.operation.path.endswith(("/verify", "/verify/")) else "admin"
    token = pyotp.TOTP(SECRETS[caller]).at(int(time.time()))
    return {"X-Auth-Name": caller, "X-Auth-Realm": "ungleich-" + caller, "X-Auth-Token": token}


@schemathesis.auth()
class Triple:
    def get(self, case, context):
        return triple(case)

    def set(self, case, data, context):
        case.headers = {**(case.headers or {}), **data}


@schemathesis.hook
def before_call(context, case, **kwargs):
    # A generated triple in the body would count instead of the headers.
    if isinstance(case.body, dict):
        for field in ("auth_name", "auth_realm", "auth_token"):
            case.body.pop(field, None)
    parameters = case.path_parameters or {}
    if case.method != "GET" and str(parameters.get("id")).strip("+0") in ("1", "2", "3"):
        parameters["id"] = FIRST_FREE_ID
