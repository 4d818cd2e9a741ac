// app.go: the driver of apps: programs that agentd supervises itself (exec),
// and those that have commands or a script to start, stop and check them.

package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

type appDriver struct{}

// program is a supervised program. It is known to have ended when its pidfd
// is readable, by whatever daemon it was started.
type program struct {
	record   programRecord
	child    *exec.Cmd     // unless an earlier daemon started it
	ended    chan struct{} // closed when it has
	stopping atomic.Bool   // its end is no news
}

// programRecord tells a program from another that gets its number later.
type programRecord struct {
	Boot  string `json:"boot"`
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after the boot (proc(5))
	ID    string `json:"id"`    // its marker
}

func (appDriver) start(ctx context.Context, in *instance, r *resource) error {
	switch {
	case r.exec != nil:
		return in.startProgram(ctx, r)
	case r.script != nil:
		return in.mustRun(ctx, r, verbStart, append(r.script[:len(r.script):len(r.script)], "start"))
	}
	if err := in.mustRun(ctx, r, verbStart, r.start); err != nil {
		return err
	}
	return in.awaitCheck(ctx, r, r.timeoutOf(verbStart, 0), statusUp)
}

func (appDriver) stop(ctx context.Context, in *instance, r *resource) error {
	switch {
	case r.exec != nil:
		return in.stopProgram(ctx, r)
	case r.script != nil:
		return in.mustRun(ctx, r, verbStop, append(r.script[:len(r.script):len(r.script)], "stop"))
	}
	if err := in.mustRun(ctx, r, verbStop, r.stop); err != nil {
		return err
	}
	return in.awaitCheck(ctx, r, r.timeoutOf(verbStop, 0), statusDown)
}

func (appDriver) check(ctx context.Context, in *instance, r *resource) (status, string) {
	argv := r.check
	if r.exec != nil {
		if state, note := in.programState(r.rid); state != statusUp || argv == nil {
			return state, note
		}
	}
	if r.script != nil {
		argv = append(r.script[:len(r.script):len(r.script)], "status")
	}
	result, err := in.run(ctx, r, resourceCommand{argv: argv, timeout: r.timeoutOf("", 0), quiet: true})
	if r.exec != nil {
		if state, note := in.programState(r.rid); state != statusUp {
			return state, note // it ended meanwhile
		}
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return statusDown, err.Error() // its file system is not there, or it was never installed
	case err != nil:
		return statusWarn, "check: " + err.Error()
	case result.exit == 0:
		return statusUp, ""
	case r.exec != nil:
		return statusWarn, fmt.Sprintf("runs, but check says exit status %d%s", result.exit, saying(result.output))
	case r.script != nil && result.exit == 4:
		return statusUndef, "status: exit status 4, unknown (LSB)" + saying(result.output)
	}
	if said := saying(result.output); said != "" || result.exit != 1 && result.exit != 3 { // 3 is what LSB has for it
		return statusDown, fmt.Sprintf("exit status %d%s", result.exit, said)
	}
	return statusDown, ""
}

// faults looks for programs that are not there, unless an earlier resource
// may bring them.
func (appDriver) faults(s *service, r *resource, mounted bool) (faults []error) {
	if mounted {
		return nil
	}
	for key, argv := range map[string][]string{"exec": r.exec, "start": r.start, "stop": r.stop, "check": r.check, "script": r.script} {
		if argv == nil {
			continue
		}
		if _, err := exec.LookPath(argv[0]); err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", s.at(r.rid, key), err))
		}
	}
	return faults
}

// mustRun runs a command whose exit status 0 alone is success.
func (in *instance) mustRun(ctx context.Context, r *resource, v verb, argv []string) error {
	result, err := in.run(ctx, r, resourceCommand{argv: argv, timeout: r.timeoutOf(v, 0)})
	if err == nil && result.exit != 0 {
		err = fmt.Errorf("%s: exit status %d%s", argv[0], result.exit, saying(result.output))
	}
	return err
}

// awaitCheck waits until the check agrees with what a command claimed: some
// return before they are done, and some lie.
func (in *instance) awaitCheck(ctx context.Context, r *resource, within time.Duration, want status) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("not %s within %s", want, within))
	defer cancel()
	for pause := checkPause; ; pause = min(2*pause, time.Second) {
		state, note := appDriver{}.check(ctx, in, r)
		if state == want {
			return nil
		}
		if p := in.programOf(r.rid); r.exec != nil && want == statusUp && p == nil {
			return errors.New(note)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; its check says %s%s", context.Cause(ctx), state, saying(note))
		case <-time.After(pause):
		}
	}
}

func (in *instance) recordPath(rid string) string {
	return filepath.Join(in.paths.instanceRun(in.name()), rid+".program")
}

func (in *instance) programOf(rid string) *program {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.programs[rid]
}

func (in *instance) programState(rid string) (status, string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.programs[rid] != nil {
		return statusUp, ""
	}
	return statusDown, in.ends[rid]
}

// startProgram starts a supervised program, and waits for its check if it has
// one.
func (in *instance) startProgram(ctx context.Context, r *resource) error {
	if in.programOf(r.rid) != nil {
		return nil
	}
	out, err := in.output(r.rid)
	if err != nil {
		return err
	}
	record := programRecord{Boot: bootID(), ID: rand.Text()}
	if err := in.noteCommand(record.ID); err != nil { // should the daemon die before the record is written
		return err
	}
	cmd, err := in.launch(r, resourceCommand{argv: r.exec}, record.ID, out.f)
	if err != nil {
		return err
	}
	record.Pid = cmd.Process.Pid
	p, err := in.take(r.rid, record, cmd)
	if err != nil {
		unix.Kill(-record.Pid, unix.SIGKILL)
		return errors.Join(err, waitChild(cmd))
	}
	in.log(slog.LevelInfo, r.rid, fmt.Sprintf("process %d", p.record.Pid))
	if r.check != nil {
		return in.awaitCheck(ctx, r, r.timeoutOf(verbStart, 0), statusUp)
	}
	return nil
}

// take begins to supervise the process of a record. It is an error if that
// process is no more, or another one has its number.
func (in *instance) take(rid string, record programRecord, child *exec.Cmd) (*program, error) {
	pidfd, err := unix.PidfdOpen(record.Pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("cannot watch process %d: %w", record.Pid, err)
	}
	// Behind the pidfd now is one process for good; is it the one meant?
	start, err := processStart(record.Pid)
	switch {
	case child != nil:
		err = nil // not waited for: its number is its own, even if it has ended already
	case err == nil && start != record.Start:
		err = fmt.Errorf("process %d is another one by now", record.Pid)
	}
	if record.Start = start; err == nil && child != nil {
		var data []byte
		if data, err = json.Marshal(record); err == nil {
			err = replaceFile(in.recordPath(rid), data)
		}
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(pidfd))
	}
	p := &program{record: record, child: child, ended: make(chan struct{})}
	in.mu.Lock()
	in.programs[rid] = p
	in.mu.Unlock()
	in.seen(rid, statusUp, "") // before its end can be seen
	in.jobs.Go(func() { in.watchProgram(rid, p, pidfd) })
	return p, nil
}

// takeUp finds the program that an earlier daemon started.
func (in *instance) takeUp(rid string) {
	data, _, err := readRegular(in.recordPath(rid), 1<<16)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var record programRecord
	if err == nil {
		err = json.Unmarshal(data, &record)
	}
	if err == nil && record.Boot != bootID() {
		err = errors.New("it was of an earlier boot of this machine")
	}
	if err == nil {
		_, err = in.take(rid, record, nil)
	}
	if err == nil {
		in.log(slog.LevelInfo, rid, fmt.Sprintf("process %d taken up again", record.Pid))
		return
	}
	if record.ID != "" && record.Boot == bootID() {
		killMarked(record.ID) // what it left
	}
	in.mu.Lock()
	in.ends[rid] = "it ended while no daemon ran"
	in.mu.Unlock()
	in.log(slog.LevelWarn, rid, "the program that ran is not taken up again: "+err.Error())
	os.Remove(in.recordPath(rid))
}

// watchProgram tells the end of a program at once. It does not end it when
// the daemon ends.
func (in *instance) watchProgram(rid string, p *program, pidfd int) {
	if waitPidfd(in.ctx, pidfd) != nil {
		if p.child != nil {
			go waitChild(p.child) // whoever takes it up again is not told that it is this process's child
		}
		return
	}
	how := "ended"
	if p.child != nil {
		unix.Kill(-p.record.Pid, unix.SIGKILL) // not reaped: the number is its own
		if err := waitChild(p.child); err != nil {
			how = "ended: " + err.Error()
		} else {
			how = "ended with exit status 0"
		}
	}
	killMarked(p.record.ID) // what it left would be in the next one's way
	os.Remove(in.recordPath(rid))
	in.mu.Lock()
	delete(in.programs, rid)
	in.ends[rid] = how
	in.mu.Unlock()
	in.log(slog.LevelInfo, rid, fmt.Sprintf("process %d %s", p.record.Pid, how))
	if !p.stopping.Load() {
		in.seen(rid, statusDown, how)
	}
	close(p.ended)
}

// stopProgram asks the program's group to end, and kills what has not in time.
func (in *instance) stopProgram(ctx context.Context, r *resource) error {
	p := in.programOf(r.rid)
	if p == nil {
		return nil
	}
	within := in.stopWithin(r)
	late := time.After(within)
	p.stopping.Store(true)
	defer p.stopping.Store(false)
	if r.stop != nil {
		asked, cancel := context.WithTimeout(ctx, within)
		defer cancel()
		if err := in.mustRun(asked, r, verbStop, r.stop); err != nil {
			in.log(slog.LevelWarn, r.rid, "stop: "+err.Error())
		}
	} else {
		p.signal(unix.SIGTERM)
	}
	select {
	case <-p.ended:
		return nil
	case <-late:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	in.log(slog.LevelWarn, r.rid, fmt.Sprintf("process %d did not end within %s and is killed", p.record.Pid, within))
	p.signal(unix.SIGKILL)
	killMarked(p.record.ID)
	select {
	case <-p.ended:
		return nil
	case <-time.After(killDelay):
		return fmt.Errorf("process %d does not end, not even by SIGKILL: it hangs in the kernel", p.record.Pid)
	}
}

// stopWithin is how long a program may take to end before it is killed.
func (in *instance) stopWithin(r *resource) time.Duration {
	in.mu.Lock()
	defer in.mu.Unlock()
	within := r.timeoutOf(verbStop, 0)
	if in.within > 0 {
		within = min(within, in.share)
	}
	return within
}

// signal sends to the program's group, unless its number is another's by now.
func (p *program) signal(sig unix.Signal) {
	if start, err := processStart(p.record.Pid); err == nil && start == p.record.Start {
		unix.Kill(-p.record.Pid, sig) // an error means that it has ended
	}
}
