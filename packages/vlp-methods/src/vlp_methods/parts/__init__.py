"""What recipes and builders of different methods have in common, so that a task's file holds only what is its
own.

    options.py     sections of recipes: encoders, vocabulary, the shapes world, streams. Imports no torch
    sections.py    data sections of whole tasks. Imports no torch
    teacher.py     how a recipe speaks of a momentum teacher. Imports no torch
    checks.py      rules across sections, called from a schema's `__post_init__`. Imports no torch
    data.py        from those sections to paths in full, a tokenizer, loaders
    assembly.py    arguments of a model, optimizer, learning rate, export folder
    start.py       published weights of encoders into a model
    finetune.py    what the tasks after pre-training have in common
    momentum.py    the teacher of a task, and when it moves
    objectives.py  objectives of tasks
    evaluation.py  a benchmark on the validation data while training, on the test data at the end

Nothing here knows a method's name. A method's task imports what it needs; nothing is inherited but sections
of recipes.
"""
