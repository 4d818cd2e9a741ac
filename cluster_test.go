// cluster_test.go: the real daemon in virtual time (design.md §11): whole
// clusters of daemons in one process, with their goroutines, sealing and files,
// over a network in memory (cluster_network_test.go), with services in a fake
// world (cluster_world_test.go) which is the truth that is checked. The faults
// are in cluster_faults_test.go.
//
//	go test -run TestClusterFaults -seeds 100 -hours 0.17 .   100 times 10 minutes
//	go test -run TestClusterFaults -seed 17 -v .              one seed, with its trace

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// clusterConf is what a cluster is made of.
type clusterConf struct {
	seed              uint64
	size              int
	interval, timeout time.Duration
	grace             time.Duration
	reboot            bool
	services          []*fakeService
}

// virtualCluster is one.
type virtualCluster struct {
	tb     testing.TB
	conf   clusterConf
	dir    string
	random *rand.Rand
	world  *fakeWorld
	fabric *fabric
	nodes  []*clusterNode
	lives  sync.WaitGroup // daemons, also those that crashed

	forgets bool // planted: what a voter granted is gone when its daemon crashes

	mu sync.Mutex // guards the nodes; not held while anything is waited for
}

// clusterNode is a node and the daemon that runs on it.
type clusterNode struct {
	c       *virtualCluster
	index   int
	name    string
	machine *fakeMachine
	random  *rand.Rand
	log     *logText

	root    string
	crashes int
	stopped bool // by a person
	life    *clusterLife
	blocked string // the folder that is out of order
}

// clusterLife is one daemon.
type clusterLife struct {
	d       *daemon
	host    *fabricHost
	cancel  context.CancelFunc
	crashed atomic.Bool // nothing that it does counts any more
	done    chan struct{}
}

const (
	clusterMaintenance = 10 * time.Second
	clusterRejoin      = 5 * time.Second
)

// newVirtualCluster is called in a bubble; dir is on a disk that is fast.
func newVirtualCluster(tb testing.TB, dir string, conf clusterConf) *virtualCluster {
	c := &virtualCluster{tb: tb, conf: conf, dir: dir, random: newSource(conf.seed, 1)}
	c.world = &fakeWorld{begun: time.Now(), quorum: conf.size >= 3, services: conf.services}
	c.fabric = newFabric(conf.seed, clusterNames(conf.size))
	for i, name := range clusterNames(conf.size) {
		n := &clusterNode{c: c, index: i, name: name, log: &logText{}, root: filepath.Join(dir, name+".0"), random: newSource(conf.seed, 10+uint64(i))}
		n.machine = &fakeMachine{
			w: c.world, node: name, seed: conf.seed, random: newSource(conf.seed, 100+uint64(i)), grace: conf.grace, reboot: conf.reboot,
			off: n.machineCrash, end: func() { n.crash(); n.startLater(100 * time.Millisecond) },
		}
		c.world.machines = append(c.world.machines, n.machine)
		c.nodes = append(c.nodes, n)
		n.install()
	}
	return c
}

func clusterNames(size int) (names []string) {
	for i := range size {
		names = append(names, fmt.Sprintf("n%d", i+1))
	}
	return names
}

func (n *clusterNode) paths() paths {
	in := func(name string) string { return filepath.Join(n.root, name) }
	return paths{in("etc"), in("var"), in("log"), in("run")}
}

// install makes the files of a node.
func (n *clusterNode) install() {
	c, p := n.c, n.paths()
	must(c.tb, p.makeFolders())
	keys, err := os.ReadFile(labKeys().path)
	must(c.tb, err)
	must(c.tb, os.WriteFile(p.keys(), keys, 0o600))
	release := filepath.Join(c.dir, "release")
	must(c.tb, os.WriteFile(release, []byte("Lab release 4.11\n"), 0o600))
	action := "stop"
	if c.conf.reboot {
		action = "reboot"
	}
	text := fmt.Sprintf("[node]\nname = %s\nmaintenance_grace_period = %s\nrejoin_grace_period = %s\n", n.name, clusterMaintenance, clusterRejoin) +
		fmt.Sprintf("[cluster]\nnodes = %s\nsecret = %s\nquorum_grace = %s\nquorum_action = %s\n", strings.Join(clusterNames(c.conf.size), " "), liveSecret, c.conf.grace, action) +
		fmt.Sprintf("[hb#1]\ntype = unicast\ninterval = %s\ntimeout = %s\n[release]\nfile = %s\n", c.conf.interval, c.conf.timeout, release)
	must(c.tb, os.WriteFile(p.nodeConf(), []byte(text), 0o600))
	for _, v := range c.conf.services {
		must(c.tb, os.WriteFile(p.servicePath(v.name), []byte(v.text()), 0o600))
		must(c.tb, os.Chtimes(p.servicePath(v.name), c.world.begun, c.world.begun))
	}
}

// boot turns the machine on and starts its daemon.
func (n *clusterNode) boot() {
	n.machine.boot()
	n.startLater(time.Duration(n.random.Int64N(int64(time.Second))))
}

// startLater starts the daemon, unless one runs by then.
func (n *clusterNode) startLater(d time.Duration) {
	n.c.world.mu.Lock()
	boot := n.machine.boots
	n.c.world.mu.Unlock()
	time.AfterFunc(d, func() {
		n.c.mu.Lock()
		defer n.c.mu.Unlock()
		n.c.world.mu.Lock()
		on := n.machine.on && n.machine.boots == boot
		n.c.world.mu.Unlock()
		if on && n.life == nil && !n.stopped {
			n.start()
		}
	})
}

// start is called under c.mu.
func (n *clusterNode) start() {
	c, m, p := n.c, n.machine, n.paths()
	c.world.mu.Lock()
	c.world.log("%s its daemon starts", n.name)
	c.world.mu.Unlock()
	d, err := newDaemon(p, slog.New(slog.NewTextHandler(n.log, nil)))
	if err == nil {
		d.replay, err = newReplayGuard(p.clock(), time.Now(), func() time.Duration { return m.clock().boot })
	}
	if err != nil {
		if d != nil {
			d.jobs.Wait()
		}
		n.log.Write(fmt.Appendf(nil, "%s not started: %v\n", c.world.at(), err))
		n.startLater(time.Second + time.Duration(n.index))
		return
	}
	l := &clusterLife{d: d, host: c.fabric.host(n.name), done: make(chan struct{})}
	d.network, d.leaseClock = l.host, m.clock
	d.watcher = &watcher{wakes: map[int32][]chan struct{}{}}
	d.logs.watcher = d.watcher
	d.listenLocal = func(string) (*net.UnixListener, error) { return nil, nil }
	d.command = func(in *instance) commandRunner {
		phase := newSource(c.conf.seed, uint64(time.Since(c.world.begun))^uint64(n.index)<<56^uint64(in.name()[0])<<48).Uint64()
		in.random = func() uint64 { return phase } // not of a source: goroutines ask in any order
		return m.runner(l, in)
	}
	d.stats = func() nodeStats { return nodeStats{} }
	d.kill, d.openGuard = m.kill, m.openGuard(l, p, d)
	source := rand.New(rand.NewPCG(c.conf.seed^uint64(n.index+1)<<32, uint64(time.Since(c.world.begun))))
	var drawing sync.Mutex
	d.random = func() uint64 {
		drawing.Lock()
		defer drawing.Unlock()
		return source.Uint64()
	}
	d.exit = func(int) { panic("a daemon did not end in time:\n" + allStacks()) }
	d.queue.run = func(context.Context, paths) error { return nil }
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel, n.life = cancel, l
	c.world.mu.Lock()
	m.paths, m.lives = p, true
	c.world.mu.Unlock()
	c.lives.Go(func() {
		_, err := d.serve(ctx)
		close(l.done)
		n.ended(l, err)
	})
}

// ended: a daemon that ends by itself is started again by its unit.
func (n *clusterNode) ended(l *clusterLife, err error) {
	if l.crashed.Load() {
		return
	}
	l.host.crash(false)
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	n.life = nil
	n.c.world.mu.Lock()
	n.machine.lives = false
	n.c.world.log("%s its daemon ended: %v", n.name, err)
	n.c.world.mu.Unlock()
	if !n.stopped {
		n.startLater(100 * time.Millisecond)
	}
}

// crash ends the daemon at once: what it still does goes nowhere. Its files
// move to another folder, so that it cannot write them any more.
func (n *clusterNode) crash() { n.crashBy(false) }

func (n *clusterNode) crashBy(machine bool) {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	l := n.life
	if l == nil && !machine {
		return
	}
	n.life = nil
	if l != nil {
		l.crashed.Store(true)
		l.host.mute()
	}
	n.crashes++
	root := filepath.Join(n.c.dir, fmt.Sprintf("%s.%d", n.name, n.crashes))
	must(n.c.tb, os.Rename(n.root, root))
	n.root = root
	p := n.paths()
	if machine { // OSVCRUN is gone, but for the keys, which are derived anew
		keys, err := os.ReadFile(p.keys())
		must(n.c.tb, errors.Join(err, os.RemoveAll(p.run), os.MkdirAll(p.run, 0o700), os.WriteFile(p.keys(), keys, 0o600)))
	}
	if n.c.forgets {
		must(n.c.tb, os.WriteFile(p.votes(), []byte("{}"), 0o600))
	}
	n.c.world.mu.Lock()
	n.machine.paths, n.machine.lives = p, false
	n.c.world.log("%s its daemon is killed", n.name)
	n.c.world.mu.Unlock()
	if l != nil {
		l.d.stop() // before what it has open is closed under it
		l.cancel()
		l.host.crash(machine)
	}
}

// machineCrash turns the machine off, for so long.
func (n *clusterNode) machineCrash(why string, back time.Duration) {
	n.c.world.mu.Lock()
	on := n.machine.on
	if on {
		n.machine.crash(why)
	}
	n.c.world.mu.Unlock()
	if on {
		n.crashBy(true)
		time.AfterFunc(back, n.boot)
	}
}

// stop ends the daemon as SIGTERM does, and returns when it has.
func (n *clusterNode) stop() {
	n.c.mu.Lock()
	n.stopped = true
	l := n.life
	n.c.mu.Unlock()
	if l != nil {
		l.cancel()
		<-l.done
	}
}

func (n *clusterNode) daemon() *daemon {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	if n.life == nil {
		return nil
	}
	return n.life.d
}

// ask executes a request on the node as its local socket would, and reads the
// reply into data.
func (n *clusterNode) ask(action string, data any, words ...string) error {
	d := n.daemon()
	if d == nil {
		return errors.New("no daemon runs")
	}
	encoded, err := encodeOptions(action, words)
	if err != nil {
		return err
	}
	r, err := parseRequest(requestJSON{Action: action, Options: encoded}, "")
	if err != nil {
		return err
	}
	answer, err := d.execute(context.Background(), r)
	if err != nil || data == nil {
		return err
	}
	text, err := json.Marshal(answer.Data)
	if err == nil {
		err = json.Unmarshal(text, data)
	}
	return err
}

// clusterStatus is what is compared of daemon_status.
type clusterStatusData struct {
	Monitor struct {
		Nodes    map[string]nodeData
		Services map[string]json.RawMessage
	}
}

// agree tells what is not as it should be once all is healed: every service
// runs once, and all nodes say the same of it.
func (c *virtualCluster) agree() (faults []string) {
	c.world.mu.Lock()
	for _, v := range c.conf.services {
		var on []string
		for _, m := range c.world.machines {
			if m.runs(v.name) {
				on = append(on, m.node)
			}
			if n := m.count(v.name); n != 0 && n != len(v.rids) {
				faults = append(faults, fmt.Sprintf("I3: %d resources of %s run on %s", n, v.name, m.node))
			}
		}
		if len(on) != 1 || !slices.Contains(v.nodes, on[0]) {
			faults = append(faults, fmt.Sprintf("I3: %s runs on %v, of %v", v.name, on, v.nodes))
		}
	}
	c.world.mu.Unlock()
	var first map[string]json.RawMessage
	for _, n := range c.nodes {
		var s clusterStatusData
		if err := n.ask("daemon_status", &s); err != nil {
			faults = append(faults, fmt.Sprintf("%s: %v", n.name, err))
			continue
		}
		for name, data := range s.Monitor.Nodes {
			if data.State != linkLinked {
				faults = append(faults, fmt.Sprintf("I4: %s says that %s is %s", n.name, name, data.State))
			}
		}
		if first == nil {
			first = s.Monitor.Services
		}
		if len(s.Monitor.Services) != len(c.conf.services) || !maps.EqualFunc(first, s.Monitor.Services, func(a, b json.RawMessage) bool { return string(a) == string(b) }) {
			faults = append(faults, fmt.Sprintf("I4: %s and %s differ:\n%s\n%s", c.nodes[0].name, n.name, mustJSON(first), mustJSON(s.Monitor.Services)))
		}
	}
	return faults
}

// settles waits until all is as it should be, for so long at most.
func (c *virtualCluster) settles(within time.Duration) {
	for end := time.Now().Add(within); ; {
		faults := c.agree()
		if len(faults) == 0 {
			return
		}
		if time.Now().After(end) {
			c.world.mu.Lock()
			c.world.violated("not within %s: %s", within, strings.Join(faults, "\n"))
			c.world.mu.Unlock()
			return
		}
		time.Sleep(250*time.Millisecond + 13*time.Nanosecond)
	}
}

// close ends all daemons; the bubble's end shows that none of their goroutines
// is left.
func (c *virtualCluster) close() {
	var stops sync.WaitGroup
	for _, n := range c.nodes {
		stops.Go(func() {
			time.Sleep(time.Duration(n.index) * time.Microsecond) // in this order
			n.stop()
		})
	}
	stops.Wait()
	c.lives.Wait()
	for _, n := range c.nodes {
		n.log.mu.Lock()
		text := n.log.text.String()
		n.log.mu.Unlock()
		for line := range strings.Lines(text) {
			if strings.Contains(line, "panic") || strings.Contains(line, "ended uncleanly") || strings.Contains(line, "failed by an error") {
				c.world.faults = append(c.world.faults, n.name+" logged: "+line)
			}
		}
	}
}

// virtually runs f with a cluster in a bubble, and returns the truth, of which
// nothing may be wrong.
func virtually(t *testing.T, conf clusterConf, f func(c *virtualCluster)) *fakeWorld {
	t.Helper()
	c := inBubble(t, conf, f)
	if len(c.world.faults) > 0 {
		trace := c.world.trace
		t.Errorf("seed %d: %s\n%s", conf.seed, strings.Join(c.world.faults, "\n"), strings.Join(trace[max(0, len(trace)-60):], "\n"))
		for _, n := range c.nodes {
			lines := strings.Split(n.log.text.String(), "\n")
			t.Logf("%s logged:\n%s", n.name, strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	}
	return c.world
}

func inBubble(t *testing.T, conf clusterConf, f func(c *virtualCluster)) (c *virtualCluster) {
	t.Helper()
	labKeys() // outside: scrypt's time is real
	bootID()
	dir, err := os.MkdirTemp(fastFolder(), "agentd-cluster")
	must(t, err)
	defer os.RemoveAll(dir)
	stuck := time.AfterFunc(3*time.Minute, func() { panic("virtual time stands still:\n" + allStacks()) })
	defer stuck.Stop()
	synctest.Test(t, func(t *testing.T) {
		c = newVirtualCluster(t, dir, conf)
		for _, n := range c.nodes {
			n.boot()
		}
		f(c)
		c.close()
	})
	return c
}

// fastFolder is where syncing costs nothing.
func fastFolder() string {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		return "/dev/shm"
	}
	return ""
}

func failoverService(name string, nodes ...string) *fakeService {
	return &fakeService{name: name, nodes: nodes, rids: []string{"app#1", "app#2"}}
}

// plainConf is a cluster with the defaults.
func plainConf(size int) clusterConf {
	return clusterConf{seed: 1, size: size, interval: 500 * time.Millisecond, timeout: 3 * time.Second, grace: 3 * time.Second}
}

// Daemons in a bubble ask each other, sealed.
func TestClusterAnswers(t *testing.T) {
	conf := plainConf(3)
	conf.services = []*fakeService{failoverService("a", "n1"), failoverService("b", "n2")}
	virtually(t, conf, func(c *virtualCluster) {
		time.Sleep(10 * time.Second)
		for _, n := range c.nodes {
			var s struct{ Nodes map[string]nodeAnswer }
			if err := n.ask("cluster_status", &s); err != nil {
				t.Error(err)
			}
			for _, other := range c.nodes {
				if got := s.Nodes[other.name]; got.Answer != answerOK {
					t.Errorf("%s asks %s: %s %s", n.name, other.name, got.Answer, got.Error)
				}
			}
		}
		c.settles(10 * time.Second)
	})
}

// A failover service moves when its node is gone, as soon as it may: when the
// grants' term is over.
func TestClusterTakesOver(t *testing.T) {
	conf := plainConf(3)
	conf.services = []*fakeService{failoverService("a", "n1", "n2", "n3"), failoverService("b", "n2", "n3", "n1")}
	virtually(t, conf, func(c *virtualCluster) {
		c.settles(20 * time.Second)
		holder := c.holder("a")
		holder.machineCrash("test", time.Minute)
		time.Sleep((conf.timeout+conf.grace)*105/100 + conf.interval + conf.grace/4)
		if now := c.holder("a"); now == nil || now == holder {
			t.Error("a was not taken over in time")
		}
		time.Sleep(time.Minute)
		c.settles(20 * time.Second)
	})
}

// holder is the node that a service runs on.
func (c *virtualCluster) holder(service string) *clusterNode {
	c.world.mu.Lock()
	defer c.world.mu.Unlock()
	for _, n := range c.nodes {
		if n.machine.runs(service) {
			return n
		}
	}
	return nil
}

// isolate cuts a node off.
func (c *virtualCluster) isolate(n *clusterNode) {
	for _, o := range c.nodes {
		c.fabric.set(n.name, o.name, func(l *fabricLink) { l.cuts++ })
		c.fabric.set(o.name, n.name, func(l *fabricLink) { l.cuts++ })
	}
}

// A checker that cannot fail is worth nothing: two copies are found where a part
// of what prevents them is missing, and not where it is there.
func TestClusterFindsTwoCopies(t *testing.T) {
	conf := plainConf(3)
	conf.services = []*fakeService{failoverService("a", "n1", "n2", "n3")}
	tests := []struct {
		name  string
		plant func(c *virtualCluster, holder *clusterNode)
		then  func(c *virtualCluster, holder *clusterNode)
	}{
		{"no guard", func(c *virtualCluster, holder *clusterNode) { holder.machine.guard.absent = true }, func(c *virtualCluster, holder *clusterNode) {
			holder.crash()
		}},
		{"a slow clock", func(c *virtualCluster, holder *clusterNode) { holder.machine.ppm = -800_000 }, func(c *virtualCluster, holder *clusterNode) {
			c.isolate(holder)
		}},
		{"a voter that forgets", func(c *virtualCluster, holder *clusterNode) { c.forgets = true }, func(c *virtualCluster, holder *clusterNode) {
			c.isolate(holder)
			for _, n := range c.nodes {
				if n != holder {
					n.crash()
					n.startLater(10 * time.Millisecond)
				}
			}
		}},
	}
	for _, test := range tests {
		for _, planted := range []bool{false, true} {
			c := inBubble(t, conf, func(c *virtualCluster) {
				c.settles(20 * time.Second)
				time.Sleep(5 * time.Second) // all voters know
				holder := c.holder("a")
				if planted {
					c.world.mu.Lock()
					test.plant(c, holder)
					c.world.mu.Unlock()
				}
				test.then(c, holder)
				time.Sleep(20 * time.Second)
			})
			if found := strings.Contains(strings.Join(c.world.faults, "\n"), "I1"); found != planted {
				t.Errorf("%s: planted %t, found %t: %q\n%s", test.name, planted, found, c.world.faults, strings.Join(c.world.trace, "\n"))
			}
		}
	}
}
