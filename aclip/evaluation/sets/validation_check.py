"""Whether a validation set can be scored, seen before a run starts: no image is decoded."""

from collections import Counter
from pathlib import Path

from aclip.data.members import read_captions
from aclip.data.shards.listing import Shard, Skip, read_shard
from aclip.errors import ConfigError
from aclip.evaluation.sets.evaluation_set import BAD_LABEL, NO_LABEL, read_label
from aclip.evaluation.sets.prompts import CLASS_NAMES_FILE, find_class_prompts
from aclip.evaluation.skips import show_kinds

LOOKED_AT = 256
"""So many samples are enough, if some of them can be scored."""


def check_validation(shards: list[Shard]) -> list[str]:
    """Looks at captions, labels and class names of the set in data.val.

    What is fetched from elsewhere is not looked at: the evaluation before the first step reads it.

    Returns:
        Sentences about what is there but can't be scored.

    Raises:
        ConfigError: class names or templates are malformed, a label has no class name, or no sample
            can be scored.
    """
    url = shards[0].url
    prompts = find_class_prompts(Path(url).parent)
    num_classes = 0 if prompts is None else len(prompts.names)
    where = f"data.val is {url}{' ...' if len(shards) > 1 else ''}"
    problems, example = Counter(), ""
    num_captioned = num_labelled = num_looked_at = 0
    samples = (sample for shard in shards if not shard.remote for _, sample in read_shard(shard))
    for sample in samples:
        if num_looked_at >= LOOKED_AT and (num_captioned or (num_labelled and prompts)):
            break
        num_looked_at += 1
        label = sample if isinstance(sample, Skip) else read_label(sample)
        captions = label if isinstance(label, Skip) else read_captions(sample)
        if isinstance(label, Skip) or (label == NO_LABEL and isinstance(captions, Skip)):
            problems[captions.kind] += 1
            if captions.kind == BAD_LABEL:
                example = f", such as {sample.read('cls')[:20].decode(errors='replace').strip()!r}"
            continue
        num_labelled += label != NO_LABEL
        num_captioned += not isinstance(captions, Skip)
        if prompts is not None and label >= num_classes:
            raise ConfigError(
                f"{where}, where a sample's .cls is {label}, but {prompts.source} names "
                f"{num_classes} classes; give one name a line for every label from 0 on"
            )
    if not num_looked_at:
        return []
    if not num_captioned and not num_labelled:
        raise ConfigError(
            f"{where}, whose {num_looked_at:,} samples hold neither a caption nor a class number "
            f"that can be used ({show_kinds(problems)}{example}); write captions as .txt or .json, "
            "or the number of the class as .cls"
        )
    if not num_captioned and prompts is None:
        raise ConfigError(
            f"{where}, whose samples hold .cls but no captions, and there is no "
            f"{CLASS_NAMES_FILE}; write the names of the classes into {Path(url).parent}/"
            f"{CLASS_NAMES_FILE}, one a line in the order of the labels"
        )
    if num_labelled and prompts is None:
        return [
            f"{where}, whose samples hold .cls and captions: it gives retrieval alone, since there "
            f"is no {CLASS_NAMES_FILE} beside it"
        ]
    if prompts is not None and not num_labelled:
        return [
            f"{where}, whose samples hold captions but no .cls: it gives retrieval alone, and "
            f"{prompts.source} is not used"
        ]
    return []
