"""The page about runs: what it says, shows and weighs; in a browser, where there is one."""

import html
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from report_run import make_run

from protoclip.evaluate import Results, SetResults
from protoclip.report import load_snapshot, svg, write_report
from protoclip.report.__main__ import main
from protoclip.report.headline import change, verdict
from protoclip.report.plane import lay_out, tsne
from protoclip.report.runs import Run, comparable, defaults_changed, find_baseline, read_run

SECTIONS = (
    "summary curves prototypes map gap zeroshot retrieval churn cost settings".split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """ProtoCLIP and CLIP side by side."""
    root = tmp_path_factory.mktemp("logs")
    return make_run(root / "ours", noise=0.6), make_run(root / "plain", "clip", noise=3.0)


def test_the_page_has_every_section_and_needs_no_network(runs, capsys):
    assert main([str(runs[0])]) == 0
    path = runs[0] / "report.html"
    assert capsys.readouterr().out.strip() == f"report: {path}"
    text = path.read_text()
    for name in SECTIONS:
        assert f'<section id="{name}">' in text
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "@import" not in text
    assert text.count("<img") > 50 and text.count("data:image/") > 50
    assert "python -m protoclip.train --train-data builtin:shapes:300" in text
    assert "1,024 MiB" in text and "prefers-color-scheme: dark" in text


def test_the_page_says_who_won(runs):
    text = html.unescape(write_report([runs[0]]).read_text())  # finds the CLIP run beside it
    assert re.search(r"ours \(protoclip\) .* plain \(clip\): of \d+ headline numbers", text)
    assert "ProtoCLIP also draws" in text and "HO: Held-out pairs" in text
    assert re.search(r"modality gap.*?>no interval<", text)  # not "within chance"
    assert text.index("<b>external</b>") < text.index("<b>image</b>")  # the teacher's first
    both = write_report([runs[1], runs[0]])
    assert both.name == "report-plain-vs-ours.html"
    assert both.read_text().count("<h3>ours</h3>") >= 4
    alone = write_report([runs[1]]).read_text()
    assert "trained without prototypes" in alone


def test_captions_cannot_break_the_page(runs, monkeypatch):
    from protoclip.data.shapes import ShapesDataset

    evil = ('</script><script>window.evil = 1</script>"><b>',)
    monkeypatch.setattr(ShapesDataset, "captions", lambda self, i: evil)
    text = write_report([runs[0]]).read_text()
    assert "<script>window.evil" not in text and "</script><script>window" not in text


def test_a_run_that_stopped_early_still_has_a_page(tmp_path):
    path = make_run(tmp_path / "torn")
    for name in ("results.json", "report.safetensors", "metrics.jsonl"):
        (path / name).unlink()
    text = write_report([path]).read_text()
    assert "was not evaluated" in text and "No metrics yet" in text


def test_folders_that_are_no_runs_are_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "expected a run folder" in message and "Traceback" not in message


def test_fifty_thousand_samples_are_no_matter_of_minutes(tmp_path):
    path = make_run(tmp_path / "big", data="builtin:shapes:56000", judged=5000)
    began = time.process_time()
    page = write_report([path])
    took = time.process_time() - began
    assert len(read_run(path).snapshot.index) >= 50_000
    assert page.stat().st_size < 10 * 2**20 and took < 60, took  # 1.2 s of one Zen 4 core


def test_snapshot_round_trip(runs):
    snapshot = load_snapshot(runs[0])
    assert set(snapshot.clusters) == {"image", "external"}
    n = len(snapshot.index)
    assert snapshot.image.shape == snapshot.text.shape == (n, 16)
    assert snapshot.plane.shape[:2] == (2, n)
    assert "HO/text_retrieval_recall@5" in snapshot.hits and "HO/group/acc1" in snapshot.hits
    assert snapshot.judged.class_vectors["group"].shape[1] == 16
    assert load_snapshot(runs[0] / "nowhere") is None


def results(value, spread=0.05):
    metric = "text_retrieval_recall@5"
    one = SetResults("Held out", 9, 9, {metric: value}, {metric: (value - spread, value + spread)})
    return Results({"HO": one})


def test_verdict_needs_intervals_that_exclude_zero():
    clip = Run("plain", None, {"method": "clip"}, results(0.30))
    for value, word in ((0.5, "beat"), (0.1, "lost to"), (0.32, "cannot be told apart")):
        run = Run("ours", None, {"method": "protoclip"}, results(value))
        assert word in verdict([run], clip)[0]
    assert "nothing can be said" in verdict([run], None)[0]


def test_change_is_paired_where_hits_are_kept(runs):
    ours, plain = map(read_run, runs)
    got = change(ours, plain, "HO", "text_retrieval_recall@5")
    hits = [r.snapshot.hits["HO/text_retrieval_recall@5"].float().mean() for r in (ours, plain)]
    assert got.value == pytest.approx(float(hits[0] - hits[1]), abs=1e-6)
    assert got.low < got.value < got.high


def test_baseline_is_the_comparable_run(runs):
    ours = read_run(runs[0])
    assert find_baseline([ours]).name == "plain"
    other = json.loads((runs[1] / "config.json").read_text())
    assert comparable(ours.config, other)
    other["optim"]["lr"] = 1.0
    assert not comparable(ours.config, other)


def test_recorded_baseline_stands_in_where_the_settings_are_its_own(runs, tmp_path, monkeypatch):
    from protoclip.report import runs as module

    file = tmp_path / "baseline.json"
    module.record_baseline(runs[1], file)
    monkeypatch.setattr(module, "RECORDED", file)  # an absolute path replaces the package's
    ours = read_run(runs[0])
    found = module.recorded_baseline(ours)
    assert found.method == "clip" and found.path is None and "recorded" in found.remark
    assert found.after.metrics["HO"] == pytest.approx(
        read_run(runs[1]).after.metrics["HO"], nan_ok=True
    )
    other = json.loads(json.dumps(ours.config))
    other["optim"]["epochs"] = 1.0
    assert module.recorded_baseline(Run("x", None, other)) is None
    with pytest.raises(ValueError, match="--method clip"):
        module.record_baseline(runs[0], file)


def test_reproduction_command_has_what_differs():
    config = {"method": "clip", "model": {"add_projection_head": False}, "optim": {"lr": 0.5}}
    assert defaults_changed(config) == [
        "--method", "clip", "--no-add-projection-head", "--lr", "0.5",
    ]  # fmt: skip


def test_map_keeps_neighbours_together():
    g = torch.Generator().manual_seed(0)
    centre = 6 * torch.randn(5, 12, generator=g)
    kind = torch.arange(400) % 5
    points = centre[kind] + torch.randn(400, 12, generator=g)
    places = lay_out(points)
    assert places.min() >= 0 and places.max() <= 1 and torch.equal(places, lay_out(points))
    near = torch.cdist(places, places).fill_diagonal_(9).topk(5, largest=False).indices
    assert (kind[near] == kind[:, None]).float().mean() > 0.9
    assert lay_out(torch.ones(3, 12)).isfinite().all()
    assert tsne(centre).shape == (5, 2)


def test_charts_bear_any_numbers():
    nothing = svg.Series("x", [1, 2], [float("nan"), float("inf")])
    assert svg.line_chart("t", [nothing]) == ""
    one = svg.line_chart("<t>", [svg.Series("a&b", [3], [0.0])])
    assert "<circle" in one and "&lt;t&gt;" in one and "a&amp;b" in one
    assert svg.histogram("t", [("a", torch.zeros(5), 0)]).count("<rect") == 1
    assert svg.tick_labels([14.2, 14.25, 14.3]) == ["14.20", "14.25", "14.30"]
    assert svg.tick_labels([0, 2.5e-4, 5e-4]) == ["0", "2.5e−4", "5.0e−4"]


CHECK = """<script>
addEventListener("load", () => {
  const state = {
    errors: window.failures,
    sections: [...document.querySelectorAll("section")].map(s => s.id),
    images: document.images.length,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    wide: document.scrollingElement.scrollWidth - innerWidth,
    inked: [...document.querySelectorAll("canvas")].map(c =>
      c.getContext("2d").getImageData(0, 0, c.width, c.height).data.some(v => v)),
  };
  const out = document.createElement("pre");
  out.id = "state";
  out.textContent = JSON.stringify(state);
  document.body.append(out);
});
</script>"""
LISTEN = """<script>
window.failures = [];
addEventListener("error", e => window.failures.push(String(e.message)), true);
</script>"""


def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    return next(filter(None, map(shutil.which, names)), None)


def chromium(tmp_path, page, *flags):
    return subprocess.run(
        [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=8000", "--enable-logging=stderr", *flags, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def artefact(name):
    """Where a picture of the page is kept: $PROTOCLIP_ARTEFACTS, else build/report, ignored."""
    folder = Path(
        os.environ.get("PROTOCLIP_ARTEFACTS") or Path(__file__).parents[1] / "build" / "report"
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@pytest.mark.skipif(browser() is None, reason="no Chromium here; Debian: apt-get install chromium")
def test_a_real_browser_shows_it(runs, tmp_path):
    page = write_report([runs[1], runs[0]], tmp_path / "page.html")
    text = page.read_text().replace("<head>", "<head>" + LISTEN)
    page.write_text(text.replace("</body>", CHECK + "</body>"))
    for width, scheme in ((1180, 1), (500, 0)):  # light and wide; dark and as narrow as it gets
        shot = artefact(f"report-{width}.png")
        shot.unlink(missing_ok=True)
        look = [f"--window-size={width},2400", f"--blink-settings=preferredColorScheme={scheme}"]
        seen = chromium(tmp_path, page, "--dump-dom", *look)
        found = re.search(r'<pre id="state">(.*?)</pre>', seen.stdout, re.S)
        assert found, seen.stderr[-2000:]
        state = json.loads(html.unescape(found[1]))
        assert state["errors"] == [] and "CONSOLE" not in seen.stderr
        assert state["sections"] == list(SECTIONS)
        assert state["images"] > 50 and state["broken"] == 0
        assert state["wide"] <= 0  # nothing sticks out on a narrow screen
        assert state["inked"] == [True, True]
        chromium(tmp_path, page, f"--screenshot={shot}", *look)
        assert shot.stat().st_size > 20_000
