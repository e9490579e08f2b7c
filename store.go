package main

import (
	"cmp"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// status only moves forward.
type status uint8

const (
	pending status = iota
	processing
	completed
)

var statusNames = [...]string{"Pending", "Processing", "Completed"}

func (s status) String() string { return statusNames[s] }

// order is one row. Its ULID says when it was created and, since the writer
// makes the IDs in commit order, its place in the queue.
type order struct {
	id      ulid.ULID
	userID  string
	itemIDs string // comma-separated, no spaces around the commas
	cents   int64
	status  status
	started int64 // Unix ms, by the wall clock; 0 until Processing
	took    int64 // µs from start to completion, by the monotonic clock
}

// high is the half of an ID that is the primary key: 48 bits of Unix ms and
// 16 bits of sequence. low is the random half.
func high(id ulid.ULID) int64 { return int64(binary.BigEndian.Uint64(id[:8])) }
func low(id ulid.ULID) int64  { return int64(binary.BigEndian.Uint64(id[8:])) }

func joinID(high, low int64) (id ulid.ULID) {
	binary.BigEndian.PutUint64(id[:8], uint64(high))
	binary.BigEndian.PutUint64(id[8:], uint64(low))
	return id
}

const ordersVersion = 2 // PRAGMA user_version of orders.db

const ordersSchema = `
CREATE TABLE orders (
	id_high  INTEGER PRIMARY KEY, -- of the ULID: (Unix ms of creation << 16) + sequence; also the queue's order
	id_low   INTEGER NOT NULL,    -- of the ULID: random
	status   INTEGER NOT NULL CHECK (status BETWEEN 0 AND 2), -- Pending, Processing, Completed
	user_id  TEXT    NOT NULL,
	item_ids TEXT    NOT NULL,    -- comma-separated
	cents    INTEGER NOT NULL CHECK (cents >= 0),
	started  INTEGER,             -- Unix ms; of the attempt that completed it, once Completed
	took     INTEGER              -- µs from started to completion
) STRICT;
CREATE INDEX orders_unfinished ON orders (status) WHERE status < 2; -- as small as the backlog
-- An index on user_id that is cheap to write: sorted anew for every run of
-- orders, and brought up to date some batches later. It lacks the newest.
CREATE TABLE orders_by_user (
	run     INTEGER NOT NULL,
	user    TEXT    NOT NULL,
	id_high INTEGER NOT NULL,
	PRIMARY KEY (run, user, id_high)
) STRICT, WITHOUT ROWID;
CREATE TABLE user_runs (first INTEGER PRIMARY KEY); -- no id_high in the run is below it
INSERT INTO user_runs VALUES (0);
CREATE TABLE idempotency_keys (
	key     TEXT PRIMARY KEY,
	id_high INTEGER NOT NULL -- the order that the key created
) STRICT, WITHOUT ROWID;
-- Running totals, written in the transaction that changes them. They are the
-- outbox to metrics.db: being sums, they can be taken over any number of times.
CREATE TABLE totals (
	accepted       INTEGER NOT NULL, -- orders in the table
	processing     INTEGER NOT NULL, -- of these, being processed
	completed      INTEGER NOT NULL, -- of these, completed
	took           INTEGER NOT NULL, -- µs, sum over the completed
	newest_started INTEGER NOT NULL, -- id_high of the newest order that ever left Pending
	indexed        INTEGER NOT NULL, -- orders in orders_by_user
	newest_indexed INTEGER NOT NULL  -- id_high of the newest of them
) STRICT;
INSERT INTO totals VALUES (0, 0, 0, 0, 0, 0, 0);`

// ordersView is for people with the sqlite3 command line.
func ordersView() string {
	digits := make([]string, 26) // Crockford's base 32, 5 bits a digit, from the right
	for i := range digits {
		bits := fmt.Sprintf("(id_low >> %d) & 31", 5*i)
		switch {
		case i == 12: // 4 bits of the lower half, 1 of the upper
			bits = "((id_low >> 60) & 15) | ((id_high & 1) << 4)"
		case i > 12:
			bits = fmt.Sprintf("(id_high >> %d) & 31", 5*i-64)
		}
		digits[25-i] = fmt.Sprintf("substr('%s', 1 + (%s), 1)", ulid.Encoding, bits)
	}
	const when = "strftime('%%Y-%%m-%%dT%%H:%%M:%%fZ', (%s) / 1000.0, 'unixepoch')"
	return "\nCREATE VIEW orders_readable AS SELECT " + strings.Join(digits, " || ") + ` AS order_id,
	CASE status WHEN 0 THEN 'Pending' WHEN 1 THEN 'Processing' ELSE 'Completed' END AS status,
	user_id, item_ids, printf('%d.%02d', cents / 100, cents % 100) AS total_amount,
	` + fmt.Sprintf(when, "id_high >> 16") + ` AS created_at,
	` + fmt.Sprintf(when, "started") + ` AS started_at,
	` + fmt.Sprintf(when, "started + took / 1000") + ` AS completed_at
FROM orders;`
}

// sums are the part of the totals that metrics.db takes over.
type sums struct {
	accepted, completed, took int64
}

// totals is the row of that name.
type totals struct {
	sums
	processing, newestStarted, indexed, newestIndexed int64
}

func (t totals) pending() int64 { return t.accepted - t.processing - t.completed }

// Limits of what waits for the writer. Beyond them a create is refused and a
// worker waits; a batch, and so a transaction, is never larger.
const (
	maxCreates = 4096
	maxSteps   = 8192
)

// The index for user_id. More orders to a run make a page of a list cheaper,
// where a user has few orders, and creates dearer, where there are many users.
const (
	indexEvery = 1024  // orders; as many and a batch may be missing from it
	runOrders  = 16384 // in a run
	pageRuns   = 1024  // runs in which one page of a list is looked for
)

const (
	walCheckEvery   = 512                    // operations, of a few pages each, between looks at the WAL's length
	checkpointPages = 4000                   // WAL pages (16 MB) after which the writer checkpoints
	walKeptPages    = 8000                   // a longer WAL gives its space back
	readerPause     = 100 * time.Millisecond // longest that a checkpoint waits for readers
	retryPause      = time.Second            // before another attempt at a write, a checkpoint or a backlog's read that failed
	stallPause      = 2 * time.Second        // after so long at one batch the store is not ready
	stepPause       = 5 * time.Millisecond   // longest that a step waits for company
	busyTimeout     = time.Second            // for another program's lock on a database
	listReaders     = 4                      // read-only connections
	readBytes       = 256 << 10              // of text, after which a read of many orders ends
)

// Why the store does not take a create now. Except after errOutcomeUnknown,
// nothing of the order is stored.
var (
	errBusy           = fmt.Errorf("more than %d orders wait for the disk", maxCreates)
	errUnwritable     = errors.New("the store cannot be written")
	errOutcomeUnknown = errors.New("the outcome of the commit is unknown")
	errClosed         = errors.New("the store is closed")
	errStalled        = fmt.Errorf("the disk has not taken a write for more than %s", stallPause)
	errKeyReused      = errors.New("the idempotency key was used with other content")
	errNotFound       = errors.New("no such order")
)

// create is an order on its way into the table.
type create struct {
	order
	key      string // idempotency key, or empty
	replayed bool   // order is the one that the key created earlier
	err      error  // errKeyReused
}

// replay answers with the order that the key has already created.
func (c *create) replay(earlier order) {
	c.err = errKeyReused
	if earlier.userID == c.userID && earlier.itemIDs == c.itemIDs && earlier.cents == c.cents {
		c.order, c.replayed, c.err = earlier, true, nil
	}
}

func (c *create) stored() bool { return !c.replayed && c.err == nil }

// step is one order's move to a later status.
type step struct {
	id            ulid.ULID
	from, to      status
	started, took int64 // as in order
	void          bool  // the writer's: it did not find its order
}

// batch is what one transaction holds. While it is the store's open batch it
// is guarded by store.mu; then it belongs to the writer until done is closed,
// and after that to whoever waited.
type batch struct {
	creates []*create
	steps   []step
	after   int64 // upper half of the newest ID before this batch
	done    chan struct{}
	err     error // of every create in it
}

func newBatch(steps []step) *batch { return &batch{steps: steps, done: make(chan struct{})} }

// store owns orders.db. One goroutine and one connection do all the writing:
// it takes whatever waits, runs it in one transaction with one fsync (group
// commit), and only then updates the cache and answers.
type store struct {
	lock    *sql.DB // holds the data directory for this process
	db      *database
	write   statements // the writer's
	reads   *sql.DB
	readOne *sql.Stmt
	cache   *cache
	log     *logger
	hooks   hooks

	mu       sync.Mutex // guards all up to the blank line
	open     *batch
	writing  time.Time // when the writer took the batch that it is at, or after which it checkpoints; or zero
	refusing error     // why creates are refused now, or nil
	closing  bool

	quit    chan struct{} // closed by close
	wake    chan struct{} // capacity 1: a create, or a full batch, waits for the writer
	stepped chan struct{} // capacity 1: a step does
	fed     chan *batch   // batches with new orders, for the feeder; it reads the table where one is missing
	counted chan struct{} // capacity 1: the totals changed; the projector receives
	stopped chan struct{} // closed when the writer has ended
	failed  chan struct{} // closed when the writer gave up: errOutcomeUnknown

	resumeAfter int64                  // upper half of an ID: all orders up to it are Completed; set at start
	totals      atomic.Pointer[totals] // as of the last commit
	newest      int64                  // the writer's: upper half of the newest ID
	unchecked   int                    // the writer's: operations since it looked at the WAL's length
	overdue     <-chan time.Time       // the writer's: when to try the checkpoint again that a reader held back
	heldAt      int64                  // the writer's: WAL pages moved in that one, or -1; as many again mean the same reader
	batchSizes  histogram
	batchTimes  histogram
}

type statements struct {
	begin, commit, rollback, insert, insertMany, step, total, index, run, key, keyed, probe, walPages *sql.Stmt
}

// insertRows is how many orders one INSERT takes where there are as many: the
// price of running a statement is shared, and more rows share hardly better.
const (
	insertRows = 16
	orderArgs  = 5 // placeholders of a row
)

const orderColumns = "id_high, id_low, status, user_id, item_ids, cents, coalesce(started, 0), coalesce(took, 0)"

const findKeyed = "SELECT " + orderColumns + " FROM orders JOIN idempotency_keys USING (id_high) WHERE key = ?"

// openStore takes the data directory for this process, checks both databases
// before it writes to either, and opens them.
func openStore(cfg config, statuses *cache, log *logger) (s *store, m *metrics, err error) {
	s = &store{
		cache: statuses, log: log, hooks: cfg.hooks,
		open: newBatch(nil), heldAt: -1, quit: make(chan struct{}), wake: make(chan struct{}, 1), stepped: make(chan struct{}, 1),
		fed: make(chan *batch, 16), counted: make(chan struct{}, 1),
		stopped: make(chan struct{}), failed: make(chan struct{}),
		batchSizes: newHistogram(batchSizeBounds), batchTimes: newHistogram(latencyBounds),
	}
	if s.hooks.now == nil {
		s.hooks.now = time.Now
	}
	if s.lock, err = lockDirectory(cfg.data); err != nil {
		return nil, nil, err
	}
	s.db = &database{path: filepath.Join(cfg.data, "orders.db"), appID: 0x6f726472, version: ordersVersion, schema: ordersSchema + ordersView()}
	m = newMetrics(cfg, s, log)
	if err := s.openBoth(m); err != nil {
		return nil, nil, errors.Join(err, m.db.close(), s.db.close(), s.lock.Close())
	}
	return s, m, nil
}

// openBoth checks everything before it changes anything.
func (s *store) openBoth(m *metrics) error {
	var t totals
	var counted sums
	if err := s.db.inspect("SELECT * FROM totals",
		&t.accepted, &t.processing, &t.completed, &t.took, &t.newestStarted, &t.indexed, &t.newestIndexed); err != nil {
		return err
	}
	if err := m.db.inspect("SELECT accepted, completed, took FROM totals", &counted.accepted, &counted.completed, &counted.took); err != nil {
		return err
	}
	if counted.accepted > t.accepted || counted.completed > t.completed {
		return fmt.Errorf("%s has lost orders: it holds %d, %d of them completed, but %s has counted %d and %d; put back the newest orders.db together with its -wal file, or delete %[4]s to accept the loss",
			s.db.path, t.accepted, t.completed, m.db.path, counted.accepted, counted.completed)
	}
	if err := s.db.prepare(); err != nil {
		return err
	}
	if err := m.db.prepare(); err != nil {
		return err
	}
	s.totals.Store(&t)
	if err := s.prepareStatements(); err != nil {
		return explain(s.db.path, err)
	}
	m.counted.Store(&counted)
	return m.take(t.sums)
}

// lockDirectory makes dir and takes SQLite's own crash-released lock on a
// small database in it. See https://sqlite.org/lockingv3.html.
func lockDirectory(dir string) (*sql.DB, error) {
	if err := makeDirectory(dir); err != nil {
		return nil, fmt.Errorf("cannot make the data directory: %w; choose another with -data", err)
	}
	path := filepath.Join(dir, "orderd.lock")
	if err := makeFile(path); err != nil {
		return nil, err
	}
	db, err := openSQLite(path, "mode=rw")
	if err != nil {
		return nil, err
	}
	_, err = db.Exec("PRAGMA busy_timeout = 0; BEGIN EXCLUSIVE")
	if code(err) == sqlite3.SQLITE_BUSY {
		err = fmt.Errorf("another orderd uses the data directory %s: stop it first, or choose another with -data", dir)
	} else if err != nil {
		err = explain(path, err)
	}
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// makeDirectory makes dir and what is missing above it, for their owner only,
// and makes their names durable.
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
	parent, err := os.Open(filepath.Dir(dir))
	if err != nil {
		return err
	}
	defer parent.Close()
	parent.Sync() // not possible on every system, and no order is in it yet
	return nil
}

func (s *store) prepareStatements() (err error) {
	prepare := func(query string) *sql.Stmt {
		stmt, prepareErr := s.db.Prepare(query)
		err = cmp.Or(err, prepareErr)
		return stmt
	}
	// OR ROLLBACK spares SQLite a statement journal; an error ends the transaction anyhow.
	const insert = "INSERT OR ROLLBACK INTO orders (id_high, id_low, status, user_id, item_ids, cents) VALUES "
	const values = "(?, ?, 0, ?, ?, ?)"
	s.write = statements{
		begin:      prepare("BEGIN IMMEDIATE"),
		commit:     prepare("COMMIT"),
		rollback:   prepare("ROLLBACK"),
		insert:     prepare(insert + values),
		insertMany: prepare(insert + values + strings.Repeat(", "+values, insertRows-1)),
		step:       prepare("UPDATE orders SET status = ?, started = ?, took = ? WHERE id_high = ? AND status = ?"),
		total:      prepare("UPDATE totals SET accepted = ?, processing = ?, completed = ?, took = ?, newest_started = ?, indexed = ?, newest_indexed = ?"),
		index:      prepare("INSERT INTO orders_by_user SELECT (SELECT max(first) FROM user_runs), user_id, id_high FROM orders WHERE id_high > ? ORDER BY user_id, id_high"),
		run:        prepare("INSERT INTO user_runs VALUES (?)"),
		key:        prepare("INSERT INTO idempotency_keys (key, id_high) VALUES (?, ?)"),
		keyed:      prepare(findKeyed),
		probe:      prepare(fmt.Sprintf("PRAGMA user_version = %d", ordersVersion)),
		// NOOP reads the WAL's length and moves nothing: https://sqlite.org/pragma.html#pragma_wal_checkpoint
		walPages: prepare("PRAGMA wal_checkpoint(NOOP)"),
	}
	if err != nil {
		return err
	}
	if err := s.db.QueryRow("SELECT coalesce(max(id_high), 0) FROM orders").Scan(&s.newest); err != nil {
		return err
	}
	if s.reads, err = openSQLite(s.db.path, "mode=ro", "_pragma=query_only(1)"); err != nil {
		return err
	}
	s.reads.SetMaxOpenConns(listReaders)
	if s.readOne, err = s.reads.Prepare("SELECT " + orderColumns + " FROM orders WHERE id_high = ?"); err != nil {
		return err
	}
	firstPending, err := s.oldest(pending)
	if err != nil {
		return err
	}
	firstProcessing, err := s.oldest(processing)
	s.resumeAfter = min(s.newest, firstPending-1, firstProcessing-1)
	return err
}

// start begins to write and returns how many orders are unfinished.
func (s *store) start() int64 {
	go s.writeLoop()
	t := s.totals.Load()
	return t.accepted - t.completed
}

// create puts an order into the open batch and returns once that batch is on
// disk. The writer gives c.order its ID.
func (s *store) create(c *create) error {
	s.mu.Lock()
	b, err := s.open, s.refusal()
	if err == nil {
		b.creates = append(b.creates, c)
	}
	s.mu.Unlock()
	if err == nil {
		nudge(s.wake)
		<-b.done
		err = b.err
	}
	if err != nil && c.key != "" {
		if earlier, findErr := scanOrder(s.reads.QueryRow(findKeyed, c.key).Scan); findErr == nil {
			c.replay(earlier)
			err = nil
		}
	}
	return cmp.Or(err, c.err)
}

// refusal tells why a create is not taken now. It needs s.mu.
func (s *store) refusal() error {
	switch {
	case s.closing:
		return errClosed
	case len(s.open.creates) == maxCreates:
		return errBusy
	}
	return s.refusing
}

// ready tells why a create would be refused now, or wait too long.
func (s *store) ready() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.refusal()
	if err == nil && !s.writing.IsZero() && time.Since(s.writing) > stallPause {
		err = errStalled
	}
	return err
}

// ticket is where a step waits. As long as that batch is open, the order's
// next step takes its place: only the last of a batch need be written.
type ticket struct {
	b *batch
	i int
}

// step hands a move to the writer without waiting for the commit; it waits
// only while the open batch is full. earlier is the ticket of the same order's
// step before, if any.
func (s *store) step(st step, earlier ticket) ticket {
	for {
		s.mu.Lock()
		b := s.open
		if earlier.b == b {
			st.from = b.steps[earlier.i].from
			b.steps[earlier.i] = st
			s.mu.Unlock()
			return earlier
		}
		if len(b.steps) < maxSteps {
			at := ticket{b, len(b.steps)}
			b.steps = append(b.steps, st)
			s.mu.Unlock()
			nudge(s.stepped)
			return at
		}
		s.mu.Unlock()
		nudge(s.wake)
		select {
		case <-b.done:
		case <-s.stopped:
			return ticket{}
		}
	}
}

// take closes the open batch and opens the next.
func (s *store) take() *batch {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.open
	s.open, s.writing = newBatch(nil), time.Now()
	return b
}

// writeLoop is the writer. Its last batch is the one that close found open.
func (s *store) writeLoop() {
	defer close(s.stopped)
	for open := true; open; {
		select {
		case <-s.wake:
		case <-s.stepped: // nobody waits for a step: let it share a create's fsync
			select {
			case <-s.wake:
			case <-time.After(stepPause):
			case <-s.quit:
			}
		case <-s.overdue:
			s.overdue, s.unchecked = nil, walCheckEvery
		case <-s.quit:
			open = false
		}
		s.gather()
		b := s.take()
		err := s.settle(b)
		if err == nil {
			err = s.checkpoint(len(b.creates) + len(b.steps))
		}
		if err != nil {
			s.giveUp(err)
			return
		}
		s.mu.Lock()
		s.writing = time.Time{}
		s.mu.Unlock()
	}
}

// gather lets everyone who is ready to run go first, as long as that brings
// more creates into the batch. Under load they share its fsync; when idle it
// costs no time.
func (s *store) gather() {
	for before, now := -1, 0; before < now; {
		runtime.Gosched()
		s.mu.Lock()
		before, now = now, len(s.open.creates)
		s.mu.Unlock()
	}
}

// settle brings a batch to disk and answers it. When the disk does not take
// it, its creates are refused, and all new ones too; its steps, or a probe
// where it has none, are tried again until there is room. An error means that the writer must not go on.
func (s *store) settle(b *batch) error {
	if len(b.creates)+len(b.steps) == 0 {
		return nil
	}
	for err := s.commit(b); err != nil; err = s.commit(b) {
		reason := errUnwritable
		if errors.Is(err, errOutcomeUnknown) {
			reason = errOutcomeUnknown
		}
		// No room for the WAL's index (-shm), found after the WAL's fsync: a restart
		// now would find the batch, but the next commit takes its place.
		if reason == errOutcomeUnknown && code(err) != sqlite3.SQLITE_IOERR_SHMSIZE {
			b.answer(reason)
			return err
		}
		if s.refuse(errUnwritable) {
			s.log.Warn("orders are refused until the store can be written", "error", err)
		}
		b.answer(reason)
		b = newBatch(b.steps)
		select {
		case <-time.After(retryPause):
		case <-s.quit:
			return nil // the next start takes these steps again
		}
	}
	s.cache.apply(b)
	b.answer(nil)
	if len(b.creates) > 0 {
		s.feed(b)
	}
	nudge(s.counted)
	if s.refuse(nil) {
		s.log.Warn("orders are accepted again")
	}
	return nil
}

// feed hands a batch to the feeder, in the place of the oldest when too many
// wait: from the newest one it always sees that it has missed some.
func (s *store) feed(b *batch) {
	if len(s.fed) == cap(s.fed) {
		select {
		case <-s.fed:
		default: // the feeder was quicker
		}
	}
	s.fed <- b // has room: nobody else sends
}

// answer releases everyone who waits for the batch.
func (b *batch) answer(err error) {
	b.err = err
	close(b.done)
}

// refuse makes creates fail with err from now on, or lets them in again with
// nil. It reports whether that is a change.
func (s *store) refuse(err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := s.refusing != err
	s.refusing = err
	if waiting := s.open; err != nil && len(waiting.creates) > 0 { // they joined while the refused batch was written
		s.open = newBatch(waiting.steps)
		waiting.answer(err)
	}
	return changed
}

// giveUp ends the writer after an outcome that only a restart can find out:
// the kernel may have dropped what an fsync could not write, and would call
// the next one good (https://wiki.postgresql.org/wiki/Fsync_Errors).
func (s *store) giveUp(err error) {
	s.log.Error("the writer gave up: restart orderd to find out what is on disk", "error", err)
	s.refuse(errUnwritable)
	close(s.failed)
}

// commit runs a batch in one transaction. Its error is errOutcomeUnknown, or
// else nothing of the batch is in the table.
func (s *store) commit(b *batch) error {
	began := time.Now()
	t := *s.totals.Load()
	b.after = s.newest
	if err := s.fill(b, &t); err != nil {
		s.newest = b.after
		s.write.rollback.Exec() // fails where SQLite has rolled back by itself
		if code(err) == sqlite3.SQLITE_IOERR_FSYNC {
			return fmt.Errorf("%w: %w", errOutcomeUnknown, err)
		}
		return err
	}
	if s.hooks.beforeCommit != nil {
		s.hooks.beforeCommit(s, b)
	}
	if _, err := s.write.commit.Exec(); err != nil {
		s.newest = b.after
		// Only these two are known to leave the transaction rolled back:
		// https://sqlite.org/lang_transaction.html#response_to_errors_within_a_transaction.
		if c := code(err); c == sqlite3.SQLITE_FULL || c == sqlite3.SQLITE_IOERR_WRITE {
			s.write.rollback.Exec()
			return err
		}
		return fmt.Errorf("%w: %w", errOutcomeUnknown, err)
	}
	s.totals.Store(&t)
	s.batchSizes.observe(float64(len(b.creates) + len(b.steps)))
	s.batchTimes.observe(time.Since(began).Seconds())
	return nil
}

// fill does everything of a transaction but its end.
func (s *store) fill(b *batch, t *totals) error {
	if _, err := s.write.begin.Exec(); err != nil {
		return err
	}
	if err := s.insertAll(b.creates, t); err != nil {
		return err
	}
	for i := range b.steps {
		if err := s.apply(&b.steps[i], t); err != nil {
			return err
		}
	}
	if t.accepted-t.indexed >= indexEvery {
		if err := s.index(t); err != nil {
			return err
		}
	}
	if len(b.creates)+len(b.steps) == 0 { // SQLite would write nothing where nothing changes
		_, err := s.write.probe.Exec()
		return err
	}
	_, err := s.write.total.Exec(t.accepted, t.processing, t.completed, t.took, t.newestStarted, t.indexed, t.newestIndexed)
	return err
}

// index brings orders_by_user up to date. So many orders at once, in the few
// pages of one run, share the pages that they change.
func (s *store) index(t *totals) error {
	if _, err := s.write.index.Exec(t.newestIndexed); err != nil {
		return err
	}
	if t.indexed/runOrders < t.accepted/runOrders {
		if _, err := s.write.run.Exec(s.newest + 1); err != nil {
			return err
		}
	}
	t.indexed, t.newestIndexed = t.accepted, s.newest
	return nil
}

// insertAll inserts the new orders, many to a statement where there are many.
func (s *store) insertAll(creates []*create, t *totals) error {
	args := make([]any, 0, insertRows*orderArgs)
	for _, c := range creates {
		if c.key != "" {
			if err := s.insertKeyed(c, t); err != nil {
				return err
			}
			continue
		}
		args = s.number(c, t, args)
		if len(args) == cap(args) {
			if _, err := s.write.insertMany.Exec(args...); err != nil {
				return err
			}
			args = args[:0]
		}
	}
	for ; len(args) > 0; args = args[orderArgs:] {
		if _, err := s.write.insert.Exec(args[:orderArgs]...); err != nil {
			return err
		}
	}
	return nil
}

// insertKeyed inserts an order together with its idempotency key, or finds the
// order that the key has already created.
func (s *store) insertKeyed(c *create, t *totals) error {
	earlier, err := scanOrder(s.write.keyed.QueryRow(c.key).Scan)
	if err == nil {
		c.replay(earlier)
		return nil
	}
	if !errors.Is(err, errNotFound) {
		return err
	}
	if _, err := s.write.insert.Exec(s.number(c, t, nil)...); err != nil {
		return err
	}
	_, err = s.write.key.Exec(c.key, high(c.id))
	return err
}

// number gives a new order the next ID, later than every ID in the table
// whatever the clock does, counts it, and appends the arguments of its INSERT.
func (s *store) number(c *create, t *totals, args []any) []any {
	s.newest = max(s.newest+1, s.hooks.now().UnixMilli()<<16)
	c.id = joinID(s.newest, int64(rand.Uint64()))
	t.accepted++
	return append(args, s.newest, low(c.id), c.userID, c.itemIDs, c.cents)
}

// apply writes a step and counts it, unless the order is not where the step
// starts from: then the step is void.
func (s *store) apply(st *step, t *totals) error {
	var took any // NULL until Completed
	if st.to == completed {
		took = st.took
	}
	result, err := s.write.step.Exec(st.to, st.started, took, high(st.id), st.from)
	if err != nil {
		return err
	}
	n, err := result.RowsAffected()
	if st.void = n != 1; err != nil {
		return err
	} else if st.void {
		s.log.Error("a step did not find its order", "order_id", st.id.String(), "from", st.from.String(), "to", st.to.String())
		return nil
	}
	t.newestStarted = max(t.newestStarted, high(st.id))
	if st.from == processing {
		t.processing--
	}
	if st.to == processing {
		t.processing++
		return nil
	}
	t.completed++
	t.took += st.took
	return nil
}

// checkpoint moves the WAL into the database once it is long enough, after the
// batch was answered, so that the next commit begins it anew. It waits a little
// for readers, once for each that holds it back, and tries again later. written
// is how many operations came since the last call. An error means that the
// writer must not go on; SQLite's own checkpoints would swallow it. See
// https://sqlite.org/wal.html#ckpt.
func (s *store) checkpoint(written int) error {
	if s.unchecked += written; s.unchecked < walCheckEvery || s.overdue != nil {
		return nil
	}
	s.unchecked = 0
	var busy, pages, moved int64
	if err := s.write.walPages.QueryRow().Scan(&busy, &pages, &moved); err != nil || pages < checkpointPages {
		return err
	}
	run := func(mode string) error {
		return s.db.QueryRow("PRAGMA wal_checkpoint("+mode+")").Scan(&busy, &pages, &moved)
	}
	err := run("PASSIVE")
	if err == nil && (moved == pages || moved != s.heldAt) {
		mode := "RESTART"
		if pages > walKeptPages {
			mode = "TRUNCATE"
		}
		s.db.setBusyTimeout(readerPause)
		err = run(mode)
		s.db.setBusyTimeout(busyTimeout)
	}
	if code(err) == sqlite3.SQLITE_IOERR_FSYNC {
		return fmt.Errorf("%w: %w", errOutcomeUnknown, err)
	}
	if err != nil {
		s.log.Warn("the WAL could not be moved into the database yet", "error", err)
	}
	s.heldAt = -1
	if err != nil || busy != 0 || moved < pages {
		s.overdue, s.heldAt = time.After(retryPause), moved
	}
	return nil
}

func scanOrder(scan func(...any) error) (o order, err error) {
	var idHigh, idLow int64
	err = scan(&idHigh, &idLow, &o.status, &o.userID, &o.itemIDs, &o.cents, &o.started, &o.took)
	if errors.Is(err, sql.ErrNoRows) {
		return o, errNotFound
	}
	o.id = joinID(idHigh, idLow)
	return o, err
}

// find reads one order from the table.
func (s *store) find(id ulid.ULID) (order, error) {
	o, err := scanOrder(s.readOne.QueryRow(high(id)).Scan)
	if err == nil && o.id != id {
		err = errNotFound
	}
	return o, err
}

// unfinished returns up to limit orders after the one given, oldest first,
// that are not Completed. The feeder's: behind what it has read, all are Pending.
func (s *store) unfinished(after int64, limit int) ([]order, error) {
	orders, _, err := s.query(readBytes, "SELECT "+orderColumns+" FROM orders NOT INDEXED WHERE id_high > ? AND status < 2 ORDER BY id_high LIMIT ?", after, limit)
	return orders, err
}

// oldest is the upper half of the ID of the oldest order in an unfinished
// status, or math.MaxInt64 where there is none.
func (s *store) oldest(st status) (idHigh int64, err error) {
	err = s.reads.QueryRow("SELECT coalesce(min(id_high), ?) FROM orders INDEXED BY orders_unfinished WHERE status < 2 AND status = ?", int64(math.MaxInt64), st).Scan(&idHigh)
	return idHigh, err
}

// filter is what a list asks for.
type filter struct {
	before int64 // upper half of an ID; only older orders
	userID string
	status *status
	limit  int
}

// list returns a page of orders, newest first, and the ID that the next page
// goes on before; zero on the last one.
func (s *store) list(f filter) (orders []order, next ulid.ULID, err error) {
	p, err := s.plan(f)
	room := readBytes
	for i := 0; err == nil && room > 0 && i < len(p.queries); i++ {
		var found []order
		missing := f.limit + 1 - len(orders) // one more tells whether there is a next page
		found, room, err = s.query(room, p.queries[i], append(p.args, sql.Named("limit", missing))...)
		orders = append(orders, found...)
	}
	switch {
	case room <= 0 || len(orders) > f.limit:
		orders = orders[:min(len(orders), f.limit)]
		next = orders[len(orders)-1].id
	case p.end > p.from:
		next = joinID(p.end, 0)
	}
	return orders, next, err
}

// plan is how a page is looked up: by its queries in turn, the one for newer
// orders first, in the stretch of the table from @from to @before.
type plan struct {
	queries   []string
	args      []any
	from, end int64 // no order is older than from; the queries look for none older than end
}

// plan makes every page cost by its size and not by the table's. Pending
// orders begin at the oldest one and Completed ones end at the newest that was
// started; only what pool and queue hold lies among them, and that is all of
// the Processing ones, which have an index. A user's orders are searched for
// among the newest, which are not indexed yet, and then in pageRuns runs.
func (s *store) plan(f filter) (p plan, err error) {
	t := s.totals.Load()
	source, where := "orders NOT INDEXED", ""
	if f.status != nil {
		where = " AND status = @status"
		p.args = append(p.args, sql.Named("status", *f.status))
		switch *f.status {
		case pending:
			if p.from, err = s.oldest(pending); err != nil {
				return p, err
			}
		case processing:
			source, where = "orders INDEXED BY orders_unfinished", where+" AND status < 2"
		case completed:
			f.before = min(f.before, t.newestStarted+1)
		}
	}
	add := func(source, where, order string) {
		p.queries = append(p.queries, "SELECT "+orderColumns+" FROM "+source+" WHERE "+where+" ORDER BY "+order+"id_high DESC LIMIT @limit")
	}
	p.args = append(p.args, sql.Named("from", p.from), sql.Named("before", f.before), sql.Named("user", f.userID), sql.Named("indexed", t.newestIndexed))
	switch {
	case f.userID == "":
		add(source, "id_high >= @from AND id_high < @before"+where, "")
	case f.status != nil && *f.status == processing:
		add(source, "id_high >= @from AND id_high < @before AND user_id = @user"+where, "")
	default:
		add(source, "id_high >= max(@from, @indexed + 1) AND id_high < @before AND user_id = @user"+where, "")
		add("user_runs CROSS JOIN orders_by_user ON run = first CROSS JOIN orders USING (id_high)",
			"first >= @end AND first < @before AND user = @user AND id_high >= @from AND id_high < min(@before, @indexed + 1)"+where, "first DESC, ")
		err = s.reads.QueryRow(`SELECT max((SELECT max(first) FROM user_runs WHERE first <= @from),
			coalesce((SELECT first FROM user_runs WHERE first < @before ORDER BY first DESC LIMIT 1 OFFSET @runs - 1), 0))`,
			append(p.args, sql.Named("runs", pageRuns))...).Scan(&p.end)
		p.args = append(p.args, sql.Named("end", p.end))
	}
	return p, err
}

// query reads orders as long as there is room, in bytes of text, and tells how
// much is left: none where it ended early.
func (s *store) query(room int, query string, args ...any) (orders []order, left int, err error) {
	rows, err := s.reads.Query(query, args...)
	if err != nil {
		return nil, room, err
	}
	defer rows.Close()
	for room > 0 && rows.Next() {
		o, err := scanOrder(rows.Scan)
		if err != nil {
			return nil, room, err
		}
		orders = append(orders, o)
		room -= len(o.userID) + len(o.itemIDs)
	}
	return orders, room, rows.Err()
}

// walBytes is the size of the -wal file.
func (s *store) walBytes() int64 {
	info, err := os.Stat(s.db.path + "-wal")
	if err != nil {
		return 0
	}
	return info.Size()
}

// close writes what waits and closes the files, readers first so that the
// writer's connection is the last and removes the WAL. After the writer gave
// up nothing may be synced again: the files are left for the next start.
func (s *store) close() error {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	close(s.quit)
	<-s.stopped
	select {
	case <-s.failed:
		return errors.New("a write to orders.db failed and its outcome is unknown: check the disk, then start orderd again to find out; no order it confirmed is lost")
	default:
	}
	return errors.Join(s.reads.Close(), s.db.close())
}

// unlock lets another process have the data directory.
func (s *store) unlock() error { return s.lock.Close() }

// database is one SQLite file of ours.
type database struct {
	*sql.DB // one connection; nil until prepare
	path    string
	appID   int64 // PRAGMA application_id
	version int64 // PRAGMA user_version
	schema  string
	// WAL pages after which SQLite makes a checkpoint by itself, in the commit
	// and whatever comes of it; 0 where its owner makes them.
	autoCheckpoint int
	empty          bool // no schema yet
}

// openSQLite opens lazily: no file is touched before the first statement.
// See https://pkg.go.dev/modernc.org/sqlite#Driver.Open for the parameters.
func openSQLite(path string, params ...string) (*sql.DB, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	name := filepath.ToSlash(abs)
	if !strings.HasPrefix(name, "/") {
		name = "/" + name // a Windows drive
	}
	params = append(params, fmt.Sprintf("_pragma=busy_timeout(%d)", busyTimeout.Milliseconds()))
	dsn := url.URL{Scheme: "file", Path: name, RawQuery: strings.Join(params, "&")}
	db, err := sql.Open("sqlite", dsn.String())
	if err == nil {
		db.SetMaxOpenConns(1)
		db.SetMaxIdleConns(listReaders)
	}
	return db, err
}

// inspect opens the file if there is one, makes sure that it is ours and of
// our version, and reads its totals with query. It writes nothing.
func (d *database) inspect(query string, into ...any) error {
	info, err := os.Stat(d.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		d.empty = true
		return nil
	case err != nil:
		return fmt.Errorf("cannot open %s: %w", d.path, err)
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a file: move it away, or choose another directory with -data", d.path)
	}
	if err := makeFile(d.path); err != nil { // SQLite would open a read-only file without a word
		return err
	}
	params := []string{"mode=ro"} // closing it moves no WAL into a file that is refused
	_, err = os.Stat(d.path + "-wal")
	whole := errors.Is(err, os.ErrNotExist)
	if whole {
		params = append(params, "immutable=1") // it makes no -wal and -shm either
	}
	db, err := openSQLite(d.path, params...)
	if err != nil {
		return err
	}
	defer db.Close()
	var appID, version, pageSize, objects int64
	row := db.QueryRow("SELECT a.application_id, v.user_version, p.page_size, (SELECT count(*) FROM sqlite_schema) FROM pragma_application_id a, pragma_user_version v, pragma_page_size p")
	if err := row.Scan(&appID, &version, &pageSize, &objects); err != nil {
		return explain(d.path, err)
	}
	d.empty = appID == 0 && version == 0 && objects == 0
	switch {
	case d.empty:
		return nil
	case appID != d.appID:
		return fmt.Errorf("%s is another program's database: move it away, or choose another directory with -data", d.path)
	case version != d.version:
		return fmt.Errorf("%s has schema version %d and this orderd knows %d: use the orderd that wrote it", d.path, version, d.version)
	case whole && info.Size()%pageSize != 0:
		return damaged(d.path) // SQLite would take zeros for the rest of the last page
	}
	err = db.QueryRow(query).Scan(into...)
	if err != nil && code(err) == 0 { // no row, or no numbers in it
		return damaged(d.path)
	}
	return explain(d.path, err)
}

// prepare makes the file if need be, sets durability and reads it back, and
// creates the schema in an empty database.
func (d *database) prepare() (err error) {
	if err := makeFile(d.path); err != nil {
		return err
	}
	if err := syncFile(d.path + "-wal"); err != nil {
		return fmt.Errorf("cannot bring %s-wal to disk: %w; check its owner and mode, and the disk", d.path, err)
	}
	if d.DB, err = openSQLite(d.path, "mode=rw"); err != nil {
		return err
	}
	var journal string
	var synchronous int
	if err := d.QueryRow("PRAGMA journal_mode = WAL").Scan(&journal); err != nil {
		return explain(d.path, err)
	}
	// fullfsync matters on macOS only. The checkpoint moves to other pages what an
	// fsync may have failed on, so that the next commit begins the WAL anew.
	settings := fmt.Sprintf("PRAGMA synchronous = FULL; PRAGMA fullfsync = 1; PRAGMA checkpoint_fullfsync = 1; PRAGMA cache_size = -8192; PRAGMA wal_autocheckpoint = %d; PRAGMA wal_checkpoint(PASSIVE);", d.autoCheckpoint)
	if _, err := d.Exec(settings); err != nil {
		return explain(d.path, err)
	}
	if err := d.QueryRow("PRAGMA synchronous").Scan(&synchronous); err != nil || journal != "wal" || synchronous != 2 {
		return fmt.Errorf("%s cannot be made durable (journal_mode %s, synchronous %d, want wal and 2): keep the data directory on a local disk", d.path, journal, synchronous)
	}
	if !d.empty {
		return nil
	}
	_, err = d.Exec(fmt.Sprintf("BEGIN; %s; PRAGMA application_id = %d; PRAGMA user_version = %d; COMMIT;", d.schema, d.appID, d.version))
	return explain(d.path, err)
}

// setBusyTimeout needs the one connection: it is the writer's.
func (d *database) setBusyTimeout(t time.Duration) {
	d.Exec(fmt.Sprintf("PRAGMA busy_timeout = %d", t.Milliseconds()))
}

// makeFile makes an empty file for its owner only, or makes sure that the one
// there can be written. SQLite gives -wal and -shm the same mode. It must not
// run once SQLite has the file open: closing any descriptor of a file drops
// the process's locks on it.
func makeFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("cannot write to the data directory: %w; check the owner and mode, or choose another with -data", err)
	}
	return f.Close()
}

// syncFile brings to disk what a killed process wrote to a -wal file, if there
// is one, and did not sync: nothing of it may be shown that a power cut could
// take. The checkpoint would not, where another program reads an older state.
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

func (d *database) close() error {
	if d.DB == nil {
		return nil
	}
	return d.Close()
}

// code is SQLite's extended result code of err, or 0.
func code(err error) int {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code()
	}
	return 0
}

func damaged(path string) error {
	return fmt.Errorf("%s is damaged or not a database: put a backup in its place (the files were left as they are)", path)
}

// explain turns an error at start into one sentence with the remedy. Only the
// low byte is the kind of error: https://sqlite.org/rescode.html.
func explain(path string, err error) error {
	if err == nil {
		return nil
	}
	switch code(err) & 0xff {
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
