// blacklist.go: who sent invalid messages in a row, and who is shut out
// (design.md §4). The name in a message is not proven until the message
// opens, so a count belongs to everything that is known of the sender, and
// nobody can shut out another. It knows no network and no cryptography.

package main

import (
	"cmp"
	"container/list"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// source is where a message came from.
type source struct {
	transport string // tcp, udp
	addr      netip.AddrPort
}

// sender is what the blacklist counts for. The transport is part of it since
// datagrams are easily sent from a foreign address; whether the port is
// privileged, since the daemons' are and those of an ordinary user of the same
// machine are not.
type sender struct {
	transport  string
	addr       netip.Addr
	node       string // empty: all that names no member, over any transport
	privileged bool
}

// senderOf tells for whom a message of that node counts. Joins name no member
// yet, whatever name they bring.
func senderOf(src source, node string, isMember bool) sender {
	addr := src.addr.Addr().Unmap()
	if !isMember {
		return sender{addr: addr}
	}
	return sender{src.transport, addr, node, src.addr.Port() < privilegedPorts}
}

type blacklistEntry struct {
	sender sender
	count  int
	last   time.Time // of the last counted message
}

// blacklist is bounded in entries and in time.
type blacklist struct {
	now func() time.Time

	mu      sync.Mutex
	entries map[sender]*list.Element
	byAge   *list.List // of *blacklistEntry, the oldest first
}

func newBlacklist(now func() time.Time) *blacklist {
	return &blacklist{now: now, entries: map[sender]*list.Element{}, byAge: list.New()}
}

// shutOut tells whether what s sends is dropped.
func (b *blacklist) shutOut(s sender) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.entry(s)
	return e != nil && e.count >= strikes
}

// strike counts an invalid message and tells whether this very one shut s out.
func (b *blacklist) strike(s sender) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.entry(s)
	if e == nil {
		if b.byAge.Len() >= blacklistSize {
			b.remove(b.byAge.Front())
		}
		e = &blacklistEntry{sender: s}
		b.entries[s] = b.byAge.PushBack(e)
	}
	e.count++
	e.last = b.now()
	b.byAge.MoveToBack(b.entries[s])
	return e.count == strikes
}

// pass forgets what s did, unless s is shut out: the messages that came in
// between may be another's.
func (b *blacklist) pass(s sender) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.entry(s); e != nil && e.count < strikes {
		b.remove(b.entries[s])
	}
}

// clear forgets the senders that which names, and tells how many there were.
func (b *blacklist) clear(which func(sender) bool) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	cleared := 0
	for s, element := range b.entries {
		if which(s) {
			b.remove(element)
			cleared++
		}
	}
	return cleared
}

func everySender(sender) bool { return true }

// list returns the entries, worst first.
func (b *blacklist) list() []blacklistEntry {
	b.mu.Lock()
	defer b.mu.Unlock()
	var entries []blacklistEntry
	for element := b.byAge.Front(); element != nil; {
		e, next := element.Value.(*blacklistEntry), element.Next()
		if b.now().Sub(e.last) >= blacklistAge {
			b.remove(element)
		} else {
			entries = append(entries, *e)
		}
		element = next
	}
	slices.SortStableFunc(entries, func(x, y blacklistEntry) int {
		return cmp.Or(cmp.Compare(y.count, x.count), cmp.Compare(x.sender.node, y.sender.node), x.sender.addr.Compare(y.sender.addr))
	})
	return entries
}

// entry returns the entry of s if it has not aged out.
func (b *blacklist) entry(s sender) *blacklistEntry {
	element := b.entries[s]
	if element == nil {
		return nil
	}
	e := element.Value.(*blacklistEntry)
	if b.now().Sub(e.last) >= blacklistAge {
		b.remove(element)
		return nil
	}
	return e
}

func (b *blacklist) remove(element *list.Element) {
	b.byAge.Remove(element)
	delete(b.entries, element.Value.(*blacklistEntry).sender)
}
