//! ministack: a second implementation of AWS, which a test runs for itself. It serves TLS and
//! enforces IAM. second_aws.py runs it and calls it.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::{file, template};
use crate::support::{certificate, eventually};

/// A running ministack. It and the functions that it runs are killed when this is dropped.
pub struct SecondAws {
    pub endpoint: String,
    server: Child,
    _caller: Child,
    requests: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    credentials: Credentials,
    _folder: tempfile::TempDir,
}

/// The key of an IAM user, and its secret.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub key: String,
    pub secret: String,
}

impl SecondAws {
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
        let port = port.expect("a free port").port();
        let endpoint = format!("https://localhost:{port}");
        let log = std::fs::File::create(folder.path().join("log")).expect("a log");
        let server = python(&["serve"])
            .env("GATEWAY_PORT", port.to_string())
            .env("AWS_ENDPOINT_URL", &endpoint)
            .envs([("BIND_HOST", "127.0.0.1"), ("MINISTACK_HOST", "localhost")])
            .envs([("AUTH", "true"), ("USE_SSL", "1")])
            .env("MINISTACK_SSL_CERT", certificate("server.pem"))
            .env("MINISTACK_SSL_KEY", certificate("server-key.pem"))
            .env("HOME", folder.path())
            .env("TMPDIR", folder.path())
            .env("STATE_DIR", folder.path())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            // Its functions are processes of the same group.
            .process_group(0)
            .spawn()
            .expect("ministack starts");
        let mut caller = python(&["call", &endpoint])
            .env("AWS_CA_BUNDLE", certificate("bundle.pem"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the caller starts");
        let requests = caller.stdin.take().expect("standard input is piped");
        let answers = BufReader::new(caller.stdout.take().expect("the output is piped")).lines();
        eventually("ministack listens", async || {
            TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        SecondAws {
            endpoint,
            server,
            _caller: caller,
            requests,
            answers,
            credentials: Credentials { key: "test".into(), secret: "test".into() },
            _folder: folder,
        }
    }

    /// Calls an operation as the account's root user.
    pub async fn call(&mut self, service: &str, operation: &str, parameters: Value) -> Value {
        let called = self.try_call(service, operation, parameters).await;
        called.unwrap_or_else(|error| panic!("{service} {operation}: {error}"))
    }

    /// Calls an operation as the account's root user. Returns the code of an error, and its text.
    pub async fn try_call(
        &mut self,
        service: &str,
        operation: &str,
        parameters: Value,
    ) -> Result<Value, String> {
        let root = self.credentials.clone();
        self.call_as(&root, service, operation, parameters).await
    }

    pub async fn call_as(
        &mut self,
        credentials: &Credentials,
        service: &str,
        operation: &str,
        parameters: Value,
    ) -> Result<Value, String> {
        let mut call = json!({
            "service": service, "operation": operation, "parameters": parameters,
            "credentials": [credentials.key, credentials.secret],
        })
        .to_string();
        call.push('\n');
        self.requests.write_all(call.as_bytes()).await.expect("the caller reads");
        self.requests.flush().await.expect("the caller reads");
        let answer = self.answers.next_line().await.expect("text").expect("an answer");
        let mut answer: Value = serde_json::from_str(&answer).expect("JSON");
        match answer["error"].as_str() {
            Some(code) => {
                Err(format!("{code}: {}", answer["message"].as_str().unwrap_or_default()))
            }
            None => Ok(answer["ok"].take()),
        }
    }

    /// Creates a stack from the template of this name, and waits. Returns its outputs.
    pub async fn create_stack(&mut self, stack: &str, of: &str, parameters: &Value) -> Value {
        self.change_stack("CreateStack", stack, of, parameters).await
    }

    /// Updates a stack from its template, and waits. Returns its outputs.
    pub async fn update_stack(&mut self, stack: &str, of: &str, parameters: &Value) -> Value {
        self.change_stack("UpdateStack", stack, of, parameters).await
    }

    async fn change_stack(
        &mut self,
        operation: &str,
        stack: &str,
        of: &str,
        parameters: &Value,
    ) -> Value {
        let parameters = parameters.as_object().expect("parameters").iter();
        let parameters: Value = parameters
            .map(|(name, value)| json!({"ParameterKey": name, "ParameterValue": value}))
            .collect();
        let change = json!({
            "StackName": stack, "TemplateBody": template(&format!("{of}.yaml")),
            "Capabilities": ["CAPABILITY_IAM"], "Parameters": parameters,
        });
        self.call("cloudformation", operation, change).await;
        let described = loop {
            let described = self.describe_stack(stack).await.expect("the stack exists");
            if !described["StackStatus"].as_str().expect("a status").ends_with("_IN_PROGRESS") {
                break described;
            }
        };
        let wanted = if operation == "CreateStack" { "CREATE_COMPLETE" } else { "UPDATE_COMPLETE" };
        if described["StackStatus"] != wanted {
            let events = json!({"StackName": stack});
            panic!("{}", self.call("cloudformation", "DescribeStackEvents", events).await);
        }
        let outputs = described["Outputs"].as_array().cloned().unwrap_or_default();
        let text = |output: &Value, key: &str| output[key].as_str().expect("text").to_owned();
        outputs
            .iter()
            .map(|output| (text(output, "OutputKey"), json!(text(output, "OutputValue"))))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    async fn describe_stack(&mut self, stack: &str) -> Result<Value, String> {
        let described =
            self.try_call("cloudformation", "DescribeStacks", json!({"StackName": stack})).await;
        described.map(|described| described["Stacks"][0].clone())
    }

    /// Deletes a stack, and waits.
    pub async fn delete_stack(&mut self, stack: &str) {
        self.call("cloudformation", "DeleteStack", json!({"StackName": stack})).await;
        while let Ok(described) = self.describe_stack(stack).await {
            let status = described["StackStatus"].as_str().expect("a status");
            assert!(!status.ends_with("_FAILED"), "{described}");
            if status == "DELETE_COMPLETE" {
                return;
            }
        }
    }

    /// Creates an IAM user with this policy.
    pub async fn create_user(&mut self, name: &str, policy: &Value) -> Credentials {
        self.call("iam", "CreateUser", json!({"UserName": name})).await;
        self.set_user_policy(name, policy).await;
        let created = self.call("iam", "CreateAccessKey", json!({"UserName": name})).await;
        let text = |key: &str| created["AccessKey"][key].as_str().expect("text").to_owned();
        Credentials { key: text("AccessKeyId"), secret: text("SecretAccessKey") }
    }

    /// Replaces the policy of an IAM user.
    pub async fn set_user_policy(&mut self, name: &str, policy: &Value) {
        // For ministack, SendMessageBatch is an action of its own. On AWS, SendMessage allows it.
        let policy = policy
            .to_string()
            .replace("\"sqs:SendMessage\"", "\"sqs:SendMessage\",\"sqs:SendMessageBatch\"");
        let put = json!({"UserName": name, "PolicyName": "all", "PolicyDocument": policy});
        self.call("iam", "PutUserPolicy", put).await;
    }
}

impl Drop for SecondAws {
    fn drop(&mut self) {
        if let Some(id) = self.server.id() {
            let group = format!("-{id}");
            let _ = std::process::Command::new("kill").args(["-s", "KILL", "--", &group]).status();
        }
    }
}

/// A command of second_aws.py, with an environment of its own.
fn python(arguments: &[&str]) -> Command {
    let interpreter: PathBuf = file(".local/bin/ministack-python");
    assert!(
        interpreter.exists(),
        "{} is missing: localstack/test installs ministack",
        interpreter.display()
    );
    let mut command = Command::new(interpreter);
    command
        .arg(file("tests/it/infra/second_aws.py"))
        .args(arguments)
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}
