//! Long commands show how far they are: a bar on a terminal, plain lines elsewhere.

use std::process::{Command, Stdio};

use crate::harness::{python, stderr, stdout};
use crate::store_rig::{Rig, entry, who};

/// Runs a command on a terminal of its own; what that shows.
const TERMINAL: &str = "
import os, pty, sys
shown = []
def read(fd):
    data = os.read(fd, 65536)
    shown.append(data)
    return data
status = pty.spawn(sys.argv[1:], read)
sys.exit(os.waitstatus_to_exitcode(status))
";

/// What `otpgate store` with these arguments shows on a terminal, and its exit code.
async fn on_terminal(rig: &Rig, args: &[&str]) -> (String, Option<i32>) {
    let command = rig.command(args);
    let mut terminal = Command::new(python().await);
    terminal.args(["-c", TERMINAL]).arg(command.get_program()).args(command.get_args());
    terminal.env("TERM", "xterm").stdin(Stdio::null());
    let output = tokio::task::block_in_place(|| terminal.output().unwrap());
    assert_eq!(stderr(&output), "");
    (stdout(&output), output.status.code())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminals_show_a_bar_and_pipes_none() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    let entries: Vec<_> = (1..=1_000).map(|n| entry(n, who(&format!("n{n}"), "r"))).collect();
    store.insert(&entries).await.unwrap();
    let (file, new) = (rig.path("file"), Rig::sqlite().await);
    let file = file.to_str().unwrap();
    let other_key = rig.path("sealing.key");
    let import = ["import", file, "--export-key-file", other_key.to_str().unwrap()];
    let commands: [(&Rig, &[&str], &str, &str); 4] = [
        (&rig, &["export", "--output", file], "exporting", "1000 entries exported"),
        (&rig, &["rekey"], "sealing", "0 rekeyed, 1000 already"),
        (&rig, &["verify"], "verifying", "1000 entries at version 1"),
        (&new, &import, "importing", "1000 imported"),
    ];
    for (rig, args, what, result) in commands {
        let (shown, code) = on_terminal(rig, args).await;
        assert_eq!(code, Some(0), "{shown}");
        assert!(
            shown.contains(&format!("{what} ")) && shown.contains("1,000 entries"),
            "{shown:?}"
        );
        assert!(shown.contains(result), "{shown:?}");
        rig.run_command(args);
    }
    for args in [&["export", "--output", file][..], &["rekey"], &["verify"]] {
        let output = rig.run_command(args);
        let (out, err) = (stdout(&output), stderr(&output));
        assert!(err.contains("1000 entries done\n"), "{err}");
        assert!(!out.contains(['\x1b', '\r']) && !err.contains(['\x1b', '\r']), "{out}{err}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_goes_to_a_terminal_only_if_that_is_said() {
    let rig = Rig::sqlite().await;
    rig.ready().await.insert(&[entry(1, who("alice", "r"))]).await.unwrap();
    let (shown, code) = on_terminal(&rig, &["export"]).await;
    assert_eq!(code, Some(2), "{shown}");
    assert!(shown.contains("`--output`") && !shown.contains("alice"), "{shown}");
    let (shown, code) = on_terminal(&rig, &["export", "--output", "-"]).await;
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("\"name\":\"alice\""), "{shown}");
}
