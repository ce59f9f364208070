//! A cable to the database that is cut around commits: before the server hears of one, or before its answer is heard.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::World;

/// A COM_QUERY packet as the driver sends it to commit: length, sequence number, command, text.
const COMMIT: &[u8] = b"\x07\x00\x00\x00\x03COMMIT";

/// A TCP proxy in front of the server under test.
pub struct Proxy {
    /// The world's database, by way of this proxy. Not encrypted, so that commits can be seen.
    pub database_url: String,
    cuts: Arc<Cuts>,
}

struct Cuts {
    percent: u8,
    dice: Mutex<fastrand::Rng>,
    commits: AtomicU64,
    before: AtomicU64,
    after: AtomicU64,
}

/// What becomes of one commit.
enum Fate {
    Passes,
    /// The server never hears of it, and rolls back.
    CutBefore,
    /// The server commits, and nobody hears of it.
    CutAfter,
}

impl Proxy {
    /// Cuts so many percent of the commits, in turn before and after.
    pub async fn new(world: &World, percent: u8, seed: u64) -> Self {
        let address = world.database_url.strip_prefix("mysql://").and_then(|rest| rest.split_once('@'));
        let (user, rest) = address.expect("a URL with a user");
        let (server, database) = rest.split_once('/').expect("a URL with a database");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let cuts = Arc::new(Cuts {
            percent,
            dice: Mutex::new(fastrand::Rng::with_seed(seed)),
            commits: AtomicU64::new(0),
            before: AtomicU64::new(0),
            after: AtomicU64::new(0),
        });
        tokio::spawn(listen(listener, server.to_owned(), Arc::clone(&cuts)));
        Proxy { database_url: format!("mysql://{user}@127.0.0.1:{port}/{database}?ssl-mode=DISABLED"), cuts }
    }

    /// How many commits were cut before the server heard of them, and how many after.
    pub fn cuts(&self) -> (u64, u64) {
        (self.cuts.before.load(Ordering::SeqCst), self.cuts.after.load(Ordering::SeqCst))
    }

    /// How many commits came by.
    pub fn commits(&self) -> u64 {
        self.cuts.commits.load(Ordering::SeqCst)
    }
}

impl Cuts {
    fn decide(&self) -> Fate {
        self.commits.fetch_add(1, Ordering::SeqCst);
        if self.dice.lock().expect("no panic while rolling").u8(0..100) >= self.percent {
            return Fate::Passes;
        }
        let cuts = self.before.load(Ordering::SeqCst) + self.after.load(Ordering::SeqCst);
        let (fate, count) =
            if cuts.is_multiple_of(2) { (Fate::CutBefore, &self.before) } else { (Fate::CutAfter, &self.after) };
        count.fetch_add(1, Ordering::SeqCst);
        fate
    }
}

async fn listen(listener: TcpListener, server: String, cuts: Arc<Cuts>) {
    while let Ok((client, _)) = listener.accept().await {
        let Ok(server) = TcpStream::connect(&server).await else { continue };
        tokio::spawn(forward(client, server, Arc::clone(&cuts)));
    }
}

/// Carries bytes both ways until either side hangs up, or the cable is cut.
async fn forward(mut client: TcpStream, mut server: TcpStream, cuts: Arc<Cuts>) {
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut from_server) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                let Ok(count @ 1..) = read else { return };
                let bytes = &from_client[..count];
                let fate = if bytes.ends_with(COMMIT) { cuts.decide() } else { Fate::Passes };
                if matches!(fate, Fate::CutBefore) || server.write_all(bytes).await.is_err() {
                    return;
                }
                if matches!(fate, Fate::CutAfter) {
                    // Its answer proves that it has committed.
                    let _ = server.read(&mut from_server).await;
                    return;
                }
            }
            read = server.read(&mut from_server) => {
                let Ok(count @ 1..) = read else { return };
                if client.write_all(&from_server[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}
