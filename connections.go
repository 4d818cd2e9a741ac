// connections.go: the TCP connections that the listener serves, and what they
// may take: places in all and for one source, bytes of what is not
// authenticated yet, time. When something runs out, the connection that has
// waited longest without a valid request is closed.

package main

import (
	"bytes"
	"container/list"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// connection is one client. The first fields are its goroutine's; the others
// belong to connections.
type connection struct {
	net.Conn
	all    *connections
	source netip.Prefix
	// privileged tells root's connections from those of the ordinary users of
	// the same machine, which must not take its places.
	privileged bool
	linked     bool // beats come from the same source

	place *list.Element // among the waiting; nil when known or removed
	held  bool          // counted
	bytes int
}

func newConnection(conn net.Conn, all *connections) *connection {
	c := &connection{Conn: conn, all: all}
	if addr, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil {
		c.source, c.privileged = sourcePrefix(addr.Addr()), addr.Port() < privilegedPorts
	}
	return c
}

// sourcePrefix is what counts as one source: an IPv4 address, a /64 of IPv6,
// which is the least that one customer has.
func sourcePrefix(addr netip.Addr) netip.Prefix {
	addr = addr.Unmap().WithZone("")
	bits := 64
	if addr.Is4() {
		bits = 32
	}
	prefix, _ := addr.Prefix(bits) // fails for no address only
	return prefix
}

// connections is the table. Its methods close connections; their goroutines
// notice, and remove them.
type connections struct {
	closed atomic.Int64 // to make room

	mu        sync.Mutex
	waiting   *list.List // of *connection, without a valid request yet, oldest first
	bySource  map[netip.Prefix]int
	count     int
	strangers int // of count: not linked
	bytes     int
}

func newConnections() *connections {
	return &connections{waiting: list.New(), bySource: map[netip.Prefix]int{}}
}

// admit counts c in, making room if need be; false if there is none. kept are
// places that linked sources alone may have.
func (t *connections) admit(c *connection, limit, kept int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bySource[c.source] >= max(limit/4, 1) &&
		!t.evict(func(w *connection) bool { return w.source == c.source && !w.privileged }) &&
		!t.evict(func(w *connection) bool { return w.source == c.source && c.privileged }) {
		return false
	}
	stranger := func(w *connection) bool { return !w.linked }
	if !c.linked && t.strangers >= limit-kept && !t.evict(stranger) {
		return false
	}
	if t.count >= limit && !t.evict(stranger) && !(c.linked && t.evict(func(*connection) bool { return true })) {
		return false
	}
	c.held = true
	c.place = t.waiting.PushBack(c)
	t.bySource[c.source]++
	t.count++
	if !c.linked {
		t.strangers++
	}
	return true
}

// reserve accounts for n more bytes of c; false if c itself had to go.
func (t *connections) reserve(c *connection, n int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c.held && t.bytes+n > unknownBytes {
		// Who takes the most goes, the oldest of those: small requests pass.
		most := 0
		for element := t.waiting.Front(); element != nil; element = element.Next() {
			most = max(most, element.Value.(*connection).bytes)
		}
		if !t.evict(func(w *connection) bool { return w.bytes == most }) {
			break
		}
	}
	if !c.held {
		return false
	}
	c.bytes += n
	t.bytes += n
	return true
}

// evict closes the oldest waiting connection that which accepts.
func (t *connections) evict(which func(*connection) bool) bool {
	for element := t.waiting.Front(); element != nil; element = element.Next() {
		if c := element.Value.(*connection); which(c) {
			t.closed.Add(1)
			c.Close()
			t.release(c)
			return true
		}
	}
	return false
}

func (t *connections) closeOldest() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.evict(func(*connection) bool { return true })
}

// closeWaiting closes all that have sent no valid request: the listener ends.
func (t *connections) closeWaiting() {
	for t.closeOldest() {
	}
}

// release takes c out of all counts, once.
func (t *connections) release(c *connection) {
	if !c.held {
		return
	}
	c.held = false
	t.settle(c)
	t.count--
	if !c.linked {
		t.strangers--
	}
	if t.bySource[c.source]--; t.bySource[c.source] == 0 {
		delete(t.bySource, c.source)
	}
}

// settle ends c's waiting.
func (t *connections) settle(c *connection) {
	if c.place != nil {
		t.waiting.Remove(c.place)
		c.place = nil
	}
	t.bytes -= c.bytes
	c.bytes = 0
}

// remove closes c and gives its place back.
func (t *connections) remove(c *connection) {
	c.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.release(c)
}

func (t *connections) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count
}

// known says that c sent a valid request: it is not closed to make room.
func (c *connection) known() {
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	c.all.settle(c)
}

var (
	// errEmpty: the stream was closed and held nothing.
	errEmpty = errors.New("empty")
	// errSilent: nothing came, and the connection ended otherwise.
	errSilent = errors.New("silent")
)

// readRequest returns what comes before the first NUL. The buffer grows with
// what has come, never with what is announced.
func (c *connection) readRequest() ([]byte, error) {
	var buffer []byte
	for total := 0; ; {
		if len(buffer) == cap(buffer) {
			grown := min(max(2*cap(buffer), firstBuffer), requestLimit+1)
			if !c.all.reserve(c, grown-cap(buffer)) {
				return nil, errSilent // closed to make room: not the sender's fault
			}
			buffer = append(make([]byte, 0, grown), buffer...)
		}
		begin := len(buffer)
		n, err := c.Read(buffer[begin:cap(buffer)])
		buffer = buffer[:begin+n]
		if total += n; total > requestLimit {
			return nil, fmt.Errorf("larger than %d bytes", requestLimit)
		}
		if begin == 0 {
			rest := bytes.TrimLeft(buffer, requestBlanks)
			buffer = buffer[:copy(buffer, rest)]
		}
		if end := bytes.IndexByte(buffer[min(begin, len(buffer)):], 0); end >= 0 {
			return buffer[:begin+end], nil
		}
		switch {
		case err == nil:
		case len(buffer) == 0 && errors.Is(err, io.EOF):
			return nil, errEmpty
		case len(buffer) == 0:
			return nil, errSilent
		case !c.all.holds(c):
			return nil, errSilent
		default:
			return nil, fmt.Errorf("incomplete: %w", err)
		}
	}
}

func (t *connections) holds(c *connection) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return c.held
}

// finish closes after a reply: first this side, so that the ports of clients
// are free at once; what the client sent beyond its request is read, since to
// close before would reset the connection and could take the reply with it.
func (c *connection) finish() {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		c.SetReadDeadline(time.Now().Add(finishDelay))
		io.CopyN(io.Discard, c.Conn, requestLimit) // whatever it says, the connection ends
	}
}
