"""The WordPiece vocabulary: complete for the sentences of the world, able to spell every ASCII word."""

import string

from vlp_data.shapes.figures import KINDS
from vlp_data.shapes.language import EXTREMES, NUMBERS, plural
from vlp_data.shapes.paint import BACKGROUNDS, COLORS, TEXTURES
from vlp_data.shapes.questions import GROUNDS
from vlp_data.shapes.scene import SIZES

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

TEMPLATE_WORDS = """
a above also an and are at background be before behind belongs below both bottom buy by can center changes
child color colors corner covering covers diagonal dots drawn exactly fades fading favorite from front
gradient has have horizontal how in is it kind least left made many middle more moved neither no none number
of older on one only other painted paper partly pattern picture pictures planned right same seen shape
shapes show shows side somebody stripes teacher than the there to together tomorrow top two vertical wants
was were what where will with year yes
"""


def vocabulary() -> tuple[str, ...]:
    """All tokens in the order of their ids; "[PAD]" is 0, as in BERT. Every folder has the same ones."""
    words = {
        *KINDS,
        *map(plural, KINDS),
        *COLORS,
        *TEXTURES,
        *BACKGROUNDS,
        *SIZES,
        *NUMBERS,
        *EXTREMES.values(),
        *GROUNDS.values(),
    }
    words |= set(TEMPLATE_WORDS.split())
    characters = string.punctuation + string.digits + string.ascii_lowercase
    pieces = string.digits + string.ascii_lowercase
    tokens = dict.fromkeys((*SPECIAL, *characters, *sorted(words), *("##" + piece for piece in pieces)))
    return tuple(tokens)
