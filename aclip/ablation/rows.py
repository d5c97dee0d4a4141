"""The rows of the paper's tables, as what each changes of one base recipe.

Towers, data, colours, optimizer and schedule are the base's, equal in every row. A user's own rows
are read by rows_file.py, and cases.py makes recipes of rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from aclip.errors import ConfigError
from aclip.method.losses.terms import no_auxiliary_terms

NO_AUXILIARY_LOSS = (
    *(f"loss.{name}={weight:g}" for name, weight in no_auxiliary_terms().items()),
    "views.ssl=0",
)
NO_TEACHER = ("teacher=null", *NO_AUXILIARY_LOSS)
TEACHER = ("teacher.resolution={full}", *NO_AUXILIARY_LOSS)
NO_REUSE = ("teacher.reuse=1",)
NO_SCORES = ("mask.warmup=0", "mask.temperature=0", "teacher.score_layers=null", *NO_REUSE)
"""Of rows whose mask does not go by scores. Rows whose mask does keep the base's values of these
keys; those with BYOL too, except teacher.reuse, since that loss needs the teacher in every step."""
NO_MASK = (
    *NO_SCORES,
    "mask.policy=none",
    "mask.keep_ratio=1",
    "mask.keep_ratio_end=null",
    "views.student=1",
)
ATTENTIVE_2X = ("mask.policy=attentive", "views.student=2", *TEACHER)
ACLIP = (*ATTENTIVE_2X, *NO_REUSE, "loss.simclr=1", "loss.byol=2")


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: what the command line calls it.
        label: what tables call it; {keep} stands for the kept percentage.
        published: ImageNet-1K zero-shot accuracy, percent, of ViT-B/16 after 25 epochs of YFCC-15M
            (arXiv:2212.08653, tables 1 and 2; half of the patches is kept); None for none.
        overrides: what it changes of the base recipe; of a key that comes twice, the later one
            counts. {full} and {half} stand for the base's resolution and half of it.
        drops_patches: whether keep_ratio means something.
        against: the row from which its difference is shown, beside those of COMPARED.
        recipe: the name or path of a recipe from which it takes the method, see METHOD of cases.py;
            empty for the base's own.
    """

    name: str
    label: str
    published: float | None
    overrides: tuple[str, ...]
    drops_patches: bool = True
    against: str = ""
    recipe: str = ""


MASKS = (
    Row("clip", "none, 1 x 100 % (CLIP)", 37.6, (*NO_MASK, *NO_TEACHER), drops_patches=False),
    Row(
        "random_1x",
        "random, 1 x {keep} %",
        35.0,
        ("mask.policy=random", "views.student=1", *NO_SCORES, *NO_TEACHER),
    ),
    Row(
        "random_2x",
        "random, 2 x {keep} %",
        38.0,
        ("mask.policy=random", "views.student=2", *NO_SCORES, *NO_TEACHER),
    ),
    Row(
        "attentive_1x",
        "attentive, 1 x {keep} %",
        39.5,
        ("mask.policy=attentive", "views.student=1", *TEACHER),
    ),
    Row("attentive_2x", "attentive, 2 x {keep} %", 41.3, ATTENTIVE_2X),
    Row(
        "inverse_2x",
        "inverse, 2 x {keep} %",
        28.5,
        ("mask.policy=inverse", "views.student=2", *TEACHER),
    ),
)
SYSTEMS = (
    Row(
        "slip",
        "SLIP",
        42.8,
        (*NO_MASK, *NO_TEACHER, "views.ssl=2", "loss.simclr=1"),
        drops_patches=False,
    ),
    Row(
        "maskclip",
        "MaskCLIP",
        42.7,
        (*NO_MASK, *TEACHER, "loss.distill=0.05", "loss.mlm=0.05"),
        drops_patches=False,
    ),
    Row("aclip", "A-CLIP, 2 x {keep} %", 43.9, ACLIP),
    Row(
        "aclip_eff",
        "A-CLIP-eff, 2 x {keep} %",
        42.9,
        (*ACLIP, "teacher.resolution={half}"),
    ),
)
GROUPS = {"masks": MASKS, "systems": (MASKS[0], *SYSTEMS)}


def decided_by(rows: Iterable[Row]) -> set[str]:
    """Keys of the recipe that some of the rows sets, and that no user may; without those of
    NO_SCORES in the paper's rows, where a user gives values to the other rows."""
    return {
        change.partition("=")[0]
        for row in rows
        for change in row.overrides
        if row.published is None or change not in NO_SCORES
    }


def choose_rows(names: list[str]) -> list[Row]:
    """Rows by name or group, in the order of the paper's tables, each once.

    Raises:
        ConfigError: there is no such row.
    """
    known = {row.name: row for row in (*MASKS, *SYSTEMS)}
    chosen = set()
    for name in names:
        if "=" in name:
            raise ConfigError(
                f"--rows names {name}; write key=value before --rows, or behind another option"
            )
        if name not in known and name not in GROUPS:
            raise ConfigError(f"--rows names {name}; take some of {', '.join([*GROUPS, *known])}")
        chosen |= {row.name for row in GROUPS.get(name, ())} or {name}
    return [row for name, row in known.items() if name in chosen]
