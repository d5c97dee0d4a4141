"""The model card of an export: README.md, as the Hub and people read it, and a picture.

Everything in it is known from the checkpoint and its run's folder, or was given by the user; what
is not known is said to be so. Nothing in it says where a file of the user's lies.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from aclip.config.public_values import public_text, public_values
from aclip.data.synthetic import MEAN_LENGTH
from aclip.run_folder.results_file import DIRECTIONS, RECALLS
from aclip.weights.card.code import code_blocks
from aclip.weights.card.metadata import metadata
from aclip.weights.card.options import CardOptions, read_picture
from aclip.weights.card.run_facts import Evaluated, RunFacts, Source, Stretch, read_run
from aclip.weights.card.words import describe, papers_of
from aclip.weights.checkpoint_weights import CheckpointWeights
from aclip.weights.names import LOGIT_BIAS

CARD, PICTURE = "README.md", "kept-patches.webp"
PICTURE_QUALITY = 85
MODELS = {"teacher": "the average of the weights over training", "student": "the trained weights"}
UNKNOWN = "The export does not know"
BIBTEX = """\
@inproceedings{yang2023attentive,
  title={Attentive Mask {CLIP}},
  author={Yang, Yifan and Huang, Weiquan and Wei, Yixuan and Peng, Houwen and Jiang, Xinyang and
          Jiang, Huiqiang and Wei, Fangyun and Wang, Yin and Hu, Han and Qiu, Lili and
          Yang, Yuqing},
  booktitle={ICCV},
  year={2023}
}"""


def write_card(
    folder: Path, output_format: str, weights: CheckpointWeights, options: CardOptions
) -> None:
    """Writes the card into the folder of an export.

    Args:
        output_format: as launch/export.py calls it.

    Raises:
        ConfigError: the picture can't be read, or a file of the run folder holds something else
            than it should.
        NotWritten: the disk is full.
    """
    facts = read_run(weights)
    picture = facts.picture if options.picture is None else Path(options.picture)
    if picture is not None:
        read_picture(picture).save(folder / PICTURE, "WEBP", quality=PICTURE_QUALITY)
    name = options.repo.partition("/")[2] if options.repo else ""
    description = " ".join(public_text(weights.recipe.description).split())
    title = name or description or "CLIP-style model"
    sections = {
        "": _what(weights, facts),
        "Use": _use(output_format, weights, options.name),
        "What differs from training": _list(_differences(output_format, weights)),
        "Training": _training(weights, facts),
        "Data": _data(facts),
        "Cost": _cost(facts, options),
        "Evaluation": _evaluation(facts),
        "What the mask keeps": "" if picture is None else _picture(options),
        "Licence": _license(options),
        "Citation": _citation(weights, facts),
    }
    body = "\n\n".join(
        f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items() if text
    )
    head = metadata(output_format, options, title, facts.results)
    text = f"---\n{head}\n---\n\n# {title}\n\n{body}\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def _what(weights: CheckpointWeights, facts: RunFacts) -> str:
    seen = "" if facts.samples is None else f", after {facts.samples:,} samples"
    return (
        "An image tower and a text tower that give an image and a caption of it similar "
        "embeddings, in the manner of CLIP. They were trained with aclip, which pre-trains such "
        f"models and drops image patches meanwhile. This is the {weights.model} of a run "
        f"({MODELS[weights.model]}){seen}."
    )


def _use(output_format: str, weights: CheckpointWeights, name: str) -> str:
    blocks = code_blocks(output_format, name, has_bias=LOGIT_BIAS in weights.state)
    return "\n\n".join(
        f"With {library}:\n\n```python\n{code}```" for library, code in blocks.items()
    )


def _differences(output_format: str, weights: CheckpointWeights) -> list[str]:
    """Where the library reads captions and images, or scores them, in another way than aclip."""
    if output_format != "huggingface":
        return []
    # Imported here, since transformers takes seconds; the export has imported it by now.
    from aclip.weights.formats.huggingface import DIFFERENCES, NO_BIAS

    return [*DIFFERENCES, *([NO_BIAS] if LOGIT_BIAS in weights.state else [])]


def _training(weights: CheckpointWeights, facts: RunFacts) -> str:
    values = _yaml(public_values(weights.recipe))
    length = f"{UNKNOWN} for how many steps this was trained."
    if facts.samples is not None:
        length = f"{facts.samples:,} samples seen"
        if not facts.begun_elsewhere:
            length += f" in {facts.steps:,} steps"
        if facts.epoch_samples:
            length += f"; an epoch has {facts.epoch_samples:,}"
        length += "."
    if facts.begun_elsewhere:
        length += (
            " The run began from another run's checkpoint; the recipe of what came before is not "
            "known."
        )
    parts = [length]
    stretches = facts.stretches or [Stretch(weights.recipe, None, 0)]
    before: dict[str, str] = {}
    for number, stretch in enumerate(stretches):
        lines = describe(stretch.recipe, weights.student)
        changed = {side: line for side, line in lines.items() if before.get(side) != line}
        if number:
            parts.append(f"From {stretch.begin:,} samples on:")
            changed |= {side: "none any more" for side in before.keys() - lines.keys()}
        parts.append(_list([f"**{side}**: {line}" for side, line in changed.items()]))
        before = lines
    which = " of the last part" if len(stretches) > 1 else ""
    fold = f"<details>\n<summary>The recipe{which} as YAML</summary>\n\n```yaml\n{values}```\n\n"
    return "\n\n".join([*parts, f"{fold}</details>"])


def _yaml(values: dict[str, Any]) -> str:
    """The values with the innermost lists and sections in a line each."""
    return yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )


def _data(facts: RunFacts) -> str:
    lines = [_source(source) for source in facts.sources]
    read = [(part.recipe.data.train, part.recipe.data.sources) for part in facts.stretches]
    if any(each != read[-1] for each in read):
        lines.append("Earlier parts of the run read other data, or shared them out otherwise.")
    return _list(lines)


def _source(source: Source) -> str:
    names = ", ".join(source.names) or "unknown"
    count = "number of samples unknown"
    if source.num_samples is not None:
        count = f"{source.num_samples:,} image-caption pairs"
    return f"{names}: {count}" + ("" if source.weight is None else f", weight {source.weight:g}")


def _cost(facts: RunFacts, options: CardOptions) -> str:
    if options.sample_flops is None or not facts.stretches or not facts.epoch_samples:
        return f"{UNKNOWN} the FLOPs of this training."
    known = [stretch for stretch in facts.stretches if stretch.begin is not None]
    spent = sum(
        (stretch.end - stretch.begin) * options.sample_flops(stretch.recipe, facts.epoch_samples)
        for stretch in known
    )
    samples = sum(stretch.end - stretch.begin for stretch in known)
    if not samples:
        return f"{UNKNOWN} the FLOPs of this training."
    part = "" if samples == facts.samples else f", for the {samples:,} samples of this run"
    return (
        f"{_power(spent)} FLOPs{part}, that is {spent / samples / 1e9:,.3g} GFLOP a sample. These "
        "are the matrix products of a step, forward and backward, teacher and losses included, "
        "each counted once; they are counted on the recipe's own step, with captions of "
        f"{MEAN_LENGTH} tokens on average."
    )


def _power(number: float) -> str:
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa} x 10^{int(exponent)}"


def _evaluation(facts: RunFacts) -> str:
    if not facts.results:
        return "There are no results of this model."
    header = ("Set", "Metric", "Images", "%", "Prompts")
    by_kind = groupby(facts.results, key=lambda each: (each.set_name, each.kind))
    rows = [_row(list(group)) for _, group in by_kind]
    lines = [header, ("---", "---", "---:", "---:", "---"), *rows]
    table = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
    return "\n\n".join([table, _list(facts.notes)] if facts.notes else [table])


def _row(results: list[Evaluated]) -> tuple[str, ...]:
    """A line of the table; the recalls of a direction share one."""
    first = results[0]
    metric = f"zero-shot, {first.metric}" if first.kind == "zero_shot" else first.metric
    if first.kind in DIRECTIONS:
        metric = f"{DIRECTIONS[first.kind]} R@{' / '.join(map(str, RECALLS))}"
    percents = ("-" if each.percent is None else f"{each.percent:.1f}" for each in results)
    return first.title, metric, f"{first.num_images:,}", " / ".join(percents), first.prompts


def _picture(options: CardOptions) -> str:
    image = f"![Images, attention and the patches that are kept]({PICTURE})"
    if options.picture is not None:
        return image
    return f"{image}\n\nHeld-out images of the built-in scenes at this checkpoint."


def _license(options: CardOptions) -> str:
    if options.license is None:
        return "No licence was given for these weights; ask whoever published them."
    return f"`{options.license}`"


def _citation(weights: CheckpointWeights, facts: RunFacts) -> str:
    recipes = [stretch.recipe for stretch in facts.stretches] or [weights.recipe]
    papers = {name: paper for recipe in recipes for name, paper in papers_of(recipe).items()}
    links = ", ".join(f"[{name}](https://arxiv.org/abs/{paper})" for name, paper in papers.items())
    return f"```bibtex\n{BIBTEX}\n```\n\nParts of the recipe are from {links}."


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
