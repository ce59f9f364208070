//! The roles of the templates: each has the permissions of its command, and no others.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{all_resources, resources, template};
use crate::doctor::checked_actions;
use crate::support::World;

/// The actions on the queue that a template's role has.
fn queue_actions(of: &str, role: &str) -> BTreeSet<String> {
    let template = template(of);
    let policy = resources(&template, "AWS::IAM::Policy").next();
    let mut roles = resources(&template, "AWS::IAM::Role");
    let role = roles.find(|text| text.starts_with(&format!("  {role}:\n"))).expect("a role");
    let text = format!("{role}{}", policy.unwrap_or_default());
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != ':');
    words.filter(|word| word.starts_with("sqs:") && *word != "sqs:").map(str::to_owned).collect()
}

#[tokio::test]
async fn each_shipped_role_has_the_queue_permissions_that_doctor_checks_for_its_command() {
    let world = World::new().await;
    for (of, role, command, uses_queue) in [
        ("ecs.yaml", "PlayRole", "play", true),
        ("ecs.yaml", "BootRole", "boot", false),
        ("ecs.yaml", "BootRole", "migrate", false),
        ("lambda.yaml", "Role", "lambda", true),
    ] {
        let mut checked = checked_actions(&world, command).await;
        // Doctor reads the attributes first, and reports the missing permission as such.
        checked.extend(uses_queue.then(|| "sqs:GetQueueAttributes".to_owned()));
        assert_eq!(queue_actions(of, role), checked, "{role} of {of} runs {command}");
    }
}

/// What the deployer does itself: the calls of infra/deploy and of the workflow. CloudFormation
/// needs none of these.
const OWN_ACTIONS: [&str; 15] = [
    "cloudformation:DescribeStackEvents",
    "cloudformation:DescribeStacks",
    "cloudformation:UpdateStack",
    "ecr:BatchCheckLayerAvailability",
    "ecr:BatchGetImage",
    "ecr:CompleteLayerUpload",
    "ecr:GetAuthorizationToken",
    "ecr:InitiateLayerUpload",
    "ecr:PutImage",
    "ecr:UploadLayerPart",
    "ecs:DescribeTasks",
    "ecs:RunTask",
    "ecs:StopTask",
    "logs:GetLogEvents",
    "s3:PutObject",
];

fn text(value: &Value) -> String {
    value.as_str().expect("text").to_owned()
}

#[test]
fn the_deployer_has_the_published_permissions_of_the_types_that_it_updates_and_no_others() {
    let recorded: Value =
        serde_json::from_str(include_str!("handler-permissions.json")).expect("JSON");
    let types = recorded["types"].as_object().expect("types");

    // These types depend on a parameter that infra/deploy sets.
    let (ecs, lambda) = (template("ecs.yaml"), template("lambda.yaml"));
    let set = ["!Ref BootImage", "IsReleased", "!Ref CodeKey", "!Ref Release", "Version.Version"];
    let updated: BTreeSet<String> = [&ecs, &lambda]
        .into_iter()
        .flat_map(|template| all_resources(template))
        .filter(|(_, block)| set.iter().any(|parameter| block.contains(parameter)))
        .map(|(kind, _)| kind.to_owned())
        .collect();
    assert_eq!(updated, types.keys().cloned().collect());

    let handlers = types.values().flat_map(|handlers| handlers.as_object().expect("handlers"));
    let listed: BTreeSet<String> = handlers
        .flat_map(|(_, actions)| actions.as_array().expect("actions").iter().map(text))
        .collect();
    let unused: BTreeSet<String> =
        recorded["unused"].as_object().expect("reasons").keys().cloned().collect();
    assert!(unused.is_subset(&listed), "each unused permission is in a list");
    let required: BTreeSet<String> = listed.difference(&unused).cloned().collect();
    let own: BTreeSet<String> = OWN_ACTIONS.iter().map(|action| (*action).to_owned()).collect();
    assert_eq!(own.intersection(&required).next(), None, "CloudFormation needs it, too");

    let deployer = template("deployer.yaml");
    let (_, policies) = deployer.split_once("      Policies:\n").expect("policies");
    let (policies, _) = policies.split_once("\nOutputs:\n").expect("outputs");
    let lines = policies.lines().filter(|line| !line.trim_start().starts_with('#'));
    let words = lines.flat_map(|line| {
        line.split(|c: char| !c.is_ascii_alphanumeric() && c != ':').filter(|word| is_action(word))
    });
    let granted: BTreeSet<String> = words.map(str::to_owned).collect();
    assert_eq!(granted, required.union(&own).cloned().collect());
}

/// Whether a word of a template is an action, such as `sqs:SendMessage`.
fn is_action(word: &str) -> bool {
    word.split_once(':').is_some_and(|(service, action)| {
        !service.is_empty()
            && service.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
            && action.bytes().next().is_some_and(|byte| byte.is_ascii_uppercase())
            && !action.contains(':')
    })
}

/// CloudFormation shortens a name that it makes to 64 characters, so no policy may depend on it.
#[test]
fn every_role_is_named_by_its_path() {
    for of in ["ecs.yaml", "lambda.yaml", "deployer.yaml"] {
        let template = template(of);
        for role in resources(&template, "AWS::IAM::Role") {
            assert!(role.contains("      Path: !Sub /projectionist/${Service}/\n"), "{of}: {role}");
        }
        let names = template.lines().filter(|line| line.contains(":role/"));
        for line in names.filter(|line| !line.trim_start().starts_with("ConstraintDescription")) {
            assert!(line.contains(":role/projectionist/${Service}/*"), "{of}: {line}");
        }
    }
}

#[test]
fn queues_and_the_log_group_are_kept_when_an_update_or_a_deletion_would_drop_them() {
    for (of, kind, count) in
        [("queue.yaml", "AWS::SQS::Queue", 2), ("monitoring.yaml", "AWS::Logs::LogGroup", 1)]
    {
        let template = template(of);
        let kept = resources(&template, kind).filter(|block| {
            block.contains("    DeletionPolicy: RetainExceptOnCreate\n")
                && block.contains("    UpdateReplacePolicy: Retain\n")
        });
        assert_eq!(kept.count(), count, "{of}");
    }
}
