// Orderd is an order service in one binary. It takes orders over HTTP, keeps
// them in SQLite, or for several machines in PostgreSQL, runs each through
// Pending, Processing and Completed on a fixed pool of goroutines, and answers
// "where is my order?" from memory.
//
// An order is answered with 201 only after the commit that holds it has been
// fsynced; from then on no crash loses it, and it completes exactly once in
// the counts. See README.md for the API and the promises.
//
// Each file uses only files below it in this table:
//
//	main.go     flags and config; the wiring, in the order of lifetimes; start and stop
//	server.go   HTTP: routes, handlers, validation, problem documents, the Prometheus page
//	worker.go   feeder, channel, pool, the work
//	metrics.go  metrics.db, its projector, the summary, histogram and exposition types
//	postgres.go the store's engine for more than one machine, and who of them leads
//	store.go    orders: the domain, the store with its writer, the SQLite engine
//	cache.go    status, and the bounded map of statuses
//	log.go      slog over lumberjack; locks on files, the paths that SQLite takes, small helpers
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup makes a program ignore it
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	context.AfterFunc(ctx, func() {
		signal.Ignore(syscall.SIGHUP) // a terminal that closes may send several
		stop()                        // any other second signal ends the process at once
	})
	signal.Ignore(syscall.SIGPIPE) // writing to a closed stderr must not end the process
	os.Exit(report(run(ctx, os.Args[1:], os.Environ(), os.Stdout, os.Stderr), os.Stderr))
}

// loggedError is an error that is on stderr already, as a line of the log.
type loggedError struct{ error }

// report prints err as one sentence and returns the exit code: 2 for a bad flag, 1
// for anything else that stopped the service, 0 for no error.
func report(err error, stderr io.Writer) int {
	switch {
	case err == nil:
		return 0
	case errors.As(err, new(loggedError)):
		return 1
	}
	printed := make(chan struct{})
	go func() {
		fmt.Fprintf(stderr, "orderd: %s\n", strings.ReplaceAll(err.Error(), "\n", "; ")) // errors.Join puts line breaks between errors
		close(printed)
	}()
	select {
	case <-printed:
	case <-time.After(lastWordsTimeout): // nobody reads stderr
	}
	if errors.As(err, new(usageError)) {
		return 2
	}
	return 1
}

// gcPercent returns the value of GOGC. Most of a long-lived heap is the cache, which is
// never garbage, so the heap gets less room for garbage than by Go's default, 100.
// But each collection scans the stacks of all workers: of 50,000 in 0.2 s of CPU. With
// many workers it gets more room, so that collections are rarer.
func gcPercent(workers int) int {
	if workers >= 10_000 {
		return 200
	}
	return 50
}

// run does what the flags say: it prints the help or the version, makes a backup, or
// serves until ctx is done or the store fails.
func run(ctx context.Context, args, environ []string, stdout, stderr io.Writer) error {
	variables := map[string]string{}
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		variables[name] = value
	}
	cfg, err := parseConfig(args, variables)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, help())
		return nil
	case err != nil:
		return err
	case cfg.version:
		fmt.Fprintln(stdout, versionLine())
		return nil
	}
	if cfg.backup != "" {
		return backup(ctx, cfg.data, cfg.backup)
	}
	if _, ok := variables["GOGC"]; !ok {
		debug.SetGCPercent(gcPercent(cfg.pool.workers))
	}
	err = openAndServe(ctx, cfg, stderr)
	if err != nil && cfg.log.file == logToStderr {
		err = loggedError{err}
	}
	return err
}

// openAndServe runs the service, from opening its files to closing them.
func openAndServe(ctx context.Context, cfg config, stderr io.Writer) error {
	a, err := openApp(cfg, stderr)
	if err != nil {
		return err
	}
	if err := a.start(); err != nil {
		return a.abandon(err)
	}
	return a.serve(ctx)
}

// backup copies both databases into a directory that is new or empty. It copies
// metrics.db first, because the copy of orders.db may hold more than metrics.db has
// counted, but never less. The copies get their names once both are on disk.
func backup(ctx context.Context, data, directory string) error {
	if entries, err := os.ReadDir(directory); len(entries) > 0 {
		return fmt.Errorf("%s is not empty: name a new directory for the backup", directory)
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot back up to %s: %w; name a new directory", directory, err)
	}
	if _, err := os.Stat(data); err != nil {
		return fmt.Errorf("cannot read the data directory: %w; name the service's with -data", err)
	}
	engine := newSQLiteEngine(data, nil)
	_, err := engine.readTotals()
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("cannot read the databases: %w; run as the user of the service", err)
	}
	if err != nil {
		return err
	}
	m, err := openMetrics(data, nil)
	if err != nil {
		return err
	}
	copies := []struct {
		file *database
		path string
	}{{m.file, filepath.Join(directory, "metrics.db")}, {engine.file, filepath.Join(directory, "orders.db")}}
	for _, c := range copies {
		if c.file.foundVersion == 0 {
			return fmt.Errorf("there is no %s to back up: name the directory of the service with -data, or start orderd on it again, which makes metrics.db anew", c.file.path)
		}
	}
	if err := makeDirectory(directory); err != nil {
		return fmt.Errorf("cannot make the directory for the backup: %w", err)
	}
	for _, c := range copies {
		defer os.Remove(c.path + ".part") // left by a copy that failed
		if err := c.file.copyTo(ctx, c.path+".part"); err != nil {
			return fmt.Errorf("no backup was made: %w", err)
		}
	}
	for _, c := range copies {
		if err := os.Rename(c.path+".part", c.path); err != nil {
			return fmt.Errorf("cannot name the backup: %w", err)
		}
	}
	syncDirectory(directory)
	return nil
}

// ---- The parts, in the order of their lifetimes. ----

// app is the whole service, its parts in the order of their lifetimes.
type app struct {
	cfg      config
	console  io.Writer // for people at the terminal
	log      *logger
	lock     io.Closer // of the data directory
	metrics  *metrics
	sqlite   *sqliteEngine // keeps the orders; nil with -orders
	replica  *replica      // keeps the orders of several replicas; nil without -orders
	listener net.Listener
	server   *server
	store    *store // nil while another replica leads; so is pool
	pool     *pool
	pass     string // secret in the requests that other replicas pass on; or empty
}

// openApp looks at the databases without changing them yet.
func openApp(cfg config, stderr io.Writer) (*app, error) {
	a := &app{cfg: cfg, console: stderr}
	if cfg.log.file == logToStderr {
		a.console = io.Discard // stderr gets nothing but the log's JSON
	}
	var err error
	if a.log, err = openLog(cfg.logOptions(), stderr); err != nil {
		return nil, err
	}
	if err := a.openFiles(); err != nil {
		return nil, a.abandon(err)
	}
	if a.sqlite != nil {
		a.makeStoreAndPool(a.sqlite)
	}
	return a, nil
}

// openFiles opens what start needs, and compares the two databases before anything
// is written to either.
func (a *app) openFiles() (err error) {
	if a.cfg.certFile != "" {
		if a.cfg.server.certificate, err = openCertificate(a.cfg.certFile, a.cfg.keyFile, a.log); err != nil {
			return err
		}
	}
	if a.lock, err = lockDirectory(a.cfg.data); err != nil {
		return err
	}
	if a.metrics, err = openMetrics(a.cfg.data, a.log); err != nil {
		return err
	}
	if a.cfg.orders == "" {
		engine := newSQLiteEngine(a.cfg.data, a.log)
		held, err := engine.readTotals()
		if err != nil {
			return err
		}
		a.sqlite = engine
		return a.metrics.check(held, engine.file.path)
	}
	if a.replica, err = newReplica(a.cfg.orders, *a.metrics.counted.Load(), a.metrics.noteConfirmed, a.log); err != nil {
		return err
	}
	a.replica.url, err = a.cfg.advertised()
	return err
}

// makeStoreAndPool makes the store on an engine, and the pool on the store.
func (a *app) makeStoreAndPool(e engine) {
	a.store = newStore(e, a.cfg.store, a.log)
	a.pool = newPool(a.cfg.pool, a.store, a.log)
}

// start begins to write, and binds the address without serving it yet. With SQLite
// it also resumes the unfinished orders; with PostgreSQL, lead does that.
func (a *app) start() (err error) {
	// First, because a taken port must leave older files as they are.
	if a.listener, err = listen(a.cfg.addr); err != nil {
		return err
	}
	counted := *a.metrics.counted.Load()
	if a.store != nil {
		if err = a.store.start(a.onCommit); err != nil {
			return err
		}
		counted = a.store.publishedTotals()
	}
	if err = a.metrics.start(counted); err != nil {
		return err
	}
	a.server = newServer(a.serverOptions(), a.metrics, a.log)
	a.announce()
	if a.store != nil {
		a.serveOrders()
	}
	return nil
}

func (a *app) serverOptions() serverOptions {
	o := a.cfg.server
	if a.loopbackOnly() {
		host, _, _ := net.SplitHostPort(a.cfg.addr)
		o.ownHosts = append([]string{"localhost", "127.0.0.1", "::1", strings.ToLower(host)}, o.proxyHosts...)
	}
	if a.replica != nil {
		o.gauges = a.replica.gauges
	} else {
		o.gauges = a.sqlite.gauges
	}
	return o
}

// serveOrders starts the pool, and lets the server answer requests about orders.
func (a *app) serveOrders() {
	a.pool.start()
	a.server.local.Store(&localOrders{a.store, a.pool, a.pass})
	if behind := a.store.clockBehind(); behind > time.Minute {
		a.warn(fmt.Sprintf("the clock was once %s ahead of now: new orders are stamped with that time until it has passed", behind.Round(time.Second)))
	}
}

// onCommit passes a commit on to the metrics, and wakes the feeder if it has new orders.
func (a *app) onCommit(r commitReport) {
	a.metrics.noteCommit(r)
	if r.creates > 0 {
		nudge(a.pool.wake)
	}
}

// serve answers requests until ctx is done or the orders cannot be kept any
// longer, and then closes everything in the reverse order.
func (a *app) serve(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() {
		served <- a.server.serve(a.listener)
		stop()
	}()
	err := a.untilStopped(ctx)
	select {
	case acceptErr := <-served:
		err = errors.Join(err, fmt.Errorf("cannot accept connections any more: %w", acceptErr))
	default:
	}
	return a.close(err)
}

// untilStopped returns when ctx is done, or when the orders cannot be kept any
// longer. The reason for that is its error with PostgreSQL, and close's with SQLite.
func (a *app) untilStopped(ctx context.Context) error {
	if a.replica != nil {
		return a.takeTurns(ctx)
	}
	select {
	case <-ctx.Done():
	case <-a.store.failed(): // close tells why
	}
	return nil
}

// takeTurns stands by, leads, and once deposed stands by again, until ctx is done or
// the database cannot be used any longer.
func (a *app) takeTurns(ctx context.Context) error {
	for {
		var err error
		if a.store == nil {
			err = a.awaitLead(ctx, a.server.forwarder.setLeader)
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				return err
			}
			err = a.lead()
		}
		if err == nil {
			select {
			case <-ctx.Done():
				return nil
			case <-a.store.failed():
			}
		}
		if err = errors.Join(err, a.stepDown()); errors.Is(err, errBroken) {
			return err
		}
		a.log.Warn("this replica does not lead: it stands by", "because", err)
		sleep(ctx, retryPause)
	}
}

// awaitLead returns once this replica leads. Until then it calls follow with the leader.
func (a *app) awaitLead(ctx context.Context, follow func(url, pass string)) error {
	engine, err := a.replica.standBy(ctx, follow)
	if err != nil {
		return err
	}
	a.pass = engine.pass
	a.makeStoreAndPool(engine)
	return nil
}

// lead starts the store and the pool that awaitLead has made.
func (a *app) lead() error {
	if err := a.store.start(a.onCommit); err != nil {
		return err
	}
	a.metrics.noteConfirmed(a.store.publishedTotals()) // includes the previous leader's commits that this replica had not seen confirmed
	a.serveOrders()
	a.log.Info("this replica leads", "resumed", a.store.publishedTotals().unfinished())
	return nil
}

// stepDown closes the pool and the store, because this replica no longer leads or
// lead has failed.
func (a *app) stepDown() error {
	a.server.local.Store(nil)
	a.pool.stop()
	a.pool.drain(time.Now())
	err := a.store.close()
	a.store, a.pool = nil, nil
	return err
}

const noticeAfter = 100 * time.Millisecond // a stop that takes longer prints what it waits for

// close lets running work and then requests end within the drain time. The service
// answers meanwhile, and unfinished orders wait in the table for the next start. The
// files are closed after everyone who writes to them has ended. cause is the error
// that ends the service, or nil.
func (a *app) close(cause error) error {
	atWork := int64(0)
	if a.pool != nil {
		atWork = a.pool.active.Load()
	}
	a.log.Info("stopping", "drain", a.cfg.drain.String(), "orders_at_work", atWork)
	deadline := time.Now().Add(a.cfg.drain)
	notice := time.AfterFunc(noticeAfter, func() {
		fmt.Fprintf(a.console, "stopping: waiting up to %s for orders at work (%d) and for requests; interrupt again to end at once\n",
			max(a.cfg.drain, answerTime), atWork)
	})
	if a.pool != nil {
		a.pool.stop()
		a.pool.drain(deadline)
	}
	a.server.shutdown(deadline)
	notice.Stop()
	err := errors.Join(cause, a.closeFiles())
	if err != nil {
		a.log.Error("stopped", "error", err)
	} else {
		a.log.Info("stopped")
	}
	return errors.Join(err, a.log.close())
}

// abandon closes what a failed start has opened.
func (a *app) abandon(err error) error {
	a.log.Error("not started", "error", err)
	if a.listener != nil {
		a.listener.Close()
	}
	return errors.Join(err, a.closeFiles(), a.log.close())
}

// closeFiles closes the store after its last commit, then metrics.db, then the lock.
func (a *app) closeFiles() (err error) {
	if a.store != nil {
		err = a.store.close()
	}
	if errors.Is(err, errDeposed) && !errors.Is(err, errBroken) {
		err = nil // that another replica leads is no failure
	}
	if a.metrics != nil {
		err = errors.Join(err, a.metrics.close())
	}
	if a.lock != nil {
		err = errors.Join(err, a.lock.Close())
	}
	return err
}

// listen binds the address; its errors say what to do.
func listen(addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("address %s is taken by another program: choose another with -addr, or port 0 for a free one", addr)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w; choose another address with -addr", addr, err)
	}
	return l, nil
}

// announce prints where everything is, and logs the same.
func (a *app) announce() {
	scheme := "http"
	if a.cfg.server.certificate != nil {
		scheme = "https"
	}
	addr, work, orders := a.listener.Addr().String(), a.cfg.describeWork(), a.describeOrders()
	fmt.Fprintf(a.console, "orderd is open at %s://%s\n", scheme, strings.Replace(addr, "[::]", "localhost", 1))
	fmt.Fprintf(a.console, "data in %s, log in %s\n", a.cfg.data, a.cfg.log.file)
	fmt.Fprintf(a.console, "%d workers, %s, %s\n", a.cfg.pool.workers, work, orders)
	a.log.Info("started", "addr", addr, "data", a.cfg.data, "workers", a.cfg.pool.workers, "work", work, "orders", orders, "version", versionLine())
	if a.cfg.server.token == "" && !a.loopbackOnly() {
		a.warn("anyone who reaches this address can place and read orders: set ORDERD_TOKEN or -token-file")
	}
	if len(a.cfg.unknown) > 0 {
		a.warn("no setting is called " + strings.Join(a.cfg.unknown, " or ") + ": see orderd -h for those that are")
	}
}

func (a *app) describeOrders() string {
	if a.replica != nil {
		return "orders in " + a.replica.describe() + ", other replicas reach this one at " + a.replica.url
	}
	return fmt.Sprintf("%d unfinished orders resumed", a.store.publishedTotals().unfinished())
}

func (a *app) warn(text string) {
	fmt.Fprintln(a.console, "warning: "+text)
	a.log.Warn(text)
}

// loopbackOnly reports whether only this machine can connect.
func (a *app) loopbackOnly() bool { return a.listener.Addr().(*net.TCPAddr).IP.IsLoopback() }

// ---- Configuration. ----

// config is what the flags and the environment say, checked.
type config struct {
	addr          string
	tokenFile     string
	readTokenFile string
	certFile      string // with the TLS certificate chain, in PEM; or empty
	keyFile       string // with its private key, in PEM; or empty
	workTokenFile string
	data          string
	orders        string // URL of a PostgreSQL database, or empty
	advertise     string // URL at which other replicas reach this one, or empty
	drain         time.Duration

	store  storeOptions
	pool   poolOptions
	server serverOptions
	log    logOptions

	backup  string   // the directory to copy the databases into, instead of serving
	unknown []string // ORDERD_ variables that are no settings
	version bool
	help    bool
}

// logOptions adds the paths of orderd's other files, which the log would spoil. If a
// database's path is a symbolic link, SQLite keeps its other files beside the target.
func (c config) logOptions() logOptions {
	o := c.log
	o.reserved = []string{c.tokenFile, c.readTokenFile, c.workTokenFile, c.certFile, c.keyFile}
	for _, name := range []string{"orders.db", "metrics.db", "orderd.lock"} {
		path := filepath.Join(c.data, name)
		if target, err := filepath.EvalSymlinks(path); err == nil {
			path = target
		}
		for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
			o.reserved = append(o.reserved, path+suffix)
		}
	}
	return o
}

// describeWork says how orders are processed, and hides a password in the URL.
func (c config) describeWork() string {
	if u, _ := url.Parse(c.pool.endpoint.url); u.Host != "" {
		return "each order POSTed to " + u.Redacted()
	}
	return c.pool.delay.String() + " an order"
}

// advertised returns the URL at which other replicas reach this one: -advertise, or
// without that -addr, which must then be an address that other machines can use.
func (c config) advertised() (string, error) {
	if c.advertise != "" {
		return c.advertise, nil
	}
	host, port, err := net.SplitHostPort(c.addr)
	ip := net.ParseIP(host)
	if err != nil || host == "" || host == "localhost" || ip.IsUnspecified() || ip.IsLoopback() || port == "0" {
		return "", usageError{fmt.Errorf("-advertise must say at which URL the other replicas reach this one, since -addr %s does not, such as -advertise http://10.0.0.7:8080", c.addr)}
	}
	scheme := "http://"
	if c.certFile != "" {
		scheme = "https://"
	}
	return scheme + c.addr, nil
}

// usageError is a mistake in the flags or their variables.
type usageError struct{ error }

// flagGroups lists the flags in the order of the help. A flag that is missing here
// has no environment variable either.
var flagGroups = []struct {
	title     string
	noSetting bool // its flags have no environment variable
	names     []string
}{
	{"Serving", false, []string{"addr", "host", "token-file", "read-token-file", "tls-cert", "tls-key", "drain"}},
	{"Orders", false, []string{"data", "orders", "advertise", "workers", "delay", "work", "work-timeout", "work-token-file", "queue", "cache", "keep"}},
	{"Logs", false, []string{"log", "log-size", "log-backups", "log-days", "log-level"}},
	{"Instead of serving", true, []string{"backup", "version", "h"}},
}

// flags defines every flag on a new set and gives c the defaults. Parsing refuses a
// value out of its limits, so that the message can name flag, value and limits.
func (c *config) flags() *flag.FlagSet {
	fs := flag.NewFlagSet("orderd", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	number := func(low, high int) func(string) (int, error) {
		return inRange("must be a whole number from %d to %d", low, high, strconv.Atoi)
	}
	duration := inRange("must be a duration from %s to %s, such as 250ms or 2s", 0, 24*time.Hour, time.ParseDuration)
	oneAttempt := inRange("must be a duration from %s to %s, such as 30s or 5m", time.Second, time.Hour, time.ParseDuration)
	define(fs, &c.addr, "addr", "localhost:8080", "address to listen on; port 0 takes a free one", parseAddr)
	fs.Func("host", "more Host names that are ours while listening on loopback, as behind a proxy; with commas between", func(s string) (err error) {
		c.server.proxyHosts, err = parseHosts(s)
		return err
	})
	define(fs, &c.tokenFile, "token-file", "", "file with the bearer token that requests must carry", parseName)
	define(fs, &c.readTokenFile, "read-token-file", "", "file with another token, which may read but place no order", parseName)
	define(fs, &c.certFile, "tls-cert", "", "file with the certificate chain to serve HTTPS with, in PEM", parseName)
	define(fs, &c.keyFile, "tls-key", "", "file with the certificate's private key, in PEM", parseName)
	define(fs, &c.drain, "drain", 10*time.Second, "longest wait for running work at shutdown, 0 to 24h", duration)
	define(fs, &c.data, "data", "data", "directory of orders.db and metrics.db, made if missing", parseName)
	define(fs, &c.orders, "orders", "", "URL of a PostgreSQL database that keeps the orders, for several replicas; instead of orders.db", parseName)
	define(fs, &c.advertise, "advertise", "", "URL at which the other replicas on -orders reach this one; by default that of -addr", parseAdvertised)
	define(fs, &c.pool.workers, "workers", 8, "goroutines in the pool, 1 to 100,000", number(1, 100_000))
	define(fs, &c.pool.delay, "delay", 2*time.Second, "simulated processing time of one order, 0 to 24h", duration)
	define(fs, &c.pool.endpoint.url, "work", "", "http or https URL that each order is POSTed to, and completed by a 2xx; instead of -delay", parseEndpoint)
	define(fs, &c.pool.endpoint.timeout, "work-timeout", 30*time.Second, "longest time for one attempt at an order with -work, 1s to 1h", oneAttempt)
	define(fs, &c.workTokenFile, "work-token-file", "", "file with the bearer token that requests to -work carry", parseName)
	define(fs, &c.pool.queue, "queue", 1024, "capacity of the channel between feeder and pool, 1 to 1,000,000", number(1, 1_000_000))
	define(fs, &c.store.cache, "cache", 1_000_000, "most order statuses kept in memory, 1 to 100,000,000", number(1, 100_000_000))
	define(fs, &c.store.keep, "keep", 0, "how long completed orders are kept: 1s to 87600h, or 0 for ever", parseKeep)
	define(fs, &c.log.file, "log", "logs/orderd.log", "log file; - logs to stderr, which then gets JSON only", parseName)
	define(fs, &c.log.maxMB, "log-size", 100, "MB after which the log file is rotated, 1 to 10,000", number(1, 10_000))
	define(fs, &c.log.backups, "log-backups", 5, "old log files kept, compressed, 1 to 1,000", number(1, 1_000))
	define(fs, &c.log.days, "log-days", 28, "days that old log files are kept, 0 (no limit) to 36,500", number(0, 36_500))
	define(fs, &c.log.level, "log-level", slog.LevelInfo, "least level that is logged: debug, info, warn or error", parseLevel)
	define(fs, &c.backup, "backup", "", "new directory to copy both databases into, of a service that runs or not; then exit", parseName)
	fs.BoolVar(&c.version, "version", false, "print module version, commit and Go version")
	fs.BoolVar(&c.help, "h", false, "print this help")
	return fs
}

// define adds a flag with a default; parse also checks the flag's limits.
func define[T any](fs *flag.FlagSet, p *T, name string, value T, usage string, parse func(string) (T, error)) {
	*p = value
	fs.Func(name, usage, func(s string) (err error) {
		*p, err = parse(s)
		return err
	})
	fs.Lookup(name).DefValue = strings.ToLower(fmt.Sprint(value))
}

// inRange adds limits to a parser; the message has a formatting verb for each.
func inRange[T cmp.Ordered](message string, low, high T, parse func(string) (T, error)) func(string) (T, error) {
	return func(s string) (T, error) {
		v, err := parse(s)
		if err != nil || v < low || v > high {
			err = fmt.Errorf(message, low, high)
		}
		return v, err
	}
}

func parseKeep(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d != 0 && (d < time.Second || d > 87600*time.Hour) {
		err = errors.New("must be 0, or a duration from 1s to 87600h, such as 2160h")
	}
	return d, err
}

func parseName(s string) (string, error) {
	if s == "" {
		return "", errors.New("must not be empty")
	}
	return s, nil
}

func parseAddr(s string) (string, error) {
	_, port, err := net.SplitHostPort(s)
	if n, perr := strconv.Atoi(port); err != nil || perr != nil || n < 0 || n > 65535 {
		return "", errors.New("must be host:port with a port from 0 to 65535, such as localhost:8080")
	}
	return s, nil
}

func parseHosts(s string) ([]string, error) {
	names := strings.Split(strings.ToLower(s), ",")
	for _, name := range names {
		if name == "" || strings.ContainsAny(name, " :/[]*") {
			return nil, errors.New("must be names without scheme and port, with commas between, such as orders.example.com")
		}
	}
	return names, nil
}

func parseEndpoint(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return "", errors.New("must be an http or https URL with a host, such as http://localhost:9000/work")
	}
	return s, nil
}

func parseAdvertised(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" {
		return "", errors.New("must be an http or https URL of a host and port alone, such as http://10.0.0.7:8080")
	}
	return s, nil
}

func parseLevel(s string) (level slog.Level, err error) {
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, s) {
		return level, errors.New("must be debug, info, warn or error")
	}
	return level, level.UnmarshalText([]byte(s))
}

// variable returns the name of a flag's environment variable.
func variable(flagName string) string {
	return "ORDERD_" + strings.ToUpper(strings.ReplaceAll(flagName, "-", "_"))
}

// parseConfig reads the environment and then the flags, which override it. Its error
// is a usageError, or flag.ErrHelp, or says that a token file cannot be read.
func parseConfig(args []string, variables map[string]string) (config, error) {
	c := config{store: storeOptions{now: time.Now}, pool: poolOptions{now: time.Now}}
	fs := c.flags()
	envErr := c.setFromVariables(fs, variables)
	if err := fs.Parse(args); c.help || errors.Is(err, flag.ErrHelp) {
		return c, flag.ErrHelp
	} else if err = cmp.Or(err, envErr); err != nil {
		return c, usageError{fmt.Errorf("%w; see orderd -h", err)}
	}
	if fs.NArg() > 0 {
		return c, usageError{fmt.Errorf("unexpected argument %q: orderd takes only flags; see orderd -h", fs.Arg(0))}
	}
	for _, s := range c.secrets() {
		if err := s.read(variables); err != nil {
			return c, err
		}
	}
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	return c, c.contradiction(given)
}

// setFromVariables sets flags from their environment variables, and collects in
// c.unknown the ORDERD_ variables that are no settings.
func (c *config) setFromVariables(fs *flag.FlagSet, variables map[string]string) (err error) {
	known := map[string]bool{}
	for _, s := range c.secrets() {
		known[s.variable] = true
	}
	for _, group := range flagGroups {
		for _, name := range group.names {
			if group.noSetting {
				continue
			}
			known[variable(name)] = true
			value, ok := variables[variable(name)]
			if !ok {
				continue
			}
			if refused := fs.Set(name, value); refused != nil {
				err = cmp.Or(err, fmt.Errorf("invalid value %q for %s: %w", value, variable(name), refused))
			}
		}
	}
	for name := range variables {
		// Kubernetes sets ORDERD_PORT… and ORDERD_SERVICE… for a Service called orderd.
		if strings.HasPrefix(name, "ORDERD_") && !known[name] && !strings.HasPrefix(name, "ORDERD_PORT") && !strings.HasPrefix(name, "ORDERD_SERVICE_") {
			c.unknown = append(c.unknown, name)
		}
	}
	slices.Sort(c.unknown)
	return err
}

// contradiction returns an error for settings that are right one by one, but not
// together. given holds the flags that were set, by argument or by variable.
func (c config) contradiction(given map[string]bool) error {
	switch {
	case given["work"] && given["delay"]:
		return usageError{errors.New("-work and -delay (or ORDERD_WORK and ORDERD_DELAY) exclude each other: an order takes as long as the endpoint does; leave out one of them; see orderd -h")}
	case !given["work"] && (given["work-timeout"] || c.pool.endpoint.token != ""):
		return usageError{errors.New("-work-timeout and the token of -work are for an endpoint, and without -work orders are only simulated: give -work too, or leave them out")}
	case c.advertise != "" && c.orders == "":
		return usageError{errors.New("-advertise is for replicas that share their orders: give -orders too, or leave it out")}
	case c.backup != "" && c.orders != "":
		return usageError{errors.New("-backup copies orders.db, and with -orders there is none: use pg_dump")}
	case (c.certFile == "") != (c.keyFile == ""):
		return usageError{errors.New("-tls-cert and -tls-key belong together: give both, or neither to serve plain HTTP")}
	case c.server.readToken != "" && c.server.token == "":
		return usageError{errors.New("a read token alone would let everyone place orders: set ORDERD_TOKEN or -token-file too")}
	case c.server.readToken != "" && c.server.readToken == c.server.token:
		return usageError{errors.New("the read token is the token that places orders: choose another one")}
	}
	if c.orders != "" {
		_, err := c.advertised()
		return err
	}
	return nil
}

// secret says where a bearer token comes from and where it is kept.
type secret struct {
	flag, variable string
	file           string // the flag's value, or empty
	into           *string
}

func (c *config) secrets() []secret {
	return []secret{
		{"-token-file", "ORDERD_TOKEN", c.tokenFile, &c.server.token},
		{"-read-token-file", "ORDERD_READ_TOKEN", c.readTokenFile, &c.server.readToken},
		{"-work-token-file", "ORDERD_WORK_TOKEN", c.workTokenFile, &c.pool.endpoint.token},
	}
}

// read reads the token from the file or, if there is none, from the variable, as a
// flag overrides its variable elsewhere. A token that is set but empty is an error,
// because it would let everyone in.
func (s secret) read(variables map[string]string) error {
	text, ok := variables[s.variable]
	source := s.variable
	if s.file != "" {
		content, err := os.ReadFile(s.file)
		if err != nil {
			return fmt.Errorf("cannot read the token of %s: %w", s.flag, err)
		}
		text, ok, source = string(content), true, "the file of "+s.flag+", "+s.file+","
	}
	*s.into = strings.TrimSpace(text)
	if ok && *s.into == "" {
		return usageError{fmt.Errorf("%s is empty: put the token into it, or unset it to do without one", source)}
	}
	if strings.ContainsFunc(*s.into, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return usageError{fmt.Errorf("%s holds a line break, a space or a character beyond ASCII inside the token: none can be in a bearer token", source)}
	}
	return nil
}

const examples = `
Examples:
  orderd                                             serve on localhost:8080, keep data in ./data
  orderd -addr :9000 -token-file token -data /srv/o  serve the network, with a token
  ORDERD_DELAY=0s orderd -workers 64 -log -          process at once, log to stderr
`

func help() string {
	var b strings.Builder
	b.WriteString("orderd takes orders over HTTP and never loses one it said it had.\n\nUsage: orderd [flags]\n")
	fs := new(config).flags()
	for _, group := range flagGroups {
		fmt.Fprintf(&b, "\n%s:\n", group.title)
		for _, name := range group.names {
			f := fs.Lookup(name)
			if group.noSetting {
				fmt.Fprintf(&b, "  -%-16s %s\n", name, f.Usage)
				continue
			}
			fmt.Fprintf(&b, "  -%-16s %s\n  %17s default %s, variable %s\n", name, f.Usage, "", cmp.Or(f.DefValue, "none"), variable(name))
		}
	}
	b.WriteString("\nA token itself is given in ORDERD_TOKEN, ORDERD_READ_TOKEN or ORDERD_WORK_TOKEN, or in its file, never as a flag.\n")
	return b.String() + examples
}

// versionLine names the module version, the commit and the Go version.
func versionLine() string {
	version, commit := buildInfo()
	return fmt.Sprintf("orderd %s, commit %s, %s", version, commit, runtime.Version())
}
