package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"gopkg.in/natefinch/lumberjack.v2"
)

const (
	logBuffer   = 512 << 10              // bytes that wait for the disk at most; also the largest single write
	logFlushAt  = 64 << 10               // bytes that wake the flusher at once
	logInterval = 200 * time.Millisecond // longest time that a line waits
	logEnd      = 500 * time.Millisecond // longest wait at the end, for the last lines and for stderr
)

// logger is slog's JSON handler over a buffer that one goroutine carries to
// the file. A caller never waits for the disk: lines that do not fit the
// buffer, or that the disk refuses, are dropped and counted.
type logger struct {
	*slog.Logger
	dropped atomic.Int64 // lines lost to a full buffer or a failing disk

	mu     sync.Mutex // guards buffer
	buffer []byte
	spare  []byte // the flusher's: the next buffer

	wake chan struct{} // capacity 1: there is much to write
	done chan struct{} // closed by close
	idle chan struct{} // closed when the flusher has written its last

	out     io.Writer // lumberjack, or stderr; only the flusher writes
	file    *lumberjack.Logger
	stderr  io.Writer
	failing bool // the flusher's: the last write failed and stderr was told
}

// openLog opens the log file, or stderr for "-". A file that cannot be written
// is an error here; once the service runs it is one line on stderr.
func openLog(cfg config, stderr io.Writer) (*logger, error) {
	l := &logger{wake: make(chan struct{}, 1), done: make(chan struct{}), idle: make(chan struct{}), out: stderr, stderr: stderr}
	if cfg.log != "-" {
		l.file = &lumberjack.Logger{Filename: cfg.log, MaxSize: cfg.logSize, MaxBackups: cfg.logBackups, MaxAge: cfg.logDays, Compress: true}
		l.out = l.file
		err := os.MkdirAll(filepath.Dir(cfg.log), 0o700)
		if err == nil {
			_, err = l.file.Write(nil) // makes the file, for its owner only
		}
		if err != nil {
			return nil, fmt.Errorf("cannot write the log file: %w; choose another with -log", err)
		}
	}
	var level slog.Level
	level.UnmarshalText([]byte(cfg.logLevel)) // parseLevel has checked it
	l.Logger = slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: level}))
	go l.flushLoop()
	return l, nil
}

// Write takes one encoded line. It never blocks and never fails.
func (l *logger) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.buffer)+len(line) > logBuffer {
		l.dropped.Add(1)
		return len(line), nil
	}
	l.buffer = append(l.buffer, line...)
	if len(l.buffer) >= logFlushAt {
		nudge(l.wake)
	}
	return len(line), nil
}

func (l *logger) flushLoop() {
	defer close(l.idle)
	tick := time.Tick(logInterval)
	for open := true; open; {
		select {
		case <-tick:
		case <-l.wake:
		case <-l.done:
			open = false
		}
		l.flush()
	}
}

// flush swaps the buffer for the spare one and writes it.
func (l *logger) flush() {
	l.mu.Lock()
	full := l.buffer
	l.buffer, l.spare = l.spare[:0], full
	l.mu.Unlock()
	if len(full) == 0 {
		return
	}
	if l.file != nil {
		if _, err := os.Stat(l.file.Filename); err != nil {
			l.file.Close() // deleted under us: the write below makes it anew
		}
	}
	_, err := l.out.Write(full)
	if err != nil {
		l.dropped.Add(int64(bytes.Count(full, []byte("\n"))))
		if !l.failing {
			fmt.Fprintf(l.stderr, "orderd: cannot write the log: %v; orders go on, lines are dropped until it works again\n", err)
		}
	}
	l.failing = err != nil
}

// close writes what waits and closes the file. It does not wait long for a disk
// that hangs, or for whoever should read stderr.
func (l *logger) close() error {
	close(l.done)
	select {
	case <-l.idle:
		if l.file != nil {
			return l.file.Close()
		}
	case <-time.After(logEnd):
		if l.file != nil {
			fmt.Fprintln(l.stderr, "orderd: the last log lines are lost: the log file could not be written in time")
		}
	}
	return nil
}
