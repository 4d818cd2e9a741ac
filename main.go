// agentd is a cluster agent: one small daemon on every node of a cluster, and
// the commands that talk to it. main.go holds the table of commands and the
// way from a command line to one of them; the way through the program goes on
// in daemon.go.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Exit statuses; status commands have their own (show.go).
const (
	exitDone     = 0
	exitFailed   = 1
	exitTimeout  = 2 // or not reached
	exitNoDaemon = 3
	exitStopped  = 10 // of the daemon, stopped by request: a service manager leaves it stopped
	exitUsage    = 64
)

// exitError ends the program with a status of its own. Without err, what is
// to be said has been said.
type exitError struct {
	status int
	err    error
}

func (e exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}
func (e exitError) Unwrap() error { return e.err }

func usageError(format string, args ...any) error {
	return exitError{exitUsage, fmt.Errorf(format, args...)}
}

// command is what a person types. bind declares its options and returns what
// it does with its arguments.
type command struct {
	name string // the words, the program's name first
	args string
	help string
	bind func(flags *flag.FlagSet) func(ctx context.Context, p paths, args []string) error
}

var commands = []command{
	{"agentd run", "", "run the daemon in the foreground", bindRun},
	{"agentd call", "[--node N] ACTION [key=value…]", "send one request; print the reply as JSON", bindCall},
	{"agentd seal", "[--to N]", "read a request as JSON, write it sealed", bindSeal},
	{"agentd open", "", "read sealed messages, write their JSON", bindOpen},
	{"agentd guard", "", "stop what runs here when no daemon extends its right to; started by the daemon", bindGuard},
	{"nodemgr daemon start", "", "start the daemon, or one thread of it", bindStart},
	{"nodemgr daemon stop", "", "stop the daemon, or one thread; services go on", bindStop},
	{"nodemgr daemon restart", "", "stop and start the daemon", bindRestart},
	{"nodemgr daemon shutdown", "", "stop the services of this node, then the daemon", bindShutdown},
	{"nodemgr daemon status", "", "show threads and nodes", bindDaemonStatus},
	{"nodemgr daemon blacklist status", "", "show who sent invalid messages, as JSON", bindAction("daemon_blacklist_status")},
	{"nodemgr daemon blacklist clear", "", "forget who sent invalid messages", bindAction("daemon_blacklist_clear")},
	{"nodemgr node status", "", "is this node's version installed and finalized", bindNodeStatus},
	{"nodemgr node finalize", "", "record the installed version as finalized", bindFinalize},
	{"nodemgr cluster status", "", "is an upgrade in progress in the cluster", bindClusterStatus},
	{"nodemgr get", "", "print a parameter of node.conf", bindGet(ofNode)},
	{"nodemgr set", "", "set a parameter of node.conf", bindSet(ofNode)},
	{"nodemgr unset", "", "remove a parameter of node.conf", bindUnset(ofNode)},
	{"nodemgr edit config", "", "edit node.conf with $VISUAL, $EDITOR or vi", bindEdit(ofNode)},
	{"nodemgr print config", "", "print node.conf without its secrets", bindPrint(ofNode)},
	{"nodemgr freeze", "", "start and restart nothing by itself", bindNodeFlag("frozen")},
	{"nodemgr thaw", "", "the opposite of freeze", bindNodeFlag("thawed")},
	{"nodemgr ping", "", "ask whether a node's daemon answers", bindPing},
	{"nodemgr queue add", "-- nodemgr|svcmgr ARG…", "queue a command", bindQueueAdd},
	{"nodemgr queue list", "", "show what is queued, and the results", bindQueueList},
	{"nodemgr dequeue actions", "", "run what is queued, oldest first", bindDequeue},
	{"svcmgr ls", "", "list the services", bindServiceList},
	{"svcmgr create", "", "make a service of a file", bindCreate},
	{"svcmgr delete", "", "remove a service that is down; its file is kept as a backup", bindDelete},
	{"svcmgr print status", "", "show what runs, and what is wrong", bindServiceStatus},
	{"svcmgr print config", "", "print the service's file", bindPrint(ofService)},
	{"svcmgr edit config", "", "edit the service's file with $VISUAL, $EDITOR or vi", bindEdit(ofService)},
	{"svcmgr get", "", "print a parameter of the service's file", bindGet(ofService)},
	{"svcmgr set", "", "set a parameter of the service's file", bindSet(ofService)},
	{"svcmgr unset", "", "remove a parameter of the service's file", bindUnset(ofService)},
	{"svcmgr start", "", "start the service", bindOrder("start")},
	{"svcmgr stop", "", "stop the service, and keep it down", bindOrder("stop")},
	{"svcmgr restart", "", "stop the service, and start it", bindOrder("restart")},
	{"svcmgr freeze", "", "start and restart it by hand only", bindOrder("freeze")},
	{"svcmgr thaw", "", "the opposite of freeze", bindOrder("thaw")},
	{"svcmgr abort", "", "give up what was ordered and is not done", bindOrder("abort")},
	{"svcmgr clear", "", "forget failures and counts of restarts, and go on", bindClear},
	{"svcmgr logs", "", "show what a service logged on all its nodes", bindServiceLogs},
	{"svcmgr compliance check", "", "run the modules that check the node for a service", bindCompliance("check")},
	{"svcmgr compliance fix", "", "run the modules that mend what is not compliant", bindCompliance("fix")},
}

func main() {
	err := dispatch(context.Background(), os.Args[1:])
	var exit exitError
	switch {
	case err == nil:
		return
	case errors.As(err, &exit) && exit.err == nil:
		os.Exit(exit.status)
	}
	fmt.Fprintln(os.Stderr, "error:", err)
	switch {
	case exit.status != 0:
		os.Exit(exit.status)
	case errors.Is(err, errNoDaemon):
		os.Exit(exitNoDaemon)
	case errors.Is(err, context.DeadlineExceeded):
		os.Exit(exitTimeout)
	}
	os.Exit(exitFailed)
}

// dispatch finds the command by its words. The wrappers put their own name
// first; `agentd` is understood where no wrapper is named. A service is named
// before the command, as in `svcmgr -s svc1 start`; it is an option of it.
func dispatch(ctx context.Context, words []string) error {
	if len(words) == 0 || words[0] != "nodemgr" && words[0] != "svcmgr" {
		words = append([]string{"agentd"}, words...)
	}
	var service []string
	if words[0] == "svcmgr" && len(words) > 2 && (words[1] == "-s" || words[1] == "--service") {
		service = []string{"-s", words[2]}
		words = append([]string{"svcmgr"}, words[3:]...)
	}
	line := strings.Join(words, " ") + " "
	for _, c := range commands {
		if strings.HasPrefix(line, c.name+" ") {
			return c.execute(ctx, append(service, words[len(strings.Fields(c.name)):]...))
		}
	}
	return helpFor(words)
}

func (c command) execute(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet(c.name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	body := c.bind(flags)
	positional, err := parseArguments(flags, args)
	if errors.Is(err, flag.ErrHelp) {
		c.usage(os.Stdout, flags)
		return nil
	}
	if err == nil && len(positional) > 0 && c.args == "" {
		err = fmt.Errorf("unexpected argument %q", positional[0])
	}
	if err != nil {
		return usageError("%s: %w; see %s --help", c.name, err, c.name)
	}
	return body(ctx, environmentPaths(), positional)
}

// parseArguments lets options stand between arguments, up to a `--`.
func parseArguments(flags *flag.FlagSet, args []string) (positional []string, err error) {
	var rest []string
	for i, arg := range args {
		if arg == "--" {
			args, rest = args[:i], args[i+1:]
			break
		}
	}
	args = joinWait(args)
	for {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		if flags.NArg() == 0 {
			return append(positional, rest...), nil
		}
		positional = append(positional, flags.Arg(0))
		args = flags.Args()[1:]
	}
}

// joinWait makes `--wait 30s` of one word, since --wait also stands alone.
func joinWait(args []string) (joined []string) {
	for i := 0; i < len(args); i++ {
		joined = append(joined, args[i])
		if (args[i] == "--wait" || args[i] == "-wait") && i+1 < len(args) {
			if _, err := parseDuration(args[i+1]); err == nil {
				i++
				joined[len(joined)-1] += "=" + args[i]
			}
		}
	}
	return joined
}

func (c command) usage(out io.Writer, flags *flag.FlagSet) {
	fmt.Fprintf(out, "%s: %s\n\nusage: %s", c.name, c.help, c.name)
	flags.VisitAll(func(f *flag.Flag) {
		if c.args == "" {
			fmt.Fprintf(out, " [%s]", flagWords(f))
		}
	})
	fmt.Fprintln(out, strings.TrimRight(" "+c.args, " "))
	flags.VisitAll(func(f *flag.Flag) {
		_, text := flag.UnquoteUsage(f)
		fmt.Fprintf(out, "  %-22s %s\n", flagWords(f), text)
	})
}

// flagWords is an option with its value, as one types it.
func flagWords(f *flag.Flag) string {
	dashes := "--"
	if len(f.Name) == 1 {
		dashes = "-"
	}
	value, _ := flag.UnquoteUsage(f)
	return strings.TrimSpace(dashes + f.Name + " " + value)
}

// helpFor lists the commands that begin with words, which are none by
// themselves.
func helpFor(words []string) error {
	asked := false
	if last := len(words) - 1; words[last] == "--help" || words[last] == "-h" || words[last] == "help" {
		words, asked = words[:last], true
	}
	prefix := strings.Join(words, " ")
	var lines strings.Builder
	for _, c := range commands {
		if strings.HasPrefix(c.name, prefix+" ") {
			fmt.Fprintf(&lines, "  %-34s %s\n", strings.TrimSpace(c.name+" "+c.args), c.help)
		}
	}
	switch {
	case lines.Len() == 0:
		return usageError("unknown command %q; see %s --help", prefix, words[0])
	case !asked && len(words) > 1:
		return usageError("%s: which one?\n%s", prefix, strings.TrimRight(lines.String(), "\n"))
	}
	fmt.Printf("usage: %s …\n%seach takes --help\n", prefix, lines.String())
	if asked {
		return nil
	}
	return exitError{status: exitUsage}
}

func bindRun(*flag.FlagSet) func(context.Context, paths, []string) error {
	return func(ctx context.Context, p paths, _ []string) error {
		if err := removeMark(); err != nil {
			return err
		}
		ctx, stop := untilSignal(ctx)
		defer stop()
		unix.Umask(0o022) // services inherit it; agentd's own files say their modes
		if os.Getpid() == 1 {
			ended := make(chan os.Signal, 1)
			signal.Notify(ended, syscall.SIGCHLD)
			var reaper sync.WaitGroup
			reaper.Go(func() { reapOrphans(ctx, ended) })
			defer reaper.Wait()
			defer stop()
		}
		// A reader of the log that ends must not end the daemon.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
		byRequest, err := runDaemon(ctx, p, slog.New(logHandler(os.Stderr)))
		if err == nil && byRequest {
			return exitError{status: exitStopped}
		}
		return err
	}
}

// untilSignal is for the commands that have something to end; the others end
// as any program does.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
}
