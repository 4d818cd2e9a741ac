// process.go: running other programs. Each in its own process group, watched
// by pidfd, so that "ended" is never said of another process that got the
// same number, and nothing that it forked into its group outlives it.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// startChild starts cmd, and waitChild waits for it: no child is started
// otherwise, so that the reaper of orphans, which works where agentd is the
// first process of its container, leaves the others alone.
func startChild(cmd *exec.Cmd) error {
	children.Lock()
	defer children.Unlock()
	err := cmd.Start()
	if err == nil {
		children.pids[cmd.Process.Pid] = true
	}
	return err
}

func waitChild(cmd *exec.Cmd) error {
	err := cmd.Wait()
	children.Lock()
	defer children.Unlock()
	delete(children.pids, cmd.Process.Pid)
	return err
}

var children = struct {
	sync.Mutex
	pids map[int]bool
}{pids: map[int]bool{}}

// reapOrphans takes the processes that ended and whose parent is gone, as
// process 1 must: a stop script that waits for them waits in vain otherwise.
// It returns when ctx ends.
func reapOrphans(ctx context.Context, ended <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-ended:
		case <-time.After(time.Second): // a signal may stand for several
		}
		eachPid(func(pid int) {
			children.Lock()
			defer children.Unlock()
			if stat := processStat(pid); stat != nil && stat[statState] == "Z" && stat[statParent] == "1" && !children.pids[pid] {
				unix.Wait4(pid, nil, unix.WNOHANG, nil)
			}
		})
	}
}

// Fields of /proc/<pid>/stat (proc(5)), counted behind the command's name.
const (
	statState  = 0
	statParent = 1
	statStart  = 19 // clock ticks after the boot
)

// eachPid calls f with the number of every process.
func eachPid(f func(pid int)) {
	entries, _ := os.ReadDir("/proc") // without it, there is none to see
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			f(pid)
		}
	}
}

func processStat(pid int) []string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) <= statStart {
		return nil
	}
	return fields
}

// processStart tells when a process started, which tells it apart from
// another that has its number. One that has ended is none.
func processStart(pid int) (uint64, error) {
	stat := processStat(pid)
	if stat == nil || stat[statState] == "Z" {
		return 0, fmt.Errorf("there is no process %d", pid)
	}
	return strconv.ParseUint(stat[statStart], 10, 64)
}

// marker is the variable in the environment by which the processes that a
// command started are known, whatever session they are in.
const marker = "OSVC_RUN_ID="

// removeMark keeps a daemon that was started from a service's command from
// being killed with it. What a process was started with stays to be seen in
// /proc, so it starts itself once more.
func removeMark() error {
	name := strings.TrimSuffix(marker, "=")
	if _, marked := os.LookupEnv(name); !marked {
		return nil
	}
	os.Unsetenv(name)
	self, err := os.Executable()
	if err == nil {
		err = unix.Exec(self, os.Args, os.Environ())
	}
	return fmt.Errorf("cannot start agentd without %s: %w", name, err)
}

// killMarked kills the processes that bear a mark. To look at all processes
// takes a while, so calls that come at once share it.
func killMarked(id string) {
	sweeps.Lock()
	if sweeps.next == nil {
		sweeps.next = &sweep{ids: map[string]bool{}}
	}
	mine := sweeps.next
	mine.ids[id] = true
	sweeps.Unlock()
	mine.once.Do(func() {
		sweeps.one.Lock()
		defer sweeps.one.Unlock()
		sweeps.Lock()
		sweeps.next = nil // who comes from now on is for the next one
		sweeps.Unlock()
		mine.run()
	})
}

// sweep kills what bears any of its marks.
type sweep struct {
	ids  map[string]bool
	once sync.Once
}

var sweeps struct {
	sync.Mutex
	next *sweep     // that has not begun
	one  sync.Mutex // at a time
}

// run looks again until nothing is left: more may be forked meanwhile.
func (s *sweep) run() {
	for found, rounds := true, 0; found && rounds < 10; rounds++ {
		found = false
		eachPid(func(pid int) {
			if !s.marks(pid) {
				return
			}
			pidfd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				return
			}
			defer unix.Close(pidfd)
			if s.marks(pid) { // still the same process
				found = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0) == nil || found
			}
		})
	}
}

// marks tells whether a process bears one of the marks. One that has ended
// bears none.
func (s *sweep) marks(pid int) bool {
	environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)) // another user's cannot be ours
	for variable := range bytes.SplitSeq(environ, []byte{0}) {
		if id, found := bytes.CutPrefix(variable, []byte(marker)); found && s.ids[string(id)] {
			return true
		}
	}
	return false
}

// runner runs argv to its end, or to ctx's, without a shell, and returns its
// exit status. An error tells that it could not be run, or did not end by
// itself. What it prints goes to the writers.
type runner func(ctx context.Context, argv []string, stdout, stderr io.Writer) (exit int, err error)

// outputDelay is how long an ended command's output is awaited when a process
// that left its group still holds the pipe.
const outputDelay = 100 * time.Millisecond

func runCommand(ctx context.Context, argv []string, stdout, stderr io.Writer) (int, error) {
	return runCommandWith(ctx, nil, argv, stdout, stderr)
}

// runCommandWith is runCommand with variables beside those of this process.
func runCommandWith(ctx context.Context, env, argv []string, stdout, stderr io.Writer) (int, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = outputDelay
	if err := startChild(cmd); err != nil {
		return -1, fmt.Errorf("cannot run %s: %w", argv[0], err)
	}
	late := waitProcess(ctx, cmd.Process.Pid)
	// Not reaped yet, so its number, and its group's, are still its own.
	unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	if late != nil {
		killed, cancel := context.WithTimeout(context.Background(), killDelay)
		defer cancel()
		late = fmt.Errorf("%s did not end in time and was killed: %w", argv[0], late)
		if waitProcess(killed, cmd.Process.Pid) != nil {
			go waitChild(cmd) // it hangs in the kernel, and is reaped whenever that ends
			return -1, late
		}
	}
	err := waitChild(cmd)
	if late != nil {
		return -1, late
	}
	if exited := new(exec.ExitError); errors.As(err, &exited) && exited.ExitCode() < 0 {
		return -1, fmt.Errorf("%s was ended by a signal: %w", argv[0], err)
	} else if err != nil && exited.ProcessState == nil && !errors.Is(err, exec.ErrWaitDelay) {
		return -1, fmt.Errorf("cannot read the output of %s: %w", argv[0], err)
	}
	return cmd.ProcessState.ExitCode(), nil
}

// killDelay is how long a killed process may take to end.
const killDelay = 2 * time.Second

// waitProcess returns nil when the process has ended, or the cause of ctx's
// end. The process is a child that was not waited for, whose number nobody
// else can have.
func waitProcess(ctx context.Context, pid int) error {
	pidfd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("cannot watch process %d: %w", pid, err)
	}
	return waitPidfd(ctx, pidfd)
}

// waitPidfd is waitProcess for a descriptor that does not block; it closes it.
func waitPidfd(ctx context.Context, pidfd int) error {
	f := os.NewFile(uintptr(pidfd), "pidfd")
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("cannot watch a process: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err = raw.Read(func(fd uintptr) bool {
		ready, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && ready > 0
	})
	if ctx.Err() != nil && err != nil {
		return context.Cause(ctx)
	}
	return err
}

// boundedBuffer keeps the first limit bytes that are written to it, and counts
// the rest.
type boundedBuffer struct {
	limit int

	mu      sync.Mutex // a process that hangs may still write
	kept    []byte
	dropped int
}

func (b *boundedBuffer) text() (kept string, dropped int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.kept), b.dropped
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := min(len(p), b.limit-len(b.kept))
	b.kept = append(b.kept, p[:n]...)
	b.dropped += len(p) - n
	return len(p), nil
}
