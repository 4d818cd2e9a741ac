package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// actor is an instance without a monitor, on real processes.
type actor struct {
	*instance
	tb   testing.TB
	dir  string // for what the scripts of a test leave
	die  func() // as a daemon does: what it started goes on
	jobs sync.WaitGroup

	noting sync.Mutex
	seen   []string // "rid state", in the order of their telling
	notes  map[string]string
	lines  []string // of the log, "rid text"
	bytes  int      // of the log
}

// newActor makes the instance svc1 of a file's text, in which @ stands for a
// folder of the test's own.
func newActor(tb testing.TB, text string) *actor {
	tb.Helper()
	dir, err := os.MkdirTemp("", "agentd")
	must(tb, err)
	p := paths{filepath.Join(dir, "etc"), filepath.Join(dir, "var"), filepath.Join(dir, "log"), filepath.Join(dir, "run")}
	must(tb, p.makeFolders())
	tb.Cleanup(func() {
		for found, end := true, time.Now().Add(patience); found && time.Now().Before(end); {
			found = false
			for _, pid := range processesWith("OSVCRUN=" + p.run) {
				found = true
				unix.Kill(pid, unix.SIGKILL)
			}
		}
		os.RemoveAll(dir)
	})
	return actorOn(tb, dir, p, text)
}

func actorOn(tb testing.TB, dir string, p paths, text string) *actor {
	tb.Helper()
	s, err := parseService("svc1", strings.ReplaceAll(text, "@", dir), "node1", []string{"node1"})
	must(tb, err)
	watch := newWatcher(nil)
	a := &actor{tb: tb, dir: dir, notes: map[string]string{}}
	ctx, cancel := context.WithCancel(context.Background())
	a.instance = &instance{
		kill: killMarked, random: randomNumber,
		paths: p, node: "node1", watcher: watch, jobs: &a.jobs, ctx: ctx, service: s,
		starts: make(chan struct{}, 4), stops: make(chan struct{}, 4), checks: make(chan struct{}, 4), acting: make(chan struct{}, 1),
		programs: map[string]*program{}, ends: map[string]string{}, outputs: map[string]*output{}, up: map[string]bool{},
		log: func(_ slog.Level, rid, text string) {
			a.noting.Lock()
			defer a.noting.Unlock()
			if a.bytes += len(text); a.bytes < 1<<20 {
				a.lines = append(a.lines, rid+" "+text)
			}
		},
		seen: func(rid string, s status, note string) {
			a.noting.Lock()
			defer a.noting.Unlock()
			a.seen, a.notes[rid] = append(a.seen, rid+" "+string(s)), note
		},
	}
	a.run = a.execute
	a.jobs.Go(func() { must(tb, watch.run(ctx)) })
	a.die = func() {
		cancel()
		a.jobs.Wait()
	}
	tb.Cleanup(func() {
		a.die()
		if tb.Failed() {
			tb.Logf("logged last:\n%.5000s", strings.Join(a.lines[max(0, len(a.lines)-30):], "\n"))
		}
	})
	return a
}

// again is the next daemon on the same folders. text changes the service
// unless it is empty.
func (a *actor) again(text string) *actor {
	a.tb.Helper()
	a.die()
	if text == "" {
		text = a.spec().doc.String()
	}
	return actorOn(a.tb, a.dir, a.paths, text)
}

// do performs an order, and returns its error's text.
func (a *actor) do(v verb, rids ...string) string {
	a.tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	return fmt.Sprint(a.perform(ctx, order{Verb: v, Rids: rids}))
}

func (a *actor) history() []string {
	a.noting.Lock()
	defer a.noting.Unlock()
	return slices.Clone(a.seen)
}

func (a *actor) note(rid string) string {
	a.noting.Lock()
	defer a.noting.Unlock()
	return a.notes[rid]
}

func (a *actor) logged(part string) int {
	a.noting.Lock()
	defer a.noting.Unlock()
	return strings.Count(strings.Join(a.lines, "\n"), part)
}

// now checks a resource.
func (a *actor) now(rid string) status {
	r := a.spec().resource(rid)
	state, _ := drivers[r.kind].check(context.Background(), a.instance, r)
	return state
}

// is fails the test unless rid is in a state.
func (a *actor) is(rid string, want status) {
	a.tb.Helper()
	if got := a.now(rid); got != want {
		a.tb.Errorf("%s is %s, want %s", rid, got, want)
	}
}

// script writes a shell script and returns its path.
func (a *actor) script(name, body string) string {
	a.tb.Helper()
	path := filepath.Join(a.dir, name)
	must(a.tb, os.WriteFile(path, []byte("#!/bin/sh\n"+strings.ReplaceAll(body, "@", a.dir)+"\n"), 0o755))
	return path
}

// read returns a file of the test's folder, without the last newline.
func (a *actor) read(name string) string {
	text, _ := os.ReadFile(filepath.Join(a.dir, name))
	return strings.TrimSpace(string(text))
}

// pid waits for a process to write its number, and returns it.
func (a *actor) pid(name string) int {
	a.tb.Helper()
	waitFor(a.tb, patience, "a process in "+name, func() bool { return a.read(name) != "" })
	pid, err := strconv.Atoi(a.read(name))
	must(a.tb, err)
	return pid
}

// processesWith lists those that have an entry in their environment.
func processesWith(entry string) (pids []int) {
	eachPid(func(pid int) {
		environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if stat := processStat(pid); stat != nil && stat[statState] != "Z" && bytes.Contains(append([]byte{0}, environ...), []byte("\x00"+entry+"\x00")) {
			pids = append(pids, pid)
		}
	})
	return pids
}

func alive(pid int) bool {
	stat := processStat(pid)
	return stat != nil && stat[statState] != "Z"
}

func wantText(tb testing.TB, what, text string, parts ...string) {
	tb.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			tb.Errorf("%s: %q, without %q", what, text, part)
		}
	}
}

// ---- Commands ---------------------------------------------------------------

func TestCommandEnds(t *testing.T) {
	rest := "\nstop = true\ncheck = test -e @/up\ntimeout = 500ms\n"
	for _, of := range []struct {
		name, body string // of the script start; none: no script
		want       string
	}{
		{"ok", ": >@/up", "<nil>"},
		{"exit status", "echo first; echo 'the disk is full' >&2; exit 3", "app#1: @/start: exit status 3: the disk is full"},
		{"signal", "kill -9 $$", "app#1: @/start was ended by a signal: signal: killed"},
		{"not found", "", "app#1: cannot run @/start: fork/exec @/start: no such file or directory"},
		{"hang", "echo here I wait; sleep 100", "app#1: @/start did not end within 500ms and was killed: here I wait"},
		{"hang that ignores", "trap '' TERM HUP INT; while :; do sleep 1; done", "app#1: @/start did not end within 500ms and was killed"},
	} {
		t.Run(of.name, func(t *testing.T) {
			a := newActor(t, "[app#1]\nstart = @/start"+rest)
			if of.body != "" {
				a.script("start", of.body)
			}
			if got, want := a.do(verbStart), strings.ReplaceAll(of.want, "@", a.dir); got != want {
				t.Errorf("the error is %q, want %q", got, want)
			}
			if of.want != "<nil>" && a.logged("app#1 not started: ") != 1 {
				t.Error("not in the log")
			}
			if left := processesWith("OSVCRUN=" + a.paths.run); len(left) > 0 {
				t.Errorf("left: %d", left)
			}
		})
	}
	t.Run("not executable", func(t *testing.T) {
		a := newActor(t, "[app#1]\nstart = @/start"+rest)
		must(t, os.Chmod(a.script("start", "exit 0"), 0o644))
		wantText(t, "the error", a.do(verbStart), "app#1: cannot run ", "permission denied")
	})
	t.Run("not a program", func(t *testing.T) {
		a := newActor(t, "[app#1]\nstart = @/start"+rest)
		must(t, os.WriteFile(filepath.Join(a.dir, "start"), []byte("echo no first line\n"), 0o755))
		wantText(t, "the error", a.do(verbStart), "app#1: cannot run ", "exec format error")
	})
}

// TestHangingCommand: its children go with it, in whatever session they are.
func TestHangingCommand(t *testing.T) {
	a := newActor(t, "[app#1]\nstart = @/start\nstop = true\ncheck = false\nstart_timeout = 700ms\n")
	a.script("child", "echo $$ >@/$1; trap '' TERM; while :; do sleep 1; done")
	a.script("start", "@/child same & setsid @/child session & setsid setsid env FOO=1 @/child third >/dev/null 2>&1 & wait")
	begun := time.Now()
	wantText(t, "the error", a.do(verbStart), "did not end within 700ms and was killed")
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
	for _, child := range []string{"same", "session", "third"} {
		if pid := a.pid(child); alive(pid) {
			t.Errorf("the child in %s lives on", child)
		}
	}
}

func TestCommandSurroundings(t *testing.T) {
	t.Setenv("SECRET_OF_THE_DAEMON", "hidden")
	t.Setenv("NOTIFY_SOCKET", "/nowhere")
	a := newActor(t, "[app#1]\nstart = @/start\nstop = true\ncheck = test -e @/env\n")
	a.script("start", "env >@/env; cut -d' ' -f1,5,6 /proc/$$/stat >@/stat; cat /proc/$$/oom_score_adj >@/oom; pwd >@/pwd; ls -l /proc/$$/fd >@/fds; read x && echo got >@/stdin; true")
	adjusted := os.Getuid() == 0 && os.WriteFile("/proc/self/oom_score_adj", []byte("-500"), 0) == nil
	if adjusted {
		defer os.WriteFile("/proc/self/oom_score_adj", []byte("0"), 0)
	}
	if err := a.do(verbStart); err != "<nil>" {
		t.Fatal(err)
	}
	env := "\n" + a.read("env") + "\n"
	for _, want := range []string{
		"OSVCETC=" + a.paths.etc, "OSVCVAR=" + a.paths.lib, "OSVCLOG=" + a.paths.log, "OSVCRUN=" + a.paths.run,
		"OSVC_SVCNAME=svc1", "OSVC_RID=app#1", "OSVC_NODENAME=node1",
	} {
		wantText(t, "the environment", env, "\n"+want+"\n")
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin", labFolder} {
		path := env[strings.Index(env, "\nPATH=")+6:]
		path, _, _ = strings.Cut(path, "\n")
		if !slices.Contains(filepath.SplitList(path), dir) {
			t.Errorf("the path %q has no %s", path, dir)
		}
	}
	for _, line := range strings.Split(strings.TrimSpace(env), "\n") {
		name, _, _ := strings.Cut(line, "=")
		known := []string{"HOME", "LANG", "TZ", "OCF_ROOT", "PATH", "PWD", "OLDPWD", "SHLVL", "_", "OSVC_RUN_ID"}
		if !slices.Contains(known, name) && !strings.HasPrefix(name, "OSVC") {
			t.Errorf("it inherits %s", line)
		}
	}
	// pid, group (field 5), session (field 6)
	if f := strings.Fields(a.read("stat")); len(f) != 3 || f[0] != f[1] || f[0] != f[2] {
		t.Errorf("pid, group and session are %v", f)
	}
	if adjusted && a.read("oom") != "0" {
		t.Errorf("oom_score_adj is %s", a.read("oom"))
	}
	if a.read("pwd") != "/" || a.read("stdin") != "" {
		t.Errorf("it runs in %q, and reads %q", a.read("pwd"), a.read("stdin"))
	}
	if strings.Contains(a.read("fds"), "socket:") {
		t.Errorf("it inherits descriptors:\n%s", a.read("fds"))
	}
}

func TestLockOfAnotherProcess(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = sleep 1000\n")
	lock := filepath.Join(a.paths.instanceRun("svc1"), "lock")
	must(t, os.MkdirAll(filepath.Dir(lock), 0o700))
	other := exec.Command("flock", lock, "sh", "-c", "echo held; exec cat")
	in, err := other.StdinPipe()
	must(t, err)
	out, err := other.StdoutPipe()
	must(t, err)
	must(t, other.Start())
	defer other.Wait()
	defer in.Close()
	_, err = out.Read(make([]byte, 5))
	must(t, err)

	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	err = a.perform(ctx, order{Verb: verbStart})
	wantText(t, "the error", fmt.Sprint(err), "another process acts on this instance")
	if len(a.history()) > 0 || a.now("app#1") != statusDown {
		t.Error("it acted all the same")
	}
	time.AfterFunc(100*time.Millisecond, func() { in.Close() })
	if err := a.do(verbStart); err != "<nil>" {
		t.Error(err)
	}
	a.is("app#1", statusUp)
}

// ---- Actions ----------------------------------------------------------------

// orderly are three apps that note what is done to them; a file that forbids
// makes it fail.
const orderly = `
[app#a]
script = @/app a
[app#b]
script = @/app b
OPTIONS
[app#c]
script = @/app c
`

const orderlyScript = `
[ "$2" = status ] || echo "$2 $1" >>@/done
[ ! -e @/no-$2-$1 ] || { echo "$1 cannot $2"; exit 1; }
case $2 in
start) : >@/is-$1 ;;
stop) rm -f @/is-$1 ;;
status) [ -e @/is-$1 ] || exit 3 ;;
esac`

func TestActions(t *testing.T) {
	for _, of := range []struct {
		name    string
		options string // of app#b
		there   string // files
		order   order
		done    string
		err     string
		up      string
	}{
		{"start", "", "", order{Verb: verbStart}, "start a, start b, start c", "<nil>", "a b c"},
		{"stop", "", "is-a is-b is-c", order{Verb: verbStop}, "stop c, stop b, stop a", "<nil>", ""},
		{"restart", "", "is-a is-b is-c", order{Verb: verbRestart}, "stop c, stop b, stop a, start a, start b, start c", "<nil>", "a b c"},
		{"start of what is up in part", "", "is-a is-c", order{Verb: verbStart}, "start b", "<nil>", "a b c"},
		{"start of one", "", "", order{Verb: verbStart, Rids: []string{"app#b"}}, "start b", "<nil>", "b"},
		{"start of two, in the file's order", "", "", order{Verb: verbStart, Rids: []string{"app#c", "app#a"}}, "start a, start c", "<nil>", "a c"},
		{"restart of one", "", "is-a is-b is-c", order{Verb: verbRestart, Rids: []string{"app#b"}}, "stop b, start b", "<nil>", "a b c"},
		{"rollback", "", "no-start-c", order{Verb: verbStart}, "start a, start b, start c, stop c, stop b, stop a", "app#c: @/app: exit status 1: c cannot start", ""},
		{"rollback spares what was up", "", "no-start-c is-a", order{Verb: verbStart}, "start b, start c, stop c, stop b", "app#c: @/app: exit status 1: c cannot start", "a"},
		{"rollback that fails", "", "no-start-c no-stop-b", order{Verb: verbStart}, "start a, start b, start c, stop c, stop b, stop a",
			"app#c: @/app: exit status 1: c cannot start; and then, of what had been started: app#b: @/app: exit status 1: b cannot stop", "b"},
		{"the first fails", "", "no-start-a", order{Verb: verbStart}, "start a, stop a", "app#a: @/app: exit status 1: a cannot start", ""},
		{"optional fails", "optional = yes", "no-start-b", order{Verb: verbStart}, "start a, start b, stop b, start c", "<nil>", "a c"},
		{"optional fails, then another", "optional = yes", "no-start-b no-start-c", order{Verb: verbStart},
			"start a, start b, stop b, start c, stop c, stop a", "app#c: @/app: exit status 1: c cannot start", ""},
		{"disabled", "disable = yes", "", order{Verb: verbStart}, "start a, start c", "<nil>", "a c"},
		{"stop that fails goes on", "", "is-a is-b is-c no-stop-b", order{Verb: verbStop}, "stop c, stop b, stop a", "app#b: @/app: exit status 1: b cannot stop", "b"},
		{"two stops fail", "", "is-a is-b is-c no-stop-b no-stop-c", order{Verb: verbStop}, "stop c, stop b, stop a",
			"app#c: @/app: exit status 1: c cannot stop\napp#b: @/app: exit status 1: b cannot stop", "b c"},
		{"restart whose stop fails starts nothing", "", "is-a is-b is-c no-stop-b", order{Verb: verbRestart}, "stop c, stop b, stop a", "app#b: @/app: exit status 1: b cannot stop", "b"},
	} {
		t.Run(of.name, func(t *testing.T) {
			t.Parallel()
			a := newActor(t, strings.ReplaceAll(orderly, "OPTIONS", of.options))
			a.script("app", orderlyScript)
			for _, file := range strings.Fields(of.there) {
				must(t, os.WriteFile(filepath.Join(a.dir, file), nil, 0o600))
			}
			err := a.perform(t.Context(), of.order)
			if got, want := fmt.Sprint(err), strings.ReplaceAll(of.err, "@", a.dir); got != want {
				t.Errorf("the error is %q, want %q", got, want)
			}
			stop := stopError{}
			if want := of.err != "<nil>" && (of.order.Verb != verbStart || strings.Contains(of.name, "rollback that fails")); errors.As(err, &stop) != want {
				t.Errorf("%v: is it of the stop: want %t", err, want)
			}
			if got := strings.ReplaceAll(a.read("done"), "\n", ", "); got != of.done {
				t.Errorf("done is %q, want %q", got, of.done)
			}
			var up []string
			for _, name := range []string{"a", "b", "c"} {
				state := a.now("app#" + name)
				if state == statusUp {
					up = append(up, name)
				}
				a.noting.Lock()
				told := slices.DeleteFunc(slices.Clone(a.seen), func(s string) bool { return !strings.HasPrefix(s, "app#"+name+" ") })
				a.noting.Unlock()
				if len(told) > 0 && told[len(told)-1] != "app#"+name+" "+string(state) {
					t.Errorf("app#%s is %s, and what was told last is %s", name, state, told[len(told)-1])
				}
			}
			if got := strings.Join(up, " "); got != of.up {
				t.Errorf("up are %q, want %q", got, of.up)
			}
			if _, err := os.Stat(a.journalPath()); err == nil {
				t.Error("the journal stays")
			}
			if _, failed, found := strings.Cut(of.err, "app#"); found && of.order.Verb == verbStart && !strings.Contains(of.err, "and then") {
				wantText(t, "its note", a.note("app#"+failed[:1]), "cannot start")
			}
		})
	}
}

// TestCancelledStart: it ends at once and is rolled back.
func TestCancelledStart(t *testing.T) {
	a := newActor(t, "[app#a]\nscript = @/app a\n[app#b]\nstart = @/slow\nstop = @/app b stop\ncheck = false\n")
	a.script("app", orderlyScript)
	a.script("slow", "echo $$ >@/slow.pid; setsid sleep 1000 & sleep 1000")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		a.pid("slow.pid")
		cancel(errCancelled)
	}()
	begun := time.Now()
	wantText(t, "the error", fmt.Sprint(a.perform(ctx, order{Verb: verbStart})), "app#b: ", "/slow cancelled by a later order")
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
	if got := strings.ReplaceAll(a.read("done"), "\n", ", "); got != "start a, stop b, stop a" {
		t.Errorf("done is %q", got)
	}
	if left := processesWith("OSVCRUN=" + a.paths.run); len(left) > 0 {
		t.Errorf("left: %d", left)
	}
}

// ---- What a crash cuts off --------------------------------------------------

// TestSettle: a daemon was killed while a command ran; nobody killed that.
func TestSettle(t *testing.T) {
	a := newActor(t, strings.ReplaceAll(orderly, "OPTIONS", "")+"[app#d]\nexec = sleep 1000\n")
	a.script("app", orderlyScript)
	slow := a.script("slow", "echo $$ >@/slow.pid; setsid sh -c 'echo $$ >@/child.pid; exec sleep 1000' & sleep 1000")
	if err := a.do(verbStart, "app#a", "app#d"); err != "<nil>" {
		t.Fatal(err)
	}
	other := a.programOf("app#d").record.Pid
	// As start writes it, and run, up to the moment of the crash.
	must(t, a.write(verbStart, a.selected(a.spec(), []string{"app#b"})))
	must(t, a.noteCommand("ID-OF-THE-COMMAND"))
	sink := &boundedBuffer{}
	cmd, err := a.launch(a.spec().resource("app#b"), resourceCommand{argv: []string{slow}}, "ID-OF-THE-COMMAND", sink)
	must(t, err)
	go waitChild(cmd)
	pids := []int{a.pid("slow.pid"), a.pid("child.pid")}
	must(t, os.WriteFile(filepath.Join(a.dir, "is-b"), nil, 0o600))

	b := a.again("")
	must(t, b.begin())
	for _, pid := range pids {
		if alive(pid) {
			t.Errorf("process %d of the command lives on", pid)
		}
	}
	if got := strings.ReplaceAll(b.read("done"), "\n", ", "); got != "start a, stop b" {
		t.Errorf("done is %q", got)
	}
	if !alive(other) || b.programOf("app#d") == nil || b.programOf("app#d").record.Pid != other {
		t.Error("the program that had nothing to do with it was touched, or is not taken up")
	}
	if _, err := os.Stat(b.journalPath()); err == nil {
		t.Error("the journal stays")
	}
	if b.logged("cut off at start of app#b") != 1 {
		t.Error("not in the log")
	}
}

// TestSettleProgram: the daemon was killed between the start of a program and
// the write of its record.
func TestSettleProgram(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = sh -c 'setsid sleep 1000 & exec sleep 1000'\n")
	r := a.spec().resource("app#1")
	must(t, a.write(verbStart, []*resource{r}))
	must(t, a.noteCommand("ID-OF-THE-PROGRAM"))
	cmd, err := a.launch(r, resourceCommand{argv: r.exec}, "ID-OF-THE-PROGRAM", nil)
	must(t, err)
	go waitChild(cmd)
	waitFor(t, patience, "the program has its child", func() bool { return len(processesWith("OSVCRUN="+a.paths.run)) == 2 })
	b := a.again("")
	must(t, b.begin())
	if left := processesWith("OSVCRUN=" + a.paths.run); len(left) > 0 {
		t.Errorf("left: %d", left)
	}
	b.is("app#1", statusDown)
}

func TestSettleJournals(t *testing.T) {
	for _, of := range []struct {
		name, journal string
		done          string // then
		err           string
		stays         bool
	}{
		{"another boot", `{"boot":"other","verb":"start","rids":["app#a"],"command":"X"}`, "", "<nil>", false},
		{"a stop", `{"boot":"BOOT","verb":"stop","rids":["app#a","app#b"]}`, "stop b, stop a", "<nil>", false},
		{"a resource that is gone", `{"boot":"BOOT","verb":"start","rids":["app#z","app#b"]}`, "stop b", "<nil>", false},
		{"only resources that are gone", `{"boot":"BOOT","verb":"start","rids":["app#z"]}`, "", "<nil>", false},
		{"garbage", `{"boot`, "", "cannot tell what an earlier daemon was doing", false},
		{"what does not stop", `{"boot":"BOOT","verb":"start","rids":["app#a","app#c"]}`, "stop c, stop a", "app#c: ", true},
	} {
		t.Run(of.name, func(t *testing.T) {
			a := newActor(t, strings.ReplaceAll(orderly, "OPTIONS", ""))
			a.script("app", orderlyScript)
			must(t, os.WriteFile(filepath.Join(a.dir, "no-stop-c"), nil, 0o600))
			must(t, replaceFile(a.journalPath(), []byte(strings.ReplaceAll(of.journal, "BOOT", bootID()))))
			wantText(t, "the error", fmt.Sprint(a.begin()), of.err)
			if got := strings.ReplaceAll(a.read("done"), "\n", ", "); got != of.done {
				t.Errorf("done is %q, want %q", got, of.done)
			}
			if _, err := os.Stat(a.journalPath()); (err == nil) != of.stays {
				t.Errorf("the journal: %v", err)
			}
		})
	}
}

// TestSettleNothing: a stop that had nothing to stop is not one of everything.
func TestSettleNothing(t *testing.T) {
	a := newActor(t, strings.ReplaceAll(orderly, "OPTIONS", ""))
	a.script("app", orderlyScript)
	must(t, a.write(verbStop, nil))
	b := a.again("")
	must(t, b.begin())
	if got := b.read("done"); got != "" {
		t.Errorf("done is %q", got)
	}
}

// TestChecksAfterChange: a check that came at the time of an action says
// nothing; what it was for is looked at once the action is over.
func TestChecksAfterChange(t *testing.T) {
	a := newActor(t, "[app#a]\nstart = @/slow\nstop = true\ncheck = test -e @/go\n[app#b]\nexec = sleep 1000\n")
	a.script("slow", "echo $$ >@/slow.pid; while [ ! -e @/go ]; do sleep 0.02; done")
	ended := make(chan string)
	go func() { ended <- a.do(verbStart, "app#a") }()
	a.pid("slow.pid")
	ctx, cancel := context.WithCancel(a.ctx)
	defer cancel()
	looks := make(chan struct{})
	go func() {
		defer close(looks)
		a.watchAll(ctx)
	}()
	time.Sleep(100 * time.Millisecond) // the first looks, in vain
	must(t, os.WriteFile(filepath.Join(a.dir, "go"), nil, 0o600))
	if err := <-ended; err != "<nil>" {
		t.Fatal(err)
	}
	waitFor(t, 5*time.Second, "app#b is looked at", func() bool { return slices.Contains(a.history(), "app#b down") })
	cancel()
	<-looks
}

// ---- Orphans ----------------------------------------------------------------

func TestReapOrphans(t *testing.T) {
	if os.Getenv("AGENTD_TEST_FIRST") != "" {
		firstProcess(t)
		return
	}
	if os.Getuid() != 0 || exec.Command("unshare", "-pf", "--mount-proc", "true").Run() != nil {
		t.Skip("needs root and namespaces of processes")
	}
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command("unshare", "-pf", "--mount-proc", self, "-test.run", "^TestReapOrphans$", "-test.v")
	cmd.Env = append(os.Environ(), "AGENTD_TEST_FIRST=1")
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestReapOrphans")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// firstProcess is the test in a namespace whose process 1 it is.
func firstProcess(t *testing.T) {
	if os.Getpid() != 1 {
		t.Fatalf("process %d", os.Getpid())
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGCHLD)
	defer signal.Stop(ended)
	ctx, cancel := context.WithCancel(t.Context())
	var reaper sync.WaitGroup
	reaper.Go(func() { reapOrphans(ctx, ended) })
	defer reaper.Wait()
	defer cancel()
	var commands sync.WaitGroup
	for n := range 20 {
		commands.Go(func() {
			// Leaves two orphans; its own status must not get lost to the reaper.
			var out bytes.Buffer
			argv := []string{"sh", "-c", fmt.Sprintf("sh -c 'sleep 0.1; exit 7' & setsid sleep 0.2 & exit %d", n)}
			if exit, err := runCommand(ctx, argv, &out, &out); exit != n || err != nil {
				t.Errorf("exit status %d, %v, want %d", exit, err, n)
			}
		})
	}
	commands.Wait()
	waitFor(t, patience, "no zombie stays", func() bool {
		others := 0
		eachPid(func(pid int) {
			if pid != 1 {
				others++
			}
		})
		return others == 0
	})
}

// A daemon that ends in the middle of a stop must not begin other stops only
// to kill them.
func TestNothingBeginsOnceCancelled(t *testing.T) {
	a := newActor(t, "[app#1]\nscript = @/script\n")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := a.execute(ctx, a.spec().resource("app#1"), resourceCommand{argv: []string{"/not/there"}, timeout: time.Minute})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("tried to run it: %v", err)
	}
}

// A disk that is full, or read-only after an error, is a reason to stop
// services, and must not keep them up.
func TestStopNeedsNoDisk(t *testing.T) {
	a := newActor(t, "[app#1]\nscript = @/script\n")
	a.script("script", "echo $1 >>@/ran; echo said; [ $1 != status ] || exit 3")
	must(t, os.WriteFile(filepath.Join(a.paths.lib, "services"), nil, 0o600))
	must(t, os.MkdirAll(a.journalPath()+".new/x", 0o700))
	if err := a.do(verbStart); !strings.Contains(err, "cannot note") {
		t.Errorf("start: %v", err)
	}
	if err := a.do(verbStop); err != "<nil>" || !strings.Contains(a.read("ran"), "stop") {
		t.Errorf("stop: %v; ran: %s", err, a.read("ran"))
	}
	if a.logged("cannot keep the output") == 0 || a.logged("cannot note what is being done") == 0 {
		t.Error("nothing was said about it")
	}
}

func TestFrozenIfInDoubt(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = /bin/true\n")
	if isFrozen(a.paths, "svc1") {
		t.Error("frozen without a flag")
	}
	must(t, os.MkdirAll(a.paths.lib, 0o700))
	must(t, os.Symlink("services", filepath.Join(a.paths.lib, "services"))) // cannot be looked into
	if !isFrozen(a.paths, "svc1") {
		t.Error("it would be started though its flag cannot be read")
	}
}

// Times that were kept are of a clock that may have been set back since.
func TestKeptTimesAreNotAhead(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = /bin/true\n")
	must(t, keepIntent(a.paths, "svc1", intent{Restarts: map[string]restarts{"app#1": {Count: 1, Last: time.Now().Add(24 * time.Hour)}}}))
	found, err := readIntent(a.paths, "svc1")
	must(t, err)
	if n := found.Restarts["app#1"]; n.Count != 1 || time.Until(n.Last) > 0 {
		t.Errorf("the next restart waits for a day: %+v", n)
	}
}
