"""The swipe comparison of images, which runs in the browser alone. See `compare`."""

import base64
import html
import io
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


def to_png(image: Tensor) -> bytes:
    """An image (3, H, W) in [0, 1], clipped, as 8-bit PNG."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png")
    return buffer.getvalue()


class Comparison(anywidget.AnyWidget):
    """Any two of some labelled images under one handle; see `compare`.

    Alone it is shown as plain HTML with its script, so that it works in an exported page. Inside
    other widgets it is a widget.
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
        if len(images) < 2:
            raise UserError(f"{len(images)} image to compare: give at least two")
        if truth is not None and truth not in images:
            raise UserError(f"truth is {truth!r}: choose one of {', '.join(images)}")
        images = {label: _single(label, image) for label, image in images.items()}
        sizes = {tuple(image.shape) for image in images.values()}
        if len(sizes) > 1:
            raise UserError(f"images of the shapes {sorted(sizes)}: give images of the same size")
        figures = "".join(_figure(label, image, images.get(truth), label == truth)
                          for label, image in images.items())
        self.figures = (f'<div class="jfbnb-compare" data-left="0" data-right="{len(images) - 1}">'
                        f"{figures}</div>")

    def to_html(self) -> str:
        """Self-contained HTML: the pictures, and the script that combines them."""
        name = f"jfbnb-{uuid.uuid4().hex}"
        body = self.figures.replace("<div ", f'<div id="{name}" ', 1)
        return (f"{body}\n<style>{STYLE}</style>\n<script>(() => {{\n{SCRIPT}\n"
                f'mount(document.getElementById("{name}"));\n}})();</script>')

    def _repr_mimebundle_(self, **_: object) -> tuple[dict, dict]:
        return {"text/html": self.to_html(), "text/plain": "a comparison of images"}, {}


def compare(images: dict[str, Tensor], truth: str | None = None) -> Comparison:
    """Compare any two of the images, chosen by two menus, under one swipe handle.

    Mouse, touch and arrow keys move the handle; both images zoom and move together; pixel values
    are shown under the pointer. It runs in the browser, without a kernel or a network connection.

    Args:
        images: label -> image (3, H, W) or (1, 3, H, W) in [0, 1], at least two, of the same size.
        truth: the label of the original: the others then get PSNR, SSIM and an error map.

    Raises:
        UserError: for fewer than two images, other shapes, or a truth that is not among them.
    """
    return Comparison(images, truth)


def _single(label: str, image: Tensor) -> Tensor:
    shape = tuple(getattr(image, "shape", ()))
    if not isinstance(image, Tensor) or shape[:-2] not in ((3,), (1, 3)):
        raise UserError(f"{label!r} is not one image: give a tensor (3, H, W) in [0, 1]")
    return image.detach().cpu().reshape(shape[-3:])


def _figure(label: str, image: Tensor, truth: Tensor | None, is_truth: bool) -> str:
    """An image as HTML that is readable without scripts."""
    metrics = ""
    if truth is not None and not is_truth:
        pair = image[None], truth[None]
        metrics = f"{psnr(*pair).item():.2f} dB, SSIM {ssim(*pair).item():.3f}"
    name, picture = html.escape(label), base64.b64encode(to_png(image)).decode()
    return (f'<figure data-label="{name}" data-metrics="{metrics}"'
            f'{" data-truth" if is_truth else ""}>'
            f'<img alt="{name}" src="data:image/png;base64,{picture}">'
            f"<figcaption>{name}<br>{metrics}</figcaption></figure>")
