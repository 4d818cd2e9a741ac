// beatpath.go: beats over the network. A heartbeat has two threads: hb#N.tx
// says when beats are due and keeps a socket to each peer; hb#N.rx receives. It
// says which heartbeat works in which direction.

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// heartbeat is one section of node.conf. heartbeats.mu guards all but the
// first group.
type heartbeat struct {
	all    *heartbeats
	id     string // hb#1
	tx, rx *thread

	wanted            bool // it is in node.conf
	kind              string
	at                netip.AddrPort // where it receives
	interval, timeout time.Duration
	paths             map[string]*beatPath // to all members but this node

	bound netip.AddrPort // where it does receive; none: nowhere
	fault error          // why not where it should
	bad   int            // beats that were not used
}

// beatTarget is where a socket sends from and to.
type beatTarget struct {
	from netip.Addr // unspecified: what the route prefers
	host string
	port int
}

// beatPath is a heartbeat's way to one peer, and from it.
type beatPath struct {
	said *logLimit

	// There.
	target   beatTarget
	conn     packetSender // nil: none
	dialling bool
	dialled  time.Time // when it began last
	redial   bool      // the socket is not the right one
	gone     bool      // the path is not used any more
	out      beatCounts
	errors   int
	fault    string // of the last error; empty once beats are sent without
	failedAt time.Time

	// Back.
	in         beatCounts
	old        int // repeated or overtaken beats, or of an earlier start
	bad        int // said to be of the peer, and did not open
	badAt      time.Time
	beating    bool
	epoch, seq uint64 // of the last beat that counts
	source     netip.Prefix
}

type beatCounts struct {
	beats, bytes int
	last         time.Time
}

func (c *beatCounts) count(bytes int) {
	c.beats++
	c.bytes += bytes
	c.last = time.Now()
}

// beatsWithin tells whether the peer was heard that lately.
func (p *beatPath) beatsWithin(timeout time.Duration) bool {
	return p.in.beats > 0 && time.Since(p.in.last) < timeout
}

func newHeartbeat(all *heartbeats, id string) *heartbeat {
	h := &heartbeat{all: all, id: id, paths: map[string]*beatPath{}}
	h.tx = &thread{id: id + ".tx", run: h.transmit, report: h.reportTx}
	h.rx = &thread{id: id + ".rx", run: h.receive, report: h.reportRx}
	return h
}

// adopt takes up a configuration; all.mu is held.
func (h *heartbeat) adopt(c *config, wanted bool) {
	if h.wanted = wanted; wanted {
		h.kind = c.forNode(h.id, "type", c.node).(string)
		h.at = netip.AddrPortFrom(c.forNode(h.id, "addr", c.node).(netip.Addr), uint16(c.forNode(h.id, "port", c.node).(int)))
		h.interval = c.forNode(h.id, "interval", c.node).(time.Duration)
		h.timeout = c.forNode(h.id, "timeout", c.node).(time.Duration)
	}
	for _, peer := range c.members() {
		if peer == c.node || !wanted {
			continue
		}
		p := h.paths[peer]
		if p == nil {
			p = &beatPath{said: newLogLimit(time.Now)}
			h.paths[peer] = p
		}
		to := beatTarget{from: h.at.Addr()}
		if to.host, to.port = addressOf(c, h.id, peer); to != p.target {
			p.target, p.redial, p.dialled = to, true, time.Time{}
		}
	}
	for peer, p := range h.paths {
		if peer == c.node || !c.isMember(peer) || !wanted {
			p.gone = true
			p.hangUp()
			delete(h.paths, peer)
		}
	}
}

// transmit is the thread hb#N.tx.
func (h *heartbeat) transmit(ctx context.Context, changed <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	var dials sync.WaitGroup
	defer h.hangUp()
	defer dials.Wait()
	defer cancel()
	for h.all.present() == nil {
		ring := h.all.d.keys.Load()
		select {
		case <-ring.ready:
			if ring.err != nil {
				return ring.err
			}
		case <-changed: // the keys may be others
		case <-ctx.Done():
			return nil
		}
	}
	h.dialWhereNeeded(ctx, &dials)
	phase, _ := h.rhythm()
	due := time.NewTimer(phase)
	defer due.Stop()
	for {
		select {
		case <-due.C:
			h.all.d.monitor.beatDue(h.id)
			_, interval := h.rhythm()
			due.Reset(interval)
		case <-changed:
			phase, _ := h.rhythm()
			due.Reset(phase)
		case <-ctx.Done():
			return nil
		}
		h.dialWhereNeeded(ctx, &dials)
	}
}

// rhythm is how often the heartbeat beats, and when in the interval: each of a
// node at its own time, so that they do not all beat at once.
func (h *heartbeat) rhythm() (phase, interval time.Duration) {
	id := senderIDOf(h.id, h.all.d.config.Load().node)
	h.all.mu.Lock()
	defer h.all.mu.Unlock()
	return time.Duration(binary.BigEndian.Uint64(id[:]) % uint64(h.interval)), h.interval
}

// dialWhereNeeded has other goroutines make the sockets that are missing or
// not right: a name may take long to look up. Where nothing is heard, the
// peer may have moved to another address.
func (h *heartbeat) dialWhereNeeded(ctx context.Context, dials *sync.WaitGroup) {
	h.all.mu.Lock()
	defer h.all.mu.Unlock()
	now := time.Now()
	for _, peer := range slices.Sorted(maps.Keys(h.paths)) {
		p := h.paths[peer]
		waited := now.Sub(p.dialled)
		needed := waited >= dialAgain && (p.conn == nil || p.redial)
		silent := waited >= staleAgain && !p.beatsWithin(h.timeout)
		if p.dialling || !needed && !silent {
			continue
		}
		p.dialling, p.dialled, p.redial = true, now, false
		target := p.target
		dials.Go(func() { h.dial(ctx, peer, p, target) })
	}
}

func (h *heartbeat) dial(ctx context.Context, peer string, p *beatPath, to beatTarget) {
	bounded, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := h.all.d.network.dialPacket(bounded, to.from, to.host, to.port)
	h.all.mu.Lock()
	defer h.all.mu.Unlock()
	p.dialling = false
	switch {
	case err != nil:
		p.redial = true
		if ctx.Err() == nil {
			h.failed(peer, p, fmt.Errorf("cannot send to %s: %w", net.JoinHostPort(to.host, fmt.Sprint(to.port)), plainError(err)))
		}
	case p.gone || p.target != to:
		conn.Close()
	default:
		p.hangUp()
		p.conn = conn
	}
}

// failed counts an error of sending, and logs the first.
func (h *heartbeat) failed(peer string, p *beatPath, err error) {
	p.errors++
	if p.fault == "" && p.said.allow() {
		h.all.say(func() { h.all.d.log.Warn("beats are not sent", "thread", h.tx.id, "peer", peer, "err", err) })
	}
	p.fault, p.failedAt = err.Error(), time.Now()
}

// write sends a datagram. The first error may be of an earlier one (the peer's
// port was closed), and then kept this one from being sent. Not each beat to a
// closed port brings one, since hosts limit how many they tell.
func (h *heartbeat) write(peer string, p *beatPath, datagram []byte) {
	_, err := p.conn.Write(datagram)
	switch {
	case err == nil && time.Since(p.failedAt) >= faultForgotten:
		p.fault = ""
	case err != nil:
		h.failed(peer, p, plainError(err))
		_, err = p.conn.Write(datagram)
	}
	if err == nil {
		p.out.count(len(datagram))
	} else {
		p.redial = true
	}
}

// plainError is err without the names of calls and addresses.
func plainError(err error) error {
	var number unix.Errno
	if errors.As(err, &number) {
		return number
	}
	return err
}

func (h *heartbeat) hangUp() {
	h.all.mu.Lock()
	defer h.all.mu.Unlock()
	for _, p := range h.paths {
		p.hangUp()
	}
}

func (p *beatPath) hangUp() {
	if p.conn != nil {
		p.conn.Close()
	}
	p.conn, p.dialled = nil, time.Time{}
}

// ear is a socket on which beats are received.
type ear struct {
	conn  packetConn
	at    netip.AddrPort
	ended chan struct{} // closed when nothing is read any more, and err is set
	err   error
}

// close waits until nothing is read any more.
func (e *ear) close() {
	e.conn.Close()
	<-e.ended
}

// receive is the thread hb#N.rx.
func (h *heartbeat) receive(ctx context.Context, changed <-chan struct{}) error {
	e, err := h.listen()
	if err != nil {
		return err
	}
	defer h.deaf()
	defer func() { e.close() }()
	check := time.NewTimer(0)
	defer check.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-e.ended:
			return e.err
		case <-check.C:
		case <-changed:
		}
		check.Reset(h.noticeStale())
		if h.isAt(e.at) {
			continue
		}
		if e, err = h.move(e); err != nil {
			return err
		}
	}
}

// isAt tells whether the heartbeat shall receive there; then nothing is wrong.
func (h *heartbeat) isAt(at netip.AddrPort) bool {
	h.all.mu.Lock()
	defer h.all.mu.Unlock()
	if h.at == at {
		h.fault = nil
	}
	return h.at == at
}

// listen begins to receive where the heartbeat shall.
func (h *heartbeat) listen() (*ear, error) {
	h.all.mu.Lock()
	e := &ear{at: h.at, ended: make(chan struct{})}
	h.all.mu.Unlock()
	var err error
	if e.conn, err = h.all.d.network.listenPacket(e.at); err != nil {
		return nil, fmt.Errorf("cannot receive beats on %s: %w", e.at, err)
	}
	if large, ok := e.conn.(interface{ SetReadBuffer(bytes int) error }); ok {
		large.SetReadBuffer(beatBuffer) // what the kernel allows of it
	}
	h.all.mu.Lock()
	h.bound, h.fault = e.at, nil
	h.all.mu.Unlock()
	go func() {
		defer close(e.ended)
		e.err = guarded(func() error { return h.readAll(e.conn) })
	}()
	return e, nil
}

// move receives elsewhere, if it can; else it goes on where it is.
func (h *heartbeat) move(old *ear) (*ear, error) {
	next, err := h.listen()
	if errors.Is(err, unix.EADDRINUSE) { // the old one may be in the way
		old.close()
		if next, err = h.listen(); err != nil {
			return old, err
		}
	}
	if err == nil {
		old.close()
		return next, nil
	}
	h.all.mu.Lock()
	defer h.all.mu.Unlock()
	if h.fault == nil || h.fault.Error() != err.Error() {
		h.all.say(func() {
			h.all.d.log.Error("the heartbeat stays where it is", "thread", h.rx.id, "addr", old.at, "err", err)
		})
	}
	h.fault = err
	return old, nil
}

// deaf says that nothing is received any more.
func (h *heartbeat) deaf() {
	h.all.mu.Lock()
	defer h.all.mu.Unlock()
	h.bound, h.fault = netip.AddrPort{}, nil
	for _, p := range h.paths {
		p.beating = false
	}
}

// readAll returns nil when conn is closed.
func (h *heartbeat) readAll(conn packetConn) error {
	buffer := make([]byte, beatLimit+1) // the one byte more shows what is too large
	for {
		n, _, _, from, err := conn.ReadMsgUDPAddrPort(buffer, nil)
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			return fmt.Errorf("cannot receive beats: %w", err)
		}
		h.take(buffer[:n], from)
	}
}

// take looks at what came; each, however many came before that do not open:
// the sender's name and address can be forged.
func (h *heartbeat) take(raw []byte, source netip.AddrPort) {
	a := h.all
	t := a.present()
	if t == nil {
		return // the keys are being derived
	}
	from, b, err := a.open(t, raw)
	if err != nil {
		h.refused(from, source, err)
		return
	}
	if h.count(from, &b, len(raw), source) {
		a.d.monitor.beatReceived(from, b)
	}
}

func (h *heartbeat) refused(from string, source netip.AddrPort, err error) {
	a := h.all
	a.mu.Lock()
	defer a.mu.Unlock()
	h.bad++
	if p := h.paths[from]; p != nil {
		p.bad, p.badAt = p.bad+1, time.Now()
	}
	if a.d.outsiders.allow() {
		a.say(func() {
			a.d.log.Warn("a beat is not used", "thread", h.rx.id, "from", source.Addr(), "peer", from, "err", err)
		})
	}
}

// count takes in that a beat came this way, and tells whether it is news.
func (h *heartbeat) count(from string, b *beat, size int, source netip.AddrPort) bool {
	a := h.all
	a.mu.Lock()
	defer a.mu.Unlock()
	p, peer := h.paths[from], a.peers[from]
	if p == nil || peer == nil {
		return false
	}
	if !p.news(b, p.beatsWithin(h.timeout)) {
		p.old++
		return false
	}
	p.epoch, p.seq, p.source = b.epoch, b.seq, sourcePrefix(source.Addr())
	p.in.count(size)
	if !p.beating {
		p.beating = true
		h.say(from, p, "a peer is heard")
	}
	if peer.opened(b, p.in.last) { // what was counted against it may be mended
		a.d.blacklist.clear(func(s sender) bool { return s.node == from })
	}
	return true
}

// news tells new beats from repeated and overtaken ones, so that who sends old
// ones again can neither make a peer look alive nor fill the monitor's queue.
// While nothing is heard, any other start may be the present one: a peer can
// lose its epoch with its disk.
func (p *beatPath) news(b *beat, beating bool) bool {
	switch {
	case p.in.beats == 0, b.epoch > p.epoch:
		return true
	case b.epoch == p.epoch:
		return b.seq > p.seq
	}
	return !beating
}

// noticeStale says which peers are not heard any more, and returns when to look
// again.
func (h *heartbeat) noticeStale() time.Duration {
	h.all.mu.Lock()
	defer h.all.mu.Unlock()
	for _, peer := range slices.Sorted(maps.Keys(h.paths)) {
		if p := h.paths[peer]; p.beating && !p.beatsWithin(h.timeout) {
			p.beating = false
			h.say(peer, p, "a peer is not heard any more")
		}
	}
	return h.timeout / 4
}

// say logs a transition. Who replays beats of a dead peer could cause many.
func (h *heartbeat) say(peer string, p *beatPath, what string) {
	if p.said.allow() {
		h.all.say(func() { h.all.d.log.Info(what, "thread", h.rx.id, "peer", peer) })
	}
}

// config is the part of the reports that both threads share.
func (h *heartbeat) config() map[string]any {
	return map[string]any{
		"type": h.kind, "addr": h.at.Addr(), "port": h.at.Port(),
		"interval": h.interval.String(), "timeout": h.timeout.String(),
	}
}

// pathData is one direction of a path in daemon_status.
type pathData struct {
	State string  `json:"state"` // beating, stale
	Last  float64 `json:"last,omitempty"`
	Beats int     `json:"beats"`
	Bytes int     `json:"bytes"`

	Errors int    `json:"errors,omitempty"` // of sending
	Error  string `json:"error,omitempty"`  // the last, unless a beat was sent since

	Bad    int  `json:"bad,omitempty"`    // beats under its name that did not open
	Closed bool `json:"closed,omitempty"` // such beats come now
	Old    int  `json:"old,omitempty"`    // repeated, or overtaken by others
}

func (c beatCounts) data(timeout time.Duration) pathData {
	data := pathData{State: "stale", Beats: c.beats, Bytes: c.bytes}
	if c.beats > 0 {
		data.Last = unixSeconds(c.last)
		if time.Since(c.last) < timeout {
			data.State = "beating"
		}
	}
	return data
}

func (h *heartbeat) reportTx() (config, stats map[string]any) {
	h.all.mu.Lock()
	defer h.all.mu.Unlock()
	peers, sent, failed := map[string]pathData{}, beatCounts{}, 0
	for peer, p := range h.paths {
		data := p.out.data(h.timeout)
		data.Errors, data.Error = p.errors, p.fault
		peers[peer] = data
		sent.beats, sent.bytes, failed = sent.beats+p.out.beats, sent.bytes+p.out.bytes, failed+p.errors
	}
	return h.config(), map[string]any{"beats": sent.beats, "bytes": sent.bytes, "errors": failed, "peers": peers}
}

func (h *heartbeat) reportRx() (config, stats map[string]any) {
	h.all.mu.Lock()
	defer h.all.mu.Unlock()
	peers, heard, old := map[string]pathData{}, beatCounts{}, 0
	for peer, p := range h.paths {
		data := p.in.data(h.timeout)
		data.Bad, data.Closed, data.Old = p.bad, p.bad > 0 && time.Since(p.badAt) < h.timeout, p.old
		peers[peer] = data
		heard.beats, heard.bytes, old = heard.beats+p.in.beats, heard.bytes+p.in.bytes, old+p.old
	}
	config = h.config()
	if h.bound.IsValid() {
		config["bound"] = h.bound
	}
	if h.fault != nil {
		config["error"] = h.fault.Error()
	}
	return config, map[string]any{"beats": heard.beats, "bytes": heard.bytes, "bad": h.bad, "old": old, "peers": peers}
}
