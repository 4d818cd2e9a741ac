// process.go: running other programs. Each in its own process group, watched
// by pidfd, so that "ended" is never said of another process that got the
// same number, and nothing that it forked into its group outlives it.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// runner runs argv to its end, or to ctx's, without a shell, and returns its
// exit status. An error tells that it could not be run, or did not end by
// itself. What it prints goes to the writers.
type runner func(ctx context.Context, argv []string, stdout, stderr io.Writer) (exit int, err error)

// outputDelay is how long an ended command's output is awaited when a process
// that left its group still holds the pipe.
const outputDelay = 100 * time.Millisecond

func runCommand(ctx context.Context, argv []string, stdout, stderr io.Writer) (int, error) {
	pidfd := -1
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, PidFD: &pidfd}
	cmd.WaitDelay = outputDelay
	if err := cmd.Start(); err != nil {
		return -1, fmt.Errorf("cannot run %s: %w", argv[0], err)
	}
	waited := waitProcess(ctx, pidfd)
	// Not reaped yet, so its number, and its group's, are still its own.
	unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	err := cmd.Wait()
	if waited != nil {
		return -1, fmt.Errorf("%s did not end in time and was killed: %w", argv[0], waited)
	}
	if exited := new(exec.ExitError); errors.As(err, &exited) && exited.ExitCode() < 0 {
		return -1, fmt.Errorf("%s was ended by a signal: %w", argv[0], err)
	} else if err != nil && exited.ProcessState == nil && !errors.Is(err, exec.ErrWaitDelay) {
		return -1, fmt.Errorf("cannot read the output of %s: %w", argv[0], err)
	}
	return cmd.ProcessState.ExitCode(), nil
}

// waitProcess returns nil when the process of pidfd has ended, or the cause
// of ctx's end. It closes pidfd.
func waitProcess(ctx context.Context, pidfd int) error {
	if pidfd < 0 {
		return errors.New("this kernel has no pidfd (Linux 5.4)")
	}
	if err := unix.SetNonblock(pidfd, true); err != nil {
		return fmt.Errorf("cannot watch a process: %w", err)
	}
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
	limit   int
	kept    []byte
	dropped int
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	n := min(len(p), b.limit-len(b.kept))
	b.kept = append(b.kept, p[:n]...)
	b.dropped += len(p) - n
	return len(p), nil
}
