//! A proxy between the processes and a server. It can cut connections, at any time or at a commit,
//! and can delay or silence them.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// A commit of the driver: the length of the packet, its sequence number, the command and the text.
const COMMIT: &[u8] = b"\x07\x00\x00\x00\x03COMMIT";

/// A commit of the engine. It follows the statements that move a position, and the next transaction
/// may begin in the same packet.
const AND_COMMIT: &[u8] = b"; commit";

/// After this time without a byte, a server has answered all statements of a packet.
const REPLY_QUIET_TIME: Duration = Duration::from_millis(100);

/// When a connection is cut at a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The server does not receive the commit, and rolls back.
    BeforeCommit,
    /// The server commits, but the client does not receive the response.
    AfterCommit,
}

/// A TCP proxy on the loopback interface. [`end_faults`](Proxy::end_faults) ends all its faults.
pub struct Proxy {
    pub port: u16,
    state: Arc<ProxyState>,
}

struct ProxyState {
    target: AtomicU16,
    next_number: AtomicU64,
    links: Mutex<HashMap<u64, Link>>,
    is_flowing: watch::Sender<bool>,
    pending_cuts: Mutex<VecDeque<Cut>>,
    cut_before: AtomicU64,
    cut_after: AtomicU64,
}

/// One connection.
struct Link {
    task: AbortHandle,
    /// No byte is forwarded any more, and neither is the end of the connection.
    is_silent: Arc<AtomicBool>,
}

impl Link {
    fn is_silent(&self) -> bool {
        self.is_silent.load(Ordering::SeqCst)
    }
}

impl Proxy {
    pub async fn to(target: u16) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(ProxyState {
            target: AtomicU16::new(target),
            next_number: AtomicU64::new(0),
            links: Mutex::default(),
            is_flowing: watch::Sender::new(true),
            pending_cuts: Mutex::default(),
            cut_before: AtomicU64::new(0),
            cut_after: AtomicU64::new(0),
        });
        tokio::spawn(listen(listener, Arc::clone(&state)));
        Ok(Proxy { port, state })
    }

    /// Forwards new connections to another port: a restarted server may have a new one.
    pub fn set_target(&self, target: u16) {
        self.state.target.store(target, Ordering::SeqCst);
    }

    /// Cuts every connection for which `chosen` is true. Returns their number.
    pub fn cut(&self, mut chosen: impl FnMut() -> bool) -> u64 {
        let links = self.state.links.lock().expect("the lock is not poisoned");
        let cut = links.values().filter(|link| !link.is_silent() && chosen());
        cut.map(|link| link.task.abort()).count() as u64
    }

    /// Silences every connection for which `chosen` is true, as if a host or a firewall in between
    /// had disappeared: neither end notices. Returns their number.
    pub fn silence(&self, mut chosen: impl FnMut() -> bool) -> u64 {
        let links = self.state.links.lock().expect("the lock is not poisoned");
        let silenced = links.values().filter(|link| !link.is_silent() && chosen());
        silenced.map(|link| link.is_silent.store(true, Ordering::SeqCst)).count() as u64
    }

    /// Cuts the connection of the next commit.
    pub fn cut_at_commit(&self, cut: Cut) {
        self.state.pending_cuts.lock().expect("the lock is not poisoned").push_back(cut);
    }

    /// The numbers of commits that were cut before and after the server received them.
    pub fn commits_cut(&self) -> (u64, u64) {
        (self.state.cut_before.load(Ordering::SeqCst), self.state.cut_after.load(Ordering::SeqCst))
    }

    /// Forwards no byte for `duration`, in either direction, and closes no connection.
    pub async fn stall(&self, duration: Duration) {
        self.state.is_flowing.send_replace(false);
        tokio::time::sleep(duration).await;
        self.state.is_flowing.send_replace(true);
    }

    /// Ends all faults: forgets the pending cuts, and closes the silent connections.
    pub fn end_faults(&self) {
        let links = self.state.links.lock().expect("the lock is not poisoned");
        links.values().filter(|link| link.is_silent()).for_each(|link| link.task.abort());
        drop(links);
        self.state.pending_cuts.lock().expect("the lock is not poisoned").clear();
        self.state.is_flowing.send_replace(true);
    }
}

async fn listen(listener: TcpListener, state: Arc<ProxyState>) {
    while let Ok((client, _)) = listener.accept().await {
        let number = state.next_number.fetch_add(1, Ordering::SeqCst);
        let is_silent = Arc::new(AtomicBool::new(false));
        let forwarding = {
            let (state, is_silent) = (Arc::clone(&state), Arc::clone(&is_silent));
            async move {
                forward(client, &state, &is_silent).await;
                state.links.lock().expect("the lock is not poisoned").remove(&number);
            }
        };
        // Locked before the task starts. Otherwise a connection that ends at once could be removed
        // before it is inserted, and remain.
        let mut links = state.links.lock().expect("the lock is not poisoned");
        links.retain(|_, link| !link.task.is_finished());
        links.insert(number, Link { task: tokio::spawn(forwarding).abort_handle(), is_silent });
    }
}

/// Forwards bytes in both directions until an end closes the connection, or the connection is cut.
async fn forward(mut client: TcpStream, state: &ProxyState, is_silent: &AtomicBool) {
    let mut is_flowing = state.is_flowing.subscribe();
    let _ = is_flowing.wait_for(|is_flowing| *is_flowing).await;
    let target = state.target.load(Ordering::SeqCst);
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut from_server) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                wait_for_flow(&mut is_flowing, is_silent).await;
                let Ok(count @ 1..) = read else { return };
                let bytes = &from_client[..count];
                let cut = if is_commit(bytes) {
                    state.pending_cuts.lock().expect("the lock is not poisoned").pop_front()
                } else {
                    None
                };
                if cut == Some(Cut::BeforeCommit) {
                    state.cut_before.fetch_add(1, Ordering::SeqCst);
                    return;
                }
                if server.write_all(bytes).await.is_err() {
                    return;
                }
                if cut == Some(Cut::AfterCommit) {
                        // The last response proves the commit. Each earlier statement of the packet
                        // has a response of its own.
                        let _ = server.read(&mut from_server).await;
                        while let Ok(Ok(1..)) =
                            timeout(REPLY_QUIET_TIME, server.read(&mut from_server)).await
                        {}
                        state.cut_after.fetch_add(1, Ordering::SeqCst);
                    return;
                }
            }
            read = server.read(&mut from_server) => {
                wait_for_flow(&mut is_flowing, is_silent).await;
                let Ok(count @ 1..) = read else { return };
                if client.write_all(&from_server[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Whether the bytes of a client commit a transaction.
fn is_commit(bytes: &[u8]) -> bool {
    bytes.ends_with(COMMIT) || bytes.windows(AND_COMMIT.len()).any(|window| window == AND_COMMIT)
}

/// Waits until the proxy forwards bytes; for ever on a silent connection.
async fn wait_for_flow(is_flowing: &mut watch::Receiver<bool>, is_silent: &AtomicBool) {
    let _ = is_flowing.wait_for(|is_flowing| *is_flowing).await;
    if is_silent.load(Ordering::SeqCst) {
        std::future::pending::<()>().await;
    }
}
