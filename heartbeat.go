// heartbeat.go: the heartbeats of this node, and what is exchanged with peers
// beside the core's business: keys and tokens. What beats say is the core's
// (beat.go); their way over the network, beatpath.go's. Nothing here waits for
// a peer, a name server or a disk.

package main

import (
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// heartbeats are those of node.conf.
type heartbeats struct {
	d       *daemon
	ciphers beatCiphers
	table   atomic.Pointer[beatTable]
	lines   chan func() // to be logged

	mu    sync.Mutex // guards also what heartbeats, paths and peers hold
	list  []*heartbeat
	peers map[string]*beatPeer // all members but this node
	fault string               // of the last beat that could not be sent
}

// beatPeer is what this node and a peer know of each other.
type beatPeer struct {
	epoch    uint64          // the highest that was seen
	keys     []keyID         // that the peer holds, as far as is known
	accepted time.Time       // when the core last accepted a beat
	ours     [tokenSize]byte // what the peer may show here
	theirs   []byte          // what this node may show there; nil: not known
	shown    *logLimit
}

func newHeartbeats(d *daemon) *heartbeats {
	return &heartbeats{d: d, peers: map[string]*beatPeer{}, lines: make(chan func(), linesWaiting)}
}

// log writes what the heartbeats have to say: where that hangs, beats go on.
func (a *heartbeats) log(done <-chan struct{}) {
	for {
		select {
		case line := <-a.lines:
			line()
		case <-done:
			return
		}
	}
}

// say has a line logged; what does not fit is not.
func (a *heartbeats) say(line func()) {
	select {
	case a.lines <- line:
	default:
	}
}

// adopt takes up a configuration. It is called on serve's goroutine.
func (a *heartbeats) adopt(c *config) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, node := range c.members() {
		if node != c.node && a.peers[node] == nil {
			p := &beatPeer{shown: &logLimit{now: time.Now, most: tokenRate, per: time.Second}}
			rand.Read(p.ours[:]) // never fails: crypto/rand ends the process instead
			a.peers[node] = p
		}
	}
	for node := range a.peers {
		if node == c.node || !c.isMember(node) {
			delete(a.peers, node)
		}
	}
	was := a.list
	a.list = nil
	for _, id := range c.heartbeats() {
		i := slices.IndexFunc(was, func(h *heartbeat) bool { return h.id == id })
		h := newHeartbeat(a, id)
		if i >= 0 {
			h = was[i]
		}
		h.adopt(c, true)
		a.list = append(a.list, h)
	}
	for _, h := range was {
		if slices.Contains(a.list, h) {
			continue
		}
		h.adopt(c, false)
		if h.tx.running || h.rx.running { // should it come back meanwhile, it is the same
			a.list = append(a.list, h)
		}
	}
}

// threads are those that shall be there.
func (a *heartbeats) threads() (threads []*thread) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, h := range a.list {
		if h.wanted {
			threads = append(threads, h.tx, h.rx)
		}
	}
	return threads
}

// beatTable is what beats are sealed and opened with, in one state of the
// configuration.
type beatTable struct {
	config  *config
	ring    *keyring
	self    senderID
	members map[senderID]string // but this node
}

// present returns the table in force; while the keys of a new secret are being
// derived, the last one, since heartbeats do not pause for that; nil if there
// is none yet.
func (a *heartbeats) present() *beatTable {
	c, ring, now := a.d.config.Load(), a.d.keys.Load(), a.table.Load()
	if now != nil && now.config == c && now.ring == ring {
		return now
	}
	select {
	case <-ring.ready:
	default:
		return now
	}
	if ring.err != nil {
		return now
	}
	next := &beatTable{config: c, ring: ring, self: senderIDOf(ring.cluster, c.node), members: map[senderID]string{}}
	for _, node := range c.members() {
		if node != c.node {
			next.members[senderIDOf(ring.cluster, node)] = node
		}
	}
	a.table.Store(next)
	return next
}

// newest returns the place of the newest key that the peer holds too, or -1.
func (r *keyring) newest(held []keyID) int {
	return slices.IndexFunc(r.ids, func(id keyID) bool { return slices.Contains(held, id) })
}

// send seals b for a peer and sends it by one heartbeat, or by all if that is
// empty. It never waits: what cannot be sent now is lost, as on the way.
func (a *heartbeats) send(to, heartbeat string, b beat) {
	t := a.present()
	a.mu.Lock()
	defer a.mu.Unlock()
	peer := a.peers[to]
	if t == nil || peer == nil {
		return
	}
	b.data.token, b.data.keys = peer.ours[:], t.ring.ids
	plain, err := b.plaintext()
	if err != nil {
		if a.fault != err.Error() {
			a.fault = err.Error()
			a.say(func() { a.d.log.Error("a beat is not sent", "peer", to, "err", err) })
		}
		return
	}
	key := t.ring.newest(peer.keys)
	if key < 0 { // until that is known: who has the new secret had the previous one
		key = len(t.ring.ids) - 1
	}
	datagram := a.ciphers.seal(t.ring.keys[key], beatHeader{t.ring.ids[key], t.self, b.salt}, t.config.node, plain)
	for _, h := range a.list {
		if p := h.paths[to]; p != nil && p.conn != nil && (heartbeat == "" || heartbeat == h.id) {
			h.write(to, p, datagram)
		}
	}
}

var (
	errForeign    = errors.New("it is of no member, or of another cluster name")
	errForeignKey = errors.New("it is sealed under a secret that this node does not have")
)

// open tells whose beat raw is and what it says; whose it claims to be also of
// one that does not open.
func (a *heartbeats) open(t *beatTable, raw []byte) (from string, b beat, err error) {
	header, ok := parseBeatHeader(raw)
	if !ok {
		return "", b, errBeat
	}
	from, ok = t.members[header.sender]
	if !ok {
		return "", b, errForeign
	}
	key := slices.Index(t.ring.ids, header.key)
	if key < 0 {
		return from, b, errForeignKey
	}
	plain, err := a.ciphers.open(t.ring.keys[key], header, from, raw)
	if err == nil {
		b, err = parseBeat(plain)
	}
	b.salt = header.salt
	return from, b, err
}

// accepted takes what an accepted beat says of token and keys. Its link is
// good: the peer opens what this node sends.
func (a *heartbeats) accepted(from string, data beatData) {
	a.d.peers.heard(from)
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.peers[from]; p != nil {
		p.accepted, p.keys, p.theirs = time.Now(), data.keys, data.token
	}
}

// opened takes in that a new beat of the peer opened. Which keys it names
// counts while none is accepted: otherwise two nodes that each seal with what
// the other has not would never find together.
func (p *beatPeer) opened(b *beat, now time.Time) (anew bool) {
	if now.Sub(p.accepted) >= keysTrusted {
		p.keys = b.data.keys
	}
	anew = b.epoch > p.epoch && p.epoch > 0
	p.epoch = max(p.epoch, b.epoch)
	return anew
}

// admits tells whether a request of node that shows token is looked at though
// its sender is shut out.
func (a *heartbeats) admits(node string, token []byte) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peers[node]
	return p != nil && subtle.ConstantTimeCompare(token, p.ours[:]) == 1 && p.shown.allow()
}

// toward returns what a request to node is sealed with, the newest key that
// both hold, and the token that it shows, nil if none is known.
func (a *heartbeats) toward(node string, ring *keyring) (key masterKey, token []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.peers[node]
	if p == nil {
		return ring.keys[0], nil
	}
	return ring.keys[max(0, ring.newest(p.keys))], p.theirs
}

// linked tells whether beats come from there.
func (a *heartbeats) linked(source netip.Prefix) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, h := range a.list {
		for _, p := range h.paths {
			if p.source == source && p.beatsWithin(h.timeout) {
				return true
			}
		}
	}
	return false
}

// heartbeats lists the sections hb#N that have a type here.
func (c *config) heartbeats() (ids []string) {
	for _, line := range c.doc.lines {
		if id := line.section; strings.HasPrefix(id, "hb#") && len(id) > len("hb#") && line.key != "" &&
			!slices.Contains(ids, id) && c.forNode(id, "type", c.node) != nil {
			ids = append(ids, id)
		}
	}
	return ids
}

// checkHeartbeats finds what no heartbeat can work with.
func (c *config) checkHeartbeats() (faults []error) {
	ids := c.heartbeats()
	if n := len(c.members()); n > membersLimit && ids != nil {
		faults = append(faults, fmt.Errorf("%s: %d nodes; a cluster with heartbeats has %d at most", c.at("cluster", "nodes"), n, membersLimit))
	}
	type place struct {
		who string
		at  netip.AddrPort
	}
	taken := []place{{"the listener", listenerAddr(c)}}
	for _, id := range ids {
		interval := c.forNode(id, "interval", c.node).(time.Duration)
		timeout := c.forNode(id, "timeout", c.node).(time.Duration)
		switch {
		case interval < intervalLeast:
			faults = append(faults, fmt.Errorf("%s: %s is below %s, the shortest", c.at(id, "interval"), interval, intervalLeast))
		case timeout < 3*interval:
			faults = append(faults, fmt.Errorf("%s: %s is less than three intervals of %s: one lost beat would be a lost node", c.at(id, "timeout"), timeout, interval))
		}
		at := netip.AddrPortFrom(c.forNode(id, "addr", c.node).(netip.Addr), uint16(c.forNode(id, "port", c.node).(int)))
		if i := slices.IndexFunc(taken, func(p place) bool { return clash(p.at, at) }); i >= 0 {
			faults = append(faults, fmt.Errorf("%s: %s receives on %s already; give each heartbeat a port of its own", c.at(id, "port"), taken[i].who, taken[i].at))
		}
		taken = append(taken, place{id, at})
	}
	return faults
}

// clash tells whether two sockets cannot be bound at once: one for all
// addresses (`::` is for both families) takes the port of each.
func clash(a, b netip.AddrPort) bool {
	all := func(a, b netip.Addr) bool { return a.IsUnspecified() && (a.Is6() || b.Is4()) }
	return a.Port() == b.Port() && (a.Addr() == b.Addr() || all(a.Addr(), b.Addr()) || all(b.Addr(), a.Addr()))
}
