//! A small blocking NBD client, for tests and demonstrations: fixed newstyle, simple and structured replies,
//! `base:allocation`, any number of requests in flight.
//!
//! It trusts the server no further than a test may: lengths from the wire are limited, a breach of the protocol is
//! `InvalidData`. A server's error number becomes the [`io::Error`] of that number.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::proto::{RequestHeader, take};
use crate::wire::{self, chunk, command, flag, handshake, info, option, reply};

/// A connected stream.
pub trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// What to ask for in the handshake.
#[derive(Clone, Debug)]
pub struct Options {
    /// Export; empty: the default one.
    pub export: String,
    /// Negotiate structured replies.
    pub structured: bool,
    /// Select `base:allocation` (needs structured replies).
    pub allocation: bool,
    /// End with `EXPORT_NAME`, as old clients do, instead of `GO`.
    pub export_name: bool,
    /// Spare the 124 zero bytes after `EXPORT_NAME`.
    pub no_zeroes: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { export: String::new(), structured: true, allocation: true, export_name: false, no_zeroes: true }
    }
}

/// What the server said of the export.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct ExportInfo {
    /// Bytes.
    pub size: u64,
    /// [`wire::transmission`].
    pub flags: u16,
    /// Canonical name, if told.
    pub name: Option<String>,
    /// If told.
    pub description: Option<String>,
    /// Minimum, preferred and maximum request in bytes, if told.
    pub block_sizes: Option<[u32; 3]>,
    /// Block status can be asked for.
    pub allocation: bool,
}

/// The end of one request.
#[derive(Debug)]
pub struct Reply {
    /// As returned by [`Client::submit`].
    pub cookie: u64,
    /// The server's error, if any.
    pub result: io::Result<()>,
    /// Of a read.
    pub data: Vec<u8>,
    /// Of a block status: length in bytes and `base:allocation` flags.
    pub extents: Vec<(u32, u32)>,
}

/// A connection in the transmission phase.
pub struct Client {
    stream: Box<dyn Stream>,
    info: ExportInfo,
    structured: bool,
    next_cookie: u64,
    /// Requests in flight.
    open: HashMap<u64, RequestHeader>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("info", &self.info).field("in_flight", &self.open.len()).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to a unix socket.
    ///
    /// # Errors
    /// Of the socket, and as [`Self::over`].
    pub fn connect_unix(path: &Path, options: &Options) -> io::Result<Self> {
        Self::over(UnixStream::connect(path)?, options)
    }

    /// Connects to a TCP port.
    ///
    /// # Errors
    /// Of the socket, and as [`Self::over`].
    pub fn connect_tcp(address: impl ToSocketAddrs, options: &Options) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Self::over(stream, options)
    }

    /// Connects to an NBD URI: `nbd+unix:///NAME?socket=PATH` or `nbd://HOST:PORT/NAME`. The URI's name overrides the options'.
    ///
    /// # Errors
    /// `InvalidInput`: not such a URI; else as the others.
    pub fn connect_uri(uri: &str, options: &Options) -> io::Result<Self> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{uri:?} is not a supported NBD URI"));
        let (scheme, rest) = uri.split_once("://").ok_or_else(invalid)?;
        let (authority, rest) = rest.split_once('/').unwrap_or((rest, ""));
        let (name, query) = rest.split_once('?').unwrap_or((rest, ""));
        let options = Options { export: percent_decode(name).ok_or_else(invalid)?, ..options.clone() };
        match scheme {
            "nbd+unix" => {
                let path = query.split('&').find_map(|pair| pair.strip_prefix("socket=")).ok_or_else(invalid)?;
                Self::connect_unix(Path::new(&percent_decode(path).ok_or_else(invalid)?), &options)
            }
            "nbd" if authority.contains(':') => Self::connect_tcp(authority, &options),
            "nbd" => Self::connect_tcp((authority, 10809), &options),
            _ => Err(invalid()),
        }
    }

    /// Does the handshake over a connected stream.
    ///
    /// # Errors
    /// Of the stream; `InvalidData`: the server breaks the protocol; `NotFound`: it has no such export.
    pub fn over(mut stream: impl Stream + 'static, options: &Options) -> io::Result<Self> {
        let greeting = read_array::<18>(&mut stream)?;
        let (magic, rest) = take(&greeting);
        let (style, rest) = take(rest);
        let offered = u16::from_be_bytes(take(rest).0);
        if (u64::from_be_bytes(magic), u64::from_be_bytes(style)) != (wire::GREETING_MAGIC, wire::OPTION_MAGIC) {
            return Err(broken("not a newstyle greeting"));
        }
        let mut flags = handshake::FIXED_NEWSTYLE;
        if options.no_zeroes {
            flags |= offered & handshake::NO_ZEROES;
        }
        stream.write_all(&u32::from(flags).to_be_bytes())?;
        let mut client = Self {
            stream: Box::new(stream),
            info: ExportInfo::default(),
            structured: false,
            next_cookie: 1,
            open: HashMap::new(),
        };
        client.haggle(options, flags)?;
        Ok(client)
    }

    fn haggle(&mut self, options: &Options, flags: u16) -> io::Result<()> {
        if options.structured {
            self.structured = self.option(option::STRUCTURED_REPLY, &[])?.is_ok();
        }
        if options.allocation && self.structured {
            let mut data = string(&options.export);
            data.extend_from_slice(&1u32.to_be_bytes());
            data.extend(string(wire::BASE_ALLOCATION));
            let contexts = self.option(option::SET_META_CONTEXT, &data)?;
            self.info.allocation = contexts.is_ok_and(|replies| !replies.is_empty());
        }
        if options.export_name {
            return self.export_name(&options.export, flags);
        }
        let mut data = string(&options.export);
        data.extend_from_slice(&3u16.to_be_bytes());
        for kind in [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE] {
            data.extend_from_slice(&kind.to_be_bytes());
        }
        let replies = self.option(option::GO, &data)?.map_err(|error| {
            let kind = if error == reply::ERR_UNKNOWN { io::ErrorKind::NotFound } else { io::ErrorKind::Other };
            io::Error::new(kind, format!("the server refuses export {:?} ({error:#x})", options.export))
        })?;
        replies.iter().try_for_each(|(_, data)| self.take_info(data))
    }

    fn export_name(&mut self, name: &str, flags: u16) -> io::Result<()> {
        self.send_option(option::EXPORT_NAME, name.as_bytes())?;
        let answer = read_array::<10>(&mut self.stream)?;
        let (size, rest) = take(&answer);
        self.info.size = u64::from_be_bytes(size);
        self.info.flags = u16::from_be_bytes(take(rest).0);
        if flags & handshake::NO_ZEROES == 0 && read_array::<124>(&mut self.stream)? != [0; 124] {
            return Err(broken("the zeroes after EXPORT_NAME"));
        }
        Ok(())
    }

    fn take_info(&mut self, data: &[u8]) -> io::Result<()> {
        let (kind, rest) = data.split_first_chunk::<2>().ok_or_else(|| broken("a short information"))?;
        let text = || Some(String::from_utf8_lossy(rest).into_owned());
        match (u16::from_be_bytes(*kind), rest.len()) {
            (info::EXPORT, 10) => {
                let (size, rest) = take(rest);
                self.info.size = u64::from_be_bytes(size);
                self.info.flags = u16::from_be_bytes(take(rest).0);
            }
            (info::NAME, _) => self.info.name = text(),
            (info::DESCRIPTION, _) => self.info.description = text(),
            (info::BLOCK_SIZE, 12) => {
                let (min, rest) = take(rest);
                let (preferred, rest) = take(rest);
                self.info.block_sizes = Some([min, preferred, take(rest).0].map(u32::from_be_bytes));
            }
            _ => {}
        }
        Ok(())
    }

    /// One option and its replies (kind and data) up to the acknowledgement, or the error's number.
    #[expect(clippy::type_complexity, reason = "used twice, right here")]
    fn option(&mut self, option: u32, data: &[u8]) -> io::Result<Result<Vec<(u32, Vec<u8>)>, u32>> {
        self.send_option(option, data)?;
        let mut replies = Vec::new();
        loop {
            let head = read_array::<{ wire::OPTION_REPLY_LEN }>(&mut self.stream)?;
            let (magic, rest) = take(&head);
            let (echo, rest) = take(rest);
            let (kind, rest) = take(rest);
            let kind = u32::from_be_bytes(kind);
            if u64::from_be_bytes(magic) != wire::OPTION_REPLY_MAGIC || u32::from_be_bytes(echo) != option {
                return Err(broken("an option reply"));
            }
            let data = read_vec(&mut self.stream, u32::from_be_bytes(take(rest).0))?;
            match kind {
                reply::ACK => return Ok(Ok(replies)),
                error if error & (1 << 31) != 0 => return Ok(Err(error)),
                kind => replies.push((kind, data)),
            }
        }
    }

    fn send_option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).map_err(|_| broken("option data"))?;
        let head = [&wire::OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes()].concat();
        self.stream.write_all(&[&head, data].concat())
    }

    /// What the server said of the export.
    #[must_use]
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.open.len()
    }

    /// Sends a request ([`wire::command`], [`wire::flag`]) without waiting; returns its cookie. `payload` of a write: `len` bytes.
    ///
    /// # Errors
    /// Of the stream. With very many requests in flight and none received, both sides can wait for each other: receive.
    pub fn submit(&mut self, kind: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let header = RequestHeader { flags, kind, cookie, offset, len };
        self.stream.write_all(&header.encode())?;
        self.stream.write_all(payload)?;
        self.open.insert(cookie, header);
        Ok(cookie)
    }

    /// Waits for the end of any request in flight.
    ///
    /// # Errors
    /// Of the stream; `InvalidData`: the server breaks the protocol. Errors of the request are in the reply.
    pub fn receive(&mut self) -> io::Result<Reply> {
        let mut unfinished: Option<Reply> = None;
        loop {
            let magic = u32::from_be_bytes(read_array(&mut self.stream)?);
            match magic {
                wire::SIMPLE_REPLY_MAGIC => return self.simple_reply(),
                wire::CHUNK_MAGIC if self.structured => {}
                _ => return Err(broken("a reply's magic")),
            }
            let head = read_array::<16>(&mut self.stream)?;
            let (flags, rest) = take(&head);
            let (kind, rest) = take(rest);
            let (cookie, rest) = take(rest);
            let (kind, cookie) = (u16::from_be_bytes(kind), u64::from_be_bytes(cookie));
            let len = u32::from_be_bytes(take(rest).0);
            let reply = match &mut unfinished {
                Some(reply) if reply.cookie == cookie => reply,
                Some(_) => return Err(broken("chunks of two replies, mixed")),
                None => unfinished.insert(self.new_reply(cookie)?),
            };
            let payload = read_vec(&mut self.stream, len)?;
            let start = self.open.get(&cookie).map_or(0, |request| request.offset);
            take_chunk(reply, kind, start, &payload)?;
            if u16::from_be_bytes(flags) & chunk::DONE != 0 {
                self.open.remove(&cookie);
                return unfinished.ok_or_else(|| broken("a reply"));
            }
        }
    }

    fn new_reply(&self, cookie: u64) -> io::Result<Reply> {
        let request = self.open.get(&cookie).ok_or_else(|| broken("a reply's cookie"))?;
        let len = if request.kind == command::READ { request.len } else { 0 };
        let data = vec![0; usize::try_from(len).map_err(|_| broken("a length"))?];
        Ok(Reply { cookie, result: Ok(()), data, extents: Vec::new() })
    }

    fn simple_reply(&mut self) -> io::Result<Reply> {
        let head = read_array::<12>(&mut self.stream)?;
        let (error, rest) = take(&head);
        let error = u32::from_be_bytes(error);
        let mut reply = self.new_reply(u64::from_be_bytes(take(rest).0))?;
        self.open.remove(&reply.cookie);
        if error != 0 {
            reply.result = Err(host_error(error));
            reply.data.clear();
        } else if self.structured && !reply.data.is_empty() {
            return Err(broken("a simple reply to a read after structured replies were agreed"));
        } else {
            self.stream.read_exact(&mut reply.data)?;
        }
        Ok(reply)
    }

    fn call(&mut self, kind: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> io::Result<Reply> {
        let cookie = self.submit(kind, flags, offset, len, payload)?;
        let reply = self.receive()?;
        if reply.cookie != cookie {
            return Err(io::Error::other("another request was in flight; use submit and receive"));
        }
        match reply.result {
            Ok(()) => Ok(reply),
            Err(error) => Err(error),
        }
    }

    /// Reads `len` bytes at `offset`.
    ///
    /// # Errors
    /// The server's, or of the stream.
    pub fn read(&mut self, offset: u64, len: u32) -> io::Result<Vec<u8>> {
        Ok(self.call(command::READ, 0, offset, len, &[])?.data)
    }

    /// Writes at `offset`; `fua`: durable on return.
    ///
    /// # Errors
    /// The server's, or of the stream.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        let len = u32::try_from(data.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.call(command::WRITE, if fua { flag::FUA } else { 0 }, offset, len, data).map(|_| ())
    }

    /// Makes everything that was answered before durable.
    ///
    /// # Errors
    /// The server's, or of the stream.
    pub fn flush(&mut self) -> io::Result<()> {
        self.call(command::FLUSH, 0, 0, 0, &[]).map(|_| ())
    }

    /// Gives a range back.
    ///
    /// # Errors
    /// The server's, or of the stream.
    pub fn trim(&mut self, offset: u64, len: u32, fua: bool) -> io::Result<()> {
        self.call(command::TRIM, if fua { flag::FUA } else { 0 }, offset, len, &[]).map(|_| ())
    }

    /// Zeroes a range; `flags` of [`flag::FUA`], [`flag::NO_HOLE`], [`flag::FAST_ZERO`].
    ///
    /// # Errors
    /// The server's, or of the stream.
    pub fn zeroes(&mut self, offset: u64, len: u32, flags: u16) -> io::Result<()> {
        self.call(command::WRITE_ZEROES, flags, offset, len, &[]).map(|_| ())
    }

    /// How a range is stored: lengths in bytes and `base:allocation` flags; may cover less than asked for.
    ///
    /// # Errors
    /// The server's, or of the stream.
    pub fn block_status(&mut self, offset: u64, len: u32, one: bool) -> io::Result<Vec<(u32, u32)>> {
        Ok(self.call(command::BLOCK_STATUS, if one { flag::REQ_ONE } else { 0 }, offset, len, &[])?.extents)
    }

    /// Says goodbye and waits for the server to close, so that everything in flight has ended.
    ///
    /// # Errors
    /// Of the stream.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.submit(command::DISC, 0, 0, 0, &[])?;
        io::copy(&mut self.stream, &mut io::sink()).map(|_| ())
    }
}

fn take_chunk(reply: &mut Reply, kind: u16, start: u64, payload: &[u8]) -> io::Result<()> {
    let short = || broken("a short chunk");
    match kind {
        chunk::NONE => {}
        chunk::OFFSET_DATA | chunk::OFFSET_HOLE => {
            let (offset, rest) = payload.split_first_chunk::<8>().ok_or_else(short)?;
            let at = u64::from_be_bytes(*offset).checked_sub(start).ok_or_else(|| broken("an offset"))?;
            let len = match rest.first_chunk::<4>() {
                Some(len) if kind == chunk::OFFSET_HOLE => u64::from(u32::from_be_bytes(*len)),
                _ => u64::try_from(rest.len()).map_err(|_| short())?,
            };
            let range = usize::try_from(at).and_then(|at| Ok(at..at.saturating_add(usize::try_from(len)?)));
            let range = range.map_err(|_| short())?;
            let place = reply.data.get_mut(range).ok_or_else(|| broken("data outside of the request"))?;
            if kind == chunk::OFFSET_DATA { place.copy_from_slice(rest) } else { place.fill(0) }
        }
        chunk::BLOCK_STATUS => {
            let (_, rest) = payload.split_first_chunk::<4>().ok_or_else(short)?;
            let number = |bytes: &[u8]| u32::from_be_bytes(take(bytes).0);
            reply.extents.extend(rest.chunks_exact(8).map(|extent| (number(extent), number(&extent[4..]))));
        }
        chunk::ERROR | chunk::ERROR_OFFSET => {
            let error = payload.first_chunk::<4>().ok_or_else(short)?;
            reply.result = Err(host_error(u32::from_be_bytes(*error)));
            reply.data.clear();
        }
        _ => return Err(broken("a chunk's type")),
    }
    Ok(())
}

fn host_error(error: u32) -> io::Error {
    io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(nix::libc::EIO))
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server breaks the NBD protocol: {what}"))
}

fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    [&len.to_be_bytes()[..], text.as_bytes()].concat()
}

fn read_array<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_vec(stream: &mut impl Read, len: u32) -> io::Result<Vec<u8>> {
    if len > wire::PAYLOAD_MAX + 64 {
        return Err(broken("a length"));
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| broken("a length"))?];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digits = [bytes.next()?, bytes.next()?];
        out.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
    }
    String::from_utf8(out).ok()
}
