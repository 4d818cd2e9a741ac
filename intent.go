// intent.go: what the monitor wants of the instances, kept in OSVCRUN: it
// outlives the daemon, but not the machine's next boot.

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// keptIntent is the content of the file.
type keptIntent struct {
	Boot string `json:"boot"`
	intent
}

func (p paths) intent(service string) string { return filepath.Join(p.instanceRun(service), "intent") }

func keepIntent(p paths, service string, i intent) error {
	data, err := json.Marshal(keptIntent{bootID(), i})
	if err == nil {
		err = replaceFile(p.intent(service), data)
	}
	if err != nil {
		return fmt.Errorf("cannot keep what is wanted: %w", err)
	}
	return nil
}

// readIntent returns what an earlier daemon kept in this boot.
func readIntent(p paths, service string) (intent, error) {
	data, _, err := readRegular(p.intent(service), 1<<20)
	if errors.Is(err, os.ErrNotExist) {
		return intent{}, nil
	}
	var kept keptIntent
	if err == nil {
		err = json.Unmarshal(data, &kept)
	}
	if err != nil {
		return intent{}, fmt.Errorf("what an earlier daemon wanted cannot be read: %w", err)
	}
	if kept.Boot != bootID() {
		return intent{}, nil
	}
	for rid, n := range kept.Restarts {
		if now := time.Now(); n.Last.After(now) { // the clock was set back
			n.Last = now
			kept.Restarts[rid] = n
		}
	}
	return kept.intent, nil
}

// intents writes them on a goroutine of its own, for which the core does not
// wait. Of a service, only the newest is written: that bounds what waits.
type intents struct {
	paths paths
	log   *slog.Logger
	wake  chan struct{} // closed at the end, when keep is called no more

	mu      sync.Mutex
	order   []string // services that wait
	waiting map[string]*waitingIntent
	writing *waitingIntent
}

type waitingIntent struct {
	service string
	intent  intent
	kept    chan struct{} // closed when it was written, or cannot be
}

func newIntents(p paths, log *slog.Logger) *intents {
	return &intents{paths: p, log: log, wake: make(chan struct{}, 1), waiting: map[string]*waitingIntent{}}
}

func (k *intents) keep(service string, i intent) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if w := k.waiting[service]; w != nil {
		w.intent = i
		return
	}
	k.waiting[service] = &waitingIntent{service, i, make(chan struct{})}
	k.order = append(k.order, service)
	select {
	case k.wake <- struct{}{}:
	default: // it has its token
	}
}

// kept is closed when what keep got of a service is on the disk: what it
// announces may begin, and who reads finds it.
func (k *intents) kept(service string) <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch w := k.waiting[service]; {
	case w != nil:
		return w.kept
	case k.writing != nil && k.writing.service == service:
		return k.writing.kept
	}
	return closedChannel
}

// run writes until wake is closed and nothing waits.
func (k *intents) run() {
	for range k.wake {
		for w := k.next(); w != nil; w = k.next() {
			if err := keepIntent(k.paths, w.service, w.intent); err != nil {
				k.log.Error("a restart of the daemon will not know what is wanted of a service", "service", w.service, "err", err)
			}
			close(w.kept)
		}
	}
}

// next takes what is to be written, nil if nothing is.
func (k *intents) next() *waitingIntent {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.writing = nil
	if len(k.order) > 0 {
		k.writing = k.waiting[k.order[0]]
		delete(k.waiting, k.order[0])
		k.order = k.order[1:]
	}
	return k.writing
}
