"""What a run says of itself: the line on stderr, rates, and the share of the machine's peak that it uses."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from penguin_edge.config import PATCH_VALUES, PenguinConfig, TextConfig, VisionConfig
from penguin_edge.errors import TargetUnavailable
from penguin_edge.training.packing import Batch
from penguin_edge.training.state import log_file

EVERY_SECONDS = 30.0
"""Between lines where stderr is no terminal; on a terminal the line is renewed in place."""


def _block_flops(config: VisionConfig | TextConfig) -> float:
    """Multiply-adds times two, of one token through all blocks, attention scores aside."""
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    return 2.0 * weights * config.num_hidden_layers


def forward_flops(config: PenguinConfig, batch: Batch) -> tuple[float, float]:
    """Floating-point operations of one forward pass: (encoder, decoder with projector and head).

    Counted from the shapes: matrix products at two per multiply-add, attention scores inside each frame and each
    sample (half of them in the causal decoder), the head at the targets alone. Norms and softmax are left out.
    """
    text = config.text
    scores = sum(2.0 * length**2 for length in batch.lengths)
    q_width = text.num_attention_heads * text.head_dim
    decoder = sum(batch.lengths) * _block_flops(text) + scores * q_width * text.num_hidden_layers
    decoder += 2.0 * len(batch.targets) * text.hidden_size * text.vocab_size
    vision = config.vision
    if vision is None:
        return 0.0, decoder
    patches = sum(group.frames * group.patches for group in batch.groups)
    pairs = sum(4.0 * group.frames * group.patches**2 for group in batch.groups)
    encoder = patches * (_block_flops(vision) + 2.0 * PATCH_VALUES * vision.hidden_size)
    encoder += pairs * vision.num_attention_heads * vision.head_dim * vision.num_hidden_layers
    merged = sum(group.frames * group.tokens for group in batch.groups)
    decoder += 2.0 * merged * text.hidden_size * (vision.hidden_size + text.hidden_size)
    return encoder, decoder


def training_flops(
    encoder: float, decoder: float, *, encoder_learns: bool, projector_learns: bool, llm_learns: bool
) -> float:
    """Operations of forward and backward: the gradient to inputs and the gradient to weights cost a forward each.

    Recomputation for gradient checkpointing is not counted: MFU is about useful work.
    """
    inputs = 1 if encoder_learns or projector_learns else 0
    return encoder * (1 + 2 * encoder_learns) + decoder * (1 + (inputs or int(llm_learns)) + llm_learns)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product here, the best of five."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones((size, size), device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def duration(seconds: float) -> str:
    """3:07 or 2:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass
class TrainProgress:
    """One line about the run; rates over the time since this process began."""

    first: int
    total: int
    peak_flops: float
    """Peak arithmetic of all processes together, in operations per second."""
    began: float = field(default_factory=time.monotonic)
    tokens: int = 0
    flops: float = 0.0
    _said: float = 0.0
    _open: bool = False

    def update(self, step: int, tokens: int, flops: float, numbers: dict[str, float]) -> None:
        """After optimiser step number `step` (from 1); says something when it is time to."""
        self.tokens += tokens
        self.flops += flops
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if step not in (self.first + 1, self.total) and now - self._said < (0.2 if terminal else EVERY_SECONDS):
            return
        self._said = now
        seconds = max(now - self.began, 1e-9)
        left = (self.total - step) * seconds / (step - self.first)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        line = (
            f"step {step}/{self.total}  {shown}  {self.tokens / seconds:,.0f} tokens/s  "
            f"MFU {100 * self.flops / seconds / self.peak_flops:.1f} %  {duration(left)} left"
        )
        if terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
        self._open = terminal

    def close(self) -> None:
        """End an open line before something else is said."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False

    def summary(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.began, 1e-9)
        return {
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.flops / seconds / self.peak_flops,
            "peak_flops": self.peak_flops,
        }


class Log:
    """OUT/log.jsonl, and OUT/tensorboard where it is wanted."""

    def __init__(self, out: Path, tensorboard: bool, begin: int, stack: contextlib.ExitStack) -> None:
        self._file = stack.enter_context(log_file(out).open("a", encoding="utf-8"))
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise TargetUnavailable(
                    "--tensorboard needs tensorboard; run `pip install 'penguin-edge[train]'`"
                ) from None
            self._board = stack.enter_context(SummaryWriter(str(out / "tensorboard"), purge_step=begin + 1))

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is None:
            return
        flat = {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}
        for group in ("lr", "parts"):
            flat |= {f"{group}/{name}": value for name, value in line[group].items()}
        for name, value in flat.items():
            self._board.add_scalar(name, value, line["step"])


def shown(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of the progress line."""
    parts = line["parts"] if len(line["parts"]) > 1 else {}
    return {"loss": line["loss"], **parts, "lr": max(line["lr"].values()), "grad": line["grad_norm"]}
