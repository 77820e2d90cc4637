"""Scores, intervals, records, claims and reports.

encoders: what turns pictures and texts into unit vectors (always passed in).   metrics: what is computed from vectors.
bootstrap: means with intervals over subjects.   records: JSON lines that say how a number was made.
benchmark: a method on many subjects and prompts.   separation: is a score good enough to be used?
study: all methods that learn an object, scored the same way.   baselines: the two that most papers compare with.
class_samples: what a method does to the class of its subject.
reproduction: the frame of reproduce.py.   claims: results.json and the card's table.
figures, report: what people look at.
"""
