//! `migrate` beside tables that are not ours, and after an interruption at each point.

use crate::support::World;

const MIGRATIONS: [&str; 2] = [
    include_str!("../../migrations/0001_tables.sql"),
    include_str!("../../migrations/0002_guarantees.sql"),
];

const OUR_TABLES: [&str; 4] = ["events", "event_log", "projectors", "log_acceptances"];

/// The statements of a migration.
fn statements(migration: &str) -> Vec<String> {
    let sql: Vec<&str> =
        migration.lines().filter(|line| !line.trim_start().starts_with("--")).collect();
    let statements = sql.join("\n");
    let statements = statements.split(';').map(str::trim).filter(|sql| !sql.is_empty());
    statements.map(str::to_owned).collect()
}

async fn drop_our_tables(world: &World) {
    for table in OUR_TABLES.iter().chain(&["projectionist_migrations"]) {
        world.execute(&format!("drop table if exists {table}")).await;
    }
}

#[tokio::test]
async fn a_foreign_table_of_our_name_is_refused_before_anything_is_created() {
    let world = World::new().await;
    let tables = "select count(*) from information_schema.tables where table_schema = database()";
    for name in OUR_TABLES {
        drop_our_tables(&world).await;
        world.execute(&format!("create table {name} (id int)")).await;

        let refused = world.run(&["migrate"]).await.exits(2);

        assert!(refused.stderr.contains(&format!("did not create: {name}.")), "{}", refused.stderr);
        assert_eq!(world.number(tables).await, 1, "nothing was created");
        let doctor = world.run(&["doctor"]).await.stdout;
        let line = doctor.lines().find(|line| line.contains(" tables ")).expect("the check");
        assert!(line.contains(name) && !line.contains("projectionist migrate"), "{line}");

        world.execute(&format!("rename table {name} to theirs")).await;
        world.run(&["migrate"]).await.exits(0);
        assert_eq!(world.number("select count(*) from event_log").await, 1);
        world.execute("drop table theirs").await;
    }
}

#[tokio::test]
async fn a_migration_killed_at_any_point_is_continued_by_the_next_one() {
    let world = World::new().await;
    world.execute("create table migrated as select * from projectionist_migrations").await;
    world.execute("create table template like projectionist_migrations").await;
    for (index, migration) in MIGRATIONS.iter().enumerate() {
        let version = index + 1;
        let statements_of_it = statements(migration);
        for executed in 0..=statements_of_it.len() {
            drop_our_tables(&world).await;
            world.execute("create table projectionist_migrations like template").await;
            world
                .execute(&format!(
                    "insert into projectionist_migrations \
                     select * from migrated where version <= {version}"
                ))
                .await;
            world
                .execute(&format!(
                    "update projectionist_migrations set success = false where version = {version}"
                ))
                .await;
            let before = MIGRATIONS[..index].iter().flat_map(|migration| statements(migration));
            for statement in before.chain(statements_of_it[..executed].iter().cloned()) {
                world.execute(&statement).await;
            }

            world.run(&["migrate"]).await.exits(0);

            let applied = "select count(*) from projectionist_migrations where success";
            assert_eq!(world.number(applied).await, 2, "after {executed} of {version}");
            let with_key = "select count(*) from event_log where signing_key is not null";
            assert_eq!(world.number(with_key).await, 1);
            world.append(1).await;
            world.run(&["audit"]).await.exits(0);
        }
    }
}
