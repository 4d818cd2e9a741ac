package main

import (
	"os"
	"strings"
	"testing"
)

func createdService(tb testing.TB, d *liveDaemon, name, text string) {
	tb.Helper()
	must(tb, os.WriteFile(d.paths.servicePath(name), []byte(text), 0o600))
}

func TestSetNodeMonitorTwice(t *testing.T) {
	d := startLive(t, settings{"cluster.nodes": "node1"}, nil)
	if r := d.local("set_node_monitor", "local_expect=frozen", "global_expect=frozen"); r.Status == 0 {
		t.Error("two expects were taken")
	}
	if r := d.local("set_node_monitor", "local_expect=frozen"); r.Status != 0 {
		t.Error(r.Error)
	}
	waitFor(t, patience, "frozen", func() bool { return isFrozen(d.paths, "") })
}

func TestServiceRequestsRefused(t *testing.T) {
	d := startLive(t, settings{"cluster.nodes": "node1"}, nil)
	createdService(t, d, "svc1", "[app#1]\nexec = /bin/sleep 1000\n")
	for _, c := range []struct{ action, option, want string }{
		{"set_service_monitor", `local_expect=stopped rid=[]`, "rid"},
		{"service_action", `command=["-s=svc2","stop"]`, "svcname"},
		{"service_action", `command=["stop","--local","--s=svc2"]`, "svcname"},
		{"service_action", `command=["stop","--s","svc2"]`, "svcname"},
	} {
		r := d.local(c.action, append(strings.Fields(c.option), "svcname=svc1")...)
		if r.Status == 0 || !strings.Contains(r.Error, c.want) {
			t.Errorf("%s %s: %d %s", c.action, c.option, r.Status, r.Error)
		}
	}
}

// What a service's program prints must not move the cursor of who looks at the
// status, and messages of several lines keep the screen's form.
func TestStatusIsPlainText(t *testing.T) {
	if said := lastLine("one\n\x1b[2J\x1b[31mtwo\t\x07"); strings.ContainsAny(said, "\x1b\x07\t") {
		t.Errorf("%q", said)
	}
	var out strings.Builder
	showService(&out, serviceData{Svcname: "svc1", Nodes: []string{"node1"}, Instances: map[string]instanceData{"node1": {
		Rids: []string{"app#1"}, Resources: map[string]resourceData{"app#1": {Log: "one\ntwo"}},
		Monitor: monitorData{Status: stateStopFailed, Why: "app#1: no\napp#2: no"},
	}}})
	for line := range strings.Lines(out.String()) {
		if strings.HasPrefix(line, "two") || strings.HasPrefix(line, "app#2") {
			t.Errorf("not indented:\n%s", out.String())
		}
	}
}

func TestServiceRowAdvises(t *testing.T) {
	for name, c := range map[string]struct {
		state instanceData
		want  string
	}{
		"failed":    {instanceData{Avail: statusDown, Monitor: monitorData{Status: stateStartFailed, Why: "no"}}, "svcmgr -s svc1 clear"},
		"not known": {instanceData{Avail: statusUndef, Monitor: monitorData{Status: stateIdle, Why: "not looked at yet"}}, "not looked at yet"},
	} {
		row, attention := showServiceRow(serviceData{Svcname: "svc1", Instances: map[string]instanceData{"node1": c.state}}, []string{"node1"})
		if !strings.HasPrefix(row[0], "!") || !strings.Contains(strings.Join(attention, "\n"), c.want) {
			t.Errorf("%s: %q, %q", name, row, attention)
		}
	}
}
