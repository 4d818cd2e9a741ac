// client.go: asking: a node, sealed, over TCP, as the commands and the daemon
// do; or the daemon of this machine over its socket. It says of a failure
// what kind it is, since "refused" and "denied" call for different remedies.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// replyJSON is a frame of a reply as it is read.
type replyJSON struct {
	Time   int64           `json:"time"`
	Status int             `json:"status"`
	Error  string          `json:"error"`
	Data   json.RawMessage `json:"data"`
	More   bool            `json:"more"`
}

// frameFunc takes each frame of a reply, whole and parsed.
type frameFunc func(raw []byte, r replyJSON) error

// answerKind is how asking a node ended (installation-status.md).
type answerKind string

const (
	answerOK          answerKind = "ok"
	answerTimeout     answerKind = "timeout"     // no answer in time, or no way there
	answerRefused     answerKind = "refused"     // nobody listens
	answerUnresolved  answerKind = "unresolved"  // its name has no address
	answerDenied      answerKind = "denied"      // closed without an answer, or an answer that refuses
	answerBadReply    answerKind = "bad_reply"   // what came is not a reply to this request
	answerWrongNode   answerKind = "wrong_node"  // another node answered
	answerUnsupported answerKind = "unsupported" // it does not know the action
)

// answerError tells why a node did not answer. silent: it closed the
// connection without a word, as it does with messages that it cannot open.
type answerError struct {
	kind   answerKind
	silent bool
	err    error
}

func (e *answerError) Error() string { return e.err.Error() }
func (e *answerError) Unwrap() error { return e.err }

// kindOf classifies any error of asking.
func kindOf(err error) answerKind {
	var answer *answerError
	var dns *net.DNSError
	switch {
	case err == nil:
		return answerOK
	case errors.As(err, &answer):
		return answer.kind
	case errors.As(err, &dns) && !dns.IsTimeout:
		return answerUnresolved
	case errors.Is(err, unix.ECONNREFUSED):
		return answerRefused
	}
	return answerTimeout
}

// caller asks other nodes in this node's name.
type caller struct {
	network network
	cluster string
	node    string // this node
	key     masterKey
	token   []byte       // of the link with who is asked; nil: none is known
	now     func() int64 // unix ms
}

// ask sends one request to peer and gives each frame of the reply to frame.
// Should the peer find the request's time wrong, it is asked once more with
// the peer's own time.
func (a caller) ask(ctx context.Context, c *config, peer, action string, options map[string]json.RawMessage, frame frameFunc) error {
	host, port := peerAddress(c, peer)
	offset := int64(0)
	for attempt := 0; ; attempt++ {
		retry, frameErr := false, error(nil)
		err := a.askOnce(ctx, host, port, peer, action, options, offset, func(raw []byte, r replyJSON) error {
			if r.Status != 0 && strings.HasPrefix(r.Error, "clock:") && attempt == 0 {
				offset, retry = r.Time-a.now(), true
				return nil
			}
			frameErr = frame(raw, r)
			return frameErr
		})
		if frameErr != nil {
			return frameErr
		}
		if err != nil {
			var op *net.OpError
			if errors.As(err, &op) {
				err = op.Err // the address is named already
			}
			var call *os.SyscallError
			if errors.As(err, &call) {
				err = call.Err
			}
			return fmt.Errorf("cannot ask %s at %s for %s: %w", peer, net.JoinHostPort(host, fmt.Sprint(port)), action, err)
		}
		if !retry {
			return nil
		}
	}
}

func (a caller) askOnce(ctx context.Context, host string, port int, peer, action string, options map[string]json.RawMessage, offset int64, frame frameFunc) error {
	conn, err := a.network.dial(ctx, host, port)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()

	now := a.now() + offset
	message, err := json.Marshal(requestJSON{Time: &now, To: peer, Action: action, Options: options})
	if err != nil {
		return err
	}
	sealed, request := seal(a.key, messageContext{label: labelRequest, cluster: a.cluster, node: a.node}, message)
	if a.token != nil {
		sealed = showToken(sealed, a.token)
	}
	if len(sealed) > requestLimit {
		return fmt.Errorf("the request is larger than %d bytes", requestLimit)
	}
	in := bufio.NewReader(conn)
	if _, err := conn.Write(sealed); err != nil && !isReset(err) {
		return err
	}
	for number := uint64(0); ; number++ {
		raw, err := readEnvelope(in)
		if err != nil && isReset(err) && number == 0 {
			return &answerError{answerDenied, true, errors.New("it closed the connection without an answer: it does not accept this node's messages (another secret or cluster name, not in its cluster.nodes, or shut out: see `nodemgr daemon blacklist status` there)")}
		}
		if err != nil {
			return err
		}
		r, message, err := a.openReply(raw, peer, &request, number)
		if err != nil {
			return err
		}
		err = frame(message, r)
		if err == nil && r.More {
			continue
		}
		if r.More {
			return err // who leaves a stream early closes it
		}
		// The listener closes first; a client that did would block its port.
		conn.SetReadDeadline(time.Now().Add(finishDelay))
		io.CopyN(io.Discard, in, replyLimit) // whatever it says, the exchange is over
		return err
	}
}

// openReply checks that raw is frame number of peer's reply to request.
func (a caller) openReply(raw []byte, peer string, request *salt, number uint64) (r replyJSON, message []byte, err error) {
	bad := func(err error) (replyJSON, []byte, error) {
		return r, nil, &answerError{kind: answerBadReply, err: err}
	}
	e, err := parseEnvelope(raw)
	switch {
	case err != nil:
		return bad(err)
	case e.cluster != a.cluster || e.request == nil || *e.request != *request:
		return bad(errors.New("the reply is not to this request"))
	case e.node != peer:
		return r, nil, &answerError{kind: answerWrongNode, err: fmt.Errorf("%q answered", shortened(e.node))}
	}
	message, err = open(a.key, e, messageContext{labelReply, e.cluster, e.node, request, number}, replyLimit)
	if err != nil {
		return bad(err)
	}
	if err := json.Unmarshal(message, &r); err != nil {
		return bad(err)
	}
	return r, message, nil
}

// isReset tells whether the other side just closed the connection.
func isReset(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// readEnvelope reads up to a NUL: io.EOF only when nothing came before the
// end, io.ErrUnexpectedEOF when the end came too early.
func readEnvelope(in *bufio.Reader) ([]byte, error) {
	var raw []byte
	for {
		part, err := in.ReadSlice(0)
		if raw = append(raw, part...); len(raw) > 2*replyLimit {
			return nil, &answerError{kind: answerBadReply, err: errors.New("the reply is too large")}
		}
		switch {
		case err == nil:
			return raw[:len(raw)-1], nil
		case errors.Is(err, bufio.ErrBufferFull):
		case isReset(err) && len(raw) > 0:
			return nil, &answerError{kind: answerBadReply, err: io.ErrUnexpectedEOF}
		default:
			return nil, err
		}
	}
}

// errNoDaemon: nothing answers on the local socket.
var errNoDaemon = errors.New("no daemon answers")

// callTimeout bounds the wait for an answer where the asker set no bound;
// frameTimeout, that for the next frame of a stream.
const (
	callTimeout  = 20 * time.Second
	frameTimeout = 3 * logAlive
)

// boundSilence gives the asked one the time first until its first frame, and
// frameTimeout for each that follows; what frame itself takes does not count.
func boundSilence(ctx context.Context, first time.Duration, frame frameFunc) (context.Context, frameFunc, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(first, func() { cancel(context.DeadlineExceeded) })
	return silence{ctx}, func(raw []byte, r replyJSON) error {
			timer.Stop()
			defer timer.Reset(frameTimeout)
			return frame(raw, r)
		}, func() {
			timer.Stop()
			cancel(context.Canceled)
		}
}

// silence is a context whose Err tells a timeout from an interruption.
type silence struct{ context.Context }

func (s silence) Err() error { return context.Cause(s.Context) }

// askLocal sends one request to the daemon of this machine. opened, unless
// nil, gets the connection first.
func askLocal(ctx context.Context, p paths, action string, options map[string]json.RawMessage, opened func(*net.UnixConn) error, frame frameFunc) error {
	if _, bounded := ctx.Deadline(); !bounded {
		var done func()
		ctx, frame, done = boundSilence(ctx, callTimeout, frame)
		defer done()
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", p.socket())
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%w on %s; start it with `nodemgr daemon start`", errNoDaemon, p.socket())
	case err != nil:
		return fmt.Errorf("cannot reach the daemon: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if opened != nil {
		if err := opened(conn.(*net.UnixConn)); err != nil {
			return err
		}
	}
	// Who is refused finds the reply there, and the connection closed.
	if err := json.NewEncoder(conn).Encode(requestJSON{Action: action, Options: options}); err != nil && !isReset(err) {
		return fmt.Errorf("cannot ask the daemon: %w", err)
	}
	in := json.NewDecoder(conn)
	for said := false; ; {
		var raw json.RawMessage
		var r replyJSON
		err := in.Decode(&raw)
		if err == nil {
			err = json.Unmarshal(raw, &r)
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		switch {
		case errors.Is(err, unix.ECONNRESET) && !said: // it was just ending, and had not taken the connection
			return fmt.Errorf("%w on %s any more; start it with `nodemgr daemon start`", errNoDaemon, p.socket())
		case err != nil:
			return fmt.Errorf("the daemon did not answer %s: %w", action, err)
		}
		said = true
		if err := frame(raw, r); err != nil || !r.More {
			return err
		}
	}
}

// replyError is a reply with status 1.
type replyError string

func (e replyError) Error() string { return string(e) }

// dataOf decodes the data of a reply of one frame into to.
func dataOf(to any) frameFunc {
	return func(_ []byte, r replyJSON) error {
		switch {
		case r.Status != 0 && strings.HasPrefix(r.Error, "unknown action"):
			return &answerError{kind: answerUnsupported, err: replyError(r.Error)}
		case r.Status != 0:
			return &answerError{kind: answerDenied, err: replyError(r.Error)}
		}
		if err := json.Unmarshal(r.Data, to); err != nil {
			return &answerError{kind: answerBadReply, err: err}
		}
		return nil
	}
}

// askPeer asks a member in the daemon's name, unless it is left alone.
func (d *daemon) askPeer(ctx context.Context, c *config, node, action string, options map[string]json.RawMessage, frame frameFunc) error {
	if pause := d.peers.pause(node); pause > 0 {
		return &answerError{kind: answerDenied, err: fmt.Errorf("it denied this node's questions and is left alone for another %s; once secret, cluster name and cluster.nodes agree, it is asked again then, or when it asks this node", pause.Round(time.Second))}
	}
	ring := d.keys.Load()
	select {
	case <-ring.ready:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if ring.err != nil {
		return ring.err
	}
	key, token := d.heartbeats.toward(node, ring)
	a := caller{network: d.network, cluster: ring.cluster, node: c.node, key: key, token: token, now: func() int64 { return time.Now().UnixMilli() }}
	err := a.ask(ctx, c, node, action, options, frame)
	d.peers.asked(node, err)
	return err
}

// peerTrust leaves peers alone that deny: a question that a peer cannot open
// counts against this node there, and waiting must not get it shut out.
type peerTrust struct {
	now func() time.Time

	mu     sync.Mutex
	denied map[string]denial // by nodename; members only, hence bounded
}

type denial struct {
	count int // in a row
	until time.Time
}

func newPeerTrust(now func() time.Time) *peerTrust {
	return &peerTrust{now: now, denied: map[string]denial{}}
}

// pause returns how long peer is still left alone.
func (t *peerTrust) pause(peer string) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return max(0, t.denied[peer].until.Sub(t.now()))
}

// heard says that peer sent something that opens.
func (t *peerTrust) heard(peer string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.denied, peer)
}

// asked takes the outcome of a question to peer.
func (t *peerTrust) asked(peer string, err error) {
	var answer *answerError
	answered := err == nil || errors.As(err, &answer) && answer.kind == answerDenied && !answer.silent
	switch {
	case answered:
		t.heard(peer)
	case answer != nil && answer.silent:
		t.mu.Lock()
		defer t.mu.Unlock()
		was := t.denied[peer]
		pause := deniedPause
		if was.count+1 >= deniedOften {
			pause = deniedLongPause
		}
		t.denied[peer] = denial{was.count + 1, t.now().Add(pause)}
	}
}

// retain forgets the peers that keep does not name.
func (t *peerTrust) retain(keep func(string) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.DeleteFunc(t.denied, func(peer string, _ denial) bool { return !keep(peer) })
}
