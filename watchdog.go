// watchdog.go: node.watchdog, which ends the machine when the guard does not
// feed it. It is the guard's loop's (guard.go), and tells that this works.

package main

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// watchdog is node.watchdog: /dev/watchdog, or whatever wants to be written to.
type watchdog struct {
	fd    int // -1: not open
	path  string
	grace time.Duration
	every time.Duration // between two bytes
	fed   leaseClock
	why   string // it does not work, as it was said last
}

// setTimeout is WDIOC_SETTIMEOUT of linux/watchdog.h, which x/sys does not have.
const setTimeout = 0xc0045706

// feed feeds the watchdog while nothing has to be stopped: from a deadline on
// until the instance is down, the machine's end comes nearer.
func (g *guard) feed(now leaseClock) {
	w, l := &g.dog, g.list.Load()
	if w.path != l.Settings.Watchdog || w.grace != l.Settings.Grace {
		w.close()
		w.path, w.grace = l.Settings.Watchdog, l.Settings.Grace
	}
	if w.path == "" {
		return
	}
	if w.fd < 0 {
		w.fault(g, w.open())
	}
	waiting := slices.ContainsFunc(l.Held, func(name string) bool {
		s := g.stops[name]
		return now.reached(l.until(name)) && (s == nil || !s.down)
	})
	if w.fd < 0 || waiting || !now.reached(w.fed.add(w.every)) {
		return
	}
	_, err := unix.Write(w.fd, []byte{0})
	if err != nil && !errors.Is(err, unix.EAGAIN) { // full of what nobody took yet
		unix.Close(w.fd)
		w.fd = -1
		w.fault(g, fmt.Errorf("cannot feed %s: %w", w.path, err))
		return
	}
	w.fed = now
}

// open opens the device and sets its timeout: the grace, in whole seconds. A
// FIFO without a reader does not hold it up, and is tried again.
func (w *watchdog) open() error {
	fd, err := unix.Open(w.path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open node.watchdog %s: %w", w.path, err)
	}
	timeout := max(1, int(w.grace/time.Second))
	w.fd, w.every, w.fed = fd, time.Duration(timeout)*time.Second/4, leaseClock{}
	err = unix.IoctlSetPointerInt(fd, setTimeout, timeout)
	switch set, getErr := unix.IoctlGetInt(fd, unix.WDIOC_GETTIMEOUT); {
	case errors.Is(err, unix.ENOTTY): // no device
	case err != nil:
		return fmt.Errorf("cannot set the timeout of %s to %d s: %w", w.path, timeout, err)
	case getErr == nil && set != timeout && set > 0:
		w.every = time.Duration(set) * time.Second / 4
		return fmt.Errorf("%s takes %d s instead of %d s, which is quorum_grace", w.path, set, timeout)
	}
	return nil
}

// fault says what is wrong, once, and when it is no more.
func (w *watchdog) fault(g *guard, err error) {
	switch {
	case err == nil && w.why != "":
		w.why = ""
		g.log.Info("node.watchdog works again")
	case err != nil && w.why != err.Error():
		w.why = err.Error()
		g.log.Error("node.watchdog does not work as it should", "err", err)
	}
}

// close tells the device that its end is meant, and no reason to end the
// machine.
func (w *watchdog) close() {
	if w.fd >= 0 {
		unix.Write(w.fd, []byte("V"))
		unix.Close(w.fd)
		w.fd = -1
	}
}
