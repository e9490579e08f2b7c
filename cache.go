package main

import (
	"sync"
	"sync/atomic"

	"github.com/oklog/ulid/v2"
)

// status only moves forward. Its numbers are stored in the tables.
type status uint8

const (
	pending status = iota
	processing
	completed
)

var statusNames = [...]string{"Pending", "Processing", "Completed"}

func (s status) String() string { return statusNames[s] }

// final reports whether nothing comes after s.
func (s status) final() bool { return s == completed }

// change is an order's new status.
type change struct {
	id ulid.ULID
	to status
}

// cache holds the statuses of the newest orders. Keys and values hold no
// pointers, so the garbage collector never scans it. An order takes 17 bytes of
// the map and 8 of the ring. A status in it only moves forward.
type cache struct {
	hits, misses atomic.Int64

	mu          sync.RWMutex // guards the rest
	statuses    map[idHalf]entry
	ring        []idHalf // keys in order of arrival; once it is full, next is the oldest
	next        int
	watchers    map[ulid.ULID]*watcher
	lastRemoval int64 // seq of the last commit that removed orders
}

// idHalf is one half of an ID: the first tells orders apart, the second is random.
type idHalf [8]byte

func halves(id ulid.ULID) (first, second idHalf) { return idHalf(id[:8]), idHalf(id[8:]) }

type entry struct {
	second idHalf
	status status
}

// watcher is shared by everyone who waits for one order.
type watcher struct {
	final   chan struct{} // closed by apply
	waiting int           // guarded by cache.mu
}

// newCache allocates the whole ring; the operating system gives memory to its pages
// only as they are written.
func newCache(size int) *cache {
	return &cache{statuses: map[idHalf]entry{}, ring: make([]idHalf, 0, size), watchers: map[ulid.ULID]*watcher{}}
}

func (c *cache) get(id ulid.ULID) (status, bool) {
	first, second := halves(id)
	c.mu.RLock()
	e, ok := c.statuses[first]
	c.mu.RUnlock()
	if ok = ok && e.second == second; ok {
		c.hits.Add(1)
	} else {
		c.misses.Add(1)
	}
	return e.status, ok
}

func (c *cache) len() int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return len(c.statuses)
}

// apply records committed changes and wakes the watchers of final ones.
func (c *cache) apply(changes []change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ch := range changes {
		c.set(ch.id, ch.to)
		if w := c.watchers[ch.id]; w != nil && ch.to.final() {
			close(w.final)
			delete(c.watchers, ch.id)
		}
	}
}

// learn caches a status that was read at seq. It leaves out one that is not final,
// because that may have changed since, and one that was read before the last removal,
// which may have removed the order.
func (c *cache) learn(id ulid.ULID, s status, seq int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.final() && seq >= c.lastRemoval {
		c.set(id, s)
	}
}

// forget drops orders that the commit seq removed from the table.
func (c *cache) forget(ids []ulid.ULID, seq int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastRemoval = seq
	for _, id := range ids {
		first, _ := halves(id)
		delete(c.statuses, first) // its ring slot stays until it is overwritten
	}
}

// set stores a status, but never moves one back. The caller holds c.mu.
func (c *cache) set(id ulid.ULID, s status) {
	first, second := halves(id)
	old, ok := c.statuses[first]
	switch {
	case ok:
		s = max(s, old.status)
	case len(c.ring) < cap(c.ring):
		c.ring = append(c.ring, first)
	default:
		delete(c.statuses, c.ring[c.next])
		c.ring[c.next] = first
		c.next = (c.next + 1) % cap(c.ring)
	}
	c.statuses[first] = entry{second, s}
}

// watch returns a channel that is closed when the order becomes final after
// this call, and a function that ends the watch. The caller must read the status
// after calling watch, else it misses an earlier change.
func (c *cache) watch(id ulid.ULID) (final <-chan struct{}, stop func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.watchers[id]
	if w == nil {
		w = &watcher{final: make(chan struct{})}
		c.watchers[id] = w
	}
	w.waiting++
	return w.final, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		w.waiting--
		if w.waiting == 0 && c.watchers[id] == w {
			delete(c.watchers, id)
		}
	}
}
