#!/usr/bin/env python3
"""What test/failover needs and bash cannot do: it is called by it, each part by its name.

record FOLDER                 writes down which copies of services live, and when they died
agree SECONDS FOLDER SERVICE,… SOCKET…   waits until one copy of each service lives, and each
                              daemon says so, and where; what it prints is what does not agree
latency SERVICE PID SOCKET…   ends PID, and tells when each daemon's status shows it
ping ADDRESS COUNT            the median round trip in microseconds (ICMP)
sniff INTERFACE PORT COUNT F  keeps COUNT datagrams that go out to PORT as files F.1, F.2, …
"""
import json
import os
import select
import signal
import socket
import statistics
import struct
import sys
import threading
import time


def record(folder):
    """The ledger. A program that starts writes `service node pid time` into the FIFO `born`; the
    kernel tells by a pidfd when it is dead, however it died. So the ledger asks no daemon."""
    try:  # a death is to be noted when it happens, however busy the machine is
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(20))
    except PermissionError:
        pass
    # Its own writer, so that it does not end when the last program closes the FIFO.
    born = os.open(os.path.join(folder, "born"), os.O_RDWR)
    ledgers, alive, rest = {}, {}, b""

    def note(service, line):
        if service not in ledgers:
            ledgers[service] = open(os.path.join(folder, "ledger." + service), "a", buffering=1)
        ledgers[service].write(line + "\n")

    poll = select.poll()
    poll.register(born, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != born:
                now = time.time()
                poll.unregister(fd)
                os.close(fd)
                service, node, pid = alive.pop(fd)
                note(service, f"{now:.6f} end {node} {pid}")
                continue
            *lines, rest = (rest + os.read(born, 65536)).split(b"\n")
            for line in lines:
                service, node, pid, begun = line.decode().split()
                note(service, f"{begun} start {node} {pid}")
                try:
                    fd = os.pidfd_open(int(pid))
                except ProcessLookupError:
                    note(service, f"{time.time():.6f} end {node} {pid}")
                    continue
                alive[fd] = service, node, pid
                poll.register(fd, select.POLLIN)


class Daemon:
    """A kept connection to a daemon's local socket."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        self.socket.connect(path)
        self.file = self.socket.makefile("rb")

    def ask(self, action, **options):
        self.socket.sendall(json.dumps({"action": action, "options": options}).encode() + b"\n")
        return json.loads(self.file.readline())

    def service(self, name):
        reply = self.ask("daemon_status", svcname=name)
        if reply["status"] != 0:
            raise OSError(reply["error"])
        return reply["data"]["monitor"]["services"][name]


def copies(ledger):
    """The nodes on which copies live, by the ledger."""
    alive = {}
    with open(ledger) as f:
        lines = sorted(f, key=lambda line: float(line.split()[0]))
    for line in lines:
        _, what, node, pid = line.split()
        if what == "start":
            alive[pid] = node
        else:
            alive.pop(pid, None)
    return sorted(alive.values())


def disagreement(folder, services, daemons):
    for path, daemon in daemons.items():
        try:
            if daemon is None:
                daemon = daemons[path] = Daemon(path)
            said = daemon.ask("daemon_status")["data"]["monitor"]["services"]
        except (OSError, ValueError, KeyError) as e:
            daemons[path] = None
            return f"{path}: {e!r}"
        for service in services:
            alive, data = copies(os.path.join(folder, "ledger." + service)), said.get(service)
            if data is None:
                return f"{path} does not know {service}"
            busy = {node: (i["avail"], i["monitor"]["status"]) for node, i in data["instances"].items()
                    if i["avail"] != "down" or i["monitor"]["status"] != "idle"}
            if len(alive) != 1 or data["avail"] != "up" or busy != {alive[0]: ("up", "idle")}:
                return f"{service} lives on {alive}; {path} says {data['avail']}, {busy}"
    return None


def agree(seconds, folder, services, *sockets):
    end = time.monotonic() + float(seconds)
    daemons = dict.fromkeys(sockets)
    while (why := disagreement(folder, services.split(","), daemons)) is not None:
        if time.monotonic() > end:
            sys.exit(why)
        time.sleep(0.05)


def latency(service, pid, *sockets):
    """Prints for each daemon after how many microseconds its status, read again and again, showed
    that the one instance that was up is not. The first line is how long one look takes."""
    daemons = [Daemon(path) for path in sockets]
    before = [d.service(service)["avail"] for d in daemons]
    if before != ["up"] * len(daemons):
        sys.exit(f"not up everywhere before: {before}")
    begun = time.monotonic()
    for _ in range(20):
        daemons[0].service(service)
    look = (time.monotonic() - begun) / 20
    seen = [None] * len(daemons)

    def watch(i):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if daemons[i].service(service)["avail"] != "up":
                seen[i] = time.monotonic()
                return
            time.sleep(0.0005)

    threads = [threading.Thread(target=watch, args=(i,)) for i in range(len(daemons))]
    for t in threads:
        t.start()
    time.sleep(0.05)
    killed = time.monotonic()
    os.kill(int(pid), signal.SIGKILL)
    for t in threads:
        t.join()
    print("look", round(look * 1e6))
    for moment in seen:
        print("never" if moment is None else round((moment - killed) * 1e6))


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ping(address, count):
    s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    s.settimeout(1)
    took = []
    for n in range(int(count)):
        body = struct.pack("!HHQ", os.getpid() & 0xFFFF, n, 0)
        packet = struct.pack("!BBH", 8, 0, checksum(struct.pack("!BBH", 8, 0, 0) + body)) + body
        begun = time.monotonic()
        s.sendto(packet, (address, 0))
        while True:
            reply = s.recv(2048)
            if reply[20] == 0 and reply[24:] == body:  # behind the IP header
                break
        took.append(time.monotonic() - begun)
        time.sleep(0.01)
    print(round(statistics.median(took) * 1e6))


def sniff(interface, port, count, name):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
    s.bind((interface, 0x0003))
    s.settimeout(20)
    kept = 0
    while kept < int(count):
        packet, (_, protocol, direction, *_) = s.recvfrom(65536)
        if protocol != 0x0800 or direction != socket.PACKET_OUTGOING or packet[9] != socket.IPPROTO_UDP:
            continue
        udp = packet[(packet[0] & 15) * 4:]
        if struct.unpack("!H", udp[2:4])[0] == int(port):
            kept += 1
            with open(f"{name}.{kept}", "wb") as f:
                f.write(udp[8:])


if __name__ == "__main__":
    parts = {"record": record, "agree": agree, "latency": latency, "ping": ping, "sniff": sniff}
    if len(sys.argv) < 3 or sys.argv[1] not in parts:
        sys.exit(__doc__)
    parts[sys.argv[1]](*sys.argv[2:])
