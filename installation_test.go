package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// disk is a node's files as a product and its packages leave them.
type disk struct {
	t       *testing.T
	paths   paths
	release string
}

func newDisk(t *testing.T) disk {
	t.Helper()
	p := testFolders(t)
	return disk{t, p, filepath.Join(p.etc, "release")}
}

// reader reads the disk with a node.conf of text; FILE stands for the
// release file, DIR for its folder.
func (d disk) reader(text string) statusReader {
	d.t.Helper()
	text = strings.NewReplacer("FILE", d.release, "DIR", d.paths.etc).Replace(text)
	return statusReader{c: parsedConfig(d.t, text), paths: d.paths, run: runCommand, releaseFile: d.release}
}

func (d disk) installs(text string) { d.t.Helper(); writeText(d.t, d.release, text) }

func (d disk) finalizes(text string) { d.t.Helper(); writeText(d.t, d.paths.finalized(), text) }

const neteye412 = "NetEye release 4.12 (Core)\n"

func TestNodeStates(t *testing.T) {
	t.Parallel()
	folder := func(path string) func(disk) {
		return func(d disk) { writeText(d.t, filepath.Join(d.paths.etc, path, "x"), "") }
	}
	fifo := func(path string) func(disk) {
		return func(d disk) {
			if err := syscall.Mkfifo(filepath.Join(d.paths.etc, path), 0o600); err != nil {
				d.t.Fatal(err)
			}
		}
	}
	release := func(text string) func(disk) { return func(d disk) { d.installs(text) } }
	both := func(finalized string) func(disk) {
		return func(d disk) {
			d.installs(neteye412)
			d.finalizes(finalized)
		}
	}
	// Where the files stand by their names in the folder of node.conf.
	at := func(name, more string) string { return "[finalized]\nfile = DIR/" + name + "\n" + more }
	tests := []struct {
		name  string
		conf  string
		disk  func(disk)
		state nodeState
		code  string // of the reason; empty: none
		says  string // in the reason
	}{
		{"finalized", "", both("4.12\n"), nodeFinalized, "", ""},
		{"finalized, spelled otherwise", "", both(" 4.012 \n"), nodeFinalized, "", ""},
		{"unfinalized", "", both("4.11\n"), nodeUnfinalized, "not_finalized", "4.12 is installed, 4.11 is finalized"},
		{"downgraded", "", both("4.13\n"), nodeDowngraded, "downgraded", "4.12 is installed, 4.13 is finalized"},
		{"finalized file missing", "", release(neteye412), nodeUnfinalized, "not_finalized", "nothing is finalized"},

		{"release file missing", "", func(disk) {}, nodeUnreadable, "installed_unreadable", "no such file"},
		{"release file empty", "", release(""), nodeUnreadable, "installed_unreadable", "empty"},
		{"release file of blanks", "", release(" \n\t\n"), nodeUnreadable, "installed_unreadable", "empty"},
		{"release file without a version", "", release("NetEye, the newest\n"), nodeUnreadable, "installed_unreadable", `"NetEye, the newest"`},
		{"release file is a folder", "", folder("release"), nodeUnreadable, "installed_unreadable", "not a regular file"},
		{"release file is a FIFO", "", fifo("release"), nodeUnreadable, "installed_unreadable", "not a regular file"},
		{"release file far too large", "", release(strings.Repeat("x", releaseFileSize+1)), nodeUnreadable, "installed_unreadable", "larger"},
		{"release not in ASCII", "", release("NetEye release ４.12\n"), nodeUnreadable, "installed_unreadable", "NetEye release ?.12"},
		{"unreadable and nothing finalized", "", release(""), nodeUnreadable, "installed_unreadable", ""},

		// Unreadable is not unfinalized: nobody knows.
		{"finalized file empty", "", both(""), nodeUnreadable, "finalized_unreadable", "empty"},
		{"finalized file garbage", "", both("<html>\n"), nodeUnreadable, "finalized_unreadable", `"<html>"`},
		{"finalized file with two versions", "", both("4.12 4.11\n"), nodeUnreadable, "finalized_unreadable", ""},
		{"finalized file is a folder", at("done", "[release]\nfile = FILE\n"), func(d disk) { d.installs(neteye412); folder("done")(d) }, nodeUnreadable, "finalized_unreadable", "not a regular file"},
		{"finalized file is a FIFO", at("done", ""), func(d disk) { d.installs(neteye412); fifo("done")(d) }, nodeUnreadable, "finalized_unreadable", "not a regular file"},
		{"finalized file far too large", "", both(strings.Repeat("4", releaseFileSize+1)), nodeUnreadable, "finalized_unreadable", "larger"},
		{"finalized.pattern matches", "[finalized]\npattern = ^done: (?P<version>\\S+)\n", both("x\ndone: 4.12\n"), nodeFinalized, "", ""},
		{"finalized.pattern does not match", "[finalized]\npattern = ^done: (?P<version>\\S+)\n", both("4.12\n"), nodeUnreadable, "finalized_unreadable", ""},

		{"none", "[finalized]\nmode = none\n", release(neteye412), nodeFinalized, "", ""},
		{"none, release missing", "[finalized]\nmode = none\n", func(disk) {}, nodeUnreadable, "installed_unreadable", ""},

		{"finalized command", "[finalized]\nmode = command\ncommand = sh -c 'echo 4.11; echo more'\n", release(neteye412), nodeUnfinalized, "not_finalized", "4.11"},
		{"finalized command says nothing", "[finalized]\nmode = command\ncommand = true\n", release(neteye412), nodeUnfinalized, "not_finalized", "nothing"},
		{"finalized command fails", "[finalized]\nmode = command\ncommand = sh -c 'echo 4.12; exit 3'\n", release(neteye412), nodeUnreadable, "finalized_unreadable", "exit status 3"},
		{"finalized command is not there", "[finalized]\nmode = command\ncommand = DIR/none\n", release(neteye412), nodeUnreadable, "finalized_unreadable", "none"},
		{"finalized command says garbage", "[finalized]\nmode = command\ncommand = echo no idea\n", release(neteye412), nodeUnreadable, "finalized_unreadable", "no idea"},
		{"finalized command is ended by a signal", "[finalized]\nmode = command\ncommand = sh -c 'echo 4.12; kill -9 $$'\n", release(neteye412), nodeUnreadable, "finalized_unreadable", "signal"},
		{"finalized command is not set", "[finalized]\nmode = command\n", release(neteye412), nodeUnreadable, "finalized_unreadable", "finalized.command"},

		{"marker missing", at("marker", "mode = marker\n"), release(neteye412), nodeUnfinalized, "not_finalized", "nothing"},
		{"marker newer", at("marker", "mode = marker\n"), func(d disk) { d.installs(neteye412); writeText(d.t, d.paths.etc+"/marker", "") }, nodeFinalized, "", ""},
		{"marker older", at("marker", "mode = marker\n"), func(d disk) {
			writeText(d.t, d.paths.etc+"/marker", "")
			d.installsAfter(neteye412, d.paths.etc+"/marker")
		}, nodeUnfinalized, "not_finalized", "nothing"},
		{"marker is a folder", at("marker", "mode = marker\n"), func(d disk) { d.installs(neteye412); folder("marker")(d) }, nodeUnreadable, "finalized_unreadable", "not a regular file"},
		{"marker, release missing", at("marker", "mode = marker\n"), folder("x"), nodeUnreadable, "installed_unreadable", ""},

		{"release command", "[release]\ncommand = sh -c 'echo 4.12; echo more'\n", func(d disk) { d.finalizes("4.12") }, nodeFinalized, "", ""},
		{"release command fails", "[release]\ncommand = sh -c 'echo 4.12; exit 1'\n", both("4.12"), nodeUnreadable, "installed_unreadable", "exit status 1"},
		{"release command says nothing", "[release]\ncommand = true\n", both("4.12"), nodeUnreadable, "installed_unreadable", ""},
		{"release command is not there", "[release]\ncommand = DIR/none\n", both("4.12"), nodeUnreadable, "installed_unreadable", "none"},

		{"sprint release by release.rewrite", "[release]\nrewrite = -sr=~sr\n", func(d disk) {
			d.installs("NetEye release 4.40-sr2\n")
			d.finalizes("4.40\n")
		}, nodeDowngraded, "downgraded", "4.40-sr2 is installed, 4.40 is finalized"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := newDisk(t)
			test.disk(d)
			s := d.reader(test.conf).read(t.Context())
			if s.State != test.state {
				t.Errorf("state = %s, want %s", s.State, test.state)
			}
			switch {
			case test.code == "" && len(s.Reasons) > 0:
				t.Errorf("reasons: %v", s.Reasons)
			case test.code != "" && (len(s.Reasons) == 0 || s.Reasons[0].Code != test.code || !strings.Contains(s.Reasons[0].Message, test.says)):
				t.Errorf("reasons: %v; want %s with %q", s.Reasons, test.code, test.says)
			}
			if (s.State == nodeUnreadable) != (s.Installed.Error != "" || s.Finalized.Error != "") {
				t.Errorf("state %s with the errors %q and %q", s.State, s.Installed.Error, s.Finalized.Error)
			}
		})
	}
}

// installsAfter writes the release file, again until the kernel's clock says
// that this was after other was written.
func (d disk) installsAfter(text, other string) {
	d.t.Helper()
	change := func(path string) time.Time {
		info, err := os.Stat(path)
		if err != nil {
			d.t.Fatal(err)
		}
		return *changeTime(info)
	}
	for d.installs(text); !change(d.release).After(change(other)); d.installs(text) {
	}
}

// Both are told when neither can be read.
func TestNodeStatusTellsBothErrors(t *testing.T) {
	t.Parallel()
	d := newDisk(t)
	d.finalizes("no version")
	s := d.reader("").read(t.Context())
	if len(s.Reasons) != 2 || s.Reasons[0].Code != "installed_unreadable" || s.Reasons[1].Code != "finalized_unreadable" {
		t.Errorf("reasons: %v", s.Reasons)
	}
}

func TestNodeStatusValues(t *testing.T) {
	t.Parallel()
	d := newDisk(t)
	d.installs("# comment\nNetEye release 4.40-sr2 (Core)\n")
	d.finalizes("4.40~sr2\n")
	// Package managers set the modification time; what counts is when the
	// file came to this disk.
	begun := time.Now().Add(-time.Minute)
	old := time.Unix(1_000_000_000, 0)
	if err := os.Chtimes(d.release, old, old); err != nil {
		t.Fatal(err)
	}
	s := d.reader("[cluster]\nnodes = n1 n2\n[release]\nrewrite = -sr=~sr\n").read(t.Context())
	if s.Product != "NetEye" || s.Installed.Version != "4.40-sr2" || s.Installed.Raw != "NetEye release 4.40-sr2 (Core)" || string(s.Installed.Source) != d.release {
		t.Errorf("product %q, installed %+v", s.Product, s.Installed)
	}
	if s.Installed.Since == nil || s.Installed.Since.Before(begun) {
		t.Errorf("installed since %v; the file was written now", s.Installed.Since)
	}
	// The rewriting is for comparison only: the versions are shown as written.
	if s.State != nodeFinalized || s.Finalized.Version != "4.40~sr2" || string(s.Finalized.Source) != d.paths.finalized() {
		t.Errorf("%s, finalized %+v", s.State, s.Finalized)
	}
	if s.Nodename != "n1" || len(s.ClusterNodes) != 2 || s.Schema != 1 {
		t.Errorf("%+v", s)
	}
}

// What is not known is null in JSON, never an empty string, nor false.
func TestNodeStatusJSON(t *testing.T) {
	t.Parallel()
	s := newDisk(t).reader("").read(t.Context())
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Product, Previous            json.RawMessage
		Installed, Finalized, Reboot map[string]json.RawMessage
	}
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]json.RawMessage{
		"product": got.Product, "previous": got.Previous, "installed.version": got.Installed["version"], "installed.since": got.Installed["since"],
		"finalized.version": got.Finalized["version"], "finalized.error": got.Finalized["error"], "reboot.required": got.Reboot["required"],
	} {
		if string(value) != "null" {
			t.Errorf("%s = %s, want null", name, value)
		}
	}
	if string(got.Installed["error"]) == "null" {
		t.Error("installed.error is null without a release file")
	}
}

func TestReleaseProduct(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ conf, text, want string }{
		"of the pattern":                     {"", neteye412, "NetEye"},
		"of the file, if another is wanted":  {"[release]\nproduct = Other\n", neteye412, "NetEye"},
		"of node.conf, if the file has none": {"[release]\nproduct = Other\n", "4.12\n", "Other"},
		"of os-release":                      {"[release]\nformat = os-release\n", "NAME=\"Red Hat\"\nVERSION_ID=8.10\n", "Red Hat"},
		"none":                               {"", "4.12\n", ""},
	} {
		d := newDisk(t)
		d.installs(test.text)
		if s := d.reader(test.conf).read(t.Context()); string(s.Product) != test.want {
			t.Errorf("%s: product = %q, want %q (%v)", name, s.Product, test.want, s.Reasons)
		}
	}
}

func TestReleaseFormats(t *testing.T) {
	t.Parallel()
	const osRelease = "# c\nNAME=\"Rocky Linux\"\nVERSION_ID='8.10'\nPLATFORM=el8 # eight\n"
	standard := parsedConfig(t, "")
	pattern := value[*regexp.Regexp](standard, "release.pattern")
	tests := []struct {
		name             string
		format           releaseFormat
		path, text       string
		version, product string // no version: an error
	}{
		{"auto: pattern", releaseFormat{"auto", pattern, "VERSION_ID"}, "/etc/x-release", "NetEye release 4.12 (Core)", "4.12", "NetEye"},
		{"auto: pattern, a later line", releaseFormat{"auto", pattern, "VERSION_ID"}, "/etc/x-release", "\nWelcome\n Net Eye release 4.12~rc1\r\nX release 9\n", "4.12~rc1", "Net Eye"},
		{"auto: the version alone", releaseFormat{"auto", pattern, "VERSION_ID"}, "/etc/x-release", "\n 4.12-1 \nmore\n", "4.12-1", ""},
		{"auto: neither", releaseFormat{"auto", pattern, "VERSION_ID"}, "/etc/x-release", "NetEye 4.12\n", "", ""},
		{"auto: os-release by its name", releaseFormat{"auto", pattern, "VERSION_ID"}, "/etc/os-release", osRelease, "8.10", "Rocky Linux"},
		{"auto: another name with that content", releaseFormat{"auto", pattern, "VERSION_ID"}, "/etc/rocky-release", osRelease, "", ""},
		{"os-release: another key", releaseFormat{"os-release", pattern, "PLATFORM"}, "/x", osRelease, "el8 # eight", "Rocky Linux"},
		{"os-release: key missing", releaseFormat{"os-release", pattern, "BUILD_ID"}, "/x", osRelease, "", ""},
		{"os-release: key empty", releaseFormat{"os-release", pattern, "VERSION_ID"}, "/x", "VERSION_ID=\n", "", ""},
		{"os-release: in a comment", releaseFormat{"os-release", pattern, "VERSION_ID"}, "/x", "#VERSION_ID=1\n", "", ""},
		{"os-release: the last one counts", releaseFormat{"os-release", pattern, "VERSION_ID"}, "/x", "VERSION_ID=1\nVERSION_ID=2\n", "2", ""},
		{"os-release: a quote that is not closed", releaseFormat{"os-release", pattern, "VERSION_ID"}, "/x", "VERSION_ID=\"1\nVERSION_ID=2\nNAME='x\n", "2", ""},
		{"os-release: CRLF", releaseFormat{"os-release", pattern, "VERSION_ID"}, "/x", "VERSION_ID=\"1\"\r\n", "1", ""},
		{"pattern: the version alone is no match", releaseFormat{"pattern", pattern, ""}, "/x", "4.12\n", "", ""},
		{"pattern: without a product", releaseFormat{"pattern", regexp.MustCompile(`v(?P<version>\d+)`), ""}, "/x", "v12", "12", ""},
		{"plain", releaseFormat{"plain", nil, ""}, "/x", "\n\n4.12\n", "4.12", ""},
		{"plain: a sentence is none", releaseFormat{"plain", nil, ""}, "/x", "NetEye release 4.12\n", "", ""},
		{"plain: the first line counts", releaseFormat{"plain", nil, ""}, "/x", "x y\n4.12\n", "", ""},
	}
	for _, test := range tests {
		got, err := test.format.parse(test.path, test.text)
		if got.version != test.version || got.product != test.product || (err == nil) != (test.version != "") {
			t.Errorf("%s: %+v, %v; want version %q of %q", test.name, got, err, test.version, test.product)
		}
	}
	// Errors are shown on a terminal and sent on: a file's bytes are not.
	if _, err := (releaseFormat{"plain", nil, ""}).parse("/x", "\x1b[2Jé"+strings.Repeat("x", 1000)); err == nil || len(err.Error()) > 200 || strings.ContainsAny(err.Error(), "\x1bé") {
		t.Errorf("error = %q", err)
	}
}

// A file that is empty, or changes, is perhaps being written: it is read
// again before it counts as unreadable.
func TestFinalizedFileIsReadAgain(t *testing.T) {
	d := newDisk(t)
	d.installs(neteye412)
	d.finalizes("")
	// The second writing follows the first reading, by the kernel's word.
	watch, err := syscall.InotifyInit1(syscall.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(watch)
	if _, err := syscall.InotifyAddWatch(watch, d.paths.finalized(), syscall.IN_CLOSE_NOWRITE); err != nil {
		t.Fatal(err)
	}
	next := filepath.Join(d.paths.lib, "next")
	writeText(t, next, "4.12\n")
	written := make(chan error, 1)
	go func() {
		_, err := syscall.Read(watch, make([]byte, 4096))
		if err == nil {
			err = os.Rename(next, d.paths.finalized())
		}
		written <- err
	}()
	s := d.reader("").finalizedFile(t.Context(), d.paths.finalized())
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if s.Version != "4.12" || s.Error != "" || s.Since == nil {
		t.Errorf("finalized = %+v; want what was written after the first reading", s)
	}
}

// A file that stays empty is unreadable after the third reading, and at once
// when there is no time left.
func TestFinalizedFileStaysEmpty(t *testing.T) {
	t.Parallel()
	d := newDisk(t)
	d.finalizes("\n")
	begun := time.Now()
	s := d.reader("").finalizedFile(t.Context(), d.paths.finalized())
	if took := time.Since(begun); s.Error == "" || took < (finalizedReads-1)*finalizedPause {
		t.Errorf("after %s: %+v; want an error after %d readings", took, s, finalizedReads)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if s := d.reader("").finalizedFile(ended, d.paths.finalized()); s.Error == "" {
		t.Errorf("with no time left: %+v", s)
	}
}

func TestRebootCommand(t *testing.T) {
	t.Parallel()
	yes, no := true, false
	for name, test := range map[string]struct {
		command string
		want    *bool
		why     string
	}{
		"required":     {"sh -c 'echo new kernel; exit 1'", &yes, "new kernel"},
		"not required": {"sh -c 'echo all well; exit 0'", &no, "all well"},
		"not known":    {"sh -c 'echo rpm is locked; exit 2'", nil, "rpm is locked"},
		"not there":    {"/nonexistent/reboot", nil, "/nonexistent/reboot"},
	} {
		got := newDisk(t).reader("[reboot]\ncommand = " + test.command + "\n").read(t.Context()).Reboot
		if (got.Required == nil) != (test.want == nil) || got.Required != nil && *got.Required != *test.want || !strings.Contains(got.Why, test.why) {
			t.Errorf("%s: %+v, want %v because of %q", name, got, test.want, test.why)
		}
	}
	if got := newDisk(t).reader("").read(t.Context()).Reboot; got.Required != nil {
		t.Errorf("without a command: %+v; not known is not false", got)
	}
}

// A hook that does not end is killed with all that it started. Its child
// holds a FIFO open as long as it lives, so the end of the FIFO is its end.
func TestHookTimeoutKillsTheGroup(t *testing.T) {
	t.Parallel()
	d := newDisk(t)
	path := filepath.Join(d.paths.run, "alive")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer fifo.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	began := make(chan error, 1)
	go func() { // the hook's time is over as soon as its child is there
		_, err := fifo.Read(make([]byte, 1))
		began <- err
		cancel()
	}()
	script := fmt.Sprintf("(printf x; exec sleep 1000) >%s & echo 4.12; wait", path)
	_, _, err = d.reader("").hook(ctx, []string{"sh", "-c", script})
	if err == nil || !strings.Contains(err.Error(), "did not end in time") {
		t.Errorf("error = %v", err)
	}
	if err := <-began; err != nil {
		t.Fatal(err)
	}
	// With the last writer gone, a reader of its own sees the end.
	reader, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	fifo.Close()
	reader.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := reader.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the hook's child lives on: read %d, %v", n, err)
	}
}

// Each hook has 5 s, and less if its caller has less.
func TestHookHasItsTime(t *testing.T) {
	t.Parallel()
	r := newDisk(t).reader("")
	left := time.Duration(0)
	r.run = func(ctx context.Context, _ []string, _, _ io.Writer) (int, error) {
		deadline, ok := ctx.Deadline()
		if !ok {
			t.Error("the hook has no deadline")
		}
		left = time.Until(deadline)
		return 0, nil
	}
	r.hook(t.Context(), []string{"x"})
	if left > hookTimeout || left < hookTimeout-2*time.Second || hookTimeout != 5*time.Second {
		t.Errorf("the hook has %s", left)
	}
	short, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	r.hook(short, []string{"x"})
	if left > time.Second {
		t.Errorf("the hook has %s of its caller's second", left)
	}
}

// 64 KiB are read; a hook that says more neither hangs nor fills the memory.
func TestHookOutputIsBounded(t *testing.T) {
	t.Parallel()
	d := newDisk(t)
	d.finalizes("4.12")
	r := d.reader("[release]\ncommand = sh -c 'echo 4.12; exec head -c 1000000 /dev/zero'\n")
	out, exit, err := r.hook(t.Context(), r.c.list("release.command"))
	if len(out) != hookOutput || exit != 0 || err != nil {
		t.Errorf("%d bytes, exit %d, %v; want %d bytes of a hook that ended well", len(out), exit, err, hookOutput)
	}
	if s := r.read(t.Context()); s.State != nodeFinalized || s.Installed.Version != "4.12" {
		t.Errorf("%s, installed %+v", s.State, s.Installed)
	}
}

// Arguments reach a hook as they are written: no shell is between.
func TestHookHasNoShell(t *testing.T) {
	t.Parallel()
	r := newDisk(t).reader("[release]\ncommand = echo $HOME \"a  b\" `id` ;\n")
	out, _, err := r.hook(t.Context(), r.c.list("release.command"))
	if want := "$HOME a  b `id` ;\n"; out != want || err != nil {
		t.Errorf("output = %q, %v; want %q", out, err, want)
	}
}

func TestFinalize(t *testing.T) {
	t.Parallel()
	const pattern = "[finalized]\npattern = ^done: (?P<version>\\S+)\n"
	tests := []struct {
		name   string
		conf   string
		before string // in the finalized file; "-": no file
		wanted string
		want   string // in the file; the same as before if refused
		fails  string // in the error
	}{
		{"first", "", "-", "", "4.12\n", ""},
		{"first, with the right version", "", "-", "4.12", "4.12\n", ""},
		{"spelled otherwise", "", "-", "4.012", "4.12\n", ""},
		{"upgrade", "", "4.11\n", "4.12", "4.12\n", ""},
		{"downgrade", "", "4.13\n", "", "4.12\n", ""},
		{"over garbage", "", "<html>", "", "4.12\n", ""},
		{"another version", "", "4.11\n", "4.13", "4.11\n", "4.12 is installed"},
		{"no version", "", "4.11\n", "4 12", "4.11\n", "4 12"},
		{"marker", "[finalized]\nmode = marker\n", "4.11\n", "", "4.11\n", "finalized.mode is marker"},
		{"none", "[finalized]\nmode = none\n", "4.11\n", "", "4.11\n", "finalized.mode is none"},
		{"folder missing", "[finalized]\nfile = DIR/none/finalized\n", "4.11\n", "", "4.11\n", "none/finalized"},
		{"pattern, finalized already", pattern, "done: 4.12\n", "", "done: 4.12\n", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := newDisk(t)
			d.installs(neteye412)
			if test.before != "-" {
				d.finalizes(test.before)
			}
			r := d.reader(test.conf)
			version, err := finalize(t.Context(), r.c, d.paths, d.release, test.wanted)
			if test.fails == "" && (err != nil || version != "4.12") || test.fails != "" && (err == nil || !strings.Contains(err.Error(), test.fails)) {
				t.Errorf("finalize = %q, %v; want the error %q", version, err, test.fails)
			}
			if got := readText(t, d.paths.finalized()); got != test.want {
				t.Errorf("the file holds %q, want %q", got, test.want)
			}
			if test.fails == "" {
				checkFinalizedAgain(t, d, r, test.wanted)
			}
		})
	}
}

// checkFinalizedAgain: the node is finalized now, and to finalize it again is
// well and writes nothing.
func checkFinalizedAgain(t *testing.T, d disk, r statusReader, wanted string) {
	t.Helper()
	if s := r.read(t.Context()); s.State != nodeFinalized {
		t.Errorf("after finalize the node is %s: %v", s.State, s.Reasons)
	}
	before := fileStamp(d.paths.finalized())
	if version, err := finalize(t.Context(), r.c, d.paths, d.release, wanted); err != nil || version != "4.12" {
		t.Errorf("finalized again: %q, %v", version, err)
	}
	if fileStamp(d.paths.finalized()) != before {
		t.Error("finalized again, the file was written again")
	}
}

func TestFinalizeOfWhatIsNotKnown(t *testing.T) {
	t.Parallel()
	d := newDisk(t)
	d.finalizes("4.11\n")
	if _, err := finalize(t.Context(), d.reader("").c, d.paths, d.release, "4.12"); err == nil || !strings.Contains(err.Error(), "not known") {
		t.Errorf("error = %v", err)
	}
	if got := readText(t, d.paths.finalized()); got != "4.11\n" {
		t.Errorf("the file holds %q", got)
	}
}

// Where the file has a form of its own, finalize writes what reads back, or
// refuses and leaves the product's file alone.
func TestFinalizeWithPatternReadsBackOrRefuses(t *testing.T) {
	t.Parallel()
	d := newDisk(t)
	d.installs(neteye412)
	d.finalizes("done: 4.11\n")
	r := d.reader("[finalized]\npattern = ^done: (?P<version>\\S+)\n")
	_, err := finalize(t.Context(), r.c, d.paths, d.release, "")
	if err != nil {
		if got := readText(t, d.paths.finalized()); got != "done: 4.11\n" {
			t.Errorf("refused, and the file holds %q", got)
		}
		return
	}
	if s := r.read(t.Context()); s.State != nodeFinalized {
		t.Errorf("after finalize the node is %s: %v", s.State, s.Reasons)
	}
}

func FuzzRelease(f *testing.F) {
	f.Add(neteye412, 0)
	f.Add("# c\nNAME=\"Rocky Linux\"\nVERSION_ID='8.10'\r\n", 1)
	f.Add("4.12", 2)
	f.Add("#VERSION_ID=1\nVERSION_ID=2\n", 1)
	f.Add("\n x release 4.12~rc1^git\x00\n", 3)
	f.Add("VERSION_ID=\"1\nVERSION_ID= \" \" '#'\n", 1)
	formats := []struct {
		path string
		releaseFormat
	}{
		{"/etc/x-release", releaseFormat{"auto", regexp.MustCompile(`^(?P<product>.*?) release (?P<version>[0-9][0-9A-Za-z._~^+-]*)`), "VERSION_ID"}},
		{"/etc/os-release", releaseFormat{"auto", regexp.MustCompile(`(?P<version>)`), "VERSION_ID"}},
		{"/etc/version", releaseFormat{"plain", nil, ""}},
		{"/etc/version", releaseFormat{"pattern", regexp.MustCompile(`(?P<product>a)?(?P<version>\S+)?`), ""}},
	}
	f.Fuzz(func(t *testing.T, text string, which int) {
		format := formats[uint(which)%uint(len(formats))]
		found, err := format.parse(format.path, text)
		if err != nil {
			if found != (release{}) || strings.ContainsAny(err.Error(), "\n\r\x00\x1b") {
				t.Fatalf("%+v with the error %q", found, err)
			}
			return
		}
		if format.name != "auto" && !strings.Contains(text, found.version) {
			t.Fatalf("the version %q is not in %q", found.version, text)
		}
		if strings.Contains(found.raw, "\n") {
			t.Fatalf("raw is more than a line: %q", found.raw)
		}
		if _, err := parseVersion(found.version); format.name == "plain" && err != nil {
			t.Fatalf("plain gives %v", err)
		}
		// The ends of lines make no difference.
		if again, err := format.parse(format.path, strings.ReplaceAll(text, "\n", "\r\n")+"\r\n\n"); err != nil || again != found {
			t.Fatalf("with other ends of lines: %+v, %v; want %+v", again, err, found)
		}
		for key, value := range parseOSRelease(text) {
			if strings.HasPrefix(key, "#") || strings.ContainsAny(key, "=\n") || strings.Contains(value, "\n") {
				t.Fatalf("os-release sets %q to %q", key, value)
			}
		}
	})
}
