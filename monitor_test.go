package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the golden scripts in testdata")

// Golden scripts: events in, effects out (testdata/monitor_*.txt). A line at
// the margin is an event with its time, or a comment; what is below it,
// indented, is what the core makes of it, and is rewritten by -update. `==`
// begins a story, on a node where nothing is known. A file of a service is
// written as `file NAME` and lines that begin with `|`.
//
//	0s service svc               its file is read; what a daemon kept is found
//	0s gone svc                  its file is gone
//	1s svc app#1 down exit 1     a resource is seen in a state
//	2s done svc                  the order was done
//	2s done svc start: reason    or failed, at its part to start or to stop
//	3s flag svc frozen           the flag was written; of the node: flag node
//	3s flag svc failed: reason   or not
//	4s order svc started app#1   local_expect, with rids or without
//	4s order svc global stopped  global_expect
//	4s order svc clear|reset
//	5s node frozen               set_node_monitor
//	6s end, 6s end withdrawn     daemon_shutdown
//	7s daemon                    the daemon dies; a new one begins
//	7s unsettled svc reason      what it was doing does not stop
//	9s tick
//
// Below: act, cancel, flag, wake and refuse are effects; `a -> b: why` is a
// transition; keep is the intent, where it changed; the line in parentheses
// is the instance afterwards, where it changed.
func TestGolden(t *testing.T) { playGolden(t, "testdata/monitor_*.txt", playScript) }

// playGolden plays scripts again and compares what came of them.
func playGolden(t *testing.T, pattern string, play func(text string) (string, error)) {
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			before := readText(t, path)
			after, err := play(before)
			if err != nil {
				t.Fatalf("%s:%v", path, err)
			}
			if again, _ := play(before); again != after {
				t.Error("the same events had other effects")
			}
			switch {
			case *update:
				if err := os.WriteFile(path, []byte(after), 0o644); err != nil {
					t.Fatal(err)
				}
			case before != after:
				t.Errorf("%s; if it is right: go test -run TestGolden -update\n%s", path, firstDifference(before, after))
			}
		})
	}
}

func firstDifference(want, got string) string {
	a, b := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			from := max(0, i-3)
			return fmt.Sprintf("line %d\nwant:\n%s\ngot:\n%s", i+1, strings.Join(a[from:min(i+4, len(a))], "\n"), strings.Join(b[from:min(i+4, len(b))], "\n"))
		}
	}
	return "one is longer than the other"
}

// scriptStart is second 0 of all scripts.
var scriptStart = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// script plays events to a core, and keeps what the shell would.
type script struct {
	core   *core
	files  map[string]string
	kept   map[string]string // intents, as they are on disk
	frozen map[string]bool   // flags, as they are on disk; "" is the node's
	shown  map[string]string // the last state line of each service
	out    strings.Builder
}

func newScript() *script {
	return &script{core: loneCore(false), files: map[string]string{}, kept: map[string]string{}, frozen: map[string]bool{}, shown: map[string]string{}}
}

// loneCore is the only node of its cluster.
func loneCore(frozen bool) *core {
	c := newCore(birth{
		node: "n1", epoch: 1, salt: 1 << 32, frozen: frozen, now: at(scriptStart),
		cluster: clusterSpec{members: []string{"n1"}, timeout: 3 * time.Second, grace: 3 * time.Second, rejoin: 90 * time.Second},
	})
	c.step(at(scriptStart), guardEvent{true})
	return c
}

// at is a moment of a machine that booted at second 0 of all scripts.
func at(t time.Time) moment {
	since := t.Sub(scriptStart)
	return moment{t, leaseClock{since, since}}
}

// stepKept is a step whose votes are kept at once.
func stepKept(c *core, now time.Time, e event) (effects []effect) {
	for _, f := range c.step(at(now), e) {
		effects = append(effects, f)
		if v, ok := f.(votesEffect); ok {
			effects = append(effects, stepKept(c, now, votesKept{v.version, nil})...)
		}
	}
	return effects
}

func playScript(text string) (string, error) {
	s := newScript()
	file := ""
	for i, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		if strings.HasPrefix(line, " ") {
			continue // what came of it when it was last played
		}
		s.out.WriteString(line + "\n")
		switch name, isFile := strings.CutPrefix(line, "file "); {
		case line == "", line[0] == '#':
		case strings.HasPrefix(line, "=="):
			out := s.out.String()
			s = newScript()
			s.out.WriteString(out)
		case isFile:
			file = name
			s.files[file] = ""
		case line[0] == '|':
			s.files[file] += strings.TrimPrefix(strings.TrimPrefix(line, "|"), " ") + "\n"
		default:
			if err := s.play(line); err != nil {
				return "", fmt.Errorf("%d: %q: %w", i+1, line, err)
			}
		}
	}
	return s.out.String(), nil
}

func (s *script) play(line string) error {
	words := append(strings.Fields(line), "", "", "")
	at, err := time.ParseDuration(words[0])
	if err != nil {
		return err
	}
	if words[1] == "daemon" {
		s.core, s.shown = loneCore(s.frozen[""]), map[string]string{}
		return nil
	}
	e, err := s.event(words)
	if err != nil {
		return err
	}
	now := scriptStart.Add(at)
	effects := stepKept(s.core, now, e)
	if f, ok := e.(flagEvent); ok && f.err == nil {
		s.frozen[f.service] = f.frozen
	}
	keep := map[string]intent{}
	for _, f := range effects {
		if save, ok := f.(saveEffect); ok {
			keep[save.service] = save.intent
			continue
		}
		s.out.WriteString("    " + effectText(f) + "\n")
	}
	for _, name := range sortedKeys(keep) {
		data, err := json.Marshal(keep[name])
		if err != nil {
			return err
		}
		if string(data) != s.kept[name] {
			s.kept[name] = string(data)
			fmt.Fprintf(&s.out, "    keep %s %s\n", name, data)
		}
	}
	for _, name := range sortedKeys(s.core.services) {
		if state := stateText(s.core.services[name]); state != s.shown[name] {
			s.shown[name] = state
			fmt.Fprintf(&s.out, "    (%s)\n", state)
		}
	}
	return nil
}

// event reads the words of an event, the first of which is its time.
func (s *script) event(words []string) (event, error) {
	name, rest := words[2], strings.TrimSpace(strings.Join(words[3:], " "))
	reason := func(prefix string) error {
		return errors.New(strings.TrimPrefix(rest, prefix))
	}
	switch words[1] {
	case "service":
		spec, err := parseService(name, s.files[name], "n1", []string{"n1"})
		if err != nil {
			return nil, err
		}
		var found intent
		if kept := s.kept[name]; kept != "" && s.core.services[name] == nil {
			err = json.Unmarshal([]byte(kept), &found)
		}
		return serviceEvent{name, spec, s.frozen[name], found}, err
	case "gone":
		return serviceEvent{name: name}, nil
	case "done":
		switch {
		case strings.HasPrefix(rest, "start: "):
			return doneEvent{name, verbStart, reason("start: ")}, nil
		case strings.HasPrefix(rest, "stop: "):
			return doneEvent{name, verbStop, reason("stop: ")}, nil
		}
		return doneEvent{service: name, part: verbStart}, nil
	case "flag":
		if name == "node" {
			name = ""
		}
		if strings.HasPrefix(rest, "failed: ") {
			return flagEvent{name, !s.frozen[name], reason("failed: ")}, nil
		}
		return flagEvent{name, rest == "frozen", nil}, nil
	case "order":
		return scriptOrder(name, strings.Fields(rest))
	case "node":
		return nodeOrder{words[2] == "frozen"}, nil
	case "end":
		return endEvent{words[2] != "withdrawn"}, nil
	case "unsettled":
		return failedEvent{name, rest}, nil
	case "tick":
		return tickEvent{}, nil
	}
	if s.core.services[words[1]] == nil {
		return nil, errors.New("no such event")
	}
	return statusEvent{words[1], words[2], status(words[3]), strings.TrimSpace(strings.Join(words[4:], " "))}, nil
}

func scriptOrder(name string, words []string) (event, error) {
	o := serviceOrder{service: name}
	switch {
	case len(words) == 0:
		return nil, errors.New("which order?")
	case words[0] == "global":
		o.globalExpect = words[1]
	case words[0] == "clear":
		o.clear = true
	case words[0] == "reset":
		o.reset = true
	default:
		o.localExpect = words[0]
		if len(words) > 1 {
			o.rids = words[1:]
		}
	}
	return o, nil
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

func effectText(f effect) string {
	flagName := map[bool]string{true: "frozen", false: "thawed"}
	switch f := f.(type) {
	case actEffect:
		return "act " + f.service + " " + orderText(f.order)
	case cancelEffect:
		return "cancel " + f.service
	case flagEffect:
		if f.service == "" {
			return "flag node " + flagName[f.frozen]
		}
		return "flag " + f.service + " " + flagName[f.frozen]
	case transitionEffect:
		name := f.service
		if name == "" {
			name = "node"
		}
		return strings.TrimSuffix(fmt.Sprintf("%s: %s -> %s: %s", name, f.from, f.to, f.why), ": ")
	case saveEffect:
		data, _ := json.Marshal(f.intent) // it holds nothing that JSON does not
		return "keep " + f.service + " " + string(data)
	case wakeEffect:
		return "wake " + f.at.Sub(scriptStart).String()
	case refuseEffect:
		return "refuse: " + f.err.Error()
	case linkEffect:
		return "link with " + f.peer + ": " + f.state
	case votesEffect:
		data, _ := json.Marshal(f.votes) // it holds nothing that JSON does not
		return fmt.Sprintf("votes %d %s", f.version, data)
	case guardEffect:
		text := fmt.Sprintf("guard %s until %s", f.held, f.deadline.raw)
		for _, name := range sortedKeys(f.own) {
			text += fmt.Sprintf(", %s until %s", name, f.own[name].raw)
		}
		return text
	}
	return "unknown effect " + reflect.TypeOf(f).Name()
}

func orderText(o order) string {
	return strings.TrimSpace(string(o.Verb) + " " + strings.Join(o.Rids, " "))
}

// stateText is an instance as the operator sees it.
func stateText(s *monitored) string {
	avail, overall := s.status()
	text := fmt.Sprintf("%s %s: avail %s", s.spec.name, s.state, avail)
	if overall != avail {
		text += ", overall " + string(overall)
	}
	if s.frozen {
		text += ", frozen"
	}
	if s.LocalExpect != "" {
		text += ", local " + s.LocalExpect
	}
	if s.GlobalExpect != "" {
		text += ", global " + s.GlobalExpect
	}
	if s.Wanted != nil {
		text += ", next " + orderText(*s.Wanted)
	}
	return strings.TrimSuffix(text+": "+s.why, ": ")
}
