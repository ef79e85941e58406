"""The report of `bench --html` in a real browser, and `--csv`: everything that was measured is there, and readable."""

from __future__ import annotations

import copy
import csv
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import CLIP

from penguin_edge.commands.cli import main
from penguin_edge.errors import TargetUnavailable
from penguin_edge.reports.bench import COLUMNS, csv_text, html_text
from penguin_edge.reports.figures import _clusters, number

# Boxes of text that lie over each other in a picture that is shown, by more than rounding.
OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    if (!svg.getBoundingClientRect().width) continue;
    const all = [...svg.querySelectorAll('text')].map(one => [one.textContent, one.getBoundingClientRect()]);
    const frame = svg.getBoundingClientRect();
    for (const [i, [a, p]] of all.entries()) {
      if (p.left < frame.left - 1 || p.right > frame.right + 1) found.push(`${a} is cut off`);
      for (const [b, q] of all.slice(i + 1))
        if (Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
            Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3) found.push(`${a} over ${b}`);
    }
  }
  return found;
}"""
# The contrast of all text with the page, and of text in pictures: the least.
CONTRAST = """() => {
  const light = text => {
    const parts = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
    const [r, g, b] = parts.map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll('svg text')].map(one => getComputedStyle(one).fill);
  const words = [...document.querySelectorAll('p, td, th, h1, h2, figcaption')].map(one => getComputedStyle(one).color);
  return Math.min(...[...texts, ...words].map(text => {
    const [a, b] = [light(text), page].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  }));
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real measurements with all their files."""
    out = tmp_path_factory.mktemp("bench")

    def files(name: str) -> list[str]:
        return [f"-o={out / name}.json", f"--csv={out / name}.csv", f"--html={out / name}.html"]

    common = ["bench", "tiny", "--threads=1", "--max-seq-len=1024", "--budget=120"]
    stages = ["-p=8,64", "-n=4", "-d=0,64", "--repeat=3", f"--video={CLIP}", "--fps=0.5"]
    assert main([*common, *stages, *files("model")]) == 0
    stream = [f"--stream={CLIP}", "--fps=4", "--duration=5", "--target-first-token=60000", "--target-frame=60000"]
    assert main([*common, *stream, "--slow-down=2@3", *files("stream")]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{name}.{kind}" for name in ("model", "stream") for kind in ("json", "csv", "html")
    )
    return out


def result_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def busy(folder: Path) -> dict[str, Any]:
    """The stream as if the controller had been at work and the machine had sensors."""
    result = copy.deepcopy(result_of(folder, "stream"))
    before = {"budget": 120, "frame_tokens": 64, "stride": 1, "cache": "recompute", "shrink": "encode"}
    for i, at in enumerate((0.5, 0.55, 0.6, 2.0, 4.0)):
        after = {"budget": 60 + i, "frame_tokens": 16, "stride": 1 + i % 2, "cache": "rebase", "shrink": "encode"}
        reason = "slower than the target allows"
        result["decisions"].append(
            {"time": at, "from": before, "to": after, "predicted": 41.0 + i, "observed": 52.5, "reason": reason}
        )
        before = after
    result["options"] |= {"target_first_token_ms": 1e-3, "target_frame_ms": 1e4}
    result["timeline"] |= {"power_w": [[1.0, 5.0], [2.0, 7.0]], "temperature_c": [[0.0, 40.0], [2.0, 44.0]]}
    result |= {"power_w": {"mean": 6.0, "max": 7.0}, "energy_j": 12.0}
    result |= {"temperature_c": {"begin": 40.0, "end": 44.0, "max": 44.0}}
    result["sensors"] = {"power": "rapl: package-0", "temperature": "hwmon: <coretemp> & more"}
    return result


def cells(page: Any, name: str) -> list[list[str]]:
    rows = page.locator(f"#{name} tbody tr").all()
    return [[cell.text_content() for cell in row.locator("td").all()] for row in rows]


def agrees(cell: str, value: float | None) -> bool:
    """Whether a cell is the value, to the digits that it has."""
    if value is None:
        return cell == "–"
    plain = cell.replace(",", "")
    digits = len(plain.partition(".")[2])
    return abs(float(plain) - value) <= 0.5001 * 10**-digits


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("model", ["breakdown", "samples", "bandwidth", "tokens"]),
        ("stream", ["timeline", "distribution", "breakdown", "memory"]),
        ("busy", ["timeline", "distribution", "breakdown", "memory", "sensors"]),
    ],
)
def test_every_figure_is_there_and_readable(
    folder: Path, tmp_path: Path, page: Any, name: str, figures: list[str]
) -> None:
    file = folder / f"{name}.html"
    if name == "busy":
        file = tmp_path / "busy.html"
        file.write_text(html_text(busy(folder)), encoding="utf-8")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert [section.get_attribute("id") for section in page.locator("section").all()] == figures
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(CONTRAST) >= 4.5  # as WCAG wants it
        for width, kind, other in ((1280, "wide", "narrow"), (400, "narrow", "wide")):
            page.set_viewport_size({"width": width, "height": 900})
            for figure in figures:
                assert page.locator(f"#{figure} svg.{kind}").is_visible()
                assert not page.locator(f"#{figure} svg.{other}").is_visible()
                assert page.locator(f"#{figure} svg.{kind} text").count() > 3
            assert page.evaluate(OVERLAPS) == []
            assert page.evaluate("document.documentElement.scrollWidth") == width
    page.set_viewport_size({"width": 700, "height": 900})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator(f"#{figures[0]} svg.wide").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    # Nothing but the file itself; the icon is empty.
    assert {url for url in asked if not url.startswith("data:,")} == {file.as_uri()}


def test_pictures_share_no_ids(folder: Path, page: Any) -> None:
    page.goto((folder / "stream.html").as_uri())
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    used = page.evaluate("[...document.querySelectorAll('use')].map(one => one.getAttribute('xlink:href').slice(1))")
    assert used and set(used) <= set(ids)


def test_the_numbers_of_the_page_are_those_of_the_result(folder: Path, page: Any) -> None:
    result = result_of(folder, "model")
    page.goto((folder / "model.html").as_uri())
    assert json.loads(page.locator("#result").text_content()) == result
    shown = cells(page, "rows")
    assert [row[0] for row in shown] == [row["test"] for row in result["rows"]]
    assert {"pp8", "tg4", "tg4 @ d64"} <= {row[0] for row in shown}
    for cell, row in zip(shown, result["rows"], strict=True):
        assert all(map(agrees, cell[1:6], (*row["ms"].values(), row["per_s"], row["gb_s"]))), (cell, row)
        assert cell[6] == str(len(row["samples_ms"]))
    video = result["video"]
    clip = {cell[0]: cell[1:4] for cell in cells(page, "video")}
    assert all(map(agrees, clip["first token, cold"], video["first_token_ms"]["cold"].values()))
    assert all(map(agrees, clip["between tokens"], video["inter_token_ms"].values()))
    names = [text.text_content() for text in page.locator("#samples svg.wide text").all()]
    assert {"pp64", "tg4 @ d64", "encode 64"} <= set(names)

    result = result_of(folder, "stream")
    page.goto((folder / "stream.html").as_uri())
    latency = {cell[0]: cell[1:] for cell in cells(page, "latency")}
    for name, values, samples in (
        ("frame age", result["frame_age_ms"], "frame_age_ms"),
        ("first token, running stream", result["first_token_ms"]["warm"], "warm_ms"),
        ("first token, new session", result["first_token_ms"]["cold"], "cold_ms"),
    ):
        assert all(map(agrees, latency[name][:3], values.values())), name
        assert latency[name][3] == str(len(result["samples"][samples]))


def test_decisions_are_listed_and_marked(folder: Path, tmp_path: Path, page: Any) -> None:
    result = busy(folder)
    # What the run itself decided comes first.
    begun = len(result["decisions"]) - 5
    (tmp_path / "busy.html").write_text(html_text(result), encoding="utf-8")
    page.goto((tmp_path / "busy.html").as_uri())
    rows = cells(page, "decisions")
    assert len(rows) == begun + 5 and rows[-1][0] == f"{begun + 5}, at 4.0 s"
    assert rows[-1][1:4] == ["63 → 64", "16", "2 → 1"] and rows[-1][8] == "slower than the target allows"
    texts = [text.text_content() for text in page.locator("#timeline svg.wide text").all()]
    assert str(begun + 5) in texts and f"{begun + 1}–{begun + 3}" in texts and "target 10000 ms" in texts
    about = dict(cells(page, "about"))
    assert about["power"] == "6.00 W, at most 7.00 W; 12.0 J (rapl: package-0)"
    assert about["temperature"].endswith("(hwmon: <coretemp> & more)")
    assert page.locator("#left-out").count() == 0


def test_what_there_is_no_data_for_is_left_out_and_said(folder: Path, tmp_path: Path, page: Any) -> None:
    result = result_of(folder, "stream")
    result["timeline"] = dict.fromkeys(result["timeline"], ())
    result["samples"] = dict.fromkeys(result["samples"], ())
    result["phases_ms_per_frame"] = {}
    (tmp_path / "empty.html").write_text(html_text(result), encoding="utf-8")
    page.goto((tmp_path / "empty.html").as_uri())
    assert page.locator("svg").count() == 0
    assert "No frame became ready" in page.locator("#left-out").text_content()
    result = result_of(folder, "model") | {"video": None}
    for row in result["rows"]:
        row["gb_s"] = None
    (tmp_path / "model.html").write_text(html_text(result), encoding="utf-8")
    page.goto((tmp_path / "model.html").as_uri())
    assert [section.get_attribute("id") for section in page.locator("section").all()] == ["samples"]
    said = page.locator("#left-out").text_content()
    assert "no picture of bandwidth" in said and "--video" in said and "does not tell its power" in said


def test_names_are_text_whatever_they_hold(folder: Path, tmp_path: Path, page: Any) -> None:
    result = result_of(folder, "model")
    evil = "</script><script>document.title='x'</script><b>$a_b$ & \"q\""
    result["model"] = result["video"]["source"] = result["video"]["question"] = evil
    result["rows"][0]["test"] = "<i>pp8 & $x^2$"
    (tmp_path / "evil.html").write_text(html_text(result), encoding="utf-8")
    page.goto((tmp_path / "evil.html").as_uri())
    assert page.title().startswith(evil) and page.locator("h1").text_content().startswith(evil)
    assert page.locator("b b, i, p b").count() == 0
    assert json.loads(page.locator("#result").text_content()) == result
    assert "<i>pp8 & $x^2$" in [text.text_content() for text in page.locator("#samples svg.wide text").all()]


def test_the_csv_has_every_sample(folder: Path) -> None:
    for name in ("model", "stream"):
        result = result_of(folder, name)
        with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert tuple(lines[0]) == COLUMNS
        found: dict[str, list[float]] = {}
        for line in lines:
            values = found.setdefault(line["test"], [])
            assert int(line["sample"]) == len(values)
            values.append(float(line["value"]))
        wanted = {row["test"]: row["samples_ms"] for row in result.get("rows", [])}
        if name == "model":
            video = result["video"]
            wanted |= {f"video {key}": values for key, values in video["samples"].items()}
            wanted |= {f"video cold {key}": values for key, values in video["phase_samples_ms"]["cold"].items()}
            wanted |= {f"video warm {key}": values for key, values in video["phase_samples_ms"]["warm"].items()}
            depths = {line["test"]: (line["count"], line["depth"]) for line in lines}
            assert depths["tg4 @ d64"] == ("1", "64") and depths["pp64"] == ("64", "0")
        else:
            told = result["timeline"]
            wanted |= {f"stream {key}": values for key, values in result["samples"].items()}
            for key in ("age_ms", "budget", "visual_tokens", "kv_tokens"):
                wanted[f"timeline {key}"] = [one[key] for one in told["frames"]]
            wanted["timeline first_token_ms"] = [one["first_token_ms"] for one in told["questions"]]
            wanted["timeline memory_mb"] = [value for _, value in told["memory_mb"]]
            for key in result["decisions"][0]["to"] if result["decisions"] else ():
                wanted[f"decision {key}"] = [one["to"][key] for one in result["decisions"]]
            times = [float(line["time_s"]) for line in lines if line["test"] == "timeline budget"]
            assert times == [one["time"] for one in told["frames"]]
        assert found == {key: values for key, values in wanted.items() if values}
    assert "decision stride" in csv_text(busy(folder)) and "timeline temperature_c" in csv_text(busy(folder))


def test_the_same_result_gives_the_same_page(folder: Path) -> None:
    assert html_text(result_of(folder, "model")) == (folder / "model.html").read_text(encoding="utf-8")


def test_without_matplotlib_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)
    monkeypatch.setattr("penguin_edge.commands.bench.open_model", lambda *_, **__: pytest.fail("it was opened"))
    assert main(["bench", "tiny", "--html", str(tmp_path / "r.html")]) == 1
    said = capsys.readouterr().err
    assert "pip install matplotlib" in said and not list(tmp_path.iterdir())
    with pytest.raises(TargetUnavailable, match="pip install matplotlib"):
        html_text(result_of(folder, "model"))


def test_files_that_cannot_be_written_are_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("penguin_edge.commands.bench.open_model", lambda *_, **__: pytest.fail("it was opened"))
    for option in ("-o", "--csv", "--html"):
        for path, word in ((tmp_path, "a folder, wanted a file"), (tmp_path / "no" / "r", "its folder is not there")):
            assert main(["bench", "tiny", option, str(path)]) == 1
            assert word in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_numbers_keep_about_three_digits() -> None:
    shown = [number(value) for value in (None, 0, 0.1234, 1.234, 12.34, 1234.5)]
    assert shown == ["–", "0", "0.123", "1.23", "12.3", "1,234"]


def test_decisions_close_to_each_other_share_a_label() -> None:
    assert _clusters([0.0, 0.1, 5.0, 9.0, 9.2, 9.4], 0.5) == [("1–2", 0.0), ("3", 5.0), ("4–6", 9.0)]
    assert _clusters([], 1.0) == []
