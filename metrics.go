package main

import (
	"fmt"
	"math"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"
)

const metricsVersion = 1 // PRAGMA user_version of metrics.db

const metricsSchema = `
-- The totals of orders.db as last taken over. orders.db must never hold less.
CREATE TABLE totals (
	accepted  INTEGER NOT NULL, -- orders
	completed INTEGER NOT NULL, -- of these
	took      INTEGER NOT NULL  -- µs, sum over the completed
) STRICT;
INSERT INTO totals VALUES (0, 0, 0);`

const projectEvery = 100 * time.Millisecond // least time between two commits to metrics.db

// metrics owns metrics.db, a projection of the totals in orders.db. The two
// files cannot commit together; since the projector sets sums and does not add
// to them, a crash between the commits loses and doubles nothing.
type metrics struct {
	db    *database
	store *store
	log   *logger
	hooks hooks

	counted atomic.Pointer[sums] // what metrics.db holds
	quit    chan struct{}        // closed by close
	stopped chan struct{}        // closed when the projector has ended
}

func newMetrics(cfg config, s *store, log *logger) *metrics {
	return &metrics{
		db: &database{path: filepath.Join(cfg.data, "metrics.db"), appID: 0x6f72646d, version: metricsVersion, schema: metricsSchema,
			autoCheckpoint: 1}, // so that its counts outlive both -wal files
		store: s, log: log, hooks: cfg.hooks, quit: make(chan struct{}), stopped: make(chan struct{}),
	}
}

// project is the projector: it takes over the totals soon after they change.
func (m *metrics) project() {
	defer close(m.stopped)
	for open := true; open; {
		select {
		case <-m.store.counted:
		case <-m.quit:
			open = false
		}
		pause := projectEvery
		if err := m.take(m.store.totals.Load().sums); err != nil {
			m.log.Error("metrics.db cannot be written; its counts lag until it can", "error", err)
			nudge(m.store.counted)
			pause = retryPause
		}
		select {
		case <-time.After(pause):
		case <-m.quit:
		}
	}
}

// take makes metrics.db hold t. Called at start, it also rebuilds a metrics.db
// that was deleted or put back from a backup.
func (m *metrics) take(t sums) error {
	if *m.counted.Load() == t {
		return nil
	}
	if m.hooks.beforeProject != nil {
		m.hooks.beforeProject()
	}
	if _, err := m.db.Exec("UPDATE totals SET accepted = ?, completed = ?, took = ?", t.accepted, t.completed, t.took); err != nil {
		return explain(m.db.path, err)
	}
	m.counted.Store(&t)
	return nil
}

// close takes over the last totals. The store must be closed before.
func (m *metrics) close() error {
	close(m.quit)
	<-m.stopped
	return m.db.close()
}

// summary is the answer of GET /metrics in JSON. The two sides of it are read
// apart: they agree once the projector has caught up.
type summary struct {
	TotalOrdersProcessed  int64   `json:"total_orders_processed"`
	AverageProcessingTime float64 `json:"average_processing_time"` // seconds
	OrdersPending         int64   `json:"orders_pending"`
	OrdersProcessing      int64   `json:"orders_processing"`
	OrdersCompleted       int64   `json:"orders_completed"`
}

func (m *metrics) summary() summary {
	counted, t := m.counted.Load(), m.store.totals.Load()
	sum := summary{
		TotalOrdersProcessed: counted.completed,
		OrdersPending:        t.pending(),
		OrdersProcessing:     t.processing,
		OrdersCompleted:      t.completed,
	}
	if counted.completed > 0 {
		sum.AverageProcessingTime = float64(counted.took) / float64(counted.completed) / 1e6
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
	latencyBounds   = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10} // seconds
	durationBounds  = []float64{.001, .01, .1, .25, .5, 1, 2, 2.5, 5, 10, 30, 60, 300, 1800, 3600, 21600, 86400}     // seconds
	batchSizeBounds = []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}                       // operations
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

// route counts the requests of one method and path.
type route struct {
	method, path string
	latency      *histogram         // of its answers, or nil
	statuses     [600]atomic.Uint64 // by HTTP status code
}

// exposition writes Prometheus's text format 0.0.4:
// https://prometheus.io/docs/instrumenting/exposition_formats/.
type exposition struct{ text []byte }

// family starts a metric; the samples after it are its own.
func (e *exposition) family(name, kind, help string) {
	e.text = fmt.Appendf(e.text, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", name, help, kind)
}

func (e *exposition) sample(name, labels string, value float64) {
	e.text = fmt.Appendf(e.text, "%s%s %g\n", name, labels, value)
}

// one is a family of a single sample.
func (e *exposition) one(name, kind, help string, value float64) {
	e.family(name, kind, help)
	e.sample(name, "", value)
}

func (e *exposition) histogram(name, help string, h *histogram) {
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

// prometheus is the answer of GET /metrics to a machine.
func (s *server) prometheus() []byte {
	var e exposition
	sum, t, cache := s.metrics.summary(), s.store.totals.Load(), s.cache
	e.one("orderd_orders_processed_total", "counter", "Orders counted as processed in metrics.db.", float64(sum.TotalOrdersProcessed))
	e.one("orderd_average_processing_seconds", "gauge", "Mean time from start to completion over all orders.", sum.AverageProcessingTime)
	e.one("orderd_orders_accepted_total", "counter", "Orders in orders.db.", float64(t.accepted))
	e.family("orderd_orders", "gauge", "Orders in orders.db by status.")
	for st, n := range []int64{sum.OrdersPending, sum.OrdersProcessing, sum.OrdersCompleted} {
		e.sample("orderd_orders", fmt.Sprintf(`{status="%s"}`, status(st)), float64(n))
	}
	e.histogram("orderd_processing_seconds", "Time from start to completion, of orders since this start.", &s.pool.took)
	e.one("orderd_oldest_pending_seconds", "gauge", "Age of the oldest Pending order, 0 without one, NaN where orders.db cannot be read.", s.oldestPending())
	e.one("orderd_queue_length", "gauge", "Orders in the channel between feeder and pool.", float64(len(s.pool.queue)))
	e.one("orderd_queue_capacity", "gauge", "Places in that channel.", float64(cap(s.pool.queue)))
	e.one("orderd_orders_parked", "gauge", "Orders in a pause after a failed attempt.", float64(s.pool.parked.Load()))
	e.one("orderd_cache_entries", "gauge", "Order statuses in memory.", float64(cache.len()))
	e.one("orderd_cache_hits_total", "counter", "Status reads answered from memory.", float64(cache.hits.Load()))
	e.one("orderd_cache_misses_total", "counter", "Status reads that went to orders.db.", float64(cache.misses.Load()))
	e.histogram("orderd_create_seconds", "Time to answer POST /orders.", &s.creates)
	e.histogram("orderd_read_seconds", "Time to answer GET /orders/:order_id, of requests that were not asked to wait.", &s.reads)
	e.family("orderd_http_requests_total", "counter", "Requests by method, route and status.")
	for _, r := range s.routes {
		for code := range r.statuses {
			if n := r.statuses[code].Load(); n > 0 {
				e.sample("orderd_http_requests_total", fmt.Sprintf(`{method="%s",route="%s",status="%d"}`, r.method, r.path, code), float64(n))
			}
		}
	}
	e.histogram("orderd_commit_operations", "Creates and steps in one commit to orders.db.", &s.store.batchSizes)
	e.histogram("orderd_commit_seconds", "Time of one commit to orders.db, its fsync included.", &s.store.batchTimes)
	e.one("orderd_wal_bytes", "gauge", "Size of the write-ahead log of orders.db.", float64(s.store.walBytes()))
	e.one("orderd_log_lines_dropped_total", "counter", "Log lines lost to a full buffer or a failing disk.", float64(s.log.dropped.Load()))
	e.family("orderd_build_info", "gauge", "Always 1; the labels tell the build.")
	version, commit := buildInfo()
	e.sample("orderd_build_info", fmt.Sprintf(`{version="%s",commit="%s",goversion="%s"}`, version, commit, runtime.Version()), 1)
	return e.text
}

// oldestPending is an age in seconds.
func (s *server) oldestPending() float64 {
	first, err := s.store.oldest(pending)
	if err != nil {
		return math.NaN()
	}
	return max(0, time.Since(time.UnixMilli(first>>16)).Seconds())
}
