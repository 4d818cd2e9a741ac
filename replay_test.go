package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const testSkew = time.Minute

// guardWorld is a machine with its clocks, and a guard that can crash on it.
type guardWorld struct {
	t     *testing.T
	path  string
	wall  time.Time
	boot  time.Duration
	guard *replayGuard
}

func newGuardWorld(t *testing.T) *guardWorld {
	t.Helper()
	w := &guardWorld{t: t, path: filepath.Join(memoryFolder(t), "clock"), wall: time.UnixMilli(1_600_000_000_000), boot: time.Hour}
	w.start()
	return w
}

// start is a start of the daemon. Without a persist before it, it is one after
// a crash.
func (w *guardWorld) start() {
	w.t.Helper()
	guard, err := newReplayGuard(w.path, w.wall, func() time.Duration { return w.boot })
	if err != nil {
		w.t.Fatal(err)
	}
	guard.failed = func(err error) { w.t.Errorf("a bound is not stored: %v", err) }
	w.guard = guard
}

func (w *guardWorld) pass(d time.Duration) {
	w.boot += d
	w.wall = w.wall.Add(d)
}

// sealedMessage is what accept sees of a message.
type sealedMessage struct {
	s salt
	t int64
}

// message is a new one, sealed off beside the window clock.
func (w *guardWorld) message(off time.Duration) sealedMessage {
	m := sealedMessage{t: w.guard.now() + off.Milliseconds()}
	for i := range m.s {
		m.s[i] = byte(rand.Uint32())
	}
	return m
}

func (w *guardWorld) accept(m sealedMessage) error { return w.guard.accept(m.s, m.t, testSkew) }

func (w *guardWorld) mustAccept(m sealedMessage) {
	w.t.Helper()
	if err := w.accept(m); err != nil {
		w.t.Fatalf("a good message is refused: %v", err)
	}
}

// mustRefuse: refused, and, if for its time, so that a client understands it.
func (w *guardWorld) mustRefuse(m sealedMessage, clock bool) {
	w.t.Helper()
	err := w.accept(m)
	if err == nil {
		w.t.Error("accepted")
		return
	}
	if got := strings.HasPrefix(err.Error(), "clock: "); got != clock {
		w.t.Errorf("error = %q; begins with clock: %v, want %v", err, got, clock)
	}
}

func TestReplayWindow(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		off  time.Duration // of the message's time from the window clock
		ok   bool
	}{
		{"now", 0, true},
		{"as old as may be", -testSkew, true},
		{"older", -testSkew - time.Millisecond, false},
		{"as far ahead as may be", testSkew, true},
		{"further ahead", testSkew + time.Millisecond, false},
		{"a year old", -365 * 24 * time.Hour, false},
		{"a year ahead", 365 * 24 * time.Hour, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newGuardWorld(t)
			w.pass(2 * testSkew) // so that the start bounds nothing
			m := w.message(test.off)
			if test.ok {
				w.mustAccept(m)
				return
			}
			w.mustRefuse(m, true)
			// Who is refused is told in which direction to set his clock.
			if err, want := w.accept(m), map[bool]string{false: "behind", true: "ahead"}[test.off > 0]; !strings.Contains(err.Error(), want) {
				t.Errorf("error = %v, want %q in it", err, want)
			}
		})
	}
	// Times that no clock shows must not overflow into the window.
	w := newGuardWorld(t)
	for _, at := range []int64{0, -1, -1 << 63, 1<<63 - 1} {
		w.mustRefuse(sealedMessage{t: at}, true)
	}
}

// What was sealed before the start may have been accepted before it.
func TestReplayFloorIsTheStart(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	w.mustRefuse(w.message(-time.Millisecond), true)
	w.mustAccept(w.message(0))
	w.pass(testSkew / 2)
	w.mustRefuse(w.message(-testSkew/2-time.Millisecond), true)
	w.mustAccept(w.message(-testSkew / 2))
}

func TestReplayAcceptsASaltOnce(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	ahead, present := w.message(testSkew), w.message(0)
	other := sealedMessage{salt{1}, present.t}
	for _, m := range []sealedMessage{ahead, present, other} {
		w.mustAccept(m)
	}
	// As long as the window is open for it, its salt is known; then the window
	// is shut. There is no moment between.
	for range 2*int(testSkew/time.Second) + 30 {
		for _, m := range []sealedMessage{ahead, present, other} {
			w.mustRefuse(m, m.t < w.guard.now()-testSkew.Milliseconds())
		}
		w.pass(time.Second)
	}
}

func TestReplayForgetsWhatIsOutsideTheWindow(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	for range 1000 {
		w.mustAccept(w.message(0))
		w.pass(100 * time.Millisecond)
	}
	w.pass(2 * testSkew)
	w.mustAccept(w.message(0))
	if w.guard.held != 1 || len(w.guard.seen) != 1 {
		t.Errorf("%d salts in %d parts are held, want the last one only", w.guard.held, len(w.guard.seen))
	}
}

// A full table refuses: to forget a salt would open the way for its message.
func TestReplayFullTableRefuses(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	first := w.message(0)
	w.mustAccept(first)
	w.guard.held = saltsKept // stands for as many salts
	w.mustRefuse(w.message(0), false)
	w.mustRefuse(first, false)
	if w.guard.held != saltsKept {
		t.Errorf("a refused message is held: %d", w.guard.held)
	}
	// With the window, room comes back.
	w.pass(testSkew + saltBucket*time.Millisecond)
	w.mustAccept(w.message(0))
	// A table that is really filled agrees with its count.
	if saltsKept > 1<<17 {
		t.Errorf("%d salts are more than the 5 MB that the table is meant to take", saltsKept)
	}
}

// Across a restart nothing is accepted that was accepted before it.
func TestReplayAcrossRestart(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		offs    []time.Duration // of messages, beside the window clock
		restart func(w *guardWorld)
	}{
		{"crash", []time.Duration{0}, func(w *guardWorld) { w.pass(100 * time.Millisecond) }},
		{"crash, sender ahead", []time.Duration{testSkew, testSkew / 2, time.Second}, func(w *guardWorld) { w.pass(100 * time.Millisecond) }},
		{"crash, senders ahead one after another", []time.Duration{time.Second, 1500 * time.Millisecond, 2 * time.Second, 2100 * time.Millisecond}, func(w *guardWorld) { w.pass(time.Millisecond) }},
		{"reboot", []time.Duration{0, testSkew}, func(w *guardWorld) {
			w.pass(20 * time.Second)
			w.boot = 0
		}},
		{"clean end, wall clock stepped back", []time.Duration{0, testSkew}, func(w *guardWorld) {
			if err := w.guard.persist(); err != nil {
				w.t.Fatal(err)
			}
			w.wall = w.wall.Add(-time.Hour)
		}},
		{"clean end, sender ahead", []time.Duration{0, testSkew}, func(w *guardWorld) {
			w.pass(time.Second)
			if err := w.guard.persist(); err != nil {
				w.t.Fatal(err)
			}
		}},
		{"crash, wall clock stepped back", []time.Duration{0}, func(w *guardWorld) { w.wall = w.wall.Add(-10 * time.Second) }},
		{"wall clock stepped forward meanwhile", []time.Duration{0, testSkew}, func(w *guardWorld) { w.wall = w.wall.Add(30 * time.Second) }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newGuardWorld(t)
			w.pass(2 * testSkew)
			checkRestart(w, test.offs, test.restart)
		})
	}
}

// checkRestart: after the restart, no message of before is accepted, at no
// time; a new one is.
func checkRestart(w *guardWorld, offs []time.Duration, restart func(w *guardWorld)) {
	w.t.Helper()
	var sent []sealedMessage
	for _, off := range offs {
		m := w.message(off)
		w.mustAccept(m)
		sent = append(sent, m)
	}
	restart(w)
	w.start()
	w.pass(10 * time.Millisecond)
	w.mustAccept(w.message(0))
	for range 3 * int(testSkew/time.Second) {
		for i, m := range sent {
			if w.accept(m) == nil {
				w.t.Fatalf("the message sent %s beside the clock is accepted again after the restart", offs[i])
			}
		}
		w.pass(time.Second)
	}
}

// No clock is wrong here but a sender's, within the skew. Its message moves
// the stored bound ahead; after a restart the window clock begins there, ahead
// of the wall clock. After another crash the wall clock does not cover what was
// accepted at the window's present time: its bound must have been stored too.
func TestReplayCrashWhileWindowIsAheadOfWall(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	w.mustAccept(w.message(testSkew - 2*time.Second))
	w.pass(100 * time.Millisecond)
	w.start()
	w.pass(900 * time.Millisecond)
	checkRestart(w, []time.Duration{0}, func(w *guardWorld) { w.pass(50 * time.Millisecond) })
}

// Anything may happen to the machine, in any order; whatever a guard has
// accepted once, none accepts again.
func TestReplayNothingTwiceWhateverHappens(t *testing.T) {
	t.Parallel()
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(seed, 1))
			w := newGuardWorld(t)
			var accepted []sealedMessage
			story := []string{}
			for range 60 {
				what := random.IntN(10)
				story = append(story, fmt.Sprint(what))
				switch what {
				case 0:
					w.start()
				case 1:
					w.boot = 0
					w.start()
				case 2:
					w.wall = w.wall.Add(time.Duration(random.Int64N(int64(2*testSkew))) - testSkew)
				case 3:
					if err := w.guard.persist(); err != nil {
						t.Fatal(err)
					}
				case 4, 5:
					w.pass(time.Duration(random.Int64N(int64(time.Second))))
				case 6:
					w.pass(time.Duration(random.Int64N(int64(testSkew))))
				default:
					m := w.message(time.Duration(random.Int64N(int64(2*testSkew))) - testSkew)
					if random.IntN(2) == 0 {
						m = w.message(0)
					}
					if w.accept(m) == nil {
						accepted = append(accepted, m)
					}
				}
				for _, m := range accepted {
					if w.accept(m) == nil {
						t.Fatalf("accepted again, %d ms beside the clock; the story is %s", m.t-w.guard.now(), strings.Join(story, " "))
					}
				}
			}
			if len(accepted) < 5 {
				t.Errorf("only %d messages were accepted: this test tries nothing", len(accepted))
			}
		})
	}
}

// If the bound of a time ahead cannot be stored first, the message is refused,
// as one for its time: its sender tries again with this node's. That is taken,
// so that a node with a full disk can still be asked, and the failure is told.
func TestReplayWithoutADisk(t *testing.T) {
	t.Parallel()
	for name, breakDisk := range map[string]func(w *guardWorld){
		"the folder is gone": func(w *guardWorld) {
			if err := os.RemoveAll(filepath.Dir(w.path)); err != nil {
				t.Fatal(err)
			}
		},
		"a write hangs": func(w *guardWorld) { w.guard.writing <- struct{}{} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newGuardWorld(t)
			heard := 0
			w.guard.failed = func(error) { heard++ }
			breakDisk(w)
			w.mustRefuse(w.message(testSkew/2), true)
			if w.guard.held != 0 {
				t.Error("the refused message is held, as if it had been accepted")
			}
			present := w.message(0)
			w.mustAccept(present)
			w.mustRefuse(present, false)
			if heard != 1 {
				t.Errorf("failed heard %d times of one message that was taken without its bound", heard)
			}
		})
	}
}

// Messages of many senders are decided on at once; the race detector watches.
func TestReplayConcurrently(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	messages := make([]sealedMessage, 50)
	for i := range messages {
		messages[i] = w.message(time.Duration(i) * 100 * time.Millisecond)
	}
	var accepted atomic.Int64
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for _, m := range messages {
				if w.accept(m) == nil {
					accepted.Add(1)
				}
			}
		})
	}
	all.Wait()
	if got := accepted.Load(); got != int64(len(messages)) {
		t.Errorf("%d messages were accepted of %d that came four times each", got, len(messages))
	}
}

// A second of requests costs one write, not each request.
func TestReplayStoresAheadOnceASecond(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	for _, ahead := range []time.Duration{0, 10 * time.Second} {
		w.mustAccept(w.message(ahead))
		before := fileStamp(w.path)
		for range 10 {
			w.mustAccept(w.message(ahead))
			w.pass(100 * time.Millisecond)
		}
		if fileStamp(w.path) != before {
			t.Errorf("%s ahead: the bound was stored again within a second", ahead)
		}
	}
}

// A clean end lowers the bound, so that after it nobody has to wait, or to
// correct his clock.
func TestReplayCleanEndAsksNobodyToWait(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	w.mustAccept(w.message(0))
	w.pass(10 * time.Millisecond)
	if err := w.guard.persist(); err != nil {
		t.Fatal(err)
	}
	w.start()
	if got, want := w.guard.now(), w.wall.UnixMilli(); got != want {
		t.Errorf("after a clean restart the window clock is %d ms ahead", got-want)
	}
	w.mustAccept(w.message(0))
}

// Times that were outside of a smaller window were forgotten, and stay out.
func TestReplayRaisedSkewReopensNothing(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	const small = 10 * time.Second
	old := w.message(0)
	if err := w.guard.accept(old.s, old.t, small); err != nil {
		t.Fatal(err)
	}
	w.pass(2*small + saltBucket*time.Millisecond)
	late := w.message(0)
	if err := w.guard.accept(late.s, late.t, small); err != nil {
		t.Fatal(err)
	}
	if err := w.guard.accept(old.s, old.t, time.Hour); err == nil || !strings.HasPrefix(err.Error(), "clock: ") {
		t.Errorf("after the skew was raised: %v", err)
	}
	if err := w.guard.accept(late.s, late.t, time.Hour); err == nil || strings.HasPrefix(err.Error(), "clock: ") {
		t.Errorf("a salt that is still known: %v", err)
	}
}

// The window clock goes on by the time since boot, not by the wall clock.
func TestReplayClockIsNeverStepped(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	begin := w.guard.now()
	if begin != w.wall.UnixMilli() {
		t.Errorf("the window clock begins at %d, want the wall clock's %d", begin, w.wall.UnixMilli())
	}
	w.wall = w.wall.Add(-time.Hour)
	w.boot += time.Second
	if got := w.guard.now() - begin; got != 1000 {
		t.Errorf("the window clock went on by %d ms in a second", got)
	}
	// And it begins at the latest time ever accepted, if that is later.
	w.mustAccept(w.message(0))
	if err := w.guard.persist(); err != nil {
		t.Fatal(err)
	}
	w.start()
	if got := w.guard.now(); got < begin+1000 {
		t.Errorf("after a restart the window clock is %d ms back", begin+1000-got)
	}
}

func TestReplayStoredBound(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "clock")
	wall := time.UnixMilli(1_600_000_000_000)
	for _, text := range []string{"", "x", "1600000000000 1", "1e12", strings.Repeat("1", 100)} {
		writeText(t, path, text)
		// To guess would open the window for what was accepted before.
		if _, err := newReplayGuard(path, wall, boottime); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("a stored time of %q: error = %v; want one that names the file", text, err)
		}
	}
	writeText(t, path, "1600000005000\n")
	boot := time.Hour
	g, err := newReplayGuard(path, wall, func() time.Duration { return boot })
	if err != nil {
		t.Fatal(err)
	}
	if ahead := g.now() - 1_600_000_005_000; ahead != 0 && ahead != 1 {
		t.Errorf("the window clock begins %d ms beside what was stored", ahead)
	}
	var clock clockError
	if err := g.accept(salt{}, wall.UnixMilli(), time.Hour); !errors.As(err, &clock) {
		t.Errorf("a message from before what was stored: %v", err)
	}
	boot += time.Minute
	checkPersistFails(t, g)
}

// checkPersistFails: an error of writing is told, and tried again.
func checkPersistFails(t *testing.T, g *replayGuard) {
	t.Helper()
	if err := g.accept(salt{1}, g.now(), testSkew); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Dir(g.path)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if g.persist() == nil {
			t.Error("persist says nothing of a folder that is gone")
		}
	}
}
