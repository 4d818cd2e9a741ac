// metadata.go: what OCF agents say of themselves when they are called with
// meta-data: the parameters that they take, and how long their actions may
// last. It is asked once for each version of an agent, and used to find
// mistakes in service files before they matter.

package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An agent that hangs or prints without end costs this much.
const (
	metadataTimeout = 10 * time.Second
	metadataLimit   = 1 << 20
)

// ocfMetadata is what agentd uses of an agent's metadata.
type ocfMetadata struct {
	parameters []ocfParameter
	timeouts   map[string]time.Duration // by action; those that are sensible
}

type ocfParameter struct {
	name             string
	required, unique bool
	kind             string // boolean, integer, string, …
	initial          string
}

// cachedMetadata is what one version of an agent said.
type cachedMetadata struct {
	modified time.Time
	size     int64
	*ocfMetadata
}

// metadata returns that of the agent at path. Two callers at once may both ask
// the agent. What failed is tried again: a person may have mended it.
func (d *ocfDriver) metadata(ctx context.Context, path string) (*ocfMetadata, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	c, ok := d.cache[path]
	d.mu.Unlock()
	if ok && c.modified.Equal(info.ModTime()) && c.size == info.Size() {
		return c.ocfMetadata, nil
	}
	m, err := readMetadata(ctx, d.environment(), path)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cache == nil || len(d.cache) >= ocfLimit {
		d.cache = map[string]cachedMetadata{}
	}
	d.cache[path] = cachedMetadata{info.ModTime(), info.Size(), m}
	return m, nil
}

func readMetadata(ctx context.Context, env []string, path string) (*ocfMetadata, error) {
	ctx, cancel := context.WithTimeout(ctx, metadataTimeout)
	defer cancel()
	stdout, stderr := &boundedBuffer{limit: metadataLimit}, &boundedBuffer{limit: 4096}
	exit, err := runCommandWith(ctx, env, []string{path, "meta-data"}, stdout, stderr)
	text, dropped := stdout.text()
	said, _ := stderr.text()
	switch {
	case err != nil:
		return nil, err
	case exit != 0:
		return nil, fmt.Errorf("%s meta-data: %s", path, ocfReason(commandResult{exit, said}))
	case dropped > 0:
		return nil, fmt.Errorf("%s meta-data prints more than %d bytes", path, metadataLimit)
	}
	m, err := parseMetadata([]byte(text))
	if err != nil {
		return nil, fmt.Errorf("%s meta-data: %w", path, err)
	}
	return m, nil
}

// parseMetadata reads an agent's XML. It is lenient where agents are: unknown
// elements, odd times and kinds are passed over.
func parseMetadata(text []byte) (*ocfMetadata, error) {
	var doc struct {
		XMLName    xml.Name `xml:"resource-agent"`
		Parameters []struct {
			Name     string `xml:"name,attr"`
			Required string `xml:"required,attr"`
			Unique   string `xml:"unique,attr"`
			Content  struct {
				Type    string `xml:"type,attr"`
				Default string `xml:"default,attr"`
			} `xml:"content"`
		} `xml:"parameters>parameter"`
		Actions []struct {
			Name    string `xml:"name,attr"`
			Timeout string `xml:"timeout,attr"`
		} `xml:"actions>action"`
	}
	if len(bytes.TrimSpace(text)) == 0 {
		return nil, errors.New("nothing is printed")
	}
	if err := xml.Unmarshal(text, &doc); err != nil {
		return nil, fmt.Errorf("not the XML of an agent: %w", err)
	}
	m := &ocfMetadata{timeouts: map[string]time.Duration{}}
	for _, p := range doc.Parameters {
		if p.Name != "" && m.parameter(p.Name) == nil {
			m.parameters = append(m.parameters, ocfParameter{p.Name, ocfTrue[p.Required], ocfTrue[p.Unique], p.Content.Type, p.Content.Default})
		}
	}
	for _, a := range doc.Actions { // some have several monitors, the deeper the longer
		if timeout := parseOCFTime(a.Timeout); timeout > m.timeouts[a.Name] {
			m.timeouts[a.Name] = timeout
		}
	}
	return m, nil
}

var ocfTimePattern = regexp.MustCompile(`^(\d{1,9})(|us|usec|ms|msec|s|sec|m|min|h|hr)$`)

var ocfTimeUnits = map[string]time.Duration{
	"": time.Second, "us": time.Microsecond, "usec": time.Microsecond, "ms": time.Millisecond, "msec": time.Millisecond,
	"s": time.Second, "sec": time.Second, "m": time.Minute, "min": time.Minute, "h": time.Hour, "hr": time.Hour,
}

// parseOCFTime reads `20s`, `20`, `1min`; 0 stands for what is no sensible
// timeout.
func parseOCFTime(text string) time.Duration {
	match := ocfTimePattern.FindStringSubmatch(strings.ToLower(strings.ReplaceAll(text, " ", "")))
	if match == nil {
		return 0
	}
	n, _ := strconv.Atoi(match[1]) // nine digits, of hours: no overflow
	if d := time.Duration(n) * ocfTimeUnits[match[2]]; d >= time.Millisecond && d <= 24*time.Hour {
		return d
	}
	return 0
}

func (m *ocfMetadata) parameter(name string) *ocfParameter {
	for i := range m.parameters {
		if m.parameters[i].name == name {
			return &m.parameters[i]
		}
	}
	return nil
}

// everyAgents are parameters of the shell library that agents are built on;
// their metadata does not name them.
var everyAgents = []string{"OCF_CHECK_LEVEL", "trace_ra", "trace_dir", "trace_file"}

// agentParameter is the agent's name for a key. The prefix is for parameters
// that are called as a key of agentd is: OCF_RESKEY_stop_timeout.
func agentParameter(key string) string { return strings.TrimPrefix(key, "OCF_RESKEY_") }

// given is what the file says for an agent's parameter.
func (r *resource) given(name string) string {
	for _, p := range r.params {
		if agentParameter(p.name) == name {
			return p.value
		}
	}
	return ""
}

// faults judges what the file gives an agent.
func (m *ocfMetadata) faults(s *service, r *resource) (faults []error) {
	agent := r.provider + ":" + r.agent
	var names []string
	for _, p := range m.parameters {
		names = append(names, p.name)
		if p.required && p.initial == "" && r.given(p.name) == "" {
			faults = append(faults, fmt.Errorf("%s: %s requires the parameter %s; add %s = …", s.at(r.rid, "agent"), agent, p.name, p.name))
		}
	}
	for _, p := range r.params {
		name := agentParameter(p.name)
		known := m.parameter(name)
		if known == nil && !slices.Contains(everyAgents, name) {
			hint := nearest(name, append(serviceKeys.keysOf("ocf#"), names...))
			faults = append(faults, fmt.Errorf("%s: not a parameter of %s (%s)%s", s.at(r.rid, p.name), agent, strings.Join(names, " "), hint))
		} else if known != nil {
			if err := known.check(p.value); err != nil {
				faults = append(faults, fmt.Errorf("%s: %w", s.at(r.rid, p.name), err))
			}
		}
	}
	if twin := m.twin(s, r); twin != nil {
		faults = append(faults, fmt.Errorf("%s: the same as %s: they agree in all parameters that %s wants unique", s.at(r.rid, ""), twin.rid, agent))
	}
	return faults
}

// twin finds an earlier resource that differs in no unique parameter. One of
// several may be equal: two databases of one user.
func (m *ocfMetadata) twin(s *service, r *resource) *resource {
	for _, other := range s.resources {
		if other == r {
			return nil
		}
		equal := other.provider == r.provider && other.agent == r.agent && !other.disable
		compared := false
		for _, p := range m.parameters {
			if value := r.given(p.name); p.unique && equal {
				equal = value == other.given(p.name)
				compared = compared || value != ""
			}
		}
		if equal && compared {
			return other
		}
	}
	return nil
}

// ocfTrue and ocfFalse are the words that agents agree on. Others, such as
// Yes, they silently take for false.
var (
	ocfTrue  = map[string]bool{"yes": true, "true": true, "1": true, "YES": true, "TRUE": true, "True": true, "ja": true, "on": true, "ON": true}
	ocfFalse = map[string]bool{"no": true, "false": true, "0": true, "NO": true, "FALSE": true, "False": true, "nein": true, "off": true, "OFF": true}

	ocfInteger = regexp.MustCompile(`^[+-]?[0-9]+$`)
)

func isOCFBoolean(s string) bool { return ocfTrue[s] || ocfFalse[s] }

// check refuses a value of another type than the parameter has, as far as its
// metadata can be trusted: some call an integer what begins as `1s`.
func (p *ocfParameter) check(value string) error {
	fits := func(string) bool { return true }
	wanted := ""
	switch p.kind {
	case "boolean":
		fits, wanted = isOCFBoolean, "not one of true, false, yes, no, on, off, 1, 0"
	case "integer":
		fits, wanted = ocfInteger.MatchString, "not an integer"
	}
	if value == "" || fits(value) || p.initial != "" && !fits(p.initial) {
		return nil
	}
	return fmt.Errorf("%q is %s, as %s must be", value, wanted, p.name)
}
