"""One rank of a training run on a disk that takes SECONDS for every KIB that is synced: `slow_disk_worker.py SECONDS KIB ...`.

Only the slowness is put there from outside: what the trainer writes really lies on the disk.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from trainer import checkpoint_write
    from trainer.main import main
    from trainer.process import run_as_rank

    seconds, kib = float(sys.argv[1]), int(sys.argv[2])
    del sys.argv[1:3]
    real = os.fdatasync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        real(descriptor)

    os.fdatasync = slow
    checkpoint_write.SYNC_EVERY = checkpoint_write.BLOCK = kib << 10
    run_as_rank(main)
