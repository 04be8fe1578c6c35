"""Without a card the Triton kernels run in Triton's interpreter, which must be asked for before
anything imports triton.

``--bare`` is for a machine that holds torch, triton, numpy and pytest only: what is missing there
is a skip with its reason. ``--nan-empties`` shows what a kernel forgot to write.
"""

import functools
import http.server
import json
import os
import threading
from contextlib import ExitStack

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core, so have the runs it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

MAY_MISS = {
    "PIL", "hypothesis", "matplotlib", "open_clip", "safetensors", "tensorboard", "torchvision",
    "tqdm", "webdataset",
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--bare", action="store_true", help="a missing optional package is a skip")
    parser.addoption("--nan-empties", action="store_true", help="torch.empty holds NaN at first")
    share = "I/K: only compile the kernels of every K-th test from I on (make gpu)"
    parser.addoption("--compile-share", help=share)


def pytest_configure(config):
    if config.getoption("--nan-empties"):  # in C++ too: at::empty fills in this mode
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    if config.getoption("--compile-share") and torch.cuda.is_available():
        from protoclip.kernels.compile_report.launches import recording

        stack = ExitStack()
        stack.enter_context(recording())  # the outputs are garbage, the compiler's cache is full
        config.add_cleanup(stack.close)


def pytest_collection_modifyitems(config, items):
    if share := config.getoption("--compile-share"):
        first, step = map(int, share.split("/"))
        items[:] = items[first::step]


def _skip_where_bare(report, config, error, path):
    if report.failed and config.getoption("--bare") and isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        if package in MAY_MISS:
            report.outcome = "skipped"
            report.longrepr = (str(path), 0, f"Skipped: {package} is not installed")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    error = report.call.excinfo.value.__cause__ if report.failed else None
    return _skip_where_bare(report, collector.config, error, collector.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    error = call.excinfo.value if report.failed else None
    return _skip_where_bare(report, item.config, error, item.path)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_page(monkeypatch):
    """Training ends without pictures and report, which take longer than a tiny run."""
    monkeypatch.setattr("protoclip.train.draw_plots", lambda *_: None)
    monkeypatch.setattr("protoclip.train.page.write_report", lambda runs: runs[0])


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """The config file of a model that trains in no time."""
    from ranks import TINY

    path = tmp_path_factory.mktemp("model") / "nano.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def trained(nano, tmp_path_factory):
    """The folder of a run of five steps, the last one with prototypes, to be read or copied."""
    from protoclip.train import main

    logs = tmp_path_factory.mktemp("trained")
    flags = ["--train-data", "builtin:shapes:64", "--batch-size", "16", "--max-steps", "5"]
    flags += ["--infonce-warmup-epoch", "1", "--k", "4", "--external-teacher", "none"]
    flags += ["--report-to", "none", "--model", str(nano), "--logs", str(logs), "--name", "r"]
    assert main(flags) == 0
    return logs / "r"


@pytest.fixture
def serve():
    """Starts a web server on a folder; ``serve(folder, length, asked)`` is its address."""
    servers = []

    def start(folder, length=None, asked=None):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def send_head(self):
                if asked is not None:
                    asked.append(self.path)
                return super().send_head()

            def send_header(self, name, value):
                super().send_header(name, (length or value) if name == "Content-Length" else value)

            def log_message(self, *args):
                pass

        handler = functools.partial(Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
