//! Files whose statements and procedures change their session in any way. Either they store exact
//! values, or they are broken with a reason. They do not affect other projectors.

use std::fmt::Write as _;

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use projectionist::{Registry, Status, load};

use crate::support::{Folder, World, eventually, execute, seed, side_by_side};

/// The number of databases in which cases run side by side.
const WORLDS: usize = 4;

/// Unusual statements that a file runs for each event, and the value that they store in a clean
/// session.
#[derive(Debug, Clone, Copy)]
struct HostileCase {
    name: &'static str,
    /// Run first, as the owner of the tables.
    setup: &'static str,
    /// Statements of `[[on]]`, in order.
    statements: &'static [&'static str],
    /// The value of the row `(position, name, value)` for each event; `None` if no row is stored.
    stores: Option<i64>,
}

/// A procedure that runs statements before and after it stores its row.
macro_rules! procedure {
    ($name:literal, $before:literal, $after:literal, $stores:expr) => {
        HostileCase {
            name: $name,
            setup: concat!(
                "create procedure p_",
                $name,
                "(in at bigint) begin ",
                $before,
                " insert into odd (position, what, value) values (at, '",
                $name,
                "', 1); ",
                $after,
                " end"
            ),
            statements: &[concat!("call p_", $name, "(:position)")],
            stores: $stores,
        }
    };
}

const HOSTILE_CASES: &[HostileCase] = &[
    procedure!(
        "swallows",
        "declare continue handler for sqlexception begin end; insert into no_such_table \
         values (1);",
        "insert into odd (position, what, value) values (at, null, 'x');",
        Some(1)
    ),
    procedure!("commits", "", "commit;", Some(1)),
    procedure!("commits_first", "commit;", "", Some(1)),
    procedure!("begins", "start transaction;", "", Some(1)),
    procedure!("rolls_back", "", "rollback;", None),
    procedure!("rolls_back_first", "rollback;", "", Some(1)),
    procedure!(
        "begins_after",
        "rollback; start transaction;",
        "commit; start transaction;",
        Some(1)
    ),
    procedure!("creates", "create table if not exists made (a int);", "", Some(1)),
    procedure!(
        "swallows_and_creates",
        "declare continue handler for sqlexception begin end; create table made_too (a int);",
        "",
        Some(1)
    ),
    procedure!("savepoint", "savepoint a;", "rollback to savepoint a;", None),
    procedure!(
        "releases",
        "savepoint projectionist; release savepoint projectionist;",
        "",
        Some(1)
    ),
    procedure!("lax", "set session sql_mode = '';", "", Some(1)),
    procedure!("zone", "set session time_zone = '+05:00';", "", Some(1)),
    procedure!("limited", "set session sql_select_limit = 1;", "", Some(1)),
    procedure!("no_autocommit", "set session autocommit = 0;", "", Some(1)),
    procedure!(
        "autocommits",
        "set session autocommit = 0; set session autocommit = 1;",
        "",
        Some(1)
    ),
    procedure!("read_only", "", "set session transaction read only;", Some(1)),
    procedure!(
        "uncommitted",
        "",
        "set session transaction isolation level read uncommitted;",
        Some(1)
    ),
    procedure!(
        "next_uncommitted",
        "",
        "set session transaction isolation level serializable;",
        Some(1)
    ),
    procedure!("chains", "set session completion_type = 1;", "", Some(1)),
    procedure!(
        "unchecked",
        "set session foreign_key_checks = 0;",
        "set session unique_checks = 0;",
        Some(1)
    ),
    procedure!(
        "latin",
        "set character_set_client = latin1;",
        "set character_set_results = latin1;",
        Some(1)
    ),
    procedure!("collates", "set collation_connection = latin1_swedish_ci;", "", Some(1)),
    procedure!("increments", "set session auto_increment_increment = 7;", "", Some(1)),
    procedure!(
        "waits",
        "set session wait_timeout = 2;",
        "set session innodb_lock_wait_timeout = 1;",
        Some(1)
    ),
    procedure!("locks", "do get_lock('hostile', 0);", "", Some(1)),
    procedure!(
        "fails_at_seven",
        "if at = 7 then signal sqlstate '45000' set message_text = 'seven'; end if;",
        "",
        Some(1)
    ),
    HostileCase {
        name: "counts",
        setup: "",
        statements: &[
            "set @n = coalesce(@n, 0) + 1",
            "insert into odd (position, what, value) values (:position, 'counts', @n)",
        ],
        stores: Some(1),
    },
    HostileCase {
        name: "sees",
        setup: "",
        statements: &[
            "insert into odd (position, what, value) values (:position, 'sees', coalesce(@seen, \
             3))",
            "set @seen = :position",
        ],
        stores: Some(3),
    },
    HostileCase {
        name: "last_id",
        setup: "create table numbers (id bigint auto_increment primary key)",
        statements: &[
            "insert into odd (position, what, value) select :position, 'last_id', last_insert_id()",
            "insert into numbers () values ()",
        ],
        stores: Some(0),
    },
    HostileCase {
        name: "temporary",
        setup: "create procedure p_temporary(in at bigint) begin create temporary table if not \
                exists temporary_ones (a int); \
                insert into temporary_ones values (1); \
                insert into odd (position, what, value) select at, 'temporary', count(*) \
                from temporary_ones; end",
        statements: &["call p_temporary(:position)"],
        stores: Some(1),
    },
    HostileCase {
        name: "function",
        setup: "create function f_hostile() returns bigint not deterministic no sql begin set @f = \
                coalesce(@f, 0) + 1; return @f; end",
        statements: &[
            "insert into odd (position, what, value) values (:position, 'function', f_hostile())",
        ],
        stores: Some(1),
    },
    HostileCase {
        name: "prepares",
        setup: "create procedure p_prepares(in at bigint) begin declare found bigint default 1; \
                begin declare continue handler for sqlexception set found = 2; execute hostile; \
                end; \
                prepare hostile from 'do 1'; \
                insert into odd (position, what, value) values (at, 'prepares', found); end",
        statements: &["call p_prepares(:position)"],
        stores: Some(2),
    },
];

/// A file that runs these cases in order and also records each event.
fn file(cases: &[HostileCase]) -> String {
    let mut text = "name = 'hostile'\nversion = 1\nmode = 'from_beginning'\n".to_owned();
    let mut on = |sql: &str| {
        write!(text, "\n[[on]]\nevents = ['*']\nsql = '''{sql}'''\n")
            .expect("writing to a string succeeds");
    };
    on("insert into odd (position, what, value) values (:position, 'plain', 0)");
    for sql in cases.iter().flat_map(|case| case.statements) {
        on(sql);
    }
    text
}

const VICTIM: &str = "name = 'victim'\nversion = 1\nmode = 'from_beginning'\n\
    [[on]]\nevents = ['*']\nsql = '''insert into victim (position, at, text, number) \
    values (:position, :recorded_at, concat(:stream_id, ' größe'), @n)'''\n";

async fn rows(world: &World) -> Vec<(u64, Option<String>, Option<i64>)> {
    let sql = "select position, what, value from odd order by position, what, value";
    sqlx::query_as(sql)
        .fetch_all(&mut world.connection().await)
        .await
        .expect("the rows are readable")
}

/// Plays a file with these cases beside an unaffected one and asserts the rows of both. Returns the
/// final status of the file's projector.
async fn play(cases: &[HostileCase]) -> Status {
    let world = World::new().await;
    world
        .execute(
            "create table odd (position bigint unsigned not null, what varchar(30), \
             value bigint) engine = InnoDB",
        )
        .await;
    world
        .execute(
            "create table victim (position bigint unsigned not null, at timestamp(6) null, \
             text varchar(40) collate utf8mb4_bin, number bigint) engine = InnoDB",
        )
        .await;
    for case in cases.iter().filter(|case| !case.setup.is_empty()) {
        world.execute(case.setup).await;
    }
    let text = file(cases);
    let folder = Folder::new().with("a.toml", &text).with("b.toml", VICTIM);
    let mut registry = Registry::new();
    load(folder.path().as_ref(), &mut registry).unwrap_or_else(|error| panic!("{error}\n{text}"));

    world.append(45).await;
    let booted = world.boot(&registry).await;
    let is_broken = async || {
        matches!(world.entry("hostile").await.map(|entry| entry.status), Some(Status::Broken(_)))
    };
    if !booted.is_released() {
        // The file's projector stopped the deploy. The next release leaves it out.
        assert!(is_broken().await, "{text}{:?}", world.ledger.entries().await);
        let folder = Folder::new().with("b.toml", VICTIM);
        registry = Registry::new();
        load(folder.path().as_ref(), &mut registry).expect("the file is valid");
        assert!(
            world.boot(&registry).await.is_released(),
            "{text}{:?}",
            world.ledger.entries().await
        );
    }
    world.append(12).await;
    world.play_until_idle(&registry).await;

    let entry = world.entry("hostile").await.expect("the projector is in the ledger");
    match &entry.status {
        Status::Broken(failure) => assert!(!failure.error.is_empty(), "{text}"),
        _ => {
            assert_eq!(entry.position.get(), 57, "{text}{entry:?}");
            let mut expected = Vec::new();
            for position in 1..=57 {
                expected.push((position, Some("plain".to_owned()), Some(0)));
                let stored =
                    cases.iter().filter_map(|case| Some((case.name.to_owned(), case.stores?)));
                expected.extend(stored.map(|(name, value)| (position, Some(name), Some(value))));
            }
            expected.sort();
            assert_eq!(rows(&world).await, expected, "{text}");
        }
    }
    let victim: Vec<(u64, i64)> = sqlx::query_as(AssertSqlSafe(
        "select v.position, cast(v.at is not null and abs(timestampdiff(second, '1970-01-01', \
         e.recorded_at) - floor(unix_timestamp(v.at))) <= 1 \
         and v.text <=> convert(concat(e.stream_id, ' größe') using utf8mb4) collate utf8mb4_bin \
         and v.number is null as signed) \
         from victim v join events e using (position) order by v.position",
    ))
    .fetch_all(&mut world.connection().await)
    .await
    .expect("the rows are readable");
    assert_eq!(victim, (1..=57).map(|position| (position, 1)).collect::<Vec<_>>(), "{text}");
    assert_eq!(
        (world.status("victim").await, world.position("victim").await),
        ("live".into(), 57),
        "{text}"
    );
    assert_eq!(world.high_water().await, 57, "{text}");
    world.run(&["audit"]).await.exits(0);
    entry.status
}

#[tokio::test]
async fn a_hostile_file_is_exact_or_broken_and_leaves_others_untouched() {
    side_by_side(WORLDS, HOSTILE_CASES, async |case| {
        let ending = play(std::slice::from_ref(case)).await;
        eprintln!("{}: {ending:?}", case.name);
    })
    .await;
}

#[tokio::test]
async fn combined_hostile_statements_are_exact_or_broken_and_leave_others_untouched() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let chosen = (0..10).map(|_| {
        let mut chosen: Vec<HostileCase> = HOSTILE_CASES.to_vec();
        dice.shuffle(&mut chosen);
        chosen.truncate(dice.usize(2..4));
        chosen
    });
    side_by_side(WORLDS, chosen, async |chosen| {
        play(&chosen).await;
    })
    .await;
}

/// A file's user variables and `last_insert_id()` have the same values in boot, which applies up to
/// a thousand events at a time, and in play.
#[tokio::test]
async fn user_variables_are_reset_for_each_event() {
    let stateful: Vec<HostileCase> = HOSTILE_CASES
        .iter()
        .filter(|case| ["counts", "sees", "last_id"].contains(&case.name))
        .copied()
        .collect();
    assert_eq!(stateful.len(), 3);
    let status = play(&stateful).await;
    assert_eq!(status.to_string(), "live", "{status:?}");
}

/// For the fifth event, the procedure locks row 1, waits, locks row 2, and ignores errors.
const BEST_EFFORT: &str = "name = 'hostile'\nversion = 1\nmode = 'from_beginning'\n\
    [[on]]\nevents = ['*']\nsql = 'insert into before_it (position) values (:position)'\n\
    [[on]]\nevents = ['*']\nsql = 'call best_effort(:position)'\n\
    [[on]]\nevents = ['*']\nsql = 'insert into after_it (position) values (:position)'\n";

/// Makes the procedure lose a deadlock: another transaction locks row 2 and waits for row 1 before
/// the procedure locks row 2.
async fn provoke_deadlock(world: &World, mut keeper: MySqlConnection) {
    let mut rival = world.connection().await;
    // Our own sessions call get_lock, too, so the name of the lock is part of the condition.
    let waiting = format!("get_lock('{}'", world.database_name);
    eventually("the procedure waits", async || {
        world.sessions().await.iter().any(|session| session.statement.contains(&waiting))
    })
    .await;
    execute(&mut rival, "begin").await;
    // The server rolls back the transaction that has changed fewer rows, so this one changes many.
    let many = "with recursive n as (select 1 as n union all select n + 1 from n where n < 900) \
                select n from n";
    execute(&mut rival, &format!("insert into ballast {many}")).await;
    execute(&mut rival, "update pair set n = n + 100 where id = 2").await;
    let rival = tokio::spawn(async move {
        execute(&mut rival, "update pair set n = n + 100 where id = 1").await;
        execute(&mut rival, "commit").await;
    });
    eventually("the rival waits for the procedure", async || world.lock_waits().await == 1).await;
    execute(&mut keeper, "do release_all_locks()").await;
    rival.await.expect("the rival commits");
}

#[tokio::test]
async fn a_deadlock_swallowed_by_a_procedure_is_retried_and_each_event_applied_once() {
    for in_boot in [true, false] {
        let world = World::new().await;
        for table in ["before_it", "after_it"] {
            world
                .execute(&format!("create table {table} (position bigint unsigned not null)"))
                .await;
        }
        world.execute("create table ballast (n int not null)").await;
        world.execute("create table pair (id int primary key, n int not null)").await;
        world.execute("insert into pair values (1, 0), (2, 0)").await;
        let lock = &world.database_name;
        let procedure = format!(
            "create procedure best_effort(in at bigint) begin declare continue handler for \
             sqlexception begin end; \
             if at = 5 then \
             update pair set n = n + 1 where id = 1; \
             do get_lock('{lock}', 60); do release_lock('{lock}'); \
             update pair set n = n + 1 where id = 2; \
             end if; end"
        );
        world.execute(&procedure).await;
        let mut keeper = world.connection().await;
        execute(&mut keeper, &format!("do get_lock('{lock}', 0)")).await;
        let folder = Folder::new().with("a.toml", BEST_EFFORT);
        let mut registry = Registry::new();
        load(folder.path().as_ref(), &mut registry).expect("the file is valid");
        if in_boot {
            world.append(10).await;
            let (booted, ()) =
                tokio::join!(world.boot(&registry), provoke_deadlock(&world, keeper));
            assert!(booted.is_released());
        } else {
            world.boot(&registry).await;
            world.append(10).await;
            let playing = world.start_play(&registry);
            provoke_deadlock(&world, keeper).await;
            eventually("the projector is at the end", async || {
                world.position("hostile").await == 10
            })
            .await;
            assert_eq!(playing.stop().await.broken, 0);
        }
        assert_eq!(
            (world.status("hostile").await, world.position("hostile").await),
            ("live".into(), 10)
        );
        for table in ["before_it", "after_it"] {
            assert_eq!(
                world.positions_in(table).await,
                (1..=10).collect::<Vec<u64>>(),
                "{table}, in boot: {in_boot}"
            );
        }
        let rows: Vec<(i32, i32)> = sqlx::query_as("select id, n from pair order by id")
            .fetch_all(&mut world.connection().await)
            .await
            .expect("the rows are readable");
        assert_eq!(rows, [(1, 101), (2, 101)], "in boot: {in_boot}");
    }
}

impl World {
    async fn positions_in(&self, table: &str) -> Vec<u64> {
        let sql = format!("select position from {table} order by position");
        sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_all(&mut self.connection().await)
            .await
            .expect("the table is readable")
    }
}
