"""ExecuTorch with XNNPACK: one `.pte` per part, plain operators only, so that the C++ runtime needs no libtorch.

| method    | inputs, in order                                                                       | output      |
|-----------|----------------------------------------------------------------------------------------|-------------|
| encoder   | pixels [1,P,588] f32, rows [P] i64, cols [P] i64                                       | [1,P,C] f32 |
| projector | features [1,T,M,C] f32                                                                 | [1,T,H] f32 |
| decoder   | embeds [1,S,H] f32, start [1] i64, logit_index [K] i64, positions [S] i64,             | [1,K,V] f32 |
|           | kv_positions [L] i64 = 0 … L-1                                                         |             |

Every file has one method, `forward`. New tokens are written at slots `start` to `start + S - 1`, which the mask counts;
`positions` turn them, and may have gaps. `start + S <= L <= max_seq_len`, and K is at least 1: XNNPACK crashes on empty
tensors, so that a caller who wants no logits asks for one and drops it. KV state is two mutable buffers per layer,
`[kv_heads, max_seq_len, D]` in the graph's precision, inside the method; they are not stored in the file. The file
names them `keys_i` and `values_i`: a runtime finds their memory by `Method::get_attribute`, and moves positions there.

XNNPACK takes a chain of operators as one subgraph and plans its memory at run time for the shapes it sees, while what
lies between subgraphs is planned at export for the largest shapes. The modules here compute the same sums as
`penguin_edge.model.layers` with operators that XNNPACK takes with dynamic shapes: a mean and a half-rotation as small
linears, attention as matrix products over folded heads. Hence the encoder is one method for all P, not one per patch
bucket.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from penguin_edge.bundle.contract import EXECUTORCH_MERGED, Bounds, compiled_bounds, signature
from penguin_edge.config import PenguinConfig
from penguin_edge.errors import InputError, PenguinError
from penguin_edge.export.methods import EncoderMethod, decoder_logits
from penguin_edge.export.stages import COMPILE, TRACE, WRITE
from penguin_edge.export.targets.base import PartFile, require_modules, silent
from penguin_edge.model.decoder import Decoder
from penguin_edge.model.layers import Attend, Attention, RMSNorm
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.model.projector import Projector
from penguin_edge.quantize.linear import Activations, QuantizedLinear, Scheme

log = logging.getLogger(__name__)

PRODUCTS = ("linear", "addmm", "mm", "bmm")
MASKED = -1e4
"""Added to a masked score: far below any real score, and finite in fp16, where -1e9 is not."""


class DelegatedNorm(nn.Module):
    """`RMSNorm` in fp32 with the mean as a linear, which XNNPACK takes at any rank; squares would overflow in fp16."""

    average: Tensor
    eps: Tensor

    def __init__(self, norm: RMSNorm, out: torch.dtype) -> None:
        super().__init__()
        size = norm.weight.shape[0]
        self.weight = nn.Parameter(norm.weight.float(), requires_grad=False)
        self.register_buffer("average", torch.full((1, size), 1 / size))
        self.register_buffer("eps", torch.full((1,), norm.eps))
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        scale = torch.rsqrt(functional.linear(x * x, self.average, self.eps))
        return (x * scale * self.weight).to(self.out)


class DelegatedAttention(nn.Module):
    """`layers.Attention` with norm and rotary in fp32, and `rotate_half` as a linear with a signed permutation."""

    turn: Tensor

    def __init__(self, source: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim, self.dtype = source.head_dim, dtype
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = source.q_proj, source.k_proj, source.v_proj, source.o_proj
        self.q_norm, self.k_norm = (
            DelegatedNorm(norm, torch.float32) if isinstance(norm, RMSNorm) else norm
            for norm in (source.q_norm, source.k_norm)
        )
        half = torch.eye(self.head_dim // 2)
        zero = torch.zeros_like(half)
        self.register_buffer("turn", torch.cat((torch.cat((zero, -half), 1), torch.cat((half, zero), 1))))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            # One inferred dimension and constants: the only dynamic reshape that XNNPACK takes.
            return y.view(1, -1, y.shape[2] // self.head_dim, self.head_dim)

        def rotated(y: Tensor) -> Tensor:
            y = y.float().transpose(1, 2)
            return (y * cos + functional.linear(y, self.turn) * sin).to(self.dtype)

        q, k = rotated(self.q_norm(heads(self.q_proj(x)))), rotated(self.k_norm(heads(self.k_proj(x))))
        return self.o_proj(attend(layer, q, k, heads(self.v_proj(x)).transpose(1, 2)))


class WideLinear(nn.Module):
    """f32 in and out, whatever the weights are, so that the residual stream it opens is f32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self.linear.weight.dtype)).float()


def rebuild(part: Any, dtype: torch.dtype) -> None:
    """Put the modules above into an encoder or decoder, in place; no linear's weight is copied.

    Linears and attention compute in `dtype`; residual stream, norms and rotary in fp32: real checkpoints have residual
    values whose squares leave the range of fp16.
    """
    for block in part.layers:
        block.input_layernorm = DelegatedNorm(block.input_layernorm, dtype)
        block.post_attention_layernorm = DelegatedNorm(block.post_attention_layernorm, dtype)
        block.self_attn = DelegatedAttention(block.self_attn, dtype)
    part.norm = DelegatedNorm(part.norm, dtype)


def carry_integers(module: nn.Module) -> None:
    """Turn each `QuantizedLinear` into a linear whose weight is torchao's tensor of the same integers, in place."""
    for name, child in module.named_children():
        if not isinstance(child, QuantizedLinear):
            carry_integers(child)
            continue
        from torchao.quantization import IntxUnpackedToInt8Tensor

        scheme, middle = child.scheme, 2 ** (child.scheme.bits - 1)
        weight = IntxUnpackedToInt8Tensor(
            (child.levels.to(torch.int16) - middle).to(torch.int8),
            child.scales,
            torch.zeros_like(child.scales, dtype=torch.int8),
            getattr(torch, f"int{scheme.bits}"),
            (1, scheme.group or child.levels.shape[1]),
            torch.float32,
            "int8_asym_per_token",
        )
        outputs, inputs = child.levels.shape
        linear = nn.Linear(inputs, outputs, bias=child.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if child.bias is not None:
            linear.bias = child.bias
        setattr(module, name, linear)


def folded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention with the query group folded into rows, so that keys and values are not repeated.

    Args:
        q: [1, kv*g, S, D].
        k, v: [kv, L, D].
        mask: [g*S, L], added to the scores.
    Returns:
        [1, S, kv*g*D].
    """
    kv, heads, size = k.shape[0], q.shape[1], q.shape[3]
    scores = torch.bmm((q * size**-0.5).contiguous().view(kv, -1, size), k.transpose(1, 2))
    weights = (scores if mask is None else scores + mask).softmax(-1)
    out = torch.bmm(weights, v).view(1, heads, -1, size)
    return out.transpose(1, 2).contiguous().view(1, -1, heads * size)


def encoder_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bidirectional attention of one frame."""
    keys, values = (x.contiguous().view(x.shape[1], -1, x.shape[3]) for x in (k, v))
    return folded_attention(q, keys, values, None)


class DelegatedProjector(nn.Module):
    """The projector with mean and GELU in fp32; XNNPACK has no GELU in fp16."""

    def __init__(self, projector: Projector) -> None:
        super().__init__()
        layers: Any = projector.readout
        self.first, self.gelu, self.second = WideLinear(layers[0]), layers[1], WideLinear(layers[2])

    def forward(self, features: Tensor) -> Tensor:
        return self.second(self.gelu(self.first(features.mean(dim=2))))


class DecoderMethod(nn.Module):
    """The decoder with its KV state; `kv_positions` brings the filled length in as a shape."""

    def __init__(self, decoder: Decoder, max_seq_len: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.decoder = decoder
        config = decoder.config
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.dtype = dtype
        shape = (config.num_key_value_heads, max_seq_len, config.head_dim)
        for layer in range(config.num_hidden_layers):
            self.register_buffer(f"keys_{layer}", torch.zeros(shape, dtype=dtype))
            self.register_buffer(f"values_{layer}", torch.zeros(shape, dtype=dtype))

    def forward(
        self, embeds: Tensor, start: Tensor, logit_index: Tensor, positions: Tensor, kv_positions: Tensor
    ) -> Tensor:
        filled = kv_positions.shape[0]
        slots = start + torch.arange(embeds.shape[1])
        seen = kv_positions[None] <= slots.repeat(self.groups)[:, None]
        mask = torch.where(seen, 0.0, MASKED).to(self.dtype)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            size = q.shape[3]
            keys, values = getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")
            # Slice assignment fails at run time in ExecuTorch's in-place kernel; this call is reinplaced.
            torch.ops.aten.index_put_(keys, [None, slots], k.contiguous().view(keys.shape[0], -1, size))
            torch.ops.aten.index_put_(values, [None, slots], v.contiguous().view(keys.shape[0], -1, size))
            return folded_attention(q, keys[:, :filled], values[:, :filled], mask)

        return decoder_logits(self.decoder, embeds, positions, logit_index, attend)


def operators(graph: torch.fx.Graph) -> Counter[str]:
    """Count the calls of each aten operator, by its plain name."""
    calls = (node.target for node in graph.nodes if node.op == "call_function")
    names = (str(getattr(target, "_name", "")) for target in calls)
    return Counter(name.removeprefix("aten::").split(".")[0] for name in names if name.startswith("aten::"))


def check_delegation(part: str, program: torch.export.ExportedProgram, products: int) -> None:
    """Log what stayed outside XNNPACK.

    Raises:
        PenguinError: a matrix product stayed outside, or some of the wanted `products` are nowhere.
    """
    outside = operators(program.graph)
    subgraphs = [
        getattr(program.graph_module, str(node.args[0])).original_module
        for node in program.graph.nodes
        if node.op == "call_function" and node.target is torch.ops.higher_order.executorch_call_delegate
    ]
    inside = sum((operators(subgraph.graph) for subgraph in subgraphs), Counter())
    log.info("%s: %d XNNPACK subgraphs; outside them: %s", part, len(subgraphs), dict(outside.most_common()))
    left, found = sum(outside[name] for name in PRODUCTS), sum(inside[name] for name in PRODUCTS)
    if left or found != products:
        raise PenguinError(
            f"{part}: XNNPACK took {found} matrix products and left {left} outside, wanted all {products} inside; "
            "export with the versions of torch and executorch that pyproject.toml names"
        )


class ExecutorchTarget:
    """Encoder, projector and decoder as ExecuTorch programs; see the table at the top of this file."""

    name = "executorch"
    precisions: tuple[str, ...] = ("fp32", "fp16")
    tools: tuple[str, ...] = ("torch", "executorch", "torchao")
    shares_kv = False
    kv_dtypes: tuple[str, ...] = ()
    activations: Activations = "token"
    shares_table = False
    compiles = True

    def bounds(self, max_seq_len: int) -> Bounds:
        """One frame at a time, and small chunks: ExecuTorch reserves memory for the largest shapes.

        Raises:
            InputError: too small a cache.
        """
        if max_seq_len < 32:
            raise InputError(f"max_seq_len {max_seq_len}, wanted at least 32; pass a larger --max-seq-len")
        bounds = compiled_bounds(self.name, max_seq_len)
        assert bounds is not None
        return bounds

    def check_model(self, config: PenguinConfig) -> None:
        """XNNPACK takes every shape that a checkpoint may have."""

    def check_scheme(self, layer: str, scheme: Scheme, precision: str) -> None:
        """XNNPACK's linears with dynamic activations: 8da4w by symmetric groups of 32 n, 8da8w by symmetric rows.

        Raises:
            InputError: any other scheme, which XNNPACK would refuse, or accept and compute wrongly.
        """
        wanted = "symmetric groups of 32 or more" if scheme.bits == 4 else "one symmetric scale per row"
        grouped = scheme.group is not None and scheme.group >= 32
        if not scheme.symmetric or grouped != (scheme.bits == 4):
            raise InputError(f"{layer}: {scheme.label}, but XNNPACK takes int{scheme.bits} with {wanted}")
        if scheme.activations == "static":
            raise InputError(
                f"{layer}: {scheme.label}, but XNNPACK rounds activations per token; leave out `activations`"
            )
        if scheme.activations == "block":
            raise InputError(f"{layer}: {scheme.label}, but XNNPACK rounds activations per token")
        if precision != "fp32":
            raise InputError(f"{layer}: {scheme.label} beside {precision}, but XNNPACK's quantized linears take fp32")

    def layer_bytes(self, shape: tuple[int, int], scheme: Scheme | None) -> int:
        """Scales in bf16 for groups, and in fp32 for rows."""
        outputs, inputs = shape
        if scheme is None:
            return 4 * outputs * inputs
        packed = outputs * inputs * scheme.bits // 8
        return packed + (2 * outputs * (inputs // scheme.group) if scheme.group else 4 * outputs)

    def graph_bytes(self, config: PenguinConfig, max_seq_len: int) -> int:
        """Nodes of every block, each with a matrix for `rotate_half` and rows for the means of its norms."""
        return sum(
            shape.num_hidden_layers * (40_000 + 4 * (shape.head_dim**2 + 2 * shape.head_dim + 4 * shape.hidden_size))
            for shape in (config.text, config.vision)
            if shape is not None
        )

    def peak_factor(self, precision: str, quantized: bool) -> float:
        return 2.5 if quantized else {"fp32": 4.8, "fp16": 2.8}[precision]

    def kv_dtype(self, precision: str) -> str:
        """The graph's own dtype: XNNPACK's matrix products want one dtype, and conversions run outside XNNPACK."""
        return precision

    def check_installed(self) -> None:
        require_modules("exporting to ExecuTorch", "executorch")

    def export_part(
        self, part: str, model: PenguinModel, bounds: Bounds, folder: Path, note: Callable[[str], None] = silent
    ) -> PartFile:
        """Compile `part` into `folder`. The model's layers are rebuilt in place: it cannot be used afterwards.

        Raises:
            PenguinError: the compiler failed, or left a matrix product to the slow portable kernels.
        """
        self.check_installed()
        module: Any = getattr(model, part, None)
        if part not in ("encoder", "projector", "decoder") or module is None:
            raise InputError(f"part {part!r}, wanted encoder, projector or decoder, loaded in the model")
        specs, _ = signature(part, model.config, bounds)
        limits = {"P": bounds.max_patches, "T": bounds.max_patches, "M": EXECUTORCH_MERGED}
        limits |= {"S": bounds.max_chunk, "K": bounds.max_logits, "L": bounds.max_seq_len}
        sizes = {"B": 1, "P": 24, "T": 6, "M": 4, "S": 5, "K": 3, "L": 19}
        shapes: list[tuple[tuple[int | str, ...], str]] = [(spec.shape, spec.dtype) for spec in specs]
        method: nn.Module
        note(TRACE)
        carry_integers(module)
        if part == "encoder":
            dtype = module.norm.weight.dtype
            rebuild(module, dtype)
            module.patch_embedding = WideLinear(module.patch_embedding)
            method = EncoderMethod(module, encoder_attention)
        elif part == "projector":
            method = DelegatedProjector(module)
        else:
            dtype = module.norm.weight.dtype
            rebuild(module, dtype)
            method = DecoderMethod(module, bounds.max_seq_len, dtype)
            shapes.append((("L",), "i64"))
        dims = {name: torch.export.Dim(name, min=1, max=limit) for name, limit in limits.items()}
        dynamic = tuple({i: dims[d] for i, d in enumerate(shape) if d in dims} for shape, _ in shapes)
        examples = tuple(
            torch.zeros(
                [sizes[d] if isinstance(d, str) else d for d in shape],
                dtype=torch.float32 if kind == "f32" else torch.int64,
            )
            for shape, kind in shapes
        )
        file = f"{part}.pte"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile_method(part, method.eval().requires_grad_(False), examples, dynamic, folder / file, note)
        except PenguinError:
            raise
        except Exception as error:
            raise PenguinError(
                f"{part}: executorch could not compile it ({type(error).__name__}: {error}); export with the versions "
                "of torch and executorch that pyproject.toml names"
            ) from error
        return PartFile(file)


@contextlib.contextmanager
def shared_weights() -> Iterator[None]:
    """Let XNNPACK read the weights where they are: it copies each subgraph to change it, and the weights with it."""
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend

    def copied(backend: type, program: torch.export.ExportedProgram, specs: list[Any]) -> torch.export.ExportedProgram:
        weights = (*program.state_dict.values(), *program.constants.values())
        return copy.deepcopy(program, {id(weight): weight for weight in weights})

    hook = "copy_exported_program_for_preprocess"
    setattr(XnnpackBackend, hook, classmethod(copied))
    try:
        yield
    finally:
        delattr(XnnpackBackend, hook)


def compile_method(
    part: str,
    method: nn.Module,
    examples: tuple[Tensor, ...],
    dynamic: tuple[dict[int, Any], ...],
    path: Path,
    note: Callable[[str], None] = silent,
) -> None:
    """Export, lower to XNNPACK, plan memory and write one program with the method `forward`."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    # Without deferred asserts the folded attention does not export; strict mode knows no mutable buffers by name.
    program = torch.export.export(
        method, examples, dynamic_shapes=dynamic, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )
    products = sum(operators(program.graph)[name] for name in PRODUCTS)
    partitioner = [XnnpackPartitioner()]
    if any("dequantize" in str(node.target) for node in program.graph.nodes):
        # Takes float linears too, each into a subgraph of its own: only for programs that hold quantized ones.
        partitioner.insert(0, XnnpackDynamicallyQuantizedPartitioner())
    note(COMPILE)
    with shared_weights():
        edge = to_edge_transform_and_lower(
            program,
            partitioner=partitioner,
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
    check_delegation(part, edge.exported_program(), products)
    result = edge.to_executorch(
        ExecutorchBackendConfig(
            # Without it every step copies the whole of every KV buffer.
            run_reinplace_pass=True,
            # A name makes a buffer's memory reachable from outside, where positions are moved.
            emit_mutable_buffer_names=True,
            memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True, alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )
    used = {op.name for plan in result.executorch_program.execution_plan for op in plan.operators}
    if foreign := sorted(name for name in used if not name.startswith(("aten::", "executorch_prim::"))):
        raise PenguinError(f"{part}: operators {foreign} in the program, wanted only those of the stock runtime")
    note(WRITE)
    with path.open("wb") as stream:
        result.write_to_file(stream)
