"""The objects of a JSON array one by one: RedCaps in one file is larger than memory."""

from collections.abc import Iterator
from pathlib import Path

from aclip.errors import ConfigError


def iterate_objects(path: Path, name: str, may_be_bare: bool = False) -> Iterator[dict]:
    """Yields the objects of array `name` of the object that a file holds.

    Args:
        path: JSON.
        name: the array's name.
        may_be_bare: the file may be the array itself.

    Raises:
        ConfigError: the file can't be read, is no JSON, or has no such array of objects; or ijson
            is not installed.
    """
    ijson = require_ijson(path)
    count = 0
    try:
        with open(path, "rb") as file:
            is_bare = may_be_bare and file.read(4096).lstrip()[:1] == b"["
            file.seek(0)
            for item in ijson.items(file, "item" if is_bare else f"{name}.item"):
                if not isinstance(item, dict):
                    raise ValueError(f"an item of {name} is no object")
                count += 1
                yield item
    except (OSError, ValueError, ijson.JSONError) as error:
        raise ConfigError(f"{path} is not the JSON expected ({error}); check the file") from None
    if count == 0:
        raise ConfigError(f"{path} holds no list {name} with objects in it; check the file")


def require_ijson(annotations: str | Path):
    """The module ijson, which is installed with the extra `convert` alone.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ijson
    except ImportError:
        raise ConfigError(
            f"ANNOTATIONS is {annotations}, but ijson is not installed; pip install -e "
            "'.[convert]' in the checkout"
        ) from None
    return ijson
