//! Pumps between real fifos and a fake VM: a unix listener that speaks CONNECT and the stream hello.

use super::*;
use crate::sandbox::process::StdioPaths;
use coffer_proto::ids::ContainerId;
use coffer_proto::stream::REFUSED;
use std::io::{Read, Write};
use std::os::unix::net as std_unix;

struct Rig {
    dir: tempfile::TempDir,
    vm: std_unix::UnixListener,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let vm = std_unix::UnixListener::bind(dir.path().join(VSOCK_SOCKET)).unwrap();
        Self { dir, vm }
    }

    fn fifo(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    }

    fn dialer(&self) -> Dialer {
        Dialer::new(self.dir.path(), 1).unwrap()
    }

    /// The host's side of a process with these streams.
    async fn attach(&self, paths: &StdioPaths) -> Result<ProcessIo, StdioError> {
        let endpoints = Endpoints::open(paths, &key(), "").await.unwrap();
        ProcessIo::attach(endpoints, &self.dialer(), &key()).await
    }

    /// The guest's side of one connection, on a thread.
    fn guest<T: Send + 'static>(
        &self,
        status: u8,
        serve: impl FnOnce(std_unix::UnixStream, Hello) -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let vm = self.vm.try_clone().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = vm.accept().unwrap();
            let mut line = [0; 14];
            stream.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 17235\n");
            stream.write_all(b"OK 1073741824\n").unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut json = vec![0; usize::from(u16::from_le_bytes(length))];
            stream.read_exact(&mut json).unwrap();
            stream.write_all(&[status]).unwrap();
            serve(stream, Hello::decode(&json).unwrap())
        })
    }
}

fn key() -> ProcessKey {
    ProcessKey::init(ContainerId::new("c").unwrap())
}

fn uri(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// A process with nothing but standard output.
fn stdout(uri: String) -> StdioPaths {
    StdioPaths {
        stdout: uri,
        ..Default::default()
    }
}

/// Bytes in which a lost, doubled or swapped block shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_mebibytes_arrive_intact() {
    let rig = Rig::new();
    let path = rig.fifo("out");
    let paths = stdout(uri(&path));
    let data = pattern(100 << 20);
    let sent = data.clone();
    let guest = rig.guest(ATTACHED, move |mut stream, hello| {
        assert!(matches!(
            hello,
            Hello::Stdio {
                stream: Stream::Stdout,
                ..
            }
        ));
        stream.write_all(&sent).unwrap();
    });
    let reader = std::thread::spawn(move || fs::read(path).unwrap());
    let io = rig.attach(&paths).await.unwrap();
    io.drained().await;
    guest.join().unwrap();
    assert!(reader.join().unwrap() == data);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_reader_gets_everything_from_the_start() {
    let rig = Rig::new();
    let path = rig.fifo("out");
    let paths = stdout(format!("fifo://{}", uri(&path)));
    let data = pattern(3 << 20);
    let sent = data.clone();
    let guest = rig.guest(ATTACHED, move |mut stream, _| {
        stream.write_all(&sent).unwrap();
    });
    let io = rig.attach(&paths).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let reader = std::thread::spawn(move || fs::read(path).unwrap());
    io.drained().await;
    guest.join().unwrap();
    assert!(reader.join().unwrap() == data);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_reader_the_process_is_held_back() {
    let rig = Rig::new();
    let path = rig.fifo("out");
    let paths = stdout(uri(&path));
    let guest = rig.guest(ATTACHED, |mut stream, _| {
        stream
            .set_write_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        let data = vec![0; 1 << 16];
        let mut total = 0;
        while let Ok(length) = stream.write(&data) {
            total += length;
        }
        total
    });
    let io = rig.attach(&paths).await.unwrap();
    let taken = tokio::task::spawn_blocking(|| guest.join().unwrap())
        .await
        .unwrap();
    assert!(taken < 4 << 20, "{taken} bytes were buffered");
    drop(io);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn input_ends_with_close_io_and_not_with_a_client_that_leaves() {
    let rig = Rig::new();
    let path = rig.fifo("in");
    let paths = StdioPaths {
        stdin: uri(&path),
        ..Default::default()
    };
    let guest = rig.guest(ATTACHED, |mut stream, hello| {
        assert!(matches!(
            hello,
            Hello::Stdio {
                stream: Stream::Stdin,
                ..
            }
        ));
        let mut first = [0; 3];
        stream.read_exact(&mut first).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        (first, rest)
    });
    let mut io = rig.attach(&paths).await.unwrap();
    for part in [&b"one"[..], b"two"] {
        // Opens, writes and leaves.
        fs::write(&path, part).unwrap();
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!guest.is_finished());
    io.close_stdin();
    io.close_stdin();
    let (first, rest) = tokio::task::spawn_blocking(|| guest.join().unwrap())
        .await
        .unwrap();
    assert_eq!((&first[..], &rest[..]), (&b"one"[..], &b"two"[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_output_can_be_a_plain_file() {
    let rig = Rig::new();
    let path = rig.dir.path().join("log");
    let paths = StdioPaths {
        stderr: format!("file://{}", uri(&path)),
        ..Default::default()
    };
    let guest = rig.guest(ATTACHED, |mut stream, _| stream.write_all(b"oops").unwrap());
    let io = rig.attach(&paths).await.unwrap();
    io.drained().await;
    guest.join().unwrap();
    assert_eq!(fs::read(path).unwrap(), b"oops");
}

#[tokio::test]
async fn misplaced_loggers_and_missing_fifos_are_refused_by_name() {
    let open = async |paths: StdioPaths| {
        let opened = Endpoints::open(&paths, &key(), "").await;
        opened.unwrap_err().to_string()
    };
    let logger = "binary:///bin/log?a=b";
    let stderr = open(StdioPaths {
        stderr: logger.into(),
        ..Default::default()
    });
    assert!(stderr.await.contains("stderr \"binary://"));
    let stdin = open(StdioPaths {
        stdin: logger.into(),
        ..Default::default()
    });
    assert!(stdin.await.contains("stdin \"binary://"));
    let missing = open(stdout("/nonexistent/fifo".into()));
    assert!(missing.await.contains("/nonexistent/fifo"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_logger_gets_what_the_process_writes_and_ends_after_it() {
    let rig = Rig::new();
    let (log, script) = (rig.dir.path().join("log"), rig.dir.path().join("script"));
    fs::write(
        &script,
        "exec 5>&-; cat <&3 > $1; cat <&4 >> $1; echo end >> $1",
    )
    .unwrap();
    let paths = StdioPaths {
        stdout: format!("binary:///bin/sh?{}&{}", uri(&script), uri(&log)),
        stderr: "file:///this/does/not/count".into(),
        ..Default::default()
    };
    let ends = Endpoints::open(&paths, &key(), "ns").await.unwrap();
    let asked = ends.for_agent(false);
    assert!(asked.stdout && asked.stderr && !asked.stdin);
    let guest = {
        let first = rig.guest(ATTACHED, |mut stream, _| stream.write_all(b"out ").unwrap());
        // Both connections are made one after the other, on one listener.
        let io = async {
            let io = ProcessIo::attach(ends, &rig.dialer(), &key())
                .await
                .unwrap();
            io.drained().await;
        };
        let second = async {
            tokio::task::spawn_blocking(move || first.join().unwrap())
                .await
                .unwrap();
            rig.guest(ATTACHED, |mut stream, _| stream.write_all(b"err ").unwrap())
        };
        tokio::join!(io, second).1
    };
    guest.join().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while fs::read_to_string(&log).unwrap() != "out err end\n" {
        assert!(
            std::time::Instant::now() < deadline,
            "{:?}",
            fs::read_to_string(&log)
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_the_agent_does_not_know_is_an_error() {
    let rig = Rig::new();
    let paths = stdout(uri(&rig.fifo("out")));
    let guest = rig.guest(REFUSED, |_, _| ());
    let result = rig.attach(&paths).await;
    assert!(matches!(
        result,
        Err(StdioError::Refused { stream: "stdout" })
    ));
    guest.join().unwrap();
}
