package main

import (
	"context"
	"errors"
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
