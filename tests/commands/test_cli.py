"""The command line as a user meets it: real processes, real files, one sentence for every bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from helpers import CLIP
from PIL import Image

from penguin_edge import machine
from penguin_edge.bundle.folder import Bundle
from penguin_edge.commands.common import open_model
from penguin_edge.errors import MemoryLimitError
from penguin_edge.export.verify import reference_arrays
from penguin_edge.model.checkpoint import Checkpoint, save

SHORT = ["--max-new-tokens", "6"]


def cli(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penguin_edge", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def refused(done: subprocess.CompletedProcess[str], *says: str, code: tuple[int, ...] = (1,)) -> None:
    """One clear sentence, no traceback, the right exit code."""
    assert done.returncode in code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("penguin-edge")]
    assert len(message) == 1, done.stderr
    for words in says:
        assert words in message[0], (words, message[0])


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "tiny-onnx"
    done = cli("export", "--model", "tiny", "--random-weights", "--target", "onnx", "--max-seq-len", 1024, "-o", out)
    assert done.returncode == 0, done.stderr
    assert "KV cache of 1024 positions" in done.stderr
    return out


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


# --- good input -------------------------------------------------------------------------------------------------------


def test_verify_from_check_data_and_against_the_checkpoint(bundle: Path) -> None:
    for more in ([], ["--against", "tiny"]):
        result = last_json(cli("verify", bundle, "--json", *more))
        assert result["passed"] is True
        names = [stage["name"] for stage in result["stages"]]
        assert names == [
            "pixels",
            "patches",
            "encoder",
            "projector",
            "embedding",
            "prefill",
            "decode",
            "tokens",
            "truncate",
            "positions",
        ]
        assert all(stage["passed"] and {"max_abs", "cosine"} <= stage.keys() for stage in result["stages"])
        assert json.loads((bundle / "verify.json").read_text()) == result
    assert last_json(cli("info", bundle, "--json"))["verified"]["passed"] is True


def test_verify_against_other_weights_fails(bundle: Path) -> None:
    done = cli("verify", bundle, "--json", "--against", "tiny", "--seed", 1)
    assert done.returncode == 1
    result = json.loads(done.stdout.strip().splitlines()[-1])
    failed = {stage["name"] for stage in result["stages"] if not stage["passed"]}
    assert {"encoder", "projector", "embedding", "prefill", "decode"} <= failed and "pixels" not in failed


def test_run_answers_about_a_clip_the_same_as_eager(bundle: Path) -> None:
    flags = ["--video", CLIP, "--prompt", "What happens?", "--max-frames", 6, "--budget", 200, "--json", *SHORT]
    result = last_json(cli("run", bundle, *flags))
    wanted = "text token_ids finish_reason frames keys intermediates dropped visual_tokens budget first_token_ms"
    assert {*wanted.split(), "tokens_per_s", "peak_mb"} <= result.keys()
    assert result["frames"] == 6 == result["keys"] + result["intermediates"] + result["dropped"]
    assert 0 < result["visual_tokens"] <= 200 == result["budget"]
    assert result["finish_reason"] in ("stop", "length") and len(result["token_ids"]) <= 6
    assert {"decode_video", "plan", "preprocess", "encode", "project", "prefill"} <= result["phases_ms"].keys()
    eager = last_json(cli("run", "tiny", *flags))
    assert eager["token_ids"] == result["token_ids"] and eager["text"] == result["text"]


def test_run_prints_the_answer_and_reports_on_stderr(bundle: Path) -> None:
    done = cli(
        "run", bundle, "--prompt", "Hello", "--seed", 3, "--temperature", 0.8, "--top-k", 5, "--top-p", 0.9, *SHORT
    )
    assert done.returncode == 0 and "time to first token" in done.stderr and "tokens/s" in done.stderr
    again = cli(
        "run", bundle, "--prompt", "Hello", "--seed", 3, "--temperature", 0.8, "--top-k", 5, "--top-p", 0.9, *SHORT
    )
    assert again.stdout == done.stdout


def test_conversation_file_equals_flags(bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(np.arange(84 * 84 * 3, dtype=np.uint8).reshape(84, 84, 3)).save(picture)
    content = [{"type": "image", "image": {"image_path": str(picture)}}, {"type": "text", "text": "What?"}]
    (tmp_path / "c.json").write_text(json.dumps([{"role": "user", "content": content}]))
    by_file = last_json(cli("run", bundle, "--conversation", tmp_path / "c.json", "--json", *SHORT))
    by_flags = last_json(cli("run", bundle, "--image", picture, "--prompt", "What?", "--json", *SHORT))
    assert by_file["token_ids"] == by_flags["token_ids"] and by_file["images"] == 1


@pytest.mark.parametrize("tra", ["adaptive", "strict", "reference"])
def test_plan_json(tra: str, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    result = last_json(cli("plan", CLIP, "--budget", 500, "--tra", tra, "--json", "-o", picture))
    assert len(result["frames"]) == result["keys"] + result["intermediates"] + result["dropped"]
    assert result["total_tokens"] == sum(frame["tokens"] for frame in result["frames"])
    assert all(frame["tokens"] == 0 for frame in result["frames"] if frame["kind"] == "dropped")
    assert {"time", "kind", "similarity", "width", "height", "tokens"} <= result["frames"][0].keys()
    assert result["budget"] == 500 and (tra == "reference" or result["total_tokens"] <= 500)
    with Image.open(picture) as image:
        assert image.width > 300


def test_plan_draws_in_the_terminal() -> None:
    done = cli("plan", CLIP, "--budget", 500)
    assert done.returncode == 0 and "key" in done.stdout


def test_doctor_and_info() -> None:
    doctor = last_json(cli("doctor", "--json"))
    assert (
        doctor["memory_bytes"] > 0
        and doctor["packages"]["numpy"]
        and {"onnx", "executorch"} <= doctor["engines"].keys()
    )
    assert cli("doctor").returncode == 0
    info = last_json(cli("info", "2b", "--json"))
    assert info["total_parameters"] == 2_167_941_120
    assert "2,167,941,120" in cli("info", "2b").stdout


def test_check_data_are_verified_without_torch(bundle: Path) -> None:
    code = (
        "import sys; from penguin_edge.commands.cli import main;"
        f"code = main(['verify', {str(bundle)!r}, '--json']); sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_overwriting_spares_files_of_the_user(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    export = ["export", "--model", "tiny", "--random-weights", "--overwrite", "-o", copy]
    refused(cli(*export), "notes.txt")
    (copy / "notes.txt").unlink()
    assert cli(*export).returncode == 0 and cli("verify", copy).returncode == 0
    assert not list(copy.parent.glob(".*"))


def test_reexport_needs_overwrite(copy: Path) -> None:
    before = (copy / "bundle.json").read_bytes()
    refused(cli("export", "--model", "tiny", "--random-weights", "-o", copy), "exists already", "--overwrite")
    assert (copy / "bundle.json").read_bytes() == before


# --- bad input --------------------------------------------------------------------------------------------------------


def write_clip(path: Path, frames: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            image = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i % 255, np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


def bad_clip(kind: str, folder: Path) -> Path:
    path = folder / "clip.mp4"
    if kind == "truncated":
        path.write_bytes(CLIP.read_bytes()[:200_000])
    elif kind == "corrupted":
        path.write_bytes(b"\x00\x01" * 50_000)
    elif kind == "text":
        path.write_text("this is not a video")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "empty folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["missing", "truncated", "corrupted", "text", "empty", "empty folder"])
def test_bad_clips(kind: str, tmp_path: Path) -> None:
    path = bad_clip(kind, tmp_path)
    refused(cli("plan", path, "--budget", 100), path.name)


def test_bad_clip_in_run(bundle: Path, tmp_path: Path) -> None:
    refused(cli("run", bundle, "--video", bad_clip("truncated", tmp_path), "--prompt", "x"), "clip.mp4")
    refused(cli("run", bundle, "--image", bad_clip("text", tmp_path), "--prompt", "x"), "clip.mp4")


def test_zero_frames(tmp_path: Path) -> None:
    refused(cli("plan", write_clip(tmp_path / "c.mp4", 30), "--budget", 100, "--start", 50), "c.mp4")


def test_extreme_aspect(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (2100, 2)).save(tmp_path / "wide.png")
    refused(cli("run", bundle, "--image", tmp_path / "wide.png", "--prompt", "x"), "1000")


@pytest.mark.parametrize("budget", [0, -3])
def test_budget_below_one(bundle: Path, budget: int) -> None:
    refused(cli("plan", CLIP, "--budget", budget), "budget")
    refused(cli("run", bundle, "--video", CLIP, "--prompt", "x", "--budget", budget), "budget")


def test_too_long_a_prompt(bundle: Path) -> None:
    refused(cli("run", bundle, "--prompt", "word " * 2000), "max_seq_len is 1024", "shorten")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seed", "-1"], "seed"),
        (["--video", str(CLIP), "--fps", "1e7"], "fps"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-k", "-1"], "top_k"),
        (["--conversation", "no-such.json"], "leave out"),
    ],
)
def test_bad_flags(bundle: Path, flags: list[str], says: str) -> None:
    refused(cli("run", bundle, "--prompt", "x", *flags), says)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '[{"role": "user"}]',
        '[{"role": "user", "content": [{"type": "video"}]}]',
        '[{"role": "user", "content": [{"type": "image", "image": 5}]}]',
        "[3]",
    ],
)
def test_bad_conversations(bundle: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    refused(cli("run", bundle, "--conversation", tmp_path / "c.json"), "wanted")


def test_usage_errors_exit_with_two() -> None:
    for args in (["run"], ["plan", CLIP], ["nonsense"], [], ["run", "x", "--threads", "0", "--prompt", "x"]):
        assert cli(*args).returncode == 2


def test_no_prompt(bundle: Path) -> None:
    refused(cli("run", bundle), "--prompt")


def test_a_flag_raises_the_limit_on_pixels(tmp_path: Path) -> None:
    """For one frame more than an animation may have by default, and beyond the limit of Pillow itself."""
    clip = tmp_path / "large.gif"
    Image.new("P", (8000, 4500)).save(clip, save_all=True, append_images=[Image.new("P", (8000, 4500), 1)])
    plan = ("plan", clip, "--budget", 16, "--max-frames", 1, "--json")
    refused(cli(*plan), "36,000,000 pixels", "max_pixels")
    assert last_json(cli(*plan, "--max-pixels", 200_000_000))["frames"]
    refused(cli(*plan, "--max-pixels", 0), "--max-pixels", code=(2,))


def test_a_flag_sets_the_limit_on_packets(tmp_path: Path) -> None:
    plan = ("plan", write_clip(tmp_path / "c.mp4", 30), "--budget", 16, "--json")
    refused(cli(*plan, "--max-packets", 29), "more than 29 packets", "max_packets")
    assert last_json(cli(*plan, "--max-packets", 30))["frames"]


def test_a_closed_stdout_is_an_error(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mp4", 30)
    command = f"{sys.executable} -m penguin_edge plan {clip} --budget 600 --json >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=300, check=False)
    refused(done, "Bad file descriptor")


def test_unknown_target_lists_the_known_ones(tmp_path: Path) -> None:
    done = cli("export", "--model", "tiny", "--random-weights", "--target", "coreml", "-o", tmp_path / "out")
    refused(done, "unknown target 'coreml'", "executorch, onnx")


def test_refused_exports(tmp_path: Path) -> None:
    export = ["export", "-o", tmp_path / "out", "--model"]
    refused(cli(*export, "tiny"), "--random-weights")
    refused(cli(*export, "nothing-here"), "neither a checkpoint folder")
    refused(cli(*export, "tiny", "--random-weights", "--quant", "bf16"), "bf16", "fp32, fp16")
    refused(cli(*export, "tiny", "--random-weights", "--max-seq-len", 9999), "9999", "4096")
    refused(cli(*export, "2b", "--random-weights", "--max-ram", "1GB"), "GB", "machine")
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []


def test_models_that_cannot_fit_are_refused_before_they_are_made(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are the weights' own: 2.17 and 8.6 billion in bf16, and a decoder beside the bundle."""
    monkeypatch.setattr(machine, "total_memory", lambda: 4_300_000_000)
    for name in ("2b", "8b"):
        with pytest.raises(MemoryLimitError, match=r"this machine offers 4\.30 GB") as error:
            open_model(name, threads=None, max_seq_len=4096)
        assert re.search({"2b": r"needs about 5\.3", "8b": r"needs about 18\."}[name], str(error.value))
    open_model("tiny", threads=None, max_seq_len=4096)
    opened, tiny = Bundle.read(bundle), Checkpoint.open("tiny", note=lambda line: None)
    size = sum(entry.bytes for entry in opened.manifest.files.values())
    monkeypatch.setattr(machine, "total_memory", lambda: size)
    with pytest.raises(MemoryLimitError, match="--against"):
        reference_arrays(opened, tiny)


def test_wrong_tokenizer(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(__file__).parents[1] / "golden" / "vlm", tmp_path / "vlm"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<|im_start|>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(cli("export", "--model", folder, "-o", tmp_path / "out"), "<|im_start|>", "tokenizer.json")
    refused(cli("run", folder, "--prompt", "x"), "tokenizer.json")


def change(folder: Path, how: str) -> None:
    manifest = folder / "bundle.json"
    data = json.loads(manifest.read_text())
    if how == "flipped byte":
        name = data["graphs"]["decoder"]["file"]
        path = max((folder / n for n in data["files"] if n.startswith("decoder")), key=lambda p: p.stat().st_size)
        assert name
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif how == "flipped byte in the manifest":
        manifest.write_text(manifest.read_text().replace("1024", "1025", 1))
    elif how == "schema":
        manifest.write_text(json.dumps({**data, "schema": 99}))
    elif how == "missing file":
        (folder / data["graphs"]["encoder"]["file"]).unlink()
    elif how == "shorter file":
        (folder / "embedding.bin").write_bytes((folder / "embedding.bin").read_bytes()[:-1])
    elif how == "no manifest":
        manifest.unlink()
    elif how == "broken manifest":
        manifest.write_text("{")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("flipped byte", "SHA-256"),
        ("flipped byte in the manifest", "hash"),
        ("schema", "schema version 99"),
        ("missing file", "is missing"),
        ("shorter file", "bytes, wanted"),
        ("broken manifest", "damaged"),
    ],
)
def test_damaged_bundles(copy: Path, how: str, says: str) -> None:
    change(copy, how)
    refused(cli("verify", copy), says, "export")
    refused(cli("run", copy, "--prompt", "x"), says)


def test_not_a_bundle(copy: Path, tmp_path: Path) -> None:
    change(copy, "no manifest")
    refused(cli("run", copy, "--prompt", "x"), "bundle.json")
    refused(cli("verify", tmp_path / "nothing"), "no such folder")


def test_engine_not_installed(bundle: Path, tmp_path: Path) -> None:
    """A package of the same name that cannot be imported stands for one that is not there."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('No module named onnxruntime')")
    done = cli("run", bundle, "--prompt", "x", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    refused(done, "pip install 'penguin-edge[onnx]'")


def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path) -> None:
    """A limit on file size stands for a full disk: writing the weights fails in the middle."""
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"sys.argv = 'penguin-edge export --model tiny --random-weights -o {tmp_path / 'out'}'.split();"
        "runpy.run_module('penguin_edge', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    refused(done)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_an_export_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "penguin_edge",
        "export",
        "--model",
        "tiny",
        "--random-weights",
        "-o",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(".out.*/*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 128 + number
    assert "Traceback" not in process.stderr.read()
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_an_answer_cleanly(tmp_path: Path) -> None:
    """The model has no token that ends an answer, and the pipe holds less than the answer: it cannot end first."""
    checkpoint = Checkpoint.open("tiny", note=lambda line: None)
    checkpoint.config = dataclasses.replace(checkpoint.config, eos_token_ids=())
    save(checkpoint.load(), tmp_path / "endless", checkpoint.tokenizer)
    flags = ["--prompt", "x", "--max-new-tokens", "4000", "--max-seq-len", "4096", "--temperature", "1", "--json"]
    command = [sys.executable, "-m", "penguin_edge", "run", str(tmp_path / "endless"), *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, pipesize=4096
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    report = json.loads(out.strip().splitlines()[-1])
    assert report["finish_reason"] == "interrupted" and 0 < len(report["token_ids"]) < 4000
