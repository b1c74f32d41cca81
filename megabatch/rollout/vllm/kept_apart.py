"""What vLLM changes in the process that it runs in, put back as the trainer had it.

Starting an engine seeds every generator and sets the precision of float32 products, and on CPUs replaces
`torch.set_num_threads` by a function that does nothing; generating may draw from the default generator even for
requests with seeds of their own. A run resumes bit for bit only if none of it reaches the trainer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_apart() -> Iterator[None]:
    """Restores generators, threads, the default dtype and the precision of products, whatever happens inside."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    set_num_threads, threads, dtype = torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
