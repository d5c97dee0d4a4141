"""Image formats that aclip does not decode, by name, so that they can be counted and named."""

PHONES_AND_WEB = (
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
    ".jp2",
    ".j2k",
    ".jpx",
    ".svg",
    ".svgz",
    ".ico",
)
PROGRAMS = (".ico", ".psd", ".psb", ".ai", ".eps", ".pdf", ".xcf", ".icns", ".tga", ".dds", ".exr")
CAMERAS = (".hdr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef")
SUFFIXES = frozenset((*PHONES_AND_WEB, *PROGRAMS, *CAMERAS))
"""Suffixes, lower case, with their dot."""
SIGNATURES = (
    (4, (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"), "HEIC"),
    (4, (b"ftypavif", b"ftypavis"), "AVIF"),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL "), "JPEG XL"),
    (0, (b"\0\0\0\x0cjP  ",), "JPEG 2000"),
    (0, (b"8BPS",), "PSD"),
    (0, (b"%PDF",), "PDF"),
    (0, (b"%!PS",), "PostScript"),
    (0, (b"\0\0\x01\0",), "ICO"),
)


def recognise(content: bytes) -> str | None:
    """The format of bytes that aclip can't decode, or None where it is not known either."""
    for place, starts, name in SIGNATURES:
        if content.startswith(starts, place):
            return name
    head = content[:1024].lstrip(b"\xef\xbb\xbf \r\n\t")
    return "SVG" if head.startswith((b"<svg", b"<?xml")) and b"<svg" in head else None
