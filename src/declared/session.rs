//! Finds out what a statement may leave behind in its database session.

use super::lexer::{Lexer, Token, TokenKind};

/// Functions of both servers (MySQL 8.0 to 9, MariaDB 10.3 to 11) that leave nothing behind.
const SAFE_FUNCTIONS: &str = "\
    abs acos adddate addtime aes_decrypt aes_encrypt ascii asin atan atan2 avg benchmark bin \
    bit_and bit_count bit_length bit_or bit_xor cast ceil ceiling char char_length \
    character_length charset coalesce coercibility collation compress concat concat_ws \
    connection_id conv convert convert_tz cos cot count crc32 cume_dist curdate current_date \
    current_time current_timestamp current_user curtime database date date_add date_format \
    date_sub datediff day dayname dayofmonth dayofweek dayofyear default degrees dense_rank \
    elt exp export_set extract extractvalue field find_in_set first_value floor format \
    from_base64 from_days from_unixtime geometrycollection get_format greatest group_concat \
    hex hour if ifnull inet6_aton inet6_ntoa inet_aton inet_ntoa insert instr interval \
    is_free_lock is_ipv4 is_ipv4_compat is_ipv4_mapped is_ipv6 is_used_lock isnull json_array \
    json_array_append json_array_insert json_arrayagg json_contains json_contains_path \
    json_depth json_extract json_insert json_keys json_length json_merge json_merge_patch \
    json_merge_preserve json_object json_objectagg json_overlaps json_pretty json_quote \
    json_remove json_replace json_schema_valid json_search json_set json_table json_type \
    json_unquote json_valid json_value lag last_day last_value lcase lead least left length \
    linestring ln localtime localtimestamp locate log log10 log2 lower lpad ltrim make_set \
    makedate maketime max mbrcontains mbrdisjoint mbrequals mbrintersects mbroverlaps \
    mbrtouches mbrwithin microsecond mid min minute mod month monthname multilinestring \
    multipoint multipolygon name_const now nth_value ntile nullif oct octet_length ord \
    percent_rank period_add period_diff pi point polygon position pow power quarter quote \
    radians rand random_bytes rank regexp_instr regexp_replace regexp_substr repeat replace \
    reverse right round row_number rpad rtrim schema sec_to_time second session_user \
    sha2 sign sin sleep soundex space sqrt st_area st_asbinary st_asgeojson st_astext \
    st_buffer st_centroid st_contains st_convexhull st_crosses st_difference st_dimension \
    st_disjoint st_distance st_distance_sphere st_endpoint st_envelope st_equals \
    st_exteriorring st_geomcollfromtext st_geomcollfromwkb st_geometryn st_geometrytype \
    st_geomfromgeojson st_geomfromtext st_geomfromwkb st_interiorringn st_intersection \
    st_intersects st_isclosed st_isempty st_issimple st_length st_linefromtext st_linefromwkb \
    st_numgeometries st_numinteriorrings st_numpoints st_overlaps st_pointfromtext \
    st_pointfromwkb st_pointn st_polyfromtext st_polyfromwkb st_srid st_startpoint \
    st_symdifference st_touches st_union st_within st_x st_y std stddev stddev_pop stddev_samp \
    str_to_date strcmp subdate substr substring substring_index subtime sum sysdate \
    system_user tan time time_format time_to_sec timediff timestamp timestampadd timestampdiff \
    to_base64 to_days to_seconds trim truncate ucase uncompress uncompressed_length unhex \
    unix_timestamp updatexml upper user utc_date utc_time utc_timestamp uuid uuid_short value \
    values var_pop var_samp variance version week weekday weekofyear weight_string year \
    yearweek";

/// Functions of one server, or of some versions: MySQL 9.7 no longer has `md5`. On the other
/// servers, a function of such a name is a stored function that replaces it.
const VENDOR_FUNCTIONS: &str = "\
    any_value bin_to_uuid crc32c from_vector grouping is_uuid json_detailed json_exists \
    json_query json_storage_size md5 median nvl nvl2 regexp_like sha sha1 string_to_vector \
    to_vector \
    uuid_to_bin uuid_v4 uuid_v7 vec_distance vec_fromtext vec_totext vector_to_string";

/// Functions whose result is reset before each event, like the user variables.
const RESET_FUNCTIONS: &[&str] = &["found_rows", "last_insert_id", "row_count"];

/// Words other than functions that may precede a parenthesis.
const KEYWORDS: &str = "\
    against all and any as between binary bit by case character columns decimal dec distinct \
    distinctrow div double else end escape except exists explain float for from group having \
    ignore in index int integer into intersect is join key keys lateral like match member \
    nchar not numeric of offset on or order over partition read real regexp rlike row select \
    separator set signed some sounds straight_join table then union unsigned update using \
    varbinary varchar when where with within xor limit";

/// Words after which a name before a parenthesis is not a function: the parenthesis lists columns.
const BEFORE_NAME: &[&str] = &[
    "as",
    "delayed",
    "high_priority",
    "ignore",
    "insert",
    "into",
    "low_priority",
    "recursive",
    "replace",
    "window",
    "with",
];

/// The effects of a statement on its session.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SessionEffects {
    /// The user variables that the statement names, as it writes them: `@total`.
    pub(super) variables: Vec<String>,
    /// Whether the statement reads the result of the previous one: `last_insert_id()`,
    /// `row_count()`, `found_rows()`.
    pub(super) reads_previous_result: bool,
    /// Whether the statement runs code that is unknown or not in the file.
    pub(super) is_opaque: bool,
}

impl SessionEffects {
    /// Adds the effects of another statement.
    pub(super) fn add(&mut self, other: SessionEffects) {
        let is_new = |name: &String, known: &[String]| {
            !known.iter().any(|known| known.eq_ignore_ascii_case(name))
        };
        for name in other.variables {
            if is_new(&name, &self.variables) {
                self.variables.push(name);
            }
        }
        self.reads_previous_result |= other.reads_previous_result;
        self.is_opaque |= other.is_opaque;
    }

    /// The statements that reset the session state before each event. Empty if the statements read
    /// none.
    pub(super) fn reset_statements(&self) -> Vec<String> {
        let mut statements = Vec::new();
        if self.variables.is_empty() && !self.reads_previous_result {
            return statements;
        }
        if !self.variables.is_empty() {
            let variables: Vec<String> =
                self.variables.iter().map(|name| format!("{name} = null")).collect();
            statements.push(format!("set {}", variables.join(", ")));
        }
        if self.reads_previous_result {
            // `select null limit 0` resets `found_rows()`, and the next statement resets the other
            // two.
            statements.push("select null limit 0".into());
        }
        statements.push("do last_insert_id(0)".into());
        statements
    }
}

/// Analyzes a statement.
pub(super) fn analyze(sql: &str) -> SessionEffects {
    let mut effects = SessionEffects::default();
    let mut lexer = Lexer::new(sql);
    let mut tokens: Vec<Token<'_>> = Vec::new();
    while let Ok(Some(token)) = lexer.next() {
        if token.kind != TokenKind::Trivia {
            tokens.push(token);
        }
    }
    for (index, token) in tokens.iter().enumerate() {
        let next = tokens.get(index + 1).copied();
        let before = index.checked_sub(1).map(|before| tokens[before]);
        if token.text == "@" {
            let is_system = next.is_some_and(|next| next.text == "@")
                || before.is_some_and(|before| before.text == "@");
            match parse_variable(sql, &tokens[index..]) {
                Some(name) if !is_system => effects.variables.push(name),
                // `@@warning_count` and similar.
                _ => effects.reads_previous_result = true,
            }
            continue;
        }
        let is_name = token.kind == TokenKind::Word || token.text.starts_with('`');
        let is_variable = before.is_some_and(|before| before.text == "@");
        if !is_name || is_variable {
            continue;
        }
        if is_any(*token, &["call", "diagnostics", "execute", "handler", "prepare"]) {
            effects.is_opaque |= !is_any(*token, &["diagnostics"]);
            effects.reads_previous_result = true;
        }
        if is_any(*token, &["next", "previous"])
            && next.is_some_and(|next| is_any(next, &["value"]))
        {
            effects.is_opaque = true;
        }
        if next.is_some_and(|next| next.text == "(") {
            let adjacent = next.is_some_and(|next| next.at == token.at + token.text.len());
            check_call(&tokens[..index], *token, adjacent, &mut effects);
        }
    }
    effects
}

/// Adds the effects of a name before a parenthesis.
fn check_call(before: &[Token<'_>], name: Token<'_>, adjacent: bool, effects: &mut SessionEffects) {
    let last = |back: usize| before.len().checked_sub(back).map(|at| before[at]);
    let is_qualified = last(1).is_some_and(|last| last.text == ".");
    let in_front = if is_qualified { last(3) } else { last(1) };
    if in_front.is_some_and(|word| is_any(word, BEFORE_NAME)) {
        return;
    }
    let word = name.text.to_ascii_lowercase();
    let is_in = |list: &str| list.split_ascii_whitespace().any(|known| known == word);
    if !is_qualified && name.kind == TokenKind::Word {
        if RESET_FUNCTIONS.contains(&word.as_str()) && adjacent {
            effects.reads_previous_result = true;
            return;
        }
        // After a blank, the name of a function of the server can be that of a stored function.
        if is_in(KEYWORDS)
            || (adjacent && (is_in(SAFE_FUNCTIONS) || is_in(VENDOR_FUNCTIONS)))
            || is_keyword_function(&word)
        {
            return;
        }
    }
    effects.is_opaque = true;
}

/// Whether the word is a reserved word that is a function with or without a blank before the
/// parenthesis.
fn is_keyword_function(word: &str) -> bool {
    matches!(
        word,
        "if" | "values"
            | "value"
            | "char"
            | "convert"
            | "default"
            | "interval"
            | "left"
            | "right"
            | "mod"
            | "repeat"
            | "replace"
            | "insert"
            | "date"
            | "time"
            | "timestamp"
            | "truncate"
            | "coalesce"
    )
}

fn is_any(token: Token<'_>, words: &[&str]) -> bool {
    token.kind == TokenKind::Word && words.iter().any(|word| token.text.eq_ignore_ascii_case(word))
}

/// The user variable that starts with the first token, an `@`, as the statement writes it.
pub(super) fn parse_variable(sql: &str, tokens: &[Token<'_>]) -> Option<String> {
    let (at, mut end) = (tokens.first()?.at, tokens.first()?.at + 1);
    for token in &tokens[1..] {
        let goes_on = token.at == end
            && match token.kind {
                TokenKind::Quoted => end == at + 1,
                TokenKind::Word => true,
                _ => token.text == ".",
            };
        if !goes_on {
            break;
        }
        end += token.text.len();
        if token.kind == TokenKind::Quoted {
            break;
        }
    }
    (end > at + 1).then(|| sql[at..end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_statements_leave_no_session_state() {
        for sql in [
            "insert into t (a, b) values (?, concat(?, lower('x')))",
            "insert into db.t (a) values (1) on duplicate key update a = values(a) + (1)",
            "insert ignore into `my t` (a) \
             select max(a) from u where a in (1, 2) and exists (select 1)",
            "replace t (a) values (json_extract(?, '$.a'))",
            "update t set a = if(b > 1, cast(? as decimal(10, 2)), 0) where c in (?)",
            "with a (x) as (select 1), b as (select 2) select * from a join b using (x)",
            "insert into t values (1) as new (x) on duplicate key update a = x",
            "select row_number() over (partition by a order by b) from t",
            "delete from t where a = 'f(1)' -- f(2)",
            "update t set a = convert(? using utf8mb4), b = date_add(c, interval (1) day)",
            "select count(*), count(distinct a), group_concat(a separator ',') from t",
        ] {
            assert_eq!(analyze(sql), SessionEffects::default(), "{sql}");
        }
    }

    #[test]
    fn user_variables_are_found_in_every_spelling() {
        let effects = analyze("set @a = 1, @B.c = @`odd name`, @'x' := 2, @a = ':@no'");
        assert_eq!(effects.variables, ["@a", "@B.c", "@`odd name`", "@'x'", "@a"]);
        assert!(!effects.reads_previous_result && !effects.is_opaque);
        let mut all = SessionEffects::default();
        all.add(analyze("update t set n = @n := @n + 1"));
        all.add(analyze("set @N = last_insert_id()"));
        assert_eq!(
            all.reset_statements(),
            ["set @n = null", "select null limit 0", "do last_insert_id(0)"]
        );
        assert!(SessionEffects::default().reset_statements().is_empty());
    }

    #[test]
    fn functions_of_the_previous_statement_are_found() {
        for sql in [
            "select row_count()",
            "update t set a = LAST_INSERT_ID()",
            "select @@identity",
            "set @a = found_rows()",
        ] {
            assert!(analyze(sql).reads_previous_result && !analyze(sql).is_opaque, "{sql}");
        }
    }

    #[test]
    fn calls_with_unknown_effects_are_found() {
        for sql in [
            "call p()",
            "call db.p(1)",
            "insert into t values (f(?))",
            "insert into t values (db.lower(?))",
            "insert into t values (`lower`(?))",
            "insert into t values (count (1))",
            "do get_lock('a', 1)",
            "select release_all_locks()",
            "insert into t values (nextval(s))",
            "insert into t values (next value for s)",
            "select lastval(s)",
            "execute immediate 'x'",
            "insert into t (a) values (1) on duplicate key update a = größe(1)",
            "update t set a = sys.f(1)",
            "set @a = f(1)",
        ] {
            assert!(analyze(sql).is_opaque, "{sql}");
        }
    }
}
