// Orderd is an order service in one binary. It takes orders over HTTP, keeps
// them in SQLite, runs each through Pending, Processing and Completed on a
// fixed pool of goroutines, and answers "where is my order?" from memory.
//
// An order is answered with 201 only after the commit that holds it has been
// fsynced; from then on no crash loses it, and it completes exactly once in
// the counts. See README.md for the API and the promises.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)   // a second signal ends the process at once
	signal.Ignore(syscall.SIGPIPE) // a reader of stderr that has gone does not
	os.Exit(exitCode(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr), os.Stderr))
}

// loggedError is on stderr already, as a line of the log.
type loggedError struct{ error }

// exitCode prints err as one sentence. A bad flag is 2, anything else that
// stopped the service 1.
func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return 0
	}
	if errors.As(err, new(loggedError)) {
		return 1
	}
	printed := make(chan struct{})
	go func() {
		fmt.Fprintf(stderr, "orderd: %v\n", err)
		close(printed)
	}()
	select {
	case <-printed:
	case <-time.After(logEnd): // nobody reads stderr
	}
	if errors.As(err, new(usageError)) {
		return 2
	}
	return 1
}

// gcPercent is Go's GOGC. The cache is most of a long-lived heap and never
// garbage, so less room is left for garbage than Go would leave.
const gcPercent = 50

// run reads the flags and serves until ctx is done or the store fails.
func run(ctx context.Context, args []string, lookupEnv func(string) (string, bool), stdout, stderr io.Writer) error {
	cfg, err := parseConfig(args, lookupEnv)
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
	if _, ok := lookupEnv("GOGC"); !ok {
		debug.SetGCPercent(gcPercent)
	}
	a, err := openApp(cfg, stderr)
	if err == nil {
		err = a.serve(ctx)
	}
	if err != nil && cfg.log == logToStderr {
		err = loggedError{err}
	}
	return err
}

// app is the whole service, its parts in the order of their lifetimes.
type app struct {
	cfg        config
	log        *logger
	cache      *cache
	store      *store
	metrics    *metrics
	listener   net.Listener
	pool       *pool
	server     *server
	unfinished int64 // orders found at start
}

// openApp opens everything and starts the work on what was left unfinished.
// After it, the address is bound but not yet served.
func openApp(cfg config, stderr io.Writer) (_ *app, err error) {
	a := &app{cfg: cfg, cache: newCache(cfg.cache)}
	if a.log, err = openLog(cfg.logOptions(), stderr); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			a.log.Error("not started", "error", err)
			err = errors.Join(err, a.log.close())
		}
	}()
	if a.store, a.metrics, err = openStore(cfg, a.cache, a.log); err != nil {
		return nil, err
	}
	a.unfinished = a.store.start()
	go a.metrics.project()
	if a.listener, err = listen(cfg.addr); err != nil {
		return nil, errors.Join(err, a.store.close(), a.metrics.close(), a.store.unlock())
	}
	a.pool = newPool(cfg, a.store, a.log)
	a.pool.start()
	a.server = newServer(a)
	a.announce(stderr)
	return a, nil
}

// serve answers requests until ctx is done or the store fails, and takes
// everything down in the reverse order.
func (a *app) serve(ctx context.Context) error {
	served := make(chan error, 1)
	go func() { served <- a.server.http.Serve(a.listener) }()
	var err error
	select {
	case <-ctx.Done():
	case <-a.store.failed:
	case err = <-served:
		a.log.Error("cannot accept connections any more", "error", err)
	}
	return errors.Join(err, a.close())
}

// close lets running work and then requests end within the drain time, and
// answers meanwhile; what is left waits in the table. The last writes come
// after everyone who writes.
func (a *app) close() error {
	a.log.Info("stopping", "drain", a.cfg.drain.String())
	deadline := time.Now().Add(a.cfg.drain)
	a.pool.stop()
	a.pool.drain(deadline)
	a.server.shutdown(deadline)
	err := errors.Join(a.store.close(), a.metrics.close(), a.store.unlock())
	if err != nil {
		a.log.Error("stopped", "error", err)
	} else {
		a.log.Info("stopped")
	}
	return errors.Join(err, a.log.close())
}

// listen turns the two usual failures into a remedy.
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

// announce tells a person where everything is, and the log the same.
func (a *app) announce(stderr io.Writer) {
	if a.cfg.log == logToStderr {
		stderr = io.Discard
	}
	addr := a.listener.Addr().String()
	fmt.Fprintf(stderr, "orderd is open at http://%s\n", strings.Replace(addr, "[::]", "localhost", 1))
	fmt.Fprintf(stderr, "data in %s, log in %s\n", a.cfg.data, a.cfg.log)
	fmt.Fprintf(stderr, "%d workers, %s an order, %d unfinished orders resumed\n", a.cfg.workers, a.cfg.delay, a.unfinished)
	if a.cfg.token == "" && !a.local() {
		const warning = "anyone who reaches this address can place and read orders: set ORDERD_TOKEN or -token-file"
		fmt.Fprintln(stderr, "warning: "+warning)
		a.log.Warn(warning)
	}
	a.log.Info("started", "addr", addr, "data", a.cfg.data, "workers", a.cfg.workers,
		"delay", a.cfg.delay.String(), "resumed", a.unfinished, "version", versionLine())
}

// local reports whether only this machine can connect.
func (a *app) local() bool { return a.listener.Addr().(*net.TCPAddr).IP.IsLoopback() }

// config is what the flags and the environment say, checked.
type config struct {
	addr      string
	tokenFile string
	data      string
	workers   int
	delay     time.Duration
	queue     int
	cache     int
	drain     time.Duration

	log        string
	logSize    int // MB
	logBackups int
	logDays    int
	logLevel   string

	token   string // from ORDERD_TOKEN or the token file, never from a flag's value
	version bool
	help    bool
	hooks   hooks
}

// logOptions names every file that the log would spoil. SQLite keeps the files
// beside a database where a symbolic link leads.
func (c config) logOptions() logOptions {
	o := logOptions{file: c.log, maxMB: c.logSize, backups: c.logBackups, days: c.logDays}
	o.level.UnmarshalText([]byte(c.logLevel)) // parseLevel has checked it
	if c.tokenFile != "" {
		o.taken = append(o.taken, c.tokenFile)
	}
	for _, name := range []string{"orders.db", "metrics.db", "orderd.lock"} {
		path := filepath.Join(c.data, name)
		if target, err := filepath.EvalSymlinks(path); err == nil {
			path = target
		}
		for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
			o.taken = append(o.taken, path+suffix)
		}
	}
	return o
}

// hooks are nil outside tests, which break the service through them on purpose.
type hooks struct {
	beforeCommit  func(*store, *batch) // in the writer, just before COMMIT
	beforeProject func()               // between the two databases' commits
	work          func(context.Context, order) error
	now           func() time.Time
}

// usageError is a mistake in the flags or their variables.
type usageError struct{ error }

// flagGroups orders the help.
var flagGroups = []struct {
	title string
	names []string
}{
	{"Serving", []string{"addr", "token-file", "drain"}},
	{"Orders", []string{"data", "workers", "delay", "queue", "cache"}},
	{"Logs", []string{"log", "log-size", "log-backups", "log-days", "log-level"}},
	{"About", []string{"version", "h"}},
}

// flags defines every flag on a new set and gives c the defaults. A value out
// of its limits is refused while it is parsed, so the message can name all three.
func (c *config) flags() *flag.FlagSet {
	fs := flag.NewFlagSet("orderd", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	number := func(low, high int) func(string) (int, error) {
		return inRange("must be a whole number from %d to %d", low, high, strconv.Atoi)
	}
	duration := inRange("must be a duration from %s to %s, such as 250ms or 2s", 0, 24*time.Hour, time.ParseDuration)
	define(fs, &c.addr, "addr", "localhost:8080", "address to listen on; port 0 takes a free one", parseAddr)
	fs.StringVar(&c.tokenFile, "token-file", "", "file with the bearer token that requests must carry")
	define(fs, &c.drain, "drain", 10*time.Second, "longest wait for running work at shutdown, 0 to 24h", duration)
	define(fs, &c.data, "data", "data", "directory of orders.db and metrics.db, made if missing", parseName)
	define(fs, &c.workers, "workers", 8, "goroutines in the pool, 1 to 100,000", number(1, 100_000))
	define(fs, &c.delay, "delay", 2*time.Second, "simulated processing time of one order, 0 to 24h", duration)
	define(fs, &c.queue, "queue", 1024, "capacity of the channel between feeder and pool, 1 to 1,000,000", number(1, 1_000_000))
	define(fs, &c.cache, "cache", 1_000_000, "most order statuses kept in memory, 1 to 100,000,000", number(1, 100_000_000))
	define(fs, &c.log, "log", "logs/orderd.log", "log file; - logs to stderr, which then gets JSON only", parseName)
	define(fs, &c.logSize, "log-size", 100, "MB after which the log file is rotated, 1 to 10,000", number(1, 10_000))
	define(fs, &c.logBackups, "log-backups", 5, "old log files kept, compressed, 1 to 1,000", number(1, 1_000))
	define(fs, &c.logDays, "log-days", 28, "days that old log files are kept, 0 (no limit) to 36,500", number(0, 36_500))
	define(fs, &c.logLevel, "log-level", "info", "least level that is logged: debug, info, warn or error", parseLevel)
	fs.BoolVar(&c.version, "version", false, "print module version, commit and Go version")
	fs.BoolVar(&c.help, "h", false, "print this help")
	return fs
}

// define adds a flag whose parser knows its limits.
func define[T any](fs *flag.FlagSet, p *T, name string, value T, usage string, parse func(string) (T, error)) {
	*p = value
	fs.Func(name, usage, func(s string) (err error) {
		*p, err = parse(s)
		return err
	})
	fs.Lookup(name).DefValue = fmt.Sprint(value)
}

// inRange adds limits to a parser; the message names both.
func inRange[T cmp.Ordered](message string, low, high T, parse func(string) (T, error)) func(string) (T, error) {
	return func(s string) (T, error) {
		v, err := parse(s)
		if err != nil || v < low || v > high {
			err = fmt.Errorf(message, low, high)
		}
		return v, err
	}
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

func parseLevel(s string) (string, error) {
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, s) {
		return "", errors.New("must be debug, info, warn or error")
	}
	return s, nil
}

// variable is the environment's name of a flag.
func variable(flagName string) string {
	return "ORDERD_" + strings.ToUpper(strings.ReplaceAll(flagName, "-", "_"))
}

// parseConfig takes the environment first and the flags over it. Its errors
// are usageErrors, flag.ErrHelp, or a token file that cannot be read.
func parseConfig(args []string, lookupEnv func(string) (string, bool)) (config, error) {
	var c config
	fs := c.flags()
	var envErr error
	fs.VisitAll(func(f *flag.Flag) {
		if value, ok := lookupEnv(variable(f.Name)); ok && f.Name != "h" && f.Name != "version" {
			if err := fs.Set(f.Name, value); err != nil {
				envErr = cmp.Or(envErr, fmt.Errorf("invalid value %q for %s: %w", value, variable(f.Name), err))
			}
		}
	})
	if err := fs.Parse(args); c.help || errors.Is(err, flag.ErrHelp) {
		return c, flag.ErrHelp
	} else if err = cmp.Or(err, envErr); err != nil {
		return c, usageError{fmt.Errorf("%w; see orderd -h", err)}
	}
	if fs.NArg() > 0 {
		return c, usageError{fmt.Errorf("unexpected argument %q: orderd takes only flags; see orderd -h", fs.Arg(0))}
	}
	var err error
	c.token, err = readToken(c.tokenFile, lookupEnv)
	return c, err
}

// readToken prefers a token file over ORDERD_TOKEN, as a flag wins elsewhere.
// A token that is set but empty is an error: it would leave the door open.
func readToken(file string, lookupEnv func(string) (string, bool)) (string, error) {
	token, ok := lookupEnv("ORDERD_TOKEN")
	source := "ORDERD_TOKEN"
	if file != "" {
		text, err := os.ReadFile(file)
		if err != nil {
			return "", fmt.Errorf("cannot read the token file: %w", err)
		}
		token, ok, source = string(text), true, "the token file "+file
	}
	token = strings.TrimSpace(token)
	if ok && token == "" {
		return "", usageError{fmt.Errorf("%s is empty: put the token into it, or unset it to serve without one", source)}
	}
	return token, nil
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
			if group.title == "About" {
				fmt.Fprintf(&b, "  -%-12s %s\n", name, f.Usage)
				continue
			}
			fmt.Fprintf(&b, "  -%-12s %s\n  %13s default %s, variable %s\n", name, f.Usage, "", cmp.Or(f.DefValue, "none"), variable(name))
		}
	}
	b.WriteString("\nThe token itself is given in ORDERD_TOKEN or in the token file, never as a flag.\n")
	return b.String() + examples
}

// versionLine tells the module version, the commit and the Go version.
func versionLine() string {
	version, commit := buildInfo()
	return fmt.Sprintf("orderd %s, commit %s, %s", version, commit, runtime.Version())
}

// buildInfo tells the module version and the commit.
func buildInfo() (version, commit string) {
	version, commit = "unknown", "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		version = info.Main.Version
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" {
				commit = setting.Value
			}
		}
	}
	return version, commit
}
