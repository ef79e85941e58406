"""The ONNX Runtime target: stock `torch.onnx.export`, contrib GroupQueryAttention over shared KV buffers.

| graph     | inputs                                                  | outputs                                 |
|-----------|---------------------------------------------------------|-----------------------------------------|
| encoder   | pixels [B,P,588] f32, rows [P] i64, cols [P] i64        | features [B,P,C] f32                    |
| projector | features [B,T,M,C] f32                                  | visual [B,T,H] f32                      |
| decoder,  | embeds [1,S,H] f32, start [1] i64, logit_index [K] i64, | logits [1,K,V] f32,                     |
| prefill   | positions [S] i64,                                      |                                         |
|           | past_key_i, past_value_i [1,kv,max_seq_len,D] f32, or   | present_key_i, present_value_i, as past |
|           | f16 or i8 if the recipe's `kv` says so                  |                                         |

The caller binds one buffer as `past_key_i` and `present_key_i`, and one for the values: the kernel then writes the new
positions in place. A graph is `PART.onnx`, its weights `PART.onnx.data`.

A quantized layer is a MatMulNBits node with the layer's own integers: accuracy level 4, which rounds the activations to
int8 in blocks as large as the weights' groups (128 where a scale is a whole row's; it is then repeated). A scheme with
`activations: "token"` is a MatMulIntegerToFloat instead, two to three times as fast where rows are many. Its kernel
knows one scale for all activations (DynamicQuantizeMatMul takes it from the whole tensor, which costs as much quality
as 4 bits); here every row is divided by its own largest value first and multiplied by it afterwards, so that each row
has its scale, and comes out the same whatever rows are beside it. One with `activations: "static"` is a MatMul of two
DequantizeLinear, one of the int8 weight and one behind a QuantizeLinear with a constant scale: plain ONNX, in the
explicit form that TensorRT wants. ONNX Runtime makes a MatMulIntegerToFloat of it at load.

fp16 is a matter of storage: linear weights are fp16 in the file, and each has a Cast to fp32 in the graph that ONNX
Runtime folds at load. Its CPU kernels compute in fp32 anyway: an all-fp16 graph runs no faster, takes as much memory,
and rounds the activations on top.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from penguin_edge.bundle.contract import (
    KV_SCALES,
    Bounds,
    TensorSpec,
    compiled_bounds,
    kv_names,
    most_positions,
    signature,
)
from penguin_edge.bundle.manifest import TablePlace
from penguin_edge.config import PenguinConfig
from penguin_edge.errors import InputError, PenguinError
from penguin_edge.export.methods import ProjectorMethod
from penguin_edge.export.stages import TRACE, WRITE
from penguin_edge.export.targets.base import PartFile, require_modules, silent
from penguin_edge.export.targets.onnx.blocks import FusedDecoder, FusedEncoder
from penguin_edge.export.targets.onnx.nodes import translations
from penguin_edge.export.targets.onnx.products import NODES, BlockProduct, prepare
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.quantize.linear import Activations, Scheme

OPSET = 23
"""The first with RMSNormalization; older ones give twice the nodes."""
HEAD_STEP = 16
"""GroupQueryAttention takes a head_dim that is a multiple of this, since it also applies the rotary step."""
MAX_MERGED = 4
"""Largest M: two by two patches for one visual token."""
TRACED = {"B": 2, "P": 24, "T": 6, "M": 4, "S": 5, "K": 3}
"""Sizes to trace with; none is 0 or 1, which the tracer would take for constants."""
KV_DTYPES = {"fp16": torch.float16, "int8": torch.int8}
VERSIONS = "export with the versions of torch, onnx and onnxscript that pyproject.toml names"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's notes (torchvision is absent, pytree deprecations) off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def examples(specs: Sequence[TensorSpec], bounds: Bounds) -> tuple[list[Any], list[Any]]:
    """Inputs to trace with, and which of their dimensions vary up to which bound."""
    limits = {"B": bounds.max_batch, "P": bounds.max_patches, "T": bounds.max_patches, "M": MAX_MERGED}
    limits |= {"S": bounds.max_chunk, "K": bounds.max_logits}
    dims = {name: Dim(name, min=0 if name == "K" else 1, max=limit) for name, limit in limits.items()}
    dtypes = {"f32": torch.float32, "i64": torch.int64}
    inputs = [
        torch.zeros([TRACED[d] if isinstance(d, str) else d for d in spec.shape], dtype=dtypes[spec.dtype])
        for spec in specs
    ]
    return inputs, [{i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs]


def head_place(method: nn.Module, path: Path) -> TablePlace | None:
    """Where the weights of a graph's 4-bit head lie."""
    import onnx

    head = getattr(getattr(method, "decoder", None), "lm_head", None)
    if not isinstance(head, BlockProduct) or head.bits != 4 or head.zeros is not None:
        return None
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        name = tensor.name.removeprefix("decoder.lm_head.")
        if name in ("packed", "scales") and name != tensor.name:
            found[name] = {entry.key: entry.value for entry in tensor.external_data}
    if len(found) != 2 or not all(found.values()):
        return None
    levels, scales = (int(found[name].get("offset", 0)) for name in ("packed", "scales"))
    return TablePlace(found["packed"]["location"], levels, scales, head.block)


class OnnxTarget:
    """Encoder, projector and decoder as ONNX graphs; see the top of this file."""

    name = "onnx"
    precisions: tuple[str, ...] = ("fp32", "fp16")
    tools: tuple[str, ...] = ("torch", "onnx", "onnxscript", "onnxruntime")
    shares_kv = True
    activations: Activations = "block"
    shares_table = True
    compiles = False
    kv_dtypes: tuple[str, ...] = ("fp16", "int8")

    def bounds(self, max_seq_len: int) -> Bounds:
        """Bounds from which ONNX Runtime plans nothing; they limit the time and memory of one call."""
        bounds = compiled_bounds(self.name, max_seq_len)
        assert bounds is not None
        return bounds

    def kv_dtype(self, precision: str) -> str:
        """fp32 for all precisions: nothing is rounded that a recipe does not name."""
        return "fp32"

    def check_model(self, config: PenguinConfig) -> None:
        """GroupQueryAttention takes heads of a multiple of 16.

        Raises:
            InputError: another head_dim in the decoder.
        """
        if config.text.head_dim % HEAD_STEP:
            raise InputError(
                f"the decoder's head_dim is {config.text.head_dim}, but GroupQueryAttention of ONNX Runtime takes "
                f"multiples of {HEAD_STEP}"
            )

    def check_scheme(self, layer: str, scheme: Scheme, precision: str) -> None:
        """MatMulNBits takes blocks of 16 to 256, MatMulIntegerToFloat symmetric 8-bit rows.

        Raises:
            InputError: a larger group, or activations per row with other weights than those.
        """
        if scheme.activations == "token" and (scheme.bits, scheme.group, scheme.symmetric) != (8, None, True):
            raise InputError(
                f"{layer}: {scheme.label}, but ONNX Runtime takes activations per token only with 8-bit symmetric "
                "weights and one scale per row"
            )
        if (scheme.group or 0) > 256:
            raise InputError(f"{layer}: {scheme.label}, but MatMulNBits of ONNX Runtime takes groups of 16 to 256")

    def layer_bytes(self, shape: tuple[int, int], scheme: Scheme | None) -> int:
        """Scales in fp32: one per row for activations per token; elsewhere one per block, and a zero where it is not
        the middle. A row's scale stands in all of its blocks."""
        outputs, inputs = shape
        if scheme is None:
            return 4 * outputs * inputs
        packed = outputs * inputs * scheme.bits // 8
        if scheme.activations == "token":
            return packed + 4 * outputs
        block = scheme.group or next(size for size in (128, 64, 32, 16) if inputs % size == 0)
        blocks = inputs // block
        return packed + outputs * (4 * blocks + (0 if scheme.symmetric else (blocks * scheme.bits + 7) // 8))

    def graph_bytes(self, config: PenguinConfig, max_seq_len: int) -> int:
        """Nodes of every block, and the decoder's rotary tables."""
        blocks = config.text.num_hidden_layers + (config.vision.num_hidden_layers if config.vision else 0)
        positions = most_positions(config, self.bounds(max_seq_len))
        return 20_000 * blocks + 4 * positions * config.text.head_dim

    def peak_factor(self, precision: str, quantized: bool) -> float:
        return 1.5 if quantized else {"fp32": 2.5, "fp16": 1.5}[precision]

    def check_installed(self) -> None:
        require_modules("exporting to ONNX", "onnx", "onnxscript", "onnxruntime")

    def export_part(
        self, part: str, model: PenguinModel, bounds: Bounds, folder: Path, note: Callable[[str], None] = silent
    ) -> PartFile:
        """Compile `part` into `folder`. The model's layers are rebuilt in place: it cannot be used afterwards.

        Raises:
            PenguinError: the exporter failed, or the graph lacks the operators that make it fast.
        """
        self.check_installed()
        specs, results = signature(part, model.config, bounds)
        inputs, shapes = examples(specs, bounds)
        names, output_names = [spec.name for spec in specs], [spec.name for spec in results]
        method: nn.Module
        if part == "encoder":
            assert model.encoder is not None, "this model was loaded without its encoder"
            method = FusedEncoder(model.encoder)
            layers = len(model.encoder.layers)
            wanted = {"MultiHeadAttention": layers, "SkipSimplifiedLayerNormalization": 2 * layers}
        elif part == "projector":
            assert model.projector is not None, "this model was loaded without its projector"
            method, wanted = ProjectorMethod(model.projector), {}
        else:
            assert model.decoder is not None, "this model was loaded without its decoder"
            method = FusedDecoder(model.decoder, bounds.max_seq_len, most_positions(model.config, bounds))
            text = model.config.text
            layers = text.num_hidden_layers
            wanted = {"GroupQueryAttention": layers, "SkipSimplifiedLayerNormalization": 2 * layers}
            # Traced without being read, so that no memory ever stands behind them.
            shape = (1, text.num_key_value_heads, bounds.max_seq_len, text.head_dim)
            form = model.decoder.kv_form
            if form is not None and form.scales is not None:
                # The graph's own constants, for a runtime that moves positions.
                form.scales.float().numpy().astype("<f4").tofile(folder / KV_SCALES)
            dtype = KV_DTYPES[form.dtype] if form else torch.float32
            past = [torch.empty(shape, dtype=dtype) for _ in range(2 * text.num_hidden_layers)]
            inputs.append(past)
            shapes.append([{} for _ in past])
            for kv in map(kv_names, range(text.num_hidden_layers)):
                names += kv["past_key"], kv["past_value"]
                output_names += kv["present_key"], kv["present_value"]
        note(TRACE)
        prepare(method)
        quantized = Counter(node for child in method.modules() for node in NODES.get(type(child), ()))
        if quantized["DequantizeLinear"]:
            # Others have QuantizeLinear nodes, too.
            del quantized["QuantizeLinear"]
        try:
            with quiet():
                program = torch.onnx.export(
                    method,
                    tuple(inputs),
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=names,
                    output_names=output_names,
                    dynamic_shapes=tuple(shapes),
                    custom_translation_table=translations(),
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            raise PenguinError(f"{part}: torch.onnx.export failed ({error}); {VERSIONS}") from error
        assert program is not None
        found: Counter[str] = Counter()
        for node in program.model.graph:
            found[node.op_type] += 1
            node.metadata_props.clear()  # Stack traces, with the paths of the machine that exported.
        for op, count in {**wanted, **quantized}.items():
            if found[op] != count:
                raise PenguinError(f"{part}: the graph has {found[op]} {op} nodes, wanted {count}; {VERSIONS}")
        note(WRITE)
        program.save(folder / f"{part}.onnx", external_data=True)
        return PartFile(f"{part}.onnx", head_place(method, folder / f"{part}.onnx"))
