import pytest
import torch

from darkroom.errors import StageFailed
from darkroom.stages.train import _memory_explained

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize(
    ("images", "advice"),
    [(128, "DARKROOM_MICRO_BATCH=64 takes less and trains the same"), (1, "it needs a larger one")],
)
def test_too_little_memory_is_one_line_with_advice(error, images, advice):
    with pytest.raises(StageFailed) as failed, _memory_explained(CPU, images):
        raise error
    assert str(failed.value) == f"out of memory on cpu with {images} images at once; {advice}; checkpoints are kept"


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes do not match"), _memory_explained(CPU, 8):
        raise RuntimeError("shapes do not match")
