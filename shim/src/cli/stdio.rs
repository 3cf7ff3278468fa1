//! The client's side of a process's streams: fifos in a private directory, and threads that copy.
//!
//! A fifo reads as ended while nobody has its other end. So the client holds both ends of each until the supervisor has
//! opened its own, which it has when Create or Exec returned; from then on the end of a stream is its end.

use super::Error;
use super::client::StdioPaths;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// One read, as large as a fifo can be made without a privilege.
const BUFFER_BYTES: usize = 256 << 10;
/// A process that ended may leave others that hold its streams open. After this long without a byte they are not
/// waited for any more.
pub(super) const SILENCE: Duration = Duration::from_secs(10);

/// Fifos that are open on the client's side.
#[derive(Debug)]
pub(super) struct Fifos {
    /// Removed when it is dropped.
    directory: Directory,
    stdin: Option<Fifo>,
    stdout: Fifo,
    /// None with a terminal.
    stderr: Option<Fifo>,
}

/// Both ends of one fifo.
#[derive(Debug)]
struct Fifo {
    path: PathBuf,
    reader: File,
    writer: File,
}

impl Fifo {
    fn make(directory: &Path, name: &str) -> io::Result<Self> {
        let path = directory.join(name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        // Without O_NONBLOCK the first open would wait for the other end.
        let reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)?;
        let writer = OpenOptions::new().write(true).open(&path)?;
        fcntl(reader.as_fd(), FcntlArg::F_SETFL(OFlag::empty()))?;
        Ok(Self {
            path,
            reader,
            writer,
        })
    }

    fn uri(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }
}

impl Fifos {
    /// Makes the fifos in a new directory.
    pub(super) fn make(
        directory: PathBuf,
        interactive: bool,
        terminal: bool,
    ) -> Result<Self, Error> {
        Self::make_in(directory, interactive, terminal).map_err(|source| Error::Io {
            what: "can't make the fifos of the process".into(),
            source,
        })
    }

    fn make_in(directory: PathBuf, interactive: bool, terminal: bool) -> io::Result<Self> {
        DirBuilder::new().mode(0o700).create(&directory)?;
        let directory = Directory(directory);
        let stdin = interactive
            .then(|| Fifo::make(&directory.0, "stdin"))
            .transpose()?;
        let stderr = (!terminal)
            .then(|| Fifo::make(&directory.0, "stderr"))
            .transpose()?;
        Ok(Self {
            stdin,
            stdout: Fifo::make(&directory.0, "stdout")?,
            stderr,
            directory,
        })
    }

    /// What the supervisor is told.
    pub(super) fn paths(&self) -> StdioPaths {
        StdioPaths {
            terminal: self.stderr.is_none(),
            stdin: self.stdin.as_ref().map(Fifo::uri).unwrap_or_default(),
            stdout: self.stdout.uri(),
            stderr: self.stderr.as_ref().map(Fifo::uri).unwrap_or_default(),
        }
    }

    /// Starts to copy. The supervisor has its ends open now.
    pub(super) fn connect(mut self) -> Copying {
        let shared = Arc::new(Shared::default());
        // The names have done their work; what is open stays open.
        drop(self.directory);
        if let Some(Fifo { reader, writer, .. }) = self.stdin.take() {
            drop(reader);
            let shared = shared.clone();
            thread::spawn(move || {
                copy_input(writer);
                shared.input_ended.notify_one();
            });
        }
        let open = watch::Sender::new(1 + usize::from(self.stderr.is_some()));
        let outputs = [
            Some((self.stdout, false)),
            self.stderr.take().map(|fifo| (fifo, true)),
        ];
        for (fifo, to_stderr) in outputs.into_iter().flatten() {
            let (reader, shared, open) = (fifo.reader, shared.clone(), open.clone());
            thread::spawn(move || {
                if to_stderr {
                    copy_output(reader, io::stderr(), &shared);
                } else {
                    copy_output(reader, Unbuffered, &shared);
                }
                open.send_modify(|open| *open -= 1);
            });
        }
        Copying {
            shared,
            open: open.subscribe(),
        }
    }
}

#[derive(Debug)]
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        // It is in the sandbox's directory and goes with that at the latest.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[derive(Debug, Default)]
struct Shared {
    input_ended: Notify,
    output_closed: Notify,
    /// The caller closed its end of stdout or stderr.
    closed: AtomicBool,
    /// Bytes read so far.
    progress: AtomicU64,
    /// Threads that wait for the caller to take bytes.
    writing: AtomicUsize,
}

/// Streams being copied.
#[derive(Debug)]
pub(super) struct Copying {
    shared: Arc<Shared>,
    open: watch::Receiver<usize>,
}

impl Copying {
    /// Standard input has ended and all of it was passed on.
    pub(super) async fn input_ended(&self) {
        self.shared.input_ended.notified().await;
    }

    /// The caller closed its end of stdout or stderr.
    pub(super) async fn output_closed(&self) {
        self.shared.output_closed.notified().await;
    }

    /// Waits until everything the process wrote was written out. Nobody takes the rest of an output that the caller
    /// closed; whoever still writes to it ends with the process's streams. `silence` without a byte is an end as well.
    pub(super) async fn drained(&mut self, silence: Duration) {
        while !self.shared.closed.load(Ordering::Relaxed) {
            let before = self.shared.progress.load(Ordering::Relaxed);
            let done = tokio::time::timeout(silence, self.open.wait_for(|open| *open == 0)).await;
            let silent = self.shared.progress.load(Ordering::Relaxed) == before
                && self.shared.writing.load(Ordering::Relaxed) == 0;
            if done.is_ok() || silent {
                return;
            }
        }
    }
}

fn copy_input(mut fifo: File) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match io::stdin().read(&mut buffer) {
            Ok(0) => return,
            // The process has closed its input.
            Ok(read) if fifo.write_all(&buffer[..read]).is_err() => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Goes on reading when nobody takes the output any more, so that the process is not stuck until it is killed.
fn copy_output(mut fifo: File, mut output: impl Write, shared: &Shared) {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut closed = false;
    loop {
        let read = match fifo.read(&mut buffer) {
            Ok(0) => return,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        shared.progress.fetch_add(read as u64, Ordering::Relaxed);
        if closed {
            continue;
        }
        shared.writing.fetch_add(1, Ordering::Relaxed);
        let written = output
            .write_all(&buffer[..read])
            .and_then(|()| output.flush());
        shared.writing.fetch_sub(1, Ordering::Relaxed);
        if written.is_err() {
            closed = true;
            shared.closed.store(true, Ordering::Relaxed);
            shared.output_closed.notify_one();
        }
    }
}

/// Standard output without the line buffer of [`io::Stdout`], which would copy every byte once more.
struct Unbuffered;

impl Write for Unbuffered {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Ok(nix::unistd::write(io::stdout(), data)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifos_are_private_and_their_directory_is_one_of_their_own() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("io");
        let fifos = Fifos::make(directory.clone(), true, false).unwrap();
        assert_eq!(
            fs::metadata(&directory).unwrap().permissions().mode() & 0o777,
            0o700
        );
        let paths = fifos.paths();
        assert!(
            paths.stdin.ends_with("/stdin")
                && paths.stdout.ends_with("/stdout")
                && paths.stderr.ends_with("/stderr")
        );
        assert!(Fifos::make(directory, false, true).is_err());
        let paths = Fifos::make(root.path().join("tty"), false, true)
            .unwrap()
            .paths();
        assert!(paths.terminal && paths.stdin.is_empty() && paths.stderr.is_empty());
    }

    #[test]
    fn output_goes_on_when_its_reader_left() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let root = tempfile::tempdir().unwrap();
        let Fifo {
            reader, mut writer, ..
        } = Fifo::make(root.path(), "fifo").unwrap();
        let shared = Arc::new(Shared::default());
        let copying = thread::spawn({
            let shared = shared.clone();
            move || copy_output(reader, Closed, &shared)
        });
        writer.write_all(&vec![7; 1 << 20]).unwrap();
        drop(writer);
        copying.join().unwrap();
        assert_eq!(shared.progress.load(Ordering::Relaxed), 1 << 20);
        assert!(shared.closed.load(Ordering::Relaxed));
    }
}
