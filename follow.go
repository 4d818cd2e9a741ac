// follow.go: svcmgr logs: the logs of a service on all its nodes as one, in
// the order of their times, and what is logged from then on. A node that does
// not answer is named on stderr, and keeps nobody from seeing the others.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// logView is one call of svcmgr logs.
type logView struct {
	paths     paths
	self      string // this node
	nodes     []string
	service   string
	backlog   int64
	follow    bool
	out, said io.Writer

	events   chan logEvent
	state    []showing // of nodes
	answered bool      // by any
}

// showing tells how it is with a node's lines.
type showing int

const (
	notHeard showing = iota
	shown
	gone
)

// logEvent is news of a node: its backlog, or lines that followed; or why
// there is nothing more.
type logEvent struct {
	node  int // in nodes
	lines []string
	err   error
}

func bindServiceLogs(flags *flag.FlagSet) body {
	service := serviceFlag(flags)
	follow := flags.Bool("follow", false, "go on with what is logged from now on, until interrupted")
	backlog := flags.String("backlog", "10k", "begin with the last `SIZE` of each node's log, as in 4096, 10k or 2m; -1: all")
	return func(ctx context.Context, p paths, _ []string) error {
		name, err := service()
		if err != nil {
			return err
		}
		size, err := parseSize(*backlog)
		if err != nil {
			return usageError("--backlog: %w", err)
		}
		c, err := loadConfig(p)
		if err != nil {
			return err
		}
		s, err := loadService(p, c, name)
		if s == nil {
			return err
		}
		if err != nil { // its log may tell how it came to that
			fmt.Fprintf(os.Stderr, "the service's file has mistakes, so all nodes are asked: %v\n", err)
		}
		ctx, stop := untilSignal(ctx)
		defer stop()
		v := &logView{paths: p, self: c.node, service: name, backlog: size.(int64), follow: *follow, out: os.Stdout, said: os.Stderr}
		v.nodes = slices.DeleteFunc(slices.Clone(s.nodes), func(node string) bool { return !c.isMember(node) })
		if len(v.nodes) == 0 {
			return fmt.Errorf("no node of the service (%s) is in cluster.nodes (%s)", strings.Join(s.nodes, " "), strings.Join(c.members(), " "))
		}
		return v.show(ctx)
	}
}

// show prints the merged backlogs, then, if it follows, what comes. It fails
// only when no node has answered.
func (v *logView) show(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	v.events, v.state = make(chan logEvent), make([]showing, len(v.nodes))
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	for i := range v.nodes {
		asking.Go(func() { v.ask(ctx, i) })
	}
	var late <-chan time.Time
	if v.follow {
		late = time.After(logPatience)
	}
	var err error
	lines := make([][]string, len(v.nodes))
	for merged := false; err == nil && (!merged || v.follow && ctx.Err() == nil); {
		due := merged
		select {
		case e := <-v.events:
			v.note(e)
			lines[e.node] = append(lines[e.node], e.lines...)
		case <-late:
			due = true
		case <-ctx.Done():
			due = true
		}
		if due || !slices.Contains(v.state, notHeard) {
			err = v.print(mergeLogs(lines))
			clear(lines)
			merged = true
		}
	}
	if err == nil && !v.answered {
		return exitError{status: exitFailed} // each node was named, with why
	}
	return err
}

// note names a node that goes, once, and when it is back.
func (v *logView) note(e logEvent) {
	was, now := v.state[e.node], shown
	if e.err != nil {
		now = gone
	}
	v.state[e.node], v.answered = now, v.answered || now == shown
	switch {
	case now == gone && was != gone:
		fmt.Fprintf(v.said, "%s is not shown: %v\n", v.nodes[e.node], e.err)
	case now == shown && was == gone:
		fmt.Fprintf(v.said, "%s is shown again\n", v.nodes[e.node])
	}
}

func (v *logView) print(lines []string) error {
	out := bufio.NewWriter(v.out)
	for _, line := range lines {
		out.WriteString(line)
		out.WriteByte('\n')
	}
	return out.Flush()
}

// ask asks a node, again and again if its log is followed. A node that denies
// is left alone for as long as the daemon would leave it alone: to ask would
// get this node shut out there.
func (v *logView) ask(ctx context.Context, i int) {
	trust, seen := newPeerTrust(time.Now), logSeen{}
	for {
		err := v.askOnce(ctx, i, &seen)
		trust.asked(v.nodes[i], err)
		if err == nil && v.follow {
			err = errors.New("its log has ended")
		}
		if err != nil {
			v.pass(ctx, logEvent{node: i, err: err})
		}
		if !v.follow {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(logAgain, trust.pause(v.nodes[i]))):
		}
	}
}

func (v *logView) pass(ctx context.Context, e logEvent) error {
	select {
	case v.events <- e:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// askOnce passes a node's backlog on as a whole, then what follows. Asked
// before, the node is asked for all, of which what was not passed on is.
func (v *logView) askOnce(ctx context.Context, i int, seen *logSeen) error {
	backlog := v.backlog
	if !seen.at.IsZero() {
		backlog = -1
	}
	options := map[string]json.RawMessage{}
	for name, value := range map[string]any{"svcname": v.service, "backlog": backlog, "follow": v.follow} {
		options[name], _ = json.Marshal(value) // a string, a number and a flag
	}
	var lines []string
	complete := false
	ctx, frame, done := boundSilence(ctx, logPatience, func(_ []byte, r replyJSON) error {
		var data logFrame
		if err := dataOf(&data)(nil, r); err != nil {
			return err
		}
		lines = append(lines, data.Lines...)
		if !complete && !data.Live && r.More {
			return nil
		}
		if !complete {
			lines = seen.missed(lines)
		}
		e := logEvent{node: i, lines: lines}
		complete, lines = true, nil
		seen.add(e.lines, r.Time)
		return v.pass(ctx, e)
	})
	defer done()
	if v.nodes[i] == v.self {
		return askLocal(ctx, v.paths, "service_logs", options, nil, frame)
	}
	return askNode(ctx, v.paths, v.nodes[i], "service_logs", options, frame)
}

// logSeen is how far a node's log was shown.
type logSeen struct {
	last string    // the last line
	at   time.Time // by the node's clock, when it was heard last
}

func (s *logSeen) add(lines []string, unixMilli int64) {
	s.at = time.UnixMilli(unixMilli)
	if len(lines) > 0 {
		s.last = lines[len(lines)-1]
	}
}

// missed returns what a backlog holds beyond what was shown: what stands
// behind the last line; if that is gone, what is younger.
func (s *logSeen) missed(backlog []string) []string {
	if s.at.IsZero() {
		return backlog
	}
	for i := len(backlog) - 1; i >= 0; i-- {
		if backlog[i] == s.last {
			return backlog[i+1:]
		}
	}
	since := s.at
	if at, ok := timeOfLine(s.last); ok {
		since = at
	}
	i := slices.IndexFunc(backlog, func(line string) bool {
		at, ok := timeOfLine(line)
		return ok && at.After(since)
	})
	if i < 0 {
		return nil
	}
	return backlog[i:]
}

// mergeLogs makes one log of several. Each keeps its order, also where its
// times do not; of equal times the first log's comes first. A line without a
// time belongs to the one before.
func mergeLogs(logs [][]string) (merged []string) {
	rest, times := slices.Clone(logs), make([]time.Time, len(logs)) // of each rest's first line
	for next := -1; ; {
		for i, lines := range rest {
			if len(lines) > 0 && (next < 0 || next == i) {
				if at, ok := timeOfLine(lines[0]); ok {
					times[i] = at
				}
			}
		}
		next = -1
		for i, lines := range rest {
			if len(lines) > 0 && (next < 0 || times[i].Before(times[next])) {
				next = i
			}
		}
		if next < 0 {
			return merged
		}
		merged, rest[next] = append(merged, rest[next][0]), rest[next][1:]
	}
}
