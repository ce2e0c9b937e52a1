//! PostgreSQL in a folder, for the end-to-end tests and the benchmark of bytes on the wire.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::run::{LIMIT, Ran, find, run_within, text};

/// A database that replays and checks takes its time on a busy machine.
pub const DATABASE_LIMIT: Duration = Duration::from_secs(180);

/// A PostgreSQL cluster in a folder, run by user postgres, reachable over a unix socket in it.
#[derive(Debug)]
pub struct Cluster {
    data: PathBuf,
    sockets: PathBuf,
    running: bool,
}

impl Cluster {
    /// In `data`; sockets and logs lie in `sockets`, which must not be on the volume.
    #[must_use]
    pub fn new(data: PathBuf, sockets: PathBuf) -> Self {
        Self { data, sockets, running: false }
    }

    /// A program of PostgreSQL as user postgres.
    ///
    /// # Errors
    /// It is missing.
    pub fn program(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(find("setpriv", "util-linux")?);
        command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--"]);
        command.arg(find(name, "postgresql")?);
        command
            .env("PGHOST", &self.sockets)
            .env("PGDATABASE", "postgres")
            .env("LC_ALL", "C")
            .current_dir(&self.sockets);
        Ok(command)
    }

    /// Runs a program of PostgreSQL to its end, within [`DATABASE_LIMIT`].
    ///
    /// # Errors
    /// It is missing or takes too long.
    pub fn run(&self, name: &str, args: &[&str]) -> Result<Ran> {
        run_within(self.program(name)?.args(args), DATABASE_LIMIT)
    }

    /// `initdb`, with a small configuration that checkpoints often.
    ///
    /// # Errors
    /// Those of the program and the file.
    pub fn create(&self) -> Result<()> {
        let data = text(&self.data)?;
        self.run("initdb", &["-D", data, "-A", "trust", "-k", "--no-instructions"])?.ok()?;
        let settings = format!(
            "listen_addresses = ''\nunix_socket_directories = '{}'\nshared_buffers = 32MB\nmin_wal_size = 32MB\n\
             max_wal_size = 64MB\ncheckpoint_timeout = 30s\nmax_connections = 20\nautovacuum_naptime = 5s\n",
            self.sockets.display()
        );
        let path = self.data.join("postgresql.conf");
        std::fs::write(&path, settings).context("write postgresql.conf")
    }

    /// Starts the server and waits until it answers.
    ///
    /// # Errors
    /// With its log.
    pub fn start(&mut self) -> Result<()> {
        let log = self.sockets.join("postgres.log");
        // A lock file of another life, with a process number that somebody else may have by now.
        let _ = std::fs::remove_file(self.sockets.join(".s.PGSQL.5432.lock"));
        let started = self.run("pg_ctl", &["-D", text(&self.data)?, "-l", text(&log)?, "-w", "-t", "120", "start"]);
        self.running = true;
        started?.ok().with_context(|| std::fs::read_to_string(&log).unwrap_or_default()).map(drop)
    }

    /// Stops the server with a checkpoint.
    ///
    /// # Errors
    /// It does not stop.
    pub fn stop(&mut self) -> Result<()> {
        self.run("pg_ctl", &["-D", text(&self.data)?, "-w", "-t", "120", "-m", "fast", "stop"])?.ok()?;
        self.running = false;
        Ok(())
    }

    /// What a statement gives, without decoration.
    ///
    /// # Errors
    /// The server's.
    pub fn sql(&self, statement: &str) -> Result<String> {
        self.run("psql", &["-qAtX", "-v", "ON_ERROR_STOP=1", "-c", statement])?.ok()
    }

    /// Lets a cluster that was found in `data` use the socket folder of this life in place of its old one.
    ///
    /// # Errors
    /// Of the configuration file.
    pub fn redirect(&self) -> Result<()> {
        let line = format!("unix_socket_directories = '{}'\n", self.sockets.display());
        let path = self.data.join("postgresql.conf");
        let mut file = std::fs::File::options().append(true).open(&path).context("open postgresql.conf")?;
        file.write_all(line.as_bytes()).context("write postgresql.conf")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.running {
            let _ = self.run("pg_ctl", &["-D", &self.data.to_string_lossy(), "-m", "immediate", "stop"]);
        }
    }
}

fn own_by_postgres(path: &Path) -> Result<()> {
    run_within(Command::new("chown").args(["postgres:postgres", text(path)?]), LIMIT)?.ok().map(drop)
}

/// Makes a folder that user postgres owns, below one that it can reach.
///
/// # Errors
/// It cannot be made, or there is no such user.
pub fn folder_of_postgres(path: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
    own_by_postgres(path)?;
    Ok(path.to_owned())
}
