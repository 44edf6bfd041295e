"""What a training starts from, of images with classes and of images without."""

from dataclasses import replace

import numpy as np
import torch

from darkroom.training.setup import set_up
from tests.unit.training.small import INFO, PARAMS, _data


def test_images_without_classes_train_a_network_without_labels_on_the_same_images_and_noise():
    labelled, unlabelled = _data(), replace(_data(), labels=np.zeros(20, dtype=np.int64))
    params = PARAMS.model_copy(update={"label_dropout": 0.0})
    network, batches = set_up(params, INFO.model_copy(update={"classes": []}), unlabelled, torch.device("cpu"))
    _, others = set_up(params, INFO, labelled, torch.device("cpu"))
    assert network.label_embedding is None
    batch, other = batches(100, 16), others(100, 16)
    assert batch.labels.tolist() == [0] * 16
    for name in ("x_t", "t", "target"):
        assert torch.equal(getattr(batch, name), getattr(other, name))
    assert torch.equal(network(batch.x_t, batch.t, batch.labels), network(batch.x_t, batch.t))
