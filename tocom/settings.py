"""Settings of the stages: what can be tuned, its type, range and default, and what it means.

Configs, the command line and the Python functions all use these names. Imports neither torch nor timm, so that a
workflow with thousands of jobs is planned quickly.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tocom.errors import TocomError, suggest

#: What stands where there is no compensator, and for adding no gap.
PLAIN = "none"
#: What compressors save unless they say otherwise.
GFLOPS = "GFLOPs"
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")]


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def meaning(cls, name: str) -> str:
        """Return the description of a setting; a stage that only changes its default inherits it."""
        fields = [base.model_fields[name] for base in cls.__mro__ if name in getattr(base, "model_fields", {})]
        return next((field.description for field in fields if field.description), "")

    def recipe(self) -> dict[str, Any]:
        """Return all settings as JSON-able values."""
        return self.model_dump(mode="json")


class DegreeSettings(Settings):
    """At which degree each step of a training runs: all at one, or each at one that is drawn for it.

    Drawing it is the idea of stochastic wav2vec 2.0 (arXiv 2204.11934, abstract): one model for many budgets.
    """

    degree: Literal["fixed", "random"] = Field(
        "fixed", description="fixed: every step at the train degree; random: drawn for each step, all as likely"
    )
    lowest: Natural | None = Field(None, description="random: lowest degree that is drawn; null: 0")
    highest: Natural | None = Field(None, description="random: highest degree that is drawn; null: max_degree")
    among: tuple[Natural, ...] | None = Field(
        None, min_length=1, description="random: the degrees that are drawn from, in place of a range; null: the range"
    )

    @field_validator("among")
    @classmethod
    def _is_a_set(cls, value):
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a degree is listed twice; list each once, since all are as likely")
        return value if value is None else tuple(sorted(value))

    @model_validator(mode="after")
    def _degrees_are_stated_once(self):
        bounds = [name for name in ("lowest", "highest") if getattr(self, name) is not None]
        stated = bounds + (["among"] if self.among else [])
        if stated and self.degree != "random":
            raise ValueError(f"{' and '.join(stated)}: say what is drawn from; set degree: random, or leave them out")
        if self.among and bounds:
            raise ValueError(f"among stands in place of {' and '.join(bounds)}; leave one or the other out")
        if len(bounds) == 2 and self.lowest > self.highest:
            raise ValueError(f"lowest {self.lowest} is above highest {self.highest}; swap them")
        return self

    def drawn(self, max_degree: int) -> Sequence[int]:
        """Return the degrees that a step's may be drawn from, in rising order.

        Raises:
            TocomError: one of them is beyond ``max_degree``.
        """
        lowest, highest = self.lowest or 0, max_degree if self.highest is None else self.highest
        top = max(self.among or (lowest, highest))
        if top > max_degree:
            raise TocomError(
                f"random degree {top} is out of range: max_degree is {max_degree}; raise it or draw lower degrees"
            )
        return self.among or range(lowest, highest + 1)

    def scored(self, max_degree: int) -> Sequence[int]:
        """Return the degrees that held-out images are scored at where degrees are drawn: a stated set; or the ends of
        the range, and its middle."""
        degrees = self.drawn(max_degree)
        return self.among or (degrees[0], (degrees[0] + degrees[-1]) // 2, degrees[-1])

    @property
    def drawn_label(self) -> str:
        """What tables say of how degrees are drawn; nothing where they are not."""
        if self.degree == "fixed":
            return ""
        if self.among:
            stated = f"among {', '.join(map(str, self.among))}"
        elif self.highest is None:
            stated = f"from {self.lowest}" if self.lowest else ""
        else:
            stated = f"{self.lowest or 0} to {self.highest}"
        return " ".join(filter(None, ("random degrees", stated)))


class Optimisation(Settings):
    """Settings that all training stages share."""

    epochs: Positive = Field(10, description="passes over the training images")
    batch_size: Positive = Field(64, description="images a step, over all processes")
    micro_batch_size: Positive | None = Field(
        None,
        description="images a forward pass: a step is made of batch_size / micro_batch_size of them, one after another"
        " or on several processes; null: one for every process. Random draws (degrees, dropout) follow the"
        " micro-batches, so null gives other results on another number of processes; a fixed size does not",
    )
    optimizer: str = Field("adamw", description="one of timm's optimizers")
    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    lr_batch: Positive | None = Field(None, description="if set, lr is for this batch size and scaled linearly")
    min_lr: float = Field(1e-5, ge=0, description="learning rate at the end of the cosine")
    schedule: Literal["step", "epoch"] = Field(
        "step",
        description="step: the learning rate changes at every step; epoch: after every epoch, and one epoch late, as in"
        " the public code (the rate of the first epoch holds for two)",
    )
    warmup_epochs: Natural = Field(0, description="epochs of linear warm-up")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay")
    drop_path: Fraction = Field(0.0, description="stochastic depth rate while training")
    clip_grad: float | None = Field(None, gt=0, description="largest norm of the gradient; null: not clipped")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of a moving average of the weights, which is then scored and kept; null: none"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast; fp16 scales its loss")
    compile: str | None = Field(None, description="a backend of torch.compile, such as inductor; null: not compiled")
    deterministic: bool = Field(
        True, description="refuse GPU operations whose results vary from run to run; false: warn only"
    )
    threads: Positive = Field(1, description="torch CPU threads; part of the recipe, since sums depend on it")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _schedule_makes_sense(self):
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} exceeds epochs {self.epochs}; lower it")
        if self.peak_lr < self.min_lr:
            raise ValueError(
                f"the learning rate would rise from {self.peak_lr:g} to min_lr {self.min_lr:g};"
                " lower min_lr, or raise lr or batch_size (lr is for lr_batch images, if that is set)"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """Learning rate after linear scaling with the batch size."""
        return self.lr * self.batch_size / self.lr_batch if self.lr_batch else self.lr

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed; batches are then of even size and the last, partial one is left out."""
        return False

    def steps(self, images: int) -> int:
        """Return the steps of one epoch on so many images."""
        return images // self.batch_size if self.mixes else math.ceil(images / self.batch_size)


class Augmentation(Settings):
    """How training images are changed; the strong kind is that of DeiT (arXiv 2012.12877, table 9), by timm."""

    augmentation: Literal["none", "shift", "timm"] = Field(
        "none", description="none; shift by a few pixels; or timm's: crop, flip, colour jitter, RandAugment, erasing"
    )
    shift: Natural = Field(2, description="shift: by up to so many pixels")
    color_jitter: float = Field(0.3, ge=0, description="timm: colour jitter")
    auto_augment: str | None = Field("rand-m9-mstd0.5-inc1", description="timm: policy of AutoAugment or RandAugment")
    random_erasing: Fraction = Field(0.25, description="timm: probability of random erasing")
    horizontal_flip: Fraction = Field(0.5, description="timm: probability of a horizontal flip")
    min_crop: float = Field(0.08, gt=0, le=1, description="timm: smallest share of the image that a crop keeps")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix; 0: off")

    @property
    def mixes(self) -> bool:
        """See :attr:`Optimisation.mixes`."""
        return self.mixup > 0 or self.cutmix > 0


class PretrainSettings(DegreeSettings, Optimisation):
    """How a backbone is made from procedural letters, or a language model from bundled text."""

    degree: Literal["fixed", "random"] = Field(
        "fixed",
        description="fixed: nothing is compressed; random: a degree of the first method's compressor, drawn for each"
        " step, all as likely",
    )

    epochs: Positive = 20
    batch_size: Positive = 96
    lr: float = Field(1e-3, gt=0)
    warmup_epochs: Natural = 1
    threads: Positive = 2
    label_smoothing: Fraction = Field(0.1, description="label smoothing of the cross-entropy")
    images: Positive = Field(40_000, description="pre-training images to generate, or sequences of text")
    held_out: Positive = Field(2_000, description="further ones, for the figures on the model card")


class FinetuneSettings(Augmentation, Optimisation):
    """How a backbone is fine-tuned for one task at one train degree."""

    augmentation: Literal["none", "shift", "timm"] = "shift"
    label_smoothing: Fraction = Field(0.1, description="label smoothing of the cross-entropy")


class SegmentSettings(Optimisation):
    """How a backbone and its head are fine-tuned to segment images at one train degree."""

    # torch has no deterministic cross-entropy of images (nll_loss2d) on a GPU.
    deterministic: bool = Field(
        False,
        description="refuse GPU operations whose results vary from run to run, which the loss of pixels (nll_loss2d) is"
        " one of, so true works on a CPU alone; false: warn only",
    )
    head: Literal["linear", "conv"] = Field(
        "linear", description="a 1 x 1 convolution; or a 3 x 3 one, group norm and GELU before it"
    )
    min_scale: float = Field(0.5, gt=0, description="augmentation: smallest factor on the size of an image")
    max_scale: float = Field(2.0, gt=0, description="augmentation: largest factor on the size of an image")
    horizontal_flip: Fraction = Field(0.5, description="augmentation: probability of a horizontal flip")

    @model_validator(mode="after")
    def _scales_are_ordered(self):
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} is above max_scale {self.max_scale}; swap them")
        return self


class LanguageSettings(Optimisation):
    """How a language model is fine-tuned on a text at one train degree."""

    batch_size: Positive = Field(8, description="sequences a step, over all processes")
    lr: float = Field(1e-3, gt=0)


class LearnSettings(Augmentation, Optimisation):
    """How a part is learned on the pre-trained backbone, for each seed once for all tasks."""

    epochs: Positive = 6
    batch_size: Positive = 96
    lr: float = Field(5e-3, gt=0)
    source: str | None = Field(
        None, description="folder of images, or data set (imagenet1k); null: what the backbone was pre-trained on"
    )
    images: Positive | None = Field(20_000, description="pre-training images to use; null: all")
    held_out: Positive = Field(1_000, description="further images, to choose the best epoch on")
    pairs: Positive = Field(48, description="held-out (source, target) pairs of degrees to choose the best epoch on")


class AdaptSettings(Augmentation, Optimisation):
    """How a compensator is adapted to a fine-tuned model, on the training images of its task and without labels."""

    epochs: Positive = 3
    batch_size: Positive = 32
    lr: float = Field(1e-3, gt=0)
    augmentation: Literal["none", "shift", "timm"] = "shift"
    start: Literal["learned", "zero"] = Field(
        "learned", description="learned: from what was learned on the backbone; zero: from no change at all"
    )
    pairs: Positive = Field(12, description="held-out (source, target) pairs of degrees to choose the best epoch on")


class EvaluateSettings(Settings):
    """How the cells of a checkpoint are evaluated."""

    scales: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0, 1.25),
        description="candidate scales of a compensator, as multiples of the one it was learned at; 0 declines and has"
        " to be among them",
    )
    select_by: Literal["score", "loss"] = Field(
        "score", description="validation figure that the scale is chosen by; ties in the score go to the lower loss"
    )
    may_decline: bool = Field(True, description="whether 0 is among the scales; false only to study a fixed scale")
    decline_within: float = Field(
        1.0,
        ge=0,
        description="0 is chosen unless the best scale beats it by more than so many standard errors of the difference,"
        " over validation images; 0: whatever is better beats it",
    )
    batch_size: Positive = Field(250, description="images a forward pass")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast")
    threads: Positive = Field(1, description="torch CPU threads")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _can_decline(self):
        if self.may_decline and 0 not in self.scales:
            raise ValueError("0 must be among the scales, so that one can decline (or set may_decline: false)")
        if not self.scales:
            raise ValueError("scales is empty; give at least one")
        return self


class ThroughputSettings(Settings):
    """How speed and memory are measured."""

    batch_size: Positive = Field(64, description="images a forward pass")
    repeats: Positive = Field(40, description="timed rounds; every model takes a turn in each")
    warmup: Positive = Field(3, description="forward passes before the first round")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast")
    training: bool = Field(False, description="also time training steps")
    threads: Positive = Field(1, description="torch CPU threads")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")


class BenchmarkSettings(Settings):
    """How `tocom benchmark` measures the stages of a study; the recipes of training are the stages' defaults."""

    batch_size: Positive = Field(128, description="images a step or forward pass")
    image_size: Positive | None = Field(None, description="side in pixels; null: the backbone's own")
    repeats: Positive = Field(40, description="most timed rounds; every degree and variant takes a turn in each")
    seconds: float = Field(3.0, gt=0, description="after which no further round of a backbone's stage begins")
    warmup: Positive = Field(2, description="steps of each degree and variant before the first round")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="autocast; the weights stay fp32")
    threads: Positive = Field(1, description="torch CPU threads")
    device: Device = Field("cuda", description="auto, cpu, cuda or cuda:N")


class ServeSettings(Settings):
    """What load `tocom serve-bench` replays, and what has to be kept under it."""

    phases: Annotated[tuple[tuple[Seconds, Share], ...], Field(min_length=1)] = Field(
        ((2.0, 0.5), (2.0, 1.4), (2.0, 0.5)),
        description="[seconds, load] of each phase; a load of 1 is what full batches at the lowest degree keep up with",
    )
    batch_size: Positive = Field(16, description="most images a batch; it begins with what waits, and waits for none")
    deadline: float = Field(
        3.0, gt=0, description="what a request may take, in times of a full batch at the lowest degree"
    )
    seeds: tuple[Natural, ...] = Field((0, 1, 2), min_length=1, description="of arrivals; a replay each")
    times: Literal["computed", "curve"] = Field(
        "computed",
        description="what batches take. computed: what each does as it is computed; curve: what was measured"
        " beforehand, which settles on a busy machine",
    )
    repeats: Positive = Field(40, description="rounds that measure the curve; every degree and size takes a turn")
    quantile: float = Field(0.9, gt=0, lt=1, description="which of the measured times a budget has to cover")


#: pydantic's types of errors -> our words for them.
_WORDS = {
    "greater_than_equal": "give {ge} or more",
    "greater_than": "give more than {gt}",
    "less_than_equal": "give {le} or less",
    "less_than": "give less than {lt}",
    "literal_error": "give {expected}",
    "int_parsing": "give a whole number",
    "int_type": "give a whole number",
    "int_from_float": "give a whole number",
    "float_parsing": "give a number",
    "float_type": "give a number",
    "finite_number": "give a finite number",
    "string_type": "give a text",
    "string_pattern_mismatch": "give one that fits {pattern}",
    "bool_parsing": "give true or false",
    "bool_type": "give true or false",
    "dict_type": "give a mapping",
    "model_type": "give a mapping",
    "tuple_type": "give a list",
    "too_short": "give at least {min_length}",
}


def shortened(value: Any, width: int = 100) -> str:
    """Return a value as a message can show it."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, width, width
    text = short.repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def explain(error: ValidationError, where: str, known: dict[str, type[BaseModel]] | None = None) -> TocomError:
    """Turn pydantic's report into one line: the place, the value, what is wrong, and a likely correction."""
    problems = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            owner = ".".join(str(part) for part in item["loc"][:-1])
            names = (known or {}).get(owner)
            hint = suggest(item["loc"][-1], names.model_fields) if names else ""
            problems.append(f"unknown key {place!r}{hint}")
        elif item["type"] == "missing":
            problems.append(f"key {place!r} is missing")
        else:
            message = _WORDS.get(item["type"], "{msg}").format(msg=item["msg"], **item.get("ctx", {}))
            message = message.removeprefix("Value error, ")
            problems.append(f"{place} = {shortened(item['input'])}: {message}" if place else message)
    return TocomError(f"{where}: " + "; ".join(problems))


#: Stage (and section of a config) -> its settings.
STAGES: dict[str, type[Settings]] = {
    "pretrain": PretrainSettings,
    "learn": LearnSettings,
    "finetune": FinetuneSettings,
    "finetune.segment": SegmentSettings,
    "finetune.language": LanguageSettings,
    "adapt": AdaptSettings,
    "evaluate": EvaluateSettings,
    "throughput": ThroughputSettings,
    "benchmark": BenchmarkSettings,
    "serve": ServeSettings,
}
