"""Without a card the Triton kernels run in Triton's interpreter, which must be asked for before
anything imports triton.

``--bare`` is for a machine that holds torch, triton, numpy and pytest only: what is missing there
is a skip with its reason. ``--nan-empties`` shows what a kernel forgot to write.
"""

from __future__ import annotations

import functools
import http.server
import importlib
import json
import os
import sys
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core, so have the runs it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# They take minutes: begun last, one of them would keep a single core busy in the end.
LONG_FILES = (
    "test_kernels_compile.py",
    "test_kernels_hot_paths.py",
    "test_ptx.py",
    "test_benchmarks.py",
    "test_openclip_trainer.py",
    "test_distributed_launch.py",
    "test_stop.py",
)

MAY_MISS = {
    "PIL", "hypothesis", "matplotlib", "open_clip", "safetensors", "tensorboard", "torchvision",
    "tqdm", "webdataset",
}  # fmt: skip


def pytest_collection_finish() -> None:
    if "open_clip.factory" in sys.modules and "protoclip.report.page" in sys.modules:
        importlib.import_module("warm")
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton.runtime.interpreter" in sys.modules:
        importlib.import_module("interpreter").speed_up()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bare", action="store_true", help="a missing optional package is a skip")
    parser.addoption("--nan-empties", action="store_true", help="torch.empty holds NaN at first")
    words = "all cases of scikit-learn's own tests, not only the first of each"
    parser.addoption("--all-peer-tests", action="store_true", help=words)
    words = "also more than 2^31 logits on the CPU, half a minute"
    parser.addoption("--all-sizes", action="store_true", help=words)
    share = "I/K: only compile the kernels of every K-th test from I on (make gpu)"
    parser.addoption("--compile-share", help=share)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist: files in the order of the tests
        config.option.loadscopereorder = False
    if config.getoption("--nan-empties"):  # in C++ too: at::empty fills in this mode
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    if config.getoption("--compile-share") and torch.cuda.is_available():
        from benchmarks.compile_report.launches import recording

        stack = ExitStack()
        stack.enter_context(recording())  # the outputs are garbage, the compiler's cache is full
        config.add_cleanup(stack.close)


def first_of_each_peer_test(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of the cases of each of scikit-learn's own tests the first; ``make check-peers`` has all."""
    seen: set[str] = set()

    def is_wanted(item: pytest.Item) -> bool:
        if item.path.name != "test_kmeans_sklearn.py":
            return True
        name = item.name.partition("[")[0]
        is_first = name not in seen
        seen.add(name)
        return is_first

    return [item for item in items if is_wanted(item)]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-peer-tests"):
        items[:] = first_of_each_peer_test(items)
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    if share := config.getoption("--compile-share"):
        first, step = map(int, share.split("/"))
        items[:] = items[first::step]


def _skip_where_bare(
    report: Any, config: pytest.Config, error: BaseException | None, path: Path
) -> Any:
    if report.failed and config.getoption("--bare") and isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        if package in MAY_MISS:
            report.outcome = "skipped"
            report.longrepr = (str(path), 0, f"Skipped: {package} is not installed")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    error = report.call.excinfo.value.__cause__ if report.failed else None
    return _skip_where_bare(report, collector.config, error, collector.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    report = yield
    error = call.excinfo.value if report.failed else None
    return _skip_where_bare(report, item.config, error, item.path)


@pytest.hookimpl(tryfirst=True)  # before fixtures that draw
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test draws the same numbers each time, whichever folder it lies in, and others than the
    first test of its module, for which a fixture may have drawn."""
    name = item.nodeid.partition("::")[2]
    torch.manual_seed(zlib.crc32(f"tests/{item.path.name}::{name}".encode()))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_lines_of_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that tests call say no more on a slow machine than on a fast one."""
    monkeypatch.setattr("protoclip.common.waits.LOOK_EVERY", 1e6)


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training ends without pictures and report, which take longer than a tiny run."""
    monkeypatch.setattr("protoclip.training.summary.draw_plots", lambda *_: None)
    monkeypatch.setattr("protoclip.training.summary.page.write_report", lambda runs: runs[0])


@pytest.fixture
def quick_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages have a map without t-SNE, which takes longer than clustering a few hundred rows."""
    layout = "protoclip.report.snapshot.map_layout"
    monkeypatch.setattr(layout, lambda points: torch.linspace(0, 1, 2 * len(points)).view(-1, 2))


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch, no_page: None) -> None:
    """Nor is the model evaluated at the end."""
    monkeypatch.setattr("protoclip.evaluate.during.Evaluation.full", lambda *_: None)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_evaluation: None) -> Path:
    """The working directory, for runs that end without evaluation and report."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without pillow-heif."""
    from PIL import Image

    from protoclip.data import images

    extensions = {k: v for k, v in Image.registered_extensions().items() if v != "HEIF"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: extensions)
    monkeypatch.setattr(images, "can_open_heic", lambda: False)


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a model that trains in no time."""
    from ranks import TINY

    path = tmp_path_factory.mktemp("model") / "nano.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def trained(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of five steps, the last one with prototypes, to be read or copied."""
    from protoclip.train import main

    logs = tmp_path_factory.mktemp("trained")
    flags = [
        "--train-data", "builtin:shapes:64", "--batch-size", "16", "--max-steps", "5",
        "--infonce-warmup-epoch", "1", "--k", "4", "--external-teacher", "none",
        "--report-to", "none", "--model", str(nano), "--logs", str(logs), "--name", "r",
    ]  # fmt: skip
    assert main(flags) == 0
    return logs / "r"


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``error_of(main, argv)``: the one line of a command that refuses its flags with exit code 2.
    ``among_others``: other lines may come before and after it."""

    def error_of(
        command: Callable[[list[str]], int], argv: Sequence[str | Path], among_others: bool = False
    ) -> str:
        capsys.readouterr()
        try:
            code = command([str(word) for word in argv])
        except SystemExit as ended:  # argparse's
            code = ended.code
        message = capsys.readouterr().err
        assert code == 2 and message.count("error: ") == 1 and "Traceback" not in message, message
        assert among_others or message.count("\n") == 1, message
        return message.removesuffix("\n")

    return error_of


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder quietly. ``content_length``: what the headers say instead of the truth;
    ``requests``: the paths that were asked for."""

    def __init__(
        self,
        *arguments: Any,
        content_length: str | None,
        requests: list[str] | None,
        **options: Any,
    ) -> None:
        self.content_length = content_length
        self.requests = requests
        super().__init__(*arguments, **options)

    def send_head(self) -> Any:
        if self.requests is not None:
            self.requests.append(self.path)
        return super().send_head()

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Content-Length" and self.content_length is not None:
            value = self.content_length
        super().send_header(keyword, value)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a web server on a folder and returns its address, see ``Handler``."""
    servers = []

    def start(
        folder: Path, content_length: str | None = None, requests: list[str] | None = None
    ) -> str:
        handler = functools.partial(
            Handler, directory=str(folder), content_length=content_length, requests=requests
        )
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
