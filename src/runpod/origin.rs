//! Where the API is: an origin, checked once, so that no key is ever sent in the clear over a network.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use reqwest::Url;

const EXPECTED: &str = "expected an https origin like `https://api.runpod.io`, or plain http to loopback; \
                        a trailing `/v2` is accepted";

/// The scheme, host and port of the API. `https`, or plain `http` to loopback only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiOrigin(Url);

/// Why a text is no [`ApiOrigin`]; whoever read it says where it stands. The text itself is shown only where it can't hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OriginError {
    #[error("the address of the API is no URL; {EXPECTED}")]
    NotAUrl { source: <Url as FromStr>::Err },
    #[error("the address of the API has the scheme `{scheme}`; {EXPECTED}")]
    Scheme { scheme: String },
    #[error("the address of the API would send the API key unencrypted to `{host}`; {EXPECTED}")]
    PlainHttp { host: String },
    #[error("the address of the API holds a user name or password; {EXPECTED}")]
    Credentials,
    #[error("the address of the API is more than an origin; {EXPECTED}")]
    NotAnOrigin,
}

impl FromStr for ApiOrigin {
    type Err = OriginError;

    fn from_str(text: &str) -> Result<Self, OriginError> {
        let mut url = Url::parse(text.trim()).map_err(|source| OriginError::NotAUrl { source })?;
        if !matches!(url.scheme(), "https" | "http") {
            return Err(OriginError::Scheme { scheme: url.scheme().to_owned() });
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(OriginError::Credentials);
        }
        if !matches!(url.path().trim_end_matches('/'), "" | "/v2") || url.query().is_some() || url.fragment().is_some()
        {
            return Err(OriginError::NotAnOrigin);
        }
        if url.scheme() == "http" && !is_loopback(&url) {
            return Err(OriginError::PlainHttp { host: url.host_str().unwrap_or_default().to_owned() });
        }
        url.set_path("/");
        Ok(Self(url))
    }
}

impl fmt::Display for ApiOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.origin().ascii_serialization())
    }
}

impl Default for ApiOrigin {
    /// RunPod's own API.
    fn default() -> Self {
        Self(Url::parse("https://api.runpod.io/").expect("a constant URL"))
    }
}

impl ApiOrigin {
    /// Plain http, and so to this very machine: no certificates are needed.
    pub fn is_plain(&self) -> bool {
        self.0.scheme() == "http"
    }

    /// This very machine, which no proxy leads to.
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.0)
    }

    /// The origin followed by an absolute path.
    pub(super) fn join(&self, path: &str) -> Url {
        let mut url = self.0.clone();
        url.set_path(path);
        url
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let literal = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || literal.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ApiOrigin, OriginError> {
        text.parse()
    }

    #[test]
    fn an_origin_is_accepted_with_and_without_its_tail() {
        for text in
            ["https://api.runpod.io", "https://api.runpod.io/", "https://api.runpod.io/v2", "https://api.runpod.io/v2/"]
        {
            assert_eq!(parse(text), Ok(ApiOrigin::default()), "{text}");
        }
        assert_eq!(parse(" https://example.net:8443/v2\n").unwrap().to_string(), "https://example.net:8443");
        assert_eq!(ApiOrigin::default().join("/v2/pods").as_str(), "https://api.runpod.io/v2/pods");
        assert!(!ApiOrigin::default().is_plain() && !ApiOrigin::default().is_loopback());
        assert!(parse("https://127.0.0.1:8443").unwrap().is_loopback());
    }

    #[test]
    fn plain_http_goes_to_loopback_only() {
        for text in ["http://127.0.0.1:8080", "http://127.8.9.1/v2", "http://[::1]:99/", "http://localhost:1"] {
            assert!(parse(text).unwrap().is_plain(), "{text}");
        }
        for text in ["http://api.runpod.io", "http://10.0.0.1", "http://localhost.example.net", "http://0.0.0.0:80"] {
            assert!(matches!(parse(text), Err(OriginError::PlainHttp { .. })), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        assert!(matches!(parse("api.runpod.io"), Err(OriginError::NotAUrl { .. })));
        assert!(matches!(parse(""), Err(OriginError::NotAUrl { .. })));
        assert!(matches!(parse("ftp://api.runpod.io"), Err(OriginError::Scheme { .. })));
        assert_eq!(parse("https://me:secret@api.runpod.io"), Err(OriginError::Credentials));
        for text in ["https://api.runpod.io/v1", "https://api.runpod.io/v2/pods", "https://api.runpod.io/?a=b"] {
            let error = parse(text).unwrap_err();
            assert_eq!(error, OriginError::NotAnOrigin, "{text}");
            assert!(error.to_string().contains("https://api.runpod.io"));
        }
    }
}
