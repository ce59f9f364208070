//! A cable that fails as a test says: it is cut, it is reset, or it goes silent and nobody is told.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

use super::{World, setting};

/// How the driver commits: a packet's length, sequence number, command and text.
const COMMIT: &[u8] = b"\x07\x00\x00\x00\x03COMMIT";

/// How the engine does, behind the statements that move a position; what follows may begin the next
/// transaction.
const AND_COMMIT: &str = "; commit";

/// A server that has been silent for so long has answered all statements of a packet.
const REPLY_QUIET_TIME: Duration = Duration::from_millis(100);

/// What becomes of something that a client sends, and of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProxyAction {
    Forward,
    /// The server never hears of it, but that the client has gone.
    CutBefore,
    /// The server does it, and the client hears that the server has gone.
    CutAfter,
    /// The client is told so in the middle of it, as by a server that hangs up.
    Reset,
    /// The server never hears of it, and neither end ever hears of the other again.
    Silent,
    /// The server does it, and its answer is the first that the client does not hear.
    Withheld,
}

type Decide = Arc<dyn Fn(&[u8]) -> ProxyAction + Send + Sync>;

/// What a server sends, and what its clients get instead; of the same length.
type Replacement = Option<(&'static [u8], &'static [u8])>;

/// A TCP proxy in front of a server.
pub struct Proxy {
    port: u16,
    withheld: Arc<AtomicU64>,
    silence: watch::Sender<()>,
}

impl Proxy {
    /// In front of the server at `address`, each piece that a client sends being decided upon.
    pub async fn new(
        address: &str,
        decide: impl Fn(&[u8]) -> ProxyAction + Send + Sync + 'static,
    ) -> Self {
        Self::with_replacement(address, decide, None).await
    }

    async fn with_replacement(
        address: &str,
        decide: impl Fn(&[u8]) -> ProxyAction + Send + Sync + 'static,
        replacement: Replacement,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let withheld = Arc::new(AtomicU64::new(0));
        let silence = watch::Sender::new(());
        let state = ProxyState {
            decide: Arc::new(decide),
            replacement,
            withheld: Arc::clone(&withheld),
            silence: silence.subscribe(),
        };
        tokio::spawn(listen(listener, address.to_owned(), state));
        Proxy { port, withheld, silence }
    }

    /// In front of the queue's endpoint.
    pub async fn for_queue(decide: impl Fn(&[u8]) -> ProxyAction + Send + Sync + 'static) -> Self {
        let endpoint = setting("AWS_ENDPOINT_URL").expect("the parts are up");
        Self::new(endpoint.trim_start_matches("http://").trim_end_matches('/'), decide).await
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Makes every connection silent that is open now: neither end ever hears of the other again.
    /// Those that are opened after this work.
    pub fn silence(&self) {
        self.silence.send_replace(());
    }

    /// How many answers there were that it kept from a client.
    pub fn withheld(&self) -> u64 {
        self.withheld.load(Ordering::SeqCst)
    }
}

impl World {
    /// The URL of the world's database by way of a proxy. Not encrypted, so that the statements can
    /// be seen.
    pub async fn database_url_through_proxy(
        &self,
        decide: impl Fn(&[u8]) -> ProxyAction + Send + Sync + 'static,
    ) -> String {
        self.database_proxy(decide).await.1
    }

    /// The same, and the proxy.
    pub async fn database_proxy(
        &self,
        decide: impl Fn(&[u8]) -> ProxyAction + Send + Sync + 'static,
    ) -> (Proxy, String) {
        self.proxy_with_replacement(decide, None).await
    }

    /// The URL of the world's database by way of a proxy that gives its clients other bytes than
    /// the server has sent.
    pub async fn database_url_with_replaced_text(
        &self,
        sent: &'static [u8],
        given: &'static [u8],
    ) -> String {
        self.proxy_with_replacement(|_| ProxyAction::Forward, Some((sent, given))).await.1
    }

    async fn proxy_with_replacement(
        &self,
        decide: impl Fn(&[u8]) -> ProxyAction + Send + Sync + 'static,
        replacement: Replacement,
    ) -> (Proxy, String) {
        let address =
            self.database_url.strip_prefix("mysql://").and_then(|rest| rest.split_once('@'));
        let (user, rest) = address.expect("a URL with a user");
        let (server, database) = rest.split_once('/').expect("a URL with a database");
        let proxy = Proxy::with_replacement(server, decide, replacement).await;
        let url = format!("mysql://{user}@{}/{database}?ssl-mode=DISABLED", proxy.address());
        (proxy, url)
    }
}

/// Cuts cables around commits.
pub struct RandomCuts {
    percent: u8,
    dice: Mutex<fastrand::Rng>,
    commits: AtomicU64,
    before: AtomicU64,
    after: AtomicU64,
}

impl RandomCuts {
    /// Of so many percent of the commits, in turn before and after.
    pub fn new(percent: u8, seed: u64) -> Arc<Self> {
        Arc::new(RandomCuts {
            percent,
            dice: Mutex::new(fastrand::Rng::with_seed(seed)),
            commits: AtomicU64::new(0),
            before: AtomicU64::new(0),
            after: AtomicU64::new(0),
        })
    }

    /// What becomes of these bytes.
    pub fn decide(&self, bytes: &[u8]) -> ProxyAction {
        if !is_commit(bytes) {
            return ProxyAction::Forward;
        }
        self.commits.fetch_add(1, Ordering::SeqCst);
        if self.dice.lock().expect("no panic while rolling").u8(0..100) >= self.percent {
            return ProxyAction::Forward;
        }
        let cuts = self.before.load(Ordering::SeqCst) + self.after.load(Ordering::SeqCst);
        let (fate, count) = if cuts.is_multiple_of(2) {
            (ProxyAction::CutBefore, &self.before)
        } else {
            (ProxyAction::CutAfter, &self.after)
        };
        count.fetch_add(1, Ordering::SeqCst);
        fate
    }

    /// How many commits were cut before the server heard of them, and how many after.
    pub fn counts(&self) -> (u64, u64) {
        (self.before.load(Ordering::SeqCst), self.after.load(Ordering::SeqCst))
    }

    /// How many commits came by.
    pub fn commit_count(&self) -> u64 {
        self.commits.load(Ordering::SeqCst)
    }
}

/// Whether a transaction is committed by what a client sends.
pub fn is_commit(bytes: &[u8]) -> bool {
    bytes.ends_with(COMMIT) || contains_text(bytes, AND_COMMIT)
}

/// Whether these bytes hold this text.
pub fn contains_text(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// What all connections share.
#[derive(Clone)]
struct ProxyState {
    decide: Decide,
    replacement: Replacement,
    withheld: Arc<AtomicU64>,
    silence: watch::Receiver<()>,
}

async fn listen(listener: TcpListener, server: String, mut state: ProxyState) {
    while let Ok((client, _)) = listener.accept().await {
        let Ok(server) = TcpStream::connect(&server).await else { continue };
        state.silence.mark_unchanged();
        tokio::spawn(forward(client, server, state.clone()));
    }
}

/// Carries bytes both ways until either side hangs up, or what was decided upon happens.
async fn forward(mut client: TcpStream, mut server: TcpStream, state: ProxyState) {
    let ProxyState { decide, replacement, withheld, mut silence } = state;
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut from_server) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut is_withheld = false;
    loop {
        tokio::select! {
            // Both ends stay open, as with every silence here.
            Ok(()) = silence.changed() => std::future::pending().await,
            read = client.read(&mut from_client) => {
                let Ok(count @ 1..) = read else { break };
                let bytes = &from_client[..count];
                let fate = if is_withheld { ProxyAction::Forward } else { decide(bytes) };
                match fate {
                    ProxyAction::CutBefore => return,
                    ProxyAction::Reset => {
                        let _ = client.set_zero_linger();
                        return;
                    }
                    // Both ends stay open, for as long as the test's runtime stands.
                    ProxyAction::Silent => std::future::pending().await,
                    ProxyAction::Withheld => is_withheld = true,
                    ProxyAction::Forward | ProxyAction::CutAfter => {}
                }
                if server.write_all(bytes).await.is_err() {
                    break;
                }
                if fate == ProxyAction::CutAfter {
                    // Its last answer proves that it has committed; each statement before that has
                    // one of its own.
                    let _ = server.read(&mut from_server).await;
                    while let Ok(Ok(1..)) = timeout(REPLY_QUIET_TIME, server.read(&mut from_server)).await {}
                    return;
                }
            }
            read = server.read(&mut from_server) => {
                let Ok(count @ 1..) = read else { break };
                let answer = &mut from_server[..count];
                if let Some((sent, given)) = replacement
                    && let Some(at) = answer.windows(sent.len()).position(|window| window == sent)
                {
                    answer[at..at + given.len()].copy_from_slice(given);
                }
                if is_withheld {
                    withheld.fetch_add(1, Ordering::SeqCst);
                } else if client.write_all(answer).await.is_err() {
                    break;
                }
            }
        }
    }
    if is_withheld {
        // Nor does either hear that the other has gone.
        std::future::pending().await
    }
}
