//! A Lambda environment for the shipped binary: the runtime API, and an event source mapping that
//! passes messages of the real queue to the function and deletes the ones that it does not return.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, Message, MessageSystemAttributeName};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::timeout;

use super::{RunningProcess, TIMEOUT, World};

/// The result that a function reports for an invocation: a response or an error.
pub type InvocationResult = Result<Value, Value>;

/// A running function: its process, and the runtime that invokes it.
pub struct Function {
    pub process: RunningProcess,
    runtime: Runtime,
}

/// The runtime API of one process.
pub struct Runtime {
    address: String,
    invocations: mpsc::UnboundedSender<(Value, Duration)>,
    answers: mpsc::UnboundedReceiver<InvocationResult>,
    init_errors: mpsc::UnboundedReceiver<Value>,
    asked: watch::Receiver<u64>,
}

/// The state that the API's connections share.
struct Shared {
    invocations: Mutex<mpsc::UnboundedReceiver<(Value, Duration)>>,
    answers: mpsc::UnboundedSender<InvocationResult>,
    init_errors: mpsc::UnboundedSender<Value>,
    asked: watch::Sender<u64>,
}

impl Runtime {
    pub async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("the listener is bound").to_string();
        let (invocations, invoked) = mpsc::unbounded_channel();
        let (answered, answers) = mpsc::unbounded_channel();
        let (failed, init_errors) = mpsc::unbounded_channel();
        let asked = watch::Sender::new(0);
        let asks = asked.subscribe();
        let shared = Shared {
            invocations: Mutex::new(invoked),
            answers: answered,
            init_errors: failed,
            asked,
        };
        tokio::spawn(async move {
            let shared = Arc::new(shared);
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        Runtime { address, invocations, answers, init_errors, asked: asks }
    }

    /// Sets the environment variable with which Lambda passes the API's address.
    pub fn configure(&self, command: &mut Command) {
        command.env("AWS_LAMBDA_RUNTIME_API", &self.address);
    }

    /// Waits for the initialization error that the process reports.
    pub async fn init_error(&mut self) -> Value {
        timeout(TIMEOUT, self.init_errors.recv())
            .await
            .expect("the error is reported in time")
            .expect("the runtime is running")
    }
}

impl World {
    /// Starts the shipped binary as a function and waits for its initialization.
    pub async fn function(&self, arguments: &[&str]) -> Function {
        Function::start(self.command(&[&["lambda"], arguments].concat())).await
    }
}

impl Function {
    /// Starts this command as a function, and waits until it requests its first invocation.
    pub async fn start(mut command: Command) -> Self {
        let runtime = Runtime::new().await;
        runtime.configure(&mut command);
        let mut function = Function { process: RunningProcess::spawn(command), runtime };
        function.wait_for_invocations(1).await;
        function
    }

    /// Waits until the function has requested this many invocations in total.
    pub async fn wait_for_invocations(&mut self, invocations: u64) {
        let asked = self.runtime.asked.wait_for(|asked| *asked >= invocations);
        timeout(TIMEOUT, asked)
            .await
            .expect("the function requests an invocation in time")
            .expect("the runtime is running");
    }

    /// Sends an invocation with a deadline after `time`. Does not wait for the answer.
    pub fn begin(&self, event: &Value, time: Duration) {
        self.runtime.invocations.send((event.clone(), time)).expect("the runtime is running");
    }

    /// Waits for the answer to the invocation that [`Self::begin`] sent.
    pub async fn answer(&mut self) -> InvocationResult {
        timeout(TIMEOUT, self.runtime.answers.recv())
            .await
            .expect("the function answers in time")
            .expect("the runtime is running")
    }

    /// Sends an invocation and waits for the answer.
    pub async fn invoke(&mut self, event: &Value, time: Duration) -> InvocationResult {
        self.begin(event, time);
        self.answer().await
    }

    /// Passes batches of messages to the function until the queue is empty, as an event source
    /// mapping does. Returns the number of messages. Asserts that the function returns none of
    /// them.
    pub async fn drain(&mut self, world: &World) -> usize {
        let mut messages = 0;
        loop {
            let batch = world.capture().await;
            if batch.messages.is_empty() {
                return messages;
            }
            messages += batch.messages.len();
            let answer =
                self.invoke(&batch.event(world), TIMEOUT).await.expect("the invocation succeeds");
            assert_eq!(batch.settle(world, &answer).await, Vec::<usize>::new(), "{answer}");
        }
    }
}

/// A scheduled event as EventBridge sends it.
pub fn schedule() -> Value {
    json!({
        "version": "0", "id": "53dc4d37-cffa-4f76-80c9-8b7d4a4d2eaa",
        "detail-type": "Scheduled Event", "source": "aws.events", "account": "000000000000",
        "time": "2026-11-22T20:00:00Z", "region": "us-east-1",
        "resources": ["arn:aws:events:us-east-1:000000000000:rule/every-minute"], "detail": {}
    })
}

/// Messages that were received for a function.
pub struct CapturedBatch {
    pub messages: Vec<Message>,
}

impl World {
    /// Receives up to ten messages.
    pub async fn capture(&self) -> CapturedBatch {
        let receive =
            self.sqs.receive_message().queue_url(&self.queue_url).max_number_of_messages(10);
        let receive = receive.wait_time_seconds(1).visibility_timeout(600);
        let received =
            receive.message_system_attribute_names(MessageSystemAttributeName::All).send().await;
        CapturedBatch {
            messages: received.expect("the queue answers").messages.unwrap_or_default(),
        }
    }
}

impl CapturedBatch {
    /// The event with which the mapping passes these messages to the function.
    pub fn event(&self, world: &World) -> Value {
        let queue = world.queue_url.rsplit('/').next().expect("the URL ends with a name");
        let record = |message: &Message| {
            let attributes: serde_json::Map<_, _> = message
                .attributes()
                .into_iter()
                .flatten()
                .map(|(name, value)| (name.as_str().to_owned(), json!(value)))
                .collect();
            json!({
                "messageId": message.message_id(),
                "receiptHandle": message.receipt_handle(),
                "body": message.body(),
                "attributes": attributes,
                "messageAttributes": {},
                "md5OfBody": message.md5_of_body(),
                "eventSource": "aws:sqs",
                "eventSourceARN": format!("arn:aws:sqs:us-east-1:000000000000:{queue}"),
                "awsRegion": "us-east-1",
            })
        };
        json!({ "Records": self.messages.iter().map(record).collect::<Vec<_>>() })
    }

    /// Deletes the messages that the answer does not return, and makes the others visible at once.
    /// Returns the indexes of the returned messages.
    pub async fn settle(&self, world: &World, answer: &Value) -> Vec<usize> {
        let returned = answer["batchItemFailures"].as_array().expect("a list of failures");
        let returned: HashSet<&str> = returned
            .iter()
            .map(|failure| failure["itemIdentifier"].as_str().expect("the message has an id"))
            .collect();
        let is_returned = |message: &&Message| {
            returned.contains(message.message_id().expect("the message has an id"))
        };
        assert_eq!(
            self.messages.iter().filter(is_returned).count(),
            returned.len(),
            "every returned id is in the batch: {answer}"
        );
        let done: Vec<&Message> =
            self.messages.iter().filter(|message| !is_returned(message)).collect();
        if !done.is_empty() {
            let entry = |(id, message): (usize, &&Message)| {
                let entry = DeleteMessageBatchRequestEntry::builder().id(id.to_string());
                entry
                    .receipt_handle(message.receipt_handle().expect("the message has a receipt"))
                    .build()
                    .expect("all that it needs")
            };
            let entries = done.iter().enumerate().map(entry).collect();
            let delete = world
                .sqs
                .delete_message_batch()
                .queue_url(&world.queue_url)
                .set_entries(Some(entries));
            assert!(delete.send().await.expect("the queue answers").failed().is_empty());
        }
        self.give_back(world, is_returned).await;
        let is_at = |(index, message): (usize, &Message)| is_returned(&message).then_some(index);
        self.messages.iter().enumerate().filter_map(is_at).collect()
    }

    /// Makes all messages visible again, as after the death of the function.
    pub async fn abandon(&self, world: &World) {
        self.give_back(world, |_| true).await;
    }

    async fn give_back(&self, world: &World, which: impl Fn(&&Message) -> bool) {
        for message in self.messages.iter().filter(which) {
            let show = world
                .sqs
                .change_message_visibility()
                .queue_url(&world.queue_url)
                .visibility_timeout(0);
            show.receipt_handle(message.receipt_handle().expect("the message has a receipt"))
                .send()
                .await
                .expect("the message is visible again");
        }
    }
}

/// Serves one request.
async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let mut stream = BufReader::new(stream);
    let Some((request, body)) = read(&mut stream).await else { return };
    let json = || serde_json::from_slice(&body).unwrap_or_else(|error| panic!("{error}: {body:?}"));
    let answer = match request.split_once(' ').expect("a method and a path") {
        ("GET", "/2018-06-01/runtime/invocation/next") => {
            shared.asked.send_modify(|asked| *asked += 1);
            let Some((event, time)) = shared.invocations.lock().await.recv().await else { return };
            let ends = (SystemTime::now() + time)
                .duration_since(UNIX_EPOCH)
                .expect("after 1970")
                .as_millis();
            let event = event.as_str().map_or_else(|| event.to_string(), str::to_owned);
            format!(
                "HTTP/1.1 200 OK\r\n\
                 Lambda-Runtime-Aws-Request-Id: {}\r\n\
                 Lambda-Runtime-Deadline-Ms: {ends}\r\n\
                 Lambda-Runtime-Invoked-Function-Arn: \
                 arn:aws:lambda:us-east-1:000000000000:function:projectionist\r\n\
                 Content-Type: application/json\r\nContent-Length: {}\r\n\
                 Connection: close\r\n\r\n{event}",
                uuid::Uuid::now_v7(),
                event.len()
            )
        }
        ("POST", path) => {
            match path.rsplit('/').next() {
                Some("response") => _ = shared.answers.send(Ok(json())),
                Some("error") if path.ends_with("/init/error") => {
                    _ = shared.init_errors.send(json())
                }
                Some("error") => _ = shared.answers.send(Err(json())),
                _ => panic!("the API has no {path}"),
            }
            "HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into()
        }
        other => panic!("the API has no {other:?}"),
    };
    let _ = stream.get_mut().write_all(answer.as_bytes()).await;
}

/// A request's method and path, and its body.
async fn read(stream: &mut BufReader<TcpStream>) -> Option<(String, Vec<u8>)> {
    let mut request = None;
    let mut length = 0;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        let line = line.trim_end().to_owned();
        match request {
            None => request = Some(line.rsplit_once(' ')?.0.to_owned()),
            Some(_) if line.is_empty() => break,
            Some(_) => {
                if let Some((name, value)) = line.split_once(':')
                    && name.eq_ignore_ascii_case("content-length")
                {
                    length = value.trim().parse().ok()?;
                }
            }
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((request?, body))
}
