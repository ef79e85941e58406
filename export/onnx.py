"""The ONNX Runtime target: stock `torch.onnx.export`, contrib GroupQueryAttention over shared KV buffers.

| graph     | inputs                                                  | outputs                                 |
|-----------|---------------------------------------------------------|-----------------------------------------|
| encoder   | pixels [B,P,588] f32, rows [P] i64, cols [P] i64        | features [B,P,C] f32                    |
| projector | features [B,T,M,C] f32                                  | visual [B,T,H] f32                      |
| decoder,  | embeds [1,S,H] f32, start [1] i64, logit_index [K] i64, | logits [1,K,V] f32,                     |
| prefill   | past_key_i, past_value_i [1,kv,max_seq_len,D] f32, or   | present_key_i, present_value_i, as past |
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

import importlib.util
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from penguin_edge.bundle import KV_SCALES, Bounds, TablePlace, TensorSpec, kv_names, signature
from penguin_edge.config import PenguinConfig
from penguin_edge.errors import InputError, PenguinError, TargetUnavailable
from penguin_edge.export.methods import ProjectorMethod
from penguin_edge.export.onnx_blocks import DecoderMethod, EncoderMethod, join
from penguin_edge.export.onnx_static import StaticProduct, translate_static
from penguin_edge.export.stages import TRACE, WRITE
from penguin_edge.export.target import PartFile, silent
from penguin_edge.model import PenguinModel
from penguin_edge.quantize.linear import SMALLEST, Activations, QuantizedLinear, Scheme

OPSET = 23
"""The first with RMSNormalization; older ones give twice the nodes."""
ACCURACY = 4
"""MatMulNBits with activations in int8: about twice as fast in decoding as with fp32 ones."""
HEAD_STEP = 16
"""GroupQueryAttention takes a head_dim that is a multiple of this, since it also applies the rotary step."""
MAX_MERGED = 4
"""Largest M: two by two patches for one visual token."""
TRACED = {"B": 2, "P": 24, "T": 6, "M": 4, "S": 5, "K": 3}
"""Sizes to trace with; none is 0 or 1, which the tracer would take for constants."""
KV_DTYPES = {"fp16": torch.float16, "int8": torch.int8}
VERSIONS = "export with the versions of torch, onnx and onnxscript that pyproject.toml names"


@torch.library.custom_op("penguin_edge::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, inputs: int, outputs: int, bits: int, block: int
) -> Tensor:
    """What com.microsoft MatMulNBits computes; for tracing only, `QuantizedLinear` says the arithmetic.

    Args:
        x: [.., K] f32; packed: [N, K/block, block*bits/8] uint8, low bits first; scales: [N, K/block] f32.
        zeros: [N, bytes of K/block values] uint8, or None for the middle level.
    """
    raise NotImplementedError("traced, never run")


@matmul_nbits.register_fake
def _(x, packed, scales, zeros, inputs, outputs, bits, block):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.custom_op("penguin_edge::integer_product", mutates_args=())
def integer_product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """What QuantizeLinear with a scale of 1 and then com.microsoft MatMulIntegerToFloat compute.

    Args:
        x: [.., K] f32 within -127 to 127; weight: [K, N] int8; scales: [N] f32.
    """
    return (x.round() @ weight.float()) * scales


@integer_product.register_fake
def _(x, weight, scales):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


TYPES = {
    "T": ["tensor(float)", "tensor(float16)"],
    "I": ["tensor(int32)"],
    "U": ["tensor(uint8)"],
    "S": ["tensor(int8)"],
    "F": ["tensor(float)"],
    "C": ["tensor(float)", "tensor(float16)", "tensor(int8)"],
}
"""Letters for tensor types in the schemas below."""


def contrib(name: str, inputs: str, outputs: str, attributes: str) -> Any:
    """An operator of ONNX Runtime's own domain for onnxscript.

    The exporter learns the number of outputs from the schema, and onnx does not know this domain, so that the part of
    the schema that is used here is written out: `name:letter` for each tensor, the letter as in `TYPES`.
    """
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    attribute = OpSchema.Attribute

    def parameters(text: str) -> list[Any]:
        pairs = (item.split(":") for item in text.split())
        optional = OpSchema.FormalParameterOption.Optional
        single = OpSchema.FormalParameterOption.Single
        return [
            OpSchema.FormalParameter(key.rstrip("?"), letter, param_option=optional if key.endswith("?") else single)
            for key, letter in pairs
        ]

    letters = sorted({item.split(":")[1] for item in (*inputs.split(), *outputs.split())})
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=parameters(inputs),
        outputs=parameters(outputs),
        type_constraints=[(letter, TYPES[letter], "") for letter in letters],
        attributes=[
            attribute(key, getattr(OpSchema.AttrType, kind), "", required=True)
            for key, kind in (item.split(":") for item in attributes.split())
        ],
    )
    return Op(Opset("com.microsoft", 1), name, schema)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The onnxscript function of each custom operator, which puts its node into the graph."""
    import onnx
    from onnxscript import opset23 as plain

    rows = "query:T key:T value:T"
    inputs = f"{rows} past_key:C past_value:C seqlens_k:I total_sequence_length:I cos_cache:T sin_cache:T"
    outputs, sizes = "output:T present_key:C present_value:C", "num_heads:INT kv_num_heads:INT do_rotary:INT"
    grouped = contrib("GroupQueryAttention", inputs, outputs, sizes)
    small = contrib(
        "GroupQueryAttention",
        f"{inputs} position_ids?:I attention_bias?:T head_sink?:T k_scale:F v_scale:F",
        outputs,
        f"{sizes} kv_cache_bit_width:INT k_quant_type:STRING v_quant_type:STRING",
    )
    multi = contrib("MultiHeadAttention", rows, "output:T", "num_heads:INT")
    scaled = contrib("MatMulIntegerToFloat", "A:U B:S a_scale:T b_scale:T a_zero_point:U", "Y:T", "")
    nbits = contrib(
        "MatMulNBits",
        "A:T B:U scales:T zero_points?:U",
        "Y:T",
        "K:INT N:INT bits:INT block_size:INT accuracy_level:INT",
    )
    added = contrib(
        "SkipSimplifiedLayerNormalization",
        "input:T skip:T gamma:T",
        "output:T mean:T inv_std_var:T input_skip_bias_sum:T",
        "epsilon:FLOAT",
    )

    def translate_grouped(  # type: ignore[no-untyped-def]
        q, k, v, past_k, past_v, last, total, cos, sin, k_scale, v_scale, heads: int, kv: int
    ):
        tensors, same = (q, k, v, past_k, past_v, last, total, cos, sin), {"num_heads": heads, "kv_num_heads": kv}
        if k_scale is None:
            return grouped(*tensors, do_rotary=1, **same)
        types = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        return small(*tensors, None, None, None, k_scale, v_scale, do_rotary=1, **same, **types)

    def translate_added(x, more, weight, eps: float):  # type: ignore[no-untyped-def]
        out, _, _, total = added(x, more, weight, epsilon=eps)
        return out, total

    def translate_multi(q, k, v, heads: int):  # type: ignore[no-untyped-def]
        return multi(q, k, v, num_heads=heads)

    def translate_nbits(  # type: ignore[no-untyped-def]
        x, packed, scales, zeros, inputs: int, outputs: int, bits: int, block: int
    ):
        tensors = (x, packed, scales) if zeros is None else (x, packed, scales, zeros)
        return nbits(*tensors, K=inputs, N=outputs, bits=bits, block_size=block, accuracy_level=ACCURACY)

    def translate_integers(x, weight, scales):  # type: ignore[no-untyped-def]
        # Unsigned activations, signed weights: the one pair that x86 multiplies and adds in one instruction.
        one = plain.Constant(value_float=1.0)
        middle = plain.Constant(value=onnx.numpy_helper.from_array(np.array(128, np.uint8)))
        return scaled(plain.QuantizeLinear(x, one, middle), weight, one, scales, middle)  # type: ignore[type-var]

    ops = torch.ops.penguin_edge
    return {
        ops.grouped_query_attention.default: translate_grouped,
        ops.multi_head_attention.default: translate_multi,
        ops.skip_norm.default: translate_added,
        ops.matmul_nbits.default: translate_nbits,
        ops.integer_product.default: translate_integers,
        ops.static_product.default: translate_static,
    }


class Product(nn.Module):
    """A linear layer as MatMul wants it: the weight as [in, out], cast to the dtype of `x` where it is used.

    Stored the other way round, every weight would be transposed anew by ONNX Runtime at load, in memory of its own.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight.to(x.dtype)
        return out if self.bias is None else out + self.bias


class BlockProduct(nn.Module):
    """A `QuantizedLinear` as MatMulNBits wants it: integers packed by blocks, a scale for each block."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.outputs, self.inputs = linear.levels.shape
        self.bits, self.block = linear.scheme.bits, linear.block
        blocks = self.inputs // self.block
        repeats = blocks // linear.scales.shape[1]
        self.register_buffer("packed", packed_bits(linear.levels.view(self.outputs, blocks, self.block), self.bits))
        self.register_buffer("scales", linear.scales.repeat_interleave(repeats, 1))
        zeros = None
        if not linear.scheme.symmetric:
            zeros = packed_bits(linear.zeros.repeat_interleave(repeats, 1), self.bits)
        self.register_buffer("zeros", zeros)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = matmul_nbits(x, self.packed, self.scales, self.zeros, self.inputs, self.outputs, self.bits, self.block)
        return out if self.bias is None else out + self.bias


class RowProduct(nn.Module):
    """A `QuantizedLinear` with one scale per row of weights and one per row of activations, as MatMulIntegerToFloat
    wants it."""

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.register_buffer("weight", (linear.levels.to(torch.int16) - 128).to(torch.int8).t().contiguous())
        self.register_buffer("scales", linear.scales[:, 0])
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # The largest magnitude without writing all magnitudes.
        reach = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
        scale = reach.clamp(min=SMALLEST) / 127
        out = integer_product(x / scale, self.weight, self.scales) * scale
        return out if self.bias is None else out + self.bias


PRODUCTS = (Product, BlockProduct, RowProduct, StaticProduct)
NODES = {
    BlockProduct: ["MatMulNBits"],
    RowProduct: ["MatMulIntegerToFloat"],
    StaticProduct: ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"],
}
"""The nodes that make a quantized product fast."""


def packed_bits(levels: Tensor, bits: int) -> Tensor:
    """The last dimension packed into bytes, low bits first; 4-bit values are padded to an even number."""
    if bits == 8:
        return levels.contiguous()
    if levels.shape[-1] % 2:
        levels = functional.pad(levels, (0, 1))
    return levels[..., 0::2] | (levels[..., 1::2] << 4)


def product(layer: nn.Module) -> nn.Module:
    """A linear layer in the form of the operator that computes it."""
    if isinstance(layer, QuantizedLinear):
        forms: dict[str, Callable[[QuantizedLinear], nn.Module]] = {"row": RowProduct, "static": StaticProduct}
        return forms.get(layer.activations, BlockProduct)(layer)
    assert isinstance(layer, nn.Linear)
    return Product(layer)


def prepare(module: nn.Module) -> nn.Module:
    """Turn linear layers into products and all other parameters into fp32, in place; no float weight is copied."""
    join(module, product)
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | QuantizedLinear):
            setattr(module, name, product(child))
        elif not isinstance(child, PRODUCTS):
            prepare(child)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
    return module.eval()


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
        bounds = Bounds.of(self.name, max_seq_len)
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
                f"multiples of {HEAD_STEP}; take --target executorch"
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

    def peak_factor(self, precision: str, quantized: bool) -> float:
        return 1.5 if quantized else {"fp32": 2.5, "fp16": 1.5}[precision]

    def check_installed(self) -> None:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise TargetUnavailable(
                f"exporting to ONNX needs {', '.join(missing)}, not installed here; pip install 'penguin-edge[export]'"
            )

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
            method = EncoderMethod(model.encoder)
            layers = len(model.encoder.layers)
            wanted = {"MultiHeadAttention": layers, "SkipSimplifiedLayerNormalization": 2 * layers}
        elif part == "projector":
            assert model.projector is not None, "this model was loaded without its projector"
            method, wanted = ProjectorMethod(model.projector), {}
        else:
            assert model.decoder is not None, "this model was loaded without its decoder"
            method = DecoderMethod(model.decoder, bounds.max_seq_len)
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
