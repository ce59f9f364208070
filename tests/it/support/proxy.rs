//! A TCP proxy that fails as a test decides: it closes a connection, resets it, or stops forwarding
//! without closing it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

use super::{World, setting};

/// A COMMIT packet as the driver sends it: length, sequence number, command and text.
const COMMIT: &[u8] = b"\x07\x00\x00\x00\x03COMMIT";

/// The engine commits in the same packet as the statements that move a position. The statements of
/// the next transaction may follow in that packet.
const AND_COMMIT: &str = "; commit";

/// A server that has sent nothing for this time has answered all statements of a packet.
const REPLY_QUIET_TIME: Duration = Duration::from_millis(100);

/// What the proxy does with the bytes that a client sends, and with its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProxyAction {
    Forward,
    /// Closes both connections without forwarding the bytes.
    CutBefore,
    /// Forwards the bytes, waits for the server's answers, then closes both connections.
    CutAfter,
    /// Resets the client's connection without forwarding the bytes.
    Reset,
    /// Does not forward the bytes. Both connections stay open, and nothing is forwarded any more.
    Silent,
    /// Forwards the bytes, and withholds this answer and all later ones from the client.
    Withheld,
}

type Decide = Arc<dyn Fn(&[u8]) -> ProxyAction + Send + Sync>;

/// Bytes that a server sends, and the bytes that its clients receive instead. Both have the same
/// length.
type Replacement = Option<(&'static [u8], &'static [u8])>;

/// A TCP proxy in front of a server.
pub struct Proxy {
    port: u16,
    withheld: Arc<AtomicU64>,
    silence: watch::Sender<()>,
}

impl Proxy {
    /// Starts a proxy for the server at `address`. `decide` is called with each chunk that a client
    /// sends.
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
        let port = listener.local_addr().expect("the listener is bound").port();
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

    /// Starts a proxy for the queue's endpoint.
    pub async fn for_queue(decide: impl Fn(&[u8]) -> ProxyAction + Send + Sync + 'static) -> Self {
        let endpoint =
            setting("AWS_ENDPOINT_URL").expect("AWS_ENDPOINT_URL is set: run localstack/test");
        Self::new(endpoint.trim_start_matches("http://").trim_end_matches('/'), decide).await
    }

    /// The address on which the proxy listens.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Stops forwarding on every connection that is open now, without closing it. Later connections
    /// work.
    pub fn silence(&self) {
        self.silence.send_replace(());
    }

    /// The number of answers that the proxy has withheld from clients.
    pub fn withheld(&self) -> u64 {
        self.withheld.load(Ordering::SeqCst)
    }
}

impl World {
    /// The URL of the world's database through a proxy. TLS is off, so that the proxy can read the
    /// statements.
    pub async fn database_url_through_proxy(
        &self,
        decide: impl Fn(&[u8]) -> ProxyAction + Send + Sync + 'static,
    ) -> String {
        self.database_proxy(decide).await.1
    }

    /// Starts a proxy for the world's database and returns it with the URL.
    pub async fn database_proxy(
        &self,
        decide: impl Fn(&[u8]) -> ProxyAction + Send + Sync + 'static,
    ) -> (Proxy, String) {
        self.proxy_with_replacement(decide, None).await
    }

    /// The URL of the world's database through a proxy that replaces bytes in the server's answers.
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

/// Closes connections just before or just after commits, at random.
pub struct RandomCuts {
    percent: u8,
    dice: Mutex<fastrand::Rng>,
    commits: AtomicU64,
    before: AtomicU64,
    after: AtomicU64,
}

impl RandomCuts {
    /// Closes the connection at `percent` percent of the commits, alternately before and after the
    /// commit.
    pub fn new(percent: u8, seed: u64) -> Arc<Self> {
        Arc::new(RandomCuts {
            percent,
            dice: Mutex::new(fastrand::Rng::with_seed(seed)),
            commits: AtomicU64::new(0),
            before: AtomicU64::new(0),
            after: AtomicU64::new(0),
        })
    }

    /// The action for these bytes.
    pub fn decide(&self, bytes: &[u8]) -> ProxyAction {
        if !is_commit(bytes) {
            return ProxyAction::Forward;
        }
        self.commits.fetch_add(1, Ordering::SeqCst);
        if self.dice.lock().expect("the lock is not poisoned").u8(0..100) >= self.percent {
            return ProxyAction::Forward;
        }
        let cuts = self.before.load(Ordering::SeqCst) + self.after.load(Ordering::SeqCst);
        let (action, count) = if cuts.is_multiple_of(2) {
            (ProxyAction::CutBefore, &self.before)
        } else {
            (ProxyAction::CutAfter, &self.after)
        };
        count.fetch_add(1, Ordering::SeqCst);
        action
    }

    /// The numbers of commits at which the connection was closed before and after the server
    /// received them.
    pub fn counts(&self) -> (u64, u64) {
        (self.before.load(Ordering::SeqCst), self.after.load(Ordering::SeqCst))
    }

    /// The number of commits that the proxy has seen.
    pub fn commit_count(&self) -> u64 {
        self.commits.load(Ordering::SeqCst)
    }
}

/// Whether these bytes, sent by a client, commit a transaction.
pub fn is_commit(bytes: &[u8]) -> bool {
    bytes.ends_with(COMMIT) || contains_text(bytes, AND_COMMIT)
}

/// Whether these bytes contain this text.
pub fn contains_text(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The state that all connections share.
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

/// Forwards bytes in both directions until either side closes, or until `decide` ends the
/// connection.
async fn forward(mut client: TcpStream, mut server: TcpStream, state: ProxyState) {
    let ProxyState { decide, replacement, withheld, mut silence } = state;
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut from_server) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut is_withheld = false;
    loop {
        tokio::select! {
            // Both connections stay open.
            Ok(()) = silence.changed() => std::future::pending().await,
            read = client.read(&mut from_client) => {
                let Ok(count @ 1..) = read else { break };
                let bytes = &from_client[..count];
                let action = if is_withheld { ProxyAction::Forward } else { decide(bytes) };
                match action {
                    ProxyAction::CutBefore => return,
                    ProxyAction::Reset => {
                        let _ = client.set_zero_linger();
                        return;
                    }
                    // Both connections stay open until the test's runtime ends.
                    ProxyAction::Silent => std::future::pending().await,
                    ProxyAction::Withheld => is_withheld = true,
                    ProxyAction::Forward | ProxyAction::CutAfter => {}
                }
                if server.write_all(bytes).await.is_err() {
                    break;
                }
                if action == ProxyAction::CutAfter {
                    // The last answer proves that the server has committed. Each earlier statement
                    // has its own answer.
                    let _ = server.read(&mut from_server).await;
                    loop {
                        let answer = server.read(&mut from_server);
                        let Ok(Ok(1..)) = timeout(REPLY_QUIET_TIME, answer).await else { return };
                    }
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
        // Neither side sees that the other has closed.
        std::future::pending().await
    }
}
