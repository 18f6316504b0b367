"""Visual concepts: words of captions that a CLIP finds in an image. The model reads them beside the image.

- `grammar`, `extract`: concepts of captions, their counts, and the vocabulary made of them
- `encoders`, `embed`: any CLIP of open_clip or transformers; concepts, captions and images to vectors
- `select`: the k concepts nearest to every image, and lists that carry them
- `filtering`: keeping the captions that fit their images best
- `build`: caption lists from the raw layouts of COCO, Flickr30k, Visual Genome, SBU and CC3M
- `tables`: columnar files, and the JSON of the ViCHA repository
- `jobs`: work in shards that goes on after an interruption, on one machine or with Ray

Source: ViCHA, arXiv 2208.13628, section 3.2; specification 5. Nothing is imported here.
"""
