"""Everything that is compared, made once and kept: a checkpoint, the peers' models, our bundles, the peers' packages.

| in WORK/SHAPE                               | what                                                                 |
|---------------------------------------------|----------------------------------------------------------------------|
| hf                                          | a Hugging Face folder, random weights in bf16: all others come of it |
| q4_0.gguf                                   | llama.cpp's own quantizer: Q4_0; the head, also the embedding, Q6_K  |
| genai                                       | onnxruntime-genai's own builder: int4 for the CPU, see GENAI         |
| onnx-int4 onnx-int4-kv8 onnx-int8-prefill executorch-int4 | `penguin-edge export`                                  |

WORK/venv has the peers, in the versions of INSTALL. What is there is used as it is: remove it to make it again. A piece
gets its name when it is complete.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from shapes import CONTEXT, SHAPES, VOCAB

INSTALL = (
    "torch==2.13.0", "transformers==5.23.0", "onnx==1.23.2", "onnx-ir==1.1.0", "onnxruntime==1.31.1",
    "onnxruntime-genai==0.18.0", "gguf==0.19.0", "llama-cpp-python==0.3.36",
)  # fmt: skip
"""llama.cpp is built from source, for the processor that it then runs on."""
FIND = "import importlib.util as u; assert all(map(u.find_spec, ('gguf', 'llama_cpp', 'onnxruntime_genai')))"
"""Fails in an interpreter that lacks a peer."""
GENAI = ("accuracy_level=4", "block_size=32", "prune_lm_head=true")
"""8-bit activations, blocks of 32 (the head likewise), logits of the last position only."""
CAPACITY = 4352
"""Positions that our bundles hold."""
FEW = ("--calibration-samples", "2", "--calibration-length", "64")
"""Random weights need no more."""
BUNDLES: dict[str, tuple[str, ...]] = {
    "onnx int4": ("onnx", "int4"),
    "onnx int4 kv8": ("onnx", "int4", "--kv-cache-dtype", "int8", *FEW),
    "onnx int8-prefill": ("onnx", "int8-prefill", *FEW),
    "executorch int4": ("executorch", "int4"),
}
"""Contestant -> target, precision and more options of `penguin-edge export`."""
PEER_FILES = {"llama.cpp": "q4_0.gguf", "llama.cpp plain": "q4_0.gguf", "genai": "genai"}


def has_peers(python: str | Path) -> bool:
    """Whether an interpreter is there and has the peers."""
    try:
        return not subprocess.run([python, "-c", FIND], stderr=subprocess.DEVNULL, check=False).returncode
    except OSError:
        return False


def peer_python(work: Path, given: str | None, torch_index: str) -> str:
    """The interpreter that has the peers: the given one, or that of WORK/venv, which is made when it lacks them."""
    python = given or str(work / "venv" / "bin" / "python")
    if has_peers(python):
        return python
    if given:
        raise SystemExit(
            f"{given} is no interpreter with the peers: {given} -m pip install {' '.join(INSTALL)}, or leave out "
            "--peer-python to have one made"
        )
    note(f"{work}/venv: installing the peers (llama.cpp is compiled, which takes minutes)")
    run([sys.executable, "-m", "venv", work / "venv"], f"{work}/venv cannot be made")
    index = ["--index-url", torch_index] if torch_index else []
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, *index, "--no-deps", INSTALL[0]], f"{INSTALL[0]} cannot be installed")
    run([*pip, *INSTALL], f"the peers cannot be installed in {work}/venv")
    return python


def prepare(work: Path, name: str, python: str) -> None:
    """Make what is missing of one shape."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    hf = folder / "hf"
    if not hf.exists():
        make_checkpoint(hf, name)
    if not (folder / "q4_0.gguf").exists():
        note(f"{folder}/q4_0.gguf")
        run([python, __file__, folder, name], f"{folder}/q4_0.gguf cannot be made")
    if not (folder / "genai").exists():
        note(f"{folder}/genai")
        part, cache = fresh(folder / "genai.part"), folder / "cache"
        command: list[str | Path] = [python, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        command += ["-i", hf, "-o", part, "-c", cache, "--extra_options", *GENAI]
        run(command, f"{folder}/genai cannot be made")
        shutil.rmtree(cache, ignore_errors=True)
        part.rename(folder / "genai")
    for bundle, (target, precision, *more) in BUNDLES.items():
        out = bundle_folder(folder, bundle)
        if not out.exists():
            begin = time.monotonic()
            note(f"{out}")
            command = [sys.executable, "-m", "penguin_edge", "export", "--model", hf, "--target", target]
            command += ["--quant", precision, "--max-seq-len", str(CAPACITY), "--no-verify", *more, "-o", out]
            run(command, f"{out} cannot be exported")
            note(f"{out}: {time.monotonic() - begin:.0f} s")


def bundle_folder(folder: Path, bundle: str) -> Path:
    """Where a bundle of ours lies."""
    return folder / bundle.replace(" ", "-")


def make_checkpoint(folder: Path, name: str) -> None:
    """Random weights of a shape in bf16, as a Hugging Face folder."""
    from decoder_speed import make

    note(f"{folder}")
    part = fresh(folder.with_name(folder.name + ".part"))
    make(part, name)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}  # genai's builder copies a tokenizer; none is used
    (part / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
    part.rename(folder)


def write_gguf(folder: Path, name: str) -> None:
    """`hf` as GGUF in bf16 without a vocabulary, then as Q4_0 by llama.cpp's quantizer."""
    import gguf
    import llama_cpp
    import torch
    from safetensors import safe_open

    shape = SHAPES[name]
    middle, part = folder / "bf16.gguf", folder / "q4_0.gguf.part"
    writer = gguf.GGUFWriter(middle, "qwen3")
    writer.add_tokenizer_model("no_vocab")
    numbers = {"vocab_size": VOCAB, "context_length": CONTEXT, "embedding_length": shape.width,
               "block_count": shape.layers, "feed_forward_length": shape.feed_forward, "head_count": shape.heads,
               "head_count_kv": shape.kv_heads, "key_length": shape.head_dim, "value_length": shape.head_dim,
               "layer_norm_rms_eps": 1e-6, "rope_freq_base": 1e6}  # fmt: skip
    for key, value in numbers.items():
        getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, shape.layers)
    for file in sorted((folder / "hf").glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118, it is no dict
                tensor, known = stored.get_tensor(key), names.get_name(key, (".weight",))
                if tensor.ndim == 1:
                    writer.add_tensor(known, tensor.float().numpy())
                else:
                    writer.add_tensor(known, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(str(middle).encode(), str(part).encode(), ctypes.byref(options)):
        raise SystemExit(f"{middle}: llama.cpp cannot quantize it")
    middle.unlink()
    part.rename(folder / "q4_0.gguf")


def run(command: list[str | Path], failed: str) -> None:
    """Run a command; what it prints goes to stderr. Ends the program with one sentence if it fails."""
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{failed}: {Path(command[0]).name} ended with status {done.returncode}, its words are above")


def fresh(folder: Path) -> Path:
    """The path, with nothing there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def note(text: str) -> None:
    """Say how far it is, with the time."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), sys.argv[2])
