"""Real exports of the tiny preset to ExecuTorch, held against eager PyTorch through the engine."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Alone, picture, tiny_tokenizer
from numpy.testing import assert_array_equal

pytest.importorskip("executorch", reason="executorch is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")

from penguin_edge.bundle.contract import EMBEDDING, signature  # noqa: E402
from penguin_edge.bundle.folder import Bundle, finish  # noqa: E402
from penguin_edge.bundle.manifest import GraphEntry, Manifest  # noqa: E402
from penguin_edge.config import PRESETS, PenguinConfig  # noqa: E402
from penguin_edge.errors import BudgetError, BundleError, InputError, PenguinError, TargetUnavailable  # noqa: E402
from penguin_edge.export.targets.executorch import programs as export  # noqa: E402
from penguin_edge.model.decoder import KVCache  # noqa: E402
from penguin_edge.model.eager import EagerEngine  # noqa: E402
from penguin_edge.model.penguin import PenguinModel  # noqa: E402
from penguin_edge.runtime.core.sampling import SamplingOptions  # noqa: E402
from penguin_edge.runtime.engines.executorch import ExecutorchEngine  # noqa: E402
from penguin_edge.runtime.stream import Stream  # noqa: E402
from penguin_edge.schema import SchemaError  # noqa: E402

TINY = PRESETS["tiny"]
ONE_LAYER = replace(
    TINY, vision=replace(TINY.vision, num_hidden_layers=1), text=replace(TINY.text, num_hidden_layers=1)
)
MAX_SEQ_LEN = 160
FP32_TOLERANCE = 1e-4
FP16_TOLERANCE = 5e-3
"""Relative: fp16 has 11 bits (5e-4), and the sums of a layer are rounded in another order than eager's."""


def tiny(config: PenguinConfig, dtype: torch.dtype) -> PenguinModel:
    """The preset with weights from a seed, large enough that every layer matters."""
    model = PenguinModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.08 * noise)
    return model.to(dtype)


def export_bundle(folder: Path, config: PenguinConfig, precision: str) -> Bundle:
    folder.mkdir()
    target = export.ExecutorchTarget()
    bounds = target.bounds(MAX_SEQ_LEN)
    graphs = {}
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    for part in ("encoder", "projector", "decoder"):
        model = tiny(config, dtype)
        inputs, outputs = signature(part, config, bounds)
        file = target.export_part(part, model, bounds, folder).file
        graphs[part] = GraphEntry(file, precision, tuple(inputs), tuple(outputs))
    model = tiny(config, torch.float32)
    assert model.embedding is not None
    model.embedding.weight.detach().numpy().tofile(folder / EMBEDDING)
    manifest = Manifest(
        config, {}, "executorch", precision, bounds, graphs, "fp32", target.kv_dtype(precision), {}, {"executorch": "x"}
    )
    return finish(folder, manifest)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(tmp_path_factory.mktemp("executorch") / "fp32", TINY, "fp32")


@pytest.fixture(scope="session")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(tmp_path_factory.mktemp("executorch") / "fp16", ONE_LAYER, "fp16")


@pytest.fixture(scope="session")
def model() -> PenguinModel:
    return tiny(TINY, torch.float32)


@pytest.fixture(scope="module")
def loaded(bundle: Bundle) -> ExecutorchEngine:
    return ExecutorchEngine.open(bundle)


@pytest.fixture
def engine(loaded: ExecutorchEngine) -> Iterator[Alone]:
    """With an empty cache; what earlier tests left in the program must not be read."""
    one = Alone(loaded)
    yield one
    one.cache.close()


def error(got: np.ndarray, wanted: torch.Tensor) -> float:
    assert got.dtype == np.float32
    assert got.shape == tuple(wanted.shape)
    return float(np.linalg.norm(got - wanted.float().numpy()) / np.linalg.norm(wanted.float().numpy()))


def embeds(count: int, seed: int, config: PenguinConfig = TINY) -> np.ndarray:
    # Values that fp16 holds exactly, so that both sides read the same input.
    values = np.random.default_rng(seed).standard_normal((count, config.text.hidden_size))
    return values.astype(np.float16).astype(np.float32)


def eager_logits(model: PenguinModel) -> Callable[[np.ndarray], torch.Tensor]:
    """Logits [S, V] at every position of a sequence, without any cache."""

    def logits(sequence: np.ndarray) -> torch.Tensor:
        assert model.decoder is not None
        x = torch.from_numpy(sequence)[None].to(model.dtype)
        hidden = model.decoder(x, torch.arange(len(sequence)))
        return model.decoder.logits(hidden, torch.arange(len(sequence)))[0].float()

    return logits


class Fed:
    """Feeds an engine and remembers what the cache must hold."""

    def __init__(self, engine: Alone, model: PenguinModel, tolerance: float) -> None:
        self.engine, self.logits, self.tolerance = engine, eager_logits(model), tolerance
        self.sequence = np.zeros((0, engine.config.text.hidden_size), np.float32)
        self.seed = 0

    def feed(self, count: int) -> None:
        self.seed += 1
        chunk = embeds(count, self.seed)
        index = np.unique(np.array([0, count // 2, count - 1]))
        got = self.engine.forward(chunk, index)
        self.sequence = np.concatenate((self.sequence, chunk))
        wanted = self.logits(self.sequence)[len(self.sequence) - count :][torch.from_numpy(index)]
        assert error(got, wanted) <= self.tolerance
        assert self.engine.length == len(self.sequence)

    def truncate(self, length: int) -> None:
        self.engine.truncate(length)
        self.sequence = self.sequence[:length]


def test_prefill_decode_truncate(engine: Alone, model: PenguinModel) -> None:
    stream = Fed(engine, model, FP32_TOLERANCE)
    stream.feed(12)
    for _ in range(8):
        stream.feed(1)
    stream.truncate(5)
    stream.feed(4)
    stream.feed(1)


def test_uneven_chunks(engine: Alone, model: PenguinModel) -> None:
    stream = Fed(engine, model, FP32_TOLERANCE)
    for count in (7, 1, 12, 13):
        stream.feed(count)


def test_first_token_alone(engine: Alone, model: PenguinModel) -> None:
    stream = Fed(engine, model, FP32_TOLERANCE)
    stream.feed(1)
    stream.feed(1)


def test_full_capacity_and_one_more(engine: Alone, model: PenguinModel) -> None:
    stream = Fed(engine, model, FP32_TOLERANCE)
    for count in (128, 31, 1):
        stream.feed(count)
    with pytest.raises(BudgetError, match="max_seq_len = 160"):
        engine.forward(embeds(1, 9), np.array([-1]))
    assert engine.length == MAX_SEQ_LEN
    stream.truncate(159)
    stream.feed(1)


def test_logit_index(engine: Alone, model: PenguinModel) -> None:
    chunk = embeds(6, 3)
    wanted = eager_logits(model)(chunk)
    for index in ([], [-1], [2, 0, 5], [1] * 8):
        engine.truncate(0)
        got = engine.forward(chunk, np.array(index, dtype=np.int64))
        assert got.shape == (len(index), TINY.text.vocab_size)
        if index:
            assert error(got, wanted[index]) <= FP32_TOLERANCE
    with pytest.raises(InputError, match="at most 8"):
        engine.forward(chunk, np.zeros(9, np.int64))


def test_reopened_engine_equals_used_one(engine: Alone, bundle: Bundle) -> None:
    """Same numbers, and a state of its own."""
    engine.forward(embeds(100, 1), np.array([-1]))
    engine.truncate(0)
    fresh = Alone(ExecutorchEngine.open(bundle))
    for count, seed in ((9, 2), (1, 3)):
        index = np.array([-1])
        assert_array_equal(engine.forward(embeds(count, seed), index), fresh.forward(embeds(count, seed), index))
    other = fresh.forward(embeds(1, 5), index)
    fresh.truncate(10)
    engine.forward(embeds(1, 4), index)
    assert_array_equal(fresh.forward(embeds(1, 5), index), other)


@pytest.mark.parametrize("patches", [1, 2, 24, 255, 256, 640])
def test_encoder(engine: Alone, model: PenguinModel, patches: int) -> None:
    """Up to the bound, 4 * max_seq_len."""
    pixels = np.random.default_rng(patches).standard_normal((1, patches, 588)).astype(np.float32)
    rows, cols = np.arange(patches) // 16, np.arange(patches) % 16
    wanted = model.encode(*(torch.from_numpy(x) for x in (pixels, rows, cols)))
    assert error(engine.encode(pixels, rows, cols), wanted) <= FP32_TOLERANCE


def test_encoder_bounds(engine: ExecutorchEngine) -> None:
    for shape in ((1, 641, 588), (2, 4, 588)):
        with pytest.raises(InputError, match="wanted at most 1 of 640"):
            engine.encode(np.zeros(shape, np.float32), np.zeros(shape[1], np.int64), np.zeros(shape[1], np.int64))


BOUNDS: dict[str, dict[str, Any]] = {
    "a longer cache": {"max_seq_len": 320},
    "a shorter cache": {"max_seq_len": 96},
    "larger chunks": {"max_chunk": 129},
    "smaller chunks": {"max_chunk": 64},
    "more logits": {"max_logits": 9},
    "several frames": {"max_batch": 2},
    "larger pictures": {"patch_buckets": (641,)},
    "smaller pictures": {"patch_buckets": (48,)},
}


@pytest.mark.parametrize("case", BOUNDS)
def test_bounds_other_than_the_programs_are_refused_when_it_is_loaded(bundle: Bundle, case: str) -> None:
    """Also those that the manifest's own check knows nothing of, as the engine is given a bundle without one here."""
    manifest = bundle.manifest
    with pytest.raises(BundleError, match=r"is at most .*, the manifest states .*; copy the bundle again"):
        changed = ExecutorchEngine.open(
            Bundle(bundle.folder, replace(manifest, bounds=replace(manifest.bounds, **BOUNDS[case])))
        )
        count = changed.bounds.max_patches
        changed.encode(np.zeros((1, count, 588), np.float32), np.zeros(count, np.int64), np.zeros(count, np.int64))


def test_a_manifest_with_other_bounds_than_an_export_writes_is_refused(bundle: Bundle) -> None:
    """Every one, whether or not a program would tell; the same bundle without a change is none of them."""
    bundle.manifest._check_bounds()
    for change in BOUNDS.values():
        with pytest.raises(SchemaError, match=r"bounds has .* and an export for executorch .* writes"):
            replace(bundle.manifest, bounds=replace(bundle.manifest.bounds, **change))._check_bounds()


@pytest.mark.parametrize(("tokens", "merge"), [(1, 1), (1, 2), (7, 1), (160, 2), (640, 1)])
def test_projector(engine: Alone, model: PenguinModel, tokens: int, merge: int) -> None:
    features = np.random.default_rng(tokens).standard_normal((1, tokens * merge**2, 64)).astype(np.float32)
    wanted = model.project(torch.from_numpy(features), merge)
    got = engine.project(features.reshape(1, tokens, merge**2, 64))
    assert error(got, wanted) <= FP32_TOLERANCE


MOVES = {
    "a gap": [(100, 130, 20)],
    "overlap": [(5, 125, 2)],
    "chunks of a move": [(1, 160, 0)],
    "from a full cache": [(40, 160, 10), (100, 130, 90)],
    "the last alone": [(159, 160, 0)],
    "to its own place": [(0, 160, 0)],
    "what was written anew above": [(60, 90, 30), (70, 110, 60), (61, 99, 1)],
}
"""Calls of `move`, one after another, in a cache of 160 that is full."""


def check_moves(engine: Alone, eager: Alone, tolerance: float) -> None:
    """Each list of `MOVES`, and tokens behind it: logits, and all that the cache holds, are the eager engine's."""
    assert engine.can_move
    config = engine.config
    for seed, (name, moves) in enumerate(MOVES.items()):
        found = []
        for one in (engine, eager):
            one.truncate(0)
            filling = embeds(MAX_SEQ_LEN, seed, config)
            for begin in range(0, MAX_SEQ_LEN, 80):
                one.forward(filling[begin : begin + 80], np.empty(0, np.int64))
            logits = []
            for index, (begin, end, to) in enumerate(moves):
                one.move(begin, end, to)
                assert one.length == to + end - begin
                one.truncate(min(one.length, MAX_SEQ_LEN - 3))
                logits.append(one.forward(embeds(3, 10 + index, config), np.array([0, 2])))
            found.append(np.concatenate(logits))
        assert error(found[0], torch.from_numpy(found[1])) <= tolerance, name
        for layer in range(config.text.num_hidden_layers):
            for what, wanted in (("keys", eager.state.keys[layer]), ("values", eager.state.values[layer])):
                held = engine._method("decoder").get_attribute(f"{what}_{layer}")
                assert float((held - wanted[0]).norm() / wanted.float().norm()) <= tolerance, name


def test_positions_move_as_eager_moves_them(engine: Alone, model: PenguinModel) -> None:
    check_moves(engine, Alone(EagerEngine(model, max_seq_len=MAX_SEQ_LEN)), FP32_TOLERANCE)
    for begin, end, to in ((10, 10, 5), (10, 20, 15), (10, MAX_SEQ_LEN + 1, 0)):
        with pytest.raises(InputError, match="wanted 0 <= to <= begin < end <= 160"):
            engine.move(begin, end, to)


def test_positions_move_in_fp16(half_bundle: Bundle) -> None:
    """Both turn in fp32 and round the result: what differs is what went into the cache."""
    eager = Alone(EagerEngine(tiny(ONE_LAYER, torch.float16), max_seq_len=MAX_SEQ_LEN))
    check_moves(Alone(ExecutorchEngine.open(half_bundle)), eager, FP16_TOLERANCE)


def test_a_move_is_exact(engine: Alone) -> None:
    """The same token at another place: its key in the first layer is that of a token computed there."""
    x, keys = embeds(40, 0), []
    for before in (0, 120):
        engine.truncate(0)
        for count in (before, 40):
            if count:
                engine.forward(x if count == 40 else embeds(count, 1), np.empty(0, np.int64))
        for begin in range(before, 0, -10):  # in steps, each of which rounds
            engine.move(begin, begin + 40, begin - 10)
        assert engine.length == 40
        keys.append(engine._method("decoder").get_attribute("keys_0")[:, :40].clone())
    assert float((keys[0] - keys[1]).abs().max() / keys[0].abs().max()) <= 1e-5


def test_a_program_that_does_not_name_its_buffers_cannot_move(
    half_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier exports left it: it runs, and moves are refused."""
    import executorch.exir

    config = executorch.exir.ExecutorchBackendConfig
    nameless = {"emit_mutable_buffer_names": False}
    monkeypatch.setattr(executorch.exir, "ExecutorchBackendConfig", lambda **fields: config(**fields | nameless))
    for file in half_bundle.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    bounds = half_bundle.manifest.bounds
    export.ExecutorchTarget().export_part("decoder", tiny(ONE_LAYER, torch.float16), bounds, tmp_path)
    engine = Alone(ExecutorchEngine.open(Bundle(tmp_path, half_bundle.manifest)))
    assert not engine.can_move
    Fed(engine, tiny(ONE_LAYER, torch.float16), FP16_TOLERANCE).feed(12)
    with pytest.raises(InputError, match="does not name its KV buffers; recompute, or export it again"):
        engine.move(5, 12, 0)
    with pytest.raises(InputError, match="executorch cannot move positions"):
        Stream(engine.engine, tiny_tokenizer(), cache="rebase")
    assert engine.length == 12
    # The names are all that it costs, within the padding between segments.
    sizes = [folder.joinpath("decoder.pte").stat().st_size for folder in (tmp_path, half_bundle.folder)]
    assert 0 <= sizes[1] - sizes[0] <= 100 * 2 * ONE_LAYER.text.num_hidden_layers


def test_a_stream_moves_its_cache(loaded: ExecutorchEngine, model: PenguinModel) -> None:
    runs = []
    for one in (loaded, EagerEngine(model, max_seq_len=MAX_SEQ_LEN)):
        options = {"budget": 24, "window_s": 3.0, "question_tokens": 12, "answer_tokens": 8}
        run = Stream(one, tiny_tokenizer(), cache="rebase", **options)  # type: ignore[arg-type]
        for i in range(9):
            run.push(picture(i, 56, 84), float(i))
        asked = [token.id for token in run.ask("What?", options=SamplingOptions(max_new_tokens=6))]
        keys = run.prompt_keys()
        run.cache.truncate(len(keys) - 1)
        runs.append((run, asked, one.forward(run.cache, run.features.embeds(keys[-1:]), np.array([-1]))))
        run.close()
    (run, asked, logits), (wanted, answer, reference) = runs
    assert run.stats == wanted.stats and run.stats.moved_tokens > 0 and run.prompt_keys() == wanted.prompt_keys()
    assert asked == answer and error(logits, torch.from_numpy(reference)) <= FP32_TOLERANCE


def test_fp16(half_bundle: Bundle) -> None:
    """Against eager fp16, every stage."""
    engine, model = Alone(ExecutorchEngine.open(half_bundle)), tiny(ONE_LAYER, torch.float16)
    stream = Fed(engine, model, FP16_TOLERANCE)
    for count in (12, 1, 1):
        stream.feed(count)
    stream.truncate(5)
    stream.feed(4)
    pixels = np.random.default_rng(0).standard_normal((1, 40, 588)).astype(np.float16).astype(np.float32)
    rows, cols = np.arange(40) // 8, np.arange(40) % 8
    wanted = model.encode(torch.from_numpy(pixels).half(), torch.from_numpy(rows), torch.from_numpy(cols))
    features = engine.encode(pixels, rows, cols)
    assert error(features, wanted) <= FP16_TOLERANCE
    wanted = model.project(wanted, 2)
    assert error(engine.project(features.reshape(1, 10, 4, 64)), wanted) <= FP16_TOLERANCE


def test_fp16_survives_large_residuals(half_bundle: Bundle) -> None:
    """Squares of 3,000 leave fp16's range; the norms must not."""
    engine, model = Alone(ExecutorchEngine.open(half_bundle)), tiny(ONE_LAYER, torch.float32)
    chunk = embeds(3, 1) * 3000
    wanted = eager_logits(model)(chunk)[-1:]
    assert error(engine.forward(chunk, np.array([-1])), wanted) <= FP16_TOLERANCE


def test_weights_are_stored_once_and_caches_not_at_all(bundle: Bundle, half_bundle: Bundle) -> None:
    for opened, config, size in ((bundle, TINY, 4), (half_bundle, ONE_LAYER, 2)):
        for part in ("encoder", "projector", "decoder"):
            weights = size * sum(p.numel() for p in getattr(PenguinModel(config), part).parameters())
            stored = opened.path(f"{part}.pte").stat().st_size
            assert weights <= stored <= weights + 120_000


def test_only_stock_operators(bundle: Bundle) -> None:
    """`llama::` operators need libtorch at run time."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    for part in ("encoder", "projector", "decoder"):
        program = deserialize_pte_binary(bundle.path(f"{part}.pte").read_bytes()).program
        names = {op.name for plan in program.execution_plan for op in plan.operators}
        assert not names & {"aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::_softmax"}
        assert all(name.startswith(("aten::", "executorch_prim::")) for name in names)
        assert all(plan.delegates for plan in program.execution_plan)


class OutsideProduct(torch.nn.Module):
    """An integer product, which XNNPACK does not take."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, x)


def test_product_outside_the_delegate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PenguinError, match="left 1 outside"):
        example = (torch.ones(4, 4, dtype=torch.int64),)
        export.compile_method("decoder", OutsideProduct(), example, ({},), tmp_path / "x.pte")
    assert not (tmp_path / "x.pte").exists()


def test_log_states_what_is_outside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=export.__name__):
        export.ExecutorchTarget().export_part(
            "projector", tiny(TINY, torch.float32), export.ExecutorchTarget().bounds(MAX_SEQ_LEN), tmp_path
        )
    assert "projector: 1 XNNPACK subgraphs; outside them: {'mean': 1}" in caplog.text


def test_damaged_program(bundle: Bundle, tmp_path: Path) -> None:
    for file in bundle.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "decoder.pte").write_bytes(bytes(4096))
    with pytest.raises(BundleError, match="export again"):
        ExecutorchEngine.open(Bundle(tmp_path, bundle.manifest))


def test_refusals(bundle: Bundle, loaded: ExecutorchEngine, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="made for target 'onnx'"):
        ExecutorchEngine.open(Bundle(bundle.folder, replace(bundle.manifest, target="onnx")))
    with pytest.raises(InputError, match="0 threads, wanted 1 to"):
        ExecutorchEngine.open(bundle, threads=0)
    with pytest.raises(InputError, match="share one pool; pass the same number"):
        ExecutorchEngine.open(bundle, threads=61)
    with pytest.raises(InputError, match="at least 32"):
        export.ExecutorchTarget().bounds(8)
    with pytest.raises(InputError, match="part 'embedding'"):
        export.ExecutorchTarget().export_part(
            "embedding", PenguinModel(TINY, ("projector",)), export.ExecutorchTarget().bounds(64), tmp_path
        )


def test_eager_cache_agrees(engine: Alone, model: PenguinModel) -> None:
    """The engine's cache and the model's own, token by token."""
    assert model.decoder is not None
    cache = KVCache(TINY.text, MAX_SEQ_LEN, torch.float32, torch.device("cpu"))
    for seed in range(3):
        x = embeds(2, seed)
        hidden = model.decoder(torch.from_numpy(x)[None], cache.length + torch.arange(2), cache.attend)
        wanted = model.decoder.logits(hidden, torch.tensor([-1]))[0]
        cache.length += 2
        assert error(engine.forward(x, np.array([-1])), wanted) <= FP32_TOLERANCE


def test_opening_imports_no_compiler_and_writes_nothing(nano_bundle: Callable[[str, str], Path]) -> None:
    """In a process of its own: what the binding's libraries print at import stays off the user's terminal."""
    code = f"""
import sys
import numpy as np
from penguin_edge.bundle.folder import Bundle
from penguin_edge.runtime.engines.executorch import ExecutorchEngine
engine = ExecutorchEngine.open(Bundle.read({str(nano_bundle("executorch", "fp32"))!r}), threads=1)
engine.forward(engine.new_cache(), engine.embed(np.array([1, 2])), np.array([-1]))
assert "executorch.exir" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


def test_missing_library(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings", None)
    with pytest.raises(
        TargetUnavailable, match=r"pip install torch==2.13.0 && pip install 'penguin-edge\[executorch\]'"
    ):
        ExecutorchEngine.open(bundle)
