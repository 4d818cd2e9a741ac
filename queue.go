// queue.go: actions that wait for their turn (`nodemgr queue add`) and their
// execution (`nodemgr dequeue actions`), oldest first, each once. An item is
// a file whose name ends in its state:
//
//	.queued ──▶ .running ──▶ .done      (the rename to .running is synced first,
//	                                     so nothing is ever run twice)
//
// The queue's lock is held while items run, so one that is .running without
// the lock held was interrupted. The daemon only triggers; see dequeuer.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// queueItem is the content of an item's file. Its state is in the file's name
// alone, but for the result.
type queueItem struct {
	ID      string    `json:"id"`
	State   string    `json:"state"` // queued, running, done, interrupted, failed to run
	Command []string  `json:"command"`
	Queued  time.Time `json:"queued"`
	Started time.Time `json:"started,omitzero"`
	Ended   time.Time `json:"ended,omitzero"`
	Exit    *int      `json:"exit"` // nil: it did not end by itself
	Output  string    `json:"output,omitempty"`
	Dropped int       `json:"output_dropped,omitempty"` // bytes
	Error   string    `json:"error,omitempty"`
}

// queueAdd stores a command for the next `nodemgr dequeue actions`.
func queueAdd(p paths, command []string, now time.Time) (id string, err error) {
	if err := checkQueueable(command); err != nil {
		return "", err
	}
	held, err := lock(p.lockFile("queue.add"))
	if err != nil {
		return "", err
	}
	defer held.unlock()
	if err := os.MkdirAll(p.queue(), 0o700); err != nil {
		return "", fmt.Errorf("cannot queue: %w", err)
	}
	items, err := queueList(p)
	if err == nil {
		err = removeLeftovers(p, "queued")
	}
	if err != nil {
		return "", err
	}
	waiting, newest := 0, ""
	for _, item := range items {
		newest = max(newest, item.ID)
		if item.State == "queued" {
			waiting++
		}
	}
	if waiting >= queueSize {
		return "", fmt.Errorf("cannot queue: %d actions wait already; run `nodemgr dequeue actions`", waiting)
	}
	// The order is that of the names, even if the clock is stepped back.
	for id = itemID(now); id <= newest; id = itemID(now) {
		last, err := time.Parse(itemIDFormat, newest)
		if err != nil {
			return "", fmt.Errorf("cannot queue: %s holds an item with a foreign name: %w", p.queue(), err)
		}
		now = last.Add(time.Microsecond)
	}
	return id, writeItem(p, "queued", queueItem{ID: id, Command: command, Queued: now})
}

const itemIDFormat = "20060102T150405.000000Z"

func itemID(t time.Time) string { return t.UTC().Format(itemIDFormat) }

// checkQueueable takes the two commands only: whatever is queued runs as root
// later. Secrets are refused since the queue is listed and kept.
func checkQueueable(command []string) error {
	if len(command) < 2 || command[0] != "nodemgr" && command[0] != "svcmgr" {
		return errors.New("only nodemgr and svcmgr commands can be queued, as in: nodemgr queue add -- nodemgr node status")
	}
	if strings.Join(command, " ") == "nodemgr dequeue actions" {
		return errors.New("nodemgr dequeue actions would wait for itself")
	}
	size := 0
	for _, word := range command {
		size += len(word) + wordSize
		if strings.ContainsRune(word, 0) {
			return errors.New("a command cannot hold a NUL")
		}
		if strings.HasPrefix(strings.TrimLeft(word, "-"), "secret") && word[0] == '-' || strings.Contains(word, "cluster.secret") || strings.Contains(word, "cluster.previous_secret") {
			return errors.New("a command that holds a secret cannot be queued, since the queue is kept and listed; run it directly")
		}
	}
	if size > itemSize {
		return fmt.Errorf("the command is larger than %d bytes", itemSize)
	}
	return nil
}

// queueList returns all items, the oldest first. The id and the state come
// from the file's name. An item whose end was cut off stands there as done and
// as running, in this order.
func queueList(p paths) ([]queueItem, error) {
	entries, err := os.ReadDir(p.queue())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot list the queue: %w", err)
	}
	var items []queueItem
	for _, entry := range entries {
		id, state, found := strings.Cut(entry.Name(), "Z.")
		if !found || strings.HasPrefix(entry.Name(), ".") {
			continue
		}
		id += "Z"
		var item queueItem
		data, _, err := readRegular(filepath.Join(p.queue(), entry.Name()), 1<<20)
		if errors.Is(err, os.ErrNotExist) {
			continue // it went on to its next state meanwhile
		}
		if err == nil {
			err = json.Unmarshal(data, &item)
		}
		if err != nil {
			item = queueItem{Error: fmt.Sprintf("the item cannot be read: %v", err)}
		}
		if state != "done" {
			item.State = state
		}
		item.ID = id
		items = append(items, item)
	}
	slices.SortFunc(items, func(a, b queueItem) int {
		return cmp.Or(strings.Compare(a.ID, b.ID), compareBools(a.State == "running", b.State == "running"))
	})
	return items, nil
}

// dequeue runs what is queued until nothing is left. A second dequeue waits
// for the first, and then has nothing left to do. It returns how many items
// ran.
func dequeue(ctx context.Context, p paths, run runner) (int, error) {
	held, err := awaitLock(ctx, p.lockFile("queue"))
	if err != nil {
		return 0, err
	}
	defer held.unlock()
	items, err := queueList(p)
	if err != nil {
		return 0, err
	}
	for _, item := range items {
		if item.State == "running" {
			if err := settleInterrupted(p, item); err != nil {
				return 0, err
			}
		}
	}
	for ran := 0; ; ran++ {
		i := slices.IndexFunc(items, func(item queueItem) bool { return item.State == "queued" })
		if i < 0 || ctx.Err() != nil {
			return ran, errors.Join(pruneResults(p), context.Cause(ctx))
		}
		if err := runItem(ctx, p, items[i], run); err != nil {
			return ran, err
		}
		if items, err = queueList(p); err != nil { // what was added meanwhile
			return ran, err
		}
	}
}

// runItem runs one item and stores its result.
func runItem(ctx context.Context, p paths, item queueItem, run runner) error {
	from, to := itemPath(p, item.ID, "queued"), itemPath(p, item.ID, "running")
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("cannot start the item: %w", err)
	}
	if err := syncFolder(p.queue()); err != nil {
		return err
	}
	item.State, item.Started = "done", time.Now()
	output := &boundedBuffer{limit: itemOutput}
	err := checkQueueable(item.Command)
	if err == nil {
		var program string
		if program, err = ownCommand(item.Command[0]); err == nil {
			limited, cancel := context.WithTimeout(ctx, itemTimeout)
			exit, runErr := run(limited, append([]string{program}, item.Command[1:]...), output, output)
			cancel()
			if err = runErr; err == nil {
				item.Exit = &exit
			}
		}
	}
	if err != nil {
		item.State, item.Error = "failed to run", err.Error()
	}
	item.Ended = time.Now()
	item.Output, item.Dropped = output.text()
	return finishItem(p, item)
}

// settleInterrupted ends an item that no process runs any more. It may have
// its result already.
func settleInterrupted(p paths, item queueItem) error {
	if _, err := os.Stat(itemPath(p, item.ID, "done")); err == nil {
		return removeRunning(p, item)
	}
	item.State, item.Ended = "interrupted", time.Now()
	item.Error = "the machine or the dequeuing process ended while this ran; it is not run again"
	return finishItem(p, item)
}

// finishItem stores the result before it removes the mark of running.
func finishItem(p paths, item queueItem) error {
	if err := writeItem(p, "done", item); err != nil {
		return err
	}
	return removeRunning(p, item)
}

func removeRunning(p paths, item queueItem) error {
	if err := os.Remove(itemPath(p, item.ID, "running")); err != nil {
		return fmt.Errorf("cannot finish the item: %w", err)
	}
	return syncFolder(p.queue())
}

// removeLeftovers removes what interrupted writes of that state left. The
// caller holds the lock under which they are made.
func removeLeftovers(p paths, state string) error {
	leftovers, err := filepath.Glob(itemPath(p, ".*", state+".new"))
	for _, path := range leftovers {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

func pruneResults(p paths) error {
	items, err := queueList(p)
	if err == nil {
		err = removeLeftovers(p, "done")
	}
	if err != nil {
		return err
	}
	items = slices.DeleteFunc(items, func(item queueItem) bool { return item.State == "queued" || item.State == "running" })
	for i := range max(0, len(items)-resultsKept) {
		if err := os.Remove(itemPath(p, items[i].ID, "done")); err != nil {
			return fmt.Errorf("cannot prune the results: %w", err)
		}
	}
	return nil
}

func writeItem(p paths, state string, item queueItem) error {
	if state != "done" {
		item.State = state
	}
	data, err := json.MarshalIndent(item, "", "  ")
	if err != nil {
		return fmt.Errorf("cannot store the item: %w", err)
	}
	return writeFile(itemPath(p, item.ID, state), append(data, '\n'), 0o600)
}

func itemPath(p paths, id, state string) string {
	return filepath.Join(p.queue(), id+"."+state)
}

// ownCommand finds one of agentd's commands: beside the binary, else on the
// path.
func ownCommand(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("cannot find the command %s beside agentd or on the path: %w", name, err)
	}
	return path, nil
}

// dequeuer runs `nodemgr dequeue actions` for empty packets, which anybody can
// send: one run at a time, one more pending at most, one start a second.
type dequeuer struct {
	log     *slog.Logger
	run     func(ctx context.Context, p paths) error
	pending chan struct{}
	asked   atomic.Int64
	dropped atomic.Int64
	runs    atomic.Int64
}

func newDequeuer(log *slog.Logger) *dequeuer {
	return &dequeuer{log: log, run: runDequeue, pending: make(chan struct{}, 1)}
}

// trigger asks for a run and never waits.
func (q *dequeuer) trigger() {
	q.asked.Add(1)
	select {
	case q.pending <- struct{}{}:
	default:
		q.dropped.Add(1)
	}
}

func (q *dequeuer) work(ctx context.Context, p paths) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.pending:
		}
		again := time.After(dequeueInterval)
		q.runs.Add(1)
		if err := q.run(ctx, p); err != nil && ctx.Err() == nil {
			q.log.Warn("cannot dequeue actions", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-again:
		}
	}
}

// runDequeue returns when the command has ended, or ctx. Then the command goes
// on: what it runs may be `nodemgr daemon restart`.
func runDequeue(ctx context.Context, p paths) error {
	program, err := ownCommand("nodemgr")
	if err != nil {
		return err
	}
	cmd := exec.Command(program, "dequeue", "actions")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := startChild(cmd); err != nil {
		return fmt.Errorf("cannot run %s: %w", program, err)
	}
	if err := waitProcess(ctx, cmd.Process.Pid); err != nil {
		return errors.Join(err, cmd.Process.Release())
	}
	if err := waitChild(cmd); err != nil {
		return fmt.Errorf("%s dequeue actions: %w", program, err)
	}
	return nil
}
