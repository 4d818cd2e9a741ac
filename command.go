// command.go: the commands that work on files, on messages, and on the
// daemon's life. Those that show a status are show.go's.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// body is what a command does.
type body = func(ctx context.Context, p paths, args []string) error

// How long a command waits for the daemon. A shutdown takes as long as the
// services take to stop, each by its stop_timeout.
const (
	startTimeout    = 20 * time.Second
	endTimeout      = 20 * time.Second
	shutdownTimeout = time.Hour
	answerPause     = 10 * time.Millisecond // between two questions to a daemon that starts
)

// printRaw prints each frame as a line.
func printRaw(raw []byte, r replyJSON) error {
	var line bytes.Buffer
	if err := json.Compact(&line, raw); err != nil {
		return fmt.Errorf("the reply is not JSON: %w", err)
	}
	fmt.Println(line.String())
	if r.Status != 0 {
		return exitError{status: exitFailed}
	}
	return nil
}

// discard takes a reply of which only success matters.
func discard(_ []byte, r replyJSON) error {
	if r.Status != 0 {
		return replyError(r.Error)
	}
	return nil
}

func bindCall(flags *flag.FlagSet) body {
	node := flags.String("node", "", "ask the daemon of node `N`, sealed")
	return func(ctx context.Context, p paths, args []string) error {
		if len(args) == 0 {
			return usageError("agentd call: name an action; see agentd call --help")
		}
		options, err := encodeOptions(args[0], args[1:])
		if err != nil {
			return usageError("agentd call: %w", err)
		}
		if *node == "" {
			return askLocal(ctx, p, args[0], options, nil, printRaw)
		}
		return askNode(ctx, p, *node, args[0], options, printRaw)
	}
}

// encodeOptions reads key=value words by the types of the action's options.
func encodeOptions(name string, words []string) (map[string]json.RawMessage, error) {
	a, known := actions[name]
	options := map[string]json.RawMessage{}
	for _, word := range words {
		key, text, found := strings.Cut(word, "=")
		if !found {
			return nil, fmt.Errorf("%q is not key=value", word)
		}
		t, takes := a.options[key]
		if known && !takes {
			return nil, unknownOption(name, key)
		}
		encoded, err := t.encode(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		options[key] = encoded
	}
	return options, nil
}

// askNode asks a node in this node's name, with node.conf's secret.
func askNode(ctx context.Context, p paths, node, action string, options map[string]json.RawMessage, frame frameFunc) error {
	c, keys, err := loadIdentity(p)
	if err != nil {
		return err
	}
	if !c.isMember(node) {
		return fmt.Errorf("cannot ask %q: it is not in cluster.nodes (%s)", node, strings.Join(c.members(), " "))
	}
	ctx, frame, done := boundSilence(ctx, callTimeout, frame)
	defer done()
	a := caller{network: hostNetwork{}, cluster: c.text("cluster.name"), node: c.node, key: keys[0], now: func() int64 { return time.Now().UnixMilli() }}
	err = a.ask(ctx, c, node, action, options, frame)
	var exit exitError
	if kind := kindOf(err); !errors.As(err, &exit) && (kind == answerTimeout || kind == answerRefused || kind == answerUnresolved) {
		return exitError{exitTimeout, err}
	}
	return err
}

// loadIdentity reads who this node is, and the keys of its secrets.
func loadIdentity(p paths) (*config, []masterKey, error) {
	c, err := loadConfig(p)
	if err != nil {
		return nil, nil, err
	}
	if c.text("cluster.secret") == "" {
		return nil, nil, errors.New("node.conf: cluster.secret is missing; the first `nodemgr daemon start` makes one")
	}
	store := &keyStore{path: p.keys()}
	ring := newKeyring(store, c.text("cluster.name"), c.secrets())
	ring.derive(store)
	return c, ring.keys, ring.err
}

func bindSeal(flags *flag.FlagSet) body {
	to := flags.String("to", "", "the node that the request is for (default this node) `N`")
	return func(_ context.Context, p paths, _ []string) error {
		c, keys, err := loadIdentity(p)
		if err != nil {
			return err
		}
		text, err := io.ReadAll(io.LimitReader(os.Stdin, requestLimit))
		if err != nil {
			return fmt.Errorf("cannot read the request: %w", err)
		}
		written, err := parseRequestJSON(text)
		if err != nil {
			return err
		}
		if written.Time == nil {
			now := time.Now().UnixMilli()
			written.Time = &now
		}
		if *to != "" || written.To == "" {
			written.To = *to
		}
		if written.To == "" {
			written.To = c.node
		}
		message, err := json.Marshal(written)
		if err != nil {
			return fmt.Errorf("cannot seal the request: %w", err)
		}
		sealed, _ := seal(keys[0], messageContext{label: labelRequest, cluster: c.text("cluster.name"), node: c.node}, message)
		_, err = os.Stdout.Write(sealed)
		return err
	}
}

func bindOpen(*flag.FlagSet) body {
	return func(_ context.Context, p paths, _ []string) error {
		_, keys, err := loadIdentity(p)
		if err != nil {
			return err
		}
		in := bufio.NewReader(os.Stdin)
		frames := map[salt]uint64{} // the next one of each stream
		for count := 0; ; count++ {
			raw, err := in.ReadBytes(0)
			raw = bytes.Trim(raw, requestBlanks)
			if len(raw) == 0 && err != nil {
				if count == 0 {
					return errors.New("cannot open: there was no message on standard input; a daemon does not answer what it finds invalid")
				}
				return nil
			}
			e, err := parseEnvelope(raw)
			if err != nil {
				return fmt.Errorf("cannot open message %d: %w", count+1, err)
			}
			mc := messageContext{label: labelRequest, cluster: e.cluster, node: e.node}
			if e.request != nil {
				mc.label, mc.request, mc.frame = labelReply, e.request, frames[*e.request]
				frames[*e.request]++
			}
			message, _, err := openAny(keys, e, mc, replyLimit)
			if err != nil {
				return fmt.Errorf("cannot open message %d, which %q sent: %w", count+1, e.node, err)
			}
			fmt.Println(string(message))
		}
	}
}

// bindAction makes a command that is one request; its reply is printed as
// JSON if it has data.
func bindAction(action string) func(*flag.FlagSet) body {
	return func(*flag.FlagSet) body {
		return func(ctx context.Context, p paths, _ []string) error {
			return askLocal(ctx, p, action, nil, nil, func(raw []byte, r replyJSON) error {
				if r.Status != 0 || string(r.Data) == "null" {
					return discard(raw, r)
				}
				return printIndented(raw)
			})
		}
	}
}

// printIndented prints a reply without its time, as the tools of OpenSVC do.
func printIndented(raw []byte) error {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return fmt.Errorf("the reply is not JSON: %w", err)
	}
	delete(fields, "time")
	text, err := json.MarshalIndent(fields, "", "    ")
	fmt.Println(string(text))
	return err
}

func bindStart(flags *flag.FlagSet) body {
	thread := flags.String("thread-id", "", "start only the thread `ID`")
	return func(ctx context.Context, p paths, _ []string) error {
		if *thread != "" {
			return askThread(ctx, p, "daemon_start", "thr_id="+*thread)
		}
		return startDaemon(ctx, p)
	}
}

func askThread(ctx context.Context, p paths, action string, words ...string) error {
	options, err := encodeOptions(action, words)
	if err != nil {
		return err
	}
	return askLocal(ctx, p, action, options, nil, discard)
}

// systemUnit tells whether the service manager runs this daemon: with the
// standard folders, where systemd runs and knows the unit.
func systemUnit(ctx context.Context, p paths) bool {
	if _, err := os.Stat("/run/systemd/system"); err != nil || !p.standard() {
		return false
	}
	return exec.CommandContext(ctx, "systemctl", "cat", "agentd.service").Run() == nil
}

func systemctl(ctx context.Context, verb string) error {
	cmd := exec.CommandContext(ctx, "systemctl", verb, "agentd.service")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("systemctl %s agentd.service: %w; see journalctl -u agentd", verb, err)
	}
	return nil
}

// startDaemon returns when the daemon answers.
func startDaemon(ctx context.Context, p paths) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	only, err := lock(p.lockFile("start")) // who starts at the same time waits, and finds it running
	if err != nil {
		return err
	}
	defer only.unlock()
	err = askLocal(ctx, p, "ping", nil, nil, discard)
	for errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) { // it was killed just now, and was not gone yet
		err = askLocal(ctx, p, "ping", nil, nil, discard)
	}
	if err == nil {
		fmt.Fprintln(os.Stderr, "agentd runs already")
		return nil
	}
	if !errors.Is(err, errNoDaemon) {
		return err
	}
	if systemUnit(ctx, p) {
		return systemctl(ctx, "start")
	}
	return startDetached(ctx, p)
}

// startDetached runs the daemon in a session of its own, its log appended to
// node.log, and waits until it answers, or has ended.
func startDetached(ctx context.Context, p paths) error {
	if err := p.makeFolders(); err != nil {
		return err
	}
	log, err := os.OpenFile(p.nodeLog(), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("cannot open the log: %w", err)
	}
	defer log.Close()
	logged, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("cannot read the log: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot find agentd: %w", err)
	}
	cmd := exec.Command(self, "run")
	cmd.Dir = "/"
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start the daemon: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- waitProcess(ctx, cmd.Process.Pid) }()
	for ask := time.Tick(answerPause); ; {
		select {
		case <-ask:
			if askLocal(ctx, p, "ping", nil, nil, discard) == nil {
				return cmd.Process.Release()
			}
			continue
		case err = <-ended:
		}
		break
	}
	if err != nil {
		return fmt.Errorf("the daemon does not answer after %s; see %s: %w", startTimeout, p.nodeLog(), err)
	}
	said, err := io.ReadAll(io.NewSectionReader(log, logged, 1<<20))
	if err != nil || len(said) == 0 {
		return fmt.Errorf("the daemon ended at once; see %s", p.nodeLog())
	}
	return fmt.Errorf("the daemon ended at once:\n%s", bytes.TrimSpace(said))
}

func bindStop(flags *flag.FlagSet) body {
	thread := flags.String("thread-id", "", "stop only the thread `ID`")
	force := flags.Bool("force", false, "stop even if that ends in a stop of the services")
	return func(ctx context.Context, p paths, _ []string) error {
		if *thread != "" {
			return askThread(ctx, p, "daemon_stop", "thr_id="+*thread, fmt.Sprintf("force=%t", *force))
		}
		return endDaemon(ctx, p, endTimeout, "daemon_stop", fmt.Sprintf("force=%t", *force))
	}
}

func bindShutdown(*flag.FlagSet) body {
	return func(ctx context.Context, p paths, _ []string) error {
		return endDaemon(ctx, p, shutdownTimeout, "daemon_shutdown")
	}
}

func bindRestart(*flag.FlagSet) body {
	return func(ctx context.Context, p paths, _ []string) error {
		if systemUnit(ctx, p) {
			return systemctl(ctx, "restart")
		}
		if err := endDaemon(ctx, p, endTimeout, "daemon_stop", "force=true"); err != nil {
			return err
		}
		return startDaemon(ctx, p)
	}
}

// endDaemon asks the daemon to end and returns when its process has. One that
// does not run has ended.
func endDaemon(ctx context.Context, p paths, within time.Duration, action string, words ...string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("the daemon has not ended after %s: %w", within, context.DeadlineExceeded))
	defer cancel()
	options, err := encodeOptions(action, words)
	if err != nil {
		return err
	}
	pidfd := -1
	err = askLocal(ctx, p, action, options, func(conn *net.UnixConn) error {
		peer, err := peerCredentials(conn)
		if err == nil {
			pidfd, err = unix.PidfdOpen(int(peer.Pid), unix.PIDFD_NONBLOCK)
		}
		return err
	}, discard)
	switch {
	case errors.Is(err, errNoDaemon):
		fmt.Fprintln(os.Stderr, "agentd does not run")
		return nil
	case err != nil:
		return err
	}
	return waitPidfd(ctx, pidfd)
}

func bindPing(flags *flag.FlagSet) body {
	node := flags.String("node", "", "the node to ask `N`; this one by default, over the local socket")
	return func(ctx context.Context, p paths, _ []string) error {
		begun := time.Now()
		var who struct{ Nodename, Agent string }
		var err error
		if *node == "" {
			err = askLocal(ctx, p, "ping", nil, nil, dataOf(&who))
		} else {
			err = askNode(ctx, p, *node, "ping", nil, dataOf(&who))
		}
		if err != nil {
			return err
		}
		fmt.Printf("%s answers, agentd %s, %s\n", who.Nodename, who.Agent, time.Since(begun).Round(10*time.Microsecond))
		return nil
	}
}

func bindQueueAdd(*flag.FlagSet) body {
	return func(_ context.Context, p paths, args []string) error {
		id, err := queueAdd(p, args, time.Now())
		if err != nil {
			return err
		}
		fmt.Println(id)
		return nil
	}
}

func bindDequeue(*flag.FlagSet) body {
	return func(ctx context.Context, p paths, _ []string) error {
		ctx, stop := untilSignal(ctx)
		defer stop()
		ran, err := dequeue(ctx, p, runCommand)
		if err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "%d actions ran; see nodemgr queue list\n", ran)
		return nil
	}
}

func bindFinalize(flags *flag.FlagSet) body {
	wanted := flags.String("version", "", "refuse unless `V` is what is installed")
	return func(ctx context.Context, p paths, _ []string) error {
		c, err := loadConfig(p)
		if err != nil {
			return err
		}
		recorded, err := readJournal(p.journal())
		if err != nil {
			return err
		}
		version, err := finalize(ctx, c, p, chooseReleaseFile(c, recorded.ReleaseFile), *wanted)
		if err != nil {
			return err
		}
		fmt.Printf("%s is finalized on %s\n", version, c.node)
		return nil
	}
}
