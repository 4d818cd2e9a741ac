package main

import "testing"

// A daemon that was started from a service's command, or from a shell below a
// service's program, is no part of that service, to be killed with it.
func TestDaemonBearsNoMark(t *testing.T) {
	d := startReal(t, nil, marker+"OFANOTHER")
	killMarked("OFANOTHER")
	select {
	case <-d.exited:
		t.Error("it was killed as a part of a service")
	default:
	}
	if pids := processesWith(marker + "OFANOTHER"); len(pids) > 0 {
		t.Errorf("marked: %v", pids)
	}
	if !d.client(t, "node3", "127.0.0.9").answers() {
		t.Error("it does not answer")
	}
}
