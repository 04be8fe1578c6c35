"""The page about runs: what it says, shows and weighs; in a browser, where there is one."""

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
from collections import Counter

import pytest
import torch
from PIL import Image
from ranks import metrics
from report_run import make_run

from benchmarks.record_baseline import main as record_baseline
from protoclip.config import TrainConfig, to_dict
from protoclip.data.shapes import ShapesDataset
from protoclip.evaluate.results import Outcome, SetResults
from protoclip.report import page as reading
from protoclip.report.__main__ import main
from protoclip.report.page import write_report
from protoclip.report.snapshot import load_snapshot, words_of_clusters
from protoclip.train import main as train

SECTIONS = (
    "names summary curves prototypes map gap zeroshot retrieval churn cost settings".split()  # noqa: SIM905
)
EVIL = '</script><script>window.evil = 1</script>"><b>'
TINY = ["--train-data", "builtin:shapes:80", "--batch-size", "16", "--report-to", "none"]
TINY += ["--infonce-warmup-epoch", "0", "--k", "6"]


def pictures_in(text):
    """The thumbnails of galleries and maps; the browser puts them where they belong."""
    found = [
        picture
        for held in re.findall(r'id="pictures of [^"]*">(.*?)</script>', text, re.S)
        for picture in json.loads(held)
    ]
    for picture in found[:3]:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).format == "WEBP"
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """ProtoCLIP and CLIP side by side."""
    root = tmp_path_factory.mktemp("logs")
    return make_run(root / "ours", noise=0.6), make_run(root / "plain", "clip", noise=3.0)


def test_the_page_has_every_section_and_needs_no_network(runs, capsys):
    assert main([str(runs[0])]) == 0
    path = runs[0] / "report.html"
    said = capsys.readouterr()
    assert said.out.strip() == f"report: {path}"
    assert re.match(r"ours: It names \d+ of 100 drawings .*\nours: no plain CLIP run", said.err)
    text = path.read_text()
    for name in SECTIONS:
        assert f'<section id="{name}">' in text
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "@import" not in text
    assert text.count("<img") > 20 and len(pictures_in(text)) > 50
    assert "builtin:shapes:300" in text and "--preset run.json" in text
    for title in ("Loss (nats)", "Recall at 5", "Logit scale", "Learning rate"):
        assert title in text
    keys = re.findall(r"</i>([^<]*)</span>", text)  # of lines: a single one needs none
    assert {"contrastive loss", "proto loss", "matching", "drawn at random"} <= set(keys)
    assert "lr" not in keys
    assert "1,024 MiB" in text and "prefers-color-scheme: dark" in text
    drawn = re.findall(r"<svg.*?</svg>", text, re.S)
    assert "var(--c0)" in drawn[0] and not re.search(r"#(?!000000)[0-9a-f]{6}\b", drawn[0])
    written = re.compile(r"<p class=note>written .*?</p>")
    again = write_report([runs[0]]).read_text()
    assert written.sub("", again) == written.sub("", text)


def test_the_first_section_has_ten_images_with_their_nearest_names(runs):
    text = write_report([runs[0]]).read_text()
    sections = re.findall(r'<section id="(\w+)"', text)
    assert sections[:2] == ["names", "summary"]
    own = text[text.index('<section id="names">') : text.index('<section id="summary">')]
    assert "Among 12 names" in own and own.count("<img") == 10 == own.count("<ol>")
    assert own.count("<li") == 50
    snapshot = json.loads((runs[0] / "report.json").read_text())
    shown = snapshot["named"]["shown"]
    for one in shown:
        names = [answer["caption"] for answer in one["answers"]]
        assert len(set(names)) == 5
        hits = [name for answer, name in zip(one["answers"], names, strict=True) if answer["hit"]]
        assert hits == ([one["own"]] if one["own"] in names else [])
    missed = sum(one["own"] not in {a["caption"] for a in one["answers"]} for one in shown)
    assert own.count("<small>right: ") == missed
    assert own.count('<li class="hit">') == 10 - missed > 0


def test_one_answer_stands_on_top_and_each_score_has_its_floor(runs):
    text = html.unescape(write_report([runs[0]]).read_text())
    results = json.loads((runs[0] / "results.json").read_text())
    names = 100 * results["trained"]["HO"]["metrics"]["group/acc1"]
    sentence = f"It names {names:.0f} of 100 drawings that it has never seen."
    assert text.index(sentence) < text.index("<nav")
    results["floors"] = {
        name: {"HO": results["trained"]["HO"] | {"metrics": {"group/acc1": value}}}
        for name, value in (("chance", 1 / 12), ("frequent", 0.123))
    }
    run = reading.read_run(runs[0])
    run = reading.replace(run, outcome=reading.results.read_results(runs[0] / "results.json"))
    (runs[0] / "results.json").write_text(json.dumps(results))
    try:
        both = html.unescape(write_report([runs[1], runs[0]]).read_text())
    finally:
        reading.results.write_results(runs[0] / "results.json", run.outcome)
    assert f"<b>ours:</b> {sentence[:-1]} (chance 8)." in both
    row = re.search(r"zero-shot group</abbr></th>(.*?)</tr>", both, re.S)[1]
    best = max(0.123, results["untrained"]["HO"]["metrics"]["group/acc1"])
    assert row.index(f">{best:.3f}") < row.index("<b>") and "chance 0.083" in row
    for term in ("zero-shot", "R@5", "modality gap", "group"):
        assert f"<li><b>{term}</b>: " in both, term
    assert "k-means AMI" not in both  # no such number on this page
    assert 'title="share of images whose nearest class name is their own' in both


def test_the_page_says_who_won(runs):
    both = write_report([runs[1], runs[0]])
    text = html.unescape(both.read_text())
    assert both == runs[0] / "report.html" and text.count("<h3>ours</h3>") >= 4
    assert re.search(r"ours \(protoclip\) .* plain \(clip\): of \d+ headline numbers", text)
    assert "ProtoCLIP also pulls" in text and "Held-out pairs" in text
    assert not re.search(r"\bN?HO\b", re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S))
    assert re.search(r"modality gap.*?>no interval<", text, re.S)  # not "within chance"
    assert text.index("<b>external</b>") < text.index("<b>image</b>")  # the teacher's first
    alone = write_report([runs[1]]).read_text()  # trained without prototypes
    assert 'id="prototypes"' not in alone and 'href="#prototypes"' not in alone


def test_words_of_the_data_cannot_break_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(ShapesDataset, "captions", lambda self, i: (EVIL,))
    path = make_run(tmp_path / "<script>window.evil = 1<")
    lines = [
        json.dumps({"step": i, f"{EVIL}loss": 1.0, f"val_{EVIL}/acc1": 0.5}) for i in range(300)
    ]
    torn = '{"step": 300, "lo'  # the run was killed here
    (path / "metrics.jsonl").write_text("\n".join([*lines, "[1, 2]", torn]))
    text = write_report([path]).read_text()
    assert "<script>window.evil" not in text and '"><b>' not in text and "&lt;b&gt;" in text


def test_a_run_that_stopped_early_still_has_a_page(tmp_path):
    path = make_run(tmp_path / "torn")
    for name in ("results.json", "report.json", "metrics.jsonl"):
        (path / name).unlink()
    text = write_report([path]).read_text()
    assert "was not evaluated" in text
    sections = re.findall(r'<section id="(\w+)"', text)
    assert sections == ["summary", "settings"]  # the others are empty


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "expected a run folder"),
        ("config.json", "{", "expected settings as JSON"),
        ("config.json", "[]", "expected settings as JSON"),
    ],
)
def test_folders_that_are_not_runs_are_refused(runs, tmp_path, capsys, name, content, words):
    path = shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("*.html"))
    (path / name).unlink() if content is None else (path / name).write_text(content)
    assert main([str(path)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (path / "report.html").exists()


def run_of(name, value, spread=0.05):
    metric = "text_retrieval_recall@5"
    one = SetResults("Held out", 9, 9, {metric: value}, {metric: (value - spread, value + spread)})
    method = "clip" if name == "plain" else "protoclip"
    return reading.Run(name, None, {"method": method}, Outcome("", "", "", {"HO": one}))


def test_verdict_needs_intervals_that_exclude_zero():
    for value, word in ((0.5, "ahead of"), (0.1, "behind"), (0.32, "cannot be told")):
        assert word in reading.verdict(run_of("ours", value), run_of("plain", 0.30))
    assert "cannot be compared" in reading.verdict(run_of("ours", 0.5), None)


def test_baselines(runs, tmp_path, monkeypatch):
    """A CLIP run that is given, else the recorded one where the settings are its own."""
    assert reading.find_baseline([reading.read_run(run) for run in runs]).name == "plain"
    ours = reading.read_run(shutil.copytree(runs[0], tmp_path / "logs" / "ours"))
    assert reading.find_baseline([ours]) is None  # protoclip's own is of other data
    assert reading.find_baseline([ours, ours]) is ours  # two of one method: the first
    monkeypatch.setattr(reading, "RECORDED", runs[1])
    found = reading.find_baseline([ours])
    assert found.name == "CLIP (recorded)" and found.outcome.trained["HO"].samples == 32
    assert "The baseline was recorded" in reading.render([ours])
    ours.config["optim"]["epochs"] = 1.0
    assert reading.find_baseline([ours]) is None


def test_the_recorded_baseline_is_one_of_the_default_run():
    recorded = reading.recorded_baseline(to_dict(TrainConfig()))
    assert recorded.outcome.trained["NEW"].samples > 400 and recorded.outcome.seeds >= 5
    assert recorded.outcome.pretrained == ""  # no path of the machine that made it


def test_recorded_seeds_are_a_baseline_of_any_seed(tmp_path, monkeypatch):
    """Of n seeds the interval is where one more is expected: t, and sqrt(1 + 1 / n)."""
    paths = [make_run(tmp_path / name, "clip", noise=n) for n, name in ((1.0, "one"), (2.0, "two"))]
    for seed, path in enumerate(paths):
        config = json.loads((path / "config.json").read_text())
        config["run"]["seed"] = seed
        (path / "config.json").write_text(json.dumps(config))
    recorded, metric = tmp_path / "recorded", "text_retrieval_recall@5"
    assert record_baseline([*map(str, paths), "--out", str(recorded)]) == 0
    monkeypatch.setattr(reading, "RECORDED", recorded)
    values = [reading.read_run(path).outcome.trained["HO"].metrics[metric] for path in paths]
    config["run"]["seed"], config["method"] = 7, "protoclip"
    assert "clip, mean of 2 seeds" in reading.render([reading.Run("run", None, config)])
    one = reading.recorded_baseline(config).outcome.trained["HO"]
    assert one.metrics[metric] == pytest.approx(sum(values) / 2)
    half = 12.706 * abs(values[0] - values[1]) / 2**0.5 * 1.5**0.5
    assert one.intervals[metric][1] - one.metrics[metric] == pytest.approx(half, rel=1e-3)
    with pytest.raises(SystemExit):
        record_baseline([str(paths[0]), str(paths[0]), "--out", str(recorded)])


# The parts of a snapshot


class Captioned:
    """Samples of which only captions are known."""

    def __init__(self, *captions):
        self.words = captions

    def __len__(self):
        return len(self.words)

    def captions(self, i):
        return (self.words[i],)


def test_words_of_a_cluster_are_common_in_it():
    """A word of one caption of several, such as a name that says nothing, sets nothing apart."""
    captions = ["red dog runs", "a dog", "dog dog sleeps", "notdef", "a cat", "cat cat", "otter"]
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    words = words_of_clusters(
        Captioned(*captions, "crutch", "excel"), torch.cat((labels, labels.new_full((2,), 3)))
    )
    assert words == {0: "dog", 1: "cat", 2: "otter"}
    many = ["sign"] * 18 + ["sign lira"] * 2 + ["lira"]  # lira: in 3 of 21, then in 2
    assert words_of_clusters(Captioned(*many), torch.zeros(21).long()) == {0: "sign, lira"}
    rare = [*many[:18], "sign", *many[19:]]
    assert words_of_clusters(Captioned(*rare), torch.zeros(21).long()) == {0: "sign"}


def test_a_model_that_diverged_still_has_a_page(tmp_path):
    path = make_run(tmp_path / "run", noise=float("nan"))
    assert "<canvas" in write_report([path]).read_text()


# Whole runs


def test_a_run_ends_with_its_report_and_its_path(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("protoclip.report.capture.PICTURED", 40)  # as in a larger data set
    flags = ["--logs", str(tmp_path), "--name", "run", "--max-steps", "4"]
    flags += ["--val-frequency", "0.4"]
    assert train([*TINY, *flags]) == 0
    page = tmp_path / "run" / "report.html"
    assert f"report: {page}" in capsys.readouterr().err
    text = page.read_text()
    assert "Held-out pairs" in text and "6 clusters of " in text
    assert len(pictures_in(text)) > 50
    lines = metrics(tmp_path / "run")
    seen = [x["step"] for x in lines if any(k.startswith("val_HO_") for k in x)]
    assert seen == [2, 4]
    snapshot = load_snapshot(tmp_path / "run")
    assert {"image", "text"} <= {block["name"] for block in snapshot.clusters}
    rows = list(csv.DictReader((tmp_path / "run" / "clusters.csv").read_text().splitlines()))
    for block in snapshot.clusters:  # a card's number counts all of the data, pictured or not
        sizes = Counter(row[block["name"]] for row in rows if row[block["name"]])
        assert len(rows) > 60 and {str(c["cluster"]): c["samples"] for c in block["cards"]} == sizes
    assert snapshot.facts["memory_bytes"]["forward"] > 2**20


CHECK = """<script>
addEventListener("load", () => {
  document.querySelectorAll(".gallery").forEach(box => box.open = true);
  setTimeout(check, 500);  // they are filled after an event
});
function check() {
  const out = document.createElement("pre");
  out.id = "state";
  const canvas = document.querySelector("canvas"), more = document.querySelector(".gallery button");
  const before = document.querySelectorAll(".proto").length;
  more?.click();
  canvas.focus();
  canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", cancelable: true}));
  out.textContent = JSON.stringify({
    sections: [...document.querySelectorAll("section")].map(s => s.id),
    cards: document.querySelectorAll(".proto").length,
    more: document.querySelectorAll(".proto").length - before,
    focus: document.activeElement === canvas,
    said: canvas.closest(".map").querySelector("[data-hint]").textContent,
    images: document.images.length,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    wide: document.scrollingElement.scrollWidth - innerWidth,
    inked: [...document.querySelectorAll("canvas")].map(c =>
      c.getContext("2d").getImageData(0, 0, c.width, c.height).data.some(v => v)),
  });
  document.body.append(out);
}
</script>"""


def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium here; Debian: apt-get install chromium")
def test_a_real_browser_shows_it_narrow_and_dark(runs, tmp_path):
    page = write_report([runs[1], runs[0]], tmp_path / "page.html")
    page.write_text(page.read_text().replace("</body>", CHECK + "</body>"))
    seen = subprocess.run(
        [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            "--virtual-time-budget=8000", "--enable-logging=stderr", "--window-size=500,2400",
            "--blink-settings=preferredColorScheme=0", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = re.search(r'<pre id="state">(.*?)</pre>', seen.stdout, re.S)
    assert found and "CONSOLE" not in seen.stderr, seen.stderr[-2000:]  # where errors are logged
    state = json.loads(html.unescape(found[1]))
    assert state["sections"] == list(SECTIONS)
    assert state["images"] > 50 and state["broken"] == 0 and state["cards"] > 0
    assert state["wide"] <= 0  # nothing sticks out on a narrow screen
    assert state["inked"] == [True, True]
    # By keyboard: the button of a gallery, and an arrow key on the map.
    assert state["more"] > 0 and state["focus"]
    assert re.match("(image of|caption): ", state["said"])


def test_a_collapse_of_the_prototypes_is_said_on_the_page(runs, tmp_path):
    healthy = {"image_inertia": 0.3, "image_clusters": 100, "image_largest_share": 0.05}
    shutil.copytree(runs[0], tmp_path / "run")
    for largest, said in ((0.1, False), (0.4, True)):
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            for line in ({"step": 900}, {"step": 950, "image_largest_share": largest}):
                file.write("\n" + json.dumps(healthy | line))
        text = write_report([tmp_path / "run"]).read_text()
        sentence = "step 950: the image prototypes are collapsing: one image cluster holds 40%"
        assert (sentence in text) == said
