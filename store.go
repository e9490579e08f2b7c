package main

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// ---- The domain: orders, their steps, the totals, and what can go wrong. ----

// order is one row. Its ULID holds its time of creation and its place in the
// queue, because the writer makes the IDs in commit order.
type order struct {
	id         ulid.ULID
	userID     string
	itemIDs    string // comma-separated, no spaces around the commas
	cents      int64
	status     status
	startedMS  int64 // Unix ms of the first attempt since the last start, by the wall clock; 0 while Pending
	tookMicros int64 // µs from the start to the completion, by the monotonic clock; 0 until Completed
}

// amount returns the exact total as a JSON number.
func (o *order) amount() json.Number {
	return json.Number(fmt.Sprintf("%d.%02d", o.cents/100, o.cents%100))
}

// timestamp returns Unix ms as JSON shows it: RFC 3339, in UTC.
func timestamp(ms int64) string {
	return time.UnixMilli(ms).UTC().Format("2006-01-02T15:04:05.000Z07:00")
}

// high returns id_high, the half of an ID that is the primary key: 48 bits of
// Unix ms and 16 bits of sequence. low returns id_low, the random half.
func high(id ulid.ULID) int64 { return int64(binary.BigEndian.Uint64(id[:8])) }
func low(id ulid.ULID) int64  { return int64(binary.BigEndian.Uint64(id[8:])) }

func joinID(high, low int64) (id ulid.ULID) {
	binary.BigEndian.PutUint64(id[:8], uint64(high))
	binary.BigEndian.PutUint64(id[8:], uint64(low))
	return id
}

// creation is an order on its way into the table.
type creation struct {
	order
	key      string    // idempotency key, or empty
	newID    ulid.ULID // set by the writer: the ID that the order gets if it is stored
	replayed bool      // the field order is the one that the key created earlier
	err      error     // why this create alone failed, or nil
}

// replay answers c with the order that its key created earlier if both have the
// same content, else with errKeyReused.
func (c *creation) replay(earlier order) {
	if earlier.userID == c.userID && earlier.itemIDs == c.itemIDs && earlier.cents == c.cents {
		c.order, c.replayed, c.err = earlier, true, nil
	} else {
		c.err = errKeyReused
	}
}

// reset undoes what a rolled back attempt to commit c has set.
func (c *creation) reset() { c.id, c.replayed, c.err = c.newID, false, nil }

// stored reports whether c made a new order. Call it after the commit.
func (c *creation) stored() bool { return !c.replayed && c.err == nil }

// transition is one order's move to a later status.
type transition struct {
	id                    ulid.ULID
	from, to              status
	startedMS, tookMicros int64 // as in order
	void                  bool  // set by the engine: the order did not have status from, so nothing changed
}

// totals are counts and sums over all orders. Every commit writes them together
// with its orders (SQLite: table totals; PostgreSQL: the row in leader), as the
// outbox to metrics.db, which copies them: copying twice does no harm.
type totals struct {
	identity      int64 // of the database: a random number, made with it
	seq           int64 // commits so far; a commit succeeds only on the seq that the previous one left
	accepted      int64 // orders ever
	processing    int64 // orders now
	completed     int64 // orders ever
	sumTook       int64 // µs, sum over the completed
	removed       int64 // completed orders that are no longer in the table
	newest        int64 // id_high of the newest order ever
	newestStarted int64 // id_high of the newest order that ever left Pending
}

// logCorrection logs that t was wrong, because somebody changed the table by hand.
func logCorrection(log *logger, t, corrected totals) {
	log.Warn("the totals did not agree with the orders, which somebody has changed: they were counted anew",
		"accepted", corrected.accepted, "were", t.accepted, "completed", corrected.completed, "completed_were", t.completed)
}

func (t totals) pending() int64    { return t.accepted - t.processing - t.completed }
func (t totals) unfinished() int64 { return t.accepted - t.completed }

// with returns the totals as they are after the commit of b.
func (t totals) with(b *batch) totals {
	t.seq++
	for _, c := range b.creates {
		if c.stored() {
			t.accepted++
			t.newest = max(t.newest, high(c.id))
		}
	}
	for _, st := range b.steps {
		if st.void {
			continue
		}
		t.newestStarted = max(t.newestStarted, high(st.id))
		if st.from == processing {
			t.processing--
		}
		if st.to == processing {
			t.processing++
		} else {
			t.completed++
			t.sumTook += st.tookMicros
		}
	}
	t.removed += int64(len(b.removed))
	return t
}

// census is a count of the orders in the table, which the totals are checked against.
type census struct {
	pending, processing, final int64 // orders
	sumTook                    int64 // µs, sum over the final
	newest, newestStarted      int64 // as in totals
}

// matches reports whether t agrees with the counts that are cheap: unfinished
// orders, which have an index, and newest. The rest needs a scan of the whole table.
func (c census) matches(t totals) bool {
	return c.pending == t.pending() && c.processing == t.processing && c.newest <= t.newest
}

// correct returns t with the counts of c, for the next commit to write. sumTook
// stays as it is if orders were removed, because their times are gone.
func (c census) correct(t totals) totals {
	t.seq++
	t.completed = t.removed + c.final
	t.accepted = t.completed + c.pending + c.processing
	t.processing = c.processing
	t.newest, t.newestStarted = max(t.newest, c.newest), max(t.newestStarted, c.newestStarted)
	if t.removed == 0 {
		t.sumTook = c.sumTook
	}
	return t
}

// expiry asks a commit to remove some completed orders, oldest IDs first, together
// with their idempotency keys and their rows in the index of users.
type expiry struct {
	after  int64 // id_high; only newer orders are removed
	before int64 // Unix ms; only orders created and completed earlier are removed

	// Set by the engine:
	examined int   // number of orders that were examined
	through  int64 // id_high up to which they were examined; the next expiry begins after it
	ended    bool  // the sweep is over: no newer order can have expired, or the expiry failed
}

// filter is what a list asks for. Without an upper bound, before is math.MaxInt64.
type filter struct {
	before int64 // id_high; only older orders are listed
	userID string
	status *status
	limit  int
}

// page is a part of a list, newest first.
type page struct {
	orders []order
	next   ulid.ULID // the next page holds orders older than this one; zero on the last page
}

// queued is an unfinished order as the feeder reads it, without the content: that
// stays in the table until the work reads it.
type queued struct {
	id     ulid.ULID
	status status
}

// These errors say why a create is refused, and that nothing of its order is
// stored. A fourth reason is errInDoubt below.
var (
	errBusy       = errors.New("too many orders wait to be written")
	errUnwritable = errors.New("the store cannot be written")
	errClosed     = errors.New("the store is closed")
)

// These errors are about one order.
var (
	errNotFound  = errors.New("no such order")
	errKeyReused = errors.New("the idempotency key was used with other content")
	errRejected  = errors.New("the table does not take this order")
)

// These errors refuse a read whose result may be outdated or not confirmed yet.
var (
	errBehind = errors.New("a commit is not confirmed yet")
	errSilent = errors.New("the database has not answered for too long")
)

// A commit that fails returns one of these errors, which wraps the cause. They have
// these consequences:
//
//	the commit's error  its creates are told  later creates are told  the writer
//	errNotWritten       errUnwritable         errUnwritable           commits the steps again
//	errInDoubt          errOutcomeUnknown     errInDoubt              commits the same batch again
//	errOutcomeUnknown   errOutcomeUnknown     errInDoubt              gives up
//	errBroken           errUnwritable         errUnwritable           gives up
//	errDeposed          errUnwritable         errUnwritable           gives up
var (
	errNotWritten     = errors.New("nothing was written")
	errInDoubt        = errors.New("the outcome of a commit is not known yet") // repeating the same commit finds out
	errOutcomeUnknown = errors.New("the outcome of the commit is unknown")     // only a new start of orderd finds out
	errBroken         = errors.New("the orders cannot be written any longer")  // no retry mends that
	errDeposed        = errors.New("another replica leads")                    // nothing was written, unless the error wraps errOutcomeUnknown too
)

// ---- The store: the one door to orders. ----

// Limits of the open batch. A create beyond them is refused; a worker's step waits.
const (
	maxCreates     = 4096
	maxCreateBytes = 16 << 20 // bytes of text in its creates
	maxSteps       = 8192
)

const (
	maxStepDelay = 5 * time.Millisecond   // longest delay of a batch without creates, so that its fsync is shared
	retryPause   = time.Second            // pause before a failed write, checkpoint or read of the backlog is tried again
	tidyEvery    = 500 * time.Millisecond // pause between calls of tidy while nothing is written
	stalledAfter = 2 * time.Second        // if the writer works on a batch for longer, /readyz answers 503
	publishPause = 100 * time.Microsecond // polling interval of await
	maxBehind    = 2 * time.Second        // longest wait of a read until the commit that it saw is published
)

// engine stores orders durably. Only the writer calls commit and tidy. find,
// findKey and list also return the seq that they saw: the last commit in the table.
type engine interface {
	// start makes or upgrades the schema, checks the totals, and returns them.
	start() (totals, error)
	// commit writes a whole batch or nothing of it. Its error wraps one of the errors
	// above. It sets
	//   - the batch's totals: after errNotWritten, those that the table holds then;
	//   - in each create, after creation.reset: err, if the table refuses this order
	//     alone, or, with creation.replay, the order that its key created earlier;
	//   - void in each step;
	//   - removed, and the expiry's results. If an expiry fails, commit goes on without.
	// After errInDoubt, the writer's next call has a copy of the same batch.
	commit(*batch) error
	// tidy does upkeep between batches, for which nobody waits (SQLite: checkpoints;
	// PostgreSQL: beats). It returns the totals after that. Its errors are commit's.
	tidy() (totals, error)
	// current returns an error if what was just read may be outdated and must not be
	// shown. Call it after the read. SQLite always returns nil.
	current() error

	// The reads may run at the same time. find and findKey return errNotFound together
	// with the seq that they saw; any other error comes with seq 0.
	find(id ulid.ULID) (o order, seq int64, err error)
	findKey(key string) (o order, seq int64, err error)
	// list returns a page, newest first, which may end early after readBytes of text.
	list(filter) (p page, seq int64, err error)
	// backlog returns at most limit unfinished orders above the id_high after, in order.
	backlog(after int64, limit int) ([]queued, error)
	// oldest returns the id_high of the oldest order in an unfinished status, or math.MaxInt64.
	oldest(status) (idHigh int64, err error)

	// close releases the engine. SQLite leaves its files open if an outcome is unknown,
	// because nothing may be synced again then. PostgreSQL hands over to a standby.
	close() error
}

// gauge is a metric that only one engine has.
type gauge struct {
	name, help string
	value      float64
}

// oneIf returns the value of a yes-or-no gauge: 1 for true, 0 for false.
func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// storeOptions are the store's part of the configuration.
type storeOptions struct {
	cache int              // statuses in memory
	keep  time.Duration    // how long completed orders stay; 0 is for ever
	now   func() time.Time // the wall clock; tests replace it, here and in the pool
}

// store takes creates and steps, hands them to its writer in batches, and
// answers reads from the cache or the engine.
//
// A read never shows an older state than an earlier answer did. seq counts the
// commits. The writer commits, then changes the cache, then publishes the commit's
// totals, and only then answers. The table shows a commit before the cache does, so
// a read of the table returns the seq that it saw, and await holds the answer back
// until that seq is published. engine.current says whether this process may still
// show anything: with PostgreSQL, another replica may lead by now.
type store struct {
	engine    engine
	cache     *cache
	intake    *intake
	writer    *writer
	published *atomic.Pointer[totals] // totals of the last commit that is durable and in the cache
}

func newStore(e engine, o storeOptions, log *logger) *store {
	s := &store{engine: e, cache: newCache(o.cache), intake: newIntake(), published: &atomic.Pointer[totals]{}}
	s.writer = &writer{engine: e, intake: s.intake, cache: s.cache, published: s.published, log: log, now: o.now,
		retention: &retention{keep: o.keep, now: o.now, log: log}}
	return s
}

// start starts the engine and the writer. The writer calls onCommit on its own
// goroutine after each batch that it has written.
func (s *store) start(onCommit func(commitReport)) error {
	t, err := s.engine.start()
	if err != nil {
		return err
	}
	s.published.Store(&t)
	s.writer.lastID, s.writer.onCommit = t.newest, onCommit
	s.writer.retention.start()
	s.writer.quit, s.writer.stopped = make(chan struct{}), make(chan struct{})
	go s.writer.run()
	return nil
}

// create puts an order into the open batch and returns once that batch is on disk
// or has failed. The writer gives c.order its ID. If the idempotency key has already
// created an order, create returns that order, even while creates are refused.
func (s *store) create(c *creation) error {
	b, err := s.intake.add(c)
	if err == nil {
		<-b.done
		err = b.err
	}
	if err != nil && c.key != "" {
		err = s.answerByKey(c, err)
	}
	return cmp.Or(err, c.err)
}

// answerByKey answers a create that failed with err. If its key created an order
// earlier, it replays that order and returns nil; otherwise it returns an error.
func (s *store) answerByKey(c *creation, err error) error {
	earlier, findErr := s.whenShowable(s.engine.findKey(c.key))
	switch {
	case findErr == nil:
		c.replay(earlier)
		return nil
	case errors.Is(err, errInDoubt): // the commit in doubt may hold the key's first create
		return errOutcomeUnknown
	}
	return err
}

// step adds a step to the open batch. It does not wait for the step's commit; it
// waits only while the batch is full. After the writer has ended it drops the step:
// the next start takes up the order again.
func (s *store) step(st transition) {
	for {
		full := s.intake.addStep(st)
		if full == nil {
			return
		}
		select {
		case <-full.done:
		case <-s.writer.stopped:
			return
		}
	}
}

// status reads an order's status from the cache, or on a miss from the table.
func (s *store) status(id ulid.ULID) (status, error) {
	if st, ok := s.cache.get(id); ok {
		return st, s.engine.current()
	}
	o, err := s.get(id)
	return o.status, err
}

// wait returns once the order is final or ctx is done. It returns an error only if
// the order cannot be read.
func (s *store) wait(ctx context.Context, id ulid.ULID) error {
	final, stop := s.cache.watch(id)
	defer stop()
	if st, err := s.status(id); err != nil || st.final() {
		return err
	}
	select {
	case <-final:
	case <-ctx.Done():
	}
	return nil
}

// get reads an order from the table.
func (s *store) get(id ulid.ULID) (order, error) {
	o, seq, err := s.engine.find(id)
	if o, err = s.whenShowable(o, seq, err); err == nil {
		s.cache.learn(id, o.status, seq)
	}
	return o, err
}

func (s *store) list(f filter) (page, error) {
	p, seq, err := s.engine.list(f)
	return p, cmp.Or(s.await(seq), s.engine.current(), err)
}

// whenShowable waits until the result of a read may be shown, or returns an error
// that says why it may not. A failed read has seq 0 and does not wait. err comes
// last because errNotFound is a result, too, and may be outdated like any other.
func (s *store) whenShowable(o order, seq int64, err error) (order, error) {
	return o, cmp.Or(s.await(seq), s.engine.current(), err)
}

// await returns once the commit seq is published. Without it, a read of the table
// could show a commit that is not in the cache yet, and the next read, which the
// cache answers, would go back to an older status.
func (s *store) await(seq int64) error {
	for began := time.Now(); s.publishedTotals().seq < seq; time.Sleep(publishPause) {
		if time.Since(began) > maxBehind {
			return errBehind
		}
	}
	return nil
}

// backlog: see engine.
func (s *store) backlog(after int64, limit int) ([]queued, error) {
	return s.engine.backlog(after, limit)
}

// oldest: see engine.
func (s *store) oldest(st status) (idHigh int64, err error) { return s.engine.oldest(st) }

// publishedTotals returns the totals of the last published commit.
func (s *store) publishedTotals() totals { return *s.published.Load() }

// showableTotals returns the published totals, or an error if they may not be shown.
func (s *store) showableTotals() (totals, error) { return s.publishedTotals(), s.engine.current() }

// clockBehind returns how far the newest order's time is ahead of the clock, or 0.
func (s *store) clockBehind() time.Duration {
	return max(0, time.UnixMilli(s.publishedTotals().newest>>16).Sub(s.writer.now()))
}

// ready returns an error if a create would be refused now, or would wait too long.
func (s *store) ready() error { return s.intake.ready() }

// failed returns a channel that is closed when the writer has ended. If the writer
// gave up, close says why.
func (s *store) failed() <-chan struct{} { return s.writer.stopped }

// close has the writer commit the open batch, then closes the engine. If the writer
// gave up, the error says why.
func (s *store) close() error {
	s.intake.close()
	if s.writer.quit != nil { // it was started
		close(s.writer.quit)
		<-s.writer.stopped
	}
	err := s.engine.close()
	if err != nil && errors.Is(s.writer.failure, err) {
		err = nil // the failure already says why SQLite's files stay open
	}
	return errors.Join(s.writer.failure, err)
}

// batch is the content of one commit. Creates and steps share it, so that they share
// an fsync. The intake owns a batch while it is open, then the writer until done is
// closed, and after that the callers that waited for it.
type batch struct {
	creates []*creation
	steps   []transition
	bytes   int               // length of the text in creates
	stepOf  map[ulid.ULID]int // index in steps, by order
	expiry  *expiry           // or nil
	done    chan struct{}     // closed by release
	err     error             // result of the commit for every create, without the cause; set by release

	totals  totals      // set by the engine: the totals after this commit
	removed []ulid.ULID // set by the engine: orders that this commit removed
	again   *batch      // set by writer.fail if the outcome is in doubt: a copy for the next attempt
}

func newBatch(steps []transition) *batch {
	b := &batch{steps: steps, stepOf: map[ulid.ULID]int{}, done: make(chan struct{})}
	for i, st := range steps {
		b.stepOf[st.id] = i
	}
	return b
}

// retryCopy returns a copy of b for another attempt, for which no create waits.
func (b *batch) retryCopy() *batch {
	next := newBatch(b.steps)
	next.bytes, next.expiry, next.removed = b.bytes, b.expiry, b.removed
	for _, c := range b.creates {
		if c.err == nil { // else it was left out
			next.creates = append(next.creates, new(*c)) // the original is its caller's again once b is released
		}
	}
	return next
}

// skipExpiry takes a failed expiry out of b, and leaves its orders to a later sweep.
func (b *batch) skipExpiry(log *logger, cause error) {
	log.Warn("orders that were kept long enough could not be removed", "error", cause)
	b.expiry.ended, b.expiry, b.removed = true, nil, nil
}

func (b *batch) changes() int { return len(b.creates) + len(b.steps) + len(b.removed) }

// move adds a step. It merges a second step of the same order into the first,
// because a commit moves an order at most once.
func (b *batch) move(st transition) {
	if i, ok := b.stepOf[st.id]; ok {
		st.from = b.steps[i].from
		b.steps[i] = st
		return
	}
	b.stepOf[st.id] = len(b.steps)
	b.steps = append(b.steps, st)
}

// release answers everyone who waits for the batch. b.err is err from then on.
func (b *batch) release(err error) {
	b.err = err
	close(b.done)
}

// intake holds the open batch and decides whether creates are taken.
type intake struct {
	wake    chan struct{} // capacity 1; a create, or a batch full of steps, waits for the writer
	stepped chan struct{} // capacity 1; a step waits for the writer, which may delay it by maxStepDelay

	mu        sync.Mutex // guards the rest
	open      *batch
	busySince time.Time // when the writer took the batch that it works on; zero while it has none
	refusing  error     // why creates are refused now, or nil
	closed    bool
}

func newIntake() *intake {
	return &intake{wake: make(chan struct{}, 1), stepped: make(chan struct{}, 1), open: newBatch(nil)}
}

// add puts a create into the open batch, and returns the batch to wait for.
func (in *intake) add(c *creation) (*batch, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if err := in.refusal(); err != nil {
		return nil, err
	}
	in.open.creates = append(in.open.creates, c)
	in.open.bytes += len(c.userID) + len(c.itemIDs) + len(c.key)
	nudge(in.wake)
	return in.open, nil
}

// addStep puts a step into the open batch, or returns that batch if it is full.
func (in *intake) addStep(st transition) (full *batch) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.open.steps) == maxSteps {
		nudge(in.wake)
		return in.open
	}
	in.open.move(st)
	nudge(in.stepped)
	return nil
}

// refusal returns why a create is refused now, or nil. The caller holds in.mu.
func (in *intake) refusal() error {
	switch {
	case in.closed:
		return errClosed
	case in.refusing != nil:
		return in.refusing
	case len(in.open.creates) >= maxCreates || in.open.bytes >= maxCreateBytes:
		return errBusy
	}
	return nil
}

var errStalled = fmt.Errorf("a write has taken more than %s and has not ended", stalledAfter)

func (in *intake) ready() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	err := in.refusal()
	if err == nil && !in.busySince.IsZero() && time.Since(in.busySince) > stalledAfter {
		err = errStalled
	}
	return err
}

// take hands the open batch to the writer and opens the next one.
func (in *intake) take() *batch {
	in.mu.Lock()
	defer in.mu.Unlock()
	b := in.open
	in.open, in.busySince = newBatch(nil), time.Now()
	return b
}

// finished notes that the writer is done with the batch that it took.
func (in *intake) finished() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.busySince = time.Time{}
}

func (in *intake) creates() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.open.creates)
}

// refuse makes creates fail with err from now on, including those in the open batch,
// whose steps stay. It reports whether err is a new reason.
func (in *intake) refuse(err error) (changed bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	changed = in.refusing != err
	in.refusing = err
	if waiting := in.open; len(waiting.creates) > 0 {
		in.open = newBatch(waiting.steps)
		waiting.release(err)
	}
	return changed
}

// accept takes creates again, and reports whether they were refused before.
func (in *intake) accept() (changed bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	changed = in.refusing != nil
	in.refusing = nil
	return changed
}

func (in *intake) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
}

// commitReport describes a successful commit to onCommit.
type commitReport struct {
	creates, steps int
	duration       time.Duration
	totals         totals
}

var errQuit = errors.New("the store was closed while a commit was to be tried again")

// writer is one goroutine that takes the open batch, has the engine commit it with
// one fsync (group commit), and only then updates the cache and answers the creates.
type writer struct {
	engine    engine
	intake    *intake
	cache     *cache
	published *atomic.Pointer[totals]
	retention *retention
	log       *logger
	now       func() time.Time
	onCommit  func(commitReport)

	lastID  int64    // id_high of the newest ID given to an order
	changes []change // changes of the last commit; the slice is reused

	quit    chan struct{} // closed by store.close
	stopped chan struct{} // closed when the writer has ended
	failure error         // why the writer gave up; written before stopped is closed
}

// run commits batches until the writer gives up. After quit it commits a last one.
func (w *writer) run() {
	defer close(w.stopped)
	tick := time.Tick(tidyEvery)
	for open := true; open; {
		select {
		case <-w.intake.wake:
		case <-w.intake.stepped:
			w.awaitCreate()
		case <-w.retention.wake:
		case <-tick:
		case <-w.quit:
			open = false
		}
		w.gather()
		if err := w.turn(w.intake.take()); errors.Is(err, errQuit) {
			return
		} else if err != nil {
			w.giveUp(err)
			return
		}
		w.intake.finished()
	}
}

// awaitCreate waits up to maxStepDelay for a create, so that the waiting steps share
// its fsync. Nobody waits for steps, so the delay costs nothing.
func (w *writer) awaitCreate() {
	select {
	case <-w.intake.wake:
	case <-time.After(maxStepDelay):
	case <-w.quit:
	}
}

// gather yields until the batch stops growing. Under load, the goroutines that are
// ready to run add their creates meanwhile; when idle, yielding costs no time.
func (w *writer) gather() {
	for previous := -1; ; {
		runtime.Gosched()
		creates := w.intake.creates()
		if creates <= previous {
			return
		}
		previous = creates
	}
}

// turn commits a batch, then calls tidy. If it returns an error, the writer must
// not go on.
func (w *writer) turn(b *batch) error {
	b.expiry = w.retention.next(len(b.creates))
	if b.changes() > 0 || b.expiry != nil {
		w.number(b.creates)
		if err := w.commit(b); err != nil {
			return w.retry(b, err)
		}
	}
	t, err := w.engine.tidy()
	if err != nil {
		return w.retry(newBatch(nil), err) // with an empty batch, to find out when the engine takes writes again
	}
	if t.seq > w.published.Load().seq { // a beat of PostgreSQL is a commit, too
		w.publishTotals(t)
	}
	return nil
}

// commit has the engine commit a batch, and answers everyone who waits for it.
func (w *writer) commit(b *batch) error {
	began, expiry := time.Now(), b.expiry
	err := w.engine.commit(b)
	if expiry != nil {
		if err != nil { // the removal may not fit on the disk: end the sweep, so that orders go first until its pause is over
			expiry.ended = true
		}
		w.retention.record(expiry, time.Since(began))
	}
	if err != nil {
		w.fail(b, err)
		return err
	}
	w.succeed(b, began)
	return nil
}

func (w *writer) fail(b *batch, err error) {
	if errors.Is(err, errNotWritten) { // the table may have a new seq, which reads wait for
		w.publishTotals(b.totals)
	}
	if errors.Is(err, errInDoubt) {
		b.again = b.retryCopy() // release gives the creates back to their callers, so copy them first
	}
	b.release(errForWaiting(err))
}

// succeed publishes a batch before it answers, so that an answered order is found.
func (w *writer) succeed(b *batch, began time.Time) {
	w.publish(b)
	b.release(nil)
	if w.intake.accept() {
		w.log.Warn("orders are accepted again")
	}
	w.onCommit(commitReport{creates: len(b.creates), steps: len(b.steps), duration: time.Since(began), totals: b.totals})
}

// errForWaiting returns the error for the creates of a failed commit.
func errForWaiting(err error) error {
	if errors.Is(err, errOutcomeUnknown) || errors.Is(err, errInDoubt) {
		return errOutcomeUnknown
	}
	return errUnwritable
}

// errForLater returns the error for later creates, until a commit succeeds.
func errForLater(err error) error {
	if errForWaiting(err) == errOutcomeUnknown {
		return errInDoubt
	}
	return errUnwritable
}

// number gives new orders their IDs. Each is above every earlier ID, even if the
// clock is set back.
func (w *writer) number(creates []*creation) {
	ms := w.now().UnixMilli()
	for _, c := range creates {
		w.lastID = max(w.lastID+1, ms<<16)
		c.newID = joinID(w.lastID, int64(rand.Uint64()))
		c.id = c.newID
	}
}

// publish shows a commit to readers: first in the cache, then in the totals, because
// await takes the totals' seq as the sign that the cache is up to date.
func (w *writer) publish(b *batch) {
	w.changes = w.changes[:0]
	for _, c := range b.creates {
		if c.stored() {
			w.changes = append(w.changes, change{c.id, pending})
		}
	}
	for _, st := range b.steps {
		if st.void {
			w.log.Error("a step did not find its order", "order_id", st.id.String(), "from", st.from.String(), "to", st.to.String())
			continue
		}
		w.changes = append(w.changes, change{st.id, st.to})
	}
	w.cache.apply(w.changes)
	if len(b.removed) > 0 {
		w.cache.forget(b.removed, b.totals.seq)
	}
	w.publishTotals(b.totals)
}

func (w *writer) publishTotals(t totals) { w.published.Store(&t) }

// retry commits once every retryPause until a commit succeeds. Creates are refused
// meanwhile. After errNotWritten it commits the steps alone, because the creates have
// been answered; after errInDoubt it commits the same batch, which may be stored
// already. It returns an error that no retry can mend, or errQuit.
func (w *writer) retry(failed *batch, err error) error {
	next := failed
	for {
		switch {
		case errors.Is(err, errInDoubt):
			next = cmp.Or(next.again, next) // the empty batch after tidy has no copy
		case errors.Is(err, errNotWritten):
			next = newBatch(next.steps)
		default:
			return err
		}
		if w.intake.refuse(errForLater(err)) {
			w.log.Warn("orders are refused until the store can be written", "error", err)
		}
		select {
		case <-time.After(retryPause):
		case <-w.quit:
			return errQuit // the next start takes up the orders of these steps again
		}
		if err = w.commit(next); err == nil {
			return nil
		}
	}
}

// giveUp records why the writer ends, and has creates refused: the outcome of a
// commit is unknown until the next start, or no retry can mend the fault.
func (w *writer) giveUp(err error) {
	w.failure = err
	if !errors.Is(err, errDeposed) {
		w.log.Error("the writer gave up", "error", err)
	}
	w.intake.refuse(errForLater(err))
}

// retention decides when completed orders are removed. It sweeps over the table
// again and again, a few orders in each commit. It leaves orders that are not
// completed yet to a later sweep. Only the writer uses it.
type retention struct {
	keep time.Duration // how long completed orders stay; 0 is for ever
	now  func() time.Time
	log  *logger

	began  time.Time // when the writer started, by the monotonic clock
	wall   time.Time // the same moment, by the wall clock
	warned bool      // a jump of the clock has been logged

	last    expiry           // the previous expiry; its ended is true between two sweeps
	created int              // creates since the previous expiry
	due     time.Time        // when the next expiry is due
	wake    <-chan time.Time // fires at due
}

const (
	expiryPauseFactor = 8              // the pause after an expiry, in durations of its commit, unless the table grows
	sweepPause        = time.Minute    // pause between two sweeps; less if orders are kept for less than ten minutes
	clockJump         = 24 * time.Hour // if the clock jumps ahead by more, nothing is removed
)

func (r *retention) start() {
	if r.keep == 0 {
		return
	}
	r.began, r.wall = time.Now(), r.now().Round(0) // Round(0) drops the monotonic reading
	r.record(&expiry{ended: true}, 0)
}

// next returns an expiry if one is due, else nil. One is due after a pause, or, in
// the middle of a sweep, as soon as there were as many creates as the previous
// expiry examined orders: otherwise the table would grow faster than it is swept.
func (r *retention) next(created int) *expiry {
	r.created += created
	grows := !r.last.ended && r.created >= r.last.examined
	if r.keep == 0 || !grows && time.Now().Before(r.due) {
		return nil
	}
	jump := r.clockJump()
	if jump > clockJump && !r.warned {
		r.log.Warn("the clock has jumped ahead: no order is removed until it is back, or orderd is started again", "by", jump.Round(time.Second).String())
	}
	if r.warned = jump > clockJump; r.warned {
		return nil
	}
	x := &expiry{before: r.now().Add(-r.keep).UnixMilli()}
	if !r.last.ended {
		x.after = r.last.through
	}
	return x
}

// clockJump returns how far the wall clock has gone ahead of the monotonic clock since
// the start. If that is far, it may be wrong, and orders would be removed too early.
func (r *retention) clockJump() time.Duration { return r.now().Sub(r.wall) - time.Since(r.began) }

// record notes how far an expiry came, and sets when the next is due.
func (r *retention) record(x *expiry, took time.Duration) {
	pause := expiryPauseFactor * took
	if x.ended {
		pause = max(pause, min(sweepPause, r.keep/10))
	}
	r.last, r.created = *x, 0
	r.due, r.wake = time.Now().Add(pause), time.After(pause)
}

// ---- What the SQL of both engines has in common. ----

// totalsColumns are the columns of the totals, in the order of fields and values.
const totalsColumns = "accepted, processing, completed, took, newest_started, newest, removed, seq, identity"

func (t *totals) fields() []any {
	return []any{&t.accepted, &t.processing, &t.completed, &t.sumTook, &t.newestStarted, &t.newest, &t.removed, &t.seq, &t.identity}
}

func (t *totals) values() (values []any) {
	for _, field := range t.fields() {
		values = append(values, *field.(*int64))
	}
	return values
}

// orderColumns are the columns of an order that scanOrder reads.
const orderColumns = "id_high, id_low, status, user_id, item_ids, cents, coalesce(started, 0), coalesce(took, 0)"

// scanOrder scans orderColumns into an order, and the columns after them into more.
func scanOrder(scan func(...any) error, more ...any) (o order, err error) {
	var idHigh, idLow int64
	err = scan(append([]any{&idHigh, &idLow, &o.status, &o.userID, &o.itemIDs, &o.cents, &o.startedMS, &o.tookMicros}, more...)...)
	o.id = joinID(idHigh, idLow)
	return o, err
}

// The queries of a census, and the condition that an order has expired, to which the
// bound (Unix ms) must be appended.
const (
	expiredBefore   = "status = 2 AND started + took / 1000 < "
	countUnfinished = `SELECT count(*) FILTER (WHERE status = 0), count(*) FILTER (WHERE status = 1),
	(SELECT coalesce(max(id_high), 0) FROM orders) FROM orders `
	countFinal = `SELECT count(*), CAST(coalesce(sum(took), 0) AS bigint), (SELECT coalesce(max(id_high), 0) FROM orders WHERE status > 0)
	FROM orders WHERE status = 2`
)

// ordersView returns the SQL of a view that shows orders to people at an SQL prompt.
// The engines differ in amount and timePattern, which are SQL expressions.
func ordersView(amount, timePattern string) string {
	digits := make([]string, 26) // of a ULID in Crockford's base 32: 5 bits each, computed from the right
	for i := range digits {
		bits := fmt.Sprintf("(id_low >> %d) & 31", 5*i)
		switch {
		case i == 12: // 4 bits of id_low, 1 of id_high
			bits = "((id_low >> 60) & 15) | ((id_high & 1) << 4)"
		case i > 12:
			bits = fmt.Sprintf("(id_high >> %d) & 31", 5*i-64)
		}
		digits[25-i] = fmt.Sprintf("substr('%s', 1 + CAST(%s AS integer), 1)", ulid.Encoding, bits)
	}
	return "\nCREATE VIEW orders_readable AS SELECT " + strings.Join(digits, " || ") + ` AS order_id,
	CASE status WHEN 0 THEN 'Pending' WHEN 1 THEN 'Processing' ELSE 'Completed' END AS status,
	user_id, item_ids, ` + amount + ` AS total_amount,
	` + fmt.Sprintf(timePattern, "id_high >> 16") + ` AS created_at,
	` + fmt.Sprintf(timePattern, "started") + ` AS started_at,
	` + fmt.Sprintf(timePattern, "started + took / 1000") + ` AS completed_at
FROM orders;`
}

// ---- The SQLite engine. ----

const ordersVersion = 3 // PRAGMA user_version of orders.db

const ordersSchema = `
CREATE TABLE orders (
	id_high  INTEGER PRIMARY KEY, -- of the ULID: (Unix ms of creation << 16) + sequence; also the queue's order
	id_low   INTEGER NOT NULL,    -- of the ULID: random
	status   INTEGER NOT NULL CHECK (status BETWEEN 0 AND 2), -- Pending, Processing, Completed
	user_id  TEXT    NOT NULL,
	item_ids TEXT    NOT NULL,    -- comma-separated
	cents    INTEGER NOT NULL CHECK (cents >= 0),
	started  INTEGER,             -- Unix ms of the first attempt since the last start, by the wall clock
	took     INTEGER,             -- µs from started to completion
	key      TEXT                 -- idempotency key
) STRICT;
CREATE INDEX orders_unfinished ON orders (status) WHERE status < 2; -- as small as the backlog
CREATE UNIQUE INDEX orders_by_key ON orders (key) WHERE key IS NOT NULL;
-- An index on user_id that is cheap to write: sorted anew for every run of
-- orders, and brought up to date some batches later. It lacks the newest.
CREATE TABLE orders_by_user (
	run     INTEGER NOT NULL,
	user    TEXT    NOT NULL,
	id_high INTEGER NOT NULL,
	PRIMARY KEY (run, user, id_high)
) STRICT, WITHOUT ROWID;
CREATE TABLE user_runs (
	first  INTEGER PRIMARY KEY,        -- no id_high in the run is below it
	last   INTEGER NOT NULL DEFAULT 0, -- the newest id_high in it
	orders INTEGER NOT NULL DEFAULT 0  -- indexed into it
) STRICT;
INSERT INTO user_runs VALUES (0, 0, 0);
-- Running totals, written in the transaction that changes them. They are the
-- outbox to metrics.db: being sums, they can be taken over any number of times.
CREATE TABLE totals (
	accepted       INTEGER NOT NULL, -- orders ever
	processing     INTEGER NOT NULL, -- orders being processed
	completed      INTEGER NOT NULL, -- orders ever completed
	took           INTEGER NOT NULL, -- µs, sum over these
	newest_started INTEGER NOT NULL, -- id_high of the newest order that ever left Pending
	newest         INTEGER NOT NULL DEFAULT 0, -- id_high of the newest order ever
	removed        INTEGER NOT NULL DEFAULT 0, -- completed orders that are no longer here
	seq            INTEGER NOT NULL DEFAULT 0, -- commits; each follows on the one before it
	identity       INTEGER NOT NULL DEFAULT 0  -- of this database
) STRICT;
INSERT INTO totals (accepted, processing, completed, took, newest_started, identity) VALUES (0, 0, 0, 0, 0, random());`

// ordersUpgradeTo3 upgrades version 2. It moves the idempotency keys into a column
// of orders, so that removing an order also frees its key, and the bounds of the
// user index from totals into user_runs.
const ordersUpgradeTo3 = `
ALTER TABLE orders ADD COLUMN key TEXT;
CREATE INDEX keys_by_order ON idempotency_keys (id_high); -- lets the UPDATE read both tables in one order: ten times faster
UPDATE orders SET key = (SELECT key FROM idempotency_keys k WHERE k.id_high = orders.id_high) WHERE id_high IN (SELECT id_high FROM idempotency_keys);
DROP TABLE idempotency_keys;
CREATE UNIQUE INDEX orders_by_key ON orders (key) WHERE key IS NOT NULL;
ALTER TABLE user_runs ADD COLUMN last INTEGER NOT NULL DEFAULT 0;
ALTER TABLE user_runs ADD COLUMN orders INTEGER NOT NULL DEFAULT 0;
UPDATE user_runs SET last = (SELECT newest_indexed FROM totals), orders = (SELECT indexed % 16384 FROM totals)
	WHERE first = (SELECT max(first) FROM user_runs);
ALTER TABLE totals DROP COLUMN indexed;
ALTER TABLE totals DROP COLUMN newest_indexed;
ALTER TABLE totals ADD COLUMN newest INTEGER NOT NULL DEFAULT 0;
ALTER TABLE totals ADD COLUMN removed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE totals ADD COLUMN seq INTEGER NOT NULL DEFAULT 0;
ALTER TABLE totals ADD COLUMN identity INTEGER NOT NULL DEFAULT 0;
UPDATE totals SET newest = (SELECT coalesce(max(id_high), 0) FROM orders), identity = random();`

// totalsQueries has the query for the columns of totalsColumns, by schema version.
var totalsQueries = map[int64]string{
	2: "SELECT accepted, processing, completed, took, newest_started, (SELECT coalesce(max(id_high), 0) FROM orders), 0, 0, 0 FROM totals",
	3: "SELECT " + totalsColumns + " FROM totals",
}

// What an INSERT sets.
const (
	insertColumns = "id_high, id_low, status, user_id, item_ids, cents, key"
	insertValues  = "(?, ?, 0, ?, ?, ?, ?)"
	insertArgs    = 6  // placeholders in a row
	insertRows    = 16 // most rows in one INSERT; they share the cost of running a statement
)

func appendOrder(args []any, c *creation) []any {
	var key any // NULL if c has no key
	if c.key != "" {
		key = c.key
	}
	return append(args, high(c.id), low(c.id), c.userID, c.itemIDs, c.cents, key)
}

var sqliteView = ordersView("printf('%d.%02d', cents / 100, cents % 100)", "strftime('%%Y-%%m-%%dT%%H:%%M:%%fZ', (%s) / 1000.0, 'unixepoch')")

// sqliteEngine keeps orders in one SQLite file. One connection writes. Reads have
// their own connections, which WAL mode lets read while it writes.
type sqliteEngine struct {
	file        *database
	log         *logger
	write       *statements
	rowReaders  *reader // for single orders and the backlog
	listReaders *reader // for lists

	last     totals // as of the last commit
	users    *userIndex
	wal      *checkpointer
	handsOff error // set by unknown: why the files must not be synced or closed any more

	beforeCommit func(*batch) // called just before COMMIT; only tests set it
}

func newSQLiteEngine(directory string, log *logger) *sqliteEngine {
	return &sqliteEngine{log: log, file: &database{
		path: filepath.Join(directory, "orders.db"), appID: 0x6f726472, version: ordersVersion,
		schema: ordersSchema + sqliteView, upgrades: []string{ordersUpgradeTo3},
	}}
}

// readTotals reads the totals before start, and changes nothing.
func (e *sqliteEngine) readTotals() (t totals, err error) {
	err = e.file.inspect(totalsQueries, t.fields()...)
	return t, err
}

func (e *sqliteEngine) start() (t totals, err error) {
	if err = e.file.open(e.log); err != nil {
		return t, err
	}
	if err = e.openParts(); err != nil {
		return t, explain(e.file.path, err)
	}
	if err = e.recount(); err != nil {
		return t, explain(e.file.path, err)
	}
	return e.last, nil
}

// openParts prepares everything that uses the open file: statements, totals, user
// index, checkpointer and readers.
func (e *sqliteEngine) openParts() (err error) {
	if e.write, err = prepareStatements(e.file.DB); err != nil {
		return err
	}
	if err = e.file.QueryRow("SELECT " + totalsColumns + " FROM totals").Scan(e.last.fields()...); err != nil {
		return err
	}
	if e.users, err = openUserIndex(e.file.DB); err != nil {
		return err
	}
	if e.wal, err = newCheckpointer(e.file, e.log); err != nil {
		return err
	}
	if e.rowReaders, err = openReader(e.file.path, rowConnections); err != nil {
		return err
	}
	e.listReaders, err = openReader(e.file.path, listConnections)
	return err
}

// recount corrects the totals if somebody has changed the table by hand. It scans
// the whole table only if the totals do not match what is cheap to count: the
// unfinished orders, which have an index, and the newest ID.
func (e *sqliteEngine) recount() error {
	var c census
	err := e.file.QueryRow(countUnfinished+"INDEXED BY orders_unfinished WHERE status < 2").Scan(&c.pending, &c.processing, &c.newest)
	if err != nil {
		return err
	}
	if c.matches(e.last) {
		return nil
	}
	if err := e.file.QueryRow(countFinal).Scan(&c.final, &c.sumTook, &c.newestStarted); err != nil {
		return err
	}
	corrected := c.correct(e.last)
	logCorrection(e.log, e.last, corrected)
	return e.writeTotals(corrected)
}

// writeTotals is a compare-and-set on seq: it fails with errBroken if another program
// has changed seq since e.last. Otherwise two orderd on one file would overwrite each
// other's totals, and answer from caches that lack each other's steps.
func (e *sqliteEngine) writeTotals(t totals) error {
	changed, err := e.write.totals.exec(append(t.values(), e.last.seq)...)
	if err != nil {
		return err
	}
	if changed != 1 {
		return fmt.Errorf("%w: %s was written by another program: stop it, and start orderd again (two of them on one directory are kept apart by orderd.lock: do not remove that)", errBroken, e.file.path)
	}
	e.last = t
	return nil
}

// statement is a prepared statement of the driver itself. Going through database/sql
// instead would cost a sixth of the writer's time.
type statement struct {
	driver.Stmt
	args []driver.NamedValue // reused
}

// exec returns how many rows it changed. Each arg is an int64, a string or nil.
func (s *statement) exec(args ...any) (changed int64, err error) {
	s.args = s.args[:0]
	for i, arg := range args {
		s.args = append(s.args, driver.NamedValue{Ordinal: i + 1, Value: arg})
	}
	result, err := s.Stmt.(driver.StmtExecContext).ExecContext(context.Background(), s.args)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

// statements are those of the writer. The ones that run for each commit or order are
// of type statement, for their speed.
type statements struct {
	begin, commit, rollback, insertOne, step, totals statement
	insert                                           [insertRows + 1]statement // index: number of rows

	findKey, expirable, remove *sql.Stmt
}

// preparer prepares statements of database/sql and keeps the first error.
type preparer struct {
	db  *sql.DB
	err error
}

func (p *preparer) prepare(query string) *sql.Stmt {
	stmt, err := p.db.Prepare(query)
	p.err = cmp.Or(p.err, err)
	return stmt
}

func prepareStatements(db *sql.DB) (*statements, error) {
	p := preparer{db: db}
	s := &statements{
		findKey: p.prepare(selectByKey),
		expirable: p.prepare("SELECT id_high, id_low, " + isExpired + " FROM orders WHERE id_high > @after AND id_high < @before << 16" +
			" AND id_high <= (SELECT newest_started FROM totals) ORDER BY id_high LIMIT @limit"),
		remove: p.prepare("DELETE FROM orders WHERE " + expiredOrders),
	}
	if p.err != nil {
		return s, p.err
	}
	conn, err := db.Conn(context.Background())
	if err != nil {
		return s, err
	}
	defer conn.Close() // returns it to db, which keeps its one connection open
	err = conn.Raw(func(c any) (err error) {
		for stmt, query := range s.queries() {
			stmt.Stmt, err = c.(driver.Conn).Prepare(query)
			if err != nil {
				return err
			}
		}
		return nil
	})
	return s, err
}

func (s *statements) queries() map[*statement]string {
	// An INSERT skips an order whose key has already created another one.
	const insert = " INTO orders (" + insertColumns + ") VALUES " + insertValues
	const unlessReplayed = " ON CONFLICT (key) WHERE key IS NOT NULL DO NOTHING"
	queries := map[*statement]string{
		&s.begin:     "BEGIN IMMEDIATE",
		&s.commit:    "COMMIT",
		&s.rollback:  "ROLLBACK",
		&s.insertOne: "INSERT" + insert + unlessReplayed,
		&s.step:      "UPDATE orders SET status = ?, started = ?, took = ? WHERE id_high = ? AND status = ?",
		&s.totals: "UPDATE totals SET (" + totalsColumns + ") = (?" +
			strings.Repeat(", ?", strings.Count(totalsColumns, ",")) + ") WHERE seq = ?",
	}
	for rows := 1; rows <= insertRows; rows++ {
		// With OR ROLLBACK, SQLite needs no journal to undo a part of the INSERT.
		queries[&s.insert[rows]] = "INSERT OR ROLLBACK" + insert + strings.Repeat(", "+insertValues, rows-1) + unlessReplayed
	}
	return queries
}

// close closes the driver's statements. Call it before the connection is closed:
// SQLite keeps a connection open until its statements are closed.
func (s *statements) close() (err error) {
	if s == nil {
		return nil
	}
	for stmt := range s.queries() {
		if stmt.Stmt != nil {
			err = errors.Join(err, stmt.Close())
		}
	}
	return err
}

// commit writes a batch in one transaction. If the expiry fails, it runs the
// transaction again without the expiry. If the table refuses a create, it runs the
// transaction again with one INSERT for each create, so that only that one fails.
func (e *sqliteEngine) commit(b *batch) error {
	err := e.transaction(b, e.insertTogether)
	onlyExpiryFailed := errors.Is(err, errNotRemoved) && !errors.Is(err, errOutcomeUnknown) && !errors.Is(err, errBroken)
	if onlyExpiryFailed {
		b.skipExpiry(e.log, err)
		err = e.transaction(b, e.insertTogether)
	}
	if errors.Is(err, errRejected) {
		err = e.transaction(b, e.insertEach)
	}
	b.totals = e.last
	return err
}

func (e *sqliteEngine) transaction(b *batch, insert func([]*creation) error) error {
	if err := e.inPlace(); err != nil {
		return err
	}
	before := e.last
	err := e.fill(b, insert)
	if err != nil {
		e.last = before
		e.write.rollback.exec() // fails if SQLite has already rolled back
		return e.outcome(err)
	}
	if e.beforeCommit != nil {
		e.beforeCommit(b)
	}
	if _, err := e.write.commit.exec(); err != nil {
		e.last = before
		return e.commitOutcome(err)
	}
	e.users.keepState()
	e.wal.written += b.changes()
	return nil
}

// fill runs every statement of a batch except COMMIT.
func (e *sqliteEngine) fill(b *batch, insert func([]*creation) error) error {
	if _, err := e.write.begin.exec(); err != nil {
		return err
	}
	if err := e.expire(b); err != nil {
		return err
	}
	if err := insert(b.creates); err != nil {
		return err
	}
	for i := range b.steps {
		if err := e.applyStep(&b.steps[i]); err != nil {
			return err
		}
	}
	b.totals = e.last.with(b)
	if err := e.users.update(b.totals.accepted-e.last.accepted, b.totals.newest, e.log); err != nil {
		return err
	}
	return e.writeTotals(b.totals)
}

const (
	expiryTime = 5 * time.Millisecond // an expiry ends after this time, checked every expiryRows
	expiryRows = 256                  // orders that are examined at a time
)

// errNotRemoved says that an expiry failed; commit goes on without it.
var errNotRemoved = errors.New("no order was removed")

// The statements of an expiry share these conditions.
const (
	isExpired     = expiredBefore + "@before"
	expiredOrders = "id_high > @after AND id_high <= @through AND " + isExpired
)

// expire removes orders for about expiryTime. It runs before the creates, so that
// they can use a removed order's key and the freed pages in the same commit.
func (e *sqliteEngine) expire(b *batch) error {
	b.removed = nil
	x := b.expiry
	if x == nil {
		return nil
	}
	x.through, x.examined = x.after, 0
	more := true
	for began := time.Now(); more && time.Since(began) < expiryTime; {
		var err error
		if more, err = e.expireNext(b); err != nil {
			return fmt.Errorf("%w: %w", errNotRemoved, err)
		}
	}
	x.ended = !more
	return nil
}

// expireNext examines the next expiryRows orders and removes those that have expired.
func (e *sqliteEngine) expireNext(b *batch) (more bool, err error) {
	x := b.expiry
	window := []any{sql.Named("after", x.through), sql.Named("before", x.before)}
	examined, err := e.findExpired(b, window)
	if err != nil {
		return false, err
	}
	x.examined += examined
	if more = examined == expiryRows; !more {
		x.through = x.before<<16 - 1 // no newer order can have expired
	}
	window = append(window, sql.Named("through", x.through))
	if err := e.users.removeExpired(window); err != nil {
		return false, err
	}
	_, err = e.write.remove.Exec(window...)
	return more, err
}

func (e *sqliteEngine) findExpired(b *batch, window []any) (examined int, err error) {
	rows, err := e.write.expirable.Query(append(window, sql.Named("limit", expiryRows))...)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	for ; rows.Next(); examined++ {
		var idLow int64
		var expired sql.NullBool // NULL if somebody completed the order by hand, without its times
		if err := rows.Scan(&b.expiry.through, &idLow, &expired); err != nil {
			return 0, err
		}
		if expired.Bool {
			b.removed = append(b.removed, joinID(b.expiry.through, idLow))
		}
	}
	return examined, rows.Err()
}

// insertTogether inserts up to insertRows orders with each statement. It fails with
// errRejected if the table refuses one of them.
func (e *sqliteEngine) insertTogether(creates []*creation) error {
	for some := range slices.Chunk(creates, insertRows) {
		if err := e.insert(&e.write.insert[len(some)], some); err != nil {
			return rejected(err)
		}
	}
	return nil
}

// insertEach inserts one order with each statement, so that an order which the table
// refuses fails alone.
func (e *sqliteEngine) insertEach(creates []*creation) error {
	for one := range slices.Chunk(creates, 1) {
		err := rejected(e.insert(&e.write.insertOne, one))
		if errors.Is(err, errRejected) {
			e.log.Error("an order was refused by the table", "error", err)
			one[0].err = err
		} else if err != nil {
			return err
		}
	}
	return nil
}

// insert resets creates, inserts their orders with stmt, and replays the creates
// whose key has already created an order.
func (e *sqliteEngine) insert(stmt *statement, creates []*creation) error {
	args := make([]any, 0, insertRows*insertArgs)
	for _, c := range creates {
		c.reset()
		args = appendOrder(args, c)
	}
	inserted, err := stmt.exec(args...)
	if err != nil || inserted == int64(len(creates)) {
		return err
	}
	for _, c := range creates {
		if c.key == "" {
			continue
		}
		var seq int64
		earlier, err := scanOrder(e.write.findKey.QueryRow(c.key).Scan, &seq)
		if err != nil {
			return err
		}
		if earlier.id != c.id {
			c.replay(earlier)
		}
	}
	return nil
}

func rejected(err error) error {
	if sqliteCode(err)&0xff == sqlite3.SQLITE_CONSTRAINT {
		return fmt.Errorf("%w: %w", errRejected, err)
	}
	return err
}

// applyStep moves an order if its status is st.from, and sets st.void otherwise.
func (e *sqliteEngine) applyStep(st *transition) error {
	var took any // NULL until final
	if st.to.final() {
		took = st.tookMicros
	}
	changed, err := e.write.step.exec(int64(st.to), st.startedMS, took, high(st.id), int64(st.from))
	st.void = changed != 1
	return err
}

// outcome classifies the error of a transaction that did not reach COMMIT.
func (e *sqliteEngine) outcome(err error) error {
	if errors.Is(err, errRejected) || errors.Is(err, errBroken) {
		return err
	}
	if sqliteCode(err) == sqlite3.SQLITE_IOERR_FSYNC {
		return e.unknown(err)
	}
	switch sqliteCode(err) & 0xff {
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_IOERR,
		sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_PERM:
		return fmt.Errorf("%w: %w", errNotWritten, err)
	case sqlite3.SQLITE_CONSTRAINT:
		if errors.Is(err, errNotRemoved) { // a table that somebody added refers to the orders
			return err
		}
	}
	return fmt.Errorf("%w: %w", errBroken, explain(e.file.path, err))
}

// commitOutcome classifies an error of COMMIT.
func (e *sqliteEngine) commitOutcome(err error) error {
	switch sqliteCode(err) {
	// Only after these two errors is it known that nothing was committed. SQLite may
	// have rolled back already, and recommends to roll back in any case:
	// https://sqlite.org/lang_transaction.html#response_to_errors_within_a_transaction.
	case sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE:
		e.write.rollback.exec()
		return fmt.Errorf("%w: %w", errNotWritten, err)
	// There is no room for the WAL's index (-shm), but the batch is in the WAL and
	// synced: the next start would find it. So a commit of nothing but a new seq
	// overwrites the batch in the WAL.
	case sqlite3.SQLITE_IOERR_SHMSIZE:
		t := e.last
		t.seq++
		if e.writeTotals(t) == nil {
			return fmt.Errorf("%w: %w", errNotWritten, err)
		}
	}
	return e.unknown(err)
}

// unknown sets handsOff, so that a failed fsync is never repeated: the kernel may
// have dropped the data that it could not write, and the next fsync would succeed
// without that data (https://wiki.postgresql.org/wiki/Fsync_Errors).
func (e *sqliteEngine) unknown(err error) error {
	e.handsOff = fmt.Errorf("%w: check the disk, then start orderd again to find out; no order it confirmed is lost (%w)", errOutcomeUnknown, err)
	return e.handsOff
}

// inPlace returns errNotWritten if a restart would not open the files that are open.
func (e *sqliteEngine) inPlace() error {
	if err := e.file.inPlace(); err != nil {
		return fmt.Errorf("%w: %w", errNotWritten, err)
	}
	return nil
}

func (e *sqliteEngine) tidy() (totals, error) {
	if err := e.inPlace(); err != nil {
		return e.last, err
	}
	if err := e.wal.checkpointIfDue(); sqliteCode(err) == sqlite3.SQLITE_IOERR_FSYNC {
		return e.last, e.unknown(err)
	}
	return e.last, nil
}

// current always returns nil: nobody else writes, which every commit checks by seq.
func (e *sqliteEngine) current() error { return nil }

// close closes the readers first, so that the writer's connection is the last one,
// which removes the WAL. It closes nothing if handsOff is set, or if the files were
// removed or replaced: SQLite would remove the -wal of the files now in their place.
func (e *sqliteEngine) close() error {
	if err := cmp.Or(e.handsOff, e.file.checkInPlace()); err != nil {
		return err
	}
	return errors.Join(e.rowReaders.close(), e.listReaders.close(), e.write.close(), e.file.close())
}

func (e *sqliteEngine) gauges() []gauge {
	var size int64
	if info, err := os.Stat(e.file.path + "-wal"); err == nil {
		size = info.Size()
	}
	return []gauge{{"orderd_wal_bytes", "Size of the write-ahead log of orders.db.", float64(size)}}
}

// userIndex maintains orders_by_user. In an ordinary index on user_id, each order
// would change another page. This index is cut into runs of consecutive orders, each
// run sorted by user. It takes in indexEvery or more orders at once, which change few
// pages of the newest run. A list by user reads the orders that are not indexed yet
// from the table, and then searches one place in each run.
type userIndex struct {
	savepoint, release, revert                *sql.Stmt // a savepoint within the writer's transaction
	add, extend, beginRun, remove, removeRuns *sql.Stmt

	state, next indexState // as of the last commit, and of the commit under way
	retryBehind int64      // after a failure: the value of behind from which update tries again; else 0
}

type indexState struct {
	run    int64 // user_runs.first of the newest run
	last   int64 // id_high of the newest order in the index
	orders int64 // orders indexed in that run
	behind int64 // orders that are not indexed yet
}

// A larger runOrders makes lists of users with few orders cheaper, but creates by
// many users more expensive.
const (
	indexEvery = 1024  // orders; the index lags by at most this and one batch
	runOrders  = 16384 // orders that fill a run; ordersUpgradeTo3 has the same number: do not change it
	pageRuns   = 1024  // most runs that one page searches
)

// runsOfExpired selects the runs that can hold orders from @after to @through.
const runsOfExpired = "first >= coalesce((SELECT max(first) FROM user_runs WHERE first <= @after), 0) AND first <= @through"

func openUserIndex(db *sql.DB) (*userIndex, error) {
	p := preparer{db: db}
	u := &userIndex{
		savepoint: p.prepare("SAVEPOINT user_index"),
		release:   p.prepare("RELEASE user_index"),
		revert:    p.prepare("ROLLBACK TO user_index"),
		// OR IGNORE: the key is all columns, so a row that exists is the same row.
		add:      p.prepare("INSERT OR IGNORE INTO orders_by_user SELECT ?, user_id, id_high FROM orders WHERE id_high > ? ORDER BY user_id, id_high"),
		extend:   p.prepare("UPDATE user_runs SET last = ?, orders = ? WHERE first = ?"),
		beginRun: p.prepare("INSERT OR IGNORE INTO user_runs VALUES (?, ?, 0)"),
		remove: p.prepare("DELETE FROM orders_by_user WHERE run IN (SELECT first FROM user_runs WHERE " + runsOfExpired +
			") AND (user, id_high) IN (SELECT user_id, id_high FROM orders WHERE " + expiredOrders + ")"),
		removeRuns: p.prepare("DELETE FROM user_runs WHERE " + runsOfExpired +
			" AND first < (SELECT max(first) FROM user_runs) AND NOT EXISTS (SELECT 1 FROM orders_by_user WHERE run = first)"),
	}
	if p.err != nil {
		return nil, p.err
	}
	err := db.QueryRow("SELECT first, last, orders, (SELECT count(*) FROM orders WHERE id_high > last) FROM user_runs ORDER BY first DESC LIMIT 1").
		Scan(&u.state.run, &u.state.last, &u.state.orders, &u.state.behind)
	return u, err
}

// update counts new orders and indexes them once there are indexEvery. If that fails,
// it tries again after another indexEvery, because the index must not stop an order.
// It returns an error only if the transaction cannot go on.
func (u *userIndex) update(added, newest int64, log *logger) error {
	u.next = u.state
	u.next.behind += added
	if u.next.behind < max(indexEvery, u.retryBehind) {
		return nil
	}
	if _, err := u.savepoint.Exec(); err != nil {
		return err
	}
	err := u.index(newest)
	if err != nil {
		if _, revertErr := u.revert.Exec(); revertErr != nil {
			return err
		}
		log.Warn("the index of users could not be written; lists by user are slower until it can", "error", err)
		u.retryBehind = u.next.behind + indexEvery
	}
	_, err = u.release.Exec()
	return err
}

// index adds the orders behind to the newest run, and begins another if it is full.
func (u *userIndex) index(newest int64) error {
	n := u.next
	if _, err := u.add.Exec(n.run, n.last); err != nil {
		return err
	}
	n.last, n.orders, n.behind = newest, n.orders+n.behind, 0
	if _, err := u.extend.Exec(n.last, n.orders, n.run); err != nil {
		return err
	}
	if n.orders >= runOrders {
		n.run, n.orders = newest+1, 0
		if _, err := u.beginRun.Exec(n.run, n.last); err != nil {
			return err
		}
	}
	u.next, u.retryBehind = n, 0
	return nil
}

// removeExpired removes the expired orders of a window from the index, and then empty
// runs. Call it while the orders are still in the table, where it finds their users.
// The newest run stays even if it is empty, because the next orders go there.
func (u *userIndex) removeExpired(window []any) error {
	if _, err := u.remove.Exec(window...); err != nil {
		return err
	}
	_, err := u.removeRuns.Exec(window...)
	return err
}

func (u *userIndex) keepState() { u.state = u.next }

// checkpointer moves the WAL into the database. SQLite's automatic checkpoints would
// delay a commit's answer, and hide a failed fsync.
type checkpointer struct {
	file       *database
	log        *logger
	length     *sql.Stmt
	written    int       // changes of orders since the WAL's length was last read
	retryAt    time.Time // when to retry an incomplete checkpoint; zero if there is none
	pagesMoved int64     // pages that the previous try had moved; if the next has moved as many, the same reader still blocks
}

const (
	walCheckEvery      = 512                    // changes of orders, a few pages each, after which the WAL's length is read
	checkpointPages    = 4000                   // WAL pages (16 MB) after which the writer checkpoints
	truncateAbovePages = 8000                   // if the WAL is longer, the checkpoint truncates it
	readerPause        = 100 * time.Millisecond // longest wait of a checkpoint for a reader; commits wait meanwhile
)

func newCheckpointer(file *database, log *logger) (*checkpointer, error) {
	// NOOP returns the WAL's length and moves nothing: https://sqlite.org/pragma.html#pragma_wal_checkpoint
	length, err := file.Prepare("PRAGMA wal_checkpoint(NOOP)")
	return &checkpointer{file: file, log: log, length: length}, err
}

// checkpointIfDue runs a checkpoint if the WAL has checkpointPages. If a reader blocks
// the checkpoint, it waits for that reader once, for readerPause. Then it retries the
// checkpoint every retryPause, and does not wait for the same reader again. See
// https://sqlite.org/wal.html#ckpt.
func (c *checkpointer) checkpointIfDue() error {
	retry := !c.retryAt.IsZero()
	if retry && time.Now().Before(c.retryAt) || !retry && c.written < walCheckEvery {
		return nil
	}
	c.written, c.retryAt = 0, time.Time{}
	wal, err := scanWAL(c.length.QueryRow())
	if err != nil {
		c.log.Warn("the length of the WAL cannot be read", "error", err)
	}
	if err != nil || wal.pages < checkpointPages {
		return nil
	}
	wal, err = c.checkpoint("PASSIVE")
	sameReader := retry && !wal.complete() && wal.moved == c.pagesMoved
	if err == nil && !sameReader {
		mode := "RESTART"
		if wal.pages > truncateAbovePages {
			mode = "TRUNCATE"
		}
		c.file.setBusyTimeout(readerPause)
		wal, err = c.checkpoint(mode)
		c.file.setBusyTimeout(busyTimeout)
	}
	c.pagesMoved = wal.moved
	if err != nil || wal.busy || !wal.complete() {
		c.retryAt = time.Now().Add(retryPause)
	}
	if err != nil {
		c.log.Warn("the WAL could not be moved into the database yet", "error", err)
	}
	return err
}

func (c *checkpointer) checkpoint(mode string) (walState, error) {
	return scanWAL(c.file.QueryRow("PRAGMA wal_checkpoint(" + mode + ")"))
}

// walState is the result of a checkpoint.
type walState struct {
	busy         bool  // a reader or another program blocked the checkpoint
	pages, moved int64 // length of the WAL; pages of it that are in the database
}

func (w walState) complete() bool { return w.moved >= w.pages }

func scanWAL(row *sql.Row) (w walState, err error) {
	err = row.Scan(&w.busy, &w.pages, &w.moved)
	return w, err
}

// ---- Reads. ----

const (
	rowConnections  = 3         // for single orders and for the feeder, which must not wait for lists
	listConnections = 4         // for lists
	readBytes       = 256 << 10 // bytes of text after which a page of a list ends
)

const (
	selectByID  = "SELECT " + orderColumns + ", (SELECT seq FROM totals) FROM orders WHERE id_high = ?"
	selectByKey = "SELECT " + orderColumns + ", (SELECT seq FROM totals) FROM orders WHERE key = ?"
	// A part reads one status, in the order of the index, and no content. So its cost
	// depends on the number of orders returned, not on their place in the table.
	partOfBacklog = "SELECT * FROM (SELECT id_high, id_low, status FROM orders INDEXED BY orders_unfinished WHERE status < 2 AND status = %d AND id_high > ?1 ORDER BY id_high LIMIT ?2)"
)

// reader is a pool of read-only connections. They are opened at start and stay open,
// so that no read fails because the process has run out of file descriptors.
type reader struct {
	*sql.DB
	findID, findKey, backlog *sql.Stmt
}

func openReader(path string, connections int) (*reader, error) {
	db, err := openSQLite(path, "mode=ro", "_pragma=query_only(1)")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	p := preparer{db: db}
	r := &reader{DB: db, findID: p.prepare(selectByID), findKey: p.prepare(selectByKey), backlog: p.prepare(fmt.Sprintf(partOfBacklog+" UNION ALL "+partOfBacklog+" ORDER BY 1 LIMIT ?2", pending, processing))}
	open := make([]*sql.Conn, 0, connections)
	for err = p.err; err == nil && len(open) < connections; {
		var c *sql.Conn
		if c, err = db.Conn(context.Background()); err == nil {
			open = append(open, c)
			err = c.QueryRowContext(context.Background(), "SELECT seq FROM totals").Scan(new(int64)) // opens the -wal too
		}
	}
	for _, c := range open {
		c.Close()
	}
	return r, err
}

const readEndTimeout = 5 * time.Second // longest wait of close for reads under way

// close waits for reads under way, up to readEndTimeout, because the writer's
// connection must be the last one to close.
func (r *reader) close() error {
	if r == nil {
		return nil
	}
	err := r.Close()
	for end := time.Now().Add(readEndTimeout); r.Stats().OpenConnections > 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	return err
}

func (e *sqliteEngine) find(id ulid.ULID) (order, int64, error) {
	return e.readOne(e.rowReaders.findID, high(id), func(o order) bool { return o.id == id })
}

func (e *sqliteEngine) findKey(key string) (order, int64, error) {
	return e.readOne(e.rowReaders.findKey, key, func(order) bool { return true })
}

// readOne reads one order. With errNotFound, too, it returns a seq, because that
// result must wait until a commit which removed the order is published.
func (e *sqliteEngine) readOne(query *sql.Stmt, by any, matches func(order) bool) (o order, seq int64, err error) {
	o, err = scanOrder(query.QueryRow(by).Scan, &seq)
	if err == nil && matches(o) {
		return o, seq, nil
	}
	if err == nil || errors.Is(err, sql.ErrNoRows) {
		err = cmp.Or(e.rowReaders.QueryRow("SELECT seq FROM totals").Scan(&seq), errNotFound)
	}
	return order{}, seq, err
}

func (e *sqliteEngine) backlog(after int64, limit int) (found []queued, err error) {
	rows, err := e.rowReaders.backlog.Query(after, limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var idHigh, idLow int64
		var q queued
		if err := rows.Scan(&idHigh, &idLow, &q.status); err != nil {
			return nil, err
		}
		q.id = joinID(idHigh, idLow)
		found = append(found, q)
	}
	return found, rows.Err()
}

// oldestUnfinished needs a status appended. Without an order it is math.MaxInt64.
const oldestUnfinished = "SELECT coalesce(min(id_high), 9223372036854775807) FROM orders INDEXED BY orders_unfinished WHERE status < 2 AND status = "

func (e *sqliteEngine) oldest(st status) (idHigh int64, err error) {
	err = e.rowReaders.QueryRow(oldestUnfinished+"?", st).Scan(&idHigh)
	return idHigh, err
}

// list reads a page in one transaction, so that its bounds and all its queries
// see the same commit.
func (e *sqliteEngine) list(f filter) (p page, seq int64, err error) {
	tx, err := e.listReaders.Begin()
	if err != nil {
		return p, 0, err
	}
	defer tx.Rollback()
	var b listBounds
	if err := tx.QueryRow("SELECT seq, newest_started, (SELECT max(last) FROM user_runs), ("+oldestUnfinished+"0) FROM totals").
		Scan(&seq, &b.newestStarted, &b.newestIndexed, &b.oldestPending); err != nil {
		return p, 0, err
	}
	l := &listing{tx: tx, filter: f, room: readBytes}
	stoppedAt, err := l.search(b)
	return l.result(stoppedAt), seq, err
}

// listBounds are id_high values that limit a search, so that the cost of a page
// depends on its length, not on the table's.
type listBounds struct {
	oldestPending int64 // no earlier order is Pending
	newestStarted int64 // no later order is Completed
	newestIndexed int64 // later orders are not in the index of users
}

// window returns the range of a filter's orders: oldest <= id_high < before.
func (b listBounds) window(f filter) (oldest, before int64) {
	before = f.before
	if f.status != nil && *f.status == pending {
		oldest = b.oldestPending
	}
	if f.status != nil && f.status.final() {
		before = min(before, b.newestStarted+1)
	}
	return oldest, before
}

// These are the sources from which a page reads orders, newest first.
const (
	fromTable      = "orders NOT INDEXED WHERE id_high >= @oldest AND id_high < @before"
	fromUnfinished = "orders INDEXED BY orders_unfinished WHERE status < 2 AND id_high < @before"
	fromUserIndex  = "user_runs CROSS JOIN orders_by_user ON run = first CROSS JOIN orders USING (id_high)" +
		" WHERE first >= @oldest_run AND first < @before AND user = @user AND id_high >= @oldest AND id_high < @before"
)

// listing collects a page from the results of several queries.
type listing struct {
	tx     *sql.Tx
	filter filter
	room   int // bytes of text that still fit
	orders []order
}

// search runs the queries of a page. stoppedAt is the id_high below which it has not
// searched, or 0 if it has searched the whole window.
func (l *listing) search(b listBounds) (stoppedAt int64, err error) {
	oldest, before := b.window(l.filter)
	switch {
	case l.filter.status != nil && *l.filter.status == processing:
		return 0, l.read(fromUnfinished, "id_high DESC", oldest, before)
	case l.filter.userID == "":
		return 0, l.read(fromTable, "id_high DESC", oldest, before)
	}
	if err := l.read(fromTable, "id_high DESC", max(oldest, b.newestIndexed+1), before); err != nil {
		return 0, err
	}
	return l.searchUserIndex(oldest, min(before, b.newestIndexed+1))
}

// searchUserIndex searches at most pageRuns runs, back to the one that holds oldest.
func (l *listing) searchUserIndex(oldest, before int64) (stoppedAt int64, err error) {
	var run int64
	if err := l.tx.QueryRow(`SELECT max(coalesce((SELECT max(first) FROM user_runs WHERE first <= @oldest), 0),
		coalesce((SELECT first FROM user_runs WHERE first < @before ORDER BY first DESC LIMIT 1 OFFSET @runs - 1), 0))`,
		sql.Named("oldest", oldest), sql.Named("before", before), sql.Named("runs", pageRuns)).Scan(&run); err != nil {
		return 0, err
	}
	if run > oldest {
		stoppedAt = run
	}
	return stoppedAt, l.read(fromUserIndex, "first DESC, id_high DESC", oldest, before, sql.Named("oldest_run", run))
}

// read appends the orders of a window that match the filter, up to one more than the
// page holds: the extra order shows that there is another page.
func (l *listing) read(from, sort string, oldest, before int64, more ...any) error {
	if l.full() {
		return nil
	}
	args := append(more, sql.Named("oldest", oldest), sql.Named("before", before), sql.Named("user", l.filter.userID), sql.Named("limit", l.filter.limit+1-len(l.orders)))
	if l.filter.userID != "" {
		from += " AND user_id = @user"
	}
	if l.filter.status != nil {
		from += " AND status = @status"
		args = append(args, sql.Named("status", *l.filter.status))
	}
	rows, err := l.tx.Query("SELECT "+orderColumns+" FROM "+from+" ORDER BY "+sort+" LIMIT @limit", args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for !l.full() && rows.Next() {
		o, err := scanOrder(rows.Scan)
		if err != nil {
			return err
		}
		l.orders = append(l.orders, o)
		l.room -= len(o.userID) + len(o.itemIDs)
	}
	return rows.Err()
}

func (l *listing) full() bool { return l.room <= 0 || len(l.orders) > l.filter.limit }

// result cuts the page off where it is full, or else where the search stopped.
func (l *listing) result(stoppedAt int64) (p page) {
	p.orders = l.orders[:min(len(l.orders), l.filter.limit)]
	switch {
	case l.full():
		p.next = p.orders[len(p.orders)-1].id
	case stoppedAt > 0:
		p.next = joinID(stoppedAt, 0)
	}
	return p
}

// ---- SQLite files. ----

const busyTimeout = time.Second // longest wait for another program's lock on a database

// database is orders.db or metrics.db.
type database struct {
	*sql.DB  // has one connection; nil until open
	path     string
	appID    int64 // PRAGMA application_id
	version  int64 // PRAGMA user_version
	schema   string
	upgrades []string // each upgrades by one version, the last one to version

	autoCheckpoint int // PRAGMA wal_autocheckpoint, in pages; 0 if a checkpointer does that

	foundVersion int64                  // set by inspect; 0 if there is no schema yet
	opened       map[string]os.FileInfo // the files that were opened, by path; for checkInPlace
	checked      time.Time              // when checkInPlace last found them in place
}

// openSQLite opens a database lazily: it touches no file before the first statement.
// See https://pkg.go.dev/modernc.org/sqlite#Driver.Open for the parameters.
func openSQLite(path string, params ...string) (*sql.DB, error) {
	abs, err := sqlitePath(path)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	name := filepath.ToSlash(abs)
	if !strings.HasPrefix(name, "/") {
		name = "/" + name // a Windows drive
	}
	params = append(params, fmt.Sprintf("_pragma=busy_timeout(%d)", busyTimeout.Milliseconds()), "_pragma=temp_store(2)") // 2 is memory
	dsn := url.URL{Scheme: "file", Path: name, RawQuery: strings.Join(params, "&")}
	db, err := sql.Open("sqlite", dsn.String())
	if err == nil {
		db.SetMaxOpenConns(1)
	}
	return db, err
}

// resolve returns the path with its links followed. inspect calls it first, because
// SQLite keeps -wal and -shm beside the target of a link.
func resolve(path string) (string, error) {
	target, err := filepath.EvalSymlinks(path)
	if !errors.Is(err, os.ErrNotExist) {
		return target, err
	}
	if _, lstatErr := os.Lstat(path); lstatErr == nil {
		return "", fmt.Errorf("%s is a link to a file that does not exist: put that back, or remove the link", path)
	}
	directory, err := filepath.EvalSymlinks(filepath.Dir(path))
	return filepath.Join(directory, filepath.Base(path)), err
}

// inspect makes sure that the file, if there is one, is a database of orderd, of a
// known version and whole, and reads its totals with that version's query. It writes
// nothing, except that SQLite rolls back a -journal beside the file.
func (d *database) inspect(queries map[int64]string, into ...any) (err error) {
	if d.path, err = resolve(d.path); err != nil {
		return err
	}
	info, err := d.checkFile()
	if info == nil {
		return err
	}
	noWAL := !exists(d.path + "-wal")
	params := []string{"mode=ro"} // so that closing db does not move the WAL into a file that is refused
	switch {
	case noWAL && exists(d.path+"-journal"): // an older orderd was cut off while it made the file: SQLite rolls that back
		params = []string{"mode=rw"}
	case noWAL:
		params = append(params, "immutable=1") // so that SQLite makes no -wal and -shm
	}
	db, err := openSQLite(d.path, params...)
	if err != nil {
		return err
	}
	defer db.Close()
	pageSize, err := d.checkVersion(db, queries)
	if err != nil || d.foundVersion == 0 {
		return err
	}
	if noWAL && info.Size()%pageSize != 0 {
		return damaged(d.path) // SQLite would read the missing part of the last page as zeros
	}
	err = db.QueryRow(queries[d.foundVersion]).Scan(into...)
	if err != nil && sqliteCode(err) == 0 { // no row, or no numbers in it
		return damaged(d.path)
	}
	return explain(d.path, err)
}

// checkFile makes sure that the file is a regular one and can be written. It returns
// nil and no error if there is no file.
func (d *database) checkFile() (os.FileInfo, error) {
	info, err := os.Stat(d.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("cannot open %s: %w", d.path, err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a file: move it away, or choose another directory with -data", d.path)
	}
	if err := makeDataFile(d.path); err != nil {
		return nil, err
	}
	return info, nil
}

// checkVersion sets foundVersion, unless the database is empty.
func (d *database) checkVersion(db *sql.DB, queries map[int64]string) (pageSize int64, err error) {
	var appID, version, objects int64
	row := db.QueryRow("SELECT a.application_id, v.user_version, p.page_size, (SELECT count(*) FROM sqlite_schema) FROM pragma_application_id a, pragma_user_version v, pragma_page_size p")
	if err := row.Scan(&appID, &version, &pageSize, &objects); err != nil {
		return 0, explain(d.path, err)
	}
	switch {
	case appID == 0 && version == 0 && objects == 0:
		return pageSize, nil
	case appID != d.appID:
		return 0, fmt.Errorf("%s is another program's database: move it away, or choose another directory with -data", d.path)
	case queries[version] == "":
		return 0, fmt.Errorf("%s has schema version %d and this orderd knows up to %d: use the orderd that wrote it", d.path, version, d.version)
	}
	d.foundVersion = version
	return pageSize, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// open makes the database if there is none, opens it for durable commits, and
// upgrades an older version. Call inspect first.
func (d *database) open(log *logger) (err error) {
	if d.foundVersion == 0 {
		if err := d.makeNew(); err != nil {
			return err
		}
	}
	if err := syncFile(d.path + "-wal"); err != nil {
		return fmt.Errorf("cannot bring %s-wal to disk: %w; check its owner and mode, and the disk", d.path, err)
	}
	if d.DB, err = openSQLite(d.path, "mode=rw"); err != nil {
		return err
	}
	if err := d.setDurable(); err != nil {
		return err
	}
	d.remember()
	if d.foundVersion < d.version {
		log.Info("upgrading the schema: up to a minute for each 5,000,000 orders", "file", d.path, "from", d.foundVersion, "to", d.version)
		return explain(d.path, d.upgrade())
	}
	return nil
}

// upgrade runs all upgrades in one transaction. SQLite sorts new indexes in files
// beside the database, because they may not fit into memory.
func (d *database) upgrade() error {
	directory := strings.ReplaceAll(filepath.Dir(d.path), "'", "''")
	steps := strings.Join(d.upgrades[len(d.upgrades)-int(d.version-d.foundVersion):], "")
	_, err := d.Exec(fmt.Sprintf("PRAGMA temp_store_directory = '%s'; PRAGMA temp_store = FILE; BEGIN IMMEDIATE; %s; PRAGMA user_version = %d; COMMIT; "+
		"PRAGMA temp_store = MEMORY; PRAGMA wal_checkpoint(TRUNCATE)", directory, steps, d.version))
	return err
}

// setDurable makes commits survive a power cut, and checks the settings afterwards.
func (d *database) setDurable() error {
	var journal string
	var synchronous int
	if err := d.QueryRow("PRAGMA journal_mode = WAL").Scan(&journal); err != nil {
		return explain(d.path, err)
	}
	// fullfsync matters on macOS only. The checkpoint moves the WAL into the database,
	// because an fsync of the WAL may have failed before this start.
	settings := fmt.Sprintf("PRAGMA synchronous = FULL; PRAGMA fullfsync = 1; PRAGMA checkpoint_fullfsync = 1; PRAGMA cache_size = -8192; PRAGMA wal_autocheckpoint = %d; PRAGMA wal_checkpoint(PASSIVE);", d.autoCheckpoint)
	if _, err := d.Exec(settings); err != nil {
		return explain(d.path, err)
	}
	if err := d.QueryRow("PRAGMA synchronous").Scan(&synchronous); err != nil || journal != "wal" || synchronous != 2 {
		return fmt.Errorf("%s cannot be made durable (journal_mode %s, synchronous %d, want wal and 2): keep the data directory on a local disk", d.path, journal, synchronous)
	}
	return nil
}

// makeNew makes the database under another name and then renames it, so that no power
// cut leaves an incomplete one.
func (d *database) makeNew() error {
	unfinished := d.path + ".new"
	// SQLite would apply a -wal or a -journal that an earlier file left to the new one.
	for _, leftover := range []string{unfinished, d.path + "-wal", d.path + "-shm", d.path + "-journal"} {
		if err := os.Remove(leftover); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("cannot remove %s, whose database is gone: %w", leftover, err)
		}
	}
	if err := makeDataFile(unfinished); err != nil {
		return err
	}
	db, err := openSQLite(unfinished, "mode=rw")
	if err != nil {
		return err
	}
	_, err = db.Exec(fmt.Sprintf("PRAGMA journal_mode = MEMORY; BEGIN; %s; PRAGMA application_id = %d; PRAGMA user_version = %d; COMMIT; PRAGMA journal_mode = WAL", d.schema, d.appID, d.version))
	if err := errors.Join(explain(d.path, err), db.Close()); err != nil {
		return err
	}
	if err = syncFile(unfinished); err == nil {
		err = os.Rename(unfinished, d.path)
	}
	if err != nil {
		return fmt.Errorf("cannot make %s: %w", d.path, err)
	}
	syncDirectory(filepath.Dir(d.path))
	syncDirectory(filepath.Dir(filepath.Dir(d.path))) // the log may have made the directory without a sync
	d.foundVersion = d.version
	return nil
}

// remember notes which files the database's paths name now, for checkInPlace.
func (d *database) remember() {
	d.opened = map[string]os.FileInfo{}
	for _, path := range []string{d.path, d.path + "-wal"} {
		if info, err := os.Stat(path); err == nil {
			d.opened[path] = info
		}
	}
}

const lookEvery = 100 * time.Millisecond // shortest pause between two checks that the files are in place

// inPlace is checkInPlace, at most once every lookEvery.
func (d *database) inPlace() error {
	if time.Since(d.checked) < lookEvery {
		return nil
	}
	return d.checkInPlace()
}

// checkInPlace returns an error if the paths no longer name the open files: the next
// start would not find what is written to a removed or replaced file.
func (d *database) checkInPlace() error {
	for _, path := range []string{d.path, d.path + "-wal"} {
		opened := d.opened[path]
		if now, err := os.Stat(path); opened != nil && (err != nil || !os.SameFile(opened, now)) {
			return fmt.Errorf("%s was removed or replaced while orderd has it open: move it back, or stop orderd and put a backup in its place", path)
		}
	}
	d.checked = time.Now()
	return nil
}

const copyPages = 1024 // pages copied at a time (4 MB)

// copyTo writes a copy of the database as of one moment to path, while others read
// and write. It reads in one transaction, because each commit would otherwise make
// the copy start again (https://sqlite.org/backup.html). The WAL grows meanwhile.
// copyTo syncs each part and pauses after it, because one large fsync at the end would
// delay those of the service.
func (d *database) copyTo(ctx context.Context, path string) error {
	if err := makeFile(path); err != nil {
		return err
	}
	source, err := openSQLite(d.path, "mode=rw", "_pragma=query_only(1)")
	if err != nil {
		return err
	}
	defer source.Close()
	conn, err := source.Conn(ctx)
	if err != nil {
		return explain(d.path, err)
	}
	defer conn.Close()
	if _, err := conn.ExecContext(ctx, "BEGIN; SELECT count(*) FROM sqlite_schema"); err != nil {
		return explain(d.path, err)
	}
	copyURI := url.URL{Scheme: "file", OmitHost: true, Path: filepath.ToSlash(path)} // a bare path would end at a ?
	err = conn.Raw(func(c any) error {
		b, err := c.(interface {
			NewBackup(string) (*sqlite.Backup, error)
		}).NewBackup(copyURI.String())
		if err != nil {
			return err
		}
		for more := true; more && err == nil; {
			began := time.Now()
			more, err = b.Step(copyPages)
			err = cmp.Or(err, syncFile(path), ctx.Err()) // syncFile's close drops SQLite's locks on the copy, which nobody else opens
			time.Sleep(2 * time.Since(began))
		}
		return cmp.Or(err, b.Finish())
	})
	if ctx.Err() != nil {
		return errors.New("it was interrupted")
	}
	if sqliteCode(err)&0xff == sqlite3.SQLITE_FULL { // the copy's disk is full, not the service's
		return explain(path, err)
	}
	if err != nil {
		return fmt.Errorf("cannot copy %s to %s: %w", d.path, path, err)
	}
	return nil
}

// setBusyTimeout changes the busy timeout of the one connection.
func (d *database) setBusyTimeout(t time.Duration) {
	d.Exec(fmt.Sprintf("PRAGMA busy_timeout = %d", t.Milliseconds()))
}

func (d *database) close() error {
	if d.DB == nil {
		return nil
	}
	return d.Close()
}

// lockDirectory makes dir and locks it against any other orderd.
func lockDirectory(dir string) (io.Closer, error) {
	if err := makeDirectory(dir); err != nil {
		return nil, fmt.Errorf("cannot make the data directory: %w; choose another with -data", err)
	}
	longest := filepath.Join(dir, "metrics.db.new") // the longest name that makeNew makes
	if _, err := sqlitePath(longest); err != nil {
		return nil, fmt.Errorf("cannot use the data directory: %w; choose another with -data", err)
	}
	lock, err := lockFile(filepath.Join(dir, "orderd.lock"))
	if errors.Is(err, errLocked) {
		return nil, fmt.Errorf("another orderd uses the data directory %s: stop it first, or choose another with -data", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot write to the data directory: %w; check the owner and mode, or choose another with -data", err)
	}
	return lock, nil
}

// makeDirectory makes dir and the directories that are missing above it, which only
// their owner may use, and makes their names durable.
func makeDirectory(dir string) error {
	_, err := os.Stat(dir)
	if !errors.Is(err, os.ErrNotExist) || filepath.Dir(dir) == dir {
		return err
	}
	if err := makeDirectory(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	syncDirectory(filepath.Dir(dir))
	return nil
}

// syncDirectory makes the names in dir durable. It ignores errors, because not every
// system can do that, and SQLite syncs the directory again when it makes a -wal.
func syncDirectory(dir string) {
	if d, err := os.Open(dir); err == nil {
		d.Sync()
		d.Close()
	}
}

// makeDataFile makes a database's file. SQLite gives -wal and -shm the same mode.
func makeDataFile(path string) error {
	if err := makeFile(path); err != nil {
		return fmt.Errorf("cannot write to the data directory: %w; check the owner and mode, or choose another with -data", err)
	}
	return nil
}

// syncFile brings a file to disk, if there is one. A -wal that a killed process left
// must be on disk before anything in it is shown. The checkpoint at start is not
// enough: it does not sync the WAL while another program reads an older state.
func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// sqliteCode returns SQLite's extended result code of err, or 0 if it has none.
func sqliteCode(err error) int {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code()
	}
	return 0
}

func damaged(path string) error {
	return fmt.Errorf("%s is damaged or not a database: put a backup in its place (the files were left as they are)", path)
}

// explain turns an SQLite error into one sentence with the remedy. It looks at the
// low byte, the primary result code: https://sqlite.org/rescode.html.
func explain(path string, err error) error {
	if err == nil {
		return nil
	}
	switch sqliteCode(err) & 0xff {
	case sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT:
		return damaged(path)
	case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM:
		return fmt.Errorf("%s cannot be opened for writing: check the owner and mode of the file and its directory", path)
	case sqlite3.SQLITE_FULL:
		return fmt.Errorf("%s cannot be written: the disk is full", path)
	case sqlite3.SQLITE_IOERR:
		return fmt.Errorf("%s cannot be read or written: check the disk and the room on it (%w)", path, err)
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		return fmt.Errorf("%s is locked by another program: close it there first", path)
	}
	return fmt.Errorf("cannot use %s: %w", path, err)
}
