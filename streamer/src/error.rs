use farshore_proto::BatchNo;

/// What stops the streamer, or one batch of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The ring holds something that no filter of ours writes. The stream cannot go on from it: start over.
    #[error("ring position {position}: {reason}")]
    Ring {
        /// Where.
        position: u64,
        /// What is wrong there.
        reason: String,
    },
    /// A batch could not be made. Making it again gives the same, so the stream starts over.
    #[error("batch {number} cannot be formed")]
    Form {
        /// Which.
        number: BatchNo,
        /// What the format refuses.
        #[source]
        source: farshore_proto::Error,
    },
    /// A list of volumes too long to be said.
    #[error("greeting cannot be made")]
    Greeting(#[source] farshore_proto::Error),
    /// The state kept beside the ring is another ring's.
    #[error("stream state is of incarnation {found}, the ring of {expected}")]
    StateOfOtherRing {
        /// In the state.
        found: u64,
        /// The ring's.
        expected: u64,
    },
    /// The state kept beside the ring points outside of it.
    #[error("stream state stands at position {position}, the ring holds {freed} to {head}")]
    StateOutsideRing {
        /// In the state.
        position: u64,
        /// The ring's freed cursor.
        freed: u64,
        /// The ring's head.
        head: u64,
    },
    /// The ring has a consumer already.
    #[error("the ring has a consumer already")]
    ConsumerTaken,
    /// The link to the upstream cannot be set up.
    #[error("link to the upstream cannot be set up")]
    Link(#[source] farshore_link::Error),
    /// A thread cannot be started.
    #[error("thread {name} cannot be started")]
    Thread {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A setting outside its range.
    #[error("setting {field}: {reason}")]
    Setting {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
