// installation.go: which version is installed on this node, and was its
// installation finalized: the node status (installation-status.md). It reads
// the file system and runs the configured hooks at each request; it asks no
// other node. What several nodes' statuses mean together is upgrade.go's.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// nodeState is the answer of a node, in short.
type nodeState string

const (
	nodeFinalized   nodeState = "finalized"   // installed = finalized
	nodeUnfinalized nodeState = "unfinalized" // installed > finalized, or nothing finalized yet
	nodeDowngraded  nodeState = "downgraded"  // installed < finalized
	nodeUnreadable  nodeState = "unreadable"  // a file or hook that is needed does not tell
)

// nodeStatus is the JSON of the node status.
type nodeStatus struct {
	Schema    int           `json:"schema"`
	Nodename  string        `json:"nodename"`
	Time      time.Time     `json:"time"`
	Agent     string        `json:"agent"`
	DaemonID  string        `json:"daemon_id"`
	State     nodeState     `json:"state"`
	Reasons   reasons       `json:"reasons"`
	Product   nullable      `json:"product"`
	Installed versionStatus `json:"installed"`
	Finalized versionStatus `json:"finalized"`
	OS        struct {
		ID        nullable `json:"id"`
		VersionID nullable `json:"version_id"`
		Kernel    nullable `json:"kernel"`
	} `json:"os"`
	Boot struct {
		ID nullable   `json:"id"`
		At *time.Time `json:"at"`
	} `json:"boot"`
	Reboot   rebootStatus `json:"reboot"`
	Packages struct {
		DB       nullable   `json:"db"`
		Modified *time.Time `json:"modified"`
	} `json:"packages"`
	Previous     *seenVersion `json:"previous"`
	ClusterNodes []string     `json:"cluster_nodes"`
}

// reason says why a state is what it is, for programs and for people.
type reason struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

type reasons []reason

// text is all that the reasons say, in one line.
func (r reasons) text() string {
	var all []string
	for _, one := range r {
		all = append(all, one.Message)
	}
	return strings.Join(all, "; ")
}

// versionStatus is one of the two versions. Error is set when it should be
// known and is not; without a version and an error there is none.
type versionStatus struct {
	Version nullable   `json:"version"`
	Raw     nullable   `json:"raw,omitempty"`
	Source  nullable   `json:"source"`
	Since   *time.Time `json:"since"`
	Error   nullable   `json:"error"`
}

// rebootStatus: Required is nil when it is not known.
type rebootStatus struct {
	Required *bool  `json:"required"`
	Why      string `json:"why"`
}

// nullable is a string that is null in JSON when it is empty.
type nullable string

func (n nullable) MarshalJSON() ([]byte, error) {
	if n == "" {
		return []byte("null"), nil
	}
	return json.Marshal(string(n))
}

const (
	hookTimeout     = 5 * time.Second
	hookOutput      = 64 << 10 // bytes
	releaseFileSize = 64 << 10 // bytes
	// A finalized file that is being written is read again this often.
	finalizedReads = 3
	finalizedPause = 50 * time.Millisecond
)

// nodeStatus answers for this node.
func (d *daemon) nodeStatus(ctx context.Context) nodeStatus {
	c := d.config.Load()
	r := statusReader{c: c, paths: d.paths, run: d.run, releaseFile: d.journal.releaseFile(c), journal: d.journal}
	s := r.read(ctx)
	s.DaemonID = d.id
	return s
}

// statusReader reads one node status.
type statusReader struct {
	c           *config
	paths       paths
	run         runner
	releaseFile string
	journal     *journal // nil: none is kept
}

func (r statusReader) read(ctx context.Context) nodeStatus {
	s := nodeStatus{Schema: 1, Nodename: r.c.node, Time: time.Now().UTC().Truncate(time.Second), Agent: agentVersion, ClusterNodes: r.c.members(), Reasons: reasons{}}
	var hooks sync.WaitGroup
	hooks.Go(func() { s.Reboot = r.reboot(ctx) })
	s.Installed, s.Product = r.installed(ctx)
	if r.journal != nil && s.Installed.Error == "" {
		var since time.Time
		since, s.Previous = r.journal.observe(string(s.Installed.Version), r.c.order())
		if s.Installed.Since == nil {
			s.Installed.Since = &since
		}
	}
	s.Finalized = r.finalized(ctx, s.Installed)
	s.State, s.Reasons = judge(s.Installed, s.Finalized, r.c.order())
	readMachine(&s)
	hooks.Wait()
	return s
}

// judge compares the two versions.
func judge(installed, finalized versionStatus, order versionOrder) (nodeState, reasons) {
	reasons := reasons{}
	if installed.Error != "" {
		reasons = append(reasons, reason{"installed_unreadable", "the installed version is not known: " + string(installed.Error)})
	}
	if finalized.Error != "" {
		reasons = append(reasons, reason{"finalized_unreadable", "the finalized version is not known: " + string(finalized.Error)})
	}
	if len(reasons) > 0 {
		return nodeUnreadable, reasons
	}
	if finalized.Version == "" {
		return nodeUnfinalized, append(reasons, reason{"not_finalized", fmt.Sprintf("%s is installed, nothing is finalized yet", installed.Version)})
	}
	message := fmt.Sprintf("%s is installed, %s is finalized", installed.Version, finalized.Version)
	switch order.compare(string(installed.Version), string(finalized.Version)) {
	case 1:
		return nodeUnfinalized, append(reasons, reason{"not_finalized", message})
	case -1:
		return nodeDowngraded, append(reasons, reason{"downgraded", message})
	}
	return nodeFinalized, reasons
}

// versionOrder compares versions after release.rewrite.
type versionOrder struct{ rewrites []rewrite }

func (o versionOrder) parse(text string) (version, error) {
	for _, r := range o.rewrites {
		text = strings.ReplaceAll(text, r.from, r.to)
	}
	return parseVersion(text)
}

func (c *config) order() versionOrder {
	return versionOrder{value[[]rewrite](c, "release.rewrite")}
}

// compare takes versions that parse; what does not parse sorts first.
func (o versionOrder) compare(a, b string) int {
	x, errX := o.parse(a)
	y, errY := o.parse(b)
	if errX != nil || errY != nil {
		return compareBools(errX == nil, errY == nil)
	}
	return compareVersions(x, y)
}

func (r statusReader) installed(ctx context.Context) (s versionStatus, product nullable) {
	fail := func(err error) (versionStatus, nullable) {
		s.Error = nullable(err.Error())
		return s, product
	}
	product = nullable(r.c.text("release.product"))
	var found release
	if command := r.c.list("release.command"); command != nil {
		s.Source = nullable(strings.Join(command, " "))
		line, err := r.firstLine(ctx, command)
		if err != nil {
			return fail(err)
		}
		found = release{version: line, raw: line}
	} else {
		s.Source = nullable(r.releaseFile)
		text, info, err := readRegular(r.releaseFile, releaseFileSize)
		if err != nil {
			return fail(err)
		}
		s.Since = changeTime(info)
		format := releaseFormat{r.c.text("release.format"), value[*regexp.Regexp](r.c, "release.pattern"), r.c.text("release.key")}
		if found, err = format.parse(r.releaseFile, string(text)); err != nil {
			return fail(fmt.Errorf("%s: %w", r.releaseFile, err))
		}
	}
	if found.product != "" {
		product = nullable(found.product)
	}
	s.Raw = nullable(found.raw)
	if _, err := r.c.order().parse(found.version); err != nil {
		return fail(fmt.Errorf("%s: %w", s.Source, err))
	}
	s.Version = nullable(found.version)
	return s, product
}

// release is what a release file says.
type release struct{ version, product, raw string }

// releaseFormat is release.format with its pattern and its key.
type releaseFormat struct {
	name    string
	pattern *regexp.Regexp
	key     string
}

var (
	errNoVersion = errors.New("no version in it")
	notASCII     = regexp.MustCompile(`[^\t\r\n\x20-\x7e]`)
)

// parse reads the text of a release file. With `auto`, a file named
// os-release is in that format; of another, the first line that matches the
// pattern counts, else a first line that is nothing but a version.
func (f releaseFormat) parse(path, text string) (release, error) {
	if strings.TrimSpace(text) == "" {
		return release{}, errors.New("the file is empty")
	}
	format := f.name
	if format == "auto" && filepath.Base(path) == "os-release" {
		format = "os-release"
	}
	if format == "os-release" {
		fields := parseOSRelease(text)
		if fields[f.key] == "" {
			return release{}, fmt.Errorf("%w: %s is not set", errNoVersion, f.key)
		}
		return release{fields[f.key], fields["NAME"], f.key + "=" + fields[f.key]}, nil
	}
	first := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if first == "" {
			first = line
		}
		if format == "plain" {
			continue
		}
		if match := f.pattern.FindStringSubmatch(line); match != nil {
			found := release{version: match[f.pattern.SubexpIndex("version")], raw: line}
			if i := f.pattern.SubexpIndex("product"); i >= 0 {
				found.product = match[i]
			}
			return found, nil
		}
	}
	if _, err := parseVersion(first); err == nil && format != "pattern" {
		return release{version: first, raw: first}, nil
	}
	return release{}, fmt.Errorf("%w: %q does not match", errNoVersion, shortened(notASCII.ReplaceAllString(first, "?")))
}

// parseOSRelease reads os-release(5): shell-like assignments.
func parseOSRelease(text string) map[string]string {
	fields := map[string]string{}
	for line := range strings.Lines(text) {
		key, value, found := strings.Cut(strings.TrimSpace(line), "=")
		if !found || strings.HasPrefix(key, "#") {
			continue
		}
		if words, err := splitWords(value); err == nil {
			fields[key] = strings.Join(words, " ")
		}
	}
	return fields
}

// finalized reads the finalized version in the way of finalized.mode.
func (r statusReader) finalized(ctx context.Context, installed versionStatus) versionStatus {
	path := finalizedFile(r.c, r.paths)
	switch r.c.text("finalized.mode") {
	case "none":
		return versionStatus{Version: installed.Version, Since: installed.Since}
	case "marker":
		return r.finalizedMarker(path, installed)
	case "command":
		return r.finalizedCommand(ctx)
	}
	return r.finalizedFile(ctx, path)
}

func finalizedFile(c *config, p paths) string {
	if path := c.text("finalized.file"); path != "" {
		return path
	}
	return p.finalized()
}

func (r statusReader) finalizedFile(ctx context.Context, path string) versionStatus {
	s := versionStatus{Source: nullable(path)}
	for attempt := 1; ; attempt++ {
		text, since, err := readSteady(path)
		if errors.Is(err, os.ErrNotExist) {
			return s
		}
		if err == nil {
			s.Version, err = r.finalizedText(text)
		}
		if s.Since = since; err == nil {
			return s
		}
		s.Error = nullable(err.Error())
		if !errors.Is(err, errUnsteady) || attempt >= finalizedReads {
			return s
		}
		select {
		case <-ctx.Done():
			return s
		case <-time.After(finalizedPause):
			s.Error = ""
		}
	}
}

// errUnsteady marks what may be a file in the middle of being written.
var errUnsteady = errors.New("it is empty or changes while it is read")

// readSteady reads a small file, and fails with errUnsteady if it is empty or
// changes meanwhile.
func readSteady(path string) (string, *time.Time, error) {
	before := fileStamp(path)
	text, info, err := readRegular(path, releaseFileSize)
	if err != nil {
		return "", nil, err
	}
	if before != fileStamp(path) || strings.TrimSpace(string(text)) == "" {
		return "", changeTime(info), fmt.Errorf("%s: %w", path, errUnsteady)
	}
	return string(text), changeTime(info), nil
}

func (r statusReader) finalizedText(text string) (nullable, error) {
	pattern := value[*regexp.Regexp](r.c, "finalized.pattern")
	format := releaseFormat{name: "plain"}
	if pattern != nil {
		format = releaseFormat{name: "pattern", pattern: pattern}
	}
	found, err := format.parse("", text)
	if err == nil {
		_, err = r.c.order().parse(found.version)
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", finalizedFile(r.c, r.paths), err)
	}
	return nullable(found.version), nil
}

// finalizedMarker: the file's existence finalizes what was installed before
// it. Both times are the kernel's change times, which nobody restores.
func (r statusReader) finalizedMarker(path string, installed versionStatus) versionStatus {
	s := versionStatus{Source: nullable(path)}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return s
	case err == nil && !info.Mode().IsRegular():
		err = fmt.Errorf("%s: not a regular file", path)
	}
	if err != nil {
		s.Error = nullable(err.Error())
		return s
	}
	since := changeTime(info)
	if installed.Since != nil && !since.Before(*installed.Since) {
		s.Version, s.Since = installed.Version, since
	}
	return s
}

func (r statusReader) finalizedCommand(ctx context.Context) versionStatus {
	command := r.c.list("finalized.command")
	s := versionStatus{Source: nullable(strings.Join(command, " "))}
	if command == nil {
		s.Error = "finalized.mode is command, and finalized.command is not set"
		return s
	}
	line, err := r.firstLine(ctx, command)
	if err == nil && line != "" {
		_, err = r.c.order().parse(line)
	}
	if err != nil {
		s.Error = nullable(err.Error())
		return s
	}
	s.Version = nullable(line)
	return s
}

// firstLine runs a hook that must succeed.
func (r statusReader) firstLine(ctx context.Context, command []string) (string, error) {
	out, exit, err := r.hook(ctx, command)
	if err == nil && exit != 0 {
		err = fmt.Errorf("%s failed with exit status %d", command[0], exit)
	}
	line, _, _ := strings.Cut(out, "\n")
	return strings.TrimSpace(line), err
}

func (r statusReader) hook(ctx context.Context, command []string) (string, int, error) {
	ctx, cancel := context.WithTimeout(ctx, hookTimeout)
	defer cancel()
	out := &boundedBuffer{limit: hookOutput}
	exit, err := r.run(ctx, command, out, nil)
	text, _ := out.text()
	return text, exit, err
}

func (r statusReader) reboot(ctx context.Context) rebootStatus {
	command := r.c.list("reboot.command")
	if command == nil {
		return rebootStatus{}
	}
	out, exit, err := r.hook(ctx, command)
	if err != nil {
		return rebootStatus{Why: err.Error()}
	}
	line, _, _ := strings.Cut(out, "\n")
	s := rebootStatus{Why: strings.TrimSpace(line)}
	if exit == 0 || exit == 1 {
		required := exit == 1
		s.Required = &required
	}
	return s
}

// changeTime is when the kernel saw the file change; the modification time is
// one that package managers set.
func changeTime(info os.FileInfo) *time.Time {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	t := time.Unix(st.Ctim.Unix()).UTC()
	return &t
}

// readMachine adds what the machine says of itself; what it does not say is
// null.
func readMachine(s *nodeStatus) {
	if text, _, err := readRegular("/etc/os-release", releaseFileSize); err == nil {
		fields := parseOSRelease(string(text))
		s.OS.ID, s.OS.VersionID = nullable(fields["ID"]), nullable(fields["VERSION_ID"])
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		s.OS.Kernel = nullable(unix.ByteSliceToString(name.Release[:]))
	}
	if id, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		s.Boot.ID = nullable(strings.TrimSpace(string(id)))
		at := time.Now().Add(-boottime()).UTC().Truncate(time.Second)
		s.Boot.At = &at
	}
	for _, db := range []string{"/var/lib/rpm", "/usr/lib/sysimage/rpm", "/var/lib/dpkg/status"} {
		if modified := newestIn(db); modified != nil {
			s.Packages.DB, s.Packages.Modified = nullable(db), modified
			break
		}
	}
}

// newestIn is the latest modification of path, or of a file in it.
func newestIn(path string) *time.Time {
	info, err := os.Stat(path)
	if err != nil {
		return nil
	}
	newest := info.ModTime()
	if entries, err := os.ReadDir(path); err == nil {
		for _, entry := range entries {
			if info, err := entry.Info(); err == nil && info.ModTime().After(newest) {
				newest = info.ModTime()
			}
		}
	}
	newest = newest.UTC().Truncate(time.Second)
	return &newest
}

// finalize records the installed version as finalized. wanted, unless empty,
// must be that version.
func finalize(ctx context.Context, c *config, p paths, releaseFile, wanted string) (string, error) {
	if mode := c.text("finalized.mode"); mode != "version" {
		return "", fmt.Errorf("cannot finalize: finalized.mode is %s, so the product itself records it", mode)
	}
	if err := p.makeFolders(); err != nil {
		return "", err
	}
	held, err := lock(p.lockFile("finalize"))
	if err != nil {
		return "", err
	}
	defer held.unlock()
	r := statusReader{c: c, paths: p, run: runCommand, releaseFile: releaseFile}
	installed, _ := r.installed(ctx)
	order := c.order()
	switch {
	case installed.Error != "":
		return "", fmt.Errorf("cannot finalize: the installed version is not known: %s", installed.Error)
	case wanted != "" && order.compare(wanted, string(installed.Version)) != 0:
		return "", fmt.Errorf("cannot finalize %s: %s is installed", wanted, installed.Version)
	}
	version := string(installed.Version)
	if now := r.finalizedFile(ctx, finalizedFile(c, p)); string(now.Version) == version && now.Error == "" {
		return version, nil
	}
	if back, err := r.finalizedText(version); err != nil || string(back) != version {
		return "", fmt.Errorf("cannot finalize: finalized.pattern would not read %q back, so the product itself writes the file", version)
	}
	return version, writeFile(finalizedFile(c, p), []byte(version+"\n"), 0o644)
}
