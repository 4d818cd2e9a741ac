// publish.go: what the monitor thread says to the other nodes, and hears from
// them: it brings this node's data into the store (data.go) as it changes, tells
// the core of what changed elsewhere, and fetches what beats cannot carry.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"time"
)

// serviceMark is what of a service monitor can change without an event that
// names the service.
type serviceMark struct {
	state                       monitorState
	why, flag, local, global    string
	frozen, probed, wantsAction bool
}

func (m *monitored) mark() serviceMark {
	return serviceMark{m.state, m.why, m.Flag, m.LocalExpect, m.GlobalExpect, m.frozen, m.probed, m.Wanted != nil}
}

// touched notes which services an event and its effects are about. Where it is
// about all, those are found whose mark is another.
func (s *shell) touched(e event, effects []effect) {
	for _, f := range effects {
		switch f := f.(type) {
		case transitionEffect:
			s.changed[f.service] = true
		case saveEffect:
			s.changed[f.service] = true
		}
	}
	switch e := e.(type) {
	case serviceEvent:
		s.changed[e.name] = true
	case statusEvent:
		s.changed[e.service] = true
	case doneEvent:
		s.changed[e.service] = true
	case failedEvent:
		s.changed[e.service] = true
	case serviceOrder:
		s.changed[e.service] = true
	case flagEvent:
		s.changed[e.service] = true // the empty name is the node
	}
	switch e := e.(type) {
	case tickEvent, nodeOrder, endEvent:
	case flagEvent:
		if e.service != "" {
			return
		}
	default:
		return
	}
	s.changed[""] = true
	for name, m := range s.core.services {
		if s.marks[name] != m.mark() {
			s.changed[name] = true
		}
	}
}

// publish brings what is noted as changed into the store; should it be so
// indeed, the peers hear of it at once.
func (s *shell) publish() {
	news := false
	for name := range s.changed {
		changed, err := false, error(nil)
		if name == "" {
			changed, err = s.store.set(keyNode, s.nodeData(time.Now()))
		} else {
			changed, err = s.publishService(name)
		}
		if news = news || changed; err != nil && !s.unsaid {
			s.unsaid = true
			s.say(func() { s.d.log.Error("the other nodes do not hear of all services", "service", name, "err", err) })
		}
	}
	clear(s.changed)
	if news {
		s.announce()
	}
}

func (s *shell) publishService(name string) (bool, error) {
	file, m := s.files[name], s.core.services[name]
	if m != nil {
		s.marks[name] = m.mark()
	} else {
		delete(s.marks, name)
	}
	if file == nil {
		return s.store.remove(keyServices + name), nil
	}
	e := serviceEntry{Config: configData{Checksum: file.sum}}
	if file.fault != nil {
		e.Config.Error = file.fault.Error()
	}
	if file.spec != nil {
		e.Nodes, e.Config.Updated = file.spec.nodes, unixSeconds(file.updated)
	}
	if m != nil {
		e.Instance = mustJSON(m.instance())
	}
	return s.store.set(keyServices+name, e)
}

// instance is what this node says of its instance.
func (m *monitored) instance() instanceData {
	i := instanceData{Frozen: m.frozen, Monitor: m.data(), Resources: map[string]resourceData{}}
	i.Avail, i.Overall = m.status()
	for _, r := range m.spec.resources {
		seen := m.resources[r.rid]
		d := resourceData{Status: seen.status, Type: r.label(), Log: seen.note, Optional: r.optional, Disable: r.disable, Monitor: r.monitor}
		if r.disable {
			d.Status, d.Log = statusNA, "disabled"
		}
		if used := m.Restarts[r.rid]; used.Count > 0 {
			d.Restarts = fmt.Sprintf("%d of %d", used.Count, r.restart)
		}
		i.Rids = append(i.Rids, r.rid)
		i.Resources[r.rid] = d
	}
	return i
}

// nodeData is what this node says of itself. Its load, which always changes, is
// said only where it is noticeably another.
func (s *shell) nodeData(now time.Time) nodeData {
	if now.Sub(s.statsRead) >= statsPause {
		s.statsRead = now
		if stats := s.d.stats(); stats.differs(s.stats) {
			s.stats = stats
		}
	}
	c := s.d.config.Load()
	return nodeData{Agent: agentVersion, Env: c.text("node.env"), Frozen: s.core.frozen, Monitor: nodeMonitor{s.core.state}, Stats: s.stats}
}

// differs tells whether the change is worth a message: of the load, by a
// quarter and a tenth of it; of memory, by five percent.
func (n nodeStats) differs(from nodeStats) bool {
	load := math.Abs(n.Load15m - from.Load15m)
	memory := n.MemAvail - from.MemAvail
	return n.MemTotal != from.MemTotal || load > 0.25 && load > from.Load15m/10 || max(memory, -memory) > 5
}

// announce has the core send beats at once, but not more often than dataPause.
func (s *shell) announce() {
	if s.announcing {
		return
	}
	if wait := dataPause - time.Since(s.announced); wait > 0 {
		s.announcing = true
		s.due.Reset(wait)
		return
	}
	s.announced = time.Now()
	s.step(dataDue{})
}

// takeData takes the data of a beat that counts.
func (s *shell) takeData(e beatEvent) {
	from := e.from
	changed, fetches := s.store.take(time.Now(), from, e.beat.epoch, e.beat.data)
	for _, f := range fetches {
		s.fetch(f)
	}
	if changed {
		s.step(peerEvent{from, s.store.brief(from)})
	}
}

// fetch asks for what no beat will bring.
func (s *shell) fetch(f dataFetch) {
	s.jobs.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, fetchTimeout)
		defer cancel()
		var r dataReply
		err := s.d.askPeer(ctx, s.d.config.Load(), f.from, "node_data", map[string]json.RawMessage{
			"node": mustJSON(f.since.node), "epoch": mustJSON(f.since.epoch), "since": mustJSON(f.since.seq),
		}, dataOf(&r))
		select {
		case s.calls <- func() { s.fetched(f, r, err) }:
		case <-s.ctx.Done():
		}
	})
}

func (s *shell) fetched(f dataFetch, r dataReply, err error) {
	node := f.since.node
	changed, err := s.store.fetched(time.Now(), f, r, err)
	if err != nil && s.store.trouble[node].failures == 1 {
		s.say(func() {
			s.d.log.Warn("the data of a node cannot be fetched; it is tried again", "node", node, "from", f.from, "err", err)
		})
	}
	if changed {
		s.step(peerEvent{node, s.store.brief(node)})
	}
}

// handleNodeData tells a node's data as it is held here.
func handleNodeData(ctx context.Context, d *daemon, o options) (reply, error) {
	since := dataVersion{o.text("node"), uint64(o.number("epoch", 0)), uint64(max(0, o.number("since", 0)))}
	if since.node == "" {
		since.node = d.config.Load().node
	}
	var data dataReply
	var err error
	if failure := d.monitor.do(ctx, func(s *shell) { data, err = s.store.reply(since) }); failure != nil {
		return reply{}, failure
	}
	return replyOf(d, data, nil), err
}
