"""The packaged model in a server's threads."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from darkroom.files import write_json
from darkroom.nets import inference
from darkroom.nets.inference import InferenceUNet
from darkroom.serving.pyfunc import ImageGenerator
from tests.unit.diffusion.test_model import SETTINGS, write_model


class Graph:
    """A stand-in for a CUDA graph: replayed, it reads and writes the tensors it was captured with."""

    def __init__(self, function, x, conditions):
        self._function, self._x, self._conditions = function, x, conditions
        self.out = function(x, conditions)

    def replay(self):
        time.sleep(0.001)  # a GPU works while other threads run
        self.out.copy_(self._function(self._x, self._conditions))


class Graphs(inference._Graphs):
    """Graphs of which only the capture is another."""

    def __init__(self, function):
        self._function, self._captured = function, {}

    def _capture(self, x, conditions):
        graph = Graph(self._function, x, conditions)
        return graph, x, conditions, graph.out


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageGenerator:
    monkeypatch.setenv("DARKROOM_DEVICE", "cpu")
    write_model(tmp_path, prediction="eps")
    write_json(tmp_path / "draw.json", SETTINGS.model_dump())
    generator = ImageGenerator()
    generator.load_context(SimpleNamespace(artifacts={"model": str(tmp_path)}))
    prepared = InferenceUNet(generator.model.network)
    prepared._denoise, prepared._few_sizes = Graphs(prepared._denoise), True
    generator.model._prepared["fp32"] = prepared
    return generator


def test_requests_at_once_get_their_own_pictures(served: ImageGenerator) -> None:
    def draw(request: int) -> list[str]:
        rows = pd.DataFrame({"class_label": [request % 10] * 3})
        params = {"guidance_scale": 2.0, "sampler": "dpmpp_2m", "steps": 5, "seed": request}
        return list(served.predict(None, rows, params)["png"])

    alone = [draw(request) for request in range(12)]
    assert len({picture for pictures in alone for picture in pictures}) == 36
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(draw, range(12)))
    wrong = sum(one != other for one, other in zip(together, alone, strict=True))
    assert wrong == 0, f"{wrong} of 12 answers are mixed"


def test_a_request_that_fails_leaves_the_model_to_the_next(
    served: ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, params = pd.DataFrame({"class_label": [1]}), {"guidance_scale": 1.0, "sampler": "ddim", "steps": 1, "seed": 0}
    with monkeypatch.context() as patch:
        patch.setattr(served.model, "draw", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            served.predict(None, rows, params)
    assert len(served.predict(None, rows, params)) == 1
