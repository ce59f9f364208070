//! The errors of the server that speak of the moment and not of the statement.
//!
//! A projector is never broken by such an error, because the same statement may succeed later.
//! This is the only list of such errors: handlers, the ledger, the relay, boot, append and doctor
//! use it.
//! It covers MySQL 5.7 to 9, MariaDB 10.5 to 12, InnoDB, group replication, Galera, Aurora, RDS
//! Proxy and ProxySQL. The numbers come from the message files of both servers, which were read
//! from the first number to the last.
//!
//! Some errors look as if they passed by themselves, and are not in the table:
//!
//! | number | why it is permanent |
//! | --- | --- |
//! | 1017, 1034, 1035, 1194, 1195, 1712, 1877, 1932 | a table is missing in the engine or damaged: it must be repaired or rebuilt |
//! | 1099, 1100, 1192, 1223, 1568, 1792 | the handler's own session is in the wrong state |
//! | 1105, 1815 | the server says only "unknown" or "internal" |
//! | 1119, 1436, 3186, 3636, 3698, 3699 | the statement itself is too deep, too large or too slow |
//! | 1153, 1162, 1197, 1301, 1705, 1713, 3231, 4082 | the statement or its transaction is too large for a limit; fewer events at once may fit |
//! | 1290 with another option | for example `--secure-file-priv`: the statement is never allowed |
//! | 1356 | a view refers to something that is missing; a missing privilege has the same number |
//! | 1467 | the numbers of an auto-increment column are used up |
//! | 1665, 3098 | the table or the statement does not suit the replication |
//! | 1835 | the handler bound other parameters than the statement has |
//! | 1964, 3030 | only a replica's own threads get it |
//! | 3164, 6544 | an audit filter rejects the statement |

use ServerCondition::{
    Conflict, Denied, Full, Interrupted, LimitReached, ReadOnly, Refused, SessionEnded, Unavailable,
};
use sqlx::mysql::MySqlDatabaseError;

/// What an error says about the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerCondition {
    /// Another session was in the way. A retry of the transaction may succeed at once.
    Conflict,
    /// The server ended this session. A retry needs a new connection.
    SessionEnded,
    /// The statement was cancelled: by a person, or because it took too long.
    Interrupted,
    /// The server starts, stops, has lost its cluster, or accepts no connection.
    Unavailable,
    /// The server is read-only, like a former primary after a failover.
    ReadOnly,
    /// The disk, the memory or a table is full.
    Full,
    /// A limit on connections, statements or transactions is reached.
    LimitReached,
    /// The account lacks a privilege. A person must grant it, and a session may keep its old
    /// privileges, so a retry needs a new connection.
    Denied,
    /// The server refuses the account: a wrong password, an expired or locked account, a host that
    /// may not connect. A person must act.
    Refused,
}

/// One line of the table.
struct ServerError {
    number: u16,
    condition: ServerCondition,
    /// Tells this error apart from others with the same number.
    sign: Sign,
}

/// How to recognize an error among several with the same number.
enum Sign {
    /// The number has one meaning.
    Number,
    /// The message contains a text that no server translates.
    Text(&'static str),
    /// The message names a code of the operating system or of the storage engine that is one of
    /// [`PASSING_CODES`].
    Code,
}

const fn row(number: u16, condition: ServerCondition) -> ServerError {
    ServerError { number, condition, sign: Sign::Number }
}

const fn row_with(number: u16, condition: ServerCondition, text: &'static str) -> ServerError {
    ServerError { number, condition, sign: Sign::Text(text) }
}

const fn row_with_code(number: u16, condition: ServerCondition) -> ServerError {
    ServerError { number, condition, sign: Sign::Code }
}

/// The codes in errors of files and engines that pass: interrupted, no memory, too many open files,
/// no space, read-only file system; and from engines: no memory, lock wait, lock table full,
/// deadlock. Others, such as "no such file", "too big row" and "duplicate key", do not.
const PASSING_CODES: &[u32] = &[4, 11, 12, 16, 23, 24, 28, 30, 110, 128, 146, 147, 149];

#[rustfmt::skip]
const TABLE: &[ServerError] = &[
    row_with_code(1004, Full),  // cannot create a file
    row_with_code(1005, Full),  // cannot create a table
    row_with_code(1015, Full),  // cannot lock a file
    row_with_code(1016, Full),  // cannot open a file
    row(1020, Conflict),        // the row has changed since it was read; MariaDB 11.6 and newer
    row(1021, Full),            // the disk is full, and the server waits for space
    row_with_code(1023, Full),  // error when a file is closed
    row_with_code(1024, Full),  // error when a file is read
    row(1026, Full),            // error when a file is written
    row(1028, Interrupted),     // a sort was aborted: cancelled, or no space for its file
    row_with_code(1030, Full),  // a code of the engine, such as 28: no space left on device
    row(1036, ReadOnly),        // a table is read-only: innodb_read_only
    row(1037, Full),            // out of memory
    row(1038, Full),            // out of memory for a sort
    row(1040, LimitReached),    // too many connections; RDS Proxy: too many new ones a second
    row(1041, Full),            // out of memory
    row(1042, Unavailable),     // the server cannot resolve our address
    row(1043, Unavailable),     // the handshake failed
    row(1044, Denied),          // access to the database is denied
    row(1045, Refused),         // the user or the password is wrong, for example during a rotation
    row(1047, Unavailable),     // Galera: the node is not ready
    row(1053, Unavailable),     // the server shuts down
    row(1114, Full),            // a table, its tablespace or a temporary table is full
    row(1129, Unavailable),     // our host is blocked after failed connections
    row(1130, Refused),         // our host may not connect
    row(1135, LimitReached),    // the server cannot create a thread
    row(1142, Denied),          // a privilege on a table is missing
    row(1143, Denied),          // a privilege on a column is missing
    row(1150, Conflict),        // MariaDB: a delayed insert waited for a lock in vain
    row(1151, LimitReached),    // MariaDB: too many delayed inserts
    row(1152, Unavailable),     // the connection was aborted
    row(1154, Unavailable),     // read error in the connection
    row(1155, Unavailable),     // the server cannot set up the connection
    row(1156, Unavailable),     // packets out of order
    row(1157, Unavailable),     // a packet cannot be uncompressed
    row(1158, Unavailable),     // a packet cannot be read
    row(1159, Unavailable),     // timeout when a packet is read
    row(1160, Unavailable),     // a packet cannot be written
    row(1161, Unavailable),     // timeout when a packet is written
    row(1180, Conflict),        // the commit failed: no space, or the cluster rejected it
    row(1181, Conflict),        // the rollback failed
    row(1184, Unavailable),     // a new connection was aborted
    row(1203, LimitReached),    // the user has too many connections
    row(1205, Conflict),        // lock wait timeout
    row(1206, Full),            // no memory for more locks
    row(1213, Conflict),        // deadlock
    row(1226, LimitReached),    // the user's limit of connections, queries or updates an hour
    row(1227, Denied),          // a global privilege is missing
    row_with(1290, ReadOnly, "read-only"), // --read-only, --super-read-only, --innodb-read-only
    row(1297, Conflict),        // the engine calls its error temporary
    row(1317, Interrupted),     // a person cancelled the statement
    row(1370, Denied),          // a privilege on a procedure or a function is missing
    row(1402, Conflict),        // a transaction branch was rolled back
    row(1412, Conflict),        // the definition of a table has changed since the transaction began
    row(1429, Unavailable),     // a foreign data source cannot be reached
    row(1449, Denied),          // the user that defined a view or procedure does not exist
    row(1461, LimitReached),    // too many prepared statements on the server
    row(1534, Full),            // the binary log cannot be written
    row(1587, LimitReached),    // too many files are open
    row(1598, Full),            // the binary log cannot be written
    row(1613, Conflict),        // a transaction branch took too long
    row(1614, Conflict),        // deadlock in a transaction branch
    row(1615, Conflict),        // a prepared statement must be prepared again: a table changes
    row(1637, LimitReached),    // too many transactions at once
    row(1689, Conflict),        // a session with a stronger lock aborted the wait
    row(1698, Refused),         // the user or the authentication is wrong
    row(1820, Refused),         // the password must be changed
    row(1836, ReadOnly),        // the server is read-only
    row(1862, Refused),         // the password has expired
    row(1874, ReadOnly),        // InnoDB is read-only
    row(1878, Full),            // a temporary file cannot be written
    row(1881, ReadOnly),        // innodb_force_recovery
    row(1927, SessionEnded),    // MariaDB: the connection was killed
    row(1969, Interrupted),     // MariaDB: max_statement_time
    row(2002, Unavailable),     // a proxy cannot connect to the server
    row(2003, Unavailable),     // a proxy cannot connect to the server
    row(2006, Unavailable),     // a proxy has lost the server
    row(2013, Unavailable),     // a proxy has lost the server during a statement
    row(3015, Full),            // out of memory in the engine
    row(3019, Full),            // MySQL: no space for undo logs
    row(3024, Interrupted),     // MySQL: max_execution_time
    row(3032, Unavailable),     // MySQL: offline mode
    row(3044, Full),            // out of memory in a function
    row(3058, Conflict),        // deadlock between user locks
    row(3100, Conflict),        // group replication rejected the transaction
    row(3101, Conflict),        // group replication rolled the transaction back
    row(3118, Refused),         // MySQL: the account is locked
    row(3132, Conflict),        // deadlock between service locks
    row(3133, Conflict),        // timeout of a service lock
    row(3159, Refused),         // MySQL: the server accepts only TLS
    row(3168, Unavailable),     // MySQL: the server is not available
    row(3169, SessionEnded),    // MySQL: the session was killed
    row(3170, Full),            // MySQL: a limit of memory is exceeded
    row(3177, Conflict),        // MySQL: the engine refused a lock
    row(3185, Unavailable),     // MySQL: the keyring is not loaded, so tables cannot be decrypted
    row(3197, Conflict),        // MySQL: a transaction branch cannot commit now
    row(3572, Conflict),        // MySQL: nowait, and the row is locked
    row(3675, Full),            // MySQL: the disk is full
    row(3781, Unavailable),     // group replication: a new primary applies its backlog
    row(3782, Unavailable),     // group replication: the same, and the plugin stopped
    row(3783, Unavailable),     // group replication: the same, and the member failed
    row(3796, Unavailable),     // group replication: the member is not online
    row(3797, Unavailable),     // group replication: the wait before a transaction failed
    row(3798, Unavailable),     // group replication: the wait after a transaction failed
    row(3799, Unavailable),     // group replication: the plugin is stopping
    row(3879, Denied),          // MySQL: access to the database is denied by a partial revoke
    row(3950, Full),            // MySQL: out of memory
    row(3955, Refused),         // MySQL: the account is blocked after failed logins
    row(3985, Full),            // MySQL: no resources for a metadata lock
    row(3989, ReadOnly),        // MySQL: the schema is read-only
    row_with(4031, SessionEnded, "inactivity"), // MySQL: wait_timeout; MariaDB: a trigger is missing
    row_with(4081, Full, "Global connection memory"), // MySQL: the memory of all connections
    row(4150, Refused),         // MariaDB: the account is blocked after failed logins
    row(4151, Refused),         // MariaDB: the account is locked
    row(6038, Denied),          // MySQL: a global privilege is missing
    row(6112, LimitReached),    // MySQL: too many stored programs in JavaScript at once
    row(6400, Unavailable),     // MySQL: offline mode, with a reason
    row(6444, Denied),          // MySQL: the firewall does not allow the statement
    row(9001, Unavailable),     // ProxySQL and Aurora Serverless: no server could be reached in time
    row(9002, Unavailable),     // ProxySQL: too many servers failed
    row(9501, LimitReached),    // RDS Proxy: no connection to the database in time
];

/// The server's error number; `None` if the error is not from the server.
pub(crate) fn server_error_number(error: &sqlx::Error) -> Option<u16> {
    let sqlx::Error::Database(error) = error else { return None };
    Some(error.try_downcast_ref::<MySqlDatabaseError>()?.number())
}

/// What the error says about the server; `None` if it speaks of the statement.
pub(crate) fn server_condition(error: &sqlx::Error) -> Option<ServerCondition> {
    let number = server_error_number(error)?;
    let message = error.as_database_error().map(|error| error.message()).unwrap_or_default();
    condition_of(number, message)
}

fn condition_of(number: u16, message: &str) -> Option<ServerCondition> {
    let index = TABLE.binary_search_by_key(&number, |row| row.number).ok()?;
    let row = &TABLE[index];
    let is_meant = match row.sign {
        Sign::Number => true,
        Sign::Text(text) => message.contains(text),
        Sign::Code => code_in(message).is_some_and(|code| PASSING_CODES.contains(&code)),
    };
    is_meant.then_some(row.condition)
}

/// The code of the operating system or of the engine in a message: the number after `errno: `, or
/// else the first number that stands alone, as in `Got error 28 …`.
fn code_in(message: &str) -> Option<u32> {
    let digits = |text: &str| {
        let end = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
        text[..end].parse().ok()
    };
    match message.rsplit_once("errno: ") {
        Some((_, code)) => digits(code),
        None => message.split(' ').find_map(|word| word.parse().ok()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_names_no_number_twice() {
        assert!(TABLE.is_sorted_by(|one, next| one.number < next.number));
    }

    #[test]
    fn errors_with_the_same_number_are_told_apart_by_their_text() {
        for (number, message, condition) in [
            (1290, "running with the --read-only option so it cannot", Some(ReadOnly)),
            (1290, "running with the --super-read-only option so it cannot", Some(ReadOnly)),
            (1290, "running with the --secure-file-priv option so it cannot", None),
            (1030, "Got error 28 - 'No space left on device' from storage engine", Some(Full)),
            (
                1030,
                "Got error 28 \"No space left on device\" from storage engine InnoDB",
                Some(Full),
            ),
            (1030, "Fehler 28 - 'No space left on device' (Speicher-Engine)", Some(Full)),
            (1030, "Got error 139 \"Too big row\" from storage engine MyISAM", None),
            (1016, "Can't open file: './db1/24.frm' (errno: 24 - Too many open files)", Some(Full)),
            (1016, "Can't open file: './db1/24.frm' (errno: 2 \"No such file\")", None),
            (1005, "Can't create table `a`.`b` (errno: 150 \"Foreign key\")", None),
            (4031, "The client was disconnected because of inactivity.", Some(SessionEnded)),
            (4031, "Referenced trigger 'a' for the given action time does not exist", None),
            (4081, "Unknown structured system variable or ROW routine variable 'a'", None),
            (1064, "You have an error in your SQL syntax near '1205' at line 28", None),
        ] {
            assert_eq!(condition_of(number, message), condition, "{number} {message}");
        }
    }
}
