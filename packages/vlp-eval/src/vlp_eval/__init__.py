"""Benchmarks and metrics for vision-language models: metrics take arrays, evaluations take a model and return
`Scores`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp_eval.captioning import evaluate_captioning
    from vlp_eval.gallery import Gallery
    from vlp_eval.grounding import evaluate_grounding, evaluate_weak_grounding
    from vlp_eval.inference import Execution
    from vlp_eval.protocol import DualEncoder, RetrievalModel
    from vlp_eval.report import Scores
    from vlp_eval.retrieval import evaluate_retrieval
    from vlp_eval.statements import evaluate_entailment, evaluate_nlvr
    from vlp_eval.subject import Subject
    from vlp_eval.vqa import evaluate_vqa

__version__ = "0.1.0"
__all__ = [
    "DualEncoder",
    "Execution",
    "Gallery",
    "RetrievalModel",
    "Scores",
    "Subject",
    "evaluate_captioning",
    "evaluate_entailment",
    "evaluate_grounding",
    "evaluate_nlvr",
    "evaluate_retrieval",
    "evaluate_vqa",
    "evaluate_weak_grounding",
]

_MODULES = {
    "DualEncoder": "protocol",
    "Execution": "inference",
    "Gallery": "gallery",
    "RetrievalModel": "protocol",
    "Scores": "report",
    "Subject": "subject",
    "evaluate_captioning": "captioning",
    "evaluate_entailment": "statements",
    "evaluate_grounding": "grounding",
    "evaluate_nlvr": "statements",
    "evaluate_retrieval": "retrieval",
    "evaluate_vqa": "vqa",
    "evaluate_weak_grounding": "grounding",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts without torch."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
