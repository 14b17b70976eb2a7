"""One optimizer update, start to finish. Losses are means over the global batch, however it is cut.

Each term gives a sum and a count; its loss is weight * (sum over all ranks and micro-batches) / (count over all of them).
Counts are agreed on before the first backward, so each micro-batch's gradient is its exact share. Terms that couple clips
(slot contrast) are evaluated on the gathered slots first; their gradient with respect to the slots joins each micro-batch's
backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_pipeline.batch import ClipBatch
from data_pipeline.errors import StateError
from trainer import distributed
from trainer.engine import Engine
from trainer.objective import Objective, TermValue
from trainer.passes import choose_passes
from trainer.patches import PatchGroup


class NonFiniteLoss(StateError):
    """A loss term is not finite on some rank. Nothing was updated."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did: each term's global mean (unweighted), the weighted total, seconds by phase, whether to stop."""

    total: float
    terms: dict[str, float]
    seconds: dict[str, float]
    stop: bool


@dataclass
class Clock:
    """Wall seconds by phase, added up."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


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
    stop: bool = False,
    read: Callable[[ClipBatch], ClipBatch] = as_stored,
) -> StepReport:
    """Apply update number `step` (0 is the first). Collective. `real_per_rank`: how many clips of the batch each rank holds.

    Where ranks share the patches of clips (engine.patches), `real_per_rank` has one entry for each group of them, and `batch`, or
    what `read` makes of it, holds this rank's band alone. `read` makes features of a micro-batch on the device, once each
    (data_pipeline.online); its time counts as forward.

    Raises NonFiniteLoss on every rank, before the update, with the ranks and terms at fault; StateError, likewise, where ranks
    that share clips hold different ones.
    One host read a step (finiteness, stop requests and loss values in one vector), after the backward is queued.
    """
    clock = Clock()
    parts = [read(part.to(engine.device)) for part in batch.split(engine.accumulation)]
    passes = choose_passes(engine, objective, parts, sum(real_per_rank), step)
    seen = passes.look()
    local = [one.terms for one in seen]
    slots = [one.slots.detach() for one in seen]
    clock.lap("forward")
    coupled, slot_grads = _couple(
        objective, engine.patches, slots, [part.num_real for part in parts], real_per_rank, batch.size, step
    )
    counts = _global_counts(local, coupled, engine.device)
    clock.lap("exchange")  # the ranks meet here: the one that waits least is the slowest

    for number in range(len(parts)):
        own = passes.again(number, seen.pop(0))
        clock.lap("forward")
        loss = own.anchor + _share(objective, own.terms, counts, step)
        if slot_grads is not None:
            grad = slot_grads[number] / counts["slot_contrast"].clamp(min=1).to(slot_grads[number].dtype)
            loss = loss + objective.weight("slot_contrast", step) * (own.slots * grad).sum()
        local[number] = {name: TermValue(value.sum.detach(), value.count) for name, value in own.terms.items()}
        del own  # frees this micro-batch's tensors
        engine.backward(loss)
        clock.lap("backward")

    report = _agree(objective, local, coupled, counts, step, (stop, engine.patches.doubt(batch)), engine.device)
    engine.step(lr)
    clock.lap("optimizer")
    return StepReport(total=report[0], terms=report[1], seconds=clock.seconds, stop=report[2])


def _couple(
    objective: Objective,
    patches: PatchGroup,
    slots: list[Tensor],
    num_real: list[int],
    real_per_rank: Sequence[int],
    padded: int,
    step: int,
) -> tuple[dict[str, TermValue], list[Tensor] | None]:
    """Coupled terms of this rank's clips, and the gradient of their global sum with respect to each micro-batch's slots.

    Ranks that share clips have the same slots and take the same terms: sums and counts of all ranks then hold them equally
    often, so that the quotient, and each rank's share of the gradient, come out right.
    """
    if objective.weight("slot_contrast", step) == 0:
        return {}, None
    own = torch.cat(slots)
    everywhere = objective.coupled_scope == "global" and len(real_per_rank) > 1
    if everywhere:
        rank = torch.distributed.get_rank() // patches.size
        rows = distributed.gather_clips(own, padded, patches.peers)
        everyone = torch.cat([rows[index, :count] for index, count in enumerate(real_per_rank)])
        start = sum(real_per_rank[:rank])
    else:
        everyone, start = own, 0
    leaf = everyone.detach().requires_grad_()
    with torch.enable_grad():
        terms = objective.coupled(leaf, slice(start, start + own.shape[0]), step)
        total = torch.stack([value.sum for value in terms.values()]).sum()
        (grad,) = torch.autograd.grad(total, leaf, allow_unused=True)
    grad = torch.zeros_like(leaf) if grad is None else grad
    if everywhere:
        distributed.all_sum(grad, patches.peers)
    mine = grad[start : start + own.shape[0]]
    detached = {name: TermValue(value.sum.detach(), value.count) for name, value in terms.items()}
    return detached, list(mine.split(num_real))


def _global_counts(local: list[dict[str, TermValue]], coupled: dict[str, TermValue], device: torch.device) -> dict[str, Tensor]:
    """Count of each term over all ranks and micro-batches. One all-reduce."""
    names = [*local[0], *coupled]
    totals = [torch.stack([part[name].count for part in local]).sum() for name in local[0]]
    totals += [value.count for value in coupled.values()]
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
    coupled: dict[str, TermValue],
    counts: dict[str, Tensor],
    step: int,
    said: tuple[float, float],
    device: torch.device,
) -> tuple[float, dict[str, float], bool]:
    """Global means, their weighted total and whether anybody wants to stop; raises when a term is not finite anywhere.

    `said`: whether this rank wants to stop, and its doubt that the ranks of its patch group hold the same clips.
    """
    sums = {name: sum(part[name].sum.double() for part in local) for name in local[0]}
    sums |= {name: value.sum.double() for name, value in coupled.items()}
    own = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in sums.values()])
    totals = distributed.all_sum(torch.cat([own, torch.tensor(said, dtype=torch.float64, device=device)]))
    # the one host read of a step
    *sums_read, wishes, doubts = torch.cat([totals[:-2], torch.stack(list(counts.values())), totals[-2:]]).tolist()
    reached, divisors = sums_read[: len(sums)], sums_read[len(sums) :]
    terms = {}
    for name, value, count in zip(sums, reached, divisors, strict=True):
        count = count if objective.nan_when_empty(name) else max(count, 1.0)
        terms[name] = value / count if count else float("nan")
    total = sum(objective.weight(name, step) * value for name, value in terms.items())
    if doubts:
        raise StateError(
            f"ranks that share clips read different ones at step {step}; nothing was updated; one of them replaced a sample that "
            "another could read (its log warns of it): mend or check the shards, then start again"
        )
    if not all(map(_finite, terms.values())):
        _raise_non_finite(dict(zip(sums, own.tolist(), strict=True)), set(coupled), terms, step)
    return total, terms, wishes > 0


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
