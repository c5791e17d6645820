//! A real nginx as upstream, on a Unix socket: no port can be taken in between.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use tokio::net::UnixStream;

use super::until;

/// A running nginx; it is killed when dropped.
pub(crate) struct Nginx {
    pub(crate) socket: PathBuf,
    process: Child,
    _folder: TempDir,
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Nginx {
    /// Starts nginx with these lines in its `server` block.
    pub(crate) async fn start(server: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().display();
        let config = format!(
            "daemon off; master_process off; pid {at}/pid; error_log {at}/error.log;\n\
             events {{}}\n\
             http {{ access_log off; client_body_temp_path {at}/body; proxy_temp_path {at}/p;\n\
             fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
             client_max_body_size 0; server {{ listen unix:{at}/socket; {server} }} }}\n"
        );
        let file = folder.path().join("nginx.conf");
        std::fs::write(&file, config).unwrap();
        let process = Command::new("nginx")
            .arg("-e")
            .arg(folder.path().join("error.log"))
            .arg("-c")
            .arg(&file)
            .arg("-p")
            .arg(folder.path())
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx is installed");
        let socket = folder.path().join("socket");
        let nginx = Self { socket: socket.clone(), process, _folder: folder };
        until("nginx answers", || async { UnixStream::connect(&socket).await.is_ok() }).await;
        nginx
    }
}
