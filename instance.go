// instance.go: a service on this node, and what is done to it: actions over
// its resources in their order, with rollback, and the commands that these
// take. One action at a time, under a lock that other processes respect. What
// is being done is written down before it is done, so that the next daemon can
// settle what a crash cut off. It decides nothing: monitor.go does.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// instance is a service on this node.
type instance struct {
	paths   paths
	node    string
	watcher *watcher
	run     commandRunner
	random  func() uint64
	kill    func(id string)
	log     func(level slog.Level, rid, text string)
	seen    func(rid string, s status, note string) // a resource's state was seen
	jobs    *sync.WaitGroup                         // of what outlives a call
	ctx     context.Context                         // of these jobs
	starts  chan struct{}                           // a place for each start on this node
	stops   chan struct{}                           // and for each stop
	checks  chan struct{}                           // and for each check
	acting  chan struct{}                           // one place

	opening sync.Mutex // held while a disk is waited for
	outputs map[string]*output

	mu       sync.Mutex // taken by the core's goroutine: not held while anything is waited for
	service  *service
	round    int // of actions: a check that was overtaken by one says nothing
	programs map[string]*program
	ends     map[string]string // how a program that was there ended
	up       map[string]bool   // resources that were seen up, or may be
	done     journalEntry
	within   time.Duration // how long the programs of a stop may take to end together; 0: each its own time
	share    time.Duration // the next one's part of it
}

// journalEntry is what is being done. It is kept in OSVCRUN: a machine that
// boots has nothing to settle.
type journalEntry struct {
	Boot    string   `json:"boot"`
	Verb    verb     `json:"verb"`
	Rids    []string `json:"rids"`              // of start: what it began, in that order
	Command string   `json:"command,omitempty"` // the id of the command that runs
}

func (p paths) instanceRun(service string) string {
	return filepath.Join(p.run, "services", service)
}
func (p paths) instanceLib(service string) string {
	return filepath.Join(p.lib, "services", service)
}
func (in *instance) journalPath() string {
	return filepath.Join(in.paths.instanceRun(in.name()), "action")
}

func (in *instance) spec() *service {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.service
}

func (in *instance) name() string { return in.spec().name }

// stopError says that it was the stop that failed.
type stopError struct{ error }

func (e stopError) Unwrap() error { return e.error }

// perform does an order. Its error is a stopError where something does not
// stop.
func (in *instance) perform(ctx context.Context, o order) error {
	select {
	case in.acting <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-in.acting }()
	held, err := in.lock(ctx)
	if err != nil {
		return err
	}
	defer held.unlock()
	places := in.starts
	if o.Verb == verbStop {
		places = in.stops // which do not wait for starts that hang
	}
	select {
	case places <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-places }()
	s := in.spec()
	in.mu.Lock()
	in.round++
	in.within, in.share = o.Within, o.Within
	in.mu.Unlock()
	begun := time.Now()
	if o.Verb != verbStart {
		err = in.stop(ctx, s, o.Rids)
	}
	if err == nil && o.Verb != verbStop {
		err = in.start(ctx, s, o.Rids)
	}
	if ctx.Err() != nil && in.ctx.Err() != nil {
		return context.Cause(ctx) // the daemon ends: the journal stays for the next one
	}
	if err := in.forget(); err != nil {
		in.log(slog.LevelWarn, "", err.Error())
	}
	took := time.Since(begun).Round(time.Millisecond)
	if err != nil {
		in.log(slog.LevelError, "", fmt.Sprintf("%s failed after %s: %v", in.describe(o), took, err))
		return err
	}
	in.log(slog.LevelInfo, "", fmt.Sprintf("%s: done in %s", in.describe(o), took))
	return nil
}

func (in *instance) describe(o order) string {
	if o.Rids == nil {
		return string(o.Verb)
	}
	return string(o.Verb) + " " + strings.Join(o.Rids, " ")
}

var errCancelled = errors.New("cancelled by a later order")

// lock keeps other processes from acting on this instance.
func (in *instance) lock(ctx context.Context) (fileLock, error) {
	held, err := awaitLock(ctx, filepath.Join(in.paths.instanceRun(in.name()), "lock"))
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("another process acts on this instance: %w", err)
	}
	return held, err
}

func (in *instance) selected(s *service, rids []string) (resources []*resource) {
	for _, r := range s.resources {
		if !r.disable && (rids == nil || slices.Contains(rids, r.rid)) {
			resources = append(resources, r)
		}
	}
	return resources
}

// start starts what is not up, in the file's order. If one fails that is not
// optional, what was started is stopped again.
func (in *instance) start(ctx context.Context, s *service, rids []string) error {
	var began []*resource
	for _, r := range in.selected(s, rids) {
		if state, note := drivers[r.kind].check(ctx, in, r); state == statusUp {
			in.tell(r, state, note)
			continue
		}
		began = append(began, r)
		if err := in.write(verbStart, began); err != nil {
			return errors.Join(err, in.rollBack(s, began[:len(began)-1]))
		}
		begun := time.Now()
		err := drivers[r.kind].start(ctx, in, r)
		if err == nil {
			if r.exec == nil || r.check != nil { // a program is told of when it starts
				in.tell(r, statusUp, "")
			}
			in.log(slog.LevelInfo, r.rid, "started in "+time.Since(begun).Round(time.Millisecond).String())
			continue
		}
		in.log(slog.LevelError, r.rid, "not started: "+err.Error())
		if in.ctx.Err() != nil {
			return err // settled by the next daemon
		}
		if r.optional && ctx.Err() == nil {
			began = began[:len(began)-1]
			in.stopOne(in.ctx, r)
			in.tell(r, statusDown, "not started: "+err.Error())
			continue
		}
		note := "not started: " + err.Error()
		err = fmt.Errorf("%s: %w", r.rid, err)
		if failure := in.rollBack(s, began); failure != nil {
			return fmt.Errorf("%w; and then, of what had been started: %w", err, failure)
		}
		in.tell(r, statusDown, note)
		return err
	}
	return nil
}

// rollBack stops what a start began. It is not cancelled with it.
func (in *instance) rollBack(s *service, began []*resource) error {
	if len(began) == 0 {
		return nil
	}
	in.log(slog.LevelInfo, "", "rolling back")
	var rids []string
	for _, r := range began {
		rids = append(rids, r.rid)
	}
	return in.stop(in.ctx, s, rids)
}

// stop stops in the reverse of the file's order. One that does not stop does
// not keep the others up.
func (in *instance) stop(ctx context.Context, s *service, rids []string) error {
	var failures []error
	selected := in.selected(s, rids)
	if err := in.write(verbStop, selected); err != nil {
		in.log(slog.LevelWarn, "", err.Error()) // and stopped all the same
	}
	begun := time.Now()
	for i, r := range slices.Backward(selected) {
		in.shareOut(begun, selected[:i+1])
		if err := in.stopOne(ctx, r); err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", r.rid, err))
		}
	}
	if failures == nil {
		return nil
	}
	return stopError{errors.Join(failures...)}
}

// shareOut gives each program that is left to be stopped the same part of what
// is left of within: else many that do not end would outlast the grace.
func (in *instance) shareOut(begun time.Time, left []*resource) {
	in.mu.Lock()
	defer in.mu.Unlock()
	running := 0
	for _, r := range left {
		if in.programs[r.rid] != nil {
			running++
		}
	}
	in.share = max(0, in.within-time.Since(begun)) / time.Duration(max(1, running))
}

func (in *instance) stopOne(ctx context.Context, r *resource) error {
	begun, running := time.Now(), in.programOf(r.rid) != nil
	if err := drivers[r.kind].stop(ctx, in, r); err != nil {
		in.log(slog.LevelError, r.rid, "not stopped: "+err.Error())
		state, _ := drivers[r.kind].check(ctx, in, r)
		in.tell(r, state, "not stopped: "+err.Error())
		return err
	}
	in.tell(r, statusDown, "")
	if r.exec != nil && !running {
		return nil
	}
	in.log(slog.LevelInfo, r.rid, "stopped in "+time.Since(begun).Round(time.Millisecond).String())
	return nil
}

func (in *instance) tell(r *resource, s status, note string) { in.seen(r.rid, s, note) }

// check looks at a resource and tells its state, unless an action goes on,
// which knows better. It returns whether it told it.
func (in *instance) check(ctx context.Context, rid string) (told bool) {
	in.mu.Lock()
	r, round, acting := in.service.resource(rid), in.round, len(in.acting) > 0
	in.mu.Unlock()
	if r == nil || acting {
		return false
	}
	if r.exec == nil || r.check != nil {
		select {
		case in.checks <- struct{}{}:
			defer func() { <-in.checks }()
		case <-ctx.Done():
			return false
		}
	}
	state, note := drivers[r.kind].check(ctx, in, r)
	in.mu.Lock()
	overtaken := in.round != round
	in.mu.Unlock()
	if overtaken || ctx.Err() != nil {
		return false
	}
	in.tell(r, state, note)
	if r.exec != nil && state != statusDown {
		// Its end may have been told just before what was seen of its life.
		if state, note := in.programState(rid); state == statusDown {
			in.tell(r, state, note)
		}
	}
	return true
}

// idle returns when no action goes on; false when ctx ended.
func (in *instance) idle(ctx context.Context) bool {
	select {
	case in.acting <- struct{}{}:
		<-in.acting
		return true
	case <-ctx.Done():
		return false
	}
}

// held tells whether a resource was seen up, or was started, and not seen down
// since.
func (in *instance) held(rid string) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.up[rid]
}

func (in *instance) holds(rid string, up bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.up[rid] = up
}

// write notes down what is about to be done.
func (in *instance) write(v verb, resources []*resource) error {
	e := journalEntry{Boot: bootID(), Verb: v, Rids: []string{}} // none is not all
	for _, r := range resources {
		e.Rids = append(e.Rids, r.rid)
	}
	return in.note(e)
}

func (in *instance) note(e journalEntry) error {
	in.mu.Lock()
	in.done = e
	in.mu.Unlock()
	data, err := json.Marshal(e)
	if err == nil {
		err = replaceFile(in.journalPath(), data)
	}
	if err != nil {
		return fmt.Errorf("cannot note what is being done: %w", err)
	}
	return nil
}

// doing is the verb that was noted last.
func (in *instance) doing() verb {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.done.Verb
}

// noteCommand adds the command that is about to run to what is being done.
func (in *instance) noteCommand(id string) error {
	in.mu.Lock()
	e := in.done
	in.mu.Unlock()
	e.Command = id
	return in.note(e)
}

func (in *instance) forget() error {
	if err := os.Remove(in.journalPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot note what was done: %w", err)
	}
	return nil
}

// begin takes up what an earlier daemon left running, and settles what it left
// in the middle.
func (in *instance) begin() error {
	in.nameStrangers()
	for _, r := range in.spec().resources {
		if r.exec != nil {
			in.takeUp(r.rid)
		}
		if _, err := os.Stat(in.outputPath(r.rid)); err == nil {
			if _, err := in.output(r.rid); err != nil {
				in.log(slog.LevelWarn, r.rid, err.Error())
			}
		}
	}
	return in.settle(in.ctx)
}

// takeUpAgain takes up the programs of sections that were gone and came back.
func (in *instance) takeUpAgain(ctx context.Context) {
	select {
	case in.acting <- struct{}{}: // so that none is just starting
		defer func() { <-in.acting }()
	case <-ctx.Done():
		return
	}
	for _, r := range in.spec().resources {
		if r.exec != nil && in.programOf(r.rid) == nil {
			in.takeUp(r.rid)
		}
	}
}

// nameStrangers says which programs an earlier daemon left running whose
// sections went from the file while no daemon ran. They are nobody's then.
func (in *instance) nameStrangers() {
	records, _ := filepath.Glob(in.recordPath("*")) // the pattern is a valid one
	for _, path := range records {
		rid := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
		if in.spec().resource(rid) == nil {
			in.log(slog.LevelWarn, rid, "its section is not in the file any more; its program may run on: see "+path)
		}
	}
}

// watchAll checks each resource now and then, until ctx ends.
func (in *instance) watchAll(ctx context.Context) {
	var loops sync.WaitGroup
	defer loops.Wait()
	for _, r := range in.spec().resources {
		if r.disable {
			continue
		}
		loops.Go(func() {
			// At different moments: a hundred checks at once are a load.
			for wait := time.Duration(in.random()%uint64(r.checkInterval)) + 1; ; wait = r.checkInterval {
				for !in.check(ctx, r.rid) {
					if in.spec().resource(r.rid) == nil || !in.idle(ctx) {
						return
					}
				}
				if r.exec != nil && r.check == nil {
					return // its end is seen at once
				}
				select {
				case <-ctx.Done():
					return
				case <-time.After(wait):
				}
			}
		})
	}
}

func readEntry(path string) (e journalEntry, err error) {
	data, _, err := readRegular(path, 1<<20)
	if err == nil {
		err = json.Unmarshal(data, &e)
	}
	return e, err
}

// settle ends what an earlier daemon left in the middle: its command is
// killed, and what it began to start, or to stop, is stopped.
func (in *instance) settle(ctx context.Context) error {
	e, err := readEntry(in.journalPath())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return errors.Join(fmt.Errorf("cannot tell what an earlier daemon was doing: %w", err), in.forget())
	}
	if e.Boot != bootID() {
		return in.forget()
	}
	in.log(slog.LevelWarn, "", fmt.Sprintf("an earlier daemon was cut off at %s of %s; what it began is stopped", e.Verb, strings.Join(e.Rids, " ")))
	if e.Command != "" {
		in.kill(e.Command)
	}
	held, err := in.lock(ctx)
	if err != nil {
		return err
	}
	defer held.unlock()
	in.acting <- struct{}{}
	defer func() { <-in.acting }()
	if err = in.stop(ctx, in.spec(), e.Rids); err == nil {
		err = in.forget()
	}
	return err
}

// frozenFlag is the flag's file: a service's, or the node's.
func (p paths) frozenFlag(service string) string {
	if service == "" {
		return filepath.Join(p.lib, "frozen")
	}
	return filepath.Join(p.instanceLib(service), "frozen")
}

// isFrozen tells whether the flag is there, or may be.
func isFrozen(p paths, service string) bool {
	_, err := os.Stat(p.frozenFlag(service))
	return !errors.Is(err, os.ErrNotExist)
}

// setFrozen writes or removes the flag, to last over a crash of the machine.
func setFrozen(p paths, service string, frozen bool) error {
	path := p.frozenFlag(service)
	if frozen {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return fmt.Errorf("cannot freeze: %w", err)
		}
		return writeFile(path, fmt.Appendln(nil, time.Now().UTC().Format(time.RFC3339)), 0o600)
	}
	if err := os.Remove(path); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("cannot thaw: %w", err)
	}
	return syncFolder(filepath.Dir(path))
}

// bootID tells this boot of the machine from others.
var bootID = sync.OnceValue(func() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // without it, all is of one boot
	return string(bytes.TrimSpace(id))
})
