"""The networks: DnCNN, and the learned regulariser S built from it. They know no operator."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jfbnb.common import UserError, atomic_path, atomic_write


class DnCNN(nn.Module):
    """The residual denoiser of Zhang et al. (2017): R(x; sigma) estimates the noise in x.

    `depth` 3 x 3 convolutions of `width` channels with ReLU between; the receptive field is
    2 depth + 1 pixels wide. The noise level sigma is told to it as one more input channel, as in
    FFDNet (Zhang et al. 2018). No batch normalisation: its running statistics would change at
    every application of T, and a map that changes has no fixed point.

    Shapes: (B, channels, H, W) and sigma, a scalar or (B, 1, 1, 1) -> (B, channels, H, W).
    `bf16` runs the convolutions in bfloat16: faster where the hardware has it, but its rounding
    limits how well a fixed point is known.
    """

    def __init__(self, depth: int, width: int, channels: int = 3, bf16: bool = False):
        super().__init__()
        self.depth, self.width, self.channels, self.bf16 = depth, width, channels, bf16
        sizes = [channels + 1] + [width] * (depth - 1) + [channels]
        layers = []
        for c_in, c_out in pairwise(sizes):
            layers += [nn.Conv2d(c_in, c_out, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers[:-1])  # no ReLU at the end: noise has both signs
        for layer in self.layers[:-1]:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(self.layers[-1].weight)  # starts as R = 0, the identity as denoiser
        nn.init.zeros_(self.layers[-1].bias)
        self.to(memory_format=torch.channels_last)  # the faster layout, on CPUs and GPUs

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        told = torch.cat([x, level.expand(len(x), 1, *x.shape[2:])], dim=1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            noise = self.layers(told.contiguous(memory_format=torch.channels_last))
        return noise.to(x.dtype).contiguous()


class Regulariser(nn.Module):
    """S_Theta of Eq. 4, the network in the place of lambda grad R; it holds all of Theta.

    `S(x) = tau (x - D(x)) = tau R(x; sigma)` with R a residual network and D(x) = x - R(x; sigma)
    its denoiser. tau > 0 weighs the denoiser against the data; it is learned, as its logarithm.
    sigma, the noise level that the denoiser is told, is fixed.

    `head`, another residual network, makes the paper's prediction equation a network too. It acts
    on the solution alone, so the iteration and its contraction know nothing of it.
    """

    def __init__(self, network: nn.Module, tau: float, sigma: float,
                 head: nn.Module | None = None):
        super().__init__()
        self.network = network
        self.head = head
        self.log_tau = nn.Parameter(torch.tensor(float(tau)).log())
        self.register_buffer("sigma", torch.tensor(float(sigma)))

    @property
    def tau(self) -> Tensor:
        return self.log_tau.exp()

    def denoise(self, x: Tensor) -> Tensor:
        """D(x) = x - R(x; sigma)."""
        return x - self.network(x, self.sigma)

    def predict(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """H(x) = x - head(x; sigma), with sigma the noise level that it is told."""
        return x - self.head(x, sigma)

    def forward(self, x: Tensor) -> Tensor:
        return self.tau * self.network(x, self.sigma)


@contextmanager
def precision(S: Regulariser, bf16: bool) -> Iterator[None]:
    """Within it the DnCNNs of S run their convolutions in bfloat16, or do not."""
    networks = [network for network in S.modules() if isinstance(network, DnCNN)]
    before = [network.bf16 for network in networks]
    for network in networks:
        network.bf16 = bf16
    try:
        yield
    finally:
        for network, was in zip(networks, before, strict=True):
            network.bf16 = was


def matched_sigma(noise_std: float, tau: float) -> float:
    """The denoiser's noise level that goes with tau: noise_std / sqrt(tau).

    In half-quadratic splitting (Zhang et al. 2017) the data term weighs 1 / noise_std^2 and the
    denoiser's 1 / sigma^2; tau is the ratio of the two.
    """
    return noise_std / tau**0.5


# --- weights: safetensors beside a JSON model card ----------------------------------------------


def save_regulariser(path: str | Path, S: Regulariser, card: dict) -> None:
    """Write S to `path` (.safetensors) and its model card beside it (.json).

    Args:
        card: what the reader should know: protocol, training data, metrics, command, versions.
    """
    path = Path(path)
    architecture = {"depth": S.network.depth, "width": S.network.width,
                    "channels": S.network.channels, "head": S.head is not None}
    tensors = {name: value.detach().cpu().contiguous() for name, value in S.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"architecture": json.dumps(architecture)})
    n_weights = sum(value.numel() for value in tensors.values())
    card = {"architecture": architecture, "weights": n_weights, "tau": S.tau.item(),
            "sigma": S.sigma.item(), **card}
    atomic_write(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")


def load_regulariser(path: str | Path) -> Regulariser:
    """Read what `save_regulariser` wrote. Loading runs no code of the file's.

    Its own list of its tensors is looked at before any of them is read.

    Raises:
        UserError: if there is no such file, or it is truncated, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: train them first (notebooks 03 and 04, or "
                        "`jfbnb reproduce`), or give the folder that has them")
    try:
        with safe_open(path, "pt") as stored:
            architecture = json.loads((stored.metadata() or {}).get("architecture", "null"))
            if not _is_architecture(architecture):
                raise UserError(f"the weights {path} are of another architecture than a DnCNN "
                                "regulariser")
            # Hardly more memory than the file is long, whatever depth and width it claims.
            if 36 * architecture["width"]**2 * (architecture["depth"] - 2) > path.stat().st_size:
                raise UserError(f"the weights {path} are too few for their own architecture "
                                f"{architecture}")
            S = _untrained(**architecture)
            wanted = {k: ("F32", list(v.shape)) for k, v in S.state_dict().items()}
            if tensor_list(stored) != wanted:
                raise UserError(f"the weights {path} do not fit their own architecture "
                                f"{architecture}")
            tensors = {name: stored.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"the weights {path} are damaged ({error}): fetch them again") from error
    S.load_state_dict(tensors)
    if not all(value.isfinite().all() for value in (*tensors.values(), S.tau)):
        raise UserError(f"the weights {path} are not all finite numbers: fetch them again")
    return S


def tensor_list(stored: safe_open) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor in an open safetensors file; reads none of them."""
    slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
    return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


def _is_architecture(found: object) -> bool:
    """True for what `save_regulariser` may have stored; images have three channels."""
    return (isinstance(found, dict) and set(found) == {"depth", "width", "channels", "head"}
            and all(type(found[name]) is int for name in ("depth", "width", "channels"))
            and 2 <= found["depth"] <= 64 and 1 <= found["width"] <= 1024
            and found["channels"] == 3 and type(found["head"]) is bool)


def _untrained(depth: int, width: int, channels: int, head: bool) -> Regulariser:
    return Regulariser(DnCNN(depth, width, channels), tau=1.0, sigma=0.0,
                       head=DnCNN(depth, width, channels) if head else None)
