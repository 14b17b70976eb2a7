"""What submitit unpickles and calls in the batch step: it becomes the launcher. Words in; it does not return."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

HELD = (signal.SIGTERM, signal.SIGUSR2)


class InJob:
    """The same program as the plain script runs, in place of submitit's process.

    submitit would let rank 0 alone save inside its signal handler; the supervisor's handlers only set a flag. What comes between
    its handlers and ours stays pending: blocked signals survive the exec, the supervisor unblocks them.
    """

    def __init__(self, words: Sequence[str], log_folder: str | None = None) -> None:
        """`log_folder`: of a task of a job array, whose output Slurm would put where the first task's is."""
        self.words = list(words)
        self.log_folder = log_folder

    def __call__(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        if self.log_folder is not None:
            name = f"job_{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}.log"
            log = os.open(os.path.join(self.log_folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
        os.execv(self.words[0], self.words)
