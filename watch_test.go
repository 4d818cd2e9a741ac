package main

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func startWatcher(t *testing.T) *watcher {
	t.Helper()
	w := newWatcher(nil)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return w
}

func wantWake(t *testing.T, what string, changed <-chan struct{}) {
	t.Helper()
	select {
	case <-changed:
	case <-time.After(patience):
		t.Fatalf("%s: not woken", what)
	}
}

func (w *watcher) count() (paths, wakes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, waiting := range w.wakes {
		wakes += len(waiting)
	}
	return len(w.wakes), wakes
}

func TestWatch(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.WriteFile(path("file"), nil, 0o600))
	must(t, os.Mkdir(path("folder"), 0o700))
	w := startWatcher(t)
	tests := []struct {
		name, watch string
		change      func() error
	}{
		{"written", "file", func() error { return os.WriteFile(path("file"), []byte("x"), 0o600) }},
		{"appended", "file", func() error {
			f, err := os.OpenFile(path("file"), os.O_APPEND|os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteString("x")
			return errors.Join(err, f.Close())
		}},
		{"emptied", "file", func() error { return os.Truncate(path("file"), 0) }},
		{"moved", "file", func() error { return os.Rename(path("file"), path("moved")) }},
		{"removed", "moved", func() error { return os.Remove(path("moved")) }},
		{"made in a folder", "folder", func() error { return os.WriteFile(path("folder/a"), nil, 0o600) }},
		{"moved within a folder", "folder", func() error { return os.Rename(path("folder/a"), path("folder/b")) }},
		{"moved out of a folder", "folder", func() error { return os.Rename(path("folder/b"), path("b")) }},
		{"moved into a folder", "folder", func() error { return os.Rename(path("b"), path("folder/c")) }},
		{"written in a folder", "folder", func() error { return os.WriteFile(path("folder/c"), []byte("x"), 0o600) }},
		{"removed from a folder", "folder", func() error { return os.Remove(path("folder/c")) }},
	}
	for _, test := range tests {
		changed, cancel, err := w.add(path(test.watch))
		must(t, err)
		must(t, test.change())
		wantWake(t, test.name, changed)
		cancel()
		cancel() // once is enough, twice does no harm
		if paths, wakes := w.count(); paths != 0 || wakes != 0 {
			t.Errorf("%s: %d watches of %d paths are left", test.name, wakes, paths)
		}
	}
	if _, _, err := w.add(path("none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a path that is not there: %v", err)
	}
}

// TestWatchShared: the kernel has one watch for all names of an inode.
func TestWatchShared(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Link(path, path+".link"))
	w := startWatcher(t)
	first, cancelFirst, err := w.add(path)
	must(t, err)
	second, cancelSecond, err := w.add(path + ".link")
	must(t, err)
	must(t, os.WriteFile(path, []byte("x"), 0o600))
	wantWake(t, "first", first)
	wantWake(t, "second", second)
	cancelFirst()
	for drained := false; !drained; { // one write is several events
		select {
		case <-second:
		case <-time.After(100 * time.Millisecond):
			drained = true
		}
	}
	must(t, os.WriteFile(path, []byte("y"), 0o600))
	wantWake(t, "second, alone", second)
	cancelSecond()
	if paths, _ := w.count(); paths != 0 {
		t.Errorf("%d paths are watched", paths)
	}
	gone, cancelGone, err := w.add(path)
	must(t, err)
	must(t, errors.Join(os.Remove(path), os.Remove(path+".link")))
	wantWake(t, "removed", gone)
	waitFor(t, patience, "the watch is gone with its inode", func() bool { paths, _ := w.count(); return paths == 0 })
	cancelGone()
}

// TestWatchFolderSparesWrites: who writes a line a time into a log keeps it
// open no longer, but who holds a file open in a watched folder wakes nobody.
func TestWatchFolderSparesWrites(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "file"))
	must(t, err)
	defer f.Close()
	w := startWatcher(t)
	changed, _, err := w.add(dir)
	must(t, err)
	for range 10 {
		_, err := f.WriteString("x")
		must(t, err)
	}
	select {
	case <-changed:
		t.Error("woken by a write")
	case <-time.After(100 * time.Millisecond):
	}
	must(t, f.Close())
	wantWake(t, "closed", changed)
}

func TestWatchOverflow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := startWatcher(t)
	var all []<-chan struct{}
	for _, name := range []string{"a", "b"} {
		must(t, os.Mkdir(filepath.Join(dir, name), 0o700))
		changed, _, err := w.add(filepath.Join(dir, name))
		must(t, err)
		all = append(all, changed)
	}
	overflow := binary.NativeEndian.AppendUint32(nil, 0xffffffff)
	overflow = binary.NativeEndian.AppendUint32(overflow, unix.IN_Q_OVERFLOW)
	w.dispatch(append(overflow, make([]byte, 8)...))
	for _, changed := range all {
		wantWake(t, "overflow", changed)
	}
}

func TestWatchEnds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := newWatcher(nil)
	changed, cancel, err := w.add(dir)
	must(t, err)
	ctx, stop := context.WithCancel(t.Context())
	stop()
	must(t, w.run(ctx))
	wantWake(t, "the end", changed)
	cancel()
	if _, _, err := w.add(dir); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}

// Where the kernel's limits are used up, what changes is noticed later, and
// nothing fails.
func TestWatchWithoutInotify(t *testing.T) {
	for _, name := range []string{"no instance left", "no watch left"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "file")
			must(t, os.WriteFile(path, nil, 0o600))
			said := make(chan error, 9)
			w := &watcher{wakes: map[int32][]chan struct{}{}, short: func(err error) { said <- err }}
			if name == "no watch left" {
				pipe, end, err := os.Pipe() // what is no inotify takes no watch
				must(t, err)
				defer end.Close()
				w.inotify = pipe
			}
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan struct{})
			go func() { defer close(ended); w.run(ctx) }()
			for range 2 {
				changed, stop, err := w.add(path)
				must(t, err)
				wantWake(t, "first", changed)
				wantWake(t, "again", changed)
				stop()
			}
			if len(said) != 1 {
				t.Errorf("said %d times", len(said))
			}
			if paths, wakes := w.count(); paths+wakes > 0 {
				t.Errorf("left: %d paths, %d wakes", paths, wakes)
			}
			cancel()
			<-ended
		})
	}
}
