package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// fakeSystemctl keeps units as files: <unit>.load, <unit>.active, <unit>.next
// (what a start leads to), and prints as systemctl does.
const fakeSystemctl = `#!/bin/sh
cd "$FAKE_UNITS" || exit 9
echo "$*" >>calls
get() { cat "$1" 2>/dev/null || echo "$2"; }
if [ -e booted-otherwise ]; then
	echo "System has not been booted with systemd as init system (PID 1). Can't operate." >&2
	echo "Failed to connect to bus: Host is down" >&2
	exit 1
fi
verb=$1
shift
while [ "$1" != -- ]; do shift; done
unit=$2
load=$(get "$unit.load" not-found) active=$(get "$unit.active" inactive)
case $verb in
show)
	result=success
	[ "$active" != failed ] || result=exit-code
	printf 'Result=%s\nLoadState=%s\nActiveState=%s\nSubState=%s-sub\n' "$result" "$load" "$active" "$active"
	;;
start)
	if [ "$load" != loaded ]; then
		echo "Failed to start $unit: Unit $unit not found." >&2
		exit 5
	fi
	next=$(get "$unit.next" active)
	[ "$next" != hang ] || exec sleep 60
	echo "$next" >"$unit.active"
	if [ "$next" = failed ]; then
		echo "Job for $unit failed because the control process exited with error code." >&2
		echo "See \"systemctl status $unit\" and \"journalctl -xeu $unit\" for details." >&2
		exit 1
	fi
	;;
stop)
	if [ "$load" != loaded ]; then
		echo "Failed to stop $unit: Unit $unit not loaded." >&2
		exit 5
	fi
	[ -e "$unit.stays" ] || echo inactive >"$unit.active"
	;;
esac
`

// fakeUnits puts a systemctl on the path, with units of the files' names.
func fakeUnits(t *testing.T, files map[string]string) (folder string) {
	t.Helper()
	bin, folder := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(bin, "systemctl"), []byte(fakeSystemctl), 0o755))
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("FAKE_UNITS", folder)
	for name, text := range files {
		writeText(t, filepath.Join(folder, name), text+"\n")
	}
	return folder
}

func TestSystemdLife(t *testing.T) {
	folder := fakeUnits(t, map[string]string{"web.service.load": "loaded"})
	s := testService(t, "[systemd#1]\nunit = web\nstart_timeout = 7s\n")
	var d systemdDriver
	in, r, ctx := newDriven(s), s.resources[0], t.Context()
	if faults := d.faults(s, r, false); faults != nil {
		t.Fatal(faults)
	}
	state, why := d.check(ctx, in.instance, r)
	wantStatus(t, "before", state, statusDown, why, "")
	must(t, d.start(ctx, in.instance, r))
	if in.calls[1].timeout != 7*time.Second || !in.calls[2].quiet {
		t.Errorf("calls %+v", in.calls)
	}
	state, why = d.check(ctx, in.instance, r)
	wantStatus(t, "started", state, statusUp, why, "")
	must(t, d.stop(ctx, in.instance, r))
	must(t, d.stop(ctx, in.instance, r))
	show := "show -p LoadState,ActiveState,SubState,Result -- web.service\n"
	if got, want := readText(t, filepath.Join(folder, "calls")), show+show+"start -- web.service\n"+show+show+"stop -- web.service\n"+show+"stop -- web.service\n"+show; got != want {
		t.Errorf("systemctl was called with\n%swant\n%s", got, want)
	}
}

func TestSystemdStates(t *testing.T) {
	for active, want := range map[string]struct {
		state status
		why   string
	}{
		"active": {statusUp, ""}, "reloading": {statusUp, ""}, "refreshing": {statusUp, ""}, "inactive": {statusDown, ""}, "failed": {statusDown, "failed: exit-code"},
		"activating": {statusWarn, "activating (activating-sub)"}, "deactivating": {statusWarn, "deactivating (deactivating-sub)"},
		"maintenance": {statusUndef, "unknown state maintenance"}, "": {statusUndef, "says nothing"},
	} {
		fakeUnits(t, map[string]string{"x.socket.load": "loaded", "x.socket.active": active})
		s := testService(t, "[systemd#1]\nunit = x.socket\n")
		state, why := systemdDriver{}.check(t.Context(), newDriven(s).instance, s.resources[0])
		wantStatus(t, active, state, want.state, why, want.why)
	}
}

func TestSystemdFailures(t *testing.T) {
	fakeUnits(t, map[string]string{
		"bad.service.load": "loaded", "bad.service.next": "failed", "brief.service.load": "loaded", "brief.service.next": "inactive",
		"slow.service.load": "loaded", "slow.service.next": "hang", "stays.service.load": "loaded", "stays.service.active": "active", "stays.service.stays": "",
	})
	s := testService(t, "[systemd#bad]\nunit = bad\n[systemd#brief]\nunit = brief\n[systemd#none]\nunit = none\n[systemd#slow]\nunit = slow\nstart_timeout = 100ms\n[systemd#stays]\nunit = stays\n")
	in := newDriven(s)
	for _, test := range []struct {
		rid, start, stop string // parts of the errors
		down             string // why it is down
	}{
		{"systemd#bad", "cannot start bad.service: systemctl ended with exit status 1: Job for bad.service failed because the control process exited with error code.", "", ""},
		{"systemd#brief", "cannot start brief.service: it is down after its start: ", "", ""},
		{"systemd#none", "cannot start none.service: systemctl ended with exit status 5: Failed to start none.service: Unit none.service not found.", "", "the unit is not-found"},
		{"systemd#slow", "cannot start slow.service: systemctl did not end in time", "", ""},
		{"systemd#stays", "", "cannot stop stays.service: it is up after its stop", "-"},
	} {
		r := s.resource(test.rid)
		for i, err := range []error{(systemdDriver{}).start(t.Context(), in.instance, r), (systemdDriver{}).stop(t.Context(), in.instance, r)} {
			if want := []string{test.start, test.stop}[i]; (err != nil) != (want != "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", test.rid, err, want)
			}
		}
		if test.down != "-" {
			state, why := systemdDriver{}.check(t.Context(), in.instance, r)
			wantStatus(t, test.rid, state, statusDown, why, test.down)
		}
	}
}

func TestSystemdFaults(t *testing.T) {
	folder := fakeUnits(t, map[string]string{"good@1.service.load": "loaded", "a.b.service.load": "loaded", "x.target.load": "loaded", "bad.service.load": "bad-setting", "masked.service.load": "masked"})
	for unit, want := range map[string]string{
		"good@1": "", "a.b": "", "x.target": "", "none": "there is no unit none.service", "bad": `systemd says "bad-setting" of bad.service`, "masked": "masked.service is masked; systemctl unmask masked.service",
		"-x": "no unit's name", "a b": "no unit's name", "a/b": "no unit's name", "x*": "no unit's name",
	} {
		s := testService(t, "[systemd#1]\nunit = "+unit+"\n")
		faults := systemdDriver{}.faults(s, s.resources[0], false)
		if (want == "") != (faults == nil) || faults != nil && (len(faults) != 1 || !strings.Contains(faults[0].Error(), want) || !strings.HasPrefix(faults[0].Error(), "svc1.conf:2: systemd#1.unit: ")) {
			t.Errorf("%s: %v, want %q", unit, faults, want)
		}
	}
	s := testService(t, "[systemd#1]\nunit = good@1\n")
	writeText(t, filepath.Join(folder, "booted-otherwise"), "")
	state, why := systemdDriver{}.check(t.Context(), newDriven(s).instance, s.resources[0])
	wantStatus(t, "without systemd", state, statusUndef, why, "systemd does not run on this machine")
	if faults := (systemdDriver{}).faults(s, s.resources[0], false); len(faults) != 1 || !strings.Contains(faults[0].Error(), "systemd does not run on this machine") {
		t.Error(faults)
	}
	if err := (systemdDriver{}).stop(t.Context(), newDriven(s).instance, s.resources[0]); err == nil || !strings.Contains(err.Error(), "systemd does not run") {
		t.Error(err)
	}
	t.Setenv("PATH", t.TempDir())
	if faults := (systemdDriver{}).faults(s, s.resources[0], false); len(faults) != 1 || !strings.Contains(faults[0].Error(), "needs systemd") {
		t.Error(faults)
	}
	failing := &instance{service: s, up: map[string]bool{}, run: func(context.Context, *resource, resourceCommand) (commandResult, error) {
		return commandResult{}, errors.New("cannot run systemctl: gone")
	}}
	state, why = systemdDriver{}.check(t.Context(), failing, s.resources[0])
	wantStatus(t, "without systemctl", state, statusUndef, why, "cannot run systemctl")
}

func TestRealSystemctl(t *testing.T) {
	s := testService(t, "[systemd#1]\nunit = agentd-test-no-such-unit\n")
	if faults := (systemdDriver{}).faults(s, s.resources[0], false); len(faults) != 1 {
		t.Errorf("%v, want one fault, with or without systemd", faults)
	} else {
		t.Log(faults[0])
	}
}
