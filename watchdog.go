// watchdog.go: the watchdog that ends the machine when the guard does not feed
// it, and the timer by which the guard sleeps. Both are the guard's loop's.

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
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
	if w.fd < 0 || waiting || now.ahead(w.fed.add(w.every)) > time.Millisecond {
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

// bootTimer wakes at a time of CLOCK_BOOTTIME. Go's timers stand still while
// the machine is suspended, and would be late by the rest of their time.
type bootTimer struct {
	f    *os.File
	wake chan struct{}
}

func newBootTimer() (*bootTimer, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot make a timer: %w", err)
	}
	return &bootTimer{os.NewFile(uintptr(fd), "timer"), make(chan struct{}, 1)}, nil
}

// run passes wakes on until the timer is closed.
func (t *bootTimer) run() {
	for count := make([]byte, binary.MaxVarintLen64); ; {
		if _, err := t.f.Read(count); err != nil {
			return
		}
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
}

// arm sets the time to wake, above 0.
func (t *bootTimer) arm(at time.Duration) error {
	raw, err := t.f.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) {
		err = unix.TimerfdSettime(int(fd), unix.TFD_TIMER_ABSTIME, &unix.ItimerSpec{Value: unix.NsecToTimespec(int64(at))}, nil)
	})
	return errors.Join(controlErr, err)
}
