#!/usr/bin/env bash
# failover.lib.sh: what test/failover stands on: nodes in network namespaces
# that are joined by a bridge in one more, cuts between them, and a ledger of
# which copies of a service lived when, which asks no daemon.
# Variables are used by the script that sources this; functions by check:
# shellcheck disable=SC2034,SC2154,SC2317

switch=''     # the namespace of the bridge
namespaces=() # those that this run made
nodes=()      # of the cluster
# Itself, not a script that looks for it, since it is called often.
python=$(python3 -c 'import sys; print(sys.executable)' 2>/dev/null || true)

# ---- Network ----------------------------------------------------------------

# can_network tells whether namespaces, links, and rules on the bridge can be
# made here. What it prints is why not.
can_network() {
	local name=agentd-$$-try made=0
	ip netns add "$name" 2>&1 || return 1
	{
		ip -n "$name" link add br0 type bridge &&
			ip -n "$name" link add p1 type veth peer name p2 &&
			nsenter --net="/run/netns/$name" nft -f - <<<"$(rules)"
	} 2>&1 || made=1
	ip netns del "$name"
	return "$made"
}

# rules: a pair in the set is a direction that is cut. They are on the bridge,
# so that who sends notices nothing, and a change cuts all of it at once.
rules() {
	cat <<-END
		table bridge cut {
			set pairs { type ipv4_addr . ipv4_addr; }
			chain forward {
				type filter hook forward priority 0;
				ip saddr . ip daddr @pairs drop
			}
		}
	END
}

# make_network NODE…: their namespaces, with eth0 at 10.77.0.1, 10.77.0.2, …
make_network() {
	local i name
	nodes=("$@")
	switch=agentd-$$-switch
	ip netns add "$switch"
	namespaces+=("$switch")
	ip -n "$switch" link add br0 type bridge
	ip -n "$switch" link set br0 up
	in_switch nft -f - <<<"$(rules)"
	for i in "${!nodes[@]}"; do
		name=agentd-$$-${nodes[i]}
		ip netns add "$name"
		namespaces+=("$name")
		netns["${nodes[i]}"]=/run/netns/$name
		# No packets but ours, since they are counted.
		nsenter --net="/run/netns/$name" sh -c 'echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6' 2>/dev/null || true
		ip -n "$switch" link add "${nodes[i]}" type veth peer name eth0 netns "$name"
		ip -n "$switch" link set "${nodes[i]}" master br0 up
		ip -n "$name" link set lo up
		ip -n "$name" addr add "10.77.0.$((i + 1))/24" dev eth0
		ip -n "$name" link set eth0 up
	done
}

in_switch() { nsenter --net="/run/netns/$switch" "$@"; }

on_leave() {
	local name
	for name in "${namespaces[@]}"; do
		ip netns del "$name" || true
	done
	mapfile -t mounted < <(sed -n "s,^[^ ]* \($tmp/[^ ]*\) tmpfs.*,\1,p" /proc/mounts)
	for name in "${mounted[@]}"; do
		umount --lazy "$name" || true
	done
}

# address NODE
address() {
	local i
	for i in "${!nodes[@]}"; do
		[[ ${nodes[i]} != "$1" ]] || printf '10.77.0.%d' "$((i + 1))"
	done
}

# others NODE prints the nodes but it.
others() {
	local node
	for node in "${nodes[@]}"; do
		[[ $node == "$1" ]] || printf '%s\n' "$node"
	done
}

# drop FROM TO…, in pairs: what FROM sends does not reach TO.
drop() {
	local pairs=''
	while (($#)); do
		pairs+="${pairs:+, }$(address "$1") . $(address "$2")"
		shift 2
	done
	in_switch nft "add element bridge cut pairs { $pairs }"
}

# isolate NODE: it reaches nobody, and nobody it.
isolate() {
	local pairs=() other
	for other in $(others "$1"); do
		pairs+=("$1" "$other" "$other" "$1")
	done
	drop "${pairs[@]}"
}

heal() { in_switch nft flush set bridge cut pairs; }

# unplug NODE: its cable is out: unlike with isolate, its system notices. plug
# puts it in again.
unplug() { ip -n "$switch" link set "$1" down; }
plug() { ip -n "$switch" link set "$1" up; }

# sent NODE prints how many bytes it has sent to others.
sent() { on "$1" sed -n 's/^ *eth0: *//p' /proc/net/dev | awk '{ print $9 }'; }

# ---- The cluster ------------------------------------------------------------

# make_members: node.conf of all nodes, which share a secret. Each state folder
# is a small disk of its own, so that it can be full.
make_members() {
	local node other
	secret=$(new_secret)
	for node in "${nodes[@]}"; do
		make_folders "$node"
		mount -t tmpfs -o size=2m,mode=0700 tmpfs "$tmp/$node/var"
		{
			printf '[node]\nname = %s\n[cluster]\nnodes = %s\nsecret = %s\n[listener]\n' "$node" "${nodes[*]}" "$secret"
			for other in "${nodes[@]}"; do
				printf 'addr@%s = %s\n' "$other" "$(address "$other")"
			done
			printf '[hb#1]\ntype = unicast\n'
			for other in "${nodes[@]}"; do
				printf 'addr@%s = %s\n' "$other" "$(address "$other")"
			done
		} >"$tmp/$node/etc/node.conf"
		chmod 0600 "$tmp/$node/etc/node.conf"
	done
}

# agents NODE prints its daemon and its guard; guards NODE the guard alone.
agents() {
	local pid
	for pid in $(own_pids "$1"); do
		[[ /proc/$pid/exe -ef $bin/agentd ]] && printf '%s\n' "$pid"
	done
	return 0
}

guards() {
	local pid
	for pid in $(agents "$1"); do
		! tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q 'agentd guard' || printf '%s\n' "$pid"
	done
}

# kill_all PID…: at once, and waits until they are dead.
kill_all() {
	kill -KILL "$@" 2>/dev/null || true
	until_true 5 none_left "$@"
}

# cut_power NODE: everything of it ends at once, and it is off the network. What
# is in /run is gone with the power, too.
cut_power() {
	local pids
	unplug "$1"
	mapfile -t pids < <(own_pids "$1")
	kill_all "${pids[@]}"
	rm -rf "$tmp/$1/run"
}

# ---- The ledger -------------------------------------------------------------

# make_ledger: see `record` in failover.py.
make_ledger() {
	mkfifo "$tmp/born"
	# Held open here: what is written before the recorder runs is kept.
	exec {born}<>"$tmp/born"
	"$python" "$here/failover.py" record "$tmp" &
	cat >"$tmp/program" <<-END
		#!/usr/bin/env bash
		# program SECONDS: notes that it runs; takes so long to stop.
		printf '%s %s %s %s\n' "\$OSVC_SVCNAME" "\$OSVC_NODENAME" "\$\$" "\$EPOCHREALTIME" 1<>"$tmp/born"
		[[ \$1 != 0 ]] || exec sleep 1000000
		trap 'sleep "\$1"; exit' TERM
		while :; do read -r -t 1000 <>"$tmp/never" || true; done
	END
	mkfifo "$tmp/never"
	chmod 755 "$tmp/program"
}

# make_service NAME SECONDS NODE…: a service that takes so long to stop, on all
# nodes, preferred in this order.
make_service() {
	local name=$1 slow=$2 node
	shift 2
	: >>"$tmp/ledger.$name"
	services+=("$name")
	for node in "${nodes[@]}"; do
		printf '[DEFAULT]\nnodes = %s\norchestrate = ha\n[app#1]\nexec = %s %s\nrestart = 1000\n' "$*" "$tmp/program" "$slow" \
			>"$tmp/$node/etc/$name.conf"
	done
}

# copies SERVICE prints node and pid of each copy that lives.
copies() {
	awk '$2 == "start" { alive[$4] = $3 } $2 == "end" { delete alive[$4] }
		END { for (pid in alive) print alive[pid], pid }' "$tmp/ledger.$1"
}

holder() { copies "$1" | awk '{ print $1 }'; }
pid_in_ledger() { copies "$1" | awk '{ print $2 }'; }

# overlaps SERVICE SINCE prints each start after SINCE while another copy lived.
overlaps() {
	sort -n "$tmp/ledger.$1" | awk -v since="$2" '
		$2 == "end" { delete alive[$4] }
		$2 == "start" {
			for (pid in alive) if ($1 >= since)
				print "started on " $3 " (" $4 ") at " $1 " while it ran on " alive[pid] " (" pid ")"
			alive[$4] = $3
		}'
}

# took SERVICE SINCE prints the milliseconds from SINCE to the next start.
took() { sort -n "$tmp/ledger.$1" | awk -v since="$2" '$2 == "start" && $1 >= since { printf "%.0f", ($1 - since) * 1000; exit }'; }

# gap SERVICE SINCE prints the milliseconds from the end of the copy that lived
# at SINCE to the first start after that; less than 0: they overlapped.
gap() {
	sort -n "$tmp/ledger.$1" | awk -v since="$2" '
		$2 == "start" { if ($1 < since) old = $4; else if (!begun) begun = $1 }
		$2 == "end" && $4 == old { ended = $1 }
		END { if (begun && ended) printf "%.0f", (begun - ended) * 1000 }'
}

# stopped_after SERVICE SINCE prints the milliseconds from SINCE to the next end.
stopped_after() { sort -n "$tmp/ledger.$1" | awk -v since="$2" '$2 == "end" && $1 >= since { printf "%.0f", ($1 - since) * 1000; exit }'; }

elsewhere() {
	local now
	now=$(holder "$1")
	[[ -n $now && $now != *"$2"* && $now != *$'\n'* ]]
}

no_copy() { [[ -z $(copies "$1") ]]; }

# ---- Settling ---------------------------------------------------------------

# sockets prints those of all daemons.
sockets() { printf "$tmp/%s/run/agentd.sock\n" "${nodes[@]}"; }

# agree [SERVICE]: within 20 s, or five times that, one copy of it, or of each,
# lives, and every daemon says so, and where.
agree() {
	local names=${1:-${services[*]}} sockets
	mapfile -t sockets < <(sockets)
	"$python" "$here/failover.py" agree 100 "$tmp" "${names// /,}" "${sockets[@]}"
}

# running NODE…: starts the daemons that do not run; as the unit does, once more
# where one ends at once.
running() {
	local node
	for node in "$@"; do
		on "$node" nodemgr daemon start >/dev/null 2>>"$tmp/printed" && continue
		printf '# the daemon of %s has to be started once more\n' "$node"
		on "$node" nodemgr daemon start >/dev/null 2>>"$tmp/printed" || true
	done
}

# ---- Figures ----------------------------------------------------------------

# figure NAME VALUE: kept, for the table at the end.
figure() {
	[[ -n $2 ]] || return 0
	printf '# %s: %s\n' "$1" "$2"
	printf '%s\t%s\n' "$1" "$2" >>"$tmp/figures"
}

median() { sort -n | awk '{ v[NR] = $1 } END { if (NR) printf "%.0f", NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }

figures_of() { awk -F '\t' -v name="$1" '$1 == name { print $2 }' "$tmp/figures"; }

# print_figures: each with its runs, smallest, middle, largest.
print_figures() {
	local name
	[[ -e $tmp/figures ]] || return 0
	while IFS= read -r name; do
		printf '# figure: %-66s n=%-3d min %-7s median %-7s max %s\n' "$name" "$(figures_of "$name" | wc -l)" \
			"$(figures_of "$name" | sort -n | head -n 1)" "$(figures_of "$name" | median)" "$(figures_of "$name" | sort -n | tail -n 1)"
	done < <(cut -f 1 "$tmp/figures" | awk '!seen[$0]++')
}
