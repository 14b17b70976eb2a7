"""Which cores a rank gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.binding import core_list, cores_of_rank


@given(cores=st.integers(0, 40), ranks=st.integers(1, 9))
def test_ranks_get_equal_parts_that_do_not_overlap(cores: int, ranks: int) -> None:
    ids = list(range(100, 100 + cores))
    parts = [cores_of_rank("cores", ids, rank, ranks) for rank in range(ranks)]
    bound = [core for part in parts for core in part]
    assert len(set(bound)) == len(bound) and set(bound) <= set(ids) and len({len(part) for part in parts}) == 1
    assert all(parts) == (cores >= ranks)


def test_memory_nodes_stay_whole(tmp_path: Path) -> None:
    for node, cores in enumerate(("0-3,8-9", "4-7", "10-11")):
        folder = tmp_path / "devices" / "system" / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores + "\n")
    usable = range(1, 8)  # the third node is not ours
    assert [cores_of_rank("numa", usable, rank, 2, tmp_path) for rank in (0, 1)] == [(1, 2, 3), (4, 5, 6, 7)]
    four = [cores_of_rank("numa", usable, rank, 4, tmp_path) for rank in range(4)]
    assert four == [(1, 2, 3), (1, 2, 3), (4, 5, 6, 7), (4, 5, 6, 7)]
    assert cores_of_rank("numa", [4, 5], 1, 2, tmp_path) == (5,)  # one memory node: its cores are split
    assert cores_of_rank("none", usable, 0, 2, tmp_path) == ()


def test_the_kernels_lists() -> None:
    assert core_list("0-2,7\n") == (0, 1, 2, 7) and core_list("\n") == ()
    with pytest.raises(ValueError, match="invalid"):
        core_list("a-b")
