from __future__ import annotations

import pytest

from otpgate_client._repeat import is_same_server


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("http://a/x", "http://a/y?z", True),
        ("http://a/x", "http://A:80/y", True),
        ("https://a/x", "https://a:443/y", True),
        ("http://a:81/x", "http://a:81/y", True),
        ("http://[::1]:81/x", "http://[::1]:81/y", True),
        # To TLS from without, as servers do that want it.
        ("http://a/x", "https://a/x", True),
        ("https://a/x", "http://a/x", False),
        ("http://a:81/x", "https://a/x", False),
        ("http://a/x", "https://a:444/x", False),
        ("http://a/x", "http://a:81/x", False),
        ("http://a/x", "http://b/x", False),
        ("http://a/x", "http://a.b/x", False),
        ("http://a/x", "https://b/x", False),
        ("http://a/x", "ftp://a/x", False),
        ("http://a/x", "http:///x", False),
        ("http://a/x", "http://a:b/x", False),
        ("http://a/x", "/x", False),
        # What parsers of URLs read differently.
        ("http://a/x", "http://b@a/x", False),
        ("http://a/x", "http://a\\@b/x", False),
        ("http://a/x", "http://b\\@a/x", False),
        ("http://a/x", "http://a\t/x", False),
        ("http://a/x", " http://a/x", False),
    ],
)
def test_servers_are_told_apart(old: str, new: str, same: bool) -> None:
    assert is_same_server(old, new) is same
