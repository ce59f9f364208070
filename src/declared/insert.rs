//! Recognises the inserts that may be sent for many events at once: their rows do not depend on
//! when, or in how many statements, they are sent. A statement with anything unknown in it is not
//! one of them.

use std::ops::Range;

use super::lexer::{Lexer, Token, TokenKind};

/// An `insert … values (…)` of one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Insert {
    /// The table's name, without quotes.
    pub(super) table: String,
    /// The range of the row in the text, with its parentheses. It contains all parameters.
    pub(super) row: Range<usize>,
    /// Whether the statement is an `insert ignore`.
    pub(super) ignores: bool,
}

/// Functions of both servers whose result depends on their arguments alone.
const DETERMINISTIC_FUNCTIONS: &[&str] = &[
    "abs",
    "bit_count",
    "ceil",
    "ceiling",
    "char_length",
    "coalesce",
    "concat",
    "concat_ws",
    "crc32",
    "date_add",
    "date_format",
    "date_sub",
    "datediff",
    "day",
    "dayofmonth",
    "dayofweek",
    "dayofyear",
    "elt",
    "extract",
    "field",
    "floor",
    "from_unixtime",
    "greatest",
    "hex",
    "hour",
    "ifnull",
    "instr",
    "isnull",
    "json_array",
    "json_contains",
    "json_extract",
    "json_length",
    "json_merge_patch",
    "json_object",
    "json_quote",
    "json_remove",
    "json_set",
    "json_type",
    "json_unquote",
    "json_valid",
    "json_value",
    "last_day",
    "lcase",
    "least",
    "length",
    "locate",
    "lower",
    "lpad",
    "ltrim",
    "microsecond",
    "minute",
    "month",
    "nullif",
    "pow",
    "power",
    "quarter",
    "reverse",
    "round",
    "rpad",
    "rtrim",
    "second",
    "sha2",
    "sign",
    "sqrt",
    "str_to_date",
    "strcmp",
    "substr",
    "substring",
    "substring_index",
    "timestampadd",
    "timestampdiff",
    "to_days",
    "trim",
    "ucase",
    "unhex",
    "upper",
    "week",
    "weekday",
    "year",
    "yearweek",
    // Words of the grammar that look like functions.
    "cast",
    "convert",
    "date",
    "if",
    "left",
    "mod",
    "repeat",
    "replace",
    "right",
    "time",
    "truncate",
];

/// Functions that are only for `on duplicate key update`.
const UPDATE_FUNCTIONS: &[&str] = &["default", "value", "values"];

/// Types of a `cast` that may have a length.
const TYPES: &[&str] = &["binary", "char", "datetime", "decimal", "nchar", "time"];

/// Words that may precede a parenthesis without being a function.
const BEFORE_PARENTHESIS: &[&str] = &[
    "and", "between", "case", "div", "else", "in", "interval", "is", "like", "mod", "not", "or",
    "then", "when", "xor",
];

/// Other words that may occur in the values of a row. A column is not among them: its value would
/// depend on the previous row, or be a default.
const ROW_WORDS: &[&str] = &[
    "as",
    "ascii",
    "binary",
    "both",
    "char",
    "character",
    "collate",
    "date",
    "datetime",
    "day",
    "decimal",
    "default",
    "double",
    "end",
    "escape",
    "false",
    "float",
    "from",
    "hour",
    "integer",
    "json",
    "latin1",
    "leading",
    "microsecond",
    "minute",
    "month",
    "nchar",
    "null",
    "quarter",
    "second",
    "set",
    "signed",
    "time",
    "trailing",
    "true",
    "unsigned",
    "using",
    "utf8mb4",
    "utf8mb4_bin",
    "utf8mb4_general_ci",
    "utf8mb4_unicode_ci",
    "week",
    "year",
];

/// Reserved words that read more than a column in `on duplicate key update`.
const UPDATE_REFUSED: &[&str] = &[
    "current_date",
    "current_role",
    "current_time",
    "current_timestamp",
    "current_user",
    "except",
    "for",
    "intersect",
    "into",
    "localtime",
    "localtimestamp",
    "over",
    "returning",
    "rownum",
    "select",
    "sysdate",
    "table",
    "union",
    "utc_date",
    "utc_time",
    "utc_timestamp",
    "with",
];

/// Words that read the result of the previous statement, which differs if several statements are
/// sent as one.
const PREVIOUS_RESULT_WORDS: &[&str] = &[
    "call",
    "diagnostics",
    "error_count",
    "execute",
    "found_rows",
    "last_insert_id",
    "row_count",
    "warning_count",
];

/// Parses a statement that has `?` for its parameters.
///
/// # Errors
/// The reason why the statement is not an insert that may be sent for many events at once.
pub(super) fn parse(sql: &str) -> Result<Insert, &'static str> {
    let tokens = tokenize(sql)?;
    let mut cursor = Cursor { tokens: &tokens };
    let mut ignores = false;
    if cursor.take_word("insert") {
        ignores = cursor.take_word("ignore");
    } else if !cursor.take_word("replace") {
        return Err("it is not an insert");
    }
    cursor.take_word("into");
    let table = cursor.take_name().ok_or("the table's name is not of plain letters and digits")?;
    cursor.skip_columns()?;
    if !cursor.take_word("values") && !cursor.take_word("value") {
        return Err("it has no `values`");
    }
    let row = cursor.take_parenthesized().ok_or("its values cannot be read")?;
    check(row, Clause::Values)?;
    if cursor.take_word("as") {
        cursor.take_name().ok_or("the row's alias is not of plain letters and digits")?;
        cursor.skip_columns()?;
    }
    let tail = cursor.tokens;
    match tail.first() {
        None => {}
        Some(_)
            if ["on", "duplicate", "key", "update"].iter().all(|word| cursor.take_word(word)) =>
        {
            check(tail, Clause::Update)?;
        }
        Some(next) if next.token.text == "," => return Err("it has several rows"),
        Some(_) => return Err("it has more than values and `on duplicate key update`"),
    }
    let end = |piece: &SyntaxToken<'_>| piece.token.at + piece.token.text.len();
    let begin = row.first().map_or(0, |piece| piece.token.at);
    Ok(Insert { table, row: begin..row.last().map_or(0, end), ignores })
}

/// Whether a statement may read the result of the previous one, other than its rows.
pub(super) fn reads_previous_result(sql: &str) -> bool {
    let Ok(tokens) = tokenize(sql) else { return true };
    let reads_result =
        |piece: &SyntaxToken<'_>| PREVIOUS_RESULT_WORDS.iter().any(|word| piece.is(word));
    let is_at = |piece: &SyntaxToken<'_>| piece.token.text == "@";
    // `@@name` is a system variable, and some of these hold such a result.
    tokens.iter().any(reads_result)
        || tokens.windows(2).any(|pair| is_at(&pair[0]) && is_at(&pair[1]))
}

/// A token that is not a blank or a comment.
#[derive(Debug, Clone, Copy)]
struct SyntaxToken<'s> {
    token: Token<'s>,
    /// Whether nothing separates the token from the previous one.
    adjacent: bool,
}

impl SyntaxToken<'_> {
    fn is(&self, word: &str) -> bool {
        self.token.kind == TokenKind::Word && self.token.text.eq_ignore_ascii_case(word)
    }
}

fn tokenize(sql: &str) -> Result<Vec<SyntaxToken<'_>>, &'static str> {
    let mut lexer = Lexer::new(sql);
    let (mut pieces, mut adjacent) = (Vec::new(), false);
    while let Some(token) = lexer.next().map_err(|_| "it cannot be read")? {
        if token.kind != TokenKind::Trivia {
            pieces.push(SyntaxToken { token, adjacent });
        } else if token.text.starts_with("/*+") {
            return Err("it has an optimizer hint");
        }
        adjacent = token.kind != TokenKind::Trivia;
    }
    Ok(pieces)
}

/// The tokens of a statement that are not parsed yet.
struct Cursor<'t, 's> {
    tokens: &'t [SyntaxToken<'s>],
}

impl<'t, 's> Cursor<'t, 's> {
    fn take_word(&mut self, word: &str) -> bool {
        let takes = self.tokens.first().is_some_and(|piece| piece.is(word));
        self.tokens = &self.tokens[usize::from(takes)..];
        takes
    }

    fn take_symbol(&mut self, symbol: &str) -> bool {
        let takes = self.tokens.first().is_some_and(|piece| piece.token.text == symbol);
        self.tokens = &self.tokens[usize::from(takes)..];
        takes
    }

    /// A name that every server reads in the same way: not qualified, and of ASCII letters, digits,
    /// `_` and `$`.
    fn take_name(&mut self) -> Option<String> {
        let (first, rest) = self.tokens.split_first()?;
        let text = first.token.text;
        let name = match first.token.kind {
            TokenKind::Word => text,
            TokenKind::Quoted => text.strip_prefix('`')?.strip_suffix('`')?,
            _ => return None,
        };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$';
        let is_qualified = rest.first().is_some_and(|next| next.token.text == ".");
        if is_qualified || name.is_empty() || !name.chars().all(is_plain) {
            return None;
        }
        self.tokens = rest;
        Some(name.to_owned())
    }

    /// Skips a list of names in parentheses, if there is one.
    fn skip_columns(&mut self) -> Result<(), &'static str> {
        const REASON: &str = "its columns cannot be read";
        if !self.take_symbol("(") || self.take_symbol(")") {
            return Ok(());
        }
        loop {
            let first = self.tokens.first().ok_or(REASON)?;
            let is_name = first.token.kind == TokenKind::Word || first.token.text.starts_with('`');
            if !is_name || first.is("select") {
                return Err(REASON);
            }
            self.tokens = &self.tokens[1..];
            if self.take_symbol(")") {
                return Ok(());
            }
            if !self.take_symbol(",") {
                return Err(REASON);
            }
        }
    }

    /// The tokens of an expression in parentheses, including these.
    fn take_parenthesized(&mut self) -> Option<&'t [SyntaxToken<'s>]> {
        let mut depth = 0_usize;
        for (index, piece) in self.tokens.iter().enumerate() {
            match piece.token.text {
                "(" => depth += 1,
                ")" => depth = depth.checked_sub(1)?,
                _ => {}
            }
            if depth == 0 {
                let (all, rest) = self.tokens.split_at(index + 1);
                self.tokens = rest;
                return Some(all).filter(|_| index > 0);
            }
        }
        None
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clause {
    Values,
    /// The clause after the row. It may name columns but not bind parameters, which would differ
    /// for each row.
    Update,
}

fn check(pieces: &[SyntaxToken<'_>], clause: Clause) -> Result<(), &'static str> {
    for (index, piece) in pieces.iter().enumerate() {
        let next = pieces.get(index + 1);
        let before = index.checked_sub(1).map(|before| pieces[before]);
        let called = next.filter(|next| next.token.text == "(");
        match piece.token.kind {
            TokenKind::Quoted if piece.token.text.starts_with('`') => match (clause, called) {
                (_, Some(_)) => return Err("it calls a stored function"),
                (Clause::Values, None) => return Err("a value reads a column"),
                (Clause::Update, None) => {}
            },
            TokenKind::Quoted | TokenKind::Trivia => {}
            TokenKind::Symbol => check_symbol(piece.token.text, clause)?,
            TokenKind::Word => match called {
                Some(parenthesis) => check_call(piece, before, parenthesis, clause)?,
                None => check_word(piece, clause)?,
            },
        }
    }
    Ok(())
}

fn check_symbol(symbol: &str, clause: Clause) -> Result<(), &'static str> {
    match symbol {
        "?" if clause == Clause::Update => Err("it has a parameter after its values"),
        "@" => Err("it has a variable"),
        "(" | ")" | "," | "." | "+" | "-" | "*" | "/" | "%" | "=" | "<" | ">" | "!" | "&" | "|"
        | "^" | "~" | "?" => Ok(()),
        _ => Err("it has an unknown symbol"),
    }
}

fn check_call(
    piece: &SyntaxToken<'_>,
    before: Option<SyntaxToken<'_>>,
    parenthesis: &SyntaxToken<'_>,
    clause: Clause,
) -> Result<(), &'static str> {
    let is_of = |words: &[&str]| words.iter().any(|word| piece.is(word));
    let is_known = is_of(DETERMINISTIC_FUNCTIONS)
        || (clause == Clause::Update && is_of(UPDATE_FUNCTIONS))
        || (is_of(TYPES) && before.is_some_and(|before| before.is("as")));
    // A blank before the parenthesis or a dot before the name can make it a stored function of the
    // same name.
    let is_builtin = parenthesis.adjacent && before.is_none_or(|before| before.token.text != ".");
    if is_of(BEFORE_PARENTHESIS) || (is_known && is_builtin) {
        Ok(())
    } else {
        Err("it calls a function whose result may depend on more than its arguments")
    }
}

fn check_word(piece: &SyntaxToken<'_>, clause: Clause) -> Result<(), &'static str> {
    let is_of = |words: &[&str]| words.iter().any(|word| piece.is(word));
    match clause {
        Clause::Values
            if is_of(ROW_WORDS) || is_of(BEFORE_PARENTHESIS) || is_number(piece.token.text) =>
        {
            Ok(())
        }
        Clause::Values => Err("a value reads a column, or has an unknown word"),
        Clause::Update if is_of(UPDATE_REFUSED) => Err("its update reads more than the row"),
        Clause::Update => Ok(()),
    }
}

/// Whether a word is a number or a part of one: the lexer splits `1.5` and `1e-3`.
fn is_number(text: &str) -> bool {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    match text.strip_prefix("0x") {
        Some(hex) => !hex.is_empty() && hex.bytes().all(|b| b.is_ascii_hexdigit()),
        None => {
            let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, ""));
            !mantissa.is_empty() && digits(mantissa) && digits(exponent)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_single_row_insert_is_parsed_into_its_table_and_row() {
        for (sql, table, row) in [
            ("insert into t values (?)", "t", "(?)"),
            ("INSERT t VALUES (?, 1)", "t", "(?, 1)"),
            ("insert ignore into `t` (a, `b c`) values (?, 'a)')", "t", "(?, 'a)')"),
            ("replace into Case_Status (a) value (?) -- done", "Case_Status", "(?)"),
            ("insert into t () values ()", "t", "()"),
            (
                "insert into t values (-1.5e-3, 0x1F, 1e3, null, true, default)",
                "t",
                "(-1.5e-3, 0x1F, 1e3, null, true, default)",
            ),
            (
                "insert into t values /* ( */ (coalesce(?, concat('a', ?)), ? -- )\n)",
                "t",
                "(coalesce(?, concat('a', ?)), ? -- )\n)",
            ),
            (
                "insert into t values (cast(? as decimal(12, 2)), convert(? using utf8mb4), if(? \
                 > 1, 'a', 'b'))",
                "t",
                "",
            ),
            (
                "insert into t values (case when ? in (1, 2) then ? else not (?) end, ? div 2, ? \
                 mod 2)",
                "t",
                "",
            ),
            (
                "insert into t values (date_add(?, interval 1 day), extract(year from ?), \
                 trim(both 'x' from ?))",
                "t",
                "",
            ),
            ("insert into t values (?, 1) on duplicate key update n = n + 1", "t", "(?, 1)"),
            (
                "insert into t values (?) on duplicate key update a = values(a), `b` = \
                 if(values(a) > t.b, 1, `t`.`b`)",
                "t",
                "(?)",
            ),
            (
                "insert into t (a) values (?) as new on duplicate key update a = greatest(t.a, \
                 new.a)",
                "t",
                "(?)",
            ),
            (
                "insert into t (a) values (?) as new (x) on duplicate key update a = x, b = \
                 json_set(b, '$.a', x)",
                "t",
                "(?)",
            ),
        ] {
            let insert = parse(sql).unwrap_or_else(|reason| panic!("{sql}: {reason}"));
            assert_eq!(insert.table, table, "{sql}");
            let found = &sql[insert.row];
            assert!(
                found == row || (row.is_empty() && found.starts_with('(') && sql.ends_with(found)),
                "{found}"
            );
        }
    }

    #[test]
    fn an_insert_that_may_differ_for_many_rows_is_not_coalesced() {
        for (sql, why) in [
            ("update t set a = ?", "not an insert"),
            ("with a as (select 1) select * from a", "not an insert"),
            ("set @a = ?", "not an insert"),
            ("insert into t set a = ?", "no `values`"),
            ("insert into t select ?", "no `values`"),
            ("insert into t (select ?)", "its columns"),
            ("insert into t (a) select ? from u", "no `values`"),
            ("insert low_priority into t values (?)", "no `values`"),
            ("insert into t partition (p) values (?)", "no `values`"),
            ("insert into other.t values (?)", "table's name"),
            ("insert into `other`.`t` values (?)", "table's name"),
            ("insert into `a b` values (?)", "table's name"),
            ("insert into größe values (?)", "table's name"),
            ("insert into \"t\" values (?)", "table's name"),
            ("insert into t values (?), (?)", "several rows"),
            ("insert into t values row(?)", "values cannot be read"),
            ("insert into t values (?", "values cannot be read"),
            ("insert into t values ((select max(a) from t))", "unknown word"),
            ("insert into t values (a + 1)", "column"),
            ("insert into t values (`a`)", "column"),
            ("insert into t values (@a)", "variable"),
            ("insert into t values (@a := ?)", "variable"),
            ("insert into t values (@@identity)", "variable"),
            ("insert into t values (now())", "function"),
            ("insert into t values (now(6), sysdate())", "function"),
            ("insert into t values (current_timestamp)", "unknown"),
            ("insert into t values (current_timestamp())", "function"),
            ("insert into t values (unix_timestamp())", "function"),
            ("insert into t values (uuid())", "function"),
            ("insert into t values (rand(?))", "function"),
            ("insert into t values (last_insert_id())", "function"),
            ("insert into t values (last_insert_id(?))", "function"),
            ("insert into t values (row_count())", "function"),
            ("insert into t values (found_rows(), connection_id())", "function"),
            ("insert into t values (sleep(1))", "function"),
            ("insert into t values (get_lock(?, 1))", "function"),
            ("insert into t values (next_number(?))", "function"),
            ("insert into t values (other.concat(?))", "unknown word"),
            ("insert into t values (`concat`(?))", "stored function"),
            ("insert into t values (concat (?))", "function"),
            ("insert into t values (values(a))", "function"),
            ("insert into t values (nextval(s))", "function"),
            ("insert into t values (next value for s)", "unknown"),
            ("insert into t values (1a)", "unknown"),
            ("insert into t values (char(10))", "function"),
            ("insert into t values (?) on duplicate key update a = ?", "parameter"),
            (
                "insert into t values (?) on duplicate key update a = (select 1)",
                "more than the row",
            ),
            ("insert into t values (?) on duplicate key update a = last_insert_id(a)", "function"),
            ("insert into t values (?) on duplicate key update a = now()", "function"),
            (
                "insert into t values (?) on duplicate key update a = current_timestamp",
                "more than the row",
            ),
            ("insert into t values (?) on duplicate key update a = @a", "variable"),
            (
                "insert into t values (?) on duplicate key update a = next value for s",
                "more than the row",
            ),
            ("insert into t values (?) on duplicate key update a = `f`(1)", "stored function"),
            ("insert into t values (?) on duplicate key update a = other.left(1)", "function"),
            (
                "insert into t values (?) on duplicate key update a = 1 returning a",
                "more than the row",
            ),
            ("insert into t values (?) returning a", "more than values"),
            ("insert into t values (?) as `a b` on duplicate key update a = 1", "alias"),
            ("insert into t values (?) on duplicate key", "more than values"),
            ("insert /*+ set_var(sql_mode='') */ into t values (?)", "hint"),
        ] {
            let reason = parse(sql).expect_err(sql);
            assert!(reason.contains(why), "{sql}: {reason}");
        }
    }

    #[test]
    fn a_statement_that_reads_the_previous_result_is_recognized() {
        for sql in [
            "insert into u select row_count()",
            "update t set a = LAST_INSERT_ID()",
            "set @a = found_rows()",
            "get diagnostics @a = row_count",
            "call p()",
            "set @a = @@warning_count",
            "set @a = @@session.insert_id",
        ] {
            assert!(reads_previous_result(sql), "{sql}");
        }
        for sql in [
            "update t set a = @a",
            "insert into t values ('row_count()')",
            "delete from `row_count`",
        ] {
            assert!(!reads_previous_result(sql), "{sql}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic_and_every_parameter_is_in_the_row(
            sql in "insert into t( \\(a\\))? values ?\\(?\
                ([(),?'`@a. ]|now\\(\\)|coalesce\\(|null|1){0,12}\\)?\
                ( on duplicate key update a = ([(),?@a1]|values\\(){0,5})?"
        ) {
            let _ = reads_previous_result(&sql);
            if let Ok(insert) = parse(&sql) {
                let row = &sql[insert.row.clone()];
                prop_assert!(row.starts_with('(') && row.ends_with(')'));
                let outside = [&sql[..insert.row.start], &sql[insert.row.end..]];
                let mut lexers = outside.map(Lexer::new);
                for lexer in &mut lexers {
                    while let Ok(Some(token)) = lexer.next() {
                        prop_assert!(token.text != "?", "{}", sql);
                    }
                }
            }
        }
    }
}
