"""The file that MLflow runs when it loads the model ("models from code"): the alternative is a pickle."""

from mlflow.models import set_model

from darkroom.serving.pyfunc import ImageGenerator

set_model(ImageGenerator())
