package main

import (
	"cmp"
	"context"
	cryptorand "crypto/rand"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/oklog/ulid/v2"
)

const postgresVersion = 1 // leader.version

// postgresSchema is made in the first schema of the connection's search_path.
// Every commit locks the row in leader, checks its term and seq, and counts seq up.
const postgresSchema = `
CREATE TABLE orders (
	id_high  bigint   PRIMARY KEY, -- of the ULID: (Unix ms of creation << 16) + sequence; also the queue's order
	id_low   bigint   NOT NULL,    -- of the ULID: random
	cents    bigint   NOT NULL CHECK (cents >= 0),
	started  bigint,               -- Unix ms of the first attempt of the replica that completed it
	took     bigint,               -- µs from started to completion
	status   smallint NOT NULL CHECK (status BETWEEN 0 AND 2), -- Pending, Processing, Completed
	user_id  text     NOT NULL COLLATE "C",
	item_ids text     NOT NULL,    -- comma-separated
	key      text     COLLATE "C"  -- idempotency key
);
CREATE INDEX orders_by_user ON orders (user_id, id_high);
CREATE INDEX orders_unfinished ON orders (status, id_high) WHERE status < 2; -- as small as the backlog
CREATE UNIQUE INDEX orders_by_key ON orders (key) WHERE key IS NOT NULL;
CREATE TABLE leader (
	one            boolean PRIMARY KEY CHECK (one),
	version        bigint  NOT NULL, -- of this schema
	identity       bigint  NOT NULL, -- random, made with the tables
	term           bigint  NOT NULL, -- counts leaders
	since          bigint  NOT NULL, -- seq with which the term began
	seq            bigint  NOT NULL, -- counts commits, over all terms
	proven         bigint  NOT NULL, -- the highest seq whose commit the leader had confirmed when it wrote this row
	ended          boolean NOT NULL, -- the leader has handed over: nobody need wait for it
	url            text    NOT NULL, -- where the other replicas reach the leader
	pass           text    NOT NULL, -- random, made with the term: what carries it was passed on by a replica
	accepted       bigint  NOT NULL, -- orders ever
	processing     bigint  NOT NULL, -- of these, being processed
	completed      bigint  NOT NULL, -- of these, completed
	took           bigint  NOT NULL, -- µs, sum over the completed
	removed        bigint  NOT NULL, -- of the completed, removed since
	newest         bigint  NOT NULL, -- id_high of the newest order ever
	newest_started bigint  NOT NULL  -- id_high of the newest order that ever left Pending
) WITH (fillfactor = 10); -- room for a commit's new version in the same page
`

var postgresView = ordersView("(cents / 100) || '.' || lpad((cents % 100)::text, 2, '0')",
	`to_char(to_timestamp((%[1]s) / 1000) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.') || lpad(((%[1]s) %% 1000)::text, 3, '0') || 'Z'`)

// sessionSettings make a session independent of what the server, the database
// and the role set as their defaults. The plan of commitBatch is made while the
// tables are empty and kept: without the enable_ settings it reads whole tables
// later, and with them jit would compile for half a second a commit. The last
// statement pins synchronous_commit at the value that was checked, so that a
// reload cannot weaken it.
const sessionSettings = `SET jit = off; SET plan_cache_mode = force_generic_plan;
SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_bitmapscan = off;
SET enable_indexscan = on; SET enable_nestloop = on; SET enable_material = on;
SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off;
SET statement_timeout = '60s'; SET lock_timeout = 0; SET idle_session_timeout = 0; SET idle_in_transaction_session_timeout = '10s';
SELECT set_config('synchronous_commit', current_setting('synchronous_commit'), false);`

const readSettings = `SELECT current_setting('server_version_num'), current_setting('fsync'), current_setting('full_page_writes'),
	current_setting('synchronous_commit'), current_setting('server_encoding'), pg_is_in_recovery()::text;`

const (
	beatEvery      = 400 * time.Millisecond  // an idle leader commits a beat once its last commit is older
	leaseTime      = 2500 * time.Millisecond // a leader answers only this long after it sent its last confirmed commit; below takeOverAfter, so that two never answer at once
	takeOverAfter  = 4 * time.Second         // a standby takes over when seq has not changed for so long
	pollEvery      = 100 * time.Millisecond  // between a standby's looks at the leader's row
	connectTimeout = 2 * time.Second         // to one host of the URL
	// After commitTimeout, and commitByte a byte of text, the outcome is looked for
	// on another connection. Even for the largest batch that is sooner than
	// takeOverAfter, so that waits for a synchronous standby depose nobody.
	commitTimeout  = 3 * time.Second
	commitByte     = 50 * time.Nanosecond   // 20 MB/s
	readTimeout    = 2 * time.Second        // of a read, with all its tries
	countTimeout   = time.Minute            // of the whole table, where its totals must be corrected
	reconnectPause = 250 * time.Millisecond // between attempts to reach the database
	postgresReads  = 8                      // connections that read
	expiryLooks    = 1024                   // orders that an expiry looks at
)

// replica is one replica's way to the database, whether it leads or stands by.
//
// Its words: the row of the table leader counts commits by seq, over all terms.
// A commit is stored once the row shows its seq, and confirmed once PostgreSQL has
// said that it is durable, on its standby too. The row's proven is the highest seq
// that the leader had confirmed when it wrote the row; highestConfirmed is the
// highest that this replica knows of, from rows or from its own commits.
type replica struct {
	config    *pgx.ConnConfig
	url       string       // where other replicas reach this one
	confirmed func(totals) // told of what a standby sees confirmed
	log       *logger

	// standBy's, or the writer's while this replica leads:
	row              leaderRow // as a standby last read it, or as this leader left it
	highestConfirmed mark
	warned           bool // the last commit came with a WARNING: see send

	// For the gauges:
	leading  atomic.Bool
	term     atomic.Int64
	lastSign atomic.Pointer[time.Time] // when a standby last saw seq change; of a leader, the time in postgresEngine.lease
}

// mark is a confirmed seq and the term in which it was seen.
type mark struct{ term, seq int64 }

// leaderRow is the row in leader.
type leaderRow struct {
	term, since, proven int64
	ended               bool
	url, pass           string
	totals              totals
}

const selectRow = "SELECT version, term, since, proven, ended, url, pass, " + totalsColumns + " FROM leader WHERE one"

// newReplica connects to nothing yet. counted is what metrics.db has counted:
// a database with less has lost orders.
func newReplica(dsn string, counted totals, confirmed func(totals), log *logger) (*replica, error) {
	if !strings.HasPrefix(dsn, "postgres://") && !strings.HasPrefix(dsn, "postgresql://") {
		return nil, errors.New("-orders must be the URL of a PostgreSQL database, such as postgres://orderd@db1/orderd")
	}
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("-orders cannot be used: %w", err)
	}
	config.ConnectTimeout = connectTimeout
	config.ValidateConnect = setUpSession
	r := &replica{config: config, confirmed: confirmed, log: log}
	if counted.identity != 0 && counted.accepted > 0 {
		r.row.totals.identity = counted.identity
		r.highestConfirmed = mark{math.MaxInt64, counted.seq} // metrics.db knows no term: none is taken for a later one
	}
	r.lastSign.Store(new(time.Now()))
	return r, nil
}

// describe names the database without user and password.
func (r *replica) describe() string {
	return fmt.Sprintf("the PostgreSQL database %s on %s:%d", r.config.Database, r.config.Host, r.config.Port)
}

func (r *replica) gauges() []gauge {
	return []gauge{
		{"orderd_leader", "1 while this replica leads, else 0.", oneIf(r.leading.Load())},
		{"orderd_term", "Term of the leader that this replica follows or is.", float64(r.term.Load())},
		{"orderd_seconds_since_commit", "Time since a commit was confirmed, or by a standby seen.", time.Since(*r.lastSign.Load()).Seconds()},
	}
}

// unfit is what no waiting mends: a server, database or role with which no
// promise can be kept.
type unfit string

func (u unfit) Error() string { return string(u) }

// setUpSession makes a session's settings ours. It refuses a server that is not
// durable, and passes over one that is in recovery: pgx tries the next host of
// the URL then.
func setUpSession(ctx context.Context, c *pgconn.PgConn) error {
	results, err := c.Exec(ctx, readSettings+sessionSettings).ReadAll()
	if err != nil {
		return err
	}
	row := results[0].Rows[0]
	version, fsync, pages, commit, encoding, recovering := string(row[0]), string(row[1]), string(row[2]), string(row[3]), string(row[4]), string(row[5])
	switch {
	case len(version) < 6 || version < "140000":
		return unfit("the PostgreSQL server is older than version 14: use a newer one")
	case fsync != "on" || pages != "on":
		return unfit(fmt.Sprintf("the PostgreSQL server can lose what it confirmed (fsync %s, full_page_writes %s): set both to on", fsync, pages))
	case commit != "on" && commit != "remote_apply":
		return unfit(fmt.Sprintf("synchronous_commit is %s for this server, database or role: set it to on or remote_apply", commit))
	case encoding != "UTF8":
		return unfit(fmt.Sprintf("the database's encoding is %s: make one with encoding UTF8", encoding))
	case recovering != "false":
		return errors.New("the server is in recovery, as a standby is")
	}
	return nil
}

// connect opens a session.
func (r *replica) connect(ctx context.Context) (*pgx.Conn, error) {
	config := r.config.Copy()
	ctx, cancel := context.WithTimeout(ctx, time.Duration(1+len(config.Fallbacks))*connectTimeout)
	defer cancel()
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
		r.warned = r.warned || n.SeverityUnlocalized == "WARNING" // whatever the language
	}
	c, err := pgx.ConnectConfig(ctx, config)
	if refused, ok := errors.AsType[unfit](err); ok {
		return nil, refused // without the list of hosts that were tried
	}
	return c, err
}

// remedies are the classes of SQLSTATE that no waiting mends, with the remedy
// (https://www.postgresql.org/docs/current/errcodes-appendix.html).
var remedies = map[string]string{
	"28": "check the user and the password (PGPASSWORD, PGPASSFILE)",
	"3D": "make it with createdb, or correct -orders",
	"3F": "correct the search_path of -orders",
	"42": "let the role create and use tables in the schema, or put back the table that is gone",
	"0A": "use PostgreSQL 14 or newer",
	"XX": "put a backup in its place",
}

// permanent turns an error that no waiting mends into one sentence; others are nil.
func (r *replica) permanent(err error) error {
	if u, ok := errors.AsType[unfit](err); ok {
		return u
	}
	if e, ok := errors.AsType[*pgconn.PgError](err); ok && e.Code != "XX000" && remedies[e.Code[:2]] != "" {
		return fmt.Errorf("%s cannot be used: %s: %s", r.describe(), e.Message, remedies[e.Code[:2]])
	}
	return nil
}

// makeTables makes the tables in an empty database. Where several replicas start
// at once, one makes them: the others' transactions fail on the catalogue's own
// uniqueness.
func (r *replica) makeTables(ctx context.Context, c *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	var ours, orders bool
	if err := c.QueryRow(ctx, "SELECT to_regclass('leader') IS NOT NULL, to_regclass('orders') IS NOT NULL").Scan(&ours, &orders); err != nil || ours {
		return err
	}
	if orders {
		return unfit("the database has a table orders of another program: use another database, or another schema through search_path")
	}
	_, err := c.PgConn().Exec(ctx, fmt.Sprintf("BEGIN; %s %s INSERT INTO leader (one, version, term, since, proven, ended, url, pass, %s)"+
		" VALUES (true, %d, 0, 0, 0, true, '', '', 0, 0, 0, 0, 0, 0, 0, 0, %d); COMMIT;",
		postgresSchema, postgresView, totalsColumns, postgresVersion, rand.Int64())).ReadAll()
	if e, ok := errors.AsType[*pgconn.PgError](err); ok && slices.Contains([]string{"42P07", "23505", "42710"}, e.Code) {
		_, err = c.Exec(ctx, "ROLLBACK")
	}
	return err
}

// readRow reads the leader's row and notices a loss.
func (r *replica) readRow(ctx context.Context, c *pgx.Conn) (row leaderRow, err error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	var version int64
	if err := c.QueryRow(ctx, selectRow).Scan(append([]any{&version, &row.term, &row.since, &row.proven, &row.ended, &row.url, &row.pass}, row.totals.fields()...)...); err != nil {
		return row, err
	}
	if version != postgresVersion {
		return row, unfit(fmt.Sprintf("the tables have schema version %d and this orderd knows %d: use the orderd that made them", version, postgresVersion))
	}
	return row, r.observe(row)
}

// observe takes over a row that was read, unless it tells of a loss.
func (r *replica) observe(row leaderRow) error {
	if err := r.checkNotLost(row); err != nil {
		return err
	}
	if before := r.row; before.term == row.term && before.totals.seq <= row.proven && before.totals.seq > r.highestConfirmed.seq {
		r.confirmed(before.totals)
	}
	if row.proven > r.highestConfirmed.seq {
		r.highestConfirmed = mark{row.term, row.proven}
	}
	if row.totals.seq != r.row.totals.seq {
		r.lastSign.Store(new(time.Now()))
	}
	r.row = row
	r.term.Store(row.term)
	return nil
}

// checkNotLost holds a row against all that was confirmed before. Commits are
// lost where seq went back, or where a later term began before the confirmed seq.
func (r *replica) checkNotLost(row leaderRow) error {
	if known := r.row.totals.identity; known != 0 && known != row.totals.identity {
		return fmt.Errorf("%w: %s is not the one whose orders metrics.db has counted: go back to that, or choose another -data, or delete each replica's metrics.db to go on with this one", errBroken, r.describe())
	}
	kept := row.totals.seq // at most, of what was confirmed
	later := row.term > r.highestConfirmed.term
	begunTwice := row.term == r.row.term && row.since != r.row.since // by two replicas, on two servers that each took it for the next
	if later || begunTwice {
		kept = min(kept, row.since-1)
	}
	if kept < r.highestConfirmed.seq {
		return fmt.Errorf("%w: %s has lost commits that it had confirmed: %d were, and it went on after %d in term %d; put back the server that has them, or delete each replica's metrics.db to accept the loss",
			errBroken, r.describe(), r.highestConfirmed.seq, kept, row.term)
	}
	return nil
}

// standBy returns once this replica leads. follow is told who leads, "" for
// nobody. A database that cannot be reached is waited for.
func (r *replica) standBy(ctx context.Context, follow func(url, pass string)) (*postgresEngine, error) {
	for {
		e, err := r.followRow(ctx, follow)
		// A server that is being replaced may refuse for a while: only before the first
		// row is that final.
		final := errors.As(err, new(unfit)) || r.term.Load() == 0
		switch {
		case err == nil:
			return e, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, errBroken):
			return nil, err
		case final && r.permanent(err) != nil:
			return nil, r.permanent(err)
		}
		if time.Since(*r.lastSign.Load()) > takeOverAfter { // until then the leader may still reach the database
			follow("", "")
		}
		r.log.Warn("the database cannot be used; trying again", "error", err, "in", retryPause.String())
		sleep(ctx, retryPause)
	}
}

// followRow looks at the row, on one connection, until this replica leads or the
// connection fails.
func (r *replica) followRow(ctx context.Context, follow func(url, pass string)) (e *postgresEngine, err error) {
	c, err := r.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if e == nil {
			c.Close(context.Background())
		}
	}()
	if err := r.makeTables(ctx, c); err != nil {
		return nil, err
	}
	for changed := time.Now(); ctx.Err() == nil; sleep(ctx, pollEvery) {
		seq := r.row.totals.seq
		row, err := r.readRow(ctx, c)
		if err != nil {
			return nil, err
		}
		if row.totals.seq != seq {
			changed = time.Now()
		}
		if !row.ended && time.Since(changed) < takeOverAfter {
			follow(row.url, row.pass)
			continue
		}
		follow("", "")
		if e, err := r.takeOver(ctx, c, row); !errors.Is(err, errDeposed) {
			return e, err
		}
		changed = time.Now()
	}
	return nil, ctx.Err()
}

const beginTerm = `UPDATE leader SET term = term + 1, seq = seq + 1, since = seq + 1, ended = false, url = $3, pass = $4
WHERE one AND term = $1 AND seq = $2`

// takeOver begins a term where the row is still as it was seen. Where that was
// done and its answer was lost, the term ends as any other whose leader is gone.
func (r *replica) takeOver(ctx context.Context, c *pgx.Conn, row leaderRow) (*postgresEngine, error) {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	pass := cryptorand.Text()
	tag, err := c.Exec(ctx, beginTerm, row.term, row.totals.seq, r.url, pass)
	if err == nil && tag.RowsAffected() == 0 {
		return nil, errDeposed
	}
	if err != nil {
		return nil, err
	}
	row.term, row.since, row.totals.seq, row.url, row.pass = row.term+1, row.totals.seq+1, row.totals.seq+1, r.url, pass
	r.row = row
	e := &postgresEngine{replica: r, term: row.term, pass: pass, conn: c, state: unproven}
	if err := e.prepareCommit(ctx, c); err != nil {
		return nil, err
	}
	pool, err := pgxpool.ParseConfig(r.config.ConnString())
	if err != nil {
		return nil, err
	}
	pool.ConnConfig, pool.MaxConns = r.config.Copy(), postgresReads
	if e.reads, err = pgxpool.NewWithConfig(context.Background(), pool); err != nil {
		return nil, err
	}
	r.term.Store(row.term)
	r.leading.Store(true)
	return e, nil
}

// postgresEngine is the store's engine, for one term of the replica that leads.
type postgresEngine struct {
	replica *replica
	term    int64
	pass    string
	reads   *pgxpool.Pool

	// The writer's:
	conn    *pgx.Conn
	failure error // why this engine leads no more
	state   commitState

	confirmedSeq atomic.Int64              // the highest seq that PostgreSQL has confirmed
	lease        atomic.Pointer[time.Time] // when the last confirmed commit was sent; nil where there is none
}

// commitState is what is known of the last commit.
type commitState uint8

const (
	settled      commitState = iota // it is durable: the next batch may follow
	inDoubt                         // it is in the table, or not, or still to arrive: send the same again
	unproven                        // it is in the table, but perhaps on the primary alone: a confirmed beat proves it durable
	proofInDoubt                    // the same, and that beat is in doubt: send it again
)

func (s commitState) mayArrive() bool { return s == inDoubt || s == proofInDoubt }
func (s commitState) stored() bool    { return s == unproven || s == proofInDoubt }

// afterLoss is the state once the answer to what was sent is lost.
func (s commitState) afterLoss() commitState {
	if s.stored() {
		return proofInDoubt
	}
	return inDoubt
}

// commitBatch runs a whole batch in one statement, and so in one transaction
// and one round trip. Everything joins held: where the row is no longer as this
// leader left it, nothing is written and no row is answered. A statement that
// waits for the row's lock checks it anew when it gets it. It answers an earlier
// order and its key for every key that was used before, or else no order; then
// the steps that did not find their order, and the new totals.
//
// $1 and $2 are term and seq of the row, $3 and $4 its new proven and ended; the
// orders, the steps and the orders to remove follow: see send.
const commitBatch = `
WITH held AS MATERIALIZED (
	SELECT one FROM leader WHERE one AND term = $1 AND seq = $2 FOR UPDATE
), sent AS MATERIALIZED (
	SELECT c.* FROM held, unnest($5::bigint[], $6::bigint[], $7::bigint[], $8::text[], $9::text[], $10::text[]) -- the orders
		AS c (id_high, id_low, cents, user_id, item_ids, key)
), used AS MATERIALIZED (
	SELECT o.* FROM sent s JOIN orders o ON o.key = s.key WHERE s.key <> ''
), new AS (
	INSERT INTO orders (id_high, id_low, cents, status, user_id, item_ids, key)
	SELECT id_high, id_low, cents, 0, user_id, item_ids, nullif(key, '') FROM sent WHERE key NOT IN (SELECT key FROM used)
	RETURNING id_high
), moved AS (
	UPDATE orders o SET status = s.next, started = s.started, took = CASE s.next WHEN 2 THEN s.took END
	FROM held, unnest($11::bigint[], $12::smallint[], $13::smallint[], $14::bigint[], $15::bigint[]) AS s (id_high, previous, next, started, took)
	WHERE o.id_high = s.id_high AND o.status = s.previous
	RETURNING o.id_high, s.previous, s.next, s.took
), gone AS (
	DELETE FROM orders o USING held, unnest($16::bigint[]) AS g (id_high)
	WHERE o.id_high = g.id_high AND o.status = 2 AND o.id_high NOT IN (SELECT id_high FROM used) -- which is answered with it
	RETURNING o.id_high
), done AS (
	UPDATE leader l SET seq = l.seq + 1, proven = $3, ended = $4,
		accepted = l.accepted + n.count, newest = greatest(l.newest, n.newest),
		processing = l.processing + m.entered - m.finished, completed = l.completed + m.completed, took = l.took + m.took,
		newest_started = greatest(l.newest_started, m.newest), removed = l.removed + g.count
	FROM held,
		(SELECT count(*), max(id_high) AS newest FROM new) n,
		(SELECT count(*) FILTER (WHERE next = 1) AS entered, count(*) FILTER (WHERE previous = 1) AS finished, count(*) FILTER (WHERE next = 2) AS completed,
			coalesce(sum(took) FILTER (WHERE next = 2), 0)::bigint AS took, max(id_high) AS newest FROM moved) m,
		(SELECT count(*) FROM gone) g
	WHERE l.one
	RETURNING l.*
)
SELECT ` + maybeOrder + `, coalesce(o.key, ''),
	CASE WHEN (SELECT count(*) FROM moved) < cardinality($11::bigint[]) THEN ARRAY(SELECT unnest($11::bigint[]) EXCEPT SELECT id_high FROM moved) END, t.*
FROM (SELECT ` + totalsColumns + ` FROM done) t LEFT JOIN used o ON true`

// maybeOrder are the columns of an order that may be missing.
const maybeOrder = "coalesce(o.id_high, 0), coalesce(o.id_low, 0), coalesce(o.status, 0), coalesce(o.user_id, ''), coalesce(o.item_ids, ''), coalesce(o.cents, 0), coalesce(o.started, 0), coalesce(o.took, 0)"

const preparedCommit = "orderd_commit"

// prepareCommit has commitBatch parsed on the writer's connection.
func (e *postgresEngine) prepareCommit(ctx context.Context, c *pgx.Conn) error {
	_, err := c.Prepare(ctx, preparedCommit, commitBatch)
	return err
}

// start confirms the take-over with a first beat, and mends the totals where
// somebody has changed the table by hand.
func (e *postgresEngine) start() (totals, error) {
	if err := e.commit(newBatch(nil)); err != nil {
		return totals{}, err
	}
	var c census
	if err := e.count(countUnfinished+"WHERE status < 2", &c.pending, &c.processing, &c.newest); err != nil || c.matches(e.replica.row.totals) {
		return e.replica.row.totals, err
	}
	if err := e.count(countFinal, &c.final, &c.sumTook, &c.newestStarted); err != nil {
		return totals{}, err
	}
	t := c.correct(e.replica.row.totals)
	logCorrection(e.replica.log, e.replica.row.totals, t)
	ctx, cancel := context.WithTimeout(context.Background(), commitTimeout)
	defer cancel()
	if _, err := e.conn.Exec(ctx, "UPDATE leader SET ("+totalsColumns+") = ($1, $2, $3, $4, $5, $6, $7, $8, $9) WHERE one AND term = $10 AND seq = $11",
		append(t.fields(), e.term, t.seq-1)...); err != nil {
		return totals{}, err
	}
	e.replica.row.totals = t
	err := e.commit(newBatch(nil)) // fails where the totals were not written
	return e.replica.row.totals, err
}

// count reads one row, which may take long: beats go on meanwhile.
func (e *postgresEngine) count(query string, into ...any) error {
	ctx, cancel := context.WithTimeout(context.Background(), countTimeout)
	defer cancel()
	counted := make(chan error, 1)
	go func() { counted <- e.reads.QueryRow(ctx, query).Scan(into...) }()
	for {
		select {
		case err := <-counted:
			return err
		case <-time.After(beatEvery):
		}
		if err := e.commit(newBatch(nil)); err != nil {
			return err
		}
	}
}

// parcel is a batch as the arguments of commitBatch.
type parcel struct {
	batch                   *batch
	ended                   bool // the last one: the leader hands over
	ids, lows, cents        []int64
	users, items, keys      []string
	movedIDs, started, took []int64
	previous, next          []int16
	removedIDs              []int64
	refusedLeftOut          bool // what the tables refused, see without
}

// pack leaves out a create whose key an earlier one of the batch has.
func pack(b *batch) *parcel {
	p := &parcel{batch: b, movedIDs: make([]int64, 0, len(b.steps))} // not NULL: its cardinality counts
	keys := map[string]bool{}
	for _, c := range b.creates {
		if c.key != "" {
			if keys[c.key] {
				continue
			}
			keys[c.key] = true
		}
		p.ids, p.lows, p.cents = append(p.ids, high(c.newID)), append(p.lows, low(c.newID)), append(p.cents, c.cents)
		p.users, p.items, p.keys = append(p.users, c.userID), append(p.items, c.itemIDs), append(p.keys, c.key)
	}
	for _, st := range b.steps {
		p.movedIDs, p.started, p.took = append(p.movedIDs, high(st.id)), append(p.started, st.startedMS), append(p.took, st.tookMicros)
		p.previous, p.next = append(p.previous, int16(st.from)), append(p.next, int16(st.to))
	}
	for _, id := range b.removed {
		p.removedIDs = append(p.removedIDs, high(id))
	}
	return p
}

// answerKeys answers the creates whose key has created an earlier order, in the
// table or in this batch.
func (p *parcel) answerKeys(earlier map[string]order) {
	for _, c := range p.batch.creates {
		if c.key == "" || c.err != nil {
			continue
		}
		if o, ok := earlier[c.key]; ok && o.id != c.newID {
			c.replay(o)
		} else {
			earlier[c.key] = c.order
		}
	}
}

// Why the row is not as this leader left it.
var (
	errFenced            = errors.New("the row of the leader is no longer as this leader left it")
	errUnconfirmedIsGone = fmt.Errorf("%w: PostgreSQL went on without a commit that it had not confirmed", errDeposed)
	errTampered          = fmt.Errorf("%w: something other than orderd has changed the row in the table leader: stop it, and start orderd again", errBroken)
)

// commit tries until the outcome is known, or for commitTimeout. While an attempt
// is in doubt only the same batch may be sent: the original may still arrive.
func (e *postgresEngine) commit(b *batch) error {
	b.totals = e.replica.row.totals
	if e.failure != nil {
		return e.failure
	}
	if err := e.expire(b); err != nil {
		b.skipExpiry(e.replica.log, err)
	}
	if !e.state.stored() { // else what its keys have created is known
		for _, c := range b.creates {
			c.reset()
		}
	}
	p := pack(b)
	for end := time.Now().Add(commitTimeout); ; time.Sleep(reconnectPause) {
		err := e.advance(p)
		switch {
		case err == nil:
			b.totals = e.replica.row.totals
			return nil
		case errors.Is(err, errRejected) && e.state == settled && !p.refusedLeftOut:
			if p, err = e.without(p, err); err != nil {
				return fmt.Errorf("%w: %w", errNotWritten, err)
			}
		case errors.Is(err, errDeposed), errors.Is(err, errBroken), errors.Is(err, errRejected):
			e.replica.leading.Store(false)
			e.lease.Store(nil)
			if e.failure = err; errors.Is(err, errRejected) {
				e.failure = fmt.Errorf("%w: %w", errBroken, err)
			}
			if e.state != settled {
				return fmt.Errorf("%w: %w", errOutcomeUnknown, e.failure)
			}
			return e.failure
		case e.state == settled:
			return fmt.Errorf("%w: %w", errNotWritten, err)
		case time.Now().After(end):
			return fmt.Errorf("%w: %w", errInDoubt, err)
		}
	}
}

// without returns a refused batch again, less what the tables refuse: its expiry,
// or else the creates that are refused alone, too.
func (e *postgresEngine) without(p *parcel, cause error) (*parcel, error) {
	if len(p.removedIDs) > 0 {
		p.batch.skipExpiry(e.replica.log, cause)
		return pack(p.batch), nil
	}
	refused, err := e.refusedAlone(p.batch.creates)
	if err != nil {
		e.conn.Close(context.Background())
		return nil, err
	}
	rest := *p.batch
	rest.creates = slices.DeleteFunc(slices.Clone(rest.creates), func(c *creation) bool { return refused[c] != nil })
	next := pack(&rest)
	next.batch, next.refusedLeftOut = p.batch, true
	for c, err := range refused {
		c.err = err
	}
	return next, nil
}

// refusedAlone tries to insert each order alone, rolls that back, and returns
// those that fail.
func (e *postgresEngine) refusedAlone(creates []*creation) (refused map[*creation]error, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), commitTimeout)
	defer cancel()
	refused = map[*creation]error{}
	for _, c := range creates {
		if _, err := e.conn.Exec(ctx, "BEGIN"); err != nil {
			return nil, err
		}
		_, err := e.conn.Exec(ctx, "INSERT INTO orders (id_high, id_low, cents, status, user_id, item_ids) VALUES ($1, $2, $3, 0, $4, $5)",
			high(c.newID), low(c.newID), c.cents, c.userID, c.itemIDs)
		if isRejection(err) {
			e.replica.log.Error("an order was refused by the table", "error", err)
			refused[c] = fmt.Errorf("%w: %w", errRejected, err)
		} else if err != nil {
			return nil, err
		}
		if _, err := e.conn.Exec(ctx, "ROLLBACK"); err != nil {
			return nil, err
		}
	}
	return refused, nil
}

// isRejection reports whether the tables refuse what was sent: a constraint, or
// data that does not fit.
func isRejection(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (e.Code[:2] == "22" || e.Code[:2] == "23" || e.Code == "P0001") // the last is a trigger's
}

// advance finds out what became of the last attempt, and makes the next: sends
// the batch, or the beat that confirms it.
func (e *postgresEngine) advance(p *parcel) error {
	if err := e.reconnect(); err != nil {
		return err
	}
	if e.state.mayArrive() {
		if err := e.findOut(p); err != nil {
			return err
		}
	}
	sent := time.Now()
	if !e.state.stored() {
		if err := e.send(p); err != nil {
			return err
		}
	}
	if e.state.stored() { // from before, or since the batch came with a warning
		sent = time.Now()
		if err := e.send(pack(newBatch(nil))); err != nil {
			return err
		}
	}
	if e.state != settled {
		return errors.New("PostgreSQL has committed, and does not say that it is durable on its standby")
	}
	e.replica.highestConfirmed = mark{e.term, e.replica.row.totals.seq}
	e.confirmedSeq.Store(e.replica.row.totals.seq)
	e.lease.Store(&sent)
	e.replica.lastSign.Store(&sent)
	return nil
}

// reconnect makes the writer's connection anew where it is gone.
func (e *postgresEngine) reconnect() (err error) {
	if e.conn != nil && !e.conn.IsClosed() {
		return nil
	}
	if e.conn, err = e.replica.connect(context.Background()); errors.As(err, new(unfit)) {
		return fmt.Errorf("%w: %w", errBroken, err)
	} else if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), commitTimeout)
	defer cancel()
	if err = e.prepareCommit(ctx, e.conn); err == nil {
		return nil
	}
	e.conn.Close(ctx)
	if permanent := e.replica.permanent(err); permanent != nil { // a table is gone
		return fmt.Errorf("%w: %w", errBroken, permanent)
	}
	return err
}

// findOut looks in the row for what was sent last.
func (e *postgresEngine) findOut(p *parcel) error {
	before := e.replica.row
	row, err := e.ownRow()
	switch {
	case err != nil:
		return err
	case row.totals.seq == before.totals.seq: // not yet, or never: the fence lets only one of two in
		return nil
	case row.totals.seq != before.totals.seq+1:
		return errTampered
	}
	if !e.state.stored() {
		earlier, err := e.ordersOfKeys(p.keys)
		if err != nil {
			e.replica.row = before
			return err
		}
		p.answerKeys(earlier)
	}
	e.state = unproven
	return nil
}

// ordersOfKeys reads, for the writer, the orders that keys have created.
func (e *postgresEngine) ordersOfKeys(keys []string) (map[string]order, error) {
	ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
	defer cancel()
	found := map[string]order{}
	rows, _ := e.conn.Query(ctx, "SELECT "+orderColumns+", key FROM orders WHERE key = ANY($1)", keys) // rows.Err tells the error, too
	defer rows.Close()
	for rows.Next() {
		var key string
		o, err := scanOrder(rows.Scan, &key)
		if err != nil {
			return nil, err
		}
		found[key] = o
	}
	return found, rows.Err()
}

// send sends a batch once. An ERROR of the server has rolled it back; a FATAL
// one, or a lost connection, tells nothing.
func (e *postgresEngine) send(p *parcel) error {
	row := &e.replica.row
	ctx, cancel := context.WithTimeout(context.Background(), commitTimeout+time.Duration(p.batch.bytes)*commitByte)
	defer cancel()
	e.replica.warned = false
	rows, _ := e.conn.Query(ctx, preparedCommit, e.term, row.totals.seq, e.replica.highestConfirmed.seq, p.ended, p.ids, p.lows, p.cents, p.users, p.items, p.keys,
		p.movedIDs, p.previous, p.next, p.started, p.took, p.removedIDs)
	t, err := p.absorb(rows)
	if errors.Is(err, errFenced) {
		return e.fenced(err)
	}
	if isRejection(err) {
		return fmt.Errorf("%w: %w", errRejected, err)
	}
	if err != nil {
		e.conn.Close(ctx) // the server may have become read-only, or its plans invalid: another connection finds out
		pgErr, rolledBack := errors.AsType[*pgconn.PgError](err)
		rolledBack = rolledBack && pgErr.SeverityUnlocalized == "ERROR"
		if rolledBack && e.replica.permanent(err) != nil && pgErr.Code != "0A000" { // the prepared plan became invalid
			return fmt.Errorf("%w: %w", errBroken, e.replica.permanent(err))
		}
		if !rolledBack && !pgconn.SafeToRetry(err) {
			e.state = e.state.afterLoss()
		}
		return err
	}
	row.totals, e.state = t, settled
	if e.replica.warned { // a cancelled wait for a synchronous standby is success, and a warning
		e.state = unproven
	}
	return nil
}

// fenced explains errFenced: our own earlier attempt while in doubt, else another
// leader, or somebody who has changed the row.
func (e *postgresEngine) fenced(err error) error {
	if e.state.mayArrive() {
		return err
	}
	_, readErr := e.ownRow()
	return cmp.Or(readErr, errTampered)
}

// ownRow reads the row anew. Its error tells where that is another leader's, or
// behind what this one has left.
func (e *postgresEngine) ownRow() (leaderRow, error) {
	left := e.replica.row.totals.seq
	row, err := e.replica.readRow(context.Background(), e.conn)
	switch {
	case err != nil:
		return row, err
	case row.term != e.term:
		return row, errDeposed
	case row.totals.seq < left:
		return row, errUnconfirmedIsGone
	}
	return row, nil
}

// absorb reads the answer of commitBatch.
func (p *parcel) absorb(rows pgx.Rows) (t totals, err error) {
	defer rows.Close()
	var void []int64
	earlier, answered := map[string]order{}, false
	for ; rows.Next(); answered = true {
		var key string
		o, err := scanOrder(rows.Scan, append([]any{&key, &void}, t.fields()...)...)
		if err != nil {
			return t, err
		}
		if key != "" {
			earlier[key] = o
		}
	}
	if err := rows.Err(); err != nil {
		return t, err
	}
	if !answered {
		return t, errFenced
	}
	p.answerKeys(earlier)
	for i, st := range p.batch.steps {
		p.batch.steps[i].void = slices.Contains(void, high(st.id))
	}
	return t, nil
}

// expire looks up what the batch is to remove. Completed orders never change,
// and only this writer removes them, so the list stays right however often it
// is sent.
func (e *postgresEngine) expire(b *batch) error {
	x := b.expiry
	if x == nil || b.removed != nil || e.state != settled {
		return nil
	}
	if err := e.reconnect(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
	defer cancel()
	rows, _ := e.conn.Query(ctx, `SELECT id_high, id_low, `+expiredBefore+`$2 FROM orders
		WHERE id_high > $1 AND id_high < $2 << 16 AND id_high <= $3 ORDER BY id_high LIMIT $4`,
		x.after, x.before, e.replica.row.totals.newestStarted, expiryLooks)
	defer rows.Close()
	b.removed, x.looked = []ulid.ULID{}, 0
	for ; rows.Next(); x.looked++ {
		var idLow int64
		var expired *bool // NULL where somebody else completed it
		if err := rows.Scan(&x.through, &idLow, &expired); err != nil {
			return err
		}
		if expired != nil && *expired {
			b.removed = append(b.removed, joinID(x.through, idLow))
		}
	}
	x.ended = x.looked < expiryLooks
	return rows.Err()
}

// tidy commits a beat where the last commit is long enough ago: standbys see by
// it that the leader is there.
func (e *postgresEngine) tidy() (totals, error) {
	var err error
	if sent := e.lease.Load(); sent == nil || time.Since(*sent) > beatEvery {
		err = e.commit(newBatch(nil))
	}
	return e.replica.row.totals, err
}

// current refuses once the lease has run out: leaseTime after this leader sent its
// last confirmed commit, another may have taken over. It asks both clocks, since
// the monotonic one stands still while the machine sleeps.
func (e *postgresEngine) current() error {
	sent := e.lease.Load()
	if sent == nil {
		return errDeposed
	}
	now := time.Now()
	if now.Sub(*sent) > leaseTime || now.Round(0).Sub(sent.Round(0)).Abs() > leaseTime {
		return errSilent
	}
	return nil
}

// close hands over: standbys need not wait. Nothing is shown from here on.
func (e *postgresEngine) close() error {
	e.lease.Store(nil)
	e.replica.leading.Store(false)
	if e.failure == nil && e.state == settled && e.reconnect() == nil {
		last := pack(newBatch(nil))
		last.ended = true
		if err := e.send(last); err != nil {
			e.replica.log.Warn("the other replicas will wait: no hand-over", "error", err)
		}
	}
	e.reads.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if e.conn != nil {
		e.conn.Close(ctx)
	}
	return nil
}

// query reads what source finds, in one snapshot with the leader's row, and
// returns that row's seq. It ends after readBytes of text, and then more is true.
// A connection that has died says so only when it is used: then a new one is tried.
func (e *postgresEngine) query(source string, args ...any) (orders []order, more bool, seq int64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
	defer cancel()
	for range 3 {
		orders, more, seq, err = e.tryQuery(ctx, source, args)
		if err == nil || errors.Is(err, errDeposed) {
			return orders, more, seq, err
		}
		e.reads.Reset() // the other connections have died with this one
		sleep(ctx, reconnectPause/10)
	}
	return nil, false, 0, fmt.Errorf("%w: %w", errSilent, err)
}

func (e *postgresEngine) tryQuery(ctx context.Context, source string, args []any) (orders []order, more bool, seq int64, err error) {
	least, room, answered := e.confirmedSeq.Load(), readBytes, false
	rows, err := e.reads.Query(ctx, "SELECT "+maybeOrder+", l.term, l.seq FROM leader l LEFT JOIN LATERAL ("+source+") o ON true WHERE l.one", args...)
	if err != nil {
		return nil, false, 0, err
	}
	defer rows.Close()
	for ; room > 0 && rows.Next(); answered = true {
		var term int64
		o, err := scanOrder(rows.Scan, &term, &seq)
		if err != nil {
			return nil, false, 0, err
		}
		if term != e.term || seq < least { // seq < least: a server that lags behind
			return nil, false, 0, errDeposed
		}
		if !o.id.IsZero() {
			orders = append(orders, o)
			room -= len(o.userID) + len(o.itemIDs)
		}
	}
	rows.Close()
	if err := rows.Err(); err != nil {
		return nil, false, 0, err
	}
	if !answered { // the leader's row is gone
		return nil, false, 0, errDeposed
	}
	return orders, room <= 0, seq, nil
}

func (e *postgresEngine) readOne(source string, args ...any) (o order, seq int64, err error) {
	orders, _, seq, err := e.query(source, args...)
	if err == nil && len(orders) == 0 {
		return o, seq, errNotFound
	}
	if err != nil {
		return o, 0, err
	}
	return orders[0], seq, nil
}

func (e *postgresEngine) find(id ulid.ULID) (order, int64, error) {
	return e.readOne("SELECT * FROM orders WHERE id_high = $1 AND id_low = $2", high(id), low(id))
}

func (e *postgresEngine) findKey(key string) (order, int64, error) {
	return e.readOne("SELECT * FROM orders WHERE key = $1", key)
}

// list bounds the cost of a page by its length, not by the table's: Pending and
// Processing orders have an index of their own, and no Completed order is newer
// than the newest that was started.
func (e *postgresEngine) list(f filter) (p page, seq int64, err error) {
	where, args := "id_high < $1", []any{f.before, f.limit + 1}
	add := func(condition string, arg any) {
		args = append(args, arg)
		where += fmt.Sprintf(" AND "+condition, len(args))
	}
	if f.userID != "" {
		add("user_id = $%d", f.userID)
	}
	if f.status != nil {
		add("status = $%d", int16(*f.status))
		if f.status.final() {
			where += " AND id_high <= l.newest_started"
		} else {
			where += " AND status < 2"
		}
	}
	orders, more, seq, err := e.query("SELECT * FROM orders WHERE "+where+" ORDER BY id_high DESC LIMIT $2", args...)
	p.orders = orders[:min(len(orders), f.limit)]
	if more || len(orders) > f.limit {
		p.next = p.orders[len(p.orders)-1].id
	}
	return p, seq, err
}

// backlog reads both unfinished statuses by their index; most of it is Pending.
// It waits until what it has read is confirmed: no order is worked on before.
func (e *postgresEngine) backlog(after int64, limit int) (found []queued, err error) {
	// Without text, of which a page holds only so much.
	const part = "(SELECT id_high, id_low, status, '' AS user_id, '' AS item_ids, cents, started, took FROM orders WHERE status < 2 AND status = %d AND id_high > $1 ORDER BY id_high LIMIT $2)"
	orders, _, seq, err := e.query(fmt.Sprintf(part+" UNION ALL "+part+" ORDER BY id_high LIMIT $2", pending, processing), after, limit)
	for err == nil && e.confirmedSeq.Load() < seq {
		time.Sleep(publishPause)
		err = e.current()
	}
	if err != nil {
		return nil, err
	}
	for _, o := range orders {
		found = append(found, queued{o.id, o.status})
	}
	return found, nil
}

func (e *postgresEngine) oldest(st status) (int64, error) {
	o, _, err := e.readOne("SELECT * FROM orders WHERE status < 2 AND status = $1 ORDER BY id_high LIMIT 1", int16(st))
	if errors.Is(err, errNotFound) {
		return math.MaxInt64, nil
	}
	return high(o.id), err
}
