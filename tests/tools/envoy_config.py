"""Reads an Envoy configuration as Envoy does: by the published messages, extensions too."""
import sys

import yaml
from envoy.config.bootstrap.v3 import bootstrap_pb2
# What a configuration names by its type must be known.
from envoy.extensions.filters.http.ext_authz.v3 import ext_authz_pb2  # noqa: F401
from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2  # noqa: F401
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2  # noqa: F401
from google.protobuf import json_format

for path in sys.argv[1:]:
    with open(path) as file:
        json_format.ParseDict(yaml.safe_load(file), bootstrap_pb2.Bootstrap())
