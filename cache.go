package main

import (
	"sync"
	"sync/atomic"

	"github.com/oklog/ulid/v2"
)

// cache holds the statuses of the newest orders. Keys and values hold no
// pointers, so the garbage collector never scans it (16-byte keys, 1-byte
// values, and a 16-byte ring entry each). A status in it only moves forward.
type cache struct {
	mu       sync.RWMutex // guards everything up to the blank line
	statuses map[ulid.ULID]status
	ring     []ulid.ULID // the keys in order of arrival, the oldest at next once full
	next     int
	watchers map[ulid.ULID]*watcher

	hits, misses atomic.Int64
}

// watcher is everyone who waits for one order.
type watcher struct {
	completed chan struct{} // closed by apply
	waiting   int           // guarded by cache.mu
}

// newCache reserves the whole ring; the system gives it memory as it fills.
func newCache(max int) *cache {
	return &cache{statuses: map[ulid.ULID]status{}, ring: make([]ulid.ULID, 0, max), watchers: map[ulid.ULID]*watcher{}}
}

func (c *cache) get(id ulid.ULID) (status, bool) {
	c.mu.RLock()
	s, ok := c.statuses[id]
	c.mu.RUnlock()
	if ok {
		c.hits.Add(1)
	} else {
		c.misses.Add(1)
	}
	return s, ok
}

func (c *cache) len() int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return len(c.statuses)
}

// apply takes over a batch that has just been committed.
func (c *cache) apply(b *batch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range b.creates {
		if n.stored() {
			c.set(n.id, pending)
		}
	}
	for _, st := range b.steps {
		if st.void {
			continue
		}
		c.set(st.id, st.to)
		if w := c.watchers[st.id]; w != nil && st.to == completed {
			close(w.completed)
			delete(c.watchers, st.id)
		}
	}
}

// learn takes over what a reader saw in the table. An entry moves forward, so
// that no later read of it falls behind that reader; a new entry is made only
// for Completed, which never changes: a slow reader can't bring back an old status.
func (c *cache) learn(id ulid.ULID, s status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.statuses[id]; ok || s == completed {
		c.set(id, s)
	}
}

// set needs c.mu.
func (c *cache) set(id ulid.ULID, s status) {
	old, ok := c.statuses[id]
	switch {
	case ok:
		s = max(s, old)
	case len(c.ring) < cap(c.ring):
		c.ring = append(c.ring, id)
	default:
		delete(c.statuses, c.ring[c.next])
		c.ring[c.next] = id
		c.next = (c.next + 1) % cap(c.ring)
	}
	c.statuses[id] = s
}

// watch returns a channel that is closed when the order completes after this
// call, and a function that ends the watch. Look at the status after it, or a
// completion in between is missed.
func (c *cache) watch(id ulid.ULID) (done <-chan struct{}, stop func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.watchers[id]
	if w == nil {
		w = &watcher{completed: make(chan struct{})}
		c.watchers[id] = w
	}
	w.waiting++
	return w.completed, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		w.waiting--
		if w.waiting == 0 && c.watchers[id] == w {
			delete(c.watchers, id)
		}
	}
}
