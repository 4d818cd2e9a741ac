// service.go: what a service is (design.md §6): its file, its resources, and
// the rules by which the states of resources make those of instances and
// services. It starts nothing.

package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// service is <svcname>.conf as one node sees it. It is immutable.
type service struct {
	name          string
	doc           *ini
	nodes         []string // in the order of preference
	orchestrate   string   // ha, start, no
	monitorAction string   // none, switch, freezestop
	resources     []*resource
}

// resource is one section of the file. Timeouts that are not given are 0; the
// driver knows better then.
type resource struct {
	rid, kind                          string // app#1, app
	restart                            int
	restartDelay, checkInterval        time.Duration
	timeout, startTimeout, stopTimeout time.Duration
	monitor, optional, disable         bool

	exec, start, stop, check, script []string // app
	provider, agent                  string   // ocf
	params                           []param  // ocf
	unit                             string   // systemd
}

// param is a key of an OCF resource that is for its agent.
type param struct{ name, value string }

// defaultTimeout is for resources whose file and agent give none.
const defaultTimeout = time.Minute

// serviceKeys are the keys of service files. A resource's section may hold
// those of its kind and those that all kinds have; an ocf section, its
// agent's parameters as well.
var serviceKeys = makeServiceKeys()

func makeServiceKeys() keyTable {
	keys := keyTable{
		{"DEFAULT", "nodes", "", parseNames, true},
		{"DEFAULT", "orchestrate", "no", parseOneOf("ha", "start", "no"), true},
		{"DEFAULT", "monitor_action", "none", parseOneOf("none", "switch", "freezestop"), true},
		{"app#", "exec", "", parseCommand, false},
		{"app#", "start", "", parseCommand, false},
		{"app#", "stop", "", parseCommand, false},
		{"app#", "check", "", parseCommand, false},
		{"app#", "script", "", parseCommand, false},
		{"ocf#", "agent", "", parseAgent, true},
		{"systemd#", "unit", "", parseText, false},
	}
	for _, kind := range []string{"app#", "ocf#", "systemd#"} {
		keys = append(keys,
			keySpec{kind, "restart", "0", parseCount(0, 1000), false},
			keySpec{kind, "restart_delay", "1s", parseDelay, false},
			keySpec{kind, "timeout", "", parseDuration, false},
			keySpec{kind, "start_timeout", "", parseDuration, false},
			keySpec{kind, "stop_timeout", "", parseDuration, false},
			keySpec{kind, "check_interval", "10s", parseInterval, false},
			keySpec{kind, "monitor", "no", parseBool, false},
			keySpec{kind, "optional", "no", parseBool, false},
			keySpec{kind, "disable", "no", parseBool, false},
		)
	}
	return keys
}

// parseDelay reads a duration that may be 0.
func parseDelay(s string) (any, error) {
	if s == "0" || s == "0s" {
		return time.Duration(0), nil
	}
	return parseDuration(s)
}

// parseInterval reads the time between checks, each of which is a process.
func parseInterval(s string) (any, error) {
	d, err := parseDuration(s)
	if err == nil && d.(time.Duration) < checkIntervalLeast {
		err = fmt.Errorf("%q is less than %s", s, checkIntervalLeast)
	}
	return d, err
}

func parseBool(s string) (any, error) {
	switch strings.ToLower(s) {
	case "yes", "true", "on", "1":
		return true, nil
	case "no", "false", "off", "0":
		return false, nil
	}
	return nil, fmt.Errorf("%q is neither yes nor no", s)
}

// parseAgent reads provider:Type, as in heartbeat:IPaddr2.
func parseAgent(s string) (any, error) {
	provider, agent, found := strings.Cut(strings.TrimPrefix(s, "ocf:"), ":")
	if !found || !namePattern.MatchString(provider) || !namePattern.MatchString(agent) {
		return nil, fmt.Errorf("%q is not an agent, written provider:Type as in heartbeat:IPaddr2", s)
	}
	return [2]string{provider, agent}, nil
}

// checkServiceName: a service is a file beside node.conf.
func checkServiceName(name string) error {
	if _, err := parseName(name); err != nil {
		return fmt.Errorf("not a service's name: %w", err)
	}
	if name == "node" {
		return errors.New(`a service cannot be called "node": node.conf is the node's own file`)
	}
	return nil
}

// parseService reads the text of a service's file for node. Without `nodes`,
// all members of the cluster may run the service. The error joins one error a
// faulty line.
func parseService(name, text, node string, members []string) (*service, error) {
	if err := checkServiceName(name); err != nil {
		return nil, err
	}
	doc, err := parseINI(name+".conf", text)
	if err != nil {
		return nil, err
	}
	s := &service{name: name, doc: doc, nodes: members}
	var faults []error
	for i, line := range doc.lines {
		if header := sectionOf(line); header != "" {
			if fault := s.addSection(header); fault != nil {
				faults = append(faults, fmt.Errorf("%s:%d: %w", doc.name, i+1, fault))
			}
		}
		if line.key == "" || line.section != "DEFAULT" && s.resource(line.section) == nil {
			continue // its section was refused already
		}
		if fault := checkServiceLine(line); fault != nil {
			faults = append(faults, fmt.Errorf("%s:%d: %w", doc.name, i+1, fault))
		}
	}
	return s, errors.Join(append(faults, s.fill(node)...)...)
}

// sectionOf returns the name of the section that a line begins.
func sectionOf(line iniLine) string {
	if text := strings.TrimSpace(line.raw); strings.HasPrefix(text, "[") {
		return line.section
	}
	return ""
}

// addSection makes the resource that a section describes.
func (s *service) addSection(section string) error {
	kind, number, found := strings.Cut(section, "#")
	switch {
	case section == "DEFAULT" || s.resource(section) != nil:
		return nil
	case !found || !namePattern.MatchString(number) || drivers[kind] == nil:
		return fmt.Errorf("unknown section [%s]; there are [DEFAULT], and for resources [app#NAME], [ocf#NAME], [systemd#NAME]", section)
	}
	s.resources = append(s.resources, &resource{rid: section, kind: kind})
	return nil
}

func checkServiceLine(line iniLine) error {
	spec := serviceKeys.find(line.section, line.key)
	name := parameter(line.section, line.key, line.scope)
	switch {
	case spec == nil && strings.HasPrefix(line.section, "ocf#"):
		return nil // a parameter of the agent, which judges it (ocf.go)
	case spec == nil:
		return fmt.Errorf("unknown key %s%s", name, serviceKeys.didYouMean(line.section, line.key))
	case spec.unscoped && line.scope != "":
		return fmt.Errorf("%s: this key is the same on all nodes; remove @%s", name, line.scope)
	}
	if _, err := spec.parse(line.value()); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// fill sets the fields from what the lines say for node.
func (s *service) fill(node string) (faults []error) {
	if nodes, ok := s.key("DEFAULT", "nodes", node).([]string); ok {
		s.nodes = nodes
	}
	s.orchestrate = s.key("DEFAULT", "orchestrate", node).(string)
	s.monitorAction = s.key("DEFAULT", "monitor_action", node).(string)
	for _, r := range s.resources {
		get := func(key string) any { return s.key(r.rid, key, node) }
		duration := func(key string) time.Duration { d, _ := get(key).(time.Duration); return d }
		words := func(key string) []string { w, _ := get(key).([]string); return w }
		r.restart, r.restartDelay, r.checkInterval = get("restart").(int), duration("restart_delay"), duration("check_interval")
		r.timeout, r.startTimeout, r.stopTimeout = duration("timeout"), duration("start_timeout"), duration("stop_timeout")
		r.monitor, r.optional, r.disable = get("monitor").(bool), get("optional").(bool), get("disable").(bool)
		switch r.kind {
		case "app":
			r.exec, r.start, r.stop, r.check, r.script = words("exec"), words("start"), words("stop"), words("check"), words("script")
		case "ocf":
			if agent, ok := get("agent").([2]string); ok {
				r.provider, r.agent = agent[0], agent[1]
			}
			r.params = s.paramsOf(r.rid, node)
		case "systemd":
			r.unit, _ = get("unit").(string)
		}
		if fault := r.shape(); fault != nil && s.complete(r.rid) {
			faults = append(faults, fmt.Errorf("%s: %w", s.at(r.rid, ""), fault))
		}
	}
	if len(s.resources) == 0 {
		faults = append(faults, fmt.Errorf("%s: the service has no resource; add a section such as [app#1] with exec = /path/to/program", s.doc.name))
	}
	return faults
}

// key returns what a key means on node, as its parse function made it; what
// does not parse has been said, and means the default.
func (s *service) key(section, key, node string) any {
	spec := serviceKeys.find(section, key)
	if text, _, ok := s.doc.value(section, key, node); ok {
		if v, err := spec.parse(text); err == nil {
			return v
		}
	}
	return spec.parsed(spec.initial)
}

// complete tells whether every line of a section was understood: what seems to
// be missing in it may be what is mistyped.
func (s *service) complete(section string) bool {
	return !slices.ContainsFunc(s.doc.lines, func(line iniLine) bool {
		return line.section == section && line.key != "" && checkServiceLine(line) != nil
	})
}

// paramsOf are the keys of an ocf section that agentd does not know itself.
func (s *service) paramsOf(rid, node string) (params []param) {
	for _, line := range s.doc.lines {
		if line.section != rid || line.key == "" || serviceKeys.find(rid, line.key) != nil {
			continue
		}
		if slices.ContainsFunc(params, func(p param) bool { return p.name == line.key }) {
			continue
		}
		if text, _, ok := s.doc.value(rid, line.key, node); ok {
			params = append(params, param{line.key, text})
		}
	}
	return params
}

// shape finds keys that are missing, or do not go together.
func (r *resource) shape() error {
	given := func(words []string) int { return min(len(words), 1) }
	switch {
	case r.kind == "ocf" && r.agent == "":
		return errors.New("agent is missing, such as agent = heartbeat:IPaddr2")
	case r.kind == "systemd" && r.unit == "":
		return errors.New("unit is missing, such as unit = nginx.service")
	case r.kind != "app":
		return nil
	case given(r.exec)+given(r.start)+given(r.script) != 1:
		return errors.New("needs exactly one of exec (a program in the foreground), start (with stop and check), and script")
	case r.start != nil && (r.stop == nil || r.check == nil):
		return errors.New("start needs stop and check too: agentd must be able to end it, and to tell whether it runs")
	case r.script != nil && (r.stop != nil || r.check != nil):
		return errors.New("script is called with start, stop and status; stop and check do not go with it")
	}
	return nil
}

// at tells where the file says something, for messages: the key's line, else
// the section's.
func (s *service) at(section, key string) string {
	for i, line := range s.doc.lines {
		if line.section == section && (key == "" && sectionOf(line) != "" || key != "" && line.key == key) {
			return strings.TrimSuffix(fmt.Sprintf("%s:%d: %s.%s", s.doc.name, i+1, section, key), ".")
		}
	}
	if key != "" {
		return s.at(section, "")
	}
	return s.doc.name + ": " + section
}

// resource returns the one that rid names, or nil.
func (s *service) resource(rid string) *resource {
	for _, r := range s.resources {
		if r.rid == rid {
			return r
		}
	}
	return nil
}

// servicePath is a service's file; its name must be a valid one.
func (p paths) servicePath(name string) string { return filepath.Join(p.etc, name+".conf") }

// loadService reads a service's file.
func loadService(p paths, c *config, name string) (*service, error) {
	if err := checkServiceName(name); err != nil {
		return nil, err
	}
	text, _, err := readRegular(p.servicePath(name), iniSizeLimit)
	if errors.Is(err, os.ErrNotExist) {
		known, _ := listServices(p) // only to be helpful
		return nil, fmt.Errorf("there is no service %q%s (svcmgr ls lists those there are)", name, nearest(name, known))
	}
	if err != nil {
		return nil, err
	}
	return parseService(name, string(text), c.node, c.members())
}

// listServices returns the names of the service files, sorted.
func listServices(p paths) ([]string, error) {
	entries, err := os.ReadDir(p.etc)
	if err != nil {
		return nil, fmt.Errorf("cannot list the services: %w", err)
	}
	var names []string
	for _, entry := range entries {
		if name, found := strings.CutSuffix(entry.Name(), ".conf"); found && checkServiceName(name) == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names) // a-b.conf comes before a.conf, and a before a-b
	return names, nil
}

// checksum tells one version of a file from others: SHA-256, in hex.
func checksum(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// runFaults tells all that would keep the service from running on node, each
// with its line.
func (s *service) runFaults(c *config, node string) (faults []error) {
	for _, n := range s.nodes {
		if !c.isMember(n) {
			faults = append(faults, fmt.Errorf("%s: %q is not in cluster.nodes (%s)%s", s.at("DEFAULT", "nodes"), n, strings.Join(c.members(), " "), nearest(n, c.members())))
		}
	}
	if !slices.Contains(s.nodes, node) {
		return faults // what it needs is elsewhere
	}
	mounted := false // an earlier resource may bring the program's file system
	for _, r := range s.resources {
		if !r.disable {
			faults = append(faults, drivers[r.kind].faults(s, r, mounted)...)
		}
		mounted = mounted || r.kind != "app"
	}
	return faults
}

// ---- The states of resources, and what they make together -------------------

// status is the state of a resource, an instance or a service.
type status string

const (
	statusUp    status = "up"
	statusDown  status = "down"
	statusWarn  status = "warn"
	statusNA    status = "n/a"   // nothing to tell: disabled, or without resources
	statusUndef status = "undef" // not known yet
)

// merge adds up two states as OpenSVC does: n/a and undef give way to what is
// known, equal states stay, and all else is warn.
func (s status) merge(other status) status {
	switch {
	case s == other, other == statusUndef, other == statusNA && s != statusUndef:
		return s
	case s == statusUndef, s == statusNA:
		return other
	}
	return statusWarn
}

// instanceStatus adds up an instance's resources: avail those that are not
// optional, overall all of them.
func instanceStatus(resources []*resource, of func(rid string) status) (avail, overall status) {
	avail, overall = statusUndef, statusUndef
	if !slices.ContainsFunc(resources, func(r *resource) bool { return !r.optional }) {
		avail = statusNA // as available as it can be
	}
	for _, r := range resources {
		state := of(r.rid)
		if r.disable {
			state = statusNA
		}
		if !r.optional {
			avail = avail.merge(state)
		}
		overall = overall.merge(state)
	}
	return avail, overall
}

// serviceStatus adds up the instances of a failover service: up where one is,
// warn where one warns or two are up.
func serviceStatus(instances []status) status {
	count := map[status]int{}
	for _, s := range instances {
		count[s]++
	}
	switch n := len(instances); {
	case count[statusNA] == n:
		return statusNA
	case count[statusWarn] > 0, count[statusUp] > 1:
		return statusWarn
	case count[statusUp] == 1:
		return statusUp
	case count[statusUndef]+count[statusNA] == n:
		return statusUndef
	}
	return statusDown
}

// serviceFrozen adds up the instances' flags.
func serviceFrozen(instances []bool) string {
	switch {
	case len(instances) == 0:
		return "n/a"
	case !slices.Contains(instances, false):
		return "frozen"
	case !slices.Contains(instances, true):
		return "thawed"
	}
	return "mixed"
}
