"""Files and folders that appear under their name when they are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def written_whole(path: str | os.PathLike[str], folder: bool = False) -> Iterator[Path]:
    """Gives a path beside `path` to write to, or a new folder, and renames it to `path` if the block ends well.

    Otherwise it is removed and what was at `path` stays. A file at `path` is replaced, a folder only if it is empty.
    Raises FileExistsError if there is a folder in the way, before anything is written, and OSError if nothing can be
    written, also where safetensors says so in its own way.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    if path.is_dir() and (not folder or any(path.iterdir())):
        raise FileExistsError(
            f"{str(path)!r} is a folder in use; expected {'an empty or ' if folder else ''}a new path."
        )
    if folder and path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file; expected a new folder.")
    if unfinished.is_dir() or (folder and unfinished.exists()):
        raise FileExistsError(f"{str(unfinished)!r} is left from a run that was killed; remove it.")
    if folder:
        unfinished.mkdir()
    try:
        yield unfinished
        unfinished.replace(path)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} could not be written: {error}.") from error
    finally:
        if folder:
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)
