"""One explorer for each notebook: a figure that follows sliders at once.

Each has a box of controls, a line of numbers and a picture, drawn by the kernel. The line also
shows errors, after which the explorer still works.
"""

import base64
import html
import io
import re
from collections.abc import Callable
from functools import cache, partial
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
from jfbnb.teaching.upload import Upload
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import expected_methods, make_methods

STYLE = """<style>
.jfbnb-panels { display: flex; flex-wrap: wrap; }
.jfbnb-panels img { max-width: 100%; }
.jfbnb-explorer.jupyter-widgets-disconnected::before { font: bold 13px sans-serif; color: #b00020;
  content: "The kernel has stopped or restarted: run this cell again."; }
</style>"""
WITHOUT_KERNEL = "An explorer: run the notebook to turn the knobs."
BUSY = "working; cells that are still running come first"
ACCEPTED = "image/*,.tif,.tiff,.heic,.heif,.avif"  # of a browser's files
SOLVERS = {"Picard": picard, "Anderson": anderson}
WIDE = {"continuous_update": False, "style": {"description_width": "110px"},
        "layout": {"flex": "0 0 auto", "width": "380px"}}  # so that a slider can be set precisely
BAD, HOPELESS = 1e6, 1e12  # condition numbers; above the second float64 has no useful inverse


def slider(label: str, value: float, low: float, high: float, step: float = 0.05,
           kind: type[w.ValueWidget] = w.FloatSlider, **options: object) -> w.ValueWidget:
    """A slider from low to high, which takes effect when it is released."""
    return kind(value=value, min=low, max=high, step=step, description=label, **WIDE, **options)


int_slider = partial(slider, kind=w.IntSlider)
# Its low and high are exponents of 10.
log_slider = partial(slider, kind=w.FloatLogSlider, readout_format=".2g")


def row(*widgets: w.Widget) -> w.HBox:
    """Widgets side by side, in several rows if the page is narrow."""
    return w.HBox(widgets, layout=w.Layout(flex_flow="row wrap"))


def button(label: str, action: Callable[[], object]) -> w.Button:
    """A button that calls `action`."""
    made = w.Button(description=label, layout=w.Layout(width="80px"))
    made.on_click(lambda _: action())
    return made


def observe(controls: list[w.Widget], action: Callable[[], object]) -> None:
    """Call `action` whenever the value of a control changes."""
    for control in controls:
        control.observe(lambda _: action(), "value")


def message(text: str, wrong: bool = False, link: str = "") -> str:
    """A line as HTML, in red for an error, followed by a link, which is HTML already."""
    colour = ' style="color:#b00020"' if wrong else ""
    return f"<div{colour}>{html.escape(text)}{'; ' if link else ''}{link}</div>"


def stored(bundle: tuple[dict, dict], picture: bytes, text: str, alt: str) -> tuple[dict, dict]:
    """A widget's MIME bundle, with a PNG for readers without a kernel."""
    smaller = io.BytesIO()  # with fewer than 256 colours two methods would look the same
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(smaller, "png")
    image = base64.b64encode(smaller.getvalue()).decode()
    return {**bundle, "text/plain": text, "image/png": image}, {"image/png": {"alt": alt}}


class Alive(w.VBox):
    """Widgets in a column, with a line above them if their kernel has stopped."""

    def __init__(self, *children: w.Widget):
        super().__init__([w.HTML(STYLE, layout=w.Layout(display="none")), *children])
        self.add_class("jfbnb-explorer")


class Explorer(Alive):
    """Controls with a reset, a line of numbers and a picture. Subclasses define `draw`.

    Args:
        shown: the widget that shows the result, if not a figure; then override `update`.
        controls: name -> widget with a `value`; the names are `draw`'s arguments.
    """

    PANELS = 3  # of a figure; they are stacked if the page is narrow

    def __init__(self, shown: w.Widget | None = None, **controls: w.ValueWidget):
        self.picture = shown or w.HTML()
        self.controls = controls
        self.defaults = {name: control.value for name, control in controls.items()}
        # Room for two lines, so that nothing below moves.
        self.status = w.HTML(layout=w.Layout(min_height="3.2em"))
        self.resetting = False
        observe(list(controls.values()), self.refresh)
        super().__init__(*self.arrange(button("Reset", self.reset)))
        self.refresh()

    def arrange(self, reset: w.Button) -> tuple[w.Widget, ...]:
        """Lay out the controls, the reset button, the line and the picture."""
        return row(*self.controls.values(), reset), self.status, self.picture

    def draw(self, **values: object) -> tuple[Figure, str]:
        """Draw the figure, and return it with the line of numbers, for these control values."""
        raise NotImplementedError

    def update(self, **values: object) -> str:
        """Show the result for these control values; return the line of numbers as HTML."""
        self.figure, numbers = self.draw(**values)
        alt = html.escape(described(self.figure), quote=True)
        self.picture.value = '<div class="jfbnb-panels">' + "".join(
            f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(panel).decode()}">'
            for panel in panels(drawn(self.figure), self.PANELS)) + "</div>"
        return numbers

    def refresh(self) -> None:
        """Show the result for the current control values, or the error."""
        if self.resetting:
            return
        self.status.value = BUSY
        try:
            with torch.no_grad():
                self.status.value = self.update(**{k: c.value for k, c in self.controls.items()})
        except UserError as error:
            self.status.value = message(str(error), wrong=True)

    def reset(self) -> None:
        """Set all controls to their defaults, and show the result once."""
        self.resetting = True
        for name, control in self.controls.items():
            control.value = self.defaults[name]
        self.resetting = False
        self.refresh()

    def _repr_mimebundle_(self, **kwargs: object) -> tuple[dict[str, object], dict[str, object]]:
        """The widget, and a picture with the line of numbers below it."""
        numbers = html.unescape(re.sub(r"<[^>]+>", "", self.status.value))
        note = self.figure.text(0.01, -0.01, f"{numbers}\n{WITHOUT_KERNEL}", va="top", fontsize=9)
        picture = drawn(self.figure, bbox_inches="tight")
        note.remove()
        return stored(super()._repr_mimebundle_(**kwargs), picture, f"{numbers}. {WITHOUT_KERNEL}",
                      f"{described(self.figure)}. {numbers}")


def drawn(figure: Figure, **options: object) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, **options)
    return buffer.getvalue()


def panels(picture: bytes, number: int) -> list[bytes]:
    """Split a PNG into `number` pieces of equal width."""
    whole, parts = Image.open(io.BytesIO(picture)), [io.BytesIO() for _ in range(number)]
    for i, part in enumerate(parts):
        left, right = (round(k * whole.width / number) for k in (i, i + 1))
        whole.crop((left, 0, right, whole.height)).save(part, "png")
    return [part.getvalue() for part in parts]


def three_panels(*pictures: tuple[Tensor, str]) -> tuple[Figure, Axes]:
    """A figure of two or three titled pictures (3, H, W); returns it and its last axes."""
    figure, axes = new_figure(columns=3, width=10, height=3.4)
    figure.set_layout_engine(None)  # it would draw everything twice, half of the time
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.17, top=0.9, wspace=0.05)
    left, bottom, width, height = axes[-1].get_position().bounds  # room for the ticks' labels
    if len(pictures) < 3:
        axes[-1].set_position([left + 0.055, bottom, width - 0.055, height])
    for ax, (image, title) in zip(axes, pictures, strict=False):
        show(ax, image, title)
    return figure, axes[-1]


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
        mu = A.spectrum.abs().flatten().sort(descending=True).values
        if A.cond > HOPELESS:
            inverse, title = torch.full_like(d, 0.9), "no direct inverse"
            numbers += "<b>an eigenvalue of A is zero to rounding: there is no inverse</b>"
        else:
            inverse, title = direct_inverse(A, d), "direct inverse"
            numbers += (f"direct inverse {psnr(inverse, self.x).item():.1f} dB, condition number "
                        f"{A.cond:.1e}")
            if A.cond > BAD:
                numbers += ("; <b>an eigenvalue of A is next to zero</b>: the inverse multiplies "
                            f"the noise in its pattern by {1 / mu[-1].item():.0e}")
        figure, ax = three_panels((d[0], "measurement d"), (inverse[0], title))
        ax.semilogy(mu, color=METHODS["measurement"].colour)
        ax.axhline(noise, color=METHODS["direct-inverse"].colour, linestyle="--")
        ax.set_title("singular values; dashed: noise", fontsize=11)
        ax.set_xlabel("index, largest first")
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
                                             description="iteration k", **WIDE))

    def draw(self, lam: float, step: float, k: int) -> tuple[Figure, str]:
        def at(count: int) -> Tensor:
            iterate = gradient_descent_iterate(self.A, self.d, lam, step, count)
            return iterate.nan_to_num(1e3, 1e3, -1e3).clamp(-1e3, 1e3)  # if it diverges

        curve = [psnr(at(count), self.x).item() for count in self.COUNTS]
        now = psnr(at(k), self.x).item()
        figure, ax = three_panels((self.d[0], "measurement d"), (at(k)[0], f"iterate {k}"))
        ax.semilogx(self.COUNTS, curve, color=METHODS["gradient-descent"].colour)
        ax.plot([max(k, 1)], [now], "o", color=METHODS["jfb"].colour)
        ax.set(xlabel="iteration k", ylabel="PSNR (dB)", ylim=(max(0, min(curve)) - 1, None))
        best, where = max(zip(curve, self.COUNTS, strict=True))
        numbers = f"iterate {k}: {now:.2f} dB; best on this curve {best:.2f} dB at k = {where}"
        if step * (1 + lam) > 2.001:
            numbers += "; <b>step above 2 / L: it diverges</b>"
        elif step * (1 + lam) > 1.999:
            numbers += ("; <b>step near 2 / L</b>: the patterns that the blur keeps best oscillate "
                        "and hardly decay")
        return figure, numbers


class DenoiserExplorer(Explorer):
    """Notebook 3: the noise level of the image, and the one that the network is given.

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
        figure, _ = three_panels((y[0], "noisy y"), ((y - residual)[0], "denoised D(y)"),
                                 ((0.5 + 2 * residual)[0], "2 R(y), grey is 0"))
        return figure, (f"noisy {psnr(y, self.x).item():.2f} dB, denoised "
                        f"{psnr(y - residual, self.x).item():.2f} dB")


class SolverExplorer(Explorer):
    """Notebook 4b: iterate k of the solve, by Picard or Anderson, on one of three maps.

    Args:
        T: a map; the other maps use its operator, denoiser and tau.
        x: one image (1, 3, H, W) of its size, small because all its iterates are kept.
        noise_std: of its measurement.
    """

    MOST = 30  # evaluations of T

    def __init__(self, T: SplittingMap, x: Tensor, noise_std: float):
        self.x, self.d = x, measure(T.A, x, noise_std, 0, [0])
        self.maps = {kind.name: kind(T.A, T.D, T.tau.item()).to(x.device) for kind in MAPS}
        self.iterates = cache(self.iterates)  # each solve runs once
        super().__init__(
            map_name=w.ToggleButtons(options=list(self.maps), value=SplittingMap.name),
            solver=w.ToggleButtons(options=list(SOLVERS), value="Anderson"),
            k=int_slider("iterate k", 5, 0, self.MOST - 1, 1))

    def iterates(self, map_name: str, solver: str) -> tuple[list[Tensor], list[float]]:
        """All iterates and their residuals."""
        states: list[Tensor] = []
        _, info = solve(self.maps[map_name], self.d, 0.0, self.MOST, SOLVERS[solver],
                        callback=lambda _, z: states.append(z))
        return states, info.residuals[:, 0].tolist()

    def draw(self, map_name: str, solver: str, k: int) -> tuple[Figure, str]:
        states, residuals = self.iterates(map_name, solver)
        k = min(k, len(states) - 1)
        figure, ax = three_panels((self.d[0], "measurement d"), (states[k][0], f"iterate {k}"))
        colour = self.maps[map_name].colour
        ax.semilogy(residuals, color=colour)
        ax.plot([k], [residuals[k]], "o", color=colour)
        ax.set(xlabel="evaluations of T", title="residual |T(x) - x| / |x|")
        numbers = (f"{map_name}, {solver}, iterate {k}: {psnr(states[k], self.x).item():.2f} dB, "
                   f"residual {residuals[k]:.1e}")
        if not residuals[-1] < residuals[0]:
            numbers += "; <b>it diverges</b>"
        return figure, numbers


class ToyMap(nn.Module):
    """T(x) = J x + tanh(theta) in the plane, where J is gamma times a rotation by `degrees`."""

    def __init__(self, gamma: float, degrees: float, theta: Tensor):
        super().__init__()
        turn = torch.tensor(torch.pi * degrees / 180, dtype=torch.float64)
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
    """Notebook 4b: exact, Neumann-k and JFB gradient in the plane, and their descent paths.

    The arrows start where JFB's path ends. The loss is |x*(theta) - x*(goal)|^2 / 2, with theta in
    the plane and x* the fixed point of a `ToyMap`. The gradients are those of
    `jfbnb.core.gradients`.
    """

    START = torch.tensor([-1.0, 0.9], dtype=torch.float64)
    GOAL = torch.tensor([0.7, -0.4], dtype=torch.float64)
    STEPS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 35, 40, 45, 50, 70, 100, 150, 200)
    PANELS = 1

    def __init__(self) -> None:
        super().__init__(gamma=slider("contraction γ", 0.6, 0.0, 0.95),
                         degrees=int_slider("J turns by (°)", 60, -165, 180, 15),
                         terms=int_slider("Neumann terms", 3, 1, 20, 1),
                         steps=w.SelectionSlider(options=self.STEPS, value=0,
                                                 description="steps", **WIDE),
                         rate=slider("learning rate", 0.2, 0.05, 1.0))

    def arrange(self, reset: w.Button) -> tuple[w.Widget, ...]:
        for control in self.controls.values():  # beside the picture, on 1280 pixels
            control.layout.width = "340px"
        return (row(w.VBox([*self.controls.values(), reset, self.status],
                           layout=w.Layout(width="350px", flex="0 0 auto")), self.picture),)

    def gradients(self, gamma: float, degrees: float,
                  terms: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """For each of three methods a function: theta (2,) -> the loss's gradient."""
        def at(method: Callable, theta: Tensor) -> Tensor:
            T = ToyMap(gamma, degrees, theta.clone())
            with torch.enable_grad():
                x = method(T, T.solution(theta)[None])
                loss = 0.5 * (x - T.solution(self.GOAL)).square().sum()
                return torch.autograd.grad(loss, T.theta)[0]

        return {"exact": partial(at, partial(implicit, tolerance=1e-12)),
                "Neumann": partial(at, partial(neumann, terms=terms)), "JFB": partial(at, jfb)}

    def draw(self, gamma: float, degrees: int, terms: int, steps: int,
             rate: float) -> tuple[Figure, str]:
        figure, (ax,) = new_figure(width=6, height=4.6)
        T = ToyMap(gamma, degrees, torch.zeros(2))
        self._contours(ax, T)
        gradients = self.gradients(gamma, degrees, terms)
        paths = {kind: [self.START] for kind in gradients}
        for kind, path in paths.items():
            for _ in range(steps):
                path.append(path[-1] - rate * gradients[kind](path[-1]))
        here = paths["JFB"][-1]
        left = (T.solution(here) - T.solution(self.GOAL)).norm().item()
        arrows = {kind: gradient(here) for kind, gradient in gradients.items()}
        for kind, g in arrows.items():
            colour, wide = GRADIENT_COLOURS[kind], kind == "exact"  # others may cover it
            ax.annotate("", here - 0.6 * g / g.norm().clamp_min(1e-12), here, arrowprops={
                "arrowstyle": "->", "color": colour, "linewidth": 5 if wide else 2,
                "alpha": 0.5 if wide else 1})
            ax.plot(*torch.stack(paths[kind]).T, "o-", color=colour, markersize=3, label=kind)
        ax.plot(*self.GOAL, "*", color=METHODS["tikhonov"].colour, markersize=14)
        ax.legend(loc="upper right")
        cosines = ", ".join(
            f"{kind} {torch.cosine_similarity(g, arrows['exact'], dim=0).item():.2f}"
            for kind, g in arrows.items())
        uphill = torch.dot(arrows["JFB"], arrows["exact"]) < 0
        return figure, (f"JFB after {steps} steps is {left:.2g} from the goal's x*; cosine to the "
                        f"exact gradient there: {cosines}"
                        + "; <b>JFB's arrow goes uphill</b>" * bool(uphill))

    def _contours(self, ax: Axes, T: ToyMap) -> None:
        side = torch.linspace(-2, 2, 60, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)
        distance = (T.solution(grid) - T.solution(self.GOAL)).norm(dim=-1)
        lines = ax.contour(side, side, distance, [0.25 * 2 ** (k / 2) for k in range(14)],
                           colors="#999999", linewidths=0.8)
        ax.clabel(lines, fontsize=7, fmt="%.2g")  # the values distinguish turns of 0 and 180
        ax.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", xlim=(-2, 2), ylim=(-2, 2))


class MethodsExplorer(Explorer):
    """Notebook 5: any methods on any image, an upload included, under one swipe handle.

    The controls set the blur and the noise; each chosen method restores the measurement. The
    bundled photographs have a black border, as in the paper. An upload is measured as by a camera:
    its scene is larger than the part that is shown and compared.

    Args:
        weights: the folder of trained networks; None for the released ones.
    """

    def __init__(self, weights: Path | None = None):
        paper = get_protocol("paper")
        photos = bundled_photos("test", paper.image_size)
        self.scenes = {name: (paper, photos[i:i + 1].as_float())
                       for i, name in enumerate(photos.names)}
        self.weights = weights
        self.loaded: dict[str, Restorer] = {}
        self.restored = cache(self._restored)  # once for each method, image, noise and kernel
        self.upload = Upload(accept=ACCEPTED, description="your own", tooltip="a picture")
        observe([self.upload], self.take_upload)
        released = "" if weights else ", released"  # a run has other networks of these names
        self.labels = {name: METHODS[name].label + released * METHODS[name].trainable
                       for name in expected_methods(weights)}
        super().__init__(
            Comparison({"": torch.zeros(3, 8, 8), " ": torch.zeros(3, 8, 8)}),
            image=w.Dropdown(options=list(self.scenes), description="image"),
            noise=log_slider("noise std", paper.noise_std, -3, -1),
            std=slider("kernel std", paper.make.keywords["kernel_std"], 0.3, 5.0, 0.1),
            methods=w.SelectMultiple(options=[(label, name) for name, label in self.labels.items()],
                                     value=("tikhonov", "jfb"), rows=6, description="methods"))

    def arrange(self, reset: w.Button) -> tuple[w.Widget, ...]:
        *sliders, methods = self.controls.values()
        return (row(w.VBox([self.upload, *sliders]), methods, reset), self.status, self.picture)

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, object]:
        return {**w.VBox._repr_mimebundle_(self, **kwargs), "text/plain": WITHOUT_KERNEL}

    def take_upload(self) -> None:
        """Add the uploaded file to the images and show it."""
        camera, image = get_protocol("camera"), self.controls["image"]
        name, content = self.upload.value
        try:
            x = read_upload(content, camera.image_size)
        except UserError as error:
            self.status.value = message(f"{name}: {error}", wrong=True)
            return
        self.scenes[name] = camera, x
        self.restored.cache_clear()  # another file may have had that name
        image.options = list(self.scenes)
        if image.value == name:
            self.refresh()
        image.value = name

    def measured(self, image: str, noise: float, std: float) -> tuple[LinearOperator, Tensor]:
        """The blur with this kernel, and its measurement of the image."""
        protocol, x = self.scenes[image]
        A = protocol.make(protocol.image_size, kernel_std=std)
        return A, measure(A, x, noise, 0, [0])

    def update(self, image: str, noise: float, std: float, methods: tuple[str, ...]) -> str:
        protocol, x = self.scenes[image]
        A, d = self.measured(image, noise, std)
        shown = {"Original": A.visible(x)[0], METHODS["measurement"].label: d[0]}
        line = "" if protocol.name == "paper" else message(
            f"{image}: its middle square, resized to {d.shape[-1]} x {d.shape[-1]} and then "
            "blurred here. If a picture is already blurred use Your photograph, in notebook 6.")
        for name in methods:
            try:
                shown[self.labels[name]] = self.restored(name, image, noise, std)
            except UserError as error:  # the other methods are still shown
                line = message(str(error), wrong=True)
        self.picture.show(shown, truth="Original")
        return line

    def _restored(self, name: str, image: str, noise: float, std: float) -> Tensor:
        if name not in self.loaded:
            self.loaded |= make_methods([name], self.weights, torch.device("cpu"))
        A, d = self.measured(image, noise, std)
        return A.visible(self.loaded[name](A, d, noise)[0])[0]


def read_upload(content: bytes, size: int) -> Tensor:
    """An uploaded file's middle square as an image (1, 3, size, size).

    Raises:
        UserError: if `read_pictures` cannot read it.
    """
    pixels = read_pictures(io.BytesIO(content))[0].pixels.expand(3, -1, -1)
    side = min(pixels.shape[1:])
    top, left = ((n - side) // 2 for n in pixels.shape[1:])
    square = pixels[:, top:top + side, left:left + side]
    return nn.functional.interpolate(square[None], size=(size, size), mode="bilinear",
                                     antialias=True).clamp(0, 1)
