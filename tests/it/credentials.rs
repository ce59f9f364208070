//! Authentication at the database: TLS with a CA bundle, rotated secrets and IAM tokens. Also the
//! AWS credentials of a container.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use projectionist::Database;

use crate::support::{
    AuthMode, Folder, Gateway, RunningProcess, TIMEOUT, World, certificate, eventually, execute,
    kill, server_url, sessions, setting,
};

const COUNTER: &str = "name = 'counter'\nversion = 1\nmode = 'from_beginning'\n\
    setup = ['create table if not exists counter (n bigint)']\n\n\
    [[on]]\nevents = ['*']\nsql = 'insert into counter (n) values (:position)'\n";

/// Starts a command without DATABASE_URL, with other variables set.
fn start(world: &World, arguments: &[&str], set: &[(&str, &str)]) -> RunningProcess {
    let mut command = world.command(arguments);
    command.env_remove("DATABASE_URL").envs(set.iter().copied());
    RunningProcess::spawn(command)
}

#[tokio::test]
async fn a_ca_bundle_verifies_the_server_and_its_name() {
    let world = World::new().await;
    let gateway = Gateway::new(&world, AuthMode::Passwords).await;
    let (bundle, other) = (certificate("bundle.pem"), certificate("other.pem"));
    let status = async |host: &str, options: &str, ca: &[&str], code: i32| {
        let url = format!("{}{options}", gateway.url(&world, "root", host));
        world.run(&[&["status", "--database-url", &url], ca].concat()).await.exits(code)
    };
    status("localhost", &format!("?ssl-mode=VERIFY_IDENTITY&ssl-ca={bundle}"), &[], 0).await;
    status("localhost", "", &["--database-ca", &bundle], 0).await;
    // Another root certificate, none, or another host name.
    status("localhost", &format!("?ssl-mode=VERIFY_IDENTITY&ssl-ca={other}"), &[], 3).await;
    status("localhost", "", &["--database-ca", &other], 3).await;
    status("localhost", "?ssl-mode=VERIFY_IDENTITY", &[], 3).await;
    status("127.0.0.1", "", &["--database-ca", &bundle], 3).await;
    // The URL may require only the certificate's verification.
    status("127.0.0.1", "?ssl-mode=VERIFY_CA", &["--database-ca", &bundle], 0).await;
    status("localhost", "", &["--database-ca", "/no/such/file"], 2)
        .await
        .prints(&["/no/such/file"]);
}

#[tokio::test]
async fn a_raw_at_sign_in_a_password_works() {
    let world = World::new().await;
    let user = format!("u{:x}", fastrand::u64(..));
    for sql in [
        format!("create user '{user}'@'%' identified by 'p@ss:w@rd'"),
        format!("grant all on {}.* to '{user}'@'%'", world.database_name),
    ] {
        world.execute(&sql).await;
    }
    for password in ["p@ss:w@rd", "p%40ss:w%40rd"] {
        let url = world.database_url.replace("://root@", &format!("://{user}:{password}@"));
        world.run(&["status", "--database-url", &url]).await.exits(0);
    }
    world.execute(&format!("drop user '{user}'@'%'")).await;
}

#[tokio::test]
async fn too_few_connections_are_refused_with_the_minimum() {
    let world = World::new().await;
    for connections in [0, 1] {
        let refused = Database::connect(&world.database_url, connections, TIMEOUT).await;
        let reason = refused.expect_err("too few connections are rejected").to_string();
        assert!(
            reason.contains(&format!("{connections} connections are too few: at least 2")),
            "{reason}"
        );
    }
    Database::connect(&world.database_url, 2, TIMEOUT).await.expect("two connections are enough");
}

/// Creates or changes the world's secret. Returns its ARN.
async fn create_secret(world: &World, text: &str) -> String {
    let secrets = secrets().await;
    let name = format!("projectionist/{}", world.database_name);
    match secrets.create_secret().name(&name).secret_string(text).send().await {
        Ok(made) => made.arn.expect("a secret has an ARN"),
        Err(_) => {
            let put = secrets.put_secret_value().secret_id(&name).secret_string(text).send().await;
            put.expect("the secret is changed").arn.expect("a secret has an ARN")
        }
    }
}

async fn secrets() -> aws_sdk_secretsmanager::Client {
    let config = aws_config::defaults(aws_config::BehaviorVersion::latest())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .region("us-east-1")
        .endpoint_url(
            setting("AWS_ENDPOINT_URL").expect("AWS_ENDPOINT_URL is set: run localstack/test"),
        )
        .test_credentials()
        .load()
        .await;
    aws_sdk_secretsmanager::Client::new(&config)
}

/// Creates a user with all privileges on the world's database.
async fn user(world: &World, password: &str) -> String {
    let user = format!("u{:x}", fastrand::u64(..));
    world.execute(&format!("create user '{user}'@'%' identified by '{password}'")).await;
    world.execute(&format!("grant all on {}.* to '{user}'@'%'", world.database_name)).await;
    user
}

fn rds_secret(world: &World, user: &str, password: &str) -> String {
    let server = server_url().replace("mysql://root@", "");
    let (host, port) = server.split_once(':').expect("the server has a port");
    let database = &world.database_name;
    serde_json::json!({
        "engine": "mysql", "host": host, "port": port.parse::<u16>().expect("a port number"),
        "dbname": database, "username": user, "password": password,
    })
    .to_string()
}

#[tokio::test]
async fn the_database_is_found_through_its_secret() {
    let world = World::new().await;
    let user = user(&world, "s3cr3t-one").await;
    for text in [world.database_url.clone(), rds_secret(&world, &user, "s3cr3t-one")] {
        let arn = create_secret(&world, &text).await;
        start(&world, &["status", "--database-secret", &arn], &[]).finish().await.exits(0);
    }
    // The secrets that RDS manages contain no host; it comes from the URL.
    let arn =
        create_secret(&world, &format!(r#"{{"username":"{user}","password":"s3cr3t-one"}}"#)).await;
    let place = world.database_url.replace("root@", "");
    start(
        &world,
        &["status", "--database-url", &place],
        &[("PROJECTIONIST_DATABASE_SECRET", &arn)],
    )
    .finish()
    .await
    .exits(0);

    let no_place =
        start(&world, &["status", "--database-secret", &arn], &[]).finish().await.exits(2);
    no_place.prints(&["names no host", "--database-url mysql://HOST"]);
    let both = world.run(&["status", "--database-secret", &arn]).await.exits(2);
    both.prints(&["both name a user", "leave one of them out"]);
    create_secret(&world, "s3cr3t-nonsense").await;
    let nonsense =
        start(&world, &["status", "--database-secret", &arn], &[]).finish().await.exits(2);
    assert!(!nonsense.stderr.contains("s3cr3t"), "{}", nonsense.stderr);
    let missing =
        start(&world, &["status", "--database-secret", "no/such"], &[]).finish().await.exits(3);
    missing.prints(&["no/such", "does not exist"]);
    create_secret(&world, &rds_secret(&world, &user, "wrong")).await;
    start(&world, &["status", "--database-secret", &arn], &[])
        .finish()
        .await
        .exits(3)
        .prints(&["password in the secret"]);
    world.execute(&format!("drop user '{user}'@'%'")).await;
}

#[tokio::test]
async fn a_password_rotated_while_a_worker_plays_is_reread_and_breaks_no_projector() {
    let world = World::new().await;
    let user = user(&world, "first").await;
    let arn = create_secret(&world, &rds_secret(&world, &user, "first")).await;
    let folder = Folder::new().with("1.toml", COUNTER);
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let play = [
        "play",
        "--receive-wait=1",
        "--reconcile-after=1",
        "--projectors",
        folder.path(),
        "--database-secret",
        &arn,
    ];
    let play = start(&world, &play, &[]);
    world.append(10).await;
    eventually("the worker plays", async || world.position("counter").await == 10).await;

    // A rotation changes the password in the database first, then the secret.
    let mut admin = world.connection().await;
    execute(&mut admin, &format!("alter user '{user}'@'%' identified by 'second'")).await;
    let theirs = sessions(&mut admin).await.into_iter().filter(|session| session.user == user);
    assert!(kill(&mut admin, theirs).await > 0);
    world.append(10).await;
    play.wait_for_log("database authentication failed").await;
    create_secret(&world, &rds_secret(&world, &user, "second")).await;
    eventually("the worker continues", async || world.position("counter").await == 20).await;
    let played = play.terminate().await.exits(0);
    assert!(played.stderr.contains("it was read again"), "{}", played.stderr);
    assert_eq!(
        (world.status("counter").await, world.number("select count(*) from counter").await),
        ("live".into(), 20)
    );
    world.execute(&format!("drop user '{user}'@'%'")).await;
}

/// A stub of the ECS agent. Each request gets new credentials that expire after two seconds.
/// Returns its URL and the number of requests.
async fn container_agent() -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let url =
        format!("http://{}/credentials", listener.local_addr().expect("the listener is bound"));
    let asked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut request = vec![0; 8192];
            let read = client.read(&mut request).await.unwrap_or(0);
            let is_known = String::from_utf8_lossy(&request[..read])
                .to_lowercase()
                .contains("authorization: let-me-in");
            let number = count.fetch_add(1, Ordering::SeqCst) + 1;
            let expires = OffsetDateTime::now_utc() + Duration::from_secs(2);
            let expires = expires.format(&Rfc3339).expect("the time is valid");
            let body = serde_json::json!({
                "RoleArn": "arn:aws:iam::000000000000:role/task", "AccessKeyId": "test",
                "SecretAccessKey": "test", "Token": format!("session-{number}"),
                "Expiration": expires,
            })
            .to_string();
            let status = if is_known { "200 OK" } else { "403 Forbidden" };
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\n\
                 content-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
            let _ = client.write_all(answer.as_bytes()).await;
        }
    });
    (url, asked)
}

/// Starts a command that has only a container's credentials.
fn start_in_container(world: &World, arguments: &[&str], agent: &str) -> RunningProcess {
    let mut command = world.command(arguments);
    command
        .env_remove("AWS_ACCESS_KEY_ID")
        .env_remove("AWS_SECRET_ACCESS_KEY")
        .env("AWS_EC2_METADATA_DISABLED", "true");
    command
        .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", agent)
        .env("AWS_CONTAINER_AUTHORIZATION_TOKEN", "let-me-in");
    command.env("HOME", "/nonexistent");
    RunningProcess::spawn(command)
}

#[tokio::test]
async fn container_credentials_give_access_to_the_queue() {
    let world = World::new().await;
    let (agent, asked) = container_agent().await;
    world.append(5).await;
    let relayed = start_in_container(&world, &["relay", "--once"], &agent).finish().await.exits(0);
    assert_eq!(relayed.stdout, "published 5 events, up to position 5\n");
    assert!(asked.load(Ordering::SeqCst) > 0);
    // Without credentials, the error names them.
    start_in_container(&world, &["relay", "--once"], "http://127.0.0.1:1/")
        .finish()
        .await
        .exits(3)
        .prints(&["credentials"]);
}

#[tokio::test]
async fn a_worker_authenticates_with_tokens_and_renews_an_old_one_per_connection() {
    let world = World::new().await;
    let gateway = Gateway::new(&world, AuthMode::Tokens).await;
    let (agent, _) = container_agent().await;
    let folder = Folder::new().with("1.toml", COUNTER);
    let (url, bundle) = (gateway.url(&world, "app", "localhost"), certificate("bundle.pem"));
    let by_iam = [
        "--database-auth=iam",
        "--database-ca",
        &bundle,
        "--database-url",
        &url,
        "--projectors",
        folder.path(),
    ];
    start_in_container(&world, &[&["boot"][..], &by_iam].concat(), &agent).finish().await.exits(0);

    let play = [&["play", "--receive-wait=1", "--reconcile-after=1"][..], &by_iam].concat();
    let play = start_in_container(&world, &play, &agent);
    world.append(10).await;
    eventually("the worker plays", async || world.position("counter").await == 10).await;
    let before = gateway.tokens();
    for token in &before {
        let start = format!("localhost:{}/?Action=connect&DBUser=app&", gateway.port());
        assert!(token.starts_with(&start), "{token}");
        for part in [
            "X-Amz-Expires=900",
            "%2Fus-east-1%2Frds-db%2Faws4_request",
            "X-Amz-Security-Token=session-",
            "X-Amz-Signature=",
        ] {
            assert!(token.contains(part), "{part} in {token}");
        }
    }

    // All connections are refused for a while. No projector breaks.
    gateway.close(true);
    play.wait_for_log("database authentication failed").await;
    gateway.close(false);
    world.append(10).await;
    eventually("the worker continues", async || world.position("counter").await == 20).await;
    assert!(gateway.tokens().iter().any(|token| !before.contains(token)), "no new token was used");
    let played = play.terminate().await.exits(0);
    assert!(!played.stderr.contains("X-Amz-Signature"), "a token is in the log");
    assert_eq!(
        (world.status("counter").await, world.number("select count(*) from counter").await),
        ("live".into(), 20)
    );

    // A secret may also give the host and the user.
    let text = format!(
        r#"{{"host":"localhost","port":{},"dbname":"{}","username":"app"}}"#,
        gateway.port(),
        world.database_name
    );
    let arn = create_secret(&world, &text).await;
    let status =
        ["status", "--database-auth=iam", "--database-ca", &bundle, "--database-secret", &arn];
    start(&world, &status, &[]).finish().await.exits(0);
    start(&world, &["status", "--database-secret", &arn], &[])
        .finish()
        .await
        .exits(2)
        .prints(&["has no password"]);
}

#[tokio::test]
async fn a_token_is_never_sent_to_an_unverified_server() {
    let world = World::new().await;
    let gateway = Gateway::new(&world, AuthMode::Tokens).await;
    let url = gateway.url(&world, "app", "localhost");
    let other = certificate("other.pem");
    let status = async |options: &[&str], code: i32| {
        world.run(&[&["status", "--database-auth=iam"], options].concat()).await.exits(code)
    };
    status(&["--database-url", &url], 2).await.prints(&["in clear text", "--database-ca"]);
    status(&["--database-url", &format!("{url}?ssl-mode=REQUIRED")], 2)
        .await
        .prints(&["in clear text"]);
    status(&["--database-url", &url, "--database-ca", &other], 3).await;
    status(&["--database-url", &url.replace("app@", "app:x@"), "--database-ca", &other], 2)
        .await
        .prints(&["has a password"]);
    status(&["--database-url", &url.replace("app@", ""), "--database-ca", &other], 2)
        .await
        .prints(&["names no user"]);
    status(&["--database-url", &url, "--database-secret", "x"], 2)
        .await
        .prints(&["both name a user"]);
    assert_eq!(gateway.tokens(), Vec::<String>::new());
}
