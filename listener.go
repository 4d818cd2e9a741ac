// listener.go: what comes from the network and from the local socket: accept
// loops, framing, limits, and the validation of sealed requests in the order
// of design.md §4. What a request does is request.go's.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// listener is the thread that serves TCP and UDP.
type listener struct {
	d       *daemon
	conns   *connections
	working chan struct{} // a place for each datagram that is worked on
	stats   listenerStats
	left    *sockets // what run let go of last

	mu    sync.Mutex
	bound netip.AddrPort // where it listens
	fault error          // why it does not listen where it should
}

// listenerStats count since the daemon's start.
type listenerStats struct {
	requests, errors, invalid, dropped, lost atomic.Int64
}

func newListener(d *daemon) *listener {
	return &listener{d: d, conns: newConnections(), working: make(chan struct{}, datagramsAtOnce)}
}

func (l *listener) thread() *thread {
	return &thread{id: "listener", run: l.run, report: l.report}
}

func (l *listener) report() (config, stats map[string]any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.d.config.Load()
	config = map[string]any{
		"addr": value[netip.Addr](c, "listener.addr"), "port": c.count("listener.port"),
		"max_clock_skew": c.duration("listener.max_clock_skew").String(), "max_connections": c.count("listener.max_connections"),
	}
	if l.bound.IsValid() {
		config["bound"] = l.bound
	}
	if l.fault != nil {
		config["error"] = l.fault.Error()
	}
	return config, map[string]any{
		"requests":        l.stats.requests.Load(), // answered with status 0
		"errors":          l.stats.errors.Load(),   // answered with status 1
		"invalid":         l.stats.invalid.Load(),  // counted against their sender
		"dropped":         l.stats.dropped.Load(),  // of senders that are shut out
		"empty":           l.d.queue.asked.Load(),
		"closed_for_room": l.conns.closed.Load(), // connections
		"lost":            l.stats.lost.Load(),   // datagrams for which there was no place
		"connections":     l.conns.len(),
		"dequeue_runs":    l.d.queue.runs.Load(),
		"dequeue_dropped": l.d.queue.dropped.Load(),
	}
}

// sockets are a TCP and a UDP socket on one address.
type sockets struct {
	addr   netip.AddrPort
	tcp    net.Listener
	udp    packetConn
	served sync.WaitGroup // the two loops, and the datagrams being worked on
}

// run serves until ctx ends. Connections outlive the sockets that they came
// from, so a change of the address drops none.
func (l *listener) run(ctx context.Context, changed <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	var jobs sync.WaitGroup
	defer jobs.Wait()
	defer l.conns.closeWaiting()
	defer cancel()

	failed := make(chan error, 2)
	current, err := bind(l.d.network, l.wantedAddr())
	l.setBound(current, err)
	if err != nil {
		return err
	}
	defer l.setBound(nil, nil)
	l.open(ctx, current, &jobs, failed)
	var retry <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-changed:
		case <-retry:
		}
		retry = nil
		wanted := l.wantedAddr()
		if wanted == current.addr {
			l.setBound(current, nil)
			continue
		}
		next, err := l.replace(current, wanted)
		if next != current {
			current = next
			l.open(ctx, current, &jobs, failed)
		}
		if news := l.setBound(current, err); err != nil {
			if news {
				l.d.log.Error("the listener stays where it is", "addr", current.addr, "err", err)
			}
			retry = time.After(bindAgain)
		} else {
			l.d.log.Info("the listener moved", "addr", current.addr)
		}
	}
}

// replace returns the sockets that serve from now on: on the wanted address,
// or, with an error, the old ones.
func (l *listener) replace(old *sockets, wanted netip.AddrPort) (*sockets, error) {
	next, err := bind(l.d.network, wanted)
	if errors.Is(err, unix.EADDRINUSE) && l.left != nil {
		l.left.letGo(0) // it may be what is in the way
		l.left.served.Wait()
		l.left.close()
		next, err = bind(l.d.network, wanted)
	}
	if side, ok := l.d.network.(besideNetwork); ok && errors.Is(err, unix.EADDRINUSE) && wanted.Port() == old.addr.Port() {
		// The old sockets may be what is in the way, as 0.0.0.0 holds all.
		old.share(true)
		next, err = bind(side.beside(), wanted)
		old.share(false)
	}
	if err != nil {
		return old, err
	}
	next.share(false)
	old.letGo(lettingGo)
	l.left = old
	return next, nil
}

// share lets sockets of this daemon, or lets none, be bound beside s.
func (s *sockets) share(on bool) {
	setShared(s.tcp, on)
	setShared(s.udp, on)
}

func (l *listener) wantedAddr() netip.AddrPort {
	return listenerAddr(l.d.config.Load())
}

func listenerAddr(c *config) netip.AddrPort {
	return netip.AddrPortFrom(value[netip.Addr](c, "listener.addr"), uint16(c.count("listener.port")))
}

// setBound says where the listener is, and tells whether fault is a new one.
func (l *listener) setBound(s *sockets, fault error) (news bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	news = fault != nil && (l.fault == nil || l.fault.Error() != fault.Error())
	l.bound, l.fault = netip.AddrPort{}, fault
	if s != nil {
		l.bound = s.addr
	}
	return news
}

func bind(on network, addr netip.AddrPort) (*sockets, error) {
	tcp, err := on.listen(addr)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s over TCP: %w", addr, err)
	}
	udp, err := on.listenPacket(addr)
	if err != nil {
		tcp.Close()
		return nil, fmt.Errorf("cannot listen on %s over UDP: %w", addr, err)
	}
	return &sockets{addr: addr, tcp: tcp, udp: udp}, nil
}

// open starts the two loops of s. When either fails while s is in use, the
// listener fails.
func (l *listener) open(ctx context.Context, s *sockets, jobs *sync.WaitGroup, failed chan<- error) {
	for _, loop := range []func() error{
		func() error { return l.acceptLoop(ctx, s, jobs) },
		func() error { return l.datagramLoop(ctx, s) },
	} {
		s.served.Add(1)
		jobs.Go(func() {
			defer s.served.Done()
			if err := guarded(loop); err != nil && ctx.Err() == nil {
				select {
				case failed <- err:
				default:
				}
			}
		})
	}
	jobs.Go(func() {
		s.served.Wait()
		s.close()
	})
}

// letGo ends s without losing a request: no new handshake begins, those that
// began are completed and accepted for that long, and what waits then is still
// taken (lastLook).
func (s *sockets) letGo(after time.Duration) {
	end := time.Now().Add(after)
	if tcp, ok := s.tcp.(*net.TCPListener); !ok || refuseHandshakes(tcp) != nil {
		s.tcp.Close() // worse: what waits is reset
	} else {
		tcp.SetDeadline(end)
	}
	s.udp.SetReadDeadline(end)
}

func (s *sockets) close() {
	s.tcp.Close()
	s.udp.Close()
}

// acceptLoop returns nil when s is let go.
func (l *listener) acceptLoop(ctx context.Context, s *sockets, jobs *sync.WaitGroup) error {
	defer context.AfterFunc(ctx, func() { s.tcp.Close() })()
	for last := false; ; {
		if tcp, ok := s.tcp.(*net.TCPListener); ok && last {
			tcp.SetDeadline(time.Now().Add(lastLook))
		}
		conn, err := s.tcp.Accept()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && !last:
			last = true
			continue
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case isShortage(err):
			// Out of descriptors: the oldest that waits makes room.
			if l.conns.closeOldest() {
				continue
			}
			return fmt.Errorf("cannot accept connections: %w", err)
		case err != nil:
			return fmt.Errorf("cannot accept connections: %w", err)
		}
		c := newConnection(conn, l.conns)
		c.linked = l.d.heartbeats.linked(c.source)
		if limit, kept := l.room(); !l.conns.admit(c, limit, kept) {
			conn.Close()
			continue
		}
		jobs.Go(func() {
			defer l.conns.remove(c)
			if err := guarded(func() error { l.serveConnection(ctx, c); return nil }); err != nil {
				l.d.log.Error("a connection's handler failed", "err", err)
			}
		})
	}
}

// room is how many connections there may be, and how many of these places are
// kept for linked members, if there can be any.
func (l *listener) room() (limit, kept int) {
	c := l.d.config.Load()
	limit = c.count("listener.max_connections")
	if len(c.members()) > 1 && c.heartbeats() != nil {
		kept = limit / 4
	}
	return limit, kept
}

func isShortage(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM)
}

// serveConnection reads one request, answers, and closes.
func (l *listener) serveConnection(ctx context.Context, c *connection) {
	src := source{"tcp", netip.MustParseAddrPort(c.RemoteAddr().String())}
	c.SetReadDeadline(time.Now().Add(requestDeadline))
	defer context.AfterFunc(ctx, func() {
		c.SetReadDeadline(time.Unix(1, 0))
		c.SetWriteDeadline(time.Now().Add(finishDelay))
	})()
	raw, err := c.readRequest()
	switch {
	case errors.Is(err, errEmpty):
		l.d.queue.trigger()
		return
	case errors.Is(err, errSilent), err != nil && ctx.Err() != nil:
		return
	case err != nil:
		l.strike(senderOf(src, "", false), err)
		return
	}
	x, err := l.validate(ctx, raw, src)
	if x == nil {
		return
	}
	c.known()
	err = l.d.send(ctx, l.answer(ctx, x, err), func(r reply) error {
		boundWrite(ctx, c)
		_, err := c.Write(x.seal(r))
		x.context.frame++
		return err
	})
	if err == nil {
		c.finish()
	}
}

// boundWrite bounds the write of one frame. When the daemon stops, there is
// less time, also for the frame that is being written (by the AfterFunc of who
// calls).
func boundWrite(ctx context.Context, conn net.Conn) {
	conn.SetWriteDeadline(time.Now().Add(writeDeadline))
	if ctx.Err() != nil {
		conn.SetWriteDeadline(time.Now().Add(finishDelay))
	}
}

// datagramLoop returns nil when s is let go.
func (l *listener) datagramLoop(ctx context.Context, s *sockets) error {
	defer context.AfterFunc(ctx, func() { s.udp.SetReadDeadline(time.Unix(1, 0)) })()
	buffer, control := make([]byte, 1<<16), make([]byte, 128)
	for last := false; ; {
		n, controlLen, _, from, err := s.udp.ReadMsgUDPAddrPort(buffer, control)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && !last && ctx.Err() == nil:
			last = true
			s.udp.SetReadDeadline(time.Now().Add(lastLook)) // once: datagrams never cease
			continue
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case errors.Is(err, unix.ECONNREFUSED):
			continue // of an earlier reply, whose receiver is gone
		case err != nil:
			return fmt.Errorf("cannot receive datagrams: %w", err)
		}
		raw := bytes.Trim(buffer[:n], requestBlanks)
		if len(raw) == 0 {
			l.d.queue.trigger()
			continue
		}
		x, err := l.validate(ctx, raw, source{"udp", from})
		if x == nil {
			continue
		}
		select {
		case l.working <- struct{}{}:
		default:
			l.stats.lost.Add(1)
			continue
		}
		back := datagram{from, bytes.Clone(control[:controlLen])}
		s.served.Add(1)
		go func() {
			defer s.served.Done()
			defer func() { <-l.working }()
			if err := guarded(func() error { l.answerDatagram(ctx, s, x, err, back); return nil }); err != nil {
				l.d.log.Error("a datagram's handler failed", "err", err)
			}
		}()
	}
}

// datagram is what a reply needs to know of its request.
type datagram struct {
	from    netip.AddrPort
	control []byte
}

func (l *listener) answerDatagram(ctx context.Context, s *sockets, x *exchange, err error, back datagram) {
	r := l.answer(ctx, x, err)
	if r.stream != nil {
		r = replyOf(l.d, nil, fmt.Errorf("%s answers by a stream, which does not fit datagrams; use TCP", x.request.action))
	}
	reply := x.seal(r)
	if len(reply) > datagramLimit {
		reply = x.seal(replyOf(l.d, nil, fmt.Errorf("the reply of %d bytes does not fit a datagram; use TCP", len(reply))))
	}
	// A receiver that is gone is his own loss.
	s.udp.WriteMsgUDPAddrPort(reply, back.control, back.from)
}

// exchange is a request that opened, and what its reply is sealed with.
type exchange struct {
	key     masterKey
	context messageContext // of the reply
	request request
}

// validate takes raw through the steps of design.md §4, each cheaper than the
// next. Without an exchange, nothing is answered; with one and an error, the
// error is.
func (l *listener) validate(ctx context.Context, raw []byte, src source) (*exchange, error) {
	c := l.d.config.Load()
	e, err := parseEnvelope(raw)
	joining := e.cluster == joinCluster
	member := !joining && c.isMember(e.node) // also of a message that is malformed beyond its name
	from := senderOf(src, e.node, member)
	known := member && err == nil && e.token != nil && src.transport == "tcp"
	if l.d.blacklist.shutOut(from) && !(known && l.d.heartbeats.admits(e.node, e.token)) {
		l.stats.dropped.Add(1)
		return nil, nil
	}
	switch {
	case err != nil:
	case e.cluster != c.text("cluster.name") && !joining:
		err = errors.New("names another cluster")
	case !member && !joining:
		err = errors.New("names a node that is not in cluster.nodes")
	}
	if err != nil {
		l.strike(from, err)
		return nil, nil
	}
	keys, err := l.requestKeys(ctx, joining)
	if err != nil {
		return nil, err
	}
	message, key, err := openAny(keys, e, messageContext{label: labelRequest, cluster: e.cluster, node: e.node}, requestLimit)
	if errors.Is(err, errOpen) {
		l.strike(from, err)
		return nil, nil
	}
	x := &exchange{key: key, context: messageContext{label: labelReply, cluster: e.cluster, node: c.node, request: &e.salt}}
	if err != nil {
		return x, err
	}
	x.request, err = l.d.readSealed(message, e, c, joining)
	if err == nil {
		l.d.blacklist.pass(from)
		if !joining {
			l.d.peers.heard(e.node)
		}
	}
	return x, err
}

// requestKeys waits for keys that are still being derived.
func (l *listener) requestKeys(ctx context.Context, joining bool) ([]masterKey, error) {
	ring := l.d.keys.Load()
	if joining {
		key, err := ring.join()
		return []masterKey{key}, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestDeadline)
	defer cancel()
	select {
	case <-ring.ready:
		return ring.keys, ring.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// strike counts an invalid message. That a sender is shut out is logged once.
func (l *listener) strike(s sender, why error) {
	l.stats.invalid.Add(1)
	if l.d.blacklist.strike(s) && l.d.outsiders.allow() {
		l.d.log.Warn("sender shut out; see `nodemgr daemon blacklist status`", "from", s.addr, "node", s.node, "transport", s.transport, "err", why)
	}
}

// answer executes the request of x, if err does not refuse it.
func (l *listener) answer(ctx context.Context, x *exchange, err error) reply {
	var r reply
	if err == nil {
		r, err = l.d.execute(ctx, x.request)
	}
	if err != nil {
		l.stats.errors.Add(1)
		return replyOf(l.d, nil, err)
	}
	l.stats.requests.Add(1)
	return r
}

// seal makes the frame of a reply, or of the error that says why it cannot.
func (x *exchange) seal(r reply) []byte {
	message, err := json.Marshal(r)
	if err == nil && len(message) > replyLimit {
		err = fmt.Errorf("the reply is larger than %d bytes", replyLimit)
	}
	if err != nil {
		message, _ = json.Marshal(reply{Time: r.Time, Status: 1, Error: err.Error()}) // marshals: numbers and a string
	}
	sealed, _ := seal(x.key, x.context, message)
	return sealed
}
