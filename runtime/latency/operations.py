"""Work of one call, counted from the shape of a model: what a stage takes grows with it along a line.

| stage      | first amount                     | second amount                     | beside, once per call |
|------------|----------------------------------|-----------------------------------|-----------------------|
| preprocess | pixels as they came              | values of the patches             |                       |
| encode     | multiply-adds with weights       | multiply-adds of the attention    | weights read          |
| project    | multiply-adds with weights       |                                   | weights read          |
| prefill    | multiply-adds with weights       | multiply-adds of the attention    | weights read, logits  |
| decode     | multiply-adds of the attention   |                                   | weights read, logits  |
| move       | numbers of the cache             |                                   |                       |

All amounts are in units of 10^9. The attention of a decoded position is its only work that changes, so it is the first
amount there.
"""

from __future__ import annotations

from collections.abc import Sequence

from penguin_edge.config import PATCH_VALUES, PenguinConfig, TextConfig, VisionConfig

GIGA = 1e9
READ = 4.0
"""Rows that a weight is multiplied with in the time that it takes to read it, about: int4 weights on two cores."""
PIXEL, VALUE, MOVED = 50.0, 15.0, 40.0
"""Multiply-adds that take about as long as a pixel that is resized, a value of a patch, a number that is moved."""

Amounts = tuple[float, float]


class Operations:
    """Amounts of work of a model's stages at points of `cost.AXES`."""

    def __init__(self, config: PenguinConfig) -> None:
        text, vision = config.text, config.vision
        self._text, self._text_attends = _stack(text), _attends(text)
        self._kept = float(text.kv_values)
        self._head = float(text.hidden_size * text.vocab_size)
        self._vision = self._vision_attends = self._projector = 0.0
        if vision is not None:
            self._vision = _stack(vision) + PATCH_VALUES * vision.hidden_size
            self._vision_attends = _attends(vision)
            self._projector = float((vision.hidden_size + text.hidden_size) * text.hidden_size)

    def amounts(self, stage: str, point: Sequence[float]) -> Amounts:
        """The two amounts that grow, each in 10^9; see the table above.

        Raises:
            ValueError: not a stage with a size.
        """
        x, y = point[0], point[1] if len(point) > 1 else 0.0
        match stage:
            case "preprocess":
                found = PIXEL * x, VALUE * y * PATCH_VALUES
            case "encode":
                found = y * x * self._vision, y * x * x * self._vision_attends
            case "project":
                found = x * self._projector, 0.0
            case "prefill":
                found = x * self._text, x * (x + y) * self._text_attends
            case "decode":
                found = x * self._text_attends, 0.0
            case "move":
                found = MOVED * x * self._kept, 0.0
            case _:
                raise ValueError(f"{stage!r} has no size")
        return found[0] / GIGA, found[1] / GIGA

    def effort(self, stage: str, point: Sequence[float]) -> float:
        """One number to put calls of all stages in order by, and to guess the first call of a stage from."""
        once = {
            "encode": READ * self._vision,
            "project": READ * self._projector,
            "prefill": READ * (self._text + self._head),
            "decode": (READ + 1) * self._text + READ * self._head,
        }
        return once.get(stage, 0.0) / GIGA + sum(self.amounts(stage, point))


def _stack(part: TextConfig | VisionConfig) -> float:
    """Multiply-adds with weights for one row through all layers; also how many weights there are."""
    heads = part.num_attention_heads * part.head_dim
    kept = 2 * part.num_key_value_heads * part.head_dim
    layer = part.hidden_size * (2 * heads + kept) + 3 * part.hidden_size * part.intermediate_size
    return float(part.num_hidden_layers * layer)


def _attends(part: TextConfig | VisionConfig) -> float:
    """Multiply-adds of one row with one position that it attends to, through all layers."""
    return 2.0 * part.num_hidden_layers * part.num_attention_heads * part.head_dim
