"""observe.record_order: the written order is that of the stream, whatever the number of ranks that took part."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.ranks import finish, start_ranks
from tests.integration.tiny_run import applied_ids, arguments, lines, write_split

BATCH, STEPS, NUM_SHARDS = 12, 2, 13  # 13 shards: 6 lanes, so that 2 and 3 ranks have lanes, and not one cut of the batch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run for each world size."""
    folder = tmp_path_factory.mktemp("order")
    write_split(folder / "data", "train", frames=((4, 6),) * NUM_SHARDS)
    found = {}
    for world in (1, 2, 3):
        more = [f"optim.global_batch={BATCH}", f"optim.max_steps={STEPS}", "data.lanes=6"]
        codes = finish(start_ranks(world, arguments(folder / "data", folder, f"w{world}", *more), folder / f"logs{world}"))
        assert codes == [0] * world, (folder / f"logs{world}" / "rank0.err").read_text()[-2000:]
        found[world] = folder / f"w{world}"
    return found


def test_sorted_by_position_the_order_is_the_same_at_any_world_size(runs: dict[int, Path]) -> None:
    one = applied_ids(runs[1], 1)
    assert [len(ids) for ids in one.values()] == [BATCH] * STEPS
    assert len({sample for ids in one.values() for sample in ids}) == BATCH * STEPS  # within an epoch of 26 videos
    assert applied_ids(runs[2], 2) == applied_ids(runs[3], 3) == one


def test_positions_are_those_of_the_stream_each_once(runs: dict[int, Path]) -> None:
    for world, run in runs.items():
        logs = [lines(run / "order" / f"rank{rank}.jsonl") for rank in range(world)]
        positions = [position for log in logs for line in log for position in line["positions"]]
        assert sorted(positions) == list(range(BATCH * STEPS))
        # The ranks' parts do not lie end to end: sorting is what a reader has to do.
        assert world == 1 or logs[0][0]["positions"] != list(range(BATCH // world))
