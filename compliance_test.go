package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// complianceFolder has a module a file; a name that ends in - is not
// executable, one that ends in + can be written by others.
func complianceFolder(t *testing.T, scripts map[string]string) string {
	t.Helper()
	folder := filepath.Join(t.TempDir(), "compliance")
	must(t, os.MkdirAll(folder, 0o755))
	for name, script := range scripts {
		path := filepath.Join(folder, strings.TrimRight(name, "-+"))
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o755))
		switch name[len(name)-1] {
		case '-':
			must(t, os.Chmod(path, 0o644))
		case '+':
			must(t, os.Chmod(path, 0o777))
		}
	}
	return folder
}

func runCompliance(t *testing.T, folder, action, only string) (*complianceReport, string, error) {
	t.Helper()
	report := &complianceReport{Svcname: "svc1", Nodename: "node1", Action: action}
	var out bytes.Buffer
	err := report.run(t.Context(), folder, only, &out)
	report.show(&out)
	return report, out.String(), err
}

func TestComplianceModules(t *testing.T) {
	folder := complianceFolder(t, map[string]string{
		"web/10-ok":   `echo "$1 $OSVC_SVCNAME $OSVC_NODENAME"`,
		"web/20-not":  "echo wrong >&2; exit 1",
		"web/05-na":   "exit 2",
		"db/odd":      "exit 9",
		"db/killed":   "kill -9 $$",
		"db/noise":    "head -c 100000 /dev/zero | tr '\\0' x",
		"db/README-":  "",
		"db/shared+":  "exit 0",
		"fine/first":  "exit 0",
		"fine/second": "exit 2",
		".git/hook":   "exit 1",
	})
	must(t, os.Symlink("/bin/true", filepath.Join(folder, "db", "link")))
	must(t, os.Mkdir(filepath.Join(folder, "db", "folder"), 0o755))
	report, out, err := runCompliance(t, folder, "check", "")
	must(t, err)
	var got []string
	for _, m := range report.Modules {
		exit := "-"
		if m.Exit != nil {
			exit = fmt.Sprint(*m.Exit)
		}
		got = append(got, m.Moduleset+"/"+m.Module+" "+m.Status+" "+exit)
	}
	want := "db/killed error -, db/link error -, db/noise ok 0, db/odd error 9, db/shared error -, fine/first ok 0, fine/second n/a 2, web/05-na n/a 2, web/10-ok ok 0, web/20-not not ok 1"
	if strings.Join(got, ", ") != want {
		t.Errorf("%s\nwant %s", strings.Join(got, ", "), want)
	}
	if report.status() != exitFailed {
		t.Errorf("status %d", report.status())
	}
	for _, part := range []string{
		"web/10-ok:\n  check svc1 node1\n", "web/20-not:\n  wrong\n", "! web/20-not   not ok\n", "  fine/second  n/a\n", "34464 bytes more",
		"! " + folder + "/db/README is not an executable file; it is not run\n", "! " + folder + "/db/folder is not an",
		"others may write " + folder + "/db/shared; not run; chmod go-w it", "db/link is not a regular file", "exit status 9 is none of 0 (ok), 1 (not ok), 2 (n/a)", "was ended by a signal",
	} {
		if !strings.Contains(out, part) {
			t.Errorf("%q is not in\n%s", part, out[max(0, len(out)-2000):])
		}
	}
	report, out, err = runCompliance(t, folder, "fix", "web")
	must(t, err)
	if len(report.Modules) != 3 || !strings.Contains(out, "fix svc1 node1") {
		t.Errorf("only web: %s", out)
	}
	if report, _, err = runCompliance(t, folder, "check", "fine"); err != nil || report.status() != exitDone {
		t.Errorf("%v, status %d; want 0 where all are ok or n/a", err, report.status())
	}
}

func TestComplianceRefusals(t *testing.T) {
	folder := complianceFolder(t, map[string]string{"web/a": "", "db/b": "", "empty/README-": ""})
	for only, want := range map[string]string{
		"wb":    "there is no moduleset \"wb\" in " + folder + "; there are: db, empty, web; did you mean ",
		"../x":  "is not the name of a moduleset",
		"..":    "is not the name of a moduleset",
		"a/b":   "is not the name of a moduleset",
		"empty": "there is no module to run; put executable files into " + folder + "/empty",
	} {
		if _, _, err := runCompliance(t, folder, "check", only); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", only, err, want)
		}
	}
	if _, _, err := runCompliance(t, filepath.Join(folder, "none"), "check", ""); err == nil || !strings.Contains(err.Error(), folder+"/none/<moduleset>") {
		t.Error(err)
	}
	must(t, os.Chmod(filepath.Join(folder, "web"), 0o777))
	if report, _, err := runCompliance(t, folder, "check", "web"); err != nil || !strings.Contains(report.Modules[0].Error, "others may write "+folder+"/web;") {
		t.Errorf("a folder that others may write: %v, %+v", err, report.Modules)
	}
	if os.Geteuid() == 0 {
		must(t, os.Chown(filepath.Join(folder, "db", "b"), 65534, 0))
		if report, _, err := runCompliance(t, folder, "check", "db"); err != nil || !strings.Contains(report.Modules[0].Error, "belongs to user 65534") {
			t.Errorf("another's module: %v, %+v", err, report.Modules)
		}
	}
	interrupted, cancel := context.WithCancel(t.Context())
	cancel()
	must(t, os.Chmod(filepath.Join(folder, "web"), 0o755))
	if err := new(complianceReport).run(interrupted, folder, "", &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), "interrupted in db/b") {
		t.Error(err)
	}
}

func TestComplianceCommand(t *testing.T) {
	p := testFolders(t)
	t.Setenv("OSVCETC", p.etc)
	run := func(words ...string) error {
		return dispatch(t.Context(), append([]string{"svcmgr"}, words...))
	}
	want := func(err error, part string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%v, want %q", err, part)
		}
	}
	writeText(t, p.nodeConf(), "[node]\nname = node1\n[cluster]\nnodes = node1\nsecret = 0123456789abcdef\n")
	want(run("compliance", "check"), "name a service")
	want(run("-s", "svc1", "compliance", "check"), `there is no service "svc1"`)
	writeText(t, p.servicePath("svc1"), "[app#1]\nexec = /bin/true\n")
	want(run("-s", "svc1", "compliance", "check"), "there is no moduleset")
	want(run("-s", "svc1", "compliance", "check", "--format", "xml"), "xml")
	writeText(t, filepath.Join(p.etc, "compliance", "web", "a"), "#!/bin/sh\nexit 0\n")
	must(t, os.Chmod(filepath.Join(p.etc, "compliance", "web", "a"), 0o700))
	must(t, run("-s", "svc1", "compliance", "fix", "--moduleset", "web", "--format", "json"))
	var exit exitError
	want(run("-s", "svc1", "compliance", "fix", "--moduleset", "nothing"), "there are: web")
	writeText(t, filepath.Join(p.etc, "compliance", "web", "a"), "#!/bin/sh\nexit 1\n")
	if err := run("-s", "svc1", "compliance", "check"); !errors.As(err, &exit) || exit.status != exitFailed {
		t.Errorf("not ok: %v", err)
	}
}
