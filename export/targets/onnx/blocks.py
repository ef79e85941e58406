"""Transformer blocks in the form that ONNX Runtime computes fastest; what they compute is `penguin_edge.model.layers`.

| name      | shape             | dtype | what                                                       |
|-----------|-------------------|-------|------------------------------------------------------------|
| x         | [B, S, H]         | f32   | sum of all blocks so far                                   |
| n         | [B, S, H]         | f32   | x after the norm that comes next                           |
| cos, sin  | [positions, D/2]  | f32   | rotary tables of the decoder, constants of the graph       |
| positions | [S]               | i64   | rotary position of each new token: a row of these tables   |
| turn      | 2 x [P, 1, D]     | f32   | cosines, and sines with the signs of `rotate`: the encoder |

A step that decodes one token is made of many small nodes, each of which costs some microseconds however little it
computes. So an addition and the norm after it are one node, the decoder's rotary step is done by the attention, and
quantized layers that read the same input are one product. This also saves reading and rounding that input twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from penguin_edge.model.decoder import Decoder
from penguin_edge.model.encoder import Encoder, rotary_2d
from penguin_edge.model.layers import MLP, Attention, Block, RMSNorm, rotary_angles
from penguin_edge.quantize.linear import Integers, QuantizedLinear

Inside = Callable[[int, Attention, Tensor], Tensor]
"""(layer, its attention, n) -> [B, S, heads*D], what the output projection reads."""


@torch.library.custom_op("penguin_edge::skip_norm", mutates_args=())
def skip_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What com.microsoft SkipSimplifiedLayerNormalization computes: the norm of x + more, and the sum, [B, S, H]."""
    raise NotImplementedError("traced, never run")


@skip_norm.register_fake
def _(x, more, weight, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("penguin_edge::grouped_query_attention", mutates_args=())
def grouped_query_attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, last: Tensor, total: Tensor,
    cos: Tensor, sin: Tensor, positions: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, heads: int, kv: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What com.microsoft GroupQueryAttention computes for one sequence: rotary step, causal attention over a cache.

    Args:
        q: [1, S, heads*D]; k, v: [1, S, kv*D], before the rotary step.
        past_k, past_v: [1, kv, max_seq_len, D] in the dtype of q, or int8.
        k_scale, v_scale: [1, kv, 1, D] f32, for int8.
        last: [1] int32, slot of the last new token.
        total: [1] int32, more than the number of slots in use, or all there are: where the two are equal, the operator
            takes all of a call that begins an empty cache as neighbours of `positions[0]`, gaps or not.
        cos, sin: [most positions, D/2], rotary tables.
        positions: [1, S] i64, rows of these.
    Returns:
        [1, S, heads*D], and the caches with the new positions written.
    """
    raise NotImplementedError("traced, never run")


@grouped_query_attention.register_fake
def _(q, k, v, past_k, past_v, last, total, cos, sin, positions, k_scale, v_scale, heads, kv):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), torch.empty_like(past_k), torch.empty_like(past_v)


@torch.library.custom_op("penguin_edge::multi_head_attention", mutates_args=())
def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """What com.microsoft MultiHeadAttention computes: every position sees all others. All [B, P, heads*D].

    The stock Attention operator keeps all scores, [B, heads, P, P]: 17 GB for one image of 16,384 patches, where this
    one works in tiles at the same speed. It knows no groups, so that keys and values are repeated.
    """
    raise NotImplementedError("traced, never run")


@multi_head_attention.register_fake
def _(q, k, v, heads):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


TENSORS = ("levels", "scales", "zeros")


class Joined(nn.Module):
    """Layers that read the same input, as one product where they are quantized alike, or one each."""

    def __init__(self, layers: Sequence[nn.Module], product: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        groups: dict[object, list[int]] = {}
        for index, layer in enumerate(layers):
            # The runtime joins equal nodes, so that rows are rounded once; one product would have to be split.
            alike = isinstance(layer, QuantizedLinear) and layer.bias is None and layer.activations != "row"
            groups.setdefault(layer.form if alike else index, []).append(index)
        self.members = list(groups.values())
        self.sizes = [
            [layers[index].get_buffer("levels").shape[0] for index in group] if len(group) > 1 else []
            for group in self.members
        ]
        self.products = nn.ModuleList(product(together([layers[index] for index in group])) for group in self.members)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        out: dict[int, Tensor] = {}
        for group, sizes, product in zip(self.members, self.sizes, self.products, strict=True):
            y = product(x)
            out |= zip(group, y.split(sizes, dim=-1) if sizes else [y], strict=True)
        return [out[index] for index in sorted(out)]


def together(layers: Sequence[nn.Module]) -> nn.Module:
    """Layers of one form as one with all their outputs."""
    first = layers[0]
    if len(layers) == 1 or not isinstance(first, QuantizedLinear):
        return first
    levels, scales, zeros = (torch.cat([layer.get_buffer(name) for layer in layers]) for name in TENSORS)
    return QuantizedLinear(Integers(levels, scales, zeros, first.scheme), None, first.activations, first.input_scale)


def join(module: nn.Module, product: Callable[[nn.Module], nn.Module]) -> None:
    """Give an attention its `qkv` and an MLP its `gate_up`, in place of the layers they are made of."""
    groups = {Attention: ("qkv", ("q_proj", "k_proj", "v_proj")), MLP: ("gate_up", ("gate_proj", "up_proj"))}
    for kind, (joined, names) in groups.items():
        if isinstance(module, kind):
            layers = [module.get_submodule(name) for name in names]
            for name in names:
                delattr(module, name)
            setattr(module, joined, Joined(layers, product))


def outputs(module: nn.Module, joined: str, n: Tensor) -> Sequence[Tensor]:
    """Outputs of the layers that `join` put together, for one input."""
    found: Sequence[Tensor] = module.get_submodule(joined)(n)
    return found


def through(blocks: Iterable[nn.Module], norm: RMSNorm, x: Tensor, inside: Inside) -> Tensor:
    """All blocks and the last norm."""
    chain = [block for block in blocks if isinstance(block, Block)]
    after = [*(block.input_layernorm for block in chain[1:]), norm]
    n = chain[0].input_layernorm(x)
    for layer, (block, following) in enumerate(zip(chain, after, strict=True)):
        attention, mlp = block.self_attn, block.mlp
        n, x = _added(x, attention.o_proj(inside(layer, attention, n)), block.post_attention_layernorm)
        gate, up = outputs(mlp, "gate_up", n)
        n, x = _added(x, mlp.down_proj(functional.silu(gate) * up), following)
    return n


def _added(x: Tensor, more: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    n, total = skip_norm(x, more, norm.weight, norm.eps)
    return n, total


class FusedDecoder(nn.Module):
    """The decoder with its KV buffers as arguments: keys and values of layer 0, of layer 1, and so on."""

    cos: Tensor
    sin: Tensor

    def __init__(self, decoder: Decoder, max_seq_len: int, positions: int) -> None:
        """`positions` is the number of rotary positions."""
        super().__init__()
        self.decoder, self.max_seq_len = decoder, max_seq_len
        form = decoder.kv_form
        self.dtype = torch.float16 if form is not None and form.dtype == "fp16" else torch.float32
        """The dtype of what goes into the attention, which wants its cache's own, or fp32 beside an int8 cache."""
        scales = form.scales if form is not None else None
        self.kv_scales = nn.ParameterList([] if scales is None else [nn.Parameter(x, False) for x in scales[:, None]])
        angles = rotary_angles(torch.arange(positions), decoder.config.head_dim, decoder.config.rope_theta)
        self.register_buffer("cos", angles.cos().to(self.dtype))
        self.register_buffer("sin", angles.sin().to(self.dtype))

    def forward(
        self, embeds: Tensor, start: Tensor, logit_index: Tensor, positions: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        config = self.decoder.config
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        used = (start + embeds.shape[1]).to(torch.int32)
        last, total = used - 1, (used + 1).clamp(max=self.max_seq_len)
        present: list[Tensor] = []

        def inside(layer: int, attention: Attention, n: Tensor) -> Tensor:
            q, k, v = outputs(attention, "qkv", n)
            q, k = (
                norm(y.unflatten(-1, (-1, config.head_dim))).flatten(2)
                for norm, y in ((attention.q_norm, q), (attention.k_norm, k))
            )
            rows = [y.to(self.dtype) for y in (q, k, v)]
            scales = list(self.kv_scales)[layer :: config.num_hidden_layers] or [None, None]
            tables = self.cos, self.sin
            out, *both = grouped_query_attention(
                *rows, *past[2 * layer : 2 * layer + 2], last, total, *tables, positions[None], *scales, heads, kv
            )
            present.extend(both)
            return out.float()

        hidden = through(self.decoder.layers, self.decoder.norm, embeds, inside)
        return self.decoder.logits(hidden, logit_index), *present


class FusedEncoder(nn.Module):
    """[B,P,588] -> [B,P,C]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        config = self.encoder.config
        heads, size = config.num_attention_heads, config.head_dim
        x = self.encoder.patch_embedding(pixels)
        cos, sin = (table[:, None] for table in rotary_2d(rows, cols, size, config.rope_theta, x.dtype))
        signs = torch.tensor([-1.0, 1.0]).repeat_interleave(size // 2)
        swapped, sin = torch.tensor([1, 0]), sin * signs

        def turned(norm: nn.Module, y: Tensor) -> Tensor:
            """[B, P, heads, D]; `rotate` with its signs in the sines: the halves change places in one copy."""
            y = norm(y.unflatten(-1, (-1, size)))
            return y * cos + y.unflatten(-1, (2, -1)).index_select(-2, swapped).flatten(-2) * sin

        def repeated(y: Tensor) -> Tensor:
            """[B, P, kv, D] -> [B, P, heads*D]."""
            return y[:, :, :, None].expand(-1, -1, -1, heads // y.shape[2], -1).flatten(2)

        def inside(layer: int, attention: Attention, n: Tensor) -> Tensor:
            q, k, v = outputs(attention, "qkv", n)
            q, k = turned(attention.q_norm, q), turned(attention.k_norm, k)
            return multi_head_attention(q.flatten(2), repeated(k), repeated(v.unflatten(-1, (-1, size))), heads)

        return through(self.encoder.layers, self.encoder.norm, x, inside)
