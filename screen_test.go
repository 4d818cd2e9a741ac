package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"
)

// screenCase is a cluster of node1, which is asked, node2 and node3.
type screenCase struct {
	links   map[string]linkState
	threads []string
	opened  bool // what comes under node3's name, if anything does
	quorum  bool
	said    func(node string, s *dataStore)
}

// said gives a node's data to a view, as its store would.
func said(node string, say func(string, *dataStore)) map[string]*dataItem {
	s := newDataStore(node, 1)
	s.set(keyNode, nodeData{Agent: agentVersion, Env: "TST", Stats: nodeStats{MemTotal: 100}})
	if say != nil {
		say(node, s)
	}
	return s.own().items
}

// instanceOn adds an instance of a service.
func instanceOn(s *dataStore, name string, i instanceData, csum string) {
	if i.Monitor.Status == "" {
		i.Monitor.Status = stateIdle
	}
	s.set(keyServices+name, serviceEntry{Nodes: []string{"node1", "node2", "node3"}, Config: configData{Checksum: csum}, Instance: mustJSON(i)})
}

func (c screenCase) view() clusterView {
	v := clusterView{node: "node1", said: map[string]map[string]*dataItem{}, links: map[string]linkState{
		"node1": linkLinked, "node2": linkLinked, "node3": linkLinked,
	}}
	maps.Copy(v.links, c.links)
	for node := range v.links {
		v.said[node] = said(node, c.said)
	}
	return v
}

// screen draws it, and returns the status too.
func (c screenCase) screen(t *testing.T) (string, statusData) {
	t.Helper()
	v := c.view()
	info := clusterInfo{Name: "test", Nodes: []string{"node1", "node2", "node3"}, Quorum: c.quorum, Voters: 3}
	for _, state := range v.links {
		if state == linkLinked {
			info.Seen++
		}
	}
	nodes := map[string]nodeData{}
	for node := range v.links {
		nodes[node] = nodeData{State: v.links[node]}
		if item := v.said[node][keyNode]; item != nil {
			n := *item.node
			n.State = v.links[node]
			nodes[node] = n
		}
	}
	data := map[string]any{
		"daemon": daemonData{Nodename: "node1", Agent: agentVersion, Created: 1000}, "cluster": info,
		"monitor": map[string]any{"state": "running", "nodes": nodes, "services": v.services()},
	}
	for _, id := range c.threads {
		silent := pathData{State: "stale"}
		if strings.HasSuffix(id, ".rx") {
			silent.Bad, silent.Closed = 3, !c.opened
		}
		data[id] = threadData{State: "running", Created: 1000, Stats: map[string]any{"peers": map[string]pathData{
			"node2": {State: "beating"}, "node3": silent,
		}}}
	}
	raw := mustJSON(data)
	var out strings.Builder
	must(t, showDaemon(&out, raw, time.Unix(1060, 0)))
	s, err := readStatus(raw)
	must(t, err)
	return out.String(), s
}

var upOnNode2 = func(node string, s *dataStore) {
	i := instanceData{Avail: statusDown, Overall: statusDown}
	if node == "node2" {
		i = instanceData{Avail: statusUp, Overall: statusUp}
	}
	instanceOn(s, "web", i, "1")
}

func TestScreen(t *testing.T) {
	heartbeat := []string{"hb#1.rx", "hb#1.tx"}
	for name, c := range map[string]struct {
		screenCase
		want   []string
		avoid  string
		avail  status
		frozen string
	}{
		"all is well": {
			screenCase{threads: []string{"hb#1.tx"}, quorum: true, said: upOnNode2},
			[]string{"quorum on, 3 of 3 voters seen", "node2 beating, node3 stale", "node2  linked", "  web     up    down   up     down\n", "Nothing needs attention"}, "! ", statusUp, "thawed",
		},
		"no heartbeat": {
			screenCase{said: upOnNode2, quorum: true},
			[]string{"! 3 nodes and no heartbeat", "nodemgr set --param hb#1.type --value unicast"}, "is not heard", statusUp, "thawed",
		},
		"quorum off": {
			screenCase{threads: heartbeat, said: upOnNode2},
			[]string{"quorum off", "both may", "cluster.witnesses"}, "No quorum", statusUp, "thawed",
		},
		"another secret": {
			screenCase{threads: heartbeat, quorum: true, said: upOnNode2},
			[]string{"hb#1.rx: node3 is not heard: what comes under its name does not open"}, "No quorum", statusUp, "thawed",
		},
		"what came once did not open": {
			screenCase{threads: heartbeat, quorum: true, said: upOnNode2, opened: true},
			[]string{"hb#1.rx: node3 is not heard; it is linked by another heartbeat only"}, "is the secret", statusUp, "thawed",
		},
		"the node that runs it is dead": {
			screenCase{threads: heartbeat, quorum: true, said: upOnNode2, links: map[string]linkState{"node2": linkDead}},
			[]string{"! node2  dead", "2 of 3 voters seen", "node2 is not heard by any node", "(was up)"}, "No quorum", statusDown, "thawed",
		},
		"it is unreachable": {
			screenCase{threads: heartbeat, quorum: true, said: upOnNode2, links: map[string]linkState{"node2": linkUnreachable}},
			[]string{"! node2  unreachable", "node2 is not linked with this node, but with others"}, "was up", statusUp, "thawed",
		},
		"alone": {
			screenCase{threads: heartbeat, quorum: true, said: upOnNode2, links: map[string]linkState{"node2": linkDead, "node3": linkDead}},
			[]string{"1 of 3 voters seen", "No quorum: 1 of 3"}, "Nothing needs", statusDown, "thawed",
		},
		"up twice": {
			screenCase{threads: heartbeat, quorum: true, said: func(node string, s *dataStore) {
				instanceOn(s, "web", instanceData{Avail: statusUp, Overall: statusUp, Frozen: node == "node2"}, "1")
			}},
			[]string{"! web", "web runs on node1 and node2 and node3", "up, frozen"}, "", statusWarn, "mixed",
		},
		"files differ": {
			screenCase{threads: heartbeat, quorum: true, said: func(node string, s *dataStore) {
				instanceOn(s, "web", instanceData{Avail: statusDown, Overall: statusDown}, map[bool]string{true: "1", false: "2"}[node == "node1"])
			}},
			[]string{"web: another file on node2, node3"}, "", statusDown, "thawed",
		},
		"failed elsewhere": {
			screenCase{threads: heartbeat, quorum: true, said: func(node string, s *dataStore) {
				i := instanceData{Avail: statusDown, Overall: statusDown}
				if node == "node3" {
					i.Monitor = monitorData{Status: stateStartFailed, Why: "no disk"}
				}
				instanceOn(s, "web", i, "1")
			}},
			[]string{"down, start failed", "web on node3: no disk", "svcmgr -s web clear"}, "", statusDown, "thawed",
		},
		"only others run it": {
			screenCase{threads: heartbeat, quorum: true, said: func(node string, s *dataStore) {
				if node == "node3" {
					instanceOn(s, "web", instanceData{Avail: statusUp, Overall: statusUp}, "1")
				}
			}},
			[]string{"web     up    -      -      up"}, "another file", statusUp, "thawed",
		},
	} {
		t.Run(name, func(t *testing.T) {
			screen, s := c.screen(t)
			for _, want := range c.want {
				if !strings.Contains(screen, want) {
					t.Errorf("no %q in\n%s", want, screen)
				}
			}
			if c.avoid != "" && strings.Contains(screen, c.avoid) {
				t.Errorf("%q in\n%s", c.avoid, screen)
			}
			for line := range strings.Lines(screen) {
				if len(line) > 101 {
					t.Errorf("a line of %d: %s", len(line), line)
				}
			}
			if got := s.Monitor.Services["web"]; got.Avail != c.avail || got.Frozen != c.frozen {
				t.Errorf("web is %s, %s", got.Avail, got.Frozen)
			}
		})
	}
}

// A node that was never heard is there, and what a dead one said last too, but
// it does not count.
func TestStatusOfTheDead(t *testing.T) {
	c := screenCase{said: upOnNode2, links: map[string]linkState{"node2": linkDead}}
	v := c.view()
	delete(v.said, "node3")
	v.links["node3"] = linkDead
	web := v.services()["web"]
	if len(web.Instances) != 2 || web.Avail != statusDown {
		t.Errorf("%d instances, %s", len(web.Instances), web.Avail)
	}
	var i instanceData
	must(t, json.Unmarshal(web.Instances["node2"], &i))
	if !i.Stale || i.Avail != statusUp {
		t.Errorf("%s", web.Instances["node2"])
	}
	v.said["node1"] = nil
	if web := v.services()["web"]; web.Avail != statusUndef || len(web.Instances) != 1 || web.Frozen != "n/a" {
		t.Errorf("what only a dead node knows: %s, %v", web.Avail, web.Frozen)
	}
	var out strings.Builder
	var data serviceData
	must(t, json.Unmarshal(mustJSON(web), &data))
	if showService(&out, data); !strings.Contains(out.String(), "node2  dead; it was up") {
		t.Errorf("%s", out.String())
	}
}

// What is said of a service costs the same whatever else there is.
func BenchmarkPublishOfOne(b *testing.B) {
	for _, services := range []int{1, 1000} {
		b.Run(fmt.Sprint(services), func(b *testing.B) {
			s := newDataStore("node1", 1)
			for i := range services {
				instanceOn(s, fmt.Sprint("svc", i), instanceData{Avail: statusUp}, "1")
			}
			peer := newDataStore("node2", 2)
			for _, side := range []*dataStore{s, peer} {
				side.members([]string{"node1", "node2"})
			}
			w := dataWorld{tb: b, nodes: []string{"node1", "node2"}, stores: map[string]*dataStore{"node1": s, "node2": peer}}
			w.rounds(4)
			for n := 0; b.Loop(); n++ {
				instanceOn(s, "svc0", instanceData{Avail: statusUp, Monitor: monitorData{Updated: float64(n)}}, "1")
				w.beat("node1", "node2")
				w.beat("node2", "node1")
			}
		})
	}
}
