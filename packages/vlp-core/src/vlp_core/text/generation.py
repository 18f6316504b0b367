"""Writing text with a language model: greedy, sampling and beam search over one step function.

The functions know no model. They take a `step` that appends tokens to every row and returns the logits of
what comes next, and the `Cache` it starts with (`vlp_core.text.decoding`). Captions and answers use them
alike. Lengths count the prompt, as in the reference. Nothing is read from the device but, once per token,
whether all rows have ended.

Source: Hugging Face transformers 4.12.5 `generation_beam_search.py` (the version the reference pins) for beam
search; Oscar's `_generate_no_beam_search`, used by X-VLM `models/model_captioning.py`, for greedy and
sampling.

Shape letters: B prompts (images), R rows (texts), N beams, L tokens with the prompt, G generated tokens, V
vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlp_core.text.bert import Bert
from vlp_core.text.decoding import Cache, extend

Step = Callable[[Tensor, Cache], tuple[Tensor, Cache]]
"""(ids [R, T], cache) -> (logits [R, V] of the token after the last, cache)."""

Head = Callable[[Tensor, Tensor], Tensor]
"""(states [R, W], word embeddings [V, W]) -> logits [R, V]."""

HOPELESS = -1e9
"""Score of a beam that is a copy of another: low enough never to win against a real one."""


class Generated(NamedTuple):
    """Best text of each prompt.

    ids: [B, L] with the prompt; after the end token, padding.
    score: [B] sum of log-probabilities divided by length ** length_penalty; length counts the prompt, not the
        end token.
    """

    ids: Tensor
    score: Tensor


class Sampled(NamedTuple):
    """Texts drawn token by token.

    ids: [R, L] with the prompt; after the end token, padding. A row that has not ended by itself has the end
        token in the last place.
    log_probabilities: [R, G] of the tokens drawn, with gradient where the model's forward has one.
    drawn: [R, G], True up to and with the end token.
    """

    ids: Tensor
    log_probabilities: Tensor
    drawn: Tensor

    def mean_log_probability(self) -> Tensor:
        """Mean over the drawn tokens of each row, [R]."""
        return (self.log_probabilities * self.drawn).sum(1) / self.drawn.sum(1)


def language_step(text: Bert, head: Head) -> Step:
    """The step of a causal `Bert` with a language head."""

    def step(ids_RT: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        states, cache = extend(text, ids_RT, cache)
        return head(states[:, -1], text.word_embedding.weight), cache

    return step


def greedy(
    step: Step,
    cache: Cache,
    prompt_BP: Tensor,
    *,
    max_tokens: int,
    min_tokens: int = 0,
    end_id: int,
    pad_id: int,
) -> Sampled:
    """The most probable token at each step.

    Args:
        step: See the module.
        cache: Cache of the B images without any token.
        prompt_BP: First tokens, without padding.
        max_tokens: Length with the prompt at which a text is cut; its last token is then replaced by the end
            token.
        min_tokens: Length with the prompt below which a text cannot end.
        end_id: Token that ends a text.
        pad_id: Token after the end.

    Raises:
        ValueError: The prompt leaves no room below `max_tokens`.
    """
    return _draw(
        step,
        cache,
        prompt_BP,
        lambda logits: logits.argmax(1),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        end_id=end_id,
        pad_id=pad_id,
    )


def sample(
    step: Step,
    cache: Cache,
    prompt_BP: Tensor,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    max_tokens: int,
    min_tokens: int = 0,
    end_id: int,
    pad_id: int,
    generator: torch.Generator | None = None,
) -> Sampled:
    """`samples` texts per prompt, drawn from softmax(logits / temperature); rows of one prompt stand
    together.

    Other arguments as in `greedy`. `log_probabilities` are those of the distribution drawn from.
    """
    if samples < 1 or temperature <= 0:
        raise ValueError(f"samples={samples} must be at least 1 and temperature={temperature} above 0")

    def choose(logits: Tensor) -> Tensor:
        # NaN logits must show up in the loss, where the engine looks for them, not as an assertion of the
        # drawing kernel.
        return torch.multinomial(logits.softmax(1).nan_to_num(1.0), 1, generator=generator).squeeze(1)

    return _draw(
        step,
        cache,
        prompt_BP.repeat_interleave(samples, 0),
        choose,
        temperature=temperature,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        end_id=end_id,
        pad_id=pad_id,
    )


def beam_search(
    step: Step,
    cache: Cache,
    prompt_BP: Tensor,
    *,
    beams: int,
    max_tokens: int,
    min_tokens: int = 0,
    length_penalty: float = 1.0,
    end_id: int,
    pad_id: int,
) -> Generated:
    """The best text that a search with `beams` open texts per prompt finds.

    A step looks at the 2 * beams best continuations; those that end within the first `beams` become
    candidates, the first `beams` others stay open. A prompt is done when it has `beams` candidates and no
    open text can beat the worst of them at its present length. Candidates are compared by score (see
    `Generated`). Without gradient. Other arguments as in `greedy`.

    Raises:
        ValueError: As in `greedy`; less than one beam, or a vocabulary too small for 2 * beams continuations.
    """
    _check_room(prompt_BP, max_tokens)
    batch, prompt = prompt_BP.shape
    device = prompt_BP.device
    with torch.no_grad():
        logits, cache = step(prompt_BP, cache)
        vocabulary = logits.shape[1]
        if beams < 1 or vocabulary < 2 * beams:
            raise ValueError(
                f"beams={beams} must be at least 1 and half the vocabulary of {vocabulary} at most"
            )
        cache, logits = cache.repeat(beams), logits.repeat_interleave(beams, 0)
        ids = prompt_BP[:, None].expand(batch, beams, prompt)
        scores = logits.new_zeros(batch, beams, dtype=torch.float32)
        scores[:, 1:] = HOPELESS
        best = _Candidates.none(batch, beams, max_tokens, pad_id, device)
        done = torch.zeros(batch, dtype=torch.bool, device=device)
        order = torch.arange(2 * beams, device=device)
        first_row = torch.arange(batch, device=device)[:, None] * beams
        for length in range(prompt, max_tokens):
            log_probability = logits.float().log_softmax(1)
            if length < min_tokens:
                log_probability[:, end_id] = -torch.inf
            total = (log_probability.view(batch, beams, vocabulary) + scores[..., None]).flatten(1)
            values, flat = total.topk(2 * beams, dim=1)
            parent, token = flat // vocabulary, flat % vocabulary
            ends = token == end_id
            offered = ends & (order < beams) & ~done[:, None]
            best = best.add(
                _pad(ids.gather(1, parent[..., None].expand(-1, -1, length)), max_tokens, pad_id),
                (values / length**length_penalty).masked_fill(~offered, -torch.inf),
                length,
            )
            done |= best.full() & (best.worst() >= values[:, 0] / length**length_penalty)
            # Open texts: the first `beams` continuations that do not end; at least that many of 2 * beams do
            # not.
            keep = (order + 2 * beams * ends).argsort(dim=1)[:, :beams]
            parent, token, scores = (x.gather(1, keep) for x in (parent, token, values))
            ids = torch.cat(
                [ids.gather(1, parent[..., None].expand(-1, -1, length)), token[..., None]], dim=2
            )
            if length + 1 == max_tokens or bool(done.all()):
                break
            logits, cache = step(token.reshape(-1, 1), cache.select((first_row + parent).flatten()))
        length = ids.shape[2]
        open_scores = (scores / length**length_penalty).masked_fill(done[:, None], -torch.inf)
        best = best.add(_pad(ids, max_tokens, pad_id), open_scores, length)
        return best.first(end_id, pad_id)


class _Candidates(NamedTuple):
    """Up to N ended texts per prompt, best first: `ids` [B, N, max_tokens], `score` [B, N] (-inf: none),
    `length` [B, N]."""

    ids: Tensor
    score: Tensor
    length: Tensor

    @classmethod
    def none(
        cls, batch: int, beams: int, max_tokens: int, pad_id: int, device: torch.device
    ) -> "_Candidates":
        return cls(
            torch.full((batch, beams, max_tokens), pad_id, device=device),
            torch.full((batch, beams), -torch.inf, device=device),
            torch.zeros(batch, beams, dtype=torch.long, device=device),
        )

    def add(self, ids: Tensor, score: Tensor, length: int) -> "_Candidates":
        """The best N of these and of others of one length."""
        score, keep = torch.cat([self.score, score], dim=1).sort(dim=1, descending=True, stable=True)
        keep = keep[:, : self.score.shape[1]]
        lengths = torch.cat([self.length, self.length.new_full(ids.shape[:2], length)], dim=1)
        return _Candidates(
            torch.cat([self.ids, ids], dim=1).gather(1, keep[..., None].expand(-1, -1, ids.shape[2])),
            score[:, : keep.shape[1]],
            lengths.gather(1, keep),
        )

    def full(self) -> Tensor:
        return self.score[:, -1] > -torch.inf

    def worst(self) -> Tensor:
        return self.score[:, -1]

    def first(self, end_id: int, pad_id: int) -> Generated:
        ids, length = self.ids[:, 0], self.length[:, 0]
        place = torch.arange(ids.shape[1], device=ids.device)
        ids = ids.masked_fill(place == length[:, None], end_id).masked_fill(place > length[:, None], pad_id)
        longest = min(int(length.max()) + 1, ids.shape[1])
        return Generated(ids[:, :longest], self.score[:, 0])


def _draw(
    step: Step,
    cache: Cache,
    prompt_RP: Tensor,
    choose: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    max_tokens: int,
    min_tokens: int,
    end_id: int,
    pad_id: int,
) -> Sampled:
    _check_room(prompt_RP, max_tokens)
    rows, prompt = prompt_RP.shape
    ids, new = [prompt_RP], prompt_RP
    log_probabilities, drawn = [], []
    running = torch.ones(rows, dtype=torch.bool, device=prompt_RP.device)
    for length in range(prompt, max_tokens):
        logits, cache = step(new, cache)
        logits = logits.float() / temperature
        if length < min_tokens:
            ends = torch.arange(logits.shape[1], device=logits.device) == end_id
            logits = logits.masked_fill(ends, -torch.inf)
        token = choose(logits.detach())
        log_probabilities.append(logits.log_softmax(1).gather(1, token[:, None]))
        drawn.append(running[:, None])
        token = token.masked_fill(~running, pad_id)
        running = running & (token != end_id)
        new = token[:, None]
        ids.append(new)
        if not bool(running.any()):
            break
    # As in the reference the last place of a text that never ended says so, while its log-probability is that
    # of the token drawn.
    ids[-1] = ids[-1].masked_fill(running[:, None], end_id)
    return Sampled(torch.cat(ids, 1), torch.cat(log_probabilities, 1), torch.cat(drawn, 1))


def _check_room(prompt_BP: Tensor, max_tokens: int) -> None:
    if not 0 < prompt_BP.shape[1] < max_tokens:
        raise ValueError(
            f"a prompt of {prompt_BP.shape[1]} tokens leaves nothing to write: max_tokens={max_tokens} "
            "counts the prompt, "
            "and at least one token must be given"
        )


def _pad(ids: Tensor, length: int, pad_id: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, length - ids.shape[-1]), value=pad_id)
