//! What stands in a scenario: a store, an upstream, gates, and those who call.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use otpgate::entry::{Entry, Seed};
use otpgate::store::digest::Digest;
use otpgate::store::{Store, Stored};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::load::{Caller, Kind, Line, Load, Pace};
use super::{now, slack};
use crate::harness::{ADMIN, Gate, Sandbox, address, http, otpgate, stderr, token};
use crate::peers::echo::Echo;
use crate::redis_server::{Options, RedisServer, wait_until};
use crate::store_rig::{Follow, Place, Rig, opened, who};

/// `max_stale` of gates that are to close: the shortest that is allowed.
pub(super) const MAX_STALE: Duration = Duration::from_secs(2);
/// That of all others: on a busy machine everything may take seconds.
pub(super) const DEFAULT_MAX_STALE: Duration = Duration::from_secs(15);

/// What gates hold in memory: `store.hold`.
fn hold() -> String {
    std::env::var("OTPGATE_CHAOS_HOLD").unwrap_or_else(|_| "all".to_owned())
}

/// A store that holds admin@ungleich-admin and whom the scenario adds.
pub(super) struct Site {
    pub(super) runtime: Runtime,
    pub(super) rig: Rig,
    /// Writes beside the gates, and reaches the store whatever cuts them off.
    pub(super) store: Store,
    echo: Echo,
    sandbox: Sandbox,
}

impl Site {
    /// On a Redis that keeps what it acknowledged.
    pub(super) fn durable_redis() -> Self {
        Self::redis(Options { aof: true, ..Options::default() })
    }

    /// On a Redis that is like that.
    pub(super) fn redis(options: Options) -> Self {
        let server = RedisServer::start(options);
        let url = server.url();
        Self::on(|| async { Rig::on_server(server, &url) })
    }

    /// On a file.
    pub(super) fn sqlite() -> Self {
        Self::on(Rig::sqlite)
    }

    /// On whatever `rig` makes.
    pub(super) fn on<F: Future<Output = Rig>>(rig: impl FnOnce() -> F) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let (rig, store, echo) = runtime.block_on(async {
            let rig = rig().await;
            let store = rig.ready().await;
            (rig, store, Echo::start().await)
        });
        let site = Self { runtime, rig, store, echo, sandbox: Sandbox::new() };
        let seed = Seed::parse(ADMIN).expect("a seed");
        site.create("admin", "ungleich-admin", seed);
        site
    }

    /// A gate that is ready, reaching the store itself.
    pub(super) fn gate(&self) -> Gate {
        self.gate_at(&self.rig.config.url.to_string(), DEFAULT_MAX_STALE)
    }

    /// The same, soon to close when the store is away.
    pub(super) fn closing_gate(&self) -> Gate {
        self.gate_at(&self.rig.config.url.to_string(), MAX_STALE)
    }

    /// A gate that reaches the store through this URL.
    pub(super) fn gate_at(&self, url: &str, max_stale: Duration) -> Gate {
        let gate = self.sandbox.serve(&self.settings(url, max_stale));
        self.runtime.block_on(gate.ready())
    }

    /// A gate whose program `change` prepares.
    pub(super) fn gate_with(&self, change: impl FnOnce(&mut Command)) -> Gate {
        let mut command = otpgate();
        command.args(["serve", "--log-format", "json", "--config"]).arg(self.settings_file());
        for listener in ["--proxy", "--api", "--ops"] {
            command.args([listener, "127.0.0.1:0"]);
        }
        change(&mut command);
        let gate = Gate::spawn(command).unwrap_or_else(|output| panic!("{}", stderr(&output)));
        self.runtime.block_on(gate.ready())
    }

    /// The single Redis.
    pub(super) fn redis_server(&self) -> &RedisServer {
        match &self.rig.place {
            Place::Redis(server) => server,
            _ => panic!("not a single Redis"),
        }
    }

    /// A copy of what the Redis of this site has on its disk now.
    pub(super) fn back_up(&self) -> Backup {
        let dir: (String, String) = self.rig.run(&["CONFIG", "GET", "dir"]);
        let files = PathBuf::from(dir.1).join("appendonlydir");
        let copy = files.with_extension("copy");
        copy_all(&files, &copy);
        Backup { files, copy }
    }

    /// As a file, for commands.
    pub(super) fn settings_file(&self) -> std::path::PathBuf {
        let settings = self.settings(&self.rig.config.url.to_string(), DEFAULT_MAX_STALE);
        self.sandbox.write("command.toml", &settings)
    }

    /// A file of the scenario's own.
    pub(super) fn file(&self, name: &str, text: &str) -> std::path::PathBuf {
        self.sandbox.write(name, text)
    }

    /// A gate's settings.
    pub(super) fn settings(&self, url: &str, max_stale: Duration) -> String {
        let store = self.rig.settings(&self.rig.config.sealing);
        let is_url = |line: &str| line.starts_with("url = ");
        assert_eq!(store.lines().filter(|line| is_url(line)).count(), 1);
        let lines = store.lines().map(|line| match is_url(line) {
            true => format!("url = '{url}'\n"),
            false => format!("{line}\n"),
        });
        let store: String = lines.collect();
        format!(
            "[proxy]\nupstream = '{}'\n[throttle]\nenabled = false\n[log]\naccess = false\n\
             {store}hold = '{}'\nmax_stale = '{}ms'\n",
            self.echo.address,
            hold(),
            max_stale.as_millis()
        )
    }

    /// Makes an entry.
    pub(super) fn create(&self, name: &str, realm: &str, seed: Seed) -> Entry {
        let make = |id| Entry::new(id, who(name, realm), seed, 1_700_000_000);
        let made = self.runtime.block_on(self.store.create(make));
        made.expect("the store takes it").0
    }

    /// Makes an entry that calls.
    pub(super) fn caller(&self, kind: Kind, name: &str) -> Arc<Caller> {
        Caller::of(kind, &self.create(name, "shop", Seed::random()))
    }

    /// The everyday mix: a living entry, a deleted one, a disabled one, an unknown name, a wrong token.
    pub(super) fn callers(&self) -> Vec<Arc<Caller>> {
        let living = self.create("living", "shop", Seed::random());
        let disabled = self.create("disabled", "shop", Seed::random());
        let old = self.stored(&Caller::of(Kind::Revoked, &disabled));
        let off = Entry { enabled: false, ..opened(&old).clone() };
        self.runtime.block_on(self.store.update(&old, &off)).expect("the store takes it");
        let disabled = Caller::of(Kind::Revoked, &disabled);
        disabled.must_be_refused(now(), Duration::ZERO);
        let deleted = self.caller(Kind::Revoked, "deleted");
        self.revoke(&deleted, Duration::ZERO);
        vec![
            Caller::of(Kind::Living, &living),
            deleted,
            disabled,
            Caller::new(Kind::Unknown, who("nobody", "shop"), &Seed::random()),
            Caller::of(Kind::Wrong, &living),
        ]
    }

    /// Load of `callers` on `gates`, at the usual pace for all of them together, once the gates have
    /// heard of who lives and who does not.
    pub(super) fn load(&self, gates: &[&Gate], callers: Vec<Arc<Caller>>) -> Load {
        for gate in gates {
            let mut line = Line::to(gate);
            for caller in &callers {
                wait_until("a gate knows a caller", || caller.is_served(line.call(caller)));
            }
        }
        let pace = Pace { rate: Pace::default().rate / gates.len() as u32, ..Pace::default() };
        Load::start(gates, callers, pace)
    }

    /// What the store holds of a caller.
    pub(super) fn stored(&self, caller: &Caller) -> Stored {
        let found = self.runtime.block_on(self.store.get((&caller.principal).into()));
        found.expect("the store answers").expect("the entry is there")
    }

    /// Deletes a caller's entry; when that was acknowledged. No gate may accept it later than `bound`
    /// after that.
    pub(super) fn revoke(&self, caller: &Caller, bound: Duration) -> Instant {
        let stored = self.stored(caller);
        self.runtime.block_on(self.store.delete(&stored)).expect("the store takes it");
        let acknowledged = now();
        caller.must_be_refused(acknowledged, bound);
        acknowledged
    }

    /// Manages entries through a gate's API.
    pub(super) fn manager(&self, gate: &Gate) -> Manager {
        Manager { client: http(), entries: format!("{}/ungleichotp/", gate.api) }
    }

    /// Deletes a caller's entry through a gate's API; the status.
    pub(super) fn delete_through(&self, gate: &Gate, caller: &Caller) -> u16 {
        let path = format!("{}/", self.stored(caller).id);
        let manager = self.manager(gate);
        let done = self.runtime.block_on(manager.ask(Method::DELETE, &path, None));
        done.expect("an answer").0
    }

    /// The status of a path of a gate's ops listener, and its answer.
    pub(super) fn ops(&self, gate: &Gate, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", address(&gate.ops));
        self.runtime.block_on(async {
            let answer = http().get(url).send().await.expect("ops answers");
            (answer.status().as_u16(), answer.text().await.expect("a text"))
        })
    }

    /// The sum of a metric's values.
    pub(super) fn metric(&self, gate: &Gate, name: &str) -> f64 {
        let (_, text) = self.ops(gate, "/metrics");
        let lines = text.lines().filter(|line| line.split([' ', '{']).next() == Some(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// How often a gate has loaded all entries.
    pub(super) fn full_loads(&self, gate: &Gate) -> f64 {
        self.metric(gate, "otpgate_directory_full_loads_total")
    }

    /// Fails the test unless the gates soon hold exactly what the store holds.
    pub(super) fn in_step(&self, gates: &[&Gate]) {
        let (follow, rows) = self.runtime.block_on(Follow::start(&self.store));
        let mut held = Digest::default();
        rows.iter().for_each(|row| held.add_row(row));
        let wanted = json!({
            "version": follow.position.version.0,
            "nonce": follow.position.nonce.0,
            "entries": held.entries,
            "names": format!("{:016x}", held.names),
            "contents": (hold() == "all").then(|| format!("{:016x}", held.contents)),
            "holds": hold(),
            "realms": null,
            "current": true,
        });
        for gate in gates {
            wait_until("a gate holds what the store holds", || {
                serde_json::from_str(&self.ops(gate, "/directory").1).ok().as_ref() == Some(&wanted)
            });
        }
    }
}

/// The admin at a gate's API.
pub(super) struct Manager {
    client: reqwest::Client,
    entries: String,
}

impl Manager {
    /// Status and answer of a request for a path below all entries; `None` if none comes.
    pub(super) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Option<(u16, Value)> {
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.entries))
            .header("X-Auth-Name", "admin")
            .header("X-Auth-Realm", "ungleich-admin")
            .header("X-Auth-Token", token(ADMIN));
        if let Some(body) = &body {
            request = request.json(body);
        }
        let answer = request.send().await.ok()?;
        let status = answer.status().as_u16();
        let text = answer.text().await.ok()?;
        Some((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }
}

/// An append-only file as it was once.
pub(super) struct Backup {
    files: PathBuf,
    copy: PathBuf,
}

impl Backup {
    /// Puts it back; the server must not run.
    pub(super) fn restore(&self) {
        std::fs::remove_dir_all(&self.files).expect("removed");
        copy_all(&self.copy, &self.files);
    }
}

fn copy_all(from: &Path, to: &Path) {
    let done = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(done.success());
}

/// How late a change may be in force on gates that reach their store.
pub(super) fn in_force() -> Duration {
    super::IN_FORCE + slack()
}
