//! A cable between the processes and a server: it can be cut, stalled, cut around a commit, or go
//! deaf without a word.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// How the driver commits: a packet's length, sequence number, command and text.
const COMMIT: &[u8] = b"\x07\x00\x00\x00\x03COMMIT";

/// How the engine does, behind the statements that move a position; what follows may begin the next
/// transaction.
const AND_COMMIT: &[u8] = b"; commit";

/// A server that has been silent for so long has answered all statements of a packet.
const REPLY_QUIET_TIME: Duration = Duration::from_millis(100);

/// When the cable is cut around a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The server never hears of it, and rolls back.
    BeforeCommit,
    /// The server commits, and nobody hears of it.
    AfterCommit,
}

/// A TCP proxy on the loopback interface.
pub struct Proxy {
    pub port: u16,
    wires: Arc<ProxyState>,
}

struct ProxyState {
    target: AtomicU16,
    next: AtomicU64,
    connected: Mutex<HashMap<u64, Link>>,
    flows: watch::Sender<bool>,
    armed: Mutex<VecDeque<Cut>>,
    before: AtomicU64,
    after: AtomicU64,
}

/// One connection.
struct Link {
    task: AbortHandle,
    /// Nothing comes through any more, not even that the other end has hung up.
    is_silent: Arc<AtomicBool>,
}

impl Link {
    fn hears(&self) -> bool {
        !self.is_silent.load(Ordering::SeqCst)
    }
}

impl Proxy {
    pub async fn to(target: u16) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let wires = Arc::new(ProxyState {
            target: AtomicU16::new(target),
            next: AtomicU64::new(0),
            connected: Mutex::default(),
            flows: watch::Sender::new(true),
            armed: Mutex::default(),
            before: AtomicU64::new(0),
            after: AtomicU64::new(0),
        });
        tokio::spawn(listen(listener, Arc::clone(&wires)));
        Ok(Proxy { port, wires })
    }

    /// Leads to another port from now on: a restarted server may have found its own taken.
    pub fn set_target(&self, target: u16) {
        self.wires.target.store(target, Ordering::SeqCst);
    }

    /// Cuts every connection that `chosen` says yes to; returns how many.
    pub fn cut(&self, mut chosen: impl FnMut() -> bool) -> u64 {
        let connected = self.wires.connected.lock().expect("no panic while cutting");
        connected
            .values()
            .filter(|wire| wire.hears() && chosen())
            .map(|wire| wire.task.abort())
            .count() as u64
    }

    /// Makes every connection deaf that `chosen` says yes to, as if a host or a firewall between
    /// had gone: neither end is told. Returns how many.
    pub fn silence(&self, mut chosen: impl FnMut() -> bool) -> u64 {
        let connected = self.wires.connected.lock().expect("no panic while cutting");
        let silenced = connected.values().filter(|wire| wire.hears() && chosen());
        silenced.map(|wire| wire.is_silent.store(true, Ordering::SeqCst)).count() as u64
    }

    /// Cuts the connection of the next commit that comes by.
    pub fn cut_at_commit(&self, cut: Cut) {
        self.wires.armed.lock().expect("no panic while arming").push_back(cut);
    }

    /// How many commits were cut: before the server heard of them, and after.
    pub fn commits_cut(&self) -> (u64, u64) {
        (self.wires.before.load(Ordering::SeqCst), self.wires.after.load(Ordering::SeqCst))
    }

    /// Lets no byte through for so long, in neither direction, and hangs up on nobody.
    pub async fn stall(&self, duration: Duration) {
        self.wires.flows.send_replace(false);
        tokio::time::sleep(duration).await;
        self.wires.flows.send_replace(true);
    }

    /// No more faults: what was armed and did not come by is forgotten, and the ends of what is
    /// deaf are told.
    pub fn mend(&self) {
        let connected = self.wires.connected.lock().expect("no panic while cutting");
        connected.values().filter(|wire| !wire.hears()).for_each(|wire| wire.task.abort());
        drop(connected);
        self.wires.armed.lock().expect("no panic while arming").clear();
        self.wires.flows.send_replace(true);
    }
}

async fn listen(listener: TcpListener, wires: Arc<ProxyState>) {
    while let Ok((client, _)) = listener.accept().await {
        let number = wires.next.fetch_add(1, Ordering::SeqCst);
        let is_silent = Arc::new(AtomicBool::new(false));
        let carried = {
            let (wires, is_silent) = (Arc::clone(&wires), Arc::clone(&is_silent));
            async move {
                carry(client, &wires, &is_silent).await;
                wires.connected.lock().expect("no panic while cutting").remove(&number);
            }
        };
        // Locked first, so that a connection that ends at once is not entered after it was removed.
        let mut connected = wires.connected.lock().expect("no panic while cutting");
        connected.retain(|_, wire| !wire.task.is_finished());
        connected.insert(number, Link { task: tokio::spawn(carried).abort_handle(), is_silent });
    }
}

/// Carries bytes both ways until either side hangs up, or the cable is cut.
async fn carry(mut client: TcpStream, wires: &ProxyState, is_silent: &AtomicBool) {
    let mut flows = wires.flows.subscribe();
    let _ = flows.wait_for(|flows| *flows).await;
    let target = wires.target.load(Ordering::SeqCst);
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut from_server) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                pass(&mut flows, is_silent).await;
                let Ok(count @ 1..) = read else { return };
                let bytes = &from_client[..count];
                let cut = match is_commit(bytes) {
                    true => wires.armed.lock().expect("no panic while arming").pop_front(),
                    false => None,
                };
                if cut == Some(Cut::BeforeCommit) {
                    wires.before.fetch_add(1, Ordering::SeqCst);
                    return;
                }
                if server.write_all(bytes).await.is_err() {
                    return;
                }
                if cut == Some(Cut::AfterCommit) {
                    // Its last answer proves that it has committed; each statement before that has
                    // one of its own.
                    let _ = server.read(&mut from_server).await;
                    while let Ok(Ok(1..)) = timeout(REPLY_QUIET_TIME, server.read(&mut from_server)).await {}
                    wires.after.fetch_add(1, Ordering::SeqCst);
                    return;
                }
            }
            read = server.read(&mut from_server) => {
                pass(&mut flows, is_silent).await;
                let Ok(count @ 1..) = read else { return };
                if client.write_all(&from_server[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Whether a transaction is committed by what a client sends.
fn is_commit(bytes: &[u8]) -> bool {
    bytes.ends_with(COMMIT) || bytes.windows(AND_COMMIT.len()).any(|window| window == AND_COMMIT)
}

/// Waits until the cable flows; for ever, where it is deaf.
async fn pass(flows: &mut watch::Receiver<bool>, is_silent: &AtomicBool) {
    let _ = flows.wait_for(|flows| *flows).await;
    if is_silent.load(Ordering::SeqCst) {
        std::future::pending::<()>().await;
    }
}
