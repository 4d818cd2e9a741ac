// logs.go: the logs of services (design.md §7): how lines are written, how a
// file is rotated, and how it is read on, through rotations, by those who ask.
//
// Only the daemon rotates, under the lock of its serviceLog. Another process
// may append (the guard): the kernel keeps what is appended at once together.
// A line that it writes in the very moment of a rotation stands in the old
// file, and comes with a backlog, but maybe not to those who follow.

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
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

func (p paths) serviceLog(name string) string { return filepath.Join(p.log, name+".log") }

// rotatedLog is the one old file beside a log.
func rotatedLog(path string) string { return path + ".1" }

// serviceLog writes and reads the logs of all services. It holds no
// descriptor while it does neither: there may be a thousand services.
type serviceLog struct {
	paths   paths
	node    func() string
	watcher *watcher // nil in who only writes
	log     *slog.Logger
	limit   int64 // serviceLogSize; 0 never rotates, as another process than the daemon must

	mu        sync.Mutex
	rotations map[string]int // by service, since the start
	failing   bool           // the last write failed
}

func newServiceLog(p paths, node func() string, w *watcher, log *slog.Logger) *serviceLog {
	return &serviceLog{paths: p, node: node, watcher: w, log: log, limit: serviceLogSize, rotations: map[string]int{}}
}

// write appends text, each of its lines as one of the log. rid is empty for
// what is about the whole instance. It never fails its caller: a service goes
// on when the disk is full.
func (l *serviceLog) write(level slog.Level, service, rid, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	entry := logEntry(time.Now(), level, l.node(), rid, text) // under the lock: the file is in order of time
	if len(entry) == 0 {
		return
	}
	err := l.append(service, entry)
	if failing := err != nil; failing != l.failing {
		l.failing = failing
		if failing {
			l.log.Error("lines of service logs are lost", "service", service, "err", err)
		} else {
			l.log.Info("service logs are written again", "service", service)
		}
	}
}

// append is called under the lock.
func (l *serviceLog) append(service string, entry []byte) error {
	path := l.paths.serviceLog(service)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("cannot open the log: %w", err)
	}
	defer func() { f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("cannot look at the log: %w", err)
	}
	size := info.Size()
	if l.limit > 0 && size > 0 && size+int64(len(entry)) > l.limit {
		if err := os.Rename(path, rotatedLog(path)); err != nil {
			return fmt.Errorf("cannot rotate the log: %w", err)
		}
		l.rotations[service]++
		size = 0
		f.Close()
		if f, err = os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600); err != nil {
			return fmt.Errorf("cannot begin the log anew: %w", err)
		}
	}
	// A disk that was full, or a crash, may have left a part of a line. If it is
	// one that another process is writing just now, there will be an empty line.
	last := []byte{'\n'}
	if size > 0 {
		f.ReadAt(last, size-1) // whatever hinders it hinders the write too
	}
	if last[0] != '\n' {
		entry = append([]byte{'\n'}, entry...)
	}
	if _, err := f.Write(entry); err != nil {
		return fmt.Errorf("cannot write the log: %w", err)
	}
	return nil
}

// logTime is RFC 3339 of a fixed width, in UTC.
const logTime = "2006-01-02T15:04:05.000Z07:00"

// logEntry makes the lines of a log from a text; none of a blank text.
func logEntry(at time.Time, level slog.Level, node, rid, text string) []byte {
	if rid == "" {
		rid = "-"
	}
	var entry []byte
	for line := range strings.Lines(shortText(text, logTextSize)) {
		if line = strings.TrimSpace(shortText(strings.Map(printable, line), logLineSize)); line != "" {
			entry = at.UTC().AppendFormat(entry, logTime)
			entry = fmt.Appendf(entry, " %s %s %s %s\n", logLevel(level), node, rid, line)
		}
	}
	return entry
}

func logLevel(level slog.Level) string {
	switch {
	case level >= slog.LevelError:
		return "error"
	case level >= slog.LevelWarn:
		return "warn"
	case level >= slog.LevelInfo:
		return "info"
	}
	return "debug"
}

// printable keeps what a program prints from moving the cursor of who reads it
// later, or worse.
func printable(r rune) rune {
	switch {
	case unicode.IsSpace(r):
		return ' '
	case !unicode.IsPrint(r):
		return utf8.RuneError
	}
	return r
}

func shortText(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	for limit > 0 && !utf8.RuneStart(text[limit]) {
		limit--
	}
	return text[:limit] + "…"
}

// timeOfLine reads the time at a line's begin.
func timeOfLine(line string) (time.Time, bool) {
	text, _, _ := strings.Cut(line, " ")
	at, err := time.Parse(logTime, text)
	return at, err == nil
}

// logReader reads a log from a place on. It is one goroutine's.
type logReader struct {
	*serviceLog
	service   string
	files     []*os.File // not read to the end yet, oldest first
	rotations int        // when the last of files was opened
	buffer    []byte
	held      int  // bytes of buffer that are no whole line yet
	skip      bool // the first line: its begin was not asked for

	following bool
	changed   <-chan struct{} // the last of files
	unwatch   func()
}

// open finds where the last backlog bytes begin; negative: all. Who follows
// has an empty file made where there is none, so that it can be watched.
func (l *serviceLog) open(service string, backlog int64, follow bool) (*logReader, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := &logReader{serviceLog: l, service: service, rotations: l.rotations[service], buffer: make([]byte, logFrameSize), following: follow, unwatch: func() {}}
	path := l.paths.serviceLog(service)
	older, err := os.Open(rotatedLog(path))
	if err == nil {
		r.files = append(r.files, older)
	}
	if err == nil || errors.Is(err, os.ErrNotExist) {
		err = r.openCurrent()
	}
	if err == nil && backlog >= 0 {
		err = r.seek(backlog)
	}
	if err != nil {
		r.close()
		return nil, fmt.Errorf("cannot read the log: %w", err)
	}
	return r, nil
}

// openCurrent is called under the lock. What changes in the file from now on
// is told by changed.
func (r *logReader) openCurrent() error {
	path, how := r.paths.serviceLog(r.service), os.O_RDONLY
	if r.following {
		how |= os.O_CREATE
	}
	f, err := os.OpenFile(path, how, 0o600)
	if errors.Is(err, os.ErrNotExist) && !r.following {
		return nil
	}
	if err != nil {
		return err
	}
	r.files = append(r.files, f)
	if !r.following {
		return nil
	}
	changed, unwatch, err := r.watcher.add(path)
	if err != nil {
		return err
	}
	r.unwatch()
	r.changed, r.unwatch = changed, unwatch
	return nil
}

// seek goes to the first line that begins in the last backlog bytes.
func (r *logReader) seek(backlog int64) error {
	sizes, before := make([]int64, len(r.files)), -backlog
	for i, f := range r.files {
		info, err := f.Stat()
		if err != nil {
			return err
		}
		sizes[i] = info.Size()
		before += sizes[i]
	}
	if len(r.files) == 2 && before >= sizes[0] {
		before -= sizes[0]
		r.next()
	}
	if before <= 0 || len(r.files) == 0 {
		return nil
	}
	// The byte before tells whether a line begins there: skip to its end.
	r.skip = true
	_, err := r.files[0].Seek(before-1, io.SeekStart)
	return err
}

// next goes on with the next file.
func (r *logReader) next() {
	r.files[0].Close()
	r.files, r.held, r.skip = r.files[1:], 0, false
}

func (r *logReader) close() {
	r.unwatch()
	for _, f := range r.files {
		f.Close()
	}
}

// drain emits all lines that there are.
func (r *logReader) drain(emit func(lines []string) error) error {
	for len(r.files) > 0 {
		n, err := r.files[0].Read(r.buffer[r.held:])
		r.held += n
		if err != nil && err != io.EOF {
			return fmt.Errorf("cannot read the log: %w", err)
		}
		last := len(r.files) == 1
		if lines := r.take(err == io.EOF && !(last && r.following)); len(lines) > 0 {
			if err := emit(lines); err != nil {
				return err
			}
		}
		switch {
		case err == nil:
		case !last || !r.following:
			r.next()
		default:
			missed, err := r.advance()
			if err != nil {
				return err
			}
			if missed {
				gap := logEntry(time.Now(), slog.LevelWarn, r.node(), "", "lines are missing here: the log was rotated faster than this reader took it")
				if err := emit([]string{strings.TrimSpace(string(gap))}); err != nil {
					return err
				}
			}
			if len(r.files) == 1 {
				return nil
			}
		}
	}
	return nil
}

// take returns the whole lines of the buffer; at a file's end, what is left
// is one too.
func (r *logReader) take(end bool) []string {
	whole := bytes.LastIndexByte(r.buffer[:r.held], '\n') + 1
	if end || whole == 0 && r.held == len(r.buffer) { // no line of agentd is that long
		whole = r.held
	}
	if whole == 0 {
		return nil
	}
	lines := strings.Split(strings.TrimSuffix(string(r.buffer[:whole]), "\n"), "\n")
	if r.skip {
		lines = lines[1:]
		r.skip = false
	}
	r.held = copy(r.buffer, r.buffer[whole:r.held])
	return slices.DeleteFunc(lines, func(line string) bool { return line == "" }) // see append
}

// advance adds the files that have taken the place of the one that was read to
// its end, and is to be read once more: more may have been written before it
// was rotated. missed: a file came and went between them.
func (r *logReader) advance() (missed bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	path, rotations := r.paths.serviceLog(r.service), r.serviceLog.rotations[r.service]-r.rotations
	was, err := r.files[0].Stat()
	if err != nil {
		return false, fmt.Errorf("cannot read the log: %w", err)
	}
	at, _ := r.files[0].Seek(0, io.SeekCurrent) // fails for no regular file
	if is, err := os.Stat(path); err == nil && rotations == 0 && os.SameFile(was, is) && is.Size() >= at {
		return false, nil // else it was moved or emptied, by whomever
	}
	if rotations > 1 {
		if older, err := os.Open(rotatedLog(path)); err == nil {
			r.files = append(r.files, older)
		}
	}
	r.rotations += rotations
	if err := r.openCurrent(); err != nil {
		return false, fmt.Errorf("cannot read on in the log: %w", err)
	}
	return rotations > 2, nil
}

// logFrame is a frame of service_logs. Live frames follow the backlog.
type logFrame struct {
	Lines []string `json:"lines"`
	Live  bool     `json:"live"`
}

// stream emits the frames of a service's log. An empty live one says that the
// backlog is complete, and later ones that there is nothing new.
func (l *serviceLog) stream(ctx context.Context, service string, backlog int64, follow bool, emit func(data any) error) error {
	r, err := l.open(service, backlog, follow)
	if err != nil {
		return err
	}
	defer r.close()
	live := false
	frame := func(lines []string) error { return emit(logFrame{lines, live}) }
	if err := r.drain(frame); err != nil || !follow {
		return err
	}
	live = true
	alive := time.NewTicker(logAlive)
	defer alive.Stop()
	for err = frame([]string{}); err == nil; {
		select {
		case <-ctx.Done():
			return errStreamEnds
		case <-r.changed:
			err = r.drain(frame)
		case <-alive.C:
			err = frame([]string{})
		}
	}
	return err
}

func handleServiceLogs(_ context.Context, d *daemon, o options) (reply, error) {
	name, backlog, follow := o.text("svcname"), o.number("backlog", logBacklog), o.flag("follow")
	if name == "" {
		return reply{}, errors.New("name the service in svcname")
	}
	if err := checkServiceName(name); err != nil {
		return reply{}, err
	}
	if _, err := loadService(d.paths, d.config.Load(), name); err != nil {
		// The log of one that was deleted, or is broken, is asked for all the more.
		if _, missing := os.Stat(d.paths.serviceLog(name)); missing != nil {
			return reply{}, err
		}
	}
	return reply{stream: func(ctx context.Context, emit func(any) error) error {
		return d.logs.stream(ctx, name, backlog, follow, emit)
	}}, nil
}
