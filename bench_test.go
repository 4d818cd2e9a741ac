// bench_test.go: what a request costs, beside a bare echo of as many bytes in
// the same run (design.md §12). Where connections take part, the median of one
// operation is reported as p50-ns.

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// timed runs op b.N times and reports the median.
func timed(b *testing.B, op func() error) {
	b.Helper()
	timedTo(b, func() (time.Time, error) {
		err := op()
		return time.Now(), err
	})
}

// timedTo is timed for an op that tells when it had its answer; what it does
// then, such as waiting for the other side to close, is not in the median.
func timedTo(b *testing.B, op func() (time.Time, error)) {
	b.Helper()
	_, err := op()
	must(b, err)
	took := make([]time.Duration, 0, 1<<16)
	b.ResetTimer()
	for b.Loop() {
		begun := time.Now()
		answered, err := op()
		if err != nil {
			b.Fatal(err)
		}
		if len(took) < cap(took) {
			took = append(took, answered.Sub(begun))
		}
	}
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2]), "p50-ns")
}

// askSealed times a request as a client does it: connect, seal, send, receive,
// open. The guard's table of salts is emptied now and then: it would refuse
// the 131,073rd request within two minutes.
func askSealed(b *testing.B, on func(hostNetwork) network, action string) {
	d := startLive(b, nil, nil)
	a, c := benchAsker(b, d)
	a.network = on(hostNetwork{})
	n := 0
	timedTo(b, func() (answered time.Time, err error) {
		if n++; n%10_000 == 0 {
			forgetSalts(d.replay)
		}
		err = a.ask(b.Context(), c, "node1", action, nil, func(raw []byte, r replyJSON) error {
			answered = time.Now()
			return discard(raw, r)
		})
		return answered, err
	})
}

func fromAnyPort(n hostNetwork) network        { return plainNetwork{n} }
func fromPrivilegedPort(n hostNetwork) network { return n }

func benchAsker(b *testing.B, d *liveDaemon) (caller, *config) {
	b.Helper()
	c := d.config.Load()
	text := c.doc.String() + fmt.Sprintf("[listener]\naddr@node1 = 127.0.0.1\nport@node1 = %d\n", d.port)
	c, err := parseConfig("node.conf", text)
	must(b, err)
	return caller{
		network: hostNetwork{}, cluster: "default", node: "node2", key: labKey(b, liveSecret, "default"),
		now: func() int64 { return time.Now().UnixMilli() },
	}, c
}

// plainNetwork connects from any port, as the echo's client does.
type plainNetwork struct{ hostNetwork }

func (plainNetwork) dial(ctx context.Context, host string, port int) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(host, fmt.Sprint(port)))
}

func forgetSalts(g *replayGuard) {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.seen)
	g.held = 0
}

func BenchmarkDaemonStatusSealed(b *testing.B) { askSealed(b, fromAnyPort, "daemon_status") }

func BenchmarkPingSealed(b *testing.B) { askSealed(b, fromAnyPort, "ping") }

// BenchmarkPingSealedPrivileged is a ping from a port below 1024, as root's
// commands and the daemon send it.
func BenchmarkPingSealedPrivileged(b *testing.B) { askSealed(b, fromPrivilegedPort, "ping") }

// BenchmarkDaemonStatusData is the handler's share: the data as JSON.
func BenchmarkDaemonStatusData(b *testing.B) {
	d := startLive(b, nil, nil)
	for b.Loop() {
		data, err := d.clusterData(b.Context(), "")
		if err == nil {
			_, err = json.Marshal(replyOf(d.daemon, data, nil))
		}
		must(b, err)
	}
}

func BenchmarkDaemonStatusLocal(b *testing.B) {
	d := startLive(b, nil, nil)
	b.Run("new connection", func(b *testing.B) {
		timed(b, func() error { return askLocal(b.Context(), d.paths, "daemon_status", nil, nil, discard) })
	})
	b.Run("kept connection", func(b *testing.B) {
		conn, err := net.Dial("unix", d.paths.socket())
		must(b, err)
		defer conn.Close()
		in := bufio.NewReader(conn)
		timed(b, func() error {
			if _, err := io.WriteString(conn, "{\"action\": \"daemon_status\"}\n"); err != nil {
				return err
			}
			_, err := in.ReadSlice('\n')
			return err
		})
	})
}

// sizesOf are the bytes of a sealed request and of its reply.
func sizesOf(b *testing.B, action string) (request, reply int) {
	b.Helper()
	d := startLive(b, nil, nil)
	w := d.client("node2", "127.0.0.1")
	raw := w.sealed(w.message(action, ""))
	answer, err := w.exchange(raw)
	must(b, err)
	d.stopped()
	return len(raw), len(answer) + 1
}

// BenchmarkEcho connects, sends as many bytes as a request has, gets as many
// back as its reply has, and closes.
func BenchmarkEcho(b *testing.B) {
	for _, action := range []string{"daemon_status", "ping"} {
		b.Run("size of "+action, func(b *testing.B) {
			request, reply := sizesOf(b, action)
			var bare net.ListenConfig
			bare.SetMultipathTCP(false)
			in, err := bare.Listen(b.Context(), "tcp4", "127.0.0.1:0")
			must(b, err)
			defer in.Close()
			go echo(in, request, reply)
			answer := make([]byte, reply)
			message := make([]byte, request)
			timed(b, func() error {
				conn, err := net.Dial("tcp", in.Addr().String())
				if err != nil {
					return err
				}
				defer conn.Close()
				if _, err := conn.Write(message); err != nil {
					return err
				}
				_, err = io.ReadFull(conn, answer)
				return err
			})
			b.ReportMetric(float64(request), "B-sent")
			b.ReportMetric(float64(reply), "B-received")
		})
	}
}

func echo(in net.Listener, request, reply int) {
	for {
		conn, err := in.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			buffer := make([]byte, max(request, reply))
			if _, err := io.ReadFull(conn, buffer[:request]); err == nil {
				conn.Write(buffer[:reply])
			}
		}()
	}
}

// BenchmarkSealOpen is the share of sealing in a request: seal and open it,
// seal and open its reply, which is both ends' work.
func BenchmarkSealOpen(b *testing.B) {
	d := startLive(b, nil, nil)
	key := labKey(b, liveSecret, "default")
	c, err := d.clusterData(b.Context(), "")
	must(b, err)
	status, err := json.Marshal(replyOf(d.daemon, c, nil))
	must(b, err)
	r, err := handlePing(b.Context(), d.daemon, nil)
	must(b, err)
	pong, err := json.Marshal(r)
	must(b, err)
	request := []byte(fmt.Sprintf(`{"time":%d,"to":"node1","action":"daemon_status","options":null}`, time.Now().UnixMilli()))
	for _, test := range []struct {
		name     string
		messages [][]byte
	}{
		{"daemon_status", [][]byte{request, status}},
		{"ping", [][]byte{request, pong}},
		{"request alone", [][]byte{request}},
		{"reply of daemon_status alone", [][]byte{nil, status}},
	} {
		b.Run(test.name, func(b *testing.B) {
			contexts := []messageContext{{label: labelRequest, cluster: "default", node: "node2"}, {labelReply, "default", "node1", &salt{}, 0}}
			for b.Loop() {
				for i, message := range test.messages {
					if message == nil {
						continue
					}
					raw, _ := seal(key, contexts[i], message)
					e, err := parseEnvelope(raw[:len(raw)-1])
					if err != nil {
						b.Fatal(err)
					}
					if _, err := open(key, e, contexts[i], replyLimit); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkShutOut is a message of a sender that is shut out, from raw bytes
// to dropped. It is copied each time (some 10 ns), since validate decodes in
// place.
func BenchmarkShutOut(b *testing.B) {
	d := startLive(b, nil, nil)
	w := d.client("node2", "127.0.0.1")
	src := source{"tcp", netip.MustParseAddrPort("192.0.2.1:40000")}
	raw := w.aged(0)
	raw = raw[:len(raw)-1]
	for range strikes {
		d.blacklist.strike(senderOf(src, "node2", true))
	}
	buffer := make([]byte, len(raw))
	b.ReportAllocs()
	for b.Loop() {
		copy(buffer, raw)
		d.listener.validate(b.Context(), buffer, src)
	}
	if dropped := d.listener.stats.dropped.Load(); dropped < int64(b.N) {
		b.Fatalf("%d of %d were dropped", dropped, b.N)
	}
}

// BenchmarkInvalid is a message that does not open, each from an address of
// its own, so that none is shut out: what a flood of forged datagrams costs.
func BenchmarkInvalid(b *testing.B) {
	d := startLive(b, nil, nil)
	w := d.client("node2", "127.0.0.1")
	w.key = labKey(b, otherSecret, "default")
	raw := w.aged(0)
	raw = raw[:len(raw)-1]
	buffer := make([]byte, len(raw))
	n := uint32(0)
	b.ReportAllocs()
	for b.Loop() {
		copy(buffer, raw)
		n++
		addr := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 10<<24|n&0xffffff)))
		d.listener.validate(b.Context(), buffer, source{"udp", netip.AddrPortFrom(addr, 40000)})
	}
	if invalid := d.listener.stats.invalid.Load(); invalid != int64(b.N) {
		b.Fatalf("%d of %d were invalid", invalid, b.N)
	}
}

func BenchmarkVersion(b *testing.B) {
	for _, pair := range [][2]string{{"4.11", "4.12"}, {"1:4.12.0~rc1-3.el8", "1:4.12.0-3.el8"}} {
		b.Run(pair[0]+" and "+pair[1], func(b *testing.B) {
			order := versionOrder{}
			b.ReportAllocs()
			for b.Loop() {
				if order.compare(pair[0], pair[1]) != -1 {
					b.Fatal("wrong order")
				}
			}
		})
	}
}
