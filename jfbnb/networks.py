"""The networks: DnCNN, and the denoiser D made of one. They know no operator.

Any module called as `network(x, sigma)` will do in the place of DnCNN: it predicts the noise in x,
given the noise level sigma. To be saved it keeps each argument of its constructor under the same
name; to be loaded its class must be among `NETWORKS`, or be given.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from jfbnb.common import UserError, atomic_path, atomic_write

Built = TypeVar("Built", bound=nn.Module)


class DnCNN(nn.Module):
    """The residual denoiser of Zhang et al. (2017): R(x; sigma) estimates the noise in x.

    `depth` 3 x 3 convolutions of `width` channels with ReLU between; the receptive field is
    2 depth + 1 pixels wide. The noise level sigma is told to it as one more input channel, as in
    FFDNet (Zhang et al. 2018). No batch normalisation: its running statistics would change at
    every application of T, and a map that changes has no fixed point.

    Shapes: (B, channels, H, W) and sigma, a scalar or (B, 1, 1, 1) -> (B, channels, H, W).
    The attribute `bf16` runs the convolutions in bfloat16; see `precision`.
    """

    smooth = False  # a ReLU has a kink

    def __init__(self, depth: int, width: int, channels: int = 3):
        super().__init__()
        self.depth, self.width, self.channels = depth, width, channels
        self.bf16 = False
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

    def extra_repr(self) -> str:
        return f"{self.depth} x {self.width}"

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        told = torch.cat([x, level.expand(len(x), 1, *x.shape[2:])], dim=1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            noise = self.layers(told.contiguous(memory_format=torch.channels_last))
        return noise.to(x.dtype).contiguous()


class UNet(nn.Module):
    """A residual denoiser that sees far: R(x; sigma) by a U-Net (Ronneberger et al. 2015).

    Of its `depth` levels, l = 0, 1, ..., each has 2^l times `width` channels at 2^-l of the
    resolution, and a residual block of two 3 x 3 convolutions on the way down and one on the way
    up, the last level two in a row, as in DRUNet (Zhang et al. 2021). Strided 2 x 2 convolutions
    lead down, transposed ones up, and what was on a level is added to what comes up to it. The
    noise level sigma is told to it as in `DnCNN`, and no layer normalises, for the reason given
    there.

    Shapes: (B, channels, H, W) and sigma, a scalar or (B, 1, 1, 1) -> (B, channels, H, W). Other
    sizes than multiples of the coarsest step, 2^(depth - 1) pixels, are extended to one by their
    border values, and cut again. The attribute `bf16` runs it in bfloat16; see `precision`.

    Raises:
        ValueError: where its last level would have more than `LARGEST` channels.
    """

    smooth = True

    def __init__(self, depth: int, width: int, channels: int = 3):
        super().__init__()
        self.depth, self.width, self.channels = depth, width, channels
        self.bf16 = False
        widths = [width * 2**level for level in range(depth)]
        if widths[-1] > LARGEST:
            raise ValueError(f"its depth is the number of its levels, and the last of {depth} has "
                             f"2^{depth - 1} times the width, {width}: over {LARGEST} channels")
        self.first = nn.Conv2d(channels + 1, width, kernel_size=3, padding=1)
        self.before = nn.ModuleList(ResidualBlock(fine) for fine in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, kernel_size=2, stride=2, bias=False)
                                  for fine, coarse in pairwise(widths))
        self.bottom = nn.Sequential(ResidualBlock(widths[-1]), ResidualBlock(widths[-1]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, kernel_size=2, stride=2,
                                                   bias=False) for fine, coarse in pairwise(widths))
        self.after = nn.ModuleList(ResidualBlock(fine) for fine in widths[:-1])
        self.last = nn.Conv2d(width, channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.last.weight)  # starts as the identity, like DnCNN
        nn.init.zeros_(self.last.bias)
        self.to(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        return f"{self.depth} x {self.width}"

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        height, width = x.shape[2:]
        step = 2 ** (self.depth - 1)
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        told = torch.cat([x, level.expand(len(x), 1, height, width)], dim=1)
        told = pad(told, (0, -width % step, 0, -height % step), mode="replicate")
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            z, skipped = self.first(told.contiguous(memory_format=torch.channels_last)), []
            for before, down in zip(self.before, self.down, strict=True):
                skipped.append(before(z))
                z = down(skipped[-1])
            z = self.bottom(z)
            for up, after in zip(reversed(self.up), reversed(self.after), strict=True):
                z = after(up(z) + skipped.pop())
            noise = self.last(z)
        return noise[..., :height, :width].to(x.dtype).contiguous()


class ResidualBlock(nn.Module):
    """z + C2 elu(C1 z), of two 3 x 3 convolutions; ELU has a continuous derivative, unlike ReLU."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
                                    nn.ELU(inplace=True),
                                    nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.layers(z)


NETWORKS: list[type[nn.Module]] = [DnCNN, UNet]  # the classes that a weights file may name


def make_network(name: str, depth: int, width: int) -> nn.Module:
    """One of `NETWORKS`, by the name of its class, untrained.

    Raises:
        UserError: for a name that is none of theirs, or a size that makes no network.
    """
    known = {kind.__name__: kind for kind in NETWORKS}
    if name not in known:
        raise UserError(f"unknown network {name!r}: choose from {', '.join(known)}")
    if min(depth, width) < 1:
        raise UserError(f"a network of depth {depth} and width {width}: both must be at least 1")
    try:
        return known[name](depth, width)
    except ValueError as error:
        raise UserError(f"{name} of depth {depth} and width {width}: {error}") from error


class Denoiser(nn.Module):
    """D(x) = x - R(x; sigma), with R a residual network that is told the noise level sigma.

    Shapes: (B, C, H, W) -> (B, C, H, W). sigma is fixed, on images in [0, 1].

    Raises:
        UserError: where the network's output has another shape than its input.
    """

    def __init__(self, network: nn.Module, sigma: float | Tensor):
        super().__init__()
        self.network = network
        level = torch.as_tensor(sigma, dtype=torch.get_default_dtype())
        self.register_buffer("sigma", level.clone())

    def residual(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        """R(x; sigma), the noise in x, for the denoiser's own sigma or another."""
        noise = self.network(x, self.sigma if sigma is None else sigma)
        if noise.shape != x.shape:
            raise UserError(f"{type(self.network).__name__} makes {tuple(noise.shape)} of images "
                            f"{tuple(x.shape)}: a denoiser keeps the shape")
        return noise

    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        return x - self.residual(x, sigma)


def matched_sigma(noise_std: float, tau: float) -> float:
    """The denoiser's noise level that goes with tau: noise_std / sqrt(tau).

    In half-quadratic splitting (Zhang et al. 2017) the data term weighs 1 / noise_std^2 and the
    denoiser's 1 / sigma^2; tau is the ratio of the two.
    """
    return noise_std / tau**0.5


# --- bfloat16 -----------------------------------------------------------------------------------


@contextmanager
def precision(module: nn.Module, bf16: bool) -> Iterator[Callable[[bool], None]]:
    """Within it the networks in a module that have an attribute `bf16` have that value of it.

    Yields what sets another value, until the block ends.
    """
    networks = [network for network in module.modules() if hasattr(network, "bf16")]
    before = [network.bf16 for network in networks]

    def put(value: bool) -> None:
        for network in networks:
            network.bf16 = value

    put(bf16)
    try:
        yield put
    finally:
        for network, was in zip(networks, before, strict=True):
            network.bf16 = was


def pick_bf16(choice: str, device: torch.device) -> bool:
    """Whether to train in bfloat16. "auto" says yes where the processor computes in it.

    Elsewhere it is emulated, and 10 to 20 times slower than float32.

    Raises:
        UserError: for another word than auto, always or never.
    """
    if choice not in ("auto", "always", "never"):
        raise UserError(f"bf16={choice!r}: choose auto, always or never")
    if choice != "auto":
        return choice == "always"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


# --- weights: safetensors beside a JSON model card ----------------------------------------------

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL"}
LARGEST = 4096  # of the numbers that a weights file gives a constructor
LATER = (".follow",)  # which tensors' names end so is not in files of an earlier release


def save_weights(path: str | Path, module: nn.Module, card: dict) -> None:
    """Write a module's weights to `path` (.safetensors) and its model card beside it (.json).

    The networks of the denoisers in it are described by their class and constructor arguments.

    Args:
        card: what the reader should know: protocol, training data, metrics, command, versions.

    Raises:
        UserError: where a network does not keep its constructor's arguments.
    """
    path = Path(path)
    networks = [describe(D.network) for D in module.modules() if isinstance(D, Denoiser)]
    tensors = {name: value.detach().cpu().contiguous()
               for name, value in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"networks": json.dumps(networks)})
    card = {"networks": networks, "weights": sum(v.numel() for v in tensors.values()),
            "numbers": {name: v.item() for name, v in tensors.items() if v.dim() == 0}, **card}
    atomic_write(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")


def describe(network: nn.Module) -> dict:
    """A network's class and constructor arguments, as they are stored. See `save_weights`."""
    kind = type(network)
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    missing = [name for name in names if not hasattr(network, name)]
    if missing:
        raise UserError(f"{kind.__name__} does not keep {', '.join(missing)} of its constructor: "
                        "set self.NAME = NAME for each, so that it can be saved and built again")
    found = {"class": _full_name(kind), "arguments": {name: getattr(network, name)
                                                      for name in names}}
    if not _is_description(found):
        raise UserError(f"{kind.__name__} cannot be stored: its constructor takes other than text, "
                        f"flags and numbers up to {LARGEST}: {found['arguments']}")
    return found


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def load_weights(path: str | Path, build: Callable[..., Built],
                 networks: Sequence[type[nn.Module]] = ()) -> Built:
    """The module that `save_weights` stored. Nothing that the file names is imported.

    Its own list of its tensors is looked at before any of them is read.

    Args:
        build: called with the file's networks, untrained, in order; returns the module.
        networks: classes that the file may name, besides `NETWORKS`.

    Raises:
        UserError: if there is no such file, if it is damaged or holds something else, or for a
            network of another class.
    """
    path = Path(path)

    def whole(descriptions: list[dict]) -> Built:
        try:
            return build(*(_untrained(d, [*networks, *NETWORKS]) for d in descriptions))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise UserError(f"the weights {path} are of something else ({error})") from error

    with _opened(path) as stored:
        descriptions = json.loads((stored.metadata() or {}).get("networks", "null"))
        if not (isinstance(descriptions, list) and all(map(_is_description, descriptions))):
            raise UserError(f"the weights {path} do not say of which networks they are: those of "
                            "an earlier release must be fetched again")
        with torch.device("meta"):  # hardly any memory, whatever size is claimed
            wanted = shapes(whole(descriptions))
        if _completed(tensor_list(stored), wanted) != wanted:
            raise UserError(f"the weights {path} do not fit the networks that they name: "
                            f"{descriptions}")
    module = whole(descriptions)
    fill(path, module)
    return module


def fill(path: Path, module: nn.Module) -> None:
    """Load a file's tensors into a module, in place.

    Raises:
        UserError: if they are not the module's own, or not all finite.
    """
    with _opened(path) as stored:
        if _completed(tensor_list(stored), shapes(module)) != shapes(module):
            raise UserError(f"the weights {path} are not those of {type(module).__name__}")
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UserError(f"the weights {path} are not all finite numbers: fetch them again")
    module.load_state_dict(_completed(tensors, module.state_dict()))


def _completed(found: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What a file has of a module, and where it is of an earlier release the module's own."""
    return {name: value for name, value in own.items() if name.endswith(LATER)} | found


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        raise UserError(f"no weights at {path}: train them first (notebooks 03 and 04, or "
                        "`jfbnb reproduce`), or give the folder that has them")
    try:
        with safe_open(path, "pt") as stored:
            yield stored
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"the weights {path} are damaged ({error}): fetch them again") from error


def tensor_list(stored: safe_open) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor in an open safetensors file; reads none of them."""
    slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
    return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


def shapes(module: nn.Module) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of a module, as `tensor_list` has them."""
    return {name: (DTYPES.get(v.dtype, str(v.dtype)), list(v.shape))
            for name, v in module.state_dict().items()}


def _is_description(found: object) -> bool:
    """True for what `describe` may have stored, with numbers of a bearable size."""
    return (isinstance(found, dict) and set(found) == {"class", "arguments"}
            and isinstance(found["class"], str) and isinstance(found["arguments"], dict)
            and all(isinstance(v, str | bool | None)
                    or (isinstance(v, int | float) and abs(v) <= LARGEST)
                    for v in found["arguments"].values()))


def _untrained(description: dict, known: list[type[nn.Module]]) -> nn.Module:
    kind = next((k for k in known if _full_name(k) == description["class"]), None)
    if kind is None:
        raise UserError(f"weights of a network of the class {description['class']}, which is none "
                        f"of {', '.join(map(_full_name, known))}: import it yourself and give it "
                        "by `networks`, or add it to jfbnb.networks.NETWORKS")
    return kind(**description["arguments"])


def load_denoiser(path: str | Path, networks: Sequence[type[nn.Module]] = ()) -> Denoiser:
    """Read a denoiser; arguments and errors as in `load_weights`."""
    return load_weights(path, lambda network: Denoiser(network, 0.0), networks)
