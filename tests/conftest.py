"""One CPU thread a process: the tests' shapes are tiny, and two test processes then share two cores without waiting
for one another (`python -m pytest -n 2 --dist loadfile`). It must be set before torch loads."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
