//! Where a store is: `sqlite:PATH`, `redis://`, `rediss://`, `redis+unix://`, `redis-sentinel://`,
//! `redis-cluster://`. Parsing only; nothing here connects.
//!
//! No error repeats any part of the text that could be a secret, however the text is mistyped.

use std::collections::HashSet;
use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use crate::secret::Secret;

const REDIS_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// A parsed store URL. Passwords cannot print themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// An SQLite file.
    Sqlite(PathBuf),
    /// Redis or Valkey.
    Redis(RedisUrl),
}

/// How Redis is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisUrl {
    /// Which servers.
    pub topology: Topology,
    /// Number of the database; 0 on a cluster.
    pub database: i64,
    /// ACL user; `None`: the default one. Needs a password to connect.
    pub username: Option<String>,
    /// Its password.
    pub password: Option<Secret>,
    /// What the Sentinels want, which is not part of a URL; without a password, they are first asked
    /// anonymously, then with the servers' password.
    pub sentinel: Login,
    /// Whether connections use TLS.
    pub tls: bool,
}

/// A user and a password.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Login {
    /// ACL user; `None`: the default one.
    pub username: Option<String>,
    /// Its password.
    pub password: Option<Secret>,
}

/// Which Redis servers there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Topology {
    /// One server.
    Single(String, u16),
    /// One server on a Unix socket.
    Unix(PathBuf),
    /// Sentinels that know the primary of `service`.
    Sentinel {
        /// Their hosts and ports.
        nodes: Vec<(String, u16)>,
        /// The primary's name.
        service: String,
    },
    /// A cluster, found through these nodes.
    Cluster(Vec<(String, u16)>),
}

impl StoreUrl {
    /// Parses a URL. User and password may hold percent escapes; hosts may be names, IPv4 addresses
    /// or IPv6 addresses in brackets.
    ///
    /// # Errors
    /// What is wrong, without repeating any secret.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("sqlite:") {
            return sqlite_path(path).map(Self::Sqlite);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err("is no store URL: use `sqlite:PATH` or `redis://HOST:PORT`".into());
        };
        let parts = Parts::split(rest)?;
        match scheme {
            "redis" => parts.single(false),
            "rediss" => parts.single(true),
            "redis+unix" | "unix" => parts.unix(),
            "redis-sentinel" => parts.sentinel(false),
            "rediss-sentinel" => parts.sentinel(true),
            "redis-cluster" => parts.cluster(false),
            "rediss-cluster" => parts.cluster(true),
            _ => Err("has an unknown scheme: known are `sqlite:`, and, each before `://`, \
                      `redis`, `rediss`, `redis+unix`, `redis-sentinel`, `rediss-sentinel`, \
                      `redis-cluster` and `rediss-cluster`"
                .into()),
        }
        .map(Self::Redis)
    }
}

fn sqlite_path(path: &str) -> Result<PathBuf, String> {
    // `sqlite:///var/lib/x.db` is how other programs write an absolute path.
    let path = match path.strip_prefix("//") {
        None => path,
        Some(absolute) if absolute.starts_with('/') => absolute,
        Some(_) => return Err("has two slashes before a relative path: use `sqlite:PATH`".into()),
    };
    if path.is_empty() || path.ends_with('/') {
        return Err("names no file after `sqlite:`".into());
    }
    if path == ":memory:" {
        return Err("must name a file: entries kept in memory would not survive".into());
    }
    if path.contains('\0') {
        return Err("has a null character in its path".into());
    }
    Ok(path.into())
}

/// The parts of `[user[:password]@]hosts[/path][?query]`.
struct Parts<'a> {
    username: Option<String>,
    password: Option<Secret>,
    hosts: &'a str,
    path: &'a str,
    query: Option<&'a str>,
}

impl<'a> Parts<'a> {
    fn split(rest: &'a str) -> Result<Self, String> {
        if rest.contains('#') {
            return Err("has a `#`: write it as %23".into());
        }
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, Some(query)),
            None => (rest, None),
        };
        let slash = rest.find('/').unwrap_or(rest.len());
        let (authority, path) = rest.split_at(slash);
        if path.contains('@') {
            return Err(
                "has an `@` after a `/`: write `/` and `@` in user and password as %2F and %40"
                    .into(),
            );
        }
        let (username, password, hosts) = match authority.rsplit_once('@') {
            None => (None, None, authority),
            Some((userinfo, hosts)) => {
                let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
                let password = Some(decode(password)?).filter(|p| !p.is_empty());
                (Some(decode(user)?).filter(|u| !u.is_empty()), password.map(Secret::new), hosts)
            }
        };
        Ok(Self { username, password, hosts, path, query })
    }

    fn single(self, tls: bool) -> Result<RedisUrl, String> {
        self.no_query()?;
        let mut nodes = self.nodes(REDIS_PORT)?;
        let database = database(self.path.trim_matches('/'))?;
        match (nodes.pop(), nodes.is_empty()) {
            (Some((host, port)), true) => Ok(self.url(Topology::Single(host, port), database, tls)),
            _ => Err("names several hosts: use `redis-sentinel://` or `redis-cluster://`".into()),
        }
    }

    fn unix(self) -> Result<RedisUrl, String> {
        if !self.hosts.is_empty() {
            return Err("names a host before the socket's path: use `redis+unix:///PATH`".into());
        }
        let database = match self.query {
            None => 0,
            Some(query) => database(query.strip_prefix("db=").ok_or("may only ask for `?db=N`")?)?,
        };
        let path = decode(self.path)?;
        if path.len() < 2 || path.contains('\0') {
            return Err("names no socket: use `redis+unix:///PATH`".into());
        }
        Ok(self.url(Topology::Unix(path.into()), database, false))
    }

    fn sentinel(self, tls: bool) -> Result<RedisUrl, String> {
        self.no_query()?;
        let nodes = self.nodes(SENTINEL_PORT)?;
        // Half of them must agree: one that counts twice could do so alone.
        let mut named = HashSet::new();
        if !nodes.iter().all(|(host, port)| named.insert((host.to_ascii_lowercase(), port))) {
            return Err("names a Sentinel twice".into());
        }
        let path = self.path.trim_matches('/');
        let (service, db) = path.split_once('/').unwrap_or((path, ""));
        let service = decode(service)?;
        if service.is_empty() || service.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err("does not name the primary: use `redis-sentinel://HOST:PORT/NAME`".into());
        }
        let database = database(db)?;
        Ok(self.url(Topology::Sentinel { nodes, service }, database, tls))
    }

    fn cluster(self, tls: bool) -> Result<RedisUrl, String> {
        self.no_query()?;
        let nodes = self.nodes(REDIS_PORT)?;
        if database(self.path.trim_matches('/'))? != 0 {
            return Err("names a database: a cluster has only number 0".into());
        }
        Ok(self.url(Topology::Cluster(nodes), 0, tls))
    }

    fn no_query(&self) -> Result<(), String> {
        self.query.map_or(Ok(()), |_| Err("has a `?` that is not understood here".into()))
    }

    fn nodes(&self, default_port: u16) -> Result<Vec<(String, u16)>, String> {
        self.hosts.split(',').map(|node| host_and_port(node, default_port)).collect()
    }

    fn url(self, topology: Topology, database: i64, tls: bool) -> RedisUrl {
        let Self { username, password, .. } = self;
        RedisUrl { topology, database, username, password, sentinel: Login::default(), tls }
    }
}

fn decode(text: &str) -> Result<String, String> {
    let decoded = percent_decode_str(text).decode_utf8();
    Ok(decoded.map_err(|_| "has a percent escape that is not UTF-8")?.into_owned())
}

fn database(text: &str) -> Result<i64, String> {
    match text {
        "" => Ok(0),
        // Redis numbers databases with C ints.
        _ => text
            .parse::<u16>()
            .map(i64::from)
            .map_err(|_| "has a database that is not a number up to 65535".into()),
    }
}

fn host_and_port(node: &str, default_port: u16) -> Result<(String, u16), String> {
    let (host, port) = match node.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("has a `[` without its `]`")?;
            host.parse::<Ipv6Addr>().map_err(|_| "has no IPv6 address between `[` and `]`")?;
            (
                host,
                if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or(BAD_PORT)?) },
            )
        }
        None => match node.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (node, None),
        },
    };
    if host.is_empty() {
        return Err("names no host".into());
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
    if !host.chars().all(plain) {
        return Err("has a host with characters that no host name has".into());
    }
    let port = match port {
        None => default_port,
        Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or(BAD_PORT)?,
    };
    Ok((host.to_owned(), port))
}

const BAD_PORT: &str = "has a port that is not a number from 1 to 65535 (an IPv6 address needs brackets; \
                        `:`, `/` and `@` in a password are written %3A, %2F and %40)";

impl fmt::Display for StoreUrl {
    /// The URL without its password, for logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Redis(url) => url.fmt(f),
        }
    }
}

impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "rediss" } else { "redis" };
        let kind = match self.topology {
            Topology::Single(..) => "",
            Topology::Unix(_) => "+unix",
            Topology::Sentinel { .. } => "-sentinel",
            Topology::Cluster(_) => "-cluster",
        };
        write!(f, "{scheme}{kind}://")?;
        if self.password.is_some() {
            write!(f, "{}:***@", self.username.as_deref().unwrap_or_default())?;
        } else if self.username.is_some() {
            // It could be a password that lacks its colon.
            f.write_str("***@")?;
        }
        match &self.topology {
            Topology::Single(host, port) => {
                write!(f, "{}/{}", join(&[(host.clone(), *port)]), self.database)
            }
            Topology::Unix(path) => write!(f, "{}?db={}", path.display(), self.database),
            Topology::Sentinel { nodes, service } => {
                write!(f, "{}/{service}/{}", join(nodes), self.database)
            }
            Topology::Cluster(nodes) => f.write_str(&join(nodes)),
        }
    }
}

fn join(nodes: &[(String, u16)]) -> String {
    let node = |(host, port): &(String, u16)| match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    nodes.iter().map(node).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn redis(text: &str) -> RedisUrl {
        match StoreUrl::parse(text) {
            Ok(StoreUrl::Redis(url)) => url,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn sqlite_paths() {
        for (text, path) in [
            ("sqlite:otpgate.db", "otpgate.db"),
            ("sqlite:/var/lib/otpgate/o.db", "/var/lib/otpgate/o.db"),
            ("sqlite:///var/lib/o.db", "/var/lib/o.db"),
            ("sqlite:dir/with?query#and %20", "dir/with?query#and %20"),
        ] {
            assert_eq!(StoreUrl::parse(text), Ok(StoreUrl::Sqlite(path.into())), "{text}");
        }
        for bad in
            ["sqlite:", "sqlite://", "sqlite://rel", "sqlite:/dir/", "sqlite::memory:", "x.db"]
        {
            assert!(StoreUrl::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn single_servers() {
        let url = redis("redis://h");
        assert_eq!(url.topology, Topology::Single("h".into(), 6379));
        assert_eq!((url.database, url.tls), (0, false));
        assert_eq!((url.username, url.password), (None, None));
        let url = redis("rediss://us%40er:p%3A%2F%40%20w@[2001:db8::1]:7000/3");
        assert_eq!(url.topology, Topology::Single("2001:db8::1".into(), 7000));
        assert_eq!((url.database, url.tls), (3, true));
        assert_eq!(url.username.as_deref(), Some("us@er"));
        assert_eq!(url.password.as_ref().unwrap().expose(), "p:/@ w");
        // The password may come from elsewhere.
        let url = redis("redis://user@h");
        assert_eq!((url.username.as_deref(), url.password), (Some("user"), None));
        assert_eq!(redis("redis://:a:b@h").password.unwrap().expose(), "a:b");
        assert_eq!(redis("redis://[::1]").topology, Topology::Single("::1".into(), 6379));
    }

    #[test]
    fn sockets_sentinels_and_clusters() {
        let url = redis("redis+unix:///run/redis/s.sock?db=2");
        assert_eq!(url.topology, Topology::Unix("/run/redis/s.sock".into()));
        assert_eq!(url.database, 2);
        assert_eq!(redis("unix:///s").topology, Topology::Unix("/s".into()));
        assert!(redis("unix://u:p@/s").password.is_some());

        let url = redis("redis-sentinel://u:p@a:1,b,[::1]:3/mymaster/4");
        let nodes = vec![("a".into(), 1), ("b".into(), 26379), ("::1".into(), 3)];
        assert_eq!(url.topology, Topology::Sentinel { nodes, service: "mymaster".into() });
        assert_eq!((url.database, url.tls), (4, false));
        assert!(redis("rediss-sentinel://a/m").tls);

        let url = redis("redis-cluster://a:1,b/");
        assert_eq!(url.topology, Topology::Cluster(vec![("a".into(), 1), ("b".into(), 6379)]));
        assert!(redis("rediss-cluster://a").tls);
    }

    #[test]
    fn errors_do_not_repeat_secrets() {
        for bad in [
            "redis://user:s3cr3t@",
            "redis://user:s3cr3t@h:port",
            "redis://user:s3cr3t@h:0",
            "redis://user:s3cr3t@h/db",
            "redis://user:s3cr3t@h/-1",
            "redis://user:s3cr3t@a,b",
            "redis://user:s3cr3t@h?x=y",
            "redis://user:p/s3cr3t@h",
            "redis://user:p#s3cr3t@h",
            "redis://user:p?s3cr3t@h",
            "redis://h:s3cr3t",
            "redis://:s3cr3t%ff@h",
            "redis://[s3cr3t]",
            "redis://[::1",
            "redis://[::1]x",
            "redis://a b",
            "user:s3cr3t@h",
            "s3cr3t://h",
            "http://user:s3cr3t@h",
            "redis+unix://u:s3cr3t@host/p",
            "redis+unix:///",
            "redis+unix:///p?database=s3cr3t",
            "redis-sentinel://a:1",
            "redis-sentinel://a,b,A:26379/m",
            "redis-sentinel://a:1/ /",
            "redis-cluster://a/1",
            "redis-cluster://a,,b",
            "",
        ] {
            let error = StoreUrl::parse(bad).expect_err(bad);
            assert!(!error.contains("s3cr3t"), "{bad}: {error}");
            assert!(!error.is_empty());
        }
    }

    #[test]
    fn what_is_shown_has_no_password() {
        for (text, shown) in [
            ("sqlite:x.db", "sqlite:x.db"),
            ("redis://u:s3cr3t@h", "redis://u:***@h:6379/0"),
            ("rediss://:s3cr3t@[::1]:1/2", "rediss://:***@[::1]:1/2"),
            ("unix:///s?db=1", "redis+unix:///s?db=1"),
            ("redis-sentinel://a,b:2/m", "redis-sentinel://a:26379,b:2/m/0"),
            ("redis-cluster://a:1,b:2", "redis-cluster://a:1,b:2"),
        ] {
            let url = StoreUrl::parse(text).unwrap();
            assert_eq!(url.to_string(), shown);
            assert!(!format!("{url:?}").contains("s3cr3t"));
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = StoreUrl::parse(&text);
        }

        #[test]
        fn what_is_shown_parses_to_the_same(
            text in "(sqlite:|redis|rediss|unix|redis-sentinel|redis-cluster)(://)?[a-z0-9:/?@,.=%\\[\\]-]{0,24}"
        ) {
            if let Ok(url) = StoreUrl::parse(&text)
                && !url.to_string().contains(['*', '%'])
            {
                prop_assert_eq!(StoreUrl::parse(&url.to_string()), Ok(url));
            }
        }
    }
}
