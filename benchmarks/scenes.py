"""Pictures and measurements that the package does not make, for it to restore.

SciPy blurs a whole scene and a window is cut from it; white noise is added, and the result is
clipped and rounded to eight bits. Some go on as a camera does. Pictures are (H, W, 3) in [0, 1].
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import skimage.data
import tifffile
from PIL import ExifTags, Image
from scipy import ndimage

NOISE = 0.01

# --- kernels and scenes -------------------------------------------------------------------------


def gaussian(size: int, std: float) -> np.ndarray:
    row = np.exp(-0.5 * ((np.arange(size) - size // 2) / std) ** 2)
    return np.outer(row, row) / row.sum() ** 2


def motion(length: float, angle: float, points: int = 10_000) -> np.ndarray:
    """The share of a thin line in each pixel; the angle is anticlockwise from the right."""
    at = length * ((np.arange(points) + 0.5) / points - 0.5)
    edges = np.arange(np.ceil(length / 2) + 1) + 0.5
    edges, turn = np.concatenate([-edges[::-1], edges]), np.radians(angle)
    kernel = np.histogram2d(-at * np.sin(turn), at * np.cos(turn), [edges, edges])[0]
    return kernel[kernel.any(axis=1)][:, kernel.any(axis=0)] / points


def disk(radius: int, fine: int = 41) -> np.ndarray:
    n = 2 * radius + 1
    at = (np.arange(n * fine) - (n * fine - 1) / 2) / fine
    inside = at[:, None] ** 2 + at**2 <= radius**2
    return inside.reshape(n, fine, n, fine).sum(axis=(1, 3)) / inside.sum()


def shake(side: int, seed: int, points: int = 10_000) -> np.ndarray:
    """The share of the time that a camera on a smooth random path spends in each pixel."""
    path = np.random.default_rng(seed).standard_normal((points, 2)).cumsum(axis=0)
    path = ndimage.gaussian_filter1d(path, points / 20, axis=0)
    path -= path.min(axis=0)
    path *= (side - 1) / path.max()
    return np.histogram2d(*path.T, [np.arange(side + 1) - 0.5] * 2)[0] / points


def photograph(name: str) -> np.ndarray:
    """A whole scene of scikit-image's; of a stereo pair, the left one."""
    found = getattr(skimage.data, name)()
    return (found[0] if isinstance(found, tuple) else found) / 255


def middle(image: np.ndarray, side: int) -> np.ndarray:
    top, left = ((n - side) // 2 for n in image.shape[:2])
    return image[top:top + side, left:left + side]


def rim(image: np.ndarray, width: int) -> np.ndarray:
    """A mask of the pixels within `width` of the border."""
    return np.pad(np.zeros([n - 2 * width for n in image.shape[:2]], bool), width,
                  constant_values=True)


def blurred(scene: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return ndimage.convolve(scene, kernel[..., None], mode="nearest")


def to_light(image: np.ndarray) -> np.ndarray:
    """sRGB's curve, IEC 61966-2-1."""
    return np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)


def from_light(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def demosaiced(image: np.ndarray) -> np.ndarray:
    """One colour of each pixel, in Bayer's pattern, and bilinear interpolation of the others."""
    near = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4
    weights, mosaic = np.zeros((2, *image.shape))
    for c, (row, column) in ((0, (0, 0)), (1, (0, 1)), (1, (1, 0)), (2, (1, 1))):
        weights[row::2, column::2, c] = 1
        mosaic[row::2, column::2, c] = image[row::2, column::2, c]
    near = near[..., None]
    return ndimage.convolve(mosaic, near) / ndimage.convolve(weights, near)


def noisy(image: np.ndarray, noise_std: float, soft: float = 0.0) -> np.ndarray:
    """An image with white noise, perhaps smoothed, in eight bits."""
    image = image + noise_std * np.random.default_rng(0).standard_normal(image.shape)
    image = ndimage.gaussian_filter(image, (soft, soft, 0)) if soft else image
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8)


def mirrored(width: int, height: int) -> np.ndarray:
    """A scene of any size: a photograph, continued by its mirror images."""
    x = photograph("coffee")
    more = [(0, max(0, n - have)) for n, have in zip((height, width), x.shape, strict=False)]
    return np.pad(x, (*more, (0, 0)), mode="symmetric")[:height, :width]


def read(file: str | Path) -> np.ndarray:
    file = Path(file)
    image = tifffile.imread(file) if file.suffix == ".tif" else np.asarray(Image.open(file)) / 255
    return np.atleast_3d(image)


# --- blurred pictures ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """How a scene becomes a file.

    Args:
        option: the right `--kernel`; "picture" for a picture of it, "" if there is none.
        exposure: a factor of the scene's light, before it is clipped.
        frame: width in pixels of a black frame.
        quality: of JPEG; None writes a PNG.
        grey: one channel.
        raw: whether it is blurred and noisy in light and then demosaiced, as a camera's.
        exif: whether the file says that a camera made it.
        soft: std in pixels of a Gaussian that smooths scene and noise.
    """

    name: str
    kernel: np.ndarray
    option: str = ""
    noise_std: float = NOISE
    exposure: float = 1.0
    frame: int = 0
    quality: int | None = None
    grey: bool = False
    raw: bool = False
    exif: bool = False
    soft: float = 0.0

    def take(self, name: str, side: int, folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
        """The file of a photograph, the picture in it, and the sharp one."""
        scene = self.exposure * photograph(name)
        if self.grey:
            scene = scene @ np.array([[0.299], [0.587], [0.114]])
        x = middle(scene, side).clip(0, 1)
        if self.raw:
            d = middle(blurred(to_light(scene), self.kernel), side)
            noise = self.noise_std * np.random.default_rng(0).standard_normal(d.shape)
            d = np.rint(255 * from_light(demosaiced(d + noise))).astype(np.uint8)
        else:
            d = noisy(middle(blurred(scene, self.kernel), side), self.noise_std, self.soft)
        x[rim(x, self.frame)] = d[rim(x, self.frame)] = 0
        file = folder / f"{name}.{'jpg' if self.quality else 'png'}"
        exif = Image.Exif()
        if self.exif:
            exif[ExifTags.Base.Make] = "a camera"
        Image.fromarray(d[..., 0] if self.grey else d).save(file, quality=self.quality, exif=exif)
        return file, read(file), x

    def right(self, folder: Path) -> str:
        """The right `--kernel`."""
        if self.option != "picture":
            return self.option
        file = folder / "kernel.png"
        Image.fromarray(np.rint(255 * self.kernel / self.kernel.max()).astype(np.uint8)).save(file)
        return str(file)


USUAL = f"gaussian:{5**0.5},5"
GAUSSIAN = Case("Gaussian 5 x 5, std sqrt 5", gaussian(5, 5**0.5), USUAL)
MOTION = Case("motion of 9 at 30 degrees", motion(9, 30), "picture")
DISK = Case("disk of radius 3", disk(3), "disk:3")
WIDE = Case("Gaussian 15 x 15, std 3", gaussian(15, 3), "gaussian:3,15")
WRONG = (  # given `USUAL` and a noise of 0.01
    replace(GAUSSIAN, name="noise 0.03 told 0.01", noise_std=0.03),
    replace(GAUSSIAN, name="noise 0.1 told 0.01", noise_std=0.1),
    Case("not blurred", np.ones((1, 1))),
    Case("Gaussian 5 x 5, std 1", gaussian(5, 1), "gaussian:1,5"),
    WIDE,
    Case("motion of 9, horizontal", motion(9, 0), "picture"),
    Case("motion of 9, diagonal", motion(9, 45), "picture"),
    Case("disk of radius 4", disk(4), "disk:4"),
    Case("2.5 times overexposed", GAUSSIAN.kernel, exposure=2.5),
    Case("black frame", GAUSSIAN.kernel, frame=12),
    Case("JPEG of quality 20", GAUSSIAN.kernel, quality=20))
RIGHT = tuple(replace(case, name=f"{case.name}, noise {noise_std}", noise_std=noise_std)
              for case, noise_std in ((GAUSSIAN, 0.003), (GAUSSIAN, 0.03), (MOTION, 0.01),
                                      (DISK, 0.005), (WIDE, 0.02)))
STORED = (  # as people have them
    *(replace(case, name=f"JPEG of quality {quality}", noise_std=noise_std, quality=quality)
      for quality in (80, 90, 95, 98) for noise_std in (0.003, 0.01)
      for case in (DISK, MOTION, GAUSSIAN)),
    replace(DISK, name="grey", grey=True),
    replace(DISK, name="grey, JPEG of quality 90", grey=True, quality=90),
    replace(DISK, name="smoothed by 0.7 pixels", soft=0.7),
    replace(DISK, name="a camera's", raw=True, exif=True, quality=95),
    replace(DISK, name="a camera's, without EXIF", raw=True, quality=95))
NEARLY = (  # with the kernel that is given instead: a tenth larger or smaller, or turned a little
    (GAUSSIAN, "gaussian:2,5"), (GAUSSIAN, "gaussian:2.5,5"),
    (MOTION, "motion:8,30"), (MOTION, "motion:10,30"), (MOTION, "motion:9,24"),
    (DISK, "disk:2.7"), (DISK, "disk:3.3"))


# --- measurements by other operators ------------------------------------------------------------

Problem = tuple[object, np.ndarray, np.ndarray]  # the mask or size that defines A; d; x


def inpainting(x: np.ndarray) -> Problem:
    """Half of the pixels."""
    mask = np.random.default_rng(1).random(x.shape[:2]) < 0.5
    return mask, noisy(x, NOISE) / 255 * mask[..., None], x


def super_resolution(x: np.ndarray) -> Problem:
    """Means of 2 x 2 pixels."""
    means = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
    return x.shape[:2], noisy(means, NOISE) / 255, x


def mri(x: np.ndarray) -> Problem:
    """A third of the lines of k-space, with the middle ones; a grey image in three channels."""
    grey, rng = x @ [0.299, 0.587, 0.114], np.random.default_rng(1)
    n = len(grey)
    order = np.argsort(np.where(abs(np.arange(n) - n // 2) <= n // 25, -1, rng.random(n)))
    mask = np.tile(np.isin(np.arange(n), order[:n // 3]), (n, 1))
    k = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(grey), norm="ortho"))
    d = np.stack([k.real, k.imag], axis=-1) + NOISE * rng.standard_normal((n, n, 2))
    return mask, np.stack([d * mask[..., None]] * 3, axis=2), np.stack([grey] * 3, axis=2)
