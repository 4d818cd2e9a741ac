// ocf.go: resources that agents of the OCF standard run, unchanged. It knows
// how an agent is called and what its exit status means; what agents say of
// themselves is metadata.go's.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// ocfDriver calls the agents in root/resource.d/<provider>/<type>. It starts
// without memory: what it forgets costs a probe or a call for metadata.
type ocfDriver struct {
	root string // empty: OCF_ROOT of the environment, else where packages put it

	mu    sync.Mutex // guards the cache; not held while an agent runs
	cache map[string]cachedMetadata
}

// ocfLimit bounds the cache; a full one is emptied.
const ocfLimit = 1000

// ocfWords are the exit statuses of the standard (0 to 9), and those that
// agents have added to it.
var ocfWords = map[int]string{
	0: "running", 1: "failed", 2: "arguments refused", 3: "action not implemented", 4: "not permitted",
	5: "something that it needs is not installed", 6: "configuration refused", 7: "not running",
	8: "promoted", 9: "promoted and failed", 190: "running, but degraded", 191: "promoted, but degraded",
}

const exitReasonPrefix = "ocf-exit-reason:"

// refusedHere tells whether an agent could not do anything on this node.
func refusedHere(exit int) bool { return exit >= 2 && exit <= 6 }

// start remembers the resource as up even when it failed, unless the agent
// refused to begin: something may run.
func (d *ocfDriver) start(ctx context.Context, in *instance, r *resource) error {
	exit, err := d.act(ctx, in, r, "start", cmp.Or(r.startTimeout, r.timeout))
	if !refusedHere(exit) && !errors.Is(err, os.ErrNotExist) {
		in.holds(r.rid, true)
	}
	return err
}

func (d *ocfDriver) stop(ctx context.Context, in *instance, r *resource) error {
	_, err := d.act(ctx, in, r, "stop", cmp.Or(r.stopTimeout, r.timeout))
	if err == nil {
		in.holds(r.rid, false)
	}
	return err
}

// act runs an action that succeeds with exit status 0 only: a start that ends
// with "not running" has failed, whatever it did.
func (d *ocfDriver) act(ctx context.Context, in *instance, r *resource, action string, timeout time.Duration) (exit int, err error) {
	result, err := d.call(ctx, in, r, action, timeout, 0)
	if err == nil && result.exit != 0 {
		err = errors.New(ocfReason(result))
	}
	if err != nil {
		err = fmt.Errorf("agent %s:%s cannot %s it: %w", r.provider, r.agent, action, err)
	}
	return result.exit, err
}

// check asks a resource that was not seen up without an interval, which makes
// it a probe: agents answer it with "not running" where a file is missing that
// only the active node has, and with an error otherwise.
func (d *ocfDriver) check(ctx context.Context, in *instance, r *resource) (status, string) {
	up := in.held(r.rid)
	interval := time.Duration(0)
	if up {
		interval = r.checkInterval
	}
	result, err := d.call(ctx, in, r, "monitor", r.timeout, interval)
	switch {
	case err != nil && up:
		return statusWarn, err.Error()
	case err != nil:
		return statusUndef, err.Error()
	}
	switch exit := result.exit; {
	case exit == 7:
		in.holds(r.rid, false)
	case exit == 0, exit >= 8: // running, in some way or other
		in.holds(r.rid, true)
	}
	return ocfStatus(result, up)
}

// ocfStatus says "down" only where an agent is sure, since what is down may be
// started elsewhere: after an error, something may run. Before the resource
// was seen up, a refusal means that it cannot run on this node.
func ocfStatus(result commandResult, up bool) (status, string) {
	switch exit := result.exit; {
	case exit == 0:
		return statusUp, ""
	case exit == 8:
		return statusUp, ocfWords[exit]
	case exit == 7:
		return statusDown, saidReason(result.output)
	case refusedHere(exit) && !up:
		return statusDown, "cannot run here: " + ocfReason(result)
	}
	return statusWarn, ocfReason(result)
}

// ocfReason puts an exit status into words, with the agent's own.
func ocfReason(result commandResult) string {
	text := fmt.Sprintf("exit status %d (%s)", result.exit, cmp.Or(ocfWords[result.exit], "not one of the standard"))
	if said := cmp.Or(saidReason(result.output), lastLine(result.output)); said != "" {
		text += ": " + said
	}
	return text
}

// saidReason is the last reason that an agent gave; earlier ones may be about
// what it tried before.
func saidReason(output string) string {
	at := strings.LastIndex(output, exitReasonPrefix)
	if at < 0 {
		return ""
	}
	reason, _, _ := strings.Cut(output[at+len(exitReasonPrefix):], "\n")
	return lastLine(reason)
}

// call runs the agent. Without a timeout in the file, the agent's own advice
// counts.
func (d *ocfDriver) call(ctx context.Context, in *instance, r *resource, action string, timeout, interval time.Duration) (commandResult, error) {
	path := d.path(r)
	if timeout == 0 {
		if m, err := d.metadata(ctx, path); err == nil {
			timeout = m.timeouts[action]
		}
		timeout = cmp.Or(timeout, defaultTimeout)
	}
	temporary := cmp.Or(os.Getenv("HA_RSCTMP"), "/run/resource-agents")
	if os.Mkdir(temporary, 0o755) == nil { // a failure is the agent's to report
		os.Chmod(temporary, 0o755|os.ModeSticky) // whatever the umask
	}
	env := append(d.environment(),
		// A file name in many agents, a container's name in some: neither # nor /.
		"OCF_RESOURCE_INSTANCE="+in.name()+"_"+strings.ReplaceAll(r.rid, "#", "_"),
		"OCF_RESOURCE_PROVIDER="+r.provider,
		"OCF_RESOURCE_TYPE="+r.agent,
		"HA_RSCTMP="+temporary,
		fmt.Sprintf("OCF_RESKEY_CRM_meta_timeout=%d", timeout.Milliseconds()),
	)
	if interval > 0 {
		env = append(env, fmt.Sprintf("OCF_RESKEY_CRM_meta_interval=%d", interval.Milliseconds()))
	}
	for _, p := range r.params {
		env = append(env, "OCF_RESKEY_"+agentParameter(p.name)+"="+p.value)
	}
	return in.run(ctx, r, resourceCommand{argv: []string{path, action}, env: env, timeout: timeout, quiet: action == "monitor"})
}

// environment is what agents need for any action.
func (d *ocfDriver) environment() []string {
	return []string{
		"OCF_ROOT=" + d.rootFolder(), "OCF_RA_VERSION_MAJOR=1", "OCF_RA_VERSION_MINOR=1",
		"OCF_EXIT_REASON_PREFIX=" + exitReasonPrefix,
		"HA_LOGFACILITY=none", // to stderr, hence to the service's log, which has the time already:
		"HA_DATEFMT= ",
	}
}

func (d *ocfDriver) rootFolder() string { return cmp.Or(d.root, os.Getenv("OCF_ROOT"), "/usr/lib/ocf") }

func (d *ocfDriver) path(r *resource) string {
	return filepath.Join(d.rootFolder(), "resource.d", r.provider, r.agent)
}

func (d *ocfDriver) faults(s *service, r *resource, _ bool) []error {
	at, path := s.at(r.rid, "agent"), d.path(r)
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return []error{fmt.Errorf("%s: %s", at, d.missing(r))}
	case err != nil:
		return []error{fmt.Errorf("%s: cannot use the agent: %w", at, err)}
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
		return []error{fmt.Errorf("%s: %s is not executable; chmod 755 it if it is an agent", at, path)}
	}
	m, err := d.metadata(context.Background(), path)
	if err != nil {
		return []error{fmt.Errorf("%s: cannot read the metadata of the agent: %w", at, err)}
	}
	return m.faults(s, r)
}

// missing tells what there is instead of an agent.
func (d *ocfDriver) missing(r *resource) string {
	top := filepath.Join(d.rootFolder(), "resource.d")
	providers := namesIn(top)
	if !slices.ContainsFunc(providers, func(p string) bool { return len(namesIn(filepath.Join(top, p))) > 0 }) {
		return fmt.Sprintf("there are no OCF agents in %s; install the package resource-agents", top)
	}
	if !slices.Contains(providers, r.provider) {
		return fmt.Sprintf("there is no provider %q of agents in %s, only %s%s", r.provider, top, strings.Join(providers, ", "), nearest(r.provider, providers))
	}
	folder := filepath.Join(top, r.provider)
	return fmt.Sprintf("there is no agent %q in %s%s", r.agent, folder, nearest(r.agent, namesIn(folder)))
}

// namesIn lists a folder as far as its names can be an agent's; none if it
// cannot be read.
func namesIn(folder string) (names []string) {
	entries, _ := os.ReadDir(folder)
	for _, entry := range entries {
		if namePattern.MatchString(entry.Name()) {
			names = append(names, entry.Name())
		}
	}
	return names
}
