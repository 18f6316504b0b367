"""From a source's row to what a batch is made of. Objects here are picklable and run inside the loader's
workers.

`example(index, rng)` returns an example or `Skipped`; `collate(examples, rng)` returns a batch. All draws
come from `rng`.
"""

from vlp_data.examples.answers import VqaExamples, answer_ids
from vlp_data.examples.base import Examples, Skipped
from vlp_data.examples.captioning import CaptionExamples, CaptionReferencesExamples, prompt_ids
from vlp_data.examples.grounding import BoxExamples
from vlp_data.examples.pretraining import ImageTextExamples, RegionExamples
from vlp_data.examples.retrieval import RetrievalExamples
from vlp_data.examples.statements import EntailmentExamples, NlvrExamples

__all__ = [
    "BoxExamples",
    "CaptionExamples",
    "CaptionReferencesExamples",
    "EntailmentExamples",
    "Examples",
    "ImageTextExamples",
    "NlvrExamples",
    "RegionExamples",
    "RetrievalExamples",
    "Skipped",
    "VqaExamples",
    "answer_ids",
    "prompt_ids",
]
