"""What key-frame detection costs per frame, in milliseconds of one core, frames scaled to 1280x720.

python bench/peers/keyframe_speed.py CLIP … [--frames 150] [--repeat 3]

Every pass pushes the same frames through a new detector; a frame costs the least of its passes, which leaves other
load on the machine out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice

import cv2
import numpy as np

from penguin_edge.media.frames import read_video
from penguin_edge.tra.keyframes import KeyFrameDetector


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", nargs="+")
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    rows = {}
    for clip in args.clip:
        frames = [
            cv2.resize(f.pixels, (1280, 720)) for f in islice(read_video(clip, fps=None, max_frames=None), args.frames)
        ]
        for mode in ("fast", "exact"):
            passes = []
            for _ in range(args.repeat):
                detector, costs = KeyFrameDetector(mode), []  # type: ignore[arg-type]
                for frame in frames:
                    begin = time.process_time_ns()
                    detector.push(frame)
                    costs.append((time.process_time_ns() - begin) / 1e6)
                passes.append(costs)
            best = np.min(passes, axis=0)
            found = {"mean": best.mean(), "p50": np.median(best), "p95": np.quantile(best, 0.95)}
            rows[f"{clip} {mode}"] = {name: round(float(value), 2) for name, value in found.items()}
            print(clip, mode, rows[f"{clip} {mode}"])
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
