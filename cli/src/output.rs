//! Text for people, JSON for programs.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

/// How a command prints.
pub(crate) struct Output {
    json: bool,
}

impl Output {
    /// JSON or text.
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether JSON was asked for.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// One JSON document on a line of its own. A closed pipe ends the program quietly.
    pub(crate) fn document(&self, value: &Value) {
        self.line(&value.to_string());
    }

    /// One line of text. A closed pipe ends the program quietly.
    pub(crate) fn line(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
            std::process::exit(0);
        }
    }

    /// `value` as JSON, or what `text` makes of it.
    pub(crate) fn show(&self, value: &Value, text: impl FnOnce(&Value) -> String) {
        if self.json { self.document(value) } else { self.line(text(value).trim_end()) }
    }

    /// A progress bar over `total` bytes: on a terminal a bar with rate and ETA, else a plain line every five seconds,
    /// with `--json` nothing.
    pub(crate) fn progress(&self, what: &str, total: u64) -> Progress {
        let bar = (!self.json && std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(total).with_style(style).with_message(what.to_owned())
        });
        Progress { bar, quiet: self.json, what: what.to_owned(), printed: None }
    }
}

/// A progress display.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
    what: String,
    printed: Option<std::time::Instant>,
}

impl Progress {
    /// Shows the state now.
    pub(crate) fn set(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        } else if !self.quiet && self.printed.is_none_or(|at| at.elapsed() >= Duration::from_secs(5)) {
            self.printed = Some(std::time::Instant::now());
            let show = farshore_proto::text::show_size;
            eprintln!("{}: {} of {}", self.what, show(done), show(total));
        }
    }

    /// Takes the display away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A table with aligned columns.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|title| title.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut push = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (cell, width) in cells.zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count().min(*width) + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    push(&mut head.iter().copied());
    for row in rows {
        push(&mut row.iter().map(String::as_str));
    }
    text
}

/// A field as text: `-` where there is none.
pub(crate) fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

/// A field in bytes as text.
pub(crate) fn size(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".into(), farshore_proto::text::show_size)
}

/// A field in seconds as text.
pub(crate) fn seconds(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".into(), |seconds| format!("{seconds:.2} s"))
}
