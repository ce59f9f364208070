//! Where the database is, and with which user and password to connect. The password may change
//! while the program runs.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use serde::Deserialize;
use sqlx::mysql::{MySqlConnectOptions, MySqlSslMode};
use sqlx::{ConnectOptions, MySqlPool};
use tokio::sync::Mutex;
use tracing::{info, warn};

use crate::aws::{AuthTokenGenerator, Secret};
use crate::database::error::{DatabaseError, ServerCondition, server_condition};

/// How many prepared statements a connection keeps, unless the URL sets another number. Every
/// further statement closes an older one. sqlx 0.9.0 leaves Nagle's algorithm on
/// (transact-rs/sqlx#4335), so the statement after that waits for 40 ms. A handler's session is
/// replaced long before it reaches this number (see `session_cache`), so this is the limit for
/// the statements of one batch. By default, a server allows 16,382 prepared statements in total.
const STATEMENT_CACHE_CAPACITY: usize = 1024;

/// The pause after a token could not be generated. The old token may still be valid.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// The source of the password.
#[derive(Debug)]
pub(crate) enum CredentialSource {
    /// The database URL.
    Url,
    /// Secrets Manager. The secret is a whole URL or RDS's JSON.
    Secret(Secret),
    /// IAM tokens, each valid for a limited time. A secret may name the database and the user.
    Iam(AuthTokenGenerator, Option<Secret>),
}

/// The source of connection options. The pools use the options that were fetched last.
pub(crate) struct Credentials {
    /// The options from the URL, if there is a URL.
    base: Option<MySqlConnectOptions>,
    ca: Option<PathBuf>,
    source: CredentialSource,
    /// When the password was last fetched, and when to fetch it again.
    password_age: Mutex<PasswordAge>,
}

#[derive(Clone, Copy)]
struct PasswordAge {
    read_at: SystemTime,
    /// `None`: when the server refuses it.
    renew_at: Option<SystemTime>,
}

/// The JSON that RDS writes to a secret. The secrets that RDS manages itself have only `username`
/// and `password`.
#[derive(Deserialize)]
struct RdsSecret {
    username: String,
    /// Not needed with IAM.
    password: Option<String>,
    host: Option<String>,
    port: Option<Port>,
    dbname: Option<String>,
    engine: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Port {
    Number(u16),
    Text(String),
}

impl fmt::Debug for Credentials {
    /// Omits the options, because they would print the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Checks that URL, source and CA can be used together.
    ///
    /// # Errors
    /// [`DatabaseError::Settings`] if the URL is invalid or if the parameters contradict each
    /// other.
    pub(crate) fn new(
        url: Option<&str>,
        source: CredentialSource,
        ca: Option<PathBuf>,
    ) -> Result<Self, DatabaseError> {
        let base = url.map(parse_url).transpose()?;
        let has_credentials = |url: &str| {
            url_has_user_and_password(url).is_some_and(|(user, password)| user || password)
        };
        match (&source, url) {
            (CredentialSource::Url | CredentialSource::Iam(_, None), None) => {
                return Err(DatabaseError::Settings(
                    "no database is named: give --database-url or set DATABASE_URL, or give \
                     --database-secret"
                        .into(),
                ));
            }
            (CredentialSource::Secret(_) | CredentialSource::Iam(_, Some(_)), Some(url))
                if has_credentials(url) =>
            {
                return Err(DatabaseError::Settings(
                    "the database URL and the secret both name a user: leave one of them out, \
                     or remove user and password from the URL (mysql://HOST:PORT/DATABASE)"
                        .into(),
                ));
            }
            (CredentialSource::Iam(_, None), Some(url)) if !has_credentials(url) => {
                return Err(DatabaseError::Settings(
                    "the database URL names no user, which IAM authentication needs: \
                     mysql://USER@HOST:PORT/DATABASE"
                        .into(),
                ));
            }
            (CredentialSource::Iam(..), Some(url))
                if url_has_user_and_password(url).is_some_and(|(_, password)| password) =>
            {
                return Err(DatabaseError::Settings(
                    "the database URL has a password, but IAM authentication uses none: remove it"
                        .into(),
                ));
            }
            _ => {}
        }
        let password_age =
            Mutex::new(PasswordAge { read_at: SystemTime::UNIX_EPOCH, renew_at: None });
        let credentials = Credentials { base, ca, source, password_age };
        if let (CredentialSource::Iam(..), Some(base)) = (&credentials.source, &credentials.base) {
            Self::check_tls(&credentials.with_ca(base.clone()))?;
        }
        Ok(credentials)
    }

    /// Fetches the password, and returns the options with which to connect.
    ///
    /// # Errors
    /// [`DatabaseError::Aws`] if AWS does not return the secret or the token.
    /// [`DatabaseError::Settings`] if the secret is not a database secret.
    pub(crate) async fn options(&self) -> Result<MySqlConnectOptions, DatabaseError> {
        let mut password_age = self.password_age.lock().await;
        let (options, renew_at) = self.fetch().await?;
        *password_age = PasswordAge { read_at: SystemTime::now(), renew_at };
        Ok(options)
    }

    /// Gives the pools a new password if the current one expires soon. If none can be fetched, the
    /// pools keep the current one, so that they work as long as it is valid.
    pub(super) async fn renew_if_due(&self, pools: &[&MySqlPool]) {
        if !matches!(self.source, CredentialSource::Iam(..)) {
            return;
        }
        let mut password_age = self.password_age.lock().await;
        let now = SystemTime::now();
        if password_age.renew_at.is_none_or(|renew_at| now < renew_at) {
            return;
        }
        match self.fetch().await {
            Ok((options, renew_at)) => {
                pools.iter().for_each(|pool| pool.set_connect_options(options.clone()));
                *password_age = PasswordAge { read_at: now, renew_at };
            }
            Err(error) => {
                warn!(%error, "could not get a new database password; the last one stays in use");
                password_age.renew_at = Some(now + RETRY_INTERVAL);
            }
        }
    }

    /// Fetches the password again after the server refused it, unless that was done since `began`.
    /// Returns whether a retry may succeed.
    pub(super) async fn renew_after_refusal(
        &self,
        pools: &[&MySqlPool],
        began: SystemTime,
    ) -> bool {
        if matches!(self.source, CredentialSource::Url) {
            return false;
        }
        let mut password_age = self.password_age.lock().await;
        if password_age.read_at > began {
            return true;
        }
        match self.fetch().await {
            Ok((options, renew_at)) => {
                pools.iter().for_each(|pool| pool.set_connect_options(options.clone()));
                *password_age = PasswordAge { read_at: SystemTime::now(), renew_at };
                info!("the database refused the password; it was read again");
                true
            }
            Err(error) => {
                warn!(%error, "the database refused the password, and no new one could be read");
                false
            }
        }
    }

    /// Boxed, because this future is large, rarely needed, and part of every statement's future.
    fn fetch(
        &self,
    ) -> BoxFuture<'_, Result<(MySqlConnectOptions, Option<SystemTime>), DatabaseError>> {
        Box::pin(self.fetch_options())
    }

    async fn fetch_options(
        &self,
    ) -> Result<(MySqlConnectOptions, Option<SystemTime>), DatabaseError> {
        let missing = || DatabaseError::Settings("no database is named".into());
        match &self.source {
            CredentialSource::Url => {
                Ok((self.with_ca(self.base.clone().ok_or_else(missing)?), None))
            }
            CredentialSource::Secret(secret) => {
                let (options, has_password) = self.options_from_secret(secret).await?;
                if !has_password {
                    return Err(DatabaseError::Settings(format!(
                        "the secret {} has no password",
                        secret.id
                    )));
                }
                Ok((options, None))
            }
            CredentialSource::Iam(tokens, secret) => {
                let options = match secret {
                    Some(secret) => self.options_from_secret(secret).await?.0,
                    None => self.with_ca(self.base.clone().ok_or_else(missing)?),
                };
                let options = options.enable_cleartext_plugin(true);
                Self::check_tls(&options)?;
                let token = tokens
                    .generate(options.get_host(), options.get_port(), options.get_username())
                    .await;
                let token = token?;
                Ok((options.password(&token.text), Some(token.renew_at)))
            }
        }
    }

    /// Reads a secret. Returns its options, and whether it has a password.
    async fn options_from_secret(
        &self,
        secret: &Secret,
    ) -> Result<(MySqlConnectOptions, bool), DatabaseError> {
        let text = secret.read().await?;
        let read = parse_secret(&text, self.base.clone());
        let (options, has_password) = read.map_err(|reason| {
            DatabaseError::Settings(format!("the secret {} {reason}", secret.id))
        })?;
        Ok((self.with_ca(options), has_password))
    }

    /// The advice for a refused authentication.
    pub(super) fn advice(&self) -> &'static str {
        match self.source {
            CredentialSource::Url => "check the user and the password in the database URL",
            CredentialSource::Secret(_) => "check the user and the password in the secret",
            CredentialSource::Iam(..) => {
                "check that the user was created for IAM (identified with AWSAuthenticationPlugin \
                 as 'RDS'), that rds-db:connect is allowed for it, that the URL has the server's \
                 own host name, and AWS_REGION"
            }
        }
    }

    /// Adds the CA file. The server's certificate is then verified, and its host name, too, unless
    /// the URL asks for [`MySqlSslMode::VerifyCa`].
    fn with_ca(&self, options: MySqlConnectOptions) -> MySqlConnectOptions {
        match &self.ca {
            None => options,
            Some(ca) if matches!(options.get_ssl_mode(), MySqlSslMode::VerifyCa) => {
                options.ssl_ca(ca)
            }
            Some(ca) => options.ssl_mode(MySqlSslMode::VerifyIdentity).ssl_ca(ca),
        }
    }

    /// IAM tokens are sent in clear text. Anyone who reads a token can use it for 15 minutes.
    fn check_tls(options: &MySqlConnectOptions) -> Result<(), DatabaseError> {
        if verifies_certificate(options) {
            return Ok(());
        }
        Err(DatabaseError::Settings(
            "IAM authentication sends the token in clear text, and therefore needs a server whose \
             certificate is verified: give --database-ca FILE (the bundle of RDS), or \
             ?ssl-mode=VERIFY_IDENTITY in the database URL"
                .into(),
        ))
    }
}

/// Whether the options verify the server's certificate.
pub(super) fn verifies_certificate(options: &MySqlConnectOptions) -> bool {
    matches!(options.get_ssl_mode(), MySqlSslMode::VerifyCa | MySqlSslMode::VerifyIdentity)
}

/// Whether the server refused the account, for example because the password has changed.
pub(super) fn is_authentication_error(error: &sqlx::Error) -> bool {
    server_condition(error) == Some(ServerCondition::Refused)
}

/// Whether a URL has a user, and whether it has a password. `None` if the
/// URL has no `@`.
fn url_has_user_and_password(url: &str) -> Option<(bool, bool)> {
    let authority = url.strip_prefix("mysql://")?.split(['/', '?', '#']).next()?;
    let (credentials, _) = authority.rsplit_once('@')?;
    Some((!credentials.is_empty(), credentials.contains(':')))
}

/// Returns the part of a URL between the host and the options. If the password contains a raw `/`,
/// the result includes a part of the password.
fn url_path(url: &str) -> Option<&str> {
    let (_, path) = url.strip_prefix("mysql://")?.split_once('/')?;
    path.split(['?', '#']).next()
}

/// Parses a secret. `base` are the options of the URL, if there is one. Also returns whether the
/// secret has a password. An error never quotes the text.
fn parse_secret(
    text: &str,
    base: Option<MySqlConnectOptions>,
) -> Result<(MySqlConnectOptions, bool), String> {
    let text = text.trim();
    if text.starts_with("mysql://") {
        return match base {
            None => {
                // The URL may have no password. The server decides whether it accepts that.
                parse_url(text)
                    .map(|options| (options, true))
                    .map_err(|error| format!("is a URL, but {error}"))
            }
            Some(_) => Err("is a whole URL: leave --database-url (DATABASE_URL) out".into()),
        };
    }
    let secret: RdsSecret = serde_json::from_str(text).map_err(|_| {
        "is neither a URL (mysql://USER:PASSWORD@HOST:PORT/DATABASE) nor JSON with username and \
         password, as RDS writes it"
            .to_owned()
    })?;
    if let Some(engine) = secret
        .engine
        .filter(|engine| !["mysql", "mariadb", "aurora", "aurora-mysql"].contains(&engine.as_str()))
    {
        return Err(format!("is for another kind of database: {engine}"));
    }
    let mut options = match base {
        Some(base) => base,
        None => {
            let (Some(host), Some(dbname)) = (&secret.host, &secret.dbname) else {
                return Err("names no host or no dbname: name them with \
                            --database-url mysql://HOST:PORT/DATABASE in addition to the secret"
                    .into());
            };
            let port = match &secret.port {
                None => 3306,
                Some(Port::Number(port)) => *port,
                Some(Port::Text(port)) => {
                    port.parse().map_err(|_| "has an invalid port".to_owned())?
                }
            };
            with_defaults(MySqlConnectOptions::new().host(host).port(port).database(dbname), false)
        }
    };
    options = options.username(&secret.username);
    Ok(match &secret.password {
        Some(password) => (options.password(password), true),
        None => (options, false),
    })
}

fn parse_url(url: &str) -> Result<MySqlConnectOptions, DatabaseError> {
    // The parser's error is dropped, because it may quote the URL with the password.
    let read =
        |url: &str| MySqlConnectOptions::from_str(url).ok().filter(|_| url.starts_with("mysql://"));
    if url_path(url).is_some_and(|path| path.contains(['@', '/'])) {
        return Err(DatabaseError::Settings(
            "the database URL has a / or an @ where the database's name should be: percent-encode \
             the password's special characters (/ as %2F, @ as %40, : as %3A, ? as %3F, # as %23, \
             % as %25)"
                .into(),
        ));
    }
    let options = read(url).ok_or_else(|| {
        DatabaseError::Settings(match url.split_once('?').and_then(|(before, _)| read(before)) {
            Some(_) => "the options after the ? of the database URL are invalid; ssl-mode is \
                        DISABLED, PREFERRED, REQUIRED, VERIFY_CA or VERIFY_IDENTITY"
                .into(),
            None => "the database URL is not of the form mysql://USER:PASSWORD@HOST:PORT/DATABASE \
                     (percent-encode special characters in the password: / as %2F, @ as %40, \
                     ? as %3F, # as %23)"
                .into(),
        })
    })?;
    if options.get_database().is_none_or(str::is_empty) {
        return Err(DatabaseError::Settings(
            "the database URL names no database: end it with /DATABASE".into(),
        ));
    }
    Ok(with_defaults(options, url.contains("statement-cache-capacity")))
}

fn with_defaults(options: MySqlConnectOptions, has_cache_capacity: bool) -> MySqlConnectOptions {
    // Projectors' SQL keeps the meaning of MySQL's default, where `||` is `or`.
    let options = options.disable_statement_logging().pipes_as_concat(false);
    if has_cache_capacity {
        options
    } else {
        options.statement_cache_capacity(STATEMENT_CACHE_CAPACITY)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_secret_is_a_url_or_rds_json() {
        let at = |options: MySqlConnectOptions| {
            (
                options.get_username().to_owned(),
                options.get_host().to_owned(),
                options.get_port(),
                options.get_database().map(str::to_owned),
            )
        };
        let app =
            |port| ("app".to_owned(), "db.example.com".to_owned(), port, Some("shop".to_owned()));
        for (text, base, port) in [
            ("mysql://app:p%40ss@db.example.com:3310/shop\n", None, 3310),
            (
                r#"{"engine":"mysql","host":"db.example.com","username":"app","password":"p@ss","dbname":"shop","port":3307}"#,
                None,
                3307,
            ),
            (
                r#"{"host":"db.example.com","username":"app","password":"p@ss","dbname":"shop","port":"3308"}"#,
                None,
                3308,
            ),
            (
                r#"{"host":"db.example.com","username":"app","password":"p@ss","dbname":"shop"}"#,
                None,
                3306,
            ),
            // A secret that RDS manages, together with a URL without a user.
            (
                r#"{"username":"app","password":"p@ss"}"#,
                Some("mysql://db.example.com:3309/shop"),
                3309,
            ),
        ] {
            let base = base.map(|url| parse_url(url).expect("a URL"));
            let (options, has_password) = parse_secret(text, base).expect(text);
            assert!(has_password, "{text}");
            assert_eq!(at(options), app(port), "{text}");
        }
    }

    #[test]
    fn an_invalid_secret_is_reported_and_never_quoted() {
        for (text, because) in [
            ("hunter2-0815", "neither a URL"),
            (r#"{"username":"app","password":["hunter2-0815"]}"#, "neither a URL"),
            (r#"{"username":"app","password":"hunter2-0815"}"#, "--database-url mysql://HOST"),
            (
                r#"{"engine":"postgres","host":"h","dbname":"d","username":"app","password":"hunter2-0815"}"#,
                "postgres",
            ),
            (
                r#"{"host":"h","dbname":"d","port":"hunter2","username":"app","password":"hunter2-0815"}"#,
                "port",
            ),
            ("mysql://app:hunter2-0815@db.example.com", "names no database"),
        ] {
            let reason = parse_secret(text, None).expect_err(text);
            assert!(reason.contains(because) && !reason.contains("hunter2"), "{text}: {reason}");
        }
    }

    #[test]
    fn a_raw_character_in_a_password_works_or_is_refused_without_showing_it() {
        for password in [
            "hunter2/0815",
            "1234/hunter2",
            "1234?hunter2",
            "1234#hunter2",
            "hunter2?0815",
            "a@hunter2/0815",
            "1234/",
            "/hunter2",
            "hunter2[0815/",
            "%zz/hunter2",
        ] {
            for place in ["db.example.com:3306/shop", "db.example.com/shop?ssl-mode=REQUIRED"] {
                let url = format!("mysql://app:{password}@{place}");
                let Err(DatabaseError::Settings(reason)) = parse_url(&url) else {
                    panic!("{url} is accepted")
                };
                for part in ["hunter2", "0815", "1234", "app"] {
                    assert!(!reason.contains(part), "{url}: {reason}");
                }
            }
        }
        // The last @ ends the password.
        for password in ["p@ss", "p@ss@", "@", "p%40ss", "p%2Fss", "p:ss"] {
            let options = parse_url(&format!("mysql://app:{password}@db.example.com:3306/shop"))
                .expect(password);
            let at = (
                options.get_username(),
                options.get_host(),
                options.get_port(),
                options.get_database(),
            );
            assert_eq!(at, ("app", "db.example.com", 3306, Some("shop")), "{password}");
        }
    }

    proptest! {
        #[test]
        fn no_url_panics_and_no_error_shows_a_password(noise in any::<String>(), rest in "[ -~]*") {
            for url in [
                format!("mysql://app:hunter2{noise}@{rest}"),
                format!("mysql://app:{noise}hunter2@db.example.com:3306/shop{rest}"),
                format!("mysql://{rest}{noise}"),
            ] {
                url_has_user_and_password(&url);
                if let Err(error) = parse_url(&url) {
                    prop_assert!(!error.to_string().contains("hunter2"), "{url}: {error}");
                }
            }
        }
    }

    #[test]
    fn user_and_password_are_detected_in_a_url() {
        for (url, parts) in [
            ("mysql://h/d", None),
            ("mysql://u@h/d", Some((true, false))),
            ("mysql://u:p@h/d", Some((true, true))),
            ("mysql://:p@h/d", Some((true, true))),
            ("mysql://u@h/d?x=a:b@c", Some((true, false))),
        ] {
            assert_eq!(url_has_user_and_password(url), parts, "{url}");
        }
    }
}
