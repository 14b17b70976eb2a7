"""The launcher's flags and their help. Words in, argparse's values out; what they mean is cluster/config.py's."""

from __future__ import annotations

import argparse

HELP = """Start a job on N nodes, watch it, start it again when something dies, and leave nothing behind.

  JOB        train (default), evaluate or build-shards; or plan: what a run would need, starts nothing (plan --help)
  key=value  everything after the flags goes to the job as it is: experiment=ssync_movi_c optim.lr=1e-3 ...
  status, logs, cancel, resume, profile, doctor, monitor   commands for runs by name and for machines: status --help

The run folder is RUNS/NAME: NAME from name=..., else from experiment=..., else "run". Each start or restart of its processes
is an attempt in it: attempts/<n>/{launch.json,rank_<r>.log,verdict.json}; what happened is in events.jsonl.
Exit code: 0 done, 75 stopped and saved (start again to go on), 130 Ctrl-C, 2 wrong command, else that of the first rank
that failed."""


class LaunchError(ValueError):
    """A launch cannot go on. The message is one line: what is wrong, the rule, what to do."""

    code = 2  # the launcher's exit code: what was asked for is wrong


class Parser(argparse.ArgumentParser):
    """argparse that raises in place of printing its usage and leaving, so that an error is one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise LaunchError(f"{message}; see python {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The flags of the launcher. Words that are no flags are left over for cluster.config.parse."""
    parser = Parser(
        prog="cluster/launch.py",
        usage="python cluster/launch.py [flags] [JOB] [key=value ...]",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="one rank per GPU; 0: CPU (default: all that are there)")
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks of a node (default: one per GPU, or 1)")
    parser.add_argument("--backend", default="auto", metavar="B", help="auto, local, slurm or ray (default auto)")
    parser.add_argument("--cluster", metavar="NAME", help="take defaults of flags from configs/cluster/NAME.yaml")
    parser.add_argument("--runs", metavar="DIR", help="folder of run folders (default: runs)")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds to save in before a kill (default 30)")
    parser.add_argument("--max-time", metavar="T", help="ask the job to save and stop after T: 90 (seconds), 45m, 8h, 1:30:00")
    parser.add_argument("--detach", action="store_true", help="return when the job has been started or submitted")
    parser.add_argument("--multirun", action="store_true", help="key=a,b: one run for each value (a sweep); --multirun --help")
    parser.add_argument("--dry-run", action="store_true", help="print every agent's and rank's command; start nothing")
    parser.add_argument("--command", help=argparse.SUPPRESS)  # arguments for Python in place of the job; for tests
    _add_supervision(parser)
    _add_network(parser)
    _add_slurm(parser)
    _add_ray(parser)
    return parser


def _add_supervision(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("supervision")
    group.add_argument("--max-restarts", type=int, default=10, metavar="N", help="restarts without a new checkpoint (default 10)")
    group.add_argument("--min-nodes", type=int, metavar="M", help="go on with M nodes when others are lost (default: all)")
    group.add_argument("--node-patience", default="60", metavar="T", help="wait so long for a lost node's return (default 60)")
    group.add_argument("--start-timeout", default="300", metavar="T", help="all nodes must report in this time (default 300)")
    group.add_argument("--hang-after", default="15", metavar="T", help="no progress for T is a hang; 0: off (default 15)")


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks and network")
    group.add_argument("--listen", metavar="ADDR", help="address that the nodes' agents connect to")
    group.add_argument("--interface", metavar="IF", help="network interface for agents, gloo and NCCL, for example ib0")
    group.add_argument("--wrap", metavar="CMD", help="local: prefix of each agent's command; {slot} is its number")
    group.add_argument("--bind", default="none", metavar="B", help="bind ranks: none, cores or numa (default none)")
    group.add_argument("--export", action="append", metavar="NAME", help="ranks on other nodes get this variable (repeatable)")


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Slurm")
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", metavar="NAME", help=f"Slurm's --{name}")
    group.add_argument("--time", metavar="T", help="time limit of the job: 8h, 45m, 1:30:00 or Slurm's own 1-12:00:00")
    group.add_argument("--mem", metavar="SIZE", help="memory of a node, for example 200G")
    group.add_argument("--cpus-per-task", type=int, metavar="N", help="cores of a node's agent and its ranks")
    group.add_argument("--exclusive", action="store_true", help="whole nodes")
    group.add_argument("--container", metavar="IMAGE", help="run agents in this image")
    group.add_argument("--container-runtime", metavar="R", help="apptainer or pyxis")
    group.add_argument("--setup", action="append", metavar="LINE", help="shell line that a node runs first (repeatable)")
    group.add_argument("--sbatch", action="append", metavar="KEY=VALUE", help="more of sbatch's options (repeatable)")
    group.add_argument("--srun", action="append", metavar="KEY=VALUE", help="more options of an agent's srun (repeatable)")
    group.add_argument("--python", metavar="PATH", help="Python of the nodes or the image (default: this one)")
    group.add_argument("--max-requeues", type=int, default=10, metavar="N", help="without a newer checkpoint (default 10)")
    group.add_argument("--script", metavar="FILE", help="write the batch script to FILE and submit nothing")
    group.add_argument("--in-job", action="store_true", help=argparse.SUPPRESS)  # what the batch script runs


def _add_ray(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Ray")
    group.add_argument("--address", metavar="A", help="an existing cluster: HOST:PORT or auto (without: start one)")
    group.add_argument("--ray-nodes-from", default="local", metavar="W", help="nodes of a started cluster: local or slurm")


def known_flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS]
