//! An SQS endpoint for behavior that LocalStack does not have: missing permissions, a clock that
//! differs, and failures.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A stub of SQS's JSON protocol. Every action has a fixed response; the default is an empty
/// document.
#[derive(Clone)]
pub struct SqsStub {
    port: u16,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    answers: HashMap<String, (u16, String)>,
    first: HashMap<String, VecDeque<String>>,
    asked: HashMap<String, usize>,
    clock_ahead: Duration,
    takes: HashMap<String, Duration>,
}

impl SqsStub {
    /// Starts a stub that reports a healthy FIFO queue for every name and rejects invalid calls as
    /// SQS does.
    pub async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("the listener is bound").port();
        let stub = SqsStub { port, state: Arc::default() };
        stub.set_response(
            "GetQueueAttributes",
            200,
            r#"{"Attributes":{
                "QueueArn":"arn:aws:sqs:us-east-1:000000000000:q.fifo","FifoQueue":"true",
                "VisibilityTimeout":"30","MessageRetentionPeriod":"345600",
                "MaximumMessageSize":"1048576","SqsManagedSseEnabled":"true"}}"#,
        );
        for (action, code) in [
            ("SendMessageBatch", "com.amazonaws.sqs#EmptyBatchRequest"),
            ("ReceiveMessage", "com.amazonaws.sqs#InvalidParameterValue"),
            ("DeleteMessage", "com.amazonaws.sqs#ReceiptHandleIsInvalid"),
            ("ChangeMessageVisibility", "com.amazonaws.sqs#ReceiptHandleIsInvalid"),
        ] {
            stub.set_response(
                action,
                400,
                &format!(r#"{{"__type":"{code}","message":"as SQS says"}}"#),
            );
        }
        let all = stub.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(all.clone().serve(client));
            }
        });
        stub
    }

    /// Sets the response to an action from now on.
    pub fn set_response(&self, action: &str, status: u16, body: &str) {
        self.state().answers.insert(action.to_owned(), (status, body.to_owned()));
    }

    /// Sets successful responses to an action. Each is used once, in this order, before the fixed
    /// one.
    pub fn set_responses_once(&self, action: &str, bodies: impl IntoIterator<Item = String>) {
        self.state().first.entry(action.to_owned()).or_default().extend(bodies);
    }

    /// Makes the action fail as in AWS when the caller has no permission for it.
    pub fn deny(&self, action: &str) {
        let message =
            format!("User: arn:aws:iam::1:role/task is not authorized to perform: sqs:{action}");
        self.set_response(
            action,
            400,
            &format!(
                r#"{{"__type":"com.amazonaws.sqs#AccessDeniedException","message":"{message}"}}"#
            ),
        );
    }

    /// Sets how long each response to an action takes from now on.
    pub fn set_delay(&self, action: &str, time: Duration) {
        self.state().takes.insert(action.to_owned(), time);
    }

    /// Sets how far the stub's clock is ahead.
    pub fn set_clock_ahead(&self, time: Duration) {
        self.state().clock_ahead = time;
    }

    /// The number of calls of an action.
    pub fn call_count(&self, action: &str) -> usize {
        self.state().asked.get(action).copied().unwrap_or_default()
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("the lock is not poisoned")
    }

    async fn serve(self, mut client: TcpStream) {
        while let Some(head) = read_request(&mut client).await {
            let action = head
                .lines()
                .find_map(|line| line.strip_prefix("x-amz-target: amazonsqs."))
                .unwrap_or_default();
            let (status, body, date, takes) = {
                let mut state = self.state();
                let known = state.answers.iter().find(|(name, _)| name.to_lowercase() == action);
                let (name, (status, body)) = known
                    .map_or((action.to_owned(), (200, "{}".to_owned())), |(name, answer)| {
                        (name.clone(), answer.clone())
                    });
                *state.asked.entry(name.clone()).or_default() += 1;
                let first = state.first.get_mut(&name).and_then(VecDeque::pop_front);
                let (status, body) = first.map_or((status, body), |first| (200, first));
                let takes = state.takes.get(&name).copied().unwrap_or_default();
                let date = (OffsetDateTime::now_utc() + state.clock_ahead)
                    .format(&Rfc2822)
                    .expect("a date");
                (status, body, date.replace("+0000", "GMT"), takes)
            };
            tokio::time::sleep(takes).await;
            let answer = format!(
                "HTTP/1.1 {status} X\r\ncontent-type: application/x-amz-json-1.0\r\n\
                 date: {date}\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            if client.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }
}

/// Reads a request with its body. Returns its head in lower case.
async fn read_request(client: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
            let length = head.lines().find_map(|line| {
                line.strip_prefix("content-length: ")?.trim().parse::<usize>().ok()
            });
            if bytes.len() >= end + 4 + length.unwrap_or(0) {
                return Some(head);
            }
        }
        let mut piece = [0; 4096];
        match client.read(&mut piece).await {
            Ok(count @ 1..) => bytes.extend_from_slice(&piece[..count]),
            _ => return None,
        }
    }
}
