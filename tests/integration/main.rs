//! Integration tests: real sockets, real servers, the real program. One binary, one module a feature.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

#[macro_use]
mod store_rig;

mod alike;
mod api;
mod api_client;
mod api_harness;
mod api_logs;
mod api_schema;
mod api_tls;
mod api_wire;
mod attack;
mod audit;
mod authz;
mod chaos;
mod cli;
mod cli_help;
mod client_list;
mod conformance;
mod demo;
mod deploy;
mod directory_follow;
mod directory_hold;
mod dns;
mod docs;
mod gate;
mod guessing;
mod hardening;
mod harness;
mod layering;
mod leaks;
mod log_lines;
mod memory;
mod net_floods;
mod net_paces;
mod net_sources;
mod net_tls;
mod net_trailers;
mod one_time;
mod ops;
mod peers;
mod progress;
mod proxy_auth;
mod proxy_bounds;
mod proxy_streams;
mod proxy_upgrades;
mod proxy_upstreams;
mod python_client;
mod redis_server;
mod rotation;
mod serve;
mod store_contract;
mod store_export;
mod store_histories;
mod store_ledger;
mod store_redis;
mod store_redis_peers;
mod store_redis_rights;
mod store_redis_topologies;
mod store_redis_writers;
mod store_rekey;
mod store_sqlite;
mod store_verify;
mod throttle;
