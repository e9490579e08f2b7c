package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"gopkg.in/natefinch/lumberjack.v2"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

const (
	logBuffer        = 512 << 10              // size of the buffer; lines beyond it are dropped and counted
	logFlushAt       = 64 << 10               // a fuller buffer is written without waiting for logInterval
	logInterval      = 200 * time.Millisecond // longest time that a line stays in the buffer
	lastWordsTimeout = 500 * time.Millisecond // longest wait at the end of the process, for the last lines and for stderr
)

// logToStderr, given as -log, logs to stderr instead of a file.
const logToStderr = "-"

type logOptions struct {
	file     string // or logToStderr
	maxMB    int    // size after which the file is rotated
	backups  int    // old files kept, compressed
	days     int    // how long they are kept; 0 is no limit
	level    slog.Level
	reserved []string // paths of orderd's other files, existing or not; the log may be none of them
}

// logger is slog's JSON handler over a line buffer.
type logger struct {
	*slog.Logger
	*lineBuffer
	file *logFile // nil if stderr is the log
}

// openLog opens the log. A file that cannot be written is an error here; once
// the service runs it is one line on stderr.
func openLog(o logOptions, stderr io.Writer) (*logger, error) {
	if o.file == logToStderr {
		return newLogger(stderr, o.level, io.Discard), nil // stderr gets nothing but JSON
	}
	file, err := openLogFile(o)
	if err != nil {
		return nil, fmt.Errorf("cannot write the log file %s: %w; choose another with -log", o.file, err)
	}
	l := newLogger(file, o.level, stderr)
	l.file = file
	return l, nil
}

// newLogger logs to out. When writing to out begins to fail, notices gets one plain line.
func newLogger(out io.Writer, level slog.Level, notices io.Writer) *logger {
	b := &lineBuffer{out: out, notices: notices, wake: make(chan struct{}, 1), quit: make(chan struct{}), stopped: make(chan struct{})}
	go b.flushLoop()
	return &logger{Logger: slog.New(slog.NewJSONHandler(b, &slog.HandlerOptions{Level: level})), lineBuffer: b}
}

// close writes the last lines and closes the file. It does not wait long for a
// disk that hangs, or for a stderr that nobody reads.
func (l *logger) close() error {
	close(l.quit)
	select {
	case <-l.stopped:
		if l.file != nil {
			return l.file.close()
		}
	case <-time.After(lastWordsTimeout):
		fmt.Fprintln(l.notices, "orderd: the last log lines are lost: the log file could not be written in time")
	}
	return nil
}

// lineBuffer collects lines, which one goroutine, the flusher, writes to out. A
// caller never waits for out: lines that do not fit the buffer, or that out
// refuses, are dropped and counted.
type lineBuffer struct {
	dropped atomic.Int64

	mu      sync.Mutex // guards buffer
	buffer  []byte
	wake    chan struct{} // capacity 1: the buffer has reached logFlushAt
	quit    chan struct{} // closed by close
	stopped chan struct{} // closed when the flusher has written its last

	// Owned by the flusher:
	out     io.Writer
	notices io.Writer
	spare   []byte // the next buffer
	failing bool   // the last write failed, and notices got its line
}

// Write takes one encoded line. It never blocks and never fails.
func (b *lineBuffer) Write(line []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.buffer)+len(line) > logBuffer {
		b.dropped.Add(1)
		return len(line), nil
	}
	b.buffer = append(b.buffer, line...)
	if len(b.buffer) >= logFlushAt {
		nudge(b.wake)
	}
	return len(line), nil
}

func (b *lineBuffer) flushLoop() {
	defer close(b.stopped)
	tick := time.Tick(logInterval)
	for open := true; open; {
		select {
		case <-tick:
		case <-b.wake:
		case <-b.quit:
			open = false
		}
		b.flush()
	}
}

// flush swaps the buffer for the spare one and writes it.
func (b *lineBuffer) flush() {
	b.mu.Lock()
	full := b.buffer
	b.buffer, b.spare = b.spare[:0], full
	b.mu.Unlock()
	if len(full) == 0 {
		return
	}
	n, err := b.out.Write(full)
	if err != nil {
		b.dropped.Add(int64(bytes.Count(full[n:], []byte("\n"))))
		if !b.failing {
			fmt.Fprintf(b.notices, "orderd: cannot write the log: %v; orders go on, lines are dropped until it works again\n", err)
		}
	}
	b.failing = err != nil
}

// logFile is a file that lumberjack rotates. lumberjack alone renames whatever
// it is given, does not notice that its file was moved or deleted, and loses
// lines if two processes rotate one file.
type logFile struct {
	rotated  lumberjack.Logger
	reserved []string
	lock     io.Closer   // keeps other processes from the file
	current  os.FileInfo // of the open file; nil when the path may name another
}

func openLogFile(o logOptions) (*logFile, error) {
	path := filepath.Clean(o.file)
	f := &logFile{reserved: o.reserved, rotated: lumberjack.Logger{Filename: path, MaxSize: o.maxMB, MaxBackups: o.backups, MaxAge: o.days, Compress: true}}
	err := os.MkdirAll(filepath.Dir(path), 0o700)
	if err != nil {
		return nil, err
	}
	if _, err = f.reopenIfMoved(); err != nil {
		return nil, err
	}
	if f.lock, err = lockFile(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".lock")); err != nil {
		return nil, err
	}
	if _, err = f.Write(nil); err != nil { // makes the file, for its owner only
		return nil, errors.Join(err, f.lock.Close())
	}
	return f, nil
}

// Write opens the file again if the path no longer names the open one. If the
// path changed meaning during the write (a rotation, or somebody moved the file),
// the next write reopens it.
func (f *logFile) Write(text []byte) (int, error) {
	before, err := f.reopenIfMoved()
	if err != nil {
		return 0, err
	}
	n, err := f.rotated.Write(text)
	f.current = nil
	if after, _ := os.Lstat(f.rotated.Filename); os.SameFile(before, after) {
		f.current = after
	}
	return n, err
}

// reopenIfMoved returns the file that the path names, or nil if there is none. If
// that is not the open file, reopenIfMoved closes the open one, so that the next write
// opens the other. It returns an error if the path names what must not become the log.
func (f *logFile) reopenIfMoved() (os.FileInfo, error) {
	found, _ := os.Lstat(f.rotated.Filename) // an error here shows again in the write
	if os.SameFile(found, f.current) {
		return found, nil
	}
	f.rotated.Close()
	if found != nil && !found.Mode().IsRegular() {
		return nil, fmt.Errorf(`it is not a regular file ("-log -" logs to stderr, "-log - 2>%s" nowhere)`, os.DevNull)
	}
	for _, path := range f.reserved {
		if samePlace(f.rotated.Filename, path) {
			return nil, fmt.Errorf("it is orderd's own %s", filepath.Base(path))
		}
	}
	return found, nil
}

// close keeps the lock until the process ends if a rotated file may still be
// being compressed: another process would compress it too, and delete the result.
func (f *logFile) close() error {
	err := f.rotated.Close()
	ext := filepath.Ext(f.rotated.Filename)
	old, _ := filepath.Glob(strings.TrimSuffix(f.rotated.Filename, ext) + "-*" + ext)
	if len(old) > 0 {
		return err
	}
	return errors.Join(err, f.lock.Close())
}

// ---- Of files: which is which, locks, the paths that SQLite takes. ----

// samePlace reports whether both paths lead to one file, existing or not. Some
// file systems do not tell capitals from small letters.
func samePlace(path, other string) bool {
	same := func(path, other string) bool {
		a, _ := os.Stat(path)
		b, _ := os.Stat(other)
		return os.SameFile(a, b)
	}
	return same(path, other) ||
		strings.EqualFold(filepath.Base(path), filepath.Base(other)) && same(filepath.Dir(path), filepath.Dir(other))
}

var errLocked = errors.New("another orderd uses it")

// lockFile makes an empty file, if there is none, and takes SQLite's lock on it. That
// lock works on Linux, macOS and Windows without cgo, and ends with its process, even
// after kill -9. The file is never deleted, because two processes could then each lock
// a file of that name. See https://sqlite.org/lockingv3.html.
func lockFile(path string) (io.Closer, error) {
	if err := makeFile(path); err != nil {
		return nil, err
	}
	if _, err := sqlitePath(path); err != nil {
		return nil, err
	}
	name := url.URL{Scheme: "file", OmitHost: true, Path: filepath.ToSlash(path)}
	db, err := sql.Open("sqlite", name.String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1) // the one that holds the lock
	// busy_timeout: without it, two processes that start together can both fail.
	_, err = db.Exec("PRAGMA busy_timeout = 100; PRAGMA journal_mode = MEMORY; BEGIN EXCLUSIVE")
	if e, ok := errors.AsType[*sqlite.Error](err); ok && e.Code()&0xff == sqlite3.SQLITE_BUSY {
		return nil, errors.Join(errLocked, db.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot lock %s: %w", path, err), db.Close())
	}
	return db, nil
}

// makeFile makes an empty file for its owner only, or makes sure that an existing
// one can be written: SQLite would open a read-only one and report no error. It
// must not run once SQLite has the file open: closing any descriptor of a file
// drops the process's locks on it.
func makeFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// longestPath is in bytes: SQLite's limit is 512, with the suffixes it appends
// (https://sqlite.org/src/file/src/os_unix.c, MAX_PATHNAME).
const longestPath = 500

// sqlitePath returns the path that SQLite opens for path: absolute, with the
// links of its directory followed.
func sqlitePath(path string) (string, error) {
	directory, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	abs, err := filepath.Abs(filepath.Join(directory, filepath.Base(path)))
	if err == nil && len(abs) > longestPath {
		err = fmt.Errorf("the path of %s has %d bytes and SQLite takes at most %d", filepath.Base(abs), len(abs), longestPath)
	}
	return abs, err
}

// ---- Of goroutines. ----

// sleep pauses for d and returns true, or returns false if ctx is done first.
func sleep(ctx context.Context, d time.Duration) (whole bool) {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// nudge makes the only receiver of a channel of capacity 1 look. It never blocks.
func nudge(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
