"""Sections of recipes that several methods have, as typed dataclasses. Nothing here imports torch or knows a
method.

    models.py      encoders, and where a model starts from
    data.py        where the data is, and how it is read
    captions.py, questions.py, statements.py, expressions.py
                   streams and data of tasks, a module for each kind, so that a recipe loads what it needs
    teacher.py     a momentum teacher
    training.py    the keys that all trainings after pre-training have
    checks.py      rules across sections, called from a schema's `__post_init__`
"""
