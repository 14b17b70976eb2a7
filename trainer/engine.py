"""Engine: the only file that knows DeepSpeed. Model -> forward, backward, clipped Adam update, over any ZeRO stage.

Weights and Adam's moments come out, and go in, as full float32 tensors by name: so a checkpoint is the same for every stage
and every world size, and nothing of it is a pickle.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, StateError
from trainer import distributed
from trainer.config import OptimConfig, ParallelConfig
from trainer.model.network import VideoSlotModel
from trainer.model.outputs import ModelOutput, OnePassOutput, TaskOf
from trainer.patches import PatchGroup
from trainer.reproducible import ExactGradient

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class AdamState:
    """Adam's memory: first and second moment of each parameter by name (absent: never updated), and the number of updates."""

    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    num_updates: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Numbers of a tensor that this rank holds: flat, from number `start` of the whole tensor on."""

    name: str
    start: int
    values: Tensor


def choose_device(name: str) -> torch.device:
    """cpu or this rank's CUDA device; refuses cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("parallel.device=cuda; this machine has no usable CUDA device; set parallel.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def choose_precision(name: str, device: torch.device) -> str:
    return ("bf16" if device.type == "cuda" else "fp32") if name == "auto" else name


class Engine:
    """A model under DeepSpeed. Every method that says "collective" must be called by all ranks at the same point.

    `adam` goes on from a checkpoint's optimizer state; the model must hold that checkpoint's weights already.
    """

    def __init__(
        self,
        model: VideoSlotModel,
        optim: OptimConfig,
        parallel: ParallelConfig,
        device: torch.device,
        adam: AdamState | None = None,
        example: Tensor | None = None,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        self.device = device
        self.stage = parallel.zero_stage
        self.reproducible = parallel.reproducible
        self.accumulation = 1 if self.reproducible else parallel.accumulation  # reproducible: step.py cuts clip by clip
        self.clip_norm = optim.clip_norm
        self.precision = choose_precision(parallel.precision, device)
        model = model.to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)
        self._deepspeed, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_deepspeed_config(model, optim, parallel), dist_init_required=False
        )
        distributed.limit_waiting(parallel.timeout_s)  # DeepSpeed makes groups of its own
        self._grad_norm: Any = None
        self._exact = ExactGradient(self.module.parameters()) if self.reproducible else None
        if self._exact is not None:
            self._deepspeed.enable_backward_allreduce = False
        self._parameters = dict(self.module.named_parameters())
        if adam is not None:
            assert example is not None, "going on from an optimizer state needs an example input to allocate it"
            self._restore(adam, example)

    @property
    def module(self) -> VideoSlotModel:
        return self._deepspeed.module

    @property
    def patches(self) -> PatchGroup:
        """The ranks that share this one's clips."""
        return self.module.patches

    def plain_model(self, build: Callable[[], VideoSlotModel]) -> VideoSlotModel:
        """A model that one rank can call alone, as evaluation needs: under ZeRO-3 a copy with whole weights. Collective."""
        if self.stage < 3:
            return self.module
        model = build()
        model.load_state_dict(self.weights())
        return model.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 matrix products where asked for; weights stay float32, softmax and losses are float32 by their own code."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @overload
    def forward(self, features: Tensor) -> ModelOutput: ...
    @overload
    def forward(self, features: Tensor, task_of: TaskOf) -> OnePassOutput: ...
    def forward(self, features, task_of=None):
        """features (B, T, P, E) -> ModelOutput with gradient, or what the decoder's one pass leaves (see VideoSlotModel)."""
        with self.autocast():
            return self._deepspeed(features, task_of)

    @overload
    def look(self, features: Tensor) -> ModelOutput: ...
    @overload
    def look(self, features: Tensor, task_of: TaskOf) -> OnePassOutput: ...
    def look(self, features, task_of=None):
        """The same output without gradient: the pass that only counts. Leaves no trace in DeepSpeed's bookkeeping."""
        with torch.no_grad(), self.autocast():
            return self.module(features, task_of)

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradient. Collective. `loss` is already its share of the global mean (see step.py)."""
        if self._exact is not None:
            self._deepspeed.backward(loss)
            self._exact.take()
            return
        world = torch.distributed.get_world_size()
        # DeepSpeed averages over ranks and micro-batches; the losses are shares of a global mean, so undo both divisions.
        self._deepspeed.backward(loss * (world * self.accumulation))
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()

    def step(self, lr: float) -> None:
        """Clip by global norm and update, after the last micro-batch's backward. Collective."""
        self._set_lr(lr)
        if self._exact is not None:
            self._exact.give()
        if self.stage == 0:
            # DeepSpeed keeps no norm without ZeRO; the gradients are complete here, before it clips them
            grads = [p.grad for p in self._parameters.values() if p.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(grads)
        if self._exact is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self.clip_norm, self._grad_norm)
        self._deepspeed.step()
        if self.stage > 0:
            self._grad_norm = self._deepspeed.get_global_grad_norm()

    def grad_norm(self) -> float:
        """Global L2 norm before clipping, of the last step. Reads the device."""
        return float("nan") if self._grad_norm is None else float(self._grad_norm)

    def weights(self) -> dict[str, Tensor]:
        """Full float32 weights by name, on the CPU. Collective under ZeRO-3."""
        if self.stage < 3:
            return {name: value.detach().cpu().clone() for name, value in self._parameters.items()}
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(value).cpu().clone() for name, value in self._parameters.items()}

    def adam_state(self, num_updates: int) -> AdamState:
        """Full moments by name, on the CPU. Collective."""
        found: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        for key in MOMENTS:
            for name, parameter in self._parameters.items():
                value = self._moment(parameter, key)
                if value is not None:
                    found[key][name] = value.detach().cpu().reshape(self._shape(parameter)).clone()
        return AdamState(found["exp_avg"], found["exp_avg_sq"], num_updates)

    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole parameters, by name."""
        return {name: self._shape(parameter) for name, parameter in self._parameters.items()}

    def whole_on_rank_0(self, *kinds: str) -> bool:
        """Rank 0 holds all of these kinds of state ("weight", or one of MOMENTS) itself."""
        return self.stage == 0 or (self.stage < 3 and kinds == ("weight",))

    def pieces(self, kind: str) -> list[Piece]:
        """What this rank must give so that rank 0 has the whole "weight", "exp_avg" or "exp_avg_sq"; not copied."""
        if self.whole_on_rank_0(kind) and torch.distributed.get_rank():
            return []
        found = ((name, self._own_piece(parameter, kind)) for name, parameter in self._parameters.items())
        return [Piece(name, *piece) for name, piece in found if piece is not None]

    # -- inside ---------------------------------------------------------------------------------------------------------

    @property
    def _adam(self) -> torch.optim.Adam:
        return getattr(self._deepspeed.optimizer, "optimizer", self._deepspeed.optimizer)

    def _set_lr(self, lr: float) -> None:
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        if self.stage == 0:
            return self._adam.state.get(parameter, {}).get(key)
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)

    def _own_piece(self, parameter: nn.Parameter, kind: str) -> tuple[int, Tensor] | None:
        """First number and values of the piece of a tensor that this rank keeps; None: it keeps none."""
        if self.whole_on_rank_0(kind):
            value = parameter.detach() if kind == "weight" else self._moment(parameter, kind)
            return None if value is None else (0, value)
        if self.stage < 3:
            mapping = getattr(parameter, "_hp_mapping", None)
            return None if mapping is None else (mapping.lp_fragment_address.start, mapping.get_hp_fragment(kind).detach())
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        values = safe_get_local_fp32_param(parameter) if kind == "weight" else safe_get_local_optimizer_state(parameter, kind)
        size = values.numel()
        start = size * torch.distributed.get_rank()
        count = min(size, self._shape(parameter).numel() - start)  # the last pieces are padded
        return (start, values.detach()[:count]) if count > 0 else None

    def _restore(self, adam: AdamState, example: Tensor) -> None:
        """Put the moments back. Adam allocates them at its first update, so one update that changes nothing comes first."""
        self._set_lr(0.0)
        for _ in range(self.accumulation):
            output = self.forward(example)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in output[:4]):
                raise StateError(
                    "the checkpoint's weights give outputs that are not finite: training had blown up before it was saved; "
                    "move that checkpoint away to go on from an older one, and lower optim.lr"
                )
            self._deepspeed.backward(sum(0.0 * tensor.sum() for tensor in output[:4]))
            self._deepspeed.step()
        for key in MOMENTS:
            stored = getattr(adam, key)
            for name, parameter in self._parameters.items():
                value = stored.get(name)
                if value is None:
                    value = torch.zeros(self._shape(parameter))
                self._set_moment(parameter, key, value.to(self.device))
        for state in self._adam.state.values():
            state["step"].fill_(adam.num_updates)

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage == 0:
            if key in self._adam.state.get(parameter, {}):
                self._adam.state[parameter][key].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # Each rank holds an equal piece of the flattened tensor, the last one padded. DeepSpeed's own setter for the full
        # tensor forgets the padding and fails when the world size does not divide the tensor.
        size = getattr(parameter, "ds_tensor").numel()  # noqa: B009  # set by DeepSpeed
        padded = value.new_zeros(size * torch.distributed.get_world_size())
        padded[: value.numel()] = value.flatten()
        start = size * torch.distributed.get_rank()
        safe_set_local_optimizer_state(parameter, padded[start : start + size], key)


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it, also where there is one rank
    os.environ.pop("LOCAL_SIZE", None)  # would switch on a shared-memory all-reduce that several nodes on one host must not share
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=UserWarning, module="deepspeed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU DeepSpeed would compile a shared-memory all-reduce at its first start, every rank the same files. gloo needs none.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        distributed.start(device, timeout_s=300)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


def _deepspeed_config(model: nn.Module, optim: OptimConfig, parallel: ParallelConfig) -> dict[str, Any]:
    # One bucket that fits the model. DeepSpeed's default is 5e8 numbers, and it allocates all of them at each backward.
    # A multiple of 1024, because it must divide by the alignment of the collectives.
    bucket = min(500_000_000, sum(parameter.numel() for parameter in model.parameters())) // 1024 * 1024 + 1024
    return {
        "train_micro_batch_size_per_gpu": 1,  # the true size varies with the rank's share; step.py does the scaling
        "gradient_accumulation_steps": 1 if parallel.reproducible else parallel.accumulation,
        # DeepSpeed's clipping averages norms over ranks, which rounds by their number
        "gradient_clipping": 0.0 if parallel.reproducible else optim.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
