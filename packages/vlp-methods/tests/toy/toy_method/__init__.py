"""A method small enough to train in a test: two streams, dropout, a momentum copy and a queue."""

from vlp_methods.engine.entry import TaskEntry

tasks = {"fit": TaskEntry(schema="toy_method.schema:Fit", build="toy_method.build:build")}
