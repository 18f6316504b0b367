"""Region sampling against the reference's recorded draws, boxes, masks and pictures."""

import random

import pytest
import torch
from vlp_data.images import open_image
from vlp_data.options import MaskingOptions, RegionLines, RegionOptions, TextOptions
from vlp_data.regions import collate_regions, sample_regions
from vlp_data.sources.lines import parse_regions
from vlp_data.text import Tokenizer


def vocab_file(case):
    return next(p / "vocab.txt" for p in (case.path, *case.path.parents) if (p / "vocab.txt").is_file())


def set_up(case, run):
    config = case.json("region_dataset")["config"]
    regions = config["regions"]
    arguments = {
        "size": config["image_res"],
        "text": TextOptions(max_words=config["max_words"], max_tokens=config["max_tokens"]),
        "masking": MaskingOptions(
            probability=config["mask_prob"],
            max_masks=config["max_masks"],
            skipgram_probability=config["skipgram_prb"],
            skipgram_size=config["skipgram_size"],
            whole_words=config["mask_whole_word"],
        ),
        "regions": RegionOptions(
            max_regions=regions["max_regions"],
            min_visible=regions["min_perc_in_image"],
            careful_flip="substring" if run["careful_hflip"] else "off",
        ),
    }
    options = RegionLines(files=(), image_key=regions["image_key"])
    lines = (case.path / "regions.jsonl").read_text().splitlines()
    samples = [parse_regions(line, "regions.jsonl", n, options) for n, line in enumerate(lines)]
    collation = {k: arguments[k] for k in ("size", "text", "masking")}
    collation |= {"batch_texts": regions["batch_size"], "patch_size": config["patch_size"]}
    return samples, Tokenizer.wordpiece(vocab_file(case)), arguments, collation


def is_case(case):
    return case.has("region_dataset.json", "regions.jsonl")


@pytest.mark.golden("xvlm", is_case)
def test_region_dataset(case):
    images = case.tensors("images") if case.has("images.safetensors") else {}
    compared = set()
    for run in case.json("region_dataset")["runs"]:
        samples, tokenizer, arguments, collation = set_up(case, run)
        rng = random.Random(run["seed"])
        examples = []
        for sample in samples:
            picture = open_image(sample.images[0])
            examples.append(sample_regions(sample, picture, tokenizer, rng, augment=False, **arguments))
        single = {**collation, "batch_texts": 1}
        for example, want in zip([examples[s["line"]] for s in run["samples"]], run["samples"], strict=True):
            assert list(example.crop) == want["crop_xyxy"]
            assert example.flipped == want["hflip"]
            assert len(example.pairs) == want["n_text"]
            for row, pair in enumerate(example.pairs):
                one = collate_regions(
                    [example._replace(pairs=(pair,))], tokenizer, random.Random(0), **single
                )
                assert one.text_ids[0].tolist() == want["text_ids"][row]
                assert one.attention_mask[0].tolist() == want["text_atts"][row]
                assert one.masked_ids[0].tolist() == want["text_ids_masked"][row]
                assert one.masked_positions[0].tolist() == want["masked_pos"][row]
                assert one.masked_labels[0].tolist() == want["masked_ids"][row]
                assert one.image_attention_mask[0].tolist() == want["image_atts"][row]
                assert one.is_image[0].item() == want["is_image"][row]
                torch.testing.assert_close(one.target_boxes[0], torch.tensor(want["target_bbox"][row]))
            name = f"seed{run['seed']}_line{want['line']}_image"
            if name in images and not run["careful_hflip"]:
                torch.testing.assert_close(example.image, images[name], rtol=1e-4, atol=1e-5)
                compared.add(name)
        batch, want = collate_regions(examples, tokenizer, rng, **collation), run["batch"]
        assert batch.image_index.tolist() == want["idx_to_group_img"]
        assert batch.text_ids.tolist() == want["text_ids"]
        assert batch.is_image.tolist() == want["is_image"]
        torch.testing.assert_close(batch.target_boxes, torch.tensor(want["target_bbox"]))
        assert len(batch.image) == want["n_images"]
    assert compared == set(images)
