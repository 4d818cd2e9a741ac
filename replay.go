// replay.go: the replay guard (design.md §4): a sealed request is executed
// once. A clock that is never stepped bounds the window of acceptable times;
// within the window, the salts that were seen are remembered; across a
// restart, nothing is accepted that could have been accepted before it.

package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A salt is random, so half of it is as good as all of it.
type saltKey [saltSize / 2]byte

// replayGuard accepts each salt once. Times are Unix milliseconds on the
// window clock, which starts at the later of the wall clock and the latest
// time ever accepted, and then follows CLOCK_BOOTTIME.
//
// Across a crash, even one with a step of the wall clock, nothing is accepted
// again, since a time is accepted only when a bound not below it is on disk.
// Should the disk hang or be full, times up to the window clock are accepted
// all the same, so that a node in this state can still be asked: then only the
// wall clock of the restart stands against a replay.
type replayGuard struct {
	path     string
	boottime func() time.Duration
	failed   func(error)   // hears of a bound that is not stored; may be nil
	writing  chan struct{} // held while the file is written

	mu     sync.Mutex
	offset int64 // window clock less boottime
	floor  int64 // nothing before it is accepted; never decreases
	latest int64 // the latest time accepted
	stored int64 // what the file says
	seen   map[int64]map[saltKey]struct{}
	held   int // salts in seen
}

// boottime is the time since the machine started, suspension included.
func boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // a clock that each kernel since 2.6.39 has
	}
	return time.Duration(ts.Nano())
}

// newReplayGuard starts the window clock. A stored bound that does not read
// is an error: guessing would open the window for old requests.
func newReplayGuard(path string, wall time.Time, boottime func() time.Duration) (*replayGuard, error) {
	g := &replayGuard{path: path, boottime: boottime, writing: make(chan struct{}, 1), seen: map[int64]map[saltKey]struct{}{}}
	data, _, err := readRegular(path, 64)
	if err == nil {
		g.stored, err = strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot read the time of the latest request: %w; once all clocks are right, remove %s", err, path)
	}
	start := max(wall.UnixMilli(), g.stored+1)
	g.offset = start - boottime().Milliseconds()
	g.floor, g.latest = start, g.stored
	return g, nil
}

// now is the window clock.
func (g *replayGuard) now() int64 {
	return g.offset + g.boottime().Milliseconds()
}

// clockError refuses a message for its time. Its text begins with `clock:`,
// by which a client knows that it can correct itself and try again.
type clockError string

func (e clockError) Error() string { return "clock: " + string(e) }

// accept decides on a message that opened: sealed at t under s.
func (g *replayGuard) accept(s salt, t int64, skew time.Duration) error {
	now, covered, err := g.remember(s, t, skew)
	if err != nil || covered {
		return err
	}
	err = g.store(func() int64 { return max(t, g.now()) + storeAhead }, t)
	switch {
	case err == nil:
	case t > now:
		g.disown(s, t)
		return clockError(fmt.Sprintf("the message is %s ahead, and its time cannot be kept: %v; send it again with this node's time", apart(t-now), err))
	case g.failed != nil:
		g.failed(err)
	}
	return nil
}

// remember checks the time and the salt, and tells whether the stored bound
// covers the time.
func (g *replayGuard) remember(s salt, t int64, skew time.Duration) (now int64, covered bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now = g.now()
	g.forget(now - skew.Milliseconds())
	switch {
	case t > now+skew.Milliseconds():
		return now, false, clockError(fmt.Sprintf("the message is %s ahead of this node, more than listener.max_clock_skew (%s); set the clocks", apart(t-now), skew))
	case t < now-skew.Milliseconds():
		return now, false, clockError(fmt.Sprintf("the message is %s behind this node, more than listener.max_clock_skew (%s); set the clocks", apart(now-t), skew))
	case t < g.floor:
		return now, false, clockError("the message is from before this daemon's start; send it again with the present time")
	}
	bucket, key := t/saltBucket, saltKey(s[:])
	if _, twice := g.seen[bucket][key]; twice {
		return now, false, errors.New("this message was received before; seal each request anew")
	}
	if g.held >= saltsKept {
		return now, false, fmt.Errorf("%d requests within %s are more than this node remembers; send fewer, or lower listener.max_clock_skew", g.held, 2*skew)
	}
	if g.seen[bucket] == nil {
		g.seen[bucket] = map[saltKey]struct{}{}
	}
	g.seen[bucket][key] = struct{}{}
	g.held++
	g.latest = max(g.latest, t)
	return now, t <= g.stored, nil
}

// disown takes back what remember did for a message that is refused after all.
func (g *replayGuard) disown(s salt, t int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if salts := g.seen[t/saltBucket]; salts != nil {
		delete(salts, saltKey(s[:]))
		g.held--
	}
}

// forget drops the salts of times before oldest, and refuses those times from
// then on, even if the permitted skew grows later.
func (g *replayGuard) forget(oldest int64) {
	g.floor = max(g.floor, oldest)
	for bucket, salts := range g.seen {
		if (bucket+1)*saltBucket <= g.floor {
			g.held -= len(salts)
			delete(g.seen, bucket)
		}
	}
}

// persist lowers the bound to the latest time accepted, at a clean end: so
// the next start asks nobody to wait.
func (g *replayGuard) persist() error {
	g.mu.Lock()
	exact := g.latest == g.stored
	g.mu.Unlock()
	if exact {
		return nil
	}
	return g.store(func() int64 { return g.latest }, math.MaxInt64)
}

// store writes a new bound, unless wanted is covered meanwhile. It does not
// wait for a disk that hangs; the write goes on by itself.
func (g *replayGuard) store(bound func() int64, wanted int64) error {
	patience := time.NewTimer(storePatience)
	defer patience.Stop()
	select {
	case g.writing <- struct{}{}:
	case <-patience.C:
		return errSlowDisk
	}
	written := make(chan error, 1)
	go func() {
		defer func() { <-g.writing }()
		g.mu.Lock()
		covered, t := wanted <= g.stored, bound()
		g.mu.Unlock()
		if covered {
			written <- nil
			return
		}
		err := writeFile(g.path, []byte(strconv.FormatInt(t, 10)+"\n"), 0o600)
		if err == nil {
			g.mu.Lock()
			g.stored = t
			g.mu.Unlock()
		}
		written <- err
	}()
	select {
	case err := <-written:
		return err
	case <-patience.C:
		return errSlowDisk
	}
}

var errSlowDisk = fmt.Errorf("the disk did not store the time of a request within %s", storePatience)

// apart writes a difference of times for people.
func apart(ms int64) time.Duration {
	return time.Duration(ms) * time.Millisecond
}
