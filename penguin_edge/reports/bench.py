"""A measurement (`penguin-bench/1`) as a table of all samples, and as one page with pictures.

| column of the table | what                                                                                          |
|---------------------|-----------------------------------------------------------------------------------------------|
| test                | as in `rows`; `video …` and `stream …` for other samples                                      |
| count, depth        | of a test, else empty                                                                         |
| sample              | from 0                                                                                        |
| time_s              | seconds of the stream or of the measurement, where a sample has a time                        |
| value, unit         | ms, tokens, MB, W, °C, frames                                                                 |
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from penguin_edge.machine import human_bytes
from penguin_edge.reports.figures import Drawing, bandwidth, ecdf, number, over_time, picture, stacked, strips, timeline
from penguin_edge.reports.figures import require_matplotlib as require_matplotlib
from penguin_edge.reports.kept_tokens import kept_against_target

Result = Mapping[str, Any]
Line = tuple[Any, ...]

COLUMNS = ("test", "count", "depth", "sample", "time_s", "value", "unit")
PACKAGES = ("penguin-edge", "onnxruntime", "executorch", "torch", "numpy", "av")
"""Versions that the page shows."""
UNITS = {"memory_mb": "MB", "power_w": "W", "temperature_c": "°C"}

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --muted: #5f6873; --grid: #dfe3e8;
 --late: #c62f2f; --c1: #2a6fc9; --c2: #d9622b; --c3: #16936a; --c4: #c08a00; --c5: #cf5a8c; --c6: #3f7d20;
 --c7: #6a4fc2; --c8: #7a5a3a }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2127; --ink: #e8ebef;
 --muted: #a0a9b4; --grid: #333a43; --late: #ff7b72; --c1: #5b9cf0; --c2: #ee8a55; --c3: #3fc495; --c4: #e0b23e;
 --c5: #ef8bb4; --c6: #85c46a; --c7: #a994f5; --c8: #c4a07c } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 24px 16px 48px; max-width: 920px; background: var(--page); color: var(--ink);
 font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 36px 0 8px }
h3 { font-size: 15px; margin: 16px 0 4px }
p { margin: 4px 0 12px; max-width: 72ch; overflow-wrap: anywhere }
.quiet, figcaption { color: var(--muted) }
figure { margin: 0 }
figcaption { margin: 0 0 8px; max-width: 72ch }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; margin: 20px 0 }
.tiles div { background: var(--card); border-radius: 8px; padding: 10px 14px }
.tiles b { display: block; font-size: 22px; line-height: 1.3 }
.tiles span { color: var(--muted); font-size: 13px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 4px 14px 4px 0; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap }
th { color: var(--muted); font-weight: 500 }
td:first-child, th:first-child, .words td, .words th { text-align: left }
.words td { white-space: normal; overflow-wrap: anywhere; vertical-align: top }
.words td:first-child { white-space: nowrap; color: var(--muted) }
svg { display: block; width: 100%; height: auto }
svg text { font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important }
.narrow { display: none }
@media screen and (max-width: 700px) {
 .wide { display: none } .narrow { display: block; max-width: 440px } .tiles { grid-template-columns: repeat(2, 1fr) }
 table { font-size: 13px } th, td { padding-right: 9px } .words td:first-child { white-space: normal; min-width: 92px }
 .tiles b { font-size: 19px } #latency td:first-child { white-space: normal }
}
@media print {
 body { padding: 0; max-width: none } h2, h3, figcaption { break-after: avoid }
 figure, tr, .tiles { break-inside: avoid }
 .scroll { overflow: visible }
}
"""


def lines_of(result: Result) -> Iterator[Line]:
    """Everything that was sampled, in the columns of `COLUMNS`."""
    for row in result.get("rows", []):
        for i, value in enumerate(row["samples_ms"]):
            yield row["test"], row["count"], row["depth"], i, None, value, "ms"
    video = result.get("video") or {}
    for name, values in video.get("samples", {}).items():
        yield from _plain(f"video {name}", values)
    for kind, phases in video.get("phase_samples_ms", {}).items():
        for name, values in phases.items():
            yield from _plain(f"video {kind} {name}", values)
    for name, values in result.get("samples", {}).items():
        yield from _plain(f"stream {name}", values)
    told = result.get("timeline", {})
    for name in ("age_ms", "budget", "visual_tokens", "kv_tokens"):
        unit = "ms" if name == "age_ms" else "tokens"
        for i, one in enumerate(told.get("frames", [])):
            yield f"timeline {name}", None, None, i, one["time"], one[name], unit
    for i, one in enumerate(told.get("questions", [])):
        yield "timeline first_token_ms", None, None, i, one["time"], one["first_token_ms"], "ms"
    for i, one in enumerate(result.get("decisions", [])):
        for name in ("budget", "frame_tokens", "stride"):
            value = one["to"][name]
            yield f"decision {name}", None, None, i, one["time"], value, "frames" if name == "stride" else "tokens"
    for name, unit in UNITS.items():
        for i, (at, value) in enumerate(told.get(name, [])):
            yield f"timeline {name}", None, None, i, at, value, unit


def _plain(name: str, values: Sequence[float]) -> Iterator[Line]:
    return ((name, None, None, i, None, value, "ms") for i, value in enumerate(values))


def csv_text(result: Result) -> str:
    """All samples, one a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(lines_of(result))
    return out.getvalue()


def html_text(result: Result) -> str:
    """The report.

    Raises:
        TargetUnavailable: matplotlib is not installed.
    """
    require_matplotlib()
    stream = result["what"] == "stream"
    pictures, left_out = _stream_pictures(result) if stream else _model_pictures(result)
    title = f"{result['model']}, {'a stream' if stream else 'stage by stage'}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(_subtitle(result))}</p>',
        _tiles(_stream_tiles(result) if stream else _model_tiles(result)),
        *(_stream_tables(result) if stream else _model_tables(result)),
    ]
    for one in pictures:
        body.append(f'<section id="{one.name}"><h2>{escape(one.title)}</h2><figure>')
        body.append(f"<figcaption>{escape(one.caption)}</figcaption>{''.join(one.svg.values())}</figure>")
        if one.name == "timeline" and result["decisions"]:
            body.append(_decisions(result["decisions"]))
        body.append("</section>")
    if left_out:
        body.append(f'<p class="quiet" id="left-out">{escape(" ".join(left_out))}</p>')
    body.append(_about(result))
    # The result itself, so that the page is all that needs keeping; no `<` may end the element.
    raw = json.dumps(result).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + f'\n<script type="application/json" id="result">{raw}</script>\n</body></html>\n'
    )


def _subtitle(result: Result) -> str:
    parts = [result["engine"], result["precision"] or "", f"{result['threads'] or 'all'} threads"]
    parts += [result["machine"]["processor"], result["time"]]
    return " · ".join(part for part in parts if part)


def _tiles(tiles: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles)
    return f'<div class="tiles">{cells}</div>'


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{number(value)} ms"


def _model_tiles(result: Result) -> list[tuple[str, str]]:
    video, tiles = result["video"], []
    if video:
        tiles += [(f"first token, {kind}", _ms(video["first_token_ms"][kind]["p50"])) for kind in ("cold", "warm")]
        tiles += [("per token after it", _ms(video["tpot_ms"]))]
    for word in ("pp", "tg"):
        first = next(row for row in result["rows"] if row["test"].startswith(word))
        tiles.append((f"tokens/s, {first['test']}", number(first["per_s"])))
    return [*tiles, ("peak memory", f"{number(result['peak_mb'])} MB")]


def _stream_tiles(result: Result) -> list[tuple[str, str]]:
    missed = result["deadline_miss_percent"]
    return [
        ("frames per second, of those that came", f"{number(result['fps_processed'])} of {number(result['fps_in'])}"),
        ("frame age, p95", _ms(result["frame_age_ms"]["p95"])),
        ("first token, p95", _ms(result["first_token_ms"]["warm"]["p95"])),
        ("deadlines missed", "no target" if missed is None else f"{number(missed)} %"),
        ("visual tokens at most", f"{result['max_live_visual_tokens']:,} of {result['budget']:,}"),
        ("peak memory", f"{number(result['peak_mb'])} MB"),
    ]


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    """An HTML table with everything in it escaped; `words` break lines, numbers do not."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="words"' if words else ""
    start = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table id="{name}"{kind}>{start}<tbody>{lines}</tbody></table></div>'


def _three(values: Mapping[str, float | None]) -> list[str]:
    return [number(values[name]) for name in ("p50", "p95", "p99")]


def _model_tables(result: Result) -> list[str]:
    rows = [
        [row["test"], *_three(row["ms"]), number(row["per_s"]), number(row["gb_s"]), str(len(row["samples_ms"]))]
        for row in result["rows"]
    ]
    head = ("test", "p50 ms", "p95", "p99", "per second", "GB/s", "samples")
    found = ["<h2>Every stage alone</h2>", table("rows", head, rows)]
    video = result["video"]
    if video:
        first = video["first_token_ms"]
        lines = [
            ("first token, cold", *_three(first["cold"]), str(len(video["samples"]["cold_ms"]))),
            ("first token, warm", *_three(first["warm"]), str(len(video["samples"]["warm_ms"]))),
            ("between tokens", *_three(video["inter_token_ms"]), str(len(video["samples"]["token_ms"]))),
        ]
        text = (
            f"{video['source']}: {video['frames']} frames, {video['visual_tokens']} visual tokens under a budget of "
            f"{video['budget']}, a prompt of {video['prompt_tokens']} tokens of which the warm question reuses "
            f"{video['reused_tokens']}. “{video['question']}”"
        )
        found += ["<h2>A clip from end to end</h2>", f"<p>{escape(text)}</p>"]
        found.append(table("video", ("", "p50 ms", "p95", "p99", "samples"), lines))
    return found


def _stream_tables(result: Result) -> list[str]:
    first, samples = result["first_token_ms"], result["samples"]
    lines = [
        ("frame age", *_three(result["frame_age_ms"]), str(len(samples["frame_age_ms"]))),
        ("first token, running stream", *_three(first["warm"]), str(len(samples["warm_ms"]))),
        ("first token, new session", *_three(first["cold"]), str(len(samples["cold_ms"]))),
    ]
    dropped = ", ".join(f"{count} {reason}" for reason, count in result["dropped"].items())
    slope = result["memory_slope_mb_per_h"]
    facts = [
        ("frames", f"{result['frames_processed']:,} of {result['frames_in']:,} in {number(result['seconds'])} s"),
        ("dropped", f"{result['frames_dropped']:,}" + (f" ({dropped})" if dropped else "")),
        ("deadlines missed", f"{result['deadline_misses']} of {result['deadlines']}"),
        ("budget", f"{result['budget']:,}, at the end {result['budget_at_end']:,}"),
        ("visual tokens per kept frame", number(result["visual_tokens_per_frame"])),
        ("KV positions at the end", f"{result['live_kv_tokens']:,}"),
        ("encoded again, per frame", number(result["reencodings_per_frame"])),
        ("tokens prefilled again, per frame", number(result["reprefilled_tokens_per_frame"])),
        ("memory grows", "not told below 10 minutes" if slope is None else f"{number(slope)} MB per hour"),
    ]
    head = ("", "p50 ms", "p95", "p99", "samples")
    return ["<h2>Latency</h2>", table("latency", head, lines), "<h2>Stream</h2>", table("stream", (), facts, True)]


def _model_pictures(result: Result) -> tuple[list[Drawing], list[str]]:
    rows, video = result["rows"], result["video"]
    found = []
    if video:
        bars = [(f"first token, {kind}", video["phases_ms"][kind]) for kind in ("cold", "warm")]
        told = "The round of the median. Cold is a new session, warm the same question again."
        found.append(picture("breakdown", "Where the first token's time goes", told, stacked(bars)))
    told = "All raw samples, one dot each; the bar is the median."
    found.append(picture("samples", "Distribution of samples", told, strips(rows)))
    steps, left_out = [row for row in rows if row["gb_s"]], []
    if steps:
        told = (
            "Bytes of the decoder's weights and of the filled KV cache that a step reads, over its median time. "
            "Weights that fit into the processor's cache are not read from memory."
        )
        draw = bandwidth(steps, result["read_gb_s"])
        found.append(picture("bandwidth", "Decoding against memory bandwidth", told, draw))
    else:
        left_out.append("How many bytes a step reads is not known here, so there is no picture of bandwidth.")
    if video and len(video["samples"]["token_ms"]) > 1:
        told = "Share of tokens after the first that came within a time."
        draw = ecdf([("between tokens", video["samples"]["token_ms"], None)])
        found.append(picture("tokens", "Between tokens", told, draw))
    elif video:
        left_out.append("The answers have no second token, so there is no picture of the time between tokens.")
    else:
        left_out.append("No clip was asked about (`--video`), so there is no breakdown of a first token.")
    return _with_sensors(result, found, left_out)


def _stream_pictures(result: Result) -> tuple[list[Drawing], list[str]]:
    told, samples, options = result["timeline"], result["samples"], result["options"]
    found, left_out = [], []
    if told["frames"]:
        text = "What each frame found when it was ready, and what each question took."
        if options["target_first_token_ms"]:
            text += " Red diamonds are late; violet lines are the controller's decisions, numbered as in the table."
        if options["slow_down"]:
            slow = options["slow_down"]
            text += f" From the dotted line on every stage was made {slow['factor']:g} times as slow."
        found.append(picture("timeline", "Timeline", text, timeline(result)))
    else:
        left_out.append("No frame became ready, so there is no timeline.")
    targets = options["target_frame_ms"], options["target_first_token_ms"], None
    names = (
        ("frame age", "frame_age_ms"),
        ("first token, running stream", "warm_ms"),
        ("first token, new session", "cold_ms"),
    )
    series = [(name, samples[key], target) for (name, key), target in zip(names, targets, strict=True) if samples[key]]
    if series:
        text = "Share of frames, and of questions, that took no longer than a time."
        found.append(picture("distribution", "Distribution", text, ecdf(series)))
    if result.get("sweep"):
        text = (
            "What the controller kept at each target, beside the fixed setting of a coarse grid that keeps most and "
            "misses at most one deadline in a hundred."
        )
        found.append(picture("sweep", "Tokens kept", text, kept_against_target(result)))
    if sum(result["phases_ms_per_frame"].values()):
        text = "Means over all frames that were processed; `read` is in another thread, and in no frame's age."
        draw = stacked([("a frame", result["phases_ms_per_frame"])])
        found.append(picture("breakdown", "Where a frame's time goes", text, draw))
    if len(told["memory_mb"]) > 1:
        text = f"Resident memory of the process, when each frame came; at most {number(result['peak_mb'])} MB."
        draw = over_time([("resident, MB", told["memory_mb"])], 20.0)
        found.append(picture("memory", "Memory", text, draw))
    else:
        left_out.append("Memory was sampled less than twice, so there is no picture of it.")
    return _with_sensors(result, found, left_out)


def _with_sensors(result: Result, found: list[Drawing], left_out: list[str]) -> tuple[list[Drawing], list[str]]:
    told = result["timeline"]
    lines = [
        (name, told[key])
        for name, key in (("power, W", "power_w"), ("temperature, °C", "temperature_c"))
        if len(told[key]) > 1
    ]
    if lines:
        sources = ", ".join(source for source in result["sensors"].values() if source)
        found.append(picture("sensors", "Power and temperature", f"From {sources}.", over_time(lines, 2.0)))
    missing = [name for name, key in (("power", "power_w"), ("temperature", "temperature_c")) if not result[key]]
    if missing:
        left_out.append(f"This machine does not tell its {' or its '.join(missing)}.")
    return found, left_out


def _decisions(decisions: Sequence[Mapping[str, Any]]) -> str:
    def change(one: Mapping[str, Any], name: str) -> str:
        return " → ".join(dict.fromkeys(_value(one[end][name]) for end in ("from", "to")))

    rows = [
        (
            f"{i}, at {one['time']:.1f} s",
            *(change(one, name) for name in ("budget", "frame_tokens", "stride", "cache", "shrink")),
            number(one["predicted"]),
            number(one["observed"]),
            one["reason"],
        )
        for i, one in enumerate(decisions, 1)
    ]
    head = (
        "",
        "budget",
        "tokens of a frame",
        "one frame in",
        "cache",
        "shrunk by",
        "predicted ms",
        "observed ms",
        "because",
    )
    return "<h3>The controller's decisions</h3>" + table("decisions", head, rows)


def _value(value: int | str) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _about(result: Result) -> str:
    machine, power, heat = result["machine"], result["power_w"], result["temperature_c"]
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in PACKAGES if machine["packages"].get(name))
    options = {name: value for name, value in result["options"].items() if value is not None}
    facts = [
        ("model", result["model"]),
        ("engine", f"{result['engine']}, {result['threads'] or 'all'} threads"),
        ("precision", result["precision"] or "as in the checkpoint"),
        ("on disk", human_bytes(result["disk_bytes"]) if result["disk_bytes"] else "–"),
        ("loading", f"{number(result['load_ms'])} ms"),
        ("memory", f"{number(result.get('resident_mb') or result.get('memory_mb'))} MB resident, at most "
                   f"{number(result['peak_mb'])} MB"),
        ("power", f"{number(power['mean'])} W, at most {number(power['max'])} W; {number(result['energy_j'])} J "
                  f"({result['sensors']['power']})" if power else "–"),
        ("temperature", f"{number(heat['begin'])} °C at the beginning, {number(heat['end'])} at the end, at most "
                        f"{number(heat['max'])} ({result['sensors']['temperature']})" if heat else "–"),
        ("processor", f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['features'])})"),
        ("system", f"{machine['system']}, {human_bytes(machine['memory_bytes'])}, Python {machine['python']}"),
        ("versions", versions),
        ("options", ", ".join(f"{name} {_plainly(value)}" for name, value in options.items())),
        ("measured", f"{result['time']}, {number(result['seconds'])} s; schema {result['schema']}"),
    ]  # fmt: skip
    return "<h2>Model and machine</h2>" + table("about", (), facts, True)


def _plainly(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {inner}" for name, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
