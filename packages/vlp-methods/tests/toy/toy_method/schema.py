from dataclasses import dataclass, field

from vlp_core.recipe import PathText
from vlp_methods.engine.options import Training


@dataclass(frozen=True, kw_only=True)
class Data:
    root: PathText = ""
    """Unused; shows path fields."""
    batch: int = 8
    """Samples per global batch of each stream."""
    samples: int = 24
    """Samples of each stream."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    sleep: float = 0.0
    """Seconds each update takes longer."""
    nan_key: str | None = None
    """The loss of a batch that holds this sample is NaN."""
    nan_gradient_key: str | None = None
    """The loss of such a batch is finite, its gradient is not."""
    missing_file: bool = False
    """Building fails with FileNotFoundError."""
    crash: bool = False
    """Building fails with an error that is a bug."""
    evaluation_from: int | None = None
    """Evaluations from this step on fail, unless TOY_FIXED=1 is in the environment."""
    slow_evaluation: float = 0.0
    """Seconds that an evaluation takes."""
    bad_value: bool = False
    """Building fails with ValueError: the recipe is at fault."""
    wrong_step: str | None = None
    """The batch that holds this sample fails with ValueError: the code is at fault."""


@dataclass(frozen=True, kw_only=True)
class Fit(Training):
    data: Data = field(default_factory=Data)
    """Data."""
    dropout: float = 0.2
    """Dropout."""
    regions: float = 0.5
    """Probability of a regions update."""
    frozen_file: PathText = ""
    """File that the weights of the body come from; they are frozen then."""
    contrast: float = 0.0
    """Weight of a contrastive loss between halves of the hidden states, whose temperature is learned."""
    lost: bool = False
    """Train a parameter that the optimizer does not have."""
    score: tuple[float, ...] = ()
    """What evaluations give as `score` at step 1, 2, ...; the last one stays."""
    boxes: bool = False
    """A head that batches of regions train and batches of images do not."""
    tested: bool = False
    """Measure the selected model at the end."""
    faults: Faults = field(default_factory=Faults)
    """What goes wrong."""
