"""Check data: fixed inputs and eager outputs of every stage, so that a device can verify a bundle without a checkpoint.

| name                | shape       | dtype | what                                                                  |
|---------------------|-------------|-------|-----------------------------------------------------------------------|
| image_{c}           | [H,W,3]     | u8    | native pixels of case c                                               |
| size_{c}            | [3]         | i64   | target height and width, merge size                                   |
| pixels_{c}          | [h,w,3]     | u8    | after resizing                                                        |
| patches_{c}         | [1,P,588]   | f32   | after normalising, in merge-block order                               |
| features_{c}        | [1,P,C]     | f32   | encoder output                                                        |
| visual_{c}          | [1,T,H]     | f32   | projector output                                                      |
| ids                 | [S]         | i64   | prompt, image tokens included                                         |
| embeds              | [S,H]       | f32   | prompt after splicing                                                 |
| prefill             | [1,V]       | f32   | logits after the prompt                                               |
| positions           | [S]         | i64   | rotary positions of the same prompt, with gaps                        |
| placed              | [1,V]       | f32   | logits after the prompt at these positions                            |
| tokens              | [33]        | i64   | greedy answer                                                         |
| cache               | [2L,kv,S,D] | f32   | keys and values of every layer after the prompt; not stored           |
| decode              | [N,V]       | f32   | logits after the first N tokens of the answer, each fed alone         |
| decode_top          | [32]        | i64   | greedy choice after each token of the answer                          |
| noise_features_{c}, | [2]         | f64   | where activations are rounded: relative error and cosine of the eager |
| noise_prefill       |             |       | result to itself, inputs moved by `MOVED`                             |
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penguin_edge.config import PenguinConfig
from penguin_edge.export.cases import CASES, DECODED, MOVED, QUESTION, STORED_LOGITS, Arrays, check_image, distance
from penguin_edge.media.preprocess import positions, preprocess_image, resize
from penguin_edge.model.decoder import KVCache
from penguin_edge.model.generate import continue_greedy
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.prompt.chat import render
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.quantize.linear import QuantizedLinear


def rounds(module: nn.Module | None) -> bool:
    """Whether a part rounds its activations."""
    found = module.modules() if module is not None else ()
    return any(isinstance(child, QuantizedLinear) and child.activations != "float" for child in found)


def moved(x: Tensor) -> Tensor:
    """`x` with every value changed in its last digits, always in the same way."""
    step = max(MOVED, torch.finfo(x.dtype).eps)
    return (x.float() * (1 + step * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))).to(x.dtype)


def check_patches(config: PenguinConfig) -> Arrays:
    """Images, resized pixels and patches."""
    out: Arrays = {}
    for case, (native_h, native_w, height, width, merge) in enumerate(CASES):
        image = check_image(native_h, native_w)
        out[f"image_{case}"] = image
        out[f"size_{case}"] = np.array([height, width, merge])
        out[f"pixels_{case}"] = resize(image, height, width)
        out[f"patches_{case}"] = preprocess_image(image, config.image, merge, size=(height, width)).pixels[None]
    return out


def check_encoder(model: PenguinModel, arrays: Arrays) -> Arrays:
    """Eager features of every case."""
    out: Arrays = {}
    for case, (_, _, height, width, merge) in enumerate(CASES):
        rows, cols = positions((height // 14, width // 14), merge)
        pixels = torch.from_numpy(arrays[f"patches_{case}"]).to(model.dtype)
        with torch.no_grad():
            places = torch.from_numpy(rows), torch.from_numpy(cols)
            out[f"features_{case}"] = model.encode(pixels, *places).float().numpy()
            if rounds(model.encoder):
                again = model.encode(moved(pixels), *places).float().numpy()
                out[f"noise_features_{case}"] = np.array(distance(again, out[f"features_{case}"])[1:])
    return out


def check_projector(model: PenguinModel, arrays: Arrays) -> Arrays:
    """Eager visual embeddings of every case."""
    out: Arrays = {}
    for case, (*_, merge) in enumerate(CASES):
        with torch.no_grad():
            features = torch.from_numpy(arrays[f"features_{case}"]).to(model.dtype)
            out[f"visual_{case}"] = model.project(features, merge).float().numpy()
    return out


def check_ids(config: PenguinConfig, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The prompt: both pictures and a question, or just the question for a text-only model."""
    content: list[dict[str, str]] = [{"type": "text", "text": QUESTION}]
    if config.vision is None:
        return np.array(tokenizer.encode(QUESTION), np.int64)
    counts = [(h // (14 * m)) * (w // (14 * m)) for _, _, h, w, m in CASES]
    pieces = render([{"role": "user", "content": [{"type": "image"}] * len(CASES) + content}], counts)
    return np.array(tokenizer.encode_pieces(pieces), np.int64)


def check_prefill(model: PenguinModel, arrays: Arrays) -> Arrays:
    """Eager embeddings, logits and cache after the prompt; `model` holds the decoder and the embedding."""
    ids = torch.from_numpy(arrays["ids"])[None]
    visual = None
    if model.config.vision is not None:
        rows = [torch.from_numpy(arrays[f"visual_{case}"])[0] for case in range(len(CASES))]
        visual = torch.cat(rows).to(model.dtype)
    with torch.no_grad():
        embeds = model.splice(ids, visual)
    assert model.decoder is not None
    cache = KVCache(model.config.text, embeds.shape[1], model.dtype, model.device, model.decoder.kv_form)
    _, logits = continue_greedy(model, cache, embeds, max_new_tokens=1)
    out = {
        "embeds": embeds[0].float().numpy(),
        "prefill": logits.numpy(),
        "cache": torch.cat(cache.keys + cache.values).float().numpy(),
    }
    count = embeds.shape[1]
    places = torch.arange(count)
    places = places + 2 * (places >= count // 3) + 3 * (places >= 2 * count // 3)
    spread = KVCache(model.config.text, count, model.dtype, model.device, model.decoder.kv_form)
    with torch.no_grad():
        hidden = model.decoder(embeds, places.to(model.device), spread.attend)
        placed = model.decoder.logits(hidden, torch.tensor([-1], device=model.device))[0]
    out |= {"positions": places.numpy(), "placed": placed.float().cpu().numpy()}
    if rounds(model.decoder):
        other = KVCache(model.config.text, embeds.shape[1], model.dtype, model.device, model.decoder.kv_form)
        _, again = continue_greedy(model, other, moved(embeds), max_new_tokens=1)
        out["noise_prefill"] = np.array(distance(again.numpy(), out["prefill"])[1:])
    return out


def check_decoder(model: PenguinModel, arrays: Arrays, note: Callable[[int], None] = lambda index: None) -> Arrays:
    """An eager greedy answer, from the logits and the cache of `check_prefill` on; `note` is told each token's index.

    One token after the other, as engines decode: rows that are computed together have their sums in another order,
    which rounded activations can make a different token of.
    """
    assert model.decoder is not None and model.embedding is not None
    text, length = model.config.text, len(arrays["embeds"])
    cache = KVCache(text, length + DECODED, model.dtype, model.device, model.decoder.kv_form)
    for buffer, filled in zip(cache.keys + cache.values, torch.from_numpy(arrays["cache"]), strict=True):
        buffer[:, :, :length] = filled
    cache.length = length
    first = int(arrays["prefill"].argmax())
    with torch.no_grad():
        embeds = model.embedding(torch.tensor([[first]]))
    tokens, logits = continue_greedy(model, cache, embeds, max_new_tokens=DECODED, note=note)
    return {
        "tokens": np.array([first, *tokens]),
        "decode": logits[:STORED_LOGITS].contiguous().numpy(),
        "decode_top": logits.argmax(-1).numpy(),
    }
