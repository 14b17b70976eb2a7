"""A DINOv2 weight file -> the network with these weights. Meta's, timm's and Hugging Face's layouts are understood.

Strict: a tensor that is missing, left over or of another shape is an error that names it. Nothing is unpickled but tensors.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.features.vit import SHAPES, DinoVit, VitShape

# Tensors of full models that the patch features do not depend on.
_UNUSED = ("mask_token", "norm.weight", "norm.bias")
_REGISTERS = ("register_tokens", "reg_token")
_HEAD_WIDTH = 64  # of every DINOv2 model

_HUGGING_FACE = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
)
_META = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks: blocks.<chunk>.<number>
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def load_vit(path: Path, name: str) -> DinoVit:
    """The network with the weights of `path`, frozen, in float32, on the CPU.

    `name` is one of SHAPES, or "dinov2": then the architecture is read from the tensors (64 channels a head).
    Raises: DataError when the file is missing, damaged or not exactly that model.
    """
    tensors = to_meta_layout(read_tensors(path), path)
    shape = SHAPES.get(name) or infer_shape(tensors, path)
    with torch.device("meta"):
        model = DinoVit(shape)
    _check_exact({key: tuple(value.shape) for key, value in model.state_dict().items()}, tensors, name, path)
    model.load_state_dict({key: value.float().contiguous() for key, value in tensors.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file or of a file that torch.save wrote.

    Raises: DataError when the file is missing, truncated or holds anything but tensors by name.
    """
    if not path.is_file():
        raise DataError(f"features.weights={path} does not exist; a weight file is needed; correct the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise DataError(f"{path}: unreadable ({type(error).__name__}: {reason[:160]}); it is damaged; fetch it again") from None
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"{path}: holds no plain mapping of names to tensors; a model's state_dict is needed; give another file")
    return dict(loaded)


def to_meta_layout(raw: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename tensors to Meta's names (see DinoVit) and leave out those that are not used.

    Raises: DataError for a model with register tokens.
    """
    rules = _HUGGING_FACE if any(key.startswith("embeddings.") for key in raw) else _META
    tensors = {_rename(key, rules): value for key, value in raw.items()}
    for key in _REGISTERS:
        if key in tensors:
            raise DataError(
                f"{path}: a model with register tokens ({key} {list(tensors[key].shape)}); "
                f"the published features come from the models without; give dinov2_vits14, vitb14, vitl14 or vitg14 weights"
            )
    used = {key: value for key, value in tensors.items() if key not in _UNUSED}
    return _join_queries_keys_values(used)


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _join_queries_keys_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face keeps three matrices where the others keep one; an incomplete triple stays and is reported later."""
    joined = dict(tensors)
    for key in tensors:
        triple = [key.replace(".attn.query.", f".attn.{part}.") for part in ("query", "key", "value")]
        if ".attn.query." in key and all(part in tensors for part in triple):
            joined[key.replace(".attn.query.", ".attn.qkv.")] = torch.cat([joined.pop(part) for part in triple])
    return joined


def infer_shape(tensors: Mapping[str, Tensor], path: Path) -> VitShape:
    """Read the architecture from the tensors' shapes.

    Raises: DataError when they do not describe one of this family.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    missing = [key for key in needed if key not in tensors]
    if missing:
        raise DataError(f"{path}: no tensor {missing[0]}; a DINOv2 model has one; give a DINOv2 weight file")
    sizes = {key: tuple(tensors[key].shape) for key in needed}
    numbers = [int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))]
    ranks = [len(sizes[key]) for key in needed]
    width = sizes["patch_embed.proj.weight"][0] if ranks == [4, 3, 2, 2] else 0
    native = math.isqrt(max(sizes["pos_embed"][1] - 1, 0)) if width else 0
    if not width or width % _HEAD_WIDTH or not native or native**2 + 1 != sizes["pos_embed"][1]:
        shown = ", ".join(f"{key} {list(size)}" for key, size in sizes.items())
        raise DataError(
            f"{path}: {shown}; DINOv2 has heads of {_HEAD_WIDTH} and a square grid plus CLS; give a DINOv2 weight file"
        )
    hidden = sizes["blocks.0.mlp.fc2.weight"][1]
    return VitShape(
        width=width,
        depth=max(numbers) + 1,
        heads=width // _HEAD_WIDTH,
        hidden=hidden,
        gated=sizes["blocks.0.mlp.fc1.weight"][0] == 2 * hidden,
        patch_size=sizes["patch_embed.proj.weight"][2],
        native_grid=native,
    )


def _check_exact(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], name: str, path: Path) -> None:
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    wrong = [
        f"{key} {list(tensors[key].shape)} instead of {list(size)}"
        for key, size in expected.items()
        if key in tensors and tuple(tensors[key].shape) != size
    ]
    problems = [
        f"{len(items)} {what}: {', '.join(items[:3])}{' ...' if len(items) > 3 else ''}"
        for what, items in (("missing", missing), ("not expected", extra), ("of another shape", wrong))
        if items
    ]
    if problems:
        raise DataError(f"{path}: not {name}; tensors {'; '.join(problems)}; give the weights of {name} or change features.name")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 values: equal for the same weights in any layout or file format."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{list(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
