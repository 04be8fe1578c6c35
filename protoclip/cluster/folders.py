"""The groups as folders of links or copies: --link-to and --copy-to."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from protoclip.cluster.groups import Groups
from protoclip.common.files import whole_files
from protoclip.common.paths import check_above
from protoclip.common.waits import each
from protoclip.data import PairDataset


def open_group_folder(args: argparse.Namespace, dataset: PairDataset) -> None:
    """Make the folder of --link-to or --copy-to; ValueError if it will not do."""
    if not (args.link_to or args.copy_to):
        return
    flag = "--link-to" if args.link_to else "--copy-to"
    folder = Path(args.link_to or args.copy_to)
    if not (dataset.facts.has_pictures and dataset.path(0)):
        raise ValueError(
            f"{flag}: expected a folder of pictures or a table of files as DATA, got {args.data}; "
            "leave the flag out"
        )
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{flag}: expected a new or empty folder, but {folder} is in use")
    check_above(folder / "0", flag)
    probe = folder / "link"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if args.link_to:
            probe.symlink_to("nowhere")
            probe.unlink()
    except OSError as error:
        reason = f"{folder} cannot hold links ({error.strerror}); use --copy-to"
        if args.copy_to or not folder.is_dir():
            reason = f"{folder} cannot be created ({error.strerror})"
        raise ValueError(f"{flag}: {reason}") from error


def write_folders(folder: Path, dataset: PairDataset, groups: Groups, copy: bool) -> None:
    """Put links to the files of each group, or copies, into a folder named by its number.

    ``folder`` is empty. Where files of a group have one name, the nearest to the centroid keeps it.
    """
    numbers = groups.labels.unique().tolist()
    width = len(str(numbers[-1]))
    with whole_files(folder) as temporary:
        for group in each(numbers, "groups as folders", "groups"):
            group_folder = temporary / f"{group:0{width}}"
            group_folder.mkdir()
            files = list(dict.fromkeys(dataset.path(i) for i in groups.members(group)))
            for file, name in zip(files, different_names(files), strict=True):
                if copy:
                    shutil.copyfile(file, group_folder / name)
                    with contextlib.suppress(OSError):  # a disk without such times or permissions
                        shutil.copystat(file, group_folder / name)
                        mode = stat.S_IMODE(os.stat(file).st_mode) & 0o777
                        os.chmod(group_folder / name, mode)  # without another user's set-user-ID
                else:
                    (group_folder / name).symlink_to(os.path.abspath(file))


def different_names(files: Sequence[str]) -> list[str]:
    """The names of files, numbered where one has come before: x.png, x (2).png. Upper and lower
    case are not told apart, as on the disks of cameras."""
    used_names: set[str] = set()
    repeats: Counter[str] = Counter()  # how often each name has come before
    names = []
    for file in files:
        base_name = os.path.basename(file)
        stem, ending = os.path.splitext(base_name)
        name = base_name
        while name.casefold() in used_names:
            repeats[base_name.casefold()] += 1
            name = f"{stem} ({repeats[base_name.casefold()] + 1}){ending}"
        used_names.add(name.casefold())
        names.append(name)
    return names
