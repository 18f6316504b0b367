"""The one training loop, and what surrounds it: recipes, ranks, checkpoints, run folder, reports. No method
is known here.

Read `loop.py` first; `job.py` says what a method hands over; `entry.py` and `options.py` hold what a method
declares and import no torch.
"""
