"""Which files are images that can be decoded, and which are litter that other tools left."""

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
) | frozenset((".ppm", ".pgm", ".pbm", ".pnm"))
"""Suffixes in lower case, with their dot. What a file holds is seen when it is decoded."""

LITTER_FOLDERS = frozenset(
    ("__macosx", "@eadir", ".ipynb_checkpoints", "$recycle.bin", "lost+found")
)
LITTER_FILES = frozenset(("thumbs.db", "desktop.ini", ".ds_store"))


def is_litter(name: str) -> bool:
    """Whether a path names what a system or another tool left beside the data: `._x.jpg`,
    `.DS_Store`, `Thumbs.db`, everything below `__MACOSX` or `@eaDir`, and hidden files."""
    *folders, file = name.lower().rstrip("/").split("/")
    return (
        file.startswith(".")
        or file in LITTER_FILES
        or not LITTER_FOLDERS.isdisjoint([*folders, file])
        or any(folder.startswith("paxheader") for folder in folders)
    )
