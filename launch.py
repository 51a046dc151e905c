"""What has to happen before torch is loaded: import this first.

    import launch  # then # isort: split

torch's threads on a CPU wait for each other at the end of each operation, and libgomp lets them spin meanwhile. Beside
another busy program a spinning thread takes the core away from the one that it waits for, and a run nearly stops. A
short spin costs an idle machine little (results/README.md). libgomp reads its settings when it is loaded.
"""

import os

SPINS = "1000"  # times around the loop, some microseconds

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # the user's own word stands
    os.environ["GOMP_SPINCOUNT"] = SPINS
