// files.go: where agentd keeps what it has on disk, and the two ways it
// touches it: whole-file writes that a crash cannot tear, and locks that the
// kernel drops when their holder dies. It knows no file's content.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// paths are the folders of one daemon (design.md §2). Several daemons run on
// one machine when each has its own.
type paths struct {
	etc string // node.conf, <svcname>.conf
	lib string // state that outlives a reboot
	log string
	run string // socket, pid, locks, keys: gone after a reboot
}

// environmentPaths reads the folders from the environment.
func environmentPaths() paths {
	from := func(variable, otherwise string) string {
		if dir := os.Getenv(variable); dir != "" {
			return dir
		}
		return otherwise
	}
	return paths{
		etc: from("OSVCETC", "/etc/agentd"),
		lib: from("OSVCVAR", "/var/lib/agentd"),
		log: from("OSVCLOG", "/var/log/agentd"),
		run: from("OSVCRUN", "/run/agentd"),
	}
}

// standard tells whether these are the folders that the package installs,
// hence the ones that the system's unit works on.
func (p paths) standard() bool {
	return p == paths{"/etc/agentd", "/var/lib/agentd", "/var/log/agentd", "/run/agentd"}
}

func (p paths) nodeConf() string  { return filepath.Join(p.etc, "node.conf") }
func (p paths) goodConf() string  { return filepath.Join(p.lib, "node.conf.good") }
func (p paths) socket() string    { return filepath.Join(p.run, "agentd.sock") }
func (p paths) pidFile() string   { return filepath.Join(p.run, "agentd.pid") }
func (p paths) keys() string      { return filepath.Join(p.run, "keys") }
func (p paths) clock() string     { return filepath.Join(p.lib, "clock") }
func (p paths) journal() string   { return filepath.Join(p.lib, "installation.json") }
func (p paths) finalized() string { return filepath.Join(p.lib, "finalized") }
func (p paths) queue() string     { return filepath.Join(p.lib, "queue") }
func (p paths) nodeLog() string   { return filepath.Join(p.log, "node.log") }

// lockFile names the lock that guards writes of what is called name.
func (p paths) lockFile(name string) string { return filepath.Join(p.run, name+".lock") }

// makeFolders creates what is missing, for the owner alone.
func (p paths) makeFolders() error {
	for _, dir := range []string{p.etc, p.lib, p.log, p.run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("cannot create folder: %w", err)
		}
	}
	return nil
}

// writeFile replaces path by data so that after a crash at any moment the
// next reader finds the old content or the new one, whole: temporary file in
// the same folder, fsync, rename, fsync of the folder. The temporary name is
// fixed, so crashes leave one leftover at most, which the next write
// overwrites; hence each path has one writer at a time (a lock, or an owner).
func writeFile(path string, data []byte, mode os.FileMode) error {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target // write through a link instead of replacing it
	}
	dir, base := filepath.Split(path)
	temporary := filepath.Join(dir, "."+base+".new")
	if err := writeSynced(temporary, data, mode); err != nil {
		os.Remove(temporary)
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	if err := os.Rename(temporary, path); err != nil {
		os.Remove(temporary)
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return syncFolder(filepath.Dir(path))
}

func writeSynced(path string, data []byte, mode os.FileMode) error {
	// A leftover may have other rights, or be a link: start afresh.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// replaceFile is writeFile for what need not outlive the machine: it is whole
// after a crash of this process, and nothing is synced. It makes the folder.
func replaceFile(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("cannot write: %w", err)
	}
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return fmt.Errorf("cannot write: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("cannot write: %w", err)
	}
	return nil
}

// syncFolder makes renames and removals in dir last.
func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("cannot sync folder: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("cannot sync folder %s: %w", dir, err)
	}
	return nil
}

// readRegular reads a file of at most limit bytes and refuses what is not a
// regular file: a FIFO would hang the reader, a device never end. It returns
// the state of the very file that it read.
func readRegular(path string, limit int64) ([]byte, os.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read %s: %w", path, err)
	}
	if !info.Mode().IsRegular() {
		return nil, info, fmt.Errorf("cannot read %s: not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, info, fmt.Errorf("cannot read %s: %w", path, err)
	}
	if int64(len(data)) > limit {
		return nil, info, fmt.Errorf("cannot read %s: larger than %d bytes", path, limit)
	}
	return data, info, nil
}

// fileLock is an flock: it ends with the process at the latest.
type fileLock struct{ f *os.File }

// lock waits for the lock at path.
func lock(path string) (fileLock, error) { return takeLock(path, unix.LOCK_EX) }

// tryLock takes the lock at path, or fails at once with unix.EWOULDBLOCK when
// another process holds it.
func tryLock(path string) (fileLock, error) { return takeLock(path, unix.LOCK_EX|unix.LOCK_NB) }

// awaitLock takes the lock at path, or fails with unix.EWOULDBLOCK when it is
// not to be had until ctx ends. The kernel would wait too, but not give up.
func awaitLock(ctx context.Context, path string) (fileLock, error) {
	for again := time.Tick(lockPause); ; {
		held, err := tryLock(path)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return held, err
		}
		select {
		case <-ctx.Done():
			return fileLock{}, errors.Join(err, context.Cause(ctx))
		case <-again:
		}
	}
}

func takeLock(path string, how int) (fileLock, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fileLock{}, fmt.Errorf("cannot lock: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fileLock{}, fmt.Errorf("cannot lock: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return fileLock{}, fmt.Errorf("cannot lock %s: %w", path, err)
	}
	return fileLock{f}, nil
}

func (l fileLock) unlock() { l.f.Close() }
