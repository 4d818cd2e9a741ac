package main

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The version of before is remembered across restarts, and the disk decides
// what is installed.
func TestJournalRemembersThePrevious(t *testing.T) {
	t.Parallel()
	d := statusDaemon(t, "")
	install := func(version string) nodeStatus {
		writeText(t, d.config.Load().text("release.file"), "NetEye release "+version+"\n")
		return d.nodeStatus(t.Context())
	}
	previous := func(s nodeStatus) string {
		if s.Previous == nil {
			return "none"
		}
		return s.Previous.Version
	}
	for _, step := range []struct{ version, want string }{
		{"4.11", "none"},
		{"4.11", "none"},
		{"4.12", "4.11"},
		{"4.012", "4.11"}, // another spelling is no other version
		{"restart", ""},
		{"4.12", "4.11"},
		{"4.11", "4.12"}, // going back is a change too
		{"unreadable", "none"},
		{"4.11", "4.12"},
	} {
		switch step.version {
		case "restart":
			d.journal = openJournal(d.paths.journal(), slog.New(slog.DiscardHandler))
			continue
		case "unreadable":
			// No journal stands in for a disk that does not tell.
			writeText(t, d.config.Load().text("release.file"), "")
			if s := d.nodeStatus(t.Context()); s.State != nodeUnreadable || s.Installed.Version != "" {
				t.Errorf("an empty release file: %s, %+v", s.State, s.Installed)
			}
			continue
		}
		s := install(step.version)
		if string(s.Installed.Version) != step.version || previous(s) != step.want {
			t.Errorf("with %s on the disk: installed %s, previous %s; want %s", step.version, s.Installed.Version, previous(s), step.want)
		}
	}
}

// Where no file tells since when (a command does not), the journal does.
func TestJournalKnowsSince(t *testing.T) {
	t.Parallel()
	d := statusDaemon(t, "[release]\ncommand = echo 4.12\n")
	first := d.nodeStatus(t.Context())
	if first.Installed.Since == nil {
		t.Fatalf("installed: %+v", first.Installed)
	}
	d.journal = openJournal(d.paths.journal(), slog.New(slog.DiscardHandler))
	if again := d.nodeStatus(t.Context()); again.Installed.Since == nil || !again.Installed.Since.Equal(*first.Installed.Since) {
		t.Errorf("installed since %v, after a restart since %v", first.Installed.Since, again.Installed.Since)
	}
}

// A journal that does not read costs what it held, not the daemon's start.
func TestJournalDamaged(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "installation.json")
	for _, text := range []string{"", "{", `{"current":7}`, strings.Repeat(" ", 1<<17)} {
		writeText(t, path, text)
		var logged bytes.Buffer
		j := openJournal(path, slog.New(slog.NewTextHandler(&logged, nil)))
		if j.state != (journalState{}) || !strings.Contains(logged.String(), "level=ERROR") {
			t.Errorf("%.10q: state %+v, log %q", text, j.state, logged.String())
		}
		if _, previous := j.observe("4.12", versionOrder{}); previous != nil {
			t.Errorf("%.10q: previous = %v", text, previous)
		}
		if state, err := readJournal(path); err != nil || state.Current == nil || state.Current.Version != "4.12" {
			t.Errorf("%.10q: the next journal is %+v, %v", text, state, err)
		}
	}
}

// The release file is chosen once. That it disappears later is an error, not
// a reason to read another. Not parallel: it changes which files are looked
// for.
func TestJournalKeepsTheReleaseFile(t *testing.T) {
	dir := t.TempDir()
	first, second := filepath.Join(dir, "neteye-release"), filepath.Join(dir, "os-release")
	standard := standardReleaseFiles
	standardReleaseFiles = []string{first, second}
	defer func() { standardReleaseFiles = standard }()

	p := testFolders(t)
	c := parsedConfig(t, "")
	chosen := func() string { return openJournal(p.journal(), slog.New(slog.DiscardHandler)).releaseFile(c) }
	writeText(t, second, "VERSION_ID=8.10\n")
	if got := chosen(); got != second {
		t.Errorf("with only %s there, %s is chosen", second, got)
	}
	writeText(t, first, neteye412)
	if got := chosen(); got != second {
		t.Errorf("a restart after the product came chooses %s; once used, a file stays", got)
	}
	if err := os.Remove(second); err != nil {
		t.Fatal(err)
	}
	got := chosen()
	if got != second {
		t.Errorf("after it is gone, %s is chosen", got)
	}
	s := statusReader{c: c, paths: p, run: runCommand, releaseFile: got}.read(t.Context())
	if s.State != nodeUnreadable || !strings.Contains(string(s.Installed.Error), second) {
		t.Errorf("after it is gone: %s, %q", s.State, s.Installed.Error)
	}
	// What is configured is used, and is no choice that would stay.
	if got := chooseReleaseFile(parsedConfig(t, "[release]\nfile = /x\n"), second); got != "/x" {
		t.Errorf("release.file = /x, and %s is read", got)
	}
	// The product's own file comes first; with neither, the last is named.
	if got := chooseReleaseFile(c, ""); got != first {
		t.Errorf("with both there, %s is chosen", got)
	}
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	if got := chooseReleaseFile(c, ""); got != second {
		t.Errorf("with neither there, %s is named", got)
	}
}
