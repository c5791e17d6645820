//! The gate between a client that sends exact bytes and the recorder, and the tables' way through it.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::recorder::{Recorder, Seen, find};
use crate::harness::{ALICE, BOB, Gate, Sandbox, otpgate, token, wrong_token};
use crate::peers::bounded;
use crate::redis_server::{Options, RedisServer};

/// Who may pass where in all tables: any principal at `/`, bob's realm at `/admin`, nobody is asked at
/// `/public`, and at `/watched` it is only said who would be refused.
const ROUTES: &str = r#"
[[route]]
path = "/"
allow = ["*"]
[[route]]
path = "/public"
public = true
[[route]]
path = "/admin"
allow = ["lab"]
[[route]]
path = "/watched"
allow = ["lab"]
mode = "report"
"#;

/// A request that gets an answer as no other one does.
const PROBE: &[u8] = b"TRACE /probe HTTP/1.1\r\nHost: gate\r\nConnection: close\r\n\r\n";
const PROBED: u16 = 405;

/// What the client gets and the upstream sees.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expected {
    /// Answers with these statuses, and at the upstream these requests: `"alice GET /x"`.
    Done(&'static [u16], &'static [&'static str]),
    /// One refusal, nothing at the upstream.
    Refused,
    /// The body turns out to be broken after its head was forwarded: the client's answer, if there is one,
    /// is a refusal, and the upstream sees at most this request, without its end.
    Broken(&'static str),
}

/// One attack.
#[derive(Clone)]
pub(crate) struct Case {
    /// What is required.
    pub(crate) says: &'static str,
    /// What is sent; see [`Rig::fill`].
    pub(crate) sends: Vec<u8>,
    /// What comes of it.
    pub(crate) expected: Expected,
}

impl Case {
    /// How many answers are expected.
    fn answers(&self) -> usize {
        match self.expected {
            Expected::Done(statuses, _) => statuses.len(),
            Expected::Refused => 1,
            Expected::Broken(_) => 0,
        }
    }

    /// Whether it is refused for what it is, not for who sent it.
    pub(crate) fn is_unclear(&self) -> bool {
        matches!(self.expected, Expected::Done([400 | 405 | 431], _))
    }

    /// Whether a proof, or the lack of one, makes a difference.
    pub(crate) fn needs_proof(&self) -> bool {
        matches!(self.expected, Expected::Done(statuses, _) if statuses.iter().any(|s| [200, 401].contains(s)))
    }
}

/// It is refused with this status.
pub(crate) fn refused(says: &'static str, sends: impl AsRef<[u8]>, status: u16) -> Case {
    let statuses: &'static [u16] = match status {
        400 => &[400],
        401 => &[401],
        403 => &[403],
        405 => &[405],
        413 => &[413],
        431 => &[431],
        other => panic!("not among the refusals of tables: {other}"),
    };
    Case { says, sends: sends.as_ref().to_vec(), expected: Expected::Done(statuses, &[]) }
}

/// It is answered by the upstream, which sees this.
pub(crate) fn passes(
    says: &'static str,
    sends: impl AsRef<[u8]>,
    seen: &'static [&'static str],
) -> Case {
    const ALL: &[u16] = &[200; 4];
    let statuses = &ALL[..seen.len()];
    Case { says, sends: sends.as_ref().to_vec(), expected: Expected::Done(statuses, seen) }
}

/// These answers, these requests at the upstream.
pub(crate) fn answers(
    says: &'static str,
    sends: impl AsRef<[u8]>,
    statuses: &'static [u16],
    seen: &'static [&'static str],
) -> Case {
    Case { says, sends: sends.as_ref().to_vec(), expected: Expected::Done(statuses, seen) }
}

/// Its body is broken.
pub(crate) fn broken(says: &'static str, sends: impl AsRef<[u8]>, request: &'static str) -> Case {
    Case { says, sends: sends.as_ref().to_vec(), expected: Expected::Broken(request) }
}

/// A `GET` with these header lines beside `Host` and alice's proof.
pub(crate) fn get_with(lines: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: gate\r\n{{alice}}{lines}\r\n")
}

/// Gate, upstream, and what they stand on.
pub(crate) struct Rig {
    pub(crate) gate: Gate,
    pub(crate) upstream: Recorder,
    _sandbox: Sandbox,
}

impl Rig {
    /// With the routes of all tables.
    pub(crate) async fn normal() -> Self {
        Self::with("", ROUTES).await
    }

    /// The same, all in report mode.
    pub(crate) async fn reporting() -> Self {
        Self::with("mode = \"report\"", ROUTES).await
    }

    /// With more settings in `[proxy]`, and these routes.
    pub(crate) async fn with(proxy: &str, routes: &str) -> Self {
        let upstream = Recorder::start().await;
        let sandbox = Sandbox::with_entries();
        let settings = settings(&upstream, proxy, "", routes);
        let gate = sandbox.serve(&settings).ready().await;
        Self { gate, upstream, _sandbox: sandbox }
    }

    /// As [`Self::normal`], with the store gone for longer than the gate goes on without it.
    pub(crate) async fn without_store() -> Self {
        let upstream = Recorder::start().await;
        let mut redis = RedisServer::start(Options::default());
        let sandbox = Sandbox::with_entries();
        let url = format!("redis://127.0.0.1:{}", redis.port);
        // The dump that the sandbox's own store was made of.
        let mut import = otpgate();
        import.env("OTPGATE_STORE__SEALING", "off");
        import.args(["store", "import", "--store", &url]).arg(sandbox.path("dump.json"));
        assert!(import.output().unwrap().status.success());
        let store = format!("[store]\nurl = \"{url}\"\nmax_stale = \"2s\"\nsealing = \"off\"\n");
        let gate = sandbox.serve(&settings(&upstream, "", &store, ROUTES)).ready().await;
        let rig = Self { gate, upstream, _sandbox: sandbox };
        assert_eq!(rig.send(&rig.fill(get_with("").as_bytes())).await, [200]);
        redis.kill();
        crate::peers::until("the gate is closed", || async {
            rig.send(&rig.fill(get_with("").as_bytes())).await == [503]
        })
        .await;
        rig.upstream.take().await;
        rig
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.gate.proxy.strip_prefix("http://").unwrap().parse().unwrap()
    }

    /// Puts what only now is known into a text: `{alice}` and `{bob}` are header lines that prove them,
    /// `{wrong}` those of alice with a wrong token, `{token}` is alice's token.
    pub(crate) fn fill(&self, text: &[u8]) -> Vec<u8> {
        let proof = |name: &str, realm: &str, token: &str| {
            format!("X-Auth-Name: {name}\r\nX-Auth-Realm: {realm}\r\nX-Auth-Token: {token}\r\n")
        };
        let mut text = text.to_vec();
        for (word, value) in [
            ("{alice}", proof("alice", "shop", &token(ALICE))),
            ("{bob}", proof("bob", "lab", &token(BOB))),
            ("{wrong}", proof("alice", "shop", &wrong_token(ALICE))),
            ("{token}", token(ALICE)),
        ] {
            while let Some(at) = find(&text, word.as_bytes()) {
                text.splice(at..at + word.len(), value.bytes());
            }
        }
        text
    }

    /// Sends, and reads the statuses of all answers until the gate is done. Behind the first `expected` ones
    /// a probe is sent: whatever is answered before it was one request too many.
    pub(crate) async fn send_for(&self, bytes: &[u8], expected: usize) -> Vec<u16> {
        let (mut reader, mut writer) =
            TcpStream::connect(self.address()).await.unwrap().into_split();
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let bytes = bytes.to_vec();
        let writing = tokio::spawn(async move {
            let _ = writer.write_all(&bytes).await;
            if expected > 0 {
                let _ = wait.await;
                let _ = writer.write_all(PROBE).await;
            } else {
                let _ = writer.shutdown().await;
            }
            writer
        });
        let mut got = Vec::new();
        let mut go = Some(go);
        bounded("the gate's answers", async {
            // A reset ends it as well.
            while let Ok(1..) = reader.read_buf(&mut got).await {
                if statuses(&got).len() >= expected {
                    drop(go.take());
                }
            }
        })
        .await;
        drop(go);
        drop(writing.await);
        assert!(find(&got, token(ALICE).as_bytes()).is_none(), "an answer tells a token");
        let mut statuses = statuses(&got);
        if statuses.len() > expected && statuses.last() == Some(&PROBED) {
            statuses.pop();
        }
        statuses
    }

    /// The same for one answer.
    pub(crate) async fn send(&self, bytes: &[u8]) -> Vec<u16> {
        self.send_for(bytes, 1).await
    }

    /// Runs a table. All cases run before it fails.
    pub(crate) async fn run(&self, table: &[Case]) {
        let mut wrong = Vec::new();
        for case in table {
            let got = self.send_for(&self.fill(&case.sends), case.answers()).await;
            let seen = self.seen().await;
            wrong.extend(differs(case, &got, &seen));
        }
        assert!(
            wrong.is_empty(),
            "{} of {} cases:\n{}",
            wrong.len(),
            table.len(),
            wrong.join("\n")
        );
    }

    /// Runs a table in another mode, where only this is required: no request is answered by the upstream
    /// unless `fits` the mode.
    pub(crate) async fn run_checking(
        &self,
        table: &[Case],
        fits: impl Fn(&Case, &[u16], &[Seen]) -> bool,
    ) {
        for case in table {
            let got = self.send_for(&self.fill(&case.sends), case.answers()).await;
            let seen = self.seen().await;
            assert!(fits(case, &got, &seen), "{}: {got:?} {seen:?}", case.says);
        }
    }

    /// What came to the upstream since it was last asked. Nobody's claims are ever in it.
    pub(crate) async fn seen(&self) -> Vec<Seen> {
        let (seen, bytes) = self.upstream.take().await;
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        assert!(!text.contains("evil"), "it got through: {text}");
        for seed in [ALICE, BOB] {
            assert!(!text.contains(&token(seed)), "a token got through: {text}");
        }
        seen
    }
}

fn settings(upstream: &Recorder, proxy: &str, others: &str, routes: &str) -> String {
    // All failures come from one source: soon none of its requests would be looked at.
    format!(
        "[proxy]\nlisten = \"127.0.0.1:0\"\nh2c = true\nupstream = \"{}\"\n{proxy}\n{others}\n\
         [throttle]\nenabled = false\n{routes}",
        upstream.address
    )
}

/// What a request says and to whom it belongs.
pub(crate) fn summary(seen: &Seen) -> String {
    format!("{} {}", seen.who(), seen.line())
}

/// How a case did not come out as expected.
fn differs(case: &Case, got: &[u16], seen: &[Seen]) -> Option<String> {
    let requests: Vec<_> = seen.iter().map(summary).collect();
    let good = match case.expected {
        // The remains of a broken one may arrive late.
        Expected::Done(statuses, expected) => {
            let whole: Vec<_> = requests.iter().filter(|r| !r.contains(" /broken")).collect();
            got == statuses
                && whole == expected
                && seen.iter().all(|s| s.whole || s.line().contains("/broken"))
        }
        Expected::Refused => matches!(got, [400 | 401]) && requests.is_empty(),
        Expected::Broken(request) => {
            got.iter().all(|status| (400..500).contains(status))
                && requests.iter().all(|r| r == request)
                && seen.iter().all(|seen| !seen.whole)
        }
    };
    (!good).then(|| {
        format!(
            "{}: wanted {:?}, got {got:?}, the upstream saw {requests:?}",
            case.says, case.expected
        )
    })
}

/// The statuses of all final answers in a stream of them, as far as they are whole. HEAD is not asked here.
fn statuses(mut bytes: &[u8]) -> Vec<u16> {
    let mut statuses = Vec::new();
    while let Some(end) = find(bytes, b"\r\n\r\n") {
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        bytes = &bytes[end + 4..];
        let status: u16 = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
        if status / 100 == 1 {
            continue;
        }
        let length = crate::peers::wire::header(&head, "content-length");
        let length = length.map_or(0, |length| length.parse().expect("a number"));
        let Some((body, rest)) = bytes.split_at_checked(length) else { break };
        statuses.push(status);
        if status >= 400 {
            let header = |name| crate::peers::wire::header(&head, name);
            assert_eq!(
                (header("content-type"), header("server")),
                (Some("application/json"), None)
            );
            let json: serde_json::Value = serde_json::from_slice(body).expect("a refusal in JSON");
            assert!(json["detail"].is_string() && json["request_id"].is_string(), "{json}");
        }
        bytes = rest;
    }
    statuses
}
