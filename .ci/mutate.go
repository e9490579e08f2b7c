//go:build ignore

// Mutate breaks one line of the service at a time and sees whether the tests
// that could notice do.
//
//	go run .ci/mutate.go           all of it: half an hour on two cores; postgres.go where ORDERD_TEST_POSTGRES is set
//	go run .ci/mutate.go 40 60     the entries from 40 on that come before 60
//	go run .ci/mutate.go worker    the entries of worker.go
//	go run .ci/mutate.go check     none: only whether each fits its file and compiles
//
// It works on copies, and needs nothing but Go; what the tests need besides
// (strace) they say where they are skipped. It ends with 1 where a mutation
// survives. An entry that no longer fits its file is an error: mend it; a step of
// the gate looks for those.
package main

import (
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

type mutation struct {
	file, old, new string
	tests          string // as for go test -run
}

// Tried and left out, since nobody could see a difference but in speed, or in
// what only another fault shows:
//
//   - store.go, gather: without the loop, batches are smaller, not different.
//   - store.go, userIndex: the bounds indexEvery, runOrders and retryBehind, and what
//     counts orders against them, change when the index is written. Lists are
//     right at any time, since what is not indexed is looked for in the table.
//   - store.go, searchUserIndex: OFFSET @runs in place of @runs - 1 ends a page one run
//     later.
//   - metrics.go, write: without its first check, the same sums are written again.
//   - log.go, logFlushAt: a fuller buffer is written a fifth of a second later.
//   - worker.go, troubleExtra: without it, which of two orders the endpoint sees first
//     after its trouble is left to the clock.
//   - store.go, isExpired: status > 0 in place of = 2 is the same, since an order
//     at work has no time that it took.
//   - store.go, searchUserIndex: run >= oldest in place of > ends some lists with an
//     empty page.
//   - store.go, makeNew: SQLite itself syncs the directory once more, before the
//     first commit is durable, when it makes the -wal.
//   - store.go, finished: without it, busySince is still never older than the tick of
//     an idle writer, half a second.
//   - store.go, retryCopy: handing on the waiters' own creates is a data race, which
//     only -race sees.
var mutations = []mutation{
	{"log.go", `if len(b.buffer)+len(line) > logBuffer {`, `if len(b.buffer)+len(line) > 2*logBuffer {`, "TestLogBufferFull"},
	{"log.go", `b.dropped.Add(1)`, `b.dropped.Add(2)`, "TestLogBufferFull"},
	{"log.go", `bytes.Count(full[n:], []byte("\n"))`, `bytes.Count(full[n-n:], []byte("\n"))`, "TestLogCountsOnlyTheLinesNotWritten"},
	{"log.go", `if !b.failing {`, `if true {`, "TestLogOnAFailingDisk"},
	{"log.go", `b.failing = err != nil`, `b.failing = b.failing || err != nil`, "TestLogOnAFailingDisk"},
	{"log.go", `MaxAge: o.days`, `MaxAge: 0`, "TestOldLogsAreRemoved"},
	{"log.go", `MaxBackups: o.backups`, `MaxBackups: 0`, "TestLogRotation"},
	{"log.go", `Compress: true`, `Compress: false`, "TestLogRotation"},
	{"log.go", `if os.SameFile(found, f.current) {`, `if f.current != nil {`, "TestLogFileMoved"},
	{"log.go", `!found.Mode().IsRegular()`, `found.Mode().IsDir()`, "TestLogRefuses"},
	{"log.go", `strings.EqualFold(filepath.Base(path), filepath.Base(other))`, `filepath.Base(path) == filepath.Base(other)`, "TestLogRefuses"},
	{"log.go", `if len(old) > 0 {`, `if len(old) > 1 {`, "TestLogStaysLocked"},
	{"log.go", `journal_mode = MEMORY; BEGIN EXCLUSIVE`, `journal_mode = MEMORY; BEGIN`, "TestLogHasOneWriter"},
	{"log.go", `os.MkdirAll(filepath.Dir(path), 0o700)`, `os.MkdirAll(filepath.Dir(path), 0o755)`, "TestEndToEnd"},
	{"log.go", `len(abs) > longestPath`, `len(abs) > 2*longestPath`, "TestStartIsRefused"},
	{"log.go", `case <-time.After(lastWordsTimeout):`, `case <-time.After(60 * lastWordsTimeout):`, "TestStderrThatNobodyReads"},

	{"cache.go", `if ok = ok && e.second == second; ok {`, `if ok = ok || e.second == second; ok {`, "TestCacheStatus"},
	{"cache.go", `s = max(s, old.status)`, `s = max(s, old.status&0)`, "TestCacheStatus"},
	{"cache.go", `if s.final() && seq >= c.lastRemoval {`, `if s.final() {`, "TestCacheStatus"},
	{"cache.go", `if s.final() && seq >= c.lastRemoval {`, `if seq >= c.lastRemoval {`, "TestCacheStatus"},
	{"cache.go", `c.lastRemoval = seq`, `c.lastRemoval = 0`, "TestCacheStatus"},
	{"cache.go", `c.next = (c.next + 1) % cap(c.ring)`, `c.next = (c.next + 2) % cap(c.ring)`, "TestCacheBound"},
	{"cache.go", `if w.waiting == 0 && c.watchers[id] == w {`, `if w.waiting == 0 {`, "TestCacheWatch"},
	{"cache.go", `if w.waiting == 0 && c.watchers[id] == w {`, `if c.watchers[id] == w {`, "TestCacheWatch"},
	{"cache.go", `w != nil && ch.to.final()`, `w != nil`, "TestCacheWatch"},
	{"cache.go", `c.hits.Add(1)`, `c.misses.Add(1)`, "TestMetricsText"},

	{"store.go", `NewBackup(copyURI.String())`, `NewBackup(copyURI.Path)`, "TestBackupOfAStopped"},
	{"store.go", `earlier.itemIDs == c.itemIDs && earlier.cents`, `earlier.cents`, "TestIdempotencyKey"},
	{"store.go", `&& earlier.cents == c.cents`, ``, "TestIdempotencyKey"},
	{"store.go", `t.newest = max(t.newest, high(c.id))`, `t.newest = max(t.newest, 0*high(c.id))`, "TestOrdersAgainstAModel"},
	{"store.go", `t.newestStarted = max(t.newestStarted, high(st.id))`, `t.newestStarted = high(st.id)`, "TestOnlyTheLastStep|TestListsOfAUser"},
	{"store.go", `t.sumTook += st.tookMicros`, `t.sumTook++`, "TestAverageIsOver"},
	{"store.go", `t.removed += int64(len(b.removed))`, `t.removed++`, "TestCompletedOrdersAreRemoved"},
	{"store.go", `c.pending == t.pending() && c.processing == t.processing && `, `c.pending == t.pending() && `, "TestTotalsAreMended"},
	{"store.go", `if err != nil && c.key != "" {`, `if err != nil && len(c.key) > 255 {`, "TestAFailedWrite"},
	{"store.go", `case errors.Is(err, errInDoubt): // the`, `case errors.Is(err, errClosed): // the`, "TestWhatIsInDoubt"},
	{"store.go", `return p, cmp.Or(s.await(seq), s.engine.current(), err)`, `return p, cmp.Or(s.await(0*seq), s.engine.current(), err)`, "TestAReadIsHeld"},
	{"store.go", `return o, cmp.Or(s.await(seq), s.engine.current(), err)`, `return o, cmp.Or(s.await(0*seq), s.engine.current(), err)`, "TestAReadIsHeld"},
	{"store.go", `s.cache.learn(id, o.status, seq)`, `s.cache.len()`, "TestMetricsText"},
	{"store.go", `return max(0, time.UnixMilli(s.publishedTotals().newest>>16)`, `return min(0, time.UnixMilli(s.publishedTotals().newest>>16)`, "TestMetricsText"},
	{"store.go", `st.from = b.steps[i].from`, `st.from = max(st.from, b.steps[i].from)`, "TestOnlyTheLastStep"},
	{"store.go", `in.open.bytes += len(c.userID) + len(c.itemIDs) + len(c.key)`, `in.open.bytes += len(c.userID) + len(c.key)`, "TestTheOpenBatchIsBounded"},
	{"store.go", `if len(in.open.steps) == maxSteps {`, `if len(in.open.steps) == 2*maxSteps {`, "TestTheOpenBatchIsBounded"},
	{"store.go", `case len(in.open.creates) >= maxCreates ||`, `case len(in.open.creates) >= 2*maxCreates ||`, "TestOverload"},
	{"store.go", `time.Since(in.busySince) > stalledAfter`, `time.Since(in.busySince) > 2*stalledAfter`, "TestReadyTells"},
	{"store.go", `waiting.release(err)`, `waiting.err = err`, "TestAFailedWrite"},
	{"store.go", `in.open = newBatch(waiting.steps)`, `in.open = newBatch(nil)`, "TestAFailedWrite"},
	{"store.go", `in.closed = true`, `in.closed = false`, "TestCloseLoses"},
	{"store.go", `case <-time.After(maxStepDelay):`, `case <-time.After(100 * maxStepDelay):`, "TestTimesOfAConnection"},
	{"store.go", `if b.changes() > 0 || b.expiry != nil {`, `if b.changes() >= 0 || b.expiry != nil {`, "TestABacklogThatCannot"},
	{"store.go", `if err != nil { // the removal may not fit on the disk`, `if false { // it may be too much for the disk: others come first`, "TestRetentionWaits"},
	{"store.go", `b.release(errForWaiting(err))`, `b.release(errUnwritable)`, "TestWhatIsInDoubt"},
	{"store.go", `if w.intake.accept() {`, `if w.intake.refusing == nil {`, "TestAFailedWrite"},
	{"store.go", `if errors.Is(err, errOutcomeUnknown) || errors.Is(err, errInDoubt) {`, `if errors.Is(err, errInDoubt) {`, "TestWhatIsInDoubt"},
	{"store.go", `if errForWaiting(err) == errOutcomeUnknown {`, `if errForWaiting(err) == errClosed {`, "TestWhatIsInDoubt"},
	{"store.go", `w.lastID = max(w.lastID+1, ms<<16)`, `w.lastID = max(w.lastID, ms<<16)`, "TestIDsIncrease"},
	{"store.go", `s.writer.lastID, s.writer.onCommit = t.newest, onCommit`, `s.writer.lastID, s.writer.onCommit = 0, onCommit`, "TestIDsIncrease"},
	{"store.go", `w.cache.forget(b.removed, b.totals.seq)`, `w.cache.forget(nil, b.totals.seq)`, "TestCompletedOrdersAreRemoved"},
	{"store.go", `case <-time.After(retryPause):`, `case <-time.After(retryPause / 100):`, "TestAFailedWrite"},
	{"store.go", `next = newBatch(next.steps)`, `next = newBatch(nil)`, "TestAFailedWrite"},
	{"store.go", `sweepPause        = time.Minute`, `sweepPause        = time.Hour`, "TestOrdersAreKept"},
	{"store.go", `jump > clockJump && !r.warned`, `jump > clockJump`, "TestAJumpOfTheClock"},
	{"store.go", `r.warned = jump > clockJump; r.warned`, `r.warned = jump > 2*clockJump; r.warned`, "TestAJumpOfTheClock"},
	{"store.go", `before: r.now().Add(-r.keep).UnixMilli()`, `before: r.now().Add(-r.keep / 2).UnixMilli()`, "TestOrdersAreKept"},
	{"store.go", `isExpired     = expiredBefore + "@before"`, `isExpired     = "status = 2 AND started < @before"`, "TestOrdersAreKept"},
	{"store.go", `if changed != 1 {`, `if changed > 1 {`, "TestASecondWriter"},
	{"store.go", `if errors.Is(err, errNotRemoved) {`, `if errors.Is(err, errClosed) {`, "TestRetentionStopsNoOrder"},
	{"store.go", `err = e.transaction(b, e.insertEach)`, `err = e.transaction(b, e.insertTogether)`, "TestAnOrderThatTheTable"},
	{"store.go", `more && time.Since(began) < expiryTime`, `more && time.Since(began) < 1000*expiryTime`, "TestFreedPages"},
	{"store.go", `if earlier.id != c.id {`, `if !earlier.id.IsZero() {`, "TestBatchesOfEverySize"},
	{"store.go", `if st.to.final() {`, `if !st.id.IsZero() {`, "TestStepsAreTaken"},
	{"store.go", `st.void = changed != 1`, `st.void = changed > 1`, "TestStepsAreTaken"},
	{"store.go", `case sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE:`, `case sqlite3.SQLITE_FULL:`, "TestDiskFaults/a_write_once"},
	{"store.go", `case sqlite3.SQLITE_IOERR_SHMSIZE:`, `case sqlite3.SQLITE_IOERR_SHMMAP:`, "TestWALIndex"},
	{"store.go", `sqliteCode(err) == sqlite3.SQLITE_IOERR_FSYNC {
		return e.last, e.unknown(err)`, `sqliteCode(err) == sqlite3.SQLITE_IOERR_READ {
		return e.last, e.unknown(err)`, "TestDiskFaults/the_fsync_of_a_checkpoint"},
	{"store.go", `cmp.Or(e.handsOff, e.file.checkInPlace())`, `cmp.Or(e.handsOff)`, "TestFilesRemoved"},
	{"store.go", `e.users.keepState()`, `_ = e.users`, "TestListsOfAUser|TestTheUserIndex"},
	{"store.go", `c.written < walCheckEvery`, `c.written < 1000*walCheckEvery`, "TestListsDoNotHold"},
	{"store.go", `if wal.pages > truncateAbovePages {`, `if wal.pages > 100*truncateAbovePages {`, "TestReader"},
	{"store.go", `c.file.setBusyTimeout(readerPause)`, `c.file.setBusyTimeout(busyTimeout)`, "TestACheckpointWaits"},
	{"store.go", `c.file.setBusyTimeout(busyTimeout)`, `c.file.setBusyTimeout(readerPause)`, "TestACheckpointWaits"},
	{"store.go", `wal.moved == c.pagesMoved`, `wal.moved < c.pagesMoved`, "TestACheckpointWaits"},
	{"store.go", `if err != nil || wal.busy || !wal.complete() {`, `if err != nil || wal.busy && wal.moved < 0 {`, "TestReader|TestACheckpointWaits"},
	{"store.go", `len(open) < connections;`, `len(open) < 1;`, "TestDatabasesAreDurable"},
	{"store.go", `func(o order) bool { return o.id == id }`, `func(o order) bool { return true }`, "TestGetOrder"},
	{"store.go", `l.filter.limit+1-len(l.orders)`, `l.filter.limit-len(l.orders)`, "TestListPages"},
	{"store.go", `max(oldest, b.newestIndexed+1), before)`, `max(oldest, b.newestIndexed), before)`, "TestListsOfAUser"},
	{"store.go", `oldest, min(before, b.newestIndexed+1))`, `oldest, min(before, b.newestIndexed))`, "TestListsOfAUser"},
	{"store.go", `before = min(before, b.newestStarted+1)`, `before = min(before, b.newestStarted)`, "TestListPages"},
	{"store.go", `oldest = b.oldestPending`, `oldest = b.oldestPending + 1`, "TestListPages"},
	{"store.go", `p.next = p.orders[len(p.orders)-1].id`, `p.next = p.orders[0].id`, "TestListPages"},
	{"store.go", `readBytes       = 256 << 10`, `readBytes       = 2560 << 10`, "TestListPagesEnd"},
	{"store.go", `if noWAL && info.Size()%pageSize != 0 {`, `if noWAL && info.Size()%pageSize == 1 {`, "TestStartIsRefused"},
	{"store.go", `if err != nil && sqliteCode(err) == 0 { // no row`, `if false { // no row`, "TestStartIsRefused"},
	{"store.go", `if err := syncFile(d.path + "-wal"); err != nil {`, `if err := syncFile(d.path); err != nil {`, "TestStartSyncs"},
	{"store.go", `PRAGMA synchronous = FULL; PRAGMA fullfsync = 1;`, `PRAGMA synchronous = FULL;`, "TestDatabasesAreDurable"},
	{"store.go", `PRAGMA wal_checkpoint(PASSIVE);", d`, `", d`, "TestStartSyncs"},
	{"store.go", `	syncDirectory(filepath.Dir(dir))`, `	_ = syncDirectory`, "TestAFirstStart"},
	{"store.go", `if time.Since(d.checked) < lookEvery {`, `if time.Since(d.checked) < time.Hour {`, "TestFilesTaken"},

	{"metrics.go", `lost := c.accepted > t.accepted || c.completed > t.completed`, `lost := c.accepted > t.accepted`, "TestStartIsRefused"},
	{"metrics.go", `lost := c.accepted > t.accepted || c.completed > t.completed`, `lost := c.completed > t.completed`, "TestStartIsRefused"},
	{"metrics.go", `lost = c.identity == t.identity && c.seq > t.seq`, `lost = c.identity == t.identity && c.seq > t.seq+1`, "TestStartIsRefused"},
	{"metrics.go", `if c.accepted > 0 && c.identity != t.identity {`, `if c.accepted > 1000 && c.identity != t.identity {`, "TestStartIsRefused"},
	{"metrics.go", `pause = retryPause`, `pause = projectEvery`, "TestMetricsThatCannot"},
	{"metrics.go", `			nudge(m.changed)
			pause`, `			pause`, "TestMetricsThatCannot"},
	{"metrics.go", `h.counts[sort.SearchFloat64s(h.bounds, v)]++`, `h.counts[min(sort.SearchFloat64s(h.bounds, v)+1, len(h.bounds)-1)]++`, "TestHistogram"},
	{"metrics.go", `OrdersCompleted:      t.completed - t.removed,`, `OrdersCompleted:      t.completed,`, "TestCompletedOrdersAreRemoved"},
	{"metrics.go", `float64(counted.completed) / 1e6`, `float64(counted.completed) / 1e3`, "TestAverageIsOver"},
	{"metrics.go", `m.commitTimes.observe(r.duration.Seconds())`, `m.commitTimes.observe(0 * r.duration.Seconds())`, "TestMetricsText"},
	{"metrics.go", `m.commitSizes.observe(float64(r.creates + r.steps))`, `m.commitSizes.observe(float64(r.creates))`, "TestMetricsText"},
	{"metrics.go", `0.01}, // utime`, `0.1}, // utime`, "TestProcessFigures"},

	{"worker.go", `sleep(p.stopping, retryPause)`, `sleep(p.stopping, retryPause/100)`, "TestABacklogThatCannot"},
	{"worker.go", `for p.parked.len() >= maxParked {`, `for p.parked.len() >= 2*maxParked {`, "TestParkedOrdersAreBounded"},
	{"worker.go", `p.failed.Add(1)`, `p.failed.Add(2)`, "TestAnswersOfTheEndpoint"},
	{"worker.go", `case p.workCtx.Err() != nil:`, `case false:`, "TestAnAttemptThatTheStop"},
	{"worker.go", `int(j.attempts)+1)`, `int(j.attempts))`, "TestAnswersOfTheEndpoint"},
	{"worker.go", `firstRetry<<min(failures-1, 16)`, `firstRetry<<min(failures-1, 3)`, "TestPausesBetween"},
	{"worker.go", `maxOrderPause = time.Minute `, `maxOrderPause = 2 * time.Minute `, "TestPausesBetween"},
	{"worker.go", `maxPoolPause  = 5 * time.Second `, `maxPoolPause = 6 * time.Second `, "TestPausesOf"},
	{"worker.go", `if err == nil || errors.As(err, new(*refusal)) {`, `if err == nil {`, "TestTheEndpointsTrouble"},
	{"worker.go", `t = &trouble{error: err, since: time.Now()}`, `return`, "TestTheEndpointsTrouble"},
	{"worker.go", `time.AfterFunc(trialLimit, endTrouble)`, `time.AfterFunc(20*trialLimit, endTrouble)`, "TestASlowTrialHoldsNobody"},
	{"worker.go", `if time.Since(lastWarned) >= time.Minute {`, `if time.Since(lastWarned) >= time.Hour {`, "TestTheEndpointsTrouble"},
	{"worker.go", `	p.cutOff()`, `	_ = p.cutOff`, "TestDrain"},
	{"worker.go", `case <-time.After(time.Until(deadline)):`, `case <-time.After(time.Hour + time.Until(deadline)):`, "TestDrain"},
	{"worker.go", `j.due = p.tickAt(due) + 1 // rounded up`, `j.due = p.tickAt(due) // not before`, "TestParkedOrdersReturn"},
	{"worker.go", `h.chunks = h.chunks[:last]`, `_ = h.chunks[:last]`, "TestParkedOrdersReturn"},
	{"worker.go", `return h.at(k).due.sub(h.at(i).due) > 0`, `return h.at(k).due > h.at(i).due`, "TestParkedOrdersReturn"},
	{"worker.go", `if f.lines == linesASecond {`, `if f.lines == 10*linesASecond {`, "TestFailuresFillNoLog"},
	{"worker.go", `f.leftOut = 0`, `f.leftOut = f.leftOut + 0`, "TestFailuresFillNoLog"},
	{"worker.go", `code >= 200 && code <= 299`, `code >= 200 && code <= 399`, "TestAnswersOfTheEndpoint"},
	{"worker.go", `case http.StatusTooManyRequests, http.StatusBadGateway,`, `case http.StatusBadGateway,`, "TestAnswersOfTheEndpoint"},
	{"worker.go", `return http.ErrUseLastResponse`, `return nil`, "TestAnswersOfTheEndpoint"},
	{"worker.go", `r.GetBody = nil`, `_ = r.GetBody`, "TestOnlyThePool"},
	{"worker.go", `io.LimitReader(answer.Body, maxAnswer)`, `io.LimitReader(answer.Body, 0)`, "TestConnectionsToTheEndpoint"},
	{"worker.go", `time.AfterFunc(maxAnswerTime, cancel)`, `time.AfterFunc(25*maxAnswerTime, cancel)`, "TestAnswersOfTheEndpoint"},
	{"worker.go", `case err != nil && connected.Load() && ctx.Err() != nil:`, `case err != nil && connected.Load() && ctx == nil:`, "TestATimeOut"},
	{"worker.go", `r.Header.Set("Authorization", "Bearer "+e.token)`, `r.Header.Set("Authorization", e.token)`, "TestTheEndpointGets"},

	{"server.go", `ReadHeaderTimeout: 10 * time.Second`, `ReadHeaderTimeout: 20 * time.Second`, "TestTimesOfAConnection"},
	{"server.go", `ReadTimeout:       30 * time.Second`, `ReadTimeout:       40 * time.Second`, "TestTimesOfAConnection"},
	{"server.go", `maxWait + 30*time.Second`, `maxWait - 30*time.Second`, "TestTimesOfAConnection"},
	{"server.go", `IdleTimeout:       2 * time.Minute`, `IdleTimeout:       time.Minute`, "TestTimesOfAConnection"},
	{"server.go", `MaxHeaderBytes:    maxHeader - 4096`, `MaxHeaderBytes:    maxHeader / 2`, "TestAbuse"},
	{"server.go", `MaxHeaderBytes:    maxHeader - 4096`, `MaxHeaderBytes:    2 * maxHeader`, "TestAbuse"},
	{"server.go", `if errors.Is(err, os.ErrDeadlineExceeded) {`, `if errors.Is(err, os.ErrClosed) {`, "TestTimesOfAConnection"},
	{"server.go", `case !mayPlace && !slices.Contains(readMethods, c.Request().Method):`, `case !mayPlace && c.Request().Method == "BREW":`, "TestToken"},
	{"server.go", `s.readToken != "" && subtle`, `subtle`, "TestToken"},
	{"server.go", `!strings.EqualFold(scheme, "Bearer")`, `scheme != "Bearer"`, "TestToken"},
	{"server.go", `== "cross-site"`, `== "cross"`, "TestPagesOfOtherSites"},
	{"server.go", `len(key) > maxKey`, `len(key) >= maxKey`, "TestIdempotencyKey"},
	{"server.go", `bytes.Count(object, []byte(":")) == different`, `bytes.Count(object, []byte(":")) >= different`, "TestCreateRefusesFields"},
	{"server.go", `len(c.userID) > maxUserID)`, `len(c.userID) > maxUserID+1)`, "TestCreateRefusesFields"},
	{"server.go", `bad("must be at most %d items, not %d", maxItems, len(items))`, `bad("must be at most %d items, not %d", len(items), maxItems)`, "TestCreateRefusesFields"},
	{"server.go", `but item %d is empty", i+1)`, `but item %d is empty", i)`, "TestCreateRefusesFields"},
	{"server.go", `case zeros < 0:`, `case zeros < -1:`, "TestCreateRefusesFields"},
	{"server.go", `err != nil || cents > maxCents {`, `err != nil || cents > maxCents+1 {`, "TestCreateRefusesFields"},
	{"server.go", `	s.forwarder.stop()
`, ``, "TestWithoutALeader"},
	{"server.go", `if r.Close && r.ContentLength <= maxRefused`, `if false && r.ContentLength <= maxRefused`, "TestRefusedBodies"},
	{"server.go", `slog.Int64("us", took.Microseconds())`, `slog.Int64("us", took.Milliseconds())`, "TestTimesOfAConnection"},
	{"server.go", `slog.Int64("bytes", response.Size)`, `slog.Int64("bytes", 0*response.Size)`, "TestRequestLog"},
	{"server.go", `line := slog.NewRecord(began,`, `line := slog.NewRecord(time.Now(),`, "TestTimesOfAConnection"},
	{"server.go", `r.latency != nil && response.Header()["Preference-Applied"] == nil`, `r.latency != nil`, "TestMetricsText"},
	{"server.go", `header.Set(echo.HeaderRetryAfter, "1")`, `header.Set(echo.HeaderRetryAfter, "10")`, "TestWithoutALeader"},
	{"server.go", `quality("text/plain", "text/*", "*/*") > quality`, `quality("text/plain", "text/*", "*/*") >= quality`, "TestMetricsNegotiation"},
	{"server.go", `float64(len(l.pool.channel))`, `float64(0 * len(l.pool.channel))`, "TestMetricsText"},
	{"server.go", `float64(l.pool.parked.len())`, `float64(0 * l.pool.parked.len())`, "TestMetricsText"},
	{"server.go", `float64(s.log.dropped.Load())`, `float64(0 * s.log.dropped.Load())`, "TestMetricsText"},
	{"server.go", `return max(0, time.Since(time.UnixMilli(first>>16)).Seconds())`, `return 0 * time.Since(time.UnixMilli(first>>16)).Seconds()`, "TestMetricsText"},
	{"server.go", `defer context.AfterFunc(l.pool.stopping, cancel)()`, `defer cancel()`, "TestAnswersWhile"},
	{"server.go", `ok && l.pool.stopping.Err() == nil {`, `ok {`, "TestAnswersWhile"},
	{"server.go", `last[strings.LastIndexByte(last, ',')+1:]`, `last[strings.IndexByte(last, ',')+1:]`, "TestClientInTheRequestLog"},
	{"server.go", `failure != c.lastError {`, `failure != "" {`, "TestHTTPS"},
	{"server.go", `query.Set("before", found.next.String())`, `query = url.Values{"before": {found.next.String()}}`, "TestListPages"},

	{"main.go", `err = errors.Join(err, a.metrics.close())`, `err = errors.Join(err)`, "TestEndToEnd"},
	{"main.go", `case <-time.After(lastWordsTimeout): // nobody reads stderr`, `case <-time.After(time.Hour): // nobody reads stderr`, "TestExitWhereNobody"},
	{"main.go", `return 2
`, `return 1
`, "TestWrongArguments"},
	{"main.go", `if len(a.cfg.unknown) > 0 {`, `if len(a.cfg.unknown) > 9 {`, "TestUnknownVariables"},
	{"main.go", `if a.cfg.server.token == "" && !a.loopbackOnly() {`, `if a.cfg.server.token == "" {`, "TestOpenDoor"},
	{"main.go", `if a.cfg.server.token == "" && !a.loopbackOnly() {`, `if !a.loopbackOnly() {`, "TestOpenDoor"},
	{"main.go", `behind > time.Minute {`, `behind > 100*time.Hour {`, "TestAClockThatWasAhead"},
	{"main.go", `len(entries) > 0 {`, `len(entries) > 9 {`, "TestBackup"},
	{"main.go", `signal.Ignore(syscall.SIGHUP) // a terminal`, `_ = signal.Ignore // a terminal`, "TestSignals/a_terminal"},
	{"main.go", `if r.creates > 0 {`, `if r.creates > 1 {`, "TestGetOrder"},
	{"main.go", `defer os.Remove(c.path + ".part")`, `defer os.Remove(c.path + ".parts")`, "TestBackupOfAStopped"},
	{"main.go", `return r <= ' ' || r > '~' }`, `return r > '~' }`, "TestWrongArguments"},

	{"postgres.go", `later := row.term > r.highestConfirmed.term`, `later := row.term > r.highestConfirmed.term+1`, "TestLossBehind|TestLostCommits"},
	{"postgres.go", `time.Since(changed) < takeOverAfter {`, `time.Since(changed) < 10*takeOverAfter {`, "TestTakeOver"},
	{"postgres.go", `leaseTime      = 2500 *`, `leaseTime      = 25000 *`, "TestTakeOver"},
	{"postgres.go", `fsync != "on" || pages != "on"`, `fsync != "on"`, "TestUnfitServers"},
	{"postgres.go", `case row.totals.seq < left:`, `case row.totals.seq+1 < left:`, "TestAnUnconfirmedCommitIsGone"},
	{"postgres.go", `kept = min(kept, row.since-1)`, `kept = min(kept, row.since)`, "TestLossBehind|TestLostCommits"},
	{"postgres.go", `if s.stored() {`, `if true {`, "TestUnknownOutcomes|TestOriginalAndResend"},
	{"postgres.go", `case half > 0:`, `case half > 1:`, "TestWhatPostgreSQLRefuses"},
	{"postgres.go", `highestConfirmed.seq, p.ended}`, `highestConfirmed.seq, false}`, "TestTakeOver|TestAStandbyPassesOn"},
	{"postgres.go", `case row.totals.seq != before.totals.seq+1:`, `case row.totals.seq < before.totals.seq+1:`, "TestTheFence|TestUnknownOutcomes|TestOriginalAndResend"},
	{"postgres.go", `if e.replica.warned {`, `if false {`, "TestASynchronousStandby|TestUnknownOutcomes"},
	{"postgres.go", `if c.key != "" {
			if keys[c.key] {`, `if c.key == "never" {
			if keys[c.key] {`, "TestCommitOnPostgreSQL"},
	{"postgres.go", `if term != e.term || seq < least {`, `if seq < least {`, "TestTheFence|TestTakeOver"},
}

func main() {
	checkAll()
	if slices.Equal(os.Args[1:], []string{"check"}) {
		return
	}
	chosen := choose(os.Args[1:])
	next := make(chan int)
	var survivors []string
	var mu sync.Mutex
	var workers sync.WaitGroup
	for range 2 {
		workers.Go(func() {
			dir := copyTree()
			defer os.RemoveAll(dir)
			for i := range next {
				m := mutations[i]
				outcome := m.try(dir)
				mu.Lock()
				fmt.Printf("%3d %-8s %s: %s → %s\n", i, outcome, m.file, strings.TrimSpace(m.old), strings.TrimSpace(m.new))
				if outcome == "SURVIVED" {
					survivors = append(survivors, m.file+": "+m.old)
				}
				mu.Unlock()
			}
		})
	}
	for _, i := range chosen {
		next <- i
	}
	close(next)
	workers.Wait()
	fmt.Printf("%d tried, %d survived\n", len(chosen), len(survivors))
	if len(survivors) > 0 {
		os.Exit(1)
	}
}

// checkAll ends the program where an entry does not fit its file, or what it makes
// of it does not compile.
func checkAll() {
	listed, err := exec.Command("go", "list", "-deps", "-export", "-f", "{{.ImportPath}} {{.Export}}", ".").Output()
	must(err)
	exports := map[string]string{}
	for line := range strings.Lines(string(listed)) {
		name, export, _ := strings.Cut(strings.TrimSpace(line), " ")
		exports[name] = export
	}
	fset := token.NewFileSet()
	compiled := importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
	names, err := filepath.Glob("*.go")
	must(err)
	names = slices.DeleteFunc(names, func(name string) bool { return strings.HasSuffix(name, "_test.go") })
	var texts []string
	var files []*ast.File
	for _, name := range names {
		text, err := os.ReadFile(name)
		must(err)
		file, err := parser.ParseFile(fset, name, text, parser.SkipObjectResolution)
		must(err)
		texts, files = append(texts, string(text)), append(files, file)
	}
	fits := func(m mutation) error {
		i := slices.Index(names, m.file)
		if n := strings.Count(texts[i], m.old); n != 1 {
			return fmt.Errorf("it is there %d times", n)
		}
		file, err := parser.ParseFile(fset, m.file, strings.Replace(texts[i], m.old, m.new, 1), parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		mutated := slices.Clone(files)
		mutated[i] = file
		_, err = (&types.Config{Importer: compiled}).Check("orderd", fset, mutated, nil)
		return err
	}
	bad := 0
	for _, m := range mutations {
		if failed := fits(m); failed != nil {
			bad++
			fmt.Printf("%s: %s: %v\n", m.file, m.old, failed)
		}
	}
	if bad > 0 {
		os.Exit(1)
	}
}

func choose(args []string) (chosen []int) {
	first, end, file := 0, len(mutations), ""
	if len(args) == 1 {
		file = args[0]
	}
	if len(args) == 2 {
		first, _ = strconv.Atoi(args[0])
		end, _ = strconv.Atoi(args[1])
	}
	for i := first; i < min(end, len(mutations)); i++ {
		if file == "" || mutations[i].file == file+".go" {
			chosen = append(chosen, i)
		}
	}
	return chosen
}

// copyTree copies the work tree, without what git ignores.
func copyTree() string {
	dir, err := os.MkdirTemp("", "mutate")
	must(err)
	listed, err := exec.Command("git", "ls-files", "-co", "--exclude-standard").Output()
	must(err)
	for _, name := range strings.Fields(string(listed)) {
		text, err := os.ReadFile(name)
		must(err)
		must(os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755))
		must(os.WriteFile(filepath.Join(dir, name), text, 0o644))
	}
	return dir
}

// try breaks the copy, runs the tests, and mends it.
func (m mutation) try(dir string) string {
	path := filepath.Join(dir, m.file)
	text, err := os.ReadFile(path)
	must(err)
	if m.file == "postgres.go" && os.Getenv("ORDERD_TEST_POSTGRES") == "" {
		return "skipped"
	}
	must(os.WriteFile(path, []byte(strings.Replace(string(text), m.old, m.new, 1)), 0o644))
	defer func() { must(os.WriteFile(path, text, 0o644)) }()
	test := exec.Command("go", "test", "-vet=off", "-ldflags=-s", "-gcflags=-l", "-failfast", "-timeout", "100s", "-run", m.tests, ".", "-patience", "10s")
	test.Dir = dir
	out, err := test.CombinedOutput()
	switch {
	case strings.Contains(string(out), "no tests to run"):
		return "SURVIVED"
	case err == nil:
		return "SURVIVED"
	}
	return "seen"
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
