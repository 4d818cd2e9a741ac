// configure.go: the commands on node.conf.

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
)

// paramFlag is the option that names a parameter.
func paramFlag(flags *flag.FlagSet) func() (section, key, scope string, err error) {
	name := flags.String("param", "", "the parameter, `SECTION.KEY[@NODE]`")
	return func() (string, string, string, error) {
		section, key, scope, err := splitParameter(*name)
		if err != nil {
			return "", "", "", usageError("--param: %w", err)
		}
		if nodeKeys.find(section, key) == nil {
			return "", "", "", fmt.Errorf("unknown parameter %s%s", *name, nodeKeys.didYouMean(section, key))
		}
		return section, key, scope, nil
	}
}

func bindGet(flags *flag.FlagSet) body {
	param := paramFlag(flags)
	return func(_ context.Context, p paths, _ []string) error {
		section, key, scope, err := param()
		if err != nil {
			return err
		}
		c, err := loadConfig(p)
		if err != nil {
			return err
		}
		if scope == "" {
			scope = c.node
		}
		text, _, ok := c.doc.value(section, key, scope)
		switch {
		case ok:
		case section+"."+key == "cluster.nodes":
			text = strings.Join(c.members(), " ")
		case section+"."+key == "node.name":
			text = c.node
		default:
			text = nodeKeys.find(section, key).initial
		}
		fmt.Println(text)
		return nil
	}
}

func bindSet(flags *flag.FlagSet) body {
	param := paramFlag(flags)
	value := flags.String("value", "", "the new value; - reads it from standard input `V`")
	return func(_ context.Context, p paths, _ []string) error {
		section, key, scope, err := param()
		if err != nil {
			return err
		}
		given := false
		flags.Visit(func(f *flag.Flag) { given = given || f.Name == "value" })
		if !given {
			return usageError("nodemgr set: --value is missing; to remove a parameter: nodemgr unset")
		}
		if *value == "-" {
			text, err := io.ReadAll(io.LimitReader(os.Stdin, 1<<16))
			if err != nil {
				return fmt.Errorf("cannot read the value: %w", err)
			}
			*value = strings.TrimRight(string(text), "\r\n")
		}
		return editConfig(p, func(doc *ini) error { return doc.set(section, key, scope, *value) })
	}
}

func bindUnset(flags *flag.FlagSet) body {
	param := paramFlag(flags)
	return func(_ context.Context, p paths, _ []string) error {
		section, key, scope, err := param()
		if err != nil {
			return err
		}
		if section+"."+key == "cluster.secret" {
			return errors.New("a node needs a secret; to change it: nodemgr set --param cluster.secret --value -")
		}
		return editConfig(p, func(doc *ini) error {
			if !doc.unset(section, key, scope) {
				return fmt.Errorf("%s is not set", parameter(section, key, scope))
			}
			return nil
		})
	}
}

func bindPrint(*flag.FlagSet) body {
	return func(_ context.Context, p paths, _ []string) error {
		text, _, err := readRegular(p.nodeConf(), iniSizeLimit)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			fmt.Print(secretPattern.ReplaceAllString(line, "$1 (hidden; see nodemgr get)"))
		}
		_, err = parseINI("node.conf", string(text)) // printed even if it has faults, so that they can be seen
		return err
	}
}

// secretPattern finds what may be a secret: behind a key, also one that is
// commented out, and behind the word in a line that is no assignment.
var secretPattern = regexp.MustCompile(`(?i)^(\s*(?:[#;]\s*)?[\w.@-]*secret[\w.@-]*\s*[=:]|\s*[\w.@-]*secret[\w.@-]*\s)\s*\S[^\r\n]*`)

// bindEdit lets a person edit a copy, which takes the file's place if it is
// valid and nobody changed the file meanwhile. Else the copy stays.
func bindEdit(*flag.FlagSet) body {
	return func(_ context.Context, p paths, _ []string) error {
		if _, err := ensureConfig(p); err != nil {
			// A file with faults is one to edit.
			fmt.Fprintln(os.Stderr, "error:", err)
		}
		before, _, err := readRegular(p.nodeConf(), iniSizeLimit)
		if err != nil {
			return err
		}
		copied, err := os.CreateTemp(p.etc, ".node.conf.edit.*")
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
			err = updateConfig(p, func(now string) (string, error) {
				if now != string(before) {
					return "", errors.New("somebody else changed the file meanwhile; run the command again")
				}
				return string(after), nil
			})
		}
		if err != nil {
			return fmt.Errorf("node.conf is unchanged; your text is in %s:\n%w", copied.Name(), err)
		}
		return os.Remove(copied.Name())
	}
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
