// daemon.go: the supervisor. One goroutine, serve's, owns the threads: it
// starts and stops them, restarts those that fail, and applies changes of
// node.conf. Others reach it by do, and it never waits for them.

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// agentVersion is the version of this program.
const agentVersion = "0.1.0"

// daemon is what the parts share. All but the last group is set before serve
// begins, or safe for concurrent use.
type daemon struct {
	paths      paths
	log        *slog.Logger
	id         string // random, a new one each start
	started    time.Time
	network    network
	run        runner
	notify     notifier
	config     atomic.Pointer[config] // the last good one
	keys       atomic.Pointer[keyring]
	store      *keyStore
	replay     *replayGuard
	blacklist  *blacklist
	queue      *dequeuer
	peers      *peerTrust
	heartbeats *heartbeats
	journal    *journal
	lastKnown  lastKnown
	outsiders  *logLimit // what outsiders can cause to be logged
	watcher    *watcher
	logs       *serviceLog
	streams    atomic.Int64 // that are served
	monitor    *monitorThread

	// openGuard takes over what an earlier daemon left to the guard, and tells
	// report whether one lives.
	openGuard func(report func(alive bool)) (guardian, map[string]leaseClock)
	// leaseClock reads the clocks by which leases are measured.
	leaseClock func() leaseClock
	// The rest of what is outside: a test in virtual time has its own.
	listenLocal func(path string) (*net.UnixListener, error) // may return nil: nobody asks there
	command     func(in *instance) commandRunner
	kill        func(id string) // kills what a command left (process.go)
	random      func() uint64   // for salts, seeds and phases
	stats       func() nodeStats
	exit        func(status int)
	// background has a place for each service_action that nobody waits for.
	background chan struct{}

	calls chan func()
	ended chan struct{} // closed when serve takes no more calls
	jobs  sync.WaitGroup

	configStamp string // of the node.conf of firstConfig (fileStamp)

	// Owned by serve's goroutine.
	ctx         context.Context
	stop        context.CancelFunc
	threads     []*thread
	configFault error // what is wrong with the node.conf on disk
	byRequest   bool  // the end was asked for by daemon_stop or daemon_shutdown
}

// thread is a supervised part of the daemon. run works until ctx ends, then
// returns nil; whatever else it returns is an unclean exit, after which it is
// started again. It hears of a new configuration by changed.
//
//	          start             exits uncleanly
//	stopped ─────────▶ running ─────────────────▶ stopped, with error
//	   ▲                 │                             │
//	   └──────── stop ───┘◀──── after restartDelay ────┘
type thread struct {
	id     string
	run    func(ctx context.Context, changed <-chan struct{}) error
	report func() (config, stats map[string]any)

	// Owned by serve's goroutine.
	wanted   bool // running, or soon again
	running  bool
	created  time.Time
	err      error // of the last unclean exit
	removed  bool  // from the configuration; forgotten once it has ended
	failures int   // unclean exits in a row
	cancel   context.CancelFunc
	changed  chan struct{}
	ended    chan struct{}
}

// restartDelay is the wait before the n-th restart in a row: 100 ms, doubled
// each time, up to 30 s.
func restartDelay(n int) time.Duration {
	return min(100*time.Millisecond<<min(n-1, 20), 30*time.Second)
}

// settled is how long a thread runs until its earlier failures are forgotten.
const settled = time.Minute

// stopTimeout bounds the whole end of the daemon.
const stopTimeout = 4500 * time.Millisecond

var errRunning = errors.New("agentd runs already")

// runDaemon is `agentd run`: it returns when ctx ends, or by a request, which
// byRequest tells.
func runDaemon(ctx context.Context, p paths, log *slog.Logger) (byRequest bool, err error) {
	if err := p.makeFolders(); err != nil {
		return false, err
	}
	patience, cancel := context.WithTimeout(ctx, dyingPatience) // who holds it may have been killed just now
	only, err := awaitLock(patience, p.lockFile("agentd"))
	cancel()
	if errors.Is(err, unix.EWOULDBLOCK) {
		pid, _ := os.ReadFile(p.pidFile())
		return false, fmt.Errorf("%w in %s, as process %s", errRunning, p.run, strings.TrimSpace(string(pid)))
	}
	if err != nil {
		return false, err
	}
	defer only.unlock()
	if err := writeFile(p.pidFile(), fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
		return false, err
	}
	defer os.Remove(p.pidFile())
	d, err := newDaemon(p, log)
	if err != nil {
		return false, err
	}
	return d.serve(ctx)
}

// newDaemon reads what the disk holds; it starts nothing.
func newDaemon(p paths, log *slog.Logger) (*daemon, error) {
	d := &daemon{
		paths: p, log: log, id: rand.Text(), started: time.Now(),
		network: hostNetwork{}, run: runCommand, notify: environmentNotifier(),
		blacklist: newBlacklist(time.Now), peers: newPeerTrust(time.Now), outsiders: newLogLimit(time.Now),
		calls: make(chan func()), ended: make(chan struct{}),
	}
	d.store = &keyStore{path: p.keys(), failed: func(err error) { log.Warn("derived keys are not kept", "err", err) }}
	d.queue = newDequeuer(log)
	d.ctx, d.stop = context.WithCancel(context.Background())
	var err error
	if d.replay, err = newReplayGuard(p.clock(), time.Now(), boottime); err != nil {
		return nil, err
	}
	d.replay.failed = func(err error) {
		if d.outsiders.allow() {
			log.Warn("the time of the latest request is not kept", "err", err)
		}
	}
	if ahead := time.Until(time.UnixMilli(d.replay.now())); ahead > time.Minute {
		log.Warn("requests must bear a time later than this machine's clock, since earlier ones did; if its clock is right, stop the daemon and remove the file",
			"ahead", ahead.Round(time.Second), "file", p.clock())
	}
	d.journal = openJournal(p.journal(), log)
	d.watcher = newWatcher(func(err error) {
		log.Warn("what changes in files is noticed a second later, since the machine's limits are used up; raise fs.inotify.max_user_watches and max_user_instances, and restart the daemon", "err", err)
	})
	d.logs = newServiceLog(p, func() string { return d.config.Load().node }, d.watcher, log)
	d.monitor = &monitorThread{d: d}
	d.leaseClock = readLeaseClock
	d.openGuard = func(report func(bool)) (guardian, map[string]leaseClock) { return openGuard(p, log, report) }
	d.listenLocal, d.kill, d.random, d.stats, d.exit = listenLocal, killMarked, randomNumber, readNodeStats, os.Exit
	d.command = func(in *instance) commandRunner { return in.execute }
	d.heartbeats = newHeartbeats(d)
	d.background = make(chan struct{}, actionsAtOnce)
	d.threads = []*thread{newListener(d).thread(), d.monitor.thread()}
	return d, d.firstConfig()
}

// firstConfig loads node.conf, making it if needed. A file that does not
// parse, left so by an edit, must not keep a daemon down that worked with the
// text before: that is kept for this case.
func (d *daemon) firstConfig() error {
	made, err := ensureConfig(d.paths)
	if made {
		d.log.Info("a new secret was made", "file", d.paths.nodeConf())
	}
	d.configStamp = fileStamp(d.paths.nodeConf())
	var c *config
	if err == nil {
		c, err = loadConfig(d.paths)
	}
	if err != nil {
		good, _, readErr := readRegular(d.paths.goodConf(), iniSizeLimit)
		if readErr != nil {
			return err
		}
		last, parseErr := parseConfig("node.conf.good", string(good))
		if parseErr != nil || last.text("cluster.secret") == "" {
			return err
		}
		d.log.Error("node.conf is not used; the last good one is in force", "err", err)
		c, d.configFault = last, err
	} else {
		d.keepGood(c)
	}
	d.adopt(c)
	return nil
}

func (d *daemon) watchFiles() {
	if err := d.watcher.run(d.ctx); err != nil {
		d.log.Error("changes of files are not noticed any more", "err", err)
	}
}

// keepGood stores the text of c for a start with a broken node.conf.
func (d *daemon) keepGood(c *config) {
	if err := writeFile(d.paths.goodConf(), []byte(c.doc.String()), 0o600); err != nil {
		d.log.Warn("the last good node.conf is not kept", "err", err)
	}
}

// serve runs the daemon until ctx ends or d.stop is called.
func (d *daemon) serve(ctx context.Context) (byRequest bool, err error) {
	defer context.AfterFunc(ctx, d.stop)()
	local, err := d.listenLocal(d.paths.socket())
	if err != nil {
		return false, err
	}
	if local != nil {
		d.jobs.Go(func() { d.serveLocal(d.ctx, local) })
	}
	d.jobs.Go(d.watchFiles)
	d.jobs.Go(func() { d.heartbeats.log(d.ctx.Done()) })
	d.jobs.Go(func() { d.watchConfig(d.ctx) })
	d.jobs.Go(func() { d.queue.work(d.ctx, d.paths) })
	d.jobs.Go(func() { d.nodeStatus(d.ctx) }) // so that the journal knows the version of before an upgrade
	for _, t := range d.threads {
		d.startThread(t)
	}
	d.tell("READY=1")
	d.log.Info("started", "node", d.config.Load().node, "pid", os.Getpid(), "version", agentVersion)

	d.loop()

	d.tell("STOPPING=1")
	late := time.AfterFunc(stopTimeout, func() {
		d.log.Error("the daemon did not end in time and is ended")
		if d.byRequest {
			d.exit(exitStopped)
		}
		d.exit(exitFailed)
	})
	defer late.Stop()
	for slices.ContainsFunc(d.threads, func(t *thread) bool { return t.running }) {
		(<-d.calls)()
	}
	close(d.ended)
	d.jobs.Wait()
	if err := d.replay.persist(); err != nil {
		d.log.Warn("the time of the latest request is not kept", "err", err)
	}
	d.log.Info("stopped")
	return d.byRequest, nil
}

// loop takes calls until the daemon is to end. The watchdog is fed here and
// nowhere else: a supervisor that hangs is a daemon that hangs.
func (d *daemon) loop() {
	var alive <-chan time.Time
	if d.notify.watchdog > 0 {
		ticker := time.NewTicker(d.notify.watchdog)
		defer ticker.Stop()
		alive = ticker.C
	}
	for {
		select {
		case call := <-d.calls:
			call()
		case <-alive:
			d.tell("WATCHDOG=1")
		case <-d.ctx.Done():
			return
		}
	}
}

func (d *daemon) tell(state string) {
	if err := d.notify.send(state); err != nil {
		d.log.Warn("the service manager does not listen", "err", err)
	}
}

// do runs f on serve's goroutine and waits for it; false when the daemon has
// ended and f did not run.
func (d *daemon) do(f func()) bool {
	done := make(chan struct{})
	select {
	case d.calls <- func() { defer close(done); f() }:
		<-done
		return true
	case <-d.ended:
		return false
	}
}

// startThread is called on serve's goroutine.
func (d *daemon) startThread(t *thread) {
	t.wanted = true
	if t.running || d.ctx.Err() != nil {
		return
	}
	ctx, cancel := context.WithCancel(d.ctx)
	t.running, t.created, t.cancel = true, time.Now(), cancel
	t.changed, t.ended = make(chan struct{}, 1), make(chan struct{})
	changed := t.changed
	d.log.Info("thread started", "thread", t.id)
	d.jobs.Go(func() {
		err := guarded(func() error { return t.run(ctx, changed) })
		asked := ctx.Err() != nil
		cancel()
		d.do(func() { d.threadEnded(t, err, asked) })
	})
}

// threadEnded is called on serve's goroutine.
func (d *daemon) threadEnded(t *thread, err error, asked bool) {
	t.running = false
	close(t.ended)
	if asked {
		t.err, t.failures = err, 0
		d.log.Info("thread stopped", "thread", t.id)
		if t.removed {
			d.forgetThread(t)
		} else if t.wanted { // started again while it stopped
			d.startThread(t)
		}
		return
	}
	if err == nil {
		err = errors.New("ended without being asked to")
	}
	if time.Since(t.created) >= settled {
		t.failures = 0
	}
	t.failures++
	t.err = err
	delay := restartDelay(t.failures)
	d.log.Error("thread ended uncleanly and is started again", "thread", t.id, "err", err, "delay", delay)
	failures := t.failures
	time.AfterFunc(delay, func() {
		d.do(func() {
			if t.wanted && t.failures == failures {
				d.startThread(t)
			}
		})
	})
}

// guarded turns a panic of f into an error with its stack.
func guarded(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
		}
	}()
	return f()
}

// threadStart starts the thread named id; one that runs goes on.
func (d *daemon) threadStart(id string) error {
	return d.onThread(id, func(t *thread) {
		t.failures = 0
		d.startThread(t)
	})
}

// threadStop stops the thread named id and returns when it has ended, or ctx.
func (d *daemon) threadStop(ctx context.Context, id string) error {
	ended := closedChannel
	err := d.onThread(id, func(t *thread) {
		t.wanted, t.failures, t.err = false, 0, nil
		if t.running {
			ended = t.ended
			t.cancel()
		}
	})
	select {
	case <-ended:
	case <-ctx.Done(): // this request comes through the thread that it stops
	}
	return err
}

var closedChannel = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

func (d *daemon) onThread(id string, f func(*thread)) error {
	err := errStopping
	d.do(func() {
		i := slices.IndexFunc(d.threads, func(t *thread) bool { return t.id == id })
		if i < 0 {
			var known []string
			for _, t := range d.threads {
				known = append(known, t.id)
			}
			err = fmt.Errorf("unknown thread %q; there are: %s", id, strings.Join(known, ", "))
			return
		}
		err = nil
		f(d.threads[i])
	})
	return err
}

var errStopping = errors.New("the daemon is stopping")

// adopt makes c the configuration in force.
func (d *daemon) adopt(c *config) {
	for _, warning := range c.warnings {
		d.log.Warn("odd configuration", "at", warning)
	}
	old := d.config.Swap(c)
	ring := d.keys.Load()
	secrets, cluster := c.secrets(), c.text("cluster.name")
	if ring == nil || ring.cluster != cluster || !slices.Equal(ring.secrets, secrets) {
		ring = newKeyring(d.store, cluster, secrets)
		d.keys.Store(ring)
		d.jobs.Go(func() {
			if ring.derive(d.store); ring.err != nil {
				d.log.Error("sealed requests cannot be opened", "err", ring.err)
			}
		})
		d.blacklist.clear(everySender)
		d.peers.retain(func(string) bool { return false })
	}
	d.peers.retain(c.isMember)
	if old != nil {
		d.blacklist.clear(func(s sender) bool { return s.node != "" && old.isMember(s.node) != c.isMember(s.node) })
	}
	d.heartbeats.adopt(c)
	d.matchThreads(old != nil)
	for _, t := range d.threads {
		select {
		case t.changed <- struct{}{}:
		default: // not running, or told already
		}
	}
}

// matchThreads makes the threads of heartbeats those that are configured.
func (d *daemon) matchThreads(serving bool) {
	wanted := d.heartbeats.threads()
	for _, t := range slices.Clone(d.threads) {
		if !strings.HasPrefix(t.id, "hb#") || slices.Contains(wanted, t) {
			continue
		}
		t.wanted, t.removed = false, true
		if t.running {
			t.cancel()
		} else {
			d.forgetThread(t)
		}
	}
	for _, t := range wanted {
		known := slices.Contains(d.threads, t)
		if !known {
			d.threads = append(d.threads, t)
		}
		if serving && (!known || t.removed) {
			d.startThread(t)
		}
		t.removed = false
	}
}

func (d *daemon) forgetThread(t *thread) {
	d.threads = slices.DeleteFunc(d.threads, func(other *thread) bool { return other == t })
}

// watchConfig takes up changes of node.conf by its timestamp.
func (d *daemon) watchConfig(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	last := d.configStamp
	for {
		if now := fileStamp(d.paths.nodeConf()); now != last {
			c, err := loadConfig(d.paths)
			if err == nil && c.text("cluster.secret") == "" {
				err = errors.New("node.conf: cluster.secret is missing; put it back")
			}
			d.do(func() { d.reload(c, err) })
			last = now
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// reload is called on serve's goroutine.
func (d *daemon) reload(c *config, err error) {
	if err != nil {
		d.log.Error("node.conf is not used; the last good one is in force", "err", err)
		d.configFault = err
		return
	}
	d.configFault = nil
	if current := d.config.Load(); current.doc.String() == c.doc.String() && current.doc.name == c.doc.name {
		return
	}
	d.keepGood(c)
	d.adopt(c)
	d.log.Info("configuration applied", "node", c.node)
}

// fileStamp tells a file's state apart from its earlier ones.
func fileStamp(path string) string {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err.Error()
	}
	return fmt.Sprint(st.Mtim.Nano(), st.Size, st.Ino)
}

// logLimit lets some pass in each span of time: of lines in a log, so that an
// outsider cannot fill the disk, ten a minute.
type logLimit struct {
	now  func() time.Time
	most int
	per  time.Duration

	mu    sync.Mutex
	since time.Time
	lines int
}

func newLogLimit(now func() time.Time) *logLimit {
	return &logLimit{now: now, most: 10, per: time.Minute}
}

func (l *logLimit) allow() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := l.now(); now.Sub(l.since) >= l.per {
		l.since, l.lines = now, 0
	}
	l.lines++
	return l.lines <= l.most
}
