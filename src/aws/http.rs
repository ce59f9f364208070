//! The HTTP client for alerts and for the Lambda Runtime API.
//!
//! Requests go through the AWS SDK's own connector, so the binary has one HTTP client and one TLS
//! stack. Redirects are not followed, and each request opens a connection.
//!
//! Why ours: the connector takes a request and returns a response, nothing else. Basic
//! authentication from the URL, the size limit and the error texts are added here.

use std::io;
use std::time::Duration;

use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::{TlsContext, TrustStore};
use aws_smithy_http_client::{Connector, ConnectorBuilder};
use aws_smithy_runtime_api::client::http::HttpConnector;
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_types::base64;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::byte_stream::ByteStream;
use tokio::time::timeout;

use super::{TLS, format_error_chain};

/// Why a request got no response. No text names the URL, which may hold a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HttpError {
    #[error("no answer in time")]
    Timeout,
    #[error("host not found")]
    HostNotFound,
    #[error("{0}")]
    Io(io::ErrorKind),
    /// Any other error, with its causes.
    #[error("{0}")]
    Other(String),
}

/// A response and its whole body.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) body: String,
    headers: aws_smithy_runtime_api::http::Headers,
}

impl Response {
    /// The first value of the header `name`.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)
    }
}

/// An HTTP client. It is used within a Tokio runtime.
#[derive(Debug)]
pub(crate) struct HttpClient {
    connector: Connector,
}

impl HttpClient {
    /// A client that trusts the system's root certificates and uses the proxies that the
    /// environment names.
    pub(crate) fn new() -> Self {
        let connector =
            Connector::builder().proxy_config(ProxyConfig::from_env()).tls_provider(TLS);
        HttpClient { connector: without_pool(connector).build() }
    }

    /// A client for plain HTTP on this host: it trusts no certificate and uses no proxy.
    pub(crate) fn local() -> Self {
        // The trust store stays empty, because reading the system's certificates takes time.
        let tls = TlsContext::builder().with_trust_store(TrustStore::empty()).build();
        let tls = tls.expect("an empty trust store is valid");
        let connector =
            Connector::builder().proxy_config(ProxyConfig::disabled()).tls_provider(TLS);
        HttpClient { connector: without_pool(connector.tls_context(tls)).build() }
    }

    /// Waits for the response without a time limit. A body of more than `max_bytes` is an error.
    pub(crate) async fn get(&self, url: &str, max_bytes: usize) -> Result<Response, HttpError> {
        let response = self.send(request("GET", url, SdkBody::empty())?).await?;
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let mut stream = ByteStream::new(response.into_body());
        let mut body = Vec::new();
        while let Some(chunk) =
            stream.try_next().await.map_err(|error| HttpError::Other(format_error_chain(&error)))?
        {
            if body.len() + chunk.len() > max_bytes {
                return Err(HttpError::Other(format!("the body has more than {max_bytes} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        let body = String::from_utf8(body)
            .map_err(|_| HttpError::Other("the body is not UTF-8".into()))?;
        Ok(Response { status, body, headers })
    }

    /// Posts JSON and returns the status code of the response, within `time_limit`.
    pub(crate) async fn post_json(
        &self,
        url: &str,
        headers: &[(&'static str, &str)],
        body: String,
        time_limit: Duration,
    ) -> Result<u16, HttpError> {
        let mut request = request("POST", url, SdkBody::from(body))?;
        request.headers_mut().insert("content-type", "application/json");
        for (name, value) in headers {
            let inserted = request.headers_mut().try_insert(*name, (*value).to_owned());
            inserted.map_err(|error| HttpError::Other(format_error_chain(&error)))?;
        }
        let response =
            timeout(time_limit, self.send(request)).await.map_err(|_| HttpError::Timeout)??;
        Ok(response.status().as_u16())
    }

    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        self.connector.call(request).await.map_err(|error| classify(&error))
    }
}

/// Makes each request open a connection. A pooled one may be dead after Lambda has frozen the
/// process.
fn without_pool<Tls>(connector: ConnectorBuilder<Tls>) -> ConnectorBuilder<Tls> {
    connector.pool_max_idle_per_host(0)
}

fn request(method: &str, url: &str, body: SdkBody) -> Result<HttpRequest, HttpError> {
    let invalid = |_| HttpError::Other("the URL is invalid".into());
    let (url, credentials) = split_credentials(url);
    let mut request = HttpRequest::new(body);
    request.set_method(method).map_err(|error| HttpError::Other(format_error_chain(&error)))?;
    request.set_uri(url.as_str()).map_err(invalid)?;
    if let Some(credentials) = credentials {
        request
            .headers_mut()
            .insert("authorization", format!("Basic {}", base64::encode(credentials)));
    }
    Ok(request)
}

/// Splits `scheme://user:password@host/path` into the URL without credentials, and the
/// credentials.
fn split_credentials(url: &str) -> (String, Option<String>) {
    let Some((scheme, rest)) = url.split_once("://") else { return (url.to_owned(), None) };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let Some((credentials, _)) = authority.rsplit_once('@') else { return (url.to_owned(), None) };
    let credentials_and_colon =
        if credentials.contains(':') { credentials.to_owned() } else { format!("{credentials}:") };
    (format!("{scheme}://{}", &rest[credentials.len() + 1..]), Some(credentials_and_colon))
}

fn classify(error: &ConnectorError) -> HttpError {
    if error.is_timeout() {
        return HttpError::Timeout;
    }
    let chain =
        || std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    // The connector's type for this error is private; a test checks the text.
    if chain().any(|error| error.to_string() == "dns error") {
        return HttpError::HostNotFound;
    }
    match chain().find_map(|error| error.downcast_ref::<io::Error>()) {
        Some(error) => HttpError::Io(error.kind()),
        None => HttpError::Other(format_error_chain(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME_LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn an_unknown_host_a_refused_connection_and_a_silent_server_are_told_apart() {
        let post = async |client: HttpClient, url: &str, time_limit| {
            client.post_json(url, &[], "{}".into(), time_limit).await.expect_err("no response")
        };
        assert_eq!(
            post(HttpClient::local(), "http://host.invalid/", TIME_LIMIT).await,
            HttpError::HostNotFound
        );
        let refused = HttpError::Io(io::ErrorKind::ConnectionRefused);
        assert_eq!(post(HttpClient::local(), "http://127.0.0.1:1/", TIME_LIMIT).await, refused);
        assert_eq!(post(HttpClient::new(), "https://127.0.0.1:1/", TIME_LIMIT).await, refused);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let silent = format!("http://{}/", listener.local_addr().expect("it is bound"));
        assert_eq!(
            post(HttpClient::local(), &silent, Duration::from_millis(100)).await,
            HttpError::Timeout
        );
        let invalid = post(HttpClient::local(), "http://a b/secret", TIME_LIMIT).await;
        assert!(!invalid.to_string().contains("secret"), "{invalid}");
    }

    #[test]
    fn credentials_move_from_the_url_into_the_authorization_header() {
        for (url, authorization, uri) in [
            (
                "https://ann:secret@host/path?x=@",
                Some("Basic YW5uOnNlY3JldA=="),
                "https://host/path?x=@",
            ),
            ("https://ann@host:1/", Some("Basic YW5uOg=="), "https://host:1/"),
            ("https://host/@x", None, "https://host/@x"),
        ] {
            let request = request("POST", url, SdkBody::empty()).expect("a valid URL");
            assert_eq!(
                (request.headers().get("authorization"), request.uri()),
                (authorization, uri)
            );
        }
    }
}
