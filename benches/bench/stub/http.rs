//! The part of HTTP/1.1 that the SDK uses with SQS: requests of a known length, one after the other
//! on a connection.

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// The prefix of header `x-amz-target`.
const SERVICE: &str = "AmazonSQS.";

/// Answers requests until the connection ends. A request that cannot be parsed ends it.
pub async fn serve<F>(stream: TcpStream, handle: impl Fn(String, Value) -> F)
where
    F: Future<Output = Result<Value, &'static str>>,
{
    let mut stream = BufReader::with_capacity(64 * 1024, stream);
    while let Some((target, body)) = read_request(&mut stream).await {
        let (status, body) = match handle(target, body).await {
            Ok(body) => ("200 OK", body),
            Err(code) => ("400 Bad Request", serde_json::json!({"__type": code, "message": code})),
        };
        let body = body.to_string();
        let response = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/x-amz-json-1.0\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        if stream.write_all(response.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Reads a request: the operation and its arguments.
async fn read_request(stream: &mut BufReader<TcpStream>) -> Option<(String, Value)> {
    let (mut target, mut length, mut line) = (String::new(), 0, String::new());
    loop {
        line.clear();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        if line == "\r\n" {
            break;
        }
        // The request line has no such header.
        let Some((name, value)) = line.split_once(':') else { continue };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "x-amz-target" => value.trim().strip_prefix(SERVICE)?.clone_into(&mut target),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((target, serde_json::from_slice(&body).ok()?))
}
