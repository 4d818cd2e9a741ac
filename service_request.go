// service_request.go: the handlers of the actions on services and monitors.

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
)

// onService adds the option that names a service.
func onService(others map[string]optionType) map[string]optionType {
	all := map[string]optionType{"svcname": optionText}
	maps.Copy(all, others)
	return all
}

// withService runs f on the shell's goroutine with the service of the request.
func (d *daemon) withService(ctx context.Context, o options, f func(s *shell, m *monitored) error) error {
	name := o.text("svcname")
	if name == "" {
		return errors.New(`name the service, as in "options": {"svcname": "svc1"}`)
	}
	if err := d.monitor.find(ctx, name); err != nil {
		return err
	}
	var err error
	if failure := d.monitor.do(ctx, func(s *shell) {
		var m *monitored
		if m, err = s.known(name); err == nil {
			err = f(s, m)
		}
	}); failure != nil {
		return failure
	}
	return err
}

// serviceConfig is the reply of get_service_config.
type serviceConfig struct {
	Data     string  `json:"data"`
	Checksum string  `json:"csum"` // SHA-256 in hex
	Updated  float64 `json:"updated"`
	Error    string  `json:"error,omitempty"` // why this text is not used
}

func handleServiceConfig(ctx context.Context, d *daemon, o options) (reply, error) {
	name := o.text("svcname")
	if err := checkServiceName(name); err != nil {
		return reply{}, err
	}
	c := d.config.Load()
	text, info, err := readRegular(d.paths.servicePath(name), iniSizeLimit)
	if err != nil {
		_, err = loadService(d.paths, c, name) // says it better
		return reply{}, err
	}
	config := serviceConfig{Data: string(text), Checksum: checksum(text), Updated: unixSeconds(info.ModTime())}
	if _, err := parseService(name, config.Data, c.node, c.members()); err != nil {
		config.Error = err.Error()
	}
	return replyOf(d, config, nil), nil
}

func handleServiceMonitor(ctx context.Context, d *daemon, o options) (reply, error) {
	var data monitorData
	err := d.withService(ctx, o, func(s *shell, m *monitored) error {
		data = m.data()
		return nil
	})
	return replyOf(d, data, nil), err
}

func handleClear(ctx context.Context, d *daemon, o options) (reply, error) {
	return d.order(ctx, o, serviceOrder{clear: true})
}

func (d *daemon) order(ctx context.Context, o options, order serviceOrder) (reply, error) {
	var data monitorData
	err := d.withService(ctx, o, func(s *shell, m *monitored) error {
		order.service = m.spec.name
		err := s.order(order)
		data = m.data()
		return err
	})
	return replyOf(d, data, nil), err
}

// What monitors can be told. Others of OpenSVC's are orders to several nodes.
var (
	serviceLocals  = []string{"started", "stopped", "restarted", "thawed", "frozen", "unset"}
	serviceGlobals = []string{"started", "stopped", "shutdown", "restarted", "frozen", "thawed", "aborted", "unset"}
	nodeLocals     = []string{"thawed", "frozen"}
)

// oneOf checks an expect; an empty one is not given.
func oneOf(o options, option string, words []string) (string, error) {
	word := o.text(option)
	if word == "" || slices.Contains(words, word) {
		return word, nil
	}
	return "", fmt.Errorf("%s cannot be %q; it is one of %s", option, shortened(word), strings.Join(words, ", "))
}

// idleStatus takes the one status that can be set: the others are what the
// monitor does, and come of themselves.
func idleStatus(o options, instead string) (bool, error) {
	switch word := o.text("status"); word {
	case "", string(stateIdle):
		return word != "", nil
	default:
		return false, fmt.Errorf("status cannot be set to %q: it says what the monitor does; %s. Only idle can be set, which clears a failed state", shortened(word), instead)
	}
}

func handleSetServiceMonitor(ctx context.Context, d *daemon, o options) (reply, error) {
	idle, err := idleStatus(o, "to have it start or stop, set local_expect to started or stopped")
	local, localErr := oneOf(o, "local_expect", serviceLocals)
	global, globalErr := oneOf(o, "global_expect", serviceGlobals)
	if err := errors.Join(err, localErr, globalErr); err != nil {
		return reply{}, err
	}
	rids := o.list("rid")
	if rids != nil && !slices.Contains([]string{"started", "stopped", "restarted"}, local) {
		return reply{}, errors.New("rid goes with local_expect started, stopped or restarted")
	}
	if rids != nil && len(rids) == 0 {
		return reply{}, errors.New("rid is an empty list; name resources, or leave it out for the whole service")
	}
	reset, _ := o["reset_retries"].(bool)
	if !idle && !reset && local == "" && global == "" {
		return handleServiceMonitor(ctx, d, o)
	}
	return d.order(ctx, o, serviceOrder{localExpect: local, globalExpect: global, rids: rids, clear: idle, reset: reset})
}

func handleSetNodeMonitor(ctx context.Context, d *daemon, o options) (reply, error) {
	idle, err := idleStatus(o, "to have it freeze or thaw, set local_expect to frozen or thawed")
	local, localErr := oneOf(o, "local_expect", nodeLocals)
	global, globalErr := oneOf(o, "global_expect", nodeLocals)
	if err := errors.Join(err, localErr, globalErr); err != nil {
		return reply{}, err
	}
	if local != "" && global != "" {
		return reply{}, errors.New("local_expect and global_expect are two orders; give one of them")
	}
	if members := d.config.Load().members(); global != "" && len(members) > 1 {
		return reply{}, fmt.Errorf("the cluster has the nodes %s, and orders to several nodes are not part of this version; set local_expect on each", strings.Join(members, " "))
	}
	if local == "" && global == "" && !idle {
		return reply{}, errors.New(`say what to set, as in "options": {"local_expect": "frozen"}`)
	}
	if expect := local + global; expect != "" {
		err = d.monitor.do(ctx, func(s *shell) { s.step(nodeOrder{expect == "frozen"}) })
	}
	return replyOf(d, nil, nil), err
}

// actionResult is the reply of a synchronous service_action.
type actionResult struct {
	Out string `json:"out"`
	Err string `json:"err"`
	Ret int    `json:"ret"`
}

// verbWords are the words of a command before its options, whose values may be
// secrets of a service.
func verbWords(command []string) []string {
	if i := slices.IndexFunc(command, func(word string) bool { return strings.HasPrefix(word, "-") }); i >= 0 {
		return command[:i]
	}
	return command
}

// handleServiceAction runs svcmgr -s svcname <command> here.
func handleServiceAction(ctx context.Context, d *daemon, o options) (reply, error) {
	command := o.list("command")
	if command == nil {
		command = o.list("cmd")
	}
	const form = `as in "options": {"svcname": "svc1", "command": ["start", "--local"], "sync": true}`
	switch {
	case o.list("command") != nil && o.list("cmd") != nil:
		return reply{}, errors.New("command and cmd are the same option; give one of them, " + form)
	case len(command) == 0:
		return reply{}, errors.New("say what to do in command, a list of words, " + form)
	case slices.ContainsFunc(command, func(word string) bool {
		flag, _, _ := strings.Cut(strings.TrimLeft(word, "-"), "=")
		return strings.HasPrefix(word, "-") && (flag == "s" || flag == "service")
	}):
		return reply{}, errors.New("the service is named in svcname, not in command, " + form)
	}
	name := o.text("svcname")
	if err := d.withService(ctx, o, func(*shell, *monitored) error { return nil }); err != nil {
		return reply{}, err
	}
	program, err := ownCommand("svcmgr")
	if err != nil {
		return reply{}, err
	}
	argv := append([]string{program, "-s", name}, command...)
	id := rand.Text()
	run := func(ctx context.Context) actionResult {
		ctx, cancel := context.WithTimeoutCause(ctx, itemTimeout, fmt.Errorf("it did not end within %s", itemTimeout))
		defer cancel()
		out, stderr := &boundedBuffer{limit: itemOutput}, &boundedBuffer{limit: itemOutput}
		var result actionResult
		ret, err := d.run(ctx, argv, out, stderr)
		result.Ret = ret
		result.Out, _ = out.text()
		result.Err, _ = stderr.text()
		if err != nil {
			result.Err += "\n" + err.Error()
		}
		d.logs.write(slog.LevelInfo, name, "", fmt.Sprintf("action %s: %s: exit status %d", id, strings.Join(verbWords(command), " "), result.Ret))
		return result
	}
	if sync, _ := o["sync"].(bool); sync {
		return replyOf(d, run(ctx), nil), nil
	}
	select {
	case d.background <- struct{}{}:
	default:
		return reply{}, fmt.Errorf("%d actions run in the background already; try again later, or with sync", cap(d.background))
	}
	d.jobs.Go(func() {
		defer func() { <-d.background }()
		run(d.ctx)
	})
	return replyOf(d, map[string]string{"action_id": id}, nil), nil
}
