//! Checks on the server whether many rows in one insert have the same effect on a table as many
//! inserts of one row.

use std::fmt;

use sqlx::mysql::MySqlRow;
use sqlx::{AssertSqlSafe, MySqlConnection, Row as _};
use tracing::debug;

use crate::database::error::is_transient;
use crate::database::multi_row::MAX_BYTES;

/// Why a table's inserts are sent one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Without these grants the server does not show triggers, or columns.
    Privileges,
    /// Only in strict mode is a null for a `not null` column an error in both cases. Modes such as
    /// `ANSI_QUOTES` change the meaning of the text that this module has already read.
    SqlMode,
    /// A view, a table of another engine or with system versioning, or no table.
    TableKind,
    /// A trigger may read or write rows that are still buffered, and can see how many rows its
    /// statement has.
    Trigger,
    /// The referenced row may still be buffered. Tables that refer to *this* table need no refusal:
    /// they have a foreign key themselves, so their rows are never buffered, and all buffered rows
    /// are sent before them.
    ForeignKey,
    /// On MariaDB, an `insert ignore` of one row that violates a constraint is an error. With many
    /// rows, the row is left out.
    CheckConstraint,
    /// A column with `auto_increment`, or with a default that is the time or another function.
    ComputedColumn,
    /// The server did not answer the query.
    Unknown,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Privileges => {
                "the database user cannot see the table's triggers: grant trigger and insert on \
                 the table to the user itself"
            }
            Refusal::SqlMode => {
                "the session's sql_mode is not strict or changes the meaning of quotes, or its \
                 limits are unusual"
            }
            Refusal::TableKind => "it is not an InnoDB base table",
            Refusal::Trigger => "it has a trigger",
            Refusal::ForeignKey => "it has a foreign key",
            Refusal::CheckConstraint => {
                "it has a check constraint (on MariaDB, a json column has one) and an insert \
                 ignores errors"
            }
            Refusal::ComputedColumn => "a column has auto_increment or a computed default",
            Refusal::Unknown => "the server did not answer the query for its definition",
        })
    }
}

/// A table, and whether one of its inserts is an `insert ignore`.
#[derive(Debug, Clone, Copy)]
pub(super) struct InsertTarget<'n> {
    pub(super) name: &'n str,
    pub(super) ignores: bool,
}

/// Checks some tables. A result holds while the transaction has a metadata lock on the table. Every
/// statement that reads or writes the table takes that lock, so call this *after* such a statement.
///
/// The names must consist of letters, digits, `_` and `$`, as [`super::insert::parse`] ensures.
///
/// # Errors
/// Transient errors. After any other error, all tables are refused: it is not a failure of the
/// projector.
pub(super) async fn check_tables(
    targets: &[InsertTarget<'_>],
    db: &mut MySqlConnection,
) -> Result<Vec<Result<(), Refusal>>, sqlx::Error> {
    let mut sql = SESSION_FACTS.replace("{bytes}", &(2 * MAX_BYTES).to_string());
    for InsertTarget { name, .. } in targets {
        sql.push_str(&TABLE_FACTS.replace("{table}", name));
    }
    match read_facts(sql, db).await {
        Ok(facts) => Ok(targets.iter().map(|target| check_table(&facts, *target)).collect()),
        Err(error) if is_transient(&error) => Err(error),
        Err(error) => {
            debug!(%error, "the definitions of the tables cannot be read");
            Ok(vec![Err(Refusal::Unknown); targets.len()])
        }
    }
}

async fn read_facts(sql: String, db: &mut MySqlConnection) -> Result<Vec<Fact>, sqlx::Error> {
    let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(db).await?;
    let fact = |row: &MySqlRow| {
        Ok(Fact { kind: row.try_get(0)?, table: row.try_get(1)?, detail: row.try_get(2)? })
    };
    rows.iter().map(fact).collect()
}

/// One row of the answer: its kind, the table (or pattern of databases), and the detail.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fact {
    kind: String,
    table: String,
    detail: String,
}

/// The user's grants, without those of roles, and the relevant settings of the session. Only MySQL
/// reads `/*!8… */`. `partial_revokes` can exclude a database from a global grant. The last
/// variable can hide a primary key that MySQL generated.
const SESSION_FACTS: &str = "\
    select 'session' as kind, '' as about, concat_ws(',', @@sql_mode, \
        if(@@max_allowed_packet >= {bytes}, 'wide', 'narrow'), \
        if(1 = 1 /*!80030 and @@show_gipk_in_create_table_and_information_schema = 1 */, \
            'open', 'hidden')) as what \
    union all select 'global', '', privilege_type from information_schema.user_privileges \
        where privilege_type in ('INSERT', 'TRIGGER') \
            and grantee = concat('''', substring_index(current_user(), '@', 1), \
            '''@''', substring_index(current_user(), '@', -1), '''') \
            /*!80016 and @@partial_revokes = 0 */ \
    union all select 'database', table_schema, privilege_type \
        from information_schema.schema_privileges \
        where cast(database() as binary) like cast(table_schema as binary) \
            and grantee = concat('''', substring_index(current_user(), '@', 1), \
            '''@''', substring_index(current_user(), '@', -1), '''') \
    union all select 'table', table_name, privilege_type from information_schema.table_privileges \
        where table_schema = database() and privilege_type in ('INSERT', 'TRIGGER') \
            and grantee = concat('''', substring_index(current_user(), '@', 1), \
            '''@''', substring_index(current_user(), '@', -1), '''')";

/// The facts of one table. Each part names the table, so that MariaDB opens no other table. MySQL
/// marks a computed default in `extra`. On MariaDB, a default is computed if it is neither a
/// literal nor null. Without `explicit_defaults_for_timestamp`, a null for a `timestamp not null`
/// column becomes the current time.
const TABLE_FACTS: &str = "\
    union all select 'is', table_name, concat(table_type, ' ', coalesce(engine, '')) \
        from information_schema.tables \
        where table_schema = database() and table_name = '{table}' \
    union all select 'trigger', event_object_table, '' from information_schema.triggers \
        where event_object_schema = database() and event_object_table = '{table}' \
    union all select 'foreign key', table_name, '' from information_schema.table_constraints \
        where table_schema = database() and table_name = '{table}' \
            and constraint_type = 'FOREIGN KEY' \
    union all select 'check', table_name, '' from information_schema.table_constraints \
        where table_schema = database() and table_name = '{table}' and constraint_type = 'CHECK' \
    /*M!100300 union all select 'check', table_name, '' from information_schema.check_constraints \
        where constraint_schema = database() and table_name = '{table}' */ \
    union all select 'column', table_name, column_name from information_schema.columns \
        where table_schema = database() and table_name = '{table}' \
            and (extra like '%auto_increment%' or extra like '%default_generated%' \
                or extra like '%on update%' \
                or column_default like 'current_timestamp%' \
                or (version() like '%mariadb%' and column_default <> 'NULL' \
                    and column_default not regexp '^([bx]?''([^'']|'''')*''|[-+0-9.e]+)$') \
                or (data_type = 'timestamp' and is_nullable = 'NO' \
                    and @@explicit_defaults_for_timestamp = 0))";

/// Decides by the facts. Names are compared without their case, whatever the server does. If two
/// tables have the same name in this sense, the facts of both count for each.
fn check_table(
    facts: &[Fact],
    InsertTarget { name: table, ignores }: InsertTarget<'_>,
) -> Result<(), Refusal> {
    let common = |kind: &'static str| facts.iter().filter(move |fact| fact.kind == kind);
    let of_table =
        |kind: &'static str| common(kind).filter(|fact| fact.table.eq_ignore_ascii_case(table));
    let modes: Vec<String> =
        common("session").flat_map(|fact| fact.detail.split(',')).map(str::to_uppercase).collect();
    let has_mode = |mode: &str| modes.iter().any(|other| other == mode);
    // If several patterns match the database's name, the server applies only one of them, and does
    // not show which.
    let mut patterns: Vec<&str> = common("database").map(|fact| fact.table.as_str()).collect();
    patterns.sort_unstable();
    patterns.dedup();
    let has_grant = |privilege: &str| {
        common("global").any(|fact| fact.detail == privilege)
            || (patterns.len() == 1 && common("database").any(|fact| fact.detail == privilege))
            || common("table").any(|fact| fact.table == table && fact.detail == privilege)
    };
    if !has_mode("STRICT_TRANS_TABLES") && !has_mode("STRICT_ALL_TABLES") {
        return Err(Refusal::SqlMode);
    }
    if ["ANSI_QUOTES", "NO_BACKSLASH_ESCAPES", "ORACLE", "NARROW", "HIDDEN"]
        .into_iter()
        .any(has_mode)
    {
        return Err(Refusal::SqlMode);
    }
    if !has_grant("TRIGGER") || !has_grant("INSERT") {
        return Err(Refusal::Privileges);
    }
    if of_table("is").count() == 0 || of_table("is").any(|fact| fact.detail != "BASE TABLE InnoDB")
    {
        return Err(Refusal::TableKind);
    }
    for (kind, refusal) in [
        ("trigger", Refusal::Trigger),
        ("foreign key", Refusal::ForeignKey),
        ("column", Refusal::ComputedColumn),
    ] {
        if of_table(kind).count() > 0 {
            return Err(refusal);
        }
    }
    if ignores && of_table("check").count() > 0 {
        return Err(Refusal::CheckConstraint);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(kind: &str, table: &str, detail: &str) -> Fact {
        Fact { kind: kind.into(), table: table.into(), detail: detail.into() }
    }

    fn plain(name: &str) -> InsertTarget<'_> {
        InsertTarget { name, ignores: false }
    }

    fn good() -> Vec<Fact> {
        vec![
            fact("session", "", "IGNORE_SPACE,STRICT_TRANS_TABLES,wide,open"),
            fact("database", "app", "INSERT"),
            fact("database", "app", "TRIGGER"),
            fact("is", "t", "BASE TABLE InnoDB"),
            fact("is", "other", "VIEW "),
            fact("trigger", "other", ""),
        ]
    }

    fn with(replaced: &[&str], facts: &[Fact]) -> Vec<Fact> {
        let kept = good().into_iter().filter(|fact| !replaced.contains(&fact.kind.as_str()));
        kept.chain(facts.iter().cloned()).collect()
    }

    #[test]
    fn a_plain_table_with_visible_triggers_may_be_coalesced() {
        assert_eq!(check_table(&good(), plain("t")), Ok(()));
        let table = [fact("table", "t", "TRIGGER"), fact("global", "", "INSERT")];
        assert_eq!(check_table(&with(&["database"], &table), plain("t")), Ok(()));
    }

    #[test]
    fn a_table_that_may_treat_coalesced_rows_differently_is_refused() {
        for (replaced, facts, refusal) in [
            ("trigger", fact("trigger", "t", ""), Refusal::Trigger),
            ("trigger", fact("trigger", "T", ""), Refusal::Trigger),
            ("", fact("foreign key", "t", ""), Refusal::ForeignKey),
            ("", fact("column", "t", "seq"), Refusal::ComputedColumn),
            ("", fact("is", "T", "VIEW "), Refusal::TableKind),
            ("is", fact("is", "t", "BASE TABLE MyISAM"), Refusal::TableKind),
            ("is", fact("is", "t", "SYSTEM VERSIONED InnoDB"), Refusal::TableKind),
            ("is", fact("is", "other", "BASE TABLE InnoDB"), Refusal::TableKind),
            ("session", fact("session", "", "NO_ZERO_DATE,wide,open"), Refusal::SqlMode),
            (
                "session",
                fact("session", "", "STRICT_TRANS_TABLES,ANSI_QUOTES,wide,open"),
                Refusal::SqlMode,
            ),
            ("session", fact("session", "", "STRICT_TRANS_TABLES,narrow,open"), Refusal::SqlMode),
            ("session", fact("session", "", "STRICT_ALL_TABLES,wide,hidden"), Refusal::SqlMode),
        ] {
            assert_eq!(
                check_table(&with(&[replaced], std::slice::from_ref(&facts)), plain("t")),
                Err(refusal),
                "{facts:?}"
            );
        }
    }

    #[test]
    fn a_check_constraint_is_refused_only_if_the_insert_ignores_errors() {
        let facts = with(&[], &[fact("check", "t", "")]);
        assert_eq!(check_table(&facts, plain("t")), Ok(()));
        assert_eq!(
            check_table(&facts, InsertTarget { name: "t", ignores: true }),
            Err(Refusal::CheckConstraint)
        );
        assert_eq!(check_table(&good(), InsertTarget { name: "t", ignores: true }), Ok(()));
    }

    #[test]
    fn without_the_grants_nothing_is_assumed_absent() {
        for grants in [
            vec![],
            vec![fact("database", "app", "INSERT")],
            vec![fact("database", "app", "TRIGGER")],
            vec![fact("global", "", "TRIGGER"), fact("table", "other", "INSERT")],
            // `app` and `ap_` both match, and the server applies one of them.
            vec![
                fact("database", "app", "INSERT"),
                fact("database", "ap_", "INSERT"),
                fact("database", "ap_", "TRIGGER"),
            ],
        ] {
            assert_eq!(
                check_table(&with(&["database"], &grants), plain("t")),
                Err(Refusal::Privileges),
                "{grants:?}"
            );
        }
    }
}
