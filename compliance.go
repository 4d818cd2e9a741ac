// compliance.go: `svcmgr compliance`: the modules of a service's rules, which
// are programs in OSVCETC/compliance/<moduleset>/, run one after the other by
// the command itself. They run as root, so what others could have written is
// not run.

package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	moduleTimeout = 10 * time.Minute
	moduleLimit   = 64 << 10 // bytes of output
)

// moduleReport is what came of one module.
type moduleReport struct {
	Moduleset string `json:"moduleset"`
	Module    string `json:"module"`
	Status    string `json:"status"` // ok, not ok, n/a, error
	Exit      *int   `json:"exit"`   // nil: it did not end by itself, or was not run
	Output    string `json:"output"`
	Dropped   int    `json:"output_dropped,omitempty"` // bytes
	Error     string `json:"error,omitempty"`
}

// complianceReport is a whole run.
type complianceReport struct {
	Svcname  string         `json:"svcname"`
	Nodename string         `json:"nodename"`
	Action   string         `json:"action"`
	Modules  []moduleReport `json:"modules"`
	Warnings []string       `json:"warnings,omitempty"`
}

// moduleWords are the exit statuses of modules; others are errors.
var moduleWords = map[int]string{0: "ok", 1: "not ok", 2: "n/a"}

func bindCompliance(action string) func(*flag.FlagSet) body {
	return func(flags *flag.FlagSet) body {
		service, format := serviceFlag(flags), formatFlag(flags, "human", "json")
		moduleset := flags.String("moduleset", "", "only the modules of `M`")
		return func(ctx context.Context, p paths, _ []string) error {
			name, err := service()
			f, formatErr := format()
			if err := cmp.Or(err, formatErr); err != nil {
				return err
			}
			c, err := loadConfig(p)
			if err != nil {
				return err
			}
			if _, err := loadService(p, c, name); err != nil {
				return err
			}
			ctx, stop := untilSignal(ctx) // a module has a process group of its own
			defer stop()
			report := &complianceReport{Svcname: name, Nodename: c.node, Action: action, Modules: []moduleReport{}}
			out := io.Writer(os.Stdout)
			if f == "json" {
				out = io.Discard
			}
			if err := report.run(ctx, filepath.Join(p.etc, "compliance"), *moduleset, out); err != nil {
				return err
			}
			if f == "json" {
				err = printJSON(mustJSON(report))
			} else {
				report.show(out)
			}
			return errors.Join(err, exitStatus(report.status()))
		}
	}
}

// run runs the modules below folder, and prints to out what they print.
func (c *complianceReport) run(ctx context.Context, folder, only string, out io.Writer) error {
	sets, err := modulesets(folder, only)
	if err != nil {
		return err
	}
	for _, set := range sets {
		entries, err := os.ReadDir(filepath.Join(folder, set)) // sorted
		if err != nil {
			return fmt.Errorf("cannot list the modules: %w", err)
		}
		for _, entry := range entries {
			path := filepath.Join(folder, set, entry.Name())
			info, err := entry.Info()
			if err == nil && (!namePattern.MatchString(entry.Name()) || info.Mode().IsRegular() && info.Mode()&0o111 == 0 || info.IsDir()) {
				c.Warnings = append(c.Warnings, path+" is not an executable file; it is not run")
				continue
			}
			m := moduleReport{Moduleset: set, Module: entry.Name(), Status: "error"}
			if err := cmp.Or(err, checkModule(folder, filepath.Join(folder, set), path)); err != nil {
				m.Error = err.Error()
			} else {
				c.runModule(ctx, path, &m)
			}
			m.print(out)
			c.Modules = append(c.Modules, m)
			if ctx.Err() != nil {
				return fmt.Errorf("interrupted in %s/%s", set, m.Module)
			}
		}
	}
	if len(c.Modules) == 0 {
		return fmt.Errorf("there is no module to run; put executable files into %s", filepath.Join(folder, cmp.Or(only, "<moduleset>")))
	}
	return nil
}

// modulesets returns the names of those to run.
func modulesets(folder, only string) (sets []string, err error) {
	if only != "" && !namePattern.MatchString(only) {
		return nil, usageError("--moduleset: %q is not the name of a moduleset", only)
	}
	for _, name := range namesIn(folder) {
		if info, err := os.Lstat(filepath.Join(folder, name)); err == nil && info.IsDir() {
			sets = append(sets, name)
		}
	}
	switch {
	case len(sets) == 0:
		return nil, fmt.Errorf("there is no moduleset; modules are executable files in %s", filepath.Join(folder, "<moduleset>"))
	case only == "":
		return sets, nil
	case !slices.Contains(sets, only):
		return nil, fmt.Errorf("there is no moduleset %q in %s; there are: %s%s", only, folder, strings.Join(sets, ", "), nearest(only, sets))
	}
	return []string{only}, nil
}

// checkModule refuses what others than root and this user could have put there.
func checkModule(chain ...string) error {
	for _, path := range chain {
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		owner := info.Sys().(*syscall.Stat_t).Uid
		switch {
		case !info.Mode().IsRegular() && !info.IsDir():
			return fmt.Errorf("%s is not a regular file; not run", path)
		case owner != 0 && int(owner) != os.Geteuid():
			return fmt.Errorf("%s belongs to user %d, who is neither root nor this user; not run", path, owner)
		case info.Mode()&0o022 != 0:
			return fmt.Errorf("others may write %s; not run; chmod go-w it", path)
		}
	}
	return nil
}

func (c *complianceReport) runModule(ctx context.Context, path string, m *moduleReport) {
	ctx, cancel := context.WithTimeout(ctx, moduleTimeout)
	defer cancel()
	output := &boundedBuffer{limit: moduleLimit}
	env := []string{"OSVC_SVCNAME=" + c.Svcname, "OSVC_NODENAME=" + c.Nodename}
	exit, err := runCommandWith(ctx, env, []string{path, c.Action}, output, output)
	m.Output, m.Dropped = output.text()
	if err != nil {
		m.Error = err.Error()
		return
	}
	m.Exit = &exit
	m.Status = cmp.Or(moduleWords[exit], "error")
	if m.Status == "error" {
		m.Error = fmt.Sprintf("exit status %d is none of 0 (ok), 1 (not ok), 2 (n/a)", exit)
	}
}

func (m *moduleReport) print(out io.Writer) {
	if m.Output == "" {
		return
	}
	fmt.Fprintf(out, "%s/%s:\n", m.Moduleset, m.Module)
	for line := range strings.Lines(m.Output) {
		fmt.Fprintln(out, "  "+strings.TrimSuffix(line, "\n"))
	}
	if m.Dropped > 0 {
		fmt.Fprintf(out, "  … %d bytes more\n", m.Dropped)
	}
	fmt.Fprintln(out)
}

func (c *complianceReport) show(out io.Writer) {
	rows := [][]string{}
	for _, m := range c.Modules {
		mark := "! "
		if m.passed() {
			mark = "  "
		}
		row := []string{mark + m.Moduleset + "/" + m.Module, m.Status}
		if m.Error != "" {
			row = append(row, m.Error)
		}
		rows = append(rows, row)
	}
	table(out, rows)
	for _, warning := range c.Warnings {
		fmt.Fprintln(out, "! "+warning)
	}
}

func (m *moduleReport) passed() bool { return m.Status == "ok" || m.Status == "n/a" }

// status is the command's exit status.
func (c *complianceReport) status() int {
	if slices.ContainsFunc(c.Modules, func(m moduleReport) bool { return !m.passed() }) {
		return exitFailed
	}
	return exitDone
}
