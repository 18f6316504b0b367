"""A ViCHA pre-training step of vlp against the plain formulation (`plain_vicha.py`): same weights, same
samples, CPU.

    python benchmarks/vicha_step.py [--size quarter] [--repeats 5] [--cpu-time] [--save]

First checks that both give the same losses and gradients in fp32 for the same negatives and the same removed
patches, then measures whole steps (teacher, forward, backward, AdamW) in turns, and the peak of what tensors
hold in one, in a process of its own for each. The plain step is fp32 without autocast, as the reference
trains; vlp runs in fp32 and as `precision: bf16` does, which needs a CPU with bf16 units to be fast. Exits
with 1 when vlp in fp32 is less than 1.5 times as fast or takes more than 0.7 of the memory; bf16 is shown,
not judged.
"""


