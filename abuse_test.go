// abuse_test.go: the real process under all that an outsider can send, with
// well-behaved clients beside it (design.md §10: bounded memory, time,
// descriptors and processes for any unauthenticated byte).

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// abuseSeed makes the messages; each sender has a stream of its own.
const abuseSeed = 20260215

const (
	// answerLimit is what a well-behaved client waits at most.
	answerLimit = time.Second
	// memoryLimit bounds the process, in kB.
	memoryLimit = 64 << 10
)

// prober asks again and again, and keeps the worst time.
type prober struct {
	name string
	ask  func() error
	mu   sync.Mutex
	n    int
	all  time.Duration
	this time.Duration // the worst of the present phase
	over []string
}

func (p *prober) work(ctx context.Context) {
	for ctx.Err() == nil {
		begun := time.Now()
		err := p.ask()
		took := time.Since(begun)
		p.mu.Lock()
		p.n++
		p.all, p.this = max(p.all, took), max(p.this, took)
		if err != nil || took > answerLimit {
			p.over = append(p.over, fmt.Sprintf("after %s: %v", took.Round(time.Millisecond), err))
		}
		p.mu.Unlock()
		time.Sleep(5 * time.Millisecond)
	}
}

// worst returns the worst time since it was called last.
func (p *prober) worst() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	worst := p.this
	p.this = 0
	return worst
}

// attack is a process under attack.
type attack struct {
	*realDaemon
	t        *testing.T
	from     string
	valid    []byte    // a request that was sealed really
	join     []byte    // one that makes the daemon derive the key of joins
	failed   sync.Once // to connect: one line says enough
	children atomic.Int64
	resident atomic.Int64 // kB, the highest that was sampled in a phase
	highest  int64        // and in all
}

func TestAbuse(t *testing.T) {
	t.Logf("seed %d", abuseSeed)
	begun := time.Now()
	p, port := newLab(t, nil)
	must(t, os.Remove(p.keys())) // its own derivation counts too
	d := runReal(t, p, port)
	w := d.client(t, "node2", "127.0.0.1")
	a := &attack{realDaemon: d, t: t, from: w.from, valid: w.aged(0)}
	joining := w
	joining.cluster = joinCluster
	a.join = joining.aged(0)

	beside, same := d.client(t, "node2", "127.0.0.2"), w
	if same.privileged = true; os.Geteuid() != 0 {
		same.node = "node3" // no port keeps this user apart: a name that is not forged does
	}
	probers := []*prober{
		{name: "another address", ask: func() error { return pinged(beside) }},
		{name: "the attackers' address, privileged", ask: func() error { return pinged(same) }},
		{name: "the local socket", ask: func() error { return askLocal(t.Context(), p, "ping", nil, nil, discard) }},
	}
	for _, prober := range probers {
		must(t, prober.ask())
	}
	goroutines, files := a.goroutines(), a.descriptors()
	for range 20 { // the lowest: what belongs to the start still ends
		time.Sleep(20 * time.Millisecond)
		goroutines, files = min(goroutines, a.goroutines()), min(files, a.descriptors())
	}

	ctx, cancel := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	watching.Go(func() { a.sample(ctx) })
	for _, prober := range probers {
		watching.Go(func() { prober.work(ctx) })
	}
	// How late this process itself wakes: what the machine, not the daemon, costs.
	var late atomic.Int64
	watching.Go(func() {
		for ctx.Err() == nil {
			slept := time.Now()
			time.Sleep(5 * time.Millisecond)
			late.Store(max(late.Load(), int64(time.Since(slept)-5*time.Millisecond)))
		}
	})
	phase := func(name string, attack func()) {
		t.Helper()
		phaseBegun := time.Now()
		attack()
		var worst []string
		for _, prober := range probers {
			worst = append(worst, prober.worst().Round(10*time.Microsecond).String())
		}
		resident := a.resident.Swap(0)
		a.highest = max(a.highest, resident)
		t.Logf("%-50s %5.2f s, %6d kB, this process late by %s, worst answer %s", name, time.Since(phaseBegun).Seconds(), resident, time.Duration(late.Swap(0)).Round(10*time.Microsecond), strings.Join(worst, ", "))
	}
	phase("10,000 random and mutated messages", a.messages)
	held, err := lock(p.lockFile("queue")) // so that a dequeue hangs, and each one more would be seen
	must(t, err)
	var waiting sync.WaitGroup
	for _, beside := range []struct {
		name   string
		attack func()
	}{
		{"a request of 200 MB", a.endless},
		{"200 requests of 1 MB without an end", func() { a.hoard(&waiting) }},
		{"200 requests of 1 MB", a.large},
		{"1,000 empty connections", a.empty},
		{"100,000 datagrams", a.datagrams},
	} {
		phase("200 silent and 200 dripping connections", func() { a.linger(&waiting) })
		phase("beside them: "+beside.name, beside.attack)
	}
	held.unlock()
	phase("until they are closed", waiting.Wait)
	cancel()
	watching.Wait()

	for _, prober := range probers {
		t.Logf("%s: %d answers, the worst after %s", prober.name, prober.n, prober.all.Round(10*time.Microsecond))
		if len(prober.over) > 0 || prober.n < 100 {
			t.Errorf("%s: %d answers, %d too late or none: %s", prober.name, prober.n, len(prober.over), strings.Join(prober.over[:min(5, len(prober.over))], "; "))
		}
	}
	stats := statusOf(t, p).Listener
	t.Logf("listener: %+v", stats.Stats)
	if children := a.children.Load(); children != 1 || stats.Stats["dequeue_runs"] == 0 {
		t.Errorf("%d processes beside the daemon at once, want the one that dequeues; %d runs", children, stats.Stats["dequeue_runs"])
	}
	if runs := stats.Stats["dequeue_runs"]; runs > int64(time.Since(begun)/dequeueInterval)+1 {
		t.Errorf("%d dequeues in %s", runs, time.Since(begun))
	}
	highest, now := a.memory("VmHWM"), a.memory("VmRSS")
	t.Logf("memory: VmHWM %d kB, VmRSS %d kB now, %d kB at most", highest, now, a.highest)
	if highest > memoryLimit {
		t.Errorf("memory went up to %d kB, the limit is %d", highest, memoryLimit)
	}
	waitFor(t, patience, "all processes have ended", func() bool { return a.descendants() == 0 })
	what := ""
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		nowGoroutines, nowFiles := a.goroutines(), a.descriptors()
		what = fmt.Sprintf("goroutines: %d before, %d after; descriptors: %d before, %d after", goroutines, nowGoroutines, files, nowFiles)
		if nowGoroutines <= goroutines && nowFiles <= files {
			break
		}
		if time.Now().After(end) {
			t.Fatal("left behind: " + what)
		}
	}
	t.Logf("%s; %.1f s in all", what, time.Since(begun).Seconds())
	if stats.State != "running" || stats.Restart != 0 {
		t.Errorf("the listener: %+v", stats.threadData)
	}
}

func pinged(w wireClient) error {
	answer, err := w.exchange(w.aged(0))
	if err == nil && len(answer) == 0 {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// mutated is a message that is wrong in some way, or in none that matters.
func (a *attack) mutated(r *rand.Rand) []byte {
	raw := bytes.Clone(a.valid)
	if r.IntN(20) == 0 {
		raw = bytes.Clone(a.join)
	}
	some := func(n int) []byte {
		b := make([]byte, n)
		for i := 0; i < n; i += 8 {
			copy(b[i:], binary.LittleEndian.AppendUint64(nil, r.Uint64()))
		}
		return b
	}
	for range 1 + r.IntN(3) {
		at := r.IntN(len(raw))
		end := min(len(raw), at+1+r.IntN(40))
		switch r.IntN(9) {
		case 0: // random bytes, nothing of a message
			raw = some(1 + r.IntN(1200))
		case 1: // a bit
			raw[at] ^= 1 << r.IntN(8)
		case 2: // cut
			raw = raw[:at+1]
		case 3: // a piece less
			raw = append(raw[:at:at], raw[end:]...)
		case 4: // a piece twice
			raw = append(raw[:end:end], raw[at:]...)
		case 5: // foreign bytes in it
			raw = append(append(raw[:at:at], some(1+r.IntN(30))...), raw[at:]...)
		case 6: // signs that mean something to a parser
			raw = append(append(raw[:at:at], `{}[]",:\u0000\\=`[r.IntN(16):]...), raw[at:]...)
		case 7: // deep
			raw = append(bytes.Repeat([]byte(`{"a":[`), r.IntN(200)), raw...)
		case 8: // a string that never ends
			raw = append(raw[:at:at], append([]byte(`"`), bytes.Repeat([]byte(`\u00`), r.IntN(500))...)...)
		}
		if len(raw) == 0 {
			raw = []byte("x")
		}
	}
	return raw
}

// inParallel divides n among senders, each with its random numbers.
func inParallel(senders, n int, send func(r *rand.Rand)) {
	var sending sync.WaitGroup
	for i := range senders {
		r := rand.New(rand.NewPCG(abuseSeed, uint64(i)))
		sending.Go(func() {
			for range n / senders {
				send(r)
			}
		})
	}
	sending.Wait()
}

// anywhere is one of many addresses: who is shut out at one comes from another.
func anywhere(r *rand.Rand) string {
	return fmt.Sprintf("127.2.%d.%d", r.IntN(256), r.IntN(256))
}

func (a *attack) messages() {
	inParallel(4, 2000, func(r *rand.Rand) { a.sendTCP(a.from, a.mutated(r)) })
	inParallel(4, 3000, func(r *rand.Rand) { a.sendTCP(anywhere(r), a.mutated(r)) })
	udp := a.dialUDP(a.from)
	defer udp.Close()
	inParallel(1, 2000, func(r *rand.Rand) { udp.Write(a.mutated(r)) })
	inParallel(1, 3000, func(r *rand.Rand) {
		udp := a.dialUDP(anywhere(r))
		defer udp.Close()
		udp.Write(a.mutated(r))
	})
}

// sendTCP sends raw by a connection of its own and waits for its end.
func (a *attack) sendTCP(from string, raw []byte) {
	conn, err := a.client(a.t, "node2", from).dial(patience)
	if err != nil {
		a.failed.Do(func() { a.t.Errorf("cannot connect: %v", err) })
		return
	}
	defer conn.Close()
	conn.Write(raw)
	conn.CloseWrite()
	io.Copy(io.Discard, conn)
}

func (a *attack) dialUDP(from string) net.Conn {
	conn, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(from)}, &net.UDPAddr{IP: net.ParseIP("127.0.0.1"), Port: a.port})
	if err != nil {
		panic(err)
	}
	return conn
}

// linger opens 200 connections that stay silent and 200 on which a request
// comes byte by byte, until the daemon closes them.
func (a *attack) linger(waiting *sync.WaitGroup) {
	w := a.client(a.t, "node2", a.from)
	for i := range 400 {
		conn, err := w.dial(patience)
		must(a.t, err)
		waiting.Go(func() {
			defer conn.Close()
			if i%2 == 0 {
				io.Copy(io.Discard, conn)
				return
			}
			for _, b := range a.valid {
				if _, err := conn.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
}

// endless sends 200 MB as one request, as far as it is taken.
func (a *attack) endless() {
	conn, err := a.client(a.t, "node2", a.from).dial(patience)
	must(a.t, err)
	defer conn.Close()
	piece := bytes.Repeat([]byte("x"), 1_000_000)
	for range 200 {
		if _, err := conn.Write(piece); err != nil {
			return
		}
	}
	a.t.Error("200 MB were taken")
}

// hoard sends requests of 1 MB without their end, from many addresses.
func (a *attack) hoard(waiting *sync.WaitGroup) {
	piece := bytes.Repeat([]byte("x"), 1_000_000)
	inParallel(8, 200, func(r *rand.Rand) {
		conn, err := a.client(a.t, "node2", anywhere(r)).dial(patience)
		if err != nil {
			a.failed.Do(func() { a.t.Errorf("cannot connect: %v", err) })
			return
		}
		conn.Write(piece) // fails where it is closed
		waiting.Go(func() {
			defer conn.Close()
			io.Copy(io.Discard, conn)
		})
	})
}

// large sends requests that just keep the limit and cost the most to read:
// each string has an escape.
func (a *attack) large() {
	text := []byte(`{"clustername": "default", "nodename": "node2", "salt": "` + strings.Repeat("A", 43) + `", "x": "\u0041` +
		strings.Repeat("x", 500_000) + `", "data": "\u0041` + strings.Repeat("A", 500_000) + "\"}\x00")
	inParallel(8, 200, func(*rand.Rand) { a.sendTCP(a.from, text) })
}

func (a *attack) empty() {
	inParallel(4, 1000, func(*rand.Rand) { a.sendTCP(a.from, nil) })
}

func (a *attack) datagrams() {
	from := rand.New(rand.NewPCG(abuseSeed, 1))
	senders := []net.Conn{a.dialUDP(a.from)}
	for range 200 {
		senders = append(senders, a.dialUDP(anywhere(from)))
	}
	big := bytes.Repeat([]byte("{"), 60_000)
	var made [][]byte
	for range 5000 {
		made = append(made, a.mutated(from))
	}
	i := 0
	inParallel(1, 100_000, func(r *rand.Rand) {
		i++
		udp := senders[0]
		if i%2 == 0 {
			udp = senders[r.IntN(len(senders))]
		}
		switch {
		case i%100 == 0:
			udp.Write(big)
		case i%4 == 0:
			udp.Write([]byte("\n"))
		case i%4 == 1:
			udp.Write(a.valid)
		default:
			udp.Write(made[r.IntN(len(made))])
		}
	})
	for _, udp := range senders {
		udp.Close()
	}
}

// sample watches the process from outside.
func (a *attack) sample(ctx context.Context) {
	for ctx.Err() == nil {
		a.children.Store(max(a.children.Load(), int64(a.descendants())))
		a.resident.Store(max(a.resident.Load(), int64(a.memory("VmRSS"))))
		time.Sleep(10 * time.Millisecond)
	}
}

// descendants counts the processes that the daemon started, and theirs.
func (a *attack) descendants() int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // fails for a faulty pattern only
	children := map[int][]int{}
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// pid (name) state ppid
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		parent, _ := strconv.Atoi(fields[1])
		if fields[0] != "Z" {
			children[parent] = append(children[parent], pid)
		}
	}
	count := 0
	for next := []int{a.cmd.Process.Pid}; len(next) > 0; {
		of := children[next[0]]
		count += len(of)
		next = append(next[1:], of...)
	}
	return count
}

// memory reads a figure of the process, in kB.
func (a *attack) memory(name string) int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	_, rest, found := strings.Cut(string(text), name+":")
	if !found {
		a.failed.Do(func() { a.t.Errorf("the process has no %s any more", name) })
		return 0
	}
	n, _ := strconv.Atoi(strings.Fields(rest)[0])
	return n
}

func (a *attack) goroutines() int { return statusOf(a.t, a.paths).Daemon.Goroutines }

func (a *attack) descriptors() int {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.cmd.Process.Pid))
	must(a.t, err)
	return len(entries)
}
