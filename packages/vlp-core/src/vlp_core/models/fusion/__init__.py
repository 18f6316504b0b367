"""What families with two encoders and a fusion encoder share: their base, the models of NLVR2, entailment,
answers and captions, what becomes of tensors from one stage to the next, official files. Not a family
itself."""
