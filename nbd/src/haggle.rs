//! The handshake: fixed newstyle option haggling as a machine over bytes.

use std::sync::Arc;

use crate::proto::{Export, Negotiated, Violation, take};
use crate::wire::{self, handshake, info, option, reply};

/// Longest option data that is looked at, in bytes: a name and a handful of contexts. Longer data are skipped and
/// answered with `ERR_TOO_BIG`.
const DATA_MAX: u32 = 16 << 10;
/// Most options of one handshake; real clients need fewer than ten, a prober of exports some dozens.
const OPTIONS_MAX: u32 = 256;
/// Bytes of unsent replies at which no further option is taken.
const OUTPUT_HIGH: usize = 16 << 10;

/// How a handshake ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Requests follow.
    Transmission(Negotiated),
    /// The client gave up in good order; the reply to that is in the output.
    Aborted,
    /// The connection has to end.
    Refused(Violation),
}

#[derive(Clone, Copy, Debug)]
enum State {
    ClientFlags,
    Option,
    Data { option: u32, len: u32 },
    Skip { option: u32, left: u32 },
}

/// The server's side of one handshake. Performs no I/O.
///
/// Inputs: [`Self::handle_bytes`]. Outputs: [`Self::poll_output`], [`Self::outcome`]. Send all output before acting on the
/// outcome. Memory is bounded by the longest accepted option, and by 16 KiB of unsent answers plus one.
#[derive(Debug)]
pub struct Haggle {
    export: Arc<Export>,
    state: State,
    /// The piece being collected.
    buffer: Vec<u8>,
    output: Vec<u8>,
    no_zeroes: bool,
    negotiated: Negotiated,
    options: u32,
    outcome: Option<Outcome>,
}

impl Haggle {
    /// A new connection; the greeting is in the output.
    #[must_use]
    pub fn new(export: Arc<Export>) -> Self {
        let mut output = Vec::with_capacity(512);
        output.extend_from_slice(&wire::GREETING_MAGIC.to_be_bytes());
        output.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        output.extend_from_slice(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        Self {
            export,
            state: State::ClientFlags,
            buffer: Vec::new(),
            output,
            no_zeroes: false,
            negotiated: Negotiated::default(),
            options: 0,
            outcome: None,
        }
    }

    /// Takes bytes of the client; returns how many. It stops early at the end of the handshake (what follows are
    /// requests) and when much output waits.
    #[must_use]
    pub fn handle_bytes(&mut self, input: &[u8]) -> usize {
        let mut left = input;
        while self.outcome.is_none() && self.output.len() < OUTPUT_HIGH {
            if let State::Skip { option, left: skip } = self.state {
                let taken = left.len().min(usize::try_from(skip).unwrap_or(usize::MAX));
                left = &left[taken..];
                let skip = skip - u32::try_from(taken).expect("at most `skip`, a u32");
                self.state = State::Skip { option, left: skip };
                if skip > 0 {
                    break;
                }
                self.state = State::Option;
                self.answer(option, reply::ERR_TOO_BIG, b"the option's data are too long");
                continue;
            }
            let needed = self.needed();
            let taken = (needed - self.buffer.len()).min(left.len());
            self.buffer.extend_from_slice(&left[..taken]);
            left = &left[taken..];
            if self.buffer.len() < needed {
                break;
            }
            let piece = std::mem::take(&mut self.buffer);
            self.step(&piece);
            self.buffer = piece;
            self.buffer.clear();
        }
        input.len() - left.len()
    }

    /// What is to be sent; empty: nothing.
    #[must_use]
    pub fn poll_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Whether and how the handshake ended.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome
    }

    fn needed(&self) -> usize {
        match self.state {
            State::ClientFlags => 4,
            State::Option => wire::OPTION_LEN,
            State::Data { len, .. } => usize::try_from(len).expect("at most DATA_MAX"),
            State::Skip { .. } => 0,
        }
    }

    fn step(&mut self, piece: &[u8]) {
        match self.state {
            State::ClientFlags => self.client_flags(piece),
            State::Option => self.option_header(piece),
            State::Data { option, .. } => {
                self.state = State::Option;
                self.option(option, piece);
            }
            State::Skip { .. } => {}
        }
    }

    fn client_flags(&mut self, piece: &[u8]) {
        let flags = u32::from_be_bytes(take(piece).0);
        if flags & !u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES) != 0 {
            self.outcome = Some(Outcome::Refused(Violation::ClientFlags(flags)));
            return;
        }
        // Without FIXED_NEWSTYLE a client may only send EXPORT_NAME, which is answered the same way.
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        self.state = State::Option;
    }

    fn option_header(&mut self, piece: &[u8]) {
        let (magic, rest) = take(piece);
        let magic = u64::from_be_bytes(magic);
        let (option, rest) = take(rest);
        let option = u32::from_be_bytes(option);
        let len = u32::from_be_bytes(take(rest).0);
        self.options += 1;
        if magic != wire::OPTION_MAGIC {
            self.outcome = Some(Outcome::Refused(Violation::OptionMagic(magic)));
        } else if self.options > OPTIONS_MAX {
            self.outcome = Some(Outcome::Refused(Violation::Options));
        } else if len <= DATA_MAX {
            self.state = State::Data { option, len };
        } else if option == option::EXPORT_NAME {
            // That option's only answer is the export itself.
            self.outcome = Some(Outcome::Refused(Violation::ExportName));
        } else {
            self.state = State::Skip { option, left: len };
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        match option {
            option::EXPORT_NAME => self.export_name(data),
            option::ABORT => {
                self.answer(option, reply::ACK, &[]);
                self.outcome = Some(Outcome::Aborted);
            }
            option::LIST => self.list(data),
            option::INFO | option::GO => self.info(option, data),
            option::STRUCTURED_REPLY => {
                if data.is_empty() {
                    self.negotiated.structured = true;
                    self.answer(option, reply::ACK, &[]);
                } else {
                    self.answer(option, reply::ERR_INVALID, b"the option has no data");
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, data),
            option::STARTTLS => self.answer(option, reply::ERR_UNSUP, b"TLS is not offered here"),
            _ => self.answer(option, reply::ERR_UNSUP, &[]),
        }
    }

    fn export_name(&mut self, name: &[u8]) {
        if !self.export.answers_to(name) {
            self.outcome = Some(Outcome::Refused(Violation::ExportName));
            return;
        }
        let flags = self.export.flags(self.negotiated.structured);
        self.output.extend_from_slice(&self.export.geometry().size.to_be_bytes());
        self.output.extend_from_slice(&flags.to_be_bytes());
        if !self.no_zeroes {
            self.output.extend_from_slice(&[0; 124]);
        }
        self.outcome = Some(Outcome::Transmission(self.negotiated));
    }

    fn list(&mut self, data: &[u8]) {
        if !data.is_empty() {
            self.answer(option::LIST, reply::ERR_INVALID, b"the option has no data");
            return;
        }
        let name = self.export.name().as_bytes();
        let mut server = Vec::with_capacity(4 + name.len() + self.export.description().len());
        put_string(&mut server, name);
        server.extend_from_slice(self.export.description().as_bytes());
        self.answer(option::LIST, reply::SERVER, &server);
        self.answer(option::LIST, reply::ACK, &[]);
    }

    fn info(&mut self, option: u32, data: &[u8]) {
        let Some((name, wanted)) = parse_info(data) else {
            self.answer(option, reply::ERR_INVALID, b"the option's data do not add up");
            return;
        };
        if !self.export.answers_to(name) {
            self.answer(option, reply::ERR_UNKNOWN, b"no export of this name");
            return;
        }
        let export = Arc::clone(&self.export);
        let mut piece = Vec::with_capacity(16);
        piece.extend_from_slice(&info::EXPORT.to_be_bytes());
        piece.extend_from_slice(&export.geometry().size.to_be_bytes());
        piece.extend_from_slice(&export.flags(self.negotiated.structured).to_be_bytes());
        self.answer(option, reply::INFO, &piece);
        for (kind, text) in [(info::NAME, export.name()), (info::DESCRIPTION, export.description())] {
            if wanted.contains(&kind) {
                self.answer(option, reply::INFO, &[&kind.to_be_bytes(), text.as_bytes()].concat());
            }
        }
        // Unasked, too: a client that ignores it and sends unaligned requests gets EINVAL for those.
        piece.clear();
        piece.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        for size in export.block_sizes() {
            piece.extend_from_slice(&size.to_be_bytes());
        }
        self.answer(option, reply::INFO, &piece);
        self.answer(option, reply::ACK, &[]);
        if option == option::GO {
            self.outcome = Some(Outcome::Transmission(self.negotiated));
        }
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // Whatever the answer, an earlier selection is void.
            self.negotiated.allocation = false;
        }
        if !self.negotiated.structured {
            self.answer(option, reply::ERR_INVALID, b"negotiate structured replies first");
            return;
        }
        let Some((name, queries)) = parse_meta(data) else {
            self.answer(option, reply::ERR_INVALID, b"the option's data do not add up");
            return;
        };
        if !self.export.answers_to(name) {
            self.answer(option, reply::ERR_UNKNOWN, b"no export of this name");
            return;
        }
        let exact = queries.contains(&wire::BASE_ALLOCATION.as_bytes());
        let wildcard = !set && (queries.is_empty() || queries.contains(&b"base:".as_slice()));
        if exact || wildcard {
            let id = if set { wire::BASE_ALLOCATION_ID } else { 0 };
            self.answer(option, reply::META_CONTEXT, &[&id.to_be_bytes(), wire::BASE_ALLOCATION.as_bytes()].concat());
            self.negotiated.allocation |= set;
        }
        self.answer(option, reply::ACK, &[]);
    }

    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).expect("answers are a few kilobytes");
        self.output.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
        self.output.extend_from_slice(&option.to_be_bytes());
        self.output.extend_from_slice(&kind.to_be_bytes());
        self.output.extend_from_slice(&len.to_be_bytes());
        self.output.extend_from_slice(data);
    }
}

/// Name and information kinds of `INFO` and `GO`; `None` unless they are exactly the data.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (name, rest) = split_string(data)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    if rest.len() != usize::from(u16::from_be_bytes(*count)) * 2 {
        return None;
    }
    Some((name, rest.chunks_exact(2).map(|kind| u16::from_be_bytes([kind[0], kind[1]])).collect()))
}

/// Name and queries of the meta context options; `None` unless they are exactly the data.
fn parse_meta(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (name, rest) = split_string(data)?;
    let (count, mut rest) = rest.split_first_chunk::<4>()?;
    let mut queries = Vec::new();
    // Each query has at least its length, so a large count runs out of data soon.
    for _ in 0..u32::from_be_bytes(*count) {
        let (query, after) = split_string(rest)?;
        queries.push(query);
        rest = after;
    }
    rest.is_empty().then_some((name, queries))
}

fn split_string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
    if len > wire::STRING_MAX { None } else { rest.split_at_checked(len) }
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&u32::try_from(text.len()).expect("checked against STRING_MAX").to_be_bytes());
    out.extend_from_slice(text);
}

#[cfg(test)]
mod tests {
    use farshore_uring::Geometry;
    use proptest::prelude::*;

    use super::*;

    fn export() -> Arc<Export> {
        let geometry = Geometry {
            size: 1 << 30,
            logical_block: 512,
            optimal_block: 4096,
            max_request: 1 << 20,
            max_discard: 1 << 30,
            read_only: false,
            discard: true,
        };
        Arc::new(Export::new("disk", "for tests", geometry).expect("a good geometry"))
    }

    fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
        let len = u32::try_from(data.len()).expect("short");
        [&wire::OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), data].concat()
    }

    fn go_data(name: &str, kinds: &[u16]) -> Vec<u8> {
        let mut data = Vec::new();
        put_string(&mut data, name.as_bytes());
        data.extend_from_slice(&u16::try_from(kinds.len()).expect("short").to_be_bytes());
        kinds.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
        data
    }

    fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut data = Vec::new();
        put_string(&mut data, name.as_bytes());
        data.extend_from_slice(&u32::try_from(queries.len()).expect("short").to_be_bytes());
        queries.iter().for_each(|query| put_string(&mut data, query.as_bytes()));
        data
    }

    /// Feeds client flags and then options; returns the kinds of the replies to each option, and the machine.
    fn haggle(flags: u32, options: &[(u32, Vec<u8>)]) -> (Vec<Vec<u32>>, Haggle) {
        let mut machine = Haggle::new(export());
        assert_eq!(machine.poll_output().len(), 18, "the greeting");
        assert_eq!(machine.handle_bytes(&flags.to_be_bytes()), 4);
        let mut kinds = Vec::new();
        for (option, data) in options {
            let bytes = option_bytes(*option, data);
            assert_eq!(machine.handle_bytes(&bytes), bytes.len());
            if *option == option::EXPORT_NAME {
                continue;
            }
            kinds.push(reply_kinds(&machine.poll_output(), *option));
        }
        (kinds, machine)
    }

    fn reply_kinds(mut output: &[u8], option: u32) -> Vec<u32> {
        let mut kinds = Vec::new();
        while !output.is_empty() {
            let (magic, rest) = take(output);
            assert_eq!(u64::from_be_bytes(magic), wire::OPTION_REPLY_MAGIC);
            let (echoed, rest) = take(rest);
            assert_eq!(u32::from_be_bytes(echoed), option);
            let (kind, rest) = take(rest);
            let (len, rest) = take(rest);
            kinds.push(u32::from_be_bytes(kind));
            output = &rest[usize::try_from(u32::from_be_bytes(len)).expect("short")..];
        }
        kinds
    }

    #[test]
    fn a_usual_client_gets_through() {
        let (kinds, machine) = haggle(
            3,
            &[
                (option::STARTTLS, vec![]),
                (option::STRUCTURED_REPLY, vec![]),
                (option::SET_META_CONTEXT, meta_data("disk", &["base:allocation", "qemu:dirty-bitmap:x"])),
                (option::GO, go_data("disk", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE])),
            ],
        );
        let info = reply::INFO;
        assert_eq!(
            kinds,
            [
                vec![reply::ERR_UNSUP],
                vec![reply::ACK],
                vec![reply::META_CONTEXT, reply::ACK],
                vec![info, info, info, info, reply::ACK]
            ]
        );
        let negotiated = Negotiated { structured: true, allocation: true };
        assert_eq!(machine.outcome(), Some(Outcome::Transmission(negotiated)));
    }

    #[test]
    fn list_info_and_abort() {
        let (kinds, machine) = haggle(
            1,
            &[
                (option::LIST, vec![]),
                (option::INFO, go_data("", &[])),
                (option::INFO, go_data("other", &[])),
                (77, vec![1, 2, 3]),
                (option::ABORT, vec![]),
            ],
        );
        assert_eq!(
            kinds,
            [
                vec![reply::SERVER, reply::ACK],
                vec![reply::INFO, reply::INFO, reply::ACK],
                vec![reply::ERR_UNKNOWN],
                vec![reply::ERR_UNSUP],
                vec![reply::ACK]
            ]
        );
        assert_eq!(machine.outcome(), Some(Outcome::Aborted));
    }

    #[test]
    fn bad_data_is_answered_and_haggling_goes_on() {
        let mut long = go_data("disk", &[]);
        long.push(0);
        let (kinds, machine) = haggle(
            3,
            &[
                (option::GO, vec![]),
                (option::GO, vec![0xff; 6]),
                (option::GO, long),
                (option::LIST, vec![0]),
                (option::STRUCTURED_REPLY, vec![0]),
                (option::SET_META_CONTEXT, meta_data("disk", &["base:allocation"])),
                (option::INFO, vec![0; 20_000]),
                (option::STRUCTURED_REPLY, vec![]),
                (option::SET_META_CONTEXT, vec![0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
                (option::SET_META_CONTEXT, meta_data("disk", &["base:"])),
                (option::LIST_META_CONTEXT, meta_data("disk", &["base:"])),
                (option::LIST_META_CONTEXT, meta_data("disk", &[])),
            ],
        );
        let invalid = || vec![reply::ERR_INVALID];
        assert_eq!(
            kinds,
            [
                invalid(),
                invalid(),
                invalid(),
                invalid(),
                invalid(),
                invalid(),
                vec![reply::ERR_TOO_BIG],
                vec![reply::ACK],
                invalid(),
                vec![reply::ACK],
                vec![reply::META_CONTEXT, reply::ACK],
                vec![reply::META_CONTEXT, reply::ACK],
            ]
        );
        assert_eq!(machine.outcome(), None);
        assert!(!machine.negotiated.allocation);
    }

    #[test]
    fn a_failed_selection_voids_the_earlier_one() {
        let (_, machine) = haggle(
            3,
            &[
                (option::STRUCTURED_REPLY, vec![]),
                (option::SET_META_CONTEXT, meta_data("disk", &["base:allocation"])),
                (option::SET_META_CONTEXT, meta_data("other", &["base:allocation"])),
                (option::GO, go_data("disk", &[])),
            ],
        );
        let negotiated = Negotiated { structured: true, allocation: false };
        assert_eq!(machine.outcome(), Some(Outcome::Transmission(negotiated)));
    }

    #[test]
    fn export_name_has_zeroes_unless_both_sides_agreed() {
        for (flags, len) in [(1, 134), (3, 10), (0, 134)] {
            let (_, mut machine) = haggle(flags, &[(option::EXPORT_NAME, b"disk".to_vec())]);
            assert_eq!(machine.poll_output().len(), len);
            assert_eq!(machine.outcome(), Some(Outcome::Transmission(Negotiated::default())));
        }
        let (_, machine) = haggle(1, &[(option::EXPORT_NAME, b"other".to_vec())]);
        assert_eq!(machine.outcome(), Some(Outcome::Refused(Violation::ExportName)));
    }

    #[test]
    fn what_is_no_option_ends_the_connection() {
        let mut machine = Haggle::new(export());
        let _taken = machine.handle_bytes(&[0, 0, 0, 0xff]);
        assert_eq!(machine.outcome(), Some(Outcome::Refused(Violation::ClientFlags(0xff))));
        let mut machine = Haggle::new(export());
        let _taken = machine.handle_bytes(&[0, 0, 0, 1]);
        let _taken = machine.handle_bytes(&[7; 16]);
        assert_eq!(machine.outcome(), Some(Outcome::Refused(Violation::OptionMagic(0x0707_0707_0707_0707))));
    }

    #[test]
    fn endless_options_and_unread_replies_are_bounded() {
        let mut machine = Haggle::new(export());
        let _taken = machine.handle_bytes(&[0, 0, 0, 3]);
        let list = option_bytes(option::LIST, &[]).repeat(1000);
        let taken = machine.handle_bytes(&list);
        assert!(taken < list.len() && machine.output.len() < OUTPUT_HIGH + 10_000, "waits for the reader");
        let mut rest = &list[taken..];
        while machine.outcome().is_none() && !rest.is_empty() {
            let _sent = machine.poll_output();
            rest = &rest[machine.handle_bytes(rest)..];
        }
        assert_eq!(machine.outcome(), Some(Outcome::Refused(Violation::Options)));
    }

    fn feed_all(machine: &mut Haggle, mut input: &[u8], cut: usize) -> Vec<u8> {
        let mut output = machine.poll_output();
        while !input.is_empty() && machine.outcome().is_none() {
            let piece = &input[..cut.clamp(1, input.len())];
            let taken = machine.handle_bytes(piece);
            output.extend(machine.poll_output());
            input = &input[taken..];
        }
        output
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived_and_cutting_does_not_matter(
            options in prop::collection::vec((0u32..12, prop::collection::vec(any::<u8>(), 0..64)), 0..12),
            tail in prop::collection::vec(any::<u8>(), 0..200),
            cut in 1usize..50,
        ) {
            let mut input = vec![0, 0, 0, 3];
            options.iter().for_each(|(option, data)| input.extend(option_bytes(*option, data)));
            input.extend(tail);
            let (mut whole, mut pieces) = (Haggle::new(export()), Haggle::new(export()));
            let expected = feed_all(&mut whole, &input, usize::MAX);
            prop_assert_eq!(feed_all(&mut pieces, &input, cut), expected);
            prop_assert_eq!(pieces.outcome(), whole.outcome());
        }
    }
}
