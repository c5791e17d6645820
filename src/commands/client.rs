//! `otpgate client`: manages and verifies entries through a server's API.
//!
//! Takes the flags and environment variables of ungleichotpclient, so that its users' scripts go on.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum as _};
use serde_json::{Map, Value, json};

use crate::client::{
    Client, ClientError, ClientTls, Credentials, Filter, Proof, ShownEntry, printable,
};
use crate::clock::{Clock, SystemClock};
use crate::entry::{Keep, Name, Realm, Seed};
use crate::otp::{Generator, TokenParams};
use crate::secret::Secret;

/// Arguments of `otpgate client`.
#[derive(Args, Debug)]
pub struct ClientArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[command(subcommand)]
    command: ClientCommand,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Server and caller")]
struct ServerArgs {
    /// The server, such as https://otp.example or unix:/run/otpgate/api.sock [env: OTPGATE_SERVER_URL, UNGLEICHOTPSERVER]
    #[arg(long, global = true, value_name = "URL")]
    server_url: Option<String>,
    /// Certificates (PEM) that may have signed the server's [default: the system's]
    #[arg(long, global = true, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// The certificate (PEM, with its chain) for servers that ask for one
    #[arg(long, global = true, value_name = "FILE", requires = "key_file")]
    cert_file: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, global = true, value_name = "FILE", requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// The caller's name [env: OTPGATE_AUTH_NAME, UNGLEICHOTPNAME]
    #[arg(long, global = true, value_name = "NAME")]
    auth_name: Option<String>,
    /// The caller's realm [env: OTPGATE_AUTH_REALM, UNGLEICHOTPREALM]
    #[arg(long, global = true, value_name = "REALM")]
    auth_realm: Option<String>,
    /// The caller's seed; others of this machine see it in the process list: better a file, a variable,
    /// or, without any of these, the terminal [env: OTPGATE_AUTH_SEED, UNGLEICHOTPSEED]
    #[arg(long, global = true, value_name = "SEED", value_parser = secret,
          conflicts_with_all = ["auth_seed_file", "auth_token"])]
    auth_seed: Option<Secret>,
    /// A file that holds the caller's seed, `-` for standard input [env: OTPGATE_AUTH_SEED_FILE]
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "auth_token")]
    auth_seed_file: Option<PathBuf>,
    /// The caller's current token, instead of its seed [env: OTPGATE_AUTH_TOKEN]
    #[arg(long, global = true, value_name = "TOKEN", value_parser = secret)]
    auth_token: Option<Secret>,
    /// Print JSON, for machines
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand, Debug)]
enum ClientCommand {
    /// Make an entry; the server makes its seed, and it is printed
    Create {
        /// Its name
        #[arg(long)]
        name: String,
        /// Its realm
        #[arg(long)]
        realm: String,
        #[command(flatten)]
        fields: FieldArgs,
    },
    /// List entries in order of creation
    List {
        /// Only with this name
        #[arg(long)]
        name: Option<String>,
        /// Only in this realm
        #[arg(long)]
        realm: Option<String>,
        /// Print seeds too (JSON always holds them)
        #[arg(long)]
        seeds: bool,
    },
    /// Show an entry with its seed
    Show {
        #[command(flatten)]
        which: Which,
    },
    /// Change an entry; what is not given stays
    Update {
        #[command(flatten)]
        which: Which,
        /// Its new name
        #[arg(long, value_name = "NAME")]
        new_name: Option<String>,
        /// Its new realm
        #[arg(long, value_name = "REALM")]
        new_realm: Option<String>,
        #[command(flatten)]
        fields: FieldArgs,
    },
    /// Give an entry a new seed, and print it; for a while, both are accepted
    Rotate {
        #[command(flatten)]
        which: Which,
        /// How long the seed before is accepted too, such as 30m or 2days; 0s: no longer
        /// [default: as the server is set, one hour unless changed]
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        overlap: Option<Duration>,
        /// Which seed is accepted beside the new one, where an earlier rotation still overlaps
        #[arg(long)]
        keep: Option<Keep>,
    },
    /// Delete an entry
    Delete {
        #[command(flatten)]
        which: Which,
    },
    /// Check somebody's token; the caller must be in the verifying realm
    Verify {
        /// Whose token
        #[arg(long)]
        name: String,
        /// In which realm
        #[arg(long)]
        realm: String,
        /// The token
        #[arg(long, value_parser = secret, conflicts_with_all = ["seed", "seed_file"])]
        token: Option<Secret>,
        /// Make the token from this seed: SHA1, 6 digits, 30 seconds
        #[arg(long, value_parser = secret, conflicts_with = "seed_file")]
        seed: Option<Secret>,
        /// As `--seed`, from a file, `-` for standard input
        #[arg(long, value_name = "FILE")]
        seed_file: Option<PathBuf>,
    },
}

/// Names an entry.
#[derive(Args, Debug)]
struct Which {
    /// Its number, as `list` shows it
    #[arg(long, conflicts_with_all = ["name", "realm"], required_unless_present = "name")]
    id: Option<u64>,
    /// Its name
    #[arg(long, requires = "realm")]
    name: Option<String>,
    /// Its realm
    #[arg(long, requires = "name")]
    realm: Option<String>,
}

/// Settings of an entry. An empty text takes the realm's setting, or none.
#[derive(Args, Debug)]
#[command(next_help_heading = "Settings of the entry (\"\": as its realm, or none)")]
struct FieldArgs {
    /// SHA1, SHA256 or SHA512
    #[arg(long)]
    algorithm: Option<String>,
    /// Digits of its tokens, 6 to 8
    #[arg(long)]
    digits: Option<String>,
    /// Seconds of a time step, 5 to 3600
    #[arg(long)]
    period: Option<String>,
    /// Whether its tokens are accepted
    #[arg(long)]
    enabled: Option<bool>,
    /// When it ends, such as 2030-12-31T23:59:59Z
    #[arg(long, value_name = "TIME")]
    expires_at: Option<String>,
    /// A remark for people
    #[arg(long)]
    comment: Option<String>,
}

impl FieldArgs {
    fn into_json(self) -> Map<String, Value> {
        let nullable = |text: String| if text.is_empty() { Value::Null } else { json!(text) };
        [
            ("algorithm", self.algorithm.map(nullable)),
            ("digits", self.digits.map(nullable)),
            ("period", self.period.map(nullable)),
            ("enabled", self.enabled.map(Value::from)),
            ("expires_at", self.expires_at.map(nullable)),
            ("comment", self.comment.map(Value::from)),
        ]
        .into_iter()
        .filter_map(|(field, value)| Some((field.to_owned(), value?)))
        .collect()
    }
}

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The command line or the environment.
    #[error("{0}")]
    Usage(String),
    /// The call.
    #[error(transparent)]
    Call(#[from] ClientError),
    /// No such entry.
    #[error("there is no entry of that name in that realm")]
    NoEntry,
    /// The result cannot be printed.
    #[error("{0}")]
    Output(String),
}

impl CommandError {
    /// 1: refused or failed; 2: usage.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) | Self::Call(ClientError::Setup(_)) => ExitCode::from(2),
            Self::Call(_) | Self::NoEntry | Self::Output(_) => ExitCode::from(1),
        }
    }
}

/// Runs the command and prints its result.
///
/// # Errors
/// Nothing was printed then; the caller prints the error and ends with its exit code.
pub async fn run(args: ClientArgs) -> Result<ExitCode, CommandError> {
    let environment = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let json = args.server.json;
    warn_of_arguments(&args);
    let client = connect(args.server, &environment, clock.clone())?;
    let text = match args.command {
        ClientCommand::Create { name, realm, fields } => {
            let mut fields = fields.into_json();
            fields.insert("name".into(), json!(name));
            fields.insert("realm".into(), json!(realm));
            one(&client.create(fields).await?, json)
        }
        ClientCommand::List { name, realm, seeds } => {
            let name = name.map(|name| parse_name(&name)).transpose()?;
            let realm = realm.map(|realm| parse_realm(&realm)).transpose()?;
            let entries = client.list(&Filter { name, realm }).await?;
            if json { to_json(&entries) } else { table(&entries, seeds) }
        }
        ClientCommand::Show { which } => {
            let id = find(&client, which).await?;
            one(&client.show(id).await?, json)
        }
        ClientCommand::Update { which, new_name, new_realm, fields } => {
            let mut fields = fields.into_json();
            fields.extend(new_name.map(|name| ("name".to_owned(), json!(name))));
            fields.extend(new_realm.map(|realm| ("realm".to_owned(), json!(realm))));
            if fields.is_empty() {
                return Err(CommandError::Usage("nothing to change is given".into()));
            }
            let id = find(&client, which).await?;
            one(&client.update(id, fields).await?, json)
        }
        ClientCommand::Rotate { which, overlap, keep } => {
            let mut fields = Map::new();
            fields.extend(overlap.map(|time| ("overlap".to_owned(), json!(time.as_secs()))));
            let keep = keep.and_then(|keep| Some(keep.to_possible_value()?.get_name().to_owned()));
            fields.extend(keep.map(|keep| ("keep".to_owned(), json!(keep))));
            let id = find(&client, which).await?;
            one(&client.rotate(id, fields).await?, json)
        }
        ClientCommand::Delete { which } => {
            let id = find(&client, which).await?;
            client.delete(id).await?;
            if json { to_json(&json!({ "deleted": id })) } else { format!("deleted {id}\n") }
        }
        ClientCommand::Verify { name, realm, token, seed, seed_file } => {
            let token = match (token, read_seed(seed, seed_file.as_deref())?) {
                (Some(token), _) => token,
                (None, Some(seed)) => Secret::new(
                    Generator::new(&seed, TokenParams::default()).token_at(clock.now().unix),
                ),
                (None, None) => ask("Token to verify: ", "--token")?,
            };
            client.verify(&name, &realm, token.expose()).await?;
            if json { to_json(&json!({ "status": "OK" })) } else { "OK\n".to_owned() }
        }
    };
    super::print(text.trim_end_matches('\n')).map_err(|e| CommandError::Output(e.to_string()))?;
    Ok(ExitCode::SUCCESS)
}

/// Arguments cannot be hidden from other users once the program runs.
fn warn_of_arguments(args: &ClientArgs) {
    let verified = match &args.command {
        ClientCommand::Verify { seed, .. } => seed.as_ref().map(|_| "--seed"),
        _ => None,
    };
    for flag in args.server.auth_seed.as_ref().map(|_| "--auth-seed").into_iter().chain(verified) {
        eprintln!(
            "otpgate: a seed in `{flag}` shows in the list of processes: better `{flag}-file` or a variable"
        );
    }
}

type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

fn connect(
    args: ServerArgs,
    environment: Environment<'_>,
    clock: Arc<dyn Clock>,
) -> Result<Client, CommandError> {
    let first = |flag: Option<String>, names: [&str; 2]| {
        flag.or_else(|| names.into_iter().find_map(environment)).ok_or_else(|| {
            let flag = names[0].trim_start_matches("OTPGATE_").replace('_', "-").to_lowercase();
            CommandError::Usage(format!("missing `--{flag}` (or {})", names.join(", ")))
        })
    };
    let url = first(args.server_url.clone(), ["OTPGATE_SERVER_URL", "UNGLEICHOTPSERVER"])?;
    let name = first(args.auth_name.clone(), ["OTPGATE_AUTH_NAME", "UNGLEICHOTPNAME"])?;
    let realm = first(args.auth_realm.clone(), ["OTPGATE_AUTH_REALM", "UNGLEICHOTPREALM"])?;
    let credentials = Credentials {
        name: parse_name(&name)?,
        realm: parse_realm(&realm)?,
        proof: proof(&args, environment)?,
    };
    let identity = args.cert_file.zip(args.key_file);
    let tls = ClientTls { ca_file: args.ca_file, identity };
    Ok(Client::new(&url, credentials, &tls, clock)?)
}

/// Flags beat the environment, OTPGATE_* beats ungleichotpclient's; then the terminal is asked.
fn proof(args: &ServerArgs, environment: Environment<'_>) -> Result<Proof, CommandError> {
    if let Some(token) = &args.auth_token {
        return Ok(Proof::Token(token.clone()));
    }
    if let Some(seed) = read_seed(args.auth_seed.clone(), args.auth_seed_file.as_deref())? {
        return Ok(Proof::Seed(seed));
    }
    if let Some(token) = environment("OTPGATE_AUTH_TOKEN") {
        return Ok(Proof::Token(Secret::new(token)));
    }
    let file = environment("OTPGATE_AUTH_SEED_FILE").map(PathBuf::from);
    let seed = environment("OTPGATE_AUTH_SEED").map(Secret::new);
    if seed.is_some() && file.is_some() {
        let text = "both OTPGATE_AUTH_SEED and OTPGATE_AUTH_SEED_FILE are set";
        return Err(CommandError::Usage(text.into()));
    }
    if let Some(seed) = read_seed(seed, file.as_deref())? {
        return Ok(Proof::Seed(seed));
    }
    let seed = match environment("UNGLEICHOTPSEED") {
        Some(seed) => Secret::new(seed),
        None => ask("Seed of the caller: ", "--auth-seed-file")?,
    };
    parse_seed(&seed).map(Proof::Seed)
}

fn read_seed(seed: Option<Secret>, file: Option<&Path>) -> Result<Option<Seed>, CommandError> {
    let seed = match (seed, file) {
        (Some(seed), _) => seed,
        (None, Some(path)) => {
            let seed = super::token::read_seed(path);
            return seed.map(Some).map_err(|e| CommandError::Usage(e.to_string()));
        }
        (None, None) => return Ok(None),
    };
    parse_seed(&seed).map(Some)
}

fn parse_seed(seed: &Secret) -> Result<Seed, CommandError> {
    Seed::parse(seed.expose()).map_err(|e| CommandError::Usage(format!("the seed {e}")))
}

fn parse_name(name: &str) -> Result<Name, CommandError> {
    Name::parse(name).map_err(|e| CommandError::Usage(format!("the name {e}")))
}

fn parse_realm(realm: &str) -> Result<Realm, CommandError> {
    Realm::parse(realm).map_err(|e| CommandError::Usage(format!("the realm {e}")))
}

/// Asks on the terminal without echo.
fn ask(question: &str, flag: &str) -> Result<Secret, CommandError> {
    if !std::io::stdin().is_terminal() {
        return Err(CommandError::Usage(format!("missing `{flag}`, and no terminal to ask on")));
    }
    rpassword::prompt_password(question)
        .map(Secret::new)
        .map_err(|e| CommandError::Usage(format!("cannot ask on the terminal: {e}")))
}

async fn find(client: &Client, which: Which) -> Result<u64, CommandError> {
    let (name, realm) = match (which.id, which.name, which.realm) {
        (Some(id), _, _) => return Ok(id),
        (None, Some(name), Some(realm)) => (parse_name(&name)?, parse_realm(&realm)?),
        _ => return Err(CommandError::Usage("give `--id`, or `--name` and `--realm`".into())),
    };
    let filter = Filter { name: Some(name), realm: Some(realm) };
    let found = client.list(&filter).await?.into_iter().next().ok_or(CommandError::NoEntry)?;
    found.id.ok_or_else(|| {
        let text = "the server shows no numbers of entries: give `--id`";
        ClientError::BadAnswer(text.into()).into()
    })
}

#[allow(clippy::unnecessary_wraps, reason = "clap's form of a value parser")]
fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text.to_owned()))
}

fn to_json(value: &impl serde::Serialize) -> String {
    let mut text = serde_json::to_string(value).expect("plain data serialises");
    text.push('\n');
    text
}

/// An entry, a line a field.
fn one(entry: &ShownEntry, json: bool) -> String {
    if json {
        return to_json(entry);
    }
    let id = entry.id.map(|id| id.to_string());
    let seed = entry.seed.as_ref().map(|seed| seed.expose().to_owned());
    let known = [
        ("id", id),
        ("name", Some(entry.name.clone())),
        ("realm", Some(entry.realm.clone())),
        ("seed", seed),
    ];
    let more = entry.more.iter().filter(|(_, value)| !value.is_null()).map(|(field, value)| {
        (field.as_str(), Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
    });
    let rows = known.into_iter().chain(more).filter_map(|(field, value)| Some((field, value?)));
    rows.map(|(field, value)| format!("{field:<20}{}\n", printable(&value))).collect()
}

/// Entries in columns.
fn table(entries: &[ShownEntry], seeds: bool) -> String {
    let mut rows = vec![["ID", "REALM", "NAME", "SEED"].map(str::to_owned)];
    rows.extend(entries.iter().map(|entry| {
        [
            entry.id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
            printable(&entry.realm),
            printable(&entry.name),
            entry.seed.as_ref().map_or_else(|| "-".to_owned(), |seed| printable(seed.expose())),
        ]
    }));
    let columns = if seeds { 4 } else { 3 };
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
    };
    let widths = [0, 1, 2, 3].map(width);
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths).take(columns);
        let line: String = cells.map(|(cell, width)| format!("{cell:<width$}  ")).collect();
        format!("{}\n", line.trim_end())
    });
    lines.chain(entries.iter().filter_map(fault)).collect()
}

/// What the server says is wrong with an entry.
fn fault(entry: &ShownEntry) -> Option<String> {
    let error = entry.more.get("error")?.as_str()?;
    Some(format!("{}: {}\n", entry.id?, printable(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        client: ClientArgs,
    }

    fn parse(args: &[&str]) -> Result<ClientArgs, clap::Error> {
        let args = std::iter::once("client").chain(args.iter().copied());
        Cli::try_parse_from(args).map(|cli| cli.client)
    }

    fn connect_with(args: &[&str], environment: &[(&str, &str)]) -> Result<String, String> {
        let environment = |name: &str| {
            environment.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        };
        let args = parse(args).map_err(|e| e.to_string())?;
        connect(args.server, &environment, Arc::new(ManualClock::at(0)))
            .map(|client| format!("{client:?}"))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
        for good in [
            &["--server-url", "http://a", "verify", "--name", "a", "--realm", "b"] as &[_],
            &["verify", "--name", "a", "--realm", "b", "--token", "123456", "--auth-seed", "AA"],
            &["delete", "--id", "1", "--json"],
            &["show", "--name", "a", "--realm", "b"],
        ] {
            assert!(parse(good).is_ok(), "{good:?}");
        }
        for bad in [
            &["delete"] as &[_],
            &["delete", "--name", "a"],
            &["delete", "--id", "1", "--name", "a", "--realm", "b"],
            &["list", "--auth-seed", "AA", "--auth-token", "123456"],
            &["verify", "--name", "a", "--realm", "b", "--token", "1", "--seed", "AA"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_environment_of_ungleichotpclient_works() {
        let theirs = [
            ("UNGLEICHOTPSERVER", "http://127.0.0.1:1/ungleichotp/verify/"),
            ("UNGLEICHOTPNAME", "info@ungleich.ch"),
            ("UNGLEICHOTPREALM", "ungleich-admin"),
            ("UNGLEICHOTPSEED", "PZKBPTHDGSLZBKIZ"),
        ];
        let client = connect_with(&["list"], &theirs).unwrap();
        assert!(client.contains("http://127.0.0.1:1/\""), "{client}");
        assert!(client.contains("info@ungleich.ch") && client.contains("Seed("), "{client}");
        assert!(!client.contains("PZKB"), "{client}");
        // flags beat OTPGATE_*, which beats theirs
        let mut all = vec![("OTPGATE_AUTH_NAME", "ours"), ("OTPGATE_AUTH_TOKEN", "123456")];
        all.extend(theirs);
        let client = connect_with(&["list"], &all).unwrap();
        assert!(client.contains("\"ours\"") && client.contains("Token("), "{client}");
        let client =
            connect_with(&["list", "--auth-name", "flag", "--auth-seed", "AAAA"], &all).unwrap();
        assert!(client.contains("\"flag\"") && client.contains("Seed("), "{client}");
        let missing = connect_with(&["list"], &theirs[1..]).unwrap_err();
        assert!(missing.contains("--server-url") && missing.contains("UNGLEICHOTPSERVER"));
        let bad = connect_with(&["list", "--auth-seed", "1!"], &theirs).unwrap_err();
        assert_eq!(bad, "the seed is not base32");
    }

    #[test]
    fn entries_are_printed_in_columns() {
        let entry = |json: Value| serde_json::from_value::<ShownEntry>(json).unwrap();
        let entries = [
            entry(json!({"id": 1, "name": "ü", "realm": "users", "seed": "AAAA"})),
            entry(json!({"name": "\u{1b}[2J", "realm": "r"})),
        ];
        assert_eq!(
            table(&entries, false),
            "ID  REALM  NAME\n1   users  ü\n-   r      \\u{1b}[2J\n"
        );
        assert!(table(&entries, true).contains("1   users  ü          AAAA\n"));
        let broken =
            entry(json!({"id": 5, "name": "a", "realm": "r", "seed": null, "error": "E."}));
        assert_eq!(table(&[broken], true), "ID  REALM  NAME  SEED\n5   r      a     -\n5: E.\n");
        let full =
            entry(json!({"id": 1, "name": "a", "realm": "b", "digits": 6, "expires_at": null}));
        assert_eq!(
            one(&full, false),
            "id                  1\nname                a\nrealm               b\ndigits              6\n"
        );
    }
}
