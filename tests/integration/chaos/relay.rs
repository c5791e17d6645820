//! A relay between gates and their store, for networks that lose packets or refuse connections.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

/// What the relay does with connections.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Passes everything on.
    Open,
    /// Swallows everything, without a word to either side, until it is open again.
    Silent,
    /// Ends new connections at once; what is connected stays.
    Refusing,
}

type Switch = Arc<(Mutex<State>, Condvar)>;

/// A relay to one port.
pub(super) struct Relay {
    pub(super) port: u16,
    switch: Switch,
}

impl Relay {
    pub(super) fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let switch: Switch = Arc::new((Mutex::new(State::Open), Condvar::new()));
        let relay =
            Self { port: listener.local_addr().expect("bound").port(), switch: switch.clone() };
        std::thread::spawn(move || {
            // Connections that come while it is silent wait in the kernel's queue.
            while until_heard(&switch) {
                let Ok((client, _)) = listener.accept() else { return };
                until_heard(&switch);
                if *switch.0.lock().expect("no panic") == State::Refusing {
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                for stream in [&client, &server] {
                    stream.set_nodelay(true).expect("a socket");
                }
                let (from, to) = (client.try_clone(), server.try_clone());
                let (from, to) = (from.expect("a socket"), to.expect("a socket"));
                let there = switch.clone();
                std::thread::spawn(move || pass(from, to, &there));
                let back = switch.clone();
                std::thread::spawn(move || pass(server, client, &back));
            }
        });
        relay
    }

    pub(super) fn open(&self) {
        self.set(State::Open);
    }

    /// As if all packets were dropped.
    pub(super) fn silence(&self) {
        self.set(State::Silent);
    }

    pub(super) fn refuse(&self) {
        self.set(State::Refusing);
    }

    fn set(&self, state: State) {
        *self.switch.0.lock().expect("no panic") = state;
        self.switch.1.notify_all();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.open();
    }
}

/// Waits as long as everything is swallowed.
fn until_heard(switch: &Switch) -> bool {
    let state = switch.0.lock().expect("no panic");
    let is_silent = |state: &mut State| *state == State::Silent;
    switch.1.wait_while(state, is_silent).is_ok()
}

fn pass(mut from: TcpStream, mut to: TcpStream, switch: &Switch) {
    let mut buffer = [0; 65536];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if !until_heard(switch) || to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    // The end of a connection is a packet, too.
    until_heard(switch);
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
