"""Convert stored values to light and back: a blur averages light, a file stores a power of it."""

from torch import Tensor

from jfbnb.common import UserError

SRGB_LINEAR = 0.04045, 12.92  # below this value sRGB is light times this


def parse(given: str | float) -> float | str | None:
    """"linear" becomes 1.0, "auto" None, a number a float. Raises UserError for others."""
    if given in ("srgb", "auto"):
        return given if given == "srgb" else None
    try:
        gamma = 1.0 if given == "linear" else float(given)
    except (TypeError, ValueError):
        gamma = 0.0
    if not 0.2 <= gamma <= 5:
        raise UserError(f"gamma {given}: give auto, srgb, linear or a number, e.g. 2.2")
    return gamma


def decode(d: Tensor, gamma: float | str) -> Tensor:
    """The light of stored values d: d^gamma, or by sRGB's curve (IEC 61966-2-1).

    Values below 0 become 0 unless gamma is 1.
    """
    if gamma == 1:
        return d
    d = d.clamp_min(0)
    if gamma != "srgb":
        return d**gamma
    threshold, factor = SRGB_LINEAR
    return (d / factor).where(d <= threshold, ((d + 0.055) / 1.055) ** 2.4)


def encode(x: Tensor, gamma: float | str) -> Tensor:
    """The inverse of `decode`."""
    if gamma == 1:
        return x
    x = x.clamp_min(0)
    if gamma != "srgb":
        return x ** (1 / gamma)
    threshold, factor = SRGB_LINEAR
    return (x * factor).where(x <= threshold / factor, 1.055 * x ** (1 / 2.4) - 0.055)


def slope(d: Tensor, gamma: float | str) -> float:
    """The factor by which `decode` scales noise in d: the root mean square of its derivative."""
    if gamma == 1:
        return 1.0
    step = 1e-3
    high, low = (decode(d.clamp(0, 1) + sign * step, gamma) for sign in (1, -1))
    return ((high - low) / (2 * step)).square().mean().sqrt().item()
