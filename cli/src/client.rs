//! Talks to a daemon's admin socket: one HTTP request with a JSON answer over a unix socket.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::Value;

use crate::failure::Failure;

/// Longest answer that is read: a listing of a million points stays below it.
const ANSWER_BYTES_MAX: usize = 512 << 20;

/// A daemon behind its admin socket.
pub struct Daemon {
    socket: PathBuf,
    role: &'static str,
}

impl Daemon {
    /// The agent at `socket`.
    #[must_use]
    pub fn agent(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), role: "agent" }
    }

    /// The target at `socket`.
    #[must_use]
    pub fn target(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), role: "target" }
    }

    /// Asks for a document.
    ///
    /// # Errors
    /// [`Failure`] as the daemon says it, or when it does not answer.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.request(Method::GET, path, Bytes::new(), None)
    }

    /// As [`Self::get`], but gives up after `limit`.
    ///
    /// # Errors
    /// As [`Self::get`], and when the time is over.
    pub fn get_within(&self, path: &str, limit: Duration) -> Result<Value> {
        self.request(Method::GET, path, Bytes::new(), Some(limit))
    }

    /// Orders something; waits for the end.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn post(&self, path: &str, body: &impl Serialize) -> Result<Value> {
        let body = serde_json::to_vec(body).context("encode the request")?;
        self.request(Method::POST, path, Bytes::from(body), None)
    }

    /// As [`Self::post`], but gives up after `limit`.
    ///
    /// # Errors
    /// As [`Self::get`], and when the time is over.
    pub fn post_within(&self, path: &str, body: &impl Serialize, limit: Duration) -> Result<Value> {
        let body = serde_json::to_vec(body).context("encode the request")?;
        self.request(Method::POST, path, Bytes::from(body), Some(limit))
    }

    fn request(&self, method: Method, path: &str, body: Bytes, limit: Option<Duration>) -> Result<Value> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        runtime.block_on(async {
            let work = self.exchange(method, path, body);
            match limit {
                None => work.await,
                Some(limit) => tokio::time::timeout(limit, work)
                    .await
                    .map_err(|_| Failure::failed(self.role, format!("no answer within {limit:?}")))?,
            }
        })
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Value> {
        let stream = tokio::net::UnixStream::connect(&self.socket).await.map_err(|error| {
            Failure::failed(format!("{} at {}", self.role, self.socket.display()), format!("cannot connect: {error}"))
                .hint(format!("start it with `farshore {} run`, or name its socket with --socket", self.role))
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("greet the daemon")?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "farshore")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .context("make the request")?;
        let response = sender.send_request(request).await.context("ask the daemon")?;
        let status = response.status();
        let body = http_body_util::Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| Failure::failed(self.role, format!("the answer broke off: {error}")))?
            .to_bytes();
        drop(sender);
        drop(driver);
        let answer: Value =
            if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).context("read the answer")? };
        if status.is_success() { Ok(answer) } else { Err(Failure::from_answer(&answer, status.as_u16()).into()) }
    }
}
