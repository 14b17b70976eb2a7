"""The process group: who am I, and the few collectives that the trainer needs. One rank works without any group."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.order import World
from trainer import rendezvous
from trainer.patches import ALONE, PatchGroup, check_layout


def world_from_environment() -> World:
    """RANK and WORLD_SIZE as the launcher set them; one rank when they are not set."""
    try:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise ConfigError(
            f"RANK={os.environ.get('RANK')!r}, WORLD_SIZE={os.environ.get('WORLD_SIZE')!r}; both must be whole numbers; "
            "start the run with cluster/launch.py"
        ) from None
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank}, WORLD_SIZE={size}; a rank lies in [0, WORLD_SIZE); start the run with cluster/launch.py")
    return World(rank=rank, size=size)


def start(device: torch.device, timeout_s: int, stopping: Callable[[], bool] = lambda: False) -> None:
    """Join the group of MASTER_ADDR:MASTER_PORT; a single rank makes a group of its own on a free port.

    Raises what rendezvous.join raises; Interrupted once `stopping` is true on a rank that waits for others.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "MASTER_ADDR" in os.environ:
        world = world_from_environment()
        store = rendezvous.join(world, timeout_s, stopping)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
        return
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def limit_waiting(timeout_s: int) -> None:
    """Have collectives of every group that exists give up after `timeout_s`.

    Groups that DeepSpeed makes have torch's 30 minutes otherwise, whatever the first group was given. torch offers no public way;
    tests/integration/test_rendezvous.py sees when this one no longer works.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def many() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def is_main() -> bool:
    """Rank 0, or the only one."""
    return not many() or dist.get_rank() == 0


def form_patch_groups(world: World, patch_ranks: int, grid: tuple[int, int], timeout_s: int) -> PatchGroup:
    """Groups of `patch_ranks` neighbouring ranks, each with clips of its own. Collective.

    Raises ConfigError where ranks cannot form such groups.
    """
    check_layout(world, patch_ranks, grid, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    if patch_ranks == 1:
        return ALONE
    timeout = timedelta(seconds=timeout_s)
    firsts = range(0, world.size, patch_ranks)
    sharing = [dist.new_group(list(range(first, first + patch_ranks)), timeout=timeout) for first in firsts]
    peers: list[Any] = [None] * patch_ranks
    if len(firsts) > 1:
        peers = [dist.new_group([first + index for first in firsts], timeout=timeout) for index in range(patch_ranks)]
    number, index = divmod(world.rank, patch_ranks)
    return PatchGroup(patch_ranks, index, grid, sharing[number], peers[index])


def all_sum(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over ranks, in place; `group`: over these alone."""
    if many():
        dist.all_reduce(values, group=group)
    return values


def gather_clips(slots: Tensor, padded: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """All ranks' clips: (n, ...) with n <= padded -> (W, padded, ...), the unused rows zero. No gradient."""
    rows = slots.new_zeros((padded, *slots.shape[1:]))
    rows[: slots.shape[0]] = slots
    if not many():
        return rows[None]
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows, group=group)
    return torch.stack(parts)


def agree(yes: bool) -> bool:
    """True when every rank says yes."""
    device = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
    no_votes = all_sum(torch.tensor([0.0 if yes else 1.0], device=device))
    return bool(no_votes.item() == 0)


def from_main(value: Any) -> Any:
    """Rank 0's value on every rank. Objects come from our own ranks only."""
    if not many():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in rank order."""
    if not many():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if many():
        dist.barrier()
