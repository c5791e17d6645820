"""A client of ungleich-otp's protocol, as services have it that never heard of otpgate.

It knows of the protocol only what ungleich-otp says: a JSON object with the own triple and the one to be
verified, posted to /ungleichotp/verify/; 200 is yes, 403 is no. Not a line of otpgate_client is used.
"""

import sys

import pyotp
import requests


class Client:
    def __init__(self, server, name, realm, seed):
        self.server, self.name, self.realm, self.seed = server, name, realm, seed

    def verify(self, name, realm, token):
        own = {"auth_name": self.name, "auth_realm": self.realm, "auth_token": pyotp.TOTP(self.seed).now()}
        return requests.post(self.server, json={**own, "name": name, "realm": realm, "token": token}, timeout=20)


if __name__ == "__main__":
    server, own_name, own_realm, own_seed, name, realm, token = sys.argv[1:]
    answer = Client(server, own_name, own_realm, own_seed).verify(name, realm, token)
    print(answer.status_code, answer.text)
    sys.exit(0 if answer.status_code == 200 else 1)
