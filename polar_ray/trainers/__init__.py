"""One file per trainer: what runs in the trainer's own process and asks a running endpoint.

Every adapter takes its endpoint from its arguments or from POLAR_RAY_ADDRESS and POLAR_RAY_TOKEN, scores what follows a
think block, and raises a typed error where there is no reward: never None, never 0. A policy may end at once and answer
with nothing: serve with `limits.on_empty = "score"`, or such a row stops the run with `triple_empty`. A prompt or a
reference that is empty stops it in any case.
"""
