"""One measurement of memory in a process of its own: `python -m benchmarks.fresh MODULE CASE THREADS` prints one line of JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys

from benchmarks.case import Case
from benchmarks.single import MIB, prepare_environment, small


def main(module: str, case: Case, threads: int, calls: int, resident_only: bool) -> dict[str, float | None]:
    """Highest memory above parameters and inputs during `calls` calls, in MiB: resident, and as the allocator counts it.

    A tiny case runs first, so that loading code and libraries is no part of it. What a first call makes and keeps (Adam's
    moments) counts.
    """
    import torch

    from benchmarks.measure import peak_of_tensors, peak_resident_bytes

    torch.set_num_threads(threads)
    prepare = importlib.import_module(module).prepare
    tiny = prepare(small(case))
    for _ in range(2):
        tiny()
    call, device = prepare(case), torch.device(case.device)

    def several() -> None:
        for _ in range(calls):
            call()

    if device.type == "cuda":
        return {"resident_mib": None, "tensors_mib": peak_of_tensors(several, device).bytes / MIB}
    resident = peak_resident_bytes(several)[0] / MIB
    if resident_only:
        return {"resident_mib": resident}
    call = prepare(case)  # anew, so that Adam's moments are made again
    return {"resident_mib": resident, "tensors_mib": peak_of_tensors(several, device).bytes / MIB}


if __name__ == "__main__":
    module, text, threads, calls, *rest = sys.argv[1:]
    prepare_environment(int(threads))
    print(json.dumps(main(module, Case.from_json(text), int(threads), int(calls), bool(rest))), flush=True)
    os._exit(0)  # gloo's threads now and then abort the interpreter's teardown
