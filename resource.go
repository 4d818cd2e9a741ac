// resource.go: what the drivers of resources have in common, and how they run
// commands: bounded, logged, and noted down for the case of a crash. A driver
// starts, stops and checks one kind of resource (app.go, ocf.go, systemd.go).

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// driver is one kind of resource. Its methods are called for one resource one
// at a time.
type driver interface {
	// start returns nil when r is up; else why it is not, and r may be up in
	// part, so that stop is called.
	start(ctx context.Context, in *instance, r *resource) error
	// stop returns nil when r is down. It is called whatever state r is in.
	stop(ctx context.Context, in *instance, r *resource) error
	// check tells the state of r, and in a few words why it is not up.
	check(ctx context.Context, in *instance, r *resource) (status, string)
	// faults tells what would keep r from running on this node. mounted: an
	// earlier resource may bring files that are not there yet.
	faults(s *service, r *resource, mounted bool) []error
}

var drivers = map[string]driver{"app": appDriver{}, "ocf": &ocfDriver{}, "systemd": systemdDriver{}}

// resourceCommand is one run of a program for a resource.
type resourceCommand struct {
	argv    []string
	env     []string      // beside what every command gets
	timeout time.Duration // after which it is killed, with all that it started
	quiet   bool          // a check: what it prints is not logged
}

// commandResult is how a command ended by itself.
type commandResult struct {
	exit   int
	output string // the first commandOutput bytes of stdout and stderr
}

// commandRunner runs a command for a resource; instance.execute does.
type commandRunner func(ctx context.Context, r *resource, c resourceCommand) (commandResult, error)

// execute runs a command in a session of its own. Its output goes to the
// resource's file, not to a pipe: what it leaves running may go on writing
// there when it, or the daemon, has ended. An error tells that it could not be
// run, was ended by a signal, or did not end in time.
func (in *instance) execute(ctx context.Context, r *resource, c resourceCommand) (commandResult, error) {
	if ctx.Err() != nil {
		return commandResult{}, context.Cause(ctx) // not begun only to be killed: it may be a stop
	}
	id := rand.Text()
	var sink io.Writer
	var printed func() string
	out, err := in.prepare(r, c, id)
	if err != nil {
		return commandResult{}, err
	}
	if out == nil {
		buffer := &boundedBuffer{limit: commandOutput}
		sink, printed = buffer, func() string { text, _ := buffer.text(); return text }
	} else {
		out.begin()
		sink, printed = out.f, out.end
	}
	cmd, err := in.launch(r, c, id, sink)
	if err != nil {
		printed()
		return commandResult{}, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, fmt.Errorf("did not end within %s and was killed", c.timeout))
	defer cancel()
	late := waitProcess(ctx, cmd.Process.Pid)
	if late != nil && !endSession(cmd, id) {
		printed()
		return commandResult{}, fmt.Errorf("%s %w, but it hangs in the kernel", c.argv[0], late)
	}
	err = waitChild(cmd)
	result := commandResult{cmd.ProcessState.ExitCode(), printed()}
	switch {
	case late != nil:
		return result, fmt.Errorf("%s %w%s", c.argv[0], late, saying(result.output))
	case err != nil && result.exit < 0:
		return result, fmt.Errorf("%s was ended by a signal: %w", c.argv[0], err)
	}
	return result, nil
}

// prepare notes a command down and returns the file of its output; none for a
// check. A stop is done on a disk that takes neither.
func (in *instance) prepare(r *resource, c resourceCommand, id string) (*output, error) {
	if c.quiet {
		return nil, nil
	}
	out, err := in.output(r.rid)
	err = errors.Join(err, in.noteCommand(id))
	if err != nil && in.doing() == verbStop {
		in.log(slog.LevelWarn, r.rid, err.Error())
		return out, nil
	}
	return out, err
}

// endSession kills a command with all that it started, and tells whether it
// has ended. One that hangs in the kernel is reaped whenever that ends.
func endSession(cmd *exec.Cmd, id string) bool {
	unix.Kill(-cmd.Process.Pid, unix.SIGKILL) // not reaped: the number is its own
	killMarked(id)
	killed, cancel := context.WithTimeout(context.Background(), killDelay)
	defer cancel()
	if waitProcess(killed, cmd.Process.Pid) != nil {
		go waitChild(cmd)
		return false
	}
	return true
}

// launch starts a program for a resource in a session of its own. id marks it
// and its descendants for killMarked.
func (in *instance) launch(r *resource, c resourceCommand, id string, out io.Writer) (*exec.Cmd, error) {
	cmd := exec.Command(c.argv[0], c.argv[1:]...)
	cmd.Env = append(append(in.environment(r), c.env...), marker+id)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = outputDelay
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := startChild(cmd); err != nil {
		return nil, fmt.Errorf("cannot run %s: %w", c.argv[0], err)
	}
	// The kernel shall not spare a service because it spares the daemon.
	os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", cmd.Process.Pid), []byte("0"), 0)
	return cmd, nil
}

// environment is what a command of a resource gets: the path, the folders,
// who it is for, and nothing else of the daemon's own.
func (in *instance) environment(r *resource) []string {
	path := os.Getenv("PATH")
	for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if !slices.Contains(filepath.SplitList(path), dir) {
			path = strings.TrimPrefix(path+":"+dir, ":")
		}
	}
	env := []string{
		"PATH=" + path, "OSVCETC=" + in.paths.etc, "OSVCVAR=" + in.paths.lib, "OSVCLOG=" + in.paths.log, "OSVCRUN=" + in.paths.run,
		"OSVC_SVCNAME=" + in.name(), "OSVC_RID=" + r.rid, "OSVC_NODENAME=" + in.node,
	}
	for _, name := range []string{"HOME", "LANG", "TZ", "OCF_ROOT"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// timeoutOf is how long a verb may take; otherwise is what the driver knows,
// or 0.
func (r *resource) timeoutOf(v verb, otherwise time.Duration) time.Duration {
	own := map[verb]time.Duration{verbStart: r.startTimeout, verbStop: r.stopTimeout}[v]
	for _, d := range []time.Duration{own, r.timeout, otherwise} {
		if d > 0 {
			return d
		}
	}
	return defaultTimeout
}
