// svcmgr.go: the commands on services. Those that have something done are
// orders to a daemon, and can wait until they are carried out.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// serviceFlag is the option that names a service.
func serviceFlag(flags *flag.FlagSet) func() (string, error) {
	name := flags.String("s", "", "the service `SVCNAME`")
	return func() (string, error) {
		if *name == "" {
			return "", usageError("name a service: svcmgr -s <svcname> …")
		}
		if err := checkServiceName(*name); err != nil {
			return "", usageError("-s: %w", err)
		}
		return *name, nil
	}
}

// serviceConfFile is a service's file for the commands that change it. They
// may leave a fault of the surroundings as it is, but add none.
func serviceConfFile(p paths, c *config, name string) configFile {
	faults := func(text string) (int, error) {
		s, err := parseService(name, text, c.node, c.members())
		if err != nil {
			return 0, err
		}
		found := s.runFaults(c, c.node)
		return len(found), errors.Join(found...)
	}
	return configFile{p.servicePath(name), p.lockFile(name + ".conf"), name + ".conf", "", serviceKeys, func(before, after string) error {
		was, wasErr := faults(before)
		is, err := faults(after)
		if err != nil && (is == 0 || wasErr == nil || is > was) {
			return err
		}
		return nil
	}}
}

func bindServiceList(flags *flag.FlagSet) body {
	format := formatFlag(flags, "human", "json")
	return func(ctx context.Context, p paths, _ []string) error {
		f, err := format()
		if err != nil {
			return err
		}
		names, err := allServices(ctx, p)
		if err != nil {
			return err
		}
		if f == "json" {
			data, err := json.Marshal(append([]string{}, names...))
			return errors.Join(err, printJSON(data))
		}
		for _, name := range names {
			fmt.Println(name)
		}
		return nil
	}
}

// allServices are those whose files are here, and those that the daemon knows
// of from other nodes.
func allServices(ctx context.Context, p paths) ([]string, error) {
	names, err := listServices(p)
	if err != nil {
		return nil, err
	}
	var known struct {
		Monitor struct{ Services map[string]struct{} }
	}
	if err := askLocal(ctx, p, "daemon_status", nil, nil, dataOf(&known)); err != nil && !errors.Is(err, errNoDaemon) {
		fmt.Fprintln(os.Stderr, "only the services of this node are shown:", err)
	}
	names = slices.AppendSeq(names, maps.Keys(known.Monitor.Services))
	slices.Sort(names)
	return slices.Compact(names), nil
}

func bindCreate(flags *flag.FlagSet) body {
	name := flags.String("s", "", "the service `SVCNAME`; by default, the file's name without .conf")
	from := flags.String("config", "", "the service's `FILE`; - reads standard input")
	return func(_ context.Context, p paths, _ []string) error {
		if *from == "" || *from == "-" && *name == "" {
			return usageError("svcmgr create: say from what: svcmgr create --config svc1.conf, or svcmgr -s svc1 create --config -")
		}
		if *name == "" {
			*name = strings.TrimSuffix(filepath.Base(*from), ".conf")
		}
		if err := checkServiceName(*name); err != nil {
			return err
		}
		var text []byte
		var err error
		if *from == "-" {
			text, err = io.ReadAll(io.LimitReader(os.Stdin, iniSizeLimit+1))
		} else {
			text, _, err = readRegular(*from, iniSizeLimit)
		}
		if err != nil {
			return err
		}
		return createService(p, *name, string(text))
	}
}

// createService writes the file of a new service that can run.
func createService(p paths, name, text string) error {
	c, err := loadConfig(p)
	if err != nil {
		return err
	}
	s, err := parseService(name, text, c.node, c.members())
	if s != nil { // all that is wrong, at once
		err = errors.Join(err, errors.Join(s.runFaults(c, c.node)...))
	}
	if err != nil {
		return fmt.Errorf("%s is not created:\n%w", name, err)
	}
	f := serviceConfFile(p, c, name)
	held, err := lock(f.lock)
	if err != nil {
		return err
	}
	defer held.unlock()
	if _, err := os.Lstat(f.path); err == nil {
		return fmt.Errorf("%s exists already; to change it: svcmgr -s %s edit config", name, name)
	}
	return writeFile(f.path, []byte(text), 0o600)
}

func bindDelete(flags *flag.FlagSet) body {
	service := serviceFlag(flags)
	return func(ctx context.Context, p paths, _ []string) error {
		name, err := service()
		if err != nil {
			return err
		}
		c, err := loadConfig(p)
		if err != nil {
			return err
		}
		if _, err := os.Lstat(p.servicePath(name)); err != nil {
			_, err = loadService(p, c, name) // says it better
			return err
		}
		data, _, err := askStatus(ctx, p, "", name) // also with a broken file: what it was before may run
		if err != nil {
			return fmt.Errorf("cannot tell whether %s runs: %w", name, err)
		}
		if i, here := data.Instances[c.node]; here && (!i.isDown() || i.Monitor.Status != stateIdle && !i.Monitor.Status.failed()) {
			return fmt.Errorf("%s is %s, %s on %s; first: svcmgr -s %s stop --local --wait", name, i.Overall, i.Monitor.Status, c.node, name)
		}
		return deleteService(p, serviceConfFile(p, c, name), name)
	}
}

// deleteService moves the file to the backups, and forgets the flags.
func deleteService(p paths, f configFile, name string) error {
	held, err := lock(f.lock)
	if err != nil {
		return err
	}
	defer held.unlock()
	backup := filepath.Join(p.lib, "backup", f.name+"."+itemID(time.Now()))
	if err := os.MkdirAll(filepath.Dir(backup), 0o700); err != nil {
		return fmt.Errorf("cannot delete %s: %w", name, err)
	}
	text, _, err := readRegular(f.path, iniSizeLimit)
	if err == nil {
		err = writeFile(backup, text, 0o600)
	}
	if err == nil {
		err = os.Remove(f.path)
	}
	if err != nil {
		return fmt.Errorf("cannot delete %s: %w", name, err)
	}
	fmt.Fprintf(os.Stderr, "its file is kept as %s\n", backup)
	return errors.Join(syncFolder(p.etc), os.RemoveAll(p.instanceLib(name)), os.RemoveAll(p.instanceRun(name)))
}

// ask sends a request to a node, or to this one where none is named.
func ask(ctx context.Context, p paths, node, action string, options map[string]any, frame frameFunc) error {
	encoded := map[string]json.RawMessage{}
	for name, v := range options {
		encoded[name] = mustJSON(v)
	}
	if node == "" {
		return askLocal(ctx, p, action, encoded, nil, frame)
	}
	return askNode(ctx, p, node, action, encoded, frame)
}

// askStatus asks for one service; answered is the node that did.
func askStatus(ctx context.Context, p paths, node, name string) (data serviceData, answered string, err error) {
	var s statusData
	err = ask(ctx, p, node, "daemon_status", map[string]any{"svcname": name}, dataOf(&s))
	return s.Monitor.Services[name], s.Daemon.Nodename, err
}

func bindServiceStatus(flags *flag.FlagSet) body {
	service, format := serviceFlag(flags), formatFlag(flags, "human", "json")
	node := flags.String("node", "", "ask the daemon of node `N`")
	return func(ctx context.Context, p paths, _ []string) error {
		name, err := service()
		f, formatErr := format()
		if err := errors.Join(err, formatErr); err != nil {
			return err
		}
		data, _, err := askStatus(ctx, p, *node, name)
		switch {
		case err != nil:
			return err
		case f == "json":
			return printJSON(mustJSON(data))
		}
		showService(os.Stdout, data)
		return nil
	}
}

// orders are the commands that ask the monitor for something: the expect, and
// when it is reached.
var orders = map[string]struct {
	expect  string
	reached func(i instanceData) bool
}{
	"start":   {"started", instanceData.isUp},
	"restart": {"restarted", instanceData.isUp},
	"stop":    {"stopped", instanceData.isDown},
	"freeze":  {"frozen", func(i instanceData) bool { return i.Frozen }},
	"thaw":    {"thawed", func(i instanceData) bool { return !i.Frozen }},
	"abort":   {"aborted", func(instanceData) bool { return true }},
}

// isUp takes an instance whose resources are all optional as it is.
func (i instanceData) isUp() bool { return i.Avail == statusUp || i.Avail == statusNA }

// isDown tells whether nothing of the instance runs.
func (i instanceData) isDown() bool {
	for _, r := range i.Resources {
		if r.Status != statusDown && r.Status != statusNA {
			return false
		}
	}
	return true
}

func bindOrder(word string) func(*flag.FlagSet) body {
	return func(flags *flag.FlagSet) body {
		service := serviceFlag(flags)
		node := flags.String("node", "", "order the instance on node `N`")
		local := false
		if word != "abort" {
			flags.BoolVar(&local, "local", false, "only the instance on this node; start and stop change no frozen flag then")
		}
		var rids []string
		if word == "start" || word == "stop" || word == "restart" {
			flags.Func("rid", "only the resource `RID`; may be repeated", func(rid string) error {
				rids = append(rids, rid)
				return nil
			})
		}
		var wait waitFlag
		flags.Var(&wait, "wait", "show what happens until it is done; exit 1 if it fails, 2 after `D` (default 5m)")
		return func(ctx context.Context, p paths, _ []string) error {
			name, err := service()
			if err != nil {
				return err
			}
			w := waiter{paths: p, node: *node, name: name}
			options := map[string]any{"svcname": name, "global_expect": orders[word].expect}
			if local || rids != nil || *node != "" && word != "abort" {
				delete(options, "global_expect")
				options["local_expect"] = orders[word].expect
			}
			if rids != nil {
				options["rid"] = rids
			}
			send := func(ctx context.Context) error {
				return ask(ctx, p, *node, "set_service_monitor", options, discard)
			}
			if wait == 0 {
				return send(ctx)
			}
			return w.wait(ctx, time.Duration(wait), word, rids, send)
		}
	}
}

// waitFlag is --wait, alone or with a duration.
type waitFlag time.Duration

func (w *waitFlag) String() string   { return "" }
func (w *waitFlag) IsBoolFlag() bool { return true }
func (w *waitFlag) Set(text string) error {
	if text == "true" {
		text = "5m"
	}
	d, err := parseDuration(text)
	if err == nil {
		*w = waitFlag(d.(time.Duration))
	}
	return err
}

// waiter waits for an order to be carried out.
type waiter struct {
	paths paths
	node  string // asked; this one if empty
	name  string
}

// wait shows the service's log from before the order is sent until it is
// reached, or has failed, or the time is up.
func (w waiter) wait(ctx context.Context, within time.Duration, word string, rids []string, send func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("%s of %s is not done after %s; it goes on: svcmgr -s %s print status", word, w.name, within, w.name))
	lines := make(chan []string)
	var following sync.WaitGroup
	defer following.Wait()
	defer cancel()
	following.Go(func() { w.follow(ctx, lines) })
	select { // until the log is followed, or cannot be: then the order tells why, or does without
	case <-lines:
	case <-ctx.Done():
		return exitError{exitTimeout, context.Cause(ctx)}
	}
	if err := send(ctx); err != nil {
		return err
	}
	for pause := time.Duration(0); ; pause = waitPause {
		done, err := w.done(ctx, word, rids)
		if done {
			pause = lastLines // what was said about it
		}
		for quiet := time.After(pause); quiet != nil; {
			select {
			case news, more := <-lines:
				if !more {
					lines = nil // its end is looked for all the same
				}
				for _, line := range news {
					fmt.Println(line)
				}
				if !done && len(news) > 0 {
					quiet = time.After(lastLines) // then look again
				}
			case <-quiet:
				quiet = nil
			case <-ctx.Done():
				return exitError{exitTimeout, context.Cause(ctx)}
			}
		}
		if done {
			return err
		}
	}
}

// done tells whether the order is carried out, or has failed.
func (w waiter) done(ctx context.Context, word string, rids []string) (bool, error) {
	data, node, err := askStatus(ctx, w.paths, w.node, w.name)
	i, known := data.Instances[node] // the order was to this one
	if err != nil || !known {
		return false, nil // the daemon may be restarting; the time is bounded
	}
	return orderDone(w.name, node, i, word, rids)
}

// orderDone is done by what a status says. A state that failed before is no
// failure of an order that is not begun yet, or only about the frozen flag.
func orderDone(name, node string, i instanceData, word string, rids []string) (bool, error) {
	flag := word == "freeze" || word == "thaw" || word == "abort"
	switch m := i.Monitor; {
	case m.Wanted != "" || m.Status != stateIdle && !m.Status.failed():
		return false, nil
	case m.Status.failed() && !(flag && orders[word].reached(i)):
		return true, fmt.Errorf("%s is in state %q on %s: %s", name, m.Status, node, m.Why)
	case rids != nil:
		for _, rid := range rids {
			if up := i.Resources[rid].Status == statusUp; up != (word != "stop") {
				return true, fmt.Errorf("%s of %s is %s on %s: %s", rid, name, i.Resources[rid].Status, node, i.Resources[rid].Log)
			}
		}
	case !orders[word].reached(i):
		return true, fmt.Errorf("%s is %s on %s: %s", name, i.Avail, node, m.Why)
	}
	return true, nil
}

// follow sends the lines of the service's log; first an empty batch, when it
// follows. It closes lines when there will be no more.
func (w waiter) follow(ctx context.Context, lines chan<- []string) {
	defer close(lines)
	_ = ask(ctx, w.paths, w.node, "service_logs", map[string]any{"svcname": w.name, "backlog": 0, "follow": true}, func(_ []byte, r replyJSON) error {
		var batch struct{ Lines []string }
		if r.Status != 0 {
			return replyError(r.Error)
		}
		if err := json.Unmarshal(r.Data, &batch); err != nil {
			return err
		}
		select {
		case lines <- batch.Lines:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
}

func bindClear(flags *flag.FlagSet) body {
	service := serviceFlag(flags)
	node := flags.String("node", "", "on node `N`")
	return func(ctx context.Context, p paths, _ []string) error {
		name, err := service()
		if err != nil {
			return err
		}
		return ask(ctx, p, *node, "clear", map[string]any{"svcname": name}, discard)
	}
}

// bindNodeFlag is nodemgr freeze and thaw.
func bindNodeFlag(expect string) func(*flag.FlagSet) body {
	return func(flags *flag.FlagSet) body {
		local := flags.Bool("local", false, "only this node")
		return func(ctx context.Context, p paths, _ []string) error {
			scope := "global_expect"
			if *local {
				scope = "local_expect"
			}
			return ask(ctx, p, "", "set_node_monitor", map[string]any{scope: expect}, discard)
		}
	}
}

// showService draws the tree of `svcmgr print status`.
func showService(out io.Writer, s serviceData) {
	frozen := ""
	if s.Frozen != "thawed" && s.Frozen != "n/a" {
		frozen = "  " + s.Frozen
	}
	fmt.Fprintf(out, "%s  %s%s\n", s.Svcname, s.Overall, frozen)
	var attention []string
	if s.Config.Error != "" {
		attention = append(attention, "The file on disk is not used:\n"+s.Config.Error+"\nMend it: svcmgr -s "+s.Svcname+" edit config")
	}
	if s.Differ != nil {
		attention = append(attention, "Another file is on "+strings.Join(s.Differ, ", ")+"; copy the right one to all of its nodes")
	}
	nodes := slices.Clone(s.Nodes)
	for _, node := range slices.Sorted(maps.Keys(s.Instances)) {
		if !slices.Contains(nodes, node) { // its file there says so
			nodes = append(nodes, node)
		}
	}
	for n, node := range nodes {
		stem, branch := "|  ", "|- "
		if n == len(nodes)-1 {
			stem, branch = "   ", "`- "
		}
		i, known := s.Instances[node]
		switch {
		case !known:
			fmt.Fprintf(out, "%s%s  not known here\n", branch, node)
			continue
		case i.Stale:
			fmt.Fprintf(out, "%s%s  dead; it was %s\n", branch, node, strings.Join(i.words(), ", "))
			continue
		}
		fmt.Fprintf(out, "%s%s  %s\n", branch, node, strings.Join(i.words(), ", "))
		table(out, i.rows(stem))
		if i.Monitor.Why != "" {
			attention = append(attention, node+": "+string(i.Monitor.Status)+": "+i.Monitor.Why)
		}
		if i.Monitor.Status.failed() {
			attention = append(attention, fmt.Sprintf("When that is mended: svcmgr -s %s clear", s.Svcname))
		}
	}
	showAttention(out, attention)
}

// words tell the state of an instance.
func (i instanceData) words() []string {
	words := []string{string(i.Avail)}
	if i.Overall != i.Avail {
		words = append(words, "overall "+string(i.Overall))
	}
	words = append(words, string(i.Monitor.Status))
	if i.Frozen {
		words = append(words, "frozen")
	}
	for _, of := range []struct {
		name  string
		value nullable
	}{{"local_expect", i.Monitor.LocalExpect}, {"global_expect", i.Monitor.GlobalExpect}, {"next", i.Monitor.Wanted}} {
		if of.value != "" {
			words = append(words, of.name+" "+string(of.value))
		}
	}
	return words
}

// rows are the resources in their order; what is not up is marked.
func (i instanceData) rows(stem string) (rows [][]string) {
	for n, rid := range i.Rids {
		r := i.Resources[rid]
		branch, mark := "|- ", " "
		if n == len(i.Rids)-1 {
			branch = "`- "
		}
		if r.Status != statusUp && !r.Disable && i.Overall != statusDown {
			mark = "!"
		}
		detail := r.Type
		for _, flag := range []struct {
			set  bool
			name string
		}{{r.Optional, "optional"}, {r.Monitor, "monitored"}, {r.Restarts != "", "restarted " + r.Restarts}} {
			if flag.set {
				detail += ", " + flag.name
			}
		}
		if r.Log != "" {
			detail += ": " + strings.ReplaceAll(r.Log, "\n", "; ")
		}
		rows = append(rows, []string{stem + branch + rid, mark + string(r.Status), detail})
	}
	return rows
}
