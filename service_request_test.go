package main

import "testing"

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
