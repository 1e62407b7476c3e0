//! A file as a response's body: `files/read` and `files/stream/read`.

use crate::hosts::error::HostError;
use crate::hosts::relay::{Action, Translator};
use crate::http::handler::Response;
use wire::message::{CHANNEL_FILE, Done, FileEntry, Message};

/// The translator.
#[derive(Debug, Default)]
pub struct Download {
    has_begun: bool,
}

impl Translator for Download {
    fn message(&mut self, kind: u16, _body: &[u8], actions: &mut Vec<Action>) {
        match kind {
            FileEntry::KIND if !self.has_begun => {
                self.has_begun = true;
                let head = Response { status: 200, headers: Vec::new(), body: Vec::new() };
                actions.push(Action::Head(head.with_header("content-type", "application/octet-stream")));
            }
            Done::KIND if self.has_begun => actions.push(Action::EndBody),
            _ => {}
        }
    }

    fn data(&mut self, channel: u8, bytes: &[u8], actions: &mut Vec<Action>) {
        if channel == CHANNEL_FILE && self.has_begun {
            actions.push(Action::Body(bytes.to_vec()));
        }
    }

    fn finished(&mut self, actions: &mut Vec<Action>) {
        self.failed(HostError::BadReply("the stream ended before the file".to_string()), actions);
    }

    fn failed(&mut self, error: HostError, actions: &mut Vec<Action>) {
        // Once the body has begun the shell can only cut it off, which `Respond` then does.
        actions.push(Action::Respond(error.into()));
    }

    fn client_text(&mut self, _text: &str, _actions: &mut Vec<Action>) {}

    fn client_binary(&mut self, _bytes: &[u8], _actions: &mut Vec<Action>) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::message::{Code, Error};

    #[test]
    fn a_file_comes_as_head_body_end_or_as_an_error() {
        let mut download = Download::default();
        let mut actions = Vec::new();
        download.message(FileEntry::KIND, &[], &mut actions);
        download.data(CHANNEL_FILE, b"abc", &mut actions);
        download.message(Done::KIND, &[], &mut actions);
        assert!(matches!(&actions[0], Action::Head(r) if r.status == 200));
        assert_eq!(actions[1..], [Action::Body(b"abc".to_vec()), Action::EndBody]);
        let mut actions = Vec::new();
        let error = HostError::Remote(Error::new(Code::NotFound, "no such file"));
        Download::default().failed(error, &mut actions);
        assert!(matches!(&actions[0], Action::Respond(r) if r.status == 404));
    }
}
