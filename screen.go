// screen.go: the screen of `nodemgr daemon status`: threads, nodes, services,
// what needs attention, and what to do about it.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

func bindDaemonStatus(flags *flag.FlagSet) body {
	format := formatFlag(flags, "human", "json")
	return func(ctx context.Context, p paths, _ []string) error {
		f, err := format()
		if err != nil {
			return err
		}
		var data json.RawMessage
		if err := askLocal(ctx, p, "daemon_status", nil, nil, dataOf(&data)); err != nil {
			return err
		}
		if f == "json" {
			return printJSON(data)
		}
		return showDaemon(os.Stdout, data, time.Now())
	}
}

// statusData is daemon_status as the screen reads it.
type statusData struct {
	Daemon  daemonData
	Cluster clusterInfo
	Monitor struct {
		Nodes    map[string]nodeData
		Services map[string]serviceData
	}
	threads map[string]threadData
}

func readStatus(data json.RawMessage) (s statusData, err error) {
	var keys map[string]json.RawMessage
	if err := errors.Join(json.Unmarshal(data, &keys), json.Unmarshal(data, &s)); err != nil {
		return s, fmt.Errorf("cannot read the status: %w", err)
	}
	s.threads = map[string]threadData{}
	for id, raw := range keys {
		var t threadData
		if id != "daemon" && id != "cluster" && json.Unmarshal(raw, &t) == nil {
			s.threads[id] = t
		}
	}
	return s, nil
}

// showDaemon draws the screen.
func showDaemon(out io.Writer, data json.RawMessage, now time.Time) error {
	s, err := readStatus(data)
	if err != nil {
		return err
	}
	d, c := s.Daemon, s.Cluster
	fmt.Fprintf(out, "%s  agentd %s, pid %d, up %s\n", d.Nodename, d.Agent, d.PID, since(d.Created, now))
	fmt.Fprintf(out, "cluster %s: %s\n", c.Name, strings.Join(c.Nodes, " "))
	if quorum := map[bool]string{true: "on", false: "off"}[c.Quorum]; len(c.Nodes) > 1 {
		fmt.Fprintf(out, "quorum %s, %d of %d voters seen\n", quorum, c.Seen, c.Voters)
	}
	attention := s.clusterAttention()

	fmt.Fprint(out, "\nThreads\n")
	rows := [][]string{}
	for _, id := range slices.Sorted(maps.Keys(s.threads)) {
		row, advice := showThread(id, s.threads[id], now)
		rows, attention = append(rows, row), append(attention, advice...)
	}
	table(out, rows)
	attention = append(attention, s.silentPaths()...)

	fmt.Fprint(out, "\nNodes\n")
	rows = nil
	for _, node := range c.Nodes {
		row, advice := s.showNodeRow(node)
		rows, attention = append(rows, row), append(attention, advice...)
	}
	table(out, rows)
	if len(s.Monitor.Services) > 0 {
		fmt.Fprintln(out)
		rows = [][]string{append([]string{"Services", "", ""}, c.Nodes...)}
		for _, name := range slices.Sorted(maps.Keys(s.Monitor.Services)) {
			row, advice := showServiceRow(s.Monitor.Services[name], c.Nodes)
			rows, attention = append(rows, row), append(attention, advice...)
		}
		table(out, rows)
	}

	if d.ConfigError != "" {
		attention = append(attention, "The node.conf on disk is not used; the last good one is in force:\n"+d.ConfigError+"\nMend it: nodemgr edit config")
	}
	fmt.Fprintln(out)
	showAttention(out, attention)
	if attention == nil {
		fmt.Fprintln(out, "Nothing needs attention.")
	}
	return nil
}

// showAttention marks what needs attention; a message may have several lines.
func showAttention(out io.Writer, messages []string) {
	for _, message := range messages {
		fmt.Fprintln(out, "! "+strings.ReplaceAll(message, "\n", "\n  "))
	}
}

// beating tells whether there is a heartbeat.
func (s statusData) beating() bool {
	for id := range s.threads {
		if strings.HasPrefix(id, "hb#") {
			return true
		}
	}
	return false
}

// clusterAttention is what is wrong with the cluster as a whole.
func (s statusData) clusterAttention() (attention []string) {
	c := s.Cluster
	if len(c.Nodes) < 2 {
		return nil
	}
	if c.Silent != "" {
		attention = append(attention, "This node does not take part in the cluster: "+c.Silent)
	}
	switch {
	case !s.beating():
		return append(attention, fmt.Sprintf("%d nodes and no heartbeat: they do not hear of each other, and start no\nservice of several nodes. On all of them:\nnodemgr set --param hb#1.type --value unicast", len(c.Nodes)))
	case !c.Quorum:
		attention = append(attention, "Quorum is off: where two halves of the cluster do not see each other, both may\nrun a service. Three voters have quorum by themselves; one may be a witness,\nwhich runs no services (cluster.witnesses)")
	case c.Seen <= c.Voters/2:
		attention = append(attention, fmt.Sprintf("No quorum: %d of %d voters seen; services of several nodes do not run here", c.Seen, c.Voters))
	}
	return attention
}

// showNodeRow makes the row of a node, and what to do about it.
func (s statusData) showNodeRow(node string) (row, attention []string) {
	n, mark, state := s.Monitor.Nodes[node], "  ", string(s.Monitor.Nodes[node].State)
	switch {
	case node == s.Daemon.Nodename:
		state = "this node"
	case !s.beating(), n.State == linkLinked:
	case n.State == linkUnreachable:
		attention = append(attention, node+" is not linked with this node, but with others: see what is between the two")
	case n.Agent == "":
		attention = append(attention, node+" was not heard since this daemon started. On it: nodemgr daemon start")
	default:
		attention = append(attention, node+" is not heard by any node that this one is linked with. If it is up, on it:\nnodemgr daemon start")
	}
	if n.Frozen {
		state += ", frozen"
		attention = append(attention, node+" is frozen: it starts and restarts nothing by itself. To end that, on it: nodemgr thaw --local")
	}
	if attention != nil {
		mark = "! "
	}
	if n.Agent == "" {
		return []string{mark + node, state}, attention
	}
	return []string{
		mark + node, state, n.Env, fmt.Sprintf("load %.2f", n.Stats.Load15m),
		fmt.Sprintf("memory %d%% of %d MiB free", n.Stats.MemAvail, n.Stats.MemTotal), "agentd " + n.Agent,
	}, append(attention, s.otherAgents(node)...)
}

// otherAgents says that a node runs another version than this one.
func (s statusData) otherAgents(node string) []string {
	n := s.Monitor.Nodes[node]
	if n.State != linkLinked || n.Agent == s.Daemon.Agent {
		return nil
	}
	return []string{fmt.Sprintf("%s runs agentd %s, and this node %s", node, n.Agent, s.Daemon.Agent)}
}

// showServiceRow makes the row of a service, with a cell for each node, and
// what to do about it.
func showServiceRow(s serviceData, nodes []string) (row, attention []string) {
	mark, frozen := "  ", ""
	if s.Config.Error != "" {
		attention = append(attention, s.Svcname+": its file is not used; see svcmgr -s "+s.Svcname+" print status")
	}
	if s.Differ != nil {
		attention = append(attention, s.Svcname+": another file on "+strings.Join(s.Differ, ", ")+"; copy the right one to all of its nodes")
	}
	if up := s.running(); len(up) > 1 {
		attention = append(attention, s.Svcname+" runs on "+strings.Join(up, " and ")+". Keep one; on the others: svcmgr -s "+s.Svcname+" stop --local")
	}
	var cells []string
	for _, node := range nodes {
		i, known := s.Instances[node]
		if !known {
			cells = append(cells, "-")
			continue
		}
		cells = append(cells, i.cell())
		switch why := s.Svcname + " on " + node + ": " + i.Monitor.Why; {
		case i.Stale:
		case i.Monitor.Status.failed():
			attention = append(attention, why+"\nWhen that is mended: svcmgr -s "+s.Svcname+" clear")
		case i.Monitor.Why != "" && i.Avail != statusUp && i.Avail != statusNA && s.Avail != statusUp:
			attention = append(attention, why)
		}
	}
	if s.Frozen != "thawed" && s.Frozen != "n/a" {
		frozen = s.Frozen
	}
	if attention != nil || s.Overall == statusWarn {
		mark = "! "
	}
	return append([]string{mark + s.Svcname, string(s.Avail), frozen}, cells...), attention
}

// running are the nodes on which the service is up.
func (s serviceData) running() (nodes []string) {
	for _, node := range slices.Sorted(maps.Keys(s.Instances)) {
		if i := s.Instances[node]; i.Avail == statusUp && !i.Stale {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

// cell is an instance in a word or three.
func (i instanceData) cell() string {
	cell := string(i.Avail)
	if i.Monitor.Status != stateIdle {
		cell += ", " + string(i.Monitor.Status)
	}
	if i.Frozen {
		cell += ", frozen"
	}
	if i.Stale {
		cell = "(was " + cell + ")"
	}
	return cell
}

// showThread makes the row of a thread, and what to do about it.
func showThread(id string, t threadData, now time.Time) (row, attention []string) {
	mark := "  "
	switch {
	case t.State == "running":
	case t.Error != "":
		attention = append(attention, fmt.Sprintf("%s ended uncleanly and is started again by itself: %s", id, t.Error))
	default:
		attention = append(attention, fmt.Sprintf("%s is stopped. Start it: nodemgr daemon start --thread-id %s", id, id))
	}
	if fault, _ := t.Config["error"].(string); fault != "" && t.State == "running" {
		attention = append(attention, fmt.Sprintf("%s stays where it is: %s", id, fault))
	}
	peers, faults := showPeers(id, t)
	if attention = append(attention, faults...); attention != nil {
		mark = "! "
	}
	where, _ := t.Config["bound"].(string)
	count := func(name string) int { n, _ := t.Stats[name].(float64); return int(n) }
	row = []string{mark + id, t.State, since(t.Created, now)}
	switch {
	case peers != "":
		row = append(row, where, peers)
	case t.Stats["requests"] != nil:
		row = append(row, where, fmt.Sprintf("%d requests, %d errors, %d invalid", count("requests"), count("errors"), count("invalid")+count("dropped")))
	}
	return row, attention
}

// showPeers says how a heartbeat's thread is with each peer, if it is one, and
// what is wrong; of a peer that is not heard at all, its node's row does.
func showPeers(id string, t threadData) (cell string, attention []string) {
	peers, _ := t.Stats["peers"].(map[string]any)
	for _, peer := range slices.Sorted(maps.Keys(peers)) {
		path, _ := peers[peer].(map[string]any)
		cell += peer + fmt.Sprintf(" %v, ", path["state"])
		switch fault, _ := path["error"].(string); {
		case t.State != "running":
		case fault != "":
			attention = append(attention, fmt.Sprintf("%s: to %s: %s", id, peer, fault))
		case path["state"] == "stale" && path["closed"] == true:
			attention = append(attention, fmt.Sprintf("%s: %s is not heard: what comes under its name does not open;\nis the secret the same there?", id, peer))
		}
	}
	return strings.TrimSuffix(cell, ", "), attention
}

// silentPaths names heartbeats by which a linked peer is not heard: the next
// failure would cut the link.
func (s statusData) silentPaths() (attention []string) {
	for _, id := range slices.Sorted(maps.Keys(s.threads)) {
		peers, _ := s.threads[id].Stats["peers"].(map[string]any)
		for _, peer := range slices.Sorted(maps.Keys(peers)) {
			path, _ := peers[peer].(map[string]any)
			if path["state"] == "stale" && path["closed"] != true && s.threads[id].State == "running" && s.Monitor.Nodes[peer].State == linkLinked && strings.HasSuffix(id, ".rx") {
				attention = append(attention, fmt.Sprintf("%s: %s is not heard; it is linked by another heartbeat only", id, peer))
			}
		}
	}
	return attention
}

// since writes how long ago a time of daemon_status was.
func since(created float64, now time.Time) string {
	return now.Sub(time.UnixMilli(int64(created * 1000))).Round(time.Second).String()
}
