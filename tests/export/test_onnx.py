"""Real exports of the tiny preset to ONNX, held against eager PyTorch through the engine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Alone
from numpy.testing import assert_array_equal

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")

from penguin_edge.bundle.contract import EMBEDDING, kv_names, signature  # noqa: E402
from penguin_edge.bundle.folder import Bundle, finish  # noqa: E402
from penguin_edge.bundle.manifest import GraphEntry, Manifest  # noqa: E402
from penguin_edge.config import PRESETS  # noqa: E402
from penguin_edge.errors import BudgetError, BundleError, InputError, PenguinError, TargetUnavailable  # noqa: E402
from penguin_edge.export.targets.onnx import graphs as export  # noqa: E402
from penguin_edge.export.targets.onnx.blocks import Joined  # noqa: E402
from penguin_edge.model.penguin import PenguinModel  # noqa: E402
from penguin_edge.quantize.linear import QuantizedLinear, Scheme, quantize_weight  # noqa: E402
from penguin_edge.runtime.engines.base import F32  # noqa: E402
from penguin_edge.runtime.engines.embedding import EmbeddingTable  # noqa: E402
from penguin_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine  # noqa: E402

TINY = PRESETS["tiny"]
VOCAB = TINY.text.vocab_size
MAX_SEQ_LEN = 64
TOLERANCE = 1e-4
"""Relative, for both precisions: fp16 weights are computed with in fp32, so that only the order of sums differs."""
HALF_TOLERANCE = 5e-3
"""Relative, against the fp32 weights: fp16 has 11 bits (5e-4), added up over the layers."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def tiny(dtype: torch.dtype, parts: tuple[str, ...] = ("encoder", "projector", "embedding", "decoder")) -> PenguinModel:
    """The preset with weights from a seed, large enough that every layer matters."""
    model = PenguinModel(TINY, parts).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # The head is the embedding's table: one seed, whichever part is loaded.
        seed = 0 if name in ("embedding.weight", "decoder.lm_head.weight") else sum(name.encode())
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.08 * noise)
    return model.to(dtype)


def export_bundle(folder: Path, precision: str) -> Bundle:
    folder.mkdir()
    target = export.OnnxTarget()
    bounds = target.bounds(MAX_SEQ_LEN)
    graphs = {}
    for part in ("encoder", "projector", "decoder"):
        inputs, outputs = signature(part, TINY, bounds)
        file = target.export_part(part, tiny(DTYPES[precision], (part,)), bounds, folder).file
        graphs[part] = GraphEntry(file, precision, tuple(inputs), tuple(outputs))
    table = tiny(DTYPES[precision], ("embedding",)).embedding
    assert table is not None
    table.weight.numpy().tofile(folder / EMBEDDING)
    kv_dtype = target.kv_dtype(precision)
    return finish(folder, Manifest(TINY, {}, "onnx", precision, bounds, graphs, precision, kv_dtype, {}, {}))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("onnx")
    return {precision: export_bundle(root / precision, precision) for precision in DTYPES}


@pytest.fixture(scope="session")
def models() -> dict[str, PenguinModel]:
    """What each bundle computes: the weights as they are stored, in fp32."""
    return {precision: tiny(dtype).float() for precision, dtype in DTYPES.items()}


@pytest.fixture(scope="session", params=list(DTYPES))
def pair(
    request: pytest.FixtureRequest, bundles: dict[str, Bundle], models: dict[str, PenguinModel]
) -> tuple[OnnxRuntimeEngine, PenguinModel]:
    return OnnxRuntimeEngine.open(bundles[request.param], threads=1), models[request.param]


@pytest.fixture
def engine(bundles: dict[str, Bundle]) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine.open(bundles["fp32"], threads=1)


def near(got: F32, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    reference = wanted.numpy()
    assert got.shape == reference.shape
    assert np.abs(got - reference).max() <= tolerance * np.abs(reference).max()


def grid(batch: int, height: int, width: int) -> tuple[F32, np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(height * width).standard_normal((batch, height * width, 588), dtype=np.float32)
    return pixels, np.repeat(np.arange(height), width), np.tile(np.arange(width), height)


def nodes(bundle: Bundle, part: str) -> Counter[str]:
    graph = onnx.load(bundle.path(f"{part}.onnx"), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (1, 2, 4), (2, 6, 4), (3, 3, 7), (16, 2, 2)])
def test_encoder_matches_eager(
    pair: tuple[OnnxRuntimeEngine, PenguinModel], batch: int, height: int, width: int
) -> None:
    engine, model = pair
    pixels, rows, cols = grid(batch, height, width)
    with torch.no_grad():
        wanted = model.encode(*map(torch.from_numpy, (pixels, rows, cols)))
    near(engine.encode(pixels, rows, cols), wanted)


@pytest.mark.parametrize(("batch", "tokens", "merge"), [(1, 1, 1), (1, 1, 2), (2, 6, 1), (3, 5, 2)])
def test_projector_matches_eager(
    pair: tuple[OnnxRuntimeEngine, PenguinModel], batch: int, tokens: int, merge: int
) -> None:
    engine, model = pair
    features = np.random.default_rng(0).standard_normal((batch, tokens * merge**2, 64), dtype=np.float32)
    with torch.no_grad():
        wanted = model.project(torch.from_numpy(features), merge)
    near(engine.project(features.reshape(batch, tokens, merge**2, 64)), wanted)


class Cached:
    """Runs chunks of one random sequence and holds all logits against one causal forward without a cache."""

    def __init__(self, engine: OnnxRuntimeEngine, model: PenguinModel) -> None:
        assert model.decoder is not None
        self.engine = Alone(engine)
        self.embeds = np.random.default_rng(1).standard_normal((MAX_SEQ_LEN, 96), dtype=np.float32)
        with torch.no_grad():
            hidden = model.decoder(torch.from_numpy(self.embeds)[None], torch.arange(MAX_SEQ_LEN))
            self.logits = model.decoder.lm_head(hidden)[0]

    def chunk(self, count: int, *index: int) -> None:
        begin = self.engine.length
        got = self.engine.forward(self.embeds[begin : begin + count], np.array(index, dtype=np.int64))
        near(got, self.logits[[begin + (count + i if i < 0 else i) for i in index]])
        assert self.engine.length == begin + count


def prefill_decode_truncate(run: Cached) -> None:
    run.chunk(12, -1)
    for _ in range(8):
        run.chunk(1, -1)
    run.engine.truncate(5)
    run.chunk(4, 0, 3)
    run.chunk(1, 0)


def uneven_chunks(run: Cached) -> None:
    for count in (7, 1, 12, 13):
        run.chunk(count, -1, 0)


def one_at_zero(run: Cached) -> None:
    run.chunk(1, -1)
    run.chunk(1, 0)


def full_capacity(run: Cached) -> None:
    run.chunk(MAX_SEQ_LEN, *range(0, MAX_SEQ_LEN, 8))
    run.engine.truncate(MAX_SEQ_LEN - 1)
    run.chunk(1, -1)


@pytest.mark.parametrize("steps", [prefill_decode_truncate, uneven_chunks, one_at_zero, full_capacity])
def test_decoder_matches_a_forward_without_cache(
    pair: tuple[OnnxRuntimeEngine, PenguinModel], steps: Callable[[Cached], None]
) -> None:
    steps(Cached(*pair))


def test_a_chunk_may_ask_for_no_logits(engine: OnnxRuntimeEngine, models: dict[str, PenguinModel]) -> None:
    run = Cached(engine, models["fp32"])
    assert run.engine.forward(run.embeds[:9], np.zeros(0, dtype=np.int64)).shape == (0, VOCAB)
    run.chunk(3, -1)


def test_results_of_earlier_calls_stay(engine: OnnxRuntimeEngine) -> None:
    embeds = np.random.default_rng(2).standard_normal((2, 96), dtype=np.float32)
    one = Alone(engine)
    first = one.forward(embeds[:1], np.array([-1]))
    kept = first.copy()
    one.forward(embeds[1:], np.array([-1]))
    assert_array_equal(first, kept)


@pytest.mark.parametrize("engines", [1, 2])
def test_two_caches_are_two(bundles: dict[str, Bundle], models: dict[str, PenguinModel], engines: int) -> None:
    opened = [OnnxRuntimeEngine.open(bundles["fp32"], threads=1) for _ in range(engines)]
    one, two = (Cached(engine, models["fp32"]) for engine in (opened[0], opened[-1]))
    one.chunk(20, -1)
    two.chunk(3, -1)
    one.chunk(5, 0, -1)
    two.chunk(5, 0, -1)


def test_more_than_the_capacity_is_refused_and_changes_nothing(
    engine: OnnxRuntimeEngine, models: dict[str, PenguinModel]
) -> None:
    run = Cached(engine, models["fp32"])
    run.chunk(MAX_SEQ_LEN - 1, -1)
    with pytest.raises(BudgetError, match=f"{MAX_SEQ_LEN + 1} tokens"):
        run.engine.forward(np.zeros((2, 96), np.float32), np.array([-1]))
    run.chunk(1, -1)


def test_what_lies_outside_the_bounds_is_refused(engine: OnnxRuntimeEngine) -> None:
    one, cached = np.zeros((1, 96), np.float32), Alone(engine)
    for index in (np.array([1]), np.array([-2]), np.zeros(9, np.int64)):
        with pytest.raises(InputError):
            cached.forward(one, index)
    with pytest.raises(InputError, match="17 frames"):
        engine.encode(*grid(17, 1, 1))
    with pytest.raises(InputError, match="17 frames"):
        engine.project(np.zeros((17, 1, 4, 64), np.float32))
    with pytest.raises(InputError, match="cache holds 0"):
        cached.truncate(1)


def test_wrong_widths_give_our_error(engine: OnnxRuntimeEngine) -> None:
    cached = Alone(engine)
    with pytest.raises(InputError, match=r"embeds: float32 \[1, 95\], wanted an array of floats of shape \[any, 96\]"):
        cached.forward(np.zeros((1, 95), np.float32), np.array([-1]))
    with pytest.raises(InputError, match=r"pixels: float32 \[1, 4, 587\], wanted"):
        engine.encode(np.zeros((1, 4, 587), np.float32), np.arange(4), np.arange(4))
    assert cached.length == 0


def test_embed_reads_the_stored_rows(bundles: dict[str, Bundle], models: dict[str, PenguinModel]) -> None:
    ids = np.array([0, VOCAB - 1, 5, 5])
    for precision, bundle in bundles.items():
        table = models[precision].embedding
        assert table is not None
        got = OnnxRuntimeEngine.open(bundle).embed(ids)
        assert got.dtype == np.float32
        assert_array_equal(got, table.weight[torch.from_numpy(ids)].numpy())


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_embedding_table_is_exact_in_each_dtype(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    weight = torch.randn(11, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    (tmp_path / "table").write_bytes(weight.view(torch.uint8).numpy().tobytes())
    table = EmbeddingTable.open(tmp_path / "table", 11, 6, name)
    assert_array_equal(table.lookup(np.arange(11)), weight.float().numpy())
    assert table.lookup(np.zeros(0, np.int64)).shape == (0, 6)
    for wrong in (-1, 11):
        with pytest.raises(InputError, match="token id"):
            table.lookup(np.array([0, wrong]))


def test_embedding_table_refuses_what_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(bytes(10))
    with pytest.raises(BundleError, match="10 bytes, wanted 24"):
        EmbeddingTable.open(tmp_path / "table", 3, 4, "fp16")
    with pytest.raises(BundleError, match="int9"):
        EmbeddingTable.open(tmp_path / "table", 3, 4, "int9")
    with pytest.raises(BundleError, match="cannot be read"):
        EmbeddingTable.open(tmp_path / "absent", 3, 4, "fp16")


def test_graphs_hold_the_fast_operators(bundles: dict[str, Bundle]) -> None:
    for bundle in bundles.values():
        decoder, encoder = nodes(bundle, "decoder"), nodes(bundle, "encoder")
        assert decoder["GroupQueryAttention"] == 3
        assert encoder["MultiHeadAttention"] == 2
        # Two per block are one with an addition; two in its attention are left, and the first of all.
        assert (decoder["RMSNormalization"], encoder["RMSNormalization"]) == (7, 5)
        assert (decoder["SkipSimplifiedLayerNormalization"], encoder["SkipSimplifiedLayerNormalization"]) == (6, 4)
        # Neither weights nor heads are transposed, and the decoder's rotary step is the attention's own.
        assert decoder["Transpose"] == encoder["Transpose"] == 0
        assert decoder["Cos"] == decoder["Sin"] == 0


def test_a_graph_without_them_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "penguin_edge.export.targets.onnx.blocks.multi_head_attention", lambda q, k, v, heads: q + k + v
    )
    target = export.OnnxTarget()
    with pytest.raises(PenguinError, match="0 MultiHeadAttention nodes, wanted 2"):
        target.export_part("encoder", tiny(torch.float32, ("encoder",)), target.bounds(MAX_SEQ_LEN), tmp_path)


def test_boundary_has_the_names_and_shapes_of_the_contract(bundles: dict[str, Bundle]) -> None:
    for bundle in bundles.values():
        for part, entry in bundle.manifest.graphs.items():
            graph = onnx.load(bundle.path(entry.file), load_external_data=False).graph
            for values, specs in ((graph.input, entry.inputs), (graph.output, entry.outputs)):
                found = {}
                for value in values:
                    kind = value.type.tensor_type
                    shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
                    found[value.name] = {1: "f32", 7: "i64"}[kind.elem_type], shape
                for spec in specs:
                    assert found.pop(spec.name) == (spec.dtype, spec.shape)
                kv = {name for layer in range(3) for name in kv_names(layer).values()}
                assert all(name in kv and kind == ("f32", (1, 2, MAX_SEQ_LEN, 32)) for name, kind in found.items())
                assert len(found) == (6 if part == "decoder" else 0)


def test_graphs_say_nothing_of_the_machine(bundles: dict[str, Bundle]) -> None:
    for part in ("encoder", "projector", "decoder"):
        assert (
            str(Path(export.__file__).parent.parent).encode() not in bundles["fp32"].path(f"{part}.onnx").read_bytes()
        )


def test_fp16_takes_half_the_disk(bundles: dict[str, Bundle], models: dict[str, PenguinModel]) -> None:
    for part in ("encoder", "decoder"):
        full, half = (bundles[precision].path(f"{part}.onnx.data").stat().st_size for precision in ("fp32", "fp16"))
        # Norms stay fp32, and the exporter folds the casts of matrices of a few kilobytes.
        assert half < 0.62 * full
    run = Cached(OnnxRuntimeEngine.open(bundles["fp16"], threads=1), models["fp32"])
    got = run.engine.forward(run.embeds[:30], np.array([-1, 0]))
    near(got, run.logits[[29, 0]], HALF_TOLERANCE)


def test_a_bundle_of_another_target_is_refused(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["fp32"]
    with pytest.raises(BundleError, match="--target onnx"):
        OnnxRuntimeEngine.open(Bundle(bundle.folder, replace(bundle.manifest, target="executorch")))


def test_a_graph_that_cannot_be_loaded_says_what_to_do(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["fp32"]
    (tmp_path / EMBEDDING).write_bytes(bundle.path(EMBEDDING).read_bytes())
    (tmp_path / "projector.onnx").write_bytes(b"not a graph")
    model = onnx.load(bundle.path("encoder.onnx"), load_external_data=False)
    next(entry for entry in model.opset_import if not entry.domain).version = 9999
    onnx.save(model, tmp_path / "encoder.onnx")
    (tmp_path / "encoder.onnx.data").write_bytes(bundle.path("encoder.onnx.data").read_bytes())
    engine = OnnxRuntimeEngine.open(Bundle(tmp_path, bundle.manifest))
    with pytest.raises(BundleError, match="export again"):
        engine.project(np.zeros((1, 1, 1, 64), np.float32))
    with pytest.raises(BundleError, match="export again"):
        engine.encode(*grid(1, 1, 1))


def test_a_missing_library_is_named(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TargetUnavailable, match=r"pip install 'penguin-edge\[onnx\]'"):
        OnnxRuntimeEngine.open(bundles["fp32"])


def test_threads_must_be_positive(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(InputError, match="0 threads"):
        OnnxRuntimeEngine.open(bundles["fp32"], threads=0)


def test_layers_of_one_form_become_one_product() -> None:
    """Whatever lies between them, and each keeps its own output."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    four, eight = Scheme(4, 32), Scheme(8)

    def layer(seed: int, rows: int, scheme: Scheme | None, bias: bool = False) -> torch.nn.Module:
        linear = torch.nn.Linear(64, rows, bias=bias)
        torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(seed))
        if scheme is None:
            return linear
        return QuantizedLinear(quantize_weight(linear.weight, scheme), linear.bias, "block")

    for schemes, products in (
        ((four, four, four), 1), ((four, eight, four), 2), ((four, None, four), 2), ((None, None, None), 3),
    ):  # fmt: skip
        layers = [layer(i, 8 * (i + 1), scheme) for i, scheme in enumerate(schemes)]
        joined = Joined(layers, lambda one: one)
        assert len(joined.products) == products
        with torch.no_grad():
            for got, one in zip(joined(x), layers, strict=True):
                torch.testing.assert_close(got, one(x), rtol=1e-6, atol=1e-6)
    assert len(Joined([layer(0, 8, four), layer(1, 8, four, bias=True)], lambda one: one).products) == 2


def test_a_whole_cache_in_one_call_has_no_gaps(engine: OnnxRuntimeEngine) -> None:
    """The one call whose positions the attention takes from the first one alone."""
    embeds, none = np.zeros((MAX_SEQ_LEN, TINY.text.hidden_size), np.float32), np.zeros(0, np.int64)
    places = np.arange(MAX_SEQ_LEN) + (np.arange(MAX_SEQ_LEN) > 5)
    with engine.new_cache() as cache:
        with pytest.raises(InputError, match="append them in two calls"):
            engine.forward(cache, embeds, none, positions=places)
        assert cache.length == 0
        engine.forward(cache, embeds, none)
        cache.truncate(0)
        for rows in (slice(0, MAX_SEQ_LEN - 1), slice(MAX_SEQ_LEN - 1, MAX_SEQ_LEN)):
            engine.forward(cache, embeds[rows], none, positions=places[rows])
        assert cache.length == MAX_SEQ_LEN and cache.following == MAX_SEQ_LEN + 1
