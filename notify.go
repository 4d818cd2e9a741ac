// notify.go: what agentd tells the service manager, if one asks by its
// environment: sd_notify(3), over a datagram socket.

package main

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"time"
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
