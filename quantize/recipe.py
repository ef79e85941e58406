"""Which part is stored how: presets, and recipe files for everything in between.

A recipe file is JSON. Every field may be left out; null keeps a part (or a layer) in `precision`.

| field                                 | value                                                                        |
|---------------------------------------|------------------------------------------------------------------------------|
| version                               | 1                                                                            |
| precision                             | "fp32" or "fp16": of what is not quantized                                   |
| encoder, projector, decoder, lm_head  | a scheme: `{"bits": 4, "group": 64, "symmetric": true, "method": "mse"}`     |
| embedding                             | "int8" (one scale per row), "int4" (as a 4-bit head, else groups of 64; a    |
|                                       | table that is the head, too, is then stored once on ONNX Runtime), or null   |
| kv                                    | "fp16" or "int8" (a scale per channel): the KV cache; null: the target's own |
| prefill                               | a scheme: a second decoder graph, on the same KV cache, for more than one    |
|                                       | position at a time; its layers are named `prefill.layers.0…`; null: none     |
| smooth                                | `{"prefill": 0.5, "decoder": "awq"}`: SmoothQuant's strength, or AWQ, for    |
|                                       | encoder, decoder or prefill                                                  |
| layers                                | `{"decoder.layers.0.mlp.down_proj": scheme or null}`: before the part's own; |
|                                       | `*` stands for anything; a whole name comes first, then the first pattern    |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from penguin_edge.errors import InputError
from penguin_edge.files import read_json
from penguin_edge.quantize.linear import Scheme
from penguin_edge.quantize.smooth import AWQ
from penguin_edge.schema import Flag, Record, SchemaError, Text

VERSION = 1
MAX_LAYERS, MAX_NAME = 10_000, 256
TYPED = Record({}, {"name": Text(longest=MAX_NAME), "lenient": Flag()}, open=True)
LINEAR_PARTS = ("encoder", "projector", "decoder", "lm_head", "prefill")
SMOOTHED = ("encoder", "decoder", "prefill")
"""Parts made of blocks whose activations can be smoothed."""
INT4, INT8, INT8_ROWS = Scheme(4, 64), Scheme(8), Scheme(8, activations="token")


@dataclass(frozen=True)
class Recipe:
    """Schemes by part and by layer; None: not quantized."""

    name: str
    precision: Literal["fp32", "fp16"] = "fp32"
    encoder: Scheme | None = None
    projector: Scheme | None = None
    decoder: Scheme | None = None
    lm_head: Scheme | None = None
    embedding: Literal["int8", "int4"] | None = None
    kv: Literal["fp16", "int8"] | None = None
    prefill: Scheme | None = None
    smooth: Mapping[str, float | str] = field(default_factory=dict)
    layers: Mapping[str, Scheme | None] = field(default_factory=dict)
    lenient: bool = False
    """A layer that the part's group does not divide takes a smaller group, or stays as it is; the table says so."""

    @property
    def label(self) -> str:
        """What a bundle says of its precision: one that quantizes nothing is called by the precision that it has."""
        return self.name if self.quantized else self.precision

    @property
    def quantized(self) -> bool:
        schemes = [getattr(self, part) for part in LINEAR_PARTS] + list(self.layers.values())
        return (self.embedding or self.kv) is not None or any(scheme is not None for scheme in schemes)

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        schemes = [getattr(self, part) for part in LINEAR_PARTS] + list(self.layers.values())
        return (
            bool(self.smooth)
            or self.kv == "int8"
            or any(scheme is not None and scheme.calibrated for scheme in schemes)
        )

    def scheme_of(self, layer: str) -> Scheme | None:
        """The scheme of a linear layer by our name, such as `decoder.layers.0.mlp.up_proj`."""
        if layer in self.layers:
            return self.layers[layer]
        for pattern, found in self.layers.items():
            if fnmatchcase(layer, pattern):
                return found
        part = "lm_head" if layer.endswith(".lm_head") else layer.partition(".")[0]
        scheme: Scheme | None = getattr(self, part)
        return scheme

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any, name: str) -> Recipe:
        """Read what `to_json` or a user wrote.

        Raises:
            InputError: another version, an unknown field, part or scheme; the message lists the known ones.
        """
        if not isinstance(data, dict):
            raise InputError(f"{name}: got {type(data).__name__}, wanted an object with a scheme per part")
        version = data.get("version", VERSION)
        if type(version) is not int or version != VERSION:
            raise InputError(
                f"{name}: got recipe version {version!r}, this penguin-edge reads {VERSION}; update penguin-edge"
            )
        known = {f.name for f in fields(cls)} - {"name"}
        unknown = sorted(set(data) - known - {"version", "name"})
        if unknown:
            raise InputError(f"{name}: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        values = {key: value for key, value in data.items() if key in known}
        try:
            TYPED.check(data, name)
        except SchemaError as error:
            raise InputError(str(error)) from error
        if values.get("precision", "fp32") not in ("fp32", "fp16"):
            raise InputError(f"{name}: precision {values['precision']!r}, wanted fp32 or fp16")
        if values.get("embedding") not in (None, "int8", "int4"):
            raise InputError(f"{name}: embedding {values['embedding']!r}, wanted int8, int4 or null")
        if values.get("kv") not in (None, "fp16", "int8"):
            raise InputError(f"{name}: kv {values['kv']!r}, wanted fp16, int8 or null")
        for part in LINEAR_PARTS:
            if part in values:
                values[part] = _scheme(values[part], f"{name}: {part}")
        smooth = values.get("smooth", {})
        if not isinstance(smooth, dict) or set(smooth) - set(SMOOTHED):
            raise InputError(
                f"{name}: smooth is {json.dumps(smooth)}, wanted a strength for any of {', '.join(SMOOTHED)}"
            )
        for part, strength in smooth.items():
            if strength != AWQ and (
                isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1
            ):
                raise InputError(f"{name}: smooth: {part} is {json.dumps(strength)}, wanted 0 to 1, or {AWQ}")
            if values.get(part) is None:
                raise InputError(
                    f"{name}: smooth: {part} is not quantized; give it a scheme, or leave it out of smooth"
                )
        layers = values.get("layers", {})
        if not isinstance(layers, dict) or len(layers) > MAX_LAYERS or any(len(key) > MAX_NAME for key in layers):
            raise InputError(
                f"{name}: layers is {json.dumps(layers)[:60]}, wanted an object of at most {MAX_LAYERS} layer "
                "names and their schemes"
            )
        values["layers"] = {key: _scheme(value, f"{name}: {key}") for key, value in layers.items()}
        return cls(name=name, **values)


def _scheme(value: Any, where: str) -> Scheme | None:
    if value is None:
        return None
    known = [f.name for f in fields(Scheme)]
    if not isinstance(value, dict) or "bits" not in value or set(value) - set(known):
        raise InputError(f"{where}: got {json.dumps(value)}, wanted null or an object of {', '.join(known)}")
    kinds = {
        "bits": (int,),
        "group": (int, type(None)),
        "symmetric": (bool,),
        "method": (str,),
        "activations": (str, type(None)),
    }
    for key, kind in kinds.items():
        found = value.get(key)
        if key in value and (not isinstance(found, kind) or (isinstance(found, bool) and bool not in kind)):
            raise InputError(f"{where}: {key} is {json.dumps(found)}, wanted {kind[0].__name__}")
    try:
        return Scheme(**value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


PRESETS = {
    "fp32": Recipe("fp32"),
    "fp16": Recipe("fp16", precision="fp16"),
    "int8": Recipe("int8", "fp32", INT8_ROWS, INT8_ROWS, INT8, INT8, "int8", lenient=True),
    "int4": Recipe("int4", "fp32", INT4, INT4, INT4, INT4, "int4", lenient=True),
    "int8-prefill": Recipe(
        "int8-prefill",
        "fp32",
        INT8_ROWS,
        INT8_ROWS,
        INT4,
        INT4,
        "int8",
        prefill=INT8_ROWS,
        smooth={"prefill": 0.5},
        lenient=True,
    ),
}
"""What `--quant` takes by name."""


def find_recipe(name: str) -> Recipe:
    """A preset by its name, or a recipe file by its path.

    Raises:
        InputError: neither; the message lists the presets.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix != ".json":
        known = ", ".join(PRESETS)
        raise InputError(f"unknown quantization {name!r}; known: {known}, or a recipe file ending in .json")
    data = read_json(path, advice="name a recipe file, such as the one in docs/quantization.md")
    return Recipe.from_json(data, path.name)
