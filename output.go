// output.go: what programs and commands of resources print. It goes to a file
// for each resource, which the daemon reads into the service's log, and cuts
// when it has grown: a pipe would break with the daemon. How much of it gets
// into the log is bounded; the rest is counted.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// output is one resource's file. Beside it, at holds how far it was logged, for
// the next daemon, however this one ends.
type output struct {
	f, at *os.File
	log   func(text string)

	mu       sync.Mutex
	offset   int64  // up to which it was read
	kept     int64  // what at holds
	rest     []byte // of a line without its end
	allowed  int    // bytes that may be logged now
	refilled time.Time
	dropped  int
	capture  *boundedBuffer // of the command that runs
}

func (in *instance) outputPath(rid string) string {
	return filepath.Join(in.paths.instanceLib(in.name()), rid+".out")
}

// output returns the resource's file. The first call begins to read it, where
// an earlier daemon left off.
func (in *instance) output(rid string) (*output, error) {
	path := in.outputPath(rid)
	in.opening.Lock()
	defer in.opening.Unlock()
	if o := in.outputs[rid]; o != nil {
		return o, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("cannot keep the output of %s: %w", rid, err)
	}
	o, err := openOutput(path, func(text string) { in.log(slog.LevelInfo, rid, text) })
	if err != nil {
		return nil, fmt.Errorf("cannot keep the output of %s: %w", rid, err)
	}
	changed, stop, err := in.watcher.add(path)
	if err != nil {
		o.close()
		return nil, fmt.Errorf("cannot follow the output of %s: %w", rid, err)
	}
	in.outputs[rid] = o
	in.jobs.Go(func() {
		defer stop()
		o.follow(in.ctx, changed)
		in.acting <- struct{}{} // an action may be starting what prints to it
		o.close()
		<-in.acting
	})
	return o, nil
}

func openOutput(path string, log func(text string)) (*output, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	at, err := os.OpenFile(path+".at", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	o := &output{f: f, at: at, log: log, allowed: outputBurst, refilled: time.Now()}
	fmt.Fscan(at, &o.offset) // what cannot be read was not logged
	o.offset = max(0, o.offset)
	return o, nil
}

func (o *output) close() {
	o.f.Close()
	o.at.Close()
}

// follow reads what is written, as it is written. Who writes more than may be
// logged is looked at only now and then.
func (o *output) follow(ctx context.Context, changed <-chan struct{}) {
	for ctx.Err() == nil {
		next := changed
		var pause <-chan time.Time
		if o.drain() {
			next, pause = nil, time.After(outputPause)
		}
		select {
		case <-next:
		case <-pause:
		case <-ctx.Done():
			o.drain()
		}
	}
}

// drain logs the lines that are new, and cuts the file once it is large. It
// tells whether there was more than may be logged.
func (o *output) drain() (flooded bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	info, err := o.f.Stat()
	if err != nil {
		return false
	}
	size := info.Size()
	if size < o.offset {
		o.offset = 0 // somebody cut it
	}
	now := time.Now()
	o.allowed = min(outputBurst, o.allowed+int(now.Sub(o.refilled).Seconds()*outputRate))
	o.refilled = now
	chunk := make([]byte, min(size-o.offset, 64<<10))
	for o.offset < size && o.allowed > 0 {
		n, err := o.f.ReadAt(chunk[:min(int64(len(chunk)), size-o.offset)], o.offset)
		if n == 0 || err != nil && err != io.EOF {
			break
		}
		o.offset += int64(n)
		o.allowed -= n
		o.lines(chunk[:n])
	}
	if flooded = o.offset < size; flooded {
		o.dropped += int(size - o.offset)
		o.offset, o.rest = size, nil
	} else if o.dropped > 0 {
		o.log(fmt.Sprintf("(%d bytes of output are left out: more than %d a second)", o.dropped, outputRate))
		o.dropped = 0
	}
	if o.offset > outputKept && o.f.Truncate(0) == nil {
		o.offset = 0
	}
	o.keep()
	return flooded
}

// keep notes up to where the file was logged. A write fails only where the
// output itself cannot be written any more.
func (o *output) keep() {
	if at := max(0, o.offset-int64(len(o.rest))); at != o.kept { // of a line that was cut, the end is logged
		o.at.WriteAt(fmt.Appendf(nil, "%20d\n", at), 0)
		o.kept = at
	}
}

// lines logs whole lines, and keeps the rest of the last one.
func (o *output) lines(text []byte) {
	if o.capture != nil {
		o.capture.Write(text)
	}
	o.rest = append(o.rest, text...)
	for {
		end := bytes.IndexByte(o.rest, '\n')
		if (end < 0 || end > outputLine) && len(o.rest) >= outputLine {
			end = outputLine - 1
		}
		if end < 0 {
			return
		}
		o.log(string(bytes.TrimRight(o.rest[:end+1], "\r\n")))
		o.rest = o.rest[end+1:]
	}
}

// begin has what is printed from now on collected, up to a bound; end returns
// it.
func (o *output) begin() {
	o.drain()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.capture = &boundedBuffer{limit: commandOutput}
}

func (o *output) end() string {
	o.drain()
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.rest) > 0 { // the command has ended, and with it its last line
		o.log(string(o.rest))
		o.rest = nil
		o.keep()
	}
	text, _ := o.capture.text()
	o.capture = nil
	return text
}

// lastLine is the last line of an output that is not empty, bounded: what a
// command says last is mostly why it failed.
func lastLine(text string) string {
	text = strings.TrimSpace(text)
	text = strings.TrimSpace(text[strings.LastIndexByte(text, '\n')+1:])
	return strings.Map(printable, strings.ToValidUTF8(text[:min(len(text), 300)], ""))
}

// saying adds the last line to a message, if there is one.
func saying(output string) string {
	if said := lastLine(output); said != "" {
		return ": " + said
	}
	return ""
}
