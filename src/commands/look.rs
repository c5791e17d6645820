//! Colours of what people read: on terminals alone, and not where `NO_COLOR` or `TERM=dumb` asks for none.

use std::io;

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};

/// How the parts of a result look; plain unless made for a terminal.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Look {
    /// Heads of columns, names of fields.
    pub(super) heading: Style,
    /// What is as it should be.
    pub(super) good: Style,
    /// What is not.
    pub(super) bad: Style,
}

impl Look {
    /// What suits standard output.
    pub(super) fn of_stdout() -> Self {
        if !has_colours() {
            return Self::default();
        }
        Self {
            heading: Style::new().bold(),
            good: AnsiColor::Green.on_default(),
            bad: AnsiColor::Red.on_default(),
        }
    }
}

/// Whether standard output shows colours.
pub(super) fn has_colours() -> bool {
    AutoStream::choice(&io::stdout()) != ColorChoice::Never
}
