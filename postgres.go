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

const postgresVersion = 1 // of the schema: leader.version

// postgresSchema creates the tables in the first schema of the connection's
// search_path. Every commit locks the only row of the table leader, checks that
// row's term and seq, and increments seq.
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

// sessionSettings override what the server, the database and the role set as
// defaults for a session. PostgreSQL plans commitBatch while the tables may be
// empty, and keeps the plan: without the enable_ settings that plan would read whole
// tables later. With the enable_ settings, jit would compile for half a second at
// each commit, so jit is off. The last statement pins synchronous_commit at the
// value that setUpSession checks, so that a reload cannot weaken it.
const sessionSettings = `SET jit = off; SET plan_cache_mode = force_generic_plan;
SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_bitmapscan = off;
SET enable_indexscan = on; SET enable_nestloop = on; SET enable_material = on;
SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off;
SET statement_timeout = '60s'; SET lock_timeout = 0; SET idle_session_timeout = 0; SET idle_in_transaction_session_timeout = '10s';
SELECT set_config('synchronous_commit', current_setting('synchronous_commit'), false);`

const readSettings = `SELECT current_setting('server_version_num'), current_setting('fsync'), current_setting('full_page_writes'),
	current_setting('synchronous_commit'), current_setting('server_encoding'), pg_is_in_recovery()::text;`

const (
	beatEvery      = 400 * time.Millisecond  // an idle leader commits a beat when its last commit is older than this
	leaseTime      = 2500 * time.Millisecond // lease: a leader answers for this long after it sent its last confirmed commit; below takeOverAfter, so that two leaders never answer at once
	takeOverAfter  = 4 * time.Second         // a standby takes over if seq has not changed for this long
	pollEvery      = 100 * time.Millisecond  // between two reads of the leader row by a standby
	connectTimeout = 2 * time.Second         // for one host of the URL
	// An attempt to commit ends after commitTimeout plus commitByte for each byte of
	// text; the writer then looks for the outcome on another connection. Even for the
	// largest batch this is shorter than takeOverAfter, so that a wait for a
	// synchronous standby does not depose the leader.
	commitTimeout      = 3 * time.Second
	commitByte         = 50 * time.Nanosecond   // 20 MB/s
	readTimeout        = 2 * time.Second        // for one read, with all its tries
	reconnectPause     = 250 * time.Millisecond // between two attempts to commit; a tenth of it between two tries of a read
	postgresReads      = 8                      // connections for reads
	postgresExpiryRows = 1024                   // orders that one expiry looks at, at most
)

// ---- A replica: its sessions, and the leader row. ----

// replica holds this process's access to the database and what it knows of the
// leader row, while it leads and while it stands by.
//
// Its words: the leader row is the only row of the table leader. Its seq counts
// commits over all terms. A beat is a commit that changes no order. A commit is
// stored once the leader row shows its seq, and confirmed once PostgreSQL has said
// that it is durable, on a synchronous standby too. The row's proven is the highest
// seq that was confirmed when the leader wrote the row. highestConfirmed is the
// highest confirmed seq that this replica knows of, from leader rows or from its own
// commits.
type replica struct {
	config    *pgx.ConnConfig
	url       string       // at which other replicas reach this one
	confirmed func(totals) // called with totals that this replica, as a standby, has seen confirmed
	log       *logger

	// Owned by standBy, or by the writer while this replica leads:
	row              leaderRow // the leader row as this replica last read or wrote it
	highestConfirmed mark
	warned           bool // PostgreSQL sent a WARNING with the last commit: see send

	// For the gauges:
	leading  atomic.Bool
	term     atomic.Int64
	lastSign atomic.Pointer[time.Time] // standing by: when seq last changed; leading: the time in postgresEngine.lease
}

// mark is a confirmed seq and the term in which this replica saw it confirmed.
type mark struct{ term, seq int64 }

// leaderRow is the only row of the table leader; postgresSchema explains its columns.
type leaderRow struct {
	term, since, proven int64
	ended               bool
	url, pass           string
	totals              totals
}

const selectRow = "SELECT version, term, since, proven, ended, url, pass, " + totalsColumns + " FROM leader WHERE one"

// newReplica does not connect yet. counted holds the totals in metrics.db: a
// database that holds less than these has lost orders.
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
		r.highestConfirmed = mark{math.MaxInt64, counted.seq} // metrics.db stores no term; with this one, no row's term counts as later
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

// unfit is an error that does not go away by waiting: with this server, database
// or role, orderd cannot keep its promises.
type unfit string

func (u unfit) Error() string { return string(u) }

// setUpSession applies sessionSettings to a new session. It returns unfit if the
// server cannot be used, for example because it is not durable, and another error
// if the server is in recovery. After either, pgx tries the next host of the URL.
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
		r.warned = r.warned || n.SeverityUnlocalized == "WARNING" // the same in every language
	}
	c, err := pgx.ConnectConfig(ctx, config)
	if refused, ok := errors.AsType[unfit](err); ok {
		return nil, refused // without pgx's list of the hosts that it tried
	}
	return c, err
}

// remedies maps each class of SQLSTATE that does not go away by waiting to its
// remedy (https://www.postgresql.org/docs/current/errcodes-appendix.html).
var remedies = map[string]string{
	"28": "check the user and the password (PGPASSWORD, PGPASSFILE)",
	"3D": "make it with createdb, or correct -orders",
	"3F": "correct the search_path of -orders",
	"42": "let the role create and use tables in the schema, or put back the table that is gone",
	"0A": "use PostgreSQL 14 or newer",
	"XX": "put a backup in its place",
}

// permanent returns an error that does not go away by waiting as one sentence, and
// nil for others, among them XX000, an unspecified internal error.
func (r *replica) permanent(err error) error {
	if u, ok := errors.AsType[unfit](err); ok {
		return u
	}
	if e, ok := errors.AsType[*pgconn.PgError](err); ok && e.Code != "XX000" && remedies[e.Code[:2]] != "" {
		return fmt.Errorf("%s cannot be used: %s: %s", r.describe(), e.Message, remedies[e.Code[:2]])
	}
	return nil
}

// makeTables creates the tables if there are none. If several replicas start at
// once, only one creates them: the transactions of the others fail on the unique
// indexes of PostgreSQL's catalog, and makeTables ignores that error.
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

// readRow reads the leader row and passes it to noteRow. Its error wraps errBroken
// if commits were lost.
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
	return row, r.noteRow(row)
}

// noteRow replaces r.row by a row that was read, unless that row shows a loss.
func (r *replica) noteRow(row leaderRow) error {
	if err := r.checkNotLost(row); err != nil {
		return err
	}
	// The commit of the previous row is confirmed by now: its totals may be counted.
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

// checkNotLost compares a row with highestConfirmed. Confirmed commits are lost if
// the row's seq is lower, or if a later term began with that seq or a lower one.
func (r *replica) checkNotLost(row leaderRow) error {
	if known := r.row.totals.identity; known != 0 && known != row.totals.identity {
		return fmt.Errorf("%w: %s is not the one whose orders metrics.db has counted: go back to that, or choose another -data, or delete each replica's metrics.db to go on with this one", errBroken, r.describe())
	}
	kept := row.totals.seq // highest seq of the earlier commits that the database can still hold
	later := row.term > r.highestConfirmed.term
	begunTwice := row.term == r.row.term && row.since != r.row.since // two replicas began the same term, on two servers
	if later || begunTwice {
		kept = min(kept, row.since-1)
	}
	if kept < r.highestConfirmed.seq {
		return fmt.Errorf("%w: %s has lost commits that it had confirmed: %d were, and it went on after %d in term %d; put back the server that has them, or delete each replica's metrics.db to accept the loss",
			errBroken, r.describe(), r.highestConfirmed.seq, kept, row.term)
	}
	return nil
}

// ---- Standing by, and taking over. ----

// standBy returns an engine once this replica leads. Until then it calls follow with
// the leader's URL and pass, or with "" if nobody leads. While the database cannot be
// reached, it tries again.
func (r *replica) standBy(ctx context.Context, follow func(url, pass string)) (*postgresEngine, error) {
	for {
		e, err := r.followRow(ctx, follow)
		// A server that is being replaced may refuse for a while. So once a term was
		// seen, only unfit is final.
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
		if time.Since(*r.lastSign.Load()) > takeOverAfter { // before that, the leader may still reach the database
			follow("", "")
		}
		r.log.Warn("the database cannot be used; trying again", "error", err, "in", retryPause.String())
		sleep(ctx, retryPause)
	}
}

// followRow reads the leader row every pollEvery, on one connection, until this
// replica leads, the connection fails, or ctx is done.
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
			if row.url == r.url { // it was this replica, before it was started again
				row.url = ""
			}
			follow(row.url, row.pass)
			continue
		}
		follow("", "")
		if e, err := r.takeOver(ctx, c, row); !errors.Is(err, errDeposed) {
			return e, err
		}
		changed = time.Now() // another replica was faster
	}
	return nil, ctx.Err()
}

const beginTerm = `UPDATE leader SET term = term + 1, seq = seq + 1, since = seq + 1, ended = false, url = $3, pass = $4
WHERE one AND term = $1 AND seq = $2`

// takeOver begins a term if the leader row has not changed since it was read as row,
// else it returns errDeposed. If the update takes effect but its answer is lost, the
// new term has no leader, and a standby ends it after takeOverAfter.
func (r *replica) takeOver(ctx context.Context, c *pgx.Conn, row leaderRow) (*postgresEngine, error) {
	e := &postgresEngine{replica: r, term: row.term + 1, pass: cryptorand.Text(), conn: c, state: unproven, stopping: ctx}
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	tag, err := c.Exec(ctx, beginTerm, row.term, row.totals.seq, r.url, e.pass)
	if err == nil && tag.RowsAffected() == 0 {
		return nil, errDeposed
	}
	if err != nil {
		return nil, err
	}
	row.term, row.since, row.totals.seq, row.url, row.pass = e.term, row.totals.seq+1, row.totals.seq+1, r.url, e.pass
	r.row = row
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

// ---- The engine of the leader: commits. ----

// postgresEngine is the store's engine for one term, while this replica leads.
type postgresEngine struct {
	replica  *replica
	term     int64
	pass     string
	reads    *pgxpool.Pool
	stopping context.Context // done when the service stops: start gives up then

	// Owned by the writer:
	conn    *pgx.Conn
	failure error // why this engine has given up, or nil
	state   commitState

	confirmedSeq atomic.Int64              // the highest seq that PostgreSQL has confirmed
	lease        atomic.Pointer[time.Time] // when the last confirmed commit was sent; nil before the first one and after the last
}

// commitState is what this leader knows of the last commit that it sent.
type commitState uint8

const (
	settled      commitState = iota // it is durable or was rolled back: the next batch may follow
	inDoubt                         // it may be stored, lost, or still arrive: send the same batch again
	unproven                        // it is stored, but perhaps on the primary alone: a confirmed beat proves that it is durable
	proofInDoubt                    // as unproven, and the beat is in doubt: send a beat again
)

// mayArrive reports whether the last attempt may still take effect, and stored
// whether the batch is in the table.
func (s commitState) mayArrive() bool { return s == inDoubt || s == proofInDoubt }
func (s commitState) stored() bool    { return s == unproven || s == proofInDoubt }

// afterLoss returns the state after the answer to an attempt was lost.
func (s commitState) afterLoss() commitState {
	if s.stored() {
		return proofInDoubt
	}
	return inDoubt
}

// commitBatch runs a whole batch in one statement, and so in one transaction
// and one round trip. Each part joins held, which is the fence: if the leader row no
// longer is as this leader left it, held is empty, nothing is written, and no row is
// returned. If the statement must wait for the lock on the leader row, PostgreSQL
// checks term and seq again when it has the lock.
//
// It returns one row for each key that an earlier order has, with that order and the
// key, or if there is none one row without an order. Each row also holds the IDs of
// the steps that did not find their order, and the new totals.
//
// $1 and $2 are the term and the seq that the leader row must have, $3 and $4 its new
// proven and ended. The others are those of parcel.args.
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

// maybeOrder lists the columns of an order o, as zero values if a join found none.
const maybeOrder = "coalesce(o.id_high, 0), coalesce(o.id_low, 0), coalesce(o.status, 0), coalesce(o.user_id, ''), coalesce(o.item_ids, ''), coalesce(o.cents, 0), coalesce(o.started, 0), coalesce(o.took, 0)"

const preparedCommit = "orderd_commit"

// prepareCommit prepares commitBatch on c, the writer's connection.
func (e *postgresEngine) prepareCommit(ctx context.Context, c *pgx.Conn) error {
	_, err := c.Prepare(ctx, preparedCommit, commitBatch)
	return err
}

// start confirms the take-over with a first beat. It corrects the totals if somebody
// has changed the table by hand.
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
	err := e.commit(newBatch(nil)) // is fenced if the UPDATE found no row
	return e.replica.row.totals, err
}

// count runs a query for one row, which may take long. It commits beats meanwhile, so
// that this replica keeps the lead.
func (e *postgresEngine) count(query string, into ...any) error {
	counted := make(chan error, 1)
	go func() {
		counted <- pgx.BeginFunc(e.stopping, e.reads, func(tx pgx.Tx) error {
			// The sessionSettings are for statements that read little.
			if _, err := tx.Exec(e.stopping, "SET LOCAL statement_timeout = 0"); err != nil {
				return err
			}
			if _, err := tx.Exec(e.stopping, "SET LOCAL enable_seqscan = on"); err != nil {
				return err
			}
			return tx.QueryRow(e.stopping, query).Scan(into...)
		})
	}()
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

// parcel holds a batch as the arguments of commitBatch.
type parcel struct {
	batch                   *batch
	ended                   bool // this is the leader's last commit: it hands over
	ids, lows, cents        []int64
	users, items, keys      []string
	movedIDs, started, took []int64
	previous, next          []int16
	removedIDs              []int64
	refusedLeftOut          bool // it lacks the creates that the tables refuse: see without
}

// pack makes a parcel of b. It leaves out a create whose key an earlier create of the
// batch has: answerKeys answers that one.
func pack(b *batch) *parcel {
	p := &parcel{batch: b, movedIDs: make([]int64, 0, len(b.steps))} // never NULL, since commitBatch reads its cardinality
	keys := map[string]bool{}
	for _, c := range b.creates {
		if c.key != "" {
			if keys[c.key] {
				continue
			}
			keys[c.key] = true
		}
		p.addOrder(c)
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

func (p *parcel) addOrder(c *creation) {
	p.ids, p.lows, p.cents = append(p.ids, high(c.newID)), append(p.lows, low(c.newID)), append(p.cents, c.cents)
	p.users, p.items, p.keys = append(p.users, c.userID), append(p.items, c.itemIDs), append(p.keys, c.key)
}

// args are the arguments of commitBatch from $5 on: orders, steps, removals.
func (p *parcel) args() []any {
	return []any{
		p.ids, p.lows, p.cents, p.users, p.items, p.keys,
		p.movedIDs, p.previous, p.next, p.started, p.took,
		p.removedIDs,
	}
}

// answerKeys answers each create whose key has already created an order: one of the
// table, which is in earlier, or one of this batch.
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

// Reasons why the leader row is not as this leader left it.
var (
	errFenced            = errors.New("the row of the leader is no longer as this leader left it")
	errUnconfirmedIsGone = fmt.Errorf("%w: PostgreSQL went on without a commit that it had not confirmed", errDeposed)
	errTampered          = fmt.Errorf("%w: something other than orderd has changed the row in the table leader: stop it, and start orderd again", errBroken)
)

// commit makes attempts until the outcome is known, or for commitTimeout. While an
// attempt is in doubt, only the same batch may be sent, because the first attempt may
// still arrive.
func (e *postgresEngine) commit(b *batch) error {
	b.totals = e.replica.row.totals
	if e.failure != nil {
		return e.failure
	}
	if err := e.expire(b); err != nil {
		b.skipExpiry(e.replica.log, err)
	}
	if !e.state.stored() { // a stored batch already has its answers by key
		for _, c := range b.creates {
			c.reset()
		}
	}
	p := pack(b)
	for end := time.Now().Add(commitTimeout); ; {
		err := e.advance(p)
		switch {
		case err == nil:
			b.totals = e.replica.row.totals
			return nil
		case errors.Is(err, errRejected) && e.state == settled && !p.refusedLeftOut:
			if p, err = e.without(p, err); err != nil {
				return fmt.Errorf("%w: %w", errNotWritten, err)
			}
			continue
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
		time.Sleep(reconnectPause)
	}
}

// without returns a refused batch without its expiry or, if there is none to remove,
// without the creates that the tables refuse even when each is alone.
func (e *postgresEngine) without(p *parcel, cause error) (*parcel, error) {
	if len(p.removedIDs) > 0 {
		p.batch.skipExpiry(e.replica.log, cause)
		return pack(p.batch), nil
	}
	refused := map[*creation]error{}
	if err := e.findRefused(p.batch.creates, refused); err != nil {
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

// findRefused tries to insert the creates, and rolls that back. If the tables refuse
// them, it tries each half, and so on, until it has each create that is refused alone.
// Each try has commitTimeout. If all of them take longer than takeOverAfter, another
// replica may take over, and the batch is not written.
func (e *postgresEngine) findRefused(creates []*creation, refused map[*creation]error) error {
	ctx, cancel := context.WithTimeout(context.Background(), commitTimeout)
	defer cancel()
	var p parcel
	for _, c := range creates {
		p.addOrder(c)
	}
	_, err := e.conn.Exec(ctx, "BEGIN")
	if err == nil {
		_, err = e.conn.Exec(ctx, "INSERT INTO orders (id_high, id_low, cents, status, user_id, item_ids)"+
			" SELECT id_high, id_low, cents, 0, user_id, item_ids FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::text[], $5::text[])"+
			" AS c (id_high, id_low, cents, user_id, item_ids)", p.ids, p.lows, p.cents, p.users, p.items)
	}
	rejection := err
	if err == nil || isRejection(err) {
		_, err = e.conn.Exec(ctx, "ROLLBACK")
	}
	half := len(creates) / 2
	switch {
	case err != nil || rejection == nil:
		return err
	case half > 0:
		if err := e.findRefused(creates[:half], refused); err != nil {
			return err
		}
		return e.findRefused(creates[half:], refused)
	}
	e.replica.log.Error("an order was refused by the table", "error", rejection)
	refused[creates[0]] = fmt.Errorf("%w: %w", errRejected, rejection)
	return nil
}

// isRejection reports whether the tables refuse the data: a value does not fit
// (class 22), a constraint is violated (23), or a trigger raises an error (P0001).
func isRejection(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (e.Code[:2] == "22" || e.Code[:2] == "23" || e.Code == "P0001")
}

// advance finds out the outcome of the last attempt if that is in doubt, and makes
// the next attempt: it sends the batch or, once the batch is stored, a beat that
// proves it durable.
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
	if e.state.stored() { // by an earlier attempt, or just now with a WARNING
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

// reconnect opens a new connection for the writer if the old one is closed.
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
	if permanent := e.replica.permanent(err); permanent != nil { // for example, a table is gone
		return fmt.Errorf("%w: %w", errBroken, permanent)
	}
	return err
}

// findOut reads the leader row to learn whether the last attempt is stored. If that
// attempt was the batch, findOut also answers its keys.
func (e *postgresEngine) findOut(p *parcel) error {
	before := e.replica.row
	row, err := e.ownRow()
	switch {
	case err != nil:
		return err
	case row.totals.seq == before.totals.seq: // not stored, or not yet: sending it again is safe, as the fence lets only one of the two in
		return nil
	case row.totals.seq != before.totals.seq+1:
		return errTampered
	}
	if !e.state.stored() {
		earlier, err := e.ordersOfKeys(p.keys)
		if err != nil {
			e.replica.row = before // so that the next attempt finds the same difference
			return err
		}
		p.answerKeys(earlier)
	}
	e.state = unproven
	return nil
}

// ordersOfKeys reads the orders that keys have created, on the writer's connection.
func (e *postgresEngine) ordersOfKeys(keys []string) (map[string]order, error) {
	ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
	defer cancel()
	found := map[string]order{}
	rows, _ := e.conn.Query(ctx, "SELECT "+orderColumns+", key FROM orders WHERE key = ANY($1)", keys) // rows.Err returns this error, too
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

// send sends a batch once. If the server answers with an ERROR, it has rolled the
// batch back. After a FATAL error or a lost connection, the outcome is unknown.
func (e *postgresEngine) send(p *parcel) error {
	row := &e.replica.row
	ctx, cancel := context.WithTimeout(context.Background(), commitTimeout+time.Duration(p.batch.bytes)*commitByte)
	defer cancel()
	e.replica.warned = false
	fence := []any{e.term, row.totals.seq, e.replica.highestConfirmed.seq, p.ended}
	rows, _ := e.conn.Query(ctx, preparedCommit, append(fence, p.args()...)...)
	t, err := p.absorb(rows)
	if errors.Is(err, errFenced) {
		return e.fenced(err)
	}
	if isRejection(err) {
		e.state = settled // the fence held, and an earlier attempt that is still to arrive is refused, too
		return fmt.Errorf("%w: %w", errRejected, err)
	}
	if err != nil {
		e.conn.Close(ctx) // the server may have become read-only, or the plan invalid: a new connection can find another server and makes a new plan
		pgErr, rolledBack := errors.AsType[*pgconn.PgError](err)
		rolledBack = rolledBack && pgErr.SeverityUnlocalized == "ERROR"
		if rolledBack && e.replica.permanent(err) != nil && pgErr.Code != "0A000" { // 0A000: the prepared plan has become invalid
			return fmt.Errorf("%w: %w", errBroken, e.replica.permanent(err))
		}
		if !rolledBack && !pgconn.SafeToRetry(err) {
			e.state = e.state.afterLoss()
		}
		return err
	}
	row.totals, e.state = t, settled
	if e.replica.warned { // if a wait for a synchronous standby is cancelled, PostgreSQL reports success with a WARNING
		e.state = unproven
	}
	return nil
}

// fenced finds the reason for errFenced. While an earlier attempt is in doubt, that
// attempt may be the reason, and findOut comes next. Otherwise another replica leads,
// or somebody has changed the leader row.
func (e *postgresEngine) fenced(err error) error {
	if e.state.mayArrive() {
		return err
	}
	_, readErr := e.ownRow()
	return cmp.Or(readErr, errTampered)
}

// ownRow reads the leader row again. It returns errDeposed if another replica leads,
// and errUnconfirmedIsGone if seq is lower than this leader left it.
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

// absorb reads what commitBatch returns: the answers for the batch, and the new
// totals. It returns errFenced if there is no row.
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

// expire looks up the orders that the batch is to remove. Completed orders never
// change, and only this writer removes them, so the list stays right however often
// the batch is sent.
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
		x.after, x.before, e.replica.row.totals.newestStarted, postgresExpiryRows)
	defer rows.Close()
	b.removed, x.examined = []ulid.ULID{}, 0
	for ; rows.Next(); x.examined++ {
		var idLow int64
		var expired *bool // NULL if somebody completed the order by hand, without its times
		if err := rows.Scan(&x.through, &idLow, &expired); err != nil {
			return err
		}
		if expired != nil && *expired {
			b.removed = append(b.removed, joinID(x.through, idLow))
		}
	}
	x.ended = x.examined < postgresExpiryRows
	return rows.Err()
}

// tidy commits a beat if the last confirmed commit is older than beatEvery. The beat
// renews the lease and shows the standbys that the leader is alive.
func (e *postgresEngine) tidy() (totals, error) {
	var err error
	if sent := e.lease.Load(); sent == nil || time.Since(*sent) > beatEvery {
		err = e.commit(newBatch(nil))
	}
	return e.replica.row.totals, err
}

// current returns errDeposed if there is no lease, and errSilent if it has run out:
// soon after that, another replica may lead. It compares both clocks, because the
// monotonic clock stands still while the machine sleeps.
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

// close ends the lease, so that nothing is shown any more, and hands over, so that a
// standby takes over without waiting.
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

// ---- The engine of the leader: reads. ----

// query reads the orders that source selects, in one snapshot with the leader row,
// and returns that row's seq. It stops after readBytes of text and then returns more
// as true. It tries three times, because only using a connection shows that it has died.
func (e *postgresEngine) query(source string, args ...any) (orders []order, more bool, seq int64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
	defer cancel()
	for range 3 {
		orders, more, seq, err = e.tryQuery(ctx, source, args)
		if err == nil || errors.Is(err, errDeposed) {
			return orders, more, seq, err
		}
		if !errors.As(err, new(*pgconn.PgError)) {
			e.reads.Reset() // this connection has died, and probably the others, too
		}
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
		if term != e.term || seq < least { // seq < least: this server lacks confirmed commits
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
	if !answered { // there is no leader row
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
// Processing orders have an index of their own, and a list of Completed orders begins
// at the newest order that was ever started, since no newer one is Completed.
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
			where += " AND status < 2" // the condition of the index orders_unfinished
		}
	}
	orders, more, seq, err := e.query("SELECT * FROM orders WHERE "+where+" ORDER BY id_high DESC LIMIT $2", args...)
	p.orders = orders[:min(len(orders), f.limit)]
	if more || len(orders) > f.limit {
		p.next = p.orders[len(p.orders)-1].id
	}
	return p, seq, err
}

// backlog reads Pending and Processing orders apart, since their index is ordered by
// ID only within a status. It returns once the commit that it has read is confirmed,
// so that no order is worked on before.
func (e *postgresEngine) backlog(after int64, limit int) (found []queued, err error) {
	// The texts are left out, so that query does not stop after readBytes of them.
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
