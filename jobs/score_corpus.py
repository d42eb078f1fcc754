"""Score a corpus on a cluster: `ray job submit -- python jobs/score_corpus.py INPUT --output URL [options]`.

The same as `polar-ray score`; its options and settings apply unchanged.
"""

import sys

from polar_ray.cli.main import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
