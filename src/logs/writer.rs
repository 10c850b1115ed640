//! Writes log lines on a thread of its own, so that no other thread ever waits for stderr.
//!
//! tracing-appender 0.2.5 has such a writer, but it fails when stderr does: its guard cannot flush
//! a full queue and reports that with `println!`, which panics if stdout is broken; its thread
//! reports a failed flush with `eprintln!`; it does not count lines that a write error lost; and it
//! bounds its queue in lines, not in bytes.
//!
//! Depends on nothing of ours.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use prometheus::IntCounter;
use tracing_subscriber::fmt::MakeWriter;

/// Limit of the memory that queued lines take, in bytes, [`OVERHEAD`] included: about 3 000 lines
/// of the usual length. This is the worst case for lines of any length, since a line beyond it is
/// dropped.
const MAX_QUEUED: usize = 1024 * 1024;

/// Memory that a line takes beside its text, in bytes: its slot in the queue, which grows by
/// doubling, and the allocator's rounding.
const OVERHEAD: usize = 64;

/// Queues lines for the thread; clones share the queue. Never waits for a write and never fails: a
/// line is dropped and counted if the queue is full.
#[derive(Debug, Clone)]
pub struct LogWriter {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    /// A line was queued.
    queued: Condvar,
    /// Every line was written, or lost.
    written: Condvar,
    dropped: IntCounter,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<Box<[u8]>>,
    /// Memory of `lines` and of the line that is being written.
    bytes: usize,
    writing: bool,
}

impl LogWriter {
    /// Starts the thread, which runs until the process ends. `dropped` counts the lines lost to a
    /// full queue or a failed write.
    ///
    /// # Errors
    /// If the thread cannot be spawned.
    pub fn start(out: impl Write + Send + 'static, dropped: IntCounter) -> io::Result<Self> {
        let (queue, queued, written) = Default::default();
        let shared = Arc::new(Shared { queue, queued, written, dropped });
        let writer = Self { shared: shared.clone() };
        thread::Builder::new().name("log".to_owned()).spawn(move || shared.write_lines(out))?;
        Ok(writer)
    }

    /// Waits until every queued line is written or lost. Returns `false` if `limit` passes first.
    pub fn flush(&self, limit: Duration) -> bool {
        let waiting = |queue: &mut Queue| queue.writing || !queue.lines.is_empty();
        let queue = self.shared.lock();
        let waited = self.shared.written.wait_timeout_while(queue, limit, waiting);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn push(&self, line: &[u8]) {
        let cost = line.len() + OVERHEAD;
        let mut queue = self.shared.lock();
        if queue.bytes + cost > MAX_QUEUED {
            self.shared.dropped.inc();
            return;
        }
        queue.bytes += cost;
        queue.lines.push_back(line.into());
        drop(queue);
        self.shared.queued.notify_one();
    }
}

impl Shared {
    /// No code panics or writes while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lines(&self, out: impl Write) {
        let mut out = Lines { out, torn: false };
        let mut queue = self.lock();
        loop {
            let Some(line) = queue.lines.pop_front() else {
                self.written.notify_all();
                queue = self.queued.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.writing = true;
            drop(queue);
            if out.write(&line).is_err() {
                self.dropped.inc();
            }
            queue = self.lock();
            queue.writing = false;
            queue.bytes -= line.len() + OVERHEAD;
        }
    }
}

/// Writes each line on a line of its own, also after one that was written in part.
struct Lines<W> {
    out: W,
    /// Whether a write failed in the middle of a line.
    torn: bool,
}

impl<W: Write> Lines<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.out.write_all(b"\n")?;
            self.torn = false;
        }
        let mut rest = line;
        while !rest.is_empty() {
            match self.out.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    rest = &rest[written..];
                    self.torn = !rest.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// One `write` is one line: tracing-subscriber writes each event in one call.
impl Write for &LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'w> MakeWriter<'w> for LogWriter {
    type Writer = &'w Self;

    fn make_writer(&'w self) -> &'w Self {
        self
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn counter() -> IntCounter {
        IntCounter::new("dropped", "Dropped.").unwrap()
    }

    /// Blocks each write until the receiver takes it.
    struct Pipe(SyncSender<Vec<u8>>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn piped() -> (LogWriter, IntCounter, Receiver<Vec<u8>>) {
        let (sender, lines) = sync_channel(0);
        let dropped = counter();
        (LogWriter::start(Pipe(sender), dropped.clone()).unwrap(), dropped, lines)
    }

    #[test]
    fn lines_keep_their_order_and_the_flush_waits_for_the_last() {
        let (writer, dropped, lines) = piped();
        for line in ["one\n", "two\n", "three\n"] {
            (&writer).write_all(line.as_bytes()).unwrap();
        }
        assert!(!writer.flush(Duration::from_millis(10)));
        let reader = thread::spawn(move || lines.iter().take(3).collect::<Vec<_>>());
        assert!(writer.flush(PATIENCE));
        assert_eq!(reader.join().unwrap(), [&b"one\n"[..], b"two\n", b"three\n"]);
        assert_eq!(dropped.get(), 0);
    }

    #[test]
    fn the_queue_is_bounded_in_bytes_and_lines_beyond_it_are_counted() {
        let (writer, dropped, lines) = piped();
        let line = [b'x'; 1000];
        let room = MAX_QUEUED / (line.len() + OVERHEAD);
        for _ in 0..room + 7 {
            (&writer).write_all(&line).unwrap();
        }
        assert_eq!(dropped.get(), 7);
        (&writer).write_all(&vec![b'y'; MAX_QUEUED]).unwrap();
        assert_eq!(dropped.get(), 8);
        // Every queued line is written once somebody reads.
        let reader = thread::spawn(move || lines.iter().take(room).count());
        assert!(writer.flush(PATIENCE));
        assert_eq!(reader.join().unwrap(), room);
        assert_eq!(writer.shared.lock().bytes, 0);
        assert_eq!(dropped.get(), 8);
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted_and_the_thread_goes_on() {
        let (writer, dropped, lines) = piped();
        drop(lines);
        for _ in 0..3 {
            (&writer).write_all(b"lost\n").unwrap();
        }
        assert!(writer.flush(PATIENCE));
        assert_eq!(dropped.get(), 3);
    }

    /// A disk with room for so many bytes.
    struct Disk {
        bytes: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let written = bytes.len().min(self.room - self.bytes.len());
            if written == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.bytes.extend_from_slice(&bytes[..written]);
            Ok(written)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_written_in_part_does_not_spoil_the_next() {
        let mut lines = Lines { out: Disk { bytes: Vec::new(), room: 7 }, torn: false };
        lines.write(b"one\n").unwrap();
        lines.write(b"two three\n").unwrap_err();
        lines.write(b"four\n").unwrap_err();
        lines.out.room = 100;
        lines.write(b"five\n").unwrap();
        lines.write(b"six\n").unwrap();
        assert_eq!(lines.out.bytes, b"one\ntwo\nfive\nsix\n");
    }
}
