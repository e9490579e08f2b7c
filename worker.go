package main

import (
	"bytes"
	"cmp"
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
)

const (
	feedRows      = 512                    // orders that the feeder reads at a time, to keep its reads short
	feedPause     = 5 * time.Millisecond   // pause after a read that reached the newest order, so that the next read finds more
	firstRetry    = 100 * time.Millisecond // pause after the first failure; it doubles with each further one
	maxOrderPause = time.Minute            // longest pause of an order, also if the endpoint asks for a longer one
	maxPoolPause  = 5 * time.Second        // longest pause between trials of an endpoint in trouble, and of an order that failed because of it
	trialLimit    = 5 * time.Second        // a longer trial ends the trouble: the endpoint has taken the order and is busy with it
	troubleExtra  = 10 * time.Millisecond  // an order that failed because of trouble waits this much longer than the pool, so that another order is tried first
	maxParked     = 1_000_000              // parked orders from which on the feeder waits
	parkedPause   = 100 * time.Millisecond // between the feeder's checks whether they are fewer
)

// poolOptions are the pool's part of the configuration.
type poolOptions struct {
	workers  int
	queue    int              // capacity of the channel
	delay    time.Duration    // of simulated work, if there is no endpoint
	endpoint endpointOptions  // its url is empty if there is none
	now      func() time.Time // the wall clock
}

// work processes one order. attempt counts the order's attempts in this pool, from 1.
// The result decides what follows:
//
//	nil       the order is completed
//	*trouble  every order would fail now: the whole pool pauses, then tries one by one
//	*refusal  this order is tried again later; a pause of the pool ends
//	other     this order is tried again later; a pause of the pool goes on
//
// A work may run more than once for one order (after an error, a time-out, a stop or
// a crash), and around a fail-over on two replicas at the same time. It must end soon
// after ctx is done.
type work func(ctx context.Context, id ulid.ULID, attempt int) error

// pool runs orders through Processing to Completed. The channel is a window on
// the table: only the feeder sends to it, and the workers receive.
type pool struct {
	poolOptions
	work  work
	store *store
	log   *logger
	epoch time.Time // job.began counts from here

	channel   chan queued
	wake      chan struct{} // capacity 1: the table has new orders
	parked    *parking
	gate      *gate
	durations histogram
	active    atomic.Int64 // attempts under way
	failed    atomic.Int64 // attempts that failed

	orderWarnings, endpointWarnings *limitedLog

	// stop cancels stopping when the service begins to stop, or this replica no longer
	// leads: no worker takes another order then. A stopping service's /readyz says no.
	stopping context.Context
	stop     context.CancelFunc
	workCtx  context.Context // drain cancels it at the deadline, which cuts running work off
	cutOff   context.CancelFunc
	running  sync.WaitGroup // feeder and workers
}

// job is an order that the pool has begun. It is small (40 bytes) and without
// pointers, since maxParked of them may be parked.
type job struct {
	id        ulid.ULID
	startedMS int64         // as in order
	began     time.Duration // start of the first attempt: monotonic time since pool.epoch
	due       tick          // time of the next attempt, while the order is parked
	attempts  int32         // attempts that failed
}

func newPool(o poolOptions, s *store, log *logger) *pool {
	work := simulate(o.delay)
	if o.endpoint.url != "" {
		work = newEndpoint(o.endpoint, o.workers, s.get).post
	}
	p := &pool{
		poolOptions: o, work: work, store: s, log: log, epoch: time.Now(),
		channel: make(chan queued, o.queue), wake: make(chan struct{}, 1), parked: newParking(), gate: newGate(),
		durations: newHistogram(durationBounds), orderWarnings: &limitedLog{log: log}, endpointWarnings: &limitedLog{log: log},
	}
	p.stopping, p.stop = context.WithCancel(context.Background())
	p.workCtx, p.cutOff = context.WithCancel(context.Background())
	return p
}

// start starts the workers, and the feeder with the oldest unfinished order.
func (p *pool) start() {
	p.running.Go(p.feed)
	for range p.workers {
		p.running.Go(p.runWorker)
	}
}

// feed carries unfinished orders from the table to the channel, first in, first
// out.
func (p *pool) feed() {
	cursor := int64(0) // id_high of the newest order that is or was in the channel
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
			sleep(p.stopping, retryPause)
		case len(orders) < feedRows:
			time.Sleep(feedPause)
			select {
			case <-p.wake:
			case <-p.stopping.Done():
			}
		}
	}
}

// push sends an order to the channel, once fewer than maxParked are parked and the
// channel has room. It returns false if the pool is stopping.
func (p *pool) push(o queued) bool {
	for p.parked.len() >= maxParked {
		if !sleep(p.stopping, parkedPause) {
			return false
		}
	}
	select {
	case p.channel <- o:
		return true
	case <-p.stopping.Done():
		return false
	}
}

// runWorker is the loop of one worker. It ends once the pool is stopping. The worker
// that meets with trouble and shuts the gate probes the endpoint.
func (p *pool) runWorker() {
	for p.stopping.Err() == nil {
		shut, changed := p.gate.state()
		if shut {
			select {
			case <-changed:
			case <-p.stopping.Done():
			}
			continue
		}
		j, ok := p.next(changed)
		if !ok {
			continue
		}
		err := p.attempt(j)
		if t, ok := errors.AsType[*trouble](err); ok && p.gate.set(true) {
			p.probe(t, j.id)
		}
	}
}

// next waits for a new order or a parked one that is due. ok is false if it got none
// because of interrupted or a stop, or because another worker took the parked one.
func (p *pool) next(interrupted <-chan struct{}) (j job, ok bool) {
	select {
	case o := <-p.channel:
		return p.begin(o), true
	case <-p.parked.ready:
		return p.parked.unpark(time.Now())
	case <-interrupted:
	case <-p.stopping.Done():
	}
	return j, false
}

// begin makes the job of an order that is new to this pool, and stores its step to
// Processing.
func (p *pool) begin(o queued) job {
	j := job{id: o.id, startedMS: p.now().UnixMilli(), began: time.Since(p.epoch)}
	if o.status == pending {
		p.store.step(transition{id: o.id, from: pending, to: processing, startedMS: j.startedMS})
	}
	return j
}

// attempt works on an order once. If the work fails, attempt parks the order for a
// pause. If drain cut the work off, the order waits in the table for the next start.
func (p *pool) attempt(j job) error {
	p.active.Add(1)
	err := p.runSafely(j)
	p.active.Add(-1)
	switch {
	case err == nil:
		p.complete(j)
	case p.workCtx.Err() != nil:
		return p.workCtx.Err() // drain cut the work off
	default:
		p.failed.Add(1)
		p.postpone(j, err)
	}
	return err
}

// runSafely turns a panic in the work into an error of this attempt.
func (p *pool) runSafely(j job) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return p.work(p.workCtx, j.id, int(j.attempts)+1)
}

func (p *pool) complete(j job) {
	took := time.Since(p.epoch) - j.began
	p.durations.observe(took.Seconds())
	p.store.step(transition{id: j.id, from: processing, to: completed, startedMS: j.startedMS, tookMicros: took.Microseconds()})
}

// postpone parks an order after an attempt that failed, and logs the failure, except
// for trouble, which probe logs.
func (p *pool) postpone(j job, err error) {
	j.attempts++
	pause := backoff(j.attempts, maxOrderPause)
	due := time.Now().Add(pause)
	if t, ok := errors.AsType[*trouble](err); ok {
		due = t.pauseEnd(j.attempts).Add(troubleExtra)
	} else {
		p.orderWarnings.warn("an attempt at an order failed", "order_id", j.id.String(), "attempt", j.attempts, "retry_in", pause.String(), "error", err)
	}
	p.parked.park(j, due)
}

// backoff returns the pause after that many failures in a row; failures is at least 1.
func backoff(failures int32, longest time.Duration) time.Duration {
	return min(firstRetry<<min(failures-1, 16), longest)
}

// probe tries an endpoint in trouble with one order at a time, while the other
// workers pause. It opens the gate once an attempt is answered without trouble or
// lasts longer than trialLimit. An attempt that times out before that is no answer.
func (p *pool) probe(t *trouble, id ulid.ULID) {
	p.endpointWarnings.warn("the endpoint is in trouble: orders wait until it answers", "order_id", id.String(), "error", t)
	began := time.Now()
	lastWarned := began
	endTrouble := func() {
		p.gate.set(false)
		p.endpointWarnings.warn("the endpoint takes orders again: they go on", "after", time.Since(began).String())
	}
	for trials := int32(0); ; trials++ {
		pauseEnd := t.pauseEnd(trials + 1)
		if !sleep(p.stopping, time.Until(pauseEnd)) {
			return
		}
		if time.Since(lastWarned) >= time.Minute {
			lastWarned = time.Now()
			p.endpointWarnings.warn("the endpoint is still in trouble", "for", lastWarned.Sub(began).String(), "trials", trials, "error", t)
		}
		j, ok := p.nextTrial(pauseEnd)
		if !ok {
			return
		}
		lasting := time.AfterFunc(trialLimit, endTrouble)
		err := p.attempt(j)
		if !lasting.Stop() {
			return // endTrouble has opened the gate, or is about to: if the trouble is not over, another worker meets with it
		}
		if t, ok = errors.AsType[*trouble](err); ok {
			continue
		}
		if err == nil || errors.As(err, new(*refusal)) {
			endTrouble()
			return
		}
		t = &trouble{error: err, since: time.Now()}
	}
}

// nextTrial returns the parked order that is due first, if it is due by pauseEnd,
// or waits for the next order.
func (p *pool) nextTrial(pauseEnd time.Time) (j job, ok bool) {
	j, ok = p.parked.unpark(pauseEnd)
	for !ok && p.stopping.Err() == nil {
		j, ok = p.next(nil)
	}
	return j, ok
}

// drain waits until running work has ended, and cancels it at the deadline. It
// does not wait longer for a worker whose step waits for room in the store:
// closing the store releases that worker.
func (p *pool) drain(deadline time.Time) {
	ended := make(chan struct{})
	go func() {
		p.running.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-p.store.failed(): // what is at work cannot be completed any more
	case <-time.After(time.Until(deadline)):
	}
	p.cutOff()
}

// ---- The gate, and the orders that pause. ----

// gate keeps workers from taking orders while it is shut.
type gate struct {
	mu      sync.Mutex // guards the rest
	shut    bool
	changed chan struct{} // closed and replaced when shut changes
}

func newGate() *gate { return &gate{changed: make(chan struct{})} }

func (g *gate) state() (shut bool, changed <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.shut, g.changed
}

// set shuts or opens the gate, and reports whether that changed its state.
func (g *gate) set(shut bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut == shut {
		return false
	}
	g.shut = shut
	close(g.changed)
	g.changed = make(chan struct{})
	return true
}

// parking holds orders that pause between two attempts.
type parking struct {
	epoch time.Time     // ticks count from here
	ready chan struct{} // capacity 1: a job may be due
	timer *time.Timer   // nudges ready when the first job is due

	mu   sync.Mutex // guards jobs
	jobs jobHeap
}

// tick is a time in units of 10 ms since parking.epoch. It wraps around after 497
// days, so ticks must be compared by sub.
type tick uint32

const tickLength = 10 * time.Millisecond

func (t tick) sub(other tick) time.Duration { return time.Duration(int32(t-other)) * tickLength }

func newParking() *parking {
	p := &parking{epoch: time.Now(), ready: make(chan struct{}, 1)}
	p.timer = time.AfterFunc(maxOrderPause, func() { nudge(p.ready) })
	return p
}

func (p *parking) tickAt(t time.Time) tick { return tick(t.Sub(p.epoch) / tickLength) }

func (p *parking) park(j job, due time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	j.due = p.tickAt(due) + 1 // rounded up
	heap.Push(&p.jobs, j)
	p.arm()
}

// unpark removes the job that is due first, if it is due by now.
func (p *parking) unpark(now time.Time) (j job, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.jobs.n > 0 && p.jobs.at(0).due.sub(p.tickAt(now)) <= 0 {
		j, ok = heap.Pop(&p.jobs).(job), true
	}
	p.arm()
	return j, ok
}

// arm makes a worker look again once the first job is due. The caller holds p.mu.
func (p *parking) arm() {
	if p.jobs.n == 0 {
		return
	}
	if wait := p.jobs.at(0).due.sub(p.tickAt(time.Now())); wait > 0 {
		p.timer.Reset(wait)
	} else {
		nudge(p.ready)
	}
}

func (p *parking) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.jobs.n
}

const heapChunk = 1024 // jobs, 40 KB

// jobHeap is a heap of jobs by due time, for container/heap. It grows and shrinks
// by chunks, so that growing copies no job.
type jobHeap struct {
	chunks []*[heapChunk]job
	n      int
}

func (h *jobHeap) at(i int) *job      { return &h.chunks[i/heapChunk][i%heapChunk] }
func (h *jobHeap) Len() int           { return h.n }
func (h *jobHeap) Less(i, k int) bool { return h.at(k).due.sub(h.at(i).due) > 0 }
func (h *jobHeap) Swap(i, k int)      { *h.at(i), *h.at(k) = *h.at(k), *h.at(i) }

func (h *jobHeap) Push(j any) {
	if h.n == len(h.chunks)*heapChunk {
		h.chunks = append(h.chunks, new([heapChunk]job))
	}
	*h.at(h.n) = j.(job)
	h.n++
}

func (h *jobHeap) Pop() any {
	h.n--
	j := *h.at(h.n)
	if last := h.n / heapChunk; h.n%heapChunk == 0 {
		h.chunks[last] = nil
		h.chunks = h.chunks[:last]
	}
	return j
}

const linesASecond = 5 // of each kind of failure

// limitedLog logs warnings that may come in any number. It leaves out those beyond
// linesASecond, and the next line says how many it left out.
type limitedLog struct {
	log *logger

	mu      sync.Mutex // guards the rest
	since   time.Time  // start of the second that lines counts
	lines   int
	leftOut int // lines left out since the last one written
}

func (f *limitedLog) warn(message string, attributes ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.since) >= time.Second {
		f.since, f.lines = now, 0
	}
	if f.lines == linesASecond {
		f.leftOut++
		return
	}
	f.log.Warn(message, append(attributes, "left_out", f.leftOut)...)
	f.lines++
	f.leftOut = 0
}

// ---- The work. ----

// simulate returns a stand-in for real work, which only pauses.
func simulate(delay time.Duration) work {
	return func(ctx context.Context, _ ulid.ULID, _ int) error {
		if delay == 0 {
			return nil
		}
		if !sleep(ctx, delay) {
			return ctx.Err()
		}
		return nil
	}
}

// trouble is an error that every order would meet now: the endpoint is down or
// overloaded.
type trouble struct {
	error
	since      time.Time     // when the answer came or the connection broke, or when connecting began; the pause counts from here
	retryAfter time.Duration // pause that the endpoint asks for, or 0
}

// pauseEnd returns when the pause after that many failures in a row ends.
func (t *trouble) pauseEnd(failures int32) time.Time {
	return t.since.Add(cmp.Or(t.retryAfter, backoff(failures, maxPoolPause)))
}

// refusal is an answer that neither completes the order nor means trouble.
type refusal struct{ error }

const (
	idleTimeout   = 4 * time.Second // of a connection to the endpoint; below that of most servers, or an attempt may meet one that the endpoint is closing
	dialTimeout   = 2 * time.Second // of connecting to the endpoint, and again of the TLS handshake; together they are below trialLimit
	maxAnswer     = 16 << 10        // bytes of an answer's body that are read, so that its connection can be used again
	maxAnswerTime = time.Second     // for reading that body
)

// endpointOptions say where the work is done.
type endpointOptions struct {
	url     string
	timeout time.Duration // of one attempt
	token   string        // bearer token that requests carry, or empty
}

// endpoint is the user's HTTP server that does the work.
type endpoint struct {
	endpointOptions
	client *http.Client
	find   func(ulid.ULID) (order, error)
}

func newEndpoint(o endpointOptions, connections int, find func(ulid.ULID) (order, error)) *endpoint {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DialContext, transport.TLSHandshakeTimeout = (&net.Dialer{Timeout: dialTimeout}).DialContext, dialTimeout
	transport.IdleConnTimeout = idleTimeout
	transport.MaxConnsPerHost, transport.MaxIdleConnsPerHost, transport.MaxIdleConns = connections, connections, connections
	return &endpoint{endpointOptions: o, find: find, client: &http.Client{
		Transport: transport,
		// A redirect must not lead to a login page whose 200 would complete the order.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// post sends an order to the endpoint and waits for the answer. A time-out after
// connecting is a failure of this order alone; any other failed connection is trouble.
func (e *endpoint) post(ctx context.Context, id ulid.ULID, attempt int) error {
	began := time.Now()
	var connected atomic.Bool
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	request, err := e.request(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { connected.Store(true) },
	}), id, attempt)
	if err != nil {
		return err
	}
	answer, err := e.client.Do(request)
	switch {
	case err != nil && connected.Load() && ctx.Err() != nil:
		return fmt.Errorf("no answer within %s", e.timeout)
	case err != nil && connected.Load():
		return &trouble{error: err, since: time.Now()}
	case err != nil:
		return &trouble{error: err, since: began}
	}
	defer answer.Body.Close()
	defer time.AfterFunc(maxAnswerTime, cancel).Stop()
	io.Copy(io.Discard, io.LimitReader(answer.Body, maxAnswer))
	return verdict(answer)
}

// verdict turns an answer's status code into the result of the work.
func verdict(answer *http.Response) error {
	code := answer.StatusCode
	if code >= 200 && code <= 299 {
		return nil
	}
	err := fmt.Errorf("the endpoint answered %d %s", code, http.StatusText(code))
	switch code {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return &trouble{err, time.Now(), retryAfter(answer.Header.Get("Retry-After"))}
	}
	return &refusal{err}
}

// request reads the order and makes the POST that carries it.
func (e *endpoint) request(ctx context.Context, id ulid.ULID, attempt int) (*http.Request, error) {
	o, err := e.find(id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the order: %w", err)
	}
	body, err := json.Marshal(struct {
		OrderID     string      `json:"order_id"`
		UserID      string      `json:"user_id"`
		ItemIDs     string      `json:"item_ids"`
		TotalAmount json.Number `json:"total_amount"`
		CreatedAt   string      `json:"created_at"`
	}{o.id.String(), o.userID, o.itemIDs, o.amount(), timestamp(int64(o.id.Time()))})
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, e.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.GetBody = nil // else net/http would repeat the attempt by itself if a connection breaks
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", o.id.String())
	r.Header.Set("Orderd-Attempt", strconv.Itoa(attempt))
	if e.token != "" {
		r.Header.Set("Authorization", "Bearer "+e.token)
	}
	return r, nil
}

// retryAfter parses a Retry-After header, which holds seconds or a date. It returns
// at most maxOrderPause, and 0 for anything else or a time that has passed.
func retryAfter(value string) (wait time.Duration) {
	if at, err := http.ParseTime(value); err == nil {
		wait = time.Until(at)
	} else if seconds, err := strconv.ParseUint(value, 10, 64); err == nil || errors.Is(err, strconv.ErrRange) {
		wait = time.Duration(min(seconds, uint64(maxOrderPause/time.Second))) * time.Second
	}
	return min(max(0, wait), maxOrderPause)
}
