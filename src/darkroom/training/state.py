"""Everything that the next step of a training depends on, and the update that moves it one step on."""

import torch
from torch import Tensor, nn

from darkroom.params import TrainParams
from darkroom.training.ema import EMA, PowerEMA

IN_BF16 = "in_bf16"  # the tensor () that says in which arithmetic the training computes


class TrainingState:
    """Weights, averages, optimizer and counters of `network`, on its device. Nothing here waits for a GPU."""

    def __init__(self, network: nn.Module, params: TrainParams) -> None:
        self.network = network
        self.ema = EMA(network, params.ema_decay)
        self.power = PowerEMA(network) if params.ema_snapshots else None
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
        )
        device = next(network.parameters()).device
        for parameter in network.parameters():  # what AdamW would do in its first step; so it can be loaded before
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self.sums = torch.zeros(3, device=device)  # since the last tick: loss, gradient norm, number of skipped updates
        self.skipped_in_a_row = torch.zeros((), device=device)
        self._in_bf16 = torch.tensor(float(params.precision == "bf16"), device=device)
        self._skipped = torch.tensor([0.0, 0.0, 1.0], device=device)  # what such an update adds to the sums

    def update(self, step: int, rate: float, loss: Tensor, gradient_clip: float) -> None:
        """Apply the gradients as optimizer step `step` (from 1) at learning rate `rate`.

        If the loss or a gradient is not finite, weights and optimizer stay as they are, which is counted. Otherwise
        AdamW moves no weight by more than a few learning rates, whatever the gradient: weights, and so their averages,
        are finite for ever.
        """
        grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip)
        bad = ~(loss + grad_norm).isfinite()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # What GradScaler sets: the fused kernel leaves everything as it is where this is 1.
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.ema.update(self.network, step)
        if self.power:
            self.power.update(self.network, step)
        self.sums += torch.where(bad, self._skipped, torch.stack((loss, grad_norm, torch.zeros_like(loss))))
        self.skipped_in_a_row += 1
        self.skipped_in_a_row *= bad

    def tensors(self) -> dict[str, Tensor]:
        """The state itself, flat and named, not copied."""
        tensors = {f"raw.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.network.state_dict().items()}
        if self.power:
            tensors |= self.power.tensors()
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        counters = {"sums": self.sums, "skipped_in_a_row": self.skipped_in_a_row}
        return tensors | counters | {IN_BF16: self._in_bf16}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the values of what `tensors` returned."""
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])
