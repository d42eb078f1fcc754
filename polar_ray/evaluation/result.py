"""What an evaluation found: `Evaluation`, which is also what `evaluation.json` holds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from polar_ray.config import EvaluateConfig, Layout


class Found(BaseModel):
    """The common ground: immutable, field docstrings in the JSON schema."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Interval(Found):
    """A 95 % confidence interval: percentiles of a bootstrap that draws whole groups."""

    low: float
    high: float


class MethodResult(Found):
    """How well one way of scoring outputs orders them: the model's, or a baseline's that knows nothing of meaning.

    An interval is null where the bootstrap has nothing to say: fewer than two groups, or the same number from every
    resample.
    """

    name: str
    title: str
    unit: str
    """Of the margins: rewards, characters or cosines. Margins of different units do not compare."""

    accuracy: float | None
    """Share of the scored pairs whose better output has the higher value; a tie counts one half. Null without pairs."""

    accuracy_interval: Interval | None
    ties: int
    mean_margin: float | None
    """Value of the better output less that of the worse, on average."""

    lead: float | None = None
    """Of a baseline: the model's accuracy less this one's, over the same pairs."""

    lead_interval: Interval | None = None
    beats_all: float | None = None
    """Of pairs with several chosen or rejected outputs: share of the input rows where every chosen output has a higher
    value than every rejected one."""

    beats_all_interval: Interval | None = None
    auc: float | None = None
    """Of triples with two labels: area under the ROC curve over all outputs, whatever their group."""

    auc_interval: Interval | None = None
    spearman: float | None = None
    """Of triples with graded labels: rank correlation within a group, averaged over groups. A method that gives a whole
    group one value has 0 there."""

    spearman_interval: Interval | None = None


class Block(Found):
    """The figures of all pairs, or of those with one value of a column."""

    column: str | None
    value: str | None
    pairs: int
    """Pairs that were scored; all figures are over these."""

    unscored_pairs: int
    """Pairs of which an output has no reward."""

    rows: int
    """Outputs that were scored."""

    groups: int
    """What the bootstrap draws: pairs of one prompt are not independent."""

    methods: list[MethodResult]
    """The model first."""


class ValueAt(Found):
    """A figure with its interval."""

    value: float
    interval: Interval | None


class BestOf(Found):
    """Picking the best of `n` outputs drawn from a group at random: the expected label of what is picked, exactly."""

    n: int
    groups: int
    """Groups with at least `n` scored outputs; the figures are over these."""

    random: float
    """The label of an output picked blindly."""

    oracle: float
    """The label of the best one, picked by the labels themselves."""

    methods: dict[str, ValueAt]


class Bin(Found):
    """The pairs whose x lies from `low` to `high`; null is open."""

    low: float | None
    high: float | None
    pairs: int
    mean_x: float
    accuracy: float
    interval: Interval | None


class Reliability(Found):
    """Whether margins mean what the training loss takes them for: P(chosen beats rejected) = sigmoid(margin)."""

    ece: float
    """Expected calibration error: how far predicted and observed lie apart in a bin, averaged over pairs."""

    bins: list[Bin]
    """By the predicted probability that the output with the higher reward is the better one, 0.5 to 1; `accuracy` is
    how often it was."""


class Evaluation(Found):
    """A model's agreement with preferences, beside baselines, and all that is needed to find the same again."""

    object: Literal["evaluation"] = "evaluation"
    model: str
    untrained: bool
    """Whether the checkpoint says of itself that its weights are random."""

    layout: Layout
    labels: Literal["two", "graded"] | None
    """Of triples: whether labels have two values or more."""

    label_range: tuple[float, float] | None
    """Of triples: the lowest and the highest label."""

    inputs: list[str]
    input_rows: int
    unlabelled_rows: int
    """Of triples: rows whose label is null. They are not scored."""

    by_status: dict[str, int]
    """Outputs by what became of them: `ok`, or the code of an error."""

    equal_pairs: int
    """Pairs whose better and worse output are the same text: ties for everything."""

    total: Block
    by: list[Block]
    best_of: list[BestOf]
    reliability: Reliability | None
    by_length: list[Bin]
    """The model's accuracy by the characters of a pair's outputs, on average of the two."""

    by_length_ratio: list[Bin]
    """The model's accuracy by the length of the better output over that of the worse."""

    margin_bin: float
    margin_bins: dict[int, int]
    """Bin `b` holds pairs whose margin is from `b * margin_bin` to the next."""

    tokens: int
    computed_tokens: int
    seconds: float
    settings: EvaluateConfig
    """With every `auto` replaced by what it meant."""

    receipt: dict[str, Any]
    receipt_id: str

    @property
    def failed(self) -> dict[str, int]:
        """Outputs without a reward, by status."""
        return {status: count for status, count in sorted(self.by_status.items()) if status != "ok"}
