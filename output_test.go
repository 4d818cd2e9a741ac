package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// residentNow is the memory of this process, in bytes.
func residentNow(tb testing.TB) int {
	tb.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	must(tb, err)
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	must(tb, err)
	return pages * os.Getpagesize()
}

// TestFlood: 100 MB of a start script, then of a program, cost neither time,
// nor memory, nor log, nor disk.
func TestFlood(t *testing.T) {
	for _, of := range []struct{ name, text, body string }{
		{"script", "[app#1]\nstart = @/flood\nstop = true\ncheck = test -e @/end\ntimeout = 60s\n", "yes 'a line of the flood' | head -c 100000000; echo over; >@/end"},
		{"one line", "[app#1]\nstart = @/flood\nstop = true\ncheck = test -e @/end\ntimeout = 60s\n", "head -c 100000000 /dev/zero; echo over; >@/end"},
		{"program", "[app#1]\nexec = @/flood\n", "yes 'a line of the flood' | head -c 100000000; echo over; >@/end; exec sleep 1000"},
		{"failing script", "[app#1]\nstart = @/flood\nstop = true\ncheck = false\ntimeout = 60s\n", "yes 'a line of the flood' | head -c 100000000; >@/end; exit 3"},
	} {
		t.Run(of.name, func(t *testing.T) {
			a := newActor(t, of.text)
			a.script("flood", of.body)
			before, most, largest := residentNow(t), 0, int64(0)
			stop, stopped := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(stopped)
				for {
					most = max(most, residentNow(t))
					if info, err := os.Stat(a.outputPath("app#1")); err == nil {
						largest = max(largest, info.Size())
					}
					select {
					case <-stop:
						return
					case <-time.After(20 * time.Millisecond):
					}
				}
			}()
			begun := time.Now()
			wantText(t, "the error", a.do(verbStart), map[bool]string{true: "exit status 3", false: "<nil>"}[of.name == "failing script"])
			waitFor(t, time.Minute, "the flood is over", func() bool { _, err := os.Stat(filepath.Join(a.dir, "end")); return err == nil })
			took := time.Since(begun)
			waitFor(t, patience, "the log tells that something is left out", func() bool { return a.logged("of output are left out") > 0 })
			close(stop)
			<-stopped
			a.noting.Lock()
			logged := a.bytes
			a.noting.Unlock()
			t.Logf("100 MB in %s: %d bytes of log, %d MB more memory, a file of up to %d MB", took.Round(time.Millisecond), logged, (most-before)>>20, largest>>20)
			if limit := outputBurst + int(took.Seconds()+2)*outputRate + 100<<10; logged > limit {
				t.Errorf("%d bytes of log, at most %d", logged, limit)
			}
			if most-before > 50<<20 {
				t.Errorf("%d MB more memory", (most-before)>>20)
			}
			if info, err := os.Stat(a.outputPath("app#1")); err != nil || info.Size() > outputKept {
				t.Errorf("its file: %d bytes, %v", info.Size(), err)
			}
		})
	}
}

// TestChildWritesOn: what a start script leaves in the background does not hold
// it up, is not killed, and its output gets into the log.
func TestChildWritesOn(t *testing.T) {
	a := newActor(t, "[app#1]\nstart = @/start\nstop = @/stop\ncheck = test -e @/child\ntimeout = 30s\n")
	a.script("start", "sh -c 'echo $$ >@/child; n=0; while :; do n=$((n + 1)); echo line $n; sleep 0.05; done' & while [ ! -s @/child ]; do sleep 0.01; done; echo the script is done")
	a.script("stop", "kill $(cat @/child); rm @/child")
	begun := time.Now()
	if err := a.do(verbStart); err != "<nil>" {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
	child := a.pid("child")
	more := a.logged("app#1 line ") + 3
	waitFor(t, patience, "its later lines", func() bool { return a.logged("app#1 line ") >= more })
	if !alive(child) || a.logged("the script is done") != 1 {
		t.Error("the child was killed, or the script's own line is missing")
	}
	// The daemon's end does not end it, and the next one reads on.
	b := a.again("")
	must(t, b.begin())
	waitFor(t, patience, "its lines at the next daemon", func() bool { return b.logged("app#1 line ") >= 3 })
	if !alive(child) {
		t.Error("the daemon's end killed it")
	}
	if err := b.do(verbStop); err != "<nil>" {
		t.Error(err)
	}
	waitFor(t, patience, "the end of the child", func() bool { return !alive(child) })
}

// TestLinesOverDaemons: each line is logged once, by one daemon or the next.
func TestLinesOverDaemons(t *testing.T) {
	a := newActor(t, "[app#1]\nexec = @/program\n")
	a.script("program", "n=0; while :; do n=$((n + 1)); echo \"line $n.\"; sleep 0.01; done")
	a.program()
	all := []string{}
	for range 3 {
		more := a.logged("line ") + 20
		waitFor(t, patience, "more lines", func() bool { return a.logged("line ") >= more })
		b := a.again("")
		all = append(all, a.lines...)
		must(t, b.begin())
		a = b
	}
	waitFor(t, patience, "the last daemon's lines", func() bool { return a.logged("line ") >= 20 })
	a.die()
	all = append(all, a.lines...)
	all = slices.DeleteFunc(all, func(line string) bool { return !strings.HasPrefix(line, "app#1 line ") })
	for n, line := range all {
		if want := fmt.Sprintf("app#1 line %d.", n+1); line != want {
			t.Fatalf("of %d lines, number %d is %q", len(all), n+1, line)
		}
	}
}

// outputOf is the output of app#1, without anybody who follows it.
func outputOf(t *testing.T) (a *actor, o *output) {
	t.Helper()
	a = newActor(t, "[app#1]\nexec = sleep 1000\n")
	path := a.outputPath("app#1")
	must(t, os.MkdirAll(filepath.Dir(path), 0o700))
	o, err := openOutput(path, func(text string) { a.log(slog.LevelInfo, "app#1", text) })
	must(t, err)
	t.Cleanup(o.close)
	return a, o
}

func TestOutputLines(t *testing.T) {
	long := strings.Repeat("x", outputLine)
	for _, of := range []struct {
		name   string
		writes []string
		want   []string
	}{
		{"nothing", []string{""}, nil},
		{"lines", []string{"a\nb\n"}, []string{"a", "b"}},
		{"in pieces", []string{"a", "b\nc", "\n", "d"}, []string{"ab", "c"}},
		{"empty lines", []string{"\n\na\n"}, []string{"", "", "a"}},
		{"carriage returns", []string{"a\r\n", "b\r", "\n"}, []string{"a", "b"}},
		{"long", []string{long + "end\n"}, []string{long, "end"}},
		{"long, in pieces", []string{long[:5000], long[:5000], "\n"}, []string{long, long[:10000-outputLine]}},
		{"not text", []string{"\xff\x00\n"}, []string{"\xff\x00"}},
	} {
		t.Run(of.name, func(t *testing.T) {
			a, o := outputOf(t)
			for _, text := range of.writes {
				o.f.WriteString(text)
				o.drain()
			}
			var want []string
			for _, line := range of.want {
				want = append(want, "app#1 "+line)
			}
			if !slices.Equal(a.lines, want) {
				t.Errorf("%.100q, want %.100q", a.lines, want)
			}
		})
	}
}

func TestOutputOfCommand(t *testing.T) {
	a, o := outputOf(t)
	o.f.WriteString("earlier\nhalf ")
	o.begin()
	o.f.WriteString("of it\nlast")
	if got := o.end(); got != "of it\nlast" {
		t.Errorf("collected %q", got)
	}
	if want := []string{"app#1 earlier", "app#1 half of it", "app#1 last"}; !slices.Equal(a.lines, want) {
		t.Errorf("logged %q", a.lines)
	}
	o.begin()
	o.f.Write(bytes.Repeat([]byte("0123456\n"), commandOutput/8+1000))
	if got := o.end(); len(got) != commandOutput {
		t.Errorf("collected %d bytes", len(got))
	}
}

// TestOutputIsCut: the file does not grow, nothing of it is lost or told twice,
// and the place that the next daemon reads from is one.
func TestOutputIsCut(t *testing.T) {
	a, o := outputOf(t)
	lines := 0
	for range 40 {
		o.allowed = outputBurst // much time has passed
		text := strings.Repeat(strings.Repeat("y", 99)+"\n", 1000)
		lines += 1000
		o.f.WriteString(text + "half of")
		o.drain()
		at, err := os.ReadFile(a.outputPath("app#1") + ".at")
		must(t, err)
		if n, err := strconv.ParseInt(strings.TrimSpace(string(at)), 10, 64); err != nil || n < 0 {
			t.Fatalf("the next daemon would read from %q", at)
		}
		if info, _ := o.f.Stat(); info.Size() > outputKept+200<<10 {
			t.Fatalf("the file has %d bytes", info.Size())
		}
		o.f.WriteString(" a line\n")
		lines++
		o.drain()
	}
	if got := a.bytes; got != 40*(1000*99+len("half of a line")) {
		t.Errorf("%d bytes are logged", got)
	}
	must(t, o.f.Truncate(0)) // by somebody
	o.f.WriteString("after\n")
	o.drain()
	if a.logged("app#1 after") != 1 && a.bytes < 1<<20 {
		t.Error("what comes after somebody cut the file is lost")
	}
}

// TestOutputAllowance: who writes too much is told so, and heard again later.
func TestOutputAllowance(t *testing.T) {
	a, o := outputOf(t)
	o.f.Write(bytes.Repeat([]byte("0123456\n"), outputBurst/8+1000))
	if !o.drain() {
		t.Error("not seen as a flood")
	}
	if o.drain() || a.logged("(8000 bytes of output are left out") != 1 {
		t.Errorf("what is left out is not told: %d", o.dropped)
	}
	o.refilled = o.refilled.Add(-time.Second)
	o.f.WriteString("again\n")
	if o.drain() || a.logged("app#1 again") != 1 {
		t.Error("it is not heard again")
	}
}

func TestLastLine(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "\n \n": "", "a": "a", "a\nb\n\n": "b", "a\r\nb \n": "b",
	} {
		if got := lastLine(text); got != want {
			t.Errorf("of %q: %q, want %q", text, got, want)
		}
	}
}
