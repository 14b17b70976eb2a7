"""Hosts for tests: network namespaces of this machine, each with a link of its own to a bridge. Needs root and Linux.

`with NetnsHosts(4) as hosts:` then `hosts.wrap` for the launcher's --wrap, `hosts.bridge_address` for its --listen; a link can
be cut, mended and delayed. Several can live side by side. What a killed test leaves behind the next one clears away.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from cluster.processes import die_with_parent, signal_process

NUM_NETWORKS = 512  # 198.18.0.0/15 is set apart for tests of networks (RFC 2544): no real one has these addresses
NAME = re.compile(r"\bslns([0-9a-f]{3})\w+")
SLOW_LINK = Path(__file__).with_name("slow_link.py")


class NetnsHosts:
    """`count` namespaces, numbered from 0 as the launcher's slots are."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._slow: dict[int, subprocess.Popen[str]] = {}

    def __enter__(self) -> NetnsHosts:
        sweep()
        self.number, self._claim = _claim_network()
        self._stem = _stem(self.number)
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what still runs on the hosts, too."""
        for host in list(self._slow):
            self._end_slow_link(host)
        _remove(self.number)
        self._claim.close()

    @property
    def prefix(self) -> str:
        """Name of a host without its number."""
        return f"{self._stem}h"

    @property
    def wrap(self) -> str:
        """Words before a command that is to run on host `{slot}`."""
        return f"ip netns exec {self.prefix}{{slot}}"

    @property
    def bridge_address(self) -> str:
        """This machine's own address among the hosts."""
        return self._address(254)

    def address(self, host: int) -> str:
        return self._address(host + 1)

    def command(self, host: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", f"{self.prefix}{host}", *words]

    def cut(self, host: int) -> None:
        """Pull the cable: nobody is told, packets vanish."""
        _ip(f"link set {self._cable(host)} down")

    def mend(self, host: int) -> None:
        _ip(f"link set {self._cable(host)} up")

    def delay(self, host: int, ms: float) -> None:
        """Each packet from or to this host takes so much longer, in each direction; 0 ends it. Connections live on."""
        self._end_slow_link(host)
        cable, near, far, joint = self._cable(host), f"{self._stem}n{host}", f"{self._stem}f{host}", f"{self._stem}j{host}"
        if ms <= 0:
            _ip(f"link set {cable} master {self._stem}b")
            return
        words = [sys.executable, str(SLOW_LINK), near, far, str(ms)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent())
        self._slow[host] = process
        assert process.stdout is not None and process.stdout.readline() == "ready\n", "the slow link did not start"
        _ip(
            f"link add {joint} type bridge",
            *(f"link set {name} master {joint}" for name in (cable, near)),
            f"link set {far} master {self._stem}b",
            *(f"link set {name} up" for name in (near, far, joint)),
        )

    def _end_slow_link(self, host: int) -> None:
        if (process := self._slow.pop(host, None)) is not None:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            with contextlib.suppress(RuntimeError):
                _ip(f"link del {self._stem}j{host}")

    def _address(self, last: int) -> str:
        return f"198.{18 + self.number // 256}.{self.number % 256}.{last}"

    def _cable(self, host: int) -> str:
        return f"{self._stem}v{host}"

    def _build(self) -> None:
        bridge = f"{self._stem}b"
        _ip(f"link add {bridge} type bridge", f"addr add {self.bridge_address}/24 dev {bridge}", f"link set {bridge} up")
        for host in range(self.count):
            name, cable = f"{self.prefix}{host}", self._cable(host)
            _ip(
                f"netns add {name}",
                f"link add {cable} type veth peer name eth0 netns {name}",
                f"link set {cable} master {bridge}",
                f"link set {cable} up",
            )
            _ip(f"addr add {self.address(host)}/24 dev eth0", "link set eth0 up", "link set lo up", inside=name)


def require_netns() -> None:
    """Skip the test where namespaces cannot be made."""
    import pytest  # the benchmarks use this module, too

    if reason := why_not():
        pytest.skip(f"netns: {reason}")


@functools.cache
def why_not() -> str:
    """Why this machine cannot have such hosts; "" when it can."""
    if sys.platform != "linux" or not shutil.which("ip"):
        return "Linux with the ip command is needed"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no /dev/net/tun"
    try:
        with NetnsHosts(1):
            return ""
    except RuntimeError as error:
        return str(error)


def sweep() -> None:
    """Remove the networks whose test has ended without doing so."""
    names = " ".join([_run("ip", "netns", "list"), _run("ip", "-o", "link", "show")])
    for number in {int(digits, 16) for digits in NAME.findall(names)}:
        if (claim := _claim(number)) is not None:
            _remove(number)
            claim.close()


def _stem(number: int) -> str:
    return f"slns{number:03x}"


def _claim_network() -> tuple[int, socket.socket]:
    for number in random.SystemRandom().sample(range(NUM_NETWORKS), NUM_NETWORKS):
        if (claim := _claim(number)) is not None:
            return number, claim
    raise RuntimeError(f"all {NUM_NETWORKS} test networks are in use")


def _claim(number: int) -> socket.socket | None:
    """A name in the kernel's abstract socket space: it ends with the process, however that ends."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0slotstream-{_stem(number)}")
        return claim
    except OSError:
        claim.close()
        return None


def _remove(number: int) -> None:
    stem = _stem(number)
    for name in re.findall(rf"\b{stem}h\d+", _run("ip", "netns", "list")):
        for pid in _run("ip", "netns", "pids", name).split():
            signal_process(int(pid), signal.SIGKILL)
        _run("ip", "netns", "del", name)
    for name in set(re.findall(rf"\b{stem}[a-z]\d*", _run("ip", "-o", "link", "show"))):
        _run("ip", "link", "del", name)  # a cable goes with its namespace, maybe a moment later


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True).stdout


def _ip(*lines: str, inside: str | None = None) -> None:
    """One call for several commands.

    Raises: RuntimeError with what ip says.
    """
    where = ["-n", inside] if inside else []
    done = subprocess.run(["ip", *where, "-batch", "-"], input="\n".join(lines), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip: {done.stderr.strip()}")
