"""One explorer for each notebook: sliders, and what they change, at once.

Each is a box of controls, a line of numbers and a picture, drawn by the kernel. What goes wrong is
said in that line, and the explorer lives on.
"""

import base64
import functools
import html
import io
import re
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from jfbnb.common import UserError
from jfbnb.core.baselines import direct_inverse, gradient_descent_iterate
from jfbnb.core.fixed_point import anderson, picard, solve
from jfbnb.core.gradients import implicit, jfb, neumann
from jfbnb.core.maps import SplittingMap
from jfbnb.core.metrics import psnr
from jfbnb.core.models import Restorer
from jfbnb.core.operators import Blur, LinearOperator
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import bundled_photos
from jfbnb.photo.files import read_pictures
from jfbnb.teaching.figures import GRADIENT_COLOURS, MAPS, described, new_figure, show
from jfbnb.teaching.swipe import Comparison
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import expected_methods, make_methods

WITHOUT_KERNEL = "An explorer: run the notebook to turn the knobs."
BUSY = "working; where cells below still run, they come first"
ACCEPTED = "image/*,.tif,.tiff,.heic,.heif,.avif"  # of a browser's files
SOLVERS = {"Picard": picard, "Anderson": anderson}
BAD, HOPELESS = 1e6, 1e12  # condition numbers: from the second on float64 knows no inverse


class Explorer(w.VBox):
    """Controls, a line of numbers, a picture and a reset. Subclasses have `draw`.

    Args:
        controls: name -> widget with a `value`, as `draw` takes them.
    """

    def __init__(self, **controls: w.ValueWidget):
        self.controls = controls
        self.defaults = {name: control.value for name, control in controls.items()}
        self.status = status_line()
        self.figure: Figure | None = None
        self.resetting = False
        self.picture = w.Image(format="png", layout=w.Layout(max_width="100%"))
        reset = w.Button(description="Reset", layout=w.Layout(width="80px"))
        reset.on_click(lambda _: self.reset())
        for control in controls.values():
            control.observe(lambda _: self.refresh(), "value")
            control.style.description_width = "110px"
        rows = w.HBox([*controls.values(), reset], layout=w.Layout(flex_flow="row wrap"))
        super().__init__([rows, self.status, self.picture])
        self.refresh()

    def draw(self, **values: object) -> tuple[Figure, str]:
        """The figure and the line of numbers for these values of the controls."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Draw anew, with the controls as they are."""
        if self.resetting:
            return
        self.status.value = BUSY
        try:
            with torch.no_grad():
                self.figure, numbers = self.draw(**{k: c.value for k, c in self.controls.items()})
        except UserError as error:
            self.complain(str(error))
            return
        self.picture.value = drawn(self.figure)
        self.status.value = numbers

    def complain(self, message: str) -> None:
        """Say what is wrong; the picture stays."""
        self.status.value = f'<span style="color:#b00020">{html.escape(message)}</span>'

    def reset(self) -> None:
        """All controls as they were, and one drawing."""
        self.resetting = True
        for name, control in self.controls.items():
            control.value = self.defaults[name]
        self.resetting = False
        self.refresh()

    def _repr_mimebundle_(self, **kwargs: object) -> tuple[dict[str, object], dict[str, object]]:
        """The widget; and for those who read without a kernel its picture, and what it says."""
        bundle = super()._repr_mimebundle_(**kwargs)
        said = html.unescape(re.sub(r"<[^>]+>", "", self.status.value))
        note = self.figure.text(0.01, -0.01, f"{said}\n{WITHOUT_KERNEL}", va="top", fontsize=9)
        whole = Image.open(io.BytesIO(drawn(self.figure, bbox_inches="tight")))
        note.remove()
        smaller = io.BytesIO()  # a notebook keeps it; with fewer colours two methods get the same
        whole.convert("RGB").quantize(256).save(smaller, "png")
        return {**bundle, "text/plain": f"{said}. {WITHOUT_KERNEL}",
                "image/png": base64.b64encode(smaller.getvalue()).decode()
                }, {"image/png": {"alt": f"{described(self.figure)}. {said}"}}


def drawn(figure: Figure, **options: object) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, **options)
    return buffer.getvalue()


def status_line() -> w.HTML:
    """Where numbers are said. It has room for two lines, so that what is below stays in place."""
    return w.HTML(layout=w.Layout(min_height="3.2em"))


def broad() -> w.Layout:
    """Of a slider: it takes the room that there is, so that it can be set with some care."""
    return w.Layout(width="auto", flex="1 1 300px", max_width="480px")


def slider(label: str, value: float, low: float, high: float, step: float) -> w.FloatSlider:
    """From low to high in steps."""
    return w.FloatSlider(value, min=low, max=high, step=step, description=label,
                         continuous_update=False, layout=broad())


def log_slider(label: str, value: float, low: int, high: int) -> w.FloatLogSlider:
    """From 10^low to 10^high."""
    return w.FloatLogSlider(value, min=low, max=high, step=0.05, description=label,
                            continuous_update=False, readout_format=".2g", layout=broad())


def int_slider(label: str, value: int, low: int, high: int, step: int = 1) -> w.IntSlider:
    """From low to high in whole steps."""
    return w.IntSlider(value, min=low, max=high, step=step, description=label,
                       continuous_update=False, layout=broad())


def _three_panels() -> tuple[Figure, list[Axes]]:
    figure, axes = new_figure(columns=3, width=10, height=3.4)
    figure.set_layout_engine(None)  # it would draw all twice, half of an answer's time
    figure.subplots_adjust(left=0.01, right=0.98, bottom=0.17, top=0.9, wspace=0.2)
    return figure, axes


class BlurExplorer(Explorer):
    """Notebook 1: kernel and noise; the measurement, the spectrum and the direct inverse.

    Args:
        x: one image (1, 3, H, W).
    """

    def __init__(self, x: Tensor):
        self.x = x
        super().__init__(std=slider("kernel std", 5**0.5, 0.2, 6.0, 0.1),
                         size=int_slider("kernel size", 5, 1, 15, 2),
                         noise=log_slider("noise std", 0.01, -6, -1))

    def draw(self, std: float, size: int, noise: float) -> tuple[Figure, str]:
        A = Blur(tuple(self.x.shape[2:]), size, std)
        d = measure(A, self.x, noise, 0, [0])
        numbers = f"measurement {psnr(d, self.x).item():.1f} dB, "
        figure, axes = _three_panels()
        show(axes[0], d[0], "measurement d")
        if A.cond < HOPELESS:
            inverse = direct_inverse(A, d)
            show(axes[1], inverse[0], "direct inverse")
            numbers += (f"direct inverse {psnr(inverse, self.x).item():.1f} dB, condition number "
                        f"{A.cond:.1e}")
        else:
            show(axes[1], torch.full_like(d[0], 0.9), "no direct inverse")
            numbers += "<b>an eigenvalue of A is zero to rounding: there is no inverse</b>"
        singular_values = A.spectrum.abs().flatten().sort(descending=True).values
        if BAD < A.cond < HOPELESS:
            numbers += ("; <b>an eigenvalue of A is next to zero</b>: the inverse multiplies the "
                        f"noise in its pattern by {1 / singular_values[-1].item():.0e}")
        axes[2].semilogy(singular_values, color=METHODS["measurement"].colour)
        axes[2].axhline(noise, color=METHODS["direct-inverse"].colour, linestyle="--")
        axes[2].set(title="singular values of A; dashed: noise", xlabel="index, largest first")
        return figure, numbers


class TikhonovExplorer(Explorer):
    """Notebook 2: lambda, step and iteration; the iterate and the semi-convergence curve.

    Args:
        A: the blur; x: one image (1, 3, H, W); noise_std: of its measurement.
    """

    COUNTS = tuple(sorted({round(10 ** (0.1 * i)) for i in range(31)}))  # 1 to 1000

    def __init__(self, A: Blur, x: Tensor, noise_std: float):
        self.A, self.x = A, x
        self.d = measure(A, x, noise_std, 0, [0])
        super().__init__(lam=log_slider("λ", 0.01, -5, 0),
                         step=slider("step η", 1.0, 0.1, 2.2, 0.1),
                         k=w.SelectionSlider(options=(0, *self.COUNTS), value=20,
                                             description="iteration k", continuous_update=False,
                                             layout=broad()))

    def draw(self, lam: float, step: float, k: int) -> tuple[Figure, str]:
        def at(count: int) -> Tensor:
            iterate = gradient_descent_iterate(self.A, self.d, lam, step, count)
            return iterate.nan_to_num(1e3, 1e3, -1e3).clamp(-1e3, 1e3)  # where it diverges

        iterate = at(k)
        curve = [psnr(at(count), self.x).item() for count in self.COUNTS]
        now = psnr(iterate, self.x).item()
        figure, axes = _three_panels()
        show(axes[0], self.d[0], "measurement d")
        show(axes[1], iterate[0], f"iterate {k}")
        axes[2].semilogx(self.COUNTS, curve, color=METHODS["gradient-descent"].colour)
        axes[2].plot([max(k, 1)], [now], "o", color=METHODS["jfb"].colour)
        axes[2].set(xlabel="iteration k", ylabel="PSNR (dB)", ylim=(max(0, min(curve)) - 1, None))
        best = max(range(len(curve)), key=curve.__getitem__)
        numbers = (f"iterate {k}: {now:.2f} dB; best on this curve {curve[best]:.2f} dB at "
                   f"k = {self.COUNTS[best]}")
        if step * (1 + lam) > 2.001:
            numbers += "; <b>step above 2 / L: it diverges</b>"
        elif step * (1 + lam) > 1.999:
            numbers += ("; <b>step next to 2 / L</b>: what the blur keeps best swings to and fro "
                        "and hardly dies out")
        return figure, numbers


class DenoiserExplorer(Explorer):
    """Notebook 3: the noise that is there and the noise that the network is told.

    Args:
        network: R(x; sigma); x: one image (1, 3, H, W).
    """

    def __init__(self, network: nn.Module, x: Tensor):
        self.network, self.x = network, x
        self.n = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        super().__init__(sigma=slider("noise σ", 0.05, 0.0, 0.2, 0.005),
                         told=slider("σ it is told", 0.05, 0.0, 0.2, 0.005))

    def draw(self, sigma: float, told: float) -> tuple[Figure, str]:
        y = self.x + sigma * self.n
        residual = self.network(y, told)
        figure, axes = _three_panels()
        show(axes[0], y[0], "noisy y")
        show(axes[1], (y - residual)[0], "denoised D(y)")
        show(axes[2], (0.5 + 2 * residual)[0], "2 R(y), grey is 0")
        return figure, (f"noisy {psnr(y, self.x).item():.2f} dB, denoised "
                        f"{psnr(y - residual, self.x).item():.2f} dB")


class SolverExplorer(Explorer):
    """Notebook 4: iterate k of the solve, by Picard or Anderson, on one of three maps.

    Args:
        T: a map, whose operator, denoiser and tau the others have too; x: one image (1, 3, H, W)
            that fits it, small enough that all its iterates come at once; noise_std: of its
            measurement.
    """

    MOST = 30  # evaluations of T

    def __init__(self, T: SplittingMap, x: Tensor, noise_std: float):
        self.x, self.d = x, measure(T.A, x, noise_std, 0, [0])
        self.maps = {kind.name: kind(T.A, T.D, T.tau.item()).to(x.device) for kind in MAPS}
        self.solved: dict[tuple[str, str], tuple[list[Tensor], list[float]]] = {}
        super().__init__(
            map_name=w.ToggleButtons(options=list(self.maps), value=SplittingMap.name),
            solver=w.ToggleButtons(options=list(SOLVERS), value="Anderson"),
            k=int_slider("iterate k", 5, 0, self.MOST - 1))

    def iterates(self, map_name: str, solver: str) -> tuple[list[Tensor], list[float]]:
        """All iterates and their residuals, computed once."""
        if (map_name, solver) not in self.solved:
            states: list[Tensor] = []
            _, info = solve(self.maps[map_name], self.d, 0.0, self.MOST, SOLVERS[solver],
                            callback=lambda _, z: states.append(z))
            self.solved[map_name, solver] = states, info.residuals[:, 0].tolist()
        return self.solved[map_name, solver]

    def draw(self, map_name: str, solver: str, k: int) -> tuple[Figure, str]:
        states, residuals = self.iterates(map_name, solver)
        k = min(k, len(states) - 1)
        figure, axes = _three_panels()
        show(axes[0], self.d[0], "measurement d")
        show(axes[1], states[k][0], f"iterate {k}")
        colour = self.maps[map_name].colour
        axes[2].semilogy(residuals, color=colour)
        axes[2].plot([k], [residuals[k]], "o", color=colour)
        axes[2].set(xlabel="evaluations of T", title="residual |T(x) - x| / |x|")
        numbers = (f"{map_name}, {solver}, iterate {k}: {psnr(states[k], self.x).item():.2f} dB, "
                   f"residual {residuals[k]:.1e}")
        if not residuals[-1] < residuals[0]:
            numbers += "; <b>it diverges</b>"
        return figure, numbers


class ToyMap(nn.Module):
    """T(x) = gamma R x + tanh(theta) in the plane, R turning by an angle in radians."""

    def __init__(self, gamma: float, angle: float, theta: Tensor):
        super().__init__()
        turn = torch.tensor(angle, dtype=torch.float64)
        self.J = gamma * torch.stack([torch.stack([turn.cos(), -turn.sin()]),
                                      torch.stack([turn.sin(), turn.cos()])])
        self.theta = nn.Parameter(theta)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.J.T + torch.tanh(self.theta)

    def solution(self, theta: Tensor) -> Tensor:
        """x* for many theta (..., 2)."""
        return torch.linalg.solve(torch.eye(2, dtype=torch.float64) - self.J,
                                  torch.tanh(theta)[..., None])[..., 0]


class GradientExplorer(Explorer):
    """Notebook 4: exact, Neumann-k and JFB gradient in the plane, and where they lead.

    The arrows are drawn where JFB stands after its steps. The loss is |x*(theta) - x*(goal)|^2 / 2,
    with theta in the plane and x* the fixed point of a `ToyMap`. Every gradient is computed by
    `jfbnb.core.gradients`.
    """

    START, GOAL = (-1.0, 0.9), (0.7, -0.4)

    def __init__(self) -> None:
        super().__init__(gamma=slider("contraction γ", 0.6, 0.0, 0.95, 0.05),
                         degrees=int_slider("J turns by (°)", 60, -165, 180, 15),
                         terms=int_slider("Neumann terms", 3, 1, 20),
                         steps=int_slider("steps", 0, 0, 40),
                         rate=slider("learning rate", 0.2, 0.05, 1.0, 0.05))

    def gradients(self, gamma: float, degrees: int, terms: int) -> dict[str, Callable]:
        """theta (2,) -> the loss's gradient there, by each of three methods."""
        goal = ToyMap(gamma, torch.pi * degrees / 180, torch.zeros(2)).solution(
            torch.tensor(self.GOAL, dtype=torch.float64))

        def by(method: Callable, theta: Tensor) -> Tensor:
            T = ToyMap(gamma, torch.pi * degrees / 180, theta.clone())
            with torch.enable_grad():
                loss = 0.5 * (method(T, T.solution(theta)[None]) - goal).square().sum()
                return torch.autograd.grad(loss, T.theta)[0]

        return {"exact": functools.partial(by, functools.partial(implicit, tolerance=1e-12)),
                "Neumann": functools.partial(by, functools.partial(neumann, terms=terms)),
                "JFB": functools.partial(by, jfb)}

    def draw(self, gamma: float, degrees: int, terms: int, steps: int,
             rate: float) -> tuple[Figure, str]:
        figure, (ax,) = new_figure(width=6, height=4.6)
        self._contours(ax, ToyMap(gamma, torch.pi * degrees / 180, torch.zeros(2)))
        gradients = self.gradients(gamma, degrees, terms)
        paths = {kind: self._path(gradient, steps, rate) for kind, gradient in gradients.items()}
        here = paths["JFB"][-1]
        exact, cosines = gradients["exact"](here), []
        for kind, gradient in gradients.items():
            colour, wide = GRADIENT_COLOURS[kind], kind == "exact"  # others may lie upon it
            g = gradient(here)
            cosines.append(f"{kind} {torch.cosine_similarity(g, exact, dim=0).item():.2f}")
            ax.annotate("", here - 0.6 * g / g.norm().clamp_min(1e-12), here, arrowprops={
                "arrowstyle": "->", "color": colour, "linewidth": 5 if wide else 2,
                "alpha": 0.5 if wide else 1})
            ax.plot(*torch.stack(paths[kind]).T, "o-", color=colour, markersize=3, label=kind)
        ax.plot(*self.GOAL, "*", color=METHODS["tikhonov"].colour, markersize=14)
        ax.legend(loc="upper right")
        uphill = torch.dot(gradients["JFB"](here), exact) < 0
        return figure, (f"cosine to the exact gradient where JFB is after {steps} steps: "
                        f"{', '.join(cosines)}"
                        + "; <b>JFB's arrow goes uphill</b>" * bool(uphill))

    def _path(self, gradient: Callable[[Tensor], Tensor], steps: int, rate: float) -> list[Tensor]:
        path = [torch.tensor(self.START, dtype=torch.float64)]
        for _ in range(steps):
            path.append(path[-1] - rate * gradient(path[-1]))
        return path

    def _contours(self, ax, T: ToyMap) -> None:
        first, second = (torch.linspace(-2, 2, 60, dtype=torch.float64) for _ in range(2))
        grid = torch.stack(torch.meshgrid(first, second, indexing="xy"), dim=-1)
        goal = T.solution(torch.tensor(self.GOAL, dtype=torch.float64))
        lines = ax.contour(first, second, (T.solution(grid) - goal).square().sum(-1).sqrt(),
                           [0.25 * 2**(k / 2) for k in range(14)], colors="#999999", linewidths=0.8)
        ax.clabel(lines, fontsize=7, fmt="%.2g")  # its values tell a turn of 0 from one of 180
        ax.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", xlim=(-2, 2), ylim=(-2, 2))


class MethodsExplorer(w.VBox):
    """Notebook 5: any methods on any image, an upload included, under one swipe handle.

    The image is blurred and made noisy as the controls say, then restored by each method chosen.
    The photographs that are there are blurred as in the paper, black beyond their border. An upload
    is measured as a camera does: its scene goes on beyond what is shown and compared.

    Args:
        weights: the folder of trained networks; None for those that are released.
    """

    START = ("tikhonov", "jfb")

    def __init__(self, weights: Path | None = None):
        paper = get_protocol("paper")
        photos = bundled_photos("test", paper.image_size)
        self.scenes = {name: (paper, photos[i:i + 1].as_float())
                       for i, name in enumerate(photos.names)}
        self.weights = weights
        self.loaded: dict[str, Restorer] = {}
        self.restored: dict[tuple, Tensor] = {}
        self.resetting = False
        self.status = status_line()
        self.image = w.Dropdown(options=list(self.scenes), description="image")
        self.upload = w.FileUpload(accept=ACCEPTED, description="your own",
                                   tooltip="a picture, up to 10 MB")
        self.methods = w.SelectMultiple(options=[(METHODS[name].label, name)
                                                 for name in expected_methods(weights)],
                                        value=self.START, rows=6, description="methods")
        self.noise = log_slider("noise std", paper.noise_std, -3, -1)
        self.std = slider("kernel std", paper.make.keywords["kernel_std"], 0.3, 5.0, 0.1)
        self.comparison = Comparison({"": torch.zeros(3, 8, 8), " ": torch.zeros(3, 8, 8)})
        reset = w.Button(description="Reset", layout=w.Layout(width="80px"))
        reset.on_click(lambda _: self.reset())
        for control in (self.image, self.methods, self.noise, self.std):
            control.observe(lambda _: self.refresh(), "value")
        self.upload.observe(lambda _: self.take_upload(), "value")
        controls = w.HBox([w.VBox([self.image, self.upload, self.noise, self.std]), self.methods,
                           reset],
                          layout=w.Layout(flex_flow="row wrap"))
        super().__init__([controls, self.status, self.comparison])
        self.refresh()

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, object]:
        return {**super()._repr_mimebundle_(**kwargs), "text/plain": WITHOUT_KERNEL}

    def reset(self) -> None:
        """The first photograph, the methods and the noise as at the start."""
        paper = get_protocol("paper")
        self.resetting = True
        self.image.value = next(iter(self.scenes))
        self.methods.value = self.START
        self.noise.value = paper.noise_std
        self.std.value = paper.make.keywords["kernel_std"]
        self.resetting = False
        self.refresh()

    def take_upload(self) -> None:
        """Add the uploaded file to the images and show it."""
        camera = get_protocol("camera")
        for file in self.upload.value:
            try:
                self.scenes[file["name"]] = camera, read_upload(bytes(file["content"]),
                                                                camera.image_size)
            except UserError as error:
                self.status.value = html.escape(f"{file['name']}: {error}")
                return
            self.restored = {k: v for k, v in self.restored.items() if k[0] != file["name"]}
            self.image.options = list(self.scenes)
            if self.image.value == file["name"]:  # another file of that name
                self.refresh()
            self.image.value = file["name"]

    def refresh(self) -> None:
        """Restore what is not restored yet, and show it."""
        if self.resetting:
            return
        self.status.value = BUSY
        setup, x = self.scenes[self.image.value]
        A = setup.make(setup.image_size, kernel_std=self.std.value)
        d = measure(A, x, self.noise.value, 0, [0])
        shown = {"Original": A.visible(x)[0], METHODS["measurement"].label: d[0]}
        problem = "" if setup.name == "paper" else (
            f"{self.image.value}: its middle square, shrunk to {d.shape[-1]} x {d.shape[-1]} and "
            "then blurred here. A picture that is blurred already is for Your photograph, in "
            "notebook 6.")
        for name in self.methods.value:
            try:
                shown[METHODS[name].label] = self._restore(name, A, d)[0]
            except UserError as error:  # the other methods are shown all the same
                problem = str(error)
        self.comparison.show(shown, truth="Original")
        self.status.value = html.escape(problem)

    def _restore(self, name: str, A: LinearOperator, d: Tensor) -> Tensor:
        key = (self.image.value, self.noise.value, self.std.value, name)
        if key not in self.restored:
            if name not in self.loaded:
                self.loaded |= make_methods([name], self.weights, torch.device("cpu"))
            image, _ = self.loaded[name](A, d, self.noise.value)
            self.restored[key] = A.visible(image)
        return self.restored[key]


def read_upload(content: bytes, size: int) -> Tensor:
    """An uploaded file's middle square as an image (1, 3, size, size).

    Raises:
        UserError: if it is no picture that `read_pictures` reads.
    """
    pixels = read_pictures(io.BytesIO(content))[0].pixels.expand(3, -1, -1)
    side = min(pixels.shape[1:])
    top, left = ((n - side) // 2 for n in pixels.shape[1:])
    square = pixels[None, :, top:top + side, left:left + side]
    resized = torch.nn.functional.interpolate(square, size=(size, size), mode="bilinear",
                                              antialias=True)
    return resized.clamp(0, 1)
