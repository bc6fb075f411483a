"""The network published with the paper, run as its code runs it, and further.

python benchmarks/authors.py --weights trained_model.pth

It needs one file of that repository (github.com/lliu58b/Jacobian-free-Backprop-Implicit-Networks,
two letters l, at commit d8e6ada): results/degrad_fixlr_old/trained_model.pth. The file is read
without executing what a pickle may hold. authors.csv has a row for each image and iteration that
is measured. A stopped run continues.

The map is x - eta (A'(A x - d) + S(x)) on images in [-1, 1], S a DnCNN of 17 layers with spectral
and batch normalisation. The latter takes the statistics of the batch at hand, as in training: the
loss that the authors stored is of that. So an image's result depends on the 15 others of its batch.
Batches have 16 images, as in the script at that commit; the training had 64.
"""

import pickle
from pathlib import Path

import pandas as pd
import torch
from command import Bench, Rows, options, run
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, relu

from jfbnb.common import UserError
from jfbnb.core.metrics import psnr, ssim
from jfbnb.core.operators import LinearOperator
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import load_splits
from jfbnb.teaching.figures import new_figure, save_figure, save_table
from jfbnb.teaching.tables import on_published_scale
from jfbnb.training.methods import METHODS

SETUP = get_protocol("code")
BATCH = 16  # as in their script
CAP, FURTHER, EVERY = 150, 300, 10  # iterations: their cap, how far to go, how often to measure
LAYERS = 17
ETA = 1e-3  # as the readme beside the file says; the file has none


class AuthorsMap:
    """Their T(x; d), with the weights of their file.

    Raises:
        UserError: if the file is missing, holds more than tensors, or is of another network.
    """

    def __init__(self, file: Path):
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"no file {file}: fetch results/degrad_fixlr_old/trained_model.pth of "
                            "the repository published with the paper, at commit d8e6ada") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{file} holds no tensors alone ({reason}): fetch it again") from error
        try:
            places = [0, *range(2, 3 * LAYERS - 3, 3)]  # of convolutions among their layers
            weights = [found[f"dncnn.dncnn.{i}.weight_orig"] for i in places]
            self.norms = [(found[f"dncnn.dncnn.{i + 1}.weight"], found[f"dncnn.dncnn.{i + 1}.bias"])
                          for i in places[1:-1]]
            # Spectral normalisation: their power iteration has converged to this.
            self.weights = [w / torch.linalg.matrix_norm(w.flatten(1), 2) for w in weights]
            self(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), SETUP.operator(8))
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{file} is not of the network of {LAYERS} layers that was published "
                            f"({error})") from error

    def __call__(self, x: Tensor, d: Tensor, A: LinearOperator) -> Tensor:
        return x - ETA * (A.adjoint(A(x) - d) + self.network(x))

    def network(self, x: Tensor) -> Tensor:
        z = relu(conv2d(x, self.weights[0], padding=1))
        for weight, (scale, shift) in zip(self.weights[1:-1], self.norms, strict=True):
            z = conv2d(z, weight, padding=1)
            z = relu(batch_norm(z, None, None, scale, shift, training=True))
        return conv2d(z, self.weights[-1], padding=1)


@torch.no_grad()
def iterates(T: AuthorsMap, x: Tensor, d: Tensor, names: list[str]) -> pd.DataFrame:
    """A row for each image and measured iteration; x and d in [-1, 1]."""
    A = SETUP.operator(x.shape[-1])
    y, parts = A.adjoint(d), []
    for k in range(FURTHER + 1):
        later = T(y, d, A)
        if k % EVERY == 0:
            change = (later - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
            usual = (y + 1) / 2, (x + 1) / 2  # in [0, 1]
            rows = {"image": names, "iteration": k, "change": change, "psnr": psnr(*usual),
                    "psnr as theirs": on_published_scale(*usual)}
            if k == CAP:
                rows |= {"ssim": ssim(*usual), "ssim as theirs": ssim(y, x)}
            parts.append(pd.DataFrame(rows))
        y = later
    return pd.concat(parts, ignore_index=True)


def measure_authors(bench: Bench) -> None:
    """Add the batches to authors.csv that it does not have yet."""
    T = AuthorsMap(bench.weights)
    images = load_splits(bench.data).test[:bench.images]
    rows = Rows(bench.out / "authors.csv")
    for start in range(0, len(images) - BATCH + 1, BATCH):
        part = images[start:start + BATCH]
        if len(rows.where(image=part.names[0])):
            continue
        x = 2 * part.as_float() - 1
        d = measure(SETUP.operator(), x, 2 * SETUP.noise_std, 0, part.indices)
        rows.add(iterates(T, x, d, part.names).round(6))
        print(f"{start + BATCH} of {len(images)} images", flush=True)


def report(out: Path) -> None:
    rows = pd.read_csv(out / "authors.csv")
    table = rows[rows.iteration.isin([0, CAP, 200, FURTHER])].groupby("iteration").agg(
        images=("image", "nunique"), psnr=("psnr", "mean"), theirs=("psnr as theirs", "mean"),
        ssim=("ssim", "mean"), ssim_theirs=("ssim as theirs", "mean"),
        change=("change", "mean")).reset_index()
    save_table(table.rename(columns={
        "iteration": "Iterations", "images": "Images", "psnr": "PSNR (dB)",
        "theirs": "PSNR as theirs (dB)", "ssim": "SSIM", "ssim_theirs": "SSIM as theirs",
        "change": "Relative residual"}), out / "authors_table",
        f"The network published with the paper, protocol code, after its cap of {CAP} iterations "
        "and others. As theirs: on [-1, 1] with a data range of 1.")
    figure, (ax,) = new_figure(width=6, height=3.6)
    groups = rows.groupby("iteration").psnr
    low, high = groups.quantile(0.1), groups.quantile(0.9)
    colour = METHODS["de-grad"].colour
    ax.plot(groups.mean(), color=colour, label="mean")
    ax.fill_between(low.index, low, high, color=colour, alpha=0.2, label="8 of 10 images")
    ax.axhline(groups.mean()[0], color=METHODS["measurement"].colour, linestyle="--",
               label="A'd, the start")
    ax.axvline(CAP, color="black", linewidth=0.8, linestyle=":", label="their cap")
    ax.set(xlabel="iterations", ylabel="PSNR (dB)", title="The authors' network, run on")
    ax.legend()
    save_figure(figure, out / "authors")


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__, images=96)
    parser.add_argument("--weights", type=Path, required=True, help="trained_model.pth")
    return run(parser.parse_args(arguments), {"authors": measure_authors}, report)


if __name__ == "__main__":
    raise SystemExit(main())
