"""Load a registered model and draw two images; run as a file in a clean process, with the model's URI as its argument.

It imports nothing of the project: that the model brings all of its code is part of what is tested. The last line that
it prints is JSON: the digest of the weights that were loaded, where their code lies, and the size of the images.
"""

import base64
import io
import json
import sys


def smoke(uri: str) -> dict[str, object]:
    """What came out of the model at `uri`."""
    import mlflow
    import pandas as pd
    from PIL import Image

    model = mlflow.pyfunc.load_model(uri)
    schema = model.metadata.get_input_schema()  # None for images without classes: a row each
    columns = [] if schema is None else schema.input_names()
    rows = pd.DataFrame({name: [0, 0] for name in columns}, index=range(2))
    images = model.predict(rows, params={"seed": 1})["png"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(image, validate=True))).size for image in images]
    return {
        "weights_digest": model.unwrap_python_model().weights_digest,
        "code": sys.modules["darkroom"].__file__,
        "sizes": sizes,
        "distinct": len(set(images)),
    }


if __name__ == "__main__":
    print(json.dumps(smoke(sys.argv[1])))
