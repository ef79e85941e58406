"""The whole model: encoder, projector, embedding table, decoder.

| name      | shape        | dtype | what                                                                      |
|-----------|--------------|-------|---------------------------------------------------------------------------|
| input_ids | [B, S]       | int64 | prompt with one image-token id per visual token                           |
| visual    | [N, H]       | float | projected features of all images and frames, in the order of the prompt   |
| embeds    | [B, S, H]    | float | what the decoder reads                                                    |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penguin_edge.config import PenguinConfig
from penguin_edge.errors import InputError
from penguin_edge.media.preprocess import Patches
from penguin_edge.model.decoder import Decoder
from penguin_edge.model.encoder import Encoder
from penguin_edge.model.layers import Attend
from penguin_edge.model.projector import Projector

PARTS = ("encoder", "projector", "embedding", "decoder")
"""The separately compiled, separately quantized parts; `embedding` is a table, the others are graphs."""


class PenguinModel(nn.Module):
    """Penguin-VL, or the parts of it that are asked for; absent parts are None."""

    def __init__(self, config: PenguinConfig, parts: Sequence[str] = PARTS) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.encoder = Encoder(vision) if vision and "encoder" in parts else None
        self.projector = (
            Projector(vision.hidden_size, config.text.hidden_size) if vision and "projector" in parts else None
        )
        self.embedding = nn.Embedding(config.text.vocab_size, config.text.hidden_size) if "embedding" in parts else None
        self.decoder = Decoder(config.text) if "decoder" in parts else None
        self.tie()

    def tie(self) -> None:
        """Let the head share the embedding's weights where the configuration says so."""
        if self.config.text.tie_word_embeddings and self.decoder is not None and self.embedding is not None:
            self.decoder.lm_head.weight = self.embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, pixels: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """[B, P, 588] -> [B, P, C]; see `penguin_edge.model.encoder`."""
        assert self.encoder is not None, "this model was loaded without its encoder"
        return self.encoder(pixels, rows, cols)

    def project(self, features: Tensor, merge_size: int) -> Tensor:
        """[B, P, C] -> [B, P/m², H]; see `penguin_edge.model.projector`."""
        assert self.projector is not None, "this model was loaded without its projector"
        return self.projector(features.unflatten(1, (-1, merge_size**2)))

    def visual(self, items: Sequence[Patches]) -> Tensor:
        """Projected features [N, H] of images and frames, one at a time, in order."""
        out = [torch.zeros((0, self.config.text.hidden_size), dtype=self.dtype, device=self.device)]
        for item in items:
            pixels = torch.from_numpy(item.pixels).to(self.device, self.dtype)[None]
            positions = (torch.from_numpy(axis).to(self.device) for axis in (item.rows, item.cols))
            out.append(self.project(self.encode(pixels, *positions), item.merge_size)[0])
        return torch.cat(out)

    def splice(self, input_ids: Tensor, visual: Tensor | None = None) -> Tensor:
        """Embed `input_ids` and put `visual` where the image token stands; the caller's tensors stay as they are.

        Raises:
            InputError: the number of image tokens differs from the number of visual features.
        """
        assert self.embedding is not None, "this model was loaded without its embedding table"
        slots = input_ids == self.config.image_token_id
        wanted, got = int(slots.sum()), 0 if visual is None else visual.shape[0]
        if wanted != got:
            raise InputError(
                f"the prompt has {wanted} image tokens and the images give {got} features; render the prompt with the "
                "token counts of these very images"
            )
        embeds = self.embedding(input_ids.masked_fill(slots, 0))
        if visual is not None and got:
            embeds = embeds.masked_scatter(slots[..., None], visual.to(embeds.dtype))
        return embeds

    def forward(self, input_ids: Tensor, visual: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Hidden states [B, S, H] of a whole prompt, causal, positions from 0. Rows of a batch are right-padded."""
        assert self.decoder is not None, "this model was loaded without its decoder"
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.decoder(self.splice(input_ids, visual), positions, attend)
