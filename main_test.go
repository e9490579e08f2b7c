package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/stretchr/testify/require"
)

// newTestApp opens the whole service on real files and a free port, serves it,
// and takes it down at the end of the test.
func newTestApp(tb testing.TB, change func(*config)) *app {
	tb.Helper()
	a := openTestApp(tb, tb.TempDir(), change)
	return a
}

func testConfig(dir string) config {
	var cfg config
	cfg.flags()
	cfg.addr, cfg.data, cfg.log, cfg.delay = "127.0.0.1:0", dir+"/data", dir+"/logs/orderd.log", 0
	return cfg
}

// openTestApp is newTestApp on a directory that may hold an earlier one's files.
func openTestApp(tb testing.TB, dir string, change func(*config)) *app {
	tb.Helper()
	cfg := testConfig(dir)
	if change != nil {
		change(&cfg)
	}
	a, err := openApp(cfg, io.Discard)
	require.NoError(tb, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.serve(ctx) }()
	tb.Cleanup(func() {
		cancel()
		require.NoError(tb, <-ended)
	})
	return a
}

// ---- benchmarks ----

const exampleOrder = `{"user_id": "user123", "item_ids": "item1,item2", "total_amount": 99.99}`

// Requests are built once: the client costs two system calls and a scan.
func postRequest(body string) []byte {
	return fmt.Appendf(nil, "POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

func getRequest(id string) []byte {
	return fmt.Appendf(nil, "GET /orders/%s HTTP/1.1\r\nHost: localhost\r\n\r\n", id)
}

// floor is Echo with nothing behind it: it decodes the same request and
// answers the same bytes.
func floor(tb testing.TB) string {
	const id = "01M82P53T20003ZZE2RJ5B5TRM"
	e := echo.New()
	e.POST("/orders", func(c echo.Context) error {
		var order struct {
			UserID      string  `json:"user_id"`
			ItemIDs     string  `json:"item_ids"`
			TotalAmount float64 `json:"total_amount"`
		}
		if err := c.Bind(&order); err != nil {
			return err
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
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(tb, err)
	server := &http.Server{Handler: e}
	go server.Serve(listener)
	tb.Cleanup(func() { server.Close() })
	return listener.Addr().String()
}

// load is what one run of a client saw.
type load struct {
	rate      float64 // answers a second
	count     int64
	latencies []time.Duration // ascending
}

func (l load) p99() time.Duration { return l.latencies[len(l.latencies)*99/100] }

// hammer sends one request over and over on each of n connections, each
// waiting for its answer, and demands the same status of all.
func hammer(tb testing.TB, addr string, request []byte, n, status int, lasting time.Duration) load {
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
			for {
				sent := time.Now()
				if sent.Sub(start) > lasting {
					return
				}
				if _, err := conn.Write(request); err != nil {
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

// rounds is how often each side is measured, in turn; the median counts.
const rounds = 3

func roundTime() time.Duration {
	if testing.Short() {
		return 300 * time.Millisecond
	}
	return 3 * time.Second
}

func median[T interface{ ~int64 | ~float64 }](values []T) T {
	slices.Sort(values)
	return values[len(values)/2]
}

// BenchmarkCreate is POST /orders beside Echo's floor, every order driven on
// to Completed.
func BenchmarkCreate(b *testing.B) {
	for _, conns := range []int{256, 64, 1} {
		b.Run(fmt.Sprintf("conns=%d", conns), func(b *testing.B) {
			base := floor(b)
			a := newTestApp(b, nil)
			request := postRequest(exampleOrder)
			var accepted int64
			var floors, ours, ratios, tails, behind []float64
			for range rounds {
				f := hammer(b, base, request, conns, http.StatusCreated, roundTime())
				o := hammer(b, a.listener.Addr().String(), request, conns, http.StatusCreated, roundTime())
				left := a.store.totals.Load()
				behind = append(behind, float64(left.accepted-left.completed)/float64(o.count))
				accepted += o.count
				floors, ours = append(floors, f.rate), append(ours, o.rate)
				ratios = append(ratios, o.rate/f.rate)
				tails = append(tails, float64(o.p99())/float64(f.p99()))
				require.Eventually(b, func() bool { return a.metrics.counted.Load().completed == accepted }, 10*time.Second, time.Millisecond)
			}
			require.Equal(b, accepted, a.store.totals.Load().accepted)
			b.ReportMetric(median(floors), "floor/s")
			b.ReportMetric(median(ours), "orders/s")
			b.ReportMetric(median(ratios), "of-floor")
			b.ReportMetric(median(tails), "p99-of-floor")
			b.ReportMetric(median(behind), "behind")
			b.ReportMetric(0, "ns/op")
		})
	}
}
