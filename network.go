// network.go: what the daemon uses of the machine's network: sockets, and the
// few of their options that matter here.

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// network is the part of the world that the daemon sends and receives by.
type network interface {
	listen(addr netip.AddrPort) (net.Listener, error)
	listenPacket(addr netip.AddrPort) (packetConn, error)
	dial(ctx context.Context, host string, port int) (net.Conn, error)
	// dialPacket makes a socket that sends datagrams to one peer, from an address
	// of this machine, unless that is unspecified. It may look up a name.
	dialPacket(ctx context.Context, from netip.Addr, host string, port int) (packetSender, error)
}

// packetSender sends without waiting. An error may be that of an earlier
// datagram; nothing of the present one was sent then.
type packetSender interface {
	Write(b []byte) (int, error)
	Close() error
}

// packetConn is what the daemon uses of a *net.UDPConn. The control data of a
// datagram says to which address it came; given back with the reply, it has
// the reply sent from there, and not from what the route prefers.
type packetConn interface {
	ReadMsgUDPAddrPort(b, control []byte) (n, controlLen, flags int, from netip.AddrPort, err error)
	WriteMsgUDPAddrPort(b, control []byte, to netip.AddrPort) (n, controlLen int, err error)
	SetReadDeadline(t time.Time) error
	Close() error
}

// besideNetwork is a network on which a socket can be bound beside one that is
// in its way, if that one is shared (setShared).
type besideNetwork interface{ beside() network }

// hostNetwork is the machine's.
type hostNetwork struct{ shared bool }

func (hostNetwork) beside() network { return hostNetwork{shared: true} }

// setShared sets SO_REUSEPORT, which both sockets must have. It is set for the
// moment of a change alone: two daemons by mistake on one port must not share
// it unseen.
func setShared(socket any, on bool) {
	conn, ok := socket.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return // closed; then it is in nobody's way
	}
	value := 0
	if on {
		value = 1
	}
	raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, value) })
}

// listen binds exactly the family of addr; `::` takes both. Multipath TCP,
// Go's default, would not let refuseHandshakes have its filter.
func (n hostNetwork) listen(addr netip.AddrPort) (net.Listener, error) {
	config := net.ListenConfig{Control: n.control}
	config.SetMultipathTCP(false)
	return config.Listen(context.Background(), "tcp"+family(addr), addr.String())
}

func (n hostNetwork) listenPacket(addr netip.AddrPort) (packetConn, error) {
	config := net.ListenConfig{Control: n.control}
	conn, err := config.ListenPacket(context.Background(), "udp"+family(addr), addr.String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

// control sets the options of a socket before it is bound.
func (n hostNetwork) control(name, _ string, raw syscall.RawConn) (err error) {
	controlErr := raw.Control(func(fd uintptr) {
		switch name {
		case "udp4":
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_PKTINFO, 1)
		case "udp6":
			err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1)
		}
		if n.shared && err == nil {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}
	})
	return errors.Join(controlErr, err)
}

func family(addr netip.AddrPort) string {
	if addr.Addr().Is4() {
		return "4"
	}
	return ""
}

// dial connects from a privileged port if it may, which keeps the ordinary
// users of this machine from being taken for it (see blacklist.go).
func (hostNetwork) dial(ctx context.Context, host string, port int) (net.Conn, error) {
	to := net.JoinHostPort(host, fmt.Sprint(port))
	dialer := net.Dialer{Control: func(network, _ string, raw syscall.RawConn) (err error) {
		controlErr := raw.Control(func(fd uintptr) { err = bindPrivileged(int(fd), network) })
		return errors.Join(controlErr, err)
	}}
	return dialer.DialContext(ctx, "tcp", to)
}

func (hostNetwork) dialPacket(ctx context.Context, from netip.Addr, host string, port int) (packetSender, error) {
	var dialer net.Dialer
	if !from.IsUnspecified() {
		dialer.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	conn, err := dialer.DialContext(ctx, "udp", net.JoinHostPort(host, fmt.Sprint(port)))
	if err != nil {
		return nil, err
	}
	udp := conn.(*net.UDPConn)
	raw, err := udp.SyscallConn()
	if err != nil {
		udp.Close()
		return nil, err
	}
	return udpSender{udp, raw}, nil
}

// udpSender is a socket whose Write gives up where that of a UDPConn would wait
// for room.
type udpSender struct {
	*net.UDPConn
	raw syscall.RawConn
}

func (s udpSender) Write(b []byte) (n int, err error) {
	rawErr := s.raw.Write(func(fd uintptr) bool {
		n, err = unix.Write(int(fd), b)
		return true
	})
	return n, errors.Join(rawErr, err)
}

// bindPrivileged binds a socket to a free privileged port. Who may not, or
// finds none, connects from an ordinary one.
func bindPrivileged(fd int, network string) error {
	start := rand.IntN(lastReserved - firstReserved + 1)
	for i := range lastReserved - firstReserved + 1 {
		port := firstReserved + (start+i)%(lastReserved-firstReserved+1)
		var local unix.Sockaddr = &unix.SockaddrInet4{Port: port}
		if network == "tcp6" {
			local = &unix.SockaddrInet6{Port: port}
		}
		switch err := unix.Bind(fd, local); {
		case err == nil, errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			return nil
		case !errors.Is(err, unix.EADDRINUSE):
			return fmt.Errorf("cannot bind port %d: %w", port, err)
		}
	}
	return nil
}

// refuseHandshakes has the kernel drop each SYN to the socket and nothing
// else: connections that are being made are still completed. To close the
// socket would reset them.
func refuseHandshakes(tcp *net.TCPListener) error {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	const flags, syn, ack = 13, 0x02, 0x10 // of a TCP header, which the filter sees first
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: flags},
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: syn | ack},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: syn, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	controlErr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program)
	})
	return errors.Join(controlErr, err)
}
