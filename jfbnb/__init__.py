"""jfbnb: implicit networks for inverse problems, trained with Jacobian-free backpropagation.

`deblur` restores an image. The other names are the parts of a method: an operator A, a denoiser D,
a map T made of both, `solve` for its fixed point, and `jfb` to differentiate it.

>>> import jfbnb, torch
>>> A = jfbnb.Convolution(32, jfbnb.disk(2))
>>> x_true = torch.rand(1, 3, 32, 32, generator=torch.manual_seed(0))
>>> d = A(x_true)
>>> D = jfbnb.Denoiser(jfbnb.DnCNN(depth=2, width=4), sigma=0.05)
>>> T = jfbnb.SplittingMap(A, D, tau=0.1)
>>> x, info = jfbnb.solve(T, d)
>>> info.converged.item()
True
>>> loss = (jfbnb.jfb(lambda x: T(x, d), x) - x_true).square().mean()
>>> loss.backward()
"""

from importlib import import_module
from importlib.metadata import version

__version__ = version("jfbnb")

# Each module is imported when one of its names is first used, so `import jfbnb` is quick.
_HOMES = {name: module for module, names in {
    "jfbnb.photo.arrays": ("deblur", "load"),
    "jfbnb.core.operators": ("LinearOperator", "Convolution", "Blur", "Downsampling", "Inpainting",
                             "MRI"),
    "jfbnb.core.kernels": ("disk", "gaussian", "motion"),
    "jfbnb.core.denoisers": ("Denoiser", "DnCNN"),
    "jfbnb.core.maps": ("SplittingMap",),
    "jfbnb.core.fixed_point": ("solve",),
    "jfbnb.core.gradients": ("jfb",),
    "jfbnb.core.metrics": ("psnr", "ssim"),
    "jfbnb.common": ("UserError",),
}.items() for name in names}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'jfbnb' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
