// upgrade.go: the cluster status: is an upgrade in progress, from what to
// what, who is missing (installation-status.md). Asking is apart from judging;
// the judgement, summarize, is a pure function.

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// clusterState is the answer of a cluster, in short.
type clusterState string

const (
	clusterInconsistent clusterState = "inconsistent"
	clusterUpgrading    clusterState = "upgrading"
	clusterUnknown      clusterState = "unknown"
	clusterInstalled    clusterState = "installed"
)

// clusterStatus is the JSON of the cluster status.
type clusterStatus struct {
	Schema    int                    `json:"schema"`
	State     clusterState           `json:"state"`
	Complete  bool                   `json:"complete"` // every node that is not excluded told its versions
	Stalled   bool                   `json:"stalled"`
	Product   nullable               `json:"product"`
	From      nullable               `json:"from"`
	To        nullable               `json:"to"`
	Done      []string               `json:"done"`
	Installed []string               `json:"installed"`
	Pending   []string               `json:"pending"`
	Unknown   []string               `json:"unknown"`
	Excluded  []string               `json:"excluded"`
	Reasons   reasons                `json:"reasons"`
	Nodes     map[string]*nodeAnswer `json:"nodes"`
	Gate      *gateStatus            `json:"gate,omitempty"`
}

// bucket is where a node stands on its way to the highest installed version.
type bucket string

const (
	bucketDone      bucket = "done"
	bucketInstalled bucket = "installed"
	bucketPending   bucket = "pending"
	bucketUnknown   bucket = "unknown"
	bucketExcluded  bucket = "excluded"
)

// answerExcluded: not asked.
const answerExcluded answerKind = "excluded"

// nodeAnswer is a row of the table.
type nodeAnswer struct {
	Answer    answerKind    `json:"answer"`
	Error     string        `json:"error,omitempty"`
	Bucket    bucket        `json:"bucket"`
	Node      *nodeStatus   `json:"node,omitempty"`
	LastKnown *lastVersions `json:"last_known,omitempty"`
}

// lastVersions is what a node said the last time that it answered this daemon.
type lastVersions struct {
	Installed nullable  `json:"installed"`
	Finalized nullable  `json:"finalized"`
	At        time.Time `json:"at"`
	Age       int       `json:"age"` // seconds
}

// readable tells whether the answer counts as evidence of versions.
func (a *nodeAnswer) readable() bool {
	return a.Answer == answerOK && a.Node.State != nodeUnreadable
}

// clusterQuery is what cluster_status is asked.
type clusterQuery struct {
	timeout       time.Duration
	exclude       []string
	gate, version string
}

// check refuses what makes no sense. asked are the exclusions of this request:
// those of node.conf may name nodes that left.
func (q clusterQuery) check(asked []string, c *config) error {
	for _, node := range asked {
		if !c.isMember(node) {
			return fmt.Errorf("cannot exclude %q: it is not in cluster.nodes (%s)", shortened(node), strings.Join(c.members(), " "))
		}
	}
	if q.version != "" {
		if _, err := c.order().parse(q.version); err != nil {
			return err
		}
	}
	switch {
	case q.gate != "" && q.gate != gateStart && q.gate != gateFinalize:
		return fmt.Errorf("unknown gate %q; there are: %s, %s", shortened(q.gate), gateStart, gateFinalize)
	case q.gate == gateFinalize && q.version == "":
		return errors.New("the gate finalize needs the version that all nodes shall have installed")
	case q.gate == "" && q.version != "":
		return errors.New("a version goes with a gate")
	}
	return nil
}

// clusterStatus asks all members in parallel. It returns within the timeout
// even if a node, this one included, does not.
func (d *daemon) clusterStatus(ctx context.Context, q clusterQuery) clusterStatus {
	c := d.config.Load()
	ctx, cancel := context.WithTimeout(ctx, q.timeout)
	defer cancel()
	var mu sync.Mutex
	nodes := map[string]*nodeAnswer{}
	var asking sync.WaitGroup
	for _, node := range c.members() {
		asking.Go(func() {
			answer := &nodeAnswer{Answer: answerExcluded, LastKnown: d.lastKnown.of(node)}
			if !slices.Contains(q.exclude, node) {
				ctx, cancel := context.WithTimeout(ctx, c.duration("status.node_timeout"))
				defer cancel()
				answer = d.askNodeStatus(ctx, c, node)
			}
			mu.Lock()
			defer mu.Unlock()
			nodes[node] = answer
		})
	}
	asking.Wait()
	rules := summaryRules{
		members: c.members(), order: c.order(), product: c.text("release.product"),
		finalizeTogether: c.text("upgrade.finalize") == "cluster", stallAfter: c.duration("upgrade.stall_after"), now: time.Now(),
	}
	s := rules.summarize(nodes)
	if q.gate != "" {
		s.Gate = rules.gate(q, s)
	}
	return s
}

// askNodeStatus makes the row of one node.
func (d *daemon) askNodeStatus(ctx context.Context, c *config, node string) *nodeAnswer {
	if node == c.node {
		own := make(chan nodeStatus, 1)
		go func() { own <- d.nodeStatus(ctx) }() // may hang on a file, and is then left to it
		select {
		case s := <-own:
			return &nodeAnswer{Answer: answerOK, Node: &s}
		case <-ctx.Done():
			return &nodeAnswer{Answer: answerTimeout, Error: "its files or hooks did not tell in time", LastKnown: d.lastKnown.of(node)}
		}
	}
	s, err := d.peerNodeStatus(ctx, c, node)
	if err != nil {
		return &nodeAnswer{Answer: kindOf(err), Error: err.Error(), LastKnown: d.lastKnown.of(node)}
	}
	if s.State != nodeUnreadable {
		d.lastKnown.keep(node, s)
	}
	return &nodeAnswer{Answer: answerOK, Node: s}
}

func (d *daemon) peerNodeStatus(ctx context.Context, c *config, node string) (*nodeStatus, error) {
	s := new(nodeStatus)
	if err := d.askPeer(ctx, c, node, "node_status", nil, dataOf(s)); err != nil {
		return nil, err
	}
	return s, s.check(node, c.order())
}

// check finds what a status of another daemon must not be.
func (s *nodeStatus) check(node string, order versionOrder) error {
	bad := func(format string, args ...any) error {
		return &answerError{kind: answerBadReply, err: fmt.Errorf(format, args...)}
	}
	if s.Nodename != node {
		return &answerError{kind: answerWrongNode, err: fmt.Errorf("the status is of %q", shortened(s.Nodename))}
	}
	switch s.State {
	case nodeUnreadable:
		return nil
	case nodeFinalized, nodeUnfinalized, nodeDowngraded:
	default:
		return bad("unknown state %q", shortened(string(s.State)))
	}
	for _, v := range []nullable{s.Installed.Version, s.Finalized.Version} {
		if _, err := order.parse(string(v)); err != nil && (v != "" || s.State != nodeUnfinalized) {
			return bad("%w", err)
		}
	}
	if s.Installed.Version == "" {
		return bad("no installed version")
	}
	return nil
}

// lastKnown keeps the last answers of the members, in memory.
type lastKnown struct {
	mu    sync.Mutex
	nodes map[string]lastVersions
}

func (k *lastKnown) keep(node string, s *nodeStatus) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.nodes == nil {
		k.nodes = map[string]lastVersions{}
	}
	k.nodes[node] = lastVersions{Installed: s.Installed.Version, Finalized: s.Finalized.Version, At: time.Now().UTC().Truncate(time.Second)}
}

func (k *lastKnown) of(node string) *lastVersions {
	k.mu.Lock()
	defer k.mu.Unlock()
	v, known := k.nodes[node]
	if !known {
		return nil
	}
	v.Age = int(time.Since(v.At).Seconds())
	return &v
}

// summaryRules are what of the configuration bears on the judgement.
type summaryRules struct {
	members          []string
	order            versionOrder
	product          string // expected; empty: any
	finalizeTogether bool   // no node is finalized before all have installed
	stallAfter       time.Duration
	now              time.Time
}

// summarize judges the answers: definite evidence beats missing evidence, and
// missing evidence beats "fine". Adding an answer never takes evidence away.
func (r summaryRules) summarize(nodes map[string]*nodeAnswer) clusterStatus {
	s := clusterStatus{
		Schema: 1, Nodes: nodes, Reasons: []reason{},
		Done: []string{}, Installed: []string{}, Pending: []string{}, Unknown: []string{}, Excluded: []string{},
	}
	for _, node := range r.members {
		if nodes[node] == nil {
			nodes[node] = &nodeAnswer{Answer: answerTimeout, Error: "not asked"}
		}
	}
	r.versions(&s)
	r.buckets(&s)
	s.Complete = len(s.Unknown) == 0
	for _, judgement := range []struct {
		state   clusterState
		reasons []reason
	}{
		{clusterInconsistent, r.inconsistencies(&s)},
		{clusterUpgrading, r.upgrades(&s)},
		{clusterUnknown, r.doubts(&s)},
	} {
		if len(judgement.reasons) > 0 && s.State == "" {
			s.State = judgement.state
		}
		s.Reasons = append(s.Reasons, judgement.reasons...)
	}
	if s.State == "" {
		s.State = clusterInstalled
	}
	s.Stalled = s.State == clusterUpgrading && s.Complete && r.stalled(&s)
	return s
}

// evidence lists the nodes that told their versions, in the order of members.
func (r summaryRules) evidence(s *clusterStatus) []string {
	return slices.DeleteFunc(slices.Clone(r.members), func(node string) bool { return !s.Nodes[node].readable() })
}

// distinct returns the versions of the evidence, lowest first, one of each
// that compare as equal.
func (r summaryRules) distinct(s *clusterStatus) []string {
	var all []string
	for _, node := range r.evidence(s) {
		n := s.Nodes[node].Node
		for _, v := range []nullable{n.Installed.Version, n.Finalized.Version} {
			if v != "" {
				all = append(all, string(v))
			}
		}
	}
	slices.SortStableFunc(all, r.order.compare)
	return slices.CompactFunc(all, func(a, b string) bool { return r.order.compare(a, b) == 0 })
}

// versions sets to, from and product.
func (r summaryRules) versions(s *clusterStatus) {
	journals := []string{}
	for _, node := range r.evidence(s) {
		n := s.Nodes[node].Node
		if s.To == "" || r.order.compare(string(n.Installed.Version), string(s.To)) > 0 {
			s.To = n.Installed.Version
		}
		if s.Product == "" {
			s.Product = n.Product
		}
		if n.Previous != nil {
			journals = append(journals, n.Previous.Version)
		}
	}
	slices.SortStableFunc(journals, r.order.compare)
	for _, v := range append(r.distinct(s), journals...) {
		if r.order.compare(v, string(s.To)) != 0 {
			s.From = nullable(v)
			return
		}
	}
}

func (r summaryRules) buckets(s *clusterStatus) {
	lists := map[bucket]*[]string{bucketDone: &s.Done, bucketInstalled: &s.Installed, bucketPending: &s.Pending, bucketUnknown: &s.Unknown, bucketExcluded: &s.Excluded}
	for _, node := range r.members {
		a := s.Nodes[node]
		a.Bucket = r.bucket(a, string(s.To))
		list := lists[a.Bucket]
		*list = append(*list, node)
	}
}

func (r summaryRules) bucket(a *nodeAnswer, to string) bucket {
	switch {
	case a.Answer == answerExcluded:
		return bucketExcluded
	case !a.readable():
		return bucketUnknown
	case r.order.compare(string(a.Node.Installed.Version), to) < 0:
		return bucketPending
	case a.Node.State == nodeFinalized:
		return bucketDone
	}
	return bucketInstalled
}

func (r summaryRules) inconsistencies(s *clusterStatus) (reasons []reason) {
	products := map[string][]string{}
	if r.product != "" {
		products[r.product] = []string{"release.product"}
	}
	finalized, behind := []string{}, []string{}
	for _, node := range r.evidence(s) {
		n := s.Nodes[node].Node
		if n.Product != "" {
			products[string(n.Product)] = append(products[string(n.Product)], node)
		}
		if n.State == nodeDowngraded {
			reasons = append(reasons, reason{"downgraded", fmt.Sprintf("%s: %s is installed, %s is finalized", node, n.Installed.Version, n.Finalized.Version)})
		}
		if r.order.compare(string(n.Installed.Version), string(s.To)) < 0 {
			behind = append(behind, node)
		} else if n.State == nodeFinalized {
			finalized = append(finalized, node)
		}
	}
	if len(products) > 1 {
		var parts []string
		for _, product := range slices.Sorted(maps.Keys(products)) {
			parts = append(parts, fmt.Sprintf("%s (%s)", product, strings.Join(products[product], " ")))
		}
		reasons = append(reasons, reason{"products_differ", "the products differ: " + strings.Join(parts, ", ")})
	}
	if versions := r.distinct(s); len(versions) > 2 {
		reasons = append(reasons, reason{"many_versions", "more than two versions at once: " + strings.Join(versions, ", ")})
	}
	if r.finalizeTogether && len(finalized) > 0 && len(behind) > 0 {
		reasons = append(reasons, reason{"finalized_early", fmt.Sprintf("%s is finalized on %s, and not installed on %s", s.To, strings.Join(finalized, " "), strings.Join(behind, " "))})
	}
	return reasons
}

// upgrades are the nodes that are not where all shall be. Two versions among
// nodes of which none is downgraded are such a node.
func (r summaryRules) upgrades(s *clusterStatus) (reasons []reason) {
	for _, node := range r.evidence(s) {
		n := s.Nodes[node].Node
		if n.State == nodeUnfinalized {
			reasons = append(reasons, reason{"not_finalized", node + ": " + n.Reasons.text()})
		} else if r.order.compare(string(n.Installed.Version), string(s.To)) < 0 {
			reasons = append(reasons, reason{"not_installed", fmt.Sprintf("%s: %s is installed, not %s", node, n.Installed.Version, s.To)})
		}
	}
	return reasons
}

// doubts are why a cluster that looks fine may not be.
func (r summaryRules) doubts(s *clusterStatus) (reasons []reason) {
	daemons := map[string]string{}
	for _, node := range r.members {
		a := s.Nodes[node]
		switch {
		case a.Answer == answerExcluded:
			continue
		case a.Answer != answerOK:
			reasons = append(reasons, reason{string(a.Answer), node + " did not answer: " + a.Error})
			continue
		case !a.readable():
			reasons = append(reasons, reason{"unreadable", node + ": " + a.Node.Reasons.text()})
		}
		if missing, extra := difference(r.members, a.Node.ClusterNodes), difference(a.Node.ClusterNodes, r.members); len(missing)+len(extra) > 0 {
			reasons = append(reasons, reason{"members_differ", listDifference(node, missing, extra)})
		}
		if other, twice := daemons[a.Node.DaemonID]; twice {
			reasons = append(reasons, reason{"one_daemon", fmt.Sprintf("%s and %s are answered by one daemon", other, node)})
		}
		daemons[a.Node.DaemonID] = node
	}
	if len(s.Excluded) == len(r.members) {
		reasons = append(reasons, reason{"all_excluded", "every node is excluded"})
	}
	return reasons
}

// difference returns what is in a and not in b.
func difference(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}

func listDifference(node string, missing, extra []string) string {
	var parts []string
	if len(missing) > 0 {
		parts = append(parts, "does not list "+strings.Join(missing, " "))
	}
	if len(extra) > 0 {
		parts = append(parts, "lists also "+strings.Join(extra, " "))
	}
	return "cluster.nodes differ: " + node + " " + strings.Join(parts, " and ")
}

// stalled tells whether the last change is too long ago.
func (r summaryRules) stalled(s *clusterStatus) bool {
	var last time.Time
	for _, node := range r.evidence(s) {
		n := s.Nodes[node].Node
		for _, since := range []*time.Time{n.Installed.Since, n.Finalized.Since} {
			if since != nil && since.After(last) {
				last = *since
			}
		}
	}
	return !last.IsZero() && r.now.Sub(last) > r.stallAfter
}

// The questions that a script asks before it goes on.
const (
	gateStart    = "start"    // is the cluster installed and complete (and at V)?
	gateFinalize = "finalize" // has every member installed V?
)

// gateStatus is the answer to such a question: yes, no, unknown.
type gateStatus struct {
	Name    string   `json:"name"`
	Version nullable `json:"version"`
	Answer  string   `json:"answer"`
	Why     string   `json:"why"`
}

func (r summaryRules) gate(q clusterQuery, s clusterStatus) *gateStatus {
	g := &gateStatus{Name: q.gate, Version: nullable(q.version)}
	if q.version != "" {
		for _, node := range r.evidence(&s) {
			if v := s.Nodes[node].Node.Installed.Version; r.order.compare(string(v), q.version) != 0 {
				g.Answer, g.Why = "no", fmt.Sprintf("%s has %s installed, not %s", node, v, q.version)
				return g
			}
		}
	}
	doubts := r.doubts(&s)
	switch {
	case q.gate == gateStart && (s.State == clusterUpgrading || s.State == clusterInconsistent):
		g.Answer, g.Why = "no", "the cluster is "+string(s.State)+": "+s.Reasons[0].Message
	case len(doubts) > 0:
		g.Answer, g.Why = "unknown", doubts[0].Message
	case q.gate == gateStart:
		g.Answer, g.Why = "yes", fmt.Sprintf("%s is installed and finalized on every node", s.To)
	default:
		g.Answer, g.Why = "yes", fmt.Sprintf("%s is installed on every node", q.version)
	}
	return g
}
