"""k-means from a file of its state: killed anywhere and called again, it gives the same bits; a
file of another call, torn, or of other rows is refused."""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from kmeans_cases import (
    CASES,
    SCREENED,
    WEIGHTS,
    Case,
    CountedRows,
    assert_same_clusters,
    stored,
)
from ranks import CONTEXT, exit_codes, free_port, full_disk, in_group, on_ranks
from safetensors.torch import save_file

import protoclip
from protoclip import distributed
from protoclip.common import digest, sealed, waits
from protoclip.lloyd import points as points_module
from protoclip.lloyd import slices, starts
from protoclip.lloyd.state import OtherCallError, place_of
from protoclip.ops import clusters, reference

RUNS = {
    name: CASES[name]
    for name in (
        "screened in 8 bits", "fp64", "large integers", "weights",
        "spherical", "split", "empty clusters", "empty clusters, weights",
        "more clusters than points", "far from 0", "random", "plain k-means++",
        "the reference",
    )
} | {
    "tol": Case(SCREENED.numpy(), 60, {"tol": 1e-2, "num_iters": 100}),
    "some centroids": Case(SCREENED.numpy(), 60, {"init": SCREENED[:20]}),
    "restarts of k-means++, weights": Case(
        SCREENED.numpy(), 60, {"weights": WEIGHTS, "num_restarts": 2, "num_iters": 3}
    ),
    "plain k-means++, fp64": Case(SCREENED.double().numpy(), 60, {"init": "plain k-means++"}),
    "plain k-means++, the reference": Case(
        SCREENED.numpy(), 60, {"init": "plain k-means++", "backend": "reference"}
    ),
}  # fmt: skip


def keep_rows_on_disk() -> None:
    """Small rows too, in a process of its own; see ``rows_stay_on_disk``."""
    starts.GREEDY_BYTES = 3000
    starts.FEWEST_ROWS = 0
    points_module.BLOCK_BYTES = 256 * 40 * 4
    slices.CHUNK = 32 * 40
    reference._CHUNK_ELEMENTS = 32 * 60


class Fate:
    """Kills its process at one of the places where it is called."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.places = 0

    def __call__(self, *_: object) -> None:
        self.places += 1
        if self.places == self.place:
            os.kill(os.getpid(), signal.SIGKILL)

    def waits_in_files(self, name: str = "") -> None:
        """Between the last byte of a file and its name."""
        rename = os.replace

        def replace_later(source: Any, target: Any) -> None:
            if name in str(target):
                self()
            rename(source, target)

        os.replace = replace_later

    def waits_in_starts(self) -> None:
        draw = starts._Candidates.draw

        def draw_later(*arguments: Any) -> Any:
            self()
            return draw(*arguments)

        starts._Candidates.draw = draw_later  # type: ignore[method-assign]


def run_until(fate: Fate, case: Case, points: Any, state: Path, **options: Any) -> None:
    """A run that ends, and leaves its result, or is killed. A greedy start is made again as a
    whole, so that only those on disk are killed between their draws."""
    fate.waits_in_files()
    if starts.FEWEST_ROWS == 0:
        fate.waits_in_starts()
    clusters = case.run(
        points, state=state, state_seconds=0, progress=fate, on_rows=fate, **options
    )
    torch.save(vars(clusters), state.with_suffix(".result"))


def in_fork(function: Callable[..., None], *arguments: Any) -> int:
    """The exit code of a forked process, which this one must have no threads for."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        function(*arguments)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def kill_until_it_ends(
    attempt: Callable[[Fate], None], places: int, chance: random.Random
) -> tuple[int, int]:
    """Kill a run again and again, most often before it has come to its end; how often it was
    killed, and its exit code. From the file to the next one it takes five places."""
    for kills in range(100):
        code = in_fork(attempt, Fate(chance.randrange(1, 8 + places // 2)))
        if code != -signal.SIGKILL:
            return kills, code
    return 100, -1


def survivors(folder: Path, on_disk: bool) -> dict[str, str]:
    """What is wrong with each case; nothing, if all is well."""
    if on_disk:
        keep_rows_on_disk()
    problems = {}
    total_kills = 0
    for number, (name, case) in enumerate(RUNS.items()):
        points: Any = case.array
        if on_disk:
            (folder / name).mkdir()
            points = stored(case.array, folder / name)
        expected = case.run(points)
        state = folder / f"{number}.state"
        whole = Fate(-1)
        case.run(points, progress=whole, on_rows=whole)

        def attempt(fate: Fate, case=case, points=points, state=state) -> None:
            run_until(fate, case, points, state)

        kills, code = kill_until_it_ends(attempt, whole.places, random.Random(number))
        total_kills += kills
        if code:
            problems[name] = f"exit code {code} after {kills} kills"
            continue
        result = torch.load(state.with_suffix(".result"), weights_only=True)
        try:
            assert_same_clusters(protoclip.Clusters(**result), expected)
            assert result["converged"] == expected.converged
        except AssertionError as error:
            problems[name] = f"after {kills} kills: {error}"
        if any(path.suffix == ".tmp" for path in folder.iterdir()):
            problems[name] = "a temporary file is left"
    if total_kills < 2 * len(RUNS):
        problems["all"] = f"only {total_kills} kills"
    return problems


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_a_killed_run_continues_with_the_same_bits(on_disk: bool, tmp_path: Path) -> None:
    assert on_ranks(1, survivors, tmp_path, on_disk) == [{}]


# ---- ranks ----


def one_rank(
    rank: int,
    ranks: int,
    port: int,
    victim: tuple[int, int],
    name: str,
    on_disk: bool,
    folder: Path,
) -> None:
    """A rank of a run, which may be killed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start(distributed.find_rank(), torch.device("cpu"), 60)
    if on_disk:
        keep_rows_on_disk()
    bounds = [3000 * number // ranks + 7 * (0 < number < ranks) for number in range(ranks + 1)]
    part = slice(bounds[rank], bounds[rank + 1])
    case = RUNS[name]
    options = {}
    if "weights" in case.options:
        options["weights"] = case.options["weights"][part]
    points: Any = case.array[part]
    if on_disk:
        points = folder / f"rows-{rank}.npy"
        np.save(points, case.array[part])
    fate = Fate(victim[1] if victim[0] == rank else -1)
    state = folder / f"{ranks}.state" if victim[1] else None
    if rank == 0 and state is not None:
        fate.waits_in_files()
    clusters = case.run(
        points, group=dist.group.WORLD, state=state, state_seconds=0, progress=fate,
        on_rows=fate, **options,
    )  # fmt: skip
    torch.save(vars(clusters), folder / f"result-{rank}")
    distributed.stop()


@pytest.mark.parametrize(
    ("ranks", "name", "on_disk"),
    [(2, "weights", True), (3, "empty clusters", False), (2, "plain k-means++, fp64", False)],
)
def test_killed_ranks_continue_with_the_same_bits(
    ranks: int, name: str, on_disk: bool, tmp_path: Path
) -> None:
    """One of them is killed, and the others end with an error."""

    def run(victim: tuple[int, int]) -> list[int | None]:
        port = free_port()
        processes = [
            CONTEXT.Process(
                target=one_rank, args=(rank, ranks, port, victim, name, on_disk, tmp_path)
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        return exit_codes(processes)

    def results() -> list[protoclip.Clusters]:
        files = [tmp_path / f"result-{rank}" for rank in range(ranks)]
        return [protoclip.Clusters(**torch.load(file, weights_only=True)) for file in files]

    assert run((0, 0)) == [0] * ranks
    expected = results()
    for victim in ((0, 5), (ranks - 1, 4), (0, 8)):
        assert run(victim)[victim[0]] == -signal.SIGKILL
    assert run((0, -1)) == [0] * ranks
    for got, whole in zip(results(), expected, strict=True):
        assert_same_clusters(got, whole)


def errors_of_ranks(folder: Path) -> list[str]:
    """What each rank is told: of rows of other ranks, of a torn file, of no folder."""
    state = folder / "x.state"
    rank = dist.get_rank()

    def run(state: Path, rows: int = 40) -> str:
        points = torch.arange(2.0 * rows + rank).reshape(-1, 1)
        try:
            protoclip.kmeans(points[: rows + rank], 3, group=dist.group.WORLD, state=state)
        except (ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    told = [run(state), run(state, 41 - 2 * rank)]
    if rank == 0:
        state.write_bytes(state.read_bytes()[:-100])
    return [*told, run(state), run(folder / "missing" / "x.state")]


def test_all_ranks_have_the_same_error(tmp_path: Path) -> None:
    first, second = in_group(2, errors_of_ranks, tmp_path)
    assert first == second and first[0] == "no error"
    assert "OtherCallError" in first[1] and "rows of each rank" in first[1]
    assert "torn" in first[2] and first[3].startswith("FileNotFoundError")


# ---- what a file is of ----


class StopError(Exception):
    pass


def stop_at(iteration: int) -> Callable[..., None]:
    def progress(number: int, inertia: object) -> None:
        if number == iteration:
            raise StopError

    return progress


SMALL = SCREENED[:400]
OPTIONS: dict[str, Any] = {"num_iters": 6, "seed": 3, "weights": WEIGHTS[:400], "tol": 0}


def small_run(state: Path | None = None, points: Any = SMALL, **options: Any) -> protoclip.Clusters:
    return protoclip.kmeans(points, 12, state=state, warn=False, **OPTIONS | options)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The state of a run that was stopped in its fourth iteration."""
    with pytest.raises(StopError):
        small_run(tmp_path / "k.state", progress=stop_at(3))
    return tmp_path / "k.state"


def test_what_stops_a_run_keeps_its_iterations(stopped: Path) -> None:
    """The clock would not have written before ten minutes."""
    numbers: list[int] = []
    clusters = small_run(stopped, progress=lambda number, _: numbers.append(number))
    assert numbers == [2, 3, 4, 5]
    assert_same_clusters(clusters, small_run())


def changed_at(place: int) -> torch.Tensor:
    points = SMALL.clone()
    points[place, 39] += 1e-6
    return points


OTHERS: dict[str, dict[str, Any]] = {
    "num_iters": {"num_iters": 7},
    "tol": {"tol": 1e-5},
    "num_restarts": {"num_restarts": 2},
    "init": {"init": "random"},
    "seed": {"seed": 4},
    "spherical": {"spherical": True},
    "weights": {"weights": WEIGHTS[1:401]},
    "empty_clusters": {"empty_clusters": "split"},
    "backend": {"backend": "reference"},
    "rows": {"points": changed_at(399)},
    "rows, dtype": {"points": SMALL.double()},
}


@pytest.mark.parametrize("names", OTHERS)
def test_another_call_is_refused_and_the_file_stays(names: str, stopped: Path) -> None:
    before = stopped.read_bytes()
    with pytest.raises(OtherCallError, match="is of a call with other .*; use another file, or"):
        small_run(stopped, **OTHERS[names])
    try:
        small_run(stopped, **OTHERS[names])
    except OtherCallError as error:
        assert set(names.split(", ")) == set(error.different) - {"backend"} | (
            {"backend"} if names == "backend" else set()
        )
    assert stopped.read_bytes() == before


def test_given_centroids_are_part_of_a_call(tmp_path: Path) -> None:
    state = tmp_path / "k.state"
    small_run(state, init=SMALL[:12])
    with pytest.raises(OtherCallError, match="other init;"):
        small_run(state, init=SMALL[1:13])


@pytest.mark.parametrize("place", [0, 1500, 2999])
def test_rows_on_disk_that_changed_are_noticed(place: int, tmp_path: Path) -> None:
    rows = SCREENED.numpy().copy()
    np.save(tmp_path / "rows.npy", rows)
    protoclip.kmeans(tmp_path / "rows.npy", 9, num_iters=2, state=tmp_path / "s", warn=False)
    rows[place, 7] = np.nextafter(rows[place, 7], 9)
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(OtherCallError, match="other rows;"):
        protoclip.kmeans(tmp_path / "rows.npy", 9, num_iters=2, state=tmp_path / "s")


def test_the_inertia_tells_rows_that_no_checksum_tells(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest.Digest, "hexdigest", lambda self: "00" * 16)
    state = tmp_path / "other.state"
    with pytest.raises(StopError):
        small_run(state, progress=stop_at(3))
    before = state.read_bytes()
    with pytest.raises(ValueError, match="not .* as when they were written: the rows or weights"):
        small_run(state, points=changed_at(0) * 1.01)
    assert state.read_bytes() == before


def test_another_number_of_threads_is_told(stopped: Path) -> None:
    expected = small_run()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(RuntimeWarning, match="may differ in its last bits"):
            got = small_run(stopped)
    finally:
        torch.set_num_threads(threads)
    assert got.inertia == pytest.approx(expected.inertia, rel=1e-5)


# ---- damaged files ----


def test_a_damaged_file_is_refused_or_does_not_matter(stopped: Path) -> None:
    """A byte flipped, or the end cut off, at many places: the length of the seal itself is the one
    thing that no seal covers."""
    content = stopped.read_bytes()
    expected = small_run()
    refused = 0
    for place in range(0, len(content), len(content) // 60):
        flipped = bytearray(content)
        flipped[place] ^= 0x10
        for damaged in (bytes(flipped), content[:place]):
            stopped.write_bytes(damaged)
            try:
                assert_same_clusters(small_run(stopped), expected)
            except ValueError as error:
                assert "use another path, or remove it" in str(error)
                assert stopped.read_bytes() == damaged
                refused += 1
    assert refused >= 118


@pytest.mark.parametrize("stranger", ["text", "checkpoint", "hierarchy", "newer", "folder"])
def test_the_file_of_a_stranger_is_refused(stranger: str, stopped: Path) -> None:
    if stranger == "text":
        stopped.write_text("notes\n")
    elif stranger == "checkpoint":
        sealed.save(stopped, {"state_dict": {"w": torch.ones(2)}})
    elif stranger == "hierarchy":
        stopped.unlink()
        protoclip.hierarchical_kmeans(SMALL, [9, 3], resamplings=0, state=stopped)
    elif stranger == "newer":
        sealed.save(stopped, sealed.load(stopped) | {"format": 2})
    else:
        stopped.unlink()
        stopped.mkdir()
    before = stopped.read_bytes() if stopped.is_file() else b""
    with pytest.raises((ValueError, OSError), match=r"expected a state|Is a directory"):
        small_run(stopped)
    assert (stopped.read_bytes() if stopped.is_file() else b"") == before


def test_a_full_disk_is_noticed_at_once_and_later_it_ends_no_run(tmp_path: Path) -> None:
    state = tmp_path / "k.state"
    with full_disk(100), pytest.raises(OSError, match=r"cannot write: .*k\.state"):
        small_run(state, progress=stop_at(0))
    assert not state.exists()
    small_run(state, num_iters=0)
    room = state.stat().st_size - 500  # for the first file, without centroids
    state.unlink()
    with full_disk(room), pytest.warns(RuntimeWarning, match="could not be written") as told:
        clusters = small_run(state, state_seconds=0)
    assert len([warning for warning in told if "could not" in str(warning.message)]) == 1
    assert_same_clusters(clusters, small_run())
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
    assert_same_clusters(small_run(state), clusters)


@pytest.mark.parametrize("folder", ["/proc/self", "/sys", "missing", "file"])
def test_a_folder_that_takes_no_file_is_noticed_at_once(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write: .*k\.state"):
        small_run(tmp_path / folder / "k.state", progress=stop_at(0))


def test_a_second_run_with_one_file_is_refused(stopped: Path) -> None:
    def second(*_: object) -> None:
        with pytest.raises(ValueError, match=r"kmeans: .*k.state is in use by another process"):
            small_run(stopped)

    assert_same_clusters(small_run(stopped, progress=second), small_run())


def test_temporary_files_of_a_killed_run_are_removed(stopped: Path) -> None:
    leftover = stopped.with_name("k.state.0123abcd.77.tmp")
    other = stopped.with_name("k.state.old.tmp")
    for file in (leftover, other):
        file.touch()
    small_run(stopped)
    assert not leftover.exists() and other.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "faiss", "weights": None}, "backend 'faiss' keeps no state"),
        ({"state_seconds": -1}, "expected state_seconds >= 0, got -1"),
        ({"state_seconds": "often"}, "expected state_seconds >= 0, got 'often'"),
    ],
)
def test_wrong_arguments_are_explained(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        small_run(tmp_path / "k.state", **options)
    assert list(tmp_path.iterdir()) == []


# ---- passes ----


def reads_of(rows: CountedRows, state: Path | None, **options: Any) -> float:
    """How often a run reads all rows."""
    rows.num_read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        protoclip.kmeans(rows, 60, init=SCREENED[:60], num_iters=8, tol=0, state=state, **options)
    return rows.num_read // len(SCREENED)


def test_a_resumed_run_makes_two_passes_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One looks at the rows, one assigns them to the centroids of the file."""
    monkeypatch.setattr(starts, "GREEDY_BYTES", 3000)
    rows = CountedRows(SCREENED.numpy())
    assert reads_of(rows, None) == 1 + 9
    for iteration in range(1, 8):
        state = tmp_path / str(iteration)
        with pytest.raises(StopError):
            reads_of(rows, state, progress=stop_at(iteration))
        left = 8 - (iteration - 1)
        assert reads_of(rows, state) == left + 2
        assert reads_of(rows, state, progress=stop_at(0)) == 2  # it has ended


@pytest.mark.parametrize("num_restarts", [1, 3])
def test_a_state_keeps_no_centroids_in_memory_that_the_run_does_not_keep(
    num_restarts: int, tmp_path: Path
) -> None:
    """They are counted, whatever refers to them; the file holds some of those of the run."""

    def most(state: Path | None) -> int:
        counts = []

        def progress(*_: object) -> None:
            tensors = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
            counts.append(len({x.data_ptr() for x in tensors if x.shape == (13, 40)}))

        options = {"num_restarts": num_restarts, "num_iters": 30, "weights": None}
        clusters = protoclip.kmeans(
            SMALL, 13, state=state, progress=progress, warn=False, **options
        )
        assert clusters.centroids.shape == (13, 40)
        return max(counts)

    assert most(tmp_path / "k.state") == most(None)


# ---- what a line says ----


@pytest.mark.skipif(
    protoclip.backends("kmeans_assign")["cpu"] is not None, reason="bounds are the C++ backend's"
)
def test_a_line_says_the_inertia_the_share_of_products_and_the_age_of_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "BOUNDED_CLUSTERS", 1)
    monkeypatch.setattr(clusters, "BOUNDED_PRODUCTS", 0)
    speaker = waits.Speaker("a command", clock=lambda: 0.0)
    monkeypatch.setattr(waits, "_speaker", speaker)
    lines: list[str] = []

    def progress(number: int, inertia: torch.Tensor) -> None:
        assert f"inertia {float(inertia):.6g}" in speaker._waits[0].note
        lines.append(speaker._waits[0].words(0.0))

    run = functools.partial(protoclip.kmeans, SCREENED, 60, num_iters=8, warn=False)
    run(state=tmp_path / "k.state", progress=progress)
    first, *_, last = lines
    number = r"[0-9.e+]+"
    assert re.fullmatch(
        rf"k-means: 1 of at most 8 iterations, inertia {number}, saved \d+ s ago, .*", first
    )
    assert re.fullmatch(
        rf"k-means: 8 of at most 8 iterations, inertia {number}, {number} % of the products, "
        r"saved \d+ s ago, .*",
        last,
    )
    lines.clear()
    run(progress=progress)
    assert len(lines) == 8 and not any("saved" in line for line in lines)


# ---- spherical ----


@pytest.mark.parametrize("seed", [1, 2, 12, 13])
def test_spherical_runs_with_rows_of_zeros_end(seed: int) -> None:
    """Rounding sends the zeros to one centroid and back."""
    random = torch.Generator().manual_seed(seed)
    points = torch.randn(8, 3, generator=random)
    points[torch.rand(8, generator=random) < 0.4] = 0
    run: dict[str, Any] = {"tol": 0, "spherical": True, "seed": seed}
    clusters = protoclip.kmeans(points, 2, num_iters=500, **run)
    assert clusters.converged and 4 < clusters.num_iters < 60
    same = protoclip.kmeans(points, 2, num_iters=clusters.num_iters - 1, **run, warn=False)
    assert torch.equal(same.centroids, clusters.centroids)
    assert same.history[:-1] == clusters.history[: same.num_iters]


# ---- the commands ----


def commands_that_survive(folder: Path) -> dict[str, str]:
    """What is wrong with the files of commands that were killed, of each command."""
    from protoclip.cluster import __main__ as cluster
    from protoclip.curate import __main__ as curate
    from protoclip.curate import hierarchy

    each_iteration = functools.partial(protoclip.kmeans, state_seconds=0)
    cluster.kmeans = hierarchy.kmeans = each_iteration
    rows = torch.cat([torch.randn(60, 5) + 9 * torch.eye(5)[number] for number in range(3)])
    np.save(folder / "rows.npy", rows.numpy())
    cases = {
        "cluster": (cluster.main, ["--k", "auto"], ["clusters.csv", "centroids.safetensors"], 4),
        "curate": (
            curate.main,
            ["--levels", "20,4", "--target", "50", "--resamplings", "2"],
            ["selected.csv", "hierarchy.safetensors"],
            20,
        ),
    }
    problems = {}
    for name, (main, flags, files, places) in cases.items():
        command = [str(folder / "rows.npy"), *flags, "--out"]
        whole, out = folder / f"{name}-whole", folder / name
        if code := main([*command, str(whole)]):
            return {name: f"exit code {code}"}

        def attempt(fate: Fate, main=main, command=command, out=out) -> None:
            fate.waits_in_files(".state")
            if code := main([*command, str(out)]):
                os._exit(code)

        kills, code = kill_until_it_ends(attempt, places, random.Random(5))
        if code or kills < 2:
            problems[name] = f"exit code {code} after {kills} kills"
        elif any((whole / file).read_bytes() != (out / file).read_bytes() for file in files):
            problems[name] = "other files"
        left = {path.name for path in out.iterdir()} ^ {path.name for path in whole.iterdir()}
        if left:
            problems[name] = f"these files are left: {sorted(left)}"
    return problems


def test_killed_commands_write_the_same_files(tmp_path: Path) -> None:
    assert on_ranks(1, commands_that_survive, tmp_path) == [{}]


def cluster_rows_of(folder: Path, *flags: str) -> int:
    from protoclip.cluster.__main__ import main

    if not (folder / "rows.npy").exists():
        np.save(folder / "rows.npy", SCREENED.numpy())
    rows, out = str(folder / "rows.npy"), str(folder / "out")
    return main([rows, "--k", "20", "--iters", "9", *flags, "--out", out])


def stop_cluster(folder: Path, number: int) -> int:
    """The exit code of a command that has a signal in its fourth iteration."""
    from protoclip.cluster import __main__ as command

    def kmeans(*arguments: Any, progress: Callable[..., None], **options: Any) -> Any:
        def send(iteration: int, inertia: Any) -> None:
            if iteration == 4:
                os.kill(os.getpid(), number)
            progress(iteration, inertia)

        return protoclip.kmeans(*arguments, progress=send, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "kmeans", kmeans)
        return cluster_rows_of(folder)


@pytest.fixture
def half_clustered(tmp_path: Path) -> Path:
    """The output folder of a command that was stopped by SIGTERM."""
    stop_cluster(tmp_path, signal.SIGTERM)
    return tmp_path / "out"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_cluster_that_is_stopped_saves_and_exits_with_the_signals_code(
    number: int, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stop_cluster(tmp_path, number) == code
    assert "before its end; the same command continues" in capsys.readouterr().err
    assert place_of(tmp_path / "out" / "kmeans.state") == (0, 3)
    assert not (tmp_path / "out" / "clusters.csv").exists()
    assert cluster_rows_of(tmp_path) == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    assert cluster_rows_of(whole) == 0
    for file in ("clusters.csv", "centroids.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / "out" / file).read_bytes()


def test_cluster_says_where_it_continues(
    half_clustered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cluster_rows_of(half_clustered.parent) == 0
    told = capsys.readouterr().err
    assert "k-means continues after iteration 3 of at most 9 of run 1 of 3" in told
    assert not list(half_clustered.glob("*kmeans.state*"))


def test_cluster_with_other_settings_is_refused_or_begins_again(
    half_clustered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cluster_rows_of(half_clustered.parent, "--seed", "5") == 2
    told = capsys.readouterr().err
    assert "out holds a run of k-means with other seed; choose another folder, or begin" in told
    assert cluster_rows_of(half_clustered.parent, "--seed", "5", "--overwrite") == 0
    assert "continues after" not in capsys.readouterr().err


# ---- hierarchical_kmeans ----

HIERARCHY: dict[str, Any] = {"levels": [40, 6], "resamplings": 1, "num_iters": 8}


def test_a_flipped_byte_of_a_hierarchy_is_noticed(tmp_path: Path) -> None:
    state = tmp_path / "h.state"
    protoclip.hierarchical_kmeans(SMALL, **HIERARCHY, state=state)
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match="hierarchical_kmeans: expected a state that it wrote"):
        protoclip.hierarchical_kmeans(SMALL, **HIERARCHY, state=state)
    assert state.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"backend": "reference"}, "backend"),
        ({"rows": changed_at(201)}, "rows"),
        ({"weights": WEIGHTS[:400]}, "weights"),
        ({"num_iters": 7}, "num_iters"),
    ],
)
def test_another_hierarchy_is_refused(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    state = tmp_path / "h.state"
    protoclip.hierarchical_kmeans(SMALL, **HIERARCHY, state=state)
    with pytest.raises(OtherCallError, match=f"is of a call with other {name};"):
        protoclip.hierarchical_kmeans(**{"rows": SMALL} | HIERARCHY | options, state=state)


def test_a_state_of_an_earlier_version_is_read_and_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A .safetensors file without a checksum, as that version wrote it."""
    state = tmp_path / "state.safetensors"
    expected = protoclip.hierarchical_kmeans(SMALL, **HIERARCHY, state=state)
    payload = sealed.load(state)
    _, places = json.loads(payload["text"])
    tensors = {name: payload["tensors"][place["tensor"]] for name, place in places.items()}
    plans = [
        {"rows": rows, "clusters": k, "resamplings": 1, "sample_size": sample}
        for rows, k, sample in [(400, 40, 5), (40, 6, 3)]
    ]
    settings = {
        "rows": [400, 40, 123],
        "levels": plans, "choose": "closest", "num_iters": 8, "init": "k-means++", "seed": 0,
        "weights": None,
    }  # fmt: skip
    text = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    save_file(tensors | {"settings": text}, state)
    places: list[tuple[int, ...]] = []
    got = protoclip.hierarchical_kmeans(
        SMALL, **HIERARCHY, state=state, progress=lambda *place: places.append(place)
    )
    assert "was made before version 0.2" in caplog.text
    assert places == [] and torch.equal(got.levels[0].centroids, expected.levels[0].centroids)
    assert sealed.is_sealed(state)
