"""X-VLM captions: the whole text encoder as causal language model, in three stages.

Domain pre-training on images with captions; fine-tuning on COCO with label smoothing, after the prompt "a
picture of"; self-critical training, which rewards drawn captions by CIDEr-D.

Source: arXiv 2111.08276 section 4.2, arXiv 1612.00563; `Captioning_pretrain.py`, `Captioning.py`,
`Captioning_scst.py` and their configs in the official code.
"""

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from vlp_core.images import Images
from vlp_core.losses import language_loss, mean_of_others, self_critical_loss
from vlp_core.models.fusion.captioning import CaptionModel
from vlp_core.text.generation import Sampled
from vlp_data.batch import CaptionBatch, CaptionReferencesBatch
from vlp_data.examples import CaptionExamples, CaptionReferencesExamples, prompt_ids
from vlp_data.loader import Loader
from vlp_data.schema import Source
from vlp_data.text import Tokenizer, pre_caption
from vlp_eval.metrics.captioning import DocumentFrequency, reward_words, rewards

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.data import TRAIN, images_of, open_loader
from vlp_methods.engine.job import Job
from vlp_methods.xvlm.rules import fine_tuning_rules
from vlp_methods.xvlm.schema.captioning import Captioning, CaptioningDomain, CaptioningScst, Reward


class CaptionTask(nn.Module):
    """The objective of domain stage and fine-tuning: cross entropy of the next token, prompt left out."""

    def __init__(self, model: CaptionModel, *, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def forward(self, batch: CaptionBatch) -> dict[str, Tensor]:
        logits = self.model(images_of(batch), batch.text_ids, batch.attention_mask)
        return {"caption": language_loss(logits, batch.labels, smoothing=self.smoothing)}


class CiderReward:
    """CIDEr-D of captions against those of people, with the document frequencies of a source, counted when
    the first reward is asked for."""

    def __init__(self, source: Source, *, max_words: int) -> None:
        self.source = source
        self.clean = partial(pre_caption, max_words=max_words, empty="keep")

    @cached_property
    def frequency(self) -> DocumentFrequency:
        rows = (self.source[number].texts for number in range(len(self.source)))
        return DocumentFrequency.of(
            [
                [reward_words(self.clean(text.text)) for text in texts if text.role == "caption"]
                for texts in rows
            ]
        )

    def __call__(self, captions: list[str], references: list[tuple[str, ...]]) -> Tensor:
        """One number per caption; `references[r]` are those of its image, as the source has them."""
        cleaned = [[self.clean(text) for text in own] for own in references]
        return torch.tensor(rewards(captions, cleaned, self.frequency))


class ScstTask(nn.Module):
    """The objective of self-critical training: drawn captions that are better than the baseline become more
    probable.

    All of it happens inside `forward`, which data parallelism wraps: the gradients of the ranks are averaged
    as in every other task (the reference bypasses the wrapper, so that its ranks drift apart).
    """

    def __init__(
        self, model: CaptionModel, tokenizer: Tokenizer, reward: CiderReward, options: Reward, prompt: str
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.reward = reward
        self.options = options
        self.prompt = prompt

    def forward(self, batch: CaptionReferencesBatch) -> dict[str, Tensor]:
        samples = self.options.samples
        images = Images(batch.image)
        drawn = self._draw(images, samples)
        references = [own for own in batch.references for _ in range(samples)]
        reward = self.reward(self._texts(drawn), references).to(batch.image.device)
        if self.options.baseline == "greedy":
            greedy = self.reward(self._texts(self._greedy(images)), list(batch.references))
            baseline = greedy.to(batch.image.device).repeat_interleave(samples)
        else:
            baseline = mean_of_others(reward, samples)
        return {"scst": self_critical_loss(drawn.mean_log_probability(), reward, baseline)}

    def _draw(self, images: Images, samples: int) -> Sampled:
        embeds, mask = self.model.vision.encode(images)
        return self.model.sample(
            embeds,
            self._prompts(len(images), images.device),
            samples=samples,
            temperature=self.options.temperature,
            max_tokens=self.options.max_tokens,
            end_id=self.tokenizer.sep_id,
            pad_id=self.tokenizer.pad_id,
            image_mask_BL=mask,
        )

    @torch.no_grad()
    def _greedy(self, images: Images) -> Sampled:
        """Without dropout, whatever the mode."""
        training = self.model.training
        self.model.eval()
        embeds, mask = self.model.vision.encode(images)
        found = self.model.greedy(
            embeds,
            self._prompts(len(images), images.device),
            max_tokens=self.options.max_tokens,
            end_id=self.tokenizer.sep_id,
            pad_id=self.tokenizer.pad_id,
            image_mask_BL=mask,
        )
        self.model.train(training)
        return found

    def _prompts(self, count: int, device: torch.device) -> Tensor:
        ids = torch.tensor(prompt_ids(self.tokenizer, self.prompt), device=device)
        return ids.expand(count, -1)

    def _texts(self, found: Sampled) -> list[str]:
        return [self.tokenizer.decode(ids)[len(self.prompt) :] for ids in found.ids.tolist()]


def build_domain(recipe: CaptioningDomain) -> Job:
    """Model, data and optimizer of domain pre-training."""
    made = assemble(recipe, "xvlm", "captioning")
    return made.job(
        CaptionTask(made.model),
        made.stream(CaptionExamples),
        fine_tuning_rules(recipe, made.model),
        prompt="",
    )


def build(recipe: Captioning) -> Job:
    """Model, data, optimizer and evaluations of fine-tuning."""
    made = assemble(recipe, "xvlm", "captioning")
    prompt = made.data.prompt
    return made.job(
        CaptionTask(made.model, smoothing=recipe.smoothing),
        made.stream(partial(CaptionExamples, prompt=prompt)),
        fine_tuning_rules(recipe, made.model),
        evaluations=evaluation.fine_tuning(made, "captioning", recipe.captions),
        prompt=prompt,
    )


def build_scst(recipe: CaptioningScst) -> Job:
    """Model, data, optimizer and evaluations of self-critical training."""
    made = assemble(recipe, "xvlm", "captioning")
    data, prompt = made.data, made.data.prompt
    reward = CiderReward(data.train.source.open(), max_words=data.text.max_words)

    def streams() -> Mapping[str, Loader[Any]]:
        examples = CaptionReferencesExamples(
            source=reward.source, references=recipe.reward.references, image=data.view
        )
        return {TRAIN: open_loader(recipe, data, TRAIN, examples, global_batch=data.train.batch)}

    return made.job(
        ScstTask(made.model, made.tokenizer, reward, recipe.reward, prompt),
        streams,
        fine_tuning_rules(recipe, made.model),
        evaluations=evaluation.fine_tuning(made, "captioning", recipe.captions),
        prompt=prompt,
    )
