//! The database: version, settings, tables, grants.

use std::collections::HashMap;

use super::{Check, Level};
use crate::database::multi_row::MAX_BYTES;
use crate::database::{Database, Inspected, May, Migrated, NEEDS, SqlMode, TABLES};
use crate::model::error::Error;

/// In seconds. Half a second is what a busy network makes of it.
const CLOCKS_MAY_DIFFER: f64 = 5.0;

/// What a replica can do as well.
const READS: &[&str] = &["status", "audit"];

/// In seconds: beyond, a statement that waits for a row's lock would count as cut off.
const LONGEST_LOCK_WAIT: u64 = 60;

/// The oldest that have what our tables and our probes of holes need: enforced checks, defaults that are expressions, `nowait`.
const OLDEST_MYSQL: (u64, u64, u64) = (8, 0, 16);
const OLDEST_MARIADB: (u64, u64, u64) = (10, 3, 0);

pub(super) async fn examine(database: &Database, connections: u32, commands: &[String], checks: &mut Vec<Check>) {
    match database.inspect().await {
        Ok(inspected) => checks.extend(judge(
            &inspected,
            connections,
            commands.iter().any(|command| !READS.contains(&command.as_str())),
        )),
        Err(error) => checks.push(Check::failed("database settings", &Error::Database(error))),
    }
    checks.push(match database.migrated().await {
        Ok(Migrated::UpToDate) => Check::ok("tables", "as this release needs them"),
        Ok(Migrated::Untold) => Check::ok("tables", "there; this user may not see of which release"),
        Ok(Migrated::Behind) => {
            Check::bad(Level::Wrong, "tables", "missing, or of an older release", "run `projectionist migrate`")
        }
        Ok(Migrated::Ahead) => {
            Check::bad(Level::Wrong, "tables", "of a newer release than this one", "use that release, or a newer one")
        }
        Err(error) => Check::failed("tables", &Error::Database(error)),
    });
    match missing_grants(database).await {
        Ok(missing) => {
            checks.extend(missing.into_iter().map(|(command, missing)| of_grants(command, &missing, commands)))
        }
        Err(error) => checks.push(Check::failed("grants", &Error::Database(error))),
    }
}

/// What each command needs and the user may not.
async fn missing_grants(database: &Database) -> Result<Vec<(&'static str, Vec<String>)>, sqlx::Error> {
    let mut known: HashMap<(&str, &str), May> = HashMap::new();
    let mut all = Vec::new();
    for (command, needs) in NEEDS {
        let mut missing = Vec::new();
        for (named, privileges) in *needs {
            let tables = if *named == "*" { TABLES } else { std::slice::from_ref(named) };
            for (privilege, table) in
                privileges.iter().flat_map(|privilege| tables.iter().map(move |table| (*privilege, *table)))
            {
                // What is created is not there yet.
                let table = if privilege == "create" { "*" } else { table };
                let may = match known.get(&(privilege, table)) {
                    Some(may) => *may,
                    None => database.may(privilege, table).await?,
                };
                known.insert((privilege, table), may);
                let grant = format!("{privilege} on {table}");
                if may == May::No && !missing.contains(&grant) {
                    missing.push(grant);
                }
            }
        }
        all.push((*command, missing));
    }
    Ok(all)
}

fn of_grants(command: &str, missing: &[String], commands: &[String]) -> Check {
    let check = format!("grants for {command}");
    if missing.is_empty() {
        return Check::ok(&check, "all there");
    }
    match commands.iter().any(|wanted| wanted == command) {
        true => Check::bad(Level::Wrong, &check, format!("missing: {}", missing.join(", ")), "grant them to the user"),
        false => Check { check, level: Level::Note, says: format!("missing: {}", missing.join(", ")), remedy: None },
    }
}

fn judge(inspected: &Inspected, connections: u32, writes: bool) -> Vec<Check> {
    let setting = |name: &str| inspected.settings.get(name).map(String::as_str);
    let number = |name: &str| setting(name).and_then(|value| value.parse::<u64>().ok());
    let is_on = |name: &str| setting(name).is_some_and(|value| value == "ON" || value == "1");
    let mut checks = vec![of_version(setting("version").unwrap_or_default()), of_tls(inspected)];

    checks.push(match is_on("read_only") || is_on("innodb_read_only") {
        false => Check::ok("primary", format!("takes writes, as {}", inspected.user)),
        true => Check::bad(
            if writes { Level::Wrong } else { Level::Note },
            "primary",
            "the server is read-only: a replica, or a former primary",
            "name the primary (on Aurora: the cluster's writer endpoint)",
        ),
    });
    if is_on("log_bin") && setting("binlog_format") == Some("STATEMENT") {
        checks.push(Check::bad(
            Level::Wrong,
            "binlog_format",
            "STATEMENT: under read committed, as we need it, the server then refuses every write",
            "set it to ROW or MIXED",
        ));
    }
    checks.push(of_durability(number("innodb_flush_log_at_trx_commit"), is_on("log_bin"), number("sync_binlog")));
    checks.push(of_connections(u64::from(connections), number("max_connections"), inspected.connected));
    checks.push(match number("innodb_lock_wait_timeout").unwrap_or_default() {
        wait if wait <= LONGEST_LOCK_WAIT => Check::ok("innodb_lock_wait_timeout", format!("{wait} s")),
        wait => Check::bad(
            Level::Warning,
            "innodb_lock_wait_timeout",
            format!("{wait} s: a statement that waits for longer than {LONGEST_LOCK_WAIT} s counts as cut off, and is tried again"),
            format!("set it to {LONGEST_LOCK_WAIT} or less"),
        ),
    });
    checks.push(match number("max_allowed_packet").unwrap_or_default() {
        bytes if bytes >= 2 * MAX_BYTES as u64 => Check::ok("max_allowed_packet", format!("{bytes} bytes")),
        bytes => Check::bad(
            Level::Warning,
            "max_allowed_packet",
            format!("{bytes} bytes: inserts are sent one by one, and larger events cannot be appended"),
            "set it to 64M",
        ),
    });
    checks.push(of_sql_mode(&inspected.sql_mode, inspected.projectors_run));
    checks.push(of_clock(
        "database clock",
        inspected.clock_ahead,
        CLOCKS_MAY_DIFFER,
        "it dates events by it, and lag is told by ours",
    ));
    checks.push(match inspected.sees_triggers {
        true => Check::ok("trigger", "granted: inserts are sent together where they can be"),
        false => Check::bad(
            Level::Note,
            "trigger",
            "not granted to the user itself, and so inserts are sent one by one",
            "for speed, grant trigger and insert on the projectors' own tables",
        ),
    });
    checks
}

fn of_sql_mode(servers: &str, projectors_run: SqlMode) -> Check {
    let is_strict = ["STRICT_TRANS_TABLES", "STRICT_ALL_TABLES"].iter().any(|mode| servers.contains(mode));
    match (is_strict, projectors_run) {
        (true, _) => Check::ok("sql_mode", "strict"),
        (false, SqlMode::Strict) => Check::bad(
            Level::Note,
            "sql_mode",
            "the server's own is not strict; projectors run strict all the same",
            "for other clients, add STRICT_TRANS_TABLES; to have projectors run like them, give --sql-mode server",
        ),
        (false, SqlMode::Server) => Check::bad(
            Level::Warning,
            "sql_mode",
            "not strict, and projectors run so by --sql-mode server: values that do not fit into a column are cut off \
             silently, and inserts are sent one by one",
            "leave out --sql-mode server, or add STRICT_TRANS_TABLES",
        ),
    }
}

/// A clock that is so many seconds ahead of ours.
pub(super) fn of_clock(check: &str, ahead: f64, may_differ: f64, why: &str) -> Check {
    let told = format!("{:.1} s {} this host's", ahead.abs(), if ahead < 0.0 { "behind" } else { "ahead of" });
    match ahead.abs() <= may_differ {
        true => Check::ok(check, told),
        false => Check::bad(Level::Warning, check, format!("{told}: {why}"), "set both by NTP"),
    }
}

fn of_version(version: &str) -> Check {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse::<u64>().ok());
    let mut next = || numbers.next().unwrap_or_default();
    let found = (next(), next(), next());
    let (kind, oldest) = match version.contains("MariaDB") {
        true => ("MariaDB", OLDEST_MARIADB),
        false => ("MySQL", OLDEST_MYSQL),
    };
    match found >= oldest {
        true => Check::ok("version", format!("{kind} {version}")),
        false => Check::bad(
            Level::Wrong,
            "version",
            format!("{kind} {version} is too old"),
            format!("use {}.{}.{} or newer", oldest.0, oldest.1, oldest.2),
        ),
    }
}

fn of_tls(inspected: &Inspected) -> Check {
    match inspected.tls.as_str() {
        "" => Check::bad(
            Level::Warning,
            "TLS",
            "the connection is not encrypted",
            "have the server offer TLS, and insist on it by --database-ca FILE",
        ),
        version if inspected.is_verified => {
            Check::ok("TLS", format!("{version}, and the server's certificate is checked"))
        }
        version => Check::bad(
            Level::Note,
            "TLS",
            format!("{version}, with whoever answers: the server's certificate is not checked"),
            "to insist, give --database-ca FILE",
        ),
    }
}

fn of_durability(flush: Option<u64>, has_log: bool, sync: Option<u64>) -> Check {
    if flush.is_some_and(|flush| flush != 1) {
        return Check::bad(
            Level::Warning,
            "durability",
            "innodb_flush_log_at_trx_commit is not 1: a server that crashes may forget commits, events among them",
            "set it to 1",
        );
    }
    match has_log && sync.is_some_and(|sync| sync != 1) {
        true => Check::bad(
            Level::Warning,
            "durability",
            "sync_binlog is not 1: a replica that takes over after a crash may lack commits",
            "set it to 1",
        ),
        false => Check::ok("durability", "a commit is on disk when it is acknowledged"),
    }
}

fn of_connections(ours: u64, most: Option<u64>, connected: Option<u64>) -> Check {
    let (Some(most), Some(connected)) = (most, connected) else {
        return Check::ok("connections", format!("at most {ours} of ours"));
    };
    let told = format!("at most {ours} of ours; the server takes {most}, and has {connected} now");
    match ours {
        _ if ours > most => {
            Check::bad(Level::Wrong, "connections", told, "lower --connections, or raise max_connections")
        }
        _ if ours + connected > most => {
            Check::bad(Level::Warning, "connections", told, "lower --connections, or raise max_connections")
        }
        _ => Check::ok("connections", told),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As RDS has them, but for what the test changes: the settings of the servers under test are everybody's.
    fn inspected(changed: &[(&str, &str)]) -> Inspected {
        let usual = [
            ("version", "8.4.3"),
            ("read_only", "OFF"),
            ("log_bin", "ON"),
            ("binlog_format", "ROW"),
            ("sync_binlog", "1"),
            ("innodb_flush_log_at_trx_commit", "1"),
            ("max_connections", "500"),
            ("innodb_lock_wait_timeout", "50"),
            ("max_allowed_packet", "67108864"),
        ];
        let settings =
            usual.iter().chain(changed).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Inspected {
            settings,
            user: "app@%".into(),
            sql_mode: "STRICT_TRANS_TABLES,NO_ENGINE_SUBSTITUTION".into(),
            projectors_run: SqlMode::Strict,
            tls: "TLSv1.3".into(),
            is_verified: true,
            connected: Some(10),
            clock_ahead: 0.1,
            sees_triggers: true,
        }
    }

    fn bad(inspected: &Inspected, connections: u32) -> Vec<(String, Level)> {
        let checks = judge(inspected, connections, true).into_iter();
        checks.filter(|check| check.level != Level::Ok).map(|check| (check.check, check.level)).collect()
    }

    #[test]
    fn each_setting_that_is_not_as_it_should_be_has_its_line_and_no_other() {
        assert_eq!(bad(&inspected(&[]), 16), []);
        for (name, value, check, level) in [
            ("version", "5.7.44", "version", Level::Wrong),
            ("version", "8.0.15", "version", Level::Wrong),
            ("version", "10.2.44-MariaDB", "version", Level::Wrong),
            ("read_only", "ON", "primary", Level::Wrong),
            ("innodb_read_only", "ON", "primary", Level::Wrong),
            ("binlog_format", "STATEMENT", "binlog_format", Level::Wrong),
            ("sync_binlog", "0", "durability", Level::Warning),
            ("innodb_flush_log_at_trx_commit", "2", "durability", Level::Warning),
            ("max_connections", "20", "connections", Level::Warning),
            ("max_connections", "15", "connections", Level::Wrong),
            ("innodb_lock_wait_timeout", "120", "innodb_lock_wait_timeout", Level::Warning),
            ("max_allowed_packet", "1024", "max_allowed_packet", Level::Warning),
        ] {
            assert_eq!(bad(&inspected(&[(name, value)]), 16), [(check.to_owned(), level)], "{name} = {value}");
        }
        for (name, value) in
            [("version", "8.0.16"), ("version", "10.3.39-MariaDB-log"), ("version", "9.7.4"), ("log_bin", "OFF")]
        {
            assert_eq!(bad(&inspected(&[(name, value)]), 16), [], "{name} = {value}");
        }
    }

    #[test]
    fn a_session_that_is_not_as_it_should_be_has_its_line_and_no_other() {
        let bare = || inspected(&[]);
        for (session, check) in [
            (Inspected { tls: String::new(), ..bare() }, ("TLS", Level::Warning)),
            (Inspected { is_verified: false, ..bare() }, ("TLS", Level::Note)),
            (Inspected { sql_mode: "NO_ENGINE_SUBSTITUTION".into(), ..bare() }, ("sql_mode", Level::Note)),
            (
                Inspected { sql_mode: "NO_ENGINE_SUBSTITUTION".into(), projectors_run: SqlMode::Server, ..bare() },
                ("sql_mode", Level::Warning),
            ),
            (Inspected { clock_ahead: -7.0, ..bare() }, ("database clock", Level::Warning)),
            (Inspected { sees_triggers: false, ..bare() }, ("trigger", Level::Note)),
        ] {
            assert_eq!(bad(&session, 16), [(check.0.to_owned(), check.1)]);
        }
    }
}
