"""For all tests. One CPU thread a process: their shapes are tiny, and two test processes then share two cores without
waiting for one another (`python -m pytest -n 2 --dist loadfile`); set before torch loads. And pytest-xdist's processes
ignore Ctrl-C, which some tests press: back to Python's own way."""
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
