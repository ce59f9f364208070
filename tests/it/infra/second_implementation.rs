//! The templates on ministack, a second implementation of AWS: it makes every resource of the
//! stacks, runs the function, and enforces IAM.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::second_aws::{Credentials, SecondAws};
use super::{all_resources, projector, tally, template};
use crate::support::{
    FinishedProcess, Folder, RunningProcess, Tally, World, certificate, eventually, is_mariadb,
};

const SERVICE: &str = "orders";

/// The parameters of a stack.
fn parameters(more: Value) -> Value {
    let mut all = json!({"Service": SERVICE});
    let all_map = all.as_object_mut().expect("a map");
    all_map.extend(more.as_object().expect("a map").clone());
    all
}

/// The parameters that ecs.yaml and lambda.yaml have in common.
fn in_vpc(secret: &str, more: Value) -> Value {
    let mut all = parameters(json!({
        "Subnets": "subnet-1", "SecurityGroups": "sg-1", "DatabaseSecret": secret, "DatabaseCa": "",
    }));
    all.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
    all
}

/// Creates the stacks of queue and monitoring, the secret with the database's URL, and a bucket.
/// Returns the ARN of the secret.
async fn prepare(aws: &mut SecondAws, world: &World) -> String {
    aws.create_stack("queue", "queue", &parameters(json!({}))).await;
    aws.create_stack("monitoring", "monitoring", &parameters(json!({}))).await;
    aws.call("s3", "CreateBucket", json!({"Bucket": "releases"})).await;
    let secret = json!({"Name": "database", "SecretString": world.database_url});
    let secret = aws.call("secretsmanager", "CreateSecret", secret).await;
    secret["ARN"].as_str().expect("an ARN").to_owned()
}

/// Uploads a zip file of a function with these projector files. Its `bootstrap` runs the shipped
/// binary, because ministack keeps the files elsewhere than Lambda. An invocation ends 50 s before
/// its timeout of a minute, because one that may not publish lasts until then.
async fn upload(aws: &mut SecondAws, key: &str, projectors: &[(&str, String)]) {
    let bootstrap = format!(
        "#!/bin/sh\nexport PROJECTORS=$LAMBDA_TASK_ROOT/projectors SSL_CERT_FILE={}\n\
         export PROJECTIONIST_DEADLINE_MARGIN=50000\nexec {}\n",
        certificate("bundle.pem"),
        env!("CARGO_BIN_EXE_projectionist")
    );
    let mut files = serde_json::Map::from_iter([("bootstrap".into(), json!(bootstrap))]);
    files.extend(
        projectors.iter().map(|(name, text)| (format!("projectors/{name}.toml"), json!(text))),
    );
    aws.call("s3", "PutObject", json!({"Bucket": "releases", "Key": key, "Body": files})).await;
}

fn release(secret: &str, name: &str) -> Value {
    let code = json!({
        "CodeBucket": "releases", "CodeKey": format!("{name}.zip"), "Release": name
    });
    in_vpc(secret, code)
}

/// Asserts that a stack has every resource of its template.
async fn assert_has_all_resources(aws: &mut SecondAws, stack: &str, of: &str) {
    let listed =
        aws.call("cloudformation", "DescribeStackResources", json!({"StackName": stack})).await;
    let listed: BTreeSet<String> = listed["StackResources"]
        .as_array()
        .expect("resources")
        .iter()
        .map(|resource| {
            assert!(
                resource["ResourceStatus"].as_str().is_some_and(|it| it.ends_with("_COMPLETE")),
                "{resource}"
            );
            resource["LogicalResourceId"].as_str().expect("an id").to_owned()
        })
        .collect();
    let template = template(&format!("{of}.yaml"));
    let written: BTreeSet<String> = all_resources(&template)
        .map(|(_, block)| block.lines().next().expect("a name").trim().trim_end_matches(':').into())
        .collect();
    assert_eq!(listed, written, "{of}");
}

#[tokio::test]
async fn all_stacks_are_created_updated_and_deleted_and_queues_and_logs_are_kept() {
    // The database server makes no difference here.
    if !is_mariadb().await {
        return;
    }
    let world = World::new().await;
    let mut aws = SecondAws::start().await;
    let aws = &mut aws;
    let secret = prepare(aws, &world).await;
    let ecs = |image: &str| in_vpc(&secret, json!({"BootImage": image, "Cluster": "main"}));
    aws.create_stack("ecs", "ecs", &ecs("orders:1")).await;
    upload(aws, "r1.zip", &[]).await;
    let created = aws.create_stack("lambda", "lambda", &release(&secret, "r1")).await;
    assert_eq!(created["Version"], "1");
    let deployer = parameters(json!({
        "WorkerStack": "ecs", "Cluster": "main", "HasFunction": "true", "FunctionStack": "lambda",
        "CodeBucket": "releases", "Subject": "repo:o/r:environment:production",
        "OidcProviderArn":
            "arn:aws:iam::000000000000:oidc-provider/token.actions.githubusercontent.com",
        "RepositoryArn": "arn:aws:ecr:us-east-1:000000000000:repository/orders",
    }));
    aws.create_stack("deployer", "deployer", &deployer).await;
    for of in ["queue", "monitoring", "ecs", "lambda", "deployer"] {
        assert_has_all_resources(aws, of, of).await;
    }

    // What LocalStack ignores.
    let group = json!({"logGroupNamePrefix": "/projectionist/orders"});
    let groups = aws.call("logs", "DescribeLogGroups", group.clone()).await;
    assert_eq!(groups["logGroups"][0]["retentionInDays"], 30);
    let filters = json!({"logGroupName": "/projectionist/orders"});
    let filters = aws.call("logs", "DescribeMetricFilters", filters).await;
    assert_eq!(filters["metricFilters"].as_array().map(Vec::len), Some(8), "{filters}");
    let dashboard = json!({"DashboardName": "orders-projectors"});
    let dashboard = aws.call("cloudwatch", "GetDashboard", dashboard).await;
    let body = dashboard["DashboardBody"].as_str().expect("a body");
    let body: Value = serde_json::from_str(body).expect("the dashboard is JSON");
    assert!(body["widgets"].as_array().is_some_and(|widgets| widgets.len() > 5));
    let url = aws.call("sqs", "GetQueueUrl", json!({"QueueName": "orders.fifo"})).await;
    let url = url["QueueUrl"].as_str().expect("a URL").to_owned();
    let tags = aws.call("sqs", "ListQueueTags", json!({"QueueUrl": url})).await;
    assert_eq!(tags["Tags"]["projectionist"], SERVICE);
    let config = json!({"FunctionName": "orders-play", "Qualifier": "live"});
    let config = aws.call("lambda", "GetFunctionEventInvokeConfig", config).await;
    assert_eq!(
        (&config["MaximumRetryAttempts"], &config["MaximumEventAgeInSeconds"]),
        (&json!(0), &json!(60))
    );

    // Each stack is updated in place.
    let longer = parameters(json!({"VisibilityTimeout": "400"}));
    aws.update_stack("queue", "queue", &longer).await;
    let attributes = json!({"QueueUrl": url, "AttributeNames": ["VisibilityTimeout"]});
    let attributes = aws.call("sqs", "GetQueueAttributes", attributes).await;
    assert_eq!(attributes["Attributes"]["VisibilityTimeout"], "400");
    aws.update_stack("monitoring", "monitoring", &parameters(json!({"LagSeconds": "600"}))).await;
    let alarm = json!({"AlarmNames": ["orders-lag"]});
    let alarm = aws.call("cloudwatch", "DescribeAlarms", alarm).await;
    assert_eq!(alarm["MetricAlarms"][0]["Threshold"], 600.0);
    aws.update_stack("ecs", "ecs", &ecs("orders:2")).await;
    let task = json!({"taskDefinition": "orders-boot"});
    let task = aws.call("ecs", "DescribeTaskDefinition", task).await;
    assert_eq!(task["taskDefinition"]["containerDefinitions"][0]["image"], "orders:2");
    upload(aws, "r2.zip", &[]).await;
    let updated = aws.update_stack("lambda", "lambda", &release(&secret, "r2")).await;
    assert_eq!(updated["Version"], "2", "a new release publishes a new version");
    let alias = json!({"FunctionName": "orders-play", "Name": "live"});
    assert_eq!(aws.call("lambda", "GetAlias", alias.clone()).await["FunctionVersion"], "2");

    // Another name is another queue. The previous queues are kept, with their messages.
    let url = aws.call("sqs", "GetQueueUrl", json!({"QueueName": "orders-dead.fifo"})).await;
    let url = url["QueueUrl"].as_str().expect("a URL").to_owned();
    let message = json!({
        "QueueUrl": url, "MessageBody": "x", "MessageGroupId": "x", "MessageDeduplicationId": "x"
    });
    aws.call("sqs", "SendMessage", message).await;
    aws.update_stack("queue", "queue", &json!({"Service": "shop"})).await;
    let depth = json!({"QueueUrl": url, "AttributeNames": ["ApproximateNumberOfMessages"]});
    let depth = aws.call("sqs", "GetQueueAttributes", depth).await;
    assert_eq!(depth["Attributes"]["ApproximateNumberOfMessages"], "1");

    for stack in ["deployer", "lambda", "ecs", "monitoring", "queue"] {
        aws.delete_stack(stack).await;
    }
    for queue in ["orders.fifo", "orders-dead.fifo", "shop.fifo", "shop-dead.fifo"] {
        aws.call("sqs", "GetQueueUrl", json!({"QueueName": queue})).await;
    }
    let groups = aws.call("logs", "DescribeLogGroups", group).await;
    assert_eq!(groups["logGroups"].as_array().map(Vec::len), Some(1), "the logs are kept");
    let alarms = aws.call("cloudwatch", "DescribeAlarms", json!({})).await;
    assert_eq!(alarms["MetricAlarms"], json!([]));
    aws.try_call("lambda", "GetAlias", alias).await.expect_err("the function is deleted");
    let roles = aws.call("iam", "ListRoles", json!({"PathPrefix": "/projectionist/"})).await;
    assert_eq!(roles["Roles"], json!([]));
}

#[tokio::test]
async fn a_function_with_mapping_and_schedule_needs_only_the_shipped_role() {
    let world = World::new().await;
    let mut aws = SecondAws::start().await;
    let aws = &mut aws;
    let secret = prepare(aws, &world).await;
    let (cases, customers) = (Tally::new("cases"), Tally::new("customers"));
    let first = [("cases", tally("cases"))];
    let second = [("cases", tally("cases")), ("customers", tally("customers"))];
    let boot = async |projectors: &[(&str, String)]| {
        let mut folder = Folder::new();
        for (name, text) in projectors {
            folder = folder.with(&format!("{name}.toml"), text);
        }
        world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    };
    boot(&first).await;
    upload(aws, "r1.zip", &first).await;
    let created = aws.create_stack("lambda", "lambda", &release(&secret, "r1")).await;
    let applies = async |tally: &Tally| {
        let last = world.last_position().await;
        eventually("the function applies every event", async || {
            world.position(tally.name()).await == last
        })
        .await;
        world.assert_complete(tally).await;
    };
    world.append(50).await;
    applies(&cases).await;
    // The schedule has published, and the mapping has invoked the function with the messages.
    let is_logged = async |aws: &mut SecondAws, words: &str| {
        let group = json!({"logGroupName": "/projectionist/orders"});
        let logged = aws.call("logs", "FilterLogEvents", group).await;
        logged["events"]
            .as_array()
            .expect("lines")
            .iter()
            .any(|line| line["message"].as_str().is_some_and(|message| message.contains(words)))
    };
    for words in ["\"ReceiveToCommit\":[", "\"RelayBatchSize\":[", "\"Heartbeat\":1"] {
        while !is_logged(aws, words).await {}
    }
    assert_eq!(world.number("select published from event_log").await, 50);

    // No other sender may use the queue, and the function goes on. AWS compares the ARN of the
    // role, and ministack that of the session, so the list has both.
    let role_arn = created["RelayRoleArn"].as_str().expect("an ARN");
    let role = role_arn.rsplit('/').next().expect("a name").to_owned();
    let session_arn = format!("arn:aws:sts::000000000000:assumed-role/{role}/orders-play");
    let senders = format!("{role_arn},{session_arn}");
    let only_relay = parameters(json!({"SenderRoleArns": senders}));
    aws.update_stack("queue", "queue", &only_relay).await;
    let url = aws.call("sqs", "GetQueueUrl", json!({"QueueName": "orders.fifo"})).await;
    let message = json!({
        "QueueUrl": url["QueueUrl"], "MessageBody": "x", "MessageGroupId": "x",
        "MessageDeduplicationId": "x",
    });
    let everything = json!({
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": "sqs:*", "Resource": "*"}],
    });
    let other = aws.create_user("other", &everything).await;
    let refused = aws.call_as(&other, "sqs", "SendMessage", message).await;
    assert!(refused.as_ref().is_err_and(|error| error.contains("AccessDenied")), "{refused:?}");
    world.append(50).await;
    applies(&cases).await;
    eventually("the relay may send", async || {
        world.number("select published from event_log").await == 100
    })
    .await;

    // A second release: boot first, then the alias moves.
    boot(&second).await;
    upload(aws, "r2.zip", &second).await;
    aws.update_stack("lambda", "lambda", &release(&secret, "r2")).await;
    world.append(50).await;
    applies(&customers).await;
    applies(&cases).await;

    // Without one action, the error names it.
    let policy = json!({"RoleName": role, "PolicyName": "play"});
    let policy = aws.call("iam", "GetRolePolicy", policy).await["PolicyDocument"].clone();
    let policy = without(&document(&policy), "sqs:SendMessage");
    let put = json!({"RoleName": role, "PolicyName": "play", "PolicyDocument": policy.to_string()});
    aws.call("iam", "PutRolePolicy", put).await;
    world.append(50).await;
    let invoke = json!({"FunctionName": "orders-play:live", "Payload": SCHEDULE});
    loop {
        let invoked = aws.call("lambda", "Invoke", invoke.clone()).await;
        let answer = invoked["Payload"].as_str().unwrap_or_default();
        if answer.contains("could be published") {
            break;
        }
    }
    assert!(is_logged(aws, "SendMessage").await, "the log names the missing action");
    // Projectors are read from MySQL meanwhile.
    applies(&cases).await;
}

const SCHEDULE: &str = r#"{"detail-type":"Scheduled Event"}"#;

/// A policy as JSON. The caller gets it as JSON or as text.
fn document(policy: &Value) -> Value {
    match policy.as_str() {
        Some(text) => serde_json::from_str(text).expect("JSON"),
        None => policy.clone(),
    }
}

/// A policy without an action.
fn without(policy: &Value, action: &str) -> Value {
    let mut policy = policy.clone();
    for statement in policy["Statement"].as_array_mut().expect("statements") {
        match &mut statement["Action"] {
            Value::Array(actions) => actions.retain(|one| one != action),
            one if *one == action => *one = json!("sts:GetCallerIdentity"),
            _ => {}
        }
    }
    policy
}

/// Every action that a policy allows on SQS or Secrets Manager.
fn checked_actions(policy: &Value) -> Vec<String> {
    let statements = policy["Statement"].as_array().expect("statements").iter();
    let allowed = statements.filter(|statement| statement["Effect"] == "Allow");
    let actions = allowed.flat_map(|statement| match &statement["Action"] {
        Value::Array(actions) => actions.clone(),
        one => vec![one.clone()],
    });
    let actions = actions.map(|action| action.as_str().expect("text").to_owned());
    actions
        .filter(|action| action.starts_with("sqs:") || action.starts_with("secretsmanager:"))
        .collect()
}

async fn doctor(
    world: &World,
    aws: &SecondAws,
    credentials: &Credentials,
    secret: &str,
    command: &str,
) -> FinishedProcess {
    let mut doctor = world.command(&["doctor", "--json", "--for", command]);
    doctor
        .env_remove("DATABASE_URL")
        .env("PROJECTIONIST_DATABASE_SECRET", secret)
        .env("QUEUE_URL", format!("{}/000000000000/orders.fifo", aws.endpoint))
        .env("AWS_ENDPOINT_URL", &aws.endpoint)
        .env("AWS_ACCESS_KEY_ID", &credentials.key)
        .env("AWS_SECRET_ACCESS_KEY", &credentials.secret)
        .env("AWS_MAX_ATTEMPTS", "1")
        .env("SSL_CERT_FILE", certificate("bundle.pem"));
    RunningProcess::spawn(doctor).finish().await
}

#[tokio::test]
async fn each_shipped_role_passes_doctor_and_each_missing_action_is_named() {
    // The database server makes no difference here.
    if !is_mariadb().await {
        return;
    }
    let world = World::new().await;
    let mut aws = SecondAws::start().await;
    let aws = &mut aws;
    let secret = prepare(aws, &world).await;
    let ecs = in_vpc(&secret, json!({"BootImage": "orders:1", "Cluster": "main"}));
    aws.create_stack("ecs", "ecs", &ecs).await;
    upload(aws, "r1.zip", &[("any", projector("any", "*", ":position"))]).await;
    aws.create_stack("lambda", "lambda", &release(&secret, "r1")).await;
    let roles = aws.call("iam", "ListRoles", json!({"PathPrefix": "/projectionist/"})).await;
    for (stack, role, policy, command) in [
        ("ecs", "PlayRole", "play", "play"),
        ("ecs", "BootRole", "boot", "boot"),
        ("lambda", "Role", "play", "lambda"),
    ] {
        let begins = format!("{stack}-{role}");
        let names = roles["Roles"].as_array().expect("roles").iter();
        let name = names.filter_map(|role| role["RoleName"].as_str());
        let name = name.clone().find(|name| name.starts_with(&begins)).expect("the role exists");
        let policy = json!({"RoleName": name, "PolicyName": policy});
        let policy = aws.call("iam", "GetRolePolicy", policy).await["PolicyDocument"].clone();
        let policy = document(&policy);
        // The trust policies of the roles name services, so a user gets the policy of the role.
        let user = aws.create_user(name, &policy).await;
        let report = doctor(&world, aws, &user, &secret, command).await.exits(0);
        assert!(!report.stdout.contains("cannot be checked"), "{}", report.stdout);
        let actions = checked_actions(&policy);
        assert!(!actions.is_empty(), "{policy}");
        for action in actions {
            aws.set_user_policy(name, &without(&policy, &action)).await;
            let report = doctor(&world, aws, &user, &secret, command).await;
            assert!(matches!(report.code, Some(2 | 3)), "{action}: {}", report.stdout);
            let (_, operation) = action.split_once(':').expect("an action");
            assert!(
                report.stdout.to_lowercase().contains(&operation.to_lowercase()),
                "{action} is not named: {}",
                report.stdout
            );
        }
    }
}
