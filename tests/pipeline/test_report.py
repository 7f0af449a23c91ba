"""The report: one page, complete, that a real browser opens without an error and without asking for anything."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cs336_registry.pipeline import report, training
from cs336_registry.pipeline.chart import MOST_POINTS, Series, _Axis, bar_chart, line_chart, smoothed, thinned
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.report_sections import _visible

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "line", "circle", "path", "br", "img"}


class Structure(HTMLParser):
    """Checks that tags are closed in order, and counts them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.addresses: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(corpus_path, tmp_path_factory) -> list[Path]:
    from .conftest import TINY, load

    folder = tmp_path_factory.mktemp("runs")
    for name, setting in (("small", "optimizer.lr=1e-3"), ("<large>", "optimizer.lr=1e-2")):
        configuration = load("quickstart", [*TINY, f'data.train="{corpus_path}"', setting])
        training.train(configuration, folder / name, progress=Progress(quiet=True))
    return [folder / "small", folder / "<large>"]


def test_one_run_fills_the_page(runs, tmp_path):
    page = report.write(runs[:1], tmp_path / "report.html").read_text(encoding="utf-8")
    structure = Structure(page)
    assert structure.counts["figure"] == 3
    assert structure.addresses == ["data:,"]
    for expected in (
        "Learning",
        "Bits per byte",
        "zlib -9",
        "What it writes",
        "Longest tokens",
        "Configuration",
        "adamw",
    ):
        assert expected in page
    assert "https://" not in page and "http://" not in page


def test_several_runs_are_compared(runs, tmp_path):
    page = report.write(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    Structure(page)
    assert "<h1>Comparison of small, &lt;large&gt;</h1>" in page
    assert re.search(r"class=differs><th>lr</th><td>0.001</td><td>0.01</td>", page.replace('"', ""))
    assert page.count('class="swatch') == 2


def test_a_run_without_steps_has_a_page(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    page = report.write([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    Structure(page)
    assert "Nothing was measured" in page


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        report.write([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ValueError, match="there is no run to report on"):
        report.write([], tmp_path / "report.html")


def test_curves_are_drawn_to_scale():
    chart = line_chart([Series("a", [(0, 1.0), (10, 3.0)])], "steps", "loss")
    found = re.search(r'd="M([\d.]+),([\d.]+) L([\d.]+),([\d.]+)"', chart)
    left, low, right, high = map(float, found.groups())
    axis = _Axis(0, 10, 52, 626)
    assert (left, right) == (axis(0), axis(10)) == (52, 626)
    assert low > high, "a larger value stands higher"
    assert axis.ticks(5) == [0, 2, 4, 6, 8, 10]


def test_smoothing_and_thinning_keep_the_level():
    points = [(float(x), 5.0) for x in range(5000)]
    assert all(y == pytest.approx(5) for _, y in smoothed(points))
    thin = thinned(points)
    assert len(thin) <= MOST_POINTS and all(y == 5 for _, y in thin)
    assert thin[0][0] < 10 and thin[-1][0] > 4990


def test_bars_are_sorted_and_escaped():
    bars = bar_chart([("a<b", 1.0, 0), ("c", 2.0, 1)], "bits")
    assert bars.index(">c<") < bars.index("a&lt;b")
    assert "width:50.00%" in bars


def test_white_space_in_tokens_is_visible():
    assert _visible("\n" + " " * 36) == "⏎␣×36"
    assert _visible(" implementation") == "␣implementation"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
@pytest.mark.parametrize("count", [1, 2], ids=["one", "two"])
def test_a_browser_opens_it_without_an_error(runs, tmp_path, count):
    page = report.write(runs[:count], tmp_path / "report.html")
    finished = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", "--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "CONSOLE" not in finished.stderr, finished.stderr
    assert finished.stdout.count('<path class="curve') >= 3
    assert finished.stdout.count("data-ready") == finished.stdout.count("<figure")
