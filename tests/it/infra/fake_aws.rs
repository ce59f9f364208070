//! A fake of AWS for infra/deploy, because the test environment has no ECS. Tasks and the service
//! are real processes of the shipped binary, and an image is a folder of projector files. With a
//! real AWS CLI, CloudFormation and the logs are LocalStack's, and only ECS is faked.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::localstack_cli::{forward, ship_logs, with_template};
use crate::support::{FinishedProcess, Folder, RunningProcess, World};

/// The number of workers in the service.
const WORKERS: usize = 2;

/// The stack of infra/lambda.yaml. Every other stack is the one of infra/ecs.yaml.
pub const FUNCTION_STACK: &str = "orders-lambda";

/// The exit code and the output of one `aws` call.
pub type CliOutput = (i32, String);

pub struct FakeAws {
    port: u16,
    cloud: Arc<Mutex<Cloud>>,
    serving: JoinHandle<()>,
}

/// The state of the AWS account.
pub struct Cloud {
    binary: OsString,
    environment: Vec<(OsString, OsString)>,
    images: HashMap<String, Folder>,
    pub parameters: Vec<(String, String)>,
    /// The parameters of the function's stack.
    function_parameters: Vec<(String, String)>,
    pub status: String,
    tasks: HashMap<String, Task>,
    workers: Vec<RunningProcess>,
    /// The results of the workers that were stopped.
    pub replaced: Vec<FinishedProcess>,
    /// Refused calls: the beginning of the command line, the error text, and how often.
    refusals: Vec<(String, String, usize)>,
    /// With LocalStack: the real AWS CLI and the template of the stack.
    real: Option<(PathBuf, PathBuf)>,
    /// The number of log lines that LocalStack has, by task.
    shipped: HashMap<String, usize>,
}

enum Task {
    /// Started, and not yet described.
    Pending(RunningProcess),
    Running(RunningProcess),
    Stopped(FinishedProcess),
    /// Not started, for this reason.
    Failed(String),
}

impl FakeAws {
    /// A stack of infra/ecs.yaml before its first deploy. Its processes use the parts of `world`.
    pub async fn new(world: &World) -> Self {
        let command = world.command(&[]);
        let environment = command.as_std().get_envs();
        let environment = environment
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
            .collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let cloud = Arc::new(Mutex::new(Cloud {
            binary: command.as_std().get_program().to_owned(),
            environment,
            images: HashMap::new(),
            parameters: vec![
                ("BootImage".into(), "none:yet".into()),
                ("Image".into(), String::new()),
            ],
            function_parameters: vec![
                ("CodeKey".into(), "none-yet.zip".into()),
                ("Release".into(), "unnamed".into()),
            ],
            status: "CREATE_COMPLETE".into(),
            tasks: HashMap::new(),
            workers: Vec::new(),
            replaced: Vec::new(),
            refusals: Vec::new(),
            real: None,
            shipped: HashMap::new(),
        }));
        let serving = tokio::spawn(serve(listener, Arc::clone(&cloud)));
        FakeAws { port, cloud, serving }
    }

    /// Like [`FakeAws::new`], with LocalStack for CloudFormation and logs. The stack must have been
    /// created from `template`.
    pub async fn with_localstack(world: &World, cli: PathBuf, template: PathBuf) -> Self {
        let fake_aws = Self::new(world).await;
        fake_aws.cloud.lock().await.real = Some((cli, template));
        fake_aws
    }

    /// Stores an image.
    pub async fn push(&self, image: &str, projectors: Folder) {
        self.cloud().await.images.insert(image.into(), projectors);
    }

    /// Refuses every later call that begins with `call`, with the error text `words`.
    pub async fn refuse(&self, call: &str, words: &str) {
        self.refuse_times(call, words, usize::MAX).await;
    }

    /// Like [`FakeAws::refuse`], but only `times` times.
    pub async fn refuse_times(&self, call: &str, words: &str, times: usize) {
        self.cloud().await.refusals.push((call.into(), words.into(), times));
    }

    pub async fn cloud(&self) -> tokio::sync::MutexGuard<'_, Cloud> {
        self.cloud.lock().await
    }

    /// The command infra/deploy, with this fake as its `aws`.
    pub fn gate(&self, arguments: &[&str]) -> Command {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = std::env::var("PATH").expect("a PATH");
        let mut command = Command::new(root.join("infra/deploy"));
        command
            .args(arguments)
            .env("PATH", format!("{}:{path}", root.join("tests/it/infra").display()))
            .env("FAKE_AWS_PORT", self.port.to_string())
            .env("DEPLOY_POLL_SECONDS", "0.1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Deploys an image, and waits for the end of the deploy.
    pub async fn deploy(&self, image: &str) -> FinishedProcess {
        RunningProcess::spawn(self.gate(&["orders", image])).finish().await
    }
}

impl Drop for FakeAws {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(listener: TcpListener, cloud: Arc<Mutex<Cloud>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let cloud = Arc::clone(&cloud);
        tokio::spawn(async move { respond(stream, cloud).await });
    }
}

async fn respond(stream: TcpStream, cloud: Arc<Mutex<Cloud>>) -> Option<()> {
    let mut stream = BufReader::new(stream);
    let mut word = async || {
        let mut word = Vec::new();
        stream.read_until(0, &mut word).await.ok()?;
        word.pop();
        String::from_utf8(word).ok()
    };
    let count: usize = word().await?.parse().ok()?;
    let mut arguments = Vec::new();
    for _ in 0..count {
        arguments.push(word().await?);
    }
    let (code, text) = Cloud::call(&cloud, &arguments).await;
    stream.write_all(format!("{code}\n{text}\n").as_bytes()).await.ok()?;
    stream.get_mut().shutdown().await.ok()
}

impl Cloud {
    async fn call(cloud: &Arc<Mutex<Cloud>>, arguments: &[String]) -> CliOutput {
        let mut this = cloud.lock().await;
        let line = arguments.join(" ");
        let is_refused = |(call, _, left): &&mut (String, String, usize)| {
            *left > 0 && line.starts_with(call.as_str())
        };
        if let Some((_, words, left)) = this.refusals.iter_mut().find(is_refused) {
            *left -= 1;
            return (254, words.clone());
        }
        let call = (arguments[0].as_str(), arguments[1].as_str());
        let real = this.real.clone();
        let is_function = line.contains(&format!("--stack-name {FUNCTION_STACK}"));
        match (call, real) {
            (("cloudformation", "update-stack"), None) if is_function => {
                let wanted = serde_json::from_str(option(arguments, "--parameters")).expect("JSON");
                set(&mut this.function_parameters, &wanted);
                (0, json!({"StackId": FUNCTION_STACK}).to_string())
            }
            (("cloudformation", "describe-stacks"), None) if is_function => {
                let parameters = describe_parameters(&this.function_parameters);
                let stack = json!({"StackStatus": "UPDATE_COMPLETE", "Parameters": parameters});
                (0, json!({"Stacks": [stack]}).to_string())
            }
            (("cloudformation", "update-stack"), real) => {
                let wanted: Value =
                    serde_json::from_str(option(arguments, "--parameters")).expect("JSON");
                let changed = set(&mut this.parameters, &wanted);
                if let Some((cli, template)) = real {
                    return forward(&cli, &with_template(arguments, &template)).await;
                }
                if changed.is_empty() {
                    return refusal(
                        "ValidationError",
                        "UpdateStack",
                        "No updates are to be performed.",
                    );
                }
                this.status = "UPDATE_IN_PROGRESS".into();
                tokio::spawn(update(Arc::clone(cloud), changed));
                (0, json!({"StackId": "orders"}).to_string())
            }
            (("cloudformation", _), Some((cli, _))) => forward(&cli, arguments).await,
            (("cloudformation", "describe-stacks"), None) => (0, this.stack().to_string()),
            (("cloudformation", "describe-stack-events"), None) => (0, this.events().to_string()),
            (("ecs", "run-task"), _) => this.run_task(option(arguments, "--overrides")),
            (("ecs", "describe-tasks"), _) => {
                this.describe_task(option(arguments, "--tasks")).await
            }
            (("ecs", "stop-task"), _) => this.stop_task(option(arguments, "--task")).await,
            (("logs", "get-log-events"), real) => {
                let stream = option(arguments, "--log-stream-name");
                let task =
                    stream.strip_prefix("boot/boot/").expect("the stream of a task").to_owned();
                let Some(lines) = this.log(&task) else {
                    return refusal(
                        "ResourceNotFoundException",
                        "GetLogEvents",
                        "The specified log stream does not exist.",
                    );
                };
                let Some((cli, _)) = real else { return page(&lines, arguments) };
                let shipped = this.shipped.insert(task, lines.len());
                ship_logs(&cli, arguments, &lines[shipped.unwrap_or(0)..], shipped.is_none()).await;
                forward(&cli, arguments).await
            }
            (call, _) => panic!("infra/deploy calls {call:?}, which this fake does not support"),
        }
    }

    /// The value of a parameter of one of the stacks.
    pub fn parameter(&self, name: &str) -> &str {
        let mut all = self.parameters.iter().chain(&self.function_parameters);
        &all.find(|(known, _)| known == name).expect("a parameter").1
    }

    fn stack(&self) -> Value {
        let outputs = [
            ("Cluster", "main"),
            (
                "BootTaskDefinition",
                "arn:aws:ecs:us-east-1:000000000000:task-definition/orders-boot:1",
            ),
            ("Subnets", "subnet-1,subnet-2"),
            ("SecurityGroups", "sg-1"),
            ("AssignPublicIp", "DISABLED"),
            ("LogGroup", "/projectionist/orders"),
        ];
        let outputs: Value = outputs
            .iter()
            .map(|(name, text)| json!({"OutputKey": name, "OutputValue": text}))
            .collect();
        json!({"Stacks": [{
            "StackName": "orders",
            "StackStatus": self.status,
            "Parameters": describe_parameters(&self.parameters),
            "Outputs": outputs,
        }]})
    }

    fn events(&self) -> Value {
        json!({"StackEvents": [{
            "Timestamp": "9999-01-01T00:00:00Z",
            "LogicalResourceId": "Worker",
            "ResourceStatus": "UPDATE_FAILED",
            "ResourceStatusReason": "ECS Deployment Circuit Breaker was triggered.",
        }]})
    }

    // — tasks —

    fn start(&self, image: &str, arguments: &[&str]) -> Option<RunningProcess> {
        let projectors = self.images.get(image)?;
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .env_remove("PROJECTORS")
            .envs(self.environment.iter().cloned())
            .env("PROJECTORS", projectors.path())
            .env("PROJECTIONIST_RELEASE", image)
            .env("PROJECTIONIST_LOG_FORMAT", "json")
            .env("PROJECTIONIST_RECONCILE_AFTER", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Some(RunningProcess::spawn(command))
    }

    fn run_task(&mut self, overrides: &str) -> CliOutput {
        let overrides: Value = serde_json::from_str(overrides).expect("JSON");
        let command =
            overrides["containerOverrides"][0]["command"].as_array().expect("a command").clone();
        let command: Vec<&str> = command.iter().filter_map(Value::as_str).collect();
        let image = self.parameter("BootImage");
        let task = match self.start(image, &command) {
            Some(running) => Task::Pending(running),
            None => Task::Failed(format!("CannotPullContainerError: {image}: not found")),
        };
        let id = uuid::Uuid::now_v7().simple().to_string();
        let arn = format!("arn:aws:ecs:us-east-1:000000000000:task/main/{id}");
        self.tasks.insert(id, task);
        (0, json!({"tasks": [{"taskArn": arn}], "failures": []}).to_string())
    }

    async fn describe_task(&mut self, arn: &str) -> CliOutput {
        let id = id_of(arn);
        let (task, described) = match self.tasks.remove(id).expect("a task that was started") {
            Task::Pending(running) => (Task::Running(running), json!({"lastStatus": "PENDING"})),
            Task::Running(mut running) => {
                if running.is_running() {
                    (Task::Running(running), json!({"lastStatus": "RUNNING"}))
                } else {
                    stopped(running.finish().await)
                }
            }
            Task::Stopped(finished) => stopped(finished),
            Task::Failed(why) => {
                let described = json!({
                    "lastStatus": "STOPPED",
                    "stoppedReason": "Task failed to start",
                    "containers": [{"name": "boot", "reason": why}],
                });
                (Task::Failed(why), described)
            }
        };
        self.tasks.insert(id.to_owned(), task);
        (0, json!({"tasks": [described], "failures": []}).to_string())
    }

    async fn stop_task(&mut self, arn: &str) -> CliOutput {
        let id = id_of(arn);
        if let Some(Task::Pending(running) | Task::Running(running)) = self.tasks.remove(id) {
            self.tasks.insert(id.to_owned(), Task::Stopped(running.terminate().await));
        }
        (0, "{}".into())
    }

    /// The results of the tasks that have ended or were stopped.
    pub fn stopped_tasks(&self) -> impl Iterator<Item = &FinishedProcess> {
        self.tasks.values().filter_map(|task| {
            if let Task::Stopped(finished) = task { Some(finished) } else { None }
        })
    }

    /// The lines that a task has written so far, or `None` before it runs.
    fn log(&self, task: &str) -> Option<Vec<String>> {
        let text = match self.tasks.get(task)? {
            Task::Running(running) => running.logged(),
            Task::Stopped(finished) => format!("{}{}", finished.stderr, finished.stdout),
            Task::Pending(_) | Task::Failed(_) => return None,
        };
        Some(
            text.split_inclusive('\n')
                .filter_map(|line| line.strip_suffix('\n'))
                .map(str::to_owned)
                .collect(),
        )
    }

    // — the service —

    /// The number of workers. Panics if one of them has ended.
    pub fn workers(&mut self) -> usize {
        assert!(
            self.workers.iter_mut().all(RunningProcess::is_running),
            "no worker has ended by itself"
        );
        self.workers.len()
    }

    /// Makes the workers that start later fail, by an invalid option.
    pub fn break_workers(&mut self) {
        self.environment.push(("PROJECTIONIST_GRACE_PERIOD".into(), "for ever".into()));
    }

    /// Ends the service: stops all workers with SIGTERM.
    pub async fn stop_workers(&mut self) {
        for worker in self.workers.drain(..) {
            self.replaced.push(worker.terminate().await);
        }
    }
}

/// Carries out an update that CloudFormation has accepted: replaces the workers.
async fn update(cloud: Arc<Mutex<Cloud>>, changed: Vec<(String, String)>) {
    let Some((_, before)) = changed.into_iter().find(|(name, _)| name == "Image") else {
        cloud.lock().await.status = "UPDATE_COMPLETE".into();
        return;
    };
    let image = cloud.lock().await.parameter("Image").to_owned();
    let mut started = Vec::new();
    for _ in 0..WORKERS {
        let worker = cloud.lock().await.start(&image, &["play"]);
        started.push(worker.expect("an image that was booted"));
    }
    // As with 100% minimum healthy tasks: the new workers play before the old ones are stopped.
    let mut all_playing = true;
    for worker in &mut started {
        all_playing &= starts_playing(worker).await;
    }
    let mut this = cloud.lock().await;
    if !all_playing {
        // The circuit breaker rolls back.
        set(&mut this.parameters, &json!([{"ParameterKey": "Image", "ParameterValue": before}]));
        this.status = "UPDATE_ROLLBACK_COMPLETE".into();
        return;
    }
    let old = std::mem::replace(&mut this.workers, started);
    drop(this);
    let mut results = Vec::new();
    for worker in old {
        results.push(worker.terminate().await);
    }
    let mut this = cloud.lock().await;
    this.replaced.extend(results);
    this.status = "UPDATE_COMPLETE".into();
}

/// Sets parameters. Returns the changed ones with their previous values.
fn set(parameters: &mut [(String, String)], wanted: &Value) -> Vec<(String, String)> {
    let mut changed = Vec::new();
    for parameter in wanted.as_array().expect("a list") {
        let Some(value) = parameter["ParameterValue"].as_str() else { continue };
        let name = parameter["ParameterKey"].as_str().expect("a name");
        let entry = parameters
            .iter_mut()
            .find(|(known, _)| known == name)
            .expect("a parameter of the stack");
        if entry.1 != value {
            changed.push((name.to_owned(), std::mem::replace(&mut entry.1, value.to_owned())));
        }
    }
    changed
}

fn describe_parameters(parameters: &[(String, String)]) -> Value {
    let one =
        |(name, text): &(String, String)| json!({"ParameterKey": name, "ParameterValue": text});
    parameters.iter().map(one).collect()
}

/// Waits until a worker plays. Returns `false` if it ends first.
async fn starts_playing(worker: &mut RunningProcess) -> bool {
    let mut pulse = tokio::time::interval(Duration::from_millis(20));
    while worker.is_running() {
        if worker.has_logged("\"playing\"") {
            return true;
        }
        pulse.tick().await;
    }
    false
}

fn stopped(finished: FinishedProcess) -> (Task, Value) {
    let described = json!({
        "lastStatus": "STOPPED",
        "stoppedReason": "Essential container in task exited",
        "containers": [{"name": "boot", "exitCode": finished.code}],
    });
    (Task::Stopped(finished), described)
}

/// The argument after the option `name`.
pub fn option<'a>(arguments: &'a [String], name: &str) -> &'a str {
    let at = arguments
        .iter()
        .position(|argument| argument == name)
        .unwrap_or_else(|| panic!("{name} is not given"));
    &arguments[at + 1]
}

fn id_of(arn: &str) -> &str {
    arn.rsplit('/').next().expect("an ARN")
}

fn refusal(code: &str, operation: &str, words: &str) -> CliOutput {
    (254, format!("\nAn error occurred ({code}) when calling the {operation} operation: {words}"))
}

/// One page of log events, after the token.
fn page(lines: &[String], arguments: &[String]) -> CliOutput {
    let token = arguments
        .iter()
        .position(|argument| argument == "--next-token")
        .map(|at| arguments[at + 1].as_str());
    let from: usize = token.and_then(|token| token.strip_prefix("f/")?.parse().ok()).unwrap_or(0);
    // Small pages, so that the gate has to read several.
    let to = lines.len().min(from + 20);
    let events: Vec<Value> = lines[from..to].iter().map(|line| json!({"message": line})).collect();
    (0, json!({"events": events, "nextForwardToken": format!("f/{to}")}).to_string())
}
