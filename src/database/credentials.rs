//! The way in: where the server is, as whom, and by what password, which may be another one
//! tomorrow.

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
use crate::model::error::{Error, server_error_number};

/// Prepared statements that a connection keeps, unless the URL says otherwise. One more closes
/// another, and with sqlx 0.9.0, which leaves Nagle's algorithm on (transact-rs/sqlx#4335), the
/// statement after that waits for 40 ms. A server allows 16,382 in all, by default.
const STATEMENT_CACHE_CAPACITY: usize = 256;

/// While tokens cannot be made, the next attempt comes after this: the old one may be good still.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Where the password comes from.
#[derive(Debug)]
pub(crate) enum CredentialSource {
    /// The URL.
    Url,
    /// Secrets Manager: the whole URL, or RDS's JSON.
    Secret(Secret),
    /// IAM, for a while each. A secret may say where the database is, and as whom.
    Iam(AuthTokenGenerator, Option<Secret>),
}

/// How to get in. New connections of a pool take what this gave it last.
pub(crate) struct Credentials {
    /// What the URL says, where there is one.
    base: Option<MySqlConnectOptions>,
    ca: Option<PathBuf>,
    source: CredentialSource,
    /// When the password was last read or made, and how long it is good.
    password_age: Mutex<PasswordAge>,
}

#[derive(Clone, Copy)]
struct PasswordAge {
    read_at: SystemTime,
    /// `None`: until the server refuses it.
    renew_at: Option<SystemTime>,
}

/// What RDS keeps in a secret. Those that it manages by itself have the first two only.
#[derive(Deserialize)]
struct RdsSecret {
    username: String,
    /// With IAM, there need be none.
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
    /// Without the options: they print the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Credentials {
    /// # Errors
    /// [`Error::Input`] where the URL is not one, or what is asked for together cannot be had
    /// together.
    pub(crate) fn new(
        url: Option<&str>,
        source: CredentialSource,
        ca: Option<PathBuf>,
    ) -> Result<Self, Error> {
        let base = url.map(parse_url).transpose()?;
        let names = |url: &str| {
            url_has_user_and_password(url).is_some_and(|(user, password)| user || password)
        };
        match (&source, url) {
            (CredentialSource::Url | CredentialSource::Iam(_, None), None) => {
                return Err(Error::Input(
                    "no database is named: give --database-url or set DATABASE_URL, or give --database-secret".into(),
                ));
            }
            (CredentialSource::Secret(_) | CredentialSource::Iam(_, Some(_)), Some(url))
                if names(url) =>
            {
                return Err(Error::Input(
                    "the database URL and the secret both name a user: leave one of them out, or user and password out of \
                     the URL (mysql://HOST:PORT/DATABASE)"
                        .into(),
                ));
            }
            (CredentialSource::Iam(_, None), Some(url)) if !names(url) => {
                return Err(Error::Input(
                    "the database URL names no user, and IAM authentication needs one: mysql://USER@HOST:PORT/DATABASE"
                        .into(),
                ));
            }
            (CredentialSource::Iam(..), Some(url))
                if url_has_user_and_password(url).is_some_and(|(_, password)| password) =>
            {
                return Err(Error::Input(
                    "the database URL has a password, and with IAM authentication there is none: leave it out".into(),
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

    /// Reads or makes the password, and says what to connect with.
    ///
    /// # Errors
    /// [`Error::Unreachable`] where AWS does not give it, [`Error::Input`] where the secret is not
    /// one of a database.
    pub(crate) async fn options(&self) -> Result<MySqlConnectOptions, Error> {
        let mut password_age = self.password_age.lock().await;
        let (options, renew_at) = self.fetch().await?;
        *password_age = PasswordAge { read_at: SystemTime::now(), renew_at };
        Ok(options)
    }

    /// Gives the pool a new password if the one that it has will not do for long. Where there is
    /// none to be had the pool keeps what it has, so that nothing stops while that is good still.
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
                warn!(%error, "no new password for the database, going on with the last one");
                password_age.renew_at = Some(now + RETRY_INTERVAL);
            }
        }
    }

    /// After the server refused the password: looks for another, unless somebody has since `began`.
    /// Whether there may be one.
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
                info!("the database refused the password, and it was read again");
                true
            }
            Err(error) => {
                warn!(%error, "the database refused the password, and there is no new one");
                false
            }
        }
    }

    /// Boxed: it is rare, large, and in the future of every statement.
    fn fetch(&self) -> BoxFuture<'_, Result<(MySqlConnectOptions, Option<SystemTime>), Error>> {
        Box::pin(self.fetch_options())
    }

    async fn fetch_options(&self) -> Result<(MySqlConnectOptions, Option<SystemTime>), Error> {
        let missing = || Error::Input("no database is named".into());
        match &self.source {
            CredentialSource::Url => {
                Ok((self.with_ca(self.base.clone().ok_or_else(missing)?), None))
            }
            CredentialSource::Secret(secret) => {
                let (options, has_password) = self.options_from_secret(secret).await?;
                match has_password {
                    true => Ok((options, None)),
                    false => Err(Error::Input(format!("the secret {} has no password", secret.id))),
                }
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
                let token = token.map_err(Error::Unreachable)?;
                Ok((options.password(&token.text), Some(token.renew_at)))
            }
        }
    }

    /// What a secret says, and whether there is a password in it.
    async fn options_from_secret(
        &self,
        secret: &Secret,
    ) -> Result<(MySqlConnectOptions, bool), Error> {
        let text = secret.read().await.map_err(Error::Unreachable)?;
        let read = parse_secret(&text, self.base.clone());
        let (options, has_password) =
            read.map_err(|reason| Error::Input(format!("the secret {} {reason}", secret.id)))?;
        Ok((self.with_ca(options), has_password))
    }

    /// What to do where the server does not let us in.
    pub(super) fn advice(&self) -> &'static str {
        match self.source {
            CredentialSource::Url => "check the user and the password in the database URL",
            CredentialSource::Secret(_) => "check the user and the password in the secret",
            CredentialSource::Iam(..) => {
                "check that the user was created for IAM (identified with AWSAuthenticationPlugin as 'RDS'), that \
                 rds-db:connect is allowed for it, that the URL has the server's own name, and AWS_REGION"
            }
        }
    }

    /// With a file of certificates the server's is checked, and its name unless the URL asks for
    /// the certificate alone.
    fn with_ca(&self, options: MySqlConnectOptions) -> MySqlConnectOptions {
        match &self.ca {
            None => options,
            Some(ca) if matches!(options.get_ssl_mode(), MySqlSslMode::VerifyCa) => {
                options.ssl_ca(ca)
            }
            Some(ca) => options.ssl_mode(MySqlSslMode::VerifyIdentity).ssl_ca(ca),
        }
    }

    /// A token is sent as it is: whoever reads it may be us for a quarter of an hour.
    fn check_tls(options: &MySqlConnectOptions) -> Result<(), Error> {
        match verifies_certificate(options) {
            true => Ok(()),
            false => Err(Error::Input(
                "IAM authentication sends the token in clear text, and so only to a server whose certificate was checked: \
                 give --database-ca FILE (the bundle of RDS), or ?ssl-mode=VERIFY_IDENTITY in the database URL"
                    .into(),
            )),
        }
    }
}

/// Whether the server must prove itself.
pub(super) fn verifies_certificate(options: &MySqlConnectOptions) -> bool {
    matches!(options.get_ssl_mode(), MySqlSslMode::VerifyCa | MySqlSslMode::VerifyIdentity)
}

/// Whether the server refused user or password.
pub(super) fn is_authentication_error(error: &sqlx::Error) -> bool {
    matches!(server_error_number(error), Some(1045 | 1698))
}

/// Whether a URL has a user, and a password.
fn url_has_user_and_password(url: &str) -> Option<(bool, bool)> {
    let authority = url.strip_prefix("mysql://")?.split(['/', '?', '#']).next()?;
    let (credentials, _) = authority.rsplit_once('@')?;
    Some((!credentials.is_empty(), credentials.contains(':')))
}

/// What follows the host, without the options. With a raw `/` in the password, that is a part of
/// the password.
fn url_path(url: &str) -> Option<&str> {
    let (_, path) = url.strip_prefix("mysql://")?.split_once('/')?;
    path.split(['?', '#']).next()
}

/// What a secret says, in the place that the URL names if there is one, and whether there is a
/// password in it. An error never quotes the text.
fn parse_secret(
    text: &str,
    base: Option<MySqlConnectOptions>,
) -> Result<(MySqlConnectOptions, bool), String> {
    let text = text.trim();
    if text.starts_with("mysql://") {
        return match base {
            None => {
                // A user without one is let in, or not, as anywhere else.
                parse_url(text)
                    .map(|options| (options, true))
                    .map_err(|error| format!("is a URL, but {error}"))
            }
            Some(_) => Err("is a whole URL: leave --database-url (DATABASE_URL) out".into()),
        };
    }
    let secret: RdsSecret = serde_json::from_str(text).map_err(|_| {
        "is neither a URL (mysql://USER:PASSWORD@HOST:PORT/DATABASE) nor JSON with username and password, as RDS writes it"
            .to_owned()
    })?;
    if let Some(engine) = secret
        .engine
        .filter(|engine| !["mysql", "mariadb", "aurora", "aurora-mysql"].contains(&engine.as_str()))
    {
        return Err(format!("is of a database of another kind: {engine}"));
    }
    let mut options = match base {
        Some(base) => base,
        None => {
            let (Some(host), Some(dbname)) = (&secret.host, &secret.dbname) else {
                return Err("names no host or no dbname: say where the database is by \
                            --database-url mysql://HOST:PORT/DATABASE beside the secret"
                    .into());
            };
            let port = match &secret.port {
                None => 3306,
                Some(Port::Number(port)) => *port,
                Some(Port::Text(port)) => {
                    port.parse().map_err(|_| "has a port that is none".to_owned())?
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

fn parse_url(url: &str) -> Result<MySqlConnectOptions, Error> {
    // The parser's own error may quote the URL, and with it the password: it is not passed on.
    let read =
        |url: &str| MySqlConnectOptions::from_str(url).ok().filter(|_| url.starts_with("mysql://"));
    if url_path(url).is_some_and(|path| path.contains(['@', '/'])) {
        return Err(Error::Input(
            "the database URL has a / or an @ where the database's name should be: percent-encode the \
             password's special characters (/ as %2F, @ as %40, : as %3A, ? as %3F, # as %23, % as %25)"
                .into(),
        ));
    }
    let options = read(url).ok_or_else(|| {
        Error::Input(match url.split_once('?').and_then(|(before, _)| read(before)) {
            Some(_) => "the options after the ? of the database URL cannot be read; ssl-mode is DISABLED, PREFERRED, \
                        REQUIRED, VERIFY_CA or VERIFY_IDENTITY"
                .into(),
            None => "the database URL is not of the form mysql://USER:PASSWORD@HOST:PORT/DATABASE \
                     (percent-encode special characters in the password: / as %2F, @ as %40, ? as %3F, # as %23)"
                .into(),
        })
    })?;
    if options.get_database().is_none_or(str::is_empty) {
        return Err(Error::Input(
            "the database URL names no database: end it with /DATABASE".into(),
        ));
    }
    Ok(with_defaults(options, url.contains("statement-cache-capacity")))
}

fn with_defaults(options: MySqlConnectOptions, has_cache_capacity: bool) -> MySqlConnectOptions {
    // A projector's SQL means what it means everywhere else on MySQL: `||` is or.
    let options = options.disable_statement_logging().pipes_as_concat(false);
    match has_cache_capacity {
        true => options,
        false => options.statement_cache_capacity(STATEMENT_CACHE_CAPACITY),
    }
}

#[cfg(test)]
mod tests {
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
            // As RDS manages it, beside a URL without a user.
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
                let Err(Error::Input(reason)) = parse_url(&url) else {
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
