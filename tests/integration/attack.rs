//! Attacks, as tables: what is required in words, the bytes sent to the real program, what the client
//! gets, and what reaches the upstream. A request is refused, or it arrives with nothing in it that
//! was not proven.
//!
//! Every table runs against one gate and one upstream, which writes down all that it gets. `evil` never
//! gets there, whatever a case expects, nor does a token.

mod credentials;
mod forwarding;
mod frames;
mod framing;
mod http2;
mod identity;
mod paths;
mod recorder;
mod rig;
mod targets;
