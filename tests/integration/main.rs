//! Integration tests: one binary, so that it links once.

mod peers;
mod proxy_auth;
mod proxy_bounds;
mod proxy_smuggling;
mod proxy_streams;
mod proxy_upstreams;
