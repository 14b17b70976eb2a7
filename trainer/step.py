"""One optimizer update, start to finish. Losses are means over the global batch, however it is cut.

Each term gives a sum and a count; its loss is weight * (sum over all ranks and micro-batches) / (count over all of them).
Counts are agreed on before the first backward, so each micro-batch's gradient is its exact share. Terms that couple clips
(slot contrast) are evaluated on the gathered slots first; their gradient with respect to the slots joins each micro-batch's
backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.batch import ClipBatch
from data_pipeline.errors import StateError
from trainer import distributed, heartbeat, reproducible
from trainer.engine import Engine
from trainer.objective import Objective, TermValue
from trainer.passes import choose_passes
from trainer.patches import PatchGroup


class NonFiniteLoss(StateError):
    """A loss term is not finite on some rank. Nothing was updated."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did: each term's global mean (unweighted), the weighted total, seconds by phase, whether to stop, and whether
    some rank has news that all must ask for."""

    total: float
    terms: dict[str, float]
    seconds: dict[str, float]
    stop: bool
    news: bool = False


class Clock:
    """Wall seconds by phase, added up. The heartbeat learns which phase it is, and a profiler, if there is one."""

    watcher: Callable[[str | None], None] | None = None  # told the phase that begins, None where it ends (observe/profiler.py)

    def __init__(self, phase: str) -> None:
        self.seconds: dict[str, float] = {}
        self._begin(phase)
        self._since = time.perf_counter()

    def enter(self, phase: str) -> None:
        """`phase` begins, the one before it ends."""
        self.stop()
        self._begin(phase)

    def _begin(self, phase: str) -> None:
        self._phase = phase
        heartbeat.mine().phase(phase)
        if Clock.watcher is not None:
            Clock.watcher(phase)

    def stop(self) -> dict[str, float]:
        """The phase ends; all seconds so far."""
        if Clock.watcher is not None:
            Clock.watcher(None)
        now = time.perf_counter()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._since = now
        return self.seconds


def as_stored(batch: ClipBatch) -> ClipBatch:
    """The batch holds features already."""
    return batch


def train_step(
    engine: Engine,
    objective: Objective,
    batch: ClipBatch,
    real_per_rank: Sequence[int],
    step: int,
    lr: float,
    stop: bool | Callable[[], bool] = False,
    read: Callable[[ClipBatch], ClipBatch] = as_stored,
    news: Callable[[], bool] = lambda: False,
) -> StepReport:
    """Apply update number `step` (0 is the first). Collective. `real_per_rank`: how many clips of the batch each rank holds.

    Where ranks share the patches of clips (engine.patches), `real_per_rank` has one entry for each group of them, and `batch`, or
    what `read` makes of it, holds this rank's band alone. `read` makes features of a micro-batch on the device, once each
    (data_pipeline.online); its time counts as forward. `stop`: this rank's wish to stop, or what tells it; it is asked once
    the gradients are there, so that a request that comes during a step counts at its end.

    Raises NonFiniteLoss on every rank, before the update, with the ranks and terms at fault; StateError, likewise, where ranks
    that share clips hold different ones.
    One host read a step (finiteness, stop requests and loss values in one vector), after the backward is queued.
    """
    clock = Clock("forward")
    cut = reproducible.one_clip_each(batch) if engine.reproducible else batch.split(engine.accumulation)
    parts = [read(part.to(engine.device)) for part in cut]
    passes = choose_passes(engine, objective, parts, sum(real_per_rank), step)
    seen = passes.look()
    local = [one.terms for one in seen]
    slots = [one.slots.detach() for one in seen]
    clock.enter("exchange")  # the ranks meet here: the one that waits least is the slowest
    if engine.reproducible:
        coupled, slot_grads = _couple_in_order(objective, slots, batch, real_per_rank, step)
    else:
        coupled, slot_grads = _couple(
            objective, engine.patches, slots, [part.num_real for part in parts], real_per_rank, batch.size, step
        )
    counts = _global_counts(local, coupled, engine.device)

    for number in range(len(parts)):
        clock.enter("forward")
        own = passes.again(number, seen.pop(0))
        clock.enter("backward")
        loss = own.anchor + _share(objective, own.terms, counts, step)
        if slot_grads is not None:
            grad = slot_grads[number] / counts["slot_contrast"].clamp(min=1).to(slot_grads[number].dtype)
            loss = loss + objective.weight("slot_contrast", step) * (own.slots * grad).sum()
        local[number] = {name: TermValue(value.sum.detach(), value.count) for name, value in own.terms.items()}
        del own  # frees this micro-batch's tensors
        engine.backward(loss)

    clock.enter("optimizer")
    said = (float(stop() if callable(stop) else stop), engine.patches.doubt(batch), float(news()))
    report = _agree(objective, local, coupled, counts, step, said, batch.size if engine.reproducible else None)
    engine.step(lr)
    return StepReport(total=report[0], terms=report[1], seconds=clock.stop(), stop=report[2], news=report[3])


def _couple(
    objective: Objective,
    patches: PatchGroup,
    slots: list[Tensor],
    num_real: list[int],
    real_per_rank: Sequence[int],
    padded: int,
    step: int,
) -> tuple[list[dict[str, TermValue]], list[Tensor] | None]:
    """Coupled terms of this rank's clips, and the gradient of their global sum with respect to each micro-batch's slots.

    Ranks that share clips have the same slots and take the same terms: sums and counts of all ranks then hold them equally
    often, so that the quotient, and each rank's share of the gradient, come out right.
    """
    if objective.weight("slot_contrast", step) == 0:
        return [{}], None
    own = torch.cat(slots)
    everywhere = objective.coupled_scope == "global" and len(real_per_rank) > 1
    if everywhere:
        rank = torch.distributed.get_rank() // patches.size
        rows = distributed.gather_clips(own, padded, patches.peers)
        everyone = torch.cat([rows[index, :count] for index, count in enumerate(real_per_rank)])
        start = sum(real_per_rank[:rank])
    else:
        everyone, start = own, 0
    terms, grad = _take_coupled(objective, everyone, slice(start, start + own.shape[0]), step)
    if everywhere:
        distributed.all_sum(grad, patches.peers)
    mine = grad[start : start + own.shape[0]]
    return [terms], list(mine.split(num_real))


def _couple_in_order(
    objective: Objective, slots: list[Tensor], batch: ClipBatch, real_per_rank: Sequence[int], step: int
) -> tuple[list[dict[str, TermValue]], list[Tensor] | None]:
    """The same for reproducible mode, where `slots` are of one clip each: every rank takes the term of all clips, in stream
    order, and rank 0 alone reports it; a term that compares nothing across clips is taken clip by clip."""
    if objective.weight("slot_contrast", step) == 0:
        return [{}], None
    if objective.coupled_scope != "global":
        taken = [_take_coupled(objective, clip, slice(0, clip.shape[0]), step) for clip in slots]
        return [terms for terms, _ in taken], [grad for _, grad in taken]
    everyone, mine = reproducible.in_stream_order(torch.cat(slots), batch.positions, batch.size, real_per_rank)
    terms, grad = _take_coupled(objective, everyone, slice(0, everyone.shape[0]), step)
    if torch.distributed.get_rank():
        terms = {name: TermValue(torch.zeros_like(value.sum), torch.zeros_like(value.count)) for name, value in terms.items()}
    return [terms], list(grad[mine].split([clip.shape[0] for clip in slots]))


def _take_coupled(objective: Objective, slots: Tensor, own: slice, step: int) -> tuple[dict[str, TermValue], Tensor]:
    """Coupled terms of the clips `own`, without gradient, and the gradient of their sum with respect to all `slots`."""
    leaf = slots.detach().requires_grad_()
    with torch.enable_grad():
        terms = objective.coupled(leaf, own, step)
        total = torch.stack([value.sum for value in terms.values()]).sum()
        (grad,) = torch.autograd.grad(total, leaf, allow_unused=True)
    grad = torch.zeros_like(leaf) if grad is None else grad
    return {name: TermValue(value.sum.detach(), value.count) for name, value in terms.items()}, grad


def _global_counts(
    local: list[dict[str, TermValue]], coupled: list[dict[str, TermValue]], device: torch.device
) -> dict[str, Tensor]:
    """Count of each term over all ranks and micro-batches. One all-reduce."""
    names = [*local[0], *coupled[0]]
    totals = [torch.stack([part[name].count for part in parts]).sum() for parts in (local, coupled) for name in parts[0]]
    # float64: counts pass 2**24, where float32 stops counting
    vector = distributed.all_sum(torch.stack([total.double().to(device) for total in totals]))
    return dict(zip(names, vector, strict=True))


def _share(objective: Objective, terms: dict[str, TermValue], counts: dict[str, Tensor], step: int) -> Tensor | float:
    """This micro-batch's share of the global weighted loss."""
    total: Tensor | float = 0.0
    for name, value in terms.items():
        count = counts[name] if objective.nan_when_empty(name) else counts[name].clamp(min=1)
        total = total + objective.weight(name, step) * value.sum / count.to(value.sum.dtype)
    return total


def _agree(
    objective: Objective,
    local: list[dict[str, TermValue]],
    coupled: list[dict[str, TermValue]],
    counts: dict[str, Tensor],
    step: int,
    said: tuple[float, float, float],
    exact: int | None,
) -> tuple[float, dict[str, float], bool, bool]:
    """Global means, their weighted total, whether anybody wants to stop or has news; raises when a term is not finite anywhere.

    `said`: whether this rank wants to stop, and its doubt that the ranks of its patch group hold the same clips,
    and whether it has news.
    `exact`: where sums must not depend on the number of ranks, how many clips a rank holds, padding included.
    """
    rows = _rows(local, coupled)
    own = rows.sum(dim=0)
    totals = distributed.all_sum(torch.cat([own, own.new_tensor(said)]))
    # the one host read of a step
    wanted = torch.cat([totals[:-3], torch.stack(list(counts.values())), totals[-3:]])
    with heartbeat.mine().reading_device():
        *sums_read, wishes, doubts, news = wanted.tolist()
    reached, divisors = sums_read[: len(counts)], sums_read[len(counts) :]
    if exact is not None:
        reached = reproducible.sums_over_clips(rows, exact)
    terms = {}
    for name, value, count in zip(counts, reached, divisors, strict=True):
        count = count if objective.nan_when_empty(name) else max(count, 1.0)
        terms[name] = value / count if count else float("nan")
    total = sum(objective.weight(name, step) * value for name, value in terms.items())
    if doubts:
        raise StateError(
            f"ranks that share clips read different ones at step {step}; nothing was updated; one of them replaced a sample that "
            "another could read (its log warns of it): mend or check the shards, then start again"
        )
    if not all(map(_finite, terms.values())):
        _raise_non_finite(dict(zip(counts, own.tolist(), strict=True)), set(coupled[0]), terms, step)
    return total, terms, wishes > 0, news > 0


def _rows(local: list[dict[str, TermValue]], coupled: list[dict[str, TermValue]]) -> Tensor:
    """Sums of this rank's terms in the order of their counts, micro-batch by micro-batch: float64 (micro-batches, terms).

    `coupled` has an entry for each micro-batch, or one for all.
    """
    none = [torch.zeros_like(value.sum) for value in coupled[0].values()]
    more = [[value.sum for value in terms.values()] for terms in coupled] + [none] * (len(local) - len(coupled))
    sums = [[value.sum for value in terms.values()] + rest for terms, rest in zip(local, more, strict=True)]
    return torch.stack([torch.stack([value.double() for value in row]) for row in sums])


def _finite(value: float) -> bool:
    return value - value == 0


def _raise_non_finite(own: dict[str, float], coupled: set[str], terms: dict[str, float], step: int) -> None:
    """A coupled term carries one rank's bad clip to all: the ranks whose own terms are bad are to blame, if there are any."""
    bad = distributed.gather_objects({name for name, value in own.items() if not _finite(value)})
    blamed = [names - coupled for names in bad]
    ranks = [rank for rank, names in enumerate(blamed if any(blamed) else bad) if names]
    shown = ", ".join(f"{name}={value:.4g}" for name, value in terms.items())
    raise NonFiniteLoss(
        f"loss is not finite at step {step} on ranks {ranks}: {shown}; nothing was updated; "
        "look at the batch of this step (observe.record_order=true), or lower optim.lr"
    )
