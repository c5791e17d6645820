//! All that runs beside each other, and how the load reaches each arm.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::allocator;
use crate::bare::Does;
use crate::bare_server;
use crate::callers::{Callers, Kind};
use crate::configs;
use crate::plan::{Arm, Plan, Scenario};
use crate::process::{Process, Side, now, pinned};

const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of large answers.
const LARGE: usize = 100_000;

/// Ports of what is measured; 0 where it has none.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Places {
    pub(crate) plain: u16,
    pub(crate) h2c: u16,
    pub(crate) tls: u16,
    /// Of the gate.
    pub(crate) api: u16,
}

/// Certificate and key of 127.0.0.1, PEM.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Files {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    /// One after the other, for HAProxy.
    pub(crate) both: PathBuf,
}

/// A program that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    Upstream,
    Bare,
    BareWithoutStealing,
    BareWithOurAllocator,
    BareOnOurListener,
    BareWithOurDuties,
    Gate,
    GateOther,
    GateLog,
    /// Apart, since whoever is guessed at is looked at more closely for a while.
    GateGuessed,
    /// The gate that others ask.
    GateAsked,
    Nginx,
    NginxAuth,
    Caddy,
    Haproxy,
}

impl Part {
    /// What works for `arm`, the one in front first.
    fn of(arm: Arm) -> Vec<Self> {
        match arm {
            Arm::Direct => vec![Self::Upstream],
            Arm::Bare => vec![Self::Bare],
            Arm::BareWithoutStealing => vec![Self::BareWithoutStealing],
            Arm::BareWithOurAllocator => vec![Self::BareWithOurAllocator],
            Arm::BareOnOurListener => vec![Self::BareOnOurListener],
            Arm::BareWithOurDuties => vec![Self::BareWithOurDuties],
            Arm::Otpgate => vec![Self::Gate],
            Arm::OtpgateOther => vec![Self::GateOther],
            Arm::OtpgateWrong => vec![Self::GateGuessed],
            Arm::OtpgateLog => vec![Self::GateLog],
            Arm::Nginx => vec![Self::Nginx],
            Arm::NginxAuth => vec![Self::NginxAuth, Self::GateAsked],
            Arm::CaddyAuth => vec![Self::Caddy, Self::GateAsked],
            Arm::Haproxy => vec![Self::Haproxy],
            Arm::Verify => vec![Self::GateAsked],
        }
    }
}

/// Upstream and everything that is measured; ends when dropped.
pub(crate) struct Stand {
    pub(crate) callers: Callers,
    pub(crate) files: Files,
    /// Another build of the gate.
    other: Option<PathBuf>,
    /// Of each program that is measured.
    pub(crate) threads: usize,
    running: BTreeMap<Part, (Places, Process)>,
    folder: TempDir,
}

impl Stand {
    /// Starts what `arms` need, and sees that each of them answers as it should.
    pub(crate) fn start(plan: &Plan) -> Self {
        let (arms, other, threads) = (&plan.arms, plan.other.clone(), plan.threads);
        let folder = tempfile::tempdir().expect("a folder");
        let files = make_certificate(folder.path());
        let callers = Callers::new();
        import(&callers, folder.path());
        let running = BTreeMap::new();
        let mut stand = Self { callers, files, other, threads, running, folder };
        stand.add(Part::Upstream);
        for part in arms.iter().flat_map(|arm| Part::of(*arm).into_iter().rev()) {
            stand.add(part);
        }
        for arm in arms {
            stand.check(*arm);
        }
        stand
    }

    /// A file's path in its folder, which is removed with it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where `arm` takes requests.
    pub(crate) fn port(&self, arm: Arm, scenario: Scenario) -> u16 {
        let places = self.places(Part::of(arm)[0]);
        match (arm, scenario) {
            (Arm::Verify, _) => places.api,
            (_, Scenario::Http2) => places.h2c,
            (_, Scenario::Tls) => places.tls,
            _ => places.plain,
        }
    }

    /// The processes that are measured for `arm`: none but the upstream are those of the load.
    pub(crate) fn processes(&self, arm: Arm) -> Vec<u32> {
        let parts = Part::of(arm).into_iter().filter(|part| *part != Part::Upstream);
        parts.map(|part| self.running[&part].1.pid()).collect()
    }

    /// All processes.
    pub(crate) fn all(&self) -> Vec<u32> {
        self.running.values().map(|(_, process)| process.pid()).collect()
    }

    fn places(&self, part: Part) -> Places {
        self.running[&part].0
    }

    fn add(&mut self, part: Part) {
        if self.running.contains_key(&part) {
            return;
        }
        let [plain, h2c, tls, api] = free_ports();
        let places = Places { plain, h2c, tls, api };
        let process = self.spawn(part, places);
        self.running.insert(part, (places, process));
    }

    /// Starts another process of that part, elsewhere.
    pub(crate) fn spawn(&self, part: Part, at: Places) -> Process {
        let name = format!("{part:?}-{}", at.plain);
        let folder = self.path(&name);
        fs::create_dir(&folder).expect("a folder");
        let mut command = self.command(part, at, &folder);
        Process::start(&name, &mut command, folder.join("log"))
    }

    fn command(&self, part: Part, at: Places, folder: &Path) -> Command {
        let upstream = || self.places(Part::Upstream).plain;
        let asked = || self.places(Part::GateAsked).api;
        let write = |name: &str, text: String| {
            let file = folder.join(name);
            fs::write(&file, text).expect("the folder takes files");
            file
        };
        let pinned = |side, program: &OsStr| pinned(side, self.threads, program);
        let nginx = |side, text: String| {
            let mut command = pinned(side, "nginx".as_ref());
            command.arg("-e").arg(folder.join("error.log")).arg("-p").arg(folder);
            command.arg("-c").arg(write("nginx.conf", text));
            command
        };
        let (files, tested) = (&self.files, Side::Tested);
        match part {
            Part::Upstream => {
                write("large", "x".repeat(LARGE));
                nginx(Side::Load, configs::upstream(folder, at.plain))
            }
            Part::Bare
            | Part::BareWithoutStealing
            | Part::BareWithOurAllocator
            | Part::BareOnOurListener
            | Part::BareWithOurDuties => {
                let task = bare_server::Task {
                    places: at,
                    upstream: SocketAddr::from(([127, 0, 0, 1], upstream())),
                    files: files.clone(),
                    does: match part {
                        Part::BareOnOurListener => Does::OurListener,
                        Part::BareWithOurDuties => Does::OurDuties,
                        _ => Does::Nothing,
                    },
                    threads: self.threads,
                    steals: part != Part::BareWithoutStealing,
                };
                let this = std::env::current_exe().expect("this program");
                let mut command = pinned(tested, this.as_ref());
                command.env(crate::CHILD, bare_server::CHILD);
                command.env(bare_server::TASK, serde_json::to_string(&task).expect("JSON"));
                if matches!(part, Part::BareWithOurAllocator | Part::BareWithOurDuties) {
                    command.env(allocator::OURS, "1");
                }
                command
            }
            Part::Gate | Part::GateOther | Part::GateLog | Part::GateGuessed | Part::GateAsked => {
                let (database, log) = (self.path(DATABASE), part == Part::GateLog);
                let text = configs::gate(at, upstream(), files, &database, log, self.threads);
                let other = self.other.as_deref().filter(|_| part == Part::GateOther);
                let program = other.unwrap_or(Path::new(env!("CARGO_BIN_EXE_otpgate")));
                let mut command = pinned(tested, program.as_ref());
                command.args(["serve", "--config"]).arg(write("otpgate.toml", text));
                command
            }
            Part::Nginx => nginx(tested, configs::nginx_proxy(folder, at, upstream(), files, None)),
            Part::NginxAuth => {
                let text = configs::nginx_proxy(folder, at, upstream(), files, Some(asked()));
                nginx(tested, text)
            }
            Part::Caddy => {
                let text = configs::caddy(at, upstream(), files, asked());
                let mut command = pinned(tested, "caddy".as_ref());
                command.args(["run", "--adapter", "caddyfile", "--config"]);
                command.arg(write("Caddyfile", text));
                command
                    .env("GOMAXPROCS", self.threads.to_string())
                    .env("HOME", folder)
                    .env_remove("XDG_DATA_HOME");
                command
            }
            Part::Haproxy => {
                let mut command = pinned(tested, "haproxy".as_ref());
                command.args(["-q", "-db", "-f"]);
                command.arg(write(
                    "haproxy.cfg",
                    configs::haproxy(at, upstream(), files, self.threads),
                ));
                command
            }
        }
    }

    /// Waits until `arm` answers a right token as it should, and sees that it answers a wrong one so.
    fn check(&mut self, arm: Arm) {
        let port = self.port(arm, Scenario::KeepAlive);
        let kind = if arm == Arm::Verify { Kind::Verify } else { Kind::Right };
        let request = self.callers.once(kind);
        let began = now();
        let mut last = None;
        while last != Some(200) {
            for (_, process) in self.running.values_mut() {
                process.must_run();
            }
            let is_late = began.elapsed() > PATIENCE;
            assert!(!is_late, "{arm:?} answers {last:?}; {}", self.logs());
            last = ask(port, &request).ok();
            std::thread::sleep(Duration::from_millis(5));
        }
        let asks = matches!(
            arm,
            Arm::Otpgate
                | Arm::OtpgateOther
                | Arm::OtpgateLog
                | Arm::OtpgateWrong
                | Arm::NginxAuth
                | Arm::CaddyAuth
        );
        let wrong = ask(port, &self.callers.once(Kind::Wrong)).ok();
        let expected = match (arm, asks) {
            // A GET of another path.
            (Arm::Verify, _) => 404,
            (_, true) => 401,
            (_, false) => 200,
        };
        assert_eq!(wrong, Some(expected), "{arm:?} with a wrong token; {}", self.logs());
    }

    /// What the processes complained about.
    fn logs(&self) -> String {
        self.running.values().map(|(_, process)| process.complaints()).collect()
    }
}

const DATABASE: &str = "otpgate.db";

/// Ports that nobody listens on right now.
pub(crate) fn free_ports() -> [u16; 4] {
    let listeners = [(); 4].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("its address").port())
}

/// Sends one request and reads the status of its answer.
pub(crate) fn ask(port: u16, request: &[u8]) -> io::Result<u16> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(request)?;
    let mut head = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut head)?;
    let status = str::from_utf8(&head[9..]).ok().and_then(|digits| digits.parse().ok());
    status.ok_or(io::ErrorKind::InvalidData.into())
}

fn make_certificate(folder: &Path) -> Files {
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).expect("a certificate");
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let write = |name: &str, text: &str| {
        let file = folder.join(name);
        fs::write(&file, text).expect("the folder takes files");
        file
    };
    Files {
        certificate: write("server.pem", &certificate),
        key: write("server.key", &key),
        both: write("both.pem", &format!("{certificate}{key}")),
    }
}

fn import(callers: &Callers, folder: &Path) {
    let dump = folder.join("dump.json");
    fs::write(&dump, callers.dump().to_string()).expect("the folder takes files");
    let imported = Command::new(env!("CARGO_BIN_EXE_otpgate"))
        .args(["store", "import", "--json", "--store"])
        .arg(format!("sqlite:{}", folder.join(DATABASE).display()))
        .arg(&dump)
        .output()
        .expect("the program runs");
    assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));
}
