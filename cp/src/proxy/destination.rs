//! From the Host header to a port of a capsule.

use crate::auth::id::Kind;

/// A port of a capsule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// The port.
    pub port: u16,
    /// `cl-…`
    pub capsule_id: String,
}

impl Destination {
    /// What `{port}-{capsule id}.{domain}[:port]` names; `None` for every other host, which is the API's.
    /// Names are compared without regard to case. Without `domain` every domain will do: the first label
    /// looks like no other host's.
    pub fn of(host: &str, domain: Option<&str>) -> Option<Destination> {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
            Some(_) => return None,
            None => host,
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let (label, rest) = name.split_once('.')?;
        if rest.is_empty() || domain.is_some_and(|domain| !domain.eq_ignore_ascii_case(rest)) {
            return None;
        }
        let (port, capsule_id) = label.split_once('-')?;
        let is_number = port.bytes().all(|b| b.is_ascii_digit()) && !port.starts_with('0');
        let port = port.parse().ok().filter(|_| is_number)?;
        Kind::Capsule.accepts(capsule_id).then(|| Destination { port, capsule_id: capsule_id.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "cl-0123456789abcdefghijklmno";

    #[test]
    fn a_host_names_a_port_of_a_capsule_or_the_api() {
        let found = |host: &str, domain| Destination::of(host, domain).map(|d| (d.port, d.capsule_id));
        let good = Some((8080, ID.to_string()));
        for tail in ["example.com", "example.com:8000", "EXAMPLE.com", "example.com."] {
            assert_eq!(found(&format!("8080-{ID}.{tail}"), Some("example.com")), good, "{tail}");
        }
        assert_eq!(found(&format!("8080-{ID}.127.0.0.1:8000"), None), good);
        assert_eq!(found(&format!("8080-{}.localhost", ID.to_uppercase()), None), good);
        for bad in [
            String::new(),
            "example.com".into(),
            "api.example.com".into(),
            "[::1]:8000".into(),
            format!("8080-{ID}"),
            format!("8080-{ID}."),
            format!("8080-{ID}.evil.com"),
            format!("8080-{ID}.x.example.com"),
            format!("0-{ID}.example.com"),
            format!("080-{ID}.example.com"),
            format!("+80-{ID}.example.com"),
            format!("65536-{ID}.example.com"),
            format!("-{ID}.example.com"),
            format!("8080-{ID}x.example.com"),
            format!("8080-{ID}.example.com:8o"),
            "8080-cl-.example.com".into(),
            "8080-usr-0123456789abcdefghijklmno.example.com".into(),
        ] {
            assert_eq!(found(&bad, Some("example.com")), None, "{bad}");
        }
    }
}
