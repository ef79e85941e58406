"""What every field of `bundle.json` must be, written once, as data: types, ranges, words and the form of names.

`Manifest.from_json` checks a manifest against `MANIFEST`, then the relations between its fields; `docs/bundle.md` says
what the fields mean. A manifest is input: its hash shows that it was copied whole, not that a reasonable program wrote
it.
"""

from __future__ import annotations

from penguin_edge.config import CONFIG
from penguin_edge.schema import Flag, Free, Maybe, Real, Record, Rows, Rule, Table, Text, Whole

FILE_NAME = Text(
    pattern=r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/){0,4}[A-Za-z0-9_][A-Za-z0-9_.-]*",
    called="a plain file name inside the bundle's folder",
    longest=255,
)
SHA256 = Text(pattern="[0-9a-f]{64}", called="64 hexadecimal digits")
FILES = Table(FILE_NAME, Record({"sha256": SHA256, "bytes": Whole(0)}), 1, 10_000)
"""Files by their names, each with its SHA-256 and size."""
CHECK_PATCHES = 48
"""Patches of the largest picture of the check data, which every encoder takes."""
DTYPES = {"f32", "i64"}
"""Types of the tensors that a graph takes and gives; KV buffers have `kv_dtype`."""

_word = Text(longest=200)
_dimension: dict[type, Rule] = {int: Whole(1), str: Text(pattern="[A-Z]", called="a number or a letter")}


class _Dimension:
    """A dimension of a tensor: a number, or the letter of a bound."""

    def check(self, value: object, where: str) -> None:
        _dimension.get(type(value), _dimension[str]).check(value, where)


TENSORS = Rows(
    Record({"name": _word, "dtype": Text(tuple(sorted(DTYPES))), "shape": Rows(_Dimension(), most=8)}), most=16
)
SCHEME = Record(
    {"bits": Whole(1, 16)},
    {
        "group": Maybe(Whole(1, 1 << 20)),
        "symmetric": Flag(),
        "method": _word,
        "activations": Maybe(_word),
    },
)
GRAPH = Record(
    {"file": FILE_NAME, "precision": _word, "inputs": TENSORS, "outputs": TENSORS},
    {"peak_mb": Maybe(Real()), "seconds": Maybe(Real())},
)
BOUNDS = Record(
    {
        "max_seq_len": Whole(1, 1 << 24),
        "max_chunk": Whole(1, 1 << 20),
        "max_logits": Whole(1, 1 << 16),
        "max_batch": Whole(1, 1 << 12),
        "patch_buckets": Rows(Whole(CHECK_PATCHES, 1 << 20), 1, 64),
    },
    {"min_chunk": Whole(1, 1 << 20)},
)
LAYER = Record(
    {"layer": _word, "shape": Rows(Whole(1), 2, 2), "scheme": Maybe(SCHEME)},
    {"reason": Text(), "error": Maybe(Real(0.0))},
)
QUANTIZATION = Record({}, {"recipe": Free(), "layers": Rows(LAYER), "calibration": Free(), "auto": Free()})
EMBEDDING_DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")
PLACE = Record({"file": FILE_NAME, "levels": Whole(0), "scales": Whole(0), "group": Whole(1, 1 << 20)})
"""Where the integers and scales of an int4 table lie."""
KV_DTYPES = ("fp32", "fp16", "int8")

MANIFEST = Record(
    {
        "schema": Whole(1),
        "model": CONFIG,
        "source": Record({"name": Text(), "sha256": SHA256, "random": Flag()}),
        "target": _word,
        "precision": _word,
        "bounds": BOUNDS,
        "graphs": Table(Text(("encoder", "projector", "prefill", "decoder")), GRAPH),
        "embedding_dtype": Text(EMBEDDING_DTYPES),
        "kv_dtype": Text(KV_DTYPES),
        "chat": Record({"start": _word, "end": _word, "image": _word, "empty_think": _word, "frame_tag": _word}),
        "tools": Table(_word, _word, most=64),
        "generation": Record(
            {}, {"temperature": Real(0.0, 100.0), "top_p": Real(0.0, 1.0), "top_k": Whole(0, 1 << 24)}
        ),
        "files": FILES,
        "sha256": SHA256,
    },
    {
        "quantization": QUANTIZATION,
        "embedding": Maybe(PLACE),
        "verified": Flag(),
        "kv_layout": _word,
    },
)
