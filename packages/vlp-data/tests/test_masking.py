"""Masking against the reference's draws, and its rules."""

import random

import pytest
from vlp_data.masking import Draws, draw_independently, mask_independently, mask_tokens
from vlp_data.options import IndependentMasking, MaskingOptions
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


MASK_DRAWS = {"mlm_draw_masked", "mlm_draw_replace", "mlm_draw_random", "mlm_random_words"}


@pytest.mark.golden("vicha", lambda case: case.tensor_names("inputs") >= MASK_DRAWS)
def test_independent_masking(case):
    given, wanted = case.tensors("inputs"), case.tensors("outputs")
    draws = [
        given[f"mlm_{name}"].tolist()
        for name in ("draw_masked", "draw_replace", "draw_random", "random_words")
    ]
    cls_id, mask_id, pad_id = 2, 4, 0  # the special ids of these cases
    for row, ids in enumerate(given["text_ids"].tolist()):
        masked = mask_independently(
            ids, Draws(*(each[row] for each in draws)), mask_id=mask_id, never=(cls_id, pad_id)
        )
        assert masked.ids == wanted["mlm_input_ids"][row].tolist()
        labels = [number if place in masked.positions else -100 for place, number in enumerate(ids)]
        assert labels == wanted["mlm_labels"][row].tolist()


def test_independent_draws_have_their_shares():
    ids = [2, *range(10, 110), 3, 0]
    counts = {"masked": 0, "other": 0, "kept": 0}
    runs = 400
    for seed in range(runs):
        draws = draw_independently(
            len(ids), IndependentMasking(), vocabulary=10_000_000, rng=random.Random(seed)
        )
        masked = mask_independently(ids, draws, mask_id=1, never=(2, 0))
        assert masked.positions == sorted(set(masked.positions))
        assert 0 not in masked.positions and len(ids) - 1 not in masked.positions
        assert all(masked.ids[n] == ids[n] for n in range(len(ids)) if n not in masked.positions)
        for place in masked.positions:
            found = masked.ids[place]
            counts["masked" if found == 1 else "kept" if found == ids[place] else "other"] += 1
    total = sum(counts.values())
    assert total == pytest.approx(0.15 * 101 * runs, rel=0.05)
    assert [counts[name] / total for name in counts] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_the_draws_of_a_token_do_not_depend_on_those_before_it():
    rare, frequent = (
        draw_independently(30, IndependentMasking(probability=p), vocabulary=50, rng=random.Random(1))
        for p in (0.1, 0.9)
    )
    assert rare[1:] == frequent[1:] and sum(rare.chosen) < sum(frequent.chosen)
