package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const metricsVersion = 2 // PRAGMA user_version of metrics.db

const metricsSchema = `
-- The totals of orders.db as last taken over. orders.db must never hold less.
CREATE TABLE totals (
	accepted  INTEGER NOT NULL, -- orders
	completed INTEGER NOT NULL, -- of these
	took      INTEGER NOT NULL, -- µs, sum over the completed
	seq       INTEGER NOT NULL DEFAULT 0, -- of the commit that they are from
	identity  INTEGER NOT NULL DEFAULT 0  -- of the database that they are from
) STRICT;
INSERT INTO totals (accepted, completed, took) VALUES (0, 0, 0);`

const metricsUpgradeTo2 = `
ALTER TABLE totals ADD COLUMN seq INTEGER NOT NULL DEFAULT 0;
ALTER TABLE totals ADD COLUMN identity INTEGER NOT NULL DEFAULT 0;`

// countsQueries is, by schema version, the query for what version 2 holds.
var countsQueries = map[int64]string{
	1: "SELECT accepted, completed, took, 0, 0 FROM totals",
	2: "SELECT accepted, completed, took, seq, identity FROM totals",
}

const projectEvery = 100 * time.Millisecond // least time between two commits to metrics.db

// metrics owns metrics.db, a projection of the orders' totals. The two databases
// cannot commit together. A crash between their commits neither loses nor doubles
// anything, because the projector sets sums and does not add to them. The orders'
// database must never hold less than metrics.db has counted.
type metrics struct {
	file *database
	log  *logger

	counted atomic.Pointer[totals] // what metrics.db holds; after loading, fields that its table lacks are 0
	latest  atomic.Pointer[totals] // what it should hold
	changed chan struct{}          // capacity 1: latest was set
	quit    chan struct{}          // closed by close
	stopped chan struct{}          // closed when the projector has ended

	commitSizes histogram
	commitTimes histogram

	beforeProject func() // set by tests: called between the two databases' commits
}

// openMetrics looks at metrics.db without changing it.
func openMetrics(directory string, log *logger) (*metrics, error) {
	m := &metrics{
		file: &database{
			path: filepath.Join(directory, "metrics.db"), appID: 0x6f72646d, version: metricsVersion,
			schema: metricsSchema, upgrades: []string{metricsUpgradeTo2},
			autoCheckpoint: 1, // a checkpoint after each commit, so that the counts outlive both -wal files
		},
		log: log, changed: make(chan struct{}, 1),
		commitSizes: newHistogram(commitSizeBounds), commitTimes: newHistogram(latencyBounds),
	}
	counted := new(totals)
	if err := m.file.inspect(countsQueries, &counted.accepted, &counted.completed, &counted.sumTook, &counted.seq, &counted.identity); err != nil {
		return nil, err
	}
	m.counted.Store(counted)
	return m, nil
}

// check makes sure that the orders in the file called place hold everything that
// was ever counted.
func (m *metrics) check(t totals, place string) error {
	c := m.counted.Load()
	lost := c.accepted > t.accepted || c.completed > t.completed
	if c.identity != 0 && t.identity != 0 { // 0 is from a version without identities
		if c.accepted > 0 && c.identity != t.identity {
			return fmt.Errorf("%s is not the database whose %d orders %s has counted: put that one back, or delete %[3]s to go on with this one", place, c.accepted, m.file.path)
		}
		lost = c.identity == t.identity && c.seq > t.seq // seq also shows lost steps; older versions have only the sums
	}
	if lost {
		return fmt.Errorf("%s has lost orders or their steps: it holds %d orders, %d of them completed, as of commit %d, but %s has counted %d and %d as of commit %d; put back the newest %[1]s together with its -wal file, or delete %[5]s to accept the loss",
			place, t.accepted, t.completed, t.seq, m.file.path, c.accepted, c.completed, c.seq)
	}
	return nil
}

// start prepares metrics.db and writes t, or the totals of a commit since, to it,
// which also rebuilds a file that was deleted or put back from a backup. Then it
// starts the projector.
func (m *metrics) start(t totals) error {
	if err := m.file.open(m.log); err != nil {
		return err
	}
	m.latest.CompareAndSwap(nil, &t) // the first commit may have come before
	if err := m.write(*m.latest.Load()); err != nil {
		return err
	}
	m.quit, m.stopped = make(chan struct{}), make(chan struct{})
	go m.project()
	return nil
}

// noteCommit notes a commit of the orders.
func (m *metrics) noteCommit(r commitReport) {
	m.commitSizes.observe(float64(r.creates + r.steps))
	m.commitTimes.observe(r.duration.Seconds())
	m.latest.Store(&r.totals)
	nudge(m.changed)
}

// noteConfirmed notes totals that a standby sees confirmed. If only seq has changed, as a
// beat does, they are not written.
func (m *metrics) noteConfirmed(t totals) {
	before := *m.latest.Swap(&t)
	before.seq = t.seq
	if before != t {
		nudge(m.changed)
	}
}

// project is the projector: it writes the totals soon after they change.
func (m *metrics) project() {
	defer close(m.stopped)
	for open := true; open; {
		select {
		case <-m.changed:
		case <-m.quit:
			open = false
		}
		pause := projectEvery
		if err := m.write(*m.latest.Load()); err != nil {
			m.log.Error("metrics.db cannot be written; its counts lag until it can", "error", err)
			nudge(m.changed)
			pause = retryPause
		}
		select {
		case <-time.After(pause):
		case <-m.quit:
		}
	}
}

// write makes metrics.db hold t, if it does not yet.
func (m *metrics) write(t totals) error {
	if *m.counted.Load() == t {
		return nil
	}
	if m.beforeProject != nil {
		m.beforeProject()
	}
	if _, err := m.file.Exec("UPDATE totals SET accepted = ?, completed = ?, took = ?, seq = ?, identity = ?",
		t.accepted, t.completed, t.sumTook, t.seq, t.identity); err != nil {
		return explain(m.file.path, err)
	}
	m.counted.Store(&t)
	return nil
}

// close writes the last totals. The store must have been closed before.
func (m *metrics) close() error {
	if m.quit != nil { // it was started
		close(m.quit)
		<-m.stopped
	}
	return m.file.close()
}

// summary is the answer of GET /metrics in JSON. Its figures come from two databases,
// which agree once the projector has caught up.
type summary struct {
	TotalOrdersProcessed  int64   `json:"total_orders_processed"`
	AverageProcessingTime float64 `json:"average_processing_time"` // seconds
	OrdersPending         int64   `json:"orders_pending"`
	OrdersProcessing      int64   `json:"orders_processing"`
	OrdersCompleted       int64   `json:"orders_completed"` // of those still stored
}

// summarize combines what metrics.db has counted with the orders' totals t.
func (m *metrics) summarize(t totals) summary {
	counted := m.counted.Load()
	sum := summary{
		TotalOrdersProcessed: counted.completed,
		OrdersPending:        t.pending(),
		OrdersProcessing:     t.processing,
		OrdersCompleted:      t.completed - t.removed,
	}
	if counted.completed > 0 {
		sum.AverageProcessingTime = float64(counted.sumTook) / float64(counted.completed) / 1e6
	}
	return sum
}

// histogram counts observations by upper bound.
type histogram struct {
	bounds []float64 // ascending to +Inf

	mu     sync.Mutex // guards counts and sum
	counts []uint64   // by bound
	sum    float64
}

var (
	latencyBounds    = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10} // seconds
	durationBounds   = []float64{.001, .01, .1, .25, .5, 1, 2, 2.5, 5, 10, 30, 60, 300, 1800, 3600, 21600, 86400}     // seconds
	commitSizeBounds = []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}                       // operations
)

func newHistogram(bounds []float64) histogram {
	bounds = append(slices.Clip(bounds), math.Inf(1))
	return histogram{bounds: bounds, counts: make([]uint64, len(bounds))}
}

func (h *histogram) observe(v float64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[sort.SearchFloat64s(h.bounds, v)]++
	h.sum += v
}

// exposition collects Prometheus's text format 0.0.4:
// https://prometheus.io/docs/instrumenting/exposition_formats/.
type exposition struct{ text []byte }

// family starts a metric; the samples that follow belong to it.
func (e *exposition) family(name, kind, help string) {
	e.text = fmt.Appendf(e.text, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", name, help, kind)
}

func (e *exposition) sample(name, labels string, value float64) {
	e.text = fmt.Appendf(e.text, "%s%s %g\n", name, labels, value)
}

// single is a family of a single sample.
func (e *exposition) single(name, kind, help string, value float64) {
	e.family(name, kind, help)
	e.sample(name, "", value)
}

func (e *exposition) buckets(name, help string, h *histogram) {
	e.family(name, "histogram", help)
	h.mu.Lock()
	defer h.mu.Unlock()
	var n uint64
	for i, bound := range h.bounds {
		n += h.counts[i]
		e.sample(name+"_bucket", fmt.Sprintf(`{le="%g"}`, bound), float64(n))
	}
	e.sample(name+"_sum", "", h.sum)
	e.sample(name+"_count", "", float64(n))
}

// buildInfo returns the module version and the commit.
func buildInfo() (version, commit string) {
	version, commit = "unknown", "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		version = info.Main.Version
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" {
				commit = setting.Value
			}
		}
	}
	return version, commit
}

var processStarted = time.Now()

// procFigures are read if the system has Linux's /proc. A pattern may capture
// several numbers to add up.
var procFigures = []struct {
	name, kind, help, file string
	pattern                *regexp.Regexp
	unit                   float64
}{
	{"process_cpu_seconds_total", "counter", "CPU time used, by the program and by the system for it.",
		"/proc/self/stat", regexp.MustCompile(`(?s)^.*\)(?: \S+){11} (\d+) (\d+)`), 0.01}, // utime and stime: see proc(5)
	{"process_resident_memory_bytes", "gauge", "Memory in RAM.",
		"/proc/self/status", regexp.MustCompile(`(?m)^VmRSS:\s+(\d+) kB$`), 1024},
	{"process_max_fds", "gauge", "Most file descriptors that may be open.",
		"/proc/self/limits", regexp.MustCompile(`(?m)^Max open files\s+(\d+)`), 1},
}

// process adds the metrics that Prometheus's own client libraries have for every
// process, under the same names. It leaves out those that the system does not provide.
func (e *exposition) process() {
	e.family("go_info", "gauge", "Always 1; the label tells the version of Go.")
	e.sample("go_info", fmt.Sprintf(`{version="%s"}`, runtime.Version()), 1)
	e.single("go_goroutines", "gauge", "Goroutines.", float64(runtime.NumGoroutine()))
	e.single("process_start_time_seconds", "gauge", "Start of the process, in seconds since 1970.", float64(processStarted.UnixMilli())/1e3)
	for _, f := range procFigures {
		text, _ := os.ReadFile(f.file)
		if numbers := f.pattern.FindSubmatch(text); numbers != nil {
			sum := 0.0
			for _, number := range numbers[1:] {
				n, _ := strconv.ParseFloat(string(number), 64)
				sum += n
			}
			e.single(f.name, f.kind, f.help, sum*f.unit)
		}
	}
	if open, err := os.ReadDir("/proc/self/fd"); err == nil {
		e.single("process_open_fds", "gauge", "Open file descriptors.", float64(len(open)-1)) // less the descriptor of this ReadDir
	}
}
