//! What the server says of the tables that inserts go to: whether many rows in one statement do the same as many statements.

use std::fmt;

use sqlx::mysql::MySqlRow;
use sqlx::{AssertSqlSafe, MySqlConnection, Row as _};
use tracing::debug;

use crate::database::multi_row::MAX_BYTES;
use crate::model::error::is_transient;

/// Why a table's inserts are sent one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Without these grants the server keeps silent about triggers, or about columns.
    Privileges,
    /// Only in the strict mode is a null for a `not null` column an error in both cases; and the text was read as it is by default.
    Mode,
    /// A view, another engine, a table with a history; or it is not there.
    Kind,
    /// It may read and write what other statements wait to write, and sees how many rows its statement has.
    Trigger,
    /// What it refers to may still wait to be written. (What refers to *it* is not refused here: that table has a foreign key, so
    /// none of its rows wait, and all others are written before them.)
    ForeignKey,
    /// MariaDB: an `insert ignore` of one row that a constraint refuses is an error; of many rows, it leaves that row out.
    Check,
    /// An `auto_increment`, or a default that is the time or another function.
    Column,
    /// The server does not tell, for whatever reason.
    Untold,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Privileges => {
                "the database user cannot see whether it has triggers: grant trigger and insert on the table"
            }
            Refusal::Mode => {
                "the session's sql_mode is not strict or reads quotes in another way, or its limits are unusual"
            }
            Refusal::Kind => "it is no InnoDB base table",
            Refusal::Trigger => "it has a trigger",
            Refusal::ForeignKey => "it has a foreign key",
            Refusal::Check => {
                "it has a check constraint (a json column is one on MariaDB) and an insert ignores errors"
            }
            Refusal::Column => "a column of it has auto_increment, or a default that is computed",
            Refusal::Untold => "the server does not answer what is asked about it",
        })
    }
}

/// A table, and whether an `insert ignore` goes to it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'n> {
    pub(super) name: &'n str,
    pub(super) ignores: bool,
}

/// Asks for the facts of some tables. They stay true for as long as the transaction has a lock on the tables' definitions,
/// which every statement takes that reads or writes them: so ask *after* such a statement.
///
/// Only names of letters, digits, `_` and `$`, as [`super::insert::read`] finds them, may come here.
///
/// # Errors
/// What is transient. Any other error is none of the projector's: the tables are refused then.
pub(super) async fn look_at(
    asked: &[Asked<'_>],
    db: &mut MySqlConnection,
) -> Result<Vec<Result<(), Refusal>>, sqlx::Error> {
    let mut sql = COMMON.replace("{bytes}", &(2 * MAX_BYTES).to_string());
    for Asked { name, .. } in asked {
        sql.push_str(&OF_A_TABLE.replace("{table}", name));
    }
    match facts(sql, db).await {
        Ok(facts) => Ok(asked.iter().map(|asked| judge(&facts, *asked)).collect()),
        Err(error) if is_transient(&error) => Err(error),
        Err(error) => {
            debug!(%error, "the tables' definitions cannot be read");
            Ok(vec![Err(Refusal::Untold); asked.len()])
        }
    }
}

async fn facts(sql: String, db: &mut MySqlConnection) -> Result<Vec<Fact>, sqlx::Error> {
    let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(db).await?;
    let fact = |row: &MySqlRow| Ok(Fact { kind: row.try_get(0)?, table: row.try_get(1)?, what: row.try_get(2)? });
    rows.iter().map(fact).collect()
}

/// One row of the answer: what it is about, the table (or pattern of databases), and what is said of it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fact {
    kind: String,
    table: String,
    what: String,
}

/// The user's grants, without those of roles; and whether the session is as it must be. `/*!8… */` is read by MySQL only:
/// `partial_revokes` can take a database out of a global grant, and the last variable can hide a key that MySQL made itself.
const COMMON: &str = "\
    select 'session' as kind, '' as about, concat_ws(',', @@sql_mode, \
        if(@@max_allowed_packet >= {bytes}, 'wide', 'narrow'), \
        if(1 = 1 /*!80030 and @@show_gipk_in_create_table_and_information_schema = 1 */, 'open', 'hidden')) as what \
    union all select 'global', '', privilege_type from information_schema.user_privileges \
        where privilege_type in ('INSERT', 'TRIGGER') and grantee = concat('''', substring_index(current_user(), '@', 1), \
            '''@''', substring_index(current_user(), '@', -1), '''') /*!80016 and @@partial_revokes = 0 */ \
    union all select 'database', table_schema, privilege_type from information_schema.schema_privileges \
        where cast(database() as binary) like cast(table_schema as binary) \
            and grantee = concat('''', substring_index(current_user(), '@', 1), \
            '''@''', substring_index(current_user(), '@', -1), '''') \
    union all select 'table', table_name, privilege_type from information_schema.table_privileges \
        where table_schema = database() and privilege_type in ('INSERT', 'TRIGGER') \
            and grantee = concat('''', substring_index(current_user(), '@', 1), \
            '''@''', substring_index(current_user(), '@', -1), '''')";

/// Each part names its one table, by which MariaDB looks at no other. A default is computed where MySQL says so, and on
/// MariaDB, where it is neither a literal nor null. A null for a `timestamp` that cannot be null was the time in old days.
const OF_A_TABLE: &str = "\
    union all select 'is', table_name, concat(table_type, ' ', coalesce(engine, '')) from information_schema.tables \
        where table_schema = database() and table_name = '{table}' \
    union all select 'trigger', event_object_table, '' from information_schema.triggers \
        where event_object_schema = database() and event_object_table = '{table}' \
    union all select 'foreign key', table_name, '' from information_schema.table_constraints \
        where table_schema = database() and table_name = '{table}' and constraint_type = 'FOREIGN KEY' \
    union all select 'check', table_name, '' from information_schema.table_constraints \
        where table_schema = database() and table_name = '{table}' and constraint_type = 'CHECK' \
    /*M!100300 union all select 'check', table_name, '' from information_schema.check_constraints \
        where constraint_schema = database() and table_name = '{table}' */ \
    union all select 'column', table_name, column_name from information_schema.columns \
        where table_schema = database() and table_name = '{table}' \
            and (extra like '%auto_increment%' or extra like '%default_generated%' or extra like '%on update%' \
                or column_default like 'current_timestamp%' \
                or (version() like '%mariadb%' and column_default <> 'NULL' \
                    and column_default not regexp '^([bx]?''([^'']|'''')*''|[-+0-9.e]+)$') \
                or (data_type = 'timestamp' and is_nullable = 'NO' and @@explicit_defaults_for_timestamp = 0))";

/// Names are compared without their case, whatever the server does: two tables of one name are then taken for one, by what
/// is worse of either.
fn judge(facts: &[Fact], Asked { name: table, ignores }: Asked<'_>) -> Result<(), Refusal> {
    let common = |kind: &'static str| facts.iter().filter(move |fact| fact.kind == kind);
    let of_table = |kind: &'static str| common(kind).filter(|fact| fact.table.eq_ignore_ascii_case(table));
    let modes: Vec<String> = common("session").flat_map(|fact| fact.what.split(',')).map(str::to_uppercase).collect();
    let has_mode = |mode: &str| modes.iter().any(|other| other == mode);
    // Of several patterns that a database's name matches only one counts, and it is not said which.
    let mut patterns: Vec<&str> = common("database").map(|fact| fact.table.as_str()).collect();
    patterns.sort_unstable();
    patterns.dedup();
    let has_grant = |privilege: &str| {
        common("global").any(|fact| fact.what == privilege)
            || (patterns.len() == 1 && common("database").any(|fact| fact.what == privilege))
            || common("table").any(|fact| fact.table == table && fact.what == privilege)
    };
    if !has_mode("STRICT_TRANS_TABLES") && !has_mode("STRICT_ALL_TABLES") {
        return Err(Refusal::Mode);
    }
    if ["ANSI_QUOTES", "NO_BACKSLASH_ESCAPES", "ORACLE", "NARROW", "HIDDEN"].into_iter().any(has_mode) {
        return Err(Refusal::Mode);
    }
    if !has_grant("TRIGGER") || !has_grant("INSERT") {
        return Err(Refusal::Privileges);
    }
    if of_table("is").count() == 0 || of_table("is").any(|fact| fact.what != "BASE TABLE InnoDB") {
        return Err(Refusal::Kind);
    }
    for (kind, refusal) in
        [("trigger", Refusal::Trigger), ("foreign key", Refusal::ForeignKey), ("column", Refusal::Column)]
    {
        if of_table(kind).count() > 0 {
            return Err(refusal);
        }
    }
    if ignores && of_table("check").count() > 0 {
        return Err(Refusal::Check);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(kind: &str, table: &str, what: &str) -> Fact {
        Fact { kind: kind.into(), table: table.into(), what: what.into() }
    }

    fn plain(name: &str) -> Asked<'_> {
        Asked { name, ignores: false }
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
    fn a_plain_table_of_a_user_who_sees_its_triggers_is_fine() {
        assert_eq!(judge(&good(), plain("t")), Ok(()));
        let table = [fact("table", "t", "TRIGGER"), fact("global", "", "INSERT")];
        assert_eq!(judge(&with(&["database"], &table), plain("t")), Ok(()));
    }

    #[test]
    fn what_could_make_a_difference_is_refused() {
        for (replaced, facts, refusal) in [
            ("trigger", fact("trigger", "t", ""), Refusal::Trigger),
            ("trigger", fact("trigger", "T", ""), Refusal::Trigger),
            ("", fact("foreign key", "t", ""), Refusal::ForeignKey),
            ("", fact("column", "t", "seq"), Refusal::Column),
            ("", fact("is", "T", "VIEW "), Refusal::Kind),
            ("is", fact("is", "t", "BASE TABLE MyISAM"), Refusal::Kind),
            ("is", fact("is", "t", "SYSTEM VERSIONED InnoDB"), Refusal::Kind),
            ("is", fact("is", "other", "BASE TABLE InnoDB"), Refusal::Kind),
            ("session", fact("session", "", "NO_ZERO_DATE,wide,open"), Refusal::Mode),
            ("session", fact("session", "", "STRICT_TRANS_TABLES,ANSI_QUOTES,wide,open"), Refusal::Mode),
            ("session", fact("session", "", "STRICT_TRANS_TABLES,narrow,open"), Refusal::Mode),
            ("session", fact("session", "", "STRICT_ALL_TABLES,wide,hidden"), Refusal::Mode),
        ] {
            assert_eq!(judge(&with(&[replaced], std::slice::from_ref(&facts)), plain("t")), Err(refusal), "{facts:?}");
        }
    }

    #[test]
    fn a_check_constraint_is_refused_only_where_an_insert_ignores_errors() {
        let facts = with(&[], &[fact("check", "t", "")]);
        assert_eq!(judge(&facts, plain("t")), Ok(()));
        assert_eq!(judge(&facts, Asked { name: "t", ignores: true }), Err(Refusal::Check));
        assert_eq!(judge(&good(), Asked { name: "t", ignores: true }), Ok(()));
    }

    #[test]
    fn without_the_grants_nothing_is_taken_for_absent() {
        for grants in [
            vec![],
            vec![fact("database", "app", "INSERT")],
            vec![fact("database", "app", "TRIGGER")],
            vec![fact("global", "", "TRIGGER"), fact("table", "other", "INSERT")],
            // `app` and `ap_` both match, and the server takes one of them.
            vec![
                fact("database", "app", "INSERT"),
                fact("database", "ap_", "INSERT"),
                fact("database", "ap_", "TRIGGER"),
            ],
        ] {
            assert_eq!(judge(&with(&["database"], &grants), plain("t")), Err(Refusal::Privileges), "{grants:?}");
        }
    }
}
