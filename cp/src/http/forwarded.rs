//! Whom a request comes from, where a proxy stands before the control plane: pure.

use std::net::IpAddr;

/// The most proxies that a request may have come through.
const MAX_HOPS: usize = 16;

/// The client's address: the connection's own, unless that is a proxy's that is trusted. Then it is the last
/// one in `X-Forwarded-For` that is not such a proxy's: what stands before it the client may have written
/// itself.
pub fn client_address(peer: IpAddr, headers: &[(String, String)], trusted: &[IpAddr]) -> IpAddr {
    let is_trusted = |address: IpAddr| trusted.contains(&address.to_canonical());
    let mut client = peer;
    let fields =
        headers.iter().filter(|(name, _)| name == "x-forwarded-for").map(|(_, value)| value.as_str());
    let hops: Vec<&str> = fields.flat_map(|value| value.split(',')).map(str::trim).collect();
    for hop in hops.iter().rev().take(MAX_HOPS) {
        if !is_trusted(client) {
            break;
        }
        // A proxy that writes something else there is the best that is known.
        let Ok(address) = hop.parse::<IpAddr>() else { break };
        client = address.to_canonical();
    }
    client
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(peer: &str, values: &[&str], trusted: &[&str]) -> String {
        let headers: Vec<(String, String)> =
            values.iter().map(|v| ("x-forwarded-for".to_string(), (*v).to_string())).collect();
        let trusted: Vec<IpAddr> = trusted.iter().map(|t| t.parse().expect("an address")).collect();
        client_address(peer.parse().expect("an address"), &headers, &trusted).to_string()
    }

    #[test]
    fn only_a_trusted_proxy_says_who_the_client_is() {
        let proxies = ["10.0.0.1", "10.0.0.2"];
        assert_eq!(told("192.0.2.7", &["198.51.100.1"], &proxies), "192.0.2.7");
        assert_eq!(told("10.0.0.1", &["198.51.100.1"], &proxies), "198.51.100.1");
        assert_eq!(told("::ffff:10.0.0.1", &["2001:db8::1"], &proxies), "2001:db8::1");
        assert_eq!(told("10.0.0.1", &[], &proxies), "10.0.0.1");
    }

    #[test]
    fn other_headers_and_no_trust_change_nothing() {
        let headers = [
            ("forwarded".to_string(), "for=198.51.100.1".to_string()),
            ("x-real-ip".to_string(), "198.51.100.1".to_string()),
        ];
        let proxy: IpAddr = "10.0.0.1".parse().expect("an address");
        assert_eq!(client_address(proxy, &headers, &[proxy]), proxy);
        assert_eq!(told("10.0.0.1", &["198.51.100.1"], &[]), "10.0.0.1");
        assert_eq!(told("10.0.0.1", &["::ffff:198.51.100.1"], &["10.0.0.1"]), "198.51.100.1");
    }

    #[test]
    fn what_the_client_wrote_itself_does_not_count() {
        let proxies = ["10.0.0.1", "10.0.0.2"];
        assert_eq!(told("10.0.0.1", &["1.1.1.1, 198.51.100.1, 10.0.0.2"], &proxies), "198.51.100.1");
        assert_eq!(told("10.0.0.1", &["1.1.1.1", "198.51.100.1"], &proxies), "198.51.100.1");
        assert_eq!(told("10.0.0.1", &["1.1.1.1, nonsense"], &proxies), "10.0.0.1");
        assert_eq!(told("10.0.0.1", &["1.1.1.1, nonsense, 10.0.0.2"], &proxies), "10.0.0.2");
        let long = vec!["10.0.0.2"; 100].join(",");
        assert_eq!(told("10.0.0.1", &[&long], &proxies), "10.0.0.2");
    }
}
