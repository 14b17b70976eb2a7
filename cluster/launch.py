"""Start a job on N nodes and see it to its end: command line in; run folder, live output, verdict and exit code out.

python cluster/launch.py --nodes 2 --ranks-per-node 2 experiment=ssync_movi_c optim.max_steps=200
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder cluster/ must not be where modules are looked for
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster import plan as planner
from cluster.backends import BACKENDS, NodeHandle, choose_backend
from cluster.config import JOBS, LaunchConfig, LaunchError, override_value, parse
from cluster.layout import NodeTask, checkout_path, describe, gpu_ids, headline, node_tasks, usable_cores
from cluster.processes import Port, SignalPipe, exit_of, write_json
from cluster.run_folder import FolderLock, make_attempt, next_attempt, withdraw_targets, write_launch_record
from cluster.verdict import INTERRUPTED, REQUEUE, SETTLE, RankExit, Verdict, explain, judge, last_lines

STOP_REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung_up"}
TICK = 0.1
AGENT_PATIENCE = 10.0  # seconds beyond the grace time before an agent that does not end is killed


def main(argv: Sequence[str] | None = None) -> int:
    """Run one launch; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if planner.is_plan(words):
            return planner.main(words)
        config = parse(words)
        backend = choose_backend(config.backend)
        return dry_run(config, backend) if config.dry_run else launch(config, backend, words)
    except LaunchError as error:
        say(str(error))
        return 2
    except OSError as error:
        say(f"cannot launch: {error}; check the path, its permissions and the machine's limits")
        return 1
    except KeyboardInterrupt:  # before anything was started
        return INTERRUPTED


def dry_run(config: LaunchConfig, backend: str) -> int:
    port = Port()
    tasks = plan(config, next_attempt(Path(config.run_dir)), port.number)
    print(describe(tasks, backend, os.environ), flush=True)
    port.close()
    if config.command or not JOBS[config.job].tells_plan:
        return 0
    path = checkout_path(os.environ.get("PYTHONPATH"))
    environment = os.environ if path is None else {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *config.job_command, "--dry-run"], env=environment).returncode


def plan(config: LaunchConfig, attempt: int, master_port: int) -> list[NodeTask]:
    gpus = [] if config.gpus_per_node == 0 else gpu_ids(os.environ)
    return node_tasks(config, attempt=attempt, master_port=master_port, gpus=gpus, cores=usable_cores())


def launch(config: LaunchConfig, backend: str, words: Sequence[str]) -> int:
    """Lock the run folder, make the attempt, start the agents, watch them; return the verdict's exit code."""
    run_dir = Path(config.run_dir)
    plan(config, 1, 0)  # an impossible layout is refused before anything is created
    lock = FolderLock(run_dir, config.job)
    port = Port()
    try:
        tasks = plan(config, make_attempt(run_dir), port.number)
        first = tasks[0]
        facts = {"job": config.job, "backend": backend, "nodes": first.nodes, "ranks_per_node": first.ranks,
                 "gpus_per_node": len(first.gpus), "master_port": port.number}  # fmt: skip
        write_launch_record(first.attempt_dir, [sys.executable, "cluster/launch.py", *words], os.environ, facts)
        say(f"{config.run_dir} (attempt {first.attempt}): {headline(tasks, backend)}")
        watch = Watch(tasks, config)
        verdict = watch.run(lambda: BACKENDS[backend](tasks, lock))
        log = None if verdict.rank is None else first.log(verdict.rank)
        write_json(first.attempt_dir / "verdict.json", verdict.as_dict())
        if config.job == "train":
            withdraw_targets(run_dir, override_value(config.overrides, "observe.targets_dir"))
        say(explain(verdict, log, first.attempt_dir))
        return verdict.exit_code
    finally:
        port.close()
        lock.close()


class Watch:
    """Follows the agents' events and the user's signals until every agent has ended."""

    def __init__(self, tasks: Sequence[NodeTask], config: LaunchConfig) -> None:
        self.tasks = list(tasks)
        self.exits: list[RankExit] = []
        self.started = time.time()
        self.stop_reason: str | None = None
        self._grace = config.grace
        self._out_of_time = None if config.max_time is None else self.started + config.max_time
        self._tails = [EventTail(task.events) for task in self.tasks]
        self._ended: set[int] = set()  # nodes whose agent said its last word
        self._gone: set[int] = set()  # nodes whose agent is no process any more
        self._stop_at: float | None = None
        self._stop_sent: float | None = None

    def run(self, start: Any) -> Verdict:
        """`start` starts the agents. Signals are caught first: an early Ctrl-C must not leave agents alone."""
        signals = SignalPipe((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD))
        handles: list[NodeHandle] = start()
        while len(self._gone) < len(handles):
            numbers, _ = signals.wait(TICK)
            for number in numbers:
                self._on_signal(number, handles)
            self._follow(handles)
            self._act(handles)
        return self._verdict()

    def _on_signal(self, number: int, handles: Sequence[NodeHandle]) -> None:
        if number == signal.SIGUSR2:
            _send(handles, signal.SIGUSR2)
        elif number in STOP_REASONS:
            again = self._stop_sent is not None
            if self.stop_reason is None and not any(item.failed for item in self.exits):
                self.stop_reason = STOP_REASONS[signal.Signals(number)]
            if number == signal.SIGINT:
                say("killing now" if again else f"stopping: ranks have {self._grace:g} s to save (Ctrl-C again: kill now)")
            _send(handles, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
            self._stop_sent = self._stop_sent or time.time()

    def _follow(self, handles: Sequence[NodeHandle]) -> None:
        gone = {handle.node: handle.poll() for handle in handles if handle.node not in self._gone}
        for tail in self._tails:
            for event in tail.read():
                self._on_event(event)
        for node, code in gone.items():
            if code is None:
                continue
            self._gone.add(node)
            if node not in self._ended:  # killed, or an error of its own: its ranks died with it
                shell_code, name = exit_of(code)
                stopped = self._stop_sent is not None
                lost = RankExit(rank=None, node=node, code=shell_code or 1, signal=name, time=time.time(), stopped=stopped)
                self._note(lost)

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "end":
            self._ended.add(event["node"])
        if event["event"] == "exit":
            facts = {key: event[key] for key in ("rank", "node", "code", "signal", "time", "stopped", "lost_peer")}
            self._note(RankExit(**facts))

    def _note(self, item: RankExit) -> None:
        self.exits.append(item)
        if item.failed:
            self._stop_within(SETTLE if item.lost_peer else 0.0)
        elif item.code == REQUEUE:
            self._stop_within(self._grace)

    def _stop_within(self, delay: float) -> None:
        at = time.time() + delay
        self._stop_at = at if self._stop_at is None else min(self._stop_at, at)

    def _act(self, handles: Sequence[NodeHandle]) -> None:
        now = time.time()
        if self._out_of_time is not None and now >= self._out_of_time and self._stop_sent is None:
            self.stop_reason = self.stop_reason or "out_of_time"
            self._stop_within(0.0)
        if self._stop_at is not None and now >= self._stop_at and self._stop_sent is None:
            self._stop_sent = now
            _send(handles, signal.SIGTERM)
        if self._stop_sent is not None and now >= self._stop_sent + self._grace + AGENT_PATIENCE:
            _send(handles, signal.SIGKILL)

    def _verdict(self) -> Verdict:
        done = Path(self.tasks[0].run_dir, "DONE").exists()
        verdict = judge(self.exits, started=self.started, ended=time.time(), stop_reason=self.stop_reason, done_file=done)
        if verdict.rank is not None:
            verdict.last_lines.extend(last_lines(self.tasks[0].log(verdict.rank)))
        return verdict


class EventTail:
    """The complete lines that an agent has added to its event file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        try:
            with open(self._path, "rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]


def _send(handles: Sequence[NodeHandle], number: int) -> None:
    for handle in handles:
        handle.send(number)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
