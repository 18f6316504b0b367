"""From sections of recipes to objects, for several methods. Nothing here knows a method.

data.py        paths in full, tokenizer, loaders, the images of a batch
model.py       a model from its section, and where it starts from
optimizer.py   optimizer and learning rate
teacher.py     a momentum teacher and the base of tasks that have one
tasks.py       objectives of tasks that several methods have
evaluation.py  a benchmark while training, and of the selected model at the end
export.py      the folder that a model is exported to
assembly.py    all of these together: what the builder of a task calls
"""
