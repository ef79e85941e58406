"""What is compiled: one module per graph, with the names and order of `penguin_edge.bundle.manifest.signature`.

| graph     | forward arguments                                                                      | result   |
|-----------|----------------------------------------------------------------------------------------|----------|
| encoder   | pixels [B,P,588] f32, rows [P] i64, cols [P] i64                                       | features |
| projector | features [B,T,M,C] f32                                                                 | visual   |
| decoder   | embeds [1,S,H] f32, start [1] i64, logit_index [K] i64, positions [S] i64, and what    | logits   |
|           | the target's KV needs                                                                  |          |

Every module casts to its own dtype inside and gives f32 back, so that all precisions share one signature. The target
has the attention's body: see `targets/executorch`. ONNX Runtime has an encoder and decoder of its own.
"""

from __future__ import annotations

from torch import Tensor, nn

from penguin_edge.model.decoder import Decoder
from penguin_edge.model.encoder import Encoder
from penguin_edge.model.layers import Attend
from penguin_edge.model.projector import Projector


class EncoderMethod(nn.Module):
    """[B,P,588] -> [B,P,C] with the target's bidirectional attention."""

    def __init__(self, encoder: Encoder, attend: Attend | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.attend = attend

    def forward(self, pixels: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        dtype = self.encoder.norm.weight.dtype
        return self.encoder(pixels.to(dtype), rows, cols, self.attend).float()


class ProjectorMethod(nn.Module):
    """[B,T,M,C] -> [B,T,H]."""

    def __init__(self, projector: Projector) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, features: Tensor) -> Tensor:
        return self.projector(features.to(self.projector.get_parameter("readout.0.bias").dtype)).float()


def decoder_logits(decoder: Decoder, embeds: Tensor, positions: Tensor, logit_index: Tensor, attend: Attend) -> Tensor:
    """The decoder's common body: rotary `positions` [S], logits only at `logit_index`; f32 [1,K,V]."""
    hidden = decoder(embeds.to(decoder.norm.weight.dtype), positions, attend)
    return decoder.logits(hidden, logit_index).float()
