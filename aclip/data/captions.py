"""Bytes of any encoding become text, and an image's texts its captions: for shards, for files and
for the converter alike."""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aclip.config.caption_keys import split_key
from aclip.config.sections import CaptionKeys
from aclip.data.shards.listing import Skip

DECODED_AS_CP1252 = "decoded_as_cp1252"
DECODED_AS_UTF16 = "decoded_as_utf16"
DAMAGED_TEXT = "damaged_text"
UNREADABLE_JSON = "unreadable_json"
NO_TEXT_IN_JSON = "no_text_in_json"
BLANK_IN_JSON = "blank_in_json"
TXT_BEFORE_JSON = "txt_before_json"
OTHER_CAPTION_KEY = "other_caption_key"
NOTE_KINDS = {
    DECODED_AS_CP1252: "text that is no UTF-8 was read as Windows-1252",
    DECODED_AS_UTF16: "text with NULs and no byte order mark was read as UTF-16",
    DAMAGED_TEXT: "text holds bytes that its byte order mark does not allow",
    UNREADABLE_JSON: "the .json is malformed",
    NO_TEXT_IN_JSON: "a caption in the .json is null, a number or an object and was left out",
    BLANK_IN_JSON: "a caption in the .json is blank and was left out",
    TXT_BEFORE_JSON: "the .txt was taken, because the .json holds other captions",
    OTHER_CAPTION_KEY: "the sample has no caption under the key of data.captions that came first",
}
"""What is counted about samples that are used, and what it means."""
CHOSEN = "caption_from_"
"""What a kind begins with that counts the captions under a key of data.captions."""

LINE_END = re.compile(r"\r\n|\n|\r")  # not splitlines, which also splits at characters of prose
FIELDS = ("captions", "caption")
TEXT_SUFFIXES = (".txt", ".caption")
CAPTION_SUFFIXES = (*TEXT_SUFFIXES, ".json")
"""Of the files beside NAME.jpg that hold its captions, in the order in which they are read."""
# As browsers read Windows-1252: the five bytes that it leaves free are control characters.
CP1252 = {byte: bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(128, 160)}
WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # first, because it begins with UTF-16's
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SEEN_FOR_NULS = 4096


class Captions(list[str]):
    """The captions of an image, none of them blank.

    Attributes:
        notes: what had to be noted about them, keys of NOTE_KINDS.
    """

    def __init__(self, texts: Iterable[str] = (), notes: Iterable[str] = ()):
        super().__init__(texts)
        self.notes = frozenset(notes)


def captions_of(texts: Sequence[bytes], facts: bytes | None) -> Captions | Skip:
    """The captions of an image.

    Each line of a text that is not blank is a caption. The json gives `captions` (a list), else
    `caption` (a text or a list), or is itself a text or a list. It is used where it holds what the
    text holds, whole or line by line; otherwise the text has been edited since, and is used.

    Args:
        texts: contents of text files.
        facts: content of a json file, or None.

    Returns:
        The captions, or Skip: "empty_caption" where all are blank, "no_caption" without any.
    """
    notes: set[str | None] = set()
    lines: list[str] = []
    wholes: list[str] = []
    for content in texts:
        text, note = decode_text(content)
        notes.add(note)
        own = _lines_of(text)
        if own:
            wholes.append(text)
            lines += own if not lines else [line for line in own if line not in lines]
    listed, has_blank = _captions_of_json(facts, notes)
    if listed and lines:
        known = set(map(_squeezed, listed))
        if not all(_is_known(whole, known) for whole in wholes):
            notes.add(TXT_BEFORE_JSON)
            listed = []
    found = listed or lines
    if found:
        return Captions(found, notes - {None})
    return Skip("empty_caption" if texts or has_blank else "no_caption")


def order_keys(keys: CaptionKeys, rng: np.random.Generator) -> list[str]:
    """The order in which a sample's captions are looked for under these keys.

    A list is in its order. Of keys with probabilities one is drawn, then one of the others by
    theirs, and so on; so among the keys that a sample has, each comes first as often as its
    probability says, and as many numbers are drawn as there are keys.
    """
    if not isinstance(keys, dict):
        return keys
    names = sorted(keys)  # a recipe that lists them in another order says the same
    # Exponential variables of these rates: the least is the key's with that probability
    # (Efraimidis and Spirakis).
    waits = rng.standard_exponential(len(names)) / [keys[name] for name in names]
    return [names[index] for index in waits.argsort(kind="stable")]


def captions_under(keys: Sequence[str], read: Callable[[str], bytes | None]) -> Captions | Skip:
    """The captions under the first of these keys that has one which is not blank.

    Args:
        keys: keys of data.captions, see split_key.
        read: the content of the sample's member with a suffix; None without such a member.

    Returns:
        The captions, with a note of the key; or Skip, as captions_of.
    """
    notes: set[str | None] = set()
    is_blank = False
    for key in keys:
        member, field = split_key(key)
        content = read(member)
        if content is None:
            continue
        if member.endswith("json"):
            fields = (field,) if field else FIELDS
            found, has_blank = _captions_of_json(content, notes, fields)
            is_blank |= has_blank
        else:
            text, note = decode_text(content)
            notes.add(note)
            found = _lines_of(text)
            is_blank = True
        if found:
            notes |= {f"{CHOSEN}{key}"} | ({OTHER_CAPTION_KEY} if key != keys[0] else set())
            return Captions(found, notes - {None})
    return Skip("empty_caption" if is_blank else "no_caption")


def note_kinds(keys_of_sources: Iterable[CaptionKeys]) -> tuple[str, ...]:
    """The kinds that are counted about the samples of a run with these keys, by source."""
    keys = dict.fromkeys(key for keys in keys_of_sources for key in keys)
    return (*NOTE_KINDS, *(f"{CHOSEN}{key}" for key in keys))


def captions_beside(image: Path) -> Captions | Skip:
    """The captions in the files beside an image that have its name.

    Raises:
        OSError: a file can't be read.
    """
    texts, facts = [], None
    for suffix in CAPTION_SUFFIXES:
        for path in sorted(image.parent.iterdir()):
            if path.stem == image.stem and path.suffix.lower() == suffix and path.is_file():
                if suffix in TEXT_SUFFIXES:
                    texts.append(path.read_bytes())
                else:
                    facts = facts or path.read_bytes()
    return captions_of(texts, facts)


def decode_text(content: bytes, may_be_wide: bool = True) -> tuple[str, str | None]:
    """The text of a file, and a key of NOTE_KINDS where its encoding was guessed or broken.

    A byte order mark says that it is UTF-8, UTF-16 or UTF-32. Without one it is UTF-8, or if it
    can't be, Windows-1252.

    Args:
        content: the bytes.
        may_be_wide: whether they may be UTF-16 or UTF-32; False for a line of a longer text.
    """
    encoding = wide_encoding(content) if may_be_wide else None
    if encoding is not None:
        text = content.decode(encoding, errors="replace")
        if "\ufffd" in text:
            return text, DAMAGED_TEXT
        return text, None if encoding in WIDE_MARKS.values() else DECODED_AS_UTF16
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8"), None
    except UnicodeDecodeError:
        return content.decode("latin-1").translate(CP1252), DECODED_AS_CP1252


def wide_encoding(content: bytes) -> str | None:
    """The encoding of a text of two or four bytes a character, known by its first bytes, else None.

    Without a byte order mark, NULs at every second place show UTF-16: text holds none.
    """
    for mark, encoding in WIDE_MARKS.items():
        if content.startswith(mark):
            return encoding
    head = content[: SEEN_FOR_NULS // 2 * 2]
    at_even, at_odd = head[::2].count(0), head[1::2].count(0)
    if max(at_even, at_odd) * 4 < len(head) or not at_even + at_odd:
        return None
    return "utf-16-le" if at_odd > at_even else "utf-16-be"


def texts_in(value: Any) -> tuple[list[str], set[str]]:
    """The texts of a caption field, one or a list, and the kinds of what had to be left out."""
    items = value if isinstance(value, list | tuple) else [value]
    texts = [_valid(item) for item in items if isinstance(item, str)]
    notes = set()
    if len(texts) < len(items):
        notes.add(NO_TEXT_IN_JSON)
    usable = [text for text in texts if text.strip()]
    if len(usable) < len(texts):
        notes.add(BLANK_IN_JSON)
    return usable, notes


def _lines_of(text: str) -> list[str]:
    return [line for line in LINE_END.split(text) if line.strip()]


def _captions_of_json(
    content: bytes | None, notes: set[str | None], names: tuple[str, ...] = FIELDS
) -> tuple[list[str], bool]:
    """The usable captions of a json, and whether it holds blank ones; adds to the notes.

    Args:
        names: the fields that hold captions, the first that holds some counts.
    """
    if content is None:
        return [], False
    text, note = decode_text(content)
    notes.add(note)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        notes.add(UNREADABLE_JSON)
        return [], False
    if isinstance(values, dict):
        fields = [values[name] for name in names if values.get(name) is not None]
    else:
        fields = [values] if names == FIELDS else []
    left_out: set[str] = set()
    for field in fields:
        usable, kinds = texts_in(field)
        left_out |= kinds
        if usable:
            break
    else:
        usable = []
    notes |= left_out
    return usable, BLANK_IN_JSON in left_out


def _is_known(whole: str, known: set[str]) -> bool:
    """Whether a text is one of the captions, or each of its lines is; spaces don't count."""
    lines = {_squeezed(line) for line in LINE_END.split(whole)} - {""}
    return _squeezed(whole) in known or lines <= known


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _valid(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
