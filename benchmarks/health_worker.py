"""One training rank whose loader or saves can be made slow from outside: `health_worker.py FOLDER key=value ...`.

While the file FOLDER/slow_<part>_<rank> is there, each call of that part takes as many seconds longer as the file says.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.checkpoint_saver import Saver
from trainer.device_feed import DeviceFeed
from trainer.main import main
from trainer.process import run_as_rank


def slow_on_request(owner: Any, name: str, switch: Path) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if switch.exists():
            time.sleep(float(switch.read_text()))
        return function(*args, **kwargs)

    setattr(owner, name, call)


if __name__ == "__main__":
    folder, rank = Path(sys.argv.pop(1)), os.environ["RANK"]
    slow_on_request(DeviceFeed, "__next__", folder / f"slow_data_{rank}")
    slow_on_request(Saver, "save", folder / f"slow_save_{rank}")
    run_as_rank(main)
