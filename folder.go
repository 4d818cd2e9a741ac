// folder.go: reads the service files for the monitor. One goroutine looks at
// the disk, and tells the core's goroutine what it found: a disk that hangs
// keeps this one, and no decision.

package main

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"
)

// folder is the folder of service files, as far as it was taken up. Its
// channels are for all, the rest is its goroutine's.
type folder struct {
	s    *shell
	asks chan chan struct{} // each is closed when what the folder holds is taken up
	anew chan struct{}      // a token: what the members' names mean may have changed

	stamps map[string]string // of the files as they were read last, by service
}

// foundFile is what the disk says of a service.
type foundFile struct {
	name    string
	spec    *service // nil if there is a fault
	fault   error
	sum     string // SHA-256 of the text, in hex
	updated time.Time
	frozen  bool   // the flag
	intent  intent // what an earlier daemon left
	lost    error  // why that is not known
}

func newFolder(s *shell) *folder {
	return &folder{s: s, asks: make(chan chan struct{}), anew: make(chan struct{}, 1), stamps: map[string]string{}}
}

// run looks at once, then whenever something may have changed. The core hears
// when all was read for the first time.
func (f *folder) run(changed <-chan struct{}) {
	rescan := time.NewTicker(rescanPause)
	defer rescan.Stop()
	scanned := false
	for asked := (chan struct{})(nil); ; {
		if err := f.scan(); err != nil {
			f.s.say(func() { f.s.d.log.Error("the services' files are not read", "err", err) })
		} else if !scanned {
			scanned = true
			f.tell(func() { f.s.step(scannedEvent{}) })
		}
		if asked != nil {
			close(asked)
			asked = nil
		}
		select {
		case <-f.s.ctx.Done():
			return
		case asked = <-f.asks:
		case <-f.anew:
			for name := range f.stamps {
				f.stamps[name] = "" // no file's: read again, and missed if it is gone
			}
		case <-changed:
		case <-rescan.C:
		}
	}
}

// scan takes up the files that are new, changed or gone.
func (f *folder) scan() error {
	names, err := listServices(f.s.d.paths)
	if err != nil {
		return err
	}
	known := slices.Sorted(maps.Keys(f.stamps))
	for _, name := range names {
		f.read(name)
	}
	for _, name := range known {
		if !slices.Contains(names, name) {
			delete(f.stamps, name)
			f.tell(func() { f.s.gone(name) })
		}
	}
	return nil
}

// read takes up one file if it changed.
func (f *folder) read(name string) {
	p := f.s.d.paths
	stamp := fileStamp(p.servicePath(name))
	if f.stamps[name] == stamp {
		return
	}
	c := f.s.d.config.Load()
	found := foundFile{name: name}
	text, info, err := readRegular(p.servicePath(name), iniSizeLimit)
	if err == nil {
		found.spec, err = parseService(name, string(text), c.node, c.members())
	}
	if found.fault = err; err == nil {
		found.sum, found.updated = checksum(text), info.ModTime()
		found.frozen = isFrozen(p, name)
		<-f.s.intents.kept(name)
		found.intent, found.lost = readIntent(p, name)
	}
	f.tell(func() {
		if f.s.takeUp(found) {
			stamp = "" // it is looked at again
		}
	})
	f.stamps[name] = stamp
}

// tell runs take on the core's goroutine and waits for it, unless the shell
// ends.
func (f *folder) tell(take func()) {
	done := make(chan struct{})
	select {
	case f.s.calls <- func() { defer close(done); take() }:
		<-done
	case <-f.s.ctx.Done():
	}
}

// scan has the folder looked at, and returns when what it holds is taken up.
func (m *monitorThread) scan(ctx context.Context) error {
	s := m.current.Load()
	if s == nil {
		return errMonitorStopped
	}
	done := make(chan struct{})
	select {
	case s.folder.asks <- done:
	case <-s.ended:
		return errStopping
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case <-done:
		return nil
	case <-s.ended:
		return errStopping
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// find has the folder looked at should the service be unknown: it may have
// been created just now.
func (m *monitorThread) find(ctx context.Context, name string) error {
	known := false
	err := m.do(ctx, func(s *shell) { known = s.core.services[name] != nil })
	if err != nil || known {
		return err
	}
	return m.scan(ctx)
}

var errMonitorStopped = errors.New("the monitor is stopped; start it: nodemgr daemon start --thread-id monitor")
