//! The life of a system, live, on real parts: run it by `localstack/demo`.
//!
//! Every step is the shipped binary as a team would run it. It ends with a check that each read model equals a
//! fold of the log, and fails if any check fails.

mod fold;
mod shop;
mod stage;

use std::time::Duration;

use anyhow::{Context, ensure};

use stage::Stage;

const HISTORY: usize = 20_000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let stage = Stage::set().await?;
    stage.say(
        "The parts",
        &format!("{}, and SQS by LocalStack; a fresh database and a fresh queue.", stage.server().await?),
    );

    stage.act("An application appends events", "It has done so for a while, and will not stop while we work.");
    stage.run(&["migrate"]).await?.must_exit(0)?;
    let mut shop = shop::Shop::default();
    let appended = stage.run_with(&["append"], &shop.lines(HISTORY)).await?.must_exit(0)?;
    stage.show(&appended.stdout);
    let writer = stage.start_writer(shop).await?;

    stage.act(
        "Release 1: two projectors",
        "Boot replays the log for them, before the release goes live; then a worker plays.",
    );
    stage.show(&stage.run(&["boot", "--projectors", "examples/demo/release-1"]).await?.must_exit(0)?.stdout);
    let old_worker = stage.start_worker("release-1")?;
    stage.caught_up("release-1").await?;
    stage.show_status("release-1").await?;

    stage.act(
        "Release 2: a new projector, one that runs once, and one from now on",
        "Boot reads MySQL up to the oldest event still in the queue, and hands over. The old worker goes on meanwhile.",
    );
    let before = stage.high_water().await?;
    let booted = stage.run(&["boot", "--projectors", "examples/demo/release-2"]).await?.must_exit(0)?;
    stage.show(&booted.stdout);
    for line in booted.log_lines("handed over: live") {
        stage.note(&format!(
            "{} was handed over at {}, when the oldest event still queued was {}",
            line["projector"], line["position"], line["oldest_queued"]
        ));
    }
    stage.note("The old worker is stopped by SIGTERM, the new one started: from here on the one queue feeds all.");
    old_worker.terminate().await?;
    let worker = stage.start_worker("release-2")?;
    stage.caught_up("release-2").await?;
    stage.show_status("release-2").await?;

    stage.act(
        "A bad event",
        "An order without an amount. The revenue projector breaks on it; the others must not notice.",
    );
    writer.append(shop::without_amount()).await?;
    stage.status_is("release-2", "revenue", "broken").await?;
    stage.caught_up("release-2").await?;
    stage.show_status("release-2").await?;

    stage.act("kill -9", "In the middle of its work, and a new one in its place.");
    worker.kill().await?;
    let worker = stage.start_worker("release-2")?;

    stage.act(
        "Release 3: mended",
        "Boot takes the broken projector up where it stopped. The worker that runs picks it up by itself.",
    );
    stage.show(&stage.run(&["boot", "--projectors", "examples/demo/release-3"]).await?.must_exit(0)?.stdout);
    worker.terminate().await?;
    let worker = stage.start_worker("release-3")?;
    tokio::time::sleep(Duration::from_secs(1)).await;

    stage
        .act("The end of the day", "The writer stops, the worker is stopped, and a last one plays until all is quiet.");
    let written = writer.stop().await?;
    worker.terminate().await?;
    stage.run(&["play", "--until-idle", "--projectors", "examples/demo/release-3"]).await?.must_exit(0)?;
    stage.note(&format!("{written} events were appended while all of this happened"));
    stage.show_status("release-3").await?;

    let verdicts = fold::check(&stage, before).await.context("the read models cannot be compared with the log")?;
    stage.say("Each read model against a fold of the log", &format!("{verdicts}"));
    ensure!(verdicts.all_well(), "a read model is not the fold of the log");
    println!("\nNothing lost, nothing twice.\n");
    stage.clear().await
}
