"""What a command reads, it never writes over: neither by a slip in its options nor by a second process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import CLIP, asked_pictures

from penguin_edge.commands.cli import main
from penguin_edge.config import ImageConfig
from penguin_edge.errors import CheckpointError, InputError
from penguin_edge.folders import held
from penguin_edge.tra.layout import media_source

CASES = {
    "a picture over its clip": ["plan", "CLIP", "--budget", "100", "-o", "CLIP"],
    "through a link": ["plan", "CLIP", "--budget", "100", "-o", "LINK"],
    "a page over the clip": ["bench", "MODEL", "--stream", "CLIP", "--html", "CLIP"],
    "numbers over the manifest": ["bench", "MODEL", "-o", "MODEL/config.json"],
    "two results in one file": ["bench", "MODEL", "-o", "NEW", "--csv", "NEW"],
    "answers over annotations": ["eval", "MODEL", "--data", "DATA", "--answers", "DATA/annotations.jsonl"],
    "answers over those compared with": ["eval", "MODEL", "--data", "DATA", "--over", "OLD", "--answers", "OLD"],
    "a trace over the clip": ["stream", "MODEL", "--source", "CLIP", "--target-first-token", "9", "--trace", "CLIP"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_result_is_not_written_over_what_is_read(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "old.jsonl").write_text("{}\n")
    shutil.copyfile(CLIP, tmp_path / "clip.mp4")
    (tmp_path / "link.png").symlink_to(tmp_path / "clip.mp4")
    names = {"CLIP": "clip.mp4", "LINK": "link.png", "NEW": "new", "OLD": "old.jsonl"}
    names |= {"DATA": str(asked_pictures(tmp_path / "data", 2).name), "MODEL": "model"}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = [
        "/".join([str(tmp_path / names[word.split("/")[0]]), *word.split("/")[1:]])
        if word.split("/")[0] in names
        else word
        for word in CASES[case]
    ]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "it is read" in said or "two of the options" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    data = asked_pictures(tmp_path / "data", 2)
    out = tmp_path / "run"
    command = ["train", "--stage", "4", "--model", "tiny", "--random-weights", "--data", str(data), "--max-steps", "1"]
    command += ["--batch-size", "1", "--precision", "fp32", "--device", "cpu", "--workers", "0", "--out", str(out)]
    with held(out, CheckpointError):
        assert main(command) == 1
        assert "another process works there" in capsys.readouterr().err
    assert not out.exists() or not any(out.iterdir())


def test_a_resume_that_is_refused_leaves_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    data = asked_pictures(tmp_path / "data", 2)
    out = tmp_path / "run"
    (out / "model").mkdir(parents=True)
    (out / "model" / "config.json").write_text("{}")
    log = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2))
    (out / "log.jsonl").write_text(log)
    command = ["train", "--stage", "4", "--model", "tiny", "--random-weights", "--data", str(data), "--max-steps", "2"]
    command += ["--batch-size", "1", "--precision", "fp32", "--device", "cpu", "--workers", "0", "--out", str(out)]
    assert main([*command, "--resume"]) == 1
    assert "move it away" in capsys.readouterr().err
    assert (out / "log.jsonl").read_text() == log


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4", "fps": 2},
        {"type": "video", "video": {"video_path": "a.mp4"}, "max_frames": 3},
        {"type": "video", "video": {"video_path": "a.mp4", "nframes": 3}},
    ],
)
def test_a_setting_where_it_is_not_read_is_refused(part: dict[str, object]) -> None:
    with pytest.raises(InputError, match="where it is not read"):
        media_source(part, ImageConfig())


def test_a_message_writes_nothing_but_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = [{"type": "video", "video": {"video_path": str(CLIP), "start_time": "\x1b[2Jx\ny" * 3000}}]
    (tmp_path / "talk.json").write_text(json.dumps([{"role": "user", "content": content}]))
    assert main(["run", "nano", "--conversation", str(tmp_path / "talk.json")]) == 1
    lines = capsys.readouterr().err.strip().split("\n")
    assert "\x1b" not in lines[-1] and lines[-1].startswith("penguin-edge: got start") and len(lines[-1]) < 300
