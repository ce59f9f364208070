//! A TLS gateway in front of the test server that behaves like RDS: it has a certificate for
//! `localhost`, and it accepts IAM tokens instead of passwords. The server behind it has neither.

use std::io::{Error, ErrorKind, Result};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::World;

/// The TLS flag in a greeting and in the client's answer, in the second byte of the flags.
const SSL: u8 = 0x08;

/// How a gateway authenticates clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthMode {
    /// The server checks the password.
    Passwords,
    /// The gateway accepts any token, records it for the test, and connects to the server as
    /// `root`.
    Tokens,
}

/// A running gateway with a certificate for `localhost`.
pub struct Gateway {
    port: u16,
    seen: Arc<GatewayState>,
}

#[derive(Default)]
struct GatewayState {
    tokens: Mutex<Vec<String>>,
    is_closed: watch::Sender<bool>,
}

/// The path of a file in the tests' folder of certificates.
pub fn certificate(name: &str) -> String {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/certificates"));
    folder.join(name).to_str().expect("the path is UTF-8").to_owned()
}

/// A TLS acceptor for `localhost`. Its certificate is signed by a root in `bundle.pem`.
pub fn tls_acceptor() -> TlsAcceptor {
    let chain =
        CertificateDer::pem_file_iter(certificate("server.pem")).expect("the file is readable");
    let chain = chain.map(|certificate| certificate.expect("the certificate is valid")).collect();
    let key =
        PrivateKeyDer::from_pem_file(certificate("server-key.pem")).expect("the key is valid");
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()));
    let config = config.with_safe_default_protocol_versions().expect("the versions are supported");
    let config = config
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("certificate and key match");
    TlsAcceptor::from(Arc::new(config))
}

impl Gateway {
    /// Starts a gateway for the world's server.
    pub async fn new(world: &World, auth_mode: AuthMode) -> Self {
        let server = world
            .database_url
            .split('@')
            .nth(1)
            .and_then(|rest| rest.split('/').next())
            .expect("the URL has a host")
            .to_owned();
        let acceptor = tls_acceptor();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("the listener is bound").port();
        let seen = Arc::new(GatewayState::default());
        let all = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (server, acceptor, seen) = (server.clone(), acceptor.clone(), Arc::clone(&all));
                tokio::spawn(async move {
                    let server = TcpStream::connect(&server).await?;
                    let _ = (client.set_nodelay(true), server.set_nodelay(true));
                    serve(client, server, acceptor, auth_mode, &seen).await
                });
            }
        });
        Gateway { port, seen }
    }

    /// The URL of the world's database through this gateway.
    pub fn url(&self, world: &World, login: &str, host: &str) -> String {
        format!("mysql://{login}@{host}:{}/{}", self.port, world.database_name)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The tokens that clients have sent so far.
    pub fn tokens(&self) -> Vec<String> {
        self.seen.tokens.lock().expect("the lock is not poisoned").clone()
    }

    /// Closes all connections and refuses every token while `is_closed` is true.
    pub fn close(&self, is_closed: bool) {
        self.seen.is_closed.send_replace(is_closed);
    }
}

async fn serve(
    mut client: TcpStream,
    mut server: TcpStream,
    tls: TlsAcceptor,
    auth_mode: AuthMode,
    seen: &GatewayState,
) -> Result<()> {
    let (number, mut greeting) = read(&mut server).await?;
    // The flags follow the protocol, the version, the connection id, the first part of the nonce
    // and a zero.
    let flags = 1 + end_of_text(&greeting, 1)? + 4 + 8 + 1;
    greeting[flags + 1] |= SSL;
    write(&mut client, number, &greeting).await?;
    let (_, request) = read(&mut client).await?;
    if request.len() != 32 {
        return Err(Error::new(ErrorKind::InvalidData, "the client does not request TLS"));
    }
    let mut client = tls.accept(client).await?;
    let (number, mut answer) = read(&mut client).await?;
    answer[1] &= !SSL;
    match auth_mode {
        AuthMode::Passwords => {
            write(&mut server, number - 1, &answer).await?;
            loop {
                let (number, packet) = read(&mut server).await?;
                write(&mut client, number + 1, &packet).await?;
                if matches!(packet[0], 0x00 | 0xff) {
                    break;
                }
                let (number, packet) = read(&mut client).await?;
                write(&mut server, number - 1, &packet).await?;
            }
        }
        AuthMode::Tokens => {
            write(&mut client, number + 1, b"\xfemysql_clear_password\0").await?;
            let (number, token) = read(&mut client).await?;
            let token = String::from_utf8_lossy(&token).trim_end_matches('\0').to_owned();
            seen.tokens.lock().expect("the lock is not poisoned").push(token);
            if *seen.is_closed.borrow() {
                return write(&mut client, number + 1, b"\xff\x15\x04#28000Access denied for user")
                    .await;
            }
            write(&mut server, 1, &rewrite_as_root(&answer)?).await?;
            let mut packet = read(&mut server).await?;
            if packet.1[0] == 0xfe {
                write(&mut server, packet.0 + 1, b"").await?;
                packet = read(&mut server).await?;
            }
            write(&mut client, number + 1, &packet.1).await?;
        }
    }
    let mut closed = seen.is_closed.subscribe();
    tokio::select! {
        copied = copy_bidirectional(&mut client, &mut server) => copied.map(|_| ()),
        _ = closed.wait_for(|is_closed| *is_closed) => Ok(()),
    }
}

/// Rewrites a client's answer to the greeting: the user is `root`, without a password.
fn rewrite_as_root(answer: &[u8]) -> Result<Vec<u8>> {
    let user = 32;
    let secret = end_of_text(answer, user)? + user;
    let rest = secret + 1 + usize::from(answer[secret]);
    Ok([&answer[..user], b"root\0\0", &answer[rest..]].concat())
}

/// The length of the zero-terminated text at `from`, including its zero.
fn end_of_text(bytes: &[u8], from: usize) -> Result<usize> {
    let length = bytes[from..].iter().position(|byte| *byte == 0);
    length
        .map(|length| length + 1)
        .ok_or_else(|| Error::new(ErrorKind::InvalidData, "the text has no terminating zero"))
}

async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<(u8, Vec<u8>)> {
    let mut head = [0; 4];
    from.read_exact(&mut head).await?;
    let mut body = vec![0; u32::from_le_bytes([head[0], head[1], head[2], 0]) as usize];
    from.read_exact(&mut body).await?;
    Ok((head[3], body))
}

async fn write(to: &mut (impl AsyncWrite + Unpin), number: u8, body: &[u8]) -> Result<()> {
    let [low, middle, high, _] = (body.len() as u32).to_le_bytes();
    to.write_all(&[&[low, middle, high, number], body].concat()).await?;
    to.flush().await
}
