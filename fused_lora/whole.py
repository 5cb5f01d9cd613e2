"""Files and folders that appear under their name when they are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError


@contextmanager
def written_whole(path: str | os.PathLike[str], folder: bool = False) -> Iterator[Path]:
    """Gives a path to write to, of an empty file or folder, and renames it to `path` if the block ends well.

    Otherwise it is removed and what was at `path` stays. A file at `path` is replaced, a folder only if it is empty.
    Several processes may write to one path at once. One that is killed leaves a folder fused_lora.*.unfinished beside.
    Raises FileExistsError if there is a folder in the way, before anything is written, and OSError if nothing can be
    written, also where safetensors says so in its own way.
    """
    path = Path(path)
    # The current folder would be another's after the renaming, and a link would be replaced instead of its folder.
    if path.is_dir() and (not folder or any(path.iterdir()) or path.samefile(".")):
        raise FileExistsError(
            f"{str(path)!r} is a folder in use; expected {'an empty or ' if folder else ''}a new path."
        )
    if folder and path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file; expected a new folder.")
    path = path.resolve() if path.is_dir() else path
    # In a folder of its own, since other processes may write to the same path.
    with TemporaryDirectory(".unfinished", "fused_lora.", path.parent, ignore_cleanup_errors=True) as beside:
        unfinished = Path(beside, path.name)
        unfinished.touch()
        mode = unfinished.stat().st_mode
        if folder:
            unfinished.unlink()
            unfinished.mkdir()
        try:
            yield unfinished
        except SafetensorError as error:
            raise OSError(f"{str(path)!r} could not be written: {error}.") from error
        for file in unfinished.rglob("*") if folder else (unfinished,):
            # safetensors gives a new file to its owner alone.
            if file.is_file():
                file.chmod(mode)
        unfinished.replace(path)
