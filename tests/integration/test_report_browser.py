from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from types import ModuleType

import pytest

from nanoos_fw.provenance import write_atomic
from nanoos_fw.reports import NotAvailable, render_report, render_screen

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser on PATH (looked for {', '.join(NAMES)})"
)

# A page that shows the report in a frame as wide as a phone, sorts its table, and
# writes what it saw into its own text.
PHONE = """<!DOCTYPE html><body><iframe id="frame" src="report.html"
style="width: 390px; height: 900px; border: 0"></iframe><pre id="seen"></pre><script>
const frame = document.getElementById("frame");
const say = (name, value) => {
  document.getElementById("seen").textContent += name + "=" + value + "\\n";
};
frame.addEventListener("load", () => setTimeout(() => {
  const page = frame.contentDocument;
  const root = page.documentElement;
  say("room", root.clientWidth);
  say("width", root.scrollWidth);
  say("plots", Math.max(...Array.from(
    page.querySelectorAll(".main-svg"), (svg) => svg.getBoundingClientRect().right)));
  const tables = page.querySelectorAll("table.sortable");
  const ranks = (table = tables[0]) => Array.from(
    table.querySelectorAll("tbody tr"), (row) => row.cells[0].dataset.sort
  ).join(",");
  const heads = tables[0].querySelectorAll("thead th");
  heads[5].querySelector("button").click();
  say("lammps-up", ranks());
  heads[5].querySelector("button").click();
  say("lammps-down", ranks());
  tables[1].querySelectorAll("thead th")[5].querySelector("button").click();
  say("screen-up", ranks(tables[1]));
  say("aria", heads[5].getAttribute("aria-sort") + heads[0].hasAttribute("aria-sort"));
}, 500));
</script>"""

NARROW = """<!DOCTYPE html><body><iframe id="frame" src="report.html"
style="width: 390px; height: 900px; border: 0"></iframe><pre id="seen"></pre><script>
const frame = document.getElementById("frame");
frame.addEventListener("load", () => setTimeout(() => {
  const root = frame.contentDocument.documentElement;
  document.getElementById("seen").textContent =
    "room=" + root.clientWidth + " width=" + root.scrollWidth;
}, 500));
</script>"""


@pytest.fixture(scope="module")
def synthetic() -> ModuleType:
    path = Path(__file__).parents[1] / "unit" / "test_reports.py"
    spec = importlib.util.spec_from_file_location("synthetic_reports", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def browse(tmp_path: Path, page: Path, *options: str) -> tuple[str, str]:
    """Return what a headless browser without a network writes and logs."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=20000",
        *options,
        page.as_uri(),
    ]
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=True
    )
    return done.stdout, done.stderr


def console(log: str) -> list[str]:
    return [line for line in log.splitlines() if "CONSOLE" in line]


def write(tmp_path: Path, html: str) -> Path:
    path = tmp_path / "report.html"
    write_atomic(path, html)
    return path


def test_browser_console_is_seen_by_these_tests(tmp_path: Path) -> None:
    page = write(tmp_path, "<script>missing();</script>")
    _, log = browse(tmp_path, page, "--dump-dom")
    assert any("missing is not defined" in line for line in console(log))


def test_all_figures_draw_without_a_word_on_the_console(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    page = write(tmp_path, render_report(synthetic.synthetic_report()))
    dom, log = browse(tmp_path, page, "--dump-dom", "--window-size=1280,1000")
    assert console(log) == []
    boxes = re.split(r'<div id="figure-', dom)[1:]
    assert len(boxes) == 20
    for box in boxes:
        assert 'class="main-svg"' in box.split("<figcaption>")[0]


def test_hostile_names_draw_as_text(tmp_path: Path, synthetic: ModuleType) -> None:
    hostile = synthetic.HOSTILE
    labels = synthetic.Labels(
        energies_by_prototype={hostile: [0.1, 0.2], "B2": [0.3]}, method=hostile
    )
    data = synthetic.synthetic_report(campaign=hostile, labels=labels)
    dom, log = browse(tmp_path, write(tmp_path, render_report(data)), "--dump-dom")
    assert console(log) == []
    legend = re.findall(r'<text class="legendtext"[^>]*>(.*?)</text>', dom)
    assert hostile in map(unescape, legend)
    assert "<img" not in dom


def test_report_fits_a_phone_and_sorts(tmp_path: Path, synthetic: ModuleType) -> None:
    write(tmp_path, render_report(synthetic.synthetic_report()))
    phone = tmp_path / "phone.html"
    write_atomic(phone, PHONE)
    dom, _ = browse(tmp_path, phone, "--dump-dom", "--allow-file-access-from-files")
    seen = dict(re.findall(r"^([\w-]+)=(.*)$", dom, re.M))
    # A line that follows the tag of the text is found as well.
    seen |= dict(re.findall(r'<pre id="seen">([\w-]+)=(.*)', dom))
    room = int(seen["room"])
    assert 340 <= room <= 390
    assert int(seen["width"]) == room
    assert float(seen["plots"]) <= room
    data = synthetic.synthetic_report()
    values = {
        row.rank: row.lammps
        for row in data.ranking.candidates
        if isinstance(row.lammps, float)
    }
    rising = sorted(values, key=lambda rank: values[rank])
    ends = [row.rank for row in data.ranking.candidates if row.rank not in values]
    up = [int(rank) for rank in seen["lammps-up"].split(",")]
    down = [int(rank) for rank in seen["lammps-down"].split(",")]
    assert up == rising + ends
    assert down == rising[::-1] + ends
    assert seen["aria"] == "descendingfalse"
    gaps = {row.rank: row.predictions[1].mean for row in data.screens[0].best}
    rising = sorted(gaps, key=lambda rank: gaps[rank])
    assert [int(rank) for rank in seen["screen-up"].split(",")] == rising


def test_report_prints(tmp_path: Path, synthetic: ModuleType) -> None:
    page = write(tmp_path, render_report(synthetic.synthetic_report()))
    pdf = tmp_path / "report.pdf"
    _, log = browse(tmp_path, page, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert console(log) == []
    raw = pdf.read_bytes()
    assert raw.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", raw))
    assert 5 <= pages <= 20


def test_report_with_nothing_in_it_opens(tmp_path: Path, synthetic: ModuleType) -> None:
    missing = NotAvailable(reason="nothing was stored")
    parts = [
        name
        for name, field in synthetic.ReportData.model_fields.items()
        if synthetic.is_part(field)
    ]
    data = synthetic.synthetic_report(screens=(), **dict.fromkeys(parts, missing))
    dom, log = browse(tmp_path, write(tmp_path, render_report(data)), "--dump-dom")
    assert console(log) == []
    assert dom.count("ot available: nothing was stored") >= len(parts) - 1


def test_a_screening_draws_fits_a_phone_and_prints(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    part = synthetic.synthetic_report().screens[0]
    page = write(tmp_path, render_screen(part))
    dom, log = browse(tmp_path, page, "--dump-dom", "--window-size=1280,1000")
    assert console(log) == []
    boxes = re.split(r'<div id="figure-', dom)[1:]
    assert len(boxes) == 4
    assert all('class="main-svg"' in box.split("<figcaption>")[0] for box in boxes)
    narrow = tmp_path / "narrow.html"
    write_atomic(narrow, NARROW)
    dom, _ = browse(tmp_path, narrow, "--dump-dom", "--allow-file-access-from-files")
    room, width = re.findall(r"room=(\d+) width=(\d+)", dom)[0]
    assert int(width) == int(room) <= 390
    pdf = tmp_path / "screen.pdf"
    _, log = browse(tmp_path, page, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert console(log) == []
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) <= 5
