"""`cluster/launch.py monitor`: Prometheus, and Grafana where it is installed, for all runs of a folder. Flags in, exit code out.

Runs of the folder find RUNS/.targets and list themselves there while they live; nothing has to be set. Both servers listen on
loopback unless told, keep their data under RUNS/.monitoring, and end with this command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.commands.runs import CommandParser
from cluster.flags import LaunchError
from cluster.processes import SignalPipe, die_with_parent, ended

HERE = Path(__file__).resolve().parent.parent / "monitoring"
TARGETS, STALE_S = ".targets", 600.0  # data_pipeline.targets has the same: a live run touches its list every minute
SWEEP_EVERY_S = 30.0
DATA = ".monitoring"
READY_S = 30.0
HELP = """Start Prometheus (and Grafana where it is installed) on this machine for all runs of a folder, until Ctrl-C.

Runs of that folder list themselves in RUNS/.targets, those that run already within a minute. The list of a run that died without
taking it back goes after ten minutes. Alerts, and what to do about each: cluster/monitoring/runbook.md. For a Prometheus that a
site has already: cluster/monitoring/README.md."""


def build_parser() -> CommandParser:
    parser = CommandParser("monitor", "[--runs DIR] [--listen ADDRESS] [flags below]", HELP)
    parser.add_argument("--listen", default="127.0.0.1", metavar="ADDRESS", help="where both servers listen (default: loopback)")
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus (default 9090)")
    parser.add_argument("--grafana-port", type=int, default=3000, help="of Grafana (default 3000)")
    parser.add_argument("--no-grafana", action="store_true", help="Prometheus alone")
    parser.add_argument("--ca-file", metavar="FILE", help="who signed the certificates of runs with observe.metrics_access")
    parser.add_argument("--server-name", metavar="NAME", help="the name in those certificates, where it is not the address")
    parser.add_argument("--user", metavar="NAME", help="with --password-file: how these runs let Prometheus in")
    parser.add_argument("--password-file", metavar="FILE", help="Prometheus reads it; it is not copied")
    parser.add_argument("--keep", default="30d", metavar="T", help="how long samples are kept (default 30d)")
    return parser


def main(words: Sequence[str]) -> int:
    """Run until Ctrl-C or until a server ends. Raises LaunchError."""
    options = build_parser().read(words)
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        raise LaunchError(
            "prometheus is not installed; monitor starts it; apt-get install prometheus, or see cluster/monitoring/compose.yaml"
        )
    runs = Path(os.path.abspath(options.runs))
    _check_free(options.listen, options.port, "--port")
    servers = {"Prometheus": (_prometheus(prometheus, options, runs), f"http://{_host(options.listen)}:{options.port}")}
    grafana = None if options.no_grafana else find_grafana()
    try:
        _await_ready(*servers["Prometheus"], "/-/ready", runs / DATA / "prometheus.log")
        print(f"Prometheus  {servers['Prometheus'][1]}  (alerts: /alerts)", flush=True)
        if grafana is not None:
            _check_free(options.listen, options.grafana_port, "--grafana-port")
            url = f"http://{_host(options.listen)}:{options.grafana_port}"
            servers["Grafana"] = (_grafana(grafana, options, runs, servers["Prometheus"][1]), url)
            _await_ready(*servers["Grafana"], "/api/health", runs / DATA / "grafana.log")
            print(f"Grafana     {url}/dashboards  (folder Slotstream)", flush=True)
        elif not options.no_grafana:
            print("Grafana     not installed here; the dashboards are in cluster/monitoring/grafana/dashboards", flush=True)
        print(f"runs under {runs} are seen within a minute; Ctrl-C ends this", flush=True)
        return _watch({name: process for name, (process, _) in servers.items()}, runs / TARGETS)
    finally:
        for process, _ in servers.values():
            _end(process)


def _check_free(address: str, port: int, flag: str) -> None:
    """Another server on the port would answer in place of ours."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except (OSError, OverflowError) as error:
        raise LaunchError(f"{flag} {port} at {address}: {error}; a free port of this machine is needed; choose another") from None


def credentials(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """What the scrape job says to runs with rules who may read them; files by absolute path. Raises LaunchError."""
    if (options.user is None) != (options.password_file is None):
        raise LaunchError("--user and --password-file belong together; give both, or neither")
    for flag, path in (("--ca-file", options.ca_file), ("--password-file", options.password_file)):
        if path is not None and not os.access(path, os.R_OK):
            raise LaunchError(f"{flag} {path}; it must be a file that we can read; Prometheus needs it; mend the path")
    tls = {"ca_file": options.ca_file and os.path.abspath(options.ca_file), "server_name": options.server_name}
    basic = {"username": options.user, "password_file": options.password_file and os.path.abspath(options.password_file)}
    found = {
        name: {key: value for key, value in part.items() if value} for name, part in (("tls_config", tls), ("basic_auth", basic))
    }
    return {name: part for name, part in found.items() if part}


def render_config(runs: Path, secrets: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """prometheus.yml for one folder of runs: our own, with absolute paths. `secrets`: see credentials()."""
    text = (HERE / "prometheus.yml").read_text()
    job = "  - job_name: slotstream\n"
    text = text.replace(job, job + "".join(f"    {name}: {json.dumps(part)}\n" for name, part in (secrets or {}).items()))
    text = text.replace("- rules/*.yml", f"- {HERE / 'rules' / '*.yml'}")
    return text.replace("- targets/*.json", f"- {runs / TARGETS / '*.json'}")


def find_grafana() -> list[str] | None:
    """The server's command line and its home where Grafana is installed."""
    for name, words in (("grafana", ["server"]), ("grafana-server", [])):
        found = shutil.which(name)
        if found:
            return [found, *words]
    return None


def _prometheus(binary: str, options: argparse.Namespace, runs: Path) -> subprocess.Popen[bytes]:
    try:
        for folder in (runs / TARGETS, runs / DATA):
            folder.mkdir(parents=True, exist_ok=True)
        (runs / DATA / "prometheus.yml").write_text(render_config(runs, credentials(options)))
    except OSError as error:
        raise LaunchError(
            f"--runs {options.runs}: {error.strerror} ({error.filename}); it must be a folder we can write"
        ) from None
    flags = [
        f"--config.file={runs / DATA / 'prometheus.yml'}",
        f"--storage.tsdb.path={runs / DATA / 'prometheus'}",
        f"--storage.tsdb.retention.time={options.keep}",
        f"--web.listen-address={_host(options.listen)}:{options.port}",
    ]
    return _spawn([binary, *flags], runs / DATA / "prometheus.log", {})


def _grafana(words: list[str], options: argparse.Namespace, runs: Path, prometheus: str) -> subprocess.Popen[bytes]:
    homes = (Path("/usr/share/grafana"), Path(words[0]).resolve().parents[1])
    home = next((path for path in homes if (path / "public").is_dir()), None)
    settings = {
        "SLOTSTREAM_PROMETHEUS_URL": prometheus,
        "SLOTSTREAM_DASHBOARDS": str(HERE / "grafana" / "dashboards"),
        "GF_PATHS_PROVISIONING": str(HERE / "grafana" / "provisioning"),
        "GF_PATHS_DATA": str(runs / DATA / "grafana"),
        "GF_PATHS_LOGS": str(runs / DATA / "grafana"),
        "GF_SERVER_HTTP_ADDR": options.listen,
        "GF_SERVER_HTTP_PORT": str(options.grafana_port),
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    }
    if options.listen in ("127.0.0.1", "::1", "localhost"):  # whoever reaches loopback may look, and change nothing
        settings |= {"GF_AUTH_ANONYMOUS_ENABLED": "true", "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer"}
    return _spawn([*words, *(["--homepath", str(home)] if home else [])], runs / DATA / "grafana.log", settings)


def _spawn(words: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            words,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C reaches us alone
            preexec_fn=die_with_parent(),
        )


def _await_ready(process: subprocess.Popen[bytes], url: str, path: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url + path, timeout=2):
                if process.poll() is None:  # not another server on this port
                    return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    lines = [line for line in log.read_text(errors="replace").splitlines() if "err=" in line or "error" in line.lower()]
    last = lines[-1][-200:] if lines else "it says nothing"
    raise LaunchError(f"{Path(log).stem} does not answer at {url}: {last}; see {log}; is the port taken? choose another port")


def clear_dead(watched: Path) -> list[str]:
    """Remove the lists of runs that died without taking them back: those that nobody has touched for long. Their names."""
    gone = []
    for path in sorted(watched.glob("slotstream-*.json")):
        with contextlib.suppress(OSError):  # the run itself, or another one, was faster
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
                gone.append(path.name)
    return gone


def _watch(servers: dict[str, subprocess.Popen[bytes]], watched: Path) -> int:
    signals = SignalPipe((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD))
    next_sweep = 0.0
    while True:
        if time.monotonic() >= next_sweep:
            next_sweep = time.monotonic() + SWEEP_EVERY_S
            for name in clear_dead(watched):
                print(f"{name}: a run that died unheard; it is no longer asked for metrics", file=sys.stderr, flush=True)
        numbers, _ = signals.wait(1.0)
        if set(numbers) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
            return 0
        for name, process in servers.items():
            if ended(process.pid):
                print(f"{name} has ended with exit code {process.wait()}; see its log", file=sys.stderr, flush=True)
                return 1


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
