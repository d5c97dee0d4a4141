"""The recipe's section `optimizer`, and what of it does not go together."""

from typing import Annotated, Literal

from pydantic import Field

from aclip.config.ds_config import DsConfig, read_ds_config
from aclip.errors import ConfigError
from aclip.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]

ADAMW, LION, LAMB, MUON = "adamw", "lion", "lamb", "muon"
BETAS = {ADAMW: (0.9, 0.98), LION: (0.9, 0.99), LAMB: (0.9, 0.999), MUON: (0.9, 0.98)}
EPS = {ADAMW: 1e-8, LION: 1e-8, LAMB: 1e-6, MUON: 1e-8}
TOWERS = ("image", "text")


class TowerRates(Section):
    """The learning rate of a tower's parameters, as factors of the run's."""

    lr_scale: float = Field(1.0, ge=0)
    """Factor for the whole tower; its projection is not part of it. 0 locks the tower: it keeps the
    weights that it starts from (LiT), and costs neither a backward pass nor optimizer state."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor from each block to the one before it, as in BEiT and EVA-CLIP: the last of D blocks
    has layer_decay, the first layer_decay ** D, the embeddings layer_decay ** (D + 1), and the
    final norm 1."""


class OptimizerConfig(Section):
    """Biases, norms and other 1-d parameters get no weight decay."""

    name: Literal["adamw", "lion", "lamb", "muon"] = ADAMW
    """Lion (arXiv:2302.06675) takes a learning rate 3 to 10 times lower and a weight decay as much
    higher than AdamW. LAMB (arXiv:1904.00962) runs without ZeRO only. Muon orthogonalises the
    momentum (0.95) of the matrices of the towers' blocks, and AdamW updates the rest; its updates
    are scaled to the size of AdamW's, whose lr and weight decay it takes (arXiv:2502.16982)."""
    lr: float = Field(5e-4, gt=0)
    """The learning rate at the end of the warm-up."""
    warmup_start_lr: float = Field(1e-6, ge=0)
    """The learning rate at the first step, from which it rises linearly."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate gets from lr, after the warm-up, to final_lr at the last step; constant
    stays at lr until the cool-down."""
    cooldown: float = Field(0.0, ge=0, le=1)
    """Share of the run, at its end, in which a constant learning rate falls to final_lr."""
    cooldown_shape: Literal["linear", "1-sqrt"] = "linear"
    """The cool-down's shape: 1-sqrt falls steeply at first (arXiv:2405.18392)."""
    final_lr: float = Field(1e-5, ge=0)
    """The learning rate at the last step; a constant one without cool-down never gets there."""
    weight_decay: float = Field(0.5, ge=0)
    betas: tuple[Beta, Beta] = Field(default_factory=lambda given: BETAS[given.get("name", ADAMW)])
    """Where not given: (0.9, 0.98), Lion's (0.9, 0.99), LAMB's (0.9, 0.999)."""
    eps: float = Field(default_factory=lambda given: EPS[given.get("name", ADAMW)], gt=0)
    """Where not given: 1e-8, LAMB's 1e-6. Lion has none."""
    keep_state: bool = False
    """In a stage that follows another one: go on with the optimizer's state, or begin with none."""
    image: TowerRates = TowerRates()
    text: TowerRates = TowerRates()

    @property
    def locked_towers(self) -> tuple[str, ...]:
        """Names of the towers that are not trained."""
        return tuple(tower for tower in TOWERS if getattr(self, tower).lr_scale == 0)


def check_with_recipe(recipe) -> None:
    """Refuses an optimizer that does not fit the rest of the recipe (aclip.config.recipe.Recipe).

    Raises:
        ValueError: one sentence with the field, the value and what to do.
    """
    optimizer = recipe.optimizer
    cooldown = f"optimizer.cooldown is {optimizer.cooldown:g}"
    if optimizer.cooldown and optimizer.schedule != "constant":
        raise ValueError(
            f"{cooldown}, but optimizer.schedule {optimizer.schedule} falls over the whole run; "
            "set optimizer.schedule=constant, or optimizer.cooldown=0"
        )
    if optimizer.cooldown_shape != "linear" and not optimizer.cooldown:
        raise ValueError(
            f"optimizer.cooldown_shape is {optimizer.cooldown_shape}, but there is no cool-down; "
            "set optimizer.cooldown above 0, or remove the key"
        )
    if recipe.train.samples is None:  # else it takes the data to know how many epochs these are
        check_cooldown(recipe, recipe.train.epochs)
    for tower in optimizer.locked_towers:
        if getattr(optimizer, tower).layer_decay != 1:
            raise ValueError(
                f"optimizer.{tower}.layer_decay is {getattr(optimizer, tower).layer_decay:g}, but "
                f"optimizer.{tower}.lr_scale is 0, which locks the tower; remove the former"
            )
    for term in recipe.terms:
        if set(term.trains) <= set(optimizer.locked_towers):
            locked = " and ".join(f"optimizer.{tower}.lr_scale" for tower in term.trains)
            raise ValueError(
                f"{locked} is 0, so that loss.{term.name} {term.weight:g} would train nothing but "
                f"its own heads; set loss.{term.name} to 0, or {locked} above 0"
            )


def check_cooldown(recipe, epochs: float) -> None:
    """Refuses a cool-down that begins before the warm-up is over.

    Args:
        epochs: the length of the run, or of its stage.

    Raises:
        ValueError: one sentence with the field, the value and what to do.
    """
    cooldown, warmup = recipe.optimizer.cooldown, recipe.train.warmup_epochs / epochs
    if cooldown and warmup + cooldown > 1:
        raise ValueError(
            f"optimizer.cooldown is {cooldown:g}, but the warm-up already takes {warmup:.0%} of "
            f"the run (train.warmup_epochs {recipe.train.warmup_epochs:g}); lower one of them"
        )


def runs_under(optimizer: OptimizerConfig, stage: int, offloads: bool) -> bool:
    """Whether ZeRO runs the optimizer rightly.

    It hands over flat parts of many tensors. AdamW and Lion update each element by itself. Muon
    puts its matrices together by itself (aclip/engine/muon.py), on the ranks' devices.
    """
    return {LAMB: stage == 0, MUON: not offloads}.get(optimizer.name, True)


def check_with_ds_config(optimizer: OptimizerConfig, ds_config: DsConfig) -> None:
    """Refuses an optimizer that ZeRO, as the ds_config asks for it, would run wrongly.

    Raises:
        ConfigError: one sentence that says which stage to take.
    """
    if runs_under(optimizer, ds_config.stage, ds_config.offloads_optimizer):
        return
    name = f"optimizer.name is {optimizer.name}"
    if optimizer.name == LAMB:
        raise ConfigError(
            f"{name}, which needs the norm of each whole tensor, but zero_optimization.stage is "
            f"{ds_config.stage} in {ds_config.path}, which hands over parts of them; take stage 0 "
            "(ds_configs/zero0.json), or another optimizer"
        )
    raise ConfigError(
        f"{name}, whose matrices are orthogonalised on the GPUs, but "
        f"zero_optimization.offload_optimizer is set in {ds_config.path}; take stage 1, 2 or 3 "
        "without it, or optimizer.name=adamw with a learning rate for it"
    )


def read_ds_configs(path: str, stages: list, num_ranks: int) -> list[DsConfig]:
    """The ds_config as each stage of a run takes it.

    Args:
        stages: the stages' recipes.

    Raises:
        ConfigError: see read_ds_config; or an optimizer can't run with it. Says in which stage.
    """
    found = []
    for number, recipe in enumerate(stages, start=1):
        try:
            found.append(read_ds_config(path, recipe.train.global_batch_size, num_ranks))
            check_with_ds_config(recipe.optimizer, found[-1])
        except ConfigError as error:
            raise ConfigError(f"stage {number}: {error}" if number > 1 else str(error)) from None
    return found
