package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// clusterFaults draws faults that overlap, and ends each after a while.
type clusterFaults struct {
	*virtualCluster
	ends []clusterFault // those that go on
}

type clusterFault struct {
	at  time.Time
	end func()
}

func (c *virtualCluster) upTo(d time.Duration) time.Duration {
	return time.Duration(c.random.Int64N(int64(d)))
}

// run disturbs the cluster for so long, then mends everything.
func (f *clusterFaults) run(span time.Duration) {
	pause := []time.Duration{time.Second, 4 * time.Second, 15 * time.Second}[f.random.IntN(3)]
	for end := time.Now().Add(span); time.Now().Before(end); {
		next := time.Now().Add(f.upTo(2 * pause))
		for {
			slices.SortFunc(f.ends, func(a, b clusterFault) int { return a.at.Compare(b.at) })
			if len(f.ends) == 0 || f.ends[0].at.After(next) {
				break
			}
			over := f.ends[0]
			f.ends = f.ends[1:]
			time.Sleep(time.Until(over.at))
			over.end()
		}
		time.Sleep(time.Until(next))
		f.one()
	}
	for _, over := range f.ends {
		over.end()
	}
	f.ends = nil
}

// lasts has end called after a while.
func (f *clusterFaults) lasts(longest time.Duration, end func()) {
	f.ends = append(f.ends, clusterFault{time.Now().Add(f.upTo(longest) + time.Millisecond), end})
}

func (f *clusterFaults) say(format string, args ...any) {
	f.world.mu.Lock()
	defer f.world.mu.Unlock()
	f.world.log("-- "+format, args...)
}

func (f *clusterFaults) node() *clusterNode { return f.nodes[f.random.IntN(len(f.nodes))] }

func (f *clusterFaults) one() {
	n := f.node()
	switch f.random.IntN(18) {
	case 0, 1:
		f.cut(n)
	case 2:
		f.halves()
	case 3, 4:
		f.noise(n)
	case 5, 6:
		f.say("%s: the daemon crashes", n.name)
		n.crash()
		n.startLater(time.Millisecond + f.upTo([]time.Duration{200 * time.Millisecond, 5 * time.Second, 20 * time.Second}[f.random.IntN(3)]))
	case 7:
		n.machineCrash("power", time.Millisecond+f.upTo(30*time.Second))
	case 8:
		f.all()
	case 9:
		f.say("%s: the daemon is stopped and started", n.name)
		n.stop()
		f.mu.Lock()
		n.stopped = false
		f.mu.Unlock()
		n.startLater(time.Millisecond + f.upTo(20*time.Second))
	case 10, 11:
		f.disk(n)
	case 12:
		f.dies(n)
	case 13:
		f.fails(n)
	case 14:
		f.orders(n)
	case 15:
		f.thread(n)
	case 16:
		f.configuration(n)
	case 17:
		f.byHand(n)
	}
}

// cut takes links away: all of a node, or one direction of one.
func (f *clusterFaults) cut(n *clusterNode) {
	other := f.node()
	var links [][2]string
	switch f.random.IntN(3) {
	case 0:
		for _, o := range f.nodes {
			links = append(links, [2]string{n.name, o.name}, [2]string{o.name, n.name})
		}
	case 1:
		links = [][2]string{{n.name, other.name}, {other.name, n.name}}
	case 2:
		links = [][2]string{{n.name, other.name}}
	}
	f.cutLinks(links)
}

func (f *clusterFaults) cutLinks(links [][2]string) {
	f.say("cut: %v", links)
	for _, l := range links {
		f.fabric.set(l[0], l[1], func(l *fabricLink) { l.cuts++ })
	}
	f.lasts(30*time.Second, func() {
		f.say("whole again: %v", links)
		for _, l := range links {
			f.fabric.set(l[0], l[1], func(l *fabricLink) { l.cuts-- })
		}
	})
}

func (f *clusterFaults) halves() {
	var links [][2]string
	side := map[string]bool{}
	for _, n := range f.nodes {
		side[n.name] = f.random.IntN(2) == 0
	}
	for _, a := range f.nodes {
		for _, b := range f.nodes {
			if side[a.name] != side[b.name] {
				links = append(links, [2]string{a.name, b.name})
			}
		}
	}
	f.cutLinks(links)
}

// noise makes what a node sends late, lost, or twice.
func (f *clusterFaults) noise(n *clusterNode) {
	loss, delay, twice := f.random.Float64()/2, f.upTo(500*time.Millisecond), f.random.Float64()/3
	jitter, broken, old := f.upTo(time.Second), f.random.Float64()/3, f.random.Float64()/3
	f.say("%s: %.0f%% of what it sends is lost, %.0f%% comes twice, %.0f%% is damaged, %.0f%% comes again much later, all late by %s and up to %s",
		n.name, 100*loss, 100*twice, 100*broken, 100*old, delay, jitter)
	for _, o := range f.nodes {
		f.fabric.set(n.name, o.name, func(l *fabricLink) {
			l.loss, l.twice, l.broken, l.old, l.delay, l.jitter = loss, twice, broken, old, delay, jitter
		})
	}
	f.lasts(20*time.Second, func() {
		f.say("%s: its links are good again", n.name)
		for _, o := range f.nodes {
			f.fabric.set(n.name, o.name, func(l *fabricLink) {
				l.loss, l.twice, l.broken, l.old, l.delay, l.jitter = 0, 0, 0, 0, fabricDelay, fabricJitter
			})
		}
	})
}

func (f *clusterFaults) all() {
	machines := f.random.IntN(2) == 0
	f.say("all at once")
	for _, n := range f.nodes {
		time.Sleep(f.upTo(10 * time.Millisecond))
		if machines {
			n.machineCrash("power", time.Millisecond+f.upTo(5*time.Second))
			continue
		}
		n.crash()
		n.startLater(time.Millisecond + f.upTo(5*time.Second))
	}
}

// disk has a folder of the daemon's out of order for a while.
func (f *clusterFaults) disk(n *clusterNode) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n.blocked != "" {
		return
	}
	folder := []string{"var", "log", "etc"}[f.random.IntN(3)]
	if !blockDisk(filepath.Join(n.root, folder)) {
		return
	}
	n.blocked = folder
	f.say("%s: nothing can be read or written in %s", n.name, folder)
	f.lasts(15*time.Second, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.say("%s: %s is there again", n.name, folder)
		must(f.tb, unblockDisk(filepath.Join(n.root, folder)))
		n.blocked = ""
	})
}

// dies ends a program of a service that runs there.
func (f *clusterFaults) dies(n *clusterNode) {
	f.world.mu.Lock()
	defer f.world.mu.Unlock()
	v := f.conf.services[f.random.IntN(len(f.conf.services))]
	rid := v.rids[f.random.IntN(len(v.rids))]
	if n.machine.on && n.machine.running[v.name+" "+rid] {
		f.world.log("-- %s: %s %s dies", n.name, v.name, rid)
		n.machine.set(v.name, rid, false)
	}
}

// fails has the next starts or stops fail.
func (f *clusterFaults) fails(n *clusterNode) {
	f.world.mu.Lock()
	defer f.world.mu.Unlock()
	v := f.conf.services[f.random.IntN(len(f.conf.services))]
	if n.machine.on {
		f.world.log("-- %s: the next start of %s fails", n.name, v.name)
		n.machine.failing["start "+v.name] = 1
	}
}

// orders are what people type.
func (f *clusterFaults) orders(n *clusterNode) {
	v := f.conf.services[f.random.IntN(len(f.conf.services))]
	var err error
	switch f.random.IntN(4) {
	case 0:
		err = n.ask("cluster_status", nil)
	case 1:
		err = n.ask("daemon_status", nil)
	case 2:
		err = n.ask("set_node_monitor", nil, "local_expect=frozen")
		f.lasts(10*time.Second, func() { n.ask("set_node_monitor", nil, "local_expect=thawed") })
	case 3:
		err = n.ask("set_service_monitor", nil, "svcname="+v.name, "local_expect=restarted")
	}
	f.say("%s is asked something about %s: %v", n.name, v.name, err)
}

// thread stops one of the daemon's threads for a while.
func (f *clusterFaults) thread(n *clusterNode) {
	id := []string{"listener", "monitor", "hb#1.tx", "hb#1.rx"}[f.random.IntN(4)]
	err := n.ask("daemon_stop", nil, "thr_id="+id, fmt.Sprintf("force=%t", f.random.IntN(2) == 0))
	f.say("%s: thread %s is stopped: %v", n.name, id, err)
	d := n.daemon()
	f.lasts(15*time.Second, func() {
		if d != nil && d == n.daemon() {
			f.say("%s: thread %s is started: %v", n.name, id, n.ask("daemon_start", nil, "thr_id="+id))
		}
	})
}

// configuration touches node.conf, or takes a service's file away.
func (f *clusterFaults) configuration(n *clusterNode) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n.blocked == "etc" {
		return
	}
	if f.random.IntN(2) == 0 {
		text, err := os.ReadFile(n.paths().nodeConf())
		if err != nil {
			return // the folder of an earlier daemon was blocked, and was taken over so
		}
		must(f.tb, os.WriteFile(n.paths().nodeConf(), append(text, "# touched\n"...), 0o600))
		f.say("%s: node.conf is touched", n.name)
		return
	}
	v := f.conf.services[f.random.IntN(len(f.conf.services))]
	if os.Rename(n.paths().servicePath(v.name), n.paths().servicePath(v.name)+".away") != nil {
		return
	}
	f.say("%s: the file of %s is gone", n.name, v.name)
	f.lasts(10*time.Second, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		must(f.tb, unblockDisk(filepath.Join(n.root, "etc")))
		if n.blocked == "etc" {
			n.blocked = ""
		}
		must(f.tb, os.Rename(n.paths().servicePath(v.name)+".away", n.paths().servicePath(v.name)))
		f.say("%s: the file of %s is there again", n.name, v.name)
	})
}

// byHand starts a service behind agentd's back. It does not count until the
// daemon must have seen it and done what is to be done.
func (f *clusterFaults) byHand(n *clusterNode) {
	f.world.mu.Lock()
	defer f.world.mu.Unlock()
	v := f.conf.services[f.random.IntN(len(f.conf.services))]
	if !n.machine.on || n.machine.runs(v.name) || !slices.Contains(v.nodes, n.name) {
		return
	}
	f.world.log("-- %s: somebody starts %s", n.name, v.name)
	n.machine.byHand[v.name] = true
	for _, rid := range v.rids {
		n.machine.set(v.name, rid, true)
	}
}

// mend makes all as it should be, but for what daemons do themselves.
func (f *clusterFaults) mend() {
	for _, n := range f.nodes {
		f.world.mu.Lock()
		clear(n.machine.failing)
		f.world.mu.Unlock()
		f.mu.Lock()
		n.stopped = false
		f.mu.Unlock()
	}
	time.Sleep(31 * time.Second) // machines are on by then
	for _, n := range f.nodes {
		n.startLater(time.Millisecond)
	}
	time.Sleep(time.Second)
	for _, n := range f.nodes {
		n.ask("set_node_monitor", nil, "local_expect=thawed")
		for _, v := range f.conf.services {
			if slices.Contains(v.nodes, n.name) {
				n.ask("clear", nil, "svcname="+v.name)
			}
		}
	}
}

// drawCluster draws what a seed's cluster is made of.
func drawCluster(seed uint64) clusterConf {
	c := &virtualCluster{random: newSource(seed, 2)}
	conf := plainConf([]int{1, 2, 3, 3, 3, 4, 5, 5}[c.random.IntN(8)])
	conf.seed = seed
	conf.timeout = []time.Duration{1500 * time.Millisecond, 3 * time.Second}[c.random.IntN(2)]
	conf.interval = conf.timeout / time.Duration(4+c.random.IntN(4))
	conf.grace = []time.Duration{2 * time.Second, 3 * time.Second}[c.random.IntN(2)]
	conf.reboot = c.random.IntN(2) == 0
	names := clusterNames(conf.size)
	for i := range 1 + c.random.IntN(3) {
		nodes := slices.Clone(names)
		c.random.Shuffle(len(nodes), func(a, b int) { nodes[a], nodes[b] = nodes[b], nodes[a] })
		if c.random.IntN(4) == 0 {
			nodes = nodes[:1]
		}
		v := failoverService(string(rune('a'+i)), nodes...)
		v.rids = v.rids[:1+c.random.IntN(2)]
		conf.services = append(conf.services, v)
	}
	return conf
}

// healing is how long it takes at most, once all is healed, until everything is
// as it should be.
func (c clusterConf) healing() time.Duration {
	term := (c.timeout + c.grace) * 105 / 100
	longest := (clusterMaintenance + c.grace) * 105 / 100
	return longest + 2*term + clusterRejoin + 4*c.timeout + 10*time.Second + 5*c.grace
}

func runClusterFaults(t *testing.T, seed uint64, span time.Duration) *fakeWorld {
	conf := drawCluster(seed)
	return virtually(t, conf, func(c *virtualCluster) {
		f := &clusterFaults{virtualCluster: c}
		f.run(span)
		f.say("all is healed")
		f.mend()
		c.settles(conf.healing())
	})
}

// Daemons in clusters, with faults: never two copies, and one once all is
// healed.
func TestClusterFaults(t *testing.T) {
	seeds, span := uint64(8), 3*time.Minute
	if flagGiven("seeds") {
		seeds = *simSeeds
	}
	if flagGiven("hours") {
		span = time.Duration(*simHours * float64(time.Hour))
	}
	if *simSeed >= 0 {
		w := runClusterFaults(t, uint64(*simSeed), span)
		t.Log("\n" + strings.Join(w.trace, "\n"))
		return
	}
	for seed := *simFirst; seed < *simFirst+seeds; seed++ {
		begun := time.Now()
		w := runClusterFaults(t, seed, span)
		t.Logf("seed %d: %d events, %s", seed, len(w.trace), time.Since(begun).Round(time.Millisecond))
		if t.Failed() {
			t.Fatalf("to replay it: go test -run TestClusterFaults -hours %g -seed %d -v .", span.Hours(), seed)
		}
	}
}

// One seed is one run: the same happens at the same nanosecond, as far as the
// scheduler of goroutines allows. What is left to it is the order of what a
// daemon does in one and the same nanosecond, as at its start: whether its first
// beat carries a change, or the second; from there on the runs are two. So a
// part of all events has to be the same: of runs that draw by chance, a
// fiftieth is.
func TestClusterIsReproducible(t *testing.T) {
	same, all := 0, 0
	for seed := uint64(41); seed < 47; seed++ {
		first, second := runClusterFaults(t, seed, time.Minute).trace, runClusterFaults(t, seed, time.Minute).trace
		i := 0
		for i < min(len(first), len(second)) && first[i] == second[i] {
			i++
		}
		if same, all = same+i, all+len(first); i < min(len(first), len(second)) {
			t.Logf("seed %d: after %d of %d events:\n%s\n%s", seed, i, len(first), first[i], second[i])
		}
	}
	if t.Logf("%d of %d events were the same", same, all); same < all/5 {
		t.Errorf("only %d of %d events were the same", same, all)
	}
}
