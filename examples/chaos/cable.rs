//! A cable between the processes and a server: it can be cut, stalled, and cut around a commit.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// A COM_QUERY packet as the driver sends it to commit: length, sequence number, command, text.
const COMMIT: &[u8] = b"\x07\x00\x00\x00\x03COMMIT";

/// When the cable is cut around a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The server never hears of it, and rolls back.
    BeforeCommit,
    /// The server commits, and nobody hears of it.
    AfterCommit,
}

/// A TCP proxy on the loopback interface.
pub struct Cable {
    pub port: u16,
    wires: Arc<Wires>,
}

struct Wires {
    target: AtomicU16,
    next: AtomicU64,
    connected: Mutex<HashMap<u64, AbortHandle>>,
    flows: watch::Sender<bool>,
    armed: Mutex<VecDeque<Cut>>,
    before: AtomicU64,
    after: AtomicU64,
}

impl Cable {
    pub async fn to(target: u16) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let wires = Arc::new(Wires {
            target: AtomicU16::new(target),
            next: AtomicU64::new(0),
            connected: Mutex::default(),
            flows: watch::Sender::new(true),
            armed: Mutex::default(),
            before: AtomicU64::new(0),
            after: AtomicU64::new(0),
        });
        tokio::spawn(listen(listener, Arc::clone(&wires)));
        Ok(Cable { port, wires })
    }

    /// Leads to another port from now on: a restarted server may have found its own taken.
    pub fn lead_to(&self, target: u16) {
        self.wires.target.store(target, Ordering::SeqCst);
    }

    /// Cuts every connection that `chosen` says yes to; returns how many.
    pub fn cut(&self, mut chosen: impl FnMut() -> bool) -> u64 {
        let connected = self.wires.connected.lock().expect("no panic while cutting");
        connected.values().filter(|_| chosen()).map(AbortHandle::abort).count() as u64
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

    /// No more faults: what was armed and did not come by is forgotten.
    pub fn mend(&self) {
        self.wires.armed.lock().expect("no panic while arming").clear();
        self.wires.flows.send_replace(true);
    }
}

async fn listen(listener: TcpListener, wires: Arc<Wires>) {
    while let Ok((client, _)) = listener.accept().await {
        let number = wires.next.fetch_add(1, Ordering::SeqCst);
        let carried = {
            let wires = Arc::clone(&wires);
            async move {
                carry(client, &wires).await;
                wires.connected.lock().expect("no panic while cutting").remove(&number);
            }
        };
        // Locked first, so that a connection that ends at once is not entered after it was removed.
        let mut connected = wires.connected.lock().expect("no panic while cutting");
        connected.retain(|_, task| !task.is_finished());
        connected.insert(number, tokio::spawn(carried).abort_handle());
    }
}

/// Carries bytes both ways until either side hangs up, or the cable is cut.
async fn carry(mut client: TcpStream, wires: &Wires) {
    let mut flows = wires.flows.subscribe();
    let _ = flows.wait_for(|flows| *flows).await;
    let target = wires.target.load(Ordering::SeqCst);
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut from_server) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                let Ok(count @ 1..) = read else { return };
                let bytes = &from_client[..count];
                let _ = flows.wait_for(|flows| *flows).await;
                let cut = match bytes.ends_with(COMMIT) {
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
                    // Its answer proves that it has committed.
                    let _ = server.read(&mut from_server).await;
                    wires.after.fetch_add(1, Ordering::SeqCst);
                    return;
                }
            }
            read = server.read(&mut from_server) => {
                let Ok(count @ 1..) = read else { return };
                let _ = flows.wait_for(|flows| *flows).await;
                if client.write_all(&from_server[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}
