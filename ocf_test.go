package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// driven is an instance whose commands the test sees.
type driven struct {
	*instance
	mu    sync.Mutex
	calls []resourceCommand
}

// newDriven runs commands as an instance does, without logs and memory.
func newDriven(s *service) *driven {
	d := &driven{}
	d.instance = &instance{service: s, up: map[string]bool{}, run: func(ctx context.Context, r *resource, c resourceCommand) (commandResult, error) {
		d.mu.Lock()
		d.calls = append(d.calls, c)
		d.mu.Unlock()
		ctx, cancel := context.WithTimeout(ctx, c.timeout)
		defer cancel()
		output := &boundedBuffer{limit: 64 << 10}
		exit, err := runCommandWith(ctx, c.env, c.argv, output, output)
		text, _ := output.text()
		return commandResult{exit, text}, err
	}}
	return d
}

func (d *driven) last() resourceCommand {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls[len(d.calls)-1]
}

// variable is what a command gets for name.
func variable(c resourceCommand, name string) string {
	for _, v := range slices.Backward(c.env) {
		if value, found := strings.CutPrefix(v, name+"="); found {
			return value
		}
	}
	return ""
}

func testService(t *testing.T, text string) *service {
	t.Helper()
	s, err := parseService("svc1", text, "node1", []string{"node1"})
	must(t, err)
	return s
}

// stockAgents needs the package resource-agents, and a place for what its
// agents remember.
func stockAgents(t *testing.T) *ocfDriver {
	t.Helper()
	if _, err := os.Stat("/usr/lib/ocf/resource.d/heartbeat/Dummy"); err != nil {
		t.Skip("the package resource-agents is not installed")
	}
	t.Setenv("HA_RSCTMP", filepath.Join(t.TempDir(), "rsctmp"))
	t.Setenv("OCF_ROOT", "")
	return &ocfDriver{}
}

func wantStatus(t *testing.T, what string, state, want status, why, wantWhy string) {
	t.Helper()
	if state != want || !strings.Contains(why, wantWhy) || wantWhy == "" && why != "" {
		t.Errorf("%s: %s, %q; want %s, %q", what, state, why, want, wantWhy)
	}
}

func TestStockDummy(t *testing.T) {
	d := stockAgents(t)
	s := testService(t, "[ocf#d]\nagent = heartbeat:Dummy\ncheck_interval = 7s\nstop_timeout = 3s\nfake = a b\n")
	r, in, ctx := s.resources[0], newDriven(s), t.Context()
	if faults := d.faults(s, r, false); faults != nil {
		t.Fatal(faults)
	}
	check := func(what string, want status, interval string) {
		t.Helper()
		state, why := d.check(ctx, in.instance, r)
		wantStatus(t, what, state, want, why, "")
		if got := variable(in.last(), "OCF_RESKEY_CRM_meta_interval"); got != interval || !in.last().quiet {
			t.Errorf("%s: interval %q, want %q; quiet %t", what, got, interval, in.last().quiet)
		}
	}
	check("before", statusDown, "")
	check("still a probe", statusDown, "")
	must(t, d.start(ctx, in.instance, r))
	if c := in.last(); c.timeout != 20*time.Second || variable(c, "OCF_RESKEY_CRM_meta_timeout") != "20000" || c.quiet {
		t.Errorf("start: %s, %s: want the agent's 20 s", c.timeout, variable(c, "OCF_RESKEY_CRM_meta_timeout"))
	}
	for name, want := range map[string]string{
		"OCF_ROOT": "/usr/lib/ocf", "OCF_RA_VERSION_MAJOR": "1", "OCF_RA_VERSION_MINOR": "1", "OCF_RESOURCE_INSTANCE": "svc1_ocf_d",
		"OCF_RESOURCE_TYPE": "Dummy", "OCF_RESOURCE_PROVIDER": "heartbeat", "OCF_EXIT_REASON_PREFIX": "ocf-exit-reason:", "OCF_RESKEY_fake": "a b",
	} {
		if got := variable(in.last(), name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	check("started", statusUp, "7000")
	another := newDriven(s)
	if state, _ := d.check(ctx, another.instance, r); state != statusUp || variable(another.last(), "OCF_RESKEY_CRM_meta_interval") != "" {
		t.Errorf("another daemon: %s; want up, by a probe", state)
	}
	must(t, d.stop(ctx, in.instance, r))
	if c := in.last(); c.timeout != 3*time.Second {
		t.Errorf("stop: %s, want the file's 3 s", c.timeout)
	}
	check("stopped", statusDown, "")
	must(t, d.stop(ctx, in.instance, r))
}

func TestStockMetadata(t *testing.T) {
	d := stockAgents(t)
	folder := "/usr/lib/ocf/resource.d/heartbeat"
	begin, parameters := time.Now(), 0
	agents := namesIn(folder)
	for _, agent := range agents {
		m, err := d.metadata(t.Context(), filepath.Join(folder, agent))
		if err != nil {
			t.Errorf("%s: %v", agent, err)
			continue
		}
		parameters += len(m.parameters)
		if m.timeouts["start"] == 0 || m.timeouts["stop"] == 0 || m.timeouts["monitor"] == 0 {
			t.Errorf("%s: timeouts %v", agent, m.timeouts)
		}
	}
	t.Logf("%d agents with %d parameters in %s", len(agents), parameters, time.Since(begin).Round(time.Millisecond))
	begin = time.Now()
	for _, agent := range agents {
		d.metadata(t.Context(), filepath.Join(folder, agent))
	}
	t.Logf("from the cache in %s", time.Since(begin).Round(time.Microsecond))
}

func TestStockParameters(t *testing.T) {
	d := stockAgents(t)
	tests := []struct {
		name, text string
		want       []string // parts of the faults, in order
	}{
		{"address", "agent = heartbeat:IPaddr2\nip = 10.0.0.1\ncidr_netmask = 24\nlvs_support = yes\nOCF_CHECK_LEVEL = 10\n", nil},
		{"mount", "agent = heartbeat:Filesystem\ndevice = /dev/x\ndirectory = /x\nfstype = ext4\noptions@node1 = noatime\n", nil},
		{"key that is the agent's too", "agent = heartbeat:anything\nbinfile = /x\nOCF_RESKEY_stop_timeout = 5\nstop_timeout = 9s\n", nil},
		{"mistyped parameter", "agent = heartbeat:IPaddr2\nip = 1.2.3.4\ncidr_netmsk = 24\n", []string{"svc1.conf:4: ocf#1.cidr_netmsk: not a parameter of heartbeat:IPaddr2 (ip "}},
		{"suggestion", "agent = heartbeat:IPaddr2\nip = 1.2.3.4\ncidr_netmsk = 24\n", []string{"; did you mean cidr_netmask?"}},
		{"mistyped key", "agent = heartbeat:IPaddr2\nip = 1.2.3.4\nrestrat = 2\n", []string{"svc1.conf:4: ocf#1.restrat: not a parameter of heartbeat:IPaddr2"}},
		{"suggested key", "agent = heartbeat:IPaddr2\nip = 1.2.3.4\nchek_interval = 2\n", []string{"; did you mean check_interval?"}},
		{"missing", "agent = heartbeat:IPaddr2\nnic = lo\n", []string{"svc1.conf:2: ocf#1.agent: heartbeat:IPaddr2 requires the parameter ip"}},
		{"empty", "agent = heartbeat:IPaddr2\nip =\n", []string{"requires the parameter ip"}},
		{"three missing", "agent = heartbeat:Filesystem\n", []string{"parameter device", "parameter directory", "parameter fstype"}},
		{"no boolean", "agent = heartbeat:IPaddr2\nip = 1.2.3.4\nlvs_support = Yes\n", []string{`svc1.conf:4: ocf#1.lvs_support: "Yes" is not one of true`}},
		{"no integer", "agent = heartbeat:IPaddr2\nip = 1.2.3.4\narp_interval = 2s\n", []string{`svc1.conf:4: ocf#1.arp_interval: "2s" is not an integer`}},
		{"integer by name only", "agent = heartbeat:jboss\njboss_home = /x\nresource_name = x\nconsole = x\nrotate_logsuffix = .%F\n", nil},
		{"twice", "agent = heartbeat:IPaddr2\nip = 1.2.3.4\n[ocf#2]\nagent = heartbeat:IPaddr2\nip = 1.2.3.4\n", []string{"svc1.conf:4: ocf#2: the same as ocf#1"}},
		{"two", "agent = heartbeat:IPaddr2\nip = 1.2.3.4\n[ocf#2]\nagent = heartbeat:IPaddr2\nip = 1.2.3.5\n", nil},
		{"nothing unique", "agent = heartbeat:Dummy\n[ocf#2]\nagent = heartbeat:Dummy\n", nil},
		{"mistyped agent", "agent = heartbeat:IPadr2\nip = 1.2.3.4\n", []string{`svc1.conf:2: ocf#1.agent: there is no agent "IPadr2" in /usr/lib/ocf/resource.d/heartbeat; did you mean IPaddr2?`}},
		{"mistyped provider", "agent = hartbeat:IPaddr2\nip = 1.2.3.4\n", []string{`there is no provider "hartbeat" of agents in /usr/lib/ocf/resource.d, only heartbeat; did you mean heartbeat?`}},
	}
	for _, test := range tests {
		s := testService(t, "[ocf#1]\n"+test.text)
		var faults []error
		for _, r := range s.resources {
			faults = append(faults, d.faults(s, r, false)...)
		}
		if len(faults) != len(test.want) {
			t.Errorf("%s: %v, want %d", test.name, faults, len(test.want))
			continue
		}
		for i, want := range test.want {
			if !strings.Contains(faults[i].Error(), want) {
				t.Errorf("%s: %v, want %q", test.name, faults[i], want)
			}
		}
	}
}

// fakeAgents is an OCF_ROOT with agents of the test's own.
func fakeAgents(t *testing.T, scripts map[string]string) *ocfDriver {
	t.Helper()
	root := t.TempDir()
	t.Setenv("HA_RSCTMP", filepath.Join(root, "rsctmp"))
	must(t, os.MkdirAll(filepath.Join(root, "resource.d", "test"), 0o755))
	for name, script := range scripts {
		path := filepath.Join(root, "resource.d", "test", name)
		must(t, os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o755))
	}
	return &ocfDriver{root: root}
}

const fakeMetadata = `[ "$1" != meta-data ] || { echo '<resource-agent name="x"><actions><action name="stop" timeout="1min"/></actions></resource-agent>'; exit 0; }
`

func TestOCFExits(t *testing.T) {
	d := fakeAgents(t, map[string]string{
		"Exit": fakeMetadata + "echo something >&2\necho 'ocf-exit-reason:tried first' >&2\necho 'ocf-exit-reason:because' >&2\nexit $OCF_RESKEY_exit\n",
	})
	tests := []struct {
		exit             int
		probe, recurring status
		why              string // of the recurring check
	}{
		{0, statusUp, statusUp, ""},
		{1, statusWarn, statusWarn, "exit status 1 (failed): because"},
		{2, statusDown, statusWarn, "exit status 2 (arguments refused): because"},
		{3, statusDown, statusWarn, "exit status 3 (action not implemented): because"},
		{4, statusDown, statusWarn, "exit status 4 (not permitted): because"},
		{5, statusDown, statusWarn, "exit status 5 (something that it needs is not installed): because"},
		{6, statusDown, statusWarn, "exit status 6 (configuration refused): because"},
		{7, statusDown, statusDown, "because"},
		{8, statusUp, statusUp, "promoted"},
		{9, statusWarn, statusWarn, "exit status 9 (promoted and failed): because"},
		{190, statusWarn, statusWarn, "exit status 190 (running, but degraded): because"},
		{191, statusWarn, statusWarn, "exit status 191 (promoted, but degraded): because"},
		{42, statusWarn, statusWarn, "exit status 42 (not one of the standard): because"},
	}
	for _, test := range tests {
		s := testService(t, fmt.Sprintf("[ocf#1]\nagent = test:Exit\nexit = %d\n", test.exit))
		in, r := newDriven(s), s.resources[0]
		if state, _ := d.check(t.Context(), in.instance, r); state != test.probe {
			t.Errorf("%d: a probe gives %s, want %s", test.exit, state, test.probe)
		}
		in.holds(r.rid, true)
		state, why := d.check(t.Context(), in.instance, r)
		wantStatus(t, fmt.Sprint(test.exit), state, test.recurring, why, test.why)
		start, stop := d.start(t.Context(), in.instance, r), d.stop(t.Context(), in.instance, r)
		if (start == nil) != (test.exit == 0) || (stop == nil) != (test.exit == 0) {
			t.Errorf("%d: start: %v, stop: %v", test.exit, start, stop)
		}
		if in.last().timeout != time.Minute {
			t.Errorf("stop's timeout is %s, want the agent's minute", in.last().timeout)
		}
		if test.exit == 5 && start.Error() != "agent test:Exit cannot start it: exit status 5 (something that it needs is not installed): because" {
			t.Errorf("start: %v", start)
		}
	}
}

func TestOCFAfterFailedStart(t *testing.T) {
	d := fakeAgents(t, map[string]string{"Later": fakeMetadata + `[ "$1" = monitor ] && exit 5
exit $OCF_RESKEY_exit
`})
	for exit, want := range map[int]status{0: statusWarn, 1: statusWarn, 7: statusWarn, 2: statusDown, 6: statusDown} {
		s := testService(t, fmt.Sprintf("[ocf#1]\nagent = test:Later\nexit = %d\n", exit))
		in, r := newDriven(s), s.resources[0]
		if err := d.start(t.Context(), in.instance, r); (err == nil) != (exit == 0) {
			t.Errorf("start with exit status %d: %v", exit, err)
		}
		if state, why := d.check(t.Context(), in.instance, r); state != want {
			t.Errorf("after a start with exit status %d: %s, %q; want %s", exit, state, why, want)
		}
	}
}

// TestStockAddressAndMount runs itself again in a network and mounts of its
// own, where the agents may do what they like.
func TestStockAddressAndMount(t *testing.T) {
	d := stockAgents(t)
	if os.Getenv("AGENTD_TEST_NAMESPACE") == "" {
		cmd := exec.Command("unshare", "-mn", os.Args[0], "-test.run=^TestStockAddressAndMount$", "-test.v")
		cmd.Env = append(os.Environ(), "AGENTD_TEST_NAMESPACE=1")
		if err := exec.Command("unshare", "-mn", "true").Run(); err != nil {
			t.Skipf("cannot make namespaces: %v", err)
		}
		out, err := cmd.CombinedOutput()
		if err != nil || strings.Contains(string(out), "--- SKIP") {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Logf("%s", out)
		return
	}
	if _, err := exec.LookPath("modprobe"); err != nil { // tmpfs needs no module, but the agent the program
		bin := t.TempDir()
		must(t, os.WriteFile(filepath.Join(bin, "modprobe"), []byte("#!/bin/sh\n"), 0o755))
		t.Setenv("PATH", os.Getenv("PATH")+":"+bin)
	}
	must(t, exec.Command("ip", "link", "set", "lo", "up").Run())
	mount := filepath.Join(t.TempDir(), "mount")
	s := testService(t, "[ocf#ip]\nagent = heartbeat:IPaddr2\nip = 127.0.7.1\nnic = lo\ncidr_netmask = 8\n"+
		"[ocf#fs]\nagent = heartbeat:Filesystem\ndevice = tmpfs\ndirectory = "+mount+"\nfstype = tmpfs\noptions = size=1m\n"+
		"[ocf#bad]\nagent = heartbeat:Filesystem\ndevice = /nonexistent\ndirectory = "+mount+"/x\nfstype = ext4\n")
	in, ctx := newDriven(s), t.Context()
	all := func(want status) {
		t.Helper()
		for _, r := range s.resources[:2] {
			state, why := d.check(ctx, in.instance, r)
			wantStatus(t, r.rid, state, want, why, "")
		}
		addresses, err := exec.Command("ip", "-o", "addr").Output()
		must(t, err)
		if up := strings.Contains(string(addresses), " 127.0.7.1/8 "); up != (want == statusUp) {
			t.Errorf("the address is there: %t", up)
		}
		if up := strings.Contains(readText(t, "/proc/mounts"), " "+mount+" tmpfs "); up != (want == statusUp) {
			t.Errorf("the mount is there: %t", up)
		}
	}
	for _, r := range s.resources {
		if faults := d.faults(s, r, false); faults != nil {
			t.Error(faults)
		}
	}
	all(statusDown)
	for range 2 { // the second time, there is nothing to do
		for _, r := range s.resources[:2] {
			must(t, d.start(ctx, in.instance, r))
		}
		all(statusUp)
	}
	err := d.start(ctx, in.instance, s.resources[2])
	if err == nil {
		t.Error("a device that does not exist is mounted")
	}
	t.Log(err)
	state, why := d.check(ctx, in.instance, s.resources[2])
	t.Log(state, why)
	for range 2 {
		for _, r := range slices.Backward(s.resources) {
			must(t, d.stop(ctx, in.instance, r))
		}
		all(statusDown)
	}
}

func TestOCFCommandThatDoesNotEnd(t *testing.T) {
	d := fakeAgents(t, map[string]string{"Hang": fakeMetadata + "exec sleep 60\n"})
	s := testService(t, "[ocf#1]\nagent = test:Hang\ntimeout = 50ms\n[ocf#2]\nagent = test:Gone\ntimeout = 1s\n")
	in := newDriven(s)
	for _, r := range s.resources {
		state, why := d.check(t.Context(), in.instance, r)
		if state != statusUndef || why == "" {
			t.Errorf("%s, never up: %s, %q", r.rid, state, why)
		}
		in.holds(r.rid, true)
		if state, why = d.check(t.Context(), in.instance, r); state != statusWarn || why == "" {
			t.Errorf("%s, was up: %s, %q", r.rid, state, why)
		}
		if err := d.start(t.Context(), in.instance, r); err == nil || !strings.Contains(err.Error(), "agent test:") {
			t.Errorf("%s: start: %v", r.rid, err)
		}
	}
	if err := d.stop(t.Context(), in.instance, s.resources[0]); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop: %v", err)
	}
}

func TestOCFFaults(t *testing.T) {
	d := fakeAgents(t, map[string]string{
		"Garbage": "echo '<resource-agent><parameters>'\n", "Empty": "exit 0\n", "Text": "echo hello\n", "Other": "echo '<x/>'\n",
		"Fails": "echo 'ocf-exit-reason:no python' >&2; exit 5\n", "Giant": "exec head -c 3000000 /dev/zero\n", "Plain": fakeMetadata,
		"Noisy": "echo warning >&2\necho some line\n" + fakeMetadata,
	})
	folder := filepath.Join(d.root, "resource.d", "test")
	must(t, os.Chmod(filepath.Join(folder, "Plain"), 0o644))
	must(t, os.Mkdir(filepath.Join(folder, "Folder"), 0o755))
	for agent, want := range map[string]string{
		"Garbage": "cannot read the metadata of the agent: " + folder + "/Garbage meta-data: not the XML of an agent: ", "Empty": "nothing is printed",
		"Text": "not the XML of an agent", "Other": "not the XML of an agent", "Fails": "exit status 5 (something that it needs is not installed): no python",
		"Giant": "prints more than 1048576 bytes", "Plain": "is not executable", "Folder": "is not executable",
		"Garbag": `there is no agent "Garbag" in ` + folder + "; did you mean Garbage?", "Noisy": "",
	} {
		s := testService(t, "[ocf#1]\nagent = test:"+agent+"\n")
		faults := d.faults(s, s.resources[0], false)
		switch {
		case want == "" && faults == nil:
		case len(faults) != 1 || want == "" || !strings.Contains(faults[0].Error(), want) || !strings.HasPrefix(faults[0].Error(), "svc1.conf:2: ocf#1.agent: "):
			t.Errorf("%s: %v, want %q", agent, faults, want)
		}
	}
	s := testService(t, "[ocf#1]\nagent = test:X\n")
	for _, root := range []string{t.TempDir(), "/nonexistent"} {
		if faults := (&ocfDriver{root: root}).faults(s, s.resources[0], false); len(faults) != 1 || !strings.Contains(faults[0].Error(), "install the package resource-agents") {
			t.Errorf("%s: %v", root, faults)
		}
	}
}

func TestMetadataCache(t *testing.T) {
	d := fakeAgents(t, map[string]string{"Counted": fakeMetadata})
	path := filepath.Join(d.root, "resource.d", "test", "Counted")
	count := filepath.Join(d.root, "count")
	write := func(script string) {
		must(t, os.WriteFile(path, []byte("#!/bin/sh\necho x >>"+count+"\n"+script), 0o755))
	}
	write(fakeMetadata)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			if _, err := d.metadata(context.Background(), path); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	before := readText(t, count)
	for range 3 {
		if _, err := d.metadata(t.Context(), path); err != nil {
			t.Error(err)
		}
	}
	if readText(t, count) != before {
		t.Error("an agent that did not change is asked again")
	}
	write("echo nonsense\n")
	if _, err := d.metadata(t.Context(), path); err == nil {
		t.Error("a new version is not read")
	}
}

func TestHangingMetadata(t *testing.T) {
	path := filepath.Join(t.TempDir(), "Hang")
	must(t, os.WriteFile(path, []byte("#!/bin/sh\nexec sleep 60\n"), 0o755))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond) // instead of metadataTimeout
	defer cancel()
	if _, err := readMetadata(ctx, nil, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestOCFTime(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]time.Duration{
		"20s": 20 * time.Second, "20": 20 * time.Second, "1min": time.Minute, "1 min": time.Minute, "1500ms": 1500 * time.Millisecond,
		"2m": 2 * time.Minute, "1h": time.Hour, "3000000us": 3 * time.Second, "10SEC": 10 * time.Second, "24h": 24 * time.Hour,
		"": 0, "0": 0, "-1": 0, "25h": 0, "1.5s": 0, "x": 0, "s": 0, "99999999999999999999": 0, "999999999h": 0, "1us": 0, "infinity": 0,
	} {
		if got := parseOCFTime(text); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

func FuzzParseMetadata(f *testing.F) {
	for _, seed := range []string{
		`<?xml version="1.0"?><!DOCTYPE resource-agent SYSTEM "ra-api-1.dtd"><resource-agent name="A" version="1.0"><version>1.1</version>
<longdesc lang="en">&lt;x&gt;</longdesc><parameters><parameter name="ip" unique="1" required="1"><content type="string" default=""/></parameter>
<parameter name="flag"><content type="boolean" default="false"/></parameter><parameter name="n" deprecated="1"><content type="integer" default="1s"/></parameter></parameters>
<actions><action name="start" timeout="20s"/><action name="monitor" depth="0" timeout="10" interval="10"/><action name="monitor" depth="20" timeout="1min"/></actions></resource-agent>`,
		`<resource-agent><parameters/><actions/></resource-agent>`,
		`<resource-agent><parameters><parameter name="a"/><parameter name="a"/><parameter/></parameters><actions><action timeout="99999999999s"/></actions></resource-agent>`,
		`<?xml version="1.0" encoding="ISO-8859-1"?><resource-agent/>`,
		"a line before\n<resource-agent name='x'><![CDATA[ ]]><!-- c --></resource-agent>",
		`<!DOCTYPE a [<!ENTITY b "c">]><resource-agent>&b;</resource-agent>`, ``, `<a/>`, `<resource-agent>`,
	} {
		f.Add(seed, "ip", "1")
	}
	f.Fuzz(func(t *testing.T, text, name, value string) {
		m, err := parseMetadata([]byte(text))
		if err != nil {
			return
		}
		for action, timeout := range m.timeouts {
			if timeout <= 0 || timeout > 24*time.Hour {
				t.Errorf("%q: %s", action, timeout)
			}
		}
		r := &resource{rid: "ocf#1", kind: "ocf", params: []param{{name, value}}}
		s := &service{name: "s", doc: &ini{name: "s.conf"}, resources: []*resource{r}}
		unknown := m.parameter(agentParameter(name)) == nil && !slices.Contains(everyAgents, agentParameter(name))
		if faults := m.faults(s, r); unknown && len(faults) == 0 {
			t.Errorf("%q passes", name)
		}
	})
}
