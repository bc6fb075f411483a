"""The networks, their precision, and what a weights file is refused for."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from jfbnb.common import UserError
from jfbnb.core.denoisers import Denoiser, DnCNN, UNet, make_network
from jfbnb.training import weights as weights_module
from jfbnb.training.weights import fill, load_denoiser, load_weights, read_card, save_weights


class Tent(torch.nn.Module):
    """A network of one's own: R(x) = gain * x / reach."""

    def __init__(self, reach: int, steep: bool = False):
        super().__init__()
        self.reach, self.steep = reach, steep
        self.gain = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, sigma):
        return self.gain * x / self.reach


class Forgetful(Tent):
    """It does not keep all that its constructor is given."""

    def __init__(self, reach, factor):
        super().__init__(reach)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.safetensors"


def forge(file, descriptions, tensors=None) -> None:
    save_file(tensors or {"w": torch.zeros(3)}, file,
              metadata=None if descriptions is None else {"networks": json.dumps(descriptions)})


def dncnn(**arguments) -> dict:
    return {"class": "DnCNN",
            "arguments": {"depth": 2, "width": 4, "channels": 3} | arguments}


def unet(**arguments) -> dict:
    return dncnn(**arguments) | {"class": "UNet"}


def scatter(network: torch.nn.Module) -> torch.nn.Module:
    """With random weights, of the last layer too, that keep the size of what passes through."""
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=(2 * weight[0].numel())**-0.5, generator=generator)
    return network


def refusal(file, match: str, load=load_denoiser, **more) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(file, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", [DnCNN(3, 8), UNet(1, 4), UNet(3, 4)])
def test_a_network_starts_as_the_identity(network):
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(Denoiser(network, 0.1)(x), x)


def test_network_sees_its_receptive_field_and_no_more():
    torch.manual_seed(0)
    network = DnCNN(4, 8)
    torch.nn.init.normal_(network.layers[-1].weight)
    x = torch.rand(1, 3, 31, 31, requires_grad=True)
    network(x, 0.1)[0, :, 15, 15].sum().backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows.min() >= 15 - 4 and rows.max() <= 15 + 4
    assert len(rows) > 5


def plain_unet(w: dict[str, torch.Tensor], depth: int, x: torch.Tensor,
               sigma: float) -> torch.Tensor:
    """A U-Net of its weights by name, on images whose sides the coarsest step divides."""
    def block(z, name):
        inner = F.elu(F.conv2d(z, w[f"{name}.layers.0.weight"], padding=1))
        return z + F.conv2d(inner, w[f"{name}.layers.2.weight"], padding=1)

    z = F.conv2d(torch.cat([x, torch.full_like(x[:, :1], sigma)], 1), w["first.weight"],
                 w["first.bias"], padding=1)
    levels = []
    for level in range(depth - 1):
        levels.append(block(z, f"before.{level}"))
        z = F.conv2d(levels[-1], w[f"down.{level}.weight"], stride=2)
    z = block(block(z, "bottom.0"), "bottom.1")
    for level in reversed(range(depth - 1)):
        z = block(levels[level] + F.conv_transpose2d(z, w[f"up.{level}.weight"], stride=2),
                  f"after.{level}")
    return F.conv2d(z, w["last.weight"], w["last.bias"], padding=1)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_unet_is_its_formula_on_any_size(depth):
    network = scatter(UNet(depth, 4)).double()
    weights = network.state_dict()
    for height, width in ((16, 24), (13, 18), (5, 7), (1, 3)):
        x = torch.rand(2, 3, height, width, dtype=torch.float64)
        step = 2**(depth - 1)
        whole = F.pad(x, (0, -width % step, 0, -height % step), mode="replicate")
        expected = plain_unet(weights, depth, whole, 0.05)[..., :height, :width]
        torch.testing.assert_close(network(x, 0.05), expected)
        torch.testing.assert_close(network(x, torch.full((2, 1, 1, 1), 0.05)), expected)


def test_a_network_is_made_by_its_name():
    network = make_network("UNet", 3, 4)
    assert isinstance(network, UNet) and (network.depth, network.width) == (3, 4)
    assert isinstance(make_network("DnCNN", 3, 4), DnCNN)
    for arguments, message in (
            (("ResNet", 3, 4), "unknown network 'ResNet': choose from DnCNN, UNet$"),
            (("", 3, 4), "unknown network ''"), (("unet", 3, 4), "unknown network 'unet'"),
            (("UNet", 0, 4), "depth 0 and width 4: both must be at least 1"),
            (("DnCNN", 3, -1), "depth 3 and width -1: both must be at least 1"),
            (("UNet", 17, 64), "UNet of depth 17 and width 64: .*over 4096 channels")):
        with pytest.raises(UserError, match=message):
            make_network(*arguments)


@pytest.mark.parametrize(("network", "own"), [
    (DnCNN(3, 6), []), (UNet(2, 4), []), (Tent(3, steep=True), [Tent])])
def test_weights_round_trip(file, network, own):
    D = Denoiser(scatter(network) if not own else network, 0.03)
    save_weights(file, D, {"protocol": "paper"})
    loaded = load_denoiser(file, networks=own)
    x = torch.rand(1, 3, 9, 10)
    assert torch.equal(loaded(x), D(x)) and not torch.equal(D(x), x)
    card = read_card(file)
    (made_of,) = card["networks"]
    assert made_of["class"] == type(network).__name__ and card["protocol"] == "paper"
    assert all(getattr(loaded.network, k) == v for k, v in made_of["arguments"].items())
    assert card["weights"] == sum(value.numel() for value in D.state_dict().values())


def test_a_network_of_ones_own_is_given_or_listed(file, monkeypatch):
    D = Denoiser(Tent(3, steep=True), 0.1)
    save_weights(file, D, {})
    refusal(file, r"of the class Tent, which is none of DnCNN, UNet: "
                  "import it yourself and give it by `networks`")
    monkeypatch.setattr(weights_module, "NETWORKS", [DnCNN, Tent])
    assert load_denoiser(file).network.reach == 3


def test_several_denoisers_are_stored_in_their_order(file):
    pair = torch.nn.ModuleList([Denoiser(DnCNN(2, 4), 0.1), Denoiser(Tent(2), 0.2)])
    save_weights(file, pair, {})
    loaded = load_weights(file, lambda a, b: torch.nn.ModuleList(
        [Denoiser(a, 0.0), Denoiser(b, 0.0)]), [Tent])
    assert isinstance(loaded[0].network, DnCNN) and isinstance(loaded[1].network, Tent)
    assert loaded[1].sigma.item() == pytest.approx(0.2)


def test_nothing_that_a_file_names_is_imported(file, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    forge(file, [{"class": "evil.Network", "arguments": {}}])
    refusal(file, "of the class evil.Network, which is none of")


def test_a_network_that_forgets_what_it_is_made_of_cannot_be_saved(file):
    with pytest.raises(UserError, match="Forgetful does not keep factor of its constructor: set "
                                        r"self\.NAME = NAME for each"):
        save_weights(file, Denoiser(Forgetful(1, 2), 0.1), {})
    assert not file.exists() and not file.with_suffix(".json").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:64], lambda b: b"", lambda b: b[:-10]])
def test_truncated_weights(weights, damage):
    path = weights / "denoiser.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refusal(path, r"weights .*denoiser\.safetensors are damaged")


@pytest.mark.parametrize(("descriptions", "message"), [
    *[(d, "do not say of which networks they are") for d in (
        None, [dncnn(depth=[2])], [dncnn(width=10**9)], [dncnn(width=float("nan"))],
        [dncnn() | {"code": 1}], [{"class": 3, "arguments": {}}], ["DnCNN"], {}, 3)],
    *[(d, "are of something else") for d in (
        [dncnn(depth=2.0)], [dncnn(extra=1)], [dncnn(width=-1)], [dncnn(width=None)], [],
        [dncnn(), dncnn()], [unet(depth=0)], [unet(depth=4096)])],
    *[(d, "do not fit the networks that they name") for d in (
        [dncnn(depth=True)], [dncnn(channels=1)], [dncnn(depth=3)], [unet()], [unet(depth=3)])]])
def test_descriptions_of_other_networks_or_of_none(file, descriptions, message):
    tensors = Denoiser(DnCNN(2, 4), 0.1).state_dict()
    forge(file, descriptions, {name: value.contiguous() for name, value in tensors.items()})
    refusal(file, message)


def test_tensors_that_are_not_those_of_the_network(file):
    D = Denoiser(DnCNN(2, 4), 0.1)
    tensors = {name: value.contiguous() for name, value in D.state_dict().items()}
    for change, message in (
            ({"sigma": torch.tensor(0.1, dtype=torch.float64)}, "do not fit"),
            ({"sigma": torch.zeros(1)}, "do not fit"), ({"more": torch.zeros(1)}, "do not fit"),
            ({"sigma": torch.tensor(float("nan"))}, "not all finite"),
            ({"network.layers.0.bias": torch.full((4,), float("inf"))}, "not all finite")):
        forge(file, [dncnn()], tensors | change)
        refusal(file, message)
    with pytest.raises(UserError, match="are not those of Denoiser"):
        fill(file, Denoiser(UNet(2, 4), 0.03))
    forge(file, [dncnn()], tensors)
    assert load_denoiser(file).sigma.item() == pytest.approx(0.1)


@pytest.mark.parametrize("claim", [{"width": 4096}, {"depth": 600, "width": 4096}])
def test_a_small_file_that_claims_a_large_network_gets_no_memory(file, claim, monkeypatch):
    """The first would take 600 MB of memory a layer, the other 360 GB."""
    made = []

    class Observed(DnCNN):
        def __init__(self, depth, width, channels):
            super().__init__(depth, width, channels)
            made.append({parameter.device.type for parameter in self.parameters()})

    forge(file, [dncnn(**{"depth": 4, **claim}) | {"class": Observed.__qualname__}])
    refusal(file, "do not fit the networks that they name", networks=[Observed])
    assert made == [{"meta"}]
