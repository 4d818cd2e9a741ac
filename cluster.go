// cluster.go: the members, where each is reached, and the cluster's data as
// daemon_status shows it.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// peerAddress tells where a member's listener is.
func peerAddress(c *config, peer string) (host string, port int) {
	return addressOf(c, "listener", peer)
}

// addressOf tells where a member's listener or heartbeat is: addr@peer, else its
// name, to be resolved; never this node's own addr.
func addressOf(c *config, section, peer string) (host string, port int) {
	host, port = peer, c.forNode(section, "port", peer).(int)
	if addr, ok := c.scoped(section, "addr", peer).(netip.Addr); ok && !addr.IsUnspecified() {
		host = addr.String()
	}
	return host, port
}

// threadData is a thread in daemon_status. Times there are Unix seconds, as
// OpenSVC's tools read them.
type threadData struct {
	State   string         `json:"state"` // running, stopped
	Created float64        `json:"created"`
	Config  map[string]any `json:"config"`
	Stats   map[string]any `json:"stats"`
	Error   string         `json:"error,omitempty"`    // of the last unclean exit
	Restart int            `json:"restarts,omitempty"` // unclean exits in a row
}

// daemonData is what daemon_status says of the daemon itself.
type daemonData struct {
	Nodename    string  `json:"nodename"`
	Agent       string  `json:"agent"`
	DaemonID    string  `json:"daemon_id"`
	PID         int     `json:"pid"`
	Created     float64 `json:"created"`
	Goroutines  int     `json:"goroutines"`
	ConfigError string  `json:"config_error,omitempty"` // of the node.conf on disk, which is not in force
}

// nodeData is what a node says of itself in monitor.nodes.
type nodeData struct {
	Agent   string      `json:"agent"`
	Env     string      `json:"env"`
	Frozen  bool        `json:"frozen"`
	Monitor nodeMonitor `json:"monitor"`
	Stats   nodeStats   `json:"stats"`
	State   linkState   `json:"state,omitempty"` // not said by itself
}

// linkState is how a node stands to the one that is asked.
type linkState string

const (
	linkLinked      linkState = "linked"
	linkUnreachable linkState = "unreachable" // a node that is linked hears it
	linkDead        linkState = "dead"        // none does: what is known of it is old
)

type nodeMonitor struct {
	Status monitorState `json:"status"`
}

// serviceData is a service in daemon_status, over its nodes.
type serviceData struct {
	Svcname   string                  `json:"svcname"`
	Avail     status                  `json:"avail"`
	Overall   status                  `json:"overall"`
	Frozen    string                  `json:"frozen"` // frozen, thawed, mixed
	Nodes     []string                `json:"nodes"`
	Config    configData              `json:"config"`
	Differ    []string                `json:"differ,omitempty"` // the nodes with another file
	Instances map[string]instanceData `json:"instances"`
}

// configData tells one version of a service's file from others.
type configData struct {
	Checksum string  `json:"csum,omitempty"`
	Updated  float64 `json:"updated,omitempty"`
	Error    string  `json:"error,omitempty"` // of the text on disk, which is not used
}

type instanceData struct {
	Avail     status                  `json:"avail"`
	Overall   status                  `json:"overall"`
	Frozen    bool                    `json:"frozen"`
	Stale     bool                    `json:"stale,omitempty"` // the last that is known; the node is dead
	Monitor   monitorData             `json:"monitor"`
	Rids      []string                `json:"rids"` // in the order of their start
	Resources map[string]resourceData `json:"resources"`
}

// monitorData are the attributes of a service monitor.
type monitorData struct {
	Status       monitorState   `json:"status"`
	Updated      float64        `json:"status_updated"`
	LocalExpect  nullable       `json:"local_expect"`
	GlobalExpect nullable       `json:"global_expect"`
	Wanted       nullable       `json:"wanted"` // ordered and not done yet
	Why          string         `json:"why,omitempty"`
	Restart      map[string]int `json:"restart"` // counts, by rid
}

type resourceData struct {
	Status   status `json:"status"`
	Type     string `json:"type"`          // what it is: heartbeat:IPaddr2, a program, a unit
	Log      string `json:"log,omitempty"` // why it is not up
	Optional bool   `json:"optional,omitempty"`
	Disable  bool   `json:"disable,omitempty"`
	Monitor  bool   `json:"monitor,omitempty"`
	Restarts string `json:"restarts,omitempty"` // used of those allowed
}

type nodeStats struct {
	Load15m  float64 `json:"load_15m"`
	MemTotal int     `json:"mem_total"` // MiB
	MemAvail int     `json:"mem_avail"` // percent
}

// clusterInfo is what daemon_status says of the cluster. Voters are all its
// nodes; those seen are linked with this one, or it.
type clusterInfo struct {
	Name   string   `json:"name"`
	Nodes  []string `json:"nodes"`
	Quorum bool     `json:"quorum"`
	Voters int      `json:"voters"`
	Seen   int      `json:"voters_seen"`
	Silent string   `json:"silent,omitempty"` // why this node sends no beats
}

// clusterData is the data of daemon_status: a key for each thread, the
// cluster, the daemon, and under monitor what nodes say of themselves.
func (d *daemon) clusterData(ctx context.Context, only string) (map[string]any, error) {
	c := d.config.Load()
	self := daemonData{
		Nodename: c.node, Agent: agentVersion, DaemonID: d.id, PID: os.Getpid(),
		Created: unixSeconds(d.started), Goroutines: runtime.NumGoroutine(),
	}
	view := clusterView{node: c.node, said: map[string]map[string]*dataItem{}, links: map[string]linkState{}}
	silent := ""
	var unknown error
	if only != "" {
		if err := d.monitor.find(ctx, only); err != nil {
			return nil, err
		}
	}
	err := d.monitor.do(ctx, func(s *shell) {
		if only != "" {
			_, unknown = s.known(only)
		}
		view.said, silent = s.store.said(only), s.core.silent
		for _, node := range c.members() {
			view.links[node] = s.core.linkState(node)
		}
	})
	if err != nil {
		view.links[c.node] = linkLinked
	}
	services := view.services()
	switch {
	case errors.Is(err, errStopping), err != nil && only != "":
		return nil, err
	case unknown != nil && len(services) == 0:
		return nil, unknown
	}
	nodes := view.nodes(c)
	info := clusterInfo{Name: c.text("cluster.name"), Nodes: c.members(), Quorum: c.cluster().quorum, Voters: len(c.members()), Silent: silent}
	for _, n := range nodes {
		if n.State == linkLinked {
			info.Seen++
		}
	}
	data := map[string]any{"cluster": info}
	running := d.do(func() {
		if d.configFault != nil {
			self.ConfigError = d.configFault.Error()
		}
		for _, t := range d.threads {
			if t.id == "monitor" {
				monitor := t.data()
				data[t.id] = struct {
					threadData
					Nodes    map[string]nodeData    `json:"nodes"`
					Services map[string]serviceView `json:"services"`
				}{monitor, nodes, services}
				continue
			}
			data[t.id] = t.data()
		}
	})
	data["daemon"] = self
	if !running {
		return nil, errStopping
	}
	return data, nil
}

// ---- What the nodes' data says -----------------------------------------------

// serviceEntry is what a node says of a service: what its file is, and its
// instance, if it has one.
type serviceEntry struct {
	Nodes    []string        `json:"nodes"`
	Config   configData      `json:"config"`
	Instance json.RawMessage `json:"instance,omitempty"` // instanceData

	brief   instanceBrief
	overall status
}

// newDataItem reads a value. One that cannot be read is of a later version.
func newDataItem(e dataEntry, seq uint64) *dataItem {
	item := &dataItem{seq: seq, value: e.value}
	service, found := strings.CutPrefix(e.key, keyServices)
	switch {
	case e.value == nil:
	case e.key == keyNode:
		var node nodeData
		if json.Unmarshal(e.value, &node) == nil {
			item.node = &node
		}
	case found && checkServiceName(service) == nil:
		var entry serviceEntry
		var i instanceData
		err := json.Unmarshal(e.value, &entry)
		if err == nil && entry.Instance != nil {
			err = json.Unmarshal(entry.Instance, &i)
			if len(entry.Instance) <= len("{}") || entry.Instance[0] != '{' {
				entry.Instance = nil // not what an instance looks like
			}
			entry.brief, entry.overall = instanceBrief{avail: i.Avail, state: i.Monitor.Status, frozen: i.Frozen}, i.Overall
		}
		if err == nil {
			item.service = &entry
		}
	}
	return item
}

// brief is what the core knows of a node's data.
func (s *dataStore) brief(node string) peerData {
	data := peerData{instances: map[string]instanceBrief{}}
	if h := s.held[node]; h != nil {
		for key, item := range h.items {
			switch {
			case item.node != nil:
				data.frozen = item.node.Frozen
			case item.service != nil && item.service.Instance != nil:
				data.instances[key[len(keyServices):]] = item.service.brief
			}
		}
	}
	return data
}

// said is what the members said, for another goroutine to read: all of it, or
// of one service alone.
func (s *dataStore) said(service string) map[string]map[string]*dataItem {
	all := map[string]map[string]*dataItem{}
	for node, h := range s.held {
		if service == "" {
			all[node] = maps.Clone(h.items)
			continue
		}
		all[node] = map[string]*dataItem{}
		for _, key := range []string{keyNode, keyServices + service} {
			if item := h.items[key]; item != nil {
				all[node][key] = item
			}
		}
	}
	return all
}

// clusterView puts together what the nodes said.
type clusterView struct {
	node  string                          // this one
	said  map[string]map[string]*dataItem // by node and key
	links map[string]linkState            // of all members
}

// nodes are all members, also those that were never heard.
func (v clusterView) nodes(c *config) map[string]nodeData {
	nodes := map[string]nodeData{}
	for node, state := range v.links {
		data := nodeData{}
		if item := v.said[node][keyNode]; item != nil && item.node != nil {
			data = *item.node
		}
		if node == v.node {
			data.Agent, data.Env, data.Stats = agentVersion, c.text("node.env"), readNodeStats()
		}
		data.State = state
		nodes[node] = data
	}
	return nodes
}

// serviceView is serviceData with its instances as their nodes wrote them.
type serviceView struct {
	serviceData
	Instances map[string]json.RawMessage `json:"instances"`

	avail, overall []status // of the instances that count
	frozen         []bool
}

// services adds up what the nodes say: this one first, then those that are
// linked, so that what is shown of a file is what is most surely in force.
func (v clusterView) services() map[string]serviceView {
	all := map[string]serviceView{}
	order := slices.SortedFunc(maps.Keys(v.said), func(a, b string) int {
		rank := func(node string) int {
			if node == v.node {
				return 0
			}
			return 1 + slices.Index([]linkState{linkLinked, linkUnreachable, linkDead}, v.links[node])
		}
		return cmp.Or(cmp.Compare(rank(a), rank(b)), strings.Compare(a, b))
	})
	for _, node := range order {
		for key, item := range v.said[node] {
			if item.service != nil {
				name := key[len(keyServices):]
				s := all[name]
				s.add(name, node, v.links[node], item.service)
				all[name] = s
			}
		}
	}
	for name, s := range all {
		s.Avail, s.Overall, s.Frozen = statusUndef, statusUndef, serviceFrozen(s.frozen)
		if len(s.avail) > 0 {
			s.Avail, s.Overall = serviceStatus(s.avail), serviceStatus(s.overall)
		}
		all[name] = s
	}
	return all
}

// add takes in what one node says. What a dead one said is shown, and does not
// count.
func (s *serviceView) add(name, node string, link linkState, e *serviceEntry) {
	if s.Instances == nil {
		s.Svcname, s.Nodes, s.Config, s.Instances = name, e.Nodes, e.Config, map[string]json.RawMessage{}
	}
	if link != linkDead && e.Config.Checksum != s.Config.Checksum {
		s.Differ = append(s.Differ, node)
	}
	switch {
	case e.Instance == nil:
	case link == linkDead:
		s.Instances[node] = append([]byte(`{"stale":true,`), e.Instance[1:]...)
	default:
		s.Instances[node] = e.Instance
		s.avail, s.overall, s.frozen = append(s.avail, e.brief.avail), append(s.overall, e.overall), append(s.frozen, e.brief.frozen)
	}
}

// data are the attributes of the service monitor.
func (m *monitored) data() monitorData {
	data := monitorData{
		Status: m.state, Updated: unixSeconds(m.changed), LocalExpect: nullable(m.LocalExpect), GlobalExpect: nullable(m.GlobalExpect),
		Why: m.why, Restart: map[string]int{},
	}
	if !m.probed {
		data.Why = "not all resources were looked at yet"
	}
	if m.Wanted != nil {
		data.Wanted = nullable(m.Wanted.Verb)
	} else if m.Flag != "" {
		data.Wanted = nullable(m.Flag)
	}
	for rid, used := range m.Restarts {
		if used.Count > 0 {
			data.Restart[rid] = used.Count
		}
	}
	return data
}

// label says in a word or two what a resource is.
func (r *resource) label() string {
	switch {
	case r.kind == "ocf":
		return r.provider + ":" + r.agent
	case r.kind == "systemd":
		return r.unit
	case r.exec != nil:
		return filepath.Base(r.exec[0])
	case r.script != nil:
		return filepath.Base(r.script[0])
	}
	return filepath.Base(r.start[0])
}

// data is called on serve's goroutine.
func (t *thread) data() threadData {
	config, stats := t.report()
	data := threadData{State: "stopped", Created: unixSeconds(t.created), Config: config, Stats: stats, Restart: t.failures}
	if t.running {
		data.State = "running"
	}
	if t.err != nil {
		data.Error, _, _ = strings.Cut(t.err.Error(), "\n") // a panic's stack is in the log
	}
	return data
}

func unixSeconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

// readNodeStats reads the kernel's figures; what it does not say is zero.
func readNodeStats() nodeStats {
	var s nodeStats
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		if fields := strings.Fields(string(load)); len(fields) > 2 {
			s.Load15m, _ = strconv.ParseFloat(fields[2], 64)
		}
	}
	memory, _ := os.ReadFile("/proc/meminfo")
	kib := map[string]int{}
	for line := range strings.Lines(string(memory)) {
		if fields := strings.Fields(line); len(fields) >= 2 {
			kib[fields[0]], _ = strconv.Atoi(fields[1])
		}
	}
	if total := kib["MemTotal:"]; total > 0 {
		s.MemTotal, s.MemAvail = total>>10, 100*kib["MemAvailable:"]/total
	}
	return s
}
