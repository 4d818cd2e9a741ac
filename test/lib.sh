#!/usr/bin/env bash
# lib.sh: what the end-to-end tests share; each of them sources it. It makes
# nodes, real daemons on loopback addresses, each with folders of its own below
# one temporary folder, starts them, waits for conditions, counts checks, and
# ends by pid what this run started, and nothing else.
#
#   AGENTD_BIN  folder with agentd and nodemgr (default ../bin beside the tests)
#
# A test is: begin NAME, functions full of checks, finish. Its last line is
# `NAME: N passed, M failed`; its exit status 1 if a check failed.
# Names and variables here are for the scripts, hence:
# shellcheck disable=SC2034,SC2119,SC2120,SC2317
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=${AGENTD_BIN:-$here/../bin}
title='' tmp='' # of this run
passed=0 failed=0 skipped=0
finished=no
next_port=0
port=0 secret='' # of the cluster that make_cluster made
out='' err='' status=0 # of the last run
declare -A netns=()    # of nodes that are in a network namespace: its path

# begin NAME: the test starts.
begin() {
	title=$1
	[[ -x $bin/agentd && -x $bin/nodemgr ]] || {
		printf '%s: cannot find agentd and nodemgr in %s; build them, or set AGENTD_BIN\n' "$title" "$bin" >&2
		exit 1
	}
	bin=$(cd "$bin" && pwd)
	tmp=$(mktemp -d "${TMPDIR:-/tmp}/agentd-test.XXXXXX")
	# The path of a socket has at most 107 characters.
	if ((${#tmp} > 60)); then
		rmdir "$tmp"
		tmp=$(mktemp -d /tmp/agentd-test.XXXXXX)
	fi
	trap leave EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
	: >"$tmp/printed"
	# Two runs at once have different blocks of ports, below those that the
	# kernel gives to clients.
	next_port=$((22000 + $$ % 1000 * 10))
}

# need COMMAND…: without them this test says so, and is over.
need() {
	local command
	for command in "$@"; do
		type -P "$command" >/dev/null && continue
		skip "all of $title" "$command is not installed"
		finish
	done
}

# finish: the last line, and the exit status.
finish() {
	finished=yes
	exit "$((failed > 0))"
}

# leave is the trap: whatever happened, no process and no file stays.
leave() {
	local ended=$?
	trap - EXIT
	end_own
	on_leave
	[[ -n ${KEEP:-} ]] || rm -rf "$tmp" || true
	if [[ $finished != yes ]]; then
		failed=$((failed + 1))
		printf 'FAIL - the script ended early, with exit status %d\n' "$ended"
	fi
	((skipped == 0)) || printf '%d skipped\n' "$skipped"
	printf '%s: %d passed, %d failed\n' "$title" "$passed" "$failed"
	exit "$((failed > 0))"
}

# on_leave undoes what else a test made; tests that need it define it anew.
on_leave() { :; }

# ---- Checks -----------------------------------------------------------------

# check DESCRIPTION COMMAND…: COMMAND succeeds; if not, what it prints tells
# what was expected and seen.
check() {
	local what=$1 seen
	shift
	if seen=$("$@" 2>&1); then
		passed=$((passed + 1))
		printf 'ok - %s\n' "$what"
		return
	fi
	failed=$((failed + 1))
	printf 'FAIL - %s: %s\n' "$what" "$(one_line "${seen:-$* failed}")"
	printf '%s\n' "$seen" >>"$tmp/printed"
}

# skip DESCRIPTION WHY: a check that cannot be made here.
skip() {
	skipped=$((skipped + 1))
	printf 'skipped - %s: %s\n' "$1" "$2"
}

one_line() {
	local text=${1//$'\n'/ | }
	printf '%s' "${text:0:600}"
}

# run COMMAND…: sets status, out and err. All that is printed is kept, to look
# for the secret in it.
run() {
	status=0
	"$@" >"$tmp/out" 2>"$tmp/err" || status=$?
	cat "$tmp/out" "$tmp/err" >>"$tmp/printed"
	out=$(tr -d '\000' <"$tmp/out") err=$(tr -d '\000' <"$tmp/err")
}

# expect STATUS PATTERN DESCRIPTION COMMAND…: COMMAND exits with STATUS, and
# what it prints matches PATTERN, an extended regular expression.
expect() {
	local want=$1 pattern=$2 what=$3
	shift 3
	run "$@"
	check "$what" ended_as "$want" "$pattern"
}

ended_as() {
	[[ $status == "$1" && $out$'\n'$err =~ $2 ]] && return
	printf 'expected exit status %s and /%s/, seen %s: %s\n%s\n' "$1" "$2" "$status" "$out" "$err"
	return 1
}

# equal WANT SEEN
equal() {
	[[ $2 == "$1" ]] && return
	printf 'expected "%s", seen "%s"\n' "$1" "$2"
	return 1
}

# match PATTERN SEEN, an extended regular expression.
match() {
	[[ $2 =~ $1 ]] && return
	printf 'expected /%s/, seen "%s"\n' "$1" "$2"
	return 1
}

# within LOW HIGH SEEN, integers.
within() {
	(($1 <= $3 && $3 <= $2)) && return
	printf 'expected %d to %d, seen %d\n' "$1" "$2" "$3"
	return 1
}

# same_file WANT SEEN: their contents.
same_file() { diff "$1" "$2"; }

# fails COMMAND…: it does not succeed.
fails() {
	if "$@"; then
		printf 'expected a failure of: %s\n' "$*"
		return 1
	fi
}

# ---- Time -------------------------------------------------------------------

# now_ms prints the time in milliseconds.
now_ms() { printf '%d' "$((${EPOCHREALTIME/./} / 1000))"; }

# until_true SECONDS COMMAND…: tries until COMMAND succeeds, at most so long,
# or five times as long, since machines are shared: what takes longer than it
# should is slow, what never comes is wrong.
until_true() {
	local end=$(($(now_ms) + $1 * 5000))
	shift
	until "$@" >/dev/null 2>&1; do
		if (($(now_ms) >= end)); then
			printf 'did not become true: %s\n' "$*"
			return 1
		fi
		sleep 0.03
	done
}

# ---- Ports ------------------------------------------------------------------

# take_port VARIABLE: a port that nobody uses, another one each time.
take_port() {
	while port_used "$next_port"; do
		next_port=$((next_port + 1))
	done
	printf -v "$1" '%d' "$next_port"
	next_port=$((next_port + 1))
}

port_used() {
	local hex
	printf -v hex '%04X' "$1"
	grep -qsE "^ *[0-9]+: [0-9A-F]+:$hex " /proc/net/{tcp,tcp6,udp,udp6}
}

# ---- Nodes ------------------------------------------------------------------

# on NODE COMMAND…: COMMAND in the environment of NODE. on_node is the same as
# the last thing that a shell does, so that $! is COMMAND's pid.
on() { (on_node "$@"); }

on_node() {
	local node=$1 enter=()
	shift
	[[ -z ${netns[$node]:-} ]] || enter=(nsenter "--net=${netns[$node]}")
	exec "${enter[@]}" env -u AGENTD -u VISUAL -u EDITOR -u NOTIFY_SOCKET -u JOURNAL_STREAM \
		OSVCETC="$tmp/$node/etc" OSVCVAR="$tmp/$node/var" OSVCLOG="$tmp/$node/log" OSVCRUN="$tmp/$node/run" \
		PATH="$bin:$PATH" "$@"
}

# make_folders NODE
make_folders() {
	mkdir -p "$tmp/$1"/{etc,var,log,run}
	chmod 0700 "$tmp/$1"/{etc,var,log,run}
}

# make_node NODE ADDRESS PORT: its folders, and a node.conf without cluster.
make_node() {
	make_folders "$1"
	set_param "$1" node.name "$1"
	set_param "$1" listener.addr "$2"
	set_param "$1" listener.port "$3"
}

# make_cluster NODE…: nodes at 127.0.1.1, 127.0.1.2, … that share a port, a
# list and a secret.
make_cluster() {
	local nodes=("$@") i j
	take_port port
	secret=$(new_secret)
	for i in "${!nodes[@]}"; do
		make_node "${nodes[i]}" "127.0.1.$((i + 1))" "$port"
		set_param "${nodes[i]}" cluster.nodes "$*"
		for j in "${!nodes[@]}"; do
			set_param "${nodes[i]}" "listener.addr@${nodes[j]}" "127.0.1.$((j + 1))"
		done
		set_secret "${nodes[i]}" "$secret"
	done
}

set_param() { on "$1" nodemgr set --param "$2" --value "$3"; }

# set_secret NODE SECRET: by standard input, so that no argument holds it.
set_secret() { on "$1" nodemgr set --param cluster.secret --value - <<<"$2"; }

new_secret() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# start NODE…: their daemons run, and their listeners are bound.
start() {
	local node
	for node in "$@"; do
		on "$node" nodemgr daemon start
	done
	for node in "$@"; do
		until_true 10 bound "$node"
	done
}

stop() {
	local node
	for node in "$@"; do
		on "$node" nodemgr daemon stop --force
	done
}

# pid_of NODE prints its daemon's pid.
pid_of() { cat "$tmp/$1/run/agentd.pid"; }

# listener NODE KEY prints what daemon status says of the listener: state,
# bound, or a figure. The JSON is indented, so lines tell the place.
listener() {
	on "$1" nodemgr daemon status --format json |
		sed -n '/^    "listener": {/,/^    }/s/^ *"'"$2"'": "\{0,1\}\([^",]*\).*/\1/p'
}

bound() { [[ -n $(listener "$1" bound) ]]; }

# config_error NODE prints what is wrong with its node.conf.
config_error() {
	on "$1" nodemgr daemon status --format json | sed -n 's/^        "config_error": "\(.*\)",\{0,1\}$/\1/p'
}

# ---- The end ----------------------------------------------------------------

# own_pids [NODE] prints the processes that have a folder of this run, or of
# this node of it, in their environment: nobody else's can.
own_pids() {
	local file
	while IFS= read -r file; do
		file=${file%/environ}
		printf '%s\n' "${file##*/}"
	done < <(grep -lsz "^OSVCRUN=$tmp/${1:+$1/}" /proc/[0-9]*/environ || true)
}

# end_own ends what this run started: asked first, then killed.
end_own() {
	local pids signal
	for signal in TERM KILL; do
		mapfile -t pids < <(own_pids; jobs -p)
		((${#pids[@]} > 0)) || return 0
		kill -CONT "${pids[@]}" 2>/dev/null || true
		kill -s "$signal" "${pids[@]}" 2>/dev/null || true
		until_true 3 none_left "${pids[@]}" || true
	done
}

none_left() {
	local pid
	for pid in "$@"; do
		[[ $(ps_state "$pid") =~ ^Z?$ ]] || return 1
	done
	return 0
}

ps_state() {
	local stat
	{ stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 0
	stat=${stat##*) }
	printf '%s' "${stat%% *}"
}
