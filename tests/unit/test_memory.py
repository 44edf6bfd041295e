import pytest
import torch

from darkroom.device import memory_explained
from darkroom.errors import StageFailed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize(
    ("images", "advice"),
    [(128, "DARKROOM_MICRO_BATCH=64 takes less and trains the same"), (1, "it needs a larger one")],
)
def test_too_little_memory_is_one_line_with_advice(error, images, advice):
    with pytest.raises(StageFailed) as failed, memory_explained(CPU, images):
        raise error
    assert str(failed.value) == f"out of memory on cpu with {images} images at once; {advice}; checkpoints are kept"


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes do not match"), memory_explained(CPU, 8):
        raise RuntimeError("shapes do not match")
