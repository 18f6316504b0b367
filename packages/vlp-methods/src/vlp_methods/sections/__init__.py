"""Sections of recipes that several methods have, as typed dataclasses. Nothing here imports torch or knows a
method.

    models.py      encoders, and where a model starts from
    data.py        where the data is, how it is read, streams of tasks
    teacher.py     a momentum teacher
    training.py    the keys that all trainings after pre-training have
    checks.py      rules across sections, called from a schema's `__post_init__`
"""
