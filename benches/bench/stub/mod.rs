//! A fast stand-in for SQS. LocalStack takes ten milliseconds for a call for which our consumer
//! needs one, and would hide that cost. The stub speaks AWS JSON 1.0 over HTTP/1.1, and handles
//! order and receipts like SQS.

mod http;
mod queues;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;

use anyhow::Context;
use tokio::net::TcpListener;

use queues::Queues;

/// Starts the stub on a thread and a runtime of its own, so that it uses no worker thread of the
/// measured code. It ends with the process.
pub fn start() -> anyhow::Result<SocketAddr> {
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new().name("stub".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            let Ok(listener) = TcpListener::bind("127.0.0.1:0").await else { return };
            let Ok(address) = listener.local_addr() else { return };
            let _ = sender.send(address);
            let queues = Arc::new(Queues::default());
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let queues = Arc::clone(&queues);
                tokio::spawn(async move {
                    http::serve(stream, |target, body| queues.handle(target, body)).await
                });
            }
        });
    })?;
    receiver.recv().context("the stub does not start")
}
