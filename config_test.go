package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// parsedConfig parses the text of a node.conf that must have no fault. Without
// a name in it, the node is n1.
func parsedConfig(t *testing.T, text string) *config {
	t.Helper()
	c, err := parseConfig("node.conf", named(text))
	if err != nil {
		t.Fatalf("parseConfig: %v\n%s", err, text)
	}
	return c
}

// named appends node.name to a text that does not set it, so that no test
// depends on the machine's name and the lines of errors stay those of text.
func named(text string) string {
	if strings.Contains(text, "[node]") {
		return text
	}
	return text + "\n[node]\nname = n1\n"
}

// testFolders are the folders of a daemon of its own.
func testFolders(t *testing.T) paths {
	t.Helper()
	dir := memoryFolder(t)
	p := paths{filepath.Join(dir, "etc"), filepath.Join(dir, "lib"), filepath.Join(dir, "log"), filepath.Join(dir, "run")}
	if err := p.makeFolders(); err != nil {
		t.Fatal(err)
	}
	return p
}

// memoryFolder is in memory where that is to be had. Files are synced here by
// the hundred: a disk that is busy with other things must not slow these tests
// down, nor decide those of a guard that does not wait for a slow disk.
func memoryFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "agentd-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// writeText writes a file and makes its folder.
func writeText(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestNodeKeysHaveValidDefaults(t *testing.T) {
	t.Parallel()
	for i, spec := range nodeKeys {
		name := spec.section + "." + spec.key
		if spec.initial != "" {
			if _, err := spec.parse(spec.initial); err != nil {
				t.Errorf("%s: its default is refused: %v", name, err)
			}
		}
		if found := nodeKeys.find(strings.Replace(spec.section, "#", "#1", 1), spec.key); found != &nodeKeys[i] {
			t.Errorf("%s: findKey finds %v", name, found)
		}
	}
}

// The sample is the manual: each key stands in it, with its default where it
// has one, and else with nothing or with an example that is valid.
func TestSampleExplainsEveryKey(t *testing.T) {
	t.Parallel()
	lines := strings.Split(sampleNodeConf, "\n")
	for _, spec := range nodeKeys {
		at := sampleExplanation(spec)
		if at < 0 {
			t.Errorf("conf/node.conf does not explain %s.%s", spec.section, spec.key)
			continue
		}
		_, shown, _ := strings.Cut(lines[at], "=")
		shown = strings.TrimSpace(shown)
		switch {
		case spec.initial != "" && shown != spec.initial:
			t.Errorf("conf/node.conf:%d: shows %q as the default of %s.%s, which is %q", at+1, shown, spec.section, spec.key, spec.initial)
		case shown != "":
			if _, err := spec.parse(shown); err != nil {
				t.Errorf("conf/node.conf:%d: the example is refused: %v", at+1, err)
			}
		}
	}
}

func TestSampleNamesNoUnknownKey(t *testing.T) {
	t.Parallel()
	// Commented keys have one blank behind the #; the header's example, which
	// stands before the first section, has more.
	key := regexp.MustCompile(`^#? ?([a-z_]+)(@[a-z0-9]+)? =`)
	section, assignments := "", 0
	for i, line := range strings.Split(sampleNodeConf, "\n") {
		bare := strings.TrimPrefix(line, "# ")
		if strings.HasPrefix(bare, "[") {
			section = strings.Trim(bare, "[]")
		}
		match := key.FindStringSubmatch(line)
		if match == nil {
			continue
		}
		assignments++
		spec := nodeKeys.find(section, match[1])
		switch {
		case spec == nil:
			t.Errorf("conf/node.conf:%d: [%s] has no key %q", i+1, section, match[1])
		case match[2] != "" && spec.unscoped:
			t.Errorf("conf/node.conf:%d: %s cannot be scoped", i+1, match[1])
		}
	}
	if assignments < len(nodeKeys) {
		t.Errorf("found %d keys in conf/node.conf; the pattern of this test misses some", assignments)
	}
	if c := parsedConfig(t, sampleNodeConf+"[node]\nname = n1\n"); len(c.warnings) > 0 {
		t.Errorf("the sample has warnings: %q", c.warnings)
	}
}

func TestConfigValues(t *testing.T) {
	t.Parallel()
	tests := []struct {
		section, key string
		good         map[string]any
		bad          []string
	}{
		{"node", "name", map[string]any{"n1": "n1", "N-1.example_x": "N-1.example_x", "1": "1", strings.Repeat("a", 64): strings.Repeat("a", 64)},
			[]string{"", "-n", ".n", "_n", "n 1", "n/1", "n@1", "ñ", strings.Repeat("a", 65)}},
		{"node", "env", map[string]any{"PRD": "PRD", "-": "-"}, []string{"", "a b", "ü", strings.Repeat("a", 65)}},
		{"node", "rejoin_grace_period", map[string]any{"500ms": 500 * time.Millisecond, "5s": 5 * time.Second, "1m30s": 90 * time.Second, "24h": 24 * time.Hour, "90": 90 * time.Second, "0.5": 500 * time.Millisecond},
			[]string{"", "0", "0s", "-1", "-5s", "5x", "5 s", "s", "nan", "inf", "1e3s", "9000h", "99999999999999999999"}},
		{"node", "watchdog", map[string]any{"/dev/watchdog": "/dev/watchdog", "/a//b/../c/": "/a/c"}, []string{"", "dev/watchdog", "./x", "~/x"}},
		{"cluster", "name", map[string]any{"default": "default", "joined": "joined"}, []string{"", "join", "a b", "ü"}},
		{"cluster", "nodes", map[string]any{"n1": []string{"n1"}, "n1 n2": []string{"n1", "n2"}, "n1,n2": []string{"n1", "n2"}, "n1 ,\tn2": []string{"n1", "n2"}},
			[]string{"", ",", "n1 n1", "n1 n/2"}},
		{"cluster", "secret", map[string]any{"0123456789abcdef": "0123456789abcdef", strings.Repeat("s", 1024): strings.Repeat("s", 1024)}, []string{"", strings.Repeat("s", 1025)}},
		{"cluster", "quorum", map[string]any{"auto": "auto", "true": "true", "false": "false"}, []string{"", "yes", "True"}},
		{"cluster", "quorum_action", map[string]any{"stop": "stop", "reboot": "reboot", "crash": "crash"}, []string{"halt"}},
		{"listener", "addr", map[string]any{"0.0.0.0": netip.IPv4Unspecified(), "::": netip.IPv6Unspecified(), "192.0.2.1": netip.MustParseAddr("192.0.2.1")},
			[]string{"", "localhost", "192.0.2.1:1214", "192.0.2", "[::1]", "192.0.2.0/24"}},
		{"listener", "port", map[string]any{"1": 1, "1214": 1214, "65535": 65535}, []string{"", "0", "65536", "-1", "1214x", "0x10", "1e3", "99999999999999999999"}},
		{"listener", "max_connections", map[string]any{"4": 4, "512": 512}, []string{"3", "0"}},
		{"hb#1", "type", map[string]any{"unicast": "unicast"}, []string{"", "multicast"}},
		{"stonith#n1", "cmd", map[string]any{`/sbin/fence -o "re boot"`: []string{"/sbin/fence", "-o", "re boot"}}, []string{"", `/sbin/fence "x`}},
		{"release", "pattern", map[string]any{}, []string{"", "(", "release (.*)", "(?P<product>.*)", `(?P<version>a)(?=b)`}},
		{"release", "product", map[string]any{"Net Eye": "Net Eye", "": nil}, nil},
		{"release", "rewrite", map[string]any{"-sr=~sr": []rewrite{{"-sr", "~sr"}}, "a=b c=": []rewrite{{"a", "b"}, {"c", ""}}, "a=b=c": []rewrite{{"a", "b=c"}}}, []string{"a", "=b", "a=b c"}},
		{"release", "format", map[string]any{"auto": "auto", "pattern": "pattern", "os-release": "os-release", "plain": "plain"}, []string{"", "os_release"}},
		{"finalized", "mode", map[string]any{"version": "version", "marker": "marker", "command": "command", "none": "none"}, []string{"off"}},
		{"upgrade", "finalize", map[string]any{"node": "node", "cluster": "cluster"}, []string{"all"}},
	}
	for _, test := range tests {
		t.Run(test.section+"."+test.key, func(t *testing.T) {
			t.Parallel()
			line := func(text string) string {
				return fmt.Sprintf("# 1\n[%s]\n%s = %s\n", test.section, test.key, text)
			}
			for text, want := range test.good {
				// The node's own name decides which nodes are valid: node.name
				// and cluster.nodes are read alone here.
				got, err := nodeKeys.find(test.section, test.key).parse(text)
				if text == "" {
					got = nodeKeys.find(test.section, test.key).parsed(text)
				}
				if err != nil || !reflect.DeepEqual(got, want) {
					t.Errorf("%q is read as %v, %v; want %v", text, got, err, want)
				}
			}
			for _, text := range test.bad {
				_, err := parseConfig("node.conf", named(line(text)))
				if err == nil {
					t.Errorf("%q is accepted", text)
					continue
				}
				if want := fmt.Sprintf("node.conf:3: %s.%s: ", test.section, test.key); !strings.HasPrefix(err.Error(), want) {
					t.Errorf("%q: the error %q does not begin with %q", text, err, want)
				}
			}
		})
	}
}

func TestConfigDefaults(t *testing.T) {
	t.Parallel()
	c := parsedConfig(t, "")
	if got := c.members(); !slices.Equal(got, []string{"n1"}) {
		t.Errorf("cluster.nodes = %q; without the line it is this node alone", got)
	}
	for key, want := range map[string]any{
		"cluster.name": "default", "listener.port": 1214, "listener.addr": netip.IPv4Unspecified(),
		"listener.max_clock_skew": time.Minute, "upgrade.stall_after": 24 * time.Hour, "status.timeout": 5 * time.Second,
		"finalized.mode": "version", "release.file": nil, "cluster.secret": nil,
	} {
		if got := c.values[key]; !reflect.DeepEqual(got, want) {
			t.Errorf("%s = %v, want %v", key, got, want)
		}
	}
}

func TestConfigScoping(t *testing.T) {
	t.Parallel()
	text := "[listener]\nport@n2 = 2222\nport = 1111\naddr@n1 = 192.0.2.1\nmax_connections@n9 = 9\n" +
		"[release]\nproduct = P\nproduct@n2 =\n[node]\nname = %s\n[cluster]\nnodes = n1 n2\n"
	n1 := parsedConfig(t, fmt.Sprintf(text, "n1"))
	n2 := parsedConfig(t, fmt.Sprintf(text, "n2"))
	if n1.count("listener.port") != 1111 || n2.count("listener.port") != 2222 {
		t.Errorf("listener.port is %d on n1 and %d on n2; want 1111 and 2222", n1.count("listener.port"), n2.count("listener.port"))
	}
	if got := value[netip.Addr](n2, "listener.addr"); got != netip.IPv4Unspecified() {
		t.Errorf("listener.addr on n2 = %s; n1's is not its own", got)
	}
	// A scoped line without a value takes the unscoped one away.
	if n1.text("release.product") != "P" || n2.text("release.product") != "" {
		t.Errorf("release.product is %q on n1 and %q on n2; want P and nothing", n1.text("release.product"), n2.text("release.product"))
	}
	// A scope may name a node that is not a member yet.
	if len(n1.warnings) > 0 || n1.forNode("listener", "max_connections", "n9") != 9 {
		t.Errorf("the scope of a node to come: warnings %q, value %v", n1.warnings, n1.forNode("listener", "max_connections", "n9"))
	}
	// A bad value is an error on every node, not only where it counts: the
	// file is one for all.
	if _, err := parseConfig("node.conf", "[node]\nname = n1\n[listener]\nport@n2 = x\n"); err == nil || !strings.Contains(err.Error(), "node.conf:4: listener.port@n2: ") {
		t.Errorf("a bad value for another node: %v", err)
	}
	for _, key := range []string{"node.name", "cluster.name", "cluster.nodes", "cluster.secret", "cluster.quorum"} {
		section, name, _ := strings.Cut(key, ".")
		_, err := parseConfig("node.conf", fmt.Sprintf("[%s]\n%s@n1 = n1\n[node]\nname = n1\n", section, name))
		if err == nil || !strings.Contains(err.Error(), "node.conf:2: "+key+"@n1: ") {
			t.Errorf("%s@n1 is accepted, though all nodes must have the same: %v", key, err)
		}
	}
}

func TestConfigUnknownKeys(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, text, want string }{
		{"mistyped key", "[listener]\nprot = 1\n", "node.conf:2: unknown key listener.prot; did you mean listener.port?"},
		{"mistyped section", "[lisener]\nport = 1\n", "node.conf:2: unknown key lisener.port; did you mean listener.port?"},
		{"scoped", "[listener]\nadr@n2 = 1\n", "node.conf:2: unknown key listener.adr@n2; did you mean listener.addr?"},
		{"in a numbered section", "[hb#3]\ntimout = 1\n", "node.conf:2: unknown key hb#3.timout; did you mean hb#3.timeout?"},
		{"nothing near", "[my]\nown = 1\n", "node.conf:2: unknown key my.own"},
		{"a number where there is none", "[listener#1]\nport = 1\n", "node.conf:2: unknown key listener#1.port; did you mean listener.port?"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			// Unknown keys may belong to a newer version: they are no error.
			if got := parsedConfig(t, test.text).warnings; len(got) != 1 || got[0] != test.want {
				t.Errorf("warnings = %q\nwant        %q", got, test.want)
			}
		})
	}
	if got := parsedConfig(t, "[hb#1]\ntype = unicast\n[stonith#n1.example]\ncmd = /x\n").warnings; len(got) > 0 {
		t.Errorf("warnings about known keys: %q", got)
	}
}

// [hb#] has neither a number nor a name: nothing would ever read it.
func TestConfigSectionWithoutItsNumberIsUnknown(t *testing.T) {
	t.Parallel()
	if got := parsedConfig(t, "[hb#]\ntype = unicast\n").warnings; len(got) != 1 || !strings.HasPrefix(got[0], "node.conf:2: unknown key ") {
		t.Errorf("warnings = %q, want one about line 2", got)
	}
}

func TestConfigCrossChecks(t *testing.T) {
	t.Parallel()
	const secret = "cluster.secret"
	tests := []struct {
		name, text       string
		fault, warning   string // how they begin; empty: none
		faultHas, warned string
	}{
		{"not a member", "[cluster]\nnodes = n2 n3\n", "node.conf:2: cluster.nodes: ", "", `"n1"`, ""},
		{"witness that is no member", "[cluster]\nnodes = n1 n2\nwitnesses = n2 n3\n", "node.conf:3: cluster.witnesses: ", "", `"n3"`, ""},
		{"exclusion that is no member", "[cluster]\nnodes = n1\n[upgrade]\nexclude = n7\n", "", "node.conf:4: upgrade.exclude: ", "", `"n7"`},
		{"short secret", "[cluster]\nsecret = hunter2\n", "", "node.conf:2: " + secret, "", "16"},
		{"16 characters", "[cluster]\nsecret = 0123456789abcdef\n", "", "", "", ""},
		{"all well", "[cluster]\nnodes = n1 n2 n3\nwitnesses = n3\n[upgrade]\nexclude = n2\n", "", "", "", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c, err := parseConfig("node.conf", named(test.text))
			if test.fault != "" {
				if err == nil || !strings.HasPrefix(err.Error(), test.fault) || !strings.Contains(err.Error(), test.faultHas) {
					t.Errorf("error = %v; want %q with %s", err, test.fault, test.faultHas)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if test.warning == "" && len(c.warnings) > 0 || test.warning != "" && (len(c.warnings) != 1 || !strings.HasPrefix(c.warnings[0], test.warning) || !strings.Contains(c.warnings[0], test.warned)) {
				t.Errorf("warnings = %q; want %q with %s", c.warnings, test.warning, test.warned)
			}
			for _, warning := range c.warnings {
				if strings.Contains(warning, "hunter2") {
					t.Errorf("the warning %q holds the secret", warning)
				}
			}
		})
	}
}

// The line that a warning names is the one that it is about, also of a value
// that is scoped.
func TestConfigWarningOfScopedValueNamesItsLine(t *testing.T) {
	t.Parallel()
	c := parsedConfig(t, "[upgrade]\nexclude@n1 = n7\n")
	if len(c.warnings) != 1 || !strings.HasPrefix(c.warnings[0], "node.conf:2: upgrade.exclude") {
		t.Errorf("warnings = %q, want one about line 2", c.warnings)
	}
}

// Whatever is wrong with the lines of secrets, or beside them, neither errors
// nor warnings show a secret.
func TestConfigErrorsHoldNoSecret(t *testing.T) {
	t.Parallel()
	const secret = "S3CR3T"
	for _, text := range []string{
		"[cluster]\nsecret = " + strings.Repeat(secret, 200),
		"[cluster]\nprevious_secret = " + strings.Repeat(secret, 200),
		"[cluster]\nsecret@n1 = " + secret,
		"[cluster]\nsecret = " + secret + "\nsecret = " + secret,
		"[cluster]\nsecret : " + secret,
		"[cluster]\nsecret = " + secret + "\xff",
		"[cluster]\nsecret =\n  " + secret,
		"[cluster\nsecret = " + secret,
		"[cluser]\nsecret = " + secret + "\n[cluster]\nnodes = x",
		"[cluster]\nsecert = " + secret + "\nnodes = x",
		"[cluster]\nsecret = " + secret + "\nprevious_secret = " + secret,
	} {
		c, err := parseConfig("node.conf", named(text))
		said := fmt.Sprint(err)
		if c != nil {
			said += strings.Join(c.warnings, "\n")
		}
		if strings.Contains(said, secret) {
			t.Errorf("%q: the secret is in %q", text, said)
		}
	}
}

// All faults are told at once, so that a file is mended in one go.
func TestConfigTellsEachFault(t *testing.T) {
	t.Parallel()
	_, err := parseConfig("node.conf", "[listener]\nport = x\naddr = y\n[cluster]\nnodes = n1 n1\n")
	for _, want := range []string{"node.conf:2: listener.port: ", "node.conf:3: listener.addr: ", "node.conf:5: cluster.nodes: "} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error = %v; want %q in it", err, want)
		}
	}
}

func TestPeerAddress(t *testing.T) {
	t.Parallel()
	c := parsedConfig(t, `[listener]
addr = 192.0.2.100
port = 1300
addr@n1 = 192.0.2.1
addr@n2 = 192.0.2.2
port@n2 = 1302
port@n3 = 1303
addr@n4 = 0.0.0.0
addr@n5 = ::
addr@n6 = 2001:db8::6
[cluster]
nodes = n1 n2 n3 n4 n5 n6 n7
`)
	for peer, want := range map[string]struct {
		host string
		port int
	}{
		"n1": {"192.0.2.1", 1300},
		"n2": {"192.0.2.2", 1302},
		"n3": {"n3", 1303},
		"n4": {"n4", 1300}, // where n4 listens, on all, is not where it is reached
		"n5": {"n5", 1300},
		"n6": {"2001:db8::6", 1300},
		"n7": {"n7", 1300}, // never the unscoped address, which is this node's own
	} {
		if host, port := peerAddress(c, peer); host != want.host || port != want.port {
			t.Errorf("%s is reached at %s port %d; want %s port %d", peer, host, port, want.host, want.port)
		}
	}
	if _, port := peerAddress(parsedConfig(t, ""), "n2"); port != 1214 {
		t.Errorf("without listener.port the port is %d, want 1214", port)
	}
}

func TestEditConfigLeavesTheFileOnError(t *testing.T) {
	t.Parallel()
	const good = "# mine\n[node]\nname = n1\n[cluster]\nsecret = 0123456789abcdef\n"
	refused := errors.New("refused")
	tests := []struct {
		name, text string
		change     func(doc *ini) error
		want       string
	}{
		{"the change fails", good, func(doc *ini) error {
			return errors.Join(doc.set("node", "env", "", "PRD"), refused)
		}, "refused"},
		{"the result is invalid", good, func(doc *ini) error { return doc.set("listener", "port", "", "x") }, "node.conf:8: listener.port: "},
		{"the result contradicts itself", good, func(doc *ini) error { return doc.set("cluster", "nodes", "", "n2") }, "cluster.nodes"},
		{"the file is broken", good + "broken\n", func(doc *ini) error { return doc.set("node", "env", "", "PRD") }, "node.conf:6: "},
		{"nothing changes", good, func(doc *ini) error { return doc.set("node", "name", "", "n1") }, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := testFolders(t)
			writeText(t, p.nodeConf(), test.text)
			before := fileStamp(p.nodeConf())
			err := nodeConfFile(p).edit(test.change)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("error = %v, want %q", err, test.want)
			}
			if got := readText(t, p.nodeConf()); got != test.text || fileStamp(p.nodeConf()) != before {
				t.Errorf("the file was written: %q", got)
			}
			if entries, _ := os.ReadDir(p.etc); len(entries) != 1 {
				t.Errorf("there are leftovers: %v", entries)
			}
		})
	}
}

func TestEditConfigWrites(t *testing.T) {
	t.Parallel()
	p := testFolders(t)
	writeText(t, p.nodeConf(), "# mine\n[node]\nname = n1 # me\nfuture = 1\n")
	if err := os.Chmod(p.nodeConf(), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := nodeConfFile(p).edit(func(doc *ini) error { return doc.set("listener", "port", "n2", "1215") }); err != nil {
		t.Fatal(err)
	}
	if got, want := readText(t, p.nodeConf()), "# mine\n[node]\nname = n1 # me\nfuture = 1\n\n[listener]\nport@n2 = 1215\n"; got != want {
		t.Errorf("node.conf = %q, want %q", got, want)
	}
	checkMode(t, p.nodeConf(), 0o600)
}

func checkMode(t *testing.T, path string, want os.FileMode) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != want {
		t.Errorf("%s has mode %o, want %o", filepath.Base(path), got, want)
	}
}

// Two editors at once: neither loses the other's change, which the lock is for.
func TestEditConfigTakesTurns(t *testing.T) {
	t.Parallel()
	p := testFolders(t)
	writeText(t, p.nodeConf(), "[node]\nname = n1\n[cluster]\nnodes = n1\n")
	const editors = 8
	errs := make(chan error, editors)
	for i := range editors {
		go func() {
			errs <- nodeConfFile(p).edit(func(doc *ini) error { return doc.set("listener", "port", fmt.Sprintf("n%d", i), "1215") })
		}()
	}
	for range editors {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if got := strings.Count(readText(t, p.nodeConf()), "port@"); got != editors {
		t.Errorf("%d of %d changes are in the file", got, editors)
	}
}

func TestEnsureConfigMakesTheFirst(t *testing.T) {
	t.Parallel()
	p := testFolders(t)
	if err := os.Remove(p.etc); err != nil {
		t.Fatal(err)
	}
	secrets := map[string]bool{}
	for range 2 {
		if made, err := ensureConfig(p); err != nil || !made {
			t.Fatalf("made a secret: %v, %v", made, err)
		}
		checkMode(t, p.nodeConf(), 0o600)
		c, err := loadConfig(p)
		if err != nil {
			t.Fatal(err)
		}
		secret := c.text("cluster.secret")
		if !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(secret) {
			t.Errorf("the secret is not of 64 hex digits: %q", secret)
		}
		// The rest is the sample, to the letter.
		if got := strings.Replace(readText(t, p.nodeConf()), "secret = "+secret+"\n", "", 1); got != sampleNodeConf {
			t.Errorf("the first node.conf is not the sample with a secret:\n%s", got)
		}
		secrets[secret] = true
		if err := os.Remove(p.nodeConf()); err != nil {
			t.Fatal(err)
		}
	}
	if len(secrets) != 2 {
		t.Error("two first starts made the same secret")
	}
}

func TestEnsureConfigKeepsWhatIsThere(t *testing.T) {
	t.Parallel()
	p := testFolders(t)
	const foreign = "; by hand\n[cluster]   # ours\nname = prod\n\n[future]\nkey = 1\n[node]\nname = n1\n"
	writeText(t, p.nodeConf(), foreign)
	if made, err := ensureConfig(p); err != nil || !made {
		t.Fatalf("made a secret: %v, %v", made, err)
	}
	once := readText(t, p.nodeConf())
	got := regexp.MustCompile(`secret = [0-9a-f]{64}\n`).ReplaceAllString(once, "")
	if got != foreign || got == once {
		t.Errorf("node.conf = %q, want the old text with a secret added", once)
	}
	// A second start finds a secret and changes nothing.
	before := fileStamp(p.nodeConf())
	if made, err := ensureConfig(p); err != nil || made {
		t.Fatalf("made another secret: %v, %v", made, err)
	}
	if fileStamp(p.nodeConf()) != before {
		t.Error("the second start wrote the file again")
	}
	// A broken file is not mended, nor replaced.
	writeText(t, p.nodeConf(), "[cluster]\nbroken\n")
	if _, err := ensureConfig(p); err == nil {
		t.Error("a broken file is accepted")
	}
	if got := readText(t, p.nodeConf()); got != "[cluster]\nbroken\n" {
		t.Errorf("the broken file was changed to %q", got)
	}
}

// Once there was a secret, its loss is an error: with another one, made up
// here, the node would be out of its cluster.
func TestEnsureConfigMakesNoSecondSecret(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{"the line is gone": "[node]\nname = n1\n", "the file is gone": ""} {
		p := testFolders(t)
		writeText(t, p.goodConf(), "[node]\nname = n1\n[cluster]\nsecret = 0123456789abcdef\n")
		if text != "" {
			writeText(t, p.nodeConf(), text)
		}
		if made, err := ensureConfig(p); made || err == nil || !strings.Contains(err.Error(), p.goodConf()) || strings.Contains(err.Error(), "0123456789abcdef") {
			t.Errorf("%s: made %v, %v; want an error that names the last good text", name, made, err)
		}
		if got, _ := os.ReadFile(p.nodeConf()); string(got) != text {
			t.Errorf("%s: node.conf became %q", name, got)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add("")
	f.Add(sampleNodeConf)
	f.Add("[listener]\nport = 1215\nport@n2 = 1216\naddr@n2 = ::1\n[cluster]\nnodes = n1 n2\n")
	f.Add("[hb#1]\ntype@n2 = unicast\n[stonith#n2]\ncmd = a \"b c\"\n[hb#]\nport = 1\n")
	f.Add("[release]\npattern = (?P<version>.*)\nrewrite = -sr=~sr\nproduct@n1 =\n[upgrade]\nexclude = n2\n")
	f.Add("[cluster]\nwitnesses = n2\nname = join\nsecret@n1 = x\n")
	f.Fuzz(func(t *testing.T, text string) {
		const secret = "S3CR3T-which-nobody-shall-see"
		c, err := parseConfig("f", text+"\n[cluster]\nsecret = "+secret+"\n[node]\nname = n1\n")
		said := fmt.Sprint(err)
		if c != nil {
			said += strings.Join(c.warnings, "\n")
		}
		if strings.Contains(said, secret) && !strings.Contains(text, secret) {
			t.Fatalf("the secret is in %q", said)
		}
		for _, line := range strings.Split(fmt.Sprint(err), "\n") {
			if err != nil && !strings.HasPrefix(line, "f:") {
				t.Fatalf("an error without the file's name: %q", line)
			}
		}
		if err != nil {
			return
		}
		// What is valid can be used: each key has a value of its type, for
		// every node.
		if !c.isMember(c.node) {
			t.Fatalf("%q is not among its own members %q", c.node, c.members())
		}
		for _, node := range append(c.members(), "another") {
			peerAddress(c, node)
			for _, spec := range nodeKeys {
				c.forNode(strings.Replace(spec.section, "#", "#1", 1), spec.key, node)
			}
		}
		again, err := parseConfig("f", c.doc.String())
		if err != nil || fmt.Sprint(again.values) != fmt.Sprint(c.values) {
			t.Fatalf("read again, the file says something else: %v", err)
		}
	})
}
