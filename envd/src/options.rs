//! The command line of envd itself.

use alloc::format;
use alloc::string::{String, ToString};
use core::net::{Ipv4Addr, SocketAddrV4};

/// Where envd listens in a guest.
pub const LISTEN: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 49983);

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Options {
    /// Be the guest's init.
    Init,
    /// Serve in a process that is started again whenever it ends.
    Guard,
    /// Tell the version.
    Version,
    /// Serve.
    Serve {
        /// Where to listen.
        listen: SocketAddrV4,
        /// A file with the verifier, instead of the metadata service.
        verifier_file: Option<String>,
    },
}

/// How to call it.
pub const USAGE: &str = "usage: envd [--listen IP:PORT] [--verifier-file PATH]\n       envd init\n       envd guard\n       envd --version\n";

/// Reads the arguments after the program's name.
pub fn parse<'a>(mut arguments: impl Iterator<Item = &'a str>) -> Result<Options, String> {
    let mut listen = LISTEN;
    let mut verifier_file = None;
    let mut first = true;
    while let Some(argument) = arguments.next() {
        match argument {
            "init" if first => return Ok(Options::Init),
            "guard" if first => return Ok(Options::Guard),
            "--version" if first => return Ok(Options::Version),
            "--listen" => {
                let value = arguments.next().unwrap_or_default();
                listen = value.parse().map_err(|_| {
                    format!("--listen takes an IPv4 address and port such as 127.0.0.1:49983, not {value:?}")
                })?;
            }
            "--verifier-file" => {
                let value = arguments.next().ok_or("--verifier-file takes a path")?;
                verifier_file = Some(value.to_string());
            }
            other => return Err(format!("unknown argument {other:?}\n{USAGE}")),
        }
        first = false;
    }
    Ok(Options::Serve { listen, verifier_file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_choose_the_role() {
        let run = |args: &[&str]| parse(args.iter().copied());
        assert_eq!(run(&["init"]), Ok(Options::Init));
        assert_eq!(run(&["guard"]), Ok(Options::Guard));
        assert_eq!(run(&["--version"]), Ok(Options::Version));
        assert_eq!(run(&[]), Ok(Options::Serve { listen: LISTEN, verifier_file: None }));
        assert_eq!(
            run(&["--listen", "127.0.0.1:0", "--verifier-file", "/x"]),
            Ok(Options::Serve {
                listen: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0),
                verifier_file: Some("/x".to_string())
            })
        );
        for bad in [
            &["--listen"][..],
            &["--listen", "x"],
            &["--verifier-file"],
            &["--what"],
            &["--listen", "1.1.1.1:1", "init"],
        ] {
            assert!(run(bad).is_err(), "{bad:?}");
        }
    }
}
