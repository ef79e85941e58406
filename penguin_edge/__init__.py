"""Penguin-VL on edge devices: the model, its export, its quantization and its runtime.

    from penguin_edge import Session, read_video

    with Session.open("out/penguin-nano") as session:
        for frame in read_video("street.mp4"):
            session.push(frame)
        for token in session.ask("What changed?"):
            print(token.text, end="")

Importing this package is cheap: no torch, no engine, no codec. A name below is loaded when it is first used; anything
else is imported from its module, for instance `penguin_edge.model.penguin` where torch is installed.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from penguin_edge.bundle.folder import Bundle as Bundle
    from penguin_edge.media.frames import read_image as read_image
    from penguin_edge.media.frames import read_video as read_video
    from penguin_edge.prompt.tokenizer import Tokenizer as Tokenizer
    from penguin_edge.runtime.engines.opening import open_engine as open_engine
    from penguin_edge.runtime.live.live import Live as Live
    from penguin_edge.runtime.session import Session as Session
    from penguin_edge.runtime.stream import Stream as Stream

_PLACES = {
    "Bundle": "bundle.folder.Bundle",
    "Live": "runtime.live.live.Live",
    "Session": "runtime.session.Session",
    "Stream": "runtime.stream.Stream",
    "Tokenizer": "prompt.tokenizer.Tokenizer",
    "open_engine": "runtime.engines.opening.open_engine",
    "read_image": "media.frames.read_image",
    "read_video": "media.frames.read_video",
}
"""Where each public name is defined, inside this package."""

__all__ = ["Bundle", "Live", "Session", "Stream", "Tokenizer", "open_engine", "read_image", "read_video"]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, defined = _PLACES[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), defined)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
