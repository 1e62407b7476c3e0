//! What envd does for a session: one place where messages become work.

use crate::connection::{ConnectionId, StreamKey, Task};
use crate::daemon::Daemon;
use crate::guest;
use crate::log::log;
use crate::process::ProcessKey;
use crate::process::table::Piece;
use crate::trust::Trust;
use alloc::format;
use alloc::string::ToString;
use wire::message::{
    Code, Done, Error, FileList, FileMakeDirectory, FileMove, FileRead, FileRemove, FileStat, FileWatch,
    FileWrite, GuestInit, GuestMetrics, GuestMetricsHistory, GuestPrepareSnapshot, Health, HealthReply,
    Message, PortConnect, PortList, PortWatch, ProcessAttach, ProcessEndInput, ProcessList, ProcessSignal,
    ProcessStart, TerminalResize,
};
use wire::session::{Event, SessionError};

impl Daemon {
    /// Handles one event of a session.
    pub(crate) fn on_event(&mut self, connection: ConnectionId, event: Event) {
        let key = |stream| StreamKey { connection, stream };
        match event {
            Event::Authenticate { identity } => self.authenticate(connection, &identity),
            Event::Ready { .. } => self.connections.set_proven(connection),
            Event::Opened { stream, kind, body } => {
                if let Err(error) = self.on_opened(key(stream), kind, &body) {
                    self.connections.fail(key(stream), &error);
                }
            }
            Event::Message { stream, kind, body, cost } => {
                self.on_message(key(stream), kind, &body);
                self.connections.release(key(stream), cost);
            }
            Event::Data { stream, bytes, cost, .. } => {
                let key = key(stream);
                match self.connections.task(key) {
                    Some(Task::Owner(id) | Task::Watcher(id)) => {
                        let piece = Piece { from: key, cost, bytes };
                        self.with_supervisor(|s, shell| s.on_input(id, piece, shell));
                    }
                    Some(Task::File) => {
                        self.files.on_data(key, bytes, cost, &mut self.connections);
                    }
                    Some(Task::Port(id)) => {
                        self.with_ports(|p, shell| p.on_data(id, bytes, cost, shell));
                    }
                    // It crossed the end of what it was for, or nobody asked for it.
                    Some(Task::Sampler | Task::Listing) | None => self.connections.release(key, cost),
                }
            }
            Event::Finished { stream } => match self.connections.task(key(stream)) {
                Some(Task::Owner(id)) => self.with_supervisor(|s, shell| s.on_finished(id, shell)),
                Some(Task::File) => self.files.on_finished(key(stream), &mut self.connections),
                Some(Task::Port(id)) => self.with_ports(|p, shell| p.on_finished(id, shell)),
                _ => {}
            },
            Event::Reset { stream, .. } => {
                if let Some(task) = self.connections.end_task(key(stream)) {
                    self.on_stream_gone(key(stream), task);
                }
            }
            Event::Writable { stream } => match self.connections.task(key(stream)) {
                Some(Task::Owner(id) | Task::Watcher(id)) => {
                    self.with_supervisor(|s, shell| s.on_writable(id, shell));
                }
                Some(Task::File) => self.files.on_writable(key(stream)),
                Some(Task::Port(id)) => self.with_ports(|p, shell| p.go_on(id, shell)),
                Some(Task::Sampler | Task::Listing) | None => {}
            },
            Event::GoingAway { .. } => {}
            Event::Closed { error } => {
                if matches!(error, SessionError::Auth(_) | SessionError::Integrity) {
                    log!("a connection was refused: {error}");
                }
            }
        }
    }

    /// What a stream was for ends with it.
    pub(crate) fn on_stream_gone(&mut self, key: StreamKey, task: Task) {
        match task {
            Task::Owner(_) | Task::Watcher(_) => {
                self.with_supervisor(|s, shell| s.on_stream_gone(key, task, shell));
            }
            Task::File => self.files.on_stream_gone(key, &mut self.connections),
            Task::Port(id) => self.ports.on_stream_gone(id),
            Task::Sampler => self.sampler.on_stream_gone(key),
            Task::Listing => self.supervisor.end_listing(key),
        }
    }

    /// A stream's first message says what it is for.
    fn on_opened(&mut self, key: StreamKey, kind: u16, body: &[u8]) -> Result<(), Error> {
        self.trust.check(key.connection, kind)?;
        match kind {
            Health::KIND => {
                decode::<Health>(body)?;
                let reply = HealthReply {
                    version: env!("CARGO_PKG_VERSION").to_string(),
                    uptime_ms: self.now_ms - self.started_ms,
                };
                self.connections.send_last(key, &reply);
            }
            GuestInit::KIND => {
                let init = decode::<GuestInit>(body)?;
                self.trust.check_init(&init)?;
                guest::initialise(&init, &mut self.defaults)?;
                self.trust = Trust::Everybody;
                self.connections.keep_only(Some(key.connection));
                self.connections.send_last(key, &Done {});
            }
            ProcessStart::KIND => {
                let start = decode::<ProcessStart>(body)?;
                let defaults = core::mem::take(&mut self.defaults);
                let result = self.with_supervisor(|s, shell| s.start(key, &start, &defaults, shell));
                self.defaults = defaults;
                result?;
            }
            ProcessSignal::KIND => {
                let message = decode::<ProcessSignal>(body)?;
                self.supervisor.signal(&message.selector, message.signal)?;
                self.connections.send_last(key, &Done {});
            }
            ProcessList::KIND => {
                decode::<ProcessList>(body)?;
                self.supervisor.list(key, &mut self.connections);
            }
            ProcessAttach::KIND => {
                let attach = decode::<ProcessAttach>(body)?;
                self.with_supervisor(|s, shell| s.attach(key, &attach.selector, attach.from_byte, shell))?;
            }
            GuestPrepareSnapshot::KIND => {
                decode::<GuestPrepareSnapshot>(body)?;
                self.trust = Trust::Only(key.connection);
                self.connections.keep_only(Some(key.connection));
                self.identity.forget_freshness();
                crate::sys::boot::sync_all();
                self.connections.send_last(key, &Done {});
            }
            GuestMetrics::KIND => {
                decode::<GuestMetrics>(body)?;
                self.connections.send_last(key, &crate::metrics::now()?);
            }
            GuestMetricsHistory::KIND => {
                let after_ms = decode::<GuestMetricsHistory>(body)?.after_ms;
                for figures in self.sampler.since(after_ms) {
                    self.connections.send(key, figures);
                }
                self.connections.send_last(key, &Done {});
            }
            PortWatch::KIND => {
                decode::<PortWatch>(body)?;
                self.sampler.watch(key, self.own_port, &mut self.connections)?;
            }
            PortList::KIND => {
                decode::<PortList>(body)?;
                self.connections.send_last(key, &crate::ports::list(self.own_port)?);
            }
            PortConnect::KIND => {
                let port = decode::<PortConnect>(body)?.port;
                let mut result = Ok(());
                self.with_ports(|p, shell| result = p.connect(key, port, shell));
                result?;
            }
            FileWatch::KIND => self.watch(key, &decode(body)?)?,
            FileStat::KIND => {
                let entry = self.files.stat(&decode(body)?, &self.defaults)?;
                self.connections.send_last(key, &entry);
            }
            FileMakeDirectory::KIND => {
                let entry = self.files.make_directory(&decode(body)?, &self.defaults)?;
                self.connections.send_last(key, &entry);
            }
            FileMove::KIND => {
                let entry = self.files.rename(&decode(body)?, &self.defaults)?;
                self.connections.send_last(key, &entry);
            }
            FileList::KIND => {
                self.files.list(key, &decode(body)?, &self.defaults, &mut self.connections)?;
            }
            FileRemove::KIND => {
                self.files.remove(key, &decode(body)?, &self.defaults, &mut self.connections)?;
            }
            FileRead::KIND => {
                self.files.read(key, &decode(body)?, &self.defaults, &mut self.connections)?;
            }
            FileWrite::KIND => {
                self.files.write(key, &decode(body)?, &self.defaults, &mut self.connections)?;
            }
            _ => {
                return Err(Error::new(
                    Code::Unimplemented,
                    format!(
                        "message kind {kind:#06x} does not start anything here: upgrade the template's envd"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// A further message concerns what its stream is for. It has no answer of its own but an error.
    fn on_message(&mut self, key: StreamKey, kind: u16, body: &[u8]) {
        let Some(Task::Owner(id) | Task::Watcher(id)) = self.connections.task(key) else { return };
        if let Err(error) = self.on_process_message(id, kind, body) {
            // The process goes on; only what was asked did not happen.
            self.connections.send(key, &error);
        }
    }

    fn on_process_message(&mut self, id: ProcessKey, kind: u16, body: &[u8]) -> Result<(), Error> {
        match kind {
            TerminalResize::KIND => {
                let size = decode::<TerminalResize>(body)?;
                self.supervisor.resize(id, size.columns, size.rows)
            }
            ProcessSignal::KIND => {
                let message = decode::<ProcessSignal>(body)?;
                self.supervisor.signal_process(id, message.signal)
            }
            ProcessEndInput::KIND => {
                decode::<ProcessEndInput>(body)?;
                self.with_supervisor(|s, shell| s.end_input(id, shell));
                Ok(())
            }
            _ => Err(Error::new(
                Code::Unimplemented,
                format!("message kind {kind:#06x} does not belong on a process's stream"),
            )),
        }
    }
}

fn decode<M: Message>(body: &[u8]) -> Result<M, Error> {
    M::decode(body).map_err(|e| Error::new(Code::InvalidRequest, format!("{} is malformed: {e}", M::NAME)))
}
