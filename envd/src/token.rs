//! What a descriptor watched by epoll belongs to, packed into the 64 bits that epoll carries.

/// Which descriptor of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Tells whether exec succeeded.
    Report,
    /// Standard input or terminal.
    Input,
    /// The output with this index.
    Output(u8),
}

/// What a descriptor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// The listening socket.
    Listener,
    /// Children that ended, and the request to end.
    Signals,
    /// The connection to the metadata service.
    Metadata,
    /// A session's connection.
    Connection(u32),
    /// A process, by its number in envd.
    Process(u32, Way),
    /// A pipe that an ended process left open.
    LeftOver(u32),
    /// A connection to a port of the guest's.
    Port(u32),
    /// Any watch of files: all of them are looked at in each turn.
    Watch,
}

impl Token {
    /// The number for epoll: kind, then way, then number.
    pub fn pack(self) -> u64 {
        let (kind, way, number) = match self {
            Token::Listener => (0, 0, 0),
            Token::Signals => (1, 0, 0),
            Token::Metadata => (2, 0, 0),
            Token::Connection(id) => (3, 0, id),
            Token::Process(key, Way::Report) => (4, 0, key),
            Token::Process(key, Way::Input) => (4, 1, key),
            Token::Process(key, Way::Output(index)) => (4, 2 + u64::from(index), key),
            Token::LeftOver(number) => (5, 0, number),
            Token::Port(id) => (6, 0, id),
            Token::Watch => (7, 0, 0),
        };
        kind << 48 | way << 32 | u64::from(number)
    }

    /// Reads a number of [`Token::pack`].
    pub fn unpack(packed: u64) -> Option<Token> {
        let number = packed as u32;
        let way = (packed >> 32) as u16;
        Some(match packed >> 48 {
            0 => Token::Listener,
            1 => Token::Signals,
            2 => Token::Metadata,
            3 => Token::Connection(number),
            4 => Token::Process(
                number,
                match way {
                    0 => Way::Report,
                    1 => Way::Input,
                    index => Way::Output((index - 2) as u8),
                },
            ),
            5 => Token::LeftOver(number),
            6 => Token::Port(number),
            7 => Token::Watch,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_packing() {
        for token in [
            Token::Listener,
            Token::Signals,
            Token::Metadata,
            Token::Connection(u32::MAX),
            Token::Process(7, Way::Report),
            Token::Process(7, Way::Input),
            Token::Process(u32::MAX, Way::Output(1)),
            Token::LeftOver(9),
            Token::Port(u32::MAX),
            Token::Watch,
        ] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(99 << 48), None);
    }
}
