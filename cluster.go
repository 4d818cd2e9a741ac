// cluster.go: the members, where each is reached, and the cluster's data as
// daemon_status shows it.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
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
}

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

// clusterData is the data of daemon_status: a key for each thread, the
// cluster, the daemon, and under monitor what nodes say of themselves.
func (d *daemon) clusterData(ctx context.Context, only string) (map[string]any, error) {
	c := d.config.Load()
	self := daemonData{
		Nodename: c.node, Agent: agentVersion, DaemonID: d.id, PID: os.Getpid(),
		Created: unixSeconds(d.started), Goroutines: runtime.NumGoroutine(),
	}
	node := nodeData{Agent: agentVersion, Env: c.text("node.env"), Stats: readNodeStats(), Monitor: nodeMonitor{stateIdle}}
	services := map[string]serviceData{}
	var unknown error
	err := d.monitor.do(ctx, func(s *shell) {
		node.Frozen, node.Monitor = s.core.frozen, nodeMonitor{s.core.state}
		if only != "" {
			_, unknown = s.known(only)
		}
		for name := range s.files {
			if only == "" || name == only {
				services[name] = s.data(name)
			}
		}
	})
	switch {
	case errors.Is(err, errStopping), err != nil && only != "":
		return nil, err
	case unknown != nil && len(services) == 0:
		return nil, unknown
	}
	data := map[string]any{
		"cluster": map[string]any{"name": c.text("cluster.name"), "nodes": c.members()},
	}
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
					Services map[string]serviceData `json:"services"`
				}{monitor, map[string]nodeData{c.node: node}, services}
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

// data is what this node knows of a service.
func (s *shell) data(name string) serviceData {
	file, m := s.files[name], s.core.services[name]
	data := serviceData{Svcname: name, Avail: statusUndef, Overall: statusUndef, Frozen: "n/a", Instances: map[string]instanceData{}}
	data.Config = configData{Checksum: file.sum}
	if file.fault != nil {
		data.Config.Error = file.fault.Error()
	}
	if file.spec != nil {
		data.Nodes, data.Config.Updated = file.spec.nodes, unixSeconds(file.updated)
	}
	if m == nil {
		return data
	}
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
	data.Instances[s.core.node] = i
	data.Avail, data.Overall = serviceStatus([]status{i.Avail}), serviceStatus([]status{i.Overall})
	data.Frozen = serviceFrozen([]bool{i.Frozen})
	return data
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
