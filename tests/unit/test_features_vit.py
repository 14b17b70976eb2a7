"""DINOv2: a plain forward written here, three weight layouts, refusals, where weights are looked for."""

from __future__ import annotations

import math
import re

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.config import FeaturesConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.features import EXTRACTORS, build_extractor
from data_pipeline.features.vit import SHAPES, DinoVit, VitShape, resize_positions

WIDTH, DEPTH, PATCH, NATIVE = 128, 3, 4, 5  # two heads of 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def meta_weights(width=WIDTH, depth=DEPTH, gated=False, seed=0):
    """Random weights in the layout of Meta's files, with the tensors that the extractor does not use."""
    draw = torch.Generator().manual_seed(seed)

    def random(*size, scale=0.1, around=0.0):
        return around + scale * torch.randn(*size, generator=draw)

    weights = {
        "cls_token": random(1, 1, width),
        "pos_embed": random(1, 1 + NATIVE**2, width, scale=0.5),
        "mask_token": random(1, width),
        "patch_embed.proj.weight": random(width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": random(width),
        "norm.weight": random(width, around=1.0),
        "norm.bias": random(width),
    }
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.w12": (6 * width, width), "mlp.w3": (width, 3 * width)} if gated else {}
    layers |= {} if gated else {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(depth):
        for name, size in layers.items():
            weights[f"blocks.{i}.{name}.weight"] = random(*size)
            weights[f"blocks.{i}.{name}.bias"] = random(size[0])
        for name in ("norm1", "norm2"):
            weights[f"blocks.{i}.{name}.weight"] = random(width, around=1.0)
            weights[f"blocks.{i}.{name}.bias"] = random(width)
        for name in ("ls1", "ls2"):
            weights[f"blocks.{i}.{name}.gamma"] = random(width, around=0.5)
    return weights


def chunked(weights):
    """Meta's models trained with FSDP keep their blocks in chunks: blocks.<chunk>.<number of the block>."""
    return {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", key): value for key, value in weights.items()}


def timm_layout(weights):
    """timm has no mask token and calls the gated layers fc1 and fc2."""
    renamed = {key.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): value for key, value in weights.items()}
    del renamed["mask_token"]
    return renamed


def hugging_face(weights):
    """Dinov2Model: other names, queries, keys and values apart."""
    single = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    parts = {
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.weights_out",
    }
    out = {}
    for key, value in weights.items():
        if key in single:
            out[single[key]] = value
            continue
        _, number, rest = key.split(".", 2)
        prefix = f"encoder.layer.{number}."
        if rest.startswith("attn.qkv."):
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[f"{prefix}attention.attention.{part}.{rest.rpartition('.')[2]}"] = piece.clone()
            continue
        for old, new in parts.items():
            rest = rest.replace(old, new)
        out[prefix + rest] = value
    return out


def reference(weights, frames, gated=False, keys=False):
    """The network written plainly from its description, or the keys of its last block; frames in [0, 1]."""
    width = weights["cls_token"].shape[-1]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = (frames - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
    pieces = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # T 3 Y X p p
    pieces = pieces.permute(0, 2, 3, 1, 4, 5).reshape(len(x), rows * columns, -1)
    x = pieces @ weights["patch_embed.proj.weight"].reshape(width, -1).T + weights["patch_embed.proj.bias"]
    grid = weights["pos_embed"][:, 1:].reshape(1, NATIVE, NATIVE, width).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True, align_corners=False)
    x = x + grid.permute(0, 2, 3, 1).reshape(1, rows * columns, width)
    first = weights["cls_token"] + weights["pos_embed"][:, :1]
    x = torch.cat([first.expand(len(x), 1, width), x], 1)
    i = 0
    while f"blocks.{i}.norm1.weight" in weights:
        name = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        heads = []
        for h in range(width // 64):
            part = slice(64 * h, 64 * h + 64)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / 8.0
            heads.append(torch.softmax(logits, -1) @ v[..., part])
        x = x + weights[f"{name}.ls1.gamma"] * linear(torch.cat(heads, -1), f"{name}.attn.proj")
        hidden = norm(x, f"{name}.norm2")
        if gated:
            gate, value = linear(hidden, f"{name}.mlp.w12").chunk(2, -1)
            hidden = linear(gate * torch.sigmoid(gate) * value, f"{name}.mlp.w3")
        else:
            hidden = linear(hidden, f"{name}.mlp.fc1")
            hidden = linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.mlp.fc2")
        x = x + weights[f"{name}.ls2.gamma"] * hidden
        i += 1
    return k[:, 1:] if keys else x[:, 1:]


def random_frames(count=2, height=NATIVE * PATCH, width=NATIVE * PATCH):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(5))


def build(path, name="dinov2", **settings):
    return build_extractor(FeaturesConfig(name=name, weights=str(path), **settings))


@pytest.fixture(scope="module")
def meta_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "meta.pth"
    torch.save(meta_weights(), path)
    return path


@pytest.mark.parametrize("size", [(20, 20), (28, 28), (12, 32), (40, 16)])
def test_features_are_those_of_the_plain_forward(meta_file, size):
    frames = random_frames(3, *size)
    extractor = build(meta_file, batch_frames=2)
    got = extractor(frames)
    assert (extractor.width, extractor.patch_size, extractor.layer) == (WIDTH, PATCH, "last_block")
    assert got.dtype == torch.float32 and got.shape == (3, size[0] * size[1] // PATCH**2, WIDTH)
    torch.testing.assert_close(got, reference(meta_weights(), frames), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_all_layouts_and_formats_give_the_same_features_and_fingerprint(tmp_path, gated):
    weights = meta_weights(gated=gated)
    layouts = {"meta": weights, "chunked": chunked(weights), "timm": timm_layout(weights), "hugging_face": hugging_face(weights)}
    frames = random_frames(2, 16, 24)
    expected = reference(weights, frames, gated)
    prints = set()
    for name, tensors in layouts.items():
        torch.save(tensors, tmp_path / f"{name}.pth")
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        for suffix in ("pth", "safetensors"):
            extractor = build(tmp_path / f"{name}.{suffix}")
            prints.add(extractor.fingerprint)
            torch.testing.assert_close(extractor(frames), expected, rtol=1e-4, atol=1e-4)
    assert len(prints) == 1 and re.fullmatch("[0-9a-f]{64}", prints.pop())


def test_the_fingerprint_follows_the_weights_that_are_used(tmp_path, meta_file):
    other = meta_weights()
    other["norm.bias"] += 1  # not used
    torch.save(other, tmp_path / "norm.pth")
    assert build(tmp_path / "norm.pth").fingerprint == build(meta_file).fingerprint
    other["blocks.2.mlp.fc2.bias"][3] += 1e-3
    torch.save(other, tmp_path / "other.pth")
    assert build(tmp_path / "other.pth").fingerprint != build(meta_file).fingerprint


@pytest.mark.parametrize(("size", "gated"), [((20, 20), False), ((12, 32), True)])
def test_the_keys_are_those_of_the_plain_forward(tmp_path, size, gated):
    weights, frames = meta_weights(gated=gated), random_frames(3, *size)
    torch.save(weights, tmp_path / "meta.pth")
    extractor = build(tmp_path / "meta.pth", layer="last_block_keys", batch_frames=2)
    expected = reference(weights, frames, gated, keys=True)
    assert extractor.layer == "last_block_keys"
    torch.testing.assert_close(extractor(frames), expected, rtol=1e-4, atol=1e-4)
    assert (expected - reference(weights, frames, gated)).abs().max() > 0.1


@pytest.mark.parametrize("size", [(14, 14), (28, 42), (56, 70), (196, 28)])
def test_any_multiple_of_fourteen_has_its_grid(size):
    """The published patch size, at frames smaller and larger than the grid of training, square or not."""
    shape = VitShape(width=64, depth=1, heads=1, hidden=32, native_grid=6)
    torch.manual_seed(0)
    model = DinoVit(shape).eval()
    torch.nn.init.normal_(model.pos_embed)
    frames = random_frames(1, *size)
    with torch.no_grad():
        whole = model(frames)
        assert whole.shape == (1, size[0] * size[1] // 14**2, 64) and whole.isfinite().all()
        positions = resize_positions(model.pos_embed, (size[0] // 14, size[1] // 14))
    # Without a block's mixing the tokens would be patches plus positions: a constant frame shows whether each patch has its own.
    assert torch.unique(positions[0, 1:], dim=0).shape[0] == whole.shape[1]


def test_batching_and_bfloat16_change_little(meta_file):
    frames = random_frames(5)
    whole = build(meta_file)(frames)
    torch.testing.assert_close(build(meta_file, batch_frames=1)(frames), whole, rtol=1e-4, atol=1e-5)
    rounded = build(meta_file, precision="bfloat16")(frames)
    assert rounded.dtype == torch.float32
    relative = (rounded - whole).norm() / whole.norm()
    assert 1e-5 < relative < 0.02


def test_frozen_without_gradient_and_float32_from_half_weights(tmp_path, meta_file):
    extractor = build(meta_file)
    assert not extractor(random_frames().requires_grad_()).requires_grad
    assert not any(item.requires_grad for item in extractor._model.parameters())
    torch.save({key: value.half() for key, value in meta_weights().items()}, tmp_path / "half.pth")
    assert {item.dtype for item in build(tmp_path / "half.pth")._model.parameters()} == {torch.float32}


def test_position_resize_keeps_cls_and_the_native_grid_and_constants():
    positions = torch.randn(1, 1 + 25, 3, generator=torch.Generator().manual_seed(1))
    assert resize_positions(positions, (5, 5)) is positions
    resized = resize_positions(positions, (4, 7))
    assert resized.shape == (1, 1 + 28, 3)
    assert torch.equal(resized[:, :1], positions[:, :1])
    flat = torch.full((1, 26, 3), 0.3)
    torch.testing.assert_close(resize_positions(flat, (3, 8)), torch.full((1, 25, 3), 0.3))
    # Antialiasing must be on: shrinking without it skips source cells.
    spike = torch.zeros(1, 1 + 36, 1)
    spike[0, 1] = 1.0
    assert resize_positions(spike, (2, 2))[0, 1].item() == pytest.approx(_shrunk_spike(), abs=1e-5)


def _shrunk_spike():
    """Weight of cell (0, 0) in the first of two cells made from six: Keys' kernel (a = -0.5) stretched by the factor 3."""

    def keys(x):
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    weights = [keys((cell + 0.5 - 1.5) / 3) for cell in range(6)]
    return (weights[0] / sum(weights)) ** 2


PUBLISHED_PARAMETERS = [
    ("dinov2_vits14", 22.1e6),
    ("dinov2_vitb14", 86.6e6),
    ("dinov2_vitl14", 304.4e6),
    ("dinov2_vitg14", 1136e6),
]


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS)
def test_named_models_have_the_published_size(name, parameters):
    with torch.device("meta"):
        model = DinoVit(SHAPES[name])
    assert sum(item.numel() for item in model.parameters()) == pytest.approx(parameters, rel=0.01)
    assert model.pos_embed.shape == (1, 1370, SHAPES[name].width)
    assert set(SHAPES) <= set(EXTRACTORS)


def without(key):
    weights = meta_weights()
    del weights[key]
    return weights


@pytest.mark.parametrize(
    ("weights", "name", "words"),
    [
        (without("blocks.1.ls2.gamma"), "dinov2", ["1 missing: blocks.1.ls2.gamma"]),
        (without("pos_embed"), "dinov2", ["no tensor pos_embed"]),
        (meta_weights() | {"head.weight": torch.zeros(7, WIDTH)}, "dinov2", ["1 not expected: head.weight"]),
        (
            meta_weights() | {"blocks.0.norm1.weight": torch.ones(WIDTH + 1)},
            "dinov2",
            ["1 of another shape: blocks.0.norm1.weight [129] instead of [128]"],
        ),
        (meta_weights(), "dinov2_vits14", ["not dinov2_vits14", "missing", "blocks.3.", "of another shape", "cls_token"]),
        (meta_weights(width=96), "dinov2", ["heads of 64"]),
        (meta_weights() | {"register_tokens": torch.zeros(1, 4, WIDTH)}, "dinov2", ["register tokens", "[1, 4, 128]"]),
        (timm_layout(meta_weights()) | {"reg_token": torch.zeros(1, 4, WIDTH)}, "dinov2", ["register tokens"]),
        (hugging_face(meta_weights()) | {"embeddings.register_tokens": torch.zeros(1, 4, WIDTH)}, "dinov2", ["register tokens"]),
        ({"epoch": 3}, "dinov2", ["state_dict is needed"]),
    ],
)
def test_wrong_weights_are_refused(tmp_path, weights, name, words):
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    with pytest.raises(DataError) as error:
        build(path, name)
    message = str(error.value)
    assert all(word in message for word in [str(path), *words]), message
    assert "\n" not in message


def test_an_incomplete_hugging_face_block_is_named(tmp_path):
    weights = hugging_face(meta_weights())
    del weights["encoder.layer.2.attention.attention.key.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"missing: blocks.2.attn.qkv.bias"):
        build(tmp_path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_one_line(tmp_path, suffix, share):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(meta_weights(), path)
    else:
        save_file(meta_weights(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="damaged") as error:
        build(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"cls_token": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(DataError):
        build(tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def small_vits14(monkeypatch):
    """The table's dinov2_vits14 replaced by the small model, so that the search for weights can be followed to its end."""
    shape = VitShape(width=WIDTH, depth=DEPTH, heads=2, hidden=4 * WIDTH, patch_size=PATCH, native_grid=NATIVE)
    monkeypatch.setitem(SHAPES, "dinov2_vits14", shape)


def test_missing_weights_say_where_and_how(empty_caches):
    with pytest.raises(DataError) as error:
        build_extractor(FeaturesConfig(name="dinov2_vits14"))
    message = str(error.value)
    for word in (
        str(empty_caches / "torch/hub/checkpoints/dinov2_vits14_pretrain.pth"),
        str(empty_caches / "hf/hub/models--facebook--dinov2-small"),
        "torch.hub.load",
        "features.weights=FILE",
    ):
        assert word in message
    assert "\n" not in message
    with pytest.raises(DataError, match=r"does not exist"):
        build(empty_caches / "nowhere.pth", "dinov2_vits14")
    with pytest.raises(DataError, match=r"features.weights is not set"):
        build_extractor(FeaturesConfig(name="dinov2"))


@pytest.mark.usefixtures("small_vits14")
@pytest.mark.parametrize(
    "place",
    [
        "torch/hub/checkpoints/dinov2_vits14_pretrain.pth",
        "hf/hub/models--facebook--dinov2-small/snapshots/abc/model.safetensors",
        "hf/hub/models--timm--vit_small_patch14_dinov2.lvd142m/snapshots/abc/pytorch_model.bin",
    ],
)
def test_weights_are_found_in_the_hub_caches(empty_caches, place):
    path = empty_caches / place
    path.parent.mkdir(parents=True)
    if path.suffix == ".safetensors":
        save_file(hugging_face(meta_weights()), path)
    else:
        torch.save(meta_weights(), path)
    extractor = build_extractor(FeaturesConfig(name="dinov2_vits14"))
    assert extractor.path == path and extractor.name == "dinov2_vits14"


@pytest.mark.usefixtures("small_vits14")
def test_the_snapshot_that_main_names_is_taken(empty_caches):
    folder = empty_caches / "hf/hub/models--facebook--dinov2-small"
    for snapshot in ("aaa", "bbb"):
        (folder / "snapshots" / snapshot).mkdir(parents=True)
        save_file(hugging_face(meta_weights()), folder / "snapshots" / snapshot / "model.safetensors")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("bbb")
    assert build_extractor(FeaturesConfig(name="dinov2_vits14")).path.parent.name == "bbb"


def test_a_folder_with_several_files_is_refused_with_their_names(tmp_path):
    for name in ("a.pth", "b.pth"):
        torch.save(meta_weights(), tmp_path / name)
    with pytest.raises(DataError, match=r"a.pth, b.pth"):
        build(tmp_path)
    (tmp_path / "b.pth").unlink()
    assert build(tmp_path).path == tmp_path / "a.pth"


def test_bad_frames_and_settings(meta_file):
    extractor = build(meta_file)
    with pytest.raises(ConfigError, match=r"18x20 pixels.*patch size 4"):
        extractor(random_frames(2, 18, 20))
    with pytest.raises(DataError, match="float32"):
        extractor(random_frames().double())
    with pytest.raises(ConfigError, match=r"features.layer='keys'"):
        build(meta_file, layer="keys")
    with pytest.raises(ConfigError, match=r"did you mean 'dinov2_vits14'"):
        build_extractor(FeaturesConfig(name="dinov2_vits"))
