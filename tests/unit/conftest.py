"""Small tensors on one thread, as starting threads takes longer than the work; the same examples in every run."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("unit", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("unit")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
