"""A button to upload a file of any size: the browser sends it in pieces.

Jupyter's server silently drops messages over 10 MB, so ipywidgets' own upload fails.
"""

import anywidget
import traitlets

PIECE = 2_000_000  # bytes

SCRIPT = """
export default {
  render({ model, el }) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    label.className = "jupyter-button";
    label.append(model.get("description"), input);
    label.title = model.get("tooltip");
    label.style.width = "auto";
    input.type = "file";
    input.accept = model.get("accept");
    input.style.display = "none";
    const enable = () => { input.disabled = model.get("disabled"); };
    enable();
    model.on("change:disabled", enable);
    input.onclick = () => { input.value = ""; };
    input.onchange = async () => {
      for (const file of input.files)
        for (let at = 0; at === 0 || at < file.size; at += PIECE) {
          const piece = await file.slice(at, at + PIECE).arrayBuffer();
          model.send({ name: file.name, first: at === 0, last: at + PIECE >= file.size },
                     undefined, [piece]);
        }
    };
    el.append(label);
  },
};
""".replace("PIECE", str(PIECE))


class Upload(anywidget.AnyWidget):
    """A button with a label. `value` is the last file: (name, content), or None."""

    _esm = SCRIPT
    description = traitlets.Unicode().tag(sync=True)
    tooltip = traitlets.Unicode().tag(sync=True)
    accept = traitlets.Unicode().tag(sync=True)
    disabled = traitlets.Bool(False).tag(sync=True)
    value = traitlets.Tuple(allow_none=True, default_value=None)  # (name, content)

    def __init__(self, **options: str):
        super().__init__(**options)
        self.pieces: list[bytes] = []
        self.on_msg(self._take)

    def _take(self, _: anywidget.AnyWidget, sent: dict, buffers: list) -> None:
        if sent["first"]:
            self.pieces = []
        self.pieces += [bytes(piece) for piece in buffers]
        if sent["last"]:
            self.value, self.pieces = (sent["name"], b"".join(self.pieces)), []
