"""The explorer *Your photograph*: set the kernel of a photograph, and restore it.

Restoration takes seconds, or minutes for a camera's megapixels, so a button starts it.
"""

import base64
import html
import io
import itertools
import math
import tempfile
import threading
import time
from pathlib import Path

import ipywidgets as w
import numpy as np
import skimage.data
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate
from torch.nn.modules.module import register_module_forward_pre_hook

from jfbnb.common import UserError, atomic_path, pick_device
from jfbnb.core.models import Restorer
from jfbnb.core.operators import BORDERS
from jfbnb.photo import kernel_option
from jfbnb.photo.files import Picture, read_pictures, write_pictures
from jfbnb.photo.restore import Restored, restore
from jfbnb.teaching.explorers import (
    ACCEPTED,
    WITHOUT_KERNEL,
    Alive,
    button,
    int_slider,
    log_slider,
    message,
    observe,
    row,
    slider,
    stored,
)
from jfbnb.teaching.swipe import Comparison, to_png
from jfbnb.teaching.upload import Upload
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import expected_methods, make_methods

WHOLE = 1200  # pixels on the longer side of a picture for the browser
OUTLINE = 96  # pixels on the longer side of a kernel's picture
LINKED = 8_000_000  # bytes of a result that fits into the page as a link
EXAMPLE = "motion:9,30"


class KernelControls(w.HBox):
    """Controls for a kernel, by shape and sliders, from a file or estimated, with its picture."""

    def __init__(self) -> None:
        self.kind = w.Dropdown(options=["motion", "gaussian", "disk", "a file", "estimated"],
                               description="kernel")
        self.file = Upload(accept=f"{ACCEPTED},.npy,.txt,.csv", description="kernel file",
                           tooltip="a picture of the kernel, or its numbers")
        std, size = slider("std", 2, 0.3, 6, 0.1), int_slider("cut to", 13, 3, 37, 2)
        self.shapes = {
            "motion": [slider("length", 9, 1, 60, 0.5), slider("angle (°)", 30, -90, 90, 1)],
            "gaussian": [std, size], "disk": [slider("radius", 3, 0.5, 20, 0.1)],
            "a file": [self.file], "estimated": []}
        self.outline = w.Image(format="png", layout=w.Layout(width=f"{OUTLINE}px"))
        self.about = w.HTML(layout=w.Layout(width="200px"))
        self.controls = [self.kind, *itertools.chain(*self.shapes.values())]
        std.observe(lambda _: setattr(size, "value", 2 * math.ceil(3 * std.value) + 1), "value")
        observe(self.controls, self.adapt)
        super().__init__([w.VBox(self.controls), w.VBox([self.outline, self.about])],
                         layout=w.Layout(flex_flow="row wrap"))
        self.adapt()

    def kernel(self) -> tuple[str, Tensor | None]:
        """The kernel as the command writes it, and the kernel; None if it is to be estimated.

        Raises:
            UserError: if no file is given, or it is not a kernel.
        """
        if self.kind.value == "estimated":
            return "", None
        if self.kind.value != "a file":
            numbers = ",".join(f"{control.value:g}" for control in self.shapes[self.kind.value])
            text = f"{self.kind.value}:{numbers}"
            return text, kernel_option.parse(text)
        if self.file.value is None:
            raise UserError("there is no kernel yet: upload a picture of it, a .npy or a .txt")
        name, content = self.file.value
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(content)
            try:
                return path.name, kernel_option.read(path)
            except UserError as error:  # the user does not know that folder
                raise UserError(str(error).replace(f"{path.parent}/", "")) from error

    def adapt(self) -> None:
        """Show the sliders of this shape, and the kernel or an error."""
        for kind, controls in self.shapes.items():
            for control in controls:
                control.layout.display = "" if kind == self.kind.value else "none"
        self.outline.layout.display = "none"
        try:
            _, kernel = self.kernel()
        except UserError as error:
            self.about.value = message(str(error), wrong=True)
            return
        if kernel is None:
            self.about.value = "a Gaussian, disk, motion or shake, from the picture"
            return
        self.draw(kernel)

    def draw(self, kernel: Tensor) -> None:
        """Show the kernel and its size."""
        self.about.value = f"{kernel.shape[1]} x {kernel.shape[0]} pixels"
        grey = (kernel / kernel.max()).expand(1, 3, -1, -1)
        larger = interpolate(grey, scale_factor=math.ceil(OUTLINE / max(kernel.shape)))
        self.outline.value = to_png(_fit(larger[0], OUTLINE))
        self.outline.layout.display = ""


class PhotographExplorer(Alive):
    """*Your photograph*: a blurred picture and its restoration under the swipe handle.

    It starts with an example, which is restored at once. An upload keeps its size, depth and pages;
    of several pages the first is shown. Errors are shown in a line.

    Args:
        method: the method that is selected first.
        weights: the folder of trained networks; None for the released ones.
        folder: for results that are too large for a link.
    """

    def __init__(self, method: str = "jfb", weights: Path | None = None,
                 folder: Path = Path(".")):
        self.weights, self.folder = weights, folder
        self.loaded: dict[str, Restorer] = {}
        self.worker: threading.Thread | None = None
        self.stopped = False
        self.upload = Upload(accept=ACCEPTED, description="photograph",
                             tooltip="a blurred picture")
        self.noise = log_slider("noise std", 0.01, -3, -0.5)
        self.estimated = w.Checkbox(True, description="estimate the noise")
        self.kernel = KernelControls()
        self.border = w.Dropdown(options=BORDERS, description="border")
        self.method = w.Dropdown(options=[(METHODS[name].label, name)
                                          for name in expected_methods(weights)],
                                 value=method, description="method")
        self.button = button("Restore", self.press)
        self.start_anew = button("Reset", lambda: (self.reset(), self.press()))
        self.status = w.HTML()
        self.comparison = Comparison({"": torch.zeros(3, 8, 8), " ": torch.zeros(3, 8, 8)})
        self.settings = [self.noise, self.estimated, *self.kernel.controls, self.border,
                         self.method]
        self.defaults = [control.value for control in self.settings]
        observe(self.settings, self.adapt)
        observe([self.upload], self.take_upload)
        super().__init__(
            row(w.VBox([self.upload, self.noise, self.estimated, self.border, self.method]),
                w.VBox([self.kernel, w.HBox([self.button, self.start_anew])])),
            self.status, self.comparison)
        self.reset()
        self.restore()

    def _repr_mimebundle_(self, **kwargs: object) -> tuple[dict[str, object], dict[str, object]]:
        """The widget, and both pictures, small, for readers without a kernel."""
        pair = torch.cat([_fit(x, 400) for x in (self.pages[0].pixels, self.result)], dim=2)
        return stored(super()._repr_mimebundle_(**kwargs), to_png(pair), WITHOUT_KERNEL,
                      f"{self.name}, as it was given and restored")

    def reset(self) -> None:
        """Show the example, and set all controls to their defaults."""
        for control, value in zip(self.settings, self.defaults, strict=True):
            control.value = value
        self.upload.value = None
        self.begin("example.png", [example()])

    # --- input ----------------------------------------------------------------------------------

    def take_upload(self) -> None:
        """Read the uploaded picture and show it, or the error."""
        if self.upload.value is None:
            return
        name, content = self.upload.value
        try:
            self.begin(name, read_pictures(io.BytesIO(content)))
        except (UserError, MemoryError) as error:
            self.say(f"{name}: {str(error) or 'memory ran out: take a smaller picture'}",
                     wrong=True)

    def begin(self, name: str, pages: list[Picture]) -> None:
        """Replace the picture; it is restored later."""
        self.name, self.pages, self.result = name, pages, pages[0].pixels
        self.show()
        self.adapt()
        _, height, width = self.result.shape
        line = f"{name}: {width} x {height} pixels"
        if len(pages) > 1:
            line += f", {len(pages)} pages, of which the first is shown"
        self.say(f"{line}; set its kernel, and press Restore",
                 *filter(None, [pages[0].note]))

    def adapt(self) -> None:
        """Show that the settings have changed since the restoration."""
        self.noise.disabled = self.estimated.value
        self.button.button_style = "primary"

    # --- restoration ----------------------------------------------------------------------------

    def press(self) -> None:
        """Start a restoration, or stop the running one."""
        if self.worker and self.worker.is_alive():
            self.stopped = True
            self.say("stopping")
            return
        self.stopped = False
        # In a separate thread: otherwise Jupyter would process no click before the end.
        self.worker = threading.Thread(target=self.restore, daemon=True)
        self.worker.start()

    def restore(self) -> None:
        """Restore every page, show the first, offer the file. Uploads are disabled meanwhile."""
        busy = self.upload, self.start_anew
        self.button.description = "Stop"
        for control in busy:
            control.disabled = True
        # Every application of a module, network or operator, checks for a stop.
        asks = register_module_forward_pre_hook(lambda *_: self.go_on())
        try:
            self._restore()
            self.button.button_style = ""
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            self.say(str(error) or type(error).__name__, wrong=True)
        finally:
            asks.remove()
            self.button.description = "Restore"
            for control in busy:
                control.disabled = False

    def go_on(self) -> None:
        """Raise UserError in the restoring thread if it is to stop."""
        if self.stopped and threading.current_thread() is self.worker:
            raise UserError("stopped: press Restore to start again")

    @torch.no_grad()
    def _restore(self) -> None:
        start = time.perf_counter()
        text, kernel = self.kernel.kernel()
        noise_std = None if self.estimated.value else self.noise.value
        name, border, device = self.method.value, self.border.value, pick_device("auto")
        if name not in self.loaded:
            self.loaded |= make_methods([name], self.weights, device)
        found: list[Restored] = []

        def progress(done: int, tiles: int) -> None:
            self.go_on()
            share = (len(found) + done / tiles) / len(self.pages)
            left = (time.perf_counter() - start) * (1 / share - 1) if share else 0
            self.say(f"restoring, {tiles * len(self.pages)} tiles: {share:.0%}"
                     + f", about {left:.0f} s to go" * bool(share))

        if kernel is None:
            self.say("estimating the kernel; a shake may take a minute")
        for page in self.pages:
            found.append(restore(self.loaded[name], page.pixels.to(device), kernel, noise_std,
                                 border, progress, gamma=page.gamma))
        first = found[0]
        self.result = first.image.cpu()
        if noise_std is None:
            self.noise.value = first.noise_std
        self.show()
        if isinstance(first.kernel, Tensor):
            self.kernel.draw(first.kernel)
            text = "a shake"
        line = (f"{METHODS[name].label}, kernel {text or first.kernel}, "
                f"noise {first.noise_std:.2g}")
        line += ", restored in light" * bool(self.pages[0].gamma)
        if first.iterations is not None:
            line += f", {first.iterations} iterations, residual {first.residual:.1e}"
        pages = [page.with_pixels(f.image) for page, f in zip(self.pages, found, strict=True)]
        link = self.offer(f"{Path(self.name).stem}-{name}{pages[0].suffix}", pages)
        warnings = dict.fromkeys(  # each once
            warning.line(lambda name, value: f"{name.replace('_', ' ')} {value}")
            for f in found for warning in f.warnings)
        self.say(f"{line}, {time.perf_counter() - start:.1f} s", *warnings, link=link)

    def offer(self, name: str, pages: list[Picture]) -> str:
        """A link to the pages as a file; a file too large for a link is written to `folder`."""
        with tempfile.TemporaryDirectory() as folder:
            write_pictures(Path(folder) / name, pages)
            content = (Path(folder) / name).read_bytes()
        if len(content) > LINKED:
            target = (self.folder / name).absolute()
            with atomic_path(target) as temporary:
                temporary.write_bytes(content)
            return f"written to {html.escape(str(target))}"
        kind = "png" if name.endswith(".png") else "tiff"
        return (f'<a download="{html.escape(name)}" href="data:image/{kind};base64,'
                f'{base64.b64encode(content).decode()}">download {html.escape(name)}</a>')

    def show(self) -> None:
        """Show the picture and its restoration, resized for the browser."""
        self.comparison.show({"as it was": _fit(self.pages[0].pixels, WHOLE),
                              "restored": _fit(self.result, WHOLE)})

    def say(self, line: str, *warnings: str, wrong: bool = False, link: str = "") -> None:
        """Show a line, in red for an error, with a link, and warnings."""
        self.status.value = message(line, wrong, link) + "".join(
            message(text, wrong=True) for text in warnings)


def _fit(x: Tensor, side: int) -> Tensor:
    """Resize an image (C, H, W) to (3, h, w), with h and w at most `side`."""
    scale = min(1.0, side / max(x.shape))
    size = [max(1, round(n * scale)) for n in x.shape[1:]]
    return interpolate(x[None], size=size, mode="bilinear", antialias=True)[0].expand(3, -1, -1)


def example() -> Picture:
    """A photograph by a moving camera: blurred, then cut, with noise, in 8 bits."""
    kernel = kernel_option.parse(EXAMPLE).flip(0, 1)
    (kh, kw), whole = kernel.shape, torch.from_numpy(skimage.data.astronaut())
    scene = whole[20 : 179 + kh, 140 : 299 + kw].permute(2, 0, 1).double() / 255
    blurred = conv2d(scene[:, None], kernel[None, None])[:, 0]
    noise = torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))
    pixels = ((blurred + 0.01 * noise).clamp(0, 1) * 255).round() / 255
    return Picture(pixels.float(), np.dtype("uint8"), (0, 255), (0, 255))
