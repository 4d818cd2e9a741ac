// watch.go: wakes those who wait for a file or a folder to change, by one
// inotify descriptor that the runtime polls: as long as nothing changes, it
// costs nothing. It tells that something changed, not what: who is woken
// looks for himself, and so misses nothing when several changes become one.

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// What wakes. A folder's watch tells of entries that come, go or have been
// written, not of each write to one: thousands of lines may go to a folder of
// logs. IN_ATTRIB tells a file's reader that its last name is gone.
const (
	fileChanges   = unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_MOVE_SELF
	folderChanges = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB
)

// The kernel's limits are shared with all other programs of the user. What it
// does not watch, since they are used up, is woken every pollPause.
const (
	pollPause       = time.Second
	polled    int32 = -1 // no watch descriptor
)

type watcher struct {
	inotify *os.File        // nil: all are polled
	short   func(err error) // unless nil, told once of the limits
	once    sync.Once

	mu    sync.Mutex
	wakes map[int32][]chan struct{} // by watch descriptor, which is one per inode
	ended bool
}

func newWatcher(short func(err error)) *watcher {
	w := &watcher{short: short, wakes: map[int32][]chan struct{}{}}
	if fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC); err == nil {
		w.inotify = os.NewFile(uintptr(fd), "inotify")
	}
	return w
}

// add has a token put into the channel whenever what path names now has
// changed since the last token was taken. What happens after add returned is
// not missed; cancel ends it, once.
func (w *watcher) add(path string) (changed <-chan struct{}, cancel func(), err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot watch: %w", err)
	}
	mask := uint32(fileChanges)
	if info.IsDir() {
		mask = folderChanges
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return nil, nil, fmt.Errorf("cannot watch %s: %w", path, os.ErrClosed)
	}
	id, err := polled, error(unix.EMFILE)
	if w.inotify != nil {
		err = w.control(func(fd int) error {
			wd, err := unix.InotifyAddWatch(fd, path, mask)
			id = int32(wd) // -1 with an error: polled
			return err
		})
	}
	if err != nil && w.short != nil {
		w.once.Do(func() { w.short(err) })
	}
	wake := make(chan struct{}, 1)
	w.wakes[id] = append(w.wakes[id], wake)
	return wake, func() { w.remove(id, wake) }, nil
}

func (w *watcher) remove(id int32, wake chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.Index(w.wakes[id], wake)
	if i < 0 {
		return // the inode is gone
	}
	if w.wakes[id] = slices.Delete(w.wakes[id], i, i+1); len(w.wakes[id]) == 0 {
		delete(w.wakes, id)
		if id != polled {
			w.control(func(fd int) error { unix.InotifyRmWatch(fd, uint32(id)); return nil }) // if the inode is gone by now, so is the watch
		}
	}
}

// control lends the descriptor; os.File.Fd might make it block.
func (w *watcher) control(f func(fd int) error) (err error) {
	raw, rawErr := w.inotify.SyscallConn()
	if rawErr == nil {
		rawErr = raw.Control(func(fd uintptr) { err = f(int(fd)) })
	}
	return errors.Join(rawErr, err)
}

// run wakes until ctx ends, then wakes all a last time and closes.
func (w *watcher) run(ctx context.Context) error {
	defer w.close()
	polling, done := context.WithCancel(ctx)
	defer done()
	go w.poll(polling)
	if w.inotify == nil {
		<-ctx.Done()
		return nil
	}
	defer context.AfterFunc(ctx, func() { w.inotify.SetReadDeadline(time.Unix(1, 0)) })()
	buffer := make([]byte, 4096)
	for {
		n, err := w.inotify.Read(buffer)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot read what changed: %w", err)
		}
		w.dispatch(buffer[:n])
	}
}

func (w *watcher) poll(ctx context.Context) {
	tick := time.NewTicker(pollPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			w.mu.Lock()
			wake(w.wakes[polled])
			w.mu.Unlock()
		}
	}
}

// dispatch takes what the kernel wrote, whole events.
func (w *watcher) dispatch(events []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(events) >= unix.SizeofInotifyEvent {
		id, mask := int32(binary.NativeEndian.Uint32(events)), binary.NativeEndian.Uint32(events[4:])
		events = events[min(len(events), unix.SizeofInotifyEvent+int(binary.NativeEndian.Uint32(events[12:]))):]
		if mask&unix.IN_Q_OVERFLOW != 0 { // nobody knows what was dropped
			w.wakeAll()
			continue
		}
		wake(w.wakes[id])
		if mask&unix.IN_IGNORED != 0 { // the inode is gone; its number may come again
			delete(w.wakes, id)
		}
	}
}

func (w *watcher) wakeAll() {
	for _, waiting := range w.wakes {
		wake(waiting)
	}
}

func wake(waiting []chan struct{}) {
	for _, c := range waiting {
		select {
		case c <- struct{}{}:
		default: // it has its token
		}
	}
}

func (w *watcher) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.wakeAll()
	if w.inotify != nil {
		w.inotify.Close()
	}
}
