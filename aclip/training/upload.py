"""Copies finished checkpoints elsewhere while the run goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec

from aclip.distributed import say
from aclip.errors import ConfigError
from aclip.run_folder.checkpoint_folder import LATEST, MANIFEST


class Uploader:
    """Uploads one checkpoint at a time; of those that wait, only the newest.

    Args:
        url: a folder, as fsspec takes it: s3://bucket/run, gs://..., or a path. It gets a folder
            for each checkpoint, whose manifest.json comes last, and `latest`.

    Raises:
        ConfigError: fsspec does not know the URL, or lacks a package for it.
    """

    def __init__(self, url: str):
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"train.upload_to is {url}, which can't be opened ({error}); install the package "
                "that fsspec names, or correct the URL"
            ) from None
        self._url = url
        self._thread = ThreadPoolExecutor(1, "upload")
        self._uploads: dict[Path, Future] = {}

    @property
    def unfinished(self) -> set[Path]:
        """Checkpoints that are still read, or wait to be."""
        return {folder for folder, future in self._uploads.items() if not future.done()}

    def put(self, folder: Path) -> None:
        """Uploads a complete checkpoint in the background; one that still waits gives way."""
        for waiting, future in self._uploads.items():
            if future.cancel():
                say(f"{waiting.name} is not uploaded: a newer checkpoint came first")
        future = self._thread.submit(self._upload, folder)
        future.add_done_callback(partial(self._report, folder))
        self._uploads = {folder: future} | {f: self._uploads[f] for f in self.unfinished}

    def close(self) -> None:
        """Waits for what is being uploaded."""
        self._thread.shutdown(wait=True)

    def _upload(self, folder: Path) -> None:
        target = f"{self._root}/{folder.name}"
        self._files.makedirs(target, exist_ok=True)
        # The manifest makes a checkpoint complete, so it comes after everything it lists.
        names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
        for name in [*names, MANIFEST]:
            self._files.put_file(str(folder / name), f"{target}/{name}")
        self._files.pipe_file(f"{self._root}/{LATEST}", folder.name.encode())

    def _report(self, folder: Path, upload: Future) -> None:
        if upload.cancelled():
            return
        error = upload.exception()
        if error is not None:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"{folder.name} was not uploaded to {self._url} ({said}); the run goes on")
