package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var testNow = time.Date(2020, 7, 1, 10, 0, 0, 0, time.UTC)

// viewOf reads a view from one word a node, n1 first:
//
//	4.12/4.11    answered: installed, finalized
//	4.12/-       nothing is finalized
//	?            answered, unreadable
//	timeout      any other answerKind: did not answer, and was at 9/8 the last time
//	excluded
func viewOf(t *testing.T, view string) (members []string, nodes map[string]*nodeAnswer) {
	t.Helper()
	words := strings.Fields(view)
	for i := range words {
		members = append(members, fmt.Sprintf("n%d", i+1))
	}
	nodes = map[string]*nodeAnswer{}
	for i, word := range words {
		installed, finalized, versions := strings.Cut(word, "/")
		switch {
		case word == "?":
			nodes[members[i]] = answered(t, members, i, "", "")
		case versions:
			nodes[members[i]] = answered(t, members, i, installed, strings.Trim(finalized, "-"))
		default:
			nodes[members[i]] = &nodeAnswer{Answer: answerKind(word), Error: "why", LastKnown: &lastVersions{Installed: "9", Finalized: "8"}}
		}
	}
	return members, nodes
}

// answered is an answer as judge makes it. Without an installed version, it is
// unreadable.
func answered(t *testing.T, members []string, i int, installed, finalized string) *nodeAnswer {
	t.Helper()
	n := &nodeStatus{Nodename: members[i], DaemonID: "daemon of " + members[i], Product: "NetEye", ClusterNodes: members}
	n.Installed.Version, n.Finalized.Version = nullable(installed), nullable(finalized)
	if installed == "" {
		n.Installed.Error = "no such file"
	}
	n.State, n.Reasons = judge(n.Installed, n.Finalized, versionOrder{})
	return &nodeAnswer{Answer: answerOK, Node: n}
}

func rulesOf(members []string) summaryRules {
	return summaryRules{members: members, stallAfter: 24 * time.Hour, now: testNow}
}

// summaryText is what matters of a status, for comparison in tables.
func summaryText(s clusterStatus) string {
	lists := ""
	for _, list := range []struct {
		name  string
		nodes []string
	}{{"done", s.Done}, {"installed", s.Installed}, {"pending", s.Pending}, {"unknown", s.Unknown}, {"excluded", s.Excluded}} {
		if len(list.nodes) > 0 {
			lists += fmt.Sprintf(" %s=%s", list.name, strings.Join(list.nodes, ","))
		}
	}
	complete := ""
	if !s.Complete {
		complete = " incomplete"
	}
	return fmt.Sprintf("%s%s %s→%s%s", s.State, complete, s.From, s.To, lists)
}

func TestSummarize(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		view   string
		change func(r *summaryRules, nodes map[string]*nodeAnswer)
		want   string
		reason string // the first: its code
	}{
		{"all finalized", "4.12/4.12 4.12/4.12", nil, "installed →4.12 done=n1,n2", ""},
		{"the example: n3 is not finalized", "4.12/4.12 4.12/4.12 4.12/4.11", nil, "upgrading 4.11→4.12 done=n1,n2 installed=n3", "not_finalized"},
		{"nothing finalized yet", "4.12/4.12 4.12/-", nil, "upgrading →4.12 done=n1 installed=n2", "not_finalized"},
		{"one not installed yet", "4.12/4.12 4.11/4.11", nil, "upgrading 4.11→4.12 done=n1 pending=n2", "not_installed"},
		{"the last one is being installed", "4.12/4.12 4.12/4.12 4.12/-", nil, "upgrading →4.12 done=n1,n2 installed=n3", "not_finalized"},
		{"node down, the rest finalized", "4.12/4.12 timeout", nil, "unknown incomplete →4.12 done=n1 unknown=n2", "timeout"},
		{"node down, another unfinalized", "4.12/4.11 refused", nil, "upgrading incomplete 4.11→4.12 installed=n1 unknown=n2", "not_finalized"},
		{"node down, two others behind and ahead", "4.11/4.11 4.12/4.12 denied", nil, "upgrading incomplete 4.11→4.12 done=n2 pending=n1 unknown=n3", "not_installed"},
		{"nobody answers", "timeout refused", nil, "unknown incomplete → unknown=n1,n2", "timeout"},
		{"unreadable, the rest finalized", "4.12/4.12 ?", nil, "unknown incomplete →4.12 done=n1 unknown=n2", "unreadable"},
		{"unreadable, another unfinalized", "4.12/4.11 ?", nil, "upgrading incomplete 4.11→4.12 installed=n1 unknown=n2", "not_finalized"},
		{"unreadable, others prove more", "4.12/4.12 4.11/4.11 4.10/4.10 ?", nil, "inconsistent incomplete 4.10→4.12 done=n1 pending=n2,n3 unknown=n4", "many_versions"},
		{"single node", "4.12/4.12", nil, "installed →4.12 done=n1", ""},
		{"single node, unfinalized", "4.12/4.11", nil, "upgrading 4.11→4.12 installed=n1", "not_finalized"},
		{"downgraded", "4.11/4.12 4.11/4.11", nil, "inconsistent 4.12→4.11 done=n2 installed=n1", "downgraded"},
		{"three versions", "4.12/4.12 4.11/4.11 4.10/4.10", nil, "inconsistent 4.10→4.12 done=n1 pending=n2,n3", "many_versions"},
		{"three versions, one finalized only", "4.12/4.10 4.11/4.11", nil, "inconsistent 4.10→4.12 installed=n1 pending=n2", "many_versions"},
		{"spelled in two ways", "4.10/4.010 4.010/4.10", nil, "installed →4.10 done=n1,n2", ""},
		{"versions by number, not by letter", "4.9/4.9 4.12/4.12", nil, "upgrading 4.9→4.12 done=n2 pending=n1", "not_installed"},
		{"products differ", "4.12/4.12 4.12/4.12", func(_ *summaryRules, nodes map[string]*nodeAnswer) {
			nodes["n2"].Node.Product = "Other"
		}, "inconsistent →4.12 done=n1,n2", "products_differ"},
		{"not the expected product", "4.12/4.12 4.12/4.12", func(r *summaryRules, _ map[string]*nodeAnswer) { r.product = "Other" }, "inconsistent →4.12 done=n1,n2", "products_differ"},
		{"the expected product", "4.12/4.12", func(r *summaryRules, _ map[string]*nodeAnswer) { r.product = "NetEye" }, "installed →4.12 done=n1", ""},
		{"a product that is not known differs from none", "4.12/4.12 4.12/4.12", func(_ *summaryRules, nodes map[string]*nodeAnswer) {
			nodes["n2"].Node.Product = ""
		}, "installed →4.12 done=n1,n2", ""},
		{"of an unreadable node nothing counts", "4.12/4.12 ?", func(_ *summaryRules, nodes map[string]*nodeAnswer) {
			nodes["n2"].Node.Product, nodes["n2"].Node.Finalized.Version = "Other", "4.10"
		}, "unknown incomplete →4.12 done=n1 unknown=n2", "unreadable"},
		{"finalized before all have installed, where that is wrong", "4.12/4.12 4.11/4.11", func(r *summaryRules, _ map[string]*nodeAnswer) {
			r.finalizeTogether = true
		}, "inconsistent 4.11→4.12 done=n1 pending=n2", "finalized_early"},
		{"all have installed, some are finalized", "4.12/4.12 4.12/4.11", func(r *summaryRules, _ map[string]*nodeAnswer) {
			r.finalizeTogether = true
		}, "upgrading 4.11→4.12 done=n1 installed=n2", "not_finalized"},
		{"installed before all have, not finalized", "4.12/4.11 4.11/4.11", func(r *summaryRules, _ map[string]*nodeAnswer) {
			r.finalizeTogether = true
		}, "upgrading 4.11→4.12 installed=n1 pending=n2", "not_finalized"},
		{"the lists of nodes differ", "4.12/4.12 4.12/4.12", func(_ *summaryRules, nodes map[string]*nodeAnswer) {
			nodes["n2"].Node.ClusterNodes = []string{"n2", "n3"}
		}, "unknown →4.12 done=n1,n2", "members_differ"},
		{"the lists of nodes in another order", "4.12/4.12 4.12/4.12", func(_ *summaryRules, nodes map[string]*nodeAnswer) {
			nodes["n2"].Node.ClusterNodes = []string{"n2", "n1"}
		}, "installed →4.12 done=n1,n2", ""},
		{"two names, one daemon", "4.12/4.12 4.12/4.12", func(_ *summaryRules, nodes map[string]*nodeAnswer) {
			nodes["n2"].Node.DaemonID = nodes["n1"].Node.DaemonID
		}, "unknown →4.12 done=n1,n2", "one_daemon"},
		{"excluded and down", "4.12/4.12 excluded", nil, "installed →4.12 done=n1 excluded=n2", ""},
		{"excluded, another unfinalized", "4.12/4.11 excluded", nil, "upgrading 4.11→4.12 installed=n1 excluded=n2", "not_finalized"},
		{"all excluded", "excluded excluded", nil, "unknown → excluded=n1,n2", "all_excluded"},
		{"from is in the journal only", "4.12/4.12 4.12/4.12", func(_ *summaryRules, nodes map[string]*nodeAnswer) {
			nodes["n1"].Node.Previous = &seenVersion{Version: "4.12"}
			nodes["n2"].Node.Previous = &seenVersion{Version: "4.11"}
		}, "installed 4.11→4.12 done=n1,n2", ""},
		{"what is seen beats the journal", "4.12/4.11 4.12/4.12", func(_ *summaryRules, nodes map[string]*nodeAnswer) {
			nodes["n2"].Node.Previous = &seenVersion{Version: "4.10"}
		}, "upgrading 4.11→4.12 done=n2 installed=n1", "not_finalized"},
		{"sprint releases by release.rewrite", "4.40-sr2/4.40-sr2 4.40/4.40", func(r *summaryRules, _ map[string]*nodeAnswer) {
			r.order = versionOrder{[]rewrite{{"-sr", "~sr"}}}
		}, "upgrading 4.40-sr2→4.40 done=n2 pending=n1", "not_installed"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			members, nodes := viewOf(t, test.view)
			rules := rulesOf(members)
			if test.change != nil {
				test.change(&rules, nodes)
			}
			s := rules.summarize(nodes)
			if got := summaryText(s); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			first := ""
			if len(s.Reasons) > 0 {
				first = s.Reasons[0].Code
			}
			if first != test.reason {
				t.Errorf("the reasons are %v; want %q first", s.Reasons, test.reason)
			}
			if len(s.Nodes) != len(members) {
				t.Errorf("%d rows for %d members", len(s.Nodes), len(members))
			}
		})
	}
}

// What is behind a state is said in words that name the nodes.
func TestSummarizeReasons(t *testing.T) {
	t.Parallel()
	members, nodes := viewOf(t, "4.12/4.11 4.12/4.12 refused ?")
	nodes["n2"].Node.ClusterNodes = []string{"n1", "n2", "n3", "n5"}
	var got []string
	for _, r := range rulesOf(members).summarize(nodes).Reasons {
		got = append(got, r.Code+": "+r.Message)
	}
	// All that is wrong is told, also what did not decide the state.
	want := []string{
		"not_finalized: n1: 4.12 is installed, 4.11 is finalized",
		"members_differ: cluster.nodes differ: n2 does not list n4 and lists also n5",
		"refused: n3 did not answer: why",
		"unreadable: n4: the installed version is not known: no such file",
	}
	if !slices.Equal(got, want) {
		t.Errorf("reasons:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// The table is complete: summarize makes the row that is missing.
func TestSummarizeMakesMissingRows(t *testing.T) {
	t.Parallel()
	defer func() {
		if r := recover(); r != nil {
			t.Errorf("panic: %v", r)
		}
	}()
	members, nodes := viewOf(t, "4.12/4.12 4.12/4.12")
	delete(nodes, "n2")
	s := rulesOf(members).summarize(nodes)
	if got, want := summaryText(s), "unknown incomplete →4.12 done=n1 unknown=n2"; got != want || s.Nodes["n2"] == nil {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestStalled(t *testing.T) {
	t.Parallel()
	ago := func(d time.Duration) *time.Time { at := testNow.Add(-d); return &at }
	day := 24 * time.Hour
	tests := []struct {
		name  string
		view  string
		since []*time.Time // n1 installed, finalized, n2 installed, finalized
		want  bool
	}{
		{"all long ago", "4.12/4.11 4.12/4.12", []*time.Time{ago(3 * day), ago(9 * day), ago(2 * day), ago(2 * day)}, true},
		{"one change lately", "4.12/4.11 4.12/4.12", []*time.Time{ago(3 * day), ago(9 * day), ago(2 * day), ago(time.Hour)}, false},
		{"to the minute", "4.12/4.11 4.12/4.12", []*time.Time{ago(day), nil, nil, nil}, false},
		{"no upgrade", "4.12/4.12 4.12/4.12", []*time.Time{ago(9 * day), ago(9 * day), ago(9 * day), ago(9 * day)}, false},
		{"no times", "4.12/4.11 4.12/4.12", []*time.Time{nil, nil, nil, nil}, false},
		{"a node is missing, which may have changed lately", "4.12/4.11 ?", []*time.Time{ago(2 * day), nil, ago(2 * day), nil}, false},
	}
	for _, test := range tests {
		members, nodes := viewOf(t, test.view)
		for i, node := range members {
			nodes[node].Node.Installed.Since, nodes[node].Node.Finalized.Since = test.since[2*i], test.since[2*i+1]
		}
		if got := rulesOf(members).summarize(nodes).Stalled; got != test.want {
			t.Errorf("%s: stalled = %v, want %v", test.name, got, test.want)
		}
	}
}

func TestGates(t *testing.T) {
	t.Parallel()
	tests := []struct {
		view, gate, version, want string
	}{
		{"4.12/4.12 4.12/4.12", "start", "", "yes"},
		{"4.12/4.12 4.12/4.12", "start", "4.12", "yes"},
		{"4.12/4.12 4.12/4.12", "start", "4.012", "yes"},
		{"4.12/4.12 4.12/4.12", "start", "4.13", "no"},
		{"4.12/4.12 4.12/4.11", "start", "", "no"},
		{"4.12/4.12 timeout", "start", "", "unknown"},
		{"4.12/4.11 timeout", "start", "", "no"},
		{"4.11/4.11 timeout", "start", "4.12", "no"},
		{"4.11/4.12", "start", "", "no"},
		{"4.12/4.12 excluded", "start", "4.12", "yes"},
		{"excluded", "start", "", "unknown"},
		{"4.12/4.11 4.12/-", "finalize", "4.12", "yes"},
		{"4.12/4.12 4.12/4.12", "finalize", "4.12", "yes"},
		{"4.12/4.11 4.11/4.11", "finalize", "4.12", "no"},
		{"4.13/4.11 4.12/4.11", "finalize", "4.12", "no"},
		{"4.12/4.11 timeout", "finalize", "4.12", "unknown"},
		{"4.11/4.11 timeout", "finalize", "4.12", "no"},
		{"4.12/4.11 ?", "finalize", "4.12", "unknown"},
		{"4.12/4.11 excluded", "finalize", "4.12", "yes"},
		{"excluded", "finalize", "4.12", "unknown"},
	}
	for _, test := range tests {
		members, nodes := viewOf(t, test.view)
		rules := rulesOf(members)
		g := rules.gate(clusterQuery{gate: test.gate, version: test.version}, rules.summarize(nodes))
		if g.Answer != test.want || g.Name != test.gate || string(g.Version) != test.version || g.Why == "" {
			t.Errorf("%s: gate %s %s says %s (%s), want %s", test.view, test.gate, test.version, g.Answer, g.Why, test.want)
		}
	}
}

// letter is one of the answers of which the views below are made.
type letter struct {
	kind                 string // answered, unreadable, none, excluded
	installed, finalized int    // finalized 0: none
	product              string
	foreign              bool // lists other members
	shared               bool // is answered by the daemon of others that are shared
}

func (l letter) String() string {
	text := l.kind
	if l.kind == "answered" {
		text = fmt.Sprintf("%d/%d%s", l.installed, l.finalized, l.product)
	}
	if l.foreign {
		text += " foreign list"
	}
	if l.shared {
		text += " shared daemon"
	}
	return text
}

// The letter that stands for a missing answer is the first.
const missing = 0

// alphabet: every pair of versions from three, and each of the other traits
// with some of them. fullAlphabet has the rest.
func alphabet() []letter {
	letters := []letter{{kind: "none"}, {kind: "excluded"}}
	for installed := 1; installed <= 3; installed++ {
		for finalized := 0; finalized <= 3; finalized++ {
			letters = append(letters, letter{"answered", installed, finalized, "P", false, false})
		}
	}
	return append(letters,
		letter{"answered", 2, 2, "Q", false, false},
		letter{"answered", 2, 2, "P", true, false},
		letter{"answered", 2, 1, "P", true, false},
		letter{"answered", 2, 2, "P", false, true},
		letter{"answered", 3, 3, "P", false, true},
		letter{kind: "unreadable"},
		letter{kind: "unreadable", foreign: true, shared: true},
	)
}

// fullAlphabet has every combination of all traits.
func fullAlphabet() []letter {
	letters := []letter{{kind: "none"}, {kind: "excluded"}}
	for traits := range 4 {
		foreign, shared := traits&1 != 0, traits&2 != 0
		letters = append(letters, letter{kind: "unreadable", foreign: foreign, shared: shared})
		for versions := range 24 {
			letters = append(letters, letter{"answered", 1 + versions%3, versions / 3 % 4, []string{"P", "Q"}[versions/12], foreign, shared})
		}
	}
	return letters
}

// answer writes l as node i of members would answer.
func (l letter) answer(t *testing.T, members []string, i int) *nodeAnswer {
	t.Helper()
	switch l.kind {
	case "none":
		return &nodeAnswer{Answer: answerTimeout, LastKnown: &lastVersions{Installed: "3", Finalized: "2"}}
	case "excluded":
		return &nodeAnswer{Answer: answerExcluded, LastKnown: &lastVersions{Installed: "3", Finalized: "2"}}
	}
	version := func(v int) string {
		if v == 0 {
			return ""
		}
		return fmt.Sprint(v)
	}
	a := answered(t, members, i, version(l.installed), version(l.finalized))
	a.Node.Product = nullable(l.product)
	if l.foreign {
		a.Node.ClusterNodes = []string{members[i], "another"}
	}
	if l.shared {
		a.Node.DaemonID = "shared"
	}
	return a
}

// outcome is what a script goes by.
type outcome struct {
	state                  clusterState
	complete               bool
	from, to               string
	buckets                string
	start, startAt, finish string // the gates; the last two at version 2
}

// outcomeOf asks the product.
func outcomeOf(t *testing.T, view []letter, together bool) outcome {
	t.Helper()
	var members []string
	for i := range view {
		members = append(members, fmt.Sprintf("n%d", i+1))
	}
	nodes := map[string]*nodeAnswer{}
	for i, l := range view {
		nodes[members[i]] = l.answer(t, members, i)
	}
	rules := rulesOf(members)
	rules.finalizeTogether = together
	s := rules.summarize(nodes)
	buckets := ""
	for _, node := range members {
		buckets += string(s.Nodes[node].Bucket) + " "
	}
	return outcome{
		s.State, s.Complete, string(s.From), string(s.To), buckets,
		rules.gate(clusterQuery{gate: gateStart}, s).Answer,
		rules.gate(clusterQuery{gate: gateStart, version: "2"}, s).Answer,
		rules.gate(clusterQuery{gate: gateFinalize, version: "2"}, s).Answer,
	}
}

// wantOutcome reads the tables of installation-status.md, with versions that
// are plain numbers.
func wantOutcome(view []letter, together bool) outcome {
	versions, products := map[int]bool{}, map[string]bool{}
	to, shared, excluded := 0, 0, 0
	var downgraded, unfinalized, doubt, elsewhere bool
	w := outcome{complete: true}
	for _, l := range view {
		if l.kind == "answered" {
			to = max(to, l.installed)
		}
	}
	finalizedTo, behind := false, false
	for _, l := range view {
		if l.kind == "excluded" {
			excluded++
			w.buckets += "excluded "
			continue
		}
		doubt = doubt || l.foreign
		if l.shared {
			shared++
		}
		if l.kind != "answered" {
			doubt, w.complete = true, false
			w.buckets += "unknown "
			continue
		}
		versions[l.installed] = true
		if l.finalized > 0 {
			versions[l.finalized] = true
		}
		products[l.product] = true
		downgraded = downgraded || l.installed < l.finalized
		unfinalized = unfinalized || l.installed > l.finalized
		finalizedTo = finalizedTo || l.installed == to && l.finalized == to
		behind = behind || l.installed < to
		elsewhere = elsewhere || l.installed != 2
		switch {
		case l.installed < to:
			w.buckets += "pending "
		case l.finalized == to:
			w.buckets += "done "
		default:
			w.buckets += "installed "
		}
	}
	doubt = doubt || shared > 1 || excluded == len(view)
	if to > 0 {
		w.to = fmt.Sprint(to)
	}
	for _, v := range slices.Sorted(maps.Keys(versions)) {
		if v != to && w.from == "" {
			w.from = fmt.Sprint(v)
		}
	}
	switch {
	case len(products) > 1 || downgraded || len(versions) > 2 || together && finalizedTo && behind:
		w.state = clusterInconsistent
	case unfinalized || len(versions) == 2:
		w.state = clusterUpgrading
	case doubt:
		w.state = clusterUnknown
	default:
		w.state = clusterInstalled
	}
	gate := func(no bool) string {
		switch {
		case no:
			return "no"
		case doubt:
			return "unknown"
		}
		return "yes"
	}
	upgrading := w.state == clusterUpgrading || w.state == clusterInconsistent
	w.start, w.startAt, w.finish = gate(upgrading), gate(elsewhere || upgrading), gate(elsewhere)
	return w
}

// statement: a higher state says more. Installed says nothing that could be too
// much, since a partial view never says it.
var statement = map[clusterState]int{clusterInstalled: 0, clusterUnknown: 0, clusterUpgrading: 1, clusterInconsistent: 2}

// viewTable holds the outcomes of all views of one size that the letters can
// make, with the letters of a view in rising order: nodes do not differ but by
// name. TestViewsDoNotDependOnNames shows that.
type viewTable struct {
	letters  []letter
	outcomes map[[3]int]outcome
}

func (v viewTable) key(view []int) [3]int {
	key := [3]int{-1, -1, -1}
	copy(key[:], slices.Sorted(slices.Values(view)))
	return key
}

// each calls f for every rising view of size nodes.
func (v viewTable) each(size int, f func(view []int)) {
	view := make([]int, size)
	var fill func(at, from int)
	fill = func(at, from int) {
		if at == size {
			f(view)
			return
		}
		for l := from; l < len(v.letters); l++ {
			view[at] = l
			fill(at+1, l)
		}
	}
	fill(0, 0)
}

func (v viewTable) spelled(view []int) (letters []letter) {
	for _, l := range view {
		letters = append(letters, v.letters[l])
	}
	return letters
}

// Every full view of up to three nodes, and each part of it: a part never
// says installed, never more than the whole, and opens no gate.
func TestEveryPartialView(t *testing.T) {
	t.Parallel()
	for _, together := range []bool{false, true} {
		for size, letters := range map[int][]letter{1: fullAlphabet(), 2: alphabet(), 3: alphabet()} {
			t.Run(fmt.Sprintf("%d nodes, finalized together %v", size, together), func(t *testing.T) {
				t.Parallel()
				v := viewTable{letters, map[[3]int]outcome{}}
				v.each(size, func(view []int) {
					got := outcomeOf(t, v.spelled(view), together)
					if want := wantOutcome(v.spelled(view), together); got != want {
						t.Fatalf("%v:\ngot  %+v\nwant %+v", v.spelled(view), got, want)
					}
					v.outcomes[v.key(view)] = got
				})
				v.each(size, func(view []int) { v.checkParts(t, view) })
			})
		}
	}
}

func (v viewTable) checkParts(t *testing.T, view []int) {
	t.Helper()
	full := v.outcomes[v.key(view)]
	for without := 1; without < 1<<len(view); without++ {
		part, changed := slices.Clone(view), false
		for i, l := range view {
			if without&(1<<i) != 0 && v.letters[l].kind != "excluded" { // who is excluded is known
				part[i], changed = missing, true
			}
		}
		if !changed {
			continue
		}
		partial := v.outcomes[v.key(part)]
		wrong := ""
		switch {
		case partial.complete:
			wrong = "says that it is complete"
		case partial.state == clusterInstalled:
			wrong = "says installed"
		case statement[partial.state] > statement[full.state]:
			wrong = "claims more"
		}
		for gate, answers := range map[string][2]string{"start": {partial.start, full.start}, "start at 2": {partial.startAt, full.startAt}, "finalize 2": {partial.finish, full.finish}} {
			switch {
			case answers[0] == "yes":
				wrong = "says yes to " + gate
			case answers[0] == "no" && answers[1] != "no":
				wrong = "says no to " + gate
			}
		}
		if wrong != "" {
			t.Fatalf("%v with answers %03b missing %s:\nfull    %+v\npartial %+v", v.spelled(view), without, wrong, full, partial)
		}
	}
}

// Which node gives which answer changes the names and nothing else: all orders
// of two, and the turns of some views of three.
func TestViewsDoNotDependOnNames(t *testing.T) {
	t.Parallel()
	letters := alphabet()
	check := func(view []letter) {
		got := outcomeOf(t, view, true)
		if want := wantOutcome(view, true); got != want {
			t.Fatalf("%v:\ngot  %+v\nwant %+v", view, got, want)
		}
	}
	for i, a := range letters {
		for j, b := range letters {
			check([]letter{a, b})
			if c := letters[(7*i+3*j)%len(letters)]; (i+j)%8 == 0 {
				check([]letter{b, a, c})
				check([]letter{c, b, a})
				check([]letter{b, c, a})
			}
		}
	}
}

func TestClusterQueryCheck(t *testing.T) {
	t.Parallel()
	c := parsedConfig(t, "[cluster]\nnodes = n1 n2\n[upgrade]\nexclude = gone\n")
	tests := []struct {
		name  string
		q     clusterQuery
		asked []string
		want  string // in the error; empty: none
	}{
		{"nothing", clusterQuery{}, nil, ""},
		{"start", clusterQuery{gate: "start"}, []string{"n2"}, ""},
		{"start at a version", clusterQuery{gate: "start", version: "4.12"}, nil, ""},
		{"finalize", clusterQuery{gate: "finalize", version: "4.12"}, nil, ""},
		{"exclusion of node.conf that left", clusterQuery{exclude: []string{"gone"}}, nil, ""},
		{"exclusion of no member", clusterQuery{}, []string{"n3"}, `"n3"`},
		{"unknown gate", clusterQuery{gate: "stop"}, nil, "start, finalize"},
		{"finalize what", clusterQuery{gate: "finalize"}, nil, "version"},
		{"version of nothing", clusterQuery{version: "4.12"}, nil, "gate"},
		{"no version", clusterQuery{gate: "start", version: "four"}, nil, ""},
		{"not a version", clusterQuery{gate: "start", version: "4 12"}, nil, `"4 12"`},
	}
	for _, test := range tests {
		err := test.q.check(test.asked, c)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: error = %v, want %q", test.name, err, test.want)
		}
	}
}

// A status of another daemon, perhaps of another version, is not believed
// blindly: what does not hold together is no evidence.
func TestNodeStatusCheck(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		change func(n *nodeStatus)
		want   answerKind
	}{
		{"good", func(*nodeStatus) {}, answerOK},
		{"another node", func(n *nodeStatus) { n.Nodename = "n2" }, answerWrongNode},
		{"unknown state", func(n *nodeStatus) { n.State = "fine" }, answerBadReply},
		{"no state", func(n *nodeStatus) { n.State = "" }, answerBadReply},
		{"no installed version", func(n *nodeStatus) { n.Installed.Version = "" }, answerBadReply},
		{"no installed version, unfinalized", func(n *nodeStatus) { n.State, n.Installed.Version = nodeUnfinalized, "" }, answerBadReply},
		{"finalized without a version", func(n *nodeStatus) { n.Finalized.Version = "" }, answerBadReply},
		{"unfinalized without a version", func(n *nodeStatus) { n.State, n.Finalized.Version = nodeUnfinalized, "" }, answerOK},
		{"versions that do not read", func(n *nodeStatus) { n.Installed.Version = "4 12" }, answerBadReply},
		{"finalized version that does not read", func(n *nodeStatus) { n.Finalized.Version = "é" }, answerBadReply},
		{"unreadable, whatever its versions are", func(n *nodeStatus) { n.State, n.Installed.Version = nodeUnreadable, "é" }, answerOK},
	}
	for _, test := range tests {
		n := answered(t, []string{"n1"}, 0, "4.12", "4.12").Node
		test.change(n)
		if got := kindOf(n.check("n1", versionOrder{})); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

// The JSON is what scripts read: lists are never null, versions are if there
// are none.
func TestClusterStatusJSON(t *testing.T) {
	t.Parallel()
	members, nodes := viewOf(t, "timeout excluded")
	nodes["n1"].LastKnown, nodes["n2"].LastKnown = nil, nil
	got, err := json.Marshal(rulesOf(members).summarize(nodes))
	want := `{"schema":1,"state":"unknown","complete":false,"stalled":false,"product":null,"from":null,"to":null,` +
		`"done":[],"installed":[],"pending":[],"unknown":["n1"],"excluded":["n2"],` +
		`"reasons":[{"code":"timeout","message":"n1 did not answer: why"}],` +
		`"nodes":{"n1":{"answer":"timeout","error":"why","bucket":"unknown"},"n2":{"answer":"excluded","error":"why","bucket":"excluded"}}}`
	if err != nil || string(got) != want {
		t.Errorf("got  %s, %v\nwant %s", got, err, want)
	}
}

// peerNetwork reaches peers that behave in their own way.
type peerNetwork struct {
	network
	peers map[string]func() (net.Conn, error)
}

func (n peerNetwork) dial(_ context.Context, host string, _ int) (net.Conn, error) {
	return n.peers[host]()
}

// testPeer takes one envelope and answers with what reply makes of it, then
// closes; without a reply it reads on and says nothing.
func testPeer(reply func(request salt) []byte) func() (net.Conn, error) {
	return func() (net.Conn, error) {
		near, far := net.Pipe()
		go func() {
			defer far.Close()
			raw, err := bufio.NewReader(far).ReadBytes(0)
			if err != nil {
				return
			}
			if reply == nil {
				io.Copy(io.Discard, far)
				return
			}
			if e, err := parseEnvelope(raw[:len(raw)-1]); err == nil {
				far.Write(reply(e.salt))
			}
		}()
		return near, nil
	}
}

// statusReply seals a reply in the name of node.
func statusReply(node string, message string) func(salt) []byte {
	return func(request salt) []byte {
		wire, _ := seal(testKey(1), messageContext{label: labelReply, cluster: "default", node: node, request: &request}, []byte(message))
		return wire
	}
}

// statusDaemon is as much of a daemon as a status needs. Its release file says
// 4.12, which is finalized.
func statusDaemon(t *testing.T, text string) *daemon {
	t.Helper()
	p := testFolders(t)
	release := filepath.Join(p.etc, "release")
	writeText(t, release, "NetEye release 4.12 (Core)\n")
	writeText(t, p.finalized(), "4.12\n")
	d := &daemon{
		paths: p, id: "daemon of n1", run: runCommand, peers: newPeerTrust(time.Now),
		journal: openJournal(p.journal(), slog.New(slog.DiscardHandler)), log: slog.New(slog.DiscardHandler),
	}
	d.heartbeats = newHeartbeats(d)
	d.config.Store(parsedConfig(t, text+"\n[release]\nfile = "+release+"\n"))
	ring := &keyring{cluster: "default", ready: make(chan struct{}), keys: []masterKey{testKey(1)}}
	close(ring.ready)
	d.keys.Store(ring)
	return d
}

// Each way not to answer has its row and its reason, and the status is there
// in time although one peer accepts and never answers. Not parallel, so that
// the race detector, which watches here, blames no other test.
func TestClusterStatusAsks(t *testing.T) {
	d := statusDaemon(t, "[cluster]\nnodes = n1 good silent refused unresolved closed garbage other old liar excluded\n[status]\nnode_timeout = 500ms\n")
	good, err := json.Marshal(answered(t, d.config.Load().members(), 1, "4.12", "4.12").Node)
	if err != nil {
		t.Fatal(err)
	}
	fails := func(err error) func() (net.Conn, error) { return func() (net.Conn, error) { return nil, err } }
	d.network = peerNetwork{peers: map[string]func() (net.Conn, error){
		"good":       testPeer(statusReply("good", fmt.Sprintf(`{"time":1,"status":0,"data":%s}`, good))),
		"silent":     testPeer(nil),
		"refused":    fails(fmt.Errorf("dial: %w", unix.ECONNREFUSED)),
		"unresolved": fails(&net.DNSError{Err: "no such host", Name: "unresolved", IsNotFound: true}),
		"closed":     testPeer(func(salt) []byte { return nil }),
		"garbage":    testPeer(func(salt) []byte { return []byte("garbage\x00") }),
		"other":      testPeer(statusReply("good", `{"time":1,"status":0,"data":null}`)),
		"old":        testPeer(statusReply("old", `{"time":1,"status":1,"error":"unknown action \"node_status\""}`)),
		"liar":       testPeer(statusReply("liar", fmt.Sprintf(`{"time":1,"status":0,"data":%s}`, strings.Replace(string(good), `"nodename":"good"`, `"nodename":"liar"`, 1)))),
		"excluded":   fails(fmt.Errorf("an excluded node was asked")),
	}}
	begun := time.Now()
	s := d.clusterStatus(t.Context(), clusterQuery{timeout: 5 * time.Second, exclude: []string{"excluded"}, gate: gateStart})
	if took := time.Since(begun); took > 4*time.Second {
		t.Errorf("the status took %s, with 500ms for a node", took)
	}
	for node, want := range map[string]answerKind{
		"n1": answerOK, "good": answerOK, "silent": answerTimeout, "refused": answerRefused, "unresolved": answerUnresolved,
		"closed": answerDenied, "garbage": answerBadReply, "other": answerWrongNode, "old": answerUnsupported, "liar": answerOK, "excluded": answerExcluded,
	} {
		if got := s.Nodes[node]; got == nil || got.Answer != want || (want != answerOK && want != answerExcluded) != (got.Error != "") {
			t.Errorf("%s: %+v, want %s", node, got, want)
		}
	}
	if s.State != clusterUnknown || s.Complete || s.Gate.Answer != "unknown" || string(s.To) != "4.12" {
		t.Errorf("status = %s, gate %s", summaryText(s), s.Gate.Answer)
	}
	// good and liar are answered under one daemon id.
	if !slices.ContainsFunc(s.Reasons, func(r reason) bool { return r.Code == "one_daemon" && strings.Contains(r.Message, "liar") }) {
		t.Errorf("reasons: %v", s.Reasons)
	}
}

// The whole takes no longer than its own timeout either.
func TestClusterStatusKeepsItsTimeout(t *testing.T) {
	t.Parallel()
	d := statusDaemon(t, "[cluster]\nnodes = n1 n2 n3\n")
	d.network = peerNetwork{peers: map[string]func() (net.Conn, error){"n2": testPeer(nil), "n3": testPeer(nil)}}
	begun := time.Now()
	s := d.clusterStatus(t.Context(), clusterQuery{timeout: 200 * time.Millisecond})
	if took := time.Since(begun); took > 2500*time.Millisecond { // status.node_timeout is 3s
		t.Errorf("a status with a timeout of 200ms took %s", took)
	}
	if got, want := summaryText(s), "unknown incomplete →4.12 done=n1 unknown=n2,n3"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// Nor when it is this node that does not tell, on a disk that hangs.
func TestClusterStatusWithoutThisNode(t *testing.T) {
	t.Parallel()
	d := statusDaemon(t, "[release]\ncommand = hangs\n[status]\nnode_timeout = 50ms\n")
	end := make(chan struct{})
	defer close(end)
	d.run = func(context.Context, []string, io.Writer, io.Writer) (int, error) { <-end; return 0, io.EOF }
	s := d.clusterStatus(t.Context(), clusterQuery{timeout: 5 * time.Second})
	if got, want := summaryText(s), "unknown incomplete → unknown=n1"; got != want || s.Nodes["n1"].Answer != answerTimeout {
		t.Errorf("got %s, %s; want %s", got, s.Nodes["n1"].Answer, want)
	}
}

// A member that is down is shown with what it said last, and that counts for
// nothing. What it could not read itself is not what it said last.
func TestClusterStatusRemembersTheLastAnswer(t *testing.T) {
	t.Parallel()
	d := statusDaemon(t, "[cluster]\nnodes = n1 n2\n")
	status := func(installed, finalized string) string {
		n := answered(t, []string{"n1", "n2"}, 1, installed, finalized).Node
		data, err := json.Marshal(n)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf(`{"time":1,"status":0,"data":%s}`, data)
	}
	ask := func(peer func() (net.Conn, error)) *nodeAnswer {
		d.network = peerNetwork{peers: map[string]func() (net.Conn, error){"n2": peer}}
		return d.clusterStatus(t.Context(), clusterQuery{timeout: 5 * time.Second}).Nodes["n2"]
	}
	down := func() (net.Conn, error) { return nil, unix.ECONNREFUSED }
	if a := ask(down); a.LastKnown != nil {
		t.Errorf("of a node that never answered, the last is %+v", a.LastKnown)
	}
	ask(testPeer(statusReply("n2", status("4.12", "4.11"))))
	for _, then := range []string{"down", "unreadable, then down"} {
		if then != "down" {
			ask(testPeer(statusReply("n2", status("", ""))))
		}
		a := ask(down)
		if a.LastKnown == nil || a.LastKnown.Installed != "4.12" || a.LastKnown.Finalized != "4.11" || a.Bucket != bucketUnknown {
			t.Errorf("%s: %+v, last known %+v; want 4.12, 4.11", then, a, a.LastKnown)
		}
	}
}
