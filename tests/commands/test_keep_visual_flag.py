"""`--keep-visual` of each verb that has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import CLIP

from penguin_edge.commands.cli import main

SHORT = ["--max-new-tokens", "4", "--threads", "1", "--json"]
BUNDLE = Path(__file__).parents[1] / "bundles" / "onnx"


def last_json(capsys: pytest.CaptureFixture[str], *args: Any) -> dict[str, Any]:
    assert main([*map(str, args)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return found


def test_run_says_what_is_encoded_and_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", "tiny", "--video", CLIP, "--prompt", "What?", "--max-frames", 4, "--budget", 60, *SHORT]
    plain = last_json(capsys, *asked)
    assert plain["encoded_tokens"] == plain["visual_tokens"]
    kept = last_json(capsys, *asked, "--keep-visual", 0.25)
    assert kept["visual_tokens"] <= 60 < 2 * kept["visual_tokens"] and kept["encoded_tokens"] > 3 * 60
    assert last_json(capsys, *asked, "--keep-visual", 1)["token_ids"] == plain["token_ids"]


def test_plan_counts_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    found = last_json(
        capsys, "plan", CLIP, "--budget", 300, "--fps", 1, "--max-frames", 8, "--keep-visual", 0.25, "--json"
    )
    assert 150 < found["total_tokens"] == sum(frame["tokens"] for frame in found["frames"]) <= 300
    for frame in found["frames"]:
        encoded = frame["width"] * frame["height"] // 28**2
        assert frame["tokens"] == (max(1, encoded // 4) if encoded else 0)


def test_stream_keeps_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["stream", "tiny", "--source", CLIP, "--prompt", "What?", "--fast", "--duration", 4, *SHORT]
    found = last_json(capsys, *asked, "--budget", 80, "--keep-visual", 0.3, "--cache", "rebase")
    assert found["max_live_visual_tokens"] <= 80 and len(found["answers"]) == 1


@pytest.mark.parametrize("verb", ["run", "plan", "stream", "eval"])
@pytest.mark.parametrize("wrong", ["0", "1.5", "half", "nan"])
def test_what_is_no_share_is_wrong_usage(capsys: pytest.CaptureFixture[str], verb: str, wrong: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "tiny", "--keep-visual", wrong])
    assert ended.value.code == 2 and "is not a share above 0 and at most 1" in capsys.readouterr().err


def test_what_cannot_be_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for says, args in (
        ("take shrink='encode'", ["stream", "tiny", "--source", CLIP, "--shrink", "pool"]),
        ("export the model again", ["run", BUNDLE, "--video", CLIP, "--prompt", "What?"]),
        ("export the model again", ["stream", BUNDLE, "--source", CLIP]),
    ):
        assert main([*map(str, args), "--keep-visual", "0.5"]) == 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("penguin-edge")]
        assert len(said) == 1 and says in said[0]
