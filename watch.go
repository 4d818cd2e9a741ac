package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

type watcher struct{}

func newWatcher() (*watcher, error) { return &watcher{}, nil }

func (w *watcher) add(path string) (<-chan struct{}, func(), error) {
	c := make(chan struct{}, 1)
	done := make(chan struct{})
	go func() {
		last := ""
		for {
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
			}
			if st := fileStamp(path); st != last {
				last = st
				select {
				case c <- struct{}{}:
				default:
				}
			}
		}
	}()
	return c, func() { close(done) }, nil
}

type serviceLog struct {
	dir string
	n   func() string
}

func (l *serviceLog) write(level slog.Level, service, rid, text string) {
	f, _ := os.OpenFile(filepath.Join(l.dir, service+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	defer f.Close()
	if rid == "" {
		rid = "-"
	}
	fmt.Fprintf(f, "%s %s %s %s %s\n", time.Now().UTC().Format("2006-01-02T15:04:05.000Z"), level, l.n(), rid, text)
}
