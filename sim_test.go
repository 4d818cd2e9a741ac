// sim_test.go: the core alone, whole clusters in virtual time (design.md §11).
// One heap of events and one seed; no goroutine, no clock, no map order: the
// same seed gives the same run, bit for bit. The machines are in
// sim_node_test.go, what a daemon does there in sim_shell_test.go and
// sim_action_test.go, the faults in sim_kinds_test.go and
// in sim_faults_test.go, what must hold in sim_check_test.go, and the bugs that
// must be found in sim_planted_test.go.
//
//	go test -run TestSim -seeds 1000 -hours 1 .    more of it
//	go test -run 'TestSim$' -seed 17 -v .          one seed, with its trace

package main

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// sim is one cluster, its faults, and what was found.
type sim struct {
	seed   uint64
	random *rand.Rand
	now    time.Duration // true time, which no node knows
	end    time.Duration
	queue  []simEvent
	count  uint64 // of events ever queued: equal times keep their order

	simConf
	nodes    []*simNode
	services []*simService
	links    [][]simLink // from, to
	old      []simPacket // some that were sent, for replays
	check    simCheck
	faults   simFaults
	plant    *plant

	hash  uint64
	say   func(string)
	fault string // the violation, which ends the run
}

// simConf is what is drawn first.
type simConf struct {
	size, witnesses          int
	quorum                   bool
	interval, timeout, grace time.Duration
	rejoin, longest          time.Duration
	recheck                  time.Duration // between checks of resources
	reboots                  bool          // quorum_action
	stuck                    bool          // stops may fail and hang
	latency                  time.Duration
	between                  time.Duration // mean time between faults
	drift                    int64         // largest, in ppm
	wild                     bool          // one of the clocks of a machine may go as it likes
}

type simEvent struct {
	at  time.Duration
	seq uint64
	do  func()
}

func (s *sim) at(at time.Duration, do func()) {
	s.count++
	s.queue = append(s.queue, simEvent{max(at, s.now), s.count, do})
	for i := len(s.queue) - 1; i > 0; {
		up := (i - 1) / 2
		if !s.queue[i].before(&s.queue[up]) {
			break
		}
		s.queue[i], s.queue[up] = s.queue[up], s.queue[i]
		i = up
	}
}

func (e *simEvent) before(f *simEvent) bool { return e.at < f.at || e.at == f.at && e.seq < f.seq }

func (s *sim) after(d time.Duration, do func()) { s.at(s.now+d, do) }

func (s *sim) next() simEvent {
	first, last := s.queue[0], len(s.queue)-1
	s.queue[0], s.queue[last] = s.queue[last], simEvent{}
	s.queue = s.queue[:last]
	for i := 0; ; {
		low := 2*i + 1
		if low >= last {
			break
		}
		if low+1 < last && s.queue[low+1].before(&s.queue[low]) {
			low++
		}
		if !s.queue[low].before(&s.queue[i]) {
			break
		}
		s.queue[low], s.queue[i] = s.queue[i], s.queue[low]
		i = low
	}
	return first
}

// run plays the seed to its end or to the first violation.
func (s *sim) run() {
	for len(s.queue) > 0 && s.fault == "" {
		e := s.next()
		if e.at > s.end {
			return
		}
		s.now = e.at
		e.do()
	}
}

func (s *sim) fail(format string, args ...any) {
	if s.fault == "" {
		s.fault = fmt.Sprintf("at %s: ", s.now) + fmt.Sprintf(format, args...)
		s.log("VIOLATION %s", s.fault)
	}
}

// mix adds to the hash of the trace.
func (s *sim) mix(a, b uint64) {
	s.hash = (s.hash^uint64(s.now))*0x9E3779B97F4A7C15 ^ a*0xD6E8FEB86659FD93 ^ (b<<31 | b>>33)
	s.hash ^= s.hash >> 29
}

func (s *sim) tracing() bool { return s.say != nil }

func (s *sim) log(format string, args ...any) {
	if s.say != nil {
		s.say(fmt.Sprintf("%12.6f ", s.now.Seconds()) + fmt.Sprintf(format, args...))
	}
}

func (s *sim) chance(percent int) bool { return s.random.IntN(100) < percent }

// upTo draws a duration, evenly.
func (s *sim) upTo(d time.Duration) time.Duration {
	return s.span(0, d)
}

func (s *sim) span(low, high time.Duration) time.Duration {
	if high <= low {
		return low
	}
	return low + time.Duration(s.random.Int64N(int64(high-low)))
}

// about draws a duration of that mean, most of them shorter.
func (s *sim) about(mean time.Duration) time.Duration {
	return time.Duration(s.random.ExpFloat64() * float64(mean))
}

func (c *simConf) term() time.Duration { return (c.timeout + c.grace) * 105 / 100 }

func (s *sim) majority() int { return s.size/2 + 1 }

// newSim draws a cluster and its first events.
func newSim(seed uint64, hours float64, p *plant, say func(string)) *sim {
	s := &sim{seed: seed, random: rand.New(rand.NewPCG(seed, 4)), end: time.Duration(hours * float64(time.Hour)), plant: p, say: say}
	s.draw()
	s.links = make([][]simLink, s.size)
	for i := range s.links {
		s.links[i] = make([]simLink, s.size)
	}
	for i := range s.size {
		s.nodes = append(s.nodes, newSimNode(s, i))
	}
	s.drawServices()
	s.log("seed %d: %d nodes, %d witnesses, quorum %v, interval %s, timeout %s, grace %s, rejoin %s, recheck %s, latency %s, reboots %v, stuck %v, drift %d, wild %v",
		seed, s.size, s.witnesses, s.quorum, s.interval, s.timeout, s.grace, s.rejoin, s.recheck, s.latency, s.reboots, s.stuck, s.drift, s.wild)
	s.check.begin(s)
	s.faults.begin(s)
	for _, n := range s.nodes {
		s.after(s.upTo(2*time.Second), n.boot)
	}
	return s
}

func (s *sim) draw() {
	s.size = []int{1, 2, 3, 3, 3, 3, 4, 5, 5, 6, 7}[s.random.IntN(11)]
	if s.size > 2 && s.chance(30) {
		s.witnesses = 1 + s.random.IntN((s.size-1)/2)
	}
	s.quorum = s.size > 2
	if s.chance(10) {
		s.quorum = !s.quorum
	}
	s.timeout = s.span(time.Second, 6*time.Second)
	if s.chance(40) {
		s.timeout = 3 * time.Second
	}
	s.grace = s.span(time.Second, 5*time.Second)
	if s.chance(40) {
		s.grace = 3 * time.Second
	}
	s.interval = s.timeout / time.Duration(3+s.random.IntN(5)) // with less, one acknowledgement is too old before the next comes
	s.rejoin = s.span(5*time.Second, 30*time.Second)
	s.recheck = s.span(2*time.Second, 10*time.Second)
	s.longest = s.term().Truncate(time.Millisecond) + time.Millisecond
	if s.chance(30) {
		s.longest *= 3
	}
	s.reboots, s.stuck = s.chance(40), s.chance(20)
	s.latency = s.span(100*time.Microsecond, 20*time.Millisecond)
	if s.chance(20) {
		s.latency = s.span(20*time.Millisecond, s.timeout/16)
	}
	s.between = s.span(3*time.Second, 30*time.Second)
	s.drift = []int64{0, 100, 10_000, 23_000, 23_000}[s.random.IntN(5)]
	s.wild = s.chance(35) && s.interval <= s.timeout/5
}

// simService is a service file, in truth and as each node reads it.
type simService struct {
	index   int
	name    string
	nodes   []int // that may run it
	specs   []*service
	rids    []string
	starts  time.Duration // the longest that a start takes, all resources
	several bool          // a failover service
}

func (s *sim) drawServices() {
	for i := range 1 + s.random.IntN(4) {
		v := &simService{index: i, name: string(rune('a' + i)), starts: s.span(10*time.Millisecond, 4*time.Second)}
		for j := range s.size - s.witnesses {
			v.nodes = append(v.nodes, j)
		}
		s.random.Shuffle(len(v.nodes), func(a, b int) { v.nodes[a], v.nodes[b] = v.nodes[b], v.nodes[a] })
		switch {
		case i == 3:
			v.nodes = v.nodes[:1]
		case len(v.nodes) > 2 && s.chance(25):
			v.nodes = v.nodes[:2]
		}
		v.several = len(v.nodes) > 1
		text := "[DEFAULT]\norchestrate = ha\nnodes ="
		for _, n := range v.nodes {
			text += " " + s.nodes[n].name
		}
		text += "\nmonitor_action = " + []string{"none", "switch", "switch", "freezestop"}[s.random.IntN(4)] + "\n"
		for r := range 1 + s.random.IntN(2) {
			v.rids = append(v.rids, fmt.Sprintf("app#%d", r+1))
			text += fmt.Sprintf("[%s]\nexec = /a\nrestart = %d\nmonitor = %s\n", v.rids[r], s.random.IntN(3), []string{"yes", "yes", "no"}[s.random.IntN(3)])
		}
		for _, n := range s.nodes {
			var spec *service
			if n.may(v) {
				var err error
				if spec, err = parseService(v.name, text, n.name, s.members()); err != nil {
					panic(err)
				}
			}
			v.specs = append(v.specs, spec)
			n.copies = append(n.copies, &simCopy{service: v, running: make([]bool, len(v.rids))})
		}
		s.services = append(s.services, v)
	}
}

func (s *sim) members() (names []string) {
	for i := range s.size {
		names = append(names, fmt.Sprintf("n%d", i+1))
	}
	return names
}

func (n *simNode) may(v *simService) bool {
	for _, other := range v.nodes {
		if other == n.index {
			return true
		}
	}
	return false
}

// simulate runs one seed and returns the violation, "" if there is none.
func simulate(seed uint64, hours float64, p *plant) *sim {
	s := newSim(seed, hours, p, nil)
	s.run()
	return s
}

// traced runs a seed again, and returns the end of its trace.
func traced(seed uint64, hours float64, p *plant, last int) string {
	var lines []string
	s := newSim(seed, hours, p, func(line string) {
		if lines = append(lines, line); len(lines) > 4*last {
			lines = append(lines[:0], lines[len(lines)-last:]...)
		}
	})
	s.run()
	return strings.Join(lines[max(0, len(lines)-last):], "\n")
}

// TestSim lets clusters live under all faults at once and looks at what they
// really do (design.md §11, I1 to I8).
func TestSim(t *testing.T) {
	t.Parallel()
	if *simSeed >= 0 {
		say := func(line string) { fmt.Println(line) }
		if !testing.Verbose() {
			say = nil
		}
		s := newSim(uint64(*simSeed), *simHours, nil, say)
		if s.run(); s.fault != "" {
			t.Fatalf("seed %d: %s", *simSeed, s.fault)
		}
		return
	}
	seeds := *simSeeds
	if testing.Short() {
		seeds = min(seeds, 8)
	}
	var next, found atomic.Uint64
	begin := time.Now()
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for i := next.Add(1); i <= seeds && found.Load() < 8; i = next.Add(1) {
				seed := *simFirst + i - 1
				if s := simulate(seed, *simHours, nil); s.fault != "" {
					found.Add(1)
					t.Errorf("seed %d: %s\nto replay it: go test -run 'TestSim$' -hours %g -seed %d -v .\n%s", seed, s.fault, *simHours, seed, traced(seed, *simHours, nil, 40))
				}
			}
		})
	}
	workers.Wait()
	t.Logf("seeds %d to %d, %g virtual hours each, in %s", *simFirst, *simFirst+seeds-1, *simHours, time.Since(begin).Round(time.Second))
}

// TestSimSameTrace: what one run did, the next one does again.
func TestSimSameTrace(t *testing.T) {
	t.Parallel()
	for seed := uint64(1); seed <= 6; seed++ {
		a, b := simulate(seed, 0.1, nil), simulate(seed, 0.1, nil)
		if a.hash != b.hash || a.count != b.count {
			t.Errorf("seed %d: the trace is %x of %d events, and then %x of %d", seed, a.hash, a.count, b.hash, b.count)
		}
		if c := simulate(seed+100, 0.1, nil); c.hash == a.hash {
			t.Errorf("seeds %d and %d have the same trace", seed, seed+100)
		}
	}
}
