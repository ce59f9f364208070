//! A stand-in for SQS that is fast: LocalStack takes ten milliseconds for what a consumer of ours
//! does in one, and would hide what that costs. It speaks AWS JSON 1.0 over HTTP/1.1, and is as
//! careful with order and receipts as SQS is.

mod http;
mod queues;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;

use anyhow::Context;
use tokio::net::TcpListener;

use queues::Queues;

/// Starts it on a thread and a runtime of its own, so that it takes no worker thread from what is
/// measured. It ends with the process.
pub fn start() -> anyhow::Result<SocketAddr> {
    let (tell, told) = mpsc::channel();
    std::thread::Builder::new().name("stub".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            let Ok(listener) = TcpListener::bind("127.0.0.1:0").await else { return };
            let Ok(address) = listener.local_addr() else { return };
            let _ = tell.send(address);
            let queues = Arc::new(Queues::default());
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let queues = Arc::clone(&queues);
                tokio::spawn(async move {
                    http::serve(stream, |target, body| queues.answer(target, body)).await
                });
            }
        });
    })?;
    told.recv().context("the stub does not start")
}
