"""vlp-data: data of vision-language training, from files to batches.

- `vlp_data.shapes`: drawn scenes with every annotation, made from a seed
- `vlp_data.schema`, `vlp_data.sources`: one sample schema, and readers of the formats users have on disk
- `vlp_data.images`, `.transforms`, `.text`, `.masking`, `.regions`: decoding, views of images, tokenising,
    masking, region sampling
- `vlp_data.order`, `.batch`, `.loader`: order that can be resumed, batches, loading with worker processes

Nothing is imported here: take each part from its own module.
"""

__version__ = "0.1.0"
