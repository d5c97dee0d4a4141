"""What `--init` or a model's name stands for: a path, or a name on Hugging Face's Hub."""

from pathlib import Path

from aclip.files import expand_home
from aclip.weights.first_look import LOCAL_DIR, TIMM, Found, find_weights, refusal_of_init
from aclip.weights.hub import HUB, read_name
from aclip.weights.hub_weights import fetch, pin


def find_named(named: str) -> Found:
    """Says what kind of weights a path or a name of the Hub stands for; fetches those of a name.

    Raises:
        ValueError: nothing that could be weights, or they can't be fetched; the message ends a
            sentence that begins with the name.
    """
    if named.startswith(HUB):
        return find_weights(fetch(pin(read_name(named))))
    return find_weights(Path(named.removeprefix(LOCAL_DIR)))


def pinned(named: str) -> str:
    """A name of the Hub with the commit that it stands for now; any other name as it is.

    Raises:
        ValueError: see `pin`.
    """
    return str(pin(read_name(named))) if named.startswith(HUB) else named


def pinned_init(init: str) -> str:
    """`model.init` as `pinned` gives it; raises ConfigError where the Hub has no such model."""
    try:
        return pinned(init)
    except ValueError as error:
        raise refusal_of_init(init, error) from None


def begun_init(init: str, recorded: str) -> str | None:
    """What a run that goes on began with, where its command names the same model of the Hub without
    saying a commit, whatever the name stands for now; else None.

    Args:
        init: model.init of the command.
        recorded: the same of the run's recipe.
    """
    if not (init.startswith(HUB) and recorded.startswith(HUB)):
        return None
    try:
        now, then = read_name(init), read_name(recorded)
    except ValueError as error:
        raise refusal_of_init(init, error) from None
    return recorded if now.repository == then.repository and not now.is_commit else None


def check_init(init: str) -> None:
    """Raises ConfigError where `model.init` can't be weights, as far as a first look tells."""
    named = expand_home(init, "--init")
    if not named or (named.startswith(TIMM) and not Path(named.removeprefix(TIMM)).is_file()):
        return  # of a model's name only timm can tell
    try:
        find_named(named.removeprefix(TIMM))
    except ValueError as error:
        raise refusal_of_init(init, error) from None
