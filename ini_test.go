package main

import (
	"slices"
	"strings"
	"testing"
)

// parsedINI parses a text that must have no fault.
func parsedINI(t *testing.T, text string) *ini {
	t.Helper()
	doc, err := parseINI("node.conf", text)
	if err != nil {
		t.Fatalf("parseINI(%q): %v", text, err)
	}
	return doc
}

func TestINIValues(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		text string // of section s; the key is k
		want string
	}{
		{"plain", "k = v", "v"},
		{"without blanks", "k=v", "v"},
		{"blanks and tabs around", " \tk\t = \t v \t", "v"},
		{"empty", "k =", ""},
		{"second equals sign belongs to the value", "k = a=b", "a=b"},
		{"comment behind a blank", "k = v # why", "v"},
		{"comment behind a tab", "k = v\t# why", "v"},
		{"nothing but a comment", "k = # why", ""},
		{"hash inside a word", "k = a#b", "a#b"},
		{"semicolon is part of a command", "k = /bin/a; /bin/b ; c", "/bin/a; /bin/b ; c"},
		{"hash in double quotes", `k = "a # b" # c`, `"a # b"`},
		{"hash in single quotes", `k = 'a # b' # c`, `'a # b'`},
		{"quote in the other kind of quotes", `k = "it's # one" # c`, `"it's # one"`},
		{"quote that nothing closes is a letter", `k = it's # c`, `it's`},
		{"carriage return at the end", "k = v\r", "v"},
		{"comment and carriage return", "k = v # c\r", "v"},
		{"not ASCII", "k = Zürich", "Zürich"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, number, ok := parsedINI(t, "[s]\n"+test.text+"\n").value("s", "k", "n1")
			if !ok || got != test.want || number != 2 {
				t.Errorf("value = %q in line %d, %v; want %q in line 2", got, number, ok, test.want)
			}
		})
	}
}

func TestINIIgnoresComments(t *testing.T) {
	t.Parallel()
	doc := parsedINI(t, "# k = 1\n; k = 2\n[s] # not the end\n  # k = 3\n\t; k = 4\n\nk = 5\n")
	if got, number, _ := doc.value("s", "k", ""); got != "5" || number != 7 {
		t.Errorf("value = %q in line %d; want 5 in line 7", got, number)
	}
}

func TestINISections(t *testing.T) {
	t.Parallel()
	// A section that stands twice is one section, and blanks in the header
	// are not part of its name.
	doc := parsedINI(t, "[a]\nx = 1\n[ hb#1 ] # beats\nx = 2\n[a]\ny = 3\n")
	for _, want := range []struct {
		section, key, value string
		line                int
	}{{"a", "x", "1", 2}, {"hb#1", "x", "2", 4}, {"a", "y", "3", 6}} {
		got, number, ok := doc.value(want.section, want.key, "n1")
		if !ok || got != want.value || number != want.line {
			t.Errorf("%s.%s = %q in line %d, %v; want %q in line %d", want.section, want.key, got, number, ok, want.value, want.line)
		}
	}
	if _, _, ok := doc.value("hb#1", "y", "n1"); ok {
		t.Error("a key of [a] was found in [hb#1]")
	}
}

func TestINIScopes(t *testing.T) {
	t.Parallel()
	doc := parsedINI(t, "[s]\nk@n1 = one\nk = all\nk@n2.example = two\nonly@n1 = 1\n")
	tests := []struct {
		key, node, want string
		ok              bool
	}{
		{"k", "n1", "one", true},
		{"k", "n2.example", "two", true},
		{"k", "n3", "all", true},
		{"k", "", "all", true},
		{"only", "n1", "1", true},
		{"only", "n2", "", false},
	}
	for _, test := range tests {
		if got, _, ok := doc.value("s", test.key, test.node); got != test.want || ok != test.ok {
			t.Errorf("%s on %q = %q, %v; want %q, %v", test.key, test.node, got, ok, test.want, test.ok)
		}
	}
}

func TestINIErrors(t *testing.T) {
	t.Parallel()
	// Each text holds the secret where the fault is: a person pastes errors
	// into tickets, so no error may quote the line.
	const secret = "S3CR3T"
	tests := []struct {
		name, text string
		want       []string // in the error, all of them
	}{
		{"key twice", "[s]\nk = a\n\nk = " + secret, []string{"node.conf:4:", "s.k", "line 2"}},
		{"key twice, sections apart", "[s]\nk = a\n[t]\n[s]\nk = " + secret, []string{"node.conf:5:", "s.k", "line 2"}},
		{"scoped key twice", "[s]\nk@n1 = a\nk@n1 = " + secret, []string{"node.conf:3:", "s.k@n1", "line 2"}},
		{"no equals sign", "[s]\nk " + secret, []string{"node.conf:2:"}},
		{"key before a section", "k = " + secret, []string{"node.conf:1:", "section"}},
		{"key with a blank", "[s]\nk " + secret + " = v", []string{"node.conf:2:"}},
		{"key with an empty scope", "[s]\nk@ = " + secret, []string{"node.conf:2:", "@nodename"}},
		{"key with two scopes", "[s]\nk@a@b = " + secret, []string{"node.conf:2:"}},
		{"no key", "[s]\n= " + secret, []string{"node.conf:2:"}},
		{"section not closed", "[" + secret, []string{"node.conf:1:", "[name]"}},
		{"section without a name", "[ ] # " + secret, []string{"node.conf:1:", "[name]"}},
		{"something behind the section", "[s] k = " + secret, []string{"node.conf:1:"}},
		{"not UTF-8", "[s]\nk = " + secret + "\xff", []string{"node.conf:2:", "UTF-8"}},
		{"NUL", "[s]\nk = " + secret + "\x00", []string{"node.conf:2:"}},
		{"two faults", "[s]\n" + secret + "\nok = 1\n" + secret, []string{"node.conf:2:", "node.conf:4:"}},
		{"too large", "[s]\nk = " + secret + strings.Repeat("x", iniSizeLimit), []string{"node.conf", "1048576"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			_, err := parseINI("node.conf", test.text)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not hold %q", err, want)
				}
			}
			if strings.Contains(err.Error(), secret) {
				t.Errorf("error %q quotes the line", err)
			}
		})
	}
	// The same key under other scopes and sections is another parameter.
	parsedINI(t, "[s]\nk = 1\nk@n1 = 2\nk@n2 = 3\n[t]\nk = 4\n")
}

// A person's text survives to the byte, odd as it may be.
func TestINIRoundTrip(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"\n",
		"# only a comment\n",
		"\n\n[s]\n\n\tk  =\tv   # c  \n ; d\n\n\n",
		"[s]\r\nk = v\r\n\r\n# c\r\n",
		"[s]\nk =\n[t]\n[s]\nunknown_key@n1=x\n",
		sampleNodeConf,
	} {
		if got := parsedINI(t, text).String(); got != text {
			t.Errorf("String() = %q, want %q", got, text)
		}
	}
	// What a file's last line lacks is added, so that a line can follow it.
	if got := parsedINI(t, "[s]\nk = v").String(); got != "[s]\nk = v\n" {
		t.Errorf("String() = %q", got)
	}
}

func TestINISet(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name       string
		text       string
		section    string
		key, scope string
		value      string
		want       string
	}{
		{"in place, comment and blanks kept", "[s]\n  k  =  old  # why\nl = 1\n", "s", "k", "", "new", "[s]\n  k  =  new  # why\nl = 1\n"},
		{"in place, an empty value", "[s]\nk =\n", "s", "k", "", "new", "[s]\nk = new\n"},
		{"in place, a comment behind an empty value", "[s]\nk = # why\n", "s", "k", "", "new", "[s]\nk = new # why\n"},
		{"in place, behind the equals sign", "[s]\nk=old\n", "s", "k", "", "new", "[s]\nk= new\n"},
		{"in place, to nothing", "[s]\nk = old # c\n", "s", "k", "", "", "[s]\nk =  # c\n"},
		{"in place, CRLF kept", "[s]\r\nk = old\r\n", "s", "k", "", "new", "[s]\r\nk = new\r\n"},
		{"the scoped line only", "[s]\nk = 1\nk@n1 = 2\n", "s", "k", "n1", "3", "[s]\nk = 1\nk@n1 = 3\n"},
		{"behind its other scopes", "[s]\nk = 1\nl = 2\n", "s", "k", "n1", "3", "[s]\nk = 1\nk@n1 = 3\nl = 2\n"},
		{"behind the comment that explains it", "[s]\n# what k is\n# k = 1\n\n# l = 2\nm = 3\n", "s", "k", "", "9", "[s]\n# what k is\n# k = 1\nk = 9\n\n# l = 2\nm = 3\n"},
		{"not behind another section's comment", "[a]\n# k = 1\n[s]\nm = 3\n", "s", "k", "", "9", "[a]\n# k = 1\n[s]\nm = 3\nk = 9\n"},
		{"not behind the comment of a longer key", "[s]\n# kk = 1\nm = 3\n", "s", "k", "", "9", "[s]\n# kk = 1\nm = 3\nk = 9\n"},
		{"at its section's end, before the blank lines", "[s]\na = 1\n\n\n[t]\nb = 2\n", "s", "k", "", "9", "[s]\na = 1\nk = 9\n\n\n[t]\nb = 2\n"},
		{"in the last of two sections of the name", "[s]\na = 1\n[t]\nb = 2\n[s]\nc = 3\n[u]\n", "s", "k", "", "9", "[s]\na = 1\n[t]\nb = 2\n[s]\nc = 3\nk = 9\n[u]\n"},
		{"in an empty section", "[s]\n[t]\n", "s", "k", "", "9", "[s]\nk = 9\n[t]\n"},
		{"in a new section", "[a]\nb = 1\n", "hb#1", "k", "", "9", "[a]\nb = 1\n\n[hb#1]\nk = 9\n"},
		{"in a new section behind a blank line", "# c\n\n", "s", "k", "", "9", "# c\n\n[s]\nk = 9\n"},
		{"quotes keep a hash", "[s]\n", "s", "k", "", `sh -c 'a # b; c'`, "[s]\nk = sh -c 'a # b; c'\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			doc := parsedINI(t, test.text)
			if err := doc.set(test.section, test.key, test.scope, test.value); err != nil {
				t.Fatal(err)
			}
			if got := doc.String(); got != test.want {
				t.Errorf("file = %q\nwant   %q", got, test.want)
			}
			checkReadBack(t, doc, test.section, test.key, test.scope, test.value)
		})
	}
}

// checkReadBack: what set wrote is what the next reader finds.
func checkReadBack(t *testing.T, doc *ini, section, key, scope, want string) {
	t.Helper()
	again, err := parseINI("node.conf", doc.String())
	if err != nil {
		t.Errorf("the file does not parse after set: %v\n%q", err, doc.String())
		return
	}
	if i := again.find(section, key, scope); i < 0 {
		t.Errorf("%s is not in the file after set: %q", parameter(section, key, scope), doc.String())
	} else if got := again.lines[i].value(); got != want {
		t.Errorf("%s reads back as %q, want %q, from %q", parameter(section, key, scope), got, want, again.lines[i].raw)
	}
}

// A value that the next reader would take for another is refused, and the
// error says nothing of the value: it may be a secret.
func TestINISetRefuses(t *testing.T) {
	t.Parallel()
	const text = "[s]\nk = old\n"
	tests := []struct{ name, section, key, scope, value string }{
		{"comment in the value", "s", "k", "", "S3CR3T # comment"},
		{"hash first", "s", "k", "", "#S3CR3T"},
		{"newline", "s", "k", "", "S3CR3T\n[t]"},
		{"carriage return", "s", "k", "", "S3CR3T\rx"},
		{"blank first", "s", "k", "", " S3CR3T"},
		{"blank last", "s", "k", "", "S3CR3T\t"},
		{"NUL", "s", "k", "", "S3CR3T\x00"},
		{"not UTF-8", "s", "k", "", "S3CR3T\xff"},
		{"key with a blank", "s", "a b", "", "S3CR3T"},
		{"key that is a comment", "s", "#k", "", "S3CR3T"},
		{"key that is a section", "s", "[k]", "", "S3CR3T"},
		{"key with an equals sign", "s", "k=l", "", "S3CR3T"},
		{"scope with a blank", "s", "k", "n 1", "S3CR3T"},
		{"no section", "", "k", "", "S3CR3T"},
		{"section with a newline", "s\nt", "k", "", "S3CR3T"},
		{"section with a blank around", "s ", "k", "", "S3CR3T"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			doc := parsedINI(t, text)
			err := doc.set(test.section, test.key, test.scope, test.value)
			if err == nil {
				t.Fatalf("no error; the file is %q", doc.String())
			}
			if strings.Contains(err.Error(), "S3CR3T") {
				t.Errorf("the error %q quotes the value", err)
			}
			if got := doc.String(); got != text {
				t.Errorf("the file changed to %q", got)
			}
		})
	}
}

// What follows the old value on its line, or names the section, must not
// become part of the new one: each of these has to read back, or be refused.
func TestINISetReadsBackOrRefuses(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, text, section, scope, value string }{
		{"comment behind an empty value", "[s]\nk = # why\n", "s", "", "new"},
		{"comment behind an empty value, no blank", "[s]\nk =# why\n", "s", "", "new"},
		{"quote in the value and in the comment", "[s]\nk = old # it's why\n", "s", "", "a'b"},
		{"hash in the section", "[s]\n", "a #b", "", "new"},
		{"bracket in the section", "[s]\n", "s]", "", "new"},
		{"section not UTF-8", "[s]\n", "a\xff", "", "new"},
		{"blank behind the scope", "[s]\nk@n1 = old\n", "s", "n1 ", "new"},
		{"CRLF behind an empty value", "[s]\r\nk =\r\n", "s", "", "new"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			doc := parsedINI(t, test.text)
			if err := doc.set(test.section, "k", test.scope, test.value); err != nil {
				if got := doc.String(); got != test.text {
					t.Errorf("refused, and the file changed to %q", got)
				}
				return
			}
			checkReadBack(t, doc, test.section, "k", test.scope, test.value)
			// A carriage return ends a line or is nowhere.
			if text := strings.ReplaceAll(doc.String(), "\r\n", "\n"); strings.Contains(text, "\r") {
				t.Errorf("a carriage return stands inside a line: %q", doc.String())
			}
		})
	}
}

// In the file that a first start writes, each key is explained once, and what
// is set lands below its explanation: not below the like-named key of another
// section that is commented out.
func TestINISetInSampleLandsAtItsExplanation(t *testing.T) {
	t.Parallel()
	for _, spec := range nodeKeys {
		explained := sampleExplanation(spec)
		if explained < 0 || strings.HasSuffix(spec.section, "#") {
			continue // TestSampleExplainsEveryKey complains
		}
		if parsedINI(t, sampleNodeConf).lines[explained].section != spec.section {
			continue // its section is commented out: there a new one is made
		}
		t.Run(spec.section+"."+spec.key, func(t *testing.T) {
			t.Parallel()
			doc := parsedINI(t, sampleNodeConf)
			if err := doc.set(spec.section, spec.key, "", "1"); err != nil {
				t.Fatal(err)
			}
			if at := doc.find(spec.section, spec.key, ""); at != explained+1 {
				t.Errorf("set in line %d, below %q; it is explained in line %d", at+1, doc.lines[at-1].raw, explained+1)
			}
		})
	}
}

func TestINIUnset(t *testing.T) {
	t.Parallel()
	doc := parsedINI(t, "[s]\nk = 1 # c\nk@n1 = 2\n# k = 3\n")
	if doc.unset("s", "k", "n2") || doc.unset("t", "k", "") {
		t.Error("unset removed what is not there")
	}
	if !doc.unset("s", "k", "") {
		t.Error("unset did not find s.k")
	}
	if got, want := doc.String(), "[s]\nk@n1 = 2\n# k = 3\n"; got != want {
		t.Errorf("file = %q, want %q", got, want)
	}
}

func TestSplitWords(t *testing.T) {
	t.Parallel()
	tests := []struct {
		text string
		want []string
		ok   bool
	}{
		{"", nil, true},
		{" a\tb  c ", []string{"a", "b", "c"}, true},
		{`rpm --qf "%{VERSION} x" 'it"s'`, []string{"rpm", "--qf", "%{VERSION} x", `it"s`}, true},
		{`a"b c"d`, []string{"ab cd"}, true},
		{`a "" b`, []string{"a", "", "b"}, true},
		{`$HOME \n *`, []string{"$HOME", `\n`, "*"}, true}, // no shell
		{`a "b`, nil, false},
		{`it's`, nil, false},
	}
	for _, test := range tests {
		got, err := splitWords(test.text)
		if !slices.Equal(got, test.want) || (err == nil) != test.ok {
			t.Errorf("splitWords(%q) = %q, %v; want %q, ok %v", test.text, got, err, test.want, test.ok)
		}
	}
}

func TestSplitParameter(t *testing.T) {
	t.Parallel()
	for name, want := range map[string][3]string{
		"listener.port":            {"listener", "port", ""},
		"listener.port@n1":         {"listener", "port", "n1"},
		"listener.port@n1.example": {"listener", "port", "n1.example"},
		"stonith#n1.example.cmd":   {"stonith#n1.example", "cmd", ""},
	} {
		section, key, scope, err := splitParameter(name)
		if got := [3]string{section, key, scope}; err != nil || got != want {
			t.Errorf("splitParameter(%q) = %q, %v; want %q", name, got, err, want)
		}
		if got := parameter(section, key, scope); got != name {
			t.Errorf("parameter of it = %q, want %q", got, name)
		}
	}
	for _, name := range []string{"", "port", ".port", "listener.", "listener.port@", "@n1", ".", "a@b.c"} {
		if _, _, _, err := splitParameter(name); err == nil {
			t.Errorf("splitParameter(%q): no error", name)
		}
	}
}

func FuzzINI(f *testing.F) {
	f.Add(sampleNodeConf, "listener", "port", "", "1215")
	f.Add("[s]\nk = old # why\n", "s", "k", "", "new")
	f.Add("[s]\nk = # why\n", "s", "k", "", "new")
	f.Add("[s]\nk = old # it's why\n", "s", "k", "", "a'b")
	f.Add("[s]\r\nk =\r\n", "s", "k", "n1", `"a # b"`)
	f.Add("", "hb#1", "type", "", "unicast")
	f.Add("[s]\n", "a #b", "k", "", "v")
	f.Add("[s]\n", "s", "k", "n1 ", "v")
	f.Fuzz(func(t *testing.T, text, section, key, scope, value string) {
		doc, err := parseINI("f", text)
		if doc == nil {
			if len(text) <= iniSizeLimit {
				t.Fatalf("no document: %v", err)
			}
			return
		}
		// Also of a file with faults, which `print config` shows.
		if got, want := doc.String(), strings.TrimSuffix(text, "\n")+"\n"; got != want {
			t.Fatalf("String() = %q, want %q", got, want)
		}
		if err != nil {
			return
		}
		before := rawLines(doc)
		had := doc.find(section, key, scope)
		if err := doc.set(section, key, scope, value); err != nil {
			if !slices.Equal(rawLines(doc), before) {
				t.Fatalf("set refused (%v) and changed the file", err)
			}
			return
		}
		checkReadBack(t, doc, section, key, scope, value)
		checkOtherLines(t, before, rawLines(doc), had)
		if had >= 0 {
			return
		}
		if !doc.unset(section, key, scope) {
			t.Fatal("unset does not find what set wrote")
		}
		if again := rawLines(doc); !isSubsequence(before, again) {
			t.Fatalf("set and unset changed other lines: %q became %q", before, again)
		}
	})
}

func rawLines(doc *ini) []string {
	lines := make([]string, len(doc.lines))
	for i, line := range doc.lines {
		lines[i] = line.raw
	}
	return lines
}

// checkOtherLines: set changed line had alone, or, when that is -1, put new
// lines at one place: the assignment, and at the end also a section.
func checkOtherLines(t *testing.T, before, after []string, had int) {
	t.Helper()
	if had >= 0 {
		expect := slices.Clone(before)
		if len(after) == len(before) {
			expect[had] = after[had]
		}
		if !slices.Equal(after, expect) {
			t.Errorf("set changed other lines than %d: %q became %q", had+1, before, after)
		}
		return
	}
	if n := len(after) - len(before); n < 1 || n > 3 || !isSubsequence(before, after) {
		t.Errorf("set changed other lines: %q became %q", before, after)
	}
}

func isSubsequence(part, whole []string) bool {
	for _, line := range whole {
		if len(part) > 0 && part[0] == line {
			part = part[1:]
		}
	}
	return len(part) == 0
}

// sampleExplanation is the index of the line of conf/node.conf that shows spec
// commented out, in its section or in one that is commented out too; -1 if no
// line does.
func sampleExplanation(spec keySpec) int {
	section := ""
	for i, line := range strings.Split(sampleNodeConf, "\n") {
		bare := strings.TrimPrefix(line, "# ")
		if strings.HasPrefix(bare, "[") {
			section = strings.Trim(bare, "[]")
			if kind, _, numbered := strings.Cut(section, "#"); numbered {
				section = kind + "#"
			}
		}
		key, _, assigns := strings.Cut(bare, " =")
		if assigns && bare != line && section == spec.section && key == spec.key {
			return i
		}
	}
	return -1
}
