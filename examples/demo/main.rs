//! The life of a system, live, on real parts: run it by `localstack/demo`.
//!
//! Every step is the shipped binary as a team would run it. It ends with a check that each read
//! model equals a fold of the log, and fails if any check fails.

mod fold;
mod shop;
mod stage;

use std::time::Duration;

use anyhow::{Context, ensure};

use stage::Stage;

const HISTORY: usize = 20_000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let stage = Stage::prepare().await?;
    stage.print_step(
        "The parts",
        &format!(
            "{}, and SQS by LocalStack; a fresh database and a fresh queue.",
            stage.server().await?
        ),
    );

    stage.print_chapter(
        "An application appends events",
        "It has done so for a while, and will not stop while we work.",
    );
    stage.run(&["migrate"]).await?.expect_exit_code(0)?;
    let mut shop = shop::Shop::default();
    let appended = stage.run_with(&["append"], &shop.lines(HISTORY)).await?.expect_exit_code(0)?;
    stage.print_output(&appended.stdout);
    let writer = stage.start_writer(shop).await?;

    stage.print_chapter(
        "Release 1: two projectors",
        "Boot replays the log for them, before the release goes live; then a worker plays.",
    );
    stage.print_output(
        &stage
            .run(&["boot", "--projectors", "examples/demo/release-1"])
            .await?
            .expect_exit_code(0)?
            .stdout,
    );
    let old_worker = stage.start_worker("release-1")?;
    stage.wait_until_caught_up("release-1").await?;
    stage.show_status("release-1").await?;

    stage.print_chapter(
        "Release 2: a new projector, one that runs once, and one from now on",
        "Boot reads MySQL up to the oldest event still in the queue, and hands over. The old worker goes on meanwhile.",
    );
    let before = stage.high_water().await?;
    let booted = stage
        .run(&["boot", "--projectors", "examples/demo/release-2"])
        .await?
        .expect_exit_code(0)?;
    stage.print_output(&booted.stdout);
    for line in booted.log_lines("handed over: live") {
        stage.print_note(&format!(
            "{} was handed over at {}, when the oldest event still queued was {}",
            line["projector"], line["position"], line["oldest_queued"]
        ));
    }
    stage
        .print_note("The old worker is stopped by SIGTERM, the new one started: from here on the one queue feeds all.");
    old_worker.terminate().await?;
    let worker = stage.start_worker("release-2")?;
    stage.wait_until_caught_up("release-2").await?;
    stage.show_status("release-2").await?;

    stage.print_chapter(
        "A bad event",
        "An order without an amount. The revenue projector breaks on it; the others must not notice.",
    );
    writer.append(shop::without_amount()).await?;
    stage.wait_for_status("release-2", "revenue", "broken").await?;
    stage.wait_until_caught_up("release-2").await?;
    stage.show_status("release-2").await?;

    stage.print_chapter("kill -9", "In the middle of its work, and a new one in its place.");
    worker.kill().await?;
    let worker = stage.start_worker("release-2")?;

    stage.print_chapter(
        "Release 3: mended",
        "Boot takes the broken projector up where it stopped. The worker that runs picks it up by itself.",
    );
    stage.print_output(
        &stage
            .run(&["boot", "--projectors", "examples/demo/release-3"])
            .await?
            .expect_exit_code(0)?
            .stdout,
    );
    worker.terminate().await?;
    let worker = stage.start_worker("release-3")?;
    tokio::time::sleep(Duration::from_secs(1)).await;

    stage.print_chapter(
        "The end of the day",
        "The writer stops, the worker is stopped, and a last one plays until all is quiet.",
    );
    let written = writer.stop().await?;
    worker.terminate().await?;
    stage
        .run(&["play", "--until-idle", "--projectors", "examples/demo/release-3"])
        .await?
        .expect_exit_code(0)?;
    stage.print_note(&format!("{written} events were appended while all of this happened"));
    stage.show_status("release-3").await?;

    let verdicts = fold::check(&stage, before)
        .await
        .context("the read models cannot be compared with the log")?;
    stage.print_step("Each read model against a fold of the log", &format!("{verdicts}"));
    ensure!(verdicts.all_ok(), "a read model is not the fold of the log");
    println!("\nNothing lost, nothing twice.\n");
    stage.clear().await
}
