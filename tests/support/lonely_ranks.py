"""An engine of two ranks that is started by a thread which ends: `python -m tests.support.lonely_ranks`.

Says a reward, and waits to be killed.
"""

import sys
import threading
import time

import numpy as np

from polar_ray.config import EngineConfig
from polar_ray.engines.ranks import RanksEngine
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch

if __name__ == "__main__":
    engines = []
    config = EngineConfig(device="cpu", dtype="float32", tensor_parallel_size=2, threads=2)
    thread = threading.Thread(target=lambda: engines.append(RanksEngine.start(EMBEDDED_FOLDER, config)))
    thread.start()
    thread.join()
    ids = np.arange(9, dtype=np.int32)
    sys.stdout.write(f"{engines[0].score(Batch.unshared([ids]))}\n")
    sys.stdout.flush()
    time.sleep(600)
