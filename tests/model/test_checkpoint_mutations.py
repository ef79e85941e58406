"""Random damage and contradiction in a checkpoint folder: equal to transformers, or one sentence, and nothing else."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import ROPE, SIZES, TOLERANCE, make, off, ours, theirs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from penguin_edge.errors import CheckpointError
from penguin_edge.files import MAX_BYTES
from penguin_edge.model.checkpoint import Checkpoint
from penguin_edge.model.tensorfile import read_header

QUICK = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
"""The same examples in every run: the suite is to be as long, and as green, each time."""

ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 16, 0.5, 1e-6, 1e4, 1e6, 2**40, 10**30, -0.0, "16", "", "yarn"]
ODD += [[], [1], {}, {"rope_theta": 1e4}, {"type": "default"}, {"rope_type": "linear", "factor": 2.0}, ROPE]
ODD += [["full_attention"] * 2, ["full_attention", "sliding_attention"], "silu", "gelu", [[]], {"a": {"b": [None]}}]
KEYS = [
    *SIZES,
    *("head_dim", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "tie_word_embeddings"),
    *("rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "layer_types", "sliding_window", "is_causal"),
    *("use_sliding_window", "max_window_layers", "model_type", "dtype", "torch_dtype", "quantization_config"),
    *("text_config", "vision_encoder", "vision_encoder_config", "per_layer_config", "architectures", "image_token_id"),
]
CHANGES = st.dictionaries(st.sampled_from(KEYS), st.sampled_from([..., *ODD]), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bases")
    return [
        make(root / "qwen3"),
        make(root / "tied", tied=True),
        make(root / "llama", "llama"),
        make(root / "sharded", shard="20KB"),
    ]


def check(folder: Path) -> None:
    """Loads as transformers does, or raises our error in one line; what transformers itself refuses may do either."""
    try:
        got = ours(folder)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1200
        return
    try:
        wanted = theirs(folder)
    except Exception:
        return
    assert off(got, wanted) <= TOLERANCE


@QUICK
@given(which=st.integers(0, 2), changes=CHANGES, removed=st.sampled_from(["", "config.json", "generation_config.json"]))
def test_any_configuration(bases: list[Path], which: int, changes: dict[str, Any], removed: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(bases[which], Path(place) / "model"))
        path = folder / (removed or "config.json")
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
        check(folder)


@QUICK
@given(st.data())
def test_any_change_of_names_and_files(bases: list[Path], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(bases[data.draw(st.integers(0, 3))], Path(place) / "model"))
        for _ in range(data.draw(st.integers(1, 3))):
            files = sorted(folder.glob("*.safetensors"))
            path = data.draw(st.sampled_from(files)) if files else folder / "model.safetensors"
            how = data.draw(st.sampled_from(["rename", "copy", "drop", "double", "delete", "move", "index", "dtype"]))
            tensors = (load_file(path) if path.is_file() else {}) or {"x": torch.ones(2)}
            name = data.draw(st.sampled_from(sorted(tensors)))
            if how == "rename":
                old, new = data.draw(
                    st.sampled_from([("model.", ""), ("model.", "model.model."), ("self_attn.", "x.")])
                )
                tensors = {key.replace(old, new, 1): value for key, value in tensors.items()}
            elif how == "copy":
                prefix = data.draw(st.sampled_from(["model.", "", "base_model.model."]))
                tensors[prefix + name.removeprefix("model.")] = tensors[name].float() * 0.5
            elif how == "drop":
                del tensors[name]
            elif how == "double":
                save_file(
                    {key: value.float() * 0.5 for key, value in tensors.items()}, folder / "model-extra.safetensors"
                )
            elif how == "dtype":
                kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
                tensors[name] = tensors[name].to(data.draw(st.sampled_from(kinds)))
            if how in ("rename", "copy", "drop", "dtype"):
                save_file(tensors, path, metadata={"format": "pt"})
            elif how == "delete":
                path.unlink(missing_ok=True)
            elif how == "move" and path.is_file():
                path.rename(folder / data.draw(st.sampled_from(["model.safetensors", "model_1.safetensors"])))
            elif how == "index":
                places = {key: path.name for key in tensors}
                index = {"metadata": {}, "weight_map": places}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        check(folder)


@QUICK
@given(at=st.integers(0, 4000), value=st.integers(0, 255), cut=st.integers(0, 1))
def test_any_flipped_byte_of_a_header(bases: list[Path], at: int, value: int, cut: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(bases[1], Path(place) / "model"))
        raw = bytearray((folder / "model.safetensors").read_bytes())
        raw[at % (8 + struct.unpack("<Q", raw[:8])[0])] = value
        (folder / "model.safetensors").write_bytes(raw[: len(raw) - 100 * cut])
        check(folder)


def written(path: Path, header: Any, data: bytes = bytes(64), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int = 0, end: int = 64, shape: Any = (16,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"x": entry(shape=(-16,))}, "tensor x.shape[0] is -16"),
        ({"x": entry(shape=(2**60, 2**60))}, "is 1152921504606846976"),
        ({"x": entry(shape=(2**40, 2**40))}, "lies at bytes 0 to 64"),
        ({"x": entry(shape=(True,) * 2)}, "shape[0] is true"),
        ({"x": entry(shape=(1.0,))}, "shape[0] is 1.0"),
        ({"x": entry(shape=[1] * 9)}, "0 to 8 entries"),
        ({"x": entry(dtype="F7")}, 'dtype is "F7"'),
        ({"x": entry(dtype=["F32"])}, "dtype"),
        ({"x": entry(-64, 0)}, "data_offsets[0] is -64"),
        ({"x": entry(0, 60)}, "lies at bytes 0 to 60, wanted 0 to 64"),
        ({"x": entry(0, 32, (8,)), "y": entry(16, 48, (8,))}, "tensor y [8] of F32 lies at bytes 16 to 48, wanted 32"),
        ({"x": entry(0, 16, (4,)), "y": entry(32, 64, (8,))}, "wanted 16 to 48"),
        ({"x": entry(0, 128, (32,))}, "cut off inside tensor x"),
        ({"x": entry(0, 32, (8,))}, "32 bytes behind its last tensor"),
        ({"x": {**entry(), "more": 1}}, "unknown field 'more'"),
        ({"x": {"dtype": "F32"}}, "has no shape"),
        ({"x": 5}, "tensor x is 5"),
        ([], "its header is not an object"),
        (b'{"x":' + json.dumps(entry()).encode() + b',"x":' + json.dumps(entry()).encode() + b"}", "stands twice"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,64]}}', "a number of 5000 digits"),
        (b"\xff" * 20, "not UTF-8"),
    ],
)
def test_a_header_is_input(tmp_path: Path, header: Any, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(written(tmp_path / "x.safetensors", header))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 73, 2**63, 2**64 - 1, MAX_BYTES + 1])
def test_a_header_of_an_impossible_length(tmp_path: Path, length: int) -> None:
    path = written(tmp_path / "x.safetensors", b"{}", length=length)
    if length == MAX_BYTES + 1:
        with path.open("r+b") as stream:
            stream.truncate(8 + 2 * length)  # sparse: no disk stands behind it
    with pytest.raises(CheckpointError, match="header"):
        read_header(path)


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"x": 5}}, "{", "[" * 9999]
)
def test_an_index_is_input(tmp_path: Path, bases: list[Path], index: Any) -> None:
    folder = Path(shutil.copytree(bases[3], tmp_path / "model"))
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="shard index"):
        Checkpoint.open(folder, note=[].append)
