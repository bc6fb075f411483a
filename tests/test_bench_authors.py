"""The network published with the paper, rebuilt from its file."""

from collections import OrderedDict

import authors
import pandas as pd
import pytest
import torch
from torch import nn

from jfbnb.core.operators import Blur


def published(features: int = 4) -> nn.Sequential:
    """Their layers, built by PyTorch's modules, in training mode, as the paper's code has them."""
    def conv(c_in: int, c_out: int) -> nn.Module:
        return nn.utils.spectral_norm(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False))

    torch.manual_seed(0)
    layers = [conv(3, features), nn.ReLU()]
    for _ in range(15):
        norm = nn.BatchNorm2d(features)
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias, 0.0, 0.2)
        layers += [conv(features, features), norm, nn.ReLU()]
    network = nn.Sequential(*layers, conv(features, 3))
    for _ in range(500):  # the power iterations of spectral normalisation
        network(torch.zeros(2, 3, 4, 4))
    return network


def store(network: nn.Module, path) -> None:
    torch.save(OrderedDict((f"dncnn.dncnn.{k}", v) for k, v in network.state_dict().items()), path)


def test_the_network_is_the_one_that_torch_builds(tmp_path):
    network = published()
    store(network, tmp_path / "w.pth")
    x = torch.rand(3, 3, 12, 12)
    with torch.no_grad():
        found = authors.AuthorsMap(tmp_path / "w.pth").network(x)
        torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-5)


def test_iterates_are_those_of_the_map_by_hand(tmp_path, monkeypatch):
    store(published(), tmp_path / "w.pth")
    monkeypatch.setattr(authors, "FURTHER", 4)
    monkeypatch.setattr(authors, "EVERY", 2)
    T, A = authors.AuthorsMap(tmp_path / "w.pth"), Blur(16, 5, 5.0)
    x = 2 * torch.rand(2, 3, 16, 16) - 1
    d = A(x)
    table = authors.iterates(T, x, d, ["a", "b"])
    y = A.adjoint(d)
    with torch.no_grad():
        for _ in range(4):
            y = y - 1e-3 * (A.adjoint(A(y) - d) + T.network(y))
    last = table[table.iteration == 4]
    theirs = -10 * torch.log10((y - x).square().mean(dim=(1, 2, 3)))
    assert last["psnr as theirs"].tolist() == pytest.approx(theirs.tolist(), abs=1e-4)
    assert (last.psnr - last["psnr as theirs"]).tolist() == pytest.approx([6.0206] * 2, abs=1e-3)
    assert table.iteration.unique().tolist() == [0, 2, 4]


def test_files_that_are_not_theirs_are_refused_in_one_line(tmp_path, capsys):
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    store(published().append(nn.Identity()), tmp_path / "wide.pth")
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "module.pth")
    (tmp_path / "text.pth").write_text("<html>")
    for name, message in (("none.pth", "no file"), ("other.pth", "is not of the network"),
                          ("module.pth", "holds no tensors alone"),
                          ("text.pth", "holds no tensors alone")):
        assert authors.main(["--weights", str(tmp_path / name), "--out", str(tmp_path)]) == 1
        said = capsys.readouterr().out.strip().splitlines()
        assert len(said) == 2 and said[1].startswith("error: ") and message in said[1]


def test_a_table_and_a_curve_are_drawn(tmp_path):
    pd.DataFrame({"image": ["a", "b"] * 4, "iteration": [0, 0, 150, 150, 200, 200, 300, 300],
                  "change": 0.1, "psnr": 30.0, "psnr as theirs": 24.0, "ssim": 0.9,
                  "ssim as theirs": 0.8}).to_csv(tmp_path / "authors.csv")
    authors.report(tmp_path)
    assert "24.00" in (tmp_path / "authors_table.md").read_text()
    assert (tmp_path / "authors.png").is_file()
