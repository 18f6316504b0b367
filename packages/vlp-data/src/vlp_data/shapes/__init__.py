"""The `shapes` world: drawn scenes that carry every annotation the five systems need, made from a seed.

    from vlp_data import shapes

    scene = shapes.draw(seed=0, index=7)            # pixels, masks, boxes
    texts = shapes.annotate(scene)                  # captions, phrases, questions, ...
    root = shapes.ensure("shapes-2000", images=2000)  # a folder in the layouts of real data

Torch is not imported.
"""

from vlp_data.shapes.annotations import Annotations, annotate, pair
from vlp_data.shapes.figures import KINDS
from vlp_data.shapes.language import Expression, Phrase
from vlp_data.shapes.paint import BACKGROUNDS, COLORS, TEXTURES
from vlp_data.shapes.questions import Hypothesis, PairSentence, Question
from vlp_data.shapes.scene import SIZES, Background, Layout, Scene, Thing, draw
from vlp_data.shapes.vocabulary import vocabulary
from vlp_data.shapes.world import ensure, split_ranges, verify, write

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "KINDS",
    "SIZES",
    "TEXTURES",
    "Annotations",
    "Background",
    "Expression",
    "Hypothesis",
    "Layout",
    "PairSentence",
    "Phrase",
    "Question",
    "Scene",
    "Thing",
    "annotate",
    "draw",
    "ensure",
    "pair",
    "split_ranges",
    "verify",
    "vocabulary",
    "write",
]
