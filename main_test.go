// What is tested where, each under a heading "// ---- …":
//
//   - the harness, and the process that tests start; the API description;
//   - main.go, server.go, store.go, cache.go, worker.go, what is only time passing (in
//     bubbles), metrics.go, log.go;
//   - the oracle, and the faults that it watches: the process, the disk, the start,
//     the work, people; older versions; retention; abuse;
//   - fuzz targets and benchmarks;
//   - the engine on PostgreSQL, and replicas.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"database/sql/driver"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	_ "github.com/jackc/pgx/v5/stdlib"
	"github.com/labstack/echo/v4"
	"github.com/oklog/ulid/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	long        = flag.Bool("long", false, "take the crowds and backlogs in full")
	killRounds  = flag.Int("kill-rounds", 3, "how often TestKillNine kills the service")
	faultRounds = flag.Int("fault-rounds", 5, "how many faults TestReplicasUnderFaults makes")
	killSeed    = flag.Uint64("seed", 0, "seed of TestKillNine, to repeat a run; 0 takes the clock")
	patience    = flag.Duration("patience", 3*time.Minute, "how long to wait for what must happen; more than the longest pause of a failing order")
	readerHold  = flag.Duration("reader-holds", 300*time.Millisecond, "how long TestReaderUnderLoad holds its transaction")
)

// newTestApp serves the whole service on real files and a free port until the test ends.
func newTestApp(tb testing.TB, change func(*config)) *app {
	tb.Helper()
	a, _ := openTestApp(tb, tb.TempDir(), change, nil)
	return a
}

// openTestApp is newTestApp on a directory that may hold an earlier one's files,
// for a test that stops the service itself, or breaks it before it starts.
func openTestApp(tb testing.TB, dir string, change func(*config), before func(*app)) (a *app, stop func()) {
	tb.Helper()
	a = lookedAt(tb, dir, change, before)
	require.NoError(tb, a.start())
	return a, serveTestApp(tb, a)
}

// lookedAt is an app that has been opened and not started.
func lookedAt(tb testing.TB, dir string, change func(*config), before func(*app), stderr ...io.Writer) *app {
	tb.Helper()
	cfg := testConfig(dir)
	if change != nil {
		change(&cfg)
	}
	a, err := openApp(cfg, io.MultiWriter(stderr...))
	require.NoError(tb, err)
	if a.replica != nil {
		require.NoError(tb, a.awaitLead(tb.Context(), func(string, string) {}))
	}
	if before != nil {
		before(a)
	}
	return a
}

// serveTestApp serves an app that has been started, until the test stops it or ends.
func serveTestApp(tb testing.TB, a *app) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.serve(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		assert.NoError(tb, <-ended)
	})
	tb.Cleanup(stop)
	return stop
}

// openIdle opens an app without its pool and server: orders move only as the test steps them.
func openIdle(tb testing.TB, dir string, change func(*config), before func(*app)) (a *app, stop func()) {
	tb.Helper()
	a = lookedAt(tb, dir, change, before)
	require.NoError(tb, a.store.start(a.onCommit))
	require.NoError(tb, a.metrics.start(a.store.publishedTotals()))
	stop = sync.OnceFunc(func() { assert.NoError(tb, errors.Join(a.closeFiles(), a.log.close())) })
	tb.Cleanup(stop)
	return a, stop
}

func testConfig(dir string) config {
	var cfg config
	cfg.flags()
	cfg.addr, cfg.data, cfg.log.file = "127.0.0.1:0", dir+"/data", dir+"/logs/orderd.log"
	cfg.store.cache = 10_000 // the usual million would cost each app 16 MB to clear
	cfg.store.now, cfg.pool.now, cfg.pool.delay = time.Now, time.Now, 0
	cfg.orders, cfg.advertise = ordersURL(dir), "http://127.0.0.1:1"
	return cfg
}

func until(tb testing.TB, condition func() bool, because ...any) {
	tb.Helper()
	pause := time.Millisecond
	for began := time.Now(); !condition(); time.Sleep(pause) {
		if time.Since(began) > *patience {
			require.Fail(tb, "it does not come about", because...)
		}
		pause = min(pause*3/2, 10*time.Millisecond) // looks cost time that what is waited for may need
	}
}

// heldApp works on orders only until one has an item called held; there it waits for release.
func heldApp(t *testing.T, change func(*config)) (a *app, release, stop func()) {
	t.Helper()
	gate := make(chan struct{})
	a, stop = openTestApp(t, t.TempDir(), change, func(a *app) {
		a.pool.work = onOrders(a, func(_ context.Context, o order) error {
			if o.itemIDs == "held" {
				<-gate
			}
			return nil
		})
	})
	release = sync.OnceFunc(func() { close(gate) })
	t.Cleanup(release)
	return a, release, stop
}

// onOrders is work that looks at what is in the order.
func onOrders(a *app, look func(context.Context, order) error) work {
	return func(ctx context.Context, id ulid.ULID, _ int) error {
		o, err := a.store.get(id)
		if err != nil {
			return err
		}
		return look(ctx, o)
	}
}

// answer is what the service sent back, or why nothing came.
type answer struct {
	status int
	header http.Header
	body   string
	err    error
}

// send makes one request over TCP. A Host in the header is sent as such.
func send(ctx context.Context, addr, method, path string, header http.Header, body string) answer {
	_, port, _ := net.SplitHostPort(addr)
	return exchange(ctx, http.DefaultClient, "http://127.0.0.1:"+port, method, path, header, body)
}

// exchange is send to what base names, by a client that reaches it.
func exchange(ctx context.Context, client *http.Client, base, method, path string, header http.Header, body string) answer {
	request, err := http.NewRequestWithContext(ctx, method, base+path, strings.NewReader(body))
	if err != nil {
		return answer{err: err}
	}
	if header != nil {
		request.Header, request.Host = header.Clone(), header.Get("Host")
	}
	response, err := client.Do(request)
	if err != nil {
		return answer{err: err}
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return answer{response.StatusCode, response.Header, string(text), err}
}

// callAt also demands of the answer what is true of every answer.
func callAt(t *testing.T, addr, method, path string, header http.Header, body string) answer {
	t.Helper()
	got := send(t.Context(), addr, method, path, header, body)
	requireGood(t, method, path, got)
	return got
}

// base is the URL that an app answers at.
func base(a *app) string { return "http://" + a.listener.Addr().String() }

func call(t *testing.T, a *app, method, path string, header http.Header, body string) answer {
	t.Helper()
	return callAt(t, a.listener.Addr().String(), method, path, header, body)
}

func get(t *testing.T, a *app, path string) answer {
	t.Helper()
	return call(t, a, http.MethodGet, path, nil, "")
}

var asJSON = http.Header{"Content-Type": {"application/json"}}

func post(t *testing.T, a *app, body string) answer {
	t.Helper()
	return call(t, a, http.MethodPost, "/orders", asJSON, body)
}

func keyed(keys ...string) http.Header {
	return http.Header{"Content-Type": {"application/json"}, "Idempotency-Key": keys}
}

func prefer(values ...string) http.Header { return http.Header{"Prefer": values} }

// orderBody takes the three values as JSON.
func orderBody(userID, itemIDs, amount string) string {
	return fmt.Sprintf(`{"user_id": %s, "item_ids": %s, "total_amount": %s}`, userID, itemIDs, amount)
}

// place creates an order and returns its ID.
func place(t *testing.T, a *app, userID, itemIDs string) string {
	t.Helper()
	got := post(t, a, orderBody(`"`+userID+`"`, `"`+itemIDs+`"`, "1"))
	require.Equal(t, http.StatusCreated, got.status, got.body)
	return strings.TrimPrefix(got.header.Get("Location"), "/orders/")
}

func statusOf(t *testing.T, a *app, id string) string {
	t.Helper()
	return decoded[struct{ Status string }](t, get(t, a, "/orders/"+id).body).Status
}

func decoded[T any](t *testing.T, text string) (v T) {
	t.Helper()
	require.NoError(t, json.Unmarshal([]byte(text), &v), text)
	return v
}

// requireGood checks that an answer has its request ID, that an error is a
// problem document (RFC 9457), and that web/openapi.json foretells it.
func requireGood(t *testing.T, method, path string, got answer) {
	t.Helper()
	require.NoError(t, got.err)
	require.NotEmpty(t, got.header.Get("X-Request-Id"))
	if got.status >= 400 && method != http.MethodHead {
		require.Equal(t, "application/problem+json", got.header.Get("Content-Type"), got.body)
		problem := decoded[fault](t, got.body)
		require.NotEmpty(t, problem.Type)
		require.Equal(t, http.StatusText(got.status), problem.Title)
		require.NotEmpty(t, problem.Detail)
		require.Equal(t, got.status, problem.Status)
	}
	requireDocumented(t, method, path, got)
}

// sampleOrder is the i-th of many orders that can be told apart.
func sampleOrder(i int, key string) *creation {
	return &creation{order: order{userID: fmt.Sprintf("user%d", i), itemIDs: fmt.Sprintf("item%d,item2", i), cents: int64(i)}, key: key}
}

func sampleOrders(n int) []*creation {
	creates := make([]*creation, n)
	for i := range creates {
		creates[i] = sampleOrder(i, "")
	}
	return creates
}

// largest are orders with as much text as the API takes.
func largest(n int) []*creation {
	creates := sampleOrders(n)
	for _, c := range creates {
		c.itemIDs = strings.Repeat("x", maxItemIDs)
	}
	return creates
}

// commitTogether commits the creates in one batch, in this order, and returns their IDs.
func commitTogether(tb testing.TB, s *store, creates []*creation) []ulid.ULID {
	tb.Helper()
	s.intake.mu.Lock()
	b := s.intake.open
	b.creates = append(b.creates, creates...)
	s.intake.mu.Unlock()
	nudge(s.intake.wake)
	<-b.done
	require.NoError(tb, b.err)
	var ids []ulid.ULID
	for _, c := range creates {
		ids = append(ids, c.id)
	}
	return ids
}

// move steps an order and returns the step as the writer left it.
func move(s *store, st transition) transition {
	s.intake.mu.Lock()
	b := s.intake.open
	b.move(st)
	s.intake.mu.Unlock()
	nudge(s.intake.stepped)
	<-b.done
	return b.steps[b.stepOf[st.id]]
}

// moveTo takes a Pending order to a status.
func moveTo(tb testing.TB, s *store, id ulid.ULID, to status, took int64) {
	tb.Helper()
	if to >= processing {
		require.False(tb, move(s, transition{id: id, from: pending, to: processing, startedMS: 1000}).void)
	}
	if to == completed {
		require.False(tb, move(s, transition{id: id, from: processing, to: completed, startedMS: 1000, tookMicros: took}).void)
	}
}

func allOrders(tb testing.TB, s *store) []order {
	tb.Helper()
	orders, _ := walk(tb, s, filter{limit: maxPage})
	return orders
}

// walk reads a list page by page, and counts the pages.
func walk(tb testing.TB, s *store, f filter) (orders []order, pages int) {
	tb.Helper()
	f.before = math.MaxInt64
	for {
		page, err := s.list(f)
		require.NoError(tb, err)
		require.LessOrEqual(tb, len(page.orders), f.limit)
		orders, pages = append(orders, page.orders...), pages+1
		if page.next.IsZero() {
			return orders, pages
		}
		require.Less(tb, high(page.next), f.before)
		f.before = high(page.next)
	}
}

// execOn runs SQL on a database by a connection of its own.
func execOn(tb testing.TB, path, query string, args ...any) {
	tb.Helper()
	db, err := openSQLite(path)
	require.NoError(tb, err)
	_, err = db.Exec(query, args...)
	require.NoError(tb, errors.Join(err, db.Close()))
}

// openOrders opens the table of orders as another program does.
func openOrders(tb testing.TB, a *app) (db *sql.DB) {
	tb.Helper()
	var err error
	if a.replica != nil {
		db, err = sql.Open("pgx", a.cfg.orders)
	} else {
		db, err = openSQLite(a.sqlite.file.path)
	}
	require.NoError(tb, err)
	return db
}

// tamper changes the table of orders behind the service's back.
func tamper(tb testing.TB, a *app, query string, args ...any) {
	tb.Helper()
	db := openOrders(tb, a)
	_, err := db.Exec(query, args...)
	require.NoError(tb, errors.Join(err, db.Close()))
}

// onSQLite is the engine, for a test that is about it alone.
func onSQLite(tb testing.TB, a *app) *sqliteEngine {
	tb.Helper()
	if a.sqlite == nil {
		tb.Skip("this is about SQLite")
	}
	return a.sqlite
}

// logged are the lines with this message in the log of an app that has ended.
func logged(tb testing.TB, dir, message string) []map[string]any {
	tb.Helper()
	return linesOf(tb, bytesOf(tb, filepath.Join(dir, "logs", "orderd.log")), message)
}

func linesOf(tb testing.TB, log, message string) (lines []map[string]any) {
	tb.Helper()
	for line := range strings.Lines(log) {
		var fields map[string]any
		require.NoError(tb, json.Unmarshal([]byte(line), &fields))
		if fields["msg"] == message {
			lines = append(lines, fields)
		}
	}
	return lines
}

// diary notes what many goroutines meet, orders or moments, in that order.
type diary[T any] struct {
	mu    sync.Mutex
	notes []T
}

func (d *diary[T]) note(what T) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.notes = append(d.notes, what)
}

func (d *diary[T]) read() []T {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.notes)
}

func (d *diary[T]) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.notes = nil
}

// hold is work that lasts until release is closed.
func hold(release <-chan struct{}) work {
	return func(ctx context.Context, _ ulid.ULID, _ int) error {
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// countedAll reports whether metrics.db has counted all. Beats of a leader only count seq up.
func countedAll(a *app) bool {
	counted, held := *a.metrics.counted.Load(), a.store.publishedTotals()
	return counted.seq == held.seq || a.replica != nil && counted.accepted == held.accepted && counted.completed == held.completed
}

// awaitRest waits until so many orders are Processing and Completed, and counted in metrics.db.
func awaitRest(tb testing.TB, a *app, inWork, done int64) {
	tb.Helper()
	until(tb, func() bool {
		t := a.store.publishedTotals()
		return t.processing == inWork && t.completed == done && countedAll(a)
	}, fmt.Sprintf("%d Processing and %d Completed, in both databases", inWork, done))
}

// counts are the totals without the number of commits.
func counts(a *app) totals {
	t := a.store.publishedTotals()
	t.seq = 0
	return t
}

func walBytes(a *app) int64 { return int64(a.sqlite.gauges()[0].value) }

// checkInvariants compares all that tells the state of the orders; nothing may move while it looks.
func checkInvariants(tb testing.TB, a *app) {
	tb.Helper()
	until(tb, func() bool { return countedAll(a) }, "metrics.db has counted all")
	db := openOrders(tb, a)
	defer db.Close()
	found := totals{identity: a.store.publishedTotals().identity, seq: a.store.publishedTotals().seq}
	inTable := map[ulid.ULID]status{}
	var last ulid.ULID
	rows, err := db.Query("SELECT id_high, id_low, status, started, took FROM orders ORDER BY id_high")
	require.NoError(tb, err)
	defer rows.Close()
	for rows.Next() {
		var idHigh, idLow int64
		var st status
		var started, took *int64
		require.NoError(tb, rows.Scan(&idHigh, &idLow, &st, &started, &took))
		id := joinID(idHigh, idLow)
		require.Negative(tb, last.Compare(id), "IDs increase from %s to %s", last, id)
		last, inTable[id] = id, st
		found.accepted++
		found.newest = idHigh
		if st == pending {
			require.True(tb, started == nil && took == nil, "%s is Pending and has a start", id)
			continue
		}
		found.newestStarted = idHigh
		require.True(tb, started != nil && *started > 0, "%s is %s without a start", id, st)
		if st == processing {
			found.processing++
			require.Nil(tb, took, "%s is Processing and has an end", id)
			continue
		}
		require.True(tb, took != nil && *took >= 0, "%s is Completed without a time", id)
		found.completed++
		found.sumTook += *took
	}
	require.NoError(tb, rows.Err())
	written := writtenTotals(tb, a, db)
	found.seq = written.seq
	require.Equal(tb, found, written, "the stored totals are those of the table")
	found.seq = a.store.publishedTotals().seq
	require.Equal(tb, found, a.store.publishedTotals(), "totals in memory are those of the table")

	counts, err := openSQLite(a.metrics.file.path)
	require.NoError(tb, err)
	defer counts.Close()
	var projected totals
	require.NoError(tb, counts.QueryRow("SELECT accepted, completed, took, seq, identity FROM totals").
		Scan(&projected.accepted, &projected.completed, &projected.sumTook, &projected.seq, &projected.identity))
	require.Equal(tb, totals{accepted: found.accepted, completed: found.completed, sumTook: found.sumTook, seq: projected.seq, identity: found.identity},
		projected, "metrics.db holds the totals of orders.db")
	average := 0.0
	if found.completed > 0 {
		average = float64(found.sumTook) / float64(found.completed) / 1e6
	}
	require.Equal(tb, summary{
		TotalOrdersProcessed: found.completed, AverageProcessingTime: average,
		OrdersPending: found.pending(), OrdersProcessing: found.processing, OrdersCompleted: found.completed,
	}, a.metrics.summarize(a.store.publishedTotals()))

	if a.sqlite != nil {
		checkSQLite(tb, a, db, counts, found)
	}
	require.True(tb, cacheAgrees(a.store.cache, inTable), "the cache agrees with the table and with its ring")
	if found.completed == found.accepted {
		require.Empty(tb, a.pool.channel)
		until(tb, func() bool { return a.pool.parked.len() == 0 }, "nothing is parked")
	}
}

func writtenTotals(tb testing.TB, a *app, db *sql.DB) (t totals) {
	table := "totals"
	if a.replica != nil {
		table = "leader"
	}
	require.NoError(tb, db.QueryRow("SELECT "+totalsColumns+" FROM "+table).Scan(t.fields()...))
	return t
}

// checkSQLite looks at what only this engine has: the index of users, and files.
func checkSQLite(tb testing.TB, a *app, db, counts *sql.DB, found totals) {
	tb.Helper()
	var counted int64
	require.NoError(tb, counts.QueryRow("SELECT seq FROM totals").Scan(&counted))
	require.Equal(tb, []int64{found.seq, found.seq}, []int64{counted, writtenTotals(tb, a, db).seq}, "both files are of one commit")
	var indexed, entries, older int64
	require.NoError(tb, db.QueryRow(`SELECT count(*), (SELECT count(*) FROM orders_by_user),
		(SELECT count(*) FROM orders WHERE id_high <= (SELECT max(last) FROM user_runs)) FROM orders_by_user JOIN orders USING (id_high)
		WHERE user = user_id AND run = (SELECT max(first) FROM user_runs WHERE first <= id_high)`).Scan(&indexed, &entries, &older))
	require.Equal(tb, []int64{indexed, indexed}, []int64{entries, older}, "every order up to the newest indexed one is indexed once")
	require.Less(tb, found.accepted-indexed, int64(indexEvery))
	for _, file := range []*sql.DB{db, counts} {
		var verdict string
		require.NoError(tb, file.QueryRow("PRAGMA integrity_check").Scan(&verdict))
		require.Equal(tb, "ok", verdict)
	}
}

func cacheAgrees(c *cache, inTable map[ulid.ULID]status) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	keys := map[ulid.ULID]bool{}
	for _, first := range c.ring {
		e, ok := c.statuses[first]
		id := ulid.ULID(slices.Concat(first[:], e.second[:]))
		inRow, stored := inTable[id]
		if !ok || !stored || e.status != inRow {
			return false
		}
		keys[id] = true
	}
	return len(keys) == len(c.ring) && len(keys) == len(c.statuses) && len(keys) <= cap(c.ring) && c.next < cap(c.ring)
}

// ---- the real process ----

// childMode, where it is set, makes the test binary the service, in one of childModes.
const childMode = "TEST_CHILD"

const (
	exitedBetweenCommits = 77 // exit status in the mode exit-between-commits
	heldCreates          = 16 // how many creates are in flight when hold-commit says so
)

// childModes change the service before it starts, most to break it on purpose. Besides
// there are serve, the service as it is, and what benchmarks compare it with.
var childModes = map[string]func(*app){
	// ends the process at once where orders.db has been committed and metrics.db not yet, at the time TEST_AT
	"exit-between-commits": func(a *app) {
		left, _ := strconv.Atoi(os.Getenv("TEST_AT"))
		a.metrics.beforeProject = func() {
			if left--; left == 0 {
				os.Exit(exitedBetweenCommits)
			}
		}
	},
	// breaks the first promise: after a few good batches it answers one that it never commits
	"answer-before-commit": func(a *app) {
		batches := 0
		a.sqlite.beforeCommit = func(b *batch) {
			if len(b.creates) == 0 {
				return
			}
			if batches++; batches > 3 {
				close(b.done)
				fmt.Fprintln(os.Stderr, "answered before the commit")
				select {} // until it is killed
			}
		}
	},
	// breaks the third promise: what a batch completes it counts again
	"count-twice": func(a *app) {
		a.sqlite.beforeCommit = func(b *batch) {
			if len(b.steps) > 0 {
				a.sqlite.file.Exec("UPDATE totals SET accepted = accepted + 1, completed = completed + 1") // by the writer's connection
			}
		}
	},
	// holds the first commit until all creates are in flight and a little longer, so that SIGTERM finds them there
	"hold-commit": func(a *app) {
		var once sync.Once
		a.sqlite.beforeCommit = func(b *batch) {
			if len(b.creates) == 0 {
				return
			}
			once.Do(func() {
				for len(b.creates)+a.store.intake.creates() < heldCreates {
					runtime.Gosched()
				}
				fmt.Fprintln(os.Stderr, "all creates are in flight")
				time.Sleep(300 * time.Millisecond)
			})
		}
	},
	// serves creates with Echo and the store alone: no order is worked on, no request logged
	"bare-store": func(a *app) {
		debug.SetGCPercent(gcPercent(a.cfg.pool.workers))
		if err := a.store.start(func(commitReport) {}); err != nil {
			panic(err)
		}
		serveFloor(a.store)
	},
}

func TestMain(m *testing.M) {
	mode, ok := os.LookupEnv(childMode)
	if !ok {
		if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
			parallel.Value.Set("16") // most of them wait
		}
		code := m.Run()
		if os.Getenv("ORDERD_TEST_POSTGRES") != "" {
			if template, _ := templateCluster(); template != "" {
				os.RemoveAll(template)
			}
		}
		whole := !testing.Short()
		for _, name := range []string{"test.run", "test.skip", "test.list", "test.fuzz"} {
			whole = whole && flag.Lookup(name).Value.String() == ""
		}
		if missing := unwitnessed(); whole && code == 0 && len(missing) > 0 {
			fmt.Println("FAIL: web/openapi.json promises what no test has seen:", strings.Join(missing, ", "))
			code = 1
		}
		os.Exit(code)
	}
	go func() { // no child outlives its test
		io.Copy(io.Discard, os.Stdin)
		os.Exit(3)
	}()
	switch mode {
	case "serve":
		main()
	case "floor":
		serveFloor(nil)
	case "transactions":
		serveTransactions()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(report(func() error {
		cfg, err := parseConfig(os.Args[1:], nil)
		if err != nil {
			return err
		}
		a, err := openApp(cfg, os.Stderr)
		if err != nil {
			return err
		}
		childModes[mode](a)
		if err := a.start(); err != nil {
			return a.abandon(err)
		}
		return a.serve(ctx)
	}(), os.Stderr))
}

// process is the service in a process of its own.
type process struct {
	cmd    *exec.Cmd
	addr   string // host:port
	dir    string
	stderr *transcript
	exited chan struct{} // closed after code is set
	code   int           // exit code, -1 for a signal
}

// startProcess runs the service on dir/data and waits until it is open.
func startProcess(tb testing.TB, dir string, env []string, args ...string) *process {
	tb.Helper()
	return startWrapped(tb, nil, dir, env, args...)
}

const announced = "orderd is open at http://" // and then the address

// startWrapped is startProcess under a command, such as strace, that becomes the
// service by exec or leaves it as its own process.
func startWrapped(tb testing.TB, wrapper []string, dir string, env []string, args ...string) *process {
	tb.Helper()
	p := launch(tb, wrapper, dir, env, args...)
	p.addr = strings.TrimPrefix(p.mustPrint(tb, announced), announced)
	if sharedPostgres != "" {
		until(tb, func() bool {
			return send(tb.Context(), p.addr, http.MethodGet, "/metrics", nil, "").status == http.StatusOK
		}, "it leads")
	}
	return p
}

// launch is startWrapped without the wait.
func launch(tb testing.TB, wrapper []string, dir string, env []string, args ...string) *process {
	tb.Helper()
	self, err := os.Executable()
	require.NoError(tb, err)
	command := append(slices.Clone(wrapper), self, "-addr", "127.0.0.1:0", "-data", filepath.Join(dir, "data"), "-log", filepath.Join(dir, "logs", "orderd.log"))
	if _, test := tb.(*testing.T); test {
		command = append(command, "-cache", "10000") // the usual million, which benchmarks have, would cost 16 MB to clear
	}
	if url := ordersURL(dir); url != "" {
		command = append(command, "-orders", url, "-advertise", "http://127.0.0.1:1")
	}
	command = append(command, args...)
	p := &process{cmd: exec.Command(command[0], command[1:]...), dir: dir, stderr: &transcript{}, exited: make(chan struct{})}
	others := slices.DeleteFunc(os.Environ(), func(variable string) bool { return strings.HasPrefix(variable, "ORDERD_") })
	// Of a repeated variable the last counts. The race detector would sleep a second at exit.
	p.cmd.Env = slices.Concat(others, []string{childMode + "=serve", "GORACE=atexit_sleep_ms=0"}, env)
	p.cmd.Stderr = p.stderr
	p.cmd.WaitDelay = 5 * time.Second
	stdin, err := p.cmd.StdinPipe()
	require.NoError(tb, err)
	require.NoError(tb, p.cmd.Start())
	go func() {
		p.cmd.Wait()
		p.code = p.cmd.ProcessState.ExitCode()
		close(p.exited)
	}()
	tb.Cleanup(func() {
		stdin.Close()
		p.kill()
	})
	return p
}

// signal sends what Windows has no name for.
func (p *process) signal(name string) error {
	return exec.Command("kill", name, strconv.Itoa(p.cmd.Process.Pid)).Run()
}

func (p *process) url() string { return "http://" + p.addr }

// kill is kill -9.
func (p *process) kill() {
	p.cmd.Process.Kill() // fails where it has ended
	<-p.exited
}

// printed waits for a line with that prefix on stderr, and returns it; it is empty if
// the process has ended without one.
func (p *process) printed(tb testing.TB, prefix string) (line string) {
	tb.Helper()
	until(tb, func() bool {
		ended := p.hasEnded()
		line = p.stderr.line(prefix)
		return line != "" || ended
	}, "it does not print %s, but:\n%s", prefix, p.stderr)
	return line
}

func (p *process) hasEnded() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// mustPrint is printed for a process that does not end before.
func (p *process) mustPrint(tb testing.TB, prefix string) string {
	tb.Helper()
	line := p.printed(tb, prefix)
	require.NotEmpty(tb, line, "the process ended before it printed: %s\n%s", prefix, p.stderr)
	return line
}

// wait returns the exit code.
func (p *process) wait(tb testing.TB, within time.Duration) int {
	tb.Helper()
	select {
	case <-p.exited:
	case <-time.After(within):
		require.Fail(tb, "the process has not ended", p.stderr.String())
	}
	return p.code
}

// terminate sends SIGTERM and returns the exit code.
func (p *process) terminate(tb testing.TB, within time.Duration) int {
	tb.Helper()
	needsUnix(tb)
	require.NoError(tb, p.cmd.Process.Signal(syscall.SIGTERM))
	return p.wait(tb, within)
}

// stop ends the process cleanly where the system can, and demands exit code 0.
func (p *process) stop(tb testing.TB) {
	tb.Helper()
	if runtime.GOOS == "windows" {
		p.kill()
		return
	}
	require.Equal(tb, 0, p.terminate(tb, *patience), p.stderr.String())
}

// residentMB is the memory that the process occupies.
func (p *process) residentMB(tb testing.TB) float64 {
	tb.Helper()
	text, err := exec.Command("ps", "-o", "rss=", "-p", strconv.Itoa(p.cmd.Process.Pid)).Output()
	if err != nil {
		tb.Skip("needs ps: ", err)
	}
	kb, err := strconv.Atoi(strings.TrimSpace(string(text)))
	require.NoError(tb, err)
	return float64(kb) / 1024
}

// cpu is the processor time that the process has used; ok is false without /proc.
func (p *process) cpu() (used time.Duration, ok bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	fields := strings.Fields(string(text))
	if err != nil || len(fields) < 15 {
		return 0, false
	}
	user, _ := strconv.Atoi(fields[13])
	system, _ := strconv.Atoi(fields[14])
	return time.Duration(user+system) * 10 * time.Millisecond, true // of USER_HZ, which is 100
}

// transcript keeps what a process printed.
type transcript struct {
	mu   sync.Mutex
	text []byte
}

func (c *transcript) Write(text []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text = append(c.text, text...)
	return len(text), nil
}

func (c *transcript) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text)
}

// line returns the first whole line with that prefix, or nothing.
func (c *transcript) line(prefix string) string {
	for line := range strings.Lines(c.String()) {
		if strings.HasPrefix(line, prefix) && strings.HasSuffix(line, "\n") {
			return strings.TrimSuffix(line, "\n")
		}
	}
	return ""
}

// raced tells whether the race detector is in, which takes time and memory.
func raced() bool {
	info, _ := debug.ReadBuildInfo()
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// many is n with -long, and else a tenth of it.
func many(n int) int {
	if *long {
		return n
	}
	return n / 10
}

func needsUnix(tb testing.TB) {
	tb.Helper()
	if runtime.GOOS == "windows" {
		tb.Skip("needs signals")
	}
}

// unprivileged is a command for startWrapped under which a file's mode counts
// for root too: on Linux it gives up the right to pass it by.
func unprivileged() []string {
	if _, err := exec.LookPath("setpriv"); err != nil || os.Geteuid() != 0 {
		return nil
	}
	return []string{"setpriv", "--bounding-set=-dac_override,-dac_read_search"}
}

// needsModes skips where a file's mode keeps nobody out.
func needsModes(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() <= 0 && unprivileged() == nil { // Windows has no such mode
		tb.Skip("needs an ordinary user, or setpriv")
	}
}

func needs(tb testing.TB, command string) {
	tb.Helper()
	needsUnix(tb)
	if _, err := exec.LookPath(command); err != nil {
		tb.Skip("needs ", command)
	}
}

// ---- the API description, held against every answer ----

// node is a JSON object of web/openapi.json.
type node = map[string]any

var openapi = sync.OnceValue(func() (document node) {
	json.Unmarshal(apiJSON, &document)
	return document
})

// within goes down into a description, through each $ref.
func within(value any, names ...string) node {
	n, _ := value.(node)
	if ref, ok := n["$ref"].(string); ok {
		return within(openapi(), append(strings.Split(strings.TrimPrefix(ref, "#/"), "/"), names...)...)
	}
	if len(names) == 0 {
		return n
	}
	return within(n[names[0]], names[1:]...)
}

var placeholder = regexp.MustCompile(`\{[^/]+\}`)

// operation is the description of what answers a request, or nil.
func operation(method, address string) node {
	address, _, _ = strings.Cut(address, "?")
	if method == http.MethodHead {
		method = http.MethodGet // the server sends the same without the body
	}
	for template := range within(openapi(), "paths") {
		if ok, _ := path.Match(placeholder.ReplaceAllString(template, "*"), address); ok {
			return within(openapi(), "paths", template, strings.ToLower(method))
		}
	}
	return nil
}

func requireDocumented(t *testing.T, method, path string, got answer) {
	t.Helper()
	operation := operation(method, path)
	if operation == nil { // no route: a 404, a 405 or OPTIONS
		return
	}
	response := within(operation, "responses", strconv.Itoa(got.status))
	require.NotNil(t, response, "web/openapi.json lacks %d of %s %s", got.status, method, path)
	if method != http.MethodHead {
		witnessed.Store(fmt.Sprintf("%v %d", operation["operationId"], got.status), true)
		for name := range within(response, "headers") {
			if got.header.Get(name) != "" {
				witnessed.Store(fmt.Sprintf("%v %d %s", operation["operationId"], got.status, name), true)
			}
		}
	}
	if got.body == "" {
		return
	}
	if got.status >= 400 {
		witnessed.Store(decoded[node](t, got.body)["detail"], true)
	}
	media, _, err := mime.ParseMediaType(got.header.Get("Content-Type"))
	require.NoError(t, err)
	for listed := range within(response, "content") {
		if kind, _, _ := mime.ParseMediaType(listed); kind == media {
			if strings.HasSuffix(media, "json") && path != "/openapi.json" { // whose schema names no more than it needs
				require.Empty(t, mismatches("body", within(response, "content", listed, "schema"), decoded[any](t, got.body)),
					"web/openapi.json differs from %d of %s %s", got.status, method, path)
			}
			return
		}
	}
	require.Fail(t, "web/openapi.json lacks a media type", "%s in %d of %s %s", media, got.status, method, path)
}

// witnessed are the statuses and headers of each operation, and the details of problems, that tests have seen.
var witnessed sync.Map

// unwitnessed lists what web/openapi.json promises and no test has seen, without
// the statuses that only a fault brings, some of them in a process of its own.
func unwitnessed() (missing []string) {
	for _, item := range within(openapi(), "paths") {
		for method := range within(item) {
			operation := within(item, method)
			for status := range within(operation, "responses") {
				if slices.Contains([]string{"500", "503", "408"}, status) {
					continue
				}
				promised := []string{fmt.Sprintf("%v %s", operation["operationId"], status)}
				for name := range within(operation, "responses", status, "headers") {
					promised = append(promised, promised[0]+" "+name)
				}
				problem := within(operation, "responses", status, "content", "application/problem+json")
				if example := within(problem, "example"); example != nil {
					promised = append(promised, example["detail"].(string))
				}
				for name := range within(problem, "examples") {
					promised = append(promised, within(problem, "examples", name, "value")["detail"].(string))
				}
				for _, what := range promised {
					if _, ok := witnessed.Load(what); !ok {
						missing = append(missing, what)
					}
				}
			}
		}
	}
	return missing
}

// mismatches tells where a value departs from the names and types of a schema.
func mismatches(where string, schema node, value any) (found []string) {
	wrong := func(format string, args ...any) { found = append(found, where+fmt.Sprintf(format, args...)) }
	if several, ok := schema["anyOf"].([]any); ok && !slices.ContainsFunc(several, func(one any) bool { return len(mismatches(where, within(one), value)) == 0 }) {
		wrong(" is none of those that it may be")
	}
	kind := "null"
	switch v := value.(type) {
	case string:
		kind = "string"
	case bool:
		kind = "boolean"
	case float64:
		kind = "number"
		if v == math.Trunc(v) && schema["type"] == "integer" {
			kind = "integer"
		}
	case node:
		kind = "object"
		names := within(schema, "properties")
		for name, member := range v {
			if names != nil && names[name] == nil {
				wrong(".%s is not in the schema", name)
			} else {
				found = append(found, mismatches(where+"."+name, within(names, name), member)...)
			}
		}
		required, _ := schema["required"].([]any)
		for _, name := range required {
			if _, ok := v[name.(string)]; !ok {
				wrong(".%s is missing", name)
			}
		}
	case []any:
		kind = "array"
		for i, member := range v {
			found = append(found, mismatches(fmt.Sprintf("%s[%d]", where, i), within(schema, "items"), member)...)
		}
	}
	if types, several := schema["type"].([]any); several && !slices.Contains(types, any(kind)) || !several && schema["type"] != nil && schema["type"] != kind {
		wrong(" is %s, not %v", kind, schema["type"])
	}
	if values, ok := schema["enum"].([]any); ok && !slices.Contains(values, value) {
		wrong(" is %v, not one of %v", value, values)
	}
	if only, ok := schema["const"]; ok && only != value {
		wrong(" is %v, not %v", value, only)
	}
	return found
}

func TestOpenAPIListsTheRoutes(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	require.JSONEq(t, string(apiJSON), get(t, a, "/openapi.json").body)
	require.Regexp(t, `^3\.`, openapi()["openapi"])
	var routed, listed []string
	for _, r := range a.server.routes {
		if r.method != http.MethodHead && r.method != "other" {
			routed = append(routed, r.method+" "+regexp.MustCompile(`:(\w+)`).ReplaceAllString(r.path, "{$1}"))
		}
	}
	for path, item := range within(openapi(), "paths") {
		for method := range within(item) {
			if slices.Contains([]string{"get", "put", "post", "delete", "options", "head", "patch", "trace"}, method) {
				listed = append(listed, strings.ToUpper(method)+" "+path)
			}
		}
	}
	require.ElementsMatch(t, routed, listed)
	for name, schema := range within(openapi(), "components", "schemas") {
		for property := range within(schema, "properties") {
			if name+"."+property != "Problem.errors" {
				require.Contains(t, within(schema)["required"], property, "every property of %s is always there", name)
			}
		}
	}
	id := place(t, a, "u", "x")
	examples := map[string]string{"limit": "1", "status": "Pending", "user_id": "u", "before": id}
	parameters, _ := within(openapi(), "paths", "/orders", "get")["parameters"].([]any)
	require.Len(t, parameters, len(examples))
	for _, p := range parameters {
		name := within(p)["name"].(string)
		require.Equal(t, http.StatusOK, get(t, a, "/orders?"+url.Values{name: {examples[name]}}.Encode()).status, name)
	}
}

// ---- main.go ----

func TestFilesUseOnlyFilesBelow(t *testing.T) {
	t.Parallel()
	require.Empty(t, upwardUses(t, nil))
	planted := map[string]string{"cache.go": "\nvar planted = newServer\n", "store.go": "\nfunc planted(p *pool) int { return p.workers }\n"}
	require.Equal(t, []string{"cache.go uses newServer of server.go", "store.go uses pool of worker.go", "store.go uses workers of worker.go"}, upwardUses(t, planted))
}

// upwardUses type-checks the program, with more text appended to some files, and
// lists every use of a name that a file above declares.
func upwardUses(tb testing.TB, more map[string]string) (found []string) {
	tb.Helper()
	var order []string // of the table in main.go's package comment, from the top down
	for _, m := range regexp.MustCompile(`(?m)^//\t(\w+\.go) `).FindAllStringSubmatch(bytesOf(tb, "main.go"), -1) {
		order = append(order, m[1])
	}
	names, err := filepath.Glob("*.go")
	require.NoError(tb, err)
	var files []*ast.File
	fset := token.NewFileSet()
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		require.Contains(tb, order, name)
		f, err := parser.ParseFile(fset, name, bytesOf(tb, name)+more[name], parser.SkipObjectResolution)
		require.NoError(tb, err)
		files = append(files, f)
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}, Selections: map[*ast.SelectorExpr]*types.Selection{}}
	config := types.Config{Error: func(error) {}} // imports fail: the program's own names do not depend on them
	pkg, _ := config.Check("orderd", fset, files, info)
	at := func(p token.Pos) string { return filepath.Base(fset.Position(p).Filename) }
	for ident, object := range info.Uses {
		if object.Pkg() != pkg || !object.Pos().IsValid() {
			continue
		}
		user, owner := at(ident.Pos()), at(object.Pos())
		if slices.Index(order, user) > slices.Index(order, owner) {
			found = append(found, user+" uses "+ident.Name+" of "+owner)
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// flagTable says of each flag all that can be said of it. Accepted values are
// written as fmt prints them; the first and the last are the limits. The files
// {dir}/a, b and c hold tokens.
var flagTable = []struct {
	name, initial     string
	get               func(config) any
	accepted, refused []string
	limits            string   // in the message
	beside            []string // the arguments that it needs
}{
	{name: "addr", initial: "localhost:8080", get: func(c config) any { return c.addr },
		accepted: []string{"localhost:0", "[::1]:80", ":65535"}, refused: []string{"localhost", "localhost:-1", ":65536", ":http", ""},
		limits: "host:port with a port from 0 to 65535"},
	{name: "host", get: func(c config) any { return strings.Join(c.server.proxyHosts, ",") },
		accepted: []string{"orders.example", "a,b-c.example,d_e"}, refused: []string{"", "a,", ",a", "a, b", "a:80", "https://a", "*.example", "[::1]"},
		limits: "names without scheme and port"},
	{name: "token-file", get: func(c config) any { return c.tokenFile }, accepted: []string{"{dir}/a", "{dir}/b"}, refused: []string{""}, limits: "not be empty"},
	{name: "read-token-file", get: func(c config) any { return c.readTokenFile }, accepted: []string{"{dir}/a", "{dir}/b"}, refused: []string{""}, limits: "not be empty",
		beside: []string{"-token-file", "{dir}/c"}},
	{name: "tls-cert", get: func(c config) any { return c.certFile }, accepted: []string{"a", "b"}, beside: []string{"-tls-key", "k"}},
	{name: "tls-key", get: func(c config) any { return c.keyFile }, accepted: []string{"a", "b"}, beside: []string{"-tls-cert", "c"}},
	{name: "drain", initial: "10s", get: func(c config) any { return c.drain },
		accepted: []string{"0s", "24h0m0s"}, refused: []string{"-1ns", "24h0m0.000000001s", "5", "soon", ""}, limits: "a duration from 0s to 24h0m0s"},
	{name: "data", initial: "data", get: func(c config) any { return c.data },
		accepted: []string{"a", "/b/c"}, refused: []string{""}, limits: "not be empty"},
	{name: "orders", get: func(c config) any { return c.orders }, accepted: []string{"postgres://a/b", "postgres://c/d"},
		refused: []string{""}, limits: "not be empty", beside: []string{"-advertise", "http://a"}},
	{name: "advertise", get: func(c config) any { return c.advertise }, accepted: []string{"http://a:80", "https://b"}, refused: []string{"", "a:80", "ftp://a", "http://a/b", "http://a?b"},
		limits: "an http or https URL of a host and port alone", beside: []string{"-orders", "postgres://a/b"}},
	{name: "workers", initial: "8", get: func(c config) any { return c.pool.workers },
		accepted: []string{"1", "100000"}, refused: []string{"0", "100001", "-1", "1.5", "many", ""}, limits: "a whole number from 1 to 100000"},
	{name: "delay", initial: "2s", get: func(c config) any { return c.pool.delay },
		accepted: []string{"0s", "24h0m0s"}, refused: []string{"-1ns", "24h0m0.000000001s", "5", "soon", ""}, limits: "a duration from 0s to 24h0m0s"},
	{name: "work", get: func(c config) any { return c.pool.endpoint.url },
		accepted: []string{"http://a", "https://[::1]:8443/b?c=d"}, refused: []string{"", "a", "a:80", "//a/b", "ftp://a", "http://", "http:///b", "http://:80", "http://a b"},
		limits: "an http or https URL with a host"},
	{name: "work-timeout", beside: []string{"-work", "http://a"}, initial: "30s", get: func(c config) any { return c.pool.endpoint.timeout },
		accepted: []string{"1s", "1h0m0s"}, refused: []string{"999ms", "1h0m1s", "0", "5", ""}, limits: "a duration from 1s to 1h0m0s"},
	{name: "work-token-file", beside: []string{"-work", "http://a"}, get: func(c config) any { return c.workTokenFile }, accepted: []string{"{dir}/a", "{dir}/b"}, refused: []string{""}, limits: "not be empty"},
	{name: "queue", initial: "1024", get: func(c config) any { return c.pool.queue },
		accepted: []string{"1", "1000000"}, refused: []string{"0", "1000001"}, limits: "a whole number from 1 to 1000000"},
	{name: "cache", initial: "1000000", get: func(c config) any { return c.store.cache },
		accepted: []string{"1", "100000000"}, refused: []string{"0", "100000001"}, limits: "a whole number from 1 to 100000000"},
	{name: "keep", initial: "0s", get: func(c config) any { return c.store.keep },
		accepted: []string{"0s", "1s", "87600h0m0s"}, refused: []string{"-1s", "999ms", "87600h0m1s", "7d", ""}, limits: "0, or a duration from 1s to 87600h"},
	{name: "log", initial: "logs/orderd.log", get: func(c config) any { return c.log.file },
		accepted: []string{"-", "a.log"}, refused: []string{""}, limits: "not be empty"},
	{name: "log-size", initial: "100", get: func(c config) any { return c.log.maxMB },
		accepted: []string{"1", "10000"}, refused: []string{"0", "10001"}, limits: "a whole number from 1 to 10000"},
	{name: "log-backups", initial: "5", get: func(c config) any { return c.log.backups },
		accepted: []string{"1", "1000"}, refused: []string{"0", "1001"}, limits: "a whole number from 1 to 1000"},
	{name: "log-days", initial: "28", get: func(c config) any { return c.log.days },
		accepted: []string{"0", "36500"}, refused: []string{"-1", "36501"}, limits: "a whole number from 0 to 36500"},
	{name: "log-level", initial: "info", get: func(c config) any { return strings.ToLower(c.log.level.String()) },
		accepted: []string{"debug", "info", "warn", "error"}, refused: []string{"DEBUG", "all", ""}, limits: "debug, info, warn or error"},
}

// exited is the exit status that err leads to, and the one line it prints.
func exited(t *testing.T, err error) (code int, sentence string) {
	t.Helper()
	var stderr transcript
	code = report(err, &stderr)
	require.Regexp(t, `^orderd: [^\n]+\n$`, stderr.String())
	return code, stderr.String()
}

// leaveGC keeps run from setting GOGC for all tests of this process.
var leaveGC = []string{"GOGC=off"}

// runRefused runs in this process a service that must not start, and returns its exit code and sentence.
func runRefused(t *testing.T, dir string, environ []string, args ...string) (code int, sentence string) {
	t.Helper()
	var stdout, stderr transcript
	ended, cancel := context.WithCancel(t.Context())
	cancel() // stops at once what has started all the same
	args = append([]string{"-addr", "127.0.0.1:0", "-data", dir + "/data", "-log", dir + "/logs/orderd.log"}, args...)
	code, sentence = exited(t, run(ended, args, slices.Concat(environ, leaveGC), &stdout, &stderr))
	require.Empty(t, stdout.String()+stderr.String())
	return code, sentence
}

func TestFlags(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, token := range []string{"a", "b", "c"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, token), []byte(token), 0o600))
	}
	inDir := func(texts []string) (inDir []string) {
		for _, text := range texts {
			inDir = append(inDir, strings.Replace(text, "{dir}", dir, 1))
		}
		return inDir
	}
	for _, f := range flagTable {
		f.accepted, f.beside = inDir(f.accepted), inDir(f.beside)
		name, variable := "-"+f.name, "ORDERD_"+strings.ToUpper(strings.ReplaceAll(f.name, "-", "_"))
		t.Run(name, func(t *testing.T) {
			requireValue := func(want string, variables map[string]string, args ...string) {
				t.Helper()
				c, err := parseConfig(args, variables)
				require.NoError(t, err)
				require.Equal(t, want, fmt.Sprint(f.get(c)))
			}
			requireValue(f.initial, nil)
			for _, text := range f.accepted {
				requireValue(text, nil, slices.Concat(f.beside, []string{name, text})...)
			}
			low, high := f.accepted[0], f.accepted[len(f.accepted)-1]
			requireValue(low, map[string]string{variable: low}, f.beside...)
			requireValue(high, map[string]string{variable: low}, slices.Concat(f.beside, []string{name, high})...) // the flag wins
			for _, text := range f.refused {
				_, byFlag := parseConfig(slices.Concat(f.beside, []string{name, text}), nil)
				_, byVariable := parseConfig(f.beside, map[string]string{variable: text})
				for source, err := range map[string]error{"flag " + name: byFlag, variable: byVariable} {
					code, sentence := exited(t, err)
					require.Equal(t, 2, code)
					require.Contains(t, sentence, fmt.Sprintf("%q for %s: must ", text, source))
					require.Contains(t, sentence, f.limits)
				}
			}
		})
	}
	t.Run("ORDERD_VERSION and ORDERD_H are none of ours", func(t *testing.T) {
		c, err := parseConfig(nil, map[string]string{"ORDERD_VERSION": "1", "ORDERD_H": "1"})
		require.NoError(t, err)
		require.False(t, c.version)
	})
}

func TestHelpAndVersion(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{"-h", "-help", "--help"} {
		var stdout, stderr transcript
		require.Zero(t, report(run(t.Context(), []string{arg}, nil, &stdout, &stderr), &stderr))
		require.Empty(t, stderr.String())
		for _, f := range flagTable {
			require.Regexp(t, fmt.Sprintf(`(?m)^  -%s +\S.*\n +default %s, variable ORDERD_%s$`, f.name, regexp.QuoteMeta(cmp.Or(f.initial, "none")),
				strings.ToUpper(strings.ReplaceAll(f.name, "-", "_"))), stdout.String())
		}
		require.Equal(t, len(flagTable), strings.Count(stdout.String(), ", variable "))
		for _, name := range []string{"backup", "version", "h"} {
			require.Regexp(t, "(?m)^  -"+name+` +\S`, stdout.String())
		}
		require.Contains(t, stdout.String(), "ORDERD_TOKEN, ORDERD_READ_TOKEN or ORDERD_WORK_TOKEN")
	}
	var stdout, stderr transcript
	require.NoError(t, run(t.Context(), []string{"-version"}, nil, &stdout, &stderr))
	require.Regexp(t, `^orderd \S+, commit \S+, go\S+[^\n]*\n$`, stdout.String())
	require.Empty(t, stderr.String())
}

func TestWrongArguments(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	blank := filepath.Join(dir, "blank.token")
	require.NoError(t, os.WriteFile(blank, []byte("\n"), 0o600))
	for _, test := range []struct {
		name          string
		args, environ []string
		named         string
		code          int // 2 where it is not given
	}{
		{name: "an endpoint and a delay", args: []string{"-work", "http://a", "-delay", "2s"}, named: "-work and -delay.*orderd -h"},
		{name: "an endpoint and a delay by variables", environ: []string{"ORDERD_WORK=http://a", "ORDERD_DELAY=0s"},
			named: "ORDERD_WORK and ORDERD_DELAY.*orderd -h"},
		{name: "a token for no endpoint", environ: []string{"ORDERD_WORK_TOKEN=t"}, named: "give -work too"},
		{name: "a limit for no endpoint", args: []string{"-work-timeout", "9s"}, named: "give -work too"},
		{name: "an argument that is no flag", args: []string{"-workers", "2", "serve"}, named: `"serve".*orderd -h`},
		{name: "a flag that does not exist", args: []string{"-worker", "2"}, named: "-worker.*orderd -h"},
		{name: "a flag without its value", args: []string{"-workers"}, named: "-workers.*orderd -h"},
		{name: "a token as a flag", args: []string{"-token", "secret"}, named: "-token.*orderd -h"},
		{name: "a certificate without its key", args: []string{"-tls-cert", "c"}, named: "-tls-cert and -tls-key"},
		{name: "a key without its certificate", environ: []string{"ORDERD_TLS_KEY=k"}, named: "-tls-cert and -tls-key"},
		{name: "a backup to nowhere", args: []string{"-backup", ""}, named: "-backup.*must not be empty"},
		{name: "a read token alone", environ: []string{"ORDERD_READ_TOKEN=r"}, named: "ORDERD_TOKEN or -token-file"},
		{name: "one token for both", environ: []string{"ORDERD_TOKEN=s", "ORDERD_READ_TOKEN=s"}, named: "read token"},
		{name: "a token of two lines", environ: []string{"ORDERD_WORK_TOKEN=a\nb"}, args: []string{"-work", "http://a"},
			named: "ORDERD_WORK_TOKEN holds a line break"},
		{name: "an empty token", environ: []string{"ORDERD_TOKEN="}, named: "ORDERD_TOKEN"},
		{name: "a blank token", environ: []string{"ORDERD_TOKEN= "}, named: "ORDERD_TOKEN"},
		{name: "an empty read token", environ: []string{"ORDERD_TOKEN=s", "ORDERD_READ_TOKEN="}, named: "ORDERD_READ_TOKEN"},
		{name: "an empty token for the endpoint", environ: []string{"ORDERD_WORK_TOKEN="}, named: "ORDERD_WORK_TOKEN"},
		{name: "a file that is no token", args: []string{"-token-file", "go.mod"}, named: "file of -token-file, go.mod, holds a line break"},
		{name: "an empty token file", args: []string{"-token-file", blank}, environ: []string{"ORDERD_TOKEN=x"}, named: `blank\.token`},
		{name: "a token file that is missing", args: []string{"-token-file", "gone.token"}, named: `gone\.token`, code: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			code, sentence := runRefused(t, dir, test.environ, test.args...)
			require.Equal(t, cmp.Or(test.code, 2), code)
			require.Regexp(t, test.named, sentence)
		})
	}
}

// TestSettingsInFilesExist looks for the settings that deployed files and the README name.
func TestSettingsInFilesExist(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("deploy/*")
	require.NoError(t, err)
	for _, file := range append(files, "README.md") {
		text, variables := bytesOf(t, file), map[string]string{}
		require.NotEmpty(t, text, file)
		for _, name := range regexp.MustCompile(`\bORDERD_[A-Z_]*[A-Z]\b`).FindAllString(text, -1) {
			variables[name] = ""
		}
		c, _ := parseConfig(nil, variables) // their values are refused
		require.Empty(t, c.unknown, file)
	}
}

func TestUnknownVariablesAreWarnedOf(t *testing.T) {
	t.Parallel()
	p := startProcess(t, t.TempDir(), []string{"ORDERD_WORKER=2", "ORDERD_TOKENS=s3cret", "ORDERD_TOKEN=t", "ORDERD_READ_TOKEN=r", "ORDERD_CACHE=10",
		"ORDERD_PORT=tcp://10.0.0.1:80", "ORDERD_PORT_80_TCP_ADDR=10.0.0.1", "ORDERD_SERVICE_HOST=10.0.0.1", "ORDERD_SERVICE_PORT_HTTP=80"})
	require.Equal(t, "warning: no setting is called ORDERD_TOKENS or ORDERD_WORKER: see orderd -h for those that are",
		p.mustPrint(t, "warning: "))
	p.kill()
	require.NotContains(t, p.stderr.String(), "s3cret")
}

func TestTokenSource(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(text string) string {
		path := filepath.Join(dir, fmt.Sprintf("token%x", text))
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	type env = map[string]string
	for _, test := range []struct {
		name                        string
		env                         env
		args                        []string
		token, readToken, workToken string // the last is sent to the endpoint
	}{
		{name: "there is none without a source"},
		{name: "ORDERD_TOKEN holds it", env: env{"ORDERD_TOKEN": "a"}, token: "a"},
		{name: "a file holds it, up to its line end", args: []string{"-token-file", file("a\r\n")}, token: "a"},
		{name: "a variable names the file", env: env{"ORDERD_TOKEN_FILE": file("a")}, token: "a"},
		{name: "the file wins", env: env{"ORDERD_TOKEN": "x"}, args: []string{"-token-file", file("a")}, token: "a"},
		{name: "the read token", env: env{"ORDERD_TOKEN": "a", "ORDERD_READ_TOKEN": "r"}, token: "a", readToken: "r"},
		{name: "a file holds the read token", env: env{"ORDERD_TOKEN": "a", "ORDERD_READ_TOKEN": "x"},
			args: []string{"-read-token-file", file("r\n")}, token: "a", readToken: "r"},
		{name: "the endpoint's", env: env{"ORDERD_TOKEN": "a", "ORDERD_WORK_TOKEN": "b", "ORDERD_WORK": "http://a"},
			token: "a", workToken: "b"},
		{name: "a file holds the endpoint's", args: []string{"-work", "http://a", "-work-token-file", file("b\n")}, workToken: "b"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := parseConfig(test.args, test.env)
			require.NoError(t, err)
			require.Equal(t, test.token, c.server.token)
			require.Equal(t, test.readToken, c.server.readToken)
			require.Equal(t, test.workToken, c.pool.endpoint.token)
		})
	}
}

func TestExitWhereNobodyReadsStderr(t *testing.T) {
	t.Parallel()
	_, full := io.Pipe()
	require.Equal(t, 1, report(errors.New("the disk failed"), full))
}

func TestSignals(t *testing.T) {
	t.Parallel()
	needsUnix(t)
	heard := make(chan os.Signal, 1) // or the process would ignore them as the test does in the background or under nohup
	signal.Notify(heard, syscall.SIGHUP, syscall.SIGINT)
	t.Cleanup(func() { signal.Stop(heard) })
	// working starts a process that works on an order for as long as it is let.
	working := func(t *testing.T, wrapper []string, drain string) *process {
		t.Parallel()
		p := startWrapped(t, wrapper, t.TempDir(), nil, "-delay", "24h", "-drain", drain)
		newJournal("signal", 0).place(t, p.url(), 1)
		until(t, func() bool { return metric(t, p.url(), `orderd_orders{status="Processing"}`) == 1 }, "the order is worked on")
		return p
	}
	t.Run("a terminal that closes sends several SIGHUPs", func(t *testing.T) {
		p := working(t, nil, "1s")
		require.NoError(t, p.cmd.Process.Signal(syscall.SIGHUP))
		p.mustPrint(t, "stopping: waiting up to 1s for orders at work (1) and for requests; interrupt again to end at once")
		p.cmd.Process.Signal(syscall.SIGHUP) // fails where it has ended
		p.cmd.Process.Signal(syscall.SIGHUP)
		require.Zero(t, p.wait(t, *patience))
		require.NoFileExists(t, filepath.Join(p.dir, "data", "orders.db-wal"))
	})
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		t.Run("a second one ends at once: "+signal.String(), func(t *testing.T) {
			p := working(t, nil, "24h")
			require.NoError(t, p.cmd.Process.Signal(signal))
			p.mustPrint(t, "stopping: waiting up to 24h0m0s for orders at work (1)")
			require.NoError(t, p.cmd.Process.Signal(signal))
			require.Equal(t, -1, p.wait(t, *patience), "it ended by the signal")
		})
	}
	t.Run("requests are waited for too", func(t *testing.T) {
		t.Parallel()
		p := startProcess(t, t.TempDir(), nil)
		conn, err := net.Dial("tcp", p.addr)
		require.NoError(t, err)
		t.Cleanup(func() { conn.Close() })
		require.NoError(t, conn.SetDeadline(time.Now().Add(*patience)))
		fmt.Fprintf(conn, "POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", len(exampleOrder))
		answers := bufio.NewReader(conn)
		line, err := answers.ReadString('\n')
		require.NoError(t, err)
		require.Contains(t, line, "100 Continue", "its body is being read")
		require.NoError(t, p.cmd.Process.Signal(syscall.SIGTERM))
		p.mustPrint(t, "stopping: waiting up to 10s for orders at work (0) and for requests")
		answers.ReadString('\n')
		conn.Write([]byte(exampleOrder))
		line, err = answers.ReadString('\n')
		require.NoError(t, err)
		require.Contains(t, line, "201 Created")
		require.Zero(t, p.wait(t, *patience))
	})
	t.Run("nohup goes on to work", func(t *testing.T) {
		needs(t, "nohup")
		p := working(t, []string{"nohup"}, "0s")
		require.NoError(t, p.cmd.Process.Signal(syscall.SIGHUP))
		require.Zero(t, p.terminate(t, *patience), "SIGTERM is the first that counts")
	})
}

func TestOpenDoorIsWarnedOf(t *testing.T) {
	t.Parallel()
	const warning = "anyone who reaches this address can place and read orders: set ORDERD_TOKEN or -token-file"
	for _, test := range []struct {
		addr, token string
		warned      bool
	}{{":0", "", true}, {":0", "s3cret", false}, {"127.0.0.1:0", "", false}} {
		dir, stderr := t.TempDir(), &transcript{}
		a := lookedAt(t, dir, func(c *config) { c.addr, c.server.token = test.addr, test.token }, nil, stderr)
		require.NoError(t, a.start())
		serveTestApp(t, a)()
		require.Equal(t, test.warned, strings.Contains(stderr.String(), "\nwarning: "+warning+"\n"), "%+v", test)
		require.Equal(t, test.warned, len(logged(t, dir, warning)) == 1, "%+v", test)
	}
}

func TestEndToEnd(t *testing.T) {
	t.Parallel()
	needsUnix(t)
	dir := t.TempDir()
	p := startProcess(t, dir, nil, "-delay", "10ms")
	ask := func(path string, header http.Header) string {
		return callAt(t, p.addr, http.MethodGet, path, header, "").body
	}
	created := callAt(t, p.addr, http.MethodPost, "/orders", asJSON, exampleOrder)
	require.Equal(t, http.StatusCreated, created.status)
	location := created.header.Get("Location")
	status := func() string { return decoded[struct{ Status string }](t, ask(location, nil)).Status }
	require.Contains(t, statusNames, status())
	for status() != "Completed" {
		ask(location, prefer("wait=20"))
	}
	sum := drained(t, p.url())
	require.EqualValues(t, 1, sum.TotalOrdersProcessed)
	require.GreaterOrEqual(t, sum.AverageProcessingTime, .01)
	orders := ask("/orders", nil)
	want := []string{"metrics.db", "orderd.lock", "orderd.log", ".orderd.log.lock"}
	if sharedPostgres == "" {
		require.Contains(t, p.stderr.String(), "8 workers, 10ms an order, 0 unfinished orders resumed\n")
		want = append(want, "orders.db")
	}
	p.stop(t)

	var files []string
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if path == dir || err != nil {
			return err
		}
		info, err := entry.Info()
		assert.Zero(t, info.Mode().Perm()&0o077, "%s is %s", path, info.Mode())
		if entry.Type().IsRegular() {
			files = append(files, entry.Name())
		}
		return err
	}))
	require.ElementsMatch(t, want, files, "no -wal is left behind")

	p = startProcess(t, dir, nil, "-delay", "10ms")
	require.Equal(t, "Completed", status())
	require.Equal(t, sum, decoded[summary](t, ask("/metrics", nil)))
	require.JSONEq(t, orders, ask("/orders", nil))
	p.stop(t)
}

// ---- server.go ----

func TestCreateAccepts(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	requireTaken := func(t *testing.T, body, userID, itemIDs, amount string) {
		t.Helper()
		got := post(t, a, body)
		require.Equal(t, http.StatusCreated, got.status, got.body)
		require.Equal(t, "application/json", got.header.Get("Content-Type"))
		created := decoded[map[string]string](t, got.body)
		id, err := ulid.ParseStrict(created["order_id"])
		require.NoError(t, err)
		require.Equal(t, map[string]string{"message": "Order created", "order_id": id.String()}, created)
		require.Equal(t, "/orders/"+id.String(), got.header.Get("Location"))
		require.Empty(t, got.header.Get("Idempotent-Replayed"))
		newest := list(t, a, "?limit=1").Orders[0]
		require.Equal(t, id.String(), newest.OrderID)
		require.Equal(t, userID, newest.UserID)
		require.Equal(t, itemIDs, newest.ItemIDs)
		require.Equal(t, amount, newest.TotalAmount.String())
	}
	t.Run("the example", func(t *testing.T) { requireTaken(t, exampleOrder, "user123", "item1,item2", "99.99") })
	t.Run("fields in any order, spaced and escaped", func(t *testing.T) {
		body := "\r\n\t { \"total_amount\" :1,\n\"item_ids\":\"{}[],:\",\"user\\u005fid\":\"\\\"}\" } \n"
		requireTaken(t, body, `"}`, "{}[],:", "1.00")
	})
	u128, thousand, long := strings.Repeat("u", 128), strings.Repeat("i,", 999)+"i", strings.Repeat("i", 16<<10)
	for userID, want := range map[string]string{ // JSON
		`"u"`: "u", `"` + u128 + `"`: u128, `"  ` + u128 + ` "`: u128, `"\u00a0\u2003u v\u3000"`: "u v",
		`"żółw 亀 🐢\u00e9\uD83D\uDC22"`: "żółw 亀 🐢é🐢", `"\"\\\/"`: `"\/`, `"<b>&amp;\u2028'"`: "<b>&amp;\u2028'",
		`"� \ufffd \uFFFD"`: "� � �", `"\\ufffd\\ud800"`: `\ufffd\ud800`, // the replacement character, and no escape
	} {
		t.Run(fmt.Sprintf("the user_id %.40s", userID), func(t *testing.T) {
			requireTaken(t, orderBody(userID, `"i"`, "1"), want, "i", "1.00")
		})
	}
	for itemIDs, want := range map[string]string{
		`" a , b c,\u00a0d "`: "a,b c,d", `"a,a"`: "a,a", `"<i>"`: "<i>",
		`"` + thousand + `"`: thousand, `"` + long + `"`: long,
	} {
		t.Run(fmt.Sprintf("the item_ids %.40s", itemIDs), func(t *testing.T) {
			requireTaken(t, orderBody(`"u"`, itemIDs, "1"), "u", want, "1.00")
		})
	}
	for amount, want := range map[string]string{
		"0": "0.00", "-0": "0.00", "-0.000e999999999999999999999": "0.00", "0.1": "0.10", "0.01": "0.01", "1000e-5": "0.01",
		"99.990": "99.99", "1e2": "100.00", "1.2345E+3": "1234.50", "9007199254740.93": "9007199254740.93", // no float64
		"9999999999999.99": "9999999999999.99", "999999999999999e-2": "9999999999999.99", // the most
	} {
		t.Run("the total_amount "+amount, func(t *testing.T) {
			requireTaken(t, orderBody(`"u"`, `"i"`, amount), "u", "i", want)
		})
	}
}

// details reads what a 422 says, by field.
func details(t *testing.T, body string) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	for _, e := range decoded[struct{ Errors []fieldError }](t, body).Errors {
		require.NotEmpty(t, e.Detail)
		found[e.Field] = append(found[e.Field], e.Detail)
	}
	return found
}

func TestCreateRefusesFields(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	for field, values := range map[string][]string{ // JSON, each wrong in itself
		"user_id": {
			`null`, `1`, `true`, `["u"]`, `{"u": 1}`, `""`, `"  "`, `"` + strings.Repeat("u", 129) + `"`, `"` + strings.Repeat("é", 65) + `"`,
			`"u\u0000"`, `"u\nu"`, `"u\u001fu"`, `"u\u007f"`, `"u\u0085u"`, "\"u\u0085u\"", `"u\u009f"`,
			`"\ud800"`, `"\uDBFF"`, `"\udc00"`, `"\udc00\ud800"`, `"\ud800\ud800\udc00"`, `"\ud800\u0041"`, `"\ufffd\ud800"`, `"�\udfff"`, `"\\ufffd\ud800"`,
		},
		"item_ids": {
			`null`, `1`, `false`, `["a", "b"]`, `{}`, `""`, `" "`, `","`, `"a,"`, `",a"`, `"a,,b"`, `"a, ,b"`, `"a,\u00a0"`,
			`"` + strings.Repeat("i,", 1000) + `i"`, `"` + strings.Repeat("i", 16<<10+1) + `"`, `"a\tb"`, `"a,b\u0085c"`, `"a,\ud83d"`, `"\\ufffd,\udc00"`,
		},
		"total_amount": {
			`null`, `"1"`, `true`, `[1]`, `{"cents": 1}`, `-1`, `-0.01`, `-1e400`, `0.001`, `1e-3`, `1.005`, `99.991`, `1e-400`, `1e-99999999999999999999`,
			`10000000000000`, `9999999999999.991`, `99999999999999.99`, `1e13`, `1e400`, `1e99999999999999999999`, `123456789012345678901234567890`,
		},
	} {
		for _, value := range values {
			t.Run(fmt.Sprintf("%s cannot be %.40s", field, value), func(t *testing.T) {
				fields := map[string]string{"user_id": `"u"`, "item_ids": `"i"`, "total_amount": "1"}
				fields[field] = value
				got := post(t, a, orderBody(fields["user_id"], fields["item_ids"], fields["total_amount"]))
				require.Equal(t, http.StatusUnprocessableEntity, got.status, got.body)
				require.Equal(t, []string{field}, slices.Collect(maps.Keys(details(t, got.body))))
			})
		}
	}
	const unknown, twice, missing = "is not a field of an order: the fields are user_id, item_ids and total_amount", "is given more than once", "is missing"
	lots := strings.Repeat("i,", 1200)
	for _, test := range []struct {
		name, body string
		says       map[string][]string
	}{
		{"no field at all", `{}`, map[string][]string{"user_id": {missing}, "item_ids": {missing}, "total_amount": {missing}}},
		{"one field missing", `{"user_id": "u", "total_amount": 1}`, map[string][]string{"item_ids": {missing}}},
		{"a field of another name", `{"user_id": "u", "item_ids": "i", "total_amount": 1, "note": "x"}`, map[string][]string{"note": {unknown}}},
		{"a field of no name", `{"": 1, "user_id": "u", "item_ids": "i", "total_amount": 1}`, map[string][]string{"": {unknown}}},
		{"a name in another letter case", `{"User_ID": "u", "item_ids": "i", "total_amount": 1}`, map[string][]string{"User_ID": {unknown}, "user_id": {missing}}},
		{"a field given twice", `{"user_id": "u", "item_ids": "i", "total_amount": 1, "total_amount": 1}`, map[string][]string{"total_amount": {twice}}},
		{"a field given twice, once escaped", `{"user_id": "u", "user\u005fid": "v", "item_ids": "i", "total_amount": 1}`, map[string][]string{"user_id": {twice}}},
		{"everything wrong at once", `{"user_id": 1, "item_ids": "i", "item_ids": "j", "x": {"total_amount": 1}}`,
			map[string][]string{"user_id": {"must be a string, not a number"}, "item_ids": {twice}, "x": {unknown}, "total_amount": {missing}}},
		{"other types", orderBody(`null`, `true`, `["1"]`), map[string][]string{"user_id": {"must be a string, not null"},
			"item_ids": {"must be a string, not a boolean"}, "total_amount": {"must be a number, not an array"}}},
		{"bounds", orderBody(`"  `+strings.Repeat("u", 129)+` "`, `"`+lots+strings.Repeat("i", 20_000)+`"`, "10000000000000"), map[string][]string{
			"user_id":      {"must be 1 to 128 bytes without the spaces around it, not 129"},
			"item_ids":     {"must be at most 16384 bytes, not 22400", "must be at most 1000 items, not 1201"},
			"total_amount": {"must be at most 9999999999999.99"}}},
		{"what is in them", orderBody(`"ab\n\ud800"`, `"a,b, ,c"`, "-0.001"), map[string][]string{
			"user_id":      {"must be Unicode text, but has an escape for half of a surrogate pair", "must not contain control characters, but has one at byte 2"},
			"item_ids":     {"must be items separated by commas, but item 3 is empty"},
			"total_amount": {"must be 0 or more"}}},
		{"decimals", orderBody(`"u"`, `"i"`, "0.001"), map[string][]string{"total_amount": {"must have at most two decimals"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := post(t, a, test.body)
			require.Equal(t, http.StatusUnprocessableEntity, got.status, got.body)
			require.Equal(t, test.says, details(t, got.body))
		})
	}
	require.Zero(t, a.store.publishedTotals().accepted)
}

func TestCreateRefusesBodies(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	requireStatus := func(t *testing.T, status int, header http.Header, body string) {
		t.Helper()
		accepted := a.store.publishedTotals().accepted
		require.Equal(t, status, call(t, a, http.MethodPost, "/orders", header, body).status)
		if status == http.StatusCreated {
			accepted++
		}
		require.Equal(t, accepted, a.store.publishedTotals().accepted)
	}
	for name, body := range map[string]string{
		"nothing": "", "only space": " \n", "cut short": exampleOrder[:len(exampleOrder)-1],
		"two values": exampleOrder + exampleOrder, "something behind it": exampleOrder + "x",
		"an array": "[" + exampleOrder + "]", "a string": `"order"`, "a number": "1", "null": "null",
		"a comma too many":                 `{"user_id": "u", "item_ids": "i", "total_amount": 1,}`,
		"a number that JSON does not have": orderBody(`"u"`, `"i"`, "01"),
		"not a number":                     orderBody(`"u"`, `"i"`, "NaN"),
		"a bare control character":         orderBody("\"u\n\"", `"i"`, "1"),
		"an escape cut short":              orderBody(`"\u12"`, `"i"`, "1"),
		"a byte order mark":                "\ufeff" + exampleOrder,
		"invalid UTF-8":                    orderBody("\"u\xff\"", `"i"`, "1"),
		"a surrogate in UTF-8":             orderBody("\"u\xed\xa0\x80\"", `"i"`, "1"),
		"nested too deep":                  orderBody(strings.Repeat("[", 20_000)+strings.Repeat("]", 20_000), `"i"`, "1"),
	} {
		t.Run(name+" is no order", func(t *testing.T) { requireStatus(t, http.StatusBadRequest, asJSON, body) })
	}
	for size, status := range map[int]int{64 << 10: 201, 64<<10 + 1: 413, 2 << 20: 413} {
		t.Run(fmt.Sprintf("of %d bytes", size), func(t *testing.T) {
			requireStatus(t, status, asJSON, exampleOrder+strings.Repeat(" ", size-len(exampleOrder)))
		})
	}
	for contentType, status := range map[string]int{
		"application/json; charset=utf-8": 201, "Application/JSON;charset=UTF-8": 201,
		"application/merge-patch+json": 415, "application/x-www-form-urlencoded": 415,
		"text/plain": 415, "application/json; =": 415,
	} {
		t.Run("as "+contentType, func(t *testing.T) {
			requireStatus(t, status, http.Header{"Content-Type": {contentType}}, exampleOrder)
		})
	}
	t.Run("without a content type", func(t *testing.T) {
		requireStatus(t, http.StatusUnsupportedMediaType, http.Header{}, exampleOrder)
	})
	t.Run("a connection that ends within the body", func(t *testing.T) {
		conn, answers := dialed(t, a, "POST /orders HTTP/1.1\r\nHost: localhost\r\n"+
			"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"+exampleOrder)
		require.NoError(t, conn.(*net.TCPConn).CloseWrite())
		response, err := http.ReadResponse(answers, nil)
		require.NoError(t, err)
		text, err := io.ReadAll(response.Body)
		requireGood(t, http.MethodPost, "/orders", answer{response.StatusCode, response.Header, string(text), err})
		require.Equal(t, http.StatusBadRequest, response.StatusCode)
	})
}

func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	create := func(t *testing.T, header http.Header, body string) answer {
		t.Helper()
		return call(t, a, http.MethodPost, "/orders", header, body)
	}
	requireReplay := func(t *testing.T, first, second answer) {
		t.Helper()
		require.Equal(t, []int{http.StatusCreated, http.StatusCreated}, []int{first.status, second.status})
		require.Equal(t, []string{"", "true"}, []string{first.header.Get("Idempotent-Replayed"), second.header.Get("Idempotent-Replayed")})
		require.Equal(t, first.body, second.body)
		require.Equal(t, first.header.Get("Location"), second.header.Get("Location"))
	}
	order := orderBody(`"u"`, `"i,j"`, "99.99")
	k255, k256 := strings.Repeat("k", 255), strings.Repeat("k", 256)
	for _, test := range []struct{ name, first, second, body string }{
		{"the same request again", "again", "again", order},
		{"the same in other words", "w", "w", `{"total_amount": 9.9990e1, "item_ids": " i , j", "user_id": " \u0075 "}`},
		{"a key quoted and bare", `"quoted"`, "quoted", order},
		{"a key with escapes", `"a\"b\\c"`, `a"b\c`, order},
		{"a key of 1 character", "k", `"k"`, order},
		{"a key of 255 characters", k255, `"` + k255 + `"`, order},
	} {
		t.Run(test.name, func(t *testing.T) {
			requireReplay(t, create(t, keyed(test.first), order), create(t, keyed(test.second), test.body))
		})
	}
	for name, body := range map[string]string{
		"another user":   orderBody(`"v"`, `"i,j"`, "99.99"),
		"other items":    orderBody(`"u"`, `"j,i"`, "99.99"),
		"another amount": orderBody(`"u"`, `"i,j"`, "99.98"),
	} {
		t.Run(name+" under a used key", func(t *testing.T) {
			first := create(t, keyed(name), order)
			got := create(t, keyed(name), body)
			require.Equal(t, http.StatusUnprocessableEntity, got.status)
			require.Empty(t, got.header.Get("Location"))
			require.Empty(t, details(t, got.body))
			requireReplay(t, first, create(t, keyed(name), order))
		})
	}
	for name, keys := range map[string][]string{
		"an empty key": {""}, "an empty quoted key": {`""`},
		"a key of 256 characters": {k256}, "a quoted key of 256 characters": {`"` + k256 + `"`},
		"a quote only": {`"`}, "a quote that does not end": {`"k`},
		"a quote that ends with an escape": {`"k\"`}, "a quote within the quotes": {`"k"k"`},
		"an escape of another character": {`"k\k"`}, "a key outside ASCII": {"ké"},
		"a key with a tab": {"k\tk"}, "two keys": {"k", "k"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			accepted := a.store.publishedTotals().accepted
			require.Equal(t, http.StatusBadRequest, create(t, keyed(keys...), order).status)
			require.Equal(t, accepted, a.store.publishedTotals().accepted)
		})
	}
	t.Run("a refused order leaves the key free", func(t *testing.T) {
		require.Equal(t, http.StatusUnprocessableEntity, create(t, keyed("free"), `{}`).status)
		require.Equal(t, http.StatusBadRequest, create(t, keyed("free"), ``).status)
		requireReplay(t, create(t, keyed("free"), order), create(t, keyed("free"), order))
	})
	t.Run("20 at once create one order", func(t *testing.T) {
		before := a.store.publishedTotals().accepted
		answers := make(chan answer)
		for range 20 {
			go func() {
				answers <- send(context.Background(), a.listener.Addr().String(), http.MethodPost, "/orders", keyed("race"), order)
			}()
		}
		bodies, replayed := map[string]bool{}, 0
		for range 20 {
			got := <-answers
			requireGood(t, http.MethodPost, "/orders", got)
			require.Equal(t, http.StatusCreated, got.status)
			bodies[got.body] = true
			if got.header.Get("Idempotent-Replayed") == "true" {
				replayed++
			}
		}
		require.Len(t, bodies, 1)
		require.Equal(t, 19, replayed)
		require.Equal(t, before+1, a.store.publishedTotals().accepted)
	})
	t.Run("every key is kept once", func(t *testing.T) {
		var keys, orders int64
		db := openOrders(t, a)
		defer db.Close()
		require.NoError(t, db.QueryRow("SELECT count(DISTINCT key), count(*) FROM orders").Scan(&keys, &orders))
		require.Equal(t, orders, keys)
		require.Equal(t, orders, a.store.publishedTotals().accepted)
	})
}

func TestGetOrder(t *testing.T) {
	t.Parallel()
	a, release, _ := heldApp(t, func(c *config) { c.pool.workers, c.store.cache = 1, 2 })
	first, second, third := place(t, a, "u", "held"), place(t, a, "u", "held"), place(t, a, "u", "i")
	until(t, func() bool { return a.store.publishedTotals().processing == 1 })
	for _, cached := range []string{"in memory or on disk", "after the first was read from disk"} {
		for id, status := range map[string]string{first: "Processing", second: "Pending", third: "Pending"} {
			t.Run(status+" "+cached, func(t *testing.T) {
				got := get(t, a, "/orders/"+id)
				require.Equal(t, http.StatusOK, got.status)
				require.Equal(t, map[string]string{"order_id": id, "status": status}, decoded[map[string]string](t, got.body))
				require.Equal(t, "application/json", got.header.Get("Content-Type"))
				require.Equal(t, "no-store", got.header.Get("Cache-Control"))
			})
		}
	}
	release()
	until(t, func() bool { return a.store.publishedTotals().completed == 3 })
	for _, id := range []string{first, second, third} {
		require.Equal(t, "Completed", statusOf(t, a, id))
	}
	whole := string(decoded[struct{ Orders []json.RawMessage }](t, get(t, a, "/orders?limit=1").body).Orders[0]) + "\n"
	brief := `{"order_id":"` + third + `","status":"Completed"}` + "\n"
	for want, queries := range map[string][]string{
		whole: {"?view=full", "?a=b&view=full&c", "?%76iew=f%75ll"},
		brief: {"?", "?a=b&limit=0&VIEW=full&view[]=full&%zz=1&c=%zz;view=full"},
	} {
		for _, query := range queries {
			t.Run("the view in "+query, func(t *testing.T) {
				got := get(t, a, "/orders/"+third+query)
				require.Equal(t, http.StatusOK, got.status)
				require.Equal(t, want, got.body, "the whole order as the list holds it, to the byte")
				require.Equal(t, "application/json", got.header.Get("Content-Type"))
				require.Equal(t, "no-store", got.header.Get("Cache-Control"))
			})
		}
	}
	for _, query := range []string{
		"?view=", "?view", "?view=Full", "?view=full+", "?view=status", "?view=%zz", "?view=full;a",
		"?view=full&view=full", "?view=full&view=",
	} {
		t.Run("the view in "+query+" is refused", func(t *testing.T) {
			require.Equal(t, http.StatusBadRequest, get(t, a, "/orders/"+third+query).status)
		})
	}
	t.Run("lower case finds it and is answered in capitals", func(t *testing.T) {
		got := get(t, a, "/orders/"+strings.ToLower(third))
		require.Equal(t, http.StatusOK, got.status)
		require.Equal(t, third, decoded[map[string]string](t, got.body)["order_id"])
	})
	other := ulid.MustParse(first)
	other[15]++ // the same primary key
	for name, id := range map[string]string{
		"an ID of nothing":                      "01ARZ3NDEKTSV4RRFFQ69G5FAV",
		"the largest ID":                        "7ZZZZZZZZZZZZZZZZZZZZZZZZZ",
		"an ID that differs in its random half": other.String(),
		"an ID too short":                       first[:25],
		"an ID too long":                        first + "0",
		"an ID too large":                       "8" + first[1:],
		"a letter that ULIDs do not have":       first[:25] + "U",
		"a number":                              "1",
		"an escaped slash":                      "a%2Fb",
		"no ASCII":                              "%C3%A9" + first[2:],
	} {
		t.Run(name+" is not found", func(t *testing.T) {
			require.Equal(t, http.StatusNotFound, get(t, a, "/orders/"+id).status)
			require.Equal(t, http.StatusNotFound, get(t, a, "/orders/"+id+"?view=full").status)
			waited := call(t, a, http.MethodGet, "/orders/"+id, prefer("wait=60"), "")
			require.Equal(t, http.StatusNotFound, waited.status)
			require.Empty(t, waited.header.Get("Preference-Applied"))
		})
	}
	require.Zero(t, watchers(a))
}

// waiting is how many requests wait for an order.
func waiting(a *app) (n int) {
	a.store.cache.mu.RLock()
	defer a.store.cache.mu.RUnlock()
	for _, w := range a.store.cache.watchers {
		n += w.waiting
	}
	return n
}

func watchers(a *app) int {
	a.store.cache.mu.RLock()
	defer a.store.cache.mu.RUnlock()
	return len(a.store.cache.watchers)
}

// later asks for an order in the background.
func later(ctx context.Context, a *app, id string, wait string) <-chan answer {
	answers := make(chan answer, 1)
	go func() {
		answers <- send(ctx, a.listener.Addr().String(), http.MethodGet, "/orders/"+id, prefer("wait="+wait), "")
	}()
	return answers
}

// arrived is the answer that later promised.
func arrived(t *testing.T, answers <-chan answer) answer {
	t.Helper()
	select {
	case got := <-answers:
		requireGood(t, http.MethodGet, "/orders/x", got)
		return got
	case <-time.After(*patience):
		require.Fail(t, "no answer")
		return answer{}
	}
}

func TestWait(t *testing.T) {
	t.Parallel()
	t.Run("ends with its client, or with the order for all who wait", func(t *testing.T) {
		t.Parallel()
		a, release, _ := heldApp(t, nil)
		id := place(t, a, "u", "held")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		left := later(ctx, a, id, "60")
		until(t, func() bool { return waiting(a) == 1 })
		cancel()
		require.ErrorIs(t, (<-left).err, context.Canceled)
		until(t, func() bool { return watchers(a) == 0 })

		require.Equal(t, http.StatusBadRequest, arrived(t, later(t.Context(), a, id+"?view=x", "60")).status, "at once")
		whole := later(t.Context(), a, id+"?view=full", "60")
		var answers [50]<-chan answer
		for i := range answers {
			answers[i] = later(t.Context(), a, id, "50")
		}
		until(t, func() bool { return waiting(a) == len(answers)+1 })
		require.Equal(t, 1, watchers(a))
		release()
		for _, ch := range answers {
			got := arrived(t, ch)
			require.JSONEq(t, `{"order_id": "`+id+`", "status": "Completed"}`, got.body)
			require.Equal(t, "wait=50", got.header.Get("Preference-Applied"))
			require.Equal(t, "no-store", got.header.Get("Cache-Control"))
		}
		got := arrived(t, whole)
		require.Equal(t, "wait=60", got.header.Get("Preference-Applied"))
		require.Equal(t, list(t, a, "?limit=1").Orders[0], decoded[orderDocument](t, got.body))
		require.Equal(t, "Completed", decoded[orderDocument](t, got.body).Status)
		require.Zero(t, watchers(a))
	})
	t.Run("ends with its time", func(t *testing.T) {
		t.Parallel()
		a := lookedAt(t, t.TempDir(), func(c *config) { c.drain = 0 }, func(a *app) { a.pool.work = hold(nil) })
		require.NoError(t, a.start())
		a.server.http.ReadTimeout = 50 * time.Millisecond // shorter than the wait
		serveTestApp(t, a)
		id := place(t, a, "u", "held")
		until(t, func() bool { return a.store.publishedTotals().processing == 1 })
		for _, wait := range []int{0, 1} {
			began := time.Now()
			got := call(t, a, http.MethodGet, "/orders/"+id, prefer(fmt.Sprintf("wait=%d", wait)), "")
			require.GreaterOrEqual(t, time.Since(began), time.Duration(wait)*time.Second)
			require.Equal(t, "Processing", decoded[map[string]string](t, got.body)["status"])
			require.Equal(t, fmt.Sprintf("wait=%d", wait), got.header.Get("Preference-Applied"))
			require.Zero(t, watchers(a))
		}
	})
}

func TestAnswersWhileItWaitsForRunningWork(t *testing.T) {
	t.Parallel()
	a, release, stop := heldApp(t, nil)
	id := place(t, a, "u", "held")
	until(t, func() bool { return statusOf(t, a, id) == "Processing" })
	require.Equal(t, http.StatusOK, get(t, a, "/readyz").status)
	early := later(t.Context(), a, id, "60")
	until(t, func() bool { return waiting(a) == 1 })
	go stop()
	require.Equal(t, "Processing", decoded[map[string]string](t, arrived(t, early).body)["status"])
	until(t, func() bool { return get(t, a, "/readyz").status == http.StatusServiceUnavailable }, "readyz says no")
	require.Contains(t, get(t, a, "/readyz").body, "The server is stopping")
	require.Zero(t, metric(t, base(a), "orderd_ready"))
	require.Equal(t, "Processing", statusOf(t, a, id))
	late := place(t, a, "u", "x")
	got := arrived(t, later(t.Context(), a, id, "60"))
	require.Equal(t, "Processing", decoded[map[string]string](t, got.body)["status"])
	require.Empty(t, got.header.Get("Preference-Applied"), "no wait is applied any more")
	release()
	stop()
	for id, want := range map[string]status{id: completed, late: pending} {
		st, ok := a.store.cache.get(ulid.MustParse(id))
		require.True(t, ok)
		require.Equal(t, want, st)
	}
}

func TestPreferHeader(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	id := place(t, a, "u", "i")
	require.Equal(t, "Completed", decoded[map[string]string](t, arrived(t, later(t.Context(), a, id, "60")).body)["status"])
	for applied, headers := range map[string][][]string{
		"wait=0": {{"wait=0"}},
		"wait=3": {{"wait=3, wait=9", "wait=10"}},
		"wait=5": {{"wait=5"}, {"WAIT=5"}, {`wait="5"`}, {" wait = 5 "}, {"wait=5; foo=bar"}, {`foo="x, wait=3", wait=5`},
			{"respond-async, wait=5,handling=lenient"}, {"respond-async", "wait=5"}},
		"wait=60": {{"wait=60"}, {"wait=61"}, {"wait=99999999999999999999999"}},
		"": {nil, {"respond-async"}, {"waits=5"}, {"wait"}, {"wait="}, {"wait=-1"}, {"wait=1.5"}, {"wait=soon"}, {`wait="5`},
			{`foo="x, wait=3", bar`}, {`foo="\", wait=3"`}},
	} {
		for _, values := range headers {
			t.Run(fmt.Sprintf("of %q %q is applied", values, applied), func(t *testing.T) {
				got := call(t, a, http.MethodGet, "/orders/"+id, prefer(values...), "")
				require.Equal(t, http.StatusOK, got.status)
				require.Equal(t, applied, got.header.Get("Preference-Applied"))
			})
		}
	}
}

type shownPage struct {
	Orders []orderDocument
	Next   *string
}

func list(t *testing.T, a *app, query string) shownPage {
	t.Helper()
	got := get(t, a, "/orders"+query)
	require.Equal(t, http.StatusOK, got.status, got.body)
	require.Equal(t, "no-store", got.header.Get("Cache-Control"))
	return decoded[shownPage](t, got.body)
}

// mixedOrders leaves orders of two users in every status, unevenly, and returns their IDs, newest first.
func mixedOrders(t *testing.T, a *app) (ids []string) {
	t.Helper()
	for i, itemIDs := range strings.Fields("c c c held c c c c c held c c held c c held c c c") {
		ids = append(ids, place(t, a, []string{"ann", "bob", "ann"}[i%3], itemIDs))
	}
	until(t, func() bool { t := a.store.publishedTotals(); return t.processing == 3 && t.completed == 10 }, "3 workers are held")
	slices.Reverse(ids)
	return ids
}

func TestListOrders(t *testing.T) {
	t.Parallel()
	a, _, _ := heldApp(t, func(c *config) { c.pool.workers = 3 })
	require.Equal(t, "{\"orders\":[],\"next\":null}\n", get(t, a, "/orders").body)
	ids := mixedOrders(t, a)
	all := list(t, a, "?limit=1000")
	require.Nil(t, all.Next)
	require.Len(t, all.Orders, len(ids))
	for i, o := range all.Orders {
		require.Equal(t, ids[i], o.OrderID, "newest first")
		require.Equal(t, statusOf(t, a, o.OrderID), o.Status)
		require.Equal(t, o.Status != "Pending", o.StartedAt != nil, o)
		require.Equal(t, o.Status == "Completed", o.CompletedAt != nil, o)
		times := o.CreatedAt
		for _, at := range []*string{o.StartedAt, o.CompletedAt} {
			if at != nil {
				require.GreaterOrEqual(t, *at, times[len(times)-24:])
				times += *at
			}
		}
		require.Regexp(t, `^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z){1,3}$`, times)
		require.Equal(t, ulid.Time(ulid.MustParse(o.OrderID).Time()).UTC().Format("2006-01-02T15:04:05.000Z"), o.CreatedAt)
	}
	t.Run("a cursor behind every order hides none", func(t *testing.T) {
		require.Equal(t, all, list(t, a, "?limit=1000&before=7ZZZZZZZZZZZZZZZZZZZZZZZZZ"))
	})
	t.Run("every order has exactly its fields", func(t *testing.T) {
		body := decoded[struct{ Orders []map[string]any }](t, get(t, a, "/orders?limit=1").body)
		names := strings.Fields("order_id user_id item_ids total_amount status created_at started_at completed_at")
		require.ElementsMatch(t, names, slices.Collect(maps.Keys(body.Orders[0])))
	})
	for _, query := range []string{
		"limit=0", "limit=1001", "limit=-1", "limit=1.5", "limit=all", "limit=05", "limit=%2B5", "limit=", "limit=1&limit=1",
		"user_id=", "user_id=%20", "user_id=u%00", "user_id=u%ff", "user_id=%zz", "user_id=" + strings.Repeat("u", 129),
		"status=pending", "status=1", "status=", "before=1", "before=", "offset=1", "Limit=1", "=1", "limit=1;status=Pending",
	} {
		t.Run(query+" is refused", func(t *testing.T) {
			require.Equal(t, http.StatusBadRequest, get(t, a, "/orders?"+query).status)
		})
	}
}

func TestListPages(t *testing.T) {
	t.Parallel()
	instant := time.Now()
	a, release, _ := heldApp(t, func(c *config) {
		c.pool.workers = 3
		c.store.now = func() time.Time { return instant } // the IDs follow one another closely
	})
	mixedOrders(t, a)
	for _, status := range []string{"", "Pending", "Processing", "Completed"} {
		for _, userID := range []string{"", "ann", "bob", "nobody"} {
			for _, limit := range []int{1, 2, 5} {
				t.Run(fmt.Sprintf("of %d %s orders of %s", limit, cmp.Or(status, "all"), cmp.Or(userID, "everyone")), func(t *testing.T) {
					var want, got []orderDocument
					for _, o := range list(t, a, "?limit=1000").Orders {
						if (status == "" || o.Status == status) && (userID == "" || o.UserID == userID) {
							want = append(want, o)
						}
					}
					query, pages := fmt.Sprint("?limit=", limit), 0
					if status != "" {
						query += "&status=" + status
					}
					if userID != "" {
						query += "&user_id=" + userID
					}
					for next := &query; next != nil; pages++ {
						page := list(t, a, strings.TrimPrefix(*next, "/orders"))
						if pages == 0 {
							place(t, a, "ann", "c") // between two pages; all workers are held
						}
						require.True(t, page.Next == nil || len(page.Orders) == limit)
						got, next = append(got, page.Orders...), page.Next
					}
					require.Equal(t, want, got)
					require.Equal(t, max(1, (len(want)+limit-1)/limit), pages)
				})
			}
		}
	}
	t.Run("of all orders once they are Completed", func(t *testing.T) {
		release()
		until(t, func() bool { t := a.store.publishedTotals(); return t.completed == t.accepted })
		all := list(t, a, "?limit=1000")
		require.EqualValues(t, a.store.publishedTotals().accepted, len(all.Orders))
		require.Equal(t, all, list(t, a, "?limit=1000&status=Completed"))
		require.Empty(t, list(t, a, "?status=Pending").Orders)
		require.Empty(t, list(t, a, "?status=Processing").Orders)
	})
}

func TestListPagesEndAfterSoManyBytes(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	creates := largest(100)
	for i, c := range creates {
		c.userID = []string{"ann", "bob"}[i%2]
	}
	commitTogether(t, a.store, creates)
	slices.Reverse(creates)
	for _, user := range []string{"", "&user_id=ann"} {
		var want, got []string
		for _, c := range creates {
			if user == "" || c.userID == "ann" {
				want = append(want, c.id.String())
			}
		}
		for next := new("?limit=1000" + user); next != nil; {
			page := list(t, a, strings.TrimPrefix(*next, "/orders"))
			require.LessOrEqual(t, len(page.Orders), 17, "256 KB and one order")
			for _, o := range page.Orders {
				got = append(got, o.OrderID)
			}
			next = page.Next
		}
		require.Equal(t, want, got)
	}
}

func TestListPlans(t *testing.T) {
	t.Parallel()
	a, _ := openIdle(t, t.TempDir(), nil, nil)
	commitTogether(t, a.store, sampleOrders(1)) // it stays Pending
	var got [][]string
	recordLists(t, a, func(query string, args []any) {
		if strings.HasPrefix(query, "SELECT "+orderColumns) {
			got = append(got, queryPlan(t, onSQLite(t, a).rowReaders.DB, query, args...))
		}
	})
	const (
		table  = "SEARCH orders USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"
		byWork = "SEARCH orders USING INDEX orders_unfinished (status=? AND rowid<?)"
	)
	runs := []string{
		"SEARCH user_runs USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)",
		"SEARCH orders_by_user USING PRIMARY KEY (run=? AND user=? AND id_high>? AND id_high<?)",
		"SEARCH orders USING INTEGER PRIMARY KEY (rowid=?)",
	}
	for _, test := range []struct {
		name   string
		filter filter
		want   [][]string // how each of the queries finds its orders
	}{
		{"all", filter{}, [][]string{{table}}},
		{"Pending", filter{status: new(pending)}, [][]string{{table}}},
		{"Processing", filter{status: new(processing)}, [][]string{{byWork}}},
		{"Completed", filter{status: new(completed)}, [][]string{{table}}},
		{"of a user", filter{userID: "u"}, [][]string{{table}, runs}},
		{"Pending of a user", filter{userID: "u", status: new(pending)}, [][]string{{table}, runs}},
		{"Processing of a user", filter{userID: "u", status: new(processing)}, [][]string{{byWork}}},
		{"Completed of a user", filter{userID: "u", status: new(completed)}, [][]string{{table}, runs}},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.filter.before, test.filter.limit = math.MaxInt64, 50
			got = nil
			_, err := a.store.list(test.filter)
			require.NoError(t, err)
			require.Equal(t, test.want, got)
		})
	}
}

// recordLists has see called with each query of a list before it runs, until restore.
func recordLists(tb testing.TB, a *app, see func(query string, args []any)) (restore func()) {
	tb.Helper()
	plain := onSQLite(tb, a).listReaders.DB
	recorded := sql.OpenDB(recorder{path: onSQLite(tb, a).file.path, driver: plain.Driver(), see: see})
	onSQLite(tb, a).listReaders.DB = recorded
	restore = sync.OnceFunc(func() {
		onSQLite(tb, a).listReaders.DB = plain
		require.NoError(tb, recorded.Close())
	})
	tb.Cleanup(restore)
	return restore
}

// recorder opens connections to a database that tell of their queries.
type recorder struct {
	path   string
	driver driver.Driver
	see    func(query string, args []any)
}

func (r recorder) Connect(context.Context) (driver.Conn, error) {
	conn, err := r.driver.Open(r.path)
	return recordedConn{conn, r.see}, err
}

func (r recorder) Driver() driver.Driver { return r.driver }

type recordedConn struct {
	driver.Conn
	see func(query string, args []any)
}

func (c recordedConn) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	return c.Conn.(driver.ConnBeginTx).BeginTx(ctx, o)
}

func (c recordedConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	var named []any
	for _, a := range args {
		named = append(named, sql.Named(a.Name, a.Value))
	}
	c.see(query, named)
	return c.Conn.(driver.QueryerContext).QueryContext(ctx, query, args)
}

// queryPlan is how SQLite says that it will run a query, without what it does once.
func queryPlan(tb testing.TB, db *sql.DB, query string, args ...any) (plan []string) {
	tb.Helper()
	rows, err := db.Query("EXPLAIN QUERY PLAN "+query, args...)
	require.NoError(tb, err)
	defer rows.Close()
	for rows.Next() {
		var id, parent, unused int
		var detail string
		require.NoError(tb, rows.Scan(&id, &parent, &unused, &detail))
		plan = append(plan, detail)
	}
	require.NoError(tb, rows.Err())
	return plan
}

func TestMetricsJSON(t *testing.T) {
	t.Parallel()
	a, release, _ := heldApp(t, func(c *config) { c.pool.workers = 1 })
	require.Equal(t, `{"total_orders_processed":0,"average_processing_time":0,"orders_pending":0,"orders_processing":0,"orders_completed":0}`+"\n",
		get(t, a, "/metrics").body)
	for _, itemIDs := range []string{"c", "held", "c", "c"} {
		place(t, a, "u", itemIDs)
	}
	average := func() float64 {
		var took int64
		db := openOrders(t, a)
		defer db.Close()
		require.NoError(t, db.QueryRow("SELECT sum(took) FROM orders WHERE status = 2").Scan(&took))
		return float64(took) / float64(a.store.publishedTotals().completed) / 1e6
	}
	requireSummary := func(pending, processing, completed float64) {
		t.Helper()
		until(t, func() bool {
			return counts(a).processing == int64(processing) && a.metrics.counted.Load().completed == int64(completed)
		})
		require.Equal(t, map[string]float64{"total_orders_processed": completed, "average_processing_time": average(),
			"orders_pending": pending, "orders_processing": processing, "orders_completed": completed},
			decoded[map[string]float64](t, get(t, a, "/metrics").body))
	}
	requireSummary(2, 1, 1)
	release()
	requireSummary(0, 0, 4)
	require.Positive(t, average(), "one was held")
}

func TestMetricsNegotiation(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	const text, asJSON = "text/plain; version=0.0.4; charset=utf-8", "application/json"
	for want, headers := range map[string][][]string{
		text: {{"text/plain"}, {"TEXT/Plain"}, {"text/*"}, {"application/json;q=0.5, text/plain;q=0.6"},
			{"application/json;q=0.5", "text/plain"}, {"application/json;q=0, */*;q=0.1"},
			{"application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4," +
				"text/plain;version=0.0.4;q=0.3,*/*;q=0.1"}}, // Prometheus
		asJSON: {nil, {"*/*"}, {"application/json"}, {"application/*"}, {"text/plain, application/json"},
			{"text/plain;q=0.5, application/json;q=0.6"}, {"text/plain;q=0, */*;q=0.1"},
			{"text/*;q=0.9, text/plain;q=0.1, application/json;q=0.5"}, // the specific range counts
			{"text/plain;version=1.0.0, */*;q=0.1"}, {"image/png"}, {";;,=,text"},
			{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}}, // a browser
	} {
		for _, accept := range headers {
			t.Run(fmt.Sprintf("of %q %s is chosen", accept, want), func(t *testing.T) {
				got := call(t, a, http.MethodGet, "/metrics", http.Header{"Accept": accept}, "")
				require.Equal(t, http.StatusOK, got.status)
				require.Equal(t, want, got.header.Get("Content-Type"))
				require.Equal(t, "no-store", got.header.Get("Cache-Control"))
				require.Contains(t, got.header.Values("Vary"), "Accept")
			})
		}
	}
}

// TestMetricsText has every figure differ from 0, and from others.
func TestMetricsText(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	t.Cleanup(func() { close(gate) })
	var back atomic.Int64 // that the clock goes
	a, _ := openTestApp(t, t.TempDir(), func(c *config) {
		c.pool.workers, c.pool.queue, c.store.cache, c.drain = 1, 2, 4, 0
		c.store.now = func() time.Time { return time.Now().Add(time.Duration(-back.Load())) }
	}, func(a *app) {
		a.pool.work = onOrders(a, func(ctx context.Context, o order) error {
			switch o.itemIDs {
			case "fails":
				return errors.New("no stock")
			case "held":
				return hold(gate)(ctx, o.id, 1)
			}
			return nil
		})
	})
	oldest := place(t, a, "u", "c")
	place(t, a, "u", "c")
	place(t, a, "u", "c")
	awaitRest(t, a, 0, 3)
	place(t, a, "u", "held")
	awaitRest(t, a, 1, 3)
	gate <- struct{}{} // work on it took a while
	awaitRest(t, a, 0, 4)
	place(t, a, "u", "fails")
	until(t, func() bool { return a.pool.parked.len() == 1 })
	place(t, a, "u", "held") // so that no worker tries the other again
	until(t, func() bool { return counts(a).processing == 2 && a.pool.active.Load() == 1 && a.pool.parked.len() == 1 })
	var newest string
	for range 5 {
		newest = place(t, a, "u", "c")
	}
	until(t, func() bool { return len(a.pool.channel) == 2 })
	post(t, a, `{}`)
	get(t, a, "/nowhere")
	for _, id := range []string{newest, newest, oldest} {
		statusOf(t, a, id)
	}
	call(t, a, http.MethodGet, "/orders/"+oldest, prefer("wait=0"), "")
	a.log.dropped.Add(7)
	back.Store(int64(time.Hour))

	text := call(t, a, http.MethodGet, "/metrics", http.Header{"Accept": {"text/plain"}}, "").body
	kinds, family := map[string]string{}, ""
	line := regexp.MustCompile(`^(?:# HELP (\S+) \S.*|# TYPE (\S+) (counter|gauge|histogram)|([a-z_]+)(\{(?:[a-z]+="[^"\\]*",?)+\})? (\S+))$`)
	for shown := range strings.Lines(text) {
		m := line.FindStringSubmatch(strings.TrimSuffix(shown, "\n"))
		switch {
		case m == nil:
			require.Fail(t, "this is no line of the format", shown)
		case m[1] != "":
			require.NotContains(t, kinds, m[1], "a metric is described once")
			family = m[1]
		case m[2] != "":
			require.Equal(t, family, m[2], "HELP comes before TYPE")
			kinds[family] = m[3]
		case kinds[family] == "histogram":
			require.Contains(t, []string{family + "_bucket", family + "_sum", family + "_count"}, m[4])
		default:
			require.Equal(t, family, m[4], "a sample follows its TYPE")
		}
	}
	maps.DeleteFunc(kinds, func(name, _ string) bool { return !strings.HasPrefix(name, "orderd_") }) // see TestProcessFigures
	if a.replica != nil {
		kinds["orderd_wal_bytes"] = "gauge"
		for _, g := range a.replica.gauges() {
			require.Equal(t, "gauge", kinds[g.name])
			delete(kinds, g.name)
		}
	}
	require.Equal(t, map[string]string{
		"orderd_orders_processed_total": "counter", "orderd_orders_removed_total": "counter", "orderd_ready": "gauge", "orderd_orders_accepted_total": "counter",
		"orderd_orders": "gauge", "orderd_processing_seconds": "histogram", "orderd_oldest_pending_seconds": "gauge",
		"orderd_queue_length": "gauge", "orderd_queue_capacity": "gauge", "orderd_orders_parked": "gauge", "orderd_attempts_failed_total": "counter",
		"orderd_cache_entries": "gauge", "orderd_cache_hits_total": "counter", "orderd_cache_misses_total": "counter",
		"orderd_create_seconds": "histogram", "orderd_read_seconds": "histogram", "orderd_http_requests_total": "counter",
		"orderd_commit_operations": "histogram", "orderd_commit_seconds": "histogram", "orderd_wal_bytes": "gauge",
		"orderd_clock_behind_seconds": "gauge", "orderd_log_lines_dropped_total": "counter", "orderd_build_info": "gauge",
	}, kinds)
	found := samples(t, base(a))
	for name, want := range map[string]float64{
		"orderd_orders_accepted_total": 11, "orderd_orders_processed_total": 4, "orderd_processing_seconds_count": 4,
		`orderd_orders{status="Pending"}`: 5, `orderd_orders{status="Processing"}`: 2, `orderd_orders{status="Completed"}`: 4,
		"orderd_ready": 1, "orderd_queue_length": 2, "orderd_queue_capacity": 2, "orderd_orders_parked": 1,
		"orderd_cache_entries": 4, "orderd_cache_hits_total": 4, "orderd_cache_misses_total": 1, // waiting asks twice
		"orderd_create_seconds_count": 12, "orderd_read_seconds_count": 3, "orderd_log_lines_dropped_total": 7,
		"orderd_attempts_failed_total":                                           float64(a.pool.failed.Load()),
		`orderd_http_requests_total{method="POST",route="/orders",status="201"}`: 11,
		`orderd_http_requests_total{method="POST",route="/orders",status="422"}`: 1,
		`orderd_http_requests_total{method="other",route="other",status="404"}`:  1,
	} {
		require.Equal(t, want, found[name], name)
	}
	require.Positive(t, found["orderd_attempts_failed_total"])
	require.InDelta(t, 3600, found["orderd_clock_behind_seconds"], 60)
	for _, name := range []string{"orderd_oldest_pending_seconds", "orderd_processing_seconds_sum"} {
		require.Positive(t, found[name], name)
		require.Less(t, found[name], 60.0, name)
	}
	require.GreaterOrEqual(t, found["orderd_commit_operations_sum"], 11.0+6)
	require.Positive(t, found["orderd_commit_seconds_sum"])
	if a.sqlite != nil {
		info, err := os.Stat(a.sqlite.file.path + "-wal")
		require.NoError(t, err)
		require.Equal(t, float64(info.Size()), found["orderd_wal_bytes"])
	}
}

// everyRoute answers with success; ID stands for that of an order.
var everyRoute = []struct {
	method, path, body string
	status             int
	contentType        string
	open               bool // to everyone: without a token, and from pages of other sites
	public             bool // without a token only
}{
	{method: "GET", path: "/", status: 200, contentType: "text/html; charset=UTF-8", open: true},
	{method: "GET", path: "/openapi.json", status: 200, contentType: "application/json", public: true},
	{method: "POST", path: "/orders", body: exampleOrder, status: 201, contentType: "application/json"},
	{method: "GET", path: "/orders", status: 200, contentType: "application/json"},
	{method: "GET", path: "/orders/ID", status: 200, contentType: "application/json"},
	{method: "GET", path: "/metrics", status: 200, contentType: "application/json"},
	{method: "GET", path: "/livez", status: 200, contentType: "text/plain; charset=UTF-8", open: true},
	{method: "GET", path: "/healthz", status: 200, contentType: "text/plain; charset=UTF-8", open: true},
	{method: "GET", path: "/readyz", status: 200, contentType: "text/plain; charset=UTF-8", open: true},
}

func TestRoutes(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	id := place(t, a, "u", "i")
	allowed := map[string]string{"/orders": "GET, HEAD, OPTIONS, POST"}
	for _, r := range everyRoute {
		path := strings.Replace(r.path, "ID", id, 1)
		t.Run(r.method+" "+r.path+" succeeds", func(t *testing.T) {
			got := call(t, a, r.method, path, asJSON, r.body)
			require.Equal(t, r.status, got.status)
			require.Equal(t, r.contentType, got.header.Get("Content-Type"))
			require.NotEmpty(t, got.body)
		})
		t.Run("HEAD "+r.path+" answers GET's header", func(t *testing.T) {
			until(t, func() bool { return a.metrics.counted.Load().completed == a.store.publishedTotals().accepted }, "nothing changes in between")
			want, got := get(t, a, path), call(t, a, http.MethodHead, path, nil, "")
			require.Equal(t, want.status, got.status)
			require.Empty(t, got.body)
			for _, name := range []string{"Content-Type", "Content-Length", "Cache-Control"} {
				require.Equal(t, want.header.Get(name), got.header.Get(name), name)
			}
		})
		for _, method := range []string{"PUT", "PATCH", "DELETE", "OPTIONS", "BREW"} {
			t.Run(method+" "+r.path+" is told what is allowed", func(t *testing.T) {
				got := call(t, a, method, path, http.Header{"Origin": {"https://example.com"}, "Access-Control-Request-Method": {"POST"}}, "")
				require.Equal(t, map[bool]int{true: http.StatusNoContent, false: http.StatusMethodNotAllowed}[method == "OPTIONS"], got.status)
				methods := strings.Split(got.header.Get("Allow"), ", ")
				slices.Sort(methods)
				require.Equal(t, cmp.Or(allowed[r.path], "GET, HEAD, OPTIONS"), strings.Join(methods, ", "))
				for name := range got.header {
					require.False(t, strings.HasPrefix(name, "Access-Control-"), "no other origin may: %s", name)
				}
			})
		}
	}
	for _, path := range []string{"/nowhere", "/orders/", "/orders/" + id + "/items", "/Orders", "/metrics/", "/livez/x", "/.."} {
		t.Run(path+" is not found", func(t *testing.T) {
			require.Equal(t, http.StatusNotFound, get(t, a, path).status)
		})
	}
}

// makeCertificate writes a pair for orders.example.com and localhost, signed by itself, into dir.
func makeCertificate(t *testing.T, dir string) (certFile, keyFile, serial string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	require.NoError(t, err)
	text := x509.Certificate{SerialNumber: big.NewInt(rand.Int64()), DNSNames: []string{"orders.example.com", "localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	signed, err := x509.CreateCertificate(cryptorand.Reader, &text, &text, key.Public(), key)
	require.NoError(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	require.NoError(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: signed}), 0o600))
	require.NoError(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
	return certFile, keyFile, text.SerialNumber.String()
}

// clientOf trusts the certificate in a file, and takes every name for addr.
func clientOf(t *testing.T, certFile, addr string) *http.Client {
	t.Helper()
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM([]byte(bytesOf(t, certFile))))
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DialContext: dial, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func TestHTTPS(t *testing.T) {
	t.Parallel()
	dir, files, stderr := t.TempDir(), t.TempDir(), &transcript{}
	certFile, keyFile, serial := makeCertificate(t, files)
	a := lookedAt(t, dir, func(c *config) { c.certFile, c.keyFile = certFile, keyFile }, nil, stderr)
	require.NoError(t, a.start())
	stop := serveTestApp(t, a)
	addr := a.listener.Addr().String()
	require.Contains(t, stderr.String(), "orderd is open at https://"+addr+"\n")

	client := clientOf(t, certFile, addr)
	for _, path := range []string{"/", "/metrics"} {
		got := exchange(t.Context(), client, "https://localhost", http.MethodGet, path, nil, "")
		requireGood(t, http.MethodGet, path, got)
		require.Equal(t, http.StatusOK, got.status)
	}
	created := exchange(t.Context(), client, "https://localhost", http.MethodPost, "/orders", asJSON, exampleOrder)
	require.Equal(t, http.StatusCreated, created.status)
	require.Equal(t, http.StatusBadRequest, send(t.Context(), addr, http.MethodGet, "/livez", nil, "").status, "plain HTTP")

	// served is the serial number of the certificate that a new connection gets.
	served := func() string {
		conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true})
		require.NoError(t, err)
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	// wait lets the time pass until the files are looked at again.
	wait := func() {
		c := a.cfg.server.certificate
		c.mu.Lock()
		defer c.mu.Unlock()
		c.read = c.read.Add(-renewEvery)
	}
	require.Less(t, renewEvery, 10*time.Second)
	require.Equal(t, serial, served())
	_, _, renewed := makeCertificate(t, files)
	a.cfg.server.certificate.read = time.Now()
	require.Equal(t, serial, served(), "not looked at yet")
	wait()
	require.Equal(t, renewed, served())

	spoil := func(file, text string) {
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		for range 3 { // is logged once
			wait()
			require.Equal(t, renewed, served())
		}
	}
	good := bytesOf(t, keyFile)
	_, otherKey, _ := makeCertificate(t, t.TempDir())
	spoil(keyFile, "")
	spoil(keyFile, good)
	spoil(keyFile, "") // is logged again
	spoil(keyFile, bytesOf(t, otherKey))
	require.NoError(t, os.Remove(certFile))
	wait()
	require.Equal(t, renewed, served())
	_, _, last := makeCertificate(t, files)
	wait()
	require.Equal(t, last, served())
	stop()
	require.Len(t, logged(t, dir, "the certificate cannot be renewed; the one before stays in use"), 4)
}

// TestBehindNginx runs deploy/nginx.conf.
func TestBehindNginx(t *testing.T) {
	t.Parallel()
	needs(t, "nginx")
	gate := make(chan struct{})
	dir, files := t.TempDir(), t.TempDir()
	a, stop := openTestApp(t, dir, func(c *config) {
		c.server.token, c.server.readToken, c.server.proxyHosts, c.drain = "s3cret", "r3ad", []string{"orders.example.com"}, 0
	}, func(a *app) { a.pool.work = hold(gate) })
	release := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(release)
	certFile, keyFile, _ := makeCertificate(t, files)
	addr := fmt.Sprint("127.0.0.1:", freePort(t))

	text := bytesOf(t, "deploy/nginx.conf")
	require.Equal(t, 1, strings.Count(text, "127.0.0.1:8080"))
	server := fmt.Sprintf("server {\nserver_name orders.example.com;\nlisten %s ssl;\n"+
		"ssl_certificate %s;\nssl_certificate_key %s;\n%s\n}\n",
		addr, certFile, keyFile, strings.Replace(text, "127.0.0.1:8080", a.listener.Addr().String(), 1))
	around := "daemon off; pid nginx.pid;\nevents {}\nhttp {\naccess_log off;\n"
	if os.Geteuid() == 0 {
		around = "user root;\n" + around
	}
	for _, name := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		around += name + "_temp_path " + name + ";\n"
	}
	require.NoError(t, os.WriteFile(files+"/nginx.conf", []byte(around+server+"}\n"), 0o600))
	output := &transcript{}
	nginx := exec.CommandContext(t.Context(), "nginx", "-e", "stderr", "-p", files, "-c", files+"/nginx.conf")
	nginx.Stderr, nginx.WaitDelay = output, 5*time.Second
	nginx.Cancel = func() error { return nginx.Process.Signal(syscall.SIGTERM) }
	require.NoError(t, nginx.Start())
	t.Cleanup(func() { nginx.Wait() })
	until(t, func() bool {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}, output)

	client := clientOf(t, certFile, addr)
	const base, trace = "https://orders.example.com", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	ask := func(method, path, body string, names ...string) answer {
		header := http.Header{"Content-Type": {"application/json"}, "X-Forwarded-For": {"203.0.113.9"}, "Traceparent": {trace}}
		for i := 0; i < len(names); i += 2 {
			header.Set(names[i], names[i+1])
		}
		got := exchange(t.Context(), client, base, method, path, header, body)
		requireGood(t, method, path, got)
		return got
	}
	require.Equal(t, string(apiJSON), ask("GET", "/openapi.json", "").body)
	page := ask("GET", "/", "")
	require.Equal(t, string(pageHTML), page.body)
	require.Equal(t, pagePolicy, page.header.Get("Content-Security-Policy"))
	require.Equal(t, http.StatusUnauthorized, ask("POST", "/orders", exampleOrder).status)
	require.Equal(t, http.StatusForbidden, ask("POST", "/orders", exampleOrder, "Authorization", "Bearer r3ad").status)
	created := ask("POST", "/orders", exampleOrder, "Authorization", "Bearer s3cret", "Idempotency-Key", "k")
	require.Equal(t, http.StatusCreated, created.status)
	location := created.header.Get("Location")
	require.Regexp(t, `^/orders/\w{26}$`, location)
	require.Equal(t, "true", ask("POST", "/orders", exampleOrder, "Authorization", "Bearer s3cret", "Idempotency-Key", "k").header.Get("Idempotent-Replayed"))
	require.Equal(t, http.StatusRequestEntityTooLarge, ask("POST", "/orders", strings.Repeat(" ", maxBody+1), "Authorization", "Bearer s3cret").status)
	for _, path := range []string{location, location + "?view=full", "/orders?limit=1", "/%6frders", "/metrics"} {
		require.Equal(t, http.StatusOK, ask("GET", path, "", "Authorization", "Bearer r3ad").status, path)
	}
	require.Equal(t, http.StatusNotFound, ask("GET", "/nowhere", "", "Authorization", "Bearer r3ad").status)
	require.Equal(t, http.StatusMisdirectedRequest, ask("GET", "/livez", "", "Host", "localhost.example").status)

	seconds := 1
	if *long {
		seconds = 60
	}
	began := time.Now()
	got := ask("GET", location, "", "Authorization", "Bearer r3ad", "Prefer", fmt.Sprintf("wait=%d", seconds))
	require.GreaterOrEqual(t, time.Since(began), time.Duration(seconds)*time.Second)
	require.Equal(t, http.StatusOK, got.status, got.body)
	require.Equal(t, "Processing", decoded[map[string]string](t, got.body)["status"])

	waits := func(ctx context.Context) <-chan answer {
		answers := make(chan answer, 1)
		go func() {
			answers <- exchange(ctx, client, base, "GET", location, http.Header{"Authorization": {"Bearer r3ad"}, "Prefer": {"wait=60"}}, "")
		}()
		until(t, func() bool { return waiting(a) == 1 })
		return answers
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	left := waits(ctx)
	cancel()
	require.ErrorIs(t, (<-left).err, context.Canceled)
	until(t, func() bool { return watchers(a) == 0 }, "nginx hangs up for a client that has")
	answers := waits(t.Context())
	release()
	got = arrived(t, answers)
	require.Equal(t, "Completed", decoded[map[string]string](t, got.body)["status"])
	require.Equal(t, "wait=60", got.header.Get("Preference-Applied"))
	stop()
	for _, line := range logged(t, dir, "request") {
		require.Equal(t, "127.0.0.1", line["client"], "whom nginx saw, not what the client said, and not nginx")
		if line["path"] == "/" {
			require.Equal(t, trace, line["traceparent"])
		}
	}
}

func TestHost(t *testing.T) {
	t.Parallel()
	loopback := newTestApp(t, nil)
	named := newTestApp(t, func(c *config) { c.server.proxyHosts = []string{"orders.example", "example.com"} })
	anywhere := newTestApp(t, func(c *config) { c.addr, c.server.proxyHosts = "0.0.0.0:0", []string{"orders.example"} })
	id := place(t, loopback, "u", "i")
	own := []string{"localhost", "localhost:8080", "LOCALHOST", "127.0.0.1:1", "[::1]", "[::1]:8080"}
	given := []string{"orders.example", "example.com:8080", "Example.COM"} // as -host
	foreign := []string{"www.example.com", "localhost.example.com", "127.0.0.1.example.com", "192.0.2.1"}
	for _, host := range slices.Concat(own, given, foreign) {
		t.Run(host, func(t *testing.T) {
			ask := func(a *app, method, path, body string) int {
				return call(t, a, method, path, http.Header{"Host": {host}, "Content-Type": {"application/json"}}, body).status
			}
			for _, r := range everyRoute {
				want := r.status
				if !slices.Contains(own, host) {
					want = http.StatusMisdirectedRequest
				}
				require.Equal(t, want, ask(loopback, r.method, strings.Replace(r.path, "ID", id, 1), r.body), r.path)
			}
			require.Equal(t, !slices.Contains(foreign, host), ask(named, http.MethodGet, "/orders", "") == http.StatusOK)
			require.Equal(t, http.StatusOK, ask(anywhere, http.MethodGet, "/orders", ""))
		})
	}
}

// TestWithoutALeader asks a server that has nobody to pass requests on to, and then a
// leader that does not answer.
func TestWithoutALeader(t *testing.T) {
	t.Parallel()
	a, stop := openTestApp(t, t.TempDir(), nil, nil)
	location := "/orders/" + place(t, a, "u", "i")
	a.server.local.Store(nil)
	for _, path := range []string{location, "/orders", "/metrics", "/readyz"} {
		got := get(t, a, path)
		require.Equal(t, http.StatusServiceUnavailable, got.status, path)
		require.Equal(t, "1", got.header.Get("Retry-After"))
	}
	got := post(t, a, exampleOrder)
	require.Equal(t, http.StatusServiceUnavailable, got.status)
	require.Contains(t, got.body, "This request was not taken")
	for _, path := range []string{"/", "/openapi.json", "/livez"} {
		require.Equal(t, http.StatusOK, get(t, a, path).status, path)
	}
	own := call(t, a, http.MethodGet, "/metrics", http.Header{"Accept": {"text/plain"}}, "")
	require.Equal(t, http.StatusOK, own.status)
	require.NotContains(t, own.body, "orderd_orders{")

	asked := make(chan struct{})
	leader := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done()
	}))
	t.Cleanup(leader.Close)
	a.server.forwarder.setLeader(leader.URL, "pass")
	waited := later(t.Context(), a, "x", "60")
	<-asked
	stop() // which ends the wait
	got = arrived(t, waited)
	require.Equal(t, http.StatusServiceUnavailable, got.status, got.body)
	require.Equal(t, "1", got.header.Get("Retry-After"))
}

func TestToken(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, func(c *config) { c.server.token, c.server.readToken = "s3cret", "r3ad" })
	header := func(authorization ...string) http.Header {
		return http.Header{"Content-Type": {"application/json"}, "Authorization": authorization}
	}
	created := call(t, a, http.MethodPost, "/orders", header("Bearer s3cret"), exampleOrder)
	require.Equal(t, http.StatusCreated, created.status)
	for _, r := range everyRoute {
		path := strings.Replace(r.path, "/orders/ID", created.header.Get("Location"), 1)
		t.Run(r.method+" "+r.path, func(t *testing.T) {
			require.Equal(t, r.status, call(t, a, r.method, path, header("Bearer s3cret"), r.body).status)
			for _, wrong := range [][]string{nil, {""}, {"Bearer"}, {"Bearer "}, {"Bearer s3cre"}, {"Bearer s3crets"}, {"Bearer S3CRET"},
				{"s3cret"}, {"Basic s3cret"}, {"Bearer  s3cret"}} {
				got := call(t, a, r.method, path, header(wrong...), r.body)
				if r.open || r.public {
					require.Equal(t, r.status, got.status)
					continue
				}
				require.Equal(t, http.StatusUnauthorized, got.status, wrong)
				require.Regexp(t, `^Bearer\b`, got.header.Get("WWW-Authenticate"))
				require.NotContains(t, got.body, "s3cret")
			}
			accepted := a.store.publishedTotals().accepted
			got := call(t, a, r.method, path, header("bearer r3ad"), r.body)
			if r.method == http.MethodGet {
				require.Equal(t, r.status, got.status)
				require.Equal(t, r.status, call(t, a, http.MethodHead, path, header("Bearer r3ad"), "").status)
			} else {
				require.Equal(t, http.StatusForbidden, got.status)
				require.Contains(t, got.body, "This token may only read")
				require.Equal(t, accepted, a.store.publishedTotals().accepted)
			}
		})
	}
	t.Run("the read token does what is harmless", func(t *testing.T) {
		for method, status := range map[string]int{"OPTIONS": 204, "PUT": 403, "DELETE": 403, "BREW": 403} {
			require.Equal(t, status, call(t, a, method, "/orders", header("Bearer r3ad"), "").status, method)
		}
	})
	t.Run("without a read token nobody has it", func(t *testing.T) {
		a := newTestApp(t, func(c *config) { c.server.token = "s3cret" })
		for _, wrong := range []string{"", "Bearer", "Bearer "} {
			require.Equal(t, http.StatusUnauthorized, call(t, a, http.MethodGet, "/orders", header(wrong), "").status)
		}
	})
	t.Run("what is not there is not told apart", func(t *testing.T) {
		require.Equal(t, http.StatusUnauthorized, get(t, a, "/nowhere").status)
		require.Equal(t, http.StatusUnauthorized, get(t, a, "/orders/1").status)
		require.Equal(t, http.StatusNotFound, call(t, a, http.MethodGet, "/nowhere", header("Bearer s3cret"), "").status)
	})
}

func TestPagesOfOtherSites(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	id := place(t, a, "u", "i")
	for _, r := range everyRoute {
		for site, refused := range map[string]bool{"cross-site": !r.open, "same-site": false, "same-origin": false, "none": false} {
			t.Run(r.method+" "+r.path+" from "+site, func(t *testing.T) {
				header := http.Header{"Content-Type": {"application/json"}, "Sec-Fetch-Site": {site}, "Sec-Fetch-Mode": {"no-cors"}}
				accepted := a.store.publishedTotals().accepted
				got := call(t, a, r.method, strings.Replace(r.path, "ID", id, 1), header, r.body)
				if refused {
					require.Equal(t, http.StatusForbidden, got.status)
					require.Equal(t, accepted, a.store.publishedTotals().accepted)
				} else {
					require.Equal(t, r.status, got.status)
				}
			})
		}
	}
}

// TestOneResourceUnderEveryName asks by names that RFC 3986, section 6.2, calls equivalent.
func TestOneResourceUnderEveryName(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	id := place(t, a, "u", "i")
	encoded := ""
	for _, c := range []byte(id) {
		encoded += fmt.Sprintf("%%%02x", c)
	}
	for status, targets := range map[int][]string{ // of request lines
		200: {"/%6frders", "/%6Frders?limit=1", "/orders/" + encoded, "/%6f%72ders/" + encoded + "?view=full",
			"http://localhost", "http://localhost?x=1", "http://localhost/%6frders"},
		404: {"/orders%2F" + id, "/orders/%2e%2e/metrics", "/%2Forders", "//orders", "/orders/" + id + "%3F", "/orders%00"},
		400: {"/orders/%"},
	} {
		for _, target := range targets {
			t.Run(fmt.Sprintf("%s is answered by %d", target, status), func(t *testing.T) {
				_, answers := dialed(t, a, "GET "+target+" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
				response, err := http.ReadResponse(answers, nil)
				require.NoError(t, err)
				require.Equal(t, status, response.StatusCode)
			})
		}
	}
}

func TestClientInTheRequestLog(t *testing.T) {
	t.Parallel()
	const trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	forwarded := func(values ...string) http.Header { return http.Header{"X-Forwarded-For": values} }
	traced := func(values ...string) http.Header { return http.Header{"Traceparent": values} }
	type request struct {
		name   string
		header http.Header
		client string // the peer, if empty
		trace  any    // nil without one
	}
	for _, server := range []struct {
		name     string
		change   func(*config)
		requests []request
	}{
		{"on loopback", nil, []request{
			{name: "the header means nothing", header: forwarded("192.0.2.1")},
			{name: "a trace", header: traced(trace), trace: trace},
			{name: "a trace that is none", header: traced(trace + " " + trace)},
			{name: "an old trace", header: traced(strings.ToUpper(trace))},
			{name: "two traces", header: traced(trace, trace)},
		}},
		{"behind a proxy", func(c *config) { c.server.proxyHosts = []string{"a"} }, []request{
			{name: "it adds the address", header: forwarded("192.0.2.1"), client: "192.0.2.1"},
			{name: "what comes before is made up", header: forwarded("203.0.113.9, 10.0.0.1 , 192.0.2.1 "), client: "192.0.2.1"},
			{name: "in a header before, too", header: forwarded("203.0.113.9", "2001:DB8::1"), client: "2001:db8::1"},
			{name: "a zone is none of ours", header: forwarded("fe80::1%<any\">"), client: "fe80::1"},
			{name: "no header"},
			{name: "an empty header", header: forwarded("")},
			{name: "an empty element", header: forwarded("192.0.2.1,")},
			{name: "a name", header: forwarded("192.0.2.1, unknown")},
			{name: "a port", header: forwarded("192.0.2.1:80")},
		}},
		{"behind one, on 0.0.0.0", func(c *config) { c.server.proxyHosts, c.addr = []string{"a"}, "0.0.0.0:0" }, []request{
			{name: "it adds the address", header: forwarded("192.0.2.1"), client: "192.0.2.1"},
		}},
	} {
		t.Run(server.name, func(t *testing.T) {
			dir := t.TempDir()
			a, stop := openTestApp(t, dir, server.change, nil)
			for _, r := range server.requests {
				call(t, a, http.MethodGet, "/livez", r.header, "")
			}
			stop()
			lines := logged(t, dir, "request")
			require.Len(t, lines, len(server.requests))
			for i, r := range server.requests {
				if r.client == "" {
					require.Regexp(t, `^127\.0\.0\.1:\d+$`, lines[i]["client"], r.name)
				} else {
					require.Equal(t, r.client, lines[i]["client"], r.name)
				}
				require.Equal(t, r.trace, lines[i]["traceparent"], r.name)
			}
		})
	}
}

func TestRequestLog(t *testing.T) {
	t.Parallel()
	a, stop := openTestApp(t, t.TempDir(), func(c *config) { c.server.token, c.log.level = "s3cret", slog.LevelDebug },
		func(a *app) { a.store.cache = nil }) // GET /orders/:order_id panics
	header := http.Header{"Content-Type": {"application/json"}, "Authorization": {"Bearer s3cret"}, "Idempotency-Key": {"my-k3y"},
		"X-Forwarded-For": {"203.0.113.9"}, "X-Real-Ip": {"203.0.113.9"}, "Forwarded": {"for=203.0.113.9"}}
	tests := []struct {
		name, method, path, body string
		header                   http.Header
		status                   int
	}{
		{"created", "POST", "/orders", orderBody(`"private-user"`, `"private-item"`, "1234.56"), header, 201},
		{"refused", "POST", "/orders", `{"private-field": "private-value"}`, header, 422},
		{"malformed", "POST", "/orders", "private-text", header, 400},
		{"not admitted", "GET", "/orders", "", http.Header{"Authorization": {"Bearer s3cret0"}}, 401},
		{"not found", "GET", "/orders/1", "", header, 404},
		{"not allowed", "DELETE", "/metrics", "", header, 405},
		{"head", "HEAD", "/metrics", "", header, 200},
		{"panic", "GET", "/orders/01ARZ3NDEKTSV4RRFFQ69G5FAV", "", header, 500},
		{"a panic ends one request only", "GET", "/livez", "", nil, 200},
	}
	var answers []answer
	for _, test := range tests {
		got := call(t, a, test.method, test.path, test.header, test.body)
		require.Equal(t, test.status, got.status, test.name)
		answers = append(answers, got)
	}
	stop()
	text := bytesOf(t, a.cfg.log.file)
	for _, private := range []string{"s3cret", "my-k3y", "private-", "1234.56"} {
		require.NotContains(t, text, private)
	}
	lines, ids := linesOf(t, text, "request"), map[any]bool{}
	require.Len(t, lines, len(tests), "one line a request")
	for i, test := range tests {
		line, id := lines[i], answers[i].header.Get("X-Request-Id")
		want := []any{id, test.method, test.path, float64(test.status)}
		require.Equal(t, want, []any{line["id"], line["method"], line["path"], line["status"]}, test.name)
		require.GreaterOrEqual(t, line["us"], 0.0)
		if test.method != "HEAD" { // whose body is counted and not sent
			require.EqualValues(t, len(answers[i].body), line["bytes"], test.name)
		}
		require.Regexp(t, `^127\.0\.0\.1:\d+$`, line["client"], "the connection's address, whatever the headers say")
		require.NotContains(t, ids, id)
		ids[id] = true
		if test.status == http.StatusInternalServerError {
			require.JSONEq(t, `{"type": "about:blank", "title": "Internal Server Error", "status": 500,
				"detail": "The server failed to answer; the cause is in its log under this X-Request-Id."}`, answers[i].body)
			causes := linesOf(t, text, "a request failed")
			require.Len(t, causes, 1)
			require.Equal(t, id, causes[0]["id"])
			require.Regexp(t, `(?s)^panic: .*nil pointer.*cache\.go:`, causes[0]["error"], "the cause and the stack")
		}
	}
}

// ---- store.go ----

// rowOf is an order as the table holds it.
func rowOf(tb testing.TB, s *store, id ulid.ULID) order {
	tb.Helper()
	o, err := s.get(id)
	require.NoError(tb, err)
	return o
}

func TestStepsAreTakenOnlyFromTheStatusOfTheRow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, stop := openIdle(t, dir, nil, nil)
	var voids []string
	for _, inRow := range []status{pending, processing, completed} {
		for _, st := range []transition{
			{from: pending, to: processing, startedMS: 2000},
			{from: pending, to: completed, startedMS: 2000, tookMicros: 7},
			{from: processing, to: completed, startedMS: 2000, tookMicros: 7},
		} {
			t.Run(fmt.Sprintf("%s to %s on one that is %s", st.from, st.to, inRow), func(t *testing.T) {
				st.id = commitTogether(t, a.store, sampleOrders(1))[0]
				moveTo(t, a.store, st.id, inRow, 5)
				want, totalsBefore := rowOf(t, a.store, st.id), counts(a)
				require.Equal(t, st.from != inRow, move(a.store, st).void)
				if st.from == inRow {
					want.status, want.startedMS, want.tookMicros = st.to, st.startedMS, st.tookMicros
				} else {
					voids = append(voids, st.id.String())
					require.Equal(t, totalsBefore, counts(a))
				}
				require.Equal(t, want, rowOf(t, a.store, st.id))
				checkInvariants(t, a)
			})
		}
	}
	t.Run("any on one that is not there", func(t *testing.T) {
		stranger := ulid.Make()
		require.True(t, move(a.store, transition{id: stranger, from: pending, to: processing, startedMS: 2000}).void)
		voids = append(voids, stranger.String())
		_, ok := a.store.cache.get(stranger)
		require.False(t, ok, "a void step does not reach the cache")
		checkInvariants(t, a)
	})
	stop()
	var inLog []string
	for _, line := range logged(t, dir, "a step did not find its order") {
		require.Equal(t, "ERROR", line["level"])
		inLog = append(inLog, line["order_id"].(string))
	}
	require.Equal(t, voids, inLog)
}

func TestOnlyTheLastStepOfAnOrderInABatchIsKept(t *testing.T) {
	t.Parallel()
	b := newBatch(nil)
	b.move(transition{id: numbered(3), from: processing, to: completed, startedMS: 1000, tookMicros: 30})
	b.move(transition{id: numbered(1), from: pending, to: processing, startedMS: 2000})
	b.move(transition{id: numbered(2), from: pending, to: processing, startedMS: 3000})
	for took := range int64(100) {
		b.move(transition{id: numbered(1), from: processing, to: completed, startedMS: 2000, tookMicros: took})
	}
	require.Equal(t, []transition{
		{id: numbered(3), from: processing, to: completed, startedMS: 1000, tookMicros: 30},
		{id: numbered(1), from: pending, to: completed, startedMS: 2000, tookMicros: 99},
		{id: numbered(2), from: pending, to: processing, startedMS: 3000},
	}, b.steps)
	require.Equal(t, totals{seq: 1, accepted: 3, processing: 1, completed: 2, sumTook: 129, newestStarted: 3},
		totals{accepted: 3, processing: 1}.with(b))
}

// TestRetryOfNothingIsAWrite: after creates alone were refused, only a commit
// that the disk has taken may let them in again.
func TestRetryOfNothingIsAWrite(t *testing.T) {
	t.Parallel()
	a := lookedAt(t, t.TempDir(), nil, nil)
	t.Cleanup(func() { require.NoError(t, errors.Join(a.closeFiles(), a.log.close())) })
	_, err := onSQLite(t, a).start()
	require.NoError(t, err)
	for range 2 {
		before := walBytes(a)
		require.NoError(t, onSQLite(t, a).commit(newBatch(nil)))
		require.Greater(t, walBytes(a), before)
	}
}

// TestOrdersAgainstAModel places, works, asks and restarts at random. One worker
// takes orders first in, first out, and the test lets it complete so many: so of
// all orders the first done are Completed, the next is Processing, the rest Pending.
func TestOrdersAgainstAModel(t *testing.T) {
	t.Parallel()
	for seed := range uint64(3) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			r, dir := rand.New(rand.NewPCG(seed, 0)), t.TempDir()
			var placed []*creation
			done, resumed := 0, 0 // orders; resumed at the last start
			var a *app
			var stop func()
			var worked diary[ulid.ULID]
			permits := make(chan struct{}, 10_000)
			start := func() {
				worked.forget()
				resumed = done
				a, stop = openTestApp(t, dir, func(c *config) {
					c.drain, c.pool.workers, c.pool.queue, c.store.cache = 0, 1, 1+r.IntN(20), 1+r.IntN(100)
				}, func(a *app) {
					a.pool.work = func(ctx context.Context, id ulid.ULID, attempt int) error {
						worked.note(id)
						return hold(permits)(ctx, id, attempt)
					}
				})
			}
			permit := func(n int) {
				for range n {
					permits <- struct{}{}
				}
				done += n
			}
			compare := func() {
				awaitRest(t, a, int64(min(1, len(placed)-done)), int64(done))
				begun := placed[resumed:min(done+1, len(placed))] // since the last start
				until(t, func() bool { return len(worked.read()) == len(begun) }, "the next is in work")
				for i, id := range worked.read() {
					require.Equal(t, begun[i].id, id, "first in, first out")
				}
				wantStatus := func(i int) status { return []status{completed, processing, pending}[min(2, max(0, i-done+1))] }
				found := allOrders(t, a.store)
				require.Len(t, found, len(placed))
				slices.Reverse(found)
				for i, o := range found {
					require.Equal(t, wantStatus(i), o.status, "order %d of %d", i, done)
					o.status, o.startedMS, o.tookMicros = pending, 0, 0
					require.Equal(t, placed[i].order, o)
				}
				for range 10 {
					i := r.IntN(len(placed))
					st, err := a.store.status(placed[i].id)
					require.NoError(t, err)
					require.Equal(t, wantStatus(i), st)
				}
				checkInvariants(t, a)
			}
			place := func(n int) {
				for range n {
					key := ""
					if r.IntN(3) == 0 {
						key = fmt.Sprint("key", len(placed))
					}
					placed = append(placed, sampleOrder(len(placed), key))
				}
				commitTogether(t, a.store, placed[len(placed)-n:])
			}
			start()
			place(2*feedRows + 3) // more than the feeder reads at a time, and than the channel holds
			compare()
			for range 12 {
				switch r.IntN(5) {
				case 0:
					place(1 + r.IntN(60))
				case 1, 2:
					permit(min(1+r.IntN(300), len(placed)-done))
				case 3:
					i := r.IntN(len(placed))
					if key := placed[i].key; key != "" {
						again := sampleOrder(i, key)
						require.NoError(t, a.store.create(again))
						require.True(t, again.replayed)
						require.Equal(t, placed[i].id, again.id)
						require.ErrorIs(t, a.store.create(sampleOrder(i+1, key)), errKeyReused)
					}
				case 4:
					before := a.metrics.summarize(a.store.publishedTotals())
					stop()
					start()
					require.Equal(t, before, a.metrics.summarize(a.store.publishedTotals()))
				}
				compare()
			}
			permit(len(placed) - done)
			compare()
			stop()
			require.Empty(t, logged(t, dir, "a step did not find its order"))
		})
	}
}

func TestIDsIncreaseWhateverTheClockDoes(t *testing.T) {
	t.Parallel()
	const noon, hour = 1_800_000_000_000, 3_600_000
	dir := t.TempDir()
	var clock atomic.Int64
	var commits diary[ulid.ULID]
	open := func() (*app, func()) {
		return openIdle(t, dir, func(c *config) {
			c.store.now = func() time.Time { return time.UnixMilli(clock.Load()) }
		}, func(a *app) {
			onSQLite(t, a).beforeCommit = func(b *batch) {
				for _, c := range b.creates {
					commits.note(c.id)
				}
			}
		})
	}
	a, stop := open()
	const useUp = "UPDATE orders SET id_high = id_high | 65535 WHERE id_high = (SELECT max(id_high) FROM orders)"
	for _, tc := range []struct {
		name        string
		clock, want uint64
		restart     bool
		meanwhile   string // SQL
	}{
		{name: "the clock goes", clock: noon, want: noon},
		{name: "it stands", clock: noon, want: noon},
		{name: "it steps back by an hour", clock: noon - hour, want: noon},
		{name: "it steps back to 1970", clock: 0, want: noon},
		{name: "it has gone on", clock: noon + 5, want: noon + 5},
		{name: "a restart with an earlier clock", clock: noon - 24*hour, want: noon + 5, restart: true},
		{name: "the sequence of a millisecond is used up", clock: noon + 5, want: noon + 6, restart: true, meanwhile: useUp},
		{name: "a restart with a later clock", clock: noon + hour, want: noon + hour, restart: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.restart {
				checkInvariants(t, a)
				stop()
				tamper(t, a, tc.meanwhile)
				a, stop = open()
			}
			newest := allOrders(t, a.store)
			clock.Store(int64(tc.clock))
			for _, id := range commitTogether(t, a.store, sampleOrders(3)) {
				require.Equal(t, tc.want, id.Time())
				require.True(t, len(newest) == 0 || newest[0].id.Compare(id) < 0)
			}
		})
	}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for i := range 10 {
				clock.Store(noon + rand.Int64N(4*hour) - 2*hour) // it jumps about
				assert.NoError(t, a.store.create(sampleOrder(i, "")))
			}
		})
	}
	wg.Wait()
	ids := commits.read()
	require.Len(t, ids, 8*3+160)
	strictly := func(a, b ulid.ULID) int { return cmp.Or(a.Compare(b), 1) }
	require.True(t, slices.IsSortedFunc(ids, strictly), "increasing in commit order")
	checkInvariants(t, a)
}

func TestBatchesOfEverySizeKeepEveryOrder(t *testing.T) {
	t.Parallel()
	a, _ := openIdle(t, t.TempDir(), nil, nil)
	for _, size := range []int{1, insertRows - 1, insertRows, insertRows + 1, 3 * insertRows, 5*insertRows + 7} {
		for name, hasKey := range map[string]func(i int) bool{
			"without keys":                      func(int) bool { return false },
			"every third with a key":            func(i int) bool { return i%3 == 1 },
			"the first and the last with a key": func(i int) bool { return i == 0 || i == size-1 },
			"all with keys":                     func(int) bool { return true },
		} {
			t.Run(fmt.Sprintf("%d, %s", size, name), func(t *testing.T) {
				creates := sampleOrders(size)
				for i, c := range creates {
					if hasKey(i) {
						c.key = fmt.Sprintf("%s %d", t.Name(), i)
					}
				}
				accepted := a.store.publishedTotals().accepted
				ids := commitTogether(t, a.store, creates)
				require.Equal(t, accepted+int64(size), a.store.publishedTotals().accepted)
				for i, id := range ids {
					require.True(t, i == 0 || ids[i-1].Compare(id) < 0)
					again := sampleOrder(i, creates[i].key)
					want := again.order
					want.id = id
					require.Equal(t, want, rowOf(t, a.store, id))
					if again.key != "" {
						require.NoError(t, a.store.create(again))
						require.True(t, again.replayed)
						require.Equal(t, id, again.id)
					}
				}
			})
		}
	}
	t.Run("a key twice in one batch", func(t *testing.T) {
		creates := []*creation{sampleOrder(1, ""), sampleOrder(2, "twin"), sampleOrder(2, "twin"), sampleOrder(3, "twin"), sampleOrder(4, "")}
		accepted := a.store.publishedTotals().accepted
		ids := commitTogether(t, a.store, creates)
		require.Equal(t, accepted+3, a.store.publishedTotals().accepted)
		require.True(t, creates[2].replayed)
		require.Equal(t, ids[1], ids[2])
		require.Equal(t, errKeyReused, creates[3].err)
		_, ok := a.store.cache.get(creates[3].id)
		require.False(t, ok, "a refused create does not reach the cache")
	})
	checkInvariants(t, a)
}

// TestListsOfAUser walks page by page through orders of which some are indexed
// in one run, some in the next and some not yet.
func TestListsOfAUser(t *testing.T) {
	t.Parallel()
	const orders = 20_300 // in batches of 500: more than a run, and the last 800 are not indexed
	dir := t.TempDir()
	a, stop := openIdle(t, dir, nil, nil)
	for n := 0; n < orders; n += 500 {
		creates := sampleOrders(min(500, orders-n))
		for i, c := range creates {
			switch {
			case i%2 == 0:
				c.userID = "often"
			case (n+i)%2501 == 3:
				c.userID = "seldom"
			}
		}
		for i, id := range commitTogether(t, a.store, creates) {
			switch {
			case n+i < orders-2000 && i%100 != 3:
				a.store.step(transition{id: id, from: pending, to: completed, startedMS: 1000})
			case n+i < orders-1900:
				a.store.step(transition{id: id, from: pending, to: processing, startedMS: 1000})
			}
		}
	}
	until(t, func() bool { return a.store.publishedTotals().pending() == 1900 }, "all steps are taken")
	checkInvariants(t, a)
	indexed := func() (n int64) {
		require.NoError(t, onSQLite(t, a).listReaders.QueryRow("SELECT count(*) FROM orders_by_user").Scan(&n))
		return n
	}
	require.Greater(t, indexed(), int64(runOrders))
	require.Less(t, indexed(), int64(orders))
	all := allOrders(t, a.store)
	ordersOf := func(user string, st *status) (found []order) {
		for _, o := range all {
			if o.userID == user && (st == nil || o.status == *st) {
				found = append(found, o)
			}
		}
		return found
	}
	for _, user := range []string{"often", "seldom", "user7", "user499", "nobody"} {
		for name, st := range map[string]*status{"all": nil, "Pending": new(pending), "Processing": new(processing), "Completed": new(completed)} {
			for _, limit := range []int{1, 100, 1000} {
				if limit == 1 && user == "often" {
					continue
				}
				t.Run(fmt.Sprintf("%s of %s by %d", name, user, limit), func(t *testing.T) {
					want := ordersOf(user, st)
					found, n := walk(t, a.store, filter{userID: user, status: st, limit: limit})
					require.True(t, slices.Equal(want, found)) // require.Equal would take seconds
					require.Equal(t, max(1, (len(want)+limit-1)/limit), n)
				})
			}
		}
	}
	t.Run("an order that is indexed between the queries of a page is found once", func(t *testing.T) {
		before, queries := indexed(), 0
		restore := recordLists(t, a, func(string, []any) {
			if queries++; queries == 3 { // behind the bounds and the newest orders
				creates := sampleOrders(indexEvery)
				for _, c := range creates {
					c.userID = "user7"
				}
				commitTogether(t, a.store, creates)
			}
		})
		found, err := a.store.list(filter{userID: "user7", before: math.MaxInt64, limit: 1000})
		restore()
		require.NoError(t, err)
		require.Less(t, before, indexed())
		require.Equal(t, ordersOf("user7", nil), found.orders)
	})
	t.Run("a page looks into so many runs and the next goes on there", func(t *testing.T) {
		seldom, n := walk(t, a.store, filter{userID: "seldom", limit: 1000})
		require.Equal(t, 1, n)
		stop()
		tamper(t, a, `INSERT INTO user_runs SELECT id_high, 0, 0 FROM orders_by_user WHERE run = 0 AND id_high > ?;
			UPDATE orders_by_user SET run = (SELECT max(first) FROM user_runs WHERE first <= id_high) WHERE run = 0`, high(all[len(all)-1-3*pageRuns].id))
		a, stop = openIdle(t, dir, nil, nil)
		checkInvariants(t, a)
		again, n := walk(t, a.store, filter{userID: "seldom", limit: 1000})
		require.Equal(t, seldom, again)
		require.Greater(t, n, (runOrders-3*pageRuns)/pageRuns)
		found, n := walk(t, a.store, filter{userID: "seldom", status: new(pending), limit: 1000})
		require.Len(t, found, 1)
		require.Equal(t, 1, n)
	})
}

func TestReadableViewShowsWhatTheAPIShows(t *testing.T) {
	t.Parallel()
	a, stop := openIdle(t, t.TempDir(), nil, nil)
	db := openOrders(t, a)
	defer db.Close()
	stop()
	lows := []int64{0, 1, -1, math.MaxInt64, math.MinInt64, -1 << 60, 1 << 60, 1<<60 - 1, -1 << 31, 0x5555_5555_5555_5555, -0x5555_5555_5555_5556}
	highs := []int64{1, 2, math.MaxInt64, math.MaxInt64 - 1, 1 << 62, 0xffff, 1_800_000_000_123 << 16, 1_800_000_000_999<<16 | 0xffff}
	var ids []ulid.ULID
	for i, l := range lows {
		ids = append(ids, joinID(1_800_000_000_000<<16+int64(i), l))
	}
	for i, h := range highs {
		ids = append(ids, joinID(h, lows[i]))
	}
	for range 300 {
		ids = append(ids, joinID(rand.Int64(), int64(rand.Uint64())))
	}
	for i, id := range ids {
		o := order{id: id, userID: fmt.Sprint("user", i), itemIDs: "a,b", cents: rand.Int64N(maxCents+1) >> (i % 50), status: status(i % 3)}
		if o.status >= processing {
			o.startedMS = rand.Int64N(4_000_000_000_000)
		}
		if o.status == completed {
			o.tookMicros = rand.Int64N(1e12)
		}
		_, err := db.Exec("INSERT INTO orders ("+insertColumns+", started, took) VALUES ($1, $2, CAST($3 AS smallint), $4, $5, $6, NULL, nullif(CAST($7 AS bigint), 0), CASE WHEN CAST($3 AS smallint) = 2 THEN CAST($8 AS bigint) END)",
			high(id), low(id), int64(o.status), o.userID, o.itemIDs, o.cents, o.startedMS, o.tookMicros)
		require.NoError(t, err)
		var shown orderDocument
		require.NoError(t, db.QueryRow("SELECT order_id, user_id, item_ids, total_amount, status, created_at, started_at, completed_at FROM orders_readable WHERE user_id = $1", o.userID).
			Scan(&shown.OrderID, &shown.UserID, &shown.ItemIDs, &shown.TotalAmount, &shown.Status, &shown.CreatedAt, &shown.StartedAt, &shown.CompletedAt))
		require.Equal(t, newOrderDocument(o), shown)
	}
}

func TestDatabasesAreDurableAndOurs(t *testing.T) {
	t.Parallel()
	a, _ := openIdle(t, t.TempDir(), nil, nil)
	e := onSQLite(t, a)
	require.Equal(t, []int{3, 4}, []int{e.rowReaders.Stats().OpenConnections, e.listReaders.Stats().OpenConnections}, "open before they are needed")
	for _, tc := range []struct {
		db      *sql.DB
		pragmas string
	}{
		{e.file.DB, "journal_mode=wal synchronous=2 wal_autocheckpoint=0 fullfsync=1 checkpoint_fullfsync=1"},
		{e.file.DB, "application_id=1869767794 user_version=3"},
		{a.metrics.file.DB, "journal_mode=wal synchronous=2 wal_autocheckpoint=1 application_id=1869767789 user_version=2"},
		{e.listReaders.DB, "query_only=1 busy_timeout=1000"},
		{e.rowReaders.DB, "query_only=1 busy_timeout=1000"},
	} {
		for _, want := range strings.Fields(tc.pragmas) {
			name, _, _ := strings.Cut(want, "=")
			var got string
			require.NoError(t, tc.db.QueryRow("PRAGMA "+name).Scan(&got))
			require.Equal(t, want, name+"="+got)
		}
	}
	_, err := e.listReaders.Exec("DELETE FROM orders")
	require.ErrorContains(t, err, "readonly")
	for _, name := range []string{"orders.db", "orders.db-wal", "metrics.db"} {
		info, err := os.Stat(filepath.Join(a.cfg.data, name))
		require.NoError(t, err)
		require.True(t, info.Mode().Perm() == 0o600 || runtime.GOOS == "windows", name)
	}
	checkInvariants(t, a)
}

// namesIn lists a directory.
func namesIn(tb testing.TB, dir string) (names []string) {
	tb.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(tb, err)
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

func TestCloseLosesNoConfirmedOrderAndLeavesNoWAL(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, stop := openIdle(t, dir, nil, nil)
	var confirmed diary[ulid.ULID]
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for i := 0; ; i++ {
				c := sampleOrder(i, "")
				if err := a.store.create(c); err != nil {
					assert.Equal(t, errClosed, err)
					return
				}
				confirmed.note(c.id)
			}
		})
	}
	until(t, func() bool { return a.store.publishedTotals().accepted > 100 }, "some orders are in")
	stop()
	wg.Wait()
	require.Equal(t, []string{"metrics.db", "orderd.lock", "orders.db"}, namesIn(t, filepath.Join(dir, "data")))

	a, _ = openIdle(t, dir, nil, nil)
	var stored []ulid.ULID
	for _, o := range allOrders(t, a.store) {
		stored = append(stored, o.id)
	}
	require.ElementsMatch(t, confirmed.read(), stored)
	checkInvariants(t, a)
}

// ---- cache.go ----

// numbered is a ULID of a test's own.
func numbered(n int) ulid.ULID { return joinID(int64(n), int64(n)) }

func TestCacheBound(t *testing.T) {
	t.Parallel()
	const most = 100
	c := newCache(most)
	has := func(n int) bool {
		_, found := c.get(numbered(n))
		return found
	}
	for i := range 3*most + 7 {
		c.apply([]change{{numbered(i), pending}})
		c.apply([]change{{numbered(i), processing}, {numbered(i), completed}})
		require.LessOrEqual(t, c.len(), most)
		require.True(t, has(i))
		require.False(t, has(i-most), "the oldest goes first")
		require.True(t, i < most || has(i-most+1), "and only the oldest")
	}
	require.Len(t, c.ring, most)
	require.EqualValues(t, 3*most+7, c.misses.Load())
}

func TestCacheStatus(t *testing.T) {
	t.Parallel()
	type action = func(*cache, ulid.ULID)
	step := func(to status) action { return func(c *cache, id ulid.ULID) { c.apply([]change{{id, to}}) } }
	read := func(s status) action { return func(c *cache, id ulid.ULID) { c.learn(id, s, 1) } }
	for _, test := range []struct {
		name  string
		from  int // status, or -1 for none
		then  action
		want  status
		found bool
	}{
		{"a step moves it forward", 0, step(processing), processing, true},
		{"a step never moves it back", 2, step(processing), completed, true},
		{"a create never moves it back", 1, step(pending), processing, true},
		{"an unknown order's step is kept", -1, step(processing), processing, true},
		{"a reader moves it forward", 0, read(completed), completed, true},
		{"a slow reader never moves it back", 2, read(pending), completed, true},
		{"a reader adds what is Completed", -1, read(completed), completed, true},
		{"a reader does not add what is Processing", -1, read(processing), 0, false},
		{"a reader does not add what is Pending", -1, read(pending), 0, false},
		{"it is forgotten with its order", 2, func(c *cache, id ulid.ULID) { c.forget([]ulid.ULID{id}, 1) }, 0, false},
		{"a slow reader does not bring back what is forgotten", 2, func(c *cache, id ulid.ULID) {
			c.forget([]ulid.ULID{id}, 2)
			c.learn(id, completed, 1)
		}, 0, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, id := newCache(2), numbered(1)
			if test.from >= 0 {
				c.apply([]change{{id, status(test.from)}})
			}
			test.then(c, id)
			got, found := c.get(id)
			require.Equal(t, test.found, found)
			require.Equal(t, test.want, got)
			_, found = c.get(joinID(1, 2))
			require.False(t, found, "an ID that differs in its random half")
		})
	}
}

func TestCacheWatch(t *testing.T) {
	t.Parallel()
	c, id := newCache(1), numbered(1)
	done := func(ch <-chan struct{}) bool {
		select {
		case <-ch:
			return true
		default:
			return false
		}
	}
	complete := []change{{id, completed}}
	first, stopFirst := c.watch(id)
	second, stopSecond := c.watch(id)
	other, stopOther := c.watch(numbered(2))
	c.apply([]change{{id, pending}, {id, processing}})
	require.False(t, done(first), "not Completed yet")
	stopFirst()
	c.apply(complete)
	require.True(t, done(second), "a watcher that left does not take the others along")
	require.False(t, done(other))
	require.Len(t, c.watchers, 1)

	next, stopNext := c.watch(id)
	stopSecond()
	require.Len(t, c.watchers, 2, "a watch that is over does not end a newer one")
	c.apply(complete)
	require.True(t, done(next))
	stopNext()
	stopOther()
	require.Empty(t, c.watchers)
}

// ---- worker.go ----

// userEndpoint is a user's server that orders are POSTed to. It can go away and
// come back at its address.
type userEndpoint struct {
	addr   string
	server *httptest.Server
	opened atomic.Int64 // connections

	mu       sync.Mutex // guards the rest
	answer   http.HandlerFunc
	attempts []attempted
}

// attempted is an attempt as the endpoint saw it.
type attempted struct {
	id, number, body string
	header           http.Header
}

func newUserEndpoint(tb testing.TB, answer http.HandlerFunc) *userEndpoint {
	tb.Helper()
	e := &userEndpoint{addr: "127.0.0.1:0", answer: answer}
	e.comeBack(tb)
	tb.Cleanup(e.goAway)
	return e
}

func (e *userEndpoint) comeBack(tb testing.TB) {
	tb.Helper()
	listener, err := net.Listen("tcp", e.addr)
	require.NoError(tb, err)
	e.addr = listener.Addr().String()
	e.server = &httptest.Server{Listener: listener, Config: &http.Server{Handler: e, ConnState: func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			e.opened.Add(1)
		}
	}}}
	e.server.Start()
}

func (e *userEndpoint) goAway() {
	e.server.CloseClientConnections()
	e.server.Close()
}

func (e *userEndpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	e.mu.Lock()
	e.attempts = append(e.attempts, attempted{r.Header.Get("Idempotency-Key"), r.Header.Get("Orderd-Attempt"), string(body), r.Header})
	answer := e.answer
	e.mu.Unlock()
	answer(w, r)
}

// answers with another handler from now on.
func (e *userEndpoint) answers(with http.HandlerFunc) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.answer = with
}

func (e *userEndpoint) seen() []attempted {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.attempts)
}

// works has the endpoint do the work of an app.
func (e *userEndpoint) works(c *config) { c.pool.endpoint.url = "http://" + e.addr + "/work" }

// withStatus answers with headers, which are names and values in turn.
func withStatus(code int, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for pair := range slices.Chunk(headers, 2) {
			w.Header().Set(pair[0], pair[1])
		}
		w.WriteHeader(code)
	}
}

func withoutAnswer(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func brokenOff(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

func inTrouble(a *app) bool {
	shut, _ := a.pool.gate.state()
	return shut
}

// What the log says of refused orders, and of an endpoint.
const (
	refusedUntil  = "orders are refused until the store can be written"
	troubleBegins = "the endpoint is in trouble: orders wait until it answers"
	troubleEnds   = "the endpoint takes orders again: they go on"
	attemptFailed = "an attempt at an order failed"
)

func TestTheEndpointGetsTheOrderExactly(t *testing.T) {
	t.Parallel()
	e := newUserEndpoint(t, withStatus(200))
	a := newTestApp(t, func(c *config) {
		e.works(c)
		c.pool.endpoint.token = "s3cret"
	})
	created := post(t, a, orderBody(`"a \"<b>\" \u2028 é"`, `"x , y"`, "9999999999999.90"))
	awaitRest(t, a, 0, 1)
	listed := decoded[struct{ Orders []map[string]any }](t, get(t, a, "/orders").body).Orders[0]
	got := e.seen()[0]
	want := map[string]any{}
	for _, name := range []string{"order_id", "user_id", "item_ids", "total_amount", "created_at"} {
		want[name] = listed[name]
	}
	require.Equal(t, want, decoded[map[string]any](t, got.body))
	require.Contains(t, got.body, `"total_amount":9999999999999.90,`)
	require.Equal(t, "/orders/"+got.id, created.header.Get("Location"))
	require.Equal(t, "1", got.number)
	require.Equal(t, "application/json", got.header.Get("Content-Type"))
	require.Equal(t, "Bearer s3cret", got.header.Get("Authorization"))
	require.Zero(t, metric(t, base(a), "orderd_endpoint_down"))
	checkInvariants(t, a)
}

func TestAnswersOfTheEndpoint(t *testing.T) {
	t.Parallel()
	dir, failed, begins := t.TempDir(), 0, 0
	e := newUserEndpoint(t, nil)
	a, stop := openTestApp(t, dir, e.works, nil)
	withBody := func(code int, rest http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(code)
			w.(http.Flusher).Flush()
			rest(w, r)
		}
	}
	endless := func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			w.Write(make([]byte, 1<<16))
		}
	}
	const done, fails, inTroubleThen = 0, 1, 2
	for _, tc := range []struct {
		name  string
		first http.HandlerFunc
		want  int
	}{
		{"200", withStatus(200), done},
		{"201", withStatus(201), done},
		{"204", withStatus(204), done},
		{"299", withStatus(299), done},
		{"200 and a body without end", withBody(200, endless), done},
		{"200 and a body that hangs", withBody(200, withoutAnswer), done},
		{"202 and a body that is broken off", withBody(202, brokenOff), done},
		{"a redirect to a page that answers 200", withStatus(302, "Location", "/login"), fails},
		{"a redirect that repeats the request", withStatus(307, "Location", "/work"), fails},
		{"300", withStatus(300), fails},
		{"400", withStatus(400), fails},
		{"409, whose Retry-After is nobody's", withStatus(409, "Retry-After", "60"), fails},
		{"500 and a body without end", withBody(500, endless), fails},
		{"501", withStatus(501), fails},
		{"429", withStatus(429), inTroubleThen},
		{"502", withStatus(502), inTroubleThen},
		{"503 and a body that hangs", withBody(503, withoutAnswer), inTroubleThen},
		{"504", withStatus(504, "Retry-After", "0"), inTroubleThen},
		{"a connection broken before the answer", brokenOff, inTroubleThen},
		{"what is not HTTP", func(w http.ResponseWriter, _ *http.Request) {
			conn, _, _ := w.(http.Hijacker).Hijack()
			conn.Write([]byte("hello\r\n\r\n"))
			conn.Close()
		}, inTroubleThen},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e.answers(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Orderd-Attempt") == "1" && r.URL.Path == "/work" {
					tc.first(w, r)
				}
			})
			before, began := a.store.publishedTotals().completed, time.Now()
			id := commitTogether(t, a.store, sampleOrders(1))[0].String()
			awaitRest(t, a, 0, before+1)
			attempts := []string{"1"}
			if tc.want != done {
				attempts, failed = append(attempts, "2"), failed+1
			}
			if tc.want == inTroubleThen {
				begins++
			}
			var seen []string
			for _, got := range e.seen() {
				if got.id == id {
					seen = append(seen, got.number)
				}
			}
			require.Equal(t, attempts, seen)
			require.EqualValues(t, failed, metric(t, base(a), "orderd_attempts_failed_total"))
			require.Less(t, time.Since(began), 20*time.Second, "a body is not waited for")
			until(t, func() bool { return !inTrouble(a) })
		})
	}
	checkInvariants(t, a)
	stop()
	told := func(f *limitedLog, messages ...string) (n int) { // or left out
		for _, message := range messages {
			for _, line := range logged(t, dir, message) {
				n += 1 + int(line["left_out"].(float64))
			}
		}
		return n + f.leftOut
	}
	require.Equal(t, 2*begins, told(a.pool.endpointWarnings, troubleBegins, troubleEnds))
	require.Equal(t, failed-begins, told(a.pool.orderWarnings, attemptFailed))
}

// posterTo posts orders of no content to a URL, as three workers do.
func posterTo(url string, timeout time.Duration) *endpoint {
	find := func(id ulid.ULID) (order, error) { return order{id: id}, nil }
	return newEndpoint(endpointOptions{url: url, timeout: timeout}, 3, find)
}

// TestOnlyThePoolRepeatsAnAttempt breaks connections that were kept alive, where
// net/http by itself sends a request with an Idempotency-Key again.
func TestOnlyThePoolRepeatsAnAttempt(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	e := newUserEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		if calls.Add(1)%2 == 0 {
			brokenOff(w, r)
		}
	})
	poster := posterTo("http://"+e.addr, time.Minute)
	for n := range int64(8) {
		require.Equal(t, n%2 == 0, poster.post(t.Context(), ulid.Make(), 1) == nil)
		require.Equal(t, n+1, calls.Load())
	}
}

func TestConnectionsToTheEndpointAreUsedAgain(t *testing.T) {
	t.Parallel()
	e := newUserEndpoint(t, func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, maxAnswer-1)) })
	poster := posterTo("http://"+e.addr, time.Minute)
	for range 100 { // and after each, all connections are idle
		var workers sync.WaitGroup
		for range 3 {
			workers.Go(func() { assert.NoError(t, poster.post(t.Context(), ulid.Make(), 1)) })
		}
		workers.Wait()
	}
	require.LessOrEqual(t, e.opened.Load(), int64(3))
}

func TestATimeOutPausesOneOrderOnly(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var first sync.Once
	e := newUserEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		first.Do(func() { withoutAnswer(w, r) })
	})
	a, stop := openTestApp(t, dir, func(c *config) {
		e.works(c)
		c.pool.workers, c.pool.endpoint.timeout = 1, time.Second
	}, nil)
	ids := commitTogether(t, a.store, sampleOrders(2))
	awaitRest(t, a, 0, 2)
	stop()
	require.Empty(t, logged(t, dir, troubleBegins))
	lines := logged(t, dir, attemptFailed)
	require.Len(t, lines, 1)
	require.Equal(t, ids[0].String(), lines[0]["order_id"])
	require.Equal(t, "no answer within 1s", lines[0]["error"])
}

func TestThePoolPausesWhileTheEndpointIsAway(t *testing.T) {
	t.Parallel()
	for _, workers := range []int{1, 8} {
		t.Run(fmt.Sprintf("%d workers", workers), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var worked diary[ulid.ULID]
			e := newUserEndpoint(t, withStatus(200))
			a, stop := openTestApp(t, dir, func(c *config) {
				e.works(c)
				c.pool.workers, c.pool.queue = workers, 16
			}, func(a *app) {
				post := a.pool.work
				a.pool.work = func(ctx context.Context, id ulid.ULID, attempt int) error {
					if attempt == 1 {
						worked.note(id)
					}
					return post(ctx, id, attempt)
				}
			})
			ids := commitTogether(t, a.store, sampleOrders(20))
			awaitRest(t, a, 0, 20)
			e.goAway()
			ids = append(ids, commitTogether(t, a.store, sampleOrders(feedRows))...)
			until(t, func() bool { return a.pool.failed.Load() >= int64(workers)+5 }, "the endpoint is tried again and again")
			require.Equal(t, 1.0, metric(t, base(a), "orderd_endpoint_down"))
			require.LessOrEqual(t, a.store.publishedTotals().processing, int64(workers)+5, "only what was tried is Processing")
			require.LessOrEqual(t, a.pool.parked.len(), workers+5)
			require.LessOrEqual(t, a.pool.active.Load(), int64(1))
			require.Equal(t, http.StatusOK, get(t, a, "/readyz").status)
			ids = append(ids, ulid.MustParse(place(t, a, "u", "i")))
			e.comeBack(t)
			awaitRest(t, a, 0, int64(len(ids)))
			require.Zero(t, metric(t, base(a), "orderd_endpoint_down"))
			if workers == 1 {
				require.Equal(t, ids, worked.read(), "first in, first out, while it was away too")
			}
			checkInvariants(t, a)
			stop()
			require.Len(t, logged(t, dir, troubleBegins), 1)
			require.Len(t, logged(t, dir, troubleEnds), 1)
			require.Empty(t, logged(t, dir, attemptFailed))
		})
	}
}

// TestAHandshakeThatHangsIsTrouble, and is known before a trial counts as an answer.
func TestAHandshakeThatHangsIsTrouble(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { silent.Close() })
	began := time.Now()
	err = posterTo("https://"+silent.Addr().String(), time.Minute).post(t.Context(), ulid.Make(), 1)
	require.ErrorAs(t, err, new(*trouble))
	require.Less(t, time.Since(began), trialLimit)
}

func TestPausesOfTheEndpointsTrouble(t *testing.T) {
	t.Parallel()
	since := time.Now()
	for i, want := range []time.Duration{100, 200, 400, 800, 1600, 3200, 5000, 5000} {
		require.Equal(t, want*time.Millisecond, (&trouble{since: since}).pauseEnd(int32(i+1)).Sub(since))
	}
	require.Equal(t, maxPoolPause, (&trouble{since: since}).pauseEnd(math.MaxInt32).Sub(since))
	date := func(after time.Duration) string { return time.Now().Add(after).UTC().Format(http.TimeFormat) }
	for _, tc := range []struct {
		header      string
		least, most time.Duration
	}{
		{header: ""}, {header: "0"}, {header: "-1"}, {header: "1.5"}, {header: "soon"}, {header: date(-time.Hour)},
		{header: "1", least: time.Second, most: time.Second},
		{header: "60", least: time.Minute, most: time.Minute},
		{header: "61", least: time.Minute, most: time.Minute},
		{header: "99999999999999999999", least: time.Minute, most: time.Minute},
		{header: date(50 * time.Second), least: time.Second, most: 50 * time.Second},
		{header: date(time.Hour), least: time.Minute, most: time.Minute},
	} {
		got := retryAfter(tc.header)
		require.True(t, tc.least <= got && got <= tc.most, "%q is %s", tc.header, got)
	}
}

func TestTheTroubleOfOneOrderStopsNoOther(t *testing.T) {
	t.Parallel()
	var mended atomic.Bool
	e := newUserEndpoint(t, nil)
	e.answers(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Idempotency-Key") == e.seen()[0].id && !mended.Load() {
			brokenOff(w, r)
		}
	})
	a := newTestApp(t, e.works)
	for range 20 {
		commitTogether(t, a.store, sampleOrders(5))
	}
	awaitRest(t, a, 1, 99)
	until(t, func() bool { return a.pool.failed.Load() >= 4 }, "it is tried again")
	mended.Store(true)
	awaitRest(t, a, 0, 100)
	checkInvariants(t, a)
}

func TestAnAttemptThatTheStopCutsOffIsMadeAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	e := newUserEndpoint(t, withoutAnswer)
	a, stop := openTestApp(t, dir, func(c *config) {
		e.works(c)
		c.drain = 100 * time.Millisecond
	}, nil)
	commitTogether(t, a.store, sampleOrders(3))
	until(t, func() bool { return len(e.seen()) == 3 })
	stop()
	require.Zero(t, a.pool.failed.Load())
	require.Empty(t, logged(t, dir, troubleBegins))
	require.Empty(t, logged(t, dir, attemptFailed))
	e.answers(withStatus(200))
	a, _ = openTestApp(t, dir, e.works, nil)
	awaitRest(t, a, 0, 3)
	require.Len(t, e.seen(), 6)
	for _, got := range e.seen() {
		require.Equal(t, "1", got.number, "attempts count from the start of the process")
	}
	checkInvariants(t, a)
}

func TestStopWhileTheEndpointIsInTrouble(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	e := newUserEndpoint(t, withStatus(503, "Retry-After", "60"))
	a, stop := openTestApp(t, dir, e.works, nil)
	commitTogether(t, a.store, sampleOrders(50))
	until(t, func() bool { return inTrouble(a) })
	began := time.Now()
	stop()
	require.Less(t, time.Since(began), 30*time.Second, "it does not wait for the pause")
	require.Empty(t, logged(t, dir, troubleEnds))
	e.answers(withStatus(200))
	a, _ = openTestApp(t, dir, e.works, nil)
	awaitRest(t, a, 0, 50)
	checkInvariants(t, a)
}

// TestTheEndpointByTLS takes everything from flags and variables.
func TestTheEndpointByTLS(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("needs a system that takes certificates from SSL_CERT_FILE")
	}
	var mu sync.Mutex
	var seen []string
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r.Proto+" "+r.URL.String()+" "+r.Header.Get("Authorization"))
	}))
	server.EnableHTTP2 = true
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	dir := t.TempDir()
	trusted := filepath.Join(dir, "trusted.pem")
	require.NoError(t, os.WriteFile(trusted, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600))

	p := startProcess(t, dir, nil, "-work", server.URL+"/a?b=c")
	require.Equal(t, http.StatusCreated, send(t.Context(), p.addr, http.MethodPost, "/orders", asJSON, exampleOrder).status)
	until(t, func() bool {
		return strings.Contains(send(t.Context(), p.addr, http.MethodGet, "/metrics", http.Header{"Accept": {"text/plain"}}, "").body, "\norderd_endpoint_down 1\n")
	}, "a certificate that nobody vouches for is trouble")
	p.stop(t)
	require.Empty(t, seen)
	require.Contains(t, logged(t, dir, troubleBegins)[0]["error"], "x509")

	p = startProcess(t, dir, []string{"SSL_CERT_FILE=" + trusted, "ORDERD_WORK_TOKEN=s3cret"}, "-work", server.URL+"/a?b=c")
	until(t, func() bool { sum, err := getSummary(p.url()); return err == nil && sum.TotalOrdersProcessed == 1 })
	p.stop(t)
	require.Equal(t, []string{"HTTP/2.0 /a?b=c Bearer s3cret"}, seen)
}

// ---- what is only time passing ----

// timed runs a test of a whole app, without sockets, in a bubble: there time
// passes only while everything waits, so that an hour takes no longer than what
// happens in it (see testing/synctest). stop ends the app and returns its log.
func timed(t *testing.T, change func(*config), before func(*app), test func(t *testing.T, a *app, stop func() string)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		lines := &transcript{}
		a := lookedAt(t, dir, func(c *config) {
			c.log.file, c.drain = logToStderr, 0
			if change != nil {
				change(c)
			}
		}, before, lines)
		require.NoError(t, a.start())
		require.NoError(t, a.listener.Close())
		stop := sync.OnceValue(func() string {
			assert.NoError(t, a.close(nil))
			return lines.String()
		})
		defer func() {
			stop()
			time.Sleep(time.Minute) // in which what was not waited for ends too
		}()
		test(t, a, stop)
	})
}

// asked is what a handler answers without a connection.
func asked(a *app, method, path string, header http.Header, body string) *httptest.ResponseRecorder {
	request := httptest.NewRequest(method, "http://localhost"+path, strings.NewReader(body))
	if header != nil {
		request.Header = header
	}
	recorder := httptest.NewRecorder()
	a.server.http.Handler.ServeHTTP(recorder, request)
	return recorder
}

// pipes is a listener whose connections are in memory.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if conn, ok := <-p; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}

func (p pipes) Close() error   { close(p); return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// TestTimesOfAConnection sends requests in parts, each after a pause, and sees
// when the answer comes and when the connection ends.
func TestTimesOfAConnection(t *testing.T) {
	t.Parallel()
	const second, minute = time.Second, time.Minute
	type part struct {
		after time.Duration
		text  string
	}
	const live, rest = "GET /livez HTTP/1.1\r\n", "Host: localhost\r\n\r\n"
	const begun = "POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
	const wait = " HTTP/1.1\r\nPrefer: wait=60\r\n" + rest
	create := string(postRequest(exampleOrder))
	for _, test := range []struct {
		name     string
		parts    []part
		status   int           // of the last answer; 0 for none
		answered time.Duration // after the first part
		ended    time.Duration // the connection
	}{
		{"nothing is sent", nil, 0, 0, 10 * second},
		{"a header that comes slowly", []part{{0, live}, {9 * second, "Host: localhost\r\nX: y"}}, 0, 0, 10 * second},
		{"a header that comes just in time", []part{{0, live}, {9 * second, rest}}, 200, 9 * second, 2*minute + 9*second},
		{"a body that comes slowly", []part{{0, begun}, {29 * second, " "}}, 408, 30 * second, 30 * second},
		{"a body that comes just in time", []part{{0, create[:150]}, {29 * second, create[150:]}}, 201, 29 * second, 2*minute + 29*second},
		{"an idle connection that is used again", []part{{0, live + rest}, {2*minute - second, live + rest}}, 200, 2*minute - second, 4*minute - second},
		{"the longest wait", []part{{0, "GET /orders/ID" + wait}}, 200, minute, 3 * minute},
		{"a wait that ends with its order", []part{{0, "GET /orders/SOON" + wait}}, 200, 50 * second, 2*minute + 50*second},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			timed(t, nil, func(a *app) {
				a.pool.work = onOrders(a, func(ctx context.Context, o order) error {
					took := time.Hour
					if o.itemIDs == "soon" {
						took = 50 * second
					}
					return simulate(took)(ctx, o.id, 1)
				})
			}, func(t *testing.T, a *app, stop func() string) {
				placed, listener := time.Now(), make(pipes)
				served := make(chan error, 1)
				go func() { served <- a.server.serve(listener) }()
				ids := commitTogether(t, a.store, []*creation{{order: order{userID: "u", itemIDs: "long"}}, {order: order{userID: "u", itemIDs: "soon"}}})
				until(t, func() bool { return a.store.publishedTotals().processing == 2 })
				require.Less(t, time.Since(placed), 100*time.Millisecond, "a step does not wait long for a create's fsync")
				client, server := net.Pipe()
				listener <- server
				began := time.Now()
				go func() {
					for _, p := range test.parts {
						time.Sleep(p.after)
						client.Write([]byte(strings.NewReplacer("ID", ids[0].String(), "SOON", ids[1].String()).Replace(p.text)))
					}
				}()
				status, answered := 0, time.Duration(0)
				for r := bufio.NewReader(client); ; {
					response, err := http.ReadResponse(r, nil)
					if err != nil {
						break
					}
					io.Copy(io.Discard, response.Body)
					status, answered = response.StatusCode, time.Since(began)
				}
				require.Equal(t, test.status, status)
				require.InDelta(t, test.answered.Seconds(), answered.Seconds(), 0.1)
				require.InDelta(t, test.ended.Seconds(), time.Since(began).Seconds(), 0.6, "SetReadDeadline's rest at the end takes half a second")
				client.Close()
				a.server.shutdown(time.Now())
				require.ErrorIs(t, <-served, http.ErrServerClosed)
				if test.name == "the longest wait" {
					line := linesOf(t, stop(), "request")[0]
					require.InDelta(t, 60e6, line["us"], 1e4, "microseconds")
					require.Equal(t, began.Format(time.RFC3339Nano), line["time"])
				}
			})
		})
	}
}

// TestPausesBetweenAttempts has orders fail in every way, beside others that do
// not: these are not held up, and those are tried again after pauses that
// double up to a minute.
func TestPausesBetweenAttempts(t *testing.T) {
	t.Parallel()
	worst := 3
	for text, fail := range map[string]func() error{
		"panic: boom": func() error { panic("boom") },
		"panic: runtime error: index out of range [3] with length 0": func() error { return []error{}[worst] },
		"no stock": func() error { return errors.New("no stock") },
	} {
		t.Run(text, func(t *testing.T) {
			t.Parallel()
			const failing, attempts = 3, 14
			var first ulid.ULID
			var at [attempts + 1]time.Time // of its attempts
			timed(t, func(c *config) { c.pool.workers, c.pool.queue = 1, 1 }, func(a *app) {
				a.pool.work = func(_ context.Context, id ulid.ULID, attempt int) error {
					if first.IsZero() {
						first = id
					}
					switch {
					case id == first:
						at[attempt-1] = time.Now()
						if attempt <= attempts {
							return fail()
						}
					case a.store.publishedTotals().accepted <= failing || attempt > 1 && attempt < 9:
						return fail()
					}
					return nil
				}
			}, func(t *testing.T, a *app, stop func() string) {
				ids := commitTogether(t, a.store, sampleOrders(failing))
				until(t, func() bool { return a.store.publishedTotals().processing == failing }, "more than worker and queue have places for")
				for n := range int64(20) {
					require.NoError(t, a.store.create(sampleOrder(1, "")))
					until(t, func() bool { return a.store.publishedTotals().completed >= n+1 }, "another order is not held up")
				}
				time.Sleep(10 * time.Minute)
				awaitRest(t, a, 0, 20+failing)
				for i := range attempts {
					want := min(firstRetry<<i, time.Minute)
					require.WithinRange(t, at[i+1], at[i].Add(want), at[i].Add(want+2*tickLength), "attempt %d", i+2)
				}
				require.Equal(t, ids[0], first)
				took := float64(rowOf(t, a.store, first).tookMicros) / 1e6
				require.InDelta(t, at[attempts].Sub(at[0]).Seconds(), took, 0.01, "the pauses count as processing")
				checkInvariants(t, a)
				told := linesOf(t, stop(), attemptFailed)[0]
				require.Equal(t, []any{"WARN", first.String(), text, "100ms"}, []any{told["level"], told["order_id"], told["error"], told["retry_in"]})
			})
		})
	}
}

// TestTheEndpointsTroublePausesThePool has 100 orders and all workers meet with
// trouble: one order at a time is tried, after pauses that double up to five
// seconds or are as long as the endpoint asks, and a time-out is no answer.
func TestTheEndpointsTroublePausesThePool(t *testing.T) {
	t.Parallel()
	const workers, trials = 4, 20
	var mu sync.Mutex
	var at []time.Time
	timed(t, func(c *config) { c.pool.workers = workers }, func(a *app) {
		var first sync.WaitGroup // each worker's first attempt ends with the others'
		first.Add(workers)
		a.pool.work = func(context.Context, ulid.ULID, int) error {
			mu.Lock()
			at = append(at, time.Now())
			n := len(at) - workers // trials
			mu.Unlock()
			if n <= 0 {
				first.Done()
				first.Wait()
			}
			switch {
			case n <= trials:
				return &trouble{error: errors.New("down"), since: time.Now()}
			case n == trials+1:
				return &trouble{error: errors.New("asks"), since: time.Now(), retryAfter: 40 * time.Second}
			case n == trials+2:
				return errors.New("no answer within 30s")
			case n == trials+3:
				return &refusal{errors.New("no stock")}
			}
			return nil
		}
	}, func(t *testing.T, a *app, stop func() string) {
		commitTogether(t, a.store, sampleOrders(100))
		until(t, func() bool { return inTrouble(a) })
		require.LessOrEqual(t, a.store.publishedTotals().processing, int64(workers))
		time.Sleep(150 * time.Second)
		awaitRest(t, a, 0, 100)
		pause := firstRetry
		for i, began := range at[workers : workers+trials] {
			require.WithinRange(t, began, at[workers+i-1].Add(pause), at[workers+i-1].Add(pause+2*tickLength), "trial %d", i)
			pause = min(2*pause, maxPoolPause)
		}
		last := at[workers+trials-1:]
		for i, want := range []time.Duration{maxPoolPause, 40 * time.Second, maxPoolPause} {
			require.Equal(t, want, last[i+1].Sub(last[i]).Truncate(time.Second))
		}
		require.Less(t, last[4].Sub(last[3]), time.Second, "any answer ends it")
		require.Less(t, last[len(last)-1].Sub(last[3]), 6*time.Second, "and all that met with it go on")
		checkInvariants(t, a)
		log := stop()
		require.Len(t, linesOf(t, log, troubleBegins), 1)
		require.Len(t, linesOf(t, log, troubleEnds), 1)
		require.InDelta(t, 2, len(linesOf(t, log, "the endpoint is still in trouble")), 1, "one a minute")
	})
}

// TestASlowTrialHoldsNobody has the endpoint come back, and be long busy with the
// order by which that is found out.
func TestASlowTrialHoldsNobody(t *testing.T) {
	t.Parallel()
	const workers = 4
	var attempts atomic.Int64
	timed(t, func(c *config) { c.pool.workers = workers }, func(a *app) {
		var first sync.WaitGroup // each worker's first attempt ends with the others'
		first.Add(workers)
		a.pool.work = func(ctx context.Context, _ ulid.ULID, _ int) error {
			switch n := attempts.Add(1); {
			case n <= workers:
				first.Done()
				first.Wait()
				return &trouble{error: errors.New("down"), since: time.Now()}
			case n == workers+1: // the trial
				sleep(ctx, 10*trialLimit)
			}
			return nil
		}
	}, func(t *testing.T, a *app, stop func() string) {
		commitTogether(t, a.store, sampleOrders(100))
		time.Sleep(maxPoolPause + trialLimit)
		require.EqualValues(t, 99, a.store.publishedTotals().completed, "all but the one that is at work")
		time.Sleep(10 * trialLimit)
		awaitRest(t, a, 0, 100)
		checkInvariants(t, a)
		require.Len(t, linesOf(t, stop(), troubleEnds), 1)
	})
}

// TestFailuresFillNoLog has a thousand orders fail at once.
func TestFailuresFillNoLog(t *testing.T) {
	t.Parallel()
	timed(t, nil, func(a *app) {
		a.pool.work = func(_ context.Context, _ ulid.ULID, attempt int) error {
			if attempt <= 5 {
				return errors.New("no stock")
			}
			return nil
		}
	}, func(t *testing.T, a *app, stop func() string) {
		commitTogether(t, a.store, sampleOrders(1000))
		awaitRest(t, a, 0, 1000)
		failed := a.pool.failed.Load()
		lines := linesOf(t, stop(), attemptFailed)
		require.LessOrEqual(t, len(lines), 3*linesASecond)
		require.Greater(t, len(lines), linesASecond)
		told := 0.0
		for _, line := range lines {
			told += 1 + line["left_out"].(float64)
		}
		require.Greater(t, told, 1000.0, "a line tells how many were left out")
		require.LessOrEqual(t, told, float64(failed))
	})
}

// countingEngine notes when it is asked, and fails or hangs as told.
type countingEngine struct {
	engine

	mu        sync.Mutex         // guards the rest
	fail      func(*batch) error // before the commit; or nil
	hold      chan struct{}      // what tidy waits for, or nil
	commits   diary[time.Time]   // since tell
	failReads int                // of the backlog, that are left
	reads     diary[time.Time]   // of it
}

// requirePauses of the same length between two moments each.
func requirePauses(t *testing.T, pause time.Duration, moments []time.Time) {
	t.Helper()
	for i := range moments[1:] {
		require.Equal(t, pause, moments[i+1].Sub(moments[i]))
	}
}

// tell what is to happen from now on.
func (e *countingEngine) tell(fail func(*batch) error, hold chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fail, e.hold = fail, hold
	e.commits.forget()
}

func (e *countingEngine) commit(b *batch) error {
	e.mu.Lock()
	e.commits.note(time.Now())
	fail := e.fail
	e.mu.Unlock()
	if fail != nil {
		if err := fail(b); err != nil {
			return err
		}
	}
	return e.engine.commit(b)
}

func (e *countingEngine) tidy() (totals, error) {
	e.mu.Lock()
	hold := e.hold
	e.mu.Unlock()
	if hold != nil {
		<-hold
	}
	return e.engine.tidy()
}

func (e *countingEngine) backlog(after int64, limit int) ([]queued, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.reads.note(time.Now())
	if e.failReads--; e.failReads >= 0 {
		return nil, errors.New("input/output error")
	}
	return e.engine.backlog(after, limit)
}

// counted puts a countingEngine into an app.
func counted(e *countingEngine) func(*app) {
	return func(a *app) {
		e.engine = a.store.engine
		a.store.engine, a.store.writer.engine = e, e
	}
}

// TestAFailedWriteIsTriedAgainOnceASecond and until then orders are refused at
// once, those in the batch and those behind it, with a reason. Steps are kept.
func TestAFailedWriteIsTriedAgainOnceASecond(t *testing.T) {
	t.Parallel()
	e := &countingEngine{}
	var gate chan struct{}
	timed(t, nil, func(a *app) {
		gate = make(chan struct{}) // in the bubble; each value ends the work on one order
		a.pool.work = hold(gate)
		counted(e)(a)
	}, func(t *testing.T, a *app, stop func() string) {
		first := sampleOrder(1, "key")
		require.NoError(t, a.store.create(first))
		require.NoError(t, a.store.create(sampleOrder(2, "")))
		until(t, func() bool { return a.store.publishedTotals().processing == 2 })
		before := a.store.publishedTotals()
		full := func(b *batch) error {
			b.totals = before
			return fmt.Errorf("%w: no space left on device", errNotWritten)
		}
		refused := make(chan error, 2)
		create := func() { refused <- a.store.create(sampleOrder(3, "new")) }
		e.tell(func(b *batch) error { // a create and a step are behind the batch that fails
			e.tell(full, nil)
			go create()
			gate <- struct{}{}
			time.Sleep(time.Millisecond)
			return full(b)
		}, nil)
		gate <- struct{}{}
		time.Sleep(time.Millisecond)
		go create() // it shares the batch of the step, and its failure
		time.Sleep(2 * time.Millisecond)
		require.Len(t, refused, 2, "nobody waits for the next attempt")
		require.ErrorIs(t, <-refused, errUnwritable)
		require.ErrorIs(t, <-refused, errUnwritable)
		time.Sleep(retryPause / 2)
		began := time.Now()
		for range 3 {
			again, other, fresh := sampleOrder(1, "key"), sampleOrder(2, "key"), sampleOrder(3, "new")
			require.NoError(t, a.store.create(again), "a key that has created is answered")
			require.True(t, again.replayed)
			require.Equal(t, first.id, again.id)
			require.ErrorIs(t, a.store.create(other), errKeyReused)
			require.ErrorIs(t, a.store.create(fresh), errUnwritable)
		}
		require.Less(t, time.Since(began), 10*time.Millisecond, "nobody waits for the next attempt")
		require.Equal(t, http.StatusServiceUnavailable, asked(a, http.MethodGet, "/readyz", nil, "").Code)
		e.tell(full, nil)
		time.Sleep(10*time.Second + 10*time.Millisecond)
		commits := e.commits.read()
		require.Len(t, commits, 10)
		requirePauses(t, retryPause, commits)
		require.Equal(t, http.StatusServiceUnavailable, asked(a, http.MethodPost, "/orders", asJSON, exampleOrder).Code)
		e.tell(nil, nil)
		time.Sleep(retryPause)
		require.NoError(t, a.store.create(sampleOrder(3, "new")), "the refused key is free")
		awaitRest(t, a, 1, 2)
		gate <- struct{}{}
		awaitRest(t, a, 0, 3)
		checkInvariants(t, a)
		log := stop()
		require.Len(t, linesOf(t, log, refusedUntil), 1)
		require.Len(t, linesOf(t, log, "orders are accepted again"), 1)
	})
}

// TestAStoreThatHasFailedIsNotDrained: what is at work cannot be completed.
func TestAStoreThatHasFailedIsNotDrained(t *testing.T) {
	t.Parallel()
	dir, e := t.TempDir(), &countingEngine{}
	var stderr transcript
	a := lookedAt(t, dir, func(c *config) { c.drain = time.Hour }, func(a *app) {
		a.pool.work = hold(nil)
		counted(e)(a)
	}, &stderr)
	require.NoError(t, a.start())
	ended := make(chan error, 1)
	go func() { ended <- a.serve(t.Context()) }()
	require.NoError(t, a.store.create(sampleOrder(1, "")))
	until(t, func() bool { return a.store.publishedTotals().processing == 1 })
	e.tell(func(*batch) error { return fmt.Errorf("%w: a page is damaged;\nrestore it", errBroken) }, nil)
	require.ErrorIs(t, a.store.create(sampleOrder(2, "")), errUnwritable)
	err := <-ended
	require.ErrorIs(t, err, errBroken)
	require.Equal(t, 1, report(errors.Join(err, io.EOF), &stderr))
	require.Regexp(t, `(?m)^orderd: .*a page is damaged.*restore it; EOF$`, stderr.String(), "in one line")
}

// TestABacklogThatCannotBeReadIsTriedAgain once a second.
func TestABacklogThatCannotBeReadIsTriedAgain(t *testing.T) {
	t.Parallel()
	e := &countingEngine{failReads: 3}
	timed(t, nil, counted(e), func(t *testing.T, a *app, stop func() string) {
		commitTogether(t, a.store, sampleOrders(5))
		awaitRest(t, a, 0, 5)
		requirePauses(t, retryPause, e.reads.read()[:4])
		seq := a.store.publishedTotals().seq
		time.Sleep(time.Hour)
		require.Equal(t, seq, a.store.publishedTotals().seq, "an idle service writes nothing")
		require.Len(t, linesOf(t, stop(), "the backlog cannot be read"), 3)
	})
}

// TestMetricsThatCannotBeWrittenAreTriedAgain once a second; orders go on.
func TestMetricsThatCannotBeWrittenAreTriedAgain(t *testing.T) {
	t.Parallel()
	timed(t, nil, nil, func(t *testing.T, a *app, stop func() string) {
		execOn(t, a.metrics.file.path, "CREATE TRIGGER held BEFORE UPDATE ON totals BEGIN SELECT RAISE(ABORT, 'held'); END")
		var tries diary[time.Time]
		a.metrics.beforeProject = func() { tries.note(time.Now()) }
		commitTogether(t, a.store, sampleOrders(5))
		time.Sleep(5*retryPause + retryPause/2)
		require.Equal(t, summary{OrdersCompleted: 5}, a.metrics.summarize(a.store.publishedTotals()), "what is processed is counted later")
		failed := tries.read()
		require.InDelta(t, 6, len(failed), 1)
		requirePauses(t, retryPause, failed)
		execOn(t, a.metrics.file.path, "DROP TRIGGER held")
		awaitRest(t, a, 0, 5)
		require.Len(t, linesOf(t, stop(), "metrics.db cannot be written; its counts lag until it can"), len(tries.read())-1)
	})
}

// TestReadyTellsOfADiskThatHangs in a commit, or in a checkpoint between two.
func TestReadyTellsOfADiskThatHangs(t *testing.T) {
	t.Parallel()
	for _, inCommit := range []bool{true, false} {
		t.Run(fmt.Sprintf("in a commit %v", inCommit), func(t *testing.T) {
			t.Parallel()
			e := &countingEngine{}
			timed(t, nil, counted(e), func(t *testing.T, a *app, _ func() string) {
				time.Sleep(time.Minute)
				synctest.Wait()
				require.NoError(t, a.store.ready(), "a look at an idle engine ends")
				gate := make(chan struct{})
				if inCommit {
					e.tell(func(*batch) error { <-gate; return nil }, nil)
				} else {
					e.tell(nil, gate)
				}
				done := make(chan error, 1)
				go func() { done <- a.store.create(sampleOrder(1, "")) }()
				synctest.Wait()
				time.Sleep(stalledAfter)
				require.NoError(t, a.store.ready())
				require.Equal(t, http.StatusOK, asked(a, http.MethodGet, "/readyz", nil, "").Code)
				time.Sleep(time.Nanosecond)
				require.ErrorIs(t, a.store.ready(), errStalled)
				got := asked(a, http.MethodGet, "/readyz", nil, "")
				require.Equal(t, http.StatusServiceUnavailable, got.Code)
				require.Contains(t, got.Body.String(), "a write has taken more than 2s")
				require.Equal(t, http.StatusOK, asked(a, http.MethodGet, "/orders", nil, "").Code, "asking goes on")
				close(gate)
				require.NoError(t, <-done)
				awaitRest(t, a, 0, 1)
				require.NoError(t, a.store.ready())
			})
		})
	}
}

// TestDrain has work that ends in time, and work that does not: then it is cut
// off at the deadline, and made again after the next start.
func TestDrain(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name        string
		drain, work time.Duration
		took        time.Duration // the stop
		want        status
	}{
		{"waits for running work", time.Minute, 40 * time.Second, 39 * time.Second, completed},
		{"ends running work at the deadline", 20 * time.Second, 24 * time.Hour, 20 * time.Second, processing},
		{"ends running work at once without a drain time", 0, 24 * time.Hour, 0, processing},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := ""
			timed(t, func(c *config) { c.pool.workers, c.drain, c.pool.delay = 1, test.drain, test.work }, nil, func(t *testing.T, a *app, stop func() string) {
				dir = filepath.Dir(a.cfg.data)
				ids := commitTogether(t, a.store, sampleOrders(2))
				synctest.Wait()
				time.Sleep(time.Second)
				began := time.Now()
				stop()
				synctest.Wait()
				require.InDelta(t, test.took.Seconds(), time.Since(began).Seconds(), 0.1)
				require.ErrorIs(t, a.pool.workCtx.Err(), context.Canceled)
				require.Zero(t, a.pool.active.Load(), "no work goes on")
				b, stopAgain := openIdle(t, dir, func(c *config) { c.log.file = logToStderr }, nil)
				require.Equal(t, []status{test.want, pending}, []status{rowOf(t, b.store, ids[0]).status, rowOf(t, b.store, ids[1]).status})
				checkInvariants(t, b)
				stopAgain()
			})
			a, _ := openTestApp(t, dir, nil, nil)
			awaitRest(t, a, 0, 2)
			checkInvariants(t, a)
		})
	}
}

// TestParkedOrdersAreBounded has every place for a pause taken: the feeder waits.
func TestParkedOrdersAreBounded(t *testing.T) {
	t.Parallel()
	timed(t, nil, func(a *app) {
		for range maxParked {
			a.pool.parked.park(job{}, time.Now().Add(time.Hour))
		}
	}, func(t *testing.T, a *app, _ func() string) {
		ids := commitTogether(t, a.store, sampleOrders(5))
		time.Sleep(time.Minute)
		require.Zero(t, len(a.pool.channel))
		require.EqualValues(t, 5, a.store.publishedTotals().pending())
		a.pool.parked.mu.Lock()
		a.pool.parked.jobs = jobHeap{}
		a.pool.parked.mu.Unlock()
		awaitRest(t, a, 0, int64(len(ids)))
		checkInvariants(t, a)
	})
}

// TestOrdersAreKeptAsLongAsTold for an hour: no shorter, and hardly longer.
func TestOrdersAreKeptAsLongAsTold(t *testing.T) {
	t.Parallel()
	var ahead atomic.Int64 // of the clock
	timed(t, func(c *config) {
		c.store.keep, c.pool.workers, c.pool.delay = time.Hour, 1000, 30*time.Minute
		c.store.now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	}, nil, func(t *testing.T, a *app, stop func() string) {
		removed := func() int64 { return a.store.publishedTotals().removed }
		commitTogether(t, a.store, sampleOrders(3*expiryRows))
		time.Sleep(30*time.Minute + time.Second)
		awaitRest(t, a, 0, 3*expiryRows)
		time.Sleep(time.Hour - time.Minute)
		require.Zero(t, removed(), "the time counts from the completion")
		time.Sleep(2*time.Minute + 2*time.Second)
		require.EqualValues(t, 3*expiryRows, removed())
		commitTogether(t, a.store, sampleOrders(5))
		time.Sleep(30*time.Minute + time.Second)
		awaitRest(t, a, 0, 3*expiryRows+5)
		ahead.Store(int64(25 * time.Hour))
		time.Sleep(10 * time.Minute)
		require.EqualValues(t, 3*expiryRows, removed(), "the clock's jump is not believed")
		ahead.Store(int64(2 * time.Hour))
		time.Sleep(10 * time.Minute)
		require.EqualValues(t, 3*expiryRows+5, removed())
		require.Len(t, linesOf(t, stop(), "the clock has jumped ahead: no order is removed until it is back, or orderd is started again"), 1)
	})
}

func TestParkedOrdersReturnInTheSequenceOfTheirTimes(t *testing.T) {
	t.Parallel()
	p := newParking()
	const n = 3*heapChunk + 5
	for range n {
		p.park(job{}, p.epoch.Add(time.Duration(rand.Int64N(int64(time.Minute)))))
	}
	require.Equal(t, n, p.len())
	_, ok := p.unpark(p.epoch)
	require.False(t, ok, "none is due")
	var last tick
	for range n {
		j, ok := p.unpark(p.epoch.Add(2 * time.Minute))
		require.True(t, ok)
		require.GreaterOrEqual(t, j.due, last)
		last = j.due
	}
	require.Zero(t, p.len())
	require.Empty(t, p.jobs.chunks, "the memory is given back")

	p.park(job{}, p.epoch.Add(tickLength+1))
	_, ok = p.unpark(p.epoch.Add(tickLength))
	require.False(t, ok, "not before its time, though in the same tick")
	_, ok = p.unpark(p.epoch.Add(2 * tickLength))
	require.True(t, ok)

	wrapped := p.epoch.Add(math.MaxUint32 * tickLength)
	p.park(job{attempts: 2}, wrapped.Add(time.Minute))
	p.park(job{attempts: 1}, wrapped.Add(-time.Minute))
	for want := range int32(2) {
		j, ok := p.unpark(wrapped.Add(2 * time.Minute))
		require.True(t, ok)
		require.Equal(t, want+1, j.attempts, "also where ticks start anew")
	}
}

// ---- metrics.go ----

// bytesOf is what a file holds, if there is one.
func bytesOf(tb testing.TB, path string) string {
	tb.Helper()
	text, err := os.ReadFile(path)
	if !errors.Is(err, os.ErrNotExist) {
		require.NoError(tb, err)
	}
	return string(text)
}

func TestAverageIsOverCompletedOrders(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, stop := openIdle(t, dir, nil, nil)
	average := func() float64 { return a.metrics.summarize(a.store.publishedTotals()).AverageProcessingTime }
	require.Zero(t, average())
	ids := commitTogether(t, a.store, sampleOrders(5))
	moveTo(t, a.store, ids[4], processing, 0)
	for i, tc := range []struct {
		took int64 // µs
		want float64
	}{{1_000_000, 1}, {2_000_000, 1.5}, {0, 1}, {6_000_000, 2.25}} {
		moveTo(t, a.store, ids[i], completed, tc.took)
		checkInvariants(t, a)
		require.Equal(t, tc.want, average())
	}
	stop()
	a, _ = openIdle(t, dir, nil, nil)
	require.Equal(t, 2.25, average())
}

func TestHistogramCountsByUpperBound(t *testing.T) {
	t.Parallel()
	h := newHistogram([]float64{0.5, 1, 2})
	for _, v := range []float64{0, 0.5, 0.75, 1, 1.5, 2, 2.5, 1e6} {
		h.observe(v)
	}
	var e exposition
	e.buckets("x_seconds", "What it is.", &h)
	require.Equal(t, `# HELP x_seconds What it is.
# TYPE x_seconds histogram
x_seconds_bucket{le="0.5"} 2
x_seconds_bucket{le="1"} 4
x_seconds_bucket{le="2"} 6
x_seconds_bucket{le="+Inf"} 8
x_seconds_sum 1.00000825e+06
x_seconds_count 8
`, string(e.text))

	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				h.observe(2)
			}
		})
	}
	wg.Wait()
	require.Equal(t, []uint64{2, 2, 2 + 8000, 2}, h.counts, "from many goroutines")
	require.Equal(t, 1000008.25+16000, h.sum)
	for _, bounds := range [][]float64{latencyBounds, durationBounds, commitSizeBounds} {
		require.IsIncreasing(t, bounds)
	}
}

// TestProcessFigures compares them with what the system tells of the process.
func TestProcessFigures(t *testing.T) {
	t.Parallel()
	needs(t, "sh")
	before := time.Now()
	p := startWrapped(t, []string{"sh", "-c", `ulimit -n 200; exec "$@"`, "sh"}, t.TempDir(), nil)
	figure := func(name string) float64 { return metric(t, p.url(), name) }
	require.InDelta(t, float64(before.Unix()), figure("process_start_time_seconds"), time.Since(before).Seconds()+1)
	require.GreaterOrEqual(t, figure("go_goroutines"), 10.0)
	require.Equal(t, 1.0, figure(fmt.Sprintf(`go_info{version="%s"}`, runtime.Version())))
	require.Equal(t, 1.0, figure("orderd_ready"))
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		t.Skip("needs /proc: ", err)
	}
	require.Equal(t, 200.0, figure("process_max_fds"))
	alone := figure("process_open_fds")
	for range 20 {
		conn, err := net.Dial("tcp", p.addr)
		require.NoError(t, err)
		defer conn.Close()
	}
	until(t, func() bool { return figure("process_open_fds") >= alone+19 }, "they are accepted")
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	require.NoError(t, err)
	require.InDelta(t, len(open), figure("process_open_fds"), 1)
	newJournal("load", 0).place(t, p.url(), 300)
	used, _ := p.cpu()
	require.InDelta(t, used.Seconds(), figure("process_cpu_seconds_total"), 0.5)
	require.InEpsilon(t, p.residentMB(t)*(1<<20), figure("process_resident_memory_bytes"), 0.2)
}

// ---- log.go ----

func openTestLog(t *testing.T, o logOptions) *logger {
	t.Helper()
	l, err := openLog(o, io.Discard)
	require.NoError(t, err)
	return l
}

func testLogOptions(t *testing.T) logOptions {
	return logOptions{file: filepath.Join(t.TempDir(), "logs", "orderd.log"), maxMB: 1, backups: 2}
}

// flushed reports whether no line waits.
func (b *lineBuffer) flushed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.buffer) == 0
}

// TestLogRotation keeps the file and two compressed old ones.
func TestLogRotation(t *testing.T) {
	t.Parallel()
	o := testLogOptions(t)
	l, dir := openTestLog(t, o), filepath.Dir(o.file)
	text := strings.Repeat("x", 1000)
	const lines = 6000
	for i := range lines {
		l.Info(text, "n", i)
		if i%200 == 199 {
			nudge(l.wake)
			until(t, l.flushed)
		}
	}
	require.NoError(t, l.close())
	require.Zero(t, l.dropped.Load())
	until(t, func() bool {
		plain, _ := filepath.Glob(filepath.Join(dir, "orderd*.log"))
		packed, _ := filepath.Glob(filepath.Join(dir, "orderd*.gz"))
		return len(plain) == 1 && len(packed) == 2 && len(namesIn(t, dir)) == 4 // with the lock
	}, "two old ones are left")
	newest, last := bytesOf(t, o.file), 0.0
	require.LessOrEqual(t, len(newest), 1<<20)
	for line := range strings.Lines(newest) {
		last = decoded[map[string]any](t, line)["n"].(float64)
	}
	require.EqualValues(t, lines-1, last, "the newest file ends with the newest line")
	var sizes int64
	for _, name := range append(namesIn(t, dir), ".") {
		info, err := os.Stat(filepath.Join(dir, name))
		require.NoError(t, err)
		sizes += info.Size()
		require.True(t, info.Mode().Perm()&0o077 == 0 || runtime.GOOS == "windows", "%s is %s", name, info.Mode())
	}
	require.Less(t, sizes, int64(3<<20))
}

// TestOldLogsAreRemoved after so many days, or never.
func TestOldLogsAreRemoved(t *testing.T) {
	t.Parallel()
	for _, days := range []int{3, 0} {
		o := testLogOptions(t)
		o.days, o.backups = days, 10
		dir := filepath.Dir(o.file)
		require.NoError(t, os.MkdirAll(dir, 0o700))
		var kept []string
		for _, age := range []int{4, 2} {
			name := time.Now().UTC().AddDate(0, 0, -age).Format("orderd-2006-01-02T15-04-05.000.log.gz")
			kept = append(kept, filepath.Join(dir, name))
			require.NoError(t, os.WriteFile(kept[len(kept)-1], nil, 0o600))
		}
		l := openTestLog(t, o)
		for range 2 { // a file's end is when the old ones are looked at
			l.Info(strings.Repeat("x", 500_000))
			nudge(l.wake)
			until(t, l.flushed)
		}
		l.Info(strings.Repeat("x", 300_000))
		require.NoError(t, l.close())
		until(t, func() bool { // it works on in the directory, which is to go
			packed, _ := filepath.Glob(filepath.Join(dir, "orderd-*.gz"))
			plain, _ := filepath.Glob(filepath.Join(dir, "orderd-*.log"))
			return len(plain) == 0 && slices.ContainsFunc(packed, func(path string) bool { return !slices.Contains(kept, path) })
		}, "the file that was full is compressed")
		if days > 0 {
			until(t, func() bool { return !exists(kept[0]) }, "the older one is removed")
		}
		require.Equal(t, days == 0, exists(kept[0]))
		require.FileExists(t, kept[1])
	}
}

// TestLogFileMoved moves the file away in every way, each time in the middle of
// a write. The write after that must follow the name.
func TestLogFileMoved(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("an open file cannot be moved there")
	}
	o := testLogOptions(t)
	f, err := openLogFile(o)
	require.NoError(t, err)
	kept, written := t.TempDir(), 0
	write := func() {
		_, err := fmt.Fprintln(f, written)
		require.NoError(t, err)
		written++
	}
	ways := []func(away string) error{
		func(away string) error { return os.Rename(o.file, away) },
		func(away string) error { return os.Rename(filepath.Dir(o.file), away) },
		func(away string) error { // logrotate's "create"
			err := os.Rename(o.file, away)
			made, createErr := os.OpenFile(o.file, os.O_CREATE|os.O_WRONLY, 0o600)
			return errors.Join(err, createErr, made.Close())
		},
	}
	write()
	for i := range many(900) {
		moved := make(chan error)
		go func() {
			for range i % 20 { // another moment each time
				runtime.Gosched()
			}
			moved <- ways[i%len(ways)](filepath.Join(kept, strconv.Itoa(i)))
		}()
		write()
		require.NoError(t, <-moved)
		write()
		require.True(t, strings.HasSuffix(bytesOf(t, o.file), fmt.Sprintln(written-1)), "round %d", i)
	}
	require.NoError(t, f.close())
	found := strings.Fields(bytesOf(t, o.file))
	require.NoError(t, filepath.WalkDir(kept, func(path string, entry fs.DirEntry, err error) error {
		if entry.Type().IsRegular() && filepath.Ext(path) != ".gz" {
			found = append(found, strings.Fields(bytesOf(t, path))...)
		}
		return err
	}))
	slices.Sort(found)
	require.Len(t, slices.Compact(found), written, "every line is somewhere")
}

// TestLogRefuses what is not a file that the log may rotate, and leaves it as
// it was.
func TestLogRefuses(t *testing.T) {
	t.Parallel()
	const stream = `: it is not a regular file \("-log -" logs to stderr, "-log - 2>\S+" nowhere\); choose another with -log$`
	const own = `: it is orderd's own orders\.db; choose another with -log$`
	for _, test := range []struct {
		name  string
		log   string // in the directory of the test, which holds what is made below
		there bool   // orders.db is
		needs string // what not every system can make
		says  string
	}{
		{name: "a device", log: os.DevNull, says: stream},
		{name: "a directory", log: "data", says: stream},
		{name: "a pipe", log: "pipe", needs: "pipe", says: stream},
		{name: "a link to a file", log: "link", needs: "link", says: stream},
		{name: "a link to nothing", log: "astray", needs: "astray", says: stream},
		{name: "orders.db", log: "data/orders.db", there: true, says: own},
		{name: "orders.db to be", log: "data/orders.db", says: own},
		{name: "orders.db with a slash behind", log: "data/orders.db/", says: own},
		{name: "orders.db in capitals, to be", log: "data/ORDERS.DB", says: own},
		{name: "orders.db by a hard link", log: "orders.log", there: true, needs: "orders.log", says: own},
		{name: "orders.db by another way", log: "way/../way/orders.db", there: true, needs: "way", says: own},
		{name: "orders.db to be, by another way", log: "way/./orders.db", needs: "way", says: own},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			in := func(name string) string { return filepath.Join(dir, name) }
			require.NoError(t, os.Mkdir(in("data"), 0o700))
			require.NoError(t, os.WriteFile(in("file"), []byte("text"), 0o600))
			if test.there {
				require.NoError(t, os.WriteFile(in("data/orders.db"), []byte("orders"), 0o600))
				os.Link(in("data/orders.db"), in("orders.log"))
			}
			os.Symlink("file", in("link"))
			os.Symlink("nothing", in("astray"))
			os.Symlink("data", in("way"))
			exec.Command("mkfifo", in("pipe")).Run()
			if !exists(in(test.needs)) {
				t.Skip("cannot make a ", test.needs)
			}
			log := dir + "/" + test.log
			if test.log == os.DevNull {
				log = os.DevNull
			}
			listed := func() (found []string) {
				require.NoError(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
					text := ""
					if entry.Type().IsRegular() {
						text = bytesOf(t, path)
					}
					found = append(found, fmt.Sprint(path, entry.Type(), text))
					return err
				}))
				return found
			}
			before := listed()
			_, err := openLog(logOptions{file: log, maxMB: 1, reserved: []string{in("data/metrics.db"), in("data/orders.db")}}, io.Discard)
			require.Regexp(t, `^cannot write the log file `+regexp.QuoteMeta(log)+test.says, err)
			require.Equal(t, before, listed())
		})
	}
}

// TestLogBecomesALink where it was a file: its lines are dropped, and what the
// link leads to is left alone.
func TestLogBecomesALink(t *testing.T) {
	t.Parallel()
	needsUnix(t)
	o := testLogOptions(t)
	l := openTestLog(t, o)
	other := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(other, []byte("text"), 0o600))
	require.NoError(t, os.Remove(o.file))
	require.NoError(t, os.Symlink(other, o.file))
	l.Info("dropped")
	until(t, func() bool { return l.dropped.Load() == 1 })
	require.NoError(t, os.Remove(o.file))
	l.Info("written")
	require.NoError(t, l.close())
	require.Equal(t, "written", decoded[map[string]any](t, bytesOf(t, o.file))["msg"])
	require.Equal(t, "text", bytesOf(t, other))
}

func TestLogHasOneWriter(t *testing.T) {
	t.Parallel()
	o := testLogOptions(t)
	l, dir, again := openTestLog(t, o), filepath.Dir(o.file), o
	for _, path := range []string{o.file, dir + "/../logs/orderd.log"} {
		again.file = path
		_, err := openLog(again, io.Discard)
		require.Regexp(t, `^cannot write the log file \S+: another orderd uses it; choose another with -log$`, err)
	}
	name := "other #1%20?.log"
	if runtime.GOOS == "windows" {
		name = "other #1%20.log"
	}
	again.file = filepath.Join(dir, name)
	require.NoError(t, openTestLog(t, again).close(), "another name in the same directory")
	require.ElementsMatch(t, []string{"orderd.log", ".orderd.log.lock", name, "." + name + ".lock"}, namesIn(t, dir))
	require.NoError(t, l.close())
	require.Empty(t, bytesOf(t, o.file), "who was refused wrote nothing")
	require.NoError(t, openTestLog(t, o).close(), "it is free again")
	const rounds, most = 5, 8
	for range rounds {
		opened := make(chan *logger)
		for range most {
			go func() {
				l, _ := openLog(o, io.Discard)
				opened <- l
			}()
		}
		var winners []*logger
		for range most {
			if l := <-opened; l != nil {
				winners = append(winners, l)
			}
		}
		require.Len(t, winners, 1, "of those that start at once")
		require.NoError(t, winners[0].close())
	}
}

// TestLogStaysLockedWhileAnOldFileIsCompressed gives lumberjack an old file that
// it cannot read to the end: a pipe.
func TestLogStaysLockedWhileAnOldFileIsCompressed(t *testing.T) {
	t.Parallel()
	needs(t, "mkfifo")
	o := testLogOptions(t)
	old := filepath.Join(filepath.Dir(o.file), "orderd-2026-01-01T00-00-00.000.log")
	require.NoError(t, os.Mkdir(filepath.Dir(o.file), 0o700))
	require.NoError(t, exec.Command("mkfifo", old).Run())
	require.NoError(t, openTestLog(t, o).close())
	_, err := openLog(o, io.Discard)
	require.ErrorIs(t, err, errLocked)
	pipe, err := os.OpenFile(old, os.O_RDWR, 0)
	require.NoError(t, err)
	require.NoError(t, pipe.Close()) // lumberjack reads its end
}

// faultyDisk takes what is written, or fails as told.
type faultyDisk struct {
	transcript
	fault atomic.Pointer[error]
}

func (d *faultyDisk) Write(text []byte) (int, error) {
	if err := d.fault.Load(); err != nil {
		return 0, *err
	}
	return d.transcript.Write(text)
}

func TestLogOnAFailingDisk(t *testing.T) {
	t.Parallel()
	var disk faultyDisk
	var stderr transcript
	disk.fault.Store(new(errors.New("no space left on device")))
	l := newLogger(&disk, slog.LevelInfo, &stderr)
	for i := range int64(3) {
		l.Warn("lost")
		until(t, func() bool { return l.dropped.Load() == i+1 }, "every lost line is counted")
	}
	require.Regexp(t, `^orderd: [^\n]*no space left on device[^\n]*\n$`, stderr.String(), "stderr is told once")
	disk.fault.Store(nil)
	l.Warn("kept")
	until(t, func() bool { return strings.Contains(disk.String(), "kept") }, "it recovers")
	disk.fault.Store(new(errors.New("input/output error")))
	l.Warn("lost")
	until(t, func() bool { return l.dropped.Load() == 4 })
	until(t, func() bool { return strings.Count(stderr.String(), "\n") == 2 }, "another failure is told again")
	disk.fault.Store(nil)
	l.Info("last")
	require.NoError(t, l.close())
	require.Regexp(t, `^[^\n]*kept[^\n]*\n[^\n]*last[^\n]*\n$`, disk.String(), "closing writes what waits")
}

func TestLogBufferFull(t *testing.T) {
	t.Parallel()
	var held heldOnce
	var written transcript
	reached := held.arm()
	l := newLogger(writerFunc(func(text []byte) (int, error) {
		held.hold()
		return written.Write(text)
	}), slog.LevelInfo, io.Discard)
	l.Warn("first")
	<-reached // the disk hangs
	text := strings.Repeat("x", 1000)
	const lines = 1000
	for range lines {
		l.Info(text) // must not wait for it
	}
	dropped := l.dropped.Load()
	require.Positive(t, dropped)
	require.Less(t, dropped, int64(lines))
	require.LessOrEqual(t, len(l.buffer), logBuffer)
	held.release()
	require.NoError(t, l.close())
	require.EqualValues(t, 1+lines-dropped, strings.Count(written.String(), "\n"))
	require.Equal(t, dropped, l.dropped.Load())
}

// TestLogCountsOnlyTheLinesNotWritten where a write ends in the middle.
func TestLogCountsOnlyTheLinesNotWritten(t *testing.T) {
	t.Parallel()
	var out transcript
	b := &lineBuffer{out: writerFunc(func(text []byte) (int, error) {
		n := bytes.IndexByte(text, '\n') + 3
		out.Write(text[:n])
		return n, errors.New("no space left on device")
	}), notices: io.Discard}
	b.Write([]byte("written\n"))
	b.Write([]byte("half of it\n"))
	b.Write([]byte("none of it\n"))
	b.flush()
	require.Equal(t, "written\nha", out.String())
	require.EqualValues(t, 2, b.dropped.Load())
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(text []byte) (int, error) { return f(text) }

// TestLogOnStderr also lets stderr fail for a while: no plain line may follow.
func TestLogOnStderr(t *testing.T) {
	t.Parallel()
	var stderr faultyDisk
	stderr.fault.Store(new(errors.New("no space left on device")))
	l, err := openLog(logOptions{file: logToStderr, level: slog.LevelWarn}, &stderr)
	require.NoError(t, err)
	l.Warn("dropped")
	until(t, func() bool { return l.dropped.Load() == 1 })
	stderr.fault.Store(nil)
	l.Info("unimportant")
	l.Warn("important")
	require.NoError(t, l.close())
	require.Equal(t, "important", decoded[map[string]any](t, stderr.String())["msg"])
	require.NoDirExists(t, logToStderr)
}

// TestStderrIsJSONWhereItIsTheLog, from the start to the sentence at the end.
func TestStderrIsJSONWhereItIsTheLog(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	const warning = "anyone who reaches this address can place and read orders: set ORDERD_TOKEN or -token-file"
	for _, test := range []struct {
		name     string
		data     string
		code     int
		messages []string
		reason   string
	}{
		{"served", t.TempDir(), 0, []string{"started", warning, "stopping", "stopped"}, ""},
		{"not started", file, 1, []string{"not started"}, "choose another with -data"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), *patience)
			defer cancel()
			var said transcript
			stderr := writerFunc(func(text []byte) (int, error) {
				if bytes.Contains(text, []byte(`"started"`)) {
					cancel()
				}
				return said.Write(text)
			})
			err := run(ctx, []string{"-addr", ":0", "-data", test.data, "-log", "-"}, leaveGC, io.Discard, stderr)
			require.Equal(t, test.code, report(err, stderr))
			var messages []string
			for line := range strings.Lines(said.String()) {
				entry := decoded[map[string]any](t, line)
				messages = append(messages, entry["msg"].(string))
				if test.reason != "" {
					require.Contains(t, entry["error"], test.reason)
				}
			}
			require.Equal(t, test.messages, messages)
		})
	}
}

// ---- the oracle: what clients know, against what the service says ----

// outcome is what a client knows of its order.
type outcome int

const (
	refused outcome = iota // it was told that the order was not taken
	unknown                // it was told nothing certain
	accepted
)

func (o outcome) String() string { return [...]string{"refused", "unknown", "accepted"}[o] }

// intent is one order that a client wants. Its user_id is unique, so the order
// can be found.
type intent struct {
	userID, itemIDs string
	cents           int64
	body            string
	key             string // Idempotency-Key, or empty: then it is sent only once
	outcome         outcome
	id              string // once accepted
}

// journal is kept outside the service and outlives it.
type journal struct {
	name string // begins every user_id
	rand *rand.Rand

	mu         sync.Mutex // guards all below, and the intents
	intents    []*intent
	accepted   []*intent
	seen       map[string]status // the highest status shown, by ID
	reads      int
	violations []string

	replicas bool          // a connection that breaks and a 503 are passed over: others answer
	minimum  time.Duration // of an order's processing
	large    bool          // every order, so that the WAL is soon full
	average  float64       // as the service said last
}

func newJournal(name string, minimum time.Duration) *journal {
	return &journal{name: name, rand: rand.New(rand.NewPCG(1, 2)), seen: map[string]status{}, minimum: minimum}
}

func (j *journal) violate(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.violations) < 20 {
		j.violations = append(j.violations, fmt.Sprintf(format, args...))
	}
}

// next makes up an order: most are small, some large, some invalid.
func (j *journal) next() *intent {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := len(j.intents)
	in := &intent{userID: fmt.Sprintf("%s-%d", j.name, n), itemIDs: fmt.Sprintf("item%d,item%d", n, n+1), cents: j.rand.Int64N(1e7)}
	if j.large {
		in.itemIDs += strings.Repeat(",another item", 900)
	} else if j.rand.IntN(20) == 0 {
		in.itemIDs += strings.Repeat(",another item", j.rand.IntN(900))
	}
	if j.rand.IntN(4) == 0 {
		in.key = fmt.Sprintf("key-%s-%d", j.name, n)
	}
	amount := fmt.Sprintf("%d.%02d", in.cents/100, in.cents%100)
	switch j.rand.IntN(20) {
	case 0:
		amount = fmt.Sprintf("%de-2", in.cents)
	case 1:
		amount = "-1" // refused
	}
	in.body = fmt.Sprintf(`{"user_id": %q, "item_ids": %q, "total_amount": %s}`, in.userID, in.itemIDs, amount)
	j.intents = append(j.intents, in)
	return in
}

// send posts an order and notes what the client knows then. An error is one of
// the connection.
func (j *journal) send(client *http.Client, base string, in *intent) (o outcome, err error) {
	var id string
	defer func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		if o == accepted && in.outcome != accepted {
			in.id = id
			j.accepted = append(j.accepted, in)
		}
		in.outcome = max(in.outcome, o)
	}()
	header := asJSON
	if in.key != "" {
		header = keyed(in.key)
	}
	got := exchange(context.Background(), client, base, http.MethodPost, "/orders", header, in.body)
	if got.err != nil {
		var dial *net.OpError
		if errors.As(got.err, &dial) && dial.Op == "dial" && in.key == "" {
			return refused, got.err // nothing was sent; with a key, net/http may be at its second try
		}
		return unknown, got.err
	}
	var answer struct {
		OrderID      string `json:"order_id"`
		Type, Detail string
	}
	if err := json.Unmarshal([]byte(got.body), &answer); err != nil {
		j.violate("answer %d is no JSON: %q", got.status, got.body)
		return unknown, nil
	}
	switch code := got.status; {
	case code == http.StatusCreated:
		id = answer.OrderID
		if in.id != "" && in.id != id {
			j.violate("the key %s created %s and %s", in.key, in.id, id)
		}
		return accepted, nil
	case code >= 400 && code < 500:
		return refused, nil
	case code == http.StatusServiceUnavailable:
		if got.header.Get("Retry-After") == "" || got.header.Get("Content-Type") != "application/problem+json" {
			j.violate("a 503 without Retry-After, or no problem document: %q", got.body)
		}
		if answer.Type == "urn:orderd:problem:outcome-unknown" {
			return unknown, nil
		}
		if !strings.Contains(answer.Detail, "not taken") {
			j.violate("a 503 does not say whether the order was taken: %q", got.body)
		}
		if j.replicas && in.key != "" {
			return unknown, nil // it may answer net/http's second try, after a replica that took the first was killed
		}
		return refused, nil
	}
	j.violate("unexpected answer %d: %q", got.status, got.body)
	return unknown, nil
}

func newClient() *http.Client {
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 1}}
}

// place sends so many orders one after the other and demands that each is accepted.
func (j *journal) place(tb testing.TB, base string, n int) {
	tb.Helper()
	client := newClient()
	defer client.CloseIdleConnections()
	for target := j.count(accepted) + n; j.count(accepted) < target; {
		_, err := j.send(client, base, j.next())
		require.NoError(tb, err)
		require.Zero(tb, j.count(unknown))
	}
}

// load sends orders on n connections, at most most in all, until it is stopped
// or the service has gone. Every client checks that its own IDs increase.
func (j *journal) load(base string, n, most int) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var sent atomic.Int64
	for range n {
		wg.Go(func() {
			client := newClient()
			defer client.CloseIdleConnections()
			for last := ""; ctx.Err() == nil && sent.Add(1) <= int64(most); {
				in := j.next()
				o, err := j.send(client, base, in)
				if err != nil && !j.replicas {
					return
				}
				if j.replicas {
					time.Sleep(5 * time.Millisecond) // or all are listed for longer than the fault lasts
				}
				if o == accepted {
					if in.id <= last {
						j.violate("ID %s came after %s", in.id, last)
					}
					last = in.id
				}
			}
		})
	}
	return func() {
		cancel()
		wg.Wait()
	}
}

// count returns how many intents ended so.
func (j *journal) count(o outcome) (n int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, in := range j.intents {
		if in.outcome == o {
			n++
		}
	}
	return n
}

// observe reads accepted orders, one by one and as lists, and demands that no
// status goes backward and no order vanishes, across restarts too.
func (j *journal) observe(base string) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, look := range []func(*http.Client, string, *rand.Rand) error{j.lookAtOne, j.lookAtOne, j.lookAtMany} {
		wg.Go(func() {
			client, r := newClient(), rand.New(rand.NewPCG(3, 4))
			defer client.CloseIdleConnections()
			for ctx.Err() == nil {
				if err := look(client, base, r); err != nil && !j.replicas {
					return // the service has gone
				}
				time.Sleep(5 * time.Millisecond) // what is observed needs the processor
			}
		})
	}
	return func() {
		cancel()
		wg.Wait()
	}
}

// lookAtOne reads the status of one accepted order, more often a new one.
func (j *journal) lookAtOne(client *http.Client, base string, r *rand.Rand) error {
	j.mu.Lock()
	id, floor := ulid.ULID{}.String(), pending
	known := len(j.accepted) > 0
	if known {
		i := r.IntN(len(j.accepted))
		if r.IntN(2) == 0 {
			i = len(j.accepted) - 1 - r.IntN(min(len(j.accepted), 20))
		}
		id = j.accepted[i].id
		floor = j.seen[id]
	}
	j.mu.Unlock()
	got := exchange(context.Background(), client, base, http.MethodGet, "/orders/"+id, nil, "")
	if got.err != nil {
		return got.err
	}
	if !known && got.status == http.StatusNotFound || j.replicas && got.status == http.StatusServiceUnavailable {
		return nil
	}
	var answer orderDocument
	err := json.Unmarshal([]byte(got.body), &answer)
	s := slices.Index(statusNames[:], answer.Status)
	switch {
	case got.status != http.StatusOK || err != nil || answer.OrderID != id || s < 0:
		j.violate("GET of the accepted order %q answers %d: %q", id, got.status, got.body)
		return nil
	case status(s) < floor:
		j.violate("%s is %s after it was %s", id, answer.Status, floor)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.seen[id] = max(j.seen[id], status(s))
	j.reads++
	return nil
}

// lookAtMany reads a list.
func (j *journal) lookAtMany(client *http.Client, base string, _ *rand.Rand) error {
	j.mu.Lock()
	floor := maps.Clone(j.seen) // shown before the request
	j.mu.Unlock()
	page, err := fetchPage(client, base+"/orders?limit=200")
	if errors.Is(err, errNotListed) && !(j.replicas && strings.Contains(err.Error(), " answers 503")) {
		j.violate("%v", err)
	}
	if err != nil {
		return err
	}
	shown := map[string]status{}
	for i, o := range page.Orders {
		if i > 0 && o.OrderID >= page.Orders[i-1].OrderID {
			j.violate("the list is out of order at %s", o.OrderID)
		}
		s := status(slices.Index(statusNames[:], o.Status))
		if s < floor[o.OrderID] {
			j.violate("the list shows %s of %s after %s", s, o.OrderID, floor[o.OrderID])
		}
		shown[o.OrderID] = s
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for id, s := range shown {
		j.seen[id] = max(j.seen[id], s)
	}
	return nil
}

var errNotListed = errors.New("no list")

func fetchPage(client *http.Client, address string) (page shownPage, err error) {
	got := exchange(context.Background(), client, address, http.MethodGet, "", nil, "")
	if got.err != nil {
		return page, got.err
	}
	if got.status != http.StatusOK {
		return page, fmt.Errorf("%w: GET %s answers %d: %s", errNotListed, address, got.status, got.body)
	}
	return page, json.Unmarshal([]byte(got.body), &page)
}

// listAll reads every order of the service.
func listAll(base string) (orders []orderDocument, err error) {
	client, next := newClient(), "/orders?limit=1000"
	defer client.CloseIdleConnections()
	for {
		page, err := fetchPage(client, base+next)
		if err != nil {
			return nil, err
		}
		orders = append(orders, page.Orders...)
		if page.Next == nil {
			return orders, nil
		}
		next = *page.Next
	}
}

func listed(tb testing.TB, base string) []orderDocument {
	tb.Helper()
	orders, err := listAll(base)
	require.NoError(tb, err)
	return orders
}

func getSummary(base string) (sum summary, err error) {
	got := exchange(context.Background(), http.DefaultClient, base, http.MethodGet, "/metrics", nil, "")
	return sum, cmp.Or(got.err, json.Unmarshal([]byte(got.body), &sum))
}

// samples reads the Prometheus text; a sample's name has its labels.
func samples(tb testing.TB, base string) map[string]float64 {
	tb.Helper()
	got := exchange(context.Background(), http.DefaultClient, base, http.MethodGet, "/metrics", http.Header{"Accept": {"text/plain"}}, "")
	require.NoError(tb, got.err)
	found := map[string]float64{}
	for _, m := range regexp.MustCompile(`(?m)^([a-z_]+(?:\{.*\})?) (\S+)$`).FindAllStringSubmatch(got.body, -1) {
		value, err := strconv.ParseFloat(m[2], 64)
		require.NoError(tb, err)
		found[m[1]] = value
	}
	return found
}

func metric(tb testing.TB, base, name string) float64 {
	tb.Helper()
	found := samples(tb, base)
	require.Contains(tb, found, name)
	return found[name]
}

// drained waits until all orders are Completed and counted.
func drained(tb testing.TB, base string) (sum summary) {
	tb.Helper()
	until(tb, func() bool {
		var err error
		sum, err = getSummary(base)
		return err == nil && sum.OrdersPending == 0 && sum.OrdersProcessing == 0 && sum.TotalOrdersProcessed == sum.OrdersCompleted
	})
	return sum
}

// check asks a running service whether it kept its promises to the clients of
// the journal. No load may run beside it.
func (j *journal) check(tb testing.TB, base string) {
	tb.Helper()
	stop := j.observe(base)
	defer stop()
	client := newClient()
	defer client.CloseIdleConnections()
	for _, in := range j.intents {
		if in.key != "" && in.outcome == unknown {
			o, err := j.send(client, base, in) // that is what the key is for
			require.NoError(tb, err)
			require.NotEqual(tb, unknown, o)
			in.outcome = o // refused: it was invalid
		}
	}
	sum := drained(tb, base)
	orders := listed(tb, base)
	stop()
	require.NoError(tb, j.verify(orders, sum))
}

// verify compares the journal with all orders of a drained service.
func (j *journal) verify(orders []orderDocument, sum summary) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var wrong []string
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	found := map[string][]orderDocument{}
	for _, o := range orders {
		found[o.UserID] = append(found[o.UserID], o)
		if o.Status != completed.String() {
			bad("%s is %s after the drain", o.OrderID, o.Status)
		}
	}
	for _, in := range j.intents {
		rows := found[in.userID]
		delete(found, in.userID)
		switch {
		case len(rows) > 1:
			bad("the %s order of %s is there %d times", in.outcome, in.userID, len(rows))
			continue
		case in.outcome == accepted && len(rows) == 0:
			bad("the accepted order %s of %s is lost", in.id, in.userID)
		case in.outcome == refused && len(rows) > 0:
			bad("the refused order of %s is there as %s", in.userID, rows[0].OrderID)
		}
		if len(rows) == 0 {
			continue
		}
		o := rows[0]
		if in.outcome == accepted && o.OrderID != in.id {
			bad("the order of %s was %s and is %s", in.userID, in.id, o.OrderID)
		}
		if amount := fmt.Sprintf("%d.%02d", in.cents/100, in.cents%100); o.ItemIDs != in.itemIDs || string(o.TotalAmount) != amount {
			bad("the order %s has other content than was sent", o.OrderID)
		}
	}
	for user := range found {
		bad("nobody sent the order of %q", user)
	}
	if n := int64(len(orders)); sum.TotalOrdersProcessed != n || sum.OrdersCompleted != n {
		bad("%d orders, but %d processed and %d completed", n, sum.TotalOrdersProcessed, sum.OrdersCompleted)
	}
	if low, high := j.minimum.Seconds(), time.Minute.Seconds(); len(orders) > 0 && (sum.AverageProcessingTime < low || sum.AverageProcessingTime > high) {
		bad("the average processing time is %v, not from %v to %v", sum.AverageProcessingTime, low, high)
	}
	j.average = sum.AverageProcessingTime
	return toldOf(append(wrong, j.violations...))
}

func toldOf(wrong []string) error {
	if len(wrong) == 0 {
		return nil
	}
	return fmt.Errorf("%d promises broken, such as: %s", len(wrong), strings.Join(wrong[:min(len(wrong), 10)], "; "))
}

// checkFiles looks into both databases after a clean stop.
func (j *journal) checkFiles(dir string) error {
	var wrong []string
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	look := func(name, query string, into ...any) {
		path := filepath.Join(dir, "data", name)
		if exists(path + "-wal") {
			bad("%s-wal is left", name)
		}
		db, err := openSQLite(path, "mode=ro")
		if err == nil {
			defer db.Close()
			var verdict string
			if err = db.QueryRow("PRAGMA integrity_check").Scan(&verdict); err == nil && verdict != "ok" {
				bad("%s: %s", name, verdict)
			}
		}
		if err == nil {
			err = db.QueryRow(query).Scan(into...)
		}
		if err != nil {
			bad("%s: %v", name, err)
		}
	}
	lookAtOrders, totalsTable := look, "totals"
	if url := ordersURL(dir); url != "" {
		totalsTable = "leader"
		lookAtOrders = func(_, query string, into ...any) {
			db, err := sql.Open("pgx", url)
			if err == nil {
				defer db.Close()
				err = db.QueryRow(query).Scan(into...)
			}
			if err != nil {
				bad("%s: %v", url, err)
			}
		}
	}
	var rows, done, spent int64
	var written, counted totals
	lookAtOrders("orders.db", `SELECT o.*, accepted, processing, completed, l.took FROM `+totalsTable+` l,
		(SELECT count(*), count(*) FILTER (WHERE status = 2), CAST(coalesce(sum(took), 0) AS bigint) FROM orders) o`,
		&rows, &done, &spent, &written.accepted, &written.processing, &written.completed, &written.sumTook)
	look("metrics.db", "SELECT accepted, completed, took FROM totals", &counted.accepted, &counted.completed, &counted.sumTook)
	if want := (totals{accepted: rows, completed: rows, sumTook: spent}); done != rows || written != want || counted != want {
		bad("%d rows, %d completed, %d µs; totals %+v; metrics.db %+v", rows, done, spent, written, counted)
	}
	if average := float64(spent) / float64(rows) / 1e6; rows > 0 && math.Abs(j.average-average) > 1e-9 {
		bad("the average was %v and is %v", j.average, average)
	}
	return toldOf(wrong)
}

// stopAndCheck ends a process whose orders are all Completed.
func (j *journal) stopAndCheck(tb testing.TB, p *process) {
	tb.Helper()
	p.stop(tb)
	if runtime.GOOS != "windows" {
		require.NoError(tb, j.checkFiles(p.dir))
	}
}

// recover starts the service again, whole, and checks everything.
func (j *journal) recover(tb testing.TB, dir string, args ...string) {
	tb.Helper()
	p := startProcess(tb, dir, nil, append([]string{"-delay", j.minimum.String(), "-workers", "64"}, args...)...)
	j.check(tb, p.url())
	j.stopAndCheck(tb, p)
}

// ---- faults: the process dies ----

func TestKillNine(t *testing.T) {
	t.Parallel()
	seed := cmp.Or(*killSeed, uint64(time.Now().UnixNano()))
	t.Logf("repeat with -seed %d", seed)
	r := rand.New(rand.NewPCG(seed, seed))
	dir := t.TempDir()
	j := newJournal("kill", 5*time.Millisecond)
	j.rand = rand.New(rand.NewPCG(seed, 0))
	args := []string{"-delay", "5ms", "-workers", "64", "-cache", "500"}
	pause := func(most time.Duration) { <-time.After(time.Duration(r.Int64N(int64(most)))) }
	for range *killRounds {
		if r.IntN(2) == 0 { // somewhere in the start
			p := launch(t, nil, dir, nil, args...)
			pause(80 * time.Millisecond)
			p.kill()
		}
		p := startProcess(t, dir, nil, args...)
		j.check(t, p.url())
		stopLoad, stopObservers := j.load(p.url(), 8, 2000), j.observe(p.url())
		pause(300 * time.Millisecond)
		p.kill()
		stopLoad()
		stopObservers()
	}
	j.recover(t, dir, "-cache", "500")
	t.Logf("%d accepted, %d refused, %d unknown, %d reads", j.count(accepted), j.count(refused), j.count(unknown), j.reads)
	require.NotZero(t, j.count(accepted))
}

func TestKilledBetweenTheTwoCommits(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := newJournal("between", time.Millisecond)
	behind := 0
	for _, at := range []string{"1", "2", "4"} {
		p := launch(t, nil, dir, []string{childMode + "=exit-between-commits", "TEST_AT=" + at}, "-delay", "1ms")
		if line := p.printed(t, announced); line != "" { // else it ended in the start, where metrics.db lagged
			p.addr = strings.TrimPrefix(line, announced)
			stop := j.load(p.url(), 4, 100_000)
			p.wait(t, *patience)
			stop()
		}
		require.Equal(t, exitedBetweenCommits, p.code, p.stderr.String())
		behind += j.count(accepted)
	}
	require.NotZero(t, behind)
	j.recover(t, dir)
}

func TestSigtermUnderLoad(t *testing.T) {
	t.Parallel()
	needsUnix(t)
	dir := t.TempDir()
	j := newJournal("term", 5*time.Millisecond)
	for range 2 {
		p := startProcess(t, dir, nil, "-delay", "5ms", "-workers", "4", "-drain", "5s")
		stopLoad, stopObservers := j.load(p.url(), 8, 100_000), j.observe(p.url())
		before := j.count(accepted)
		until(t, func() bool { return j.count(accepted) > before+100 })
		began := time.Now()
		require.Equal(t, 0, p.terminate(t, *patience), p.stderr.String())
		require.Less(t, time.Since(began), 6*time.Second)
		stopLoad()
		stopObservers()
		for _, name := range []string{"orders.db-wal", "metrics.db-wal", "orders.db-shm"} {
			require.NoFileExists(t, filepath.Join(dir, "data", name))
		}
	}
	j.recover(t, dir)
}

func TestSigtermAnswersWhatIsInFlight(t *testing.T) {
	t.Parallel()
	needsUnix(t)
	dir := t.TempDir()
	j := newJournal("flight", time.Millisecond)
	p := startProcess(t, dir, []string{childMode + "=hold-commit"}, "-delay", "24h", "-drain", "3s")
	outcomes := make(chan outcome, heldCreates)
	for range heldCreates {
		in := j.next()
		in.key, in.cents, in.body = "", 100, orderBody(strconv.Quote(in.userID), strconv.Quote(in.itemIDs), "1")
		go func() {
			o, _ := j.send(newClient(), p.url(), in)
			outcomes <- o
		}()
	}
	p.mustPrint(t, "all creates are in flight")
	began := time.Now()
	require.Equal(t, 0, p.terminate(t, *patience), p.stderr.String())
	require.Less(t, time.Since(began), 4*time.Second) // -drain and a second
	for range heldCreates {
		require.Equal(t, accepted, <-outcomes)
	}
	j.recover(t, dir)
}

// TestOracle shows that the oracle notices what it is there for.
func TestOracle(t *testing.T) {
	t.Parallel()
	needsUnix(t)
	dir := t.TempDir()
	j := newJournal("oracle", time.Millisecond)
	working := func(d time.Duration) func(*config) {
		return func(c *config) { c.drain, c.pool.delay = 0, d }
	}
	a, stop := openTestApp(t, dir, working(time.Millisecond), nil)
	j.place(t, base(a), 50)
	j.check(t, base(a))
	stop()
	require.NoError(t, j.checkFiles(dir))

	first, last := j.accepted[0], j.accepted[len(j.accepted)-1]
	idHigh := func(in *intent) string { return strconv.FormatInt(high(ulid.MustParse(in.id)), 10) }
	const recount = "UPDATE totals SET accepted = (SELECT count(*) FROM orders), completed = (SELECT count(*) FROM orders WHERE status = 2), took = (SELECT sum(took) FROM orders)"
	for _, test := range []struct{ name, orders, metrics, says string }{ // SQL for both databases
		{"completions counted twice", "UPDATE totals SET accepted = accepted + 1, completed = completed + 1", "", "processed"},
		{"an order lost", "DELETE FROM orders WHERE id_high = " + idHigh(last) + "; " + recount, "UPDATE totals SET accepted = 0, completed = 0", "is lost"},
		{"an order twice", "INSERT INTO orders SELECT id_high + 1, id_low, status, user_id, item_ids, cents, started, took, NULL FROM orders WHERE id_high = " + idHigh(last) + "; " + recount, "", "2 times"},
		{"other content", "UPDATE orders SET cents = cents + 1 WHERE id_high = " + idHigh(first), "", "other content"},
		{"an order of nobody", "INSERT INTO orders VALUES (7, 7, 2, 'nobody', 'x', 1, 1, 1, NULL); " + recount, "", "nobody sent"},
		{"a status that goes backward", "UPDATE orders SET status = 0, started = NULL, took = NULL WHERE id_high = " + idHigh(first) + "; UPDATE totals SET completed = completed - 1", "UPDATE totals SET completed = 0", "after it was Completed"},
		{"time that nobody spent", "UPDATE totals SET took = took + 3600000000", "UPDATE totals SET took = took + 3600000000", "average"},
	} {
		t.Run(test.name, func(t *testing.T) {
			broken := t.TempDir()
			require.NoError(t, os.CopyFS(broken, os.DirFS(dir)))
			for name, query := range map[string]string{"orders.db": test.orders, "metrics.db": test.metrics} {
				execOn(t, filepath.Join(broken, "data", name), query)
			}
			k := newJournal("oracle", j.minimum)
			k.intents, k.accepted, k.seen = j.intents, j.accepted, map[string]status{first.id: completed}
			if strings.Contains(test.name, "backward") {
				k.accepted = k.accepted[:1] // so that the observers look at it in time
			}
			a, _ := openTestApp(t, broken, working(time.Second), nil)
			stop := k.observe(base(a))
			sum := drained(t, base(a))
			stop()
			require.ErrorContains(t, k.verify(listed(t, base(a)), sum), test.says)
		})
	}
	t.Run("counted twice", func(t *testing.T) {
		dir := t.TempDir()
		j := newJournal("twice", time.Millisecond)
		p := startProcess(t, dir, []string{childMode + "=count-twice"}, "-delay", "1ms")
		j.place(t, p.url(), 10)
		drained(t, p.url())
		p.stop(t)
		a, _ := openTestApp(t, dir, nil, nil)
		require.ErrorContains(t, j.verify(listed(t, base(a)), drained(t, base(a))), "processed")
	})
	t.Run("answered before the commit", func(t *testing.T) {
		dir := t.TempDir()
		j := newJournal("early", time.Millisecond)
		p := startProcess(t, dir, []string{childMode + "=answer-before-commit"}, "-delay", "1ms")
		client := newClient()
		for j.count(accepted) < 4 { // the fourth is a lie
			_, err := j.send(client, p.url(), j.next())
			require.NoError(t, err)
		}
		p.kill()
		a, _ := openTestApp(t, dir, nil, nil)
		sum := drained(t, base(a))
		require.ErrorContains(t, j.verify(listed(t, base(a)), sum), "is lost")
	})
}

// ---- faults: the disk fails ----

// straced is the command that starts the service, as its own process, with its calls on path traced.
func straced(tb testing.TB, log, path string, options ...string) []string {
	tb.Helper()
	needs(tb, "strace")
	command := []string{"strace", "-D", "-f", "-qq", "--seccomp-bpf", "-o", log}
	if path != "" {
		command = append(command, "-P", path)
	}
	command = append(command, options...)
	if text, err := exec.Command(command[0], append(command[1:], "true")...).CombinedOutput(); err != nil {
		tb.Skipf("strace does not work here: %v %s", err, text)
	}
	return command
}

// usedDir has been used and stopped, so that the first calls on the -wal of db are those of the first commit.
func usedDir(t *testing.T) (dir, db string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	_, stop := openIdle(t, dir, nil, nil)
	stop()
	return dir, filepath.Join(dir, "data", "orders.db")
}

// TestDiskFaults has system calls on one file fail under load, by strace.
func TestDiskFaults(t *testing.T) {
	t.Parallel()
	const unknownOutcome = "orderd: the outcome of the commit is unknown: check the disk, then start orderd again"
	const fsyncs = "fsync,fdatasync"
	for _, test := range []struct {
		name, file, calls string
		fault             string // strace counts by thread, so a few calls succeed before, or fail again
		ends              bool   // the service, and says unknownOutcome
		large             bool   // orders, so that the WAL is soon full and a checkpoint comes
		alone             bool   // the batch that fails is a client's, without steps
	}{
		{name: "every fsync from one on", file: "orders.db-wal", calls: fsyncs, fault: "error=EIO:when=4+", ends: true},
		{name: "one fsync: the next would succeed, and mean nothing", file: "orders.db-wal", calls: fsyncs, fault: "error=EIO:when=4", ends: true, alone: true},
		{name: "the fsync of a checkpoint: the next would mean nothing", file: "orders.db", calls: fsyncs, fault: "error=EIO:when=1", ends: true, large: true},
		{name: "a write once", file: "orders.db-wal", calls: "pwrite64", fault: "error=EIO:when=6"},
		{name: "writes for a while", file: "orders.db-wal", calls: "pwrite64", fault: "error=ENOSPC:when=6..8"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir, _ := usedDir(t)
			log, args := filepath.Join(dir, "strace"), []string{"-delay", "1ms"}
			j := newJournal("fault", time.Millisecond)
			j.large = test.large
			if test.alone { // one worker that is busy with an order from before
				args = []string{"-delay", "24h", "-workers", "1", "-drain", "1s"}
				p := startProcess(t, dir, nil, args...)
				j.place(t, p.url(), 1)
				until(t, func() bool { return metric(t, p.url(), `orderd_orders{status="Processing"}`) == 1 })
				p.stop(t)
			}
			p := startWrapped(t, straced(t, log, filepath.Join(dir, "data", test.file),
				"-e", "trace="+test.calls, "-e", "inject="+test.calls+":"+test.fault), dir, nil, args...)
			stopObservers := j.observe(p.url())
			if test.ends && !test.alone {
				stopLoad := j.load(p.url(), 8, math.MaxInt)
				p.wait(t, *patience)
				stopLoad()
			} else {
				client, began := newClient(), time.Now()
				faulty := func() bool { return strings.Contains(bytesOf(t, log), "INJECTED") } // in a batch of steps alone, maybe
				for o := refused; test.ends && j.count(unknown) == 0 || !test.ends && (!faulty() || o != accepted); {
					in := j.next()
					var err error
					o, err = j.send(client, p.url(), in)
					require.NoError(t, err)
					require.True(t, !test.ends || o != refused || strings.HasSuffix(in.body, ": -1}"), "a batch is unknown, not refused")
					require.True(t, test.ends || o != unknown, "nothing is unknown after a failed write")
					require.Less(t, time.Since(began), *patience)
					if o == refused {
						time.Sleep(10 * time.Millisecond) // it is told at once, until the writer's next attempt
					}
				}
			}
			if test.ends {
				require.Equal(t, 1, p.wait(t, *patience), p.stderr.String())
				stopObservers()
				said := regexp.MustCompile(`(?m)^orderd: .*\n`).FindAllString(p.stderr.String(), -1)
				require.Len(t, said, 1, p.stderr.String())
				require.Contains(t, said[0], unknownOutcome)
				require.NotZero(t, j.count(accepted))
				j.recover(t, dir)
				return
			}
			stopObservers()
			require.Contains(t, bytesOf(t, log), "INJECTED")
			j.check(t, p.url())
			j.stopAndCheck(t, p)
		})
	}
}

// TestStartSyncsWhatAKilledProcessLeft to disk before anything is answered.
func TestStartSyncsWhatAKilledProcessLeft(t *testing.T) {
	t.Parallel()
	for _, watched := range []bool{false, true} {
		t.Run(fmt.Sprintf("beside a reader %v", watched), func(t *testing.T) {
			t.Parallel()
			dir, db := usedDir(t)
			synced, end := []string{db + "-wal", filepath.Join(dir, "data", "metrics.db-wal")}, func() {}
			j := newJournal("left", 0)
			p := startProcess(t, dir, nil, "-delay", "0s")
			if watched { // it reads an older state, and so keeps SQLite from a checkpoint
				_, end = holdSnapshot(t, db)
			} else { // what an fsync once failed on must go to other pages
				synced = append(synced, db)
			}
			j.place(t, p.url(), 20)
			drained(t, p.url())
			p.kill()
			log := filepath.Join(dir, "strace")
			p = startWrapped(t, straced(t, log, "", "-y", "-e", "trace=accept4,fsync,fdatasync"), dir, nil)
			j.check(t, p.url())
			end()
			j.stopAndCheck(t, p)
			before, _, served := strings.Cut(bytesOf(t, log), "accept4(")
			require.True(t, served)
			for _, path := range synced {
				require.Regexp(t, `sync\(\d+<`+regexp.QuoteMeta(path)+`>`, before)
			}
		})
	}
}

func (p *process) get(tb testing.TB, path string) answer {
	tb.Helper()
	return send(tb.Context(), p.addr, http.MethodGet, path, nil, "")
}

// TestAFirstStartSyncsItsDirectories, so that the files' names are on disk before anything is answered.
func TestAFirstStartSyncsItsDirectories(t *testing.T) {
	t.Parallel()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	log, deep := filepath.Join(dir, "strace"), filepath.Join(dir, "a", "b")
	p := startWrapped(t, straced(t, log, "", "-y", "-e", "trace=accept4,fsync,fdatasync,rename,renameat,renameat2"), dir, nil, "-data", deep)
	require.Equal(t, http.StatusOK, p.get(t, "/livez").status)
	p.kill()
	before, _, served := strings.Cut(bytesOf(t, log), "accept4(")
	require.True(t, served)
	_, afterRename, renamed := strings.Cut(before, `orders.db.new", `)
	require.True(t, renamed)
	require.Regexp(t, `sync\(\d+<`+regexp.QuoteMeta(deep)+`>`, afterRename, "the new name")
	for _, made := range []string{filepath.Dir(deep), dir, deep + "/orders.db.new"} {
		require.Regexp(t, `sync\(\d+<`+regexp.QuoteMeta(made)+`>`, before)
	}
}

// TestAnsweredAfterFsync reads in a trace that every 201 follows an fsync of the WAL, and that the request.
func TestAnsweredAfterFsync(t *testing.T) {
	t.Parallel()
	dir, db := usedDir(t)
	j := newJournal("trace", 0)
	log := filepath.Join(dir, "strace")
	p := startWrapped(t, straced(t, log, "", "-y", "-s", "64", "-e", "trace=read,write,fsync,fdatasync"), dir, nil)
	j.place(t, p.url(), 20)
	j.check(t, p.url())
	j.stopAndCheck(t, p)

	const requested, synced = 1, 2
	state, answers := 0, 0
	syncing := map[string]bool{} // threads inside an fsync of the WAL
	var trace []string
	for line := range strings.Lines(bytesOf(t, log)) {
		thread, _, _ := strings.Cut(line, " ")
		sync := strings.Contains(line, "sync(") && strings.Contains(line, "<"+db+"-wal>")
		if sync && strings.Contains(line, "<unfinished") {
			syncing[thread] = state == requested // only one that began after the request counts
			continue
		}
		if strings.Contains(line, "sync resumed>") && syncing[thread] {
			sync, syncing[thread] = true, false
		}
		switch {
		case strings.Contains(line, `OST /orders HTTP`): // net/http reads the first byte alone
			state, trace = requested, nil
		case sync && strings.Contains(line, "= 0") && state == requested:
			state = synced
		case strings.Contains(line, `"HTTP/1.1 201`):
			require.Equal(t, synced, state, strings.Join(append(trace, line), ""))
			state, answers = 0, answers+1
		}
		trace = append(trace, line)
	}
	require.Equal(t, j.count(accepted), answers)
}

// fullDisk fills the disk: orders are refused, and everything else goes on.
func (j *journal) fullDisk(t *testing.T, p *process) {
	t.Helper()
	client := newClient()
	defer client.CloseIdleConnections()
	stopObservers := j.observe(p.url())
	full := false
	for n := 0; !full; n++ {
		require.Less(t, n, 20_000)
		in := j.next()
		o, err := j.send(client, p.url(), in)
		require.NoError(t, err)
		require.NotEqual(t, unknown, o, p.stderr.String())
		full = o == refused && !strings.HasSuffix(in.body, ": -1}")
	}
	reads := func() int {
		j.mu.Lock()
		defer j.mu.Unlock()
		return j.reads
	}
	told := func() int { // the full disk may have cut a line
		return strings.Count(bytesOf(t, filepath.Join(p.dir, "logs", "orderd.log")), refusedUntil)
	}
	before, toldBefore := reads(), told()
	ready := callAt(t, p.addr, http.MethodGet, "/readyz", nil, "")
	require.Equal(t, http.StatusServiceUnavailable, ready.status)
	require.Equal(t, "1", ready.header.Get("Retry-After"))
	require.Equal(t, http.StatusOK, callAt(t, p.addr, http.MethodGet, "/livez", nil, "").status)
	var took []float64 // seconds
	found := 0         // times that a smaller batch still found room
	for began := time.Now(); time.Since(began) < 3*retryPause/2; {
		in, sent := j.next(), time.Now()
		in.key = ""
		o, err := j.send(client, p.url(), in)
		require.NoError(t, err)
		require.NotEqual(t, unknown, o)
		took = append(took, time.Since(sent).Seconds())
		if o == accepted {
			found, began = found+1, time.Now()
			require.Less(t, found, 1000)
		}
	}
	require.Less(t, median(took), retryPause.Seconds()/2, "nobody waits for the writer's next attempt")
	until(t, func() bool { return reads() > before+100 })
	stopObservers()
	require.Empty(t, j.violations)
	require.LessOrEqual(t, told(), toldBefore+3+found)
	if earlier, ok := p.cpu(); ok { // steps wait for room: that must not cost a processor
		<-time.After(2 * time.Second)
		now, _ := p.cpu()
		require.Less(t, now-earlier, 500*time.Millisecond)
	}
}

func TestFileSizeLimit(t *testing.T) {
	t.Parallel()
	needs(t, "sh")
	dir := t.TempDir()
	j := newJournal("ulimit", time.Millisecond)
	p := startWrapped(t, []string{"sh", "-c", `ulimit -f 2000; exec "$0" "$@"`}, dir, nil, "-delay", "1ms", "-log-level", "warn")
	j.fullDisk(t, p)
	require.Equal(t, 0, p.terminate(t, *patience), p.stderr.String())
	j.recover(t, dir)
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	needs(t, "mount")
	dir := t.TempDir()
	if text, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("cannot mount a tmpfs: %v %s", err, text)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", dir).Run() })
	filler := filepath.Join(dir, "filler")
	require.NoError(t, os.WriteFile(filler, make([]byte, 1<<20), 0o600))
	j := newJournal("full", time.Millisecond)
	p := startProcess(t, dir, nil, "-delay", "1ms")
	j.fullDisk(t, p)
	require.NoError(t, os.Remove(filler))
	client := newClient()
	until(t, func() bool {
		o, err := j.send(client, p.url(), j.next())
		return err == nil && o == accepted
	})
	require.Equal(t, http.StatusOK, callAt(t, p.addr, http.MethodGet, "/readyz", nil, "").status)
	j.check(t, p.url())
	j.stopAndCheck(t, p)
}

// ---- faults: the start ----

// contents are the files of dir/data that hold data: not the lock, the shared memory or an empty WAL.
func contents(tb testing.TB, dir string) map[string]string {
	tb.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(filepath.Join(dir, "data"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasPrefix(d.Name(), "orderd.lock") || strings.HasSuffix(d.Name(), "-shm") {
			return err
		}
		if text := bytesOf(tb, path); text != "" || !strings.HasSuffix(path, "-wal") {
			found[path] = text
		}
		return nil
	})
	require.NoError(tb, err)
	return found
}

// refusedStart returns the sentence with which a start that the state of the machine forbids ends.
func refusedStart(t *testing.T, dir string, args ...string) string {
	t.Helper()
	code, sentence := runRefused(t, dir, nil, args...)
	require.Equal(t, 1, code)
	return sentence
}

// TestStartIsRefused with one sentence that says why, and leaves the data as it was.
func TestStartIsRefused(t *testing.T) {
	t.Parallel()
	// Five directories: stopped, the same ten orders earlier, killed, another service's, and an older version's.
	stopped, earlier, killed, elsewhere, older := t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir()
	complete := func(dir string, orders int) {
		a, stop := openIdle(t, dir, nil, nil)
		for _, id := range commitTogether(t, a.store, sampleOrders(orders)) {
			moveTo(t, a.store, id, completed, 1)
		}
		checkInvariants(t, a)
		stop()
	}
	complete(stopped, 10)
	require.NoError(t, os.CopyFS(earlier, os.DirFS(stopped)))
	require.NoError(t, os.CopyFS(killed, os.DirFS(stopped)))
	complete(stopped, 10)
	complete(elsewhere, 30)
	p := startProcess(t, killed, nil, "-delay", "0s")
	newJournal("killed", 0).place(t, p.url(), 10)
	drained(t, p.url())
	p.kill()
	leftByKill(t, filepath.Join(older, "data", "orders.db"), versionTwo)

	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { taken.Close() })
	running := newTestApp(t, nil)
	deep := filepath.Join(t.TempDir(), strings.Repeat("d", 200), strings.Repeat("d", 200), strings.Repeat("d", 100))
	require.NoError(t, os.MkdirAll(deep, 0o700))
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(deep, link))
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, []byte("text"), 0o600))

	textOf := func(dir, name string) string { return bytesOf(t, filepath.Join(dir, "data", name)) }
	orders, metrics, junk := textOf(stopped, "orders.db"), textOf(stopped, "metrics.db"), strings.Repeat("junk ", 5000)

	// A way to spoil a directory returns more arguments for the start.
	type spoiler = func(t *testing.T, dir string) []string
	given := func(args ...string) spoiler { return func(*testing.T, string) []string { return args } }
	removed := func(names ...string) spoiler {
		return func(t *testing.T, dir string) []string {
			for _, name := range names {
				require.NoError(t, os.Remove(filepath.Join(dir, "data", name)))
			}
			return nil
		}
	}
	replaced := func(name, text string) spoiler {
		return func(t *testing.T, dir string) []string {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "data", name), []byte(text), 0o600))
			return nil
		}
	}
	directory := func(name string) spoiler {
		return func(t *testing.T, dir string) []string {
			path := filepath.Join(dir, "data", name)
			require.NoError(t, errors.Join(os.Remove(path), os.Mkdir(path, 0o700)))
			return nil
		}
	}
	query := func(name, query string) spoiler {
		return func(t *testing.T, dir string) []string {
			execOn(t, filepath.Join(dir, "data", name), query)
			return nil
		}
	}
	lost := func(orders, done, counted, countedDone int) string {
		return fmt.Sprintf(`orders\.db has lost orders or their steps: it holds %d orders, %d of them completed, as of commit \d+, but \S+metrics\.db has counted %d and %d as of commit \d+; `+
			`put back the newest \S+orders\.db together with its -wal file, or delete \S+metrics\.db to accept the loss`, orders, done, counted, countedDone)
	}
	const tooDeep = "bytes and SQLite takes at most 500; choose another with "
	for _, test := range []struct {
		name  string
		from  string // a directory to copy
		spoil spoiler
		says  string
	}{
		{"-wal deleted after kill -9", killed, removed("orders.db-wal", "orders.db-shm"), lost(10, 10, 20, 20)},
		{"both -wal files deleted after kill -9", killed, removed("orders.db-wal", "orders.db-shm", "metrics.db-wal", "metrics.db-shm"), lost(10, 10, 20, 20)},
		{"orders.db deleted", stopped, removed("orders.db"), lost(0, 0, 20, 20)},
		{"an older orders.db", stopped, replaced("orders.db", textOf(earlier, "orders.db")), lost(10, 10, 20, 20)},
		{"one order more was counted", stopped, query("metrics.db", "UPDATE totals SET accepted = 21, seq = seq + 1"), lost(20, 20, 21, 20)},
		{"one order more was accepted, by a version without seq", stopped, query("metrics.db", "UPDATE totals SET accepted = 21, seq = 0, identity = 0"), lost(20, 20, 21, 20)},
		{"one order more was completed, by a version without seq", stopped, query("metrics.db", "UPDATE totals SET completed = 21, seq = 0, identity = 0"), lost(20, 20, 20, 21)},
		{"an order was started", stopped, query("metrics.db", "UPDATE totals SET seq = seq + 1"), lost(20, 20, 20, 20)},
		{"another service's orders.db", stopped, replaced("orders.db", textOf(elsewhere, "orders.db")), `orders\.db is not the database whose 20 orders \S+metrics\.db has counted: put that one back, or delete`},
		{"half of orders.db", stopped, replaced("orders.db", orders[:len(orders)/2]), "orders.db is damaged or not a database: put a backup in its place"},
		{"half of metrics.db", stopped, replaced("metrics.db", metrics[:len(metrics)/2]), "metrics.db is damaged or not a database: "},
		{"orders.db without its last byte", stopped, replaced("orders.db", orders[:len(orders)-1]), "orders.db is damaged or not a database: "},
		{"metrics.db without its last byte", stopped, replaced("metrics.db", metrics[:len(metrics)-1]), "metrics.db is damaged or not a database: "},
		{"orders.db without most of its last page", stopped, replaced("orders.db", orders[:len(orders)-4095]), "orders.db is damaged or not a database: "},
		{"no row in orders.db", stopped, query("orders.db", "DELETE FROM totals"), "orders.db is damaged or not a database: "},
		{"no row in metrics.db", stopped, query("metrics.db", "DELETE FROM totals"), "metrics.db is damaged or not a database: "},
		{"junk in orders.db", stopped, replaced("orders.db", junk), "orders.db is damaged or not a database: "},
		{"junk in metrics.db", stopped, replaced("metrics.db", junk), "metrics.db is damaged or not a database: "},
		{"junk in metrics.db after kill -9", killed, replaced("metrics.db", junk), "metrics.db is damaged or not a database: "},
		{"orders.db is a directory", stopped, directory("orders.db"), "orders.db is not a file: move it away"},
		{"metrics.db is a directory", stopped, directory("metrics.db"), "metrics.db is not a file: move it away"},
		{"a newer orders.db", stopped, query("orders.db", "PRAGMA user_version = 99"), "orders.db has schema version 99 and this orderd knows up to 3: "},
		{"a newer metrics.db", stopped, query("metrics.db", "PRAGMA user_version = 99"), "metrics.db has schema version 99 and this orderd knows up to 2: "},
		{"a newer metrics.db after kill -9", killed, query("metrics.db", "PRAGMA user_version = 99"), "metrics.db has schema version 99 and this orderd knows up to 2: "},
		{"another program's orders.db", stopped, query("orders.db", "PRAGMA application_id = 1"), "orders.db is another program's database: "},
		{"no table in orders.db", stopped, query("orders.db", "DROP TABLE totals"), "cannot use .*orders.db: "},
		{"a data directory that is a file", stopped, given("-data", file), "choose another with -data"},
		{"a data directory in a file", stopped, given("-data", file+"/data"), "choose another with -data"},
		{"a data directory in use", stopped, given("-data", running.cfg.data), "another orderd uses the data directory " + running.cfg.data + ": stop it first, or choose another with -data"},
		{"a data directory too deep for SQLite", stopped, given("-data", deep), tooDeep + "-data"},
		{"a link to such a one", stopped, given("-data", link), tooDeep + "-data"},
		{"a log too deep for SQLite", stopped, given("-log", deep+"/orderd.log"), tooDeep + "-log"},
		{"a log directory that is a file", stopped, given("-log", file+"/orderd.log"), "cannot write the log file .*; choose another with -log"},
		{"the log is another orderd's", stopped, given("-log", running.cfg.log.file), "cannot write the log file .*: another orderd uses it; choose another with -log"},
		{"the log is orders.db", stopped, func(_ *testing.T, dir string) []string {
			return []string{"-log", filepath.Join(dir, "data", "orders.db")}
		}, "cannot write the log file .*: it is orderd's own orders.db; choose another with -log"},
		{"the log is the -wal of an orders.db that lies elsewhere", killed, func(t *testing.T, dir string) []string {
			elsewhere := t.TempDir()
			for _, name := range []string{"orders.db", "orders.db-wal"} {
				require.NoError(t, os.Rename(filepath.Join(dir, "data", name), filepath.Join(elsewhere, name)))
			}
			require.NoError(t, os.Symlink(filepath.Join(elsewhere, "orders.db"), filepath.Join(dir, "data", "orders.db")))
			return []string{"-log", filepath.Join(elsewhere, "orders.db-wal")}
		}, "cannot write the log file .*: it is orderd's own orders.db-wal; choose another with -log"},
		{"the log is the token file", stopped, given("-token-file", file, "-log", file), "cannot write the log file .*: it is orderd's own file; choose another with -log"},
		{"the log is the key", stopped, given("-tls-cert", "c", "-tls-key", file, "-log", file), "cannot write the log file .*: it is orderd's own file; choose another with -log"},
		{"a certificate that is none", stopped, given("-tls-cert", file, "-tls-key", file), "cannot serve HTTPS: .*; see -tls-cert and -tls-key"},
		{"a port that is taken", stopped, given("-addr", taken.Addr().String()), "address " + taken.Addr().String() + " is taken by another program: choose another with -addr"},
		{"a port that is taken, before an upgrade", older, given("-addr", taken.Addr().String()), "is taken by another program"},
		{"an address that is not ours", stopped, given("-addr", "192.0.2.1:0"), "cannot listen on 192.0.2.1:0: .*; choose another address with -addr"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			require.NoError(t, os.CopyFS(dir, os.DirFS(test.from)))
			args := test.spoil(t, dir)
			before := contents(t, dir)
			require.Regexp(t, `^orderd: [^\n]*(`+test.says+`)`, refusedStart(t, dir, args...))
			require.Equal(t, before, contents(t, dir), "the data is as it was")
			if strings.Contains(test.says, "to accept the loss") || strings.Contains(test.says, "is not the database") {
				for _, suffix := range []string{"", "-wal", "-shm"} {
					os.Remove(filepath.Join(dir, "data", "metrics.db"+suffix))
				}
				a, _ := openIdle(t, dir, nil, nil)
				checkInvariants(t, a)
			}
		})
	}
	for _, test := range []struct {
		name, from, path string
		mode             os.FileMode
		args             []string
		says             string
	}{
		{"orders.db is read-only", stopped, "data/orders.db", 0o400, nil, "cannot write to the data directory: open .*orders.db: permission denied; check the owner and mode"},
		{"metrics.db is read-only", stopped, "data/metrics.db", 0o400, nil, "cannot write to the data directory: open .*metrics.db: permission denied; check the owner and mode"},
		{"a -wal file is read-only", killed, "data/orders.db-wal", 0o400, nil, "cannot bring .*orders.db-wal to disk: open .*: permission denied; check its owner and mode"},
		{"a data directory without write permission", stopped, "data", 0o500, nil, "orders.db cannot be opened for writing: check the owner and mode of the file and its directory"},
		{"a place for the data without write permission", stopped, "data", 0o500, []string{"-data", "data/deeper"}, "cannot make the data directory: .*; choose another with -data"},
		{"a log directory without write permission", stopped, "data", 0o500, []string{"-log", "data/orderd.log"}, "cannot write the log file .*; choose another with -log"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			needsModes(t)
			dir := t.TempDir()
			require.NoError(t, os.CopyFS(dir, os.DirFS(test.from)))
			before := contents(t, dir)
			path := filepath.Join(dir, test.path)
			info, err := os.Stat(path)
			require.NoError(t, err)
			require.NoError(t, os.Chmod(path, test.mode))
			t.Cleanup(func() { os.Chmod(path, info.Mode()) })
			for i := 1; i < len(test.args); i += 2 {
				test.args[i] = filepath.Join(dir, test.args[i])
			}
			p := launch(t, unprivileged(), dir, nil, test.args...)
			require.Equal(t, 1, p.wait(t, *patience))
			require.Regexp(t, `^orderd: [^\n]*(`+test.says+`)[^\n]*\n$`, p.stderr.String())
			require.Equal(t, before, contents(t, dir))
		})
	}
	t.Run("of six that start at once, five", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		var all []*process
		for i := range 6 {
			all = append(all, launch(t, nil, dir, nil, "-log", fmt.Sprintf("%s/logs/%d.log", dir, i)))
		}
		started := 0
		for _, p := range all {
			if p.printed(t, announced) != "" {
				started++
				continue
			}
			require.Equal(t, 1, p.code)
			require.Contains(t, p.stderr.String(), "another orderd uses the data directory")
		}
		require.Equal(t, 1, started)
	})
}

// TestMetricsAreRebuiltFromTheOrders whatever has become of metrics.db.
func TestMetricsAreRebuiltFromTheOrders(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]string{
		"deleted":         "",
		"empty":           "-",
		"a backup":        "UPDATE totals SET accepted = 2, completed = 1, took = 5, seq = seq - 1",
		"sums of nothing": "UPDATE totals SET accepted = 0, completed = 0, took = 0",
		"a wrong time":    "UPDATE totals SET took = 1000000",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			a, stop := openIdle(t, dir, nil, nil)
			for i, id := range commitTogether(t, a.store, sampleOrders(4)) {
				moveTo(t, a.store, id, status(min(i, 2)), int64(i))
			}
			checkInvariants(t, a)
			before := a.metrics.summarize(a.store.publishedTotals())
			stop()
			switch damage {
			case "":
				require.NoError(t, os.Remove(a.metrics.file.path))
			case "-":
				require.NoError(t, os.Truncate(a.metrics.file.path, 0))
			default:
				execOn(t, a.metrics.file.path, damage)
			}
			a, _ = openIdle(t, dir, nil, nil)
			require.Equal(t, before, a.metrics.summarize(a.store.publishedTotals()))
			checkInvariants(t, a)
		})
	}
}

// TestWALIndexCannotGrow lets the disk be full just when SQLite, after the
// fsync of a commit, wants a longer -shm file.
func TestWALIndexCannotGrow(t *testing.T) {
	t.Parallel()
	for _, killed := range []bool{false, true} {
		if killed && !*long {
			continue
		}
		t.Run(fmt.Sprintf("killed %v", killed), func(t *testing.T) {
			t.Parallel()
			dir, db := usedDir(t)
			log := filepath.Join(dir, "strace")
			straced(t, log, "") // or skips
			j := newJournal("index", time.Millisecond)
			j.large = true
			var tracer *exec.Cmd
			t.Cleanup(func() { // once the process has ended
				if tracer != nil {
					tracer.Wait()
				}
			})
			p := startProcess(t, dir, nil, "-delay", "1ms", "-workers", "2")
			j.place(t, p.url(), 1)
			_, end := holdSnapshot(t, db) // or a checkpoint would begin the WAL anew
			stopLoad := j.load(p.url(), 16, math.MaxInt)
			until(t, func() bool { return metric(t, p.url(), "orderd_wal_bytes") > 15.8e6 }, "the next step of the index is near, at 16.7 MB")
			stopLoad()
			tracer = exec.Command("strace", "-f", "-qq", "-o", log, "-P", db+"-shm",
				"-e", "trace=pwrite64", "-e", "inject=pwrite64:error=ENOSPC:when=1", "-p", strconv.Itoa(p.cmd.Process.Pid))
			require.NoError(t, tracer.Start())
			traced := regexp.MustCompile(`TracerPid:\t[1-9]`)
			until(t, func() bool {
				return traced.MatchString(bytesOf(t, fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid)))
			}, "it is traced")
			stopLoad = j.load(p.url(), 4, math.MaxInt) // each system call costs now
			stopObservers := j.observe(p.url())
			until(t, func() bool { return strings.Contains(bytesOf(t, log), "INJECTED") })
			if killed {
				p.kill()
				stopLoad()
				stopObservers()
				end()
				j.recover(t, dir)
				return
			}
			require.NoError(t, tracer.Process.Signal(syscall.SIGTERM))
			tracer.Wait()
			tracer = nil
			stopLoad()
			stopLoad = j.load(p.url(), 4, math.MaxInt) // the first may have run into their time-outs beside strace
			before := j.count(accepted)
			until(t, func() bool { return j.count(accepted) > before+20 })
			stopLoad()
			stopObservers()
			end()
			j.check(t, p.url())
			j.stopAndCheck(t, p)
		})
	}
}

// ---- faults: time, log, readers ----

func TestStoppedAndContinued(t *testing.T) {
	t.Parallel()
	needs(t, "kill")
	dir := t.TempDir()
	j := newJournal("stopped", 5*time.Millisecond)
	p := startProcess(t, dir, nil, "-delay", "5ms")
	stopLoad, stopObservers := j.load(p.url(), 4, 2000), j.observe(p.url())
	until(t, func() bool { return j.count(accepted) > 50 })
	require.NoError(t, p.signal("-STOP"))
	<-time.After(time.Duration(many(50)) * 100 * time.Millisecond)
	during := j.count(accepted)
	require.NoError(t, p.signal("-CONT"))
	until(t, func() bool { return j.count(accepted) > during+50 })
	stopLoad()
	stopObservers()
	require.Zero(t, j.count(unknown))
	j.check(t, p.url())
	j.stopAndCheck(t, p)
}

func TestClockSteps(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := newJournal("clock", 20*time.Millisecond)
	var calls atomic.Int64
	step := func(cfg *config) {
		now := func() time.Time { return time.Now().Add(time.Duration(calls.Add(1)%3-1) * time.Hour) }
		cfg.pool.delay, cfg.pool.now, cfg.store.now = 20*time.Millisecond, now, now
	}
	for range 2 { // the second time with the newest ID an hour ahead
		a, stop := openTestApp(t, dir, step, nil)
		base := base(a)
		stopObservers := j.observe(base)
		before, stopLoad := j.count(accepted), j.load(base, 4, math.MaxInt)
		until(t, func() bool { return j.count(accepted) > before+50 }, "orders are placed while the clock steps")
		stopLoad()
		j.place(t, base, 50)
		stopObservers()
		j.check(t, base)
		for _, o := range listed(t, base) {
			started, startErr := time.Parse(time.RFC3339, *o.StartedAt)
			ended, endErr := time.Parse(time.RFC3339, *o.CompletedAt)
			require.NoError(t, errors.Join(startErr, endErr))
			require.WithinRange(t, ended, started.Add(20*time.Millisecond), started.Add(time.Minute))
		}
		stop()
		require.NoError(t, j.checkFiles(dir))
	}
}

func TestLogTakenAway(t *testing.T) {
	t.Parallel()
	needsUnix(t) // Windows keeps an open file
	dir := t.TempDir()
	logs := filepath.Join(dir, "logs")
	file := filepath.Join(logs, "orderd.log")
	j := newJournal("log", 0)
	p := startProcess(t, dir, nil, "-delay", "0s")
	logged := func() bool {
		j.place(t, p.url(), 1)
		info, err := os.Stat(file)
		return err == nil && info.Size() > 0
	}
	for _, away := range []func() error{
		func() error { return os.Remove(file) },
		func() error {
			for os.RemoveAll(logs) != nil { // the log was just made anew
			}
			return nil
		},
		func() error { // logrotate's "create"
			return errors.Join(os.Rename(file, filepath.Join(dir, "moved.log")), os.WriteFile(file, nil, 0o600))
		},
	} {
		until(t, logged, "the log is written")
		require.NoError(t, away())
		j.place(t, p.url(), 10)
		until(t, logged, "the log comes back")
	}
	until(t, func() bool {
		return os.RemoveAll(logs) == nil && os.WriteFile(logs, nil, 0o600) == nil // else the log was just made anew
	}, "no log can be made")
	j.place(t, p.url(), 10)
	line := p.mustPrint(t, "orderd: cannot write the log")
	require.Contains(t, line, "orders go on")
	j.place(t, p.url(), 10)
	require.NotZero(t, metric(t, p.url(), "orderd_log_lines_dropped_total"))
	require.NoError(t, os.Remove(logs))
	until(t, logged, "the log comes back")
	j.check(t, p.url())
	j.stopAndCheck(t, p)
	require.Equal(t, 1, strings.Count(p.stderr.String(), "cannot write the log"))
}

func TestStderrThatNobodyReads(t *testing.T) {
	t.Parallel()
	needs(t, "mkfifo")
	for _, gone := range []bool{true, false} {
		t.Run(fmt.Sprintf("gone %v", gone), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			fifo := filepath.Join(dir, "stderr")
			require.NoError(t, exec.Command("mkfifo", fifo).Run())
			reader, err := os.OpenFile(fifo, os.O_RDWR, 0)
			require.NoError(t, err)
			defer reader.Close()
			j := newJournal("stderr", 0)
			p := launch(t, []string{"sh", "-c", `exec "$0" "$@" 2>"$FIFO"`}, dir, []string{"FIFO=" + fifo}, "-log", "-", "-delay", "0s", "-drain", "1s")
			line, err := bufio.NewReader(reader).ReadString('\n')
			require.NoError(t, err)
			started := decoded[struct{ Msg, Addr string }](t, line)
			require.Equal(t, "started", started.Msg)
			p.addr = started.Addr
			if gone {
				require.NoError(t, reader.Close())
			}
			j.place(t, p.url(), 450) // whose log lines are longer than a pipe
			j.check(t, p.url())
			if gone {
				require.NotZero(t, metric(t, p.url(), "orderd_log_lines_dropped_total"))
			}
			require.Equal(t, 0, p.terminate(t, 10*time.Second))
			require.NoError(t, j.checkFiles(dir))
		})
	}
}

// TestLogDirectoryReadOnly makes the log due for rotation where no file can be renamed or made.
func TestLogDirectoryReadOnly(t *testing.T) {
	t.Parallel()
	needsModes(t)
	dir := t.TempDir()
	logs := filepath.Join(dir, "logs")
	j := newJournal("read-only log", 0)
	require.NoError(t, os.Mkdir(logs, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(logs, "orderd.log"), bytes.Repeat([]byte("\n"), 1<<20-50_000), 0o600)) // 50 KB are left
	p := startWrapped(t, unprivileged(), dir, nil, "-delay", "0s", "-log-size", "1")
	files := func() int {
		j.place(t, p.url(), 100)
		found, err := filepath.Glob(filepath.Join(logs, "orderd*"))
		require.NoError(t, err)
		return len(found)
	}
	require.NoError(t, os.Chmod(logs, 0o500))
	t.Cleanup(func() { os.Chmod(logs, 0o700) })
	until(t, func() bool {
		require.Equal(t, 1, files())
		return strings.Contains(p.stderr.String(), "cannot write the log")
	}, "the log is due for rotation")
	require.NotZero(t, metric(t, p.url(), "orderd_log_lines_dropped_total"))
	require.NoError(t, os.Chmod(logs, 0o700))
	until(t, func() bool { return files() > 1 }, "the log is rotated")
	j.check(t, p.url())
	j.stopAndCheck(t, p)
}

// TestNoDescriptorsLeft for the log, which was closed by taking its directory away. Orders and reads need none.
func TestNoDescriptorsLeft(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
	const limit = 64
	dir := t.TempDir()
	logs := filepath.Join(dir, "logs")
	p := startWrapped(t, []string{"sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, limit)}, dir, nil, "-delay", "0s")
	client := &http.Client{Timeout: *patience, Transport: &http.Transport{MaxConnsPerHost: 1}} // before there are too many
	t.Cleanup(client.CloseIdleConnections)
	placed := int64(0)
	place := func() {
		got := exchange(t.Context(), client, p.url(), http.MethodPost, "/orders", asJSON, exampleOrder)
		require.Equal(t, http.StatusCreated, got.status, got.err)
		placed++
	}
	dropped := func() (lines int64) {
		got := exchange(t.Context(), client, p.url(), http.MethodGet, "/metrics", http.Header{"Accept": {"text/plain"}}, "")
		require.Equal(t, http.StatusOK, got.status, got.err)
		_, value, _ := strings.Cut(got.body, "\norderd_log_lines_dropped_total ")
		fmt.Sscan(value, &lines)
		return lines
	}
	var crowd []net.Conn
	starve := func() {
		until(t, func() bool {
			return os.RemoveAll(logs) == nil && os.Symlink("nowhere", logs) == nil // else the log was just made anew
		}, "no log can be made")
		before := dropped()
		until(t, func() bool { return dropped() > before }, "the log is closed")
		until(t, func() bool {
			conn, err := net.Dial("tcp", p.addr)
			require.NoError(t, err)
			crowd = append(crowd, conn)
			_, err = io.WriteString(conn, "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n") // so that it may stay
			require.NoError(t, err)
			for fd := range limit { // whoever started the test may have given it others above
				if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", p.cmd.Process.Pid, fd)); err != nil {
					return false
				}
			}
			return true
		}, "no descriptor is left")
		require.NoError(t, os.Remove(logs))
	}
	until(t, func() bool {
		starve()
		before := dropped()
		for range 100 {
			place()
			got := exchange(t.Context(), client, p.url(), http.MethodGet, "/orders?user_id=nobody", nil, "")
			require.Equal(t, http.StatusOK, got.status, got.err)
		}
		back := false
		until(t, func() bool {
			back = exists(filepath.Join(logs, "orderd.log"))
			return back || dropped() > before+200
		}, "their lines are dropped")
		return !back // else a connection that ended, of whomever, left the log a descriptor
	}, "orders and reads go on")
	for _, conn := range crowd {
		require.NoError(t, conn.Close())
	}
	until(t, func() bool {
		place()
		info, err := os.Stat(filepath.Join(logs, "orderd.log"))
		return err == nil && info.Size() > 0
	}, "the log comes back")
	require.Equal(t, placed, drained(t, p.url()).TotalOrdersProcessed)
	p.stop(t)
}

func backUp(ctx context.Context, data, to string) error {
	return run(ctx, []string{"-data", data, "-backup", to}, nil, io.Discard, io.Discard)
}

// TestBackupWhileItRuns does what the README says, under load.
func TestBackupWhileItRuns(t *testing.T) {
	t.Parallel()
	dir, restored := t.TempDir(), t.TempDir()
	j, k := newJournal("backup", time.Millisecond), newJournal("backup", time.Millisecond)
	p := startProcess(t, dir, nil, "-delay", "1ms")
	stop := j.load(p.url(), 8, math.MaxInt)
	defer stop()
	until(t, func() bool { return j.count(accepted) > 300 })
	j.mu.Lock()
	k.accepted = slices.Clone(j.accepted) // what the backup must hold; it may hold more
	j.mu.Unlock()
	data, to := filepath.Join(dir, "data"), filepath.Join(restored, "data")
	require.NoError(t, backUp(t.Context(), data, to))
	require.ErrorContains(t, backUp(t.Context(), data, to), "is not empty: name a new directory for the backup")
	stop()
	j.check(t, p.url())
	p.kill()
	k.intents = j.intents
	p = startProcess(t, restored, nil, "-delay", "1ms")
	sum := drained(t, p.url())
	for _, in := range j.intents { // those that came after it
		if in.outcome == accepted {
			in.outcome = unknown
		}
	}
	require.NoError(t, k.verify(listed(t, p.url()), sum))
	k.stopAndCheck(t, p)
}

// TestBackupOfAStoppedService copies what a killed service left, though it was interrupted once, and
// refuses what is no service's directory.
func TestBackupOfAStoppedService(t *testing.T) {
	t.Parallel()
	dir, restored := t.TempDir(), filepath.Join(t.TempDir(), "a?b #%20")
	data, to := filepath.Join(dir, "data"), filepath.Join(restored, "data")
	require.ErrorContains(t, backUp(t.Context(), data, to), "cannot read the data directory")
	require.ErrorContains(t, backUp(t.Context(), t.TempDir(), to), "metrics.db to back up: name the directory of the service with -data")
	require.NoDirExists(t, to)
	j := newJournal("stopped", 0)
	p := startProcess(t, dir, nil, "-delay", "0s")
	j.place(t, p.url(), 50)
	p.kill()
	interrupted, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorContains(t, backUp(interrupted, data, to), "no backup was made")
	require.Empty(t, contents(t, restored))
	require.NoError(t, backUp(t.Context(), data, to))
	for _, name := range []string{"orders.db", "metrics.db"} {
		info, err := os.Stat(filepath.Join(to, name))
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	}
	j.recover(t, restored, "-delay", "0s")
	j.seen = map[string]status{} // the other one begins where it was
	j.recover(t, dir, "-delay", "0s")
}

// walKept is the most that the -wal file of orders.db takes at rest, in bytes.
const walKept = truncateAbovePages * (24 + 4096)

// holdSnapshot keeps a transaction open on orders.db. count counts the orders in it; end lets go.
func holdSnapshot(tb testing.TB, path string) (count func() int64, end func()) {
	tb.Helper()
	db, err := openSQLite(path, "mode=ro")
	require.NoError(tb, err)
	snapshot, err := db.Begin()
	require.NoError(tb, err)
	end = sync.OnceFunc(func() { require.NoError(tb, errors.Join(snapshot.Rollback(), db.Close())) })
	tb.Cleanup(end)
	count = func() (n int64) {
		require.NoError(tb, snapshot.QueryRow("SELECT count(*) FROM orders").Scan(&n))
		return n
	}
	count() // the first read makes the snapshot
	return count, end
}

// TestAnotherProgramLocksTheDatabase holds SQLite's write lock beside the service.
func TestAnotherProgramLocksTheDatabase(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	other, err := openSQLite(onSQLite(t, a).file.path, "_txlock=immediate")
	require.NoError(t, err)
	t.Cleanup(func() { other.Close() })
	lock, err := other.Begin()
	require.NoError(t, err)
	got := post(t, a, exampleOrder)
	require.Equal(t, http.StatusServiceUnavailable, got.status)
	require.Contains(t, got.body, "not taken")
	require.NoError(t, lock.Rollback())
	until(t, func() bool { return get(t, a, "/readyz").status == http.StatusOK })
	place(t, a, "user", "item")
	awaitRest(t, a, 0, 1)
	checkInvariants(t, a)
}

// TestReaderUnderLoad holds a transaction open beside the real process. With
// -reader-holds 1m the WAL grows far beyond its usual length.
func TestReaderUnderLoad(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := newJournal("reader", time.Millisecond)
	j.large = true
	p := startProcess(t, dir, nil, "-delay", "1ms", "-workers", "64")
	j.place(t, p.url(), 10)
	rate := func(d time.Duration) float64 {
		before, stop := j.count(accepted), j.load(p.url(), 8, math.MaxInt)
		<-time.After(d)
		stop()
		return float64(j.count(accepted)-before) / d.Seconds()
	}
	free := rate(300 * time.Millisecond)
	count, end := holdSnapshot(t, filepath.Join(dir, "data", "orders.db"))
	held := count()
	watched := rate(*readerHold)
	for try := 0; watched <= free/3 && try < 10; try++ {
		watched = rate(300 * time.Millisecond) // other tests had the machine
	}
	require.Equal(t, held, count())
	longest := metric(t, p.url(), "orderd_wal_bytes")
	end()
	shrunk := math.Inf(1)
	for try := 0; shrunk > walKept && try < 60; try++ {
		rate(100 * time.Millisecond)
		shrunk = metric(t, p.url(), "orderd_wal_bytes")
	}
	t.Logf("%.0f orders/s without the reader, %.0f/s beside it; the WAL grew to %.0f MB and shrank to %.0f MB",
		free, watched, longest/1e6, shrunk/1e6)
	require.Greater(t, watched, free/3)
	require.LessOrEqual(t, shrunk, float64(walKept))
	j.check(t, p.url())
	j.stopAndCheck(t, p)
}

// TestReadsDoNotWaitForWrites holds the writer in COMMIT, and asks for everything.
func TestReadsDoNotWaitForWrites(t *testing.T) {
	t.Parallel()
	var held heldOnce
	a, _ := openTestApp(t, t.TempDir(), func(c *config) { c.store.cache = 1 }, func(a *app) { onSQLite(t, a).beforeCommit = func(*batch) { held.hold() } })
	t.Cleanup(held.release)
	onDisk, cached := place(t, a, "u", "i"), place(t, a, "u", "i")
	awaitRest(t, a, 0, 2)
	until(t, func() bool { return statusOf(t, a, cached) == "Completed" })
	reached := held.arm()
	writing, addr := make(chan answer, 1), a.listener.Addr().String()
	go func() { writing <- send(context.Background(), addr, http.MethodPost, "/orders", asJSON, exampleOrder) }()
	<-reached
	for _, path := range []string{"/orders/" + cached, "/orders/" + onDisk, "/orders/" + onDisk + "?view=full", "/orders", "/orders?status=Pending",
		"/orders?status=Processing", "/orders?status=Completed", "/orders?user_id=u", "/orders?user_id=u&status=Completed", "/metrics", "/", "/openapi.json", "/livez"} {
		require.Equal(t, http.StatusOK, get(t, a, path).status, path)
	}
	require.Contains(t, []int{http.StatusOK, http.StatusServiceUnavailable}, get(t, a, "/readyz").status, "once that has lasted 2 s, it says so")
	require.Equal(t, http.StatusOK, call(t, a, http.MethodGet, "/metrics", http.Header{"Accept": {"text/plain"}}, "").status)
	require.Equal(t, http.StatusOK, call(t, a, http.MethodGet, "/orders/"+onDisk, prefer("wait=60"), "").status)
	require.Empty(t, writing, "all the while the order is not answered")
	held.release()
	require.Equal(t, http.StatusCreated, (<-writing).status)
}

// heldOnce is a place at which a goroutine is held, once it is armed.
type heldOnce struct {
	mu            sync.Mutex // guards the rest
	reached, left chan struct{}
}

// arm holds who comes next to hold, which closes reached.
func (h *heldOnce) arm() (reached <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.reached, h.left = make(chan struct{}), make(chan struct{})
	return h.reached
}

func (h *heldOnce) hold() {
	h.mu.Lock()
	reached, left := h.reached, h.left
	h.reached = nil
	h.mu.Unlock()
	if reached != nil {
		close(reached)
		<-left
	}
}

// release lets go, at the end of the test too.
func (h *heldOnce) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.left != nil {
		close(h.left)
		h.left = nil
	}
}

// TestListsDoNotHoldTheWAL has some list under way at every moment.
func TestListsDoNotHoldTheWAL(t *testing.T) {
	t.Parallel()
	a, _ := openIdle(t, t.TempDir(), nil, nil)
	var quit atomic.Bool
	var readers sync.WaitGroup
	t.Cleanup(func() { quit.Store(true) })
	for range 2 {
		readers.Go(func() {
			for !quit.Load() {
				_, err := a.store.list(filter{before: math.MaxInt64, limit: maxPage})
				assert.NoError(t, err)
			}
		})
	}
	longest := int64(0)
	for written := 0; written < 5*walKept/2; written += 64 * maxItemIDs {
		commitTogether(t, a.store, largest(64))
		longest = max(longest, walBytes(a))
	}
	quit.Store(true)
	readers.Wait()
	t.Logf("WAL of at most %d MB", longest>>20)
	require.Less(t, longest, int64(2*walKept))
}

// engineAlone is an engine that has been started, and nothing else of its app.
func engineAlone(t *testing.T, change func(*config)) (a *app, e *sqliteEngine) {
	t.Helper()
	a = lookedAt(t, t.TempDir(), change, nil)
	t.Cleanup(func() { assert.NoError(t, errors.Join(a.closeFiles(), a.log.close())) })
	e = onSQLite(t, a)
	_, err := e.start()
	require.NoError(t, err)
	return a, e
}

// TestACheckpointWaitsForAReaderOnlyAMoment, and for the same reader only once.
func TestACheckpointWaitsForAReaderOnlyAMoment(t *testing.T) {
	t.Parallel()
	a, e := engineAlone(t, nil)
	_, end := holdSnapshot(t, e.file.path)
	for walBytes(a) < checkpointPages*4096 {
		b := newBatch(nil)
		b.creates = largest(512)
		a.store.writer.number(b.creates)
		require.NoError(t, e.commit(b))
	}
	quickest := [2]time.Duration{time.Hour, time.Hour} // of a try with a new reader, and with the same: other programs take time too
	for range 5 {
		for i := range quickest {
			e.wal.retryAt, e.wal.pagesMoved = time.Now(), e.wal.pagesMoved-int64(1-i)
			began := time.Now()
			require.NoError(t, e.wal.checkpointIfDue())
			quickest[i] = min(quickest[i], time.Since(began))
			require.NotZero(t, e.wal.retryAt, "it is tried again")
		}
	}
	require.GreaterOrEqual(t, quickest[0], readerPause)
	require.Less(t, quickest[0], busyTimeout/2)
	require.Less(t, quickest[1], readerPause)
	var timeout int64
	require.NoError(t, e.file.QueryRow("PRAGMA busy_timeout").Scan(&timeout))
	require.Equal(t, busyTimeout.Milliseconds(), timeout)
	end()
}

// TestReaderHoldsTheWAL until its end: then the WAL is given back.
func TestReaderHoldsTheWAL(t *testing.T) {
	t.Parallel()
	a, _ := openIdle(t, t.TempDir(), nil, nil)
	path := onSQLite(t, a).file.path
	long := func() bool { return walBytes(a) > walKept*5/4 }
	// fill writes until done, and watches that nobody waits.
	fill := func(done func() bool) {
		for n := 0; !done(); n++ {
			require.Less(t, n, 200)
			began := time.Now()
			commitTogether(t, a.store, largest(64))
			require.Less(t, time.Since(began), 10*time.Second)
		}
	}
	fill(func() bool { return a.store.publishedTotals().accepted >= 64 })
	count, end := holdSnapshot(t, path)
	held := count()
	fill(long)
	require.Equal(t, held, count())
	require.Greater(t, a.store.publishedTotals().accepted, held+1000)
	end()
	fill(func() bool { return walBytes(a) <= walKept })
	checkInvariants(t, a)

	_, endFirst := holdSnapshot(t, path)
	fill(long)
	_, endLast := holdSnapshot(t, path) // needs nothing of the WAL moved, and yet holds it
	endFirst()
	require.Never(t, func() bool { return walBytes(a) <= walKept }, 2*retryPause, 100*time.Millisecond)
	endLast()
	until(t, func() bool { return walBytes(a) == 0 }, "the WAL is given back though nothing is written")
}

// ---- faults: the work, overload ----

func TestOverload(t *testing.T) {
	t.Parallel()
	var held heldOnce
	a, _ := openTestApp(t, t.TempDir(), nil, func(a *app) { onSQLite(t, a).beforeCommit = func(*batch) { held.hold() } })
	t.Cleanup(held.release)
	reached := held.arm()
	base := base(a)
	var wg sync.WaitGroup
	create := func() { assert.NoError(t, a.store.create(&creation{order: order{userID: "u", itemIDs: "x"}})) }
	wg.Go(create)
	<-reached
	for range maxCreates {
		wg.Go(create)
	}
	until(t, func() bool { return a.store.intake.creates() == maxCreates })
	j := newJournal("overload", 0)
	for range 10 { // at once: the writer is held
		o, err := j.send(newClient(), base, j.next())
		require.NoError(t, err)
		require.Equal(t, refused, o)
	}
	require.Equal(t, http.StatusOK, get(t, a, "/orders?limit=1").status, "reads go on")
	held.release()
	wg.Wait()
	j.place(t, base, 1)
	require.EqualValues(t, maxCreates+2, drained(t, base).TotalOrdersProcessed)
	require.Empty(t, j.violations)
}

// TestTheOpenBatchIsBounded in creates, in their bytes and in steps.
func TestTheOpenBatchIsBounded(t *testing.T) {
	t.Parallel()
	in := newIntake()
	for _, c := range largest(maxCreateBytes / maxItemIDs) {
		_, err := in.add(c)
		require.NoError(t, err)
	}
	_, err := in.add(sampleOrder(1, ""))
	require.ErrorIs(t, err, errBusy)
	require.ErrorIs(t, in.ready(), errBusy)
	for i := range maxSteps {
		require.Nil(t, in.addStep(transition{id: numbered(i), to: processing}))
	}
	require.Equal(t, in.open, in.addStep(transition{id: numbered(maxSteps), to: processing}))
}

// TestAMillionPending starts on a backlog far longer than the channel.
func TestAMillionPending(t *testing.T) {
	t.Parallel()
	orders, dir := 50_000, t.TempDir()
	if *long {
		orders = 1_000_000
	}
	seed(t, dir, 0, orders)
	p := startProcess(t, dir, nil, "-delay", "0s", "-workers", "1", "-queue", "16", "-cache", "1000")
	largest := 0.0
	for range time.Tick(50 * time.Millisecond) {
		largest = max(largest, p.residentMB(t))
		if sum, err := getSummary(p.url()); assert.NoError(t, err) && sum.TotalOrdersProcessed == int64(orders) {
			break
		}
	}
	p.stop(t)
	t.Logf("%d orders, at most %.0f MB resident", orders, largest)
	require.True(t, raced() || largest < 80)
	var count, behind int64
	db, err := openSQLite(filepath.Join(dir, "data", "orders.db"))
	require.NoError(t, err)
	defer db.Close()
	require.NoError(t, db.QueryRow(`SELECT count(*), count(*) FILTER (WHERE started < earlier)
		FROM (SELECT started, lag(started) OVER (ORDER BY id_high) AS earlier FROM orders WHERE status = 2)`).Scan(&count, &behind))
	require.EqualValues(t, orders, count)
	require.Zero(t, behind, "orders that were started before an older one")
}

// tampered is an engine whose commits a test makes.
type tampered struct {
	engine
	with func(e engine, b *batch) error
}

func (e tampered) commit(b *batch) error { return e.with(e.engine, b) }

// commits has the writer of an app commit so.
func commits(with func(e engine, b *batch) error) func(*app) {
	return func(a *app) { a.store.writer.engine = tampered{a.store.engine, with} }
}

// TestNothingFollowsWhatIsInDoubt stops the writer while its last batch may be in the table or not.
func TestNothingFollowsWhatIsInDoubt(t *testing.T) {
	t.Parallel()
	var others atomic.Int64
	a, stop := openIdle(t, t.TempDir(), nil, commits(func(e engine, b *batch) error {
		if len(b.creates) > 0 {
			return errInDoubt
		}
		others.Add(1)
		return e.commit(b)
	}))
	require.ErrorIs(t, a.store.create(sampleOrder(1, "")), errOutcomeUnknown)
	until(t, func() bool { return a.store.ready() != nil })
	a.store.step(transition{id: ulid.Make(), from: pending, to: processing, startedMS: 1})
	before := others.Load()
	stop()
	require.Equal(t, before, others.Load(), "another batch would be taken for it")
}

// TestWhatIsInDoubtIsNotCalledRefused: only an order that comes before it is cleared up is refused.
func TestWhatIsInDoubtIsNotCalledRefused(t *testing.T) {
	t.Parallel()
	for name, doubt := range map[string]error{"until the next start": errOutcomeUnknown, "for a while": errInDoubt} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var tries atomic.Int64
			a, _ := openIdle(t, t.TempDir(), nil, commits(func(e engine, b *batch) error {
				if len(b.creates) > 0 && tries.Add(1) <= 3 {
					return doubt
				}
				return e.commit(b)
			}))
			require.ErrorIs(t, a.store.create(sampleOrder(1, "cart")), errOutcomeUnknown)
			until(t, func() bool { return a.store.ready() != nil })
			require.ErrorIs(t, a.store.create(sampleOrder(1, "cart")), errOutcomeUnknown, "its first create may be there")
			require.ErrorIs(t, a.store.create(sampleOrder(2, "")), errInDoubt, "it is not taken")
			if doubt == errOutcomeUnknown {
				<-a.store.failed()
				a.store.writer.failure = nil // the test closes it as if nothing had been
				return
			}
			until(t, func() bool { return a.store.ready() == nil }, "the batch is committed in the end")
			again := sampleOrder(1, "cart")
			require.NoError(t, a.store.create(again))
			require.True(t, again.replayed, "it was there")
			require.EqualValues(t, 1, a.store.publishedTotals().accepted)
			st, err := a.store.status(again.id)
			require.NoError(t, err)
			require.Equal(t, pending, st)
			checkInvariants(t, a)
		})
	}
}

// ---- what people break: the table changed by hand, files taken away ----

// TestAListIsNotBehindAnAnswer asks for an order by each route right after another has told its status.
func TestAListIsNotBehindAnAnswer(t *testing.T) {
	t.Parallel()
	slow := func(c *config) { c.pool.delay = 4 * time.Millisecond }
	a, _ := openTestApp(t, t.TempDir(), slow, commits(func(e engine, b *batch) error {
		err := e.commit(b)
		time.Sleep(2 * time.Millisecond) // the table shows it, and the cache does not yet
		return err
	}))
	var clients sync.WaitGroup
	client := func(ask func() error) {
		clients.Go(func() {
			for range many(300) {
				if !assert.NoError(t, ask()) {
					return
				}
			}
		})
	}
	done := completed
	for i := range 8 {
		user := fmt.Sprintf("user%d", i)
		client(func() error {
			c := &creation{order: order{userID: user, itemIDs: "item"}}
			err := a.store.create(c)
			if err = cmp.Or(err, a.store.wait(t.Context(), c.id)); err != nil {
				return err
			}
			for _, f := range []filter{{status: &done}, {userID: user}, {userID: user, status: &done}} {
				f.before, f.limit = high(c.id)+1, 1
				p, err := a.store.list(f)
				if err != nil || len(p.orders) == 0 || p.orders[0].id != c.id || p.orders[0].status != completed {
					return fmt.Errorf("%s is Completed by its ID, and by list %+v: %v, %v", c.id, f, p.orders, err)
				}
			}
			return nil
		})
		client(func() error { // and the other way round
			p, err := a.store.list(filter{before: math.MaxInt64, limit: 50})
			for _, o := range p.orders {
				if st, statusErr := a.store.status(o.id); statusErr != nil || st < o.status {
					return fmt.Errorf("%s is %s in a list, then %s by its ID: %v", o.id, o.status, st, statusErr)
				}
			}
			return err
		})
	}
	client(func() error { // nor is a whole order ahead of the status alone
		c := &creation{order: order{userID: "user", itemIDs: "item"}}
		err := a.store.create(c)
		for st := pending; st < completed && err == nil; {
			o, getErr := a.store.get(c.id)
			after, statusErr := a.store.status(c.id)
			if err = cmp.Or(getErr, statusErr); err == nil && after < o.status {
				return fmt.Errorf("%s is %s, then %s", c.id, o.status, after)
			}
			st = after
		}
		return err
	})
	clients.Wait()
}

// TestAReadIsHeldUntilTheCommitItSawIsPublished: meanwhile the cache would answer with an older status.
func TestAReadIsHeldUntilTheCommitItSawIsPublished(t *testing.T) {
	t.Parallel()
	var held heldOnce
	a, _ := openIdle(t, t.TempDir(), nil, commits(func(e engine, b *batch) error {
		err := e.commit(b)
		held.hold()
		return err
	}))
	t.Cleanup(held.release)
	id := commitTogether(t, a.store, sampleOrders(1))[0]
	reached := held.arm()
	a.store.step(transition{id: id, from: pending, to: completed, startedMS: 1})
	<-reached
	reads := make(chan order, 2)
	for _, read := range []func() (order, error){
		func() (order, error) { return a.store.get(id) },
		func() (order, error) {
			p, err := a.store.list(filter{before: math.MaxInt64, limit: 1})
			return p.orders[0], err
		},
	} {
		go func() {
			o, err := read()
			assert.NoError(t, err)
			reads <- o
		}()
	}
	assert.Never(t, func() bool { return len(reads) > 0 }, 100*time.Millisecond, time.Millisecond)
	held.release()
	for range cap(reads) {
		o := <-reads
		require.Equal(t, completed, o.status)
		st, err := a.store.status(id)
		require.NoError(t, err)
		require.Equal(t, completed, st)
	}
}

// TestAnOrderThatTheTableRefusesFailsAlone, in a batch large enough for statements of many rows.
func TestAnOrderThatTheTableRefusesFailsAlone(t *testing.T) {
	t.Parallel()
	a, _ := openIdle(t, t.TempDir(), nil, nil)
	tamper(t, a, "CREATE TRIGGER poison BEFORE INSERT ON orders WHEN NEW.user_id = 'poison' BEGIN SELECT RAISE(ABORT, 'poison'); END")
	for _, key := range []string{"", "cart"} {
		creates := sampleOrders(3 * insertRows)
		creates[insertRows].userID, creates[insertRows].key = "poison", key
		creates[7].key = key + "another"
		commitTogether(t, a.store, creates)
		require.ErrorIs(t, creates[insertRows].err, errRejected)
		for _, c := range slices.Delete(creates, insertRows, insertRows+1) {
			require.NoError(t, c.err)
			o, err := a.store.get(c.id)
			require.NoError(t, err)
			require.Equal(t, c.userID, o.userID)
		}
	}
	require.NoError(t, a.store.ready())
	checkInvariants(t, a)
}

// TestTheUserIndexStopsNoOrder has its writes fail for a while.
func TestTheUserIndexStopsNoOrder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, stop := openIdle(t, dir, nil, nil)
	tamper(t, a, "CREATE TRIGGER broken BEFORE INSERT ON orders_by_user BEGIN SELECT RAISE(ABORT, 'broken'); END")
	for range 3 {
		commitTogether(t, a.store, sampleOrders(indexEvery))
	}
	orders, _ := walk(t, a.store, filter{userID: "user7", limit: 2})
	require.Len(t, orders, 3)
	tamper(t, a, "DROP TRIGGER broken")
	commitTogether(t, a.store, sampleOrders(2*indexEvery))
	checkInvariants(t, a)
	orders, _ = walk(t, a.store, filter{userID: "user7", limit: 2})
	require.Len(t, orders, 4)
	stop()
	require.NotEmpty(t, logged(t, dir, "the index of users could not be written; lists by user are slower until it can"))
}

// servedToItsEnd is an app whose service ends by itself, or with ctx. ended gets why.
func servedToItsEnd(ctx context.Context, t *testing.T, dir string) (a *app, ended chan error) {
	t.Helper()
	a, ended = lookedAt(t, dir, nil, nil), make(chan error, 1)
	require.NoError(t, a.start())
	go func() { ended <- a.serve(ctx) }()
	return a, ended
}

func TestASecondWriterIsNoticed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, ended := servedToItsEnd(t.Context(), t, dir)
	place(t, a, "user", "item")
	awaitRest(t, a, 0, 1)
	require.NoError(t, os.Remove(filepath.Join(dir, "data", "orderd.lock")))
	b, stop := openIdle(t, dir, func(cfg *config) { cfg.log.file = dir + "/other.log" }, nil)
	commitTogether(t, b.store, sampleOrders(1))

	got := post(t, a, orderBody(`"user"`, `"item"`, "1"))
	require.Equal(t, http.StatusServiceUnavailable, got.status)
	require.Contains(t, decoded[fault](t, got.body).Detail, "was not taken")
	require.ErrorContains(t, <-ended, "was written by another program")
	commitTogether(t, b.store, sampleOrders(1)) // the other one goes on
	require.Len(t, allOrders(t, b.store), 3)
	stop()
}

// TestFilesTakenAwayWhileServing moves files and puts them back.
func TestFilesTakenAwayWhileServing(t *testing.T) {
	t.Parallel()
	needsUnix(t) // elsewhere an open file cannot be moved
	for _, taken := range []string{".", "orders.db", "orders.db-wal"} {
		t.Run(taken, func(t *testing.T) {
			t.Parallel()
			a := newTestApp(t, nil)
			place(t, a, "user", "item")
			path, aside := filepath.Join(a.cfg.data, taken), filepath.Join(t.TempDir(), "aside")
			require.NoError(t, os.Rename(path, aside))
			until(t, func() bool { return a.store.ready() != nil }, "it is noticed")
			require.Equal(t, http.StatusServiceUnavailable, post(t, a, orderBody(`"user"`, `"item"`, "1")).status)
			require.Equal(t, http.StatusOK, get(t, a, "/orders?limit=1").status)
			require.NoError(t, os.Rename(aside, path))
			until(t, func() bool { return a.store.ready() == nil }, "it goes on")
			place(t, a, "user", "item")
			awaitRest(t, a, 0, 2)
			checkInvariants(t, a)
		})
	}
}

func TestFilesRemovedWhileServing(t *testing.T) {
	t.Parallel()
	needsUnix(t)
	ctx, cancel := context.WithCancel(t.Context())
	a, ended := servedToItsEnd(ctx, t, t.TempDir())
	require.NoError(t, os.RemoveAll(a.cfg.data))
	until(t, func() bool { return a.store.ready() != nil })
	cancel()
	require.ErrorContains(t, <-ended, "orders.db was removed or replaced while orderd has it open")
}

// TestOrdersBehindALink kills a service whose orders.db is a link: SQLite keeps the -wal beside the target.
func TestOrdersBehindALink(t *testing.T) {
	t.Parallel()
	needsUnix(t)
	dir, there := t.TempDir(), filepath.Join(t.TempDir(), "there.db")
	link := filepath.Join(dir, "data", "orders.db")
	require.NoError(t, errors.Join(os.Mkdir(filepath.Dir(link), 0o700), os.Symlink(there, link)))
	require.Contains(t, refusedStart(t, dir), link+" is a link to a file that does not exist")
	require.NoError(t, os.WriteFile(there, nil, 0o600))
	j := newJournal("link", 0)
	p := startProcess(t, dir, nil, "-delay", "0s")
	j.place(t, p.url(), 20)
	p.kill()
	require.FileExists(t, there+"-wal")
	j.recover(t, dir, "-delay", "0s")
}

// TestPermanentErrorsEndTheService breaks the table under it.
func TestPermanentErrorsEndTheService(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ damage, says string }{
		"a lost table":                     {"DROP TABLE totals", "no such table: totals"},
		"a step that a constraint refuses": {"CREATE TRIGGER no BEFORE UPDATE ON orders BEGIN SELECT RAISE(ABORT, 'no'); END", "no"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, ended := servedToItsEnd(t.Context(), t, t.TempDir())
			tamper(t, a, test.damage)
			post(t, a, exampleOrder)
			select {
			case err := <-ended:
				require.ErrorIs(t, err, errBroken)
				require.ErrorContains(t, err, test.says)
			case <-time.After(*patience):
				t.Fatal("it went on")
			}
		})
	}
}

// TestTotalsAreMendedAtStart changes orders by hand while the service is stopped.
func TestTotalsAreMendedAtStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, stop := openTestApp(t, dir, nil, nil)
	for range 3 {
		place(t, a, "user", "item")
	}
	awaitRest(t, a, 0, 3)
	stop()
	const newest = " WHERE id_high = (SELECT max(id_high) FROM orders)"
	tamper(t, a, "UPDATE orders SET status = 1, took = NULL"+newest)
	a, stop = openIdle(t, dir, nil, nil)
	require.Equal(t, []int64{1, 2}, []int64{counts(a).processing, counts(a).completed})
	stop()
	tamper(t, a, "UPDATE orders SET status = 0, started = NULL"+newest)
	a, stop = openIdle(t, dir, nil, nil)
	sum := a.metrics.summarize(a.store.publishedTotals())
	require.Equal(t, summary{OrdersPending: 1, OrdersCompleted: 2, TotalOrdersProcessed: 2, AverageProcessingTime: sum.AverageProcessingTime}, sum)
	stop()
	require.Len(t, logged(t, dir, "the totals did not agree with the orders, which somebody has changed: they were counted anew"), 2)
	a, _ = openTestApp(t, dir, nil, nil)
	awaitRest(t, a, 0, 3)
	checkInvariants(t, a)
}

func TestAClockThatWasAheadIsTold(t *testing.T) {
	t.Parallel()
	dir, tomorrow := t.TempDir(), func() time.Time { return time.Now().Add(24 * time.Hour) }
	a, stop := openTestApp(t, dir, func(c *config) { c.store.now = tomorrow }, nil)
	place(t, a, "user", "item")
	stop()
	a, stop = openTestApp(t, dir, nil, nil)
	require.InDelta(t, 86400, metric(t, base(a), "orderd_clock_behind_seconds"), 600)
	stop()
	require.Contains(t, bytesOf(t, a.cfg.log.file), "the clock was once")
}

// TestACutFirstStartIsNoDamage, whatever a power cut then leaves, nor is a -wal whose database was deleted.
func TestACutFirstStartIsNoDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cfg := testConfig(dir)
	require.NoError(t, os.MkdirAll(cfg.data, 0o700))
	for name, text := range map[string]string{"metrics.db": "", "metrics.db.new": "half a page", "metrics.db-journal": "junk"} {
		require.NoError(t, os.WriteFile(filepath.Join(cfg.data, name), []byte(text), 0o600))
	}
	leftByKill(t, filepath.Join(cfg.data, "orders.db.new"), "CREATE TABLE orders (id)")
	ofDeleted := filepath.Join(cfg.data, "orders.db")
	leftByKill(t, ofDeleted, "CREATE TABLE orders (id)")
	require.NoError(t, os.Remove(ofDeleted))
	a, stop := openTestApp(t, dir, nil, nil)
	place(t, a, "user", "item")
	awaitRest(t, a, 0, 1)
	checkInvariants(t, a)
	stop()
	require.Equal(t, []string{"metrics.db", "orderd.lock", "orders.db"}, namesIn(t, cfg.data))
}

// TestReadsAtTheEndLeaveNoWAL lists while the service closes its files.
func TestReadsAtTheEndLeaveNoWAL(t *testing.T) {
	t.Parallel()
	for range many(30) {
		a, stop := openIdle(t, t.TempDir(), nil, nil)
		commitTogether(t, a.store, sampleOrders(200))
		var readers sync.WaitGroup
		for range 8 {
			readers.Go(func() {
				for {
					if _, err := a.store.list(filter{before: math.MaxInt64, limit: 200}); err != nil {
						return // it is closed
					}
				}
			})
		}
		stop()
		readers.Wait()
		require.NoFileExists(t, onSQLite(t, a).file.path+"-wal")
	}
}

// askTogether has so many clients ask n times in all, and demands the same status of each answer.
func askTogether(t *testing.T, clients, n, status int, ask func(*http.Client) answer) {
	t.Helper()
	var all sync.WaitGroup
	for range clients {
		all.Go(func() {
			client := newClient()
			defer client.CloseIdleConnections()
			for range n / clients {
				if got := ask(client); !assert.Equal(t, status, got.status, got.err) {
					return
				}
			}
		})
	}
	all.Wait()
}

// TestMemoryIsBoundedInBytes with a backlog of the largest orders, in the channel as far as they go.
func TestMemoryIsBoundedInBytes(t *testing.T) {
	t.Parallel()
	p := startProcess(t, t.TempDir(), nil, "-delay", "24h", "-drain", "0s", "-workers", "1", "-queue", "1000000")
	quiet := p.residentMB(t)
	body := orderBody(`"user"`, `"`+strings.Repeat("x", maxItemIDs)+`"`, "1")
	askTogether(t, 16, max(many(20_000), 3_000), http.StatusCreated, func(client *http.Client) answer {
		return exchange(t.Context(), client, p.url(), http.MethodPost, "/orders", asJSON, body)
	})
	require.True(t, p.residentMB(t) < quiet+40 || raced(), "not even the least number of them, of 16 KB each, would fit there") // the race detector takes memory of its own
	p.stop(t)
}

// TestListsPushNoStatusOut lists more orders than the cache holds.
func TestListsPushNoStatusOut(t *testing.T) {
	t.Parallel()
	const cached = 10
	a, _ := openIdle(t, t.TempDir(), func(c *config) { c.store.cache = cached }, nil)
	ids := commitTogether(t, a.store, sampleOrders(4*cached))
	for _, id := range ids {
		moveTo(t, a.store, id, completed, 1)
	}
	require.Len(t, allOrders(t, a.store), len(ids))
	for i, id := range ids {
		_, hit := a.store.cache.get(id)
		require.Equal(t, i >= len(ids)-cached, hit, "order %d", i)
	}
}

// ---- older versions ----

// versionTwo is orders.db of version 2: orders in every status, a key, and an index of users without the newest order.
const versionTwo = `
CREATE TABLE orders (id_high INTEGER PRIMARY KEY, id_low INTEGER NOT NULL, status INTEGER NOT NULL CHECK (status BETWEEN 0 AND 2),
	user_id TEXT NOT NULL, item_ids TEXT NOT NULL, cents INTEGER NOT NULL CHECK (cents >= 0), started INTEGER, took INTEGER) STRICT;
CREATE INDEX orders_unfinished ON orders (status) WHERE status < 2;
CREATE TABLE orders_by_user (run INTEGER NOT NULL, user TEXT NOT NULL, id_high INTEGER NOT NULL, PRIMARY KEY (run, user, id_high)) STRICT, WITHOUT ROWID;
CREATE TABLE user_runs (first INTEGER PRIMARY KEY);
CREATE TABLE idempotency_keys (key TEXT PRIMARY KEY, id_high INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE totals (accepted INTEGER NOT NULL, processing INTEGER NOT NULL, completed INTEGER NOT NULL, took INTEGER NOT NULL,
	newest_started INTEGER NOT NULL, indexed INTEGER NOT NULL, newest_indexed INTEGER NOT NULL) STRICT;
CREATE VIEW orders_readable AS SELECT id_high FROM orders;
INSERT INTO orders VALUES
	(1700000000001 << 16, 11, 2, 'ann', 'a,b', 150, 1700000000100, 2000000),
	(1700000000002 << 16, 12, 2, 'bob', 'c', 250, 1700000000200, 4000000),
	(1700000000003 << 16, 13, 1, 'ann', 'd', 350, 1700000000300, NULL),
	(1700000000004 << 16, 14, 0, 'ann', 'e', 450, NULL, NULL);
INSERT INTO idempotency_keys VALUES ('cart', 1700000000002 << 16);
INSERT INTO user_runs VALUES (0), (1700000000002 << 16);
INSERT INTO orders_by_user VALUES (0, 'ann', 1700000000001 << 16), (1700000000002 << 16, 'bob', 1700000000002 << 16), (1700000000002 << 16, 'ann', 1700000000003 << 16);
INSERT INTO totals VALUES (4, 1, 2, 6000000, 1700000000003 << 16, 3, 1700000000003 << 16);
PRAGMA application_id = 0x6f726472;
PRAGMA user_version = 2;`

// metricsOne is metrics.db as version 1 made it.
const metricsOne = `
CREATE TABLE totals (accepted INTEGER NOT NULL, completed INTEGER NOT NULL, took INTEGER NOT NULL) STRICT;
INSERT INTO totals VALUES (4, 2, 6000000);
PRAGMA application_id = 0x6f72646d;
PRAGMA user_version = 1;`

// leftByKill makes a database, all of it in a -wal as kill -9 leaves it.
func leftByKill(tb testing.TB, path, text string) {
	tb.Helper()
	require.NoError(tb, os.MkdirAll(filepath.Dir(path), 0o700))
	made := filepath.Join(tb.TempDir(), "made")
	db, err := openSQLite(made)
	require.NoError(tb, err)
	defer db.Close()
	_, err = db.Exec("PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 0; BEGIN;" + text + "; COMMIT")
	require.NoError(tb, err)
	for _, suffix := range []string{"", "-wal"} {
		content, err := os.ReadFile(made + suffix)
		require.NoError(tb, err)
		require.NoError(tb, os.WriteFile(path+suffix, content, 0o600))
	}
}

// TestDataOfAnOlderVersionIsUpgraded starts on each pair of versions that a
// crash between the two upgrades can leave, and on them without metrics.db.
func TestDataOfAnOlderVersionIsUpgraded(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"both", "orders.db is new", "metrics.db is new", "metrics.db is missing"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			orders, metrics := filepath.Join(dir, "data", "orders.db"), filepath.Join(dir, "data", "metrics.db")
			leftByKill(t, orders, versionTwo)
			leftByKill(t, metrics, metricsOne)
			switch name {
			case "orders.db is new":
				execOn(t, orders, ordersUpgradeTo3+"PRAGMA user_version = 3")
			case "metrics.db is new":
				execOn(t, metrics, metricsUpgradeTo2+"PRAGMA user_version = 2")
			case "metrics.db is missing":
				require.NoError(t, errors.Join(os.Remove(metrics), os.Remove(metrics+"-wal")))
			}
			a, stop := openIdle(t, dir, nil, nil)
			checkInvariants(t, a)
			require.Equal(t, totals{accepted: 4, processing: 1, completed: 2, sumTook: 6000000, newest: 1700000000004 << 16, newestStarted: 1700000000003 << 16, identity: a.store.publishedTotals().identity}, counts(a))
			found := allOrders(t, a.store)
			require.Equal(t, order{id: joinID(1700000000001<<16, 11), userID: "ann", itemIDs: "a,b", cents: 150, status: completed, startedMS: 1700000000100, tookMicros: 2000000}, found[3])
			require.Equal(t, order{id: joinID(1700000000003<<16, 13), userID: "ann", itemIDs: "d", cents: 350, status: processing, startedMS: 1700000000300}, found[1])
			ofAnn, _ := walk(t, a.store, filter{userID: "ann", limit: 2})
			require.Equal(t, []order{found[0], found[1], found[3]}, ofAnn)
			again := &creation{order: order{userID: "bob", itemIDs: "c", cents: 250}, key: "cart"}
			require.NoError(t, a.store.create(again))
			require.True(t, again.replayed)
			require.Equal(t, found[2].id, again.id)
			stop()
			require.NotEmpty(t, logged(t, dir, "upgrading the schema: up to a minute for each 5,000,000 orders"))
			a, _ = openTestApp(t, dir, nil, nil)
			awaitRest(t, a, 0, 4)
			commitTogether(t, a.store, sampleOrders(indexEvery))
			awaitRest(t, a, 0, 4+indexEvery)
			checkInvariants(t, a)
		})
	}
}

// ---- retention ----

// TestCompletedOrdersAreRemoved after a second, whole; an order that is not completed stays.
func TestCompletedOrdersAreRemoved(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	keep := func(c *config) { c.store.keep, c.drain = time.Second, 0 }
	gate := make(chan struct{})
	release := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(release)
	a, stop := openTestApp(t, dir, keep, func(a *app) {
		a.pool.work = onOrders(a, func(ctx context.Context, o order) error {
			if o.itemIDs == "held" {
				return hold(gate)(ctx, o.id, 1)
			}
			return nil
		})
	})
	held := place(t, a, "user", "held")
	body := orderBody(`"user"`, `"item"`, "1")
	first := call(t, a, http.MethodPost, "/orders", keyed("cart"), body)
	require.Equal(t, http.StatusCreated, first.status, first.body)
	batches, size := runOrders/maxCreates+1, maxCreates // more than one run of the index
	if raced() || !*long {
		batches, size = 1, 2*expiryRows
	}
	var cached []ulid.ULID
	for range batches {
		cached = commitTogether(t, a.store, sampleOrders(size))
	}
	placed := int64(batches*size + 2)
	newest := a.store.publishedTotals().newest
	until(t, func() bool { return a.store.publishedTotals().removed == placed-1 }, "all but the one at work are removed")

	for _, location := range []string{first.header.Get("Location"), "/orders/" + cached[0].String()} {
		require.Equal(t, http.StatusNotFound, get(t, a, location).status)
	}
	require.Equal(t, "Processing", statusOf(t, a, held))
	require.Equal(t, placed-1, a.metrics.summarize(a.store.publishedTotals()).TotalOrdersProcessed)
	require.Zero(t, a.metrics.summarize(a.store.publishedTotals()).OrdersCompleted)
	again := call(t, a, http.MethodPost, "/orders", keyed("cart"), body)
	require.Equal(t, http.StatusCreated, again.status, again.body)
	require.Empty(t, again.header.Get("Idempotent-Replayed"), "its key is free again")
	require.NotEqual(t, first.body, again.body)
	until(t, func() bool { return a.store.publishedTotals().removed == placed }, "the next one too")
	stop()
	stored := func(table string) (rows int) {
		db := openOrders(t, a)
		defer db.Close()
		require.NoError(t, db.QueryRow("SELECT count(*) FROM "+table).Scan(&rows))
		return rows
	}
	require.Equal(t, 1, stored("orders"), "the one at work")
	if a.sqlite != nil {
		require.True(t, stored("orders_by_user") == 1 || batches == 1, "its part of the index, which so few orders do not fill")
		require.LessOrEqual(t, stored("user_runs"), 2, "its run, and the newest")
	}

	release()
	a, _ = openTestApp(t, dir, keep, nil)
	require.Greater(t, high(ulid.MustParse(place(t, a, "user", "item"))), newest, "an ID is never used again")
	until(t, func() bool { return a.store.publishedTotals().removed == placed+2 }, "the one that was at work is completed and removed")
	require.Zero(t, counts(a).pending()+counts(a).processing)
	found, _ := walk(t, a.store, filter{userID: "user", limit: 10})
	require.Empty(t, found)
	require.Zero(t, stored("orders"))
	if a.sqlite != nil {
		require.Equal(t, []int{0, 1}, []int{stored("orders_by_user"), stored("user_runs")}, "only the newest run of the index stays")
	}
}

// TestRetentionStopsNoOrder has a table that does not let go of a row.
func TestRetentionStopsNoOrder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	keep := func(c *config) { c.store.keep = time.Second }
	a, stop := openTestApp(t, dir, nil, nil)
	place(t, a, "user", "item")
	awaitRest(t, a, 0, 1)
	path := onSQLite(t, a).file.path
	stop()
	execOn(t, path, "CREATE TRIGGER held BEFORE DELETE ON orders BEGIN SELECT RAISE(ABORT, 'held'); END")
	a, stop = openTestApp(t, dir, keep, nil)
	const told = "orders that were kept long enough could not be removed"
	until(t, func() bool { return len(logged(t, dir, told)) > 0 }, "a pass fails")
	place(t, a, "user", "item")
	awaitRest(t, a, 0, 2)
	require.Equal(t, []int64{2, 0}, []int64{counts(a).completed, counts(a).removed})
	stop()
	execOn(t, path, "DROP TRIGGER held")
	a, _ = openTestApp(t, dir, keep, nil)
	until(t, func() bool { return a.store.publishedTotals().removed == 2 }, "a later pass removes both")
}

// TestRetentionWaitsForRoom where the disk has room for orders, and not for what a removal writes.
func TestRetentionWaitsForRoom(t *testing.T) {
	t.Parallel()
	a, _ := engineAlone(t, func(c *config) { c.store.keep = time.Hour })
	commits(func(e engine, b *batch) error {
		if x := b.expiry; x != nil {
			x.through, x.examined = x.after+1, expiryRows // as it came before the disk was full
			return errNotWritten
		}
		return e.commit(b)
	})(a)
	w := a.store.writer
	w.onCommit = func(commitReport) {}
	w.retention.start()
	w.retention.due = time.Time{}
	require.NoError(t, w.turn(newBatch(nil)), "it is tried again without")
	require.Nil(t, w.retention.next(maxCreates), "and not at the next commit")
}

// TestFreedPagesAreUsedAgain fills the table three times, and empties it a few orders at a time.
func TestFreedPagesAreUsedAgain(t *testing.T) {
	t.Parallel()
	a, e := engineAlone(t, nil)
	commit := func(b *batch) {
		require.NoError(t, e.commit(b))
		_, err := e.tidy()
		require.NoError(t, err)
	}
	const orders = 2 * maxCreates
	var pages [3]int64
	for i := range pages {
		for range orders / maxCreates {
			b := newBatch(nil)
			b.creates = sampleOrders(maxCreates)
			a.store.writer.number(b.creates)
			for _, c := range b.creates {
				b.move(transition{id: c.id, from: pending, to: completed, startedMS: 1, tookMicros: 1})
			}
			commit(b)
		}
		require.NoError(t, e.file.QueryRow("PRAGMA page_count").Scan(&pages[i]))
		removed, commits := 0, 0
		for last := (expiry{}); !last.ended; commits++ {
			b := newBatch(nil)
			b.expiry = &expiry{after: last.through, before: time.Now().Add(time.Hour).UnixMilli()}
			commit(b)
			removed, last = removed+len(b.removed), *b.expiry
		}
		require.Equal(t, orders, removed)
		require.Greater(t, commits, 1)
	}
	require.InEpsilon(t, pages[0], pages[2], 0.25, pages)
}

// TestAJumpOfTheClockRemovesNothing where the clock goes ahead by more than a day, until a start confirms it.
func TestAJumpOfTheClockRemovesNothing(t *testing.T) {
	t.Parallel()
	ahead, lines := time.Duration(0), &transcript{}
	log := newLogger(lines, slog.LevelInfo, io.Discard)
	due := func(r *retention) bool {
		r.due = time.Time{}
		return r.next(0) != nil
	}
	begin := func() *retention {
		r := &retention{keep: time.Hour, now: func() time.Time { return time.Now().Add(ahead) }, log: log}
		r.start()
		return r
	}
	r := begin()
	require.True(t, due(r))
	ahead = 25 * time.Hour
	require.False(t, due(r))
	require.False(t, due(r))
	ahead = 23 * time.Hour
	require.True(t, due(r), "a smaller step is believed")
	ahead = 25 * time.Hour
	require.False(t, due(r))
	require.True(t, due(begin()), "a start confirms it")
	require.NoError(t, log.close())
	require.Equal(t, 2, strings.Count(lines.String(), "the clock has jumped ahead: no order is removed until it is back, or orderd is started again"), "once a jump")
}

// ---- abuse ----

// dialed sends raw bytes to the service and returns what reads the answers.
func dialed(t *testing.T, a *app, text string) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := net.Dial("tcp", a.listener.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(15*time.Second)))
	conn.Write([]byte(text)) // fails where the server has answered and closed already
	return conn, bufio.NewReader(conn)
}

func TestAbuse(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	const livez = "GET /livez HTTP/1.1\r\nHost: localhost\r\n"
	const posted = "POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
	order, unknown := string(examplePost), string(getRequest("01M82P53T20003ZZE2RJ5B5TRM"))
	for _, test := range []struct {
		name, request string
		statuses      []int
	}{
		{"a header of nearly 64 KiB", livez + "X: " + strings.Repeat("x", maxHeader-100) + "\r\n\r\n", []int{200}},
		{"a header over 64 KiB", livez + "X: " + strings.Repeat("x", maxHeader) + "\r\n\r\n", []int{431}},
		{"many headers", livez + strings.Repeat("X: y\r\n", 20_000) + "\r\n", []int{431}},
		{"a body of 1 GB announced", posted + "Content-Length: 1000000000\r\n\r\n", []int{413}},
		{"a body of 1 GB begun", posted + "Content-Length: 1000000000\r\n\r\n" + strings.Repeat(" ", maxBody+1), []int{413}},
		{"chunks without end", posted + "Transfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1000\r\n"+strings.Repeat(" ", 4096)+"\r\n", 17), []int{413}},
		{"pipelined requests", livez + "\r\n" + order + "GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" + unknown + "GET /orders HTTP/1.1\r\nHost: localhost\r\n\r\n", []int{200, 201, 404, 404, 200}},
		{"HTTP/1.0", "GET /livez HTTP/1.0\r\n\r\n", []int{200}},
		{"an order by HTTP/1.0", strings.Replace(order, "HTTP/1.1", "HTTP/1.0", 1), []int{201}},
		{"no HTTP", "\x16\x03\x01\x00\x00 nonsense\r\n\r\n", []int{400}},
		{"two lengths", "POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", []int{400}},
	} {
		t.Run(test.name, func(t *testing.T) {
			began := time.Now()
			_, answers := dialed(t, a, test.request)
			for _, want := range test.statuses {
				response, err := http.ReadResponse(answers, nil)
				require.NoError(t, err, "after %v", time.Since(began))
				io.Copy(io.Discard, response.Body)
				require.Equal(t, want, response.StatusCode)
			}
			require.Less(t, time.Since(began), 5*time.Second)
		})
	}
	drained(t, base(a))
}

// TestRefusedBodiesAreReadToTheEnd where, as by nginx, the connection ends with them.
func TestRefusedBodiesAreReadToTheEnd(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	for header, status := range map[string]int{
		"Content-Type: application/json\r\nContent-Length: 100000": 413,
		"Content-Type: text/plain\r\nContent-Length: 60000":        415,
		"Host: example.org\r\nContent-Length: 60000":               421,
	} {
		conn, answers := dialed(t, a, "POST /orders HTTP/1.0\r\n"+header+"\r\n\r\n")
		rest, _ := strconv.Atoi(header[strings.LastIndex(header, " ")+1:])
		for ; rest > 0; rest -= 2000 {
			<-time.After(time.Millisecond)
			_, err := conn.Write(make([]byte, 2000))
			require.NoError(t, err, "%d bytes are left", rest)
		}
		response, err := http.ReadResponse(answers, nil)
		require.NoError(t, err)
		require.Equal(t, status, response.StatusCode)
	}
}

// TestCrowd leaves 2,000 connections idle, sends 250 headers and with -long 250
// bodies a byte a second, and is an honest client beside them.
func TestCrowd(t *testing.T) {
	t.Parallel()
	p, quiet := startProcess(t, t.TempDir(), nil, "-delay", "1ms"), startProcess(t, t.TempDir(), nil, "-delay", "1ms")
	j, calm := newJournal("crowd", time.Millisecond), newJournal("calm", time.Millisecond)
	// honest asks both in turn, so that what else the machine does meets both.
	honest := func(while func() bool) (beside, alone []time.Duration) {
		client := newClient()
		defer client.CloseIdleConnections()
		timed := func(j *journal, p *process) time.Duration {
			began := time.Now()
			o, err := j.send(client, p.url(), j.next())
			took := time.Since(began)
			require.NoError(t, err)
			require.NotEqual(t, unknown, o)
			return took
		}
		for len(beside) < 100 || while() {
			beside, alone = append(beside, timed(j, p)), append(alone, timed(calm, quiet))
			time.Sleep(20 * time.Millisecond)
		}
		slices.Sort(beside)
		slices.Sort(alone)
		return beside, alone
	}

	dial := func(text string) net.Conn {
		conn, err := net.Dial("tcp", p.addr)
		require.NoError(t, err)
		t.Cleanup(func() { conn.Close() })
		_, err = conn.Write([]byte(text))
		require.NoError(t, err)
		return conn
	}
	for range many(2000) {
		_, err := bufio.NewReader(dial("GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")).ReadByte()
		require.NoError(t, err)
	}
	var left, cutAtOtherTimes atomic.Int64
	for i := range many(500) {
		text, cutAfter := "GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ", 10*time.Second
		if i%2 == 1 && *long {
			text, cutAfter = "POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n", 30*time.Second
		}
		left.Add(1)
		conn, began, ended := dial(text), time.Now(), make(chan struct{})
		go func() {
			io.Copy(io.Discard, conn)
			if (time.Since(began) - cutAfter).Abs() > 4*time.Second {
				cutAtOtherTimes.Add(1)
			}
			left.Add(-1)
			close(ended)
		}()
		go func() {
			for drip := time.Tick(time.Second); ; {
				select {
				case <-drip:
					conn.Write([]byte(" "))
				case <-ended:
					return
				}
			}
		}()
	}
	limit := time.Now().Add(time.Minute)
	beside, alone := honest(func() bool { return left.Load() > 0 && time.Now().Before(limit) })
	require.Zero(t, left.Load(), "slow connections that were not cut")
	require.Zero(t, cutAtOtherTimes.Load())
	resident := p.residentMB(t)
	t.Logf("alone p50 %v, p99 %v; beside the crowd p50 %v, p99 %v; %.0f MB resident",
		alone[len(alone)/2], alone[len(alone)*99/100], beside[len(beside)/2], beside[len(beside)*99/100], resident)
	require.Less(t, beside[len(beside)/2], 3*alone[len(alone)/2]+20*time.Millisecond)
	require.True(t, raced() || resident < 150)
	j.check(t, p.url())
	j.stopAndCheck(t, p)
}

// TestWaiters has 10,000 connections wait, half of them for one order, the others each for its own, when the service stops.
func TestWaiters(t *testing.T) {
	t.Parallel()
	needsUnix(t)
	n := many(10_000)
	p := startProcess(t, t.TempDir(), nil, "-delay", "24h", "-drain", "5s", "-workers", "1")
	quiet := p.residentMB(t)
	var all sync.WaitGroup
	var tooMany atomic.Bool
	shared := ""
	var answers atomic.Int64
	wait := func(i int) {
		conn, err := net.Dial("tcp", p.addr)
		if errors.Is(err, syscall.EMFILE) {
			tooMany.Store(true)
			return
		}
		if !assert.NoError(t, err) {
			return
		}
		t.Cleanup(func() { conn.Close() })
		reader := bufio.NewReaderSize(conn, 16)
		id := shared
		if i%2 == 0 {
			conn.Write(examplePost)
			created, err := http.ReadResponse(reader, nil)
			if !assert.NoError(t, err) {
				return
			}
			io.Copy(io.Discard, created.Body)
			id = filepath.Base(created.Header.Get("Location"))
		}
		if i == 0 {
			shared = id
		}
		fmt.Fprintf(conn, "GET /orders/%s HTTP/1.1\r\nHost: localhost\r\nPrefer: wait=60\r\n\r\n", id)
		all.Go(func() {
			got, err := http.ReadResponse(reader, nil)
			if assert.NoError(t, err) {
				assert.Equal(t, http.StatusOK, got.StatusCode)
			}
			answers.Add(1)
		})
	}
	wait(0)
	var asking sync.WaitGroup
	for first := range 64 {
		asking.Go(func() {
			for i := first + 1; i < n; i += 64 {
				wait(i)
			}
		})
	}
	asking.Wait()
	if tooMany.Load() {
		t.Skip("needs more open files: ", n)
	}
	until(t, func() bool { return metric(t, p.url(), "orderd_cache_hits_total") >= float64(n) }, "all wait")
	full := p.residentMB(t)
	require.Zero(t, answers.Load())
	began := time.Now()
	require.Equal(t, 0, p.terminate(t, *patience), p.stderr.String())
	require.Less(t, time.Since(began), 10*time.Second)
	all.Wait()
	require.EqualValues(t, n, answers.Load())
	t.Logf("%d waiters, %.0f KB each, answered in %v", n, (full-quiet)*1024/float64(n), time.Since(began))
	require.True(t, raced() || (full-quiet)*1024/float64(n) < 100, "KB a waiter")
}

func TestRandomIDs(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	base := base(a)
	j := newJournal("ids", 0)
	j.place(t, base, 3)
	j.check(t, base)
	entries := a.store.cache.len()
	askTogether(t, 4, many(100_000), http.StatusNotFound, func(client *http.Client) answer {
		var id ulid.ULID
		id.SetTime(rand.Uint64N(ulid.MaxTime()))
		id.SetEntropy(fmt.Appendf(nil, "%010d", rand.Int64N(1e10)))
		return exchange(t.Context(), client, base, http.MethodGet, "/orders/"+id.String(), nil, "")
	})
	require.Equal(t, entries, a.store.cache.len())
	// Of the ID of an order, the half that is no key counts too.
	id := ulid.MustParse(j.accepted[0].id)
	id[15]++
	require.Equal(t, http.StatusNotFound, get(t, a, "/orders/"+id.String()).status)
}

func TestLogInjection(t *testing.T) {
	t.Parallel()
	a := newTestApp(t, nil)
	forged := `{"time":"2026-01-01T00:00:00Z","level":"ERROR","msg":"forged"}`
	for _, path := range []string{
		"/" + url.PathEscape("x\n"+forged+"\n"), "/orders/" + url.PathEscape("x\r\n"+forged), "/%00%1b[31m%E2%80%A8%ff",
	} {
		got := send(t.Context(), a.listener.Addr().String(), http.MethodGet, path, http.Header{"X-Request-Id": {"x"}}, "")
		require.Equal(t, http.StatusNotFound, got.status, got.err)
	}
	until(t, func() bool { return strings.Count(bytesOf(t, a.cfg.log.file), `"status":404`) == 3 })
	require.Empty(t, linesOf(t, bytesOf(t, a.cfg.log.file), "forged"), "every line is JSON, and none was made up")
}

// ---- fuzz ----

func FuzzCreateBody(f *testing.F) {
	for _, body := range []string{
		exampleOrder,
		` { "total_amount" : 1.5e1 , "item_ids" : " a , b " , "user_id" : "\u00e9\ud83d\ude00" } `,
		`{"user_id":"u","item_ids":"a","total_amount":-0.0}`,
		`{"user_id":"u","item_ids":"a","total_amount":9999999999999.99}`,
		`{"user_id":"u","item_ids":"a","total_amount":10000000000000}`,
		`{"user_id":"u","item_ids":"a","total_amount":1,"total_amount":2}`,
		`{"user_id":"u","item_ids":"a","total_amount":1,"User_ID":"v"}`,
		`{"user_id":"u","item_ids":"a,,b","total_amount":1}`,
		`{"user_id":"u","item_ids":"a","total_amount":{"x":[1,"}"]}}`,
		`{"user_id":"\ud800","item_ids":"a","total_amount":1}`,
		`{"user_id":"\ud800\ufffd","item_ids":"a","total_amount":1}`,
		`{"user_id":"\\ufffd\ud800","item_ids":"a","total_amount":1}`,
		`{"user_id":"\\\"}","item_ids":"a]","total_amount":1}`,
		`{"user_i\u0064":"u","item_ids":"a","total_amount":1}`,
		`{"user_id":"a\u0000b","item_ids":"a","total_amount":1}`,
		"{\"user_id\":\"a\x7f\",\"item_ids\":\"a\",\"total_amount\":1}",
		"{\"user_id\":\"\xff\",\"item_ids\":\"a\",\"total_amount\":1}",
		`{}`, `{"":{}}`, `[]`, `null`, `{"user_id":null,"item_ids":[],"total_amount":"1"}`, `{}{}`, ``, "\ufeff{}",
	} {
		f.Add([]byte(body))
	}
	a, _ := openIdle(f, f.TempDir(), nil, nil)
	f.Fuzz(func(t *testing.T, body []byte) {
		n, err := decodeCreate(body)
		if err != nil {
			require.ErrorAs(t, err, new(*fault))
			return
		}
		require.True(t, json.Valid(body))
		decoder := json.NewDecoder(bytes.NewReader(body))
		decoder.UseNumber()
		var fields map[string]any
		require.NoError(t, decoder.Decode(&fields))
		require.ElementsMatch(t, []string{"user_id", "item_ids", "total_amount"}, slices.Collect(maps.Keys(fields)))
		userID, items := fields["user_id"].(string), fields["item_ids"].(string)
		number := fields["total_amount"].(json.Number)

		require.Equal(t, strings.TrimSpace(userID), n.userID)
		require.NotEmpty(t, n.userID)
		require.LessOrEqual(t, len(n.userID), maxUserID)
		want := strings.Split(items, ",")
		for i := range want {
			want[i] = strings.TrimSpace(want[i])
			require.NotEmpty(t, want[i])
		}
		require.Equal(t, strings.Join(want, ","), n.itemIDs)
		require.LessOrEqual(t, len(want), maxItems)
		require.LessOrEqual(t, len(n.itemIDs), maxItemIDs)
		require.False(t, strings.ContainsFunc(userID+items, unicode.IsControl))
		require.True(t, utf8.ValidString(n.userID+n.itemIDs))

		cents, ok := exactCents(string(number))
		require.True(t, ok, "%s", number)
		require.Equal(t, cents, n.cents)

		require.NoError(t, a.store.create(n))
		stored, err := a.store.get(n.id)
		require.NoError(t, err)
		require.Equal(t, n.order, stored)
		shown := newOrderDocument(stored)
		require.Equal(t, []any{n.userID, n.itemIDs}, []any{shown.UserID, shown.ItemIDs})
		again, ok := exactCents(shown.TotalAmount.String())
		require.True(t, ok)
		require.Equal(t, cents, again)
	})
}

// exactCents is a second opinion on an amount. Exponents too large for math/big are decided by their sign.
func exactCents(number string) (cents int64, ok bool) {
	mantissa, exponent, found := strings.Cut(strings.ToLower(number), "e")
	if found {
		digits := strings.TrimLeft(strings.TrimLeft(exponent, "+-"), "0")
		n, err := strconv.Atoi(cmp.Or(digits, "0"))
		if err != nil || n > len(number)+20 {
			if strings.Trim(mantissa, "-0.") == "" {
				return 0, true
			}
			return 0, false // the digits cannot make up for that
		}
	}
	amount, valid := new(big.Rat).SetString(number)
	if !valid || amount.Sign() < 0 {
		return 0, false
	}
	amount.Mul(amount, big.NewRat(100, 1))
	if !amount.IsInt() || amount.Cmp(new(big.Rat).SetInt64(maxCents)) > 0 {
		return 0, false
	}
	return amount.Num().Int64(), true
}

func FuzzAmount(f *testing.F) {
	for _, number := range []string{
		"0", "-0", "-0.00", "-0e9", "0.01", "-0.01", "0.001", "0.010", "99.99", "1e2", "1E+2", "12.5e-1", "1250e-2", "125e-3", "1e-2", "1e-3",
		"9999999999999.99", "9999999999999.990", "10000000000000", "99999999999999e-1", "999999999999999e-2", "1e15", "1e400", "1e-400", "0e99999999999999999999",
		"1e99999999999999999999", "1e-99999999999999999999", "0.0000000000000000001e19", "100000000000000000000000e-23", "00", "1.", ".5", "+1", "1e", "NaN", "0x10",
	} {
		f.Add(number)
	}
	f.Fuzz(func(t *testing.T, number string) {
		if len(number) > 2000 || number == "" || !json.Valid([]byte(number)) || kindOf([]byte(number)) != "a number" || strings.Trim(number, "+-.0123456789eE") != "" {
			return // decodeCreate asks parseCents only about JSON numbers
		}
		cents, err := parseCents(number)
		want, ok := exactCents(number)
		require.Equal(t, ok, err == nil, "%s: %v", number, err)
		if ok {
			require.Equal(t, want, cents, "%s", number)
		}
	})
}

// ---- benchmarks ----

const exampleOrder = `{"user_id": "user123", "item_ids": "item1,item2", "total_amount": 99.99}`

var examplePost = postRequest(exampleOrder)

// Requests are built once: the client costs two system calls and a scan.
func postRequest(body string) []byte {
	return fmt.Appendf(nil, "POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

func getRequest(id string) []byte {
	return fmt.Appendf(nil, "GET /orders/%s HTTP/1.1\r\nHost: localhost\r\n\r\n", id)
}

// startFloor and startOurs start processes, so that neither shares a scheduler or a collector with the client.
func startFloor(b *testing.B) *process {
	return startProcess(b, b.TempDir(), []string{childMode + "=floor"})
}

func startOurs(b *testing.B, dir string) *process {
	return startProcess(b, dir, nil, "-delay", "0s")
}

// serveFloor is Echo with nothing behind it: it decodes the same request and answers the
// same bytes. With a store, it stores the orders.
func serveFloor(s *store) {
	e := echo.New()
	e.POST("/orders", func(c echo.Context) error {
		var body struct {
			UserID      string  `json:"user_id"`
			ItemIDs     string  `json:"item_ids"`
			TotalAmount float64 `json:"total_amount"`
		}
		if err := c.Bind(&body); err != nil {
			return err
		}
		id := "01M82P53T20003ZZE2RJ5B5TRM"
		if s != nil {
			o := &creation{order: order{userID: body.UserID, itemIDs: body.ItemIDs, cents: 9999}}
			if err := s.create(o); err != nil {
				return err
			}
			id = o.id.String()
		}
		c.Response().Header().Set(echo.HeaderLocation, "/orders/"+id)
		c.Response().Header().Set(echo.HeaderXRequestID, "3t45y58fkbzu5-1")
		return c.JSON(http.StatusCreated, struct {
			Message string `json:"message"`
			OrderID string `json:"order_id"`
		}{"Order created", id})
	})
	e.GET("/orders/:order_id", func(c echo.Context) error {
		c.Response().Header().Set(echo.HeaderCacheControl, "no-store")
		c.Response().Header().Set(echo.HeaderXRequestID, "3t45y58fkbzu5-1")
		return c.JSON(http.StatusOK, struct {
			OrderID string `json:"order_id"`
			Status  string `json:"status"`
		}{c.Param("order_id"), "Completed"})
	})
	serveEcho(e)
}

func serveEcho(e *echo.Echo) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Fprintf(os.Stderr, "%s%s\n", announced, listener.Addr())
	panic(http.Serve(listener, e))
}

// load is what one run of a client saw.
type load struct {
	rate      float64 // answers a second
	count     int64
	latencies []time.Duration // ascending
}

func (l load) p99() time.Duration { return l.latencies[len(l.latencies)*99/100] }

// hammer sends the requests in turn on n connections, each waiting for its answer, and demands the same status of all.
func hammer(tb testing.TB, addr string, n, status int, requests ...[]byte) load {
	tb.Helper()
	want := fmt.Appendf(nil, "HTTP/1.1 %d ", status)
	var wg sync.WaitGroup
	var failure atomic.Pointer[error]
	all := make([][]time.Duration, n)
	start := time.Now()
	for i := range n {
		conn, err := net.Dial("tcp", addr)
		require.NoError(tb, err)
		wg.Go(func() {
			defer conn.Close()
			r := bufio.NewReaderSize(conn, 1024)
			for turn := i; ; turn += n {
				sent := time.Now()
				if sent.Sub(start) > lasting() {
					return
				}
				if _, err := conn.Write(requests[turn%len(requests)]); err != nil {
					failure.Store(&err)
					return
				}
				if err := readAnswer(r, want); err != nil {
					failure.Store(&err)
					return
				}
				all[i] = append(all[i], time.Since(sent))
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(start)
	if err := failure.Load(); err != nil {
		tb.Fatal(*err)
	}
	l := load{latencies: slices.Concat(all...)}
	slices.Sort(l.latencies)
	l.count = int64(len(l.latencies))
	l.rate = float64(l.count) / elapsed.Seconds()
	return l
}

// readAnswer reads one answer to its length.
func readAnswer(r *bufio.Reader, want []byte) error {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(line, want) {
		return fmt.Errorf("answered %q, not %q", line, want)
	}
	length := 0
	for len(line) > 2 {
		if line, err = r.ReadSlice('\n'); err != nil {
			return err
		}
		if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil {
				return err
			}
		}
	}
	_, err = r.Discard(length)
	return err
}

// posts and gets are one side of a comparison.
func posts(b *testing.B, p *process, n int, requests ...[]byte) func() load {
	return func() load { return hammer(b, p.addr, n, http.StatusCreated, requests...) }
}

func gets(b *testing.B, p *process, n int, request []byte) func() load {
	return func() load { return hammer(b, p.addr, n, http.StatusOK, request) }
}

// rounds is how often each side of a comparison is measured, in turn; the median counts.
const rounds = 3

// lasting is one side's time in a round.
func lasting() time.Duration { return ifShort(300*time.Millisecond, 3*time.Second) }

func ifShort[T any](short, full T) T {
	if testing.Short() {
		return short
	}
	return full
}

// compare measures two sides in turn and reports ours as a share of the floor:
// answers a second (more is better) and the 99th percentile (less is better).
func compare(b *testing.B, floor, ours func() load) {
	var rates, tails []float64
	for range rounds {
		f, o := floor(), ours()
		rates = append(rates, o.rate/f.rate)
		tails = append(tails, float64(o.p99())/float64(f.p99()))
		b.Logf("floor %.0f/s, p99 %v; ours %.0f/s, p99 %v", f.rate, f.p99(), o.rate, o.p99())
	}
	b.ReportMetric(median(rates), "of-floor")
	b.ReportMetric(median(tails), "p99-of-floor")
	b.ReportMetric(0, "ns/op")
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}

// seed fills a fresh data directory with Completed orders, and Pending ones behind them.
func seed(tb testing.TB, dir string, completed, pending int) {
	tb.Helper()
	a, stop := openIdle(tb, dir, nil, nil)
	stop()
	db, err := sql.Open("sqlite", onSQLite(tb, a).file.path)
	require.NoError(tb, err)
	defer db.Close()
	_, err = db.Exec(`
		PRAGMA synchronous = OFF;
		WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < ?1 + ?2 - 1)
		INSERT INTO orders SELECT ((1700000000000 + i / 50) << 16) + i % 50, random(), iif(i < ?1, 2, 0), 'user123', 'item1,item2', 9999,
			iif(i < ?1, 1700000000000 + i / 50, NULL), iif(i < ?1, 2000000, NULL), NULL FROM n;
		UPDATE totals SET accepted = ?1 + ?2, completed = ?1, took = ?1 * 2000000,
			newest_started = (SELECT coalesce(max(id_high), 0) FROM orders WHERE status = 2),
			newest = (SELECT max(id_high) FROM orders);
		INSERT INTO user_runs SELECT id_high, 0, 0 FROM (SELECT id_high, row_number() OVER (ORDER BY id_high) AS n FROM orders) WHERE n > 1 AND n % ?3 = 1;
		INSERT INTO orders_by_user SELECT (SELECT max(first) FROM user_runs WHERE first <= id_high), user_id, id_high FROM orders;
		UPDATE user_runs SET (last, orders) = (SELECT max(id_high), count(*) FROM orders_by_user WHERE run = first);`,
		completed, pending, runOrders)
	require.NoError(tb, err)
}

// BenchmarkCreate is POST /orders with every order driven on to Completed.
// behind is the share of them that was not yet Completed when the load ended.
func BenchmarkCreate(b *testing.B) {
	for _, conns := range []int{256, 64, 1} {
		b.Run(fmt.Sprintf("conns=%d", conns), func(b *testing.B) {
			ours := startOurs(b, b.TempDir())
			var accepted int64
			var behind []float64
			compare(b, posts(b, startFloor(b), conns, examplePost), func() load {
				l := hammer(b, ours.addr, conns, http.StatusCreated, examplePost)
				now, err := getSummary(ours.url())
				require.NoError(b, err)
				behind = append(behind, float64(now.OrdersPending+now.OrdersProcessing)/float64(l.count))
				accepted += l.count
				require.Equal(b, accepted, drained(b, ours.url()).TotalOrdersProcessed)
				return l
			})
			b.ReportMetric(median(behind), "behind")
		})
	}
}

// BenchmarkBareStore is what Echo reaches with the store alone behind it: the bound of
// BenchmarkCreate, which works on the orders besides, checks and logs requests, and
// limits their time.
func BenchmarkBareStore(b *testing.B) {
	for _, conns := range []int{256, 64} {
		b.Run(fmt.Sprintf("conns=%d", conns), func(b *testing.B) {
			bare := startProcess(b, b.TempDir(), []string{childMode + "=bare-store"})
			compare(b, posts(b, startFloor(b), conns, examplePost), posts(b, bare, conns, examplePost))
		})
	}
}

// BenchmarkCreateByManyUsers has orders from 100,000 users at random, against all from one.
func BenchmarkCreateByManyUsers(b *testing.B) {
	one, many := startOurs(b, b.TempDir()), startOurs(b, b.TempDir())
	requests := make([][]byte, 100_000)
	for i, user := range rand.Perm(len(requests)) {
		requests[i] = postRequest(fmt.Sprintf(`{"user_id": "user%06d", "item_ids": "item1,item2", "total_amount": 99.99}`, user))
	}
	compare(b, posts(b, one, 256, requests[0]), posts(b, many, 256, requests...))
}

// BenchmarkCreateWithKeys has an Idempotency-Key with each order, at random, against none.
func BenchmarkCreateWithKeys(b *testing.B) {
	plain, ours := startOurs(b, b.TempDir()), startOurs(b, b.TempDir())
	unused := func() (requests [][]byte) {
		for range int(50_000 * lasting().Seconds()) {
			header := fmt.Appendf(nil, "POST /orders HTTP/1.1\r\nIdempotency-Key: %016x-%016x\r\n", rand.Uint64(), rand.Uint64())
			requests = append(requests, bytes.Replace(examplePost, []byte("POST /orders HTTP/1.1\r\n"), header, 1))
		}
		return requests
	}
	compare(b, posts(b, plain, 256, examplePost), func() load { return hammer(b, ours.addr, 256, http.StatusCreated, unused()...) })
}

// BenchmarkCreateWithDelay is POST /orders where an order takes 2 s of 50,000
// workers, against none. last-s is how long after the load the last one was
// Completed and counted: first in, first out, no other took longer.
func BenchmarkCreateWithDelay(b *testing.B) {
	delayed := startProcess(b, b.TempDir(), nil, "-delay", "2s", "-workers", "50000")
	post := posts(b, delayed, 256, examplePost)
	var last []float64
	compare(b, posts(b, startOurs(b, b.TempDir()), 256, examplePost), func() load {
		post() // from then on as many are Completed as created
		l := post()
		ended := time.Now()
		drained(b, delayed.url())
		last = append(last, time.Since(ended).Seconds())
		return l
	})
	b.ReportMetric(median(last), "last-s")
}

// BenchmarkIdle is the processor time of a service with 1,000 orders in a pause, and as many clients that wait for them.
func BenchmarkIdle(b *testing.B) {
	const n = 1000
	var attempts atomic.Int64
	all := make(chan struct{})
	endpoint := newUserEndpoint(b, func(w http.ResponseWriter, r *http.Request) {
		if attempts.Add(1) == n {
			close(all)
		}
		<-all
		withStatus(http.StatusServiceUnavailable, "Retry-After", "60")(w, r)
	})
	p := startProcess(b, b.TempDir(), nil, "-work", "http://"+endpoint.addr, "-workers", strconv.Itoa(n), "-drain", "0s")
	for range n {
		conn, err := net.Dial("tcp", p.addr)
		require.NoError(b, err)
		defer conn.Close()
		_, err = conn.Write(examplePost)
		require.NoError(b, err)
		created, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(b, err)
		_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nPrefer: wait=60\r\n\r\n", created.Header.Get("Location"))
		require.NoError(b, err)
	}
	until(b, func() bool {
		return metric(b, p.url(), "orderd_cache_hits_total") >= n && metric(b, p.url(), "orderd_orders_parked") == n
	})
	earlier, ok := p.cpu()
	if !ok {
		b.Skip("needs /proc")
	}
	time.Sleep(10 * lasting())
	now, _ := p.cpu()
	b.ReportMetric((now-earlier).Seconds()/(10*lasting()).Seconds()*100, "%-of-a-core")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkRead is GET /orders/:order_id of a cached order.
func BenchmarkRead(b *testing.B) {
	base, ours := startFloor(b), startOurs(b, b.TempDir())
	request := getRequest(completedOrder(b, ours))
	compare(b, gets(b, base, 64, request), gets(b, ours, 64, request))
}

// BenchmarkReadBesideCreates is the same while 64 connections POST.
func BenchmarkReadBesideCreates(b *testing.B) {
	base, ours := startFloor(b), startOurs(b, b.TempDir())
	request := getRequest(completedOrder(b, ours))
	both := func(p *process) func() load {
		return func() load {
			var creates sync.WaitGroup
			creates.Go(func() { hammer(b, p.addr, 64, http.StatusCreated, examplePost) })
			defer creates.Wait()
			return hammer(b, p.addr, 64, http.StatusOK, request)
		}
	}
	compare(b, both(base), both(ours))
}

// completedOrder posts one and waits for it.
func completedOrder(b *testing.B, p *process) string {
	created := send(b.Context(), p.addr, http.MethodPost, "/orders", asJSON, exampleOrder)
	require.Equal(b, http.StatusCreated, created.status, created.err)
	drained(b, p.url())
	return filepath.Base(created.header.Get("Location"))
}

// BenchmarkBacklog drains Pending orders without HTTP load; the share is of the floor's POSTs.
func BenchmarkBacklog(b *testing.B) {
	orders, base := ifShort(20_000, 500_000), startFloor(b)
	var ratios []float64
	for range rounds {
		f := hammer(b, base.addr, 256, http.StatusCreated, examplePost)
		dir := b.TempDir()
		seed(b, dir, 0, orders)
		began := time.Now()
		a, _ := openTestApp(b, dir, nil, nil)
		awaitRest(b, a, 0, int64(orders))
		rate := float64(orders) / time.Since(began).Seconds()
		b.Logf("floor %.0f/s, drained %.0f/s", f.rate, rate)
		ratios = append(ratios, rate/f.rate)
	}
	b.ReportMetric(median(ratios), "of-floor")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkLargeTable is POST /orders with 5,000,000 Completed orders in the
// file against an empty file, and how long a start takes there.
func BenchmarkLargeTable(b *testing.B) {
	if testing.Short() {
		b.Skip("writes 5,000,000 orders")
	}
	dir := b.TempDir()
	seed(b, dir, 5_000_000, 1000)
	began := time.Now()
	large := startOurs(b, dir)
	started := time.Since(began)
	require.EqualValues(b, 5_001_000, drained(b, large.url()).TotalOrdersProcessed)
	compare(b, posts(b, startOurs(b, b.TempDir()), 256, examplePost), posts(b, large, 256, examplePost))
	b.ReportMetric(started.Seconds(), "start-s")
}

// BenchmarkCreateBesideRetention is POST /orders while a million old orders are removed, against a service that keeps all.
func BenchmarkCreateBesideRetention(b *testing.B) {
	dir := b.TempDir()
	seed(b, dir, ifShort(50_000, 1_000_000), 0)
	var pace []float64
	compare(b, posts(b, startOurs(b, b.TempDir()), 64, examplePost), func() load {
		p := startProcess(b, dir, nil, "-delay", "0s", "-keep", "10s")
		removed := func() int64 {
			sum, err := getSummary(p.url())
			require.NoError(b, err)
			return sum.TotalOrdersProcessed - sum.OrdersCompleted
		}
		earlier := removed()
		until(b, func() bool { return removed() > earlier })
		earlier = removed()
		l := hammer(b, p.addr, 64, http.StatusCreated, examplePost)
		pace = append(pace, float64(removed()-earlier)/float64(l.count))
		p.stop(b)
		return l
	})
	b.ReportMetric(median(pace), "removed/create")
}

// BenchmarkCreateBesideBackup is POST /orders while backups are made, one after the other, against none.
func BenchmarkCreateBesideBackup(b *testing.B) {
	dir := b.TempDir()
	seed(b, dir, ifShort(50_000, 1_000_000), 0)
	post := posts(b, startOurs(b, dir), 64, examplePost)
	compare(b, post, func() load {
		ctx, cancel := context.WithCancel(b.Context())
		var backups sync.WaitGroup
		backups.Go(func() {
			for ctx.Err() == nil {
				err := backUp(ctx, filepath.Join(dir, "data"), filepath.Join(b.TempDir(), "copy"))
				assert.True(b, err == nil || ctx.Err() != nil, err)
			}
		})
		l := post()
		cancel()
		backups.Wait()
		return l
	})
}

// BenchmarkFootprint is the resident memory of a process with 1,000,000
// statuses in its cache and as many orders in its backlog, and the bytes on
// disk of an order after it was stopped.
func BenchmarkFootprint(b *testing.B) {
	dir := b.TempDir()
	p := startProcess(b, dir, nil, "-delay", "24h", "-drain", "0s")
	var accepted int64
	for accepted < ifShort[int64](20_000, 1_000_000) {
		accepted += hammer(b, p.addr, 256, http.StatusCreated, examplePost).count
	}
	b.ReportMetric(p.residentMB(b), "resident-MB")
	p.stop(b)

	a, stop := openTestApp(b, dir, nil, nil)
	awaitRest(b, a, 0, accepted)
	stop()
	var bytes int64
	for _, name := range []string{"orders.db", "metrics.db"} {
		info, err := os.Stat(filepath.Join(a.cfg.data, name))
		require.NoError(b, err)
		bytes += info.Size()
	}
	b.ReportMetric(float64(bytes)/float64(accepted), "bytes/order")
	b.ReportMetric(0, "ns/op")
}

// ---- PostgreSQL ----

// sharedPostgres is the URL of a database for this process, where its tests run
// on PostgreSQL instead of SQLite.
var sharedPostgres = os.Getenv("TEST_POSTGRES")

// ordersURL is -orders for an app on dir: a schema of its own.
func ordersURL(dir string) string {
	if sharedPostgres == "" {
		return ""
	}
	schema := fmt.Sprintf("s%x", sha256.Sum256([]byte(dir)))[:40]
	db, err := sql.Open("pgx", sharedPostgres)
	if err == nil {
		_, err = db.Exec("CREATE SCHEMA IF NOT EXISTS " + schema)
		db.Close()
	}
	if err != nil {
		panic(err)
	}
	return sharedPostgres + "&search_path=" + schema
}

// cluster is a PostgreSQL server of the test's own.
type cluster struct {
	dir  string
	port int
	cmd  *exec.Cmd
}

// postgresProgram is a command of PostgreSQL's, which runs, as it demands, not as root, and ends with the test.
func postgresProgram(name string, args ...string) *exec.Cmd {
	command := []string{"--pdeathsig", "QUIT"}
	if os.Getuid() == 0 {
		command = append(command, "--reuid", "postgres", "--regid", "postgres", "--clear-groups")
	}
	cmd := exec.Command("setpriv", append(append(command, filepath.Join(os.Getenv("ORDERD_TEST_POSTGRES"), name)), args...)...)
	cmd.Dir = "/"
	return cmd
}

// templateCluster is an empty database directory to copy: initdb takes seconds.
var templateCluster = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "orderd-postgres-")
	if err != nil {
		return "", err
	}
	if os.Getuid() == 0 {
		if out, err := exec.Command("chown", "postgres:postgres", dir).CombinedOutput(); err != nil {
			return dir, fmt.Errorf("%w: %s", err, out)
		}
	}
	out, err := postgresProgram("initdb", "-D", filepath.Join(dir, "0"), "-A", "trust", "-U", "orderd", "-E", "UTF8", "--locale=C.UTF-8", "-N").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return dir, err
})

var clusters atomic.Int64 // made so far

func needsPostgres(tb testing.TB) {
	tb.Helper()
	if os.Getenv("ORDERD_TEST_POSTGRES") == "" {
		tb.Skip("ORDERD_TEST_POSTGRES is not set to the folder of PostgreSQL's server programs")
	}
}

// newCluster makes and starts a server on loopback.
func newCluster(tb testing.TB, settings ...string) *cluster {
	tb.Helper()
	needsPostgres(tb)
	template, err := templateCluster()
	require.NoError(tb, err)
	c := &cluster{dir: filepath.Join(template, fmt.Sprint(clusters.Add(1))), port: freePort(tb)}
	out, err := exec.Command("cp", "-a", filepath.Join(template, "0"), c.dir).CombinedOutput()
	require.NoError(tb, err, "%s", out)
	tb.Cleanup(func() { os.RemoveAll(c.dir) })
	c.set(tb, append([]string{"listen_addresses='127.0.0.1'", "unix_socket_directories=''", "shared_buffers='32MB'", "max_connections=200"}, settings...)...)
	c.start(tb)
	return c
}

func freePort(tb testing.TB) int {
	tb.Helper()
	for {
		port := 20_000 + rand.IntN(10_000) // below those that the system gives to others meanwhile
		l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
		if err == nil {
			require.NoError(tb, l.Close())
			return port
		}
	}
}

// standby copies the server, to follow it under that name.
func (c *cluster) standby(tb testing.TB, name string) *cluster {
	tb.Helper()
	s := &cluster{dir: c.dir + "-" + name, port: freePort(tb)}
	out, err := postgresProgram("pg_basebackup", "-D", s.dir, "-R", "-X", "stream", "-c", "fast", "-d", c.url("application_name="+name)).CombinedOutput()
	require.NoError(tb, err, "%s", out)
	tb.Cleanup(func() { os.RemoveAll(s.dir) })
	s.set(tb, "synchronous_standby_names=''")
	s.start(tb)
	return s
}

func (c *cluster) set(tb testing.TB, settings ...string) {
	tb.Helper()
	f, err := os.OpenFile(filepath.Join(c.dir, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(tb, err)
	_, err = fmt.Fprintln(f, strings.Join(append(settings, fmt.Sprintf("port=%d", c.port)), "\n"))
	require.NoError(tb, errors.Join(err, f.Close()))
}

// start returns once the server takes connections. It ends with the test.
func (c *cluster) start(tb testing.TB) {
	tb.Helper()
	said, exited := c.launch(tb)
	tb.Cleanup(func() {
		c.cmd.Process.Signal(syscall.SIGQUIT)
		<-exited
	})
	until(tb, func() bool {
		select {
		case <-exited:
			// Processes that a kill -9 has orphaned end a moment later.
			require.Contains(tb, said.String(), "pre-existing shared memory block", "the server has ended")
			time.Sleep(20 * time.Millisecond)
			said, exited = c.launch(tb)
		default:
		}
		conn, err := pgx.Connect(tb.Context(), c.url(""))
		if err != nil {
			time.Sleep(20 * time.Millisecond)
			return false
		}
		conn.Close(tb.Context())
		return true
	}, "the server takes connections")
}

// launch starts the server's process. said is what it prints.
func (c *cluster) launch(tb testing.TB) (said *transcript, exited chan struct{}) {
	tb.Helper()
	said, exited = &transcript{}, make(chan struct{})
	c.cmd = postgresProgram("postgres", "-D", c.dir)
	c.cmd.Stderr = said
	require.NoError(tb, c.cmd.Start())
	go func(cmd *exec.Cmd) {
		cmd.Wait()
		close(exited)
	}(c.cmd)
	return said, exited
}

// stop is a fast shutdown (SIGINT), an immediate one (SIGQUIT), or kill -9.
func (c *cluster) stop(tb testing.TB, how os.Signal) {
	tb.Helper()
	require.NoError(tb, c.cmd.Process.Signal(how))
	until(tb, func() bool {
		_, err := os.Stat(filepath.Join(c.dir, "postmaster.pid"))
		gone := c.cmd.Process.Signal(syscall.Signal(0)) != nil
		return gone && (err != nil || how == syscall.SIGKILL)
	}, "the server has ended")
	if how == syscall.SIGKILL {
		os.Remove(filepath.Join(c.dir, "postmaster.pid"))
	}
}

func (c *cluster) promote(tb testing.TB) {
	tb.Helper()
	ask[bool](tb, c, "SELECT pg_promote()")
}

func (c *cluster) url(params string) string {
	return fmt.Sprintf("postgres://orderd@127.0.0.1:%d/postgres?sslmode=disable&%s", c.port, params)
}

func (c *cluster) exec(tb testing.TB, queries ...string) {
	tb.Helper()
	conn, err := pgx.Connect(tb.Context(), c.url("application_name=asker"))
	require.NoError(tb, err)
	defer conn.Close(tb.Context())
	for _, query := range queries {
		_, err := conn.Exec(tb.Context(), query)
		require.NoError(tb, err, query)
	}
}

func ask[T any](tb testing.TB, c *cluster, query string, args ...any) (v T) {
	tb.Helper()
	conn, err := pgx.Connect(tb.Context(), c.url("application_name=asker"))
	require.NoError(tb, err)
	defer conn.Close(tb.Context())
	require.NoError(tb, conn.QueryRow(tb.Context(), query, args...).Scan(&v))
	return v
}

// sampleReplica is a way to the database, without a service around it.
func sampleReplica(tb testing.TB, dsn string) *replica {
	tb.Helper()
	log := newLogger(io.Discard, slog.LevelInfo, io.Discard)
	tb.Cleanup(func() { log.close() })
	p, err := newReplica(dsn, totals{}, func(totals) {}, log)
	require.NoError(tb, err)
	p.url = "http://127.0.0.1:1"
	return p
}

func nobodyFollows(string, string) {}

// lead returns an engine that leads on the server until the test ends.
func (c *cluster) lead(tb testing.TB) *postgresEngine {
	tb.Helper()
	l := leadOn(tb, sampleReplica(tb, c.url("")))
	tb.Cleanup(func() { l.close() })
	return l
}

// leadOn returns the engine of a replica that leads.
func leadOn(tb testing.TB, p *replica) *postgresEngine {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	l, err := p.standBy(ctx, nobodyFollows)
	require.NoError(tb, err)
	_, err = l.start()
	require.NoError(tb, err)
	return l
}

var newestSample atomic.Int64

// batchOf are orders with their IDs, as the writer hands them to an engine.
func batchOf(creates ...*creation) *batch {
	b := newBatch(nil)
	for _, c := range creates {
		previous, next := int64(0), int64(0)
		for next == 0 || !newestSample.CompareAndSwap(previous, next) { // many tests share it
			previous = newestSample.Load()
			next = max(previous+1, time.Now().UnixMilli()<<16)
		}
		c.newID = joinID(next, rand.Int64())
		c.id = c.newID
		b.creates = append(b.creates, c)
	}
	return b
}

// stepsOf move orders that were stored.
func stepsOf(from, to status, took int64, creates ...*creation) (steps []transition) {
	for _, c := range creates {
		if c.stored() {
			steps = append(steps, transition{id: c.id, from: from, to: to, startedMS: int64(c.id.Time()) + 5, tookMicros: took})
		}
	}
	return steps
}

// requireExact compares the totals with the table.
func requireExact(tb testing.TB, c *cluster) {
	tb.Helper()
	require.True(tb, ask[bool](tb, c, `SELECT accepted - removed = (SELECT count(*) FROM orders) AND processing = (SELECT count(*) FROM orders WHERE status = 1)
		AND completed - removed = (SELECT count(*) FROM orders WHERE status = 2) AND (removed > 0 OR l.took = (SELECT coalesce(sum(o.took), 0) FROM orders o)) FROM leader l`))
}

// onPostgreSQL are the tests that hold for both engines.
var onPostgreSQL = strings.Join([]string{
	"EndToEnd", "OrdersAgainstAModel", "CreateAccepts", "CreateRefusesFields", "CreateRefusesBodies", "IdempotencyKey", "GetOrder", "Wait",
	"AnswersWhileItWaitsForRunningWork", "PreferHeader", "ListOrders", "ListPages", "ListPagesEndAfterSoManyBytes", "MetricsJSON", "MetricsNegotiation", "MetricsText",
	"Routes", "Host", "Token", "PagesOfOtherSites", "OneResourceUnderEveryName", "ClientInTheRequestLog", "RequestLog",
	"StepsAreTakenOnlyFromTheStatusOfTheRow", "BatchesOfEverySizeKeepEveryOrder", "ReadableViewShowsWhatTheAPIShows", "CacheBound",
	"ABacklogOfLargeOrdersIsTaken", "WhatIsInDoubtIsNotCalledRefused", "Drain",
	"TheEndpointGetsTheOrderExactly", "AnswersOfTheEndpoint", "ThePoolPausesWhileTheEndpointIsAway", "AnAttemptThatTheStopCutsOffIsMadeAgain",
	"MetricsAreRebuiltFromTheOrders", "AverageIsOverCompletedOrders", "KillNine", "SigtermUnderLoad",
	"TotalsAreMendedAtStart",
	"AClockThatWasAheadIsTold", "ListsPushNoStatusOut", "CompletedOrdersAreRemoved", "AJumpOfTheClockRemovesNothing", "Waiters", "RandomIDs",
}, "|")

// TestOnPostgreSQL runs the tests of what an engine must do on the other one, in
// another process.
func TestOnPostgreSQL(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "fsync=on")
	self, err := os.Executable()
	require.NoError(t, err)
	tests := onPostgreSQL
	if raced() { // the rest asks no more of an engine
		tests = "OrdersAgainstAModel|IdempotencyKey|ListPages|KillNine|Wait|Drain|CompletedOrdersAreRemoved"
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run", "^Test("+tests+")$", "-test.parallel", "8", "-test.v", "-kill-rounds", "2")
	cmd.Env = append(os.Environ(), "TEST_POSTGRES="+c.url("application_name=test"))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NotContains(t, string(out), "--- SKIP: Test", "a test that is about SQLite is not for this list")
	passed := regexp.MustCompile(`--- PASS: Test\w+ \(`).FindAll(out, -1)
	require.Len(t, passed, strings.Count(tests, "|")+1, "a test of this list is gone")
}

func TestUnfitServersAreRefused(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	c.exec(t, "CREATE ROLE loose LOGIN", "ALTER ROLE loose SET synchronous_commit = off", "CREATE ROLE poor LOGIN",
		"CREATE DATABASE latin ENCODING LATIN1 LOCALE 'C' TEMPLATE template0", "CREATE SCHEMA taken", "CREATE TABLE taken.orders ()")
	refused := func(dsn, sentence string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		var stderr transcript
		err := run(ctx, []string{"-orders", dsn, "-advertise", "http://127.0.0.1:1", "-addr", "127.0.0.1:0", "-data", t.TempDir(), "-log", "-"}, leaveGC, io.Discard, &stderr)
		require.ErrorContains(t, err, sentence)
		require.Equal(t, 1, report(err, &stderr))
		require.Regexp(t, `"level":"ERROR","msg":"(not started|stopped)","error":".*`+regexp.QuoteMeta(sentence), stderr.String())
		require.NotContains(t, err.Error(), "\n")
	}
	refused("file:orders", "must be the URL of a PostgreSQL database")
	refused("postgres://host:port/", "-orders cannot be used")
	refused(strings.Replace(c.url(""), "orderd@", "loose@", 1), "synchronous_commit is off")
	refused(strings.Replace(c.url(""), "orderd@", "poor@", 1), "permission denied")
	refused(strings.Replace(c.url(""), "orderd@", "nobody@", 1), "does not exist: check the user")
	refused(strings.Replace(c.url(""), "/postgres", "/latin", 1), "encoding is LATIN1")
	refused(strings.Replace(c.url(""), "/postgres", "/none", 1), "does not exist: make it")
	refused(c.url("search_path=none"), "no schema")
	refused(c.url("search_path=taken"), "another program")
	leadOn(t, sampleReplica(t, c.url(""))).close()
	c.exec(t, "UPDATE leader SET version = 7")
	refused(c.url(""), "schema version 7")
	c.stop(t, os.Interrupt)
	c.set(t, "full_page_writes=off")
	c.start(t)
	refused(c.url(""), "full_page_writes off")
}

func TestOneOfManyReplicasMakesTheTables(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	var group sync.WaitGroup
	identities := make([]int64, 8)
	for i := range identities {
		p := sampleReplica(t, c.url(""))
		group.Go(func() {
			conn, err := p.connect(t.Context())
			if err == nil {
				defer conn.Close(t.Context())
				if err = p.makeTables(t.Context(), conn); err == nil {
					_, err = p.readRow(t.Context(), conn)
				}
			}
			assert.NoError(t, err)
			identities[i] = p.row.totals.identity
		})
	}
	group.Wait()
	require.Len(t, slices.Compact(identities), 1)
	require.NotZero(t, identities[0])
}

// TestCommitOnPostgreSQL runs on defaults of the role that would spoil it.
func TestCommitOnPostgreSQL(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	queries := []string{"CREATE SCHEMA shop"}
	for _, setting := range []string{"jit = on", "jit_above_cost = 0", "plan_cache_mode = force_custom_plan", "default_transaction_isolation = 'serializable'",
		"enable_nestloop = off", "enable_indexscan = off", "idle_session_timeout = 60000", "search_path = shop", "DateStyle = 'German'", "timezone = 'Asia/Kathmandu'", "bytea_output = escape", "default_transaction_read_only = on"} {
		queries = append(queries, "ALTER ROLE orderd SET "+setting)
	}
	c.exec(t, queries...) // in one session, which they do not change yet
	l := c.lead(t)
	var idle string
	require.NoError(t, l.conn.QueryRow(t.Context(), "SHOW idle_session_timeout").Scan(&idle))
	require.Equal(t, "0", idle)

	a, b := sampleOrder(1, "k1"), sampleOrder(2, "")
	again, differs := sampleOrder(1, "k1"), sampleOrder(3, "k1")
	first := batchOf(a, b, again, differs)
	require.NoError(t, l.commit(first))
	require.True(t, a.stored() && b.stored() && again.replayed)
	require.Equal(t, a.id, again.id)
	require.ErrorIs(t, differs.err, errKeyReused)
	require.EqualValues(t, 2, first.totals.accepted)
	require.Equal(t, high(b.id), first.totals.newest)

	differs, again = sampleOrder(3, "k1"), sampleOrder(1, "k1")
	second := batchOf(differs, again)
	second.steps = append(stepsOf(pending, processing, 0, a, b), transition{id: ulid.Make(), from: pending, to: processing, startedMS: 1})
	require.NoError(t, l.commit(second))
	require.ErrorIs(t, differs.err, errKeyReused)
	require.True(t, again.replayed)
	require.Equal(t, []bool{false, false, true}, []bool{second.steps[0].void, second.steps[1].void, second.steps[2].void})
	require.Equal(t, totals{identity: second.totals.identity, seq: second.totals.seq, accepted: 2, processing: 2, newest: high(b.id), newestStarted: high(b.id)}, second.totals)

	third := newBatch(append(stepsOf(processing, completed, 1500, a), stepsOf(pending, completed, 7, b)...))
	require.NoError(t, l.commit(third))
	require.False(t, third.steps[0].void)
	require.True(t, third.steps[1].void, "it is Processing")
	require.EqualValues(t, 1500, third.totals.sumTook)
	_, seq, err := l.find(ulid.Make())
	require.ErrorIs(t, err, errNotFound)
	require.GreaterOrEqual(t, seq, third.totals.seq)

	repeat := batchOf(sampleOrder(1, "k1"))
	require.NoError(t, l.commit(repeat))
	l.state = unproven // as if nothing had confirmed it yet
	require.NoError(t, l.commit(repeat))
	require.True(t, repeat.creates[0].replayed, "what was found out of a commit holds until it is confirmed")

	removal := newBatch(nil)
	removal.expiry = &expiry{before: time.Now().Add(time.Hour).UnixMilli()}
	require.NoError(t, l.commit(removal))
	require.Equal(t, []ulid.ULID{a.id}, removal.removed)
	require.EqualValues(t, 1, removal.totals.removed)
	fresh := sampleOrder(1, "k1")
	require.NoError(t, l.commit(batchOf(fresh)))
	require.True(t, fresh.stored(), "the key of a removed order is free")
	queue, err := l.backlog(0, 10)
	require.NoError(t, err)
	require.Equal(t, []queued{{b.id, processing}, {fresh.id, pending}}, queue)

	require.NoError(t, l.commit(newBatch(stepsOf(pending, completed, 1, fresh))))
	repeated := sampleOrder(1, "k1")
	both := batchOf(repeated)
	both.expiry = &expiry{before: time.Now().Add(time.Hour).UnixMilli()}
	require.NoError(t, l.commit(both))
	require.Equal(t, fresh.id, repeated.id)
	_, _, err = l.find(fresh.id)
	require.NoError(t, err, "an order is not removed by the commit that answers with it")
}

// TestAnUnconfirmedCommitIsGone where another server goes on without it: that is no loss, but the end of a term.
func TestAnUnconfirmedCommitIsGone(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	l := c.lead(t)
	b := batchOf(sampleOrder(1, ""))
	require.NoError(t, l.commit(b))
	l.state = unproven
	l.replica.highestConfirmed.seq--
	c.exec(t, "DELETE FROM orders", "UPDATE leader SET seq = seq - 1, accepted = 0")
	err := l.commit(b)
	require.ErrorIs(t, err, errOutcomeUnknown)
	require.ErrorIs(t, err, errUnconfirmedIsGone)
	require.NotErrorIs(t, err, errBroken)
	require.ErrorIs(t, l.current(), errDeposed, "nothing is shown by it any more")
}

// TestWhatPostgreSQLRefuses by somebody's constraints, an order and the removal of others, stops nothing else.
func TestWhatPostgreSQLRefuses(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	l := c.lead(t)
	first := batchOf(sampleOrder(1, ""))
	require.NoError(t, l.commit(first))
	require.NoError(t, l.commit(newBatch(stepsOf(pending, completed, 1, first.creates...))))
	c.exec(t, "ALTER TABLE orders ADD CHECK (user_id <> 'poison')",
		"CREATE TABLE invoices (id bigint REFERENCES orders)", "INSERT INTO invoices SELECT id_high FROM orders")
	creates := sampleOrders(100)
	creates[7].userID, creates[7].key, creates[8].key, creates[70].userID = "poison", "key", "other", "poison"
	b := batchOf(creates...)
	b.expiry = &expiry{before: time.Now().Add(time.Hour).UnixMilli()}
	require.NoError(t, l.commit(b))
	for i, c := range creates {
		require.Equal(t, i == 7 || i == 70, errors.Is(c.err, errRejected), i)
		require.Equal(t, c.err == nil, c.stored(), i)
	}
	require.Nil(t, b.expiry, "and nothing is removed")
	require.EqualValues(t, 1+98, b.totals.accepted)
	require.Zero(t, b.totals.removed)
	requireExact(t, c)
	c.exec(t, "DROP VIEW orders_readable", "DROP TABLE invoices, orders")
	require.ErrorIs(t, l.commit(batchOf(sampleOrder(5, ""))), errBroken, "what no retry mends ends it")
}

// TestABacklogOfLargeOrdersIsTaken though their content is more than a read takes at once.
func TestABacklogOfLargeOrdersIsTaken(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, stop := openIdle(t, dir, nil, nil)
	commitTogether(t, a.store, largest(100))
	stop()
	a, _ = openTestApp(t, dir, nil, nil)
	awaitRest(t, a, 0, 100)
}

// TestTheFence writes as a leader that is no longer one, and as one that is late.
func TestTheFence(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	l := c.lead(t)
	for _, test := range []struct {
		name      string
		term, seq int64
		ends      error
	}{
		{"an earlier seq of the same term", 0, -1, errBroken},
		{"an earlier term", -1, 0, errDeposed},
		{"an earlier term and seq", -1, -1, errDeposed},
	} {
		other := sampleReplica(t, c.url(""))
		conn, err := other.connect(t.Context())
		require.NoError(t, err)
		other.row = l.replica.row
		other.row.totals.seq += test.seq
		late := &postgresEngine{replica: other, term: l.term + test.term, conn: conn}
		require.NoError(t, late.prepareCommit(t.Context(), conn))
		b := batchOf(sampleOrder(1, ""))
		err = late.commit(b)
		require.ErrorIs(t, err, test.ends, test.name)
		require.NotErrorIs(t, err, errOutcomeUnknown, test.name)
		conn.Close(t.Context())
	}
	require.Zero(t, ask[int64](t, c, "SELECT count(*) FROM orders"))
	var takeOvers [2]func() error
	for i := range takeOvers {
		p := sampleReplica(t, c.url(""))
		conn, err := p.connect(t.Context())
		require.NoError(t, err)
		row, err := p.readRow(t.Context(), conn)
		require.NoError(t, err)
		takeOvers[i] = func() error {
			_, err := p.takeOver(t.Context(), conn, row)
			return err
		}
	}
	require.NoError(t, takeOvers[0]())
	require.ErrorIs(t, takeOvers[1](), errDeposed, "of two that saw the same row, one takes over")
}

// dropper is a TCP proxy to a server, which loses its answers on demand, and every request to cancel.
type dropper struct {
	addr  string
	every atomic.Int64 // one answer in so many is lost, with its connection; 0 loses none

	mu      sync.Mutex // guards clients
	clients []net.Conn
}

func newDropper(tb testing.TB, c *cluster) *dropper {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(tb, err)
	tb.Cleanup(func() { l.Close() })
	d := &dropper{addr: l.Addr().String()}
	tb.Cleanup(d.cut)
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go d.carry(tb, client, fmt.Sprintf("127.0.0.1:%d", c.port))
		}
	}()
	return d
}

// carry leaves the server's end open where the client's is cut: what it was sent goes on.
func (d *dropper) carry(tb testing.TB, client net.Conn, addr string) {
	defer client.Close()
	server, err := net.Dial("tcp", addr)
	if err != nil {
		return
	}
	tb.Cleanup(func() { server.Close() })
	d.mu.Lock()
	d.clients = append(d.clients, client)
	d.mu.Unlock()
	go func() {
		buffer := make([]byte, 64<<10)
		for {
			n, err := client.Read(buffer)
			if err != nil {
				time.AfterFunc(time.Second, func() { server.Close() })
				return
			}
			if n == 16 && binary.BigEndian.Uint32(buffer[4:]) == 80877102 { // CancelRequest
				client.Close()
				server.Close() // while PostgreSQL waits for a first message, for up to a minute, it does not stop
				return
			}
			server.Write(buffer[:n])
		}
	}()
	buffer := make([]byte, 64<<10)
	for {
		n, err := server.Read(buffer)
		if every := d.every.Load(); err != nil || every > 0 && rand.Int64N(every) == 0 {
			return
		}
		if _, err := client.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// cut closes every connection on the client's side.
func (d *dropper) cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, client := range d.clients {
		client.Close()
	}
	d.clients = nil
}

func (d *dropper) url() string {
	return fmt.Sprintf("postgres://orderd@%s/postgres?sslmode=disable", d.addr)
}

// pound commits batches, each of which completes the orders of the one before
// it, with keys that come twice in a batch and in two batches. It returns how
// many orders were stored.
func pound(t *testing.T, l *postgresEngine, batches int) (stored int) {
	t.Helper()
	var last []*creation
	for i := range batches {
		creates := sampleOrders(20)
		for j := range 5 {
			key := fmt.Sprintf("key-%d-%d", i/2, j)
			creates = append(creates, sampleOrder(j, key), sampleOrder(j, key))
		}
		b := batchOf(creates...)
		b.steps = stepsOf(pending, completed, 3, last...)
		until(t, func() bool {
			err := l.commit(b)
			if err != nil {
				require.True(t, errors.Is(err, errNotWritten) || errors.Is(err, errInDoubt), err)
				time.Sleep(20 * time.Millisecond)
			}
			return err == nil
		}, "the batch is committed")
		for j, c := range creates {
			require.NoError(t, c.err)
			require.Equal(t, j >= 20 && (j%2 == 1 || i%2 == 1), c.replayed, "create %d of batch %d", j, i)
			if c.stored() {
				stored++
			}
		}
		last = creates
	}
	until(t, func() bool { return l.commit(newBatch(stepsOf(pending, completed, 3, last...))) == nil }, "the last ones are completed")
	return stored
}

// commitAside commits a batch as the writer does, until its outcome is known.
func commitAside(l *postgresEngine, b *batch) <-chan error {
	done := make(chan error, 1)
	go func() {
		err := l.commit(b)
		for errors.Is(err, errInDoubt) {
			err = l.commit(b)
		}
		done <- err
	}()
	return done
}

// requirePounded closes the engine and looks for what pound has stored by it.
func requirePounded(t *testing.T, c *cluster, l *postgresEngine, stored int) {
	t.Helper()
	require.NoError(t, l.close())
	requireExact(t, c)
	require.EqualValues(t, stored, ask[int64](t, c, "SELECT accepted FROM leader"))
	require.EqualValues(t, stored, ask[int64](t, c, "SELECT completed FROM leader"))
}

func TestUnknownOutcomesAreFoundOut(t *testing.T) {
	t.Parallel()
	t.Run("answers that are lost", func(t *testing.T) {
		t.Parallel()
		c := newCluster(t)
		d := newDropper(t, c)
		l := leadOn(t, sampleReplica(t, d.url()))
		d.every.Store(8)
		stored := pound(t, l, many(600))
		d.every.Store(0)
		requirePounded(t, c, l, stored)
	})
	t.Run("sessions that are terminated", func(t *testing.T) {
		t.Parallel()
		c := newCluster(t)
		p := sampleReplica(t, c.url(""))
		l := leadOn(t, p)
		ended := make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		t.Cleanup(cancel)
		go func() {
			defer close(ended)
			conn, err := pgx.Connect(ctx, c.url("application_name=asker"))
			for commits := int64(-1); err == nil && ctx.Err() == nil; {
				if now := p.lastSign.Load().UnixNano(); now != commits { // once for each commit at most
					commits = now
					conn.Exec(ctx, "SELECT pg_sleep(random() * 0.05), pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name <> 'asker' AND backend_type = 'client backend'")
				}
				sleep(ctx, 20*time.Millisecond)
			}
		}()
		stored := pound(t, l, many(600))
		cancel()
		<-ended
		requirePounded(t, c, l, stored)
	})
	t.Run("a server that restarts", func(t *testing.T) {
		t.Parallel()
		c := newCluster(t)
		l := leadOn(t, sampleReplica(t, c.url("")))
		done := make(chan int, 1)
		go func() {
			defer close(done) // also where it fails
			done <- pound(t, l, many(6000))
		}()
		for _, how := range []os.Signal{os.Interrupt, syscall.SIGQUIT, syscall.SIGKILL} {
			<-time.After(300 * time.Millisecond)
			c.stop(t, how)
			c.start(t)
		}
		requirePounded(t, c, l, <-done)
	})
	t.Run("a row that somebody has changed", func(t *testing.T) {
		t.Parallel()
		c := newCluster(t)
		l := c.lead(t)
		l.state = inDoubt
		c.exec(t, "UPDATE leader SET seq = seq + 2")
		err := l.commit(batchOf(sampleOrder(1, "")))
		require.ErrorIs(t, err, errOutcomeUnknown)
		require.ErrorContains(t, err, "something other than orderd has changed the row")
	})
}

// TestOriginalAndResend has a batch arrive at the row before or after its own resend, or never.
func TestOriginalAndResend(t *testing.T) {
	t.Parallel()
	for _, dies := range []bool{false, true} {
		t.Run(fmt.Sprintf("the original dies: %t", dies), func(t *testing.T) {
			t.Parallel()
			c := newCluster(t)
			d := newDropper(t, c)
			l := leadOn(t, sampleReplica(t, d.url()))
			blocker, err := pgx.Connect(t.Context(), c.url(""))
			require.NoError(t, err)
			defer blocker.Close(t.Context())
			_, err = blocker.Exec(t.Context(), "BEGIN; SELECT FROM leader FOR UPDATE")
			require.NoError(t, err)
			b := batchOf(sampleOrders(5)...)
			done := commitAside(l, b)
			waiting := func(least int64) { // each attempt that is given up waits on, too
				t.Helper()
				until(t, func() bool {
					return ask[int64](t, c, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") >= least
				}, "so many wait for the row")
			}
			waiting(1)
			d.cut()
			waiting(2)
			if dies {
				c.exec(t, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock' ORDER BY query_start LIMIT 1")
				waiting(1)
			}
			_, err = blocker.Exec(t.Context(), "COMMIT")
			require.NoError(t, err)
			require.NoError(t, <-done)
			require.EqualValues(t, 5, ask[int64](t, c, "SELECT accepted FROM leader"))
			requireExact(t, c)
		})
	}
}

func TestTakeOver(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	a := leadOn(t, sampleReplica(t, c.url("")))
	require.NoError(t, a.current())
	second := sampleReplica(t, c.url(""))
	began := time.Now()
	b := leadOn(t, second) // a commits nothing meanwhile
	require.Greater(t, time.Since(began), takeOverAfter)
	require.Less(t, time.Since(began), 3*takeOverAfter)
	require.ErrorIs(t, a.current(), errSilent)
	late := batchOf(sampleOrder(1, ""))
	err := a.commit(late)
	require.ErrorIs(t, err, errDeposed)
	require.NotErrorIs(t, err, errOutcomeUnknown)
	require.Zero(t, ask[int64](t, c, "SELECT accepted FROM leader"))
	_, _, err = a.find(late.creates[0].id)
	require.ErrorIs(t, err, errDeposed)
	require.NoError(t, a.close())

	led, followed := make(chan *postgresEngine, 1), make(chan string, 1)
	third := sampleReplica(t, c.url(""))
	third.url = "http://127.0.0.1:3"
	go func() {
		l, err := third.standBy(t.Context(), func(url, _ string) {
			select {
			case followed <- url:
			default:
			}
		})
		assert.NoError(t, err)
		led <- l
	}()
	require.Equal(t, second.url, <-followed)
	began = time.Now()
	require.NoError(t, b.close())
	l := <-led
	require.Less(t, time.Since(began), takeOverAfter, "who hands over is not waited for")
	l.close()
}

// TestASynchronousStandby has waits for it cancelled: what is visible then is on
// one server only, and must be neither shown nor answered.
func TestASynchronousStandby(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	s := c.standby(t, "second")
	c.exec(t, "ALTER SYSTEM SET synchronous_standby_names = 'second'", "SELECT pg_reload_conf()")
	until(t, func() bool {
		return ask[int64](t, c, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == 1
	}, "the standby is synchronous")
	l, placed := c.lead(t), int64(0)
	for _, end := range []string{"pg_cancel_backend", "pg_terminate_backend", ""} {
		s.stop(t, os.Interrupt)
		b := batchOf(sampleOrders(4)...)
		done := commitAside(l, b)
		until(t, func() bool {
			return ask[int64](t, c, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == 1
		}, "the commit waits for the standby")
		if end != "" { // else the engine's own deadline cancels it
			c.exec(t, "SELECT "+end+"(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
		}
		until(t, func() bool { return ask[int64](t, c, "SELECT count(*) FROM orders") == placed+4 }, "the batch is visible")
		_, seq, err := l.find(b.creates[0].id)
		require.NoError(t, err)
		require.Greater(t, seq, l.confirmedSeq.Load(), "it is not proven")
		select {
		case err := <-done:
			require.Fail(t, "answered", "%v", err)
		case <-time.After(time.Second):
		}
		s.start(t)
		require.NoError(t, <-done)
		placed += 4
	}
	last := batchOf(sampleOrders(6)...)
	require.NoError(t, l.commit(last))
	c.stop(t, syscall.SIGKILL)
	s.promote(t)
	next := s.lead(t)
	_, _, err := next.find(last.creates[5].id)
	require.NoError(t, err)
	require.EqualValues(t, placed+6, next.replica.row.totals.accepted)
	requireExact(t, s)
}

// ---- replicas in processes of their own ----

// replicas are processes on one database.
type replicas struct {
	orders string
	args   []string // besides those that every replica has
	dirs   []string
	ports  []int
	all    []*process
}

func startReplicas(tb testing.TB, orders string, n int, args ...string) *replicas {
	tb.Helper()
	r := &replicas{orders: orders, args: args}
	for i := range n {
		r.dirs, r.ports, r.all = append(r.dirs, tb.TempDir()), append(r.ports, freePort(tb)), append(r.all, nil)
		r.start(tb, i)
	}
	r.leader(tb)
	for _, p := range r.all {
		until(tb, func() bool { return p.get(tb, "/readyz").status == http.StatusOK })
	}
	return r
}

// start starts a replica anew, on the same data and address.
func (r *replicas) start(tb testing.TB, i int) {
	tb.Helper()
	r.all[i] = startProcess(tb, r.dirs[i], nil, append([]string{"-orders", r.orders, "-addr", fmt.Sprintf("127.0.0.1:%d", r.ports[i]),
		"-advertise", r.url(i), "-delay", "5ms", "-workers", "64"}, r.args...)...)
}

func (r *replicas) url(i int) string { return fmt.Sprintf("http://127.0.0.1:%d", r.ports[i]) }

func (r *replicas) urls() (urls []string) {
	for i := range r.all {
		urls = append(urls, r.url(i))
	}
	return urls
}

// leader waits for one, and returns its number.
func (r *replicas) leader(tb testing.TB) (leader int) {
	tb.Helper()
	until(tb, func() bool {
		for i, p := range r.all {
			got := send(tb.Context(), p.addr, http.MethodGet, "/metrics", http.Header{"Accept": {"text/plain"}}, "")
			if leader = i; strings.Contains(got.body, "\norderd_leader 1\n") && p.get(tb, "/metrics").status == http.StatusOK {
				return true
			}
		}
		time.Sleep(10 * time.Millisecond)
		return false
	}, "a replica leads")
	return leader
}

// TestReplicasUnderFaults runs clients and observers on all replicas while
// something fails, and has the oracle check everything after each round.
func TestReplicasUnderFaults(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	d := newDropper(t, c)
	r := startReplicas(t, d.url(), 3)
	seed := cmp.Or(*killSeed, uint64(time.Now().UnixNano()))
	t.Logf("repeat with -seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	pause := func(most time.Duration) { <-time.After(time.Duration(random.Int64N(int64(most)))) }
	j := newJournal("replicas", 5*time.Millisecond)
	j.rand, j.replicas = rand.New(rand.NewPCG(seed, 0)), true
	hang := time.Duration(many(200)) * 100 * time.Millisecond // longer than a lease and a take-over, or just a lease
	faults := []struct {
		name string
		make func()
	}{
		{"kill -9 of the leader", func() {
			leader := r.leader(t)
			r.all[leader].kill()
			r.leaderAmong(t, leader)
			r.start(t, leader)
		}},
		{"the leader stands still and goes on", func() {
			leader := r.leader(t)
			require.NoError(t, r.all[leader].signal("-STOP"))
			<-time.After(max(hang, 6*time.Second))
			require.NoError(t, r.all[leader].signal("-CONT"))
		}},
		{"kill -9 of a standby", func() {
			standby := (r.leader(t) + 1) % len(r.all)
			r.all[standby].kill()
			r.start(t, standby)
		}},
		{"kill -9 of all", func() {
			for i := range r.all {
				r.all[i].kill()
			}
			for i := range r.all {
				r.start(t, i)
			}
		}},
		{"the leader hands over", func() {
			leader := r.leader(t)
			require.Equal(t, 0, r.all[leader].terminate(t, time.Minute), r.all[leader].stderr.String())
			r.start(t, leader)
		}},
		{"PostgreSQL restarts", func() { c.stop(t, os.Interrupt); c.start(t) }},
		{"PostgreSQL restarts at once", func() { c.stop(t, syscall.SIGQUIT); c.start(t) }},
		{"sessions are terminated", func() {
			for range 5 {
				c.exec(t, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name <> 'asker' AND backend_type = 'client backend'")
				pause(300 * time.Millisecond)
			}
		}},
		{"answers are lost", func() { d.every.Store(10); <-time.After(2 * time.Second); d.every.Store(0) }},
		{"PostgreSQL is away", func() {
			c.stop(t, os.Interrupt)
			<-time.After(hang * 3 / 2)
			c.start(t)
		}},
	}
	order := random.Perm(len(faults))
	for round := range *faultRounds {
		fault := faults[order[round%len(faults)]]
		t.Logf("round %d: %s", round, fault.name)
		var stops []func()
		for _, url := range r.urls() {
			stops = append(stops, j.load(url, 3, 100_000), j.observe(url))
		}
		pause(time.Second)
		fault.make()
		r.leader(t)
		pause(time.Second)
		for _, stop := range stops {
			stop()
		}
		j.checkReplicas(t, r)
		requireExact(t, c)
	}
	t.Logf("%d accepted, %d refused, %d unknown, %d reads", j.count(accepted), j.count(refused), j.count(unknown), j.reads)
	require.NotZero(t, j.count(accepted))
}

// leaderAmong waits for a leader other than the one that is gone.
func (r *replicas) leaderAmong(tb testing.TB, gone int) {
	tb.Helper()
	rest := &replicas{all: slices.Delete(slices.Clone(r.all), gone, gone+1)}
	rest.leader(tb)
}

// checkReplicas sends what is unknown again, by its key, and asks one replica after the other.
func (j *journal) checkReplicas(t *testing.T, r *replicas) {
	t.Helper()
	client := newClient()
	defer client.CloseIdleConnections()
	for i, in := range j.intents {
		if in.key != "" && in.outcome == unknown {
			until(t, func() bool {
				o, _ := j.send(client, r.url(i%len(r.all)), in)
				in.outcome = o
				return o == accepted || o == refused && strings.HasSuffix(in.body, `: -1}`) // else a 503 that says nothing of the first try
			}, "the outcome is found out by the key")
		}
	}
	for _, url := range r.urls() {
		sum := drained(t, url)
		var orders []orderDocument
		until(t, func() bool { // a lease may run out on a busy machine
			var err error
			if orders, err = listAll(url); err != nil {
				require.ErrorContains(t, err, " answers 503")
			}
			return err == nil
		}, "every order is listed")
		require.NoError(t, j.verify(orders, sum))
	}
}

// TestLostCommitsAreNoticed promotes an asynchronous standby that lacks some
// commits: every replica says so, stops, and refuses to start again.
func TestLostCommitsAreNoticed(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	s := c.standby(t, "second")
	both := fmt.Sprintf("postgres://orderd@127.0.0.1:%d,127.0.0.1:%d/postgres?sslmode=disable", c.port, s.port)
	r := startReplicas(t, both, 2)
	j := newJournal("lost", 5*time.Millisecond)
	j.place(t, r.url(0), 5)
	until(t, func() bool { return ask[int64](t, s, "SELECT coalesce(max(completed), 0) FROM leader") == 5 }, "the standby has them")
	s.exec(t, "ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()")
	until(t, func() bool { return ask[int64](t, c, "SELECT count(*) FROM pg_stat_replication") == 0 }, "the standby follows no more")
	j.place(t, r.url(1), 5)
	drained(t, r.url(0))
	for i := range r.all { // by their own metrics.db
		until(t, func() bool {
			counts, err := openSQLite(filepath.Join(r.dirs[i], "data", "metrics.db"), "mode=ro")
			require.NoError(t, err)
			defer counts.Close()
			var n int
			return counts.QueryRow("SELECT completed FROM totals").Scan(&n) == nil && n == 10
		}, "the replica has counted them")
	}
	c.stop(t, syscall.SIGKILL)
	s.promote(t)
	for i, p := range r.all {
		require.Equal(t, 1, p.wait(t, *patience), p.stderr.String())
		require.Contains(t, p.stderr.String(), "has lost commits that it had confirmed")
		again := launch(t, nil, r.dirs[i], nil, "-orders", both, "-advertise", r.url(i))
		require.Equal(t, 1, again.wait(t, time.Minute), again.stderr.String())
		require.Contains(t, again.stderr.String(), "has lost commits that it had confirmed")
	}
}

// TestLossBehindALaterTerm has a replica look again only after another has led
// on, past the seq that was confirmed.
func TestLossBehindALaterTerm(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		since int64 // seq with which the later term began
		lost  bool
	}{
		{"it began with what was confirmed", 101, false},
		{"it began before that", 100, true},
	} {
		p := sampleReplica(t, "postgres://orderd@db/orderd")
		require.NoError(t, p.noteRow(leaderRow{term: 3, since: 7, proven: 100, totals: totals{identity: 1, seq: 101}}))
		err := p.noteRow(leaderRow{term: 4, since: test.since, proven: 119, totals: totals{identity: 1, seq: 120}})
		require.Equal(t, test.lost, errors.Is(err, errBroken), test.name)
		if !test.lost { // and a server that has begun the same term for another replica
			require.NoError(t, p.noteRow(leaderRow{term: 4, since: test.since, proven: 120, totals: totals{identity: 1, seq: 121}}))
			require.ErrorIs(t, p.noteRow(leaderRow{term: 4, since: 90, proven: 120, totals: totals{identity: 1, seq: 122}}), errBroken)
		}
		require.ErrorIs(t, p.noteRow(leaderRow{term: 5, since: 130, proven: 119, totals: totals{identity: 2, seq: 140}}), errBroken, "another database")
	}
}

// TestAStandbyPassesOn asks a standby for everything, beside the leader.
func TestAStandbyPassesOn(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	r := startReplicas(t, c.url(""), 2)
	leader := r.leader(t)
	standby := 1 - leader
	addr := r.all[standby].addr
	header := keyed("cart")
	header.Set("X-Forwarded-For", "6.6.6.6")
	created := callAt(t, addr, http.MethodPost, "/orders", header, exampleOrder)
	require.Equal(t, http.StatusCreated, created.status, created.body)
	require.Equal(t, created.body, callAt(t, r.all[leader].addr, http.MethodPost, "/orders", keyed("cart"), exampleOrder).body)
	location := created.header.Get("Location")
	waited := callAt(t, addr, http.MethodGet, location, prefer("wait=10"), "")
	require.Equal(t, "wait=10", waited.header.Get("Preference-Applied"))
	require.Contains(t, waited.body, "Completed")
	drained(t, r.url(leader))
	for _, path := range []string{location, location + "?view=full", "/orders?limit=1", "/metrics", "/orders?limit=0", "/orders/none", "/openapi.json", "/"} {
		own, passed := callAt(t, r.all[leader].addr, http.MethodGet, path, nil, ""), callAt(t, addr, http.MethodGet, path, nil, "")
		require.Equal(t, own.status, passed.status, path)
		require.Equal(t, own.body, passed.body, path)
		require.Equal(t, own.header.Get("Content-Type"), passed.header.Get("Content-Type"), path)
	}
	require.Equal(t, 1.0, metric(t, r.url(leader), "orderd_leader"))
	require.Equal(t, 0.0, metric(t, r.url(standby), "orderd_leader"))
	require.Equal(t, metric(t, r.url(leader), "orderd_term"), metric(t, r.url(standby), "orderd_term"))
	require.Equal(t, http.StatusOK, r.all[standby].get(t, "/readyz").status)
	for _, path := range []string{"/orders?limit=%zz", "/orders?a;b"} {
		require.Equal(t, http.StatusBadRequest, r.all[standby].get(t, path).status, path)
	}
	expect := keyed("other")
	expect.Set("Expect", "100-continue")
	require.Equal(t, http.StatusUnprocessableEntity, send(t.Context(), addr, http.MethodPost, "/orders", expect, "{}").status)
	require.Equal(t, http.StatusRequestEntityTooLarge, send(t.Context(), addr, http.MethodPost, "/orders", asJSON, strings.Repeat(" ", maxBody+1)).status)
	ofLeader := send(t.Context(), addr, http.MethodGet, "/metrics?of=leader", http.Header{"Accept": {"text/plain"}}, "")
	require.Contains(t, ofLeader.body, "\norderd_leader 1\n")
	hop := send(t.Context(), addr, http.MethodGet, location, http.Header{passHeader: {"guess"}}, "")
	require.Equal(t, http.StatusServiceUnavailable, hop.status, "no request is passed on twice")

	require.NoError(t, r.all[leader].signal("-STOP"))
	began := time.Now()
	hung := send(t.Context(), addr, http.MethodPost, "/orders", asJSON, exampleOrder)
	require.Equal(t, http.StatusServiceUnavailable, hung.status)
	require.Contains(t, hung.body, "outcome-unknown")
	require.Less(t, time.Since(began), 6*time.Second)
	r.leaderAmong(t, leader)
	require.Equal(t, http.StatusOK, r.all[standby].get(t, location).status)
	require.NoError(t, r.all[leader].signal("-CONT"))
	require.Equal(t, 0, r.all[standby].terminate(t, time.Minute))
	r.leaderAmong(t, standby) // the one that stood still
	require.Equal(t, 0, r.all[leader].terminate(t, *patience))
	text := bytesOf(t, filepath.Join(r.dirs[leader], "logs", "orderd.log"))
	require.Contains(t, text, `"client":"127.0.0.1","method":"POST"`, "the leader logs for whom it was asked")
	require.NotContains(t, text, "6.6.6.6")
}

func TestReplicasWaitForTheDatabase(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	c.stop(t, os.Interrupt)
	p := startProcess(t, t.TempDir(), nil, "-orders", c.url(""), "-advertise", "http://127.0.0.1:1")
	require.Equal(t, http.StatusOK, p.get(t, "/livez").status)
	require.Equal(t, http.StatusServiceUnavailable, p.get(t, "/readyz").status)
	began := time.Now()
	post := func() answer { return send(t.Context(), p.addr, http.MethodPost, "/orders", asJSON, exampleOrder) }
	got := post()
	require.Equal(t, http.StatusServiceUnavailable, got.status)
	require.Contains(t, got.body, "not taken")
	require.Less(t, time.Since(began), time.Second)
	c.start(t)
	until(t, func() bool { return post().status == http.StatusCreated }, "it goes on by itself")
	require.Equal(t, 0, p.terminate(t, *patience))
}

// serveTransactions is the same service in its simplest form, with a transaction for each operation.
func serveTransactions() {
	ctx := context.Background()
	db, err := pgxpool.New(ctx, os.Getenv("TEST_TRANSACTIONS"))
	if err == nil {
		_, err = db.Exec(ctx, "CREATE TABLE simple (id text PRIMARY KEY, user_id text, item_ids text, amount numeric, status smallint)")
	}
	if err != nil {
		panic(err)
	}
	created := make(chan string, 1_000_000)
	for range 8 {
		go func() {
			for id := range created {
				for _, st := range []status{processing, completed} {
					if _, err := db.Exec(ctx, "UPDATE simple SET status = $2 WHERE id = $1", id, int16(st)); err != nil {
						panic(err)
					}
				}
			}
		}()
	}
	e := echo.New()
	e.POST("/orders", func(c echo.Context) error {
		var order struct {
			UserID      string      `json:"user_id"`
			ItemIDs     string      `json:"item_ids"`
			TotalAmount json.Number `json:"total_amount"`
		}
		if err := c.Bind(&order); err != nil {
			return err
		}
		id := ulid.Make().String()
		if _, err := db.Exec(c.Request().Context(), "INSERT INTO simple VALUES ($1, $2, $3, $4::text::numeric, 0)", id, order.UserID, order.ItemIDs, order.TotalAmount.String()); err != nil {
			return err
		}
		created <- id
		return c.JSON(http.StatusCreated, map[string]string{"message": "Order created", "order_id": id})
	})
	serveEcho(e)
}

// BenchmarkPostgres has server, replicas and clients on one machine.
func BenchmarkPostgres(b *testing.B) {
	c := newCluster(b)
	r := startReplicas(b, c.url(""), 2, "-delay", "0s", "-workers", "8")
	leader := r.leader(b)
	// driven counts the orders by the time until the last is Completed.
	driven := func(addr string, await func()) load {
		began := time.Now()
		l := hammer(b, addr, 256, http.StatusCreated, examplePost)
		await()
		l.rate = float64(l.count) / time.Since(began).Seconds()
		return l
	}
	byLeader := func() load { return driven(r.all[leader].addr, func() { drained(b, r.url(leader)) }) }
	b.Run("create-of-transactions", func(b *testing.B) {
		c.exec(b, "CREATE DATABASE simple")
		url := strings.Replace(c.url(""), "/postgres", "/simple", 1)
		simple := startProcess(b, b.TempDir(), []string{childMode + "=transactions", "TEST_TRANSACTIONS=" + url + "pool_max_conns=16"})
		conn, err := pgx.Connect(b.Context(), url)
		require.NoError(b, err)
		b.Cleanup(func() { conn.Close(context.Background()) })
		compare(b, func() load {
			return driven(simple.addr, func() {
				until(b, func() bool {
					var left bool
					require.NoError(b, conn.QueryRow(b.Context(), "SELECT EXISTS (SELECT FROM simple WHERE status < 2)").Scan(&left))
					return !left
				}, "all are completed")
			})
		}, byLeader)
	})
	floor := startFloor(b)
	b.Run("create", func(b *testing.B) { compare(b, posts(b, floor, 256, examplePost), byLeader) })
	get := getRequest(completedOrder(b, r.all[leader]))
	fromLeader := gets(b, r.all[leader], 64, get)
	b.Run("read", func(b *testing.B) { compare(b, gets(b, floor, 64, get), fromLeader) })
	b.Run("read-by-standby-of-leader", func(b *testing.B) { compare(b, fromLeader, gets(b, r.all[1-leader], 64, get)) })
	if !testing.Short() {
		b.Run("create-with-5,000,000-of-none", func(b *testing.B) {
			full := newCluster(b)
			leadOn(b, sampleReplica(b, full.url(""))).close()
			full.exec(b, `INSERT INTO orders SELECT ((1700000000000 + i / 50) << 16) + i % 50, (random() * 1e18)::bigint, 9999, 1700000000000 + i / 50, 2000000, 2, 'user' || i % 1000, 'item1,item2'
			FROM generate_series(0, 4999999) i`,
				`UPDATE leader SET accepted = 5000000, completed = 5000000, took = 5000000 * 2000000::bigint, newest = (SELECT max(id_high) FROM orders), newest_started = (SELECT max(id_high) FROM orders)`,
				"CHECKPOINT")
			large := startReplicas(b, full.url(""), 1, "-delay", "0s", "-workers", "8")
			compare(b, byLeader, func() load { return driven(large.all[0].addr, func() { drained(b, large.url(0)) }) })
		})
	}
	b.Run("gap", func(b *testing.B) {
		b.ReportMetric(r.gap(b, func(p *process) { p.kill() }).Seconds(), "s-killed")
		b.ReportMetric(r.gap(b, func(p *process) { require.Equal(b, 0, p.terminate(b, time.Minute)) }).Seconds(), "s-terminated")
		b.ReportMetric(0, "ns/op")
	})
}

// gap ends the leader, and starts it again, while a client of the other replica
// places orders. It returns the longest time without one.
func (r *replicas) gap(tb testing.TB, end func(*process)) (longest time.Duration) {
	tb.Helper()
	leader := r.leader(tb)
	other := r.all[1-leader]
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for last := time.Now(); ; time.Sleep(5 * time.Millisecond) {
			select {
			case <-quit:
				return
			default:
			}
			if send(tb.Context(), other.addr, http.MethodPost, "/orders", asJSON, exampleOrder).status == http.StatusCreated {
				longest, last = max(longest, time.Since(last)), time.Now()
			}
		}
	}()
	<-time.After(time.Second)
	end(r.all[leader])
	r.leaderAmong(tb, leader)
	<-time.After(time.Second)
	close(quit)
	<-done
	r.start(tb, leader)
	return longest
}
