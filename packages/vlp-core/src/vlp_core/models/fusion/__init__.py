"""What families with two encoders and a fusion encoder share: their base, the models of their tasks, and what
becomes of tensors from one stage of training to the next. A shared part, not a family."""
