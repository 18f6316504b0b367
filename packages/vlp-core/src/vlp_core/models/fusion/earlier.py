"""Export folders of earlier versions, in which models of NLVR2, entailment, answers and captions named no
family."""

from collections.abc import Mapping
from typing import Any

from vlp_core.heads import ClassHead
from vlp_core.models.family import Earlier

CLASS_HEADS: dict[str, ClassHead] = {"nlvr": "mlp", "entailment": "relu"}
"""What earlier versions took where the arguments name no `head`."""


def shared_stage(
    model: str, arguments: Mapping[str, Any], *, class_head: ClassHead, concepts: bool
) -> Earlier | None:
    """Stage and arguments of a model that several families share, or None where it is another family's.

    A class head tells the family of NLVR2 and entailment. Nothing tells it for answers and captions; there
    concepts decide.

    Args:
        model, arguments: Those of config.json.
        class_head: Classifier of the family.
        concepts: Whether the family takes models of answers and captions that see concepts, or those that see
            none.
    """
    match model:
        case "nlvr" | "entailment":
            if arguments.get("head", CLASS_HEADS[model]) != class_head:
                return None
            domain = model == "nlvr" and arguments.get("stage") == "domain"
            # The head follows from the stage; the width had an effect in the domain stage only.
            spare = ("stage", "head") if domain else ("stage", "head", "embed_width")
            rest = {key: value for key, value in arguments.items() if key not in spare}
            return Earlier("nlvr_domain" if domain else model, rest)
        case "vqa" | "captioning" if (arguments.get("concepts") is not None) == concepts:
            return Earlier(model, dict(arguments))
    return None
