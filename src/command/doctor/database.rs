//! The database: version, settings, tables, grants.

use std::collections::HashMap;

use super::{Check, Level};
use crate::database::multi_row::MAX_BYTES;
use crate::database::{
    COMMAND_PRIVILEGES, Database, MigrationState, PrivilegeCheck, ServerReport, SqlMode, TABLES,
};
use crate::model::error::Error;

/// In seconds. Half a second is what a busy network makes of it.
const MAX_CLOCK_SKEW_SECONDS: f64 = 5.0;

/// What a replica can do as well.
const READ_ONLY_COMMANDS: &[&str] = &["status", "audit"];

/// In seconds: beyond, a statement that waits for a row's lock would count as cut off.
const MAX_LOCK_WAIT_SECONDS: u64 = 60;

/// The oldest that have what our tables and our probes of holes need: enforced checks, defaults
/// that are expressions, `nowait`.
const MIN_MYSQL_VERSION: (u64, u64, u64) = (8, 0, 16);
const MIN_MARIADB_VERSION: (u64, u64, u64) = (10, 3, 0);

pub(super) async fn examine(
    database: &Database,
    connections: u32,
    commands: &[String],
    checks: &mut Vec<Check>,
) {
    match database.inspect().await {
        Ok(inspected) => checks.extend(check_settings(
            &inspected,
            connections,
            commands.iter().any(|command| !READ_ONLY_COMMANDS.contains(&command.as_str())),
        )),
        Err(error) => checks.push(Check::failed("database settings", &Error::Database(error))),
    }
    checks.push(match database.migration_state().await {
        Ok(MigrationState::UpToDate) => Check::ok("tables", "as this release needs them"),
        Ok(MigrationState::Unknown) => {
            Check::ok("tables", "there; this user may not see of which release")
        }
        Ok(MigrationState::Behind) => Check::problem(
            Level::Error,
            "tables",
            "missing, or of an older release",
            "run `projectionist migrate`",
        ),
        Ok(MigrationState::Ahead) => Check::problem(
            Level::Error,
            "tables",
            "of a newer release than this one",
            "use that release, or a newer one",
        ),
        Err(error) => Check::failed("tables", &Error::Database(error)),
    });
    match missing_grants(database).await {
        Ok(missing) => checks.extend(
            missing.into_iter().map(|(command, missing)| check_grants(command, &missing, commands)),
        ),
        Err(error) => checks.push(Check::failed("grants", &Error::Database(error))),
    }
}

/// What each command needs and the user may not.
async fn missing_grants(
    database: &Database,
) -> Result<Vec<(&'static str, Vec<String>)>, sqlx::Error> {
    let mut known: HashMap<(&str, &str), PrivilegeCheck> = HashMap::new();
    let mut all = Vec::new();
    for (command, needs) in COMMAND_PRIVILEGES {
        let mut missing = Vec::new();
        for (named, privileges) in *needs {
            let tables = if *named == "*" { TABLES } else { std::slice::from_ref(named) };
            for (privilege, table) in privileges
                .iter()
                .flat_map(|privilege| tables.iter().map(move |table| (*privilege, *table)))
            {
                // What is created is not there yet.
                let table = if privilege == "create" { "*" } else { table };
                let may = match known.get(&(privilege, table)) {
                    Some(may) => *may,
                    None => database.check_privilege(privilege, table).await?,
                };
                known.insert((privilege, table), may);
                let grant = format!("{privilege} on {table}");
                if may == PrivilegeCheck::Denied && !missing.contains(&grant) {
                    missing.push(grant);
                }
            }
        }
        all.push((*command, missing));
    }
    Ok(all)
}

fn check_grants(command: &str, missing: &[String], commands: &[String]) -> Check {
    let check = format!("grants for {command}");
    if missing.is_empty() {
        return Check::ok(&check, "all there");
    }
    match commands.iter().any(|wanted| wanted == command) {
        true => Check::problem(
            Level::Error,
            &check,
            format!("missing: {}", missing.join(", ")),
            "grant them to the user",
        ),
        false => Check {
            name: check,
            level: Level::Note,
            detail: format!("missing: {}", missing.join(", ")),
            remedy: None,
        },
    }
}

fn check_settings(inspected: &ServerReport, connections: u32, writes: bool) -> Vec<Check> {
    let setting = |name: &str| inspected.settings.get(name).map(String::as_str);
    let number = |name: &str| setting(name).and_then(|value| value.parse::<u64>().ok());
    let is_on = |name: &str| setting(name).is_some_and(|value| value == "ON" || value == "1");
    let mut checks =
        vec![check_version(setting("version").unwrap_or_default()), check_tls(inspected)];

    checks.push(match is_on("read_only") || is_on("innodb_read_only") {
        false => Check::ok("primary", format!("takes writes, as {}", inspected.user)),
        true => Check::problem(
            if writes { Level::Error } else { Level::Note },
            "primary",
            "the server is read-only: a replica, or a former primary",
            "name the primary (on Aurora: the cluster's writer endpoint)",
        ),
    });
    if is_on("log_bin") && setting("binlog_format") == Some("STATEMENT") {
        checks.push(Check::problem(
            Level::Error,
            "binlog_format",
            "STATEMENT: under read committed, as we need it, the server then refuses every write",
            "set it to ROW or MIXED",
        ));
    }
    checks.push(check_durability(
        number("innodb_flush_log_at_trx_commit"),
        is_on("log_bin"),
        number("sync_binlog"),
    ));
    checks.push(check_connections(
        u64::from(connections),
        number("max_connections"),
        inspected.threads_connected,
    ));
    checks.push(match number("innodb_lock_wait_timeout").unwrap_or_default() {
        wait if wait <= MAX_LOCK_WAIT_SECONDS => Check::ok("innodb_lock_wait_timeout", format!("{wait} s")),
        wait => Check::problem(
            Level::Warning,
            "innodb_lock_wait_timeout",
            format!("{wait} s: a statement that waits for longer than {MAX_LOCK_WAIT_SECONDS} s counts as cut off, and is tried again"),
            format!("set it to {MAX_LOCK_WAIT_SECONDS} or less"),
        ),
    });
    checks.push(match number("max_allowed_packet").unwrap_or_default() {
        bytes if bytes >= 2 * MAX_BYTES as u64 => {
            Check::ok("max_allowed_packet", format!("{bytes} bytes"))
        }
        bytes => Check::problem(
            Level::Warning,
            "max_allowed_packet",
            format!(
                "{bytes} bytes: inserts are sent one by one, and larger events cannot be appended"
            ),
            "set it to 64M",
        ),
    });
    checks.push(check_sql_mode(&inspected.sql_mode, inspected.projector_sql_mode));
    checks.push(check_clock(
        "database clock",
        inspected.clock_ahead_seconds,
        MAX_CLOCK_SKEW_SECONDS,
        "it dates events by it, and lag is told by ours",
    ));
    checks.push(match inspected.can_see_triggers {
        true => Check::ok("trigger", "granted: inserts are sent together where they can be"),
        false => Check::problem(
            Level::Note,
            "trigger",
            "not granted to the user itself, and so inserts are sent one by one",
            "for speed, grant trigger and insert on the projectors' own tables",
        ),
    });
    checks
}

fn check_sql_mode(servers: &str, projector_sql_mode: SqlMode) -> Check {
    let is_strict =
        ["STRICT_TRANS_TABLES", "STRICT_ALL_TABLES"].iter().any(|mode| servers.contains(mode));
    match (is_strict, projector_sql_mode) {
        (true, _) => Check::ok("sql_mode", "strict"),
        (false, SqlMode::Strict) => Check::problem(
            Level::Note,
            "sql_mode",
            "the server's own is not strict; projectors run strict all the same",
            "for other clients, add STRICT_TRANS_TABLES; to have projectors run like them, give --sql-mode server",
        ),
        (false, SqlMode::Server) => Check::problem(
            Level::Warning,
            "sql_mode",
            "not strict, and projectors run so by --sql-mode server: values that do not fit into a column are cut off \
             silently, and inserts are sent one by one",
            "leave out --sql-mode server, or add STRICT_TRANS_TABLES",
        ),
    }
}

/// A clock that is so many seconds ahead of ours.
pub(super) fn check_clock(check: &str, ahead: f64, max_skew: f64, why: &str) -> Check {
    let detail = format!(
        "{:.1} s {} this host's",
        ahead.abs(),
        if ahead < 0.0 { "behind" } else { "ahead of" }
    );
    match ahead.abs() <= max_skew {
        true => Check::ok(check, detail),
        false => {
            Check::problem(Level::Warning, check, format!("{detail}: {why}"), "set both by NTP")
        }
    }
}

fn check_version(version: &str) -> Check {
    let mut numbers = version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse::<u64>().ok());
    let mut next = || numbers.next().unwrap_or_default();
    let found = (next(), next(), next());
    let (kind, oldest) = match version.contains("MariaDB") {
        true => ("MariaDB", MIN_MARIADB_VERSION),
        false => ("MySQL", MIN_MYSQL_VERSION),
    };
    match found >= oldest {
        true => Check::ok("version", format!("{kind} {version}")),
        false => Check::problem(
            Level::Error,
            "version",
            format!("{kind} {version} is too old"),
            format!("use {}.{}.{} or newer", oldest.0, oldest.1, oldest.2),
        ),
    }
}

fn check_tls(inspected: &ServerReport) -> Check {
    match inspected.tls.as_str() {
        "" => Check::problem(
            Level::Warning,
            "TLS",
            "the connection is not encrypted",
            "have the server offer TLS, and insist on it by --database-ca FILE",
        ),
        version if inspected.is_certificate_verified => {
            Check::ok("TLS", format!("{version}, and the server's certificate is checked"))
        }
        version => Check::problem(
            Level::Note,
            "TLS",
            format!("{version}, with whoever answers: the server's certificate is not checked"),
            "to insist, give --database-ca FILE",
        ),
    }
}

fn check_durability(flush: Option<u64>, has_log: bool, sync: Option<u64>) -> Check {
    if flush.is_some_and(|flush| flush != 1) {
        return Check::problem(
            Level::Warning,
            "durability",
            "innodb_flush_log_at_trx_commit is not 1: a server that crashes may forget commits, events among them",
            "set it to 1",
        );
    }
    match has_log && sync.is_some_and(|sync| sync != 1) {
        true => Check::problem(
            Level::Warning,
            "durability",
            "sync_binlog is not 1: a replica that takes over after a crash may lack commits",
            "set it to 1",
        ),
        false => Check::ok("durability", "a commit is on disk when it is acknowledged"),
    }
}

fn check_connections(ours: u64, most: Option<u64>, connected: Option<u64>) -> Check {
    let (Some(most), Some(connected)) = (most, connected) else {
        return Check::ok("connections", format!("at most {ours} of ours"));
    };
    let detail =
        format!("at most {ours} of ours; the server takes {most}, and has {connected} now");
    match ours {
        _ if ours > most => Check::problem(
            Level::Error,
            "connections",
            detail,
            "lower --connections, or raise max_connections",
        ),
        _ if ours + connected > most => Check::problem(
            Level::Warning,
            "connections",
            detail,
            "lower --connections, or raise max_connections",
        ),
        _ => Check::ok("connections", detail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As RDS has them, but for what the test changes: the settings of the servers under test are
    /// everybody's.
    fn inspected(changed: &[(&str, &str)]) -> ServerReport {
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
        let settings = usual
            .iter()
            .chain(changed)
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        ServerReport {
            settings,
            user: "app@%".into(),
            sql_mode: "STRICT_TRANS_TABLES,NO_ENGINE_SUBSTITUTION".into(),
            projector_sql_mode: SqlMode::Strict,
            tls: "TLSv1.3".into(),
            is_certificate_verified: true,
            threads_connected: Some(10),
            clock_ahead_seconds: 0.1,
            can_see_triggers: true,
        }
    }

    fn bad(inspected: &ServerReport, connections: u32) -> Vec<(String, Level)> {
        let checks = check_settings(inspected, connections, true).into_iter();
        checks
            .filter(|check| check.level != Level::Ok)
            .map(|check| (check.name, check.level))
            .collect()
    }

    #[test]
    fn each_wrong_server_setting_has_exactly_one_line() {
        assert_eq!(bad(&inspected(&[]), 16), []);
        for (name, value, check, level) in [
            ("version", "5.7.44", "version", Level::Error),
            ("version", "8.0.15", "version", Level::Error),
            ("version", "10.2.44-MariaDB", "version", Level::Error),
            ("read_only", "ON", "primary", Level::Error),
            ("innodb_read_only", "ON", "primary", Level::Error),
            ("binlog_format", "STATEMENT", "binlog_format", Level::Error),
            ("sync_binlog", "0", "durability", Level::Warning),
            ("innodb_flush_log_at_trx_commit", "2", "durability", Level::Warning),
            ("max_connections", "20", "connections", Level::Warning),
            ("max_connections", "15", "connections", Level::Error),
            ("innodb_lock_wait_timeout", "120", "innodb_lock_wait_timeout", Level::Warning),
            ("max_allowed_packet", "1024", "max_allowed_packet", Level::Warning),
        ] {
            assert_eq!(
                bad(&inspected(&[(name, value)]), 16),
                [(check.to_owned(), level)],
                "{name} = {value}"
            );
        }
        for (name, value) in [
            ("version", "8.0.16"),
            ("version", "10.3.39-MariaDB-log"),
            ("version", "9.7.4"),
            ("log_bin", "OFF"),
        ] {
            assert_eq!(bad(&inspected(&[(name, value)]), 16), [], "{name} = {value}");
        }
    }

    #[test]
    fn each_wrong_session_setting_has_exactly_one_line() {
        let bare = || inspected(&[]);
        for (session, check) in [
            (ServerReport { tls: String::new(), ..bare() }, ("TLS", Level::Warning)),
            (ServerReport { is_certificate_verified: false, ..bare() }, ("TLS", Level::Note)),
            (
                ServerReport { sql_mode: "NO_ENGINE_SUBSTITUTION".into(), ..bare() },
                ("sql_mode", Level::Note),
            ),
            (
                ServerReport {
                    sql_mode: "NO_ENGINE_SUBSTITUTION".into(),
                    projector_sql_mode: SqlMode::Server,
                    ..bare()
                },
                ("sql_mode", Level::Warning),
            ),
            (
                ServerReport { clock_ahead_seconds: -7.0, ..bare() },
                ("database clock", Level::Warning),
            ),
            (ServerReport { can_see_triggers: false, ..bare() }, ("trigger", Level::Note)),
        ] {
            assert_eq!(bad(&session, 16), [(check.0.to_owned(), check.1)]);
        }
    }
}
