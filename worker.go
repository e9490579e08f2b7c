package main

import (
	"container/heap"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
)

const (
	feedRows     = 512                    // orders that the feeder reads at a time, to keep its reads short
	firstRetry   = 100 * time.Millisecond // pause after an order's first failed attempt; it doubles
	longestRetry = time.Minute
	maxParked    = 1_000_000 // orders in a pause; beyond them the feeder waits
)

// poolOptions are the pool's part of the configuration.
type poolOptions struct {
	workers int
	queue   int // capacity of the channel
	work    work
	now     func() time.Time // the wall clock
}

// work is what processing an order means. It may run twice for one order (after
// a crash), ends early when ctx is done, and returns an error for what should
// be tried again.
type work func(ctx context.Context, id ulid.ULID) error

// simulate is the stand-in for real work: it takes a while.
func simulate(delay time.Duration) work {
	return func(ctx context.Context, _ ulid.ULID) error {
		if delay == 0 {
			return nil
		}
		select {
		case <-time.After(delay):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// pool runs orders through Processing to Completed. The channel is a window on
// the table: the feeder is its only sender, the workers receive.
type pool struct {
	poolOptions
	store *store
	log   *logger
	made  time.Time

	queue  chan queued
	stored chan struct{} // capacity 1: the table has new orders
	parked *parking
	took   histogram
	active atomic.Int64 // attempts under way

	// stopping is done when the service begins to stop: no worker takes another
	// order, nobody waits for one, and readyz says no.
	stopping context.Context
	stop     context.CancelFunc
	working  context.Context // cancelled by drain: end what runs
	cancel   context.CancelFunc
	running  sync.WaitGroup // feeder, workers and who returns parked orders
}

// job is an order in the hands of the pool, whose first attempt was in this
// process. It is small, and without pointers, since a million may be parked.
type job struct {
	id       ulid.ULID
	started  int64         // Unix ms of the first attempt, by the wall clock
	began    time.Duration // the same, since the pool was made, by the monotonic clock
	due      time.Duration // of the next attempt, likewise; while it is parked
	attempts int32         // that failed
}

func newPool(o poolOptions, s *store, log *logger) *pool {
	p := &pool{
		poolOptions: o, store: s, log: log, made: time.Now(),
		queue: make(chan queued, o.queue), stored: make(chan struct{}, 1),
		took: newHistogram(durationBounds),
	}
	p.parked = newParking(p.made)
	p.stopping, p.stop = context.WithCancel(context.Background())
	p.working, p.cancel = context.WithCancel(context.Background())
	return p
}

// start begins with what the last start left unfinished.
func (p *pool) start() error {
	cursor, err := p.store.beforeBacklog()
	if err != nil {
		return err
	}
	p.running.Go(func() { p.feed(cursor) })
	p.running.Go(func() { p.parked.run(p.stopping) })
	for range p.workers {
		p.running.Go(p.serve)
	}
	return nil
}

// feed carries unfinished orders from the table to the channel, first in, first
// out. cursor is the upper half of the newest ID that it has put there.
func (p *pool) feed(cursor int64) {
	for p.stopping.Err() == nil {
		orders, err := p.store.backlog(cursor, feedRows)
		for _, o := range orders {
			if !p.push(o) {
				return
			}
			cursor = high(o.id)
		}
		switch {
		case err != nil:
			p.log.Error("the backlog cannot be read", "error", err)
			select {
			case <-time.After(retryPause):
			case <-p.stopping.Done():
			}
		case len(orders) < feedRows:
			select {
			case <-p.stored:
			case <-p.stopping.Done():
			}
		}
	}
}

// push waits for a place in the channel; false says that the pool is stopping.
func (p *pool) push(o queued) bool {
	for p.parked.len() >= maxParked {
		select {
		case <-time.After(firstRetry):
		case <-p.stopping.Done():
			return false
		}
	}
	select {
	case p.queue <- o:
		return true
	case <-p.stopping.Done():
		return false
	}
}

// serve is one worker. It takes no more orders once the pool is stopped.
func (p *pool) serve() {
	for p.stopping.Err() == nil {
		select {
		case <-p.stopping.Done():
		case o := <-p.queue:
			p.begin(o)
		case j := <-p.parked.ready:
			p.attempt(j)
		}
	}
}

// begin takes an order for the first time since the start of the process.
func (p *pool) begin(o queued) {
	j := job{id: o.id, started: p.now().UnixMilli(), began: time.Since(p.made)}
	if o.status == pending {
		p.store.step(step{id: o.id, from: pending, to: processing, started: j.started})
	}
	p.attempt(j)
}

// attempt works on an order once. One that fails sits out a pause without a
// worker and is tried again, unless the pool is ending: then it waits in the
// table for the next start.
func (p *pool) attempt(j job) {
	p.active.Add(1)
	err := p.guarded(j.id)
	p.active.Add(-1)
	if err == nil {
		took := time.Since(p.made) - j.began
		p.took.observe(took.Seconds())
		p.store.step(step{id: j.id, from: processing, to: completed, started: j.started, took: took.Microseconds()})
		return
	}
	if p.working.Err() != nil {
		return
	}
	pause := min(firstRetry<<min(j.attempts, 16), longestRetry)
	j.attempts++
	p.log.Warn("an attempt at an order failed", "order_id", j.id.String(), "attempt", j.attempts, "retry_in", pause.String(), "error", err)
	j.due = time.Since(p.made) + pause
	p.parked.park(j)
}

// guarded turns a panic in the work into an error of this attempt.
func (p *pool) guarded(id ulid.ULID) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return p.work(p.working, id)
}

// drain waits until running work has ended, and ends it at the deadline. It
// does not wait for a worker whose step finds no room in the store then: the
// store's end releases that.
func (p *pool) drain(deadline time.Time) {
	ended := make(chan struct{})
	go func() {
		p.running.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(time.Until(deadline)):
	}
	p.cancel()
}

// parking holds orders in a pause, and returns each when its pause is over.
type parking struct {
	made  time.Time     // what a job's times count from
	ready chan job      // to whichever worker is free
	wake  chan struct{} // capacity 1: another job is the first

	mu   sync.Mutex // guards jobs
	jobs jobHeap
}

func newParking(made time.Time) *parking {
	return &parking{made: made, ready: make(chan job), wake: make(chan struct{}, 1)}
}

func (p *parking) park(j job) {
	p.mu.Lock()
	defer p.mu.Unlock()
	heap.Push(&p.jobs, j)
	if p.jobs[0].id == j.id {
		nudge(p.wake)
	}
}

func (p *parking) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.jobs)
}

// first is the job that is due first.
func (p *parking) first() (j job, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.jobs) == 0 {
		return j, false
	}
	return p.jobs[0], true
}

// remove drops the first job, which a worker has taken.
func (p *parking) remove() {
	p.mu.Lock()
	defer p.mu.Unlock()
	heap.Pop(&p.jobs)
}

// run hands out what is due until the pool stops.
func (p *parking) run(stopping context.Context) {
	for stopping.Err() == nil {
		var pause <-chan time.Time
		var ready chan job
		j, ok := p.first()
		if wait := j.due - time.Since(p.made); ok && wait > 0 {
			pause = time.After(wait)
		} else if ok {
			ready = p.ready
		}
		select {
		case ready <- j:
			p.remove()
		case <-pause:
		case <-p.wake:
		case <-stopping.Done():
		}
	}
}

// jobHeap has the job that is due first at its top. See container/heap.
type jobHeap []job

func (h jobHeap) Len() int           { return len(h) }
func (h jobHeap) Less(i, k int) bool { return h[i].due < h[k].due }
func (h jobHeap) Swap(i, k int)      { h[i], h[k] = h[k], h[i] }
func (h *jobHeap) Push(j any)        { *h = append(*h, j.(job)) }

func (h *jobHeap) Pop() any {
	last := len(*h) - 1
	j := (*h)[last]
	*h = (*h)[:last]
	return j
}
