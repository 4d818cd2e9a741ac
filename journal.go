// journal.go: what this node remembers of versions that its disk does not tell
// any more (installation-status.md). It never overrides the disk, and losing
// it loses no more than the name of the version before.

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"
)

// seenVersion is a version and since when it was seen installed.
type seenVersion struct {
	Version string    `json:"version"`
	Since   time.Time `json:"since"`
}

// journal remembers what the disk does not: the version of before, and which
// release file was chosen when none was configured. It never overrides the
// disk.
type journal struct {
	path string
	log  *slog.Logger

	mu    sync.Mutex
	state journalState
}

type journalState struct {
	ReleaseFile string       `json:"release_file"`
	Current     *seenVersion `json:"current"`
	Previous    *seenVersion `json:"previous"`
}

func openJournal(path string, log *slog.Logger) *journal {
	state, err := readJournal(path)
	if err != nil {
		log.Error("the journal of versions begins anew", "err", err)
	}
	return &journal{path: path, log: log, state: state}
}

// readJournal returns an empty state where there is none, or none that reads.
func readJournal(path string) (state journalState, err error) {
	data, _, err := readRegular(path, 64<<10)
	if errors.Is(err, os.ErrNotExist) {
		return state, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &state)
	}
	if err != nil {
		return journalState{}, err
	}
	return state, nil
}

// standardReleaseFiles are looked for, in this order, at the first start.
var standardReleaseFiles = []string{"/etc/neteye-release", "/etc/os-release"}

// releaseFile is the one to read; the first choice is kept.
func (j *journal) releaseFile(c *config) string {
	j.mu.Lock()
	defer j.mu.Unlock()
	file := chooseReleaseFile(c, j.state.ReleaseFile)
	if j.state.ReleaseFile == "" && c.text("release.file") == "" {
		j.state.ReleaseFile = file
		j.store()
	}
	return file
}

// chooseReleaseFile: the configured file, else the one that was chosen at the
// first start, even if it is gone since, else the first that is there.
func chooseReleaseFile(c *config, chosen string) string {
	if file := cmp.Or(c.text("release.file"), chosen); file != "" {
		return file
	}
	for _, file := range standardReleaseFiles {
		if _, err := os.Stat(file); err == nil {
			return file
		}
	}
	return standardReleaseFiles[len(standardReleaseFiles)-1]
}

// observe takes the installed version, and returns since when it was seen, and
// the one before it.
func (j *journal) observe(version string, order versionOrder) (since time.Time, before *seenVersion) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.state.Current == nil || order.compare(j.state.Current.Version, version) != 0 {
		if j.state.Current != nil {
			j.state.Previous = j.state.Current
		}
		j.state.Current = &seenVersion{version, time.Now().UTC().Truncate(time.Second)}
		j.store()
	}
	if j.state.Previous != nil {
		previous := *j.state.Previous
		before = &previous
	}
	return j.state.Current.Since, before
}

func (j *journal) store() {
	data, err := json.Marshal(j.state)
	if err == nil {
		err = writeFile(j.path, append(data, '\n'), 0o600)
	}
	if err != nil {
		j.log.Warn("the journal of versions is not kept", "err", err)
	}
}
