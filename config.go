// config.go: node.conf (design.md §3): its keys, their defaults, validation,
// scoping, and the one way to change the file. A config is immutable once
// built, so it is shared without locks; a change makes a new one.

package main

import (
	"crypto/rand"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// sampleNodeConf is what a first start writes: every key, explained.
//
//go:embed conf/node.conf
var sampleNodeConf string

// keySpec describes one key. A section that ends in # stands for all its
// numbered or named ones: hb#1, stonith#node2.
type keySpec struct {
	section, key string
	initial      string // the default, as one would write it; "" for none
	parse        func(string) (any, error)
	unscoped     bool // key@node makes no sense
}

// keyTable is all keys of one kind of file.
type keyTable []keySpec

var nodeKeys = keyTable{
	{"node", "name", "", parseName, true},
	{"node", "env", "TST", parseWord, false},
	{"node", "maintenance_grace_period", "60s", parseDuration, false},
	{"node", "rejoin_grace_period", "90s", parseDuration, false},
	{"node", "watchdog", "", parsePath, false},
	{"cluster", "name", "default", parseClusterName, true},
	{"cluster", "nodes", "", parseNames, true},
	{"cluster", "secret", "", parseSecret, true},
	{"cluster", "previous_secret", "", parseSecret, true},
	{"cluster", "quorum", "auto", parseOneOf("auto", "true", "false"), true},
	{"cluster", "quorum_action", "stop", parseOneOf("stop", "reboot", "crash"), true},
	{"cluster", "quorum_grace", "3s", parseDuration, true},
	{"cluster", "witnesses", "", parseNames, true},
	{"listener", "addr", "0.0.0.0", parseAddr, false},
	{"listener", "port", "1214", parseCount(1, 65535), false},
	{"listener", "max_clock_skew", "60s", parseDuration, false},
	{"listener", "max_connections", "512", parseCount(4, 65535), false},
	{"hb#", "type", "", parseOneOf("unicast"), false},
	{"hb#", "addr", "0.0.0.0", parseAddr, false},
	{"hb#", "port", "10000", parseCount(1, 65535), false},
	{"hb#", "interval", "500ms", parseDuration, false},
	{"hb#", "timeout", "3s", parseDuration, false},
	{"stonith#", "cmd", "", parseCommand, false},
	{"stonith#", "timeout", "30s", parseDuration, false},
	{"hook", "command", "", parseCommand, false},
	{"release", "file", "", parsePath, false},
	{"release", "format", "auto", parseOneOf("auto", "pattern", "os-release", "plain"), false},
	{"release", "pattern", `^(?P<product>.*?) release (?P<version>[0-9][0-9A-Za-z._~^+-]*)`, parsePattern, false},
	{"release", "key", "VERSION_ID", parseWord, false},
	{"release", "product", "", parseText, false},
	{"release", "command", "", parseCommand, false},
	{"release", "rewrite", "", parseRewrites, false},
	{"finalized", "mode", "version", parseOneOf("version", "marker", "command", "none"), false},
	{"finalized", "file", "", parsePath, false},
	{"finalized", "pattern", "", parsePattern, false},
	{"finalized", "command", "", parseCommand, false},
	{"upgrade", "finalize", "node", parseOneOf("node", "cluster"), false},
	{"upgrade", "exclude", "", parseNames, false},
	{"upgrade", "stall_after", "24h", parseDuration, false},
	{"status", "timeout", "5s", parseDuration, false},
	{"status", "node_timeout", "3s", parseDuration, false},
	{"reboot", "command", "", parseCommand, false},
}

// config is node.conf as one node sees it.
type config struct {
	doc      *ini
	node     string         // the name of this node
	values   map[string]any // by section.key: scoped to this node, or the default
	warnings []string       // file:line: what is odd without being wrong
}

// value returns the value of a key as its parse function made it, or the zero
// value where the key has neither a value nor a default. A key that nodeKeys
// does not hold with this type is a programmer's error.
func value[T any](c *config, key string) T {
	v, known := c.values[key]
	if !known {
		panic("config: no key " + key)
	}
	if v == nil {
		var zero T
		return zero
	}
	return v.(T)
}

func (c *config) text(key string) string            { return value[string](c, key) }
func (c *config) list(key string) []string          { return value[[]string](c, key) }
func (c *config) count(key string) int              { return value[int](c, key) }
func (c *config) duration(key string) time.Duration { return value[time.Duration](c, key) }

// forNode returns what a key means on node: the scoped value, else the
// unscoped one, else the default; nil if there is none of them.
func (c *config) forNode(section, key, node string) any {
	text, _, ok := c.doc.value(section, key, node)
	spec := nodeKeys.find(section, key)
	if !ok {
		text = spec.initial
	}
	return spec.parsed(text)
}

// scoped returns what key@node says, nil without such a line.
func (c *config) scoped(section, key, node string) any {
	i := c.doc.find(section, key, node)
	if i < 0 || node == "" {
		return nil
	}
	return nodeKeys.find(section, key).parsed(c.doc.lines[i].value())
}

// parsed is parse for what newConfig validated already, and for defaults,
// which a test does.
func (s *keySpec) parsed(text string) any {
	if text == "" {
		return nil
	}
	v, err := s.parse(text)
	if err != nil {
		panic(fmt.Sprintf("%s.%s: %v", s.section, s.key, err))
	}
	return v
}

// members lists cluster.nodes.
func (c *config) members() []string { return c.list("cluster.nodes") }

func (c *config) isMember(node string) bool { return slices.Contains(c.members(), node) }

// secrets lists the secrets under which messages open, the one to seal with
// first.
func (c *config) secrets() []string {
	secrets := []string{c.text("cluster.secret")}
	if previous := c.text("cluster.previous_secret"); previous != "" {
		secrets = append(secrets, previous)
	}
	return secrets
}

// newConfig validates doc for the node that the machine's name or node.name
// gives. The error joins one error a faulty line.
func newConfig(doc *ini, hostname string) (*config, error) {
	c := &config{doc: doc, node: hostname, values: map[string]any{}}
	if name, _, ok := doc.value("node", "name", ""); ok {
		c.node = name
	}
	var faults []error
	for i, line := range doc.lines {
		if line.key == "" {
			continue
		}
		spec := nodeKeys.find(line.section, line.key)
		name := parameter(line.section, line.key, line.scope)
		switch {
		case spec == nil:
			c.warnings = append(c.warnings, fmt.Sprintf("%s:%d: unknown key %s%s", doc.name, i+1, name, nodeKeys.didYouMean(line.section, line.key)))
		case spec.unscoped && line.scope != "":
			faults = append(faults, fmt.Errorf("%s:%d: %s: this key is the same on all nodes; remove @%s", doc.name, i+1, name, line.scope))
		default:
			if _, err := spec.parse(line.value()); err != nil {
				faults = append(faults, fmt.Errorf("%s:%d: %s: %w", doc.name, i+1, name, err))
			}
		}
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	for _, spec := range nodeKeys {
		if strings.HasSuffix(spec.section, "#") {
			continue // a section each; read where they are used
		}
		c.values[spec.section+"."+spec.key] = c.forNode(spec.section, spec.key, c.node)
	}
	return c, c.checkTogether()
}

// checkTogether finds what is wrong between keys that are right by themselves.
func (c *config) checkTogether() error {
	if _, err := parseName(c.node); err != nil {
		return fmt.Errorf("this machine's name is no node name: %w; set node.name", err)
	}
	if c.members() == nil {
		c.values["cluster.nodes"] = []string{c.node}
	}
	faults := c.checkHeartbeats()
	if !c.isMember(c.node) {
		faults = append(faults, fmt.Errorf("%s: this node, %q, is not in the list; add it, or set node.name", c.at("cluster", "nodes"), c.node))
	}
	for _, witness := range c.list("cluster.witnesses") {
		if !c.isMember(witness) {
			faults = append(faults, fmt.Errorf("%s: %q is not in cluster.nodes", c.at("cluster", "witnesses"), witness))
		}
	}
	for _, excluded := range c.list("upgrade.exclude") {
		if !c.isMember(excluded) {
			c.warnings = append(c.warnings, fmt.Sprintf("%s: %q is not in cluster.nodes", c.at("upgrade", "exclude"), excluded))
		}
	}
	if secret := c.text("cluster.secret"); secret != "" && len(secret) < 16 {
		c.warnings = append(c.warnings, c.at("cluster", "secret")+": shorter than 16 characters: it can be guessed")
	}
	return errors.Join(faults...)
}

// at says where a key is set, for messages.
func (c *config) at(section, key string) string {
	if _, number, ok := c.doc.value(section, key, c.node); ok {
		return fmt.Sprintf("%s:%d: %s.%s", c.doc.name, number, section, key)
	}
	return c.doc.name + ": " + section + "." + key
}

// find returns the description of a key, nil for an unknown one.
func (t keyTable) find(section, key string) *keySpec {
	if prefix, name, found := strings.Cut(section, "#"); found {
		if name == "" {
			return nil // the # is there for a name
		}
		section = prefix + "#"
	}
	for i := range t {
		if t[i].section == section && t[i].key == key {
			return &t[i]
		}
	}
	return nil
}

// didYouMean suggests the known key nearest to a mistyped one, if one is near.
func (t keyTable) didYouMean(section, key string) string {
	var known []string
	prefix, name, _ := strings.Cut(section, "#")
	for _, spec := range t {
		if spec.section == prefix+"#" {
			known = append(known, spec.section+name+"."+spec.key)
		} else {
			known = append(known, spec.section+"."+spec.key)
		}
	}
	return nearest(section+"."+key, known)
}

// keysOf lists the keys of a section.
func (t keyTable) keysOf(section string) (keys []string) {
	for _, spec := range t {
		if spec.section == section {
			keys = append(keys, spec.key)
		}
	}
	return keys
}

// nearest suggests what may have been meant, if something is near.
func nearest(typed string, known []string) string {
	best, found := 4, ""
	for _, word := range known {
		if d := editDistance(typed, word); d < best {
			best, found = d, word
		}
	}
	if found == "" {
		return ""
	}
	return "; did you mean " + found + "?"
}

// editDistance counts the letters to insert, remove or replace (Levenshtein).
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

// The parsers of values. Their errors quote what was written, but for secrets.

func parseText(s string) (any, error) { return s, nil }

var (
	wordPattern = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)
	namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)
)

func parseWord(s string) (any, error) {
	if !wordPattern.MatchString(s) {
		return nil, fmt.Errorf("%q is not a word of up to 64 letters, digits, `_`, `.` and `-`", s)
	}
	return s, nil
}

func parseName(s string) (any, error) {
	if !namePattern.MatchString(s) {
		return nil, fmt.Errorf("%q is not a name: up to 64 letters, digits, `_`, `.` and `-`, the first a letter or digit", s)
	}
	return s, nil
}

func parseClusterName(s string) (any, error) {
	if s == joinCluster {
		return nil, fmt.Errorf("%q is what a joining node calls its cluster before it knows the name; choose another", s)
	}
	return parseName(s)
}

func parseNames(s string) (any, error) {
	names := strings.Fields(strings.ReplaceAll(s, ",", " "))
	for i, name := range names {
		if _, err := parseName(name); err != nil {
			return nil, err
		}
		if slices.Contains(names[:i], name) {
			return nil, fmt.Errorf("%q is listed twice", name)
		}
	}
	if len(names) == 0 {
		return nil, errors.New("the list is empty; remove the line for the default")
	}
	return names, nil
}

func parseSecret(s string) (any, error) {
	if s == "" || len(s) > 1024 {
		return nil, errors.New("a secret has 1 to 1,024 characters; remove the line of cluster.secret to get a new one at the next start")
	}
	return s, nil
}

func parseOneOf(words ...string) func(string) (any, error) {
	return func(s string) (any, error) {
		if !slices.Contains(words, s) {
			return nil, fmt.Errorf("%q is none of %s", s, strings.Join(words, ", "))
		}
		return s, nil
	}
}

// parseDuration reads `500ms`, `5s`, `1m30s`; a bare number is seconds.
func parseDuration(s string) (any, error) {
	text := s
	if _, err := strconv.ParseFloat(s, 64); err == nil {
		text += "s"
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 || d > 365*24*time.Hour {
		return nil, fmt.Errorf("%q is not a duration above 0, such as 500ms, 5s, 1m30s or 24h", s)
	}
	return d, nil
}

// parseSize reads `10k`, `2m`; a bare number is bytes, and may be negative
// where that has a meaning.
func parseSize(s string) (any, error) {
	digits := strings.TrimRight(s, "kmgKMG")
	unit, known := map[string]int64{"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[strings.ToLower(s[len(digits):])]
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || !known || n > math.MaxInt64/unit || n < math.MinInt64/unit {
		return nil, fmt.Errorf("%q is not a size in bytes, such as 4096, 10k or 2m", s)
	}
	return n * unit, nil
}

func parseCount(low, high int) func(string) (any, error) {
	return func(s string) (any, error) {
		n, err := strconv.Atoi(s)
		if err != nil || n < low || n > high {
			return nil, fmt.Errorf("%q is not a number from %d to %d", s, low, high)
		}
		return n, nil
	}
}

func parseAddr(s string) (any, error) {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return nil, fmt.Errorf("%q is not an IPv4 or IPv6 address", s)
	}
	return addr, nil
}

func parsePath(s string) (any, error) {
	if !filepath.IsAbs(s) {
		return nil, fmt.Errorf("%q is not an absolute path", s)
	}
	return filepath.Clean(s), nil
}

func parseCommand(s string) (any, error) {
	words, err := splitWords(s)
	if err != nil {
		return nil, fmt.Errorf("cannot split %q into words: %w", s, err)
	}
	if len(words) == 0 {
		return nil, errors.New("the command is empty")
	}
	return words, nil
}

func parsePattern(s string) (any, error) {
	pattern, err := regexp.Compile(s)
	if err != nil {
		return nil, fmt.Errorf("%q is not a regular expression (RE2): %w", s, err)
	}
	if pattern.SubexpIndex("version") < 0 {
		return nil, fmt.Errorf("%q has no group (?P<version>…)", s)
	}
	return pattern, nil
}

// rewrite is one replacement in versions before they are compared.
type rewrite struct{ from, to string }

func parseRewrites(s string) (any, error) {
	var rewrites []rewrite
	for _, word := range strings.Fields(s) {
		from, to, found := strings.Cut(word, "=")
		if !found || from == "" {
			return nil, fmt.Errorf("%q is not written from=to", word)
		}
		rewrites = append(rewrites, rewrite{from, to})
	}
	return rewrites, nil
}

// shortHostname is this machine's name up to the first dot.
func shortHostname() (string, error) {
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("cannot find this machine's name: %w; set node.name", err)
	}
	name, _, _ = strings.Cut(name, ".")
	return name, nil
}

// parseConfig reads the text of a node.conf.
func parseConfig(name, text string) (*config, error) {
	doc, err := parseINI(name, text)
	if err != nil {
		return nil, err
	}
	hostname, err := shortHostname()
	if _, _, ok := doc.value("node", "name", ""); err != nil && !ok {
		return nil, err
	}
	return newConfig(doc, hostname)
}

// loadConfig reads node.conf.
func loadConfig(p paths) (*config, error) {
	text, _, err := readRegular(p.nodeConf(), iniSizeLimit)
	if err != nil {
		return nil, fmt.Errorf("node.conf: %w", err)
	}
	return parseConfig("node.conf", string(text))
}

// configFile is a configuration file that commands change: node.conf, or a
// service's.
type configFile struct {
	path    string
	lock    string
	name    string // for messages
	initial string // what a missing file begins as; "" if it must be there
	keys    keyTable
	check   func(before, after string) error
}

func nodeConfFile(p paths) configFile {
	return configFile{p.nodeConf(), p.lockFile("node.conf"), "node.conf", sampleNodeConf, nodeKeys, func(_, after string) error {
		_, err := parseConfig("node.conf", after)
		return err
	}}
}

// update replaces the text of the file under its lock, if the result is valid.
func (f configFile) update(change func(now string) (string, error)) error {
	held, err := lock(f.lock)
	if err != nil {
		return err
	}
	defer held.unlock()
	text, _, err := readRegular(f.path, iniSizeLimit)
	missing := errors.Is(err, os.ErrNotExist) && f.initial != ""
	if missing {
		text, err = []byte(f.initial), os.MkdirAll(filepath.Dir(f.path), 0o700)
	}
	if err != nil {
		return err
	}
	after, err := change(string(text))
	if err != nil || after == string(text) && !missing {
		return err
	}
	if err := f.check(string(text), after); err != nil {
		return err
	}
	return writeFile(f.path, []byte(after), 0o600)
}

// edit changes single parameters.
func (f configFile) edit(change func(doc *ini) error) error {
	return f.update(func(now string) (string, error) {
		doc, err := parseINI(f.name, now)
		if err != nil {
			return "", err
		}
		err = change(doc)
		return doc.String(), err
	})
}

// ensureConfig makes node.conf where there is none, and a secret where there
// is none in it, at the first start. Later, a file or a secret that is gone is
// an error: another secret would take the node out of its cluster.
func ensureConfig(p paths) (made bool, err error) {
	err = nodeConfFile(p).edit(func(doc *ini) error {
		if doc.find("cluster", "secret", "") >= 0 {
			return nil
		}
		if _, err := os.Stat(p.goodConf()); err == nil {
			return fmt.Errorf("node.conf: cluster.secret is gone; put it back (%s has the last good text), or remove that file to have a new one made", p.goodConf())
		}
		var secret [32]byte
		rand.Read(secret[:]) // never fails: crypto/rand ends the process instead
		made = true
		return doc.set("cluster", "secret", "", hex.EncodeToString(secret[:]))
	})
	return made && err == nil, err
}
