"""A manifest is input: whatever one of its fields holds, the bundle is refused by name or answers as before."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save_file

from penguin_edge.bundle.contract import CHECK, EMBEDDING, MANIFEST, TOKENIZER
from penguin_edge.bundle.folder import Bundle
from penguin_edge.errors import BundleError
from penguin_edge.export.cases import stored_arrays
from penguin_edge.files import file_hash, manifest_hash
from penguin_edge.media.frames import Frame
from penguin_edge.runtime.core.sampling import SamplingOptions
from penguin_edge.runtime.session import Session

DROP = object()
MUTATIONS: tuple[Any, ...] = (
    DROP,
    None,
    True,
    "text",
    "",
    "../x",
    [],
    {},
    [[]],
    -1,
    0,
    1,
    0.5,
    2**40,
    1e300,
    float("nan"),
)
"""What each field is changed to, one at a time: 16."""
Place = tuple[str | int, ...]
BundleMaker = Callable[[str, str], Path]


def fields(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every field of the manifest, also those that hold others; of rows of equal kind the first."""
    if (place and place[-1] != "sha256") or len(place) > 1:
        yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from fields(item, (*place, key))
    elif isinstance(value, list) and value:
        yield from fields(value[0], (*place, 0))


def mutated(manifest: dict[str, Any], place: Place, to: Any) -> dict[str, Any]:
    """The manifest with one field changed, and its hash made anew."""
    data = copy.deepcopy(manifest)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    if to is DROP:
        del inner[place[-1]]
    else:
        inner[place[-1]] = to
    data["sha256"] = manifest_hash(data)
    return data


def linked(bundle: Path, folder: Path, data: Any) -> Path:
    """The bundle again with another manifest."""
    folder.mkdir(parents=True)
    for file in bundle.iterdir():
        if file.name != MANIFEST:
            os.link(file, folder / file.name)
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    return folder


def answers(folder: Path) -> list[list[int]]:
    """Greedy tokens of a question about a picture and of one about a clip of two scenes."""
    session = Session.open(folder, threads=1, budget=100)
    options = SamplingOptions(max_new_tokens=6)
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What is it?"}]
    shown = [token.id for token in session.converse([{"role": "user", "content": content}], options)]
    for i in range(4):
        session.push(Frame(picture(i // 2), float(i), i))
    return [shown, [token.id for token in session.ask("When does the scene change?", options=options)]]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "quant"), [("onnx", "fp32"), ("executorch", "fp32"), ("onnx", "int4")])
def test_a_field_of_another_value_is_refused_or_changes_nothing(
    nano_bundle: BundleMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, quant: str
) -> None:
    """Every field, 16 mutations each: 7,500 manifests, most of which are refused before anything is loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = nano_bundle(target, quant)
    manifest = json.loads((source / MANIFEST).read_text())
    right = answers(source)
    refused, same, wrong = 0, 0, []
    for number, (place, to) in enumerate((place, to) for place in fields(manifest) for to in MUTATIONS):
        folder = linked(source, tmp_path / str(number), mutated(manifest, place, to))
        try:
            if answers(folder) == right:
                same += 1
            else:
                wrong.append((place, to, "another answer"))
        except BundleError:
            refused += 1
        except Exception as error:
            wrong.append((place, to, repr(error)[:200]))
        shutil.rmtree(folder)
    assert not wrong
    assert refused > 1900 and same > 100


@cache
def places_of(bundle: Path) -> st.SearchStrategy[list[Place]]:
    """One to three fields of a bundle's manifest."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    return st.lists(st.sampled_from(list(fields(manifest))), min_size=1, max_size=3)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_a_bundle_or_is_refused(
    nano_bundle: BundleMaker, tmp_path: Path, data: st.DataObject
) -> None:
    source = nano_bundle("onnx", "fp32")
    manifest = json.loads((source / MANIFEST).read_text())
    for place in data.draw(places_of(source)):
        with contextlib.suppress(KeyError, IndexError, TypeError):  # a change before took the field away
            manifest = mutated(manifest, place, data.draw(values))
    folder = tmp_path / "x"
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(BundleError):
        Bundle.read(linked(source, folder, manifest))


def refusal(bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """What is said of a bundle whose manifest was changed."""
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    data["sha256"] = manifest_hash(data)
    with pytest.raises(BundleError) as error:
        Session.open(linked(bundle, tmp_path / "changed", data), threads=1)
    return str(error.value)


FIELDS_THAT_DISAGREE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "least above most": (lambda d: d["bounds"].update(min_chunk=300), "min_chunk 300 above max_chunk"),
    "longer than the model": (lambda d: d["bounds"].update(max_seq_len=2**20), "its limit"),
    "smaller pictures": (lambda d: d["bounds"].update(patch_buckets=[48]), r"patch_buckets \[48\].*writes \[16384\]"),
    "one more bucket": (lambda d: d["bounds"]["patch_buckets"].append(48), r"patch_buckets \[16384, 48\]"),
    "smaller chunks": (lambda d: d["bounds"].update(max_chunk=128), "max_chunk 128.*writes 256"),
    "larger chunks": (lambda d: d["bounds"].update(max_chunk=257), "max_chunk 257.*writes 256"),
    "one frame at a time": (lambda d: d["bounds"].update(max_batch=1), "max_batch 1.*writes 16"),
    "more logits": (lambda d: d["bounds"].update(max_logits=9), "max_logits 9.*writes 8"),
    "no graph for prompts": (lambda d: d["bounds"].update(min_chunk=2), "without a prefill graph"),
    "heads": (lambda d: d["model"]["text"].update(num_key_value_heads=3), "wanted a multiple"),
    "an odd head": (lambda d: d["model"]["text"].update(head_dim=31), "wanted an even|even one"),
    "a token outside": (lambda d: d["model"].update(eos_token_ids=[4160]), "outside of the vocabulary"),
    "answers without an end": (lambda d: d["model"].update(eos_token_ids=[7]), "would not end"),
    "no image token": (lambda d: d["model"].update(image_token_id=-1), "image_token_id is -1 with an encoder"),
    "image tokens": (lambda d: d["model"]["image"].update(min_tokens=17_000), "the first to be the smaller"),
    "a graph too few": (lambda d: d["graphs"].pop("projector"), "wanted decoder, encoder, projector"),
    "a graph twice": (lambda d: d["graphs"]["encoder"].update(file="decoder.onnx"), "twice"),
    "other tensors": (lambda d: d["graphs"]["encoder"]["inputs"].pop(), "other tensors"),
    "a table of another size": (lambda d: d.update(embedding_dtype="fp16"), "does not lie there"),
    "a table without a place": (lambda d: d.update(embedding_dtype="int4"), "without a place"),
    "the weights not listed": (lambda d: d["files"].pop("decoder.onnx.data"), "does not list it"),
    "the tokenizer not listed": (lambda d: d["files"].pop(TOKENIZER), f"does not list {TOKENIZER}"),
    "the table not listed": (lambda d: d["files"].pop(EMBEDDING), f"does not list {EMBEDDING}"),
    "another model's numbers": (lambda d: d["model"]["image"].update(max_frames=7), "another model configuration"),
}


@pytest.mark.parametrize("case", FIELDS_THAT_DISAGREE)
def test_fields_that_do_not_go_together_are_named(nano_bundle: BundleMaker, tmp_path: Path, case: str) -> None:
    change, said = FIELDS_THAT_DISAGREE[case]
    assert re.search(said, refusal(nano_bundle("onnx", "fp32"), tmp_path, change))


NAMES = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "",
    ".",
    "..",
    "a//b",
    ".hidden",
    "C:\\x",
    "a\x00b",
    "file:///x",
    "a/./b",
    "x\n",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["graph", "file"])
def test_names_stay_inside_the_folder(nano_bundle: BundleMaker, tmp_path: Path, name: str, field: str) -> None:
    def change(data: dict[str, Any]) -> None:
        if field == "graph":
            data["graphs"]["decoder"]["file"] = name
        else:
            data["files"][name] = data["files"][TOKENIZER]

    assert "plain file name" in refusal(nano_bundle("onnx", "fp32"), tmp_path, change)


def test_a_file_that_is_a_link_out_of_the_folder_is_refused(nano_bundle: BundleMaker, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(nano_bundle("onnx", "fp32"), folder)
    (folder / TOKENIZER).rename(tmp_path / "elsewhere.json")
    (folder / TOKENIZER).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match="leads out of the bundle's folder"):
        Bundle.read(folder)
    (tmp_path / "linked").symlink_to(nano_bundle("onnx", "fp32"))  # the folder itself may be a link
    Bundle.read(tmp_path / "linked")


CHECK_DATA_THAT_FIT_NOTHING: dict[str, dict[str, Any]] = {
    "another picture": {},
    "a picture that no memory holds": {"size_0": np.array([2**20, 2**20, 1])},
    "a size beyond 32 bits": {"size_0": np.array([2**62, 2**62, 1])},
    "a size of floats": {"size_0": np.array([np.inf, 56.0, 1.0])},
    "a size below one": {"size_0": np.array([-28, -28, 1])},
    "sides that patches do not fill": {"size_0": np.array([85, 113, 2])},
    "a size of two numbers": {"size_1": np.array([56, 70])},
    "a merge size of none": {"size_1": np.array([56, 70, 0])},
    "patches without values": {
        "size_0": np.array([14 * 2**20, 14 * 2**20, 1]),
        "patches_0": np.zeros((1, 2**40, 0), np.float32),
    },
    "rows beyond all numbers": {"embeds": np.full((79, 128), np.inf, np.float32)},
}


@pytest.mark.parametrize("damage", ["cut", "no tensors", *CHECK_DATA_THAT_FIT_NOTHING])
def test_check_data_that_fit_no_manifest_are_refused(nano_bundle: BundleMaker, tmp_path: Path, damage: str) -> None:
    source = nano_bundle("onnx", "fp32")
    folder = linked(source, tmp_path / "bundle", {})
    content = (source / CHECK).read_bytes()
    (folder / CHECK).unlink()
    arrays = load(content)
    if damage == "cut":
        (folder / CHECK).write_bytes(content[: len(content) // 2])
    elif damage == "no tensors":
        save_file({"ids": arrays["ids"]}, folder / CHECK)
    else:
        changed = CHECK_DATA_THAT_FIT_NOTHING[damage] or {"image_0": 255 - arrays["image_0"]}
        save_file(arrays | changed, folder / CHECK)
    data = json.loads((source / MANIFEST).read_text())
    data["files"][CHECK] = {"sha256": file_hash(folder / CHECK), "bytes": (folder / CHECK).stat().st_size}
    data["sha256"] = manifest_hash(data)
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"check data|become other patches|has other rows"):
        Session.open(folder, threads=1)


def test_verify_names_what_is_wrong_with_its_check_data(nano_bundle: BundleMaker, tmp_path: Path) -> None:
    config = Bundle.read(nano_bundle("onnx", "fp32")).manifest.model
    arrays = load((nano_bundle("onnx", "fp32") / CHECK).read_bytes())
    for name, array in arrays.items():
        for changed in ({}, {name: array.ravel()[:1]}):
            save_file({k: v for k, v in arrays.items() if k != name} | changed, tmp_path / CHECK)
            with pytest.raises(BundleError, match=f"{CHECK}: [a-z_01]+ is "):
                stored_arrays(tmp_path / CHECK, config)
    save_file(arrays | {"size_0": arrays["size_0"] * 2}, tmp_path / CHECK)
    with pytest.raises(BundleError, match=r"size_0 is \[168, 224, 4\], wanted \[84, 112, 2\]"):
        stored_arrays(tmp_path / CHECK, config)
    (tmp_path / CHECK).write_bytes(b"no tensors")
    with pytest.raises(BundleError, match="cannot be read as check data"):
        stored_arrays(tmp_path / CHECK, config)


@pytest.mark.parametrize("length", [256, 513, 1024])
def test_a_cache_of_another_length_than_the_graph_has_is_refused(
    nano_bundle: BundleMaker, tmp_path: Path, length: int
) -> None:
    data = json.loads((nano_bundle("onnx", "fp32") / MANIFEST).read_text())
    data["bounds"]["max_seq_len"] = length
    data["sha256"] = manifest_hash(data)
    with pytest.raises(BundleError, match=f"past_key_0 is .* 512, .*the manifest states .* {length}, "):
        answers(linked(nano_bundle("onnx", "fp32"), tmp_path / "changed", data))


def test_a_graph_with_other_tensors_than_stated_is_refused(nano_bundle: BundleMaker, tmp_path: Path) -> None:
    """As in bundles of earlier exports, whose check data do not say which configuration they were made for."""
    folder = tmp_path / "bundle"
    shutil.copytree(nano_bundle("onnx", "fp32"), folder)
    save_file(load((folder / CHECK).read_bytes()), folder / CHECK)
    data = json.loads((folder / MANIFEST).read_text())
    data["model"]["text"]["num_hidden_layers"] = 1
    data["files"][CHECK] = {"sha256": file_hash(folder / CHECK), "bytes": (folder / CHECK).stat().st_size}
    data["sha256"] = manifest_hash(data)
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"its tensor past_key_1 is tensor\(float\).*the manifest states none"):
        answers(folder)
