// request.go: the table of actions (design.md §5), the types of their
// options, their handlers, and the form of requests and replies. Where a
// request came from, and whether it was sealed, matters only until it is here.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// request is one that may be executed.
type request struct {
	action  string
	options options
	sender  string // nodename; empty on the local socket
}

// reply is one frame of an answer. Status is 0 with data, or 1 with an error.
type reply struct {
	Time    int64  `json:"time"` // unix ms of the window clock (replay.go)
	Status  int    `json:"status"`
	Error   string `json:"error,omitempty"`
	Data    any    `json:"data,omitempty"`
	Sources any    `json:"sources,omitempty"` // daemon_blacklist_status
	More    bool   `json:"more,omitempty"`    // another frame follows

	// stream, unless nil, makes what is sent instead of this reply: the frames
	// that it emits, and one without data at its end (send).
	stream func(ctx context.Context, emit func(data any) error) error
}

// replyOf makes the reply of data or of err. Data stands in every reply with
// status 0, if only as null.
func replyOf(d *daemon, data any, err error) reply {
	r := reply{Time: d.replay.now(), Data: data}
	switch {
	case err != nil:
		r.Status, r.Error, r.Data = 1, err.Error(), nil
	case data == nil:
		r.Data = json.RawMessage("null")
	}
	return r
}

// action is what a request can ask for.
type action struct {
	options map[string]optionType
	do      func(ctx context.Context, d *daemon, o options) (reply, error)
}

// optionType says what an option's value is in JSON, and how a person writes
// it.
type optionType int

const (
	optionText     optionType = iota
	optionFlag                // true, false
	optionList                // of strings
	optionDuration            // as in node.conf: "5s"
	optionNumber              // an integer; sizes as in node.conf too: "10k"
)

func (t optionType) String() string {
	return [...]string{"a string", "true or false", `a list of strings, as ["a", "b"]`, `a duration such as "5s"`, `an integer, or a size such as "10k"`}[t]
}

var actions = map[string]action{
	"daemon_blacklist_clear":  {nil, handleBlacklistClear},
	"daemon_blacklist_status": {nil, handleBlacklistStatus},
	"daemon_status":           {map[string]optionType{"svcname": optionText}, handleDaemonStatus},
	"daemon_start":            {map[string]optionType{"thr_id": optionText}, handleDaemonStart},
	"daemon_stop":             {map[string]optionType{"thr_id": optionText, "force": optionFlag}, handleDaemonStop},
	"daemon_shutdown":         {nil, handleDaemonShutdown},
	"node_status":             {nil, handleNodeStatus},
	"cluster_status": {map[string]optionType{
		"timeout": optionDuration, "exclude": optionList, "gate": optionText, "version": optionText,
	}, handleClusterStatus},
	"node_data":           {map[string]optionType{"node": optionText, "epoch": optionNumber, "since": optionNumber}, handleNodeData},
	"ping":                {nil, handlePing},
	"get_service_config":  {onService(nil), handleServiceConfig},
	"clear":               {onService(nil), handleClear},
	"get_service_monitor": {onService(nil), handleServiceMonitor},
	"set_service_monitor": {onService(map[string]optionType{
		"status": optionText, "local_expect": optionText, "global_expect": optionText, "reset_retries": optionFlag, "rid": optionList,
	}), handleSetServiceMonitor},
	"set_node_monitor": {map[string]optionType{
		"status": optionText, "local_expect": optionText, "global_expect": optionText,
	}, handleSetNodeMonitor},
	"service_action": {onService(map[string]optionType{
		"command": optionList, "cmd": optionList, "sync": optionFlag,
	}), handleServiceAction},
	"service_logs": {onService(map[string]optionType{"backlog": optionNumber, "follow": optionFlag}), handleServiceLogs},
}

// options are values of the types that the action names; those that were not
// given are absent.
type options map[string]any

func (o options) text(name string) string { s, _ := o[name].(string); return s }
func (o options) flag(name string) bool   { f, _ := o[name].(bool); return f }
func (o options) list(name string) []string {
	l, _ := o[name].([]string)
	return l
}
func (o options) duration(name string, otherwise time.Duration) time.Duration {
	if d, ok := o[name].(time.Duration); ok {
		return d
	}
	return otherwise
}
func (o options) number(name string, otherwise int64) int64 {
	if n, ok := o[name].(int64); ok {
		return n
	}
	return otherwise
}

// requestJSON is a request as it is written.
type requestJSON struct {
	Time    *int64                     `json:"time,omitempty"`
	To      string                     `json:"to,omitempty"`
	Action  string                     `json:"action"`
	Options map[string]json.RawMessage `json:"options"`
}

func parseRequestJSON(message []byte) (requestJSON, error) {
	var written requestJSON
	if err := json.Unmarshal(message, &written); err != nil {
		return written, fmt.Errorf(`the request is not of the form {"action": "…", "options": {…}}: %w`, err)
	}
	return written, nil
}

// parseRequest checks the action and the types of its options.
func parseRequest(written requestJSON, sender string) (request, error) {
	r := request{action: written.Action, options: options{}, sender: sender}
	a, known := actions[written.Action]
	if !known {
		return r, fmt.Errorf("unknown action %q; there are: %s", shortened(written.Action), strings.Join(slices.Sorted(maps.Keys(actions)), ", "))
	}
	for _, name := range slices.Sorted(maps.Keys(written.Options)) {
		raw := written.Options[name]
		t, known := a.options[name]
		if !known {
			return r, unknownOption(written.Action, name)
		}
		if string(raw) == "null" {
			continue // not given
		}
		v, err := t.decode(raw)
		if err != nil {
			return r, fmt.Errorf("option %q of %s must be %s, not %s", name, written.Action, t, shortened(string(raw)))
		}
		r.options[name] = v
	}
	return r, nil
}

func unknownOption(action, name string) error {
	known := slices.Sorted(maps.Keys(actions[action].options))
	if len(known) == 0 {
		return fmt.Errorf("unknown option %q: %s takes none", shortened(name), action)
	}
	return fmt.Errorf("unknown option %q of %s; there are: %s", shortened(name), action, strings.Join(known, ", "))
}

// shortened quotes what an outsider wrote, up to a bound.
func shortened(s string) string {
	if len(s) > 60 {
		s = strings.ToValidUTF8(s[:60], "") + "…"
	}
	return s
}

func (t optionType) decode(raw json.RawMessage) (any, error) {
	switch t {
	case optionFlag:
		var v bool
		err := json.Unmarshal(raw, &v)
		return v, err
	case optionNumber:
		var v int64
		if !bytes.HasPrefix(raw, []byte(`"`)) {
			err := json.Unmarshal(raw, &v)
			return v, err
		}
	case optionList:
		var v []*string
		if err := json.Unmarshal(raw, &v); err != nil {
			return nil, err
		}
		list := make([]string, len(v))
		for i, text := range v {
			if text == nil {
				return nil, errors.New("null in a list")
			}
			list[i] = *text
		}
		return list, nil
	}
	var text string
	if err := json.Unmarshal(raw, &text); err != nil {
		return nil, err
	}
	switch t {
	case optionDuration:
		return parseDuration(text)
	case optionNumber:
		return parseSize(text)
	}
	return text, nil
}

// encode writes what a person typed for an option as JSON.
func (t optionType) encode(text string) (json.RawMessage, error) {
	var v any = text
	switch t {
	case optionFlag:
		flag, err := strconv.ParseBool(text)
		if err != nil {
			return nil, fmt.Errorf("%q is not %s", text, t)
		}
		v = flag
	case optionNumber:
		n, err := parseSize(text)
		if err != nil {
			return nil, err
		}
		v = n
	case optionList:
		var list []string
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			return nil, fmt.Errorf("%q is not %s", text, t)
		}
		v = list
	}
	return json.Marshal(v)
}

// readSealed takes a message that opened through the last steps of
// validation. Its errors are told to the sender.
func (d *daemon) readSealed(message []byte, e envelope, c *config, joining bool) (request, error) {
	written, err := parseRequestJSON(message)
	switch {
	case err != nil:
		return request{}, err
	case written.Time == nil:
		return request{}, errors.New("the request has no time (unix milliseconds)")
	}
	if err := d.replay.accept(e.salt, *written.Time, c.duration("listener.max_clock_skew")); err != nil {
		return request{}, err
	}
	switch {
	case written.To != c.node:
		return request{}, fmt.Errorf("this is node %q, and the request is for %q; check listener.addr@%s", c.node, shortened(written.To), shortened(written.To))
	case joining && written.Action != "join":
		return request{}, fmt.Errorf("in the name of cluster %q there is one action, join", joinCluster)
	}
	return parseRequest(written, e.node)
}

// execute runs the handler of r.
func (d *daemon) execute(ctx context.Context, r request) (answer reply, err error) {
	failure := guarded(func() error {
		answer, err = actions[r.action].do(ctx, d, r.options)
		return nil
	})
	if failure != nil {
		d.log.Error("a request failed", "action", r.action, "from", r.sender, "err", failure)
		return reply{}, fmt.Errorf("%s failed by an error in agentd; its log says more", r.action)
	}
	return answer, err
}

// errStreamEnds is told to those whose stream the daemon ends.
var errStreamEnds = errors.New("the daemon, or its listener, is stopping")

// send has write send a reply, or each frame of a stream. It returns write's
// error: the client is gone, or reads too slowly.
func (d *daemon) send(ctx context.Context, r reply, write func(reply) error) error {
	if r.stream == nil {
		return write(r)
	}
	defer d.streams.Add(-1)
	if d.streams.Add(1) > streamLimit {
		return write(replyOf(d, nil, fmt.Errorf("%d streams are served already; end one of them", streamLimit)))
	}
	var lost, err error
	failure := guarded(func() error {
		err = r.stream(ctx, func(data any) error {
			if ctx.Err() != nil {
				return errStreamEnds
			}
			frame := replyOf(d, data, nil)
			frame.More = true
			lost = write(frame)
			return lost
		})
		return nil
	})
	if failure != nil {
		d.log.Error("a stream failed", "err", failure)
		err = errors.New("the stream failed by an error in agentd; its log says more")
	}
	if lost != nil {
		return lost
	}
	return write(replyOf(d, nil, err))
}

func handlePing(_ context.Context, d *daemon, _ options) (reply, error) {
	return replyOf(d, map[string]string{"nodename": d.config.Load().node, "agent": agentVersion}, nil), nil
}

func handleBlacklistClear(_ context.Context, d *daemon, _ options) (reply, error) {
	d.log.Info("blacklist cleared", "entries", d.blacklist.clear(everySender))
	return replyOf(d, nil, nil), nil
}

// blacklistSource is a full key of the blacklist.
type blacklistSource struct {
	Transport  string    `json:"transport,omitempty"`
	Address    string    `json:"address"`
	Nodename   string    `json:"nodename"`
	Privileged bool      `json:"privileged"`
	Count      int       `json:"count"`
	ShutOut    bool      `json:"shut_out"`
	Last       time.Time `json:"last"`
}

// noMember stands in the status of the blacklist for what names no member.
const noMember = "-"

func handleBlacklistStatus(_ context.Context, d *daemon, _ options) (reply, error) {
	counts, sources := map[string]int{}, []blacklistSource{}
	for _, e := range d.blacklist.list() {
		node := e.sender.node
		if node == "" {
			node = noMember
		}
		counts[node] = max(counts[node], e.count)
		sources = append(sources, blacklistSource{
			e.sender.transport, e.sender.addr.String(), node, e.sender.privileged, e.count, e.count >= strikes, e.last.UTC(),
		})
	}
	r := replyOf(d, counts, nil)
	r.Sources = sources
	return r, nil
}

func handleDaemonStatus(ctx context.Context, d *daemon, o options) (reply, error) {
	data, err := d.clusterData(ctx, o.text("svcname"))
	return replyOf(d, data, nil), err
}

func handleDaemonStart(_ context.Context, d *daemon, o options) (reply, error) {
	if o.text("thr_id") == "" {
		return reply{}, errors.New("the daemon runs; name the thread to start in thr_id")
	}
	return replyOf(d, nil, nil), d.threadStart(o.text("thr_id"))
}

func handleDaemonStop(ctx context.Context, d *daemon, o options) (reply, error) {
	id := o.text("thr_id")
	if !o.flag("force") && (id == "" || id == "monitor") {
		if err := d.monitor.mayStop(ctx); err != nil {
			return reply{}, err
		}
	}
	if id != "" {
		return replyOf(d, nil, nil), d.threadStop(ctx, id)
	}
	return d.stopByRequest("daemon_stop")
}

func handleDaemonShutdown(ctx context.Context, d *daemon, _ options) (reply, error) {
	if err := d.monitor.end(ctx); err != nil {
		return reply{}, err
	}
	return d.stopByRequest("daemon_shutdown")
}

// stopByRequest begins the daemon's end; the reply still goes out.
func (d *daemon) stopByRequest(action string) (reply, error) {
	d.log.Info("stopping by request", "action", action)
	if !d.do(func() { d.byRequest = true; d.stop() }) {
		return reply{}, errStopping
	}
	return replyOf(d, nil, nil), nil
}

func handleNodeStatus(ctx context.Context, d *daemon, _ options) (reply, error) {
	return replyOf(d, d.nodeStatus(ctx), nil), nil
}

func handleClusterStatus(ctx context.Context, d *daemon, o options) (reply, error) {
	c := d.config.Load()
	query := clusterQuery{
		timeout: o.duration("timeout", c.duration("status.timeout")),
		exclude: append(slices.Clone(c.list("upgrade.exclude")), o.list("exclude")...),
		gate:    o.text("gate"), version: o.text("version"),
	}
	if err := query.check(o.list("exclude"), c); err != nil {
		return reply{}, err
	}
	return replyOf(d, d.clusterStatus(ctx, query), nil), nil
}
