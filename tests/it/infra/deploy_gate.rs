//! infra/deploy: the releases that it deploys, those that it stops, and its messages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::fake_aws::{FUNCTION_STACK, FakeAws};
use super::{fragile, tally};
use crate::support::{Folder, RunningProcess, Tally, World, eventually};

/// An application that appends continuously, in its own process.
struct Load {
    stop: Arc<AtomicBool>,
    writing: JoinHandle<usize>,
}

impl Load {
    fn start(world: &World) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut writer = world.start_piped(&["append"]);
        let should_stop = Arc::clone(&stop);
        let writing = tokio::spawn(async move {
            let mut pulse = tokio::time::interval(Duration::from_millis(20));
            let mut written = 0;
            while !should_stop.load(Ordering::Relaxed) {
                pulse.tick().await;
                let line = |number: usize| {
                    let kind = ["Opened", "Amended", "Closed"][number % 3];
                    format!(
                        "{{\"stream_id\":\"case-{}\",\"event_type\":\"{kind}\",\"payload\":{{}}}}",
                        number % 10
                    )
                };
                writer.write(&(written..written + 3).map(line).collect::<Vec<_>>()).await;
                written += 3;
            }
            writer.finish().await.exits(0);
            written
        });
        Load { stop, writing }
    }

    /// Stops the application, and returns the number of events that it appended.
    async fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.writing.await.expect("the writer ends")
    }
}

#[tokio::test]
async fn a_function_gets_a_release_only_after_its_boot_has_succeeded() {
    let world = World::new().await;
    world.append(3).await;
    let fake_aws = FakeAws::new(&world).await;
    fake_aws.push("orders:1", Folder::new().with("cases.toml", &tally("cases"))).await;
    let breaking = projector_that_always_fails();
    fake_aws.push("orders:2", Folder::new().with("breaking.toml", &breaking)).await;
    let deploy = async |image: &str, key: &str| {
        let arguments = ["--function", FUNCTION_STACK, key, "orders", image];
        RunningProcess::spawn(fake_aws.gate(&arguments)).finish().await
    };
    let function = async || {
        let cloud = fake_aws.cloud().await;
        (cloud.parameter("CodeKey").to_owned(), cloud.parameter("Release").to_owned())
    };
    let first = ("orders/1.zip".to_owned(), "orders:1".to_owned());
    deploy("orders:1", "orders/1.zip").await.exits(0);
    assert_eq!(function().await, first);
    deploy("orders:2", "orders/2.zip").await.exits(1);
    assert_eq!(function().await, first, "the boot failed");

    // A wrong stack is noticed before anything is changed.
    let arguments = ["--function", "orders", "orders/3.zip", "orders", "orders:1"];
    let failed = RunningProcess::spawn(fake_aws.gate(&arguments)).finish().await.exits(2);
    assert!(failed.stderr.contains("is it one of infra/lambda.yaml?"), "{}", failed.stderr);
    assert!(!failed.stdout.contains("the boot task"), "{}", failed.stdout);
    fake_aws.cloud().await.stop_workers().await;
}

fn projector_that_always_fails() -> String {
    tally("breaking").replace("(:position)", "(:payload.missing)")
}

#[tokio::test]
async fn releases_roll_forward_and_back_under_load_and_a_breaking_one_is_stopped() {
    let world = World::new().await;
    let fake_aws = FakeAws::new(&world).await;
    let (cases, customers, broken) =
        (Tally::new("cases"), Tally::new("customers"), Tally::new("fragile").only(&["Closed"]));
    let first = || Folder::new().with("cases.toml", &tally("cases"));
    fake_aws.push("orders:1", first()).await;
    let second = || first().with("customers.toml", &tally("customers"));
    fake_aws.push("orders:2", second().with("fragile.toml", &fragile(false))).await;
    fake_aws.push("orders:3", second().with("fragile.toml", &fragile(true))).await;
    fake_aws.push("orders:4", first().with("fragile.toml", &fragile(true))).await;
    world.append(300).await;
    let load = Load::start(&world);

    // The first release, to a stack without workers.
    let deployed = fake_aws.deploy("orders:1").await.exits(0);
    assert!(deployed.stdout.contains("cases@1  live"), "{}", deployed.stdout);
    assert!(deployed.stdout.contains("released: orders:1"), "{}", deployed.stdout);
    let assert_playing = async || {
        let mark = world.last_position().await;
        eventually("the workers play new events", async || world.position("cases").await >= mark)
            .await;
    };
    assert_playing().await;

    // The second release has a projector that breaks. The deploy fails, and the service is
    // unchanged.
    let failed = fake_aws.deploy("orders:2").await.exits(1);
    assert!(failed.stderr.contains("a projector is broken"), "{}", failed.stderr);
    assert!(failed.stdout.contains("fragile@1  broken"), "{}", failed.stdout);
    assert!(failed.stdout.contains("payload.amount"), "the reason is printed: {}", failed.stdout);
    assert_eq!(world.status("customers").await, "stalled");
    assert_eq!(fake_aws.cloud().await.parameter("Image"), "orders:1");
    assert_eq!(fake_aws.cloud().await.workers(), 2);
    assert!(fake_aws.cloud().await.replaced.is_empty(), "no worker was replaced");
    assert_playing().await;

    // The fixed release is deployed, and all old workers stop cleanly.
    fake_aws.deploy("orders:3").await.exits(0);
    assert_eq!(
        (world.status("customers").await, world.status("fragile").await),
        ("live".into(), "live".into())
    );
    assert_eq!(fake_aws.cloud().await.replaced.len(), 2);
    assert_playing().await;

    // Back to the first release, which does not have the two other projectors: they do not move.
    fake_aws.deploy("orders:1").await.exits(0);
    let position = world.position("customers").await;
    assert_playing().await;
    assert_eq!(
        (world.position("customers").await, world.status("customers").await),
        (position, "live".into())
    );

    // Forward again.
    fake_aws.deploy("orders:3").await.exits(0);
    let mark = world.last_position().await;
    eventually("the customers projector catches up", async || {
        world.position("customers").await >= mark
    })
    .await;

    // The fourth release has no customers projector. It is retired, and its table is dropped by
    // hand.
    fake_aws.deploy("orders:4").await.exits(0);
    world.run(&["retire", "customers", "--yes"]).await.exits(0);
    world.execute("drop table customers").await;
    assert_playing().await;

    // After a rollback to the third release, the projector is rebuilt.
    fake_aws.deploy("orders:3").await.exits(0);
    let written = load.stop().await;
    eventually("all are at the end of the log", async || {
        let end = world.last_position().await;
        let ends = async |name| world.position(name).await == end;
        ends("cases").await && ends("customers").await && ends("fragile").await
    })
    .await;
    fake_aws.cloud().await.stop_workers().await;
    assert!(
        written > 0 && cases.applied(&world).await.len() == 300 + written,
        "each event is applied once"
    );
    for read_model in [&cases, &customers, &broken] {
        world.assert_complete(read_model).await;
    }
    let cloud = fake_aws.cloud().await;
    assert!(
        cloud.replaced.iter().all(|worker| worker.code == Some(0)),
        "every worker stopped cleanly"
    );
}

#[tokio::test]
async fn a_cancelled_deploy_stops_its_boot_and_the_next_one_resumes() {
    let world = World::new().await;
    world.append(2000).await;
    let fake_aws = FakeAws::new(&world).await;
    let slow = tally("cases").replace(
        "insert into cases (position) values (:position)",
        "insert into cases (position) select :position from dual where sleep(0.02) = 0",
    );
    fake_aws.push("orders:1", Folder::new().with("cases.toml", &slow)).await;
    let mut command = fake_aws.gate(&["orders", "orders:1"]);
    command.env("PROJECTIONIST_BATCH", "20");
    let gate = RunningProcess::spawn(command);
    eventually("boot is running", async || world.entry("cases").await.is_some()).await;
    gate.terminate().await.exits(143);
    let cloud = fake_aws.cloud().await;
    let codes: Vec<_> = cloud.stopped_tasks().map(|task| task.code).collect();
    assert!(codes.contains(&Some(143)), "boot was stopped by SIGTERM: {codes:?}");
    assert_eq!(cloud.parameter("Image"), "", "nothing was released");
    drop(cloud);

    fake_aws.push("orders:2", Folder::new().with("cases.toml", &tally("cases"))).await;
    fake_aws.deploy("orders:2").await.exits(0);
    world.assert_folded(&Tally::new("cases")).await;
    fake_aws.cloud().await.stop_workers().await;
}

#[tokio::test]
async fn workers_that_do_not_start_leave_the_previous_release_in_place() {
    let world = World::new().await;
    world.append(30).await;
    let fake_aws = FakeAws::new(&world).await;
    fake_aws.push("orders:1", Folder::new().with("cases.toml", &tally("cases"))).await;
    fake_aws.deploy("orders:1").await.exits(0);
    fake_aws.push("orders:2", Folder::new().with("cases.toml", &tally("cases"))).await;
    fake_aws.cloud().await.break_workers();
    let failed = fake_aws.deploy("orders:2").await.exits(3);
    assert!(
        failed.stdout.contains("Worker: ECS Deployment Circuit Breaker was triggered."),
        "{}",
        failed.stdout
    );
    assert!(failed.stderr.contains("UPDATE_ROLLBACK_COMPLETE"), "{}", failed.stderr);
    let mut cloud = fake_aws.cloud().await;
    assert_eq!((cloud.parameter("Image").to_owned(), cloud.workers()), ("orders:1".into(), 2));
    cloud.stop_workers().await;
}

/// The arguments of the gate; a call that AWS refuses, with the error text; the exit code; and the
/// words of the message.
type Case =
    (&'static [&'static str], Option<(&'static str, &'static str)>, i32, &'static [&'static str]);

#[tokio::test]
async fn the_deploy_gate_reports_each_problem_with_advice() {
    let world = World::new().await;
    let run_task = "ecs run-task";
    let cases: &[Case] = &[
        (&["orders"], None, 2, &["usage: infra/deploy"]),
        (&["--timeout", "soon", "orders", "orders:1"], None, 2, &["whole minutes"]),
        (&["--fast", "orders", "orders:1"], None, 2, &["--fast is not an option", "usage"]),
        (&["--function", "orders", "orders:1"], None, 2, &["usage"]),
        (&["orders", "orders:latest"], None, 2, &["orders:latest", "tag of its own"]),
        (&["orders", "orders"], None, 2, &["tag of its own"]),
        (&["orders", "orders:gone"], None, 3, &["did not start", "CannotPullContainerError"]),
        (
            &["orders", "orders:1"],
            Some((
                "cloudformation",
                "Unable to locate credentials. You can configure credentials by running \
                 \"aws login\".",
            )),
            2,
            &["Unable to locate credentials", "log on to AWS"],
        ),
        (
            &["orders", "orders:1"],
            Some((
                "cloudformation",
                "An error occurred (ValidationError) when calling the DescribeStacks operation: \
                 Stack with id orders does not exist",
            )),
            3,
            &["does not exist", "create the stack first"],
        ),
        (
            &["orders", "orders:1"],
            Some((
                run_task,
                "An error occurred (ClusterNotFoundException) when calling the RunTask operation: \
                 Cluster not found.",
            )),
            3,
            &["Cluster not found", "main"],
        ),
        (
            &["orders", "orders:1"],
            Some((
                run_task,
                "An error occurred (AccessDeniedException) when calling the RunTask operation: \
                 not authorized",
            )),
            2,
            &["AccessDenied", "infra/deployer.yaml"],
        ),
        (
            &["orders", "orders:1"],
            Some((
                "logs",
                "An error occurred (AccessDeniedException) when calling the GetLogEvents \
                 operation: no",
            )),
            2,
            &["GetLogEvents", "infra/deployer.yaml"],
        ),
    ];
    for (arguments, refusal, code, words) in cases {
        let fake_aws = FakeAws::new(&world).await;
        fake_aws.push("orders:1", Folder::new().with("cases.toml", &tally("cases"))).await;
        if let Some((call, words)) = refusal {
            fake_aws.refuse(call, words).await;
        }
        let failed = RunningProcess::spawn(fake_aws.gate(arguments)).finish().await.exits(*code);
        for word in *words {
            assert!(
                failed.stderr.contains(word),
                "{arguments:?}: {word:?} is not in {}",
                failed.stderr
            );
        }
    }

    // Temporary errors are retried. The exit code of boot decides, not its log.
    let fake_aws = FakeAws::new(&world).await;
    fake_aws.push("orders:1", Folder::new().with("cases.toml", &tally("cases"))).await;
    fake_aws
        .refuse_times(
            "ecs describe-tasks",
            "Connection was closed before we received a valid response",
            3,
        )
        .await;
    fake_aws
        .refuse(
            "logs",
            "An error occurred (ServiceUnavailableException) when calling the GetLogEvents \
             operation",
        )
        .await;
    let deployed = fake_aws.deploy("orders:1").await.exits(0);
    assert!(deployed.stdout.contains("released: orders:1"), "{}", deployed.stdout);
    fake_aws.cloud().await.stop_workers().await;

    let fake_aws = FakeAws::new(&world).await;
    for (status, word) in
        [("UPDATE_IN_PROGRESS", "another deploy"), ("ROLLBACK_COMPLETE", "delete it")]
    {
        fake_aws.cloud().await.status = status.into();
        let failed = fake_aws.deploy("orders:1").await.exits(3);
        assert!(failed.stderr.contains(word), "{}", failed.stderr);
    }
}
