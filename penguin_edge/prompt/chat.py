"""The chat format: a conversation as pieces, with placeholders for images.

A conversation is rendered to pieces, and only the pieces become ids: special tokens are written by the template alone,
so a literal `<image>` or `<|im_end|>` inside a user's text stays text.

| piece        | stands for                                                          |
|--------------|---------------------------------------------------------------------|
| str          | text, tokenized without special tokens                              |
| Special      | one special token by name                                           |
| VisualTokens | `count` image tokens of one image or frame, in order of appearance  |
| Ids          | tokens of an earlier answer, as they were decoded                   |

Source: chat template of the reference (`penguinvl/model/processor.py`); the rendered text is equal to it character for
character.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from penguin_edge.errors import InputError

START, END, IMAGE = "<|im_start|>", "<|im_end|>", "<image>"
EMPTY_THINK = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Special:
    """One special token."""

    name: str


@dataclass(frozen=True)
class VisualTokens:
    """The image tokens of one image or frame."""

    count: int
    index: int


@dataclass(frozen=True)
class Ids:
    """Tokens of an earlier answer, kept as they were decoded."""

    ids: tuple[int, ...]


Piece = str | Special | VisualTokens | Ids
Message = dict[str, Any]


def frame_tag(time: float | None) -> str:
    """The text before a video frame's image token."""
    return "" if time is None else f"Time {round(float(time), 1)}s:"


def render(
    messages: Sequence[Message],
    visual_tokens: Sequence[int] | None = None,
    *,
    generation_prompt: bool = True,
    thinking: bool = False,
) -> list[Piece]:
    """Pieces of a conversation, none of them `Ids`.

    Args:
        messages: `{"role", "content"}`; content is a string or a list of parts: `{"type": "text", "text"}`,
            `{"type": "image"[, "time"]}`, `{"type": "video", "num_frames"[, "timestamps"]}`. A part with the key
            `image` or `image_url` is an image, one with `video` is a video. Role None gives the content alone.
        visual_tokens: tokens of each image and frame in order of appearance; None means one each.
        generation_prompt: open the assistant's turn at the end, with the empty think block unless `thinking`.
    Raises:
        InputError: a malformed message, or a wrong number of visual token counts.
    """
    out: list[Piece] = []
    seen = 0

    def add(piece: str | Special) -> None:
        if isinstance(piece, str) and out and isinstance(out[-1], str):
            out[-1] += piece
        elif piece != "":
            out.append(piece)

    def add_visual() -> None:
        nonlocal seen
        if visual_tokens is not None and seen >= len(visual_tokens):
            raise InputError(
                f"the conversation names more than the {len(visual_tokens)} images and frames that were given"
            )
        out.append(VisualTokens(1 if visual_tokens is None else visual_tokens[seen], seen))
        seen += 1

    def add_part(part: dict[str, Any]) -> None:
        kind = part_kind(part)
        if kind == "text":
            add(str(part["text"]))
        elif kind == "image":
            if part.get("time") is not None:
                if not isinstance(part["time"], (int, float)):
                    raise InputError(f"an image part has time {part['time']!r}; wanted seconds")
                add(frame_tag(part["time"]) + " ")
            add_visual()
            add("\n")
        else:
            times = list(part.get("timestamps") or [])
            count = int(part["num_frames"]) if "num_frames" in part else len(times)
            if times and len(times) != count:
                raise InputError(
                    f"a video part has {count} frames and {len(times)} timestamps; wanted one each, or none"
                )
            for index in range(count):
                add(("," if index else "") + frame_tag(times[index] if times else None))
                add_visual()
            add("\n")

    for message in messages:
        role, content = message_fields(message)
        start, end = (Special(START), Special(END))
        if role == "stream":  # not special tokens in the published vocabulary
            start = end = Special("")
            add("<|stream_start|>")
        if role is not None:
            if start.name:
                add(start)
            add(f"{role}\n")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            add_part(part)
        if role is not None:
            add(end if end.name else "<|stream_end|>")
            add("\n")
    if visual_tokens is not None and seen != len(visual_tokens):
        raise InputError(f"{len(visual_tokens)} images and frames were given, but the conversation names {seen}")
    if generation_prompt:
        add(Special(START))
        add("assistant\n" + ("" if thinking else EMPTY_THINK))
    return out


def message_fields(message: Message) -> tuple[str | None, str | list[dict[str, Any]]]:
    """Role and content of a message, checked.

    Raises:
        InputError: not an object with a string or list as content.
    """
    if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list)):
        raise InputError(
            f'a message is {str(message)[:80]!r}; wanted {{"role": …, "content": a string or a list of parts}}'
        )
    role = message.get("role")
    if role is not None and not isinstance(role, str):
        raise InputError(f"a message has role {role!r}; wanted a string such as 'user'")
    return role, message["content"]


ROLES = ("system", "user", "assistant", "stream")
"""Roles of the published template; it would write any other word as it is, and the model has seen none."""


def check_roles(messages: Sequence[Message]) -> None:
    """Refuse a conversation that asks nothing, or has a role that the model does not know.

    Raises:
        InputError: no message, or a message with such a role or of another form.
    """
    if not messages:
        raise InputError("messages: an empty list, wanted at least one object with role and content")
    for message in messages:
        role = message_fields(message)[0]
        if role is not None and role not in ROLES:
            raise InputError(f"a message has role {role[:40]!r}; wanted one of {', '.join(ROLES)}")


def parts_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """All content parts of a conversation, strings left out.

    Raises:
        InputError: a malformed message.
    """
    contents = [message_fields(message)[1] for message in messages]
    return [part for content in contents if not isinstance(content, str) for part in content]


def part_kind(part: Any) -> str:
    """'text', 'image' or 'video'.

    Raises:
        InputError: none of them.
    """
    if isinstance(part, dict):
        kind = part.get("type")
        if kind == "image" or "image" in part or "image_url" in part:
            return "image"
        if kind == "video" or "video" in part:
            return "video"
        if kind == "text" and isinstance(part.get("text"), str):
            return "text"
    raise InputError(f"a content part is {str(part)[:80]!r}; wanted a text, image or video part")


def as_text(pieces: Iterable[str | Special | VisualTokens]) -> str:
    """The rendered conversation as the reference prints it: one `<image>` per image or frame."""
    return "".join(p if isinstance(p, str) else p.name if isinstance(p, Special) else IMAGE for p in pieces)
