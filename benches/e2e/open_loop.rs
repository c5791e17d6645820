//! The child that sends requests on a constant schedule and times each from when it was due, so that a slow
//! answer counts for all requests that it delays (no coordinated omission).
//!
//! A thread for each connection, since sleeping threads wake within microseconds; timers of event loops
//! round to milliseconds.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::load::Load;
use crate::process::now;

/// The child's name.
pub(crate) const CHILD: &str = "open-loop";
/// Where it finds its [`Task`].
pub(crate) const TASK: &str = "BENCH_OPEN_LOOP";

/// Until all connections are there.
const HEAD_START: Duration = Duration::from_millis(50);
/// A connection that is so late has more than it can bear: it stops.
const MAX_LATE: Duration = Duration::from_secs(2);
/// Requests that are sent but not counted, in tenths of all.
const WARM_UP_TENTHS: u64 = 1;

/// What it is to send.
#[derive(Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) port: u16,
    pub(crate) connections: usize,
    /// Requests a second, of all connections.
    pub(crate) rate: u64,
    pub(crate) seconds: u64,
    /// A file of them, with a NUL between them.
    pub(crate) requests: PathBuf,
}

/// Sends them, and prints a [`Load`].
pub(crate) fn run() {
    let task: Task = serde_json::from_str(&std::env::var(TASK).expect("a task")).expect("its JSON");
    // SAFETY: PR_SET_TIMERSLACK takes an integer. Threads inherit it: sleep ends when it should, not 50 µs
    // later.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    let file = fs::read(&task.requests).expect("the file of requests");
    let requests: Vec<&[u8]> = file.split(|byte| *byte == 0).collect();
    let start = now() + HEAD_START;
    let mut times = Vec::new();
    let mut errors = 0;
    std::thread::scope(|scope| {
        let (task, requests) = (&task, &requests);
        let connection = |number| scope.spawn(move || send(task, requests, start, number));
        let connections: Vec<_> = (0..task.connections as u64).map(connection).collect();
        for connection in connections {
            let (of_one, failed) = connection.join().expect("it does not panic");
            times.extend(of_one);
            errors += failed;
        }
    });
    times.sort_unstable();
    let at = |part: f64| {
        let index = (times.len().saturating_sub(1) as f64 * part).round() as usize;
        times.get(index).map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
    };
    let load = Load {
        requests: task.rate * task.seconds,
        errors,
        seconds: task.seconds as f64,
        latencies: Some([0.5, 0.99, 0.999].map(at)),
    };
    println!("{}", serde_json::to_string(&load).expect("JSON"));
}

/// The requests of one connection: every so manieth of all. Their times, and how many failed.
fn send(task: &Task, requests: &[&[u8]], start: Instant, number: u64) -> (Vec<Duration>, u64) {
    let all = task.rate * task.seconds;
    let mut left: VecDeque<u64> = (number..all).step_by(task.connections).collect();
    let (mut times, mut errors) = (Vec::with_capacity(left.len()), 0);
    let Ok(mut stream) = connect(task.port) else { return (times, left.len() as u64) };
    let mut buffer = vec![0; 16 << 10];
    while let Some(request) = left.pop_front() {
        let due = start + Duration::from_nanos(request * 1_000_000_000 / task.rate);
        std::thread::sleep(due.saturating_duration_since(now()));
        let bytes = requests[usize::try_from(request).expect("64 bits") % requests.len()];
        let is_good = exchange(&mut stream, bytes, &mut buffer).unwrap_or(false);
        errors += u64::from(!is_good);
        let took = now().saturating_duration_since(due);
        if request * 10 >= all * WARM_UP_TENTHS {
            times.push(took);
        }
        if took > MAX_LATE {
            break;
        }
    }
    (times, errors + left.len() as u64)
}

fn connect(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(MAX_LATE))?;
    Ok(stream)
}

/// Whether it is answered with 200; the answer is read to its end.
fn exchange(stream: &mut TcpStream, request: &[u8], buffer: &mut [u8]) -> io::Result<bool> {
    stream.write_all(request)?;
    let mut filled = 0;
    loop {
        let read = stream.read(&mut buffer[filled..])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        filled += read;
        if is_whole(&buffer[..filled])? {
            return Ok(buffer.starts_with(b"HTTP/1.1 200 "));
        }
    }
}

/// Whether an answer is there with all of its body, which must have a length.
fn is_whole(answer: &[u8]) -> io::Result<bool> {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(false);
    };
    let length = answer[..end].split(|byte| *byte == b'\n').find_map(|line| {
        let (name, value) = line.split_at_checked("content-length:".len())?;
        name.eq_ignore_ascii_case(b"content-length:").then(|| str::from_utf8(value).ok())?
    });
    let length = length.and_then(|text| text.trim().parse::<usize>().ok());
    Ok(answer.len() >= end + 4 + length.ok_or(io::ErrorKind::InvalidData)?)
}
