package main

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// fabric is the network of a cluster in virtual time: streams with buffers,
// datagrams, and links that delay, lose, repeat and cut. A link is one
// direction between two nodes, and draws from a source of its own; what it
// delivers comes at a nanosecond that nothing else has.
type fabric struct {
	mu    sync.Mutex
	hosts map[string]*fabricHost // the present daemon's, by node; nil: the machine is off
	names map[netip.Addr]string
	links map[[2]string]*fabricLink
	sent  int // datagrams
}

type fabricLink struct {
	seed          uint64
	index, seq    int64
	last          int64 // when something was sent last, and how often since
	again         uint64
	delay, jitter time.Duration
	loss, twice   float64
	broken, old   float64
	cuts          int
}

const (
	fabricDelay  = 200 * time.Microsecond
	fabricJitter = 300 * time.Microsecond
)

func newSource(seed, of uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, of)) }

const (
	fabricSlot    = 1 << 12 // ns: what comes in one slot has a nanosecond for each link and number
	fabricResend  = 200 * time.Millisecond
	fabricWindow  = 256 << 10
	fabricBacklog = 256
)

func newFabric(seed uint64, nodes []string) *fabric {
	f := &fabric{hosts: map[string]*fabricHost{}, names: map[netip.Addr]string{}, links: map[[2]string]*fabricLink{}}
	for i, from := range nodes {
		f.names[fabricAddr(i)] = from
		for j, to := range nodes {
			index := int64(i*len(nodes) + j)
			f.links[[2]string{from, to}] = &fabricLink{
				seed: seed, index: index, delay: fabricDelay, jitter: fabricJitter,
			}
		}
	}
	return f
}

func fabricAddr(index int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(index + 1)}) }

// wait is how long what is sent now is under way; false: it is lost.
func (l *fabricLink) wait() (time.Duration, bool) {
	random, now := l.draws(), time.Now().UnixNano()
	draw, d := random.Float64(), l.delay+time.Duration(random.Int64N(int64(l.jitter)+1))
	l.seq++
	at := (now+int64(d))/fabricSlot*fabricSlot + fabricSlot + l.index*64 + l.seq%64
	return time.Duration(at - now), l.cuts == 0 && draw >= l.loss
}

// draws is a source for what is sent now: what else was sent earlier does not
// change what comes of it.
func (l *fabricLink) draws() *rand.Rand {
	now := time.Now().UnixNano()
	if l.again++; now != l.last {
		l.last, l.again = now, 0
	}
	return newSource(l.seed^uint64(l.index+1)<<48^l.again<<40, uint64(now))
}

// set changes the links between two nodes in one direction.
func (f *fabric) set(from, to string, change func(*fabricLink)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f.links[[2]string{from, to}])
}

// later runs deliver under the lock when what is sent now arrives, if it does.
func (f *fabric) later(from, to string, deliver func()) bool {
	l := f.links[[2]string{from, to}]
	d, arrives := l.wait()
	if arrives {
		time.AfterFunc(d, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			deliver()
		})
	}
	return arrives
}

// gate lets goroutines wait, under the fabric's lock, for what changes.
type gate struct{ changed chan struct{} }

func (g *gate) open() {
	if g.changed != nil {
		close(g.changed)
		g.changed = nil
	}
}

// wait gives the lock away until the gate opens or the deadline has come.
func (g *gate) wait(mu *sync.Mutex, deadline time.Time) {
	if g.changed == nil {
		g.changed = make(chan struct{})
	}
	changed := g.changed
	mu.Unlock()
	defer mu.Lock()
	if deadline.IsZero() {
		<-changed
		return
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	}
}

func over(deadline time.Time) bool { return !deadline.IsZero() && !time.Now().Before(deadline) }

// fabricHost is the network of one daemon; the next one of its machine has
// another.
type fabricHost struct {
	f         *fabric
	node      string
	addr      netip.Addr
	port      uint16 // the last that a client got
	listeners map[uint16]*fabricListener
	packets   map[uint16]*fabricPacket
	conns     map[*fabricConn]bool
	dead      bool
}

// host connects a new daemon.
func (f *fabric) host(node string) *fabricHost {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := &fabricHost{f: f, node: node, port: 600, listeners: map[uint16]*fabricListener{}, packets: map[uint16]*fabricPacket{}, conns: map[*fabricConn]bool{}}
	for addr, name := range f.names {
		if name == node {
			h.addr = addr
		}
	}
	f.hosts[node] = h
	return h
}

// mute keeps a daemon that crashes from sending any more.
func (h *fabricHost) mute() {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	h.dead = true
}

// crash closes all that a daemon has open, as the kernel does; or, where the
// machine is off, says nothing to anybody.
func (h *fabricHost) crash(off bool) {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	h.dead = true
	for _, l := range h.listeners {
		l.closed = true
		l.gate.open()
	}
	for _, p := range h.packets {
		p.closed = true
		p.gate.open()
	}
	for c := range h.conns {
		c.closed = true
		c.gate.open()
		if !off {
			c.push(segment{reset: true})
		}
	}
	if off && h.f.hosts[h.node] == h {
		h.f.hosts[h.node] = nil
	}
}

func (f *fabric) resolve(host string) (string, bool) {
	if addr, err := netip.ParseAddr(host); err == nil {
		node, known := f.names[addr]
		return node, known
	}
	_, known := f.hosts[host]
	for _, node := range f.names {
		known = known || node == host
	}
	return host, known
}

func (h *fabricHost) nextPort() uint16 {
	if h.port++; h.port > 1023 {
		h.port = 601
	}
	return h.port
}

// ---- Streams -----------------------------------------------------------------

type fabricListener struct {
	h      *fabricHost
	at     netip.AddrPort
	gate   gate
	queue  []*fabricConn
	closed bool
}

func (h *fabricHost) listen(at netip.AddrPort) (net.Listener, error) {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	switch {
	case h.dead:
		return nil, net.ErrClosed
	case h.listeners[at.Port()] != nil:
		return nil, unix.EADDRINUSE
	}
	l := &fabricListener{h: h, at: at}
	h.listeners[at.Port()] = l
	return l, nil
}

func (l *fabricListener) Accept() (net.Conn, error) {
	l.h.f.mu.Lock()
	defer l.h.f.mu.Unlock()
	for !l.closed && len(l.queue) == 0 {
		l.gate.wait(&l.h.f.mu, time.Time{})
	}
	if l.closed {
		return nil, net.ErrClosed
	}
	c := l.queue[0]
	l.queue = l.queue[1:]
	return c, nil
}

func (l *fabricListener) Close() error {
	l.h.f.mu.Lock()
	defer l.h.f.mu.Unlock()
	l.closed = true
	l.gate.open()
	if l.h.listeners[l.at.Port()] == l {
		delete(l.h.listeners, l.at.Port())
	}
	for _, c := range l.queue {
		c.push(segment{reset: true})
	}
	return nil
}

func (l *fabricListener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }

// dial asks again while nothing answers, as the kernel does.
func (h *fabricHost) dial(ctx context.Context, host string, port int) (net.Conn, error) {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	to, known := h.f.resolve(host)
	if !known {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	for again := time.Second; ; again *= 2 {
		there, arrives := h.f.links[[2]string{h.node, to}].wait()
		back, returns := h.f.links[[2]string{to, h.node}].wait()
		pause := there + back
		if !arrives || !returns || h.f.hosts[to] == nil {
			pause, arrives = again, false
		}
		if err := pauseUnlocked(ctx, &h.f.mu, pause); err != nil {
			return nil, err
		}
		peer := h.f.hosts[to]
		switch {
		case h.dead:
			return nil, net.ErrClosed
		case !arrives || !returns || peer == nil:
			continue
		}
		l := peer.listeners[uint16(port)]
		if l == nil || l.closed || len(l.queue) >= fabricBacklog {
			return nil, unix.ECONNREFUSED
		}
		near := &fabricConn{h: h, local: netip.AddrPortFrom(h.addr, h.nextPort()), remote: netip.AddrPortFrom(peer.addr, uint16(port))}
		far := &fabricConn{h: peer, local: near.remote, remote: near.local, peer: near}
		near.peer = far
		h.conns[near], peer.conns[far] = true, true
		l.queue = append(l.queue, far)
		l.gate.open()
		return near, nil
	}
}

func pauseUnlocked(ctx context.Context, mu *sync.Mutex, d time.Duration) error {
	mu.Unlock()
	defer mu.Lock()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// fabricConn is one end of a stream.
type fabricConn struct {
	h             *fabricHost
	local, remote netip.AddrPort
	peer          *fabricConn
	gate          gate

	in             []byte
	end            bool // nothing follows what is in in
	closed, halved bool
	broken         error

	out     []segment // not delivered yet
	waiting int       // bytes in out
	sending bool
	tries   int

	readBy, writeBy time.Time
}

// segment is what is delivered at once.
type segment struct {
	data       []byte
	fin, reset bool
}

// push sends to the peer, in order; f.mu is held.
func (c *fabricConn) push(s segment) {
	c.out = append(c.out, s)
	c.waiting += len(s.data)
	if !c.sending {
		c.transmit()
	}
}

// transmit sends the first segment until it arrives, or nobody waits for it
// any more.
func (c *fabricConn) transmit() {
	c.sending = len(c.out) > 0
	f := c.h.f
	if !c.sending {
		return
	}
	again := func() {
		c.tries++
		if c.tries > 12 || c.closed && c.tries > 6 {
			c.broken = unix.ETIMEDOUT
			c.gate.open()
			return
		}
		time.AfterFunc(fabricResend<<min(c.tries-1, 4)+time.Duration(f.links[[2]string{c.h.node, c.peer.h.node}].index), func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			c.transmit()
		})
	}
	arrives := f.later(c.h.node, c.peer.h.node, func() {
		if f.hosts[c.peer.h.node] == nil {
			again()
			return
		}
		c.tries = 0
		s := c.out[0]
		c.out, c.waiting = c.out[1:], c.waiting-len(s.data)
		c.gate.open()
		c.peer.deliver(s)
		c.transmit()
	})
	if !arrives {
		again()
	}
}

func (c *fabricConn) deliver(s segment) {
	c.gate.open()
	switch {
	case s.reset:
		c.broken = unix.ECONNRESET
	case c.closed || c.h.dead:
		if len(s.data) > 0 {
			c.push(segment{reset: true})
		}
	case s.fin:
		c.end = true
	default:
		c.in = append(c.in, s.data...)
	}
}

func (c *fabricConn) Read(b []byte) (int, error) {
	c.h.f.mu.Lock()
	defer c.h.f.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case over(c.readBy):
			return 0, os.ErrDeadlineExceeded
		case len(c.in) > 0:
			n := copy(b, c.in)
			c.in = c.in[n:]
			c.peer.gate.open()
			return n, nil
		case c.broken != nil:
			return 0, c.broken
		case c.end:
			return 0, io.EOF
		}
		c.gate.wait(&c.h.f.mu, c.readBy)
	}
}

func (c *fabricConn) Write(b []byte) (n int, err error) {
	c.h.f.mu.Lock()
	defer c.h.f.mu.Unlock()
	for {
		switch {
		case c.closed:
			return n, net.ErrClosed
		case c.broken != nil:
			return n, c.broken
		case c.halved:
			return n, unix.EPIPE
		case over(c.writeBy):
			return n, os.ErrDeadlineExceeded
		case n == len(b):
			return n, nil
		}
		room := fabricWindow - c.waiting - len(c.peer.in)
		if room <= 0 {
			c.gate.wait(&c.h.f.mu, c.writeBy)
			continue
		}
		part := b[n:min(len(b), n+min(room, 64<<10))]
		c.push(segment{data: append([]byte(nil), part...)})
		n += len(part)
	}
}

func (c *fabricConn) CloseWrite() error {
	c.h.f.mu.Lock()
	defer c.h.f.mu.Unlock()
	if !c.closed && !c.halved {
		c.halved = true
		c.push(segment{fin: true})
	}
	return nil
}

func (c *fabricConn) Close() error {
	c.h.f.mu.Lock()
	defer c.h.f.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed = true
	delete(c.h.conns, c)
	c.gate.open()
	switch {
	case len(c.in) > 0:
		c.push(segment{reset: true})
	case !c.halved:
		c.push(segment{fin: true})
	}
	return nil
}

func (c *fabricConn) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(c.local) }
func (c *fabricConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

func (c *fabricConn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

func (c *fabricConn) SetReadDeadline(t time.Time) error {
	c.h.f.mu.Lock()
	defer c.h.f.mu.Unlock()
	c.readBy = t
	c.gate.open()
	return nil
}

func (c *fabricConn) SetWriteDeadline(t time.Time) error {
	c.h.f.mu.Lock()
	defer c.h.f.mu.Unlock()
	c.writeBy = t
	c.gate.open()
	return nil
}

// ---- Datagrams -----------------------------------------------------------------

// fabricPacket is a socket of datagrams; one with a target is connected.
type fabricPacket struct {
	h       *fabricHost
	at      netip.AddrPort
	target  netip.AddrPort
	gate    gate
	queue   []fabricDatagram
	closed  bool
	refused bool // an earlier datagram came back
	readBy  time.Time
}

type fabricDatagram struct {
	from netip.AddrPort
	data []byte
}

func (h *fabricHost) listenPacket(at netip.AddrPort) (packetConn, error) {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	switch {
	case h.dead:
		return nil, net.ErrClosed
	case h.packets[at.Port()] != nil:
		return nil, unix.EADDRINUSE
	}
	p := &fabricPacket{h: h, at: netip.AddrPortFrom(h.addr, at.Port())}
	h.packets[at.Port()] = p
	return p, nil
}

// dialPacket takes a moment: what is sent at the very start of a daemon is
// always too early.
func (h *fabricHost) dialPacket(ctx context.Context, _ netip.Addr, host string, port int) (packetSender, error) {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	if err := pauseUnlocked(ctx, &h.f.mu, time.Microsecond); err != nil {
		return nil, err
	}
	to, known := h.f.resolve(host)
	switch {
	case h.dead:
		return nil, net.ErrClosed
	case !known:
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	for h.port++; h.packets[h.port+20000] != nil; h.port++ {
	}
	p := &fabricPacket{h: h, at: netip.AddrPortFrom(h.addr, h.port+20000)}
	for addr, node := range h.f.names {
		if node == to {
			p.target = netip.AddrPortFrom(addr, uint16(port))
		}
	}
	h.packets[p.at.Port()] = p
	return p, nil
}

func (p *fabricPacket) Write(b []byte) (int, error) {
	p.h.f.mu.Lock()
	defer p.h.f.mu.Unlock()
	if p.refused {
		p.refused = false
		return 0, unix.ECONNREFUSED
	}
	return p.send(b, p.target)
}

// send never waits.
func (p *fabricPacket) send(b []byte, to netip.AddrPort) (int, error) {
	f := p.h.f
	if p.closed || p.h.dead {
		return 0, net.ErrClosed
	}
	node, d := f.names[to.Addr()], fabricDatagram{p.at, append([]byte(nil), b...)}
	f.sent++
	deliver := func() {
		peer := f.hosts[node]
		switch {
		case peer == nil:
		case peer.dead || peer.packets[to.Port()] == nil:
			f.later(node, p.h.node, func() { p.refused = true })
		default:
			if q := peer.packets[to.Port()]; len(q.queue) < fabricBacklog {
				q.queue = append(q.queue, d)
				q.gate.open()
			}
		}
	}
	l := f.links[[2]string{p.h.node, node}]
	if l.broken > 0 {
		if random := l.draws(); random.Float64() < l.broken && len(d.data) > 0 {
			d.data[random.IntN(len(d.data))] ^= 1 << random.IntN(8)
		}
	}
	f.later(p.h.node, node, deliver)
	if l.twice > 0 && l.draws().Float64() < l.twice {
		f.later(p.h.node, node, deliver)
	}
	if l.old > 0 {
		if random := l.draws(); random.Float64() < l.old { // from whom, does not matter
			time.AfterFunc(time.Duration(random.Int64N(int64(time.Minute))), func() {
				f.mu.Lock()
				defer f.mu.Unlock()
				deliver()
			})
		}
	}
	return len(b), nil
}

func (p *fabricPacket) ReadMsgUDPAddrPort(b, _ []byte) (n, controlLen, flags int, from netip.AddrPort, err error) {
	p.h.f.mu.Lock()
	defer p.h.f.mu.Unlock()
	for {
		switch {
		case p.closed:
			return 0, 0, 0, from, net.ErrClosed
		case over(p.readBy):
			return 0, 0, 0, from, os.ErrDeadlineExceeded
		case len(p.queue) > 0:
			d := p.queue[0]
			p.queue = p.queue[1:]
			return copy(b, d.data), 0, 0, d.from, nil
		}
		p.gate.wait(&p.h.f.mu, p.readBy)
	}
}

func (p *fabricPacket) WriteMsgUDPAddrPort(b, _ []byte, to netip.AddrPort) (n, controlLen int, err error) {
	p.h.f.mu.Lock()
	defer p.h.f.mu.Unlock()
	n, err = p.send(b, to)
	return n, 0, err
}

func (p *fabricPacket) SetReadDeadline(t time.Time) error {
	p.h.f.mu.Lock()
	defer p.h.f.mu.Unlock()
	p.readBy = t
	p.gate.open()
	return nil
}

func (p *fabricPacket) Close() error {
	p.h.f.mu.Lock()
	defer p.h.f.mu.Unlock()
	if p.closed {
		return net.ErrClosed
	}
	p.closed = true
	p.gate.open()
	if p.h.packets[p.at.Port()] == p {
		delete(p.h.packets, p.at.Port())
	}
	return nil
}

var (
	_ network = (*fabricHost)(nil)
)
