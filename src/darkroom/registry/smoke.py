"""Load a registered model and draw; run as a file in a clean process, with the model's URI as its argument.

It imports nothing of the project: that the model brings all of its code is part of what is tested. The last line that
it prints is JSON: the digests that the package states and that of the weights that were loaded, where their code lies,
how many of two images differ, and the seconds that one image alone takes.
"""

import base64
import io
import json
import statistics
import sys
import time

_SLOW_SECONDS = 10.0  # an image that takes this long is drawn once: its start-up no longer matters


def smoke(uri: str) -> dict[str, object]:
    """What came out of the model at `uri`. A network that returns values that are not finite raises."""
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model(uri)
    schema = model.metadata.get_input_schema()  # None for images without classes: a row each
    columns = [] if schema is None else schema.required_input_names()

    def draw(num_images: int, params: dict[str, int] | None = None) -> list[str]:
        rows = pd.DataFrame({name: [0] * num_images for name in columns}, index=range(num_images))
        images = list(model.predict(rows, params=params)["png"])
        for image in images:
            _check_png(image)
        return images

    def timed() -> float:
        start = time.perf_counter()
        draw(1)
        return time.perf_counter() - start

    seconds = timed()
    if seconds < _SLOW_SECONDS:
        seconds = statistics.median(timed() for _ in range(3))
    return {
        "metadata": {key: (model.metadata.metadata or {}).get(key) for key in ("weights_digest", "protocol_digest")},
        "weights_digest": model.unwrap_python_model().weights_digest,
        "code": sys.modules["darkroom"].__file__,
        "distinct": len(set(draw(2, {"seed": 1}))),
        "seconds_per_image": seconds,
    }


def _check_png(text: str) -> None:
    from PIL import Image

    Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]).load()


if __name__ == "__main__":
    print(json.dumps(smoke(sys.argv[1])))
