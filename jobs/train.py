"""Fine-tune on a cluster: `ray job submit -- python jobs/train.py PAIRS --output URL [options]`.

The same as `polar-ray train`; its options and settings apply unchanged.
"""

import sys

from polar_ray.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
