package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkTwoHundredServices runs 200 services of three programs each on one
// daemon: what it takes until all are up, from the start of the daemon; until
// another daemon has taken them all up; and what the daemon costs when nothing
// happens. Run it once:
//
//	go test -run '^$' -bench TwoHundredServices -benchtime 1x .
func BenchmarkTwoHundredServices(b *testing.B) {
	const services, idle = 200, 30 * time.Second
	for b.Loop() {
		p, port := newLab(b, settings{"cluster.nodes": ""}) // node1 alone
		b.Cleanup(func() { endProcessesOf(p) })
		for n := range services {
			text := "[DEFAULT]\norchestrate = ha\n"
			for rid := range 3 {
				text += fmt.Sprintf("[app#%d]\nexec = sleep 100000\nrestart = 1\n", rid+1)
			}
			must(b, os.WriteFile(p.servicePath(fmt.Sprintf("svc%03d", n)), []byte(text), 0o600))
		}
		up := func(begun time.Time) time.Duration {
			b.Helper()
			waitFor(b, 5*time.Minute, "all services are up", func() bool { return programsOf(b, p) == 3*services })
			took := time.Since(begun)
			waitFor(b, time.Minute, "the status says so", func() bool { time.Sleep(100 * time.Millisecond); return servicesUp(b, p) == services })
			return took
		}
		begun := time.Now()
		d := runLone(b, p, port)
		b.ReportMetric(float64(up(begun).Milliseconds()), "ms-to-up")

		time.Sleep(2 * time.Second)
		before := ticks(b, d)
		time.Sleep(idle)
		used := ticks(b, d) - before
		b.ReportMetric(float64(used), "ticks/30s")
		b.ReportMetric(float64(used)/idle.Seconds(), "cpu-%") // a tick is 10 ms (CLK_TCK is 100 on Linux)
		b.ReportMetric(float64(memory(b, d))/1024, "MB-resident")

		must(b, d.cmd.Process.Kill())
		<-d.exited
		begun = time.Now()
		d = runLone(b, p, port)
		waitFor(b, time.Minute, "all are taken up", func() bool { time.Sleep(10 * time.Millisecond); return servicesUp(b, p) == services })
		b.ReportMetric(float64(time.Since(begun).Milliseconds()), "ms-to-taken-up")

		begun = time.Now()
		must(b, askLocal(context.Background(), p, "daemon_shutdown", nil, nil, discard))
		<-d.exited
		b.ReportMetric(float64(time.Since(begun).Milliseconds()), "ms-to-down")
		if left := programsOf(b, p); left > 0 {
			b.Errorf("%d programs are left", left)
		}
		b.ReportMetric(0, "ns/op") // says nothing here
	}
}

// runLone runs the daemon of a cluster of one.
func runLone(b *testing.B, p paths, port int) *realDaemon {
	b.Helper()
	d := &realDaemon{tb: b, paths: p, port: port, cmd: realCommand(b, p, "run"), logged: p.nodeLog(), exited: make(chan struct{})}
	must(b, d.cmd.Start())
	go func() {
		defer close(d.exited)
		d.cmd.Wait()
	}()
	b.Cleanup(func() {
		d.cmd.Process.Kill()
		<-d.exited
	})
	return d
}

// programsOf counts the records of programs that run.
func programsOf(b *testing.B, p paths) int {
	b.Helper()
	records, err := filepath.Glob(filepath.Join(p.run, "services", "*", "*.program"))
	must(b, err)
	return len(records)
}

func servicesUp(b *testing.B, p paths) (up int) {
	b.Helper()
	var data struct {
		Monitor struct{ Services map[string]serviceData }
	}
	if err := askLocal(context.Background(), p, "daemon_status", nil, nil, dataOf(&data)); err != nil {
		return 0 // it does not answer yet
	}
	for _, s := range data.Monitor.Services {
		if s.Avail == statusUp {
			up++
		}
	}
	return up
}

// ticks is the processor time of the daemon so far, user's and system's.
func ticks(b *testing.B, d *realDaemon) (sum int) {
	b.Helper()
	for _, field := range processStat(d.cmd.Process.Pid)[11:13] {
		n, err := strconv.Atoi(field)
		must(b, err)
		sum += n
	}
	return sum
}

// memory is what the daemon has resident, in kB.
func memory(b *testing.B, d *realDaemon) (kB int) {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	must(b, err)
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	_, err = fmt.Sscan(rest, &kB)
	must(b, err)
	return kB
}

// endProcessesOf kills what runs in the folders of p.
func endProcessesOf(p paths) {
	for end := time.Now().Add(patience); time.Now().Before(end); {
		pids := processesWith("OSVCRUN=" + p.run)
		if len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
}
