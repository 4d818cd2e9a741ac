// deadline.go: what the daemon leaves in OSVCRUN for the guard (guard.go), and
// its handle on it: the goroutine of the core writes, another one keeps a guard
// running and tells whether it lives.
//
// guard.held is the list of what is held, written when it changes.
// guard.deadline is the common deadline, which moves several times a second:
// one write in place, which a full disk does not refuse. It counts only under
// the mark of the list that is there; until there is one, the deadline in the
// list does. So a list changes together with its deadline, by one rename, and
// a crash between two writes gives no instance more time than it has.

package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// guardSettings is what the guard must know of the configuration.
type guardSettings struct {
	Node     string        `json:"node"`
	Timeout  time.Duration `json:"timeout"` // the largest hb#N.timeout
	Grace    time.Duration `json:"grace"`   // cluster.quorum_grace
	Action   string        `json:"action"`  // cluster.quorum_action
	Watchdog string        `json:"watchdog,omitempty"`
}

// interval is the time between two signs of life of the guard.
func (s guardSettings) interval() time.Duration {
	if s.Timeout <= 0 {
		return guardIntervalMost
	}
	return min(max(s.Timeout/4, guardIntervalLeast), guardIntervalMost)
}

// guardList is guard.held.
type guardList struct {
	Boot     string                `json:"boot"`
	Mark     uint64                `json:"mark"` // random: another one for each list
	Held     []string              `json:"held"`
	Own      map[string]leaseClock `json:"own,omitempty"` // deadlines of those that have their own
	Deadline leaseClock            `json:"deadline"`      // of the others, when this was written
	Settings guardSettings         `json:"settings"`
	Daemon   process               `json:"daemon"`
}

// process is told from a later one with its number by the time of its start
// (processStart).
type process struct {
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"`
}

func thisProcess() (p process, err error) {
	p.Pid = os.Getpid()
	p.Start, err = processStart(p.Pid)
	return p, err
}

// born is when it began, by CLOCK_BOOTTIME, in the kernel's hundredths of a second.
func (p process) born() time.Duration { return time.Duration(p.Start) * 10 * time.Millisecond }

func (p process) alive() bool {
	start, err := processStart(p.Pid)
	return err == nil && start == p.Start
}

func (p process) kill() {
	if pidfd, err := unix.PidfdOpen(p.Pid, 0); err == nil {
		if p.alive() { // it is this one that is behind the descriptor
			unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		}
		unix.Close(pidfd)
	}
}

// A leaseClock is kept as [raw, boot], in ns. What is missing of it is 0, and
// has come long ago.
func (t leaseClock) MarshalJSON() ([]byte, error) {
	return json.Marshal([2]time.Duration{t.raw, t.boot})
}

func (t *leaseClock) UnmarshalJSON(data []byte) error {
	var both [2]time.Duration
	err := json.Unmarshal(data, &both)
	t.raw, t.boot = both[0], both[1]
	return err
}

func (p paths) guardHeld() string     { return filepath.Join(p.run, "guard.held") }
func (p paths) guardDeadline() string { return filepath.Join(p.run, "guard.deadline") }

// heldText is the text of a service's file as it is in force: the guard needs
// it when the file is broken or gone.
func (p paths) heldText(service string) string { return filepath.Join(p.instanceRun(service), "conf") }

// keepText keeps the service's text for the guard.
func (in *instance) keepText() error {
	if err := replaceFile(in.paths.heldText(in.name()), []byte(in.spec().doc.String())); err != nil {
		return fmt.Errorf("cannot keep the service's text for the guard: %w", err)
	}
	return nil
}

// until is when the instance has to be stopped.
func (l guardList) until(service string) leaseClock {
	if own, ok := l.Own[service]; ok {
		return own
	}
	return l.Deadline
}

// readGuardList reads the list, with the common deadline as it is now. It is
// empty where there is none of this boot. before is what was read earlier: its
// deadline counts while the file of the deadline does not read.
func readGuardList(p paths, before guardList) (guardList, error) {
	data, _, err := readRegular(p.guardHeld(), guardListSize)
	var l guardList
	if err == nil {
		err = json.Unmarshal(data, &l)
	}
	if err == nil && l.Boot != bootID() {
		return guardList{}, nil
	}
	for _, name := range l.Held {
		err = errors.Join(err, checkServiceName(name))
	}
	if err == nil && l.Settings.Grace <= 0 {
		err = fmt.Errorf("a grace of %s", l.Settings.Grace)
	}
	if err != nil {
		return guardList{}, fmt.Errorf("cannot tell what the guard shall stop: %w", err)
	}
	if l.Mark == before.Mark {
		l.Deadline = before.Deadline
	}
	return l.refreshed(p), nil
}

// refreshed is the list with its deadline as it is now.
func (l guardList) refreshed(p paths) guardList {
	if w, err := readWords(p.guardDeadline(), 3); err == nil && w[0] == l.Mark {
		l.Deadline = leaseClock{time.Duration(w[1]), time.Duration(w[2])}
	}
	return l
}

// openGuardState tells what an earlier daemon of this boot held, and until
// when. Where there is no list, nothing is held.
func openGuardState(p paths) (map[string]leaseClock, error) {
	l, err := readGuardList(p, guardList{})
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	held := map[string]leaseClock{}
	for _, name := range l.Held {
		held[name] = l.until(name)
	}
	return held, err
}

// writeWords writes a small record in place: numbers, and a sum that shows
// what is read in the middle of a write.
func writeWords(f *os.File, words ...uint64) error {
	var record []byte
	for _, w := range words {
		record = binary.BigEndian.AppendUint64(record, w)
	}
	_, err := f.WriteAt(binary.BigEndian.AppendUint32(record, crc32.ChecksumIEEE(record)), 0)
	return err
}

// readWords reads a record of n words, and again if it is just being written.
func readWords(path string, n int) ([]uint64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	record := make([]byte, 8*n+4)
	for range tornReads {
		if _, err := f.ReadAt(record, 0); err != nil {
			return nil, err
		}
		if crc32.ChecksumIEEE(record[:8*n]) != binary.BigEndian.Uint32(record[8*n:]) {
			continue
		}
		words := make([]uint64, n)
		for i := range words {
			words[i] = binary.BigEndian.Uint64(record[8*i:])
		}
		return words, nil
	}
	return nil, fmt.Errorf("%s is damaged", path)
}

// ---- The daemon's handle ----------------------------------------------------

// guardHandle is how the daemon reaches the guard. keep is for the goroutine
// of the core, run has one of its own.
type guardHandle struct {
	paths  paths
	log    *slog.Logger
	report func(alive bool) // hears of each change, on run's goroutine
	start  func(ctx context.Context) error

	mu     sync.Mutex
	file   *os.File  // guard.deadline; nil: to be opened
	list   guardList // as it was written; Mark 0: none was
	failed bool      // the last list was not written

	told bool // run's: what report was told last
}

// openGuard makes the handle, and takes over what an earlier daemon left: the
// guard must know which process it may have to kill.
func openGuard(p paths, log *slog.Logger, report func(alive bool)) (*guardHandle, map[string]leaseClock) {
	h := &guardHandle{paths: p, log: log, report: report}
	h.start = func(ctx context.Context) error { return startGuard(ctx, p) }
	held, err := openGuardState(p)
	if err == nil && len(held) > 0 {
		h.list, _ = readGuardList(p, guardList{}) // as just now
		err = h.write(guardEffect{h.list.Held, h.list.Deadline, h.list.Own}, h.list.Settings)
	}
	if err != nil {
		log.Error("what an earlier daemon left for the guard is not taken over", "err", err)
	}
	return h, held
}

// close is called when neither keep nor run will be any more.
func (h *guardHandle) close() {
	if h.file != nil {
		h.file.Close()
	}
}

// keep tells the guard what is held, and until when. It is in force when keep
// returns without an error; with one, what is held anew must not be started.
func (h *guardHandle) keep(e guardEffect, s guardSettings) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := &h.list
	if h.failed || h.file == nil || l.Mark == 0 || s != l.Settings || !slices.Equal(e.held, l.Held) || !maps.Equal(e.own, l.Own) {
		err := h.write(e, s)
		if h.failed = err != nil; h.failed {
			h.extendOld(e)
		}
		return err
	}
	return h.extend(e.deadline)
}

// write replaces the list.
func (h *guardHandle) write(e guardEffect, s guardSettings) error {
	for _, name := range e.held {
		if !slices.Contains(h.list.Held, name) {
			if _, err := os.Stat(h.paths.heldText(name)); err != nil {
				return fmt.Errorf("the guard could not stop %s: %w", name, err)
			}
		}
	}
	l := guardList{Boot: bootID(), Mark: mathrand.Uint64() | 1, Held: slices.Clone(e.held), Own: maps.Clone(e.own), Deadline: e.deadline, Settings: s}
	var err error
	if l.Daemon, err = thisProcess(); err != nil {
		return err
	}
	// The record is there before the list, so that a disk which is full later
	// does not hinder it.
	if err := h.open(); err != nil {
		return err
	}
	data, err := json.Marshal(l)
	if err == nil {
		err = replaceFile(h.paths.guardHeld(), data)
	}
	if err != nil {
		return fmt.Errorf("cannot tell the guard what is held: %w", err)
	}
	h.list = l
	return h.extend(e.deadline)
}

func (h *guardHandle) open() (err error) {
	if h.file != nil {
		return nil
	}
	path := h.paths.guardDeadline()
	if err = os.MkdirAll(filepath.Dir(path), 0o700); err == nil {
		h.file, err = os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	}
	if err == nil {
		if _, readErr := h.file.ReadAt([]byte{0}, 0); readErr != nil { // an earlier daemon's is left as it is
			err = writeWords(h.file, 0, 0, 0)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot keep the guard's deadline: %w", err)
	}
	return nil
}

func (h *guardHandle) extend(t leaseClock) error {
	if err := writeWords(h.file, h.list.Mark, uint64(t.raw), uint64(t.boot)); err != nil {
		return fmt.Errorf("cannot keep the guard's deadline: %w", err)
	}
	return nil
}

// extendOld moves the deadline of the list that could not be replaced: not
// beyond that of any instance to which it applies.
func (h *guardHandle) extendOld(e guardEffect) {
	t, found := leaseClock{}, false
	for _, name := range h.list.Held {
		if _, own := h.list.Own[name]; own || !slices.Contains(e.held, name) {
			continue
		}
		until := e.deadline
		if own, ok := e.own[name]; ok {
			until = own
		}
		if found {
			until = leaseClock{min(t.raw, until.raw), min(t.boot, until.boot)}
		}
		t, found = until, true
	}
	if found && h.file != nil {
		h.extend(t) // an error means that the guard stops them too soon
	}
}

// look tells the interval, and whether the files are sound; those that are gone
// are written anew by the next keep.
func (h *guardHandle) look() (interval time.Duration, sound bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.list.Mark != 0 && h.file != nil {
		there, err := os.Stat(h.paths.guardDeadline())
		ours, ourErr := h.file.Stat()
		_, listErr := os.Stat(h.paths.guardHeld())
		if errors.Join(err, ourErr, listErr) != nil || !os.SameFile(there, ours) {
			h.file.Close()
			h.file, h.list.Mark = nil, 0
		}
	}
	return h.list.Settings.interval(), !h.failed && h.list.Mark != 0
}

// run keeps a guard running until ctx ends. The guard goes on after that.
func (h *guardHandle) run(ctx context.Context) {
	for failures := 1; ; failures++ {
		begun := time.Now()
		err := h.attend(ctx)
		h.tell(false)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begun) >= settled {
			failures = 1
		}
		delay := restartDelay(failures)
		h.log.Error("the guard does not run and is started again", "err", err, "delay", delay)
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay):
		}
	}
}

func (h *guardHandle) tell(alive bool) {
	if alive != h.told {
		h.told = alive
		h.report(alive)
	}
}

// attend finds or starts a guard, and looks after it to its end.
func (h *guardHandle) attend(ctx context.Context) error {
	guard, err := h.find()
	if errors.Is(err, os.ErrNotExist) {
		guard, err = h.startAndFind(ctx)
	}
	if err != nil {
		return err
	}
	pidfd, err := unix.PidfdOpen(guard.Pid, unix.PIDFD_NONBLOCK)
	if err == nil && !guard.alive() {
		err = errors.Join(unix.ESRCH, unix.Close(pidfd))
	}
	if err != nil {
		return fmt.Errorf("cannot watch the guard: %w", err)
	}
	h.log.Info("the guard runs", "pid", guard.Pid)
	watching, cancel := context.WithCancel(ctx)
	end, ended := error(nil), make(chan struct{})
	go func() {
		defer close(ended)
		end = waitPidfd(watching, pidfd)
	}()
	defer func() {
		cancel()
		<-ended
	}()
	for last := time.Now(); ; {
		interval, sound := h.look()
		alive := h.fresh(guard, interval)
		h.tell(alive && sound)
		if alive {
			last = time.Now()
		} else if time.Since(last) > guardHangs {
			h.log.Error("the guard does not answer and is killed", "pid", guard.Pid)
			guard.kill() // nobody else gets its lock
			last = time.Now()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ended:
			return cmp.Or(end, errors.New("it ended"))
		case <-time.After(interval):
		}
	}
}

// fresh tells whether the guard has given a sign of life lately.
func (h *guardHandle) fresh(guard process, interval time.Duration) bool {
	w, err := readWords(h.paths.lockFile("guard"), 3)
	return err == nil && int(w[0]) == guard.Pid && readLeaseClock().raw-time.Duration(w[2]) <= 3*interval
}

// find returns the guard that runs: it wrote into its lock who it is.
// os.ErrNotExist: there is none.
func (h *guardHandle) find() (guard process, err error) {
	w, err := readWords(h.paths.lockFile("guard"), 3)
	if err != nil {
		return guard, os.ErrNotExist
	}
	if guard = (process{int(w[0]), w[1]}); !guard.alive() {
		return guard, os.ErrNotExist
	}
	own, err := os.Stat(selfBinary)
	its, itsErr := os.Stat(fmt.Sprintf("/proc/%d/exe", guard.Pid))
	if err == nil && itsErr == nil && !os.SameFile(own, its) {
		h.log.Info("the guard is another version, and is replaced", "pid", guard.Pid)
		guard.kill()
		return guard, os.ErrNotExist
	}
	return guard, nil
}

func (h *guardHandle) startAndFind(ctx context.Context) (guard process, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, guardStarts, errors.New("it gives no sign of life"))
	defer cancel()
	if err := h.start(ctx); err != nil {
		return guard, fmt.Errorf("cannot start the guard: %w", err)
	}
	for again := time.Tick(answerPause); ; {
		if guard, err = h.find(); err == nil {
			return guard, nil
		}
		select {
		case <-ctx.Done():
			return guard, fmt.Errorf("cannot start the guard: %w", context.Cause(ctx))
		case <-again:
		}
	}
}

// startGuard starts a guard that is nobody's child: it outlives the daemon, and
// the next one looks after it as this one does.
func startGuard(ctx context.Context, p paths) error {
	said := &boundedBuffer{limit: commandOutput}
	env := []string{"OSVCETC=" + p.etc, "OSVCVAR=" + p.lib, "OSVCLOG=" + p.log, "OSVCRUN=" + p.run}
	exit, err := runCommandWith(ctx, env, []string{selfBinary, "guard", "--detach"}, said, said)
	if text, _ := said.text(); err == nil && exit != 0 {
		err = fmt.Errorf("exit status %d%s", exit, saying(text))
	}
	return err
}

// selfBinary is the binary that runs, whatever is installed by now: guard and
// daemon are of one version.
const selfBinary = "/proc/self/exe"
