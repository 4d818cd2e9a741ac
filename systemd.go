// systemd.go: resources that are units of systemd, by systemctl, which waits
// for the jobs that it starts. A unit that is enabled as well would be started
// behind the cluster's back at boot; that is the administrator's to see to.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

type systemdDriver struct{}

// systemctlTimeout bounds questions; jobs last as long as the file says.
const systemctlTimeout = 10 * time.Second

var unitTypes = []string{".service", ".socket", ".target", ".timer", ".mount", ".automount", ".swap", ".path", ".slice", ".scope", ".device"}

// unitName completes a unit's name as systemctl would.
func (r *resource) unitName() string {
	if slices.Contains(unitTypes, filepath.Ext(r.unit)) {
		return r.unit
	}
	return r.unit + ".service"
}

// start checks the unit after its job: a program that ends at once has been
// started, for systemd.
func (d systemdDriver) start(ctx context.Context, in *instance, r *resource) error {
	why, err := d.job(ctx, in, r, "start", cmp.Or(r.startTimeout, r.timeout, defaultTimeout))
	if err == nil && why == "" {
		if state, reason := d.check(ctx, in, r); state == statusDown || state == statusUndef {
			why = "it is " + string(state) + " after its start: " + reason
		}
	}
	return jobError("start", r, why, err)
}

// stop looks at the unit, not at the exit status of its job: one that is not
// loaded cannot be stopped and does not run.
func (d systemdDriver) stop(ctx context.Context, in *instance, r *resource) error {
	why, err := d.job(ctx, in, r, "stop", cmp.Or(r.stopTimeout, r.timeout, defaultTimeout))
	if err == nil {
		state, reason := d.check(ctx, in, r)
		if state == statusDown {
			return nil
		}
		why = cmp.Or(why, strings.TrimSuffix("it is "+string(state)+" after its stop: "+reason, ": "))
	}
	return jobError("stop", r, why, err)
}

func jobError(verb string, r *resource, why string, err error) error {
	if err == nil && why != "" {
		err = errors.New(why)
	}
	if err != nil {
		return fmt.Errorf("cannot %s %s: %w", verb, r.unitName(), err)
	}
	return nil
}

// job returns why systemctl refused, empty if it did not.
func (systemdDriver) job(ctx context.Context, in *instance, r *resource, verb string, timeout time.Duration) (why string, err error) {
	result, err := in.run(ctx, r, resourceCommand{argv: []string{"systemctl", verb, "--", r.unitName()}, timeout: timeout})
	if err == nil && result.exit != 0 {
		why = systemctlReason(result)
	}
	return why, err
}

func systemctlReason(result commandResult) string {
	if strings.Contains(result.output, "not been booted with systemd") {
		return "systemd does not run on this machine"
	}
	said, _, _ := strings.Cut(strings.TrimSpace(result.output), "\n") // what follows is advice
	return strings.TrimSuffix(fmt.Sprintf("systemctl ended with exit status %d: %s", result.exit, said), ": ")
}

func showUnit(r *resource) []string {
	return []string{"systemctl", "show", "-p", "LoadState,ActiveState,SubState,Result", "--", r.unitName()}
}

func (systemdDriver) check(ctx context.Context, in *instance, r *resource) (status, string) {
	result, err := in.run(ctx, r, resourceCommand{argv: showUnit(r), timeout: cmp.Or(r.timeout, systemctlTimeout), quiet: true})
	switch {
	case err != nil:
		return statusUndef, err.Error()
	case result.exit != 0:
		return statusUndef, systemctlReason(result)
	}
	return unitStatus(unitProperties(result.output))
}

// unitProperties reads lines of key=value.
func unitProperties(output string) map[string]string {
	properties := map[string]string{}
	for line := range strings.Lines(output) {
		if key, value, found := strings.Cut(strings.TrimSpace(line), "="); found {
			properties[key] = value
		}
	}
	return properties
}

func unitStatus(unit map[string]string) (status, string) {
	switch unit["ActiveState"] {
	case "active", "reloading", "refreshing":
		return statusUp, ""
	case "inactive":
		if load := unit["LoadState"]; load != "loaded" {
			return statusDown, "the unit is " + load
		}
		return statusDown, ""
	case "failed":
		return statusDown, "failed: " + unit["Result"]
	case "activating", "deactivating":
		return statusWarn, unit["ActiveState"] + " (" + unit["SubState"] + ")"
	case "":
		return statusUndef, "systemctl says nothing about the unit"
	}
	return statusUndef, "unknown state " + unit["ActiveState"]
}

func (systemdDriver) faults(s *service, r *resource, _ bool) []error {
	at := s.at(r.rid, "unit")
	if strings.HasPrefix(r.unit, "-") || strings.ContainsAny(r.unit, " \t/*?[") {
		return []error{fmt.Errorf("%s: %q is no unit's name", at, r.unit)}
	}
	ctx, cancel := context.WithTimeout(context.Background(), systemctlTimeout)
	defer cancel()
	output := &boundedBuffer{limit: 4096}
	exit, err := runCommand(ctx, showUnit(r), output, output)
	text, _ := output.text()
	switch load := unitProperties(text)["LoadState"]; {
	case err != nil:
		return []error{fmt.Errorf("%s: %w; a resource of this kind needs systemd", at, err)}
	case exit != 0:
		return []error{fmt.Errorf("%s: %s", at, systemctlReason(commandResult{exit, text}))}
	case load == "not-found":
		return []error{fmt.Errorf("%s: there is no unit %s; systemctl list-unit-files lists those there are", at, r.unitName())}
	case load == "masked":
		return []error{fmt.Errorf("%s: %s is masked; systemctl unmask %s", at, r.unitName(), r.unitName())}
	case load != "loaded":
		return []error{fmt.Errorf("%s: systemd says %q of %s; systemctl status %s tells why", at, load, r.unitName(), r.unitName())}
	}
	return nil
}
