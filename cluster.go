// cluster.go: the members, where each is reached, and the cluster's data as
// daemon_status shows it.

package main

import (
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// peerAddress tells where a member's listener is: listener.addr@peer, else its
// name, to be resolved; never this node's own listener.addr.
func peerAddress(c *config, peer string) (host string, port int) {
	host, port = peer, c.forNode("listener", "port", peer).(int)
	if addr, ok := c.scoped("listener", "addr", peer).(netip.Addr); ok && !addr.IsUnspecified() {
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
	Agent string    `json:"agent"`
	Env   string    `json:"env"`
	Stats nodeStats `json:"stats"`
}

type nodeStats struct {
	Load15m  float64 `json:"load_15m"`
	MemTotal int     `json:"mem_total"` // MiB
	MemAvail int     `json:"mem_avail"` // percent
}

// clusterData is the data of daemon_status: a key for each thread, the
// cluster, the daemon, and under monitor what nodes say of themselves.
func (d *daemon) clusterData() (map[string]any, error) {
	c := d.config.Load()
	self := daemonData{
		Nodename: c.node, Agent: agentVersion, DaemonID: d.id, PID: os.Getpid(),
		Created: unixSeconds(d.started), Goroutines: runtime.NumGoroutine(),
	}
	data := map[string]any{
		"cluster": map[string]any{"name": c.text("cluster.name"), "nodes": c.members()},
		"monitor": map[string]any{
			"nodes":    map[string]nodeData{c.node: {agentVersion, c.text("node.env"), readNodeStats()}},
			"services": map[string]any{},
		},
	}
	running := d.do(func() {
		if d.configFault != nil {
			self.ConfigError = d.configFault.Error()
		}
		for _, t := range d.threads {
			data[t.id] = t.data()
		}
	})
	data["daemon"] = self
	if !running {
		return nil, errStopping
	}
	return data, nil
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
