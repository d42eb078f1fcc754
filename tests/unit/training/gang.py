"""What one of several workers does in a test: the steps that `test_learner` takes alone."""

import torch
import torch.distributed as dist

from polar_ray.training.export import gather_weights


def steps(rank: int, workers: int, folder: str, parallel: str):
    """(loss, norm) of each step over all workers, and the weights; half way, everything is put down and taken up."""
    from tests.unit.training.test_learner import CPU, FAST, make_learner, make_pairs, packs_of

    learner = make_learner(folder, workers=workers, parallel=parallel, **FAST)
    found = []
    for step in range(3):
        if step == 1:
            state = learner.state()
            learner = make_learner(folder, workers=workers, parallel=parallel, **FAST)
            learner.restore(state)
        sums, norm = learner.step(packs_of(make_pairs(8, seed=step), 2)[rank::workers], 8, 1.0)
        found.append((sums.over_all_workers(CPU).loss, norm))
    weights = gather_weights(learner.model, torch.float32)
    shared = [weights]
    dist.broadcast_object_list(shared)
    return found, shared[0]
