"""Settings: limits, presets, JSON and back; and where a command cannot write, it says so first."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import config_of

from protoclip.__main__ import main
from protoclip.ops.dispatch import TABLE
from protoclip.settings.config import (
    EpisodeConfig,
    TrainConfig,
    from_dict,
    load_preset,
    preset_names,
    to_dict,
)

pytestmark = pytest.mark.smoke


def test_default_is_what_no_flag_does_and_paper_is_a_preset() -> None:
    assert config_of("--preset", "default") == TrainConfig() == config_of()
    assert config_of("--paper") == config_of("--preset", "paper")


@pytest.mark.parametrize("name", preset_names())
def test_each_preset_is_a_config_and_goes_to_json_and_back(name: str) -> None:
    config = config_of("--preset", name)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_preset_may_be_flags_as_they_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    text = '{"--method": "clip", "--batch-size": 8, "lr": 0.5}'
    path.write_text(text, encoding="utf-8-sig")  # as Windows writes it
    config = load_preset(str(path))
    assert (config.method, config.optim.batch_size, config.optim.lr) == ("clip", 8, 0.5)


def test_flags_change_a_preset() -> None:
    config = config_of("--preset", "paper-cc3m-8gpu", "--k", "10", "--wd", "1", "--no-PBT")
    assert (config.episode.num_clusters, config.optim.wd, config.episode.pbt) == (10, 1.0, False)
    assert (config.optim.batch_size, config.optim.warmup) == (64, 15625)
    assert config.episode.kmeans_nredo == 3 and config.episode.replacement


def test_print_config_is_a_preset_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        config_of("--paper", "--k", "3", "--print-config")
    assert ended.value.code == 0
    path = tmp_path / "printed.json"
    path.write_text(capsys.readouterr().out)
    assert config_of("--preset", str(path)) == config_of("--paper", "--k", "3")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "-1"], "--lr: expected at least 0"),
        (["--lr", "nan"], "--lr: expected a finite number"),
        (["--beta2", "1.5"], "--beta2: expected at most 1"),
        (["--batch-size", "1"], "--batch-size: expected at least 2"),
        (["--preset", "papr"], "expected one of default, paper"),
        (["--episode-features", "reuse", "--infonce-warmup-epoch", "0"], "1 or more"),
    ],
    ids=" ".join,
)
def test_bad_values_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(*flags)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"episode": {"clutsers": 3}}', "has no \\['clutsers'\\]"),
        ('{"optim": {"lr": "fast"}}', "expected float for lr, got 'fast'"),
        (f'{{"optim": {{"lr": {10**400}}}}}', "--lr: expected a finite number, got inf"),
        ('{"batch-size": "many"}', "expected int for batch_size, got 'many'"),
        ('{"batch-sise": 3}', "has no \\['batch-sise'\\]"),
        ('{"optim": 3}', "expected OptimConfig for optim, got 3"),
        ('{"run": {"seed": true}}', "expected int for seed, got True"),
        ("[]", "expected a JSON object, got list"),
        ("{", "x.json cannot be used"),
        ('{"extends": "x.json"}', "expected one of default.* in 'extends', got 'x.json'"),
        ('{"extends": 3}', "expected one of default.* in 'extends', got 3"),
        ('{"run": {"seed": -1}}', "--seed: expected at least 0"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        config_of("--preset", "x.json")


@pytest.mark.parametrize("flag", ["--preset", "--config"])
def test_a_file_may_name_settings_by_their_flags(tmp_path: Path, flag: str) -> None:
    content = {
        "extends": "paper", "method": "clip", "batch-size": 64, "--k": 7, "PBT": False,
        "max_steps": 3, "optim": {"lr": 0.5}, "model": "ViT-B-32",
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(content))
    words = ["--method", "clip", "--batch-size", "64", "--k", "7", "--no-PBT"]
    words += ["--model", "ViT-B-32"]
    expected = config_of("--paper", *words, "--max-steps", "3", "--lr", "0.5")
    assert config_of(flag, str(tmp_path / "x.json")) == expected


COMMANDS = {
    "evaluate": ["protoclip-tiny", "--pretrained", "random", "--data", "builtin:none"],
    "report": ["run"],
    "export": ["weights.pt"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_mistaken_outputs_are_refused_first(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_of: Callable[..., str],
    command,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "weights.pt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    argv = [command, *COMMANDS[command]]
    flag = "--out"
    for path, words in (("file/x", "but file is a file"), ("folder", "folder")):
        if (command, path) != ("export", "folder"):
            error = error_of(main, [*argv, flag, path])
            assert f"error: {flag}: " in error and words in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("gpus", "lit_start"), [("8gpu", 398), ("1gpu", 98)])
def test_presets_of_the_paper_are_the_authors_commands(gpus, lit_start) -> None:
    """Their --lit-start-epoch counts from 1; their baseline has neither heads nor that phase."""
    name = f"paper-cc3m-{gpus}"
    paper, clip, fair = (config_of("--preset", name + end) for end in ("", "-clip", "-clip-fair"))
    assert (paper.episode.lit_start, paper.model.use_bn_sync) == (lit_start, False)
    assert (paper.model.model, paper.episode.size) == ("RN50-quickgelu", 200_000)
    assert (paper.data.augmentation, clip.data.augmentation) == ("paper", "clip")
    assert clip.method == "clip" and clip.episode.lit_start == 0 and clip.optim == paper.optim
    crop = dataclasses.replace(clip.data, augmentation="paper")
    assert dataclasses.replace(clip, data=crop) == fair


def test_every_backend_of_kmeans_can_be_named() -> None:
    """Settings know no ops, so their words are held equal to the table here."""
    (setting,) = (f for f in dataclasses.fields(EpisodeConfig) if f.name == "kmeans_backend")
    assert set(setting.metadata["choices"]) == {"auto", "faiss", *TABLE["kmeans_assign"]}
