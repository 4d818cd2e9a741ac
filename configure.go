// configure.go: the commands on configuration files: node.conf for nodemgr,
// a service's file for svcmgr.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
)

// fileFlag declares what names the file of a command, and returns the file.
type fileFlag func(flags *flag.FlagSet) func(p paths) (configFile, error)

func ofNode(*flag.FlagSet) func(paths) (configFile, error) {
	return func(p paths) (configFile, error) { return nodeConfFile(p), nil }
}

func ofService(flags *flag.FlagSet) func(paths) (configFile, error) {
	service := serviceFlag(flags)
	return func(p paths) (configFile, error) {
		name, err := service()
		if err != nil {
			return configFile{}, err
		}
		c, err := loadConfig(p)
		if err != nil {
			return configFile{}, err
		}
		if _, err := os.Stat(p.servicePath(name)); err != nil {
			_, err = loadService(p, c, name) // says it better
			return configFile{}, err
		}
		return serviceConfFile(p, c, name), nil // one with faults is one to edit
	}
}

// target is a parameter of a file.
type target struct {
	configFile
	section, key, scope string
}

// paramFlag is the option that names a parameter. In a service's file, one
// without a section is in DEFAULT.
func paramFlag(of fileFlag, flags *flag.FlagSet) func(p paths) (target, error) {
	file := of(flags)
	name := flags.String("param", "", "the parameter, `SECTION.KEY[@NODE]`")
	return func(p paths) (t target, err error) {
		if t.configFile, err = file(p); err != nil {
			return t, err
		}
		full := *name
		if t.keys.find("DEFAULT", "nodes") != nil && full != "" && !strings.Contains(full, ".") {
			full = "DEFAULT." + full
		}
		if t.section, t.key, t.scope, err = splitParameter(full); err != nil {
			return t, usageError("--param: %w", err)
		}
		// A section with an agent may hold keys that only the agent knows.
		if t.keys.find(t.section, t.key) == nil && t.keys.find(t.section, "agent") == nil {
			return t, fmt.Errorf("unknown parameter %s%s", *name, t.keys.didYouMean(t.section, t.key))
		}
		return t, nil
	}
}

func bindGet(of fileFlag) func(flags *flag.FlagSet) body {
	return func(flags *flag.FlagSet) body {
		param := paramFlag(of, flags)
		return func(_ context.Context, p paths, _ []string) error {
			t, err := param(p)
			if err != nil {
				return err
			}
			c, err := loadConfig(p)
			if err != nil {
				return err
			}
			doc := c.doc
			if t.path != p.nodeConf() {
				text, _, err := readRegular(t.path, iniSizeLimit)
				if err != nil {
					return err
				}
				if doc, err = parseINI(t.name, string(text)); err != nil {
					return err
				}
			}
			text, _, ok := doc.value(t.section, t.key, cmp.Or(t.scope, c.node))
			spec := t.keys.find(t.section, t.key)
			switch name := t.section + "." + t.key; {
			case ok:
			case name == "cluster.nodes", name == "DEFAULT.nodes":
				text = strings.Join(c.members(), " ")
			case name == "node.name":
				text = c.node
			case spec == nil:
				return fmt.Errorf("%s is not set", name)
			default:
				text = spec.initial
			}
			fmt.Println(text)
			return nil
		}
	}
}

func bindSet(of fileFlag) func(flags *flag.FlagSet) body {
	return func(flags *flag.FlagSet) body {
		param := paramFlag(of, flags)
		value := flags.String("value", "", "the new value; - reads it from standard input `V`")
		return func(_ context.Context, p paths, _ []string) error {
			t, err := param(p)
			if err != nil {
				return err
			}
			given := false
			flags.Visit(func(f *flag.Flag) { given = given || f.Name == "value" })
			if !given {
				return usageError("set: --value is missing; to remove a parameter: unset")
			}
			if *value == "-" {
				text, err := io.ReadAll(io.LimitReader(os.Stdin, 1<<16))
				if err != nil {
					return fmt.Errorf("cannot read the value: %w", err)
				}
				*value = strings.TrimRight(string(text), "\r\n")
			}
			return t.edit(func(doc *ini) error { return doc.set(t.section, t.key, t.scope, *value) })
		}
	}
}

func bindUnset(of fileFlag) func(flags *flag.FlagSet) body {
	return func(flags *flag.FlagSet) body {
		param := paramFlag(of, flags)
		return func(_ context.Context, p paths, _ []string) error {
			t, err := param(p)
			if err != nil {
				return err
			}
			if t.section+"."+t.key == "cluster.secret" {
				return errors.New("a node needs a secret; to change it: nodemgr set --param cluster.secret --value -")
			}
			return t.edit(func(doc *ini) error {
				if !doc.unset(t.section, t.key, t.scope) {
					return fmt.Errorf("%s is not set", parameter(t.section, t.key, t.scope))
				}
				return nil
			})
		}
	}
}

func bindPrint(of fileFlag) func(flags *flag.FlagSet) body {
	return func(flags *flag.FlagSet) body {
		file := of(flags)
		return func(_ context.Context, p paths, _ []string) error {
			f, err := file(p)
			if err != nil {
				return err
			}
			text, _, err := readRegular(f.path, iniSizeLimit)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(text)) {
				if f.path == p.nodeConf() {
					line = secretPattern.ReplaceAllString(line, "$1 (hidden; see nodemgr get)")
				}
				fmt.Print(line)
			}
			_, err = parseINI(f.name, string(text)) // printed even if it has faults, so that they can be seen
			return err
		}
	}
}

// secretPattern finds what may be a secret: behind a key, also one that is
// commented out, and behind the word in a line that is no assignment.
var secretPattern = regexp.MustCompile(`(?i)^(\s*(?:[#;]\s*)?[\w.@-]*secret[\w.@-]*\s*[=:]|\s*[\w.@-]*secret[\w.@-]*\s)\s*\S[^\r\n]*`)

// bindEdit lets a person edit a copy, which takes the file's place if it is
// valid and nobody changed the file meanwhile. Else the copy stays.
func bindEdit(of fileFlag) func(flags *flag.FlagSet) body {
	return func(flags *flag.FlagSet) body {
		file := of(flags)
		return func(_ context.Context, p paths, _ []string) error {
			f, err := file(p)
			if err != nil {
				return err
			}
			if f.path == p.nodeConf() {
				if _, err := ensureConfig(p); err != nil {
					// A file with faults is one to edit.
					fmt.Fprintln(os.Stderr, "error:", err)
				}
			}
			return f.editByHand()
		}
	}
}

func (f configFile) editByHand() error {
	before, _, err := readRegular(f.path, iniSizeLimit)
	if err != nil {
		return err
	}
	copied, err := os.CreateTemp(filepath.Dir(f.path), "."+f.name+".edit.*")
	if err != nil {
		return fmt.Errorf("cannot edit: %w", err)
	}
	_, err = copied.Write(before)
	if err = errors.Join(err, copied.Close()); err != nil {
		return fmt.Errorf("cannot edit: %w", err)
	}
	editErr := runEditor(copied.Name())
	after, _, err := readRegular(copied.Name(), iniSizeLimit)
	if err == nil && bytes.Equal(after, before) {
		return errors.Join(editErr, os.Remove(copied.Name()))
	}
	if err = errors.Join(editErr, err); err == nil {
		err = f.update(func(now string) (string, error) {
			if now != string(before) {
				return "", errors.New("somebody else changed the file meanwhile; run the command again")
			}
			return string(after), nil
		})
	}
	if err != nil {
		return fmt.Errorf("%s is unchanged; your text is in %s:\n%w", f.name, copied.Name(), err)
	}
	return os.Remove(copied.Name())
}

func runEditor(path string) error {
	editor := os.Getenv("VISUAL")
	if editor == "" {
		editor = os.Getenv("EDITOR")
	}
	if editor == "" {
		editor = "vi"
	}
	words, err := splitWords(editor)
	if err != nil || len(words) == 0 {
		return fmt.Errorf("cannot use the editor %q: %w", editor, err)
	}
	cmd := exec.Command(words[0], append(words[1:], path)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// Ctrl-C is for the editor, which gets it too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the editor failed: %w", err)
	}
	return nil
}
