package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// program starts the one of app#1 and returns its pid.
func (a *actor) program() int {
	a.tb.Helper()
	if err := a.do(verbStart, "app#1"); err != "<nil>" {
		a.tb.Fatal(err)
	}
	return a.programOf("app#1").record.Pid
}

// ends waits until the end of app#1's program is told, and returns how it was.
func (a *actor) ends() string {
	a.tb.Helper()
	waitFor(a.tb, patience, "the end is told", func() bool {
		seen := a.history()
		return len(seen) > 0 && seen[len(seen)-1] == "app#1 down"
	})
	return a.note("app#1")
}

func TestProgramDies(t *testing.T) {
	for _, of := range []struct {
		name, exec string
		signal     unix.Signal // 0: it ends by itself
		want       string
	}{
		{"killed", "sleep 1000", unix.SIGKILL, "ended: signal: killed"},
		{"terminated", "sleep 1000", unix.SIGTERM, "ended: signal: terminated"},
		{"exit status", "sh -c 'sleep 0.2; exit 3'", 0, "ended: exit status 3"},
		{"no error", "sleep 0.2", 0, "ended with exit status 0"},
	} {
		t.Run(of.name, func(t *testing.T) {
			t.Parallel()
			a := newActor(t, "[app#1]\nexec = "+of.exec+"\n")
			pid := a.program()
			a.is("app#1", statusUp)
			if of.signal != 0 {
				must(t, unix.Kill(pid, of.signal))
			}
			if how := a.ends(); how != of.want {
				t.Errorf("%q, want %q", how, of.want)
			}
			a.is("app#1", statusDown)
			if a.logged(fmt.Sprintf("process %d %s", pid, of.want)) != 1 {
				t.Error("not in the log")
			}
			if got := a.history(); !slices.Equal(got, []string{"app#1 up", "app#1 down"}) {
				t.Errorf("told: %q", got)
			}
			if _, err := os.Stat(a.recordPath("app#1")); err == nil {
				t.Error("its record stays")
			}
			if again := a.program(); again == pid {
				t.Error("the same process")
			}
		})
	}
}

// TestProgramDeathIsSeenAtOnce: no interval is between its death and the news.
func TestProgramDeathIsSeenAtOnce(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = sleep 1000\n")
	best := time.Hour
	for range 5 {
		pid := a.program()
		begun := time.Now()
		must(t, unix.Kill(pid, unix.SIGKILL))
		a.ends()
		best = min(best, time.Since(begun))
	}
	t.Logf("seen after %s", best)
	if best > 200*time.Millisecond {
		t.Errorf("its death is seen after %s", best)
	}
}

// TestProgramDiesAtOnce: before anybody looks, even.
func TestProgramDiesAtOnce(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = sh -c 'exit 3'\n")
	if err := a.do(verbStart); err == "<nil>" {
		if how := a.ends(); how != "ended: exit status 3" {
			t.Errorf("%q", how)
		}
	} else {
		wantText(t, "the error", err, "exit status 3")
	}
	// The case that is rare: it has ended, and is not waited for.
	cmd, err := a.launch(a.spec().resource("app#1"), resourceCommand{argv: []string{"sh", "-c", "exit 3"}}, "ID", nil)
	must(t, err)
	waitFor(t, patience, "it has ended", func() bool { return !alive(cmd.Process.Pid) })
	if _, err := a.take("app#1", programRecord{Boot: bootID(), Pid: cmd.Process.Pid, ID: "ID"}, cmd); err != nil {
		t.Fatalf("a program that ended at once: %v", err)
	}
	waitFor(t, patience, "its end", func() bool { return a.programOf("app#1") == nil })
	if how := a.ends(); how != "ended: exit status 3" {
		t.Errorf("%q", how)
	}
}

func TestProgramThatCannotRun(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = @/none\n")
	wantText(t, "the error", a.do(verbStart), "app#1: cannot run "+a.dir+"/none: ", "no such file or directory")
	must(t, os.Chmod(a.script("none", ""), 0o600))
	wantText(t, "the error", a.do(verbStart), "app#1: cannot run ", "permission denied")
	a.is("app#1", statusDown)
	if a.programOf("app#1") != nil || len(processesWith("OSVCRUN="+a.paths.run)) > 0 {
		t.Error("something runs")
	}
}

func TestProgramIsTakenUp(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = sleep 1000\nstop_timeout = 2s\n")
	pid := a.program()
	b := a.again("")
	b.is("app#1", statusDown)
	must(t, b.begin())
	b.is("app#1", statusUp)
	if !alive(pid) || b.programOf("app#1").record.Pid != pid {
		t.Fatal("not the same process")
	}
	if b.logged(fmt.Sprintf("process %d taken up again", pid)) != 1 {
		t.Error("not in the log")
	}
	if err := b.do(verbStart); err != "<nil>" || b.programOf("app#1").record.Pid != pid {
		t.Errorf("started once more: %s", err)
	}
	must(t, unix.Kill(pid, unix.SIGKILL))
	b.ends()
	b.is("app#1", statusDown)

	pid = b.program()
	c := b.again("")
	must(t, c.begin())
	if err := c.do(verbStop); err != "<nil>" || alive(pid) {
		t.Errorf("stop of what was taken up: %s", err)
	}
	c.is("app#1", statusDown)

	pid = c.program()
	c.die()
	must(t, unix.Kill(pid, unix.SIGKILL))
	waitFor(t, patience, "the program has ended", func() bool { return !alive(pid) })
	d := c.again("")
	must(t, d.begin())
	d.is("app#1", statusDown)
	if d.logged("not taken up again") != 1 {
		t.Error("not in the log that it ended meanwhile")
	}
	if _, err := os.Stat(d.recordPath("app#1")); err == nil {
		t.Error("the record stays")
	}
}

// TestProgramIsReaped: the same process runs a daemon's monitor again, and is
// still the parent of the program.
func TestProgramIsReaped(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = sleep 1000\n")
	pid := a.program()
	b := a.again("")
	must(t, b.begin())
	must(t, unix.Kill(pid, unix.SIGKILL))
	b.ends()
	waitFor(t, 5*time.Second, "no zombie stays", func() bool { return processStat(pid) == nil })
}

// TestRecordOfAnother: what a record names may be another process by now.
func TestRecordOfAnother(t *testing.T) {
	for _, of := range []struct {
		name   string
		change func(r *programRecord)
	}{
		{"another start", func(r *programRecord) { r.Start++ }},
		{"another boot", func(r *programRecord) { r.Boot = "another" }},
		{"both", func(r *programRecord) { r.Boot, r.Start = "another", 1 }},
		{"no process", func(r *programRecord) { r.Pid = 1 << 22 }},
		{"impossible", func(r *programRecord) { r.Pid = -1 }},
		{"every process", func(r *programRecord) { r.Pid = 0 }},
	} {
		t.Run(of.name, func(t *testing.T) {
			t.Parallel()
			a := newActor(t, "[app#1]\nexec = sleep 1000\n")
			other := exec.Command("sleep", "1000")
			other.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			must(t, other.Start())
			defer other.Wait()
			defer other.Process.Kill()
			start, err := processStart(other.Process.Pid)
			must(t, err)
			record := programRecord{Boot: bootID(), Pid: other.Process.Pid, Start: start, ID: "ID-OF-ANOTHER"}
			of.change(&record)
			data, err := json.Marshal(record)
			must(t, err)
			must(t, replaceFile(a.recordPath("app#1"), data))
			must(t, a.begin())
			a.is("app#1", statusDown)
			if err := a.do(verbStop); err != "<nil>" {
				t.Error(err)
			}
			pid := a.program()
			if err := a.do(verbStop); err != "<nil>" || alive(pid) {
				t.Error(err)
			}
			if !alive(other.Process.Pid) {
				t.Error("another process was killed")
			}
		})
	}
	t.Run("garbage", func(t *testing.T) {
		a := newActor(t, "[app#1]\nexec = sleep 1000\n")
		must(t, replaceFile(a.recordPath("app#1"), []byte(`{"boot`)))
		must(t, a.begin())
		a.is("app#1", statusDown)
		a.program()
	})
}

func TestProgramStops(t *testing.T) {
	for _, of := range []struct {
		name, body string
		how        string        // in the log
		least      time.Duration // that it takes
	}{
		{"asked", "trap 'echo bye >@/bye; exit 0' TERM; echo $$ >@/ready; while :; do sleep 0.05; done", "", 0},
		{"ignores", "trap '' TERM; echo $$ >@/ready; while :; do sleep 1; done", "did not end within 600ms and is killed", 600 * time.Millisecond},
		{"children in its group", "sleep 1000 & sleep 1000 & echo $$ >@/ready; wait", "", 0},
		{"children elsewhere", "setsid sleep 1000 & setsid setsid sleep 1000 >/dev/null & echo $$ >@/ready; wait", "", 0},
		{"all ignore", "trap '' TERM; sleep 1000 & setsid sleep 1000 & echo $$ >@/ready; while :; do sleep 1; done", "did not end within 600ms and is killed", 600 * time.Millisecond},
		{"stopped", "echo $$ >@/ready; kill -STOP $$", "did not end within 600ms and is killed", 600 * time.Millisecond},
	} {
		for _, taken := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, taken up %t", of.name, taken), func(t *testing.T) {
				t.Parallel()
				a := newActor(t, "[app#1]\nexec = @/program\nstop_timeout = 600ms\n")
				a.script("program", of.body)
				a.program()
				a.pid("ready")
				if taken {
					a = a.again("")
					must(t, a.begin())
				}
				begun := time.Now()
				if err := a.do(verbStop); err != "<nil>" {
					t.Error(err)
				}
				if took := time.Since(begun); took < of.least || took > of.least+5*time.Second {
					t.Errorf("took %s", took)
				}
				if of.how != "" && a.logged(of.how) != 1 || of.how == "" && a.logged("is killed") != 0 {
					t.Errorf("in the log: %d", a.logged("is killed"))
				}
				if of.name == "asked" && a.read("bye") != "bye" {
					t.Error("it was not asked to end")
				}
				waitFor(t, patience, "nothing is left", func() bool { return len(processesWith("OSVCRUN="+a.paths.run)) == 0 })
				a.is("app#1", statusDown)
				if err := a.do(verbStop); err != "<nil>" {
					t.Errorf("stopped once more: %s", err)
				}
			})
		}
	}
}

// TestProgramLeavesChildren: they would be in the way of the next one.
func TestProgramLeavesChildren(t *testing.T) {
	for _, taken := range []bool{false, true} {
		t.Run(fmt.Sprintf("taken up %t", taken), func(t *testing.T) {
			a := newActor(t, "[app#1]\nexec = @/program\n")
			a.script("program", "(setsid sh -c 'echo $$ >@/child; exec sleep 1000' &) ; sleep 1000 & echo $! >@/group; while [ ! -e @/go ]; do sleep 0.05; done; exit 4")
			a.program()
			child, group := a.pid("child"), a.pid("group")
			if taken {
				a = a.again("")
				must(t, a.begin())
			}
			if !alive(child) || !alive(group) {
				t.Error("its children are gone before it")
			}
			must(t, os.WriteFile(filepath.Join(a.dir, "go"), nil, 0o600))
			a.ends()
			if alive(child) || alive(group) {
				t.Error("they outlive it")
			}
		})
	}
}

func TestProgramStopCommand(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = @/program\nstop = @/stop\nstop_timeout = 1s\n")
	a.script("program", "trap '' TERM; echo $$ >@/ready; while [ ! -e @/end ]; do sleep 0.02; done")
	a.script("stop", ">@/end")
	a.program()
	a.pid("ready")
	if err := a.do(verbStop); err != "<nil>" || a.logged("killed") > 0 {
		t.Error(err)
	}
	must(t, os.Remove(filepath.Join(a.dir, "end")))
	a.script("stop", "echo will not; exit 1")
	a.program()
	if err := a.do(verbStop); err != "<nil>" || a.logged("is killed") != 1 || a.logged("stop: "+a.dir) != 1 {
		t.Errorf("a stop command that fails: %s", err)
	}
	a.is("app#1", statusDown)
}

func TestProgramWithCheck(t *testing.T) {
	text := "[app#1]\nexec = @/program\ncheck = @/check\nstart_timeout = 700ms\nstop_timeout = 1s\n"
	t.Run("waits for it", func(t *testing.T) {
		a := newActor(t, text)
		a.script("program", "sleep 0.2; >@/ready; exec sleep 1000")
		a.script("check", "[ -e @/ready ] || { echo not yet; exit 1; }")
		a.program()
		if a.read("ready") != "" || a.now("app#1") != statusUp {
			t.Error("it did not wait")
		}
		must(t, os.Remove(filepath.Join(a.dir, "ready")))
		a.is("app#1", statusWarn)
		a.check(t.Context(), "app#1")
		if note := a.note("app#1"); note != "runs, but check says exit status 1: not yet" {
			t.Errorf("%q", note)
		}
	})
	t.Run("never ready", func(t *testing.T) {
		a := newActor(t, text)
		a.script("program", "echo $$ >@/pid; exec sleep 1000")
		a.script("check", "echo not ready; exit 1")
		wantText(t, "the error", a.do(verbStart), "app#1: not up within 700ms; its check says warn: runs, but check says exit status 1: not ready")
		if alive(a.pid("pid")) {
			t.Error("it was not stopped")
		}
	})
	t.Run("dies meanwhile", func(t *testing.T) {
		a := newActor(t, strings.Replace(text, "700ms", "20s", 1))
		a.script("program", "sleep 0.2; exit 5")
		a.script("check", "exit 1")
		begun := time.Now()
		wantText(t, "the error", a.do(verbStart), "app#1: ended: exit status 5")
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("took %s", took)
		}
	})
	// A check that was begun when it ran must not hide its end.
	for name, exit := range map[string]int{"check says up": 0, "check says no": 1} {
		t.Run("dies during the check, "+name, func(t *testing.T) {
			a := newActor(t, text)
			a.script("program", "exec sleep 1000")
			a.script("check", "[ ! -e @/slow ] || { : >@/begun; while [ ! -e @/go ]; do sleep 0.02; done; exit "+fmt.Sprint(exit)+"; }")
			pid := a.program()
			must(t, os.WriteFile(filepath.Join(a.dir, "slow"), nil, 0o600))
			done := make(chan struct{})
			go func() {
				defer close(done)
				a.check(t.Context(), "app#1")
			}()
			waitFor(t, patience, "the check", func() bool { _, err := os.Stat(filepath.Join(a.dir, "begun")); return err == nil })
			must(t, unix.Kill(pid, unix.SIGKILL))
			a.ends()
			must(t, os.WriteFile(filepath.Join(a.dir, "go"), nil, 0o600))
			<-done
			if seen := a.history(); seen[len(seen)-1] != "app#1 down" {
				t.Errorf("told: %q", seen)
			}
			if note := a.note("app#1"); note != "ended: signal: killed" {
				t.Errorf("%q", note)
			}
		})
	}
}

// TestStopDuringStart: the order to start is cancelled, then the stop comes.
func TestStopDuringStart(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = @/program\ncheck = false\nstart_timeout = 30s\n")
	a.script("program", "echo $$ >@/pid; exec sleep 1000")
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := make(chan error)
	go func() { ended <- a.perform(ctx, order{Verb: verbStart}) }()
	pid := a.pid("pid")
	cancel(errCancelled)
	wantText(t, "the error", fmt.Sprint(<-ended), "app#1: cancelled by a later order")
	if alive(pid) {
		t.Error("the program was not stopped")
	}
	if err := a.do(verbStop); err != "<nil>" {
		t.Error(err)
	}
	a.is("app#1", statusDown)
}

func TestAppChecks(t *testing.T) {
	for _, of := range []struct {
		kind, body string // of the check
		want       status
		note       string
	}{
		{"script", "exit 0", statusUp, ""},
		{"script", "exit 3", statusDown, ""},
		{"script", "echo gone; exit 1", statusDown, "exit status 1: gone"},
		{"script", "echo who knows; exit 4", statusUndef, "status: exit status 4, unknown (LSB): who knows"},
		{"script", "kill -9 $$", statusWarn, "check: @/check was ended by a signal: signal: killed"},
		{"script", "sleep 1000", statusWarn, "check: @/check did not end within 300ms and was killed"},
		{"script", "", statusDown, "cannot run @/check: fork/exec @/check: no such file or directory"},
		{"check", "exit 0", statusUp, ""},
		{"check", "exit 4", statusDown, "exit status 4"},
		{"check", "sleep 0.02 & setsid sleep 1000 & exit 0", statusUp, ""},
	} {
		t.Run(of.kind+" "+of.body, func(t *testing.T) {
			t.Parallel()
			text := "[app#1]\nscript = @/check\ntimeout = 300ms\n"
			if of.kind == "check" {
				text = "[app#1]\nstart = true\nstop = true\ncheck = @/check\ntimeout = 5s\n"
			}
			a := newActor(t, text)
			if of.body != "" {
				a.script("check", of.body)
			}
			state, note := appDriver{}.check(t.Context(), a.instance, a.spec().resource("app#1"))
			if want := strings.ReplaceAll(of.note, "@", a.dir); state != of.want || note != want {
				t.Errorf("%s, %q, want %s, %q", state, note, of.want, want)
			}
			if a.logged("") > 0 && a.logged("app#1") > 0 {
				t.Error("a check is logged")
			}
		})
	}
}

// TestStopThatLies: what says that it stopped and did not, or that it started.
func TestStopThatLies(t *testing.T) {
	a := newActor(t, "[app#1]\nstart = true\nstop = true\ncheck = test -e @/up\ntimeout = 300ms\n")
	wantText(t, "the error", a.do(verbStart), "app#1: not up within 300ms; its check says down")
	must(t, os.WriteFile(filepath.Join(a.dir, "up"), nil, 0o600))
	wantText(t, "the error", a.do(verbStop), "app#1: not down within 300ms; its check says up")
	if seen := a.history(); seen[len(seen)-1] != "app#1 up" {
		t.Errorf("told: %q", seen)
	}
	wantText(t, "the note", a.note("app#1"), "not stopped: not down within 300ms")
}

// TestStopWithin: many programs that do not end take no longer than one.
func TestStopWithin(t *testing.T) {
	t.Parallel()
	text := ""
	for i := range 4 {
		text += fmt.Sprintf("[app#%d]\nexec = @/stubborn %d\n", i, i)
	}
	a := newActor(t, text)
	a.script("stubborn", "trap '' TERM; echo $$ >@/ready$1; while :; do sleep 0.02; done")
	a.do(verbStart)
	for i := range 4 {
		a.pid(fmt.Sprint("ready", i))
	}
	begun := time.Now()
	must(t, a.perform(a.ctx, order{Verb: verbStop, Within: time.Second}))
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("the stop took %s", took)
	}
	if a.logged("and is killed") != 4 {
		t.Errorf("%d were killed", a.logged("and is killed"))
	}
}
