package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// parsedService parses a file that must have no fault, for node n1 of n1, n2.
func parsedService(t *testing.T, text string) *service {
	t.Helper()
	s, err := parseService("svc", text, "n1", []string{"n1", "n2"})
	if err != nil {
		t.Fatalf("parseService: %v\n%s", err, text)
	}
	return s
}

func TestServiceFile(t *testing.T) {
	t.Parallel()
	s := parsedService(t, `# ours
[DEFAULT]
nodes = n2 n1
orchestrate = ha
monitor_action = freezestop

[ocf#ip]
agent = ocf:heartbeat:IPaddr2
ip = 10.0.0.10        # a parameter of the agent
ip@n2 = 10.0.0.11
nic@n2 = eth1
timeout = 5s

[app#web]
exec = /usr/bin/webd --title "two words"
restart = 2
restart@n2 = 9
restart_delay = 500ms
start_timeout = 2m
stop_timeout = 30
check_interval = 3s
monitor = yes
disable@n2 = yes

[app#db]
start = /bin/db start
stop = /bin/db stop
check = /bin/db check
optional = on

[app#old]
script = /etc/init.d/old
disable = true
[systemd#log]
unit = log.service
[app#web]
check = /bin/curl localhost
`)
	if s.orchestrate != "ha" || s.monitorAction != "freezestop" || !slices.Equal(s.nodes, []string{"n2", "n1"}) {
		t.Errorf("DEFAULT is %s, %s, %v", s.orchestrate, s.monitorAction, s.nodes)
	}
	var rids []string
	for _, r := range s.resources {
		rids = append(rids, r.rid)
	}
	if got := strings.Join(rids, " "); got != "ocf#ip app#web app#db app#old systemd#log" {
		t.Errorf("the resources are %s, not in the order of the file, each once", got)
	}
	for rid, want := range map[string]resource{
		"ocf#ip":      {kind: "ocf", provider: "heartbeat", agent: "IPaddr2", params: []param{{"ip", "10.0.0.10"}}, timeout: 5 * time.Second},
		"app#web":     {kind: "app", exec: []string{"/usr/bin/webd", "--title", "two words"}, check: []string{"/bin/curl", "localhost"}, restart: 2, restartDelay: 500 * time.Millisecond, startTimeout: 2 * time.Minute, stopTimeout: 30 * time.Second, checkInterval: 3 * time.Second, monitor: true},
		"app#db":      {kind: "app", start: []string{"/bin/db", "start"}, stop: []string{"/bin/db", "stop"}, check: []string{"/bin/db", "check"}, optional: true},
		"app#old":     {kind: "app", script: []string{"/etc/init.d/old"}, disable: true},
		"systemd#log": {kind: "systemd", unit: "log.service"},
	} {
		want.rid = rid
		if want.restartDelay == 0 {
			want.restartDelay = time.Second
		}
		if want.checkInterval == 0 {
			want.checkInterval = 10 * time.Second
		}
		if got := fmt.Sprintf("%+v", *s.resource(rid)); got != fmt.Sprintf("%+v", want) {
			t.Errorf("%s\nis   %s\nnot  %+v", rid, got, want)
		}
	}
	other, err := parseService("svc", s.doc.String(), "n2", []string{"n1", "n2"})
	if err != nil {
		t.Fatal(err)
	}
	if web := other.resource("app#web"); web.restart != 9 || !web.disable {
		t.Errorf("on n2 app#web is %+v", web)
	}
	if ip := other.resource("ocf#ip"); fmt.Sprint(ip.params) != "[{ip 10.0.0.11} {nic eth1}]" {
		t.Errorf("on n2 the parameters are %v", ip.params)
	}
	if s.resource("app#nosuch") != nil {
		t.Error("there is a resource that is not in the file")
	}
}

func TestServiceDefaults(t *testing.T) {
	t.Parallel()
	s := parsedService(t, "[app#1]\nexec = /a\n")
	if s.orchestrate != "no" || s.monitorAction != "none" || !slices.Equal(s.nodes, []string{"n1", "n2"}) {
		t.Errorf("without DEFAULT it is %s, %s, %v", s.orchestrate, s.monitorAction, s.nodes)
	}
	for _, spec := range serviceKeys {
		spec.parsed(spec.initial) // panics on a default that does not parse
	}
}

func TestServiceFaults(t *testing.T) {
	t.Parallel()
	const good = "[app#1]\nexec = /a\n"
	tests := []struct {
		name, text string
		want       []string // how the lines of the error begin; "…" stands for anything between
	}{
		{"empty", "", []string{"svc.conf: the service has no resource; add a section such as [app#1]"}},
		{"only DEFAULT", "[DEFAULT]\norchestrate = ha\n", []string{"svc.conf: the service has no resource"}},
		{"no INI", good + "nonsense\n", []string{"svc.conf:3: neither"}},
		{"set twice", good + "exec = /b\n", []string{"svc.conf:3: app#1.exec is already set in line 2"}},
		{"set twice in repeated sections", good + "[app#2]\nexec = /b\n[app#1]\nexec = /c\n", []string{"svc.conf:6: app#1.exec is already set in line 2"}},
		{"unknown section", good + "[fs#1]\ndev = /x\n", []string{"svc.conf:3: unknown section [fs#1]; there are [DEFAULT]"}},
		{"section without a name", good + "[app#]\nexec = /b\n", []string{"svc.conf:3: unknown section [app#]"}},
		{"section with a bad name", good + "[app#../x]\nexec = /b\n", []string{"svc.conf:3: unknown section [app#../x]"}},
		{"mistyped key", good + "restrat = 2\n", []string{"svc.conf:3: unknown key app#1.restrat; did you mean app#1.restart?"}},
		{"mistyped key, scoped", good + "timout@n2 = 2\n", []string{"svc.conf:3: unknown key app#1.timout@n2; did you mean app#1.timeout?"}},
		{"key of another kind", good + "unit = x.service\n", []string{"svc.conf:3: unknown key app#1.unit"}},
		{"mistyped key in DEFAULT", "[DEFAULT]\norchestrat = ha\n" + good, []string{"svc.conf:2: unknown key DEFAULT.orchestrat; did you mean DEFAULT.orchestrate?"}},
		{"orchestrate", "[DEFAULT]\norchestrate = yes\n" + good, []string{`svc.conf:2: DEFAULT.orchestrate: "yes" is none of ha, start, no`}},
		{"monitor_action", "[DEFAULT]\nmonitor_action = reboot\n" + good, []string{`svc.conf:2: DEFAULT.monitor_action: "reboot" is none of none, switch, freezestop`}},
		{"nodes", "[DEFAULT]\nnodes = n1 n1\n" + good, []string{`svc.conf:2: DEFAULT.nodes: "n1" is listed twice`}},
		{"scoped nodes", "[DEFAULT]\nnodes@n1 = n1\n" + good, []string{"svc.conf:2: DEFAULT.nodes@n1: this key is the same on all nodes; remove @n1"}},
		{"scoped agent", "[ocf#1]\nagent@n1 = heartbeat:IPaddr2\nagent = heartbeat:IPaddr2\n", []string{"svc.conf:2: ocf#1.agent@n1: this key is the same on all nodes"}},
		{"restart", good + "restart = -1\n", []string{`svc.conf:3: app#1.restart: "-1" is not a number from 0 to 1000`}},
		{"duration", good + "restart_delay = soon\n", []string{`svc.conf:3: app#1.restart_delay: "soon" is not a duration`}},
		{"no duration", good + "check_interval = 0\n", []string{`svc.conf:3: app#1.check_interval: "0" is not a duration above 0`}},
		{"yes and no", good + "monitor = maybe\n", []string{`svc.conf:3: app#1.monitor: "maybe" is neither yes nor no`}},
		{"for another node", good + "restart@n9 = x\n", []string{`svc.conf:3: app#1.restart@n9: "x" is not a number`}},
		{"quotes", "[app#1]\nexec = /a 'b\n", []string{"svc.conf:2: app#1.exec: cannot split"}},
		{"empty command", "[app#1]\nexec =\n", []string{"svc.conf:2: app#1.exec: the command is empty"}},
		{"agent", "[ocf#1]\nagent = IPaddr2\n", []string{`svc.conf:2: ocf#1.agent: "IPaddr2" is not an agent, written provider:Type`}},
		{"agent with a path", "[ocf#1]\nagent = heartbeat:../../x\n", []string{`svc.conf:2: ocf#1.agent: "heartbeat:../../x" is not an agent`}},
		{"no agent", "[app#1]\nexec = /a\n[ocf#1]\nip = 1\n", []string{"svc.conf:3: ocf#1: agent is missing, such as"}},
		{"no unit", "[systemd#1]\nrestart = 1\n", []string{"svc.conf:1: systemd#1: unit is missing, such as"}},
		{"empty unit", "[systemd#1]\nunit =\n", []string{"svc.conf:1: systemd#1: unit is missing"}},
		{"nothing to run", "[app#1]\nrestart = 1\n", []string{"svc.conf:1: app#1: needs exactly one of exec"}},
		{"two ways", good + "script = /b\n", []string{"svc.conf:1: app#1: needs exactly one of exec"}},
		{"start alone", "[app#1]\nstart = /a\n", []string{"svc.conf:1: app#1: start needs stop and check too"}},
		{"start without check", "[app#1]\nstart = /a\nstop = /b\n", []string{"svc.conf:1: app#1: start needs stop and check too"}},
		{"script with check", "[app#1]\nscript = /a\ncheck = /b\n", []string{"svc.conf:1: app#1: script is called with"}},
		{"only on another node", "[app#1]\nexec@n2 = /a\n", []string{"svc.conf:1: app#1: needs exactly one of exec"}},
		// What seems to be missing is what was mistyped: one fault, not two.
		{"mistyped exec", "[app#1]\nexce = /a\n", []string{"svc.conf:2: unknown key app#1.exce; did you mean app#1.exec?"}},
		{"each fault", "[DEFAULT]\norchestrate = x\n[app#1]\nexec = /a\nrestart = x\n[app#2]\n", []string{"svc.conf:2: ", "svc.conf:5: ", "svc.conf:6: app#2: needs"}},
	}
	for _, test := range tests {
		_, err := parseService("svc", test.text, "n1", []string{"n1", "n2"})
		if err == nil {
			t.Errorf("%s: no error, want %q", test.name, test.want)
			continue
		}
		lines := strings.Split(err.Error(), "\n")
		if len(lines) != len(test.want) {
			t.Errorf("%s: error = %q, want %q", test.name, lines, test.want)
			continue
		}
		for i, want := range test.want {
			if !strings.HasPrefix(lines[i], want) {
				t.Errorf("%s: error = %q\nwant     %q", test.name, lines[i], want)
			}
		}
	}
}

func TestServiceNames(t *testing.T) {
	t.Parallel()
	for name, ok := range map[string]bool{
		"web": true, "web.prod-2": true, "1": true, strings.Repeat("x", 64): true,
		"": false, "node": false, ".hidden": false, "-s": false, "a/b": false, "..": false, "a b": false, strings.Repeat("x", 65): false, "é": false,
	} {
		if err := checkServiceName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := parseService("node", "[app#1]\nexec = /a\n", "n1", nil); err == nil || !strings.Contains(err.Error(), "node.conf") {
		t.Errorf("a service called node: %v", err)
	}
}

func TestServiceAt(t *testing.T) {
	t.Parallel()
	s := parsedService(t, "# x\n[app#1]\nexec = /a\n\n[app#2]\nexec = /b\n")
	for _, test := range []struct{ section, key, want string }{
		{"app#1", "exec", "svc.conf:3: app#1.exec"},
		{"app#2", "exec", "svc.conf:6: app#2.exec"},
		{"app#2", "", "svc.conf:5: app#2"},
		{"app#2", "restart", "svc.conf:5: app#2"},
		{"DEFAULT", "nodes", "svc.conf: DEFAULT"},
	} {
		if got := s.at(test.section, test.key); got != test.want {
			t.Errorf("%s.%s is at %q, want %q", test.section, test.key, got, test.want)
		}
	}
}

func TestListServices(t *testing.T) {
	t.Parallel()
	p := testFolders(t)
	for _, name := range []string{"node.conf", "web.conf", "a.conf", "a-b.conf", "a.b.conf", ".hidden.conf", "notes.txt", "web.conf.rpmnew", "a b.conf", ".conf"} {
		writeText(t, p.etc+"/"+name, "")
	}
	names, err := listServices(p)
	if got := strings.Join(names, " "); err != nil || got != "a a-b a.b web" {
		t.Errorf("the services are %q, %v; want them sorted, without node.conf and what is none", got, err)
	}
	p.etc += "/nosuch"
	if _, err := listServices(p); err == nil || !strings.HasPrefix(err.Error(), "cannot list the services: ") {
		t.Errorf("a folder that is not there: %v", err)
	}
}

func TestLoadService(t *testing.T) {
	t.Parallel()
	p := testFolders(t)
	c := parsedConfig(t, "")
	writeText(t, p.servicePath("web"), "[app#1]\nexec = /a\n")
	if s, err := loadService(p, c, "web"); err != nil || s.name != "web" || !slices.Equal(s.nodes, []string{"n1"}) {
		t.Errorf("web is %+v, %v", s, err)
	}
	if _, err := loadService(p, c, "wbe"); err == nil || !strings.Contains(err.Error(), `no service "wbe"; did you mean web?`) {
		t.Errorf("a mistyped name: %v", err)
	}
	if _, err := loadService(p, c, "../node"); err == nil || !strings.Contains(err.Error(), "not a service's name") {
		t.Errorf("a name with a path: %v", err)
	}
}

func TestStatusMerge(t *testing.T) {
	t.Parallel()
	tests := []struct{ a, b, want status }{
		{statusUp, statusUp, statusUp},
		{statusDown, statusDown, statusDown},
		{statusWarn, statusWarn, statusWarn},
		{statusNA, statusNA, statusNA},
		{statusUndef, statusUndef, statusUndef},
		{statusUp, statusDown, statusWarn},
		{statusUp, statusWarn, statusWarn},
		{statusDown, statusWarn, statusWarn},
		{statusUp, statusNA, statusUp},
		{statusDown, statusNA, statusDown},
		{statusWarn, statusNA, statusWarn},
		{statusUp, statusUndef, statusUp},
		{statusDown, statusUndef, statusDown},
		{statusWarn, statusUndef, statusWarn},
		{statusNA, statusUndef, statusNA},
	}
	for _, test := range tests {
		if got, back := test.a.merge(test.b), test.b.merge(test.a); got != test.want || back != test.want {
			t.Errorf("%s and %s are %s, and the other way round %s; want %s", test.a, test.b, got, back, test.want)
		}
	}
}

func TestInstanceStatus(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name           string
		states         string // of resources; -x is disabled, +x optional
		avail, overall status
	}{
		{"all up", "up up", statusUp, statusUp},
		{"all down", "down down", statusDown, statusDown},
		{"in part", "up down", statusWarn, statusWarn},
		{"one warns", "up warn", statusWarn, statusWarn},
		{"one is not known", "up undef", statusUp, statusUp},
		{"none is known", "undef undef", statusUndef, statusUndef},
		{"an optional one is down", "up +down", statusUp, statusWarn},
		{"an optional one is up", "down +up", statusDown, statusWarn},
		{"only optional ones", "+up +up", statusNA, statusUp},
		{"only optional ones, not known", "+undef", statusNA, statusUndef},
		{"a disabled one is down", "up -down", statusUp, statusUp},
		{"all disabled", "-up -down", statusNA, statusNA},
	}
	for _, test := range tests {
		var resources []*resource
		states := map[string]status{}
		for i, word := range strings.Fields(test.states) {
			r := &resource{rid: fmt.Sprintf("app#%d", i), disable: word[0] == '-', optional: word[0] == '+'}
			resources = append(resources, r)
			states[r.rid] = status(strings.TrimLeft(word, "+-"))
		}
		avail, overall := instanceStatus(resources, func(rid string) status { return states[rid] })
		if avail != test.avail || overall != test.overall {
			t.Errorf("%s: %s, overall %s; want %s, overall %s", test.name, avail, overall, test.avail, test.overall)
		}
	}
}

func TestServiceStatus(t *testing.T) {
	t.Parallel()
	for instances, want := range map[string]status{
		"": statusNA, "n/a": statusNA, "n/a n/a": statusNA,
		"up": statusUp, "up down": statusUp, "down up n/a": statusUp, "up undef": statusUp,
		"up up": statusWarn, "up up down": statusWarn, "up warn": statusWarn, "down warn": statusWarn, "n/a warn": statusWarn, "warn": statusWarn,
		"down": statusDown, "down down": statusDown, "down n/a": statusDown, "down undef": statusDown,
		"undef": statusUndef, "undef n/a": statusUndef,
	} {
		var states []status
		for _, word := range strings.Fields(instances) {
			states = append(states, status(word))
		}
		if got := serviceStatus(states); got != want {
			t.Errorf("instances %q make a service that is %s, want %s", instances, got, want)
		}
	}
	for want, flags := range map[string][]bool{"n/a": nil, "frozen": {true, true}, "thawed": {false, false}, "mixed": {true, false}} {
		if got := serviceFrozen(flags); got != want {
			t.Errorf("flags %v make a service that is %s, want %s", flags, got, want)
		}
	}
}

func FuzzService(f *testing.F) {
	f.Add("")
	f.Add("[DEFAULT]\nnodes = n1 n2\norchestrate = ha\n[app#1]\nexec = /a 'b c'\nrestart@n1 = 2\n")
	f.Add("[ocf#ip]\nagent = heartbeat:IPaddr2\nip = 1\nip@n2 = 2\n[systemd#x]\nunit = x.service\n")
	f.Add("[app#1]\nscript = /a\n[app#1]\ndisable = yes\n[app#]\n[fs#1]\nx = y\n")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseService("f", text, "n1", []string{"n1"})
		if err != nil {
			for _, line := range strings.Split(err.Error(), "\n") {
				if !strings.HasPrefix(line, "f.conf:") {
					t.Fatalf("an error without the file's name: %q", line)
				}
			}
			return
		}
		if len(s.resources) == 0 || len(s.nodes) == 0 {
			t.Fatal("a service without resources, or without nodes, is valid")
		}
		again, err := parseService("f", s.doc.String(), "n1", []string{"n1"})
		if err != nil || serviceText(again) != serviceText(s) {
			t.Fatalf("read again, the file says something else: %v", err)
		}
	})
}

func serviceText(s *service) string {
	text := fmt.Sprint(s.name, s.nodes, s.orchestrate, s.monitorAction)
	for _, r := range s.resources {
		text += fmt.Sprintf("\n%+v", *r)
	}
	return text
}
