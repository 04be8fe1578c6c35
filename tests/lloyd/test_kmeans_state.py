"""k-means from a file of its state: killed anywhere and called again, it gives the same bits; a
file of another call, torn, or of other rows is refused."""

from __future__ import annotations

import functools
import gc
import os
import random
import re
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from budget import on_threads, said
from kmeans_cases import (
    CASES,
    SCREENED,
    WEIGHTS,
    Case,
    CountedRows,
    assert_same_clusters,
    bound_few_points,
    keep_rows_on_disk,
    stored,
)
from ranks import exit_codes, full_disk, in_group, on_ranks, start_command

import protoclip
from protoclip import distributed
from protoclip.common import digest, sealed, waits
from protoclip.lloyd import starts
from protoclip.lloyd.state import OtherCallError, place_of

ROWS = 700  # three blocks on disk
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
        SCREENED.numpy(), 60, {"weights": WEIGHTS, "num_restarts": 2, "num_iters": 2}
    ),
    "plain k-means++, fp64": Case(SCREENED.double().numpy(), 60, {"init": "plain k-means++"}),
    "plain k-means++, the reference": Case(
        SCREENED.numpy(), 60, {"init": "plain k-means++", "backend": "reference"}
    ),
}  # fmt: skip
IN_MEMORY = [  # the others do there what they do on disk
    "screened in 8 bits", "weights", "spherical", "split", "empty clusters", "plain k-means++",
    "restarts of k-means++, weights",
]  # fmt: skip


class Fate:
    """Kills its process at one of the places where it is called."""

    def __init__(self, place: int = -1) -> None:
        self.place = place
        self.places = 0

    def __call__(self, *_: object) -> None:
        self.places += 1
        if self.places == self.place:
            os.kill(os.getpid(), signal.SIGKILL)

    def waits_in(self, module: Any, name: str, words: str = "") -> None:
        """Before each call of a function; ``words``: if they are in its arguments."""
        function = getattr(module, name)

        def later(*arguments: Any) -> Any:
            if words in str(arguments):
                self()
            return function(*arguments)

        setattr(module, name, later)


def kill_until_it_ends(attempt: Callable[[Fate], None], places: int, seed: int) -> int:
    """Run it in forks of this process, which has no threads, and kill them, most often before they
    have come to their end; how often. From a file to the next one it takes five places."""
    chance = random.Random(seed)
    for kills in range(100):
        fate = Fate(chance.randrange(1, 8 + places // 2))
        child = os.fork()
        if not child:
            try:
                attempt(fate)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            assert code == 0, f"exit code {code} after {kills} kills"
            return kills
    raise AssertionError("it does not end")


def kills_of(case: Case, folder: Path, on_disk: bool, seed: int) -> int:
    """How often a run was killed until it ended with the bits of a whole one. A greedy start is
    made again as a whole, so that only those on disk are killed between their draws."""
    folder.mkdir()
    points: Any = stored(case.array, folder, [300, 1]) if on_disk else case.array
    state, result = (folder.with_suffix(suffix) for suffix in (".state", ".result"))
    whole = Fate()
    expected = case.run(points, progress=whole, on_rows=whole)

    def attempt(fate: Fate) -> None:
        fate.waits_in(os, "replace")  # between the last byte of a file and its name
        if on_disk:
            fate.waits_in(starts._Candidates, "draw")
        got = case.run(points, state=state, state_seconds=0, progress=fate, on_rows=fate)
        torch.save(vars(got), result)

    kills = kill_until_it_ends(attempt, whole.places, seed)
    got = protoclip.Clusters(**torch.load(result, weights_only=True))
    assert_same_clusters(got, expected)
    assert got.converged == expected.converged
    assert not list(folder.parent.glob("*.tmp"))
    return kills


def survive(folder: Path, names: list[str], on_disk: bool) -> None:
    if on_disk:
        keep_rows_on_disk(pytest.MonkeyPatch())
    total = 0
    for seed, name in enumerate(names):
        with said(name):
            total += kills_of(RUNS[name].part(slice(ROWS)), folder / name, on_disk, seed)
    assert total >= 2 * len(names)


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_a_killed_run_continues_with_the_same_bits(on_disk: bool, tmp_path: Path) -> None:
    on_ranks(1, survive, tmp_path, list(RUNS) if on_disk else IN_MEMORY, on_disk)


# ---- ranks ----

FATE = Fate()  # of a rank


def doom(place: int) -> None:
    FATE.place = place


def main(argv: list[str]) -> int:
    """A rank of a run, of which a file is kept if one is named."""
    name, kind, *state = argv
    distributed.start(distributed.find_rank(), torch.device("cpu"), 60)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    bounds = [ROWS * number // ranks + 7 * (0 < number < ranks) for number in range(ranks + 1)]
    case = RUNS[name].part(slice(bounds[rank], bounds[rank + 1]))
    points: Any = case.array
    if kind == "on disk":
        keep_rows_on_disk(pytest.MonkeyPatch())
        points = Path(f"rows-{rank}.npy")
        np.save(points, case.array)
    if rank == 0:
        FATE.waits_in(os, "replace")
    got = case.run(
        points, group=dist.group.WORLD, state=state[0] if state else None,
        state_seconds=0, progress=FATE, on_rows=FATE,
    )  # fmt: skip
    torch.save(vars(got), f"result-{rank}")
    distributed.stop()
    return 0


@pytest.mark.parametrize(
    ("ranks", "name", "kind"),
    [(2, "empty clusters, weights", "on disk"), (3, "plain k-means++, fp64", "in memory")],
)
def test_killed_ranks_continue_with_the_same_bits(
    ranks: int, name: str, kind: str, tmp_path: Path
) -> None:
    """One of them is killed, and the others end with an error."""

    def run(*state: str, victim: int = 0, place: int = -1) -> list[int | None]:
        fault = functools.partial(doom, place)
        argv = [name, kind, *state]
        return exit_codes(
            start_command(tmp_path, argv, ranks, fault=fault, command=__name__, faulty_rank=victim)
        )

    def results() -> list[protoclip.Clusters]:
        files = [tmp_path / f"result-{rank}" for rank in range(ranks)]
        return [protoclip.Clusters(**torch.load(file, weights_only=True)) for file in files]

    assert run() == [0] * ranks
    expected = results()
    for victim, place in ((0, 5), (ranks - 1, 2), (0, 4)):
        assert run("x.state", victim=victim, place=place)[victim] == -signal.SIGKILL
    assert run("x.state") == [0] * ranks
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


def assert_refused(
    state: Path, words: str, kind: type[ValueError] = ValueError, **options: Any
) -> Any:
    """With these words, and the file stays; what is raised."""
    before = state.read_bytes()
    with pytest.raises(kind, match=words) as caught:
        small_run(state, **options)
    assert state.read_bytes() == before
    return caught.value


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
    sentence = f"is of a call with other {names}; use another file, or"
    error = assert_refused(stopped, sentence, OtherCallError, **OTHERS[names])
    assert list(error.different) == names.split(", ")


def test_given_centroids_are_part_of_a_call(tmp_path: Path) -> None:
    state = tmp_path / "k.state"
    small_run(state, init=SMALL[:12])
    assert_refused(state, "other init;", OtherCallError, init=SMALL[1:13])


@pytest.mark.parametrize("place", [0, 200, 399])
def test_rows_on_disk_that_changed_are_noticed(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_rows_on_disk(monkeypatch)
    state, path = tmp_path / "k.state", tmp_path / "rows.npy"
    rows = SMALL.numpy().copy()
    np.save(path, rows)
    small_run(state, path)
    rows[place, 7] = np.nextafter(rows[place, 7], 9)
    np.save(path, rows)
    assert_refused(state, "other rows;", OtherCallError, points=path)


def test_the_inertia_tells_rows_that_no_checksum_tells(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest.Digest, "hexdigest", lambda self: "00" * 16)
    state = tmp_path / "other.state"
    with pytest.raises(StopError):
        small_run(state, progress=stop_at(3))
    words = "not .* as when they were written: the rows or weights"
    assert_refused(state, words, points=changed_at(0) * 1.01)


def test_another_number_of_threads_is_told(stopped: Path) -> None:
    with pytest.warns(RuntimeWarning, match="may differ in its last bits"):
        (got,) = on_threads(lambda: small_run(stopped), [torch.get_num_threads() + 1])
    assert got.inertia == pytest.approx(small_run().inertia, rel=1e-5)


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


STRANGERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("notes\n"),
    "checkpoint": lambda path: sealed.save(path, {"state_dict": {"w": torch.ones(2)}}),
    "hierarchy": lambda path: protoclip.hierarchical_kmeans(
        SMALL, [9, 3], resamplings=0, state=path
    ),
    "newer": lambda path: sealed.save(
        path, {"op": "kmeans", "format": 2, "text": "", "tensors": []}
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_the_file_of_a_stranger_is_refused(stranger: str, tmp_path: Path) -> None:
    state = tmp_path / "k.state"
    STRANGERS[stranger](state)
    assert_refused(state, "expected a state")


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Is a directory"):
        small_run(tmp_path)


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


def test_a_state_keeps_no_centroids_in_memory_that_the_run_does_not_keep(tmp_path: Path) -> None:
    """They are counted, whatever refers to them; the file holds some of those of the run."""

    def most(state: Path | None) -> int:
        counts = []

        def progress(*_: object) -> None:
            tensors = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
            counts.append(len({x.data_ptr() for x in tensors if x.shape == (13, 40)}))

        protoclip.kmeans(
            SMALL, 13, num_restarts=2, num_iters=3, state=state, progress=progress, warn=False
        )
        assert len(counts) == 6
        return max(counts)

    assert most(tmp_path / "k.state") == most(None)


# ---- what a line says ----


@pytest.mark.skipif(
    protoclip.backends("kmeans_assign")["cpu"] is not None, reason="bounds are the C++ backend's"
)
def test_a_line_says_the_inertia_the_share_of_products_and_the_age_of_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound_few_points(monkeypatch)
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


def commands_that_survive(folder: Path) -> None:
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
    for name, (main, flags, files, places) in cases.items():
        command = [str(folder / "rows.npy"), *flags, "--out"]
        whole, out = folder / f"{name}-whole", folder / name
        assert main([*command, str(whole)]) == 0

        def attempt(fate: Fate, main=main, command=command, out=out) -> None:
            fate.waits_in(os, "replace", ".state")
            assert main([*command, str(out)]) == 0

        with said(name):
            assert kill_until_it_ends(attempt, places, seed=5) >= 2
            assert all((whole / file).read_bytes() == (out / file).read_bytes() for file in files)
            assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_killed_commands_write_the_same_files(tmp_path: Path) -> None:
    on_ranks(1, commands_that_survive, tmp_path)


def cluster_rows_of(folder: Path, *flags: str) -> int:
    from protoclip.cluster.__main__ import main

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


@pytest.mark.usefixtures("quick_map")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_cluster_that_is_stopped_saves_and_continues(
    number: int, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert stop_cluster(tmp_path, number) == code
    assert "before its end; the same command continues" in capsys.readouterr().err
    assert place_of(out / "kmeans.state") == (0, 3)
    assert not (out / "clusters.csv").exists()
    assert cluster_rows_of(tmp_path) == 0
    told = capsys.readouterr().err
    assert "k-means continues after iteration 3 of at most 9 of run 1 of 3" in told
    assert not list(out.glob("*kmeans.state*"))
    whole.mkdir()
    assert cluster_rows_of(whole) == 0
    for file in ("clusters.csv", "centroids.safetensors"):
        assert (out / file).read_bytes() == (whole / "out" / file).read_bytes()


@pytest.mark.usefixtures("quick_map")
def test_cluster_with_other_settings_is_refused_or_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_cluster(tmp_path, signal.SIGTERM)
    capsys.readouterr()
    assert cluster_rows_of(tmp_path, "--seed", "5") == 2
    told = capsys.readouterr().err
    assert "out holds a run of k-means with other seed; choose another folder, or begin" in told
    assert cluster_rows_of(tmp_path, "--seed", "5", "--overwrite") == 0
    assert "continues after" not in capsys.readouterr().err


# ---- hierarchical_kmeans ----

HIERARCHY: dict[str, Any] = {"levels": [40, 6], "resamplings": 1, "num_iters": 8}


OTHER_HIERARCHIES: dict[str, dict[str, Any]] = {
    "backend": {"backend": "reference"},
    "rows": {"rows": changed_at(201)},
    "weights": {"weights": WEIGHTS[:400]},
    "num_iters": {"num_iters": 7},
}


def test_another_hierarchy_and_a_flipped_byte_are_refused(tmp_path: Path) -> None:
    state = tmp_path / "h.state"
    run = functools.partial(protoclip.hierarchical_kmeans, state=state)
    call = {"rows": SMALL} | HIERARCHY
    run(**call)
    for name, options in OTHER_HIERARCHIES.items():
        with pytest.raises(OtherCallError, match=f"is of a call with other {name};"):
            run(**call | options)
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match="hierarchical_kmeans: expected a state that it wrote"):
        run(**call)
    assert state.read_bytes() == content
