package main

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"
)

// blacklistClock is a blacklist whose time the test makes.
func blacklistClock() (b *blacklist, pass func(time.Duration)) {
	now := time.Unix(1_600_000_000, 0)
	return newBlacklist(func() time.Time { return now }), func(d time.Duration) { now = now.Add(d) }
}

// member is a member's sender, from an ordinary port of an address.
func member(node, addr string) sender {
	return senderOf(source{"tcp", netip.MustParseAddrPort(addr + ":40000")}, node, true)
}

// strikeTimes strikes s, which must shut it out in the last one or not at all.
func strikeTimes(t *testing.T, b *blacklist, s sender, times int, want bool) {
	t.Helper()
	for i := range times {
		if out := b.strike(s); out != (want && i == times-1) {
			t.Errorf("strike %d of %v shuts out: %v", i+1, s, out)
		}
	}
	if got := b.shutOut(s); got != want {
		t.Errorf("after %d strikes, shut out = %v, want %v", times, got, want)
	}
}

func TestBlacklistFiveInARow(t *testing.T) {
	t.Parallel()
	b, _ := blacklistClock()
	s := member("n1", "192.0.2.1")
	strikeTimes(t, b, s, 4, false)
	strikeTimes(t, b, s, 1, true)
	// It is told once, so that it is logged once.
	if b.strike(s) {
		t.Error("the sixth is told as shutting out too")
	}
}

func TestBlacklistAValidMessageClearsBelowFive(t *testing.T) {
	t.Parallel()
	b, _ := blacklistClock()
	s := member("n1", "192.0.2.1")
	for range 3 { // twelve, never five in a row
		strikeTimes(t, b, s, 4, false)
		b.pass(s)
	}
	if got := b.list(); len(got) != 0 {
		t.Errorf("after a valid message there is %v", got)
	}
	// Once shut out, what opens may be another's who is behind that address.
	strikeTimes(t, b, s, 5, true)
	b.pass(s)
	if !b.shutOut(s) {
		t.Error("a valid message lets in who was shut out")
	}
	b.pass(member("n2", "192.0.2.1")) // of one who is not counted: nothing
}

func TestBlacklistAges(t *testing.T) {
	t.Parallel()
	b, pass := blacklistClock()
	s := member("n1", "192.0.2.1")
	strikeTimes(t, b, s, 4, false)
	pass(blacklistAge - time.Second)
	strikeTimes(t, b, s, 1, true) // counted from here on
	for range 59 {
		pass(time.Minute)
		if !b.shutOut(s) {
			t.Fatal("let in before an hour has passed since the last counted message")
		}
	}
	// Messages that are dropped in between do not count, else a sender that
	// goes on would never be let in again.
	pass(time.Minute)
	if b.shutOut(s) {
		t.Error("still shut out an hour after the last counted message")
	}
	strikeTimes(t, b, s, 4, false)
	pass(blacklistAge)
	if got := b.list(); len(got) != 0 {
		t.Errorf("an hour later the list shows %v", got)
	}
	strikeTimes(t, b, s, 4, false) // and the count begins anew
}

// What one sender does is not counted for another, in whatever they differ.
func TestBlacklistKeysAreSeparate(t *testing.T) {
	t.Parallel()
	at := func(transport, addr, node string, isMember bool) sender {
		return senderOf(source{transport, netip.MustParseAddrPort(addr)}, node, isMember)
	}
	bad := at("tcp", "192.0.2.1:40000", "n1", true)
	tests := []struct {
		name string
		s    sender
		same bool
	}{
		{"another ordinary port", at("tcp", "192.0.2.1:1024", "n1", true), true},
		{"IPv4 seen through IPv6", at("tcp", "[::ffff:192.0.2.1]:40000", "n1", true), true},
		{"another transport", at("udp", "192.0.2.1:40000", "n1", true), false},
		{"another address", at("tcp", "192.0.2.2:40000", "n1", true), false},
		{"another name", at("tcp", "192.0.2.1:40000", "n2", true), false},
		{"a privileged port", at("tcp", "192.0.2.1:1023", "n1", true), false},
		{"no member", at("tcp", "192.0.2.1:40000", "n1", false), false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b, _ := blacklistClock()
			strikeTimes(t, b, bad, 5, true)
			if got := b.shutOut(test.s); got != test.same {
				t.Errorf("shut out = %v, want %v", got, test.same)
			}
		})
	}
}

// Invented names are one sender, whatever they are, so they fill no table; and
// they shut out no member's name.
func TestBlacklistNamelessShutOutNoNames(t *testing.T) {
	t.Parallel()
	b, _ := blacklistClock()
	for i := range 10 {
		transport := []string{"tcp", "udp"}[i%2]
		src := source{transport, netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(1000+10*i))}
		b.strike(senderOf(src, fmt.Sprintf("invented%d", i), false))
	}
	if got := b.list(); len(got) != 1 || got[0].count != 10 || got[0].sender.node != "" {
		t.Errorf("ten invented names are counted as %v", got)
	}
	nameless := senderOf(source{"tcp", netip.MustParseAddrPort("192.0.2.1:1")}, "", false)
	if !b.shutOut(nameless) {
		t.Error("the sender of invented names is not shut out")
	}
	for _, port := range []string{":40000", ":1000"} {
		for _, transport := range []string{"tcp", "udp"} {
			if b.shutOut(senderOf(source{transport, netip.MustParseAddrPort("192.0.2.1" + port)}, "n1", true)) {
				t.Errorf("a member at that address is shut out, over %s from %s", transport, port)
			}
		}
	}
	if b.shutOut(senderOf(source{"tcp", netip.MustParseAddrPort("192.0.2.2:1")}, "", false)) {
		t.Error("another address is shut out")
	}
}

func TestBlacklistIsBounded(t *testing.T) {
	t.Parallel()
	b, pass := blacklistClock()
	at := func(i int) sender {
		return member("n1", netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).String())
	}
	for i := range blacklistSize {
		b.strike(at(i))
		pass(time.Millisecond)
	}
	strikeTimes(t, b, at(0), 4, true) // now the newest, with five
	for i := range blacklistSize - 1 {
		b.strike(at(blacklistSize + i))
	}
	if got := len(b.list()); got != blacklistSize || len(b.entries) != blacklistSize {
		t.Errorf("%d entries, %d in the index; want %d", got, len(b.entries), blacklistSize)
	}
	if !b.shutOut(at(0)) {
		t.Error("the oldest by its last message goes, not by its first")
	}
	b.strike(at(3 * blacklistSize))
	if b.shutOut(at(0)) {
		t.Error("the oldest entry did not make room")
	}
	if got := len(b.list()); got != blacklistSize {
		t.Errorf("%d entries, want %d", got, blacklistSize)
	}
}

func TestBlacklistClear(t *testing.T) {
	t.Parallel()
	b, _ := blacklistClock()
	n1, n2 := member("n1", "192.0.2.1"), member("n2", "192.0.2.1")
	nameless := senderOf(source{"tcp", netip.MustParseAddrPort("192.0.2.1:1")}, "", false)
	for _, s := range []sender{n1, n2, nameless} {
		strikeTimes(t, b, s, 5, true)
	}
	if got := b.clear(func(s sender) bool { return s.node == "n1" }); got != 1 {
		t.Errorf("%d cleared, want 1", got)
	}
	if b.shutOut(n1) || !b.shutOut(n2) || !b.shutOut(nameless) {
		t.Errorf("shut out: n1 %v, n2 %v, nameless %v; want the last two", b.shutOut(n1), b.shutOut(n2), b.shutOut(nameless))
	}
	if got := b.clear(everySender); got != 2 || len(b.list()) != 0 || b.byAge.Len() != 0 {
		t.Errorf("%d cleared, %v is left", got, b.list())
	}
	strikeTimes(t, b, n2, 4, false)
}

func TestBlacklistListsTheWorstFirst(t *testing.T) {
	t.Parallel()
	b, _ := blacklistClock()
	counts := map[string]int{"n1": 1, "n2": 5, "n3": 3, "n4": 3}
	for node, count := range counts {
		for range count {
			b.strike(member(node, "192.0.2.1"))
		}
	}
	var got []string
	for _, e := range b.list() {
		got = append(got, fmt.Sprint(e.sender.node, e.count))
	}
	if want := []string{"n25", "n33", "n43", "n11"}; !slices.Equal(got, want) {
		t.Errorf("list = %v, want %v", got, want)
	}
}

// Connections and datagrams count at once; the race detector watches.
func TestBlacklistConcurrently(t *testing.T) {
	t.Parallel()
	b := newBlacklist(time.Now)
	var all sync.WaitGroup
	outs := make(chan bool, 400)
	for range 8 {
		all.Go(func() {
			for range 50 {
				outs <- b.strike(member("n1", "192.0.2.1"))
				b.shutOut(member("n1", "192.0.2.1"))
				b.pass(member("n2", "192.0.2.1"))
				b.list()
			}
		})
	}
	all.Wait()
	close(outs)
	told := 0
	for out := range outs {
		if out {
			told++
		}
	}
	if got := b.list(); told != 1 || len(got) != 1 || got[0].count != 400 {
		t.Errorf("shut out was told %d times, the list is %v; want once, and a count of 400", told, got)
	}
}
