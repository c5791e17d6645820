//! What there is to type after `otpgate client`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::entry::Keep;
use crate::secret::Secret;

/// Arguments of `otpgate client`.
#[derive(Args, Debug)]
pub struct ClientArgs {
    #[command(flatten)]
    pub(super) server: ServerArgs,
    #[command(subcommand)]
    pub(super) command: ClientCommand,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Server and caller")]
pub(super) struct ServerArgs {
    /// The server, such as https://otp.example or unix:/run/otpgate/api.sock [env: OTPGATE_SERVER_URL, UNGLEICHOTPSERVER]
    #[arg(long, global = true, value_name = "URL")]
    pub(super) server_url: Option<String>,
    /// Certificates (PEM) that may have signed the server's [default: the system's]
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) ca_file: Option<PathBuf>,
    /// The certificate (PEM, with its chain) for servers that ask for one
    #[arg(long, global = true, value_name = "FILE", requires = "key_file")]
    pub(super) cert_file: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, global = true, value_name = "FILE", requires = "cert_file")]
    pub(super) key_file: Option<PathBuf>,
    /// The caller's name [env: OTPGATE_AUTH_NAME, UNGLEICHOTPNAME]
    #[arg(long, global = true, value_name = "NAME")]
    pub(super) auth_name: Option<String>,
    /// The caller's realm [env: OTPGATE_AUTH_REALM, UNGLEICHOTPREALM]
    #[arg(long, global = true, value_name = "REALM")]
    pub(super) auth_realm: Option<String>,
    /// The caller's seed; others of this machine see it in the process list: better a file, a variable,
    /// or, without any of these, the terminal [env: OTPGATE_AUTH_SEED, UNGLEICHOTPSEED]
    #[arg(long, global = true, value_name = "SEED", value_parser = secret,
          conflicts_with_all = ["auth_seed_file", "auth_token"])]
    pub(super) auth_seed: Option<Secret>,
    /// A file that holds the caller's seed, `-` for standard input [env: OTPGATE_AUTH_SEED_FILE]
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "auth_token")]
    pub(super) auth_seed_file: Option<PathBuf>,
    /// The caller's current token, instead of its seed [env: OTPGATE_AUTH_TOKEN]
    #[arg(long, global = true, value_name = "TOKEN", value_parser = secret)]
    pub(super) auth_token: Option<Secret>,
    /// Print JSON, for machines
    #[arg(long, global = true)]
    pub(super) json: bool,
}

#[derive(Subcommand, Debug)]
pub(super) enum ClientCommand {
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
        /// Show its QR code too, for an authenticator app; on a terminal
        #[arg(long, conflicts_with = "json")]
        qr: bool,
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
        /// Show the QR code of the new seed too; on a terminal
        #[arg(long, conflicts_with = "json")]
        qr: bool,
    },
    /// Print the otpauth:// URI of an entry, which authenticator apps take over; it holds the seed
    Uri {
        #[command(flatten)]
        which: Which,
    },
    /// Show the QR code of that URI on a terminal, or write it into a file
    Qr {
        #[command(flatten)]
        which: Which,
        /// A new file for it, which only you can read
        #[arg(long, value_name = "FILE", required_if_eq("json", "true"))]
        svg: Option<PathBuf>,
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
pub(super) struct Which {
    /// Its number, as `list` shows it
    #[arg(long, conflicts_with_all = ["name", "realm"], required_unless_present = "name")]
    pub(super) id: Option<u64>,
    /// Its name
    #[arg(long, requires = "realm")]
    pub(super) name: Option<String>,
    /// Its realm
    #[arg(long, requires = "name")]
    pub(super) realm: Option<String>,
}

/// Settings of an entry. An empty text takes the realm's setting, or none.
#[derive(Args, Debug)]
#[command(next_help_heading = "Settings of the entry (\"\": as its realm, or none)")]
pub(super) struct FieldArgs {
    /// SHA1, SHA256 or SHA512
    #[arg(long)]
    pub(super) algorithm: Option<String>,
    /// Digits of its tokens, 6 to 8
    #[arg(long)]
    pub(super) digits: Option<String>,
    /// Seconds of a time step, 5 to 3600
    #[arg(long)]
    pub(super) period: Option<String>,
    /// Whether its tokens are accepted
    #[arg(long)]
    pub(super) enabled: Option<bool>,
    /// When it ends, such as 2030-12-31T23:59:59Z
    #[arg(long, value_name = "TIME")]
    pub(super) expires_at: Option<String>,
    /// A remark for people
    #[arg(long)]
    pub(super) comment: Option<String>,
}

impl FieldArgs {
    pub(super) fn into_json(self) -> Map<String, Value> {
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

#[allow(clippy::unnecessary_wraps, reason = "clap's form of a value parser")]
fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text.to_owned()))
}
