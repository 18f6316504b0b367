"""vlp-data: data of vision-language training, from files to batches.

- `vlp_data.shapes`: drawn scenes with every annotation, made from a seed
- `vlp_data.schema`, `vlp_data.sources`: one sample schema, and readers of the formats users have on disk
- `vlp_data.options`: the options of all of this, as recipes have them
- `vlp_data.images`, `.views`, `.objects`, `.regions`: decoding, what a model sees of an image, boxes and
    masks that follow, region sampling
- `vlp_data.tokenizer`, `.text`, `.masking`, `.concept_text`: from texts to ids
- `vlp_data.examples`: from rows to what batches are made of
- `vlp_data.order`, `.batch`, `.loader`: order that can be resumed, batches, loading with worker processes

Nothing is imported here: take each part from its own module.
"""

__version__ = "0.1.0"
