"""One process's metrics for Prometheus: a registry of its own at a free port, from a daemon thread.

Comes in: an address of this machine, rules who may read (data_pipeline.metrics_access), and metrics that register themselves in
`registry`. Goes out: http(s)://address:port/metrics until `close`, which keeps the last values in a file. Training ranks,
evaluations and builds have one each.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric

from data_pipeline.files import write_atomically
from data_pipeline.metrics_access import read_access, serve

RECENT_S = 120.0  # whoever asked within this time will ask again


class _Registry(CollectorRegistry):
    """Remembers when it was last read."""

    read_at = float("-inf")  # time.monotonic()

    def collect(self) -> Iterator[Metric]:
        self.read_at = time.monotonic()
        yield from super().collect()


class MetricsServer:
    """Served from construction on. `address` None: values are kept, and served nowhere. `access`: a file of rules who may read.

    Raises OSError when `address` is not one of this machine, AccessError (an OSError) when the rules cannot be kept.
    """

    def __init__(self, address: str | None, access: str | None = None) -> None:
        disable_created_metrics()  # a _created series beside each counter and histogram says nothing that Prometheus needs
        self.registry = _Registry()
        self.address = address
        self.port = 0
        self.labels: dict[str, str] = {}  # of the target: how it must be asked
        self._server: Any = None
        if address is not None:
            rules = read_access(access)
            self._server, self._thread = serve(address, self.registry, rules)
            self.labels = {"__scheme__": "https"} if rules.certificate else {}
            self.port = self._server.server_port
        self._began = time.monotonic()
        self._closed = False

    @property
    def target(self) -> str:
        """host:port that a Prometheus elsewhere can reach: the machine's name where the address is a wildcard."""
        host = self.address or "0.0.0.0"
        host = socket.gethostname() if host in ("0.0.0.0", "::") else host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def exposition(self) -> bytes:
        """The text that a scrape would get now."""
        before = self.registry.read_at
        text = generate_latest(self.registry)
        self.registry.read_at = before  # this was no scrape
        return text

    def wait_for_scrape(self, at_most_s: float = 15.0, expected: bool = False) -> bool:
        """Before a process ends, and takes what it last counted along: wait until Prometheus has seen it. Returns whether it has.

        Returns at once where nobody has asked for two minutes, or ever; `expected`: somebody is about to, should this process be
        younger than that.
        """
        began = time.monotonic()
        if began - max(self.registry.read_at, self._began if expected else float("-inf")) > RECENT_S:
            return False
        while self.registry.read_at <= began:
            if time.monotonic() - began > at_most_s:
                return False
            time.sleep(0.05)
        time.sleep(0.2)  # the answer is on its way
        return True

    def close(self, keep: Path | None = None) -> None:
        """Stop serving, and write the last values to `keep`. May be called twice. Raises OSError when they cannot be written."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(timeout=5)
            self._server = None
        if keep is not None and not self._closed:
            write_atomically(keep, self.exposition())
        self._closed = True


__all__ = ["MetricsServer"]
