//! HTTP to servers on loopback.

/// What `main` does before anything speaks TLS, and what each client of reqwest asks for when it is built.
pub fn install_crypto() {
    // Fails only if another test was first, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A client that needs no certificates of the system and goes through no proxy.
pub fn client() -> reqwest::ClientBuilder {
    install_crypto();
    reqwest::Client::builder().tls_certs_only([]).no_proxy().user_agent("autopod-test")
}
