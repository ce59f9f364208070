//! The templates on LocalStack: the resources that its CloudFormation supports are created, work,
//! can be updated, and are deleted.

use std::collections::{BTreeSet, HashMap};

use aws_sdk_sqs::types::QueueAttributeName;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;

use super::fake_aws::FakeAws;
use super::localstack_cli::forward;
use super::{MetricFilter, file, fragile, tally};
use crate::support::{Folder, RunningProcess, Tally, World, eventually, is_mariadb};

/// The resource types that LocalStack reports as created but does not create.
const UNSUPPORTED: [&str; 4] = [
    "AWS::CloudWatch::Dashboard",
    "AWS::ECS::Service",
    "AWS::ECS::TaskDefinition",
    "AWS::Logs::MetricFilter",
];

/// The three stacks of one service, whose name no other test uses.
struct Stacks {
    service: String,
    /// The outputs of the stacks, by name.
    outputs: HashMap<String, String>,
}

impl Stacks {
    async fn create() -> Self {
        let id = uuid::Uuid::now_v7().simple().to_string();
        let mut stacks = Stacks { service: format!("t{}", &id[12..]), outputs: HashMap::new() };
        stacks.create_one("queue", &[]).await;
        stacks.create_one("monitoring", &[]).await;
        let secret = aws(&[
            "secretsmanager",
            "create-secret",
            "--name",
            &stacks.name("database"),
            "--secret-string",
            "x",
        ])
        .await;
        let ecs = [
            ("BootImage", "none:yet"),
            ("Cluster", "main"),
            ("Subnets", "subnet-1,subnet-2"),
            ("SecurityGroups", "sg-1"),
            ("DatabaseSecret", secret["ARN"].as_str().expect("an ARN")),
        ];
        stacks.create_one("ecs", &ecs).await;
        stacks
    }

    fn name(&self, of: &str) -> String {
        format!("{}-{of}", self.service)
    }

    /// Creates a stack from the template of this name.
    async fn create_one(&mut self, of: &str, parameters: &[(&str, &str)]) {
        self.change("create-stack", of, parameters).await;
        self.wait_for_status(of, "CREATE_COMPLETE").await;
        let stack = self.describe(of).await;
        for output in stack["Outputs"].as_array().expect("outputs") {
            let text = |key: &str| output[key].as_str().expect("text").to_owned();
            self.outputs.insert(text("OutputKey"), text("OutputValue"));
        }
    }

    async fn update(&self, of: &str, parameters: &[(&str, &str)]) {
        self.change("update-stack", of, parameters).await;
        self.wait_for_status(of, "UPDATE_COMPLETE").await;
    }

    async fn change(&self, how: &str, of: &str, parameters: &[(&str, &str)]) {
        let all =
            [("Service", self.service.as_str())].into_iter().chain(parameters.iter().copied());
        let all: Value = all
            .map(|(name, value)| json!({"ParameterKey": name, "ParameterValue": value}))
            .collect();
        let body = format!("file://{}", file("infra").join(format!("{of}.yaml")).display());
        let (stack, parameters) = (self.name(of), all.to_string());
        let capabilities = ["--capabilities", "CAPABILITY_IAM"];
        let call = [
            "cloudformation",
            how,
            "--stack-name",
            &stack,
            "--template-body",
            &body,
            "--parameters",
            &parameters,
        ];
        aws(&[call.as_slice(), &capabilities].concat()).await;
    }

    async fn wait_for_status(&self, of: &str, status: &str) {
        eventually(status, async || self.describe(of).await["StackStatus"] == status).await;
    }

    async fn describe(&self, of: &str) -> Value {
        let described =
            aws(&["cloudformation", "describe-stacks", "--stack-name", &self.name(of)]).await;
        described["Stacks"][0].clone()
    }

    async fn resources(&self, of: &str) -> Vec<Value> {
        let described =
            aws(&["cloudformation", "describe-stack-resources", "--stack-name", &self.name(of)])
                .await;
        described["StackResources"].as_array().expect("resources").clone()
    }

    fn output(&self, name: &str) -> &str {
        self.outputs.get(name).expect("an output of this name")
    }

    /// The settings and the state of an alarm.
    async fn alarm(&self, of: &str) -> Value {
        let name = self.name(of);
        let described = aws(&["cloudwatch", "describe-alarms", "--alarm-names", &name]).await;
        described["MetricAlarms"][0].clone()
    }

    /// Makes LocalStack evaluate an alarm now, and returns its state. LocalStack evaluates an alarm
    /// once a minute, counted from its creation. The alarm is therefore created again, unchanged.
    async fn state(&self, of: &str) -> String {
        let mut alarm = self.alarm(of).await;
        let fields = alarm.as_object_mut().expect("an alarm");
        fields.retain(|name, _| {
            name != "AlarmArn"
                && name != "AlarmConfigurationUpdatedTimestamp"
                && !name.starts_with("State")
        });
        aws(&["cloudwatch", "put-metric-alarm", "--cli-input-json", &alarm.to_string()]).await;
        let is_evaluated = async || self.alarm(of).await["StateValue"] != "INSUFFICIENT_DATA";
        eventually("LocalStack evaluates the alarm", is_evaluated).await;
        self.alarm(of).await["StateValue"].as_str().expect("a state").to_owned()
    }

    /// Does the work of the metric filters: writes the number of matching lines to each metric,
    /// with a time that lies `seconds_ago` in the past. Without a match, it writes the default 0.
    async fn count(&self, lines: &[Value], seconds_ago: i64) {
        let at = time::OffsetDateTime::now_utc() - time::Duration::seconds(seconds_ago);
        let at = at.format(&Rfc3339).expect("a time");
        let data: Value = MetricFilter::all()
            .iter()
            .map(|filter| {
                let count = lines.iter().filter(|line| filter.matches(line)).count();
                json!({"MetricName": filter.metric, "Value": count, "Timestamp": at})
            })
            .collect();
        let namespace = format!("Projectionist/{}", self.service);
        aws(&[
            "cloudwatch",
            "put-metric-data",
            "--namespace",
            &namespace,
            "--metric-data",
            &data.to_string(),
        ])
        .await;
    }

    /// Does the work of CloudWatch for a gauge: takes the last value from the log lines of a
    /// worker, and writes it with a time that lies `seconds_ago` in the past.
    async fn gauge(&self, metric: &str, lines: &[Value], seconds_ago: i64) {
        let values = lines.iter().filter(|line| line["Projector"].is_null());
        let value = values.filter_map(|line| line[metric].as_f64()).next_back();
        let value = value.expect("the worker writes the metric");
        let at = time::OffsetDateTime::now_utc() - time::Duration::seconds(seconds_ago);
        let dimensions = json!([{"Name": "Service", "Value": self.service}]);
        let at = at.format(&Rfc3339).expect("a time");
        let data = json!([
            {"MetricName": metric, "Dimensions": dimensions, "Value": value, "Timestamp": at}
        ]);
        let data = data.to_string();
        let put = ["cloudwatch", "put-metric-data", "--namespace", "Projectionist"];
        aws(&[&put[..], &["--metric-data", &data]].concat()).await;
    }

    async fn delete(&self) {
        for of in ["ecs", "monitoring", "queue"] {
            let name = self.name(of);
            aws(&["cloudformation", "delete-stack", "--stack-name", &name]).await;
            // A deleted stack cannot be described by its name.
            let gone = async || {
                try_aws(&["cloudformation", "describe-stacks", "--stack-name", &name])
                    .await
                    .is_err()
            };
            eventually("the stack is deleted", gone).await;
        }
    }
}

/// The output of the AWS CLI, or its error text.
async fn try_aws(arguments: &[&str]) -> Result<Value, String> {
    let arguments: Vec<String> =
        arguments.iter().chain(&["--output", "json"]).map(|word| word.to_string()).collect();
    let (code, text) = forward(&file(".local/bin/aws"), &arguments).await;
    match code {
        0 if text.trim().is_empty() => Ok(Value::Null),
        0 => Ok(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))),
        _ => Err(text),
    }
}

async fn aws(arguments: &[&str]) -> Value {
    try_aws(arguments).await.unwrap_or_else(|error| panic!("aws {}: {error}", arguments.join(" ")))
}

/// The statement of a queue's policy that denies sending.
fn denied_senders(attributes: &Value) -> Option<Value> {
    let policy: Value =
        serde_json::from_str(attributes["Policy"].as_str().expect("a policy")).expect("JSON");
    let statements = policy["Statement"].as_array().expect("statements");
    let denies_sending = |statement: &&Value| {
        statement["Effect"] == "Deny" && statement["Action"] == "sqs:SendMessage"
    };
    statements.iter().find(denies_sending).cloned()
}

async fn attributes(world: &World, url: &str) -> Value {
    let all = QueueAttributeName::All;
    let response = world
        .sqs
        .get_queue_attributes()
        .queue_url(url)
        .attribute_names(all)
        .send()
        .await
        .expect("attributes");
    response
        .attributes
        .unwrap_or_default()
        .into_iter()
        .map(|(name, value)| (name.as_str().to_owned(), json!(value)))
        .collect()
}

/// Asserts that the resources exist with the settings of the templates.
async fn check_resources(stacks: &Stacks, world: &World) {
    let mut resources = Vec::new();
    for of in ["queue", "monitoring", "ecs"] {
        resources.extend(stacks.resources(of).await);
    }
    let mut not_created = BTreeSet::new();
    for resource in &resources {
        assert_eq!(resource["ResourceStatus"], "CREATE_COMPLETE", "{resource}");
        if resource["ResourceStatusReason"]
            .as_str()
            .is_some_and(|reason| reason.contains("fallback"))
        {
            not_created.insert(resource["ResourceType"].as_str().expect("a type").to_owned());
        }
    }
    assert_eq!(
        not_created.iter().map(String::as_str).collect::<Vec<_>>(),
        UNSUPPORTED,
        "all other types are created"
    );

    let queue = attributes(world, stacks.output("QueueUrl")).await;
    let dead = attributes(world, stacks.output("DeadLetterQueueUrl")).await;
    let redrive: Value =
        serde_json::from_str(queue["RedrivePolicy"].as_str().expect("a policy")).expect("JSON");
    assert_eq!(redrive["deadLetterTargetArn"], dead["QueueArn"]);
    assert_eq!(redrive["maxReceiveCount"].to_string().trim_matches('"'), "10");
    for (attribute, expected) in [
        ("FifoQueue", "true"),
        ("ContentBasedDeduplication", "false"),
        ("VisibilityTimeout", "360"),
        ("MessageRetentionPeriod", "345600"),
        ("MaximumMessageSize", "1048576"),
        ("SqsManagedSseEnabled", "true"),
    ] {
        assert_eq!(queue[attribute], expected, "{attribute}");
    }
    assert_eq!(
        (&dead["FifoQueue"], &dead["MessageRetentionPeriod"]),
        (&json!("true"), &json!("1209600"))
    );
    assert!(
        queue["Policy"].as_str().is_some_and(|policy| policy.contains("aws:SecureTransport")),
        "{queue}"
    );

    let group = stacks.output("LogGroup");
    let groups = aws(&["logs", "describe-log-groups", "--log-group-name-prefix", group]).await;
    assert_eq!(groups["logGroups"][0]["logGroupName"], group, "LocalStack ignores the retention");

    let topic = stacks.output("TopicArn");
    let alarms =
        aws(&["cloudwatch", "describe-alarms", "--alarm-name-prefix", &stacks.name("")]).await;
    let alarms = alarms["MetricAlarms"].as_array().expect("alarms");
    assert_eq!(alarms.len(), 11);
    assert!(alarms.iter().all(|alarm| alarm["AlarmActions"] == json!([topic])), "{alarms:?}");

    for (role, policy, may_use_the_queue) in
        [("PlayRole", "play", true), ("BootRole", "boot", false)]
    {
        let role = resources
            .iter()
            .find(|resource| resource["LogicalResourceId"] == role)
            .expect("a role");
        let role = role["PhysicalResourceId"].as_str().expect("a name");
        let policy = aws(&["iam", "get-role-policy", "--role-name", role, "--policy-name", policy])
            .await
            .to_string();
        assert!(policy.contains("secretsmanager:GetSecretValue"), "{policy}");
        assert_eq!(
            policy.contains(queue["QueueArn"].as_str().expect("an ARN")),
            may_use_the_queue,
            "{policy}"
        );
        assert_eq!(policy.contains("sqs:"), may_use_the_queue, "{policy}");
    }
}

/// Creates a queue, subscribes it to the alarm topic of the stack, and returns its URL.
async fn subscribe_queue(stacks: &Stacks, world: &World) -> String {
    let name = stacks.name("notices");
    let url = world
        .sqs
        .create_queue()
        .queue_name(&name)
        .send()
        .await
        .expect("a queue")
        .queue_url
        .expect("a URL");
    let arn = attributes(world, &url).await["QueueArn"].as_str().expect("an ARN").to_owned();
    let topic = stacks.output("TopicArn");
    aws(&[
        "sns",
        "subscribe",
        "--topic-arn",
        topic,
        "--protocol",
        "sqs",
        "--notification-endpoint",
        &arn,
    ])
    .await;
    url
}

#[tokio::test]
async fn the_stacks_deploy_raise_their_alarm_update_and_delete_on_localstack() {
    // The database server makes no difference here, and the AWS CLI is slow: one run is enough.
    if !is_mariadb().await {
        return;
    }
    let world = World::new().await;
    let stacks = Stacks::create().await;
    check_resources(&stacks, &world).await;
    let notices = subscribe_queue(&stacks, &world).await;

    // The deploy gate, with LocalStack's CloudFormation and logs.
    let release =
        || Folder::new().with("cases.toml", &tally("cases")).with("fragile.toml", &fragile(false));
    let fake_aws =
        FakeAws::with_localstack(&world, file(".local/bin/aws"), file("infra/ecs.yaml")).await;
    fake_aws.push("orders:1", release()).await;
    let gate = RunningProcess::spawn(fake_aws.gate(&[&stacks.name("ecs"), "orders:1"]))
        .finish()
        .await
        .exits(0);
    assert!(
        gate.stdout.contains("INFO booting projector=cases@1"),
        "the gate prints the log: {}",
        gate.stdout
    );
    assert!(gate.stdout.contains("cases@1  live"), "the gate prints the outcome: {}", gate.stdout);
    let described = stacks.describe("ecs").await["Parameters"].to_string();
    assert_eq!(described.matches("orders:1").count(), 2, "both images are set: {described}");
    assert!(described.contains(&stacks.service), "other parameters are unchanged: {described}");

    // Within the time of this test, events reach this worker only through the queue of the stack.
    let (projectors, queue) = (release(), stacks.output("QueueUrl"));
    let play = |projectors: &Folder| {
        let options = ["play", "--projectors", projectors.path(), "--queue-url", queue];
        let metrics = ["--metrics=emf", "--service", &stacks.service, "--log-format=json"];
        world.start(&[&options[..], &metrics, &["--reconcile-after", "3600"]].concat())
    };
    let worker = play(&projectors);
    let cases = Tally::new("cases");
    let append_and_check = async |kind: &str| {
        let line =
            format!("{{\"stream_id\":\"case-1\",\"event_type\":\"{kind}\",\"payload\":{{}}}}\n");
        world.run_with(&["append"], line.repeat(20).as_bytes()).await.exits(0);
        let end = world.last_position().await;
        eventually("the worker is at the end of the log", async || {
            world.position("cases").await == end
        })
        .await;
        world.assert_complete(&cases).await;
    };
    append_and_check("Opened").await;

    // An event breaks a projector. The path of the alarm: log line, metric, alarm, topic. The
    // worker writes its metrics when it starts and when it ends.
    eventually("the worker writes metrics", async || worker.has_logged("StoppedProjectors")).await;
    append_and_check("Closed").await;
    let is_alert =
        |line: &Value| line["alert"] == "projector_broken" && line["projector"] == "fragile@1";
    worker.wait_for_log("projector_broken").await;
    let lines = worker.terminate().await.exits(0).log();
    assert!(lines.iter().any(is_alert), "{lines:?}");
    // LocalStack evaluates three periods as one. The metric is dated two periods back, so that the
    // alarm does not last three minutes.
    stacks.gauge("StoppedProjectors", &lines, 120).await;
    assert_eq!(stacks.state("projector-broken").await, "ALARM");
    let is_notified = async || {
        let receive = world.sqs.receive_message().queue_url(&notices).wait_time_seconds(1);
        let received = receive.send().await.expect("received");
        received.messages().iter().filter_map(|message| message.body()).any(|notice| {
            notice.contains(&stacks.name("projector-broken")) && notice.contains("ALARM")
        })
    };
    eventually("the topic sends a notice", is_notified).await;
    stacks.count(&lines, 0).await;
    assert_eq!(stacks.state("boot-failed").await, "OK", "only one alarm is raised");

    // The queue is updated in place, and the worker continues. LocalStack does not update alarms.
    assert!(
        denied_senders(&attributes(&world, queue).await).is_none(),
        "without the roles, no sender is denied"
    );
    let relay = stacks.output("RelayRoleArn");
    let others =
        [("VisibilityTimeout", "400"), ("RetentionSeconds", "86400"), ("SenderRoleArns", relay)];
    stacks.update("queue", &others).await;
    let changed = attributes(&world, queue).await;
    let denied = denied_senders(&changed).expect("only the relay's role may send");
    assert_eq!(
        denied["Condition"],
        json!({"ArnNotEquals": {"aws:PrincipalArn": [relay]}}),
        "{denied}"
    );
    assert_eq!(
        (&denied["Principal"], &denied["Resource"]),
        (&json!("*"), &changed["QueueArn"]),
        "{denied}"
    );
    assert_eq!(
        (&changed["VisibilityTimeout"], &changed["MessageRetentionPeriod"]),
        (&json!("400"), &json!("86400"))
    );
    let fixed =
        Folder::new().with("cases.toml", &tally("cases")).with("fragile.toml", &fragile(true));
    world.run(&["boot", "--projectors", fixed.path()]).await.exits(0);
    let worker = play(&fixed);
    append_and_check("Amended").await;

    // The projector is fixed, and the alarm ends.
    let lines = worker.terminate().await.exits(0).log();
    stacks.gauge("StoppedProjectors", &lines, 0).await;
    eventually("the alarm ends", async || stacks.state("projector-broken").await == "OK").await;

    // LocalStack ignores that queues and log group must be kept.
    stacks.delete().await;
    assert!(
        world.sqs.get_queue_attributes().queue_url(queue).send().await.is_err(),
        "the queue is gone"
    );
    let remaining =
        aws(&["cloudwatch", "describe-alarms", "--alarm-name-prefix", &stacks.name("")]).await;
    assert_eq!(remaining["MetricAlarms"], json!([]));
    let group = format!("/projectionist/{}", stacks.service);
    assert_eq!(
        aws(&["logs", "describe-log-groups", "--log-group-name-prefix", &group]).await["logGroups"],
        json!([])
    );
    world.sqs.delete_queue().queue_url(notices).send().await.expect("deleted");
}
