"""The recorded cases of the reference's ARC code, and the puzzles they are about."""

import hashlib

import shared_data

from seal_jax.tasks.arc import edits, tasks

SETS = {
    "training_1B": ("training", "_filtered_1B_training_set"),
    "evaluation_1B": ("evaluation", "_filtered_1B_eval_set"),
    "training": ("training", ""),
    "evaluation": ("evaluation", ""),
}


def golden(name):
    return shared_data.read(f"arc_goldens/{name}")


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def puzzle_set(name):
    kind, rest = SETS[name]
    files = (f"arc_inputs/arc-agi_{kind}_{part}{rest}.json" for part in ("challenges", "solutions"))
    return tasks.load(*map(shared_data.path, files))


def edit_of(flags):
    return edits.make(**{key.split("_")[1]: value for key, value in flags.items()})


def key_of(row, start):
    return row[next(key for key in row if key.startswith(start))]
