"""Files and folders that appear when they are whole: several writers at once, their modes, and whose files they are."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused_lora.whole import written_whole


@pytest.mark.parametrize("folder", [False, True])
def test_two_writers_of_one_path_do_not_meet(folder: bool, tmp_path: Path) -> None:
    both, texts, errors = threading.Barrier(2, timeout=60), ("one" * 1000, "two" * 1000), []

    def write(text: str) -> None:
        try:
            with written_whole(tmp_path / "path", folder) as unfinished:
                both.wait()
                (unfinished / "file" if folder else unfinished).write_text(text)
                both.wait()
        except OSError as error:  # The second folder finds the first one's in its place.
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "path" / "file" if folder else tmp_path / "path").read_text() in texts
    assert len(errors) == folder and os.listdir(tmp_path) == ["path"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_users_own_file_of_a_like_name_stays(folder: bool, tmp_path: Path) -> None:
    (tmp_path / "path.unfinished").write_text("mine")
    with written_whole(tmp_path / "path", folder) as unfinished:
        (unfinished / "file" if folder else unfinished).write_text("new")
    assert (tmp_path / "path.unfinished").read_text() == "mine" and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_are_those_of_ordinary_new_files(mask: int, tmp_path: Path) -> None:
    """safetensors alone gives its files to their owner alone."""
    before = os.umask(mask)
    try:
        with written_whole(tmp_path / "file") as unfinished:
            save_file({"a": torch.zeros(1)}, unfinished)
        with written_whole(tmp_path / "folder", folder=True) as unfinished:
            (unfinished / "inner").mkdir()
            save_file({"a": torch.zeros(1)}, unfinished / "inner" / "file")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "file", tmp_path / "folder")}
    assert modes == {"file": 0o666 & ~mask, "folder": 0o777 & ~mask}
    assert (tmp_path / "folder" / "inner" / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_link_to_an_empty_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with written_whole(tmp_path / "link", folder=True) as unfinished:
        save_file({"a": torch.zeros(1)}, unfinished / "file")
    assert (tmp_path / "link").is_symlink() and list(load_file(tmp_path / "there" / "file")) == ["a"]


@pytest.mark.parametrize("folder", [False, True])
def test_the_current_folder_is_in_use(folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (".", tmp_path):
        with pytest.raises(FileExistsError, match="is a folder in use"), written_whole(path, folder):
            pass
    assert Path.cwd() == tmp_path
