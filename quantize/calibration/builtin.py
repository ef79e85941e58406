"""What a calibration reads when nothing is named: a text that every Python brings, and photographs of this package.

The text consists of the topics of Python's help, which differ between versions of Python. There are six photographs,
with their origin in `penguin_edge/assets/pictures/README.md`: a sample is a crop of one at some size, with a
question and a true answer, so that an encoder meets many sizes and places but few motifs. Data of the task itself are
better.

| name   | shape     | dtype | what                              |
|--------|-----------|-------|-----------------------------------|
| photo  | [H, W, 3] | uint8 | RGB, whole                        |
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from penguin_edge.config import PATCH, PenguinConfig
from penguin_edge.dataset.records import DataRecord
from penguin_edge.dataset.samples import DataOptions, Sample, SampleBuilder, encode_conversation
from penguin_edge.errors import InputError
from penguin_edge.media.frames import read_image
from penguin_edge.media.preprocess import fit_area, resize
from penguin_edge.model.checkpoint import DEFAULT_TOKENIZER
from penguin_edge.prompt.chat import Message
from penguin_edge.prompt.tokenizer import Tokenizer

PHOTOS = {
    "astronaut": "An astronaut in an orange suit, in front of a flag and a model of the Space Shuttle.",
    "chelsea": "The face of a brown striped cat with green eyes.",
    "coffee": "A red cup of coffee with a spoon, on a wooden table.",
    "hubble": "Many small galaxies of different colours on a black sky.",
    "rocket": "A white rocket on its launch pad at dusk, between four towers.",
    "text": "Formulas, handwritten on ruled paper.",
}
"""File name of each photograph, and what it shows."""
QUESTIONS = ("What is in the picture?", "Describe the picture.", "What does this photograph show?")
LEAST_SHARE = 0.6
"""Smallest share of each side of a photograph that a crop keeps, so that the answer stays true."""
LEAST_TOKENS = 64
"""Visual tokens of the smallest picture, where the length leaves as many."""
LEAST_ROOM = 16
"""Visual tokens below which there is no picture to speak of."""


def builtin_text() -> str:
    """The topics of Python's help, by name."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def builtin_photos() -> dict[str, NDArray[np.uint8]]:
    """All photographs, whole, by name."""
    folder = DEFAULT_TOKENIZER.parent / "pictures"
    return {name: read_image(folder / f"{name}.jpg").pixels for name in PHOTOS}


def builtin_pictures(
    config: PenguinConfig, tokenizer: Tokenizer, *, count: int, length: int, rng: np.random.Generator
) -> list[Sample]:
    """Crops of the photographs in turn, each with a question and its answer, of at most `length` tokens.

    Raises:
        InputError: the length leaves no room for a picture.
    """
    photos = builtin_photos() if count else {}
    build = SampleBuilder(config, tokenizer, DataOptions(model_max_length=length))
    factor, floor = PATCH * config.image.image_merge_size, max(LEAST_ROOM, 2 * config.image.min_tokens)
    samples = []
    for index in range(count):
        name = list(PHOTOS)[index % len(PHOTOS)]
        question = QUESTIONS[int(rng.integers(len(QUESTIONS)))]

        def messages(image: NDArray[np.uint8], name: str = name, question: str = question) -> tuple[Message, ...]:
            asked = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            return ({"role": "user", "content": asked}, {"role": "assistant", "content": PHOTOS[name]})

        room = length - len(encode_conversation(messages(photos[name]), [0], tokenizer)[0])
        # A picture is no more work for the encoder than a piece of text is for the decoder.
        room = min(room, length // config.image.image_merge_size**2)
        if room < floor:
            raise InputError(
                f"builtin: {length} tokens a sample leave {max(room, 0)} for a picture, wanted at least {floor}; raise "
                "--calibration-length or --length"
            )
        crop = _crop(photos[name], rng)
        tokens = math.exp(rng.uniform(math.log(min(LEAST_TOKENS, room)), math.log(room)))
        height, width = crop.shape[:2]
        high, wide = fit_area(tokens * factor**2, height, width, factor, 0)
        while high * wide > room * factor**2:  # sides are rounded to whole tokens
            tokens *= 0.95
            high, wide = fit_area(tokens * factor**2, height, width, factor, 0)
        samples.append(build(DataRecord(f"builtin:{name}:{index}", "image", (), messages(resize(crop, high, wide)))))
    return samples


def _crop(photo: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    sides = [int(side * rng.uniform(LEAST_SHARE, 1)) for side in photo.shape[:2]]
    top, left = (int(rng.integers(0, whole - side + 1)) for whole, side in zip(photo.shape[:2], sides, strict=True))
    return photo[top : top + sides[0], left : left + sides[1]]
