//! Compiles one statement of a file: replaces its parameters by `?`, and refuses statements that
//! would break the projector's transaction or session.

use super::lexer::{Lexer, Token, TokenKind};
use super::parameter::Parameter;
use super::{StatementError, session};

/// The maximum number of parameters: MySQL's protocol counts the arguments of a statement in 16
/// bits.
const MAX_PARAMETERS: usize = 60_000;

/// Statements that commit implicitly.
const IMPLICIT_COMMIT: &[&str] = &[
    "alter",
    "analyze",
    "cache",
    "change",
    "check",
    "create",
    "drop",
    "flush",
    "grant",
    "install",
    "optimize",
    "rename",
    "repair",
    "reset",
    "revoke",
    "stop",
    "truncate",
    "uninstall",
];

/// Statements that begin, end or divide a transaction, or change the connection for its next user.
const TRANSACTION_CONTROL: &[&str] = &[
    "begin",
    "commit",
    "lock",
    "release",
    "rollback",
    "savepoint",
    "start",
    "unlock",
    "use",
    "xa",
];

/// Statements that act on the session or the server, or run text that is not in the file.
const SERVER_STATEMENTS: &[&str] = &[
    "backup",
    "binlog",
    "clone",
    "deallocate",
    "execute",
    "handler",
    "help",
    "import",
    "kill",
    "prepare",
    "purge",
    "restart",
    "shutdown",
];

/// A statement with `?` for its parameters, and the parameters in order.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CompiledStatement {
    pub(super) sql: String,
    pub(super) parameters: Vec<Parameter>,
}

/// Compiles the statement of an `[[on]]`.
///
/// # Errors
/// If the text is empty, has several statements, or cannot run inside the projector's transaction.
/// The error has the offset in the text.
pub(super) fn compile_handler(text: &str) -> Result<CompiledStatement, StatementError> {
    let compiled = compile(text, "use several [[on]] tables with the same events", None)?;
    if compiled.sql.is_empty() {
        return Err(StatementError::new(0, "an empty handler: `sql` needs a statement"));
    }
    let (at, words) = leading_words(&compiled.sql);
    let first = words.first().map_or("", String::as_str);
    let refused = if IMPLICIT_COMMIT.contains(&first) {
        format!(
            "`{first}` commits on its own and would break the projector's transaction: \
             put it into `setup`, or remove it"
        )
    } else if TRANSACTION_CONTROL.contains(&first) {
        format!(
            "`{first}` is not for a handler: the projector's transaction is begun and committed \
             for it"
        )
    } else if SERVER_STATEMENTS.contains(&first) {
        format!("`{first}` is not for a handler: it acts on more than the rows of a read model")
    } else if first == "set" && !sets_only_variables(&compiled.sql) {
        "`set` can only set user variables here (`set @name = …`): other variables belong to \
         the session and would change what later statements do"
            .into()
    } else if words.windows(3).any(|words| words[0] == "into" && words[1] == "@" && words[2] == "@")
    {
        "a handler cannot set a system variable (`into @@…`): it belongs to the session".into()
    } else {
        return Ok(compiled);
    };
    Err(StatementError::new(at, refused))
}

/// Compiles a statement of `setup`.
///
/// # Errors
/// If the text is empty, has several statements or parameters, controls a transaction, sets other
/// than user variables, or is harmful to repeat. The error has the offset in the text.
pub(super) fn compile_setup(text: &str) -> Result<String, StatementError> {
    let sql = compile_standalone(text, "setup")?;
    let (at, words) = leading_words(&sql);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let destructive = match words[..] {
        [first @ ("drop" | "truncate" | "delete"), ..] => first,
        // A view has no rows, and older servers have no `create view if not exists`.
        ["create", "or", "replace", "view" | "algorithm" | "definer" | "sql", ..] => {
            return Ok(sql);
        }
        ["create", "or", "replace", ..] => "create or replace",
        _ => return Ok(sql),
    };
    Err(StatementError::new(
        at,
        format!(
            "`{destructive}` is not for `setup`: boot runs setup again whenever it resumes the \
             projector, and the projected rows would be lost; write `create table if not \
             exists`, and clean up in `teardown`"
        ),
    ))
}

/// Compiles a statement of `teardown`.
///
/// # Errors
/// If the text is empty, has several statements or parameters, controls a transaction, or sets
/// other than user variables. The error has the offset in the text.
pub(super) fn compile_teardown(text: &str) -> Result<String, StatementError> {
    compile_standalone(text, "teardown")
}

/// Compiles a statement of `setup` or `teardown`, which runs without an event.
fn compile_standalone(text: &str, list: &str) -> Result<String, StatementError> {
    let no_event = format!(
        "`{list}` runs without an event, so it has no parameters: put a colon that is meant as \
         text into quotes"
    );
    let sql =
        compile(text, &format!("make each of them an entry of `{list}`"), Some(&no_event))?.sql;
    if sql.is_empty() {
        return Err(StatementError::new(0, format!("an empty statement in `{list}`: remove it")));
    }
    let (at, words) = leading_words(&sql);
    match words.first().map(String::as_str) {
        Some(first) if TRANSACTION_CONTROL.contains(&first) => Err(StatementError::new(
            at,
            format!("`{first}` is not for `{list}`: each statement there has its own transaction"),
        )),
        Some("set") if !sets_only_variables(&sql) => Err(StatementError::new(
            at,
            format!(
                "`set` can only set user variables in `{list}`: `{list}` has a session of its \
                 own, so other settings would not reach the handlers"
            ),
        )),
        _ => Ok(sql),
    }
}

/// Replaces every parameter by `?`, and removes the semicolon at the end and the text after it. The
/// other text is unchanged. A statement of only blanks and comments becomes empty. `advice` is part
/// of the error for several statements. `no_parameters` is the error for a parameter, if none is
/// allowed.
fn compile(
    text: &str,
    advice: &str,
    no_parameters: Option<&str>,
) -> Result<CompiledStatement, StatementError> {
    let mut compiled =
        CompiledStatement { sql: String::with_capacity(text.len()), parameters: Vec::new() };
    let mut lexer = Lexer::new(text);
    let (mut copied, mut end, mut has_content) = (0, None, false);
    while let Some(token) = lexer.next()? {
        match token.text {
            _ if token.kind == TokenKind::Trivia => continue,
            ";" => {
                end.get_or_insert(token.at);
                continue;
            }
            _ if end.is_some() => {
                return Err(StatementError::new(
                    token.at,
                    format!("a semicolon ends the statement, and more follows: {advice}"),
                ));
            }
            "?" => {
                return Err(StatementError::new(
                    token.at,
                    "`?` cannot be bound: name the parameter, like `:payload.amount`",
                ));
            }
            ":" => {
                let (parameter, length) =
                    parse_colon(&text[token.at..]).map_err(|error| error.offset_by(token.at))?;
                lexer.skip(length - 1);
                if let Some(parameter) = parameter {
                    if let Some(reason) = no_parameters {
                        return Err(StatementError::new(token.at, reason));
                    }
                    compiled.sql.push_str(&text[copied..token.at]);
                    compiled.sql.push('?');
                    compiled.parameters.push(parameter);
                    copied = token.at + length;
                }
            }
            _ => {}
        }
        has_content = true;
        if compiled.parameters.len() > MAX_PARAMETERS {
            return Err(StatementError::new(
                token.at,
                format!("there are more than {MAX_PARAMETERS} parameters here: {advice}"),
            ));
        }
    }
    if has_content {
        compiled.sql.push_str(&text[copied..end.unwrap_or(text.len())]);
    }
    Ok(compiled)
}

/// Parses what begins with a colon outside literals and comments. Returns its length, and the
/// parameter if it is one.
fn parse_colon(text: &str) -> Result<(Option<Parameter>, usize), StatementError> {
    match text[1..].chars().next() {
        // An assignment: `@name := …`.
        Some('=') => Ok((None, 2)),
        Some(':') => Err(StatementError::new(
            0,
            "`::` is not MySQL syntax: write `cast(… as …)` to convert a value",
        )),
        _ => Ok(Parameter::parse(text)?
            .map_or((None, 1), |(parameter, length)| (Some(parameter), length))),
    }
}

/// The offset of the statement's first word, and its words and symbols from there on, in lower
/// case. Parentheses before the first word are skipped: `(select …)`.
fn leading_words(sql: &str) -> (usize, Vec<String>) {
    let tokens: Vec<Token<'_>> =
        tokenize(sql).into_iter().skip_while(|token| token.text == "(").collect();
    (
        tokens.first().map_or(0, |first| first.at),
        tokens.iter().map(|token| token.text.to_lowercase()).collect(),
    )
}

pub(super) fn tokenize(sql: &str) -> Vec<Token<'_>> {
    let mut lexer = Lexer::new(sql);
    let mut tokens = Vec::new();
    while let Ok(Some(token)) = lexer.next() {
        if token.kind != TokenKind::Trivia {
            tokens.push(token);
        }
    }
    tokens
}

/// Whether each assignment of a `set` is to a user variable. Commas outside of parentheses separate
/// the assignments.
fn sets_only_variables(sql: &str) -> bool {
    let tokens = tokenize(sql);
    let mut depth = 0_usize;
    let assignments = tokens.get(1..).unwrap_or_default().split(|token| {
        match token.text {
            "(" => depth += 1,
            ")" => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && token.text == ","
    });
    assignments.into_iter().all(|assignment| {
        let is_variable = assignment.first().is_some_and(|token| token.text == "@");
        is_variable && session::parse_variable(sql, assignment).is_some()
    })
}

/// The permanent table that a statement of `setup` creates, as `table` or `database.table`.
pub(super) fn created_table(sql: &str) -> Option<String> {
    let tokens = tokenize(sql);
    let mut rest = tokens.as_slice();
    let mut takes = |words: &[&str]| {
        let takes = rest.len() >= words.len()
            && words.iter().zip(rest).all(|(word, token)| token.text.eq_ignore_ascii_case(word));
        rest = if takes { &rest[words.len()..] } else { rest };
        takes
    };
    if !takes(&["create"]) {
        return None;
    }
    takes(&["or", "replace"]);
    if !takes(&["table"]) {
        return None;
    }
    takes(&["if", "not", "exists"]);
    let name = |token: &Token<'_>| match token.kind {
        TokenKind::Word => Some(token.text.to_owned()),
        TokenKind::Quoted => {
            Some(token.text.strip_prefix('`')?.strip_suffix('`')?.replace("``", "`"))
        }
        _ => None,
    };
    let first = name(rest.first()?)?;
    match rest.get(1) {
        Some(dot) if dot.text == "." => Some(format!("{first}.{}", name(rest.get(2)?)?)),
        _ => Some(first),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn placeholders(sql: &str) -> usize {
        let mut lexer = Lexer::new(sql);
        let mut count = 0;
        while let Some(token) = lexer.next().expect("it was tokenized before") {
            count += usize::from(token.text == "?");
        }
        count
    }

    #[test]
    fn parameters_are_bound_in_textual_order() {
        let compiled =
            compile_handler("insert into t values (:stream_id,:payload.a?, -:position) ;\n-- done")
                .expect("it compiles");
        assert_eq!(compiled.sql, "insert into t values (?,?, -?) ");
        let [Parameter::StreamId, Parameter::Json(a), Parameter::Position] =
            &compiled.parameters[..]
        else {
            panic!("{compiled:?}")
        };
        assert!(a.path == ["a"] && a.is_optional);
    }

    #[test]
    fn colons_in_literals_comments_and_assignments_are_left_alone() {
        for sql in [
            "select ':position', \":position\", `:position`",
            "select 'it''s :position', '\\':position'",
            "select 1 -- :position ; ?",
            "select 1 # :position ; ?\n + 2",
            "select /* :position ; ? */ 1",
            "select ';', '?', \"a;b\"",
            "select @a := 1",
            "select '12:30', a:1, : x",
        ] {
            assert_eq!(
                compile_handler(sql),
                Ok(CompiledStatement { sql: sql.into(), parameters: vec![] }),
                "{sql}"
            );
        }
    }

    #[test]
    fn sql_that_is_not_one_preparable_statement_is_refused_at_its_place() {
        for (sql, at, reason) in [
            ("", 0, "an empty handler"),
            (" -- nothing\n ;", 0, "an empty handler"),
            ("select 1; select 2", 10, "use several [[on]] tables"),
            ("; select 2", 2, "use several [[on]] tables"),
            ("select ?", 7, "`?` cannot be bound"),
            ("select '?', :position, ?", 23, "`?` cannot be bound"),
            ("select :nothing", 7, "unknown parameter `:nothing`"),
            ("select a::int", 8, "`::` is not MySQL syntax"),
            ("select 'a", 7, "never closed"),
            ("/*!50000 drop table t */", 0, "some servers execute"),
        ] {
            let error = compile_handler(sql).expect_err(sql);
            assert_eq!(error.at, at, "{sql}: {}", error.reason);
            assert!(error.reason.contains(reason), "{sql}: {}", error.reason);
        }
        let many = format!("select {}1", ":position,".repeat(MAX_PARAMETERS + 1));
        assert!(
            compile_handler(&many)
                .expect_err("too many")
                .reason
                .contains("more than 60000 parameters")
        );
    }

    #[test]
    fn a_handler_statement_that_controls_the_transaction_is_refused() {
        for sql in [
            "create table t (a int)",
            "CREATE TEMPORARY TABLE t (a int)",
            "/* first */ Drop table t",
            "truncate t",
            "alter table t add a int",
            "rename table a to b",
            "grant all on *.* to a",
            "begin",
            "start transaction",
            "commit",
            "rollback to savepoint a",
            "savepoint a",
            "lock tables t write",
            "unlock tables",
            "set autocommit = 1",
            "set @a = 1, autocommit = 0",
            "set @a = 1, time_zone = '+05:00'",
            "set @a = (1), @@sql_mode = ''",
            "set @a := 1 /* , @b = */ , names latin1",
            "set /* @a */ names latin1",
            "set @@session.sql_mode = ''",
            "set @a = concat('(', 1), session time_zone = '+01:00'",
            "set @a = 1, @b = 2, @@global.x = 1",
            "set persist sql_mode = ''",
            "set global sql_mode = ''",
            "set statement sql_mode = '' for insert into t values (1)",
            "set role none",
            "set password = 'x'",
            "set transaction read only",
            "set",
            "select @@sql_mode into @@sql_mode",
            "/* x */ BEGIN",
            "begin not atomic",
            "(((start transaction)))",
            "handler t open",
            "prepare s from 'do 1'",
            "execute s",
            "execute immediate 'do 1'",
            "deallocate prepare s",
            "kill 1",
            "shutdown",
            "create table t like u",
            "set @@autocommit = 0",
            "set session sql_mode = ''",
            "set names latin1",
            "xa start 'x'",
            "use other",
        ] {
            compile_handler(sql).expect_err(sql);
        }
        for sql in [
            "set @total = :payload.amount",
            "set @a = if(1, 2, 3), @`b c` := (select max(a), 1), @d.e = '@@x, y = 1'",
            "select a, b from t into @a, @b",
            "insert into t select * from u",
            "(select 1)",
            "replace into t values (1)",
            "update t set created = 1, `drop` = 2",
            "delete from t where id = :stream_id",
            "with a as (select 1) select * from a",
            "call create_case(:stream_id)",
        ] {
            compile_handler(sql).expect(sql);
        }
    }

    #[test]
    fn a_setup_that_is_harmful_to_repeat_is_refused() {
        for sql in [
            "drop table if exists t",
            "TRUNCATE t",
            "delete from t",
            "-- fresh\ncreate or replace table t (a int)",
            "create or replace temporary table t (a int)",
            "begin",
            "set autocommit = 0",
            "set session sql_mode = ''",
            "set @a = 1, time_zone = '+05:00'",
            "set foreign_key_checks = 0",
        ] {
            compile_setup(sql).expect_err(sql);
        }
        for sql in [
            "create table if not exists t (a int)",
            "alter table t drop column a, drop index b",
            "create or replace view v as select 1",
            "create or replace algorithm = merge view v as select 1",
            "insert ignore into t values (':a')",
        ] {
            assert_eq!(compile_setup(sql).as_deref(), Ok(sql));
        }
        for sql in ["set @a = 1", "prepare s from @a", "execute s"] {
            compile_setup(sql).expect(sql);
        }
        compile_teardown("set foreign_key_checks = 0").expect_err("teardown refuses it, too");
        assert_eq!(
            compile_teardown("drop table if exists t;").as_deref(),
            Ok("drop table if exists t")
        );
    }

    #[test]
    fn the_table_that_a_setup_creates_is_recognized() {
        for (sql, table) in [
            ("create table if not exists t (a int)", Some("t")),
            ("CREATE TABLE /* x */ `odd ``t` like u", Some("odd `t")),
            ("create table if not exists `d`.t select 1", Some("d.t")),
            ("create table d . `t` (a int)", Some("d.t")),
            ("create temporary table t (a int)", None),
            ("create view v as select 1", None),
            ("create index i on t (a)", None),
            ("alter table t add a int", None),
            ("insert into t values ('create table u')", None),
        ] {
            assert_eq!(created_table(sql).as_deref(), table, "{sql}");
        }
    }

    #[test]
    fn setup_and_teardown_are_single_statements_without_parameters() {
        for (sql, at, reason) in [
            ("", 0, "empty statement in `setup`"),
            ("select 1; select 2", 10, "make each of them an entry of `setup`"),
            ("insert into t values (:position)", 22, "so it has no parameters"),
            ("select ?", 7, "`?` cannot be bound"),
        ] {
            let error = compile_setup(sql).expect_err(sql);
            assert_eq!(error.at, at, "{sql}: {}", error.reason);
            assert!(error.reason.contains(reason), "{sql}: {}", error.reason);
        }
    }

    /// Fragments of SQL syntax in any order.
    const SQL: &str =
        "([-'\"`\\\\#*/:;?.=a\n é0]|:payload|:position|\\.a|/\\*|\\*/|-- |select |.){0,30}";

    proptest! {
        #[test]
        fn no_text_makes_the_compiler_panic(sql in SQL) {
            let handler = compile_handler(&sql).map(|compiled| compiled.sql);
            for result in [handler, compile_setup(&sql), compile_teardown(&sql)] {
                if let Err(error) = result {
                    prop_assert!(sql.is_char_boundary(error.at), "{} in {:?}", error.at, sql);
                }
            }
        }

        #[test]
        fn there_are_as_many_placeholders_as_parameters(sql in SQL) {
            if let Ok(compiled) = compile_handler(&sql) {
                let count = placeholders(&compiled.sql);
                prop_assert_eq!(count, compiled.parameters.len(), "{:?}", compiled);
                prop_assert!(compiled.sql.len() <= sql.len());
            }
        }

        #[test]
        fn a_statement_without_parameters_is_unchanged(
            sql in SQL.prop_map(|sql| sql.replace([':', ';'], ""))
        ) {
            if let Ok(compiled) = compile_handler(&sql) {
                prop_assert_eq!(compiled.sql, sql);
            }
        }

        #[test]
        fn a_parameter_in_a_literal_or_a_comment_is_text(inner in "[^'\"`*/\\\\\n]{0,20}") {
            for sql in [
                format!("select ':position {inner}'"),
                format!("select \":position {inner}\""),
                format!("select `:position {inner}`"),
                format!("select 1 /* :position {inner}*/"),
                format!("select 1 -- :position {inner}"),
                format!("select 1 # :position {inner}"),
            ] {
                let compiled = compile_handler(&sql);
                prop_assert_eq!(compiled, Ok(CompiledStatement { sql, parameters: vec![] }));
            }
        }
    }
}
