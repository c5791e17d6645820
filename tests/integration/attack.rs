//! Attacks, as tables: what is required in words, the bytes sent to the real program, what the client
//! gets, and what reaches the upstream. A request is refused, or it arrives with nothing in it that
//! was not proven.
//!
//! What others got wrong, and where it stands:
//!
//! | advisories | tables |
//! |---|---|
//! | aliases of headers: CVE-2025-64484, CVE-2026-54763, GHSA-f59h-q822-g45g | `credentials`, `identity`, `http2` |
//! | identity not removed where none is set: GHSA-7r4p-vjf4-gxv4 | `identity`: public and reported routes |
//! | duplicates: CVE-2021-32777, CVE-2026-26308 | `credentials` |
//! | white space in names: ls-hpack#22 | `http2`; `framing`: before the colon |
//! | nominations: CVE-2021-32813, GHSA-92mv-8f8w-wq52, CVE-2021-33197, CVE-2022-31813 | `identity` |
//! | paths: CVE-2019-9901, CVE-2021-29492, CVE-2021-32779, GHSA-p224-6x5r-fjpm, CVE-2025-32431, GHSA-vrch-868g-9jx5, CVE-2025-66490, CVE-2026-34908, CVE-2023-33189, CVE-2026-41059, GHSA-7rh7-c77v-6434 | `paths`: `DETOURS` |
//! | case: CVE-2026-27587, CVE-2026-27588 | `paths`: `DETOURS`, similar paths |
//! | no slash in front: CVE-2026-33186 | `targets`, `http2` |
//! | forwarded headers: CVE-2026-40575, CVE-2026-39858, CVE-2026-35051, CVE-2023-27487, CVE-2024-45806 | `forwarding` |
//! | malformed, therefore let through: CVE-2021-32637, CVE-2026-25748, CVE-2023-27488 | `credentials`, `paths` |
//! | line ends of chunks: CVE-2025-55315 | `framing` |
//! | trailers: CVE-2013-5704, sanic#3164 | `identity`, `http2` |
//! | bodies of upgrades: CVE-2026-58055, CVE-2026-2833 | `identity` |
//! | fields of HTTP/2 in HTTP/1: CVE-2023-27491 | `http2` |
//! | h2c: yarp#877 | `http2` |
//! | the store away: fail open | `credentials`: all families |
//!
//! Every table runs against one gate and one upstream, which writes down all that it gets. `evil` never
//! gets there, whatever a case expects, nor does a token.

mod credentials;
mod forwarding;
pub(crate) mod frames;
mod framing;
mod http2;
mod identity;
pub(crate) mod paths;
pub(crate) mod recorder;
pub(crate) mod rig;
mod targets;
