// show.go: how agentd talks to people. A status begins with what matters,
// marks what needs attention with `!`, and says what to do about it. No line
// needs more than 80 columns unless a name or a message does. `--format json`
// prints what the daemon said, untouched.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// formatFlag is --format.
func formatFlag(flags *flag.FlagSet, formats ...string) func() (string, error) {
	format := flags.String("format", formats[0], "`"+strings.Join(formats, "|")+"`")
	return func() (string, error) {
		if !slices.Contains(formats, *format) {
			return "", usageError("--format: %q is none of %s", *format, strings.Join(formats, ", "))
		}
		return *format, nil
	}
}

// table aligns columns.
func table(out io.Writer, rows [][]string) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	w.Flush()
}

func printJSON(data json.RawMessage) error {
	var out bytes.Buffer
	if err := json.Indent(&out, data, "", "    "); err != nil {
		return fmt.Errorf("the reply is not JSON: %w", err)
	}
	fmt.Println(out.String())
	return nil
}

// pluginWords are how monitoring plugins name their exit statuses.
var pluginWords = [...]string{"OK", "WARNING", "CRITICAL", "UNKNOWN"}

// nodeExits and clusterExits are the exit statuses of the two status commands.
var (
	nodeExits    = map[nodeState]int{nodeFinalized: 0, nodeUnfinalized: 1, nodeDowngraded: 2, nodeUnreadable: 3}
	clusterExits = map[clusterState]int{clusterInstalled: 0, clusterUpgrading: 1, clusterInconsistent: 2, clusterUnknown: 3}
	gateExits    = map[string]int{"yes": 0, "no": 1, "unknown": 3}
)

// plugin prints the first line of a check.
func plugin(out io.Writer, status int, text string) {
	text, rest, more := strings.Cut(text, "\n")
	fmt.Fprintf(out, "%s - %s\n", pluginWords[status], text)
	if more {
		fmt.Fprintln(out, rest)
	}
}

// checkFailed ends a check that could not be made: its status is unknown, and
// whoever reads standard output alone must see why.
func checkFailed(err error) error {
	var exit exitError
	if errors.As(err, &exit) {
		return err
	}
	plugin(os.Stdout, 3, err.Error())
	return exitError{status: 3}
}

func orNone(n nullable) string {
	if n == "" {
		return "-"
	}
	return string(n)
}

func bindNodeStatus(flags *flag.FlagSet) body {
	format := formatFlag(flags, "human", "json")
	return func(ctx context.Context, p paths, _ []string) error {
		f, err := format()
		if err != nil {
			return err
		}
		var data json.RawMessage
		var s nodeStatus
		err = askLocal(ctx, p, "node_status", nil, nil, dataOf(&data))
		if err == nil {
			err = json.Unmarshal(data, &s)
		}
		if err != nil {
			return checkFailed(err)
		}
		status, known := nodeExits[s.State]
		if !known {
			return checkFailed(fmt.Errorf("unknown state %q", s.State))
		}
		if f == "json" {
			err = printJSON(data)
		} else {
			showNode(os.Stdout, s, status)
		}
		return errors.Join(err, exitStatus(status))
	}
}

// exitStatus ends the program with a status of a check.
func exitStatus(status int) error {
	if status == exitDone {
		return nil
	}
	return exitError{status: status}
}

func showNode(out io.Writer, s nodeStatus, status int) {
	text := fmt.Sprintf("%s: %s is installed and finalized", s.Nodename, s.Installed.Version)
	if len(s.Reasons) > 0 {
		text = s.Nodename + ": " + s.Reasons.text()
	}
	plugin(out, status, text)
	rows := [][]string{{"  product", orNone(s.Product)}}
	for _, v := range []struct {
		name string
		versionStatus
	}{{"installed", s.Installed}, {"finalized", s.Finalized}} {
		detail := orNone(v.Version)
		if v.Since != nil {
			detail += " since " + v.Since.Local().Format(time.DateTime)
		}
		rows = append(rows, []string{"  " + v.name, detail, string(v.Source)})
	}
	if s.Previous != nil {
		rows = append(rows, []string{"  previous", s.Previous.Version})
	}
	if s.Reboot.Required != nil && *s.Reboot.Required {
		rows = append(rows, []string{"  reboot", "required: " + s.Reboot.Why})
	}
	table(out, rows)
}

// retryPause is the time between two questions of --wait.
const retryPause = 2 * time.Second

func bindClusterStatus(flags *flag.FlagSet) body {
	format := formatFlag(flags, "human", "json", "porcelain")
	options := map[string]json.RawMessage{}
	var timeout, wait time.Duration
	durationFlag(flags, &timeout, "timeout", "answer within `D`, such as 5s (default status.timeout)")
	durationFlag(flags, &wait, "wait", "ask again for `D`, such as 10m, until the exit status is 0")
	gate := flags.String("gate", "", "may a script `start|finalize`: exit 0 yes, 1 no, 3 cannot tell")
	version := flags.String("version", "", "the version `V` that the gate is about")
	var exclude []string
	flags.Func("exclude", "leave the node `N` out; may be repeated", func(node string) error {
		exclude = append(exclude, node)
		return nil
	})
	return func(ctx context.Context, p paths, _ []string) error {
		f, err := format()
		if err != nil {
			return err
		}
		// The daemon keeps the timeout; one that hangs does not.
		limit := timeout + callTimeout
		if c, err := loadConfig(p); err == nil && timeout == 0 {
			limit += c.duration("status.timeout")
		}
		if timeout > 0 {
			options["timeout"] = mustJSON(timeout.String())
		}
		for name, text := range map[string]string{"gate": *gate, "version": *version} {
			if text != "" {
				options[name] = mustJSON(text)
			}
		}
		if exclude != nil {
			options["exclude"] = mustJSON(exclude)
		}
		data, s, status, err := askCluster(ctx, p, limit, options)
		for end := time.Now().Add(wait); status != exitDone && !refused(err) && time.Now().Before(end); {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(min(retryPause, time.Until(end))):
			}
			data, s, status, err = askCluster(ctx, p, limit, options)
		}
		switch {
		case refused(err):
			return usageError("%w", err)
		case err != nil:
			return checkFailed(err)
		}
		return errors.Join(showCluster(os.Stdout, f, data, s, status), exitStatus(status))
	}
}

// durationFlag is an option whose value is written as in node.conf.
func durationFlag(flags *flag.FlagSet, to *time.Duration, name, usage string) {
	flags.Func(name, usage, func(text string) error {
		d, err := parseDuration(text)
		if err == nil {
			*to = d.(time.Duration)
		}
		return err
	})
}

// refused tells whether the daemon found the question itself wrong.
func refused(err error) bool {
	var reply replyError
	return errors.As(err, &reply)
}

func askCluster(ctx context.Context, p paths, limit time.Duration, options map[string]json.RawMessage) (data json.RawMessage, s clusterStatus, status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err = askLocal(ctx, p, "cluster_status", options, nil, dataOf(&data)); err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil {
		return nil, s, 3, err
	}
	status, known := clusterExits[s.State]
	if s.Gate != nil {
		status, known = gateExits[s.Gate.Answer]
	}
	if !known {
		return nil, s, 3, fmt.Errorf("unknown state %q", s.State)
	}
	return data, s, status, nil
}

func showCluster(out io.Writer, format string, data json.RawMessage, s clusterStatus, status int) error {
	switch format {
	case "json":
		return printJSON(data)
	case "porcelain":
		showPorcelain(out, s, status)
		return nil
	}
	plugin(out, status, headline(s))
	rows := [][]string{{"  NODE", "INSTALLED", "FINALIZED", "STATE", "ANSWER"}}
	for _, node := range slices.Sorted(maps.Keys(s.Nodes)) {
		a := s.Nodes[node]
		row := []string{"  " + node, "-", "-", string(a.Bucket), string(a.Answer)}
		if a.Node != nil {
			row[1], row[2] = orNone(a.Node.Installed.Version), orNone(a.Node.Finalized.Version)
		} else if a.LastKnown != nil {
			row[4] += fmt.Sprintf(" (%s ago: %s, finalized %s)", time.Duration(a.LastKnown.Age)*time.Second, orNone(a.LastKnown.Installed), orNone(a.LastKnown.Finalized))
		}
		if a.Bucket != bucketDone {
			row[0] = "! " + node
		}
		rows = append(rows, row)
	}
	table(out, rows)
	for _, r := range s.Reasons {
		fmt.Fprintln(out, "- "+r.Message)
	}
	return nil
}

// headline is the cluster's state in a sentence.
func headline(s clusterStatus) string {
	product := "version"
	if s.Product != "" {
		product = string(s.Product)
	}
	text := ""
	switch s.State {
	case clusterInstalled:
		text = fmt.Sprintf("%s %s is installed on all nodes", product, s.To)
	case clusterUpgrading:
		from := "an unknown version"
		if s.From != "" {
			from = string(s.From)
		}
		text = fmt.Sprintf("%s: upgrade from %s to %s in progress", product, from, s.To)
		if waiting := slices.Sorted(slices.Values(append(slices.Clone(s.Pending), s.Installed...))); len(waiting) > 0 {
			text += ", waiting for " + strings.Join(waiting, " ")
		}
		if s.Stalled {
			text += ", stalled"
		}
	default:
		text = string(s.State)
		if len(s.Reasons) > 0 {
			text += ": " + s.Reasons[0].Message
		}
	}
	if !s.Complete {
		text += "; not known: " + strings.Join(s.Unknown, " ")
	}
	if len(s.Excluded) > 0 {
		text += "; excluded: " + strings.Join(s.Excluded, " ")
	}
	if s.Gate != nil {
		text = fmt.Sprintf("gate %s: %s: %s", s.Gate.Name, s.Gate.Answer, s.Gate.Why)
	}
	return text
}

// showPorcelain prints key=value lines that a shell can read, or even source:
// what is not a plain character becomes `_`.
func showPorcelain(out io.Writer, s clusterStatus, status int) {
	line := func(key, value string) {
		fmt.Fprintf(out, "%s=%s\n", key, strings.Map(func(c rune) rune {
			if isAlphanumeric(c) || strings.ContainsRune("._^+:,-~/", c) {
				return c
			}
			return '_'
		}, value))
	}
	line("exit", fmt.Sprint(status))
	line("state", string(s.State))
	line("complete", fmt.Sprint(s.Complete))
	line("stalled", fmt.Sprint(s.Stalled))
	line("product", string(s.Product))
	line("from", string(s.From))
	line("to", string(s.To))
	for _, list := range []struct {
		key   string
		nodes []string
	}{{"done", s.Done}, {"installed", s.Installed}, {"pending", s.Pending}, {"unknown", s.Unknown}, {"excluded", s.Excluded}} {
		line(list.key, strings.Join(list.nodes, ","))
	}
	for _, node := range slices.Sorted(maps.Keys(s.Nodes)) {
		a := s.Nodes[node]
		line("node_"+strings.Map(func(c rune) rune {
			if isAlphanumeric(c) {
				return c
			}
			return '_'
		}, node), string(a.Answer)+":"+string(a.Bucket))
	}
	if s.Gate != nil {
		line("gate", s.Gate.Answer)
	}
}

func bindQueueList(flags *flag.FlagSet) body {
	format := formatFlag(flags, "human", "json")
	return func(_ context.Context, p paths, _ []string) error {
		f, err := format()
		if err != nil {
			return err
		}
		items, err := queueList(p)
		if err != nil {
			return err
		}
		if held, err := tryLock(p.lockFile("queue")); err == nil {
			held.unlock()
			for i := range items {
				if items[i].State == "running" {
					items[i].State = "interrupted" // nobody runs it
				}
			}
		}
		items = slices.CompactFunc(items, func(a, b queueItem) bool { return a.ID == b.ID })
		if f == "json" {
			data, err := json.Marshal(append([]queueItem{}, items...))
			return errors.Join(err, printJSON(data))
		}
		rows := [][]string{{"ID", "STATE", "EXIT", "COMMAND"}}
		for _, item := range items {
			exit := "-"
			if item.Exit != nil {
				exit = fmt.Sprint(*item.Exit)
			}
			rows = append(rows, []string{item.ID, item.State, exit, strings.Join(item.Command, " ")})
			if item.Error != "" {
				rows = append(rows, []string{"", "", "", "! " + item.Error})
			}
		}
		table(os.Stdout, rows)
		return nil
	}
}
