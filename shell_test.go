package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// serviceOf asks the daemon for one service.
func serviceOf(tb testing.TB, p paths, name string) serviceData {
	tb.Helper()
	s, _, err := askStatus(context.Background(), p, "", name)
	must(tb, err)
	return s
}

// killServices ends what a test's services left.
func killServices(tb testing.TB, p paths) {
	tb.Cleanup(func() {
		for _, pid := range processesWith("OSVCRUN=" + p.run) {
			unix.Kill(pid, unix.SIGKILL)
		}
	})
}

func writeService(tb testing.TB, p paths, name, text string) {
	tb.Helper()
	must(tb, writeFile(p.servicePath(name), []byte(text), 0o600))
}

const sleeper = "[DEFAULT]\norchestrate = ha\n[app#1]\nexec = /bin/sleep 1000\n"

func up(tb testing.TB, p paths, name string) {
	tb.Helper()
	waitFor(tb, patience, name+" is up", func() bool { return serviceOf(tb, p, name).Avail == statusUp })
}

// A file that changes while the daemon settles what a crash left must not keep
// the instance from being looked at.
func TestFileChangesWhileSettling(t *testing.T) {
	p, port := newLab(t, settings{"cluster.nodes": "node1"})
	killServices(t, p)
	writeService(t, p, "svc1", sleeper)
	held, err := lock(filepath.Join(p.instanceRun("svc1"), "lock"))
	must(t, err)
	must(t, replaceFile(filepath.Join(p.instanceRun("svc1"), "action"), fmt.Appendf(nil, `{"boot":%q,"verb":"start","rids":["app#1"]}`, bootID())))
	d := serveLive(t, p, port, nil)
	waitFor(t, patience, "it settles", func() bool {
		log, _ := os.ReadFile(p.serviceLog("svc1"))
		return strings.Contains(string(log), "was cut off")
	})
	writeService(t, p, "svc1", sleeper+"# changed\n")
	sum := checksum([]byte(sleeper + "# changed\n"))
	waitFor(t, patience, "the new text", func() bool { return serviceOf(t, d.paths, "svc1").Config.Checksum == sum })
	held.unlock()
	up(t, p, "svc1")
}

// A change of node.conf takes up the service files anew, and forgets nothing.
func TestNodeConfChangesServicesStay(t *testing.T) {
	p, port := newLab(t, settings{"cluster.nodes": "node1"})
	killServices(t, p)
	writeService(t, p, "svc1", sleeper)
	writeService(t, p, "svc2", sleeper)
	d := serveLive(t, p, port, nil)
	up(t, p, "svc1")
	up(t, p, "svc2")
	writeService(t, p, "svc1", "[app#1]\nexek = /bin/sleep 1000\n")
	waitFor(t, patience, "the fault", func() bool { return serviceOf(t, p, "svc1").Config.Error != "" })
	configure(t, p, settings{"node.env": "PRD"})
	waitFor(t, patience, "the new node.conf", func() bool { return d.logged.count("configuration applied") > 0 })
	serviceOf(t, p, "svc2") // after the shell has heard of it
	if s := serviceOf(t, p, "svc1"); s.Avail != statusUp || len(s.Nodes) == 0 || s.Config.Checksum == "" {
		t.Errorf("svc1, whose file has a fault: %+v", s)
	}

	must(t, d.monitor.do(context.Background(), func(s *shell) { // both at once
		must(t, os.Remove(p.servicePath("svc2")))
		select {
		case s.folder.anew <- struct{}{}:
		default:
		}
	}))
	waitFor(t, patience, "that all are read again", func() bool { return len(d.monitor.current.Load().folder.anew) == 0 })
	must(t, d.monitor.scan(context.Background()))
	must(t, d.monitor.do(context.Background(), func(s *shell) {
		if s.core.services["svc2"] != nil || s.instances["svc2"] != nil {
			t.Error("svc2 is gone, and still looked after")
		}
	}))
}

// What was begun for a service that is gone must not end what is done for one
// that has its name since.
func TestServiceComesBack(t *testing.T) {
	p, port := newLab(t, settings{"cluster.nodes": "node1"})
	killServices(t, p)
	text := strings.Replace(sleeper, "ha", "no", 1)
	writeService(t, p, "svc1", text)
	d := serveLive(t, p, port, nil)
	waitFor(t, patience, "svc1 is looked at", func() bool { return serviceOf(t, p, "svc1").Avail == statusDown })
	held, err := lock(filepath.Join(p.instanceRun("svc1"), "lock"))
	must(t, err)
	defer held.unlock()
	do := func(f func(s *shell)) { t.Helper(); must(t, d.monitor.do(context.Background(), f)) }
	do(func(s *shell) { must(t, s.order(serviceOrder{service: "svc1", localExpect: expectStarted})) }) // waits for the lock
	do(func(s *shell) {
		again := foundFile{name: "svc1", spec: s.files["svc1"].spec}
		s.gone("svc1")
		s.takeUp(again)
		s.core.services["svc1"].acting = &order{Verb: verbStart}
	})
	for range 20 {
		time.Sleep(10 * time.Millisecond)
		acts := false
		do(func(s *shell) { acts = s.core.services["svc1"].acting != nil })
		if !acts {
			t.Fatal("the old start ended the new one")
		}
	}
	do(func(s *shell) { s.core.services["svc1"].acting = nil })
}

// A disk that hangs keeps what is to be written or read there, and neither the
// core nor what it knows of other services.
func TestDiskHangs(t *testing.T) {
	p, port := newLab(t, settings{"cluster.nodes": "node1"})
	killServices(t, p)
	writeService(t, p, "svc1", strings.Replace(sleeper, "ha", "no", 1))
	writeService(t, p, "svc2", sleeper+"restart = 1\nrestart_delay = 0\n")
	d := serveLive(t, p, port, nil)
	up(t, p, "svc2")
	waitFor(t, patience, "svc1 is looked at", func() bool { return serviceOf(t, p, "svc1").Avail == statusDown })
	hang := p.intent("svc1") + ".new"
	must(t, os.MkdirAll(filepath.Dir(hang), 0o700))
	must(t, unix.Mkfifo(hang, 0o600)) // who writes to it waits for a reader
	if r := d.local("set_service_monitor", "svcname=svc1", "local_expect=started"); r.Status != 0 {
		t.Fatal(r.Error)
	}
	must(t, os.WriteFile(p.servicePath("svc1"), []byte(sleeper), 0o600)) // who reads it waits for the write
	for _, pid := range processesWith("OSVCRUN=" + p.run) {
		unix.Kill(pid, unix.SIGKILL)
	}
	waitFor(t, patience, "what is said of svc2", func() bool { return serviceOf(t, p, "svc2").Avail != statusUp })
	if s := serviceOf(t, p, "svc1"); s.Instances["node1"].Monitor.Status != stateStarting || len(processesWith("OSVCRUN="+p.run)) > 0 {
		t.Errorf("it began before what is wanted was on the disk: %+v", s)
	}
	reader, err := os.OpenFile(hang, os.O_RDONLY|unix.O_NONBLOCK, 0)
	must(t, err)
	defer reader.Close()
	up(t, p, "svc1")
	up(t, p, "svc2")
}

// What inotify does not tell, as of the target of a link, or of a folder that
// was put in the place of another, is seen a little later.
func TestServiceFilesBehindLinks(t *testing.T) {
	t.Parallel()
	p, port := newLab(t, settings{"cluster.nodes": "node1"})
	killServices(t, p)
	target := filepath.Join(p.lib, "svc1.text")
	must(t, os.WriteFile(target, []byte(sleeper), 0o600))
	must(t, os.Symlink(target, p.servicePath("svc1")))
	serveLive(t, p, port, nil)
	up(t, p, "svc1")
	must(t, os.WriteFile(target, []byte(sleeper+"# changed\n"), 0o600))
	sum := checksum([]byte(sleeper + "# changed\n"))
	waitFor(t, patience, "the new text", func() bool { return serviceOf(t, p, "svc1").Config.Checksum == sum })
}

// A resource that is renamed or removed while it is up would run on unseen,
// and beside its successor.
func TestResourceRenamedWhileUp(t *testing.T) {
	t.Parallel()
	p, port := newLab(t, settings{"cluster.nodes": "node1"})
	killServices(t, p)
	writeService(t, p, "svc1", sleeper)
	d := serveLive(t, p, port, nil)
	up(t, p, "svc1")
	text := strings.Replace(sleeper, "[app#1]", "[app#web]\nrestart = 2", 1)
	writeService(t, p, "svc1", text)
	waitFor(t, patience, "why it is not used", func() bool {
		return strings.Contains(serviceOf(t, p, "svc1").Config.Error, "svcmgr -s svc1 stop --local --rid app#1")
	})
	if programs := processesWith("OSVCRUN=" + p.run); len(programs) != 1 {
		t.Errorf("%d programs", len(programs))
	}
	if r := d.local("set_service_monitor", "svcname=svc1", "local_expect=stopped", `rid=["app#1"]`); r.Status != 0 {
		t.Fatal(r.Error)
	}
	waitFor(t, patience, "the successor", func() bool {
		return serviceOf(t, p, "svc1").Instances["node1"].Resources["app#web"].Status == statusUp
	})
	if programs := processesWith("OSVCRUN=" + p.run); len(programs) != 1 {
		t.Errorf("%d programs", len(programs))
	}
	if said := d.logged.count("is not used"); said != 1 {
		t.Errorf("logged %d times", said)
	}
}

// A shutdown waits for a flag that is being written, and stops then.
func TestShutdownWhileFreezing(t *testing.T) {
	p, port := newLab(t, settings{"cluster.nodes": "node1"})
	killServices(t, p)
	writeService(t, p, "svc1", sleeper)
	d := serveLive(t, p, port, nil)
	up(t, p, "svc1")
	waitFor(t, patience, "the start is over", func() bool { return serviceOf(t, p, "svc1").Instances["node1"].Monitor.Status == stateIdle })
	do := func(f func(s *shell)) { t.Helper(); must(t, d.monitor.do(context.Background(), f)) }
	do(func(s *shell) { s.core.services["svc1"].state = stateFreezing })
	ended := make(chan error, 1)
	go func() { ended <- d.monitor.end(context.Background()) }()
	select {
	case err := <-ended:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(5 * endPause):
	}
	do(func(s *shell) { s.step(flagEvent{service: "svc1", frozen: true}) })
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestNodeThatRunsItStaysOnTheList: else the claim of what runs unseen would
// keep the service from all other nodes.
func TestNodeThatRunsItStaysOnTheList(t *testing.T) {
	members := []string{"n1", "n2"}
	read := func(nodes string) *service {
		spec, err := parseService("web", "[DEFAULT]\nnodes = "+nodes+"\n[app#1]\nexec = /a\n", "n1", members)
		if err != nil {
			t.Fatal(err)
		}
		return spec
	}
	m := &monitored{spec: read("n1 n2"), resources: map[string]*monitoredResource{"app#1": {status: statusUp}}}
	if err := m.leavesBehind(read("n2"), "n1"); err == nil {
		t.Error("a node that runs the service was taken off its list")
	}
	if err := m.leavesBehind(read("n2 n1"), "n1"); err != nil {
		t.Errorf("another order of the nodes: %v", err)
	}
	m.resources["app#1"].status = statusDown
	if err := m.leavesBehind(read("n2"), "n1"); err != nil {
		t.Errorf("it is down: %v", err)
	}
	m.acting = &order{Verb: verbStart}
	if err := m.leavesBehind(read("n2"), "n1"); err == nil {
		t.Error("a node that starts the service was taken off its list")
	}
}
