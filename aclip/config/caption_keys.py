"""Which captions a recipe reads and how it shortens them: the grammar of keys, and what fits."""

from aclip.config.sections import CaptionKeys, DataConfig, TextConfig

MEMBERS = ("txt", "json")
"""The last part of the suffixes of members that hold captions."""


def split_key(key: str) -> tuple[str, str]:
    """The member of a sample, and the field of it, that a key of captions names.

    A key is a text member (`txt`, `long.txt`), a json member (`json`, `syn.json`), a field of a
    json member (`syn.json:syn_text`), or a field of KEY.json (`long_caption`).

    Returns:
        The member's suffix in lower case, and the field; an empty field where the key is a member.

    Raises:
        ValueError: it is blank, or a field of something that is no json member.
    """
    member, colon, field = key.partition(":")
    if not colon and _ending(member) not in MEMBERS:
        member, field = "json", key
    if not key or key != key.strip() or (colon and (not field or _ending(member) != "json")):
        raise ValueError(
            f"{key!r}, which is no key of captions; give a member such as txt or long.txt, a field "
            "of KEY.json such as long_caption, or a field of another json as syn.json:syn_text"
        )
    return member.lower(), field


def check_captions(data: DataConfig, text: TextConfig, context_length: int) -> None:
    """Raises ValueError where keys of captions are none, or captions can't be shortened as said.

    Args:
        context_length: what the text tower reads, tokens.
    """
    _check_keys("data.captions", data.captions)
    for index, source in enumerate(data.sources):
        _check_keys(f"data.sources.{index}.captions", source.captions)
    if text.tokens is not None and text.tokens > context_length:
        raise ValueError(
            f"text.tokens is {text.tokens}, but the text tower reads {context_length}; give at "
            "most as many, or a larger model.text.context_length"
        )
    for name in ("word_counts", "threshold"):
        value = getattr(text, name)
        if text.reduce != "frequency" and value != TextConfig.model_fields[name].default:
            raise ValueError(
                f"text.{name} is {value}, but text.reduce {text.reduce} does not go by how "
                "frequent words are; remove the key, or set text.reduce=frequency"
            )


def _check_keys(name: str, keys: CaptionKeys) -> None:
    found = set()
    for key in keys:
        try:
            place = split_key(key)
        except ValueError as error:
            raise ValueError(f"{name} holds {error}") from None
        if place in found:
            raise ValueError(f"{name} holds {key} twice; give each key once")
        found.add(place)
    total = sum(keys.values()) if isinstance(keys, dict) else 1
    if keys and abs(total - 1) > 1e-3:
        raise ValueError(f"{name} has probabilities of {total:g} in sum; give ones that sum to 1")


def _ending(member: str) -> str:
    return member.lower().rpartition(".")[2]
