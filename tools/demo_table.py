"""The demo's last word: the latency of each engine's answer, side by side, from the JSON lines of `penguin-edge run`.

python tools/demo_table.py build/demo/nano-onnx.json build/demo/nano-executorch.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from penguin_edge.runtime.core.report import PHASES

KINDS = (("keys", "key"), ("intermediates", "intermediate"), ("dropped", "dropped"))


def main(paths: list[str]) -> int:
    runs = [json.loads(Path(path).read_text(encoding="utf-8").strip().splitlines()[-1]) for path in paths]
    rows = [("milliseconds", [run["engine"] for run in runs])]
    rows += [(phase, [f"{run['phases_ms'][phase]:.1f}" for run in runs]) for phase in PHASES if phase != "decode_image"]
    rows += [
        ("time to first token", [f"{run['first_token_ms']:.1f}" for run in runs]),
        ("per token after it", [f"{1e3 / run['tokens_per_s']:.2f}" for run in runs]),
        ("loading", [f"{run['load_ms']:.1f}" for run in runs]),
        ("peak memory, MB", [f"{run['peak_mb']:.0f}" for run in runs]),
    ]
    print("\nA real clip. The times are real; penguin-nano knows no such pictures, so its answer says nothing.\n")
    for name, cells in rows:
        print(f"  {name:<20}" + "".join(f"{cell:>14}" for cell in cells))
    first = runs[0]
    kinds = ", ".join(f"{first[count]} {name}" for count, name in KINDS)
    print(f"\n  {first['frames']} frames: {kinds}; {first['visual_tokens']} visual tokens of {first['budget']}")
    print(f"  and {first['timestamp_tokens']} text tokens of time stamps")
    same = all(run["token_ids"] == first["token_ids"] for run in runs)
    print(f"  the engines gave {'the same tokens' if same else 'DIFFERENT tokens'}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
