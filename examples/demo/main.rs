//! The life of a system, on real servers. Run it with `localstack/demo`.
//!
//! Every step runs the shipped binary as a team would run it. At the end, each read model must
//! equal a fold of the log. The demo fails if any check fails.

mod demo;
mod fold;
mod shop;

use std::time::Duration;

use anyhow::{Context, ensure};

use demo::Demo;

/// The number of events that are in the log before the first release.
const HISTORY: usize = 20_000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let demo = Demo::prepare().await?;
    demo.print_step(
        "The servers",
        &format!(
            "{}, and SQS on LocalStack. The database and the queue are new.",
            demo.server().await?
        ),
    );

    demo.print_chapter(
        "An application appends events",
        "It has done so for a while, and it continues during the demo.",
    );
    demo.run(&["migrate"]).await?.expect_exit_code(0)?;
    let mut shop = shop::Shop::default();
    let appended = demo.run_with(&["append"], &shop.lines(HISTORY)).await?.expect_exit_code(0)?;
    demo.print_output(&appended.stdout);
    let writer = demo.start_writer(shop).await?;

    demo.print_chapter(
        "Release 1: two projectors",
        "Boot replays the log for them before the release goes live. Then a worker plays.",
    );
    demo.print_output(
        &demo
            .run(&["boot", "--projectors", "examples/demo/release-1"])
            .await?
            .expect_exit_code(0)?
            .stdout,
    );
    let old_worker = demo.start_worker("release-1")?;
    demo.wait_until_caught_up("release-1").await?;
    demo.show_status("release-1").await?;

    demo.print_chapter(
        "Release 2: a new projector, one that runs once, and one from now on",
        "Boot reads the store up to the oldest event in the queue, and hands over. \
         The old worker continues meanwhile.",
    );
    let before = demo.high_water().await?;
    let booted = demo
        .run(&["boot", "--projectors", "examples/demo/release-2"])
        .await?
        .expect_exit_code(0)?;
    demo.print_output(&booted.stdout);
    for line in booted.log_lines("handed over: live") {
        demo.print_note(&format!(
            "{} was handed over at {}. The oldest event in the queue was {}",
            line["projector"], line["position"], line["oldest_queued"]
        ));
    }
    demo.print_note(
        "SIGTERM stops the old worker, and a new one starts. From here on, one queue feeds all \
             projectors.",
    );
    old_worker.terminate().await?;
    let worker = demo.start_worker("release-2")?;
    demo.wait_until_caught_up("release-2").await?;
    demo.show_status("release-2").await?;

    demo.print_chapter(
        "A bad event",
        "An order has no amount. The revenue projector breaks on it, and the others continue.",
    );
    writer.append(shop::without_amount()).await?;
    demo.wait_for_status("release-2", "revenue", "broken").await?;
    demo.wait_until_caught_up("release-2").await?;
    demo.show_status("release-2").await?;

    demo.print_chapter(
        "kill -9",
        "The worker is killed in the middle of its work. A new one replaces it.",
    );
    worker.kill().await?;
    let worker = demo.start_worker("release-2")?;

    demo.print_chapter(
        "Release 3: fixed",
        "Boot resumes the broken projector where it stopped. The running worker then plays it.",
    );
    demo.print_output(
        &demo
            .run(&["boot", "--projectors", "examples/demo/release-3"])
            .await?
            .expect_exit_code(0)?
            .stdout,
    );
    worker.terminate().await?;
    let worker = demo.start_worker("release-3")?;
    tokio::time::sleep(Duration::from_secs(1)).await;

    demo.print_chapter(
        "The end of the day",
        "The writer and the worker stop. A last worker plays until everything is idle.",
    );
    let written = writer.stop().await?;
    worker.terminate().await?;
    demo.run(&["play", "--until-idle", "--projectors", "examples/demo/release-3"])
        .await?
        .expect_exit_code(0)?;
    demo.print_note(&format!("{written} events were appended during the demo"));
    demo.show_status("release-3").await?;

    let verdicts = fold::check(&demo, before)
        .await
        .context("the read models cannot be compared with the log")?;
    demo.print_step("Each read model, compared with a fold of the log", &format!("{verdicts}"));
    ensure!(verdicts.all_ok(), "a read model is not the fold of the log");
    println!("\nNo event was lost, and none was applied twice.\n");
    demo.clear().await
}
