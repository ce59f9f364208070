//! Event types that a projector names and that no event has.

use crate::support::{Folder, World, event};

const FILE: &str = r"
name = 'orders'
version = 1
mode = 'from_beginning'
[[on]]
events = ['opened', 'Amended', 'Never']
sql = 'do 1'
";

#[tokio::test]
async fn boot_and_doctor_warn_of_a_type_that_the_log_does_not_have_and_suggest_a_similar_one() {
    let world = World::new().await;
    let folder = Folder::new().with("orders.toml", FILE);
    let boot = ["boot", "--projectors", folder.path()];
    let doctor = ["doctor", "--projectors", folder.path()];
    // The events of an empty log are yet to come.
    let empty = world.run(&boot).await.exits(0);
    assert!(!empty.stderr.contains("has the type"), "{}", empty.stderr);

    let events: Vec<_> = (0..6).map(event).collect();
    world.store.append(&events).await.expect("appended");
    let warning =
        "no event in the log has the type \"Never\", \"opened\" (did you mean \"Opened\"?)";
    let booted = world.run(&boot).await.exits(0);
    let plain = booted.stderr.replace('\\', "");
    assert!(plain.contains(warning), "{}", booted.stderr);
    let doctor = world.run(&doctor).await;
    assert!(doctor.stdout.contains(warning), "{}", doctor.stdout);
}
