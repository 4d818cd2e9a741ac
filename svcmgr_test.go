package main

import (
	"context"
	"errors"
	"flag"
	"strings"
	"testing"
	"time"
)

// A --wait that can never see its log must say why, not wait for its whole time.
func TestWaitTellsAtOnce(t *testing.T) {
	p, port := newLab(t, settings{"cluster.nodes": "node1"})
	start := func() error {
		begun := time.Now()
		send := func(ctx context.Context) error {
			return ask(ctx, p, "", "set_service_monitor", map[string]any{"svcname": "svc1", "local_expect": "started"}, discard)
		}
		err := waiter{paths: p, name: "svc1"}.wait(context.Background(), 5*time.Second, "start", nil, send)
		if took := time.Since(begun); took > 2*time.Second {
			t.Errorf("took %s", took)
		}
		return err
	}
	if err := start(); !errors.Is(err, errNoDaemon) {
		t.Errorf("without a daemon: %v", err)
	}
	serveLive(t, p, port, nil)
	if err := start(); err == nil || !strings.Contains(err.Error(), "there is no service") {
		t.Errorf("without the service: %v", err)
	}
}

// What --wait takes for the end, by what the status says.
func TestWaitDone(t *testing.T) {
	for name, c := range map[string]struct {
		word   string
		state  instanceData
		done   bool
		failed bool
	}{
		"failed":                                 {"start", instanceData{Avail: statusDown, Monitor: monitorData{Status: stateStartFailed}}, true, true},
		"frozen though its start failed before":  {"freeze", instanceData{Avail: statusDown, Frozen: true, Monitor: monitorData{Status: stateStartFailed}}, true, false},
		"not frozen, and failed before":          {"freeze", instanceData{Avail: statusDown, Monitor: monitorData{Status: stateStartFailed}}, true, true},
		"failed before, and not begun":           {"stop", instanceData{Avail: statusWarn, Monitor: monitorData{Status: stateStartFailed, Wanted: "stop"}}, false, false},
		"nothing to be up for: all are optional": {"start", instanceData{Avail: statusNA, Monitor: monitorData{Status: stateIdle}}, true, false},
	} {
		done, err := orderDone("svc1", "node1", c.state, c.word, nil)
		if done != c.done || (err != nil) != c.failed {
			t.Errorf("%s: %v, %v", name, done, err)
		}
	}
}

// What runs is not deleted, also when its file has been broken since.
func TestDeleteOfWhatRuns(t *testing.T) {
	p, port := newLab(t, settings{"cluster.nodes": "node1"})
	killServices(t, p)
	writeService(t, p, "svc1", sleeper)
	serveLive(t, p, port, nil)
	up(t, p, "svc1")
	del := func() error {
		flags := flag.NewFlagSet("delete", flag.ContinueOnError)
		body := bindDelete(flags)
		must(t, flags.Parse([]string{"-s", "svc1"}))
		return body(context.Background(), p, nil)
	}
	for _, text := range []string{sleeper, "[app#1]\nexek = broken\n"} {
		writeService(t, p, "svc1", text)
		if err := del(); err == nil || !strings.Contains(err.Error(), "svcmgr -s svc1 stop") {
			t.Errorf("%q: %v", text, err)
		}
	}
	must(t, ask(context.Background(), p, "", "set_service_monitor", map[string]any{"svcname": "svc1", "local_expect": "stopped"}, discard))
	waitFor(t, patience, "svc1 is down", func() bool { return serviceOf(t, p, "svc1").Avail == statusDown })
	must(t, del())
}
