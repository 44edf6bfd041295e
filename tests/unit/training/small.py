"""A training that takes a second."""

import torch

from darkroom.data.dataset import DatasetInfo, Split
from darkroom.params import TrainParams
from darkroom.training.distributed import Ranks
from darkroom.training.loop import Saving, _Work, train
from darkroom.training.setup import set_up

FINGERPRINT = "f" * 64
EVERY_STEP = Saving(every_seconds=0.0, cost=1e9)  # whatever it costs
INFO = DatasetInfo(
    name="small",
    image_size=8,
    channels=1,
    classes=[str(digit) for digit in range(10)],
    splits={"train": 20},
    digest="d" * 64,
)
PARAMS = TrainParams.model_validate(
    {
        "model": {
            "channels": [8, 16],
            "num_res_blocks": 1,
            "attention_resolutions": [4],
            "head_channels": 8,
            "norm_groups": 4,
            "dropout": 0.0,
            "time_conditioning": "additive",
        },
        "schedule": {"name": "cosine", "num_timesteps": 100},
        "prediction": "eps",
        "loss_weighting": "simple",
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "lr_decay": "cosine",
        "weight_decay": 0.0,
        "gradient_clip": 1.0,
        "label_dropout": 0.1,
        "horizontal_flip": False,
        "ema_decay": 0.9,
        "ema_snapshots": 0,
        "precision": "fp32",
        "seed": 0,
    }
)


def small_work(**changes):
    """What steps of a training on 20 random images consist of, and its network."""
    params = PARAMS.model_copy(update=changes)
    network, batches = set_up(params, INFO, _data(), torch.device("cpu"))
    return _Work.divide(batches, params, Ranks(), None), network


def _data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(images.numpy(), (torch.arange(20) % 10).numpy())


def small_training(
    directory,
    *,
    on_tick=lambda tick: None,
    on_resume=lambda step: None,
    on_step=lambda step: None,
    dropout=0.0,
    saving=None,
    device="cpu",
    ranks=None,
    micro_batch=None,
    **changes,
):
    """Train on 20 random images; without `saving` there is a checkpoint at the end only."""
    directory.mkdir(parents=True, exist_ok=True)
    params = PARAMS.model_copy(update=changes)
    params = params.model_copy(update={"model": params.model.model_copy(update={"dropout": dropout})})
    network, batches = set_up(params, INFO, _data(), torch.device(device))
    return train(
        network,
        batches,
        params,
        directory,
        FINGERPRINT,
        on_tick=on_tick,
        on_resume=on_resume,
        on_step=on_step,
        ranks=ranks,
        micro_batch=micro_batch,
        saving=saving or Saving(every_seconds=1e9),
    )
