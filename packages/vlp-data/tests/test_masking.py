"""Masking against the reference's draws, and its rules."""

import random

import pytest
from vlp_data.masking import mask_tokens
from vlp_data.options import MaskingOptions
from vlp_data.text import Tokenizer


def vocab_file(case):
    return next(p / "vocab.txt" for p in (case.path, *case.path.parents) if (p / "vocab.txt").is_file())


@pytest.mark.golden(
    "xvlm", lambda case: case.has("text_masking.json") and "masking" in case.json("text_masking")
)
def test_text_masking(case):
    expected = case.json("text_masking")
    tokenizer = Tokenizer.wordpiece(vocab_file(case))
    assert tokenizer.vocabulary == expected["vocab_size"]
    for row in expected["masking"]:
        parameters = row["params"]
        options = MaskingOptions(
            probability=parameters["mask_prob"],
            max_masks=parameters["mask_max"],
            skipgram_probability=parameters["skipgram_prb"],
            skipgram_size=parameters["skipgram_size"],
            whole_words=parameters["mask_whole_word"],
        )
        ids = tokenizer.piece_ids(row["tokens"])
        masked = mask_tokens(
            ids,
            tokenizer.continues(ids),
            options,
            mask_id=tokenizer.mask_id,
            vocabulary=tokenizer.vocabulary,
            rng=random.Random(row["seed"]),
        )
        assert masked.positions == row["masked_pos"]
        assert masked.ids == tokenizer.piece_ids(row["masked_tokens"])


def mask(ids, continues, seed=0, **options):
    return mask_tokens(
        ids, continues, MaskingOptions(**options), mask_id=1, vocabulary=50, rng=random.Random(seed)
    )


@pytest.mark.parametrize("seed", range(30))
def test_number_of_masks_and_the_first_token(seed):
    ids = [2, *range(10, 30)]
    masked = mask(ids, [False] * 21, seed, probability=0.3, max_masks=4, skipgram_probability=0.5)
    assert len(masked.positions) == len(set(masked.positions)) == 4
    assert masked.ids[0] == 2 and 0 not in masked.positions
    changed = {i for i in range(21) if masked.ids[i] != ids[i]}
    assert changed <= set(masked.positions)


def test_one_token_is_masked_at_least():
    assert len(mask([2, 10], [False, False], probability=0.0).positions) == 1


def test_a_single_id_is_refused():
    with pytest.raises(ValueError, match="nothing to mask"):
        mask([2], [False])
