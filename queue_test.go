package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var queueNow = time.Date(2020, 7, 1, 10, 0, 0, 0, time.UTC)

// useFakeCommands puts nodemgr and svcmgr on the path, which the queue looks
// for. Nothing runs them: the tests give dequeue a runner of their own.
func useFakeCommands(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"nodemgr", "svcmgr"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/false\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
}

// commandLog is a runner that writes down what it is asked to run.
type commandLog struct {
	mu   sync.Mutex
	ran  []string
	exit int
	err  error
	says string
}

func (l *commandLog) run(_ context.Context, argv []string, stdout, stderr io.Writer) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ran = append(l.ran, strings.Join(append([]string{filepath.Base(argv[0])}, argv[1:]...), " "))
	io.WriteString(stdout, l.says)
	return l.exit, l.err
}

func mustQueue(t *testing.T, p paths, now time.Time, words ...string) string {
	t.Helper()
	id, err := queueAdd(p, append([]string{"nodemgr"}, words...), now)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func mustDequeue(t *testing.T, p paths, run runner) int {
	t.Helper()
	ran, err := dequeue(t.Context(), p, run)
	if err != nil {
		t.Fatal(err)
	}
	return ran
}

// queued lists the items as "command: state".
func queued(t *testing.T, p paths) (all []string) {
	t.Helper()
	items, err := queueList(p)
	if err != nil {
		t.Fatal(err)
	}
	for _, item := range items {
		all = append(all, strings.Join(item.Command, " ")+": "+item.State)
	}
	return all
}

// Not parallel, like all that dequeue here: the path is the process's.
func TestQueueRunsInOrderEachOnce(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	// The clock stands still, then is stepped back: the order is that in which
	// the items were added.
	for i, at := range []time.Duration{0, 0, time.Second, -time.Hour, -2 * time.Hour, 0} {
		mustQueue(t, p, queueNow.Add(at), fmt.Sprint("item", i))
	}
	var log commandLog
	want := []string{"nodemgr item0", "nodemgr item1", "nodemgr item2", "nodemgr item3", "nodemgr item4", "nodemgr item5"}
	if ran := mustDequeue(t, p, log.run); ran != 6 || !slices.Equal(log.ran, want) {
		t.Errorf("%d items ran: %q, want %q", ran, log.ran, want)
	}
	if ran := mustDequeue(t, p, log.run); ran != 0 || len(log.ran) != 6 {
		t.Errorf("dequeued again, %d items ran", ran)
	}
	// The results are the newest there is; what is added now, with the clock
	// still behind, comes after them too.
	mustQueue(t, p, queueNow.Add(-time.Hour), "later")
	if got := queued(t, p); len(got) != 7 || got[6] != "nodemgr later: queued" {
		t.Errorf("the queue is %q", got)
	}
}

func TestQueueKeepsResults(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	begun := time.Now()
	for _, test := range []struct {
		log   *commandLog
		state string
		exit  int // -1: none
	}{
		{&commandLog{says: "fine\n"}, "done", 0},
		{&commandLog{says: "no\n", exit: 7}, "done", 7},
		{&commandLog{says: "half", exit: -1, err: errors.New("was ended by a signal")}, "failed to run", -1},
	} {
		id := mustQueue(t, p, queueNow, "x")
		mustDequeue(t, p, test.log.run)
		items, err := queueList(p)
		if err != nil {
			t.Fatal(err)
		}
		item := items[len(items)-1]
		if item.ID != id || item.State != test.state || item.Output != test.log.says || item.Started.Before(begun) || item.Ended.Before(item.Started) || !item.Queued.Before(begun) {
			t.Errorf("the result is %+v, want %s", item, test.state)
		}
		if test.exit < 0 && (item.Exit != nil || !strings.Contains(item.Error, "signal")) || test.exit >= 0 && (item.Exit == nil || *item.Exit != test.exit) {
			t.Errorf("exit = %v, error %q; want %d", item.Exit, item.Error, test.exit)
		}
	}
}

// An item adds another while it runs: that one runs too, after all the rest.
func TestQueueRunsWhatItemsAdd(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	mustQueue(t, p, queueNow, "first")
	mustQueue(t, p, queueNow, "second")
	var log commandLog
	run := func(ctx context.Context, argv []string, stdout, stderr io.Writer) (int, error) {
		if argv[1] == "first" {
			mustQueue(t, p, queueNow, "third")
		}
		return log.run(ctx, argv, stdout, stderr)
	}
	if mustDequeue(t, p, run); !slices.Equal(log.ran, []string{"nodemgr first", "nodemgr second", "nodemgr third"}) {
		t.Errorf("ran %q", log.ran)
	}
}

func TestQueueTwoDequeuesRunEachOnce(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	for i := range 10 {
		mustQueue(t, p, queueNow, fmt.Sprint("item", i))
	}
	var log commandLog
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			if _, err := dequeue(t.Context(), p, log.run); err != nil {
				t.Error(err)
			}
		})
	}
	both.Wait()
	if len(log.ran) != 10 || !slices.IsSorted(log.ran) {
		t.Errorf("ran %q", log.ran)
	}
}

// An item that was running when the machine died may have done its work, or
// half of it: it is told, and not run again.
func TestQueueInterrupted(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	id := mustQueue(t, p, queueNow, "reboot")
	mustQueue(t, p, queueNow, "next")
	if err := os.Rename(itemPath(p, id, "queued"), itemPath(p, id, "running")); err != nil {
		t.Fatal(err)
	}
	if got, want := queued(t, p), []string{"nodemgr reboot: running", "nodemgr next: queued"}; !slices.Equal(got, want) {
		t.Errorf("after the crash the queue is %q, want %q", got, want)
	}
	var log commandLog
	if ran := mustDequeue(t, p, log.run); ran != 1 || !slices.Equal(log.ran, []string{"nodemgr next"}) {
		t.Errorf("%d items ran: %q", ran, log.ran)
	}
	if got, want := queued(t, p), []string{"nodemgr reboot: interrupted", "nodemgr next: done"}; !slices.Equal(got, want) {
		t.Errorf("the queue is %q, want %q", got, want)
	}
	items, _ := queueList(p)
	if items[0].Exit != nil || items[0].Error == "" || items[0].Ended.IsZero() {
		t.Errorf("the interrupted item is %+v", items[0])
	}
}

// The machine dies between the two steps of an item's end: its result counts.
func TestQueueCrashAfterTheResult(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	id := mustQueue(t, p, queueNow, "x")
	mustDequeue(t, p, (&commandLog{says: "done it", exit: 3}).run)
	done := readText(t, itemPath(p, id, "done"))
	writeText(t, itemPath(p, id, "running"), done)
	var log commandLog
	if ran := mustDequeue(t, p, log.run); ran != 0 || len(log.ran) > 0 {
		t.Errorf("run again: %q", log.ran)
	}
	if got := readText(t, itemPath(p, id, "done")); got != done {
		t.Errorf("the result became %s", got)
	}
	if got, want := queued(t, p), []string{"nodemgr x: done"}; !slices.Equal(got, want) {
		t.Errorf("the queue is %q, want %q", got, want)
	}
}

// The mark of running is on the disk before the item runs, and the result
// before the mark goes: else a crash could run it twice.
func TestQueueMarksBeforeItRuns(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	id := mustQueue(t, p, queueNow, "x")
	run := func(context.Context, []string, io.Writer, io.Writer) (int, error) {
		if got, want := queued(t, p), []string{"nodemgr x: running"}; !slices.Equal(got, want) {
			t.Errorf("while it runs, the queue is %q, want %q", got, want)
		}
		return 0, nil
	}
	mustDequeue(t, p, run)
	if _, err := os.Stat(itemPath(p, id, "running")); err == nil {
		t.Error("the mark of running is still there")
	}
	// If the result cannot be stored, the mark stays: the next dequeue says
	// interrupted, and runs nothing twice.
	id = mustQueue(t, p, queueNow, "y")
	run = func(context.Context, []string, io.Writer, io.Writer) (int, error) {
		return 0, os.Mkdir(filepath.Join(p.queue(), "."+id+".done.new"), 0o700)
	}
	blocker := filepath.Join(p.queue(), "."+id+".done.new", "x")
	failing := func(ctx context.Context, argv []string, out, err io.Writer) (int, error) {
		exit, failure := run(ctx, argv, out, err)
		return exit, errors.Join(failure, os.WriteFile(blocker, nil, 0o600))
	}
	if _, err := dequeue(t.Context(), p, failing); err == nil {
		t.Error("a result that cannot be stored is no error")
	}
	if _, err := os.Stat(itemPath(p, id, "running")); err != nil {
		t.Errorf("without a result, the mark of running went: %v", err)
	}
}

func TestQueuePrunesResults(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	if err := os.MkdirAll(p.queue(), 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range resultsKept + 20 {
		item := queueItem{ID: itemID(queueNow.Add(time.Duration(i) * time.Second)), State: "done", Command: []string{"nodemgr", fmt.Sprint("old", i)}}
		writeText(t, itemPath(p, item.ID, "done"), fmt.Sprintf(`{"state":"done","command":["nodemgr","old%d"]}`, i))
	}
	mustQueue(t, p, queueNow.Add(time.Hour), "new")
	mustDequeue(t, p, (&commandLog{}).run)
	got := queued(t, p)
	if len(got) != resultsKept || resultsKept != 100 || got[0] != "nodemgr old21: done" || got[len(got)-1] != "nodemgr new: done" {
		t.Errorf("%d results are kept, from %q to %q", len(got), got[0], got[len(got)-1])
	}
	// What waits is no result: it neither goes nor takes a result's place.
	mustQueue(t, p, queueNow.Add(time.Hour), "last")
	mustQueue(t, p, queueNow.Add(time.Hour), "waits")
	ctx, cancel := context.WithCancel(t.Context())
	ran, err := dequeue(ctx, p, func(context.Context, []string, io.Writer, io.Writer) (int, error) {
		cancel()
		return 0, nil
	})
	if ran != 1 || !errors.Is(err, context.Canceled) {
		t.Errorf("a dequeue that is ended: %d, %v", ran, err)
	}
	if got := queued(t, p); len(got) != resultsKept+1 || got[len(got)-1] != "nodemgr waits: queued" {
		t.Errorf("with one that waits there are %d, the last %q", len(got), got[len(got)-1])
	}
}

// Who waits for another dequeue can be ended.
func TestQueueWaitForItsTurnEnds(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	mustQueue(t, p, queueNow, "x")
	held, err := lock(p.lockFile("queue"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.unlock()
	ctx, cancel := context.WithCancel(t.Context())
	var log commandLog
	ended := make(chan error, 1)
	go func() {
		_, err := dequeue(ctx, p, log.run)
		ended <- err
	}()
	select {
	case err := <-ended:
		t.Fatalf("dequeue did not wait: %v", err)
	case <-time.After(3 * lockPause):
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("dequeue: %v", err)
	}
	if got, want := queued(t, p), []string{"nodemgr x: queued"}; !slices.Equal(got, want) || len(log.ran) > 0 {
		t.Errorf("the queue is %q, ran %q", got, log.ran)
	}
}

// What floods its output fills neither memory nor disk, and what was dropped
// is counted.
func TestQueueBoundsOutput(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	mustQueue(t, p, queueNow, "flood")
	const lines, line = 10_000, "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n"
	mustDequeue(t, p, func(_ context.Context, _ []string, stdout, stderr io.Writer) (int, error) {
		for i := range lines {
			to := []io.Writer{stdout, stderr}[i%2]
			if n, err := io.WriteString(to, line); n != len(line) || err != nil {
				t.Fatalf("write = %d, %v; a command that floods goes on", n, err)
			}
		}
		return 0, nil
	})
	items, err := queueList(p)
	if err != nil || len(items) != 1 {
		t.Fatalf("%d items, %v", len(items), err)
	}
	if got := items[0]; got.State != "done" || len(got.Output) != itemOutput || got.Dropped != lines*len(line)-itemOutput || !strings.HasPrefix(got.Output, line) {
		t.Errorf("%s: %d bytes kept, %d dropped", got.State, len(got.Output), got.Dropped)
	}
}

func TestQueueRefuses(t *testing.T) {
	t.Parallel()
	p := testFolders(t)
	for name, command := range map[string][]string{
		"nothing":                    {},
		"no words":                   {"nodemgr"},
		"a foreign command":          {"rm", "-rf", "/"},
		"a path to the command":      {"/tmp/nodemgr", "x"},
		"a shell":                    {"sh", "-c", "nodemgr x"},
		"the binary":                 {"agentd", "run"},
		"a secret":                   {"nodemgr", "set", "--param", "cluster.secret", "--value", "S3CR3T"},
		"a secret, one word":         {"nodemgr", "set", "--param=cluster.previous_secret", "--value=S3CR3T"},
		"a secret by its own option": {"nodemgr", "daemon", "join", "--secret", "S3CR3T"},
		"the same, one word":         {"nodemgr", "daemon", "join", "--secret=S3CR3T"},
		"a NUL":                      {"nodemgr", "a\x00b"},
		"far too long":               {"nodemgr", strings.Repeat("x", itemSize)},
	} {
		id, err := queueAdd(p, command, queueNow)
		if err == nil {
			t.Errorf("%s: queued as %s", name, id)
		} else if strings.Contains(err.Error(), "S3CR3T") {
			t.Errorf("%s: the error %q holds the secret", name, err)
		}
	}
	if got := queued(t, p); len(got) > 0 {
		t.Errorf("queued: %q", got)
	}
	for _, command := range [][]string{{"nodemgr", "node", "status"}, {"svcmgr", "-s", "web", "start"}, {"nodemgr", "get", "--param", "node.env"}} {
		if _, err := queueAdd(p, command, queueNow); err != nil {
			t.Errorf("%q: %v", command, err)
		}
	}
}

// Go's options take one dash as well as two.
func TestQueueRefusesASecretBehindOneDash(t *testing.T) {
	t.Parallel()
	for _, words := range [][]string{{"-secret", "S3CR3T"}, {"-secret=S3CR3T"}} {
		if err := checkQueueable(append([]string{"nodemgr", "daemon", "join"}, words...)); err == nil {
			t.Errorf("%q is taken", words)
		}
	}
}

// A queued dequeue would wait for the one that runs it, up to an hour, and
// everything behind it too.
func TestQueueRefusesToQueueItself(t *testing.T) {
	t.Parallel()
	if err := checkQueueable([]string{"nodemgr", "dequeue", "actions"}); err == nil {
		t.Error("nodemgr dequeue actions is taken")
	}
}

// Whatever is taken reads back: a bound on the bytes of words alone lets a
// file grow beyond what is read.
func TestQueueTakesOnlyWhatReadsBack(t *testing.T) {
	t.Parallel()
	p := testFolders(t)
	command := append([]string{"nodemgr"}, make([]string, 200_000)...)
	if _, err := queueAdd(p, command, queueNow); err != nil {
		return
	}
	items, err := queueList(p)
	if err != nil || len(items) != 1 || len(items[0].Command) != len(command) {
		t.Errorf("%d words were taken and %d read back: %q", len(command), len(items[0].Command), items[0].Error)
	}
}

// What checks did not let in, because somebody wrote it into the folder, does
// not run either, and holds up nothing.
func TestQueueRunsNothingForeign(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	id := func(i int) string { return itemID(queueNow.Add(time.Duration(i) * time.Second)) }
	writeText(t, itemPath(p, id(0), "queued"), `{"command":["rm","-rf","/"]}`)
	writeText(t, itemPath(p, id(1), "queued"), `{"command":["nodemgr"`)
	writeText(t, itemPath(p, id(2), "queued"), ``)
	writeText(t, itemPath(p, id(3), "queued"), `{"command":["nodemgr","good"],"state":"done","id":"../../x"}`)
	writeText(t, filepath.Join(p.queue(), "."+id(4)+".queued.new"), `{"command":["nodemgr","torn"]}`)
	writeText(t, filepath.Join(p.queue(), "README"), `not an item`)
	var log commandLog
	if mustDequeue(t, p, log.run); !slices.Equal(log.ran, []string{"nodemgr good"}) {
		t.Errorf("ran %q", log.ran)
	}
	items, err := queueList(p)
	if err != nil {
		t.Fatal(err)
	}
	for i, item := range items {
		if want := map[bool]string{true: "done", false: "failed to run"}[i == 3]; item.ID != id(i) || item.State != want || (item.Error == "") != (i == 3) {
			t.Errorf("item %d: %+v, want %s", i, item, want)
		}
	}
}

func TestQueueIsBounded(t *testing.T) {
	t.Parallel()
	p := testFolders(t)
	for i := range queueSize {
		writeText(t, itemPath(p, itemID(queueNow.Add(time.Duration(i)*time.Microsecond)), "queued"), `{"command":["nodemgr","x"]}`)
	}
	if _, err := queueAdd(p, []string{"nodemgr", "x"}, queueNow); err == nil || !strings.Contains(err.Error(), "nodemgr dequeue actions") {
		t.Errorf("beyond the bound: %v; want an error that says what to do", err)
	}
	// Results do not wait.
	first := itemPath(p, itemID(queueNow), "queued")
	if err := os.Rename(first, strings.TrimSuffix(first, "queued")+"done"); err != nil {
		t.Fatal(err)
	}
	mustQueue(t, p, queueNow, "x")
}

// What a crash leaves of a file that was being written goes with the next
// writing, since its name is never used again.
func TestQueueRemovesLeftovers(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	for _, state := range []string{"queued", "done"} {
		writeText(t, filepath.Join(p.queue(), "."+itemID(queueNow.Add(-time.Hour))+"."+state+".new"), "{")
	}
	mustQueue(t, p, queueNow, "x")
	mustDequeue(t, p, (&commandLog{}).run)
	entries, err := os.ReadDir(p.queue())
	if err != nil || len(entries) != 1 {
		t.Errorf("left in the queue: %v, %v; want the result alone", entries, err)
	}
}

// At its end, a dequeue leaves what waits to the next, in order.
func TestQueueStopsWithItsContext(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	mustQueue(t, p, queueNow, "first")
	mustQueue(t, p, queueNow, "second")
	ctx, cancel := context.WithCancel(t.Context())
	ran, err := dequeue(ctx, p, func(context.Context, []string, io.Writer, io.Writer) (int, error) {
		cancel()
		return 0, nil
	})
	if ran != 1 || !errors.Is(err, context.Canceled) {
		t.Errorf("dequeue = %d, %v", ran, err)
	}
	if got, want := queued(t, p), []string{"nodemgr first: done", "nodemgr second: queued"}; !slices.Equal(got, want) {
		t.Errorf("the queue is %q, want %q", got, want)
	}
}

// Each item has an hour, so that one that hangs does not hold up the rest for
// ever.
func TestQueueItemsHaveAnHour(t *testing.T) {
	useFakeCommands(t)
	p := testFolders(t)
	mustQueue(t, p, queueNow, "x")
	mustDequeue(t, p, func(ctx context.Context, _ []string, _, _ io.Writer) (int, error) {
		if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) > time.Hour || time.Until(deadline) < 59*time.Minute {
			t.Errorf("the item ends at %v", deadline)
		}
		return 0, nil
	})
}

// Anybody can send empty packets: one run waits at most, the rest is counted.
func TestDequeuerCoalesces(t *testing.T) {
	t.Parallel()
	q := newDequeuer(nil)
	for range 1000 {
		q.trigger()
	}
	if q.asked.Load() != 1000 || q.dropped.Load() != 999 || len(q.pending) != 1 {
		t.Errorf("asked %d, dropped %d, pending %d", q.asked.Load(), q.dropped.Load(), len(q.pending))
	}
}
