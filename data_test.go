package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// dataWorld is a cluster of stores: beats and fetches go between them by hand,
// in virtual time.
type dataWorld struct {
	tb      testing.TB
	nodes   []string
	stores  map[string]*dataStore
	now     time.Time
	epoch   uint64
	cut     map[[2]string]bool // beats and fetches of this pair are lost
	fetches int
	largest int // bytes of the largest beat
}

func newDataWorld(tb testing.TB, nodes ...string) *dataWorld {
	w := &dataWorld{tb: tb, nodes: nodes, stores: map[string]*dataStore{}, now: time.Unix(1_000_000, 0), cut: map[[2]string]bool{}}
	for _, node := range nodes {
		w.start(node)
	}
	return w
}

// start begins a node anew, with nothing but a new epoch.
func (w *dataWorld) start(node string) *dataStore {
	w.epoch += 10
	s := newDataStore(node, w.epoch)
	s.linked = func(peer string) bool { return !w.isCut(node, peer) && w.stores[peer] != nil }
	s.members(w.nodes)
	w.stores[node] = s
	return s
}

func (w *dataWorld) isCut(a, b string) bool { return w.cut[[2]string{min(a, b), max(a, b)}] }

// cutOff cuts the link between two nodes, or mends it.
func (w *dataWorld) cutOff(a, b string, cut bool) { w.cut[[2]string{min(a, b), max(a, b)}] = cut }

// size is about what the data of a beat takes on the wire.
func (b beatData) size() int {
	n := 8 + 8 + 24*len(b.held)
	if b.changes != nil {
		n += 16
		for _, e := range b.changes.entries {
			n += len(e.key) + len(e.value) + 4
		}
	}
	return n
}

// filled is a beat as it is sent.
func (w *dataWorld) filled(from, to string) (b beatData) {
	w.stores[from].fill(to, &b)
	w.largest = max(w.largest, b.size())
	return b
}

// deliver gives a beat to its receiver, and does the fetches that it asks for.
func (w *dataWorld) deliver(from, to string, epoch uint64, b beatData) {
	_, fetches := w.stores[to].take(w.now, from, epoch, b)
	for _, f := range fetches {
		w.fetch(to, f)
	}
}

func (w *dataWorld) fetch(by string, f dataFetch) {
	w.fetches++
	var r dataReply
	err := fmt.Errorf("no way to %s", f.from)
	if !w.isCut(by, f.from) {
		r, err = w.stores[f.from].reply(f.since)
	}
	w.stores[by].fetched(w.now, f, r, err)
}

// beat is one beat, there and at once.
func (w *dataWorld) beat(from, to string) {
	if b := w.filled(from, to); !w.isCut(from, to) {
		w.deliver(from, to, w.stores[from].own().epoch, b)
	}
}

// round is a beat from each to each.
func (w *dataWorld) round() {
	w.now = w.now.Add(500 * time.Millisecond)
	for _, from := range w.nodes {
		for _, to := range w.nodes {
			if from != to {
				w.beat(from, to)
			}
		}
	}
}

func (w *dataWorld) rounds(n int) {
	for range n {
		w.round()
	}
}

func (w *dataWorld) set(node, key, value string) {
	w.tb.Helper()
	_, err := w.stores[node].set(key, value)
	must(w.tb, err)
}

// values are what is held of a node.
func (s *dataStore) values(node string) map[string]string {
	all := map[string]string{}
	if h := s.held[node]; h != nil {
		for key, item := range h.items {
			if item.value != nil {
				all[key] = string(item.value)
			}
		}
	}
	return all
}

// differences tells where a copy is not what its owner has.
func (w *dataWorld) differences() string {
	var all []string
	for _, node := range w.nodes {
		for _, owner := range w.nodes {
			if own, copy := w.stores[owner].values(owner), w.stores[node].values(owner); !maps.Equal(own, copy) {
				all = append(all, fmt.Sprintf("%s holds %d keys of %s at %v, which has %d at %v",
					node, len(copy), owner, w.stores[node].version(owner), len(own), w.stores[owner].version(owner)))
			}
		}
	}
	return strings.Join(all, "\n")
}

func (w *dataWorld) wantEqual() {
	w.tb.Helper()
	if d := w.differences(); d != "" {
		w.tb.Errorf("%s", d)
	}
}

// fill gives a node many values.
func (w *dataWorld) fill(node string, n int) {
	for i := range n {
		w.set(node, fmt.Sprintf("services/svc%d", i), strings.Repeat("x", 500))
	}
}

func TestDataSpreads(t *testing.T) {
	w := newDataWorld(t, "n1", "n2", "n3")
	w.set("n1", "node", "one")
	w.set("n2", "services/a", "two")
	w.rounds(3)
	w.wantEqual()
	if w.fetches > 0 {
		t.Errorf("%d fetches of what fits into beats", w.fetches)
	}
}

func TestDataUnchangedIsNoChange(t *testing.T) {
	s := newDataStore("n1", 1)
	for _, step := range []struct {
		set, want bool
		value     string
	}{{true, true, "a"}, {true, false, "a"}, {true, true, "b"}, {false, true, ""}, {false, false, ""}, {true, true, "b"}} {
		before := s.version("n1")
		changed := false
		if step.set {
			changed, _ = s.set("node", step.value)
		} else {
			changed = s.remove("node")
		}
		if changed != step.want || s.version("n1").newer(before) != step.want {
			t.Errorf("%+v: changed %t, from %v to %v", step, changed, before, s.version("n1"))
		}
	}
}

func TestDataSmallChangeIsInTheNextBeat(t *testing.T) {
	w := newDataWorld(t, "n1", "n2", "n3")
	w.fill("n1", 1000)
	w.rounds(4)
	w.wantEqual()
	w.fetches = 0
	w.set("n1", "services/svc7", "up")
	w.stores["n1"].remove("services/svc8")
	for _, to := range []string{"n2", "n3"} {
		w.beat("n1", to)
	}
	w.wantEqual()
	if w.fetches > 0 {
		t.Errorf("%d fetches", w.fetches)
	}
	// It is sent until the peer says that it holds it, and no longer.
	if b := w.filled("n1", "n2"); b.changes == nil {
		t.Error("a change that may be lost is not sent again")
	}
	w.rounds(2)
	if b := w.filled("n1", "n2"); b.changes != nil || b.held != nil {
		t.Errorf("all is known, and told again: %+v", b)
	}
}

// A node whose data changes faster than beats come back learns all the same
// what its peers hold, and goes on with small changes.
func TestDataKeepsUpWithManyChanges(t *testing.T) {
	w := newDataWorld(t, "n1", "n2")
	w.rounds(3)
	for i := range 20 {
		w.set("n1", fmt.Sprint("services/svc", i), strings.Repeat("x", 250))
		w.beat("n1", "n2")
		w.set("n1", "node", fmt.Sprint(i))
		w.beat("n2", "n1")
	}
	if w.rounds(2); w.fetches > 0 {
		t.Errorf("%d fetches of changes that fit into beats", w.fetches)
	}
	w.wantEqual()
}

// An owner that does not know yet what is held here has one more beat to tell.
func TestDataWaitsForTheOwnersNextBeat(t *testing.T) {
	s := newDataStore("n1", 1)
	s.members([]string{"n1", "n2"})
	now := time.Unix(1_000_000, 0)
	for version := uint64(1); version < 4; version++ {
		if _, fetches := s.take(now, "n2", 5, beatData{version: version}); fetches != nil {
			t.Errorf("version %d is fetched at once", version)
		}
		s.take(now, "n2", 5, beatData{version: version, changes: &dataChanges{base: version - 1, seq: version}})
		if s.version("n2").seq != version {
			t.Fatalf("version %d is not taken", version)
		}
	}
	s.take(now, "n2", 5, beatData{version: 9})
	if _, fetches := s.take(now, "n2", 5, beatData{version: 9}); len(fetches) != 1 {
		t.Error("what the owner does not tell is not fetched")
	}
}

func TestDataLargeChangeIsFetchedOnce(t *testing.T) {
	w := newDataWorld(t, "n1", "n2", "n3")
	w.rounds(3)
	w.fill("n1", 50)
	w.beat("n1", "n2")
	if w.fetches != 1 || !maps.Equal(w.stores["n1"].values("n1"), w.stores["n2"].values("n1")) {
		t.Errorf("%d fetches\n%s", w.fetches, w.differences())
	}
	w.rounds(3)
	w.wantEqual()
	if w.fetches != 2 {
		t.Errorf("%d fetches for 2 peers", w.fetches)
	}
	if w.largest > 24*3+32+changesSmall+200 {
		t.Errorf("a beat has %d bytes of data", w.largest)
	}
}

// Only what changed is fetched.
func TestDataFetchBringsChanges(t *testing.T) {
	w := newDataWorld(t, "n1", "n2")
	w.fill("n1", 100)
	w.rounds(4)
	w.wantEqual()
	since := w.stores["n2"].version("n1")
	for i := range 5 {
		w.set("n1", fmt.Sprintf("services/svc%d", i), strings.Repeat("y", 500))
	}
	w.stores["n1"].remove("services/svc9")
	r, err := w.stores["n1"].reply(since)
	must(t, err)
	if len(r.Entries) != 6 || r.Base != since.seq || r.Entries["services/svc9"] != nil {
		t.Errorf("%d entries from base %d", len(r.Entries), r.Base)
	}
	for _, since := range []dataVersion{{"n1", 0, 0}, {"n1", 7, since.seq}, {"n1", since.epoch, since.seq + 1000}} {
		if r, err = w.stores["n1"].reply(since); err != nil || r.Base != 0 || len(r.Entries) != 99 {
			t.Errorf("since %v: %d entries from base %d, %v", since, len(r.Entries), r.Base, err)
		}
	}
	if _, err = w.stores["n1"].reply(dataVersion{node: "nobody"}); err == nil {
		t.Error("data of no member")
	}
}

// What is sent in an idle cluster does not depend on how much there is.
func TestDataIdleCostsTheSame(t *testing.T) {
	size := func(services int) (total int) {
		w := newDataWorld(t, "n1", "n2", "n3")
		for _, node := range w.nodes {
			w.fill(node, services)
		}
		w.rounds(6)
		w.wantEqual()
		w.fetches = 0
		for range 10 {
			w.round()
			for _, from := range w.nodes {
				for _, to := range w.nodes {
					if from != to {
						b := w.filled(from, to)
						total += b.size()
					}
				}
			}
		}
		if w.fetches > 0 {
			t.Errorf("%d fetches of an idle cluster", w.fetches)
		}
		return total
	}
	none, many := size(0), size(1000)
	if none != many || none != 10*6*16 {
		t.Errorf("%d bytes without services, %d with 1,000", none, many)
	}
}

// A third node passes on what the owner cannot tell.
func TestDataComesRoundACutLink(t *testing.T) {
	w := newDataWorld(t, "n1", "n2", "n3")
	w.rounds(3)
	w.cutOff("n1", "n3", true)
	for _, n := range []int{1, 40} { // a small one, and a large one
		w.fill("n1", n)
		w.stores["n1"].remove("services/svc0")
		w.rounds(4)
		w.wantEqual()
	}
	// While the owner is linked, a third node is not asked.
	w.cutOff("n1", "n3", false)
	w.rounds(3)
	w.fetches = 0
	w.set("n1", "services/svc1", "new")
	w.beat("n1", "n2")
	w.beat("n2", "n3")
	if w.fetches > 0 {
		t.Errorf("%d fetches of what the owner will tell", w.fetches)
	}
}

// Where the owner cannot be asked, although beats come from it, another is.
func TestDataFetchesElsewhereAfterFailures(t *testing.T) {
	w := newDataWorld(t, "n1", "n2", "n3")
	w.rounds(3)
	w.fill("n1", 40)
	asked := map[string]int{}
	for range 8 {
		w.now = w.now.Add(500 * time.Millisecond)
		w.beat("n1", "n2")
		w.beat("n2", "n1")
		for _, from := range []string{"n1", "n2"} {
			_, fetches := w.stores["n3"].take(w.now, from, w.stores[from].own().epoch, w.filled(from, "n3"))
			for _, f := range fetches {
				if asked[f.from]++; f.from == "n1" {
					w.stores["n3"].fetched(w.now, f, dataReply{}, fmt.Errorf("filtered"))
				} else {
					w.fetch("n3", f)
				}
			}
		}
		w.beat("n3", "n1")
		w.beat("n3", "n2")
	}
	w.wantEqual()
	if asked["n1"] == 0 || asked["n1"] > 2 || asked["n2"] != 1 {
		t.Errorf("asked: %v", asked)
	}
}

func TestDataFetchesAreSpaced(t *testing.T) {
	w := newDataWorld(t, "n1", "n2")
	w.rounds(3)
	w.fill("n1", 40)
	beat := w.filled("n1", "n2")
	n2, epoch := w.stores["n2"], w.stores["n1"].own().epoch
	_, first := n2.take(w.now, "n1", epoch, beat)
	_, second := n2.take(w.now, "n1", epoch, beat)
	if len(first) != 1 || len(second) != 0 {
		t.Fatalf("%d fetches, and %d while one goes on", len(first), len(second))
	}
	n2.fetched(w.now, first[0], dataReply{}, fmt.Errorf("lost"))
	asked := 0
	for range 600 { // a minute
		w.now = w.now.Add(100 * time.Millisecond)
		_, fetches := n2.take(w.now, "n1", epoch, beat)
		for _, f := range fetches {
			asked++
			n2.fetched(w.now, f, dataReply{}, fmt.Errorf("lost"))
		}
	}
	if asked < 4 || asked > 8 {
		t.Errorf("%d fetches in a minute", asked)
	}
}

func TestDataOfANewStartReplacesAll(t *testing.T) {
	w := newDataWorld(t, "n1", "n2", "n3")
	w.fill("n1", 3)
	w.rounds(3)
	old := w.filled("n1", "n2")
	w.set("n1", "node", "late")
	late, oldEpoch := w.filled("n1", "n2"), w.stores["n1"].own().epoch
	w.start("n1")
	w.set("n1", "services/svc1", "only this")
	w.beat("n2", "n1")
	if got := len(w.stores["n2"].values("n1")); got != 3 {
		t.Errorf("%d keys of the earlier start are held before the new one says anything", got)
	}
	w.rounds(3)
	w.wantEqual()
	// What comes late of the earlier start changes nothing.
	before := w.stores["n2"].version("n1")
	for _, b := range []beatData{old, late} {
		w.deliver("n1", "n2", oldEpoch, b)
	}
	if after := w.stores["n2"].version("n1"); after != before {
		t.Errorf("a version went back from %v to %v", before, after)
	}
	w.wantEqual()
}

func TestDataMembers(t *testing.T) {
	w := newDataWorld(t, "n1", "n2", "n3")
	w.set("n2", "node", "two")
	w.rounds(3)
	n1 := w.stores["n1"]
	n1.members([]string{"n1", "n3"})
	if n1.held["n2"] != nil || n1.peers["n2"] != nil {
		t.Error("data of a node that left is kept")
	}
	if changed, fetches := n1.take(w.now, "n2", 99, beatData{version: 9, changes: &dataChanges{seq: 9}}); changed || fetches != nil {
		t.Error("data of a stranger is taken")
	}
	w.deliver("n3", "n1", w.stores["n3"].own().epoch, w.filled("n3", "n1")) // which names n2's
	if n1.held["n2"] != nil {
		t.Error("a stranger's data is held")
	}
	n1.members(w.nodes)
	w.rounds(3)
	w.wantEqual()
}

func TestDataBounds(t *testing.T) {
	s := newDataStore("n1", 1)
	big := strings.Repeat("x", 1<<20)
	for i := range 3 {
		if _, err := s.set(fmt.Sprint("services/svc", i), big); err != nil {
			t.Fatal(err)
		}
	}
	if changed, err := s.set("services/svc3", big); err == nil {
		t.Error("more than a node's data may have", changed)
	}
	if _, err := s.set("services/svc0", big[1:]); err != nil {
		t.Error("what shrinks is refused:", err)
	}
	s.members([]string{"n1", "n2"})
	for name, entries := range map[string][]dataEntry{
		"twice":       {{"node", []byte("1")}, {"node", []byte("2")}},
		"disorder":    {{"services/b", []byte("1")}, {"services/a", []byte("2")}},
		"no JSON":     {{"node", []byte("{")}},
		"long key":    {{strings.Repeat("k", dataKeySize+1), []byte("1")}},
		"large":       {{"node", []byte(`"` + strings.Repeat(big, 5) + `"`)}},
		"no such one": {{"node", []byte{}}},
	} {
		if changed, err := s.apply(dataVersion{"n2", 5, 5}, 0, entries); changed || err == nil || s.held["n2"] != nil {
			t.Errorf("%s: taken, %v", name, err)
		}
	}
	if changed, err := s.apply(dataVersion{"n2", 5, 5}, 3, nil); changed || err == nil {
		t.Error("changes of a version that is not held are taken")
	}
	if changed, err := s.apply(dataVersion{"n2", 5, 5}, 0, nil); !changed || err != nil {
		t.Error("no data at all is refused:", err)
	}
	if changed, err := s.apply(dataVersion{"n2", 6, 6}, 3, nil); changed || err == nil {
		t.Error("changes of another epoch are taken")
	}
	// Keys that come and go leave a bounded trace.
	for i := range 10_000 {
		key := fmt.Sprint("services/t", i)
		if _, err := s.set(key, i); err != nil || !s.remove(key) {
			t.Fatal(i, err)
		}
	}
	own := s.own()
	if own.gone > tombstonesKept || len(own.items) > tombstonesKept+10 || len(own.log) > 2*len(own.items)+marksSpare+1 {
		t.Errorf("%d keys gone, %d items, %d marks", own.gone, len(own.items), len(own.log))
	}
	size := 0
	for key, item := range own.items {
		size += dataEntry{key, item.value}.cost()
	}
	if size != own.size {
		t.Errorf("%d bytes are counted, %d are there", own.size, size)
	}
	// Who missed tombstones that are forgotten is given everything.
	if r, err := s.reply(dataVersion{"n1", 1, 5}); err != nil || r.Base != 0 {
		t.Errorf("base %d, %v", r.Base, err)
	}
}

// A value that this version cannot read is held and passed on all the same.
func TestDataOfALaterVersion(t *testing.T) {
	w := newDataWorld(t, "n1", "n2")
	for _, key := range []string{"node", "services/a", "services/..", "moons/io"} {
		w.set(key[:0]+"n1", key, "another form")
	}
	w.rounds(3)
	w.wantEqual()
	if b := w.stores["n2"].brief("n1"); len(b.instances) > 0 || b.frozen {
		t.Errorf("%+v", b)
	}
}

func TestDataBrief(t *testing.T) {
	s := newDataStore("n1", 1)
	instance := mustJSON(instanceData{Avail: statusUp, Frozen: true, Monitor: monitorData{Status: stateStopping}})
	s.set(keyNode, nodeData{Frozen: true})
	s.set(keyServices+"a", serviceEntry{Nodes: []string{"n1"}, Instance: instance})
	s.set(keyServices+"b", serviceEntry{Nodes: []string{"n2"}})
	want := peerData{frozen: true, instances: map[string]instanceBrief{"a": {statusUp, stateStopping, true}}}
	if got := s.brief("n1"); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}

// TestDataConverges: beats and fetches are lost, late, doubled and out of
// order; nodes start anew; links are cut. Whatever happens, versions do not go
// back, and once it is over all hold the same.
func TestDataConverges(t *testing.T) {
	for seed := range uint64(300) {
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) { convergence(t, seed) }) {
			return
		}
	}
}

func convergence(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 1))
	names := []string{"n1", "n2", "n3", "n4", "n5"}
	w := newDataWorld(t, names[:2+random.IntN(4)]...)
	type packet struct {
		from, to string
		epoch    uint64
		data     beatData
	}
	type question struct {
		by *dataStore
		f  dataFetch
	}
	var beats []packet
	var questions []question
	seen := map[[2]string]dataVersion{} // by node and owner, of the node's present start
	pick := func() string { return w.nodes[random.IntN(len(w.nodes))] }
	for range 400 {
		w.now = w.now.Add(time.Duration(random.IntN(300)) * time.Millisecond)
		switch node := pick(); random.IntN(12) {
		case 0, 1:
			w.set(node, fmt.Sprint("services/s", random.IntN(20)), strings.Repeat("v", random.IntN(400))+fmt.Sprint(random.IntN(9)))
		case 2:
			w.stores[node].remove(fmt.Sprint("services/s", random.IntN(20)))
		case 3:
			if random.IntN(8) == 0 {
				w.start(node)
				maps.DeleteFunc(seen, func(key [2]string, _ dataVersion) bool { return key[0] == node })
			}
		case 4:
			w.cutOff(node, pick(), random.IntN(3) == 0)
		case 5, 6:
			if len(questions) > 0 {
				i := random.IntN(len(questions))
				q := questions[i]
				questions = slices.Delete(questions, i, i+1)
				r, err := w.stores[q.f.from].reply(q.f.since)
				if random.IntN(3) == 0 || w.isCut(q.by.node, q.f.from) {
					err = fmt.Errorf("lost")
				}
				if w.stores[q.by.node] == q.by {
					q.by.fetched(w.now, q.f, r, err)
				}
			}
		default:
			if to := pick(); to != node {
				beats = append(beats, packet{node, to, w.stores[node].own().epoch, w.filled(node, to)})
			}
			if len(beats) > 0 {
				i := random.IntN(len(beats))
				p := beats[i]
				if random.IntN(4) > 0 {
					beats = slices.Delete(beats, i, i+1) // else it comes again
				}
				if random.IntN(4) > 0 && !w.isCut(p.from, p.to) {
					s := w.stores[p.to]
					_, fetches := s.take(w.now, p.from, p.epoch, p.data)
					for _, f := range fetches {
						questions = append(questions, question{s, f})
					}
				}
			}
		}
		for _, node := range w.nodes {
			for _, v := range w.stores[node].versions() {
				key := [2]string{node, v.node}
				if seen[key].newer(v) {
					t.Fatalf("%s went back from %v to %v", node, seen[key], v)
				}
				seen[key] = v
			}
		}
	}
	clear(w.cut)
	for _, q := range questions {
		if w.stores[q.by.node] == q.by {
			q.by.fetched(w.now, q.f, dataReply{}, fmt.Errorf("lost"))
		}
	}
	w.now = w.now.Add(2 * fetchLongPause)
	w.rounds(5)
	w.wantEqual()
	before := w.fetches
	w.round()
	for _, from := range w.nodes {
		to := w.nodes[(slices.Index(w.nodes, from)+1)%len(w.nodes)]
		if b := w.filled(from, to); b.held != nil || b.changes != nil || w.fetches != before {
			t.Errorf("%s goes on telling %s what it knows: %+v", from, to, b)
		}
	}
	if len(slices.CompactFunc(slices.Collect(maps.Values(w.stores)), func(a, b *dataStore) bool { return cmp.Compare(a.digest, b.digest) == 0 })) != 1 {
		t.Error("digests differ")
	}
}

// node_data of a real daemon: whole, and what changed since.
func TestNodeDataRequest(t *testing.T) {
	p, port := newLab(t, settings{"cluster.nodes": "node1 node2"})
	killServices(t, p)
	writeService(t, p, "svc1", sleeper)
	d := serveLive(t, p, port, nil)
	ask := func(options ...string) (data dataReply) {
		t.Helper()
		r := d.local("node_data", options...)
		if r.Status != 0 {
			t.Fatal(r.Error)
		}
		must(t, json.Unmarshal(r.Data, &data))
		return data
	}
	waitFor(t, patience, "the service is said to be there", func() bool { return ask().Entries["services/svc1"] != nil })
	all := ask("node=node1")
	if all.Node != "node1" || all.Base != 0 || all.Entries["node"] == nil {
		t.Errorf("%+v", all)
	}
	d.local("set_node_monitor", "local_expect=frozen")
	var since dataReply
	waitFor(t, patience, "the flag is said to be set", func() bool {
		since = ask(fmt.Sprint("since=", all.Seq), fmt.Sprint("epoch=", all.Epoch))
		return strings.Contains(string(since.Entries["node"]), `"frozen":true`)
	})
	if since.Base != all.Seq || since.Seq <= all.Seq {
		t.Errorf("from %d to %d, asked since %d", since.Base, since.Seq, all.Seq)
	}
	if r := ask("since=1", "epoch=7"); r.Base != 0 || len(r.Entries) < 2 {
		t.Errorf("since a number of another epoch: %+v", r)
	}
	for option, want := range map[string]string{"node=node2": "nothing is known of node2", "node=node9": "not in cluster.nodes"} {
		if r := d.local("node_data", option); r.Status == 0 || !strings.Contains(r.Error, want) {
			t.Errorf("%s: %s %s", option, r.Error, r.Data)
		}
	}
}
