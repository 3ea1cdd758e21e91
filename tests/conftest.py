import pytest
import torch
from hypothesis import settings


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


settings.register_profile("same", derandomize=True)  # a run tells what a change did, and nothing else
settings.load_profile("same")
settings.register_profile("slow", max_examples=10_000, derandomize=False)  # pytest --hypothesis-profile slow: to find what is new
