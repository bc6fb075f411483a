"""Answers to the notebooks' exercises: right, or what to look at. Solutions are elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass

RIGHT = "right"


@dataclass(frozen=True)
class Choice:
    """One of some words; for each wrong one, what to look at."""

    right: str
    wrong: Mapping[str, str]

    def judge(self, given: object) -> str:
        word = str(given).strip()
        if word.lower() == self.right.lower():
            return RIGHT
        for other, look in self.wrong.items():
            if word.lower() == other.lower():
                return f"not so: {look}"
        return f"{given!r} is none of {', '.join(sorted([self.right, *self.wrong]))}"


@dataclass(frozen=True)
class Number:
    """A number, right within some distance. `slips` are typical wrong ones, and where to look."""

    right: float
    within: float
    look: str
    slips: Mapping[float, str]

    def judge(self, given: object) -> str:
        try:
            value = float(given)
        except (TypeError, ValueError):
            return f"{given!r} is no number"
        if abs(value - self.right) <= self.within:
            return RIGHT
        for slip, look in self.slips.items():
            if abs(value - slip) <= 0.1 * abs(slip):
                return f"not so: {look}"
        return f"not so: {self.look}"


def answer(exercise: str, given: object = None) -> None:
    """Print whether an answer is right, or what to look at; None is no answer yet."""
    verdict = "no answer yet" if given is None else EXERCISES[exercise].judge(given)
    print(f"{exercise}: {verdict}")


EXERCISES: dict[str, Choice | Number] = {
    "1.1": Choice("better", {
        "worse": "compare the smallest eigenvalues of both kernels, and not their widths"}),
    # 1.2 and 1.3 by the formula of 1.4, for the paper's blur.
    "1.2": Number(-4.68, 1.5, "put the standard deviation of the hint into the formula of 1.4", {
        -23.6: "that is with the protocol's noise: add none, round only",
        4.68: "look at the sign: the error is larger than the image"}),
    "1.3": Number(2.09e-5, 0.4e-5, "30 dB is a mean squared error of 1e-3, and that is sigma^2 "
                  "times the mean of 1/mu^2", {
        4.36e-10: "that is the variance: take its root",
        6.6e-7: "30 dB is a ratio of squares: 10^(30/20), not 10^(30/10)"}),
    "2.1": Choice("no", {
        "yes": "count the steps from both starts, and compare with how far the curve is flat"}),
    "2.2": Choice("slow", {
        "fast": "what is the gradient of a grey wall, and what that of a fence?"}),
    "2.3": Number(2.0, 0.7, "run it on a fine grid of weights, once with each noise level", {
        4.0: "the variance grows by 4; but the patterns where image and noise balance are others "
             "now, and stronger",
        1.0: "it does move: the hint has the reason"}),
    "3.1": Choice("0.1", {
        "0.025": "how many pixels does one need to average noise away, and how many are seen?"}),
    "3.2": Choice("worse", {
        "better": "what does a network that looks for noise take, where there is none left?"}),
    "3.3": Choice("nothing", {
        "edges": "compare its size with what the blur has taken away",
        "blur": "compare its size with what the blur has taken away"}),
    "4.1": Choice("larger", {
        "smaller": "the penalty acts on what stretches; what is there without it?",
        "the same": "look at the largest norm, over all images"}),
    "4.2": Number(2, 0, "differentiate T(T(x*)) in Theta by the chain rule", {
        1: "the second application has a derivative of its own"}),
    "4.3": Choice("x*", {
        "z*": "which of the two maps ends with the denoiser?"}),
    "5.1": Choice("DnCNN", {
        "JFB, DE-PROX": "no weight of it follows the noise, but it is told the blur; who is not?",
        "Tikhonov": "its weight follows the noise: sort the changes",
        "Total variation": "its weight follows the noise: sort the changes",
        "JFB, splitting": "its weight follows the noise: sort the changes"}),
    "5.2": Choice("Direct inverse", dict.fromkeys(
        ("JFB, splitting", "Tikhonov", "Total variation", "DnCNN", "Gradient descent"),
        "which image has the most values far out of [0, 1]?")),
    "5.3": Choice("smooth", {
        "full of detail": "look at it under the swipe handle: what is there to restore?"}),
    "6.1": Choice("mosaic first", {
        "blur first": "the adjoint of a product goes back in the opposite order"}),
    "6.2": Choice("the equilibrium", {
        "total variation": "how far is the next known pixel, and how far does each look?"}),
    "6.3": Choice("the equilibrium", {
        "total variation": "run it for all powers, and compare largest and smallest PSNR"}),
}
