"""docs/own-loss.md: a term of one's own in a run, on one rank and two, over a resume."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import (
    CONTEXT,
    compile_first,
    config_of,
    exit_codes,
    logs_of,
    metrics,
    on_ranks,
    steps_of,
    tiny_run,
    wait_until,
)
from torch import Tensor, nn

import protoclip
from protoclip.evaluate.during import Evaluation
from protoclip.report import page
from protoclip.runs import checkpoint
from protoclip.train import Term, TermInputs, make_config, train
from protoclip.training.loop import Trainer

PAGE = Path(protoclip.__file__).parents[1] / "docs" / "own-loss.md"
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
ON_PAGE = 'train_data="builtin:shapes:2000", epochs=4, name="spread"'
STOPS_AT = 4


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """``tiny_run`` in keywords."""
    words = tiny_run(folder, "run", "--max-steps", "7")
    flags = dict(zip(words[::2], words[1::2], strict=True))
    return {flag[2:].replace("-", "_"): value for flag, value in flags.items()} | changes


def bare() -> None:
    """In a process of its own: no evaluation and no page, which take longer than training."""
    from protoclip.training import summary

    Evaluation.full = lambda *_: None  # type: ignore[method-assign]
    summary.draw_plots = lambda *_: None  # type: ignore[assignment]
    summary.page.write_report = lambda runs: runs[0]  # type: ignore[assignment]


def run_page(folder: Path, changes: dict[str, Any], stops: bool = False) -> None:
    """The page's program with other settings; ``stops``: it dies in a step."""
    os.chdir(folder)
    bare()
    original = Trainer.take_step

    def step(self: Trainer, number: int, *arguments: Any, **options: Any) -> Any:
        if stops and number == STOPS_AT:
            raise RuntimeError("pulled the plug")
        return original(self, number, *arguments, **options)

    code = CODE.replace(ON_PAGE, ", ".join(f"{name}={value!r}" for name, value in changes.items()))
    assert code != CODE
    with mock.patch.object(Trainer, "take_step", step):
        try:
            exec(compile(code, str(PAGE), "exec"), {"__name__": "own_loss"})
        except RuntimeError as error:
            if not (stops and "pulled the plug" in str(error)):
                raise


def run_page_whole_and_cut(folder: Path, whole: dict[str, Any]) -> None:
    """In one run, and in another that dies and is resumed."""
    run_page(folder, whole)
    cut = whole | {"name": f"cut-{whole['name']}", "save_every": "2steps"}
    run_page(folder, cut, stops=True)
    assert len(metrics(folder / "logs" / cut["name"])) == STOPS_AT
    run_page(folder, cut)


def values(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["spread"]) for line in metrics(run)]


def test_the_page_is_short() -> None:
    assert len(CODE.splitlines()) <= 24
    assert len([line for line in CODE.splitlines() if line]) <= 20


def test_the_page_runs_on_one_rank_and_two_and_resumes(tmp_path: Path) -> None:
    on_ranks(1, run_page_whole_and_cut, tmp_path, settings(tmp_path, name="one"))
    on_ranks(2, run_page_whole_and_cut, tmp_path, settings(tmp_path, name="two", batch_size=6))
    one, cut_one, two, cut_two = (
        values(tmp_path / "logs" / name) for name in ("one", "cut-one", "two", "cut-two")
    )
    assert len(one) == 7
    assert cut_one == one and cut_two == two
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=1e-5)
    _, payload = checkpoint.load_newest(tmp_path / "logs" / "two")
    saved = payload["protoclip"]["own_terms"]["spread"]
    assert saved["weight"] == 0.1 and saved["state"]["log_t"] != torch.tensor(0.7)
    assert not any("log_t" in name for name in payload["state_dict"])


def run_page_into_a_log(folder: Path, changes: dict[str, Any]) -> None:
    log = os.open(folder / "rank0.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run_page(folder, changes)


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_script_as_it_ends_the_command(
    tmp_path: Path, sent: str, code: int
) -> None:
    compile_first()
    changes = settings(tmp_path, max_steps=1_000_000)
    process = CONTEXT.Process(target=run_page_into_a_log, args=(tmp_path, changes))
    process.start()
    wait_until(lambda: steps_of(tmp_path, "run") >= 3, [process], tmp_path)
    assert process.pid is not None
    os.kill(process.pid, signal.Signals[sent])
    assert exit_codes([process]) == [code]
    printed = logs_of(tmp_path)
    assert "continue with --resume logs/run" in printed
    assert "Traceback" not in printed and "logs/run None" not in printed  # the page's last line


def stop_on_rank(folder: Path) -> tuple[int, bool]:
    """The exit code that a run asks for which is told to stop, and whether it is still in a
    process group then."""
    os.chdir(folder)
    bare()
    original = Trainer.take_step

    def step(self: Trainer, number: int, *arguments: Any, **options: Any) -> Any:
        if number == STOPS_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, number, *arguments, **options)

    Trainer.take_step = step  # type: ignore[method-assign]
    try:
        train(make_config(**settings(folder, batch_size=6, max_steps=100)))
    except SystemExit as stop:
        return stop.code, dist.is_initialized()
    raise AssertionError("it went on")


def test_ranks_that_stop_leave_their_group(tmp_path: Path) -> None:
    assert on_ranks(2, stop_on_rank, tmp_path) == [(143, False), (143, False)]


class Recorder(nn.Module):
    """Counts its calls in a buffer, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.weight = nn.Parameter(torch.ones(3))
        self.inputs: list[TermInputs] = []

    def forward(self, inputs: TermInputs) -> Tensor:
        self.calls += 1
        self.inputs.append(inputs)
        return inputs.image_features[:, 0].square().mean() * self.weight.mean()


def test_a_term_sees_the_whole_step_and_is_enough_of_a_loss(workdir: Path) -> None:
    module = Recorder()
    changes: dict[str, Any] = {
        "w_clip": 0,
        "accum_freq": 2,
        "batch_size": 6,
        "precision": "amp_bf16",
    }
    config = make_config(**settings(workdir, **changes))
    run = train(config, terms={"mine": Term(module, weight=2.0)})
    assert run == (Path("logs/run"), None)
    assert module.calls == len(module.inputs) == 7
    assert [inputs.step for inputs in module.inputs] == list(range(7))
    first = module.inputs[0]
    last = module.inputs[-1]
    assert first.image_features.shape == first.text_features.shape == (12, 16)
    assert first.image_projections is None
    assert last.image_projections is not None and last.text_projections is not None
    assert last.image_projections.shape == (12, 8)
    assert first.image_features.dtype == last.text_projections.dtype == torch.float32
    assert first.index.shape == (12,) and first.ids is None
    torch.testing.assert_close(first.image_features.norm(dim=1), torch.ones(12))
    line = metrics(run.folder)[0]
    assert line["loss"] == pytest.approx(2 * line["mine"])
    assert not torch.equal(module.weight, torch.ones(3))
    assert ">mine<" in page.render([page.read_run(run.folder)])

    changes |= {"resume": "logs/run", "max_steps": 9}
    again = make_config(**settings(workdir, **changes))
    with pytest.raises(ValueError, match="'mine' is missing"):
        train(make_config(**settings(workdir, **changes | {"w_clip": 1})))
    refusals: list[tuple[dict[str, Term], str]] = [
        ({"mine": Term(Recorder(), 1.0)}, "'mine' had the weight 2 and has 1"),
        ({"mine": Term(Recorder(), 2.0), "more": Term(Recorder())}, "'more' is new"),
    ]
    for terms, words in refusals:
        with pytest.raises(ValueError, match=words):
            train(again, terms=terms)
    resumed = Recorder()
    train(again, terms={"mine": Term(resumed, 2.0)})
    assert resumed.calls == 9


def test_a_skipped_step_puts_buffers_back(workdir: Path) -> None:
    class Sick(Recorder):
        def forward(self, inputs: TermInputs) -> Tensor:
            value = super().forward(inputs)
            return value * float("nan") if inputs.step == 1 else value

    module = Sick()
    train(make_config(**settings(workdir, max_steps=3)), terms={"sick": Term(module)})
    assert len(module.inputs) == 3 and module.calls == 2


def test_a_term_that_is_never_finite_ends_the_run_and_is_named(workdir: Path) -> None:
    class Nan(nn.Module):
        def forward(self, inputs: TermInputs) -> Tensor:
            return inputs.image_features.sum() * float("nan")

    words = r"7 of 7 steps were skipped, .* \(in the last one: .*\bmine, .*\bloss, grad_norm\)"
    with pytest.raises(ValueError, match=words):
        train(make_config(**settings(workdir)), terms={"mine": Term(Nan())})


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"loss": Term(Recorder())}, "that no other metric has"),
        ({"two words": Term(Recorder())}, "a name that is a word"),
        ({"mine": Term(Recorder(), 0.0)}, "a weight above 0"),
        ({"mine": Recorder()}, "expected Term"),
        ({0: Term(Recorder())}, "term 0: expected a name that is a word"),
        ([Term(Recorder())], "expected a dict .*, got a list; write terms={'mine': Term"),
        (Term(Recorder()), "expected a dict .*, got a Term; write terms={'mine': Term"),
    ],
)
def test_terms_that_cannot_work_are_refused_before_a_folder_is_made(
    terms: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=words):
        train(make_config(**settings(tmp_path)), terms=terms)
    assert not Path("logs").exists()


class Changing(nn.Module):
    """A queue that is another after each step."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.register_buffer("queue", torch.zeros(0, 16))

    def forward(self, inputs: TermInputs) -> Tensor:
        self.queue = self.change(self.queue, inputs.image_features.detach())
        return inputs.image_features.mean()


class Late(nn.Module):
    """One that is made in the first step."""

    def forward(self, inputs: TermInputs) -> Tensor:
        self.register_buffer("queue", torch.zeros(4, 16))
        return inputs.image_features.mean()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            Changing(lambda queue, rows: torch.cat([queue, rows])),
            "(0, 16), torch.float32), got (12, 16), torch.float32 after a step",
        ),
        (
            Changing(lambda queue, rows: queue.half()),
            "(0, 16), torch.float32), got (0, 16), torch.float16 after a step",
        ),
        (Late(), "(absent), got (4, 16), torch.float32 after a step"),
    ],
)
def test_a_buffer_that_changes_its_shape_is_named(
    module: nn.Module, words: str, workdir: Path
) -> None:
    with pytest.raises(ValueError) as error:
        train(make_config(**settings(workdir)), terms={"mine": Term(module)})
    assert str(error.value).startswith("term 'mine': expected its buffer 'queue' to stay as it was")
    assert words in str(error.value) and "register it in __init__" in str(error.value)


def test_a_term_that_is_no_scalar_is_named(workdir: Path) -> None:
    class Vector(nn.Module):
        def forward(self, inputs: TermInputs) -> Tensor:
            return inputs.image_features

    with pytest.raises(ValueError, match=r"'rows': expected a scalar tensor, got shape \(12, 16\)"):
        train(make_config(**settings(workdir)), terms={"rows": Term(Vector())})


def train_on_rank(folder: Path) -> tuple[int, int]:
    """The buffer after a run, and how often the module was called."""
    os.chdir(folder)
    bare()
    module = Recorder()
    train(make_config(**settings(folder, batch_size=6)), terms={"mine": Term(module)})
    return int(module.calls), len(module.inputs)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"epcohs": 3}, TypeError, "epcohs: no such setting; did you mean epochs[?]"),
        ({"w_cilp": 0.5}, TypeError, "did you mean w_clip[?]"),
        ({"data": "x.csv"}, TypeError, "data: no such setting; did you mean train_data[?]"),
        ({"learning_rate": 1}, TypeError, "no such setting; did you mean lr[?]"),
        ({"xyzzy": 3}, TypeError, "protoclip train --help-all lists them"),
        ({"print_config": True}, TypeError, "print_config: no such setting"),
        ({"epochs": "many"}, ValueError, "--epochs: invalid float value: 'many'"),
        ({"epochs": -1}, ValueError, "--epochs: expected at least 0"),
        ({"method": "simclr"}, ValueError, "--method: invalid choice: 'simclr'"),
        ({"batch_size": True}, ValueError, "--batch-size: expected one argument"),
    ],
)
def test_a_slip_in_a_notebook_is_an_error_that_names_the_remedy(
    keywords: dict[str, Any],
    error: type[Exception],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(error, match=words):
        make_config(**keywords)
    assert capsys.readouterr() == ("", "")


@pytest.mark.smoke
def test_keywords_are_flags() -> None:
    config = make_config(PBT=False, w_clip=0.5, train_data="a b.csv", workers="auto", lr=1e-4)
    assert config == config_of(
        "--no-PBT", "--w-clip", "0.5", "--train-data", "a b.csv", "--workers", "auto",
        "--lr", "1e-4",
    )  # fmt: skip


def test_the_pass_that_orders_buckets_puts_buffers_back(tmp_path: Path) -> None:
    first, second = on_ranks(2, train_on_rank, tmp_path)
    assert first == second and first[0] == 7 < first[1]
