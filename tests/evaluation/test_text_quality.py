"""Perplexity, KL and agreement on text: against torch's own functions, and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_model
from torch.nn import functional

from penguin_edge.errors import InputError
from penguin_edge.evaluation.text import compare_piece, continuation, measure_text, piece_logits
from penguin_edge.model.eager import EagerEngine
from penguin_edge.model.generate import generate

IDS = np.random.default_rng(0).integers(0, 600, (3, 70))


def test_compare_piece_is_what_torch_computes() -> None:
    rng = np.random.default_rng(1)
    got, wanted = (rng.normal(0, 3, (70, 640)).astype(np.float32) for _ in range(2))
    piece = compare_piece(got, wanted, IDS[0])
    q, p = (torch.from_numpy(x.astype(np.float64)).log_softmax(-1) for x in (got, wanted))
    assert np.allclose(piece.kl, functional.kl_div(q, p, reduction="none", log_target=True).sum(-1), rtol=1e-9)
    nll = functional.nll_loss(q[:-1], torch.from_numpy(IDS[0, 1:]), reduction="none")
    assert np.allclose(piece.nll, nll, rtol=1e-9)
    best = p.argmax(-1)
    assert np.array_equal(piece.top1, q.argmax(-1) == best)
    assert np.array_equal(piece.top5, (q.topk(5, -1).indices == best[:, None]).any(-1))
    with pytest.raises(InputError, match="NaN"):
        compare_piece(got * np.nan, wanted, IDS[0])


def test_pieces_are_read_in_chunks_from_an_empty_cache() -> None:
    engine, model = EagerEngine(tiny_model(), max_seq_len=200), tiny_model()
    assert model.decoder is not None
    for ids in IDS[:2]:
        with torch.no_grad():
            hidden = model(torch.from_numpy(ids)[None])
            wanted = model.decoder.logits(hidden, torch.arange(70))[0].numpy()
        assert np.abs(piece_logits(engine, ids) - wanted).max() < 1e-4
    tokens, _ = generate(model, torch.from_numpy(IDS[:1]), max_new_tokens=20)
    assert continuation(engine, IDS[0], 20) == tokens


def test_a_model_is_no_distance_from_itself() -> None:
    engine, reference = (EagerEngine(tiny_model(), max_seq_len=200) for _ in range(2))
    calls: list[tuple[int, int]] = []
    found = measure_text(engine, IDS, reference, lambda done, total: calls.append((done, total)))
    assert found["kl_mean"] == found["kl_p99"] == 0 and found["top1_agreement"] == found["top5_agreement"] == 1
    assert found["greedy_texts_equal"] == 1 and found["greedy_tokens_equal"] == 64
    assert found["tokens"] == IDS.size and calls[-1] == (3, 3)
    assert "kl_mean" not in measure_text(engine, IDS, None, lambda done, total: None)


def test_pieces_that_cannot_fit_are_refused() -> None:
    with pytest.raises(InputError, match="pieces of 70 tokens"):
        measure_text(EagerEngine(tiny_model(), max_seq_len=64), IDS, None, lambda done, total: None)


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_command_line(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the rain. " * 40)
    done = cli("nano", "--text", text, "--against", "nano", "--pieces", 2, "--length", 64, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kl_mean"] == 0 and found["pieces"] == 2 and found["perplexity"] > 1
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for arguments, says in (
        (("nano", "--text", tmp_path / "none"), "cannot be read"),
        (("nano", "--text", tmp_path / "binary"), "is not UTF-8"),
        (("nano", "--text", text, "--length", 100_000), "wanted at least one piece"),
        (("nano", "--text", text, "--length", 64, "--against", "tiny"), ""),
        (("nano", "--data", tmp_path, "--against", "nano"), "name one with --text"),
        (("nano", "--text", text, "--budget-study"), "--budget-study is about questions"),
    ):
        done = cli(*arguments)
        assert done.returncode == 1 and "Traceback" not in done.stderr and says in done.stderr, done.stderr
    assert cli("nano").returncode == cli("nano", "--text", text, "--data", tmp_path).returncode == 2
