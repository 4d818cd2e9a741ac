// data.go: the cluster's data (design.md §8). Each node owns its data: values
// by key, under a version of an epoch, one for each start of the daemon, and a
// number, one for each change. The others hold copies. Beats compare what is
// held by one digest; only where digests differ do they name versions. A small
// change travels in the beat, a larger one is fetched from whoever holds it. So
// what is sent grows with what changes, not with what there is.
//
// A store belongs to one goroutine; it has no clock, lock or network of its own.
// Values, once in it, are never changed, so others may read them.
//
// Versions of a node never go back: what is not newer than what is held is
// dropped.

package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strings"
	"time"
)

// keyNode and keyServices+name are the keys of a node's data. Others are those
// of a later version: held and passed on, but not looked at.
const (
	keyNode     = "node"
	keyServices = "services/"
)

// dataStore is what this node says of itself, and what it holds of others.
type dataStore struct {
	node  string
	names []string // the members, sorted
	held  map[string]*heldData
	peers map[string]*dataPeer
	// fetching are the nodes whose data is on its way, and from whom.
	fetching map[string]string
	trouble  map[string]fetchTrouble // by node whose data could not be fetched
	// linked tells of a member whether beats go both ways: then it tells its
	// data itself.
	linked func(node string) bool

	digest uint64 // of all versions held
}

// dataPeer is what a peer's present start is known to hold.
type dataPeer struct {
	epoch  uint64
	digest uint64                 // as it said
	told   uint64                 // the digest for which it was told the versions held here
	held   map[string]dataVersion // as it said
	missed int                    // beats in a row that name a newer version of its data, and bring nothing
}

// fetchTrouble is why data is not asked for right now.
type fetchTrouble struct {
	failures int
	from     string // the last one that failed
	until    time.Time
	pause    time.Duration
}

// heldData is one node's data.
type heldData struct {
	epoch, seq uint64
	items      map[string]*dataItem
	gone       int    // items that are tombstones
	size       int    // bytes of all items
	floor      uint64 // changes since an earlier number than this cannot be told
	log        []dataMark
}

// dataMark says that a key changed. Later marks of the same key supersede it.
type dataMark struct {
	seq uint64
	key string
}

// dataItem is a value and the number at which it became so; without a value,
// it is gone. node or service is what the value says, if this version knows.
type dataItem struct {
	seq     uint64
	value   json.RawMessage
	node    *nodeData
	service *serviceEntry
}

// dataFetch is a question to be asked: what `from` holds of a node, beyond the
// version that is held here.
type dataFetch struct {
	from  string
	since dataVersion
}

// dataReply is the reply of node_data: all of a node's data where base is 0,
// else what turns version base, or a later one, into version seq.
type dataReply struct {
	Node    string                     `json:"node"`
	Epoch   uint64                     `json:"epoch"`
	Seq     uint64                     `json:"seq"`
	Base    uint64                     `json:"base"`
	Entries map[string]json.RawMessage `json:"entries"` // null: gone
}

// newDataStore begins with nothing. epoch is above that of every earlier start.
func newDataStore(node string, epoch uint64) *dataStore {
	s := &dataStore{
		node: node, held: map[string]*heldData{}, peers: map[string]*dataPeer{},
		fetching: map[string]string{}, trouble: map[string]fetchTrouble{},
	}
	s.linked = func(node string) bool { return s.peers[node] != nil }
	s.held[node] = newHeldData(epoch)
	s.held[node].seq = 1 // so that "nothing yet" is a version too
	s.members([]string{node})
	return s
}

func newHeldData(epoch uint64) *heldData {
	return &heldData{epoch: epoch, items: map[string]*dataItem{}}
}

// members sets whose data counts; that of others is forgotten.
func (s *dataStore) members(list []string) {
	s.names = slices.Sorted(slices.Values(list))
	stranger := func(node string) bool { return !s.isMember(node) && node != s.node }
	maps.DeleteFunc(s.held, func(node string, _ *heldData) bool { return stranger(node) })
	maps.DeleteFunc(s.peers, func(node string, _ *dataPeer) bool { return stranger(node) })
	maps.DeleteFunc(s.trouble, func(node string, _ fetchTrouble) bool { return stranger(node) })
	s.sum()
}

func (s *dataStore) isMember(node string) bool {
	_, found := slices.BinarySearch(s.names, node)
	return found
}

// own is this node's data.
func (s *dataStore) own() *heldData { return s.held[s.node] }

// version is what is held of a node: 0, 0 for nothing.
func (s *dataStore) version(node string) dataVersion {
	v := dataVersion{node: node}
	if h := s.held[node]; h != nil {
		v.epoch, v.seq = h.epoch, h.seq
	}
	return v
}

func (v dataVersion) newer(than dataVersion) bool {
	return cmp.Or(cmp.Compare(v.epoch, than.epoch), cmp.Compare(v.seq, than.seq)) > 0
}

// versions are those of all members.
func (s *dataStore) versions() []dataVersion {
	all := make([]dataVersion, len(s.names))
	for i, node := range s.names {
		all[i] = s.version(node)
	}
	return all
}

// sum makes the digest of all versions held: FNV, since it need not withstand
// members, and all others are kept out by the seal.
func (s *dataStore) sum() {
	hash := fnv.New64a()
	var number [16]byte
	for _, v := range s.versions() {
		hash.Write(append([]byte(v.node), 0))
		binary.BigEndian.PutUint64(number[:], v.epoch)
		binary.BigEndian.PutUint64(number[8:], v.seq)
		hash.Write(number[:])
	}
	s.digest = hash.Sum64()
}

// set gives a key of this node's data a value, and tells whether that changes
// anything. What does not fit is refused, and the value as it was stays.
func (s *dataStore) set(key string, v any) (bool, error) {
	value, err := json.Marshal(v)
	if err != nil {
		return false, err
	}
	if was := s.own().items[key]; was != nil && bytes.Equal(was.value, value) {
		return false, nil
	}
	return true, s.change(dataEntry{key, value})
}

// remove takes a key out of this node's data.
func (s *dataStore) remove(key string) bool {
	was := s.own().items[key]
	return was != nil && was.value != nil && s.change(dataEntry{key: key}) == nil
}

func (s *dataStore) change(e dataEntry) error {
	h := s.own()
	if err := h.fits([]dataEntry{e}); err != nil {
		return err
	}
	h.seq++
	h.put(e, h.seq)
	s.sum()
	return nil
}

// ---- Beats ------------------------------------------------------------------

// fill makes the data of a beat to a peer. Versions are named where digests
// differ, and once after each change here, so that a peer whose own data goes on
// changing learns what came. What the peer lacks is sent once it said what it
// holds.
func (s *dataStore) fill(to string, b *beatData) {
	own, p := s.own(), s.peers[to]
	b.version, b.digest = own.seq, s.digest
	if p == nil || p.digest != s.digest || p.told != s.digest {
		b.held = s.versions()
	}
	if p == nil {
		return
	}
	p.told = s.digest
	there, said := p.held[s.node]
	if !said || !s.version(s.node).newer(there) {
		return
	}
	base := there.seq
	if there.epoch != own.epoch {
		base = 0
	}
	changes, small := own.since(base, changesSmall)
	if !small { // leads nowhere: the peer has to fetch
		changes.seq, changes.entries = changes.base, nil
	}
	b.changes = &changes
}

// take takes the data of a beat that counts. It tells whether what is held of
// the sender changed, and what is to be fetched; fetched must be called for each.
func (s *dataStore) take(now time.Time, from string, epoch uint64, b beatData) (changed bool, fetches []dataFetch) {
	if from == s.node || !s.isMember(from) {
		return false, nil
	}
	p := s.peers[from]
	if p == nil || p.epoch != epoch {
		p = &dataPeer{epoch: epoch, held: map[string]dataVersion{}}
		s.peers[from] = p
	}
	if c := b.changes; c != nil {
		changed, _ = s.apply(dataVersion{from, epoch, c.seq}, c.base, c.entries) // what does not fit is fetched
	}
	s.hear(p, from, b)
	return changed, s.lacking(now, p, from, b)
}

// hear notes what a peer holds.
func (s *dataStore) hear(p *dataPeer, from string, b beatData) {
	for _, v := range b.held {
		if s.isMember(v.node) {
			p.held[v.node] = v
		}
	}
	p.held[from] = dataVersion{from, p.epoch, b.version}
	if b.digest == s.digest {
		for _, v := range s.versions() {
			p.held[v.node] = v
		}
	}
	p.digest = b.digest
}

// lacking finds what the sender of a beat holds, this node does not, and will
// not come by itself: a linked owner tells its own data, as long as it is
// small; that of a third node is asked for where its owner does not reach here.
func (s *dataStore) lacking(now time.Time, p *dataPeer, from string, b beatData) (fetches []dataFetch) {
	for _, node := range s.names {
		there, have := p.held[node], s.version(node)
		if node == s.node || !there.newer(have) {
			continue
		}
		if node != from {
			if s.linked(node) && s.trouble[node].failures == 0 {
				continue
			}
		} else if b.changes == nil {
			if p.missed++; p.missed == 1 { // it may not have known yet what is held here
				continue
			}
		}
		if s.mayFetch(now, node, from) {
			s.fetching[node] = from
			fetches = append(fetches, dataFetch{from, have})
		}
	}
	if !p.held[from].newer(s.version(from)) {
		p.missed = 0
	}
	return fetches
}

// mayFetch keeps a wait after failures, twice as long for who failed, so that
// another has its turn.
func (s *dataStore) mayFetch(now time.Time, node, from string) bool {
	t := s.trouble[node]
	if from == t.from {
		t.until = t.until.Add(t.pause)
	}
	return s.fetching[node] == "" && !now.Before(t.until)
}

// fetched takes the outcome of a fetch, and tells whether what is held of the
// node changed; the error is the outcome's, or says what is wrong with it.
func (s *dataStore) fetched(now time.Time, f dataFetch, r dataReply, err error) (bool, error) {
	node := f.since.node
	delete(s.fetching, node)
	if !s.isMember(node) {
		return false, nil
	}
	changed := false
	if err == nil && r.Node != node {
		err = fmt.Errorf("the data is of %q", shortened(r.Node))
	}
	if err == nil {
		entries := make([]dataEntry, 0, len(r.Entries))
		for _, key := range slices.Sorted(maps.Keys(r.Entries)) {
			e := dataEntry{key, r.Entries[key]}
			if string(e.value) == "null" {
				e.value = nil
			}
			entries = append(entries, e)
		}
		changed, err = s.apply(dataVersion{node, r.Epoch, r.Seq}, r.Base, entries)
	}
	if err == nil && s.version(node) == f.since {
		err = errors.New("it holds nothing newer, though it said so")
	}
	if err != nil {
		t := s.trouble[node]
		pause := min(fetchPause<<min(t.failures, 20), fetchLongPause)
		s.trouble[node] = fetchTrouble{t.failures + 1, f.from, now.Add(pause), pause}
		return false, err
	}
	delete(s.trouble, node)
	return changed, nil
}

// apply brings what is held of a node to a newer version.
func (s *dataStore) apply(to dataVersion, base uint64, entries []dataEntry) (bool, error) {
	h := s.held[to.node]
	switch {
	case to.node == s.node || !to.newer(s.version(to.node)):
		return false, nil
	case base > 0 && (h == nil || h.epoch != to.epoch || h.seq < base):
		return false, errors.New("changes of a version that is not held")
	case !slices.IsSortedFunc(entries, func(a, b dataEntry) int { return cmp.Or(strings.Compare(a.key, b.key), -1) }):
		return false, errors.New("a key stands twice, or out of order")
	}
	for _, e := range entries {
		if len(e.key) > dataKeySize || e.value != nil && !json.Valid(e.value) {
			return false, fmt.Errorf("no data: %s", shortened(e.key))
		}
	}
	if base == 0 { // all there is: what else was held is gone
		h = newHeldData(to.epoch)
		h.floor = to.seq
	}
	if err := h.fits(entries); err != nil {
		return false, err
	}
	for _, e := range entries {
		h.put(e, to.seq)
	}
	h.seq = to.seq
	s.held[to.node] = h
	s.sum()
	return true, nil
}

// reply answers node_data: what is held of a node, beyond the version since;
// without an epoch, it is of the present one.
func (s *dataStore) reply(since dataVersion) (dataReply, error) {
	h := s.held[since.node]
	if h == nil && !s.isMember(since.node) {
		return dataReply{}, fmt.Errorf("%q is not in cluster.nodes (%s)", shortened(since.node), strings.Join(s.names, " "))
	}
	if h == nil {
		return dataReply{}, fmt.Errorf("nothing is known of %s", since.node)
	}
	if since.epoch != h.epoch && since.epoch != 0 {
		since.seq = 0
	}
	c, _ := h.since(since.seq, dataSize)
	r := dataReply{Node: since.node, Epoch: h.epoch, Seq: c.seq, Base: c.base, Entries: map[string]json.RawMessage{}}
	for _, e := range c.entries {
		r.Entries[e.key] = e.value
	}
	return r, nil
}

// ---- One node's data --------------------------------------------------------

// cost is what an entry counts, in bytes: many empty ones take room too.
func (e dataEntry) cost() int { return len(e.key) + len(e.value) + dataOverhead }

// fits refuses what would grow beyond the bound.
func (h *heldData) fits(entries []dataEntry) error {
	size := h.size
	for _, e := range entries {
		if size += e.cost(); h.items[e.key] != nil {
			size -= dataEntry{e.key, h.items[e.key].value}.cost()
		}
	}
	if size > dataSize && size > h.size {
		return fmt.Errorf("a node's data has more than %d bytes", dataSize)
	}
	return nil
}

// put notes that an entry became so at seq.
func (h *heldData) put(e dataEntry, seq uint64) {
	if was := h.items[e.key]; was != nil {
		h.size -= dataEntry{e.key, was.value}.cost()
		if was.value == nil {
			h.gone--
		}
	}
	if e.value == nil {
		h.gone++
	}
	h.size += e.cost()
	h.items[e.key] = newDataItem(e, seq)
	h.log = append(h.log, dataMark{seq, e.key})
	if len(h.log) > 2*len(h.items)+marksSpare || h.gone > tombstonesKept {
		h.compact()
	}
}

// compact drops the marks that are superseded, and the oldest tombstones where
// there are many: who missed those is given everything.
func (h *heldData) compact() {
	spare := 0
	if h.gone > tombstonesKept {
		spare = h.gone - tombstonesKept/2
	}
	h.log = slices.DeleteFunc(h.log, func(m dataMark) bool {
		item := h.items[m.key]
		if item == nil || item.seq != m.seq {
			return true
		}
		if item.value != nil || spare == 0 {
			return false
		}
		spare--
		h.gone--
		h.size -= dataEntry{key: m.key}.cost()
		h.floor = max(h.floor, m.seq)
		delete(h.items, m.key)
		return true
	})
}

// since are the changes after number base, or everything where they cannot be
// told. They are cut, and not small, beyond limit bytes.
func (h *heldData) since(base uint64, limit int) (c dataChanges, small bool) {
	if base < h.floor || base > h.seq {
		base = 0
	}
	c = dataChanges{base: base, seq: h.seq}
	size := 0
	for i := len(h.log) - 1; i >= 0 && h.log[i].seq > base; i-- {
		mark := h.log[i]
		item := h.items[mark.key]
		if item == nil || item.seq != mark.seq || base == 0 && item.value == nil {
			continue
		}
		e := dataEntry{mark.key, item.value}
		if size += len(e.key) + len(e.value); size > limit {
			return c, false
		}
		c.entries = append(c.entries, e)
	}
	slices.SortFunc(c.entries, func(a, b dataEntry) int { return strings.Compare(a.key, b.key) })
	return c, true
}
