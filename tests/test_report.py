"""The pictures of a run: drawn, readable characters, right neighbours."""

import json
import sys
import warnings

import pytest
import torch
from PIL import Image

from protoclip.data import Labels
from protoclip.report import curves, plot_curves, plot_prototypes, prototypes, read_series, style


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's "Glyph missing", among others
        yield


def write_metrics(path, steps):
    lines = []
    for step in range(steps):
        record = {"step": step, "samples": 8 * step, "loss": 5.0 - step / steps, "lr": 1e-3}
        record |= {"contrastive_loss": 4.0, "logit_scale": 14.0, "note": "x", "flag": True}
        lines.append(json.dumps(record))
    lines.append(json.dumps({"step": steps, "val_HO_text_retrieval_recall@5": 0.5}))
    lines.append("[1, 2]")
    lines.append('{"step": 3, "lo')  # the run was killed here
    path.write_text("\n".join(lines))


class Pictures:
    """Solid colours; awkward captions."""

    name, labels = "pictures", {}
    texts = ("price $5 and $6", "猫 и кошка", "grin \U0001f600 \ue000", "a^b_c {x} " + "long " * 40)

    def __init__(self, n):
        self.keys = [str(i) for i in range(n)]

    def __len__(self):
        return len(self.keys)

    def image(self, i):
        return Image.new("RGB", (9, 9), (i * 37 % 256, i * 91 % 256, 120))

    def captions(self, i):
        return (self.texts[i % len(self.texts)],)


def test_series_skip_what_is_not_a_number(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", 3)
    series = read_series(tmp_path / "metrics.jsonl")
    assert series["loss"] == ([0, 1, 2], pytest.approx([5, 5 - 1 / 3, 5 - 2 / 3]))
    assert series["val_HO_text_retrieval_recall@5"] == ([3], [0.5])
    assert "note" not in series and "flag" not in series and "step" not in series


def test_panels_and_legends():
    names = ["loss", "proto_loss", "logit_scale", "logit_scale_proto", "lr", "seconds_data"]
    panels = dict(curves.panels([*names, "val_HO_text_retrieval_recall@5"]))
    assert panels["Loss (nats)"] == ["proto_loss"]  # the total would flatten the terms
    assert panels["Logit scale"] == ["logit_scale", "logit_scale_proto"]
    assert panels["Recall at 5"] == ["val_HO_text_retrieval_recall@5"]
    assert dict(curves.panels(["loss"]))["Loss (nats)"] == ["loss"]
    assert curves.words_of("val_HO_text_retrieval_recall@5") == "HO image → text"
    assert curves.words_of("proto_loss") == "proto loss"


def test_running_mean():
    assert curves._running_mean([1.0, 2.0, 6.0, 3.0]) == pytest.approx([1.5, 3, 11 / 3, 4.5])


@pytest.mark.parametrize("steps", [1, 300])
def test_curves_are_drawn_without_pyplot(tmp_path, steps, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # another test's
    write_metrics(tmp_path / "metrics.jsonl", steps)
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    picture = Image.open(tmp_path / "curves.png").convert("RGB")
    assert picture.width > 800 and len(picture.getcolors(1 << 24)) > 50
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []
    assert "matplotlib.pyplot" not in sys.modules


def test_curves_of_nothing_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="before its first log"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_characters_no_font_has_become_dots():
    assert style.drawable("caf\u00e9 \ue000\nx") == "caf\u00e9 ·\nx"


def test_spread_goes_from_the_largest_to_the_smallest():
    counts = torch.tensor([3, 0, 9, 1, 5, 5])
    assert prototypes.spread_by_size(counts, 3) == [2, 5, 3]
    assert prototypes.spread_by_size(counts, 99) == [2, 4, 5, 0, 3]


def test_nearest_are_found_among_all_samples():
    features = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 3], [5, 0.2]])
    labels = torch.tensor([0, 0, 7, -1, 7])
    got = prototypes.nearest_samples(
        features, labels, [7, 0], 2
    )  # mean of rows 2 and 4: the diagonal
    assert got[1].tolist() == [4, 1] or got[1].tolist() == [4, 0]
    assert got.shape == (2, 2)


@pytest.mark.parametrize("n", [1, 60])
def test_prototype_sheet(tmp_path, n):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 20, (n,), generator=g).abs()
    index = torch.randperm(80, generator=g)[:n]
    classes = Labels(torch.randint(0, 3, (80,), generator=g), ("a", "b_c$", "猫"))
    image, text = torch.randn(n, 8, generator=g), torch.randn(n, 6, generator=g)
    plot_prototypes(
        tmp_path / "p.png", Pictures(80), image, text, labels, index=index, classes=classes
    )
    picture = Image.open(tmp_path / "p.png").convert("RGB")
    assert len(picture.getcolors(1 << 24)) > 20
    shown = set(picture.resize((picture.width // 2, picture.height // 2), 0).getdata())
    samples = Pictures(80)
    assert any(samples.image(int(i)).getpixel((0, 0)) in shown for i in index)


def test_prototype_sheet_refuses(tmp_path):
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="all labels are negative"):
        plot_prototypes(tmp_path / "p.png", Pictures(3), x, x, torch.full((3,), -100))
    with pytest.raises(ValueError, match="expected as many rows"):
        plot_prototypes(tmp_path / "p.png", Pictures(3), x, x[:2], torch.zeros(3).long())
