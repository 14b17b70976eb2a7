"""One rank of `doctor --nodes N`: its environment in; rank 0 writes doctor.json into the run folder. Started by the launcher.

Rank 0 asks the others over TCP, one question at a time: what their machine is like, what their clock says, whether they see
the files it writes; then all join a process group and all-reduce. A node that does not answer is a finding, not an end.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import secrets
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.commands.doctor_checks import local_checks
from cluster.commands.doctor_group import compare, shared_folder, skew, speed
from cluster.commands.doctor_software import PROBLEM, Check
from cluster.processes import write_json

ARRIVE = 180.0  # seconds in which all ranks must have connected: an import of torch from a slow disk takes one
ANSWER = 120.0
SEE = 10.0  # seconds after which a file that another node wrote must be visible
REPORT = "doctor.json"
MARK = "SLOTSTREAM-DOCTOR "  # before the report on rank 0's output, for a run folder that is not shared
Message = dict[str, Any]


class Line:
    """A connection that carries one JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(ANSWER)
        self.connection = connection
        self._stream = connection.makefile("r", encoding="utf-8")

    def send(self, message: Message) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message:
        """The next message. Raises OSError when the other end is gone or silent."""
        text = self._stream.readline()
        if not text:
            raise OSError("the connection was closed")
        return dict(json.loads(text))

    def ask(self, message: Message) -> Message:
        self.send(message)
        return self.receive()


class Rank:
    """This process's place in the job, from the launcher's variables."""

    def __init__(self) -> None:
        self.number = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        self.local = int(os.environ["LOCAL_RANK"])
        self.node = int(os.environ["NODE_RANK"])
        self.folder = Path(os.environ["SLOTSTREAM_RUN_DIR"])
        self.address = os.environ["MASTER_ADDR"]
        self.port = int(os.environ["MASTER_PORT"])
        self.has_gpu = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))

    def report(self) -> Message:
        """What this rank says of itself; the first of a node also of its machine."""
        said: Message = {
            "rank": self.number,
            "node": self.node,
            "local": self.local,
            "run": str(self.folder),
            "host": socket.gethostname(),
        }
        if self.local == 0:
            checks, facts = local_checks(self.folder.parent)
            said |= {"checks": [check.as_dict() for check in checks], "facts": facts}
        return said


def main() -> int:
    rank = Rank()
    return lead(rank) if rank.number == 0 else follow(rank)


def follow(rank: Rank) -> int:
    """Answer rank 0's questions until it says goodbye."""
    report = rank.report()
    line = _connect(rank)
    line.send(report)
    while (asked := line.receive())["do"] != "end":
        line.send(answer(asked, rank))
    return 0


def answer(asked: Message, rank: Rank) -> Message:
    if asked["do"] == "time":
        return {"time": time.time()}
    if asked["do"] == "look":
        return look(rank.folder / asked["name"], asked["content"])
    return all_reduce(rank, asked["port"])


def look(path: Path, content: str) -> Message:
    """How a file that another node has written, renamed and locked looks from here."""
    begun, seen = time.monotonic(), None
    while seen is None and time.monotonic() - begun < SEE:
        with suppress(OSError):
            seen = (time.monotonic() - begun) if path.read_text() == content else None
        time.sleep(0 if seen is not None else 0.02)
    if seen is None:
        return {"seen": None}
    excluded = None
    with suppress(OSError), open(path, "r+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            excluded = False
        except BlockingIOError:
            excluded = True
    reply = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    reply.write_text(content[::-1])
    written = time.time()
    return {"seen": seen, "excluded": excluded, "reply": reply.name, "mtime": reply.stat().st_mtime, "written": written}


def _connect(rank: Rank) -> Line:
    deadline = time.monotonic() + ARRIVE
    while True:
        try:
            return Line(socket.create_connection((rank.address, rank.port), timeout=5))
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"rank {rank.number} on {socket.gethostname()} cannot reach {rank.address}:{rank.port}: {error}")
            time.sleep(0.2)


def lead(rank: Rank) -> int:
    """Rank 0: collect reports, ask, judge, write doctor.json."""
    server = socket.create_server((rank.address, rank.port), backlog=max(16, rank.world))
    reports = {0: rank.report()}
    lines, silent = _gather(server, rank, reports)
    server.close()
    checks = compare(reports, rank.world)
    for number in silent:
        value = f"rank {number} never reached {rank.address}:{rank.port}"
        checks.append(Check("connections", PROBLEM, value, "open the ports between nodes, or choose --interface IF"))
    checks += skew(_clocks(lines))
    firsts = {number: line for number, line in lines.items() if reports[number].get("local") == 0}
    checks += shared_folder(_look_around(rank, firsts), lambda name: rank.folder / name)
    usable = not silent and not _torch_is_broken(reports)
    checks += speed(_group(rank, lines)) if usable else [Check("all-reduce", PROBLEM, "not tried", "mend what is above first")]
    for line in lines.values():
        with suppress(OSError):
            line.send({"do": "end"})
    content = {"reports": [reports[number] for number in sorted(reports)], "checks": [check.as_dict() for check in checks]}
    with suppress(OSError):
        write_json(rank.folder / REPORT, content)
    print(MARK + json.dumps(content), flush=True)
    return 0


def _gather(server: socket.socket, rank: Rank, reports: dict[int, Message]) -> tuple[dict[int, Line], list[int]]:
    """(line of each rank that came, ranks that did not)."""
    lines: dict[int, Line] = {}
    deadline = time.monotonic() + ARRIVE
    while len(lines) < rank.world - 1 and time.monotonic() < deadline:
        server.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            line = Line(server.accept()[0])
            said = line.receive()
        except (OSError, ValueError):
            continue
        if said.get("run") == str(rank.folder):
            lines[int(said["rank"])], reports[int(said["rank"])] = line, said
    return lines, sorted(set(range(1, rank.world)) - lines.keys())


def _torch_is_broken(reports: dict[int, Message]) -> bool:
    checks = [check for report in reports.values() for check in report.get("checks", [])]
    return any(check["name"] in ("torch", "imports") and check["result"] == PROBLEM for check in checks)


def _clocks(lines: dict[int, Line]) -> dict[int, float]:
    """Seconds by which each rank's clock is ahead of ours, from the quickest of five questions."""
    ahead = {}
    for number, line in lines.items():
        trials = []
        for _ in range(5):
            begun = time.time()
            said = line.ask({"do": "time"})["time"]
            ended = time.time()
            trials.append((ended - begun, said - (begun + ended) / 2))
        ahead[number] = min(trials)[1]
    return ahead


def _look_around(rank: Rank, lines: dict[int, Line]) -> dict[int, Message]:
    """What the other nodes saw of a file that this one wrote, renamed and locked."""
    name, content = f".doctor.{secrets.token_hex(4)}", secrets.token_hex(16)
    temporary, path = rank.folder / f"{name}.tmp", rank.folder / name
    path.write_text("an older content")
    temporary.write_text(content)
    os.replace(temporary, path)
    found = {}
    with open(path, "r+") as stream:
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for number, line in lines.items():
            found[number] = {**line.ask({"do": "look", "name": name, "content": content}), "expected": content[::-1]}
    return found


def _group(rank: Rank, lines: dict[int, Line]) -> Message:
    with socket.create_server((rank.address, 0)) as free:
        port = free.getsockname()[1]
    for line in lines.values():
        line.send({"do": "group", "port": port})
    mine = all_reduce(rank, port)
    for number, line in lines.items():
        try:
            said = line.receive()
        except OSError as error:
            said = {"error": str(error)}
        if "error" in said and "error" not in mine:
            mine = {**mine, "error": f"rank {number}: {said['error']}"}
    return mine


def all_reduce(rank: Rank, port: int) -> Message:
    """Join a process group and measure it: {"backend", "bytes", "seconds", "latency", "world"} or {"error"}."""
    from datetime import timedelta

    try:
        torch: Any = importlib.import_module("torch")  # by name: the launcher's side has no torch
        distributed: Any = importlib.import_module("torch.distributed")
        torch.set_num_threads(1)
        device = torch.device("cuda", rank.local) if rank.has_gpu and torch.cuda.is_available() else torch.device("cpu")
        backend = "nccl" if device.type == "cuda" else "gloo"
        begun = time.monotonic()
        distributed.init_process_group(
            backend,
            init_method=f"tcp://{rank.address}:{port}",
            rank=rank.number,
            world_size=rank.world,
            timeout=timedelta(seconds=60),
        )
        joined = time.monotonic() - begun
        num_bytes = (256 if device.type == "cuda" else 8) << 20
        latency = _time(distributed, torch, torch.zeros(1, device=device), 20)
        seconds = _time(distributed, torch, torch.zeros(num_bytes // 4, device=device), 5)
        distributed.destroy_process_group()
    except (RuntimeError, ImportError, ValueError, OSError) as error:
        return {"error": str(error).splitlines()[0][:300]}
    return {"backend": backend, "bytes": num_bytes, "seconds": seconds, "latency": latency, "world": rank.world, "joined": joined}


def _time(distributed: Any, torch: Any, tensor: Any, times: int) -> float:
    """Seconds of one all-reduce of the tensor, the first left out."""
    distributed.all_reduce(tensor)
    for _ in range(2):  # the first round ends warm-up on all ranks
        if tensor.is_cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(times):
            distributed.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
    return (time.perf_counter() - begun) / times


if __name__ == "__main__":
    sys.exit(main())
