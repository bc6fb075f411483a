"""The swipe comparison, and one explorer for each notebook. This module only draws.

`compare` needs no kernel once it is shown. An explorer does: it answers each slider by computing
anew, and shows what goes wrong as a line of its own.
"""

import base64
import html
import importlib
import io
import itertools
import sys
import uuid
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from PIL import Image
from torch import Tensor

from jfbnb.common import UserError
from jfbnb.core.metrics import psnr, ssim

SCRIPT = (Path(__file__).parent / "swipe.js").read_text(encoding="utf-8")
STYLE = """
.jfbnb-compare figure { display: inline-block; margin: 0 8px 8px 0; text-align: center; }
.jfbnb-compare figure img { width: 192px; image-rendering: pixelated; }
.jfbnb-swipe { display: inline-block; max-width: 100%; font-size: 13px; }
.jfbnb-swipe canvas { display: block; max-width: 100%; touch-action: none; cursor: ew-resize; }
.jfbnb-swipe canvas:focus-visible { outline: 2px solid #0072B2; outline-offset: 2px; }
.jfbnb-bar { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin-bottom: 4px; }
.jfbnb-captions { display: flex; justify-content: space-between; gap: 16px; font-weight: bold; }
.jfbnb-readout { min-height: 1.4em; font-family: monospace; font-size: 12px; }
"""


def enable_on_colab() -> None:
    """On Google Colab: turn on the switch without which it shows no widgets of other packages."""
    if "google.colab" in sys.modules:
        importlib.import_module("google.colab.output").enable_custom_widget_manager()


enable_on_colab()


def to_png(image: Tensor) -> bytes:
    """An image (3, H, W) in [0, 1], clipped, as 8-bit PNG."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png")
    return buffer.getvalue()


class Comparison(anywidget.AnyWidget):
    """Any two of some labelled images under one handle; see `compare`.

    Shown by itself it is plain HTML with its script inside, so that it lives on in an exported
    page. Inside other widgets it is a widget.
    """

    _esm = SCRIPT + """
export default {
  render({ model, el }) {
    let view = null;
    const build = () => {
      el.innerHTML = model.get("figures");
      view = mount(el.firstElementChild, view);
    };
    build();
    model.on("change:figures", build);
  },
};
"""
    _css = STYLE
    figures = traitlets.Unicode().tag(sync=True)

    def __init__(self, images: dict[str, Tensor], truth: str | None = None):
        super().__init__()
        self.show(images, truth)

    def show(self, images: dict[str, Tensor], truth: str | None = None) -> None:
        """Replace the images; see `compare`."""
        images = {label: _single(label, image) for label, image in images.items()}
        _check_comparable(images, truth)
        self.figures = _figures(images, truth)

    def to_html(self) -> str:
        """One self-contained piece of HTML: the pictures, and the script that joins them."""
        name = f"jfbnb-{uuid.uuid4().hex}"
        body = self.figures.replace("<div ", f'<div id="{name}" ', 1)
        return (f"{body}\n<style>{STYLE}</style>\n<script>(() => {{\n{SCRIPT}\n"
                f'mount(document.getElementById("{name}"));\n}})();</script>')

    def _repr_mimebundle_(self, **_: object) -> tuple[dict, dict]:
        return {"text/html": self.to_html(), "text/plain": "a comparison of images"}, {}


def compare(images: dict[str, Tensor], truth: str | None = None) -> Comparison:
    """Any two of the images under one swipe handle, chosen by two menus.

    Mouse, touch and arrow keys move the handle; both images zoom and move together; pixel values
    are shown under the pointer. Nothing is asked of the kernel, nor of the network.

    Args:
        images: label -> image (3, H, W) or (1, 3, H, W) in [0, 1], at least two, of one size.
        truth: the label of the original: the others then get PSNR, SSIM and an error map.

    Raises:
        UserError: for fewer than two images, other shapes, or a truth that is not among them.
    """
    return Comparison(images, truth)


def _single(label: str, image: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or image.dim() not in (3, 4):
        raise UserError(f"{label!r} is not an image: give a tensor (3, H, W) in [0, 1]")
    image = image[0] if image.dim() == 4 and len(image) == 1 else image
    if image.dim() != 3 or len(image) != 3:
        raise UserError(f"{label!r} has the shape {tuple(image.shape)}: give one image (3, H, W)")
    return image.detach().cpu()


def _check_comparable(images: dict[str, Tensor], truth: str | None) -> None:
    if len(images) < 2:
        raise UserError(f"{len(images)} image to compare: give at least two")
    for (first, a), (second, b) in itertools.pairwise(images.items()):
        if a.shape != b.shape:
            raise UserError(f"{first!r} is {tuple(a.shape)} and {second!r} {tuple(b.shape)}: only "
                            "images of one size can be compared")
    if truth is not None and truth not in images:
        raise UserError(f"truth is {truth!r}: choose one of {', '.join(images)}")


def _figures(images: dict[str, Tensor], truth: str | None) -> str:
    """The images as HTML that a reader can do with when no script runs."""
    parts = []
    for label, image in images.items():
        metrics = ""
        if truth is not None and label != truth:
            pair = image[None], images[truth][None]
            metrics = f"{psnr(*pair).item():.2f} dB, SSIM {ssim(*pair).item():.3f}"
        name = html.escape(label)
        picture = base64.b64encode(to_png(image)).decode()
        parts.append(
            f'<figure data-label="{name}" data-metrics="{metrics}"'
            f'{" data-truth" if label == truth else ""}>'
            f'<img alt="{name}" src="data:image/png;base64,{picture}">'
            f"<figcaption>{name}<br>{metrics}</figcaption></figure>")
    return (f'<div class="jfbnb-compare" data-left="0" data-right="{len(images) - 1}">'
            + "".join(parts) + "</div>")
