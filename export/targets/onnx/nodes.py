"""What the exporter writes for each of our operators: a node of ONNX Runtime's own domain, or a few plain ones.

The operators themselves are in `blocks.py`, `products.py` and `static.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from penguin_edge.export.targets.onnx.static import translate_static

ACCURACY = 4
"""MatMulNBits with activations in int8: about twice as fast in decoding as with fp32 ones."""
TYPES = {
    "T": ["tensor(float)", "tensor(float16)"],
    "I": ["tensor(int32)"],
    "L": ["tensor(int64)"],
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
    inputs += " position_ids:L"
    outputs, sizes = "output:T present_key:C present_value:C", "num_heads:INT kv_num_heads:INT do_rotary:INT"
    grouped = contrib("GroupQueryAttention", inputs, outputs, sizes)
    small = contrib(
        "GroupQueryAttention",
        f"{inputs} attention_bias?:T head_sink?:T k_scale:F v_scale:F",
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
        q, k, v, past_k, past_v, last, total, cos, sin, positions, k_scale, v_scale, heads: int, kv: int
    ):
        tensors = (q, k, v, past_k, past_v, last, total, cos, sin, positions)
        same = {"num_heads": heads, "kv_num_heads": kv}
        if k_scale is None:
            return grouped(*tensors, do_rotary=1, **same)
        types = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        return small(*tensors, None, None, k_scale, v_scale, do_rotary=1, **same, **types)

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
