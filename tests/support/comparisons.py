"""Rows of pairs and of triples with labels, and settings to evaluate them with."""

from polar_ray.config import EvaluateConfig


def fake(**changes):
    """Settings for the fake engine, whose rewards depend on every token."""
    return EvaluateConfig.model_validate({"engine": {"kind": "fake", "device": "cpu"}, "resamples": 200, **changes})


def pair(number=0, **changes):
    """A pair whose texts differ from those of other numbers."""
    return {
        "prompt": f"prompt {number}",
        "reference": f"reference {number}",
        "chosen": f"chosen {number}",
        "rejected": f"rejected {number}",
        **changes,
    }


def triple(number, output, label, **changes):
    """A labelled output to the prompt of that number."""
    return {"prompt": f"prompt {number}", "reference": f"ref {number}", "output": output, "label": label, **changes}
