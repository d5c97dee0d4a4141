"""A training run of open_clip's: its params.txt names the model, which a checkpoint does not."""

from pathlib import Path

from aclip.weights.formats.open_clip import facts_of_config
from aclip.weights.names import TowerFacts

PARAMETERS = "params.txt"


def read_facts(checkpoint: Path) -> TowerFacts:
    """What the run around a checkpoint tells of its towers; nothing if there is no such run.

    open_clip writes RUN/checkpoints/epoch_N.pt beside RUN/params.txt, of lines `NAME: VALUE`.

    Raises:
        ValueError: a tower that aclip can't hold; the message ends a sentence.
    """
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        path = folder / PARAMETERS
        if path.is_file():
            break
    else:
        return TowerFacts()
    lines = path.read_text(errors="replace").splitlines()
    values = dict(line.split(": ", 1) for line in lines if ": " in line)
    # Imported here, since open_clip takes seconds.
    from open_clip.factory import get_model_config

    config = get_model_config(values.get("model", ""))
    if config is None:
        return TowerFacts()
    if values.get("force_quick_gelu") == "True":
        config |= {"quick_gelu": True}
    return facts_of_config(config)
