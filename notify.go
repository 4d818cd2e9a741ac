// notify.go: what agentd tells the service manager, if one asks by its
// environment: its state, by sd_notify(3), and its log, in the journal's form.

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// notifier is silent when nobody listens.
type notifier struct {
	socket   string
	watchdog time.Duration // between two signs of life; 0: none are wanted
}

// environmentNotifier takes the variables out of the environment, so that no
// command that the daemon runs speaks in its name.
func environmentNotifier() notifier {
	n := notifier{socket: os.Getenv("NOTIFY_SOCKET")}
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	pid := os.Getenv("WATCHDOG_PID")
	if err == nil && usec > 0 && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		n.watchdog = time.Duration(usec) * time.Microsecond / 2
	}
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		os.Unsetenv(name)
	}
	return n
}

func (n notifier) send(state string) error {
	if n.socket == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("cannot tell the service manager %q: %w", state, err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(state)); err != nil {
		return fmt.Errorf("cannot tell the service manager %q: %w", state, err)
	}
	return nil
}

// logHandler writes for people, or, where a journal reads, with its priority
// prefixes and without the time, which the journal adds.
func logHandler(out *os.File) slog.Handler {
	if !isJournal(out) {
		return slog.NewTextHandler(out, nil)
	}
	return &journalHandler{out: out, Handler: slog.NewTextHandler(out, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
				return slog.Attr{}
			}
			return a
		},
	})}
}

// isJournal tells whether out is the stream that JOURNAL_STREAM names: every
// shell below a service inherits the variable.
func isJournal(out *os.File) bool {
	var st unix.Stat_t
	if err := unix.Fstat(int(out.Fd()), &st); err != nil {
		return false
	}
	return os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

type journalHandler struct {
	slog.Handler
	mu  sync.Mutex
	out io.Writer
}

func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	priority := "<6>"
	switch {
	case r.Level >= slog.LevelError:
		priority = "<3>"
	case r.Level >= slog.LevelWarn:
		priority = "<4>"
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, err := io.WriteString(h.out, priority); err != nil {
		return err
	}
	return h.Handler.Handle(ctx, r)
}
