"""A parquet row by row, and which of its columns can be paths and captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aclip.data.convert.sources.text_files import unreadable
from aclip.errors import ConfigError

ROWS_A_BATCH = 1024


class ParquetTable:
    """A parquet file.

    Attributes:
        names: of its columns.

    Raises:
        ConfigError: it can't be read, or pyarrow is not installed.
    """

    how = ""

    def __init__(self, path: Path):
        self._path = path
        self._schema = _open(path).schema_arrow
        self.names: list[str] = self._schema.names

    def check_types(self, image_column: str, caption_columns: list[str]) -> None:
        """
        Raises:
            ConfigError: a column can't hold paths, or can't hold text.
        """
        kind = self._schema.field(image_column).type
        if not _is_text(kind):
            raise ConfigError(
                f"--image-column is {image_column}, which holds {kind} in {self._path}; give a "
                "column of paths (images that lie in the table itself have to be written to files)"
            )
        for column in caption_columns:
            kind = self._schema.field(column).type
            item = kind.value_type if _is_list(kind) else kind
            if not (_is_text(item) or _is_number(item) or _is_bytes(item)):
                raise ConfigError(
                    f"--caption-column is {column}, which holds {kind} in {self._path}; give a "
                    "column of text or of lists of text, such as pandas writes with "
                    f"table[{column!r}] = table[{column!r}].map(...)"
                )

    def rows(self, wanted: list[str]) -> Iterator[tuple[str, list[Any]]]:
        import pyarrow

        number = 0
        try:
            columns = list(dict.fromkeys(wanted))
            for batch in _open(self._path).iter_batches(ROWS_A_BATCH, columns=columns):
                values = [batch.column(name).to_pylist() for name in wanted]
                for row in zip(*values, strict=True):
                    number += 1
                    yield f"row {number}", list(row)
        except (OSError, pyarrow.ArrowException) as error:
            raise unreadable(self._path, error) from None


def _is_text(kind) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):  # what pandas calls a category
        kind = kind.value_type
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_integer(kind)
        or types.is_null(kind)
    )


def _is_number(kind) -> bool:
    from pyarrow import types

    return types.is_floating(kind)


def _is_bytes(kind) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_list(kind) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _open(path: Path):
    """The open file, a pyarrow.parquet.ParquetFile."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            f"TABLE is {path}, but pyarrow is not installed; pip install -e '.[convert]' "
            "in the checkout"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from None
