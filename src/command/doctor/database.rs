//! The doctor's checks of the database: version, settings, tables and grants.

use std::collections::HashMap;

use super::{Check, Level};
use crate::database::migrate::explain_foreign_tables;
use crate::database::multi_row::MAX_BYTES;
use crate::database::{
    COMMAND_PRIVILEGES, Database, MigrationState, PrivilegeCheck, ServerReport, SqlMode, TABLES,
};

/// In seconds. On a busy network the measurement is off by up to half a second.
const MAX_CLOCK_SKEW_SECONDS: f64 = 5.0;

/// The commands that also run on a read-only replica.
const READ_ONLY_COMMANDS: &[&str] = &["status", "audit"];

/// In seconds. A statement that waits longer for a row lock would count as a lost connection.
const MAX_LOCK_WAIT_SECONDS: u64 = 60;

/// The oldest versions with what the tables and the gap probes need: enforced checks, expressions
/// as defaults, `nowait`.
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
        Err(error) => checks.push(Check::failed("database settings", &error.into())),
    }
    let foreign = database.foreign_tables().await.unwrap_or_default();
    checks.push(match database.migration_state().await {
        Ok(MigrationState::Behind) if !foreign.is_empty() => Check {
            name: "tables".into(),
            level: Level::Error,
            detail: explain_foreign_tables(&foreign),
            remedy: None,
        },
        Ok(MigrationState::UpToDate) => Check::ok("tables", "up to date"),
        Ok(MigrationState::Unknown) => {
            Check::ok("tables", "present; this user has no privilege to see their version")
        }
        Ok(MigrationState::Behind) => Check::problem(
            Level::Error,
            "tables",
            "missing, or from an older release",
            "run `projectionist migrate`",
        ),
        Ok(MigrationState::Ahead) => Check::problem(
            Level::Error,
            "tables",
            "from a newer release than this one",
            "use that release, or a newer one",
        ),
        Err(error) => Check::failed("tables", &error.into()),
    });
    match missing_grants(database).await {
        Ok(missing) => checks.extend(
            missing.into_iter().map(|(command, missing)| check_grants(command, &missing, commands)),
        ),
        Err(error) => checks.push(Check::failed("grants", &error.into())),
    }
}

/// Returns for each command the privileges that the user lacks.
async fn missing_grants(
    database: &Database,
) -> Result<Vec<(&'static str, Vec<String>)>, sqlx::Error> {
    let mut known: HashMap<(&str, &str), PrivilegeCheck> = HashMap::new();
    let mut all = Vec::new();
    for (command, required) in COMMAND_PRIVILEGES {
        let mut missing = Vec::new();
        for (named, privileges) in *required {
            let tables = if *named == "*" { TABLES } else { std::slice::from_ref(named) };
            for (privilege, table) in privileges
                .iter()
                .flat_map(|privilege| tables.iter().map(move |table| (*privilege, *table)))
            {
                // A table that is yet to be created cannot be checked by name.
                let table = if privilege == "create" { "*" } else { table };
                let check = match known.get(&(privilege, table)) {
                    Some(check) => *check,
                    None => database.check_privilege(privilege, table).await?,
                };
                known.insert((privilege, table), check);
                let grant = format!("{privilege} on {table}");
                if check == PrivilegeCheck::Denied && !missing.contains(&grant) {
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
        return Check::ok(&check, "complete");
    }
    let detail = format!("missing: {}", missing.join(", "));
    if commands.iter().any(|wanted| wanted == command) {
        Check::problem(Level::Error, &check, detail, "grant them to the user")
    } else {
        Check { name: check, level: Level::Note, detail, remedy: None }
    }
}

fn check_settings(inspected: &ServerReport, connections: u32, writes: bool) -> Vec<Check> {
    let setting = |name: &str| inspected.settings.get(name).map(String::as_str);
    let number = |name: &str| setting(name).and_then(|value| value.parse::<u64>().ok());
    let is_on = |name: &str| setting(name).is_some_and(|value| value == "ON" || value == "1");
    let mut checks =
        vec![check_version(setting("version").unwrap_or_default()), check_tls(inspected)];

    checks.push(if is_on("read_only") || is_on("innodb_read_only") {
        Check::problem(
            if writes { Level::Error } else { Level::Note },
            "primary",
            "the server is read-only: a replica, or a former primary",
            "connect to the primary (on Aurora: the cluster's writer endpoint)",
        )
    } else {
        Check::ok("primary", format!("accepts writes, as {}", inspected.user))
    });
    if is_on("log_bin") && setting("binlog_format") == Some("STATEMENT") {
        checks.push(Check::problem(
            Level::Error,
            "binlog_format",
            "STATEMENT: the server then refuses every write under read committed, which we need",
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
        wait if wait <= MAX_LOCK_WAIT_SECONDS => {
            Check::ok("innodb_lock_wait_timeout", format!("{wait} s"))
        }
        wait => Check::problem(
            Level::Warning,
            "innodb_lock_wait_timeout",
            format!(
                "{wait} s: a statement that waits for longer than {MAX_LOCK_WAIT_SECONDS} s counts \
                as a lost connection, and is tried again"
            ),
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
        "the server's clock dates events, and this host's clock measures lag",
    ));
    checks.push(if inspected.can_see_triggers {
        Check::ok("trigger", "granted: inserts are sent together where possible")
    } else {
        Check::problem(
            Level::Note,
            "trigger",
            "not granted to the user itself, so inserts are sent one by one",
            "for speed, grant trigger and insert on the projectors' own tables",
        )
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
            "the server's own mode is not strict; projectors run in strict mode regardless",
            "for other clients, add STRICT_TRANS_TABLES; to run projectors in the same mode, give \
            --sql-mode server",
        ),
        (false, SqlMode::Server) => Check::problem(
            Level::Warning,
            "sql_mode",
            "not strict, and projectors run in it because of --sql-mode server: values that do not \
            fit into a column are truncated silently, and inserts are sent one by one",
            "remove --sql-mode server, or add STRICT_TRANS_TABLES",
        ),
    }
}

/// Checks a clock that is `ahead` seconds ahead of this host's. `why` says what a difference
/// affects.
pub(super) fn check_clock(check: &str, ahead: f64, max_skew: f64, why: &str) -> Check {
    let detail = format!(
        "{:.1} s {} this host's",
        ahead.abs(),
        if ahead < 0.0 { "behind" } else { "ahead of" }
    );
    if ahead.abs() <= max_skew {
        Check::ok(check, detail)
    } else {
        Check::problem(Level::Warning, check, format!("{detail}: {why}"), "set both by NTP")
    }
}

fn check_version(version: &str) -> Check {
    let mut numbers = version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse::<u64>().ok());
    let mut next = || numbers.next().unwrap_or_default();
    let found = (next(), next(), next());
    let (kind, oldest) = if version.contains("MariaDB") {
        ("MariaDB", MIN_MARIADB_VERSION)
    } else {
        ("MySQL", MIN_MYSQL_VERSION)
    };
    if found >= oldest {
        Check::ok("version", format!("{kind} {version}"))
    } else {
        Check::problem(
            Level::Error,
            "version",
            format!("{kind} {version} is too old"),
            format!("use {}.{}.{} or newer", oldest.0, oldest.1, oldest.2),
        )
    }
}

fn check_tls(inspected: &ServerReport) -> Check {
    match inspected.tls.as_str() {
        "" => Check::problem(
            Level::Warning,
            "TLS",
            "the connection is not encrypted",
            "enable TLS on the server, and require it with --database-ca FILE",
        ),
        version if inspected.is_certificate_verified => {
            Check::ok("TLS", format!("{version}, and the server's certificate is checked"))
        }
        version => Check::problem(
            Level::Note,
            "TLS",
            format!("{version}, but the server's certificate is not checked"),
            "to check it, give --database-ca FILE",
        ),
    }
}

fn check_durability(flush: Option<u64>, has_log: bool, sync: Option<u64>) -> Check {
    if flush.is_some_and(|flush| flush != 1) {
        return Check::problem(
            Level::Warning,
            "durability",
            "innodb_flush_log_at_trx_commit is not 1: a server that crashes may lose commits, \
            including events",
            "set it to 1",
        );
    }
    if has_log && sync.is_some_and(|sync| sync != 1) {
        Check::problem(
            Level::Warning,
            "durability",
            "sync_binlog is not 1: a replica that takes over after a crash may lack commits",
            "set it to 1",
        )
    } else {
        Check::ok("durability", "a commit is on disk when it is acknowledged")
    }
}

fn check_connections(ours: u64, most: Option<u64>, connected: Option<u64>) -> Check {
    let (Some(most), Some(connected)) = (most, connected) else {
        return Check::ok("connections", format!("we open at most {ours}"));
    };
    let detail =
        format!("we open at most {ours}; the server accepts {most}, and has {connected} now");
    let problem = |level| {
        let remedy = "lower --connections, or raise max_connections";
        Check::problem(level, "connections", detail.as_str(), remedy)
    };
    if ours > most {
        problem(Level::Error)
    } else if ours + connected > most {
        problem(Level::Warning)
    } else {
        Check::ok("connections", detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the settings of a server on RDS, with the changes of a test. The servers of the test
    /// suite cannot be used, because all tests share their settings.
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

    fn problems(inspected: &ServerReport, connections: u32) -> Vec<(String, Level)> {
        let checks = check_settings(inspected, connections, true).into_iter();
        checks
            .filter(|check| check.level != Level::Ok)
            .map(|check| (check.name, check.level))
            .collect()
    }

    #[test]
    fn each_wrong_server_setting_has_exactly_one_line() {
        assert_eq!(problems(&inspected(&[]), 16), []);
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
                problems(&inspected(&[(name, value)]), 16),
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
            assert_eq!(problems(&inspected(&[(name, value)]), 16), [], "{name} = {value}");
        }
    }

    #[test]
    fn each_wrong_session_setting_has_exactly_one_line() {
        let usual = || inspected(&[]);
        for (session, check) in [
            (ServerReport { tls: String::new(), ..usual() }, ("TLS", Level::Warning)),
            (ServerReport { is_certificate_verified: false, ..usual() }, ("TLS", Level::Note)),
            (
                ServerReport { sql_mode: "NO_ENGINE_SUBSTITUTION".into(), ..usual() },
                ("sql_mode", Level::Note),
            ),
            (
                ServerReport {
                    sql_mode: "NO_ENGINE_SUBSTITUTION".into(),
                    projector_sql_mode: SqlMode::Server,
                    ..usual()
                },
                ("sql_mode", Level::Warning),
            ),
            (
                ServerReport { clock_ahead_seconds: -7.0, ..usual() },
                ("database clock", Level::Warning),
            ),
            (ServerReport { can_see_triggers: false, ..usual() }, ("trigger", Level::Note)),
        ] {
            assert_eq!(problems(&session, 16), [(check.0.to_owned(), check.1)]);
        }
    }
}
