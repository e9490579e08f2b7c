package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/labstack/echo/v4"
	"github.com/oklog/ulid/v2"
)

const (
	maxBody     = 64 << 10 // bytes of a request's body
	maxRefused  = 1 << 20  // bytes that are read of a refused request's body; nginx sends no more
	maxHeader   = 64 << 10 // bytes of a request's header
	maxUserID   = 128      // bytes, trimmed
	maxItems    = 1000
	maxItemIDs  = 16 << 10 // bytes
	maxKey      = 255      // bytes of an idempotency key
	maxCents    = 9999999999999_99
	maxWait     = 60 * time.Second // longest Prefer: wait
	maxPage     = 1000             // orders in a list
	defaultPage = 50
	answerTime  = 500 * time.Millisecond // minimum time at shutdown for requests in flight
)

var (
	//go:embed web/index.html
	pageHTML []byte
	//go:embed web/openapi.json
	apiJSON []byte
)

// serverOptions are the server's part of the configuration.
type serverOptions struct {
	token       string       // bearer token that requests must carry; empty asks for none
	readToken   string       // another token, which may only read; or empty
	certificate *certificate // to serve HTTPS with, or nil
	proxyHosts  []string     // Host names from -host, in lower case; if there are any, a peer on loopback is a proxy
	ownHosts    []string     // all Host names that this server answers to; if empty, any name
	gauges      func() []gauge
}

// localOrders answers requests about orders in this process: with SQLite from start
// to end, with PostgreSQL while this replica leads.
type localOrders struct {
	store *store
	pool  *pool
	pass  string // secret in the requests that other replicas pass on; or empty
}

// server is the HTTP side: Echo routes to the handlers, everything else is
// net/http's own server with its limits set.
type server struct {
	serverOptions
	local     atomic.Pointer[localOrders] // nil while another replica leads
	forwarder *forwarder                  // passes requests on to the leader, if another replica leads
	metrics   *metrics
	log       *logger
	http      *http.Server

	tokenHash, readTokenHash [sha256.Size]byte

	boot        string // makes request IDs differ between starts
	requests    atomic.Uint64
	createTimes histogram // of POST /orders
	readTimes   histogram // of GET /orders/:order_id
	routes      map[string]*route
}

// route counts the requests of one method and path.
type route struct {
	method, path string
	latency      *histogram         // of its answers, or nil
	statuses     [600]atomic.Uint64 // by HTTP status code
}

func newServer(o serverOptions, m *metrics, log *logger) *server {
	srv := &server{
		serverOptions: o, forwarder: newForwarder(), metrics: m, log: log,
		tokenHash: sha256.Sum256([]byte(o.token)), readTokenHash: sha256.Sum256([]byte(o.readToken)),
		boot:        strconv.FormatUint(rand.Uint64(), 36) + "-",
		createTimes: newHistogram(latencyBounds), readTimes: newHistogram(latencyBounds),
		routes: map[string]*route{},
	}
	srv.http = &http.Server{
		Handler:           canonical(srv.handler()),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      maxWait + 30*time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeader - 4096, // net/http adds these 4096
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	srv.http.ConnContext = func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) }
	if o.certificate != nil {
		srv.http.TLSConfig = &tls.Config{GetCertificate: o.certificate.get}
	}
	return srv
}

// handler routes every request.
func (s *server) handler() http.Handler {
	e := echo.New()
	e.HTTPErrorHandler = s.problem
	e.Use(s.track)
	for path, handler := range map[string]echo.HandlerFunc{
		"/":                 s.servePage,
		"/openapi.json":     s.openAPI,
		"/orders":           s.localOrForwarded(s.listOrders),
		"/orders/:order_id": s.localOrForwarded(s.getOrder),
		"/metrics":          s.getMetrics,
		"/livez":            s.getLive,
		"/healthz":          s.getLive,
		"/readyz":           s.getReady,
	} {
		e.Match([]string{http.MethodGet, http.MethodHead}, path, handler)
	}
	e.POST("/orders", s.localOrForwarded(s.createOrder))
	for _, r := range e.Routes() {
		s.routes[r.Method+r.Path] = &route{method: r.Method, path: r.Path}
	}
	s.routes["POST/orders"].latency = &s.createTimes
	s.routes["GET/orders/:order_id"].latency = &s.readTimes
	s.routes[""] = &route{method: "other", path: "other"}
	return e
}

// localOrForwarded answers a request by here while this process has the orders, and
// else passes the request on to the leader.
func (s *server) localOrForwarded(here func(echo.Context, *localOrders) error) echo.HandlerFunc {
	return func(c echo.Context) error {
		if l := s.local.Load(); l != nil {
			return here(c, l)
		}
		body, err := readBody(c) // read first, so that a body that does not arrive here is not taken for a failure of the leader
		if err != nil {
			return err
		}
		return s.forwarder.forward(c.Response(), c.Request(), body, s.client(c.Request()))
	}
}

// canonical removes needless percent-encoding from the path, and turns the empty path
// of an absolute URL into /. Both forms name the same resource (RFC 3986, sections
// 6.2.2.2 and 6.2.3), but Echo routes by the path as it was sent.
func canonical(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u := r.URL; u.RawPath != "" {
			segments := strings.Split(u.RawPath, "/")
			for i, segment := range segments {
				text, _ := url.PathUnescape(segment) // net/url has checked the escapes
				segments[i] = url.PathEscape(text)
			}
			if u.RawPath = strings.Join(segments, "/"); u.RawPath == u.Path {
				u.RawPath = ""
			}
		} else if u.Path == "" {
			u.Path = "/"
		}
		next.ServeHTTP(w, r)
	})
}

// ---- Connections. ----

// serve answers requests until shutdown.
func (s *server) serve(l net.Listener) error {
	if s.certificate != nil {
		return s.http.ServeTLS(l, "", "") // TLSConfig has the certificate
	}
	return s.http.Serve(listener{l})
}

// listener accepts connections as conns. With TLS, net/http keeps its watch: a read
// of nothing would confuse TLS.
type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	accepted, err := l.Listener.Accept()
	if tcp, ok := accepted.(*net.TCPConn); ok {
		return &conn{TCPConn: tcp}, nil
	}
	return accepted, err
}

// conn can end net/http's watch: a read, in a goroutine of its own, which notices
// that the client has gone while a handler works. A create goes on even if its client
// has gone, and takes a tenth less time without the watch.
type conn struct {
	*net.TCPConn
	// unwatched makes the next Read return at once without bytes or error, as an
	// io.Reader may. This is the watch's read or, if the watch is already reading, that
	// of the next request, which net/http then repeats.
	unwatched atomic.Bool
}

type connKey struct{} // key of the connection in a request's context

func (c *conn) Read(p []byte) (int, error) {
	if c.unwatched.Load() {
		c.unwatched.Store(false)
		return 0, nil
	}
	return c.TCPConn.Read(p)
}

// shutdown waits for requests in flight and cuts them off at the deadline, but leaves
// them at least answerTime.
func (s *server) shutdown(deadline time.Time) {
	ctx, cancel := context.WithTimeout(context.Background(), max(answerTime, time.Until(deadline)))
	defer cancel()
	s.forwarder.stop()
	if err := s.http.Shutdown(ctx); err != nil {
		s.log.Warn("requests were cut off at shutdown", "error", err)
		s.http.Close()
	}
}

const renewEvery = 5 * time.Second // minimum time between two reads of a certificate's files

// certificate is a pair of files for TLS: the certificate chain and its key. get reads
// them again during handshakes, so that a renewed pair is used without a restart.
type certificate struct {
	certFile, keyFile string
	log               *logger

	mu        sync.Mutex       // guards the rest
	pair      *tls.Certificate // the last valid pair
	read      time.Time        // when the files were last read
	lastError string           // error of that read, or empty; logged when it changes
}

func openCertificate(certFile, keyFile string, log *logger) (*certificate, error) {
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("cannot serve HTTPS: %w; see -tls-cert and -tls-key", err)
	}
	return &certificate{certFile: certFile, keyFile: keyFile, log: log, pair: &pair, read: time.Now()}, nil
}

// get is the GetCertificate of tls.Config.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.read) < renewEvery {
		return c.pair, nil
	}
	failure := ""
	if pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile); err == nil {
		c.pair = &pair
	} else if failure = err.Error(); failure != c.lastError {
		c.log.Error("the certificate cannot be renewed; the one before stays in use", "error", failure)
	}
	c.read, c.lastError = time.Now(), failure
	return c.pair, nil
}

// ---- Every request: its ID, its log line, whether it is admitted. ----

// track gives every request an ID, answers its error, and counts, times and
// logs it.
func (s *server) track(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		began := time.Now()
		request, response := c.Request(), c.Response()
		id := string(strconv.AppendUint([]byte(s.boot), s.requests.Add(1), 36))
		response.Header()[echo.HeaderXRequestID] = []string{id}
		err := s.admitAndHandle(c, next)
		aborted := errors.Is(err, http.ErrAbortHandler)
		if err != nil && !aborted {
			c.Error(err)
		}
		took := time.Since(began)

		r := s.routes[request.Method+c.Path()]
		if r == nil {
			r = s.routes[""]
		}
		r.statuses[min(response.Status, len(r.statuses)-1)].Add(1)
		if r.latency != nil && response.Header()["Preference-Applied"] == nil {
			r.latency.observe(took.Seconds())
		}
		s.logRequest(id, began, took, request, response, err)
		if aborted {
			panic(http.ErrAbortHandler) // makes net/http cut the connection, else the answer would look whole
		}
		return nil
	}
}

// traceparent matches the value of W3C's header: https://www.w3.org/TR/trace-context/.
var traceparent = regexp.MustCompile(`^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$`)

// logRequest logs a request, and of a 503 the cause, which the client is not told.
func (s *server) logRequest(id string, began time.Time, took time.Duration, request *http.Request, response *echo.Response, err error) {
	handler := s.log.Handler()
	if !handler.Enabled(context.Background(), slog.LevelInfo) {
		return
	}
	line := slog.NewRecord(began, slog.LevelInfo, "request", 0)
	line.AddAttrs(slog.String("id", id), slog.String("client", s.client(request)),
		slog.String("method", request.Method), slog.String("path", request.URL.Path),
		slog.Int("status", response.Status), slog.Int64("us", took.Microseconds()), slog.Int64("bytes", response.Size))
	if parent := request.Header["Traceparent"]; len(parent) == 1 && traceparent.MatchString(parent[0]) {
		line.AddAttrs(slog.String("traceparent", parent[0]))
	}
	if err != nil && response.Status == http.StatusServiceUnavailable {
		line.AddAttrs(slog.String("error", err.Error()))
	}
	handler.Handle(context.Background(), line)
}

// client returns the client's address. If a proxy on this machine or another replica
// has passed the request on, this is the last entry of X-Forwarded-For, which the proxy
// or the replica has added; otherwise it is the peer.
func (s *server) client(r *http.Request) string {
	forwarded := r.Header["X-Forwarded-For"]
	if len(forwarded) == 0 {
		return r.RemoteAddr
	}
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	byProxy := len(s.proxyHosts) > 0 && peer.Addr().Unmap().IsLoopback()
	if !byProxy && !s.passedOn(r) {
		return r.RemoteAddr
	}
	last := forwarded[len(forwarded)-1]
	last = strings.TrimSpace(last[strings.LastIndexByte(last, ',')+1:])
	addr, err := netip.ParseAddr(last)
	if err != nil {
		return r.RemoteAddr
	}
	return addr.WithZone("").String()
}

// passedOn reports whether a replica that follows this one has passed the request on:
// what that replica says of the client and the Host can be trusted.
func (s *server) passedOn(r *http.Request) bool {
	l, pass := s.local.Load(), r.Header[passHeader]
	return l != nil && l.pass != "" && len(pass) == 1 && subtle.ConstantTimeCompare([]byte(pass[0]), []byte(l.pass)) == 1
}

// admitAndHandle calls the handler if the request is admitted. It turns a panic into
// an error that holds the stack, for the log.
func (s *server) admitAndHandle(c echo.Context, handler echo.HandlerFunc) (err error) {
	defer func() {
		switch r := recover(); r {
		case nil:
		case http.ErrAbortHandler: // the leader's answer, passed on, has ended half-way: see track
			err = http.ErrAbortHandler
		default:
			err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
		}
	}()
	if err := s.admit(c); err != nil {
		return err
	}
	return handler(c)
}

// public are the paths that need no token, and that any page may ask for.
var public = map[string]bool{"/": true, "/livez": true, "/readyz": true, "/healthz": true}

// admit refuses requests for another host's name (DNS rebinding) while the server
// listens on loopback only, requests that a page of another site made a browser
// send, and requests without the token if one is set.
func (s *server) admit(c echo.Context) error {
	request, path := c.Request(), c.Path()
	switch {
	case !s.ours(request.Host) && !s.passedOn(request):
		return newFault(http.StatusMisdirectedRequest, "This server does not answer for the host %q: use localhost, or start it with that name as -host.", request.Host)
	case public[path]:
		return nil
	case request.Header.Get("Sec-Fetch-Site") == "cross-site":
		return newFault(http.StatusForbidden, "This server does not answer requests that a page of another site sends.")
	case s.token == "" || path == "/openapi.json": // which holds no secret
		return nil
	}
	return s.authorize(c)
}

// ours reports whether a Host header names this server.
func (s *server) ours(host string) bool {
	if len(s.ownHosts) == 0 || host == "" {
		return true
	}
	name := (&url.URL{Host: strings.ToLower(host)}).Hostname() // without port and brackets
	return slices.Contains(s.ownHosts, name)
}

// readMethods are the methods that the read token allows.
var readMethods = []string{http.MethodGet, http.MethodHead, http.MethodOptions}

// authorize requires the token, or for harmless methods one of the two tokens.
func (s *server) authorize(c echo.Context) error {
	scheme, given, _ := strings.Cut(c.Request().Header.Get(echo.HeaderAuthorization), " ")
	hash := sha256.Sum256([]byte(given)) // so that both lengths are equal when compared
	mayPlace := subtle.ConstantTimeCompare(hash[:], s.tokenHash[:]) == 1
	reads := mayPlace || s.readToken != "" && subtle.ConstantTimeCompare(hash[:], s.readTokenHash[:]) == 1
	switch {
	case !reads || !strings.EqualFold(scheme, "Bearer"):
		c.Response().Header().Set(echo.HeaderWWWAuthenticate, `Bearer realm="orderd"`)
		return newFault(http.StatusUnauthorized, "Send the server's token as Authorization: Bearer <token>.")
	case !mayPlace && !slices.Contains(readMethods, c.Request().Method):
		return newFault(http.StatusForbidden, "This token may only read: send the one that may place orders.")
	}
	return nil
}

// ---- Creates. ----

// createOrder answers once the order is on disk.
func (s *server) createOrder(c echo.Context, l *localOrders) error {
	request := c.Request()
	if kind, _, err := mime.ParseMediaType(request.Header.Get(echo.HeaderContentType)); err != nil || kind != echo.MIMEApplicationJSON {
		return newFault(http.StatusUnsupportedMediaType, "Send the order as Content-Type: application/json.")
	}
	key, err := idempotencyKey(request.Header["Idempotency-Key"])
	if err != nil {
		return err
	}
	body, err := readBody(c)
	if err != nil {
		return err
	}
	if tcp, ok := request.Context().Value(connKey{}).(*conn); ok {
		tcp.unwatched.Store(true)
	}
	o, err := decodeCreate(body)
	if err != nil {
		return err
	}
	o.key = key
	if err := l.store.create(o); err != nil {
		return err
	}
	id := o.id.String()
	header := c.Response().Header()
	header[echo.HeaderLocation] = []string{"/orders/" + id}
	if o.replayed {
		header.Set("Idempotent-Replayed", "true")
	}
	// The JSON is made by hand, as in getOrder, because these two answers are the most
	// frequent ones and an ID needs no escaping.
	return c.JSONBlob(http.StatusCreated, []byte(`{"message":"Order created","order_id":"`+id+`"}`+"\n"))
}

func readBody(c echo.Context) ([]byte, error) {
	request := c.Request()
	if request.ContentLength > maxBody {
		if request.ProtoMajor == 1 {
			c.Response().Header().Set(echo.HeaderConnection, "close") // else net/http would wait for the body
		}
		return nil, unreadable(&http.MaxBytesError{Limit: maxBody})
	}
	// MaxBytesReader can close the connection only if it gets net/http's own writer.
	body, err := io.ReadAll(http.MaxBytesReader(c.Response().Writer, request.Body, maxBody))
	if err != nil {
		return nil, unreadable(err)
	}
	return body, nil
}

// unreadable returns the fault that says why a body did not arrive whole.
func unreadable(err error) error {
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return newFault(http.StatusRequestEntityTooLarge, "The body is larger than %d bytes.", tooLarge.Limit)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return newFault(http.StatusRequestTimeout, "The body did not arrive in time.")
	}
	return newFault(http.StatusBadRequest, "The body did not arrive whole: its length or its chunks are not as announced.")
}

var quotedString = regexp.MustCompile(`^"(?:[^"\\]|\\["\\])*"$`)

// idempotencyKey reads the header Idempotency-Key: either a quoted string, as in the
// IETF draft, or the bare key that most clients send. The draft:
// https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/.
func idempotencyKey(values []string) (string, error) {
	if len(values) == 0 {
		return "", nil
	}
	key, wellFormed := values[0], len(values) == 1
	if strings.HasPrefix(key, `"`) {
		wellFormed = wellFormed && quotedString.MatchString(key)
		key = strings.NewReplacer(`\\`, `\`, `\"`, `"`).Replace(strings.TrimSuffix(key[1:], `"`))
	}
	unprintable := func(r rune) bool { return r < ' ' || r > '~' }
	if !wellFormed || key == "" || len(key) > maxKey || strings.ContainsFunc(key, unprintable) {
		return "", newFault(http.StatusBadRequest, "Idempotency-Key must be given once, with 1 to %d printable ASCII characters, bare or as a quoted string.", maxKey)
	}
	return key, nil
}

// decodeCreate reads a body into an order. A body that is not a single JSON object
// is a 400; one 422 lists everything that is wrong with its fields.
func decodeCreate(body []byte) (*creation, error) {
	var members map[string]json.RawMessage // a map tells upper from lower case in names, a struct does not
	if !utf8.Valid(body) || json.Unmarshal(body, &members) != nil || members == nil {
		return nil, newFault(http.StatusBadRequest, "The body must be one JSON object in UTF-8, such as "+
			`{"user_id": "user123", "item_ids": "item1,item2", "total_amount": 99.99}.`)
	}
	o := &creation{}
	known := [...]struct {
		name  string
		parse func(json.RawMessage, complain)
	}{{"user_id", o.parseUserID}, {"item_ids", o.parseItemIDs}, {"total_amount", o.parseAmount}}
	var problems []fieldError
	count := len(members)
	for _, field := range known {
		bad := func(format string, args ...any) {
			problems = append(problems, fieldError{field.name, fmt.Sprintf(format, args...)})
		}
		if value, ok := members[field.name]; ok {
			field.parse(value, bad)
			delete(members, field.name)
		} else {
			bad("is missing")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(members)) { // the names that are left are unknown
		problems = append(problems, fieldError{name, "is not a field of an order: the fields are user_id, item_ids and total_amount"})
	}
	for _, name := range repeated(body, count) {
		problems = append(problems, fieldError{name, "is given more than once"})
	}
	if len(problems) > 0 {
		f := newFault(http.StatusUnprocessableEntity, "The order was not taken: see errors for what is wrong with its fields.")
		f.Errors = problems
		return nil, f
	}
	return o, nil
}

// repeated lists the names that a valid JSON object has more than once. different
// is the number of its different names.
func repeated(object []byte, different int) (names []string) {
	// A colon follows each name, so without more colons than different names none is
	// repeated. This saves reading again, which costs a twentieth of a create.
	if bytes.Count(object, []byte(":")) == different {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(object))
	dec.Token() // the opening brace
	seen := map[string]int{}
	for dec.More() {
		name, _ := dec.Token()
		var value json.RawMessage
		if dec.Decode(&value) != nil {
			break
		}
		if seen[name.(string)]++; seen[name.(string)] == 2 {
			names = append(names, name.(string))
		}
	}
	return names
}

// unquote reads a valid JSON string. whole is false if the string has an escape for
// half a character, such as \ud800, which encoding/json replaces by U+FFFD.
func unquote(value json.RawMessage) (text string, whole bool) {
	if bytes.IndexByte(value, '\\') < 0 {
		return string(value[1 : len(value)-1]), true
	}
	json.Unmarshal(value, &text)
	escapes := bytes.ToLower(bytes.ReplaceAll(value, []byte(`\\`), nil))
	meant := bytes.Count(value, []byte("\uFFFD")) + bytes.Count(escapes, []byte(`\ufffd`))
	return text, strings.Count(text, "\uFFFD") == meant
}

// complain records what is wrong with a field.
type complain func(format string, args ...any)

func (c *creation) parseUserID(value json.RawMessage, bad complain) {
	text, ok := plainText(value, bad)
	c.userID = strings.TrimSpace(text)
	if ok && (c.userID == "" || len(c.userID) > maxUserID) {
		bad("must be 1 to %d bytes without the spaces around it, not %d", maxUserID, len(c.userID))
	}
}

func (c *creation) parseItemIDs(value json.RawMessage, bad complain) {
	text, ok := plainText(value, bad)
	if !ok {
		return
	}
	if len(text) > maxItemIDs {
		bad("must be at most %d bytes, not %d", maxItemIDs, len(text))
	}
	items := strings.Split(text, ",")
	if len(items) > maxItems {
		bad("must be at most %d items, not %d", maxItems, len(items))
	}
	for i, item := range items {
		if items[i] = strings.TrimSpace(item); items[i] == "" {
			bad("must be items separated by commas, but item %d is empty", i+1)
			return
		}
	}
	c.itemIDs = strings.Join(items, ",")
}

func (c *creation) parseAmount(value json.RawMessage, bad complain) {
	if kind := kindOf(value); kind != "a number" {
		bad("must be a number, not %s", kind)
		return
	}
	var err error
	if c.cents, err = parseCents(string(value)); err != nil {
		bad("%v", err)
	}
}

// plainText reads a string, and complains if it has control characters (Unicode's
// category Cc) or half a character. ok is false only if value is not a string.
func plainText(value json.RawMessage, bad complain) (text string, ok bool) {
	if kind := kindOf(value); kind != "a string" {
		bad("must be a string, not %s", kind)
		return "", false
	}
	text, whole := unquote(value)
	if !whole {
		bad("must be Unicode text, but has an escape for half of a surrogate pair")
	}
	if i := strings.IndexFunc(text, unicode.IsControl); i >= 0 {
		bad("must not contain control characters, but has one at byte %d", i)
	}
	return text, true
}

// kindOf names the type of a valid JSON value.
func kindOf(value json.RawMessage) string {
	switch value[0] {
	case '{':
		return "an object"
	case '[':
		return "an array"
	case '"':
		return "a string"
	case 't', 'f':
		return "a boolean"
	case 'n':
		return "null"
	}
	return "a number"
}

// parseCents reads a JSON number exactly, from its digits.
func parseCents(number string) (int64, error) {
	mantissa, exponent := number, 0
	if i := strings.IndexAny(number, "eE"); i >= 0 {
		mantissa = number[:i]
		exponent, _ = strconv.Atoi(number[i+1:]) // if out of range, the int nearest to it
		exponent = min(max(exponent, -maxBody*2), maxBody*2)
	}
	mantissa, negative := strings.CutPrefix(mantissa, "-")
	whole, fraction, _ := strings.Cut(mantissa, ".")
	digits := strings.TrimRight(whole+fraction, "0")
	zeros := len(whole) + exponent + 2 - len(digits) // how many to append to digits to get cents
	digits = strings.TrimLeft(digits, "0")
	switch {
	case digits == "":
		return 0, nil
	case negative:
		return 0, errors.New("must be 0 or more")
	case zeros < 0:
		return 0, errors.New("must have at most two decimals")
	}
	cents, err := strconv.ParseInt(digits+strings.Repeat("0", zeros), 10, 64)
	if err != nil || cents > maxCents {
		return 0, fmt.Errorf("must be at most %s", (&order{cents: maxCents}).amount())
	}
	return cents, nil
}

// ---- Reads of one order and of lists. ----

// getOrder answers from memory, or on a miss from one indexed row; with
// view=full always from the row. With Prefer: wait it holds the answer until the
// order is Completed, the wait is over, or the service stops.
func (s *server) getOrder(c echo.Context, l *localOrders) error {
	id, err := ulid.ParseStrict(c.Param("order_id"))
	if err != nil {
		return errNotFound
	}
	full, err := fullView(c.Request().URL.RawQuery)
	if err != nil {
		return err
	}
	if wait, ok := preferredWait(c.Request().Header["Prefer"]); ok && l.pool.stopping.Err() == nil {
		ctx, cancel := context.WithTimeout(c.Request().Context(), wait)
		defer cancel()
		defer context.AfterFunc(l.pool.stopping, cancel)()
		if err := l.store.wait(ctx, id); err != nil {
			return err
		}
		c.Response().Header().Set("Preference-Applied", fmt.Sprintf("wait=%d", wait/time.Second))
	}
	if full {
		return wholeOrder(c, l.store, id)
	}
	st, err := l.store.status(id)
	if err != nil {
		return err
	}
	header := c.Response().Header()
	header[echo.HeaderCacheControl], header[echo.HeaderContentType] = noStore, typeJSON
	return c.JSONBlob(http.StatusOK, []byte(`{"order_id":"`+id.String()+`","status":"`+st.String()+`"}`+"\n"))
}

// Values of headers, made once.
var noStore, typeJSON = []string{"no-store"}, []string{echo.MIMEApplicationJSON}

// fullView reads the parameter view. It ignores other parameters, even unreadable ones.
func fullView(query string) (full bool, err error) {
	for pair := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(pair, "=")
		if name, err := url.QueryUnescape(name); err != nil || name != "view" {
			continue
		}
		if value, err := url.QueryUnescape(value); err != nil || value != "full" || full {
			return false, newFault(http.StatusBadRequest, "view must be given once and be full; leave it out for the status alone.")
		}
		full = true
	}
	return full, nil
}

func wholeOrder(c echo.Context, s *store, id ulid.ULID) error {
	o, err := s.get(id)
	if err != nil {
		return err
	}
	c.Response().Header()[echo.HeaderCacheControl] = noStore
	answerJSON(c, http.StatusOK, echo.MIMEApplicationJSON, newOrderDocument(o))
	return nil
}

// listElements matches each element of a header that is a list; a comma in quotes
// belongs to its element. waitPreference matches the element of Prefer that asks to wait.
var (
	listElements   = regexp.MustCompile(`(?:[^,"]|"(?:[^"\\]|\\.)*"?)+`)
	waitPreference = regexp.MustCompile(`^\s*(?i:wait)\s*=\s*(?:(\d+)|"(\d+)")\s*(?:;.*)?$`)
)

// preferredWait reads the wait preference of RFC 7240, section 4.3. The first
// readable one counts.
func preferredWait(values []string) (wait time.Duration, ok bool) {
	for _, preference := range listElements.FindAllString(strings.Join(values, ","), -1) {
		if m := waitPreference.FindStringSubmatch(preference); m != nil {
			seconds, _ := strconv.ParseUint(m[1]+m[2], 10, 64) // if out of range, the largest
			return time.Duration(min(seconds, uint64(maxWait/time.Second))) * time.Second, true
		}
	}
	return 0, false
}

// orderDocument is a whole order as the API shows it.
type orderDocument struct {
	OrderID     string      `json:"order_id"`
	UserID      string      `json:"user_id"`
	ItemIDs     string      `json:"item_ids"`
	TotalAmount json.Number `json:"total_amount"`
	Status      string      `json:"status"`
	CreatedAt   string      `json:"created_at"`
	StartedAt   *string     `json:"started_at"`   // null until the order is Processing
	CompletedAt *string     `json:"completed_at"` // null until the order is Completed
}

func newOrderDocument(o order) orderDocument {
	d := orderDocument{
		OrderID: o.id.String(), UserID: o.userID, ItemIDs: o.itemIDs,
		TotalAmount: o.amount(), Status: o.status.String(), CreatedAt: timestamp(int64(o.id.Time())),
	}
	if o.status >= processing {
		d.StartedAt = new(timestamp(o.startedMS))
	}
	if o.status == completed {
		d.CompletedAt = new(timestamp(o.startedMS + o.tookMicros/1000))
	}
	return d
}

// listOrders answers with a page, newest first. The cursor is the ID of the page's
// last order, so that pages stay right while orders arrive.
func (s *server) listOrders(c echo.Context, l *localOrders) error {
	query, err := url.ParseQuery(c.Request().URL.RawQuery)
	if err != nil {
		return badQuery("the query cannot be read: %v", err)
	}
	f, err := parseFilter(query)
	if err != nil {
		return err
	}
	found, err := l.store.list(f)
	if err != nil {
		return err
	}
	answer := struct {
		Orders []orderDocument `json:"orders"`
		Next   *string         `json:"next"`
	}{Orders: make([]orderDocument, 0, len(found.orders))}
	if !found.next.IsZero() {
		query.Set("before", found.next.String())
		answer.Next = new("/orders?" + query.Encode())
	}
	for _, o := range found.orders {
		answer.Orders = append(answer.Orders, newOrderDocument(o))
	}
	c.Response().Header()[echo.HeaderCacheControl] = noStore
	answerJSON(c, http.StatusOK, echo.MIMEApplicationJSON, answer)
	return nil
}

func badQuery(format string, args ...any) error {
	return newFault(http.StatusBadRequest, "The list was not read: "+format+".", args...)
}

// parseFilter reads what a list asks for; every parameter may be given once.
func parseFilter(query url.Values) (filter, error) {
	f := filter{before: math.MaxInt64, limit: defaultPage}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		values := query[name]
		value := values[0]
		if len(values) > 1 {
			return f, badQuery("%s is given more than once", name)
		}
		switch name {
		case "limit":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 || n > maxPage || strconv.Itoa(n) != value {
				return f, badQuery("limit must be a whole number from 1 to %d, not %q", maxPage, value)
			}
			f.limit = n
		case "status":
			i := slices.Index(statusNames[:], value)
			if i < 0 {
				return f, badQuery("status must be Pending, Processing or Completed, not %q", value)
			}
			f.status = new(status(i))
		case "user_id":
			f.userID = strings.TrimSpace(value)
			if f.userID == "" || len(f.userID) > maxUserID || !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl) {
				return f, badQuery("user_id must be 1 to %d bytes of text without control characters, not %q", maxUserID, value)
			}
		case "before":
			id, err := ulid.ParseStrict(value)
			if err != nil {
				return f, badQuery("before must be the ID of an order, not %q", value)
			}
			if f.before = high(id); f.before < 0 { // a time that no order can have
				f.before = math.MaxInt64
			}
		default:
			return f, badQuery("%q is not one of the parameters limit, status, user_id and before", name)
		}
	}
	return f, nil
}

// ---- Metrics, health, the page. ----

// getMetrics answers with the summary of the orders in JSON, or with this process's
// metrics in Prometheus's format. With ?of=leader, which our page uses, the latter are
// those of the leader.
func (s *server) getMetrics(c echo.Context) error {
	header := c.Response().Header()
	header[echo.HeaderCacheControl] = noStore
	header[echo.HeaderVary] = []string{echo.HeaderAccept}
	text := func(c echo.Context, _ *localOrders) error { // of this process, whether it leads or not
		return c.Blob(http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", s.prometheus())
	}
	switch {
	case !prefersText(c.Request().Header.Values(echo.HeaderAccept)):
		return s.localOrForwarded(s.summary)(c)
	case c.QueryParam("of") == "leader":
		return s.localOrForwarded(text)(c)
	}
	return text(c, nil)
}

func (s *server) summary(c echo.Context, l *localOrders) error {
	t, err := l.store.showableTotals()
	if err != nil {
		return err
	}
	answerJSON(c, http.StatusOK, echo.MIMEApplicationJSON, s.metrics.summarize(t))
	return nil
}

// prefersText reports whether an Accept header ranks Prometheus's text format
// above JSON. For each format the most specific range counts (RFC 9110, section 12.5.1).
func prefersText(accept []string) bool {
	qualities := map[string]float64{} // by range
	for _, element := range listElements.FindAllString(strings.Join(accept, ","), -1) {
		kind, params, err := mime.ParseMediaType(element)
		q, qErr := strconv.ParseFloat(cmp.Or(params["q"], "1"), 64)
		if cmp.Or(err, qErr) == nil && (kind != "text/plain" || cmp.Or(params["version"], "0.0.4") == "0.0.4") {
			qualities[kind] = max(qualities[kind], q)
		}
	}
	quality := func(ranges ...string) float64 {
		for _, r := range ranges {
			if q, ok := qualities[r]; ok {
				return q
			}
		}
		return 0
	}
	return quality("text/plain", "text/*", "*/*") > quality(echo.MIMEApplicationJSON, "application/*", "*/*")
}

// prometheus is the answer of GET /metrics to a machine.
func (s *server) prometheus() []byte {
	var e exposition
	e.single("orderd_ready", "gauge", "1 while /readyz says ready, else 0.", oneIf(s.ready() == nil))
	for _, g := range s.gauges() {
		e.single(g.name, "gauge", g.help, g.value)
	}
	if l := s.local.Load(); l != nil {
		s.ordersMetrics(&e, l)
	}
	e.buckets("orderd_create_seconds", "Time to answer POST /orders.", &s.createTimes)
	e.buckets("orderd_read_seconds", "Time to answer GET /orders/:order_id, of requests that were not asked to wait.", &s.readTimes)
	e.family("orderd_http_requests_total", "counter", "Requests by method, route and status.")
	for _, name := range slices.Sorted(maps.Keys(s.routes)) {
		r := s.routes[name]
		for code := range r.statuses {
			if n := r.statuses[code].Load(); n > 0 {
				e.sample("orderd_http_requests_total", fmt.Sprintf(`{method="%s",route="%s",status="%d"}`, r.method, r.path, code), float64(n))
			}
		}
	}
	e.single("orderd_log_lines_dropped_total", "counter", "Log lines lost to a full buffer or a failing disk.", float64(s.log.dropped.Load()))
	e.family("orderd_build_info", "gauge", "Always 1; the labels tell the build.")
	version, commit := buildInfo()
	e.sample("orderd_build_info", fmt.Sprintf(`{version="%s",commit="%s",goversion="%s"}`, version, commit, runtime.Version()), 1)
	e.process()
	return e.text
}

// ordersMetrics adds the metrics of the orders and of the work on them.
func (s *server) ordersMetrics(e *exposition, l *localOrders) {
	t, cache := l.store.publishedTotals(), l.store.cache
	sum := s.metrics.summarize(t)
	e.single("orderd_orders_processed_total", "counter", "Orders ever processed, as counted in metrics.db.", float64(sum.TotalOrdersProcessed))
	e.single("orderd_orders_accepted_total", "counter", "Orders ever accepted.", float64(t.accepted))
	e.single("orderd_orders_removed_total", "counter", "Completed orders removed by -keep.", float64(t.removed))
	e.family("orderd_orders", "gauge", "Orders stored, by status.")
	for st, n := range []int64{sum.OrdersPending, sum.OrdersProcessing, sum.OrdersCompleted} {
		e.sample("orderd_orders", fmt.Sprintf(`{status="%s"}`, status(st)), float64(n))
	}
	e.buckets("orderd_processing_seconds", "Time from start to completion, of orders since this start.", &l.pool.durations)
	e.single("orderd_oldest_pending_seconds", "gauge", "Age of the oldest Pending order, 0 without one, NaN where the orders cannot be read.", oldestPending(l.store))
	e.single("orderd_queue_length", "gauge", "Orders in the channel between feeder and pool.", float64(len(l.pool.channel)))
	e.single("orderd_queue_capacity", "gauge", "Places in that channel.", float64(cap(l.pool.channel)))
	e.single("orderd_attempts_failed_total", "counter", "Attempts at an order that failed since this start.", float64(l.pool.failed.Load()))
	e.single("orderd_orders_parked", "gauge", "Orders in a pause after a failed attempt.", float64(l.pool.parked.len()))
	if l.pool.endpoint.url != "" {
		shut, _ := l.pool.gate.state()
		e.single("orderd_endpoint_down", "gauge", "1 while the endpoint is in trouble and the pool pauses, else 0.", oneIf(shut))
	}
	e.single("orderd_cache_entries", "gauge", "Order statuses in memory.", float64(cache.len()))
	e.single("orderd_cache_hits_total", "counter", "Status reads answered from memory.", float64(cache.hits.Load()))
	e.single("orderd_cache_misses_total", "counter", "Status reads that went to the table.", float64(cache.misses.Load()))
	e.buckets("orderd_commit_operations", "Creates and steps in one commit of orders.", &s.metrics.commitSizes)
	e.buckets("orderd_commit_seconds", "Time of one commit of orders, until it is durable.", &s.metrics.commitTimes)
	e.single("orderd_clock_behind_seconds", "gauge", "How far the newest order's time is ahead of the clock, 0 where it is not.", l.store.clockBehind().Seconds())
}

// oldestPending returns the age of the oldest Pending order in seconds, or 0 without
// one: the ID that oldest returns then lies in the future.
func oldestPending(s *store) float64 {
	first, err := s.oldest(pending)
	if err != nil {
		return math.NaN()
	}
	return max(0, time.Since(time.UnixMilli(first>>16)).Seconds())
}

// getLive says that the process answers.
func (s *server) getLive(c echo.Context) error { return c.String(http.StatusOK, "ok\n") }

func (s *server) getReady(c echo.Context) error {
	if err := s.ready(); err != nil {
		return err
	}
	return c.String(http.StatusOK, "ready\n")
}

// ready returns why creates are not taken now, or soon will not be; else nil.
func (s *server) ready() error {
	l := s.local.Load()
	switch {
	case l == nil:
		return s.forwarder.ready()
	case l.pool.stopping.Err() != nil:
		return errStopping
	}
	err := l.store.ready()
	if errors.Is(err, errStalled) {
		return newFault(http.StatusServiceUnavailable, "Orders wait now: %v.", err)
	}
	if err != nil {
		return newFault(http.StatusServiceUnavailable, "Orders are refused now: %v.", err)
	}
	return nil
}

// servePage serves the only page. The page's Content-Security-Policy allows its own
// script and style by their hashes, and requests to this server only.
func (s *server) servePage(c echo.Context) error {
	header := c.Response().Header()
	header.Set(echo.HeaderContentSecurityPolicy, pagePolicy)
	header.Set(echo.HeaderXContentTypeOptions, "nosniff")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set(echo.HeaderCacheControl, "no-cache")
	return c.HTMLBlob(http.StatusOK, pageHTML)
}

var pagePolicy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; script-src " +
	inlineHash("script") + "; style-src " + inlineHash("style")

// inlineHash returns the CSP source that allows the page's only element of that name.
func inlineHash(element string) string {
	_, rest, _ := bytes.Cut(pageHTML, []byte("<"+element+">"))
	text, _, _ := bytes.Cut(rest, []byte("</"+element+">"))
	hash := sha256.Sum256(text)
	return "'sha256-" + base64.StdEncoding.EncodeToString(hash[:]) + "'"
}

func (s *server) openAPI(c echo.Context) error { return c.JSONBlob(http.StatusOK, apiJSON) }

// ---- Passing requests on to the leader. ----

// passHeader carries the leader's pass in a request that a replica passes on.
// A replica never passes such a request on again.
const passHeader = "Orderd-Passed-On"

var errStopping = newFault(http.StatusServiceUnavailable, "The server is stopping; it answers until running work has ended.")

// errNoLeader says that a request has not reached a leader.
var errNoLeader = errors.New("no replica leads that this one can reach")

// forwarder passes requests on to the leader. app.takeTurns has replica.standBy call
// setLeader.
type forwarder struct {
	transport *http.Transport
	buffers   sync.Pool
	target    atomic.Pointer[destination] // nil while no leader is known
	stopping  context.Context             // done when this replica stops, which ends requests with Prefer
	stop      context.CancelFunc
}

// destination is a leader during its term.
type destination struct {
	address string   // as setLeader got it
	url     *url.URL // the parsed address
	pass    string
	gone    context.Context // done when this leader no longer leads, which ends requests to it
	leave   context.CancelFunc
}

func newForwarder() *forwarder {
	f := &forwarder{
		transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: time.Second}).DialContext,
			TLSHandshakeTimeout: time.Second,
			// Above the longest wait, so that only a leader whose packets are lost exceeds it.
			ResponseHeaderTimeout: maxWait + 10*time.Second,
			MaxIdleConnsPerHost:   1024,
			IdleConnTimeout:       time.Minute, // below the leader's, so that no request uses a connection that the leader is closing
			DisableCompression:    true,
		},
		buffers: sync.Pool{New: func() any { return new([32 << 10]byte) }},
	}
	f.stopping, f.stop = context.WithCancel(context.Background())
	return f
}

// Get and Put make forwarder an httputil.BufferPool.
func (f *forwarder) Get() []byte  { return f.buffers.Get().(*[32 << 10]byte)[:] }
func (f *forwarder) Put(b []byte) { f.buffers.Put((*[32 << 10]byte)(b)) }

// setLeader takes the leader's address and pass, or "" for no leader. It has one caller.
func (f *forwarder) setLeader(address, pass string) {
	old := f.target.Load()
	if old == nil && address == "" || old != nil && old.pass == pass && old.address == address {
		return
	}
	var next *destination
	if u, err := url.Parse(address); err == nil && address != "" {
		next = &destination{address: address, url: u, pass: pass}
		next.gone, next.leave = context.WithCancel(context.Background())
	}
	f.target.Store(next)
	if old != nil {
		old.leave()
	}
}

// ready returns errNoLeader if requests cannot be passed on.
func (f *forwarder) ready() error {
	if f.target.Load() == nil {
		return errNoLeader
	}
	return nil
}

// forward answers with the leader's answer. Without one it returns errOutcomeUnknown
// if the leader may have got a create, else errNoLeader.
func (f *forwarder) forward(w http.ResponseWriter, r *http.Request, body []byte, client string) error {
	leader := f.target.Load()
	if leader == nil || r.Header.Get(passHeader) != "" {
		return errNoLeader
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(leader.gone, cancel)()
	if r.Method != http.MethodPost && len(r.Header["Prefer"]) > 0 {
		defer context.AfterFunc(f.stopping, cancel)()
	}
	var maybeSent atomic.Bool
	var failed error
	proxy := httputil.ReverseProxy{
		Transport:  f.transport,
		BufferPool: f,
		Rewrite: func(p *httputil.ProxyRequest) { // ReverseProxy has removed the client's own X-Forwarded headers
			p.SetURL(leader.url)
			p.SetXForwarded()
			if host, _, err := net.SplitHostPort(client); err == nil {
				client = host
			}
			p.Out.Header.Set("X-Forwarded-For", client)
			p.Out.Header.Set(passHeader, leader.pass)
			p.Out.Header.Del("Expect")             // the leader's 100 would be taken for the answer
			p.Out.URL.RawQuery = p.In.URL.RawQuery // including parameters that ReverseProxy cannot read and leaves out
			p.Out.Host = p.In.Host
		},
		ModifyResponse: func(answer *http.Response) error {
			for name := range w.Header() {
				answer.Header.Del(name) // this replica has set that header already
			}
			return nil
		},
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) {
			failed = fmt.Errorf("%w: %w", errNoLeader, err)
			switch {
			case r.Method == http.MethodPost && maybeSent.Load():
				failed = fmt.Errorf("%w: %w", errOutcomeUnknown, err)
			case f.stopping.Err() != nil:
				failed = errStopping
			}
		},
	}
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { maybeSent.Store(true) }}
	r = r.WithContext(httptrace.WithClientTrace(ctx, trace))
	r.Body, r.ContentLength, r.TransferEncoding = io.NopCloser(bytes.NewReader(body)), int64(len(body)), nil
	proxy.ServeHTTP(w, r)
	return failed
}

// ---- Errors. ----

// fault is an error that the client is told in full, as a problem document (RFC 9457).
type fault struct {
	Type   string       `json:"type"`
	Title  string       `json:"title"`
	Status int          `json:"status"`
	Detail string       `json:"detail"`
	Errors []fieldError `json:"errors,omitempty"`
}

type fieldError struct {
	Field  string `json:"field"`
	Detail string `json:"detail"`
}

func newFault(status int, format string, args ...any) *fault {
	return &fault{Type: "about:blank", Title: http.StatusText(status), Status: status, Detail: fmt.Sprintf(format, args...)}
}

func (f *fault) Error() string { return f.Detail }

// faultOf is the one place where an error becomes a status. An unknown error
// becomes a 500 that does not tell its cause.
func faultOf(err error, c echo.Context) *fault {
	if f, ok := errors.AsType[*fault](err); ok {
		return f
	}
	path := c.Request().URL.Path
	switch {
	case errors.Is(err, errNotFound):
		return newFault(http.StatusNotFound, "There is no order with this ID.")
	case errors.Is(err, errKeyReused):
		return newFault(http.StatusUnprocessableEntity, "This Idempotency-Key has already created an order with other content: use a new key for a new order.")
	case errors.Is(err, errOutcomeUnknown):
		f := newFault(http.StatusServiceUnavailable, "The order may or may not have been taken: what it was written to, or the way there, failed meanwhile. Ask again with the same Idempotency-Key once the service is back.")
		f.Type = "urn:orderd:problem:outcome-unknown"
		return f
	case errors.Is(err, errNoLeader) && c.Request().Method == http.MethodPost:
		return newFault(http.StatusServiceUnavailable, "This request was not taken: %v. Try again later.", errNoLeader)
	case errors.Is(err, errNoLeader):
		return newFault(http.StatusServiceUnavailable, "There is no answer now: %v. Try again later.", errNoLeader)
	case errors.Is(err, errBusy), errors.Is(err, errUnwritable), errors.Is(err, errClosed), errors.Is(err, errInDoubt):
		return newFault(http.StatusServiceUnavailable, "This request was not taken: %v. Try again later.", err)
	case errors.Is(err, errRejected):
		return newFault(http.StatusInternalServerError, "The order was not taken: the database refuses it; the cause is in the server's log under this X-Request-Id.")
	case errors.Is(err, errBehind), errors.Is(err, errSilent), errors.Is(err, errDeposed):
		return newFault(http.StatusServiceUnavailable, "The answer is not certain now: the database has not confirmed it. Try again later.")
	case errors.Is(err, echo.ErrNotFound):
		return newFault(http.StatusNotFound, "There is nothing at %s.", path)
	case errors.Is(err, echo.ErrMethodNotAllowed):
		return newFault(http.StatusMethodNotAllowed, "%s does not take %s; see the Allow header.", path, c.Request().Method)
	}
	return newFault(http.StatusInternalServerError, "The server failed to answer; the cause is in its log under this X-Request-Id.")
}

// problem answers a request with the problem document for err.
func (s *server) problem(err error, c echo.Context) {
	f := faultOf(err, c)
	header := c.Response().Header()
	if f.Status == http.StatusInternalServerError {
		s.log.Error("a request failed", "id", header.Get(echo.HeaderXRequestID), "error", err)
	}
	if c.Response().Committed {
		return
	}
	if f.Status == http.StatusServiceUnavailable {
		header.Set(echo.HeaderRetryAfter, "1") // second
	}
	readRest(c.Request())
	answerJSON(c, f.Status, "application/problem+json", f)
}

// readRest reads the rest of a refused request's body if the connection closes after
// this request, as nginx asks by default. To close it before the body has arrived would
// reset it, and nginx would answer 502 (RFC 9112, section 9.6). On a connection that
// stays open, net/http reads the rest itself.
func readRest(r *http.Request) {
	if r.Close && r.ContentLength <= maxRefused && r.Header.Get("Expect") == "" {
		io.CopyN(io.Discard, r.Body, maxRefused)
	}
}

// answerJSON writes JSON without HTML escapes. It returns no error, because only the
// way to the client can fail.
func answerJSON(c echo.Context, status int, contentType string, v any) {
	c.Response().Header().Set(echo.HeaderContentType, contentType)
	c.Response().WriteHeader(status)
	enc := json.NewEncoder(c.Response())
	enc.SetEscapeHTML(false)
	enc.Encode(v)
}
