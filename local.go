// local.go: the local socket (design.md §4): plain JSON requests from root or
// the daemon's own user. It belongs to the supervisor, so it works when the
// listener is stopped, and whoever is shut out there can clear it here.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// listenLocal makes the socket. A leftover is removed: who holds the daemon's
// lock owns the name.
func listenLocal(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot listen on the local socket: %w", err)
	}
	local, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("cannot listen on the local socket (its path may have 107 characters): %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot guard the local socket: %w", err), local.Close())
	}
	return local, nil
}

func (d *daemon) serveLocal(ctx context.Context, local *net.UnixListener) {
	var served sync.WaitGroup
	defer served.Wait()
	defer local.Close()
	defer context.AfterFunc(ctx, func() { local.SetDeadline(time.Unix(1, 0)) })()
	places := make(chan struct{}, localLimit)
	for {
		conn, err := local.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			// Out of descriptors, most likely: wait until there may be some.
			if d.outsiders.allow() {
				d.log.Error("cannot accept on the local socket", "err", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		select {
		case places <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		served.Go(func() {
			defer func() { <-places }()
			defer conn.Close()
			defer context.AfterFunc(ctx, func() {
				conn.SetReadDeadline(time.Unix(1, 0))
				conn.SetWriteDeadline(time.Now().Add(finishDelay))
			})()
			d.serveLocalConnection(ctx, conn)
		})
	}
}

// serveLocalConnection answers requests in turn: each a JSON object, followed
// by a newline or a NUL. Each reply, or
// frame of one, is a line.
func (d *daemon) serveLocalConnection(ctx context.Context, conn *net.UnixConn) {
	out := json.NewEncoder(conn)
	send := func(r reply) error {
		boundWrite(ctx, conn)
		return out.Encode(r)
	}
	if err := checkPeer(conn); err != nil {
		send(replyOf(d, nil, err))
		return
	}
	bounded := &io.LimitedReader{R: nulToNewline{conn}}
	in := json.NewDecoder(bounded)
	for ctx.Err() == nil {
		bounded.N = requestLimit
		var raw json.RawMessage
		if err := in.Decode(&raw); err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
				send(replyOf(d, nil, fmt.Errorf(`cannot read the request, a line {"action": "…", "options": {…}} of at most %d bytes: %w`, requestLimit, err)))
			}
			return
		}
		r, err := d.answerLocal(ctx, raw)
		if err != nil {
			r = replyOf(d, nil, err)
		}
		if d.send(ctx, r, send) != nil {
			return
		}
	}
}

func (d *daemon) answerLocal(ctx context.Context, raw []byte) (reply, error) {
	written, err := parseRequestJSON(raw)
	if err != nil {
		return reply{}, err
	}
	r, err := parseRequest(written, "")
	if err != nil {
		return reply{}, err
	}
	return d.execute(ctx, r)
}

// checkPeer asks the kernel who connected.
func checkPeer(conn *net.UnixConn) error {
	peer, err := peerCredentials(conn)
	if err != nil {
		return fmt.Errorf("cannot tell who asks: %w", err)
	}
	if peer.Uid != 0 && int(peer.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d may not ask this daemon; use root, or the user that it runs as", peer.Uid)
	}
	return nil
}

func peerCredentials(conn *net.UnixConn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	controlErr := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return peer, errors.Join(controlErr, err)
}

// nulToNewline lets a NUL end a request, as on TCP.
type nulToNewline struct{ r io.Reader }

func (n nulToNewline) Read(p []byte) (int, error) {
	count, err := n.r.Read(p)
	for i, c := range p[:count] {
		if c == 0 {
			p[i] = '\n'
		}
	}
	return count, err
}
