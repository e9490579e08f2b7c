package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

const (
	feedRows     = 512                    // orders that the feeder reads at a time, to keep its reads short
	firstRetry   = 100 * time.Millisecond // pause after an order's first failed attempt; it doubles
	longestRetry = time.Minute
	maxParked    = 10_000 // orders in a pause; beyond them no worker takes a new one
)

// pool runs orders through Processing to Completed. The channel is a window on
// the table: the feeder is its only sender, the workers receive.
type pool struct {
	store   *store
	log     *logger
	work    func(context.Context, order) error
	workers int

	queue   chan order
	cursor  int64        // the feeder's: upper half of the newest ID that it has put there
	retries chan job     // orders whose pause is over
	parked  atomic.Int64 // orders in a pause
	took    histogram

	// stopping is done when the service begins to stop: no worker takes another
	// order, nobody waits for one, and readyz says no.
	stopping context.Context
	stop     context.CancelFunc
	working  context.Context // cancelled by drain: end what runs
	cancel   context.CancelFunc
	running  sync.WaitGroup // feeder and workers
}

// job is an order in the hands of a worker.
type job struct {
	order
	began    time.Time // by the monotonic clock; order.started is by the wall's
	ticket   ticket
	attempts int
}

func newPool(cfg config, s *store, log *logger) *pool {
	p := &pool{
		store: s, log: log, work: simulate(cfg.delay), workers: cfg.workers,
		queue: make(chan order, cfg.queue), cursor: s.resumeAfter, retries: make(chan job),
		took: newHistogram(durationBounds),
	}
	if cfg.hooks.work != nil {
		p.work = cfg.hooks.work
	}
	p.stopping, p.stop = context.WithCancel(context.Background())
	p.working, p.cancel = context.WithCancel(context.Background())
	return p
}

// simulate is the stand-in for real work: it takes a while, and gives up when
// ctx is done. Real work may run twice for one order (after a crash), and must
// return an error for what should be tried again.
func simulate(delay time.Duration) func(context.Context, order) error {
	return func(ctx context.Context, _ order) error {
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

func (p *pool) start() {
	p.running.Go(p.feed)
	for range p.workers {
		p.running.Go(p.serve)
	}
}

// feed carries unfinished orders to the channel, first in, first out: from the
// table at start and whenever it has fallen behind, else straight from the
// batches that the writer has committed.
func (p *pool) feed() {
	p.catchUp()
	for p.stopping.Err() == nil {
		select {
		case b := <-p.store.fed:
			if b.after != p.cursor {
				p.catchUp()
				continue
			}
			for _, c := range b.creates {
				if c.stored() && !p.push(c.order) {
					return
				}
			}
		case <-p.stopping.Done():
		}
	}
}

// catchUp reads the table from the cursor to its end.
func (p *pool) catchUp() {
	for {
		orders, err := p.store.unfinished(p.cursor, feedRows)
		if err != nil {
			p.log.Error("the backlog cannot be read", "error", err)
			select {
			case <-time.After(retryPause):
				continue
			case <-p.stopping.Done():
				return
			}
		}
		if len(orders) == 0 {
			return
		}
		for _, o := range orders {
			if !p.push(o) {
				return
			}
		}
	}
}

// push waits for a place in the channel; false says that the pool is stopping.
func (p *pool) push(o order) bool {
	select {
	case p.queue <- o:
		p.cursor = high(o.id)
		return true
	case <-p.stopping.Done():
		return false
	}
}

// serve is one worker. It takes no more orders once the pool is stopped.
func (p *pool) serve() {
	for p.stopping.Err() == nil {
		queue, again := p.queue, (<-chan time.Time)(nil)
		if p.parked.Load() >= maxParked { // no new orders before some of these complete
			queue, again = nil, time.After(firstRetry)
		}
		select {
		case <-p.stopping.Done():
		case <-again:
		case o := <-queue:
			j := job{order: o, began: time.Now()}
			j.started = p.store.hooks.now().UnixMilli()
			if o.status == pending {
				j.ticket = p.store.step(step{id: o.id, from: pending, to: processing, started: j.started}, ticket{})
				j.status = processing
			}
			p.attempt(j)
		case j := <-p.retries:
			p.parked.Add(-1)
			p.attempt(j)
		}
	}
}

// attempt works on an order once. One that fails sits out a pause without a
// worker and is tried again, unless the pool is ending: then it waits in the
// table for the next start.
func (p *pool) attempt(j job) {
	err := p.guarded(j.order)
	if err == nil {
		took := time.Since(j.began)
		p.took.observe(took.Seconds())
		p.store.step(step{id: j.id, from: processing, to: completed, started: j.started, took: took.Microseconds()}, j.ticket)
		return
	}
	if p.working.Err() != nil {
		return
	}
	pause := min(firstRetry<<min(j.attempts, 16), longestRetry)
	j.attempts++
	p.log.Warn("an attempt at an order failed", "order_id", j.id.String(), "attempt", j.attempts, "retry_in", pause.String(), "error", err)
	p.parked.Add(1)
	time.AfterFunc(pause, func() {
		select {
		case p.retries <- j:
		case <-p.stopping.Done():
		}
	})
}

// guarded turns a panic in the work into an error of this attempt.
func (p *pool) guarded(o order) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return p.work(p.working, o)
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
