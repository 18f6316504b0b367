"""Generation on a made-up language whose next token depends on everything said before."""

import math

import pytest
import torch
from vlp_core.text.bert import KeyValue
from vlp_core.text.decoding import Cache
from vlp_core.text.generation import beam_search, greedy, sample

VOCABULARY, END, PAD = 9, 3, 0
EMPTY = Cache(images=(), image_mask=None)


class Language:
    """Logits from a table by a hash of the whole text; the cache keeps the text, so its rows must be kept in
    order."""

    def __init__(self, seed: int, *, end_bonus: float = 0.0) -> None:
        self.table = torch.randn(101, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
        self.table[:, END] += end_bonus
        self.table.requires_grad_()
        self.calls = 0

    def logits(self, text: torch.Tensor) -> torch.Tensor:
        weight = 7 ** torch.arange(text.shape[1]) % 101
        return self.table[(text * weight).sum(1) % 101]

    def __call__(self, ids, cache):
        self.calls += 1
        text = torch.cat([cache.texts[0].key, ids], 1) if cache.texts else ids
        return self.logits(text), Cache(images=(), image_mask=None, texts=(KeyValue(text, text),))


def searched(language: Language, prompt, *, beams, max_tokens, min_tokens, length_penalty):
    """Beam search as the scorer of the pinned library does it: one prompt, one candidate at a time."""
    running, ended = [(0.0, prompt)], []

    def offer(score, text):
        ended.append((score / len(text) ** length_penalty, text))
        ended.sort(key=lambda item: -item[0])
        del ended[beams:]

    while True:
        length = len(running[0][1])
        found = []
        for score, text in running:
            log_probability = language.logits(torch.tensor([text]))[0].log_softmax(0).tolist()
            if length < min_tokens:
                log_probability[END] = -math.inf
            found += [(score + new, text, token) for token, new in enumerate(log_probability)]
        found = sorted(found, key=lambda item: -item[0])[: 2 * beams]
        running = []
        for place, (score, text, token) in enumerate(found):
            if token == END:
                if place < beams:
                    offer(score, text)
            elif len(running) < beams:
                running.append((score, [*text, token]))
        if len(ended) == beams and ended[-1][0] >= found[0][0] / length**length_penalty:
            break
        if length + 1 == max_tokens:
            for score, text in running:
                offer(score, text)
            break
    return ended[0]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("beams", "min_tokens", "length_penalty", "end_bonus"),
    [(1, 0, 1.0, 0), (3, 0, 1.0, 1), (4, 6, 0.0, 2), (2, 4, 2.0, 1)],
)
def test_beam_search_is_that_of_the_pinned_library(seed, beams, min_tokens, length_penalty, end_bonus):
    language = Language(seed, end_bonus=end_bonus)
    prompts = [[2, 5], [2, 6], [4, 4], [1, 7]]
    options = {"beams": beams, "max_tokens": 9, "min_tokens": min_tokens, "length_penalty": length_penalty}
    found = beam_search(language, EMPTY, torch.tensor(prompts), **options, end_id=END, pad_id=PAD)
    assert not found.score.requires_grad
    for row, prompt in enumerate(prompts):
        score, text = searched(language, prompt, **options)
        assert found.score[row].item() == pytest.approx(score, rel=1e-5)
        tail = [END] if len(text) < 9 else []
        length = found.ids.shape[1]
        assert found.ids[row].tolist() == (text + tail + [PAD] * 9)[:length]
        assert length >= len(text + tail)


def test_beam_search_stops_when_every_prompt_is_done():
    language = Language(0, end_bonus=50.0)
    found = beam_search(
        language, EMPTY, torch.tensor([[2], [4]]), beams=2, max_tokens=30, end_id=END, pad_id=PAD
    )
    assert found.ids.tolist() == [[2, END], [4, END]]
    assert language.calls <= 3


@pytest.mark.parametrize("min_tokens", [0, 6])
def test_greedy_takes_the_most_probable_token_and_marks_the_end(min_tokens):
    language = Language(3, end_bonus=1.5)
    prompt = torch.tensor([[2, 5], [2, 6], [4, 4], [1, 7], [6, 6]])
    found = greedy(language, EMPTY, prompt, max_tokens=8, min_tokens=min_tokens, end_id=END, pad_id=PAD)
    lengths = []
    for row, first in enumerate(prompt.tolist()):
        text, total = list(first), []
        while len(text) < 8:
            log_probability = language.logits(torch.tensor([text]))[0]
            if len(text) < min_tokens:
                log_probability = log_probability.index_fill(0, torch.tensor([END]), -math.inf)
            log_probability = log_probability.log_softmax(0)
            text.append(int(log_probability.argmax()))
            total.append(log_probability.max().item())
            if text[-1] == END:
                break
        lengths.append(len(text))
        drawn = found.drawn[row]
        assert drawn.sum() == len(total)
        assert found.log_probabilities[row][drawn].tolist() == pytest.approx(total)
        assert found.mean_log_probability()[row].item() == pytest.approx(sum(total) / len(total))
        if text[-1] != END:
            text[-1] = END
        assert found.ids[row].tolist() == (text + [PAD] * 8)[: found.ids.shape[1]]
    assert len(set(lengths)) > 1, "the language should end its texts at different places"


def test_samples_follow_the_distribution_and_their_prompts():
    language = Language(5)
    prompt = torch.tensor([[2, 5], [1, 7]])
    count = 4000
    for temperature in (1.0, 2.0):
        found = sample(
            language,
            EMPTY,
            prompt,
            samples=count,
            temperature=temperature,
            max_tokens=4,
            end_id=END,
            pad_id=PAD,
            generator=torch.Generator().manual_seed(0),
        )
        assert torch.equal(found.ids[:, :2], prompt.repeat_interleave(count, 0))
        first = found.ids[:, 2].view(2, count)
        frequency = torch.stack([torch.bincount(row, minlength=VOCABULARY) / count for row in first])
        expected = (language.logits(prompt) / temperature).softmax(1).detach()
        assert (frequency - expected).abs().max() < 0.03
        torch.testing.assert_close(
            found.log_probabilities[:, 0].detach(),
            expected.log().repeat_interleave(count, 0).gather(1, found.ids[:, 2:3])[:, 0],
        )


def test_samples_depend_on_the_generator_alone():
    language, prompt = Language(5), torch.tensor([[2, 5]])

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"samples": 6, "max_tokens": 9, "end_id": END, "pad_id": PAD}
        return sample(language, EMPTY, prompt, **options, generator=generator).ids

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert len(draw(1).unique(dim=0)) > 1


def test_nan_shows_in_the_log_probabilities():
    language = Language(0)
    with torch.no_grad():
        language.table.fill_(torch.nan)
    found = sample(language, EMPTY, torch.tensor([[2]]), max_tokens=4, end_id=END, pad_id=PAD)
    assert found.mean_log_probability().isnan().all()


def test_log_probabilities_carry_the_gradient_of_drawn_tokens_only():
    language, prompt = Language(3, end_bonus=2.5), torch.tensor([[2, 5], [1, 7], [4, 4], [6, 6]])
    found = sample(
        language,
        EMPTY,
        prompt,
        max_tokens=20,
        end_id=END,
        pad_id=PAD,
        generator=torch.Generator().manual_seed(4),
    )
    lengths = found.drawn.sum(1).tolist()
    assert len(set(lengths)) > 1 and max(lengths) < 18, "texts should end by themselves, at different places"
    found.mean_log_probability().sum().backward()
    gradient, language.table.grad = language.table.grad, None
    for ids, length in zip(found.ids, lengths, strict=True):
        logs = [language.logits(ids[None, :at]).log_softmax(1)[0, ids[at]] for at in range(2, 2 + length)]
        (sum(logs) / length).backward()
    torch.testing.assert_close(gradient, language.table.grad)


@pytest.mark.parametrize("prompt", [torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)])
def test_prompts_without_room_are_refused(prompt):
    options = {"max_tokens": 5, "end_id": END, "pad_id": PAD}
    for run in (
        lambda: greedy(Language(0), EMPTY, prompt, **options),
        lambda: sample(Language(0), EMPTY, prompt, **options),
        lambda: beam_search(Language(0), EMPTY, prompt, beams=2, **options),
    ):
        with pytest.raises(ValueError, match=r"leaves nothing to write: max_tokens=5 counts the prompt"):
            run()


def test_numbers_out_of_range_are_refused():
    prompt, options = torch.tensor([[2]]), {"max_tokens": 5, "end_id": END, "pad_id": PAD}
    for beams in (0, 5):
        with pytest.raises(
            ValueError, match=f"beams={beams} must be at least 1 and half the vocabulary of 9"
        ):
            beam_search(Language(0), EMPTY, prompt, beams=beams, **options)
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        sample(Language(0), EMPTY, prompt, samples=0, **options)
    with pytest.raises(ValueError, match=r"temperature=0.0 above 0"):
        sample(Language(0), EMPTY, prompt, temperature=0.0, **options)
