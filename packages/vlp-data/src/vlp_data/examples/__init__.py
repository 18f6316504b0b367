"""From a source's row to what a batch is made of. Objects here are picklable and run inside the loader's
workers.

`example(index, rng)` returns an example and raises BadSample for a row that cannot be used;
`collate(examples, rng)` returns a batch. All draws come from `rng`.
"""

from vlp_data.examples.answers import VqaExamples, answer_ids
from vlp_data.examples.base import Examples, ImageExamples, Seen, TextExamples
from vlp_data.examples.captioning import CaptionExamples, CaptionReferencesExamples, prompt_ids
from vlp_data.examples.grounding import BoxExamples
from vlp_data.examples.pretraining import ImageTextExamples, MaskedExamples, RegionExamples
from vlp_data.examples.retrieval import RetrievalExamples
from vlp_data.examples.statements import EntailmentExamples, NlvrExamples

__all__ = [
    "BoxExamples",
    "CaptionExamples",
    "CaptionReferencesExamples",
    "EntailmentExamples",
    "Examples",
    "ImageExamples",
    "ImageTextExamples",
    "MaskedExamples",
    "NlvrExamples",
    "RegionExamples",
    "RetrievalExamples",
    "Seen",
    "TextExamples",
    "VqaExamples",
    "answer_ids",
    "prompt_ids",
]
