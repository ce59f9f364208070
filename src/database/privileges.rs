//! The grants that each command needs, and no more. The table in `docs/command-line.md` has the
//! same grants, by test.

/// A table of this program, or `*` for all of them, and the required privileges.
pub(crate) type TablePrivileges = (&'static str, &'static [&'static str]);

/// The commands, in the order of the page.
pub(crate) const COMMAND_PRIVILEGES: &[(&str, &[TablePrivileges])] = &[
    ("migrate", &[("*", &["alter", "create", "insert", "select", "update"])]),
    ("append", &[("events", &["select", "insert"])]),
    (
        "boot",
        &[
            ("events", &["select", "insert"]),
            ("event_log", &["select", "update"]),
            ("projectors", &["select", "insert", "update"]),
        ],
    ),
    (
        "play",
        &[
            ("events", &["select", "insert"]),
            ("event_log", &["select", "update"]),
            ("projectors", &["select", "update"]),
        ],
    ),
    (
        "lambda",
        &[
            ("events", &["select", "insert"]),
            ("event_log", &["select", "update"]),
            ("projectors", &["select", "update"]),
        ],
    ),
    ("relay", &[("events", &["select", "insert"]), ("event_log", &["select", "update"])]),
    ("status", &[("events", &["select"]), ("event_log", &["select"]), ("projectors", &["select"])]),
    (
        "audit",
        &[
            ("events", &["select"]),
            ("event_log", &["select"]),
            ("projectors", &["select"]),
            ("log_acceptances", &["select"]),
        ],
    ),
    (
        "audit --accept",
        &[
            ("events", &["select", "insert"]),
            ("event_log", &["select", "update"]),
            ("projectors", &["select"]),
            ("log_acceptances", &["select", "insert"]),
        ],
    ),
    ("retire", &[("projectors", &["select", "update", "delete"])]),
    ("fill", &[("events", &["select", "insert"]), ("event_log", &["select"])]),
    ("rotate", &[("event_log", &["select", "update"])]),
];

/// The tables that `*` means.
pub(crate) const TABLES: &[&str] =
    &["events", "event_log", "projectors", "log_acceptances", "projectionist_migrations"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_on_the_command_line_lists_these_grants() {
        let page = include_str!("../../docs/command-line.md");
        for (command, privileges) in COMMAND_PRIVILEGES {
            let grants: Vec<String> = privileges
                .iter()
                .map(|(table, privileges)| format!("`{} on {table}`", privileges.join(", ")))
                .collect();
            let row = format!("| `{command}` | {} |", grants.join(" · "));
            assert!(page.lines().any(|line| line == row), "{row}");
        }
        // tests/it/coalesce.rs shows what the grant is for, and tests/it/grants.rs that everything
        // works without it.
        assert!(page.contains("are faster with `trigger, insert` on the projectors' own tables"));
    }
}
