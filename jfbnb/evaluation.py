"""Methods x images -> one long table of metrics; its summary; the paper's Table 2."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from jfbnb.datasets import ImageSet
from jfbnb.diagnostics import jacobian_norm, spectral_radius
from jfbnb.fixed_point import SolveInfo, anderson, picard, scale_of, solve
from jfbnb.maps import ImplicitMap
from jfbnb.methods import METHODS, Restorer, Settings
from jfbnb.metrics import psnr, ssim
from jfbnb.models import Model
from jfbnb.operators import LinearOperator, measure

PUBLISHED = Path(__file__).parent / "published_table2.csv"

ROUNDING = 5e-7  # a relative change that float32 cannot tell from none
TUNED_HERE = "tuned here"  # the version of a method that is tuned under each condition
RUN_ON = 8  # images of a method under a condition that are solved on, at most
FURTHER = 300  # evaluations of T in which they are
SPENT = "Applications in training"  # Table 2's column of a training's computation
EQUALLY = 1.01  # times the least computation of a training that the most may be

# --- tables -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    methods: dict[str, Restorer],
    A: LinearOperator,
    x: Tensor,
    d: Tensor,
    noise_std: float,
    names: list[str],
    batch_size: int | None = None,
) -> pd.DataFrame:
    """One row per method and image: PSNR, SSIM, and what the solver said.

    Args:
        x, d: truths (N, C, H, W) and measurements of them, on the device of A. What counts is the
            part of x that d shows.
        names: N image names.
        batch_size: images solved together, which take as long as the slowest of them. None is 1 on
            a CPU, where a batch gains nothing, and 50 on a GPU.

    Returns:
        Columns method, image, psnr (dB), ssim, iterations, residual, converged, seconds. The
        solver's are empty for methods without one.
    """
    batch_size = batch_size or together(x)
    parts = []
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        for name, (y, info, seconds) in _restore_all(methods, A, d[part], noise_std).items():
            seen = A.visible(y), A.visible(x[part])
            parts.append(pd.DataFrame({
                "method": name,
                "image": names[part],
                "psnr": psnr(*seen).cpu(),
                "ssim": ssim(*seen),
                "iterations": info.iterations.cpu() if info else np.nan,
                "residual": info.residual.cpu() if info else np.nan,
                "converged": info.converged.cpu().double() if info else np.nan,
                "seconds": seconds / len(y),
            }))
    return join(parts)


def join(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables of some images each as one: method by method, in the first table's order."""
    table = pd.concat(tables, ignore_index=True)
    order = {name: i for i, name in enumerate(table.method.unique())}
    return table.sort_values("method", key=lambda column: column.map(order), kind="stable",
                             ignore_index=True)


def _restore_all(methods: dict[str, Restorer], A: LinearOperator, d: Tensor,
                 noise_std: float) -> dict[str, tuple[Tensor, SolveInfo | None, float]]:
    """Each method's images, what its solver said, and its seconds.

    A head acts on the image of the method before it, and has that one's seconds added to its own.
    """
    done: dict[str, tuple[Tensor, SolveInfo | None, float]] = {}
    for name, method in methods.items():
        clock = time.perf_counter()
        if method.head is not None and method.base in done:
            y, info, before = done[method.base]
            y = method.head(A, y, d, noise_std)
        else:
            (y, info), before = method(A, d, noise_std), 0.0
        if y.is_cuda:
            torch.cuda.synchronize()
        done[name] = y, info, before + time.perf_counter() - clock
    return done


@dataclass(frozen=True, eq=False)
class Condition:
    """Images, what measures them, what the methods are told of that, and the noise level.

    Args:
        true_A: the operator that measures.
        A: the one that the methods are told.
        noise_std: of the measurements; the methods are told it.
    """

    images: ImageSet
    true_A: LinearOperator
    A: LinearOperator
    noise_std: float

    def measure(self, images: ImageSet, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Some images and their measurements, under this condition."""
        x = images.as_float().to(device)
        return x, measure(self.true_A.to(device), x, self.noise_std, seed, images.indices)


def evaluate_conditions(
    versions: dict[str, dict[str, Restorer]],
    conditions: dict[tuple[str, object], Condition],
    tuned: list[str],
    validation: ImageSet,
    seed: int,
    device: torch.device,
    candidates: int = 9,
) -> pd.DataFrame:
    """Methods under conditions that they were not all made for: means, and what solves come to.

    Those without weights are tuned anew for every operator and noise level, so that they are about
    as good there as they can be. Where a network's solves have not all converged, at most 8 of the
    images, the worst of them, are solved on for 300 more evaluations of T: what does their PSNR say
    then?

    Args:
        versions: methods that are ready to use, by what they were trained for.
        conditions: by study and by name. One that several studies share is evaluated once.
        tuned: the names of the methods to tune.
        validation: the images to tune on, measured as the condition has it.
        candidates: about how many settings are tried for each.

    Returns:
        A row for each condition, version (those of `versions`, and "tuned here") and method: the
        columns of `summarise`, run_on (how many images were solved on), converged_later (the share
        of these that then have converged), drift (the mean rise of their PSNR in dB; both are empty
        where there are none), version, settings (as tuned here), study, condition.
    """
    done: dict[Condition, pd.DataFrame] = {}
    found: dict[object, dict[str, Settings]] = {}
    for condition in conditions.values():
        if condition in done:
            continue
        key = condition.true_A, condition.A, condition.noise_std
        if key not in found:
            x, d = condition.measure(validation, seed, device)
            found[key] = {name: tuned_under(condition, name, x, d, candidates) for name in tuned}
        x, d = condition.measure(condition.images, seed, device)
        here = {name: _with(name, settings) for name, settings in found[key].items()}
        table = pd.concat([_under(condition, methods, x, d).assign(version=version) for
                           version, methods in {TUNED_HERE: here, **versions}.items() if methods])
        words = {name: ", ".join(f"{k} {value:.3g}" for k, value in settings.items())
                 for name, settings in found[key].items()}
        table["settings"] = table.method.map(words).where(table.version == TUNED_HERE, "")
        done[condition] = table
    return pd.concat([done[condition].assign(study=study, condition=name)
                      for (study, name), condition in conditions.items()], ignore_index=True)


@torch.no_grad()
def tuned_under(condition: Condition, name: str, x: Tensor, d: Tensor, n: int) -> Settings:
    """The best of about n settings of a method without weights, on images x measured as d.

    Where the candidates differ in one number alone they are tried from the middle on, uphill, until
    PSNR falls on both sides; in others all are tried.
    """
    method, A = METHODS[name], condition.A.to(x.device)
    candidates = method.candidates(condition.noise_std, n)

    @cache
    def score(k: int) -> float:
        value = psnr(A.visible(method.restore(A, d, candidates[k], 1.0)[0]), A.visible(x)).mean()
        return value.nan_to_num(-float("inf")).item()

    numbers = [len({settings[key] for settings in candidates}) for key in candidates[0]]
    if sum(number > 1 for number in numbers) > 1:
        return candidates[max(range(len(candidates)), key=score)]
    k, better = None, len(candidates) // 2
    while better != k:
        k = better
        better = max(range(max(k - 1, 0), min(k + 2, len(candidates))), key=score)
    return candidates[k]


def _with(name: str, settings: Settings) -> Restorer:
    """A method without weights, with settings that already are for the noise level."""
    return Restorer(lambda A, d, noise_std: METHODS[name].restore(A, d, settings, 1.0))


def _under(condition: Condition, methods: dict[str, Restorer], x: Tensor,
           d: Tensor) -> pd.DataFrame:
    """`summarise` under one condition, and what comes of the solves that have not converged."""
    A = condition.A.to(x.device)
    table = evaluate(methods, A, x, d, condition.noise_std, condition.images.names)
    later = [_run_on(methods[name], rows.reset_index(drop=True), A, x, d, condition.noise_std)
             for name, rows in table.groupby("method", sort=False)]
    return summarise(table).join(pd.DataFrame(later))


def _run_on(method: Restorer, rows: pd.DataFrame, A: LinearOperator, x: Tensor, d: Tensor,
            noise_std: float) -> dict[str, float]:
    """What the unconverged images of one method come to: run_on, converged_later, drift.

    A solve from the start to a later end goes through the same iterates as one that is gone on
    with, Anderson's memory included.
    """
    failed = rows[rows.converged == 0].sort_values("residual", ascending=False,
                                                   na_position="first")
    if not len(failed) or method.model is None:
        return {"run_on": 0, "converged_later": np.nan, "drift": np.nan}
    at = failed.index[:RUN_ON].tolist()
    model = method.model(A, noise_std)
    model.max_iterations += FURTHER
    with torch.no_grad():
        y, info = model(d[at])
    change = psnr(A.visible(y), A.visible(x[at])).cpu().numpy() - rows.psnr[at].to_numpy()
    return {"run_on": len(at), "converged_later": info.converged.double().mean().item(),
            "drift": change.mean()}


@torch.no_grad()
def by_computation(methods: dict[str, Restorer], counts: list[int], A: LinearOperator, x: Tensor,
                   d: Tensor, noise_std: float) -> pd.DataFrame:
    """Does more computation make a better image? An iterative method after k evaluations of T.

    An equilibrium's solver is stopped after k, an unrolled network is given k layers, whatever
    number it was trained with.

    Args:
        counts: the k, at least 1 each.

    Returns:
        A row for each method and k: method, evaluations, psnr (dB, mean over the images).
    """
    rows = []
    for name, method in methods.items():
        for k in counts:
            model = method.model(A, noise_std)  # a fresh shell around the same weights
            model.tolerance, model.max_iterations, model.iterations = 0.0, k, k
            y = torch.cat([model(d[i:i + 1])[0] for i in range(len(d))])
            rows.append({"method": name, "evaluations": k,
                         "psnr": psnr(A.visible(y), A.visible(x)).mean().item()})
    return pd.DataFrame(rows)


def certify(T: ImplicitMap, x: Tensor, d: Tensor, names: list[str], further: int = 1000,
            seed: int = 0, tolerance: float = Model.tolerance,
            max_iterations: int = Model.max_iterations) -> pd.DataFrame:
    """Is what the solver returns an equilibrium? One row per image.

    Each is solved as `models.Equilibrium` does for all tables. From there on T is applied plainly:
    `further` times, or until once moves the image by less than 5e-7 of its norm, a few roundings
    of float32. A map whose solver is not Anderson's goes on by that. Where this ends is x*, and
    there T's Jacobian is measured.

    Returns:
        Columns image, evaluations (of T, to the tolerance; infinite if it is not reached),
        residual, distance (|x - x*| / |x*|, which the residual is not), psnr (dB), further (how
        often T was applied on), residual_later, psnr_later, drift (by how much PSNR has risen,
        dB), radius, norm: the spectral radius and the norm of the Jacobian, as in `diagnostics`.
    """
    size = together(x)
    parts = []

    def quality(state: Tensor, part: slice) -> Tensor:
        return psnr(T.A.visible(T.image(state)), T.A.visible(x[part])).cpu()

    for start in range(0, len(x), size):
        part = slice(start, start + size)

        def apply(z: Tensor, part: slice = part) -> Tensor:
            return T(z, d[part])

        state, info = solve(T, d[part], tolerance, max_iterations)
        own = getattr(T, "solver", anderson)
        onward = picard if own is anderson else own
        later, rest = solve(T, d[part], ROUNDING / scale_of(T), further, onward, state)
        distance = (state - later).flatten(1).norm(dim=1) / later.flatten(1).norm(dim=1)
        radius, norm = (measured(apply, later, 30, torch.Generator().manual_seed(seed)).cpu()
                        for measured in (spectral_radius, jacobian_norm))
        before, after = quality(state, part), quality(later, part)
        parts.append(pd.DataFrame({
            "image": names[part],
            "evaluations": info.iterations.double().where(info.converged, float("inf")).cpu(),
            "residual": info.residual.cpu(), "distance": distance.cpu(), "psnr": before,
            "further": rest.iterations.cpu(), "residual_later": rest.residual.cpu(),
            "psnr_later": after, "drift": after - before, "radius": radius, "norm": norm}))
    return pd.concat(parts, ignore_index=True)


def together(x: Tensor) -> int:
    """Images solved together: a batch gains nothing on a CPU."""
    return 1 if x.device.type == "cpu" else 50


def complaints(table: pd.DataFrame, most: int = 4) -> list[str]:
    """One line for each method whose solver failed on some images, the worst of them by name."""
    lines = []
    for method, rows in table.groupby("method", sort=False):
        failed = rows[rows.converged == 0].sort_values("residual", ascending=False)
        if len(failed):
            named = ", ".join(f"{image} (relative residual {residual:.1e})" for image, residual
                              in zip(failed.image[:most], failed.residual[:most], strict=True))
            more = f" and {len(failed) - most} more" if len(failed) > most else ""
            lines.append(f"{method}: {len(failed)} of {len(rows)} images did not converge: "
                         f"{named}{more}")
    return lines


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method, in the table's order: means with standard errors, and convergence.

    Seconds and iterations are medians: what else the machine had to do matters less to them.
    """
    groups = table.groupby("method", sort=False)
    return pd.DataFrame({
        "images": groups.size(),
        "psnr": groups.psnr.mean(),
        "psnr_se": groups.psnr.sem(),
        "ssim": groups.ssim.mean(),
        "ssim_se": groups.ssim.sem(),
        "converged": groups.converged.mean(),
        "median_iterations": groups.iterations.median(),
        "seconds_per_image": groups.seconds.median(),
    }).reset_index()


def reference_table2() -> pd.DataFrame:
    """The paper's Table 2, as data with its source (see the file).

    Returns:
        Columns method, label, psnr and ssim as printed, data_range, and usual_psnr: the PSNR on
        the usual scale, a text. Where the range of the images is not known it has both readings.
    """
    table = pd.read_csv(PUBLISHED, comment="#", dtype={"data_range": str})
    table["usual_psnr"] = [
        " or ".join(f"{psnr + 20 * np.log10(float(r)):.2f}" for r in ranges.split(" or "))
        for psnr, ranges in zip(table.psnr, table.data_range, strict=True)]
    return table


def table2(summary: pd.DataFrame, applications: Mapping[str, float] | None = None
           ) -> pd.DataFrame:
    """Table 2: our means beside the published values, one row per method of either.

    `applications` of a network to a crop are what a training spent, by the names of the methods
    that have one.

    The published JFB value is on the scale of its code (see `on_published_scale`); the column
    `Published PSNR, range 1` puts it on the usual one. The scale of the others is not known, and
    the column has both readings of them.
    """
    published = reference_table2().set_index("method")
    ours = summary.set_index("method")
    order = list(ours.index) + [m for m in published.index if m not in ours.index]
    rows = pd.DataFrame(index=order)
    rows["Method"] = [METHODS[m].label if m in METHODS else published.label[m] for m in order]
    rows["PSNR (dB)"] = ours.psnr.reindex(order)
    rows["± PSNR"] = ours.psnr_se.reindex(order)
    rows["SSIM"] = ours.ssim.reindex(order)
    rows["± SSIM"] = ours.ssim_se.reindex(order)
    rows["Converged"] = ours.converged.reindex(order)
    rows["Seconds per image"] = ours.seconds_per_image.reindex(order)
    own = [(METHODS[m].behind or METHODS[m]).name if m in METHODS else m for m in order]
    rows[SPENT] = pd.Series(applications or {}, dtype=float).reindex(own).values
    rows["Published PSNR"] = published.psnr.reindex(order)
    rows["Published PSNR, range 1"] = published.usual_psnr.reindex(order, fill_value="")
    rows["Published SSIM"] = published.ssim.reindex(order)
    return rows.reset_index(drop=True)


def trained_for(applications: Iterable[float]) -> str:
    """How long the trained methods of a table were trained, and whether equally: a sentence."""
    least, most = min(applications := list(applications)), max(applications)
    if most <= EQUALLY * least:
        return (f"Each trained method had {least:,.0f} applications of its network to a training "
                "crop, to less than 1%.")
    return (f"The trained methods had {least:,.0f} to {most:,.0f} applications of their networks "
            "to a training crop: this order is one of efforts as well as of methods.")


def on_published_scale(x: Tensor, truth: Tensor) -> Tensor:
    """PSNR as the paper's code computes it: images mapped to [-1, 1], but a data range of 1."""
    return psnr(2 * x - 1, 2 * truth - 1, data_range=1.0)
