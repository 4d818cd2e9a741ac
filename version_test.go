package main

import (
	"cmp"
	"math/big"
	"slices"
	"strings"
	"testing"
)

func mustVersion(t *testing.T, text string) version {
	t.Helper()
	v, err := parseVersion(text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVersionVectors(t *testing.T) {
	t.Parallel()
	tests := []struct {
		a    string
		want string // < or =
		b    string
	}{
		// installation-status.md
		{"4.9", "<", "4.12"},
		{"4.12", "<", "4.12-1"},
		{"4.12-1", "<", "4.12-2"},
		{"0:4.12", "=", "4.12"},
		{"4.12", "<", "4.12.0"},
		{"4.12", "<", "1:4.11"},
		{"4.12", "<", "4.12^git1"},
		{"4.12^git1", "<", "4.12.1"},
		{"4.40~sr2", "<", "4.40"},
		{"4.40-sr2", "<", "4.40-sr10"},
		{"4.12_1", "=", "4.12.1"},
		{"4.010", "=", "4.10"},
		// Epoch, version, release, in this order.
		{"1:1", "<", "2:0.1"},
		{"9:1", "<", "10:1"},
		{"00:4.12", "=", "4.12"},
		{"99999999999999999999:1", "<", "100000000000000000000:0"},
		{"4.12-9", "<", "4.13-1"},
		{"4.12-0", "<", "4.12.1"},
		{"4.12-1.el8", "<", "4.12-1.el9"},
		{"4.12-1", "<", "4.12-1.1"},
		{"4.12-~1", "<", "4.12-1"},
		{"4.12", "<", "4.12-~1"}, // a missing release sorts below any
		{"1-2-3", "<", "1-2-4"},
		{"1-2-3", "<", "1-3-1"},
		{"1-2-3", "=", "1.2-3"}, // the last dash begins the release
		// RPM's own tests of its order.
		{"1.0", "=", "1.0"}, {"1.0", "<", "2.0"}, {"2.0", "<", "2.0.1"}, {"2.0.1", "<", "2.0.1a"},
		{"5.5p1", "<", "5.5p2"}, {"5.5p1", "<", "5.5p10"}, {"10xyz", "<", "10.1xyz"}, {"xyz10", "<", "xyz10.1"},
		{"xyz.4", "<", "8"}, {"xyz.4", "<", "2"}, {"5.5p2", "<", "5.6p1"}, {"5.6p1", "<", "6.5p1"},
		{"6.0", "<", "6.0.rc1"}, {"10a1", "<", "10b2"}, {"10a2", "<", "10b2"}, {"1.0a", "<", "1.0aa"},
		{"10.0001", "=", "10.1"}, {"10.0001", "<", "10.0039"}, {"4.999.9", "<", "5.0"}, {"20101121", "<", "20101122"},
		{"2.0", "=", "2_0"}, {"a", "=", "a+"}, {"a+", "=", "a_"}, {"+a", "=", "_a"},
		{"1.0~rc1", "<", "1.0"}, {"1.0~rc1", "<", "1.0~rc2"}, {"1.0~rc1~git123", "<", "1.0~rc1"}, {"1.0~", "<", "1.0"},
		{"1.0", "<", "1.0^"}, {"1.0", "<", "1.0^git1"}, {"1.0^git1", "<", "1.0^git2"}, {"1.0^git1", "<", "1.01"},
		{"1.0^20160101", "<", "1.0.1"}, {"1.0^20160101^git1", "<", "1.0^20160102"}, {"1.0~rc1", "<", "1.0~rc1^git1"},
		{"1.0^git1~pre", "<", "1.0^git1"}, {"1.0^git1", "<", "1.0^git1^x"},
		{"1b.fc17", "<", "1.fc17"}, {"1.fc17", "<", "1g.fc17"},
		// Segments, not letters.
		{"1.0a1", "=", "1.0.a.1"}, {"1A", "<", "1a"}, {"1.0000000000000000000000001", "=", "1.1"},
		{"1.18446744073709551615", "<", "1.18446744073709551616"}, {"1.", "=", "1"}, {"1~~", "<", "1~"},
	}
	for _, test := range tests {
		want := map[string]int{"<": -1, "=": 0}[test.want]
		a, b := mustVersion(t, test.a), mustVersion(t, test.b)
		if got := compareVersions(a, b); got != want {
			t.Errorf("%s %s %s: compare = %d", test.a, test.want, test.b, got)
		}
		if got := compareVersions(b, a); got != -want {
			t.Errorf("%s %s %s: compared the other way = %d", test.a, test.want, test.b, got)
		}
	}
}

func TestVersionRefuses(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"", " ", "4 .12", "4.12 ", "4,12", "4.12\n", "４.12", "4.12é", "v:4.12", ":4.12", "1:2:3", "-1:4", "4/12", "4.12(1)", "...", "~", "^-",
		strings.Repeat("1", 129), "\x004", "1:",
	} {
		if v, err := parseVersion(text); err == nil {
			t.Errorf("%q is read as %+v", text, v)
		}
	}
	mustVersion(t, strings.Repeat("1", 128))
}

// A version has something to compare: an epoch, or a release, alone is none.
func TestVersionRefusesAnEmptyVersion(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"1:.", "1:~", "0:---", "--4", "_-4", "-4", "1:-4"} {
		if v, err := parseVersion(text); err == nil {
			t.Errorf("%q is read as %+v", text, v)
		}
	}
}

// Versions that compare as equal are one group, however they are spelled, and
// the groups are ordered.
func TestVersionGroups(t *testing.T) {
	t.Parallel()
	groups := [][]string{
		{"4.12~rc1", "4.12~rc01", "4.12.~rc1"},
		{"4.12", "0:4.12", "4.12.", "4_12", "4.012", "4+12", "04..12"},
		{"4.12-1", "4.12-01", "4.12.-1"},
		{"4.12^1", "4.12^01", "4.12.^1"},
		{"4.12.0", "4.12.00", "4.12_0"},
		{"1:1", "01:1", "1:1."},
	}
	for i, group := range groups {
		for j, other := range groups {
			for _, a := range group {
				for _, b := range other {
					if got := compareVersions(mustVersion(t, a), mustVersion(t, b)); got != cmp.Compare(i, j) {
						t.Errorf("compare(%s, %s) = %d, want %d", a, b, got, cmp.Compare(i, j))
					}
				}
			}
		}
	}
}

// Over all short versions: sorted, each pair agrees with its places, which is
// what antisymmetry and transitivity together say.
func TestVersionOrderIsTotal(t *testing.T) {
	t.Parallel()
	pieces := []string{"1", "02", "10", "a", "b", "~", "^", ".", "-"}
	var all []string
	for _, x := range append(pieces, "") {
		for _, y := range append(pieces, "") {
			for _, z := range append(pieces, "1:") {
				if text := z + x + y; z == "1:" || x != "" {
					if _, err := parseVersion(text); err == nil {
						all = append(all, text)
					}
				}
			}
		}
	}
	versions := make([]version, len(all))
	for i, text := range all {
		versions[i] = mustVersion(t, text)
	}
	slices.SortFunc(versions, compareVersions)
	group := 0
	groups := make([]int, len(versions))
	for i := range versions[1:] {
		if compareVersions(versions[i], versions[i+1]) != 0 {
			group++
		}
		groups[i+1] = group
	}
	if len(versions) < 500 || group < 100 {
		t.Fatalf("only %d versions in %d groups", len(versions), group+1)
	}
	for i, a := range versions {
		for j, b := range versions {
			if got := compareVersions(a, b); got != cmp.Compare(groups[i], groups[j]) {
				t.Fatalf("compare(%+v, %+v) = %d; by their places it is %d", a, b, got, cmp.Compare(groups[i], groups[j]))
			}
		}
	}
}

// tokenOrder is RPM's order once more, from its manual, by another way: a
// string becomes a list of tokens, and lists compare token by token, where
// `~` sorts below the end, the end below `^`, that below letters, and these
// below numbers.
func tokenOrder(a, b string) int {
	x, y := versionTokens(a), versionTokens(b)
	for i := range max(len(x), len(y)) {
		rankX, textX := tokenAt(x, i)
		rankY, textY := tokenAt(y, i)
		if rankX != rankY {
			return cmp.Compare(rankX, rankY)
		}
		if rankX == 4 {
			n, _ := new(big.Int).SetString(textX, 10)
			m, _ := new(big.Int).SetString(textY, 10)
			if c := n.Cmp(m); c != 0 {
				return c
			}
		} else if c := strings.Compare(textX, textY); c != 0 {
			return c
		}
	}
	return 0
}

func tokenAt(tokens []string, i int) (rank int, text string) {
	if i >= len(tokens) {
		return 1, ""
	}
	text = tokens[i]
	switch {
	case text == "~":
		return 0, text
	case text == "^":
		return 2, text
	case text[0] <= '9':
		return 4, text
	}
	return 3, text
}

func versionTokens(s string) (tokens []string) {
	kind := func(c byte) int {
		switch {
		case c == '~' || c == '^':
			return 0 // each a token of its own
		case '0' <= c && c <= '9':
			return 1
		case 'a' <= c|0x20 && c|0x20 <= 'z':
			return 2
		}
		return 3
	}
	for i := 0; i < len(s); {
		end := i + 1
		for kind(s[i]) != 0 && end < len(s) && kind(s[end]) == kind(s[i]) {
			end++
		}
		if kind(s[i]) != 3 {
			tokens = append(tokens, s[i:end])
		}
		i = end
	}
	return tokens
}

func FuzzVersion(f *testing.F) {
	f.Add("4.12", "4.12-1", "4.9", 1)
	f.Add("1:4.40~sr2", "4.40^git1", "4.40", 3)
	f.Add("4.12-sr2", "4.12-sr10", "04_12", 4)
	f.Add("--4", "-4", "1:.", 0)
	f.Add("1.18446744073709551616", "a~^~", "1-", 1)
	f.Fuzz(func(t *testing.T, x, y, z string, at int) {
		a, errA := parseVersion(x)
		if errA != nil {
			return
		}
		if got := compareVersions(a, a); got != 0 {
			t.Fatalf("compare(%q, itself) = %d", x, got)
		}
		// A separator that stands twice separates no more than once.
		if at >= 0 && at < len(x) && strings.IndexByte("._+-", x[at]) >= 0 {
			if doubled, err := parseVersion(x[:at] + x[at:at+1] + x[at:]); err == nil && compareVersions(a, doubled) != 0 {
				t.Fatalf("%q and the same with the separator at %d doubled differ", x, at)
			}
		}
		b, errB := parseVersion(y)
		if errB != nil {
			return
		}
		ab := compareVersions(a, b)
		if ba := compareVersions(b, a); ba != -ab {
			t.Fatalf("compare(%q, %q) = %d, the other way %d", x, y, ab, ba)
		}
		if got, want := compareSegments(a.base, b.base), tokenOrder(a.base, b.base); got != want {
			t.Fatalf("compareSegments(%q, %q) = %d, by their tokens %d", a.base, b.base, got, want)
		}
		c, errC := parseVersion(z)
		if errC != nil {
			return
		}
		if bc := compareVersions(b, c); ab <= 0 && bc <= 0 && compareVersions(a, c) > 0 {
			t.Fatalf("%q ≤ %q ≤ %q, and yet %q > %q", x, y, z, x, z)
		}
	})
}
